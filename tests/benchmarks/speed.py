#!/usr/bin/env python3
"""Images a second of the input path and of the training step, as a share of what matrix products reach on this machine:

    python tests/benchmarks/speed.py --data-dir data                 in the precision that --precision auto takes
    python tests/benchmarks/speed.py --data-dir data --precision fp32

Step: forward, backward and optimizer, in the program's own loop. Counted are three times the forward pass's multiply-
adds, two operations each; matrix product: the best of several square ones in the same precision.
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld

CASES = (("cifar10", "fast", {"width": 64}), ("cifar10", "fast", {"width": 32}), ("cifar10", "fast", {"width": 16}),
         ("cifar10", "classic", {}), ("mnist", "mlp", {}))


def matrix_product(runtime):
    """Operations a second of the best of ten products of 4096 x 4096 on a GPU, 2048 x 2048 on a CPU."""
    side = 4096 if runtime.device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[runtime.precision]
    a = torch.randn(side, side, device=runtime.device).to(dtype)
    return 2 * side ** 3 / min(seconds(runtime, lambda: a @ a) for _ in range(10))


def seconds(runtime, job):
    """Time of a job that has really ended."""
    started = time.perf_counter()
    job()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    runtime = dld.start_runtime(dld.Config(precision=args.precision))
    peak = matrix_product(runtime)
    print(f"{runtime.describe()}, torch {torch.__version__}: matrix product {peak / 1e9:,.0f} GFLOP/s\n")
    print("| task, model | batch | input path, images/s | step, images/s | MFLOP an image | share of matrix product |")
    print("|---|---|---|---|---|---|")
    raws = {name: dld.TASKS[name].real(Path(args.data_dir), dld.Downloads(False)) for name in ("cifar10", "mnist")}
    for task, model, settings in CASES:
        config = dld.settle({}, {"task": task, "model": model, "precision": runtime.precision, **settings})
        data = dld.build_data(raws[task], config)
        data.samples.to(runtime.device)
        state = dld.new_state(dld.place_model(dld.build_model(data.meta), runtime), config, runtime)
        flop = 6 * dld.count_multiply_adds(state.model, data.samples.batch(torch.tensor([0])))
        rows = data.parts["train"][:config.batch_size]
        batch = sorted(seconds(runtime, lambda: data.samples.batch(rows, state.noise)) for _ in range(20))[10]  # noqa: B023
        step = []
        for _ in range(7):
            with dld.progress_bar(0, "") as bar:
                one = dataclasses.replace(data, parts={"train": rows})
                state.step = 0
                step.append(seconds(runtime, lambda: dld.train_epoch(
                    state, state.model, one, config, runtime, dld.Keeper(), bar)))  # noqa: B023
        rate = len(rows) / sorted(step[1:])[3]
        print(f"| {task}, {model} {config.width if settings else ''} | {len(rows)} | {len(rows) / batch:,.0f} "
              f"| {rate:,.0f} | {flop / 1e6:,.0f} | {rate * flop / peak:.0%} |", flush=True)


if __name__ == "__main__":
    main()
