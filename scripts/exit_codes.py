"""How a script ends: its exit code and, where people can mend what went wrong, one line that says so."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EDQUOT, EFBIG, ENOSPC
from typing import NoReturn

from torch import OutOfMemoryError, distributed

from uvit_dia.errors import UserError


def run(main: Callable[[], int | None]) -> int:
    """The exit code of `main`; a UserError has its own, and the first process of each machine prints it."""
    prints, code = os.environ.get("LOCAL_RANK", "0") == "0", 2
    try:
        return main() or 0
    except UserError as error:
        line, code = str(error), error.exit_code
    except OutOfMemoryError as error:
        why, prints = str(error).partition(". GPU ")[0], True  # the GPU of one process alone may be full
        training = "train.batch_size or raise train.num_accumulation_steps"
        line = f"{why}; lower {training} (sampling: sample.batch_size, scoring: evaluate.batch_size)"
    except OSError as error:  # of files: no permission, a full disk, a folder where a file should be
        if error.filename is None and error.errno not in (ENOSPC, EDQUOT, EFBIG):
            raise
        line = f"{error.filename or 'a file'}: {error.strerror}; mend that, or name another place"
    if prints:
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code


def leave(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process; one of several at once, without the end that NCCL has.

    This was seen to wait for ever after steps that were recorded as CUDA graphs (pytorch issue 115388).
    """
    try:
        code = run(main)
    except Exception:
        if not distributed.is_initialized():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if distributed.is_initialized():
        time.sleep(0.5)  # for what NCCL's threads may still be sending to other hosts
        with suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
