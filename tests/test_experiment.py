"""An experiment as an object, as a file, as data, and as the target of overrides."""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import files, record, runtime
from jaxgen.data.text import Text
from jaxgen.errors import UserError
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.experiment import Experiment, Pretrained, Target, load, resolve, select
from jaxgen.models.gpt import GPT
from jaxgen.override import override
from jaxgen.record import differences, from_record, resume, to_record
from jaxgen.sharding import Mesh
from jaxgen.tasks.base import Task
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.ema import Ema
from jaxgen.training.optimizers import AdamW


@dataclasses.dataclass(frozen=True)
class Corpus:
    path: str = ""
    heldout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Measure:
    every: int = 100
    count: int = 4


@dataclasses.dataclass(frozen=True)
class Tuned(Task):
    """Goes on from another run's model."""

    model: GPT | Pretrained


class Net(nn.Module):
    depth: int = 2
    mode: Literal["fast", "slow"] = "fast"
    window: int | None = None
    windows: tuple[int, ...] = ()
    bias: bool = True
    dtype: Any = jnp.float32


def experiment(**changes) -> Experiment:
    base = Experiment(
        "tiny", LanguageModel(GPT(depth=2, width=32, heads=4)), Corpus(), AdamW(1e-3), batch_size=8, steps=10,
        evaluations=(Measure(), Measure(50)), ema=Ema(), target=Target("eval/heldout/loss", at_most=2.0),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


EXPERIMENT_FILE = textwrap.dedent("""
    import dataclasses
    from jaxgen.experiment import Experiment
    from jaxgen.models.gpt import GPT
    from jaxgen.tasks.language import LanguageModel
    from jaxgen.training.optimizers import AdamW

    @dataclasses.dataclass(frozen=True)
    class Mine:
        path: str = ""

    experiment = Experiment("mine", LanguageModel(GPT()), Mine("a"), AdamW(1e-3), batch_size=8, steps=10)
    smoke = dataclasses.replace(experiment, steps=2)
""")


# Records


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -3, 2**70, 1.5, float("inf"), float("-inf"), "x", "", (), (1, (2.0, "a")), [1, [2]], {},
     {"a": (1,)}, {"class": "x"}, {"float": "nan"}, {"list": 1}, {1: "a", (2, 3): None}, GPT(depth=3),
     LanguageModel(GPT()), Mesh(fsdp=4), AdamW(1e-3), Target("loss"), Pretrained("runs/x")],
    ids=repr,
)  # fmt: skip
def test_round_trip(value):
    data = json.loads(json.dumps(to_record(value), allow_nan=False))
    back = from_record(data)
    assert back == value and type(back) is type(value)


def test_nan_round_trip():
    back = from_record(json.loads(json.dumps(to_record((float("nan"),)), allow_nan=False)))
    assert isinstance(back, tuple) and back[0] != back[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, np.int32, np.dtype("uint8")], ids=str)
def test_dtype_round_trip(dtype):
    assert from_record(json.loads(json.dumps(to_record(dtype)))) == np.dtype(dtype)


def test_numpy_scalar_is_recorded_as_its_value():
    assert from_record(to_record((np.float64(0.1), np.int64(3), np.bool_(True)))) == (0.1, 3, True)


def test_whole_experiment_round_trip_through_a_run_directory(tmp_path):
    e = experiment(data=Text(), evaluations=(HeldOut(),))
    record.store(tmp_path / "run", e, {"task.model": Pretrained("runs/x")})
    stored = record.stored(tmp_path / "run")
    assert from_record(stored.experiment) == e
    assert from_record(stored.pretrained["task.model"]) == Pretrained("runs/x")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["experiment.json"]   # nothing half-written stays


def test_what_cannot_be_recorded_is_named():
    with pytest.raises(UserError, match=r"experiment\.data is <function.*cannot be stored"):
        to_record(experiment(data=test_nan_round_trip))

    @dataclasses.dataclass
    class Local:
        pass

    with pytest.raises(UserError, match="cannot be stored"):
        to_record(Local())


