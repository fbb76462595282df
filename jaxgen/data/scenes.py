"""Captioned scenes: an endless source of small pictures of coloured shapes whose every fact is known.

A scene is drawn from a random generator, says its own caption exactly, and gives from the same facts questions with
answers, an edit with its instruction, masks and short clips. Three levels:

1. one object, in one of five places: "a red ring in the top left corner";
2. two groups of one to three objects and their relation: "two red squares left of a blue cross";
3. sizes, textures and digits besides: "three small striped red rings above a large yellow 7" (64 pixels or more).

What is trained on leaves out two kinds of scenes, which are the two held-out splits. `unseen`: one in six pairs of
shape and colour never occurs in training, and here every object is of such a pair. `recombined`: of the full tuples of
facts without such pairs a tenth is held out, so that every pair is known and the whole is new. "A left of B" and "B
right of A" are one tuple.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxgen.data import cache as caching
from jaxgen.data import glyphs
from jaxgen.data.base import Data, Progress
from jaxgen.data.imagetext import Captions, View
from jaxgen.data.tokenizers import Tokenizer, TokenizerConfig, Words
from jaxgen.errors import UserError

if TYPE_CHECKING:
    import grain
    import jax

VERSION = 1  # counts up when the same seed would give other scenes

SHAPES = ("square", "triangle", "cross", "ring")  # unlike one another in few pixels
DIGITS = tuple("0123456789")  # shapes of level 3 besides
BRIGHT = 240  # the brightest channel of every colour and of white: what stands out of the background reads off it
COLOURS = {
    "red": (240, 40, 40), "green": (30, 240, 60), "blue": (50, 80, 240),
    "yellow": (240, 220, 30), "cyan": (40, 220, 240), "purple": (190, 40, 240),
}  # fmt: skip
WHITE = (240, 240, 240)  # the second colour of textures
COUNTS = ("a", "two", "three")  # "a" is one
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STEPS = tuple(0.02 * k for k in range(1, 26))  # how far something may move in a clip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {
    "in the middle": (0.5, 0.5), "in the top left corner": (0.25, 0.25), "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75), "in the bottom right corner": (0.75, 0.75),
}  # fmt: skip
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "checked")  # "plain" is left unsaid
KINDS = ("shape", "colour", "count", "size", "texture", "relation", "place")
LEVELS = (1, 2, 3)
SPLITS = ("train", "recombined", "unseen")
EDITS = 1 + len(SPLITS)  # number of the generator of edits, after those of the scenes
Split = Literal["train", "recombined", "unseen"]

# In units of the picture's side.
MARGIN, GAP = 0.015, 0.06  # kept free at the border, and between two objects at least
CLEAR = 0.1  # by which two groups' centres are farther apart along the axis of their relation than across it
RADII = {"": {1: (0.12, 0.17), 2: (0.12, 0.16), 3: (0.12, 0.135)}, "small": {}, "large": {}}
RADII["small"] = dict.fromkeys((1, 2, 3), (0.078, 0.09))
RADII["large"] = dict.fromkeys((1, 2, 3), (0.12, 0.135))


# --- facts ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    """Objects that are alike."""

    shape: str
    colour: str
    count: int = 1
    size: str = ""  # level 3
    texture: str = ""  # level 3

    @property
    def name(self) -> str:
        """Without the count: "small striped red rings"."""
        texture = "" if self.texture == "plain" else self.texture
        return " ".join(w for w in (self.size, texture, self.colour, plural(self.shape, self.count)) if w)

    def __str__(self) -> str:
        return f"{COUNTS[self.count - 1]} {self.name}"


def plural(shape: str, count: int = 2) -> str:
    """The noun of so many objects."""
    return shape if count == 1 else shape + ("es" if shape.endswith("s") else "s")


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that a caption says.

    Attributes:
      groups: one at level 1, two else.
      relation: of the first group to the second.
      place: of the only object, at level 1.
    """

    groups: tuple[Group, ...]
    relation: str = ""
    place: str = ""

    @property
    def level(self) -> int:
        return 1 if self.place else 3 if self.groups[0].size else 2

    def canonical(self) -> Facts:
        """The one of the two ways to say the same that uses "left of" or "above"."""
        if self.relation in ("right of", "below"):
            return Facts(self.groups[::-1], OPPOSITE[self.relation])
        return self

    @functools.cached_property
    def split(self) -> Split | None:
        """Where scenes of these facts belong; None, nowhere, for those with a pair of each kind."""
        unseen = [is_unseen(group.shape, group.colour) for group in self.groups]
        if any(unseen):
            return "unseen" if all(unseen) else None
        digest = hashlib.sha256(caption(self.canonical()).encode()).digest()
        return "recombined" if int.from_bytes(digest[:4], "big") < 2**32 // 10 else "train"

    def get(self, kind: str, group: int) -> str | int:
        return getattr(self.groups[group] if kind in _OF_GROUPS else self, kind)

    def replace(self, kind: str, group: int, value: Any) -> Facts:
        """With another value for one fact; the group does not matter for relation and place."""
        if kind not in _OF_GROUPS:
            return dataclasses.replace(self, **{kind: value})
        groups = list(self.groups)
        groups[group] = dataclasses.replace(groups[group], **{kind: value})
        return dataclasses.replace(self, groups=tuple(groups))


