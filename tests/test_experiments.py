"""Grids: what a plan holds, what is refused at once; a tiny one that is stopped, goes on, and half fails."""

import contextlib
import csv
import io
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import exit_codes
import pytest
import run_config
import torch
from compare import make_runs, write_grid
from experiments import read_grid
from report import last_words

from uvit_dia.errors import UserError

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "compare.py"))
TINY = (
    "--model.embed_dim 16 --model.depth 2 --model.num_heads 2 --model.patch_size 4 --train.num_steps 400 "
    "--train.batch_size 16 --train.warmup_steps 40 --train.log_every 20 --train.preview_every 400 "
    "--sample.num_images 4 --sample.steps 2 --evaluate.num_images 20 --evaluate.kid_subset_size 10"
).split()
UNITS = ["none", "dia_lstm", {"kind": "dia_lstm", "gate_scale": 4}]


def base(folder: Path, *argv: object) -> run_config.Config:
    parser = run_config.run_parser("")
    digits = ["--config", str(ROOT / "configs" / "digits.yaml"), "--output_dir", str(folder)]
    return run_config.to_config(parser, parser.parse_args([*digits, *TINY, *map(str, argv)]))


def compare(*argv: object) -> tuple[int, str, str]:
    """scripts/compare.py in this process: exit code, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["compare.py", *TINY, *map(str, argv)])
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        code = exit_codes.run(SCRIPT["main"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.batch_size=32,128", [32, 128]),
        ("model.unit=none,{kind: dia_lstm, gate_scale: 4}", ["none", {"kind": "dia_lstm", "gate_scale": 4}]),
        ("train.betas=[0.9, 0.99],[0.9, 0.999]", [[0.9, 0.99], [0.9, 0.999]]),
        ("model.unit=null", [None]),
    ],
)
def test_an_axis_is_a_setting_and_values_in_yaml(text, values):
    assert SCRIPT["read_axis"](text) == (text.split("=")[0], values)


def test_a_grid_is_every_combination_typed_and_named_with_the_last_axis_fastest(tmp_path):
    axes = {"model.unit": UNITS, "train.batch_size": [8, 16], "train.learning_rate": ["2e-4"]}
    runs = make_runs(base(tmp_path), axes, "steps")
    assert [tuple(run.labels.values()) for run in runs[:3]] == [
        ("none", "8", "2e-4"), ("none", "16", "2e-4"), ("dia_lstm", "8", "2e-4")
    ]  # fmt: skip
    assert runs[-1].labels["model.unit"] == "dia_lstm gate_scale=4"
    assert len({run.name for run in runs}) == len(runs) == 6
    assert all(run.folder.root == tmp_path / run.name for run in runs)
    units = [run.config.model["unit"] for run in runs[::2]]
    assert units[0] is None and units[1]["kind"] == "dia_lstm"
    assert [unit["gate_scale"] for unit in units[1:]] == [1.0, 4.0]  # the base's 4 is not inherited
    assert all(run.config.train.learning_rate == 2e-4 for run in runs)
    assert not any(tmp_path.iterdir())


def test_an_option_of_the_unit_can_be_an_axis_of_its_own(tmp_path):
    runs = make_runs(base(tmp_path), {"model.unit.gate_scale": [1, 2]}, "steps")
    assert [run.config.model["unit"] for run in runs] == [
        base(tmp_path).model["unit"] | {"gate_scale": scale} for scale in (1.0, 2.0)
    ]


def test_at_equal_images_every_batch_size_sees_as_many_and_what_counts_steps_is_scaled(tmp_path):
    runs = make_runs(base(tmp_path), {"train.batch_size": [4, 16, 64]}, "images")
    assert {SCRIPT["num_images"](run) for run in runs} == {400 * 16}
    small, same, large = (run.config.train for run in runs)
    assert same == base(tmp_path).train
    assert (small.num_steps, small.warmup_steps, small.log_every, small.preview_every) == (
        1600,
        160,
        80,
        1600,
    )
    assert (large.num_steps, large.warmup_steps, large.log_every, large.preview_every) == (100, 10, 5, 100)
    assert small.keep_checkpoints == same.keep_checkpoints and small.ema_decay == same.ema_decay
    steps = make_runs(base(tmp_path), {"train.batch_size": [4, 16]}, "steps")
    assert {run.config.train.num_steps for run in steps} == {400}


def test_a_grid_reads_back_as_it_was_written_wherever_it_went(tmp_path):
    runs = make_runs(base(tmp_path / "a"), {"model.unit": UNITS, "train.seed": [0, 1]}, "steps")
    write_grid(tmp_path / "a", runs, {"equal": "steps"})
    (tmp_path / "a").rename(tmp_path / "b")
    facts, again = read_grid(tmp_path / "b")
    assert facts["equal"] == "steps" and "torch" in facts and "runs" not in facts
    assert [(run.name, run.labels) for run in again] == [(run.name, run.labels) for run in runs]
    for run, was in zip(again, runs, strict=True):
        assert run.folder.root == tmp_path / "b" / run.name
        assert run.config.model == was.config.model and run.config.train == was.config.train


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--axis: none given"),
        (["--axis", "train.sed=0,1"], "did you mean 'train.seed'?"),
        (["--axis", "seed=0,1"], "axis seed: no config field"),
        (["--axis", "output_dir=a,b"], "axis output_dir: no config field"),
        (["--axis", "train.batch_size=8,x"], "train.batch_size: 'x' will not do; expected int"),
        (["--axis", "train.batch_size=8,0"], "train.batch_size: 0 will not do"),
        (["--axis", "train.seed=0,0"], "two runs of the grid have one name, seed-0"),
        (["--axis", "train.seed"], "expected KEY=VALUE"),
        (["--axis", "train.seed=[0"], "expected KEY=VALUE"),
        (["--axis", "model.unit=dia_lst"], "model.unit.kind: 'dia_lst' will not do"),
        (["--axis", "model.unit={gate_scale: 4}"], "model.unit.kind: missing"),
        (["--axis", "model.num_heads=2,3"], "num_heads"),
        (["--axis", "model.num_classes=11,3"], "model.null_label: 10 will not do"),
        (
            ["--axis", "data.dataset=digits", "--model.null_label", "null", "--axis", "model.num_classes=3"],
            "model.num_classes: 3",
        ),
        (["--axis", "train.num_accumulation_steps=1,3"], "train.batch_size: 16 will not do"),
        (["--axis", "data.dataset=folder"], "data.path"),
        (["--axis", "train.seed=0,1", "--equal", "epochs"], "equal"),
        (["--axis", "train.seed=0,1", "--jobs", "0"], "jobs"),
    ],
)
def test_what_will_not_do_is_one_line_before_anything_starts(arguments, says, tmp_path):
    code, _, err = compare("--output_dir", tmp_path / "grid", *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and says in lines[0], err
    assert not any(tmp_path.iterdir())


def test_axes_of_a_file_are_layered_with_those_of_the_command_line(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("axes: {model.unit: [none, {kind: dia_lstm, gate_scale: 4}], train.seed: [0, 1, 2]}")
    digits = ROOT / "configs" / "digits.yaml"
    files = ["--config", digits, "--config", file, *TINY, "--output_dir", tmp_path / "grid"]
    code, out, _ = compare(*files, "--axis", "train.seed=5", "--dry_run")
    assert code == 0 and out.splitlines()[0].startswith(
        "unit-none_seed-5: 400 steps of 16, 0 of 6,400 images"
    )
    assert "2 of 2 runs left, 1 at once; time left: unknown" in out
    assert not (tmp_path / "grid").exists()


def test_each_gpu_that_this_process_sees_is_a_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in SCRIPT["slots"](2)] == ["3", "5", "3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in SCRIPT["slots"](1)] == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert SCRIPT["slots"](3)[0]["LOCAL_WORLD_SIZE"] == "3" and len(SCRIPT["slots"](3)) == 3


def test_a_grid_at_work_is_left_alone(tmp_path):
    lock = SCRIPT["claim"](tmp_path)
    with pytest.raises(UserError, match="at work already"):
        SCRIPT["claim"](tmp_path)
    os.close(lock)
    os.close(SCRIPT["claim"](tmp_path))


def test_runs_that_outlive_their_command_keep_the_grid_to_themselves(tmp_path):
    (run,) = make_runs(base(tmp_path), {"train.seed": [0]}, "steps")
    run.folder.root.mkdir()
    lock = SCRIPT["claim"](tmp_path)
    job = SCRIPT["Job"](run, {}, [["sleep", "60"]], lock)
    job.next()
    os.close(lock)
    with pytest.raises(UserError, match="at work already"):
        SCRIPT["claim"](tmp_path)
    job.process.kill()
    job.process.wait()
    os.close(SCRIPT["claim"](tmp_path))


def test_the_last_words_are_the_last_error_else_the_last_line(tmp_path):
    (run,) = make_runs(base(tmp_path), {"train.seed": [0]}, "steps")
    assert last_words(run) == "not started"
    run.folder.root.mkdir()
    log = run.folder.root / "log.txt"
    for text, words in {
        "": "not started",  # its process has just opened the file
        "a\n  3%|\r 4%|": " 4%|",
        " 3%| ConfigError: x\nerror: y\n 4%|": "error: y",
    }.items():
        log.write_text(text)
        assert last_words(run) == words


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A grid of two runs that a signal stopped while they trained; the second is going to break."""
    root = tmp_path_factory.mktemp("grids") / "tiny"
    runs = make_runs(base(root), {"train.learning_rate": [1e-3, 1e38]}, "steps")
    write_grid(root, runs, {"equal": "steps", "command": "", "hardware": ""})
    lock = SCRIPT["claim"](root)
    grid = SCRIPT["Grid"](runs[:1], SCRIPT["slots"](1), lock)
    started = time.monotonic()
    for _ in grid.go():
        if runs[0].folder.metrics.is_file() and runs[0].folder.read_metrics():
            grid.stop(signal.SIGTERM)
        assert time.monotonic() < started + 120, last_words(runs[0])
    os.close(lock)
    assert grid.stopped and not grid.failed and not grid.going
    assert "stopped by SIGTERM" in last_words(runs[0]) and not runs[0].is_trained()
    return root


