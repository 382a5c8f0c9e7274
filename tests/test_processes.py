"""Several processes under torchrun train as one would; a dead one ends all, and a restart goes on."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import together
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of, small

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(n, *flags, **options):
    return subprocess.Popen([*TORCHRUN, "--nproc-per-node", str(n), *map(str, flags)], cwd=ROOT / "tests",
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", **options)


@pytest.fixture(scope="module")
def alone():
    """One epoch of each task in one process of one thread, as each of several has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {task: together.one_epoch(task, dld.World()) for task in together.TASKS}
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("n", "tasks"), [(2, ["cifar10", "mnist", "sentiment"]), (4, ["mnist"])])
def test_several_processes_give_what_one_gives(n, tasks, alone, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests" / "together.py", tmp_path / "found.pt", str(n), *tasks],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for task, several in found.items():
        one = alone[task]
        assert several["seen"] == one["seen"] == sorted(one["train"]), "each sample once an epoch"
        torch.testing.assert_close(several["logits"], one["logits"], atol=1e-4, rtol=0)
        for name, weight in one["weights"].items():
            # Adam's first steps are as long for gradients that are nothing but rounding, as those of the pixels that
            # are the same in all digits; there one process with two threads differs as much from one with one.
            constant = task == "mnist" and name in ("1.weight", "2.running_mean")
            torch.testing.assert_close(several["weights"][name], weight, atol=1e-3 if constant else 1e-4, rtol=0)
        for row, other in zip(one["history"], several["history"], strict=True):
            assert row == pytest.approx(other, abs=1e-4)


def test_a_dead_process_ends_all_and_a_restart_goes_on(tmp_path):
    flags = ["--task", "mnist", "--data", "offline", "--epochs", "12", "--width", "64", "--report", "minimal",
             "--limit", "900", "--checkpoint-every", "0.1s", "--output-dir", tmp_path]
    job = torchrun(2, "--max-restarts", "1", SCRIPT, *flags)
    run = tmp_path / "mnist-offline-digits"
    try:
        until = time.monotonic() + 60
        while not (run / "checkpoint.pt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        kill_one(job)
        killed, log = time.monotonic(), run / "log.txt"
        while "Resume  after" not in log.read_text("utf-8") and time.monotonic() < killed + 60:
            time.sleep(0.05)
        kill_one(job)  # there is no second restart
        killed = time.monotonic()
        said, _ = job.communicate(timeout=60)
        assert job.returncode != 0 and time.monotonic() - killed < 30, said
    finally:
        job.kill()
    assert log.read_text("utf-8").count("Resume  after") == 1
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
    assert metrics_of(run)["status"] in ("running", "failed") and dld.load_checkpoint(run / "checkpoint.pt", print)
    assert dld.main(["--resume", str(run)]) == 0, "one process goes on where two were"
    metrics = metrics_of(run)
    assert metrics["status"] == "finished" and metrics["processes"] == 1 and metrics["epochs"] == 12
    assert len((run / "history.csv").read_text("utf-8").splitlines()) == 13


def kill_one(job):
    """The last process that this torchrun has started."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


def test_what_several_processes_cannot_do_is_said_once(digits, monkeypatch, capsys):
    config = small("mnist", limit=20, batch_size=1)
    with pytest.raises(dld.UsageError, match="--batch-size 1: 4 processes need a sample each at every step"):
        dld.check_parts(dld.build_data(digits, config), config, dld.World(0, 4))
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert dld.main(["--epochs", "0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("--epochs 0") == 1, "the first process speaks for all"
