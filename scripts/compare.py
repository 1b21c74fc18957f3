"""Train and score every combination of settings, and report which is better.

    python scripts/compare.py --config configs/digits.yaml --output_dir runs/compare \\
        --axis 'model.unit=none,{kind: dia_lstm, gate_scale: 4}' \\
        --axis train.batch_size=32,128 --axis train.seed=0,1,2

compares units at two batch sizes over three seeds. The first axis is what is compared, its first value the
baseline. The same command goes on where an earlier one stopped.
"""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import run_config
import torch
import yaml
from exit_codes import leave
from experiments import Run
from jsonargparse.typing import PositiveInt
from report import last_words, write_page
from tqdm import tqdm
from train import claim, provenance

from uvit_dia.data import load_images
from uvit_dia.errors import UserError
from uvit_dia.trainer import check_divides
from uvit_dia.uvit import UViT

SCRIPTS = Path(__file__).resolve().parent


def main() -> int:
    parser = run_config.run_parser(__doc__)
    parser.add_argument(
        "--axis", action="append", default=[], help="KEY=VALUE,VALUE,... of any setting; once an axis"
    )
    parser.add_argument("--axes", type=dict[str, list], default={}, help="the same in YAML: {KEY: [VALUE]}")
    parser.add_argument(
        "--equal", type=Literal["steps", "images"], default="steps",
        help="what runs of unlike batch sizes share; images scales all that counts steps",
    )  # fmt: skip
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="runs at once on each GPU, or on the CPU")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, its time and disk, and stop")
    argv = sys.argv[1:]
    digits = str(SCRIPTS.parent / "configs" / "digits.yaml")
    named = any(arg.split("=")[0] == "--config" for arg in argv)
    parsed = parser.parse_args(argv if named else ["--config", digits, *argv])
    axes = parsed.axes | dict(map(read_axis, parsed.axis))
    if not axes:
        raise UserError("--axis: none given; add one, such as --axis model.unit=none,dia_lstm")
    root = Path(parsed.output_dir or "runs/compare")
    base = replace(run_config.to_config(parser, parsed), output_dir=str(root))
    runs, places = make_runs(base, axes, parsed.equal), slots(parsed.jobs)
    check(runs)
    show_plan(root, runs, len(places))
    if parsed.dry_run:
        return 0
    command = shlex.join(["python", *sys.argv])
    facts = {"command": command, "equal": parsed.equal, "hardware": hardware(), "runs_at_once": len(places)}
    lock = claim(root)  # kept by runs that outlive this process
    write_grid(root, runs, facts)
    return work(Grid(runs, places, lock), root)


def label(value: Any) -> str:
    """A value as people read it: none, 32, `dia_lstm gate_scale=4`."""
    if isinstance(value, dict):
        return " ".join(f"{key}={label(item)}".removeprefix("kind=") for key, item in value.items())
    return "none" if value is None else str(value)


def make_runs(
    base: run_config.Config, axes: dict[str, list[Any]], equal: Literal["steps", "images"]
) -> list[Run]:
    """Every combination, the last axis fastest, in folders of base.output_dir; UserError where one can't be.

    A value of model.unit replaces the base's whole, and may be `none` or a kind's bare name; mappings
    elsewhere merge. `equal` images: all that counts steps is scaled, so that all see as many images.
    """
    parser, runs = run_config.run_parser(""), {}
    if odd := [key for key in axes if key.split(".")[0] not in ("model", *run_config.SECTIONS)]:
        raise UserError(f"axis {odd[0]}: no config field, such as train.batch_size or model.unit")
    if "model.unit" in axes:
        base = replace(base, model=base.model | {"unit": None})
    for values in product(*axes.values()):
        settings = run_config.plain(asdict(base))
        changes = run_config.plain(dict(zip(axes, values, strict=True)))
        if isinstance(unit := changes.get("model.unit"), str):
            changes["model.unit"] = None if unit == "none" else {"kind": unit}
        labels = {key: label(value) for key, value in changes.items()}
        parts = (f"{key.split('.')[-1]}-{text}" for key, text in labels.items())
        name = re.sub(r"[^\w.]+", "-", "_".join(parts))
        if name in runs:
            raise UserError(f"two runs of the grid have one name, {name}; does an axis have a value twice?")
        settings["output_dir"] = str(Path(base.output_dir) / name)
        made = run_config.to_config(parser, parser.parse_object(changes, parser.parse_object(settings)))
        by = base.train.batch_size / made.train.batch_size if equal == "images" else 1
        made = replace(made, train=scaled(made.train, by), evaluate=scaled(made.evaluate, by))
        runs[name] = Run(name, labels, made)
    return list(runs.values())


