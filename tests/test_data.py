"""Images as users bring them, and the one order in which training sees them."""

import io
import multiprocessing
import pickle
import re
import resource
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from uvit_dia import data
from uvit_dia.data import Batches, DataConfig, decode, load_images, materialize, order
from uvit_dia.errors import ConfigError, UserError

CIFAR10 = Path(__file__).parents[2] / "shared/data/cifar10"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Nothing is fetched, and nothing is written outside the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_folder(root: Path, *names: str) -> DataConfig:
    """Each name becomes a 6x6 image of its own noise."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(Image.fromarray(noise(6, 6, 3, seed=i))))
    return DataConfig(dataset="folder", path=str(root))


def make_parquet(file: Path, **columns) -> DataConfig:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return DataConfig(dataset="hub", path=str(file))


def cells(n: int, seed: int = 0) -> list[dict]:
    pixels = noise(n, 4, 4, 3, seed=seed)
    return [{"bytes": encoded(Image.fromarray(image)), "path": None} for image in pixels]


def equal(a: data.Batch, b: data.Batch) -> bool:
    return a.step == b.step and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


# The order.


def test_order_is_the_plain_loop_over_keyed_shuffles_whatever_the_batch():
    seed, n = 3, 7
    stream = []
    for epoch in range(6):
        key = np.random.SeedSequence([seed, data.Stream.ORDER, epoch])
        stream += list(np.random.default_rng(key).permutation(n))
    for batch_size in (1, 5, 7, 20, 42):  # 20: several epochs in a batch
        starts = range(0, len(stream) - batch_size + 1, batch_size)
        batches = [order(seed, n, np.arange(start, start + batch_size)) for start in starts]
        read = np.concatenate(batches)
        assert read.dtype == np.int64
        assert read.tolist() == stream[: len(read)]


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own():
    epochs = order(0, 50, np.arange(500)).reshape(10, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert not np.array_equal(order(1, 50, np.arange(50)), epochs[0])


def test_positions_may_come_in_any_order_and_lie_far_away():
    positions = np.array([10**12 + 3, 2, 10**12, 0])
    one_by_one = [order(5, 11, positions[i : i + 1])[0] for i in range(4)]
    assert order(5, 11, positions).tolist() == one_by_one


# Batches.


@pytest.fixture
def images(tmp_path):
    names = [f"{'abc'[i % 3]}/{i}.png" for i in range(10)]
    return load_images(make_folder(tmp_path / "images", *names), "train", 4, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_batches_equal_those_in_memory_bit_for_bit(images, num_workers):
    images.num_workers = num_workers
    config = DataConfig()
    in_memory = Batches(images, config, 8, seed=1, device="cpu")
    streamed = Batches(images, replace(config, in_memory_gib=0), 8, seed=1, device="cpu")
    assert in_memory.pixels is not None and streamed.pixels is None
    pairs = zip(in_memory.from_step(3), streamed.from_step(3), strict=False)
    assert all(equal(a, b) for a, b in islice(pairs, 6))


@pytest.mark.parametrize("in_memory_gib", [0, 1])
def test_processes_and_resumed_runs_see_the_same_stream(images, in_memory_gib):
    images.num_workers = 0
    config = DataConfig(in_memory_gib=in_memory_gib)
    whole = list(islice(Batches(images, config, 12, seed=0, device="cpu").from_step(0), 5))
    for world in (2, 3):
        shares = [Batches(images, config, 12, 0, "cpu", rank, world).from_step(2) for rank in range(world)]
        for expected, *parts in zip(whole[2:], *shares, strict=False):
            assert len(parts) == world and all(part.step == expected.step for part in parts)
            assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
            assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)


def test_batches_hold_the_images_of_the_order_with_their_labels(images):
    batches = Batches(images, DataConfig(flip=False), 4, seed=9, device="cpu")
    for batch in islice(batches.from_step(1), 4):
        indices = order(9, 10, np.arange(4) + 4 * batch.step)
        expected = torch.stack([images[i][0] for i in indices])
        assert torch.equal(((batch.images + 1) * 127.5).round().byte(), expected)
        assert batch.labels.tolist() == [images[i][1] for i in indices]
        assert batch.images.dtype == torch.float32 and batch.labels.dtype == torch.int64


def test_pixels_0_and_255_become_exactly_minus_1_and_1(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    images = load_images(DataConfig(dataset="folder", path=str(tmp_path)), "train", 2, 3)
    batch = next(Batches(images, DataConfig(), 1, seed=0, device="cpu").from_step(0))
    assert (batch.images[0, :, 0] == 1).all() and (batch.images[0, :, 1] == -1).all()


def test_about_half_the_images_are_mirrored_and_differently_each_step(images):
    flipped, plain = (Batches(images, DataConfig(flip=f), 100, 0, "cpu").from_step(0) for f in (True, False))
    mirrored = []
    for a, b in islice(zip(flipped, plain, strict=False), 10):
        same = (a.images == b.images).flatten(1).all(1)
        assert ((a.images == b.images.flip(-1)).flatten(1).all(1) != same).all()
        mirrored.append(~same)
    assert 430 < torch.stack(mirrored).sum() < 570  # 1,000 coins: 4.4 deviations
    assert len({tuple(row.tolist()) for row in mirrored}) == 10


def test_closing_the_stream_ends_its_workers_and_reading_leaves_the_global_generators_alone(images):
    images.num_workers = 2
    state, others = torch.get_rng_state(), set(multiprocessing.active_children())  # of tests before
    stream = Batches(images, DataConfig(in_memory_gib=0), 4, seed=0, device="cpu").from_step(0)
    next(stream)
    assert len(set(multiprocessing.active_children()) - others) == 2
    stream.close()
    assert not set(multiprocessing.active_children()) - others
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_no_batch_waits_for_the_device_and_both_ways_agree(images):
    images.num_workers = 2
    gpu, cpu, stream = (
        Batches(images, DataConfig(in_memory_gib=gib), 8, 0, device).from_step(0)
        for gib, device in ((1, "cuda"), (1, "cpu"), (0, "cuda"))
    )
    next(gpu), next(stream), next(cpu)  # the first allocate
    torch.cuda.set_sync_debug_mode("error")
    try:
        triples = list(islice(zip(gpu, stream, cpu, strict=False), 5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b, c in triples:
        assert equal(a, b) and equal(a._replace(images=a.images.cpu(), labels=a.labels.cpu()), c)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("in_memory_gib", [0, 1])
def test_an_image_that_is_none_is_named_in_one_line(tmp_path, num_workers, in_memory_gib):
    config = make_folder(tmp_path / "images", *(f"{i}.png" for i in range(4)))
    (tmp_path / "images/2.png").write_bytes(b"no image")
    config = replace(config, num_workers=num_workers, in_memory_gib=in_memory_gib)
    others = set(multiprocessing.active_children())
    with pytest.raises(UserError) as caught:
        images = load_images(config, "train", 4, 3)
        list(islice(Batches(images, config, 4, seed=0, device="cpu").from_step(0), 1))
    path = tmp_path / "images/2.png"
    why = "none of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"
    assert str(caught.value) == f"{path} can't be decoded as an image ({why}); mend or remove it"
    assert not set(multiprocessing.active_children()) - others


# Sets of images.


def test_digits_hold_out_600_stratified_and_disjoint_and_scale_16_to_255():
    train, test = (load_images(DataConfig(), split, 8, 1) for split in ("train", "test"))
    assert (len(train), len(test), train.num_labels, train.name) == (1197, 600, 10, "digits/train")
    pixels = [{image.numpy().tobytes() for image in materialize(part, 1)} for part in (train, test)]
    assert not pixels[0] & pixels[1]
    assert set(np.bincount(test.labels)) <= {58, 59, 60, 61, 62}
    from sklearn.datasets import load_digits

    expected = {np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images}
    assert pixels[0] | pixels[1] == expected


def test_an_image_set_is_a_dataset_that_ends_and_that_a_dataloader_takes():
    images = load_images(DataConfig(), "train", 8, 1)
    image, label = images[-1]
    assert (image.shape, image.dtype, type(label)) == ((1, 8, 8), torch.uint8, int)
    with pytest.raises(IndexError):
        images[1197]
    pixels, labels = next(iter(DataLoader(images, batch_size=5)))
    assert pixels.shape == (5, 1, 8, 8) and labels.tolist() == images.labels[:5].tolist()


def test_a_set_is_materialized_in_order_if_it_fits_the_limit(images):
    need = 10 * 3 * 4 * 4 / 2**30
    assert materialize(images, need * 0.99) is None
    pixels = materialize(images, need)
    assert torch.equal(pixels, torch.stack([image for image, _ in images]))


def test_the_content_hash_is_of_count_shape_and_pixels_in_order(images):
    pixels = materialize(images, 1)
    expected = sha256(b"(10, 3, 4, 4)" + pixels.numpy().tobytes()).hexdigest()
    assert data.content_hash(images) == expected
    images.rows = images.rows[::-1]
    assert data.content_hash(images) != expected


def test_a_folder_is_read_in_sorted_order_with_sub_folders_as_classes(tmp_path):
    names = ["b/z.PNG", "a/deep/y.Jpeg", "b/x.png", "c/w.webp"]
    config = make_folder(tmp_path, *names)
    (tmp_path / "b/notes.txt").write_text("no image")
    (tmp_path / "b/._x.png").write_bytes(b"what macOS leaves")
    images = load_images(config, "train", 6, 3)
    assert [str(Path(row).relative_to(tmp_path)) for row in images.rows] == sorted(names)
    assert images.labels.tolist() == [0, 1, 1, 2] and images.num_labels == 3
    assert torch.equal(images[2][0], torch.from_numpy(noise(6, 6, 3, seed=0)).permute(2, 0, 1))
    assert data.test_images(config, 6, 3) is None


def test_an_image_outside_the_sub_folders_leaves_a_folder_unlabeled(tmp_path):
    images = load_images(make_folder(tmp_path, "a/x.png", "y.png"), "train", 6, 3)
    assert images.num_labels is None and images.labels.tolist() == [0, 0]


def test_sub_folders_named_as_the_splits_are_the_splits(tmp_path):
    config = make_folder(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    assert load_images(config, "train", 6, 3).labels.tolist() == [0, 1]
    held_out = data.test_images(config, 6, 3)
    assert len(held_out) == 1 and held_out.name == f"{tmp_path.name}/test"
    assert data.test_images(replace(config, test_split=None), 6, 3) is None
    with pytest.raises(
        ConfigError, match=r"data.test_split: 'tset'.*one of test, train; did you mean 'test'"
    ):
        data.test_images(replace(config, test_split="tset"), 6, 3)
    with pytest.raises(ConfigError, match=r"data.train_split: 'trian'.*did you mean 'train'"):
        load_images(replace(config, train_split="trian"), "train", 6, 3)


def test_without_a_train_folder_a_test_folder_is_part_of_the_training_set_and_not_held_out(tmp_path):
    config = make_folder(tmp_path, "test/1.png", "cats/2.png")
    assert len(load_images(config, "train", 6, 3)) == 2
    assert data.test_images(config, 6, 3) is None
    with pytest.raises(ConfigError, match=r"data.train_split: 'train'.*one of cats, test"):
        load_images(config, "test", 6, 3)


# Hugging Face.


def test_a_folder_of_parquet_written_by_datasets_has_splits_slices_and_labels(tmp_path, capfd):
    features = datasets.Features(
        {"id": datasets.Value("int64"), "picture": datasets.Image(), "label": datasets.ClassLabel(3)}
    )
    for split, n in (("train", 6), ("test", 2)):
        rows = {"id": range(n), "picture": cells(n), "label": [i % 2 for i in range(n)]}
        table = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / f"set/{split}-00000-of-00001.parquet")
    config = DataConfig(dataset="hub", path=str(tmp_path / "set"))
    capfd.readouterr()
    images = load_images(config, "train", 4, 3)
    assert capfd.readouterr() == ("", "")
    assert (images.name, images.num_labels, images.labels.tolist()) == ("set/train", 3, [0, 1] * 3)
    pixels = materialize(images, 1)
    assert torch.equal(pixels, torch.from_numpy(noise(6, 4, 4, 3)).permute(0, 3, 1, 2))
    assert len(data.test_images(config, 4, 3)) == 2
    assert len(load_images(replace(config, train_split="train[:4]"), "train", 4, 3)) == 4
    with pytest.raises(
        ConfigError, match=r"data.train_split: 'trani'.*one of (train, test|test, train); did"
    ):
        load_images(replace(config, train_split="trani"), "train", 4, 3)
    with pytest.raises(ConfigError, match=r"data.image_column: 'picure'.*did you mean 'picture'"):
        load_images(replace(config, image_column="picure"), "train", 4, 3)
    with pytest.raises(ConfigError, match=r"data.label_column: 'lable'.*did you mean 'label'"):
        load_images(replace(config, label_column="lable"), "train", 4, 3)
    with pytest.raises(ConfigError, match=r"data.image_column: 'label'.*a column of images"):
        load_images(replace(config, image_column="label"), "train", 4, 3)


def test_one_parquet_file_of_another_writer_is_the_train_split_and_its_columns_can_be_named(tmp_path):
    numbers = [2, 0, 1]
    config = make_parquet(tmp_path / "x.parquet", picture=cells(3), kind=numbers, label=["a", "b", "c"])
    config = replace(config, image_column="picture")
    assert load_images(config, "train", 4, 3).num_labels is None  # words are no class numbers
    images = load_images(replace(config, label_column="kind"), "train", 4, 3)
    assert images.num_labels == 3 and images.labels.tolist() == numbers
    assert torch.equal(images[1][0], torch.from_numpy(noise(3, 4, 4, 3)[1]).permute(2, 0, 1))
    assert data.test_images(config, 4, 3) is None
    with pytest.raises(ConfigError, match=r"data.label_column: 'label'.*class numbers"):
        load_images(replace(config, label_column="label"), "train", 4, 3)
    with pytest.raises(ConfigError, match=r"data.image_column: None.*one of picture, kind, label"):
        load_images(replace(config, image_column=None), "train", 4, 3)


def test_withheld_labels_leave_a_set_unlabeled_and_bare_bytes_are_images(tmp_path):
    files = [cell["bytes"] for cell in cells(2)]
    config = make_parquet(tmp_path / "x.parquet", data=files, label=[-1, -1])
    images = load_images(replace(config, image_column="data"), "train", 4, 3)
    assert images.num_labels is None and images.labels.tolist() == [0, 0]
    assert torch.equal(images[1][0], torch.from_numpy(noise(2, 4, 4, 3)[1]).permute(2, 0, 1))


def test_a_label_outside_its_named_classes_counts_so_that_no_model_is_too_small(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": cells(3), "label": [0, 1, 7]}, features=features)
    table = rows.data.table.replace_schema_metadata(
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)}).arrow_schema.metadata
    )
    pq.write_table(table, tmp_path / "x.parquet")
    images = load_images(DataConfig(dataset="hub", path=str(tmp_path / "x.parquet")), "train", 4, 3)
    assert images.num_labels == 8 and images.labels.tolist() == [0, 1, 7]


@pytest.mark.parametrize("labels", [[0.5, 1, 2], [0, None, 1], ["a", "b", "c"], [0, -2, 1]])
def test_labels_that_are_no_class_numbers_are_refused_if_asked_for_and_else_left_out(tmp_path, labels):
    config = replace(make_parquet(tmp_path / "x.parquet", image=cells(3), label=labels), image_column="image")
    assert load_images(config, "train", 4, 3).num_labels is None
    with pytest.raises(ConfigError, match=r"data.label_column: 'label' .* class numbers from 0"):
        load_images(replace(config, label_column="label"), "train", 4, 3)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_that_comes_with_data_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    script = f"import pathlib; pathlib.Path({str(ran)!r}).touch()"
    (tmp_path / "set").mkdir()
    (tmp_path / "set/set.py").write_text(script)
    with pytest.raises(ConfigError, match=r"data.path"):
        load_images(DataConfig(dataset="hub", path=str(tmp_path / "set")), "train", 8, 3)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:1/x")
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in ("batches.meta", "data_batch_1", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(UserError, match="CIFAR-10 is not in"):
        load_images(DataConfig(dataset="cifar10", path=str(tmp_path)), "train", 32, 3)
    assert not ran.exists()


def test_an_empty_cell_is_named_by_its_row(tmp_path):
    config = make_parquet(tmp_path / "x.parquet", image=[*cells(2), None])
    images = load_images(replace(config, image_column="image"), "train", 4, 3)
    with pytest.raises(UserError, match=r"^row 2 of x/train can't be decoded as an image"):
        materialize(images, 1)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"there is no {CIFAR10}")
def test_cifar10_on_disk_loads_quietly_and_quickly(capfd):
    config = DataConfig(dataset="hub", path=str(CIFAR10), num_workers=2)
    train, test = load_images(config, "train", 32, 3), data.test_images(config, 32, 3)
    assert capfd.readouterr() == ("", "")
    assert (len(train), len(test), train.num_labels) == (50_000, 10_000, 10)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    pixels = materialize(test, 1)  # a fifth of the time that training takes to begin
    direct = datasets.load_dataset(str(CIFAR10), split="test")
    for i in (0, 4_321, 9_999):
        assert np.array_equal(pixels[i].permute(1, 2, 0), np.asarray(direct[i]["img"]))


def test_cifar10_says_both_ways_out_when_it_cannot_be_fetched(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:1/x")
    config = DataConfig(dataset="cifar10", path=str(tmp_path))
    with pytest.raises(UserError, match=r"connect to the network, or set data.dataset to hub and data.path"):
        load_images(config, "train", 32, 3)
    assert capfd.readouterr() == ("", "")


def test_cifar10_as_torchvision_keeps_it_needs_no_network(tmp_path, monkeypatch):
    folder, pixels = tmp_path / "cifar-10-batches-py", noise(12, 3072)
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        rows = {"data": pixels[2 * i : 2 * i + 2], "labels": [i, 9]}
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    config = DataConfig(dataset="cifar10", path=str(tmp_path))
    images, held_out = load_images(config, "train", 32, 3), data.test_images(config, 32, 3)
    assert (len(images), images.num_labels, held_out.labels.tolist()) == (10, 10, [5, 9])
    assert np.array_equal(images[3][0], pixels[3].reshape(3, 32, 32))


# One image.


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_is_untouched_bit_for_bit(channels):
    pixels = noise(9, 9, 3).squeeze() if channels == 3 else noise(9, 9)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), 9, channels), pixels)


def test_the_centre_is_cropped_from_an_image_whose_shorter_side_fits():
    pixels = noise(4, 11)
    assert np.array_equal(decode(pixels, 4, 1), pixels[:, 3:7])
    assert np.array_equal(decode(np.ascontiguousarray(pixels.T), 4, 1), pixels.T[3:7])


def bicubic(n: int, size: int, side: int) -> torch.Tensor:
    """Weights (size, n) that resample the middle `side` of n pixels: Keys' kernel, a = -1/2, antialiased."""
    scale = side / size
    centres = (n - side) // 2 + (torch.arange(size) + 0.5) * scale
    x = ((torch.arange(n) + 0.5 - centres[:, None]) / max(1, scale)).abs()
    weights = torch.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x < 2)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("shape", [(31, 24), (24, 31), (5, 6), (300, 20), (9, 9)])
