"""The benchmarks count what they say, and the report is what their files give."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_phases import make_model, make_tokens
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.speed import Bench, taken_by_others
from cvfp import Experiment, phase2
from cvfp.inputs import TokenInputs

ROOT = Path(__file__).parents[1]


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
    inputs = TokenInputs(make_tokens(50), model.embedding.detach(), 1).dense()
    with FlopCounterMode(display=False) as counted:
        block(torch.randn(50, 10), inputs)[-1].backward(torch.randn(50, 10))
    sums = 2 * sum(block.widths)  # a bias's gradient is a product on a CPU
    assert counted.get_total_flops() == 50 * (one.phase1_flops() + sums)


def test_phase2_operations_are_those_of_a_step() -> None:
    one = bench()
    model, tokens = one.model(), make_tokens(51)
    model.context_block.requires_grad_(False)
    stream = phase2.Positions(model, torch.randn(51, 10), tokens)
    positions = torch.arange(50)
    with FlopCounterMode(display=False) as counted:
        hidden = stream.hidden(
            positions, stream.outputs(positions, stream.previous(positions)), stream.token_inputs()
        )
        model.nats(hidden, tokens[1:]).backward()
    sums = 2 * (sum(len(one.bias) for one in model.token_block.linears) + len(model.embedding))
    assert counted.get_total_flops() == 50 * (one.phase2_flops() + sums)


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
