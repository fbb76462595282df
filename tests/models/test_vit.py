"""ViT: the forward pass against NumPy, pictures of any shape, patch dropout, sizes of the known models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_reference as reference
from jax import jit
from towers import close, float64, on_mesh, random_of, shapes_of, size_of

from jaxgen.errors import UserError
from jaxgen.models.vit import ViT
from jaxgen.nn.patches import Patches, grid, patchify
from jaxgen.nn.rope import Rope2D
from jaxgen.sharding import RULES, Mesh, Sharding

BASE = ViT(patch=4, width=16, depth=2, heads=2, image_size=16, out=5)
FORMS = {
    "class": BASE,
    "clip": BASE.clone(
        pre_norm=True, patch_bias=False, head_bias=False, activation="quick_gelu", norm_epsilon=1e-3, mlp_width=24
    ),
    "siglip": BASE.clone(pool="attention", out=0, mlp_width=24),
    "siglip with registers, exact gelu": BASE.clone(pool="attention", registers=2, activation="gelu_exact"),
    "rope": BASE.clone(positions="rope", pool="mean", registers=3, rope=Rope2D(theta=20.0), qk_norm=True),
    "rope, class": BASE.clone(positions="rope", registers=1, norm="rmsnorm", activation="swiglu", bias=False),
    "sincos": BASE.clone(positions="sincos", pool="mean"),
    "no positions": BASE.clone(positions="none", pool="mean"),
    "class and registers": BASE.clone(registers=2),
    "norm of the mean": BASE.clone(pool="mean", norm_pooled=True),
}
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


@functools.cache
def params_of(model):
    return random_of(model, IMAGES)["params"]


@functools.partial(jit, static_argnums=(0, 3))
def forward(model, params, image, method="__call__", key=None):
    return model.apply({"params": params}, image, key=key, method=method)


def expected_of(model, images, result=1):
    params = float64(params_of(model))
    cut = [reference.cut(np.float64(image), model.patch) for image in images]
    return np.stack([reference.vit(model, params, patches, rows, columns)[result] for rows, columns, patches in cut])


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_numpy(form):
    model = FORMS[form]
    expected = expected_of(model, IMAGES)
    assert expected.std() > 0.1
    close(forward(model, params_of(model), IMAGES), expected, 5e-5)


@pytest.mark.parametrize("form", ["class", "sincos"])
def test_another_size_of_picture(form):
    """Taller and narrower than the model's own: the learned table is resized."""
    image = jax.random.normal(jax.random.key(1), (2, 29, 13, 3))
    close(forward(FORMS[form], params_of(FORMS[form]), image), expected_of(FORMS[form], image), 5e-5)


def naflex(images, places, patch=4):
    """Pictures of different shapes as `Patches`, with rubbish in the padding."""
    values = np.full((len(images), places, patch**2 * 3), 7.0, np.float32)
    at, mask = np.full((len(images), places, 2), 3, np.int32), np.zeros((len(images), places), bool)
    for i, image in enumerate(images):
        rows, columns, cut = reference.cut(np.asarray(image), patch)
        values[i, : len(cut)], at[i, : len(cut)], mask[i, : len(cut)] = cut, grid(rows, columns)[0], True
    return Patches(*map(jnp.asarray, (values, at, mask)))


MIXED = [jax.random.normal(jax.random.key(2), (20, 12, 3)), jax.random.normal(jax.random.key(3), (8, 36, 3))]


def apply(model, image, key=None, **options):
    return model.apply({"params": params_of(model)}, image, key=key, **options)


@pytest.mark.parametrize("form", ["class", "siglip with registers, exact gelu", "rope"])
def test_pictures_of_any_shape(form):
    """In one compiled shape, each as alone, and whatever stands in the padding."""
    model = FORMS[form]
    patches, wide = (naflex(MIXED, places) for places in (20, 24))
    expected = np.concatenate([expected_of(model, [image]) for image in MIXED])
    found = forward(model, params_of(model), patches)
    close(found, expected, 5e-5)
    close(forward(model, params_of(model), wide), expected, 5e-5)


def test_padding_has_no_gradient():
    model, patches = FORMS["siglip"], naflex(MIXED, 20)
    params = params_of(model)

    def total(values):
        return model.apply({"params": params}, values, *patches[1:], method="patches").sum()

    gradient = np.abs(np.asarray(jit(jax.grad(total))(patches.values))).max(-1)
    np.testing.assert_array_equal(gradient > 0, np.asarray(patches.mask))


