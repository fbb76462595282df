"""Each optimizer against a float64 NumPy reference written from its paper, and the layout of its state."""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.errors import UserError
from jaxgen.training import parameters
from jaxgen.training.optimizers import SGD, Adafactor, AdamW, Lion, Muon, Optimizer, state_axes, updates
from jaxgen.training.schedules import Constant, Cosine

STEPS = 7
AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "blocks": {
        "query": {"kernel": ("layers", "embed", "heads", "head_dim"), "bias": ("layers", "heads", "head_dim")},
        "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
        "up": {"kernel": ("layers", "embed", "mlp")},
        "norm": {"scale": ("layers", "norm")},
    },
    "head": {"kernel": ("embed", "vocab")},
}
SHAPES = {
    "embed": {"embedding": (11, 6)},
    "blocks": {
        "query": {"kernel": (3, 6, 2, 4), "bias": (3, 2, 4)},
        "out": {"kernel": (3, 2, 4, 6)},
        "up": {"kernel": (3, 6, 10)},
        "norm": {"scale": (3, 6)},
    },
    "head": {"kernel": (6, 11)},
}


def tree(seed: int, shapes=SHAPES, scale: float = 1.0):
    random = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: (scale * random.normal(size=s)).astype(np.float32), shapes, is_leaf=is_shape)


def gradients(n: int, shapes=SHAPES, scale: float = 0.3):
    return [tree(100 + i, shapes, scale) for i in range(n)]


def flat(x) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(x)
    return {parameters.join(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def run(optimizer: Optimizer, params, grads, axes=AXES):
    """The parameters after each of the gradients, by path."""
    transform = optimizer.transform(params, STEPS, axes)
    params, state = jax.tree.map(jnp.asarray, params), jax.jit(transform.init)(params)

    @jax.jit
    def step(params, state, grad):
        change, state = transform.update(grad, state, params)
        return optax.apply_updates(params, change), state

    seen = []
    for grad in grads:
        params, state = step(params, state, grad)
        seen.append(flat(params))
    assert int(updates(state)) == len(grads)
    return seen


def reference(optimizer: Optimizer, params, grads, direction, peak=None):
    """The same from `direction(path, gradient, parameter, memory, t)`, t from 1: clipping, weight decay and the rate as
    the base class states them."""
    params, memory, seen = flat(params), {}, []
    for n, grad in enumerate(grads):
        grad = flat(grad)
        norm = math.sqrt(sum(np.square(g).sum() for g in grad.values()))
        if optimizer.clip:  # Pascanu et al. 2013, algorithm 1
            grad = {path: g * min(1.0, optimizer.clip / norm) for path, g in grad.items()}
        for path, p in params.items():
            d = direction(path, grad[path], p, memory.setdefault(path, {}), n + 1)
            if path.endswith(("kernel", "embedding")):
                d = d + optimizer.weight_decay * p
            cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (n - 2) / (STEPS - 2)))
            rate = (n + 1) / 3 if n < 2 else cosine
            params = params | {path: p - (peak(path) if peak else optimizer.learning_rate) * rate * d}
        seen.append(params)
    return seen


def compare(ours, theirs, params, tolerance):
    """That the change since the start agrees, relative to the largest change of each parameter."""
    start = flat(params)
    for a, b in zip(ours, theirs, strict=True):
        for path in b:
            change = np.abs(b[path] - start[path]).max()
            np.testing.assert_allclose(a[path], b[path], rtol=0, atol=tolerance * change + 1e-6, err_msg=path)


def adam(b1, b2, eps):
    """Kingma & Ba 2015, algorithm 1."""

    def direction(path, g, p, m, t):
        m["m"] = b1 * m.get("m", 0.0) + (1 - b1) * g
        m["v"] = b2 * m.get("v", 0.0) + (1 - b2) * g**2
        return m["m"] / (1 - b1**t) / (np.sqrt(m["v"] / (1 - b2**t)) + eps)

    return direction


