"""Properties that hold for arbitrary settings: configs, the data's order, patches, noise, weights, rates."""

import string
from dataclasses import fields
from inspect import signature
from itertools import islice
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import run_config
import torch
import yaml
from diffusers.training_utils import compute_snr
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from uvit_dia.attention_units import UnitConfig
from uvit_dia.data import Batches, DataConfig, ImageSet, decode, order
from uvit_dia.diffusion import DiffusionConfig, loss_weight, make_scheduler, target
from uvit_dia.errors import ConfigError
from uvit_dia.random_keys import Stream, numpy_generator, torch_generator
from uvit_dia.trainer import TrainConfig, learning_rate
from uvit_dia.uvit import UViT

# A slow machine is no failure; the same examples each time, so that a change is what breaks a test.
settings.register_profile(
    "exact", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("exact")
SEEDS = st.integers(0, 2**63)
DEFAULTS = {name: x.default for name, x in signature(UViT.__init__).parameters.items() if name != "self"}


# Configs.


def values(kind: Any) -> st.SearchStrategy:
    """Values of a setting's type, such as YAML and the command line might spoil: odd text, tiny floats."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 10**12)
    if kind is float:
        return st.floats(0, 1e30, exclude_max=True, allow_subnormal=False)
    if kind is str:
        words = ["null", "true", "on", "1e3", "0x1f", "~", "1_000", "2026-01-01", "a: b", "[", "# x", "é\n"]
        return st.text(string.printable, min_size=1, max_size=8) | st.sampled_from(words)
    if kind is UnitConfig:
        return st.sampled_from([{"kind": "dia_lstm", "gate_scale": 4.0}, {"kind": "se"}]).map(UnitConfig.of)
    if get_origin(kind) is tuple:
        return st.tuples(*map(values, get_args(kind)))
    if get_origin(kind) is list:
        return st.lists(values(*get_args(kind)), max_size=3)
    return st.one_of(*map(values, get_args(kind))).filter(lambda x: not (isinstance(x, str) and is_null(x)))


def is_null(text: str) -> bool:
    """A word, such as null or a comment, that stands for null where a setting may be that."""
    try:
        return yaml.safe_load(text) is None
    except yaml.YAMLError:
        return False


@st.composite
def sections(draw: st.DrawFn, kind: type) -> Any:
    """A section's dataclass with some fields drawn; values that do not hold together are left out."""
    hints, given_fields = get_type_hints(kind), {}
    for field in draw(
        st.lists(st.sampled_from(fields(kind)), unique_by=lambda field: field.name, max_size=4)
    ):
        given_fields[field.name] = draw(values(hints[field.name]))
    try:
        return kind(**given_fields)
    except ConfigError:
        return kind()


@st.composite
def configs(draw: st.DrawFn) -> run_config.Config:
    hints = {name: hint for name, hint in get_type_hints(UViT.__init__).items() if name != "return"}
    chosen = draw(st.lists(st.sampled_from(list(hints)), unique=True, max_size=4))
    model = {name: draw(values(hints[name])) for name in chosen}
    if model.get("unit"):
        model["unit"] = model["unit"].as_dict()
    parts = {name: draw(sections(kind)) for name, kind in run_config.SECTIONS.items()}
    return run_config.Config(output_dir=draw(values(str)), model=DEFAULTS | model, **parts)


@given(configs())
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])  # it takes minutes to shrink
def test_a_config_that_is_saved_reads_back_the_same(tmp_path_factory, made):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    run_config.save(made, path, {"torch": "2"})
    assert run_config.load(path) == made


@pytest.mark.parametrize("name", ["1e3", "0x1f", "null", "2026-01-01"])
def test_a_folder_whose_name_looks_like_something_else_keeps_it(name, tmp_path):
    parser = run_config.run_parser("")
    made = run_config.to_config(parser, parser.parse_args(["--output_dir", name]))
    run_config.save(made, tmp_path / "config.yaml", {})
    assert made.output_dir == name and run_config.load(tmp_path / "config.yaml").output_dir == name


# The data's order.


@given(SEEDS, st.integers(1, 50), st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(seed, n, epoch):
    assert sorted(order(seed, n, np.arange(n) + epoch * n)) == list(range(n))


@given(SEEDS, st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 10**4))
def test_any_cuts_of_the_stream_into_batches_read_one_order(seed, n, sizes, start):
    whole = order(seed, n, start + np.arange(sum(sizes)))
    ends = np.cumsum(sizes)
    parts = [
        order(seed, n, start + np.arange(end - size, end)) for end, size in zip(ends, sizes, strict=True)
    ]
    assert np.array_equal(whole, np.concatenate(parts))


@given(SEEDS, st.integers(1, 20), st.integers(1, 6), st.integers(1, 4), st.integers(0, 50))
@settings(max_examples=40)
def test_any_number_of_processes_and_any_resume_point_share_one_stream(seed, n, share, world, step):
    rows = np.random.default_rng(0).integers(0, 256, (n, 2, 2), np.uint8)
    images = ImageSet("noise", rows, np.arange(n), n, (1, 2, 2), 0)
    size = share * world
    alone = Batches(images, DataConfig(), size, seed, "cpu")
    *_, expected = islice(alone.from_step(max(0, step - 2)), min(step, 2) + 1)
    parts = [
        next(Batches(images, DataConfig(), size, seed, "cpu", r, world).from_step(step)) for r in range(world)
    ]
    assert expected.step == step and all(part.step == step for part in parts)
    assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)


