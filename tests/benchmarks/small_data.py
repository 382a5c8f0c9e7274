#!/usr/bin/env python3
"""Small, uneven and other data of one's own: what the defaults reach, beside the baseline.

    python tests/benchmarks/small_data.py --data-dir data [--only cifar10-500 imdb-2000] [--seeds 0]

Writes parts of CIFAR-10, MNIST and IMDb as a user would have them, in folders of files, trains on
them by default, and prints accuracy and baseline on the same test samples. The test part is that of
the official data set (of CIFAR-10 2,000 samples of it, of IMDb 10,000); with --development it is
made of other samples of the official training part, so that settings can be chosen by it.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import deep_learning_deliverable as dld  # noqa: E402

CASES = {  # data set, training samples (0: all), classes, rows of the first for one of the others
    "cifar10-500": ("cifar10", 500, 10, 1), "cifar10-2000": ("cifar10", 2000, 10, 1),
    "cifar10-10000": ("cifar10", 10_000, 10, 1), "cifar10-two-classes": ("cifar10", 0, 2, 1),
    "cifar10-uneven": ("cifar10", 4000, 2, 20), "mnist-png": ("mnist", 0, 10, 1),
    "imdb-500": ("sentiment", 500, 2, 1), "imdb-2000": ("sentiment", 2000, 2, 1),
    "imdb-10000": ("sentiment", 10_000, 2, 1), "imdb-sentences": ("sentiment", 10_000, 2, 1),
    "imdb-ratings": ("sentiment", 10_000, 8, 1), "imdb-uneven": ("sentiment", 4000, 2, 20)}


SIZE = {"cifar10": 2000, "mnist": None, "sentiment": 10_000}  # of the test part


def choose(y, wanted, classes, uneven, random):
    """Rows with so many samples of these classes, the second ones `uneven` times rarer."""
    weight = [1.0] + [1 / uneven] * (classes - 1)
    rows = []
    for label in range(classes):
        there = random.permutation(np.flatnonzero(y == label))
        most = round(wanted * weight[label] / sum(weight)) if wanted else len(there)
        rows += there[:most].tolist()
    return rows


def write(case, folder, data_dir, development):
    """The data as somebody might bring it; returns the task and what --data is to be."""
    task, wanted, classes, uneven = CASES[case]
    config = dld.resolve_config({"task": task, "data": "real", "data_dir": data_dir})
    raw, random = dld.load_raw(config, dld.Log(quiet=True)), np.random.default_rng(0)
    if case == "imdb-ratings":  # 1 to 4 and 7 to 10 points, which the files' names end with
        raw.y = np.array([int(path.stem.split("_")[1]) for part in ("train", "test") for sense in
                          ("neg", "pos") for path in dld.list_folder(
                              config.data_path / "aclImdb" / part / sense)])
        raw.classes = [f"{points} points" for points in np.unique(raw.y)]
        raw.y = np.unique(raw.y, return_inverse=True)[1]
    labels = raw.y[:raw.n_train]
    rows = choose(labels, wanted, classes, uneven, random)
    test = raw.n_train + random.permutation(len(raw.y) - raw.n_train)
    if development:
        test = random.permutation(np.setdiff1d(np.arange(raw.n_train), rows))
    test = [row for row in test if raw.y[row] < classes][:SIZE[task]]
    parts = {"train": rows, "test": test}
    for part, some in parts.items():
        for row in some:
            place = folder / part / raw.classes[raw.y[row]]
            place.mkdir(parents=True, exist_ok=True)
            if task == "sentiment":
                text = raw.x[row].split(". ")[0] if case == "imdb-sentences" else raw.x[row]
                (place / f"{row:06}.txt").write_text(text, "utf-8")
            else:
                picture = Image.fromarray(raw.x[row].transpose(1, 2, 0).squeeze())
                picture.save(place / f"{row:06}.png")
    return "text" if task == "sentiment" else "images", folder


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for the program")
    args = parser.parse_args()
    print("| data | seed | samples | epochs | accuracy | baseline | difference (95 %) "
          "| forecast | took |\n" + "|---" * 9 + "|", flush=True)
    for case in args.only:
        with tempfile.TemporaryDirectory() as place:
            (folder := Path(place) / case).mkdir()
            task, data = write(case, folder, args.data_dir, args.development)
            for seed in args.seeds:
                flags = ["--no-flip"] * (case == "mnist-png")
                command = [sys.executable, str(ROOT / "deep_learning_deliverable.py"), "--task",
                           task, "--data", str(data), "--seed", str(seed), "--output-dir",
                           f"{place}/runs{seed}", *flags, *args.flags]
                started = time.perf_counter()
                said = subprocess.run(command, capture_output=True, text=True, check=False)
                took = time.perf_counter() - started
                if said.returncode:
                    sys.exit(said.stderr)
                run, = Path(place, f"runs{seed}").iterdir()
                m = json.loads((run / "metrics.json").read_text("utf-8"))
                forecast = next((line.split("about ")[1].split(" here")[0] for line in
                                 said.stdout.splitlines() if line.startswith("Time  ")), "")
                gain = (f"{m['baseline_gain']:+.1%} ({m['baseline_gain_low']:+.1%} to "
                        f"{m['baseline_gain_high']:+.1%})" if "baseline" in m else "")
                print(f"| {case} | {seed} | {m['train_samples']:,} | {m['epochs']} "
                      f"| {m['test_accuracy']:.2%} | {m.get('baseline_accuracy', 0):.2%} | {gain} "
                      f"| {forecast} | {took:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
