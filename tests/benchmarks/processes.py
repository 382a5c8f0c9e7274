#!/usr/bin/env python3
"""One process with as many threads as there are cores, against as many processes of one thread:

    python tests/benchmarks/processes.py --data-dir data
    torchrun --nproc-per-node 2 tests/benchmarks/processes.py --sum

The second: how long summing gradients takes by itself. The first: each task's own network, the same
settings for both, in turn, so that a machine that slows down slows both. Time: that of the training
alone, without validation, as metrics.json has it.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld

CASES = {"cifar10": ["--no-views", "--limit", "3000", "--epochs", "2"],
         "mnist": ["--no-views", "--limit", "20000", "--epochs", "5"],
         "sentiment": ["--limit", "1500", "--epochs", "2", "--unlabelled", "0"]}


def train(task, processes, threads, flags, place):
    """Seconds of the training."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), dld.__file__, "--task", task,
               "--report", "minimal", "--output-dir", str(place), *flags]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    newest = max(place.glob("*/metrics.json"), key=lambda path: path.stat().st_mtime)
    metrics = json.loads(newest.read_text("utf-8"))
    assert metrics["processes"] == processes
    return metrics["seconds_training"]


def time_sums():
    """Milliseconds that the processes take to add up tensors of these sizes: median of 20."""
    group = dld.join_group()
    torch.set_num_threads(1)
    for megabytes in (0.004, 1, 4, 16, 64):
        x, times = torch.ones(int(megabytes * 250_000)), []
        for _ in range(25):
            group.any(True)
            started = time.perf_counter()
            group.sum(x)
            times.append(time.perf_counter() - started)
        if group.is_leader:
            middle = statistics.median(times[5:])
            print(f"{megabytes} MB over {group.size} processes: {1000 * middle:.2f} ms, "
                  f"{megabytes / middle:,.0f} MB/s")
    torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--sum", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.sum:
        time_sums()
        return
    n = args.processes
    print(f"| task | one process, {n} threads | {n} processes, one thread | ratio of medians |")
    print("|---|---|---|---|")
    for task in args.tasks:
        flags = [*CASES[task], "--data-dir", args.data_dir, "--data", "real"]
        one, several = [], []
        with tempfile.TemporaryDirectory(dir=".") as place:
            for _ in range(args.repeats):
                one.append(train(task, 1, n, flags, Path(place)))
                several.append(train(task, n, 1, flags, Path(place)))
        shown = [", ".join(f"{seconds:.1f}" for seconds in times) for times in (one, several)]
        ratio = statistics.median(several) / statistics.median(one)
        print(f"| {task} | {shown[0]} s | {shown[1]} s | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
