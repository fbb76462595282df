"""Captioned scenes: what a caption says is in the picture, what is held out is never trained on, the same anywhere."""

import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import scenes
from jaxgen.data.scenes import COLOURS, PLACES, SHAPES, SPLITS, Facts, Group, Scenes, caption, parse, render, sample
from jaxgen.data.tokenizers import Bytes, Characters
from jaxgen.errors import UserError

OF_GROUPS = ("shape", "colour", "count", "size", "texture")
SIZES = {1: 32, 2: 32, 3: 64}


def drawn(level, count=200, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [sample(rng, level, split) for _ in range(count)]


def every_fact(level):
    """All facts of level 1 or 2, each in the one way that is canonical."""
    groups = [Group(s, c, n) for s in SHAPES for c in COLOURS for n in ((1,) if level == 1 else (1, 2, 3))]
    if level == 1:
        return [Facts((g,), place=place) for g in groups for place in PLACES]
    pairs = [p for p in itertools.product(groups, groups) if (p[0].shape, p[0].colour) != (p[1].shape, p[1].colour)]
    return [Facts(pair, relation) for pair in pairs for relation in ("left of", "above")]


# --- captions ------------------------------------------------------------------------------------------------------


def test_captions_by_hand():
    one = Facts((Group("ring", "red"),), place="in the top left corner")
    assert caption(one) == "a red ring in the top left corner"
    two = Facts((Group("cross", "blue", 2), Group("square", "cyan", 3)), "right of")
    assert caption(two) == "two blue crosses right of three cyan squares"
    three = Facts((Group("cross", "blue", 1, "small", "striped"), Group("7", "red", 3, "large", "plain")), "below")
    assert caption(three) == "a small striped blue cross below three large red 7s"
    assert (one.level, two.level, three.level) == (1, 2, 3)


@pytest.mark.parametrize("level", scenes.LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_caption_is_read_back(level, split):
    assert all(parse(caption(s)) == s.facts and s.facts.level == level for s in drawn(level, split=split))


@pytest.mark.parametrize(
    "text",
    ["", "a red ring",
     "two red ring above a blue cross", "a red rings above a blue cross", "a red ring near a blue cross",
     "a red ring above a blue cross.", "four red rings above a blue cross", "A red ring above a blue cross"],
)  # fmt: skip
def test_what_is_no_caption(text):
    with pytest.raises(ValueError, match="is no"):
        parse(text)


def test_alternatives_change_one_fact():
    facts = parse("two blue crosses right of three cyan squares")
    found = scenes.alternatives(facts)
    assert [(kind, group, len(others)) for kind, group, others in found] == [
        ("shape", 0, 3), ("colour", 0, 5), ("count", 0, 2), ("shape", 1, 3), ("colour", 1, 5), ("count", 1, 2),
        ("relation", 0, 3),
    ]  # fmt: skip
    texts = [caption(f) for _, _, others in found for f in others]
    assert len(set(texts)) == len(texts) and caption(facts) not in texts
    assert "two blue crosses right of a cyan square" in texts and "two blue rings right of three cyan squares" in texts


# --- what is held out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "total"), [(1, 120), (2, 9936)])
def test_splits(level, total):
    facts = every_fact(level)
    assert len(facts) == total
    by_split = {split: [f for f in facts if f.split == split] for split in SPLITS}
    pairs = {split: {(g.shape, g.colour) for f in found for g in f.groups} for split, found in by_split.items()}
    assert len(pairs["unseen"]) == 4 and len(pairs["train"]) == 20 and not pairs["train"] & pairs["unseen"]
    assert pairs["recombined"] <= pairs["train"]
    assert {s for s, _ in pairs["unseen"]} == set(SHAPES) and len({c for _, c in pairs["unseen"]}) == 4
    share = len(by_split["recombined"]) / (len(by_split["recombined"]) + len(by_split["train"]))
    assert 0.05 < share < 0.15 if level == 1 else 0.095 < share < 0.105


def test_both_ways_to_say_the_same_are_in_one_split():
    for scene in drawn(2, 200) + drawn(3, 100):
        first, second = scene.facts.groups
        turned = Facts((second, first), scenes.OPPOSITE[scene.facts.relation])
        assert turned.split == "train" and turned.canonical() == scene.facts.canonical()
        assert turned.canonical().relation in ("left of", "above")


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_nothing_of_a_split_is_sampled_for_another(level):
    found = {split: {caption(s.facts.canonical()) for s in drawn(level, 300, split)} for split in SPLITS}
    assert not found["train"] & (found["recombined"] | found["unseen"]) and not found["recombined"] & found["unseen"]
    assert len(found["train"]) > (50 if level == 1 else 280)


def test_facts_are_drawn_evenly():
    groups = [g for s in drawn(2, 3000) for g in s.facts.groups]
    for kind, values in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("count", (1, 2, 3))):
        shares = [np.mean([getattr(g, kind) == v for g in groups]) for v in values]
        np.testing.assert_allclose(shares, 1 / len(values), rtol=0.25)  # the unseen pairs tilt it a little


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", scenes.LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_masks_show_as_many_objects_as_are_said_each_in_its_colour(level, split):
    size = SIZES[level]
    for scene in drawn(level, 60, split):
        picture, (masks, groups) = render(scene, size).astype(int), scenes.masks(scene, size)
        assert masks.shape[1:] == (size, size) and masks.sum(0).max() == 1
        assert np.bincount(groups).tolist() == [g.count for g in scene.facts.groups]
        ground = picture[~masks.any(0)]
        assert np.median(ground) <= 48 and np.ptp(np.median(ground, 0)) <= 1
        for mask, group in zip(masks, groups, strict=True):
            whole = scene.facts.groups[group]
            if whole.texture in ("", "plain"):
                middle = np.median(picture[mask], 0)
                distance = {c: np.abs(middle - rgb).sum() for c, rgb in COLOURS.items()}
                assert min(distance, key=distance.get) == whole.colour, caption(scene)


@pytest.mark.parametrize("level", (2, 3))
def test_one_relation_is_true_by_far(level):
    for scene in drawn(level, 400):
        masks, groups = scenes.masks(scene, 64)
        y, x = np.mgrid[:64, :64] / 64
        centres = [[np.mean([c[m].mean() for m in masks[groups == g]]) for c in (x, y)] for g in (0, 1)]
        across, down = np.subtract(centres[1], centres[0])
        expected = {"left of": across, "right of": -across, "above": down, "below": -down}
        assert max(expected, key=expected.get) == scene.facts.relation
        assert abs(abs(across) - abs(down)) > 0.05


def test_objects_keep_their_distance():
    for scene in drawn(2, 300) + drawn(3, 300):
        spots = [s for group in scene.objects for s in group]
        for (x, y, r), (x2, y2, r2) in itertools.combinations(spots, 2):
            assert max(abs(x - x2), abs(y - y2)) >= r + r2 + scenes.GAP - 1e-9
        assert all(r <= min(x, 1 - x, y, 1 - y) for x, y, r in spots)


def test_the_same_scene_at_any_size():
    """A picture of twice the size, averaged, is the picture: coverage is area."""
    for scene in drawn(1, 20) + drawn(2, 20):
        small, large = render(scene, 64).astype(float), render(scene, 256).astype(float)
        averaged = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(averaged - small).mean() < 1.0 and np.abs(averaged - small).max() < 90


@pytest.mark.parametrize(
    ("shape", "area"),
    [("square", 4 * 0.88**2), ("triangle", 1.9), ("cross", 4 * (0.6 - 0.09)), ("ring", np.pi * (1 - 0.25))],
)
def test_areas(shape, area):
    _, _, inside, _ = scenes.coverage(shape, 64.2, 63.7, 40, 128)
    assert inside.sum() == pytest.approx(area * 40**2, rel=0.01)


# --- data ----------------------------------------------------------------------------------------------------------


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_batches(level):
    data = Scenes(level=level, size=SIZES[level], heldout=40)
    prepared = data.prepare()
    spec = data.spec(7)
    for dataset, more in ((prepared.train(0), set()), (prepared.heldout(), {"weights"})):
        example = dataset[3]
        assert set(example) == set(spec) | more
        for name, s in spec.items():
            assert (7, *example[name].shape) == s.shape and example[name].dtype == s.dtype
        text = prepared.tokenizer.decode(example["tokens"][: example["lengths"] - 1])
        assert parse(text).level == level
        assert (example["tokens"][example["lengths"] - 1 :] == prepared.tokenizer.eos).all()
    assert len(prepared.heldout()) == 40 and prepared.tokenizer.vocab_size <= data.tokenizer.vocab_size
    texts = {prepared.tokenizer.decode(e["tokens"][: e["lengths"] - 1]) for e in prepared.heldout()}
    assert {parse(t).split for t in texts} == {"recombined"}


def test_example_is_a_function_of_seed_and_index():
    one, two = Scenes().prepare().train(3), Scenes().prepare().train(3)
    again, other = pickle.loads(pickle.dumps(one)), Scenes().prepare().train(4)
    for i in (0, 5, 10**12):
        assert same(one[i], two[i]) and same(one[i], again[i])
    assert not any(same(one[i], other[i]) or same(one[i], one[i + 1]) for i in range(20))
    assert len(one) > 1e18 and Scenes().prepare().train(-1)[0].keys() == one[0].keys()
    unseen = Scenes(split="unseen").prepare()
    assert same(unseen.train(3)[5], one[5])  # the split says what is measured, not what is trained on
    assert not same(unseen.heldout()[0], Scenes().prepare().heldout()[0])


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_pairs_with_instructions(level):
    """The scene that is there without edits, as it is after one, and the instruction; the same for each reading."""
    data = Scenes(level=level, size=SIZES[level], heldout=5, edits=True)
    plain = Scenes(level=level, size=SIZES[level], heldout=5).prepare()
    prepared, again = data.prepare(), pickle.loads(pickle.dumps(data.prepare()))
    spec = data.spec(3)
    for dataset, own, more in (
        (prepared.train(3), plain.train(3), set()), (prepared.heldout(), plain.heldout(), {"weights"})
    ):  # fmt: skip
        for i in range(5):
            example = dataset[i]
            assert set(example) == set(spec) | more == {"before", "image", "tokens", "lengths"} | more
            assert all((3, *example[name].shape) == s.shape and example[name].dtype == s.dtype
                       for name, s in spec.items())
            np.testing.assert_array_equal(example["before"], own[i]["image"])
            assert (example["before"] != example["image"]).any()
    assert same(prepared.train(3)[10**12], again.train(3)[10**12])
    after, instruction = prepared.edit(3, 4)
    example = prepared.train(3)[4]
    np.testing.assert_array_equal(example["image"], render(after, SIZES[level]))
    assert prepared.tokenizer.decode(example["tokens"][: example["lengths"] - 1]) == instruction
    assert prepared.fingerprint != plain.fingerprint


def test_the_same_scenes_for_ever():
    """A change of what a seed gives must be meant, and counted in VERSION."""
    assert [caption(s) for s in drawn(1, 2)] == GOLDEN[1]
    assert [caption(s) for s in drawn(2, 2)] == GOLDEN[2]
    assert [caption(s) for s in drawn(3, 2)] == GOLDEN[3]


GOLDEN = {
    1: [
        "a cyan square in the bottom left corner",
        "a green cross in the top left corner",
    ],
    2: [
        "a purple cross below three blue rings",
        "two blue crosses above two blue rings",
    ],
    3: [
        "three small checked purple crosses below two large checked blue rings",
        "two small striped blue crosses below two small striped blue rings",
    ],
}


def test_one_vocabulary_of_all_levels():
    tokenizers = [Scenes(level=k, size=64).prepare().tokenizer for k in scenes.LEVELS]
    assert len({t.fingerprint for t in tokenizers}) == 1
    rng = np.random.default_rng(77)
    for scene in itertools.chain(*(drawn(k, 60, split, 5) for k in scenes.LEVELS for split in SPLITS)):
        texts = [caption(scene), *itertools.chain(*scenes.questions(scene)), scenes.edit(scene, rng)[1]]
        texts.append(scenes.clip(scene, 2, rng)[1])
        assert [tokenizers[0].decode(tokenizers[0].encode(t)) for t in texts] == texts


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters()])
def test_other_tokenizers(tokenizer):
    with pytest.raises(UserError, match="data.length is 16, too short for the captions of level 2"):
        Scenes(tokenizer=tokenizer).prepare()
    prepared = Scenes(tokenizer=tokenizer, length=64).prepare()
    example = prepared.heldout()[0]
    assert parse(prepared.tokenizer.decode(example["tokens"][: example["lengths"] - 1])).split == "recombined"


