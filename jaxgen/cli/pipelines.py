"""Whole pipelines of diffusers as runs of ours, and back: Stable Diffusion 1.x and 2.x, those for
inpainting too, and DiT.

A run holds one network, one text tower and one autoencoder. What needs more (two towers, T5) comes in by its parts.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data.huggingface import Existing, write_clip
from jaxgen.data.imagetext import ImageText, LabelledImages
from jaxgen.diffusion.paths import Table
from jaxgen.diffusion.predictions import X0, Epsilon, Prediction, V
from jaxgen.diffusion.weightings import Steps
from jaxgen.errors import UserError, nearest
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.files import write_whole
from jaxgen.interop.autoencoder import with_statistics
from jaxgen.interop.families import FORMATS, PIPELINE, component, format_for, parts_of
from jaxgen.interop.formats import Found, Pictures, read_json, written
from jaxgen.interop.safetensors import write
from jaxgen.models.dit import DiT
from jaxgen.models.unet import UNet
from jaxgen.sampling import solvers
from jaxgen.sampling.diffusion import Sampling
from jaxgen.sampling.grids import Grid, Karras, UniformGrid
from jaxgen.tasks.beside import Masked
from jaxgen.tasks.diffusion import Diffusion

VERSION = "0.42.0"   # of diffusers, whose words these are
PARTS = {"unet": ("UNet2DConditionModel",), "transformer": ("DiTTransformer2DModel",), "vae": ("AutoencoderKL",),
         "text_encoder": ("CLIPTextModel",), "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast")}  # fmt: skip
KINDS = {"StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
         "DiTPipeline": ("transformer", "vae", "scheduler")}  # fmt: skip
INPAINTING = "StableDiffusionInpaintPipeline"
LEFT = ("safety_checker", "feature_extractor", "image_encoder")
"""What is left out: nothing of it is needed to draw."""
OURS = {"network": ("unet", "transformer"), "text": ("text_encoder",), "autoencoder": ("vae",)}
"""Parts of our task, and what these are called there."""
GUIDANCE = {"StableDiffusionPipeline": 7.5, "DiTPipeline": 4.0}
"""The scales that diffusers takes where nobody says."""
SIZE = 64   # of latents, where nobody says

PREDICTIONS: dict[str, Prediction] = {"epsilon": Epsilon(), "v_prediction": V(), "sample": X0()}
SOLVERS = {
    "DDIMScheduler": solvers.Ddim(), "DDPMScheduler": solvers.Ddpm(), "EulerDiscreteScheduler": solvers.Euler(),
    "EulerAncestralDiscreteScheduler": solvers.EulerAncestral(), "HeunDiscreteScheduler": solvers.Heun(),
    "DPMSolverMultistepScheduler": solvers.DpmPP2M(), "UniPCMultistepScheduler": solvers.UniPC(),
    "DEISMultistepScheduler": solvers.Deis(),
}  # fmt: skip
"""Those of another class, such as PNDMScheduler, give way to DPM-Solver++(2M)."""
BETAS = {"linear": Table.linear, "scaled_linear": Table.scaled_linear}


# ---- in ----


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder, opened: nothing of its weights is read yet."""

    path: Path
    kind: str
    parts: dict[str, Found]
    """By the name of our task's part."""
    scheduler: dict[str, Any]
    classes: tuple[str, ...]
    left: tuple[str, ...]
    """Parts that are left out."""

    @property
    def tokenizer(self) -> Path | None:
        """Its folder."""
        return self.path / "tokenizer" if "text" in self.parts else None

    def described(self, tokenizer: Any, kept: str) -> tuple[Diffusion, Any, PicturePreview]:
        """(task, data, previews); `kept` is where the tokenizer will be."""
        network, autoencoder = (self.parts[name].module for name in ("network", "autoencoder"))
        text = self.parts["text"].module if "text" in self.parts else None
        path, prediction = path_of(self.scheduler), prediction_of(self.scheduler)
        conditions: dict[str, Any] = {}
        size = (self.parts["network"].pictures.size or SIZE) * autoencoder.factor
        shown = dict(size=size, channels=autoencoder.channels)
        if text is None:
            data = LabelledImages(**shown, classes=self.classes)
        else:
            empty, end = len(tokenizer.encode("")), tokenizer.eos
            filled = end if tokenizer.padding is None else tokenizer.padding
            conditions = dict(masked=False, kept=empty, padding=None if filled == end else filled)
            told = _length(self.tokenizer)
            data = ImageText(**shown, tokenizer=Existing(kept, tokenizer.vocab_size),
                             length=min(text.max_length, told or text.max_length))  # fmt: skip
        task = Diffusion(
            network, path, prediction, times=Steps(len(path.betas)), text=text, autoencoder=autoencoder,
            beside=Masked() if _inpaints(network, autoencoder) else None,
            learned_variance=network.out == 2 * autoencoder.latent, locked=("text",) if text else (), **conditions,
        )  # fmt: skip
        prediction.check(path)
        sampling = sampling_of(self.scheduler, GUIDANCE[self.kind])
        if self.kind == "DiTPipeline" and self.scheduler.get("clip_sample"):   # the other turns it off
            sampling = dataclasses.replace(sampling, threshold="clip")
        return task, data, PicturePreview(sampling=sampling)

    def read(self, sharding: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(parameters, state) by part."""
        found = {name: part.read(sharding) for name, part in self.parts.items()}
        params = {name: variables.pop("params") for name, variables in found.items()}
        return params, {name: variables for name, variables in found.items() if variables}


def is_pipeline(folder: str | Path) -> bool:
    return (Path(folder) / PIPELINE).is_file()


def opened(folder: str | Path) -> Pipeline:
    """The pipeline in a folder. Raises UserError for one that our task cannot hold, or that is not whole."""
    path, there = Path(folder), parts_of(folder)
    told = read_json(path / PIPELINE)
    name = str(told.get("_class_name", "pipeline"))
    kind = "DiTPipeline" if "transformer" in there else "StableDiffusionPipeline"
    odd = [part for part in there if part not in (*KINDS[kind], *LEFT)]
    odd += [part for part in KINDS[kind] if part in there and there[part] not in PARTS.get(part, (there[part],))]
    alone = [part for part, kind in there.items() if kind in _known()]
    hint = "; what can be imported is " + " or ".join(f"--part {part}" for part in alone) if alone else ""
    if odd:
        said = " and ".join(f"{part} ({there[part]})" for part in odd)
        raise UserError(f"{folder} is a {name} with {said}, and a run holds one U-Net or DiT, one CLIP text tower and "
                        f"one autoencoder{hint}")  # fmt: skip
    if missing := [part for part in KINDS[kind] if part not in there]:
        raise UserError(f"{folder} is a {name} without {' and '.join(missing)}; its parts are {', '.join(there)}")
    parts = {ours: component(path, part) for ours, theirs in OURS.items() for part in theirs if part in KINDS[kind]}
    network, autoencoder = parts["network"].module, parts["autoencoder"].module
    channels = network.channels or network.out
    if channels != autoencoder.latent and not _inpaints(network, autoencoder):
        raise UserError(f"the network of {folder} takes {channels} channels, and latents have {autoencoder.latent}: "
                        f"what stands beside them is not imported{hint}")  # fmt: skip
    for field, what in (("pooled", "a pooled embedding"), ("sizes", "sizes")):
        if getattr(network, field, 0):
            raise UserError(f"the network of {folder} is told {what}, which is not imported{hint}")
    if network.classes and isinstance(network, UNet):
        raise UserError(f"the U-Net of {folder} is told classes beside a text, which is not imported{hint}")
    classes = _classes(told.get("id2label"), network.classes) if kind == "DiTPipeline" else ()
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    return Pipeline(path, kind, parts, scheduler, classes, tuple(part for part in LEFT if part in there))


def _inpaints(network: Any, autoencoder: Any) -> bool:
    """Whether a U-Net sees a mask and latents of what it leaves beside the noisy ones (Stable Diffusion's for
    inpainting)."""
    return isinstance(network, UNet) and network.channels == 2 * autoencoder.latent + 1


def _known() -> set[str]:
    """Classes of parts that are imported."""
    kinds = {getattr(format, "kind", None) for format in FORMATS} - {None}
    return kinds | {kind for format in FORMATS for kind in getattr(format, "kinds", ())}


def _length(folder: Path) -> int | None:
    """Tokens of a text, as the tokenizer says it; a number beyond all reason stands for nothing said."""
    file = folder / "tokenizer_config.json"
    length = read_json(file).get("model_max_length") if file.is_file() else None
    return int(length) if length and length < 1e6 else None


def _classes(labels: Mapping[str, Any] | None, count: int) -> tuple[str, ...]:
    """Names of the classes, each once: with its number where two have the same."""
    names = [str((labels or {}).get(str(i), i)) for i in range(count)]
    twice = {name for name, times in Counter(names).items() if times > 1}
    return tuple(f"{name} ({i})" if name in twice else name for i, name in enumerate(names))


def path_of(config: Mapping[str, Any]) -> Table:
    """The path of a scheduler's betas."""
    name, kind = config.get("_class_name", "a scheduler"), config.get("beta_schedule")
    if betas := config.get("trained_betas"):
        table = Table(tuple(map(float, betas)))
    elif kind == "squaredcos_cap_v2":
        table = Table.cosine(config["num_train_timesteps"])
    elif kind in BETAS:
        try:
            table = BETAS[kind](config["num_train_timesteps"], config["beta_start"], config["beta_end"])
        except KeyError as error:
            raise UserError(f"the configuration of {name} does not say {error}") from None
    else:
        near = nearest(kind, BETAS) if kind else ""
        raise UserError(f"{name} with beta_schedule = {kind!r} is not imported{near}; known are "
                        f"{', '.join(BETAS)}, squaredcos_cap_v2 and trained_betas")
    return table.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else table


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(f"{config.get('_class_name')} with prediction_type = {kind!r} is not imported"
                        f"{nearest(str(kind), PREDICTIONS)}; known are {', '.join(PREDICTIONS)}")
    return PREDICTIONS[kind]


def sampling_of(config: Mapping[str, Any], guidance: float) -> Sampling:
    """How pictures are drawn, by what the scheduler says of it."""
    solver = SOLVERS.get(str(config.get("_class_name")), solvers.DpmPP2M())
    spacing = config.get("timestep_spacing", "leading")
    if config.get("rescale_betas_zero_snr") or spacing not in ("leading", "linspace"):
        spacing = "trailing"   # the others never see the time at which nothing is left of the data
    count = config.get("num_train_timesteps", 1000)
    grid: Grid = UniformGrid(spacing=spacing, low=1 / count, count=count, offset=config.get("steps_offset", 0))
    if config.get("use_karras_sigmas"):
        grid = Karras()
    first = isinstance(solver, solvers.Ddim | solvers.Ddpm | solvers.Euler | solvers.EulerAncestral)
    return Sampling(solver, grid, 50 if first else 25, guidance)


# ---- out ----


def exported(opened: Any, tokenizer: Any, out: Path, dtype: str) -> tuple[str, list[Path]]:
    """Writes a run of a `Diffusion` task as a pipeline: (its class there, its files of weights)."""
    task, data, directory = opened.experiment.task, opened.experiment.data, opened.directory
    kind = _writable(task, directory)
    network, params, state = task.network, opened.params, opened.state or {}
    parts = {"unet" if kind == "StableDiffusionPipeline" else "transformer": (network, {"params": params["network"]})}
    variables = {"params": params["autoencoder"], **state.get("autoencoder", {})}
    parts["vae"] = with_statistics(task.autoencoder, variables), variables
    if task.text is not None:   # whose head nobody asks
        plain = {name: value for name, value in params["text"].items() if name != "head"}
        parts["text_encoder"] = task.text.clone(out=0), {"params": plain}
    size = getattr(data, "size", SIZE * task.autoencoder.factor)
    sizes = {"vae": size, "text_encoder": 0}
    name = INPAINTING if task.beside is not None else kind
    told: dict[str, Any] = {"_class_name": name, "_diffusers_version": VERSION}
    files, tensors, names = {}, {}, {}
    for name, (module, leaves) in parts.items():
        format = format_for(module)
        tensors[name], names[name] = written(format, module, leaves, np.dtype(dtype)), format.weights
        pictures = Pictures(sizes.get(name, size // task.autoencoder.factor))
        files[f"{name}/config.json"] = config = format.files(module, pictures)["config.json"]
        told[name] = ["diffusers", config["_class_name"]] if name != "text_encoder" else [
            "transformers", config["architectures"][0]
        ]  # fmt: skip
    if task.text is not None:
        files["text_encoder/config.json"] |= _tokens(tokenizer, dtype)
        told |= {"requires_safety_checker": False, **dict.fromkeys(LEFT, [None, None])}
    else:
        names_of = list(getattr(data, "classes", ())) or [str(i) for i in range(network.classes)]
        told["id2label"] = {str(i): name for i, name in enumerate(names_of)}
    files["scheduler/scheduler_config.json"] = scheduler = scheduler_of(opened.experiment)
    told["scheduler"] = ["diffusers", scheduler["_class_name"]]
    paths = [path for name in parts for path in write(out / name, tensors[name], names[name])]
    try:
        if task.text is not None:
            there = write_clip(tokenizer, out / "tokenizer", getattr(data, "length", task.text.max_length))
            told["tokenizer"] = ["transformers", "CLIPTokenizer"] if there else [None, None]
        for name, content in {**files, PIPELINE: told}.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(out / name, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    return told["_class_name"], paths


def _writable(task: Diffusion, directory: Path) -> str:
    """The class of pipeline that draws as the task does. UserError where there is none."""
    kind = "DiTPipeline" if task.text is None and isinstance(task.network, DiT) else "StableDiffusionPipeline"
    text = kind == "StableDiffusionPipeline"
    name = type(task.network).__name__
    halves = all(value == 0.5 for value in (*task.mean, *task.std))
    wrong = {
        "there is no autoencoder, and its pipelines are of latents": task.autoencoder is None,
        f"the network is a {name}": text and not isinstance(task.network, UNet),
        "there is no text tower": text and task.text is None,
        "the network is told classes beside a text": text and getattr(task.network, "classes", 0) > 0,
        "the network is told a pooled embedding": getattr(task.network, "pooled", 0) > 0,
        "the picture beside the noisy one is not what a mask leaves": not isinstance(task.beside, Masked | None),
        "a mask stands beside the noisy picture": kind == "DiTPipeline" and isinstance(task.beside, Masked),
        "the network sees no padding of a text (task.masked)": text and task.masked,
        f"task.kept is {task.kept}, and an empty text has CLIP's start there": text and task.kept != 1,
        f"the path is a {type(task.path).__name__}, no Table of betas": not isinstance(task.path, Table),
        f"the prediction is {type(task.prediction).__name__}": task.prediction not in PREDICTIONS.values(),
        "task.mean and task.std are not 0.5": not halves,
        "it has learned its variance": text and task.learned_variance,
    }
    if found := [why for why, is_so in wrong.items() if is_so]:
        raise UserError(f"{directory} cannot be written as a pipeline of diffusers: {'; '.join(found)}")
    return kind


def _tokens(tokenizer: Any, dtype: str) -> dict[str, Any]:
    """What a text tower's configuration says of tokens and numbers."""
    told: dict[str, Any] = {"dtype": dtype}
    if tokenizer is not None:
        padding = tokenizer.eos if tokenizer.padding is None else tokenizer.padding
        start = np.asarray(tokenizer.encode("")).tolist()
        told |= {"eos_token_id": tokenizer.eos, "pad_token_id": padding} | ({"bos_token_id": start[0]} if start else {})
    return told


def scheduler_of(experiment: Any) -> dict[str, Any]:
    """The configuration of a scheduler for an experiment's path and prediction, and its own way to draw."""
    task = experiment.task
    own = next((e.sampling for e in experiment.evaluations if isinstance(e, PicturePreview)), Sampling())
    name = next((name for name, solver in SOLVERS.items() if type(solver) is type(own.solver)), "DDIMScheduler")
    grid = own.grid if isinstance(own.grid, UniformGrid) else UniformGrid()
    more = {"set_alpha_to_one": True} if name == "DDIMScheduler" else {}
    more |= {"use_karras_sigmas": True} if isinstance(own.grid, Karras) and not name.startswith("DD") else {}
    return {
        "_class_name": name, "_diffusers_version": VERSION, "num_train_timesteps": len(task.path.betas),
        **_betas(task.path), "prediction_type": next(k for k, v in PREDICTIONS.items() if v == task.prediction),
        "timestep_spacing": grid.spacing, "steps_offset": grid.offset, "clip_sample": own.threshold == "clip", **more,
    }  # fmt: skip


def _betas(table: Table) -> dict[str, Any]:
    """A table in a scheduler's words: by its ends where these tell all, else number by number."""
    steps, betas = len(table.betas), np.asarray(table.betas)
    zero = table.betas[-1] == 1
    ends = [(0.00085, 0.012), (0.0001, 0.02)] if zero else [tuple(float(f"{betas[i]:.12g}") for i in (0, -1))]
    for kind, made in BETAS.items():
        for first, last in ends:
            found = made(steps, first, last)
            if np.allclose((found.zero_terminal_snr() if zero else found).betas, betas, rtol=1e-9, atol=0):
                return {"beta_schedule": kind, "beta_start": first, "beta_end": last, "trained_betas": None,
                        "rescale_betas_zero_snr": zero}  # fmt: skip
    if np.allclose(Table.cosine(steps).betas, betas, rtol=1e-9, atol=0):
        return {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None, "rescale_betas_zero_snr": False}
    return {"beta_schedule": "linear", "beta_start": float(betas[0]), "beta_end": float(betas[-1]),
            "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}  # fmt: skip