_OF_GROUPS = ("shape", "colour", "count", "size", "texture")


def shapes(level: int) -> tuple[str, ...]:
    return SHAPES + DIGITS if level == 3 else SHAPES


def is_unseen(shape: str, colour: str) -> bool:
    """Whether a pair never occurs in training: one colour of each shape, another for each of the first six."""
    return (shapes(3).index(shape) + list(COLOURS).index(colour)) % len(COLOURS) == 0


def choices(kind: str, level: int) -> tuple[str | int, ...]:
    """The values that a kind of fact can have."""
    return {
        "shape": shapes(level), "colour": tuple(COLOURS), "count": (1, 2, 3), "size": SIZES, "texture": TEXTURES,
        "relation": RELATIONS, "place": tuple(PLACES),
    }[kind]  # fmt: skip


def questioned(facts: Facts) -> Iterator[tuple[str, int]]:
    """(kind, group) of each fact that could be otherwise: the texture of a digit could not."""
    for number, group in enumerate(facts.groups):
        yield from (("shape", number), ("colour", number))
        if facts.level > 1:
            yield "count", number
        if facts.level == 3:
            yield "size", number
            if group.shape in SHAPES:
                yield "texture", number
    yield ("place" if facts.level == 1 else "relation"), 0


def alternatives(facts: Facts) -> list[tuple[str, int, tuple[Facts, ...]]]:
    """For each fact (kind, group, facts with every other value of it)."""
    found = []
    for kind, group in questioned(facts):
        own = facts.get(kind, group)
        others = [v for v in choices(kind, facts.level) if v != own]
        found.append((kind, group, tuple(facts.replace(kind, group, v) for v in others)))
    return found


def caption(of: Facts | Scene) -> str:
    """The sentence that says all facts and nothing else; `parse` reads it back."""
    facts = of.facts if isinstance(of, Scene) else of
    if facts.place:
        return f"{facts.groups[0]} {facts.place}"
    first, second = facts.groups
    return f"{first} {facts.relation} {second}"


@functools.cache
def _grammar() -> tuple[re.Pattern, re.Pattern]:
    group = (
        rf"(?P<count>{'|'.join(COUNTS)})(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<texture>{'|'.join(TEXTURES[1:])}))?"
        rf" (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(shapes(3))})(?:e?s)?"
    )
    whole = re.compile(rf"(.+?) ({'|'.join(RELATIONS)}) (.+)|(.+?) ({'|'.join(PLACES)})")
    return whole, re.compile(group)


