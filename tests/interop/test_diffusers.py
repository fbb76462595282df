"""Tiny networks of diffusers: what they compute, computed by ours, and their files; names of released ones."""

import functools
import hashlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.interop.diffusers import DiTFormat, UNetFormat
from jaxgen.interop.families import FORMATS, component, find, format_for
from jaxgen.interop.formats import variables, written
from jaxgen.interop.names import flat
from jaxgen.interop.safetensors import Tensors, write
from jaxgen.models.conditions import Conditions
from jaxgen.models.dit import DiT
from jaxgen.models.unet import UNet
from jaxgen.sharding import unbox

from .drawn import model_folder

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["diffusers_sd1", "diffusers_sd2_inpainting", "diffusers_sdxl", "diffusers_dit"]
RELEASED = json.loads((GOLDEN / "diffusers_names.json").read_text())


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A golden network, and what went in and came out of it."""

    @functools.cache
    def open(name):
        folder = model_folder(GOLDEN / name, tmp_path_factory.getbasetemp() / f"golden-{name}")
        return find(folder), dict(np.load(GOLDEN / name / "io.npz"))

    return open


@pytest.mark.parametrize("name", NAMES)
def test_the_output_of_diffusers(name, opened):
    found, io = opened(name)
    told = Conditions(**{key: jnp.asarray(io[key]) for key in io.keys() - {"x", "label", "out"}})
    out = jit(found.module.apply)(found.read(), jnp.asarray(io["x"]), jnp.asarray(io["label"]), told)
    assert out.shape == io["out"].shape and io["out"].std() > 0.1
    assert np.abs(out - io["out"]).max() < 1e-4 * np.abs(io["out"]).max()


@pytest.mark.parametrize("name", NAMES)
def test_written_as_it_was_read(name, opened, tmp_path):
    """Each tensor, and a configuration that reads as the same network."""
    found, _ = opened(name)
    write(tmp_path, written(found.format, found.module, found.read(), np.float32), found.format.weights)
    again = Tensors(tmp_path)
    assert again.keys() == found.tensors.keys()
    for key, value in found.tensors.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    for file, content in found.format.files(found.module, found.pictures).items():
        (tmp_path / file).write_text(json.dumps(content))
    read = find(tmp_path)
    assert read.module == found.module and read.pictures == found.pictures and read.pictures.size in (8, 16)
    assert type(format_for(found.module)) is type(found.format)
    assert getattr(format_for(found.module), "linear", None) == getattr(found.format, "linear", None)


@pytest.mark.parametrize("name", ["sd1.5", "sdxl", "dit-xl-2-256"])
def test_names_of_released_networks(name):
    """Every name and every shape, from the configuration."""
    told = RELEASED[name]
    format = next(f for f in FORMATS if f.recognises(told["config"]))
    module = format.module(told["config"], {})
    shapes = format.names(module).expand(flat(unbox(variables(format, module)))).shapes
    lines = "\n".join(f"{key} {list(shapes[key])}" for key in sorted(shapes))
    assert len(shapes) == told["tensors"]
    assert hashlib.sha256(lines.encode()).hexdigest() == told["digest"]
    format.check(module)


def test_what_released_networks_are_here():
    def module(name):
        config = RELEASED[name]["config"]
        return next(f for f in FORMATS if f.recognises(config)).module(config, {})

    shared = dict(out=4, width=320, attention=(), scale_shift=False)
    four = dict(multipliers=(1, 2, 4, 4), readers=(1, 1, 1, 0))
    assert module("sd1.5") == UNet(**shared, **four, heads=8, text=768)
    assert module("sd2.1") == UNet(**shared, **four, text=1024)
    assert module("sdxl") == UNet(
        **shared, multipliers=(1, 2, 4), readers=(0, 2, 10), text=2048, pooled=1280, sizes=6
    )
    refiner = module("sdxl-refiner")
    assert (refiner.pooled, refiner.sizes, refiner.readers) == (1280, 5, (0, 4, 4, 0))
    assert module("dit-xl-2-256") == DiT.XL(2, out=8, channels=4, classes=1000, period_shift=1)


def test_a_part_of_a_pipeline(opened, tmp_path):
    shutil.copytree(GOLDEN / "diffusers_dit", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({
        "_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": [None, None],
    }))  # fmt: skip
    assert component(tmp_path, "transformer").module == opened("diffusers_dit")[0].module
    with pytest.raises(UserError, match="has no unet; its parts are transformer"):
        component(tmp_path, "unet")
    with pytest.raises(UserError, match="has no model_index.json, which lists the parts of a pipeline"):
        component(tmp_path / "transformer", "unet")


def test_copies_that_differ(opened, tmp_path):
    """DiT's blocks have each a copy of one layer: where they are not the same, there is no such model."""
    from safetensors.numpy import save_file

    shutil.copytree(GOLDEN / "diffusers_dit", tmp_path, dirs_exist_ok=True)
    tensors = dict(Tensors(tmp_path))
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    tensors[name] = tensors[name] + 1
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / DiTFormat.weights)
    with pytest.raises(UserError, match=f"{name} is not the same as transformer_blocks.0.norm1"):
        find(tmp_path).read()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd1.5", {"class_embed_type": "projection"}, "a U-Net with class_embed_type = 'projection' is not imported"),
        ("sd1.5", {"down_block_types": ["AttnDownBlock2D"] * 4}, "with down_block_types = "),
        ("sd1.5", {"up_block_types": ["UpBlock2D"] * 4}, "with up_block_types = .* not those of the way down"),
        ("sd1.5", {"block_out_channels": [320, 480, 640, 640]}, "they are not multiples of the first"),
        ("sd1.5", {"layers_per_block": [2, 2, 1, 1]}, "with layers_per_block = .* only one for all levels"),
        ("sdxl", {"transformer_layers_per_block": [0, 2, 3], "down_block_types": ["CrossAttnDownBlock2D"] * 2
                  + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2}, "the middle's"),
        ("sdxl", {"addition_embed_type": "image"}, "with addition_embed_type = 'image' is not imported"),
        ("sdxl", {"projection_class_embeddings_input_dim": 1000}, "has no room for 6 sizes of 256 numbers"),
        ("dit-xl-2-256", {"activation_fn": "geglu"}, "a DiT with activation_fn = 'geglu' is not imported"),
        ("dit-xl-2-256", {"norm_eps": 1e-3}, "a DiT with norm_eps = 0.001 is not imported"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(name, changes, message):
    config = RELEASED[name]["config"] | changes
    with pytest.raises(UserError, match=message):
        next(f for f in FORMATS if f.recognises(config)).module(config, {})


def test_networks_that_have_no_words():
    with pytest.raises(UserError, match=r"attention is \[1\] and would be \[\]"):
        UNetFormat().check(UNet(heads=4, text=8, readers=(1, 1, 1, 0), scale_shift=False))
    with pytest.raises(UserError, match="period_shift is 0 and would be 1"):
        DiTFormat().check(DiT(classes=10, channels=4))
    with pytest.raises(UserError, match="a DiT without classes cannot be written"):
        DiTFormat().check(DiT(channels=4, period_shift=1))
