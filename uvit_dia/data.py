"""Images and their one order: sets decoded to uint8, and batches that depend on nothing but seed and step."""

import atexit
import hashlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import iglob
from io import BytesIO, StringIO
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from uvit_dia.errors import ConfigError, UserError, check_fields, one_of
from uvit_dia.random_keys import Stream, numpy_generator

FORMATS = "PNG JPEG WEBP BMP GIF TIFF PPM".split()  # without EPS, on which Pillow runs Ghostscript
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the model."""

    dataset: Literal["digits", "cifar10", "folder", "hub"] = "digits"  # folder and hub need data.path
    path: str | None = None  # folder: of images; hub: a name, folder or .parquet; cifar10: where to keep it
    train_split: str = "train"  # hub: a split or slice ("train[:95%]"); folder: a sub-folder, if there is one
    test_split: str | None = "test"  # held out for anchors, named in the same way; null: nothing is
    image_column: str | None = None  # hub: the column of images; null: the first of that type
    label_column: str | None = None  # hub: the column of class numbers; null: "label" if it holds some
    flip: bool = True  # mirror each training image with probability 1/2
    in_memory_gib: float = 2.0  # sets whose uint8 pixels fit live on the training device, larger ones stream
    num_workers: int = 4  # processes that decode images; 0: the training process does

    def __post_init__(self) -> None:
        check_fields("data", self, in_memory_gib=0, num_workers=0)
        if self.dataset in ("folder", "hub") and not self.path:
            raise ConfigError("data.path", self.path, f"a path, which data.dataset {self.dataset} needs")
        if self.dataset == "digits" and self.path is not None:
            raise ConfigError("data.path", self.path, "null with data.dataset digits; is it a folder or hub?")


@dataclass(eq=False)
class ImageSet(Dataset):
    """`images[i]` is (uint8 (C, H, W), int label), read when asked; UserError names one that is no image."""

    name: str  # for people: "digits/train"
    rows: Any  # rows[indices] gives as many arrays of pixels, encoded files, paths or the Hub's cells
    labels: np.ndarray  # (n,) int64
    num_labels: int | None  # None: unlabeled, and all labels are 0
    shape: tuple[int, int, int]  # (C, H, W)
    num_workers: int  # that decode it

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.decode([range(len(self))[i]])[0], int(self.labels[i])  # IndexError past the end

    def decode(self, indices: Sequence[int]) -> Tensor:
        """The images of these numbers, uint8 (b, C, H, W)."""
        channels, size, _ = self.shape
        pixels = np.empty((len(indices), size, size, channels), np.uint8)
        for j, row in enumerate(self.rows[indices]):
            try:
                pixels[j] = decode(row, size, channels).reshape(size, size, channels)
            except Exception as error:  # Pillow's decoders raise some ten types
                where = row if isinstance(row, str) else f"row {indices[j]} of {self.name}"
                why = getattr(error, "strerror", None) or error  # without the path again
                if isinstance(error, UnidentifiedImageError):
                    why = f"none of {', '.join(FORMATS)}"
                raise UserError(f"{where} can't be decoded as an image ({why}); mend or remove it") from None
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


Source = tuple[str, Any, np.ndarray, int | None]  # name, rows, labels, num_labels: as in ImageSet


class MissingSplit(ConfigError):
    """There is no split of that name."""


def load_images(config: DataConfig, split: str, sample_size: int, in_channels: int) -> ImageSet:
    """Training or held-out images, which are decoded, and complained of, when they are read."""
    if in_channels not in (1, 3):
        raise ConfigError("model.in_channels", in_channels, "1 (grey) or 3 (RGB)")
    chosen = getattr(config, f"{split}_split")
    name, rows, labels, num_labels = SOURCES[config.dataset](config, split, chosen)
    if len(rows) == 0:
        raise ConfigError("data.path", config.path, f"images, of which {name} has none")
    shape = (in_channels, sample_size, sample_size)
    return ImageSet(name, rows, labels.astype(np.int64), num_labels, shape, config.num_workers)


def test_images(config: DataConfig, sample_size: int, in_channels: int) -> ImageSet | None:
    """The held-out images; None if data.test_split is null, or left at its default and not there."""
    try:
        return load_images(config, "test", sample_size, in_channels) if config.test_split else None
    except MissingSplit:
        if config.test_split != DataConfig.test_split:
            raise
        return None


def digits(config: DataConfig, split: str, chosen: str) -> Source:
    """scikit-learn's 1,797 digits of 8x8: 1,197 to train on, 600 held out in equal shares."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0..16
    parts = train_test_split(np.arange(len(labels)), test_size=600, random_state=0, stratify=labels)
    part = np.sort(parts[split == "test"])
    return f"digits/{split}", pixels[part], labels[part], 10


