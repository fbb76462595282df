"""The autoencoder of latent diffusion (Rombach et al. 2022) for pictures of 64 pixels: emoji as 16 x 16 places of 4.

    jaxgen train experiments/diffusion/autoencoder.py --data.root DIR    # DIR holds emoji72.tar
    jaxgen train experiments/diffusion/autoencoder.py --smoke            # drawn scenes, a minute

`emoji72.tar` is that of experiments/clip/emoji.py, and the same tenth is held out. Measured are PSNR and SSIM of
held-out pictures; the sheet shows them beside their reconstructions. The mean and standard deviation of the latents are
measured on the way and kept with the weights. Seen of the small form: 22.6 dB and an SSIM of 0.82 after 200 steps.

The KL-f8 of Stable Diffusion is `Autoencoder()` as it stands, on pictures of 256 pixels with `Discriminator()`,
`perceptual=LPIPS("vgg_lpips.safetensors")`, `kl_weight=1e-6`, `start=50_001`, `adversarial_weight=0.5`
and Adam of 4.5e-6 an example (b1 0.5, b2 0.9); KL-f4 has `multipliers=(1, 2, 4), latent=3`.
"""

import dataclasses

from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.transforms import Flip, RandomResizedCrop
from jaxgen.evaluation.reconstruction import Reconstruction
from jaxgen.experiment import Experiment, Target
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.discriminator import Discriminator
from jaxgen.tasks.autoencoder import Autoencoding
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="autoencoder",
    task=Autoencoding(
        Autoencoder(width=64, multipliers=(1, 2, 4)),
        Discriminator(depth=2),
        start=4000,
        ramp=2000,
    ),
    data=LabelledImages(
        path="emoji72.tar",
        image="file",
        label="group",
        heldout=0.1,
        group_by="concept",
        group_match="mer(?=man|maid|person)|.+",  # whose variants have concepts of their own
        size=64,
        augment=(RandomResizedCrop(64, scale=(0.6, 1.0)), Flip()),
    ),
    optimizer=AdamW(learning_rate=3e-4, b1=0.5, b2=0.9, weight_decay=0.0, schedule=Cosine(warmup=200)),
    batch_size=64,
    steps=20_000,
    evaluations=(Reconstruction(every=2000),),
    checkpoint=Checkpointing(every=2000),
    topology="v5e:2x2",
)

smoke = dataclasses.replace(
    experiment,
    name="autoencoder-smoke",
    task=Autoencoding(
        Autoencoder(width=8, multipliers=(1, 2), blocks=1, groups=4, attention=False),
        Discriminator(width=8, depth=2, norm="group", groups=4),
        start=120,
        ramp=40,
    ),
    data=LabelledImages(size=32),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=3e-3, schedule=Cosine(warmup=20)),
    batch_size=8,
    steps=200,
    evaluations=(Reconstruction(),),
    target=Target("eval/reconstruction/psnr", at_least=19.0),
)