def parse(text: str) -> Facts:
    """The facts of a caption. Raises ValueError for a sentence that `caption` never says."""
    whole, group = _grammar()

    def read(part: str) -> Group:
        match = group.fullmatch(part)
        if not match:
            raise ValueError(f"'{part}' is no group of objects")
        found = match.groupdict()
        size, texture = found["size"] or "", found["texture"] or ("plain" if found["size"] else "")
        return Group(found["shape"], found["colour"], COUNTS.index(found["count"]) + 1, size, texture)

    match = whole.fullmatch(text)
    if not match:
        raise ValueError(f"'{text}' is no caption of a scene")
    first, relation, second, only, place = match.groups()
    facts = Facts((read(only),), place=place) if place else Facts((read(first), read(second)), relation)
    if caption(facts) != text:
        raise ValueError(f"'{text}' is no caption of a scene")
    return facts


# --- scenes --------------------------------------------------------------------------------------------------------


Spot = tuple[float, float, float]  # x, y, radius


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is where. Lengths are in units of the picture's side, y downwards.

    Attributes:
      objects: (x, y, radius) of each object, by group.
      background: its grey, 0 to 255.
    """

    facts: Facts
    objects: tuple[tuple[Spot, ...], ...]
    background: float


@functools.cache
def _pairs(level: int, unseen: bool) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Pairs of shape and colour to draw from; at level 3 digits are as frequent as shapes."""
    kinds = (SHAPES, DIGITS) if level == 3 else (SHAPES,)
    return tuple(tuple((s, c) for s in kind for c in COLOURS if is_unseen(s, c) == unseen) for kind in kinds)


def sample(rng: np.random.Generator, level: int = 2, split: Split = "train") -> Scene:
    """A scene of a level and split; below level 3 every caption is equally likely."""
    pairs = _pairs(level, split == "unseen")
    while True:
        facts = _draw(rng.random(16).tolist(), level, pairs)
        if facts is not None and facts.split == split:
            return _arrange(rng, facts)


def _draw(draws: list[float], level: int, pairs: Sequence[Sequence[tuple[str, str]]]) -> Facts | None:
    def pick(values: Sequence) -> Any:
        return values[int(draws.pop() * len(values))]

    if level == 1:
        return Facts((Group(*pick(pairs[0])),), place=pick(tuple(PLACES)))
    first, second = pick(pick(pairs)), pick(pick(pairs))
    if first == second:
        return None
    groups = []
    for shape, colour in (first, second):
        extra = (pick(SIZES), pick(TEXTURES) if shape in SHAPES else "plain") if level == 3 else ()
        groups.append(Group(shape, colour, pick((1, 2, 3)), *extra))
    return Facts(tuple(groups), pick(RELATIONS))


def _arrange(rng: np.random.Generator, facts: Facts) -> Scene:
    """Puts the objects somewhere: no two touch, and one relation alone is true."""
    background = 12 + 36 * rng.random()
    while True:
        objects = tuple(_spots(rng, facts, number) for number in range(len(facts.groups)))
        if _is_clear(scene := Scene(facts, objects, background)):
            return scene


def _spots(rng: np.random.Generator, facts: Facts, number: int) -> tuple[Spot, ...]:
    """Places for one group: in its half of the picture, in a row along the line that divides the halves."""
    group = facts.groups[number]
    least, most = RADII[group.size][group.count]
    draws = rng.random(8).tolist()
    radius = least + (most - least) * draws.pop()
    if facts.place:
        x, y = PLACES[facts.place]
        return ((x + 0.1 * (draws.pop() - 0.5), y + 0.1 * (draws.pop() - 0.5), radius),)
    first = (facts.relation in ("left of", "above")) == (number == 0)  # this group is in the left or upper half
    low, high = MARGIN + radius, 0.5 - GAP / 2 - radius
    step = 2 * radius + GAP
    slack = min(1 - 2 * low - (group.count - 1) * step, 0.4)
    begin = 0.5 - (slack + (group.count - 1) * step) / 2
    spots = []
    for k, share in enumerate(sorted(draws[: group.count])):
        along, across = begin + k * step + slack * share, low + (high - low) * draws.pop()
        across = across if first else 1 - across
        spots.append((along, across, radius) if facts.relation in ("above", "below") else (across, along, radius))
    return tuple(spots)


