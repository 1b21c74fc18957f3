"""Grids of runs: every combination of some settings' values, each trained and scored by the scripts."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import yaml

from uvit_dia.checkpoint import RunFolder
from uvit_dia.config import SECTIONS, Config, load, plain, provenance, run_parser, save, to_config
from uvit_dia.data import load_images
from uvit_dia.errors import UserError
from uvit_dia.trainer import check_divides, check_labels
from uvit_dia.uvit import UViT

COUNTS_STEPS = re.compile(r"num_steps|warmup_steps|(\w+_)?every")  # settings that equal images scale


@dataclass(frozen=True)
class Run:
    """One combination: its folder's name, the label of its value on each axis, its config, its folder."""

    name: str
    labels: tuple[str, ...]
    config: Config
    folder: RunFolder

    @property
    def images(self) -> int:
        """How many images it trains on, repeats counted."""
        return self.config.train.num_steps * self.config.train.batch_size

    def images_done(self) -> int:
        records = self.folder.read_metrics()
        return min(self.images, records[-1]["images"]) if records else 0

    def is_trained(self) -> bool:
        about = self.folder.pipeline / "training.json"
        return about.is_file() and json.loads(about.read_text())["step"] == self.config.train.num_steps

    def card(self) -> dict[str, Any] | None:
        """The score after the last step, as the config asks for it; None before that."""
        path, wanted = self.card_path(), self.config.evaluate
        card = json.loads(path.read_text()) if self.is_trained() and path.is_file() else None
        asked = card and (card["num_generated"], card["extractor"]["name"])
        return card if asked == (wanted.num_images, wanted.extractor) else None

    def card_path(self) -> Path:
        return self.folder.evaluation / f"step_{self.config.train.num_steps:08d}.json"

    def commands(self, scripts: Path) -> list[list[str]]:
        """What is left to do: training (or going on with it) and scoring."""
        train = [str(scripts / "train.py"), "--config", str(self.folder.root / "cell.yaml"), "--resume"]
        evaluate = [str(scripts / "evaluate.py"), str(self.folder.root)]
        left = [] if self.card() else [evaluate] if self.is_trained() else [train, evaluate]
        return [[sys.executable, *command] for command in left]

    def last_words(self) -> str:
        """What its log says of why it ended: the error, else the last line."""
        log = self.folder.root / "log.txt"
        text = log.read_text(errors="replace").strip() if log.is_file() else ""
        errors = re.findall(r"\w*error: .+", text, re.IGNORECASE)  # a progress bar may stand before it
        return [*(text.splitlines() or ["no word"])[-1:], *errors][-1]


def read_axis(text: str) -> tuple[str, list[Any]]:
    """The setting and its values in `train.batch_size=32,128`; a value is YAML: 3, null, {kind: se}."""
    key, _, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = []
    if not found:
        raise UserError(f"axis {text!r}: expected KEY=VALUE,VALUE, such as train.batch_size=32,128")
    return key, found


def label(value: Any) -> str:
    """A value as people read it: none, 32, `dia_lstm gate_scale=4`."""
    if isinstance(value, dict):
        options = (f"{key}={label(item)}" for key, item in value.items() if key != "kind")
        return " ".join([*([value["kind"]] if "kind" in value else []), *options])
    return "none" if value is None else str(value)


