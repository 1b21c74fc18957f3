"""Images and their one order: sets decoded to uint8, and batches that depend on nothing but seed and step."""

import hashlib
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO, StringIO
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from uvit_dia.errors import ConfigError, UserError, nearest, one_of
from uvit_dia.random_keys import Stream, numpy_generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CHUNK = 512  # images decoded at a time when a whole set is read


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
        if self.dataset not in SOURCES:
            raise ConfigError("data.dataset", self.dataset, one_of(str(self.dataset), list(SOURCES)))
        if self.dataset in ("folder", "hub") and not self.path:
            raise ConfigError("data.path", self.path, f"a path, which data.dataset {self.dataset} needs")
        if self.dataset == "digits" and self.path is not None:
            raise ConfigError("data.path", self.path, "null with data.dataset digits; is it a folder or hub?")
        for name in ("in_memory_gib", "num_workers"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"data.{name}", getattr(self, name), "0 or more")


@dataclass(eq=False)
class ImageSet(Dataset):
    """Images by number: `images[i]` is (uint8 (C, H, W), int label), the label 0 where there are none.

    Reading an image that can't be decoded raises UserError, which names the file or the row.
    """

    name: str  # for people: "digits/train"
    rows: Any  # rows[indices] gives as many arrays of pixels, encoded files or paths
    labels: np.ndarray  # (n,) int64
    num_labels: int | None  # None: unlabeled
    shape: tuple[int, int, int]  # (C, H, W)
    num_workers: int  # that decode it

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        i = range(len(self))[i]  # IndexError past the end
        return self.decode([i])[0], int(self.labels[i])

    def decode(self, indices: Sequence[int]) -> Tensor:
        """The images of these numbers, uint8 (b, C, H, W)."""
        channels, size, _ = self.shape
        pixels = np.empty((len(indices), size, size, channels), np.uint8)
        for j, row in enumerate(self.rows[indices]):
            try:
                pixels[j] = decode(row, size, channels).reshape(size, size, channels)
            except Exception as error:  # Pillow's decoders raise some ten types
                where = row if isinstance(row, str) else f"row {indices[j]} of {self.name}"
                alien = isinstance(error, UnidentifiedImageError)  # its text is the address of a buffer
                why = "no format that Pillow knows" if alien else error
                raise UserError(f"{where} can't be decoded as an image ({why}); mend or remove it") from None
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


Split = Literal["train", "test"]
Source = tuple[str, Any, np.ndarray | None, int | None]  # name, rows, labels (n,), num_labels: as in ImageSet


def load_images(config: DataConfig, split: Split, sample_size: int, in_channels: int) -> ImageSet:
    """Training or held-out images, which are decoded, and complained of, when they are read.

    ConfigError: no such folder, data set, split or column; no images; channels other than 1 and 3. UserError:
    a download that failed.
    """
    if in_channels not in (1, 3):
        raise ConfigError("model.in_channels", in_channels, "1 (grey) or 3 (RGB)")
    chosen = config.train_split if split == "train" else config.test_split
    if chosen is None:
        raise ConfigError("data.test_split", None, "the name of a held-out split")
    name, rows, labels, num_labels = SOURCES[config.dataset](config, split, chosen)
    if len(rows) == 0:
        raise ConfigError("data.path", config.path, f"images, of which {name} has none")
    labels = np.zeros(len(rows), np.int64) if labels is None else labels.astype(np.int64)
    shape = (in_channels, sample_size, sample_size)
    return ImageSet(name, rows, labels, num_labels, shape, config.num_workers)


def test_images(config: DataConfig, sample_size: int, in_channels: int) -> ImageSet | None:
    """The held-out images; None if data.test_split is null, or left at its default and not there."""
    if config.test_split is None:
        return None
    try:
        return load_images(config, "test", sample_size, in_channels)
    except MissingSplit:
        if config.test_split == DataConfig.test_split:
            return None
        raise


