"""Tiny AutoencoderKL models of diffusers: what they compute, computed by ours, and their files from ours."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.interop.autoencoder import OLD, AutoencoderFormat, with_statistics
from jaxgen.interop.formats import opened, written
from jaxgen.interop.names import flat
from jaxgen.interop.safetensors import Lazy, Tensors, write
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.sharding import RULES, Mesh, Sharding

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["autoencoder", "autoencoder_shifted", "autoencoder_channels"]
FORMATS = (AutoencoderFormat(),)


@functools.cache
def golden(name):
    """A golden model, opened once, and what went in and came out of it."""
    return opened(GOLDEN / name, FORMATS), dict(np.load(GOLDEN / name / "io.npz"))


@functools.cache
def variables_of(name):
    return golden(name)[0].read()


def close(found, wanted):
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_computes_the_same(name):
    found, io = golden(name)
    module, variables = found.module, variables_of(name)
    image = io["image"].astype(np.float32) / 127.5 - 1
    posterior = jit(lambda v, x: module.apply(v, x, method="encode"))(variables, image)
    close(posterior.mean, io["mean"])
    close(posterior.log_variance, io["log_variance"])
    close(posterior.kl(), io["kl"])
    close(jit(lambda v, z: module.apply(v, z, method="decode"))(variables, io["latent"]), io["decoded"])
    normal = module.apply(variables, jnp.asarray(io["latent"]), method="normalise")
    mean, std, scale = {
        "autoencoder": (0.0, 1.0, 0.18215),
        "autoencoder_shifted": (0.0609, 1.0, 1.5305),
        "autoencoder_channels": ([0.1, -0.2, 0.3], [0.9, 1.1, 1.3], 0.5),
    }[name]
    np.testing.assert_allclose(normal, (io["latent"] - mean) / np.array(std) * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_written_as_it_was_read(name, tmp_path):
    """Every tensor, and a configuration that says the same module."""
    found, _ = golden(name)
    found.format.check(found.module)
    write(tmp_path, written(found.format, found.module, variables_of(name), np.float32), found.format.weights)
    for file, content in found.format.files(found.module, found.pictures).items():
        (tmp_path / file).write_text(json.dumps(content))
    again = opened(tmp_path, FORMATS)
    assert again.module == found.module and again.pictures == found.pictures
    assert again.tensors.keys() == found.tensors.keys()
    for key, value in found.tensors.items():
        np.testing.assert_array_equal(again.tensors[key], value, err_msg=key)
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / name, tmp_path))
    assert {k: v for k, v in theirs.items() if k in ours and not k.startswith("_")} == {
        k: v for k, v in ours.items() if not k.startswith("_")
    }


def test_sharded_as_unsharded():
    found, _ = golden("autoencoder")
    sharding = Sharding(Mesh(data=1, fsdp=4, tensor=2).build(), RULES)
    whole, split = flat(variables_of("autoencoder")), flat(found.read(sharding))
    assert whole.keys() == split.keys() and "latents/mean" in whole
    for path, value in whole.items():
        np.testing.assert_array_equal(split[path], value)
    assert any(x.addressable_shards[0].data.size * 8 == x.size for x in split.values())


def test_the_attentions_first_names(tmp_path):
    """Files of the first versions call its projections otherwise."""
    tensors = Tensors(GOLDEN / "autoencoder")
    before = {new: old for old, new in OLD.items()}

    def old(name):
        head, _, tail = name.partition(".attentions.0.")
        stem, _, kind = tail.rpartition(".")
        return f"{head}.attentions.0.{before[stem]}.{kind}" if stem in before else name

    assert sum(old(name) != name for name in tensors) == 16
    write(tmp_path, {old(name): Lazy(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()})
    (tmp_path / "config.json").write_bytes((GOLDEN / "autoencoder" / "config.json").read_bytes())
    found, wanted = flat(opened(tmp_path, FORMATS).read()), flat(variables_of("autoencoder"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_tensor_that_is_missing(tmp_path):
    tensors = {k: Lazy(x.shape, x.dtype, lambda x=x: x) for k, x in Tensors(GOLDEN / "autoencoder").items()}
    del tensors["encoder.mid_block.attentions.0.to_q.bias"]
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_bytes((GOLDEN / "autoencoder" / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"encoder.mid_block.attentions.0.to_q.bias is missing"):
        opened(tmp_path, FORMATS).read()


@pytest.mark.parametrize(("changes", "words"), [
    ({"act_fn": "relu"}, "an AutoencoderKL with act_fn = 'relu' is not imported, only 'silu'"),
    ({"use_post_quant_conv": False}, "with only one of quant_conv and post_quant_conv is not imported"),
    ({"out_channels": 4}, "an AutoencoderKL of 3 channels that gives others is not imported"),
    ({"down_block_types": ["DownBlock2D"] * 3}, "only DownEncoderBlock2D at each level"),
    ({"shift_factor": 0.5, "latents_mean": [0.0] * 4}, "both shift_factor and latents_mean"),
])  # fmt: skip
def test_what_is_not_imported(changes, words):
    config = json.loads((GOLDEN / "autoencoder" / "config.json").read_text()) | changes
    with pytest.raises(UserError) as caught:
        FORMATS[0].module(config, {})
    assert words in str(caught.value)


@pytest.mark.parametrize("changes", [
    {}, {"mean": (0.5,)}, {"mean": (0.1, 0.2, 0.3, 0.4)}, {"std": (2.0,), "scale": 3.0}, {"width": 32},
    {"multipliers": (2, 4), "attention": False},
])  # fmt: skip
def test_words_for_modules(changes):
    module = Autoencoder(**changes)
    FORMATS[0].check(module)
    again = FORMATS[0].module(FORMATS[0].config(module), {})
    for one, other in zip(module.bind({})._told(), again.bind({})._told(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_there_are_no_words_for():
    with pytest.raises(UserError, match="whose norms have an epsilon of 1e-05 cannot be written"):
        FORMATS[0].check(Autoencoder(norm_epsilon=1e-5))


def test_statistics_that_were_measured_are_told():
    module = Autoencoder(latent=2, scale=0.5)
    stored = {"mean": np.zeros(2, np.float32), "std": np.full(2, 2, np.float32)}
    assert with_statistics(module, {"params": {}}) is with_statistics(module, {"latents": stored}) is module
    told = with_statistics(module, {"latents": {"mean": np.float32([1, 2]), "std": np.float32([3, 4])}})
    config = FORMATS[0].config(told)
    assert config["latents_mean"] == [1, 2] and config["latents_std"] == [3, 4] and config["scaling_factor"] == 1.0
