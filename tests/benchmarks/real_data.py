#!/usr/bin/env python3
"""Train on the real data sets, each task in a process of its own, and print what it took:

    python tests/benchmarks/real_data.py --data-dir data                  all three, by default
    python tests/benchmarks/real_data.py --data-dir data --tasks mnist    only some
    python tests/benchmarks/real_data.py --data-dir data --seeds 0 1 2    mean and spread
    python tests/benchmarks/real_data.py --data-dir data --quick          only that it works

First step: seconds from the command to the first training step. Data share: of the training time,
spent on making batches. Memory: the process's peak beyond what importing torch costs.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "deep_learning_deliverable.py"
TASKS = {"mnist": [], "cifar10": [], "sentiment": []}
QUICK = {"mnist": ["--epochs", "2"],
         "cifar10": ["--limit", "4000", "--epochs", "2", "--width", "16"],
         "sentiment": ["--limit", "5000", "--epochs", "2", "--max-tokens", "100"]}
# Far below what is reached: only a broken run fails.
QUICK_LEAST = {"mnist": 0.9, "cifar10": 0.2, "sentiment": 0.55}


def importing_torch_mb():
    """Peak memory of a process that only imports torch."""
    code = "import torch, resource as r; print(r.getrusage(r.RUSAGE_SELF).ru_maxrss / 1024)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def run(task, flags, data_dir):
    """One run: its metrics, with the seconds to the first step and of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), "--task", task, "--data", "real", "--data-dir",
                   data_dir, "--output-dir", folder, *flags]
        started, first = time.perf_counter(), None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                              encoding="utf-8") as process:
            for line in process.stdout:
                if line.startswith("Folder"):  # the last thing said before the first step
                    first = time.perf_counter() - started
        whole = time.perf_counter() - started
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}")
        place = next(Path(folder).glob("*/metrics.json")).parent
        config, metrics = (json.loads((place / f"{name}.json").read_text("utf-8"))
                           for name in ("config", "metrics"))
        return {**config, **metrics, "first": first, "whole": whole}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch_mb = importing_torch_mb()
    print(f"Seeds {args.seeds}\n")
    print("| task | test accuracy | whole process | first step | training | data share | memory |")
    print("|---|---|---|---|---|---|---|")
    for task in args.tasks:
        flags = TASKS[task] + (QUICK[task] if args.quick else [])
        runs = [run(task, [*flags, "--seed", str(seed)], args.data_dir) for seed in args.seeds]
        accuracy = [100 * m["test_accuracy"] for m in runs]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(runs) > 1 else ""

        def median(key, runs=runs):
            return statistics.median(m[key] for m in runs)

        share = statistics.median(m["seconds_data"] / m["seconds_training"] for m in runs)
        print(f"| {task} {' '.join(flags)} | {statistics.mean(accuracy):.2f} %{spread} "
              f"| {median('whole'):.0f} s | {median('first'):.1f} s "
              f"| {median('seconds_training'):.0f} s | {share:.1%} "
              f"| {median('peak_memory_mb') - torch_mb:.0f} MB |", flush=True)
        if args.quick and min(accuracy) < 100 * QUICK_LEAST[task]:
            sys.exit(f"{task} learnt nothing: {min(accuracy):.1f} %")
    print(f"\n{runs[0]['device']}, torch {runs[0]['torch']}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
