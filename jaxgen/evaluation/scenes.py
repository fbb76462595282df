"""Captioned scenes as ground truth: a scorer that reads pictures back, and a zero-shot test of every fact."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from jaxgen.data import scenes
from jaxgen.data.scenes import Facts, Group, PreparedScenes, caption, coverage, parse, white
from jaxgen.errors import UserError
from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Report, Setting
from jaxgen.evaluation.zeroshot import text_embedder

# --- reading a picture ---------------------------------------------------------------------------------------------

INK = 0.4  # coverage from which a pixel belongs to an object
LEAST = 0.25  # objects below this share of the smallest one's area are specks
MOST_SIDE = 96  # larger pictures are read at a fraction of their size


@dataclasses.dataclass(frozen=True)
class Seen:
    """An object that was found. Lengths in units of the picture's side."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float


def read(image: UInt8[np.ndarray, "H W 3"], level: int) -> Facts:
    """The facts of a picture of a scene, whoever painted it.

    Objects are what stands out of the background. Each is fitted with every shape of its area and centre; objects that
    look alike are a group. A poor picture may have any number of groups, and of objects in one; the relation is that of
    the first two, and a picture of nothing has no groups.
    """
    objects = list(find(image, level))
    groups: dict[tuple[str, ...], list[Seen]] = {}
    for seen in objects:
        groups.setdefault((seen.shape, seen.colour, seen.size, seen.texture), []).append(seen)
    largest = sorted(groups.values(), key=len, reverse=True)
    found = tuple(Group(g[0].shape, g[0].colour, len(g), g[0].size, g[0].texture) for g in largest)
    if not found:
        return Facts(())
    centres = [(np.mean([o.x for o in g]), np.mean([o.y for o in g])) for g in largest]
    if level == 1:
        x, y = centres[0]
        return Facts(found, place=min(scenes.PLACES, key=lambda p: np.hypot(*np.subtract(scenes.PLACES[p], (x, y)))))
    if len(found) == 1:
        return Facts(found)
    (x, y), (other_x, other_y) = centres[:2]
    across, down = other_x - x, other_y - y
    if abs(across) > abs(down):
        return Facts(found, "left of" if across > 0 else "right of")
    return Facts(found, "above" if down > 0 else "below")


def find(image: UInt8[np.ndarray, "H W 3"], level: int) -> Iterator[Seen]:
    """The objects of a picture."""
    picture = _reduced(np.asarray(image, np.float32))
    side = len(picture)
    ground = np.median(picture.reshape(-1, 3), axis=0)
    # All colours are as bright in their brightest channel, so that channel alone says how much of a pixel is covered.
    ink = np.clip((picture.max(-1) - ground.max()) / max(scenes.BRIGHT - ground.max(), 1), 0, 1)
    labels = _components(ink > INK)
    smallest = scenes.RADII["small" if level == 3 else ""][1][0] * side
    for label in np.unique(labels[labels > 0]):
        mask = _grown(labels == label) & ((labels == 0) | (labels == label))
        amount = np.where(mask, ink, 0)
        if amount.sum() > LEAST * smallest**2:
            yield _fit(picture, ground, amount, level)


def _fit(picture: np.ndarray, ground: np.ndarray, amount: np.ndarray, level: int) -> Seen:
    """The shape, colour, size and texture that explain one object best."""
    side, total = len(picture), amount.sum()
    place = np.arange(side) + 0.5
    x, y = (amount.sum(0) @ place) / total, (amount.sum(1) @ place) / total
    fits = []
    for shape in scenes.shapes(level):
        area, dx, dy = _moments(shape)
        radius = float(np.sqrt(total / area))
        fits.append(_Fit(shape, float(x - dx * radius), float(y - dy * radius), radius))
    likely = sorted(fits, key=lambda fit: fit.error(amount))[:3]
    fit = min((fit.improved(amount) for fit in likely), key=lambda fit: fit.error(amount))
    shape, x, y, radius = fit
    colour, share = _colour(picture, ground, amount, level)
    texture, size = "", ""
    if level == 3:
        size = min(scenes.SIZES, key=lambda name: abs(np.mean(scenes.RADII[name][1]) - radius / side))
        texture = _texture(share, amount, x, y, radius) if shape in scenes.SHAPES else "plain"
    return Seen(shape, colour, size, texture, x / side, y / side)


