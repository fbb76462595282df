"""`jaxgen train FILE`."""

import sys
from collections.abc import Sequence

from jaxgen import runtime
from jaxgen.cli import options
from jaxgen.cli.main import DONE, PREEMPTED


def parser() -> options.Parser:
    parser = options.Parser(
        "train",
        "Trains the experiment of a file, or goes on with the run that its directory holds.",
        usage="jaxgen train FILE [--smoke] [--run-dir DIR] [--resume] [--profile] [--field.path value ...]",
        add_help=False,
    )
    options.add_file(parser)
    parser.add_argument("--run-dir", metavar="DIR", help="where the run is kept (runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on with a run; a mistake where there is none")
    parser.add_argument("--profile", action="store_true", help="write a trace for TensorBoard or Perfetto")
    options.add_trust(parser)
    options.add_devices(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Trains, and returns 0 when the run is done, 75 when it was preempted and saved."""
    from jaxgen.cli.experiments import chosen

    found = chosen(parser(), argv)
    if found is None:
        return DONE
    arguments, experiment = found
    runtime.start()
    from jaxgen.experiment import train

    result = train(
        experiment, run_dir=arguments.run_dir, resume=arguments.resume, profile=arguments.profile,
        trust=(*arguments.trust, arguments.file),
    )
    if result.preempted:
        print("jaxgen: preempted, and saved; the same command goes on", file=sys.stderr)
        return PREEMPTED
    return DONE
