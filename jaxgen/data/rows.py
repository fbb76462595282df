"""What sources of pictures are made of: rows that tell all but the pixels, and many strings on disk."""

from __future__ import annotations

import abc
import array
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data.base import Progress
from jaxgen.data.images import BadImage, Picture
from jaxgen.data.sources import path_of
from jaxgen.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a picture beside its pixels.

    Attributes:
      name: of the picture; the captions of one picture share it.
      columns: values by column; text that is not UTF-8 stays bytes.
      problem: why this row cannot be used; empty if it can.
    """

    name: str
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""


class Pictures(abc.ABC):
    """Named pictures in a fixed order."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def row(self, index: int) -> Row:
        """All but the picture."""

    @abc.abstractmethod
    def image(self, index: int) -> bytes | Picture:
        """The picture: a file's content, or uint8 (H, W, C). Raises BadImage where it is missing."""

    @abc.abstractmethod
    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        """Hash of the content; `cache` remembers those of files that have not changed."""

    def classes(self, label: str) -> tuple[str, ...]:
        """Names of the values 0, 1, ... of the column `label`, where the source itself knows them."""
        return ()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of a picture, its `name` and the `image`."""
        row = self.row(index)
        if row.problem:
            raise BadImage(row.problem)
        return row.columns | {"name": row.name, "image": self.image(index)}

    def __getstate__(self) -> dict[str, Any]:  # without what is open, or was read
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def no_column(where: str, column: str, columns: Iterable[str]) -> str:
    """What to tell a person whose column is not there; `where` is such as "FILE has"."""
    columns = list(columns)
    return f"{where} no column '{column}', only {', '.join(columns) or 'none'}{nearest(column, columns)}"


def check_column(where: str, column: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises UserError where none of the rows has the column, if there is any that has columns at all."""
    found: dict[str, None] = {}
    for columns in rows:
        if column in columns:
            return
        found |= dict.fromkeys(columns)
    if found:
        raise UserError(no_column(f"{where} has", column, found))


def text_of(data: bytes) -> str | bytes:
    """Text; what is not UTF-8 stays bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def read_file(path: str) -> bytes:
    """A file's content; raises BadImage where it cannot be read."""
    try:
        if "://" in path:
            return path_of(path).read_bytes()
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # in a third of the time of a Path
        try:
            return os.read(file, os.fstat(file).st_size)
        finally:
            os.close(file)
    except FileNotFoundError as e:
        raise BadImage("the file is not there") from e
    except (OSError, ValueError) as e:
        raise BadImage(f"the file cannot be read ({getattr(e, 'strerror', None) or e})") from e


# --- strings ---------------------------------------------------------------------------------------------------------


class Strings(Sequence[str]):
    """Many strings in two arrays, written once, mapped where they are read."""

    def __init__(self, directory: Path, name: str):
        self._bytes = _mapped(directory / f"{name}.utf8", np.uint8)
        self._ends = np.load(directory / f"{name}.ends.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._bytes[self._ends[index]:self._ends[index + 1]].tobytes().decode(errors="surrogateescape")


class StringsWriter:
    """Writes `Strings` one after the other; they are whole once it is closed."""

    def __init__(self, directory: Path, name: str):
        self._file = (directory / f"{name}.utf8").open("wb")
        self._index = directory / f"{name}.ends.npy"
        self._ends = array.array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, string: str) -> None:
        self._ends.append(self._ends[-1] + self._file.write(string.encode(errors="surrogateescape")))

    def close(self) -> None:
        self._file.close()
        np.save(self._index, np.asarray(self._ends, np.int64))


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def mapped_array(path: Path) -> np.ndarray:
    """An array that `np.save` wrote, mapped."""
    values = np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)  # 128: the header alone
    return values.view(np.ndarray)  # which is indexed in a fraction of a memmap's time
