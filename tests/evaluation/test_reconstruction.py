"""PSNR and SSIM against NumPy, and the evaluation of an autoencoding task."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Ready, Tables

from jaxgen.data.base import Prepared
from jaxgen.errors import UserError
from jaxgen.evaluation.base import Setting
from jaxgen.evaluation.reconstruction import Reconstruction, psnr, ssim
from jaxgen.sharding import RULES, Mesh, Sharding
from jaxgen.tasks.base import Task

N, SIDE = 11, 16


def ssim_of(a, b):
    """A window at a time, with variances about its own mean (Wang et al. 2004, eq. 13 to 17)."""
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel in range(a.shape[2]):
        for r in range(a.shape[0] - 10):
            for c in range(a.shape[1] - 10):
                x, y = (np.float64(p[r : r + 11, c : c + 11, channel]) for p in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                both = (weights * (x - mx) * (y - my)).sum()
                found.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(found)


def pictures(seed=0, count=3, channels=3):
    random = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(SIDE), np.arange(SIDE))[None, :, :, None] * 6
    image = smooth + random.normal(0, 25, (count, SIDE, SIDE, channels)) + random.uniform(0, 60, (count, 1, 1, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_numpys(channels):
    a, b = pictures(0, channels=channels), pictures(1, channels=channels)
    b[1] = np.clip(a[1] * 0.6 + 40, 0, 255)
    found = jax.jit(ssim)(jnp.float32(a), jnp.float32(b))
    np.testing.assert_allclose(found, [ssim_of(*pair) for pair in zip(a, b, strict=True)], atol=2e-5)
    assert found.min() < 0.6 < found[1]
    np.testing.assert_allclose(ssim(jnp.float32(a), jnp.float32(a)), 1, atol=1e-5)


def test_ssim_of_flat_pictures():
    """Where there is no variance, squares that lose digits would tell."""
    a, b = np.full((1, 12, 12, 1), 250.0), np.full((1, 12, 12, 1), 240.0)
    expected = (2 * 250 * 240 + 2.55**2) / (250**2 + 240**2 + 2.55**2)
    np.testing.assert_allclose(ssim(jnp.float32(a), jnp.float32(b)), expected, atol=1e-4)


def test_psnr_is_numpys():
    a, b = pictures(0), pictures(1)
    b[2] = a[2]
    expected = [10 * np.log10(255**2 / np.mean((np.float64(x) - y) ** 2)) for x, y in zip(a[:2], b[:2], strict=True)]
    np.testing.assert_allclose(psnr(jnp.float32(a), jnp.float32(b)), [*expected, 100.0], rtol=1e-5)


# ---- the evaluation ----


class Held(Prepared):
    """Eleven pictures, the fourth of which cannot be read."""

    def __init__(self, side=SIDE):
        self.images = pictures(2, N)[:, :side]

    def train(self, seed):
        return grain.MapDataset.range(N).map(lambda n: {"image": self.images[n]}).repeat()

    def heldout(self):
        return grain.MapDataset.range(N).map(lambda n: {"image": self.images[n], "weights": np.float32(n != 3)})


@dataclasses.dataclass(frozen=True)
class Darker(Task):
    """Takes the state from each pixel."""

    def reconstruct(self, params, state, batch):
        return jnp.clip(batch["image"].astype(jnp.int32) - state, 0, 255).astype(jnp.uint8)


def setting(task=Darker(), data=None, mesh=Mesh(), devices=1):
    spec = {"image": jax.ShapeDtypeStruct((8, SIDE, SIDE, 3), jnp.uint8)}
    return Setting(task, data or Held(), Sharding(mesh.build(jax.devices()[:devices]), RULES), spec)


@pytest.mark.parametrize(("mesh", "devices"), [(Mesh(), 1), (Mesh(data=8), 8)])
def test_measures_all_that_can_be_read(mesh, devices):
    report = Reconstruction(shown=3, columns=2).build(setting(mesh=mesh, devices=devices))({}, jnp.int32(20), 0)
    images = np.delete(Held().images, 3, 0)
    pairs = [(x, np.clip(x.astype(int) - 20, 0, 255).astype(np.uint8)) for x in images]
    ratios = [10 * np.log10(255**2 / np.mean((np.float64(a) - b) ** 2)) for a, b in pairs]
    assert report.metrics == {
        "psnr": pytest.approx(np.mean(ratios), rel=1e-5),
        "ssim": pytest.approx(np.mean([ssim_of(*pair) for pair in pairs]), abs=1e-4),
    }
    sheet = report.images["reconstruction"]
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 4 * (96 + 12) and sheet.shape[0] > 2 * 96
    first = sheet[6 : 6 + 96, 6 : 6 + 96][::6, ::6]
    np.testing.assert_array_equal(first, images[0])
    np.testing.assert_array_equal(sheet[6 : 6 + 96, 114 : 114 + 96][::6, ::6], pairs[0][1])


def test_shows_nothing_where_nothing_is_asked_for():
    assert Reconstruction(shown=0).build(setting())({}, jnp.int32(0), 0).images == {}


def test_what_it_needs():
    with pytest.raises(UserError, match="needs a task that reconstructs pictures, and Tables does not"):
        Reconstruction().build(setting(Tables()))
    with pytest.raises(UserError, match="in windows of 11 x 11 pixels, and the pictures have 8 x 16"):
        Reconstruction(data=Ready(Held(8))).build(setting())
