"""Bad input: for each kind the exit code, one line that says what, where and what to try, and
nothing written or lost.

The tables are the documentation: what is wrong, in flags or in an empty folder, and the message.
"""
import hashlib
import io
import json
import math
import os
import pickle
import random
import shlex
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import dld
from PIL import Image

MNIST = "--task mnist --data offline --device cpu"

FLAGS = [
    ("--task cifer10", "sentiment, images, text, all (did you mean cifar10?)"),
    ("--taks mnist", "unknown argument --taks (did you mean --task?)"),
    ("mnist", "unknown argument mnist (did you mean --task mnist?)"),
    ("train", "unknown argument train (did you mean --task?)"),
    ("--image-size 3", "--image-size 3: must be at least 4"),
    ("--epochs many", "invalid int value: 'many'"),
    (f"--epochs {10**30}", "must be at least 1 and at most 1000000"),
    ("--lr nan", "--lr takes a finite number"),
    ("--dropout 1", "--dropout 1.0: must be at least 0 and at most 0.95"),
    ("--device cuda", "this PyTorch sees no CUDA device; use --device auto or cpu"),
    ("--task all --model mlp", "Known: lstm"),
    ("--budget 5", "--budget 5: give a time with its unit, as 90s, 5m or 1h"),
    ("--folds 3 --budget 3m", "--folds and --budget cannot be combined"),
    (f"{MNIST} --limit 20 --folds 99", "--folds 99: there are only 23 training samples"),
    (f"{MNIST} --limit 1", "has no training sample of 0, 1, 2"),
    (f"{MNIST} --batch-size 1", "at least 2 samples a step are needed here"),
    ("--mirror ftp://x/y", "--mirror ftp://x/y: give an address that begins with http"),
    ("--evaluate --resume x", "--evaluate and --resume cannot be combined"),
    ("--config x.json --task all", "--config repeats a run of one task, not all"),
    ("--predict x.png", "--predict needs --run RUN"),
    ("--run outputs/x", "--run needs --predict or --evaluate or --serve or --export"),
    ("--serve --run a/x b/x", "a folder name of its own"),
    ("--data offline --pretrained", "no weights of fast are published"),
    ("--task images", "--task images needs your own data: give --data FOLDER"),
    ("--data my/pictures", "your own data needs --task images or --task text"),
    ("--resume nowhere", "--resume nowhere: no such folder"),
    ("--config nowhere.json", "cannot read nowhere.json"),
]

CONFIGS = [("{", "bad.json is not valid JSON"), ("[]", "expected a JSON object"),
           ('{"epoch": 3}', "unknown setting 'epoch' (did you mean epochs?)"),
           ('{"epochs": "ten"}', "--epochs takes a whole number, got 'ten'")]


def nothing(place):
    """For rows in which files are right, and flags are not."""


def all_of(*harms):
    return lambda place: [harm(place) for harm in harms]


def write(name, new):
    """A file, and folders around it: these bytes or words, or what a function makes of its own."""
    def harm(place):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = new(path.read_bytes()) if callable(new) else new
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return harm


def lose(name):
    return lambda place: (place / name).unlink()


def folder(name):
    """A folder of this name, perhaps where a file was."""
    def harm(place):
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir(parents=True)
    return harm


def pictures(*names):
    """Small pictures with these names."""
    def harm(place):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(place / name)
    return harm


def flip(blob):
    """One bit in the middle of the longest part of a file that PyTorch saved."""
    longest = max(zipfile.ZipFile(io.BytesIO(blob)).infolist(), key=lambda part: part.file_size)
    at = longest.header_offset + 200 + longest.file_size // 2  # behind its head
    return blob[:at] + bytes([blob[at] ^ 4]) + blob[at + 1:]


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch boom",))


def batch(**changes):
    """A CIFAR-10 batch that differs from a right one in this."""
    pixels = (np.arange(20 * 3072) % 251).astype(np.uint8).reshape(20, 3072)
    right = {b"data": pixels, b"labels": [i % 10 for i in range(20)]}
    return pickle.dumps({**right, **{key.encode(): value for key, value in changes.items()}}, 2)


