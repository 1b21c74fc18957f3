"""Train and score every combination of settings, and report which is better.

    python scripts/compare.py --config configs/digits.yaml --output_dir runs/compare \\
        --axis 'model.unit=none,{kind: dia_lstm, gate_scale: 4}' \\
        --axis train.batch_size=32,128 --axis train.seed=0,1,2

compares units at two batch sizes over three seeds. The first axis is what is compared, its first value the
baseline. The same command goes on where an earlier one stopped.
"""

import os
import platform
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from uvit_dia import config
from uvit_dia.errors import UserError, run
from uvit_dia.experiments import Grid, Run, forecast, make_runs, read_axis, slots, write_grid
from uvit_dia.report import write_page

SCRIPTS = Path(__file__).resolve().parent


def main() -> int:
    parser = config.run_parser(__doc__)
    parser.add_argument(
        "--axis", action="append", default=[], help="KEY=VALUE,VALUE,... of any setting; once an axis"
    )
    parser.add_argument(
        "--axes", type=dict[str, list], default={}, help="the same in a YAML file: {KEY: [VALUE]}"
    )
    parser.add_argument(
        "--equal", type=Literal["steps", "images"], default="steps",
        help="what runs of unlike batch sizes share; images scales all that counts steps",
    )  # fmt: skip
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="runs at once on each GPU, or on the CPU")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the plan, its time and disk; start nothing"
    )
    argv = sys.argv[1:]
    digits = str(SCRIPTS.parent / "configs" / "digits.yaml")
    named = any(arg.split("=")[0] == "--config" for arg in argv)
    parsed = parser.parse_args(argv if named else ["--config", digits, *argv])
    axes = parsed.axes | dict(map(read_axis, parsed.axis))
    if not axes:
        raise UserError("--axis: none given; add one, such as --axis model.unit=none,dia_lstm")
    root = Path(parsed.output_dir or "runs/compare")
    base = replace(config.to_config(parser, parsed), output_dir=str(root))
    runs, places = make_runs(base, axes, parsed.equal), slots(parsed.jobs)
    show_plan(root, runs, len(places))
    if parsed.dry_run:
        return 0
    command = shlex.join(["python", *sys.argv])
    write_grid(root, runs, list(axes), {"command": command, "equal": parsed.equal, "hardware": hardware()})
    return work(Grid(root, runs, SCRIPTS, places))


def show_plan(root: Path, runs: list[Run], num_places: int) -> None:
    seconds, disk = forecast(runs, num_places)
    for one in runs:
        done = "done" if one.card() else f"{one.images_done():,} of {one.images:,} images"
        print(f"{one.name}: {one.config.train.num_steps:,} steps of {one.config.train.batch_size}, {done}")
    time = "unknown until a run has logged its speed" if seconds is None else f"{seconds / 60:.0f} minutes"
    place = root if root.exists() else Path.cwd()
    left = sum(one.card() is None for one in runs)
    print(f"{left} of {len(runs)} runs left, {num_places} at once; time: {time}, without start-up")
    print(f"disk: {disk / 2**30:.2f} GiB of {shutil.disk_usage(place).free / 2**30:.0f} GiB free, in {root}")


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}"


def work(grid: Grid) -> int:
    """Run the grid under a progress bar. Exit code: 1 if a run failed, 128 + the signal that stopped it."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        grid.stop(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    total = sum(one.images for one in grid.runs)
    done = sum(one.images_done() for one in grid.runs)
    pause = 1 if sys.stderr.isatty() else 30  # seconds between lines of a log file
    with tqdm(
        total=total, initial=done, unit="image", unit_scale=True, smoothing=0, mininterval=pause
    ) as bar:
        for _ in grid.go():
            finished = sum(one.card() is not None for one in grid.runs)
            bar.set_postfix(runs=f"{finished}/{len(grid.runs)}", failed=len(grid.failed), refresh=False)
            bar.update(sum(one.images_done() for one in grid.runs) - bar.n)
    for name, words in grid.failed.items():
        print(f"failed: {name}: {words}", file=sys.stderr)
    if received:
        print("stopped; the same command goes on")
        return 128 + received[0]
    print(write_page(grid.root))
    return 1 if grid.failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
