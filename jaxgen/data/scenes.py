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
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxgen.data import cache as caching
from jaxgen.data import glyphs
from jaxgen.data.base import Data, Prepared, Progress
from jaxgen.data.captions import encode_captions
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
Split = Literal["train", "recombined", "unseen"]

# In units of the picture's side.
MARGIN, GAP = 0.015, 0.06  # kept free at the border, and between two objects at least
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


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is where. Lengths are in units of the picture's side, y downwards.

    Attributes:
      objects: (x, y, radius) of each object, by group.
      background: its grey, 0 to 255.
    """

    facts: Facts
    objects: tuple[tuple[tuple[float, float, float], ...], ...]
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
    """Puts the objects somewhere: no two touch, and one relation alone is true.

    A group stands in its half of the picture, its objects beside one another along the line that divides the halves
    and about the middle of it, so that the centres of two groups differ far more across that line than along it.
    """
    draws = rng.random(16).tolist()
    objects = []
    for number, group in enumerate(facts.groups):
        least, most = RADII[group.size][group.count]
        radius = least + (most - least) * draws.pop()
        if facts.place:
            x, y = PLACES[facts.place]
            objects.append(((x + 0.1 * (draws.pop() - 0.5), y + 0.1 * (draws.pop() - 0.5), radius),))
            continue
        first = facts.relation in ("left of", "above")  # the first group is in the left or upper half
        low, high = (MARGIN + radius, 0.5 - GAP / 2 - radius)
        step = 2 * radius + GAP
        slack = min(1 - 2 * MARGIN - 2 * radius - (group.count - 1) * step, 0.4)
        free = sorted(draws.pop() for _ in range(group.count))
        begin = 0.5 - (slack + (group.count - 1) * step) / 2
        spots = []
        for place, share in enumerate(free):
            if group.count == 1:
                share = 0.5 + 0.7 * (share - 0.5)
            along, across = begin + place * step + slack * share, low + (high - low) * draws.pop()
            across = across if first == (number == 0) else 1 - across
            spots.append((along, across, radius) if facts.relation in ("above", "below") else (across, along, radius))
        objects.append(tuple(spots))
    return Scene(facts, tuple(objects), 12 + 36 * draws.pop())


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
    inside = np.clip(0.5 - _distance(shape, u, v) * np.float32(radius), 0, 1)
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
    padding, and `lengths`, int32 (B,). Held-out batches have `weights` too.

    Attributes:
      level: 1, 2 or 3.
      size: pixels of a side; at least 32, and 64 for level 3.
      split: which held-out scenes `heldout` gives. Training is the same for both and sees neither.
      heldout: how many those are.
      tokenizer: of the captions; `Words` learns the words of all levels, questions and instructions.
      length: tokens of a caption with its end.
    """

    level: int = 2
    size: int = 32
    split: Literal["recombined", "unseen"] = "recombined"
    heldout: int = 1024
    tokenizer: TokenizerConfig = Words()
    length: int = 16

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

        return {
            "image": jax.ShapeDtypeStruct((batch_size, self.size, self.size, 3), np.uint8),
            "tokens": jax.ShapeDtypeStruct((batch_size, self.length), np.int32),
            "lengths": jax.ShapeDtypeStruct((batch_size,), np.int32),
        }

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedScenes:
        return PreparedScenes(self, self.tokenizer.fit(_texts()))


def _texts() -> Iterator[str]:
    """What tokenizers learn from: captions of every level, always the same."""
    for level in LEVELS:
        rng = np.random.default_rng(level)
        for _ in range(500):
            yield caption(sample(rng, level))


class PreparedScenes(Prepared):
    """See `Prepared`."""

    def __init__(self, data: Scenes, tokenizer: Tokenizer):
        self.data, self.tokenizer = data, tokenizer
        longest = max((caption(self.scene(0, i)) for i in range(300)), key=lambda text: len(tokenizer.encode(text)))
        if (needed := len(tokenizer.encode(longest)) + 1) > data.length:
            raise UserError(f"data.length is {data.length}, too short for the captions of level {data.level}: "
                            f"'{longest}' has {needed} tokens")
        self.fingerprint = caching.key(VERSION, dataclasses.asdict(data), tokenizer.fingerprint)
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

    def example(self, scene: Scene) -> dict[str, np.ndarray]:
        """An example of a batch, without weights."""
        tokens, lengths = self.encode([caption(scene)])
        return {"image": render(scene, self.data.size), "tokens": tokens[0], "lengths": lengths[0]}

    def train(self, seed: int) -> grain.MapDataset:
        import grain

        return grain.MapDataset.range(2**62).map(_Train(self, seed))

    def heldout(self) -> grain.MapDataset:
        import grain

        return grain.MapDataset.range(self.data.heldout).map(_HeldOut(self))

    def encode(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n length"], Int[np.ndarray, " n"]]:
        """Tokens and lengths of captions, as in a batch."""
        return encode_captions(self.tokenizer, texts, self.data.length)

    def picture(self, data: bytes) -> UInt8[np.ndarray, "size size 3"]:
        """A picture file as the model sees it: whole, at the size of the scenes."""
        from jaxgen.data import images, transforms

        size = self.data.size
        image = images.decode(data)
        return transforms.Resize((size, size))(image, np.random.default_rng(0))


@dataclasses.dataclass(frozen=True)
class _Train:
    scenes: PreparedScenes
    seed: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        return self.scenes.example(self.scenes.scene(self.seed, index))


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    scenes: PreparedScenes

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        return self.scenes.example(self.scenes.heldout_scene(index)) | {"weights": np.float32(1)}


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.default_rng([s % 2**64 for s in seeds])
