"""GPT in float64 NumPy, written from the papers and not from jaxgen: a sequence at a time, a head at a time."""

import math

import numpy as np


def norm(x, p, kind, epsilon):
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
        variance = (x**2).mean(-1, keepdims=True)
    else:
        variance = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(variance + epsilon) * p["scale"] + p.get("bias", 0.0)


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


ACTIVATIONS = {
    "gelu": gelu, "gelu_exact": gelu_exact, "relu": lambda x: np.maximum(x, 0), "silu": silu, "geglu": gelu,
    "swiglu": silu, "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}  # fmt: skip


def feed_forward(x, p, activation):
    act = ACTIVATIONS[activation]
    if activation in ("geglu", "swiglu"):
        return dense(act(dense(x, p["gate"])) * dense(x, p["up"]), p["down"])
    return dense(act(dense(x, p["up"])), p["down"])


def frequencies(rope, size):
    """One wave at a time, as Llama 3.1's release states it."""
    found = []
    for i in range(size // 2):
        f = 1.0 / rope.theta ** (2 * i / size)
        wavelength = 2 * math.pi / f
        if rope.scaling == "linear":
            f = f / rope.factor
        elif rope.scaling == "llama3":
            if wavelength > rope.original_length / rope.low_frequency:
                f = f / rope.factor
            elif wavelength >= rope.original_length / rope.high_frequency:
                smooth = (rope.original_length / wavelength - rope.low_frequency) / (
                    rope.high_frequency - rope.low_frequency
                )
                f = (1 - smooth) * f / rope.factor + smooth * f
        found.append(f)
    return np.array(found)


def rotate(x, positions, rope):
    """x: (L, D), whose feature i is the real and i + D/2 the imaginary part of a number that is turned."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * positions[:, None] * frequencies(rope, x.shape[-1]))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(x, p, model, window, segments, positions):
    length, size = len(x), model.key_dim
    query, key, value = (
        np.einsum("le,ehd->hld", x, p[name]["kernel"])
        + (p[name]["bias"][:, None] if "bias" in p[name] else 0.0)
        for name in ("query", "key", "value")
    )
    if model.qk_norm:
        query = norm(query, p["query_norm"], "rmsnorm", model.norm_epsilon)
        key = norm(key, p["key_norm"], "rmsnorm", model.norm_epsilon)
    group, out = len(query) // len(key), 0.0
    for h in range(len(query)):
        q, k, v = query[h], key[h // group], value[h // group]
        if model.positions == "rope":
            q, k = rotate(q, positions, model.rope), rotate(k, positions, model.rope)
        scores = q @ k.T / math.sqrt(size)
        if model.attention_cap:
            scores = model.attention_cap * np.tanh(scores / model.attention_cap)
        for i in range(length):
            for j in range(length):
                if j > i or (window and i - j >= window) or (segments is not None and segments[i] != segments[j]):
                    scores[i, j] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = out + weights / weights.sum(-1, keepdims=True) @ v @ p["out"]["kernel"][h]
    return out + p["out"].get("bias", 0.0)


def gpt(model, params, tokens, segments=None, positions=None):
    """(B, L) tokens to (B, L, V) logits."""
    return np.stack(
        [
            _sequence(model, params, t, None if segments is None else segments[i],
                      np.arange(len(t)) if positions is None else positions[i])
            for i, t in enumerate(tokens)
        ]
    )  # fmt: skip


def _sequence(model, p, tokens, segments, positions):
    table = p["token_embedding"]["embedding"]
    x = table[tokens]
    if model.positions == "learned":
        x = x + p["position_embedding"]["embedding"][positions]
    for i in range(model.depth):
        b = _layer(p["blocks"], i)
        window = model.windows[i % len(model.windows)]
        h = norm(x, b["attention_norm"], model.norm, model.norm_epsilon)
        x = x + attention(h, b["attention"], model, window, segments, positions)
        h = norm(x, b["mlp_norm"], model.norm, model.norm_epsilon)
        x = x + feed_forward(h, b["mlp"], model.activation)
    x = norm(x, p["final_norm"], model.norm, model.norm_epsilon)
    logits = x @ (table.T if model.tied else p["head"]["kernel"])
    return model.logit_cap * np.tanh(logits / model.logit_cap) if model.logit_cap else logits


def _layer(tree, i):
    return {k: _layer(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]
