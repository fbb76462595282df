"""The manifest of a saved step: what it holds, and the size and CRC-32 of each of its files.

A manifest is written after everything it lists, so that a folder with a sound manifest is whole; and it carries a
checksum of itself, so that a flipped bit anywhere in the folder, the manifest included, is found.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from jaxgen.files import write_whole

NAME = "manifest.json"
_BLOCK = 16 << 20   # bytes read at a time


class Damaged(Exception):
    """What is wrong with a folder, as the end of a sentence."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    step: the training step (-1: not a step). metrics: by name; None is a value that was not finite.
    leaves: name -> {"shape": [...], "dtype": "float32"}. files: name -> {"size": bytes, "crc32": 8 hex digits}.
    """

    step: int
    metrics: dict[str, float | None]
    leaves: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest, and through it of every file: names exactly these bytes."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        return json.dumps({"checksum": self.checksum, **dataclasses.asdict(self)}, indent=1, sort_keys=True) + "\n"


def write(folder: epath.Path, step: int, metrics: dict, leaves: dict) -> Manifest:
    """Read back all files of `folder` and write their manifest, whole or not at all."""
    files = {name: {"size": size, "crc32": crc32(folder / name)} for name, size in sorted(listing(folder))}
    manifest = Manifest(step, metrics, leaves, files)
    path = folder / NAME
    if "://" in os.fspath(path):   # object stores: a file appears whole when it is closed
        path.write_text(manifest.text())
        return manifest
    write_whole(path, manifest.text(), sync=True)
    return manifest


def read(folder: epath.Path) -> Manifest:
    """The manifest of `folder`. Damaged: there is none, or it is not what was written."""
    try:
        text = (folder / NAME).read_bytes()
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME} (a save that was cut off, or the file was deleted)") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read ({error})") from None
    try:
        content = json.loads(text)
        content.pop("checksum")
        manifest = Manifest(**content)
        sound = manifest.text().encode() == text
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise Damaged(f"{NAME} does not match its own checksum")
    return manifest


def listed(folder: epath.Path, manifest: Manifest) -> set[str]:
    """The files of a folder: those there, and those that should be."""
    return {name for name, _ in listing(folder)} | set(manifest.files)


def check(folder: epath.Path, manifest: Manifest, wanted: Collection[str] | None = None) -> None:
    """Damaged, with the first of the `wanted` files (None: all) that is missing, of another size, or none of its own.

    Reads no content.
    """
    found = dict(listing(folder))
    for name in sorted({*found, *manifest.files} if wanted is None else wanted):
        if name not in found:
            raise Damaged(f"{name} is missing")
        if name not in manifest.files:
            raise Damaged(f"{name} does not belong to it")
        if found[name] != manifest.files[name]["size"]:
            raise Damaged(f"{name} has {found[name]} bytes instead of {manifest.files[name]['size']}")


def verify(folder: epath.Path, manifest: Manifest, wanted: Collection[str]) -> None:
    """Damaged, with the first of the `wanted` files whose content is not what was written. Reads them in parallel."""

    def sound(name: str) -> bool:
        try:
            return crc32(folder / name) == manifest.files[name]["crc32"]
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error})") from None

    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for name, good in zip(wanted, pool.map(sound, wanted), strict=True):
            if not good:
                raise Damaged(f"the content of {name} is not what was written")


def crc32(path: epath.Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def listing(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(name relative to `folder`, bytes) of each file below it, but the manifest and hidden files (.DS_Store, .nfs...).

    Damaged: the folder went away meanwhile, or is none.
    """
    try:
        for path in folder.iterdir():
            if path.name.startswith(".") or (not prefix and path.name == NAME):
                continue
            if path.is_dir():
                yield from listing(path, f"{prefix}{path.name}/")
            else:
                yield prefix + path.name, path.stat().length
    except OSError as error:
        raise Damaged(f"it cannot be listed ({error})") from None
