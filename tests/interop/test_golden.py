"""Tiny models of other projects: what they compute, computed by ours, and their files from ours."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.interop.families import find, format_for
from jaxgen.interop.formats import HALF, Pictures, preprocessed, timm_pictures, written
from jaxgen.interop.names import flat
from jaxgen.interop.safetensors import Tensors, write
from jaxgen.models.resnet import ResNet
from jaxgen.models.vit import ViT
from jaxgen.nn.patches import Patches
from jaxgen.sharding import RULES, Mesh, Sharding, unbox

from .drawn import model_folder

GOLDEN = Path(__file__).parent / "golden"
PAIRS = ["clip", "siglip", "siglip2", "open_clip", "open_clip_siglip"]
CLASSIFIERS = ["vit", "timm_vit", "timm_vit_mean", "resnet18", "resnet50", "timm_resnet18", "bit50", "timm_bit"]
WRITTEN = ["clip", "siglip", "siglip2", "open_clip", "vit", "resnet18", "resnet50", "bit50"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A golden model, and what went in and came out of it."""

    def open(name):
        folder = model_folder(GOLDEN / name, tmp_path_factory.getbasetemp() / f"golden-{name}")
        return find(folder), dict(np.load(GOLDEN / name / "io.npz"))

    return open


def pixels(x):
    return (x.astype(np.float32) / 255 - 0.5) / 0.5


def difference(found, wanted) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == wanted.shape
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


@functools.partial(jax.jit, static_argnums=0)
def run(module, variables, *inputs):
    return module.apply(variables, *inputs)


def embed(module, variables, io):
    image = pixels(io["image"]) if "image" in io else Patches(
        pixels(io["patches"]), io["coordinates"], io["patch_mask"]
    )
    return run(module, variables, image, io["tokens"], io["lengths"])


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, opened):
    found, io = opened(name)
    image, text, scale, bias = embed(found.module, found.read(), io)
    assert difference(image, io["image_embeds"]) < 1e-5
    assert difference(text, io["text_embeds"]) < 1e-5
    assert difference(scale * image @ text.T + (0 if bias is None else bias), io["logits"]) < 1e-5
    assert (bias is None) == (name in ("clip", "open_clip"))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name, opened):
    found, io = opened(name)
    logits = run(found.module, found.read(), pixels(io["image"]))
    # BiT's norms of few values lose digits in the reference too: 1.3e-5 between its own float32 and float64
    assert difference(logits, io["logits"]) < (1e-4 if "bit" in name else 1e-5)


def test_the_names_of_torchvision(tmp_path):
    """timm's ResNet-50, whose names are torchvision's: each has its place."""
    found = find(model_folder(GOLDEN / "timm_resnet50", tmp_path))
    assert found.module == ResNet(50, out=5)
    target = flat(unbox(found.boxed))
    found.format.names(found.module).expand(target).check(found.tensors, "it")


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ({"size": 224, "crop_pct": 0.875, "resample": 3}, (True, 256, "bicubic")),
        ({"size": {"shortest_edge": 224}, "image_processor_type": "ConvNextImageProcessor", "resample": 2},
         (True, 256, "bilinear")),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, (True, 256, "bicubic")),
        ({"size": 224, "do_center_crop": True, "crop_size": 224, "resample": 1}, (True, 0, "lanczos")),
        ({"size": {"height": 224, "width": 224}, "resample": 2}, (False, 0, "bilinear")),
        ({}, (True, 0, "bicubic")),
    ],
)  # fmt: skip
def test_what_a_preprocessor_says(told, shown):
    found = preprocessed({"preprocessor": told}, 224, *HALF)
    assert (found.crop, found.resize, found.filter) == shown