def test_linen_name_and_parent_are_no_fields():
    assert to_record(GPT(name="x")).keys() & {"name", "parent"} == set()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"class": "jaxgen.models.gtp:GPT"}, "this version of jaxgen does not have"),
        ({"class": "jaxgen.models.gpt:GPT2"}, "defines no such class; did you mean 'GPT'"),
        ({"class": "jaxgen.models.gpt:GPT", "dpth": 3}, r"experiment\.dpth .* did you mean 'depth'.*newer version"),
        ({"class": "jaxgen.models.gpt:jax"}, "defines no such class"),
        ({"class": "jaxgen.models.gpt:math.sqrt"}, "defines no such class"),
        ({"class": "jaxgen.models.gpt:Rope"}, "defines no such class"),   # imported there, defined elsewhere
        ({"class": "jaxgen.tasks.language:__builtins__"}, "defines no such class"),
        ({"class": "jaxgen.experiment:Target"}, "lacks metric, which Target needs"),
        ({"class": "os:system"}, "outside jaxgen.*--trust"),
        ({"class": "subprocess:Popen", "args": ["touch", "x"]}, "outside jaxgen"),
        ({"class": "jaxgen.models.gpt.os:Popen"}, "does not have"),
        ({"class": "jaxgen..os:Popen"}, "outside jaxgen"),
        ({"class": "mine.py:Mine"}, "--trust mine.py"),
        ({"float": "high"}, "damaged, or was written by a newer"),
        ({"dtype": "float33"}, "dtype 'float33', which is unknown"),
    ],
)
def test_records_that_are_refused(data, sentence):
    with pytest.raises(UserError, match=sentence):
        from_record(data)


def edited(path: str, value: Any) -> Any:
    """A sound record of an experiment in which one value stands at a dotted path."""
    data = to_record(experiment(data=Text(), evaluations=(HeldOut(),)))
    place, (*walk, last) = data, [int(name) if name.isdecimal() else name for name in path.split(".")]
    for name in walk:
        place = place[name]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "there", "right"),
    [
        ("steps", "ten", '"ten"', "a whole number"),
        ("steps", 1.5, "1.5", "a whole number"),
        ("steps", True, "true", "a whole number"),
        ("name", None, "null", "a string"),
        ("task", [1, 2], "[1, 2]", "an object of class Task"),
        ("task.model", "gpt", '"gpt"', "an object of class GPT or an object of class Pretrained"),
        ("task.model.depth", "2", '"2"', "a whole number"),
        ("task.model.tied", "no", '"no"', "true or false"),
        ("task.model.windows", 0, "0", "a list, each a whole number"),
        ("task.model.norm", "rsmnorm", '"rsmnorm"', "one of \"layernorm\", \"rmsnorm\"; did you mean 'rmsnorm'?"),
        ("task.model.rope", to_record(Mesh()), "an object of class Mesh", "an object of class Rope"),
        ("data.tokenizer", "bytes", '"bytes"', "an object of class TokenizerConfig"),
        ("mesh", [], "[]", "an object of class Mesh"),
        ("rules", [], "[]", "an object, each of whose values is a list, each a string"),
        ("rules.batch", "data", '"data"', "a list, each a string"),
        ("rules.batch.1", 4, "4", "a string"),
        ("optimizer", 1, "1", "an object of class Optimizer or an object, each of whose values is an object of class "
         "Optimizer"),
        ("evaluations", {}, "{}", "a list, each an object of class Evaluation"),
        ("evaluations.0", 5, "5", "an object of class Evaluation"),
        ("ema", 0.9, "0.9", "an object of class Ema or an object of class PowerEma or null"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_named(path, value, there, right):
    with pytest.raises(UserError) as error:
        from_record(edited(path, value))
    assert str(error.value) == f"experiment.{path} of the record is {there}, which should be {right}"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("steps", {"list": [1]}, "experiment.steps of the record is {\"list\": [1]}, which should be a whole number"),
        ("optimizer", {"a": 1}, "experiment.optimizer.a of the record is 1, which should be an object of class Opt"),
        ("rules", {"dict": [[{}, 1]]}, "experiment.rules of the record is damaged, or was written by a newer jaxgen"),
        ("task.class", "jaxgen.tasks.language:LanguageModle", "did you mean 'LanguageModel'?"),
        ("task.class", 3, "experiment.task of the record is damaged"),
    ],
)
def test_records_that_a_hand_has_damaged(path, value, sentence):
    with pytest.raises(UserError) as error:
        from_record(edited(path, value))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "read"),
    [
        ("steps", 20.0, lambda e: type(e.steps) is int and e.steps == 20),   # to JSON it is 20
        ("optimizer.learning_rate", 1, lambda e: e.optimizer.learning_rate == 1),
        ("evaluations", {"list": []}, lambda e: e.evaluations == []),
        ("task.model", to_record(Pretrained("runs/x")), lambda e: e.task.model == Pretrained("runs/x")),
        ("ema", None, lambda e: e.ema is None),
    ],
)
def test_values_that_are_as_good_are_taken(path, value, read):
    assert read(from_record(edited(path, value)))


