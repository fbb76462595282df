"""Pictures in ArrayRecord files, those of TFDS among them."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data import cache as caching
from jaxgen.data import sources
from jaxgen.data.base import Progress
from jaxgen.data.images import BadImage, Picture
from jaxgen.data.rows import Pictures, Row, check_column, text_of
from jaxgen.data.sources import content_hashes, first_line
from jaxgen.errors import UserError


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
        except (ValueError, struct.error, IndexError, KeyError, TypeError) as e:  # bytes of anything else give any
            raise BadImage("it is neither JSON nor a tf.train.Example") from e

    @functools.cached_property
    def _checked(self) -> None:
        def fields(index: int) -> dict[str, Any]:
            try:
                return self._fields(index)
            except BadImage:
                return {}

        check_column(self.files[0], self.column, map(fields, range(len(self))))

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
    return text_of(value) if isinstance(value, bytes) else value


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