@given(st.tuples(SEEDS, st.sampled_from(Stream), SEEDS), st.tuples(SEEDS, st.sampled_from(Stream), SEEDS))
def test_other_keys_give_other_numbers_and_the_same_key_the_same(a, b):
    numbers = [
        (tuple(numpy_generator(*key).integers(2**63, size=2)), torch_generator(*key).initial_seed())
        for key in (a, a, b)
    ]
    assert numbers[0] == numbers[1] and ((numbers[0] == numbers[2]) == (a == b))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 3]))
def test_any_shape_becomes_a_square_within_the_range_of_its_pixels(height, width, size, channels):
    pixels = np.full((height, width), 200, np.uint8)
    square = decode(pixels, size, channels)
    assert square.shape == (size, size) if channels == 1 else (size, size, 3)
    assert square.dtype == np.uint8 and (square == 200).all()


# Patches.


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]), st.booleans(), st.integers(1, 3))
@settings(max_examples=30)
def test_patches_go_back_to_where_they_came_from(patch_size, patches, channels, labeled, batch):
    size, dim = patch_size * patches, patch_size**2 * channels
    model = UViT(sample_size=size, patch_size=patch_size, in_channels=channels, embed_dim=2 * dim, depth=2,
                 num_heads=1, num_classes=3 if labeled else None).eval()  # fmt: skip
    with torch.no_grad():  # an embedding and a prediction that copy each pixel, and no final convolution
        at = torch.arange(dim)
        p, q, c = at // (patch_size * channels), at // channels % patch_size, at % channels
        model.patch_embed.proj.weight.zero_()[at, c, p, q] = 1
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
        model.decoder_pred.weight.zero_()[at, at] = 1
    model.norm = model.final_layer = torch.nn.Identity()
    x = torch.randn(batch, channels, size, size)
    tokens = model.embed(x, 7, torch.zeros(batch, dtype=torch.long) if labeled else None)
    assert tokens.shape == (batch, patches**2 + 1 + labeled, 2 * dim)
    assert torch.equal(model.to_pixels(tokens), x)


# Noise, targets and weights.

DIFFUSIONS = st.builds(
    DiffusionConfig,
    num_train_timesteps=st.integers(10, 2000),
    beta_schedule=st.sampled_from(["linear", "cosine", "sigmoid"]),
    prediction_type=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    min_snr_gamma=st.floats(0.1, 100),
)


@given(DIFFUSIONS)
def test_noise_only_grows_and_never_reaches_nothing_or_all(diffusion):
    scheduler = make_scheduler(diffusion)
    alphas = scheduler.alphas_cumprod
    assert len(alphas) == diffusion.num_train_timesteps
    assert (alphas > 0).all() and (alphas < 1).all() and (alphas.diff() < 0).all()
    ratio = compute_snr(scheduler, torch.arange(len(alphas)))
    assert ratio.isfinite().all() and (ratio > 0).all() and (ratio.diff() < 0).all()


@given(DIFFUSIONS)
def test_min_snr_weights_are_positive_bounded_and_monotone(diffusion):
    scheduler, gamma = make_scheduler(diffusion), diffusion.min_snr_gamma
    weight = loss_weight(scheduler, torch.arange(diffusion.num_train_timesteps), gamma)
    bound, grows = {
        "epsilon": (1, True),
        "sample": (gamma, False),
        "v_prediction": (gamma / (gamma + 1), None),
    }[diffusion.prediction_type]
    assert (weight > 0).all() and (weight <= bound * (1 + 1e-5)).all()
    if grows is not None:  # with t; that of v rises and falls
        assert ((weight.diff() if grows else -weight.diff()) >= -1e-6 * bound).all()


@given(DIFFUSIONS, SEEDS)
def test_every_target_with_x_t_gives_back_the_image(diffusion, seed):
    scheduler = make_scheduler(diffusion)
    x0, eps = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
    t = torch.linspace(0, diffusion.num_train_timesteps // 2, 4).long()
    a = scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    found = target(scheduler, x0, eps, t)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    solved = {
        "epsilon": (x_t - (1 - a).sqrt() * found) / a.sqrt(),
        "sample": found,
        "v_prediction": a.sqrt() * x_t - (1 - a).sqrt() * found,
    }
    assert torch.allclose(solved[diffusion.prediction_type], x0, atol=1e-4)


# The learning rate.


@given(
    st.integers(1, 10**6), st.integers(0, 10**5), st.floats(1e-8, 10), st.sampled_from(["none", "cosine"]),
    st.integers(0, 2 * 10**6),
)  # fmt: skip
def test_the_learning_rate_rises_to_its_peak_and_never_leaves_its_bounds(
    num_steps, warmup, peak, decay, step
):
    assume(warmup < num_steps)
    train = TrainConfig(num_steps=num_steps, warmup_steps=warmup, learning_rate=peak, decay=decay)
    now, after = learning_rate(train, step), learning_rate(train, step + 1)
    assert 0 <= now <= peak and 0 <= after <= peak
    assert now <= after if step < warmup else now >= after
    assert learning_rate(train, warmup) == pytest.approx(peak)
    if decay == "cosine":
        assert learning_rate(train, num_steps) == pytest.approx(0, abs=1e-12)
