"""The execution contract: exact resume, keyed numbers, masked steps; against closed forms and plain loops."""

import math
from itertools import islice
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from run_config import check_labels, make_accelerator

from uvit_dia import checkpoint
from uvit_dia.checkpoint import BadCheckpoint
from uvit_dia.data import Batches, DataConfig, load_images
from uvit_dia.diffusion import DiffusionConfig
from uvit_dia.errors import ConfigError
from uvit_dia.trainer import (
    SpikeCounter,
    TrainConfig,
    TrainingDiverged,
    TrainState,
    build,
    draw,
    fit,
    learning_rate,
    summary,
)

TINY = dict(sample_size=8, patch_size=4, in_channels=1, embed_dim=16, depth=2, num_heads=2)
SHORT = dict(num_steps=8, batch_size=8, warmup_steps=2, learning_rate=1e-2, ema_decay=0.9, log_every=3)


def make(model=None, diffusion=None, data=None, accelerator=None, **train) -> tuple[TrainState, Batches]:
    config = TrainConfig(**SHORT | train)
    accelerator = accelerator or make_accelerator(config.precision)
    state = build(config, DiffusionConfig(**diffusion or {}), TINY | (model or {}), accelerator)
    data = DataConfig(**data or {})
    images = load_images(data, "train", 8, 1)
    return state, Batches(images, data, config.batch_size, config.seed, accelerator.device)


def everything(state: TrainState) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = {f"{file}.{k}": v.clone() for file, named in state.tensors().items() for k, v in named.items()}
    return tensors, state.info()


def assert_same(a: TrainState, b: TrainState) -> None:
    (ours, our_info), (theirs, their_info) = everything(a), everything(b)
    assert ours.keys() == theirs.keys() and our_info == their_info
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_accumulation_steps": 2},
        {"precision": "bf16"},
        {"model": {"unit": {"kind": "dia_lstm"}}},
        {
            "model": {"num_classes": 11, "null_label": 10, "unit": {"kind": "dia_lstm_light"}},
            "label_drop": 0.3,
        },
        {"data": {"in_memory_gib": 0.0, "num_workers": 1}},
        {"decay": "cosine", "max_grad_norm": 0.1, "diffusion": {"min_snr_gamma": 5.0}},
    ],
    ids=["plain", "accumulation", "bf16", "dia", "conditional", "streamed", "clipped"],
)
def test_k_steps_a_checkpoint_and_the_rest_equal_one_go_bit_for_bit(settings, tmp_path):
    whole, batches = make(**settings)
    records = [float(r.loss) for r in fit(whole, batches)]

    first, batches = make(**settings)
    losses = [float(r.loss) for r in islice(fit(first, batches), 4)]
    first.interval, first.unread = [[float(a), float(b)] for a, b in first.interval + first.unread], []
    folder = checkpoint.save(tmp_path, first.step, first.tensors(), first.info(), keep=1)

    second, batches = make(**settings)
    second.load(*checkpoint.read(folder))
    losses += [float(r.loss) for r in fit(second, batches)]
    assert losses == records
    assert_same(whole, second)


def test_accumulation_changes_nothing_but_rounding():
    one, batches = make(num_accumulation_steps=1)
    four, more = make(num_accumulation_steps=4)
    for a, b in zip(fit(one, batches), fit(four, more), strict=True):
        assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-4)
        assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), rel=1e-3)


