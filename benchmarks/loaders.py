"""Measures images/s of complete training loaders, with the same JPEGs, transform and number of workers.

    python benchmarks/loaders.py [--images 400] [--copies 4] [--rounds 5] [--workers 2] [--only
    PART-OF-A-NAME]

There are two kinds of output. "float" is what each loader gives a training loop by default: float32 images
after normalising and random erasing (our loader does both in the main process, and that time counts). "uint8"
is images as bytes in the main process. In each round all loaders run in a new order. The table has medians,
and ratios to timm's loader with the same output. Before the measurement, our exact pixels are compared with
timm's for each sample. A second table has the cost of only decoding, cropping and resizing on one core, with
Pillow and with native/, in one thread and in two; this is the highest speed that a loader could reach.
"""

import argparse
import io
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pictures
import PIL
import simplejpeg
import timm.data
import torch
import torchvision.transforms as tv
import webdataset
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from reconverge.base import chance
from reconverge.config.settings import Augment, Data
from reconverge.data import decode, native, sources, transforms
from reconverge.data.loader import Feed, Images
from reconverge.data.mix import Noise, Normalise, erase
from reconverge.data.order import Order
from reconverge.distributed.world import keep_freed_memory
from reconverge.prepare.make import Options, prepare

BATCH, SIZE = 64, 224
MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
AUGMENT = Augment(size=SIZE)
CPU = torch.device("cpu")


def timms(workers: int, folder: Path, uint8: bool, prefetcher: bool = False) -> Iterable[torch.Tensor]:
    loader = timm.data.create_loader(
        timm.data.create_dataset("", folder / "train", is_training=True), (3, SIZE, SIZE), BATCH,
        is_training=True, use_prefetcher=uint8 or prefetcher,
        re_prob=AUGMENT.erase, re_mode="pixel", scale=AUGMENT.scale, ratio=AUGMENT.ratio, hflip=AUGMENT.flip,
        color_jitter=0.4,
        auto_augment=AUGMENT.auto, interpolation="bicubic", mean=MEAN, std=STD, num_workers=workers,
        pin_memory=False, device=CPU,
    )  # fmt: skip
    return (images for images, _ in (loader.loader if uint8 else loader))


def timms_prefetcher(workers: int, folder: Path, uint8: bool) -> Iterable[torch.Tensor]:
    """As timm's train.py does by default: workers return bytes; the main process normalises and erases."""
    return timms(workers, folder, uint8, prefetcher=True)


