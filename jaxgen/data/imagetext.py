"""Pictures with captions, and pictures with labels, from any source that `jaxgen.data.pictures` knows."""

from __future__ import annotations

import abc
import array
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int, Int32
from PIL import Image

from jaxgen.data import cache as caching
from jaxgen.data.base import Data, Prepared, Progress
from jaxgen.data.batching import check_skipped, endless, fold, skipped
from jaxgen.data.buckets import Batches, Buckets, Shape, shapes
from jaxgen.data.captions import encode_captions
from jaxgen.data.images import MAX_PIXELS, BadImage, Picture, read, size_of
from jaxgen.data.pictures import open_pictures
from jaxgen.data.rows import Pictures, Row, Strings, StringsWriter, mapped_array, no_column
from jaxgen.data.sources import printable
from jaxgen.data.tokenizers import SentencePiece, Tokenizer, TokenizerConfig, load
from jaxgen.data.transforms import CenterCrop, Cover, Resize, Transform, apply, patchify, pillow
from jaxgen.data.transforms import array as pixels
from jaxgen.errors import UserError, nearest

if TYPE_CHECKING:
    import grain
    import jax

VERSION = 1  # counts up when the same input would give another index
TOKENS = 2  # the same for other tokens of an index
SIZES = 1  # and for other sizes of its pictures
ATTEMPTS = 100  # pictures tried in place of one that cannot be read
NAMED = 8  # of the rows that cannot be used, so many are told by name
PARTS = ("train", "heldout")

Example = dict[str, np.ndarray]


# --- from a file to an example -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """How a picture becomes what a model sees.

    Attributes:
      size: pixels of a side.
      channels: 3 for RGB, 1 for grey.
      fit: transforms to `size` x `size`, for a picture that is not trained on.
      background: behind what is transparent.
      patches: 0, or the number of patches of a picture that keeps its proportions.
      patch: pixels of a patch's side.
      max_pixels: a file of more is taken for a decompression bomb.
    """

    size: int
    channels: int = 3
    fit: tuple[Transform, ...] = ()
    background: tuple[int, int, int] = (255, 255, 255)
    patches: int = 0
    patch: int = 16
    max_pixels: int = MAX_PIXELS

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and type of what a call gives, by name."""
        if not self.patches:
            return {"image": ((self.size, self.size, self.channels), np.uint8)}
        return {"patches": ((self.patches, self.patch**2 * self.channels), np.uint8),
                "coordinates": ((self.patches, 2), np.int32), "patch_mask": ((self.patches,), np.bool_)}

    def __call__(self, data: bytes | Picture, augment: Sequence[Transform] = (),
                 rng: np.random.Generator | None = None, shape: Shape | None = None) -> Example:
        """`image`, or `patches`, `coordinates` and `patch_mask`.

        Args:
          data: a file's content, or the picture.
          augment: what comes before the fitting, with the randomness of `rng`.
          shape: (H, W) that the picture is brought to in the place of `size` x `size`; `augment` comes after that.

        Raises:
          BadImage: the data is no picture, or one that cannot be brought to the size.
        """
        rng = rng or np.random.default_rng(0)
        if shape:
            augment = (Cover(*shape), *augment)
        first = (augment or self._fit)[0] if augment or not self.patches else None
        image = read(data, self.background, self.max_pixels, first.least() if first else 0) \
            if isinstance(data, bytes) else pillow(data)
        image = apply(augment, image if image.mode == self._mode else image.convert(self._mode), rng)
        if self.patches:
            return dict(zip(("patches", "coordinates", "patch_mask"), patchify(image, self.patch, self.patches),
                            strict=True))
        if shape:
            _check_kept(image, shape)
            return {"image": pixels(image)}
        if not augment or image.size != (self.size, self.size):
            image = apply(self._fit, image, rng)
        if image.size != (self.size, self.size):
            raise UserError(f"data.fit gives a picture of {image.width} x {image.height} pixels, but data.size is "
                            f"{self.size}")
        return {"image": pixels(image)}

    @property
    def _mode(self) -> str:
        return "RGB" if self.channels == 3 else "L"

    @property
    def _fit(self) -> tuple[Transform, ...]:
        return self.fit or (Resize(self.size), CenterCrop(self.size))