def test_a_step_equals_a_plain_loop():
    state, batches = make(weight_decay=0.1, warmup_steps=0, num_steps=1)
    plain, _ = make(weight_decay=0.1, warmup_steps=0)
    batch = next(batches.from_step(0))
    noise, t, _ = draw(plain, batch)
    a = plain.scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
    loss = (plain.model(a.sqrt() * batch.images + (1 - a).sqrt() * noise, t).sample - noise).square().mean()
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, betas=(0.99, 0.999), weight_decay=0.1)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.model.parameters()))
    optimizer.step()
    (record,) = fit(state, batches)
    assert float(record.loss) == pytest.approx(loss.item(), rel=1e-5)
    assert float(record.grad_norm) == pytest.approx(norm, rel=1e-4)
    for ours, theirs in zip(state.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_whole_step_as_one_cuda_graph_follows_the_plain_one():
    settings = dict(num_steps=16, learning_rate=1e-3, model={"unit": {"kind": "dia_lstm"}})
    runs = [make(compile=graphed, **settings) for graphed in (False, True)]
    with patch.object(
        torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay
    ) as replay:
        plain, graphed = ([float(record.loss) for record in fit(*run)] for run in runs)
    assert runs[0][0].stream is None and replay.call_count == 5
    assert graphed == pytest.approx(plain, rel=1e-3)
    assert int(runs[1][0].ema.step) == 16 and int(runs[1][0].taken) == 16


def test_the_average_is_updated_every_step_with_a_constant_decay():
    state, batches = make(num_steps=5)
    expected = None
    for _ in fit(state, batches):
        now = state.model.decoder_pred.weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    assert torch.allclose(state.ema.ema_model.decoder_pred.weight, expected, atol=1e-6)


def test_learning_rate_warms_up_then_holds_or_falls_to_zero():
    flat = TrainConfig(learning_rate=1.0, warmup_steps=10, num_steps=110)
    fall = TrainConfig(learning_rate=1.0, warmup_steps=10, num_steps=110, decay="cosine")
    assert [learning_rate(flat, s) for s in (0, 5, 10, 100)] == [0, 0.5, 1, 1]
    assert learning_rate(fall, 60) == pytest.approx(0.5) and learning_rate(fall, 110) == pytest.approx(0)


def test_clipping_scales_the_gradient_but_reports_its_norm():
    free, batches = make(num_steps=1, warmup_steps=0)
    bound, more = make(num_steps=1, warmup_steps=0, max_grad_norm=1e-3)
    (a,), (b,) = fit(free, batches), fit(bound, more)
    assert torch.equal(a.grad_norm, b.grad_norm) and float(a.grad_norm) > 1e-3
    moments = [state.tensors()["optimizer"]["norm.weight/exp_avg"] for state in (free, bound)]
    assert torch.allclose(moments[1], moments[0] * 1e-3 / a.grad_norm, rtol=1e-3)


def test_noise_timesteps_and_label_drop_depend_on_the_step_and_not_on_the_process():
    state, batches = make(model={"num_classes": 11, "null_label": 10}, label_drop=0.5, batch_size=400)
    batch = next(batches.from_step(5))
    noise, t, labels = draw(state, batch)
    again = draw(state, batch)
    assert torch.equal(noise, again[0]) and torch.equal(t, again[1]) and torch.equal(labels, again[2])
    assert not torch.equal(noise, draw(state, next(batches.from_step(6)))[0])
    assert (labels == 10).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(labels[labels != 10], batch.labels[labels != 10])
    assert t.min() >= 0 and t.max() <= 999 and t.float().mean().item() == pytest.approx(500, abs=60)


def poison(state: TrainState, batches: Batches, what: str) -> None:
    """From step 4 (the fifth) on, make one thing not finite."""
    if what == "the images":
        good = batches.from_step
        bad = lambda step: (b._replace(images=b.images * math.nan) if b.step == 4 else b for b in good(step))  # noqa: E731
        batches.from_step = bad
    elif what == "the output of mid_block.mlp.fc1":
        layer = state.model.mid_block.mlp.fc1
        layer.register_forward_hook(lambda m, args, out: out * math.inf if state.step >= 4 else out)
    else:
        weight = state.model.in_blocks[0].mlp.fc2.weight
        weight.register_hook(lambda grad: grad * math.nan if state.step >= 4 else grad)


@pytest.mark.parametrize(
    "what", ["the images", "the output of mid_block.mlp.fc1", "the gradient of in_blocks.0.mlp.fc2.weight"]
)
def test_a_number_that_is_not_finite_is_never_stepped_on_and_is_explained(what):
    clean, batches = make(num_steps=4)
    list(fit(clean, batches))
    state, batches = make(log_every=8)
    poison(state, batches, what)
    with pytest.raises(TrainingDiverged, match=f"step 5: not finite in {what}"):
        list(fit(state, batches))
    assert state.step == 8  # the host read it only then; the mask held the weights
    for name, value in clean.tensors()["model"].items():
        assert torch.equal(value, state.tensors()["model"][name]), name
    for name, value in clean.tensors()["optimizer"].items():
        assert torch.equal(value, state.tensors()["optimizer"][name]), name


def test_a_replay_takes_no_more_memory_than_the_step():
    state, batches = make(num_accumulation_steps=4)
    poison(state, batches, "the images")
    sizes = []
    state.model.register_forward_hook(lambda model, arguments, output: sizes.append(len(output.sample)))
    with pytest.raises(TrainingDiverged, match="the images"):
        list(fit(state, batches))
    assert set(sizes) == {2} and len(sizes) == 4 * (6 + 1)  # read at step 6, and one replayed


def test_a_weight_that_is_not_finite_is_named():
    state, batches = make()
    state.model.in_blocks[0].mlp.fc1.weight.data[0, 0] = math.nan
    with pytest.raises(
        TrainingDiverged, match=r"step 1: not finite in the weight in_blocks\.0\.mlp\.fc1\.weight"
    ):
        list(fit(state, batches))


def test_a_request_to_stop_ends_after_the_step():
    state, batches = make()
    steps = []
    for record in fit(state, batches):
        steps.append(record.step)
        state.stop_requested = record.step == 3
    assert steps == [1, 2, 3, 4]


def test_metrics_are_means_over_the_interval():
    state, batches = make(num_steps=3)
    losses = [float(r.loss) for r in fit(state, batches)]
    metrics = summary(state)
    assert metrics["loss"] == pytest.approx(sum(losses) / 3) and metrics["images"] == 24
    assert metrics["step"] == 3 and metrics["lr"] == pytest.approx(1e-2)


def test_spikes_are_the_steps_that_stand_out_and_no_others():
    counter = SpikeCounter()
    torch.manual_seed(0)
    for i, noise in enumerate(torch.randn(500).tolist()):
        counter.add(1 + 0.01 * noise + (5 if i in (100, 300, 301) else 0))
    assert counter.count == 3


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    a, b, c = (make(seed=seed)[0].model.pos_embed for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_another_models_checkpoint_is_refused_with_the_setting_that_differs(tmp_path):
    state, _ = make()
    folder = checkpoint.save(tmp_path, 0, state.tensors(), state.info(), keep=1)
    other, _ = make(model={"depth": 4})
    with pytest.raises(BadCheckpoint, match=r"model\.depth is 2 there and 4 here"):
        other.load(*checkpoint.read(folder))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_accumulation_steps": 3}, "train.batch_size"),
        ({"label_drop": 0.1}, "train.label_drop"),
        ({"batch_size": 0}, "train.batch_size"),
        ({"ema_decay": 1.0}, "train.ema_decay"),
        ({"learning_rate": 0.0}, "train.learning_rate"),
        ({"max_grad_norm": 0.0}, "train.max_grad_norm"),
        ({"num_steps": -1}, "train.num_steps"),
        ({"decay": "linear"}, "train.decay: 'linear' will not do; expected one of none, cosine"),
        ({"diffusion": {"prediction_type": "x0"}}, "diffusion.prediction_type"),
    ],
)
def test_settings_that_cannot_be_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        make(**settings)


