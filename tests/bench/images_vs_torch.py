"""JPEG files to training batches on one core: jaxgen's pipeline beside torch's DataLoader with Pillow, taking turns.

    pip install -e . torch && python tests/bench/images_vs_torch.py [--pixels 224] [--rounds 9]

Both read, decode, crop at random, resize to 224 pixels (bilinear), flip and stack batches of 64, in processes that are
held on the same core. The DataLoader is measured without worker processes and with one. Prints the median images a
second of each, by the clock and by the processor's time (which other programs on the machine change less), and the
ratio of jaxgen's to the DataLoader's better one; above 1 jaxgen is faster.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

BATCH, SIZE, FILES, TURN = 64, 224, 512, 8  # batches a turn
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def write_files(folder: Path, pixels: int) -> None:
    """Pictures with detail at every scale, as JPEGs of the size that photographs have."""
    rng = np.random.default_rng(0)
    for i in range(FILES):
        picture = np.zeros((pixels, pixels, 3), np.float32)
        for cells in (3, 8, 21, 55, pixels // 2):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += np.asarray(noise.resize((pixels, pixels), Image.Resampling.BICUBIC), np.float32) / cells**0.5
        picture = ((picture - picture.min()) / (picture.max() - picture.min()) * 255).astype(np.uint8)
        place = folder / f"class{i % 4}"
        place.mkdir(exist_ok=True)
        Image.fromarray(picture).save(place / f"{i:04}.jpg", quality=90)


def jaxgen_batches(folder: str):
    from jaxgen import runtime

    runtime.prepare()  # as `jaxgen train` does
    import jax

    from jaxgen.data.imagetext import LabelledImages
    from jaxgen.data.loader import Loader
    from jaxgen.data.transforms import Flip, RandomResizedCrop

    crop = RandomResizedCrop(SIZE, SCALE, RATIO, "bilinear")
    data = LabelledImages(folder, size=SIZE, augment=(crop, Flip()), heldout=0).prepare(folder + "-cache")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for _, batch in Loader(data.train(0), device, BATCH):
        yield batch["image"].shape


def torch_batches(folder: str, workers: int):
    import math
    import random

    import torch

    torch.set_num_threads(1)
    names = sorted(str(p) for p in Path(folder).rglob("*.jpg"))

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 1 << 20

        def __getitem__(self, index):
            name = names[index % len(names)]
            with open(name, "rb") as f:
                image = Image.open(f).convert("RGB")
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=self.box(*image.size))
            if random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)), int(Path(name).parent.name[-1])

        @staticmethod
        def box(width, height):
            for _ in range(10):
                area = width * height * random.uniform(*SCALE)
                ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
                w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < w <= width and 0 < h <= height:
                    left, top = random.randint(0, width - w), random.randint(0, height - h)
                    return left, top, left + w, top + h
            return 0, 0, width, height

    loader = torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True, num_workers=workers,
                                         multiprocessing_context="fork" if workers else None)
    for images, _ in loader:
        yield tuple(images.shape)


def serve(pipe, core: int, make, *arguments) -> None:
    os.sched_setaffinity(0, {core})  # before any thread is started, so that all keep to it
    batches = make(*arguments)
    for _ in range(3):
        assert next(batches) == (BATCH, SIZE, SIZE, 3)
    pipe.send("ready")
    while pipe.recv():
        for _ in range(4):  # what was ready before the turn
            next(batches)
        began, used = time.perf_counter(), processor_seconds()
        for _ in range(TURN):
            next(batches)
        pipe.send((TURN * BATCH / (time.perf_counter() - began), TURN * BATCH / (processor_seconds() - used)))


def processor_seconds() -> float:
    """Of this process, all its threads and its children."""
    ticks = 0
    for process in [multiprocessing.current_process(), *multiprocessing.active_children()]:
        ticks += sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=224, help="side of the JPEG files")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "files")
        files.mkdir()
        write_files(files, options.pixels)
        size = sum(p.stat().st_size for p in files.rglob("*.jpg")) / FILES
        print(f"{FILES} JPEG files of {options.pixels} pixels, {size / 1000:.0f} kB each, to {SIZE} pixels; one core")
        context = multiprocessing.get_context("spawn")
        sides = {"jaxgen": (jaxgen_batches, str(files)), "torch, no workers": (torch_batches, str(files), 0),
                 "torch, 1 worker": (torch_batches, str(files), 1)}
        core = max(os.sched_getaffinity(0))
        pipes, speeds = {}, {name: [] for name in sides}
        for name, side in sides.items():
            pipes[name], there = context.Pipe()
            context.Process(target=serve, args=(there, core, *side)).start()
            there.close()
            pipes[name].recv()
        for _ in range(options.rounds):
            for name, pipe in pipes.items():
                time.sleep(0.5)  # in which the one before fills its queue and rests
                pipe.send(True)
                speeds[name].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
    for measure, by in enumerate(("clock", "processor")):
        medians = {name: statistics.median(value[measure] for value in values) for name, values in speeds.items()}
        for name, values in speeds.items():
            low, high = min(value[measure] for value in values), max(value[measure] for value in values)
            print(f"by the {by:>9}, {name:>17}: {medians[name]:5.0f} images/s (from {low:.0f} to {high:.0f})")
        best = max(value for name, value in medians.items() if name != "jaxgen")
        print(f"by the {by:>9}, jaxgen / torch: {medians['jaxgen'] / best:.2f}")


if __name__ == "__main__":
    main()
