#!/usr/bin/env python3
"""CIFAR-10 the way most people write it, and the same network, epochs and batch size here:

    python tests/benchmarks/conventional.py --data-dir data --compare --epochs 6
    python tests/benchmarks/conventional.py --data-dir data --epochs 6       the conventional alone

Conventional: a DataLoader over torchvision's data set, PIL transforms picture by picture, float32,
Adam, one evaluation an epoch, two curves at the end. Compared is the whole process, from the
command to its end; ours also writes every figure and report. The classic network of the program is
used in both.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def train(data_dir, epochs, workers):
    """What a tutorial would do."""
    import matplotlib.pyplot as plt
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    sys.path.insert(0, str(ROOT))
    from deep_learning_deliverable import classic_cnn
    normalise = [transforms.ToTensor(),
                 transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
    vary = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, padding=3),
            transforms.RandomRotation(8)]
    torch.manual_seed(0)
    order = torch.randperm(50_000).tolist()
    varied, plain = transforms.Compose(vary + normalise), transforms.Compose(normalise)
    train_set = Subset(CIFAR10(data_dir, train=True, transform=varied), order[5000:])
    val_set = Subset(CIFAR10(data_dir, train=True, transform=plain), order[:5000])
    test_set = CIFAR10(data_dir, train=False, transform=plain)
    train_loader = DataLoader(train_set, batch_size=128, shuffle=True, num_workers=workers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = classic_cnn({"channels": 3, "side": 32, "classes": train_set.dataset.classes,
                         "dropout": 0.5}).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()

    def evaluate(data):
        model.eval()
        correct = 0
        with torch.no_grad():
            for x, y in DataLoader(data, batch_size=128, num_workers=workers):
                correct += (model(x.to(device)).argmax(1) == y.to(device)).sum().item()
        return correct / len(data)

    losses, accuracies = [], []
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for x, y in train_loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(train_loader))
        accuracies.append(evaluate(val_set))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, "
              f"validation accuracy {accuracies[-1]:.1%}", flush=True)
    print(f"test accuracy {evaluate(test_set):.2%}")
    _, (left, right) = plt.subplots(1, 2)
    left.plot(losses)
    right.plot(accuracies)
    with tempfile.TemporaryDirectory() as folder:
        plt.savefig(Path(folder) / "curves.png")
        torch.save(model.state_dict(), Path(folder) / "model.pt")


def compare(data_dir, epochs, workers):
    """Both as processes of their own; images a second over the whole process."""
    rates = {}
    both = ["--data-dir", data_dir, "--epochs", epochs]
    with tempfile.TemporaryDirectory() as folder:
        for name, command in (
                ("conventional", [__file__, *both, "--workers", workers]),
                ("this program", [ROOT / "deep_learning_deliverable.py", "--task", "cifar10",
                                  "--model", "classic", "--data", "real", "--output-dir", folder,
                                  *both])):
            started = time.perf_counter()
            done = subprocess.run([sys.executable, *map(str, command)], capture_output=True,
                                  text=True, check=True)
            seconds = time.perf_counter() - started
            rates[name] = 45_000 * epochs / seconds
            said = next(line for line in done.stdout.splitlines()
                        if line.lower().startswith("test accuracy"))
            print(f"{name:13} {seconds:6.0f} s   {rates[name]:6.0f} images/s   {said}", flush=True)
        metrics = json.loads(next(Path(folder).glob("*/metrics.json")).read_text("utf-8"))
    ratio = rates["this program"] / rates["conventional"]
    print(f"{ratio:.2f} times the images a second, {epochs} epochs")
    print(f"{metrics['device']}, torch {metrics['torch']}, Python {sys.version.split()[0]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=0, help="of the conventional DataLoader")
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    (compare if args.compare else train)(args.data_dir, args.epochs, args.workers)


if __name__ == "__main__":
    main()