def digits(config: DataConfig, split: Split, chosen: str) -> Source:
    """scikit-learn's 1,797 digits of 8x8: 1,197 to train on, 600 held out in equal shares."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0..16
    parts = train_test_split(np.arange(len(labels)), test_size=600, random_state=0, stratify=labels)
    part = np.sort(parts[split == "test"])
    return f"digits/{split}", pixels[part], labels[part], 10


def cifar10(config: DataConfig, split: Split, chosen: str) -> Source:
    """CIFAR-10 as torchvision keeps it, fetched on first use, by one process at a time."""
    from filelock import FileLock
    from torchvision.datasets import CIFAR10

    root = Path(config.path or "~/.cache/uvit_dia").expanduser()
    try:
        try:
            found = CIFAR10(str(root), train=split == "train")
        except RuntimeError:  # not there yet
            root.mkdir(parents=True, exist_ok=True)
            with quiet(), FileLock(root / "cifar10.lock"):
                found = CIFAR10(str(root), train=split == "train", download=True)
    except Exception as error:
        remedies = "connect to the network, or set data.dataset to hub and data.path to a copy on disk"
        raise UserError(f"CIFAR-10 is not in {root} and can't be fetched ({error}); {remedies}") from None
    return f"cifar10/{split}", found.data, np.array(found.targets), 10


def folder(config: DataConfig, split: Split, chosen: str) -> Source:
    """Image files in and below a folder, by sorted path; sub-folders are classes if every image is in one.

    Splits are sub-folders too; where there is none for "train", the whole folder is the training set.
    """
    root = Path(config.path).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError("data.path", config.path, f"a folder of images{nearest_file(root)}")
    name, has_splits = f"{root.name}/{split}", (root / config.train_split).is_dir()
    if has_splits and (root / chosen).is_dir():
        root = root / chosen
    elif split == "test" or chosen != DataConfig.train_split:
        key, missing = (split, chosen) if has_splits else ("train", config.train_split)
        known = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) or ["(there are none)"]
        raise MissingSplit(f"data.{key}_split", missing, f"a folder in {root}, {one_of(missing, known)}")
    paths = sorted(
        os.path.relpath(os.path.join(parent, file), root)
        for parent, _, files in os.walk(root, followlinks=True)
        for file in files
        if file.lower().endswith(SUFFIXES) and not file.startswith(".")  # macOS leaves "._x.jpg" in archives
    )
    rows = np.array([str(root / path) for path in paths], dtype=object)
    if not all(os.sep in path for path in paths):
        return name, rows, None, None
    classes, labels = np.unique([path.split(os.sep)[0] for path in paths], return_inverse=True)
    return name, rows, labels, len(classes)


def hub(config: DataConfig, split: Split, chosen: str) -> Source:
    """What Hugging Face's `datasets` loads: a name on the Hub, a folder, or one .parquet (split "train")."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("data.dataset", "hub", "its package by pip install 'uvit_dia[hub]'") from None
    path = Path(config.path).expanduser().absolute()
    where = {"path": str(path) if path.exists() else config.path}
    if path.suffix == ".parquet" and path.is_file():
        where = {"path": "parquet", "data_files": str(path)}
    try:
        with quiet():
            try:
                table = datasets.load_dataset(**where, split=chosen)
            except ValueError:  # no such split; if it is about something else, this fails in the same way
                table, known = None, list(datasets.load_dataset(**where))
    except Exception as error:  # the library raises many types, some of them its builders' own
        expected = f"a data set on the Hub, or a folder or .parquet on disk ({error}){nearest_file(path)}"
        raise ConfigError("data.path", config.path, expected) from None
    if table is None:
        raise MissingSplit(f"data.{split}_split", chosen, one_of(chosen, known))
    name = path.name.removesuffix(".parquet") if path.exists() else config.path
    return f"{name}/{chosen}", HubColumn(table, config.image_column), *hub_labels(table, config.label_column)


