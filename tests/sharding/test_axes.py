"""Rules from logical axes to mesh axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.errors import UserError
from jaxgen.models.gpt import GPT
from jaxgen.sharding import RULES, Mesh, Sharding, constrain, current, is_split
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.optimizers import SGD
from jaxgen.training.step import Program

ALL = Mesh(data=2, fsdp=2, tensor=2)


def sharding(mesh=ALL, **rules):
    return Sharding(mesh.build(), {**RULES, **rules})


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("batch", "length", None), P(("data", "fsdp"))),  # an axis of size 1, and what follows, is left out
        (("embed", "mlp"), P("fsdp", "tensor")),
        (("layers", "mlp", "embed"), P(None, "tensor", "fsdp")),
        (("norm",), P()),
        (("batch", None, "embed"), P(("data", "fsdp"))),  # fsdp is taken by the batch
        (("heads", "kv_heads"), P("tensor")),  # the first that asks
    ],
)
def test_specs_are_in_one_form(names, spec):
    """Equal layouts are equal specs: no trailing None, no tuple of one."""
    found = sharding().spec(names)
    assert found == spec and tuple(found) == tuple(spec)


def test_parts():
    assert sharding().parts("batch", "length", "heads", None) == (4, 1, 2, 1)
    with sharding(Mesh(sequence=2)).use():
        assert is_split("length") and not is_split("heads")
    assert not is_split("length") and current() is None


def test_a_rule_for_a_mesh_axis_that_does_not_exist():
    with pytest.raises(UserError) as caught:
        sharding(mlp=("tensors",))
    assert str(caught.value).startswith("The rule for 'mlp' names the mesh axis 'tensors', which does not exist")
    assert "tensor" in str(caught.value).removeprefix("The rule for 'mlp' names the mesh axis 'tensors'")


def test_a_logical_axis_without_a_rule():
    with pytest.raises(UserError, match="No rule for the logical axis 'embeds'.*embed"):
        sharding().spec(("embeds",))
    with pytest.raises(UserError, match="No rule for the logical axis 'length'"), Sharding(ALL.build(), {}).use():
        is_split("length")


def shapes(model, mesh, batch=8):
    spec = {k: jax.ShapeDtypeStruct((batch, 8), jnp.int32) for k in ("tokens", "targets")}
    return Program(LanguageModel(model), SGD(), sharding(mesh), spec, 1).shapes


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
    model = GPT(vocab_size=64, depth=1, width=24, heads=6, max_length=8)
    with pytest.raises(UserError) as caught:
        shapes(model, Mesh(data=2, tensor=4))
    assert str(caught.value) == (
        "model/blocks/attention/key/bias has 6 along 'kv_heads', which the mesh (tensor 4) does not divide."
    )


def test_a_batch_that_the_mesh_does_not_divide():
    model = GPT(vocab_size=64, depth=1, width=32, heads=4, max_length=8)
    with pytest.raises(UserError, match="batch_size = 6 cannot be divided over the 8 shards"):
        shapes(model, Mesh(data=4, fsdp=2), batch=6)


def test_constraints_stand_in_the_lowered_program():
    """On CPU as anywhere; on one device there is nothing to lay out."""

    def lowered(sharding):
        def f(x):
            with sharding.use():
                return constrain(x * 2, "batch", "mlp")

        return jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).as_text()

    assert "sharding_constraint" in lowered(sharding())
    assert "sharding_constraint" not in lowered(Sharding(Mesh().build(jax.devices()[:1]), RULES))
    assert constrain(jnp.ones(3), "batch") is not None  # outside of any rules it is the identity


def test_constraints_need_a_name_for_every_dimension():
    with pytest.raises(ValueError, match="2 names"), sharding().use():
        constrain(jnp.ones((8, 8, 8)), "batch", "mlp")
