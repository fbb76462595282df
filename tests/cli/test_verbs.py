"""The verbs: what `train` passes on, and one small run that is trained, shown, measured and sampled."""

import dataclasses
import inspect
import json
import math
import shutil
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxgen import record
from jaxgen.cli.experiments import split
from jaxgen.cli.main import main
from jaxgen.cli.opened import _own_tokenizer
from jaxgen.cli.show import chips
from jaxgen.cli.text import number, size
from jaxgen.cli.train import parser
from jaxgen.data import Bytes, Mixture, SentencePiece, Text
from jaxgen.errors import UserError
from jaxgen.experiment import load, resolve
from jaxgen.pretrained import Pretrained

ROOT = Path(__file__).parents[2]
FILE = textwrap.dedent("""
    import dataclasses
    from jaxgen.data.text import Text
    from jaxgen.data.tokenizers import Bytes
    from jaxgen.evaluation.heldout import HeldOut
    from jaxgen.experiment import Experiment
    from jaxgen.models.gpt import GPT
    from jaxgen.pretrained import Pretrained
    from jaxgen.tasks.base import Task
    from jaxgen.tasks.language import LanguageModel
    from jaxgen.training.checkpoint import Checkpointing
    from jaxgen.training.ema import Ema
    from jaxgen.training.optimizers import AdamW

    @dataclasses.dataclass(frozen=True)
    class Lines(HeldOut):
        pass

    experiment = Experiment(
        "tiny",
        LanguageModel(GPT(vocab_size=257, depth=1, width=16, heads=2, max_length=32)),
        Text(path=PATH, tokenizer=Bytes(), length=16, heldout_by="tail"),
        AdamW(1e-2), batch_size=8, steps=4, ema=Ema(),
        evaluations=(HeldOut(),), checkpoint=Checkpointing(every=2, best=0), topology="v5e:2x2",
    )
    smoke = dataclasses.replace(experiment, steps=2)
""")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An experiment file on a little text, in a folder of its own that is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    path = tmp_path / "tiny.py"
    path.write_text(FILE.replace("PATH", repr(str(tmp_path / "text.txt"))))
    return path


@pytest.fixture
def trained(monkeypatch):
    """Records the calls of the loop, in place of training."""
    calls = []

    def train(experiment, **options):
        calls.append((experiment, options))
        return SimpleNamespace(preempted=experiment.seed == 75)

    monkeypatch.setattr("jaxgen.training.loop.train", train)
    return calls


# What `train` passes on


def test_train(file, trained):
    assert main(["train", "tiny.py", "--steps", "7", "--run-dir", "there"]) == 0
    (experiment, options), = trained
    assert experiment.steps == 7 and options == {"run_dir": Path("there"), "profile": False, "pretrained": []}


def test_default_run_directories(file, trained):
    assert main(["train", "tiny.py"]) == main(["train", "tiny.py", "--smoke"]) == 0
    assert [str(options["run_dir"]) for _, options in trained] == ["runs/tiny", "runs/tiny-smoke"]
    assert [e.steps for e, _ in trained] == [4, 2]


def test_file_may_come_last(file, trained):
    assert main(["train", "--smoke", "--steps", "3", "tiny.py"]) == 0
    assert trained[0][0].steps == 3 and trained[0][0].name == "tiny-smoke"


def test_preempted_exits_with_75(file, trained, capsys):
    assert main(["train", "tiny.py", "--seed", "75"]) == 75
    assert "preempted, and saved" in capsys.readouterr().err


