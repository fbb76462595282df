"""ResNet-50 on ImageNet-1k in 90 epochs (He et al. 2016, in the large-batch recipe of Goyal et al. 2017).

    jaxgen train experiments/resnet/resnet50_imagenet.py                       # tfds:imagenet2012
    jaxgen train experiments/resnet/resnet50_imagenet.py --data.path DIR/train --data.heldout-path DIR/val

Goyal et al. report 76.4 % top-1 (23.6 % error). Here with a cosine in place of their steps. TFDS makes its copy from
ILSVRC2012's own archives, which image-net.org gives to those who register; a folder holds one folder a class. Not run
in full yet. The small form tells drawn shapes and colours apart.
"""

import dataclasses

from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.transforms import CenterCrop, Flip, RandomResizedCrop, Resize
from jaxgen.evaluation.calibration import Accuracy
from jaxgen.experiment import Experiment, Target
from jaxgen.models.resnet import ResNet
from jaxgen.tasks.classification import Classification
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="resnet50_imagenet",
    task=Classification(ResNet(50, out=1000), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    data=LabelledImages(
        path="tfds:imagenet2012#train",
        heldout_path="tfds:imagenet2012#validation",
        size=224,
        augment=(RandomResizedCrop(224), Flip()),
        fit=(Resize(256), CenterCrop(224)),
    ),
    # their 1e-4 goes through the momentum, which makes it ten times as much
    optimizer=SGD(learning_rate=0.4, nesterov=True, weight_decay=1e-3, schedule=Cosine(warmup=6256, final=0.0)),
    batch_size=1024,
    steps=112_603,
    evaluations=(Accuracy(every=5000),),
    checkpoint=Checkpointing(every=2500),
    topology="v5e:4x4",
)

smoke = dataclasses.replace(
    experiment,
    name="resnet50_imagenet-smoke",
    task=Classification(ResNet(18, width=16, out=24, small=True)),
    data=LabelledImages(size=32, augment=(RandomResizedCrop(32, scale=(0.5, 1.0)), Flip()), heldout=0.05),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=0.1, schedule=Cosine(warmup=20, final=0.0)),
    batch_size=64,
    steps=200,
    evaluations=(Accuracy(),),
    target=Target("eval/accuracy/top1", at_least=0.5),
)