def test_resizing_is_antialiased_bicubic_of_the_centre_square(shape):
    pixels = noise(*shape) // 2 + 64  # no overshoot, which Pillow would clip between its two passes
    rows, columns = (bicubic(n, 8, min(shape)) for n in shape)
    expected = rows @ torch.from_numpy(pixels).float() @ columns.T
    assert (torch.from_numpy(decode(pixels, 8, 1).astype(np.float32)) - expected).abs().max() <= 1.5


def test_a_long_strip_takes_the_memory_of_its_square_alone():
    strip = encoded(Image.fromarray(noise(1, 1_000_000)))  # resized as a whole: 64 x 64,000,000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode(strip, 64, 1).shape == (64, 64)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 2**28


def test_transparency_is_laid_over_white():
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert np.abs(decode(encoded(half), 2, 3).astype(int) - [255, 127, 127]).max() <= 1
    assert (
        np.abs(decode(encoded(half.convert("LA")), 2, 1).astype(int) - (255 - 128 * (1 - 76 / 255))).max()
        <= 1
    )
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert np.array_equal(decode(encoded(palette), 2, 3), np.full((2, 2, 3), [10, 20, 30]))
    assert (decode(encoded(palette, transparency=1), 2, 3) == 255).all()  # one colour of the palette is clear
    assert (decode(encoded(Image.new("RGB", (2, 2), "red"), transparency=(255, 0, 0)), 2, 3) == 255).all()
    assert (decode(encoded(Image.new("L", (2, 2), 7), transparency=7), 2, 1) == 255).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257], [32896, 65535]], np.uint16)
    grey = decode(encoded(Image.fromarray(values), kind), 2, 1)
    assert grey.tolist() == [[0, 1], [128, 255]]
    assert (decode(encoded(Image.fromarray(values), kind), 2, 3) == grey[..., None]).all()


