"""The scorer, proven on pictures whose facts are known, and the zero-shot test of every fact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import toys

from jaxgen.data import scenes
from jaxgen.data.scenes import SPLITS, Facts, Group, Scenes, caption, parse, render, sample
from jaxgen.errors import UserError
from jaxgen.evaluation.scenes import SceneFacts, chance, compare, read, score
from jaxgen.sharding import Mesh
from jaxgen.tasks.base import Task

SIZES = {1: 32, 2: 32, 3: 64}
COUNT = {1: 100, 2: 60, 3: 30}


def pictures(level, split="train", count=None, size=None, seed=0):
    rng = np.random.default_rng(seed)
    found = [sample(rng, level, split) for _ in range(count or COUNT[level])]
    return [render(s, size or SIZES[level]) for s in found], [caption(s) for s in found]


def disturbed(image, rng):
    """Moved by half a pixel right and down, with noise of 5 % of the full range."""
    wide = np.pad(image.astype(float), ((1, 0), (1, 0), (0, 0)), mode="edge")
    moved = (wide[1:, 1:] + wide[:-1, 1:] + wide[1:, :-1] + wide[:-1, :-1]) / 4
    return np.clip(moved + rng.normal(0, 0.05 * 255, moved.shape), 0, 255).round().astype(np.uint8)


# --- the scorer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", scenes.LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_everything_is_read_from_rendered_scenes(level, split):
    found = score(*pictures(level, split))
    assert set(found) >= {"shape", "colour", "exact"} | {"place" if level == 1 else "relation"}
    assert all(right == count > 0 for right, count in found.values()), found


@pytest.mark.parametrize("level", scenes.LEVELS)
@pytest.mark.parametrize("split", ["recombined", "unseen"])
def test_noise_and_half_a_pixel_do_not_matter(level, split):
    images, captions = pictures(level, split)
    rng = np.random.default_rng(1)
    found = score([disturbed(image, rng) for image in images], captions)
    assert all(right >= 0.99 * count for right, count in found.values()), found


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_shuffled_captions_score_chance(level):
    """Pictures are read once, and compared with the captions of others, many times over."""
    images, captions = pictures(level, count=120)
    seen, said = [read(image, level) for image in images], [parse(text) for text in captions]
    total = {}
    for k in range(1, 40):
        for a, b in zip(seen, said[k:] + said[:k], strict=True):
            for kind, (right, count) in compare(a, b).items():
                before = total.get(kind, (0, 0))
                total[kind] = before[0] + right, before[1] + count
    expected = chance(level)
    shares = {kind: right / count for kind, (right, count) in total.items()}
    assert shares == pytest.approx(expected, abs=0.03)
    if level == 1:  # one object, no choice of order: chance is by hand
        assert (expected["shape"], expected["colour"]) == pytest.approx((1 / 4, 1 / 6), abs=0.03)
        assert expected["place"] == pytest.approx(1 / 5, abs=0.03)


def test_larger_pictures_are_read_too():
    for size in (48, 100, 256):
        found = score(*pictures(2, count=15, size=size))
        assert all(right == count for right, count in found.values()), (size, found)


def test_what_is_wrong_is_found():
    """One fact changed in the picture costs that fact, and no other."""
    rng = np.random.default_rng(0)
    said = parse("two red rings left of a blue cross")
    for changed, expected in (
        ("two red squares left of a blue cross", {"shape": (1, 2)}),
        ("two cyan rings left of a blue cross", {"colour": (1, 2)}),
        ("three red rings left of a blue cross", {"count": (1, 2)}),
        ("two red rings right of a blue cross", {"relation": (0, 1)}),
        ("a blue cross left of two red rings", {"relation": (0, 1)}),
        ("a blue cross right of two red rings", {"exact": (1, 1)}),
    ):
        right = {"shape": (2, 2), "colour": (2, 2), "count": (2, 2), "relation": (1, 1), "exact": (0, 1)}
        image = render(scenes._arrange(rng, parse(changed)), 32)
        assert score([image], [caption(said)]) == right | expected, changed


def test_more_or_less_than_was_said():
    said = parse("two red rings left of a blue cross")
    rings, cross, more = Group("ring", "red", 2), Group("cross", "blue", 1), Group("square", "cyan", 1)
    extra = compare(Facts((rings, more, cross), "left of"), said)  # the relation that is read is another's
    assert extra == {"shape": (2, 2), "colour": (2, 2), "count": (2, 2), "relation": (0, 1), "exact": (0, 1)}
    alone = compare(Facts((rings,)), said)
    assert alone == {"shape": (1, 2), "colour": (1, 2), "count": (1, 2), "relation": (0, 1), "exact": (0, 1)}
    assert all(right == 0 for right, _ in compare(Facts(()), said).values())


@pytest.mark.parametrize("level", scenes.LEVELS)
@pytest.mark.parametrize("kind", ["black", "white", "noise"])
def test_pictures_of_nothing(level, kind):
    rng = np.random.default_rng(0)
    values = {"black": np.zeros(1), "white": np.full(1, 255), "noise": rng.integers(0, 256, (64, 64, 3))}[kind]
    found = score([np.broadcast_to(values, (64, 64, 3)).astype(np.uint8)], pictures(level, count=1)[1])
    assert found["exact"] == (0, 1)
    if kind != "noise":
        assert all(right == 0 for right, _ in found.values())


def test_pictures_that_are_not_square():
    with pytest.raises(ValueError, match="square, not 32 x 48"):
        read(np.zeros((32, 48, 3), np.uint8), 2)


# --- the zero-shot test --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Projections(Task):
    """Embeds the pixels, and the sum of the words, by a matrix each."""

    def embed_images(self, params, batch, state=None):
        x = batch["image"].astype(jnp.float32).reshape(len(batch["image"]), -1) @ params["image"]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def embed_texts(self, params, batch):
        inside = jnp.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
        x = jnp.sum(jnp.where(inside[..., None], params["text"][batch["tokens"]], 0), 1)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Oracle(Task):
    """Reads the facts of pictures and texts with the scorer, but takes one kind of fact from nothing."""

    blind: str = ""

    def embed_images(self, params, batch, state=None):
        def embed(images):
            real = [np.asarray(image) for image in images]  # padding is black
            return np.stack([self._vector(read(i, 2)) if i.any() else np.zeros(64, np.float32) for i in real])

        return jax.pure_callback(embed, jax.ShapeDtypeStruct((len(batch["image"]), 64), jnp.float32), batch["image"])

    def embed_texts(self, params, batch):
        def embed(tokens, lengths):
            texts = [TOKENIZER.decode(np.asarray(t)[: n - 1]) for t, n in zip(tokens, lengths, strict=True)]
            return np.stack([self._vector(parse(t)) if t else np.zeros(64, np.float32) for t in texts])

        shape = jax.ShapeDtypeStruct((len(batch["tokens"]), 64), jnp.float32)
        return jax.pure_callback(embed, shape, batch["tokens"], batch["lengths"])

    def _vector(self, facts):
        """Unlike for unlike facts, whichever way they are said."""
        for group in range(len(facts.groups)):
            if self.blind in ("shape", "colour", "count"):
                facts = facts.replace(self.blind, group, {"shape": "ring", "colour": "red", "count": 1}[self.blind])
        first, second = sorted(map(str, facts.groups)) if self.blind == "relation" else facts.canonical().groups
        text = f"{first} {second} {'' if self.blind == 'relation' else facts.canonical().relation}"
        x = np.random.default_rng(list(text.encode())).normal(size=64)
        return (x / np.linalg.norm(x)).astype(np.float32)


DATA = Scenes(heldout=4).prepare()
TOKENIZER = DATA.tokenizer


@pytest.mark.parametrize("blind", ["", "shape", "colour", "count", "relation"])
def test_each_fact_is_tested_alone(blind):
    """Who sees everything is always right; who cannot see one kind of fact never tells it, but the others.

    Not always: groups that differ in that fact alone look the same, so that their counts may be swapped.
    """
    evaluation = SceneFacts(examples=12, batch_size=8)
    metrics = evaluation.build(toys.setting(DATA, Oracle(blind)))({}, {}, 0).metrics
    kinds = ("shape", "colour", "count", "relation")
    assert set(metrics) == {*kinds, *(f"unseen/{k}" for k in kinds)}
    for kind in kinds:
        for prefix in ("", "unseen/"):
            value = metrics[prefix + kind]
            assert value == 0 if kind == blind else value > 0.8 if blind else value == 1, prefix + kind


def by_hand(task, params, split, examples):
    found = {}
    for i in range(examples):
        scene = DATA.heldout_scene(i, split)
        image = np.asarray(task.embed_images(params, {"image": jnp.asarray(render(scene, 32))[None]}))[0]

        def similarity(facts, image=image):
            tokens, lengths = DATA.encode([caption(facts)])
            batch = {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray(lengths)}
            return float(image @ np.asarray(task.embed_texts(params, batch))[0])

        true = similarity(scene.facts)
        for kind, group, others in scenes.alternatives(scene.facts):
            right, count = found.get(kind, (0, 0))
            assert all(f.get(kind, group) != scene.facts.get(kind, group) for f in others)
            found[kind] = right + all(true > similarity(f) for f in others), count + 1
    return {kind: right / count for kind, (right, count) in found.items()}


PARAMS = {
    "image": jax.random.normal(jax.random.key(0), (32 * 32 * 3, 16)),
    "text": jax.random.normal(jax.random.key(1), (128, 16)),
}


def test_by_hand_on_any_mesh():
    task = Projections()
    expected = by_hand(task, PARAMS, "recombined", 9)
    expected |= {f"unseen/{k}": v for k, v in by_hand(task, PARAMS, "unseen", 9).items()}
    assert 0 < expected["shape"] < 1
    for size, devices, mesh in ((5, 1, Mesh()), (0, 1, Mesh()), (16, 8, Mesh(data=4, fsdp=2))):
        report = SceneFacts(examples=9, batch_size=size).build(toys.setting(DATA, task, devices, mesh))(PARAMS, {}, 3)
        assert report.metrics == pytest.approx(expected)
    lines = report.texts["facts"].splitlines()
    assert lines[0].split() == ["recombined", "unseen", "chance"]
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[1:]}
    chances = {"shape": 1 / 4, "colour": 1 / 6, "count": 1 / 3, "relation": 1 / 4}
    assert table == {k: pytest.approx([expected[k], expected[f"unseen/{k}"], chances[k]], abs=1e-4) for k in chances}


def test_who_tells_nothing_apart_is_never_right():
    blank = {"image": PARAMS["image"], "text": jnp.ones((128, 16))}
    metrics = SceneFacts(examples=4).build(toys.setting(DATA, Projections()))(blank, {}, 0).metrics
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("level", [1, 3])
def test_other_levels(level):
    data = Scenes(level=level, size=64).prepare()
    params = {"image": jnp.ones((64 * 64 * 3, 16)), "text": PARAMS["text"]}
    report = SceneFacts(examples=3).build(toys.setting(data, Projections()))(params, {}, 0)
    expected = {1: {"shape", "colour", "place"}, 3: {"shape", "colour", "count", "size", "texture", "relation"}}[level]
    assert expected - {"texture"} <= {k for k in report.metrics if "/" not in k} <= expected


def test_data_without_known_facts():
    pairs = toys.Pairs(4, captions=[1, 2, 3, 4])
    with pytest.raises(UserError, match="'facts' needs the data Scenes"):
        SceneFacts().build(toys.setting(pairs))
    with pytest.raises(UserError, match="needs a task that embeds pictures and texts"):
        SceneFacts().build(toys.setting(DATA, toys.Classifier()))
