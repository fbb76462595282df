"""Samples of text, to watch a language model learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

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


def continue_texts(model, params, tokenizer, prompts, tokens: int, sampling: Sampling, seed: int) -> list[str]:
    """What the model writes after each prompt. Lengths are rounded up so that few shapes are compiled.

    Of a prompt that is too long for the positions that the model has learned, beside the new tokens, its end is read.
    """
    start = tokenizer.eos
    encoded = [([] if start is None else [start]) + tokenizer.encode(p).tolist() for p in prompts]
    encoded = [e or [0] for e in encoded]
    width = -(-max(map(len, encoded)) // 32) * 32
    if model.positions == "learned":
        tokens = min(tokens, model.max_length)
        width = min(width, model.max_length - tokens + 1)  # the last new token takes no position: it is not read
        encoded = [e[-width:] for e in encoded]
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
