"""`jaxgen sample RUN`."""

import json
from collections.abc import Sequence

from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError


def parser() -> options.Parser:
    parser = options.Parser("sample", "Samples from a run.")
    options.add_run(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue (may be repeated)")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="samples of each prompt (1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens of each sample (256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from this much of the probability (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample (0)")
    parser.add_argument("--json", action="store_true", help="print data for programs")
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    for name, least in (("n", 1), ("max_new_tokens", 1), ("temperature", 0)):
        if (value := getattr(arguments, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, which should be at least {least}")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p is {arguments.top_p}, which should be above 0 and at most 1")
    from jaxgen.cli.opened import open_run

    opened = open_run(arguments, "sample")
    from jaxgen.data.tokenizers import load
    from jaxgen.evaluation.preview import continue_texts
    from jaxgen.sampling.text import Sampling
    from jaxgen.tasks.language import LanguageModel

    task = opened.experiment.task
    if not isinstance(task, LanguageModel):
        raise UserError(f"{opened.directory} is a run of a {type(task).__name__}: only language models are sampled")
    prompts = [prompt for prompt in arguments.prompt or [""] for _ in range(arguments.n)]
    sampling = Sampling(arguments.temperature, arguments.top_p)
    with opened.program.sharding.use():
        texts = continue_texts(
            task.model, opened.params["model"], load(opened.directory / "tokenizer"), prompts, arguments.max_new_tokens,
            sampling, arguments.seed,
        )  # fmt: skip
    if arguments.json:
        samples = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        print(json.dumps({"run": str(opened.directory), "step": opened.step, "samples": samples}, indent=1))
        return DONE
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if i:
            print("\n---\n")
        print(prompt + text)
    return DONE
