"""Peak rates of devices."""

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
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def peak_flops(kind: str) -> float | None:
    """Peak FLOP/s in bfloat16 of a device kind (`jax.Device.device_kind`), by its longest known prefix; None where it
    is unknown."""
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None
