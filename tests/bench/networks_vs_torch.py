"""A training step of a diffusion network of jaxgen beside diffusers' on this machine's CPU: a process each, in turns.

    pip install -e . torch diffusers && python tests/bench/networks_vs_torch.py [--rounds 7] [--case 0] [--unrolled]

Prints the median seconds of a step of each and the ratio of the medians; below 1 jaxgen is faster. Both take noisy
pictures and times that are in memory, the mean squared error, and AdamW, in float32.
"""

import argparse
import statistics

import numpy as np
from step_vs_torch import WARM, start, turn

# name: (side, channels, batch)
CASES = {"unet of 5 M": (32, 3, 16), "unet of 36 M": (32, 3, 16), "DiT-S/2": (32, 4, 16)}


def theirs_step(case, arrays):
    import diffusers
    import torch

    def unet(features, attends, size):
        kinds = ["AttnDownBlock2D" if level == attends else "DownBlock2D" for level in range(len(features))]
        return diffusers.UNet2DModel(
            sample_size=32, block_out_channels=features, attention_head_dim=size, down_block_types=kinds,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
        )  # fmt: skip

    x, target = (torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).contiguous() for name in ("x", "target"))
    label, classes = torch.from_numpy(arrays["label"]), torch.from_numpy(arrays["classes"])
    if case == "DiT-S/2":
        # one embedding of time and class for all blocks, as in the paper, where diffusers has one for each
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, num_layers=12, sample_size=32, num_embeds_ada_norm=10
        )
        shared = model.transformer_blocks[0].norm1.emb
        for block in model.transformer_blocks:
            block.norm1.emb = shared
        run = lambda: model(x, label, classes).sample  # noqa: E731
    else:
        model = unet((64, 128, 128), 1, 64) if "5 M" in case else unet((128, 256, 256, 256), 1, 256)
        run = lambda: model(x, label).sample  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.mse_loss(run(), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    count = sum(p.numel() for p in model.parameters()) / 1e6
    return step, f"torch {torch.__version__}, {torch.get_num_threads()} threads, {count:.1f} M"


def ours_step(case, arrays, scan=True):
    from jaxgen import runtime

    runtime.prepare()
    runtime.start()
    import jax
    import jax.numpy as jnp
    import optax

    from jaxgen.models.conditions import Conditions
    from jaxgen.models.dit import DiT
    from jaxgen.models.unet import UNet
    from jaxgen.sharding import unbox

    told = Conditions()
    if case == "DiT-S/2":
        model, told = DiT.S(2, classes=10, scan=scan), Conditions(classes=jnp.asarray(arrays["classes"], jnp.int32))
    elif "5 M" in case:
        model = UNet(width=64, multipliers=(1, 2, 2), scale_shift=False)
    else:
        model = UNet(scale_shift=False, head_dim=256)
    x, target, label = (jnp.asarray(arrays[name]) for name in ("x", "target", "label"))
    params = unbox(jax.jit(model.init)(jax.random.key(0), x, label, told)["params"])
    optimizer = optax.adamw(1e-4)
    state = optimizer.init(params)

    def update(params, state):
        def loss(params):
            return jnp.square(model.apply({"params": params}, x, label, told) - target).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        moves, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, moves), state

    update = jax.jit(update, donate_argnums=(0, 1))

    def step() -> float:
        nonlocal params, state
        value, params, state = update(params, state)
        return float(value)

    return step, f"jax {jax.__version__}, {sum(p.size for p in jax.tree.leaves(params)) / 1e6:.1f} M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only this one")
    parser.add_argument("--unrolled", action="store_true", help="jaxgen's DiT with its blocks unrolled, not scanned")
    arguments = parser.parse_args()
    for case in CASES if arguments.case is None else (list(CASES)[arguments.case],):
        side, channels, batch = CASES[case]
        random = np.random.default_rng(0)
        shape = (batch, side, side, channels)
        arrays = {
            "x": random.normal(size=shape).astype(np.float32), "target": random.normal(size=shape).astype(np.float32),
            "label": np.linspace(0, 999, batch, dtype=np.float32), "classes": np.arange(batch) % 10,
        }  # fmt: skip
        pipes = start(ours_step, case, arrays, not arguments.unrolled), start(theirs_step, case, arrays)
        (_, us), (_, them) = (pipe.recv() for pipe in pipes)
        steps = max(1, round(0.5 / turn(pipes[0], WARM)[-1]))  # a turn takes about half a second
        turn(pipes[1], WARM)
        rounds = [[turn(pipe, steps) for pipe in pipes] for _ in range(arguments.rounds)]
        a, b = (statistics.median(t for pair in rounds for t in pair[i]) for i in range(2))
        for pipe in pipes:
            pipe.send(0)
        print(f"{case}: jaxgen {a:.3f} s, diffusers {b:.3f} s, ratio {a / b:.2f} ({us}; {them})", flush=True)


if __name__ == "__main__":
    main()