def cifar10(config: DataConfig, split: str, chosen: str) -> Source:
    """CIFAR-10 as torchvision keeps it, fetched on first use."""
    from torchvision.datasets import CIFAR10

    root = Path(config.path or "~/.cache/uvit_dia").expanduser()
    try:
        found = CIFAR10(str(root), train=split == "train", download=True)
    except Exception as error:
        remedies = "connect to the network, or set data.dataset to hub and data.path to a copy on disk"
        raise UserError(f"CIFAR-10 is not in {root} and can't be fetched ({error}); {remedies}") from None
    return f"cifar10/{split}", found.data, np.array(found.targets), 10


def folder(config: DataConfig, split: str, chosen: str) -> Source:
    """Image files in and below a folder, by sorted path; sub-folders are classes if every image is in one.

    Splits are sub-folders too; where there is none for "train", the whole folder is the training set.
    """
    root = Path(str(config.path)).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError("data.path", config.path, "a folder of images")
    name, has_splits = f"{root.name}/{split}", (root / config.train_split).is_dir()
    key, wanted = (split, chosen) if has_splits else ("train", config.train_split)
    if has_splits or split == "test" or wanted != DataConfig.train_split:
        if not (root / wanted).is_dir():
            known = sorted(next(os.walk(root))[1])
            raise MissingSplit(f"data.{key}_split", wanted, f"a folder in {root}, {one_of(wanted, known)}")
        root = root / wanted
    every = iglob("**/*", root_dir=root, recursive=True)  # without hidden ones: macOS leaves "._x.jpg"
    paths = sorted(path for path in every if path.lower().endswith(SUFFIXES))
    rows = np.array([str(root / path) for path in paths], dtype=object)
    if not all(os.sep in path for path in paths):
        return name, rows, np.zeros(len(rows)), None
    classes, labels = np.unique([path.split(os.sep)[0] for path in paths], return_inverse=True)
    return name, rows, labels, len(classes)


def hub(config: DataConfig, split: str, chosen: str) -> Source:
    """What Hugging Face's `datasets` loads: a name on the Hub, a folder, or one .parquet (split "train")."""
    path = Path(str(config.path)).expanduser()
    source = {"path": "parquet", "data_files": str(path)} if path.is_file() else {"path": str(path)}
    try:
        import datasets

        with redirect_stderr(sys.stderr if sys.stderr.isatty() else StringIO()):  # progress bars
            builder = datasets.load_dataset_builder(**source)
            builder.download_and_prepare()
    except ImportError:
        raise ConfigError("data.dataset", "hub", "its package by pip install 'uvit_dia[hub]'") from None
    except Exception as error:  # the library raises many types, some of them its builders' own
        expected = f"a data set on the Hub, or a folder or .parquet on disk ({error})"
        raise ConfigError("data.path", config.path, expected) from None
    try:
        table = builder.as_dataset(split=chosen)
    except ValueError:
        raise MissingSplit(f"data.{split}_split", chosen, one_of(chosen, list(builder.info.splits))) from None
    kinds, names = table.features, table.column_names
    column = config.image_column or next((x for x in names if isinstance(kinds[x], datasets.Image)), None)
    try:
        rows = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))[column]
    except Exception:  # of many types, for a column that is not there or holds something else
        expected = f"a column of images, {one_of(str(column), names)}"
        raise ConfigError("data.image_column", column, expected) from None
    name, column = f"{path.name.removesuffix('.parquet')}/{chosen}", config.label_column or "label"
    labels = table.data.column(column).to_numpy() if column in names else np.empty(0)
    if np.issubdtype(labels.dtype, np.integer) and (labels >= 0).all():  # -1: withheld by the Hub
        named = getattr(kinds[column], "num_classes", None) or 0  # whose file may hold others all the same
        return name, rows, labels, max(named, int(labels.max(initial=0)) + 1)
    if config.label_column is not None:
        raise ConfigError("data.label_column", column, f"class numbers from 0, {one_of(column, names)}")
    return name, rows, np.zeros(len(rows)), None


SOURCES = {"digits": digits, "cifar10": cifar10, "folder": folder, "hub": hub}


def decode(row: np.ndarray | bytes | str | dict, sample_size: int, in_channels: int) -> np.ndarray:
    """One image (pixels, an encoded file, its path, a cell) as uint8 (sample_size, sample_size[, 3]).

    Upright by its EXIF tag, the first frame of an animation, transparency over white, 16 bits scaled to 8;
    the centre square is resized (antialiased bicubic). Pillow refuses more than 178,956,970 pixels.
    """
    row = (row["bytes"] or row["path"]) if isinstance(row, dict) else row
    file: Any = BytesIO(row) if isinstance(row, bytes) else row
    opened = Image.fromarray(row) if isinstance(row, np.ndarray) else Image.open(file, formats=FORMATS)
    with opened as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # grey of 16 bits, which Pillow would clip, or of 32
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65_535:  # old Pillows call 16 bits "I"
                raise ValueError("its pixels are no integers of 8 or 16 bits")
            image = Image.fromarray(np.round(values / 257).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if in_channels == 1 else "RGB")
    side = min(image.size)  # the whole of a strip of 1 x 100,000 would be resized to gigabytes
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((sample_size, sample_size), Image.Resampling.BICUBIC, box))


