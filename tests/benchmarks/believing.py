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
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld


def run(look=lambda folder: None, **given):
    """One run in a folder that is thrown away: metrics, issues of its data, what `look` found."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = dld.train_run({**given, "output_dir": folder}, dld.Log())
        with (path / "faults.csv").open(encoding="utf-8") as file:
            issues = list(csv.DictReader(file))
        return json.loads((path / "metrics.json").read_text("utf-8")), issues, look(path)


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
    print("\n".join(f"  {line}" for line in lines), flush=True)


def shape_masks():
    """Where the shapes of the stand-in are [10000, 32, 32], drawn once more."""
    random = np.random.default_rng(2026)
    y = random.permutation(np.arange(10_000) % len(dld.SHAPES))
    return np.concatenate([dld.draw_shapes(y[i:i + 500], random)[1] for i in range(0, 10_000, 500)])


def peak_on_object(folder):
    """Of right predictions, how often Grad-CAM's strongest mark lies on the shape; how many."""
    table = pd.read_csv(folder / "predictions.csv")
    rows = torch.tensor(table["row"][table["correct"] == 1].to_numpy()[:500])
    model, meta = dld.load_model(folder, dld.start_machine(dld.Config(precision="fp32")))
    samples = dld.ImageData(dld.ImageData.pack(dld.make_shapes().x), meta)
    inside = torch.from_numpy(shape_masks()[rows]).flatten(1)
    maps = []
    for some in rows.split(100):
        x = samples.batch(some)
        maps.append(dld.explain_images(model, x, model(x).argmax(1))["gradcam"])
    peak = torch.cat(maps).flatten(1).max(1)
    on = inside.gather(1, peak.indices[:, None])[:, 0] & (peak.values > 0)
    return float(on.double().mean()), len(rows)


def peaks(args):
    for seed in args.seeds:
        print(f"offline shapes, seed {seed}", flush=True)
        metrics, _, (share, n) = run(peak_on_object, task="cifar10", data="offline", seed=seed)
        say(metrics)
        print(f"  peak on the object: {share:.1%} of {n}", flush=True)


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
            metrics, issues, _ = run(task="mnist", data="real", data_dir=args.data_dir, seed=seed,
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
