"""Where documents come from: text, JSON lines, ArrayRecord, TFDS, and the documentation that Python brings along."""

from __future__ import annotations

import abc
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import os
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from jaxgen.data import cache as caching
from jaxgen.data.base import Progress
from jaxgen.errors import UserError, nearest
from jaxgen.files import write_whole

PIECE = 1 << 20  # bytes: a plain text file longer than this comes in several pieces


@dataclasses.dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
      name: the document's name, by which it is held out or not.
      text: its text.
      last: whether the document ends here.
    """

    name: str
    text: str
    last: bool = True


class Source(abc.ABC):
    """Named documents in a fixed order, read as a stream as often as needed, with bounded memory."""

    deduplicate: ClassVar[bool] = False  # whether held-out documents are compared with the training part

    @abc.abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All documents, in order."""

    @abc.abstractmethod
    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        """Hash of the content; `cache` remembers those of files that have not changed."""

    @property
    def size(self) -> int:
        """Bytes on disk, 0 where that is not known."""
        return 0


def open_source(path: str, field: str = "text") -> Source:
    """The source that `path` names.

    Args:
      path: a file, a folder, a pattern with `*`, the same under gs://, `tfds:NAME[/CONFIG][:VERSION][#SPLIT]`, or ""
        for Python's documentation and standard library.
      field: the field that holds the text in JSON lines, ArrayRecord and TFDS.

    Raises:
      UserError: nothing is there.
    """
    if not path:
        return PythonLibrary()
    if path.startswith("tfds:"):
        return Tfds(path, field)
    return Files(path, tuple(find_files(path)), field)


# --- files ---------------------------------------------------------------------------------------------------------


def path_of(path: str) -> Any:
    """A local Path, or an etils path for gs:// and its like (the same methods)."""
    if "://" not in path:
        return Path(path).expanduser()
    from etils import epath

    return epath.Path(path)


def find_files(path: str) -> list[tuple[str, str]]:
    """(document name, path) of every file that `path` names, sorted by name."""
    remote = "://" in path
    with reading(path):
        base = path_of(path)
        if base.is_dir():
            found = [p for p in base.rglob("*") if p.is_file()]
        elif base.is_file():
            return [(base.name, str(base))]
        elif glob.has_magic(path):
            parts = base.parts
            fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            base = path_of(str(type(base)(*parts[:fixed]))) if fixed else path_of(".")
            found = [p for p in base.glob("/".join(parts[fixed:])) if p.is_file()]
        else:
            # The nearest name in the folder, if the folder at least is there.
            names = [] if remote or not base.parent.is_dir() else [p.name for p in base.parent.iterdir()]
            raise UserError(f"no data at {path}{nearest(base.name, names)}")
        named = [(p.relative_to(base).as_posix(), str(p)) for p in found]
    named = sorted((n, p) for n, p in named if not any(part.startswith(".") for part in n.split("/")))
    if not named:
        raise UserError(f"no files in {path}" if base == path_of(path) else f"no files match {path}")
    return named