def test_annotations_that_say_nothing_refuse_nothing(tmp_path):
    """Those that a field's own default breaks, and those of a class that another of the same form may stand for."""
    file = write(tmp_path / "loose.py", textwrap.dedent("""
        import dataclasses
        from jaxgen.models.gpt import GPT
        from jaxgen.tasks.language import LanguageModel

        @dataclasses.dataclass(frozen=True)
        class Loose:
            scale: int = 0.5
            name: str = None
            hook: [int] = 3
            other: "Nowhere" = 1

        mine = LanguageModel(Loose())
    """))
    mine = files.load(file).mine
    assert from_record(to_record(mine), trust=[file]) == mine
    record.check(mine)


def test_evaluations_of_one_name_are_refused():
    with pytest.raises(UserError, match="two evaluations have the name 'heldout', so one's results would overwrite"):
        experiment(evaluations=(HeldOut(), HeldOut(every=5)))
    assert len(experiment(evaluations=(HeldOut(), HeldOut(name="again"))).evaluations) == 2


def test_what_could_not_be_rebuilt_is_found_before():
    record.check(experiment(data=Text(), evaluations=[HeldOut(every=np.int64(3))], steps=20.0))
    with pytest.raises(UserError, match=r"^experiment\.evaluations\.0\.every is 1\.5, which should be a whole number$"):
        record.check(experiment(data=Text(), evaluations=(HeldOut(every=1.5),)))
    with pytest.raises(UserError, match=r"^experiment\.data is an object of class Mesh, which should be an object of"):
        record.check(experiment(data=Mesh(), evaluations=()))


def test_class_of_a_file_is_rebuilt_only_when_trusted(tmp_path):
    file = write(tmp_path / "mine.py", EXPERIMENT_FILE)
    e = load(file).experiment
    data = to_record(e)
    assert data["data"]["class"] == "mine.py:Mine"
    with pytest.raises(UserError, match=r"experiment\.data .*--trust mine\.py"):
        from_record(data)
    other = write(tmp_path / "other.py", EXPERIMENT_FILE)
    with pytest.raises(UserError, match=r"--trust mine\.py"):
        from_record(data, trust=[other])
    assert from_record(data, trust=[file, other, file]) == e
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match=r"2 trusted files are called mine\.py"):
        from_record(data, trust=[file, write(tmp_path / "more" / "mine.py", EXPERIMENT_FILE)])
    with pytest.raises(UserError, match="there is no file"):
        from_record(data, trust=[tmp_path / "gone.py"])


