"""Where pictures come from: folders, tables, tar shards, ArrayRecord, TFDS, and arrays in NPZ or IDX files.

A source is a row of named pictures, read at random. A row tells all but the pixels, so that a pass over captions and
labels leaves the pictures unread. Sources pickle as their paths and open their files where they are used.
"""

from __future__ import annotations

import abc
import array
import base64
import contextlib
import dataclasses
import functools
import gzip
import json
import mmap
import os
import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxgen.data import cache as caching
from jaxgen.data import sources
from jaxgen.data.base import Progress
from jaxgen.data.images import SUFFIXES, BadImage, Picture
from jaxgen.data.sources import content_hashes, find_files, first_line, path_of, reading
from jaxgen.errors import UserError, nearest

TABLES = (".tsv", ".jsonl", ".ndjson")


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


def open_pictures(path: str, image: str = "image", images: str = "", cache: str | Path | None = None) -> Pictures:
    """The source that `path` names.

    - a folder: its pictures by path; columns `caption` (the text file of the same name beside a picture) and `label`
      (the folder that it lies in). A folder with one table in it is that table.
    - a table, `.tsv` with a header or `.jsonl`: a line is a picture; `image` is the column with the picture's path,
      relative to `images`, by default the table's folder, or a tar in it that begins the table's name.
    - `.tar` shards, one or by pattern, in the webdataset convention: members of one name are a sample; `.txt` is the
      column `caption`, `.cls` is `label`, the fields of `.json` are columns, and `image` may be the ending of the one
      picture of several. A tar with a table in it is that table, with the pictures beside it.
    - ArrayRecord of tf.train.Example or of JSON with the picture in base64, in the field `image`.
    - `tfds:NAME[/CONFIG][:VERSION][#SPLIT]`, with the picture in the feature `image`.
    - `.npz` with arrays of one length, or IDX (MNIST's form) with its labels beside it.
    - "" for drawn scenes of one object (`jaxgen.data.scenes`), with the columns `caption` and `label`.

    Args:
      cache: where indices of tar files are kept (default: the per-user cache).

    Raises:
      UserError: nothing is there, or it is damaged or of no known form.
    """
    if not path:
        return Drawn()
    if path.startswith("tfds:"):
        return TfdsPictures(path, image)
    files = find_files(path)
    place = caching.root(cache)

    def ending(*suffixes: str) -> list[tuple[str, str]]:
        return [(name, file) for name, file in files if name.lower().endswith(suffixes)]

    single = files[0][1] if len(files) == 1 else ""
    if packed := ending(".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip"):
        raise UserError(f"{packed[0][1]} is packed and cannot be read at random: unpack it to a .tar")
    if tars := ending(".tar"):
        tar = Tar(tuple(file for _, file in tars), image, place)
        table = tar.table
        return TarTable(table, image, tar) if table else tar
    if records := [(n, f) for n, f in files if ".array_record" in n.lower() or n.lower().endswith(".arrayrecord")]:
        return ArrayRecords(tuple(file for _, file in records), image)
    if single and ending(".npz", "-ubyte", "-ubyte.gz", ".idx", ".idx.gz"):
        return Arrays(single, image)
    tables = [(n, f) for n, f in ending(*TABLES, *(t + ".gz" for t in TABLES)) if "/" not in n]
    if len(tables) == 1:
        return _table(tables[0][1], image, images, place)
    if len(tables) > 1 and not ending(*SUFFIXES):
        raise UserError(f"{path} holds {len(tables)} tables of pictures: name one of them")
    if not ending(*SUFFIXES):
        raise UserError(f"no pictures in {path}" + (f", only {files[0][0]}" + (" and others" if files[1:] else "")))
    return Folder(path, tuple(ending(*SUFFIXES)), frozenset(file for _, file in ending(".txt")))


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _read(path: str) -> bytes:
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


# --- folders -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Folder(Pictures):
    """Pictures by (name, path), with captions and classes as `open_pictures` says."""

    path: str
    files: tuple[tuple[str, str], ...]
    captions: frozenset[str]

    def __len__(self) -> int:
        return len(self.files)

    def _caption(self, file: str) -> str:
        return file[: file.rindex(".")] + ".txt"

    def row(self, index: int) -> Row:
        name, file = self.files[index]
        columns: dict[str, Any] = {}
        if (caption := self._caption(file)) in self.captions:
            with reading(caption):
                text = _text(path_of(caption).read_bytes())
            columns["caption"] = text.strip() if isinstance(text, str) else text
        if "/" in name:
            columns["label"] = name.rsplit("/", 1)[0]
        return Row(name, columns)

    def image(self, index: int) -> bytes:
        return _read(self.files[index][1])

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        beside = [c for _, file in self.files if (c := self._caption(file)) in self.captions]
        hashes = content_hashes([file for _, file in self.files] + beside, cache, progress)
        return caching.key("folder", [(name, hashes[file], hashes.get(self._caption(file)))
                                      for name, file in self.files])


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
            _check_column(self.name, self.column, (self._json(i).columns for i in range(len(self.lines))))
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
        values = [_text(value) for value in self.lines[index + 1].split(b"\t")]
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


