"""A short run of benchmarks/torture.py: killed at random instants, a run ends as if nothing had happened."""
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_killed_runs_end_as_undisturbed_ones():
    done = subprocess.run([sys.executable, ROOT / "tests" / "benchmarks" / "torture.py", "--kills", "4", "--each", "4",
                           "--cases", "mnist"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 kills survived, 1 runs equal" in done.stdout and "SIGKILL" in done.stdout
