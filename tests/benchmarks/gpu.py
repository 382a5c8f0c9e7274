#!/usr/bin/env python3
"""What a GPU makes of the program, in under nine minutes:

    python tests/benchmarks/gpu.py --data-dir data                   all that there is time for
    python tests/benchmarks/gpu.py --data-dir data --seeds 1 --minutes 3 --flags=--limit=2000

Whatever --data-dir lacks is left out. In this order: the tests of the GPU path, on the real one;
the speed of a training step as a share of what matrix products reach; CIFAR-10 by its recipe and by
shorter ones, from several seeds each (the records are measured at 94 %: an A100 takes 1.98 s,
hiverge October 2025, or 2.59 s, airbench, of training alone and on all 50,000 pictures); the other
tasks' defaults; recorded steps against single kernels and against --compile; the same model on the
CPU. Tables in Markdown, for RESULTS.md.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import deep_learning_deliverable as dld  # noqa: E402

SHOWN = ("test_accuracy", "val_accuracy", "seconds_training", "whole", "samples_per_second",
         "peak_memory_mb")
EAGER = """import sys, deep_learning_deliverable as dld
class Plain(dld.Stepper):
    def record(self, x, y):
        return False
dld.Stepper = Plain
sys.exit(dld.main(sys.argv[1:]))"""


def run(args, *flags, eager=False, folder=None):
    """The numbers of one run, as its user starts it."""
    with tempfile.TemporaryDirectory() as scratch:
        where = folder or scratch
        start = ["-c", EAGER] if eager else [str(ROOT / "deep_learning_deliverable.py")]
        command = [sys.executable, *start, "--data-dir", args.data_dir, "--data", "real",
                   "--device", args.device, "--output-dir", str(where), *flags, *args.flags]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        whole = time.perf_counter() - started
        if done.returncode:
            print(f"left out: {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
            return None
        found = max(Path(where).glob("*/metrics.json"), key=lambda file: file.stat().st_mtime_ns)
        notes = [line for line in done.stdout.splitlines() if line.startswith("NOTE")]
        print(*notes, sep="\n", end="\n" * bool(notes))
        return json.loads(found.read_text("utf-8")) | {"whole": whole, "folder": found.parent}


def row(name, runs):
    """Mean and spread of some runs as a line of a table."""
    cells = []
    for key in SHOWN:
        values = [m[key] * (100 if "accuracy" in key else 1) for m in runs]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):,.2f}{spread}")
    print(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, nargs="*", default=[8, 10, 12],
                        help="shorter recipes of cifar10, three seeds each")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for the program")
    args = parser.parse_args()
    args.data_dir, end = str(Path(args.data_dir).resolve()), time.time() + 60 * args.minutes

    machine = dld.start_machine(dld.Config(device=args.device))
    print(f"{machine.describe()}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
          f"{torch.backends.cudnn.version()}\n", flush=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"], cwd=ROOT,
                           capture_output=True, text=True, check=False)
    print(tests.stdout[-3000:], flush=True)
    speed = [sys.executable, "tests/benchmarks/speed.py", "--data-dir", args.data_dir]
    speed = subprocess.run(speed, cwd=ROOT, capture_output=True, text=True, check=False)
    print(speed.stdout, speed.stderr[-1000:], flush=True)

    print(f"| run | seeds | {' | '.join(SHOWN)} |\n{'|---' * (len(SHOWN) + 2)}|", flush=True)
    quick = ["--task", "cifar10", "--report", "minimal"]
    plans = [("cifar10, its recipe", args.seeds, quick, {})]
    plans += [(f"cifar10, {n} epochs", min(3, args.seeds), [*quick, "--epochs", str(n)], {})
              for n in args.epochs]
    plans += [("sentiment, default", 1, ["--task", "sentiment"], {}),
              ("mnist, default", 1, ["--task", "mnist"], {}),
              ("cifar10, single kernels", 1, quick, {"eager": True}),
              ("cifar10, --compile", 1, [*quick, "--compile"], {})]
    longest = 0.0
    for name, seeds, flags, more in plans:
        runs = []
        for seed in range(seeds):
            if time.time() + longest > end:
                print(f"left out: {name}, seed {seed}: no time")
                break
            started = time.time()
            if (m := run(args, *flags, "--seed", str(seed), **more)) is None:
                break
            longest = max(longest, time.time() - started) if "cifar10" in name else longest
            runs.append(m)
        if runs:
            row(name, runs)
    if time.time() + 2 * longest < end:
        with tempfile.TemporaryDirectory() as folder:
            m = run(args, *quick, "--epochs", "2", folder=folder)
            dld.main(["--evaluate", "--run", str(m["folder"]), "--device", "cpu"])


if __name__ == "__main__":
    main()
