"""A small GPT on Python's own documentation and standard library: minutes on a laptop's CPU, with no data to fetch.

    jaxgen train experiments/gpt/quickstart.py

The text is the topics of `help()` and the source of the standard library with its docstrings, 9 MB, cut by a tokenizer
of 4,096 entries that is learned first. Whole files are held out by name, without those that training files repeat.
"""

import dataclasses

from jaxgen.data.text import Text
from jaxgen.data.tokenizers import SentencePiece
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.preview import TextPreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.gpt import GPT
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import Muon
from jaxgen.training.schedules import Linear

experiment = Experiment(
    name="quickstart",
    task=LanguageModel(
        GPT(
            vocab_size=4096, depth=4, width=256, heads=4, max_length=256,
            positions="rope", norm="rmsnorm", activation="swiglu", bias=False,
        )
    ),
    data=Text(tokenizer=SentencePiece(vocab_size=4096), length=256),
    optimizer=Muon(learning_rate=0.02, adam_learning_rate=4e-3, schedule=Linear(warmup=10, final=0.05)),
    batch_size=8,
    steps=240,
    evaluations=(HeldOut(every=120), TextPreview(every=120, prompts=("", "def read_", "The following "))),
    checkpoint=Checkpointing(every=120),
    topology="v5e:2x2",
)  # fmt: skip

smoke = dataclasses.replace(
    experiment,
    name="quickstart-smoke",
    task=LanguageModel(
        experiment.task.model.clone(vocab_size=1024, depth=2, width=128, heads=2, max_length=128)
    ),
    data=Text(tokenizer=SentencePiece(vocab_size=1024), length=128, heldout=0.02),
    batch_size=8,
    steps=200,
    evaluations=(HeldOut(batch_size=32), TextPreview(tokens=64)),
    checkpoint=Checkpointing(every=100),
    target=Target("eval/heldout/bits_per_byte", at_most=2.6),
)
