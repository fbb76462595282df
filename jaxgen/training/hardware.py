"""Peak rates of devices."""

import re

PEAK_FLOPS = {
    # dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100.*": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops(kind: str) -> float | None:
    """Peak FLOP/s in bfloat16 of a device kind (`jax.Device.device_kind`); None where it is unknown."""
    return next((rate for name, rate in PEAK_FLOPS.items() if re.fullmatch(name, kind)), None)
