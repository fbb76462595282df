"""`jaxgen eval RUN --metrics`: pictures that a toy run draws, seen by another run's classifier."""

import json
import textwrap

import jax
import pytest
from jax import jit

from jaxgen import record
from jaxgen.cli.main import main
from jaxgen.data.digits import Digits
from jaxgen.experiment import Experiment, load
from jaxgen.models.vit import ViT
from jaxgen.sharding import unbox
from jaxgen.tasks.classification import Classification
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.optimizers import AdamW

FILE = textwrap.dedent("""
    import dataclasses
    import jax.numpy as jnp
    from jaxgen.data.digits import Digits
    from jaxgen.data.scenes import Scenes
    from jaxgen.evaluation.generated import Recognised
    from jaxgen.experiment import Experiment
    from jaxgen.pretrained import Pretrained
    from jaxgen.sampling.diffusion import Sampling
    from jaxgen.tasks.base import Task
    from jaxgen.training.optimizers import AdamW

    @dataclasses.dataclass(frozen=True)
    class Copies(Task):
        \"\"\"Draws the held-out picture, darker by the number of steps.\"\"\"

        def init(self, key):
            return {"model": {"w": jnp.zeros(2)}}, {}

        def sample(self, params, state, batch, keys, sampling):
            return jnp.maximum(batch["image"].astype(jnp.int32) - sampling.steps, 0).astype(jnp.uint8)

        def bits_per_dim(self, params, state, batch, keys):
            return batch["label"] + params["model"]["w"][0]

    plain = Experiment("plain", Copies(), Digits(heldout=16), AdamW(1e-3), batch_size=8, steps=1)
    scenes = dataclasses.replace(plain, name="scenes", data=Scenes(heldout=16))
    experiment = dataclasses.replace(
        plain, name="toy",
        evaluations=(Recognised(n=16, classifier=Pretrained("runs/digits"), sampling=Sampling(steps=100)),),
    )
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that nobody has trained: a classifier of digits, a task that draws, and the same without evaluations."""
    path = tmp_path_factory.mktemp("drawn")
    file = path / "toy.py"
    file.write_text(FILE)
    module = load(file)
    model = ViT(out=10, patch=14, width=8, depth=1, heads=2, image_size=28, channels=1)
    digits = Experiment("digits", Classification(model), Digits(heldout=16), AdamW(1e-3), batch_size=8, steps=1)
    for experiment in (digits, module.experiment, module.plain, module.scenes):
        directory = path / "runs" / experiment.name
        record.store(directory, experiment)
        checkpoints = Checkpoints(directory / "checkpoints")
        params, state = unbox(jit(experiment.task.init)(jax.random.key(0)))
        checkpoints.save(0, {"params": params, "state": state})
        checkpoints.wait()
    return path


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def told(capsys, *words):
    assert main(["eval", *words, "--trust", "toy.py", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_metrics_of_what_a_run_draws(folder, capsys):
    """With the classifier that the run's experiment names, and its way to draw; or with another."""
    own = told(capsys, "toy", "--metrics", "fd,precision_recall,bpd", "--n", "12")
    assert set(own["metrics"]) == {"eval/generated/fd", "eval/generated/precision", "eval/generated/recall",
                                   "eval/bpd/bits_per_dim", "eval/bpd/error"}  # fmt: skip
    settings = own["results"]["generated"]["settings"]
    assert settings["features"] == "digits step 0 raw" and settings["resize"] == "28 x 28, bicubic, antialiased"
    assert settings["n"] == 12 and settings["sampling"]["steps"] == 100 and len(settings["features_hash"]) == 64
    assert "warning: a Fréchet distance of 12 pictures" in own["texts"]["generated"]
    kept = json.loads(next((folder / "runs/toy/eval").glob("*.json")).read_text())
    assert kept["metrics"] == own["metrics"] and kept["results"] == own["results"]
    given = told(capsys, "plain", "--metrics", "fd", "--n", "12", "--features", "digits", "--weights", "raw")
    other = given["results"]["generated"]["settings"]
    assert other["features_hash"] == settings["features_hash"] and other["weights"] == "raw"
    assert other["sampling"]["steps"] != 100
    assert given["metrics"]["eval/generated/fd"] < own["metrics"]["eval/generated/fd"]   # less dark


def test_facts_of_as_many_pictures_as_asked(capsys):
    """Which need no network to be seen with."""
    found = told(capsys, "scenes", "--metrics", "facts", "--n", "22")
    assert {"eval/facts/mean", "eval/facts/shape", "eval/facts/unseen/mean"} <= set(found["metrics"])
    assert "6 captions of each split, 4 pictures each" in found["texts"]["facts"]


def test_a_runs_own_evaluations_name_a_classifier(capsys):
    assert main(["eval", "toy", "--trust", "toy.py"]) == 0
    shown = capsys.readouterr().out
    assert "eval/recognised/accuracy" in shown and "seen by digits step 0 raw" in shown


@pytest.mark.parametrize(("words", "said"), [
    ("plain --metrics fd", "a network is needed to see pictures with, the run's experiment names none, and its "
     "data has neither classes nor captions to train one: give --features FILE"),
    ("plain --metrics fid,kid", "--metrics names fid; did you mean 'fd'?; there are fd, kid"),
    ("plain --metrics ,", "--metrics names nothing"),
    ("plain --n 3", "--n is for the measurements that --metrics names"),
    ("plain --metrics fd --n 0", "--n is 0, which should be at least 1"),
    ("plain --metrics fd --features gone", "--features is gone, and there is no such file or run"),
    ("plain --metrics fd --features toy.py", "defines no 'smoke' form"),
    ("digits --metrics fd", "fd of --metrics is of pictures that a run draws, and a Classification draws none"),
    ("toy --metrics cmmd", "measures cmmd, which needs a network of pictures and texts, and digits step 0 raw is none"),
    ("plain --metrics fd --features plain", "is a run of a Copies, which does not embed pictures"),
])  # fmt: skip
def test_mistakes(words, said, capsys):
    assert main(["eval", *words.split(), "--trust", "toy.py"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("jaxgen: ") and said in line