def lion(b1, b2):
    """Chen et al. 2023, algorithm 2."""

    def direction(path, g, p, m, t):
        c = b1 * m.get("m", 0.0) + (1 - b1) * g
        m["m"] = b2 * m.get("m", 0.0) + (1 - b2) * g
        return np.sign(c)

    return direction


def sgd(momentum, nesterov):
    """Sutskever et al. 2013, eqs. 1 to 4, with the velocity in units of the gradient."""

    def direction(path, g, p, m, t):
        m["v"] = momentum * m.get("v", 0.0) + g
        return g + momentum * m["v"] if nesterov else m["v"]

    return direction


def adafactor(decay_rate=0.8, eps1=1e-30, eps2=1e-3, d=1.0, factor_from=4):
    """Shazeer & Stern 2018, algorithm 4 where a matrix is large enough and 5 elsewhere, for one layer at a time."""

    def rms(x):
        return np.sqrt(np.mean(x**2))

    def one(g, p, m, t):
        b2 = 1 - t**-decay_rate
        sizes = sorted(range(g.ndim), key=lambda i: g.shape[i])
        if g.ndim >= 2 and g.shape[sizes[-2]] >= factor_from:
            row, col = sizes[-2], sizes[-1]
            m["r"] = b2 * m.get("r", 0.0) + (1 - b2) * (g**2 + eps1).sum(col, keepdims=True)
            m["c"] = b2 * m.get("c", 0.0) + (1 - b2) * (g**2 + eps1).sum(row, keepdims=True)
            v = m["r"] * m["c"] / m["r"].sum(row, keepdims=True)
        else:
            m["v"] = v = b2 * m.get("v", 0.0) + (1 - b2) * (g**2 + eps1)
        u = g / np.sqrt(v)
        return u / max(1.0, rms(u) / d) * max(eps2, rms(p))

    def direction(path, g, p, m, t):
        if not path.startswith("blocks/"):
            return one(g, p, m, t)
        return np.stack([one(g[i], p[i], m.setdefault(i, {}), t) for i in range(len(g))])

    return direction


def newton_schulz(x, iterations):
    """Jordan et al. 2024: a X + (b A + c A^2) X with A = X X^T, from X of Frobenius norm 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x, flip = x / np.linalg.norm(x), x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


MATRIX = {"blocks/query/kernel": (6, 8), "blocks/out/kernel": (8, 6), "blocks/up/kernel": (6, 10)}
"""Inputs and outputs of each layer's matrices."""


def muon(momentum, nesterov, iterations, rms, fallback):
    """Jordan et al. 2024 (with the momentum corrected for its start, as optax has it) on each layer's matrix; the
    scale is theirs or that of Liu et al. 2025."""

    def direction(path, g, p, m, t):
        if path not in MATRIX:
            return fallback(path, g, p, m, t)
        m["m"] = momentum * m.get("m", 0.0) + (1 - momentum) * g
        if nesterov:
            u = momentum * m["m"] / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
        else:
            u = m["m"] / (1 - momentum**t)
        inputs, outputs = MATRIX[path]
        scale = rms * math.sqrt(max(inputs, outputs)) if rms else math.sqrt(max(1.0, outputs / inputs))
        layers = [scale * newton_schulz(x.reshape(inputs, outputs), iterations) for x in u]
        return np.stack(layers).reshape(g.shape)

    return direction


SCHEDULE = Cosine(warmup=2, final=0.1)
CASES = {
    "adamw": (AdamW(schedule=SCHEDULE, learning_rate=0.01), adam(0.9, 0.95, 1e-8)),
    "adamw, other": (
        AdamW(schedule=SCHEDULE, learning_rate=0.01, b1=0.0, b2=0.99, eps=1e-3, clip=0.0),
        adam(0.0, 0.99, 1e-3),
    ),
    "lion": (Lion(schedule=SCHEDULE, learning_rate=0.01), lion(0.9, 0.99)),
    "sgd": (SGD(schedule=SCHEDULE, weight_decay=0.1, clip=0.5), sgd(0.9, False)),
    "sgd, plain": (SGD(schedule=SCHEDULE, momentum=0.0), sgd(0.0, False)),
    "nesterov": (SGD(schedule=SCHEDULE, nesterov=True, momentum=0.8), sgd(0.8, True)),
    "adafactor": (Adafactor(schedule=SCHEDULE, min_factored=4, weight_decay=0.1), adafactor()),
}


