"""What a long run takes stays what it was: a short version of `make torture`'s."""

import harness
import pytest


def check_flat(done: dict[str, float]) -> None:
    assert done["memory at the end, MiB"] < done["memory early, MiB"] + 16, done
    assert done["open files at the end"] <= done["open files early"] + 2, done
    assert done["CPU ms a step at the end"] < 1.5 * done["CPU ms a step early"], done


def test_memory_open_files_and_the_time_of_a_step_stay_flat_and_metrics_can_be_read_meanwhile(tmp_path):
    done = harness.long_run(tmp_path / "run", steps=600)
    assert done["steps"] == 600 and done["read while written"] > 10
    check_flat(done)


@pytest.mark.slow
def test_and_so_they_do_over_20_000_steps(tmp_path):
    done = harness.long_run(tmp_path / "run", steps=20_000)
    print(done)
    check_flat(done)
