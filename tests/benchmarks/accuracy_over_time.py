#!/usr/bin/env python3
"""What a given time buys: runs with several budgets, each a process of its own; a table and a plot.

    cd tests/benchmarks
    python accuracy_over_time.py --data-dir data --task cifar10 --budgets 60s 3m 30m --seeds 0 1 2
    python accuracy_over_time.py --data-dir data --task mnist --budgets 30s default
    python accuracy_over_time.py --plot results.jsonl         only draw again what was measured

`default` stands for a run without --budget. Every run is appended to results.jsonl, from which
table and plot are made. Accuracy is that of the test part, time that of the whole process.
"""
import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from real_data import importing_torch_mb, run

HERE = Path(__file__).resolve().parent


def measure(args):
    """All runs, appended to the results as they end."""
    torch_mb = importing_torch_mb()
    for budget in args.budgets:
        for seed in args.seeds:
            limit = [] if budget == "default" else ["--budget", budget]
            m = run(args.task, ["--seed", str(seed), *limit, *args.flags], args.data_dir)
            keys = ["task", "model", "device", "torch", "seed", "width", "epochs", "val_accuracy",
                    "test_accuracy", "seconds_training"]
            if m["task"] == "sentiment":
                keys += ["max_tokens", "unlabelled", "test_accuracy_without_repeats",
                         "baseline_accuracy", "baseline_gain"]
            row = {key: m.get(key) for key in keys}  # a minimal report has no baseline
            row |= {"budget": budget, "whole": round(m["whole"], 1),
                    "memory_mb": round(m["peak_memory_mb"] - torch_mb)}
            print(json.dumps(row), flush=True)
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def groups(path):
    """Runs of the same task and budget together, in order."""
    together = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        together[row["task"], row["model"], row["budget"]].append(row)
    return together


def choice(row):
    """What --budget chooses among."""
    if "max_tokens" not in row:
        return f"width {row['width']}, {row['epochs']} epochs"
    return (f"{row['max_tokens']} words, {row['unlabelled']:.0%} of the unlabelled, "
            f"{row['epochs']} epochs")


def print_table(path):
    """One line for each task and budget."""
    print("| task | budget | chosen | seeds | test accuracy | whole process | training | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for (task, model, budget), rows in groups(path).items():
        accuracy = [100 * row["test_accuracy"] for row in rows]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(rows) > 1 else ""
        whole = statistics.median(row["whole"] for row in rows)
        chosen = " / ".join(sorted({choice(row) for row in rows}))
        print(f"| {task} {model} | {budget} | {chosen} | {len(rows)} "
              f"| {statistics.mean(accuracy):.2f} %{spread} | {whole:.0f} s "
              f"| {statistics.median(row['seconds_training'] for row in rows):.0f} s "
              f"| {max(row['memory_mb'] for row in rows)} MB |")


def plot(path, picture):
    """Accuracy over the whole process's time, log axis, one line a task."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    lines = defaultdict(list)
    for (task, model, _), rows in groups(path).items():
        lines[f"{task}, {model}"] += [(row["whole"], 100 * row["test_accuracy"]) for row in rows]
    colours = ("#0072b2", "#d55e00", "#009e73")
    for (label, points), colour, marker in zip(lines.items(), colours, "os^", strict=False):
        axes.plot(*zip(*sorted(points), strict=True), linestyle="none", marker=marker, markersize=6,
                  color=colour, label=label, alpha=0.8)
    axes.set_xscale("log")
    device = next(iter(groups(path).values()))[0]["device"].split(" (")[0]
    axes.set(xlabel="whole process, from command to last artefact (log scale)",
             ylabel="test accuracy in %",
             title=f"What a given time buys, {device}, one point a run")
    ticks = [30, 60, 120, 300, 600, 1200, 1800]
    axes.set_xticks(ticks, [f"{t} s" if t < 60 else f"{t // 60} min" for t in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, color="#dddddd")
    axes.legend(loc="lower right")
    figure.savefig(picture)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--task", default="cifar10", choices=("cifar10", "mnist", "sentiment"))
    parser.add_argument("--budgets", nargs="+", default=["60s", "3m", "default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for the program")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--plot", type=Path, metavar="RESULTS",
                        help="only table and plot of earlier results")
    args = parser.parse_args()
    if not args.plot:
        if not args.data_dir:
            sys.exit("error: --data-dir is needed to measure")
        measure(args)
    results = args.plot or args.results
    print_table(results)
    plot(results, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