def _check_kept(image: Image.Image, shape: Shape) -> None:
    if image.size != shape[::-1]:
        raise UserError(f"data.augment makes {image.height} x {image.width} pixels of {shape[0]} x {shape[1]}; with "
                        "data.aspect it comes after the picture has its shape, and must leave it that, as Flip does")


class Viewing(Prepared):
    """Prepared data that can turn other pictures into what its model sees."""

    view: View

    def example(self, data: bytes | Picture) -> Example:
        """What a model sees of a picture outside training: a batch's arrays of it, without the batch dimension.

        Raises:
          BadImage: `data` is no picture.
        """
        return self.view(data)

    def picture(self, data: bytes | Picture) -> Picture:
        """`example` of a picture of fixed size: uint8 (size, size, channels)."""
        if self.view.patches:
            raise UserError("pictures of this data keep their proportions and have no fixed size")
        return self.view(data)["image"]


class Captions(Viewing):
    """Prepared data with a tokenizer of captions.

    Attributes:
      length: tokens of a caption.
    """

    tokenizer: Tokenizer
    length: int

    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "N L"], Int32[np.ndarray, " N"]]:
        """Tokens and lengths of captions, as in a batch."""
        return encode_captions(self.tokenizer, texts, self.length)


# --- what an experiment names --------------------------------------------------------------------------------------


class _Kept:
    """Writes the rows of one part into an index, as they come."""

    def __init__(self, directory: Path, part: str):
        self.directory, self.part = directory, part
        self.rows, self.names = array.array("q"), StringsWriter(directory, f"{part}.names")

    def add(self, row: int, name: str, value: Any) -> None:
        """Takes the row of that number and name, with what `Images._read` gave of it."""
        self.rows.append(row)
        self.names.add(name)

    def close(self) -> None:
        self.save("rows", np.asarray(self.rows, np.int64))
        self.names.close()

    def save(self, name: str, values: np.ndarray) -> None:
        np.save(self.directory / f"{self.part}.{name}.npy", values)


