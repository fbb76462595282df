"""MM-DiT: the forward pass against NumPy, masks, scans, meshes, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from network_reference import waves
from networks import LABEL, Flat, agrees, counts_its_operations, expected_of, forward, normal, params_of, refuses
from reference import gelu, silu
from towers import close, on_mesh, random_of
from vision_reference import cut

from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions
from jaxgen.models.mmdit import MMDiT, Single
from jaxgen.nn.rope import RopeAxes

BASE = MMDiT(out=3, width=16, depth=2, heads=2, text=6, pooled=6, table=8, base=4)
FORMS = {
    "SD 3": BASE,
    "SD 3.5": BASE.clone(depth=3, dual=1, qk_norm=True, positions="sincos", mlp_ratio=2),
    "FLUX.1": BASE.clone(single_depth=2, positions="rope", qk_norm=True, guidance=2.0),
    "classes, no text": BASE.clone(text=0, pooled=0, classes=4, positions="rope", rope=RopeAxes((4, 4), 20.0)),
    "single blocks alone": BASE.clone(depth=0, single_depth=2, pooled=0, classes=4),
}
X, TOKENS, POOLED = normal(0, 2, 8, 12, 3), normal(1, 2, 4, 6), normal(2, 2, 6)
MASK = jnp.array([[True, True, True, False], [True, False, True, False]])


def conditions_of(model, mask=None):
    return Conditions(tokens=TOKENS if model.text else None, pooled=POOLED if model.pooled else None, mask=mask)


# ---- the same in NumPy: an example, and a position, at a time where that is simpler ----


def dense(x, p):
    ins = p["kernel"].ndim - p["bias"].ndim
    return np.tensordot(x, p["kernel"], ins) + p["bias"]


def rms(x, p):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def norm(x, shift, scale):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * (1 + scale) + shift


def two(x, p, name):
    return dense(silu(dense(x, p[f"{name}_in"])), p[f"{name}_out"])


def turn(model, x, places):
    """(L, H, D) turned: the features' pairs as complex numbers, each axis with wavelengths of its own."""
    waves = []
    for i, size in enumerate(model.rope.sizes(x.shape[-1])):
        waves += [places[:, i] * model.rope.theta ** (-2 * k / size) for k in range(size // 2)]
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.stack(waves, -1))[:, None]
    return np.concatenate([z.real, z.imag], -1)


def heads(model, x, p, places):
    parts = []
    for name in ("query", "key", "value"):
        h = dense(x, p[name]) if name in p else None
        if h is not None and name != "value":
            h = rms(h, p[f"{name}_norm"]) if model.qk_norm else h
            h = turn(model, h, places) if model.positions == "rope" else h
        parts.append(h)
    return parts


def attend(query, key, value, seen):
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(np.where(seen, scores, -np.inf))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)


def joint(model, p, x, text, told, seen, at, dual, last):
    m, c = dense(told, p["picture"]["modulation"]), dense(told, p["text"]["modulation"])
    h, t = norm(x, m[0], m[1]), norm(text, c[1], c[0]) if last else norm(text, c[0], c[1])
    q, k, v = heads(model, h, p["picture"]["attention"], at[0])
    text_q, text_k, text_v = heads(model, t, p["text"]["attention"], at[1])
    keys, values = np.concatenate([k, text_k]), np.concatenate([v, text_v])
    seen = np.concatenate([np.ones(len(x), bool), seen])

    def after(x, attended, p, m, own=None):
        x = x + m[2] * dense(attended, p["attention"]["out"])
        x = x if own is None else x + m[8] * dense(own, p["own"]["out"])
        return x + m[5] * dense(gelu(dense(norm(x, m[3], m[4]), p["mlp"]["up"])), p["mlp"]["down"])

    own = None
    if dual:
        own = attend(*heads(model, norm(x, m[6], m[7]), p["picture"]["own"], at[0]), True)
    x = after(x, attend(q, keys, values, seen), p["picture"], m, own)
    return x, text if last else after(text, attend(text_q, keys, values, seen), p["text"], c)


