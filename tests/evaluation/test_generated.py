"""Pictures that a toy task draws, measured: against the distances of features that are known picture by picture."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.toys import Pairs, image, number, setting, table
from jax import jit
from scipy.special import softmax

from jaxgen.data.scenes import Scenes, caption
from jaxgen.errors import UserError
from jaxgen.evaluation import distances, generated, scenes
from jaxgen.evaluation.distances import moments
from jaxgen.evaluation.features import Inception, Network, digest_of, filled, in_parts, of_task, resized
from jaxgen.evaluation.generated import BitsPerDim, FactsRight, Generated, Recognised, compare
from jaxgen.models.vit import ViT
from jaxgen.pretrained import Pretrained
from jaxgen.sampling.diffusion import Sampling, keys_of
from jaxgen.sharding import Mesh, unbox
from jaxgen.tasks.base import Task
from jaxgen.tasks.classification import Classification

COUNT, CLASSES, N = 40, 4, 50
LABELS = np.random.default_rng(0).integers(0, CLASSES, COUNT)
ROWS = table(1, 300)
LOGITS = 5 * table(2, 300, CLASSES)
DATA = Pairs(COUNT, labels=LABELS, classes=tuple("abcd"))
MESHES = [(1, Mesh(), 7), (8, Mesh(data=2, fsdp=2, tensor=2), 8)]


@dataclasses.dataclass(frozen=True)
class Draws(Task):
    """Draws picture 10 * label + a random number below 10, and adds the parameter and the number of steps."""

    def sample(self, params, state, batch, keys, sampling):
        chance = jax.vmap(lambda key: jax.random.randint(key, (), 0, 10))(keys)
        n = jnp.asarray(batch["label"]) * 10 + chance + params["model"] + sampling.steps
        picture = jnp.full((n.shape[0], 4, 4, 3), 100)
        return picture.at[:, 0, 0, 0].set(n % 256).at[:, 0, 1, 0].set(n // 256).astype(jnp.uint8)

    def bits_per_dim(self, params, state, batch, keys):
        chance = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        return batch["label"] + chance + params["model"]


TASK, PARAMS = Draws(), {"model": jnp.int32(30)}
SAMPLING = Sampling(steps=5)


def network(**changes):
    """A picture's row of the table is its features."""
    variables = {"rows": jnp.asarray(ROWS), "logits": jnp.asarray(LOGITS)}

    def see(variables, images):
        n = number(images)
        return variables["rows"][n], jax.nn.softmax(variables["logits"][n])

    return Network(**{"name": "table", "digest": "abcdef0123456789", "resize": "none", "variables": variables,
                      "see": see} | changes)  # fmt: skip


def drawn():
    """The numbers of the pictures that are drawn, one after the other."""

    @jax.jit
    def one(label, i):
        return number(TASK.sample(PARAMS, {}, {"label": label[None]}, keys_of(0, i[None]), SAMPLING))[0]

    return np.array([one(LABELS[i % COUNT], np.int32(i)) for i in range(N)])


DRAWN = drawn()


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch):
    monkeypatch.setattr(distances, "kid", functools.partial(distances.kid, subsets=2, size=30))


def measured(evaluation, data=DATA, task=TASK, devices=1, mesh=Mesh(), batch_size=8, params=PARAMS):
    return evaluation.build(setting(data, task, devices, mesh, batch_size))(params, {}, 3)


# --- distances -----------------------------------------------------------------------------------------------------

EVERYTHING = ("fd", "kid", "precision_recall", "density_coverage", "inception_score")


@pytest.mark.parametrize(("devices", "mesh", "size"), MESHES)
def test_distances_of_what_is_drawn(devices, mesh, size):
    """Each held-out condition in turn, beginning again after the last; all held-out pictures are the reference."""
    evaluation = Generated(n=N, metrics=EVERYTHING, features=network(), sampling=SAMPLING, batch_size=size)
    report = measured(evaluation, devices=devices, mesh=mesh)
    real, fake = ROWS[:COUNT], ROWS[DRAWN]
    p = softmax(LOGITS[DRAWN], axis=1)
    kid, error = distances.kid(real, fake)
    precision, recall = distances.precision_recall(real, fake)
    density, coverage = distances.density_coverage(real, fake)
    score, deviation = distances.inception_score(p)
    expected = {
        "fd": distances.frechet_distance(moments(real), moments(fake)), "kid": kid, "kid_error": error,
        "precision": precision, "recall": recall, "density": density, "coverage": coverage,
        "inception_score": score, "inception_score_deviation": deviation,
    }  # fmt: skip
    assert report.metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < recall < 1 and expected["fd"] > 0.01
    assert report.images["generated"].shape[2] == 3
    text = report.texts["generated"]
    assert "FD (table, abcdef012345)" in text and "50 drawn pictures, 40 held-out ones" in text
    assert "warning: a Fréchet distance of 50 pictures, fewer than 10,000" in text