def _is_clear(scene: Scene) -> bool:
    """Whether all objects are inside and apart, and the relation is true and the other axis's is not."""
    spots = [spot for group in scene.objects for spot in group]
    for k, (x, y, radius) in enumerate(spots):
        low = MARGIN + radius - 1e-9
        if not (low <= x <= 1 - low and low <= y <= 1 - low):
            return False
        for other_x, other_y, other_radius in spots[:k]:
            if max(abs(x - other_x), abs(y - other_y)) < radius + other_radius + GAP - 1e-9:
                return False
    if len(scene.objects) == 1:
        return True
    (x, y), (other_x, other_y) = _centres(scene)
    ahead = {"left of": other_x - x, "right of": x - other_x, "above": other_y - y, "below": y - other_y}
    across = y - other_y if scene.facts.relation in ("left of", "right of") else x - other_x
    return ahead[scene.facts.relation] >= abs(across) + CLEAR


def _centres(scene: Scene) -> list[tuple[float, float]]:
    return [tuple(sum(s[k] for s in group) / len(group) for k in (0, 1)) for group in scene.objects]


# --- questions, edits, clips ---------------------------------------------------------------------------------------


def questions(scene: Scene) -> tuple[tuple[str, str], ...]:
    """Questions about a scene with their answers, as many answered "yes" as "no"."""
    facts, found = scene.facts, []
    pairs = [(g.shape, g.colour) for g in facts.groups]
    for number, group in enumerate(facts.groups):
        others = [g for k, g in enumerate(facts.groups) if k != number]
        are, noun = ("is", "are")[group.count > 1], plural(group.shape, group.count)
        name = f"{group.colour} {noun}"
        if others:
            found.append((f"how many {group.colour} {plural(group.shape)} are there?", NUMBERS[group.count - 1]))
        if all(g.shape != group.shape for g in others):
            found.append((f"what colour {are} the {noun}?", group.colour))
        if all(g.colour != group.colour for g in others):
            found.append((f"what shape {are} the {group.colour} {plural('object', group.count)}?", group.shape))
        if group.size:
            found.append((f"what size {are} the {name}?", group.size))
            found.append((f"what texture {'have' if group.count > 1 else 'has'} the {name}?", group.texture))
        following = list(COLOURS)[list(COLOURS).index(group.colour) + 1 :] + list(COLOURS)
        absent = next(c for c in following if (group.shape, c) not in pairs)
        pairs.append((group.shape, absent))  # is asked for once
        found += [(f"is there a {group.colour} {group.shape}?", "yes"), (f"is there a {absent} {group.shape}?", "no")]
    if facts.place:
        found.append((f"where is the {name}?", facts.place))
    else:
        (first, second), relation = facts.groups, facts.relation
        are, a, b = "are" if first.count > 1 else "is", _short(first), _short(second)
        found += [(f"{are} the {a} {r} the {b}?", "yes" if r == relation else "no")
                  for r in (relation, OPPOSITE[relation])]
    return tuple(found)


def _short(group: Group) -> str:
    """ "red squares": as much as tells one group of a scene from the other."""
    return f"{group.colour} {plural(group.shape, group.count)}"


