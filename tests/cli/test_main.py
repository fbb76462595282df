"""The command line's manners: what it prints, what it exits with, and what it does not import."""

import errno
import os
import subprocess
import sys
import types

import pytest

from jaxgen.cli import main as cli
from jaxgen.errors import UserError


@pytest.fixture
def verb(monkeypatch):
    """Makes `jaxgen train` call a function."""

    def use(run):
        monkeypatch.setitem(sys.modules, "jaxgen.cli.train", types.SimpleNamespace(run=run))

    return use


def program(*args: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import sys; from jaxgen.cli.main import main; sys.exit(main())", *args]
    return subprocess.run(command, capture_output=True, text=True, **options)


def fail_with(error):
    def run(argv):
        raise error

    return run


def test_users_mistake_is_one_line(verb, capsys):
    verb(fail_with(UserError("the sky is green, which should be blue")))
    assert cli.main(["train"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "jaxgen: the sky is green, which should be blue\n" and printed.out == ""


def test_full_disk_is_one_line(verb, capsys):
    verb(fail_with(OSError(errno.ENOSPC, "No space left on device")))
    assert cli.main(["train"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("jaxgen: No space left on device; what was saved before is whole")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EROFS])
def test_a_path_that_cannot_be_used_is_one_line(verb, capsys, code):
    verb(fail_with(OSError(code, os.strerror(code), "runs/r/samples")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == f"jaxgen: {os.strerror(code)}: runs/r/samples\n"


def test_interrupt_is_one_line(verb, capsys):
    verb(fail_with(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "jaxgen: interrupted\n"


def test_bugs_keep_their_traceback(verb):
    verb(fail_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_exit_code_is_the_verbs(verb, returned, code):
    verb(lambda argv: returned)
    assert cli.main(["train", "x"]) == code


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (
            ["qqq"],
            "there is no command 'qqq'; the commands are train, show, sample, eval, search, ema, import, export, "
            "tokenizer",
        ),
        (["tokenizer"], "the command is jaxgen tokenizer train"),
        (["tokenizer", "trian"], "the command is jaxgen tokenizer train; did you mean 'train'?"),
        (["tokenizer", "train"], "the following arguments are required: --output"),
        (["tokenizer", "train", "--output", "x", "--vocab-size", "0"], "--vocab-size is 0, which should be at least 1"),
        (["train"], "jaxgen train needs an experiment file"),
        (["show"], "jaxgen show needs an experiment file"),
        (["train", "no/such/folder/x.py"], "there is no file no/such/folder/x.py: its folder no/such/folder does not "),
        (["sample"], "jaxgen sample needs a run directory"),
        (["eval"], "jaxgen eval needs a run directory"),
        (["sample", "no-such-run"], "there is no run directory no-such-run"),
        (["eval", "no-such-run"], "there is no run directory no-such-run"),
        (["sample", "a", "--run-dir", "b"], "both a and --run-dir b are given: which run is meant?"),
        (["sample", "a", "b"], "'b' is one argument too many"),
        (["sample", "a", "--stpe", "3"], "there is no option --stpe; did you mean '--step'?"),
        (["sample", "a", "--step", "beast"], "--step is 'beast', which should be a number, latest or best"),
        (["eval", "a", "--step", "-3"], "--step is '-3', which should be a number, latest or best"),
        (["eval", "a", "--weights", "x"], "argument --weights: invalid choice: 'x'"),
        (["sample", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0, which should be at least 1"),
        (["sample", "a", "--top-p", "2"], "--top-p is 2.0, which should be above 0 and at most 1"),
        (["train", "x.py", "--devices", "many"], "--devices is 'many', which should be a number of at least 1"),
        (["show", "x.py", "--devices", "-3"], "--devices is '-3', which should be a number of at least 1"),
    ],
)
def test_mistakes(argv, said, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"jaxgen: {said}") and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("verb", ["train", "show", "sample", "eval", "search", "tokenizer"])
def test_every_verb_has_help(verb, capsys):
    try:
        code = cli.main([verb, "--help"])
    except SystemExit as end:   # argparse's own
        code = end.code
    assert code in (0, None) and f"jaxgen {verb}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from jaxgen.cli.main import main; main(['--help']); main(['train', '--help']);"
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'grain', 'tyro', 'rich', 'optax', 'tensorflow'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "commands:" in done.stdout and "--run-dir" in done.stdout


def test_no_command_prints_the_usage():
    done = program()
    assert done.returncode == 2 and "usage: jaxgen COMMAND" in done.stderr and done.stdout == ""
    assert program("--version").stdout.startswith("jaxgen ")


def test_broken_pipe_is_quiet():
    code = (
        "import sys; from jaxgen.cli import main as cli;"
        "cli.usage = lambda: 'x' * 1_000_000; sys.exit(cli.main(['--help']))"
    )
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 141 and errors == ""
