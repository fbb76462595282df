"""GPT-2 124M on OpenWebText, by nanoGPT's recipe (github.com/karpathy/nanoGPT, config/train_gpt2.py).

    jaxgen train experiments/gpt/gpt2_124m.py --data.path DIR

DIR holds OpenWebText (Gokaslan & Cohen 2019, skylion007.github.io/OpenWebTextCorpus) as JSON lines with a field `text`,
plain or gzip, or as ArrayRecord; 8 million documents, 38 GB. TFDS serves as well, here with One Billion Words:

    pip install 'jaxgen[tfds]' && jaxgen train experiments/gpt/gpt2_124m.py --data.path tfds:lm1b

nanoGPT reaches a validation loss of 2.85 in 600,000 steps of half a million tokens with GPT-2's own tokenizer. The one
here is learned from the data, so compare bits per byte: not run in full yet.
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
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="gpt2_124m",
    task=LanguageModel(GPT(bias=False), loss_chunk=256),  # the defaults of GPT are this model
    data=Text(path="data/openwebtext", tokenizer=SentencePiece(vocab_size=50304), length=1024, heldout=0.0005),
    optimizer=AdamW(learning_rate=6e-4, schedule=Cosine(warmup=2000, final=0.1)),
    batch_size=480,
    microbatches=3,
    steps=600_000,
    evaluations=(HeldOut(every=1000), TextPreview(every=5000)),
    checkpoint=Checkpointing(every=1000),
    topology="v5e:4x4",
)

smoke = dataclasses.replace(
    experiment,
    name="gpt2_124m-smoke",
    task=LanguageModel(
        GPT(vocab_size=1024, depth=3, width=192, heads=3, max_length=128, bias=False), loss_chunk=32
    ),
    data=Text(tokenizer=SentencePiece(vocab_size=1024), length=128, heldout=0.02),
    optimizer=AdamW(learning_rate=2e-3, schedule=Cosine(warmup=20, final=0.1)),
    batch_size=16,
    microbatches=1,
    steps=250,
    evaluations=(HeldOut(), TextPreview(tokens=64)),
    checkpoint=Checkpointing(every=200),
    target=Target("eval/heldout/bits_per_byte", at_most=2.75),
)