def edit(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """The scene with one fact changed, and the instruction that changes it.

    All else stays in its place if it can; another relation mirrors the picture or turns it over its diagonal.
    What is made of a training scene is one, too.
    """
    options = [(kind, group, f) for kind, group, changed in alternatives(scene.facts) for f in changed]
    for choice in rng.permutation(len(options)):
        kind, group, facts = options[choice]
        if facts.groups[group].shape in DIGITS:  # digits are plain
            facts = facts.replace("texture", group, facts.groups[group].texture and "plain")
        if abs(facts.groups[group].count - scene.facts.groups[group].count) > 1 or facts.split is None:
            continue
        if len({(g.shape, g.colour) for g in facts.groups}) < len(facts.groups):
            continue
        if (scene.facts.split == "train") <= (facts.split == "train"):
            return _edited(scene, facts, kind, group, rng), _instruction(scene.facts, facts, kind, group)
    raise AssertionError(f"there is no edit of '{caption(scene)}'")


def _instruction(before: Facts, after: Facts, kind: str, number: int) -> str:
    old, new = before.groups[number], after.groups[number]
    name = _short(old)
    if kind == "shape":
        return f"turn the {name} into {'a ' if old.count == 1 else ''}{plural(new.shape, new.count)}"
    if kind == "count":
        return f"{'add' if new.count > old.count else 'remove'} a {old.colour} {old.shape}"
    if kind == "place":
        return f"move the {name} {after.place.replace('in', 'to', 1)}"
    if kind == "relation":
        to = "to the " if after.relation in ("left of", "right of") else ""
        return f"move the {name} {to}{after.relation} the {_short(before.groups[1])}"
    return f"make the {name} {getattr(new, kind)}"


def _edited(scene: Scene, facts: Facts, kind: str, number: int, rng: np.random.Generator) -> Scene:
    own = scene.objects[number]
    if kind == "relation":
        return dataclasses.replace(scene, facts=facts, objects=_turned(scene, facts.relation))
    if kind == "count" and facts.groups[number].count < len(own):
        gone = rng.integers(len(own))
        own = own[:gone] + own[gone + 1 :]
    if kind == "size":
        least, most = RADII[facts.groups[number].size][len(own)]
        radius = float(rng.uniform(least, most))
        own = tuple((x, y, radius) for x, y, _ in own)

    def with_own(spots: tuple[Spot, ...]) -> Scene:
        return Scene(facts, (*scene.objects[:number], spots, *scene.objects[number + 1 :]), scene.background)

    if kind == "place":
        return with_own(_spots(rng, facts, number))
    if facts.groups[number].count > len(own):
        for x, y in rng.uniform(0, 1, (64, 2)).tolist():
            if _is_clear(new := with_own((*own, (x, y, own[0][2])))):
                return new
    new = with_own(own)
    # Not in its old places, or not there without a doubt about the relation: then anew.
    while facts.groups[number].count != len(new.objects[number]) or not _is_clear(new):
        new = with_own(_spots(rng, facts, number))
    return new


def _turned(scene: Scene, relation: str) -> tuple[tuple[Spot, ...], ...]:
    """The objects of a scene mirrored or transposed so that another relation is true of them."""
    axis = {"left of": 0, "right of": 0, "above": 1, "below": 1}
    old = scene.facts.relation
    transposed = axis[old] != axis[relation]
    mirrored = (old in ("right of", "below")) != (relation in ("right of", "below"))

    def turned(x: float, y: float, radius: float) -> Spot:
        if transposed:
            x, y = y, x
        if mirrored:
            x, y = (1 - x, y) if axis[relation] == 0 else (x, 1 - y)
        return x, y, radius

    return tuple(tuple(turned(*spot) for spot in group) for group in scene.objects)


def clip(scene: Scene, frames: int, rng: np.random.Generator) -> tuple[tuple[Scene, ...], str]:
    """A short clip: the scenes of its frames, of which this is the first, and a caption that tells the motion, too.

    At level 1 the object goes to another place, else one group goes straight in one direction as far as it can.
    """
    group = scene.facts.groups[0]
    if scene.facts.place:
        place = list(PLACES)[(list(PLACES).index(scene.facts.place) + rng.integers(1, len(PLACES))) % len(PLACES)]
        end = _spots(rng, dataclasses.replace(scene.facts, place=place), 0)[0]
        begin = scene.objects[0][0]
        text = f"{group} moves {scene.facts.place.replace('in', 'from', 1)} {place.replace('in', 'to', 1)}"
        return _frames(scene, 0, (end[0] - begin[0], end[1] - begin[1]), frames), text
    rooms = {}
    for number, (direction, (dx, dy)) in itertools.product((0, 1), DIRECTIONS.items()):
        steps = itertools.takewhile(lambda d: _is_clear(_moved(scene, number, d * dx, d * dy)), STEPS)  # noqa: B023
        rooms[number, direction] = max(steps, default=0.0)
    # Any motion that can be seen well, or else the widest.
    good = [way for way, room in rooms.items() if room >= min(0.1, max(rooms.values()))]
    number, direction = good[rng.integers(len(good))]
    room, moving, (dx, dy) = rooms[number, direction], scene.facts.groups[number], DIRECTIONS[direction]
    if not room:
        return _frames(scene, 0, (0, 0), frames), f"{caption(scene)}, and nothing moves"
    text = f"{caption(scene)}, and the {_short(moving)} {'moves' if moving.count == 1 else 'move'} {direction}"
    return _frames(scene, number, (dx * room, dy * room), frames), text


def _moved(scene: Scene, number: int, dx: float, dy: float) -> Scene:
    objects = list(scene.objects)
    objects[number] = tuple((x + dx, y + dy, radius) for x, y, radius in objects[number])
    return dataclasses.replace(scene, objects=tuple(objects))


def _frames(scene: Scene, number: int, step: tuple[float, float], frames: int) -> tuple[Scene, ...]:
    shares = [k / max(frames - 1, 1) for k in range(frames)]
    return tuple(_moved(scene, number, share * step[0], share * step[1]) for share in shares)


# --- pictures ------------------------------------------------------------------------------------------------------


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _triangle(x, y):
    # Corners (0, -1), (-1, 0.9) and (1, 0.9).
    return np.maximum(y - 0.9, (1.9 * np.abs(x) - y - 1) / math.hypot(1.9, 1))


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.3, np.maximum(x, y) - 1)


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - 0.75) - 0.25


