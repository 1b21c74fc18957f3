"""Statistics against closed forms and planted answers, gradients against autograd, a tiny run end to end."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args
from unittest import mock

import analysis as an
import exit_codes
import pytest
import run_config
import torch
from accelerate import Accelerator
from analyze import brief_training, verdict
from PIL import Image
from run_folder import RunFolder

from uvit_dia import checkpoint, trainer
from uvit_dia.data import Batches, load_images
from uvit_dia.diffusion import denoising_loss
from uvit_dia.errors import UserError
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.uvit import UViT

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")
TINY = ["--model.embed_dim=16", "--model.num_heads=2", "--train.batch_size=8", "--train.num_steps=3"]
SMALL = {"num_images": 4, "timesteps": [100, 900]}


def train(root: Path, *changes: str) -> Path:
    """A run's folder as scripts/train.py leaves it, after three steps of a tiny model."""
    parser = run_config.run_parser("")
    parsed = parser.parse_args(["--config", DIGITS, "--output_dir", str(root), *TINY, *changes])
    settings = run_config.to_config(parser, parsed)
    state = trainer.build(settings.train, settings.diffusion, settings.model, Accelerator(cpu=True))
    images = load_images(settings.data, "train", settings.model["sample_size"], 1)
    list(trainer.fit(state, Batches(images, settings.data, 8, 0, "cpu")))
    root.mkdir(parents=True)
    run_config.save(settings, RunFolder(root).config, {})
    pipeline = UViTPipeline(state.ema.ema_model, state.scheduler)
    checkpoint.export(pipeline, RunFolder(root).pipeline, {"step": state.step, "seed": 0})
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def subject(run) -> an.Subject:
    return an.Subject(run, an.AnalyzeConfig(**SMALL, num_steps=4), Accelerator(cpu=True))


SCRIPT = runpy.run_path(str(ROOT / "scripts" / "analyze.py"))


def analyze(*arguments: str) -> int:
    """The exit code of scripts/analyze.py, in this process."""
    with mock.patch.object(sys, "argv", ["analyze.py", *arguments]):
        return exit_codes.run(SCRIPT["main"])


def too_fast(subject: an.Subject) -> an.Subject:
    """The same run with a learning rate that breaks it."""
    subject.run = replace(subject.run, train=replace(subject.run.train, learning_rate=1e38))
    return subject


def test_correlation_is_1_of_equal_gates_minus_1_of_mirrored_and_0_of_independent_and_flat_ones():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 10_000).double()
    found = an.pearson(torch.stack([a, 2 * a + 5, -a, b, torch.full_like(a, 0.3)]))  # (5, 5, 3)
    assert torch.allclose(found[0, 1], torch.ones(3).double())
    assert torch.allclose(found[0, 2], -torch.ones(3).double())
    assert found[0, 3].abs().max() < 0.05
    assert found[4].abs().max() < 1e-6
    assert found[0, 3, 1].item() == pytest.approx(torch.corrcoef(torch.stack([a[1], b[1]]))[0, 1].item())


@pytest.fixture
def plant(monkeypatch):
    """Have every model give these gates, (L, T, n, D)."""

    def put(gates: torch.Tensor) -> None:
        monkeypatch.setattr(an, "read_gates", lambda model, subject: (list("abcd")[: len(gates)], gates))

    return put


def test_a_pattern_common_to_all_images_correlates_blocks_only_until_it_is_centred(subject, plant):
    torch.manual_seed(0)
    pattern = torch.randn(4, 1, 2_000).double()  # another one each timestep, the same for all blocks
    plant(pattern + 0.1 * torch.randn(3, 4, 50, 2_000).double())
    found = an.correlation(subject)
    assert found["trained, gates: 5%"].min() > 0.95
    assert found["untrained, centred: 95%"][0, 1].abs() < 0.1


def test_importance_finds_the_block_that_a_gate_was_made_from(subject, plant):
    torch.manual_seed(0)
    gates = torch.randn(4, 2, 150, 6).double()
    gates[3] = gates[1].roll(1, dims=-1) + 0.1 * gates[3]
    plant(gates)
    numbers = an.importance(subject)
    found, r2 = numbers["importance"], numbers["out-of-bag R2"]
    assert found[3, 1] > 0.8
    assert found[2, :2].max() < 0.7  # made from neither
    assert r2[3] > 0.5 > 0.1 > r2[2]
    assert torch.allclose(found[1:].nansum(-1), torch.ones(3))
    assert found.triu().isnan().logical_or(torch.ones(4, 4).tril(-1).bool()).all()