def test_encode_and_picture():
    prepared = Scenes().prepare()
    scene = prepared.heldout_scene(0)
    tokens, lengths = prepared.encode([caption(scene)])
    example = prepared.heldout()[0]
    assert np.array_equal(tokens[0], example["tokens"]) and lengths[0] == example["lengths"]
    file = io.BytesIO()
    Image.fromarray(render(scene, 32)).save(file, "PNG")
    assert np.array_equal(prepared.picture(file.getvalue()), example["image"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"level": 4}, "data.level is 4; it is 1, 2 or 3"),
        ({"level": 3, "size": 32}, "data.size is 32; level 3 needs 64 or more"),
        ({"size": 16}, "level 2 needs 32 or more"),
        ({"split": "new"}, "it is 'recombined' or 'unseen'"),
        ({"split": "train"}, "it is 'recombined' or 'unseen'"),
        ({"heldout": -1}, "data.heldout is -1"),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        Scenes(**fields)


# --- questions, edits, clips ---------------------------------------------------------------------------------------


def test_questions_by_hand():
    rng = np.random.default_rng(0)
    scene = scenes._arrange(rng, parse("two red rings left of a red cross"))
    assert scenes.questions(scene) == (
        ("how many red rings are there?", "two"), ("what colour are the rings?", "red"),
        ("is there a red ring?", "yes"), ("is there a green ring?", "no"),
        ("how many red crosses are there?", "one"), ("what colour is the cross?", "red"),
        ("is there a red cross?", "yes"), ("is there a green cross?", "no"),
        ("are the red rings left of the red cross?", "yes"), ("are the red rings right of the red cross?", "no"),
    )  # fmt: skip


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_questions_have_one_answer(level):
    """No question has two answers in a scene, and "yes" is as frequent as "no"."""
    for scene in drawn(level, 100):
        found = scenes.questions(scene)
        assert len({q for q, _ in found}) == len(found) >= 4
        answers = [a for _, a in found]
        assert answers.count("yes") == answers.count("no") > 0


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_an_edit_changes_one_fact_and_stays_in_training(level):
    rng, kinds = np.random.default_rng(1), set()
    for scene in drawn(level, 300):
        after, instruction = scenes.edit(scene, rng)
        every = [*itertools.product(OF_GROUPS, range(len(scene.facts.groups))), ("relation", 0), ("place", 0)]
        changed = [(kind, g) for kind, g in every if scene.facts.get(kind, g) != after.facts.get(kind, g)]
        if ("texture" in {k for k, _ in changed}) and len(changed) == 2:  # what becomes a digit becomes plain
            assert {k for k, _ in changed} == {"shape", "texture"}
        else:
            assert len(changed) == 1, (caption(scene), instruction)
        kind, group = changed[0]
        kinds.add(kind)
        assert after.facts.split == "train" and scenes._is_clear(after)
        if kind in ("shape", "colour", "texture"):
            assert after.objects == scene.objects
        if kind == "colour":
            assert instruction.startswith("make the ") and instruction.endswith(after.facts.groups[group].colour)
        if kind not in ("relation", "place"):
            assert after.objects[1 - group :][:1] == scene.objects[1 - group :][:1]  # the other group stays
        assert after.background == scene.background
    assert kinds >= {1: {"shape", "colour", "place"}, 2: {"shape", "colour", "count", "relation"},
                     3: {"shape", "colour", "count", "relation", "size", "texture"}}[level]  # fmt: skip