class HubColumn:
    """The encoded images of a Hugging Face data set, by row numbers; column None: the first of images."""

    def __init__(self, table: Any, column: str | None) -> None:
        from datasets import Image

        images = [name for name, kind in table.features.items() if isinstance(kind, Image)]
        self.column = column or next(iter(images), None)
        try:
            self.table = table.select_columns([self.column]).cast_column(self.column, Image(decode=False))
        except Exception:  # of many types, for a column that is not there or holds something else
            expected = f"a column of images, {one_of(str(column), table.column_names)}"
            raise ConfigError("data.image_column", column, expected) from None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, indices: Sequence[int]) -> list[bytes | str]:
        cells = self.table[indices][self.column]
        return [(cell and (cell["bytes"] or cell["path"])) or b"" for cell in cells]  # b"": a null, no image


def hub_labels(table: Any, column: str | None) -> tuple[np.ndarray | None, int | None]:
    """Class numbers (n,) and how many classes; Nones if no column is named and "label" holds none."""
    name = column or "label"
    if name in table.column_names:
        labels = table.data.column(name).to_numpy()
        if np.issubdtype(labels.dtype, np.integer) and not (labels < 0).any():  # -1: withheld by the Hub
            num_classes = getattr(table.features[name], "num_classes", None)
            return labels, num_classes or int(labels.max(initial=0)) + 1
    if column is None:
        return None, None
    expected = f"a column of class numbers from 0, {one_of(column, table.column_names)}"
    raise ConfigError("data.label_column", column, expected)


SOURCES = {"digits": digits, "cifar10": cifar10, "folder": folder, "hub": hub}


class MissingSplit(ConfigError):
    """There is no split of that name."""


def nearest_file(path: Path) -> str:
    """The end of an error line that offers a file beside the missing `path`."""
    return nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() and not path.exists() else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence a library where an error is to be one line; at a terminal its progress bars still show."""
    disabled = logging.root.manager.disable
    sink = sys.stderr if sys.stderr.isatty() else StringIO()
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sink), redirect_stderr(sink):
            yield
    finally:
        logging.disable(disabled)


def decode(row: np.ndarray | bytes | str, sample_size: int, in_channels: int) -> np.ndarray:
    """One image (pixels, an encoded file or its path) as uint8 (sample_size, sample_size[, 3]).

    Upright by its EXIF tag, the first frame of an animation, transparency over white, 16 bits scaled to 8.
    The shorter side is resized to `sample_size` (antialiased bicubic) and the centre cropped: an image that
    has the size is left as it is. Raises what Pillow raises, and ValueError for pixels of unknown range.
    """
    file = BytesIO(row) if isinstance(row, bytes) else row
    with Image.fromarray(file) if isinstance(file, np.ndarray) else Image.open(file) as image:
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
    scale = sample_size / min(image.size)
    if scale != 1:
        size = [max(sample_size, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - sample_size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + sample_size, top + sample_size)))


class Decoder(Dataset):
    """What a worker runs. A UserError travels as a value: DataLoader would bury its line in a traceback."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> Tensor | UserError:
        try:
            return self.images.decode(indices)
        except UserError as error:
            return error


