"""What the training loop costs over the bare jitted step, with data, metrics and progress as in a run.

    python tests/bench/loop_overhead.py [--steps 300] [--rounds 5]

Takes turns: so many steps of a program on one batch, so many of `jaxgen.train` without evaluations. Prints the median
seconds a step of each, and the loop's overhead.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path

from jaxgen import runtime

runtime.prepare()
runtime.start()

import jax  # noqa: E402

from jaxgen.experiment import load  # noqa: E402
from jaxgen.training import loop  # noqa: E402
from jaxgen.training.metrics import read  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    file = Path(__file__).parents[2] / "experiments" / "gpt" / "shakespeare_char.py"
    experiment = dataclasses.replace(load(file).smoke, steps=arguments.steps, evaluations=())
    program = loop.program_of(experiment)
    state = program.init(0)
    data = experiment.data.prepare()
    batch = next(iter(loop.Loader(data.train(0), program.batch_shardings, experiment.batch_size)))[1]
    state, _ = program.step(state, batch)
    bare, whole = [], []
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        for _ in range(arguments.steps):
            state, metrics = program.step(state, batch)
        jax.block_until_ready(state)
        bare.append((time.perf_counter() - begin) / arguments.steps)
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()), \
                contextlib.redirect_stdout(io.StringIO()):
            loop.train(experiment, directory)
            whole.append(statistics.median(
                line["train/step_seconds"] for line in read(directory) if "train/step_seconds" in line
            ))
    a, b = statistics.median(bare), statistics.median(whole)
    print(f"bare step {a * 1e3:.3f} ms, in the loop {b * 1e3:.3f} ms: overhead {b / a - 1:+.1%}")


if __name__ == "__main__":
    main()
