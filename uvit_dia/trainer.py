"""Training under accelerate: `build(...)` makes a TrainState, `fit(state, batches)` yields one record a step.

The loop knows nothing of printing, saving or previews. No step waits for the host: a loss or gradient that is
not finite raises a flag on the device that masks every later optimizer step; the host reads it now and then.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import DDPMScheduler
from ema_pytorch import EMA, KarrasEMA
from torch import Tensor, nn

from uvit_dia.checkpoint import BadCheckpoint, Tensors
from uvit_dia.data import Batch, Batches
from uvit_dia.diffusion import DiffusionConfig, denoising_loss, make_scheduler
from uvit_dia.errors import ConfigError, UserError, check_compiler, check_fields
from uvit_dia.random_keys import Stream, torch_generator
from uvit_dia.uvit import UViT


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer steps. The defaults are the official CIFAR-10 recipe."""

    num_steps: int = 500_000  # optimizer steps, whatever the number of processes
    batch_size: int = 128  # images of one optimizer step, over all processes
    num_accumulation_steps: int = 1  # parts in which a process takes its share, for memory
    seed: int = 0  # of the weights, the data's order, noise, timesteps, flips and label drop
    learning_rate: float = 2e-4  # after warm-up
    warmup_steps: int = 2_500  # of linear warm-up; 0: none
    decay: Literal["none", "cosine"] = "none"  # after warm-up: constant, or a half cosine to 0 at num_steps
    betas: tuple[float, float] = (0.99, 0.999)  # of AdamW
    weight_decay: float = 0.03  # on all parameters
    max_grad_norm: float | None = None  # gradients are scaled down to this norm; null: no clipping
    ema_decay: float = 0.9999  # of the averaged weights that are sampled
    posthoc_ema: tuple[float, float] | None = None  # relative widths of two more averages, for --ema_sweep
    label_drop: float = 0.0  # share of labels replaced by model.null_label, for guidance
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network; images, noise, weights are fp32
    compile: bool = False  # torch.compile the network; needs a C++ compiler on a CPU
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    deterministic: bool = False  # bit-exact resume on a GPU too, slower
    log_every: int = 50  # steps between reads of the metrics
    checkpoint_every: int = 10_000  # steps between checkpoints
    keep_checkpoints: int = 3  # the newest ones that stay
    preview_every: int = 10_000  # steps between sample grids; 0: none
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # accelerate's names, e.g. wandb

    def __post_init__(self) -> None:
        zero = ("num_steps", "seed", "warmup_steps", "preview_every", "weight_decay")
        one = ("batch_size", "num_accumulation_steps", "log_every", "checkpoint_every", "keep_checkpoints")
        check_fields("train", self, **dict.fromkeys(zero, 0), **dict.fromkeys(one, 1))
        shares = {"ema_decay": [self.ema_decay], "label_drop": [self.label_drop], "betas": self.betas}
        for name, values in shares.items():
            if not all(0 <= value < 1 for value in values):
                raise ConfigError(f"train.{name}", getattr(self, name), "0 or more and less than 1")
        widths = self.posthoc_ema
        if widths and not 0 < min(widths) < max(widths) < 0.288:  # 1 / sqrt(12) is that of a plain mean
            raise ConfigError("train.posthoc_ema", widths, "two from 0 to 0.288, e.g. [0.05, 0.28]")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"train.{name}", getattr(self, name), "more than 0")


class TrainingDiverged(UserError):
    """Numbers that are not finite ended the run; the last checkpoint is good."""

    exit_code = 3


