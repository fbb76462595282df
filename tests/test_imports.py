"""Imports run downward only, and `import jaxgen` is light.

cli > planning > experiment > training > evaluation > tasks > sampling > models, diffusion > nn > sharding; `data` knows
none of these; `interop` knows models and sharding alone, and is known from evaluation up; the bottom modules know each
other alone.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxgen"
ORDER = ["sharding", "nn", "models", "sampling", "tasks", "evaluation", "training", "experiment", "planning", "cli"]
BOTTOM = {"errors", "files", "override", "pretrained", "record", "runtime"}
FILES = sorted(ROOT.rglob("*.py"))


def allowed(room: str) -> set[str]:
    """The rooms that a room may import, itself included."""
    if room in BOTTOM:
        return BOTTOM
    if room == "data":
        return BOTTOM | {"data"}
    if room == "interop":
        return BOTTOM | {"interop", "models", "sharding"}
    if room == "diffusion":   # beside models
        return BOTTOM | {"diffusion", "nn", "sharding", "data"}
    if room == "":            # the package itself: the names that `import jaxgen` offers
        return BOTTOM | {"", "experiment", "pretrained"}
    below = set(ORDER[: ORDER.index(room) + 1])
    if "sampling" in below:
        below |= {"diffusion"}
    if "evaluation" in below:
        below |= {"interop"}
    return below | BOTTOM | ({"data"} if ORDER.index(room) > ORDER.index("nn") else set())


def room_of(module: str) -> str:
    """`"training"` for jaxgen.training.loop."""
    return module.split(".")[1] if "." in module else ""


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, module of jaxgen) of each import, wherever it stands but under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports(ast.Module(node.orelse, []), package)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "jaxgen")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "jaxgen":
                yield from ((node.lineno, f"jaxgen.{alias.name}") for alias in node.names)
            elif module.startswith("jaxgen."):
                yield node.lineno, module
        else:
            yield from imports(node, package)


def broken(source: str, file: Path) -> list[str]:
    parts = ["jaxgen", *file.relative_to(ROOT).with_suffix("").parts]
    own = parts[1] if parts[1] != "__init__" else ""
    permitted = allowed(own)
    return [
        f"{file.relative_to(ROOT.parent)}:{line} imports {module}"
        for line, module in imports(ast.parse(source), parts[:-1])
        if room_of(module) not in permitted
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_downward(file):
    assert broken(file.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("models/x.py", "from jaxgen.training import loop", True),
        ("models/x.py", "def f():\n    import jaxgen.tasks.base", True),
        ("models/x.py", "from jaxgen import experiment", True),
        ("models/x.py", "from ..training import loop", True),
        ("models/x.py", "from jaxgen import nn, errors", False),
        ("models/x.py", "if TYPE_CHECKING:\n    from jaxgen.tasks import base", False),
        ("models/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from jaxgen.tasks import base", True),
        ("models/x.py", "if not TYPE_CHECKING:\n    from jaxgen.tasks import base", True),
        ("data/x.py", "from jaxgen.nn.dtypes import DType", True),
        ("data/x.py", "from jaxgen.runtime import cache_dir\nfrom jaxgen.data import base", False),
        ("nn/x.py", "from jaxgen.data import base", True),
        ("record.py", "from jaxgen.experiment import Experiment", True),
        ("training/x.py", "from jaxgen.experiment import Experiment", True),
        ("training/x.py", "from jaxgen.evaluation.base import Evaluation", False),
        ("experiment.py", "from jaxgen.cli import main", True),
        ("cli/x.py", "from jaxgen.training.loop import train", False),
        ("interop/x.py", "from jaxgen.tasks import base", True),
    ],
)
def test_the_rule_can_fail(file, source, wrong):
    assert bool(broken(source, ROOT / file)) == wrong


def test_every_room_has_its_place():
    rooms = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES} - {"__init__", "__main__"}
    assert rooms <= set(ORDER) | BOTTOM | {"data", "interop", "diffusion"}


def test_the_package_imports_nothing_heavy():
    code = "import sys, jaxgen, jaxgen.cli.main, jaxgen.errors, jaxgen.runtime; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "numpy", "orbax", "grain", "optax"} & set(done.stdout.split())