@dataclasses.dataclass(frozen=True)
class Images(Data):
    """What pictures with captions and pictures with labels have in common.

    A batch has `image`, uint8 (B, size, size, channels); with `patches` instead `patches`, uint8 (B, patches, pixels),
    `coordinates`, int32 (B, patches, 2), and `patch_mask`, bool (B, patches). Held-out batches have `weights`, float32
    (B,): 0 where a picture cannot be read. In training such a picture is replaced by another.

    With `aspect` above 1 each training batch has one of the shapes of `table` in the place of size x size: each picture
    is resized to cover the shape nearest to its own, cut in the middle, and then augmented. Pictures of shapes that
    have fewer than a batch go to the nearest that has enough. Held-out pictures stay square.

    Attributes:
      path: a folder, a table (.tsv or .jsonl), tar shards, ArrayRecord, tfds:NAME, .npz, or IDX; "" draws scenes; see
        `jaxgen.data.pictures.open_pictures`.
      root: the folder that a relative path starts from.
      image: the column, field, array or (in tar shards) ending of the picture.
      images: where the pictures of a table are: a folder or a tar; "" for beside it.
      size: pixels of a side.
      channels: 3 for RGB, 1 for grey.
      augment: transforms of a picture in training; what is not of the size then is fitted.
      fit: transforms of all other pictures, to `size` x `size`; () resizes the shorter side and cuts out the middle.
      background: behind what is transparent.
      patches: 0, or the number of patches of pictures that keep their proportions (NaFlex).
      patch: pixels of such a patch's side.
      aspect: the most that one side of a picture may be of the other in training; 1 makes all square.
      aspect_step: of what sides are multiples then.
      heldout: fraction that is held out.
      heldout_by: "name" holds out by a hash of the picture's name, "tail" the last pictures.
      group_by: a column whose equal values stay on one side; "" for the name itself.
      group_match: a regular expression, whose match at the start of that value counts alone; "" for the whole.
      heldout_path: a source of its own for the held-out pictures, in place of the three above.
      max_bad: share of the pictures and captions that may be unusable; beyond it (and a handful) the run stops.
      max_pixels: a picture of more is taken for a decompression bomb.
      workers: reading processes; -1 for half the cores of a machine that has more than four, 0 for none.
    """

    path: str = ""
    root: str = ""
    image: str = "image"
    images: str = ""
    size: int = 64
    channels: Literal[1, 3] = 3
    augment: tuple[Transform, ...] = ()
    fit: tuple[Transform, ...] = ()
    background: tuple[int, int, int] = (255, 255, 255)
    patches: int = 0
    patch: int = 16
    aspect: float = 1.0
    aspect_step: int = 64
    heldout: float = 0.1
    heldout_by: Literal["name", "tail"] = "name"
    group_by: str = ""
    group_match: str = ""
    heldout_path: str = ""
    max_bad: float = 0.01
    max_pixels: int = MAX_PIXELS
    workers: int = -1

    _kept: ClassVar[type[_Kept]] = _Kept

    def __post_init__(self):
        for name, least in (("size", 1), ("patches", 0), ("patch", 1), ("max_pixels", 1), ("workers", -1),
                            ("aspect", 1), ("aspect_step", 1)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        for name, top in (("heldout", "less than 1"), ("max_bad", "1")):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "heldout" and value == 1):
                raise UserError(f"data.{name} is {value}; it is a fraction, from 0 to {top}")
        if self.channels not in (1, 3):
            raise UserError(f"data.channels is {self.channels}; it is 3 for colour or 1 for grey")
        if self.heldout_by not in ("name", "tail"):
            raise UserError(f"data.heldout_by is '{self.heldout_by}'; it is 'name' or 'tail'")
        if self.group_by and self.heldout_by == "tail":
            raise UserError("data.group_by goes with data.heldout_by 'name', not with 'tail'")
        try:
            re.compile(self.group_match)
        except re.error as error:
            raise UserError(f"data.group_match is {self.group_match!r}, no regular expression: {error}") from None
        if self.aspect > 1:
            self._check_aspect()

    def _check_aspect(self) -> None:
        if self.patches:
            raise UserError("data.patches keeps the proportions of pictures already; data.aspect is 1 with it")
        if self.size % self.aspect_step:
            raise UserError(f"data.size is {self.size}, which should be a multiple of data.aspect_step = "
                            f"{self.aspect_step} where data.aspect makes other shapes of it")
        if len(self.table) == 1:
            raise UserError(f"data.aspect = {self.aspect:g} has no shape but {self.size} x {self.size} in steps of "
                            f"data.aspect_step = {self.aspect_step}; give a larger aspect or a smaller step")
        for shape in self.table if self.augment else ():
            blank = Image.new("RGB" if self.channels == 3 else "L", shape[::-1])
            _check_kept(apply(self.augment, blank, np.random.default_rng(0)), shape)

    @functools.cached_property
    def table(self) -> tuple[Shape, ...]:
        """The (H, W) of training pictures, where they are not all square."""
        return shapes(self.size, self.aspect, self.aspect_step) if self.aspect > 1 else ()

    @property
    def view(self) -> View:
        return View(self.size, self.channels, self.fit, self.background, self.patches, self.patch, self.max_pixels)

    def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        import jax

        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
                for name, (shape, dtype) in (self.view.shapes() | self._shapes()).items()}

    def specs(self, batch_size: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        import jax

        square = self.spec(batch_size)
        others = [(batch_size, *shape, self.channels) for shape in self.table if shape != (self.size, self.size)]
        return [square, *(square | {"image": jax.ShapeDtypeStruct(shape, np.uint8)} for shape in others)]

    @abc.abstractmethod
    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and type of an example's arrays beside the picture."""

    @abc.abstractmethod
    def _read(self, row: Row) -> Any:
        """What the index keeps of a row; raises BadImage if it cannot be used."""

    def _needs(self) -> tuple[str, ...]:
        """Columns that every source must have."""
        return (self.group_by,) if self.group_by else ()

    def _numbering(self) -> tuple[str, ...]:
        """What else decides the index."""
        return ()

    def _in_root(self, path: str) -> str:
        if not (self.root and path) or path.startswith("tfds:"):
            return path
        return os.path.join(self.root, path)  # which leaves an absolute path as it is

    def _index(self, cache: Path, progress: Progress | None) -> Index:
        """The rows of both parts, found in `cache` or made there."""
        images = self._in_root(self.images)
        parts = {"train": open_pictures(self._in_root(self.path), self.image, images, cache)}
        if self.heldout_path:
            parts["heldout"] = open_pictures(self._in_root(self.heldout_path), self.image, images, cache)
        key = caching.key(VERSION, type(self).__name__, {n: s.fingerprint(cache, progress) for n, s in parts.items()},
                          self._needs(), self.heldout, self.heldout_by, *self._numbering(),
                          *([self.group_match] if self.group_match else ()))
        directory = caching.build(cache / "pictures" / key, lambda d: self._write(d, parts, progress))
        meta = json.loads((directory / "meta.json").read_text())
        check_skipped(meta["skipped"], meta["bad"], meta["total"], self.max_bad)
        return Index(directory, meta, parts["train"], parts.get("heldout", parts["train"]))

    def _write(self, directory: Path, sources: dict[str, Pictures], progress: Progress | None) -> None:
        bad: dict[str, str] = {}
        total = 0
        with contextlib.ExitStack() as stack:
            kept = {part: stack.enter_context(contextlib.closing(self._kept(directory, part))) for part in PARTS}
            for name, source in sources.items():
                size = len(source)
                for i, row, value in self._usable(source, self.heldout_path if name == "heldout" else self.path, bad,
                                                  progress):
                    if self.heldout_path or not self.heldout:
                        part = name
                    else:
                        group = row.columns.get(self.group_by) if self.group_by else None
                        if self.group_match and (found := re.match(self.group_match, str(group))):
                            group = found[0]
                        held = i >= round(size * (1 - self.heldout)) if self.heldout_by == "tail" else \
                            _held(row.name if group is None else str(group), self.heldout)
                        part = "heldout" if held else "train"
                    kept[part].add(i, printable(row.name), value)
                total += size
        counts, path = {part: len(rows.rows) for part, rows in kept.items()}, self.path or "the drawn scenes"
        if not counts["train"]:
            raise UserError(f"none of the {total} pictures of {path} can be used, for example "
                            f"{': '.join(next(iter(bad.items())))}" if not counts["heldout"] else
                            "all pictures are held out: give less to data.heldout, or hold out by 'tail'")
        if not counts["heldout"] and (self.heldout or self.heldout_path):
            raise UserError("there are no pictures in data.heldout_path" if self.heldout_path else
                            f"no picture of {counts['train']} fell into the held-out part ({self.heldout:g}); use "
                            "data.heldout_by 'tail', a larger data.heldout, or data.heldout_path")
        meta: dict[str, Any] = {"skipped": dict(list(bad.items())[:NAMED]), "bad": len(bad), "total": total,
                                "counts": counts}
        (directory / "meta.json").write_text(json.dumps(meta | self._finish(kept, sources)))

    def _usable(self, source: Pictures, path: str, bad: dict[str, str],
                progress: Progress | None) -> Iterator[tuple[int, Row, Any]]:
        size = len(source)
        missing, columns, whole = set(self._needs()), dict[str, None](), False
        for i in range(size):
            row = source.row(i)
            problem, value = row.problem, None
            if not problem:
                if missing:
                    missing -= row.columns.keys()
                    columns |= dict.fromkeys(row.columns)
                    whole = True
                try:
                    value = self._read(row)
                except BadImage as e:
                    problem = str(e)
            if problem:
                name = printable(row.name)
                bad[name if name not in bad else f"{name} (row {i})"] = problem
            else:
                yield i, row, value
            if progress and i % 4096 == 0:
                progress("indexing pictures", i, size)
        if missing and whole:
            raise UserError(no_column(f"the pictures of {path or 'the drawn scenes'} have", min(missing), columns))

    def _finish(self, kept: dict[str, Any], sources: dict[str, Pictures]) -> dict[str, Any]:
        """Writes what all rows together decide; what it returns goes into the index's meta data."""
        return {}

    def _fingerprint(self, index: Index, *more: Any) -> str:
        return caching.key(index.directory.name, repr(self.view), repr(self.augment), *more,
                           *([self.table] if self.table else ()))

    def _buckets(self, index: Index, cache: Path, progress: Progress | None) -> Buckets | None:
        """The shape of each training picture, by the sizes in their files, which are read once."""
        if not self.table:
            return None
        sizes = caching.build(cache / "sizes" / caching.key(SIZES, index.directory.name),
                              lambda directory: _write_sizes(directory, index, progress))
        return Buckets(self.table, sizes / "sizes.npy")

    def _facts(self, index: Index) -> dict[str, Any]:
        counts = index.meta["counts"]
        facts = {"source": printable(self._in_root(self.path)) or "drawn scenes", "pictures": counts["train"],
                 "heldout_pictures": counts["heldout"]}
        if index.meta["bad"]:
            facts["skipped"] = index.meta["bad"]
            facts["skipped_names"] = "; ".join(f"{name}: {why}" for name, why in index.meta["skipped"].items())
        return facts

    def _workers(self) -> int:
        cores = os.cpu_count() or 1
        return self.workers if self.workers >= 0 else min(cores // 2, 32) if cores > 4 else 0


def _held(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8], "big") < share * 2**64


@dataclasses.dataclass(frozen=True)
class Index:
    """Which rows of a source are used, and for what."""

    directory: Path
    meta: dict[str, Any]
    train: Pictures
    heldout: Pictures

    def load(self, part: str, name: str) -> np.ndarray:
        return mapped_array(self.directory / f"{part}.{name}.npy")

    def strings(self, part: str, name: str) -> Strings:
        return Strings(self.directory, f"{part}.{name}")


def _write_sizes(directory: Path, index: Index, progress: Progress | None) -> None:
    rows = index.load("train", "rows")
    sizes = np.ones((len(rows), 2), np.int32)  # what cannot be read counts as square; reading it tells
    for i, row in enumerate(rows):
        with contextlib.suppress(BadImage):
            found = index.train.image(int(row))
            sizes[i] = size_of(found) if isinstance(found, bytes) else found.shape[:2]
        if progress and i % 4096 == 0:
            progress("sizes of pictures", i, len(rows))
    np.save(directory / "sizes.npy", sizes)


# --- reading examples ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reader(abc.ABC):
    """Examples of one part, at random. Pickles as paths."""

    index: Index
    part: str
    view: View
    augment: tuple[Transform, ...]
    seed: int
    max_bad: float
    buckets: Buckets | None = None

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return self.index.load(self.part, "rows")

    @functools.cached_property
    def _names(self) -> Strings:
        return self.index.strings(self.part, "names")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._rows)

    @abc.abstractmethod
    def about(self, place: int, rng: np.random.Generator | None) -> Example:
        """All of an example but the picture."""

    def kinds(self, batch: int) -> Int[np.ndarray, " N"]:
        """Which shape of the table each picture is brought to in batches of this size."""
        if self.buckets.batch == batch:
            return self.buckets.kinds
        return dataclasses.replace(self.buckets, batch=batch).kinds

    def train(self, index: int, kind: int | None = None, among: Int[np.ndarray, " M"] | None = None) -> Example:
        """Example `index`, which counts on through the epochs; a function of it and the seed alone.

        Args:
          kind: the number of its shape in the table; without, it is square.
          among: the places of that shape, where it is one of several.
        """
        place = index % len(self)
        shape = None if kind is None else self.buckets.table[kind]
        told = ""
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([self.seed, index, attempt])
            if attempt:
                place = int(rng.integers(len(self)) if among is None else rng.choice(among))
            about = self.about(place, rng)
            try:
                seen = self.view(self._image(place), self.augment, rng, shape)
            except BadImage as e:
                told = f"{self._names[place]}: {e}"
                skipped(self._names[place], str(e), self.max_bad)
            else:
                return seen | about
        raise UserError(f"none of {ATTEMPTS} pictures can be read, for example {told}")

    def __getitem__(self, index: int) -> Example:
        """Example `index` of a pass through all, with its weight: 0 for a picture that cannot be read."""
        return self.plain(int(index))

    def plain(self, place: int, shape: Shape | None = None) -> Example:
        """The same, brought to a shape (H, W) in the place of the square."""
        try:
            seen, weight = self.view(self._image(place), shape=shape), 1
        except BadImage as e:
            skipped(self._names[place], str(e), self.max_bad)
            shapes = {"image": ((*shape, self.view.channels), np.uint8)} if shape else self.view.shapes()
            seen, weight = {name: np.zeros(size, dtype) for name, (size, dtype) in shapes.items()}, 0
        return seen | self.about(place, None) | {"weights": np.float32(weight)}

    def _image(self, place: int) -> bytes | Picture:
        return getattr(self.index, self.part).image(int(self._rows[place]))


