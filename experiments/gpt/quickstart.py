"""A small GPT on Python's own documentation and standard library, in minutes on a laptop's CPU."""

from jaxgen.data.text import Text
from jaxgen.data.tokenizers import SentencePiece
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.preview import TextPreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.gpt import GPT
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="quickstart",
    task=LanguageModel(
        GPT(
            vocab_size=4096, depth=4, width=256, heads=4, max_length=256,
            positions="rope", norm="rmsnorm", activation="swiglu", bias=False,
        )
    ),
    data=Text(tokenizer=SentencePiece(vocab_size=4096), length=256),
    optimizer=AdamW(learning_rate=2e-3, schedule=Cosine(warmup=50, final=0.05)),
    batch_size=16,
    steps=600,
    evaluations=(HeldOut(every=200), TextPreview(every=200, prompts=("", "def "))),
    checkpoint=Checkpointing(every=200),
    log=Logging(every=10),
    topology="v5e:2x2",
)  # fmt: skip
