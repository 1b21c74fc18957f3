"""Score a model or a folder of images: accelerate launch scripts/evaluate.py RUN_OR_PIPELINE_OR_HUB_ID.

RUN --checkpoints and RUN --ema_sweep score several weights and write a table and a plot beside the cards.
--generated DIR scores images that are there, against --reference DIR or the training set of RUN.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import run_config
import torch
from accelerate import Accelerator
from exit_codes import leave
from matplotlib.figure import Figure
from PIL import Image
from run_folder import RunFolder
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from uvit_dia import checkpoint, posthoc
from uvit_dia.checkpoint import BadCheckpoint
from uvit_dia.data import FORMATS, SUFFIXES, DataConfig, ImageSet, load_images, test_images
from uvit_dia.errors import UserError, check_place
from uvit_dia.evaluation import (
    LABELS,
    EvaluateConfig,
    Facts,
    Scorer,
    check_comparable,
    render,
    write_card,
)
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.sampling import SampleConfig, load_pipeline


def main() -> None:
    parser = run_config.Parser(__doc__)
    parser.add_argument("source", nargs="?", help="a run's folder, a pipeline's folder, or a Hub id")
    parser.add_argument("--generated", help="score this folder's images, all of one size, and draw none")
    parser.add_argument("--reference", help="a folder of real images; default: the run's training set")
    parser.add_argument(
        "--card", help="where to write the card (.json, .md); default: in the run's evaluation/"
    )
    parser.add_argument("--checkpoints", action="store_true", help="score all of the run's, and tabulate")
    parser.add_argument(
        "--ema_sweep", nargs="*", type=float, metavar="WIDTH",
        help="score averages of these relative widths (train.posthoc_ema), and tabulate; default: five",
    )  # fmt: skip
    parser.add_settings(EvaluateConfig)
    parser.add_settings(SampleConfig, "sample")
    given = parser.parse_args(defaults=False).as_dict()
    if given.get("card") is not None:
        check_place("--card", given["card"], [".json"])
    folder = RunFolder(given.get("source") or "")
    known = run_config.load(folder.config) if given.get("source") and folder.config.is_file() else None
    check(given, known is not None)
    sample = SampleConfig(**(asdict(known.sample) if known else {}) | given.pop("sample", {}))
    options = {key: value for key, value in given.items() if key in EvaluateConfig.__annotations__}
    settings = EvaluateConfig(**(asdict(known.evaluate) if known else {}) | options)
    accelerator = run_config.make_accelerator(sample.precision)

    if given.get("generated"):
        score_folder(given, known, settings, accelerator)
    else:
        score_model(given, known, folder, sample, settings, accelerator)
    accelerator.end_training()


def score_folder(
    given: dict, known: run_config.Config | None, settings: EvaluateConfig, accelerator: Accelerator
) -> None:
    """Score images that are there."""
    images = OneSize(given["generated"])
    settings = replace(settings, num_images=len(images), num_seeds=1)
    if given.get("reference"):
        reference, held_out = OneSize(given["reference"]), None
    else:
        size = (known.model["sample_size"], known.model["in_channels"])
        reference, held_out = load_images(known.data, "train", *size), test_images(known.data, *size)
    card = Scorer(settings, reference, held_out, accelerator).score_images(images)
    finish(card, Path(given["card"]) if given.get("card") else None)


def score_model(
    given: dict,
    known: run_config.Config | None,
    folder: RunFolder,
    sample: SampleConfig,
    settings: EvaluateConfig,
    accelerator: Accelerator,
) -> None:
    """Score a pipeline's weights, those of all checkpoints, or averages of several widths."""
    pipeline, about = load_pipeline(given["source"], accelerator.device)
    pipeline.check(sample.guidance_scale, sample.steps, sample.class_label)
    data = DataConfig(dataset="folder", path=given["reference"]) if given.get("reference") else known.data
    size = (pipeline.unet.config.sample_size, pipeline.unet.config.in_channels)
    with accelerator.local_main_process_first():
        reference, held_out = load_images(data, "train", *size), test_images(data, *size)
    path = Path(given.get("card") or folder.evaluation / f"step_{about.get('step', 0):08d}.json")
    weights, axis = iter([(about, path)]), None
    if given.get("checkpoints"):
        weights, axis = checkpoints(folder, pipeline, about), "step"
    elif "ema_sweep" in given:
        widths = posthoc.synthesize(folder.posthoc, about["step"], given["ema_sweep"] or ())
        weights, axis = sweep(folder, pipeline, about, widths), "sigma_rel"
    scorer, cards = Scorer(settings, reference, held_out, accelerator), []
    for facts, place in weights:
        cards.append(scorer.score_pipeline(pipeline, sample, facts))
        finish(cards[-1], place)
    if not cards:
        raise UserError(f"{folder.checkpoints}: no checkpoint that reads as it was written")
    if axis and accelerator.is_main_process:
        table(cards, axis, folder.evaluation / ("checkpoints" if axis == "step" else "ema_sweep"))


