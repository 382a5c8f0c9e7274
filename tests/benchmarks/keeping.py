#!/usr/bin/env python3
"""What keeping costs: the share of the training time that goes into checkpoints and into the way back from a NaN.

    python tests/benchmarks/keeping.py --data-dir data

Trains each task with its own network and the default --checkpoint-every, on fewer samples or for fewer epochs, and
adds up the seconds spent in saving (writing and forcing to the disk included) and in copying the state when an epoch
begins.
"""
import argparse
import contextlib
import functools
import io
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld

CASES = {"cifar10": ["--epochs", "2", "--limit", "25000"], "mnist": ["--epochs", "12"],
         "sentiment": ["--epochs", "2", "--unlabelled", "0.3", "--limit", "15000"],
         "mnist, offline": ["--data", "offline"], "cifar10, offline": ["--data", "offline"],
         "sentiment, offline": ["--data", "offline"]}


def timed(owner, name, spent):
    """Let a method add up the seconds that it takes."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def method(*given):
        started = time.perf_counter()
        try:
            return real(*given)
        finally:
            spent.append(time.perf_counter() - started)
    setattr(owner, name, method)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    saving, copying = [], []
    timed(dld, "save_file", saving)
    timed(dld.State, "snapshot", copying)
    print("| case | training | checkpoints | each | size | copies | each | share of the training |")
    print("|---|---|---|---|---|---|---|---|")
    for case in args.cases:
        saving.clear()
        copying.clear()
        with tempfile.TemporaryDirectory(dir=".") as place:
            flags = ["--task", case.split(",")[0], "--report", "minimal", "--output-dir", place, "--data-dir",
                     args.data_dir, *CASES[case]]
            with contextlib.redirect_stdout(io.StringIO()):
                assert dld.main(flags) == 0
            run, = Path(place).iterdir()
            seconds = json.loads((run / "metrics.json").read_text("utf-8"))["seconds_training"]
            size = (run / "checkpoint.pt").stat().st_size
        saving.pop()  # model.pt, after the training
        cost = sum(saving) + sum(copying)
        each = [f"{len(times)} | {1000 * sum(times) / len(times):.0f} ms" for times in (saving, copying)]
        print(f"| {case} | {seconds:.1f} s | {each[0]} | {size / 1e6:.0f} MB | {each[1]} | {cost / seconds:.2%} |",
              flush=True)


if __name__ == "__main__":
    main()
