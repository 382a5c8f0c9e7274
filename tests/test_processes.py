"""Several processes under torchrun train as one would; a dead one ends all."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs forks and gloo")


def test_several_processes_give_what_one_gives(tmp_path):
    """Three of them: no batch divides evenly."""
    out = tmp_path / "found.pt"
    done = subprocess.run([sys.executable, ROOT / "tests" / "together.py", out, "3"],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    for task, one in found["alone"].items():
        several = found["together"][task]
        assert several["seen"] == one["seen"] == sorted(one["train"]), "each sample once an epoch"
        for what in ("logits", "weights"):
            torch.testing.assert_close(several[what], one[what], atol=1e-4, rtol=0)
        for row, other in zip(one["history"], several["history"], strict=True):
            assert row == pytest.approx(other, abs=1e-4)
    assert "Warning" not in done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_dead_process_ends_all_and_one_goes_on_alone(tmp_path, undrawn):
    run = tmp_path / "mnist-offline-digits"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               SCRIPT, "--task=mnist", "--data=offline", "--epochs=9999", "--width=16",
               "--device=cpu", "--report=minimal", "--limit=100", "--checkpoint-every=0.1s",
               f"--output-dir={tmp_path}"]
    job = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while not (run / "checkpoint.pt").exists():
            assert time.monotonic() < until and job.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        said, _ = job.communicate(timeout=120)
        assert job.returncode != 0, said
    finally:
        job.kill()
    assert metrics_of(run)["status"] in ("running", "failed", "interrupted")
    epochs = dld.load_file(run / "checkpoint.pt", dld.STATE_FORMAT)["epoch"] + 2
    assert dld.main(["--resume", str(run), "--epochs", str(epochs)]) == 0, "one where two were"
    metrics = metrics_of(run)
    assert (metrics["status"], metrics["processes"], metrics["epochs"]) == ("finished", 1, epochs)
    assert len((run / "history.csv").read_text("utf-8").splitlines()) == epochs + 1


def test_a_problem_of_several_processes_is_said_once(monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert dld.main(["--epochs", "0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("--epochs 0") == 1, "the first speaks for all"