def test_resume_demands_a_run(file, trained, capsys):
    assert main(["train", "tiny.py", "--resume"]) == 2
    assert capsys.readouterr().err == "jaxgen: there is no run directory runs/tiny\n" and not trained
    record.store("runs/tiny", 0)
    assert main(["train", "tiny.py", "--resume", "--profile"]) == 0
    assert len(trained) == 1 and trained[0][1]["profile"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--smoek", "there is no option --smoek; did you mean '--smoke'?"),
        ("--task.model.deth 3", "there is no field --task.model.deth; did you mean --task.model.depth?"),
        ("--steps many", "--steps is 'many', which should be a whole number"),
        ("--batch-size 9 --microbatches 2", "batch_size 9 does not split into 2 microbatches"),
        ("--steps 3 --seed 1 --steps 4", "--steps is given twice"),
        ("--seed 99999999999999999999999", "the seed is 99999999999999999999999, which should be from 0 to 2^63 - 1"),
        ("--checkpoint.metric foo", "checkpoint.metric is 'foo', which should be eval/NAME/... of an evaluation"),
        ("--seed -1", "the seed is -1, which should be from 0 to 2^63 - 1"),
        ("other", "'other' is one argument too many"),
    ],
)
def test_train_mistakes(file, trained, capsys, args, said):
    assert main(["train", "tiny.py", *args.split()]) == 2
    assert capsys.readouterr().err.startswith(f"jaxgen: {said}") and not trained


def test_help_of_a_file_is_its_typed_tree(file, trained, capsys):
    assert main(["train", "tiny.py", "--help"]) == 0
    shown = capsys.readouterr().out
    for field in ("--run-dir DIR", "--steps INT", "--task.model.depth INT", "--data.path STR", "--mesh.fsdp INT",
                  "--optimizer.learning-rate FLOAT", "--optimizer.schedule.warmup INT", "--checkpoint.every INT",
                  "--evaluations.0.every INT", "--rules.embed", "--task.model.norm {layernorm,rmsnorm}"):
        assert field in shown
    assert "Updates in all." in shown and "Blocks." in shown and not trained   # documented by the docstrings alone


def test_every_field_is_documented():
    from jaxgen import experiment, pretrained

    for cls in (experiment.Experiment, experiment.Target, pretrained.Pretrained):
        source = inspect.getsource(cls).splitlines()
        for field in dataclasses.fields(cls):
            line = next(i for i, text in enumerate(source) if text.startswith(f"    {field.name}:"))
            assert source[line + 1].startswith('    """'), field.name


def test_a_file_that_is_no_python(file, trained, capsys):
    file.write_text("experiment = (\n")
    assert main(["train", "tiny.py"]) == 2
    assert capsys.readouterr().err == "jaxgen: tiny.py cannot be read as Python: line 1: '(' was never closed\n"


def test_split():
    def of(text):
        found, rest = split(parser(), text.split())
        return found.file, found.run_dir, found.smoke, rest

    assert of("f.py --a.b 3 4 --smoke --c") == ("f.py", None, True, ["--a.b", "3", "4", "--c"])
    assert of("--run-dir d f.py --a.b -1") == ("f.py", "d", False, ["--a.b", "-1"])
    assert of("f.py --a.b x.py") == ("f.py", None, False, ["--a.b", "x.py"])
    assert of("--a.flag f.py --run-dir=d")[:2] == ("f.py", "d")


# A whole run


