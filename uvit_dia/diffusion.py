"""Noise, targets and weights (DDPM: Ho et al. 2020, arXiv 2006.11239) over diffusers schedulers."""

from dataclasses import dataclass
from typing import Any, Literal

import diffusers
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor

from uvit_dia.errors import ConfigError, check_fields, one_of

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What the network learns to predict, and under which noise."""

    num_train_timesteps: int = 1000  # k = 0 .. 999 is the official code's continuous time 999t
    beta_schedule: Literal["linear", "cosine", "sigmoid"] = "linear"  # linear: 1e-4 to .02, the official one
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"  # sample: x0
    min_snr_gamma: float | None = None  # caps the weight of easy timesteps (arXiv 2303.09556); 5 is usual

    def __post_init__(self) -> None:
        check_fields("diffusion", self, num_train_timesteps=1)
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ConfigError("diffusion.min_snr_gamma", self.min_snr_gamma, "null or more than 0")


def make_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """The scheduler that training and the saved pipeline share."""
    num_steps, name, betas = config.num_train_timesteps, config.beta_schedule, None
    if name == "sigmoid":  # only DDPM knows the name, so the others are given its numbers
        name, betas = "linear", DDPMScheduler(num_steps, beta_schedule="sigmoid").betas.tolist()
    return DDPMScheduler(
        num_train_timesteps=num_steps,  # by name: diffusers takes a positional argument for a default
        beta_schedule="squaredcos_cap_v2" if name == "cosine" else name,
        trained_betas=betas,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",  # sampling starts at the last timestep whatever the number of steps
    )


def make_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """A sampler by name over the noise process of `scheduler`; ConfigError for an unknown name."""
    if name not in SAMPLERS:
        raise ConfigError("sampler", name, one_of(name, list(SAMPLERS)))
    # At the cosine schedule's noisy end log-SNR falls without bound, and multistep solvers make outliers.
    # DPM-Solver++ can leave that end out; UniPC can't, so its x0 is clipped (maximum 1: no dynamic one).
    cosine = scheduler.config.beta_schedule == "squaredcos_cap_v2"
    extra = {
        "dpm-solver++": {"lambda_min_clipped": -5.1} if cosine else {},
        "unipc": {"thresholding": cosine, "sample_max_value": 1.0},
    }
    return SAMPLERS[name].from_config(scheduler.config, **extra.get(name, {}))


def target(scheduler: DDPMScheduler, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network should predict, of x0's shape (B, C, H, W)."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return eps
        case "sample":
            return x0
        case "v_prediction":  # sqrt(a) eps - sqrt(1 - a) x0 (arXiv 2202.00512, appendix D)
            return scheduler.get_velocity(x0, eps, t)
        case other:
            raise ValueError(f"no prediction_type: {other!r}")


def loss_weight(scheduler: DDPMScheduler, t: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, section 3.4), (B,), for the prediction type."""
    ratio = compute_snr(scheduler, t)
    capped = ratio.clamp(max=gamma)  # the weight of the x0 loss
    loss_over_x0_loss: dict[str, Any] = {"epsilon": ratio, "sample": 1, "v_prediction": ratio + 1}
    return capped / loss_over_x0_loss[scheduler.config.prediction_type]


def denoising_loss(
    prediction: Tensor, scheduler: DDPMScheduler, gamma: float | None, x0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """Mean squared error of a prediction (B, C, H, W) at x_t, weighted by timestep; a float32 scalar."""
    error = (prediction.float() - target(scheduler, x0, eps, t)).square().mean(dim=(1, 2, 3))  # (B,)
    return error.mean() if gamma is None else (error * loss_weight(scheduler, t, gamma)).mean()