class reading:  # noqa: N801 (reads as a verb: `with reading(path)`)
    """Turns what reading a file may raise into a sentence that names it."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        path = self.path
        if isinstance(error, UserError) or error is None:
            return
        if isinstance(error, ImportError) and "://" in path:
            raise UserError(f"reading {path} needs Google Cloud Storage support: pip install 'jaxgen[gcs]'"
                            if path.startswith("gs://") else f"reading {path}: {error}") from error
        if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
            raise UserError(f"{path} is a damaged or unfinished gzip file ({error})") from error
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{path} is not UTF-8 text ({error.reason} near byte {error.start}); "
                            "name text files alone, for example with a pattern such as 'folder/*.txt'") from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} is not there any more") from error
        if isinstance(error, OSError):
            raise UserError(f"cannot read {path} ({error.strerror or error})") from error


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Text (a document a file), JSON lines (a document a line) and ArrayRecord (a document a record), by file name.

    `.jsonl`, `.ndjson` and `.json` are JSON lines, `.array_record` and `.arrayrecord` are ArrayRecord, all else is
    text; `.gz` after a text or JSON name is unpacked.
    """

    path: str
    files: tuple[tuple[str, str], ...]
    field: str = "text"

    def pieces(self) -> Iterator[Piece]:
        for name, path in self.files:
            yield from _reader(path)(name, path, self.field, len(self.files) > 1)

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        hashes = content_hashes([path for _, path in self.files], cache, progress)
        # The folder's own name does not count, nor that of a single file: a copy elsewhere is the same data.
        named = len(self.files) > 1
        return caching.key(self.field, [(n if named else "", _reader(p).__name__, hashes[p]) for n, p in self.files])

    @functools.cached_property
    def size(self) -> int:
        with reading(self.path):
            return sum(size_of(path_of(path)) for _, path in self.files)


def size_of(path: Any) -> int:
    stat = path.stat()
    return stat.st_size if hasattr(stat, "st_size") else stat.length


def _reader(path: str) -> Callable[[str, str, str, bool], Iterator[Piece]]:
    name = path.rsplit("/", 1)[-1].lower()
    if ".array_record" in name or name.endswith(".arrayrecord"):
        return _array_record
    if name.removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json")):
        return _json_lines
    return _text


def _open(path: str) -> Any:
    file = path_of(path).open("rb")
    return gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file


def _text(name: str, path: str, field: str, several: bool) -> Iterator[Piece]:
    with reading(path), _open(path) as f:
        position, rest = 0, b""
        while True:
            block = f.read(PIECE)
            held = rest + block
            # Cut after a line where there is one, else before an unfinished character.
            cut = len(held) if len(block) < PIECE else held.rfind(b"\n") + 1 or _whole_characters(held)
            try:
                text = held[:cut].decode()
            except UnicodeDecodeError as e:
                raise UnicodeDecodeError(e.encoding, e.object, position + e.start, position + e.end, e.reason) from e
            rest, position = held[cut:], position + cut
            yield Piece(name, text, last=len(block) < PIECE)
            if len(block) < PIECE:
                return


