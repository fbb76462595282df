"""Whole data sets through a model on the mesh: what a measurement works on, exact for any batch size and mesh."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxgen.data.base import Data, Prepared
from jaxgen.data.loader import heldout_batches
from jaxgen.errors import UserError
from jaxgen.evaluation.base import Evaluation, Setting
from jaxgen.sharding import Sharding
from jaxgen.tasks.base import Task, batch_shardings

NEAR = 1e-6
"""Similarities of unit vectors nearer than this are equal: float32 cannot tell which is higher."""

Function = Callable[..., dict[str, Array]]
"""(params, state, batch, *more) -> arrays whose first axis is the batch's, or sums over the batch."""


def default_batch(setting: Setting) -> int:
    """Examples of a training batch."""
    return next(iter(setting.spec.values())).shape[0]


def held_out(evaluation: Evaluation, data: Prepared) -> Any:
    """The held-out part of the data; UserError where there is none."""
    dataset = data.heldout()
    if not len(dataset):
        raise UserError(f"the evaluation '{evaluation.name}' has nothing to measure: the data holds nothing out")
    return dataset


def prepared(
    evaluation: Evaluation, data: Data | None, setting: Setting, *wanted: str, label: str = ""
) -> Prepared:
    """The evaluation's own data, prepared, or else the experiment's, with labels from its column `label` where one is
    named. UserError where its held-out examples lack one of the `wanted` arrays."""
    if label and data is not None:
        raise UserError(f"the evaluation '{evaluation.name}' has data of its own, so the column '{label}' that its "
                        "field label takes from the experiment's data is of no use")
    found = setting.data if data is None else data.prepare()
    if label:
        found = labelled(evaluation, found, label)
    example = held_out(evaluation, found)[0]
    missing = [name for name in wanted if name not in example]
    if missing:
        where = "the experiment's data" if data is None else "its data"
        hint = "; give it labelled pictures in its field data" if missing == ["label"] and data is None else ""
        if hint and hasattr(evaluation, "label"):
            hint += ", or the name of a column of the experiment's in its field label"
        raise UserError(
            f"the evaluation '{evaluation.name}' needs {' and '.join(missing)}, and {where} has "
            f"{', '.join(k for k in example if k != 'weights')}{hint}"
        )
    return found


def demand(evaluation: Evaluation, task: Task, does: str, *methods: str) -> None:
    """UserError where the task lacks the methods that a task has which `does` this."""
    if not all(hasattr(task, method) for method in methods):
        raise UserError(f"the evaluation '{evaluation.name}' needs a task that {does}, and {type(task).__name__} does "
                        f"not (it has no {' or '.join(m for m in methods if not hasattr(task, m))})")


def labelled(evaluation: Evaluation, data: Prepared, column: str) -> Prepared:
    """Pictures with captions as pictures with labels, from another column; UserError where there are none."""
    from jaxgen.data.imagetext import PreparedImageText
    from jaxgen.evaluation.labels import Labels

    if not isinstance(data, PreparedImageText):
        raise UserError(f"the evaluation '{evaluation.name}' takes labels from the column '{column}' of the "
                        "experiment's data, which is no ImageText and has no columns")
    return Labels(data, column)


def batches(dataset: Any, setting: Setting, size: int, function: Function) -> Callable[..., list[dict[str, Any]]]:
    """Compiles `function`; the result is called with (params, state, *more) and gives what it found of each batch.

    Every process gets all of it, as numpy arrays. `more` are passed on to the function.
    """
    sharding = setting.sharding
    spec = {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for k, v in dataset[0].items()}
    layout = batch_shardings(setting.task, sharding, spec)

    @jax.jit
    def one(params, state, batch, *more):
        with sharding.use():
            found = function(params, state, batch, *more)
        return jax.lax.with_sharding_constraint(found, sharding.replicated)

    def run(params, state, *more):
        parts = (one(params, state, batch, *more) for batch in heldout_batches(dataset, layout, size, setting.told))
        return list(fetched(parts))

    return run


def fetched(parts: Iterable[Any]) -> Iterator[Any]:
    """What programs found, on the host, in order. The next program is started before the last is read, and no more:
    more would hold memory, and tens of them at once block each other on simulated devices."""
    before = None
    for i, part in enumerate(parts):
        if i:
            yield jax.device_get(before)
        before = part
    if before is not None:
        yield jax.device_get(before)


def rows(dataset: Any, setting: Setting, size: int, function: Function) -> Callable[..., dict[str, np.ndarray]]:
    """As `batches`, for a function whose results are by example: those of all examples, in order, without those of
    weight 0 (padding, and what cannot be read); `index` is the place of each in the dataset."""
    compiled = batches(
        dataset, setting, size,
        lambda params, state, batch, *more: {**function(params, state, batch, *more), "weights": batch["weights"]},
    )  # fmt: skip

    def run(params, state, *more):
        parts = compiled(params, state, *more)
        real = np.concatenate([p["weights"] for p in parts]) > 0
        found = {k: np.concatenate([p[k] for p in parts])[real] for k in parts[0] if k != "weights"}
        return found | {"index": np.flatnonzero(real)}

    return run


def total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of all batches' sums, in float64."""
    return {k: np.sum([np.asarray(p[k], np.float64) for p in parts], axis=0) for k in parts[0]}


def place(sharding: Sharding, array: np.ndarray, *names: str | None) -> jax.Array:
    """An array that every process has, laid out on the mesh by its logical axes."""
    return jax.make_array_from_callback(array.shape, sharding.named(names, array.shape), lambda index: array[index])


def padded(array: np.ndarray, length: int, fill: Any = 0) -> np.ndarray:
    """The array with rows of `fill` (a number, or a row) after it, up to so many."""
    return np.concatenate([array, np.full((length - len(array), *array.shape[1:]), fill, array.dtype)])


def whole_rows(sharding: Sharding, count: int) -> int:
    """The next number of rows that the mesh divides evenly."""
    (parts,) = sharding.parts("batch")
    return -(-count // parts) * parts
