"""Look into a trained run's attention unit: python scripts/analyze.py RUN --only "[gates,correlation]".

Writes RUN/analysis/<name>.json, the numbers, and <name>.png, the picture, of: gates, correlation, importance,
gradients, stability (brief trainings, the slow one).
"""

import sys
from pathlib import Path

from uvit_dia.analysis import AnalyzeConfig, analyze
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


if __name__ == "__main__":
    sys.exit(run(main))
