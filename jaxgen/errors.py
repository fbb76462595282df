"""Errors that a person causes: one clear sentence, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was wrong and what would be right, in one sentence. The command line prints it alone and exits with 2."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the choice closest to `name`, or an empty string when none is close."""
    found = difflib.get_close_matches(name, [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""
