"""Weights that are drawn rather than stored: the same here and where the golden files were made."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
LENGTH = 16   # tokens of a text
PROMPTS = ("a photo of a cat", "two red cubes")
LABELS = ("crane", "cat", "a ball", "crane", "cube")
STEPS, GUIDANCE = 5, 3.0
"""What the golden pipelines draw, and how."""


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that keeps the size of activations, and matters: no norm is 1, no bias is 0, no variance 1.

    RandomState, unlike the newer generators, promises the same numbers in every version of NumPy.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    last = name.split(".")[-1]
    if last in ("logit_scale", "logit_bias"):
        return np.full(shape, 1.7 if last == "logit_scale" else -0.9, np.float32)
    if last == "running_var":
        return (0.5 + random.random_sample(shape)).astype(np.float32)
    noise = random.standard_normal(shape)
    if len(shape) <= 1:
        return (0.3 * noise + (last == "weight")).astype(np.float32)   # the weight of a norm
    return (noise / np.sqrt(np.prod(shape[1:])) * (1.2 if len(shape) == 4 else 1.0)).astype(np.float32)


def hole() -> tuple[np.ndarray, np.ndarray]:
    """Two pictures (2, 32, 32, 3) of -1 to 1, and the mask (2, 32, 32, 1) of what is hidden of each, by 8 pixels."""
    random = np.random.RandomState(1)
    image = np.repeat(np.repeat(random.uniform(-1, 1, (2, 4, 4, 3)), 8, 1), 8, 2).astype(np.float32)
    image = np.round((image + 1) * 127.5) / 127.5 - 1
    mask = random.randint(0, 2, (2, 4, 4, 1)).astype(np.float32)
    return image.astype(np.float32), np.repeat(np.repeat(mask, 8, 1), 8, 2)


def model_folder(folder: Path, at: Path) -> Path:
    """The golden model in `folder`; one without weights gets them drawn, in a copy at `at`."""
    if not (folder / "drawn.json").is_file():
        return folder
    at.mkdir(parents=True, exist_ok=True)
    (at / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {}
    for name, (shape, dtype) in json.loads((folder / "drawn.json").read_text()).items():
        tensors[name] = draw(name, tuple(shape)) if "float" in dtype else np.zeros(shape, np.int64)
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
    return at


def pipeline_folder(name: str, at: Path) -> Path:
    """The golden pipeline `name` (sd1, sd2, inpainting, dit) as a folder `at`, whole, as it would be downloaded."""
    shutil.copytree(GOLDEN / f"pipeline_{name}", at, ignore=shutil.ignore_patterns("io.npz"))
    copy = shutil.ignore_patterns("io.npz")
    shutil.copytree(GOLDEN / "autoencoder", at / "vae", ignore=copy)
    if name == "dit":
        shutil.copytree(GOLDEN / "diffusers_dit", at / "transformer", ignore=copy)
        return at
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shapes = json.loads((at / part / "drawn.json").read_text())
        tensors = {key: draw(key, tuple(shape)) for key, (shape, _) in shapes.items()}
        save_file(tensors, at / part / f"{file}.safetensors", metadata={"format": "pt"})
        (at / part / "drawn.json").unlink()
    model = json.loads((GOLDEN / "tokenizer_clip" / "tokenizer.json").read_text())["model"]
    (at / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [" ".join(pair) for pair in model["merges"]]
    (at / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    return at
