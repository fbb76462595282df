"""Networks that see pictures for a measurement: FID's InceptionV3, or any classifier or image-text model of the suite.

An evaluation's field holds an `Inception`, which names a file, a `Pretrained`, which names a run, or a `Network` ready
for use. Evaluations know nothing of run directories: whoever builds them opens what they name, by `filled`.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxgen import record
from jaxgen.errors import UserError
from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Setting
from jaxgen.interop import inception
from jaxgen.models.inception import SIDE, prepared
from jaxgen.pretrained import Pretrained
from jaxgen.sharding import Sharding
from jaxgen.tasks.base import Task, split

PART = 64
"""Pictures that a device sees at a time."""

Seen = tuple[Float[Array, "B D"], Float[Array, "B C"] | None]
"""Features, and probabilities of classes where the network tells any."""


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network with its weights on the mesh."""

    name: str
    digest: str
    """Names the weights: `digest_of` them."""
    resize: str
    """How pictures of another size become those that the network takes."""
    variables: Any
    see: Callable[[Any, UInt8[Array, "B H W C"]], Seen]
    """(variables, pictures) -> features and probabilities; pure, for use inside jit."""
    texts: Callable[[Sequence[str]], Float[np.ndarray, "N D"]] | None = None
    """Features of texts, for networks of pictures and texts."""
    is_fid: bool = False
    """It is the one that FID is defined by."""

    def __str__(self) -> str:
        return f"{self.name}, {self.digest[:12]}"


@dataclasses.dataclass(frozen=True)
class Inception:
    """FID's InceptionV3, from a local file."""

    path: str
    """A .safetensors or .npz file with the names of the ports to PyTorch (Conv2d_1a_3x3.conv.weight, ...)."""
    resize: Literal["tensorflow", "antialias"] = "tensorflow"
    """As FID's own program does it, bilinearly and without smoothing; or bicubically with smoothing (Parmar et al.
    2022, clean-FID), which makes another number of it."""

    def network(self, sharding: Sharding) -> Network:
        """Reads the file. UserError where it does not hold the network."""
        found = inception.read(self.path, sharding.replicated)
        module, scope = found.module, pictures_alone(sharding)

        def see(variables, images):
            if self.resize == "antialias":
                images = resized(images, (SIDE, SIDE, images.shape[3]))
            features, logits = module.apply(variables, prepared(images))
            return features, jax.nn.softmax(logits)

        rule = {"tensorflow": "bilinear as TensorFlow 1 does it", "antialias": "bicubic, antialiased"}[self.resize]
        return Network(
            "InceptionV3" + (f" / {module.width_divisor}" if module.width_divisor > 1 else ""),
            digest_of(found.variables), f"{SIDE} x {SIDE}, {rule}", found.variables,
            in_parts(see, scope), is_fid=module.width_divisor == 1 and self.resize == "tensorflow",
        )  # fmt: skip


