"""The autoencoder of latent diffusion, tiles, the discriminator and perceptual distances: against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_reference as reference
from jax import jit
from safetensors.numpy import save_file
from towers import close, float64, random_of, shapes_of, size_of

from jaxgen.errors import UserError
from jaxgen.models.autoencoder import Autoencoder, Gaussian
from jaxgen.models.discriminator import Discriminator
from jaxgen.models.perceptual import CONVOLUTIONS, LPIPS, SHIFT, SPREAD, VGG16, Features, difference
from jaxgen.models.resnet import ResNet
from jaxgen.models.tiles import tiled, tiled_decode, tiled_encode
from jaxgen.models.vit import ViT
from jaxgen.sharding import RULES, Mesh, Sharding, names_of, unbox

SMALL = Autoencoder(width=8, multipliers=(1, 2), blocks=1, groups=4, latent=2)
FORMS = {
    "quant": SMALL,
    "plain": SMALL.clone(multipliers=(2, 3), groups=2, quant=False, attention=False, channels=1, blocks=2, latent=3),
}
TINY = SMALL.clone(multipliers=(1,), attention=False, quant=False)


@functools.cache
def variables_of(model):
    return random_of(model, jnp.zeros((1, 8, 8, model.channels)))


def image_of(model, batch=2, height=4, width=6):
    return jax.random.uniform(jax.random.key(5), (batch, height, width, model.channels), minval=-1.0)


def apply(model, variables, *inputs, **options):
    return jit(lambda v, *x: model.apply(v, *x, **options))(variables, *inputs)


# ---- in NumPy, a picture at a time ----


def conv(x, p, stride=1, padding=None):
    before, after = padding or ((len(p["kernel"]) - 1) // 2,) * 2
    x, size = np.pad(x, ((before, after), (before, after), (0, 0))), len(p["kernel"])
    rows, columns = ((side - size) // stride + 1 for side in x.shape[:2])
    return p.get("bias", 0.0) + np.array([
        [np.einsum("ijc,ijcf->f", x[r * stride :, c * stride :][:size, :size], p["kernel"]) for c in range(columns)]
        for r in range(rows)
    ])  # fmt: skip


def group_norm(x, p, groups, epsilon):
    parts = x.reshape(*x.shape[:2], groups, -1)
    mean, var = (f(parts, axis=(0, 1, 3), keepdims=True) for f in (np.mean, np.var))
    return ((parts - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * p["scale"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


class Half:
    def __init__(self, model, p):
        self.model, self.p = model, p

    def norm(self, x, p):
        return group_norm(x, p, self.model.groups, 1e-6)

    def residual(self, name, x):
        p = self.p[name]
        h = conv(silu(self.norm(x, p["norm1"])), p["conv1"])
        h = conv(silu(self.norm(h, p["norm2"])), p["conv2"])
        return h + (conv(x, p["skip"]) if "skip" in p else x)

    def middle(self, x):
        x = self.residual("middle_0", x)
        if self.model.attention:
            p = self.p["attention"]
            h = self.norm(x, p["norm"]).reshape(-1, x.shape[-1])
            x = x + reference.attend(h, h, p).reshape(x.shape)
        return self.residual("middle_1", x)

    def end(self, x):
        return conv(silu(self.norm(x, self.p["norm"])), self.p["out"])

    def encode(self, x):
        levels = len(self.model.multipliers)
        x = conv(x, self.p["stem"])
        for level in range(levels):
            for i in range(self.model.blocks):
                x = self.residual(f"down_{level}_{i}", x)
            if level < levels - 1:
                x = conv(x, self.p[f"halve_{level}"], 2, (0, 1))
        return self.end(self.middle(x))

    def decode(self, x):
        x = self.middle(conv(x, self.p["stem"]))
        for level in reversed(range(len(self.model.multipliers))):
            for i in range(self.model.blocks + 1):
                x = self.residual(f"up_{level}_{i}", x)
            if level:
                x = conv(x.repeat(2, 0).repeat(2, 1), self.p[f"double_{level - 1}"])
        return self.end(x)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_numpy(form):
    model, variables = FORMS[form], variables_of(FORMS[form])
    image, p = image_of(model), float64(variables["params"])

    @jit
    def both(variables, image):
        found = model.apply(variables, image, method="encode")
        latent = found.mean + 0.1
        return found, latent, model.apply(variables, latent, method="decode"), model.apply(variables, image)

    found, latent, decoded, whole = both(variables, image)
    moments = [Half(model, p["encoder"]).encode(np.float64(x)) for x in image]
    moments = np.array([conv(m, p["before"]) if model.quant else m for m in moments])
    mean, log_variance = np.split(moments, 2, -1)
    close(found.mean, mean, 1e-4)
    close(found.log_variance, log_variance, 1e-4)
    assert found.mean.shape == (2, 2, 3, model.latent)
    for x, y in ((latent, decoded), (mean, whole)):
        x = [conv(m, p["after"]) if model.quant else m for m in np.float64(x)]
        close(y, np.array([Half(model, p["decoder"]).decode(m) for m in x]), 2e-4)


def test_draws_and_their_divergence():
    """KL by its integral; and a picture's draw is its own, whatever stands beside it."""
    found = Gaussian(jnp.array([0.3, -1.0]).reshape(2, 1, 1, 1), jnp.array([-1.0, 0.5]).reshape(2, 1, 1, 1))
    x = np.linspace(-12, 12, 200_001)
    for mean, log_variance, kl in zip((0.3, -1.0), (-1.0, 0.5), found.kl(), strict=True):
        log_p = -0.5 * (x - mean) ** 2 / np.exp(log_variance) - 0.5 * log_variance - 0.5 * np.log(2 * np.pi)
        log_q = -0.5 * x**2 - 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(kl, np.sum(np.exp(log_p) * (log_p - log_q)) * (x[1] - x[0]), rtol=1e-5)
    wide = Gaussian(jnp.full((3, 40, 40, 2), 2.0), jnp.full((3, 40, 40, 2), np.log(9.0)))
    keys = jax.random.split(jax.random.key(0), 3)
    draws = jit(Gaussian.sample)(wide, keys)
    assert abs(draws.mean() - 2) < 0.15 and abs(draws.std() - 3) < 0.1
    one = Gaussian(wide.mean[1:2], wide.log_variance[1:2])
    np.testing.assert_allclose(one.sample(keys[1:2]), draws[1:2], rtol=1e-6)


