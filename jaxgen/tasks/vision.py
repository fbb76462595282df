"""What the tasks with pictures share: from a batch's pixels to a model's input."""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.errors import UserError
from jaxgen.models.vit import ViT
from jaxgen.nn import dtypes, kernels
from jaxgen.nn.attention import Mask
from jaxgen.nn.patches import Patches
from jaxgen.sharding import RULES, Mesh, Sharding, current
from jaxgen.tasks.base import Batch, Spec

NAMES = ("image", "patches", "coordinates", "patch_mask")
"""Arrays of a batch that make up its pictures: `image` alone, or the others (NaFlex)."""


def pixels(
    batch: Batch, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W C"] | Patches:
    """(value / 255 - mean) / std of a batch's pictures, with a number for each channel or one for all."""

    def normal(x, channels):
        x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, channels)
        return (x / 255 - jnp.asarray(mean)) / jnp.asarray(std)

    if "image" in batch:
        image = batch["image"]
        return normal(image, image.shape[-1]).reshape(image.shape)
    patches = batch["patches"]  # channels last within a patch
    return Patches(normal(patches, len(mean)).reshape(patches.shape), batch["coordinates"], batch["patch_mask"])


def shape(spec: Spec) -> tuple[int, ...]:
    """(H, W, C) of a batch's pictures, or (N, P) of their patches."""
    return spec["image" if "image" in spec else "patches"].shape[1:]


def example(model: nn.Module) -> Float[Array, "1 H W C"]:
    """A picture to initialise a model with."""
    size = getattr(model, "image_size", 32)
    return jnp.zeros((1, size, size, getattr(model, "channels", 3)))


def for_init(model: nn.Module) -> nn.Module:
    """The model as it is initialised: with the kernel that takes any shape."""
    return model.clone(kernel="xla") if hasattr(model, "kernel") else model


def turned(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree whose two outermost levels are exchanged: a model's variables by collection and part ("batch_stats",
    "image") from state by part and collection, or the other way round."""
    names = dict.fromkeys(name for inner in tree.values() for name in inner)
    return {name: {outer: inner[name] for outer, inner in tree.items() if name in inner} for name in names}


@contextlib.contextmanager
def unsplit() -> Iterator[None]:
    """One device, whatever the mesh, for what is traced inside: initialisation makes parameters of one example, whose
    activations no mesh needs to divide."""
    scope = current()
    with Sharding(Mesh(data=1).abstract(1), RULES if scope is None else scope.rules).use():
        yield


def check(spec: Spec, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], where: str) -> None:
    """Raises UserError when a batch's pictures are not for the model at `where`."""
    if "image" not in spec and "patches" not in spec:
        raise UserError(f"The data has {', '.join(spec)}, and the task needs image (or patches).")
    if "patches" in spec and not hasattr(model, "patches"):
        raise UserError(f"The data gives patches, which {where}, a {type(model).__name__}, does not take; a ViT does.")
    if "patches" in spec and hasattr(model, "patch"):
        pixels, wanted = spec["patches"].shape[-1], model.patch**2 * model.channels
        if pixels != wanted:
            raise UserError(
                f"The data's patches have {pixels} numbers each, and {where} takes {wanted}: {model.channels} channels "
                f"of {model.patch} x {model.patch} pixels ({where}.patch; data.patch should be the same)."
            )
    channels = spec["image"].shape[-1] if "image" in spec else getattr(model, "channels", 3)
    if getattr(model, "channels", channels) != channels:
        raise UserError(f"The data's pictures have {channels} channels and {where}.channels is {model.channels}.")
    check_scale(mean, std, channels)


def check_scale(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    """Raises UserError for a task's mean and std that are not for pictures of so many channels."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            right, have = ("1", "1 channel") if channels == 1 else (f"1 or {channels}", f"{channels} channels")
            raise UserError(
                f"task.{name} has {len(values)} numbers, which should be {right}: the pictures have {have}."
            )
    if min(std) <= 0:
        raise UserError(f"task.std is above 0, not {min(std)}.")


def picture_attention(model: nn.Module, spec: Spec) -> tuple[nn.Module, int, Mask] | None:
    """(model, tokens, mask) of the attention over a batch's pictures; None for models without any."""
    if not isinstance(model, ViT):
        return None
    segments = jnp.ones((1, 1), jnp.int32) if "patches" in spec else None  # that there are any is what matters
    size = shape(spec)
    count = size[0] if "patches" in spec else (size[0] // model.patch) * (size[1] // model.patch)
    return model, model.kept(count) + model.extra, Mask("bidirectional", query_segments=segments)


def attention(batch: int, **models: tuple[nn.Module, int, Mask] | None) -> dict[str, str]:
    """A run's note on which attention kernels run, and why."""
    parts = []
    for name, (model, length, mask) in ((k, v) for k, v in models.items() if v is not None):
        query = (batch, length, model.heads, model.width // model.heads)
        query = jax.ShapeDtypeStruct(query, dtypes.resolve(model.dtype))
        kernel, reason = kernels.choose(model.kernel, query, query, mask, 0.0)
        parts.append(f"{name} {kernel} ({reason})")
    return {"attention": "; ".join(parts)} if parts else {}
