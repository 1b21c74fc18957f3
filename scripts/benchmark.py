"""Measure speed: python scripts/benchmark.py [--config FILE] [--units none,dia_lstm] [--batch_sizes 32,128].

Training goes through `fit`, as in a run. `reference` is the plain recipe that the official U-ViT code runs,
measured beside it on the same machine: only ratios carry over to others.
"""

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import run_config
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from exit_codes import leave
from jsonargparse.typing import PositiveInt
from run_config import Config, make_accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from uvit_dia.attention_units import UNITS, SharedUnit
from uvit_dia.checkpoint import aside
from uvit_dia.data import Batches, ImageSet, load_images, read_all
from uvit_dia.diffusion import denoising_loss, make_scheduler
from uvit_dia.errors import ConfigError, check_place, one_of
from uvit_dia.evaluation import extract, load_extractor, versions
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.sampling import generate
from uvit_dia.trainer import build, check_divides, fit
from uvit_dia.uvit import Attention, Patches, UViT

SCRIPTS = Path(__file__).resolve().parent
TASKS = ("train", "sample", "score", "start")
COSTS = ("ms_per_step", "ms_inference", "activations_mib")  # of a unit, beside those of none
SHOWN = """task unit batch_size num_gpus images_per_second ms_per_step ratio_to_reference ratio_to_none mfu
peak_memory_gib unit_parameters unshared ms_inference_to_none activations_mib_to_none how seconds""".split()
Row = dict[str, Any]


def main() -> None:
    parser = run_config.run_parser(__doc__)
    parser.add_argument("--tasks", default="train,sample,score", help=f"of {', '.join(TASKS)}, with commas")
    parser.add_argument(
        "--units", default="reference,none,dia_lstm,dia_lstm_light,se", help="kinds of unit, with commas"
    )
    parser.add_argument("--batch_sizes", help="images a step; default: the config's; on a GPU 32,128,512")
    parser.add_argument(
        "--num_timed",
        type=PositiveInt,
        help="steps timed at a stretch; default: 3, on a GPU 30; the best counts",
    )
    parser.add_argument("--json", help="also write all that was measured here")
    argv = sys.argv[1:]
    cuda = torch.cuda.is_available()
    default = SCRIPTS.parent / "configs" / ("cifar10_uvit.yaml" if cuda else "digits.yaml")
    named = any(arg.split("=")[0] == "--config" for arg in argv)
    parsed = parser.parse_args(argv if named else ["--config", str(default), *argv])
    settings = run_config.to_config(parser, parsed)
    tasks = chosen("tasks", parsed.tasks, TASKS)
    units = chosen("units", parsed.units, ("reference", "none", *UNITS))
    own = "32,128,512" if cuda else str(settings.train.batch_size)
    num_timed = parsed.num_timed or (30 if cuda else 3)
    sizes = [whole(size) for size in (parsed.batch_sizes or own).split(",")]
    if parsed.json is not None:
        check_place("--json", parsed.json, [".json"])

    accelerator = make_accelerator(settings.train.precision)
    for size in sizes:
        check_divides(replace(settings.train, batch_size=size), accelerator.num_processes)
    model = settings.model
    images = load_images(settings.data, "train", model["sample_size"], model["in_channels"])
    peak = measured_peak(accelerator) * accelerator.num_processes
    cases = [("train", unit, size) for size in sizes for unit in units if "train" in tasks]
    cases += [("sample", unit, settings.sample.batch_size) for unit in units if "sample" in tasks]
    cases += [(task, "none", settings.evaluate.batch_size) for task in ("score", "start") if task in tasks]
    rows: list[Row] = []
    for task, unit, size in tqdm(cases, unit="case", disable=not accelerator.is_main_process):
        if unit == "reference" and (task == "sample" or accelerator.num_processes > 1):
            continue
        torch.compiler.reset()
        about = {"task": task, "unit": unit, "batch_size": size, "num_gpus": accelerator.num_processes}
        rows += [about | row for row in MEASURES[task](settings, unit, size, images, accelerator, num_timed)]
        if accelerator.is_main_process:
            compare(rows, peak)
            save(rows, peak, parsed.json)
    if accelerator.is_main_process:
        show(rows, peak)
    accelerator.wait_for_everyone()


def chosen(key: str, text: str, known: tuple[str, ...]) -> list[str]:
    for name in text.split(","):
        if name not in known:
            raise ConfigError(key, name, one_of(name, list(known)))
    return text.split(",")


