"""No training process outlives its test."""

import harness
import pytest


@pytest.fixture(autouse=True)
def none_left():
    yield
    while harness.running:
        process = harness.running.pop()
        process.kill()
        process.join()
