"""Numbers that are not finite, wherever they arise: no step is taken with them, nothing saved is spoiled."""

import json
import math

import harness
import pytest
import torch
from test_trainer import half, make, poison

from uvit_dia.trainer import TrainingDiverged, fit, summary


def poison_part(state, batches, what: str) -> None:
    """From step 4 (the fifth) on, something that `poison` does not do."""
    if what == "one pixel of the last image":
        good = batches.from_step

        def bad(step: int):
            for batch in good(step):
                batch.images[-1, 0, 0, 0] = -math.inf if batch.step == 4 else batch.images[-1, 0, 0, 0]
                yield batch

        batches.from_step = bad
    elif what == "the loss":

        def spoil(module, arguments, output):
            output.sample[:] = output.sample * (math.nan if state.step >= 4 else 1)

        state.model.register_forward_hook(spoil)
    else:
        poison(state, batches, what)


PIXEL, LAYER, GRADIENT = "one pixel of the last image", "the output of mid_block.mlp.fc1", "the gradient of"


@pytest.mark.parametrize(
    ("what", "named", "settings"),
    [
        (PIXEL, "the images", {"num_accumulation_steps": 4}),
        (PIXEL, "the images", {"precision": "bf16", "model": {"unit": {"kind": "cbam"}}}),
        ("the images", "the images", {"max_grad_norm": 0.1, "gradient_checkpointing": True}),
        ("the loss", GRADIENT, {"num_accumulation_steps": 2, "precision": "bf16"}),
        (LAYER, LAYER, {"num_accumulation_steps": 2}),
        (f"{GRADIENT} in_blocks.0.mlp.fc2.weight", GRADIENT, {"max_grad_norm": 1.0}),
        pytest.param(
            *(PIXEL, "the images", {"precision": "bf16", "compile": True, "deterministic": True}),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            id="one CUDA graph",
        ),
    ],
)
def test_no_step_is_taken_whatever_else_is_on(what, named, settings):
    clean, batches = make(num_steps=4, **settings)
    list(fit(clean, batches))
    state, batches = make(log_every=8, **settings)
    poison_part(state, batches, what)
    with pytest.raises(TrainingDiverged, match=f"step 5: not finite in {named}"):
        list(fit(state, batches))
    for name, value in clean.model.named_parameters():
        assert value.equal(dict(state.model.named_parameters())[name]), name
    for name, value in clean.tensors()["optimizer"].items():
        assert value.equal(state.tensors()["optimizer"][name]), name
    assert all(parameter.isfinite().all() for parameter in state.ema.ema_model.parameters())


def test_a_weight_that_goes_bad_on_the_way_is_named():
    state, batches = make(log_every=8)
    with pytest.raises(
        TrainingDiverged, match=r"step 5: not finite in the weight mid_block\.attn\.qkv\.weight"
    ):
        for record in fit(state, batches):
            if record.step == 4:
                state.model.mid_block.attn.qkv.weight.data[3, 3] = math.inf


def test_fp16_steps_that_overflow_leave_the_metrics_plain_json():
    state, batches = make(accelerator=half(2.0**40), num_steps=3)
    list(fit(state, batches))
    json.dumps(summary(state), allow_nan=False)


def test_a_run_that_diverges_ends_with_3_and_goes_on_from_its_good_checkpoint_as_if_it_had_not(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    often = ["--train.checkpoint_every", 4]
    assert harness.run(whole, "--train.num_steps", 12, *often) == 0
    assert harness.run(folder, "--train.num_steps", 4, *often) == 0
    harness.said(folder)
    too_fast = ["--train.learning_rate", 1e25, "--train.log_every", 4]
    assert harness.run(folder, "--resume", "--train.num_steps", 12, *often, *too_fast) == 3
    (line,) = [line for line in harness.said(folder).splitlines() if line.startswith("error: ")]
    assert "not finite in" in line and "the last checkpoint is good" in line
    assert harness.newest_of(folder).name == "step_00000004"
    assert harness.run(folder, "--resume", "--train.num_steps", 12, *often) == 0
    harness.assert_same(folder, whole)