def whole(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError("batch_sizes", text, "whole numbers from 1, with commas")
    return int(text)


def compare(rows: list[Row], peak: float) -> None:
    """Add ratios and utilisation."""
    for row in rows:
        like = {
            other["unit"]: other for other in rows if all(other[k] == row[k] for k in ("task", "batch_size"))
        }
        for unit in ("reference", "none"):
            if unit in like and "images_per_second" in row:
                ratio = row["images_per_second"] / like[unit]["images_per_second"]
                row[f"ratio_to_{unit}"] = round(ratio, 3)
        for cost in COSTS:
            if "none" in like and row.get(cost):
                row[f"{cost}_to_none"] = round(row[cost] / like["none"][cost], 3)
        if row["task"] == "train":  # a backward pass is two forward passes
            row["mfu"] = round(3 * row["mflops_per_image"] * 1e6 * row["images_per_second"] / peak, 3)


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"


def save(rows: list[Row], peak: float, path: str | None) -> None:
    """Write what was measured so far, after every case: a later one may fail, or be stopped."""
    about = {
        "hardware": hardware(),
        "num_cores": os.cpu_count(),
        "measured_peak_tflops": round(peak / 1e12, 2),
    }
    about |= {"versions": versions(), "command": " ".join(["python", *sys.argv])}
    if path:
        with aside(Path(path)) as partial:
            partial.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def show(rows: list[Row], peak: float) -> None:
    print(f"{hardware()}; torch {torch.__version__}; peak {peak / 1e12:.2f} TFLOP/s, measured")
    names = [name for name in SHOWN if any(name in row for row in rows)]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")


def measured_peak(accelerator: Accelerator) -> float:
    """Operations a second of one large matrix product, on random numbers, in the training precision."""
    cuda = accelerator.device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=accelerator.device, dtype=dtype)
    torch.matmul(a, b)
    return 10 * 2 * n**3 / timed(lambda: [torch.matmul(a, b) for _ in range(10)])


