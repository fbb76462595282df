"""Makes the golden files of `tests/interop/golden/autoencoder*`: tiny AutoencoderKL models of diffusers with random
weights, and what they compute. Run by hand, where torch and diffusers are:

    python tests/interop/make_golden_autoencoder.py
    python tests/interop/make_golden_autoencoder.py --check autoencoder DIR   # DIR as `jaxgen export` writes it

Each folder is as diffusers saves a model, with `io.npz` beside: `image` uint8 (B, H, W, C), the moments of its latents,
`latent`, and the picture decoded from it, all channels last and in float32.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from make_golden import HERE, arrays, nchw, picture, randomise, write_io

SMALL = dict(layers_per_block=1, norm_num_groups=4, sample_size=16)
MODELS = {
    # as Stable Diffusion 1, 2 and XL: three levels, of which the last two are alike
    "autoencoder": dict(
        SMALL, block_out_channels=(8, 16, 16), latent_channels=4, scaling_factor=0.18215,
    ),
    # as Stable Diffusion 3 and Flux: many latent channels with a shift, and no layers beside them
    "autoencoder_shifted": dict(
        SMALL, block_out_channels=(8, 16), latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False,
    ),
    # statistics of each channel, grey pictures, no attention
    "autoencoder_channels": dict(
        SMALL, block_out_channels=(8, 12), latent_channels=3, scaling_factor=0.5, latents_mean=[0.1, -0.2, 0.3],
        latents_std=[0.9, 1.1, 1.3], mid_block_add_attention=False, in_channels=1, out_channels=1,
    ),
}  # fmt: skip


def model_of(name: str) -> AutoencoderKL:
    config = dict(MODELS[name])
    levels = len(config["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **config
    )


@torch.no_grad()
def run(model: AutoencoderKL) -> dict:
    image = picture(2, 24, 16, model.config.in_channels)
    posterior = model.encode(nchw(image)).latent_dist
    latent = posterior.mean[:, :, :4] * 1.5   # of another shape than the picture's
    last = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    return arrays(image=image, mean=last(posterior.mean), log_variance=last(posterior.logvar), latent=last(latent),
                  decoded=last(model.decode(latent.contiguous()).sample), kl=posterior.kl())


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] == "--check":
        import numpy as np

        wanted, found = dict(np.load(HERE / arguments[1] / "io.npz")), run(AutoencoderKL.from_pretrained(arguments[2]))
        for key in ("mean", "log_variance", "decoded"):
            print(f"{key}: {np.abs(found[key] - wanted[key]).max() / np.abs(wanted[key]).max():.1e}")
        return
    for name in arguments or MODELS:
        folder: Path = HERE / name
        model = randomise(model_of(name))
        model.save_pretrained(folder)
        write_io(folder, run(model))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
