"""Digits as strokes: five fonts of straight lines and arcs.

Every digit lies within x from -0.6 to 0.6 and y from -1 to 1 (downwards).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float, Float32

Point = tuple[float, float]
Stroke = tuple[Point, ...]

HALF_WIDTH = 0.17  # of a stroke, where nothing else is said


def _arc(x: float, y: float, rx: float, ry: float, begin: float, end: float, power: float = 2.0) -> Stroke:
    """Of an ellipse (power 2) or a rounder box (more), in degrees from the right, clockwise on the screen."""
    count = max(int(abs(end - begin) / 24), 3)
    points = []
    for k in range(count + 1):
        a = math.radians(begin + (end - begin) * k / count)
        c, s = math.cos(a), math.sin(a)
        e = 2 / power
        points.append((x + rx * math.copysign(abs(c) ** e, c), y + ry * math.copysign(abs(s) ** e, s)))
    return tuple(points)


def _line(*points: Point) -> Stroke:
    return points


def _round() -> dict[int, tuple[Stroke, ...]]:
    """A geometric sans serif."""
    return {
        0: (_arc(0, 0, 0.55, 0.95, 0, 360),),
        1: (_line((-0.35, -0.55), (0.1, -0.95), (0.1, 0.95)),),
        2: (_arc(0, -0.45, 0.5, 0.5, 190, 385) + ((-0.55, 0.95), (0.55, 0.95)),),
        3: (_arc(-0.02, -0.47, 0.48, 0.48, 205, 450), _arc(-0.02, 0.47, 0.54, 0.48, -90, 150)),
        4: (_line((0.55, 0.4), (-0.6, 0.4), (0.25, -0.95), (0.25, 0.95)),),
        5: (_line((0.5, -0.95), (-0.4, -0.95), (-0.45, -0.1)) + _arc(-0.02, 0.35, 0.55, 0.6, 225, 500),),
        6: (_arc(0.5, 0.35, 1.05, 1.3, 270, 185), _arc(0, 0.4, 0.55, 0.55, 0, 360)),
        7: (_line((-0.55, -0.95), (0.55, -0.95), (-0.15, 0.95)),),
        8: (_arc(0, -0.5, 0.42, 0.45, 0, 360), _arc(0, 0.45, 0.53, 0.5, 0, 360)),
        9: (_arc(0, -0.4, 0.55, 0.55, 0, 360), _arc(-0.5, -0.35, 1.05, 1.3, 5, 90)),
    }


def _segments() -> dict[int, tuple[Stroke, ...]]:
    """Seven segments, as on a pocket calculator."""
    l, r, t, m, b = -0.5, 0.5, -0.95, 0.0, 0.95
    parts = {
        "a": ((l, t), (r, t)), "b": ((r, t), (r, m)), "c": ((r, m), (r, b)), "d": ((l, b), (r, b)),
        "e": ((l, m), (l, b)), "f": ((l, t), (l, m)), "g": ((l, m), (r, m)),
    }  # fmt: skip
    lit = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
    return {digit: tuple(_line(*parts[p]) for p in names) for digit, names in enumerate(lit)}


def _hand() -> dict[int, tuple[Stroke, ...]]:
    """As written by hand: a crossed seven, an open four, a looped two, one stroke where one will do."""
    return {
        0: (_arc(0.02, 0, 0.5, 0.92, -75, 275),),
        1: (_line((0.08, -0.95), (-0.08, 0.95)),),
        2: (
            _arc(-0.02, -0.5, 0.45, 0.45, 200, 370)
            + ((0.1, 0.35), (-0.35, 0.85), (-0.52, 0.8), (-0.45, 0.6), (-0.2, 0.68), (0.2, 0.9), (0.58, 0.82)),
        ),
        3: (_arc(-0.08, -0.52, 0.45, 0.4, 215, 430) + _arc(-0.12, 0.42, 0.6, 0.52, 280, 505),),
        4: (_line((-0.25, -0.95), (-0.5, 0.12), (0.55, 0.05)), _line((0.3, -0.55), (0.15, 0.95))),
        5: (
            _line((-0.3, -0.9), (-0.42, -0.15)) + _arc(-0.1, 0.35, 0.52, 0.55, 255, 490),
            _line((-0.3, -0.9), (0.5, -0.95)),
        ),
        6: (
            _line((0.35, -0.95), (0.0, -0.65), (-0.3, -0.2), (-0.45, 0.35)) + _arc(-0.02, 0.48, 0.43, 0.44, 190, -130),
        ),
        7: (_line((-0.5, -0.8), (0.5, -0.9), (-0.1, 0.95)), _line((-0.3, 0.1), (0.45, 0.0))),
        8: (
            _line((0.4, -0.75), (0.0, -0.95), (-0.4, -0.65), (-0.2, -0.25), (0.3, 0.1), (0.45, 0.55), (0.05, 0.92),
                  (-0.4, 0.6), (-0.25, 0.15), (0.3, -0.35), (0.4, -0.75)),
        ),
        9: (_arc(-0.05, -0.48, 0.45, 0.45, -20, -350) + ((0.38, -0.2), (0.3, 0.4), (0.1, 0.95)),),
    }  # fmt: skip


def _angular() -> dict[int, tuple[Stroke, ...]]:
    """Straight lines with cut corners, as on a scoreboard or a jersey; the one has a foot."""
    l, r, t, b, c = -0.52, 0.52, -0.95, 0.95, 0.3
    ring = _line((l + c, t), (r - c, t), (r, t + c), (r, b - c), (r - c, b), (l + c, b), (l, b - c), (l, t + c),
                 (l + c, t))  # fmt: skip
    return {
        0: (ring,),
        1: (_line((-0.3, -0.65), (0.0, t), (0.0, b)), _line((-0.4, b), (0.4, b))),
        2: (_line((l, t + c), (l + c, t), (r - c, t), (r, t + c), (r, -0.2), (l, b), (r, b)),),
        3: (
            _line((l, t), (r, t), (0.0, -0.2), (r - c, -0.2), (r, 0.1), (r, b - c), (r - c, b), (l + c, b), (l, b - c)),
        ),
        4: (_line((-0.3, t), (l, 0.35), (r, 0.35)), _line((0.2, -0.3), (0.2, b))),
        5: (_line((r, t), (l, t), (l, -0.2), (r - c, -0.2), (r, 0.1), (r, b - c), (r - c, b), (l, b)),),
        6: (
            _line((r, t + 0.1), (r - c, t), (l + c, t), (l, t + c), (l, b - c), (l + c, b), (r - c, b), (r, b - c),
                  (r, 0.15), (r - c, -0.1), (l, -0.1)),
        ),
        7: (_line((l, t + 0.3), (l, t), (r, t), (r, -0.6), (-0.1, 0.3), (-0.1, b)),),
        8: (
            _line((l + c, 0.0), (l, -0.3), (l, t + c), (l + c, t), (r - c, t), (r, t + c), (r, -0.3), (r - c, 0.0),
                  (r, 0.3), (r, b - c), (r - c, b), (l + c, b), (l, b - c), (l, 0.3), (l + c, 0.0), (r - c, 0.0)),
        ),
        9: (
            _line((l, b - 0.1), (l + c, b), (r - c, b), (r, b - c), (r, t + c), (r - c, t), (l + c, t), (l, t + c),
                  (l, -0.15), (l + c, 0.1), (r, 0.1)),
        ),
    }  # fmt: skip


def _text() -> dict[int, tuple[Stroke, ...]]:
    """Old-style book figures: small bowls, flat feet, curved tails, and a nought that is wider than high."""
    return {
        0: (_arc(0, 0, 0.58, 0.68, 0, 360, 2.6),),
        1: (_line((-0.3, -0.7), (0.0, -0.9), (0.0, 0.9)), _line((-0.35, 0.9), (0.35, 0.9))),
        2: (_arc(-0.05, -0.45, 0.45, 0.45, 170, 400) + ((-0.2, 0.5), (-0.5, 0.85), (0.5, 0.85), (0.55, 0.6)),),
        3: (_line((-0.45, -0.9), (0.45, -0.9), (-0.1, -0.25)) + _arc(-0.1, 0.35, 0.58, 0.58, -80, 145),),
        4: (_line((0.15, 0.95), (0.15, -0.95), (-0.6, 0.45), (0.6, 0.45)), _line((-0.1, 0.95), (0.4, 0.95))),
        5: (
            _line((0.4, -0.65), (0.45, -0.95), (-0.3, -0.95), (-0.38, -0.2)) + _arc(-0.08, 0.32, 0.52, 0.6, 240, 480),
        ),
        6: (_arc(0.55, 0.25, 1.1, 1.2, 265, 190) + _arc(0, 0.42, 0.55, 0.5, 180, -180, 2.4),),
        7: (_line((-0.5, -0.6), (-0.5, -0.9), (0.5, -0.9)) + _arc(0.75, 0.95, 0.85, 1.7, 255, 180),),
        8: (_arc(0, -0.48, 0.38, 0.42, 0, 360, 2.4), _arc(0, 0.42, 0.56, 0.48, 0, 360, 2.4)),
        9: (_arc(0, -0.42, 0.55, 0.5, 0, 360, 2.4), _arc(-0.55, -0.25, 1.1, 1.2, 10, 80)),
    }  # fmt: skip


FONTS: tuple[dict[int, tuple[Stroke, ...]], ...] = (_round(), _segments(), _hand(), _angular(), _text())


@functools.cache
def segments(font: int, digit: int) -> Float32[np.ndarray, "N 4"]:
    """The straight pieces (x, y, x', y') of a digit."""
    pieces = [(*a, *b) for stroke in FONTS[font][digit] for a, b in zip(stroke, stroke[1:], strict=False)]
    return np.asarray(pieces, np.float32)


def distance(font: int, digit: int, x: Float[np.ndarray, "1 w"], y: Float[np.ndarray, "h 1"],
             half_width: float = HALF_WIDTH) -> Float[np.ndarray, "h w"]:
    """Signed distance of points from the outline of a digit's strokes, negative inside."""
    x, y = np.broadcast_arrays(x, y)
    return np.sqrt(squared_distance(segments(font, digit), x.ravel(), y.ravel())).reshape(x.shape) - half_width


def squared_distance(pieces: Float[np.ndarray, "N 4"], x: Float[np.ndarray, " P"],
                     y: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    """From each point to the nearest of the straight pieces."""
    ax, ay, bx, by = pieces.T[:, :, None]
    dx, dy = bx - ax, by - ay
    px, py = x[None] - ax, y[None] - ay
    t = np.clip((px * dx + py * dy) / np.maximum(dx * dx + dy * dy, 1e-9), 0, 1)
    px -= t * dx
    py -= t * dy
    return np.min(px * px + py * py, axis=0)