def read(images: ImageSet, batches: Iterable[Sequence[int]], num_workers: int, pin: bool) -> Iterator[Tensor]:
    """The pixels of each batch of numbers, uint8 (b, C, H, W). Closing the iterator ends its workers."""
    options = {"num_workers": num_workers, "pin_memory": pin, "worker_init_fn": ignore_interrupt}
    options["generator"] = torch.Generator()  # else it draws from the global one
    with warnings.catch_warnings():  # of more workers than cores
        warnings.simplefilter("ignore")
        loaded = iter(DataLoader(Decoder(images), sampler=batches, batch_size=None, **options))
    try:
        for pixels in loaded:
            if isinstance(pixels, UserError):
                raise pixels
            yield pixels
    finally:
        del loaded  # the traceback of an error keeps this frame, which must not keep the workers


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches workers too, but what it means is for their parent to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_all(images: ImageSet) -> Iterator[Tensor]:
    """The pixels of the whole set in order, uint8 (CHUNK or less, C, H, W)."""
    every = range(len(images))
    num_workers = min(images.num_workers, len(every) // 2_000)  # one starts in the time of 2,000 small images
    return read(images, [every[i : i + CHUNK] for i in every[::CHUNK]], num_workers, pin=False)


def materialize(images: ImageSet, limit_gib: float) -> tuple[Tensor, Tensor] | None:
    """The whole set: uint8 (n, C, H, W) and int64 (n,); None if the pixels take more than `limit_gib`."""
    if len(images) * math.prod(images.shape) > limit_gib * 2**30:
        return None
    pixels = torch.empty(len(images), *images.shape, dtype=torch.uint8)
    for part, chunk in zip(pixels.split(CHUNK), read_all(images), strict=True):
        part.copy_(chunk)
    return pixels, torch.from_numpy(images.labels)


def content_hash(images: ImageSet) -> str:
    """SHA-256, in hex, of the count, shape and pixels: what a score card knows its reference set by."""
    digest = hashlib.sha256(repr((len(images), *images.shape)).encode())
    for chunk in read_all(images):
        digest.update(chunk.numpy())
    return digest.hexdigest()


@lru_cache(maxsize=4)  # training and its prefetching may be in two epochs, a batch of each astride two
def permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    return numpy_generator(seed, Stream.ORDER, epoch).permutation(n)  # (n,) int64


def order(seed: int, n: int, positions: np.ndarray) -> np.ndarray:
    """Images at `positions` (b,) int64 of the endless stream: place p % n of the shuffle of epoch p // n."""
    epochs, places = np.divmod(positions, n)
    images = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        images[here] = permutation(seed, n, int(epoch))[places[here]]
    return images


class Batch(NamedTuple):
    """This process's share of one optimizer step, on the training device."""

    step: int
    images: Tensor  # (b, C, H, W) float32 in [-1, 1]
    labels: Tensor  # (b,) int64, zeros when unlabeled


@dataclass(eq=False)
class Batches:
    """Endless batches of `images`, of which this process takes slice `rank` of `world`.

    What a step holds depends on the seed and its number alone: not on where a run resumed, how many processes
    or workers there are, or whether the set is in memory. `world` must divide `batch_size`. No step waits for
    the device.
    """

    images: ImageSet
    config: DataConfig
    batch_size: int  # of all processes together
    seed: int
    device: torch.device | str
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        in_memory = materialize(self.images, self.config.in_memory_gib)
        self.pixels = in_memory[0].to(self.device) if in_memory else None  # (n, C, H, W) uint8
        self.labels = torch.from_numpy(self.images.labels).to(self.device)  # (n,)
        self.share = slice(*(self.batch_size // self.world * r for r in (self.rank, self.rank + 1)))

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of optimizer step `step`, counted from 0, and of all that follow."""
        if self.pixels is None:
            batches, on_gpu = map(self.indices, count(step)), self.device.type == "cuda"
            streamed = read(self.images, batches, self.images.num_workers, pin=on_gpu)
        for s in count(step):
            packed = self.to_device(torch.from_numpy(2 * self.indices(s) + self.flips(s)))  # both in one copy
            index, flip = packed >> 1, (packed & 1).bool()  # (b,)
            pixels = self.to_device(next(streamed)) if self.pixels is None else self.pixels[index]
            x = pixels.float().mul_(1 / 127.5).sub_(1)  # (b, C, H, W); devices round a division differently
            yield Batch(s, torch.where(flip[:, None, None, None], x.flip(-1), x), self.labels[index])

    def indices(self, step: int) -> np.ndarray:
        positions = step * self.batch_size + np.arange(self.batch_size)[self.share]
        return order(self.seed, len(self.images), positions)  # (b,) int64

    def flips(self, step: int) -> np.ndarray:
        drawn = numpy_generator(self.seed, Stream.FLIPS, step).random(self.batch_size) < 0.5
        return drawn[self.share] & self.config.flip  # (b,) bool

    def to_device(self, x: Tensor) -> Tensor:
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)
