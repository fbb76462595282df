"""CLIP and SigLIP: two towers, unit vectors, and the temperature with its bound."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_reference as reference
from jax import jit
from towers import close, float64, on_mesh, random_of, size_of

from jaxgen.errors import UserError
from jaxgen.models.clip import CLIP
from jaxgen.models.resnet import ResNet
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.sharding import unbox

IMAGE = ViT(patch=4, width=16, depth=2, heads=2, image_size=16, out=8, head_bias=False)
TEXT = TextTower(vocab_size=32, width=24, depth=2, heads=2, max_length=8, out=8)
MODEL = CLIP(IMAGE, TEXT)
IMAGES = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
TOKENS = jax.random.randint(jax.random.key(1), (8, 8), 0, 32)
LENGTHS = jnp.arange(1, 9, dtype=jnp.int32)


@functools.cache
def variables_of(model):
    return random_of(model, IMAGES, TOKENS, LENGTHS)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_agrees_with_numpy():
    variables = variables_of(MODEL)
    image, text, scale, bias = jit(MODEL.apply)(variables, IMAGES, TOKENS, LENGTHS)
    p = float64(variables["params"])
    assert set(p) == {"image", "text", "temperature"}
    cut = [reference.cut(np.float64(x), 4) for x in IMAGES]
    close(image, unit(np.stack([reference.vit(IMAGE, p["image"], x, h, w)[1] for h, w, x in cut])), 5e-5)
    pairs = zip(np.asarray(TOKENS), np.asarray(LENGTHS), strict=True)
    close(text, unit(np.stack([reference.text(TEXT, p["text"], *pair) for pair in pairs])), 5e-5)
    assert float(scale) == pytest.approx(math.exp(p["temperature"]["scale"])) and bias is None
    alone = jit(lambda v: MODEL.apply(v, IMAGES, method="embed_image"))(variables)
    np.testing.assert_allclose(alone, image, atol=1e-6)
    alone = jit(lambda v: MODEL.apply(v, TOKENS, LENGTHS, method="embed_text"))(variables)
    np.testing.assert_allclose(alone, text, atol=1e-6)


@pytest.mark.parametrize(("bias", "scale", "start"), [(False, 1 / 0.07, None), (True, 10.0, -10.0)])
def test_starting_temperature(bias, scale, start):
    model = CLIP(IMAGE, TEXT, bias)
    variables = unbox(jit(model.init)(jax.random.key(0), IMAGES[:1], TOKENS[:1], LENGTHS[:1]))
    found = model.apply(variables, method="scale")
    assert float(found[0]) == pytest.approx(scale, rel=1e-5)
    assert found[1] is None if start is None else float(found[1]) == start
    image, text, *_ = jit(model.apply)(variables, IMAGES, TOKENS, LENGTHS)
    for x in (image, text):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, atol=1e-5)
        assert np.abs(x - x.mean(0)).max() > 1e-3  # examples differ from the start


def at(scale, model=MODEL, sign=1.0):
    """(inverse temperature, gradient of sign times it) at this parameter."""
    temperature = {"scale": jnp.float32(scale)} | ({"bias": jnp.float32(0)} if model.bias else {})
    variables = {"params": {**variables_of(model)["params"], "temperature": temperature}}
    value, gradient = jax.value_and_grad(lambda v: sign * model.apply(v, method="scale")[0])(variables)
    return abs(float(value)), float(gradient["params"]["temperature"]["scale"])


def test_the_bound_of_the_temperature():
    """At most 100; beyond, a step that would lead further out has no gradient, and one back has."""
    inside = math.log(50)
    assert at(inside) == pytest.approx((50, 50), rel=1e-5)
    assert at(inside, sign=-1.0) == pytest.approx((50, -50), rel=1e-5)
    assert at(5.0) == pytest.approx((100, 100), rel=1e-5)  # a loss that falls with it: back inside
    assert at(5.0, sign=-1.0) == pytest.approx((100, 0), rel=1e-5)
    assert at(5.0, CLIP(IMAGE, TEXT, max_scale=0.0))[0] == pytest.approx(math.exp(5), rel=1e-5)
    assert at(5.0, CLIP(IMAGE, TEXT, bias=True))[0] == pytest.approx(math.exp(5), rel=1e-5)  # SigLIP's has none


def test_with_a_resnet():
    """Batch statistics are a collection of the whole model's; training updates them."""
    model = CLIP(ResNet(18, width=8, out=8, small=True), TEXT)
    variables = variables_of(model)
    run = jit(lambda v, train: model.apply(v, IMAGES, TOKENS, LENGTHS, train=train, mutable=["batch_stats"]),
              static_argnums=1)  # fmt: skip
    (image, *_), same = run(variables, False)
    (other, *_), new = run(variables, True)
    close(same["batch_stats"], variables["batch_stats"], 0)
    assert set(new["batch_stats"]) == {"image"}
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1.0, atol=1e-5)
    assert np.abs(other - image).max() > 1e-3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new["batch_stats"], variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_on_a_mesh_as_alone():
    model = CLIP(IMAGE.clone(pool="attention", patch_dropout=0.5), TEXT, bias=True)
    variables, keys = variables_of(model), jax.random.split(jax.random.key(3), 8)

    def run(variables, images, tokens, lengths):
        def loss(variables):
            image, text, scale, bias = model.apply(variables, images, tokens, lengths, keys)
            return -jnp.sum(jax.nn.log_sigmoid((scale * image @ text.T + bias) * (2 * jnp.eye(8) - 1)))

        return jax.value_and_grad(loss)(variables)

    inputs = IMAGES, TOKENS, LENGTHS
    found, split = on_mesh(run, model, variables, inputs, data=2, fsdp=2, tensor=2)
    assert split > 20
    close(found, jit(run)(variables, *inputs), 2e-5)


@pytest.mark.parametrize(("model", "millions"), [
    (CLIP(ViT.B(32, pre_norm=True, patch_bias=False, head_bias=False, out=512), TextTower()), 151.28),  # CLIP ViT-B/32
    (CLIP(ViT.L(14, pre_norm=True, patch_bias=False, head_bias=False, out=768),
          TextTower(width=768, heads=12, out=768)), 427.62),  # CLIP ViT-L/14
    (CLIP(ViT.B(16, pool="attention"),
          TextTower(32000, 768, heads=12, max_length=64, mask="bidirectional", pool="final", out=768, head_bias=True),
          bias=True), 203.16),  # SigLIP B/16
], ids=["CLIP B/32", "CLIP L/14", "SigLIP B/16"])  # fmt: skip
def test_sizes_of_known_models(model, millions):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tokens, lengths = jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    assert round(size_of(model, image, tokens, lengths) / 1e6, 2) == millions


def test_counts_both_towers():
    image, text = (16, 16, 3), (8,)
    assert MODEL.flops_per_example(image, text) == IMAGE.flops_per_example(image) + TEXT.flops_per_example(text)
    masked = CLIP(IMAGE.clone(patch_dropout=0.5), TEXT)
    assert masked.flops_per_example(image, text, train=True) < masked.flops_per_example(image, text)


def test_towers_that_do_not_fit():
    with pytest.raises(UserError) as caught:
        CLIP(IMAGE.clone(out=7), TEXT).check()
    assert str(caught.value) == (
        "The picture's tower gives 7 numbers and the text's 8; `out` of both should be the same."
    )
