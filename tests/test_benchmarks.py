"""The benchmarks count what they say, and the report is what their files give."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from test_phases import make_model, make_tokens
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import literal, report
from benchmarks.speed import Bench, taken_by_others
from cvfp import Experiment, phase1, phase2
from cvfp.model import TokenInputs

ROOT = Path(__file__).parents[1]


def in_place(_: Any, a: torch.Size, b: torch.Size, **named: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# Products in place, which torch's counter does not know.
PRODUCTS = {torch.ops.aten.addmm_: in_place}


def bench(**fields: object) -> Bench:
    made = object.__new__(Bench)
    small = dict(context_dim=10, embedding_dim=8, num_layers=2, device="cpu", precision="float32")
    made.exp = Experiment(**{**small, "weight_tying": False, **fields})
    model = make_model(tying=False)
    made.model = lambda: model  # type: ignore[method-assign]
    return made


def test_phase1_operations_are_those_of_a_step() -> None:
    one = bench()
    model, block = one.model(), one.model().context_block
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    inputs = TokenInputs(make_tokens(50), model.embedding.detach(), 1).dense()
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counted, torch.no_grad():
        layers = block.layers(torch.float32)
        step = phase1.Step(block, layers, torch.randn(50, 10), inputs)
        step.backward(torch.randn(50, 10))
    assert counted.get_total_flops() == 50 * one.phase1_flops()


def test_phase2_operations_are_those_of_a_step() -> None:
    one = bench()
    model, tokens = one.model(), make_tokens(51)
    model.context_block.requires_grad_(False)
    stream = phase2.Positions(model, torch.randn(51, 10), tokens)
    head = phase2.NextToken(model, 50, "float32")
    positions = torch.arange(50)
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counted:
        hidden = stream.hidden(positions, stream.token_inputs())
        head.loss(hidden, tokens[1:]).backward()
    assert counted.get_total_flops() == 50 * one.phase2_flops()


def test_literal_phase2_is_the_kits() -> None:
    """Same seed, same order: the same losses, as far as float32 goes."""
    one = bench(phase2_batch_size=64, phase2_epochs=3)
    contexts, tokens = torch.randn(700, 10), make_tokens(700)
    plain, epochs = literal.phase2(
        make_model(tying=False),
        (contexts, tokens),
        (contexts[:100], tokens[:100]),
        one.exp,
        torch.Generator().manual_seed(3),
    )
    model = make_model(tying=False)
    made = phase2.train(
        phase2.Positions(model, contexts, tokens),
        phase2.Positions(model, contexts[:100], tokens[:100]),
        one.exp,
        torch.Generator().manual_seed(3),
    )
    assert len(made.history) == epochs
    assert made.history[made.best_epoch - 1]["val_ppl"] == pytest.approx(plain, rel=1e-4)


def test_report_is_what_the_files_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = sorted(Path("reports/performance").glob("*.json"))
    report.main(str(tmp_path / "made.md"), *map(str, files))
    assert (tmp_path / "made.md").read_text() == Path("reports/performance.md").read_text()


def test_time_that_others_took() -> None:
    Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")
    before, after = Times(1, 1, 0, 5, 0, 0, 0, 2, 1, 1), Times(3, 1, 0, 8, 1, 0, 0, 4, 3, 1)
    assert taken_by_others(before, after) == 2 / 8
    assert taken_by_others(before[:4], after[:4]) is None