def make_runs(base: Config, axes: dict[str, list[Any]], equal: Literal["steps", "images"]) -> list[Run]:
    """Every combination, typed and checked, the last axis fastest; base.output_dir is the grid's folder.

    A unit replaces the base's whole; other mappings merge into it. UserError before anything has started.
    """
    parser, runs = run_parser(""), {}
    for key in axes:
        if key.split(".")[0] not in ("model", *SECTIONS):
            raise UserError(f"axis {key}: no config field, such as train.batch_size or model.unit")
    for values in product(*axes.values()):
        settings, changes = plain(asdict(base)), plain(dict(zip(axes, values, strict=True)))
        if "model.unit" in changes:
            settings["model"]["unit"] = None
            changes["model.unit"] = unit_of(changes["model.unit"])
        labels = tuple(map(label, changes.values()))
        parts = (f"{key.split('.')[-1]}-{text}" for key, text in zip(axes, labels, strict=True))
        name = re.sub(r"[^\w.]+", "-", "_".join(parts))
        if name in runs:
            raise UserError(f"two runs of the grid have one name, {name}; does an axis have a value twice?")
        settings["output_dir"] = str(Path(base.output_dir) / name)
        config = to_config(parser, parser.parse_object(changes, parser.parse_object(settings)))
        if equal == "images":
            config = at_equal_images(config, base.train.batch_size)
        runs[name] = Run(name, labels, config, RunFolder(config.output_dir))
    check(list(runs.values()))
    return list(runs.values())


def unit_of(value: Any) -> Any:
    """`none` and a kind's bare name are short for null and {kind: name}."""
    short = isinstance(value, str)
    return None if value == "none" else {"kind": value} if short else value


def at_equal_images(config: Config, batch_size: int) -> Config:
    """The same number of images as steps of `batch_size` see, to the nearest step."""

    def scaled(settings: Any) -> Any:
        counts = {key: n for key, n in vars(settings).items() if COUNTS_STEPS.fullmatch(key) and n}
        factor = batch_size / config.train.batch_size
        return replace(settings, **{key: max(1, round(n * factor)) for key, n in counts.items()})

    return replace(config, train=scaled(config.train), evaluate=scaled(config.evaluate))


def check(runs: list[Run]) -> None:
    """UserError before anything starts: a model that can't be, data that are not there, other runs' folders.

    It also downloads what the runs would all download at once.
    """
    labels = {}
    for run in runs:
        model, data, train = run.config.model, run.config.data, run.config.train
        with torch.device("meta"):
            UViT(**model)
        check_divides(train, 1)
        wanted = (data, "train", model["sample_size"], model["in_channels"])
        if repr(wanted) not in labels:
            labels[repr(wanted)] = load_images(*wanted).num_labels
        check_labels(labels[repr(wanted)], model["num_classes"], model["null_label"])
        if run.folder.config.is_file():
            check_same(run, load(run.folder.config))


def check_same(run: Run, there: Config) -> None:
    """UserError that names the first setting on which a run's folder and the grid differ."""
    for section in ("model", *SECTIONS):
        ours, theirs = (plain(asdict(config)[section]) for config in (run.config, there))
        for key in ours:
            if ours[key] != theirs[key]:
                what = f"{section}.{key} is {theirs[key]} there and {ours[key]} in the grid"
                raise UserError(f"{run.folder.root}: holds another run: {what}; name another --output_dir")


