"""Peak rates: of the very device, or none."""

import pytest

from jaxgen.training.hardware import peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peak(kind, peak):
    assert peak_flops(kind) == peak