def test_importance_is_the_same_for_the_same_seed(subject, plant):
    plant(torch.randn(3, 1, 40, 50).double())
    first, second = (an.importance(subject)["importance"] for _ in range(2))
    assert torch.equal(first.nan_to_num(), second.nan_to_num())


def test_saturation_counts_the_ends_of_the_range_of_each_activation(subject, plant):
    values = torch.tensor([0.01, 0.04, 0.5, 0.96]).double()
    gates = values.expand(3, 2, 5, 4)

    def statistics(gates: torch.Tensor, activation: str) -> dict:
        plant(gates)
        unit = {"kind": "dia_lstm", "activation": activation}
        subject.run = replace(subject.run, model=subject.run.model | {"unit": unit})
        return an.gates(subject)

    found = statistics(gates, "sigmoid")
    assert found["saturated share"].tolist() == [[0.75] * 2] * 3
    assert found["mean"][0, 0].item() == pytest.approx(values.mean().item())
    assert found["spread over channels"][0, 0].item() == pytest.approx(values.std().item())
    assert found["spread over images"].max() < 1e-12
    assert statistics(gates, "relu")["saturated share"].tolist() == [[0.5] * 2] * 3
    tanh = statistics(2 * gates - 1, "tanh")
    assert torch.equal(tanh["saturated share"], found["saturated share"])


@pytest.mark.parametrize("sharing", ["all", "stage", "none"])
def test_gates_stand_in_the_order_of_the_blocks_under_their_names(subject, sharing):
    unit = {"kind": "constant", "sharing": sharing, "blocks": [0, 2, 3]}
    model = UViT(**subject.run.model | {"unit": unit}).eval()
    calls = iter(range(100))
    for module in model.shared_unit.units:
        module.register_forward_hook(lambda _, args, out: (out[0] * 0 + next(calls), out[1]))
    names, gates = an.read_gates(model, subject)
    assert names == ["in 0", "mid", "out 0"]
    assert gates.shape == (3, 2, 4, 16)  # (L, T, n, D)
    assert gates[:, :, 0, 0].tolist() == [[0, 3], [1, 4], [2, 5]]  # one timestep's forward after the other's


def test_a_spatial_gate_is_averaged_over_tokens(subject):
    model = UViT(**subject.run.model | {"unit": {"kind": "cbam"}}).eval()
    seen = []
    model.shared_unit.units[0].register_forward_hook(lambda _, args, out: seen.append(out[0]))
    _, gates = an.read_gates(model, subject)
    assert seen[0].shape[1] == 16  # patches
    assert torch.allclose(gates[0, 0], seen[0].double().mean(1))


def test_gradients_equal_plain_autograd_on_what_is_added_to_a_block(subject):
    model, deltas = subject.fresh(), {}

    def nudge(name):
        def hook(block, args, output):
            deltas[name] = torch.zeros_like(output[0], requires_grad=True)
            return output[0] + deltas[name], output[1]

        return hook

    sizes = an.gradient_sizes(model, subject)
    for name, block in an.blocks_of(model).items():
        block.register_forward_hook(nudge(name))
    expected = {stage: [] for stage in ("in", "mid", "out")}
    for step in subject.options.timesteps:
        for i in range(len(subject.x0)):  # image by image
            x0, noise, t = subject.x0[[i]], subject.noise[[i]], torch.tensor([step])
            scheduler = subject.pipeline.scheduler
            label = None if subject.labels is None else subject.labels[[i]]
            prediction = model(scheduler.add_noise(x0, noise, t), t, label).sample
            loss = denoising_loss(prediction, scheduler, 5.0, x0, noise, t)
            for name, g in zip(deltas, torch.autograd.grad(loss, list(deltas.values())), strict=True):
                expected[name.split()[0]].append(g.abs().flatten())
    assert list(deltas) == ["in 0", "in 1", "mid", "out 0", "out 1"]
    for stage, pieces in expected.items():
        plain = torch.cat(pieces).sort().values
        assert torch.allclose(sizes[stage].sort().values, plain, rtol=1e-3, atol=1e-9)


