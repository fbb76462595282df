"""A training step of jaxgen beside the same model in PyTorch on this machine's CPU: a process each, taking turns.

    pip install -e . torch && python tests/bench/step_vs_torch.py [--rounds 7] [--size 0] [--unrolled]

Prints the median seconds of a step of each and the ratio of the medians; below 1 jaxgen is faster. Both train GPT-2's
form (biases off, tied head) with AdamW and gradient clipping in float32, from batches that are already in memory.
"""

import argparse
import math
import multiprocessing
import statistics
import time

import numpy as np

# (depth, width, heads, length, batch, vocabulary)
SIZES = ((4, 128, 4, 64, 12, 128), (6, 384, 6, 256, 12, 128), (12, 768, 12, 512, 2, 50304))
WARM = 6  # steps before the first turn
PAUSE = 0.3  # seconds between turns, in which the threads of the other fall asleep


def torch_step(size, tokens):
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    depth, width, heads, length, _, vocabulary = size

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x):
            qkv = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm = nn.LayerNorm(width, bias=False)
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02 / (math.sqrt(2 * depth) if "out" in name or "down" in name else 1))

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
            logits = self.norm(self.blocks(x)) @ self.tokens.weight.T
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs, targets = (torch.from_numpy(t.astype(np.int64)) for t in (tokens[:, :-1].copy(), tokens[:, 1:].copy()))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    blas = "MKL" if torch.backends.mkl.is_available() else "other BLAS"
    capability = torch.backends.cpu.get_cpu_capability()
    return step, f"torch {torch.__version__} with {blas}, {capability}, {torch.get_num_threads()} threads"


def jaxgen_step(size, tokens, scan: bool):
    from jaxgen import runtime

    runtime.prepare()
    runtime.start()
    import jax

    from jaxgen.models.gpt import GPT
    from jaxgen.sharding import RULES, Mesh, Sharding
    from jaxgen.tasks.language import LanguageModel
    from jaxgen.training.optimizers import AdamW
    from jaxgen.training.step import Program

    depth, width, heads, length, batch, vocabulary = size
    model = GPT(vocab_size=vocabulary, depth=depth, width=width, heads=heads, max_length=length, bias=False, scan=scan)
    spec = {name: jax.ShapeDtypeStruct((batch, length), np.int32) for name in ("tokens", "targets")}
    sharding = Sharding(Mesh().build(jax.devices()[:1]), RULES)
    program = Program(LanguageModel(model), AdamW(learning_rate=3e-4), sharding, spec, steps=1000)
    state = program.init(0)
    data = jax.device_put({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, program.batch_shardings)

    def step() -> float:
        nonlocal state
        state, metrics = program.step(state, data)
        return float(metrics["loss"])

    return step, f"jax {jax.__version__}"


def work(pipe, make, *arguments) -> None:
    """A process of its own: takes as many steps as it is told to, and sends the seconds of each."""
    step, name = make(*arguments)
    pipe.send((step(), name))
    while count := pipe.recv():
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        pipe.send(times)


def start(make, *arguments):
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    context.Process(target=work, args=(other, make, *arguments), daemon=True).start()
    return pipe


def turn(pipe, count: int) -> list[float]:
    time.sleep(PAUSE)
    pipe.send(count)
    return pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--size", type=int, choices=range(len(SIZES)), help="only this size")
    parser.add_argument("--unrolled", action="store_true", help="jaxgen's blocks unrolled in place of scanned")
    arguments = parser.parse_args()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    for size in SIZES if arguments.size is None else (SIZES[arguments.size],):
        depth, width, _, length, batch, vocabulary = size
        tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1), dtype=np.int32)
        pipes = start(jaxgen_step, size, tokens, not arguments.unrolled), start(torch_step, size, tokens)
        (ours, us), (theirs, them) = (pipe.recv() for pipe in pipes)
        assert abs(ours - theirs) < 0.2, f"the two models' first losses differ: {ours}, {theirs}"
        steps = max(1, round(0.5 / turn(pipes[0], WARM)[-1]))  # a turn takes about half a second
        turn(pipes[1], WARM)
        rounds = [[turn(pipe, steps) for pipe in pipes] for _ in range(arguments.rounds)]
        a, b = (statistics.median(t for pair in rounds for t in pair[i]) for i in range(2))
        for pipe in pipes:
            pipe.send(0)
        print(f"{depth} x {width}, length {length}, batch {batch}, vocabulary {vocabulary}: jaxgen {a:.4f} s, "
              f"torch {b:.4f} s, ratio {a / b:.2f} (CPU {cpu}; {us}; {them})", flush=True)


if __name__ == "__main__":
    main()
