"""How well pictures come back from an autoencoder: PSNR, SSIM, and a sheet to look at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.data.base import Data
from jaxgen.data.sheets import sheet
from jaxgen.errors import UserError
from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Report, Setting

WINDOW, SIGMA = 11, 1.5
"""Pixels along the side of SSIM's window, and the standard deviation of its weights."""
K1, K2 = 0.01, 0.03
MOST = 100.0
"""PSNR of an exact copy, which has none."""


def psnr(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """Peak signal-to-noise ratio of each picture of 0 to 255, in dB; of an exact copy `MOST`."""
    error = jnp.square(a - b).reshape(len(a), -1).mean(1)
    return jnp.minimum(10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-9)), MOST)


def ssim(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """Structural similarity of each picture of 0 to 255 (Wang et al. 2004, eq. 13): the mean over channels and all
    places of a window of 11 x 11 that lies within the picture."""
    at = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(at**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).tolist()

    def blur(x):
        for axis in (1, 2):
            size = x.shape[axis] - WINDOW + 1
            x = sum(w * jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i, w in enumerate(weights))
        return x

    a, b = (x / 255 - 0.5 for x in (a, b))  # about 0 squares lose fewer digits
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    c1, c2 = K1**2, K2**2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    found /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return found.reshape(len(found), -1).mean(1)


@dataclasses.dataclass(frozen=True)
class Reconstruction(Evaluation):
    """PSNR (dB) and SSIM of held-out pictures that were encoded and decoded, each a mean over the pictures.

    The report's picture shows some of them, each with its reconstruction to its right.
    """

    name: str = "reconstruction"
    data: Data | None = None
    """Pictures whose held-out part is measured; None for the experiment's own."""
    shown: int = 12
    """Pictures in the report's picture; 0 for no picture."""
    columns: int = 4
    """Of these, in a row."""
    batch_size: int = 0
    """Examples at a time; 0 for the training batch's."""

    def build(self, setting: Setting):
        task = setting.task
        whole.demand(self, task, "reconstructs pictures", "reconstruct")
        data = whole.prepared(self, self.data, setting, "image")
        dataset = whole.held_out(self, data)
        height, width = dataset[0]["image"].shape[:2]
        if min(height, width) < WINDOW:
            raise UserError(
                f"the evaluation '{self.name}' measures SSIM in windows of {WINDOW} x {WINDOW} pixels, and the "
                f"pictures have {height} x {width}"
            )

        def measure(params, state, batch):
            found = task.reconstruct(params, state, batch).astype(jnp.float32)
            image = batch["image"].astype(jnp.float32)
            return {"psnr": psnr(found, image), "ssim": ssim(found, image)}

        def show(params, state, batch):
            return {"made": task.reconstruct(params, state, batch), "image": batch["image"]}

        size = self.batch_size or whole.default_batch(setting)
        measured = whole.rows(dataset, setting, size, measure)
        some = min(self.shown, len(dataset))
        shown = None
        if some:
            shown = whole.rows(dataset.slice(slice(some)), setting, whole.whole_rows(setting.sharding, some), show)

        def run(params, state, step):
            found = measured(params, state)
            if not len(found["index"]):
                raise UserError(f"the evaluation '{self.name}': of {len(dataset)} held-out pictures none can be read")
            metrics = {name: float(np.mean(found[name], dtype=np.float64)) for name in ("psnr", "ssim")}
            pictures = {}
            if shown is not None:
                pictures[self.name] = pairs_sheet(**shown(params, state), psnr=found["psnr"], columns=self.columns)
            return Report(metrics, {}, pictures)

        return run


def pairs_sheet(image: np.ndarray, made: np.ndarray, psnr: np.ndarray, columns: int, **_) -> np.ndarray:
    """Pictures, uint8 (N, H, W, C), each with its reconstruction to its right, and its PSNR below."""
    pictures, labels = [], []
    for one, other, value in zip(image, made, psnr, strict=False):
        pictures += [one, other]
        labels += ["", f"{value:.1f} dB"]
    return sheet(pictures, 2 * columns, labels)