class Record(NamedTuple):
    """One step: `step` counts from 1; loss (this process's share) and grad_norm are scalars on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float


@dataclass
class SpikeCounter:
    """A spike is a loss above the median of the last 200 by more than 6 robust deviations (1.4826 MAD)."""

    count: int = 0
    losses: list[float] = field(default_factory=list)  # the last 200

    def add(self, loss: float) -> None:
        if len(self.losses) >= 20:  # fewer say nothing of the spread
            middle = median(self.losses)
            deviation = 1.4826 * median(abs(x - middle) for x in self.losses)
            self.count += loss > middle + 6 * deviation
        self.losses = [*self.losses, loss][-200:]


@dataclass
class TrainState:
    """Everything that training changes, and what it needs at hand."""

    config: TrainConfig
    accelerator: Accelerator
    model: UViT  # the bare network: its weights are what is trained
    network: nn.Module  # the same, prepared by accelerate: what is called
    optimizer: AcceleratedOptimizer
    ema: EMA
    scheduler: DDPMScheduler
    gamma: float | None  # diffusion.min_snr_gamma
    stream: torch.cuda.Stream | None  # on which `update` is recorded as a CUDA graph; None: it is not
    bad: Tensor  # bool on the device, sticky: a number was not finite, and no step is taken any more
    taken: Tensor  # on the device: optimizer steps taken with finite numbers
    posthoc: list[KarrasEMA]  # of train.posthoc_ema
    step: int = 0  # the same, of the host
    unread: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (loss, grad_norm) still on the device
    interval: list[list[float]] = field(default_factory=list)  # the same, read, since the last summary
    spikes: SpikeCounter = field(default_factory=SpikeCounter)
    stop_requested: bool = False  # set from a signal handler; all processes agree on it when metrics are read

    def tensors(self) -> Tensors:
        """What a checkpoint holds, by file."""
        named, state = self.model.named_parameters(), self.optimizer.state
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.ema_model.state_dict(),
            **{f"posthoc_{i}": ema.ema_model.state_dict() for i, ema in enumerate(self.posthoc)},
            "optimizer": {f"{name}/{key}": v for name, p in named for key, v in state.get(p, {}).items()},
        }

    def info(self) -> dict[str, Any]:
        """The rest of what a checkpoint holds, as JSON."""
        return {
            "model": dict(self.model.config),
            "ema_step": int(self.ema.step),
            "posthoc_ema": self.config.posthoc_ema,
            "interval": self.interval,
            "spikes": asdict(self.spikes),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
        }

    def load(self, tensors: Tensors, info: dict[str, Any]) -> None:
        """Go on exactly where tensors and info were taken; BadCheckpoint if they are another model's."""
        ours = json.loads(json.dumps(self.info()))  # as a checkpoint has it: tuples are lists
        for key, here in sorted(ours["model"].items()):
            there = info["model"].get(key, here)
            what = f"model.{key} is {there} there and {here} here"
            if not key.startswith("_") and here != there:
                raise BadCheckpoint(f"another model's checkpoint: {what}")
        if (kept := info.get("posthoc_ema")) != ours["posthoc_ema"]:
            raise BadCheckpoint(f"other averages are in the checkpoint: set train.posthoc_ema to {kept}")
        self.model.load_state_dict(tensors["model"])
        self.ema.ema_model.load_state_dict(tensors["ema"])
        for i, ema in enumerate(self.posthoc):
            ema.ema_model.load_state_dict(tensors[f"posthoc_{i}"])
        for ema in (self.ema, *self.posthoc):
            ema.step.fill_(info["ema_step"])
            ema.initted.fill_(info["ema_step"] > 0)
        self.optimizer.state.clear()
        for key, value in tensors["optimizer"].items():
            name, kind = key.rsplit("/", 1)
            self.optimizer.state[self.model.get_parameter(name)][kind] = value.to(self.accelerator.device)
        if self.accelerator.scaler and info["scaler"]:
            self.accelerator.scaler.load_state_dict(info["scaler"])
        self.step, self.interval, self.spikes = info["step"], info["interval"], SpikeCounter(**info["spikes"])
        self.taken.fill_(self.step)


def check_divides(config: TrainConfig, num_processes: int) -> None:
    parts = num_processes * config.num_accumulation_steps
    if config.batch_size % parts:
        what = f"{num_processes} processes x {config.num_accumulation_steps} accumulation steps"
        raise ConfigError("train.batch_size", config.batch_size, f"a multiple of {parts} ({what})")


def build(
    config: TrainConfig, diffusion: DiffusionConfig, model_settings: dict[str, Any], accelerator: Accelerator
) -> TrainState:
    """A TrainState at step 0: the same weights on every process and machine of one kind for one seed."""
    check_divides(config, accelerator.num_processes)
    if config.label_drop and model_settings.get("null_label") is None:
        raise ConfigError("train.label_drop", config.label_drop, "0 for a model without model.null_label")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    device = accelerator.device
    model = UViT(**model_settings).to(device)
    copied = {name for name, _ in model.named_buffers()}  # BatchNorm's statistics
    average: Any = dict(update_every=1, param_or_buffer_names_no_ema=copied)
    constant: Any = dict(beta=config.ema_decay, min_value=config.ema_decay, update_after_step=0)
    # Built on the bare model: it matches by name, and a wrapper's prefix would keep it from ever updating.
    ema = EMA(model, include_online_model=False, use_foreach=True, **constant, **average)
    ema.eval()
    posthoc = [KarrasEMA(model, sigma_rel, **average) for sigma_rel in config.posthoc_ema or ()]
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        check_compiler("train.compile", device.type)
        model.compile()
    graphed = config.compile and device.type == "cuda" and not accelerator.scaler
    rate = torch.tensor(config.learning_rate, device=device) if graphed else config.learning_rate
    options: Any = dict(betas=config.betas, weight_decay=config.weight_decay, fused=True, capturable=graphed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **options)
    stream = torch.cuda.Stream() if graphed else None
    # DDP adds up gradients on the stream that it was built on: the one that is recorded.
    with nullcontext() if stream is None else on(stream):
        network, optimizer = accelerator.prepare(model, optimizer)
        settle(network, model)
    bad, taken = torch.tensor(False, device=device), torch.tensor(0, device=device)
    scheduler, gamma = make_scheduler(diffusion), diffusion.min_snr_gamma
    parts = (config, accelerator, model, network, optimizer, ema, scheduler, gamma)
    return TrainState(*parts, stream, bad, taken, posthoc)