def single(model, p, x, told, seen, at):
    m = dense(told, p["modulation"])
    h = norm(x, m[0], m[1])
    attended = attend(*heads(model, h, p["attention"], at), seen).reshape(len(x), 1, -1)
    both = np.concatenate([attended, gelu(dense(h, p["up"]))], 1)
    return x + m[2] * dense(both, p["out"])


def mmdit(model, p, x, label, tokens=None, mask=None, pooled=None, classes=None, guidance=None):
    """(H, W, C) to (H, W, out)."""
    rows, columns, h = cut(x, model.patch)
    places = np.array([(0, r, c) for r in range(rows) for c in range(columns)])[:, -len(model.rope.sizes(8)) :]
    h = dense(h, p["patch_embedding"])
    if model.positions == "learned":
        top, left = (model.table - rows) // 2, (model.table - columns) // 2
        h = h + p["position_embedding"][top : top + rows, left : left + columns].reshape(h.shape)
    if model.positions == "sincos":
        quarter, step = model.width // 4, model.base / model.table
        for n, (row, column) in enumerate(places[:, -2:] + (np.array([model.table] * 2) - (rows, columns)) // 2):
            for k in range(quarter):
                wave = step * 10_000.0 ** (-k / quarter)
                h[n, [k, k + quarter, k + 2 * quarter, k + 3 * quarter]] += [
                    np.sin(column * wave), np.cos(column * wave), np.sin(row * wave), np.cos(row * wave)
                ]  # fmt: skip
    text, seen = p.get("text_token"), np.ones(1, bool)
    if model.text:
        text = dense(tokens, p["text_embedding"])
        seen = np.ones(len(text), bool) if mask is None else mask
    at = places, np.zeros((len(text), places.shape[1]))
    told = two(waves(label, 256), p["told"], "time")
    if model.pooled:
        told = told + two(pooled, p["told"], "pooled")
    if model.classes:
        told = told + p["told"]["classes"]["embedding"][model.classes if classes is None else classes]
    if model.guidance:
        told = told + two(waves(1000 * (model.guidance if guidance is None else guidance), 256), p, "guidance")
    told = silu(told)
    for i in range(model.depth):
        last = not model.single_depth and i == model.depth - 1
        name, n = ("last_block", None) if last else ("dual_blocks", i) if i < model.dual else (
            "joint_blocks", i - model.dual)  # fmt: skip
        layer = jax.tree.map(lambda leaf, n=n: leaf if n is None else leaf[n], p[name])
        h, text = joint(model, layer, h, text, told, seen, at, i < model.dual, last)
    both, seen = np.concatenate([text, h]), np.concatenate([seen, np.ones(len(h), bool)])
    for i in range(model.single_depth):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["single_blocks"])
        both = single(model, layer, both, told, seen, np.concatenate(at[::-1]))
    h = both[len(text) :] if model.single_depth else h
    m = dense(told, p["final_modulation"])
    h = dense(norm(h, m[1], m[0]), p["head"]).reshape(rows, columns, model.patch, model.patch, -1)
    return h.swapaxes(1, 2).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_numpy(form):
    model = FORMS[form]
    agrees(mmdit, model, X, LABEL, conditions_of(model, MASK if model.text else None), 5e-5)


def test_classes_and_guidance():
    """What is told reaches the output: class numbers, none being the last, and a guidance scale a picture."""
    model, none = FORMS["classes, no text"], Conditions()
    found = agrees(mmdit, model, X, LABEL, Conditions(classes=jnp.array([2, 4])), 5e-5)
    none = forward(model, params_of(model, X, none), X, LABEL, none)
    np.testing.assert_array_equal(found[1], none[1])
    assert np.abs(found[0] - none[0]).max() > 1e-2

    model, scales = FORMS["FLUX.1"], jnp.array([2.0, 4.5])
    given = conditions_of(model, MASK)
    params = params_of(model, X, given)
    found = forward(model, params, X, LABEL, given, guidance=scales)
    close(found, expected_of(mmdit, model, params, X, LABEL, given, guidance=scales), 5e-5)
    close(found[0], forward(model, params, X, LABEL, given)[0])


