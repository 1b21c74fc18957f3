"""Checkpoints that are whole or absent: written aside, checksummed, renamed; reading executes nothing."""

import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
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

    info must be JSON; the step joins it. A crash at any moment leaves the older checkpoints as they were.
    """
    folder = root / f"step_{step:08d}"
    partial = root / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for stem, named in tensors.items():
        save_file(
            {name: tensor.contiguous() for name, tensor in named.items()}, partial / f"{stem}.safetensors"
        )
    (partial / "info.json").write_text(json.dumps({"step": step, **info}))
    digests = {path.name: digest(path.read_bytes()) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(digests, indent=1))
    for path in partial.iterdir():
        flush(path)
    publish(partial, folder)
    for old in folders(root)[keep:]:
        shutil.rmtree(old)
    return folder


def export(pipeline: DiffusionPipeline, folder: Path, about: dict[str, Any]) -> None:
    """Write a pipeline in diffusers format, all or nothing; training.json says what it is."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(about))
    publish(partial, folder)


def publish(partial: Path, folder: Path) -> None:
    """Put a finished folder in its place by renames alone; a folder that stood there goes only afterwards."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors (on the CPU) and info of a checkpoint; BadCheckpoint where a byte is not what was written."""
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())
        content = {name: (folder / name).read_bytes() for name in digests}
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{folder}: not a whole checkpoint ({error})") from error
    for name, data in content.items():
        if digest(data) != digests[name]:
            raise BadCheckpoint(f"{folder}: {name} is not as it was written (checksum)")
    try:
        info = json.loads(content.pop("info.json"))
    except (KeyError, ValueError) as error:
        raise BadCheckpoint(f"{folder}: not a whole checkpoint ({error})") from error
    try:
        return {Path(name).stem: load(data) for name, data in content.items()}, info
    except SafetensorError as error:  # though its checksum is right: made by somebody
        raise BadCheckpoint(f"{folder}: its tensors are no safetensors ({error})") from error


def folders(root: Path) -> list[Path]:
    """The checkpoints under root, newest first, good or not."""
    found = [path for path in root.glob("step_*") if path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def set_aside(folder: Path) -> Path:
    """Rename a bad checkpoint so that it is out of the way but not lost."""
    target = folder.with_name(f"bad_{folder.name}")
    shutil.rmtree(target, ignore_errors=True)
    return folder.rename(target)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flush(path: Path) -> None:
    """Have the operating system put a file or a folder's entries on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFolder:
    """Where a run keeps its config, metrics, checkpoints, exported pipeline, samples, scores and report."""

    def __init__(self, root: Path | str) -> None:
        self.root = root = Path(root)
        self.config, self.metrics = root / "config.yaml", root / "metrics.jsonl"
        self.checkpoints, self.pipeline = root / "checkpoints", root / "pipeline"
        self.samples, self.evaluation = root / "samples", root / "evaluation"
        self.posthoc, self.report = root / "posthoc", root / "report.html"

    def newest_good(self) -> Path | None:
        """The newest checkpoint that reads as written; bad ones are named on stderr and set aside."""
        for folder in folders(self.checkpoints):
            try:
                read(folder)
                return folder
            except BadCheckpoint as error:
                print(f"warning: {error}; set aside as {set_aside(folder)}", file=sys.stderr)
        return None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one torn by a crash is left out."""
        records = []
        for line in self.metrics.read_text().splitlines() if self.metrics.is_file() else []:
            with suppress(ValueError):
                records.append(json.loads(line))
        return records

    def trim_metrics(self, step: int) -> None:
        """Drop what was logged after `step`, so that going on from there doubles no line."""
        lines = [json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step]
        partial = self.metrics.with_suffix(".partial")
        partial.write_text("".join(lines))
        partial.replace(self.metrics)
