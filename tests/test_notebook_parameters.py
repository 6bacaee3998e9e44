"""What a notebook takes for its parameters: in IPython, papermill, nbval and a plain script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from synthetic import made
from traitlets.config import Config

import cvfp
from cvfp import ParameterError, notebook, parameters
from cvfp.analysis import ledger, measures
from cvfp.analysis.claims import Measurement
from cvfp.parameters import flag, integers, ladder, numbers, pair

ROOT = Path(__file__).resolve().parent.parent

IMPORTS = "import os, cvfp\nfrom cvfp import contexts, model\n_note = 5"
DECLARED = """preset = "mini"  # or "published"
samples = 20
seeds = "0,1"  # two
deep = None
n_jobs = 1"""
GIVEN = """given = cvfp.notebook.given(
    globals(), varies={"seed": "seeds", "contexts": "both are run"},
    seeds="seeds", n_jobs="count", deep="pair or None",
)"""
RUNS = "frame, curves, n = object(), [1, 2], 3\nfor seed in range(4):\n    dataset = 'a corpus'"

Run = Callable[[str], Any]


@pytest.fixture
def run() -> Run:
    """A cell run in a new IPython; returns its namespace, or raises what the cell raised."""
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))

    def cell(source: str) -> Any:
        outcome = shell.run_cell(source, store_history=True, silent=False)
        outcome.raise_error()
        return shell.user_ns

    return cell


def start(run: Run, *injected: str) -> notebook.Given:
    for source in (IMPORTS, DECLARED, *injected, GIVEN):
        space = run(source)
    return space["given"]


def test_declared_parameters_are_parsed_and_kept_as_written(run: Run) -> None:
    given = start(run)
    assert (given.preset, given.seeds, given.n_jobs, given.deep) == ("mini", [0, 1], 1, None)
    assert given.parameters == {"preset": "mini", "samples": 20, "seeds": "0,1"}
    with pytest.raises(AttributeError, match="seeds, n_jobs, deep"):
        given.sizes  # noqa: B018


def test_every_field_is_a_parameter(run: Run) -> None:
    given = start(run, "# Parameters\nnum_layers = 2\nphase1_noise = '0.2'\nweight_tying = 'false'")
    assert given.parameters["num_layers"] == 2
    made = cvfp.Experiment.preset(given.preset, **given._chosen)
    assert made == cvfp.Experiment(samples=20, num_layers=2, phase1_noise=0.2, weight_tying=False)


@pytest.mark.parametrize(
    ("injected", "name", "nearest"),
    [
        ("sample = 5", "sample", "samples"),
        ("seed_list = [1]\nsamples = 3", "seed_list", "seeds"),
        ("n_layers = None", "n_layers", "num_layers"),
        ("samples = 30\n\nphase2_epoch = 2", "phase2_epoch", "phase2_epochs"),
        ("learning_rate = float('nan')", "learning_rate", "phase2_learning_rate"),
        ("n_job: int = 2", "n_job", "n_jobs"),
        ("xyz = {'a': 1}", "xyz", "one of preset,"),
    ],
)
def test_unknown_name_stops_and_names_the_nearest(
    run: Run, injected: str, name: str, nearest: str
) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: got .*accepted: {nearest} "):
        start(run, f"# Parameters\n{injected}")


def test_unknown_name_in_the_parameters_cell_itself_and_its_mending(run: Run) -> None:
    run(IMPORTS)
    run(f"{DECLARED}\nsample = 5")
    with pytest.raises(ParameterError, match=r"^sample: .* accepted: samples "):
        run(GIVEN)
    run(DECLARED)  # `sample` is still a variable, but no longer in the cell
    assert run(GIVEN)["given"].seeds == [0, 1]


def test_edited_twice_before_the_next_cell_is_run(run: Run) -> None:
    run(IMPORTS)
    run(f"{DECLARED}\nsample = 5")
    run(DECLARED.replace("0,1", "7"))
    assert run(GIVEN)["given"].seeds == [7]


def test_variables_of_other_cells_are_no_parameters(run: Run) -> None:
    start(run)
    run(RUNS)
    run("model = object()")
    run("sample = 5")  # a scratch cell, far from the parameters
    given = run(GIVEN)["given"]
    assert given.parameters == {"preset": "mini", "samples": 20, "seeds": "0,1"}
    run(DECLARED.replace("20", "30"))
    assert run(GIVEN)["given"].parameters["samples"] == 30


def test_a_later_cell_of_literals_may_set_a_field(run: Run) -> None:
    start(run)
    run(RUNS)
    run("num_layers = 2\nsamples = 40")
    assert run(GIVEN)["given"].parameters == {
        "preset": "mini",
        "samples": 40,
        "num_layers": 2,
        "seeds": "0,1",
    }


def test_parameters_cell_may_compute_and_may_be_split(run: Run) -> None:
    run(IMPORTS)
    run(f"{DECLARED}\nsamples = 4 * 5\nseeds = range(3)\ndataset = os.path.join('a', 'b.jsonl')")
    given = run(GIVEN)["given"]
    assert given.parameters["seeds"] == [0, 1, 2]
    assert given.parameters["dataset"] == os.path.join("a", "b.jsonl")


def test_a_split_parameters_cell(run: Run) -> None:
    run(IMPORTS)
    first, rest = DECLARED.split("\n", 1)
    run(first)
    run(rest + "\nnum_layers = 2")
    run(GIVEN)
    run(RUNS)
    assert run(GIVEN)["given"].parameters["num_layers"] == 2


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("seed", "seeds, which sets it here"), ("contexts", r"no value \(both are run\)")],
)
def test_a_field_that_the_notebook_varies_is_refused(run: Run, name: str, accepted: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: got 3; accepted: {accepted}"):
        start(run, f"# Parameters\n{name} = 3")


def test_without_a_history_all_plain_values_count() -> None:
    space: dict[str, Any] = {}
    exec("\n".join((IMPORTS, DECLARED, "num_layers = 2", GIVEN)), space)
    assert space["given"].parameters["num_layers"] == 2
    with pytest.raises(ParameterError, match=r"^sample: "):
        exec("\n".join((IMPORTS, DECLARED, "sample = 2", GIVEN)), {})


def test_own_parameters_must_be_there() -> None:
    with pytest.raises(ParameterError, match=r"^seeds: got 'nothing'"):
        notebook.given({"preset": "mini"}, seeds="seeds")
    with pytest.raises(ParameterError, match=r"^seeds: got None"):
        notebook.given({"preset": "mini", "seeds": None}, seeds="seeds")


def test_mistakes_of_the_notebook() -> None:
    with pytest.raises(ValueError, match=r"seeds: got kind 'list'; accepted: seeds, "):
        notebook.given({"preset": "mini", "seeds": 1}, seeds="list")
    with pytest.raises(ValueError, match="varies: got sample;"):
        notebook.given({"preset": "mini"}, varies={"sample": "sizes"})


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("phase2_epochs", None, 2.5),
        ("phase2_epochs", None, "2.5"),
        ("num_layers", None, np.float64(2)),
        ("patience_epochs", "count", 2.5),
        ("max_new_tokens", "count", 0),
        ("n_jobs", "count", 0),
        ("n_jobs", "count", True),
        ("temperature", "number", -1),
        ("temperature", "number", float("inf")),
        ("sizes", "sizes", "50,0"),
        ("sizes", "sizes", "20,2.5"),
        ("patience_samples", "size", 0),
        ("sizes", "sizes", "20,100000"),
        ("ladder_to", "ladder", 100000),
        ("patience_samples", "size", 100000),
        ("samples", None, 100000),
        ("prompt", "text", " "),
        ("device", None, "gpu"),
    ],
)
def test_refused_before_anything_runs(name: str, kind: str | None, value: object) -> None:
    space = {"preset": "mini", name: value, "In": ["", f"preset = 'mini'\n{name} = 0"]}
    with pytest.raises(ParameterError, match=f"^{name}: "):
        notebook.given(space, **({} if kind is None else {name: kind})).experiment(
            vocab_size=300, fitting_samples=3
        )


def test_experiment_takes_what_was_given_and_overrides() -> None:
    space = {"preset": "mini", "samples": 3, "sizes": "3,4", "vocab_size": "300", "column": "none"}
    given = notebook.given(space, sizes="sizes")
    experiment = given.experiment(fitting_samples=3, seed=7)
    assert experiment == cvfp.Experiment(samples=3, vocab_size=300, fitting_samples=3, seed=7)


def test_numpy_numbers_and_paths_are_recorded_as_plain_values() -> None:
    space = {"preset": "mini", "num_layers": np.int64(2), "dataset": Path("a"), "size": np.int64(3)}
    history = "preset = 'mini'\nnum_layers = two\ndataset = Path('a')\nsize = three"
    given = notebook.given({**space, "In": ["", history]}, size="size")
    assert given.parameters == {"preset": "mini", "num_layers": 2, "dataset": "a", "size": 3}
    assert [type(one) for one in given.parameters.values()] == [str, int, str, int]


def test_source_has_all_that_makes_the_runs_again() -> None:
    space = {"preset": "mini", "num_layers": 2, "column": None, "sizes": range(3, 5), "n_jobs": 2}
    source = notebook.given(space, sizes="sizes", n_jobs="count").source("03_scaling", made())
    assert isinstance(source, measures.Source)
    assert source.notebook == "03_scaling"
    assert source.parameters == {"preset": "mini", "num_layers": 2, "sizes": [3, 4]}


def test_record_keeps_claims_and_lists_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Measurement] = []
    monkeypatch.setattr(ledger, "record", kept.append)
    by = None, "words", "03_scaling", {}, "here"
    one = Measurement("C6", "alpha", "mini", 1, 1.0, None, None, *by)
    assert list(notebook.record([made()], [one]).index) == [made().key]
    assert kept == [one]


def book(tmp_path: Path, *extra: str) -> Path:
    """The tiny notebook, on disk."""
    cells = [nbformat.v4.new_code_cell(source) for source in (IMPORTS, DECLARED, GIVEN, *extra)]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    path = tmp_path / "tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def papermilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Mapping[str, Any]], str]:
    """The tiny notebook executed by papermill with parameters; what its last cell printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = book(tmp_path, "print(given.parameters, given.seeds)")

    def execute(values: Mapping[str, Any]) -> str:
        executed = papermill.execute_notebook(
            path, tmp_path / "out.ipynb", parameters=values, progress_bar=False
        )
        return executed.cells[-1].outputs[0].text

    return execute


