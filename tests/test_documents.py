"""What the documents say is what a run writes."""
import re

import pytest
from conftest import ROOT, dld, metrics_of

# Files and keys of runs that are not among the finished ones.
ELSEWHERE = {"folds.png", "folds.pt", "folds", "folds_accuracy", "folds_spread", "ended",
             "skipped.csv", "mistakes.png", "suspects.png",
             "near_repeats.png"}


def named(heading):
    """What the first column of a table in outputs/README.md names."""
    text = (ROOT / "outputs" / "README.md").read_text("utf-8")
    table = text.split(f"# {heading}")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_readme_of_outputs_names_every_file_of_a_run_and_no_other(finished):
    written = {path.name for run in finished.values() for path in run.iterdir()
               if not path.name.startswith(".") and not path.name.startswith("model.")}
    assert written | {"model.pt"} <= named("What a run folder holds")
    assert named("What a run folder holds") <= written | {"model.pt"} | ELSEWHERE


def test_the_readme_of_outputs_names_every_metric_of_a_run_and_no_other(finished):
    keys = set().union(*(metrics_of(run) for run in finished.values()))
    assert keys <= named("The keys of metrics.json") <= keys | ELSEWHERE


def test_the_readme_names_only_flags_that_there_are():
    parser = dld.build_parser()
    flags = {option for action in parser._actions for option in action.option_strings}
    text = (ROOT / "README.md").read_text("utf-8")
    others = {"--nproc-per-node", "--dist", "--data-binary", "--index-url"}
    assert len(text.splitlines()) <= 220 and len(text.encode()) <= 14_000, "three screens"
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags | others


def test_help_fits_a_screen_and_help_all_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            dld.main([flag])
        assert end.value.code == 0
        shown[flag] = capsys.readouterr().out
    lines = shown["--help"].splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 96
    flags = {option for action in dld.build_parser()._actions for option in action.option_strings}
    assert {*re.findall(r"^  (--[a-z-]+)", shown["--help-all"], re.M)} == flags - {"-h", *(
        flag for flag in flags if flag.startswith("--no-"))}
    assert 15 <= len(re.findall(r"^  --[a-z-]+", shown["--help"], re.M)) <= 22
