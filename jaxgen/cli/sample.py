"""`jaxgen sample RUN`: texts or pictures, as the run has learned."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError

TEXT = {"max_new_tokens": 256, "temperature": 0.8, "top_p": 0.95}
"""Options of language models, with their defaults."""
PICTURES = (
    "class", "negative", "guidance", "interval", "rescale", "image_guidance", "solver", "grid", "steps", "size",
    "aspect", "image", "strength", "mask", "extend", "image_noise", "guide", "guide_step", "guide_scale", "frames",
    "out",
)  # fmt: skip
"""Options of models that make pictures; what is not given is as in the run's own previews."""


def parser() -> options.Parser:
    parser = options.Parser("sample", "Samples from a run: texts or pictures, as it has learned.")
    options.add_run(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT",
                        help="text to continue, or what a picture shows (may be repeated)")
    parser.add_argument("--n", type=int, metavar="N", help="samples of each prompt or class (a text, 16 pictures)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample (0)")
    parser.add_argument("--json", action="store_true", help="print data for programs")
    text = parser.add_argument_group("language models")
    text.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of each sample (256)")
    text.add_argument("--temperature", type=float, help="0 takes the likeliest token (0.8)")
    text.add_argument("--top-p", type=float, help="draw from this much of the probability (0.95)")
    pictures = parser.add_argument_group("pictures", "what is not given is as in the run's own previews")
    pictures.add_argument("--class", action="append", metavar="NAME", help="name or number (may be repeated)")
    pictures.add_argument("--negative", metavar="TEXT", help="what pictures should not show; needs --guidance")
    pictures.add_argument("--guidance", type=float, metavar="SCALE", help="how much the condition counts; 1 for none")
    pictures.add_argument("--interval", type=interval, metavar="LOW,HIGH",
                          help="times from 0 to 1 between which it counts")
    pictures.add_argument("--rescale", type=float, metavar="SHARE",
                          help="way back from its contrast to that of the picture without guidance, 0 to 1")
    pictures.add_argument("--solver", metavar="NAME", help="ddim, euler, heun, dpmpp_2m, unipc, ...")
    pictures.add_argument("--grid", metavar="NAME", help="how steps are spread: uniform, karras, exponential, shifted")
    pictures.add_argument("--steps", type=int, metavar="N", help="steps of the solver")
    pictures.add_argument("--size", metavar="HxW", help="pixels, where the network takes other sizes")
    pictures.add_argument("--aspect", metavar="W:H",
                          help="width to height, such as 3:2, where the run has learned pictures of several shapes: "
                               "takes the nearest of them")
    pictures.add_argument("--image", metavar="FILE",
                          help="a picture: to begin with, or for a run that learned it, to be edited as --prompt says, "
                               "filled where --mask is white, or enlarged")
    pictures.add_argument("--strength", type=float,
                          help="variations: how far to leave --image, from 0 to 1 (0.6; with a mask, or for a run that "
                               "edits, 1)")
    pictures.add_argument("--mask", metavar="FILE", help="white where --image is to be made anew")
    pictures.add_argument("--extend", metavar="L,T,R,B",
                          help="pixels to add at the left, top, right and bottom of --image, made anew")
    pictures.add_argument("--image-guidance", type=float, metavar="SCALE",
                          help="how much --image counts in an edit, where --guidance is the instruction's; 1 for none")
    pictures.add_argument("--image-noise", type=float, metavar="S",
                          help="noise on a small --image that a model has drawn, 0 to 1 (0)")
    pictures.add_argument("--guide", metavar="RUN",
                          help="a run that guides: a weaker one of the same kind, away from what it does; or a CLIP or "
                               "a classifier, toward pictures of which it says the prompt or class")
    pictures.add_argument("--guide-step", type=options.step, metavar="N|latest|best", help="its step (latest)")
    pictures.add_argument("--guide-scale", type=float, metavar="SCALE", help="how much it counts (2)")
    pictures.add_argument("--frames", action="store_true", help="also a sheet of the first picture after each step")
    pictures.add_argument("--out", metavar="DIR", help="where pictures go (RUN/drawn/NAME)")
    return parser


def interval(text: str) -> tuple[float, float]:
    """Two numbers, such as "0.2,0.8"."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--interval is {text!r}, which should be two times, like 0.2,0.8") from None
    return low, high


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    for name, least in (("n", 1), ("max_new_tokens", 1), ("temperature", 0), ("steps", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, which should be at least {least}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p is {arguments.top_p}, which should be above 0 and at most 1")
    for name in ("strength", "image_noise", "rescale"):
        if (value := getattr(arguments, name)) is not None and not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, which should be from 0 to 1")
    for name in ("guidance", "image_guidance", "guide_scale"):
        if (value := getattr(arguments, name)) is not None and not abs(value) <= 1e9:
            raise UserError(f"--{name.replace('_', '-')} is {value}, which should be a number of at most 1e9")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed is {arguments.seed}, which should be from 0 to {2**32 - 1}")
    from jaxgen.cli.opened import open_run

    opened = open_run(arguments, "sample")
    from jaxgen.tasks.language import LanguageModel

    task = opened.experiment.task
    if isinstance(task, LanguageModel):
        _only(arguments, opened, PICTURES, "texts")
        return continue_texts(arguments, opened)
    if hasattr(task, "sample"):
        _only(arguments, opened, TEXT, "pictures")
        from jaxgen.cli.pictures import draw

        return draw(arguments, opened)
    raise UserError(f"{opened.directory} is a run of a {type(task).__name__}, which makes neither texts nor pictures")


def _only(arguments: argparse.Namespace, opened: Any, others: Sequence[str], what: str) -> None:
    """UserError for an option that is for runs of another kind."""
    for name in others:
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} is of no use here: {opened.directory} makes {what}")


def continue_texts(arguments: argparse.Namespace, opened: Any) -> int:
    """Prints what a language model writes after each prompt."""
    from jaxgen.data.tokenizers import load
    from jaxgen.evaluation.preview import continue_texts
    from jaxgen.sampling.text import Sampling

    chosen = {name: value if (value := getattr(arguments, name)) is not None else usual for name, usual in TEXT.items()}
    prompts = [prompt for prompt in arguments.prompt or [""] for _ in range(arguments.n or 1)]
    with opened.program.sharding.use():
        texts = continue_texts(
            opened.experiment.task.model, opened.params["model"], load(opened.directory / "tokenizer"), prompts,
            chosen["max_new_tokens"], Sampling(chosen["temperature"], chosen["top_p"]), arguments.seed,
            told=lambda text: print(text, file=sys.stderr),
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
