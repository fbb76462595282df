"""jaxgen: train, sample and measure generative models in JAX."""
