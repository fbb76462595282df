"""jaxgen: train, sample and measure generative models in JAX."""

from typing import Any


def train(experiment: Any, *args: Any, **options: Any) -> Any:
    """Trains an `Experiment`, or goes on with its run, as `jaxgen train` does: see `jaxgen.experiment.train`."""
    from jaxgen import runtime

    runtime.prepare()
    runtime.start()
    from jaxgen import experiment as experiments

    return experiments.train(experiment, *args, **options)
