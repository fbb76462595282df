"""The two types that the rest of jaxgen sees of any data: what an experiment names, and what that becomes at hand."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grain
    import jax

# progress(stage, done, total): in characters or bytes of text; `total` is 0 where it is not known.
Progress = Callable[[str, int, int], None]


class Prepared(abc.ABC):
    """Data at hand: tokenized, indexed, ready to be read at random.

    Attributes:
      tokenizer: the fitted tokenizer (see `jaxgen.data.tokenizers.Tokenizer`), None for data without one.
      heldout_bytes: size of the held-out text as UTF-8; 0 where there is none.
      fingerprint: hash of all that decides an example's content, the same on every machine.
      facts: what is worth printing, plain values by name.
      workers: processes that read examples, where that is work worth sharing; 0 reads in a thread.
    """

    tokenizer: Any = None
    heldout_bytes: int = 0
    fingerprint: str = ""
    facts: dict[str, Any] = {}
    workers: int = 0

    def batched(self, size: int) -> Prepared:
        """The same, known to be trained on in batches of this size: what that decides is among its `facts`.

        Raises:
          UserError: there is too little for such a batch.
        """
        return self

    @abc.abstractmethod
    def train(self, seed: int) -> grain.MapDataset:
        """Endless dataset of dicts of numpy arrays; example i is a function of (seed, i) alone."""

    @abc.abstractmethod
    def heldout(self) -> grain.MapDataset:
        """Finite dataset in fixed order in which each held-out token is predicted exactly once; has `weights`."""


@dataclasses.dataclass(frozen=True)
class Data(abc.ABC):
    """What an experiment holds in its field `data`: where the data is and what shape its examples take."""

    @abc.abstractmethod
    def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch; needs no data."""

    def specs(self, batch_size: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """`spec`, and where training batches come in several shapes, that of each of them."""
        return [self.spec(batch_size)]

    @abc.abstractmethod
    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> Prepared:
        """Reads, tokenizes and caches what is needed, or finds it in `cache` (default: the per-user cache).

        Raises:
          UserError: the data is missing, empty, damaged or not of the named form.
        """
