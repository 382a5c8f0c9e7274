#!/usr/bin/env python3
"""What keeping costs: the share of the training time that goes into checkpoints.

    python tests/benchmarks/keeping.py --data-dir data

Trains each task with its own network and the default --checkpoint-every, on fewer samples or for
fewer epochs, and adds up the seconds spent in saving (writing and forcing to the disk included).
"""
import argparse
import contextlib
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


SAVING = []  # seconds of each


def save(*given, real=dld.save_file):
    started = time.perf_counter()
    real(*given)
    SAVING.append(time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    dld.save_file = save
    print("| case | training | checkpoints | each | size | share of the training |")
    print("|---|---|---|---|---|---|")
    for case in args.cases:
        SAVING.clear()
        with tempfile.TemporaryDirectory(dir=".") as place:
            flags = ["--task", case.split(",")[0], "--report", "minimal", "--output-dir", place,
                     "--data-dir", args.data_dir, *CASES[case]]
            with contextlib.redirect_stdout(io.StringIO()):
                assert dld.main(flags) == 0
            run, = Path(place).iterdir()
            metrics = json.loads((run / "metrics.json").read_text("utf-8"))
            size = (run / "checkpoint.pt").stat().st_size
        SAVING.pop()  # model.pt, after the training
        cost, seconds = sum(SAVING), metrics["seconds_training"]
        print(f"| {case} | {seconds:.1f} s | {len(SAVING)} | {1000 * cost / len(SAVING):.0f} ms "
              f"| {size / 1e6:.0f} MB | {cost / seconds:.2%} |", flush=True)


if __name__ == "__main__":
    main()