@pytest.mark.parametrize("form", ["class", "siglip", "class and registers"])
def test_tokens_and_features(form):
    model = FORMS[form]
    tokens, features = (forward(model, params_of(model), IMAGES, name) for name in ("tokens", "features"))
    assert tokens.shape == (2, 16, 16)
    close(features, expected_of(model, IMAGES, 0), 5e-5)


def test_mean_of_tokens():
    model = FORMS["rope"]
    tokens, features = (forward(model, params_of(model), IMAGES, name) for name in ("tokens", "features"))
    close(features, tokens.mean(1), 1e-5)


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "full"}], ids=str)
def test_scan_and_remat_change_nothing(change):
    params = params_of(BASE)

    def run(model):
        return jit(jax.value_and_grad(lambda p: jnp.square(model.apply({"params": p}, IMAGES)).sum()))(params)

    close(run(BASE.clone(**change)), run(BASE))


# ---- patch dropout ----

DROPPING = {form: FORMS[form].clone(patch_dropout=0.5) for form in ("class", "rope")}
KEYS = jax.random.split(jax.random.key(4), 2)


@pytest.mark.parametrize("form", DROPPING)
def test_patch_dropout(form):
    """Half of the patches are as if they were not there; the others keep their positions."""
    model, params = DROPPING[form], params_of(DROPPING[form])
    assert forward(model, params, IMAGES, "tokens", KEYS).shape[1] == 8
    np.testing.assert_array_equal(forward(model, params, IMAGES), forward(FORMS[form], params, IMAGES))

    def total(image):
        return apply(model, image, KEYS).sum()

    seen = np.abs(np.asarray(patchify(jit(jax.grad(total))(IMAGES), 4))).max(-1) > 0
    assert (seen.sum(1) == 8).all() and (seen[0] != seen[1]).any()
    if form != "rope":  # learned positions, given as patches, would be resized to those that are left
        return
    values, at = patchify(IMAGES, 4), grid(4, 4)
    kept = Patches(*(jnp.stack([x[seen[i]] for i, x in enumerate(xs)]) for xs in (values, (at[0], at[0]))),
                   jnp.ones((2, 8), bool))  # fmt: skip
    close(forward(FORMS[form], params, kept), forward(model, params, IMAGES, "__call__", KEYS))


def test_patch_dropout_is_the_examples_own():
    """Example 1 of 2 is example 1 alone."""
    model, params = DROPPING["class"], params_of(DROPPING["class"])
    both = forward(model, params, IMAGES, "__call__", KEYS)
    close(forward(model, params, IMAGES[1:], "__call__", KEYS[1:])[0], both[1])
    other = forward(model, params, IMAGES, "__call__", jax.random.split(jax.random.key(5), 2))
    assert np.abs(other - both).max() > 1e-3


def test_patch_dropout_of_any_shape():
    """Real patches are kept before padding."""
    model, patches = FORMS["siglip"].clone(patch_dropout=0.4), naflex(MIXED, 20)
    params = params_of(model)
    small = naflex([MIXED[0][:8, :8], MIXED[1][:8, :8]], 20)  # 4 patches of 20, of which 12 are kept
    close(forward(model, params, small, "__call__", KEYS), forward(model, params, small))
    found = forward(model, params, patches, "__call__", KEYS)
    assert np.abs(found - forward(model, params, patches)).max() > 1e-3 and np.isfinite(found).all()


# ---- sizes ----


@pytest.mark.parametrize(("model", "millions"), [
    (ViT.Ti(16, out=1000), 5.72),  # the first six as timm and torchvision state them
    (ViT.S(16, out=1000), 22.05),
    (ViT.B(16, out=1000), 86.57),
    (ViT.L(16, out=1000), 304.33),
    (ViT.H(14, out=1000), 632.05),
    (ViT.g(14, out=1000), 1012.61),
    (ViT.So400m(14, image_size=384, pool="attention"), 428.23),  # google/siglip-so400m-patch14-384
], ids=["Ti", "S", "B", "L", "H", "g", "So400m"])  # fmt: skip
def test_sizes_of_known_models(model, millions):
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    assert round(size_of(model, image) / 1e6, 2) == millions


def test_presets_take_fields():
    assert ViT.S(8, heads=12) == ViT(patch=8, width=384, depth=12, heads=12)


COUNTED = ViT(
    patch=8, width=256, depth=2, heads=4, image_size=64, out=32, pool="attention", dtype="float32", scan=False
)


