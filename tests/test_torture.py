"""A short run of benchmarks/torture.py: killed at random instants, a run ends as if undisturbed."""
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="it reads other processes' clocks")
def test_killed_runs_end_as_undisturbed_ones():
    done = subprocess.run([sys.executable, ROOT / "tests" / "benchmarks" / "torture.py", "--kills",
                           "3", "--each", "3", "--cases", "mnist"], capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 kills survived" in done.stdout and "'SIGKILL': 1" in done.stdout
