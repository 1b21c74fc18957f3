"""Random numbers keyed by what they are for, so that no generator state has to be carried or saved."""

from enum import IntEnum

import numpy as np
import torch

Device = torch.device | str


class Stream(IntEnum):
    """One stream a purpose; the numbers are part of what a seed means and never change."""

    ORDER = 0
    NOISE = 1
    TIMESTEPS = 2
    FLIPS = 3
    LABEL_DROP = 4
    PREVIEWS = 5
    SAMPLING = 6


def numpy_generator(seed: int, stream: Stream, counter: int) -> np.random.Generator:
    """The generator of one key: equal keys, equal numbers on every machine; other keys, independent ones."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, counter]))


def torch_generator(seed: int, stream: Stream, counter: int, device: Device = "cpu") -> torch.Generator:
    """The same for torch: numbers agree between devices of one model."""
    state = np.random.SeedSequence([seed, stream, counter]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)  # 63 bits: torch takes a signed integer