def test_untrusted_file_is_not_executed(tmp_path):
    write(tmp_path / "evil.py", "raise SystemExit('executed')")
    with pytest.raises(UserError, match="--trust evil.py"):
        from_record({"class": "evil.py:Anything"})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no run directory"), ("{", "is damaged"), ("[]", "can read"), ('{"format": 9}', "can read"),
     ('{"format": 1}', "can read"), ('{"format": 1, "experiment": {}, "pretrained": []}', "can read")],
)
def test_run_directories_that_are_none(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "experiment.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        record.stored(tmp_path / "run")


def test_nearest_run_is_named(tmp_path):
    record.store(tmp_path / "quickstart", Target("loss"))
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        record.stored(tmp_path / "quikstart")
    with pytest.raises(UserError, match="it holds the runs quickstart"):
        record.stored(tmp_path)


# Files


def test_load(tmp_path):
    module = load(write(tmp_path / "mine.py", EXPERIMENT_FILE))
    assert module.experiment.name == "mine" and module is load(tmp_path / "mine.py")
    assert select(module).steps == 10
    assert select(module, smoke=True).name == "mine-smoke" and select(module, smoke=True).steps == 2


def test_changed_file_is_executed_again(tmp_path):
    file = write(tmp_path / "mine.py", EXPERIMENT_FILE)
    assert load(file).experiment.steps == 10
    write(file, EXPERIMENT_FILE.replace("steps=10", "steps=1000"))
    assert load(file).experiment.steps == 1000


def test_neighbours_of_the_same_name_in_two_folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "common_part.py", f"NAME = {name!r}")
        text = "from common_part import NAME" + EXPERIMENT_FILE.replace('"mine"', "NAME")
        write(tmp_path / name / "mine.py", text)
    path = list(sys.path)
    try:
        assert [load(tmp_path / n / "mine.py").experiment.name for n in ("one", "two")] == ["one", "two"]
    finally:
        sys.path[:] = path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1", "defines no 'experiment'$"),
        ("experiment = 3", "'experiment' in .* is a int, which should be a jaxgen Experiment"),
        (EXPERIMENT_FILE.replace("experiment = ", "main = ").replace("(experiment", "(main"), "it defines main, smoke"),
    ],
)
def test_files_without_an_experiment(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        load(write(tmp_path / "mine.py", text))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "quickstart.py", "")
    with pytest.raises(UserError, match=r"there is no file .*quikstart\.py; did you mean 'quickstart\.py'"):
        load(tmp_path / "quikstart.py")
    with pytest.raises(UserError, match="its folder .* does not exist"):
        load(tmp_path / "gone" / "x.py")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)


def test_bugs_of_a_file_are_its_own(tmp_path):
    with pytest.raises(ZeroDivisionError):
        load(write(tmp_path / "mine.py", "1 / 0"))
    with pytest.raises(ModuleNotFoundError):
        load(write(tmp_path / "mine.py", "import no_such_module"))
    assert not [m for m in sys.modules if m.endswith("_mine") and m.startswith("jaxgen_file") and
                sys.modules[m].__file__ == str(tmp_path / "mine.py")]


def test_no_smoke_form(tmp_path):
    with pytest.raises(UserError, match="no 'smoke' form"):
        select(load(write(tmp_path / "mine.py", EXPERIMENT_FILE.replace("smoke =", "other ="))), smoke=True)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"steps": 0}, {"name": "a/b"}, {"name": ".."}, {"name": ""},
                                     {"microbatches": 3}])
def test_experiments_that_make_no_sense(changes):
    with pytest.raises(UserError):
        experiment(**changes)


def test_target():
    assert Target("a", at_most=2.0).reached({"a": 2.0}) and not Target("a", at_most=2.0).reached({"a": float("nan")})
    assert Target("a", at_least=0.5).reached({"a": 0.6}) and not Target("a", at_least=0.5).reached({"a": 0.4})
    with pytest.raises(UserError, match="did you mean 'eval/loss'"):
        Target("eval/los").reached({"eval/loss": 1.0})


# Overrides


