"""Figures that are not what they seem are named: in the Result, in tables, by `run`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import tiny_experiment
from synthetic import judged, made, matrix
from test_comparison import groups

import cvfp
from cvfp import Experiment, ParameterError, Result, contexts, experiment, gap, tuning
from cvfp.analysis import published, tables
from cvfp.inputs import TokenInputs
from cvfp.model import ContextBlock
from cvfp.recurrence import Recurrence

GUESS = "perplexity over the vocabulary's 4,096: worse than a guess"
COLLAPSE = "collapse: contexts in 1.5 of 64 directions"
GROWS = "recurrence amplifies rounding, 1.02 times a token: contexts without a bound"


@pytest.mark.parametrize(
    ("measured", "wanted"),
    [
        ({}, []),
        ({"val_ppl": 4096.0}, []),
        ({"val_ppl": 4097.0}, [GUESS]),
        ({"val_ppl": None, "train_er": None, "val_er": None}, []),
        ({"val_er": 1.5 / 64}, [COLLAPSE]),
        ({"train_er": 1.5 / 64}, [COLLAPSE]),
        ({"train_er": 0.0, "val_er": 0.0}, ["collapse: contexts in 0.0 of 64 directions"]),
        ({"val_er": 3 / 64}, []),
        ({"contraction_rate": 0.999}, []),
        ({"contraction_rate": 1.0}, [GROWS.replace("1.02", "1")]),
        ({"contraction_rate": 1.02}, [GROWS]),
        ({"contraction_rate": math.nan}, [GROWS.replace("1.02", "nan")]),
        (
            {"val_ppl": 1e9, "val_er": 1.5 / 64, "contraction_rate": 1.02},
            [GUESS, COLLAPSE, GROWS],
        ),
    ],
)
def test_a_result_names_them(measured: dict[str, Any], wanted: list[str]) -> None:
    result = made(**measured)
    assert result.warnings == wanted
    assert result.row()["warnings"] == "; ".join(wanted)


def test_two_directions_of_four_are_no_collapse() -> None:
    assert made({"context_dim": 4}, train_er=0.5, val_er=0.5).warnings == []


# Tables

BAD: dict[str, Any] = dict(val_ppl=5000.0, val_er=1.5 / 64, contraction_rate=1.02)
ALL = "; ".join((GUESS, COLLAPSE, GROWS))


def kinds(bad: str | None) -> dict[str, list[Result]]:
    made = {kind: list(runs) for kind, runs in groups().items()}
    for result in made.get(bad or "", []):
        vars(result).update(BAD)
    return made


def two(size: int, **measured: Any) -> list[Result]:
    rest: dict[str, Any] = dict(
        parameters={"context_block": 1, "token_block": 2, "embedding": 3, "head": 0},
        seconds={"phase1": 1.0, "phase2": 2.0},
        phase2_history=[
            {"epoch": float(e), "val_loss": 5.0, "val_ppl": 150.0, "val_acc": 0.1}
            for e in (1, 2, 3, 4)
        ],
    )
    rows = {"samples": size, "phase2_epochs": 4, "phase2_patience": 4}
    return [judged(5.0, {**rows, "seed": seed}, **(rest | measured)) for seed in (0, 1)]


def frame(results: list[Result]) -> pd.DataFrame:
    lines = [f"{name}_{unit}" for name in cvfp.baselines.NAMES for unit in ("ppl", "bpb")]
    made = cvfp.Results(results).frame()
    blank = [name for name in lines if name not in made]
    figures = ["val_ppl", "val_acc", "val_bpb", "train_er", "val_er", "converged"]
    figures += ["phase1_iterations", "best_epoch", "memory_length"]
    return made.assign(**dict.fromkeys(blank, 1.0)).astype(dict.fromkeys(figures, float))


TABLES: dict[str, Callable[[dict[str, Any]], pd.DataFrame]] = {
    "runs": lambda bad: tables.runs(frame([*two(50), *two(100, **bad)])).T,
    "record": lambda bad: tables.record([*two(50), *two(100, **bad)]),
    "contrast": lambda bad: tables.contrast(
        [*two(50), *two(100, **bad)], [*two(50), *two(100)], "a", "b"
    ),
    "shapes": lambda bad: tables.shapes({"deep": two(50), "wide": two(50, **bad)}),
    "overfitting": lambda bad: tables.overfitting(
        {"a": two(50), "b": two(50, **bad)}, published.table("003_overfitting")
    ),
    "patience": lambda bad: tables.patience(two(50, **bad), [1, 2]),
    "comparison": lambda bad: tables.comparison(kinds(tuning.ZERO.format(1) if bad else None)),
    "configurations": lambda bad: tables.configurations(
        matrix(lambda run: bad if run["context_dim"] == 64 else {})
        .frame()
        .astype({"memory_length": float})
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_runs_names_them(name: str) -> None:
    words = TABLES[name](BAD)["warnings"]
    found = {word for word in words if word}
    assert found == {ALL}
    assert name == "patience" or 0 < sum(words == "") < len(words)
    assert "warnings" not in TABLES[name]({})


def test_one_run_beside_the_note_names_them() -> None:
    note = published.table("002_scaling").set_index("samples").loc[100]
    rest = dict(val_acc=0.1)
    assert tables.beside(made(**rest, **BAD), note).loc["warnings"].tolist() == [ALL, ""]
    assert "warnings" not in tables.beside(made(**rest), note).index


# A recurrence that amplifies


def loop(block: ContextBlock, inputs: TokenInputs) -> torch.Tensor:
    """The contexts token by token, in float64."""
    double, context, rows = block.double(), torch.zeros(1, block.context_dim).double(), []
    for e in inputs.dense().double():
        context = double(context, e[None])[-1]
        rows.append(context[0])
    block.float()
    return torch.stack(rows)


@torch.no_grad()
def amplifying() -> tuple[ContextBlock, TokenInputs]:
    """A block whose weights are so large that what differs a little soon differs wholly."""
    generator = torch.Generator().manual_seed(3)
    block = ContextBlock(3, 32, 8, True, 30.0, 0.1)
    block.initialise(generator)
    tokens = torch.randint(20, (400,), generator=generator)
    return block, TokenInputs(tokens, torch.randn(20, 8, generator=generator), 1)


def test_a_bound_of_a_recurrence_that_amplifies_is_infinite() -> None:
    block, inputs = amplifying()
    exact = contexts.evaluate(block, inputs)
    assert exact.converged  # the blocks agree with one another, and yet:
    off = (exact.values - loop(block, inputs)).norm(dim=1) / exact.values.norm(dim=1)
    assert off.max() > 0.5
    found = experiment.diagnosed(block, inputs, exact)
    assert found.contraction_rate is not None
    assert found.contraction_rate > 1
    assert not exact.converged
    assert exact.error_bound == math.inf


@pytest.mark.parametrize(("rate", "stays"), [(0.99, True), (None, True), (1.0, False)])
def test_only_a_rate_under_one_leaves_the_bound(
    monkeypatch: pytest.MonkeyPatch, rate: float | None, stays: bool
) -> None:
    monkeypatch.setattr(experiment, "diagnose", lambda *given: Recurrence(rate, None, []))
    block, inputs = amplifying()
    exact = contexts.Contexts(torch.zeros(1, 1), [], 1, 1, True, 1e-6)
    experiment.diagnosed(block, inputs, exact)
    assert exact.converged == stays
    assert exact.error_bound == (1e-6 if stays else math.inf)


def test_a_run_whose_recurrence_amplifies_says_so_every_time(tiny: Experiment) -> None:
    one = tiny.replace(contexts="random", context_std=30.0, num_layers=3, context_dim=32)
    one = one.replace(validation_samples=1, samples=2)
    for _ in range(2):  # trained, and from the store
        with pytest.warns(RuntimeWarning, match="recurrence amplifies rounding") as caught:
            result = cvfp.run(one)
        assert result.warnings == [str(warning.message) for warning in caught]
        assert caught[0].filename == __file__
        assert result.context_error is None
        assert result.contraction_rate is not None
        assert result.contraction_rate > 1
    assert result.from_store


def test_a_gap_of_a_recurrence_that_amplifies_has_no_bound(tiny: Experiment) -> None:
    one = tiny.replace(context_std=30.0, phase1_learning_rate=1e-9, context_dim=32, num_layers=3)
    one = one.replace(samples=3, phase1_max_iterations=2)
    found = gap.measure(one, sweeps=1)
    assert not found.exact.converged
    assert tables.gap_ran_on(found).loc["exact contexts, error bound", ""] == "inf"


def test_a_run_that_contracts_says_nothing(tiny: Experiment) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cvfp.run(tiny.replace(samples=20))
    assert result.warnings == []
    assert result.context_error is not None
    assert result.contraction_rate is not None
    assert result.contraction_rate < 1


# Tables of embeddings


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: w[7, 3].fill_(math.nan), "a table without NaN or infinity"),
        (lambda w: w[7, 3].fill_(-math.inf), "a table without NaN or infinity"),
        (lambda w: w.zero_(), "a table whose rows differ"),
        (lambda w: w.copy_(w[:1].clone()), "a table whose rows differ"),
    ],
)
def test_a_table_of_which_nothing_can_be_learnt_is_named(
    tmp_path: Path, spoil: Callable[[torch.Tensor], object], words: str
) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2Model(config)
    one = tiny_experiment(embedding=str(tmp_path), embedding_dim="none")
    model.save_pretrained(tmp_path)
    cvfp.experiment.prepare(one)
    with torch.no_grad():
        spoil(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    with pytest.raises(ParameterError, match=rf"^embedding: .*; accepted: {words}$") as caught:
        cvfp.run(one)
    assert caught.value.value == str(tmp_path)