def settle(network: nn.Module, model: UViT) -> None:
    """Have DDP order the gradients that it sums by a first backward pass now, and not after the first step.

    Sums round by their order: the first step after a stop would differ from what it is without one.
    """
    if network is not model:
        size, t = model.config.sample_size, torch.zeros(1, dtype=torch.long, device=model.device)
        x = torch.zeros(1, model.config.in_channels, size, size, device=model.device)
        network.eval()  # statistics of batches stay as they are
        with torch.compiler.set_stance("force_eager"):
            output = network(x, t, None if model.config.num_classes is None else t)
        (output.sample.sum() + (0 if output.penalty is None else output.penalty)).backward()
        network.train().zero_grad()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the optimizer step after `step` steps."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.decay == "none":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * min(1.0, done))) / 2


def fit(state: TrainState, batches: Batches) -> Iterator[Record]:
    """Train from state.step to num_steps, or until state.stop_requested; yields after each optimizer step.

    TrainingDiverged names the step and the first bad module once the host has read of such a number.
    """
    config, alone, stop = state.config, state.accelerator.num_processes == 1, False
    run: Any = update if state.stream is None else GraphedUpdate(state.stream)
    stream = batches.from_step(state.step)
    state.network.train()
    while state.step < config.num_steps and not stop:
        batch, rate = next(stream), learning_rate(config, state.step)
        for group in state.optimizer.param_groups:  # a CUDA graph reads the rate from a tensor
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        loss, grad_norm = run(state, batch.images, *draw(state, batch))
        for ema in state.posthoc:  # outside the CUDA graph, since their decay changes with the step
            ema.update()
        state.step += 1
        state.unread.append((loss, grad_norm))
        reads = state.step % config.log_every == 0 or state.step % config.checkpoint_every == 0
        if reads or state.step == config.num_steps or (alone and state.stop_requested):
            first_bad, stop = agree(state)
            if first_bad >= 0:
                del run  # and a graph's memory
                raise TrainingDiverged(explain(state, batches, first_bad))
        yield Record(state.step, loss, grad_norm, rate)


