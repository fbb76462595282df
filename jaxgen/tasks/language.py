"""Language modelling: predict the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxgen.errors import UserError
from jaxgen.models.gpt import GPT
from jaxgen.nn import dtypes, kernels
from jaxgen.nn.attention import Mask
from jaxgen.nn.losses import vocabulary_loss
from jaxgen.pretrained import Pretrained
from jaxgen.tasks.base import Batch, Context, Loss, Params, Task


@dataclasses.dataclass(frozen=True)
class LanguageModel(Task):
    """Maximum likelihood of the next token: -log p(target | earlier tokens of its document), in nats a token.

    A batch has `tokens` and `targets` (B, L), and where they matter `weights` (B, L), and for packed documents
    `segment_ids` and `positions` (B, L).
    """

    model: GPT | Pretrained = GPT()
    loss_chunk: int = 0
    """Positions of each sequence whose logits are held at a time; 0 for all. It must divide the length."""

    def init(self, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return {"model": self.model.clone(kernel="xla").init(key, tokens)["params"]}, {}

    def loss(self, params: Params, batch: Batch, context: Context) -> Loss:
        variables = {"params": params["model"]}
        tokens, targets = batch["tokens"], batch["targets"]
        weights = batch.get("weights")
        weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
        hidden, _ = self.model.apply(
            variables, tokens, batch.get("segment_ids"), batch.get("positions"),
            key=context.key if context.train else None, method="hidden",
        )  # fmt: skip
        total = vocabulary_loss(
            lambda h: self.model.apply(variables, h, method="logits"), hidden, targets, weights, self.loss_chunk
        )
        return Loss(total, jnp.sum(weights))

    def check(self, spec):
        self.model.check()
        length = spec["tokens"].shape[1]
        if length > self.model.max_length:
            raise UserError(
                f"Sequences of {length} tokens (data.length) do not fit the model: task.model.max_length is "
                f"{self.model.max_length}."
            )
        if self.loss_chunk < 0:
            raise UserError(f"task.loss_chunk = {self.loss_chunk} should be at least 0.")
        if self.loss_chunk and length % self.loss_chunk:
            raise UserError(f"task.loss_chunk = {self.loss_chunk} does not divide data.length = {length}.")

    def check_data(self, data):
        tokenizer = data.tokenizer
        if tokenizer is not None and tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and task.model.vocab_size is "
                f"{self.model.vocab_size}; it should be at least as many."
            )

    def axes(self, spec):
        return {name: ("batch", "length") for name in spec}

    def units(self, spec):
        batch, length = spec["tokens"].shape
        return "tokens", batch * length

    def flops(self, spec):
        batch, length = spec["tokens"].shape
        return 3 * batch * length * self.model.flops_per_token(length)

    def notes(self, spec):
        model, (batch, length) = self.model, spec["tokens"].shape
        segments = jnp.zeros((1, 1), jnp.int32) if "segment_ids" in spec else None  # that there are any is what matters
        shape = jax.ShapeDtypeStruct((batch, length, model.heads, model.key_dim), dtypes.resolve(model.dtype))
        parts = []
        for window in dict.fromkeys(model.windows):
            mask = Mask("causal", window, query_segments=segments)
            name, reason = kernels.choose(model.kernel, shape, shape, mask, model.attention_cap)
            parts.append(f"{name} ({reason})" + (f" for windows of {window}" if window else ""))
        return {"attention": "; ".join(parts)}
