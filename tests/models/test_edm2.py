"""EDM2: magnitudes that every operation and the whole network keep, the forward pass against NumPy, meshes, sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from networks import Flat, agrees, counts_its_operations, forward, normal, params_of, refuses, squares
from towers import close, on_mesh, random_of, size_of

from jaxgen.models import edm2
from jaxgen.models.conditions import Conditions
from jaxgen.models.edm2 import EDM2

TINY = EDM2(
    out=3, width=8, multipliers=(1, 2), blocks=1, attention=(1,), head_dim=8, classes=4, label_scale=0.5, dropout=0.5
)  # fmt: skip
X = normal(0, 8, 8, 4, 3)
LABEL = jnp.array([-1.4, 0.8, 3.0, 0.0, 1.0, 2.0, -2.0, 0.3])
CLASSES = jnp.array([3, 4, 0, 1, 2, 3, 4, 0])


# ---- magnitudes ----


def size(x) -> float:
    return float(jnp.sqrt(jnp.square(x).mean()))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_sums_and_silu_keep_magnitudes(share):
    a, b = normal(0, 200, 200), normal(1, 200, 200)
    assert size(edm2.mix(a, b, share)) == pytest.approx(1, abs=0.01)
    assert size(edm2.silu(a)) == pytest.approx(1, abs=0.01)
    assert size(edm2.unit(7 * a, -1)) == pytest.approx(1, abs=0.001)
    assert size(edm2.fourier(3 * a[0], 500)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("first", "second"), [(64, 64), (96, 32)])
def test_channels_beside_each_other(first, second):
    """Each part gives its share of the square of what a layer sums, however many channels it has."""
    a, b = normal(0, 4, 8, 8, first), normal(1, 4, 8, 8, second)
    for share in (0.5, 0.3):
        both = np.square(edm2.beside(a, b, share))
        assert np.sqrt(both.mean()) == pytest.approx(1, abs=0.02)
        assert both[..., first:].sum() / both.sum() == pytest.approx(share**2 / (share**2 + (1 - share) ** 2), abs=0.02)


@pytest.mark.parametrize("kind", ["vectors", "3 x 3"])
def test_weights_keep_magnitudes(kind):
    x = normal(0, 64, 96) if kind == "vectors" else normal(0, 2, 16, 16, 96)
    layer = edm2.Weight(80, 3 if kind == "3 x 3" else 1)
    params = random_of(layer, x)
    run = jit(layer.apply)
    y = run(params, x, 1.0)
    assert size(y[:, 1:-1, 1:-1] if kind == "3 x 3" else y) == pytest.approx(1, abs=0.04)
    close(run(jax.tree.map(lambda w: 9 * w, params), x, 1.0), y, 1e-3)  # its length counts for nothing
    close(run(params, x, 0.5), 0.5 * y)


def begun(params):
    """Any weights with the gains as they are at first: the lengths of weights count for nothing."""
    return jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == "gain" else x, params)


@pytest.mark.parametrize(("way", "heads"), [("down", 0), ("up", 2)])
def test_blocks_keep_magnitudes(way, heads):
    x, told = normal(0, 4, 16, 16, 48), normal(1, 4, 32)
    block = edm2.Block(64, way, "", heads, 0.0, 0.3, "xla", "float32")
    params = begun(random_of(block, x, told))
    y = jit(block.apply)(params, x, told)
    assert size(y[:, 1:-1, 1:-1]) == pytest.approx(1, abs=0.1)
    if way == "up":
        assert jnp.abs(jit(block.apply)(params, 1e5 * x, told)).max() == 256


def test_the_network_keeps_magnitudes():
    """From the picture to what the last layer is given; the output is 0 at first."""
    model = EDM2(out=3, width=32, multipliers=(1, 2), blocks=1, attention=(1,), head_dim=32, classes=10)
    x, label = normal(0, 4, 16, 16, 3), normal(1, 4)
    params = begun(random_of(model, x, label)["params"])
    run = jit(lambda p: model.apply({"params": p}, x, label, capture_intermediates=True))
    assert not np.any(run(params)[0])
    _, kept = run({**params, "gain": jnp.ones(())})
    sizes = {}
    for path, y in jax.tree_util.tree_leaves_with_path(kept["intermediates"]):
        if len(path) == 3 and path[0].key != "time":  # a module of the network itself
            sizes[path[0].key] = size(y[:, 1:-1, 1:-1])
    assert len(sizes) == len(list(model.plan())) + 2  # blocks, and the layers at the ends
    assert all(0.8 < one < 1.2 for one in sizes.values()), sizes
    assert size(kept["intermediates"]["time"]["__call__"][0]) == pytest.approx(1, abs=0.2)


def test_stored_weights_are_normalised():
    """Every output feature's weights have unit mean square, the gains are left, and the network computes the same."""
    params = params_of(TINY, X)
    found = jit(edm2.normalised)(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if path[-1].key == "kernel":
            np.testing.assert_allclose(np.square(leaf).mean(tuple(range(leaf.ndim - 1))), 1, atol=4e-3)
    assert found["gain"] == params["gain"] and found["down_0_0"]["gain"] == params["down_0_0"]["gain"] != 0
    given = Conditions(classes=CLASSES)
    close(forward(TINY, found, X, LABEL, given), forward(TINY, params, X, LABEL, given), 3e-3)
    wrapped = edm2.normalised({"model": {**params, "in": {"kernel": None}}})  # frozen elsewhere
    assert wrapped["model"]["in"]["kernel"] is None
    np.testing.assert_allclose(wrapped["model"]["out"]["kernel"], found["out"]["kernel"], rtol=1e-5)


# ---- the same in NumPy ----


def unit(x, axis):
    return x / (np.sqrt((x**2).mean(axis, keepdims=True)) + 1e-4)


def weight(x, p, gain=1.0):
    """A place at a time."""
    kernel = p["kernel"]
    kernel = unit(kernel, tuple(range(kernel.ndim - 1))) * gain / math.sqrt(math.prod(kernel.shape[:-1]))
    if x.ndim == 1:
        return x @ kernel
    pad = len(kernel) // 2
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    return np.stack([
        np.stack([
            np.einsum("ijc,ijcf->f", x[r : r + len(kernel), c : c + len(kernel)], kernel)
            for c in range(x.shape[1] - 2 * pad)
        ])
        for r in range(x.shape[0] - 2 * pad)
    ])  # fmt: skip


def silu(x):
    return x / (1 + np.exp(-x)) / 0.596


def mix(a, b, t):
    return ((1 - t) * a + t * b) / np.hypot(1 - t, t)


def block(x, p, told, way, resample="", heads=0):
    if resample == "half":
        x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
    if resample == "double":
        x = np.kron(x, np.ones((2, 2, 1)))
    if way == "down":
        x = unit(weight(x, p["skip"]) if "skip" in p else x, -1)
    h = weight(silu(x), p["conv1"])
    h = weight(silu(h * (weight(told, p["told"], p["gain"]) + 1)), p["conv2"])
    if way == "up" and "skip" in p:
        x = weight(x, p["skip"])
    x = mix(x, h, 0.3)
    if heads:
        parts = (weight(x, p[name]).reshape(-1, heads, x.shape[-1] // heads) for name in ("query", "key", "value"))
        q, k, v = (unit(part, -1) for part in parts)
        scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]))
        out = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
        x = mix(x, weight(out, p["out"]), 0.3)
    return x


