"""What is handed in beside the page: front matter, tables, references; several seeds; warnings."""
import re
import shutil
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dld, metrics_of

QUICK = ["--data", "offline", "--device", "cpu", "--report", "minimal", "--limit", "200"]


def test_front_matter_and_tables_say_what_was_given_whatever_signs_it_has(
        tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.chdir(tmp_path)
    title, author = "100 % of $x_1$ & <b>\\frac</b>", "Ada *Example* #7"
    assert dld.main(["--task", "mnist", *QUICK, "--epochs", "1", "--width", "16", "--title", title,
                     "--author", author, "--course", "ML, winter"]) == 0
    out = capsys.readouterr().out
    narrow = [line for line in out.splitlines() if "/" not in line or "%" in line]
    assert max(map(len, narrow)) < 80, narrow
    run = tmp_path / "outputs" / "mnist-offline-digits"
    page, text = ((run / f"report.{kind}").read_text("utf-8") for kind in ("html", "md"))
    assert "&lt;b&gt;" in page and "Ada *Example* #7 · ML, winter · " in page
    assert text.startswith("# 100 % of $x\\_1$ & \\<b\\>") and "Ada \\*Example\\* #7" in text
    tables = (run / "tables.tex").read_text("utf-8")
    assert r"100 \% of \$x\_1\$ \& <b>\textbackslash{}frac</b>" in tables
    assert tables.count(r"\toprule") == 2 == tables.count(r"\end{tabular}")
    assert f"{metrics_of(run)['test_accuracy']:.2%}".replace("%", r"\%") in tables
    assert dld.main(["--resume", str(run), "--author", "Somebody else", "--epochs", "2"]) == 0
    assert "Somebody else" in (run / "report.html").read_text("utf-8")


def test_the_matrix_and_the_references_are_those_of_the_run(finished):
    for task, run in finished.items():
        table = pd.read_csv(run / "predictions.csv", dtype=str)
        classes = pd.read_csv(run / "classes.csv", dtype=str)["class"]
        counts = pd.crosstab(table["true"], table["predicted"]).reindex(
            index=classes, columns=classes, fill_value=0)
        matrix = pd.read_csv(run / "confusion_matrix.csv", index_col=0)
        assert (matrix.to_numpy() == counts.to_numpy()).all()
        page = (run / "report.html").read_text("utf-8")
        cells = re.findall(r'<a href="#cell-(\d+)-(\d+)">([\d,]+)<', page)
        assert {(int(a), int(b)): int(n.replace(",", "")) for a, b, n in cells} == {
            (a, b): counts.iloc[a, b] for a, b in zip(*counts.to_numpy().nonzero(), strict=True)}
        text = (run / "references.bib").read_text("utf-8")
        keys = re.findall(r"^@misc\{(\w+),$", text, re.M)
        assert len(keys) == len({*keys}) == text.count("year")
        assert text.count("{") == text.count("}")
        assert {"cifar10": {"gradcam", "muon", "fast"}, "mnist": {"integrated"},
                "sentiment": {"lstm", "attention", "wide"}}[task] <= {*keys}
        assert task not in keys, "a stand-in is not the data set"


def test_several_seeds_end_in_one_page_with_mean_and_spread(tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "mnist", *QUICK, "--epochs", "2", "--width", "16", "--seed", "5"]
    assert dld.main([*flags, "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 trainings one after another, which take 3 times as long as one" in " ".join(
        out.split("Task")[0].split())
    runs = [tmp_path / "outputs" / f"mnist-offline-digits{end}" for end in ("", "-2", "-3")]
    metrics = [metrics_of(run) for run in runs]
    assert [m["seed"] for m in metrics] == [5, 6, 7]
    right = np.array([m["test_accuracy"] for m in metrics])
    half = 4.302653 * right.std(ddof=1) / 3 ** 0.5  # Student's t, two degrees of freedom
    said = (f"Test accuracy {right.mean():.2%} on average over 3 seeds, standard deviation "
            f"{100 * right.std(ddof=1):.2f} points")
    page = (tmp_path / "outputs" / "mnist-offline-digits-seeds.html").read_text("utf-8")
    low, high = max(0, right.mean() - half), min(1, right.mean() + half)
    assert said in page and f"95% interval {low:.2%} to {high:.2%}" in page
    assert said in " ".join(out.split()) and "good for trying out" in page
    table = pd.read_csv(tmp_path / "outputs" / "mnist-offline-digits-seeds.csv")
    assert np.allclose(table["test_accuracy"], right)
    alone = dld.main([*flags[:-1], "6", "--output-dir", "alone"])
    assert alone == 0 and metrics_of(tmp_path / "alone" / runs[0].name)["test_accuracy"] == right[1]


def test_seeds_that_agree_say_nothing_certain_about_all_others(finished, tmp_path, undrawn):
    runs = [shutil.copytree(finished["mnist"], tmp_path / name) for name in ("a", "b")]
    said = " ".join(dld.write_seeds(runs))
    assert "standard deviation 0.00 points" in " ".join(said.split()) and "Student" not in said


@pytest.mark.parametrize(("flags", "message"), [
    (["--task", "mnist", "--seeds", "1"], "--seeds 1: give 2 to 100"),
    (["--task", "all", "--seeds", "3"], "--seeds takes one --task at a time"),
    (["--resume", "outputs/x", "--seeds", "3"], "--resume and --seeds cannot be combined"),
    (["--task", "mnist", "--seeds", "3", "--epochs", "0"], "--epochs 0: must be at least 1")])
def test_seeds_that_cannot_be_meant_are_one_line_before_anything_is_trained(
        flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dld.main(flags) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("task", ["mnist", "sentiment"])
@pytest.mark.parametrize("passed", [True, False])
def test_an_explanation_that_failed_its_test_is_shown_with_a_warning(
        task, passed, finished, tmp_path, undrawn, capsys):
    run = shutil.copytree(finished[task], tmp_path / "run")
    m = metrics_of(run)
    m |= {key: 0.1 if passed else -0.1 for key in m if re.search("_over_(random|untrained)_low$",
                                                                 key)}
    dld.write_json(run / "metrics.json", m)
    given = tmp_path / "given"
    if task == "mnist":
        pixels = torch.zeros(28, 28, dtype=torch.uint8).numpy()
        dld.write_atomically(tmp_path / "a.png", lambda part: dld.plot_pictures(
            [pixels], [dld.Verdict("x")], part, ""))
        given = tmp_path / "a.png"
    else:
        given = given.with_suffix(".txt")
        given.write_text("The plot was good.\n")
    flags = ["--predict", str(given), "--run", str(run), "--device", "cpu"]
    assert dld.main([*flags, "--output", str(tmp_path / "p.csv"), "--explain"]) == 0
    assert (dld.DOUBT in capsys.readouterr().out) != passed
    assert dld.main(flags) == 0
    shown = capsys.readouterr().out
    assert (dld.DOUBT in shown) == (task == "sentiment" and not passed), "words are named there"
    ready = dld.Predictor(run, dld.start_machine(dld.Config(device="cpu")))
    body = given.read_bytes() if task == "mnist" else b'{"text": "The plot was good."}'
    answer = dld.answer_request(ready, "image/png" if task == "mnist" else "application/json",
                                body, explain=True)
    assert (dld.DOUBT in answer["method"]) != passed


def test_of_many_predictions_the_screen_shows_twenty(finished, tmp_path, capsys):
    lines = tmp_path / "lines.txt"
    lines.write_text("The plot was good.\n" * 33)
    assert dld.main(["--predict", str(lines), "--run", str(finished["sentiment"])]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^(positive|negative) ", out, re.M)) == 20
    assert "... and 13 more; --output predictions.csv writes all of them" in out


def test_of_more_than_100_classes_the_best_alone_is_said():
    none = types.SimpleNamespace(model=None, prediction_note=lambda model, row: "")
    found = pd.Series({"name": "a.png", "predicted": "cat", "confidence": 0.5})
    assert dld.say_prediction(none, none, 0, found).split() == ["cat", "50.0%", "a.png"]


def test_few_pictures_of_ones_own_end_with_a_hint_unless_it_is_taken():
    few = {"train_samples": 500, "test_accuracy": 0.9}
    settings = {"task": "images", "pretrained": False, "init": ""}
    assert dld.small_pictures(few, settings)
    for m, other in ((few | {"train_samples": 50_000}, settings),
                     (few | {"test_accuracy": 1.0}, settings), (few, {**settings, "task": "text"}),
                     (few, {**settings, "pretrained": True}), (few, {**settings, "init": "a"})):
        assert not dld.small_pictures(m, other)
