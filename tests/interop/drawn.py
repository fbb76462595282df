"""Weights that are drawn rather than stored: the same here and where the golden files were made."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


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