def test_moments_alone_say_the_same_and_pictures_that_cannot_be_read_are_none():
    unread = (3, 17)
    data = Pairs(COUNT, labels=LABELS, unread=unread)
    report = measured(Generated(n=N, metrics=("fd",), features=network(), sampling=SAMPLING, shown=0), data)
    kept = [i for i in range(N) if i % COUNT not in unread]
    real = np.delete(ROWS[:COUNT], unread, 0)
    expected = distances.frechet_distance(moments(real), moments(ROWS[DRAWN[kept]]))
    assert report.metrics == {"fd": pytest.approx(expected, rel=1e-4)} and not report.images
    assert "47 drawn pictures, 38 held-out ones" in report.texts["generated"]


def test_it_is_called_fid_for_one_network_alone(monkeypatch):
    """And enough pictures bring no warning."""
    assert generated.FEW == 10_000
    monkeypatch.setattr(generated, "FEW", N)
    report = measured(Generated(n=N, metrics=("fd",), features=network(is_fid=True), sampling=SAMPLING, shown=0))
    assert set(report.metrics) == {"fid"} and report.texts["generated"].startswith("FID ")
    assert "warning" not in report.texts["generated"]


@dataclasses.dataclass(frozen=True)
class Repeats(Task):
    def sample(self, params, state, batch, keys, sampling):
        return batch["image"]


def test_captions_with_a_network_of_pictures_and_texts():
    """Text "5 6" is row 5 of the table, as picture 5 is; a quarter of the pictures are not what their text says."""
    captions = np.where(np.arange(COUNT) % 4 == 3, 2, np.arange(COUNT))
    data = Pairs(COUNT, captions=captions)

    def texts(captions):
        assert len(set(captions)) == len(captions)   # each once
        return ROWS[[int(c.split()[0]) for c in captions]]

    evaluation = Generated(n=30, metrics=("clip_score", "cmmd"), features=network(texts=texts))
    report = measured(evaluation, data, Repeats())
    expected = distances.clip_score(ROWS[:30], ROWS[captions[:30]])
    assert report.metrics["clip_score"] == pytest.approx(expected, rel=1e-5) and 0.5 < expected < 2.5
    assert report.metrics["cmmd"] == pytest.approx(distances.cmmd(ROWS[:COUNT], ROWS[:30]), rel=1e-3)


# --- what can be compared ------------------------------------------------------------------------------------------


def result(features=None, data=DATA, params=PARAMS, **changes):
    evaluation = Generated(n=N, metrics=("fd",), features=features or network(), sampling=SAMPLING, shown=0)
    report = measured(dataclasses.replace(evaluation, **changes), data, params=params)
    return report.texts["generated-settings"], report.metrics["fd"]


def test_results_of_two_models_are_compared():
    (a, first), (b, second) = result(), result(params={"model": jnp.int32(60)})
    assert compare(a, json.loads(b)) == {"fd": (first, second)} and first != second
    told = json.loads(a)
    assert told["step"] == 3 and told["settings"]["features_hash"] == "abcdef0123456789"
    assert told["settings"]["n"] == N and told["settings"]["reference"]["pictures"] == COUNT


@pytest.mark.parametrize(("changes", "said"), [
    ({"n": 49}, "n (50, now 49)"),
    ({"sampling": Sampling(steps=6)}, "sampling.steps (5, now 6)"),
    ({"sampling": Sampling(steps=5, guidance=2.0)}, "sampling.guidance (1.0, now 2.0)"),
    ({"weights": "raw"}, "weights ('ema', now 'raw')"),
    ({"features": network(digest="9")}, "features_hash ('abcdef0123456789', now '9')"),
    ({"features": network(resize="all")}, "resize ('none', now 'all')"),
    ({"data": Pairs(39, labels=LABELS)}, "reference.pictures (40, now 39)"),
])  # fmt: skip
def test_results_of_other_settings_are_not(changes, said):
    with pytest.raises(UserError, match=re.escape(f"cannot be compared, since they differ in {said}")):
        compare(result()[0], result(**changes)[0])


# --- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "mesh", "size"), MESHES)
def test_recognised(devices, mesh, size):
    evaluation = Recognised(n=N, classifier=network(), sampling=SAMPLING, batch_size=size)
    report = measured(evaluation, devices=devices, mesh=mesh)
    label, found = LABELS[np.arange(N) % COUNT], LOGITS[DRAWN].argmax(1)
    shares = [np.mean(found[label == c] == c) for c in range(CLASSES)]
    assert report.metrics == pytest.approx({"accuracy": np.mean(label == found), "worst_class": min(shares)})
    lines = report.texts["recognised"].splitlines()
    for c, line in enumerate(lines[1 : 1 + CLASSES]):
        likely = np.bincount(found[label == c]).argmax()
        assert line.split() == ["abcd"[c], str(np.sum(label == c)), f"{shares[c]:.3f}", "abcd"[likely]]
    own = np.mean(LOGITS[:COUNT].argmax(1) == LABELS)
    assert f"right of {own:.4f} of the 40 held-out pictures" in lines[-1]
    assert report.images["recognised"].shape[2] == 3


