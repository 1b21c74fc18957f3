"""What tests of several modules need."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

if not torch.cuda.is_available():  # read when Triton is first imported: its kernels run step by step then
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def alone():
    """accelerate keeps one state a process: each test starts without; one thread, to be exact and fair."""
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
