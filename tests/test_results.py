"""Runs as data: the store's Results by field, a Result as a notebook shows it, the command line."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cvfp
from cvfp import Experiment, ParameterError, Result, __main__, cache, packs, store


@pytest.fixture(scope="session")
def finished(tiny: Experiment) -> Result:
    return cvfp.run(tiny)


@pytest.fixture
def kept(home: Path, finished: Result) -> Callable[..., str]:
    """Keep the finished run as one of another Experiment; its key."""

    def keep(**fields: Any) -> str:
        experiment = finished.experiment.replace(**fields)
        key = cache.digest(experiment.to_dict())
        record = replace(finished, key=key, experiment=experiment).to_dict()
        store.write_run(key, record)
        return key

    return keep


def keys(results: cvfp.Results) -> list[str]:
    return [one.key for one in results]


def test_results_by_field(kept: Callable[..., str]) -> None:
    small, large = (kept(samples=samples) for samples in (6, 7))
    peer = kept(model="lstm", vocab_size=300)
    assert set(keys(cvfp.results())) == {small, large, peer}
    assert keys(cvfp.results(samples=7)) == [large]
    assert set(keys(cvfp.results(samples=[6, "7"], model="cvfp"))) == {small, large}
    assert keys(cvfp.results(model="lstm", vocab_size=(300, 400))) == [peer]
    assert cvfp.results(samples=8) == []
    assert all(one.from_store for one in cvfp.results())
    assert len(cvfp.results().frame()) == 3


def test_fields_are_checked_by_name(home: Path) -> None:
    with pytest.raises(ParameterError, match=r"sample: got .*; accepted: samples \(or one of"):
        cvfp.results(sample=50)
    with pytest.raises(ParameterError, match=r"precision: got 'bf16'; accepted: 'auto' or"):
        cvfp.results(precision=["float32", "bf16"])
    assert cvfp.results() == []


def test_what_cannot_be_read_is_left_out_with_a_warning(
    kept: Callable[..., str], recwarn: pytest.WarningsRecorder
) -> None:
    good, flipped, other = kept(), kept(seed=1), kept(seed=2)
    path = cache.home() / "runs" / f"{flipped}.json"
    path.write_text(path.read_text().replace("val_ppl", "val_ppm"))
    record = store.read_run(other)
    assert record is not None
    store.write_run(other, record | {"experiment": {**record["experiment"], "block": "gone"}})
    store.write_run("of-another-name", record)
    found = cvfp.results()
    assert keys(found) == [good]
    said = [str(one.message) for one in recwarn]
    assert any("damaged" in words for words in said)
    assert any("2 of 3 runs cannot be read" in words for words in said)


def test_a_pack_is_read_by_field_too(kept: Callable[..., str], tmp_path: Path) -> None:
    kept(seed=1)
    second = kept(seed=2)
    packs.pack(tmp_path / "runs.zip")
    assert keys(packs.results(tmp_path / "runs.zip", seed=2)) == [second]


# A Result in a notebook


def test_a_result_shows_its_figures_and_two_curves(finished: Result) -> None:
    shown = finished._repr_html_()
    root = ET.fromstring(f"<div>{shown}</div>")
    heads, cells = (list(root.iter(tag)) for tag in ("th", "td"))
    assert len(heads) == len(cells)
    assert f"{finished.val_ppl:.1f}" in [cell.text for cell in cells]
    lines = [one.get("points", "").split() for one in root.iter("polyline")]
    histories = finished.phase1_history, finished.phase2_history
    assert [len(points) for points in lines] == [len(rows) for rows in histories]
    for points in lines:
        for x, y in (map(float, point.split(",")) for point in points):
            assert 0 <= x <= 160
            assert 0 <= y <= 40


def test_curves_rise_where_their_values_do(finished: Result) -> None:
    rows = [{"converged": value} for value in (1.0, 3.0, 2.0)]
    shown = replace(finished, phase1_history=rows, phase2_history=[{"val_ppl": 5.0}] * 2)
    root = ET.fromstring(f"<div>{shown._repr_html_()}</div>")
    first, level = (one.get("points", "").split() for one in root.iter("polyline"))
    assert first == ["2.0,38.0", "80.0,2.0", "158.0,20.0"]  # up is less
    assert level == ["2.0,2.0", "158.0,2.0"]
    assert "1 → 2" in shown._repr_html_()


def test_what_comes_from_a_corpus_is_escaped(finished: Result, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    experiment = finished.experiment.replace(dataset=evil)
    shown = replace(finished, experiment=experiment, aborted='<img src="x">')._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;" in shown


def test_a_run_without_contexts_and_one_without_anything_are_shown(finished: Result) -> None:
    bare = replace(finished, phase1_history=[], phase2_history=[], val_ppl=None, val_er=None)
    bare = replace(bare, baselines={"trigram_both": None})
    shown = bare._repr_html_()
    assert "–" in shown
    assert "svg" not in shown


# The command line


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cvfp", *words])
    __main__.main()


def test_runs_are_listed_with_what_they_differ_in(
    kept: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (kept(seed=seed) for seed in (1, 2, 3))
    main(monkeypatch, "results", "seed=1", "seed=2", "samples=6")
    out = capsys.readouterr().out
    assert first in out
    assert second in out
    assert third not in out
    assert out.split("\n")[0].split() == ["key", "seed", *__main__.FIGURES]
    main(monkeypatch, "results", "seed=9")
    assert capsys.readouterr().out == "no such runs\n"


def test_a_run_from_the_command_line(
    shared_home: Path,
    finished: Result,
    tiny: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    default = Experiment.preset("mini")
    changed = {
        name: value for name, value in tiny.to_dict().items() if value != getattr(default, name)
    }
    main(monkeypatch, "run", "mini", *(f"{name}={value}" for name, value in changed.items()))
    assert finished.key in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["results", "sample=5"], "sample: got"),
        (["results", "samples"], "got 'samples'; accepted: field=value"),
        (["run", "mini", "samples=5", "samples=6"], "accepted: each once"),
        (["run", "minu"], "preset: got 'minu'"),
        (["run", "mini", "samples=-1"], "samples: got -1"),
        (["pack"], "FILE"),
    ],
)
def test_the_command_line_refuses_by_name(
    words: list[str],
    said: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(monkeypatch, *words)
    assert said in capsys.readouterr().err
