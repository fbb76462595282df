"""Directories that are either whole or not there: built under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxgen.errors import UserError
from jaxgen.files import locked

_WHOLE = "whole.json"  # file name -> size; written last


def root(cache: str | Path | None = None) -> Path:
    """The given directory, else JAXGEN_CACHE, else jaxgen's place in the per-user cache."""
    if cache:
        return Path(cache).expanduser()
    if named := os.environ.get("JAXGEN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxgen"


def key(*values: Any) -> str:
    """Hash of JSON-like values, the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:24]


def is_whole(directory: Path) -> bool:
    """Whether every file that `build` wrote is there in its full size."""
    try:
        sizes = json.loads((directory / _WHOLE).read_text())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def build(directory: Path, make: Callable[[Path], None]) -> Path:
    """`directory`, filled by `make(temporary directory)` if it is not whole already.

    May be killed at any moment: the directory appears by one rename. Of two processes, the second waits for the first.
    """
    if is_whole(directory):
        return directory
    with explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(directory.with_name(directory.name + ".lock")) as alone:
            if is_whole(directory):
                return directory
            host = socket.gethostname()
            if alone:  # whoever wrote these is dead, or it would hold the lock
                for stale in directory.parent.glob(f"{directory.name}.tmp-{host}-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            temporary = directory.with_name(f"{directory.name}.tmp-{host}-{uuid.uuid4().hex[:8]}")
            temporary.mkdir()
            try:
                make(temporary)
                _seal(temporary)
                _publish(temporary, directory)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _seal(directory: Path) -> None:
    files = sorted(p for p in directory.iterdir() if p.is_file())
    for path in files:
        with path.open("rb+") as f:
            os.fsync(f.fileno())  # else a power cut could leave a renamed directory of empty files
    (directory / _WHOLE).write_text(json.dumps({p.name: p.stat().st_size for p in files}))


def _publish(temporary: Path, directory: Path) -> None:
    for _ in range(3):
        try:
            temporary.rename(directory)
            return
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if is_whole(directory):  # another host was faster, with the same content
            return
        shutil.rmtree(directory, ignore_errors=True)
    raise UserError(f"the cache entry {directory} is damaged and cannot be replaced; delete it")


@contextlib.contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turns a cache that is full or cannot be written into a sentence."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left in the cache {directory.parent}; "
                            "free some, or name another place with JAXGEN_CACHE") from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT) and (
                e.filename is None or str(directory.parent) in str(e.filename) or str(e.filename) in str(directory)):
            raise UserError(f"cannot write to the cache {directory.parent} ({e.strerror}); "
                            "name another place with JAXGEN_CACHE") from e
        raise
