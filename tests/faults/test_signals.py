"""What stops a run from outside: signals, and the death of another process of the same run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import harness
import numpy as np
import pytest
from PIL import Image
from run_folder import RunFolder
from torch.distributed import TCPStore

from uvit_dia.checkpoint import read

ENDLESS = ["--train.num_steps", 1_000_000, "--train.checkpoint_every", 1_000_000]


def wait_for(condition, *processes) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end and all(process.exitcode is None for process in processes)
        time.sleep(0.02)


def trains(folder: Path, *processes) -> None:
    wait_for(RunFolder(folder).read_metrics, *processes)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_tells_by_the_exit_code(name, tmp_path):
    folder, number = tmp_path / "run", signal.Signals[name]
    process = harness.start(folder, *ENDLESS)
    trains(folder, process)
    os.kill(process.pid, number)
    assert harness.ended(process) == [128 + number]
    said, newest = harness.said(folder), harness.newest_of(folder)
    _, info = read(newest)
    assert f"stopped by {name} after step {info['step']}; go on with --resume" in said
    assert "Traceback" not in said and harness.metrics(folder)[-1]["step"] == info["step"]
    assert harness.run(folder, "--resume", "--train.num_steps", info["step"] + 2) == 0
    assert f"going on from {newest}" in harness.said(folder)


def test_two_trainings_never_share_a_folder(tmp_path):
    folder = tmp_path / "run"
    first = harness.start(folder, *ENDLESS)
    trains(folder, first)
    assert harness.run(folder, "--resume") == 2
    assert f"error: output_dir: runs of {folder} are at work already" in harness.said(folder)
    os.kill(first.pid, signal.SIGTERM)
    assert harness.ended(first) == [128 + signal.SIGTERM]
    harness.metrics(folder)


def test_a_second_ctrl_c_exits_at_once(tmp_path):
    folder = tmp_path / "run"
    long_preview = ["--train.preview_every", 2, "--sample.num_images", 1000, "--sample.steps", 1000]
    process = harness.start(folder, *ENDLESS, "--train.checkpoint_every", 2, *long_preview)
    wait_for((folder / "pipeline").is_dir, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.is_alive(), "the first asks the loop to stop, which it does after the preview"
    os.kill(process.pid, signal.SIGINT)
    assert harness.ended(process, within=5) == [-signal.SIGINT]
    assert RunFolder(folder).newest_good().name == "step_00000002"


def test_two_processes_stop_together_when_one_is_signalled(gpus, tmp_path):
    folder = tmp_path / "run"
    first, second = harness.several(folder, *ENDLESS, gpus=gpus)
    trains(folder, first, second)
    os.kill(second.pid, signal.SIGUSR1)
    assert harness.ended(first, second) == [128 + signal.SIGUSR1] * 2
    said = harness.said(folder)
    assert "stopped by SIGUSR1" in said and "trained" not in said and RunFolder(folder).newest_good()


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_of_two_processes_ends_the_other_with_the_reason(victim, gpus, tmp_path):
    folder = tmp_path / "run"
    both = harness.several(folder, *ENDLESS, "--train.checkpoint_every", 2, gpus=gpus)
    wait_for((folder / "pipeline").is_dir, *both)
    both[victim].kill()
    codes = harness.ended(*both, within=60)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == harness.train.LOST
    said = harness.said(folder)
    assert f"error: process {1 - victim}: " in said and "go on with --resume" in said
    assert "Traceback" not in said and RunFolder(folder).newest_good()


@pytest.fixture
def streamed(tmp_path) -> list:
    """Options to stream 64 images from a folder."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(64):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    unlabeled = "--model.num_classes null --model.null_label null --train.label_drop 0"
    data = f"--data.dataset folder --data.path {images} --data.in_memory_gib 0 --data.num_workers"
    return [*f"{unlabeled} {data}".split()]


def test_what_only_one_of_two_processes_meets_is_told(streamed, tmp_path):
    (tmp_path / "images" / "7.png").write_bytes(b"no image")
    codes = harness.ended(*harness.several(tmp_path / "run", *ENDLESS, *streamed, 0))
    assert sorted(codes) == [2, harness.train.LOST]
    assert "7.png can't be decoded" in harness.said(tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_the_whole_process_group_finds_its_data_workers_at_work(name, streamed, tmp_path):
    folder, number = tmp_path / "run", signal.Signals[name]
    process = harness.start(folder, *ENDLESS, *streamed, 2)
    trains(folder, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    for pid in [*workers, process.pid]:
        os.kill(int(pid), number)
    assert harness.ended(process) == [128 + number], harness.said(folder)
    assert "Traceback" not in harness.said(folder) and RunFolder(folder).newest_good()


def sit(rank: int, world: int, port: int, until: float, log: Path) -> None:
    """A process of a run that is busy for a long time with something of its own."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank == 0 else None
    over = Event()
    options = {"args": (rank, world, over), "kwargs": {"patience": 3}}
    watcher = Thread(target=harness.train.watch, **options, daemon=True)
    watcher.start()
    time.sleep(until - time.time())
    over.set()
    watcher.join()
    if store:
        time.sleep(1)  # training has a barrier here


def company(world: int, seconds: float, log: Path) -> list:
    port, until = harness.free_port(), time.time() + seconds
    started = [
        harness.server.Process(target=sit, args=(rank, world, port, until, log)) for rank in range(world)
    ]
    for process in started:
        process.start()
        harness.running.append(process)
        time.sleep(0.5)  # the first one has the store
    return started


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_waits_for_nothing_finds_out_too(victim, tmp_path):
    processes = company(3, 600, tmp_path / "log")
    time.sleep(1)
    assert all(process.is_alive() for process in processes)
    processes[victim].kill()
    codes = harness.ended(*processes, within=30)
    assert codes == [-signal.SIGKILL if i == victim else harness.train.LOST for i in range(3)]
    reason = "process 1 ended, or hangs" if victim else "process 0 or the launcher ended"
    assert (tmp_path / "log").read_text().count(reason) == 2


def test_long_work_of_one_process_disturbs_nobody(tmp_path):
    assert harness.ended(*company(2, 6.5, tmp_path / "log")) == [0, 0]
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.slow
def test_torchrun_passes_a_signal_on_and_the_workers_save(tmp_path):
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    words = [*harness.TINY, "--output_dir", folder, *ENDLESS]
    command = [
        *launcher,
        f"--master_port={harness.free_port()}",
        harness.ROOT / "scripts" / "train.py",
        *words,
    ]
    process = subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while not RunFolder(folder).read_metrics():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert RunFolder(folder).newest_good()
