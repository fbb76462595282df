"""What pictures that a model makes are like: beside held-out ones, to a classifier, and to who knows their captions."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import record
from jaxgen.data import scenes
from jaxgen.data.loader import heldout_batches
from jaxgen.data.scenes import PreparedScenes, caption
from jaxgen.data.sheets import sheet
from jaxgen.errors import UserError, nearest
from jaxgen.evaluation import distances, whole
from jaxgen.evaluation import scenes as reading
from jaxgen.evaluation.base import Evaluation, Report, Setting
from jaxgen.evaluation.distances import Moments
from jaxgen.evaluation.features import Inception, Network, network_of
from jaxgen.evaluation.scenes import HELD_OUT, Score, chance, read
from jaxgen.pretrained import Pretrained
from jaxgen.sampling.diffusion import Sampling, keys_of
from jaxgen.tasks.base import batch_shardings

METRICS = ("fd", "kid", "precision_recall", "density_coverage", "inception_score", "cmmd", "clip_score")
FEW = 10_000
"""Generated pictures below which a Fréchet distance says little."""
COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Drawing(Evaluation):
    """An evaluation of pictures that are drawn for the conditions of held-out examples, in their order.

    Picture i has the key (seed, i): it is the same in any batch and on any mesh.
    """

    n: int = 10_000
    """Pictures to draw; beyond the held-out examples, their conditions come again."""
    sampling: Sampling = Sampling()
    weights: Literal["ema", "raw"] = "ema"
    """Which weights are measured (the averaged ones where the experiment keeps any). For the report alone: `jaxgen
    eval` sets it."""
    batch_size: int = 0
    """Pictures at a time; 0 for the training batch's number."""
    shown: int = 16
    """Pictures on the report's sheet; 0 for none."""

    def _check(self, setting: Setting, *wanted: str) -> Any:
        """The held-out data. UserError where this cannot be measured."""
        whole.demand(self, setting.task, "makes pictures", "sample")
        if self.n < 1:
            raise UserError(f"the evaluation '{self.name}' draws n = {self.n} pictures, which should be at least 1")
        dataset = whole.held_out(self, setting.data)
        has = dataset[0]
        if missing := [name for name in ("image", *wanted) if name not in has]:
            raise UserError(f"the evaluation '{self.name}' needs {' and '.join(missing)}, and the data has "
                            f"{', '.join(name for name in has if name != 'weights')}")
        return dataset

    def _drawn(self, setting: Setting, dataset: Any, function: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
        """Compiles (params, state, *more) -> what `function(pictures, batch, *more)` finds of each batch of drawn
        pictures, one after the other."""
        task, sharding = setting.task, setting.sharding
        (shards,) = sharding.parts("batch")
        size = min(self.batch_size or whole.default_batch(setting), whole.whole_rows(sharding, len(dataset)))
        spec = {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for k, v in dataset[0].items()}
        if size % shards:
            raise UserError(f"the evaluation '{self.name}' draws {size} pictures at a time, which cannot be divided "
                            f"over the {shards} shards of the batch that the mesh makes")
        layout = batch_shardings(task, sharding, spec)

        @jax.jit
        def measured(pictures, batch, *more):
            with sharding.use():
                found = function(pictures, batch, *more)
            return jax.lax.with_sharding_constraint(found, sharding.replicated)

        def run(params, state, *more):
            def parts():
                for batch in heldout_batches(dataset, layout, size, setting.told):
                    with sharding.use():
                        keys = keys_of(setting.seed, batch.pop("index"))
                        pictures = task.sample(params, state, batch, keys, self.sampling)
                    yield measured(pictures, batch, *more)

            return whole.fetched(parts())

        return run

    def _told_of(self, network: Network, dataset: Any) -> tuple[Any, Any]:
        """Shapes of a network's features and probabilities. UserError where it cannot see the data's pictures."""
        picture = jax.ShapeDtypeStruct((1, *dataset[0]["image"].shape), jnp.uint8)
        return jax.eval_shape(network.see, network.variables, picture)

    def _settings(self, setting: Setting) -> dict[str, Any]:
        """What decides the numbers besides the model."""
        reference = {"part": "heldout", "hash": getattr(setting.data, "fingerprint", "")}
        return {
            "n": self.n, "seed": setting.seed, "weights": self.weights, "reference": reference,
            "sampling": record.to_record(self.sampling, "sampling"),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """The first `n` held-out examples, which come again where there are fewer, with a number each."""

    dataset: Any
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {**self.dataset[index % len(self.dataset)], "index": np.int32(index)}


# --- distances from held-out pictures ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generated(Drawing):
    """Distances between drawn pictures and all held-out ones, by the features of a network.

    The Fréchet distance is called `fid` for FID's own InceptionV3 and its way to resize alone, and `fd` for any other
    network. Two results can be compared where all that decides them is the same: the report's text NAME-settings holds
    it as JSON, and `compare` refuses others.
    """

    name: str = "generated"
    metrics: tuple[str, ...] = ("fd", "kid", "precision_recall")
    """Of fd, kid, precision_recall, density_coverage, inception_score, cmmd and clip_score."""
    features: Inception | Pretrained | Network | None = None
    """The network that sees the pictures. cmmd and clip_score want one of pictures and texts."""

    def build(self, setting: Setting):
        if not self.metrics:
            raise UserError(f"the evaluation '{self.name}' measures nothing: its field metrics is empty")
        if unknown := [m for m in self.metrics if m not in METRICS]:
            raise UserError(f"the evaluation '{self.name}' has no metric '{unknown[0]}'{nearest(unknown[0], METRICS)}; "
                            f"there are {', '.join(METRICS)}")
        captioned = "clip_score" in self.metrics
        heldout = self._check(setting, *("tokens", "lengths") * captioned)
        least = 1 + max((k for m, k in NEIGHBOURS.items() if m in self.metrics), default=1)
        if min(self.n, len(heldout)) < least:
            raise UserError(f"the evaluation '{self.name}' needs {least} pictures, and compares {self.n} drawn ones "
                            f"with {len(heldout)} that are held out")
        network = network_of(self, "features", setting)
        if network.texts is None and (wants := [m for m in ("cmmd", "clip_score") if m in self.metrics]):
            raise UserError(f"the evaluation '{self.name}' measures {wants[0]}, which needs a network of pictures and "
                            f"texts, and {network.name} is none")
        _, probabilities = self._told_of(network, heldout)
        if "inception_score" in self.metrics and probabilities is None:
            raise UserError(f"the evaluation '{self.name}' measures inception_score, which needs a classifier, and "
                            f"{network.name} is none")
        keeps = {"moments": "fd" in self.metrics, "features": bool({*self.metrics} - {"fd", "inception_score"}),
                 "probabilities": "inception_score" in self.metrics}  # fmt: skip
        shown = self.shown

        def seen(pictures, weights, variables):
            features, probabilities = network.see(variables, pictures)
            found = {"weights": weights, "features": features, "probabilities": probabilities}
            found = {k: x for k, x in found.items() if keeps.get(k, True)}
            return found | ({"moments": distances.batch_moments(features, weights)} if keeps["moments"] else {})

        def drawn(pictures, batch, variables):
            found = seen(pictures, batch["weights"], variables) | {"pictures": pictures[:shown]}
            return found | {k: batch[k] for k in ("tokens", "lengths") if captioned}

        draw = self._drawn(setting, Asked(heldout, self.n), drawn)
        size = self.batch_size or whole.default_batch(setting)
        look = whole.batches(
            heldout, setting, size,
            lambda variables, _, batch: seen(batch["image"], batch["weights"], variables),
        )  # fmt: skip
        reference = functools.cache(lambda: _Points.of(look(network.variables, None)))
        settings = self._settings(setting) | {
            "features": network.name, "features_hash": network.digest, "resize": network.resize,
            "metrics": _constants(self.metrics),
        }  # fmt: skip

        def run(params, state, step):
            real = reference()
            pictures: list[np.ndarray] = []
            fake = _Points.of(_shown(draw(params, state, network.variables), pictures, shown))
            numbers = self._measured(real, fake, network, setting)
            settings["reference"]["pictures"] = real.count
            told = {"settings": settings, "metrics": numbers, "step": step}
            texts = {self.name: self._told(numbers, network, fake.count, real.count),
                     f"{self.name}-settings": json.dumps(told, indent=1) + "\n"}  # fmt: skip
            return Report(numbers, texts, {self.name: sheet(pictures, COLUMNS)} if pictures else {})

        return run

    def _measured(self, real: "_Points", fake: "_Points", network: Network, setting: Setting) -> dict[str, float]:
        sharding, found = setting.sharding, {}
        for metric in self.metrics:
            if metric == "fd":
                value = distances.frechet_distance(fake.moments, real.moments)
                found |= {"fid" if network.is_fid else "fd": value}
            elif metric == "inception_score":
                found |= _pair(metric, f"{metric}_deviation", distances.inception_score(fake.probabilities))
            elif metric == "clip_score":
                texts = _captions(fake.tokens, fake.lengths, setting.data.tokenizer)
                different = sorted(set(texts))
                place = {text: i for i, text in enumerate(different)}
                embedded = network.texts(different)[[place[text] for text in texts]]
                found |= {metric: distances.clip_score(fake.features, embedded)}
            elif metric == "cmmd":
                found |= {metric: distances.cmmd(real.features, fake.features, sharding=sharding)}
            elif metric == "kid":
                pair = _pair("kid", "kid_error", distances.kid(real.features, fake.features, sharding=sharding))
                found |= {name: value for name, value in pair.items() if value == value}  # an error where there is one
            else:
                pair = {"precision_recall": distances.precision_recall, "density_coverage": distances.density_coverage}
                found |= _pair(*metric.split("_"), pair[metric](real.features, fake.features, sharding=sharding))
        return found

    def _told(self, numbers: Mapping[str, float], network: Network, count: int, real: int) -> str:
        names = {"fd": f"FD ({network})", "fid": "FID", "kid": "KID"}
        width = max(len(names.get(name, name)) for name in numbers)
        lines = [f"{names.get(name, name):<{width}}{value:>12.4f}" for name, value in numbers.items()]
        lines += [f"{count} drawn pictures, {real} held-out ones; seen by {network}; {network.resize}"]
        if count < FEW and {"fd", "fid"} & numbers.keys():
            lines += [f"warning: a Fréchet distance of {count} pictures, fewer than {FEW:,}, is far too large, and can "
                      "be compared with others of the same number alone"]  # fmt: skip
        if count < FEW and "inception_score" in numbers:
            lines += [f"warning: an Inception score of {count} pictures, fewer than {FEW:,}, is too small"]
        return "\n".join(lines) + "\n"


NEIGHBOURS = {"precision_recall": distances.PRECISION_K, "density_coverage": distances.DENSITY_K}


def _constants(metrics: tuple[str, ...]) -> dict[str, Any]:
    """What of the metrics' definitions is a choice."""
    chosen: dict[str, Any] = {
        "kid": {"subsets": distances.KID_SUBSETS, "size": distances.KID_SIZE},
        "inception_score": {"splits": distances.SPLITS}, "clip_score": {"weight": distances.CLIP_WEIGHT},
        "cmmd": {"sigma": distances.SIGMA, "scale": distances.CMMD_SCALE},
    } | {name: {"k": k} for name, k in NEIGHBOURS.items()}  # fmt: skip
    return {m: chosen.get(m, {}) for m in sorted(metrics)}


def _pair(first: str, second: str, values: tuple[float, float]) -> dict[str, float]:
    return {first: values[0], second: values[1]}


class _Points:
    """What a network saw of a set of pictures, on the host."""

    def __init__(self, moments: Moments | None, rows: dict[str, np.ndarray], count: int):
        self.moments, self.count = moments, count
        self.features, self.probabilities = rows.get("features"), rows.get("probabilities")
        self.tokens, self.lengths = rows.get("tokens"), rows.get("lengths")

    @classmethod
    def of(cls, parts: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> "_Points":
        """Of all batches; what has weight 0 is none of them."""
        moments, rows, count = [], {}, 0
        for part in parts:
            real = part.pop("weights") > 0
            count += int(real.sum())
            if (sums := part.pop("moments", None)) is not None:
                found = distances.moments_of(sums)
                moments = [moments[0].merged(found)] if moments else [found]   # one at a time: they are large
            for name, x in part.items():
                rows.setdefault(name, []).append(x[real])
        return cls(moments[0] if moments else None, {k: np.concatenate(v) for k, v in rows.items()}, count)


def _shown(parts: Iterator[dict[str, Any]], pictures: list[np.ndarray], most: int) -> Iterator[dict[str, Any]]:
    """The parts without their pictures, of which the first go to the list."""
    for part in parts:
        real = (part["weights"] > 0)[: len(part["pictures"])]
        pictures += list(part.pop("pictures")[real][: most - len(pictures)])
        yield part


def _captions(tokens: np.ndarray, lengths: np.ndarray, tokenizer: Any) -> list[str]:
    ends = np.maximum(lengths - 1, 0)   # without the end
    return [tokenizer.decode(row[:end].tolist()) for row, end in zip(tokens, ends, strict=True)]


def compare(a: str | Mapping[str, Any], b: str | Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The numbers of two results (the JSON of the reports' NAME-settings) side by side, by name.

    Raises UserError, naming the fields, where anything besides the model is not the same.
    """
    a, b = (json.loads(x) if isinstance(x, str) else x for x in (a, b))
    if changed := record.differences(a["settings"], b["settings"]):
        raise UserError(f"these results cannot be compared, since they differ in {', '.join(map(str, changed))}")
    return {name: (a["metrics"][name], b["metrics"][name]) for name in a["metrics"] if name in b["metrics"]}


# --- pictures of a class -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recognised(Drawing):
    """The share of drawn pictures that a classifier takes for the class that was asked for: of all, and of the worst
    class. The report's text gives it by class, and the same share of the held-out pictures themselves."""

    name: str = "recognised"
    n: int = 1000
    classifier: Inception | Pretrained | Network | None = None

    def build(self, setting: Setting):
        heldout = self._check(setting, "label")
        network = network_of(self, "classifier", setting)
        size, shown = self.batch_size or whole.default_batch(setting), self.shown
        _, told = self._told_of(network, heldout)
        if told is None:
            raise UserError(f"the evaluation '{self.name}' needs a classifier, and {network.name} is none")
        if (known := len(getattr(setting.data, "classes", ()))) > told.shape[1]:
            raise UserError(f"the evaluation '{self.name}' has pictures of {known} classes, and the classifier "
                            f"{network.name} knows {told.shape[1]}")

        def taken(pictures, batch, variables):
            _, probabilities = network.see(variables, pictures)
            sound = jnp.all(jnp.isfinite(probabilities), 1)
            found = jnp.where(sound, jnp.argmax(probabilities, 1), -1)
            return {"taken": found, "label": batch["label"], "weights": batch["weights"]}

        def drawn(pictures, batch, variables):
            return taken(pictures, batch, variables) | {"pictures": pictures[:shown]}

        draw = self._drawn(setting, Asked(heldout, self.n), drawn)
        look = whole.batches(
            heldout, setting, size, lambda variables, _, batch: taken(batch["image"], batch, variables)
        )
        truth = functools.cache(lambda: _taken(look(network.variables, None)))

        def run(params, state, step):
            pictures: list[np.ndarray] = []
            label, found = _taken(_shown(draw(params, state, network.variables), pictures, shown))
            names = getattr(setting.data, "classes", ())
            real_label, real_found = truth()
            own = float(np.mean(real_label == real_found))
            shares = {int(c): float(np.mean(found[label == c] == c)) for c in np.unique(label)}
            lines = [f"{'class':<16}{'asked':>8}{'share':>8}  most often"]
            for c, share in shares.items():
                likely = _most(found[label == c])
                lines.append(f"{_name(c, names):<16}{np.sum(label == c):>8}{share:>8.3f}  {_name(likely, names)}")
            lines += [f"seen by {network}, which is right of {own:.4f} of the {len(real_label)} held-out pictures"]
            metrics = {"accuracy": float(np.mean(label == found)), "worst_class": min(shares.values())}
            frames = ["green" if a == b else "red" for a, b in zip(label, found, strict=True)]
            labels = [_name(int(c), names) for c in label[: len(pictures)]]
            images = {self.name: sheet(pictures, COLUMNS, labels, frames[: len(pictures)])} if pictures else {}
            return Report(metrics, {self.name: "\n".join(lines) + "\n"}, images)

        return run


def _taken(parts: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(labels, classes that they were taken for)."""
    found = [(p["label"][p["weights"] > 0], p["taken"][p["weights"] > 0]) for p in parts]
    label, taken = (np.concatenate(x) for x in zip(*found, strict=True))
    return label, taken


def _most(values: np.ndarray) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[np.argmax(counts)])


def _name(number: int, names: Any) -> str:
    return str(names[number]) if 0 <= number < len(names) else "nothing" if number < 0 else str(number)


# --- pictures of a caption -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FactsRight(Drawing):
    """The share of a caption's facts that pictures drawn for it show, for the data `Scenes`.

    Metrics are `mean`, of all facts, the share of each kind (shape, colour, count, relation, ...), and `exact`, of
    pictures that show all that is said and nothing else, on the `recombined` split; and as `unseen/mean` and so on on
    the other. The report's text gives them beside chance.
    """

    name: str = "facts"
    n: int = 256
    """Held-out captions of each split."""
    each: int = 4
    """Pictures of a caption."""

    def build(self, setting: Setting):
        data = setting.data
        if not isinstance(data, PreparedScenes):
            raise UserError(f"the evaluation '{self.name}' needs the data Scenes, whose facts are known")
        if data.data.edits:
            raise UserError(f"the evaluation '{self.name}' reads captions, and data.edits gives instructions, which "
                            "EditsRight reads")
        if self.each < 1:
            raise UserError(f"the evaluation '{self.name}' draws {self.each} pictures of each caption, which should be "
                            "at least 1")
        self._check(setting)

        def pictures(pictures, batch):
            return {"pictures": pictures, "weights": batch["weights"]}

        draws = {split: self._drawn(setting, _Captions(data, split, self.n, self.each), pictures) for split in HELD_OUT}

        def run(params, state, step):
            metrics, shares, examples = {}, {}, []
            for split in HELD_OUT:
                total: Score = {}
                for i, picture in enumerate(_pictures(draws[split](params, state))):
                    facts = data.heldout_scene(i // self.each, split).facts
                    for kind, (right, count) in reading.compare(read(picture, facts.level), facts).items():
                        before = total.get(kind, (0, 0))
                        total[kind] = before[0] + right, before[1] + count
                    if len(examples) < self.shown:
                        examples.append((picture, caption(facts)))
                counts = {kind: count for kind, (_, count) in total.items() if kind != "exact"}
                mean = sum(total[kind][0] for kind in counts) / sum(counts.values())
                shares[split] = {"mean": mean} | {kind: right / count for kind, (right, count) in total.items()}
                prefix = "" if split == "recombined" else f"{split}/"
                metrics |= {prefix + kind: share for kind, share in shares[split].items()}
            lines = [f"{'':<12}" + "".join(f"{name:>12}" for name in (*HELD_OUT, "chance"))]
            by_chance = dict(chance(data.data.level))  # which is kept for all who ask
            by_chance["mean"] = sum(by_chance[k] * count for k, count in counts.items()) / sum(counts.values())
            for kind in shares["recombined"]:
                values = [*(shares[split].get(kind, math.nan) for split in HELD_OUT), by_chance[kind]]
                lines.append(f"{kind:<12}" + "".join(f"{value:>12.4f}" for value in values))
            lines.append(f"{self.n} captions of each split, {self.each} pictures each")
            images = {}
            if examples:
                images = {self.name: sheet([p for p, _ in examples], COLUMNS, [text for _, text in examples])}
            return Report(metrics, {self.name: "\n".join(lines) + "\n"}, images)

        return run


def _pictures(parts: Iterator[dict[str, Any]]) -> Iterator[np.ndarray]:
    for part in parts:
        yield from part["pictures"][part["weights"] > 0]


@dataclasses.dataclass(frozen=True)
class _Captions:
    """Each held-out scene of a split, so many times."""

    data: PreparedScenes
    split: scenes.Split
    n: int
    each: int

    def __len__(self) -> int:
        return self.n * self.each

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        found = self.data.pair(self.data.heldout_scene(index // self.each, self.split))
        return {**found, "weights": np.float32(1), "index": np.int32(index)}


# --- likelihood ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BitsPerDim(Evaluation):
    """Bits for each number of a held-out picture, by the task's own likelihood (`bits_per_dim`), and the standard error
    of that mean."""

    name: str = "bpd"
    n: int = 0
    """Held-out pictures that are measured, the first ones; 0 for all."""
    batch_size: int = 0
    """Pictures at a time; 0 for the training batch's."""

    def build(self, setting: Setting):
        task = setting.task
        whole.demand(self, task, "tells likelihoods", "bits_per_dim")
        dataset = whole.held_out(self, whole.prepared(self, None, setting, "image"))
        size = self.batch_size or whole.default_batch(setting)

        def measure(params, state, batch):
            keys = keys_of(setting.seed, batch.pop("index"))
            return {"bits": task.bits_per_dim(params, state, batch, keys).astype(jnp.float32)}

        measured = whole.rows(Asked(dataset, min(self.n or len(dataset), len(dataset))), setting, size, measure)

        def run(params, state, step):
            bits = measured(params, state)["bits"].astype(np.float64)
            error = float(bits.std(ddof=1) / np.sqrt(len(bits))) if len(bits) > 1 else 0.0
            metrics = {"bits_per_dim": float(bits.mean()), "error": error}
            return Report(metrics, {self.name: f"of {len(bits)} held-out pictures\n"})

        return run
