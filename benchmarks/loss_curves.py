"""Draws loss_curves.png from loss_curves.json, whose commands made the runs."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
curves = json.loads((HERE / "loss_curves.json").read_text())
steps, plain, fast, other = (
    curves["steps"],
    *(curves["loss"][k] for k in ("plain, seed 0", "fast, seed 0", "fast, seed 1")),
)
figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(steps, plain, lw=4, alpha=0.35, label="plain (float32, eager), seed 0")
left.plot(steps, fast, lw=1.2, label="fast (bf16, one CUDA graph), seed 0")
left.plot(steps, other, lw=1.2, ls="--", label="fast, seed 1")
left.set(xlabel="step, of 32 images", ylabel="loss, mean of 50 steps", ylim=(0.19, 1.05), yscale="log")
for losses, label in ((other, "fast, two seeds"), (plain, "fast and plain, one seed")):
    right.semilogy(steps, [max(1e-5, abs(a - b)) for a, b in zip(fast, losses, strict=True)], label=label)
right.set(xlabel="step", ylabel="difference of the losses", ylim=(4e-6, 0.06))
left.legend(frameon=False)
right.legend(frameon=False, loc="lower center", ncols=2, fontsize=9)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(HERE / "loss_curves.png")
