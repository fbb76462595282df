"""Emoji of their names: the 3,161 real pictures of experiments/clip/emoji.py, at 64 pixels.

    jaxgen train experiments/diffusion/emoji.py --data.root DIR    # DIR holds emoji72.tar
    jaxgen sample runs/emoji_diffusion --prompt "a black cat" --guidance 3 --n 16

Without a folder the small form makes drawn scenes of their captions. Not run in full yet.
"""

import dataclasses

from jaxgen.data.imagetext import ImageText
from jaxgen.data.tokenizers import SentencePiece, Words
from jaxgen.data.transforms import RandomResizedCrop
from jaxgen.diffusion.paths import Flow
from jaxgen.diffusion.predictions import X0
from jaxgen.diffusion.weightings import LogitNormal, VelocityWeight
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.dit import DiT
from jaxgen.models.text import TextTower
from jaxgen.sampling.diffusion import Sampling
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

SAMPLING = Sampling(steps=20, guidance=3.0)

experiment = Experiment(
    name="emoji_diffusion",
    task=Diffusion(
        DiT(out=3, patch=4, width=384, depth=12, heads=6, text=256, pooled=256, dropout=0.1),
        path=Flow(shift=2.0),  # of 64 pixels where 32 want none
        prediction=X0(),
        weighting=VelocityWeight(),
        times=LogitNormal(),
        text=TextTower(vocab_size=1024, width=256, depth=3, heads=4, max_length=24, out=256, mask="bidirectional"),
    ),
    data=ImageText(
        path="emoji72.tar",
        image="file",
        heldout=0.1,
        group_by="concept",
        group_match="mer(?=man|maid|person)|.+",  # whose variants have concepts of their own
        size=64,
        augment=(RandomResizedCrop(64, scale=(0.9, 1.0), ratio=(1.0, 1.0)),),
        tokenizer=SentencePiece(vocab_size=1024),
        length=24,
    ),
    optimizer=AdamW(learning_rate=5e-4, weight_decay=0.01, schedule=Cosine(warmup=1000)),
    batch_size=256,
    steps=40_000,
    ema=Ema(0.9995),
    evaluations=(HeldOut(every=5000), PicturePreview(every=5000, n=32, sampling=SAMPLING)),
    checkpoint=Checkpointing(every=5000),
    topology="v5e:2x4",
)

smoke = dataclasses.replace(
    experiment,
    name="emoji_diffusion-smoke",
    task=dataclasses.replace(
        experiment.task,
        network=experiment.task.network.clone(width=96, depth=3, heads=3, text=64, pooled=64),
        text=experiment.task.text.clone(vocab_size=128, width=64, depth=1, heads=2, out=64),
    ),
    data=ImageText(size=32, tokenizer=Words(), length=24),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=2e-3, schedule=Cosine(warmup=20)),
    batch_size=64,
    steps=150,
    ema=Ema(0.99),
    evaluations=(HeldOut(), PicturePreview(n=8, sampling=dataclasses.replace(SAMPLING, steps=8))),
    target=Target("eval/heldout/loss", at_most=1.0),
)