def test_normalising():
    """By the fields, or by the statistics that stand in their place."""
    model = TINY.clone(mean=(0.5, -1.0), std=(2.0,), scale=0.25)
    variables, latent = jit(model.init)(jax.random.key(0), image_of(model)), jax.random.normal(
        jax.random.key(0), (2, 3, 3, 2))  # fmt: skip
    params, told = unbox(variables["params"]), variables["latents"]
    np.testing.assert_allclose(told["mean"], [0.5, -1.0])
    np.testing.assert_allclose(told["std"], [8.0, 8.0])
    measured = {"mean": jnp.array([1.0, 2.0]), "std": jnp.array([3.0, 4.0])}
    for latents, mean, std in ((None, [0.5, -1.0], [8.0, 8.0]), (told, [0.5, -1.0], 8.0), (measured, [1, 2], [3, 4])):
        variables = {"params": params} | ({} if latents is None else {"latents": latents})
        normal = model.apply(variables, latent, method="normalise")
        np.testing.assert_allclose(normal, (latent - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model.apply(variables, normal, method="restore"), latent, rtol=1e-5, atol=1e-6)


def test_blocks_are_computed_again():
    """In the backward pass, each of the five."""
    image, params = image_of(TINY), variables_of(TINY)["params"]

    def count(model):
        grad = jax.grad(lambda p: jnp.square(model.apply({"params": p}, image)).mean())
        return str(jax.make_jaxpr(grad)(params)).count("prevent_cse")

    assert count(TINY.clone(remat="full")) >= count(TINY) + 5


@pytest.mark.parametrize(("model", "size"), [
    (Autoencoder(), 83_653_863),  # Stable Diffusion 1, 2 and XL
    (Autoencoder(latent=16, quant=False), 83_819_683),  # Stable Diffusion 3 and Flux
    (Discriminator(), 2_765_633),
    (VGG16(), 14_714_688),
], ids=["sd", "flux", "patches", "vgg"])  # fmt: skip
def test_sizes_of_known_models(model, size):
    assert size_of(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)) == size


