"""DiT: against NumPy, what it is told, its start, its operations, on a mesh."""

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
    forward,
    gradient_at_first,
    normal,
    params_of,
    refuses,
    squares,
)
from towers import close, on_mesh, random_of, size_of

from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions, Telling
from jaxgen.models.dit import DiT
from jaxgen.nn.rope import Rope2D

BASE = DiT(out=2, patch=2, width=16, depth=2, heads=2, periods=32)
X = normal(0, 2, 4, 8, 2)
CLASSES = Conditions(classes=jnp.asarray([1, 3]))
TEXT = Conditions(
    tokens=normal(1, 2, 5, 6), mask=jnp.asarray([[True] * 5, [True, True, False, False, False]]), pooled=normal(2, 2, 7)
)
FORMS = {
    "plain": (BASE, Conditions()),
    "classes": (BASE.clone(classes=3, period_shift=1, activation="gelu_exact"), CLASSES),
    "rope": (
        BASE.clone(positions="rope", rope=Rope2D(theta=20.0), qk_norm=True, norm="rmsnorm", bias=False, mlp_width=24,
                   activation="swiglu"), Conditions()),
    "text": (BASE.clone(text=6, pooled=7, classes=3), TEXT),
    "text, rope": (BASE.clone(text=6, positions="rope"), TEXT.replace(pooled=None)),
    "beside": (BASE.clone(positions="none", channels=5, out=4), Conditions(image=normal(3, 2, 4, 8, 3))),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_numpy(form):
    agrees(reference.dit, FORMS[form][0], X, LABEL, FORMS[form][1], 5e-5)


def test_starts_at_zero():
    """adaLN-zero: the result is nothing, whatever comes, and the last layer has a gradient."""
    gradient = gradient_at_first(FORMS["classes"][0].clone(depth=1), X, CLASSES)
    assert np.abs(gradient["head"]["kernel"]).max() > 0.1
    assert not np.any(gradient["blocks"]["attention"]["query"]["kernel"])


def test_no_class_is_the_last():
    telling = Telling(16, 8, classes=3)
    p = random_of(telling, LABEL, CLASSES)

    def told(**classes):
        return telling.apply(p, LABEL, Conditions(**classes))

    np.testing.assert_array_equal(told(), told(classes=jnp.full(2, 3)))
    assert np.abs(told() - told(classes=jnp.full(2, 2))).max() > 0.1


def test_padding_is_not_read():
    """Tokens that are not there have no gradient, and are as if left out."""
    model, told = FORMS["text"]
    p = params_of(model, X, told)

    def total(tokens):
        return jnp.square(model.apply({"params": p}, X, LABEL, told.replace(tokens=tokens))).sum()

    gradient = np.abs(np.asarray(jit(jax.grad(total))(told.tokens))).max(-1)
    np.testing.assert_array_equal(gradient > 0, np.asarray(told.mask))
    short = Conditions(tokens=told.tokens[1:, :2], pooled=told.pooled[1:])
    close(forward(model, p, X[1:], LABEL[1:], short)[0], forward(model, p, X, LABEL, told)[1])


def test_dropout():
    model, p = BASE.clone(dropout=0.5), params_of(BASE, X)
    whole = forward(model, p, X, LABEL)
    np.testing.assert_array_equal(whole, forward(BASE, p, X, LABEL))
    assert np.abs(forward(model, p, X, LABEL, key=jax.random.key(1)) - whole).max() > 0.01


def test_in_bfloat16():
    agrees_in_bfloat16(FORMS["text"][0], X, TEXT)


# ---- sizes ----


@pytest.mark.parametrize(("model", "millions", "billions"), [
    (DiT.S, 32.9, 6.06), (DiT.B, 130.3, 23.01), (DiT.L, 457.8, 80.71), (DiT.XL, 674.8, 118.64),
], ids=["S", "B", "L", "XL"])  # fmt: skip
def test_sizes_of_the_paper(model, millions, billions):
    """Parameters (less the table of positions, which is none here) and multiply-adds of table 1, for patches of 2 and
    latents of 32 x 32 x 4."""
    model = model(out=8, classes=1000)
    told = (jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32))
    assert size_of(model, *told) / 1e6 == pytest.approx(millions, abs=0.06)
    assert model.flops_per_example((32, 32, 4)) / 2e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize("case", ["classes", "text"])
def test_counts_its_operations(case):
    model = DiT(out=4, width=256, depth=2, heads=4, classes=10, scan=False, dtype="float32")
    told = Conditions()
    if case == "text":
        model = model.clone(text=96, pooled=48)
        told = Conditions(tokens=jnp.zeros((4, 24, 96)), pooled=jnp.zeros((4, 48)))
    counts_its_operations(model, jnp.zeros((4, 16, 16, 4)), told)


# ---- on a mesh ----


def test_on_a_mesh_as_alone():
    """In value and gradient, with the blocks unrolled or computed again backward: which change nothing."""
    names = ("tokens", "mask", "pooled", "classes")
    model = Flat(BASE.clone(text=8, pooled=8, classes=3), names)
    inputs = (
        normal(4, 8, 4, 8, 2), jnp.linspace(0.0, 900.0, 8), normal(5, 8, 4, 8), jnp.arange(32).reshape(8, 4) % 5 < 3,
        normal(6, 8, 8), jnp.arange(8) % 4,
    )  # fmt: skip

    variables = random_of(model, *inputs)
    alone = jit(functools.partial(squares, model))(variables, *inputs)
    for change, sizes in (
        ({"scan": False}, {"data": 2, "fsdp": 2, "tensor": 2}), ({"remat": "full"}, {"fsdp": 4, "sequence": 2}),
    ):  # fmt: skip
        other = functools.partial(squares, model.clone(net=model.net.clone(**change)))
        found, split = on_mesh(other, model, variables, inputs, **sizes)
        assert split > 8
        close(found, alone, 2e-5)


# ---- mistakes ----


@pytest.mark.parametrize(("change", "shape", "words"), [
    ({"heads": 3}, (4, 8, 2), "The width 16 is not a multiple of the 3 heads."),
    ({"depth": 0}, (4, 8, 2), "out, patch, width, depth and heads of a DiT are at least 1."),
    ({"positions": "rope", "heads": 8}, (4, 8, 2),
     "Rotary rows and columns need a head size that is a multiple of 4, not 2."),
    ({"width": 18}, (4, 8, 2), "Sinusoidal rows and columns need a width that is a multiple of 4, not 18."),
    ({}, (5, 8, 2), "A picture of 5 x 8 is not made of whole patches of 2."),
    ({}, (4, 8, 3), "out = 2 is neither the picture's 3 channels nor twice as many (for a learned variance)."),
])  # fmt: skip
def test_what_does_not_fit(change, shape, words):
    refuses(BASE.clone(**change), shape, words)


def test_conditions_that_are_missing():
    model, told = FORMS["text"]
    for missing, words in (("tokens", "have no tokens"), ("pooled", "takes a pooled embedding")):
        with pytest.raises(ValueError, match=words):
            model.apply({"params": params_of(model, X, told)}, X, LABEL, told.replace(**{missing: None}))
    model, told = FORMS["beside"]
    with pytest.raises(UserError, match="A picture of 2 channels does not fit a DiT of 5."):
        model.apply({"params": params_of(model, X, told)}, X, LABEL)
