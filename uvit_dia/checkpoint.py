"""Checkpoints that are whole or absent: written aside, checksummed, renamed; reading executes nothing."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from uvit_dia.errors import UserError

MANIFEST = "manifest.json"
Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor


class BadCheckpoint(UserError):
    """Not a checkpoint, or not as it was written."""


def save(root: Path, step: int, tensors: Tensors, info: dict[str, Any], keep: int) -> Path:
    """Write `root/step_00010000` (`keep` newest stay) and return it. Other processes must wait.

    info must be JSON; the step joins it. A crash or UserError at any moment leaves the older checkpoints.
    """
    folder = root / f"step_{step:08d}"
    with aside(folder) as partial:
        partial.mkdir()
        for stem, named in tensors.items():
            save_file({name: x.contiguous() for name, x in named.items()}, partial / f"{stem}.safetensors")
        (partial / "info.json").write_text(json.dumps({"step": step, **info}))
        digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(digests, indent=1))
    for old in [path for path in folders(root) if path < folder][keep - 1 :]:
        with suppress(OSError):  # on a network disk, read by others; hidden first: half of one is none
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
    return folder


def export(pipeline: DiffusionPipeline, folder: Path, about: dict[str, Any]) -> None:
    """Write a pipeline in diffusers format, all or nothing; training.json says what it is."""
    with aside(folder) as partial:
        pipeline.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(about))


@contextmanager
def aside(place: Path) -> Iterator[Path]:
    """A path for a new file or folder, which then takes its place by renames alone, or on an error goes."""
    old, hidden = place.with_name(f".{place.name}.old"), f".{place.name}."
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(".partial", hidden, place.parent, ignore_cleanup_errors=True) as room:
            partial = Path(room, place.name)
            yield partial
            for path in [*partial.rglob("*"), partial]:
                flush(path)
            if place.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                place.rename(old)
            partial.replace(place)
            flush(place.parent)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """UserError where the disk is full, read-only or gone."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{place} can't be written ({error}); make room, or write elsewhere") from error


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors (on the CPU) and info of a checkpoint; BadCheckpoint where a byte is not what was written."""
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())
        content = {name: (folder / name).read_bytes() for name in digests}
        if wrong := [name for name, data in content.items() if sha256(data).hexdigest() != digests[name]]:
            raise BadCheckpoint(f"{folder}: {', '.join(wrong)}: not as written (checksum)")
        info = json.loads(content.pop("info.json"))
        return {Path(name).stem: load(data) for name, data in content.items()}, info
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise BadCheckpoint(f"{folder}: not a whole checkpoint ({error})") from error


def folders(root: Path) -> list[Path]:
    """The checkpoints under root, newest first, good or not."""
    return sorted(root.glob("step_*"), reverse=True)


def flush(path: Path) -> None:
    """Have the operating system put a file or a folder's entries on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