def no_column(where: str, column: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    return f"{where} no column '{column}', only {', '.join(columns) or 'none'}{nearest(column, columns)}"


def _check_column(where: str, column: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises UserError where none of the rows has the column, if there is any that has columns at all."""
    found: dict[str, None] = {}
    for columns in rows:
        if column in columns:
            return
        found |= dict.fromkeys(columns)
    if found:
        raise UserError(no_column(f"{where} has", column, found))


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
        return _read(str(path_of(self.images) / name))

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


def _table(path: str, image: str, images: str, cache: Path) -> Pictures:
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
                text = _text(self._content(member).strip())
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


# --- records -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ArrayRecords(Pictures):
    """ArrayRecord files; see `open_pictures`."""

    files: tuple[str, ...]
    column: str

    @functools.cached_property
    def _records(self) -> Any:
        import grain

        try:
            records = grain.sources.ArrayRecordDataSource(list(self.files))
            if not len(records):
                raise UserError(f"no pictures in {self.files[0]}")
            records[0]
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"{self.files[0]} is not an ArrayRecord file, or a damaged one ({first_line(e)})") from e
        return records

    def __len__(self) -> int:
        return len(self._records)

    def _fields(self, index: int) -> dict[str, Any]:
        try:
            data = self._records[index]
        except Exception as e:
            raise UserError(f"{self.files[0]} is damaged near record {index} ({first_line(e)})") from e
        try:
            return json.loads(data) if data[:1] == b"{" else example_fields(data)
        except (ValueError, struct.error, IndexError) as e:
            raise BadImage("it is neither JSON nor a tf.train.Example") from e

    @functools.cached_property
    def _checked(self) -> None:
        def fields(index: int) -> dict[str, Any]:
            try:
                return self._fields(index)
            except BadImage:
                return {}

        _check_column(self.files[0], self.column, map(fields, range(len(self))))

    def row(self, index: int) -> Row:
        try:
            fields = self._fields(index)
        except BadImage as e:
            return Row(str(index), problem=str(e))
        if self.column not in fields:
            self._checked  # noqa: B018 (raises where no record has it)
            return Row(str(index), problem=f"it has no field '{self.column}'")
        return Row(str(index), {name: _plain(value) for name, value in fields.items() if name != self.column})

    def image(self, index: int) -> bytes:
        value = self._fields(index).get(self.column)
        if isinstance(value, str):
            try:
                return base64.b64decode(value, validate=True)
            except ValueError as e:
                raise BadImage("it is not base64") from e
        if not isinstance(value, bytes):
            raise BadImage(f"its field '{self.column}' is no picture")
        return value

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        hashes = content_hashes(list(self.files), cache, progress)
        return caching.key("array_record", self.column, [hashes[file] for file in self.files])


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return _text(value) if isinstance(value, bytes) else value


def example_fields(data: bytes) -> dict[str, Any]:
    """The features of a serialized tf.train.Example: bytes, int, float, or a list of several.

    Example {1: Features {1: map entry {1: name, 2: Feature {1: bytes, 2: floats, 3: ints}}}}, in protobuf's wire form.
    """
    fields: dict[str, Any] = {}
    for _, features in _messages(data):
        for _, entry in _messages(features):
            parts = dict(_messages(entry))
            values: list[Any] = []
            for kind, packed in _messages(parts[2]) if 2 in parts else ():
                for number, value in _messages(packed):
                    if number != 1:
                        raise ValueError("unknown field")
                    values += _values(kind, value)
            fields[parts[1].decode()] = values[0] if len(values) == 1 else values
    if not fields:
        raise ValueError("no fields")
    return fields


def _values(kind: int, value: bytes | int) -> list[Any]:
    if kind == 1:
        return [value]
    if kind == 2:
        return list(struct.unpack(f"<{len(value) // 4}f", value))
    if isinstance(value, int):
        return [value - (value >> 63 << 64)]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number - (number >> 63 << 64))
    return numbers


def _messages(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, content) in protobuf's wire form."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
        else:
            if tag & 7 == 2:
                size, at = _varint(data, at)
            elif tag & 7 in (1, 5):
                size = 8 if tag & 7 == 1 else 4
            else:
                raise ValueError("no protobuf message")
            if at + size > len(data):
                raise ValueError("the message is cut off")
            value, at = data[at:at + size], at + size
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no protobuf message")


@dataclasses.dataclass(frozen=True)
class TfdsPictures(Pictures):
    """A data set of TFDS, read from ArrayRecord without TensorFlow; pictures come undecoded."""

    path: str
    column: str

    @functools.cached_property
    def _source(self) -> sources.Tfds:
        return sources.Tfds(self.path, self.column)

    @functools.cached_property
    def _records(self) -> Any:
        return self._source.undecoded()

    def __len__(self) -> int:
        return len(self._records)

    def row(self, index: int) -> Row:
        record = self._records[index]
        return Row(str(index), {name: _plain(value.item() if isinstance(value, np.generic) else value)
                                for name, value in record.items() if name != self.column})

    def image(self, index: int) -> bytes | Picture:
        return self._records[index][self.column]

    def classes(self, label: str) -> tuple[str, ...]:
        return tuple(getattr(self._source.features.get(label), "names", None) or ())

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        return self._source.fingerprint(cache, progress)


# --- arrays --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arrays(Pictures):
    """Pictures as one array, uint8 (N, H, W) or (N, H, W, C), in NPZ (with other columns) or IDX (with labels).

    Columns of an NPZ are its arrays of the same length, known with and without an `s` at the end (`labels`, `label`).
    """

    path: str
    column: str

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        with reading(self.path):
            found = self._npz() if self.path.endswith(".npz") else self._idx()
        column = next((name for name in (self.column, self.column + "s") if name in found), None)
        if column is None:
            raise UserError(no_column(f"{self.path} has", self.column, found))
        images = found.pop(column)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
            raise UserError(f"{self.path}: '{column}' is {images.dtype} of shape {images.shape}; pictures are uint8 of "
                            "shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
        if not len(images):
            raise UserError(f"no pictures in {self.path}")
        columns = {name: value for name, value in found.items() if value.ndim == 1 and len(value) == len(images)}
        singular = {name.removesuffix("s"): value for name, value in columns.items()}
        names = {"": found["names"]} if "names" in found and found["names"].ndim == 1 else {}
        return {**names, **singular, **columns, self.column: images if images.ndim == 4 else images[..., None]}

    def _npz(self) -> dict[str, np.ndarray]:
        import zipfile

        try:
            with np.load(path_of(self.path).open("rb"), allow_pickle=False) as file:
                return dict(file)
        except (ValueError, zipfile.BadZipFile, KeyError) as e:
            raise UserError(f"{self.path} is not an NPZ file, or a damaged one ({first_line(e)})") from e

    def _idx(self) -> dict[str, np.ndarray]:
        arrays = {self.column: read_idx(self.path)}
        if self._labels:
            arrays["label"] = read_idx(self._labels)
            if len(arrays["label"]) != len(arrays[self.column]):
                raise UserError(f"{self._labels} has {len(arrays['label'])} labels for {len(arrays[self.column])} "
                                "pictures")
        return arrays

    @property
    def _labels(self) -> str:
        """The file of the labels of an IDX file; "" where there is none."""
        path = "" if self.path.endswith(".npz") else idx_labels(self.path)
        return path if path and path_of(path).is_file() else ""

    def __len__(self) -> int:
        return len(self._arrays[self.column])

    def row(self, index: int) -> Row:
        return Row(str(index), {name: value[index].item() for name, value in self._arrays.items()
                                if name not in ("", self.column)})

    def image(self, index: int) -> Picture:
        return self._arrays[self.column][index]

    def classes(self, label: str) -> tuple[str, ...]:
        return tuple(map(str, self._arrays.get("", ())))

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        files = [self.path, *filter(None, [self._labels])]
        return caching.key("arrays", self.column, list(content_hashes(files, cache, progress).values()))


def idx_labels(path: str) -> str:
    """Where the labels of an IDX file of pictures lie, by its name (MNIST's form); "" where that does not tell."""
    folder, slash, name = path.rpartition("/")
    labels = name.replace("images", "labels").replace("idx3", "idx1")
    return folder + slash + labels if labels != name else ""


def read_idx(path: str) -> np.ndarray:
    """The array of an IDX file (MNIST's form), bytes only; `.gz` is unpacked.

    Raises:
      UserError: it is not there, damaged, or of another form.
    """
    with reading(path):
        data = path_of(path).read_bytes()
        data = gzip.decompress(data) if path.endswith(".gz") else data
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path} is not an IDX file of bytes")
    shape = struct.unpack(f">{data[3]}I", data[4:4 + 4 * data[3]])
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape))
    if len(values) != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path} is a damaged IDX file: {len(values)} values, not {' x '.join(map(str, shape))}")
    return values.reshape(shape)


# --- drawn ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Drawn(Pictures):
    """Scenes of one object, drawn as they are asked for: `caption` tells all, `label` the colour and the shape."""

    size: int = 64
    count: int = 4096

    def __len__(self) -> int:
        return self.count

    def _scene(self, index: int) -> Any:
        from jaxgen.data import scenes

        return scenes.sample(np.random.default_rng(index), level=1)

    def row(self, index: int) -> Row:
        from jaxgen.data import scenes

        facts = self._scene(index).facts
        return Row(f"scene {index}", {"caption": scenes.caption(facts), "label": facts.groups[0].name})

    def image(self, index: int) -> Picture:
        from jaxgen.data import scenes

        return scenes.render(self._scene(index), self.size)

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        from jaxgen.data import scenes

        return caching.key("drawn", scenes.VERSION, self.size, self.count)
