"""What people can mend: one line that says what, where and what to do, and an exit code."""

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


class UserError(Exception):
    """Something outside the code is wrong: input, file, machine. The message is the line that people read."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is wrong: `ConfigError("train.batch_size", 100, "a multiple of 8")`."""

    def __init__(self, key: str, value: Any, expected: str) -> None:
        super().__init__(f"{key}: {value!r} will not do; expected {expected}")


def check_fields(section: str, settings: Any, **least: float) -> None:
    """ConfigError for the first field below its bound or, of a dataclass, none of its Literal's choices."""
    for field in fields(settings) if is_dataclass(settings) else ():
        value, choices = getattr(settings, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            raise ConfigError(f"{section}.{field.name}", value, one_of(str(value), list(choices)))
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:  # nan is neither
            raise ConfigError(f"{section}.{name}", getattr(settings, name), f"{bound} or more")


def check_place(option: str, path: str, suffixes: Iterable[str] = ()) -> None:
    """ConfigError, before long work, unless a folder (with suffixes: a file) can be written at `path`."""
    place, names = Path(path), sorted(suffixes)
    if names and place.suffix.lower() not in names:
        raise ConfigError(option, path, f"a file name that ends in {' or '.join(names)}")
    there = next(part for part in (place, *place.parents) if part.exists())
    folder_wanted = there != place or not names
    if not path or there.is_dir() != folder_wanted or not os.access(there, os.W_OK):
        raise ConfigError(option, path, f"a place where a {'file' if names else 'folder'} can be written")


def check_compiler(key: str, device_type: str) -> None:
    """ConfigError where torch.compile would fail at the first step: on a CPU it needs a C++ compiler."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device_type == "cpu" and shutil.which(compiler.split()[0]) is None:
        raise ConfigError(key, True, f"false, or a C++ compiler: there is no {compiler} (CXX names another)")


def nearest(name: str, known: list[str]) -> str:
    """The end of an error line that offers the nearest known name: "; did you mean 'x'?", or nothing."""
    matches = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_of(name: str, known: list[str]) -> str:
    """What was expected where a name is not known."""
    return f"one of {', '.join(known)}{nearest(name, known)}"
