"""Experiments as data: dataclasses to JSON and back, without executing anything that a record names.

A dataclass (a Linen module too) becomes `{"class": "jaxgen.models.gpt:GPT", "depth": 12, ...}`, a tuple a list, and
what JSON lacks an object with one reserved key: `{"float": "nan"}`, `{"list": [...]}`, `{"dtype": "bfloat16"}`,
`{"dict": [[key, value], ...]}`. Only dataclasses that a module of jaxgen defines are rebuilt, and those of files that
the caller names.
"""

import dataclasses
import importlib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgen import files
from jaxgen.errors import UserError, nearest
from jaxgen.pretrained import Pretrained

FILE = "experiment.json"   # of a run directory
RESERVED = frozenset({"class", "float", "list", "dtype", "dict"})


def fields(obj: Any) -> tuple[dataclasses.Field, ...]:
    """The fields that make up a dataclass: those of its constructor, less Linen's own `parent` and `name`."""
    hidden = {"parent", "name"} if _is_linen(obj if isinstance(obj, type) else type(obj)) else set()
    return tuple(f for f in dataclasses.fields(obj) if f.init and f.name not in hidden)


def is_node(obj: Any) -> bool:
    """Whether `obj` is a dataclass instance (a class is not one)."""
    return dataclasses.is_dataclass(obj) and not isinstance(obj, type)


def to_record(obj: Any, path: str = "experiment") -> Any:
    """`obj` as JSON data. Raises UserError, with the field's path, for a value that no record can hold."""
    if obj is None or isinstance(obj, bool | str):
        return obj if not isinstance(obj, str) else str(obj)
    if is_node(obj):
        values = {f.name: to_record(getattr(obj, f.name), f"{path}.{f.name}") for f in fields(obj)}
        return {"class": _class_name(type(obj), path), **values}
    if isinstance(obj, tuple):
        return [to_record(x, f"{path}.{i}") for i, x in enumerate(obj)]
    if isinstance(obj, list):
        return {"list": [to_record(x, f"{path}.{i}") for i, x in enumerate(obj)]}
    if isinstance(obj, Mapping):
        if all(isinstance(k, str) for k in obj) and not RESERVED & obj.keys():
            return {k: to_record(v, f"{path}.{k}") for k, v in obj.items()}
        return {"dict": [[to_record(k, path), to_record(v, f"{path}.{k}")] for k, v in obj.items()]}
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else {"float": repr(float(obj))}
    if _is_numpy(obj):
        return to_record(obj.item(), path)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(obj, numpy.dtype) or isinstance(getattr(obj, "dtype", None), numpy.dtype) and callable(obj):
            return {"dtype": numpy.dtype(getattr(obj, "dtype", obj)).name}
        if isinstance(obj, type) and issubclass(obj, numpy.generic):
            return {"dtype": numpy.dtype(obj).name}
    raise UserError(
        f"{path} is {obj!r}, a {type(obj).__name__}, which cannot be stored with a run: "
        "use numbers, strings, tuples, dicts, dtypes or dataclasses"
    )


def from_record(data: Any, trust: Iterable[str | Path] = (), path: str = "experiment") -> Any:
    """The object that `to_record` made `data` of.

    `trust` names the files outside jaxgen whose classes may be rebuilt; they are executed when the record needs them.
    Raises UserError for a class of any other file, for a class or field that this version does not know, and for a
    value that its field is not annotated for.
    """
    trusted: Trusted = {}
    for file in map(files.existing, trust):
        trusted.setdefault(files.label(file), set()).add(file)
    return _build(data, trusted, path)


Trusted = dict[str, set[Path]]   # what records call a file -> the files of that name that the caller named


def _build(data: Any, trusted: Trusted, path: str) -> Any:
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return tuple(_build(x, trusted, f"{path}.{i}") for i, x in enumerate(data))
    if not isinstance(data, dict):
        raise UserError(f"{path} of the record is a {type(data).__name__}, which is not JSON data")
    if isinstance(data.get("class"), str):
        return _instance(data, trusted, path)
    if len(data) == 1:
        (key, value), = data.items()
        if key == "float" and value in ("nan", "inf", "-inf"):
            return float(value)
        if key == "list" and isinstance(value, list):
            return list(_build(value, trusted, path))
        if key == "dict" and isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value):
            keys = [_build(k, trusted, path) for k, _ in value]
            if not any(isinstance(k, dict | list) for k in keys):   # which are no keys
                return {key: _build(v, trusted, f"{path}.{k}") for key, (k, v) in zip(keys, value, strict=True)}
        if key == "dtype" and isinstance(value, str):
            return _dtype(value, path)
    if RESERVED & data.keys():
        raise UserError(f"{path} of the record is damaged, or was written by a newer jaxgen: {_short(data)}")
    return {k: _build(v, trusted, f"{path}.{k}") for k, v in data.items()}


