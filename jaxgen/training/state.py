"""The training state: everything that a step changes, as one tree."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int, UInt32


@flax.struct.dataclass
class TrainState:
    """All that is needed to go on: what a checkpoint holds, but for the frozen parameters, which are saved once."""

    step: Int[Array, ""]
    """Steps taken."""
    key: UInt32[Array, "2"]
    """Key data of the run's seed, from which each step's randomness is folded."""
    params: Any
    """Trainable parameters by part, None where one is frozen."""
    frozen: Any
    """Frozen parameters by part, None where one is trainable."""
    state: Any
    """The task's state that changes without a gradient."""
    optimizer: dict[str, Any]
    """Optimizer state by player."""
    ema: Any
    """Moving average of the trainable parameters, or None."""
    skipped: Int[Array, "2"]
    """Updates left out for a loss or gradient that was not finite, and steps in a row, up to now, that left one out."""