def test_papermill_injects_fields_that_are_not_declared(
    papermilled: Callable[[Mapping[str, Any]], str],
) -> None:
    values = {"preset": "mini", "seeds": [3], "n_jobs": 2, "deep": "1,2", "num_layers": 2}
    assert eval(papermilled(values).split("} ")[0] + "}") == {
        "preset": "mini",
        "samples": 20,
        "num_layers": 2,
        "seeds": [3],
        "deep": "1,2",
    }


def test_papermill_is_stopped_by_a_name_that_is_none(
    papermilled: Callable[[Mapping[str, Any]], str],
) -> None:
    with pytest.raises(Exception, match="sample: got 5; accepted: samples "):
        papermilled({"sample": 5})


def test_nbval_executes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = book(tmp_path, "assert given.seeds == [0, 1]", RUNS, GIVEN, "assert given.deep is None")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", str(path), "-c", "/dev/null"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


def test_nbval_reads_fields_in_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With notebooks/conftest.py, fields that the parameters cell sets are not the preset's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    path = book(tmp_path, "assert given.parameters['samples'] == 20", RUNS, GIVEN)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", str(path), "-c", "/dev/null"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


def test_all_kinds_read_something() -> None:
    values = {"ladder": 60, "pair": "1,2", "flag": "true", "text": 5, "number": "0.5"}
    values["file"] = __file__
    for missing in ("nowhere.json", str(Path(__file__).parent)):
        with pytest.raises(ParameterError, match=r"^x: got .*; accepted: a file that exists"):
            parameters.parsed("x", missing, "file or None")
    for kind in parameters.KINDS:
        assert parameters.parsed("x", values.get(kind, "3"), kind)
        assert parameters.parsed("x", "none", f"{kind} or None") is None


