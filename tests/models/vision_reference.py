"""ViT, text tower and ResNet in float64 NumPy, written from the papers and not from jaxgen: a picture at a time, a head
at a time. Parameters are trees named as jaxgen's."""

import math

import numpy as np
from reference import dense, feed_forward, norm


def layer(tree, i):
    return {k: layer(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def attend(query, x, p, turn=None, qk_norm=None, seen=None):
    """Every head of `query` (L, E) over x (S, E); `seen` (L, S)."""
    out = p["out"].get("bias", 0.0)
    for h in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            y @ p[name]["kernel"][:, h] + (p[name]["bias"][h] if "bias" in p[name] else 0.0)
            for name, y in (("query", query), ("key", x), ("value", x))
        )
        if qk_norm is not None:
            q, k = norm(q, p["query_norm"], "rmsnorm", qk_norm), norm(k, p["key_norm"], "rmsnorm", qk_norm)
        if turn is not None:
            q, k = turn(q), turn(k)
        scores = q @ k.T / math.sqrt(q.shape[-1])
        if seen is not None:
            scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = out + weights / weights.sum(-1, keepdims=True) @ v @ p["out"]["kernel"][h]
    return out


def blocks(model, p, x, turn=None, seen=None):
    for i in range(model.depth):
        b = layer(p["blocks"], i)
        h = norm(x, b["attention_norm"], model.norm, model.norm_epsilon)
        x = x + attend(h, h, b["attention"], turn, model.norm_epsilon if model.qk_norm else None, seen)
        x = x + feed_forward(norm(x, b["mlp_norm"], model.norm, model.norm_epsilon), b["mlp"], model.activation)
    if getattr(model, "norm_pooled", False):
        return x
    return norm(x, p["final_norm"], model.norm, model.norm_epsilon)


def resampling(size, target):
    """(target, size): a row of pixels resized bilinearly with antialiasing, as PyTorch and Pillow define it."""
    scale, out = size / target, np.zeros((target, size))
    support = max(scale, 1.0)
    for i in range(target):
        centre = (i + 0.5) * scale
        for j in range(size):
            out[i, j] = max(0.0, 1.0 - abs(j + 0.5 - centre) / support)
        out[i] /= out[i].sum()
    return out


def sincos(row, column, width):
    """MoCo v3's, a number at a time."""
    quarter, out = width // 4, []
    for position, function in ((column, math.sin), (column, math.cos), (row, math.sin), (row, math.cos)):
        out += [function(position / 10_000 ** (i / (quarter - 1))) for i in range(quarter)]
    return np.array(out)


def turning(coordinates, theta):
    """Each head's first half turned by the row, its second by the column, as complex numbers."""

    def turn(x):
        halves = []
        for half, at in zip(np.split(x, 2, -1), coordinates.T, strict=True):
            n = half.shape[-1] // 2
            wave = np.array([theta ** (-i / n) for i in range(n)])
            z = (half[:, :n] + 1j * half[:, n:]) * np.exp(1j * at[:, None] * wave)
            halves += [z.real, z.imag]
        return np.concatenate(halves, -1)

    return turn


def cut(image, patch):
    """(rows, columns, patches a row at a time)."""
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    return rows, columns, np.stack([
        image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel()
        for r in range(rows) for c in range(columns)
    ])  # fmt: skip


def vit(model, p, patches, rows, columns):
    """(features before the head, result) of one picture's patches (N, P)."""
    at = np.array([(r, c) for r in range(rows) for c in range(columns)])
    x, extra = dense(patches, p["patch_embedding"]), []
    if model.positions == "learned":
        table = p["position_embedding"]["embedding"]
        table, side = table[len(table) - model.side**2 :].reshape(model.side, model.side, -1), model.side
        table = np.einsum("rg,gke->rke", resampling(side, rows), table)
        x = x + np.einsum("ck,rke->rce", resampling(side, columns), table).reshape(x.shape)
    if model.positions == "sincos":
        x = x + np.stack([sincos(r, c, model.width) for r, c in at])
    if model.pool == "class":
        first = p["position_embedding"]["embedding"][0] if model.positions == "learned" else 0.0
        extra.append((p["class_token"] + first)[None])
    if model.registers:
        extra.append(p["register_tokens"])
    x = np.concatenate([*extra, x])
    turn = None
    if model.positions == "rope":
        turn = turning(np.concatenate([np.zeros((len(x) - len(at), 2)), at]), model.rope.theta)
    if model.pre_norm:
        x = norm(x, p["embedding_norm"], model.norm, model.norm_epsilon)
    x = blocks(model, p, x, turn)
    if model.pool == "class":
        pooled = x[0]
    elif model.pool == "mean":
        pooled = x[model.registers :].mean(0)
        if model.norm_pooled:
            pooled = norm(pooled, p["final_norm"], model.norm, model.norm_epsilon)
    else:
        a = p["attention_pool"]
        h = attend(a["probe"][None], x[model.registers :], a)
        pooled = (h + feed_forward(norm(h, a["norm"], model.norm, model.norm_epsilon), a["mlp"], model.activation))[0]
    return pooled, dense(pooled, p["head"]) if model.out else pooled


def text(model, p, tokens, length):
    """The result of one caption (L,)."""
    place = np.arange(len(tokens))
    x = p["token_embedding"]["embedding"][tokens] + p["position_embedding"]["embedding"][: len(tokens)]
    seen = np.ones((len(tokens), len(tokens)), bool)
    if model.mask == "causal":
        seen = place[None] <= place[:, None]
    elif model.pool != "final":
        seen = seen & (place < length)[None]
    x = blocks(model, p, x, seen=seen)
    pooled = {"last": x[length - 1], "final": x[-1], "first": x[0], "mean": x[:length].mean(0)}[model.pool]
    return dense(pooled, p["head"]) if model.out else pooled


# ---- residual networks ----


def conv(x, p, stride=1, standardize=False):
    """A place at a time."""
    kernel = p["kernel"]
    if standardize:
        kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-8)
    size = len(kernel)
    pad = (size - 1) // 2
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    return np.stack([
        np.stack([
            np.einsum("ijc,ijcf->f", x[r : r + size, c : c + size], kernel)
            for c in range(0, x.shape[1] - size + 1, stride)
        ])
        for r in range(0, x.shape[0] - size + 1, stride)
    ])  # fmt: skip


