"""The objective against closed forms, and every sampler against a denoiser that knows the answer."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from uvit_dia.diffusion import (
    SAMPLERS,
    DiffusionConfig,
    denoising_loss,
    loss_weight,
    make_sampler,
    make_scheduler,
    target,
)
from uvit_dia.errors import ConfigError

SCHEDULES = ["linear", "cosine", "sigmoid"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_make_the_three_objectives_one(gamma):
    x0, eps, wrong = torch.randn(3, 6, 1, 4, 4).unbind(0)
    t = torch.tensor([0, 10, 200, 500, 900, 999])
    losses = []
    for prediction in PREDICTIONS:
        scheduler = make_scheduler(DiffusionConfig(prediction_type=prediction))
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = scheduler.add_noise(x0, eps, t)
        # one and the same wrong x0, told in each parameterisation
        wrong_eps = (x_t - a.sqrt() * wrong) / (1 - a).sqrt()
        told = {
            "epsilon": wrong_eps,
            "sample": wrong,
            "v_prediction": a.sqrt() * wrong_eps - (1 - a).sqrt() * wrong,
        }
        losses.append(denoising_loss(told[prediction], scheduler, gamma, x0, eps, t))
    assert torch.allclose(losses[0], losses[1], rtol=1e-2) and torch.allclose(losses[1], losses[2], rtol=1e-2)


def test_min_snr_weights_equal_their_formulas():
    t = torch.tensor([1, 300, 999])
    for prediction in PREDICTIONS:
        scheduler = make_scheduler(DiffusionConfig(prediction_type=prediction))
        for weight, ratio in zip(loss_weight(scheduler, t, 5.0), compute_snr(scheduler, t), strict=True):
            r = ratio.item()
            formulas = {"epsilon": min(1, 5 / r), "sample": min(r, 5), "v_prediction": min(r, 5) / (r + 1)}
            assert weight.item() == pytest.approx(formulas[prediction])


def test_velocity_is_the_derivative_of_x_t_along_the_angle():
    scheduler = make_scheduler(DiffusionConfig(prediction_type="v_prediction"))
    x0, eps = torch.randn(2, 1, 1, 2, 2).double().unbind(0)
    a = scheduler.alphas_cumprod[400].double()
    angle = torch.arctan((1 - a).sqrt() / a.sqrt())
    x = lambda phi: torch.cos(phi) * x0 + torch.sin(phi) * eps  # noqa: E731
    numeric = (x(angle + 1e-6) - x(angle - 1e-6)) / 2e-6
    assert torch.allclose(target(scheduler, x0, eps, torch.tensor([400])), numeric, atol=1e-5)


def test_schedules_are_the_ones_of_the_papers():
    linear, cosine, sigmoid = (make_scheduler(DiffusionConfig(beta_schedule=name)) for name in SCHEDULES)
    assert torch.allclose(linear.betas, torch.linspace(1e-4, 0.02, 1000))
    k = torch.tensor([100.0, 500.0])
    f = lambda s: torch.cos((s / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2  # noqa: E731 arXiv 2102.09672, eq. 17
    assert torch.allclose(cosine.alphas_cumprod[[99, 499]], f(k) / f(torch.zeros(1)), atol=1e-4)
    assert torch.allclose(sigmoid.betas, DDPMScheduler(beta_schedule="sigmoid").betas)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_finds_the_answer_of_a_denoiser_that_knows_it(name, prediction, schedule):
    scheduler = make_scheduler(DiffusionConfig(beta_schedule=schedule, prediction_type=prediction))
    sampler = make_sampler(name, scheduler)
    sampler.set_timesteps(50)
    answer = torch.rand(2, 1, 4, 4) * 1.6 - 0.8
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        a = scheduler.alphas_cumprod[t]
        eps = (x - a.sqrt() * answer) / (1 - a).sqrt()
        x = sampler.step(target(scheduler, answer, eps, t[None]), t, x).prev_sample
    assert torch.allclose(x, answer, atol=2e-2)


def test_sampling_starts_at_the_last_timestep():
    scheduler = make_scheduler(DiffusionConfig())
    for name in ("ddpm", "ddim"):
        sampler = make_sampler(name, scheduler)
        sampler.set_timesteps(10)
        assert sampler.timesteps[0] == 999


def test_a_wrong_name_is_told_with_its_neighbour():
    with pytest.raises(ConfigError, match="did you mean 'ddim'"):
        make_sampler("ddimm", make_scheduler(DiffusionConfig()))
    with pytest.raises(ConfigError, match=r"diffusion\.min_snr_gamma"):
        DiffusionConfig(min_snr_gamma=0.0)