def shuffled(examples: Any, seed: int) -> grain.MapDataset:
    """Examples of a `Reader`, or of what reads as it does, epoch after epoch."""
    single = endless(examples.train, len(examples), seed)
    if examples.buckets is None:
        return single
    from jaxgen.data.source import Bucketed

    return Bucketed(single, Batches(examples, fold(seed)))


@dataclasses.dataclass(frozen=True)
class _Bucketed:
    """Readers of a part with other buckets."""

    readers: Any
    buckets: Buckets

    def __call__(self, part: str, seed: int) -> Reader:
        reader = self.readers(part, seed)
        return dataclasses.replace(reader, buckets=self.buckets) if part == "train" else reader


class _Datasets(Viewing):
    """The two data sets of an index, by its readers."""

    readers: Any  # (part, seed) -> Reader

    def batched(self, size: int) -> Prepared:
        buckets = self.readers("train", 0).buckets
        if buckets is None:
            return self
        found, buckets = copy.copy(self), dataclasses.replace(buckets, batch=size)
        found.facts = self.facts | {"shapes": buckets.told()}
        found.readers = _Bucketed(self.readers, buckets)
        return found

    def train(self, seed: int) -> grain.MapDataset:
        return shuffled(self.readers("train", fold(seed)), seed)

    def heldout(self) -> grain.MapDataset:
        import grain

        return grain.MapDataset.source(self.readers("heldout", 0))

    def names(self, part: str) -> Sequence[str]:
        """The names of the pictures of a part ("train" or "heldout"), in order."""
        return self.readers(part, 0)._names


