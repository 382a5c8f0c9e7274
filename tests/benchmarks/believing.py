#!/usr/bin/env python3
"""Whether what the report says of a run holds, on more data than the tests have time for.

    python tests/benchmarks/believing.py peaks --seeds 0 1 2
    python tests/benchmarks/believing.py flips --data-dir data --seeds 0
    python tests/benchmarks/believing.py show RUN

`peaks`: does Grad-CAM point at the offline shapes? `flips`: 2% of MNIST's training labels are made
wrong; how many of the 100 first suspects are? It runs twice: with suspects from the validation part
alone, and out of fold from three folds. `show`: what a finished run's metrics.json says.
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
    """One run in a folder that is thrown away: its metrics, and the issues of its data."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = dld.train_run({**given, "output_dir": folder}, dld.Log())
        with (path / "faults.csv").open(encoding="utf-8") as file:
            issues = list(csv.DictReader(file))
        return json.loads((path / "metrics.json").read_text("utf-8")), issues


def say(m):
    """The tests of the explanations, and what else the report rests on."""
    lines = [f"accuracy {m['test_accuracy']:.2%}, loss {m['test_loss_uncalibrated']:.4f} -> "
             f"{m['test_loss']:.4f}, ECE {m['test_ece_uncalibrated']:.4f} -> {m['test_ece']:.4f} "
             f"(temperature {m['temperature']:.2f})",
             f"baseline {m['baseline_accuracy']:.2%}, commonest {m['commonest_accuracy']:.2%}",
             f"repeats {m['test_repeats']}, near repeats {m['near_repeats']}, without them "
             f"{m['test_accuracy_without_near_repeats']:.2%}; "
             f"suspect labels {m['suspect_labels']}",
             f"evaluating and drawing took {m['seconds_report']:.1f} s"]
    lines += [dld.say_explanation(m, name) for name in dld.EXPLANATIONS
              if f"{name}_over_random" in m]
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

        def flipped(config, wrong=wrong, rng=rng):
            raw = sound.read(config)
            y, rows = raw.y.copy(), sorted(wrong)
            y[rows] = (y[rows] + rng.integers(1, 10, len(rows))) % 10
            return dataclasses.replace(raw, y=y)

        dld.TASKS["mnist"] = dataclasses.replace(sound, read=flipped)
        for folds in (0, 3):
            metrics, issues = run(task="mnist", data="real", data_dir=args.data_dir, seed=seed,
                                  epochs=6, folds=folds, width=512)
            first = [int(row["row"]) for row in issues if row["fault"] == "suspect label"][:100]
            held = metrics["val_samples"] or metrics["train_samples"]
            print(f"MNIST, 2% wrong labels, seed {seed}, {folds} folds: {len(wrong & set(first))} "
                  f"of the first {len(first)} suspects are ({metrics['suspect_labels']} suspects "
                  f"among {held:,}; test accuracy {metrics['test_accuracy']:.2%})", flush=True)
    dld.TASKS["mnist"] = sound


def show(args):
    say(json.loads((args.run / "metrics.json").read_text("utf-8")))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
