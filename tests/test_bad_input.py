"""Bad input to every script: exit code 2, one line that says what, where and what to do, nothing written."""

import errno
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import exit_codes
import pytest
import torch
from PIL import Image

from uvit_dia import checkpoint
from uvit_dia.checkpoint import BadCheckpoint
from uvit_dia.errors import ConfigError, UserError, check_compiler, check_place
from uvit_dia.sampling import load_pipeline
from uvit_dia.uvit import UViT

ROOT = Path(__file__).parents[1]
TINY = (
    "--model.embed_dim 16 --model.depth 2 --model.num_heads 2 --model.patch_size 4 --train.num_steps 2 "
    "--train.batch_size 8 --train.log_every 1 --train.preview_every 1 --train.trackers [] "
    "--sample.num_images 2 --sample.steps 2"
).split()
UNLABELED = (
    "--model.num_classes null --model.null_label null --train.label_drop 0 --sample.guidance_scale 1".split()
)
SCRIPTS: dict[str, ModuleType] = {}


def call(script: str, *args: object) -> tuple[int, str]:
    """A script within this process: its exit code, and what stands on stderr."""
    if script not in SCRIPTS:
        spec = importlib.util.spec_from_file_location(f"{script}_script", ROOT / "scripts" / f"{script}.py")
        SCRIPTS[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(SCRIPTS[script])
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(err), redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [script, *map(str, args)])
        for hub in ("huggingface_hub.constants", "datasets.config"):
            patch.setattr(f"{hub}.HF_HUB_OFFLINE", True)
        code = exit_codes.run(SCRIPTS[script].main)
    return code, err.getvalue()


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


FILES = {
    "list.yaml": "- 1\n",
    "empty.yaml": "",
    "text.yaml": "hello\n",
    "cut.yaml": "train: [1, 2",
    "bytes.yaml": bytes(range(128, 256)),
    "null.yaml": "train: {batch_size: null}\n",
    "null_model.yaml": "model: {embed_dim: null}\n",
    "unknown.yaml": "train: {batchsize: 3}\n",
    "section.yaml": "trian: {batch_size: 3}\n",
    "python.yaml": "output_dir: !!python/object/apply:pathlib.Path.touch [{tmp}/ran]\n",
    "class.yaml": "model: {unit: {class_path: payload.Unit}}\n",
    "unit.yaml": "model: {unit: payload.Unit}\n",
    "dotted.yaml": "model.unit: payload.Unit\n",
    "import.yaml": "train: payload.Unit\n",
    "axes.yaml": "axes: {model.unit: [{class_path: payload.Unit}]}\n",
    "axes_dotted.yaml": "axes: {model.unit.class_path: [payload.Unit]}\n",
    "axes_model.yaml": "axes: {model: [{unit: payload.Unit}]}\n",
    "include.yaml": "config: /etc/passwd\n",
    "payload.py": "import pathlib; pathlib.Path('{tmp}/ran').touch()\n",
    "file.txt": "text\n",
    "pixels/x.png": "no image",
    "few/x.png": None,
}
DAMAGE: dict[str, dict[str, Any]] = {  # copies of the run, with files replaced; None: left out
    "no_pipeline": {"pipeline": None},
    "no_config": {"config.yaml": None},
    "bad_config": {"config.yaml": "train: 3\n"},
    "bad_index": {"pipeline/model_index.json": "{"},
    "bad_about": {"pipeline/training.json": "{"},
    "cut_weights": {"pipeline/unet/diffusion_pytorch_model.safetensors": b"\x10\0\0\0\0\0\0\0{"},
    "no_weights": {"pipeline/unet/diffusion_pytorch_model.safetensors": None},
    "other_config": {"pipeline/unet/config.json": {"embed_dim": 32}},
    "bad_model": {"pipeline/unet/config.json": {"embed_dim": 15}},
    "bad_scheduler": {"pipeline/scheduler/scheduler_config.json": {"num_train_timesteps": "x"}},
    "bad_checkpoint": {"checkpoints/step_00000002/model.safetensors": b"cut"},
}


