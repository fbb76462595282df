"""Makes the golden file `trajectories.npz` of `tests/interop/golden`: where the schedulers of diffusers (0.42) take two
numbers through the steps of sampling, with the exact denoiser of a mixture of Gaussians for a network. Run by hand,
where torch and diffusers are:

    python tests/interop/make_golden_trajectories.py

`start` is x at the first station, (B, 2), and `noise` what stochastic schedulers add, (steps, B, 2). All other arrays
are x after each step, (steps, B, 2), in the scale in which x_t = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 (for
flows alpha + sigma = 1).
"""

from pathlib import Path

import diffusers
import numpy as np
import torch

FILE = Path(__file__).parent / "golden" / "trajectories.npz"
STEPS = 10
# the mixture of tests/mixture.py
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-0.8, 0.3], [0.7, 0.6], [0.2, -0.9]])
SPREADS = np.array([0.15, 0.25, 0.4])
MORE_STEPS = {"dpmpp_3m": 100, "unipc_rounded": 60}
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))   # alpha^2 of a network's 1000 steps

TABLE = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing")
KARRAS = dict(TABLE, use_karras_sigmas=True, timestep_spacing="linspace")
# the last step but one of full order too; the last one, to no noise, is of order 1 whatever is said here
DPM = dict(TABLE, lower_order_final=False)
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
ZERO = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")
CASES = {
    "ddim": ("DDIM", dict(TABLE, clip_sample=False)),
    "ddim_v": ("DDIM", dict(TABLE, clip_sample=False, prediction_type="v_prediction")),
    "ddim_leading": ("DDIM", dict(TABLE, clip_sample=False, timestep_spacing="leading", steps_offset=1,
                                  set_alpha_to_one=True)),
    "ddim_zero_snr": ("DDIM", dict(TABLE, clip_sample=False, **ZERO)),
    "ddim_eta": ("DDIM", dict(TABLE, clip_sample=False)),
    "ddpm_small": ("DDPM", dict(TABLE, clip_sample=False)),
    "euler": ("EulerDiscrete", TABLE),
    "euler_karras": ("EulerDiscrete", KARRAS),
    "euler_flow": ("FlowMatchEulerDiscrete", dict(shift=3.0)),
    "euler_ancestral": ("EulerAncestralDiscrete", TABLE),
    "heun": ("HeunDiscrete", TABLE),
    "heun_karras": ("HeunDiscrete", KARRAS),
    "dpmpp_2m": ("DPMSolverMultistep", DPM),
    "dpmpp_2m_sde": ("DPMSolverMultistep", dict(DPM, algorithm_type="sde-dpmsolver++")),
    "unipc_2": ("UniPCMultistep", dict(TABLE, solver_order=2)),
    "unipc_3": ("UniPCMultistep", dict(TABLE, solver_order=3)),
    "unipc_flow": ("UniPCMultistep", dict(FLOW, solver_order=2)),
    "deis_2": ("DEISMultistep", dict(DPM, solver_order=2)),   # ends at step 0 of the table, with noise left
    "deis_3": ("DEISMultistep", dict(DPM, solver_order=3)),
    "dpmpp_3m": ("DPMSolverMultistep", dict(DPM, solver_order=3)),
    "unipc_rounded": ("UniPCMultistep", dict(KARRAS, solver_order=3)),
}  # fmt: skip


def denoised(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x0 | x_t = x], in float64."""
    variance = (alpha * SPREADS) ** 2 + sigma**2
    away = x[:, None] - alpha * MEANS
    log = np.log(WEIGHTS) - (away**2).sum(-1) / (2 * variance) - np.log(variance)
    share = np.exp(log - log.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    each = MEANS + (alpha * SPREADS**2 / variance)[:, None] * away
    return (share[..., None] * each).sum(1)


def table(zero_snr: bool) -> np.ndarray:
    root = np.sqrt(KEPT)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 if zero_snr else KEPT


def network(x: torch.Tensor, label: torch.Tensor, config) -> torch.Tensor:
    """What a network of the scheduler's kind answers that is told the time `label`."""
    given, label = x.double().numpy(), float(label)
    kind = config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        alpha, sigma = 1 - label / 1000, label / 1000
    else:
        kept = table(config.get("rescale_betas_zero_snr", False))
        with np.errstate(divide="ignore"):
            logs = 0.5 * (np.log1p(-kept) - np.log(kept))   # of sigma / alpha, linear between two steps
        place = int(label)
        log = logs[place] if place == label else np.interp(label, (place, place + 1), logs[place : place + 2])
        alpha, sigma = 1 / np.sqrt(1 + np.exp(2 * log)), 1 / np.sqrt(1 + np.exp(-2 * log))
    x0 = denoised(given, alpha, sigma)
    noise = (given - alpha * x0) / sigma
    out = {"epsilon": noise, "flow_prediction": noise - x0, "v_prediction": alpha * noise - sigma * x0}[kind]
    return torch.from_numpy(out).to(x.dtype)


def run(name: str, start: torch.Tensor, noise: torch.Tensor, seed: int) -> np.ndarray:
    kind, config = CASES[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**config)
    if name == "euler_flow":
        scheduler.set_timesteps(sigmas=(1 - np.arange(STEPS) / STEPS).tolist())
    elif name == "unipc_flow":   # which cannot begin with noise alone, and tells the network whole steps
        scheduler.set_timesteps(sigmas=np.arange(STEPS, 0, -1) * 95 / 1000)
        assert (scheduler.timesteps.numpy() == np.arange(STEPS, 0, -1) * 95).all()
    else:
        scheduler.set_timesteps(MORE_STEPS.get(name, STEPS))
    scaled = kind in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")   # x / alpha

    def alpha(place: int) -> torch.Tensor:
        return 1 / torch.sqrt(1 + scheduler.sigmas[place] ** 2) if scaled else torch.ones(())

    x, found, told = start / alpha(0), [], {}
    for i, t in enumerate(scheduler.timesteps):
        if name == "ddim_eta":
            told = dict(eta=1.0, variance_noise=noise[i])
        elif name == "dpmpp_2m_sde":
            told = dict(variance_noise=noise[i])
        elif kind in ("DDPM", "EulerAncestralDiscrete"):   # which draw the very noise of `noise`
            told = dict(generator=told.get("generator") or torch.Generator().manual_seed(seed))
        given = scheduler.scale_model_input(x, t) if scaled else x
        x = scheduler.step(network(given, t, scheduler.config), t, x, **told).prev_sample
        whole = kind != "HeunDiscrete" or scheduler.state_in_first_order or i == len(scheduler.timesteps) - 1
        if whole:
            found.append(x * alpha(scheduler.step_index if scaled else 0))
    return torch.stack(found).numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randn(4, 2, generator=generator) for _ in range(STEPS)])
    found = {name: run(name, start, noise, 2) for name in CASES}
    for name, x in found.items():
        print(f"{name:17} {x.shape} ends at {x[-1].round(3).tolist()}")
    np.savez(FILE, start=start.numpy(), noise=noise.numpy(), **found)
    print(f"{FILE.stat().st_size:,} bytes")
