"""The algebra of diffusion: paths, predictions, denoisers, guidance and weightings, which go together in any way."""
