"""Batches of several shapes: a program for each, on any mesh, and a run that goes on with the batches that it had."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.transforms import Flip
from jaxgen.errors import UserError
from jaxgen.experiment import Experiment, train
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.dit import DiT
from jaxgen.sharding import Mesh
from jaxgen.tasks import latents
from jaxgen.tasks.base import Loss, Task
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training import metrics
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.loop import program_of
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Constant

TABLE = ((12, 20), (16, 16), (20, 12))
COUNTS = (18, 18, 3)  # of the last fewer than a batch


TRACED = []
"""Shapes that a loss was traced for."""


@dataclasses.dataclass(frozen=True)
class Colour(Task):
    """The mean colour is learned."""

    def init(self, key):
        return {"model": {"w": nn.with_logical_partitioning(nn.initializers.zeros, (None,))(key, (3,))}}, {}

    def loss(self, params, batch, context):
        TRACED.append(batch["image"].shape[1:3])
        error = jnp.square(params["model"]["w"] - batch["image"] / 255).mean((1, 2, 3))
        share = jax.vmap(jax.random.uniform)(context.keys())
        return Loss(jnp.sum(share * error), jnp.float32(len(error)))


@dataclasses.dataclass(frozen=True)
class Watched(Diffusion):
    def loss(self, params, batch, context):
        TRACED.append(batch["latents"].shape[1:3])
        return super().loss(params, batch, context)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    TRACED.clear()
    random, number = np.random.default_rng(0), 0
    for (height, width), count in zip(TABLE, COUNTS, strict=True):
        for _ in range(count):
            folder = tmp_path / "pictures" / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
            number += 1
    data = LabelledImages(path=str(tmp_path / "pictures"), size=16, aspect=2.0, aspect_step=4, heldout=0.0)
    return Experiment(
        "shapes", Colour(), data, SGD(learning_rate=0.1, schedule=Constant()), batch_size=8, steps=6,
        mesh=Mesh(fsdp=2, data=4), checkpoint=Checkpointing(every=100), log=Logging(every=1, tensorboard=False),
    )  # fmt: skip


def losses(directory):
    return {line["step"]: line["train/loss"] for line in metrics.read(directory) if "train/loss" in line}


def test_a_program_for_each_shape(experiment, tmp_path):
    result = train(experiment, run_dir=tmp_path / "run")
    assert sorted(TRACED) == [(12, 20), (16, 16)]  # each once
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert facts["shapes"] == "12x20 18; 16x16 21 (with 3 of 20x12, fewer than a batch)"
    assert result.step == 6 and len(set(losses(tmp_path / "run").values())) == 6


def test_a_run_goes_on_with_the_batches_that_it_had(experiment, tmp_path):
    train(experiment, run_dir=tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    for mesh, near in ((experiment.mesh, 0), (Mesh(data=8), 1e-6)):
        directory = tmp_path / f"cut{mesh.data}"
        train(dataclasses.replace(experiment, steps=3), run_dir=directory)
        train(dataclasses.replace(experiment, mesh=mesh), run_dir=directory)
        np.testing.assert_allclose(list(losses(directory).values()), list(whole.values()), rtol=near)


def test_a_shape_that_does_not_fit_is_refused_before_any_data_is_read(experiment, tmp_path):
    network = DiT(out=3, patch=8, width=8, depth=1, heads=2, classes=2, periods=8)
    data = dataclasses.replace(experiment.data, path=str(tmp_path / "nowhere"))
    wrong = dataclasses.replace(experiment, task=Diffusion(network), data=data)
    with pytest.raises(UserError, match="A picture of 12 x 20 is not made of whole patches of 8"):
        program_of(wrong)
    with pytest.raises(UserError, match="12 x 20"):
        train(wrong, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="none of the 3 shapes that data.aspect makes has the 24 pictures of a batch"):
        train(dataclasses.replace(experiment, batch_size=24), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_are_those_of_the_pictures_in_their_shape(experiment):
    """Of an encoder that takes every other pixel, and by labels that say which picture it is."""
    data = dataclasses.replace(experiment.data, augment=(Flip(),)).prepare().batched(8)
    found = latents.stored(data, lambda variables, x: x[:, ::2, ::2] / 255, {}).train(5).batches_of(8)
    reader, seen = data.readers("train", 0), set()
    expected = {}
    for place, kind in enumerate(reader.kinds(8)):
        example = reader.plain(place, TABLE[kind])
        for view, image in enumerate((example["image"], example["image"][:, ::-1])):
            expected[(image[::2, ::2] / 255).astype(np.float16).tobytes()] = place, view, example["label"]
    for step in range(30):
        batch = [found[step * 8 + row] for row in range(8)]
        assert len({e["latents"].shape for e in batch}) == 1
        for e in batch:
            place, view, label = expected[e["latents"].tobytes()]
            assert e["label"] == label
            seen.add((place, view))
    assert {place for place, _ in seen} == set(range(sum(COUNTS))) and {view for _, view in seen} == {0, 1}


@pytest.mark.experiments
def test_latents_of_each_shape(experiment, tmp_path):
    coder = Autoencoder(width=4, multipliers=(1, 2), blocks=1, groups=2, latent=2, attention=False)
    network = DiT(out=2, patch=2, width=8, depth=1, heads=2, classes=2, periods=8, kernel="xla")
    data = dataclasses.replace(experiment.data, augment=(Flip(),))
    task = Watched(network, autoencoder=coder, cached=True)
    train(dataclasses.replace(experiment, task=task, data=data), run_dir=tmp_path / "run")
    assert sorted(TRACED) == [(6, 10), (8, 8)]
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()
    (kept,) = (tmp_path / "cache" / "latents").glob("*/places.npy")
    assert sorted(p.name for p in kept.parent.glob("latents*")) == ["latents-12x20.npy", "latents-16x16.npy"]