def test_a_distribution_has_the_moments_and_the_density_of_its_values():
    found = an.distribution(torch.tensor([0.0, 1.0, 10.0, 100.0]))
    assert found["mean"] == pytest.approx(111 / 4)
    assert found["variance"] == pytest.approx((1 + 100 + 10_000) / 4 - (111 / 4) ** 2)
    share = found["shares"]  # 0 has no logarithm
    assert share.sum().item() == pytest.approx(0.75, rel=1e-4)
    for exponent in (0, 1, 2):
        i = (an.EDGES - exponent).abs().argmin()
        assert share[i - 1 : i + 1].max() == pytest.approx(0.25, rel=1e-4)


def test_a_brief_training_that_breaks_ends_in_nan_and_a_calm_one_runs_to_its_end(subject):
    calm = brief_training(subject, {})
    assert len(calm) == 4 and all(map(math.isfinite, calm))
    broken = brief_training(too_fast(subject), {})
    assert math.isnan(broken[-1]) and verdict(broken)["diverged"]


def test_a_verdict_calls_a_loss_that_doubled_or_broke_diverged():
    calm = [1 + 0.01 * (i % 3) for i in range(100)]
    assert not verdict(calm)["diverged"]
    assert verdict(calm)["final loss"] == pytest.approx(1.01, abs=0.005)
    assert not verdict([*calm[:50], 5.0, *calm[50:]])["diverged"]  # a spike
    assert verdict([*calm, *[3.0] * 50])["diverged"]
    assert verdict([math.nan])["diverged"]


def test_every_analysis_of_a_run_writes_strict_json_and_a_picture(run, capsys):
    small = ["--num_images=4", "--timesteps=[100,900]", "--num_steps=3"]
    assert analyze(str(run), *small) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [p.name for p in paths] == [
        f"{name}.{end}" for name in get_args(an.Name) for end in ("json", "png")
    ]

    def refuse(constant):
        raise ValueError(constant)

    found = {p.stem: json.loads(p.read_text(), parse_constant=refuse) for p in paths[::2]}
    assert all(x["about"]["step"] == 3 for x in found.values())
    assert all(x["about"]["analysis"]["timesteps"] == [100, 900] for x in found.values())
    assert found["gates"]["blocks"] == ["in 0", "in 1", "mid", "out 0", "out 1"]
    median = torch.tensor(found["correlation"]["trained, gates: 50%"])
    assert torch.allclose(median.diag(), torch.ones(5)) and torch.allclose(median, median.T)
    assert {"no block_norm", "no long_skips, no unit"} < set(found["stability"])
    assert found["gradients"]["no residuals, no unit"]["mid"]["mean"] > 0
    for path in paths[1::2]:
        Image.open(path).verify()


def test_the_same_seed_gives_the_same_numbers(run):
    options, texts = an.AnalyzeConfig(only=["gates", "gradients"], **SMALL), []
    for _ in range(2):
        paths = list(SCRIPT["analyze"](run, options, Accelerator(cpu=True)))
        texts.append([path.read_text() for path in paths if path.suffix == ".json"])
    assert texts[0] == texts[1]


def test_a_run_without_a_unit_is_one_line_and_exit_code_2(tmp_path, capsys):
    root = train(tmp_path / "plain", "--model.unit=null")
    assert analyze(str(root)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no attention unit" in printed.err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--only=[gate]", "'gates'"),
        ("--timesteps=[1000]", "numbers less than 1000"),
        ("--timesteps=[]", "numbers less than 1000"),
        ("--timesteps=[-1]", "timesteps"),
        ("--num_images=0", "num_images"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_would_do(run, capsys, setting, message):
    assert analyze(str(run), setting) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml"):
        an.Subject(tmp_path, an.AnalyzeConfig(), Accelerator(cpu=True))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda p: p.stem
)
def test_an_ablation_changes_one_option_of_any_base_and_says_why(path):
    parser = run_config.run_parser("")
    base, changed = (
        run_config.to_config(parser, parser.parse_args([x for f in files for x in ("--config", f)])).model
        for files in ([DIGITS], [DIGITS, str(path)])
    )
    written = run_config.yaml.safe_load(path.read_text())["model"]["unit"]
    assert len(written) == 1 and path.read_text().startswith("# ")
    assert changed["unit"] == base["unit"] | {k: v for k, v in changed["unit"].items() if k in written}
    model = UViT(**changed | {"embed_dim": 32})
    labels = None if model.config.num_classes is None else torch.zeros(2, dtype=torch.long)
    assert model(torch.zeros(2, 1, 8, 8), 5, labels).sample.shape == (2, 1, 8, 8)
