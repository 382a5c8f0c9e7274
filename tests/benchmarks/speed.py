#!/usr/bin/env python3
"""Images a second of the input path and of the training step, as a share of what matrix products
reach on this machine:

    python tests/benchmarks/speed.py --data-dir data                    as --precision auto takes it
    python tests/benchmarks/speed.py --data-dir data --precision fp32

Step: forward, backward and optimizer, on a GPU recorded and played as in the program. Counted are
three times the forward pass's multiply-adds, two operations each; matrix product: the best of
several square ones in the same precision.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld

CASES = (("cifar10", "fast", {"width": 64}), ("cifar10", "fast", {"width": 32}),
         ("cifar10", "fast", {"width": 16}), ("cifar10", "classic", {}), ("mnist", "mlp", {}))


def matrix_product(machine):
    """Operations a second of the best of ten products of side 4096 on a GPU, 2048 on a CPU."""
    side = 4096 if machine.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=machine.device)
    with machine.autocast():
        a = a @ a  # so that it has the precision
    return 2 * side ** 3 / min(seconds(machine, lambda: a @ a) for _ in range(10))


def seconds(machine, job):
    """Time of a job that has really ended."""
    started = time.perf_counter()
    job()
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    machine = dld.start_machine(dld.Config(precision=args.precision))
    peak = matrix_product(machine)
    print(f"{machine.describe()}, torch {torch.__version__}: matrix product {peak / 1e9:,.0f} "
          "GFLOP/s\n")
    print("| task, model | batch | input path, images/s | step, images/s | MFLOP an image "
          "| share of matrix product |")
    print("|---|---|---|---|---|---|")
    raws = {name: dld.TASKS[name].read(dld.Config(task=name, data_dir=args.data_dir))
            for name in ("cifar10", "mnist")}
    for task, model, settings in CASES:
        config = dld.resolve_config({"task": task, "model": model, "precision": machine.precision,
                                     **settings})
        data = dld.build_dataset(raws[task], config)
        data.samples.to(machine.device)
        state, _ = dld.start_training(data, config, machine)
        layers = dld.measure_layers(state.model, data.samples.batch(torch.tensor([0])))
        flop = 6 * int(layers["multiply_adds"].sum())
        rows = data.parts["train"][:config.batch_size]
        batch = sorted(seconds(machine, lambda: data.samples.batch(rows, state.noise))  # noqa: B023
                       for _ in range(20))[10]
        context = dld.Context(config, data, machine, dld.Checkpointer())
        stepper, x = dld.Stepper(state, context), data.samples.batch(rows, state.noise)
        y = data.shares(data.labels[rows].to(machine.device))
        state.model.train()
        several = 50 if machine.device.type == "cuda" else 1
        step = [seconds(machine, lambda: [
            stepper.take(x, y, 0.0, config.lr) for _ in range(several)]) / several  # noqa: B023
            for _ in range(7)]
        rate = len(rows) / sorted(step[1:])[3]
        print(f"| {task}, {model} {config.width if settings else ''} | {len(rows)} "
              f"| {len(rows) / batch:,.0f} | {rate:,.0f} | {flop / 1e6:,.0f} "
              f"| {rate * flop / peak:.0%} |", flush=True)


if __name__ == "__main__":
    main()