def join(a, b):
    n, m = a.shape[-1], b.shape[-1]
    return math.sqrt((n + m) / 0.5) * np.concatenate([0.5 / math.sqrt(n) * a, 0.5 / math.sqrt(m) * b], -1)


def tiny(model, p, x, label, classes):
    """The network TINY, written out."""
    state = np.random.RandomState(0)
    frequencies, phases = state.standard_normal(8), state.random_sample(8)
    time = weight(math.sqrt(2) * np.cos(2 * math.pi * (0.5 * label * frequencies + phases)), p["time"])
    told = silu(mix(time, unit(p["classes"]["kernel"], 0)[classes], 0.5))
    kept = [weight(np.concatenate([x, np.ones((*x.shape[:2], 1))], -1), p["in"])]
    kept.append(block(kept[-1], p["down_0_0"], told, "down"))
    kept.append(block(kept[-1], p["down_1_half"], told, "down", "half"))
    kept.append(block(kept[-1], p["down_1_0"], told, "down", heads=2))
    x = block(kept[-1], p["middle_0"], told, "up", heads=2)
    x = block(x, p["middle_1"], told, "up")
    for name, heads in (("up_1_0", 2), ("up_1_1", 2), ("up_0_double", 0), ("up_0_0", 0), ("up_0_1", 0)):
        if "double" in name:
            x = block(x, p[name], told, "up", "double")
        else:
            x = block(join(x, kept.pop()), p[name], told, "up", heads=heads)
    return weight(x, p["out"], p["gain"])


