"""Pictures that a table names, in a folder or in tar files, and tar files in the webdataset convention."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import gzip
import json
import mmap
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxgen.data import cache as caching
from jaxgen.data.base import Progress
from jaxgen.data.images import SUFFIXES, BadImage
from jaxgen.data.rows import (
    Pictures,
    Row,
    Strings,
    StringsWriter,
    check_column,
    mapped_array,
    no_column,
    read_file,
    text_of,
)
from jaxgen.data.sources import content_hashes, find_files, first_line, path_of, reading
from jaxgen.errors import UserError

TABLES = (".tsv", ".jsonl", ".ndjson")


# --- tables --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines of a file, or of a part of it, at random; mapped where it lies in a local file as it is.

    Attributes:
      path: the file; `.gz` is unpacked in memory.
      offset: where the part begins.
      size: its bytes; -1 for the whole file.
    """

    path: str
    offset: int = 0
    size: int = -1

    @functools.cached_property
    def _data(self) -> bytes | mmap.mmap:
        with reading(self.path):
            if self.path.endswith(".gz"):
                return gzip.decompress(path_of(self.path).read_bytes())
            with path_of(self.path).open("rb") as f:
                if self.size < 0 and "://" not in self.path and os.path.getsize(path_of(self.path)):
                    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                f.seek(self.offset)
                return f.read(self.size)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Where each line that is not blank begins and ends: int64 (lines, 2)."""
        data = np.frombuffer(self._data, np.uint8)
        ends = [np.flatnonzero(data[i:i + (1 << 26)] == 10) + i for i in range(0, len(data), 1 << 26)]
        ends = np.concatenate([*ends, [len(data)]]).astype(np.int64)
        lines = np.stack([np.concatenate([[0], ends[:-1] + 1]), ends], axis=1)
        short = np.flatnonzero(lines[:, 1] - lines[:, 0] < 2)  # may be blank
        blank = [i for i in short if not self._data[lines[i, 0]:lines[i, 1]].strip()]
        return np.delete(lines, blank, axis=0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        begin, end = self._ends[index]
        return self._data[begin:end].rstrip(b"\r")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "offset": self.offset, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Table(Pictures):
    """Rows from lines; a subclass says where a picture of a given name is read."""

    lines: Lines
    path: str
    name: str  # of the file, in messages
    column: str

    @functools.cached_property
    def _header(self) -> list[str] | None:
        """The names of a TSV's columns; None for JSON lines. Raises UserError where none is the picture's."""
        if not len(self.lines):
            raise UserError(f"the table {self.name} is empty")
        if not self.path.lower().removesuffix(".gz").endswith(".tsv"):
            check_column(self.name, self.column, (self._json(i).columns for i in range(len(self.lines))))
            return None
        header = self.lines[0].removeprefix(b"\xef\xbb\xbf").decode(errors="replace").split("\t")
        if self.column not in header:
            raise UserError(no_column(f"{self.name} has", self.column, header))
        return header

    def __len__(self) -> int:
        return len(self.lines) - (self._header is not None)

    def row(self, index: int) -> Row:
        header = self._header
        if header is None:
            return self._json(index)
        where = f"{self.name}, line {index + 2}"
        values = [text_of(value) for value in self.lines[index + 1].split(b"\t")]
        if len(values) != len(header):
            return Row(where, problem=f"it has {len(values)} columns, not {len(header)}")
        return self._named(dict(zip(header, values, strict=True)), where)

    def _json(self, index: int) -> Row:
        where, line = f"{self.name}, line {index + 1}", self.lines[index]
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            return Row(where, problem="it is not UTF-8")
        except ValueError as e:
            return Row(where, problem=f"it is not valid JSON ({e})")
        if not isinstance(value, dict):
            return Row(where, problem=f"it is not a JSON object but {type(value).__name__}")
        return self._named(value, where)

    def _named(self, columns: dict[str, Any], where: str) -> Row:
        name = columns.get(self.column)
        if not isinstance(name, str) or not name:
            return Row(where, columns, f"its column '{self.column}' names no picture")
        return Row(name, columns)

    def image(self, index: int) -> bytes:
        row = self.row(index)
        if row.problem:
            raise BadImage(row.problem)
        return self.read(row.name)

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """The file of that name; raises BadImage."""


@dataclasses.dataclass(frozen=True)
class Table(_Table):
    """A table with pictures as files in the folder `images`."""

    path: str
    column: str
    images: str

    @functools.cached_property
    def lines(self) -> Lines:
        return Lines(self.path)

    @property
    def name(self) -> str:
        return self.path

    def read(self, name: str) -> bytes:
        return read_file(str(path_of(self.images) / name))

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        names = sorted({row.name for row in map(self.row, range(len(self))) if not row.problem})
        files = {name: str(path_of(self.images) / name) for name in names}
        there = {name: file for name, file in files.items() if path_of(file).is_file()}
        hashes = content_hashes([self.path, *there.values()], cache, progress)
        return caching.key("table", self.column, hashes[self.path], [(n, hashes[f]) for n, f in there.items()])


@dataclasses.dataclass(frozen=True)
class TarTable(_Table):
    """A table with pictures in tar files: one that lies in a tar itself, or beside it.

    Attributes:
      path: the table's file, or its name in the tar.
    """

    path: str
    column: str
    tar: Tar
    beside: bool = False

    @functools.cached_property
    def lines(self) -> Lines:
        return Lines(self.path) if self.beside else self.tar.lines(self.path)

    @property
    def name(self) -> str:
        return self.path if self.beside else f"{self.path} of {self.tar.files[0]}"

    def read(self, name: str) -> bytes:
        return self.tar.read(name)

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        table = content_hashes([self.path], cache, progress)[self.path] if self.beside else ""
        return caching.key("table", self.column, table, self.tar.fingerprint(cache, progress))


def open_table(path: str, image: str, images: str, cache: Path) -> Pictures:
    """The table at `path`, its pictures in `images` or found as `open_pictures` says."""
    folder = path_of(path).parent
    if images:
        if images.endswith(".tar"):
            return TarTable(path, image, Tar(tuple(file for _, file in find_files(images)), image, cache), beside=True)
        if not path_of(images).is_dir():
            raise UserError(f"data.images is {images}, which is neither a folder nor a tar")
        return Table(path, image, images)
    table = Table(path, image, str(folder))
    first = next((row.name for row in map(table.row, range(len(table))) if not row.problem), "")
    if first and not path_of(str(folder / first)).is_file():
        stem = path_of(path).name
        tars = [p for p in folder.glob("*.tar") if stem.startswith(p.name.removesuffix(".tar"))]
        if tars:
            chosen = max(tars, key=lambda p: len(p.name))
            return TarTable(path, image, Tar((str(chosen),), image, cache), beside=True)
    return table


# --- tar files -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tar(Pictures):
    """Samples of tar shards in the webdataset convention; indexed once, by content, in `cache`.

    A sample is the members of one shard that share a name up to the first dot of the last part of their path.
    """

    files: tuple[str, ...]
    column: str
    cache: Path

    @functools.cached_property
    def _members(self) -> tuple[Strings, np.ndarray]:
        """Names of all members, and int64 (members, 3) of shard, offset and size."""
        directory = caching.build(self._place("tar", 1), self._index)
        return Strings(directory, "names"), np.load(directory / "places.npy", mmap_mode="r")

    @functools.cached_property
    def _hashes(self) -> list[str]:
        hashes = content_hashes(list(self.files), self.cache)
        return [hashes[file] for file in self.files]

    def _place(self, *key: Any) -> Path:
        """Where in the cache something is kept that follows from the content of the files and `key`."""
        return self.cache / "tars" / caching.key(*key, self._hashes)

    def _index(self, directory: Path) -> None:
        names, places = [], []
        for shard, file in enumerate(self.files):
            with reading(file), path_of(file).open("rb") as f:
                try:
                    with tarfile.open(fileobj=f, mode="r:") as tar:
                        for member in tar:
                            if member.isfile():
                                names.append(member.name.removeprefix("./"))
                                places.append((shard, member.offset_data, member.size))
                            tar.members.clear()  # it would keep them all
                        end = f.seek(0, os.SEEK_END)
                except tarfile.TarError as e:
                    raise UserError(f"{file} is a damaged or unfinished tar file ({first_line(e)})") from e
                if places and places[-1][0] == shard and places[-1][1] + places[-1][2] > end:
                    raise UserError(f"{file} is an unfinished tar file: it ends within {names[-1]}")
        with contextlib.closing(StringsWriter(directory, "names")) as writer:
            for name in names:
                writer.add(name)
        np.save(directory / "places.npy", np.asarray(places, np.int64).reshape(-1, 3))

    @functools.cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture's member of each sample, and where the members of each begin and end."""
        directory = caching.build(self._place("samples", 1, self.column), self._find)
        return mapped_array(directory / "pictures.npy"), mapped_array(directory / "ranges.npy")

    def _find(self, directory: Path) -> None:
        names, places = self._members
        wanted = None if self.column == "image" else "." + self.column.lower()
        pictures, ranges = [], []
        start, before = 0, None
        for k in range(len(names) + 1):
            now = (places[k, 0], _stem(names[k])[0]) if k < len(names) else None
            if now == before:
                continue
            if before is not None:
                found = next((m for m in range(start, k) if (
                    _stem(names[m])[1].lower() == wanted if wanted else names[m].lower().endswith(SUFFIXES))), None)
                if found is not None:
                    pictures.append(found)
                    ranges.append((start, k))
            start, before = k, now
        np.save(directory / "pictures.npy", np.asarray(pictures, np.int64))
        np.save(directory / "ranges.npy", np.asarray(ranges, np.int64).reshape(-1, 2))

    @functools.cached_property
    def table(self) -> str:
        """The name of the one table in the tar files; empty where there is none or several."""
        tables = [name for name in self._members[0] if name.lower().endswith(TABLES)]
        return tables[0] if len(tables) == 1 else ""

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self._members[0])}

    @functools.cached_property
    def _open(self) -> dict[int, Any]:
        return {}

    def _content(self, member: int) -> bytes:
        shard, offset, size = map(int, self._members[1][member])
        if "://" in self.files[shard]:
            with path_of(self.files[shard]).open("rb") as f:
                f.seek(offset)
                return f.read(size)
        if shard not in self._open:
            with reading(self.files[shard]):
                self._open[shard] = path_of(self.files[shard]).open("rb", buffering=0)
        return os.pread(self._open[shard].fileno(), size, offset)  # of any thread: it moves no position

    def read(self, name: str) -> bytes:
        """The content of the member of that name; raises BadImage where there is none."""
        member = self._by_name.get(name.removeprefix("./"))
        if member is None:
            raise BadImage("it is not in the tar")
        return self._content(member)

    def lines(self, name: str) -> Lines:
        shard, offset, size = map(int, self._members[1][self._by_name[name]])
        return Lines(self.files[shard], offset, size)

    def __len__(self) -> int:
        if not len(self._samples[0]):
            wanted = "" if self.column == "image" else f" of the ending .{self.column}"
            raise UserError(f"no pictures{wanted} in {self.files[0]}")
        return len(self._samples[0])

    def row(self, index: int) -> Row:
        picture, (first, end) = self._samples[0][index], self._samples[1][index]
        names = self._members[0]
        columns: dict[str, Any] = {}
        for member in range(first, end):
            ending = _stem(names[member])[1][1:]
            if member == picture or names[member].lower().endswith(SUFFIXES):
                continue
            if ending == "json":
                try:
                    value = json.loads(self._content(member))
                    columns |= value if isinstance(value, dict) else {}
                except ValueError as e:  # no UTF-8 is one too
                    return Row(names[picture], columns, f"its .json is damaged ({first_line(e)})")
            elif ending in ("txt", "cls", "text", "caption"):
                text = text_of(self._content(member).strip())
                if ending == "cls":
                    columns["label"] = int(text) if isinstance(text, str) and text.isdecimal() else text
                else:
                    columns["caption" if ending == "txt" else ending] = text
        return Row(names[picture], columns)

    def image(self, index: int) -> bytes:
        return self._content(int(self._samples[0][index]))

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        hashes = content_hashes(list(self.files), cache, progress)
        return caching.key("tar", self.column, [hashes[file] for file in self.files])


def _stem(name: str) -> tuple[str, str]:
    """(all before, all from) the first dot of a path's last part."""
    base = PurePosixPath(name).name
    stem = base.split(".", 1)[0]
    return name[: len(name) - len(base)] + stem, base[len(stem):]