def damage(run: Path, target: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(run, target)
    for name, content in changes.items():
        path = target / name
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif isinstance(content, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | content))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> Path:
    """A folder with a run of two steps, one without unit and labels, damaged copies, and the files above."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "nothing").mkdir()
    for name, content in FILES.items():
        (tmp / name).parent.mkdir(exist_ok=True)
        text = content.replace("{tmp}", str(tmp)) if isinstance(content, str) else content or b""
        (tmp / name).write_bytes(text.encode() if isinstance(text, str) else text)
    Image.new("L", (8, 8)).save(tmp / "few/x.png")
    for name, args in (
        ("run", ["--model.unit.kind", "dia_lstm"]),
        ("plain", ["--model.unit", "null", *UNLABELED]),
    ):
        code, err = call("train", *TINY, *args, "--train.preview_every", 0, "--output_dir", tmp / name)
        assert code == 0, err
    for name, changes in DAMAGE.items():
        damage(tmp / "run", tmp / name, changes)
    return tmp


def cases(script: str, table: str) -> list[Any]:
    """Lines `arguments -> what the error says`, of one script."""
    lines = [line.split(" -> ") for line in table.strip().splitlines()]
    return [pytest.param(script, args.split(), says, id=f"{script} {args}") for args, says in lines]


TRAIN = """
--train.batchsize 3 -> train.batchsize: no such key; did you mean 'train.batch_size'?
--train.batch_size x -> train.batch_size: 'x' will not do; expected int
--train.batch_size 3.5 -> train.batch_size: '3.5' will not do; expected int
--train.batch_size 0 -> train.batch_size: 0 will not do; expected 1 or more
--train.num_steps -1 -> train.num_steps: -1 will not do
--train.seed -1 -> train.seed: -1 will not do
--train.precision fp8 -> train.precision: 'fp8' will not do
--train.precision fp16 -> precision: 'fp16' will not do; expected fp32 or bf16 on a CPU
--train.learning_rate 0 -> train.learning_rate: 0.0 will not do
--train.learning_rate nan -> train.learning_rate: 'nan' will not do
--train.betas [0.9] -> train.betas: '[0.9]' will not do
--train.betas [1.5,0.9] -> train.betas: (1.5, 0.9) will not do; expected 0 or more and less than 1
--train.weight_decay -1 -> train.weight_decay: -1.0 will not do
--train.max_grad_norm -1 -> train.max_grad_norm: -1.0 will not do
--train.ema_decay 1 -> train.ema_decay: 1.0 will not do
--train.label_drop 0.1 --model.null_label null -> train.label_drop: 0.1 will not do; expected 0 for a model
--train.trackers [nonsense] -> train.trackers: 'nonsense' will not do; expected one that is installed
--train.num_accumulation_steps 3 -> train.batch_size: 8 will not do; expected a multiple of 3
--model.patch_size 3 -> model.patch_size: 3 will not do; expected a divisor of model.sample_size=8
--model.sample_size 0 -> model.sample_size: 0 will not do
--model.sample_size -8 -> model.sample_size: -8 will not do
--model.embed_dim 15 -> model.embed_dim=15, which must be even
--model.embed_dim 0 -> model.embed_dim: 0 will not do
--model.embed_dim -16 -> model.embed_dim: -16 will not do
--model.num_heads 3 -> model.num_heads: 3 will not do; expected a divisor of model.embed_dim=16
--model.depth 3 -> model.depth: 3 will not do; expected an even number
--model.in_channels 0 -> model.in_channels: 0 will not do
--model.in_channels 2 -> model.in_channels: 2 will not do; expected 1 (grey) or 3 (RGB)
--model.mlp_ratio 0 -> model.mlp_ratio: 0.0 will not do
--model.mlp_ratio -1 -> model.mlp_ratio: -1.0 will not do
--model.num_classes 3 -> model.null_label: 10 will not do
--model.num_classes -1 --model.null_label null --train.label_drop 0 -> model.num_classes: -1 will not do
--model.num_classes 3 --model.null_label null --train.label_drop 0 -> model.num_classes: 3 will not do
--model.null_label 0 -> model.null_label: 0 will not do; expected none of the data's labels, 0 to 9
--model.skip_scale 2 -> model.skip_scale: 2.0 will not do
--model.unit.kind dia -> model.unit.kind: 'dia' will not do
--model.unit.kind dia_lstm --model.unit.reduction 3 -> model.unit.reduction: 3 will not do; expected a divisor
--model.unit.kind dia_lstm --model.unit.blocks [99] -> model.unit.blocks: [99] will not do
--model.unit.kind constant --model.unit.reduction 4 -> model.unit.reduction: 4 will not do
--model.unit 3 -> model.unit: expected null or a mapping with kind
--model.unit dia_lstm -> model.unit: expected null or a mapping with kind
--data.dataset digit -> data.dataset: 'digit' will not do
--data.dataset folder -> data.path: None will not do; expected a path
--data.dataset folder --data.path {tmp}/nowhere -> expected a folder of images
--data.dataset folder --data.path {tmp}/nothing -> expected images, of which nothing/train has none
--data.dataset folder --data.path {tmp}/file.txt -> expected a folder of images
--data.dataset folder --data.path {tmp}/pixels {unlabeled} -> pixels/x.png can't be decoded as an image
--data.dataset hub --data.path {tmp}/nowhere -> expected a data set on the Hub, or a folder
--data.dataset hub --data.path {tmp}/file.txt -> expected a data set on the Hub, or a folder
--data.dataset cifar10 --data.path {tmp}/file.txt -> connect to the network, or set data.dataset to hub
--data.path x -> data.path: 'x' will not do; expected null with data.dataset digits
--data.num_workers -1 -> data.num_workers: -1 will not do
--diffusion.num_train_timesteps 0 -> diffusion.num_train_timesteps: 0 will not do
--diffusion.beta_schedule quadratic -> diffusion.beta_schedule: 'quadratic' will not do
--diffusion.min_snr_gamma -1 -> diffusion.min_snr_gamma: -1.0 will not do
--sample.sampler euler -> sample.sampler: 'euler' will not do
--sample.steps 2000 -> steps: 2000 will not do; expected at most the 1000 timesteps of training
--sample.class_label 12 -> class_label: 12 will not do; expected 0 to 10
{unlabeled} --sample.guidance_scale 2 -> guidance_scale: 2.0 will not do; expected 1 for a model
{unlabeled} --sample.class_label 1 -> class_label: 1 will not do; expected null: the model is unconditional
--config -> --config: expected one argument
--config {tmp}/nowhere.yaml -> --config: {tmp}/nowhere.yaml can't be parsed as YAML ([Errno 2] No such file
--config={tmp}/nowhere.yaml -> --config: {tmp}/nowhere.yaml can't be parsed as YAML ([Errno 2] No such file
--config {tmp} -> can't be parsed as YAML ([Errno 21] Is a directory
--config {tmp}/list.yaml -> expected a file of settings
--config {tmp}/empty.yaml -> expected a file of settings
--config {tmp}/text.yaml -> expected a file of settings
--config {tmp}/cut.yaml -> {tmp}/cut.yaml can't be parsed as YAML
--config {tmp}/bytes.yaml -> {tmp}/bytes.yaml can't be parsed as YAML
--config {tmp}/null_model.yaml -> model.embed_dim: None will not do; expected int
--config {tmp}/unknown.yaml -> train.batchsize: no such key; did you mean 'train.batch_size'?
--config {tmp}/section.yaml -> did you mean 'train.batch_size'?
--config {tmp}/python.yaml -> {tmp}/python.yaml can't be parsed as YAML
--config {tmp}/class.yaml -> class_path: no such key
--config {tmp}/unit.yaml -> model.unit: 'payload.Unit' will not do; expected null or a mapping
--config {tmp}/dotted.yaml -> model.unit: no such key
--config {tmp}/import.yaml -> train: 'payload.Unit' will not do; expected a mapping
--config {tmp}/include.yaml -> config: no such key
extra -> extra: no such key
--resume {tmp}/nowhere -> {tmp}/nowhere: not a whole checkpoint
--resume {tmp}/file.txt -> {tmp}/file.txt: not a whole checkpoint
--resume {tmp}/nothing -> {tmp}/nothing: not a whole checkpoint
--resume {tmp}/bad_checkpoint/checkpoints/step_00000002 -> model.safetensors: not as written (checksum)
--resume {tmp}/run/checkpoints/step_00000002 --model.depth 4 -> model.depth is 2 there and 4 here
--output_dir {tmp}/run -> {tmp}/run holds a run; add --resume to go on, or name another
--output_dir {tmp}/file.txt -> {tmp}/file.txt
--output_dir {tmp}/file.txt/out -> {tmp}/file.txt
"""
SAMPLE = """
--grid {tmp}/g.png -> arguments are required: source
{tmp}/run -> nothing to write: add --grid out.png, --dir images/ or both
{tmp}/run --dir {tmp}/few -> --dir: there are images in {tmp}/few already; name another folder
{tmp}/run --grid {tmp}/g.png --nope 3 -> nope: no such key
{tmp}/run --grid {tmp}/g.png --num_images 0 -> sample.num_images: 0 will not do
{tmp}/run --grid {tmp}/g.png --num_images x -> num_images: 'x' will not do
{tmp}/run --grid {tmp}/g.png --steps 0 -> sample.steps: 0 will not do
{tmp}/run --grid {tmp}/g.png --steps 2000 -> steps: 2000 will not do; expected at most the 1000
{tmp}/run --grid {tmp}/g.png --sampler euler -> sampler: 'euler' will not do
{tmp}/run --grid {tmp}/g.png --seed -1 -> sample.seed: -1 will not do
{tmp}/run --grid {tmp}/g.png --batch_size 0 -> sample.batch_size: 0 will not do
{tmp}/run --grid {tmp}/g.png --class_label 12 -> class_label: 12 will not do; expected 0 to 10
{tmp}/run --grid {tmp}/g.png --class_label -1 -> class_label: -1 will not do; expected 0 to 10
{tmp}/run --grid {tmp}/g.png --precision fp16 -> precision: 'fp16' will not do
{tmp}/plain --grid {tmp}/g.png --class_label 3 -> expected null: the model is unconditional
{tmp}/plain --grid {tmp}/g.png --guidance_scale 2 -> expected 1 for a model without a null_label
{tmp}/run --grid {tmp}/g.xyz -> --grid: '{tmp}/g.xyz' will not do; expected a file name that ends in
{tmp}/run --grid {tmp}/nothing -> --grid: '{tmp}/nothing' will not do
{tmp}/run --grid {tmp}/file.txt/g.png -> expected a place where a file can be written
{tmp}/run --dir {tmp}/file.txt -> expected a place where a folder can be written
{tmp}/nothing --grid {tmp}/g.png -> {tmp}/nothing: neither a run with a pipeline/
{tmp}/file.txt --grid {tmp}/g.png -> {tmp}/file.txt: neither a run with a pipeline/
no/such --grid {tmp}/g.png -> no/such: no run, pipeline or Hub id that can be loaded
{tmp}/no_pipeline --grid {tmp}/g.png -> {tmp}/no_pipeline: neither a run with a pipeline/
{tmp}/bad_config --grid {tmp}/g.png -> train: 3 will not do
{tmp}/bad_index --grid {tmp}/g.png -> {tmp}/bad_index: no run, pipeline or Hub id that can be loaded
{tmp}/bad_about --grid {tmp}/g.png -> {tmp}/bad_about: no run, pipeline or Hub id that can be loaded
{tmp}/bad_model --grid {tmp}/g.png -> which must be even
{tmp}/bad_scheduler --grid {tmp}/g.png -> {tmp}/bad_scheduler: no run, pipeline or Hub id that can be loaded
{tmp}/other_config --grid {tmp}/g.png -> {tmp}/other_config: no run, pipeline or Hub id that can be loaded
{tmp}/cut_weights --grid {tmp}/g.png -> {tmp}/cut_weights: no run, pipeline or Hub id that can be loaded
{tmp}/no_weights --grid {tmp}/g.png -> {tmp}/no_weights: no run, pipeline or Hub id that can be loaded
"""
EVALUATE = """
--num_images 20 -> nothing to score: name a run, a pipeline or a Hub id
{tmp}/run --generated {tmp}/pixels -> {tmp}/pixels/x.png can't be decoded as an image
{tmp}/nothing --reference {tmp}/few --checkpoints -> --checkpoints and --ema_sweep go with a run
{tmp}/run --nope 3 -> nope: no such key
{tmp}/run --num_images 5 -> evaluate.num_images: 5 will not do
{tmp}/run --batch_size 0 -> evaluate.batch_size: 0 will not do
{tmp}/run --kid_subset_size 1 -> evaluate.kid_subset_size: 1 will not do
{tmp}/run --seed -1 -> evaluate.seed: -1 will not do
{tmp}/run --extractor vgg -> extractor: 'vgg' will not do
{tmp}/run --extractor_weights {tmp}/nowhere -> evaluate.extractor_weights: '{tmp}/nowhere' will not do
{tmp}/run --extractor_weights {tmp}/file.txt -> evaluate.extractor_weights: '{tmp}/file.txt' will not do
{tmp}/run --sample.steps 2000 -> steps: 2000 will not do
{tmp}/plain --sample.guidance_scale 2 -> guidance_scale: 2.0 will not do
{tmp}/run --reference {tmp}/nowhere -> expected a folder of images
{tmp}/run --reference {tmp}/nothing -> expected images, of which nothing/train has none
{tmp}/run --card {tmp}/card.md -> --card: '{tmp}/card.md' will not do; expected a file name that ends in .json
{tmp}/run --card {tmp}/file.txt/card.json -> expected a place where a file can be written
{tmp}/run/pipeline -> {tmp}/run/pipeline: no run, so the real images are not known: add --reference DIR
{tmp}/nothing --reference {tmp}/few --card {tmp}/card.json -> {tmp}/nothing: neither a run
"""
REPORT = """
--nope 3 -> nope: no such key
{tmp}/run extra -> extra: no such key
{tmp}/nothing -> {tmp}/nothing: no run, as it has no config.yaml
{tmp}/nowhere -> {tmp}/nowhere: no run, as it has no config.yaml
{tmp}/no_config -> {tmp}/no_config: no run, as it has no config.yaml
"""
ANALYZE = """
--seed 0 -> arguments are required: run
{tmp}/nothing -> {tmp}/nothing: no run, as it has no config.yaml
{tmp}/file.txt -> {tmp}/file.txt: no run, as it has no config.yaml
{tmp}/bad_config -> train: 3 will not do
{tmp}/plain -> {tmp}/plain: the run has no attention unit
{tmp}/no_pipeline -> {tmp}/no_pipeline: neither a run with a pipeline/
{tmp}/cut_weights -> {tmp}/cut_weights: no run, pipeline or Hub id that can be loaded
{tmp}/run --only [nope] -> only: 'nope' will not do
{tmp}/run --timesteps [1000] -> timesteps: [1000] will not do
{tmp}/run --timesteps [] -> timesteps: [] will not do
{tmp}/run --num_images 0 -> num_images: '0' will not do
{tmp}/run --nope 1 -> nope: no such key
"""
BENCHMARK = """
--units dia -> units: 'dia' will not do
--batch_sizes x -> batch_sizes: 'x' will not do
--batch_sizes 0 -> batch_sizes: '0' will not do
--batch_sizes 4 --train.num_accumulation_steps 3 -> train.batch_size: 4 will not do; expected a multiple of 3
--num_timed 0 -> num_timed: '0' will not do
--json {tmp}/nothing -> --json: '{tmp}/nothing' will not do
--json {tmp}/file.txt/rows.json -> expected a place where a file can be written
--config {tmp}/nowhere.yaml -> can't be parsed as YAML
--nope 3 -> nope: no such key
"""
COMPARE = """
--axis train.seed=0,1 --nope 3 -> nope: no such key
--output_dir {tmp}/out -> --axis: none given; add one, such as --axis model.unit=none,dia_lstm
--axis train.sed=0,1 -> train.sed
--axis train.seed -> train.seed
--axis train.seed=0,x -> train.seed
--axis train.seed=0,1 --jobs 0 -> jobs: '0' will not do
--config {tmp}/axes.yaml --output_dir {tmp}/out -> class_path: no such key
--config {tmp}/axes_dotted.yaml --output_dir {tmp}/out -> class_path: no such key
--config {tmp}/axes_model.yaml --output_dir {tmp}/out -> model.unit: 'payload.Unit' will not do
--axis train.seed=0,1 --config {tmp}/nowhere.yaml -> can't be parsed as YAML
"""
CASES = [
    case
    for script, table in dict(
        train=TRAIN,
        sample=SAMPLE,
        evaluate=EVALUATE,
        report=REPORT,
        analyze=ANALYZE,
        benchmark=BENCHMARK,
        compare=COMPARE,
    ).items()
    for case in cases(script, table)
]
ALWAYS = {
    "evaluate": "--num_images 20 --kid_subset_size 10 --extractor efficientnet-lite0 --cache_dir {tmp}/cache",
    "benchmark": f"{' '.join(TINY)} --units none --batch_sizes 4 --num_timed 1",
}


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize(("script", "args", "says"), CASES)
def test_bad_input_is_one_line_exit_2_and_nothing_written(script, args, says, tmp, monkeypatch):
    monkeypatch.chdir(tmp)
    monkeypatch.syspath_prepend(tmp)  # where payload.py could be imported from
    always = ALWAYS.get(script, "").split()
    if script == "train":
        always = [*TINY, "--output_dir", "{tmp}/out"]
    argv = [arg.replace("{tmp}", str(tmp)) for arg in (*always, *args) if arg != "{unlabeled}"]
    if "{unlabeled}" in args:
        argv = [*argv[: len(always)], *UNLABELED, *argv[len(always) :]]
    before = listing(tmp)
    code, err = call(script, *argv)
    assert code == 2 and says.replace("{tmp}", str(tmp)) in err, err
    assert err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert listing(tmp) == before


def test_there_are_as_many_cases_as_promised():
    assert len(CASES) >= 60 and {case.values[0] for case in CASES} == {
        p.stem for p in (ROOT / "scripts").glob("*.py") if "__main__" in p.read_text()
    }


def test_the_same_from_processes_of_their_own(tmp, tmp_path):  # for train: test_scripts.py
    expected = {
        "sample": ("{tmp}/run", "nothing to write"),
        "evaluate": ("{tmp}/run/pipeline", "add --reference DIR"),
        "report": ("{tmp}/nothing", "no run, as it has no config.yaml"),
        "analyze": ("{tmp}/plain", "the run has no attention unit"),
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = {}
    for script, (args, _) in expected.items():
        command = [
            sys.executable,
            str(ROOT / f"scripts/{script}.py"),
            *args.replace("{tmp}", str(tmp)).split(),
        ]
        processes[script] = subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)
    for script, process in processes.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2 and err.startswith("error: ") and expected[script][1] in err, err
        assert len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.iterdir())


def test_a_streamed_image_that_is_none_ends_training_with_its_name(tmp, tmp_path):
    data = "--data.dataset folder --data.in_memory_gib 0 --data.num_workers 0 --data.path".split()
    code, err = call("train", *TINY, *UNLABELED, *data, tmp / "pixels", "--output_dir", tmp_path / "out")
    assert code == 2 and f"error: {tmp}/pixels/x.png can't be decoded" in err and "Traceback" not in err


def test_compiling_on_a_cpu_without_a_compiler_is_refused_at_the_start(tmp, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp / "nothing"))
    monkeypatch.delenv("CXX", raising=False)
    code, err = call("train", *TINY, "--train.compile", "true", "--output_dir", tmp / "out")
    assert code == 2 and err.startswith("error: train.compile: True will not do; expected false, or a C++")
    assert len(err.splitlines()) == 1 and not (tmp / "out").exists()
    check_compiler("train.compile", "cuda")
    monkeypatch.setenv("CXX", f"{sys.executable} -c")
    check_compiler("train.compile", "cpu")


def test_a_place_is_refused_only_if_nothing_can_be_written_there(tmp_path, monkeypatch):
    (tmp_path / "file.png").touch()
    check_place("--grid", str(tmp_path / "new/deeper/g.PNG"), [".png"])
    check_place("--grid", str(tmp_path / "file.png"), [".png"])
    check_place("--dir", str(tmp_path / "new/deeper"))
    check_place("--dir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check_place("--dir", "new")
    for path in ("", "file.png", "file.png/new"):
        with pytest.raises(ConfigError, match="a place where a folder can be written"):
            check_place("--dir", path)
    if os.getuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="a place where a file can be written"):
            check_place("--grid", "g.png", [".png"])


def test_a_file_system_that_refuses_is_one_line_and_a_bug_is_a_traceback(tmp_path, capsys):
    assert exit_codes.run(lambda: (tmp_path / "x" / "y").write_text("")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/x/y: No such file or directory")
    assert exit_codes.run(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))) == 2
    assert capsys.readouterr().err.startswith("error: a file: No space left; mend that")
    with pytest.raises(OSError, match="nothing of files"):
        exit_codes.run(lambda: (_ for _ in ()).throw(OSError("nothing of files")))


def raises(error: Exception) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: 143, 143, ""),
        (raises(UserError("a: b")), 2, "error: a: b"),
        (raises(ValueError("a bug")), 1, "Traceback"),
    ],
    ids=["signal", "error", "bug"],
)
def test_one_of_several_processes_ends_at_once_whatever_it_came_to(main, code, said, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(exit_codes.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(exit_codes.os, "_exit", codes.append)
    with pytest.raises(SystemExit):  # as this `_exit` ends nothing
        exit_codes.leave(main)
    assert codes == [code] and capsys.readouterr().err.startswith(said)


def test_a_place_where_a_tracker_cannot_write_is_one_line(tmp):
    (tmp / "taken").mkdir()
    (tmp / "taken" / "tensorboard").touch()
    code, err = call("train", *TINY, "--train.trackers", "[tensorboard]", "--output_dir", tmp / "taken")
    assert code == 2 and err.startswith("error: ") and "tensorboard" in err and "Traceback" not in err


def out_of_memory() -> None:
    if torch.cuda.is_available():
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    statistics = "GPU 0 has a total capacity of 1.00 GiB of which 0 bytes is free. See the documentation."
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 1.00 PiB. {statistics}")


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_full_gpu_is_one_line_of_what_to_lower_from_the_process_that_has_it(
    local_rank, capsys, monkeypatch
):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert exit_codes.run(out_of_memory) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: CUDA out of memory. Tried to allocate ") and len(err.splitlines()) == 1
    assert "lower train.batch_size or raise train.num_accumulation_steps" in err
    assert "sampling: sample.batch_size" in err and "total capacity" not in err


# Files that may come from anyone.


@pytest.fixture
def ran(tmp_path) -> Path:
    return tmp_path / "ran"


def test_a_payload_would_run_if_it_were_unpickled(ran):
    torch.save(Payload(ran), ran.with_name("x.pth"))
    torch.load(ran.with_name("x.pth"), weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.safetensors", "x"])
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_as_official_weights_is_refused(name, write, ran):
    write({"pos_embed": Payload(ran)}, ran.with_name(name))
    with pytest.raises(UserError, match=f"{name}: not the plain weights"):
        UViT.from_official(ran.with_name(name))
    assert not ran.exists()


@pytest.mark.parametrize("extractor", ["efficientnet-lite0", "inception-v3-compat"])
def test_a_pickle_as_extractor_weights_is_refused(extractor, tmp, ran):
    torch.save({"weight": Payload(ran)}, ran.with_name("x.pth"))
    options = ["--extractor", extractor, "--num_images", 20, "--kid_subset_size", 10]
    code, err = call("evaluate", tmp / "run", *options, "--extractor_weights", ran.with_name("x.pth"))
    assert code == 2 and "evaluate.extractor_weights" in err and not ran.exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_a_pickle_as_a_pipelines_weights_is_refused(name, tmp, ran):
    folder = ran.with_name("pipeline")
    damage(tmp / "run/pipeline", folder, {"unet/diffusion_pytorch_model.safetensors": None})
    torch.save({"weight": Payload(ran)}, folder / "unet" / name)
    with pytest.raises(UserError, match="no run, pipeline or Hub id that can be loaded"):
        load_pipeline(str(folder), "cpu")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "more.pkl", "info.json"])
def test_a_pickle_in_a_checkpoint_is_refused_whatever_its_manifest_says(name, tmp, ran):
    folder = ran.with_name("step_00000002")
    shutil.copytree(tmp / "run/checkpoints/step_00000002", folder)
    content = pickle.dumps(Payload(ran))
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).write_text(
        json.dumps(manifest | {name: hashlib.sha256(content).hexdigest()})
    )
    with pytest.raises(BadCheckpoint, match=f"^{folder}: "):
        checkpoint.read(folder)
    assert not ran.exists()


@pytest.mark.parametrize("part", ["_class_name", "unet", "scheduler"])
def test_code_in_a_pipelines_folder_is_not_run(part, tmp, ran, monkeypatch):
    folder = ran.with_name("pipeline")
    shutil.copytree(tmp / "run/pipeline", folder)
    for place in (folder, folder / "unet", folder / "scheduler"):
        for name in ("pipeline", "payload"):
            (place / f"{name}.py").write_text(
                f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nPayload = 1\n"
            )
    index = json.loads((folder / "model_index.json").read_text())
    index[part] = ["payload", "Payload"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no run, pipeline or Hub id that can be loaded"):
        load_pipeline(str(folder), "cpu")
    assert not ran.exists()


def test_another_models_folder_is_refused(tmp, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="unet: 'UNet2DModel' will not do; expected a UViT"):
        load_pipeline(str(tmp_path), "cpu")