def test_instructions_by_hand():
    a = parse("two red rings left of a blue cross")
    for changed, kind, group, text in (
        ("two red squares left of a blue cross", "shape", 0, "turn the red rings into squares"),
        ("two red rings left of a blue square", "shape", 1, "turn the blue cross into a square"),
        ("a red ring left of a blue cross", "count", 0, "remove a red ring"),
        ("two red rings left of two blue crosses", "count", 1, "add a blue cross"),
        ("two cyan rings left of a blue cross", "colour", 0, "make the red rings cyan"),
        ("two red rings above a blue cross", "relation", 0, "move the red rings above the blue cross"),
        ("two red rings right of a blue cross", "relation", 0, "move the red rings to the right of the blue cross"),
    ):
        assert scenes._instruction(a, parse(changed), kind, group) == text


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_clips(level):
    rng, directions = np.random.default_rng(2), set()
    for scene in drawn(level, 100):
        frames, text = scenes.clip(scene, 6, rng)
        assert len(frames) == 6 and frames[0] == scene
        assert scenes.clip(scene, 1, rng)[0] == (scene,)
        if level == 1:
            begin, _, end = text.partition(" moves from ")[2].partition(" to ")
            assert scene.facts.place == f"in {begin}" and f"in {end}" in PLACES and begin != end
            assert np.hypot(*np.subtract(frames[-1].objects[0][0][:2], PLACES[f"in {end}"])) < 0.08
            continue
        words, direction = text.split(), text.split()[-1]
        assert text.startswith(caption(scene) + ", and the ") and words[-2] in ("move", "moves")
        directions.add(direction)
        moved = [g for g in (0, 1) if frames[-1].objects[g] != scene.objects[g]]
        assert len(moved) == 1 and scene.facts.groups[moved[0]].colour in text.split(", and ")[1]
        step = np.subtract(frames[-1].objects[moved[0]], scene.objects[moved[0]])[0, :2]
        assert np.allclose(step / np.abs(step).max(), scenes.DIRECTIONS[direction]) and np.abs(step).max() >= 0.02
        assert all(scenes._is_clear(f) for f in frames)  # the caption is true all the while
    assert level == 1 or directions == set(scenes.DIRECTIONS)
