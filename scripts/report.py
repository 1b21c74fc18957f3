"""Write the report.html of a run or of a grid of runs: python scripts/report.py RUN_OR_GRID."""

import sys
from pathlib import Path

from uvit_dia.config import Parser
from uvit_dia.errors import run
from uvit_dia.report import write_page


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run's folder")
    print(write_page(Path(parser.parse_args().run)))


if __name__ == "__main__":
    sys.exit(run(main))
