"""Stable Diffusion 1.5: text to pictures of 512 pixels in latents (Rombach et al. 2022), by its own recipe.

    jaxgen import DIR/vae models/sd_vae                # the autoencoder, as diffusers keeps it ...
    jaxgen import DIR/clip models/clip_l14             # ... and CLIP ViT-L/14, as transformers does
    jaxgen train experiments/diffusion/sd15.py --data.path 'DATA/*.tar'

DATA holds pictures with captions as webdataset shards, as img2dataset writes them: the released weights have seen
LAION-2B (Schuhmann et al. 2022, laion.ai), then its pictures of high aesthetic score, with batches of 2048. The text
encoder and the autoencoder stay as they are. Not run in full yet. The small form trains the small autoencoder of
autoencoder.py first, and then makes drawn scenes.
"""

import dataclasses

from jaxgen.data.huggingface import Existing
from jaxgen.data.imagetext import ImageText
from jaxgen.data.tokenizers import Words
from jaxgen.data.transforms import CenterCrop, Resize
from jaxgen.diffusion.paths import Table
from jaxgen.diffusion.predictions import Epsilon
from jaxgen.diffusion.weightings import Steps
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.text import TextTower
from jaxgen.models.unet import UNet
from jaxgen.pretrained import Pretrained
from jaxgen.sampling.diffusion import Sampling
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Constant

SAMPLING = Sampling(steps=25, guidance=7.5)
CLIP_L14 = TextTower(width=768, heads=12, out=768, activation="quick_gelu")

experiment = Experiment(
    name="sd15",
    task=Diffusion(
        UNet(
            out=4, width=320, multipliers=(1, 2, 4, 4), attention=(), readers=(1, 1, 1, 0), heads=8, text=768,
            scale_shift=False, remat="full",
        ),
        path=Table.scaled_linear(),
        prediction=Epsilon(),
        times=Steps(1000),
        text=Pretrained("models/clip_l14", "task.text", like=CLIP_L14),
        autoencoder=Pretrained("models/sd_vae", like=Autoencoder(scale=0.18215)),
        kept=1,
        masked=False,
        locked=("text",),
    ),
    data=ImageText(
        path="data/laion/*.tar",
        image="jpg",
        caption="caption",
        tokenizer=Existing("models/clip_l14/tokenizer"),
        length=77,
        size=512,
        augment=(Resize(512), CenterCrop(512)),
        heldout=0.0001,
        max_bad=0.05,
    ),
    optimizer=AdamW(learning_rate=1e-4, b2=0.999, weight_decay=0.01, schedule=Constant(warmup=10_000)),
    batch_size=2048,
    steps=595_000,
    ema=Ema(0.9999),
    evaluations=(HeldOut(every=10_000), PicturePreview(every=10_000, n=16, sampling=SAMPLING)),
    checkpoint=Checkpointing(every=5000),
    topology="v5p:4x4x4",
)  # fmt: skip

smoke = dataclasses.replace(
    experiment,
    name="sd15-smoke",
    task=dataclasses.replace(
        experiment.task,
        network=experiment.task.network.clone(
            width=16, multipliers=(1, 2), readers=(0, 1), blocks=1, heads=2, groups=8, text=64
        ),
        text=CLIP_L14.clone(vocab_size=128, width=64, depth=1, heads=2, out=64, max_length=24),
        autoencoder=Pretrained("experiments/diffusion/autoencoder.py"),
        locked=(),
    ),
    data=ImageText(size=32, tokenizer=Words(), length=24),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=2e-3, schedule=Constant(warmup=20)),
    batch_size=32,
    steps=150,
    ema=Ema(0.98),
    evaluations=(HeldOut(), PicturePreview(n=8, sampling=dataclasses.replace(SAMPLING, steps=8, guidance=3.0))),
    target=Target("eval/heldout/error", at_most=0.6),
)
