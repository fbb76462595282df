"""Name maps on a made-up project, against the same turned by hand."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.errors import UserError
from jaxgen.interop.names import LINEAR, SKIP, Layout, NameMap, Rule, flat, nested

H, D, E, LAYERS, EXPERTS = 3, 2, 4, 4, 2
MAP = NameMap(
    [
        Rule("layers.{layer}.q.weight", "blocks/query/kernel", "(h d) e -> e h d"),
        Rule("layers.{layer}.q.bias", "blocks/query/bias", "(h d) -> h d"),
        Rule("layers.{layer}.kv.weight", ("blocks/key/kernel", "blocks/value/kernel"), "(n h d) e -> n e h d"),
        Rule("layers.{layer}.experts.{expert}.weight", "blocks/experts/kernel", LINEAR),
        Rule("conv.weight", "patch/kernel", "e c p q -> (p q c) e"),
        Rule("stage.{i}.unit.{j}.weight", "stage{i}_unit{j}/scale"),
        Rule("stage.{i}.unit.{j}.batches", "stage{i}_unit{j}/scale", constant=np.int64(0)),
        Rule("probe", "probe", "1 1 e -> e"),
        Rule("scale", "scale", "1 ->"),
        Rule("old.position_ids", "probe", constant=SKIP),
    ],
    p=2, q=2,
)  # fmt: skip


@pytest.fixture
def theirs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    tensors = {
        "conv.weight": draw(E, 3, 2, 2), "probe": draw(1, 1, E), "scale": draw(1),
        "stage.0.unit.12.weight": draw(5), "stage.0.unit.12.batches": np.zeros((), np.int64),
    }  # fmt: skip
    for i in range(LAYERS):
        tensors |= {f"layers.{i}.q.weight": draw(H * D, E), f"layers.{i}.q.bias": draw(H * D)}
        tensors[f"layers.{i}.kv.weight"] = draw(2 * H * D, E)
        tensors |= {f"layers.{i}.experts.{j}.weight": draw(7, E) for j in range(EXPERTS)}
    return tensors


def by_hand(t):
    query = np.stack([t[f"layers.{i}.q.weight"].reshape(H, D, E).transpose(2, 0, 1) for i in range(LAYERS)])
    kv = np.stack([t[f"layers.{i}.kv.weight"].reshape(2, H, D, E).transpose(0, 3, 1, 2) for i in range(LAYERS)])
    experts = np.stack([[t[f"layers.{i}.experts.{j}.weight"].T for j in range(EXPERTS)] for i in range(LAYERS)])
    patch = np.zeros((12, E), np.float32)
    for row in range(2):
        for column in range(2):
            for channel in range(3):
                patch[(row * 2 + column) * 3 + channel] = t["conv.weight"][:, channel, row, column]
    return {
        "blocks/query/kernel": query,
        "blocks/query/bias": np.stack([t[f"layers.{i}.q.bias"].reshape(H, D) for i in range(LAYERS)]),
        "blocks/key/kernel": kv[:, 0], "blocks/value/kernel": kv[:, 1], "blocks/experts/kernel": experts,
        "patch/kernel": patch, "stage0_unit12/scale": t["stage.0.unit.12.weight"], "probe": t["probe"][0, 0],
        "scale": t["scale"][0],
    }  # fmt: skip


def shapes(theirs, sharding=None):
    return {k: jax.ShapeDtypeStruct(v.shape, np.float32, sharding=sharding) for k, v in by_hand(theirs).items()}


def test_read(theirs):
    target = shapes(theirs)
    found = MAP.expand(target).read(theirs, target)
    assert found.keys() == target.keys()
    for path, value in by_hand(theirs).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_written_is_what_was_read(theirs):
    made = MAP.expand(shapes(theirs)).written(by_hand(theirs))
    assert made.keys() == theirs.keys()
    for name, value in theirs.items():
        assert made[name].shape == value.shape and made[name].dtype == value.dtype
        np.testing.assert_array_equal(made[name].make(), value, err_msg=name)


class Counting(dict):
    """Tensors that note which were touched."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.touched = []

    def __getitem__(self, name):
        self.touched.append(name)
        return super().__getitem__(name)