def test_a_run_from_train_to_sample(file, capsys):
    assert main(["train", "tiny.py"]) == 0
    assert "runs/tiny" in capsys.readouterr().out
    lines = (file.parent / "runs/tiny/metrics.jsonl").read_text()

    assert main(["train", "tiny.py"]) == 0   # it is done
    assert "finished" in capsys.readouterr().err
    assert (file.parent / "runs/tiny/metrics.jsonl").read_text() == lines

    assert main(["train", "tiny.py", "--task.model.width", "32", "--mesh.fsdp", "2"]) == 2
    said = capsys.readouterr().err
    assert "task.model.width (16, now 32)" in said and "--run-dir" in said and "fsdp" not in said

    assert main(["eval", "tiny", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    last = json.loads(lines.splitlines()[-1])
    assert told["step"] == last["step"] == 4
    assert told["metrics"]["eval/heldout/loss"] == pytest.approx(last["eval/heldout/loss"], rel=1e-5)
    assert main(["eval", "runs/tiny", "--task.model.depth", "2"]) == 2
    assert "--task.model.depth cannot be changed in a run that is made" in capsys.readouterr().err
    assert main(["eval", "runs/tiny", "--step", "3"]) == 2
    assert "no step 3" in capsys.readouterr().err

    prompt = ["--prompt", "the ", "--max-new-tokens", "4", "--json"]
    assert main(["sample", "--run-dir", "runs/tiny", "--n", "2", *prompt]) == 0
    two = json.loads(capsys.readouterr().out)["samples"]
    assert [s["prompt"] for s in two] == ["the ", "the "]


@pytest.mark.experiments   # several trainings
def test_a_run_goes_on_and_is_measured_elsewhere(file, capsys):
    assert main(["train", "tiny.py"]) == 0
    capsys.readouterr()
    assert main(["train", "tiny.py", "--resume", "--steps", "6", "--mesh.fsdp", "2"]) == 0
    said = capsys.readouterr().err
    assert "steps (4, now 6)" in said and "mesh.fsdp (1, now 2)" in said and "resumed runs/tiny at step 4" in said
    losses = {}
    for weights in ("ema", "raw"):
        assert main(["eval", "tiny", "--weights", weights, "--json"]) == 0
        losses[weights] = json.loads(capsys.readouterr().out)["metrics"]["eval/heldout/loss"]
    assert losses["raw"] != losses["ema"]
    (file.parent / "other.txt").write_text("something else entirely, at greater length than before\n" * 30)
    assert main(["eval", "runs/tiny", "--step", "4", "--data.path", "other.txt", "--mesh.fsdp", "4"]) == 0
    assert "runs/tiny, step 4, ema weights\neval/heldout/loss" in capsys.readouterr().out
    prompt = ["--prompt", "the ", "--max-new-tokens", "4", "--json"]
    samples = []
    for count in ("1", "2"):
        assert main(["sample", "tiny", "--n", count, *prompt]) == 0
        samples.append(json.loads(capsys.readouterr().out)["samples"])
    assert samples[0] == samples[1][:1]   # a sample is the same alone


def write_tuned(file: Path, source: str) -> None:
    """Writes tuned.py beside tiny.py: the same, but that its model comes from `source`."""
    text = file.read_text().replace('"tiny",', '"tuned",')
    text = text.replace("class Lines(HeldOut):\n    pass", "class Tuned(LanguageModel):\n    model: GPT | Pretrained")
    start = text.index("LanguageModel(GPT(")
    end = text.index("\n", start)
    (file.parent / "tuned.py").write_text(f"{text[:start]}Tuned(Pretrained({source!r})),{text[end:]}")


@pytest.mark.experiments   # three trainings
def test_a_run_that_begins_from_another(file, capsys):
    write_tuned(file, "tiny.py")
    assert main(["train", "tuned.py", "--steps", "1"]) == 0
    stored = record.stored("runs/tuned")
    assert stored.pretrained["task.model"] == record.to_record(Pretrained("tiny.py"))
    assert stored.experiment["task"]["model"]["width"] == 16
    assert len(list((file.parent / "cache/pretrained").glob("tiny-smoke-*/done"))) == 1
    capsys.readouterr()

    assert main(["eval", "tuned"]) == 2   # its task is a class of tuned.py
    assert "--trust tuned.py" in capsys.readouterr().err
    assert main(["eval", "tuned", "--trust", "tuned.py"]) == 0

    file.unlink()   # the run is whole without its source
    assert main(["train", "tuned.py", "--steps", "2"]) == 0
    assert "resumed runs/tuned at step 1" in capsys.readouterr().err
    assert main(["train", "tuned.py", "--run-dir", "other"]) == 2
    assert "there is no file tiny.py" in capsys.readouterr().err


def test_all_data_is_read_by_the_tokenizer_that_the_run_keeps(tmp_path):
    """In each part of a mixture, which takes no two."""
    data = Mixture((Text("a", tokenizer=SentencePiece(512)), Text("b", tokenizer=SentencePiece(512))))
    experiment = dataclasses.replace(load(ROOT / "experiments/gpt/quickstart.py").experiment, data=data)
    assert _own_tokenizer(experiment, tmp_path) == experiment
    Bytes().fit().save(tmp_path / "tokenizer")
    found = _own_tokenizer(experiment, tmp_path).data
    assert [p.path for p in found.parts] == ["a", "b"]
    for tokenizer in (p.tokenizer for p in found.parts):
        assert tokenizer.vocab_size == 257 and tokenizer.fit().kind == "bytes"
        assert dataclasses.asdict(tokenizer) == {"fingerprint": Bytes().fit().fingerprint}, "for the keys of caches"


# show


def test_show(file, capsys):
    assert main(["show", "tiny.py", "--mesh.fsdp", "2", "--optimizer.freeze", "mlp", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["devices"] == 4 and told["mesh"]["data"] == 2 and told["mesh"]["fsdp"] == 2
    rows = {row["name"]: row for row in told["sharding"]}
    table = rows["model/token_embedding/embedding"]
    assert table["shape"] == [257, 16] and table["split"] == [None, ["fsdp"]] and table["bytes"] == 257 * 8 * 4
    total = sum(math.prod(row["shape"]) for row in rows.values())
    part = told["parameters"]["parts"]["model"]
    frozen = sum(math.prod(row["shape"]) for row in rows.values() if not row["trainable"])
    assert told["parameters"]["count"] == part["count"] == total and part["trainable"] == total - frozen < total
    # 6 FLOPs a matrix parameter and token, and attention's 12 * heads * head_dim * length a layer
    matrices = 257 * 16 + 4 * 16 * 16 + 2 * 16 * 64
    assert told["flops"]["per_unit"] == 6 * matrices + 12 * 16 * 16
    assert told["flops"]["units"] == 8 * 16 and told["experiment"]["name"] == "tiny"


def test_show_prints_every_field_and_parameter(file, capsys):
    assert main(["show", "tiny.py", "--devices", "8"]) == 0
    shown = capsys.readouterr().out
    for words in ("width                  16", "Sharding on 8 devices (data 8)", "model/blocks/attention/query/kernel",
                  "layers embed heads head_dim", "FLOPs a token of training", "state on a device"):
        assert words in shown
    assert max(map(len, shown.splitlines())) < 200 and "\x1b" not in shown   # nothing is padded or coloured in a pipe


def test_show_tells_of_the_chips_that_a_file_is_for(capsys):
    assert main(["show", str(ROOT / "experiments/gpt/llama3_8b.py")]) == 0
    assert "splash (the fused kernel of tpu)" in capsys.readouterr().out


def test_a_run_directory_is_a_folder(file, capsys):
    assert main(["train", "tiny.py", "--run-dir", "gs://bucket/run"]) == 2
    assert "the run directory is gs://bucket/run, which should be a folder" in capsys.readouterr().err


def test_show_smoke_is_for_this_machine(file, capsys):
    assert main(["show", "tiny.py", "--smoke", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 8


def test_show_a_run(file, capsys):
    """From its own record: on the devices that it was trained on, though the source of its model is gone."""
    write_tuned(file, "runs/base")
    record.store("runs/base", load("tiny.py").experiment)
    experiment, sources = resolve(load("tuned.py").experiment)
    record.store("runs/tuned", experiment, {s.path: s.pretrained for s in sources})
    Path("runs/tuned/run.json").write_text('{"devices": "2 x cpu"}')
    assert main(["show", "tuned.py", "--json"]) == 0
    of_file = json.loads(capsys.readouterr().out)
    shutil.rmtree("runs/base")

    for name in ("runs/tuned", "tuned"):
        assert main(["show", name, "--trust", "tuned.py", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["devices"] == 2 and of_file["devices"] == 4
        for same in ("experiment", "parameters", "flops", "pretrained"):
            assert told[same] == of_file[same]
    assert main(["show", "tuned", "--trust", "tuned.py", "--devices", "4", "--mesh.fsdp", "2"]) == 0
    assert "Sharding on 4 devices (data 2, fsdp 2)" in capsys.readouterr().out
    assert main(["show", "tuned", "--help"]) == 0
    assert "jaxgen show FILE|RUN" in capsys.readouterr().out


def test_show_mistakes(file, capsys):
    def said(*args):
        assert main(["show", *args]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    write_tuned(file, "runs/base")
    missing = "task.model is to come from runs/base, but there is no run directory runs/base"
    cannot = "jaxgen: tuned.py cannot be shown without its source (a run of it can, by jaxgen show"
    assert said("tuned.py") == f"{cannot} RUNDIR): {missing}"
    record.store("runs/tuned", load("tiny.py").experiment)
    assert said("tuned.py") == f"{cannot} runs/tuned): {missing}"
    assert said("runs/tuned", "--smoke") == "jaxgen: --smoke is for an experiment file, and runs/tuned is a directory"
    assert "--task.model.depth cannot be changed in a run" in said("runs/tuned", "--task.model.depth", "2")
    assert "runs is not a run directory: it has no experiment.json; it holds the runs tuned" in said("runs")
    write_tuned(file, "gone.py")
    assert "(a run of it can, by jaxgen show runs/tuned): task.model is to come from gone.py, but" in said("tuned.py")


def test_show_names_what_does_not_fit(file, capsys):
    assert main(["show", "tiny.py", "--devices", "6", "--mesh.fsdp", "4"]) == 2
    assert "multiple of 4 devices, and there are 6" in capsys.readouterr().err


@pytest.mark.parametrize(("topology", "count"), [("", 0), ("v5p:4x4x4", 64), ("v5e:2x2", 4), ("2*v5e:16x16", 512)])
def test_chips(topology, count):
    assert chips(topology) == count


def test_chips_of_nonsense():
    with pytest.raises(UserError, match="should be like v5p:4x4x4"):
        chips("big")


def test_numbers():
    assert [number(n) for n in (0, 12, 1234, 124_439_808, 8.03e9)] == ["0", "12", "1.234k", "124.4M", "8.03G"]
    assert [size(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3 GiB", "5 TiB"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"steps": 4', '"steps": "four"', 'experiment.steps of the record is "four", which should be a whole number'),
        ('"mesh": {', '"mesh": [], "_": {', "experiment._ of the record is unknown to Experiment"),
        ('"ema": {', '"ema": [1], "target": {', "experiment.ema of the record is [1], which should be an object of "),
        ("optimizers:AdamW", "optimizers:AdmaW", "defines no such class; did you mean 'AdamW'?"),
        ('"batch": [', '"bath": [', "No rule for the logical axis 'batch'; did you mean 'bath'?"),
        ('"data",', '"dtaa",', "names the mesh axis 'dtaa', which does not exist; did you mean 'data'?"),
    ],
)  # fmt: skip
def test_a_record_that_a_hand_has_edited(file, capsys, before, after, said):
    record.store("runs/tiny", load("tiny.py").experiment)
    path = Path("runs/tiny/experiment.json")
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    for verb in ("sample", "eval", "show"):
        assert main([verb, "tiny"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("jaxgen: ") and said in line


def test_a_record_of_something_else(tmp_path, capsys):
    record.store(tmp_path, Pretrained("runs/x"))
    assert main(["sample", str(tmp_path)]) == 2
    assert "experiment.json is damaged: it holds a Pretrained, no Experiment" in capsys.readouterr().err
