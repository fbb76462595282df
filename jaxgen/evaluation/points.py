"""Points that a model makes beside true ones."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Report, Setting
from jaxgen.evaluation.pictures import drawing
from jaxgen.sampling.diffusion import Sampling


@dataclasses.dataclass(frozen=True)
class PointCloud(Evaluation):
    """Energy distance of points that are drawn from the held-out ones, and a plot of both."""

    name: str = "points"
    n: int = 2000
    sampling: Sampling = Sampling()

    def build(self, setting: Setting):
        whole.demand(self, setting.task, "makes points", "sample")
        dataset = whole.held_out(self, setting.data)
        true = np.stack([dataset[i]["points"] for i in range(len(dataset))])
        draw = drawing(setting, self.n, self.sampling)

        def run(params, state, step):
            found = draw(params, state, {}, np.arange(self.n), setting.seed)
            metrics = {"energy_distance": energy_distance(true, found)}
            return Report(metrics, images={self.name: scatter([true, found])})

        return run


def energy_distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| over pairs of different points (Szekely & Rizzo 2013, eq. 1), which is 0 on
    the average for points of one distribution, and else above."""

    def apart(x, y):
        return np.sqrt(np.square(x[:, None] - y).sum(-1, dtype=np.float64))

    within = [apart(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * apart(a, b).mean() - sum(within))


def scatter(clouds: list[Float[np.ndarray, "N 2"]], size: int = 384, span: float = 1.3) -> UInt8[np.ndarray, "H W 3"]:
    """Clouds of points in the plane beside each other, from -span to span."""
    canvas = Image.new("RGB", (size * len(clouds), size), "white")
    draw = ImageDraw.Draw(canvas)
    for number, cloud in enumerate(clouds):
        for x, y in ((np.asarray(cloud, np.float64) * (1, -1) / span + 1) * size / 2).tolist():
            if 0 <= x < size:
                draw.ellipse((number * size + x - 1, y - 1, number * size + x + 1, y + 1), fill=(40, 80, 200))
        draw.line((number * size, 0, number * size, size), fill=(200, 200, 200))
    return np.asarray(canvas)