# --- captions ------------------------------------------------------------------------------------------------------


class _KeptCaptions(_Kept):
    def __init__(self, directory: Path, part: str):
        super().__init__(directory, part)
        self.captions, self.first = StringsWriter(directory, f"{part}.captions"), array.array("q", [0])

    def add(self, row: int, name: str, value: list[str]) -> None:
        super().add(row, name, value)
        for text in value:
            self.captions.add(text)
        self.first.append(len(self.captions))

    def close(self) -> None:
        super().close()
        self.captions.close()
        self.save("first", np.asarray(self.first, np.int64))


@dataclasses.dataclass(frozen=True)
class ImageText(Images):
    """Pictures with captions; to the batch of `Images` come `tokens`, int32 (B, length), and `lengths`, int32 (B,).

    Of several captions of one picture (a list), training draws one and the held-out part takes the first.

    Attributes:
      caption: the column of the caption, or of several.
      tokenizer: Bytes, Characters or SentencePiece.
      length: tokens in a caption, its end included; longer ones are cut.
    """

    caption: str = "caption"
    tokenizer: TokenizerConfig = SentencePiece()
    length: int = 64

    _kept: ClassVar[type[_Kept]] = _KeptCaptions

    def __post_init__(self):
        super().__post_init__()
        if self.length < 2:
            raise UserError(f"data.length is {self.length}; it must be at least 2")

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        return {"tokens": ((self.length,), np.int32), "lengths": ((), np.int32)}

    def _needs(self) -> tuple[str, ...]:
        return (*super()._needs(), self.caption)

    def _read(self, row: Row) -> list[str]:
        if self.caption not in row.columns:
            raise BadImage("it has no caption")
        value = row.columns[self.caption]
        captions, problem = [], "it has no caption"
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, bytes):
                problem = "its caption is not UTF-8"
            elif not isinstance(text, str):
                problem = f"its caption is not text but {type(text).__name__}"
            elif not text.strip():
                problem = "its caption is empty"
            else:
                captions.append(text.encode(errors="replace").decode())  # JSON may hold lone surrogates
        if not captions:
            raise BadImage(problem)
        return captions

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedImageText:
        place = caching.root(cache)
        index = self._index(place, progress)
        key = caching.key(index.directory.name, type(self.tokenizer).__name__, dataclasses.asdict(self.tokenizer))
        tokenizer = self.tokenizer.fit(()) if not self.tokenizer.trained else load(caching.build(
            place / "tokenizers" / key,
            lambda directory: self.tokenizer.fit(index.strings("train", "captions")).save(directory)))
        tokens = caching.build(
            place / "captions" / caching.key(TOKENS, index.directory.name, tokenizer.fingerprint, self.length),
            lambda directory: _tokenize(directory, index, tokenizer, self.length, progress))
        return PreparedImageText(self, index, tokenizer, tokens, self._buckets(index, place, progress))


