"""safetensors files: read lazily, as views of the files, and written shard by shard. No pickled file is ever opened."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxgen.errors import UserError, nearest
from jaxgen.files import write_whole

DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
FILES = ("model.safetensors", "open_clip_model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD = 5_000_000_000   # bytes of a file, at which the next is begun


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file, of an index of several, or of a folder that holds either, by name.

    Each is a read-only view of its file: what is not used is not read. Raises UserError where there is none, where a
    shard or a tensor of the index is missing, and where a file is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = located(Path(path))
        if self.path.suffix == ".json":
            self._views = _indexed(self.path)
        else:
            self._views = _views(self.path)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def located(path: Path) -> Path:
    """The .safetensors file or index that `path` names or holds."""
    if path.suffix in PICKLED:
        raise UserError(f"{path} is a pickled file, which may run code when it is read; a .safetensors file is wanted")
    if path.is_file():
        return path
    if not path.is_dir():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(f"there is no {path}{near}")
    for name in FILES:
        for found in (path / name, path / f"{name}.index.json"):
            if found.is_file():
                return found
    found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds several models: {', '.join(p.name for p in found)}; name the file of one")
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED)
    hint = f"; {pickled[0]} is pickled, and may run code when it is read" if pickled else ""
    raise UserError(f"{path} holds no .safetensors file{hint}")


def _indexed(index: Path) -> dict[str, np.ndarray]:
    """The tensors of the shards that an index lists."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if any(Path(name).name != name for name in names):   # nothing outside the folder is opened
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of .safetensors files") from None
    views: dict[str, np.ndarray] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index} lists {name}, which is missing")
        inside = _views(index.parent / name)
        listed = {tensor for tensor, place in places.items() if place == name}
        if listed != inside.keys():
            odd = sorted(listed ^ inside.keys())
            raise UserError(
                f"{index} and {name} do not agree on what is in it: {odd[0]}"
                + (f" and {len(odd) - 1} more tensors" if len(odd) > 1 else "")
            )
        views |= inside
    return views


def _views(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one file: 8 bytes that say how long the header is, the header (JSON), the data."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):   # checks the header and that it accounts for each byte
            pass
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        data = np.memmap(file, np.uint8, "r", offset=8 + size) if file.stat().st_size > 8 + size else np.empty(0, "u1")
        return {
            name: _view(data, entry, f"{name} of {file}") for name, entry in header.items() if name != "__metadata__"
        }
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file} is not a safetensors file, or is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def _view(data: np.ndarray, entry: dict, what: str) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{what} has the format {entry['dtype']}{nearest(entry['dtype'], DTYPES)}, unknown here")
    start, end = entry["data_offsets"]
    view = data[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return view


class Lazy(NamedTuple):
    """A tensor to be written: its shape and format, and what makes it when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def write(folder: str | Path, tensors: Mapping[str, Lazy], name: str = FILES[0], shard: int = SHARD) -> list[Path]:
    """Writes tensors as `name` in `folder`, or, where they take more than `shard` bytes, as several files with an
    index. One file's tensors are in memory at a time. Raises UserError where they cannot be written."""
    folder = Path(folder)
    groups: list[list[str]] = [[]]
    room = shard
    for tensor, lazy in tensors.items():
        if groups[-1] and lazy.nbytes > room:
            groups.append([])
            room = shard
        groups[-1].append(tensor)
        room -= lazy.nbytes
    stem = name.removesuffix(".safetensors")
    names = [name] if len(groups) == 1 else [
        f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, group in zip(names, groups, strict=True):
            _save({tensor: _made(tensors[tensor]) for tensor in group}, folder / file)
        if len(groups) > 1:
            places = {tensor: file for file, group in zip(names, groups, strict=True) for tensor in group}
            size = sum(lazy.nbytes for lazy in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            write_whole(folder / f"{name}.index.json", json.dumps(index, indent=1) + "\n")
            names.append(f"{name}.index.json")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    return [folder / file for file in names]


def _made(lazy: Lazy) -> np.ndarray:
    """The array as it lies in memory: safetensors looks at no strides."""
    return np.ascontiguousarray(lazy.make(), lazy.dtype).reshape(lazy.shape)


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    """One file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})   # transformers asks for this word
        partial.replace(file)
    except SafetensorError as error:
        raise UserError(f"cannot write {file}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
