#!/usr/bin/env python3
"""What each trick of `--model fast` buys: the recipe as it is, then without one thing at a time.

    python tests/benchmarks/ablation.py --data-dir data --seeds 0 1 2
    python tests/benchmarks/ablation.py --data-dir data --seeds 0 1 2 --equal-time --steps 360

Accuracy is that of the validation part, with all views; the test part is not read. Small and short,
so that it takes minutes: the numbers tell which tricks matter, not how much they matter in a long
run. With --equal-time it is about cheaper steps and about how a given time is spent: each case
takes as many steps as cost what those of the recipe cost.
"""
import argparse
import contextlib
import statistics
import sys
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


def rex(config, done):
    return config.lr * (1 - done) / (1 - done / 2)


def warm_up(config, done):
    return config.lr * min(done / 0.15, (1 - done) / 0.85)


def shift_less(*given, augment=dld.augment_batch, **options):
    return augment(*given, **{**options, "shift": 1})


def decay(power):
    return mock.patch.object(dld, "learning_rate",
                             lambda config, done: config.lr * (1 - done) ** power)


def steps_change(small, frozen):
    """Small pictures until this share of the training, the first bias frozen from this one."""
    return mock.patch.multiple(dld, SMALL_UNTIL=small, FROZEN_FROM=frozen)


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

EQUAL_TIME = {  # a patch, settings, how many times the steps of the recipe the same time pays for
    "as it is": (nothing, {}, 1.0),
    "whole pictures, nothing frozen": (steps_change(0.0, 2.0), {}, 0.63),
    "whole pictures": (steps_change(0.0, 0.3), {}, 0.71),
    "nothing frozen": (steps_change(0.7, 2.0), {}, 0.9),
    "small pictures until 0.8, as many steps": (steps_change(0.8, 0.3), {}, 1.0),
    "REX": (mock.patch.object(dld, "learning_rate", rex), {}, 1.0),
    "decay by the power of 1.4": (decay(1.4), {}, 1.0),
    "0.15 of the steps as warm-up": (mock.patch.object(dld, "learning_rate", warm_up), {}, 1.0),
    "batches of 250": (nothing, {"batch_size": 250}, 2.0),
    "a rate of 0.14": (nothing, {"lr": 0.14}, 1.0),
    "smoothed by 0.1": (nothing, {"label_smoothing": 0.1}, 1.0),
    "shifted by one pixel at most": (mock.patch.object(dld, "augment_batch", shift_less), {}, 1.0),
}


def train(raw, settings, seed):
    """Validation accuracy in per cent after the last epoch, and seconds of training."""
    config = dld.resolve_config({"task": "cifar10", "model": "fast", "seed": seed, **settings})
    machine = dld.start_machine(config)
    data = dld.build_dataset(raw, config)
    data.samples.to(machine.device)
    state, _ = dld.start_training(data, config, machine)
    dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer()))
    rows = data.parts["val"]
    logits = dld.predict_logits(state.model, data.samples, rows, machine)
    right = logits.argmax(1) == data.labels[rows]
    return 100 * float(right.double().mean()), state.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--equal-time", action="store_true")
    parser.add_argument("--steps", type=int, default=360, help="with --equal-time")
    parser.add_argument("--cases", nargs="+", choices={*CASES, *EQUAL_TIME}, metavar="CASE")
    args = parser.parse_args()
    known = EQUAL_TIME if args.equal_time else CASES
    raw = dld.read_cifar10(dld.resolve_config({"task": "cifar10", "data_dir": str(args.data_dir)}))
    length = f"{args.steps} steps" if args.equal_time else f"{args.epochs} epochs"
    title = f"width {args.width}, {length}, {len(args.seeds)} seeds"
    print(f"| {title} | validation accuracy | training |")
    print("|---|---|---|")
    for name in args.cases or known:
        patch, settings, *more = known[name]
        with patch:
            long = {"steps": str(round(args.steps * more[0]))} if more else {"epochs": args.epochs}
            settings = {"width": args.width, **long, **settings}
            runs = [train(raw, settings, seed) for seed in args.seeds]
        accuracy, seconds = zip(*runs, strict=True)
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(runs) > 1 else ""
        print(f"| {name} | {statistics.mean(accuracy):.2f} %{spread} "
              f"| {statistics.median(seconds):.0f} s |", flush=True)


if __name__ == "__main__":
    main()
