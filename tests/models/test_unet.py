"""U-Nets: against NumPy, what they are told, their start, their operations, on a mesh."""

import functools

import jax
import jax.numpy as jnp
import network_reference as reference
import numpy as np
import pytest
from jax import jit
from networks import (
    LABEL,
    Flat,
    agrees,
    agrees_in_bfloat16,
    counts_its_operations,
    expected_of,
    forward,
    gradient_at_first,
    normal,
    params_of,
    refuses,
    squares,
)
from towers import close, on_mesh, random_of

from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions
from jaxgen.models.unet import UNet

BASE = UNet(out=2, width=8, multipliers=(1, 2), blocks=1, attention=(1,), head_dim=8, groups=4)
X = normal(0, 2, 8, 4, 2)
TEXT = Conditions(
    tokens=normal(1, 2, 5, 6), mask=jnp.asarray([[True] * 5, [True, True, False, False, False]]),
    pooled=normal(2, 2, 7), sizes=jnp.asarray([[64.0, 32.0], [7.0, 0.0]]),
)  # fmt: skip
READING = BASE.clone(
    attention=(), readers=(0, 2), heads=2, text=6, pooled=7, sizes=2, size_periods=6, scale_shift=False
)
FORMS = {
    "ddpm": (BASE.clone(scale_shift=False, heads=1, multipliers=(1, 1, 2), out=4), Conditions()),
    "adm": (BASE.clone(classes=3, blocks=2), Conditions(classes=jnp.asarray([1, 3]))),
    "reading": (READING, TEXT),
    "beside": (
        BASE.clone(readers=(1,), multipliers=(1,), attention=(), text=6, channels=5),
        Conditions(image=normal(3, 2, 8, 4, 3), tokens=TEXT.tokens),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_numpy(form):
    agrees(reference.unet, FORMS[form][0], X, LABEL, FORMS[form][1], 1e-4)


def test_starts_at_zero():
    """The last convolution is of zeros, and has a gradient."""
    gradient = gradient_at_first(BASE.clone(multipliers=(1,), attention=()), X)
    assert np.abs(gradient["out"]["kernel"]).max() > 0.1
    assert not np.any(gradient["in"]["kernel"])


def test_padding_is_not_read():
    """Tokens that are not there have no gradient, also where none is."""
    model, told = FORMS["beside"]
    p = params_of(model, X, told)

    def total(tokens, mask):
        return jnp.square(model.apply({"params": p}, X, LABEL, told.replace(tokens=tokens, mask=mask))).sum()

    gradient = jit(jax.grad(total))
    for mask in (TEXT.mask, TEXT.mask.at[1].set(False)):
        found = np.abs(np.asarray(gradient(told.tokens, mask))).max(-1)
        np.testing.assert_array_equal(found > 0, np.asarray(mask))
    none = told.replace(mask=TEXT.mask.at[1].set(False))
    expected = expected_of(reference.unet, model, p, X, LABEL, none)
    close(forward(model, p, X, LABEL, none), expected, 1e-4)


def test_dropout():
    model, told = FORMS["beside"]
    p = params_of(model, X, told)
    whole = forward(model, p, X, LABEL, told)
    dropped = forward(model.clone(dropout=0.5), p, X, LABEL, told, jax.random.key(1))
    assert np.abs(dropped - whole).max() > 0.01


def test_in_bfloat16():
    agrees_in_bfloat16(READING, X, TEXT)


@pytest.mark.parametrize("case", ["adm", "text"])
def test_counts_its_operations(case):
    model = UNet(
        out=3, width=128, multipliers=(1, 2), blocks=1, classes=10, head_dim=32, scan=False, dtype="float32"
    )
    told = Conditions()
    if case == "text":
        model = model.clone(readers=(0, 2), text=96, pooled=48, sizes=2, scale_shift=False)
        told = Conditions(tokens=jnp.zeros((2, 24, 96)), pooled=jnp.zeros((2, 48)), sizes=jnp.zeros((2, 2)))
    counts_its_operations(model, jnp.zeros((2, 16, 16, 3)), told, gradient=case == "adm")


NETS = {
    "convolutions": BASE.clone(attention=(), pooled=8),
    "reader": READING.clone(multipliers=(1,), readers=(1,), text=8, pooled=8, sizes=0, scan=False, remat="full"),
}


@pytest.mark.parametrize("net", NETS)
def test_on_a_mesh_as_alone(net):
    """In value and gradient; with what is scanned unrolled and all computed again backward, which change nothing."""
    model = Flat(NETS[net], ("tokens", "mask", "pooled"))
    inputs = (
        normal(4, 8, 8, 8, 2), jnp.linspace(0.0, 900.0, 8), normal(5, 8, 4, 8), jnp.arange(32).reshape(8, 4) % 5 < 3,
        normal(6, 8, 8),
    )  # fmt: skip

    variables, plain = random_of(model, *inputs), model.clone(net=model.net.clone(scan=True, remat="none"))
    found, split = on_mesh(functools.partial(squares, model), model, variables, inputs, data=2, fsdp=2, tensor=2)
    assert split > 20
    close(found, jit(functools.partial(squares, plain))(variables, *inputs), 2e-4)


@pytest.mark.parametrize(("change", "shape", "words"), [
    ({"width": 0}, (8, 4, 2), "out, width, blocks, groups and multipliers of a U-Net are at least 1."),
    ({"readers": (1,), "text": 6}, (8, 4, 2), "1 readers are not one for each of 2 levels."),
    ({"readers": (0, 1)}, (8, 4, 2), "A U-Net with readers needs the size of the text's embeddings (text)."),
    ({"attention": (2,)}, (8, 4, 2), "There is no level 2 for attention: there are 2, from 0."),
    ({"groups": 3}, (8, 4, 2), "Level 0 has 8 features, no multiple of the 3 groups of its norms."),
    ({"heads": 3}, (8, 4, 2), "Level 1 has 16 features, no multiple of its 3 heads."),
    ({"attention": (0,), "head_dim": 16}, (8, 4, 2), "Level 0 has 8 features, no multiple of its head size 16."),
    ({}, (7, 4, 2), "A U-Net of 2 levels takes pictures whose sides are multiples of 2, and not 7 x 4."),
    ({}, (8, 4, 3), "out = 2 is neither the picture's 3 channels nor twice as many (for a learned variance)."),
])  # fmt: skip
def test_what_does_not_fit(change, shape, words):
    refuses(BASE.clone(**change), shape, words)


def test_conditions_that_are_missing():
    model, told = FORMS["reading"]
    for missing, words in (("tokens", "have no tokens"), ("pooled", "takes a pooled"), ("sizes", "takes sizes")):
        with pytest.raises(ValueError, match=words):
            model.apply({"params": params_of(model, X, told)}, X, LABEL, told.replace(**{missing: None}))
    model, told = FORMS["beside"]
    with pytest.raises(UserError, match="A picture of 2 channels does not fit a U-Net of 5."):
        model.apply({"params": params_of(model, X, told)}, X, LABEL, TEXT)
