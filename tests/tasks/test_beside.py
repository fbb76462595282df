"""Pictures beside the noisy one: masks, pictures before an edit, small ones; what the network sees of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.diffusion.paths import Flow
from jaxgen.diffusion.predictions import X0
from jaxgen.errors import UserError
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.conditions import Conditions
from jaxgen.models.dit import DiT
from jaxgen.models.mlp import MLP
from jaxgen.sampling.diffusion import Sampling, keys_of
from jaxgen.sampling.solvers import Ddim
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.tasks.base import Context
from jaxgen.tasks.beside import Before, Masked, Smaller, enlarged, reduced
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Constant
from jaxgen.training.step import Program

B = 16
NET = DiT(out=1, patch=4, width=16, depth=1, heads=2, classes=3, periods=16, kernel="xla")
KEYS = jax.random.split(jax.random.key(1), B)


def batch_of(size=B, side=8):
    rng = np.random.default_rng(0)
    image, before = rng.integers(0, 256, (2, size, side, side, 1)).astype(np.uint8)
    return {"image": image, "before": before, "label": rng.integers(0, 3, size).astype(np.int32)}


def context(train=True, size=B):
    key = jax.random.key(0)
    return Context(key, key, jnp.int32(0), jnp.arange(size), {}, None, train, size)


@functools.cache
def start(task):
    """Parameters of which every part counts."""
    params = jit(lambda key: unbox(task.init(key)))(jax.random.key(0))[0]
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def seen(task, batch, train=True):
    """What the network is told."""
    at = context(train, len(batch["image"]))
    return jax.tree.map(np.asarray, jit(lambda batch: task.told({}, batch, at, at.keys()))(batch))


# ---- masks ----


def test_masks():
    """Some of each picture is hidden, all of a tenth; each by its own key alone."""
    masks = jit(lambda keys: Masked().masks(keys, 12, 16))
    keys = jax.random.split(jax.random.key(0), 600)
    found = np.asarray(masks(keys))
    assert found.shape == (600, 12, 16, 1) and set(np.unique(found)) == {0, 1}
    share = found.mean((1, 2, 3))
    assert share.min() > 0 and 0.06 < (share == 1).mean() < 0.14 and 0.3 < share.mean() < 0.6
    np.testing.assert_array_equal(np.asarray(masks(keys[7:300]))[5], found[12])
    assert (found[:-1] != found[1:]).any((1, 2, 3)).mean() > 0.95
    none = np.asarray(jit(lambda keys: Masked(whole=0.0).masks(keys, 12, 16))(keys)).mean((1, 2, 3))
    assert none.max() < 1 or (none == 1).mean() < 0.01
    np.testing.assert_array_equal(none[share < 1], share[share < 1])


def test_a_mask_hides_and_is_told():
    task, batch = Diffusion(NET, beside=Masked()), batch_of()
    image = seen(task, batch).image
    mask, rest = image[..., :1], image[..., 1:]
    x0 = batch["image"] / np.float32(127.5) - 1
    np.testing.assert_allclose(rest, np.where(mask > 0.5, 0, x0), atol=1e-6)
    given = batch | {"mask": np.zeros((B, 8, 8, 1), np.float32)}
    given["mask"][:, 2:4, 5:] = 1
    np.testing.assert_array_equal(task.beside.given(given, KEYS)["mask"], given["mask"])
    np.testing.assert_array_equal(task.beside.given(given, KEYS)["before"], batch["before"])
    drawn = np.full((B, 8, 8, 1), 9, np.uint8)
    found = task.beside.finished(jnp.asarray(drawn), given | {"before": batch["image"]})
    np.testing.assert_array_equal(found, np.where(given["mask"] > 0, 9, batch["image"]))


# ---- edits ----


def test_what_is_dropped_of_an_edit():
    """A share loses the text, another the picture, another both, as InstructPix2Pix; in measuring none."""
    batch = batch_of(4000, 2)
    for drop, beside, shares in [
        (0.1, Before(), (0.05, 0.05, 0.05)), (0.3, Before(0.2, 0.0), (0.3, 0.2, 0.0)),
        (0.2, Before(0.2, 0.2), (0.0, 0.0, 0.2)),
    ]:  # fmt: skip
        task = Diffusion(NET, beside=beside, drop=drop)
        told = seen(task, batch)
        text, picture = told.classes == 3, (told.image == 0).all((1, 2, 3))
        found = [np.mean(text & ~picture), np.mean(picture & ~text), np.mean(text & picture)]
        np.testing.assert_allclose(found, shares, atol=0.015)
        before = batch["before"] / np.float32(127.5) - 1
        np.testing.assert_allclose(told.image[~picture], before[~picture], atol=1e-6)
    told = seen(task, batch, train=False)
    np.testing.assert_allclose(told.image, before, atol=1e-6)
    np.testing.assert_array_equal(told.classes, batch["label"])


# ---- small pictures ----


def test_small_pictures():
    batch = batch_of(side=12)
    small = reduced(batch["image"], 4)
    np.testing.assert_allclose(small[:, 1, 2], batch["image"][:, 4:8, 8:12].astype(float).mean((1, 2)), rtol=1e-5)
    told = seen(Diffusion(NET, beside=Smaller(4, 0.5)), batch, train=False).image
    np.testing.assert_allclose(told[..., 1], 0)
    np.testing.assert_allclose(told[..., :1], enlarged(small / 127.5 - 1, 4), atol=1e-5)
    flat = enlarged(np.full((1, 3, 3, 1), 0.3, np.float32), 4)
    np.testing.assert_allclose(flat, 0.3, rtol=1e-5)


def test_noise_of_small_pictures_is_told():
    """Its variance is the level's square, whatever the picture; the level is between 0 and `noise`."""
    size = 600
    batch = {"image": np.full((size, 8, 8, 1), 255, np.uint8), "label": np.zeros(size, np.int32)}
    beside = Smaller(2, 0.5)
    keys = jax.random.split(jax.random.key(0), size)
    given = beside.given(batch, keys, train=True)
    level = np.asarray(given["level"])
    assert 0 <= level.min() < 0.02 and 0.48 < level.max() < 0.5 and abs(level.mean() - 0.25) < 0.02
    x = jnp.ones((size, 4, 4, 1))
    noisy = []
    found = np.asarray(beside.seen(x, given, keys, lambda x: (noisy.append(x), x)[1]))
    np.testing.assert_allclose(found[..., 1], np.broadcast_to(level[:, None, None], (size, 8, 8)))
    np.testing.assert_array_equal(found[..., :1], noisy[0])
    one = {"level": jnp.full(size, 0.4)}
    flat = np.asarray(beside.seen(x, one, keys, lambda x: reduced(x, 2)))[..., 0]
    assert abs(flat.mean() - np.sqrt(1 - 0.16)) < 0.01
    alone = np.asarray(beside.seen(x[:4], {"level": one["level"][:4]}, keys[:4], lambda x: reduced(x, 2)))[..., 0]
    np.testing.assert_allclose(alone, flat[:4], rtol=1e-5)


