"""EMA after the fact against the closed form: a mean of the trajectory, weighted by a power of time."""

from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from ema_pytorch.post_hoc_ema import KarrasEMA
from torch import nn

from uvit_dia import checkpoint, posthoc
from uvit_dia.checkpoint import BadCheckpoint
from uvit_dia.data import Batches, DataConfig, load_images
from uvit_dia.diffusion import DiffusionConfig
from uvit_dia.errors import ConfigError, UserError
from uvit_dia.posthoc import sigma_rel_to_gamma
from uvit_dia.trainer import TrainConfig, TrainState, build, fit

WIDTHS = (0.05, 0.28)
TINY = dict(sample_size=8, patch_size=4, in_channels=1, embed_dim=16, depth=2, num_heads=2)


def make(widths=WIDTHS, model=None, **train) -> tuple[TrainState, Batches]:
    config = TrainConfig(**dict(num_steps=12, batch_size=4, warmup_steps=0, posthoc_ema=widths) | train)
    state = build(config, DiffusionConfig(), TINY | (model or {}), Accelerator(cpu=True))
    data = DataConfig(flip=False)
    return state, Batches(load_images(data, "train", 8, 1), data, 4, 0, "cpu")


def weighted_mean(path: list[torch.Tensor], sigma_rel: float) -> torch.Tensor:
    """Step k = 1 .. n has the share of [k, k + 1] in t^gamma on [0, n + 1], and step 1 that of [0, 1] too."""
    power = sigma_rel_to_gamma(sigma_rel) + 1
    edges = (torch.arange(len(path) + 1, dtype=torch.float64) + 1) / (len(path) + 1)
    edges[0] = 0
    shares = (edges**power).diff()
    return (shares.view(-1, *[1] * path[0].dim()) * torch.stack(path)).sum(0)


def test_the_width_is_the_spread_of_the_weights_over_the_length():
    times = [torch.tensor(float(t), dtype=torch.float64) for t in range(1, 20_001)]
    for width in (0.05, 0.1, 0.28):
        mean = weighted_mean(times, width)
        second = weighted_mean([t.square() for t in times], width)
        assert ((second - mean**2).sqrt() / 20_000).item() == pytest.approx(width, rel=1e-3)


def test_training_keeps_the_weighted_means_of_its_trajectory():
    state, batches = make()
    path = []
    for _ in fit(state, batches):
        path.append(state.model.mid_block.mlp.fc1.weight.detach().double().clone())
    for width, ema in zip(WIDTHS, state.posthoc, strict=True):
        kept = ema.ema_model.mid_block.mlp.fc1.weight.double()
        assert torch.allclose(kept, weighted_mean(path, width), atol=1e-6)
        assert not torch.allclose(kept, path[-1], atol=1e-5)


def test_going_on_restores_the_averages_bit_for_bit(tmp_path):
    whole, batches = make(model={"unit": {"kind": "srm"}})
    list(fit(whole, batches))
    first, batches = make(model={"unit": {"kind": "srm"}})
    list(islice(fit(first, batches), 5))
    path = checkpoint.save(tmp_path, 5, first.tensors(), first.info(), keep=1)
    second, batches = make(model={"unit": {"kind": "srm"}})
    second.load(*checkpoint.read(path))
    list(fit(second, batches))
    assert any("running" in name for name in whole.posthoc[0].ema_model.state_dict())
    for a, b in zip(whole.posthoc, second.posthoc, strict=True):
        theirs = b.ema_model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in a.ema_model.state_dict().items())
    for widths in (None, (0.1, 0.28)):
        with pytest.raises(BadCheckpoint, match=r"set train.posthoc_ema to \[0.05, 0.28\]"):
            make(widths, model={"unit": {"kind": "srm"}})[0].load(*checkpoint.read(path))


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Snapshots of a slow random walk of 2,000 steps, and the walk."""
    root = tmp_path_factory.mktemp("posthoc")
    model = nn.Linear(4, 3)
    kept, path = [KarrasEMA(model, width, update_every=1) for width in WIDTHS], []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 2001):
        with torch.no_grad():
            model.weight += 0.05 * torch.randn(3, 4, generator=generator)
        path.append(model.weight.detach().double().clone())
        for ema in kept:
            ema.update()
        if step % 100 == 0:
            checkpoint.save(root, step, posthoc.snapshot(kept), {"posthoc_ema": WIDTHS}, keep=1000)
    return root, path


@pytest.mark.parametrize("step", [1000, 2000])
def test_snapshots_of_two_widths_give_those_between(snapshots, step):
    root, path = snapshots
    found = posthoc.synthesize(root, step)
    assert list(found) == [0.05, 0.1075, 0.165, 0.2225, 0.28]
    for width, average in found.items():
        expected = weighted_mean(path[:step], width)
        error = (average["weight"] - expected).square().mean().sqrt()
        other = (weighted_mean(path[:step], 0.1) - weighted_mean(path[:step], 0.14)).square().mean().sqrt()
        assert error < 0.1 * other, (width, error, other)
    assert list(posthoc.synthesize(root, step, [0.1])) == [0.1]


def test_what_the_snapshots_do_not_hold_is_refused(snapshots, tmp_path):
    with pytest.raises(UserError, match=r"0\.3 is not between 0\.05 and 0\.28"):
        posthoc.synthesize(snapshots[0], 2000, [0.1, 0.3])
    for root, step in ((tmp_path, 10), (snapshots[0], 2050)):
        with pytest.raises(UserError, match=f"no snapshot of step {step}; train with --train.posthoc_ema"):
            posthoc.synthesize(root, step)
    for widths in ((0.1, 0.1), (0.0, 0.1), (0.1, 0.3)):
        with pytest.raises(ConfigError, match=r"train\.posthoc_ema"):
            TrainConfig(posthoc_ema=widths)