@pytest.mark.parametrize(
    ("args", "read"),
    [
        ("--steps 20", lambda e: e.steps == 20),
        ("--steps=20 --batch-size 4", lambda e: (e.steps, e.batch_size) == (20, 4)),
        ("--batch_size 4", lambda e: e.batch_size == 4),
        ("--task.model.depth 3 --optimizer.learning-rate 3e-4",
         lambda e: (e.task.model.depth, e.optimizer.learning_rate) == (3, 3e-4)),
        ("--optimizer.learning_rate 0.5", lambda e: e.optimizer == AdamW(0.5)),
        ("--mesh.data -1 --mesh.fsdp 2", lambda e: e.mesh == Mesh(data=-1, fsdp=2)),
        ("--rules.embed fsdp tensor", lambda e: e.rules["embed"] == ("fsdp", "tensor") and e.rules["batch"]),
        ("--rules.embed", lambda e: e.rules["embed"] == ()),
        ("--evaluations.1.every 7", lambda e: [m.every for m in e.evaluations] == [100, 7]),
        ("--task.model.positions rope --task.model.windows 0 4", lambda e: e.task.model.windows == (0, 4)),
        ("--task.model.no-tied", lambda e: not e.task.model.tied),
        ("--task.model.tied False", lambda e: not e.task.model.tied),
        ("--task.model.qk-norm true", lambda e: e.task.model.qk_norm),
        ("--target.at-most inf", lambda e: e.target.at_most == float("inf")),
        ("--ema.decay 0.5", lambda e: e.ema.decay == 0.5),
    ],
)  # fmt: skip
def test_override(args, read):
    changed = override(experiment(), args.split())
    assert read(changed) and type(changed.task.model) is GPT


def test_override_changes_nothing_else():
    e = experiment()
    assert override(e, ["--steps", "20"]) == dataclasses.replace(e, steps=20)
    assert override(e, []) is e


def test_override_optimizers_by_player():
    e = experiment(optimizer={"generator": AdamW(1e-3), "critic": AdamW(1e-4)})
    changed = override(e, ["--optimizer.critic.learning-rate", "2"])
    assert changed.optimizer == {"generator": AdamW(1e-3), "critic": AdamW(2.0)}


def test_override_a_pretrained():
    e = experiment(task=Tuned(Pretrained("runs/a")))
    assert override(e, ["--task.model.source", "runs/b"]).task.model == Pretrained("runs/b")
    with pytest.raises(UserError, match="'seven', which should be a number, latest or best"):
        override(e, ["--task.model.step", "seven"])


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("--task.model.deth 3", "there is no field --task.model.deth; did you mean --task.model.depth?"),
        ("--tsk.modle.depth 3", "there is no field --tsk.modle.depth; did you mean --task.model.depth?"),
        ("--depth 3", "there is no field --depth; did you mean --task.model.depth?"),
        ("--optimizer.zzz 3", "there is no field --optimizer.zzz in optimizer (AdamW); the fields there "),
        ("--task.model.depth x", "--task.model.depth is 'x', which should be a whole number"),
        ("--task.model.depth 1.5", "--task.model.depth is '1.5', which should be a whole number"),
        ("--task.model.depth", "--task.model.depth needs a value: a whole number"),
        ("--task.model.depth 3 4", "--task.model.depth is '3 4', which should be a whole number"),
        ("--steps 3 --optimizer.learning-rate fast", "--optimizer.learning-rate is 'fast', which should be a number"),
        ("--task.model.norm rsmnorm",
         "--task.model.norm is 'rsmnorm', which should be one of layernorm, rmsnorm; did you mean 'rmsnorm'?"),
        ("--task.model.tied maybe", "--task.model.tied is 'maybe', which should be True or False"),
        ("--task.model.windows 1 x", "--task.model.windows is '1 x', which should be any number of values, each "),
        ("--task.model 3", "--task.model is not one value; it has fields of its own: --task.model.vocab-size, "),
        ("--evaluations.7.every 3", "there is no field --evaluations.7.every in evaluations (tuple)"),
        ("steps 3", "'steps' is not an override: fields are given as --field value"),
        ("--rules.embedd fsdp", "there is no field --rules.embedd; did you mean --rules.embed?"),
        ("--topology.size 3", "there is no field --topology.size: topology is '' in this experiment, "),
        ("--batch-size 0", "batch_size is 0, which should be at least 1"),
    ],
)  # fmt: skip
def test_override_errors_are_one_sentence(args, sentence, capsys):
    with pytest.raises(UserError) as error:
        override(experiment(), args.split())
    said = str(error.value)
    assert said.startswith(sentence) and "\n" not in said
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""   # no box of tyro's