@pytest.mark.parametrize(
    "model",
    [Autoencoder(width=64, multipliers=(1, 2), blocks=1), Discriminator(norm="none"), VGG16()],
    ids=["autoencoder", "patches", "vgg"],
)
def test_counts_its_operations(model):
    image = jax.ShapeDtypeStruct((2, 48, 64, 3), jnp.float32)
    counted = jax.jit(model.apply).lower(shapes_of(model, image), image).cost_analysis()["flops"]
    counter = LPIPS(width=model.width) if isinstance(model, VGG16) else model
    assert counted == pytest.approx(2 * counter.flops_per_example((48, 64, 3)), rel=0.03)


@pytest.mark.parametrize(("changes", "shape", "words"), [
    ({"groups": 3}, None, "Level 0 of the autoencoder has 8 features, no multiple of the 3 groups of its norms."),
    ({"std": (1.0, 2.0, 3.0)}, None, "std of an Autoencoder has 3 numbers, which should be 1 or 2"),
    ({"scale": 0.0}, None, "std and scale of an Autoencoder are above 0."),
    ({"blocks": 0}, None, "channels, latent, width, multipliers and blocks of an Autoencoder are at least 1."),
    ({"multipliers": (1, 1, 1)}, (10, 12, 3), "of 3 levels takes pictures whose sides are multiples of 4, and not 10"),
])  # fmt: skip
def test_sizes_that_do_not_fit(changes, shape, words):
    with pytest.raises(UserError) as caught:
        SMALL.clone(**changes).check(shape)
    assert words in str(caught.value)


# ---- tiles ----


def local(x, kernels):
    """Nothing further than 2 places away matters."""
    x = jnp.tanh(jax.lax.conv_general_dilated(
        x, kernels[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))  # fmt: skip
    x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
    return jax.lax.conv_general_dilated(x, kernels[1], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


KERNELS = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 3, 2, 4), (3, 3, 4, 3)])]


@pytest.mark.parametrize(("shape", "tile", "overlap"), [((23, 17), 10, 6), ((11, 30), 10, 5), ((9, 10), 10, 6)])
def test_tiles_are_the_whole_where_places_depend_on_their_neighbours_alone(shape, tile, overlap):
    x = jax.random.normal(jax.random.key(9), (2, *shape, 2))
    whole = local(x, KERNELS)
    run = jit(lambda x, margin: tiled(lambda p: local(p, KERNELS), x, tile, overlap, margin, out=2), static_argnums=1)
    np.testing.assert_allclose(run(x, 2), whole, atol=2e-5)
    if max(shape) > tile:  # with less of a margin, ends that are none show
        assert np.abs(run(x, 0) - whole).max() > 0.1


