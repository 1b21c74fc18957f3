"""Score a model: accelerate launch scripts/evaluate.py RUN_OR_PIPELINE_OR_HUB_ID [--num_images 50000 ...]."""

import sys
from dataclasses import asdict
from pathlib import Path

from uvit_dia import config
from uvit_dia.checkpoint import RunFolder
from uvit_dia.data import DataConfig, load_images, test_images
from uvit_dia.errors import UserError, check_place, run
from uvit_dia.evaluation import EvaluateConfig, evaluate, markdown, write_card
from uvit_dia.sampling import SampleConfig, load_pipeline
from uvit_dia.trainer import make_accelerator


def main() -> None:
    parser = config.Parser(__doc__)
    parser.add_argument("source", help="a run's folder, a pipeline's folder, or a Hub id")
    parser.add_argument("--reference", help="a folder of real images; default: the run's training set")
    parser.add_argument(
        "--card", help="where to write the card (.json, .md); default: in the run's evaluation/"
    )
    parser.add_settings(EvaluateConfig)
    parser.add_settings(SampleConfig, "sample")
    given = parser.parse_args(defaults=False).as_dict()
    if given.get("card") is not None:
        check_place("--card", given["card"], [".json"])
    folder = RunFolder(given["source"])
    known = config.load(folder.config) if folder.config.is_file() else None
    if known is None and not given.get("reference"):
        raise UserError(f"{folder.root}: no run, so the real images are not known: add --reference DIR")
    if known is None and not given.get("card"):
        raise UserError(f"{folder.root}: no run, so there is no place for the card: add --card FILE.json")
    sample = SampleConfig(**(asdict(known.sample) if known else {}) | given.pop("sample", {}))
    options = {key: value for key, value in given.items() if key in EvaluateConfig.__annotations__}
    settings = EvaluateConfig(**(asdict(known.evaluate) if known else {}) | options)

    accelerator = make_accelerator(sample.precision)
    pipeline, about = load_pipeline(given["source"], accelerator.device)
    pipeline.check(sample.guidance_scale, sample.steps, sample.class_label)
    data = DataConfig(dataset="folder", path=given["reference"]) if given.get("reference") else known.data
    size = (pipeline.unet.config.sample_size, pipeline.unet.config.in_channels)
    with accelerator.local_main_process_first():
        reference, held_out = load_images(data, "train", *size), test_images(data, *size)
    card = evaluate(pipeline, sample, settings, reference, held_out, about, accelerator)
    if card is not None:
        path = Path(given.get("card") or folder.evaluation / f"step_{about.get('step', 0):08d}.json")
        write_card(card, path)
        print(markdown(card))
        print(path)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run(main))