def test_agrees_with_numpy():
    x, label = X[:2], LABEL[:2]
    found = agrees(tiny, TINY, x, label, Conditions(classes=CLASSES[:2]), 5e-5)
    none = forward(TINY, params_of(TINY, x), x, label, Conditions(classes=jnp.full(2, 4)))
    np.testing.assert_array_equal(none[1], found[1])
    assert np.abs(none[0] - found[0]).max() > 1e-3


def test_what_else_is_told():
    model = TINY.clone(pooled=5, classes=0)
    pooled, image = normal(0, 8, 5), normal(3, 8, 8, 4, 1)
    given = Conditions(pooled=pooled, image=image)
    params = random_of(model, X, LABEL, given)["params"]
    assert params["in"]["kernel"].shape == (3, 3, 5, 8)
    found = forward(model, params, X, LABEL, given)
    close(forward(model, params, X, LABEL, given.replace(pooled=3 * pooled)), found, 1e-3)  # its direction alone
    assert np.abs(forward(model, params, X, LABEL, given.replace(pooled=-pooled)) - found).max() > 1e-2
    with pytest.raises(ValueError, match="takes a pooled embedding, and the conditions have none"):
        model.apply({"params": params}, X, LABEL, Conditions(image=image))


def test_dropout_and_no_class():
    """A key turns dropout on, and without classes the class is none, which has a number as well."""
    params, none = params_of(TINY, X), Conditions(classes=jnp.full(8, 4))
    found = forward(TINY, params, X, LABEL, key=jax.random.key(0))
    close(found, forward(TINY, params, X, LABEL, none, jax.random.key(0)))
    assert np.abs(found - forward(TINY, params, X, LABEL, none)).max() > 1e-2


# ---- sizes, counts, meshes ----


@pytest.mark.parametrize(("model", "millions"), [(EDM2.S, 280), (EDM2.XXL, 1523)])
def test_sizes_of_known_models(model, millions):
    """Those that the paper states, in millions."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 64, 64, 4), (1,))]
    assert round(size_of(model(classes=1000), *shapes) / 1e6) == millions


def test_counts_its_operations():
    model = EDM2(out=4, width=64, multipliers=(1, 2), blocks=1, attention=(1,), classes=10, dtype="float32")
    counts_its_operations(model, jnp.zeros((8, 32, 32, 4)))


def test_on_a_mesh_as_alone():
    """The gradient too; which is at right angles to every output feature's weights."""
    model, inputs = Flat(TINY.clone(width=16, multipliers=(1,), attention=(0,)), ("classes",)), (X, LABEL, CLASSES)
    run, variables = functools.partial(squares, model), random_of(model, *inputs)
    found, split = on_mesh(run, model, variables, inputs, data=2, fsdp=2, tensor=2)
    assert split > 20
    alone = jit(run)(variables, *inputs)
    close(found, alone, 1e-4)
    for w, g in zip(jax.tree.leaves(variables), jax.tree.leaves(alone[1]), strict=True):
        if w.ndim > 1:
            w, g = (np.float64(x).reshape(-1, x.shape[-1]) for x in (w, g))
            assert np.all(np.abs((w * g).sum(0)) <= 5e-3 * np.linalg.norm(w, axis=0) * np.linalg.norm(g, axis=0) + 1e-9)


@pytest.mark.parametrize(("change", "words"), [
    ({"blocks": 0}, "out, width, blocks, head_dim and the multipliers of an EDM2 are at least 1."),
    ({"multipliers": (1, 2, 2, 2)},
     "An EDM2 of 4 levels takes pictures whose sides are multiples of 8, and not 8 x 4."),
    ({"out": 5}, "out = 5 is neither the picture's 3 channels nor twice as many (for a learned variance)."),
    ({"attention": (2,)}, "There is no level 2; the levels are 0 to 1."),
    ({"head_dim": 12}, "Level 1 has 16 features, no multiple of head_dim = 12."),
])  # fmt: skip
def test_sizes_that_do_not_fit(change, words):
    refuses(TINY.clone(**change), (8, 4, 3), words)
