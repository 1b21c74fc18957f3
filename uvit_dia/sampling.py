"""Seeded images: image i of a seed is the same whoever draws it, on one process or many."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from uvit_dia.diffusion import make_sampler
from uvit_dia.errors import UserError, check_compiler, check_fields
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.random_keys import Stream, torch_generator


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are drawn."""

    num_images: int = 64  # how many
    sampler: Literal["ddpm", "ddim", "dpm-solver++", "unipc"] = "dpm-solver++"  # ddpm wants about 1,000 steps
    steps: int = 50  # network evaluations an image, doubled by guidance
    seed: int = 0  # image i of a seed is always the same
    class_label: int | None = None  # null: all classes in turn, for a conditional model
    guidance_scale: float = 1.0  # uncond + s (cond - uncond); 1: off
    batch_size: int = 100  # images denoised together; another one may change the last bit of an image
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network alone
    compile: bool = False  # torch.compile the network: slow to start; needs a C++ compiler on a CPU

    def __post_init__(self) -> None:
        check_fields("sample", self, num_images=1, steps=1, batch_size=1, seed=0)


def load_pipeline(source: str, device: torch.device | str) -> tuple[UViTPipeline, dict[str, Any]]:
    """The pipeline of a run's or pipeline's folder or a Hub id, and its training.json; UserError for none."""
    folders = (Path(source, "pipeline"), Path(source))
    found = next((folder for folder in folders if (folder / "model_index.json").is_file()), None)
    if found is None and Path(source).exists():
        raise UserError(f"{source}: neither a run with a pipeline/ (training writes it) nor a pipeline")
    logging.disable_progress_bar()  # of two small files
    try:
        pipeline = UViTPipeline.from_pretrained(found or source, use_safetensors=True)  # runs no code of it
        training = Path(found or source, "training.json")
        about = dict(json.loads(training.read_text())) if training.is_file() else {}
    except Exception as error:
        raise UserError(f"{source}: no run, pipeline or Hub id that can be loaded ({error})") from error
    finally:
        logging.enable_progress_bar()
    if any(parameter.is_meta for parameter in pipeline.unet.parameters()):
        raise UserError(f"{source}: its weights are not those of its config; export it again")
    return pipeline.to(device), about


def generate(
    pipeline: UViTPipeline, config: SampleConfig, stream: Stream = Stream.SAMPLING,
    rank: int = 0, world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """This process's share of config.num_images, in batches: indices (k,) and uint8 images (k, C, H, W).

    Batches are the same whatever the number of processes, which take them in turn. Noise comes from one
    generator an image, on the CPU. A batch is handed out while the device works on the next.
    """
    pipeline.scheduler = make_sampler(config.sampler, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if config.compile and pipeline.unet._compiled_call_impl is None:
        check_compiler("sample.compile", pipeline.device.type)
        pipeline.unet.compile(dynamic=False)
    starts = range(rank * config.batch_size, config.num_images, world * config.batch_size)
    launched = (launch(pipeline, config, stream, start) for start in starts)
    for (indices, images, copied), _ in pairwise(chain(launched, [()])):
        if copied is not None:
            copied.synchronize()
        yield indices, images


def launch(pipeline: UViTPipeline, config: SampleConfig, stream: Stream, start: int) -> tuple:
    """The batch that starts at this index, and on a GPU the event after which its images are there."""
    device, one = pipeline.device, config.class_label
    indices = torch.arange(start, min(start + config.batch_size, config.num_images))
    # compiled for one size, so the last batch is filled up with images that are left out again
    drawn = range(start, start + (config.batch_size if config.compile else len(indices)))
    labels = pipeline.classes_in_turn(drawn) if one is None else [one] * len(drawn)
    generators = [torch_generator(config.seed, stream, i) for i in drawn]
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=config.precision != "fp32"):
        images = pipeline(len(drawn), labels, config.guidance_scale, config.steps, generators, "pt")[0]
    pixels = (images[: len(indices)] * 255).round().to(torch.uint8).to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return indices, pixels, copied


def grid(images: Tensor) -> Image.Image:
    """One picture of uint8 images (n, C, H, W) in a square: small ones are enlarged smoothly, for people."""
    scale = max(1, 64 // images.shape[-1])
    larger = nn.functional.interpolate(images.float(), scale_factor=scale, mode="bicubic")
    columns = math.ceil(math.sqrt(len(images)))
    return to_pil_image(make_grid(larger.round().clamp(0, 255).byte(), columns, padding=2, pad_value=128))
