"""What a large folder of one's own pictures costs: memory, the first start, the second start.

    python tests/benchmarks/own_data.py [--pictures 20000] [--epochs 1] [--folder DIR]

Makes JPEGs of mixed sizes (120 to 900 pixels a side, all three modes that JPEGs have) of the ten
drawn shapes, one folder a class, then trains on them twice with the program as a user would. Memory
is the most that the process held at once, less what a process holds that has only imported torch
and taken one step of a tiny network (Linux only).
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld

BARE = """
import torch, torch.nn as nn, tqdm, numpy
model = nn.Conv2d(3, 8, 3); optimizer = torch.optim.AdamW(model.parameters())
model(torch.zeros(2, 3, 8, 8)).sum().backward(); optimizer.step()
"""


def make_pictures(folder: Path, n: int) -> int:
    """JPEGs of mixed sizes, shapes and modes; returns their bytes."""
    rng, size = np.random.default_rng(0), 0
    names = list(dld.SHAPES)
    for first in range(0, n, 500):
        y = rng.integers(0, len(names), min(500, n - first))
        x, _ = dld.draw_shapes(y, rng)
        for i, (label, pixels) in enumerate(zip(y, x, strict=True), first):
            path = folder / names[label] / f"{i:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            size_of_it = tuple(rng.integers(120, 900, 2).tolist())
            picture = Image.fromarray(pixels.transpose(1, 2, 0)).resize(size_of_it)
            mode = ("RGB", "RGB", "RGB", "L", "CMYK")[rng.integers(5)]
            picture.convert(mode).save(path, quality=int(rng.integers(60, 96)))
            size += path.stat().st_size
    return size


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and the most memory (MiB) of a process of its own."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} ended with {status}")
    return time.perf_counter() - started, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--folder", type=Path,
                        help="keep the pictures here, and use them if they are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = args.folder or Path(scratch) / "pictures"
        if not pictures.exists():
            size = make_pictures(pictures, args.pictures) / 1e6
            print(f"{args.pictures:,} pictures, {size:,.0f} MB")
        bare = run([sys.executable, "-c", BARE])[1]
        for start in ("first", "second"):
            command = [sys.executable, dld.__file__, "--task", "images", "--data", str(pictures),
                       "--data-dir", f"{scratch}/data", "--output-dir", f"{scratch}/outputs",
                       "--epochs", str(args.epochs)]
            seconds, memory = run(command)
            newest = max(Path(scratch, "outputs").glob("*/metrics.json"),
                         key=lambda path: path.stat().st_mtime)
            metrics = json.loads(newest.read_text("utf-8"))
            print(f"{start} start: {metrics['seconds_setup']:.1f} s before the first step, imports "
                  f"and measuring included, {seconds:.0f} s in all; {memory:,.0f} MiB at most, "
                  f"{memory - bare:,.0f} beyond a bare torch ({bare:,.0f}); test accuracy "
                  f"{metrics['test_accuracy']:.2%}", flush=True)


if __name__ == "__main__":
    main()
