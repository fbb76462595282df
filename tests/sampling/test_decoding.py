"""Text decoding against whole forward passes, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.models.gpt import GPT
from jaxgen.sampling import text
from jaxgen.sampling.text import Sampling, draw, generate
from jaxgen.sharding import RULES, Mesh, Sharding, unbox

MODEL = GPT(
    vocab_size=24, depth=2, width=16, heads=2, kv_heads=2, mlp_width=16, max_length=16, norm="rmsnorm", bias=False,
    windows=(5, 0),
)  # fmt: skip
NEW = 6
PROMPTS = jax.random.randint(jax.random.key(0), (3, 5), 0, 24)
LENGTHS = jnp.array([5, 2, 3])


def random_params():
    shapes = unbox(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(random.normal(0, 0.5, s.shape), jnp.float32), shapes)


PARAMS = random_params()


@jit
def all_logits(tokens):
    return MODEL.apply({"params": PARAMS}, tokens)


def sample(prompts=PROMPTS, lengths=LENGTHS, temperature=1.0, top_p=0.9, seed=0, **options):
    key = jax.random.key(seed)
    return np.asarray(
        generate(MODEL, PARAMS, prompts, lengths, key, jnp.float32(temperature), jnp.float32(top_p), NEW, **options)
    )


def test_greedy_is_the_argmax_of_whole_forward_passes():
    """Whatever stands in the padding of the shorter prompts."""
    found = sample(temperature=0.0)
    for row, length, new in zip(np.asarray(PROMPTS), LENGTHS.tolist(), found, strict=True):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, :length] = row[:length]
        for n in range(NEW):
            logits = all_logits(jnp.asarray(tokens))[0, length + n - 1]
            tokens[0, length + n] = jnp.argmax(logits)
        np.testing.assert_array_equal(new, tokens[0, length : length + NEW])
    other = PROMPTS.at[1, 2:].set(7).at[2, 3:].set(9)
    np.testing.assert_array_equal(sample(other, temperature=0.0), found)


def test_an_example_is_the_same_alone_and_in_a_batch():
    """Of prompts of other lengths, and padded further."""
    found = sample()
    assert len({tuple(row) for row in found.tolist()}) == 3
    wider = jnp.full((3, 8), 11, jnp.int32).at[:, :5].set(PROMPTS)
    for i in range(3):
        alone = sample(wider[i : i + 1], LENGTHS[i : i + 1], index=jnp.array([i]))
        np.testing.assert_array_equal(alone[0], found[i])


def test_equal_prompts_draw_differently_and_a_seed_repeats():
    prompts = jnp.broadcast_to(PROMPTS[:1], (3, 5))
    found = sample(prompts, jnp.array([5, 5, 5]))
    assert len({tuple(row) for row in found.tolist()}) == 3
    np.testing.assert_array_equal(sample(prompts, jnp.array([5, 5, 5])), found)
    assert (sample(prompts, jnp.array([5, 5, 5]), seed=1) != found).any()


def test_stop():
    """What follows the stop token is the stop token; what comes before is as without."""
    free = sample()
    stop = int(free[0, 2])
    found = sample(stop=jnp.int32(stop))
    for with_stop, without in zip(found.tolist(), free.tolist(), strict=True):
        end = without.index(stop) if stop in without else NEW
        assert with_stop == without[:end] + [stop] * (NEW - end)
    assert found[0].tolist()[2:] == [stop] * 4


def test_sweeping_compiles_nothing():
    sample()
    before = text._generate._cache_size()
    for temperature, top_p, seed in ((0.0, 1.0, 0), (0.5, 0.3, 1), (2.0, 0.99, 2)):
        sample(temperature=temperature, top_p=top_p, seed=seed, stop=jnp.int32(seed))
    assert text._generate._cache_size() == before
    assert all(x.shape == () for x in Sampling(0.3, 0.4).arrays())


def test_on_a_mesh_as_on_one_device():
    """A batch that the mesh does not divide, one token at a time over a split sequence; and compiled for the mesh."""
    found, before = sample(), text._generate._cache_size()
    with Sharding(Mesh(fsdp=2, tensor=2, sequence=2).build(), RULES).use():
        np.testing.assert_array_equal(sample(), found)
    assert text._generate._cache_size() == before + 1
    np.testing.assert_array_equal(sample(), found)
    assert text._generate._cache_size() == before + 1


def test_more_positions_than_were_learned():
    with pytest.raises(UserError, match="Prompts of 12 and 6 new tokens take 17 positions, and the model has 16"):
        sample(jnp.zeros((1, 12), jnp.int32), jnp.array([1]))


# ---- one draw ----

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


def drawn(temperature, top_p, number=4000):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (number, 5))
    keys = jax.random.split(jax.random.key(0), number)
    tokens = jax.jit(draw)(logits, keys, jnp.float32(temperature), jnp.float32(top_p))
    return np.bincount(np.asarray(tokens), minlength=5) / number


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3, 4]), (0.96, [0, 1, 2, 3, 4]), (0.94, [1, 2, 3, 4]), (0.84, [1, 3, 4]), (0.66, [1, 3, 4]),
     (0.64, [1, 3]), (0.41, [1, 3]), (0.39, [1]), (1e-6, [1]), (0.0, [1])],
)  # fmt: skip
def test_top_p_keeps_the_nucleus(top_p, kept):
    """The fewest tokens that have this much probability, and their proportions."""
    expected = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0)
    np.testing.assert_allclose(drawn(1.0, top_p), expected / expected.sum(), atol=0.03)
    assert ((drawn(1.0, top_p) > 0) == (expected > 0)).all()


def test_temperature():
    expected = PROBABILITIES ** (1 / 0.5)
    np.testing.assert_allclose(drawn(0.5, 1.0), expected / expected.sum(), atol=0.03)
    assert drawn(0.0, 1.0)[1] == 1.0
