"""The benchmark: its reference column is the official recipe, which gives the golden outputs and learns."""

import gc
import importlib.util
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import run_config
import torch
from accelerate import Accelerator
from test_uvit import golden

from uvit_dia.data import Batches, load_images
from uvit_dia.uvit import UViT

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("name", ["uvit_uncond", "uvit_class_cond"])
def test_the_reference_network_gives_the_official_outputs(name, tmp_path):
    settings, weights, tensors = golden(name)
    torch.save(weights, tmp_path / "nnet.pth")
    ours = UViT.from_official(tmp_path / "nnet.pth", num_heads=int(settings["num_heads"]))
    plain = benchmark.reference_model({k: v for k, v in ours.config.items() if k[0] != "_"})
    plain.load_state_dict(weights)
    inputs = (tensors["input.sample"], tensors["input.timestep"], tensors.get("input.class_labels"))
    with torch.no_grad():
        assert torch.allclose(plain.eval()(*inputs).sample, tensors["output.sample"], atol=1e-4)


def test_the_reference_recipe_learns():
    settings = run_config.load(ROOT / "configs" / "digits.yaml")
    small = settings.model | {"embed_dim": 32, "depth": 2}
    settings = replace(settings, model=small, train=replace(settings.train, warmup_steps=5))
    batches = Batches(load_images(settings.data, "train", 8, 1), settings.data, 32, 0, "cpu")
    torch.manual_seed(0)
    model = benchmark.reference_model(settings.model)
    steps = benchmark.reference_steps(model, settings, batches, Accelerator(cpu=True))
    losses = torch.stack(list(islice(steps, 120)))
    assert losses[-20:].mean() < 0.8 * losses[:5].mean()


def test_counting_activations_leaves_none_in_memory():
    model = UViT(sample_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), None)
    before = alive()
    small, large = (
        benchmark.activations(model, inputs),
        benchmark.activations(model, (inputs[0].repeat(3, 1, 1, 1), 5, None)),
    )
    assert 2.5 * small < large < 3.5 * small and alive() <= before
