#!/usr/bin/env python3
"""What a given time buys, and whether it is kept, alone and with another program beside.

    python tests/benchmarks/budgets.py --data-dir data mnist:20s cifar10:60s sentiment:default
    python tests/benchmarks/budgets.py --data-dir data --load mnist:20s cifar10:60s

`default` stands for a run without --budget. With --load a second process keeps one core busy from
the middle of the budget on. A line a run: test accuracy, what it took (from the command to its end)
as a share of the budget, the largest memory of the process, and where the seconds went. Kept is
what ends between 90 % and 102 % and a second.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import deep_learning_deliverable as dld  # noqa: E402

BUSY = "import time\nt = time.time()\nwhile time.time() - t < {}: pass"
STAGES = ("reading", "speed", "preparing", "training", "validation", "between", "evaluation",
          "checks", "figures", "page")


def measure(task, budget, seed, args):
    """One run, as its user starts it."""
    limit = [] if budget == "default" else ["--budget", budget]
    seconds, load = dld.parse_seconds(budget) if limit else 0.0, None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "deep_learning_deliverable.py"), "--task", task,
                   *limit, "--seed", str(seed), "--output-dir", folder, *args.flags]
        command += ["--data-dir", args.data_dir] if args.data_dir else []
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if args.load and limit:
            time.sleep(seconds / 2)
            load = subprocess.Popen([sys.executable, "-c", BUSY.format(3 * seconds)])
        _, ended, usage = os.wait4(process.pid, 0)
        whole = time.perf_counter() - started
        if load:
            load.kill()
        if ended:
            sys.exit(f"{command} ended with {os.waitstatus_to_exitcode(ended)}")
        run, = Path(folder).iterdir()
        m, config = (json.loads((run / name).read_text("utf-8"))
                     for name in ("metrics.json", "config.json"))
    row = {key: m.get(key) for key in ("task", "device", "precision", "torch", "seed", "epochs",
                                       "val_accuracy", "test_accuracy", "baseline_accuracy")}
    row |= {key: config[key] for key in ("width", "max_tokens", "report")}
    row |= {"budget": budget, "load": args.load, "whole": round(whole, 2),
            "share": round(whole / seconds, 3) if limit else None,
            "memory_mb": round(usage.ru_maxrss / 1000),
            "kept": not limit or 0.9 * seconds <= whole <= 1.02 * seconds + 1}
    return row | {stage: m.get(f"seconds_{stage}", 0.0) for stage in STAGES}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="TASK:BUDGET")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for the program")
    parser.add_argument("--results", type=Path, help="a file to which each run is added")
    args = parser.parse_args()
    print("| run | load | accuracy | wall clock | of the budget | kept | memory | "
          + " | ".join(STAGES) + " |\n|" + "---|" * (7 + len(STAGES)), flush=True)
    rows = []
    for task, _, budget in (run.partition(":") for run in args.runs):
        some = [measure(task, budget, seed, args) for seed in args.seeds]
        for row in some:
            rows.append(row)
            print(f"| {task} {budget}, seed {row['seed']} | {'yes' if args.load else 'no'} "
                  f"| {row['test_accuracy']:.2%} | {row['whole']:.1f} s "
                  f"| {format(row['share'], '.1%') if row['share'] else ''} "
                  f"| {'yes' if row['kept'] else 'NO'} | {row['memory_mb']:,} MB | "
                  + " | ".join(f"{row[stage]:.1f}" for stage in STAGES) + " |", flush=True)
            if args.results:
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        if len(some) > 1:
            accuracy = [100 * row["test_accuracy"] for row in some]
            print(f"| {task} {budget}, mean | | {statistics.mean(accuracy):.2f} "
                  f"± {statistics.stdev(accuracy):.2f} %" + " |" * (5 + len(STAGES)), flush=True)
    print(f"\n{sum(row['kept'] for row in rows)} of {len(rows)} kept; {rows[0]['device']}, "
          f"{rows[0]['precision']}, torch {rows[0]['torch']}")


if __name__ == "__main__":
    main()