def randaugment() -> Callable[[Image.Image], Image.Image]:
    settings = {
        "translate_const": int(SIZE * 0.45),
        "img_mean": tuple(round(255 * mean) for mean in MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    return rand_augment_transform(AUGMENT.auto, settings)


def torchvision_transform(uint8: bool) -> tv.Compose:
    """As in torchvision's references/classification/presets.py, but with timm's RandAugment, so that the
    transform is the same.
    """
    parts = [
        tv.RandomResizedCrop(SIZE, interpolation=tv.InterpolationMode.BICUBIC),
        tv.RandomHorizontalFlip(AUGMENT.flip),
        randaugment(),
    ]
    parts += (
        [tv.PILToTensor()]
        if uint8
        else [
            tv.PILToTensor(),
            tv.ConvertImageDtype(torch.float),
            tv.Normalize(MEAN, STD),
            tv.RandomErasing(AUGMENT.erase),
        ]
    )
    return tv.Compose(parts)


def torchvisions(workers: int, folder: Path, uint8: bool) -> Iterable[torch.Tensor]:
    dataset = ImageFolder(str(folder / "train"), torchvision_transform(uint8))
    return (
        images for images, _ in DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    )


def webdatasets(workers: int, folder: Path, uint8: bool) -> Iterable[torch.Tensor]:
    """As in webdataset's documentation: Pillow decodes, a buffer shuffles, workers make batches."""
    urls = [str(path) for path in sorted((folder / "shards").glob("train-*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100, nodesplitter=None)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
    )
    dataset = dataset.map_tuple(torchvision_transform(uint8), int).batched(BATCH, partial=False)
    return (images for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def ours(
    workers: int, folder: Path, uint8: bool, way: str = "exact", library: str = "off"
) -> Iterable[torch.Tensor]:
    keep_freed_memory()  # as train.py does on a CPU
    native.choose(library)
    source, _ = sources.open_sources(Data("shards", "shards", root=str(folder / "shards")))
    order, normalise = (
        Order(len(source), BATCH, BATCH, seed=0),
        Normalise(list(MEAN), list(STD), CPU, channels_last=False),
    )
    images = Images(source, transforms.labelled(transforms.training(AUGMENT, list(MEAN), way)), seed=0)
    for number, batch in enumerate(
        Feed(images, order.steps(0, len(source) // BATCH), workers, CPU, ahead=True)
    ):
        if uint8:
            yield batch.images
        else:
            pixels = normalise(batch.images)
            with chance.scope(0, "erase", number):
                erase(pixels, Noise.drawn(AUGMENT.erase, *pixels.shape))
            yield pixels


LOADERS = {
    "timm": timms,
    "timm, prefetcher": timms_prefetcher,
    "torchvision reference": torchvisions,
    "webdataset": webdatasets,
    "ours, exact": ours,
    "ours, fast": partial(ours, way="fast"),
    "ours, exact, native": partial(ours, library="on"),
    "ours, fast, native": partial(ours, way="fast", library="on"),
}


def cropped(data: bytes, box: decode.Box) -> None:
    """native/ without resizing."""
    native.choose("on")
    library = native.chosen()
    assert library
    library.crop_and_resize(data, box, (box[2] - box[0], box[3] - box[1]), "bicubic")


def resized(data: bytes, box: decode.Box, library: str) -> None:
    native.choose(library)
    decode.crop_and_resize(data, box, (SIZE, SIZE), "bicubic", fast=False)


PARTS = {
    "decode whole": lambda data, box: simplejpeg.decode_jpeg(data, "RGBX"),
    "decode, crop, resize: Pillow": lambda data, box: (
        Image.open(io.BytesIO(data)).convert("RGB").crop(box).resize((SIZE, SIZE), 3)
    ),
    "decode, crop, resize: simplejpeg and Pillow": partial(resized, library="off"),
    "decode, crop: native": cropped,
    "decode, crop, resize: native": partial(resized, library="on"),
}


def measure_parts(folder: Path, count: int) -> dict[str, tuple[float, float, float]]:
    """For each part: CPU milliseconds per image, and images/s of wall-clock time with one and two threads."""
    source, _ = sources.open_sources(Data("shards", "shards", root=str(folder / "shards")))
    files, results = [source.read(sample) for sample in range(count)], {}
    torch.manual_seed(0)
    boxes = []
    for data in files:
        width, height = decode.dimensions(data)
        top, left, rows, columns = tv.RandomResizedCrop.get_params(
            torch.empty(height, width), list(AUGMENT.scale), list(AUGMENT.ratio)
        )
        boxes.append((left, top, left + columns, top + rows))
    for name, part in PARTS.items():
        cpu, began = time.process_time(), time.perf_counter()
        list(map(part, files, boxes))
        alone = time.perf_counter() - began
        cpu = time.process_time() - cpu
        with ThreadPoolExecutor(2) as pool:
            began = time.perf_counter()
            list(pool.map(part, files, boxes))
            results[name] = cpu / count * 1000, count / alone, count / (time.perf_counter() - began)
    return results


def measure(
    make: Callable[..., Iterable[torch.Tensor]], workers: int, folder: Path, uint8: bool
) -> tuple[float, float]:
    """Images/s after the first batch, and CPU milliseconds per image of all processes.

    Each loader runs in its own process with its default settings.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, make, workers, folder, uint8))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def _measure(
    sender: Connection, make: Callable[..., Iterable[torch.Tensor]], workers: int, folder: Path, uint8: bool
) -> None:
    count, began = 0, 0.0
    for images in make(workers, folder, uint8):
        assert images.shape == (BATCH, 3, SIZE, SIZE)
        assert images.dtype == (torch.uint8 if uint8 else torch.float32)
        if count == 0:
            began = time.perf_counter()
        count += len(images)
    seconds = time.perf_counter() - began
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sender.send(
        ((count - BATCH) / seconds, sum(used.ru_utime + used.ru_stime for used in usage) / count * 1000)
    )


def assert_equal(folder: Path, count: int, library: str) -> None:
    """Check that our exact pixels equal timm's with the same random keys."""
    native.choose(library)
    source, _ = sources.open_sources(Data("shards", "shards", root=str(folder / "shards")))
    mine, theirs = transforms.training(AUGMENT, list(MEAN)), timm.data.create_transform(
        SIZE, is_training=True, color_jitter=0.4, auto_augment=AUGMENT.auto, interpolation="bicubic",
        mean=MEAN, std=STD, use_prefetcher=True
    )  # fmt: skip
    for sample in range(count):
        data = source.read(sample)
        with chance.scope(0, "augment", sample):
            expected = np.asarray(theirs(Image.open(io.BytesIO(data)).convert("RGB"))).transpose(1, 2, 0)
        with chance.scope(0, "augment", sample):
            assert np.array_equal(mine(data), expected), source.where(sample)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=400, help="number of different pictures")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="measure only loaders whose name contains this")
    arguments = parser.parse_args()
    assert int(PIL.__version__.split(".")[0]) < 13, "Pillow 13 raises in timm's RandAugment"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures.write(folder / "images", arguments.images, 4, copies=arguments.copies)
        sizes = [path.stat().st_size for path in (folder / "images" / "train").rglob("*_0.jpg")]
        print(
            f"{len(sizes)} JPEGs of {statistics.mean(sizes) / 1000:.0f} KB on average, each"
            f" {arguments.copies} times"
        )
        prepare(
            folder / "images",
            folder / "shards",
            None,
            2,
            Options(shard_mb=10, hold_out=0, resize=None, quality=90, drop_unreadable=False),
        )
        (folder / "train").symlink_to(folder / "images" / "train")
        for library in ("off", "on"):
            assert_equal(folder, arguments.images, library)
            print(
                f"exact, data.native={library}: bit-equal to timm's transform on {arguments.images} of"
                f" {arguments.images} samples"
            )
        contest = [
            (name, uint8)
            for uint8 in (False, True)
            for name in LOADERS
            if name == "timm" or arguments.only in name
        ]
        contest = [
            entry for entry in contest if entry != ("timm, prefetcher", True)
        ]  # which is timm's other form
        results: dict[tuple[str, bool], list[tuple[float, float]]] = {entry: [] for entry in contest}
        parts: list[dict[str, tuple[float, float, float]]] = []
        for round in range(arguments.rounds):
            parts.append(measure_parts(folder, arguments.images))
            random.Random(round).shuffle(contest)
            for name, uint8 in contest:
                results[name, uint8].append(measure(LOADERS[name], arguments.workers, folder, uint8))
    print(
        f"\n{os.cpu_count()} cores, {arguments.workers} workers, Pillow {PIL.__version__}, timm"
        f" {timm.__version__}, torch {torch.__version__}; medians of {arguments.rounds} rounds"
    )
    print("| part | CPU ms an image | images/s, 1 thread | 2 threads |\n|---|---|---|---|")
    for name in PARTS:
        cpu, one, two = (
            statistics.median(values) for values in zip(*(part[name] for part in parts), strict=True)
        )
        print(f"| {name} | {cpu:.2f} | {one:.0f} | {two:.0f} |")
    print(
        "\n| loader | output | images/s | ratio to timm | CPU ms/image | ratio |\n|---|---|---|---|---|---|"
    )
    for uint8 in (False, True):
        for name in LOADERS:
            if (name, uint8) in results:
                (speed, cpu), (base, base_cpu) = (
                    tuple(map(statistics.median, zip(*results[key, uint8], strict=True)))
                    for key in (name, "timm" if ("timm", uint8) in results else name)
                )
                print(
                    f"| {name} | {'uint8' if uint8 else 'float'} | {speed:.0f} | {speed / base:.2f} |"
                    f" {cpu:.2f} | {base_cpu / cpu:.2f} |"
                )


if __name__ == "__main__":
    main()