FLUX = Flat(FORMS["FLUX.1"], ("tokens", "pooled", "mask"))
INPUTS = X, LABEL, TOKENS, POOLED, MASK


def gradient_of(model):
    """Value and gradient, by the parameters and the text."""
    return jax.value_and_grad(lambda *given: jnp.square(model.apply(*given)).sum(), argnums=(0, 3))


@functools.cache
def alone():
    """The variables, and what comes of them."""
    variables = random_of(FLUX, *INPUTS)
    return variables, jit(gradient_of(FLUX))(variables, *INPUTS)


def test_hidden_tokens_have_no_gradient():
    _, (_, (_, gradient)) = alone()
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, MASK)


def test_a_picture_beside():
    model = BASE.clone(channels=5)
    given = conditions_of(model).replace(image=X[..., :2] ** 2)
    params = params_of(model, X, given)
    assert params["patch_embedding"]["kernel"].shape == (20, 16)
    found = forward(model, params, X, LABEL, given)
    other = forward(model, params, X, LABEL, given.replace(image=X[..., :2]))
    assert np.abs(found - other).max() > 1e-2
    with pytest.raises(UserError, match="A picture of 3 channels does not fit an MMDiT of 5."):
        model.apply({"params": params}, X, LABEL, conditions_of(model))


def test_a_block_begins_with_nothing():
    """It hands on what it was given."""
    x, told = normal(0, 1, 3, 8), normal(1, 1, 8)
    found, _ = jit(Single(8, 1, mlp_ratio=1).init_with_output)(jax.random.key(0), x, told)
    np.testing.assert_array_equal(found, x)


def test_scan_changes_nothing():
    model = FORMS["SD 3.5"]
    given = conditions_of(model, MASK)
    params = params_of(model, X, given)
    close(forward(model.clone(scan=False), params, X, LABEL, given), forward(model, params, X, LABEL, given))


def test_on_a_mesh_and_with_remat_as_alone():
    variables, expected = alone()
    again = FLUX.clone(net=FLUX.net.clone(remat="full"))
    found, split = on_mesh(gradient_of(again), FLUX, variables, INPUTS, fsdp=2, tensor=2, sequence=2)
    assert split > 30
    close(found, expected)


COUNTED = MMDiT(
    out=4, width=256, depth=2, heads=2, text=96, pooled=64, table=16, dual=1, dtype="float32", scan=False
)  # fmt: skip


@pytest.mark.parametrize("change", [{}, {"single_depth": 1, "guidance": 3.5, "dual": 0, "text": 0}], ids=str)
def test_counts_its_operations(change):
    model = COUNTED.clone(**change)
    told = Conditions(tokens=jnp.zeros((4, 24, 96)) if model.text else None, pooled=jnp.zeros((4, 64)))
    counts_its_operations(model, jnp.zeros((4, 16, 16, 4)), told)


@pytest.mark.parametrize(("change", "words"), [
    ({"heads": 3}, "The width 16 is not a multiple of the 3 heads."),
    ({"depth": 0}, "out, patch, width, heads, mlp_ratio and the blocks of an MMDiT are at least 1."),
    ({"pooled": -1}, "No size of an MMDiT is below 0."),
    ({"dual": 3}, "dual = 3 should be at least 0 and at most the 2 joint blocks."),
    ({"patch": 3}, "A picture of 8 x 12 is not made of whole patches of 3."),
    ({"out": 5},
     "out = 5 is neither the picture's 3 channels nor twice as many (for a learned variance)."),
    ({"table": 5}, "A picture of 8 x 12 has more than 5 patches of 2 along a side; give the network a larger table."),
    ({"positions": "rope", "rope": RopeAxes((4, 2))},
     "The rotary axes (4, 2) are not even shares of a head's 8 features."),
    ({"positions": "rope", "rope": RopeAxes((8,))}, "The rotary axes of an MMDiT are at least two: row and column."),
])  # fmt: skip
def test_sizes_that_do_not_fit(change, words):
    refuses(BASE.clone(**change), (8, 12, 3), words)