def _tokenize(directory: Path, index: Index, tokenizer: Tokenizer, length: int, progress: Progress | None) -> None:
    cut = dict.fromkeys(PARTS, 0)
    for part in PARTS:
        captions = index.strings(part, "captions")
        lengths = np.empty(len(captions), np.int32)
        with (directory / f"{part}.tokens.npy").open("wb") as f:
            np.lib.format.write_array_header_1_0(f, {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False,
                "shape": (len(captions), length)})
            for first in range(0, len(captions), 4096):
                texts = captions[first:first + 4096]
                # One place more shows which are too long.
                wide, long = encode_captions(tokenizer, texts, length + 1)
                cut[part] += int((long > length).sum())
                wide[long > length, length - 1] = tokenizer.eos
                f.write(wide[:, :length].tobytes())
                lengths[first:first + len(texts)] = np.minimum(long, length)
                if progress:
                    progress("tokenizing captions", first, len(captions))
        np.save(directory / f"{part}.lengths.npy", lengths)
    (directory / "cut.json").write_text(json.dumps(cut))


@dataclasses.dataclass(frozen=True)
class _CaptionReader(Reader):
    tokens: Path = Path()

    @functools.cached_property
    def _captions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = dataclasses.replace(self.index, directory=self.tokens)
        return at.load(self.part, "tokens"), at.load(self.part, "lengths"), self.index.load(self.part, "first")

    def about(self, place: int, rng: np.random.Generator | None) -> Example:
        tokens, lengths, first = self._captions
        k, end = int(first[place]), int(first[place + 1])
        if rng is not None and end - k > 1:
            k += int(rng.integers(end - k))
        return {"tokens": np.array(tokens[k]), "lengths": lengths[k]}


