"""CLIP of emoji trained by jaxgen and by PyTorch: same towers, data, steps and augmentation; quality and step time.

    pip install -e . torch && python tests/bench/emoji_vs_torch.py DIR [--seeds 3] [--steps 600]

DIR holds emoji72.tar (see experiments/clip/emoji.py). Each side is a process of its own; they take turns, and are given
the same batches. Prints for each seed the recall among the held-out pictures, both ways, and in the end the means with
their standard errors and the ratio of the medians of the step times; below 1 jaxgen is faster.
"""

import argparse
import dataclasses
import math
import multiprocessing
import statistics
import time
from pathlib import Path

import numpy as np

TURN, PAUSE = 20, 0.3  # steps of a turn, and seconds between turns in which the threads of the other fall asleep
KS = (1, 5, 10)


def experiment_in(directory: str, steps: int):
    from jaxgen.experiment import load

    experiment = load(Path(__file__).parents[2] / "experiments/clip/emoji.py").experiment
    data = dataclasses.replace(experiment.data, path=str(Path(directory) / experiment.data.path))
    return dataclasses.replace(experiment, data=data, steps=steps or experiment.steps)


def jaxgen_side(experiment, seed: int):
    from jaxgen import runtime

    runtime.prepare()
    runtime.start()
    import jax

    from jaxgen.training.loop import program_of

    program = program_of(experiment)
    state = program.init(seed)
    task = experiment.task
    embed = jax.jit(lambda p, b: (task.embed_images(p, b), task.embed_texts(p, b)))

    def step(batch) -> float:
        nonlocal state
        state, metrics = program.step(state, jax.device_put(batch, program.batch_shardings))
        return float(metrics["loss"])

    return step, lambda batch: [np.asarray(x) for x in embed(state.params, batch)]