def test_the_same_command_goes_on_and_a_run_that_fails_stops_no_other(stopped):
    axis = ["--output_dir", stopped, "--axis", "train.learning_rate=1.0e-3,1.0e+38"]
    code, out, err = compare(*axis, "--jobs", 2)
    assert code == 1 and out.splitlines()[-1] == str(stopped / "report.html")
    good, bad = read_grid(stopped)[1]
    assert (
        "failed: " + bad.name in err and "not finite in" in err and good.name not in err.split("failed: ")[-1]
    )
    assert good.card()["num_generated"] == 20 and bad.card() is None
    assert "going on from" in (good.folder.root / "log.txt").read_text()
    assert [r["step"] for r in good.folder.read_metrics()] == list(range(20, 401, 20))
    assert good.card()["provenance"]["spikes"] == good.folder.read_metrics()[-1]["spikes"]
    rows = list(csv.DictReader((stopped / "report.csv").open()))
    assert [row["broken"] for row in rows] == ["0", "1"]
    assert float(rows[0]["kernel_distance_mean"]) == good.card()["metrics"]["kernel_distance_mean"]
    page = (stopped / "report.html").read_text()
    assert "1 of 2 runs are scored" in page and "not finite in" in page

    assert SCRIPT["commands"](good) == [] and len(SCRIPT["commands"](bad)) == 2
    code, out, _ = compare(*axis, "--dry_run")
    assert f"{good.name}: 400 steps of 16, done" in out and "1 of 2 runs left" in out and "0 minutes" in out
    code, _, err = compare(*axis, "--train.num_steps", 500)
    assert code == 2 and "train.num_steps is 400 there and 500 in the grid" in err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "grids").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_grid_on_file_can_be_planned(path):
    files = ["--config", ROOT / "configs" / "digits.yaml", "--config", path]
    code, out, err = compare(*files, "--data.dataset", "digits", "--dry_run")  # others may be downloads
    assert code == 0 and " runs left" in out, err


def test_help_explains_the_grid(capsys):
    with pytest.raises(SystemExit) as done, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", "--help"])
        SCRIPT["main"]()
    said = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0 and "KEY=VALUE,VALUE,... of any setting" in said and "--dry_run" in said
    assert "images of one optimizer step" in said  # and every setting of a run


def test_what_a_run_has_done_is_read_off_the_end_of_its_metrics(tmp_path):
    one = make_runs(base(tmp_path), {"train.seed": [0]}, "steps")[0]
    done = SCRIPT["images_done"]
    assert done(one) == 0
    one.folder.root.mkdir(parents=True)
    lines = [json.dumps({"step": i, "images": 8 * i, "loss": 0.1}) + "\n" for i in range(500)]
    for text, images in {"": 0, lines[0]: 0, "".join(lines): 8 * 499, "".join(lines)[:-9]: 8 * 498}.items():
        one.folder.metrics.write_text(text)
        assert done(one) == images
