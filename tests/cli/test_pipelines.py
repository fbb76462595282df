"""`jaxgen import` and `jaxgen export` of whole pipelines of diffusers, and of parts of those that no run can hold."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.drawn import GOLDEN, GUIDANCE, LENGTH, PROMPTS, STEPS, hole, pipeline_folder
from jax import jit
from PIL import Image

from jaxgen.cli import pipelines
from jaxgen.cli.main import main
from jaxgen.cli.opened import open_run
from jaxgen.data.captions import encode_captions
from jaxgen.data.huggingface import read
from jaxgen.data.tokenizers import load
from jaxgen.diffusion import guidance
from jaxgen.diffusion.paths import Cosine, Table
from jaxgen.diffusion.predictions import Epsilon, V
from jaxgen.errors import UserError
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.interop.safetensors import Tensors
from jaxgen.record import from_record, stored
from jaxgen.sampling import solvers
from jaxgen.sampling.diffusion import Sampling
from jaxgen.sampling.grids import Karras, UniformGrid
from jaxgen.tasks.beside import Masked, Smaller
from jaxgen.tasks.diffusion import Diffusion

heavy = pytest.mark.experiments  # many programs to compile
NAMES = [*(pytest.param(name, marks=heavy) for name in ("sd1", "sd2", "inpainting")), "dit"]


def jaxgen(*words) -> int:
    return main([str(word) for word in words])


def refused(capsys, *words) -> str:
    assert jaxgen(*words) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Golden pipelines by name, put together once."""
    return functools.cache(lambda name: pipeline_folder(name, tmp_path_factory.mktemp("pipelines") / name))


@pytest.fixture(scope="module")
def imported(folder):
    """Their model directories, made once."""

    @functools.cache
    def make(name):
        made = folder(name).with_name(f"imported-{name}")
        assert jaxgen("import", folder(name), made) == 0
        return made

    return make


def opened(directory):
    asked = dict(run=str(directory), run_dir=None, devices=None, trust=(), weights="ema", step="latest")
    return open_run(SimpleNamespace(**asked), "sample")


@pytest.mark.parametrize("name", NAMES)
def test_draws_what_diffusers_draws(name, imported):
    """From the same noise, guided, in a few steps of DDIM: its latents and its pictures."""
    run, io = opened(imported(name)), np.load(GOLDEN / f"pipeline_{name}" / "io.npz")
    task = run.experiment.task
    if name == "dit":
        batch = {"label": jnp.asarray([1, 4])}
    else:
        tokens, lengths = encode_captions(load(imported(name) / "tokenizer"), PROMPTS, LENGTH)
        batch = {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray(lengths)}

    @jit
    def draw(params, state, x):
        denoise, told = task.model.denoiser(params["network"]), task.condition(params, batch)
        beside = None
        if name == "inpainting":
            image, mask = hole()
            beside = task.seen_beside(params, state, {"before": (image + 1) * 127.5, "mask": mask}, None)
        told = told.replace(image=beside)
        if name != "dit":
            null = task.condition(params, batch, jnp.ones(2, bool)).replace(image=beside)
            denoise = guidance.classifier_free(denoise, null, GUIDANCE)
        levels = UniformGrid().levels(task.path, STEPS, STEPS)
        keys = jax.random.split(jax.random.key(0), 2)
        x = solvers.solve(solvers.Ddim(), denoise, task.path, levels, STEPS, x, keys, told)
        return x, task.pictures(params, state, x)

    with run.program.sharding.use():
        x, pictures = draw(run.params, run.state, jnp.asarray(io["latents"]))
    if "out" in io:
        assert io["out"].std() > 1 and np.abs(x - io["out"]).max() < 1e-3 * np.abs(io["out"]).max()
    if "pictures" not in io:
        return
    wanted = np.round(io["pictures"] * 255)
    assert wanted.std() > 50 and np.abs(np.asarray(pictures, int) - wanted).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_in_and_out_again(name, folder, imported, tmp_path):
    """The same tensors, and what configurations of both say is the same."""
    assert jaxgen("export", imported(name), tmp_path / "out") == 0
    parts = ("transformer", "vae") if name == "dit" else ("unet", "vae", "text_encoder")
    for part in parts:
        found, wanted = Tensors(tmp_path / "out" / part), Tensors(folder(name) / part)
        assert found.path.name == wanted.path.name and found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value, err_msg=key)

    def read_json(file):
        return [json.loads((place / file).read_text()) for place in (tmp_path / "out", folder(name))]

    passed_over = {"_diffusers_version", "feature_extractor", "transformers_version", "sample_size"}
    for file in ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)):
        ours, theirs = read_json(file)
        if file == "model_index.json" and name == "dit":   # of which each is named once
            ours["id2label"] |= {"0": "crane", "3": "crane"}
        for key in (ours.keys() & theirs.keys()) - passed_over:
            assert ours[key] == theirs[key], (file, key)
    if name != "dit":
        ours, theirs = read_json("tokenizer/vocab.json")
        assert ours == theirs
        ours, theirs = read_json("tokenizer/tokenizer_config.json")
        assert theirs.items() <= ours.items()
        lines = [(place / "tokenizer" / "merges.txt").read_text() for place in (tmp_path / "out", folder(name))]
        assert lines[0] == lines[1]