def _whole_characters(data: bytes) -> int:
    """Length of `data` without a UTF-8 character that is cut off at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # a character starts here
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
    return len(data)


def _json_lines(name: str, path: str, field: str, several: bool) -> Iterator[Piece]:
    prefix = f"{name}:" if several else ""
    with reading(path), _open(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield Piece(f"{prefix}{number}", _field(line, field, f"{path}, line {number}", must_be_json=True))


def _array_record(name: str, path: str, field: str, several: bool) -> Iterator[Piece]:
    from array_record.python.array_record_module import ArrayRecordReader

    prefix = f"{name}:" if several else ""
    with reading(path):
        try:
            reader = ArrayRecordReader(str(path_of(path)))
            total = reader.num_records()
            if not total:
                reader.close()  # only now it tells a damaged file from an empty one
        except Exception as e:
            raise UserError(f"{path} is not an ArrayRecord file, or a damaged one ({first_line(e)})") from e
        for start in range(0, total, 256):
            try:
                records = reader.read(start, min(start + 256, total))
            except Exception as e:
                raise UserError(f"{path} is damaged near record {start} ({first_line(e)})") from e
            for number, record in enumerate(records, start):
                where = f"{path}, record {number}"
                yield Piece(f"{prefix}{number}", _field(record, field, where, must_be_json=False))


def printable(name: str) -> str:
    """A name that UTF-8 can hold: of file names in other encodings, and of JSON, lone surrogates are spelled out."""
    return name.encode(errors="backslashreplace").decode()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _field(record: bytes, field: str, where: str, must_be_json: bool) -> str:
    """The text of a record: the named field of a JSON object, or (ArrayRecord) the record itself."""
    if must_be_json or record[:1] == b"{":
        try:
            value = json.loads(record)
        except UnicodeDecodeError as e:
            raise UserError(f"{where} is not UTF-8 text") from e
        except ValueError as e:
            if must_be_json:
                raise UserError(f"{where} is not valid JSON ({e})") from e
        else:
            if not isinstance(value, dict):
                raise UserError(f"{where} is not a JSON object but {type(value).__name__}")
            if field not in value:
                raise UserError(f"{where} has no field '{field}', only {', '.join(sorted(value)) or 'none'}"
                                + nearest(field, value))
            if not isinstance(value[field], str):
                raise UserError(f"{where}: the field '{field}' is not text but {type(value[field]).__name__}")
            return value[field].encode(errors="replace").decode()  # JSON may hold lone surrogates, UTF-8 may not
    try:
        return record.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{where} is neither JSON nor UTF-8 text") from e


# --- content hashes ------------------------------------------------------------------------------------------------


def content_hashes(paths: list[str], cache: Path, progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 of each local file, remembered by size and modification time; name, size and time of remote ones."""
    memo_file = cache / "hashes" / f"{caching.key(sorted(map(os.path.abspath, paths)))}.json"
    try:
        memo = json.loads(memo_file.read_text())
    except (OSError, ValueError):
        memo = {}
    hashes, remembered, now = {}, {}, time.time_ns()
    for path in paths:
        with reading(path):
            if "://" in path:
                stat = path_of(path).stat()
                hashes[path] = caching.key(path, getattr(stat, "length", None), str(getattr(stat, "mtime", "")))
                continue
            stat = os.stat(Path(path).expanduser())
            seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            known = memo.get(path)
            if known and known[:3] == seen:
                hashes[path] = known[3]
            else:
                hashes[path] = _digest(Path(path).expanduser(), stat.st_size, progress)
            if now - stat.st_mtime_ns > 2e9:  # a file written this very second may change within its time stamp
                remembered[path] = [*seen, hashes[path]]
    if remembered != memo and remembered:
        with caching.explained(memo_file):
            memo_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memo_file, json.dumps(remembered))
    return hashes


