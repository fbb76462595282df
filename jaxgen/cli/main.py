"""The command line: finds the verb, and turns what went wrong into one line and an exit code.

0 done, 2 the user's mistake, 75 preempted and saved, 130 interrupted. Nothing heavy is imported here.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from jaxgen.errors import UserError, nearest

VERBS = {
    "train": ("train", "train an experiment, or go on with a run"),
    "show": ("show", "what an experiment is: fields, parameters, FLOPs, sharding"),
    "sample": ("sample", "sample from a run"),
    "eval": ("evaluate", "measure a run"),
    "search": ("search", "rank pictures by how near they are to a text"),
    "ema": ("ema", "average a run's weights over another span of it"),
    "import": ("importing", "make a model directory of another project's weights"),
    "export": ("exporting", "write a run's weights as another project reads them"),
    "tokenizer": ("tokenizer", "train a tokenizer"),
}
FULL = errno.ENOSPC, errno.EDQUOT
UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP
)
"""What a path can be that a person should mend."""
DONE, MISTAKE, PREEMPTED, INTERRUPTED, BROKEN_PIPE = 0, 2, 75, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"jaxgen: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("jaxgen: interrupted", file=sys.stderr, flush=True)
        if argv is None:   # as a program: a save in the background would complain of an end that is no surprise
            os._exit(INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:   # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in (*FULL, *UNUSABLE):
            raise
        what = f"{error.strerror}{error.filename and f': {error.filename}' or ''}"
        done = "; what was saved before is whole, and the same command goes on once there is space"
        print(f"jaxgen: {what}{done * (error.errno in FULL)}", file=sys.stderr)
        return MISTAKE


def _run(argv: list[str]) -> int:
    if not argv:
        print(usage(), file=sys.stderr)
        return MISTAKE
    verb, rest = argv[0], argv[1:]
    if verb in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if verb == "--version":
        from importlib.metadata import version

        print(f"jaxgen {version('jaxgen')}")
        return DONE
    if verb not in VERBS:
        hint = nearest(verb, VERBS) or f"; the commands are {', '.join(VERBS)}"
        raise UserError(f"there is no command '{verb}'{hint}")
    module = importlib.import_module(f"jaxgen.cli.{VERBS[verb][0]}")
    return module.run(rest) or DONE


def usage() -> str:
    """The text of `jaxgen --help`."""
    verbs = "\n".join(f"  {name:<12}{help}" for name, (_, help) in VERBS.items())
    return f"""usage: jaxgen COMMAND ...

Trains, samples and measures generative models in JAX.

commands:
{verbs}

jaxgen COMMAND --help tells more of each; jaxgen train FILE --help lists every field of the experiment."""


if __name__ == "__main__":
    sys.exit(main())
