"""EMA after the fact: averages of any width from snapshots of two (Karras et al. 2024, arXiv 2312.02696)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from ema_pytorch.post_hoc_ema import KarrasEMA, sigma_rel_to_gamma, solve_weights
from torch import Tensor, nn

from uvit_dia.checkpoint import Tensors, folders, read
from uvit_dia.errors import UserError


def averages(model: nn.Module, sigma_rels: Sequence[float], copied: set[str]) -> list[KarrasEMA]:
    """One average a relative width, to be updated after every step; the tensors `copied` are not averaged."""
    return [KarrasEMA(model, x, update_every=1, param_or_buffer_names_no_ema=copied) for x in sigma_rels]


def snapshot(kept: Sequence[KarrasEMA]) -> Tensors:
    """What is stored of the averages: their parameters in float16, by number; 2 bytes a parameter each."""
    return {str(i): {k: v.half() for k, v in x.ema_model.named_parameters()} for i, x in enumerate(kept)}


def synthesize(root: Path, step: int, widths: Sequence[float] = ()) -> dict[float, dict[str, Tensor]]:
    """Averages of these relative widths at `step`, by width: float32 parameters on the CPU (algorithm 3).

    `root` holds snapshots as checkpoints, whose info names the widths that were kept as `posthoc_ema`; no
    `widths`: five, evenly spaced between these. UserError for one that is not, or if there is no snapshot.
    """
    known = {folder: json.loads((folder / "info.json").read_text()) for folder in folders(root)}
    known = {folder: info for folder, info in known.items() if info["step"] <= step}
    if step not in [info["step"] for info in known.values()]:
        raise UserError(f"{root}: no snapshot of step {step}; train with --train.posthoc_ema '[0.05, 0.28]'")
    kept = next(iter(known.values()))["posthoc_ema"]
    low, high = min(kept), max(kept)
    widths = widths or [round(low + (high - low) * i / 4, 4) for i in range(5)]
    if outside := [width for width in widths if not low <= width <= high]:
        raise UserError(
            f"ema_sweep: {outside[0]} is not between {low} and {high}, the widths that the run kept"
        )
    # after n steps KarrasEMA's decay is (1 - 1 / (n + 1))^(gamma + 1): its time is n + 1
    times = torch.tensor([info["step"] + 1.0 for info in known.values() for _ in kept])
    gammas = torch.tensor([sigma_rel_to_gamma(width) for width in kept] * len(known))
    wanted = torch.tensor([sigma_rel_to_gamma(width) for width in widths])
    weights = solve_weights(times, gammas, torch.full_like(wanted, step + 1.0), wanted)  # (snapshots, widths)
    found: dict[float, dict[str, Tensor]] = {width: {} for width in widths}
    for folder, parts in zip(known, weights.view(len(known), len(kept), -1), strict=True):
        tensors, _ = read(folder)
        for i, part in enumerate(parts.tolist()):
            for average, weight in zip(found.values(), part, strict=True):
                for name, value in tensors[str(i)].items():
                    average[name] = average.get(name, 0) + weight * value.float()
    return found