class PreparedImageText(_Datasets, Captions):
    """See `Prepared` and `Captions`."""

    def __init__(self, data: ImageText, index: Index, tokenizer: Tokenizer, tokens: Path,
                 buckets: Buckets | None = None):
        self._index = index
        self.view, self.tokenizer, self.length, self.workers = data.view, tokenizer, data.length, data._workers()
        self.fingerprint = data._fingerprint(index, tokenizer.fingerprint, data.length)
        cut = json.loads((tokens / "cut.json").read_text())
        self.facts = data._facts(index) | {"vocabulary": tokenizer.vocab_size,
                                           "captions": len(index.strings("train", "captions"))}
        if cut["train"] + cut["heldout"]:
            self.facts |= {"captions_cut": cut["train"], "heldout_captions_cut": cut["heldout"]}
        self.readers = lambda part, seed: _CaptionReader(
            index, part, data.view, data.augment, seed, data.max_bad, buckets if part == "train" else None, tokens)

    def captions(self, part: str) -> list[list[str]]:
        """All captions of each picture of a part ("train" or "heldout"), in order."""
        texts, first = self._index.strings(part, "captions"), self._index.load(part, "first")
        return [texts[first[i]:first[i + 1]] for i in range(len(first) - 1)]


# --- labels --------------------------------------------------------------------------------------------------------


class _KeptLabels(_Kept):
    def __init__(self, directory: Path, part: str):
        super().__init__(directory, part)
        self.places: dict[int | str, int] = {}  # of the different labels, as they were first seen
        self.labels = array.array("q")

    def add(self, row: int, name: str, value: int | str) -> None:
        super().add(row, name, value)
        self.labels.append(self.places.setdefault(value, len(self.places)))


