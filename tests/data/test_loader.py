import subprocess
import sys
import threading
import time

import grain
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgen.data.batching import Rows, check_skipped, skipped
from jaxgen.data.loader import Loader, heldout_batches, rows_needed
from jaxgen.errors import UserError


def example(i):
    return {"tokens": np.arange(8, dtype=np.int32) + 100 * i, "weights": np.full(8, 1, np.float32)}


def endless(n=50):
    return grain.MapDataset.range(n).map(example).seed(1).shuffle().repeat()


def sharding(*names, shape=(4, 2)):
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), ("data", "sequence")), P(*names))


def take(loader, n):
    with loader:
        return [(step, {k: np.asarray(v) for k, v in batch.items()}) for (step, batch), _ in
                zip(loader, range(n), strict=False)]


def equal(a, b):
    return [s for s, _ in a] == [s for s, _ in b] and all(
        np.array_equal(x[k], y[k]) for (_, x), (_, y) in zip(a, b, strict=True) for k in x)


def test_batch_n_is_examples_n_b_and_on():
    dataset = endless()
    batches = take(Loader(dataset, sharding("data"), 8), 10)
    for step, batch in batches:
        expected = np.stack([dataset[step * 8 + row]["tokens"] for row in range(8)])
        assert np.array_equal(batch["tokens"], expected)


@pytest.mark.parametrize("spec", [(), ("data",), ("data", "sequence"), (None, "sequence"), (("data", "sequence"),)])
def test_any_sharding_gives_the_same(spec):
    with Loader(endless(), {"tokens": sharding(*spec), "weights": sharding()}, 8) as loader:
        _, batch = next(loader)
    assert batch["tokens"].sharding.is_equivalent_to(sharding(*spec), 2)
    assert np.array_equal(batch["tokens"], take(Loader(endless(), sharding(), 8), 1)[0][1]["tokens"])


def test_starting_at_a_step_is_the_rest_of_the_stream():
    whole = take(Loader(endless(), sharding("data"), 8), 12)
    assert equal(take(Loader(endless(), sharding("data"), 8, start=7), 5), whole[7:])
    assert [s for s, _ in take(Loader(endless(), sharding("data"), 8, start=3, stop=5), 9)] == [3, 4]


class Part:
    """A sharding as one process of several sees it: only its own devices are addressable."""

    def __init__(self, whole, process, processes):
        self.whole, self.process, self.processes = whole, process, processes

    def addressable_devices_indices_map(self, shape):
        whole = self.whole.devices_indices_map(shape)
        size = len(whole) // self.processes
        devices = sorted(whole, key=lambda d: d.id)[self.process * size:(self.process + 1) * size]
        return {d: whole[d] for d in devices}


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("spec", [("data",), (("data", "sequence"),), (None, "sequence"), ("sequence",)])
def test_any_number_of_processes_reads_the_same_global_batch(processes, spec):
    dataset, found = endless(), {}
    for process in range(processes):
        parts = {name: Part(sharding(*spec), process, processes) for name in ("tokens", "weights")}
        rows = rows_needed(parts, {"tokens": (8, 8), "weights": (8, 8)})
        if spec in [("data",), (("data", "sequence"),)]:
            assert len(rows) == 8 // processes  # and none that its devices do not need
        local = Rows(dataset, rows, 8)(5)["tokens"]
        for row, value in zip(rows, local, strict=True):
            assert np.array_equal(found.setdefault(row, value), value)
    expected = Rows(dataset, range(8), 8)(5)["tokens"]
    assert np.array_equal(np.stack([found[r] for r in range(8)]), expected)


def test_workers_give_the_same():
    assert equal(take(Loader(endless(), sharding("data"), 8, start=2, workers=2), 6),
                 take(Loader(endless(), sharding("data"), 8, start=2), 6))