@pytest.mark.parametrize(
    ("cap", "rungs"),
    [
        (200, [50, 100, 200]),
        (300, [50, 100, 200, 300]),
        (2000, [50, 100, 200, 500, 1000, 2000]),
        (51, [50, 51]),
        ("200", [50, 100, 200]),
    ],
)
def test_ladder(cap: object, rungs: list[int]) -> None:
    assert ladder("samples", cap) == rungs


@pytest.mark.parametrize("cap", [30, 50, 0, -1, "x", [100, 200], "100,200", 200.5, True, None])
def test_ladder_refuses_what_is_not_one_size_above_50(cap: object) -> None:
    with pytest.raises(ParameterError, match=r"^samples: "):
        ladder("samples", cap)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (3, [3]),
        ("3", [3]),
        ([0, 1, 2], [0, 1, 2]),
        ((2, 0), [2, 0]),
        (range(3), [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("[0, 1, 2]", [0, 1, 2]),
        ("(0, 1)", [0, 1]),
        (["4", 5], [4, 5]),
    ],
)
def test_integers(value: object, found: list[int]) -> None:
    assert integers("seeds", value) == found


@pytest.mark.parametrize(
    "value",
    [[], "", "a", "1,a", [1, 1], "2,2", -1, 1.5, "1.5", True, [True], None, {"a": 1}, [[1]]],
)
def test_integers_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError, match=r"seeds: got .* accepted: an integer of at least 0"):
        integers("seeds", value)


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.1, [0.1]), ("0.1", [0.1]), ("0.001,0.003", [0.001, 0.003]), ([1, 0.5], [1.0, 0.5])],
)
def test_numbers(value: object, found: list[float]) -> None:
    assert numbers("rates", value) == found