def test_override_any_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Holder:
        net: nn.Module

    held = Holder(Net())
    assert override(held, ["--net.window", "None", "--net.mode", "slow"]).net == Net(mode="slow")
    assert override(held, ["--net.window", "3"]).net.window == 3
    with pytest.raises(UserError, match="a whole number or None"):
        override(held, ["--net.window", "x"])
    with pytest.raises(UserError, match="--net.dtype cannot be set on the command line"):
        override(held, ["--net.dtype", "float32"])


# Differences


def paths(found):
    return [d.path for d in found]


def test_differences():
    e = experiment()
    assert differences(e, e) == []
    other = override(e, "--task.model.depth 4 --steps 20 --mesh.fsdp 2 --rules.embed tensor".split())
    found = differences(e, other)
    assert sorted(paths(found)) == ["mesh.fsdp", "rules.embed", "steps", "task.model.depth"]
    assert (found[0].old, found[0].new) == (2, 4)
    assert paths(differences(e, dataclasses.replace(e, optimizer=Target("x")))) == ["optimizer"]
    assert paths(differences(e, dataclasses.replace(e, evaluations=()))) == ["evaluations"]
    assert differences(1, 1.0) == [] and paths(differences(1, True)) == [""]
    assert differences(Target("x", float("nan")), Target("x", float("nan"))) == []


def test_a_field_that_a_record_lacks_is_its_default():
    old, new = to_record(GPT()), to_record(GPT(logit_cap=30.0))
    del old["logit_cap"]
    assert differences(old, to_record(GPT())) == []
    assert paths(differences(old, new)) == ["logit_cap"]


@pytest.mark.parametrize(
    "args",
    ["--mesh.fsdp 2", "--rules.embed tensor", "--rules.mlp", "--steps 20", "--evaluations.0.every 3",
     "--checkpoint.every 7", "--topology v5e:2x2", "--target.at-most 3", "--mesh.data 2 --steps 11"],
)  # fmt: skip
def test_resume_goes_on(args):
    e = experiment()
    changed = override(e, args.split())
    assert sorted(paths(resume(e, changed))) == sorted(paths(differences(e, changed))) != []


@pytest.mark.parametrize(
    "args",
    ["--steps 9", "--seed 1", "--task.model.depth 4", "--batch-size 4", "--microbatches 2",
     "--optimizer.learning-rate 1", "--evaluations.0.count 9", "--ema.decay 0.1", "--name other", "--data.heldout 0.2"],
)  # fmt: skip
def test_resume_is_refused(args):
    e = experiment()
    field = args.split()[0][2:].replace("-", "_")
    with pytest.raises(UserError) as error:
        resume(e, override(e, ["--mesh.fsdp", "2", *args.split()]), lambda: True, "runs/tiny")
    said = str(error.value)
    assert field in said and "--run-dir" in said and "mesh" not in said and said.startswith("runs/tiny ")


def test_resume_of_a_record_with_nonsense_for_steps():
    with pytest.raises(UserError, match=r"steps \('ten', now 10\)"):
        resume(to_record(experiment()) | {"steps": "ten"}, experiment())


def test_resume_asks_for_the_content_of_other_paths():
    e = experiment()
    moved = override(e, ["--data.path", "elsewhere"])
    assert paths(resume(e, moved, lambda: True)) == ["data.path"]
    with pytest.raises(UserError, match=r"data\.path"):
        resume(e, moved, lambda: False)
    called = []
    resume(e, override(e, ["--steps", "20"]), lambda: called.append(1))
    assert not called   # preparing data takes time