# Signed distances from the outline (negative inside) of points relative to the centre, in units of the radius.
_DISTANCES = {"square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring}


def _distance(shape: str, x: Float[np.ndarray, "1 w"], y: Float[np.ndarray, "h 1"]) -> Float[np.ndarray, "h w"]:
    return _DISTANCES[shape](x, y) if shape in _DISTANCES else glyphs.distance(0, int(shape), x, y)


def white(texture: str, x: Float[np.ndarray, "1 w"], y: Float[np.ndarray, "h 1"], radius: float) -> Any:
    """The white part of an object, 0 to 1: stripes across, or the fields of a draughtboard; `radius` in pixels."""
    if texture == "striped":
        return 0.5 + 0.5 * _wave(y, radius) + 0 * x
    if texture == "checked":
        return 0.5 + 0.5 * _wave(x, radius) * _wave(y, radius)
    return np.zeros((1, 1), np.float32)


def _wave(x: np.ndarray, radius: float) -> np.ndarray:
    """-1 and 1 in turn, half a radius each, with edges of one pixel."""
    return np.clip((np.abs((x - 0.25) % 1 - 0.5) - 0.25) * (2 * radius), -1, 1)


def coverage(shape: str, x: float, y: float, radius: float, size: int,
             texture: str = "") -> tuple[slice, slice, Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """(rows, columns, coverage, white share) of an object: the part of a picture that it touches, antialiased.

    Args:
      x, y, radius: in pixels, with the middle of the first pixel at 0.5.
    """
    top, bottom = max(int(y - radius - 1), 0), min(int(y + radius + 2), size)
    left, right = max(int(x - radius - 1), 0), min(int(x + radius + 2), size)
    scale = np.float32(1 / radius)
    u = (np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5 - x)) * scale
    v = (np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)) * scale
    inside = np.minimum(np.maximum(0.5 - _distance(shape, u, v) * np.float32(radius), 0), 1)  # np.clip is slower
    return slice(top, bottom), slice(left, right), inside, white(texture, u, v, radius)