def test_what_timm_says_of_pictures():
    found = timm_pictures({"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.1] * 3}, 224, *HALF)
    assert (found.resize, found.filter, found.crop, found.mean) == (248, "bilinear", True, (0.1, 0.1, 0.1))
    assert timm_pictures({"crop_pct": 1.0, "crop_mode": "squash"}, 224, *HALF) == Pictures(224, crop=False)
    with pytest.raises(UserError, match="interpolation = 'random' are not imported, only by"):
        timm_pictures({"interpolation": "random"}, 224, *HALF)
    with pytest.raises(UserError, match="resample = 4 are not imported, only by 0 .nearest."):
        preprocessed({"preprocessor": {"resample": 4}}, 224, *HALF)


@pytest.mark.parametrize("name", ["clip", "resnet50"])
def test_sharded_as_unsharded(name, opened):
    found, io = opened(name)
    sharding = Sharding(Mesh(data=1, fsdp=4, tensor=2).build(), RULES | {"heads": (), "kv_heads": ()})
    whole, split = flat(found.read()), flat(found.read(sharding))
    parts = set()
    for path, value in whole.items():
        np.testing.assert_array_equal(split[path], value)
        parts.add(split[path].addressable_shards[0].data.size * 8 // split[path].size)
    assert 1 in parts   # some are in eight parts


@pytest.mark.parametrize("name", WRITTEN)
def test_written_as_it_was_read(name, opened, tmp_path):
    found, _ = opened(name)
    write(tmp_path, written(found.format, found.module, found.read(), np.float32), shard=100_000)
    again = Tensors(tmp_path)
    assert again.keys() == found.tensors.keys()
    for key, value in found.tensors.items():
        np.testing.assert_array_equal(again[key], value.astype(again[key].dtype), err_msg=key)
        assert again[key].dtype == (np.int64 if key.endswith("num_batches_tracked") else np.float32)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_configuration_says_the_module(name, opened, tmp_path):
    """What is written as configuration reads as the same module, with no tensors at hand."""
    found, _ = opened(name)
    found.format.check(found.module)
    for file, content in found.format.files(found.module, found.pictures).items():
        (tmp_path / file).write_text(json.dumps(content))
    write(tmp_path, written(found.format, found.module, found.read(), np.float32), found.format.weights)
    again = find(tmp_path)
    assert type(again.format) is type(found.format)
    assert again.module == found.module and again.pictures == found.pictures


@pytest.mark.parametrize("name", [n for n in WRITTEN if n != "open_clip"])
def test_the_form_for_a_module(name, opened):
    found, _ = opened(name)
    assert type(format_for(found.module, naflex=name == "siglip2")) is type(found.format)


def test_what_a_form_has_no_words_for(opened):
    found, _ = opened("clip")
    image = found.module.image.clone(registers=4, pre_norm=False)
    with pytest.raises(UserError, match=r"written as transformers CLIP: .*image.registers is 4 and would be 0"):
        found.format.check(found.module.clone(image=image))
    with pytest.raises(UserError, match="out is 0 and would be 20|image.head_bias is True"):
        found.format.check(found.module.clone(image=image.clone(pre_norm=True, registers=0, head_bias=True)))
    with pytest.raises(UserError, match="the activation 'geglu' has no name there"):
        format_for(ViT()).check(ViT(activation="geglu"))
    with pytest.raises(UserError, match="a ViT cannot be written in the form of open_clip"):
        format_for(ViT(), "open_clip")
    found.format.check(found.module.clone(image=found.module.image.clone(patch_dropout=0.5, scan=False)))


def test_a_width_that_is_said_though_it_is_the_default():
    format_for(ViT()).check(ViT(mlp_width=3072))


def changed(folder, tmp_path, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part = config
        *above, last = key.split("__")
        for name in above:
            part = part[name]
        part[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return tmp_path


def test_a_configuration_that_is_not_the_weights(tmp_path):
    found = find(changed(GOLDEN / "vit", tmp_path, num_hidden_layers=3, hidden_size=48))
    with pytest.raises(UserError) as caught:
        found.read()
    text = str(caught.value)
    assert "vit.encoder.layer.2.attention.attention.query.weight is missing" in text
    assert "vit.layernorm.bias has the shape (24,), and (48,) is wanted" in text
    # a layer, and all tensors of the other two but the biases of the hidden units; the class, the positions, ...
    assert len(text.splitlines()) == 1 + 16 + 2 * 15 + 4 + 2 + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vitt"}, "holds a model 'vitt', which is not imported"),
        ({"hidden_act": "gelu_fast"}, "the activation 'gelu_fast' is unknown; did you mean 'gelu'"),
        ({"qkv_bias": False}, "a ViT with qkv_bias = False is not imported, only True"),
        ({"num_attention_heads": "3"}, "is not that of a transformers ViT"),
    ],
)
def test_configurations_that_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        find(changed(GOLDEN / "vit", tmp_path, **changes)).read()


def test_folders_without_a_model(tmp_path):
    with pytest.raises(UserError, match="is no folder with a model in it"):
        find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.json or open_clip_config.json"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not the description of a model"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        find(tmp_path)