def test_tiles_of_a_function_that_shrinks():
    x = jax.random.normal(jax.random.key(9), (1, 40, 28, 2))

    def halve(x):
        return jax.lax.conv_general_dilated(
            x, KERNELS[0], (2, 2), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    np.testing.assert_allclose(tiled(halve, x, 8, 4, 1, step=2), halve(x), atol=2e-5)


def test_tiles_have_no_seams():
    """Norms see a tile alone, so that it comes out a little otherwise. Cut side by side, tiles show; faded, they do
    not: along no line is the step of the difference from the whole large beside the steps of the picture."""
    model = SMALL.clone(attention=False)
    params = unbox(jit(model.init)(jax.random.key(0), image_of(model))["params"])
    latent = jax.random.normal(jax.random.key(3), (1, 48, 48, 2))
    whole = np.asarray(apply(model, {"params": params}, latent, method="decode"))
    run = jit(lambda latent, overlap: tiled_decode(model, params, latent, 24, overlap), static_argnums=1)

    def lines(x):
        return np.concatenate([np.abs(np.diff(x, axis=axis)).mean((0, 3 - axis, 3)) for axis in (1, 2)])

    def worst(overlap):
        return lines(np.asarray(run(latent, overlap)) - whole).max() / lines(whole).mean()

    assert worst(0) > 0.8
    assert worst(8) < 0.25
    part = latent[:, :24, :12]  # no more than a tile
    np.testing.assert_allclose(run(part, 8), apply(model, {"params": params}, part, method="decode"), atol=1e-6)


def test_tiled_encoding():
    model = SMALL.clone(attention=False)
    variables, image = variables_of(model), image_of(model, 1, 56, 40)
    found = jit(lambda v, x: tiled_encode(model, v["params"], x, 20, 8))(variables, image)
    whole = apply(model, variables, image, method="encode")
    assert isinstance(found, Gaussian) and found.mean.shape == (1, 28, 20, 2)
    for a, b in zip(found, whole, strict=True):
        assert np.abs(a - b).mean() < 0.1 * np.abs(b).mean()


@pytest.mark.parametrize(("tile", "overlap", "margin", "words"), [
    (8, 8, None, "Tiles of 8 places overlap by 0 to 7, not by 8."),
    (8, 4, 2, "Tiles that overlap by 4 places leave out fewer than half of them, not 2."),
])  # fmt: skip
def test_tiles_that_cannot_be(tile, overlap, margin, words):
    with pytest.raises(UserError) as caught:
        tiled(lambda x: x, jnp.zeros((1, 20, 20, 1)), tile, overlap, margin)
    assert str(caught.value) == words


# ---- the discriminator ----


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_discriminator_agrees_with_numpy(norm):
    model = Discriminator(channels=2, width=4, depth=2, norm=norm, groups=2)
    image = jax.random.uniform(jax.random.key(0), (3, 16, 12, 2), minval=-1.0)
    variables = random_of(model, image)
    p, x = float64(variables["params"]), list(np.float64(image))
    for i in range(4):
        x = [conv(one, p[f"conv{i}"], 2 if i < 2 else 1, (1, 1)) for one in x]
        if i in (1, 2):
            assert ("bias" in p[f"conv{i}"]) == (norm != "batch")
            if norm == "group":
                x = [group_norm(one, p[f"norm{i}"], 2, 1e-5) for one in x]
            if norm == "batch":
                all = np.array(x)
                x = (all - all.mean((0, 1, 2))) / np.sqrt(all.var((0, 1, 2)) + 1e-5)
                x = list(x * p[f"norm{i}"]["scale"] + p[f"norm{i}"]["bias"])
        x = [np.where(one > 0, one, 0.2 * one) for one in x] if i < 3 else x
    found, new = apply(model, variables, image, train=True, mutable=["batch_stats"])
    close(found, np.array(x)[..., 0], 1e-4)
    assert bool(new) == (norm == "batch")


def test_a_patch_is_70_pixels():
    """Each logit sees as much (Isola et al. 2017, appendix 6.1.2)."""
    model = Discriminator(width=2, norm="none")
    image = jnp.zeros((1, 128, 128, 3))
    variables = random_of(model, image)
    seen = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0, 7, 7]))(image + 0.1)
    rows, columns = np.nonzero(np.abs(seen[0]).sum(-1))
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == 70


def test_filters_start_small():
    params = unbox(jit(Discriminator(width=32, depth=2).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))["params"]
    for name in ("conv0", "conv1", "conv2"):
        assert np.std(params[name]["kernel"]) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("changes", "words"), [
    ({"depth": 3}, "Pictures of 20 x 32 are too small for a discriminator of depth 3; they should have 24 pixels"),
    ({"depth": 1, "channels": 1}, "A picture of 3 channels does not fit a discriminator of 1."),
    ({"depth": 1, "norm": "group", "width": 8}, "The width 8 of a discriminator does not divide into 32 groups."),
])  # fmt: skip
def test_discriminators_that_do_not_fit(changes, words):
    with pytest.raises(UserError) as caught:
        Discriminator(**changes).check((20, 32, 3))
    assert words in str(caught.value)


# ---- perceptual distances ----