def idx(*shape):
    """One of MNIST's files."""
    head = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
    return head + (np.arange(math.prod(shape)) % 10).astype(np.uint8).tobytes()


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
OFFICIAL = {  # a small data set of each, in a folder of this name
    "cifar10": ("cifar-10-batches-py", {name: batch() for name in BATCHES}),
    "mnist": ("MNIST/raw", {
        IMAGES: idx(40, 28, 28), LABELS: idx(40), "t10k-images-idx3-ubyte": idx(20, 28, 28),
        "t10k-labels-idx1-ubyte": idx(20)}),
    "sentiment": ("aclImdb", {f"{part}/{sense}/{i}.txt": f"a {sense} text, {i}" for i in range(3)
                              for part in ("train", "test") for sense in ("pos", "neg")}),
}


def official(task, harm):
    """One of these with something wrong in it."""
    name, files = OFFICIAL[task]

    def arrange(place, finished):
        for each, content in files.items():
            write(each, content)(place / "data" / name)
        harm(place / "data" / name)
    return arrange


SECOND = "data_batch_2"
DATA = [
    ("cifar10", lose(SECOND), "cannot read data/cifar-10-batches"),
    ("cifar10", write(SECOND, lambda blob: blob[:1000]), f"{SECOND} is damaged"),
    ("cifar10", write(SECOND, pickle.dumps(Bomb())), f"it asks for {os.system.__module__}.system"),
    ("cifar10", write(SECOND, batch(labels=[12] * 20)), "labels outside 0-9"),
    ("cifar10", all_of(*(write(each, batch(labels=[1] * 20)) for each in BATCHES)),
     "has no training sample of"),
    ("mnist", write(IMAGES, ""), f"{IMAGES} is damaged"),
    ("mnist", write(IMAGES, bytes([0, 0, 8, 3]) + b"\xff" * 12), f"{IMAGES} is damaged"),
    ("mnist", write(LABELS, idx(40)[:8] + bytes([77] * 40)), "its labels do not fit together"),
    ("mnist", all_of(write(IMAGES, idx(10, 28, 28)), write(LABELS, idx(10))), "files swapped?"),
    ("mnist", all_of(lose(IMAGES), write(f"{IMAGES}.gz", "no")), "damaged (md5 differs"),
    ("sentiment", lambda place: shutil.rmtree(place / "test/neg"), "test/neg: No such file"),
    ("sentiment", all_of(*(lose(f"test/pos/{i}.txt") for i in range(3))), "holds no .txt file"),
]

OWN = [
    ("images", "own", nothing, "--data own: no such folder"),
    ("images", "own.zip", write("own.zip", "PK"), "--data own.zip: a file; unpack it"),
    ("images", "own", folder("own"), "in folders; expected one folder a class"),
    ("images", "own", pictures("own/a.png", "own/b.png"), "but no folder for each class"),
    ("images", "own", pictures("own/cat/a.png", "own/cat/b.png"), "has only the class cat"),
    ("images", "own", all_of(write("own/a/x.png", "no"), write("own/b/y.png", "no")),
     "none of the pictures can be read, for example"),
    ("images", "own", pictures("own/test/a/x.png", "own/val/b/y.png"), "but no folder train"),
    ("text", "own.csv", write("own.csv", "text,label\na,1\n".encode("utf-16-le")),
     "in an encoding that is not known here"),
    ("text", "own.csv", write("own.csv", "text,label\n"), "own.csv holds no rows"),
    ("text", "own.csv", write("own.csv", ",,\n"), "own.csv holds no rows"),
    ("text", "own.csv", write("own.csv", "text\na\nb\n"), "name it with --label-column"),
    ("text", "own.csv", write("own.csv", "text,label\na,1\nb,1\n"), "has only the class 1"),
    ("text", "own.csv", write("own.csv", "text,label\na,\nb,\n"), "no class in the column label"),
    ("text", "own.jsonl", write("own.jsonl", "a\nb\n"), "own.jsonl holds no rows"),
]


def change(name, **values):
    """A model.pt or checkpoint.pt with other contents."""
    return lambda run: torch.save(
        {**torch.load(run / name, weights_only=True), **values}, run / name)


def alter(name, part, **values):
    """The same, of a part of it; None: it is not there."""
    def harm(run):
        saved = torch.load(run / name, weights_only=True)
        part_now = {**saved[part], **values}
        saved[part] = {key: part_now[key] for key in part_now if part_now[key] is not None}
        torch.save(saved, run / name)
    return harm


def edit(name, **values):
    """A config.json or metrics.json with other contents."""
    return write(name, lambda blob: json.dumps({**json.loads(blob), **values}))