# ---- latents ----


def test_latents():
    """A place of latents is new where any of its pixels is; the picture is seen as the autoencoder's means."""
    coder = Autoencoder(channels=1, latent=2, width=4, multipliers=(1, 2), blocks=1, groups=2, attention=False)
    task = Diffusion(NET.clone(out=2, patch=2), autoencoder=coder, beside=Masked())
    batch = batch_of()
    task.check(spec_of(batch))
    params, state = jit(lambda key: unbox(task.init(key)))(jax.random.key(0))
    mask = np.zeros((B, 8, 8, 1), np.float32)
    mask[:, 3, 4] = 1
    given = jit(task.beside.given)(batch | {"mask": mask}, KEYS)
    found = np.asarray(jit(task.seen_beside)(params, state, given, KEYS))
    before = np.where(mask > 0, 127.5, batch["before"])
    latents = jit(task.values)(params, state, {"image": jnp.asarray(before, jnp.float32)})
    np.testing.assert_allclose(found[..., -2:], latents, atol=1e-4)
    assert found.shape == (B, 4, 4, 3)
    assert found[..., 0].sum() == B and (found[:, 1, 2, 0] == 1).all()


# ---- learning and drawing ----


def looked(task, change):
    """Whether each channel of the input has weights that change."""
    channels = 1 + task.beside.channels(1)
    change = np.abs(np.asarray(change["network"]["patch_embedding"]["kernel"]))
    assert change.shape == (16 * channels, 16)
    return change.reshape(16, channels, 16).max((0, 2)) > 1e-6


@pytest.mark.experiments  # of another kind the step on a mesh shows it
@pytest.mark.parametrize("beside", [Before(), Smaller(2)], ids=["before", "smaller"])
def test_the_network_learns_to_look(beside):
    task = Diffusion(NET, Flow(), X0(), beside=beside)
    gradient = jit(jax.grad(lambda params: task.loss(params, batch_of(), context()).sum))(start(task))
    assert looked(task, gradient).all()


def test_same_step_on_a_mesh():
    task, batch, found = Diffusion(NET, Flow(), X0(), beside=Masked()), batch_of(), []
    for mesh in (Mesh(data=1), Mesh(data=2, fsdp=2, tensor=2)):
        sharding = Sharding(mesh.build(jax.devices()[: 1 if mesh.data == 1 else 8]), RULES)
        program = Program(task, SGD(0.1, schedule=Constant(), momentum=0.0), sharding, spec_of(batch), 1)
        state = program.init(0)
        given = jax.tree.map(lambda p, s: jax.device_put(np.asarray(p), s.sharding), start(task), state.params)
        state, metrics = program.step(state.replace(params=given), jax.device_put(batch, program.batch_shardings))
        found.append((jax.tree.map(np.asarray, state.params), float(metrics["loss"])))
    (params, loss), (others, same) = found
    assert looked(task, jax.tree.map(lambda a, b: a - np.asarray(b), params, start(task))).all()
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), others, params)