def vgg_file(names="features", width=2, weights=True):
    """Tensors as PyTorch has them."""
    random, tensors, channels = np.random.default_rng(0), {}, 3
    for i, places in enumerate(CONVOLUTIONS):
        features = width * min(2**i, 8)
        for place in places:
            name = f"features.{place}" if names == "features" else f"net.slice{i + 1}.{place}"
            std = (9 * channels / 2) ** -0.5
            tensors[f"{name}.weight"] = random.normal(0, std, (features, channels, 3, 3)).astype(np.float32)
            tensors[f"{name}.bias"] = random.normal(0, 0.2, features).astype(np.float32)
            channels = features
        if weights:
            tensors[f"lin{i}.model.1.weight"] = random.uniform(0, 1, (1, features, 1, 1)).astype(np.float32)
    return tensors


def lpips(tensors, a, b):
    """Of two pictures, from the file's own tensors."""
    values = {int(name.split(".")[-2]): name.rsplit(".", 1)[0] for name in tensors if "lin" not in name}

    def features(x):
        x, found = (np.float64(x) - SHIFT) / SPREAD, []
        for i, places in enumerate(CONVOLUTIONS):
            if i:
                h, w, c = x.shape
                x = x[: h // 2 * 2, : w // 2 * 2].reshape(h // 2, 2, w // 2, 2, c).max((1, 3))
            for place in places:
                kernel, bias = (np.float64(tensors[f"{values[place]}.{k}"]) for k in ("weight", "bias"))
                x = np.maximum(conv(x, {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}), 0)
            found.append(x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-10))
        return found

    total = 0.0
    for i, (one, other) in enumerate(zip(features(a), features(b), strict=True)):
        weights = tensors.get(f"lin{i}.model.1.weight", np.ones((1, one.shape[-1], 1, 1)))[0, :, 0, 0]
        total += ((one - other) ** 2 @ np.float64(weights)).mean()
    return total


@pytest.mark.parametrize(("names", "weights", "suffix"), [("features", True, ".npz"), ("net", False, ".safetensors")])
def test_lpips_from_a_file(names, weights, suffix, tmp_path):
    tensors, file = vgg_file(names, weights=weights), tmp_path / f"vgg{suffix}"
    (save_file if suffix != ".npz" else lambda t, f: np.savez(f, **t))(tensors, file)
    model = LPIPS(str(file), width=2)
    a, b = (jax.random.uniform(jax.random.key(i), (2, 20, 16, 3), minval=-1.0) for i in (0, 1))
    variables = unbox(jit(model.create)(jax.random.key(0)))
    found = jit(model.distance)(variables, a, b)
    close(found, np.array([lpips(tensors, *pair) for pair in zip(a, b, strict=True)]), 1e-4)
    np.testing.assert_array_equal(jit(model.distance)(variables, a, a), 0)
    grey = [jax.random.uniform(jax.random.key(i), (1, 16, 16, 1)) for i in (2, 3)]
    close(model.distance(variables, *grey), lpips(tensors, *(np.repeat(x[0], 3, -1) for x in grey))[None], 1e-4)


def test_the_file_is_read_into_its_layout(tmp_path):
    """On eight devices, and by shapes alone without it."""
    tensors = vgg_file()
    np.savez(tmp_path / "vgg.npz", **tensors)
    model, sharding = LPIPS(str(tmp_path / "vgg.npz"), width=2), Sharding(Mesh(data=1, tensor=2, fsdp=1).build(
        jax.devices()[:2]), RULES)  # fmt: skip
    boxed = jax.eval_shape(LPIPS("missing.npz", width=2).create, jax.random.key(0))
    layout = sharding.tree(unbox(boxed), names_of(boxed))
    made = jax.jit(lambda key: unbox(model.create(key)), out_shardings=layout)(jax.random.key(0))
    kernel = made["params"]["vgg"]["conv2_1"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    np.testing.assert_array_equal(kernel, tensors["features.12.weight"].transpose(2, 3, 1, 0))


def test_equal_features_have_a_gradient():
    """Where all features are 0, too."""
    a = jnp.zeros((1, 2, 2, 3))
    for b in (a, a + 1):
        grad = jax.grad(lambda x, b=b: difference(x, b).sum())(a)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize(("tensors", "name", "words"), [
    (None, "vgg.npz", "there is no"),
    ({}, "vgg.npz", "has no features.0.weight, which a VGG16 has"),
    (vgg_file(width=3), "vgg.npz", "vgg/conv0_0/bias of"),
    (b"nothing", "vgg.safetensors", "is no .npz and no .safetensors file, or is damaged"),
])  # fmt: skip
def test_files_that_are_not_right(tensors, name, words, tmp_path):
    from jaxgen.models.perceptual import read

    if isinstance(tensors, bytes):
        (tmp_path / name).write_bytes(tensors)
    elif tensors is not None:
        np.savez(tmp_path / name, **tensors)
    shapes = {"vgg/conv0_0/bias": (2,), "vgg/conv0_0/kernel": (3, 3, 3, 2)}
    if tensors == {}:
        shapes = dict(reversed(shapes.items()))
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, shapes)
    assert words in str(caught.value)


