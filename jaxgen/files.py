"""Files: written whole, held by one process, and Python files loaded by path.

Those are experiment files, and the files that a person trusts to hold classes of a record.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import CodeType, ModuleType
from typing import IO

from jaxgen.errors import UserError, nearest

_loaded: dict[str, tuple[int, int]] = {}   # module name -> (mtime, size) of the file when it was executed
_folders: set[Path] = set()                # folders whose files may import each other


class _Loader(importlib.machinery.SourceFileLoader):
    """Reads the source alone: bytecode beside it is told apart by whole seconds, and an edit may be quicker."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def write_whole(path: str | Path, content: str | bytes, sync: bool = False) -> None:
    """Writes a file whole or not at all: under a hidden name beside it, which is then renamed.

    With `sync` its content is on the disk before the rename, so that not even a power cut leaves it empty.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """Holds an advisory lock on the file at `path`, which is made and stays; the lock ends with the process.

    Gives False where the system or the file system has no locks. With `wait`, waits until nobody else holds it, another
    thread of this process included. Without, raises BlockingIOError where another process does, and forked children do
    not inherit it.
    """
    with open(path, "a") as file:
        yield _lock(file, wait)


def _lock(file: IO, wait: bool) -> bool:
    try:
        import fcntl

        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        else:   # flock would be handed on to children, which may outlive this process
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if not wait and isinstance(error, BlockingIOError | PermissionError):   # POSIX leaves open which of the two
            raise BlockingIOError(f"another process holds {file.name}") from None
        return False
    return True


def existing(path: str | Path) -> Path:
    """The file's absolute path. Raises UserError with the nearest file of that folder where there is none."""
    path = Path(path)
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a Python file")
    if not path.parent.is_dir():
        raise UserError(f"there is no file {path}: its folder {path.parent} does not exist")
    near = nearest(path.name, (p.name for p in path.parent.iterdir() if p.suffix == path.suffix or not path.suffix))
    raise UserError(f"there is no file {path}{near}")


def load(path: str | Path) -> ModuleType:
    """The module of the Python file at `path`, executed once (again when the file has changed).

    The file's folder is importable, so that it may import its neighbours. What the file itself raises is not caught,
    but for its syntax errors.
    """
    file = existing(path)
    package = _package_name(file)
    if package:
        return importlib.import_module(package)
    main = sys.modules.get("__main__")
    if main is not None and _same(getattr(main, "__file__", None), file):   # the script that is running
        return main
    name = f"jaxgen_file_{sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    stat = file.stat()
    if name in sys.modules and _loaded.get(name) == (stat.st_mtime_ns, stat.st_size):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    if spec is None or spec.loader is None or file.suffix != ".py":
        raise UserError(f"{path} is not a Python file: its name should end in .py")
    _share(file.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module   # before it runs: dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        if not _same(error.filename, file):
            raise
        raise UserError(f"{path} cannot be read as Python: line {error.lineno}: {error.msg}") from None
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[name] = (stat.st_mtime_ns, stat.st_size)
    return module


def label(file: str | Path) -> str:
    """How records name a file: the dotted module name inside a package, else the file's own name."""
    file = Path(file).resolve()
    return _package_name(file) or file.name


def _package_name(file: Path) -> str:
    """`"pkg.part.module"` for a file inside a package that can be imported, else an empty string."""
    parts, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if len(parts) == 1 or str(folder) not in sys.path:
        return ""
    return ".".join(parts[:-1] if file.stem == "__init__" else parts)


def _share(folder: Path) -> None:
    """Makes the folder's files importable, and forgets modules of the same names that came from another such folder."""
    names = {p.stem for p in folder.glob("*.py")} | {p.name for p in folder.iterdir() if p.is_dir()}
    for name in names & sys.modules.keys():
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and Path(origin).resolve().parent in _folders - {folder}:
            del sys.modules[name]
    _folders.add(folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))


def _same(origin: str | None, file: Path) -> bool:
    return origin is not None and Path(origin).resolve() == file
