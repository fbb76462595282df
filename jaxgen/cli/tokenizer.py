"""`jaxgen tokenizer train`."""

from collections.abc import Sequence

from jaxgen import runtime
from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError, nearest

USAGE = "jaxgen tokenizer train [PATH] --vocab-size N --output FILE.model|DIR"


def parser() -> options.Parser:
    parser = options.Parser("tokenizer train", "Learns a SentencePiece tokenizer from text.", usage=USAGE)
    parser.add_argument("path", nargs="?", default="", metavar="PATH", help="as data.path (Python's documentation)")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="entries (4096)")
    parser.add_argument("--output", required=True, metavar="OUT", help="a .model file, or a directory")
    parser.add_argument("--field", default="text", metavar="NAME", help="where the text is in JSON lines (text)")
    return parser


def run(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}")
        return DONE
    if not argv or argv[0] != "train":
        hint = nearest(argv[0], ["train"]) if argv else ""
        raise UserError(f"the command is jaxgen tokenizer train{hint}")
    arguments = parser().parse(argv[1:])
    if arguments.vocab_size < 1:
        raise UserError(f"--vocab-size is {arguments.vocab_size}, which should be at least 1")
    runtime.prepare()
    from jaxgen.data.tokens import train_tokenizer
    from jaxgen.training.metrics import Console

    tokenizer = train_tokenizer(
        arguments.path, arguments.vocab_size, arguments.output, arguments.field, progress=Console(1, "").prepare
    )
    print(f"{arguments.output}: {tokenizer.vocab_size} entries")
    return DONE
