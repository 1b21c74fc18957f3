"""Measure what a unit costs: python scripts/benchmark.py [--units none,dia_lstm] [--batch_sizes 32,128]."""

import json
import platform
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from uvit_dia import config
from uvit_dia.attention_units import UnitConfig, parameter_savings
from uvit_dia.data import Batches, load_images
from uvit_dia.errors import ConfigError, check_place, run
from uvit_dia.evaluation import versions
from uvit_dia.trainer import TrainState, build, check_divides, fit, make_accelerator

UNITS = "none,dia_lstm,dia_lstm_light,se,eca,cbam,srm,spa,sem,spem"


def main() -> None:
    parser = config.run_parser(__doc__)
    parser.add_argument(
        "--units", default=UNITS, help="kinds of unit, with commas; each with its own defaults"
    )
    parser.add_argument("--batch_sizes", default="128", help="images a step, with commas")
    parser.add_argument(
        "--num_timed", type=PositiveInt, default=30, help="steps timed, three times; the best counts"
    )
    parser.add_argument("--json", help="also write the rows here")
    argv = sys.argv[1:]
    digits = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"
    named = any(arg.split("=")[0] == "--config" for arg in argv)
    parsed = parser.parse_args(argv if named else ["--config", str(digits), *argv])
    settings = config.to_config(parser, parsed)
    accelerator = make_accelerator(settings.train.precision)
    model = settings.model
    images = load_images(settings.data, "train", model["sample_size"], model["in_channels"])
    sizes = [whole(size) for size in parsed.batch_sizes.split(",")]
    units = [None if kind == "none" else {"kind": kind} for kind in parsed.units.split(",")]
    for unit in units:
        UnitConfig.of(unit)
    for size in sizes:
        check_divides(replace(settings.train, batch_size=size), accelerator.num_processes)
    if parsed.json is not None:
        check_place("--json", parsed.json, [".json"])
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for unit in tqdm(units, desc=f"batch {size}", unit="unit"):
            kind = unit["kind"] if unit else "none"
            train = replace(settings.train, batch_size=size, num_steps=10**9)
            torch.compiler.reset()
            state = build(train, settings.diffusion, model | {"unit": unit}, accelerator)
            batches = Batches(images, settings.data, size, train.seed, accelerator.device)
            shared, unshared = parameter_savings(state.model.shared_unit) if unit else (0, 0)
            cost = {"unit": kind, "batch_size": size, "unit_parameters": shared, "unshared": unshared}
            rows.append(cost | measure(state, batches, parsed.num_timed))
            base = next(row for row in rows if row["batch_size"] == size)
            for key in ("ms_per_step", "ms_inference", "activations_mib", "peak_memory_gib"):
                rows[-1][f"{key}_to_{base['unit']}"] = (
                    round(rows[-1][key] / base[key], 3) if base[key] else None
                )
    device = accelerator.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    result = {"hardware": hardware, "versions": versions(), "command": " ".join(sys.argv), "rows": rows}
    if parsed.json:
        Path(parsed.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{hardware}; torch {torch.__version__}")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")


def whole(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError("batch_sizes", text, "whole numbers from 1, with commas")
    return int(text)


def measure(state: TrainState, batches: Batches, num_timed: int) -> dict[str, Any]:
    """Training through `fit` as a run does it, and the network alone without gradients."""
    started, cuda = time.perf_counter(), state.accelerator.device.type == "cuda"
    steps = fit(state, batches)
    list(islice(steps, 5))
    wait(state)
    start_up = time.perf_counter() - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    train = timed(lambda: list(islice(steps, num_timed)), state) / num_timed
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    images, labels = next(batches.from_step(0))[1:]
    t = torch.full((len(images),), 500, device=images.device)
    inputs = (images, t, None if state.model.config.num_classes is None else labels)
    state.network.eval()
    with torch.no_grad():
        state.network(*inputs)
        inference = timed(lambda: [state.network(*inputs) for _ in range(num_timed)], state) / num_timed
    state.model._compiled_call_impl = None  # operations and activations are counted one by one
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        state.network(*inputs)
    return {
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "mflops_per_image": round(counter.get_total_flops() / len(images) / 1e6, 3),
        "images_per_second": round(len(images) / train, 1),
        "ms_per_step": round(1e3 * train, 2),
        "ms_inference": round(1e3 * inference, 2),
        "activations_mib": round(activations(state, inputs) / 2**20, 2),
        "peak_memory_gib": memory,
        "start_up_s": round(start_up, 1),
    }


def activations(state: TrainState, inputs: tuple) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart: memory on any device."""
    saved: dict[int, int] = {}  # storage -> bytes
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}

    def count(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        output = state.network(*inputs)
    total = sum(size for place, size in saved.items() if place not in weights)
    del output  # it kept the storages alive, so that none was used twice
    return total


def timed(work: Any, state: TrainState) -> float:
    """The best of three, in seconds: what else runs on the machine only ever adds."""
    seconds = []
    for _ in range(3):
        wait(state)
        started = time.perf_counter()
        work()
        wait(state)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def wait(state: TrainState) -> None:
    if state.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(run(main))