def micro_batches(count: int, *inputs: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """The parts, one an accumulation step, in which a process takes its share of the batch."""
    return zip(*([None] * count if x is None else x.chunk(count) for x in inputs), strict=True)


def update(state: TrainState, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The step on the device, from the inputs of `loss_of` to the averaged weights; nothing asks the host."""
    config, accelerator, optimizer = state.config, state.accelerator, state.optimizer
    count = config.num_accumulation_steps
    loss = torch.zeros((), device=accelerator.device)
    for i, micro_batch in enumerate(micro_batches(count, *inputs), 1):
        with nullcontext() if i == count else accelerator.no_sync(state.network):
            micro = loss_of(state, *micro_batch) / count
            # After a loss that is not finite every gradient is nan, on every process: none takes the step.
            good = torch.isfinite(micro.detach()) & ~state.bad
            accelerator.backward(micro * torch.where(good, 1.0, math.nan))
        loss += micro.detach()
    accelerator.unscale_gradients(optimizer)  # of fp16 alone
    parameters = list(state.model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, grad_norm)
    state.bad |= ~torch.isfinite(loss)
    if not accelerator.scaler:  # with loss scaling an overflow is routine, and the scaler skips the step
        state.bad |= ~torch.isfinite(grad_norm)
        optimizer.optimizer.found_inf = state.bad.float()  # fused AdamW then leaves the weights alone
    state.taken += ~state.bad
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.ema.update()
    return loss, grad_norm


@contextmanager
def on(stream: torch.cuda.Stream) -> Iterator[None]:
    """On this stream, after all that was launched and before all that will be."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class GraphedUpdate:
    """`update` as one CUDA graph: at small batches launching a step takes longer than running it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.graph = stream, torch.cuda.CUDAGraph()
        self.left = 11  # steps before that: DDP times its first ten
        self.inputs: list[Tensor] = []  # where the graph reads and writes
        self.outputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, state: TrainState, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.left:  # eagerly, which compiles, allocates and gives the average its constant decay
            self.left -= 1
            with on(self.stream):
                return update(state, *inputs)
        given = [x for x in inputs if x is not None]
        if self.outputs is None:
            self.inputs = [x.clone() for x in given]
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = update(state, *self.inputs, *inputs[len(given) :])  # labels may be None
            state.ema.step -= 1  # recorded, not yet done
        torch._foreach_copy_(self.inputs, given)
        self.graph.replay()
        state.ema.step += 1
        loss, grad_norm = self.outputs
        return loss.clone(), grad_norm.clone()


def loss_of(state: TrainState, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    x_t = state.scheduler.add_noise(x0, noise, t)
    output = state.network(x_t, t, labels)
    loss = denoising_loss(output.sample, state.scheduler, state.gamma, x0, noise, t)
    return loss if output.penalty is None else loss + output.penalty


def draw(state: TrainState, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise (b, C, H, W), timesteps (b,), labels (b,) after label drop: the global batch's, sliced."""
    config, accelerator, device = state.config, state.accelerator, state.accelerator.device
    total, share = config.batch_size, config.batch_size // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    def keyed(stream: Stream) -> dict[str, Any]:
        return {"generator": torch_generator(config.seed, stream, batch.step, device), "device": device}

    noise = torch.randn(total, *batch.images.shape[1:], **keyed(Stream.NOISE))[mine]
    num_timesteps, model = state.scheduler.config.num_train_timesteps, state.model.config
    t = torch.randint(num_timesteps, (total,), **keyed(Stream.TIMESTEPS))[mine]
    labels = None if model.num_classes is None else batch.labels
    if config.label_drop:  # there is a null_label then
        drop = torch.rand(total, **keyed(Stream.LABEL_DROP))[mine] < config.label_drop
        labels = torch.where(drop, model.null_label, batch.labels)
    return noise, t, labels


def agree(state: TrainState) -> tuple[int, bool]:
    """Wait; read the metrics, and what all processes know: the first bad step (-1: none), whether to stop."""
    values = torch.stack([torch.stack(pair).float() for pair in state.unread])  # (steps, 2)
    state.interval += state.accelerator.reduce(values, reduction="mean").tolist()
    state.unread.clear()
    stop = torch.full_like(state.taken, state.stop_requested)
    flags = torch.stack([torch.where(state.bad, state.taken, -1), stop])
    first_bad, stop = state.accelerator.gather(flags[None]).max(dim=0).values.tolist()
    scaler = state.accelerator.scaler
    if scaler and scaler.get_scale() < 1e-3:
        what = f"step {state.step}: the fp16 loss scale fell to {scaler.get_scale():g}"
        raise TrainingDiverged(f"{what}; use train.precision bf16 or a lower train.learning_rate")
    return first_bad, bool(stop)


def summary(state: TrainState) -> dict[str, float]:
    """Mean loss and gradient norm of the steps since the last summary, which fit has read; counts spikes."""
    losses = [loss for loss, _ in state.interval]
    norms = [norm for _, norm in state.interval if math.isfinite(norm)]  # fp16 skips the steps that overflow
    state.interval.clear()
    for loss in losses:
        state.spikes.add(loss)
    return {
        "step": state.step,
        "images": state.step * state.config.batch_size,
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / max(1, len(norms)),
        "lr": learning_rate(state.config, state.step - 1),
        "spikes": state.spikes.count,
    }


def explain(state: TrainState, batches: Batches, step: int) -> str:
    """Replay a bad step, whose weights the mask has kept, and name where the first bad number arose."""
    batch, model, bad = next(batches.from_step(step)), state.model, []

    def look(what: str, *found: Any) -> None:
        if not all(x.isfinite().all() for x in found if isinstance(x, Tensor)):
            bad.append(what)

    def look_at_output(module: nn.Module, args: Any, output: Any, name: str) -> None:
        look(f"the output of {name}", *(output if isinstance(output, tuple) else (output,)))

    look("the images", batch.images)
    for name, weight in model.named_parameters():
        look(f"the weight {name}", weight)
    hooks = [m.register_forward_hook(partial(look_at_output, name=n)) for n, m in model.named_modules() if n]
    model.zero_grad()
    with torch.compiler.set_stance("force_eager"):  # compiled code runs no hooks
        for inputs in micro_batches(state.config.num_accumulation_steps, batch.images, *draw(state, batch)):
            loss_of(replace(state, network=model), *inputs).backward()
    for hook in hooks:
        hook.remove()
    for name, weight in reversed(list(model.named_parameters())):
        look(f"the gradient of {name}", weight.grad)
    bad.append("numbers that a replay does not show, as those of another process's share of the batch")
    return f"step {step + 1}: not finite in {bad[0]}; the last checkpoint is good"
