"""Makes the golden files `sd3`, `sd35` and `flux` of `tests/interop/golden`: tiny models of diffusers (0.42) with
random weights, as diffusers saves them, and what it computes with them. Run by hand, where torch and diffusers are:

    python tests/interop/make_golden_mmdit.py               # all; or some, by name
    python tests/interop/make_golden_mmdit.py --check sd3 DIR   # DIR is the model as jaxgen wrote it

`io.npz` holds inputs and the output in float32, pictures as (B, H, W, C).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from drawn import draw

HERE = Path(__file__).parent / "golden"
SIZES = dict(attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10)
SD3 = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, caption_projection_dim=16, pos_embed_max_size=6)
MODELS = {
    "sd3": lambda: SD3Transformer2DModel(**SIZES, **SD3, num_layers=3),
    "sd35": lambda: SD3Transformer2DModel(**SIZES, **SD3, num_layers=4, dual_attention_layers=(0, 1),
                                          qk_norm="rms_norm"),
    "flux": lambda: FluxTransformer2DModel(**SIZES, in_channels=16, num_layers=2, num_single_layers=2,
                                           guidance_embeds=True, axes_dims_rope=(2, 2, 4)),
}  # fmt: skip


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as patches of 2 x 2, as the pipeline of Flux cuts them: (B, N, 4 C), channels first."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, -1, 4 * channels)


def unpacked(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    x = x.reshape(x.shape[0], height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(x.shape[0], -1, height, width)


def run(name: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Inputs and the output."""
    x, tokens, pooled = normal(1, 2, 4, 8, 12), normal(2, 2, 5, 12), normal(3, 2, 10)
    label, guidance = torch.tensor([731.0, 88.5]), torch.tensor([3.5, 1.25])
    if name == "flux":
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
        places = torch.stack([torch.zeros(24), rows.reshape(-1), columns.reshape(-1)], -1)
        out = model(packed(x), tokens, pooled, label / 1000, places, torch.zeros(5, 3), guidance)[0]
        out = unpacked(out, 8, 12)
    else:
        out = model(x, tokens, pooled, label)[0]
    arrays = dict(x=x.permute(0, 2, 3, 1), tokens=tokens, pooled=pooled, label=label, out=out.permute(0, 2, 3, 1))
    if name == "flux":
        arrays["guidance"] = guidance
    return {key: value.contiguous().numpy() for key, value in arrays.items()}


def make(name: str) -> None:
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter, p in model.named_parameters():   # the table of positions, a buffer, stays as it is
            p.copy_(torch.from_numpy(draw(parameter, tuple(p.shape))))
        arrays = run(name, model)
    model.save_pretrained(HERE / name)
    np.savez(HERE / name / "io.npz", **arrays)
    size = sum(path.stat().st_size for path in (HERE / name).iterdir())
    print(f"{name}: {size:,} bytes, output {arrays['out'].std():.3f}")


def check(name: str, folder: str) -> None:
    kind = FluxTransformer2DModel if name == "flux" else SD3Transformer2DModel
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        found, wanted = run(name, model.eval())["out"], np.load(HERE / name / "io.npz")["out"]
    print(f"{name}: {np.abs(found - wanted).max() / np.abs(wanted).max():.1e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(*sys.argv[2:])
    else:
        for name in sys.argv[1:] or MODELS:
            make(name)
