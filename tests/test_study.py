"""The study: its reports exist and are not stale; how a report's state moves; the pages' blocks."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest

import cvfp
import dodo
from benchmarks import blocks, study
from cvfp import cache

REPORTS = study.reports()
NOW = {"fingerprint": "code", "notebook": "cells", "parameters": {"samples": 50}}
ON: study.Entry = {"device": "here", "torch": "2", "precision": "float32", "threads": 1}


def entry(**changes: Any) -> study.Entry:
    return {**NOW, "spot": {"val_ppl": 100.0, **ON}, "confirmed": None, **changes}


# What study.toml says


def test_every_report_and_no_other_is_listed() -> None:
    assert {path.stem for path in study.REPORTS.glob("*.ipynb")} <= set(REPORTS)
    assert set(study.entries()) <= set(REPORTS)
    settings = {(one.notebook[:2], one.setting) for one in REPORTS.values()}
    here = {(book, one) for book in ("03", "04", "05", "06") for one in ("mini", "published_size")}
    assert here <= settings
    assert all(one.needs_gpu for one in REPORTS.values() if one.setting != "mini")
    assert all(one.needs for one in REPORTS.values() if one.setting == "ultrachat")


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_has_its_notebook_with_such_parameters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook's own call of `given` takes them; the spot is an Experiment of the setting."""
    one = REPORTS[name]
    monkeypatch.chdir(study.NOTEBOOKS)  # where it is executed
    assert given(one, one.made_of["parameters"]).preset == study.PRESETS[one.setting]
    assert one.experiment.samples in range(1, 201)


@pytest.mark.parametrize("wrong", [{"sample": 500}, {"seeds": "a,b"}, {"seed": 1}])
def test_parameters_that_a_notebook_does_not_take_are_found(wrong: dict[str, Any]) -> None:
    with pytest.raises(cvfp.ParameterError):
        given(REPORTS["03_scaling_500"], wrong)


def given(one: study.Report, parameters: dict[str, Any]) -> Any:
    """What the notebook's `given` makes of its parameters and these."""
    cells = nbformat.read(one.source, 4).cells
    declared = next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    call = next(c.source for c in cells if c.source.startswith("given = "))
    namespace: dict[str, Any] = {}
    exec(declared, namespace)
    namespace |= {**parameters, "cvfp": cvfp, "n_jobs": 1}
    exec(call[: call.index("\n)") + 2], namespace)
    return namespace["given"]


