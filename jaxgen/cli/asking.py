"""What is asked of a run that makes pictures: texts or classes, as the run knows them."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data.captions import encode_captions
from jaxgen.data.tokenizers import load
from jaxgen.errors import UserError, nearest


def asked(arguments: argparse.Namespace, opened: Any) -> tuple[dict[str, np.ndarray], list[str], dict | None]:
    """(conditions, what they are called, conditions that are unwanted)."""
    task, data, spec = opened.experiment.task, opened.experiment.data, opened.program.spec
    if getattr(task, "text", None) is not None:
        if getattr(arguments, "class"):
            raise UserError(f"--class is of no use here: {opened.directory} takes a --prompt")
        prompts = arguments.prompt
        if not prompts:
            raise UserError(f'{opened.directory} makes pictures of texts: say what they show with --prompt "..."')
        tokenizer, length = load(opened.directory / "tokenizer"), spec["tokens"].shape[1]
        for prompt in (*prompts, arguments.negative or ""):
            told_of(prompt, tokenizer, length)
        encode = encoder(opened)
        return encode(prompts), list(prompts), encode([arguments.negative]) if arguments.negative else None
    if arguments.prompt or arguments.negative:
        raise UserError(f"{opened.directory} knows no texts: --prompt and --negative are of no use")
    wanted = getattr(arguments, "class")
    classes = getattr(task.network, "classes", 0)
    if not classes:
        if wanted:
            raise UserError(f"{opened.directory} knows no classes: --class is of no use")
        return {}, [""], None
    names = names_of(data, classes)
    numbers = [number_of(w, names) for w in wanted] if wanted else list(range(classes))[: max(1, min(classes, 10))]
    return {"label": np.asarray(numbers, np.int32)}, [names[i] for i in numbers], None


def told_of(prompt: str, tokenizer: Any, length: int) -> None:
    """Says what of a prompt the model does not get to see."""
    ids = np.asarray(tokenizer.encode(prompt))
    if len(ids) >= length:
        lost = tokenizer.decode(ids[length - 1 :].tolist())
        print(f"the prompt is cut after {length - 1} tokens; left out is {lost!r}", file=sys.stderr)
    words, known_not = dict.fromkeys(prompt.split()), {_unknown(tokenizer)}
    unknown = [word for word in words if set(np.asarray(tokenizer.encode(word)).tolist()) == known_not]
    if unknown:
        print(f"the run's vocabulary lacks {', '.join(map(repr, unknown))}", file=sys.stderr)


def _unknown(tokenizer: Any) -> int:
    found = getattr(tokenizer, "unknown", None)
    return -1 if found is None else found


def encoder(opened: Any) -> Callable[[list[str]], dict[str, np.ndarray]]:
    """How a run's texts are encoded."""
    tokenizer, length = load(Path(opened.directory) / "tokenizer"), opened.program.spec["tokens"].shape[1]

    def encode(texts):
        tokens, lengths = encode_captions(tokenizer, texts, length)
        return {"tokens": tokens, "lengths": lengths}

    return encode


def names_of(data: Any, classes: int) -> list[str]:
    """What the classes are called, where the data says."""
    try:
        known = list(getattr(data, "classes", ()) or data.prepare().classes)
    except (AttributeError, UserError):   # data on another machine
        known = []
    return [str(c) for c in known[:classes]] + [str(i) for i in range(len(known), classes)]


def number_of(wanted: str, names: list[str]) -> int:
    """The number of a class by its name or number."""
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    hint = "" if wanted.isdecimal() else nearest(wanted, names)
    raise UserError(f"there is no class {wanted!r}{hint or f'; they are 0 to {len(names) - 1}'}")