class OneSize(ImageSet):
    """The images of a folder as torch-fidelity reads them: RGB, at their own size, which all must share."""

    def __init__(self, folder: str) -> None:
        paths = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise UserError(f"{folder}: no folder with images; name one with files of {' '.join(SUFFIXES)}")
        rows, labels = np.array(paths, dtype=object), np.zeros(len(paths))
        super().__init__(folder, rows, labels, None, shape=(3, 0, 0), num_workers=4)
        height, width = self.decode([0]).shape[2:]
        self.shape = (3, height, width)

    def decode(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self.pixels(path) for path in self.rows[indices]])

    def pixels(self, path: str) -> Tensor:
        """Of one file, uint8 (3, H, W)."""
        try:
            image = pil_to_tensor(Image.open(path, formats=FORMATS).convert("RGB"))
        except Exception as error:  # Pillow's decoders raise some ten types
            raise UserError(f"{path} can't be decoded as an image ({error}); mend or remove it") from None
        if any(self.shape[1:]) and image.shape != self.shape:
            sizes = "{2}x{1}, others are {5}x{4}".format(*image.shape, *self.shape)
            raise UserError(f"{path} is {sizes}: images of one folder must share a size; resize them")
        return image


def check(given: dict, is_run: bool) -> None:
    """UserError where what is to be scored, against what, or a place for it, is missing."""
    source = given.get("source")
    if not source and not given.get("generated"):
        raise UserError("nothing to score: name a run, a pipeline or a Hub id, or add --generated DIR")
    if not is_run and not given.get("reference"):
        raise UserError(f"{source}: no run, so the real images are not known: add --reference DIR")
    several = given.get("checkpoints") or "ema_sweep" in given
    if several and (not is_run or given.get("generated")):
        raise UserError("--checkpoints and --ema_sweep go with a run, and not with --generated")
    if not is_run and not given.get("card") and not given.get("generated"):
        raise UserError(f"{source}: no run, so there is no place for the card: add --card FILE.json")


def checkpoints(folder: RunFolder, pipeline: UViTPipeline, about: Facts) -> Iterator[tuple[Facts, Path]]:
    """Put each checkpoint's averaged weights into the pipeline: what to say of them, and the card's path."""
    found = checkpoint.folders(folder.checkpoints)[::-1]
    if not found:
        raise UserError(f"{folder.checkpoints}: no checkpoints to score")
    for path in found:
        try:
            tensors, info = checkpoint.read(path)
        except BadCheckpoint as error:
            print(f"warning: {error}; left out", file=sys.stderr)
            continue
        pipeline.unet.load_state_dict(tensors["ema"])
        yield about | {"step": info["step"]}, folder.evaluation / f"{path.name}.json"


def sweep(
    folder: RunFolder, pipeline: UViTPipeline, about: Facts, widths: dict
) -> Iterator[tuple[Facts, Path]]:
    """The same for averages of several widths, which keep the pipeline's BatchNorm statistics."""
    for width, parameters in widths.items():
        pipeline.unet.load_state_dict(parameters, strict=False)
        path = folder.evaluation / "ema_sweep" / f"step_{about['step']:08d}_{width:.4f}.json"
        yield about | {"ema_decay": None, "sigma_rel": width}, path


def finish(card: Facts | None, path: Path | None) -> None:
    if card is not None:
        if path is not None:
            write_card(card, path)
        print(render("card.md", card=card))
        print(path or "no --card FILE.json: not written")


def table(cards: list[Facts], axis: str, stem: Path) -> None:
    """Print the scores over a fact of their provenance; write stem.md, .csv and .png, bars: spread."""
    check_comparable(cards)
    text, key, anchor = render("scores.md", cards=cards, axis=axis), cards[0]["headline"], cards[0]["anchor"]
    stem.with_suffix(".md").write_text(text)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = list(cards[0]["metrics"])
        writer.writerow([axis, *names, *(f"{name}_spread" for name in names)])
        for card in cards:
            spread = card["spread"] or {}
            row = [*card["metrics"].values(), *map(spread.get, names)]
            writer.writerow([card["provenance"][axis], *row])
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    bars = [(card["spread"] or {key: 0})[key] for card in cards]
    points = [(card["provenance"][axis], card["metrics"][key]) for card in cards]
    axes.errorbar(*zip(*points, strict=True), bars, marker="o", capsize=4, label="generated")
    if anchor and anchor["comparable"]:
        axes.axhline(anchor["metrics"][key], ls="--", color="gray", label="held-out images")
    axes.set(xlabel=axis, ylabel=LABELS[key])
    axes.legend()
    figure.savefig(stem.with_suffix(".png"), dpi=110)
    print(text)
    print(*(stem.with_suffix(suffix) for suffix in (".md", ".csv", ".png")))


if __name__ == "__main__":
    leave(main)