@pytest.mark.parametrize("name", CASES)
def test_first_updates_are_the_papers(name):
    optimizer, direction = CASES[name]
    params, grads = tree(0), gradients(5)
    compare(run(optimizer, params, grads), reference(optimizer, params, grads, direction), params, 2e-5)


@pytest.mark.parametrize("rms, nesterov", [(0.0, True), (0.2, True), (0.0, False)])
def test_muon_orthogonalises_each_layers_matrix(rms, nesterov):
    optimizer = Muon(schedule=SCHEDULE, rms=rms, nesterov=nesterov, weight_decay=0.1)
    params, grads = tree(0), gradients(5)
    direction = muon(0.95, nesterov, 5, rms, adam(0.9, 0.95, 1e-8))
    peak = lambda path: 0.02 if path in MATRIX else 3e-4  # noqa: E731
    compare(run(optimizer, params, grads), reference(optimizer, params, grads, direction, peak), params, 2e-4)


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(min_factored=4, momentum=0.9), Muon()])
def test_a_stack_of_layers_is_trained_as_its_layers(optimizer):
    optimizer = dataclasses.replace(optimizer, weight_decay=0.1)

    def unstack(x):
        layers = {f"block_{i}": jax.tree.map(operator.itemgetter(i), x["blocks"]) for i in range(3)}
        return {key: value for key, value in x.items() if key != "blocks"} | layers

    names = {f"block_{i}": jax.tree.map(lambda n: n[1:], AXES["blocks"], is_leaf=lambda n: type(n) is tuple)
             for i in range(3)}  # fmt: skip
    names |= {key: value for key, value in AXES.items() if key != "blocks"}
    params, grads = tree(0), gradients(3)
    stacked = run(optimizer, params, grads)[-1]
    single = run(optimizer, unstack(params), [unstack(g) for g in grads], names)[-1]
    for path, leaf in single.items():
        if path.startswith("block_"):
            here = stacked[path.replace(path.split("/")[0], "blocks")][int(path[6])]
        else:
            here = stacked[path]
        np.testing.assert_allclose(here, leaf, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("optimizer", [AdamW(), Lion(), SGD(), Adafactor(min_factored=4), Muon()])
def test_what_is_frozen_has_no_state_and_does_not_move(optimizer):
    params = tree(0)
    trainable, frozen = parameters.partition(params, ("query", "embed$|norm"))
    grads, _ = parameters.partition(gradients(1)[0], ("query", "embed$|norm"))
    transform = optimizer.transform(trainable, STEPS, AXES)
    state = transform.init(trainable)
    held = [parameters.join(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("query" in path or "norm" in path for path in held)
    assert any(path.endswith("out/kernel") for path in held)
    change, _ = jax.jit(transform.update)(grads, state, trainable)
    after = flat(parameters.merge(optax.apply_updates(trainable, change), frozen))
    for path, leaf in flat(params).items():
        assert (after[path] == leaf).all() == ("query" in path or "norm" in path), path


def test_all_leaves_count_in_the_norm_that_is_clipped():
    params = {"a": {"kernel": np.zeros(3, np.float32)}, "b": {"kernel": np.zeros(3, np.float32)}}
    grads = {"a": {"kernel": np.full(3, 3.0, np.float32)}, "b": {"kernel": np.full(3, 4.0, np.float32)}}
    optimizer = SGD(learning_rate=1.0, schedule=Constant(), momentum=0.0, clip=5.0)
    after = run(optimizer, params, [grads], axes=None)[0]
    np.testing.assert_allclose(after["a/kernel"], np.full(3, -3 / math.sqrt(3)), rtol=1e-6)
    np.testing.assert_allclose(after["b/kernel"], np.full(3, -4 / math.sqrt(3)), rtol=1e-6)
    after = run(dataclasses.replace(optimizer, clip=9.0), params, [grads], axes=None)[0]
    np.testing.assert_allclose(after["a/kernel"], np.full(3, -3.0), rtol=1e-6)


def test_decay_patterns_replace_the_rule():
    params = tree(0)
    zero = jax.tree.map(np.zeros_like, params)
    optimizer = SGD(learning_rate=0.5, schedule=Constant(), weight_decay=0.1)

    def moved(decay):
        after = run(dataclasses.replace(optimizer, decay=decay), params, [zero])[0]
        return {path for path, leaf in flat(params).items() if (after[path] != leaf).any()}

    matrices = {path for path in flat(params) if path.endswith(("kernel", "embedding"))}
    assert moved(()) == matrices
    assert moved(("norm/scale$", "^head")) == {"blocks/norm/scale", "head/kernel"}
    after = run(optimizer, params, [zero])[0]
    np.testing.assert_allclose(after["head/kernel"], 0.95 * params["head"]["kernel"], rtol=1e-6)
    # A model with no such names has nothing to decay, and that is no error.
    bare = {"w": np.ones(2, np.float32)}
    assert (run(optimizer, bare, [{"w": np.zeros(2, np.float32)}], axes=None)[0]["w"] == 1).all()


BIG = {
    "blocks": {
        "query": {"kernel": (2, 512, 8, 64)},
        "out": {"kernel": (2, 8, 64, 512)},
        "up": {"kernel": (2, 512, 1024)},
        "square": {"kernel": (2, 512, 512)},
        "norm": {"scale": (2, 512)},
    },
    "embed": {"embedding": (1024, 512)},
    "head": {"kernel": (512, 1024), "square": {"kernel": (512, 512)}},
}
BIG_AXES = {
    "blocks": {
        "query": {"kernel": ("layers", "embed", "heads", "head_dim")},
        "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
        "up": {"kernel": ("layers", "embed", "mlp")},
        "square": {"kernel": ("layers", "embed", "mlp")},
        "norm": {"scale": ("layers", "norm")},
    },
    "embed": {"embedding": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab"), "square": {"kernel": ("embed", "mlp")}},
}
ALL = [AdamW(), Lion(), Muon(), SGD(), Adafactor(momentum=0.9, min_factored=64), Adafactor()]


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_state_is_laid_out_as_its_parameter(optimizer):
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), BIG, is_leaf=lambda x: isinstance(x, tuple))
    state = jax.eval_shape(optimizer.transform(params, STEPS, BIG_AXES).init, params)
    axes = state_axes(state, BIG_AXES, params)
    assert jax.tree.structure(axes) == jax.tree.structure(state)
    shapes = {parameters.join(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    is_names = lambda x: type(x) is tuple and bool(x) and all(isinstance(n, str) for n in x)  # noqa: E731
    names = {
        parameters.join(path): x for path, x in jax.tree_util.tree_leaves_with_path(BIG_AXES, is_leaf=is_names)
    }
    large = 0
    for (path, leaf), here in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(axes), strict=True
    ):
        path = parameters.join(path)
        assert len(here) == leaf.ndim
        owner = max((n for n in shapes if path.endswith("/" + n)), key=len, default=None)
        if owner is not None and leaf.shape == shapes[owner]:
            assert here == names[owner], path
            large += leaf.size * 4 >= 2**20
        elif leaf.size * 4 >= 2**20:
            raise AssertionError(f"{path} {leaf.shape} is large and mirrors no parameter")
    if not isinstance(optimizer, Adafactor) or optimizer.momentum:
        moments = 2 if isinstance(optimizer, AdamW) else 1
        whole = sum(math.prod(s) * 4 >= 2**20 for s in shapes.values()) * moments
        adam_twice = 2 if isinstance(optimizer, Muon) else 0  # embedding and head have two moments
        assert large == whole + adam_twice


def test_adafactors_factors_keep_the_names_of_the_axes_they_have():
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), BIG, is_leaf=lambda x: isinstance(x, tuple))
    state = jax.eval_shape(Adafactor(min_factored=64).transform(params, STEPS, BIG_AXES).init, params)
    axes = jax.tree_util.tree_leaves_with_path(state_axes(state, BIG_AXES, params))
    names = {parameters.join(path): tuple(leaf) for path, leaf in axes}
    shapes = {parameters.join(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(state)}

    def factor(kind, path):
        found = [n for n in names if f"/{kind}/{path}" in n]
        assert len(found) == 1
        return names[found[0]], shapes[found[0]]

    assert factor("v_row", "blocks/query/kernel") == (("layers", "heads", "head_dim"), (2, 8, 64))
    assert factor("v_col", "blocks/query/kernel") == (("layers", "embed", "heads"), (2, 512, 8))
    assert factor("v_row", "blocks/up/kernel") == (("layers", "embed"), (2, 512))
    assert factor("v_col", "blocks/up/kernel") == (("layers", "mlp"), (2, 1024))
    assert factor("v_row", "blocks/square/kernel") == (("layers", "embed"), (2, 512))
    assert factor("v_col", "blocks/square/kernel") == (("layers", "mlp"), (2, 512))
    assert factor("v_row", "embed/embedding") == (("embed",), (512,))
    assert factor("v_col", "embed/embedding") == (("vocab",), (1024,))
    assert factor("v_row", "head/square/kernel") == (("embed",), (512,))
    assert factor("v_col", "head/square/kernel") == (("mlp",), (512,))
    assert factor("v", "head/square/kernel") == ((None,), (1,))
    assert factor("v", "blocks/norm/scale") == (("layers", "norm"), (2, 512))


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(min_factored=4), Muon()], ids=lambda o: type(o).__name__)
def test_sharded_gradients_give_the_same_updates(optimizer):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    shapes = {"blocks": {"up": {"kernel": (3, 8, 16)}, "norm": {"scale": (3, 8)}}, "head": {"kernel": (8, 24)}}
    axes = {
        "blocks": {"up": {"kernel": ("layers", "embed", "mlp")}, "norm": {"scale": ("layers", "norm")}},
        "head": {"kernel": ("embed", "vocab")},
    }
    params, grads = tree(0, shapes), gradients(3, shapes, scale=2.0)
    whole = run(optimizer, params, grads, axes)[-1]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    rules = {"embed": "fsdp", "mlp": "tensor", "vocab": "tensor", "norm": None, "layers": None, None: None}

    def shard(x, names):
        def one(leaf, n):
            return NamedSharding(mesh, PartitionSpec(*(rules[i] for i in n)))
        return jax.tree.map(one, x, names)

    transform = optimizer.transform(params, STEPS, axes)
    layout = shard(params, axes)
    shapes_ = jax.eval_shape(transform.init, params)
    state_layout = shard(shapes_, state_axes(shapes_, axes, params))
    params = jax.device_put(params, layout)
    state = jax.jit(transform.init, out_shardings=state_layout)(params)

    def step(params, state, grad):
        change, state = transform.update(grad, state, params)
        return optax.apply_updates(params, change), state

    step = jax.jit(step, out_shardings=(layout, state_layout))
    for grad in grads:
        params, state = step(params, state, jax.device_put(grad, layout))
    for path, leaf in flat(params).items():
        np.testing.assert_allclose(leaf, whole[path], rtol=0, atol=2e-6, err_msg=path)