def slots(jobs: int) -> list[dict[str, str]]:
    """The environment of each place where a run may go: `jobs` on each GPU, or on a machine without."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if not count:  # the trainer divides the cores among the processes of a machine
        return [{"OMP_WAIT_POLICY": "PASSIVE", "LOCAL_WORLD_SIZE": str(jobs)}] * jobs
    threads = str(max(1, (os.cpu_count() or 1) // (count * jobs)))
    return [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads} for gpu in named[:count] * jobs]


@dataclass
class Job:
    """A run at work in its slot, and the commands that are left to it."""

    run: Run
    slot: dict[str, str]
    commands: list[list[str]]
    lock: int  # a file that the processes hold open: while one lives, no other command touches the grid
    process: subprocess.Popen | None = None

    def next(self) -> None:
        """Start the next command in a session of its own, so that Ctrl-C reaches it once, through us."""
        with (self.run.folder.root / "log.txt").open("ab" if self.process else "wb") as log:
            self.process = subprocess.Popen(
                self.commands.pop(0), env=os.environ | self.slot, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[self.lock],
            )  # fmt: skip


class Grid:
    """The runs of a grid at work: `for _ in grid.go()` sees to them, `stop` passes a signal on."""

    def __init__(self, root: Path, runs: list[Run], scripts: Path, places: list[dict[str, str]]) -> None:
        self.root, self.runs, self.scripts, self.places = root, runs, scripts, list(places)
        self.going: list[Job] = []
        self.failed: dict[str, str] = {}  # name -> its last words
        self.stopped = False

    def stop(self, signal: int) -> None:
        self.stopped = True
        for job in self.going:
            job.process.send_signal(signal)

    def go(self) -> Iterator[None]:
        """Train and score what is left, and yield now and then; one that fails does not stop the others."""
        with (self.root / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.root}: runs of this grid are going; wait, or stop them") from error
            waiting = [(run, left) for run in self.runs if (left := run.commands(self.scripts))]
            while self.going or (waiting and not self.stopped):
                while waiting and self.places and not self.stopped:
                    run, left = waiting.pop(0)
                    self.going.append(Job(run, self.places.pop(0), left, lock.fileno()))
                    self.going[-1].next()
                yield
                time.sleep(0.5)
                for job in [job for job in self.going if job.process.poll() is not None]:
                    self.ended(job)

    def ended(self, job: Job) -> None:
        """Go on with the run's next command, or free its slot."""
        if job.process.returncode == 0 and job.commands and not self.stopped:
            return job.next()
        if job.process.returncode != 0 and not self.stopped:
            self.failed[job.run.name] = job.run.last_words()
        self.going.remove(job)
        self.places.append(job.slot)


def forecast(runs: list[Run], places: int) -> tuple[float | None, int]:
    """Seconds that the rest will take, as measured in these runs (None: nothing yet), and bytes on disk."""
    rates, scoring = {}, []
    for run in runs:
        records = run.folder.read_metrics()
        spans = pairwise([{"images": 0}, *records])
        seconds = sum((b["images"] - a["images"]) / b["images_per_second"] for a, b in spans)
        if records:
            rates.setdefault(run.config.train.batch_size, []).append(seconds / records[-1]["images"])
        if card := run.card():
            scoring.append(float(card["provenance"]["wall time"].split()[0]))
    left = [run for run in runs if not run.card()]
    known = [rate for found in rates.values() for rate in found]
    seconds = sum(
        mean(rates.get(run.config.train.batch_size, known)) * (run.images - run.images_done())
        for run in left if known
    ) + len(left) * mean(scoring or [0])  # fmt: skip
    return (seconds / places if known else None), sum(map(disk, left))


def disk(run: Run) -> int:
    """Bytes of a run: each checkpoint holds weights, their average and two moments; one more while saving."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UViT(**run.config.model).parameters())
    return 4 * parameters * (4 * (run.config.train.keep_checkpoints + 1) + 1)


def write_grid(root: Path, runs: list[Run], axes: list[str], about: dict[str, Any]) -> None:
    """Write each run's cell.yaml, the config that it will have, and the grid's own grid.yaml."""
    for run in runs:
        run.folder.root.mkdir(parents=True, exist_ok=True)
        save(run.config, run.folder.root / "cell.yaml", provenance())
    names = {run.name: list(run.labels) for run in runs}
    facts = about | provenance() | {"axes": axes, "runs": names}
    (root / "grid.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))


def read_grid(root: Path) -> tuple[dict[str, Any], list[Run]]:
    """What `write_grid` wrote: the facts, and the runs, wherever the folder has gone since."""
    facts = yaml.safe_load((root / "grid.yaml").read_text())
    runs = facts.pop("runs").items()
    folders = {name: RunFolder(root / name) for name, _ in runs}
    found = [Run(n, tuple(ls), load(folders[n].root / "cell.yaml"), folders[n]) for n, ls in runs]
    return facts, found
