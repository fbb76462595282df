"""DiT and U-Net in float64 NumPy, written from the papers and not from jaxgen: a picture at a time, a head at a time.
Parameters are trees named as jaxgen's."""

import math

import numpy as np
from reference import dense, feed_forward, gelu_exact, norm, silu
from vision_reference import attend, conv, cut, layer, turning


def waves(number, count, shift=0):
    half = count // 2
    angles = [number * 10_000 ** (-i / (half - shift)) for i in range(half)]
    return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def told_of(model, p, label, periods, classes=None, pooled=None, sizes=None, shift=0):
    def mlp(x, name):
        return dense(silu(dense(x, p[f"{name}_in"])), p[f"{name}_out"])

    told = mlp(waves(label, periods, shift), "time")
    if model.classes:
        told = told + p["classes"]["embedding"][model.classes if classes is None else classes]
    parts = [] if pooled is None else [pooled]
    parts += [] if sizes is None else [waves(size, model.size_periods) for size in sizes]
    return silu(told + mlp(np.concatenate(parts), "pooled")) if parts else silu(told)


def places(row, column, width):
    """MAE's sines and cosines, a number at a time."""
    quarter, out = width // 4, []
    for at, function in ((column, math.sin), (column, math.cos), (row, math.sin), (row, math.cos)):
        out += [function(at / 10_000 ** (i / quarter)) for i in range(quarter)]
    return np.array(out)


def dit(model, p, x, label, classes=None, tokens=None, mask=None, pooled=None, image=None):
    """(H, W, C) to (H, W, out); tokens of the text that are not there are left out."""
    if image is not None:
        x = np.concatenate([x, image], -1)
    rows, columns, x = cut(x, model.patch)
    at = np.array([(r, c) for r in range(rows) for c in range(columns)])
    x, before = dense(x, p["patch_embedding"]), 0
    if model.positions == "sincos":
        x = x + np.stack([places(r, c, model.width) for r, c in at])
    if tokens is not None:
        tokens = tokens if mask is None else tokens[mask]
        x, before = np.concatenate([dense(tokens, p["text_embedding"]), x]), len(tokens)
    turn = None
    if model.positions == "rope":
        turn = turning(np.concatenate([np.zeros((before, 2)), at]), model.rope.theta)
    told = told_of(model, p["told"], label, model.periods, classes, pooled, shift=model.period_shift)

    def modulated(x, shift, scale):
        return norm(x, {"scale": 1 + scale, "bias": shift}, model.norm, model.norm_epsilon)

    def vectors(p, count):
        return [told @ p["kernel"][:, i] + p["bias"][i] for i in range(count)]

    for i in range(model.depth):
        b = layer(p["blocks"], i)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors(b["modulation"], 6)
        h = modulated(x, shift1, scale1)
        x = x + gate1 * attend(h, h, b["attention"], turn, model.norm_epsilon if model.qk_norm else None)
        x = x + gate2 * feed_forward(modulated(x, shift2, scale2), b["mlp"], model.activation)
    out = dense(modulated(x[before:], *vectors(p["final_modulation"], 2)), p["head"])
    picture, size = np.zeros((rows * model.patch, columns * model.patch, model.out)), model.patch
    for (r, c), values in zip(at, out, strict=True):
        picture[r * size : (r + 1) * size, c * size : (c + 1) * size] = values.reshape(size, size, model.out)
    return picture


def unet(model, p, x, label, classes=None, tokens=None, mask=None, pooled=None, sizes=None, image=None):
    """(H, W, C) to (H, W, out); tokens of the text that are not there are left out."""
    if image is not None:
        x = np.concatenate([x, image], -1)
    if mask is not None:
        tokens = tokens[mask]
    told = told_of(model, p["told"], label, model.width, classes, pooled, sizes)

    def group_norm(x, p, epsilon=model.norm_epsilon):
        groups = x.reshape(*x.shape[:2], model.groups, -1)
        mean, var = (f(groups, axis=(0, 1, 3), keepdims=True) for f in (np.mean, np.var))
        return ((groups - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * p["scale"] + p["bias"]

    def convolved(x, p, stride=1):
        return conv(x, p, stride) + p["bias"]

    def residual(x, p):
        t = dense(told, p["told"])
        h = convolved(silu(group_norm(x, p["norm1"])), p["conv1"])
        if model.scale_shift:
            scale, shift = np.split(t, 2)
            h = group_norm(h, p["norm2"]) * (1 + scale) + shift
        else:
            h = group_norm(h + t, p["norm2"])
        h = convolved(silu(h), p["conv2"])
        return (convolved(x, p["skip"]) if "skip" in p else x) + h

    def look(name, x):
        flat = (-1, x.shape[-1])
        if (at := f"{name}_attention") in p:
            h = group_norm(x, p[at]["norm"]).reshape(flat)
            return x + attend(h, h, p[at]["attention"]).reshape(x.shape)
        if (at := f"{name}_text") not in p:
            return x
        h = dense(group_norm(x, p[at]["norm"], 1e-6).reshape(flat), p[at]["in"])
        for i in range(len(p[at]["blocks"]["mlp_norm"]["scale"])):
            b = layer(p[at]["blocks"], i)
            n = norm(h, b["attention_norm"], "layernorm", 1e-5)
            h = h + attend(n, n, b["attention"])
            if len(tokens):
                h = h + attend(norm(h, b["text_norm"], "layernorm", 1e-5), tokens, b["text_attention"])
            n = norm(h, b["mlp_norm"], "layernorm", 1e-5)
            h = h + dense(gelu_exact(dense(n, b["mlp"]["gate"])) * dense(n, b["mlp"]["up"]), b["mlp"]["down"])
        return x + dense(h, p[at]["out"]).reshape(x.shape)

    x, last = convolved(x, p["in"]), len(model.multipliers) - 1
    kept = [x]
    for level in range(last + 1):
        for i in range(model.blocks):
            x = look(f"down_{level}_{i}", residual(x, p[f"down_{level}_{i}"]))
            kept.append(x)
        if level < last:
            x = convolved(x, p[f"down_{level}"], 2)
            kept.append(x)
    x = residual(look("middle_0", residual(x, p["middle_0"])), p["middle_1"])
    for level in range(last, -1, -1):
        for i in range(model.blocks + 1):
            x = residual(np.concatenate([x, kept.pop()], -1), p[f"up_{level}_{i}"])
            x = look(f"up_{level}_{i}", x)
        if level:
            x = convolved(x.repeat(2, 0).repeat(2, 1), p[f"up_{level}"])
    return convolved(silu(group_norm(x, p["norm"])), p["out"])