_RGB = {name: np.asarray(value, np.float32) for name, value in COLOURS.items()}
_WHITE = np.asarray(WHITE, np.float32)


def render(scene: Scene, size: int = 32) -> UInt8[np.ndarray, "size size 3"]:
    """The picture, antialiased; the same scene at any size."""
    picture = np.full((size, size, 3), scene.background, np.float32)
    for group, objects in zip(scene.facts.groups, scene.objects, strict=True):
        colour = _RGB[group.colour]
        for x, y, radius in objects:
            rows, columns, inside, spots = coverage(group.shape, x * size, y * size, radius * size, size, group.texture)
            part = picture[rows, columns]
            ink = colour if group.texture in ("", "plain") else colour + spots[..., None] * (_WHITE - colour)
            part += inside[..., None] * (ink - part)
    return (picture + 0.5).astype(np.uint8)


def masks(scene: Scene, size: int = 32) -> tuple[Bool[np.ndarray, "objects size size"], Int[np.ndarray, " objects"]]:
    """The pixels of each object (covered by half or more), and the group that each belongs to."""
    found, groups = [], []
    for number, (group, objects) in enumerate(zip(scene.facts.groups, scene.objects, strict=True)):
        for x, y, radius in objects:
            rows, columns, inside, _ = coverage(group.shape, x * size, y * size, radius * size, size)
            mask = np.zeros((size, size), bool)
            mask[rows, columns] = inside >= 0.5
            found.append(mask)
            groups.append(number)
    return np.stack(found), np.asarray(groups, np.int32)


# --- data ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scenes(Data):
    """Pictures of scenes with their captions; nothing is read, nothing ends.

    A batch has `image`, uint8 (B, size, size, 3), `tokens`, int32 (B, length): the caption, `eos`, and `eos` for
    padding, and `lengths`, int32 (B,). Held-out batches have `weights` too. With `edits` the scene is `before`, of the
    same form, `image` is the scene with one fact changed, and the tokens are of the instruction that changes it.

    Attributes:
      level: 1, 2 or 3.
      size: pixels of a side; at least 32, and 64 for level 3.
      split: which held-out scenes `heldout` gives. Training is the same for both and sees neither.
      heldout: how many those are.
      tokenizer: of the captions; `Words` learns the words of all levels, questions and instructions.
      length: tokens of a caption with its end.
      edits: pairs of pictures with an instruction in place of pictures with a caption.
    """

    level: int = 2
    size: int = 32
    split: Literal["recombined", "unseen"] = "recombined"
    heldout: int = 1024
    tokenizer: TokenizerConfig = Words()
    length: int = 16
    edits: bool = False

    def __post_init__(self):
        if self.level not in LEVELS:
            raise UserError(f"data.level is {self.level}; it is 1, 2 or 3")
        least = 64 if self.level == 3 else 32
        if self.size < least:
            raise UserError(f"data.size is {self.size}; level {self.level} needs {least} or more")
        if self.split not in SPLITS[1:]:
            raise UserError(f"data.split is '{self.split}'; it is 'recombined' or 'unseen'")
        if self.heldout < 0:
            raise UserError(f"data.heldout is {self.heldout}; it is a number of scenes, 0 or more")

    def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        import jax

        image = jax.ShapeDtypeStruct((batch_size, self.size, self.size, 3), np.uint8)
        return ({"before": image} if self.edits else {}) | {
            "image": image,
            "tokens": jax.ShapeDtypeStruct((batch_size, self.length), np.int32),
            "lengths": jax.ShapeDtypeStruct((batch_size,), np.int32),
        }

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedScenes:
        return PreparedScenes(self, self.tokenizer.fit(_texts()))