def test_labels_and_classes_must_go_together():
    check_labels(10, None, None)
    check_labels(10, 11, 10)
    for labels, classes, null in ((None, 10, None), (10, 9, None), (10, 10, 9)):
        with pytest.raises(ConfigError, match=r"model\.num_classes"):
            check_labels(labels, classes, null)


def test_an_unknown_tracker_is_told_with_those_there_are():
    with pytest.raises(ConfigError, match=r"train\.trackers.*tensorboard"):
        make_accelerator("fp32", ["tensorbord"])


def half(scale: float) -> Accelerator:
    """fp16 with loss scaling, which accelerate has for a GPU alone, put together on the CPU."""
    accelerator = make_accelerator("fp32")
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_fp16_with_loss_scaling_follows_fp32():
    full, batches = make(max_grad_norm=1.0)
    losses = [float(r.loss) for r in fit(full, batches)]
    state, batches = make(max_grad_norm=1.0, accelerator=half(2.0**12))
    assert losses == pytest.approx([float(r.loss) for r in fit(state, batches)], rel=2e-2)
    assert state.accelerator.scaler.get_scale() == 2.0**12 == state.info()["scaler"]["scale"]


def test_fp16_overflow_skips_the_step_and_lowers_the_scale_but_is_no_divergence():
    state, batches = make(accelerator=half(2.0**40), num_steps=3)
    before = state.model.pos_embed.detach().clone()
    list(fit(state, batches))
    assert torch.equal(before, state.model.pos_embed) and state.accelerator.scaler.get_scale() == 2.0**37


def test_fp16_loss_that_is_not_finite_is_never_stepped_on():
    state, batches = make(accelerator=half(2.0**12))
    poison(state, batches, "the images")
    with pytest.raises(TrainingDiverged, match="step 5: not finite in the images"):
        list(fit(state, batches))


def test_fp16_scale_that_collapses_is_a_divergence():
    state, batches = make(accelerator=half(1e-4))
    with pytest.raises(TrainingDiverged, match="loss scale fell"):
        list(fit(state, batches))
