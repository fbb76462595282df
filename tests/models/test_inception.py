"""FID's InceptionV3 against PyTorch (see tests/interop/make_golden_inception.py), its file, and its sizes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.drawn import draw
from jax import jit
from safetensors.numpy import save_file
from towers import on_mesh, random_of, size_of

from jaxgen.errors import UserError
from jaxgen.evaluation.features import Inception
from jaxgen.interop import inception
from jaxgen.interop.names import flat
from jaxgen.models.inception import InceptionV3, MixedB, prepared, resized
from jaxgen.sharding import RULES, Mesh, Sharding

GOLDEN = Path(__file__).parents[1] / "interop" / "golden" / "inception" / "io.npz"


@pytest.fixture(scope="module")
def io():
    return dict(np.load(GOLDEN))


def tensors_of(divisor):
    """A file's tensors, drawn by their names."""
    module = InceptionV3(width_divisor=divisor)
    shapes = inception.names(module).expand(flat(inception.shapes_of(module))).shapes
    return {name: draw(name, shape) for name, shape in shapes.items()}


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_resizes_as_tensorflow_1(io):
    found = np.asarray(resized(jnp.asarray(io["image"], jnp.float32)))
    close(found[:, ::13, ::13], io["resized"], 1e-5)
    smaller = np.random.default_rng(0).uniform(0, 255, (1, 600, 7, 1)).astype(np.float32)
    found, i, j = np.asarray(resized(jnp.asarray(smaller))), 217, 298
    y, x = i * 600 / 299, j * 7 / 299   # only the four pixels about the place count, and the border's come again
    column = smaller[0, :, min(int(x) + 1, 6), 0] * (x - int(x)) + smaller[0, :, int(x), 0] * (1 - x + int(x))
    expected = column[int(y)] * (1 - y + int(y)) + column[int(y) + 1] * (y - int(y))
    assert found[0, i, j, 0] == pytest.approx(expected, rel=1e-3)


def test_prepares_grey_pictures_too():
    image = np.full((1, 8, 8, 1), 64, np.uint8)
    assert np.all(np.asarray(prepared(jnp.asarray(image))) == -0.5)
    assert prepared(jnp.asarray(image)).shape == (1, 299, 299, 3)


def test_agrees_with_pytorch(io, tmp_path):
    """As an evaluation opens it from a file: pictures of another size, over two devices."""
    np.savez(tmp_path / "whole.npz", **tensors_of(1))
    place = Sharding(Mesh(data=2).build(jax.devices()[:2]), RULES)
    network = Inception(str(tmp_path / "whole.npz")).network(place)
    assert network.name == "InceptionV3" and network.is_fid and "TensorFlow 1" in network.resize
    assert not Inception(str(tmp_path / "whole.npz"), "antialias").network(place).is_fid
    images = jax.device_put(io["image"], place.named(("batch", None, None, None)))
    features, probabilities = jit(network.see)(network.variables, images)
    assert io["features"].std() > 0.1 and io["logits"].std() > 0.1
    close(np.asarray(features), io["features"], 2e-5)
    close(np.log(probabilities), np.asarray(jax.nn.log_softmax(io["logits"])), 2e-5)


def test_a_block_on_a_mesh_as_alone():
    block, x = MixedB(16, "float32"), jax.random.normal(jax.random.key(0), (8, 5, 6, 18))
    variables = random_of(block, x[:1])
    found, split = on_mesh(block.apply, block, variables, (x,), data=2, fsdp=2, tensor=2)
    assert split > 3
    close(np.asarray(found), np.asarray(jit(block.apply)(variables, x)), 2e-5)


def test_sizes():
    picture = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    assert size_of(InceptionV3(), picture) == 21_785_568 + 1008 * 2049   # torchvision's without head, and the head
    shapes = jax.eval_shape(InceptionV3().apply, inception.shapes_of(InceptionV3()), picture)
    assert [s.shape for s in shapes] == [(1, 2048), (1, 1008)] and InceptionV3().feature_width == 2048
    with pytest.raises(UserError, match="width_divisor of an InceptionV3 is one of"):
        InceptionV3(width_divisor=3).check()


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop("Mixed_6c.branch_pool.bn.bias"), "Mixed_6c.branch_pool.bn.bias is missing"),
    (lambda t: t.update({"AuxLogits.fc.weight": t["fc.weight"]}), "AuxLogits.fc.weight is left over"),
    (lambda t: t.update({"Mixed_5b.branch1x1.conv.weight": t["fc.weight"]}), "has the shape"),
    (lambda t: t.update({"fc.weight": t["fc.weight"][:1000]}), "an InceptionV3 of 1000 classes, and FID's has 1008"),
    (lambda t: t.pop("fc.weight"), "holds no InceptionV3"),
])  # fmt: skip
def test_files_of_other_weights(change, said, tmp_path):
    tensors = tensors_of(16)
    change(tensors)
    np.savez(tmp_path / "other.npz", **tensors)
    with pytest.raises(UserError, match=said):
        inception.read(tmp_path / "other.npz")


def test_a_safetensors_file(tmp_path):
    """The same weights, with counts that some files have, and that are of no use."""
    tensors = tensors_of(16)
    count = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.asarray(np.int64(7))}
    save_file(tensors | count, tmp_path / "it.safetensors")
    module, variables = inception.read(tmp_path / "it.safetensors")
    assert module == InceptionV3(width_divisor=16)
    kernel = variables["params"]["Mixed_7c"]["branch3x3_2a"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["Mixed_7c.branch3x3_2a.conv.weight"].transpose(2, 3, 1, 0))


def test_files_that_are_none(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "pickled.npz", **{"fc.weight": np.array([{}], object)})
    for name in ("torn.npz", "pickled.npz"):
        with pytest.raises(UserError, match="is not an .npz file of arrays, or is damaged"):
            inception.read(tmp_path / name)
    with pytest.raises(UserError, match="there is no .*nowhere.npz"):
        inception.read(tmp_path / "nowhere.npz")
    with pytest.raises(UserError, match="is a pickled file"):
        inception.read(tmp_path / "weights.pth")
