"""nanoGPT's character model of tiny Shakespeare (github.com/karpathy/nanoGPT, config/train_shakespeare_char.py).

    jaxgen train experiments/gpt/shakespeare_char.py --data.path input.txt            # 10.8 M parameters, GPU or TPU
    jaxgen train experiments/gpt/shakespeare_char.py --data.path input.txt --smoke    # nanoGPT's small CPU form

The text is the 1 MB file `data/tinyshakespeare/input.txt` of github.com/karpathy/char-rnn; its last tenth is held out.
nanoGPT reports a validation loss of 1.4697 for the full form and 1.88 for the small one, in nats a character.

Seen of the small form, over three seeds: 1.85. Without a path it trains on Python's documentation, and its target is
for that text.
"""

import dataclasses

from jaxgen.data.text import Text
from jaxgen.data.tokenizers import Characters
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.preview import TextPreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.gpt import GPT
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="shakespeare_char",
    task=LanguageModel(
        GPT(vocab_size=128, depth=6, width=384, heads=6, max_length=256, bias=False, dropout=0.2)
    ),
    data=Text(
        path="data/tinyshakespeare.txt", tokenizer=Characters(128), length=256, heldout=0.1, heldout_by="tail"
    ),
    optimizer=AdamW(learning_rate=1e-3, b2=0.99, schedule=Cosine(warmup=100, final=0.1)),
    batch_size=64,
    steps=5000,
    evaluations=(HeldOut(every=250), TextPreview(every=1000, tokens=256)),
    checkpoint=Checkpointing(every=250),
    topology="v5e:2x2",
)

smoke = dataclasses.replace(
    experiment,
    name="shakespeare_char-smoke",
    task=LanguageModel(GPT(vocab_size=128, depth=4, width=128, heads=4, max_length=64, bias=False)),
    data=dataclasses.replace(experiment.data, path="", length=64),
    batch_size=12,
    steps=2000,
    evaluations=(HeldOut(batch_size=96), TextPreview(tokens=48)),
    checkpoint=Checkpointing(every=1000),
    target=Target("eval/heldout/loss", at_most=1.75),
)