def test_the_rate_is_the_schedules_and_follows_the_count():
    optimizer = AdamW(learning_rate=2.0, schedule=Cosine(warmup=1, final=0.5))
    rates = [float(jax.jit(optimizer.rate, static_argnums=1)(step, 3)) for step in range(5)]
    np.testing.assert_allclose(rates, [1.0, 2.0, 1.5, 1.0, 1.0], rtol=1e-6)


def test_moments_in_bfloat16():
    params = tree(0)
    for optimizer in (AdamW(), Lion(), Muon(), SGD(), Adafactor(momentum=0.9)):
        optimizer = dataclasses.replace(optimizer, moment_dtype="bfloat16")
        transform = optimizer.transform(params, STEPS, AXES)
        state = jax.eval_shape(transform.init, params)
        change, after = jax.eval_shape(transform.update, params, state, params)
        types = [x.dtype for x in jax.tree.leaves(state)]
        assert jnp.bfloat16 in types, type(optimizer)
        assert [x.dtype for x in jax.tree.leaves(after)] == types, type(optimizer)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(change)), type(optimizer)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: AdamW(decay=("norm/scal$",)).transform(p, 1),
         "'norm/scal\\$' of optimizer.decay matches no parameter; the nearest is 'blocks/norm/scale'"),
        (lambda p: Muon(adam=("quary",)).transform(p, 1, AXES), "'quary' of optimizer.adam .* 'blocks/query/"),
        (lambda p: AdamW().transform(parameters.partition(p, (".",))[0], 1), "optimizer.freeze leaves no parameter"),
        (lambda p: Muon().transform({"scale": np.ones(2)}, 1, {"scale": ("norm",)}), "Muon found no matrix"),
        (lambda p: AdamW(learning_rate=-1.0), "optimizer.learning_rate is 0 or more, not -1.0"),
        (lambda p: AdamW(learning_rate=math.nan), "optimizer.learning_rate is 0 or more, not nan"),
        (lambda p: AdamW(b2=1.0), "optimizer.b2 is at least 0 and below 1, not 1.0"),
    ],
)  # fmt: skip
def test_what_a_person_gets_wrong_is_told(make, words):
    with pytest.raises(UserError, match=words):
        make(tree(0))