class _Fit(NamedTuple):
    """A shape laid over an object; lengths in pixels."""

    shape: str
    x: float
    y: float
    radius: float

    def error(self, amount: np.ndarray) -> float:
        """Squared difference of the coverages."""
        side = len(amount)
        if not (0 < self.x < side and 0 < self.y < side and 1 < self.radius < side):
            return float("inf")
        rows, columns, inside, _ = coverage(*self, side)
        part = amount[rows, columns]
        return float((inside * (inside - 2 * part)).sum() + (amount * amount).sum())

    def improved(self, amount: np.ndarray) -> _Fit:
        """After a few steps of descent in the centre and the radius."""
        here, least = self, self.error(amount)
        for step in (0.4, 0.2):
            for name, sign in itertools.product(("x", "y", "radius"), (-1, 1)):
                there = here._replace(**{name: getattr(here, name) + sign * step})
                if (found := there.error(amount)) < least:
                    here, least = there, found
        return here


def _colour(picture: np.ndarray, ground: np.ndarray, amount: np.ndarray, level: int) -> tuple[str, np.ndarray]:
    """The colour whose mixture with the background (and, with textures, with white) explains the pixels best.

    Also the share of white in each pixel.
    """
    part = amount[..., None]
    residues = {}
    for name, rgb in scenes.COLOURS.items():
        colour, toward = np.asarray(rgb, np.float32), np.asarray(scenes.WHITE, np.float32) - np.asarray(rgb, np.float32)
        rest = picture - ground - part * (colour - ground)
        share = np.clip((rest @ toward) / (toward @ toward) / np.maximum(amount, 0.1), 0, 1) * (level == 3)
        residue = (rest - part * share[..., None] * toward) ** 2
        residues[name] = float((residue.sum(-1) * (amount > 0)).sum()), share
    colour = min(residues, key=lambda name: residues[name][0])
    return colour, residues[colour][1]