def read(images: ImageSet, batches: Iterable[Sequence[int]], num_workers: int) -> Iterator[Tensor]:
    """The pixels of each batch of numbers, uint8 (b, C, H, W). Its workers end with the iterator."""
    atexit.register(end_workers)
    numbers: Any = range(len(images))
    options: Any = {"worker_init_fn": ignore_signals, "generator": torch.Generator()}
    options |= {"batch_sampler": batches, "collate_fn": partial(decode_in_worker, images)}
    # no variable holds the iterator, since the traceback of an error keeps them, and so the workers, alive
    for pixels in DataLoader(numbers, num_workers=num_workers, **options):
        if isinstance(pixels, UserError):
            raise pixels
        yield pixels


def decode_in_worker(images: ImageSet, indices: Sequence[int]) -> Tensor | UserError:
    """The pixels, or the UserError as a value: DataLoader would bury its line in a traceback."""
    try:
        return images.decode(indices)
    except UserError as error:
        return error


def ignore_signals(worker: int) -> None:
    """A signal to all processes reaches workers too, but what it means is for their parent to decide."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """At exit Python would end those that are left by a signal that they ignore, and wait for ever."""
    for process in [child for child in multiprocessing.active_children() if child.daemon]:
        process.kill()


def read_all(images: ImageSet, numbers: range | None = None) -> Iterator[Tensor]:
    """The pixels of the whole set, or of these images, in order, uint8 (512 or less, C, H, W)."""
    numbers = range(len(images)) if numbers is None else numbers
    num_workers = min(images.num_workers, len(numbers) // 2_000)  # one costs as much as 2,000 small images
    return read(images, BatchSampler(numbers, 512, drop_last=False), num_workers)


def materialize(images: ImageSet, limit_gib: float) -> Tensor | None:
    """The pixels of the whole set, uint8 (n, C, H, W); None if they take more than `limit_gib`."""
    fits = len(images) * math.prod(images.shape) <= limit_gib * 2**30
    # copies, since what workers made is shared memory, of which there may be little
    return torch.cat([pixels.clone() for pixels in read_all(images)]) if fits else None


def content_hash(images: ImageSet) -> str:
    """SHA-256, in hex, of the count, shape and pixels: what a score card knows its reference set by."""
    digest = hashlib.sha256(repr((len(images), *images.shape)).encode())
    for chunk in read_all(images):
        digest.update(chunk.numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=4)  # training and its prefetching may be in two epochs, a batch of each astride two
def permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    return numpy_generator(seed, Stream.ORDER, epoch).permutation(n)  # (n,) int64


def order(seed: int, n: int, positions: np.ndarray) -> np.ndarray:
    """Images at `positions` (b,) of the endless stream: place p % n of the shuffle of epoch p // n."""
    return np.array([permutation(seed, n, p // n)[p % n] for p in positions.tolist()])  # (b,) int64


class Batch(NamedTuple):
    """This process's share of one optimizer step, on the training device."""

    step: int
    images: Tensor  # (b, C, H, W) float32 in [-1, 1]
    labels: Tensor  # (b,) int64, zeros when unlabeled


@dataclass(eq=False)
class Batches:
    """Endless batches of which this process takes slice `rank` of `world`; no step waits for the device.

    What a step holds depends on the seed and its number alone: not on resuming, processes, workers or memory.
    """

    images: ImageSet
    config: DataConfig
    batch_size: int  # of all processes together
    seed: int
    device: torch.device | str
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        pixels = materialize(self.images, self.config.in_memory_gib)
        self.pixels = None if pixels is None else pixels.to(self.device)  # (n, C, H, W) uint8
        self.labels = torch.from_numpy(self.images.labels).to(self.device)  # (n,)
        self.share = np.array_split(np.arange(self.batch_size), self.world)[self.rank]  # (b,)

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of optimizer step `step`, counted from 0, and of all that follow."""
        if self.pixels is None:
            streamed = read(self.images, map(self.indices, count(step)), self.images.num_workers)
        for s in count(step):
            coins = numpy_generator(self.seed, Stream.FLIPS, s).random(self.batch_size) < self.config.flip / 2
            index, flip = self.to_device(self.indices(s)), self.to_device(coins[self.share])  # (b,)
            pixels = self.to_device(next(streamed)) if self.pixels is None else self.pixels[index]
            x = pixels.float().mul_(1 / 127.5).sub_(1)  # (b, C, H, W); devices round a division differently
            try:
                yield Batch(s, torch.where(flip[:, None, None, None], x.flip(-1), x), self.labels[index])
            except GeneratorExit:  # else Python 3.12.0 to 3.12.3 keep the workers of a closed iterator
                return

    def indices(self, step: int) -> list[int]:
        return order(self.seed, len(self.images), step * self.batch_size + self.share).tolist()  # b of them

    def to_device(self, x: list[int] | np.ndarray | Tensor) -> Tensor:
        x = torch.as_tensor(x)
        return (x.pin_memory() if self.labels.is_cuda else x).to(self.device, non_blocking=True)
