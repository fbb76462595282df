"""Distances between pictures as a network sees them: LPIPS, and the features of any classifier or picture tower."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.errors import UserError
from jaxgen.models.resnet import STAGES, Residual, ResNet
from jaxgen.models.vit import ViT
from jaxgen.nn.convolution import Conv
from jaxgen.nn.dtypes import DType
from jaxgen.pretrained import Pretrained
from jaxgen.sharding import unbox

Activations = Float[Array, "B ... F"]

CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Where the convolutions of VGG16's five stages stand among its layers."""
SHIFT, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation of pixels from -1 to 1."""


def difference(a: Activations, b: Activations, weights: Float[Array, "F"] | None = None) -> Float[Array, "B"]:
    """The mean over places of |w (a / |a| - b / |b|)|^2 (Zhang et al. 2018, eq. 1; `weights` are the w^2)."""

    def unit(x):
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)

    terms = jnp.square(unit(a) - unit(b))
    terms = terms.sum(-1) if weights is None else terms @ weights
    return terms.reshape(len(terms), -1).mean(1)


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015, table 1, D)."""

    width: int = 64
    dtype: DType = "auto"

    def stages(self) -> tuple[tuple[Conv, ...], ...]:
        """The convolutions, each followed by a ReLU; stages by a pooling of 2."""
        return tuple(
            tuple(
                Conv(
                    self.width * min(2**i, 8), bias=True, axis="embed" if i or k else None, dtype=self.dtype,
                    parent=None,
                )  # fmt: skip
                for k in range(len(places))
            )
            for i, places in enumerate(CONVOLUTIONS)
        )

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w F"]]:
        """What each stage ends with, of pictures from -1 to 1."""
        x, found = (image - jnp.asarray(SHIFT)) / jnp.asarray(SPREAD), []
        for i, stage in enumerate(self.stages()):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
            for k, conv in enumerate(stage):
                x = jax.nn.relu(conv.copy(name=f"conv{i}_{k}")(x))
            found.append(x)
        return found


