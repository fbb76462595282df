"""Another run that guides the one that draws: a weaker one, a CLIP, or a classifier."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgen.cli.asking import encoder, names_of, number_of
from jaxgen.cli.opened import Opened, open_run
from jaxgen.errors import UserError
from jaxgen.tasks.classification import Classification
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.tasks.guides import Guiding, Judge, Weaker

SCALE = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class Guide:
    """A run that guides, and how."""

    opened: Opened
    kind: Weaker | Judge
    scale: float

    def asked(self, arguments: argparse.Namespace) -> list[str]:
        """What pictures are asked for, where it knows and the run that draws does not."""
        option, other = ("prompt", "class") if self.takes == "texts" else ("class", "prompt")
        given = getattr(arguments, option)
        if getattr(arguments, other) or (given and not self.takes):
            raise UserError(f"--{other if self.takes else option} is of no use here: {self.opened.directory} guides")
        if self.takes and not given:
            raise UserError(f"{self.opened.directory} guides toward what is asked for: give a --{option}")
        return given or [""]

    @property
    def takes(self) -> str:
        """"texts", "classes" or nothing."""
        task = self.opened.experiment.task
        if getattr(task, "text", None) is not None:
            return "texts"
        return "classes" if isinstance(task, Classification) or getattr(task.network, "classes", 0) else ""

    def guiding(self, labels: list[str], rows: Callable[[np.ndarray], np.ndarray]) -> Guiding:
        """For pictures of which `rows` makes an array of an array for each label."""
        wanted: dict[str, np.ndarray] = {}
        if self.takes == "texts":
            wanted = encoder(self.opened)(labels)
        elif self.takes:
            task, data = self.opened.experiment.task, self.opened.experiment.data
            names = names_of(data, task.model.out if isinstance(task, Classification) else task.network.classes)
            wanted = {"label": np.asarray([number_of(label, names) for label in labels], np.int32)}
        wanted = {k: rows(v) for k, v in wanted.items()}
        return Guiding(self.opened.params, self.opened.state, wanted, jnp.float32(self.scale))

    @property
    def told(self) -> dict[str, Any]:
        return {"guide": str(self.opened.directory), "guide_step": self.opened.step, "guide_scale": self.scale}


def guide_of(arguments: argparse.Namespace, drawn: Diffusion, shape: tuple[int, ...]) -> Guide | None:
    """The run of --guide, for one that draws pictures of a shape (H, W, C)."""
    if arguments.guide is None:
        for name in ("guide_step", "guide_scale"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for a run that guides: --guide RUN")
        return None
    own = argparse.Namespace(run=arguments.guide, run_dir=None, step=arguments.guide_step or "latest", weights="ema",
                             devices=None, trust=arguments.trust)
    opened = open_run(own, "sample")
    task, spec = opened.experiment.task, opened.program.spec
    if isinstance(task, Diffusion):
        kind = Weaker(task)
    elif isinstance(task, Contrastive | Classification) and "image" in spec:
        kind = Judge(task, drawn, tuple(spec["image"].shape[1:]))
    else:
        raise UserError(f"{opened.directory} cannot guide: it is neither a diffusion model, a CLIP nor a classifier of "
                        "pictures of one size")
    try:
        kind.check(drawn, shape)
    except UserError as error:
        raise UserError(f"{opened.directory} cannot guide: {error}") from None
    return Guide(opened, kind, SCALE if arguments.guide_scale is None else arguments.guide_scale)
