#!/usr/bin/env python3
"""What each trick of `--model fast` buys: the recipe as it is, then without one thing at a time.

    python tests/benchmarks/ablation.py --data-dir data --seeds 0 1 2

Accuracy is that of the validation part; the test part is not read. Small and short, so that it
takes minutes: the numbers tell which tricks matter, not how much they matter in a long run.
"""
import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld


def learnt_patches(self, covariance):
    nn.Conv2d.__init__(self, len(covariance) // 4, 2 * len(covariance), 2)


def mirror_at_random(self, rows, noise=None, epoch=0, shard=slice(None), batch=dld.ImageData.batch):
    return batch(self, rows, noise, epoch if noise is None else int(torch.randint(2, ())), shard)


random_patches = mock.patch.object(dld.WhitenedPatches, "__init__", learnt_patches)
random_start = mock.patch.object(nn.init, "dirac_", lambda weight: weight)
random_mirrors = mock.patch.object(dld.ImageData, "batch", mirror_at_random)
nothing = contextlib.nullcontext()
CASES = {  # what is different: (a patch, settings)
    "as it is": (nothing, {}),
    "first layer random and learnt": (random_patches, {}),
    "filters start at random": (random_start, {}),
    "AdamW, one cycle to 4e-3, for Muon": (
        nothing, {"optimizer": "adamw", "lr": 4e-3, "schedule": "onecycle"}),
    "a quarter of the steps as warm-up": (nothing, {"schedule": "onecycle"}),
    "no label smoothing": (nothing, {"label_smoothing": 0.0}),
    "mirrored at random": (random_mirrors, {}),
    "neither mirrored nor shifted": (nothing, {"augment": False}),
    "one view only": (nothing, {"views": False}),
    "batches of 1000": (nothing, {"batch_size": 1000}),
}


def train(raw, settings, seed):
    """Validation accuracy in per cent after the last epoch, and seconds of training."""
    config = dld.resolve_config({"task": "cifar10", "model": "fast", "seed": seed, **settings})
    machine = dld.start_machine(config)
    data = dld.build_dataset(raw, config)
    data.samples.to(machine.device)
    state, _ = dld.start_training(data, config, machine)
    started = time.perf_counter()
    dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer()))
    return 100 * state.history[-1]["val_accuracy"], time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    raw = dld.read_cifar10(dld.resolve_config({"task": "cifar10", "data_dir": str(args.data_dir)}))
    title = f"width {args.width}, {args.epochs} epochs, {len(args.seeds)} seeds"
    print(f"| {title} | validation accuracy | training |")
    print("|---|---|---|")
    for name in args.cases:
        patch, settings = CASES[name]
        with patch:
            settings = {"width": args.width, "epochs": args.epochs, **settings}
            runs = [train(raw, settings, seed) for seed in args.seeds]
        accuracy, seconds = zip(*runs, strict=True)
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(runs) > 1 else ""
        print(f"| {name} | {statistics.mean(accuracy):.2f} %{spread} "
              f"| {statistics.median(seconds):.0f} s |", flush=True)


if __name__ == "__main__":
    main()
