"""From a dataset to global arrays on the mesh, ahead of the step that needs them.

Batch n is examples n * B .. n * B + B - 1, whoever reads them: a process reads the rows of its own devices, so any
number of processes, and of workers in each, makes the same global batches, and a run resumes at step n by asking for
batch n.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgen.data.batching import Rows, check_skipped
from jaxgen.data.processes import workers as worker_processes

if TYPE_CHECKING:
    import grain

Batch = dict[str, jax.Array]
Shardings = Mapping[str, jax.sharding.Sharding]


def rows_needed(shardings: Shardings, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Rows of a global batch that this process's devices hold a part of, ascending.

    Args:
      shardings: by name of the batch's arrays.
      shapes: the global shapes (B, ...), by the same names.
    """
    rows: set[int] = set()
    for name, shape in shapes.items():
        for index in shardings[name].addressable_devices_indices_map(shape).values():
            rows.update(range(*index[0].indices(shape[0])))
    return sorted(rows)


class Loader:
    """Iterates over (step, batch of global arrays) in a background thread that stays `prefetch` batches ahead.

    Raises UserError where more examples are skipped than their data allows (see `batching.skipped`).

    Attributes:
      wait_seconds: time that the consumer spent waiting for data, in all.
      examples: rows that this process has taken, in all.
      skipped: why an example could not be read, by its name, of those that this process came upon.
      replaced: how often one was come upon; after several epochs, more often than there are names.

    Args:
      dataset: examples as dicts of arrays, indexed at random (`Prepared.train` or `heldout`); one of several shapes has
        `batches_of(batch_size)`, the dataset in an order in which each batch is of one.
      shardings: a sharding for each array of the batch, by name; or one for all.
      batch_size: rows B of the global batch.
      start: the step to begin with.
      stop: the step to end before; default: the end of the dataset.
      workers: reading processes; 0 reads in the thread, which is best unless an example is much work.
      prefetch: batches kept ready, each on the devices already.
    """

    def __init__(self, dataset: grain.MapDataset, shardings: Shardings | jax.sharding.Sharding, batch_size: int,
                 start: int = 0, stop: int | None = None, workers: int = 0, prefetch: int = 2):
        if hasattr(dataset, "batches_of"):
            dataset = dataset.batches_of(batch_size)
        example = dataset[0]
        shapes = {name: (batch_size, *value.shape) for name, value in example.items()}
        if isinstance(shardings, jax.sharding.Sharding):
            shardings = dict.fromkeys(shapes, shardings)
        self._shardings = shardings
        rows = rows_needed(shardings, shapes)
        self._place = {row: i for i, row in enumerate(rows)}
        if stop is None:
            stop = -(-len(dataset) // batch_size)
        self._rows, self._start, self._stop, self._workers = Rows(dataset, rows, batch_size), start, stop, workers
        self._ready: queue.Queue = queue.Queue(max(prefetch, 1))
        self._closed = threading.Event()
        self.wait_seconds = 0.0
        self.examples, self.replaced = 0, 0
        self.skipped: dict[str, str] = {}
        self._thread = threading.Thread(target=self._fill, name="jaxgen-loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside JAX while the interpreter goes down would crash it

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        began = time.perf_counter()
        try:
            while True:
                if self._closed.is_set():
                    raise StopIteration
                try:
                    item = self._ready.get(timeout=1.0)  # wakes up, so that Ctrl-C is heard everywhere
                    break
                except queue.Empty:
                    if not self._thread.is_alive() and self._ready.empty():
                        raise RuntimeError("the loader's thread ended without a word") from None
        finally:
            self.wait_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, told = item
        self.examples += len(self._place)
        self.replaced += len(told)
        self.skipped |= {name: reason for name, reason, _ in told}
        if told:
            check_skipped(self.skipped, self.replaced, self.examples, told[-1].allowed, drawn=True)
        return batch

    def close(self) -> None:
        """Stops the thread and drops what it had ready; may be called twice."""
        self._closed.set()
        atexit.unregister(self.close)
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                break
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _fill(self) -> None:
        try:
            with worker_processes(self._rows.read, self._workers) as run:
                for step, (local, told) in run(range(self._start, self._stop)):
                    batch = {name: self._global(name, value) for name, value in local.items()}
                    if not self._put(((step, batch), told)):
                        return
            self._put(StopIteration())
        except BaseException as e:  # it is the consumer's to see
            self._put(e)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                pass
        return False

    def _global(self, name: str, local: np.ndarray) -> jax.Array:
        shape = (self._rows.batch_size, *local.shape[1:])  # of this batch: others may be of another

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            here = self._place[first]  # rows of one device are neighbours, here as in the global batch
            return local[(slice(here, here + last - first), *index[1:])]

        return jax.make_array_from_callback(shape, self._shardings[name], part)


def heldout_batches(dataset: grain.MapDataset, shardings: Shardings | jax.sharding.Sharding, batch_size: int,
                    told: Callable[[str, str], None] | None = None) -> Iterator[Batch]:
    """All examples of a finite dataset, in order, each once; the last batch is filled up with zeros (weight 0).

    Args:
      told: called with the name of an example that cannot be read (it has weight 0 too), and why; once for each.
    """
    if not len(dataset):
        return
    with Loader(dataset, shardings, batch_size) as loader:
        count = 0
        for _, batch in loader:
            if told is not None:
                for name, reason in list(loader.skipped.items())[count:]:
                    told(name, reason)
                count = len(loader.skipped)
            yield batch
