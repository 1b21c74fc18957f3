"""What people can mend: one line that says what, where and what to do, and exit code 2."""

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any


class UserError(Exception):
    """Something outside the code is wrong: input, file, machine. The message is the line that people read."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is wrong: `ConfigError("train.batch_size", 100, "a multiple of 8")`."""

    def __init__(self, key: str, value: Any, expected: str) -> None:
        super().__init__(f"{key}: {value!r} will not do; expected {expected}")


def check_least(section: str, settings: Any, **least: float) -> None:
    """ConfigError for the first field of `settings` that is below its bound."""
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:  # nan is neither
            raise ConfigError(f"{section}.{name}", getattr(settings, name), f"{bound} or more")


def nearest(name: str, known: list[str]) -> str:
    """The end of an error line that offers the nearest known name: "; did you mean 'x'?", or nothing."""
    matches = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_of(name: str, known: list[str]) -> str:
    """What was expected where a name is not known."""
    return f"one of {', '.join(known)}{nearest(name, known)}"


def run(main: Callable[[], int | None]) -> int:
    """The exit code of `main`; a UserError has its own, and the first process of each machine prints it."""
    try:
        return main() or 0
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