def test_what_the_directory_says(folder):
    """Of each kind of pipeline: the path, what is predicted, what an empty text is, and how it draws by itself."""
    task, data, preview = described(folder("sd1"))
    assert task.path == Table.scaled_linear() and task.prediction == Epsilon()
    assert (task.kept, task.padding, task.masked, task.locked) == (1, None, False, ("text",))
    assert (data.size, data.length, task.autoencoder.scale) == (32, LENGTH, 0.18215)
    assert preview.sampling == Sampling(solvers.Ddim(), UniformGrid(offset=1), 50, 7.5)
    assert task.beside is None and described(folder("inpainting"))[0].beside == Masked()
    task = described(folder("sd2"))[0]
    assert task.path == Table.scaled_linear().zero_terminal_snr() and task.prediction == V()
    assert (task.padding, task.text.activation, task.network.head_dim) == (0, "gelu_exact", 8)
    task, data, preview = described(folder("dit"))
    assert task.path == Table.linear() and task.learned_variance and task.text is None
    assert data.classes == ("crane (0)", "cat", "a ball", "crane (3)", "cube")


def described(folder):
    found = pipelines.opened(folder)
    return found.described(found.tokenizer and read(found.tokenizer), "tokenizer")


@heavy
def test_sample(imported, tmp_path, capsys):
    assert jaxgen("sample", imported("sd1"), "--prompt", PROMPTS[0], "--guidance", "7.5", "--steps", "2", "--n", "2",
                  "--out", tmp_path, "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert (told["guidance"], told["steps"]) == (7.5, 2) and told["solver"].startswith("Ddim")
    assert Image.open(told["samples"][1]["file"]).size == (32, 32)
    assert jaxgen("sample", imported("dit"), "--class", "cat", "--steps", "2", "--n", "1", "--out", tmp_path) == 0
    assert isinstance(from_record(stored(imported("sd1")).experiment).task, Diffusion)


def test_the_tokenizer_of_two_files(folder, tmp_path):
    """It gives the ids of CLIP's own, and is written as it was."""
    known = json.loads((GOLDEN / "tokenizer_clip" / "ids.json").read_text())
    tokenizer, whole = read(folder("sd1") / "tokenizer"), read(GOLDEN / "tokenizer_clip")
    for text, ids in zip(known["texts"], known["ids"], strict=True):
        assert tokenizer.encode(text).tolist() == ids[:-1]   # the end comes with rows
        assert tokenizer.decode(ids) == whole.decode(ids)
    assert (tokenizer.eos, tokenizer.padding, tokenizer.vocab_size) == (519, 519, 520)
    assert read(folder("sd2") / "tokenizer").padding == 0
    shutil.copy(folder("sd1") / "tokenizer" / "vocab.json", tmp_path)
    with pytest.raises(UserError, match="merges.txt, which belongs to vocab.json, cannot be read"):
        read(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="so it is not of CLIP's tokenizer, the only one that is read from"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("solver", "grid", "table"),
    [
        (solvers.DpmPP2M(), UniformGrid(spacing="leading", offset=1), Table.scaled_linear()),
        (solvers.Euler(), UniformGrid(spacing="linspace"), Table.linear(500, 1e-4, 0.03)),
        (solvers.DpmPP2M(), Karras(), Table.scaled_linear(last=0.02)),
        (solvers.Ddim(), UniformGrid(), Table.cosine()),
        (solvers.Ddim(), UniformGrid(), Table((0.1, 0.3, 0.2))),
        (solvers.Ddim(), UniformGrid(), Table.linear().zero_terminal_snr()),
    ],
)
def test_schedulers_are_read_as_they_were_written(solver, grid, table):
    sampling = Sampling(solver, dataclasses.replace(grid, **_of_table(grid, table)), 7, 2.0)
    experiment = SimpleNamespace(task=SimpleNamespace(path=table, prediction=V()),
                                 evaluations=(PicturePreview(sampling=sampling),))  # fmt: skip
    config = json.loads(json.dumps(pipelines.scheduler_of(experiment)))
    np.testing.assert_allclose(pipelines.path_of(config).betas, table.betas, rtol=1e-9)
    assert pipelines.prediction_of(config) == V()
    again = pipelines.sampling_of(config, 2.0)
    assert (again.solver, again.grid) == (solver, sampling.grid)


def _of_table(grid, table):
    count = len(table.betas)
    return dict(low=1 / count, count=count) if isinstance(grid, UniformGrid) else {}


# ---- parts, and mistakes ----


@heavy
@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "unet"])
def test_one_part_alone(name, folder, tmp_path, capsys):
    """In, out again as it was, and of no other use."""
    source = folder("dit" if name in ("transformer", "vae") else "sd1")
    assert jaxgen("import", source, tmp_path / "m", "--part", name) == 0
    assert f"Pretrained('{tmp_path / 'm'}', part='task.model') is the" in capsys.readouterr().out
    assert jaxgen("export", tmp_path / "m", tmp_path / "out") == 0
    found, wanted = Tensors(tmp_path / "out"), Tensors(source / name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    if name == "transformer":
        assert "is a run of a Part, which makes neither" in refused(capsys, "sample", tmp_path / "m")


def changed(source: Path, at: Path, file: str, **told) -> Path:
    """A pipeline's copy in which a JSON file says something else."""
    copy = shutil.copytree(source, at)
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | told))
    return copy


