"""EMA after the fact: averages of any width from snapshots of two (Karras et al. 2024, arXiv 2312.02696)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from ema_pytorch.post_hoc_ema import KarrasEMA, sigma_rel_to_gamma, solve_weights
from torch import Tensor

from uvit_dia.checkpoint import Tensors, folders, read
from uvit_dia.errors import UserError


def snapshot(kept: Sequence[KarrasEMA]) -> Tensors:
    """What is stored of the averages: their parameters in float16, by number; 2 bytes a parameter each."""
    return {str(i): {k: v.half() for k, v in x.ema_model.named_parameters()} for i, x in enumerate(kept)}


def synthesize(root: Path, step: int, widths: Sequence[float] = ()) -> dict[float, dict[str, Tensor]]:
    """Averages of these relative widths at `step`, by width: float32 parameters on the CPU (algorithm 3).

    `root` holds snapshots as checkpoints, whose info names the widths that were kept as `posthoc_ema`; no
    `widths`: five, evenly spaced between these. UserError for one that is not, or if there is no snapshot.
    """
    infos = {folder: json.loads((folder / "info.json").read_text()) for folder in folders(root)}
    infos = {folder: info for folder, info in infos.items() if info["step"] <= step}
    if step not in [info["step"] for info in infos.values()]:
        raise UserError(f"{root}: no snapshot of step {step}; train with --train.posthoc_ema '[0.05, 0.28]'")
    kept = next(iter(infos.values()))["posthoc_ema"]
    low, high = sorted(kept)
    widths = widths or [round(low + (high - low) * i / 4, 4) for i in range(5)]
    if outside := [width for width in widths if not low <= width <= high]:
        raise UserError(f"ema_sweep: {outside[0]} is not between {low} and {high}, which the run kept")
    # after n steps KarrasEMA's decay is (1 - 1 / (n + 1))^(gamma + 1): its time is n + 1
    times = torch.tensor([info["step"] + 1.0 for info in infos.values()])
    gammas, wanted = (torch.tensor([*map(sigma_rel_to_gamma, some)]) for some in (kept, widths))
    pairs = torch.cartesian_prod(times, gammas).T
    weights = solve_weights(*pairs, torch.tensor(step + 1.0), wanted)  # (snapshots * kept, widths)
    sums: dict[str, Tensor] = {}
    for folder, parts in zip(infos, weights.float().chunk(len(infos)), strict=True):  # (kept, widths)
        tensors, _ = read(folder)
        for name in tensors["0"]:
            values = torch.stack([tensors[str(i)][name].float() for i in range(len(kept))])  # (kept, ...)
            sums[name] = sums.get(name, 0) + torch.tensordot(parts.T, values, 1)  # (widths, ...)
    return {width: {name: total[i] for name, total in sums.items()} for i, width in enumerate(widths)}