def test_make_tells_the_notebooks_sweeps_where_to_run(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nenv | grep ^CVFP_\n")
    (tmp_path / "python").chmod(0o700)
    (tmp_path / "ready").touch()
    given = ["ENGINE=dask", f"BIN={tmp_path}", f"READY={tmp_path / 'ready'}"]
    there = {"PATH": os.environ["PATH"], "CVFP_ADDRESS": "tcp://h:1"}
    command = ["make", "-s", "study", *given]
    ran = subprocess.run(command, cwd=study.ROOT, env=there, capture_output=True, text=True)
    assert sorted(ran.stdout.split()) == ["CVFP_ADDRESS=tcp://h:1", "CVFP_ENGINE=dask"]


def test_no_report_is_stale() -> None:
    """A short run of the code as it was gave another figure: `make study` makes it anew."""
    assert [name for name, state in dodo.states().items() if state == "stale"] == []


# How states move


def test_states() -> None:
    def confirmed(**changes: Any) -> dict[str, Any]:
        return {"confirmed": {"fingerprint": "code", "agrees": True, **changes}}

    def state(**changes: Any) -> str:
        return study.state(entry(**changes), NOW)

    assert study.state(None, NOW) == "not run"
    assert state() == "fresh"
    assert state(fingerprint="old") == state(fingerprint=None) == "unconfirmed"
    assert state(fingerprint="old", **confirmed()) == "fresh"
    assert state(fingerprint="old", **confirmed(fingerprint="between")) == "unconfirmed"
    assert state(fingerprint="old", **confirmed(agrees=False)) == "stale"
    # Nothing but a spot that agrees, the report's own code or the report made anew mends that.
    assert state(fingerprint="old", **confirmed(fingerprint="between", agrees=False)) == "stale"
    assert state(fingerprint="old", notebook="other", **confirmed(agrees=False)) == "stale"
    assert state(**confirmed(fingerprint="between", agrees=False)) == "fresh"
    assert state(notebook="other") == state(parameters={"samples": 60}) == "outdated"
    assert state(fingerprint="old", notebook="other", **confirmed()) == "outdated"


@pytest.mark.parametrize(
    ("ppl", "on", "same"),
    [
        (100.009, {}, True),
        (100.02, {}, False),
        (99.98, {}, False),
        (100.4, {"device": "there"}, True),
        (100.4, {"torch": "3"}, True),
        (99.6, {"precision": "bfloat16"}, True),
        (99.6, {"threads": 2}, True),
        (100.6, {"device": "there"}, False),
    ],
)
def test_figures_agree_to_what_their_machines_allow(ppl: float, on: Any, same: bool) -> None:
    assert study.agrees({"val_ppl": 100.0, **ON}, {"val_ppl": ppl, **ON, **on}) is same


def test_the_fingerprint_is_the_same_for_all_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.12 tells of a function's empty type parameters, 3.13 of no empty list at all."""
    normalised = cache.normalised
    made = study.fingerprint.__wrapped__

    def told(old: str, new: str) -> str:
        monkeypatch.setattr(cache, "normalised", lambda s: normalised(s).replace(old, new))
        return str(made())

    before = made()
    assert told(", decorator_list=[]", ", decorator_list=[], type_params=[]") == before
    assert told("posonlyargs=[], ", "") == told(", decorator_list=[]", "") == before
    assert told("Load()", "Store()") != before


class Runner:
    """Stands for notebooks and runs: what they give, and how often they were asked."""

    def __init__(self) -> None:
        self.ppl, self.executed, self.fails = 100.0, 0, False

    def execute(self, report: study.Report) -> nbformat.NotebookNode:
        self.executed += 1
        if self.fails:
            raise RuntimeError("a cell failed")
        v4 = nbformat.v4
        picture = {"image/png": base64.b64encode(b"drawn").decode()}
        outputs = [
            v4.new_output("stream", name="stderr", text="noise"),
            v4.new_output("stream", name="stdout", text="fact"),
            v4.new_output("display_data", data=picture),
        ]
        cell = v4.new_code_cell("1", outputs=outputs, metadata={"papermill": {"duration": 1}})
        papermill = {"input_path": "/here", "output_path": "/there", "parameters": {}}
        return v4.new_notebook(cells=[cell], metadata={"papermill": papermill})

    def spot(self, report: study.Report) -> study.Entry:
        return {"val_ppl": self.ppl, **ON}


@pytest.fixture
def runner(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A study of its own, of one report and one that needs a GPU."""
    table = 'notebook = "03_scaling"\nsetting = "mini"\nparameters = {}\nspot = {}\n'
    toml = f"[one]\n{table}picture = true\n[other]\n{table}needs_gpu = true\n"
    (tmp_path / "study.toml").write_text(toml)
    monkeypatch.setattr(study, "REPORTS", tmp_path)
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: False)
    made = Runner()
    monkeypatch.setattr(study.make, "__defaults__", (made.execute, made.spot))
    monkeypatch.setattr(study.confirm, "__defaults__", (made.spot,))
    return made


def run(task: Any) -> list[str]:
    """What doit would do: the tasks that are not up to date, until one fails."""
    due = [one for one in task() if not all(one["uptodate"])]
    for one in due:
        function, arguments = one["actions"][0]
        function(*arguments)
    return [one["name"] for one in due]


def change_code(monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr(study, "fingerprint", lambda: to)


def test_a_report_is_made_once_and_whole(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dodo.task_study) == ["one", "other"]
    assert "one: 1 of 1, about 0 min left, 1 never timed" in (said := capsys.readouterr().out)
    assert "other: skipped; needs a GPU" in said
    book = nbformat.read(tmp_path / "one.ipynb", 4)
    assert [output.get("text") for output in book.cells[0].outputs] == ["fact", None]
    assert "papermill" not in book.cells[0].metadata
    assert book.metadata.papermill.output_path == "reports/one.ipynb"
    assert (tmp_path / "one.png").read_bytes() == b"drawn"
    kept = study.entries()["one"]
    assert kept["spot"]["val_ppl"] == 100
    assert kept["seconds"] >= 0
    assert kept["torch"]
    assert kept["device"]
    assert dodo.states() == {"one": "fresh", "other": "not run"}
    assert run(dodo.task_study) == ["other"]
    assert runner.executed == 1
    dodo.status()
    assert "fresh        one" in capsys.readouterr().out


def test_a_failure_leaves_the_report_as_it_was(runner: Runner, tmp_path: Path) -> None:
    run(dodo.task_study)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    runner.fails = True
    with pytest.raises(RuntimeError, match="a cell failed"):
        study.make(study.reports()["one"])
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}


def test_code_that_changed_is_confirmed_or_found_out(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(dodo.task_study)
    assert run(dodo.task_confirm) == []
    change_code(monkeypatch, "b")
    assert dodo.states()["one"] == "unconfirmed"
    assert run(dodo.task_confirm) == ["one"]
    assert dodo.states()["one"] == "fresh"
    change_code(monkeypatch, "c")
    runner.ppl = 101
    run(dodo.task_confirm)
    assert "one: stale" in capsys.readouterr().out
    assert dodo.states()["one"] == "stale"
    change_code(monkeypatch, "d")
    assert dodo.states()["one"] == "stale"
    assert run(dodo.task_study) == ["one", "other"]
    assert dodo.states()["one"] == "fresh"
    assert study.entries()["one"]["spot"]["val_ppl"] == 101
    change_code(monkeypatch, "e")
    assert dodo.states()["one"] == "unconfirmed"


def test_without_a_figure_nothing_is_confirmed(runner: Runner) -> None:
    run(dodo.task_study)
    study.keep("one", {**study.entries()["one"], "spot": None, "fingerprint": "old"})
    with pytest.raises(ValueError, match="make it anew"):
        run(dodo.task_confirm)
    assert dodo.states()["one"] == "unconfirmed"


def test_only_the_reports_that_are_named(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY", "other")
    assert run(dodo.task_study) == ["other"]
    monkeypatch.setenv("ONLY", "one,none")
    with pytest.raises(ValueError, match="ONLY: got none; accepted: some of one, other"):
        dodo.chosen()


def test_what_a_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    one = REPORTS["03_scaling_ultrachat"]
    monkeypatch.delenv("HUB", raising=False)
    assert "from the hub" in str(one.lacks(gpu=False))
    monkeypatch.setenv("HUB", "1")
    assert one.lacks(gpu=False) is None
    for there, lacks in ((False, "a GPU"), (True, None)):
        monkeypatch.setattr(study.torch.cuda, "is_available", lambda there=there: there)
        assert one.lacks(gpu=True) == lacks


def test_time_left() -> None:
    known = {"a": entry(seconds=90.0), "b": entry(seconds=210.0)}
    assert study.left(["a", "b"], known) == "about 5 min left"
    assert study.left(["b", "c", "d"], known) == "about 4 min left, 2 never timed"


# The pages


@pytest.mark.parametrize("name", blocks.PAGES)
def test_measured_blocks_are_what_their_files_give(name: str) -> None:
    page = (study.ROOT / name).read_text(encoding="utf-8")
    assert "<!-- measured: " in page
    assert blocks.filled(page, study.ROOT / "reports") == page, "python dodo.py readme"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("<!-- measured: spead -->\n<!-- end -->", "spead"),
        ("<!-- measured: speed -->\n", "not followed"),
        ("<!-- measured: speed -->\n<!-- measured: study -->\n<!-- end -->", "an end"),
    ],
)
def test_a_marker_that_names_nothing_or_has_no_end(page: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        blocks.filled(page, study.ROOT / "reports")


def test_what_is_typed_into_a_block_goes(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "study.toml").write_text('[one]\nsetting = "mini"\n')
    for name in blocks.PAGES:
        page = "a\n<!-- measured: study -->\ntyped\n<!-- end -->\nb\n"
        (tmp_path / name).write_text(page)
    blocks.write(tmp_path)
    blocks.write(tmp_path)
    table = "\n".join(
        [
            "| report | setting | made | commit | on | took |",
            "|---|---|---|---|---|---|",
            "| one | mini | not run |  |  |  |",
        ]
    )
    expected = f"a\n<!-- measured: study -->\n\n{table}\n\n<!-- end -->\nb\n"
    assert [(tmp_path / name).read_text() for name in blocks.PAGES] == [expected] * 2


def test_controls(tmp_path: Path) -> None:
    def row(samples: int, kind: str, ppl: float | None, *change: float) -> dict[str, Any]:
        names = ("change", "low", "high")
        figures = dict(zip(names, change or (None,) * 3, strict=True))
        cost = {"seeds": 3 if samples == 1000 else 5, "seconds": 1.0, "tokens": 1000 * samples}
        return {"samples": samples, "kind": kind, "ppl": ppl, **figures, **cost}

    rows = [
        row(1000, "CVFP, as published", 112.44),
        row(200, "CVFP, as published", 130.0),
        row(200, "plain window", 136.5, 0.05, 0.04, 0.061),
        row(1000, "plain window", 101.2, -0.1, -0.12, -0.081),
        {"samples": 200, "kind": "Kneser–Ney bigram", "ppl": 150.06},
        row(200, "LSTM", None),
        row(1000, "LSTM", 113.0, 0.005, 0.001, 0.009) | {"seeds": 2},
    ]
    about = {"setting": "mini", "device": "a GPU", "rows": rows}
    (tmp_path / "controls_mini.json").write_text(json.dumps(about))
    page = blocks.filled("<!-- measured: controls_mini -->\n<!-- end -->", tmp_path)
    assert "the 95 % interval. `mini`, a GPU.\n" in page
    head = ["200 conversations, 200,000 tokens, 5 seeds"]
    head.append("1,000 conversations, 1,000,000 tokens, 3 seeds")
    assert page.splitlines()[4:-2] == [
        f"|  | {' | '.join(head)} |",
        "|---|---|---|",
        "| CVFP, as published | 130.0 | 112.4 |",
        "| plain window | 136.5, +5.0 % (+4.0 to +6.1) | 101.2, −10.0 % (−12.0 to −8.1) |",
        "| LSTM | – | 113.0, +0.5 % (+0.1 to +0.9), 2 seeds |",
        "| Kneser–Ney bigram | 150.1 | – |",
    ]
    (tmp_path / "controls_mini.json").write_text(json.dumps({**about, "date": "2026-11-27"}))
    page = blocks.filled("<!-- measured: controls_mini -->\n<!-- end -->", tmp_path)
    assert "`mini`, a GPU, 2026-11-27.\n" in page
    with pytest.raises(FileNotFoundError):
        blocks.filled("<!-- measured: controls_published_size -->\n<!-- end -->", tmp_path)
