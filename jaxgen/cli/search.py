"""`jaxgen search RUN --images DIR --query TEXT`."""

import concurrent.futures
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError

if TYPE_CHECKING:
    import numpy as np

BATCH = 64   # pictures at a time
SHOWN = 8    # of the pictures that cannot be read, so many are named
SIDE = 192   # pixels of a picture on the contact sheet


def parser() -> options.Parser:
    parser = options.Parser(
        "search",
        "Ranks the pictures of a folder by how near they are to a text.",
        usage="jaxgen search RUN --images DIR --query TEXT [--top N] [--sheet FILE] [--json]",
    )
    options.add_run(parser)
    parser.add_argument("--images", metavar="DIR", help="a folder with pictures, at any depth")
    parser.add_argument("--query", metavar="TEXT", help="what to look for")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="pictures to show (12)")
    parser.add_argument("--sheet", metavar="FILE", help="the contact sheet, a PNG (RUN/search/TEXT.png)")
    parser.add_argument("--json", action="store_true", help="print data for programs")
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    from jaxgen.cli.opened import directory_of, open_run

    directory_of(arguments, "search")
    query = (arguments.query or "").strip()
    if not query:
        raise UserError('jaxgen search needs what to look for: --query "a black cat"')
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}, which should be at least 1")
    if arguments.sheet and not Path(arguments.sheet).absolute().parent.is_dir():
        raise UserError(f"--sheet is {arguments.sheet}, and there is no folder {Path(arguments.sheet).parent}")
    paths = pictures_in(arguments.images)
    opened = open_run(arguments, "search")
    task = opened.experiment.task
    if not (hasattr(task, "embed_images") and hasattr(task, "embed_texts")):
        raise UserError(f"{opened.directory} is a run of a {type(task).__name__}: only contrastive runs can search")
    example, encode, tokenizer = reading(opened.experiment.data)
    tokens, lengths = encode([query])
    unread = _unread(tokenizer, tokens[0], int(lengths[0]), query)
    found, skipped = embedded(opened, paths, example, _cache_key(opened, arguments.weights))
    if not found:
        raise UserError(f"none of the {len(paths)} pictures in {arguments.images} can be read: {_named(skipped)}")
    ranked = rank(found, _text(opened, encode, query))[: arguments.top]
    place = opened.directory / "search" / f"{_slug(query)}.png"
    sheet = _draw(ranked, arguments.sheet, place, getattr(opened.experiment.data, "view", None))
    told = {"run": str(opened.directory), "step": opened.step, "weights": opened.weights, "query": query}
    told |= {"query_unread": unread} if unread else {}
    if arguments.json:
        results = [{"file": str(path), "similarity": round(value, 6)} for path, value in ranked]
        unread = [{"file": str(path), "reason": reason} for path, reason in skipped.items()]
        told |= {"pictures": len(found), "results": results, "skipped": unread, "sheet": sheet and str(sheet)}
        print(json.dumps(told, indent=1))
        return DONE
    if unread:
        print(f"of the query, {unread}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {len(paths)} pictures cannot be read: {_named(skipped)}", file=sys.stderr)
    print(f"{told['run']}, step {told['step']}, {told['weights']} weights: {query!r} among {len(found)} pictures\n")
    print(f"{'':>{len(str(len(ranked)))}}  similarity  file")
    for place, (path, value) in enumerate(ranked, 1):
        print(f"{place:>{len(str(len(ranked)))}}  {value:>10.4f}  {path}")
    if sheet:
        print(f"\n{sheet}")
    return DONE