def train(
    settings: Config, unit: str, size: int, images: ImageSet, accelerator: Accelerator, num: int
) -> list[Row]:
    """Training as a run does it, and what its network costs without gradients and in memory."""
    wanted = replace(settings.train, batch_size=size, num_steps=10**9)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(images, settings.data, size, wanted.seed, accelerator.device, *share)
    kind = None if unit in ("none", "reference") else {"kind": unit}
    cuda = accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # before a CUDA graph takes its memory, which no later step does
    started = time.perf_counter()
    if unit == "reference":
        model = reference_model(settings.model)
        steps = reference_steps(model, settings, batches, accelerator)
    else:
        state = build(wanted, settings.diffusion, settings.model | {"unit": kind}, accelerator)
        model, steps = state.model, fit(state, batches)
    list(islice(steps, 13 if cuda else 6))  # compiles, and on a GPU records the step
    wait()
    start_up = time.perf_counter() - started
    seconds = timed(lambda: list(islice(steps, num))) / num
    row = {
        "images_per_second": round(size / seconds, 1),
        "ms_per_step": round(1e3 * seconds, 2),
        "compile_and_first_steps_s": round(start_up, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    shared, unshared = parameter_savings(model.shared_unit) if kind else (0, 0)
    row |= {"unit_parameters": shared, "unshared": unshared}
    accelerator.free_memory()
    return [row | forward_costs(model, next(batches.from_step(0)), num)]


def parameter_savings(shared: SharedUnit) -> tuple[int, int]:
    """Parameters as shared, and with a unit a block instead: the paper's shared / unshared."""
    with torch.device("meta"):
        own = SharedUnit(replace(shared.config, sharing="none"), shared.dim, shared.stages)
    return tuple(sum(p.numel() for p in module.parameters()) for module in (shared, own))


def forward_costs(model: UViT, batch: Any, num: int) -> Row:
    """Time without gradients, operations, and the bytes that a forward pass keeps for the backward pass."""
    images, t = batch.images, torch.full((len(batch.images),), 500, device=batch.images.device)
    inputs = (images, t, None if model.config.num_classes is None else batch.labels)
    model.eval()
    with torch.no_grad():
        model(*inputs)
        inference = timed(lambda: [model(*inputs) for _ in range(num)]) / num
    model._compiled_call_impl = None  # operations and activations are counted one by one
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return {
        "ms_inference": round(1e3 * inference, 2),
        "mflops_per_image": round(counter.get_total_flops() / len(images) / 1e6, 3),
        "activations_mib": round(activations(model, inputs) / 2**20, 2),
    }


def activations(model: UViT, inputs: tuple) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart: memory on any device."""
    saved: dict[int, int] = {}  # storage -> bytes
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # an output that its own node saves would never be freed

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        output = model(*inputs)
    total = sum(size for place, size in saved.items() if place not in weights)
    del output  # it kept the storages alive, so that none was used twice
    return total


def reference_model(arguments: dict[str, Any]) -> UViT:
    """The network as the official code computes it: attention takes q, k and v in float32."""
    model = UViT(**arguments | {"unit": None})
    plain = {Attention: plain_attention, Patches: nn.Conv2d.forward}
    for module in model.modules():
        if type(module) in plain:
            module.forward = partial(plain[type(module)], module)
    return model


def plain_attention(self: Attention, x: Tensor) -> Tensor:
    q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.num_heads).float()
    x = F.scaled_dot_product_attention(q, k, v)  # which autocast casts back
    return self.proj(rearrange(x, "b h l d -> b l (h d)"))


def reference_steps(
    model: UViT, settings: Config, batches: Batches, accelerator: Accelerator
) -> Iterator[Tensor]:
    """The plain recipe: eager, fp16 with loss scaling on a GPU, the average parameter by parameter."""
    device, recipe = accelerator.device, settings.train
    model.to(device).train()
    average = copy.deepcopy(model)
    scheduler, cuda = make_scheduler(settings.diffusion), device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / max(1, recipe.warmup_steps))
    )
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    for batch in batches.from_step(0):
        optimizer.zero_grad()
        t = torch.randint(scheduler.config.num_train_timesteps, (len(batch.images),), device=device)
        noise = torch.randn_like(batch.images)
        labels = None if model.config.num_classes is None else batch.labels
        with torch.autocast(device.type, torch.float16, enabled=cuda):
            prediction = model(scheduler.add_noise(batch.images, noise, t), t, labels).sample
        loss = denoising_loss(prediction, scheduler, settings.diffusion.min_snr_gamma, batch.images, noise, t)
        gathered = accelerator.gather(loss.detach()).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        warm_up.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(recipe.ema_decay).add_((1 - recipe.ema_decay) * parameter)
        yield gathered


def sample(
    settings: Config, unit: str, size: int, images: ImageSet, accelerator: Accelerator, num: int
) -> list[Row]:
    """Sampling as scripts/sample.py does it, after one batch that compiles."""
    kind = None if unit == "none" else {"kind": unit}
    model = UViT(**settings.model | {"unit": kind}).to(accelerator.device).eval()
    pipeline, world = UViTPipeline(model, make_scheduler(settings.diffusion)), accelerator.num_processes

    def draw(num_images: int) -> int:
        drawn = replace(settings.sample, num_images=num_images)
        return sum(len(i) for i, _ in generate(pipeline, drawn, rank=accelerator.process_index, world=world))

    draw(size * world)
    num_images = 3 * size * world
    seconds = timed(lambda: draw(num_images), 1)
    return [{"images_per_second": round(num_images / seconds, 1), "steps": settings.sample.steps}]


def score(
    settings: Config, unit: str, size: int, images: ImageSet, accelerator: Accelerator, num: int
) -> list[Row]:
    """Feature extraction of real images."""
    extractor = load_extractor(settings.evaluate, accelerator.device)
    some = torch.cat([x.clone() for x in islice(read_all(images), 1 + num * size // 512)])[: num * size]
    numbers = torch.arange(len(some)) * accelerator.num_processes + accelerator.process_index
    extract(extractor, [(numbers[:size], some[:size])], size, accelerator)
    seconds = timed(lambda: extract(extractor, [(numbers, some)], size, accelerator), 1)
    rate = len(some) * accelerator.num_processes / seconds
    return [{"images_per_second": round(rate, 1), "extractor": settings.evaluate.extractor}]


def start(
    settings: Config, unit: str, size: int, images: ImageSet, accelerator: Accelerator, num: int
) -> list[Row]:
    """Seconds from the command to the first step that is logged: plain, compiled anew, compiled before."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for compiled, how in ((False, "plain"), (True, "compiled anew"), (True, "compiled before")):
            wanted = replace(settings.train, compile=compiled, num_steps=1, log_every=1, preview_every=0)
            run = Path(folder, how.replace(" ", "_"))
            recipe = Path(folder, "config.yaml")
            run_config.save(replace(settings, output_dir=str(run), train=wanted), recipe, {})
            command = [sys.executable, str(SCRIPTS / "train.py"), "--config", str(recipe)]
            started = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
                if process.poll():
                    raise SystemExit(process.stderr.read())
                time.sleep(0.05)
            rows.append({"how": how, "seconds": round(time.perf_counter() - started, 1)})
            process.communicate()
    return rows


MEASURES: dict[str, Callable[..., list[Row]]] = {f.__name__: f for f in (train, sample, score, start)}


def timed(work: Callable[[], Any], repeats: int | None = None) -> float:
    """The best of some, in seconds: what else runs on the machine only ever adds, on a CPU most."""
    seconds = []
    for _ in range(repeats or (3 if torch.cuda.is_available() else 15)):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    leave(main)
