"""Text decoding: one compiled loop over an explicit cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.models.gpt import GPT


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. All of it is traced: changing it compiles nothing."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens with this much probability (Holtzman et al. 2020); 1 for all."""

    def __post_init__(self):
        if not (0 <= self.temperature < float("inf") and 0 < self.top_p <= 1):
            raise UserError(
                f"The temperature is {self.temperature} and top_p {self.top_p}: they should be at least 0, and above 0 "
                "and at most 1."
            )

    def arrays(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return jnp.float32(self.temperature), jnp.float32(self.top_p)


def draw(
    logits: Float[Array, "B V"], keys: Array, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, "B"]:
    """A token for each row, with its own key."""
    scaled = logits.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    kept = jnp.sum(mass - jax.nn.softmax(ordered, axis=-1) < top_p, axis=-1)  # the token that crosses top_p included
    floor = jnp.take_along_axis(ordered, jnp.maximum(kept, 1)[:, None] - 1, axis=-1)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(scaled < floor, -jnp.inf, scaled))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def generate(
    model: GPT,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    key: Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    new_tokens: int,
    stop: Int[Array, ""] | int = -1,
    index: Int[Array, "B"] | None = None,
) -> Int[Array, "B N"]:
    """`new_tokens` tokens after each prompt; what follows `stop` is `stop`. Runs on the mesh in force.

    Args:
      prompts: padded on the right; `lengths` says how much of each is real (at least 1).
      key: example i draws with fold_in(fold_in(key, i), n) for its n-th token: the same alone and in any batch.
      index: the number i of each example; by default 0, 1, 2, ...

    Raises UserError for more positions than the model has learned.
    """
    batch, width = prompts.shape
    if model.positions == "learned" and width + new_tokens - 1 > model.max_length:
        raise UserError(
            f"Prompts of {width} and {new_tokens} new tokens take {width + new_tokens - 1} positions, and the model "
            f"has {model.max_length} (max_length)."
        )
    index = jnp.arange(batch) if index is None else index
    return _generate(
        sharding.current(), model, new_tokens, params, prompts, lengths, key, index, temperature, top_p, jnp.int32(stop)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # the rules too: what was traced under others is not for these
def _generate(scope, model, new_tokens, params, prompts, lengths, key, index, temperature, top_p, stop):
    batch, width = prompts.shape
    variables = {"params": params}
    cache = model.empty_cache(batch, width + new_tokens)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)

    def logits_of(hidden):
        return model.apply(variables, hidden, method="logits")

    def pick(logits, n):
        return draw(logits, jax.vmap(lambda k: jax.random.fold_in(k, n))(keys), temperature, top_p)

    at = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompts.shape)
    hidden, cache = model.apply(variables, prompts, positions=at, cache=cache, method="hidden")
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    token = pick(logits_of(last)[:, 0], 0)

    def body(n, carry):
        token, out, cache = carry
        out = out.at[:, n - 1].set(token)
        hidden, cache = model.apply(
            variables, token[:, None], positions=(lengths + n - 1)[:, None], cache=cache, method="hidden"
        )
        new = pick(logits_of(hidden)[:, 0], n)
        return jnp.where(token == stop, token, new), out, cache

    out = jnp.zeros((batch, new_tokens), jnp.int32)
    token, out, _ = jax.lax.fori_loop(1, new_tokens, body, (token, out, cache))
    return sharding.constrain(out.at[:, new_tokens - 1].set(token), None, None)  # every process reads all