LOOK, MORE = "--predict picture.png --run run", "--resume run --epochs 9"
RUNS = [
    (nothing, "--predict gone.png --run run", "no such file"),
    (nothing, f"--predict {'x' * 300} --run run", "no such file"),
    (nothing, f"{LOOK} --explain", "--explain needs --output FILE.csv"),
    (nothing, f"{LOOK} --output no/p.csv", "--output no/p.csv: no such folder"),
    (nothing, f"{LOOK} --lr 1", "leave out --lr"),
    (nothing, f"{MNIST} --init run --width 64", "its width is 128; leave out --width"),
    (nothing, "--task sentiment --data offline --init run", "its network reads pictures"),
    (nothing, "--evaluate --run run --seed 1", "leave out --seed"),
    (nothing, "--resume run", "has finished its 2 epochs; give more --epochs"),
    (nothing, "--resume run --lr 1", "--lr would change the past"),
    (folder("none"), "--predict run/none --run run", "this run's model reads pictures"),
    (write("x.png", "PNG"), "--predict run/x.png --run run", "not a picture that can be read"),
    (lose("model.pt"), LOOK, "model.pt is not there"),
    (folder("model.pt"), LOOK, "model.pt is damaged or not made by this program"),
    (write("model.pt", flip), LOOK, "model.pt is damaged"),
    (change("model.pt", meta=Bomb()), LOOK, "model.pt is damaged"),
    *((alter("model.pt", "meta", **{key: value}), LOOK, "model.pt: something in it is missing")
      for key, value in (("temperature", math.nan), ("temperature", 0.0), ("temperature", "1"),
                         ("classes", None), ("reference", None), ("stand_in", None))),
    (alter("model.pt", "weights", **{"1.weight": torch.full((128, 784), math.nan)}), LOOK,
     "model.pt: something in it is missing, or no number"),
    *((alter("model.pt", "meta", **{key: value}), LOOK, "what it says of them do not fit together")
      for key, value in (("side", 0), ("side", 10**6), ("channels", None), ("classes", ["a"]),
                         ("mean", None), ("width", -1), ("model", "no such"))),
    (alter("checkpoint.pt", "origin", seed=7), MORE, "--seed was 7, and is 0 there"),
    (alter("checkpoint.pt", "origin", fingerprint="0"), MORE, "has changed since run/checkpoint"),
    (change("checkpoint.pt", origin=None), MORE, "does not fit its config.json"),
    (alter("model.pt", "meta", fingerprint="0"), "--evaluate --run run",
     "has changed since this run was trained"),
    (change("model.pt", format=99), LOOK, "format 99, this version of the program reads"),
    (edit("metrics.json", status="running"), "--compare run .", "this run has not finished"),
    (lose("predictions.csv"), "--compare run .", "not a run folder of this version"),
    (edit("metrics.json", test_accuracy="x"), "--compare run .", "test_accuracy is 'x'"),
    (edit("metrics.json", latency_ms=math.inf), "--compare run .", "latency_ms is inf"),
    (edit("metrics.json", dataset=5), "--compare run .", "dataset is 5"),
    (write("history.csv", "a,b\n1,2\n"), "--compare run .", "not a run folder of this version"),
    (nothing, f"{LOOK} --output picture.png", "an input, or a file of the run; name another"),
    (nothing, f"{LOOK} --output table.xlsx", "what is written is CSV; name it .csv"),
    (nothing, f"{LOOK} --output run/model.pt", "an input, or a file of the run; name another"),
    (lose("checkpoint.pt"), MORE, "checkpoint.pt is not there"),
    (write("checkpoint.pt", flip), MORE, "checkpoint.pt is damaged"),
    (change("checkpoint.pt", best={"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0}),
     f"{MORE} --patience 1", "stopped early by --patience; give --patience 0"),
    (change("checkpoint.pt", history=[{"epoch": 1, "val_accuracy": 1.0}] * 2),
     f"{MORE} --patience 4", "stopped early by --patience; give --patience 0"),
    (edit("config.json", width=64), MORE, "does not fit its config.json"),
    (edit("config.json", flavour="red"), MORE, "unknown setting 'flavour'"),
]


def in_run(harm, task="mnist"):
    """A copy of a finished run with something wrong in it."""
    def arrange(place, finished):
        shutil.copytree(finished[task], place / "run")
        pictures("picture.png")(place)
        harm(place / "run")
    return arrange


def alone(harm):
    return lambda place, finished: harm(place)


SOURCE, CPU = "--data-dir data --device cpu --data", "--device cpu"
TABLE = [  # how it is arranged, the flags, the exit code, the message
    *((alone(nothing), flags, 2, message) for flags, message in FLAGS),
    *((alone(write("bad.json", text)), "--config bad.json", 2, message)
      for text, message in CONFIGS),
    *((official(task, harm), f"--task {task} {SOURCE} auto", 3, message)  # and no stand-in for it
      for task, harm, message in DATA),
    (alone(write("data/cifar-10-python.tar.gz", b"\x1f\x8b1")), f"{SOURCE} auto", 3, "md5 differs"),
    (alone(write("data/cifar-10-batches-py", "")), f"{SOURCE} real", 3, "cifar-10-python.tar.gz"),
    *((alone(harm), f"--task {task} --data {data} {CPU}", 3, message)
      for task, data, harm, message in OWN),
    (alone(write("own.csv", "text,label\n" + "".join(f"a,{i}\n" for i in range(99)))),
     f"--task text --data own.csv {CPU}", 2, "has 99 different values in 99 rows; is it"),
    (alone(write("own.csv", "text,label\na,1\nb,2\n")), "--task text --data own.csv "
     f"--label-column labl {CPU}", 2, "no such column (did you mean label?)"),
    *((in_run(harm), flags, 2, message) for harm, flags, message in RUNS),
    *((in_run(alter("model.pt", "meta", max_tokens=n), "sentiment"), "--predict good --run run", 2,
       "what it says of them do not fit together") for n in (0, -1, "a")),
    (alone(pictures("own/a/x.png", "own/b/y.png")), f"--task text --data own {CPU}", 2,
     "but 2 files that fit another task; try --task images"),
    (alone(write("own/a/x.txt", "good")), f"--task images --data own {CPU}", 2, "try --task text"),
    (alone(write("own.csv", "text,label\na,1\nb,2\n")), f"--task images --data own.csv {CPU}", 2,
     "--data own.csv: a table of texts? Then try --task text"),
    (alone(write("file", "")), f"{MNIST} --output-dir file/x", 1, "cannot write into"),
]


def everything(place):
    """Each file with its contents; locks and an empty cache may stay behind."""
    return {str(path.relative_to(place)): hashlib.sha256(
        path.read_bytes()).hexdigest() if path.is_file() else "" for path in place.rglob("*")
        if path.suffix != ".lock" and path.name not in (".lock", "cache")}


@pytest.mark.parametrize(("arrange", "flags", "code", "message"), TABLE,
                         ids=[f"{flags}: {message}" for _, flags, _, message in TABLE])
def test_bad_input_is_one_clear_line(arrange, flags, code, message, finished, tmp_path,
                                     monkeypatch, capsys):
    flags = shlex.split(flags)
    for package in ("fastapi", "uvicorn") if flags[0] == "--serve" else ():
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for archive in (*dld.MNIST, dld.CIFAR10, dld.IMDB):
        monkeypatch.setitem(archive.__dict__, "mirrors", ("http://127.0.0.1:9/refused",))
    arrange(tmp_path, finished)
    before = everything(tmp_path)
    capsys.readouterr()
    assert dld.main(flags) == code
    out, said = capsys.readouterr()
    assert message in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert "Traceback" not in said + out and "--debug" not in said
    assert everything(tmp_path) == before, "something was written or lost"


VALUES = ["", "--", "1e9", "mnist", "90s", "\0", "../x", "é" * 9, "%s", "nan", "\u2028", "\ud800",
          "--lr", None, True, 0, -1, 7, 10**30, 0.5, -1.5, math.nan, math.inf, [], [1], {}]


def test_neither_flags_nor_settings_end_in_a_traceback(tmp_path, monkeypatch, capsys):
    """Drawn at random; on a task that is not there, so that nothing is ever trained."""
    monkeypatch.chdir(tmp_path)
    draw, known = random.Random(0), [*dld.SETTINGS, "run", "predict", "compare", "resume", "port"]
    for i in range(200):
        values = {name: draw.choice(VALUES) for name in draw.sample(known, draw.randrange(4))}
        write("c.json", json.dumps(values))(tmp_path)
        flags = [word for name, value in values.items() for word in (
            f"--{name.replace('_', '-')}", str(value))] if i % 2 else ["--config", "c.json"]
        assert dld.main([*flags, "--task", "no such task"]) == 2, flags
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "--debug" not in said, (flags, said)
