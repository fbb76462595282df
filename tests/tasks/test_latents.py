"""Latents that are computed once: those of the pictures, in the data's order, trained on as pictures are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from PIL import Image

from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.scenes import Scenes
from jaxgen.data.transforms import ColorJitter, Flip
from jaxgen.errors import UserError
from jaxgen.experiment import Experiment, train
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.dit import DiT
from jaxgen.sharding import unbox
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training import metrics
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import SGD

COUNT, SIDE = 20, 8
CODER = Autoencoder(width=4, multipliers=(1, 2), blocks=1, groups=2, latent=2, attention=False, scale=0.7)
TASK = Diffusion(
    DiT(out=2, patch=2, width=8, depth=1, heads=1, classes=2, periods=8, kernel="xla"), autoencoder=CODER, cached=True
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for i in range(COUNT):
        folder = tmp_path / "pictures" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        if i == 5:
            (folder / f"{i}.png").write_bytes(b"no picture")
        else:
            Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{i}.png")
    return LabelledImages(path=str(tmp_path / "pictures"), size=SIDE, heldout=0.2, augment=(Flip(),), max_bad=0.5)


@pytest.fixture(scope="module")
def variables():
    params, state = jit(lambda key: unbox(TASK.init(key)))(jax.random.key(1))
    return params, state


def test_are_those_of_the_pictures(data, variables):
    params, state = variables
    prepared = data.prepare()
    found = TASK.stored(prepared, params, state)
    pictures = [e for e in map(prepared.readers("train", 0).__getitem__, range(len(prepared.names("train"))))]
    sound = [e for e in pictures if e["weights"] > 0]

    @jit
    def moments(image):
        return CODER.apply({"params": params["autoencoder"]}, image / 127.5 - 1, method="encode")

    image = np.stack([e["image"] for e in sound]).astype(np.float32)
    expected = [np.concatenate(moments(x), -1) for x in (image, image[:, :, ::-1])]
    seen = {}
    for i in range(6 * len(sound)):
        example = found.train(3)[i]
        assert example["latents"].dtype == np.float16
        errors = np.abs(np.stack(expected) - example["latents"]).max((2, 3, 4))
        view, row = np.unravel_index(errors.argmin(), errors.shape)
        assert errors[view, row] < 2e-3 * np.abs(expected).max()
        assert example["label"] == sound[row]["label"]
        seen.setdefault(i // len(sound), []).append((view, row))
    for epoch in seen.values():  # each picture once, in another order
        assert sorted(row for _, row in epoch) == list(range(len(sound)))
    assert len({tuple(row for _, row in epoch) for epoch in seen.values()}) == 6
    share = np.mean([view for epoch in seen.values() for view, _ in epoch])
    assert 0.25 < share < 0.75

    kept = {k: jnp.asarray(np.stack([found.train(3)[i][k] for i in range(8)])) for k in ("latents", "label")}
    means = TASK.values(params, state, kept)
    np.testing.assert_allclose(means, kept["latents"][..., :2].astype(jnp.float32) * 0.7, rtol=1e-5)
    drawn = TASK.values(params, state, kept, jax.random.split(jax.random.key(0), 8))
    deviation = np.exp(0.5 * np.float32(kept["latents"][..., 2:])) * 0.7
    assert 0.7 < np.std((drawn - means) / deviation) < 1.3


def test_are_computed_once(data, variables, monkeypatch):
    params, state = variables
    prepared = data.prepare()
    first = TASK.stored(prepared, params, state)
    from jaxgen.tasks import latents

    def again(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(latents, "_write", again)
    np.testing.assert_array_equal(
        TASK.stored(prepared, params, state).train(0)[4]["latents"], first.train(0)[4]["latents"]
    )
    other = jax.tree.map(lambda x: x + 0.1, params)
    with pytest.raises(AssertionError, match="again"):  # by other weights
        TASK.stored(prepared, other, state)


@pytest.mark.experiments
def test_a_run_learns_from_them(data, tmp_path):
    experiment = Experiment(
        "latents", TASK, data, SGD(learning_rate=0.01), batch_size=8, steps=3, log=Logging(every=1)
    )
    result = train(experiment, run_dir=tmp_path / "run")
    assert result.step == 3 and np.isfinite(metrics.last(tmp_path / "run")["train/loss"])
    more = dataclasses.replace(experiment, steps=4)
    assert train(more, run_dir=tmp_path / "run").step == 4


def test_what_cannot_be_kept(data, variables):
    params, state = variables
    jitter = dataclasses.replace(data, augment=(ColorJitter(),)).prepare()
    with pytest.raises(UserError, match="data.augment may hold Flip and nothing else, not ColorJitter"):
        TASK.stored(jitter, params, state)
    with pytest.raises(UserError, match="drawn without end"):
        TASK.stored(Scenes().prepare(), params, state)
    with pytest.raises(UserError, match="there is no task.autoencoder"):
        dataclasses.replace(TASK, autoencoder=None).check(data.spec(8))