@pytest.mark.parametrize(
    ("name", "file", "told", "message"),
    [
        ("sd1", "model_index.json", {
            "_class_name": "StableDiffusionXLPipeline",
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"]},
         "is a StableDiffusionXLPipeline with text_encoder_2 (CLIPTextModelWithProjection) and tokenizer_2 "
         "(CLIPTokenizer), and a run holds one U-Net or DiT, one CLIP text tower and one autoencoder; what can be "
         "imported is --part unet or --part vae or --part text_encoder or --part text_encoder_2"),
        ("dit", "model_index.json", {
            "_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
            "text_encoder": ["transformers", "T5EncoderModel"]},
         "with text_encoder (T5EncoderModel) and transformer (FluxTransformer2DModel)"),
        ("sd1", "model_index.json", {"vae": [None, None]},
         "is a StableDiffusionPipeline without vae; its parts are"),
        ("sd1", "unet/config.json", {"in_channels": 8},
         "takes 8 channels, and latents have 4: what stands beside them is not imported; what can be imported is "
         "--part unet"),
        ("sd1", "unet/config.json", {"num_class_embeds": 3}, "is told classes beside a text, which is not imported"),
        ("dit", "transformer/config.json", {"num_layers": 4, "activation_fn": "gelu"}, "do not fit the model in"),
        ("sd1", "unet/config.json", {"cross_attention_dim": 16}, "task.network.text is 16, and task.text.width is 12"),
        ("sd1", "text_encoder/config.json", {"vocab_size": 500},
         "has 520 entries, and the model knows 500: it belongs to another model"),
        ("sd1", "scheduler/scheduler_config.json", {"beta_schedule": "scaledlinear"},
         "DDIMScheduler with beta_schedule = 'scaledlinear' is not imported; did you mean"),
        ("sd1", "scheduler/scheduler_config.json", {"prediction_type": "flow"},
         "with prediction_type = 'flow' is not imported"),
        ("sd1", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True},
         "leaves nothing of the data at t = 1, where Epsilon determines no picture"),
    ],
)  # fmt: skip
def test_mistakes_of_import(name, file, told, message, folder, tmp_path, capsys):
    made = changed(folder(name), tmp_path / "copy", file, **told)
    if "do not fit" in message:
        with pytest.raises(UserError) as caught:   # without the shapes of the task, which take seconds
            pipelines.opened(made).read(None)
        assert message in str(caught.value) and "transformer_blocks.3.ff.net.2.bias is missing" in str(caught.value)
        return
    assert message in refused(capsys, "import", made, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_more_mistakes_of_import(folder, tmp_path, capsys):
    told = refused(capsys, "import", folder("sd1"), tmp_path / "m", "--part", "unett")
    assert "has no unett; did you mean 'unet'" in told
    told = refused(capsys, "import", folder("sd1") / "vae", tmp_path / "m", "--part", "vae")
    assert "has no model_index.json" in told
    told = refused(capsys, "import", folder("sd1"), tmp_path / "m", "--tokenizer", "none")
    assert "needs a tokenizer" in told


def test_mistakes_of_export(folder):
    task = described(folder("sd1"))[0]
    for changes, message in (
        ({"masked": True}, "sees no padding of a text"),
        ({"kept": 0}, "task.kept is 0, and an empty text has CLIP's start there"),
        ({"autoencoder": None}, "there is no autoencoder, and its pipelines are of latents"),
        ({"beside": Smaller()}, "the picture beside the noisy one is not what a mask leaves"),
        ({"path": Cosine()}, "the path is a Cosine, no Table of betas"),
    ):
        with pytest.raises(UserError, match=f"runs/x cannot be written as a pipeline of diffusers: .*{message}"):
            pipelines._writable(dataclasses.replace(task, **changes), Path("runs/x"))
