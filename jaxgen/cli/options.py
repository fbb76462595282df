"""Options that mean the same in every verb."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxgen.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are a UserError."""

    def __init__(self, verb: str, description: str, **settings: Any):
        super().__init__(prog=f"jaxgen {verb}", description=description, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].lower() + message[1:]} (jaxgen {self.prog.partition(' ')[2]} --help tells more)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """All of `argv`; an unknown option is named with the nearest."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            word = unknown[0].partition("=")[0]
            self.error(f"there is no option {word}{nearest(word, known)}" if word.startswith("-") else
                       f"{word!r} is one argument too many")
        return found


def add_file(parser: Parser, what: str = "an experiment file") -> None:
    """FILE or its small form, and a --help that knows FILE's fields (the parser is made with add_help=False)."""
    parser.add_argument("file", metavar="FILE", nargs="?", help=what)
    parser.add_argument("--smoke", action="store_true", help="the small form, for a laptop")
    parser.add_argument("-h", "--help", action="store_true", help="this text, and with FILE every field")


def add_devices(parser: Parser) -> None:
    parser.add_argument("--devices", type=devices, metavar="N", help="simulate N devices on the CPU")


def add_trust(parser: Parser) -> None:
    parser.add_argument(
        "--trust", action="append", default=[], metavar="FILE",
        help="a Python file whose classes may be rebuilt from a run's record (may be repeated)",
    )


def add_run(parser: Parser) -> None:
    """Which run, which step and which weights."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory, or a name under runs/")
    parser.add_argument("--run-dir", metavar="DIR", help="the same as RUN")
    parser.add_argument("--step", default="latest", type=step, metavar="N|latest|best",
                        help="which checkpoint (latest)")
    parser.add_argument("--weights", default="ema", choices=("ema", "raw"),
                        help="averaged weights, where the run keeps them, or raw ones (ema)")
    add_trust(parser)
    add_devices(parser)


def devices(text: str) -> int:
    """A number of devices, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--devices is {text!r}, which should be a number of at least 1")
    return int(text)


def step(text: str) -> int | str:
    """`"latest"`, `"best"` or a number."""
    if text in ("latest", "best"):
        return text
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"--step is {text!r}, which should be a number, latest or best")
    return int(text)
