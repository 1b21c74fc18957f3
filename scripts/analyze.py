"""Look into a trained run's attention unit: python scripts/analyze.py RUN --only "[gates,correlation]".

Writes RUN/analysis/<name>.json, the numbers, and <name>.png, the picture, of: gates, correlation, importance,
gradients, stability (brief trainings, the slow one).
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from uvit_dia.analysis import ANALYSES, AnalyzeConfig, Subject
from uvit_dia.config import Parser
from uvit_dia.errors import run
from uvit_dia.trainer import make_accelerator


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_settings(AnalyzeConfig)
    given = parser.parse_args().as_dict()
    root = Path(given.pop("run"))
    for path in analyze(root, AnalyzeConfig(**given), make_accelerator("fp32")):
        print(path, flush=True)
    return 0


def analyze(root: Path, options: AnalyzeConfig, accelerator: Accelerator) -> Iterator[Path]:
    """Write RUN/analysis/<name>.json and .png for each analysis that is asked for; yields each path."""
    subject = Subject(root, options, accelerator)
    about = {**subject.about, "run": str(root), "analysis": asdict(options)}
    (root / "analysis").mkdir(exist_ok=True)
    for name in options.only:
        numbers, figure = ANALYSES[name](subject)
        text = json.dumps({"about": about, **numbers}, default=Tensor.tolist)
        without_nan = json.loads(text, parse_constant=lambda constant: None)  # which JSON has not
        target = root / "analysis" / f"{name}.json"
        target.write_text(json.dumps(without_nan, indent=1) + "\n")
        figure.suptitle(f"{root.name}, step {subject.about.get('step', '?')}: {name}")
        figure.savefig(target.with_suffix(".png"), dpi=110, bbox_inches="tight")
        yield from (target, target.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(run(main))
