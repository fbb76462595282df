"""Rules for the layers that many models share."""

from collections.abc import Iterable, Mapping

from jaxgen.interop.names import LINEAR, Rule

HEADS = "(h d) e -> e h d"
JOINT = "(n h d) e -> n e h d"   # query, key and value in one


def linear(theirs: str, ours: str, layout: str = LINEAR) -> list[Rule]:
    """`Linear`, which theirs calls weight and bias."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", layout), Rule(f"{theirs}.bias", f"{ours}/bias")]


def norm(theirs: str, ours: str) -> list[Rule]:
    """`Norm`."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def attention(ours: str, query: str, key: str, value: str, out: str) -> list[Rule]:
    """The projections of attention, each of its own."""
    rules = []
    for theirs, name in ((query, "query"), (key, "key"), (value, "value")):
        rules += [Rule(f"{theirs}.weight", f"{ours}/{name}/kernel", HEADS),
                  Rule(f"{theirs}.bias", f"{ours}/{name}/bias", "(h d) -> h d")]  # fmt: skip
    return rules + attention_out(ours, out)


def joint_attention(ours: str, weight: str, bias: str, out: str, parts: Iterable[str] = ("query", "key", "value")
                    ) -> list[Rule]:  # fmt: skip
    """The projections of attention, several in one matrix."""
    names = tuple(parts)
    return [
        Rule(weight, tuple(f"{ours}/{name}/kernel" for name in names), JOINT),
        Rule(bias, tuple(f"{ours}/{name}/bias" for name in names), "(n h d) -> n h d"),
        *attention_out(ours, out),
    ]


def attention_out(ours: str, theirs: str) -> list[Rule]:
    return linear(theirs, f"{ours}/out", "e (h d) -> h d e")


def mlp(ours: str, up: str, down: str) -> list[Rule]:
    """A feed-forward layer without a gate."""
    return [*linear(up, f"{ours}/up"), *linear(down, f"{ours}/down")]


def block(theirs: str, ours: str, names: Mapping[str, str]) -> list[Rule]:
    """The pre-norm block of a stack; `names` are what theirs calls its parts."""
    at = {key: f"{theirs}{name}" for key, name in names.items()}
    if "joint" in names:
        attend = joint_attention(f"{ours}/attention", at["joint"], at["joint_bias"], at["out"])
    else:
        attend = attention(f"{ours}/attention", at["query"], at["key"], at["value"], at["out"])
    return [
        *norm(at["attention_norm"], f"{ours}/attention_norm"), *attend,
        *norm(at["mlp_norm"], f"{ours}/mlp_norm"), *mlp(f"{ours}/mlp", at["up"], at["down"]),
    ]  # fmt: skip


# What the parts of a block are called.
CLIP = dict(
    attention_norm="layer_norm1", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
    out="self_attn.out_proj", mlp_norm="layer_norm2", up="mlp.fc1", down="mlp.fc2",
)  # fmt: skip
VIT = dict(
    attention_norm="layernorm_before", query="attention.attention.query", key="attention.attention.key",
    value="attention.attention.value", out="attention.output.dense", mlp_norm="layernorm_after",
    up="intermediate.dense", down="output.dense",
)  # fmt: skip
TIMM = dict(
    attention_norm="norm1", joint="attn.qkv.weight", joint_bias="attn.qkv.bias", out="attn.proj", mlp_norm="norm2",
    up="mlp.fc1", down="mlp.fc2",
)  # fmt: skip
OPEN_CLIP = dict(
    attention_norm="ln_1", joint="attn.in_proj_weight", joint_bias="attn.in_proj_bias", out="attn.out_proj",
    mlp_norm="ln_2", up="mlp.c_fc", down="mlp.c_proj",
)  # fmt: skip
