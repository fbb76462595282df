"""MM-DiT's weights of diffusers: what they compute, computed by ours, and their files from ours."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.interop.formats import opened, written
from jaxgen.interop.mmdit import FORMATS, FluxFormat, SD3Format, format_for
from jaxgen.interop.names import flat
from jaxgen.interop.safetensors import Tensors, write
from jaxgen.models.conditions import Conditions
from jaxgen.models.mmdit import MMDiT, RopeAxes, waves
from jaxgen.sharding import RULES, Mesh, Sharding, unbox

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["sd3", "sd35", "flux"]
SIZES = dict(out=4, width=16, heads=2, text=12, pooled=10)
MODULES = {
    "sd3": MMDiT(**SIZES, depth=3, table=6, base=4),
    "sd35": MMDiT(**SIZES, depth=4, table=6, base=4, dual=2, qk_norm=True),
    "flux": MMDiT(**SIZES, depth=2, single_depth=2, qk_norm=True, positions="rope", rope=RopeAxes((2, 2, 4)),
                  guidance=3.5),
}  # fmt: skip


@functools.cache
def found_of(name):
    return opened(GOLDEN / name, FORMATS)


@functools.cache
def read(name):
    return found_of(name).read()


@pytest.mark.parametrize("name", NAMES)
def test_computes_the_same(name):
    found, io = found_of(name), dict(np.load(GOLDEN / name / "io.npz"))
    assert found.module == MODULES[name]

    @jit
    def run(variables, io):
        told = {"guidance": io["guidance"]} if "guidance" in io else {}
        conditions = Conditions(tokens=io["tokens"], pooled=io["pooled"])  # which are traced
        return found.module.apply(variables, io["x"], io["label"], conditions, **told)

    out = run(read(name), io)
    assert io["out"].std() > 0.3
    assert np.abs(out - io["out"]).max() < 1e-4 * np.abs(io["out"]).max()
    if name == "flux":   # without, it is told the field's
        first = {key: value[:1] for key, value in io.items() if key != "guidance"}
        np.testing.assert_allclose(run(read(name), first), out[:1], atol=1e-4)


def test_the_table_of_positions():
    """What is learned begins with the table that diffusers computes."""
    table = read("sd3")["params"]["position_embedding"]
    np.testing.assert_allclose(waves(6, 6, 16, 4), table, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_written_as_it_was_read(name, tmp_path):
    found = found_of(name)
    assert type(format_for(found.module)) is type(found.format)
    write(tmp_path, written(found.format, found.module, read(name), np.float32), found.format.weights)
    again = Tensors(tmp_path)
    assert again.keys() == found.tensors.keys()
    last = f"transformer_blocks.{found.module.depth - 1}.attn."
    unheard = {last + part for part in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")}
    for key, value in found.tensors.items():
        assert again[key].shape == value.shape
        if name == "flux" or key not in unheard:
            np.testing.assert_array_equal(again[key], value, err_msg=key)
        else:
            assert len(set(again[key].ravel())) == 1

    (tmp_path / "config.json").write_text(json.dumps(found.format.config(found.module)))
    assert opened(tmp_path, FORMATS).module == found.module
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = found.format.config(found.module)
    assert ours.keys() == theirs.keys() - {"_diffusers_version"}
    assert {k: ours[k] for k in ours if k != "out_channels"} == {k: theirs[k] for k in ours if k != "out_channels"}


def test_sharded_as_unsharded():
    sharding = Sharding(Mesh(data=2, fsdp=2, tensor=2).build(), RULES)
    whole, split, parts = flat(read("sd35")), flat(found_of("sd35").read(sharding)), set()
    for path, value in whole.items():
        np.testing.assert_array_equal(split[path], value)
        parts.add(split[path].size // split[path].addressable_shards[0].data.size)
    assert {1, 2, 4} <= parts


# Whole models, by the parameters that diffusers counts. SD3's count here leaves out what is thrown away there: the
# text's queries in the last block, and their norm.
@pytest.mark.parametrize(
    ("module", "theirs", "unheard"),
    [
        (MMDiT.SD3(), 2_028_328_000, 1536**2 + 1536),
        (MMDiT.SD35M(), 2_243_171_520, 1536**2 + 1536 + 64),
        (MMDiT.SD35L(), 8_056_627_520, 2432**2 + 2432 + 64),
        (MMDiT.Flux(), 11_901_408_320, 0),
    ],
    ids=["SD3", "SD3.5 M", "SD3.5 L", "FLUX.1"],
)
def test_sizes_of_known_models(module, theirs, unheard):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *format_for(module).inputs(module))
    sizes = {path: value.size for path, value in flat(unbox(shapes["params"])).items()}
    table = sizes.pop("position_embedding", 0)
    assert sum(sizes.values()) + unheard == theirs and table == (module.positions == "learned") * module.table**2 * (
        module.width
    )


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("sd35", {"dual_attention_layers": [0, 2]}, r"_layers = \[0, 2\] is not imported, only the first few"),
        ("sd35", {"qk_norm": "layer_norm"}, "with qk_norm = 'layer_norm' is not imported, only None and 'rms_norm'"),
        ("sd3", {"caption_projection_dim": 24}, "caption_projection_dim = 24 is not imported, only with the width, 16"),
        ("flux", {"patch_size": 2}, "with patch_size = 2 is not imported, only 1"),
        ("flux", {"in_channels": 18}, "of 18 channels in and 18 out is not of patches of 2 x 2"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(name, changes, words, tmp_path):
    config = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(
        GOLDEN / name / "diffusion_pytorch_model.safetensors"
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        opened(tmp_path, FORMATS)


def test_what_a_form_has_no_words_for():
    with pytest.raises(UserError, match="single_depth is 2 and would be 0"):
        SD3Format().check(MODULES["sd3"].clone(single_depth=2))
    with pytest.raises(UserError, match="classes is 10 and would be 0"):
        FluxFormat().check(MODULES["flux"].clone(classes=10))
    FluxFormat().check(MODULES["flux"].clone(guidance=2.0, rope=RopeAxes((4, 2, 2))))
