"""`jaxgen sample` of runs that make pictures: what may be asked, what is written, and mistakes."""

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest
from jax import jit
from PIL import Image

from jaxgen import record
from jaxgen.cli import features
from jaxgen.cli.asking import encoder
from jaxgen.cli.main import main
from jaxgen.cli.opened import open_run
from jaxgen.data.digits import Digits
from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.scenes import Scenes
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.experiment import Experiment
from jaxgen.models.dit import DiT
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.sampling.diffusion import Sampling
from jaxgen.sampling.solvers import Ddim
from jaxgen.sharding import unbox
from jaxgen.tasks.beside import Before, Masked, Smaller
from jaxgen.tasks.classification import Classification
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.optimizers import AdamW

NET = DiT(out=1, patch=7, width=16, depth=1, heads=2, classes=10, periods=16)
OWN = Sampling(Ddim(), steps=3, guidance=2.0)
PROMPT = "two red squares above a blue ring"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that nobody has trained: of classes, of texts, of pictures beside, and of several shapes."""
    path = tmp_path_factory.mktemp("draw")
    text = TextTower(vocab_size=128, width=16, depth=1, heads=2, max_length=16, out=16)
    for name, task, data in [
        ("digits", Diffusion(NET), Digits(heldout=16)),
        ("scenes", Diffusion(NET.clone(out=3, patch=8, classes=0, text=16), text=text), Scenes(heldout=16)),
        ("holes", Diffusion(NET.clone(patch=4), beside=Masked()), Digits(heldout=16)),
        ("edits", Diffusion(NET.clone(out=3, patch=8, classes=0, text=16), text=text, beside=Before()),
         Scenes(heldout=16, edits=True)),
        ("larger", Diffusion(NET.clone(classes=0), beside=Smaller(7)), Digits(heldout=16)),
        ("shapes", Diffusion(NET.clone(out=3, patch=4, classes=0)), LabelledImages(size=16, aspect=2.0, aspect_step=4)),
        ("weaker", Diffusion(NET.clone(width=8)), Digits(heldout=16)),
        ("blind", Diffusion(NET.clone(width=8, classes=0)), Digits(heldout=16)),
        ("judge", Classification(ViT(patch=7, channels=1, width=16, depth=1, heads=2, out=10)), Digits(heldout=16)),
        ("clip", Contrastive(ViT(patch=8, width=16, depth=1, heads=2, out=16), text), Scenes(heldout=16)),
    ]:
        told = getattr(task, "text", None) is not None or getattr(getattr(task, "network", None), "classes", 0)
        own = OWN if told else dataclasses.replace(OWN, guidance=1.0)
        previews = (PicturePreview(sampling=own),) if isinstance(task, Diffusion) else ()
        experiment = Experiment(name, task, data, AdamW(1e-3), batch_size=8, steps=1, evaluations=previews)
        directory = path / "runs" / name
        record.store(directory, experiment)
        if (tokenizer := data.prepare().tokenizer) is not None:
            tokenizer.save(directory / "tokenizer")
        params, state = unbox(jit(task.init)(jax.random.key(0)))
        params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
        checkpoints = Checkpoints(directory / "checkpoints")
        checkpoints.save(0, {"params": params, "state": state})
        checkpoints.wait()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(path / "in.png")
    mask = np.zeros((64, 64), np.uint8)
    Image.fromarray(mask).save(path / "dark.png")
    mask[:, 32:] = 255
    Image.fromarray(mask).save(path / "mask.png")
    Image.fromarray(mask[:32]).save(path / "small.png")
    Image.fromarray(mask[:5, 30:34]).save(path / "tiny.png")
    return path


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def drawn(capsys, *words):
    """What the command told, and its pictures."""
    assert main(["sample", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    return told, [np.asarray(Image.open(s["file"])).astype(int) for s in told["samples"]]


def test_classes(capsys, folder):
    told, pictures = drawn(capsys, "digits", "--class", "3", "--class", "7", "--n", "2", "--seed", "5")
    assert [(s["asked"], s["index"]) for s in told["samples"]] == [("3", 0), ("3", 1), ("7", 0), ("7", 1)]
    assert all(p.shape == (28, 28) for p in pictures)
    assert (told["steps"], told["guidance"], told["solver"]) == (3, 2.0, "Ddim(eta=0.0)")  # as in the previews
    inside = json.loads(Image.open(told["samples"][3]["file"]).text["jaxgen"])
    assert (inside["asked"], inside["index"], inside["seed"], inside["step"]) == ("7", 1, 5, 0)
    assert Image.open(told["sheet"]).size[0] > 28
    again, alone = drawn(capsys, "digits", "--class", "7", "--n", "2", "--seed", "5", "--out", str(folder / "other"))
    assert np.abs(alone[1] - pictures[3]).max() <= 1 and (folder / "other/sheet.png").is_file()
    assert (drawn(capsys, "digits", "--class", "7", "--n", "2", "--seed", "6")[1][1] != pictures[3]).any()
    assert len(drawn(capsys, "digits", "--n", "1")[1]) == 10  # every class


def test_how_pictures_are_drawn(capsys):
    told, first = drawn(capsys, "digits", "--n", "1", "--class", "1", "--solver", "dpmpp_2m", "--grid", "karras",
                        "--steps", "5", "--guidance", "1", "--frames")
    assert told["solver"] == "DpmPP2M()" and told["grid"].startswith("Karras(") and told["steps"] == 5
    assert (drawn(capsys, "digits", "--n", "1", "--class", "1", "--guidance", "3")[1][0] != first[0]).any()
    told, other = drawn(capsys, "digits", "--n", "1", "--class", "1", "--guidance", "3", "--interval", "0.1,0.6",
                        "--rescale", "0.5")
    assert (told["interval"], told["rescale"]) == ([0.1, 0.6], 0.5)
    frames = told["sheet"].replace("sheet.png", "frames.png")
    assert Image.open(frames).size[0] > 5 * 28  # five steps


def test_another_run_guides(capsys):
    """A weaker one at scale 1 changes nothing; a judge finds what it is asked for more and more likely."""
    given = ["digits", "--class", "3", "--n", "2", "--guidance", "1"]
    _, plain = drawn(capsys, *given)
    for other in ("weaker", "blind"):
        told, same = drawn(capsys, *given, "--guide", other, "--guide-scale", "1")
        assert told["guide"] == "runs/" + other and np.abs(same[0] - plain[0]).max() <= 1
        assert np.abs(drawn(capsys, *given, "--guide", other)[1][0] - plain[0]).max() > 1

    judge = opened("judge")
    asked = ["blind", "--class", "7", "--n", "4", "--steps", "8"]
    found = []
    for scale in ("0", "3", "10"):
        told, pictures = drawn(capsys, *asked, "--guide", "judge", "--guide-scale", scale)
        assert (told["guide_scale"], told["samples"][3]["asked"]) == (float(scale), "7")
        image = np.stack(pictures)[..., None]
        logits = judge.experiment.task.logits(judge.params, judge.state, {"image": image})
        found.append(float(jax.nn.log_softmax(logits)[:, 7].mean()))
    assert found[0] < found[1] < found[2]

    clip = opened("clip")
    words = jax.tree.map(jax.numpy.asarray, encoder(clip)([PROMPT]))
    found = []
    for scale in ("0", "30"):
        _, pictures = drawn(capsys, "scenes", "--prompt", PROMPT, "--n", "2", "--guide", "clip", "--guide-scale", scale)
        image = clip.experiment.task.embed_images(clip.params, {"image": jax.numpy.stack(pictures)}, clip.state)
        found.append(float((image @ clip.experiment.task.embed_texts(clip.params, words).T).mean()))
    assert found[0] < found[1]


def opened(name):
    asked = argparse.Namespace(run=name, run_dir=None, step="latest", weights="ema", devices=None, trust=())
    return open_run(asked, "sample")


def test_shapes(capsys):
    for aspect, shape in [("3:2", (12, 20)), ("100:160", (20, 12)), ("10:9", (16, 16))]:  # width to height
        told, pictures = drawn(capsys, "shapes", "--n", "2", "--steps", "2", "--aspect", aspect, "--frames")
        assert pictures[0].shape == (*shape, 3) and told["shape"] == [*shape, 3]


def test_texts(capsys):
    _, pictures = drawn(capsys, "scenes", "--prompt", PROMPT, "--n", "2", "--guidance", "4")
    assert pictures[0].shape == (32, 32, 3)
    away = drawn(capsys, "scenes", "--prompt", PROMPT, "--n", "2", "--guidance", "4", "--negative", "a green cross")[1]
    assert (away[0] != pictures[0]).any()


def test_what_a_model_does_not_see_is_told(capsys):
    long = "a red square " * 6
    assert main(["sample", "scenes", "--prompt", long, "--n", "1"]) == 0
    said = capsys.readouterr().err
    assert "the prompt is cut after 15 tokens; left out is 'a red square" in said
    assert main(["sample", "scenes", "--prompt", "two red circles", "--n", "1", "--guidance", "1e6"]) == 0
    said = capsys.readouterr().err
    assert "the run's vocabulary lacks 'circles'" in said and "a guidance of 1e+06 leaves little" in said


def test_editing(capsys):
    given = ["scenes", "--prompt", PROMPT, "--n", "1", "--image", "in.png"]
    _, (same,) = drawn(capsys, *given, "--strength", "0")
    assert np.abs(same - 200).max() <= 1
    _, (half,) = drawn(capsys, *given, "--mask", "mask.png")
    assert np.abs(half[:, :16] - 200).max() <= 1 and np.abs(half[:, 16:] - 200).max() > 5
    told, (other,) = drawn(capsys, *given, "--strength", "0.7")
    assert (other != same).any() and told["strength"] == 0.7


def test_holes_and_larger_canvases(capsys):
    """What is known stays, whichever way the rest is made; a run that fills holes draws without any, too."""
    given = ["--n", "1", "--image", "in.png"]
    for run in (["holes", "--class", "1"], ["scenes", "--prompt", PROMPT]):
        told, (found,) = drawn(capsys, *run, *given, "--extend", "0,8,16,0")
        side = 28 if run[0] == "holes" else 32
        assert found.shape[:2] == (side + 8, side + 16) and told["extend"] == "0,8,16,0"
        assert np.abs(found[8:, :side] - 200).max() <= 1 and np.abs(found[:8] - 200).max() > 5
    _, (half,) = drawn(capsys, "holes", "--class", "1", *given, "--mask", "mask.png")
    assert np.abs(half[:, :14] - 200).max() <= 1 and np.abs(half[:, 14:] - 200).max() > 5
    assert len(drawn(capsys, "holes", "--class", "1", "--n", "2")[1]) == 2


def test_edits_by_instruction(capsys):
    given = ["edits", "--prompt", "make the red ring blue", "--n", "1", "--image", "in.png"]
    told, (plain,) = drawn(capsys, *given)
    assert told["image"] == "in.png" and told["image_guidance"] == 1.0
    _, (guided,) = drawn(capsys, *given, "--image-guidance", "3")
    _, (part,) = drawn(capsys, *given, "--mask", "mask.png")
    assert (guided != plain).any() and np.abs(part[:, :16] - 200).max() <= 1


def test_small_pictures_are_enlarged(capsys):
    told, (found,) = drawn(capsys, "larger", "--n", "1", "--image", "tiny.png")
    assert found.shape == (35, 28) and told["shape"] == [35, 28, 1]
    _, (other,) = drawn(capsys, "larger", "--n", "1", "--image", "tiny.png", "--image-noise", "0.4")
    assert (other != found).any()
    assert drawn(capsys, "larger", "--n", "1", "--image", "in.png", "--size", "28x28")[1][0].shape == (28, 28)


@pytest.mark.parametrize("run", ["digits", "scenes"])
def test_measured_by_a_network_of_its_own_data(run, folder, monkeypatch, capsys):
    """A classifier of its classes, or a CLIP of its captions, trained once."""
    monkeypatch.setattr(features, "STEPS", 2)
    monkeypatch.setenv("JAXGEN_CACHE", str(folder / "cache"))
    found = []
    for _ in range(2):
        assert main(["eval", run, "--metrics", "fd,kid", "--n", "8", "--json"]) == 0
        out, told = capsys.readouterr()
        found.append(json.loads(out))
        assert "a small one is trained once on the run's own data" in told
    assert "step 2/2" not in told, "the second time it is there"
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["metrics"]["eval/generated/fd"] > 0
    assert found[0]["results"]["generated"]["settings"]["features"] == f"{run}-features step 2 raw"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["edits", "--prompt", PROMPT], "runs/edits edits pictures: give one with --image FILE"),
        (["larger"], "runs/larger enlarges pictures: give one with --image FILE"),
        (["larger", "--image", "tiny.png", "--mask", "mask.png"], "--mask is of no use here: runs/larger enlarges"),
        (["larger", "--image", "tiny.png", "--image-noise", "0.7"], "is 0.7, and runs/larger has learned up to 0.5"),
        (["holes", "--image", "in.png", "--image-noise", "0.1"], "runs/holes does not enlarge pictures"),
        (["holes", "--extend", "1,1,1,1"], "--extend needs a picture to begin with: --image FILE"),
        (["holes", "--image", "in.png", "--extend", "8"], "--extend is '8', which should be like 0,0,32,0"),
        (["holes", "--image", "in.png", "--extend", "1,0,0,0"], "28 x 29 is not made of whole patches of 4"),
        (["holes", "--image-guidance", "2"], "--image-guidance is of no use here: runs/holes edits no pictures"),
        (["digits", "--class", "12"], "there is no class '12'; they are 0 to 9"),
        (["digits", "--prompt", "a ring"], "knows no texts: --prompt and --negative are of no use"),
        (["digits", "--temperature", "1"], "--temperature is of no use here: runs/digits makes pictures"),
        (["digits", "--guide-scale", "3"], "--guide-scale is for a run that guides: --guide RUN"),
        (["digits", "--guide", "shapes"], "runs/shapes cannot guide: It draws pictures of 3 channels, and those"),
        (["digits", "--guide", "holes"], "sees a picture beside the noisy one (task.beside) cannot guide"),
        (["blind", "--guide", "judge"], "runs/judge guides toward what is asked for: give a --class"),
        (["blind", "--guide", "clip", "--class", "3"], "--class is of no use here: runs/clip guides"),
        (["scenes", "--prompt", PROMPT, "--guide", "judge"], "there is no class 'two red squares"),
        (["digits", "--guide", "none"], "none"),
        (["blind", "--guidance", "3"], "A guidance of 3 is for a network with classes or texts, which has none"),
        (["digits", "--guidance", "nan"], "--guidance is nan, which should be a number of at most 1e9"),
        (["digits", "--seed", "4294967296"], "--seed is 4294967296, which should be from 0 to 4294967295"),
        (["digits", "--rescale", "7"], "--rescale is 7.0, which should be from 0 to 1"),
        (["holes", "--image", "in.png", "--mask", "dark.png"], "the mask dark.png is black everywhere"),
        (["digits", "--interval", "0.2"], "--interval is '0.2', which should be two times, like 0.2,0.8"),
        (["digits", "--interval", "0.8,0.2"], "Guidance is between two times from 0 to 1, the lower first"),
        (["digits", "--steps", "0"], "--steps is 0, which should be at least 1"),
        (["digits", "--solver", "dpmpp2n"], "--solver is 'dpmpp2n'; did you mean 'dpmpp2s'?"),
        (["digits", "--grid", "spiral"], "--grid is 'spiral'; there are exponential, karras, shifted, uniform"),
        (["digits", "--size", "30x30"], "A picture of 30 x 30 is not made of whole patches of 7."),
        (["digits", "--size", "big"], "--size is 'big', which should be like 64x96"),
        (["digits", "--aspect", "3:2"],
         "--aspect is of no use here: runs/digits has learned pictures of one shape, 28 x 28 (data.aspect is 1)"),
        (["shapes", "--aspect", "3:2", "--size", "16x16"], "both --size 16x16 and --aspect 3:2 say what is drawn"),
        (["larger", "--image", "tiny.png", "--aspect", "3:2"], "--aspect is of no use here: runs/larger"),
        (["digits", "--strength", "0.5"], "--strength needs a picture to begin with: --image FILE"),
        (["digits", "--image", "none.png"], "none.png cannot be read: No such file or directory"),
        (["scenes"], "makes pictures of texts: say what they show with --prompt"),
        (["scenes", "--prompt", PROMPT, "--class", "1"], "--class is of no use here"),
        (["scenes", "--prompt", PROMPT, "--image", "in.png", "--mask", "small.png"],
         "the mask small.png is of 64 x 32 pixels, and the picture in.png of 64 x 64; they should be the same"),
        (["scenes", "--prompt", PROMPT, "--negative", "a ring", "--guidance", "1"], "--negative is for guidance"),
    ],
)  # fmt: skip
def test_mistakes(words, said, capsys):
    assert main(["sample", *words]) == 2
    assert said in capsys.readouterr().err