def _instance(data: dict[str, Any], trusted: Trusted, path: str) -> Any:
    cls = _find(data["class"], trusted, path)
    known = [f.name for f in fields(cls)]
    for name in data.keys() - {"class"}:
        if name not in known:
            raise UserError(
                f"{path}.{name} of the record is unknown to {cls.__name__} in this version of jaxgen"
                f"{nearest(name, known)}; the record may come from a newer version"
            )
    values = {k: _build(v, trusted, f"{path}.{k}") for k, v in data.items() if k != "class"}
    needed = [f.name for f in fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{path} of the record lacks {', '.join(missing)}, which {cls.__name__} needs")
    kinds = _kinds(cls)
    for name in values:
        values[name] = _whole(values[name], kinds.get(name))
        if found := _misfit(values[name], kinds.get(name), f"{path}.{name}"):
            raise UserError(f"{found.path} of the record {found}")
    return cls(**values)


def check(tree: Any, path: str = "experiment") -> None:
    """Raises UserError for a value, at any depth, that its field is not annotated for: its record would be refused."""
    if is_node(tree):
        kinds = _kinds(type(tree))
        for f in fields(tree):
            value = _whole(getattr(tree, f.name), kinds.get(f.name))
            if found := _misfit(value, kinds.get(f.name), f"{path}.{f.name}"):
                raise UserError(f"{found.path} {found}")
            check(value, f"{path}.{f.name}")
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            check(value, f"{path}.{key}")
    elif isinstance(tree, tuple | list):
        for i, value in enumerate(tree):
            check(value, f"{path}.{i}")


def _kinds(cls: type) -> dict[str, Any]:
    """The annotations of a class's fields, less those that cannot be read or that the field's own default breaks."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception:   # a name that only a type checker knows
        return {}
    defaults = {f.name: f.default for f in fields(cls) if f.default is not dataclasses.MISSING}
    return {k: kind for k, kind in hints.items() if k not in defaults or not _misfit(defaults[k], kind, "")}


class _Misfit(NamedTuple):
    """A value that is not of its annotated kind."""

    path: str
    value: Any
    kind: Any

    def __str__(self) -> str:
        choices = typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else ()
        near = nearest(self.value, choices) if isinstance(self.value, str) else ""
        if is_node(self.value):
            there = f"an object of class {type(self.value).__name__}"
        else:
            there = json.dumps(to_record(self.value, self.path))
        return f"is {there if len(there) <= 60 else there[:57] + '...'}, which should be {_expected(self.kind)}{near}"


def _whole(value: Any, kind: Any) -> Any:
    """8.0 as 8 where a whole number is meant: to JSON they are the same."""
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def _misfit(value: Any, kind: Any, path: str) -> _Misfit | None:
    """The value, or the one in it, that is not of its annotated kind; None where all are, or the kind is not known.

    A list may stand for a tuple, and a class from outside jaxgen for any other: it may well have what is needed.
    """
    if _is_numpy(value):
        value = value.item()
    base, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base in _UNIONS:
        found = [_misfit(value, k, path) for k in args]
        if None in found:
            return None
        if inside := [one for one in found if one.path != path]:
            return inside[0]
    elif base in _SEQUENCES and isinstance(value, tuple | list):
        kinds = args if base is tuple and args[1:] != (...,) else args[:1] * len(value)
        if not args or len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=False))
            return next((found for i, (x, k) in pairs if (found := _misfit(x, k, f"{path}.{i}"))), None)
    elif base in _MAPPINGS and isinstance(value, Mapping):
        kind = args[1] if args else None
        return next((found for k, x in value.items() if (found := _misfit(x, kind, f"{path}.{k}"))), None)
    elif _is_a(value, kind):
        return None
    return _Misfit(path, value, kind)


_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (tuple, list, Sequence, Iterable, Collection)
_MAPPINGS = (dict, Mapping)
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind that is no union, or may be: the kind is not known."""
    base = typing.get_origin(kind) or kind
    if base is typing.Literal:
        return any(type(value) is type(x) and value == x for x in typing.get_args(kind))
    if base in _SEQUENCES + _MAPPINGS:
        return False
    if not isinstance(base, type):
        return True
    if base is float:
        return _are_numbers(value)
    if base in _SCALARS:
        return isinstance(value, base) and (base is bool or not isinstance(value, bool))
    structural = issubclass(base, tuple) or typing.Protocol in base.__mro__
    if not dataclasses.is_dataclass(base) and (structural or not _is_ours(base)):
        return True   # it says nothing of dataclasses
    foreign = not (_is_ours(base) and _is_ours(type(value))) or isinstance(value, Pretrained)
    return isinstance(value, base) or is_node(value) and foreign


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("jaxgen.")


def _expected(kind: Any) -> str:
    """A kind in the words of JSON."""
    base, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base in _UNIONS:
        return " or ".join(map(_expected, args))
    if base is typing.Literal:
        return f"one of {', '.join(map(json.dumps, args))}"
    if base in _SEQUENCES:
        if base is tuple and args and args[-1] is not ...:
            return f"a list of {len(args)}: {', '.join(map(_expected, args))}"
        return "a list" + (f", each {_expected(args[0])}" if args else "")
    if base in _MAPPINGS:
        return "an object" + (f", each of whose values is {_expected(args[1])}" if args else "")
    return _SCALARS.get(kind) or f"an object of class {kind.__name__}"


def _find(name: str, trusted: Trusted, path: str) -> type:
    """The dataclass that a record names. Imports modules of jaxgen and loads trusted files; nothing else runs."""
    place, _, attribute = name.partition(":")
    ours = re.fullmatch(r"jaxgen(\.[A-Za-z_]\w*)+", place, re.ASCII)
    if place in trusted:
        if len(trusted[place]) > 1:
            count = len(trusted[place])
            raise UserError(f"{path} of the record is a {name}, and {count} trusted files are called {place}")
        module = files.load(next(iter(trusted[place])))
    elif ours and not place.startswith("jaxgen.cli"):
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise
            raise UserError(
                f"{path} of the record is a {name}, which this version of jaxgen does not have; "
                "the record may come from a newer version"
            ) from None
    else:
        raise UserError(
            f"{path} of the record is a {name}, a class outside jaxgen, which is not run unasked; "
            f"name its file with --trust {place if place.endswith('.py') else 'FILE'} to allow it"
        )
    cls = vars(module).get(attribute)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__:
        return cls
    choices = [k for k, v in vars(module).items() if isinstance(v, type) and dataclasses.is_dataclass(v)]
    raise UserError(
        f"{path} of the record is a {name}, but {place} of this version defines no such class"
        f"{nearest(attribute, choices)}; the record may come from a newer version"
    )


def _class_name(cls: type, path: str) -> str:
    module = cls.__module__
    if "." in cls.__qualname__:
        raise UserError(f"{path} is a {cls.__qualname__}, which cannot be stored: it is defined inside something else")
    if not module.startswith("jaxgen."):
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None:
            raise UserError(f"{path} is a {cls.__name__}, which cannot be stored: its class is defined in no file")
        module = files.label(file)
    return f"{module}:{cls.__name__}"


def _dtype(name: str, path: str) -> Any:
    import ml_dtypes  # noqa: F401   (bfloat16 and its kin become known to numpy)
    import numpy

    try:
        return numpy.dtype(name)
    except TypeError:
        raise UserError(f"{path} of the record is the dtype {name!r}, which is unknown here") from None


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")   # a value of numpy's is here only if numpy is
    return numpy is not None and isinstance(value, numpy.generic)


def _is_linen(cls: type) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and issubclass(cls, linen.Module)


class Stored(NamedTuple):
    """What a run directory says of itself: the experiment's record, and where its `Pretrained` parts came from."""

    experiment: Any
    pretrained: dict[str, Any]   # path of the field -> record of the Pretrained that stood there


def store(directory: str | Path, experiment: Any, pretrained: Mapping[str, Any] | None = None) -> None:
    """Writes `experiment.json` into the run directory, whole or not at all."""
    pretrained = {k: v if _is_data(v) else to_record(v) for k, v in (pretrained or {}).items()}
    content = {"format": 1, "experiment": to_record(experiment), "pretrained": pretrained}
    file = Path(directory) / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None


def stored(directory: str | Path) -> Stored:
    """Reads `experiment.json` of a run directory. Raises UserError where it is missing, damaged or too new."""
    file = Path(directory) / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(_no_run(Path(directory))) from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    pretrained = content.get("pretrained", {}) if isinstance(content, dict) and content.get("format") == 1 else None
    if not isinstance(pretrained, dict) or "experiment" not in content:
        raise UserError(f"{file} is not an experiment that this version of jaxgen can read")
    return Stored(content["experiment"], pretrained)


def begun(directory: str | Path) -> bool:
    """Whether a run directory holds a step to go on from. What stands in one that does not is begun anew.

    Raises UserError for steps of which no record says what they are.
    """
    directory = Path(directory)
    steps = any(path.name.isdecimal() for path in (directory / "checkpoints").glob("*"))
    if steps and not (directory / FILE).is_file():
        raise UserError(f"{directory} has checkpoints, and no {FILE} that says of what: give another --run-dir")
    return steps


def _no_run(directory: Path) -> str:
    if not directory.is_dir():
        siblings = [p.parent.name for p in directory.parent.glob(f"*/{FILE}")] if directory.parent.is_dir() else []
        return f"there is no run directory {directory}{nearest(directory.name, siblings)}"
    inside = sorted(p.parent.name for p in directory.glob(f"*/{FILE}"))
    hint = f"; it holds the runs {', '.join(inside)}" if inside else ""
    return f"{directory} is not a run directory: it has no {FILE}{hint}"


class Difference(NamedTuple):
    """A field that differs between two records: its dotted path and both values as JSON data."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path} ({_short(self.old)}, now {_short(self.new)})"


class Absent:
    """Stands for the value of a field that one of two records lacks."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def differences(old: Any, new: Any, path: str = "") -> list[Difference]:
    """Where two records (or objects) differ. A field that one side lacks counts as the default of its class."""
    old, new = (x if _is_data(x) else to_record(x) for x in (old, new))
    if isinstance(old, dict) and isinstance(new, dict) and old.get("class") == new.get("class"):
        found = []
        for key in [*new, *(k for k in old if k not in new)]:
            a, b = (x[key] if key in x else _default(x.get("class"), key) for x in (old, new))
            if a is ABSENT or b is ABSENT:
                found += [Difference(_join(path, key), a, b)] * (a is not b)
            else:
                found += differences(a, b, _join(path, key))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(map(_is_tree, old + new)):
        pairs = zip(old, new, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, _join(path, str(i)))]
    return [] if type(old) is type(new) and old == new or _same_number(old, new) else [Difference(path, old, new)]


