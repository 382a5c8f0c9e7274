#!/usr/bin/env python3
"""Whether what the report says of a run holds, on more data than the tests have time for; prints a line for each run.

    python tests/benchmarks/believing.py peaks --seeds 0 1 2                offline shapes: does Grad-CAM point at them?
    python tests/benchmarks/believing.py flips --data-dir data --seeds 0    2% of MNIST's training labels made wrong:
                                                                            how many of the 100 first suspects are?
    python tests/benchmarks/believing.py show RUN                           what a finished run's metrics.json says

`flips` runs twice: with suspects from the validation part alone, and out of fold from three folds.
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld


def run(**given):
    """One run in a folder that is thrown away: its metrics and faults."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = dld.train_run({**given, "output_dir": folder}, dld.Log())
        with (path / "faults.csv").open(encoding="utf-8") as file:
            return json.loads((path / "metrics.json").read_text("utf-8")), list(csv.DictReader(file))


def say(m):
    """The tests of the explanations, and what else the report rests on."""
    lines = [f"accuracy {m['test_accuracy']:.2%}, loss {m['test_loss_uncalibrated']:.4f} -> {m['test_loss']:.4f}, "
             f"ECE {m['test_ece_uncalibrated']:.4f} -> {m['test_ece']:.4f} (temperature {m['temperature']:.2f})",
             f"yardstick {m['yardstick_accuracy']:.2%}, commonest class {m['commonest_accuracy']:.2%}",
             f"repeats {m['test_repeats']}, near repeats {m['near_repeats']}, without them "
             f"{m['test_accuracy_without_near_repeats']:.2%}; suspect labels {m['suspect_labels']}",
             f"examining and drawing took {m['seconds_report']:.1f} s"]
    lines += [dld.say_explanation(m, name) for name in dld.EXPLANATIONS if f"{name}_over_random" in m]
    if "peak_on_object" in m:
        lines.append(f"peak on the object: {m['peak_on_object']:.1%} of {m['peaks']}")
    print("\n".join(f"  {line}" for line in lines), flush=True)


def peaks(args):
    for seed in args.seeds:
        print(f"offline shapes, seed {seed}", flush=True)
        say(run(task="cifar10", data="offline", seed=seed)[0])


def flips(args):
    sound = dld.TASKS["mnist"]
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        wrong = set(rng.permutation(60_000)[:1200].tolist())

        def flipped(folder, download, wrong=wrong, rng=rng):
            raw = sound.real(folder, download)
            y, rows = raw.y.copy(), sorted(wrong)
            y[rows] = (y[rows] + rng.integers(1, 10, len(rows))) % 10
            return dataclasses.replace(raw, y=y)

        dld.TASKS["mnist"] = dataclasses.replace(sound, real=flipped)
        for folds in (0, 3):
            metrics, faults = run(task="mnist", data="real", data_dir=args.data_dir, seed=seed, epochs=6, folds=folds,
                                  width=512)
            first = [int(row["row"]) for row in faults if row["fault"] == "suspect label"][:100]
            held = metrics["val_samples"] or metrics["train_samples"]
            print(f"MNIST, 2% wrong labels, seed {seed}, {folds} folds: {len(wrong & set(first))} of the first "
                  f"{len(first)} suspects are ({metrics['suspect_labels']} suspects among {held:,}; test accuracy "
                  f"{metrics['test_accuracy']:.2%})", flush=True)
    dld.TASKS["mnist"] = sound


def show(args):
    say(json.loads((args.run / "metrics.json").read_text("utf-8")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for name, job in (("peaks", peaks), ("flips", flips), ("show", show)):
        one = jobs.add_parser(name)
        one.set_defaults(job=job)
        if name in ("peaks", "flips"):
            one.add_argument("--seeds", nargs="+", type=int, default=[0])
        if name == "flips":
            one.add_argument("--data-dir", required=True)
        if name == "show":
            one.add_argument("run", type=Path)
    args = parser.parse_args()
    args.job(args)


if __name__ == "__main__":
    main()
