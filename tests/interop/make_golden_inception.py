"""Makes the golden file of FID's InceptionV3: what the network computes in PyTorch, with weights drawn by their names.
Run by hand, where torch is:

    python tests/interop/make_golden_inception.py

`golden/inception/io.npz` holds two pictures (`image`, uint8), the same resized as TensorFlow 1 does it (`resized`), and
features and logits (without the bias).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from drawn import draw
from torch import nn

HERE = Path(__file__).parent / "golden" / "inception"
SIDE = 299


class Unit(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches are lists of units by name; those that end in a and b are side by side."""

    def __init__(self, inputs, branches, pool, pool_features):
        super().__init__()
        self.branches, self.pool, self.outputs = [], pool, pool_features or inputs
        for branch in branches:
            channels, names = inputs, []
            for name, features, kernel, stride in branch:
                kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
                padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
                self.add_module(name, Unit(channels, features, kernel, stride, padding))
                channels = channels if name[-1] in "ab" else features
                names.append(name)
            self.branches.append(names)
            last = [n for n in names if n[-1] in "ab"] or names[-1:]
            self.outputs += sum(getattr(self, n).conv.out_channels for n in last)
        if pool_features:
            self.branch_pool = Unit(inputs, pool_features, 1)

    def forward(self, x):
        found = []
        for names in self.branches:
            h, ends = x, []
            for name in names:
                if name[-1] in "ab":
                    ends.append(getattr(self, name)(h))
                else:
                    h = getattr(self, name)(h)
            found += ends or [h]
        if self.pool == "down":
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "max":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*found, self.branch_pool(pooled)], 1)


def mixed_a(inputs, pooled):
    return Block(inputs, [
        [("branch1x1", 64, 1, 1)], [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
    ], "mean", pooled)  # fmt: skip


def mixed_b(inputs):
    return Block(inputs, [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
    ], "down", 0)  # fmt: skip


def mixed_c(inputs, c):
    row, column = (1, 7), (7, 1)
    return Block(inputs, [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", c, 1, 1), ("branch7x7_2", c, row, 1), ("branch7x7_3", 192, column, 1)],
        [("branch7x7dbl_1", c, 1, 1), ("branch7x7dbl_2", c, column, 1), ("branch7x7dbl_3", c, row, 1),
         ("branch7x7dbl_4", c, column, 1), ("branch7x7dbl_5", 192, row, 1)],
    ], "mean", 192)  # fmt: skip


def mixed_d(inputs):
    return Block(inputs, [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, (1, 7), 1), ("branch7x7x3_3", 192, (7, 1), 1),
         ("branch7x7x3_4", 192, 3, 2)],
    ], "down", 0)  # fmt: skip


def mixed_e(inputs, pool):
    return Block(inputs, [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)],
        [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1), ("branch3x3dbl_3a", 384, (1, 3), 1),
         ("branch3x3dbl_3b", 384, (3, 1), 1)],
    ], pool, 192)  # fmt: skip


class InceptionV3(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        channels = 192
        for name, make in (
            ("5b", lambda c: mixed_a(c, 32)),
            ("5c", lambda c: mixed_a(c, 64)),
            ("5d", lambda c: mixed_a(c, 64)),
            ("6a", lambda c: mixed_b(c)),
            ("6b", lambda c: mixed_c(c, 128)),
            ("6c", lambda c: mixed_c(c, 160)),
            ("6d", lambda c: mixed_c(c, 160)),
            ("6e", lambda c: mixed_c(c, 192)),
            ("7a", lambda c: mixed_d(c)),
            ("7b", lambda c: mixed_e(c, "mean")),
            ("7c", lambda c: mixed_e(c, "max")),
        ):
            block = make(channels)
            self.add_module(f"Mixed_{name}", block)
            channels = block.outputs
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        pooled = F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)
        return pooled, pooled @ self.fc.weight.T


def resized(x: torch.Tensor) -> torch.Tensor:
    """As TensorFlow 1: pixel i is read at i * size / 299, without regard to the pixels' centres."""
    size = x.shape[2:]
    y, x_ = (torch.arange(SIDE, dtype=torch.float64) * (n / SIDE) / (n - 1) * 2 - 1 for n in size)
    grid = torch.stack(torch.meshgrid(y, x_, indexing="ij")[::-1], -1)[None].expand(len(x), -1, -1, -1)
    return F.grid_sample(x.double(), grid, padding_mode="border", align_corners=True).float()


def main():
    image = np.random.RandomState(1).randint(0, 256, (2, 40, 52, 3)).astype(np.uint8)
    large = resized(torch.from_numpy(image).permute(0, 3, 1, 2))
    io = {"image": image, "resized": large.permute(0, 2, 3, 1)[:, ::13, ::13].numpy()}
    model = InceptionV3().eval()
    state = model.state_dict()
    drawn = {k: torch.from_numpy(draw(k, tuple(v.shape))) for k, v in state.items() if v.is_floating_point()}
    model.load_state_dict(state | drawn)
    with torch.no_grad():
        features, logits = model((large - 128) / 128)
    io |= {"features": features.numpy(), "logits": logits.numpy()}
    HERE.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(HERE / "io.npz", **io)


if __name__ == "__main__":
    main()
