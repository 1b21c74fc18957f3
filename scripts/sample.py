"""Draw images: python scripts/sample.py RUN_OR_PIPELINE_OR_HUB_ID --num_images 64 --grid out.png."""

from dataclasses import asdict
from pathlib import Path

import run_config
import torch
from accelerate.utils import gather_object
from exit_codes import leave
from run_folder import RunFolder
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from uvit_dia.checkpoint import writing
from uvit_dia.errors import UserError, check_place
from uvit_dia.sampling import SampleConfig, generate, grid, load_pipeline


def main() -> int:
    parser = run_config.Parser(__doc__)
    parser.add_argument("source", help="a run's folder, a pipeline's folder, or a Hub id")
    parser.add_argument("--grid", help="write one picture of the images, at most 256 of them")
    parser.add_argument("--dir", help="write each image as DIR/000000.png, numbered by index")
    parser.add_settings(SampleConfig)
    given = parser.parse_args(defaults=False)
    if not ("grid" in given or "dir" in given):
        raise UserError("nothing to write: add --grid out.png, --dir images/ or both")
    settings = sample_settings(given.source, given.as_dict())
    if "grid" in given:
        check_place("--grid", given.grid, [".png", ".jpg", ".webp"])
    if "dir" in given:
        check_place("--dir", given.dir)
        if next(Path(given.dir).glob("*.png"), None):
            raise UserError(f"--dir: there are images in {given.dir} already; name another folder")

    accelerator = run_config.make_accelerator(settings.precision)
    pipeline, _ = load_pipeline(given.source, accelerator.device)
    pipeline.check(settings.guidance_scale, settings.steps, settings.class_label)
    shown = []
    pieces = generate(pipeline, settings, rank=accelerator.process_index, world=accelerator.num_processes)
    with tqdm(total=settings.num_images, unit="image", disable=not accelerator.is_main_process) as bar:
        for indices, images in pieces:
            if "dir" in given:
                with writing(Path(given.dir)):
                    save_images(images, indices, Path(given.dir))
            shown += [pair for pair in zip(indices.tolist(), images, strict=True) if pair[0] < 256]
            bar.update(len(indices) * accelerator.num_processes)
    shown = sorted(gather_object(shown), key=lambda pair: pair[0])
    if "grid" in given and accelerator.is_main_process:
        with writing(Path(given.grid)):
            Path(given.grid).parent.mkdir(parents=True, exist_ok=True)
            grid(torch.stack([image for _, image in shown])).save(given.grid)
    accelerator.print(" ".join(given[name] for name in ("grid", "dir") if name in given))
    accelerator.end_training()
    return 0


def save_images(images: Tensor, indices: Tensor, folder: Path) -> None:
    """Write uint8 images (n, C, H, W) as folder/000123.png, numbered by their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in zip(indices.tolist(), images, strict=True):
        to_pil_image(image).save(folder / f"{index:06d}.png")


def sample_settings(source: str, given: dict) -> SampleConfig:
    """What is given on the command line, over the run's own `sample` settings if the source is a run."""
    known = RunFolder(source).config
    base = asdict(run_config.load(known).sample) if known.is_file() else {}
    return SampleConfig(**base | {key: given[key] for key in SampleConfig.__annotations__ if key in given})


if __name__ == "__main__":
    leave(main)
