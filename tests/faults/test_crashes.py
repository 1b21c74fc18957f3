"""kill -9 at any moment, full and read-only disks, damaged and half-written folders: nothing good is lost."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from run_folder import RunFolder
from train import trim_metrics

from uvit_dia.checkpoint import export, folders, read, save
from uvit_dia.diffusion import DiffusionConfig, make_scheduler
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.uvit import UViT

SHORT = ["--train.num_steps", 12, "--train.checkpoint_every", 4]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 12 steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert harness.run(folder, *SHORT) == 0, harness.said(folder)
    return folder


def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    done = harness.crash_again_and_again(tmp_path / "run", kills=5, seed=0, longest=0.3)
    assert done["steps"] > 5


@pytest.mark.slow
def test_120_of_them_lose_nothing_either(tmp_path):
    print(harness.crash_again_and_again(tmp_path / "run", kills=120, seed=1, longest=0.3))


def write_all(run: RunFolder, step: int) -> None:
    """What training writes: a checkpoint, of which one stays, the pipeline, the metrics cut."""
    torch.manual_seed(step)
    model = UViT(sample_size=8, patch_size=4, in_channels=1, embed_dim=8, depth=2, num_heads=1)
    save(run.checkpoints, step, {"model": model.state_dict(), "ema": {}}, {}, keep=1)
    export(UViTPipeline(model, make_scheduler(DiffusionConfig())), run.pipeline, {"step": step})
    trim_metrics(run, 1)


def crash_at_each_call(root: Path) -> None:
    """Writes over a whole run, and dies before the first, second, ... call that changes a file."""
    changes = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    write_all(RunFolder(root / "before"), 1)
    (root / "before" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for step in (1, 2):  # the step that is there, and the next
        for calls in range(1, 1000):
            shutil.copytree(root / "before", root / "run", dirs_exist_ok=True)
            if not (child := os.fork()):
                left = calls

                def look(event: str, arguments: tuple) -> None:
                    nonlocal left
                    if event in changes and str(root) in str(arguments[0]):
                        left -= 1
                        if not left:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(look)
                write_all(RunFolder(root / "run"), step)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            run = RunFolder(root / "run")
            run.mend()
            assert read(run.newest_good())[1]["step"] in (1, step), calls
            assert (run.pipeline / "model_index.json").is_file(), calls
            assert (run.pipeline / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size > 10_000
            assert [r["step"] for r in run.read_metrics()] in ([1], [1, 2]), calls
            names = [p.name for p in [*run.checkpoints.iterdir(), *run.root.iterdir()]]
            assert [name for name in names if name[0] == "." and "metrics" not in name] == []
            shutil.rmtree(root / "run")
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
        assert calls > 50, "the hook saw nothing"


def test_a_crash_before_any_call_that_changes_a_file_leaves_a_good_checkpoint_and_pipeline(tmp_path):
    process = harness.server.Process(target=crash_at_each_call, args=(tmp_path,))
    process.start()
    assert harness.ended(process) == [0]


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "half copied", "renames undone"])
def test_a_run_goes_on_past_what_is_damaged_and_ends_as_if_nothing_had_been(how, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoints" / "step_00000012"
    weights = newest / "ema.safetensors"
    data = weights.read_bytes()
    match how:
        case "truncated":
            weights.write_bytes(data[: len(data) // 2])
        case "bit flipped":
            weights.write_bytes(data[:-9] + bytes([data[-9] ^ 16]) + data[-8:])
        case "half copied":
            weights.unlink()
        case "renames undone":
            newest.rename(newest.with_name(f".{newest.name}.partial"))
            shutil.copytree(folder / "pipeline", folder / ".pipeline.partial")
            (folder / "pipeline").rename(folder / ".pipeline.old")
    assert harness.run(folder, "--resume", *SHORT) == 0
    said = harness.said(folder)
    assert "going on from" in said and "step 8" in said and "Traceback" not in said
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    if how != "renames undone":
        assert f"{newest}: " in said and "bad_step_00000012" in kept
    assert {name for name in kept if "bad" not in name} == {p.name for p in (whole / "checkpoints").iterdir()}
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    harness.assert_same(folder, whole)


def test_where_no_checkpoint_is_good_nothing_starts_anew_and_nothing_is_touched(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for checkpoint in folders(folder / "checkpoints"):
        (checkpoint / "info.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for _ in range(2):  # a cluster asks again
        assert harness.run(folder, "--resume", *SHORT) == 2
        assert "no other is good" in harness.said(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_going_back_within_a_run_is_refused_while_later_checkpoints_are_there(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = harness.metrics(folder)
    assert harness.run(folder, "--resume", folder / "checkpoints" / "step_00000004", *SHORT) == 2
    assert "step_00000012 is a later one" in harness.said(folder) and harness.metrics(folder) == before


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts a small one, or changes it, and returns its folder; skips where it may not."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "none", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a disk to fill")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def error_line(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, said
    return line


@pytest.mark.parametrize("kib", [100, 600, 700])
def test_a_full_disk_ends_with_one_line_and_the_run_goes_on_when_there_is_room(kib, disk, whole):
    folder = disk(f"size={kib}k") / "run"
    assert harness.run(folder, *SHORT) == 2
    line = error_line(harness.said(folder))
    assert "can't be written" in line and "No space left on device" in line and str(folder) in line
    if kib > 500:
        assert RunFolder(folder).newest_good(), "the first checkpoint had room"
    disk("size=100m")
    assert harness.run(folder, "--resume", *SHORT) == 0, harness.said(folder)
    harness.assert_same(folder, whole)


def test_a_disk_that_fills_up_while_metrics_are_logged_tears_no_line_for_good(disk, whole):
    folder = disk("size=4m") / "run"
    assert harness.run(folder, "--train.num_steps", 4, "--train.checkpoint_every", 4) == 0
    with pytest.raises(OSError, match="No space"), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with (folder / "filler").open("r+b") as filler:  # room for the config and some lines
        filler.truncate(filler.seek(0, os.SEEK_END) - 4 * 4096)
    assert harness.run(folder, "--resume", "--train.num_steps", 400, "--train.checkpoint_every", 400) == 2
    assert "metrics.jsonl can't be written" in error_line(harness.said(folder))
    torn = (folder / "metrics.jsonl").read_text()
    assert not torn.endswith("\n"), "a line was to be torn here"
    (folder / "filler").unlink()
    assert harness.run(folder, "--resume", *SHORT) == 0, harness.said(folder)
    harness.assert_same(folder, whole)


def test_a_read_only_folder_is_one_line_and_its_good_checkpoint_is_found_past_a_bad_one(disk, whole, capsys):
    folder = disk("size=10m") / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / "step_00000012" / "info.json").write_text("{}")
    disk("ro")
    good = RunFolder(folder).newest_good()
    assert good and good.name == "step_00000008" and "step_00000012: info.json" in capsys.readouterr().err
    assert harness.run(folder, "--resume", *SHORT) == 2
    assert "Read-only file system" in error_line(harness.said(folder))
    disk("rw")
    assert harness.run(folder, "--resume", *SHORT) == 0, harness.said(folder)
    harness.assert_same(folder, whole)