def torch_side(experiment, seed: int):
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    torch.manual_seed(seed)
    task, optimizer = experiment.task, experiment.optimizer

    class Block(nn.Module):
        def __init__(self, tower, causal: bool):
            super().__init__()
            width, self.heads, self.causal = tower.width, tower.heads, causal
            self.norm1, self.norm2 = (nn.LayerNorm(width, eps=tower.norm_epsilon) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            std = width**-0.5
            stds = (std, std / math.sqrt(2 * tower.depth), std / math.sqrt(2), std / math.sqrt(2 * tower.depth))
            for layer, s in zip((self.qkv, self.out, self.up, self.down), stds, strict=True):
                nn.init.normal_(layer.weight, std=s)
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            qkv = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*qkv, is_causal=self.causal)
            x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Tower(nn.Module):
        def __init__(self, tower, places: int, causal: bool, bias: bool):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(places, tower.width) * (0.01 if causal else tower.width**-0.5))
            self.blocks = nn.Sequential(*(Block(tower, causal) for _ in range(tower.depth)))
            self.norm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
            self.head = nn.Linear(tower.width, tower.out, bias=bias)
            nn.init.normal_(self.head.weight, std=tower.width**-0.5)
            if bias:
                nn.init.zeros_(self.head.bias)

        def forward(self, x):
            return self.norm(self.blocks(x + self.positions))

    class CLIP(nn.Module):
        def __init__(self):
            super().__init__()
            image, text = task.image, task.text
            self.patch = image.patch
            self.patches = nn.Linear(3 * image.patch**2, image.width)
            nn.init.normal_(self.patches.weight, std=(3 * image.patch**2) ** -0.5)
            nn.init.zeros_(self.patches.bias)
            self.image = Tower(image, (image.image_size // image.patch) ** 2, False, image.head_bias)
            self.tokens = nn.Embedding(text.vocab_size, text.width)
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.text = Tower(text, text.max_length, True, text.head_bias)
            self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        def embed_image(self, image):
            x = (image.float() / 255 - 0.5) / 0.5
            b, h, w, c = x.shape
            p = self.patch
            x = x.view(b, h // p, p, w // p, p, c).transpose(2, 3).reshape(b, -1, p * p * c)
            return F.normalize(self.image.head(self.image(self.patches(x)).mean(1)), dim=-1)

        def embed_text(self, tokens, lengths):
            x = self.text(self.tokens(tokens))
            return F.normalize(self.text.head(x[torch.arange(len(x)), lengths - 1]), dim=-1)

    model = CLIP()
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1]
    others = [p for name, p in model.named_parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(optimizer.b1, optimizer.b2), eps=optimizer.eps)
    rates = iter([float(optimizer.rate(i, experiment.steps)) for i in range(experiment.steps)])

    def tensors(batch):
        return torch.from_numpy(batch["image"]), *(torch.from_numpy(batch[k]).long() for k in ("tokens", "lengths"))

    def step(batch) -> float:
        rate = next(rates)
        for group in adam.param_groups:
            group["lr"] = rate
        image, tokens, lengths = tensors(batch)
        adam.zero_grad(set_to_none=True)
        logits = model.scale.exp().clamp(max=100) * model.embed_image(image) @ model.embed_text(tokens, lengths).T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip)
        adam.step()
        return loss.item()

    @torch.no_grad()
    def embed(batch):
        image, tokens, lengths = tensors(batch)
        return [model.embed_image(image).numpy(), model.embed_text(tokens, lengths).numpy()]

    return step, embed


def work(pipe, make, experiment, seed) -> None:
    step, embed = make(experiment, seed)
    while (asked := pipe.recv()) is not None:
        kind, batches = asked
        if kind == "embed":
            pipe.send(embed(batches))
            continue
        times, losses = [], []
        for batch in batches:
            begin = time.perf_counter()
            losses.append(step(batch))
            times.append(time.perf_counter() - begin)
        pipe.send((times, losses))


def recalls(queries, answers, captions) -> list[float]:
    similar = queries @ answers.T
    right = captions[:, None] == captions
    rank = (similar > np.where(right, similar, -np.inf).max(1, keepdims=True)).sum(1)
    return [float(np.mean(rank < k)) for k in KS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="where emoji72.tar is")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0 for the experiment's")
    arguments = parser.parse_args()
    experiment = experiment_in(arguments.directory, arguments.steps)
    data = experiment.data.prepare()
    held = data.heldout()
    heldout = {k: np.stack([held[i][k] for i in range(len(held))]) for k in ("image", "tokens", "lengths")}
    captions = np.unique(heldout["tokens"], axis=0, return_inverse=True)[1].reshape(-1)
    context = multiprocessing.get_context("spawn")
    found, seconds = {"jaxgen": [], "torch": []}, {"jaxgen": [], "torch": []}
    for seed in range(arguments.seeds):
        examples, size = data.train(seed), experiment.batch_size
        pipes = {}
        for name, make in (("jaxgen", jaxgen_side), ("torch", torch_side)):
            pipes[name], other = context.Pipe()
            context.Process(target=work, args=(other, make, experiment, seed), daemon=True).start()
        for first in range(0, experiment.steps, TURN):
            rows = [[examples[i] for i in range(s * size, (s + 1) * size)]
                    for s in range(first, min(first + TURN, experiment.steps))]
            batches = [{k: np.stack([e[k] for e in row]) for k in row[0]} for row in rows]
            for name, pipe in pipes.items():
                time.sleep(PAUSE)
                pipe.send(("steps", batches))
                times, losses = pipe.recv()
                seconds[name] += times if first else []
                if first // TURN % 10 == 9:
                    loss = statistics.mean(losses)
                    print(f"seed {seed}, step {first + len(batches)}, {name}: loss {loss:.3f}", flush=True)
        for name, pipe in pipes.items():
            pipe.send(("embed", heldout))
            images, texts = pipe.recv()
            pipe.send(None)
            found[name].append([recalls(images, texts, captions), recalls(texts, images, captions)])
            told = "; ".join(f"{way} " + " ".join(f"R@{k} {r:.3f}" for k, r in zip(KS, found[name][-1][w], strict=True))
                             for w, way in enumerate(("image to text", "text to image")))
            print(f"seed {seed}, {name}: {told}", flush=True)
    for name, runs in found.items():
        runs = np.asarray(runs)
        error = runs.std(0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else np.zeros(runs.shape[1:])
        for w, way in enumerate(("image to text", "text to image")):
            print(f"{name}, {way}: " + ", ".join(
                f"R@{k} {m:.4f} +- {e:.4f}" for k, m, e in zip(KS, runs.mean(0)[w], error[w], strict=True)))
    a, b = (statistics.median(seconds[name]) for name in ("jaxgen", "torch"))
    print(f"chance R@10 {10 / len(captions):.4f}; step: jaxgen {a:.4f} s, torch {b:.4f} s, ratio {a / b:.2f}")


if __name__ == "__main__":
    main()
