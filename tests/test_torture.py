"""A short run of benchmarks/torture.py: killed at random instants, a run ends as if undisturbed."""
import subprocess
import sys

import pytest
from conftest import ROOT

# Figures are empty: most of a run's life is then training and saving.
CODE = """import torture
from PIL import Image
torture.matplotlib.figure.Figure.savefig = lambda figure, file, **more: (
    Image.new("L", (8, 8)).save(file, "png"))
torture.CASES["mnist"] = ["--task", "mnist", "--width", "64", "--limit", "300", "--epochs", "8",
                          "--schedule", "constant"]
print(torture.torture(2, ["mnist"], seed=0, each=2))"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads other processes' clocks")
def test_killed_runs_end_as_undisturbed_ones():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT / "tests" / "benchmarks",
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 kills survived" in done.stdout and "'SIGKILL': 1" in done.stdout
