"""Toy tasks and data for evaluations: a picture's first pixels, and a caption's first token, say which row of a table
is its embedding."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data.base import Data, Prepared
from jaxgen.evaluation.base import Setting
from jaxgen.sharding import RULES, Mesh, Sharding
from jaxgen.tasks.base import Task

EOS = 0


@dataclasses.dataclass(frozen=True)
class Tables(Task):
    """Embeds pictures and texts."""

    max_scale: float = 100.0

    @property
    def model(self):
        return Temperature(self.max_scale)

    def embed_images(self, params, batch, state=None):
        return params["image"][number(batch["image"])]

    def embed_texts(self, params, batch):
        assert batch["lengths"].ndim == 1
        return params["text"][batch["tokens"][:, 0]]


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Stands for CLIP, of which zero-shot asks the temperature alone."""

    max_scale: float

    def apply(self, variables, method):
        assert method == "scale"
        return jnp.minimum(jnp.exp(variables["params"]["temperature"]["scale"]), self.max_scale), None


@dataclasses.dataclass(frozen=True)
class Classifier(Task):
    """The table holds logits; the state is added to them."""

    def logits(self, params, state, batch):
        return params["model"][number(batch["image"])] + state


def number(image):
    return image[:, 0, 0, 0].astype(jnp.int32) + 256 * image[:, 0, 1, 0].astype(jnp.int32)


def image(n):
    found = np.full((4, 4, 3), 100, np.uint8)
    found[0, 0, 0], found[0, 1, 0] = n % 256, n // 256
    return found


class Words:
    """Caption "5 word" is the tokens 5 and 6."""

    eos = EOS

    def encode(self, text):
        n = int(text.split()[0])
        return np.array([n, n + 1], np.int32)

    def decode(self, tokens):
        return " ".join(map(str, tokens))


class Pairs(Prepared):
    """Picture n with the caption captions[n], or the label labels[n]; the held-out pictures `unread` cannot be read."""

    tokenizer = Words()

    def __init__(self, count, captions=None, labels=None, classes=(), train=0, unread=()):
        self.unread = unread
        self.count, self.captions, self.labels, self.first = count, captions, labels, train
        if classes:
            self.classes = classes

    def example(self, n):
        found = {"image": image(n)}
        if self.captions is not None:
            tokens, lengths = self.encode([f"{self.captions[n]} word"])
            found |= {"tokens": tokens[0], "lengths": lengths[0]}
        if self.labels is not None:
            found["label"] = np.int32(self.labels[n])
        return found

    def encode(self, texts):
        tokens = np.stack([np.concatenate([Words().encode(t), [EOS, EOS]]) for t in texts])
        return tokens.astype(np.int32), np.full(len(texts), 3, np.int32)

    def train(self, seed):
        """The first ones; the others are held out."""
        return grain.MapDataset.range(self.first).map(self.example).repeat()

    def heldout(self):
        def one(n):
            return {**self.example(n), "weights": np.float32(n not in self.unread)}

        return grain.MapDataset.range(self.first, self.count).map(one)


@dataclasses.dataclass(frozen=True)
class Ready(Data):
    """An experiment's data that is prepared already."""

    pairs: Pairs

    def spec(self, batch_size):
        raise NotImplementedError

    def prepare(self, cache=None, progress=None):
        return self.pairs


def setting(data, task=Tables(), devices=1, mesh=Mesh(), batch_size=8):
    spec = {"image": jax.ShapeDtypeStruct((batch_size, 4, 4, 3), jnp.uint8)}
    return Setting(task, data, Sharding(mesh.build(jax.devices()[:devices]), RULES), spec)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def table(seed, rows, width=6):
    return unit(np.random.default_rng(seed).normal(size=(rows, width))).astype(np.float32)


def parameters(images, texts, scale=np.log(20.0)):
    """In float32, by part."""
    parts = {"image": images, "text": texts, "temperature": {"scale": np.float32(scale)}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parts)
