"""The real training process, forked from one that has the imports behind it, to be killed at will.

Without that a trial would spend eight seconds importing for a tenth of a second of training.
"""

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from random import Random

import torch
from run_folder import RunFolder

from uvit_dia.checkpoint import folders, read

ROOT = Path(__file__).parents[2]
TINY = (
    "--model.embed_dim 16 --model.depth 2 --model.num_heads 2 --model.patch_size 4 --train.batch_size 8 "
    "--train.warmup_steps 2 --train.decay none --train.log_every 1 --train.preview_every 0 "
    "--sample.num_images 4 --sample.steps 3 --model.unit.kind dia_lstm --train.trackers []"
).split()
spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload([__name__])
running: list[multiprocessing.Process] = []  # all that were started, for a test that fails to leave none
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server is a new interpreter


def main(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """What `python scripts/train.py ARGUMENTS` does, with both streams going to a file."""
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as everywhere on Linux
    os.environ.update(environment)
    sys.argv = ["train.py", *arguments]
    train.leave(train.main)


def start(folder: Path, *arguments: object, **environment: object) -> multiprocessing.Process:
    """A training process on `folder`, whose output is appended to a file beside its parent."""
    words = [*TINY, "--output_dir", str(folder), *map(str, arguments)]
    one_thread = {"OMP_NUM_THREADS": 1, "LOCAL_WORLD_SIZE": os.cpu_count()}  # more are slower at this size
    surroundings = one_thread | {"CUDA_VISIBLE_DEVICES": ""} | environment
    surroundings = {key: str(value) for key, value in surroundings.items()}
    # What was forked after a look for GPUs can't use them.
    context = multiprocessing.get_context("spawn") if surroundings["CUDA_VISIBLE_DEVICES"] else server
    process = context.Process(target=main, args=(words, surroundings, output(folder)))
    process.start()
    running.append(process)
    return process


def several(
    folder: Path, *arguments: object, number: int = 2, gpus: str = ""
) -> list[multiprocessing.Process]:
    """Processes of one training without a launcher that would look after them, on the CPU or on `gpus`."""
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    common = address | dict(WORLD_SIZE=number, CUDA_VISIBLE_DEVICES=gpus)
    return [start(folder, *arguments, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(number)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def output(folder: Path) -> Path:
    return folder.parent.with_name(f"{folder.parent.name}.log")


def said(folder: Path) -> str:
    """What the processes on `folder`, and on others in its parent, printed since the last call."""
    text = output(folder).read_text()
    output(folder).unlink()
    return text


def ended(*processes: multiprocessing.Process, within: float = 120) -> list[int]:
    """Wait for exit codes (negative: of a signal); AssertionError, and none left, if it takes too long."""
    for process in processes:
        process.join(within)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, f"still running after {within} s"
    return codes


def run(folder: Path, *arguments: object, **environment: object) -> int:
    return ended(start(folder, *arguments, **environment))[0]


def metrics(folder: Path) -> list[dict]:
    """Every line must be whole; what depends on the clock is left out."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key != "images_per_second"} for r in records]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and moments of a checkpoint, which must be whole."""
    files, _ = read(checkpoint)
    return {f"{file}.{name}": tensor for file, named in files.items() for name, tensor in named.items()}


def assert_same(ours: Path, theirs: Path) -> None:
    """Two runs' newest checkpoints agree bit for bit, and their metrics at every step of ours."""
    (a, b), (c, d) = ((newest, tensors(newest)) for newest in map(newest_of, (ours, theirs)))
    assert a.name == c.name and b.keys() == d.keys()
    assert [name for name in b if not torch.equal(b[name], d[name])] == []
    assert metrics(ours) == metrics(theirs)


def newest_of(folder: Path) -> Path:
    return folders(folder / "checkpoints")[0]


def crash_again_and_again(folder: Path, kills: int, seed: int, longest: float) -> dict[str, float]:
    """kill -9 a run that saves at every step, and go on, `kills` times; each has up to `longest` seconds.

    Every other one first gets as far as a checkpoint of its own, or on a slow machine none ever would.
    AssertionError where a checkpoint that was there is not found again. At the end the run must equal one
    that was never killed. Returns what was done.
    """
    random, begin = Random(seed), time.monotonic()
    often = ["--train.checkpoint_every", 1, "--train.keep_checkpoints", 2]
    run_folder, caught = RunFolder(folder), 0
    for kill in range(kills):
        process = start(folder, "--resume", "--train.num_steps", 1_000_000, *often)
        reached, newest = run_folder.read_metrics()[-1:], folders(run_folder.checkpoints)[:1]
        while (
            folders(run_folder.checkpoints)[:1] == newest
            if kill % 2 == 0
            else run_folder.read_metrics()[-1:] == reached
        ):
            assert process.is_alive(), said(folder)
            time.sleep(0.01)
        time.sleep(random.uniform(0, longest))
        had = [path.name for path in folders(run_folder.checkpoints)]
        process.kill()
        assert ended(process) == [-signal.SIGKILL]
        caught += any(path.name[0] == "." for path in [*folder.iterdir(), *run_folder.checkpoints.iterdir()])
        good = run_folder.newest_good()
        assert not had or (good and good.name >= had[0]), f"kill {kill}: {had[0]} is lost, {good} found"
        assert not list(run_folder.checkpoints.glob("bad_*")), f"kill {kill} left a bad checkpoint"
    last = ["--train.num_steps", 3 + read(run_folder.newest_good())[1]["step"]]
    assert run(folder, "--resume", *last, *often) == 0, said(folder)
    whole = folder.with_name(f"{folder.name}_whole")
    assert run(whole, *last) == 0, said(whole)
    assert_same(folder, whole)
    return {"kills": kills, "while writing": caught, "steps": last[1], "seconds": time.monotonic() - begin}


def long_run(folder: Path, steps: int) -> dict[str, float]:
    """Train for many steps while another process reads: what the training process uses, early and at the end.

    AssertionError where a line of metrics.jsonl that is followed by another one can't be read.
    """
    options = [
        "--train.log_every",
        10,
        "--train.checkpoint_every",
        steps // 10,
        "--train.trackers",
        "[tensorboard]",
    ]
    process = start(folder, "--train.num_steps", steps, *options)
    place, lines, seen = Path("/proc") / str(process.pid), folder / "metrics.jsonl", []
    while process.is_alive():
        time.sleep(0.1)
        text = lines.read_text() if lines.is_file() else ""
        whole = [json.loads(line) for line in text.split("\n")[:-1]]
        try:
            memory = int(place.joinpath("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            spent = sum(map(int, place.joinpath("stat").read_text().rsplit(")")[1].split()[11:13]))
            files = len(list(place.joinpath("fd").iterdir()))
        except OSError:
            break  # it ended meanwhile
        if whole and memory:
            seen.append((whole[-1]["step"], memory, files, spent / os.sysconf("SC_CLK_TCK")))
    assert ended(process) == [0], said(folder)

    def at(share: float) -> tuple[int, float, int, float]:
        return next(x for x in [*seen, seen[-1]] if x[0] >= share * seen[-1][0])

    begin, early, late, end = at(0.1), at(0.4), at(0.7), at(1)
    return {
        "steps": metrics(folder)[-1]["step"],
        "read while written": len(seen),
        "memory early, MiB": round(early[1], 1),
        "memory at the end, MiB": round(end[1], 1),
        "open files early": early[2],
        "open files at the end": end[2],
        "CPU ms a step early": round(1e3 * (early[3] - begin[3]) / (early[0] - begin[0]), 2),
        "CPU ms a step at the end": round(1e3 * (end[3] - late[3]) / (end[0] - late[0]), 2),
    }