@functools.cache
def _texts() -> tuple[str, ...]:
    """What tokenizers learn from: captions, questions and instructions of every level, always the same."""
    texts: list[str] = []
    for level in LEVELS:
        rng = np.random.default_rng(level)
        for k in range(400):
            scene = sample(rng, level)
            texts.append(caption(scene))
            if k % 4 == 0:
                texts += itertools.chain(*questions(scene), [edit(scene, rng)[1], clip(scene, 2, rng)[1]])
    return tuple(texts)


class PreparedScenes(Captions):
    """See `Prepared`."""

    def __init__(self, data: Scenes, tokenizer: Tokenizer):
        self.data, self.tokenizer, self.length, self.view = data, tokenizer, data.length, View(data.size)
        texts = (self.edit(0, i)[1] if data.edits else caption(self.scene(0, i)) for i in range(300))
        longest = max(texts, key=lambda text: len(tokenizer.encode(text)))
        if (needed := len(tokenizer.encode(longest)) + 1) > data.length:
            raise UserError(f"data.length is {data.length}, too short for the captions of level {data.level}: "
                            f"'{longest}' has {needed} tokens")
        told = dataclasses.asdict(data)
        if not data.edits:  # as before there were any
            del told["edits"]
        self.fingerprint = caching.key(VERSION, told, tokenizer.fingerprint)
        self.facts = {
            "source": f"captioned scenes of level {data.level}", "vocabulary": tokenizer.vocab_size,
            "heldout_examples": data.heldout, "heldout_split": data.split,
        }  # fmt: skip

    def scene(self, seed: int, index: int) -> Scene:
        """Training scene `index` of a seed."""
        return sample(_generator(0, seed, index), self.data.level)

    def heldout_scene(self, index: int, split: Split | None = None) -> Scene:
        """Scene `index` of a held-out split (default: the data's own), of which there is no end."""
        split = split or self.data.split
        return sample(_generator(1 + SPLITS.index(split), 0, index), self.data.level, split)

    def edit(self, seed: int, index: int) -> tuple[Scene, str]:
        """Training scene `index` of a seed after its edit, and the instruction."""
        return edit(self.scene(seed, index), _generator(EDITS, 0, seed, index))

    def heldout_edit(self, index: int, split: Split | None = None) -> tuple[Scene, str]:
        """The same of `heldout_scene`."""
        split = split or self.data.split
        return edit(self.heldout_scene(index, split), _generator(EDITS, 1 + SPLITS.index(split), 0, index))

    def edited(self, before: Scene, after: Scene, instruction: str) -> dict[str, np.ndarray]:
        """The example of an edit, without weights."""
        tokens, lengths = self.encode([instruction])
        pictures = {"before": render(before, self.data.size), "image": render(after, self.data.size)}
        return pictures | {"tokens": tokens[0], "lengths": lengths[0]}

    def pair(self, scene: Scene) -> dict[str, np.ndarray]:
        """The example of a scene, without weights."""
        tokens, lengths = self.encode([caption(scene)])
        return {"image": render(scene, self.data.size), "tokens": tokens[0], "lengths": lengths[0]}

    def train(self, seed: int) -> grain.MapDataset:
        import grain

        return grain.MapDataset.range(2**62).map(_Train(self, seed))

    def heldout(self) -> grain.MapDataset:
        import grain

        return grain.MapDataset.range(self.data.heldout).map(_HeldOut(self))


@dataclasses.dataclass(frozen=True)
class _Train:
    scenes: PreparedScenes
    seed: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        scene = self.scenes.scene(self.seed, index)
        if self.scenes.data.edits:
            return self.scenes.edited(scene, *self.scenes.edit(self.seed, index))
        return self.scenes.pair(scene)


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    scenes: PreparedScenes

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        scene, weights = self.scenes.heldout_scene(index), {"weights": np.float32(1)}
        if self.scenes.data.edits:
            return self.scenes.edited(scene, *self.scenes.heldout_edit(index)) | weights
        return self.scenes.pair(scene) | weights


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.default_rng([s % 2**64 for s in seeds])
