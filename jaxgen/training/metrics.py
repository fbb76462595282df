"""Where the numbers of a run go: JSON lines, TensorBoard, and the console."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import files
from jaxgen.errors import UserError

FILE = "metrics.jsonl"  # of a run directory
NAMED = 20  # examples that could not be read and are named; all are counted


@dataclasses.dataclass(frozen=True)
class Logging:
    """When the metrics of training are written, and where besides `metrics.jsonl`."""

    every: int = 10
    """Steps between two lines of training metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events."""

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"log.every is {self.every}; it should be at least 1.")


def read(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; one that is cut off or damaged is left out."""
    lines, path = [], Path(directory) / FILE
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def last(directory: str | Path) -> dict[str, Any]:
    """The newest value of each metric of a run."""
    values: dict[str, Any] = {}
    for line in read(directory):
        values |= line
    return values


class Writer:
    """Appends metrics to a run directory; what was written after `start` by a run that was cut off is dropped."""

    def __init__(self, directory: Path, start: int, tensorboard: bool = True):
        path = directory / FILE
        kept = [line for line in read(directory) if line["step"] <= start]
        files.write_whole(path, "".join(map(_line, kept)))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line: the step and its metrics. What is not a finite number is null."""
        values = {k: None if v is None or not math.isfinite(v) else v for k, v in metrics.items()}
        self._file.write(_line({"step": step, **values}))
        if self._events is not None:
            for name, value in metrics.items():
                if value is not None:
                    self._events.add_scalar(name, value, step)

    def text(self, name: str, step: int, text: str) -> None:
        """A text, for TensorBoard."""
        if self._events is not None:
            self._events.add_text(name, f"    {text}".replace("\n", "\n    "), step)

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3), for TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


class Console:
    """A live bar on a terminal, plain lines elsewhere; silent where `shown` is False."""

    def __init__(self, steps: int, unit: str, shown: bool = True):
        self._steps, self._unit, self._shown = steps, unit, shown
        self._progress: Any = None
        self._printed = self._seconds = 0.0
        self._skipped: set[str] = set()
        if shown and sys.stderr.isatty():
            from rich.console import Console as Rich
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"), TimeRemainingColumn(),
                console=Rich(stderr=True), refresh_per_second=5,
            )  # fmt: skip
        self._task: Any = None

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._shown:
            return
        if self._progress is not None and self._progress.live.is_started:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def skipped(self, name: str, reason: str) -> None:
        """Names an example that could not be read: each once, and the first ones alone."""
        if name not in self._skipped and len(self._skipped) < NAMED:
            self._skipped.add(name)
            self.say(f"skipped {name}: {reason}")

    def prepare(self, stage: str, done: int, total: int) -> None:
        """Progress of what comes before the first step."""
        if not self._shown or (total and done < total and time.monotonic() - self._printed < 2):
            return
        self._printed = time.monotonic()
        self.say(f"{stage} {100 * done // total} %" if total else f"{stage} {done}")

    def start(self, step: int) -> None:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task("train", total=self._steps, completed=step, values="compiling")

    def update(self, step: int, metrics: Mapping[str, Any], rate: float | None, mfu: float | None) -> None:
        """The newest loss and throughput (units a second)."""
        if not self._shown:
            return
        losses = [f"{k.removesuffix('/loss')} {v:.4f}" for k, v in metrics.items() if k.split("/")[-1] == "loss"]
        parts = [*losses, *([f"{_short(rate)} {self._unit}/s"] if rate else []), *([f"MFU {mfu:.1%}"] if mfu else [])]
        if self._progress is not None:
            self._progress.update(self._task, completed=step, values="  ".join(parts))
        elif time.monotonic() - self._printed > 10 or step == self._steps:
            left = f"  {self._left(step)} left" if rate else ""
            self._printed = time.monotonic()
            print(f"step {step}/{self._steps}  {'  '.join(parts)}{left}", file=sys.stderr, flush=True)

    def pace(self, seconds: float) -> None:
        """Seconds a step, for the time left."""
        self._seconds = seconds

    def _left(self, step: int) -> str:
        seconds = int(self._seconds * (self._steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _short(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"