# Weights from elsewhere


def test_resolve_rebuilds_the_module_of_a_run(tmp_path):
    source = experiment(data=Target("stands in"), evaluations=())
    record.store(tmp_path / "base", source)
    e = experiment(task=Tuned(Pretrained(str(tmp_path / "base"))))
    resolved, sources = resolve(e)
    assert resolved.task.model == source.task.model
    assert sources == [("task.model", Pretrained(str(tmp_path / "base")), tmp_path / "base")]
    assert resolve(source) == (source, [])


def test_resolve_goes_on_when_the_source_is_gone(tmp_path):
    base = tmp_path / "base"
    record.store(base, experiment(data=Target("stands in"), evaluations=()))
    e = experiment(data=Target("stands in"), evaluations=(), task=Tuned(Pretrained(str(base))))
    resolved, sources = resolve(e)
    record.store(tmp_path / "run", resolved, {s.path: s.pretrained for s in sources})
    (base / "experiment.json").unlink()
    with pytest.raises(UserError, match=r"task\.model is to come from .*base"):
        resolve(e, run_dir=tmp_path / "run")  # which has no step yet
    (tmp_path / "run" / "checkpoints" / "00000004").mkdir(parents=True)
    assert resolve(e, run_dir=tmp_path / "run")[0] == resolved
    with pytest.raises(UserError, match=r"task\.model is to come from .*base"):
        resolve(e)
    other = dataclasses.replace(e, task=Tuned(Pretrained(str(base), weights="raw")))
    with pytest.raises(UserError, match=r"elsewhere: task\.model\.weights \('ema', now 'raw'\)"):
        resolve(other, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("pretrained", "sentence"),
    [
        (lambda d: Pretrained(str(d / "gone")), r"task\.model is to come from .*gone, but there is no run directory"),
        (lambda d: Pretrained(str(d)), "is not a run directory"),
        (lambda d: Pretrained(str(d / "base"), part="task.modle"), "has no part task.modle.* did you mean 'model'"),
        (lambda d: Pretrained(str(d / "base"), part="task.model.depth"), "which is no module"),
        (lambda d: Pretrained(str(d / "gone.py")), "there is no file"),
    ],
)
def test_resolve_errors(tmp_path, pretrained, sentence):
    record.store(tmp_path / "base", experiment(data=Target("stands in"), evaluations=()))
    with pytest.raises(UserError, match=sentence):
        resolve(experiment(task=Tuned(pretrained(tmp_path))))


def test_resolve_trains_the_smoke_form_of_a_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    trained = []

    def train(e, run_dir, trust):
        trained.append(e.name)
        record.store(run_dir, e)

    monkeypatch.setattr("jaxgen.experiment.train", train)
    file = write(tmp_path / "base.py", EXPERIMENT_FILE)
    e = experiment(task=Tuned(Pretrained(str(file))))
    for _ in range(2):
        resolved, (source,) = resolve(e)
        assert resolved.task.model == GPT() and source.directory.is_relative_to(runtime.cache_dir())
    assert trained == ["mine-smoke"]
    write(file, EXPERIMENT_FILE.replace("steps=2", "steps=3"))
    assert resolve(e, weights=False)[0].task.model == GPT() and trained == ["mine-smoke"]
    resolve(e)
    assert trained == ["mine-smoke", "mine-smoke"]


def test_label_of_a_file_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    write(package / "__init__.py", "")
    text = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Thing:\n    x: int = 1\n"
    file = write(package / "part.py", text)
    monkeypatch.syspath_prepend(tmp_path)
    thing = files.load(file).Thing(2)
    assert to_record(thing)["class"] == "some_package.part:Thing"
    assert from_record(to_record(thing), trust=[file]) == thing
    with pytest.raises(UserError, match="outside jaxgen"):
        from_record(to_record(thing))
