"""The 8-billion-parameter form of Llama 3 (Llama Team 2024, arXiv:2407.21783, table 3), on 64 chips of TPU v5p.

    jaxgen train experiments/gpt/llama3_8b.py --data.path gs://BUCKET/text --data.tokenizer.path tokenizer.model

The data is any text, as JSON lines or ArrayRecord; the tokenizer a SentencePiece model, or one learned from the text.
Parameters, gradients and optimizer state are split over all 64 chips; a step takes 128 sequences of 8,192 tokens, one
million in all. Documents are packed whole, with no attention across. Not run in full yet.
"""

import dataclasses

from jaxgen.data.text import Text
from jaxgen.data.tokenizers import SentencePiece
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.preview import TextPreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.gpt import GPT
from jaxgen.nn.rope import Rope
from jaxgen.sharding import Mesh
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

model = GPT(
    vocab_size=128_256, depth=32, width=4096, heads=32, kv_heads=8, mlp_width=14_336, max_length=8192,
    positions="rope", rope=Rope(theta=500_000.0), norm="rmsnorm", activation="swiglu", bias=False, tied=False,
    remat="full",
)  # fmt: skip

experiment = Experiment(
    name="llama3_8b",
    task=LanguageModel(model, loss_chunk=1024),
    data=Text(
        path="data/text", tokenizer=SentencePiece(vocab_size=128_256), length=8192, packing="documents", heldout=0.0005
    ),
    optimizer=AdamW(learning_rate=3e-4, schedule=Cosine(warmup=2000, final=0.1)),
    batch_size=128,
    steps=1_000_000,
    mesh=Mesh(data=1, fsdp=-1),
    evaluations=(HeldOut(every=2000), TextPreview(every=5000)),
    checkpoint=Checkpointing(every=1000),
    topology="v5p:4x4x4",
)

smoke = dataclasses.replace(
    experiment,
    name="llama3_8b-smoke",
    task=LanguageModel(
        model.clone(vocab_size=1024, depth=3, width=192, heads=6, kv_heads=2, mlp_width=512, max_length=128),
        loss_chunk=32,
    ),
    data=Text(tokenizer=SentencePiece(vocab_size=1024), length=128, packing="documents", heldout=0.02),
    optimizer=AdamW(learning_rate=2e-3, schedule=Cosine(warmup=20, final=0.1)),
    batch_size=16,
    steps=250,
    evaluations=(HeldOut(), TextPreview(tokens=64)),
    checkpoint=Checkpointing(every=200),
    target=Target("eval/heldout/bits_per_byte", at_most=2.45),
)