class LPIPS(nn.Module):
    """The learned perceptual distance on VGG16 (Zhang et al. 2018), with weights from a file.

    The file is that of the authors' own module, or VGG16's of torchvision, which makes all features count alike. It is
    read when a run begins; the run keeps the weights.
    """

    weights: str = ""
    """A .safetensors or .npz file of tensors named `features.0.weight` or `net.slice1.0.weight` and, where the
    features have weights, `lin0.model.1.weight`."""
    width: int = 64
    """Features of VGG16's first stage."""
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
        """The distance of each picture of `a` from that of `b`, from -1 to 1, grey or in colour."""
        vgg, total = VGG16(self.width, self.dtype, name="vgg"), jnp.zeros(len(a))
        pairs = zip(*(vgg(jnp.broadcast_to(x, (*x.shape[:3], 3))) for x in (a, b)), strict=True)
        for i, (one, other) in enumerate(pairs):
            plain = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
            total += difference(one, other, self.param(f"weights{i}", plain, one.shape[-1:]))
        return total

    def create(self, key: Array) -> dict[str, Any]:
        """Its variables, with the file's numbers. Inside jit the file is read when the program runs."""
        image = jnp.zeros((1, 32, 32, 3))
        found = self.init(key, image, image)
        if not self.weights:
            return found
        leaves = jax.tree_util.tree_leaves_with_path(unbox(found)["params"])
        shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
        told = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]
        values = jax.pure_callback(lambda: list(read(self.weights, shapes).values()), told)
        return jax.tree.unflatten(jax.tree.structure(found), values)

    def distance(self, variables: Any, a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
        """The distance, given the variables that `create` makes."""
        return self.apply(variables, a, b)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError where there is no file of weights, or pictures (H, W, C) do not fit."""
        if not self.weights:
            raise UserError("LPIPS needs its weights: a .safetensors or .npz file in task.perceptual.weights.")
        if min(shape[:2]) < 16:
            raise UserError(f"LPIPS is for pictures of 16 pixels and more, not {shape[0]} x {shape[1]}.")
        if shape[2] not in (1, 3):
            raise UserError(f"LPIPS is for grey and colour pictures, not for {shape[2]} channels.")

    def flops_per_example(self, shape: tuple[int, ...]) -> float:
        """Operations of one forward pass for one picture of this shape (H, W, C)."""
        (height, width), channels, total = shape[:2], 3, 0.0
        for stage in VGG16(self.width, parent=None).stages():
            for conv in stage:
                total += conv.flops(channels, height, width)
                channels = conv.features
            height, width = height // 2, width // 2
        return total


def read(file: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """LPIPS' parameters by path ("vgg/conv0_0/kernel", "weights0"), of these shapes, from a file of PyTorch's tensors.
    Raises UserError for a file that has not all of them."""
    tensors, found = _tensors(Path(file)), {}
    for path, shape in shapes.items():
        place = re.fullmatch(r"vgg/conv(\d)_(\d)/(kernel|bias)", path)
        if place is None:
            stage = path.removeprefix("weights")
            tensor = _find(tensors, rf"(.*\.)?lin{stage}\.model\.1\.weight")
            tensor = np.ones(shape) if tensor is None else tensor.reshape(-1)
        else:
            layer = CONVOLUTIONS[int(place[1])][int(place[2])]
            kind = "weight" if place[3] == "kernel" else "bias"
            tensor = _find(tensors, rf"(.*\.)?(features|slice\d)\.{layer}\.{kind}")
            if tensor is None:
                raise UserError(f"{file} has no features.{layer}.{kind}, which a VGG16 has")
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
        if tensor.shape != shape:
            raise UserError(f"{path} of {file} has the shape {tensor.shape}, and {shape} is wanted")
        found[path] = np.ascontiguousarray(tensor, np.float32)
    return found


def _find(tensors: Mapping[str, np.ndarray], pattern: str) -> np.ndarray | None:
    return next((tensor for name, tensor in tensors.items() if re.fullmatch(pattern, name)), None)


def _tensors(file: Path) -> Mapping[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"there is no {file}, from which LPIPS takes its weights")
    try:
        if file.suffix == ".npz":
            with np.load(file) as content:
                return dict(content)
        from safetensors.numpy import load_file

        return load_file(file)
    except Exception as error:  # numpy, zipfile and safetensors each have their own
        raise UserError(f"{file} is no .npz and no .safetensors file, or is damaged: {error}") from None


@dataclasses.dataclass(frozen=True)
class Features:
    """The distance between the features that a classifier or a picture tower has of two pictures: the form of LPIPS,
    all features counting alike, on a network of one's own."""

    tower: ViT | ResNet | Pretrained
    """Weights that mean something come from another run: `Pretrained(source, "task.model")`, or "task.image"."""
    depth: int = 0
    """Blocks of a ViT, after which its tokens are compared, or stages of a ResNet, each of which is; 0 for all."""
    mean: tuple[float, ...] = (0.5,)
    """Pixels from 0 to 1, less this, and divided by `std`, are what the tower was trained on."""
    std: tuple[float, ...] = (0.5,)

    def create(self, key: Array) -> dict[str, Any]:
        """The tower's variables."""
        tower = self.tower.clone(kernel="xla") if hasattr(self.tower, "kernel") else self.tower
        size = getattr(tower, "image_size", 32)
        return tower.init(key, jnp.zeros((1, size, size, tower.channels)))

    def distance(self, variables: Any, a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
        """The distance of each picture of `a` from that of `b`, from -1 to 1, given the tower's variables."""
        pairs = zip(self.features(variables, a), self.features(variables, b), strict=True)
        return sum(difference(one, other) for one, other in pairs)

    def features(self, variables: Any, image: Float[Array, "B H W C"]) -> list[Activations]:
        """What is compared."""
        x = ((image + 1) / 2 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        x = jnp.broadcast_to(x, (*x.shape[:3], self.tower.channels))
        if isinstance(self.tower, ViT):
            depth = self.depth or self.tower.depth
            blocks = jax.tree.map(lambda p: p[:depth], variables["params"]["blocks"])
            variables = {**variables, "params": {**variables["params"], "blocks": blocks}}
            return [self.tower.clone(depth=depth).apply(variables, x, method="tokens")]

        def is_block(module, method):
            return isinstance(module, Residual) and method == "__call__"

        _, kept = self.tower.apply(
            variables, x, method="tokens", capture_intermediates=is_block, mutable=["intermediates"]
        )
        return [kept["intermediates"][name]["__call__"][0] for name in _ends(self.tower, self.depth)]

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError where the tower does not fit, or pictures (H, W, C) do not fit it."""
        self.tower.check()
        most = self.tower.depth if isinstance(self.tower, ViT) else len(STAGES[self.tower.depth])
        if not 0 <= self.depth <= most:
            raise UserError(f"task.perceptual.depth is {self.depth}; the tower has {most}, and 0 stands for all.")
        if shape[2] not in (1, self.tower.channels):
            raise UserError(
                f"Pictures of {shape[2]} channels do not fit a perceptual tower of {self.tower.channels}."
            )
        if min(shape[:2]) < getattr(self.tower, "patch", 1):
            raise UserError(f"Pictures of {shape[0]} x {shape[1]} have no patch of {self.tower.patch} pixels.")

    def flops_per_example(self, shape: tuple[int, ...]) -> float:
        """Operations of one forward pass for one picture of this shape (H, W, C)."""
        tower = self.tower
        if isinstance(tower, ViT) and self.depth:
            tower = tower.clone(depth=self.depth)
        return tower.flops_per_example((*shape[:2], tower.channels))


def _ends(tower: ResNet, depth: int) -> Iterable[str]:
    """Names of the last block of each of the first `depth` stages."""
    counts = STAGES[tower.depth]
    return [f"stage{i}_block{count}" for i, count in enumerate(counts[: depth or len(counts)], 1)]