@pytest.mark.parametrize("value", ["", [], "0.1,0.1", "a", -1, 0, float("nan"), True, "inf", None])
def test_numbers_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError, match=r"rates: got .* accepted: a number above 0"):
        numbers("rates", value)


@pytest.mark.parametrize("value", ["6,768", "(6, 768)", (6, 768), [6, 768]])
def test_pair(value: object) -> None:
    assert pair("deep", value) == (6, 768)
    assert pair("deep", "64,64") == (64, 64)


@pytest.mark.parametrize("value", ["6", "6,7,8", "0,5", "a,b", 6, None, (6.5, 7), [True, 2], ""])
def test_pair_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError, match=r"deep: got .* accepted: two integers of at least 1"):
        pair("deep", value)


@pytest.mark.parametrize(
    ("value", "found"), [(True, True), ("true", True), ("False", False), (False, False)]
)
def test_flag(value: object, found: bool) -> None:
    assert flag("full", value) is found


@pytest.mark.parametrize("value", ["yes", 1, 0, None, ""])
def test_flag_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError, match=r"full: got .* accepted: true or false"):
        flag("full", value)


def test_integers_has_a_lower_limit() -> None:
    assert integers("sizes", [5], low=5) == [5]
    with pytest.raises(ParameterError, match="at least 5"):
        integers("sizes", [4], low=5)
