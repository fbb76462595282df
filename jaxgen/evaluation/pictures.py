"""Sheets of pictures that a model makes, to watch it learn."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxgen.data.sheets import sheet
from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Report, Setting
from jaxgen.sampling.diffusion import Sampling, keys_of
from jaxgen.tasks.base import batch_shardings

GIVEN = ("label", "tokens", "lengths")
"""Arrays of a batch that say what is wanted."""


@dataclasses.dataclass(frozen=True)
class PicturePreview(Evaluation):
    """Draws some pictures, always from the same noise, so that progress shows: for the classes in turn, or for the
    captions (and the pictures to be edited, filled or enlarged) of the first held-out examples."""

    name: str = "preview"
    n: int = 16
    columns: int = 8
    sampling: Sampling = Sampling()

    def build(self, setting: Setting):
        whole.demand(self, setting.task, "makes pictures", "sample")
        draw = drawing(setting, self.n, self.sampling)
        batch, labels = self._asked(setting)

        def run(params, state, step):
            found = draw(params, state, batch, np.arange(self.n), setting.seed)
            return Report({}, images={self.name: sheet(list(found), self.columns, labels, size=_size(found))})

        return run

    def _asked(self, setting: Setting) -> tuple[dict[str, np.ndarray], list[str]]:
        """Conditions, and what they are called."""
        data, names = setting.data, [name for name in GIVEN if name in setting.spec]
        beside = getattr(setting.task, "beside", None)
        if beside is not None:
            names += beside.wanted
        if names == ["label"]:
            classes = getattr(data, "classes", ())
            label = np.arange(self.n, dtype=np.int32) % max(len(classes), 1)
            return {"label": label}, [classes[i] for i in label] if classes else []
        if not names:
            return {}, []
        dataset = whole.held_out(self, data)
        examples = [dataset[i % len(dataset)] for i in range(self.n)]
        batch = {name: np.stack([e[name] for e in examples]) for name in names}
        if "tokens" not in names:
            return batch, []
        ends = np.maximum(batch["lengths"] - 1, 0)
        rows = zip(batch["tokens"], ends, strict=True)
        return batch, [data.tokenizer.decode(row[:end].tolist()) for row, end in rows]


def drawing(setting: Setting, count: int, sampling: Sampling, **more: Any) -> Any:
    """The drawing of up to `count` pictures: (params, state, conditions, index, seed, unwanted, edit, guiding) ->
    pictures.

    Every process gets all of them. `conditions`, and those that are `unwanted`, are a batch's arrays of what is asked
    for. `index` numbers the pictures of the seed: picture i is the same in any batch and on any mesh. `more` goes to
    the task's `sample`; a `guide` of it gets `guiding` (`tasks.guides.Guiding`).
    """
    task, sharding = setting.task, setting.sharding
    rows = whole.whole_rows(sharding, count)
    name = next(name for name in ("image", "points") if name in setting.spec)
    sampling = dataclasses.replace(sampling, shape=sampling.shape or tuple(setting.spec[name].shape[1:]))

    def placed(array):
        if array is None:
            return None
        return whole.place(sharding, whole.padded(array, rows, array[0]), "batch", *(None,) * (array.ndim - 1))

    def conditions(batch):
        spec = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in batch.items()}
        layout = batch_shardings(task, sharding, spec)
        batch = {k: whole.padded(v, rows, v[0]) for k, v in batch.items()}
        return {k: jax.make_array_from_callback(v.shape, layout[k], v.__getitem__) for k, v in batch.items()}

    def run(params, state, batch, index, seed, unwanted=None, edit=None, guiding=None):
        own = dict(more)
        if guiding is not None:
            own["guide_args"] = guiding.replace(wanted=conditions(guiding.wanted), drawn=(params, state))
        if edit is not None:
            edit = dataclasses.replace(edit, start=placed(edit.start), mask=placed(edit.mask))
        unwanted = None if unwanted is None else conditions(unwanted)
        given = len(index)
        with sharding.use():
            keys = keys_of(seed, placed(np.asarray(index, np.int32)))
            found = task.sample(params, state, conditions(batch), keys, sampling, unwanted=unwanted, edit=edit, **own)
        return np.asarray(jax.jit(lambda x: x, out_shardings=sharding.replicated)(found))[:given]

    return run


def _size(pictures: np.ndarray) -> int:
    """Pixels of a cell: whole multiples of small pictures', so that they stay sharp."""
    side = max(pictures.shape[1:3])
    return side * max(1, 96 // side) if side < 256 else 256