def _digest(path: Path, size: int, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(8 * PIECE):
            digest.update(block)
            if progress and size > 64 * PIECE:
                progress(f"hashing {printable(path.name)}", f.tell(), size)
    return digest.hexdigest()


# --- TFDS ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
    """`tfds:NAME`, `tfds:NAME/CONFIG:VERSION`, `...#SPLIT` (default: train), read from ArrayRecord, no TensorFlow."""

    path: str
    field: str = "text"

    @functools.cached_property
    def _split(self) -> tuple[str, str]:
        name, _, split = self.path.removeprefix("tfds:").partition("#")
        name, _, version = name.partition(":")
        numbers = version.split(".")  # TFDS knows 1.0.0 and 1.0.*, but not 1.0
        version = ".".join(numbers + ["*"] * (3 - len(numbers))) if version else ""
        return f"{name}:{version}" if version else name, split or "train"

    @functools.cached_property
    def _builder(self) -> Any:
        try:
            import tensorflow_datasets as tfds
        except ImportError as e:
            raise UserError(f"{self.path} needs TensorFlow Datasets: pip install 'jaxgen[tfds]'") from e
        name, split = self._split
        try:
            builder = tfds.builder(name, file_format="array_record")
            if not builder.info.splits:
                builder.download_and_prepare()
        except ImportError as e:
            raise UserError(f"{self.path} needs a package that is not here ({first_line(e)}): "
                            "pip install 'jaxgen[tfds]'") from e
        except Exception as e:
            raise UserError(f"TFDS cannot give {name} ({type(e).__name__}: {first_line(e)})") from e
        if split.split("[")[0] not in builder.info.splits:
            raise UserError(f"{self.path}: no split '{split}', only {', '.join(sorted(builder.info.splits))}"
                            + nearest(split, builder.info.splits))
        return builder

    @functools.cached_property
    def _records(self) -> Any:
        return self._builder.as_data_source(split=self._split[1])

    @functools.cached_property
    def features(self) -> dict[str, Any]:
        """TFDS's own description of each field; the one named `field` is there."""
        features = self._builder.info.features
        if self.field not in features:
            raise UserError(f"{self.path} has no field '{self.field}', only {', '.join(features)}"
                            + nearest(self.field, features))
        return dict(features.items())

    def undecoded(self) -> Any:
        """Records at random, with what is in `field` as the file that it was, where it is a picture."""
        from tensorflow_datasets import decode
        from tensorflow_datasets.core.features import Image

        decoders = {self.field: decode.SkipDecoding()} if isinstance(self.features[self.field], Image) else None
        return self._builder.as_data_source(split=self._split[1], decoders=decoders)

    def pieces(self) -> Iterator[Piece]:
        self.features  # noqa: B018 (raises where there is no such field)
        for number in range(len(self._records)):
            value = self._records[number][self.field]
            if not isinstance(value, (bytes, str)):
                raise UserError(f"{self.path}: the field '{self.field}' is not text but {type(value).__name__}")
            yield Piece(str(number), value if isinstance(value, str) else value.decode(errors="replace"))

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        info = self._builder.info
        return caching.key("tfds", info.full_name, self._split, self.field,
                           [(n, list(s.shard_lengths), s.num_bytes) for n, s in sorted(info.splits.items())])

    @property
    def size(self) -> int:
        return self._builder.info.splits[self._split[1].split("[")[0]].num_bytes


# --- Python's own documentation ------------------------------------------------------------------------------------

# Tests, other people's packages, and modules that are mostly tables or generated.
_NO_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3",
            "encodings", "turtledemo", "ensurepip", "pydoc_data", "lib-dynload", "__phello__", "_pyrepl",
            "html/entities.py", "re/_casefix.py", "stringprep.py", "sre_constants.py", "this.py", "antigravity.py",
            "__hello__.py"}
_NO_PREFIX = ("config-", "_sysconfigdata", "_sysconfig_vars")


@dataclasses.dataclass(frozen=True)
class PythonLibrary(Source):
    """The topics of Python's help system and the source of its standard library: real text on every machine.

    Many topics are parts of others, and modules share code, so held-out documents are compared with the training part.
    """

    deduplicate: ClassVar[bool] = True

    @functools.cached_property
    def _files(self) -> list[tuple[str, str]]:
        base = Path(sysconfig.get_path("stdlib"))
        files = []
        for folder, folders, names in os.walk(base):
            folders[:] = sorted(d for d in folders if d not in _NO_TEXT and not d.startswith(_NO_PREFIX))
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(base).as_posix()
                if name.endswith(".py") and relative not in _NO_TEXT and not name.startswith(_NO_PREFIX):
                    files.append((f"library/{relative}", str(path)))
        if not files:
            raise UserError(f"this Python has no source of its standard library in {base}; "
                            "install it, or name a text with data.path")
        return sorted(files)

    @functools.cached_property
    def _topics(self) -> dict[str, str]:
        try:
            from pydoc_data.topics import topics
        except ImportError:  # some distributions leave it out
            return {}
        return dict(sorted(topics.items()))

    def pieces(self) -> Iterator[Piece]:
        for name, text in self._topics.items():
            yield Piece(f"topics/{name}", text)
        for name, path in self._files:
            yield from _text(name, path, "", True)

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        hashes = content_hashes([path for _, path in self._files], cache, progress)
        return caching.key("python", self._topics, [(n, hashes[p]) for n, p in self._files])

    @functools.cached_property
    def size(self) -> int:
        return sum(map(len, self._topics.values())) + sum(os.path.getsize(p) for _, p in self._files)