def test_features_of_a_vit():
    """The tokens after some of its blocks, and the final norm."""
    tower = ViT(patch=4, width=8, depth=3, heads=2, image_size=8, pool="mean", positions="none")
    model = Features(tower, depth=2, mean=(0.4,), std=(0.3,))
    variables = random_of(tower, jnp.zeros((1, 8, 8, 3)))
    p, images = float64(variables["params"]), image_of(SMALL, 2, 8, 8)
    tokens = []
    for image in images:
        _, _, patches = reference.cut(((np.float64(image) + 1) / 2 - 0.4) / 0.3, 4)
        x = patches @ p["patch_embedding"]["kernel"] + p["patch_embedding"]["bias"]
        tokens.append(reference.blocks(tower.clone(depth=2), p, x))
    (found,) = jit(model.features)(variables, images)
    close(found, np.array(tokens), 1e-4)
    unit = [t / np.linalg.norm(t, axis=-1, keepdims=True) for t in tokens]
    distance = jit(model.distance)(variables, images, images[::-1])
    close(distance, np.full(2, ((unit[0] - unit[1]) ** 2).sum(-1).mean()), 1e-4)
    assert model.flops_per_example((8, 8, 3)) < tower.flops_per_example((8, 8, 3))


def test_features_of_a_resnet():
    tower = ResNet(18, width=4, out=5, small=True)
    variables = random_of(tower, jnp.zeros((1, 16, 16, 3)))
    images = image_of(SMALL, 2, 16, 16)

    @jit
    def all(variables, x):
        model, other = Features(tower), x[::-1]
        last = tower.apply(variables, x, method="features")
        grey = model.distance(variables, x[..., :1], x[..., 1:2])
        return model.features(variables, x), last, Features(tower, depth=2).distance(variables, x, other), grey

    found, last, two, grey = all(variables, images)
    assert [x.shape for x in found] == [(2, 16 >> i, 16 >> i, 4 << i) for i in range(4)]
    close(found[-1].mean((1, 2)), last)
    close(two, sum(difference(x, x[::-1]) for x in found[:2]))
    assert grey.shape == (2,) and (grey > 0).all()


@pytest.mark.parametrize(("model", "shape", "words"), [
    (LPIPS(), (64, 64, 3), "LPIPS needs its weights: a .safetensors or .npz file in task.perceptual.weights."),
    (LPIPS("a.npz"), (64, 8, 3), "LPIPS is for pictures of 16 pixels and more, not 64 x 8."),
    (LPIPS("a.npz"), (64, 64, 4), "LPIPS is for grey and colour pictures, not for 4 channels."),
    (Features(ResNet(18), depth=5), (64, 64, 3), "task.perceptual.depth is 5; the tower has 4, and 0 stands for all."),
    (Features(ResNet(18)), (64, 64, 2), "Pictures of 2 channels do not fit a perceptual tower of 3."),
    (Features(ViT()), (8, 64, 3), "Pictures of 8 x 64 have no patch of 16 pixels."),
])  # fmt: skip
def test_perceptual_distances_that_do_not_fit(model, shape, words):
    with pytest.raises(UserError) as caught:
        model.check(shape)
    assert str(caught.value) == words
