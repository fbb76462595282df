"""What becomes of pictures that a model edits: whether what was asked is done, and how near what is made new comes to
what was there."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data import scenes
from jaxgen.data.scenes import PreparedScenes
from jaxgen.data.sheets import sheet
from jaxgen.errors import UserError
from jaxgen.evaluation import scenes as reading
from jaxgen.evaluation.base import Report, Setting
from jaxgen.evaluation.generated import Drawing
from jaxgen.evaluation.reconstruction import psnr, ssim
from jaxgen.evaluation.scenes import HELD_OUT, read
from jaxgen.sampling.diffusion import keys_of
from jaxgen.tasks.beside import Beside, Masked, enlarged

PAIRS = 4  # of pictures in a row


@dataclasses.dataclass(frozen=True)
class EditsRight(Drawing):
    """How many held-out scenes are edited as their instructions say, for the data `Scenes` with `edits`.

    Metrics are `exact`, the share of pictures that show all facts of the edited scene and nothing else, in all and by
    kind of edit (`exact/colour`, ...); `facts`, the share of its facts that they show; `nearer`, of pictures that show
    more of its facts than of those before; and `unchanged`, of pictures that show the scene as it was. They are of the
    `recombined` split, and as `unseen/exact` and so on of the other.
    """

    name: str = "edits"
    n: int = 256
    """Held-out edits of each split."""

    def build(self, setting: Setting):
        data = setting.data
        if not isinstance(data, PreparedScenes) or not data.data.edits:
            raise UserError(f"the evaluation '{self.name}' needs the data Scenes with edits, whose facts are known")
        self._check(setting, "before")

        def pictures(pictures, batch):
            return {"pictures": pictures, "weights": batch["weights"]}

        draws = {split: self._drawn(setting, _Edits(data, split, self.n), pictures) for split in HELD_OUT}

        def run(params, state, step):
            metrics, shown, labels = {}, [], []
            for split in HELD_OUT:
                found: dict[str, list[float]] = {}
                parts = draws[split](params, state)
                for i, picture in enumerate(p for part in parts for p in part["pictures"][part["weights"] > 0]):
                    before = data.heldout_scene(i, split)
                    after, instruction = data.heldout_edit(i, split)
                    for name, value in _judged(picture, before.facts, after.facts).items():
                        found.setdefault(name, []).append(value)
                    if len(shown) < 2 * self.shown:
                        shown += [scenes.render(before, data.data.size), picture]
                        labels += ["", instruction]
                prefix = "" if split == "recombined" else f"{split}/"
                metrics |= {prefix + name: float(np.mean(found[name])) for name in sorted(found)}
            lines = [f"{name:<24}{value:>8.4f}" for name, value in metrics.items()]
            text = "\n".join([*lines, f"{self.n} edits of each split"]) + "\n"
            return Report(metrics, {self.name: text}, {self.name: sheet(shown, 2 * PAIRS, labels)} if shown else {})

        return run


def _judged(picture: np.ndarray, before: scenes.Facts, after: scenes.Facts) -> dict[str, float]:
    """What a picture shows of the facts after an edit, and of those before."""
    seen = read(picture, after.level)
    scores = {}
    for name, said in (("after", after), ("before", before)):
        found = reading.compare(seen, said)
        exact = found.pop("exact")[0]
        scores[name] = float(exact), sum(r for r, _ in found.values()) / sum(n for _, n in found.values())
    (exact, right), (unchanged, old) = scores["after"], scores["before"]
    found = {"exact": exact, "facts": right, "nearer": float(right > old), "unchanged": unchanged}
    return found | {f"exact/{kind_of(before, after)}": exact}


def kind_of(before: scenes.Facts, after: scenes.Facts) -> str:
    """The kind of fact that an edit changed."""
    kinds = scenes.questioned(before)
    return next(kind for kind, group in kinds if before.get(kind, group) != after.get(kind, group))


@dataclasses.dataclass(frozen=True)
class _Edits:
    """The held-out edits of a split."""

    data: PreparedScenes
    split: scenes.Split
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        found = self.data.edited(self.data.heldout_scene(index, self.split), *self.data.heldout_edit(index, self.split))
        return {**found, "weights": np.float32(1), "index": np.int32(index)}


@dataclasses.dataclass(frozen=True)
class Restored(Drawing):
    """How near pictures come to the held-out ones of which the task's `beside` was made: holes filled (`Masked`), small
    pictures enlarged (`Smaller`).

    Metrics of enlarged pictures are `psnr` in dB and `ssim`, means over the pictures, and as `bicubic_psnr` and
    `bicubic_ssim` the same of interpolation alone. Of holes `psnr` is that of all hidden pixels together (one that is
    exact would decide a mean over the pictures), and `plain_psnr` that of holes filled with the mean of what is known.
    """

    name: str = "restored"
    n: int = 256
    """Held-out pictures, of which each loses what it loses by its number."""

    def build(self, setting: Setting):
        beside = getattr(setting.task, "beside", None)
        if beside is None or beside.wanted != ("image",):
            raise UserError(f"the evaluation '{self.name}' needs a task whose beside is Masked or Smaller")
        heldout = self._check(setting)
        shown = self.shown

        def near(pictures, batch):
            drawn, image = pictures.astype(jnp.float32), batch["image"].astype(jnp.float32)
            found = {"weights": batch["weights"], "pictures": pictures[:shown]}
            if "mask" in batch:
                mask = jnp.broadcast_to(batch["mask"], image.shape)
                known = jnp.sum((1 - mask) * image, (1, 2)) / jnp.maximum(jnp.sum(1 - mask, (1, 2)), 1)
                for name, made in (("psnr", drawn), ("plain_psnr", known[:, None, None])):
                    found[name] = jnp.sum(mask * (made - image) ** 2, (1, 2, 3))  # a sum until all are there
                found["hidden"] = jnp.sum(mask, (1, 2, 3))
                return found | {"given": jnp.where(mask > 0.5, 127.0, image)[:shown].astype(jnp.uint8)}
            plain = jnp.clip(jnp.round(enlarged(batch["small"], beside.factor)), 0, 255)
            found |= {"psnr": psnr(drawn, image), "bicubic_psnr": psnr(plain, image), "ssim": ssim(drawn, image)}
            return found | {"bicubic_ssim": ssim(plain, image), "given": plain[:shown].astype(jnp.uint8)}

        if isinstance(beside, Masked):  # all of a picture is no hole
            beside = dataclasses.replace(beside, whole=0.0)
        draw = self._drawn(setting, _Given(heldout, self.n, beside, setting.seed), near)

        def run(params, state, step):
            found: dict[str, list[np.ndarray]] = {}
            pairs: list[np.ndarray] = []
            for part in draw(params, state):
                real = part.pop("weights") > 0
                for one, other in zip(part.pop("given"), part.pop("pictures"), strict=True):
                    pairs += [one, other] if len(pairs) < 2 * shown else []
                for name, values in part.items():
                    found.setdefault(name, []).append(values[real])
            metrics = {name: float(np.mean(np.concatenate(values))) for name, values in found.items()}
            if (hidden := metrics.pop("hidden", None)) is not None:
                metrics = {k: float(10 * np.log10(255.0**2 * hidden / max(v, 1e-9))) for k, v in metrics.items()}
            lines = [f"{name:<16}{value:>10.4f}" for name, value in metrics.items()]
            text = "\n".join([*lines, f"{self.n} held-out pictures"]) + "\n"
            return Report(metrics, {self.name: text}, {self.name: sheet(pairs, 2 * PAIRS)} if pairs else {})

        return run


@dataclasses.dataclass(frozen=True)
class _Given:
    """Held-out examples with what a person would give of each."""

    dataset: Any
    n: int
    beside: Beside
    seed: int

    def __len__(self) -> int:
        return self.n

    @functools.cached_property
    def _made(self) -> Any:
        return jax.jit(lambda image, index: self.beside.given({"image": image}, keys_of(self.seed, index)))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self.dataset[index % len(self.dataset)]
        made = self._made(example["image"][None], np.full(1, index, np.int32))
        made = {name: np.asarray(value)[0] for name, value in made.items()}
        return {**example, **made, "weights": np.float32(1), "index": np.int32(index)}