# What may change between the parts of one run: where it runs, how long, how its data is read, what is only watched.
CHANGEABLE = re.compile(r"(mesh|rules|topology|checkpoint|log|target|max_skipped)(\..*)?|evaluations\.\d+\.every|"
                        r"data\.(.*\.)?(max_bad|workers)")
PATHS = re.compile(r"data\.(.*path|(.*\.)?(root|images))")   # whose content counts


def resume(
    old: Any, new: Any, same_data: Callable[[], bool] = lambda: False, directory: str | Path = "the run directory"
) -> list[Difference]:
    """The differences that a run goes on with. Raises UserError that lists the others.

    `same_data()` is asked only where nothing but paths of the data differ in vain: whether the content at the new
    paths is what the run has been trained on.
    """
    found = differences(old, new)
    paths = [d for d in found if PATHS.fullmatch(d.path)]
    fewer = [d for d in found if d.path == "steps" and not (_are_numbers(d.new, d.old) and d.new > d.old)]
    refused = [d for d in found if d not in paths and not CHANGEABLE.fullmatch(d.path) and d.path != "steps"] + fewer
    if paths and not refused and not same_data():
        refused = paths
    if refused:
        raise UserError(
            f"{directory} holds a run that differs in {'; '.join(map(str, refused))}: "
            "give another --run-dir for a new run, or undo these changes to resume"
        )
    return found


def _is_tree(x: Any) -> bool:
    return isinstance(x, dict | list)


def _is_data(x: Any) -> bool:
    return x is None or isinstance(x, bool | int | float | str | list) or type(x) is dict


def _default(name: str | None, key: str) -> Any:
    """The default of a class's field as JSON data; ABSENT where it has none or the class is not ours to import."""
    if name is None:
        return ABSENT
    try:
        field = {f.name: f for f in fields(_find(name, {}, ""))}[key]
    except (UserError, KeyError):
        return ABSENT
    if field.default is not dataclasses.MISSING:
        return to_record(field.default)
    return to_record(field.default_factory()) if field.default_factory is not dataclasses.MISSING else ABSENT


def _same_number(a: Any, b: Any) -> bool:
    return _are_numbers(a, b) and a == b


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _short(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("class"), str):
        return value["class"].rpartition(":")[2]
    if isinstance(value, dict) and len(value) == 1 and value.keys() <= {"float", "dtype"}:
        return str(next(iter(value.values())))
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
