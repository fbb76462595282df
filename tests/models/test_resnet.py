"""ResNet and BiT: the forward pass against NumPy, batch statistics on any mesh, sizes of the known models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_reference as reference
from jax import jit
from towers import close, float64, on_mesh, random_of, shapes_of, size_of

from jaxgen.errors import UserError
from jaxgen.models.resnet import ResNet
from jaxgen.sharding import unbox

FORMS = {
    "18": ResNet(18, width=4, out=5),
    "50": ResNet(50, width=4, out=5),
    "small": ResNet(18, width=4, out=0, small=True),
    "bit": ResNet(50, "bit", width=8, out=5, groups=4),
    "bit 18": ResNet(18, "bit", width=8, out=5, groups=2, small=True),
}
IMAGES = jax.random.normal(jax.random.key(0), (2, 37, 32, 3))


@functools.cache
def variables_of(model, channels=3):
    return random_of(model, jnp.zeros((1, 32, 32, channels)))


def forward(model, variables, images, **options):
    return jit(lambda v, x: model.apply(v, x, **options))(variables, images)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_numpy(form):
    """With an odd side, where the strides' padding shows."""
    model, variables = FORMS[form], variables_of(FORMS[form])
    images = IMAGES[:, :19, :16] if model.small else IMAGES
    v = float64(variables)
    expected = np.stack([reference.resnet(model, v["params"], np.float64(x), v.get("batch_stats")) for x in images])
    assert expected.std() > 0.1 * np.abs(expected).max()
    close(forward(model, variables, images), expected, 1e-4)


def test_features_and_tokens():
    model, variables = FORMS["18"], variables_of(FORMS["18"])
    tokens, features = (forward(model, variables, IMAGES, method=name) for name in ("tokens", "features"))
    assert tokens.shape == (2, 2, 32) and features.shape == (2, 32)
    close(features, tokens.mean(1))
    head = variables["params"]["head"]
    close(forward(model, variables, IMAGES), features @ head["kernel"] + head["bias"])


def test_training_takes_the_batchs_statistics():
    """Each place of each picture counts once, and the running ones move a tenth of the way."""
    model = FORMS["small"].clone(channels=1)
    variables, images = variables_of(model, 1), jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    _, new = forward(model, variables, images, train=True, mutable=["batch_stats"])
    p, old, new = (float64(x) for x in (variables["params"], variables["batch_stats"], new["batch_stats"]))
    x = np.stack([reference.conv(np.float64(image), p["stem"]) for image in images]).reshape(-1, 4)
    for name, found in (("mean", x.mean(0)), ("var", x.var(0))):
        expected = 0.9 * old["stem_norm"][name] + 0.1 * found
        np.testing.assert_allclose(new["stem_norm"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "sizes"), [("small", {"data": 2, "fsdp": 2, "tensor": 2}), ("bit 18", {"data": 8})],
)  # fmt: skip
def test_on_a_mesh_as_alone(form, sizes):
    """Result, gradient and batch statistics: those of the global batch."""
    model, images = FORMS[form], jax.random.normal(jax.random.key(3), (8, 8, 8, 3))
    variables = variables_of(model)

    def run(variables, images):
        def loss(params):
            out, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.square(out).mean(), new

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    found, split = on_mesh(run, model, variables, (images,), **sizes)
    assert split > 15 or set(sizes) == {"data"}
    expected = jit(run)(variables, images)
    close(found[0], expected[0], 2e-5)
    close(found[1], expected[1], 2e-4)


def test_starts_as_little_more_than_its_stem():
    """The last scale of each branch starts at 0 (Goyal et al. 2017), all others at 1."""
    params = unbox(jit(FORMS["18"].init)(jax.random.key(0), IMAGES)["params"])
    for name, block in params.items():
        if "_block" in name:
            assert [set(np.asarray(block[f"norm{i}"]["scale"])) for i in (1, 2)] == [{1.0}, {0.0}]


@pytest.mark.parametrize(("model", "size"), [
    (ResNet(18), 11_689_512),  # these five as torchvision's
    (ResNet(34), 21_797_672),
    (ResNet(50), 25_557_032),
    (ResNet(101), 44_549_160),
    (ResNet(152), 60_192_808),
    (ResNet(50, "bit"), 25_549_352),  # timm resnetv2_50x1_bit
    (ResNet(50, "bit", width=192), 217_319_080),  # timm resnetv2_50x3_bit
], ids=["18", "34", "50", "101", "152", "R50x1", "R50x3"])  # fmt: skip
def test_sizes_of_known_models(model, size):
    assert size_of(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)) == size


@pytest.mark.parametrize("model", [ResNet(50), ResNet(50, "bit"), ResNet(18, small=True, out=10)], ids=[
    "50", "bit", "small"])  # fmt: skip
def test_counts_its_operations(model):
    """Within 2 % of the compiler's count, forward and with the gradient (which needs none for the picture)."""
    side = 64 if model.small else 224
    image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    variables = shapes_of(model, image)

    def total(params, rest, image):
        return model.apply({**rest, "params": params}, image, train=True, mutable=["batch_stats"])[0].sum()

    rest = {k: v for k, v in variables.items() if k != "params"}
    for function, times in ((total, 1), (jax.grad(total), 3)):
        counted = jax.jit(function).lower(variables["params"], rest, image).cost_analysis()["flops"]
        assert counted == pytest.approx(times * 2 * model.flops_per_example((side, side, 3)), rel=0.02)


@pytest.mark.parametrize(("model", "words"), [
    (ResNet(50, width=0), "width and channels of a ResNet are at least 1."),
    (ResNet(50, "bit", width=48), "The width 48 is not a multiple of the 32 groups."),
])  # fmt: skip
def test_sizes_that_do_not_fit(model, words):
    with pytest.raises(UserError) as caught:
        model.check()
    assert str(caught.value) == words


def test_a_depth_that_is_not_known():
    model = ResNet(18)
    object.__setattr__(model, "depth", 20)  # what the annotation forbids, where nobody checks it
    with pytest.raises(UserError, match="A ResNet of depth 20 is not known; there are 18, 34, 50, 101, 152."):
        model.check()


def test_pictures_that_do_not_fit():
    with pytest.raises(UserError, match="A picture of 1 channels does not fit a ResNet of 3."):
        FORMS["18"].apply(variables_of(FORMS["18"]), jnp.zeros((1, 32, 32, 1)))