def test_a_classifier_that_says_nothing_is_no_hit():
    variables = {"rows": jnp.asarray(ROWS), "logits": jnp.full((300, CLASSES), jnp.nan)}
    report = measured(Recognised(n=20, classifier=network(variables=variables), sampling=SAMPLING))
    assert report.metrics == {"accuracy": 0, "worst_class": 0} and "nothing" in report.texts["recognised"]


# --- facts ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Paints(Task):
    """Draws the held-out picture itself, with red and blue exchanged where the key says so."""

    share: float = 0.5

    def sample(self, params, state, batch, keys, sampling):
        turn = jax.vmap(lambda key: jax.random.uniform(key) < self.share)(keys)
        return jnp.where(turn[:, None, None, None], batch["image"][..., ::-1], batch["image"])


@pytest.mark.parametrize(("devices", "mesh"), [(1, Mesh()), (8, Mesh(data=2, fsdp=2, tensor=2))])
def test_facts_right(devices, mesh):
    data = Scenes(heldout=4).prepare()
    report = measured(FactsRight(n=5, each=2), data, Paints(), devices, mesh)
    for split, prefix in (("recombined", ""), ("unseen", "unseen/")):
        cases = [data.heldout_scene(i // 2, split) for i in range(10)]
        turned = np.asarray(jax.vmap(lambda key: jax.random.uniform(key) < 0.5)(keys_of(0, jnp.arange(10))))
        pictures = [data.pair(scene)["image"] for scene in cases]
        pictures = [p[..., ::-1] if t else p for p, t in zip(pictures, turned, strict=True)]
        total = scenes.score(pictures, [caption(scene) for scene in cases])
        expected = {prefix + kind: right / count for kind, (right, count) in total.items()}
        right, count = np.sum([pair for kind, pair in total.items() if kind != "exact"], 0)
        expected[f"{prefix}mean"] = right / count
        assert {k: report.metrics[k] for k in expected} == pytest.approx(expected)
        assert expected[f"{prefix}shape"] == 1 > expected[f"{prefix}colour"]
    assert set(report.metrics) >= {"mean", "exact", "relation", "count", "unseen/mean", "unseen/relation"}
    assert "5 captions of each split, 2 pictures each" in report.texts["facts"] and "nan" not in report.texts["facts"]
    assert report.images["facts"].shape[2] == 3


# --- likelihood ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "mesh", "size"), MESHES)
@pytest.mark.parametrize("n", [0, 21])
def test_bits_per_dim(devices, mesh, size, n):
    report = measured(BitsPerDim(n=n, batch_size=size), devices=devices, mesh=mesh)
    count = n or COUNT
    chance = jax.vmap(lambda key: jax.random.uniform(key))(keys_of(0, jnp.arange(count)))
    bits = LABELS[:count] + np.asarray(chance, np.float64) + 30
    expected = {"bits_per_dim": bits.mean(), "error": bits.std(ddof=1) / count**0.5}
    assert report.metrics == pytest.approx(expected, rel=1e-5)


# --- networks ------------------------------------------------------------------------------------------------------


def test_a_classifier_of_the_suite():
    """Its features and probabilities are the task's own, of grey pictures of another size, a few at a time, on a
    mesh that its sizes do not divide."""
    task = Classification(ViT(out=3, patch=4, width=9, depth=1, heads=3, image_size=8), std=(0.3,))
    shapes, state = unbox(jax.eval_shape(task.init, jax.random.key(0)))
    params = jax.tree.map(lambda s: jnp.asarray(np.random.default_rng(s.size).normal(0, 0.3, s.shape), s.dtype), shapes)
    place = setting(DATA, devices=4, mesh=Mesh(data=2, tensor=2)).sharding
    made = of_task("run", task, params, state, (8, 8, 3), place)
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 1)).astype(np.uint8)
    features, probabilities = jit(made.see)(made.variables, jnp.asarray(images))
    batch = {"image": resized(jnp.asarray(images), (8, 8, 3))}
    expected = jit(lambda b: (task.embed_images(params, b, state), task.logits(params, state, b)))(batch)
    np.testing.assert_allclose(features, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(expected[1]), rtol=1e-4)
    assert made.texts is None and not made.is_fid and made.digest == digest_of((params, state))
    with pytest.raises(UserError, match="4 channels cannot be seen by a network of 3"):
        made.see(made.variables, jnp.zeros((1, 6, 6, 4), jnp.uint8))


