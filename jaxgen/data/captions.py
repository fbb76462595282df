"""Captions as tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from jaxgen.data.tokenizers import Tokenizer


def encode_captions(tokenizer: Tokenizer, texts: Sequence[str],
                    length: int) -> tuple[Int32[np.ndarray, "N length"], Int32[np.ndarray, " N"]]:
    """Tokens and lengths of captions, one a row: its ids, one `eos`, then padding.

    That is `eos` again, where the tokenizer has no padding of its own.

    Args:
      length: tokens in a row; a longer caption is cut, and ends with `eos` all the same.

    Returns:
      the rows, and the number of real tokens in each, the first `eos` included.
    """
    padding = tokenizer.eos if tokenizer.padding is None else tokenizer.padding
    tokens = np.full((len(texts), length), padding, np.int32)
    lengths = np.empty(len(texts), np.int32)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text)[: length - 1]
        tokens[row, : len(ids) + 1] = [*ids, tokenizer.eos]
        lengths[row] = len(ids) + 1
    return tokens, lengths