def pool(x, border):
    """3 x 3 maxima with stride 2."""
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=border)
    return np.stack([
        np.stack([x[r : r + 3, c : c + 3].max((0, 1)) for c in range(0, x.shape[1] - 2, 2)])
        for r in range(0, x.shape[0] - 2, 2)
    ])  # fmt: skip


def resnet(model, p, image, statistics=None):
    """The result of one picture; `statistics` are those of batch norm."""
    bit = model.form == "bit"

    def norm(x, p, s=None):
        if bit:
            groups = x.reshape(*x.shape[:2], model.groups, -1)
            mean, var = (f(groups, axis=(0, 1, 3), keepdims=True) for f in (np.mean, np.var))
            x = ((groups - mean) / np.sqrt(var + model.norm_epsilon)).reshape(x.shape)
        else:
            x = (x - s["mean"]) / np.sqrt(s["var"] + model.norm_epsilon)
        return x * p["scale"] + p["bias"]

    def relu(x):
        return np.maximum(x, 0)

    s = statistics or {}
    x = conv(image, p["stem"], 1 if model.small else 2, bit)
    x = x if bit else relu(norm(x, p["stem_norm"], s["stem_norm"]))
    x = x if model.small else pool(x, 0.0 if bit else -np.inf)
    for name in sorted((n for n in p if "_block" in n), key=lambda n: [int(part[5:]) for part in n.split("_")]):
        b, sb = p[name], s.get(name, {})
        count = sum(n.startswith("conv") for n in b)
        strides = [1] * count
        strides[1 if count == 3 else 0] = 2 if name.endswith("_block1") and not name.startswith("stage1") else 1
        h, short = x, x
        if bit:
            for i, stride in enumerate(strides, 1):
                h = relu(norm(h, b[f"norm{i}"]))
                if i == 1 and "shortcut" in b:
                    short = conv(h, b["shortcut"], max(strides), True)
                h = conv(h, b[f"conv{i}"], stride, True)
            x = h + short
        else:
            for i, stride in enumerate(strides, 1):
                h = norm(conv(h, b[f"conv{i}"], stride), b[f"norm{i}"], sb[f"norm{i}"])
                h = relu(h) if i < count else h
            if "shortcut" in b:
                short = norm(conv(x, b["shortcut"], max(strides)), b["shortcut_norm"], sb["shortcut_norm"])
            x = relu(h + short)
    x = relu(norm(x, p["final_norm"])) if bit else x
    x = x.mean((0, 1))
    return dense(x, p["head"]) if model.out else x