def number_labels(labels: Set[int | str], known: tuple[str, ...]) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Names of the classes, and the number of each label: numbers stand as they are, names in alphabetical order.

    Args:
      known: names of the numbers 0, 1, ..., where the source has them.
    """
    if all(isinstance(label, int) or label.isdecimal() for label in labels):
        top = max(map(int, labels))
        classes = known if len(known) > top else tuple(map(str, range(top + 1)))
        return classes, {label: int(label) for label in labels}
    classes = tuple(sorted(map(str, labels)))
    number = {name: k for k, name in enumerate(classes)}
    return classes, {label: number[str(label)] for label in labels}


@dataclasses.dataclass(frozen=True)
class LabelledImages(Images):
    """Pictures with labels; to the batch of `Images` comes `label`, int32 (B,).

    Labels are numbers 0, 1, ... as they stand, or names, which are numbered in alphabetical order.

    Attributes:
      label: the column of the label; for a folder, the folder that a picture lies in.
      classes: the names of the labels 0, 1, ..., so that other data with only some of them numbers them alike; () goes
        by what is there.
    """

    label: str = "label"
    classes: tuple[str, ...] = ()

    _kept: ClassVar[type[_Kept]] = _KeptLabels

    def __post_init__(self):
        super().__post_init__()
        if twice := [name for k, name in enumerate(self.classes) if name in self.classes[:k]]:
            raise UserError(f"data.classes has '{twice[0]}' twice")

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        return {"label": ((), np.int32)}

    def _needs(self) -> tuple[str, ...]:
        return (*super()._needs(), self.label)

    def _numbering(self) -> tuple[str, ...]:
        return self.classes

    def _read(self, row: Row) -> int | str:
        value = row.columns.get(self.label)
        if value is None or value == "":
            raise BadImage("it has no label")
        if isinstance(value, bytes):
            raise BadImage("its label is not UTF-8")
        if not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
            raise BadImage(f"its label is {value!r}, neither a name nor a number from 0 on")
        return printable(value) if isinstance(value, str) else value

    def _finish(self, kept: dict[str, Any], sources: dict[str, Pictures]) -> dict[str, Any]:
        found = {value for part in kept.values() for value in part.places}
        if self.classes:
            classes, of = self.classes, self._named(found)
        else:
            classes, of = number_labels(found, sources["train"].classes(self.label))
        if unseen := sorted({of[v] for v in kept["heldout"].places} - {of[v] for v in kept["train"].places}):
            raise UserError(f"the class '{classes[unseen[0]]}' is in the held-out part alone")
        for part in kept.values():
            part.save("labels", np.asarray([of[v] for v in part.places], np.int32)[np.asarray(part.labels, np.int64)])
        return {"classes": list(classes)}

    def _named(self, labels: Iterable[int | str]) -> dict[int | str, int]:
        """The number of each label in `classes`: by name, or as it stands, if none of the names is a number."""
        places = {name: k for k, name in enumerate(self.classes)}
        if not any(map(str.isdecimal, self.classes)):
            places |= {str(k): k for k in range(len(self.classes))}
        if foreign := sorted({str(label) for label in labels} - places.keys()):
            raise UserError(f"the label '{foreign[0]}' of {self.path} is not among the {len(self.classes)} of "
                            f"data.classes{nearest(foreign[0], self.classes)}")
        return {label: places[str(label)] for label in labels}

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedLabelledImages:
        place = caching.root(cache)
        index = self._index(place, progress)
        return PreparedLabelledImages(self, index, self._buckets(index, place, progress))


@dataclasses.dataclass(frozen=True)
class _LabelReader(Reader):
    @functools.cached_property
    def _labels(self) -> np.ndarray:
        return self.index.load(self.part, "labels")

    def about(self, place: int, rng: np.random.Generator | None) -> Example:
        return {"label": self._labels[place]}


class PreparedLabelledImages(_Datasets):
    """See `Prepared`.

    Attributes:
      classes: names of the labels.
    """

    def __init__(self, data: LabelledImages, index: Index, buckets: Buckets | None = None):
        self.view, self.workers = data.view, data._workers()
        self.classes: tuple[str, ...] = tuple(index.meta["classes"])
        self.fingerprint = data._fingerprint(index)
        self.facts = data._facts(index) | {"classes": len(self.classes)}
        self.readers = lambda part, seed: _LabelReader(
            index, part, data.view, data.augment, seed, data.max_bad, buckets if part == "train" else None)
