"""The experiment that a command names: FILE, --smoke, and overrides; or its help."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxgen import files, runtime
from jaxgen.cli.options import Parser
from jaxgen.errors import UserError, nearest


def chosen(parser: Parser, argv: Sequence[str], simulate: bool = True) -> tuple[argparse.Namespace, Any] | None:
    """The verb's own arguments and the experiment with its overrides; None when help was asked for, and given.

    `simulate` makes as many devices as --devices says; a verb that only computes shapes needs none.
    """
    own, rest = split(parser, argv)
    if own.file is None:
        if own.help:
            parser.print_help()
            return None
        raise UserError(f"{parser.prog} needs an experiment file")
    files.existing(own.file)   # before anything slow
    runtime.prepare(own.devices if simulate else None)
    from jaxgen.experiment import load, select
    from jaxgen.override import document, override

    experiment = select(load(own.file), own.smoke)
    if own.help:
        parser.print_help()
        print(f"\nFields of {own.file}:\n")
        document(experiment, parser.prog)
        return None
    _no_typo(parser, rest, {f.name for f in dataclasses.fields(experiment)})
    return own, override(experiment, rest)


def _no_typo(parser: Parser, rest: list[str], fields: set[str]) -> None:
    """`--smoek` is meant for the verb, not for the experiment."""
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("--") and "." not in option and option[2:].replace("-", "_") not in fields:
            if hint := nearest(option, options):
                raise UserError(f"there is no option {option}{hint}")


def split(
    parser: Parser, argv: Sequence[str], positional: str = "file"
) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own arguments, and the words of the overrides.

    Words after a `--field` are its values, up to the next option. The positional argument comes before them; a FILE
    may come last, since it ends in .py.
    """
    takes = {option: action.nargs != 0 for action in parser._actions for option in action.option_strings}
    own: list[str] = []
    rest: list[str] = []
    words, mine = list(argv), True
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name in takes:
            own.append(word)
            if takes[name] and not equals and words:
                own.append(words.pop(0))
            mine = True
        elif word.startswith("--"):
            rest.append(word)
            mine = False
        elif not mine:
            rest.append(word)
        else:
            own.append(word)
            mine = True
    found = parser.parse(own)
    if getattr(found, positional) is None and rest and rest[-1].endswith(".py"):
        setattr(found, positional, rest.pop())
    return found, rest
