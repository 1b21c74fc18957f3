"""What tests of several modules need."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def alone():
    """accelerate keeps one state a process: each test starts without; one thread, to be exact and fair."""
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
