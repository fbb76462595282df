"""Files as the format's own library writes them, and our files as it reads them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen.errors import UserError
from jaxgen.interop.safetensors import Lazy, Tensors, write


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    formats = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}
    floats = {name: rng.normal(size=(3, 5)).astype(dtype) for name, dtype in formats.items()}
    return {**floats, "scalar": np.array(3.5, np.float32), "count": np.array([7], np.int64),
            "empty": np.zeros((0, 4), np.float32)}  # fmt: skip


def lazy(arrays):
    return {name: Lazy(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def test_reads_what_the_library_wrote(arrays, tmp_path):
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(Tensors(tmp_path / "model.safetensors"), arrays)
    same(Tensors(tmp_path), arrays)


def test_the_library_reads_what_is_written(arrays, tmp_path):
    assert write(tmp_path, lazy(arrays)) == [tmp_path / "model.safetensors"]
    same(load_file(tmp_path / "model.safetensors"), arrays)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_not_contiguous_is_written_as_it_reads(tmp_path):
    turned = np.arange(6.0).reshape(2, 3).T   # the library would write the memory, which is that of the other order
    write(tmp_path, {"x": Lazy(turned.shape, np.dtype(np.float32), lambda: turned)})
    same(load_file(tmp_path / "model.safetensors"), {"x": turned.astype(np.float32)})


def test_shards_with_an_index(tmp_path):
    arrays = {f"layer.{i}": np.full((10,), i, np.float32) for i in range(5)}
    files = write(tmp_path, lazy(arrays), shard=100)
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [
        "model.safetensors.index.json"
    ]
    same(Tensors(tmp_path), arrays)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"]["layer.4"] == "model-00003-of-00003.safetensors"
    assert load_file(tmp_path / "model-00002-of-00003.safetensors").keys() == {"layer.2", "layer.3"}


def test_a_view_reads_no_more_than_is_used(tmp_path):
    """The tensors are views of one mapped file: no copy is made on opening."""
    save_file({"big": np.ones((1000, 1000), np.float32)}, tmp_path / "model.safetensors")
    view = Tensors(tmp_path)["big"]
    while view.base is not None and not isinstance(view, np.memmap):
        view = view.base
    assert isinstance(view, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        Tensors(tmp_path)["big"][0, 0] = 2


def damaged(name, content, folder):
    (folder / name).write_bytes(content)
    return folder / name


def test_what_is_wrong_is_named(arrays, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        Tensors(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no .safetensors file$"):
        Tensors(tmp_path)
    damaged("pytorch_model.bin", b"\x80\x02", tmp_path)
    with pytest.raises(UserError, match="pytorch_model.bin is pickled"):
        Tensors(tmp_path)
    with pytest.raises(UserError, match="pickled file, which may run code"):
        Tensors(tmp_path / "pytorch_model.bin")
    for content in (b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{broken         ", b"\x02" + b"\0" * 7 + b"{}extra"):
        with pytest.raises(UserError, match="is not a safetensors file, or is damaged"):
            Tensors(damaged("model.safetensors", content, tmp_path))
    save_file(arrays, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="damaged"):
        Tensors(damaged("model.safetensors", whole[:-1], tmp_path))


def test_two_models_in_a_folder(arrays, tmp_path):
    save_file(arrays, tmp_path / "a.safetensors")
    same(Tensors(tmp_path), arrays)
    save_file(arrays, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="several models: a.safetensors, b.safetensors"):
        Tensors(tmp_path)


def test_an_index_that_does_not_fit(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    arrays = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    save_file(arrays, tmp_path / "one.safetensors")
    index.write_text("{}")
    with pytest.raises(UserError, match="is no index"):
        Tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(UserError, match="is no index"):
        Tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}))
    with pytest.raises(UserError, match="do not agree on what is in it: b|two.safetensors, which is missing"):
        Tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(UserError, match="one.safetensors do not agree on what is in it: b"):
        Tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    same(Tensors(tmp_path), arrays)
