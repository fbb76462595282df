"""A diffusion network of jaxgen beside diffusers' on this machine's CPU: a process each, in turns.

    pip install -e . torch diffusers
    python tests/bench/networks_vs_torch.py [--sample] [--rounds 7] [--case 0] [--unrolled]

Prints the median seconds of a training step, or of drawing 8 pictures (`--sample`), of each, and the ratio of the
medians; below 1 jaxgen is faster. A step takes noisy pictures and times that are in memory, the mean squared error, and
AdamW, in float32; pictures are drawn in 20 steps of DDIM.
"""

import argparse
import statistics

import numpy as np
from step_vs_torch import WARM, start, turn

# name: (side, channels, batch)
CASES = {"unet of 5 M": (32, 3, 16), "unet of 36 M": (32, 3, 16), "DiT-S/2": (32, 4, 16)}
DRAWN, STEPS = 8, 20


def theirs(case, arrays, sample=False):
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
    else:
        model = unet((64, 128, 128), 1, 64) if "5 M" in case else unet((128, 256, 256, 256), 1, 256)

    def run(x, label, classes):
        return (model(x, label, classes) if case == "DiT-S/2" else model(x, label)).sample

    @torch.inference_mode()
    def draw() -> float:
        scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=True, timestep_spacing="trailing")
        scheduler.set_timesteps(STEPS)
        drawn = torch.randn((DRAWN, *x.shape[1:]))
        for t in scheduler.timesteps:
            drawn = scheduler.step(run(drawn, t.expand(DRAWN), classes[:DRAWN]), t, drawn).prev_sample
        return drawn.mean().item()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.mse_loss(run(x, label, classes), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    count = sum(p.numel() for p in model.parameters()) / 1e6
    return draw if sample else step, f"torch {torch.__version__}, {torch.get_num_threads()} threads, {count:.1f} M"


def ours(case, arrays, sample=False, scan=True):
    from jaxgen import runtime

    runtime.prepare()
    runtime.start()
    import jax
    import jax.numpy as jnp
    import optax

    from jaxgen.diffusion.denoiser import Model
    from jaxgen.diffusion.paths import Table
    from jaxgen.diffusion.predictions import Epsilon
    from jaxgen.models.conditions import Conditions
    from jaxgen.models.dit import DiT
    from jaxgen.models.unet import UNet
    from jaxgen.sampling.diffusion import Sampling, generate, keys_of
    from jaxgen.sampling.solvers import Ddim
    from jaxgen.sharding import unbox

    told = few = Conditions()
    if case == "DiT-S/2":
        classes = jnp.asarray(arrays["classes"], jnp.int32)
        model, told, few = DiT.S(2, classes=10, scan=scan), Conditions(classes=classes), Conditions(classes[:DRAWN])
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

    network, sampling = Model(model, Table.linear(), Epsilon()), Sampling(Ddim(), steps=STEPS, threshold="clip")

    def draw() -> float:
        drawn, _ = generate(network, params, keys_of(0, np.arange(DRAWN)), x.shape[1:], sampling, few)
        return float(drawn.mean())

    count = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    return draw if sample else step, f"jax {jax.__version__}, {count:.1f} M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="draw pictures, in place of training steps")
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
        sample = arguments.sample
        pipes = start(ours, case, arrays, sample, not arguments.unrolled), start(theirs, case, arrays, sample)
        (_, us), (_, them) = (pipe.recv() for pipe in pipes)
        steps = max(1, round(0.5 / turn(pipes[0], 2 if sample else WARM)[-1]))  # a turn takes about half a second
        turn(pipes[1], 2 if sample else WARM)
        rounds = [[turn(pipe, steps) for pipe in pipes] for _ in range(arguments.rounds)]
        a, b = (statistics.median(t for pair in rounds for t in pair[i]) for i in range(2))
        for pipe in pipes:
            pipe.send(0)
        print(f"{case}: jaxgen {a:.3f} s, diffusers {b:.3f} s, ratio {a / b:.2f} ({us}; {them})", flush=True)


if __name__ == "__main__":
    main()