def scaled(settings: Any, factor: float) -> Any:
    """The settings with all that counts steps multiplied, to the nearest step."""
    counts_steps = re.compile(r"num_steps|warmup_steps|(\w+_)?every").fullmatch
    counts = {key: n for key, n in vars(settings).items() if counts_steps(key) and n}
    return replace(settings, **{key: max(1, round(n * factor)) for key, n in counts.items()})


def write_grid(root: Path, runs: list[Run], facts: dict[str, Any]) -> None:
    """Write each run's cell.yaml, the config that it is to have, and grid.yaml: the facts and the runs."""
    made_with = provenance()
    for one in runs:
        run_config.save(one.config, one.folder.root / "cell.yaml", made_with)
    whole = facts | made_with | {"runs": {one.name: one.labels for one in runs}}
    (root / "grid.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))


def check(runs: list[Run]) -> None:
    """UserError for a model that can't be, data that are not there, and a folder that holds another run.

    It also downloads, once, the data that the runs would else all download at the same time.
    """
    num_labels: dict[str, int | None] = {}
    for one in runs:
        model = one.config.model
        with torch.device("meta"):
            UViT(**model)
        check_divides(one.config.train, 1)
        wanted = (one.config.data, "train", model["sample_size"], model["in_channels"])
        if repr(wanted) not in num_labels:
            num_labels[repr(wanted)] = load_images(*wanted).num_labels
        run_config.check_labels(num_labels[repr(wanted)], model["num_classes"], model["null_label"])
        there = run_config.load(one.folder.config) if one.folder.config.is_file() else one.config
        for section in ("model", *run_config.SECTIONS):
            ours, theirs = (run_config.plain(asdict(settings)[section]) for settings in (one.config, there))
            if differ := [key for key in ours if ours[key] != theirs[key]]:
                what = f"{section}.{differ[0]} is {theirs[differ[0]]} there and {ours[differ[0]]} in the grid"
                raise UserError(f"{one.folder.root}: holds another run: {what}; name another --output_dir")


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


def show_plan(root: Path, runs: list[Run], num_places: int) -> None:
    for one in runs:
        done = "done" if one.card() else f"{images_done(one):,} of {num_images(one):,} images"
        print(f"{one.name}: {one.config.train.num_steps:,} steps of {one.config.train.batch_size}, {done}")
    left = [one for one in runs if not one.card()]
    seconds = forecast(runs)
    ends = "unknown until a run has logged its speed"
    if seconds is not None:
        ends = f"{seconds / num_places / 60:.0f} minutes and the processes' start-up"
    print(f"{len(left)} of {len(runs)} runs left, {num_places} at once; time left: {ends}")
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    print(f"{root}: {sum(map(disk, left)) / 2**30:.2f} GiB to write, {free / 2**30:.2f} GiB free", flush=True)


def num_images(one: Run) -> int:
    """How many images it trains on, repeats counted."""
    return one.config.train.num_steps * one.config.train.batch_size


def images_done(one: Run) -> int:
    """What the last whole line of its metrics says, looked for at the end of what may be a long file."""
    with suppress(OSError), one.folder.metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        for line in reversed(file.read().split(b"\n")):
            with suppress(ValueError, TypeError):
                return json.loads(line)["images"]
    return 0


def forecast(runs: list[Run]) -> float | None:
    """Seconds that the rest would take one by one, at the speed of these runs; None: nothing logged yet."""
    rates: dict[int, list[float]] = {}  # batch size -> seconds an image
    for one in runs:
        if records := one.folder.read_metrics():
            spans = pairwise([{"images": 0}, *records])
            seconds = sum((b["images"] - a["images"]) / b["images_per_second"] for a, b in spans)
            rates.setdefault(one.config.train.batch_size, []).append(seconds / records[-1]["images"])
    if not rates:
        return None
    cards = [card for one in runs if (card := one.card())]
    scoring = mean([float(card["provenance"]["wall time"].split()[0]) for card in cards] or [0])
    known = list(chain.from_iterable(rates.values()))
    return sum(
        mean(rates.get(one.config.train.batch_size, known)) * (num_images(one) - images_done(one)) + scoring
        for one in runs
        if not one.card()
    )


def disk(one: Run) -> int:
    """Bytes of a run's checkpoints, each of weights, their average and two moments, one more while saving."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UViT(**one.config.model).parameters())
    return 4 * parameters * (4 * (one.config.train.keep_checkpoints + 1) + 1)


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}"


def slots(jobs: int) -> list[dict[str, str]]:
    """The environment of each place where a run may go: `jobs` on each GPU, or on a machine without."""
    count = torch.cuda.device_count()
    if not count:  # LOCAL_WORLD_SIZE: the trainer divides the cores among a machine's processes
        return [{"OMP_WAIT_POLICY": "PASSIVE", "LOCAL_WORLD_SIZE": str(jobs)}] * jobs
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    threads = str(max(1, (os.cpu_count() or 1) // (count * jobs)))
    return [{"CUDA_VISIBLE_DEVICES": name, "OMP_NUM_THREADS": threads} for name in names[:count] * jobs]


def commands(one: Run) -> list[list[str]]:
    """What is left to do: training (or going on with it) and scoring."""
    train = ["train.py", "--config", str(one.folder.root / "cell.yaml"), "--resume"]
    evaluate = ["evaluate.py", str(one.folder.root)]
    left = [] if one.card() else [evaluate] if one.is_trained() else [train, evaluate]
    return [[sys.executable, str(SCRIPTS / script), *arguments] for script, *arguments in left]


@dataclass
class Job:
    """A run at work in a slot, and the commands that are left to it."""

    run: Run
    slot: dict[str, str]
    commands: list[list[str]]
    lock: int
    process: subprocess.Popen | None = None  # None only before the first

    def next(self) -> None:
        """Start the next command in a session of its own, so that Ctrl-C reaches it once, through us."""
        with (self.run.folder.root / "log.txt").open("ab" if self.process else "wb") as log:
            self.process = subprocess.Popen(
                self.commands.pop(0), env=os.environ | self.slot, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[self.lock],
            )  # fmt: skip


class Grid:
    """The runs of a grid at work: `for _ in grid.go()` sees to them, `stop` passes a signal on."""

    def __init__(self, runs: list[Run], places: list[dict[str, str]], lock: int) -> None:
        self.runs, self.places, self.lock = runs, list(places), lock
        self.going: list[Job] = []
        self.failed: dict[str, str] = {}  # name -> its last words
        self.stopped, self.signals = False, []  # signals: that the jobs have yet to be sent

    def stop(self, number: int) -> None:
        """Called by a signal, which may come while a job is being started: `go` passes it on."""
        self.signals.append(number)
        self.stopped = True

    def go(self) -> Iterator[None]:
        """Train and score what is left, and yield now and then; one that fails does not stop the others."""
        waiting = [(one, left) for one in self.runs if (left := commands(one))]
        while self.going or (waiting and not self.stopped):
            while waiting and self.places and not self.stopped:
                one, left = waiting.pop(0)
                self.going.append(Job(one, self.places.pop(0), left, self.lock))
                self.going[-1].next()
            yield
            time.sleep(0.5)
            while self.signals:
                number = self.signals.pop(0)
                for job in self.going:
                    job.process.send_signal(number)
            for job in [job for job in self.going if job.process.poll() is not None]:
                self.ended(job)

    def ended(self, job: Job) -> None:
        """Go on with the run's next command, or free its slot."""
        if job.process.returncode == 0 and job.commands and not self.stopped:
            return job.next()
        if job.process.returncode != 0 and not self.stopped:
            self.failed[job.run.name] = last_words(job.run)
        self.going.remove(job)
        self.places.append(job.slot)


def work(grid: Grid, root: Path) -> int:
    """Run the grid under a progress bar. Exit code: 1 if a run failed, 128 + the signal that stopped it."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        grid.stop(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    total, done = (
        sum(numbers)
        for numbers in zip(*((num_images(one), images_done(one)) for one in grid.runs), strict=True)
    )
    pause = 1 if sys.stderr.isatty() else 30  # seconds between lines of a log file
    with tqdm(
        total=total, initial=done, unit="image", unit_scale=True, smoothing=0, mininterval=pause
    ) as bar:
        for _ in grid.go():
            finished = sum(one.card() is not None for one in grid.runs)
            bar.set_postfix(runs=f"{finished}/{len(grid.runs)}", failed=len(grid.failed), refresh=False)
            bar.update(sum(images_done(one) for one in grid.runs) - bar.n)
    for name, words in grid.failed.items():
        print(f"failed: {name}: {words}", file=sys.stderr)
    if received:
        print("stopped; the same command goes on")
        return 128 + received[0]
    print(write_page(root))
    return 1 if grid.failed else 0


if __name__ == "__main__":
    leave(main)
