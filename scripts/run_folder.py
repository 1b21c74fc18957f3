"""A run's folder: what is where, the newest good checkpoint, and what a crash left."""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from uvit_dia.checkpoint import BadCheckpoint, folders, read


class RunFolder:
    """Where a run keeps its config, metrics, checkpoints, exported pipeline, samples, scores and report."""

    def __init__(self, root: Path | str) -> None:
        self.root = root = Path(root)
        self.config, self.metrics = root / "config.yaml", root / "metrics.jsonl"
        self.checkpoints, self.pipeline = root / "checkpoints", root / "pipeline"
        self.samples, self.evaluation = root / "samples", root / "evaluation"
        self.posthoc, self.report = root / "posthoc", root / "report.html"

    def newest_good(self) -> Path | None:
        """The newest checkpoint that reads as written, or None; newer, bad ones are named and set aside.

        BadCheckpoint, and nothing touched, where there are checkpoints of which none is good.
        """
        bad = []
        for folder in folders(self.checkpoints):
            try:
                read(folder)
            except BadCheckpoint as error:
                bad.append((folder, error))
                continue
            for other, why in bad:
                target = other.with_name(f"bad_{other.name}")
                print(f"warning: {why}; passed over, to be {target.name} from now on", file=sys.stderr)
                shutil.rmtree(target, ignore_errors=True)
                with suppress(OSError):  # a read-only disk
                    other.rename(target)
            return folder
        if bad:
            raise BadCheckpoint(f"{bad[0][1]}, and no other is good; to start anew name another output_dir")
        return None

    def mend(self) -> None:
        """Undo or clear away what a crash left of `aside`. Nobody else may be writing in the folder."""
        for pattern in (".pipeline.*", ".metrics.*", ".config.*", "*/.step_*"):
            for left in list(self.root.glob(pattern)):
                if left.suffix == ".old" and not (place := left.with_name(left.stem[1:])).exists():
                    left.rename(place)  # the crash came between the two renames
                else:
                    shutil.rmtree(left, ignore_errors=True)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one torn by a crash is left out."""
        records = []
        for line in self.metrics.read_text().splitlines() if self.metrics.is_file() else []:
            with suppress(ValueError):
                records.append(json.loads(line))
        return records
