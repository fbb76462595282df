"""Makes the golden files of diffusers' networks in `tests/interop/golden`, as make_golden.py does for other projects.
Run by hand, where torch and diffusers are:

    python tests/interop/make_golden_diffusers.py             # all
    python tests/interop/make_golden_diffusers.py --check DIR # DIR holds what ours wrote, a folder for each

`io.npz` has what the network takes, pictures as (B, H, W, C), and its output `out`. `diffusers_names.json` says of the
released networks, by their configurations, what all names and shapes of their tensors come to.
"""

import hashlib
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from make_golden import HERE, arrays, randomise, save_drawn, write_io

UNET = dict(in_channels=4, out_channels=4, sample_size=16, norm_num_groups=4, cross_attention_dim=12)
XL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
    addition_embed_type="text_time",
)  # fmt: skip
TINY = {
    "diffusers_sd1": ("UNet2DConditionModel", dict(
        UNET, block_out_channels=(8, 16, 16, 16), attention_head_dim=2, layers_per_block=1)),
    "diffusers_sd2_inpainting": ("UNet2DConditionModel", dict(
        UNET, in_channels=9, block_out_channels=(8, 16), attention_head_dim=(1, 2), layers_per_block=2,
        use_linear_projection=True, num_class_embeds=5, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))),
    "diffusers_sdxl": ("UNet2DConditionModel", dict(
        UNET, **XL, block_out_channels=(8, 16, 32), attention_head_dim=(1, 2, 4), layers_per_block=1,
        transformer_layers_per_block=(1, 2, 3), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8)),
    "diffusers_dit": ("DiTTransformer2DModel", dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8, in_channels=4, out_channels=8,
        num_embeds_ada_norm=5)),
}  # fmt: skip
RELEASED = {
    "sd1.5": ("UNet2DConditionModel", dict(cross_attention_dim=768, sample_size=64)),
    "sd2.1": ("UNet2DConditionModel", dict(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True, sample_size=96)),
    "sdxl": ("UNet2DConditionModel", dict(
        XL, block_out_channels=[320, 640, 1280], attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
        transformer_layers_per_block=[1, 2, 10], addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, sample_size=128)),
    "sdxl-refiner": ("UNet2DConditionModel", dict(
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        use_linear_projection=True, addition_embed_type="text_time", block_out_channels=[384, 768, 1536, 1536],
        attention_head_dim=[6, 12, 24, 24], cross_attention_dim=1280, transformer_layers_per_block=4,
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560, sample_size=128)),
    "dit-xl-2-256": ("DiTTransformer2DModel", dict(out_channels=8)),
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def run(name: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    label = torch.tensor([3.0, 741.0])
    if "dit" in name:
        x, classes = normal(2, 4, 8, 8), torch.tensor([2, 5])
        out = model(x, label, classes).sample
        return arrays(x=nhwc(x), label=label, classes=classes, out=nhwc(out))
    x, tokens, io = normal(2, 4, 16, 8), normal(2, 5, 12, seed=1), {}
    given, told, beside = x, {}, None
    if "sd1" in name:
        io["mask"] = told["encoder_attention_mask"] = torch.arange(5)[None] < torch.tensor([[5], [2]])
    if "inpainting" in name:
        beside, io["classes"] = normal(2, 5, 16, 8, seed=2), torch.tensor([4, 1])
        given, told["class_labels"], io["image"] = torch.cat([x, beside], 1), io["classes"], nhwc(beside)
    if "xl" in name:
        io["pooled"], io["sizes"] = normal(2, 10, seed=3), torch.tensor([[64.0, 48, 0, 8, 32, 32], [9, 8, 7, 6, 5, 4]])
        told["added_cond_kwargs"] = {"text_embeds": io["pooled"], "time_ids": io["sizes"]}
    out = model(given, label, tokens, **told).sample
    return arrays(x=nhwc(x), label=label, tokens=tokens, **io, out=nhwc(out))


def save(name: str) -> None:
    kind, config = TINY[name]
    model, folder = randomise(getattr(diffusers, kind)(**config)), HERE / name
    if kind.startswith("DiT"):   # whose blocks have copies of one layer
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
        model.save_pretrained(folder)
    else:
        save_drawn(folder, model)
        model.save_config(folder)
    with torch.no_grad():
        write_io(folder, run(name, model))


def save_names() -> None:
    told = {}
    for name, (kind, config) in RELEASED.items():
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**config)
        tensors = {key: list(value.shape) for key, value in model.state_dict().items()}
        lines = "\n".join(f"{key} {tensors[key]}" for key in sorted(tensors))
        told[name] = {
            "config": {"_class_name": kind, **config}, "tensors": len(tensors),
            "digest": hashlib.sha256(lines.encode()).hexdigest(),
        }  # fmt: skip
        print(name, len(tensors), sum(value.numel() for value in model.parameters()))
    (HERE / "diffusers_names.json").write_text(json.dumps(told, indent=1) + "\n")


def check(folder: Path) -> None:
    """What ours wrote, loaded and run by the reference, against what it gave at first."""
    for name, (kind, _) in TINY.items():
        model, told = getattr(diffusers, kind).from_pretrained(folder / name, output_loading_info=True)
        assert not any(told.values()), told
        wanted = np.load(HERE / name / "io.npz")["out"]
        with torch.no_grad():
            found = run(name, model.eval())["out"]
        print(f"{name}: {np.abs(found - wanted).max() / np.abs(wanted).max():.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--check"]:
        check(Path(sys.argv[2]))
    else:
        for each in TINY:
            save(each)
        save_names()
