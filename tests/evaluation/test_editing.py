"""Edits that are read back, holes and enlarged pictures beside the true ones: by tasks that know the answer."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxgen.data.scenes import Scenes, render
from jaxgen.errors import UserError
from jaxgen.evaluation.editing import EditsRight, Restored, _Given, kind_of
from jaxgen.evaluation.generated import FactsRight
from jaxgen.tasks.base import Task
from jaxgen.tasks.beside import Before, Beside, Masked, Smaller, enlarged

EDITS = Scenes(heldout=4, edits=True).prepare()
SCENES = Scenes(heldout=4).prepare()


@dataclasses.dataclass(frozen=True)
class Gives(Task):
    """One of a batch's pictures, or zeros."""

    what: str = "image"
    beside: Beside = Before()

    def sample(self, params, state, batch, keys, sampling):
        if self.what == "small":
            return jnp.clip(jnp.round(enlarged(batch["small"], self.beside.factor)), 0, 255).astype(jnp.uint8)
        return batch[self.what] if self.what in batch else jnp.zeros_like(batch["image"])


def measured(evaluation, data, task):
    return evaluation.build(toys.setting(data, task))({}, {}, 0)


def test_edits_right():
    """The true picture is all right, and the unchanged one never."""
    right = measured(EditsRight(n=6, shown=2), EDITS, Gives())
    metrics = right.metrics
    assert all(metrics[f"{p}{n}"] == 1 for p in ("", "unseen/") for n in ("exact", "facts", "nearer"))
    assert metrics["unchanged"] == metrics["unseen/unchanged"] == 0
    kinds = {kind_of(EDITS.heldout_scene(i).facts, EDITS.heldout_edit(i)[0].facts) for i in range(6)}
    assert {f"exact/{k}" for k in kinds} == {k for k in metrics if k.startswith("exact/")}
    assert right.images["edits"].shape[2] == 3 and "6 edits of each split" in right.texts["edits"]
    copied = measured(EditsRight(n=6), EDITS, Gives("before")).metrics
    assert copied["exact"] == copied["nearer"] == 0 and copied["unchanged"] == 1 and 0.6 < copied["facts"] < 0.9


def test_restored():
    """In float64; of a hole its own pixels alone."""
    metrics = measured(Restored(n=5), SCENES, Gives("nothing", Masked())).metrics
    given = [_Given(SCENES.heldout(), 5, Masked(whole=0.0), 0)[i] for i in range(5)]
    mask, image = (np.stack([x[name] for x in given]).astype(np.float64) for name in ("mask", "image"))
    black = 255**2 * 3 * mask.sum() / (mask * image**2).sum()
    known = ((1 - mask) * image).sum((1, 2)) / (1 - mask).sum((1, 2))
    plain = 255**2 * 3 * mask.sum() / (mask * (known[:, None, None] - image) ** 2).sum()
    expected = {"psnr": 10 * np.log10(black), "plain_psnr": 10 * np.log10(plain)}
    assert metrics == pytest.approx(expected, abs=1e-3)
    enlarging = measured(Restored(n=5), SCENES, Gives("small", Smaller(4)))
    metrics = enlarging.metrics
    assert metrics["psnr"] == pytest.approx(metrics["bicubic_psnr"])
    assert metrics["ssim"] == pytest.approx(metrics["bicubic_ssim"], abs=1e-4)
    expected = []
    for i in range(4):
        image = render(SCENES.heldout_scene(i), 32).astype(np.float64)
        small = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
        plain = np.clip(np.round(np.asarray(enlarged(jnp.asarray(small)[None], 4))[0]), 0, 255)
        expected.append(10 * np.log10(255**2 / ((plain - image) ** 2).mean()))
    expected.append(expected[0])  # the first comes again
    assert metrics["psnr"] == pytest.approx(np.mean(expected), abs=0.01)
    assert enlarging.images["restored"].shape[2] == 3


@pytest.mark.parametrize(
    ("evaluation", "data", "said"),
    [
        (EditsRight(), SCENES, "'edits' needs the data Scenes with edits"),
        (FactsRight(), EDITS, "data.edits gives instructions, which EditsRight reads"),
        (Restored(), EDITS, "needs a task whose beside is Masked or Smaller"),
    ],
)
def test_mistakes(evaluation, data, said):
    with pytest.raises(UserError, match=said):
        evaluation.build(toys.setting(data, Gives()))