@pytest.mark.parametrize("case", ["picture", "class and registers", "dropout", "patches"])
def test_counts_its_operations(case):
    """Within 2 % of the compiler's count of the unrolled program, forward and with the gradient."""
    model, train = COUNTED, case == "dropout"
    if case == "class and registers":
        model = model.clone(pool="class", registers=4)
    if case == "dropout":
        model = model.clone(patch_dropout=0.5)
    image = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8)) if train else None
    params = shapes_of(model, image)["params"]
    if case == "patches":
        shapes = ((8, 64, 192), jnp.float32), ((8, 64, 2), jnp.int32), ((8, 64), bool)
        image = Patches(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))

    def total(params, image, keys):
        return model.apply({"params": params}, image, keys).sum()

    analytic = 8 * model.flops_per_example(image[0].shape[1:] if case == "patches" else image.shape[1:], train)
    for function, times in ((total, 1), (jax.grad(total), 3)):
        counted = jax.jit(function).lower(params, image, keys).cost_analysis()["flops"]
        assert counted == pytest.approx(times * analytic, rel=0.02)


# ---- on a mesh ----


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("siglip", {"data": 2, "fsdp": 2, "tensor": 2}), ("sincos", {"fsdp": 2, "tensor": 2, "sequence": 2})],
)  # fmt: skip
def test_on_a_mesh_as_alone(form, sizes):
    model = FORMS[form].clone(patch_dropout=0.5 if form == "siglip" else 0.0)
    images, keys = jax.random.normal(jax.random.key(6), (8, 16, 16, 3)), jax.random.split(jax.random.key(7), 8)

    def run(variables, images):
        return jax.value_and_grad(lambda v: jnp.square(model.apply(v, images, keys)).sum())(variables)

    variables = {"params": params_of(FORMS[form])}
    found, split = on_mesh(run, model, variables, (images,), **sizes)
    assert split > 8
    close(found, jit(run)(variables, images))


def test_naflex_on_a_mesh_as_alone():
    model, patches = FORMS["siglip"], naflex(MIXED * 4, 20)
    sharding = Sharding(Mesh(data=2, tensor=2, fsdp=2).build(), RULES)

    @jit
    def run(params, patches):
        with sharding.use():
            return model.apply({"params": params}, patches)

    close(run(params_of(model), patches), forward(model, params_of(model), patches))


def test_tokens_that_the_mesh_does_not_divide():
    with Sharding(Mesh(sequence=8).build(), RULES).use(), pytest.raises(UserError) as caught:
        apply(BASE, IMAGES)
    assert str(caught.value) == (
        "The ViT makes sequences of 17, which mesh.sequence = 8 does not divide; leave the sequence whole, or change "
        "its length."
    )


# ---- mistakes ----


@pytest.mark.parametrize(("change", "words"), [
    ({"heads": 3}, "The width 16 is not a multiple of the 3 heads."),
    ({"depth": 0}, "patch, width, depth, heads and channels of a ViT are at least 1."),
    ({"patch": 32}, "A picture of 16 pixels has no patch of 32."),
    ({"positions": "rope", "heads": 8}, "Rotary rows and columns need a head size that is a multiple of 4, not 2."),
    ({"positions": "sincos", "width": 18},
     "Sinusoidal rows and columns need a width that is a multiple of 4, and at least 8, not 18."),
    ({"norm_pooled": True}, 'norm_pooled is for pool="mean", not "class".'),
    ({"patch_dropout": 1.0}, "patch_dropout = 1.0 should be at least 0 and below 1."),
])  # fmt: skip
def test_sizes_that_do_not_fit(change, words):
    with pytest.raises(UserError) as caught:
        BASE.clone(**change).check()
    assert str(caught.value) == words


@pytest.mark.parametrize(("image", "words"), [
    (jnp.zeros((1, 16, 16, 1)), "A picture of 1 channels does not fit a ViT of 3."),
    (jnp.zeros((1, 3, 16, 3)), "A picture of 3 x 16 pixels has no patch of 4 pixels."),
    (Patches(jnp.zeros((1, 4, 16)), jnp.zeros((1, 4, 2), jnp.int32), jnp.ones((1, 4), bool)),
     "Patches of 16 numbers do not fit a ViT of 4 x 4 pixels of 3 channels."),
])  # fmt: skip
def test_pictures_that_do_not_fit(image, words):
    with pytest.raises(UserError) as caught:
        apply(BASE, image)
    assert str(caught.value) == words
