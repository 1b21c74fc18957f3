"""What a long run takes stays what it was: a short version of `make torture`'s."""

import harness


def test_memory_open_files_and_the_time_of_a_step_stay_flat_and_metrics_can_be_read_meanwhile(tmp_path):
    done = harness.long_run(tmp_path / "run", steps=1_000)
    assert done["steps"] == 1_000 and done["read while written"] > 10
    harness.check_flat(done)
