"""Samples of text, to watch a language model learn."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.evaluation.base import Evaluation, Report, Setting
from jaxgen.sampling.text import Sampling, generate


@dataclasses.dataclass(frozen=True)
class TextPreview(Evaluation):
    """Continues some prompts, always with the same random keys, so that progress shows."""

    name: str = "preview"
    prompts: tuple[str, ...] = ("",)
    """Texts to continue; an empty one starts a document."""
    tokens: int = 128
    sampling: Sampling = Sampling()

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 1 or not self.prompts:
            raise UserError(f"The evaluation {self.name} needs a prompt, and at least one token to write.")

    def build(self, setting: Setting):
        model, tokenizer, sharding = setting.task.model, setting.data.tokenizer, setting.sharding

        def run(params, state, step):
            with sharding.use():
                texts = continue_texts(
                    model, params["model"], tokenizer, self.prompts, self.tokens, self.sampling, setting.seed
                )
            shown = "\n\n".join(f"=== {p!r}\n{p}{t}" for p, t in zip(self.prompts, texts, strict=True))
            return Report({}, {self.name: shown + "\n"})

        return run


def fit(model, longest: int, tokens: int) -> tuple[int, int]:
    """(tokens of a prompt that are read, new tokens) in the positions that a model has learned."""
    positions = model.max_length + 1  # the last new token takes none: it is not read
    kept = min(longest, max(positions - tokens, -(-positions // 2)))
    return kept, min(tokens, positions - kept)


def continue_texts(
    model, params, tokenizer, prompts, tokens: int, sampling: Sampling, seed: int, told: Callable[[str], None] = str
) -> list[str]:
    """What the model writes after each prompt. Lengths are rounded up so that few shapes are compiled.

    Where a model has learned fewer positions than a prompt and the new tokens take, it writes fewer; of a prompt that
    takes more than half of them, its end is read. Either is `told`.
    """
    start = tokenizer.eos
    encoded = [([] if start is None else [start]) + tokenizer.encode(p).tolist() for p in prompts]
    encoded = [e or [0] for e in encoded]
    longest = max(map(len, encoded))
    width = -(-longest // 32) * 32
    if model.positions == "learned":
        wanted, (kept, tokens) = tokens, fit(model, longest, tokens)
        if (kept, tokens) != (longest, wanted):
            read = f"the last {kept} of {longest} tokens are read" if kept < longest else "the prompt is read"
            told(f"the model has learned {model.max_length} positions: {read}, and {tokens} are written")
        width = min(width, model.max_length - tokens + 1)
        encoded = [e[-kept:] for e in encoded]
    padded = np.zeros((len(encoded), width), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.asarray([len(e) for e in encoded], jnp.int32)
    temperature, top_p = sampling.arrays()
    stop = jnp.int32(-1 if start is None else start)
    out = generate(
        model, params, jnp.asarray(padded), lengths, jax.random.key(seed), temperature, top_p, tokens, stop
    )
    texts = []
    for row in np.asarray(out).tolist():
        texts.append(tokenizer.decode(row[: row.index(start)] if start in row else row))
    return texts
