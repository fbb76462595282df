"""Where pictures come from: folders, tables, tar shards, ArrayRecord, TFDS, and arrays in NPZ or IDX files.

A source is a row of named pictures, read at random. A row tells all but the pixels, so that a pass over captions and
labels leaves the pictures unread. Sources pickle as their paths and open their files where they are used.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data import cache as caching
from jaxgen.data.array_records import ArrayRecords, TfdsPictures
from jaxgen.data.base import Progress
from jaxgen.data.images import SUFFIXES, Picture
from jaxgen.data.rows import Pictures, Row, no_column, read_file, text_of
from jaxgen.data.sources import content_hashes, find_files, first_line, path_of, reading
from jaxgen.data.tars import TABLES, Tar, TarTable, open_table
from jaxgen.errors import UserError


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
        return open_table(tables[0][1], image, images, place)
    if len(tables) > 1 and not ending(*SUFFIXES):
        raise UserError(f"{path} holds {len(tables)} tables of pictures: name one of them")
    if not ending(*SUFFIXES):
        raise UserError(f"no pictures in {path}" + (f", only {files[0][0]}" + (" and others" if files[1:] else "")))
    return Folder(path, tuple(ending(*SUFFIXES)), frozenset(file for _, file in ending(".txt")))


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
                text = text_of(path_of(caption).read_bytes())
            columns["caption"] = text.strip() if isinstance(text, str) else text
        if "/" in name:
            columns["label"] = name.rsplit("/", 1)[0]
        return Row(name, columns)

    def image(self, index: int) -> bytes:
        return read_file(self.files[index][1])

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        beside = [c for _, file in self.files if (c := self._caption(file)) in self.captions]
        hashes = content_hashes([file for _, file in self.files] + beside, cache, progress)
        return caching.key("folder", [(name, hashes[file], hashes.get(self._caption(file)))
                                      for name, file in self.files])


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
