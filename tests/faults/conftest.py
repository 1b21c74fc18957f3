"""No training process outlives its test."""

import harness
import pytest
import torch

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def none_left():
    yield
    while harness.running:
        process = harness.running.pop()
        process.kill()
        process.join()


@pytest.fixture(params=[pytest.param("", id="cpu"), pytest.param("0,1", id="gpus", marks=needs_two)])
def gpus(request) -> str:
    """What two processes run on: the CPU, and two GPUs where there are."""
    return request.param