class Sees(nn.Module):
    """Makes of the picture beside it, of the class and of nothing one number each: 0.1 of the picture, 0.05 of the
    class and the picture."""

    out: int = 1
    classes: int = 3

    @nn.compact
    def __call__(self, x, label, conditions=Conditions(), key=None):
        picture = conditions.image[..., :1]
        wanted = (conditions.classes < 3)[:, None, None, None]
        return 0.01 + 0.1 * picture + jnp.where(wanted, 0.05 * picture, 0)


@pytest.mark.parametrize(("text", "image"), [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0), (3.0, 2.0)])
def test_two_scales(text, image):
    """In closed form: 0.01 + image 0.1 p + text 0.05 p."""
    task = Diffusion(Sees(), Flow(), X0(), beside=Before())
    batch = batch_of()
    sampling = Sampling(Ddim(), steps=2, guidance=text, image_guidance=image)
    found = task.sample({"network": {}}, {}, batch, KEYS, sampling)
    picture = batch["before"] / 127.5 - 1
    expected = (0.01 + image * 0.1 * picture + text * 0.05 * picture) * 127.5 + 127.5
    np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=0.6)


def test_what_is_given_is_drawn_for():
    """A mask keeps the rest of the picture; an image stands for what is not given, as in training."""
    task = Diffusion(Sees(), Flow(), X0(), beside=Masked())
    batch = batch_of()
    mask = np.zeros((B, 8, 8, 1), np.float32)
    mask[:, :3] = 1
    sampling = Sampling(Ddim(), steps=2, shape=(8, 8, 1))
    found = np.asarray(task.sample({"network": {}}, {}, batch | {"mask": mask}, KEYS, sampling))
    np.testing.assert_array_equal(found[:, 3:], batch["before"][:, 3:])
    np.testing.assert_allclose(found[:, :3], 127.5 * (1 + 0.01 + 0.1 + 0.05), atol=0.6)
    own = {"image": batch["before"], "label": batch["label"]}
    same = np.asarray(task.sample({"network": {}}, {}, own, KEYS, sampling))
    shares = [(a != b).mean() for a, b in zip(same, batch["before"], strict=True)]
    assert min(shares) > 0 and len(set(shares)) > 3  # masks of their own
    task = Diffusion(Sees(), Flow(), X0(), beside=Smaller(2))
    small = {"small": batch["image"][:, :4, :4], "label": batch["label"]}
    assert task.sample({"network": {}}, {}, small, KEYS, Sampling(Ddim(), steps=2)).shape == (B, 8, 8, 1)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        (Diffusion(NET, beside=Before()), {"before": None}, r"task.beside, Before, needs before too"),
        (Diffusion(NET, beside=Before()), {"before": (B, 4, 8, 1)}, "of 4 x 8 x 1 and its image of 8 x 8 x 1"),
        (Diffusion(NET, drop=0.0, beside=Before()), {}, "task.beside.both is at most task.drop"),
        (Diffusion(NET.clone(channels=2), beside=Masked()), {},
         "is 2, and it sees 1 channels of the noisy picture and 2 of task.beside; it should be 3, or 0"),
        (Diffusion(NET.clone(channels=3)), {}, "none beside them .* it should be 1, or 0"),
        (Diffusion(NET, beside=Smaller(3)), {}, "8 x 8 cannot be reduced by task.beside.factor, 3"),
        (Diffusion(MLP(), beside=Masked()), {"points": (B, 2), "image": None}, "and the data has points"),
    ],
)  # fmt: skip
def test_mistakes(task, change, said):
    spec = spec_of(batch_of())
    for name, shape in change.items():
        spec.pop(name) if shape is None else spec.update({name: jax.ShapeDtypeStruct(shape, np.uint8)})
    with pytest.raises(UserError, match=said):
        task.check(spec)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Masked(whole=2.0), "whole is a share"), (lambda: Masked(boxes=0), "are at least 1"),
        (lambda: Before(0.1, 0.2), "task.beside.both from 0 to that"), (lambda: Smaller(1), "factor is at least 2"),
        (lambda: Smaller(2, 1.0), "noise is at least 0"),
        (lambda: Sampling(image_guidance=float("nan")), "guidance scale is nan"),
        (lambda: Before().given({}, KEYS), "the conditions have no before"),
    ],
)  # fmt: skip
def test_what_cannot_be(made, said):
    with pytest.raises(UserError, match=said):
        made()


def test_guidance_of_a_picture_that_was_always_there():
    task = Diffusion(Sees(), Flow(), X0(), beside=Masked())
    with pytest.raises(UserError, match="with and without a picture"):
        task.sample({"network": {}}, {}, batch_of(), keys_of(0, jnp.arange(B)), Sampling(image_guidance=2.0))


def test_flops_count_what_is_beside():
    spec = spec_of(batch_of())
    more = Diffusion(NET, beside=Masked()).flops(spec) - Diffusion(NET).flops(spec)
    assert more == 3 * B * 2 * 4 * 16 * 2 * 16  # 4 patches of 16 pixels, 2 channels, width 16
