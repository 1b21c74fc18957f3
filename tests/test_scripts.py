"""The commands as people run them: a tiny run end to end, several processes, signals, and one-line errors."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import exit_codes
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TINY = (
    "--model.embed_dim 16 --model.depth 2 --model.num_heads 2 --model.patch_size 4 --train.num_steps 20 "
    "--train.batch_size 8 --train.warmup_steps 2 --train.decay none --train.log_every 1 "
    "--train.checkpoint_every 10 "
    "--train.preview_every 20 --sample.num_images 4 --sample.steps 3 --model.unit.kind dia_lstm"
).split()


def command(script: str, *args: object, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--standalone",
        ]
    return [*launch, str(ROOT / "scripts" / f"{script}.py"), *map(str, args)]


def run(script: str, *args: object, processes: int = 1, gpus: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command(script, *args, processes=processes),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def call(script: str, *args: object) -> tuple[int, str]:
    """The same within this process, for what ends early: exit code and what stands on stderr."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.setenv("HF_HUB_OFFLINE", "1")
        code = exit_codes.run(module.main)
    return code, err.getvalue()


def train(folder: Path, *args: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return run("train", *TINY, "--output_dir", folder, *args, processes=processes)


def metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key != "images_per_second"} for r in records]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_what_the_readme_says(trained):
    assert [r["step"] for r in metrics(trained)] == list(range(1, 21))
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert (trained / "samples" / "step_00000020.png").is_file() and (trained / "config.yaml").is_file()
    assert any((trained / "tensorboard").rglob("events*"))
    assert json.loads((trained / "pipeline" / "training.json").read_text())["step"] == 20


def test_sampling_a_run_writes_the_images_that_were_asked_for(trained, tmp_path):
    done = run(
        "sample", trained, "--num_images", 5, "--grid", tmp_path / "g.png", "--dir", tmp_path / "images"
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images").glob("*.png"))) == 5 and (tmp_path / "g.png").is_file()
    as_the_run = ["--steps", 3, "--guidance_scale", 1.5]  # which a pipeline's folder does not know
    again = run("sample", trained / "pipeline", "--num_images", 2, *as_the_run, "--dir", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    for name in ("000000.png", "000001.png"):
        ours, theirs = (np.asarray(Image.open(tmp_path / d / name)) for d in ("images", "two"))
        assert np.array_equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_record_their_steps_follow_one_and_end(tmp_path):
    for gpus in ("0", "0,1"):
        settings = [*TINY, "--train.compile", "true", "--output_dir", tmp_path / gpus]
        done = run("train", *settings, processes=len(gpus.split(",")), gpus=gpus)
        assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(tmp_path / "0"), metrics(tmp_path / "0,1"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


def test_two_processes_see_the_same_batches_and_losses_and_draw_the_same_images(trained, tmp_path):
    done = train(tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(trained), metrics(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    drawn = run("sample", trained, "--num_images", 5, "--batch_size", 2, "--dir", tmp_path / "b", processes=2)
    alone = run("sample", trained, "--num_images", 5, "--batch_size", 2, "--dir", tmp_path / "a")
    assert drawn.returncode == alone.returncode == 0, drawn.stderr
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_scoring_on_two_processes_gives_the_card_of_one(trained, tmp_path):
    options = ["--num_images", 19, "--kid_subset_size", 10]
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(21):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    cards = []
    for processes in (1, 2):
        card, cache = tmp_path / f"{processes}.json", tmp_path / f"cache_{processes}"
        places = ["--reference", folder, "--cache_dir", cache, "--card", card]
        done = run("evaluate", trained, *options, *places, processes=processes)
        assert done.returncode == 0, done.stderr
        cards.append(json.loads(card.read_text()))
    for name, value in cards[0]["metrics"].items():
        assert cards[1]["metrics"][name] == pytest.approx(value, abs=1e-3)
    assert cards[0]["reference"] == cards[1]["reference"] and cards[0]["provenance"]["step"] == 20


def test_a_report_is_one_page_with_its_pictures_inside(trained):
    done = run("report", trained)
    page = (trained / "report.html").read_text()
    assert done.returncode == 0 and str(trained / "report.html") in done.stdout
    assert page.count("data:image/png;base64") == 2 and "20 steps, 160 images" in page
    assert "http" not in page.replace("https://", "http").split("config.yaml")[0]


def test_a_signal_saves_and_going_on_equals_never_having_stopped(trained, tmp_path):
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        command(
            "train",
            *TINY,
            "--output_dir",
            folder,
            "--train.checkpoint_every",
            1000,
            "--train.num_steps",
            5000,
        ),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "metrics.jsonl").is_file() or not metrics(folder):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    (saved,) = (folder / "checkpoints").iterdir()
    done = train(folder, "--resume", "--train.num_steps", max(20, int(saved.name.split("_")[1])))
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr
    assert metrics(folder)[:20] == metrics(trained)
    if metrics(folder)[-1]["step"] == 20:
        ours, theirs = (load_file(f / "checkpoints/step_00000020/ema.safetensors") for f in (folder, trained))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_going_on_at_the_end_mends_what_a_crash_left_out(trained, tmp_path):
    folder = tmp_path / "ended"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "pipeline")
    assert train(folder, "--resume").returncode == 0
    assert json.loads((folder / "pipeline" / "training.json").read_text())["step"] == 20
    assert metrics(folder) == metrics(trained)


def test_going_on_from_a_named_checkpoint_into_a_new_folder(trained, tmp_path):
    done = train(tmp_path / "branch", "--resume", trained / "checkpoints" / "step_00000010")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "branch") == metrics(trained)[10:]


def test_the_benchmark_sets_everything_beside_the_reference(tmp_path):
    options = "--units reference,none,dia_lstm --batch_sizes 4 --num_timed 2 --tasks train,sample".split()
    code, err = call("benchmark", *TINY, *options, "--json", tmp_path / "b.json")
    assert code == 0, err
    reference, none, dia, drawn, _ = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert dia["parameters"] - none["parameters"] == 10 * 16**2 // 4 + 2 * (4 + 4 * 16)
    assert reference["parameters"] == none["parameters"] and none["ratio_to_none"] == 1
    ratio = none["images_per_second"] / reference["images_per_second"]
    assert none["ratio_to_reference"] == pytest.approx(ratio, abs=1e-3)
    assert all(0 <= row["mfu"] < 1 for row in (reference, none, dia)) and dia["ms_inference"] > 0
    assert drawn["task"] == "sample" and drawn["images_per_second"] > 0


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "report", "analyze", "benchmark"])
def test_help_is_helpful(script, capsys):
    with pytest.raises(SystemExit) as done:
        call(script, "--help")
    text = capsys.readouterr().out
    assert done.value.code == 0 and "usage:" in text and len(text.splitlines()) > 5


def test_the_training_process_itself_exits_with_2_and_prints_one_line(tmp_path):
    done = run("train", "--train.batchsize", 3, "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: train.batchsize")
    assert "Traceback" not in done.stderr