def test_a_dtype_that_is_none_of_ours_is_told():
    with pytest.raises(Exception, match="float16"):  # by the run-time type check instead, where that is on
        AdamW(moment_dtype="float16")


@pytest.mark.parametrize(
    "shape, names, expected",
    [
        ((3, 6, 8), ("layers", "embed", "mlp"), ((1,), (2,))),
        ((3, 8, 6), ("layers", "mlp", "embed"), ((1,), (2,))),
        ((3, 6, 2, 4), ("layers", "embed", "heads", "head_dim"), ((1,), (2, 3))),
        ((3, 6, 2, 4), ("layers", "embed", "kv_heads", "head_dim"), ((1,), (2, 3))),
        ((3, 2, 4, 6), ("layers", "heads", "head_dim", "embed"), ((1, 2), (3,))),
        ((3, 5, 6, 8), ("layers", "expert", "embed", "mlp"), ((2,), (3,))),
        ((3, 3, 16, 32), (None, None, None, None), ((0, 1, 2), (3,))),
        ((6, 8), ("embed", "mlp"), ((0,), (1,))),
        ((6, 8), ("embed", "vocab"), "adam"),
        ((3, 6), ("layers", "embed"), "adam"),
        ((6,), ("embed",), "adam"),
    ],
)
def test_what_muon_takes_for_a_matrix(shape, names, expected):
    params = {"a": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    assert Muon()._matrices(params, {"a": {"kernel": names}})["a"]["kernel"] == expected


def test_muon_without_names_takes_plain_matrices_only():
    plain = {"up": {"kernel": np.ones((3, 4), np.float32)}, "bias": np.ones(4, np.float32)}
    run(Muon(), plain, [plain], axes=None)
    with pytest.raises(ValueError, match="'blocks/out/kernel' has 4 axes: Muon needs their logical names"):
        Muon().transform(tree(0), STEPS)