@pytest.mark.parametrize("batch_size", [4, 8, 48, 64])
def test_heldout_comes_whole_in_order_with_padding(batch_size):
    dataset = grain.MapDataset.range(50).map(example)
    batches = list(heldout_batches(dataset, sharding("data"), batch_size))
    assert len(batches) == -(-50 // batch_size) and all(b["tokens"].shape == (batch_size, 8) for b in batches)
    tokens, weights = (np.concatenate([np.asarray(b[k]) for b in batches]) for k in ("tokens", "weights"))
    assert np.array_equal(tokens[:50, 0], 100 * np.arange(50)) and weights.sum() == 50 * 8
    assert not tokens[50:].any() and not weights[50:].any()
    assert not list(heldout_batches(grain.MapDataset.range(0).map(example), sharding("data"), 4))


def unread_in_places(i):
    if i in (3, 4, 49):
        skipped(f"{i}.png", "the file is empty", 1.0)
    return example(i)


def test_what_of_the_heldout_part_cannot_be_read_is_told_once():
    told = []
    batches = heldout_batches(grain.MapDataset.range(50).map(unread_in_places), sharding("data"), 8,
                              lambda *name_and_reason: told.append(name_and_reason))
    next(batches)
    assert told == [("3.png", "the file is empty"), ("4.png", "the file is empty")]
    assert len(list(batches)) == 6 and told[2:] == [("49.png", "the file is empty")]


def fail_at_20(i):
    if i == 20:
        raise ValueError("twenty")
    return example(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_surface_in_the_consumer(workers):
    dataset = grain.MapDataset.range(50).map(fail_at_20)
    with Loader(dataset, sharding("data"), 8, workers=workers) as loader:
        assert [next(loader)[0], next(loader)[0]] == [0, 1]
        with pytest.raises(ValueError, match="twenty"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_it_stays_ahead_and_measures_the_wait():
    calls = []

    def slow(i):
        calls.append(i)
        time.sleep(0.01)
        return example(i)

    with Loader(grain.MapDataset.range(10**6).map(slow), sharding("data"), 8, prefetch=2) as loader:
        next(loader)
        assert 0.05 < loader.wait_seconds < 2
        time.sleep(0.8)
        before = loader.wait_seconds
        next(loader)
        assert loader.wait_seconds - before < 0.05  # it was ready
        time.sleep(0.3)
        assert len(calls) <= 8 * 6 + 1  # it stops ahead: 2 taken, 2 ready, 1 in hand


def test_close_ends_the_thread():
    loaders = [Loader(endless(), sharding("data"), 8) for _ in range(3)]
    next(loaders[0])
    for loader in loaders:
        loader.close()
        loader.close()
    assert not [t for t in threading.enumerate() if t.name == "jaxgen-loader"]
    with pytest.raises(StopIteration):
        next(loaders[0])


INTERRUPTED = """
import signal, time, grain, jax, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would ignore
from jaxgen.data.loader import Loader
def slow(i):
    time.sleep({sleep})
    return {{"x": np.zeros(3)}}
loader = Loader(grain.MapDataset.range(10**9).map(slow), jax.sharding.SingleDeviceSharding(jax.devices()[0]), 4,
                workers={workers})
print("ready", flush=True)
for step, batch in loader:
    pass
"""


@pytest.mark.parametrize("sleep, workers", [(0.2, 0), (0.2, 1)])
def test_ctrl_c_ends_it(sleep, workers):
    child = subprocess.Popen([sys.executable, "-c", INTERRUPTED.format(sleep=sleep, workers=workers)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "ready"
    time.sleep(0.5)
    child.send_signal(2)
    _, error = child.communicate(timeout=20)
    assert child.returncode != 0 and "KeyboardInterrupt" in error and "Fatal" not in error


@pytest.mark.parametrize(("share", "stops"), [(0.008, False), (0.03, True)])
def test_a_share_that_is_allowed_leaves_room_for_chance(share, stops):
    """Judged after each of 20,000 examples, of which 1 % may be bad."""
    bad = np.random.default_rng(0).random((8, 20_000)) < share
    reasons = {str(i): "damaged" for i in range(9)}

    def stopped(run) -> bool:
        try:
            for total, count in enumerate(np.cumsum(run).tolist(), 1):
                check_skipped(reasons if count > 4 else {}, count, total, 0.01, drawn=True)
        except UserError:
            return True
        return False

    assert [stopped(run) for run in bad] == [stops] * 8
