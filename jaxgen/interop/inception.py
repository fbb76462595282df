"""FID's InceptionV3: the names of its ports to PyTorch, which are torchvision's."""

import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.interop import layers
from jaxgen.interop.names import CONVOLUTION, NameMap, Rule, flat, nested
from jaxgen.interop.resnet import batch_norm
from jaxgen.interop.safetensors import Tensors
from jaxgen.models.inception import DIVISORS, InceptionV3
from jaxgen.sharding import unbox

STEM = "Conv2d_1a_3x3"


class Found(NamedTuple):
    """A file of weights, opened: the network, and its variables."""

    module: InceptionV3
    variables: dict


def read(path: str | Path, layout: jax.sharding.Sharding | None = None) -> Found:
    """The network of a .safetensors or .npz file; its weights on the first device, or laid out as `layout`.

    Raises UserError where there is no such file, and a list of every tensor that is missing, left over or of another
    shape.
    """
    tensors = tensors_of(Path(path))
    module = module_of(tensors, str(path))
    shapes = flat(shapes_of(module))
    target = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout) for name, s in shapes.items()}
    return Found(module, nested(names(module).expand(target).read(tensors, target, str(path))))


def tensors_of(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a file by name. No pickled content is read."""
    if path.suffix != ".npz" or not path.is_file():
        return Tensors(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an .npz file of arrays, or is damaged: {error}") from None


def module_of(tensors: Mapping[str, np.ndarray], where: str) -> InceptionV3:
    """The network whose tensors these are, by the shapes of the first and the last layer."""
    first, last = tensors.get(f"{STEM}.conv.weight"), tensors.get("fc.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 2:
        raise UserError(f"{where} holds no InceptionV3: it has no {STEM}.conv.weight and fc.weight of such a network")
    if last.shape[0] != InceptionV3.out:
        raise UserError(f"{where} holds an InceptionV3 of {last.shape[0]} classes, and FID's has {InceptionV3.out}: "
                        "with other weights its numbers would be no FID")
    divisor = 32 // max(first.shape[0], 1)
    return InceptionV3(width_divisor=divisor if divisor in DIVISORS else 1)


@functools.lru_cache(maxsize=4)
def shapes_of(module: InceptionV3) -> dict:
    """Its variables, as shapes."""
    return unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3))))


def names(module: InceptionV3) -> NameMap:
    """The map of its variables ("params/...", "batch_stats/...")."""
    rules = layers.linear("fc", "params/fc")
    for path in flat(shapes_of(module)["params"]):
        if path.endswith("/kernel") and not path.startswith("fc/"):
            ours = path.removesuffix("/kernel")
            theirs = ours.replace("/", ".")
            rules.append(Rule(f"{theirs}.conv.weight", f"params/{path}", CONVOLUTION))
            rules += batch_norm(f"{theirs}.bn", f"{ours}/norm")
    return NameMap(rules)
