"""A checkpoint is whole or absent, and a damaged one is found out."""

import json

import pytest
import torch
from run_folder import RunFolder
from train import trim_metrics

from uvit_dia.checkpoint import BadCheckpoint, aside, folders, read, save
from uvit_dia.errors import UserError


def write(folder: RunFolder, step: int, keep: int = 5):
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}
    return save(folder.checkpoints, step, tensors, {"note": "x"}, keep)


def test_what_was_saved_is_read_back(tmp_path):
    tensors, info = read(write(RunFolder(tmp_path), 7))
    assert tensors["model"]["w"].tolist() == [7, 7, 7] and tensors["optimizer"] == {}
    assert info == {"step": 7, "note": "x"}


def test_the_newest_stay(tmp_path):
    for step in (1, 2, 3, 10):
        write(RunFolder(tmp_path), step, keep=2)
    assert [path.name for path in folders(tmp_path / "checkpoints")] == ["step_00000010", "step_00000003"]


def damage(folder, how):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    match how:
        case "truncated":
            weights.write_bytes(data[:-1])
        case "bit flipped":
            data[-1] ^= 1
            weights.write_bytes(data)
        case "file missing":
            weights.unlink()
        case "manifest missing":
            (folder / "manifest.json").unlink()
        case "manifest torn":
            (folder / "manifest.json").write_text('{"model.saf')
        case "info changed":
            (folder / "info.json").write_text(json.dumps({"step": 9}))


@pytest.mark.parametrize(
    "how", ["truncated", "bit flipped", "file missing", "manifest missing", "manifest torn", "info changed"]
)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_found(how, tmp_path, capsys):
    run = RunFolder(tmp_path)
    good, bad = write(run, 1), write(run, 2)
    damage(bad, how)
    with pytest.raises(BadCheckpoint, match="step_00000002"):
        read(bad)
    assert run.newest_good() == good
    assert "step_00000002" in capsys.readouterr().err and (run.checkpoints / "bad_step_00000002").is_dir()


def test_a_write_that_did_not_finish_is_no_checkpoint_and_does_not_hinder_the_next(tmp_path):
    run = RunFolder(tmp_path)
    good = write(run, 1)
    (run.checkpoints / ".step_00000002.partial").mkdir()
    (run.checkpoints / ".step_00000002.partial" / "model.safetensors").write_bytes(b"half")
    assert run.newest_good() == good
    assert read(write(run, 2))[1]["step"] == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_that_fails_leaves_nothing_and_what_was_there(kind, tmp_path):
    (tmp_path / "place").write_text("before")
    with pytest.raises(UserError, match=r"place can.t be .*No space"), aside(tmp_path / "place") as new:
        if kind == "folder":
            new.mkdir()
        (new if kind == "file" else new / "part").write_bytes(bytes(1000))
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place").read_text() == "before"


def test_a_step_saved_again_replaces_the_folder_whole(tmp_path):
    run = RunFolder(tmp_path)
    write(run, 1)
    write(run, 1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000001"]


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert RunFolder(tmp_path).newest_good() is None
    with pytest.raises(BadCheckpoint, match="not a whole checkpoint"):
        read(tmp_path)


def test_metrics_are_cut_where_a_run_goes_on_and_a_torn_line_is_dropped(tmp_path):
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    trim_metrics(run, 2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_going_back_rotates_only_what_is_older(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 4, 6, 3):
        write(run, step, keep=2)
    assert [read(path)[1]["step"] for path in folders(run.checkpoints)] == [6, 4, 3]


@pytest.mark.parametrize("name", ["manifest.json", "info.json", "model.safetensors", "optimizer.safetensors"])
def test_any_bit_that_flips_is_found(name, tmp_path):
    folder = write(RunFolder(tmp_path), 1)
    data = (folder / name).read_bytes()
    for i in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        (folder / name).write_bytes(damaged)
        if name == "manifest.json" and json_of(damaged) == json.loads(data):
            continue  # a blank for a line's end
        with pytest.raises(BadCheckpoint):
            read(folder)


def json_of(data: bytes):
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("manifest", ["{}", "[]", "3", "null", '{"info.json": 3}', '["info.json"]'])
def test_a_manifest_that_is_none_is_a_bad_checkpoint(manifest, tmp_path):
    folder = write(RunFolder(tmp_path), 1)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(BadCheckpoint, match="step_00000001"):
        read(folder)


def test_where_none_is_good_that_is_said_and_nothing_is_set_aside(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2):
        damage(write(run, step), "truncated")
    with pytest.raises(BadCheckpoint, match=r"step_00000002.*no other is good"):
        run.newest_good()
    assert len(folders(run.checkpoints)) == 2


@pytest.mark.parametrize("renamed", [True, False])
def test_what_a_crash_left_of_a_swap_is_undone_or_finished(renamed, tmp_path):
    run = RunFolder(tmp_path)
    newer = write(run, 1)
    newer.rename(old := newer.with_name(f".{newer.name}.old"))
    if renamed:
        write(run, 1)
    for name in (".pipeline.partial", ".pipeline.x1.partial", ".metrics.jsonl.x2.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".mine.old").mkdir()
    run.mend()
    assert run.newest_good() == newer and not old.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.old", "checkpoints"]