def test_pixels_of_unknown_range_are_refused():
    for values in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70_000, np.int32)):
        with pytest.raises(ValueError, match="8 or 16 bits"):
            decode(encoded(Image.fromarray(values), "tiff"), 2, 1)


def test_cmyk_black_and_white_and_animations_become_what_a_viewer_shows():
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", quality=100)
    assert np.abs(decode(cmyk, 8, 3).astype(int) - [255, 0, 0]).max() <= 3
    assert np.abs(decode(cmyk, 8, 1).astype(int) - 76).max() <= 3
    assert (decode(encoded(Image.new("1", (2, 2), 1)), 2, 3) == 255).all()
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    for kind in ("gif", "webp", "png"):
        animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode(animated, 2, 3).astype(int) - [255, 0, 0]).max() <= 2


def test_photos_are_turned_upright():
    pixels = noise(3, 5)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn clockwise
    file = encoded(Image.fromarray(pixels), exif=turned)
    assert np.array_equal(decode(file, 3, 1), np.rot90(pixels, -1)[1:4])


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A file whose header promises a size, whatever follows."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(pixels)}
    parts = [
        struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


UNREADABLE = {
    "empty": (b"", "none of PNG, JPEG"),
    "text": (b"hello", "none of PNG, JPEG"),
    "zero size": (png(0, 0), "none of PNG, JPEG"),
    "zero width": (b"P5 0 4 255\n", "none of PNG, JPEG"),
    "bomb": (png(20_000, 20_000), "decompression bomb"),
    "another bomb": (b"P5 100000 100000 255\n", "decompression bomb"),
    "no pixels": (png(4, 4), "truncated"),
    "few pixels": (png(4, 4, bytes(10)), "truncated"),
    "cut png": (encoded(Image.fromarray(noise(6, 6, 3)))[:-40], "truncated"),
    "cut jpeg": (encoded(Image.fromarray(noise(64, 64, 3)), "jpeg")[:-400], "truncated"),
    "cut gif": (encoded(Image.fromarray(noise(64, 64)), "gif")[:-400], "truncated"),
    "flipped bit": (bytes(x ^ (i == 60) for i, x in enumerate(encoded(Image.fromarray(noise(6, 6))))), ""),
    "PostScript, which is a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_image_is_named_in_one_line(case, tmp_path):
    config = make_folder(tmp_path, "good.png", "x.png")
    content, why = UNREADABLE[case]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/x.png can't be decoded as an image \(.*{why}.*\); mend"
    ):
        materialize(load_images(config, "train", 6, 3), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_files_that_go_or_change_while_training_are_named_when_streamed_and_unseen_in_memory(
    tmp_path, num_workers
):
    config = replace(make_folder(tmp_path, *(f"{i}.png" for i in range(4))), num_workers=num_workers)
    images = load_images(config, "train", 6, 3)
    in_memory = Batches(images, config, 4, seed=0, device="cpu").from_step(0)
    streamed = Batches(images, replace(config, in_memory_gib=0), 4, seed=0, device="cpu").from_step(0)
    for name, change in (("1.png", Path.unlink), ("2.png", lambda path: path.write_bytes(b""))):
        before = (tmp_path / name).read_bytes()
        change(tmp_path / name)
        first = next(in_memory)
        why = "No such file" if name == "1.png" else "none of PNG"
        with pytest.raises(UserError, match=rf"^{tmp_path}/{name} can't be decoded as an image \({why}"):
            next(Batches(images, replace(config, in_memory_gib=0), 4, seed=0, device="cpu").from_step(0))
        (tmp_path / name).write_bytes(before)
        assert equal(first, next(streamed))
    (tmp_path / "5.png").write_bytes(before)
    assert len(images) == 4  # a file that comes belongs to the next run


def test_a_set_smaller_than_the_batch_fills_it_with_whole_epochs(tmp_path):
    config = replace(make_folder(tmp_path, "0.png", "1.png", "2.png"), flip=False, num_workers=0)
    images = load_images(config, "train", 6, 3)
    batch = next(Batches(images, config, 8, seed=0, device="cpu").from_step(0))
    numbers = [
        next(i for i in range(3) if torch.equal(images[i][0], x))
        for x in (batch.images + 1).mul(127.5).round()
    ]
    assert sorted(numbers[:3]) == sorted(numbers[3:6]) == [0, 1, 2] and len(set(numbers[6:])) == 2


# Settings.


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dataset": "digit"}, "data.dataset: 'digit' .* one of digits, .*; did you mean 'digits'"),
        ({"dataset": "folder"}, "data.path: None .* a path, which data.dataset folder needs"),
        ({"dataset": "hub"}, "data.path: None .* a path, which data.dataset hub needs"),
        ({"path": "x"}, "data.path: 'x' .* null with data.dataset digits; is it a folder or hub?"),
        ({"num_workers": -1}, "data.num_workers: -1 .* 0 or more"),
        ({"in_memory_gib": float("nan")}, "data.in_memory_gib: nan .* 0 or more"),
    ],
)
def test_a_wrong_setting_is_refused_where_it_is_made(settings, line):
    with pytest.raises(ConfigError, match=line):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dataset": "folder", "path": "{}/nown"}, "data.path: .* a folder of images"),
        ({"dataset": "folder", "path": "{}/none"}, "data.path: .* images, of which none/train has none"),
        ({"dataset": "hub", "path": "{}/nown"}, "data.path: .* Hub, or a folder"),
        ({"dataset": "hub", "path": "{}/none"}, "data.path: .* a data set on the Hub, or a folder"),
        ({"dataset": "hub", "path": "somebody/something"}, "data.path: 'somebody/something' .* the Hub"),
    ],
)
def test_images_that_are_not_there_are_an_error_of_one_line(tmp_path, capfd, settings, line):
    (tmp_path / "none").mkdir()
    config = DataConfig(**settings | {"path": settings["path"].format(tmp_path)})
    with pytest.raises(ConfigError, match=line) as caught:
        load_images(config, "train", 8, 3)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_other_refusals():
    with pytest.raises(ConfigError, match=r"model.in_channels: 4 .* 1 \(grey\) or 3 \(RGB\)"):
        load_images(DataConfig(), "train", 8, 4)
    assert data.test_images(DataConfig(test_split=None), 8, 1) is None


def test_without_the_datasets_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'uvit_dia[hub]'")):
        load_images(DataConfig(dataset="hub", path="x"), "train", 8, 3)


def test_a_process_ends_though_a_stream_was_left_open(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    left_open = f"""
from uvit_dia.data import Batches, DataConfig, load_images
config = DataConfig(dataset="folder", path={str(tmp_path)!r}, in_memory_gib=0, num_workers=1)
stream = Batches(load_images(config, "train", 8, 3), config, 2, 0, "cpu").from_step(0)
next(stream)
keep = [stream]
keep.append(keep)
"""
    assert subprocess.run([sys.executable, "-c", left_open], timeout=90).returncode == 0