def pictures_in(folder: str | None) -> list[Path]:
    """The picture files below a folder, by name, in order. UserError where there are none."""
    from jaxgen.data.images import SUFFIXES

    if not folder:
        raise UserError("jaxgen search needs a folder of pictures: --images DIR")
    if not Path(folder).is_dir():
        what = "a file, not a folder of pictures" if Path(folder).exists() else "no folder"
        raise UserError(f"--images is {folder}, which is {what}")
    files = [Path(at) / name for at, folders, names in os.walk(folder) for name in names
             if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    if not files:
        raise UserError(f"there are no pictures in {folder} (files that end in {', '.join(SUFFIXES)})")
    return sorted(files)


def _unread(tokenizer: Any, tokens: "np.ndarray", length: int, query: str) -> str:
    """What of the query the run cannot read, in words; empty where it reads all."""
    unknown = [] if getattr(tokenizer, "unknown", None) is None else tokens[:length] == tokenizer.unknown
    if len(unknown) and sum(unknown) == length - 1:  # all but the end
        raise UserError(f"the run has learned nothing of the query {query!r}")
    parts = [f"{sum(unknown)} of {length - 1} tokens were never learned"] * any(unknown)
    if length == len(tokens) and len(tokenizer.encode(query)) >= length:
        parts.append(f"all after {length - 1} tokens is cut off")
    return ", and ".join(parts)


def reading(data: Any) -> tuple[Callable[[bytes], Mapping[str, Any]], Callable[[list[str]], tuple], Any]:
    """How an experiment's data reads a picture (bytes -> arrays of an example) and encodes captions, and its tokenizer.

    Data of pictures from files says so without those files, which may be on another machine.
    """
    from jaxgen.data.captions import encode_captions
    from jaxgen.data.imagetext import ImageText

    if isinstance(data, ImageText):
        tokenizer = data.tokenizer.fit(())   # the run's own, which is fitted
        return data.view, lambda texts: encode_captions(tokenizer, texts, data.length), tokenizer
    prepared = data.prepare()
    if not (hasattr(prepared, "picture") and hasattr(prepared, "encode")):
        raise UserError(f"the run's data, {type(data).__name__}, has no pictures with captions")
    return lambda content: {"image": prepared.picture(content)}, prepared.encode, prepared.tokenizer


# Embeddings


def embedded(
    opened: Any, paths: list[Path], example: Callable[[bytes], Mapping[str, Any]], key: str
) -> tuple[dict[Path, "np.ndarray"], dict[Path, str]]:
    """The unit vector of each picture, and why others cannot be read.

    Vectors are kept in the cache under the key of the weights, by the content of the picture's file.
    """
    import jax
    import numpy as np

    from jaxgen.evaluation.whole import place, whole_rows
    from jaxgen.tasks.base import batch_shardings

    sharding, task = opened.program.sharding, opened.experiment.task
    size = whole_rows(sharding, min(BATCH, len(paths)))
    known = _cached(key)
    before = len(known)
    digests: dict[Path, str] = {}
    skipped: dict[Path, str] = {}
    waiting: dict[str, Mapping[str, Any]] = {}   # by digest

    @jax.jit
    def embed(params, state, batch):
        with sharding.use():
            found = task.embed_images(params, batch, state)
        return jax.lax.with_sharding_constraint(found.astype(np.float32), sharding.replicated)

    def empty_waiting() -> None:
        names, examples = list(waiting)[:size], list(waiting.values())[:size]
        examples += examples[:1] * (size - len(names))   # a batch of one shape
        batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
        batch_shardings(task, sharding, spec)   # says so where they do not fit
        axes = task.axes(spec)
        placed = {k: place(sharding, v, *axes[k]) for k, v in batch.items()}
        vectors = np.asarray(embed(opened.params, opened.state, placed))
        for name, vector in zip(names, vectors, strict=False):
            known[name] = vector
            del waiting[name]

    for path, digest, content in _read_ahead(paths, example, known):
        if isinstance(content, str):
            skipped[path] = content
            continue
        digests[path] = digest
        if content is not None:
            waiting[digest] = content
        if len(waiting) >= size:
            empty_waiting()
    if waiting:
        empty_waiting()
    if len(known) > before:
        _keep(key, known)
    return {path: known[digest] for path, digest in digests.items()}, skipped


def _read_ahead(
    paths: list[Path], example: Callable[[bytes], Mapping[str, Any]], known: Mapping[str, Any]
) -> Iterator[tuple[Path, str, Mapping[str, Any] | str | None]]:
    """(path, digest of the content, arrays, or None where the embedding is known, or why it cannot be read)."""
    from jaxgen.data.images import BadImage

    def one(path: Path) -> tuple[Path, str, Mapping[str, Any] | str | None]:
        try:
            content = path.read_bytes()
            digest = sha256(content).hexdigest()
            return path, digest, None if digest in known else example(content)
        except BadImage as error:
            return path, "", str(error)
        except OSError as error:
            return path, "", error.strerror or type(error).__name__

    # decoding leaves Python's lock; two batches ahead, since all at once might not fit in memory
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        ahead = [pool.submit(one, path) for path in paths[: 2 * BATCH]]
        for i in range(len(paths)):
            yield ahead.pop(0).result()
            if i + 2 * BATCH < len(paths):
                ahead.append(pool.submit(one, paths[i + 2 * BATCH]))


def _text(opened: Any, encode: Callable[[list[str]], tuple], query: str) -> "np.ndarray":
    """The query's unit vector."""
    import jax
    import numpy as np

    from jaxgen.evaluation.whole import place, whole_rows

    sharding, task = opened.program.sharding, opened.experiment.task
    rows = whole_rows(sharding, 1)
    tokens, lengths = encode([query] * rows)
    batch = {"tokens": place(sharding, tokens, "batch", None), "lengths": place(sharding, lengths, "batch")}

    @jax.jit
    def embed(params, batch):
        with sharding.use():
            found = task.embed_texts(params, batch)
        return jax.lax.with_sharding_constraint(found.astype(np.float32), sharding.replicated)

    return np.asarray(embed(opened.params, batch))[0]


def rank(found: Mapping[Path, "np.ndarray"], text: "np.ndarray") -> list[tuple[Path, float]]:
    """Files with their cosine similarity, the highest first; equal ones by name."""
    import numpy as np

    paths = list(found)
    values = np.stack([found[path] for path in paths]) @ text
    return sorted(zip(paths, values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))


def _cache_key(opened: Any, weights: str) -> str:
    """Names the weights and how pictures are read: embeddings of another key are of no use."""
    from jaxgen import record
    from jaxgen.data import cache
    from jaxgen.training import manifest
    from jaxgen.training.checkpoint import Checkpoints

    experiment = opened.experiment
    checkpoints = Checkpoints(opened.directory / "checkpoints", experiment.checkpoint, read_only=True)
    frozen = checkpoints.directory / "frozen"
    once = manifest.read(frozen).checksum if frozen.exists() else ""
    view = repr(getattr(experiment.data, "view", experiment.data))
    return cache.key(checkpoints.checksum(opened.step), once, weights, record.to_record(experiment.task), view)


def _store(key: str) -> Path:
    from jaxgen.data import cache

    return cache.root() / "embeddings" / f"{key}.npz"


def _cached(key: str) -> dict[str, "np.ndarray"]:
    """Vector by digest; empty where there is no cache, or a damaged one."""
    import zipfile

    import numpy as np

    try:
        with np.load(_store(key), allow_pickle=False) as file:
            return dict(zip((name.decode() for name in file["digests"].tolist()), file["vectors"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _keep(key: str, known: Mapping[str, "np.ndarray"]) -> None:
    import numpy as np

    from jaxgen.files import write_whole

    path, content = _store(key), io.BytesIO()
    np.savez(content, digests=np.array([k.encode() for k in known]), vectors=np.stack(list(known.values())))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    except OSError as error:
        print(f"the embeddings are not kept for the next search: {path.parent}: {error.strerror}", file=sys.stderr)


# What is shown


def _draw(ranked: list[tuple[Path, float]], wanted: str | None, default: Path, view: Any = None) -> Path | None:
    """Writes the contact sheet. Where nobody asked for one, a folder that cannot be written is no mistake.

    Pictures are decoded as the data's `view` does; one that has gone since it was embedded leaves a blank cell.
    """
    from jaxgen.data import images
    from jaxgen.data.sheets import png, sheet
    from jaxgen.files import write_whole

    path = Path(wanted) if wanted else default
    how = {} if view is None else {"background": view.background, "max_pixels": view.max_pixels}

    def picture(file: Path) -> "np.ndarray | None":
        try:
            return images.decode(file.read_bytes(), size=SIDE, **how)
        except (images.BadImage, OSError):
            return None

    pictures = [picture(file) for file, _ in ranked]
    labels = [f"{value:.3f} {file.name}" for file, value in ranked]
    content = png(sheet(pictures, min(4, len(ranked)), labels, size=SIDE))
    try:
        if not wanted:
            path.parent.mkdir(exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        if wanted:
            raise UserError(f"the contact sheet {path} cannot be written: {error.strerror}") from None
        print(f"no contact sheet: {path} cannot be written ({error.strerror})", file=sys.stderr)
        return None
    return path


def _slug(query: str) -> str:
    """A file's name for a query."""
    return re.sub(r"\W+", "-", query).strip("-")[:60] or sha256(query.encode()).hexdigest()[:12]


def _named(skipped: Mapping[Path, str]) -> str:
    shown = [f"{path} ({reason})" for path, reason in list(skipped.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else "")
