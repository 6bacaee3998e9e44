"""Whole runs with `ops="plain"`, the literal method, beside the fast ones."""

from __future__ import annotations

from typing import Any

import pytest

import cvfp
from cvfp import Experiment, ops

FIELDS: list[dict[str, Any]] = [
    {},
    dict(loss_group=200, num_input_tokens=2),  # several groups in a pass, a smaller last one
    dict(weight_tying=False, token_input_all_layers=False, num_layers=3),
    dict(freeze_embedding=False, dist_reg_weight=0.5),
    dict(precision="bfloat16"),
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_run_is_the_literal_methods(fields: dict[str, Any], tiny: Experiment) -> None:
    one = tiny.replace(**fields)
    fast = cvfp.run(one, reuse=False)
    slow = cvfp.run(one.replace(ops="plain"), reuse=False)
    assert fast.key != slow.key
    assert slow.experiment.ops == "plain"
    assert fast.phase1_iterations == slow.phase1_iterations
    coarse = one.precision == "bfloat16"
    for mine, theirs in zip(fast.phase1_history, slow.phase1_history, strict=True):
        for name in ("loss", "diversity", "change", "change_p50"):
            assert mine[name] == pytest.approx(
                theirs[name], rel=2e-2 if coarse else 1e-3, abs=2e-3 if coarse else 1e-5
            )
    assert fast.val_ppl == pytest.approx(slow.val_ppl, rel=5e-3)
    assert fast.train_ppl == pytest.approx(slow.train_ppl, rel=5e-3)
    assert fast.val_er == pytest.approx(slow.val_er, rel=5e-3)
    for mine, theirs in zip(fast.phase2_history, slow.phase2_history, strict=True):
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=5e-3)


def test_a_run_leaves_the_mode_as_it_was(tiny: Experiment) -> None:
    made: list[str] = []
    with ops.using("plain"):
        cvfp.run(tiny, reuse=False)
        made.append(ops._mode.get())
    cvfp.run(tiny.replace(ops="plain"), reuse=False)
    made.append(ops._mode.get())
    assert made == ["plain", "auto"]