def _texture(share: np.ndarray, amount: np.ndarray, x: float, y: float, radius: float) -> str:
    side = len(share)
    u, v = (np.arange(side) + 0.5 - x)[None] / radius, (np.arange(side) + 0.5 - y)[:, None] / radius

    def error(texture: str) -> float:
        return float((amount * (share - white(texture, u, v, radius)) ** 2).sum())

    return min(scenes.TEXTURES, key=error)


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of a shape of radius 1 about (0, 0)."""
    rows, columns, inside, _ = coverage(shape, 64, 64, 50, 128)
    place = np.arange(128) + 0.5 - 64
    total = inside.sum()
    return (
        float(total / 2500),
        float(inside.sum(0) @ place[columns] / total / 50),
        float(inside.sum(1) @ place[rows] / total / 50),
    )


def _reduced(picture: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
    """Averaged over square blocks, to at most MOST_SIDE pixels a side."""
    height, width = picture.shape[:2]
    if height != width:
        raise ValueError(f"pictures of scenes are square, not {height} x {width}")
    block = -(-height // MOST_SIDE)
    keep = height // block * block
    return picture[:keep, :keep].reshape(keep // block, block, keep // block, block, 3).mean((1, 3))


def _components(mask: Bool[np.ndarray, "H W"]) -> Integer[np.ndarray, "H W"]:
    """A positive number for each connected part (sides and corners), 0 elsewhere."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        columns = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
        spread = np.where(mask, np.maximum(np.maximum(columns[:-2], columns[1:-1]), columns[2:]), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _grown(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """With the pixels that touch it."""
    padded = np.pad(mask, 1)
    columns = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return columns[:-2] | columns[1:-1] | columns[2:]


# --- scoring -------------------------------------------------------------------------------------------------------

Score = dict[str, tuple[int, int]]
"""(right, total) by kind of fact; `exact` counts the pictures that show all that is said and nothing else."""


def score(images: Sequence[UInt8[np.ndarray, "H W 3"]], captions: Sequence[str]) -> Score:
    """How many facts of each caption its picture shows, by kind: shape, colour, count, relation, ...

    Chance is `chance(level)`: what facts of one scene have in common with those of another.
    """
    total: Score = {}
    for image, text in zip(images, captions, strict=True):
        facts = parse(text)
        for kind, (right, count) in compare(read(image, facts.level), facts).items():
            before = total.get(kind, (0, 0))
            total[kind] = before[0] + right, before[1] + count
    return total


def compare(seen: Facts, said: Facts) -> Score:
    """What of `said` is seen; groups are compared in the order that makes most facts right."""
    blank = Group("", "", 0)
    seen_groups = [*seen.groups, *[blank] * (len(said.groups) - len(seen.groups))]
    best: Score = {}
    for order in itertools.permutations(range(len(seen_groups)), len(said.groups)):
        turned = seen.relation
        if turned and order[:2] != (0, 1):  # the relation is that of the first two
            turned = scenes.OPPOSITE[turned] if order[:2] == (1, 0) else ""
        shown = Facts(tuple(seen_groups[i] for i in order), turned, seen.place)
        found: Score = {}
        for kind, group in scenes.questioned(said):
            right, count = found.get(kind, (0, 0))
            found[kind] = right + (shown.get(kind, group) == said.get(kind, group)), count + 1
        found["exact"] = int(shown == said and len(seen.groups) == len(said.groups)), 1
        if not best or sum(r for r, _ in found.values()) > sum(r for r, _ in best.values()):
            best = found
    return best


@functools.cache
def chance(level: int, scenes_drawn: int = 4000) -> dict[str, float]:
    """The share of facts that the captions of two unrelated training scenes have in common, by kind."""
    rng = np.random.default_rng(level)
    facts = [scenes.sample(rng, level).facts for _ in range(scenes_drawn)]
    total: Score = {}
    for seen, said in itertools.pairwise(facts):
        for kind, (right, count) in compare(seen, said).items():
            before = total.get(kind, (0, 0))
            total[kind] = before[0] + right, before[1] + count
    return {kind: right / count for kind, (right, count) in total.items()}


# --- the zero-shot test --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SceneFacts(Evaluation):
    """Whether a contrastive model tells the true caption of a scene from those with one fact changed.

    Each fact of the caption (of each group) is replaced by every other value in turn; it is right when the true caption
    is nearer to the picture than all of those. Metrics are shares by kind of fact on the `recombined` split, and as
    `unseen/shape` and so on on the other; the report's text gives them beside chance.
    """

    name: str = "facts"
    examples: int = 512
    """Held-out scenes of each split."""
    batch_size: int = 0
    """Pictures, and texts, at a time; 0 for the training batch's."""

    def build(self, setting: Setting):
        import grain

        task, data = setting.task, setting.data
        whole.demand(self, task, "embeds pictures and texts", "embed_images", "embed_texts")
        if not isinstance(data, PreparedScenes):
            raise UserError(f"the evaluation '{self.name}' needs the data Scenes, whose facts are known")
        size = self.batch_size or whole.default_batch(setting)
        truths = {split: [data.heldout_scene(i, split).facts for i in range(self.examples)] for split in HELD_OUT}
        number: dict[str, int] = {}  # of each different text
        tests = {
            split: [_test(facts, lambda f: number.setdefault(caption(f), len(number))) for facts in found]
            for split, found in truths.items()
        }
        texts = text_embedder(setting, list(number), size)
        pictures = {
            split: whole.rows(
                grain.MapDataset.range(self.examples).map(_Picture(data, split)), setting, size,
                lambda params, state, batch: {"image": task.embed_images(params, batch, state).astype(jnp.float32)},
            )
            for split in HELD_OUT
        }  # fmt: skip

        def run(params, state, step):
            described = np.asarray(texts(params, state), np.float64)
            metrics, table = {}, [f"{'':<12}" + "".join(f"{name:>12}" for name in (*HELD_OUT, "chance"))]
            shares: dict[str, dict[str, float]] = {}
            for split in HELD_OUT:
                embedded = np.asarray(pictures[split](params, state)["image"], np.float64)
                total: Score = {}
                for picture, test in zip(embedded, tests[split], strict=True):
                    for kind, true, others in test:
                        won = picture @ described[true] > (described[others] @ picture).max() + whole.NEAR
                        right, count = total.get(kind, (0, 0))
                        total[kind] = right + int(won), count + 1
                shares[split] = {kind: right / count for kind, (right, count) in total.items()}
                prefix = "" if split == "recombined" else f"{split}/"
                metrics |= {prefix + kind: share for kind, share in shares[split].items()}
            for kind in shares["recombined"]:
                chance = 1 / len(scenes.choices(kind, data.data.level))
                values = [*(shares[split].get(kind, float("nan")) for split in HELD_OUT), chance]
                table.append(f"{kind:<12}" + "".join(f"{value:>12.4f}" for value in values))
            return Report(metrics, {self.name: "\n".join(table) + "\n"})

        return run


HELD_OUT = ("recombined", "unseen")


def _test(facts: Facts, number: Callable[[Facts], int]) -> list[tuple[str, int, list[int]]]:
    """(kind, number of the true text, numbers of the false ones) of each fact."""
    true = number(facts)
    return [(kind, true, [number(f) for f in changed]) for kind, _, changed in scenes.alternatives(facts)]


@dataclasses.dataclass(frozen=True)
class _Picture:
    data: PreparedScenes
    split: str

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        image = scenes.render(self.data.heldout_scene(index, self.split), self.data.data.size)
        return {"image": image, "weights": np.float32(1)}