def test_each_device_reads_its_own_shard(theirs):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("layers", "model"))
    split = NamedSharding(mesh, PartitionSpec("layers", "model"))
    target = {"blocks/query/kernel": jax.ShapeDtypeStruct((LAYERS, E, H, D), np.float32, sharding=split)}
    tensors = Counting({k: v for k, v in theirs.items() if ".q.weight" in k})
    expanded = MAP.expand(target)
    found = expanded.read(tensors, target)["blocks/query/kernel"]
    assert found.sharding == split
    np.testing.assert_array_equal(found, by_hand(theirs)["blocks/query/kernel"])
    shard = found.addressable_shards[-1]
    assert shard.data.shape == (1, E // 2, H, D)
    tensors.touched.clear()
    expanded.parts["blocks/query/kernel"].take(tensors, shard.index, np.float32)
    assert tensors.touched == [f"layers.{shard.index[0].start}.q.weight"]


def test_other_formats_become_ours(theirs):
    target = shapes(theirs)
    halves = {k: v.astype(jax.numpy.bfloat16) if v.dtype == np.float32 else v for k, v in theirs.items()}
    found = MAP.expand(target).read(halves, target)
    wanted = by_hand({k: v.astype(np.float32) for k, v in halves.items()})
    assert all(v.dtype == np.float32 for v in found.values())
    np.testing.assert_array_equal(found["blocks/key/kernel"], wanted["blocks/key/kernel"])
    made = MAP.expand(target).written(found, jax.numpy.bfloat16)
    assert made["conv.weight"].dtype == jax.numpy.bfloat16


def test_every_key_that_does_not_fit_is_listed(theirs):
    theirs["layers.1.query.bias"] = theirs.pop("layers.1.q.bias")
    del theirs["stage.0.unit.12.weight"], theirs["stage.0.unit.12.batches"]   # a constant may be missing
    theirs["conv.weight"] = theirs["conv.weight"][:, :, :1]
    theirs["probe"] = theirs["probe"].astype(np.int32)
    theirs["old.position_ids"] = np.zeros(3, np.int64)   # known to stand in old files
    theirs["decoder.bias"] = np.zeros(3, np.float32)
    sizes = {"blocks/query/bias": (LAYERS, H, D), "patch/kernel": (12, E), "probe": (E,), "stage0_unit12/scale": (5,)}
    target = {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in sizes.items()}
    kept = {k: v for k, v in theirs.items() if k.startswith(("conv", "probe", "decoder", "old")) or "bias" in k}
    with pytest.raises(UserError) as caught:
        MAP.expand(target).read(kept, target, "DIR")
    first, *lines = str(caught.value).split("\n  ")
    assert first == "the weights of DIR do not fit the model in 6 places:"
    assert lines == [
        "layers.1.q.bias is missing; did you mean 'layers.1.query.bias'?",
        "stage.0.unit.12.weight is missing",
        "layers.1.query.bias is left over; did you mean 'layers.1.q.bias'?",
        "decoder.bias is left over; did you mean 'layers.1.q.bias'?",
        "conv.weight has the shape (4, 3, 1, 2), and (4, 3, 2, 2) is wanted",
        "probe has the format int32, and floating point is wanted",
    ]


@pytest.mark.parametrize("leaves", [{"unheard/of": (3,)}, {"blocks/query/kernel": (E, H, D)}, {"probe": (2, 3)}])
def test_a_leaf_without_a_rule_is_a_bug(leaves):
    with pytest.raises(ValueError):
        MAP.expand({k: jax.ShapeDtypeStruct(v, np.float32) for k, v in leaves.items()})


@pytest.mark.parametrize("layout", ["a b -> a", "(a b) c -> c d e", "a -> (a x y)"])
def test_layouts_that_cannot_be_turned_back(layout):
    with pytest.raises(ValueError):
        Layout.of(layout, (6,) * len(layout.split("->")[1].split()), {})


def test_flat_and_nested():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flat(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nested(flat(tree)) == tree