def of_task(
    name: str,
    task: Task,
    params: dict[str, Any],
    state: Any,
    shape: tuple[int, int, int],
    sharding: Sharding,
    encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Network:
    """The network of a task that embeds pictures (`embed_images`), and may classify them (`logits`) or embed texts.

    Args:
      params, state: the task's, whole on every device.
      shape: (H, W, C) of the pictures it has learned from.
      encode: texts to tokens and lengths, for `embed_texts`.
    """
    if not hasattr(task, "embed_images"):
        raise UserError(f"{name} is a run of a {type(task).__name__}, which does not embed pictures")
    scope = pictures_alone(sharding)
    classifies = hasattr(task, "logits") and getattr(getattr(task, "model", None), "out", 1)

    def see(variables, images):
        params, state = variables
        batch = {"image": resized(images, shape)}
        features = task.embed_images(params, batch, state).astype(jnp.float32)
        return features, jax.nn.softmax(task.logits(params, state, batch)) if classifies else None

    texts = None
    if encode is not None and hasattr(task, "embed_texts"):
        texts = _texts(task, params, encode, scope)
    rule = f"{shape[0]} x {shape[1]}, bicubic, antialiased"
    return Network(name, digest_of((params, state)), rule, (params, state), in_parts(see, scope), texts)


def _texts(task, params, encode, scope) -> Callable[[Sequence[str]], Float[np.ndarray, "N D"]]:
    """The embedding of texts, PART for each device at a time."""

    @jax.jit
    def embed(params, batch):
        with scope.use():
            found = task.embed_texts(params, batch).astype(jnp.float32)
        return jax.lax.with_sharding_constraint(found, scope.replicated)

    def texts(captions):
        rows, found = whole.whole_rows(scope, min(len(captions), PART * scope.parts("batch")[0])), []
        for first in range(0, len(captions), rows):
            tokens, lengths = encode(captions[first : first + rows])
            placed = {
                "tokens": whole.place(scope, whole.padded(tokens, rows), "batch", None),
                "lengths": whole.place(scope, whole.padded(lengths, rows, 1), "batch"),
            }
            found.append(np.asarray(embed(params, placed))[: len(tokens)])
        return np.concatenate(found)

    return texts


def pictures_alone(sharding: Sharding) -> Sharding:
    """The mesh with pictures split over it and weights whole: any network fits it."""
    return Sharding(sharding.mesh, {name: axes if name == "batch" else () for name, axes in sharding.rules.items()})


def in_parts(see: Callable[[Any, Any], Seen], scope: Sharding) -> Callable[[Any, Any], Seen]:
    """`see`, a few pictures of each device at a time, laid out as `scope` says."""

    def run(variables, images):
        share = images.shape[0] // math.gcd(images.shape[0], scope.parts("batch")[0])
        count = next(n for n in range(1, share + 1) if share % n == 0 and share <= n * PART)
        with scope.use():
            if count == 1:
                return see(variables, images)
            found = jax.lax.map(lambda part: see(variables, part), split(images, count))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(images.shape[0], *x.shape[2:]), found)

    return run


def resized(images: Array, shape: tuple[int, int, int]) -> Float[Array, "B H W C"]:
    """Pictures of 0 to 255 in another size, bicubically with smoothing, and grey ones as coloured where those are
    wanted. Of the size already, they stay as they are."""
    x = images.astype(jnp.float32)
    height, width, channels = shape
    if x.shape[3] not in (1, channels):
        raise UserError(f"pictures of {x.shape[3]} channels cannot be seen by a network of {channels}")
    if x.shape[1:3] != (height, width):
        x = jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "cubic", antialias=True)
        x = jnp.clip(x, 0, 255)
    return jnp.broadcast_to(x, (*x.shape[:3], channels))


def digest_of(variables: Any) -> str:
    """SHA-256 of all weights with their names and shapes, whatever kind of file they were in."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        value = np.ascontiguousarray(np.asarray(leaf, np.float32))
        found.update(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {value.shape}".encode())
        found.update(value.data)
    return found.hexdigest()


# --- the fields of evaluations -------------------------------------------------------------------------------------


def filled(evaluation: Evaluation, opened: Callable[[Pretrained], Network]) -> Evaluation:
    """The evaluation with the networks of the runs that its fields name."""
    named = {f.name: value for f in record.fields(evaluation)
             if isinstance(value := getattr(evaluation, f.name), Pretrained)}  # fmt: skip
    return dataclasses.replace(evaluation, **{name: opened(value) for name, value in named.items()})


def network_of(evaluation: Evaluation, field: str, setting: Setting) -> Network:
    """The network that a field of the evaluation holds or names. UserError where it does neither."""
    value = getattr(evaluation, field)
    if isinstance(value, Inception):
        return value.network(setting.sharding)
    if isinstance(value, Network):
        return value
    if value is None:
        raise UserError(f"the evaluation '{evaluation.name}' needs a network to see pictures with, in its field "
                        f"{field}: Inception('FILE'), or Pretrained('RUN', part='task') of a classifier's run")
    raise UserError(f"the evaluation '{evaluation.name}' has {value!r} in its field {field}, which is not opened: give "
                    "it a Network, or let jaxgen train or jaxgen eval build it")
