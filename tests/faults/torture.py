"""The long version of the crash test and of the long run: make torture. Exit code 0: nothing was lost."""

import argparse
import json
import tempfile
from pathlib import Path

import harness

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which processes are killed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.kills:
            folder = Path(place) / "crashes" / "run"
            done = harness.crash_again_and_again(folder, options.kills, options.seed, longest=0.3)
            print(json.dumps(done), flush=True)
        if options.steps:
            done = harness.long_run(Path(place) / "long" / "run", options.steps)
            print(json.dumps(done), flush=True)
            harness.check_flat(done)