def test_resizing():
    """The mean of a picture stays; values stay from 0 to 255, and pictures of the size as they are."""
    x = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    small = resized(jnp.asarray(x), (8, 8, 3))
    assert float(small.mean()) == pytest.approx(x.mean(), abs=2) and float(small.std()) < 20
    large = resized(jnp.asarray(255 * (x > 127).astype(np.uint8)), (96, 96, 3))
    assert float(large.min()) == 0 and float(large.max()) == 255
    np.testing.assert_array_equal(resized(jnp.asarray(x), (64, 64, 3)), x)


def test_in_parts_as_whole(monkeypatch):
    from jaxgen.evaluation import features

    monkeypatch.setattr(features, "PART", 3)
    place = setting(DATA, devices=2, mesh=Mesh(data=2)).sharding
    sizes = []

    def see(variables, images):
        sizes.append(images.shape[0])
        return images.astype(jnp.float32).sum((2, 3)) * variables, None

    images = np.arange(12 * 4 * 4 * 3).reshape(12, 4, 4, 3) % 251
    found, nothing = in_parts(see, place)(2.0, jnp.asarray(images))
    np.testing.assert_array_equal(found, images.sum((2, 3)) * 2)
    assert nothing is None and sizes[0] == 6


def test_the_digest_names_weights_names_and_shapes():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(2)}
    digest = digest_of(tree)
    assert digest_of(jax.tree.map(jnp.asarray, tree)) == digest
    for other in ({**tree, "b": np.float32([0, 1e-7])}, {**tree, "a": tree["a"].T.copy()},
                  {"a": tree["a"], "c": tree["b"]}):  # fmt: skip
        assert digest_of(other) != digest


def test_fields_are_filled():
    made, asked = network(), []

    def opened(pretrained):
        asked.append(pretrained)
        return made

    source = Pretrained("runs/digits", "task")
    assert filled(Recognised(classifier=source), opened).classifier is made and asked == [source]
    for evaluation in (Generated(features=Inception("x.npz")), Recognised(), BitsPerDim()):
        assert filled(evaluation, opened) == evaluation and len(asked) == 1


# --- mistakes ------------------------------------------------------------------------------------------------------

UNLABELLED = Pairs(COUNT, captions=LABELS)


@pytest.mark.parametrize(("evaluation", "data", "task", "said"), [
    (Generated(features=network()), DATA, Task(), "needs a task that makes pictures, and Task does not"),
    (Generated(features=network(), metrics=("fdd",)), DATA, TASK, "no metric 'fdd'; did you mean 'fd'"),
    (Generated(features=network(), metrics=()), DATA, TASK, "measures nothing"),
    (Generated(), DATA, TASK, "needs a network to see pictures with, in its field features"),
    (Generated(features=Pretrained("runs/x")), DATA, TASK, "which is not opened"),
    (Generated(features=Inception("no.npz")), DATA, TASK, "there is no no.npz"),
    (Generated(features=network(), n=3), DATA, TASK, "needs 4 pictures, and compares 3 drawn ones with 40"),
    (Generated(features=network(), n=0), DATA, TASK, "draws n = 0 pictures"),
    (Generated(features=network(), metrics=("cmmd",)), DATA, TASK, "needs a network of pictures and texts"),
    (Generated(features=network(), metrics=("clip_score",)), DATA, TASK, "needs tokens and lengths"),
    (Generated(features=network(see=lambda v, x: (v["rows"][:1], None)), metrics=("inception_score",)), DATA, TASK,
     "needs a classifier, and table is none"),
    (Recognised(classifier=network()), UNLABELLED, TASK, "needs label, and the data has image, tokens, lengths"),
    (Recognised(classifier=network()), Pairs(9, labels=LABELS, classes=tuple("abcdefg")), TASK,
     "has pictures of 7 classes, and the classifier table knows 4"),
    (Recognised(classifier=network(see=lambda v, x: (v["rows"][:1], None))), DATA, TASK, "needs a classifier"),
    (FactsRight(), DATA, TASK, "needs the data Scenes"),
    (BitsPerDim(), DATA, Repeats(), "needs a task that tells likelihoods, and Repeats does not"),
    (Generated(features=network(), batch_size=7), DATA, TASK, "7 pictures at a time, which cannot be divided over"),
])  # fmt: skip
def test_mistakes(evaluation, data, task, said):
    devices, mesh = (2, Mesh()) if getattr(evaluation, "batch_size", 0) else (1, Mesh())
    with pytest.raises(UserError, match=said):
        measured(evaluation, data, task, devices, mesh)


def test_the_toy_draws_what_it_says():
    assert number(image(7)[None])[0] == 7 and len(set(DRAWN)) > 20 and DRAWN.max() < 300
