"""Makes the golden files of `tests/interop/golden/pipeline_*`: tiny pipelines of diffusers with drawn weights, and what
they draw. Run by hand, where torch, diffusers and transformers are:

    python tests/interop/make_golden_pipelines.py [sd1 ...]
    python tests/interop/make_golden_pipelines.py --check sd1 DIR   # DIR as `jaxgen export` writes it

A folder holds what `drawn.pipeline_folder` makes a whole pipeline of, with the autoencoder, the tokenizer and the
DiT that are golden files themselves; and `io.npz`: `latents`, with which the pipeline begins, `out`, those it ends
with, and `pictures` of them, from 0 to 1, all channels last.
"""

import json
import sys
import tempfile
from pathlib import Path

import diffusers as d
import numpy as np
import torch
import transformers as t
from drawn import GUIDANCE, LABELS, LENGTH, PROMPTS, STEPS, draw, hole, pipeline_folder
from make_golden import HERE, arrays, write_io
from make_golden_diffusers import nhwc, normal

UNET = dict(
    in_channels=4, out_channels=4, sample_size=8, norm_num_groups=4, cross_attention_dim=12, layers_per_block=1,
    block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
TEXT = dict(
    vocab_size=520, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=LENGTH, projection_dim=12, bos_token_id=518, eos_token_id=519,
)  # fmt: skip
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
MODELS = {
    "sd1": (dict(attention_head_dim=2), dict(hidden_act="quick_gelu", pad_token_id=519), dict(BETAS), "<|endoftext|>"),
    "sd2": (dict(attention_head_dim=(1, 2), use_linear_projection=True), dict(hidden_act="gelu", pad_token_id=0),
            dict(BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True), "!"),
    "inpainting": (dict(attention_head_dim=2, in_channels=9), dict(hidden_act="quick_gelu", pad_token_id=519),
                   dict(BETAS), "<|endoftext|>"),
}  # fmt: skip


def save(folder: Path, model: torch.nn.Module, before: str = "") -> None:
    """The configuration of a model, and the names and shapes by which it is drawn."""
    model.config.save_pretrained(folder) if hasattr(model.config, "save_pretrained") else model.save_config(folder)
    shapes = {before + name: [list(value.shape), "float32"] for name, value in model.state_dict().items()}
    (folder / "drawn.json").write_text(json.dumps(shapes, indent=0) + "\n")


def save_index(folder: Path, kind: str, scheduler: d.DDIMScheduler, **parts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"_class_name": kind, "_diffusers_version": d.__version__, **parts,
            "scheduler": ["diffusers", "DDIMScheduler"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(told, indent=1) + "\n")
    scheduler.save_config(folder / "scheduler")


def save_stable(name: str) -> None:
    more, text, betas, padding = MODELS[name]
    folder, kind = HERE / f"pipeline_{name}", "Inpaint" if name == "inpainting" else ""
    save_index(
        folder, f"StableDiffusion{kind}Pipeline",
        d.DDIMScheduler(timestep_spacing="trailing", steps_offset=1, **betas),
        unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
        text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
        safety_checker=[None, None], feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=False,
    )  # fmt: skip
    save(folder / "unet", d.UNet2DConditionModel(**UNET | more))
    config = t.CLIPTextConfig(**TEXT, **text, architectures=["CLIPTextModel"])
    save(folder / "text_encoder", t.CLIPTextModel(config), "text_model.")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token=padding)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special}, indent=1) + "\n")  # fmt: skip
    write_io(folder, run(name, whole(name)))


def save_dit() -> None:
    labels = {str(i): label for i, label in enumerate(LABELS)}
    scheduler = d.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    folder = HERE / "pipeline_dit"
    save_index(folder, "DiTPipeline", scheduler, id2label=labels, vae=["diffusers", "AutoencoderKL"],
               transformer=["diffusers", "DiTTransformer2DModel"])  # fmt: skip
    write_io(folder, run("dit", whole("dit")))


def whole(name: str) -> Path:
    """The pipeline's folder, made as the tests make it."""
    return pipeline_folder(name, Path(tempfile.mkdtemp()) / name)


@torch.no_grad()
def run(name: str, folder: Path) -> dict[str, np.ndarray]:
    settings = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    if name == "dit":   # which draws its noise itself, and guides by a class of the released ones
        pipeline = d.DiTPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        settings["guidance_scale"] = 1.0
        generator = torch.Generator().manual_seed(0)
        pictures = pipeline([1, 4], generator=generator, output_type="np", **settings).images
        return arrays(latents=nhwc(normal(2, 4, 8, 8)), pictures=pictures)
    kind = d.StableDiffusionInpaintPipeline if name == "inpainting" else d.StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    for part, before in ((pipeline.unet, ""), (pipeline.text_encoder, "text_model.")):
        for key, value in part.state_dict().items():   # every weight came in
            assert np.array_equal(value.numpy(), draw(before + key.removeprefix(before), tuple(value.shape))), key
    latents = normal(2, 4, 8, 8)
    told = dict(prompt=list(PROMPTS), latents=latents, height=32, width=32, **settings)
    if name == "inpainting":   # the mean of what is left as latents, where it would draw them by itself
        image, mask = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in hole())
        seen = pipeline.vae.encode(image * (1 - mask)).latent_dist.mode() * pipeline.vae.config.scaling_factor
        told |= dict(image=image, mask_image=mask, masked_image_latents=seen)
        return arrays(latents=nhwc(latents), out=nhwc(pipeline(**told, output_type="latent").images))
    out = pipeline(**told, output_type="latent").images
    return arrays(latents=nhwc(latents), out=nhwc(out), pictures=pipeline(**told, output_type="np").images)


def check(name: str, folder: Path) -> None:
    """What ours wrote, loaded and run by the reference, against what it drew at first."""
    wanted, found = dict(np.load(HERE / f"pipeline_{name}" / "io.npz")), run(name, folder)
    for key in wanted:
        print(f"{name} {key}: {np.abs(found[key] - wanted[key]).max():.1e} of {np.abs(wanted[key]).max():.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2], Path(sys.argv[3]))
    else:
        for each in sys.argv[1:] or [*MODELS, "dit"]:
            save_dit() if each == "dit" else save_stable(each)
