"""Stopping and going on changes nothing: not a bit on one device, rounding on another number of processes."""

from pathlib import Path

import harness
import pytest
import torch
from PIL import Image
from test_trainer import assert_same, make

from uvit_dia import checkpoint
from uvit_dia.attention_units import UNITS
from uvit_dia.trainer import fit, summary

STREAMED = {"in_memory_gib": 0.0, "num_workers": 1}
ALL_AT_ONCE = {"num_accumulation_steps": 2, "precision": "bf16", "data": STREAMED, "max_grad_norm": 0.5}
UNIT_CASES = {kind: {"model": {"unit": {"kind": kind}}} for kind in UNITS if kind != "dia_lstm"}
CASES = UNIT_CASES | {
    "stacked, a unit a stage": {"model": {"unit": {"kind": "dia_lstm", "sharing": "stage", "num_cells": 2}}},
    "a unit a block": {"model": {"unit": {"kind": "dia_lstm_light", "sharing": "none"}}},
    "BatchNorm and all at once": {"model": {"unit": {"kind": "cbam"}}} | ALL_AT_ONCE,
    "averages of other widths": {"posthoc_ema": (0.05, 0.28), "model": {"unit": {"kind": "srm"}}},
    "recomputed": {"gradient_checkpointing": True, "model": {"unit": {"kind": "dia_lstm"}}},
}
ON_A_GPU = {
    "fp32": {"deterministic": True, "model": {"unit": {"kind": "dia_lstm"}}},
    "compiled": {"deterministic": True, "compile": True, "model": {"unit": {"kind": "dia_lstm"}}},
    "BatchNorm and all at once": {"deterministic": True, "model": {"unit": {"kind": "cbam"}}} | ALL_AT_ONCE,
}


def train(stops: list[int], root: Path, settings: dict) -> tuple:
    """A run of 8 steps that is stopped at some, saved, and gone on with in a new state; and its metrics."""
    lines, state = [], None
    for stop in [*stops, 8]:
        saved = state and checkpoint.save(root, state.step, state.tensors(), state.info(), keep=1)
        state, batches = make(checkpoint_every=1, **settings)
        if saved:
            state.load(*checkpoint.read(saved))
        for record in fit(state, batches):
            if record.step % 3 == 0 or record.step == 8:
                lines.append(summary(state))
            if record.step == stop:
                break
    return state, lines


def assert_stopping_changes_nothing(root: Path, settings: dict) -> None:
    whole, expected = train([], root, settings)
    parts, lines = train([1, 5], root, settings)  # within warm-up, and between two lines of the metrics
    assert lines == expected and len(lines) == 3
    assert_same(whole, parts)


@pytest.mark.parametrize("case", CASES)
def test_stopping_twice_changes_no_bit_of_weights_averages_moments_and_metrics(case, tmp_path):
    assert_stopping_changes_nothing(tmp_path, CASES[case])


@pytest.mark.slow
def test_compiled_code_too(tmp_path):
    assert_stopping_changes_nothing(tmp_path, {"compile": True, "model": {"unit": {"kind": "dia_lstm"}}})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ON_A_GPU)
def test_on_a_gpu_too_where_it_is_asked_to_be_deterministic(case, tmp_path):
    assert_stopping_changes_nothing(tmp_path, ON_A_GPU[case])


def test_going_on_with_other_images_is_refused_until_they_are_back(tmp_path):
    folder, images = tmp_path / "run", tmp_path / "images"
    for i in range(10):
        path = images / "ab"[i < 6] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(path)
    data = ["--data.dataset", "folder", "--data.path", images, "--data.in_memory_gib", 1]
    assert harness.run(folder, *data, "--train.num_steps", 3) == 0
    again = [*data, "--resume", "--train.num_steps", 6]
    (images / "a").rename(images / "c")  # as many images in another order
    assert harness.run(folder, *again) == 2
    said = harness.said(folder)
    assert "the training data has changed" in said and "10 images now and 10 then" in said
    (images / "c").rename(images / "a")
    (extra := images / "b" / "x.png").write_bytes((images / "b" / "2.png").read_bytes())
    assert harness.run(folder, *again) == 2 and "11 images now and 10 then" in harness.said(folder)
    extra.unlink()
    assert harness.run(folder, *again) == 0 and harness.metrics(folder)[-1]["step"] == 6


@pytest.mark.parametrize("processes", [(1, 2, 1), (2, 1, 2)])
def test_going_on_with_another_number_of_processes_sees_the_same_data_and_noise(processes, gpus, tmp_path):
    whole, folder, first = tmp_path / "whole", tmp_path / "run", {"CUDA_VISIBLE_DEVICES": gpus[:1]}
    assert harness.run(whole, "--train.num_steps", 12, **first) == 0
    for i, number in enumerate(processes, 1):
        options = ["--train.num_steps", 4 * i, "--resume"]
        if number == 2:
            started = harness.several(folder, *options, gpus=gpus)
        else:
            started = [harness.start(folder, *options, **first)]
        assert set(harness.ended(*started)) == {0}, harness.said(folder)
    for ours, theirs in zip(harness.metrics(folder), harness.metrics(whole), strict=True):
        assert ours["step"] == theirs["step"] and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_three_processes_go_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    """Two gradients sum alike in any order; of three, the order that DDP chose before shows."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    options = ["--model.embed_dim", 64, "--train.batch_size", 6, "--train.num_steps", 4]
    options += ["--train.checkpoint_every", 2, "--train.learning_rate", 1e-2]
    for folder, source in ((whole, []), (rest, ["--resume", whole / "checkpoints" / "step_00000002"])):
        started = harness.several(folder, *options, *source, number=3)
        assert set(harness.ended(*started)) == {0}, harness.said(folder)
    ours, theirs = (harness.tensors(harness.newest_of(folder)) for folder in (whole, rest))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert harness.newest_of(rest).name == "step_00000004"
