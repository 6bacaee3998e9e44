"""What only a GPU does: recorded steps, tiles of logits, contexts beside it, storing by the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_experiment
from test_phases import make_model, make_tokens

import cvfp
from benchmarks import literal
from cvfp import Experiment, phase1, phase2, store
from cvfp.model import TokenInputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def experiment(**fields: object) -> Experiment:
    given = dict(
        device="cuda",
        precision="bfloat16",
        context_dim=10,
        embedding_dim=8,
        num_layers=2,
        loss_group=500,
        phase1_max_iterations=5,
        convergence_rate=1.0,
        phase2_batch_size=64,
        phase2_epochs=3,
    )
    return Experiment(**{**given, **fields})


def train_phase1(precision: str = "bfloat16") -> phase1.Phase1:
    model = make_model().cuda()
    inputs = TokenInputs(make_tokens(2200).cuda(), model.embedding.detach(), 1)
    draws = torch.Generator("cuda").manual_seed(1)
    return phase1.train(model.context_block, inputs, experiment(precision=precision), draws)


def train_phase2(tying: bool, freeze: bool) -> tuple[phase2.Phase2, list[torch.Tensor]]:
    model = make_model(tying=tying, freeze=freeze).cuda()
    contexts = torch.randn(2200, 10, generator=torch.Generator().manual_seed(0)).cuda()
    tokens = make_tokens(2200).cuda()
    made = phase2.train(
        phase2.Positions(model, contexts.bfloat16(), tokens, "bfloat16"),
        phase2.Positions(model, contexts[:300], tokens[:300]),
        experiment(),
        torch.Generator().manual_seed(2),
    )
    return made, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("tying", "freeze"), [(True, True), (True, False), (False, True)])
def test_recorded_steps_are_the_steps(
    tying: bool, freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self))
        )
        recorded, weights = train_phase2(tying, freeze)
    assert len(replays) > 90  # all but the first three, and the last of each epoch
    monkeypatch.setattr(phase2, "WORTH_RECORDING", 10**9)
    plain, wanted = train_phase2(tying, freeze)
    torch.testing.assert_close(recorded.validation.nats, plain.validation.nats, rtol=0, atol=1e-5)
    assert recorded.train_loss == pytest.approx(plain.train_loss, abs=1e-5)
    for mine, theirs in zip(weights, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_phase1_is_the_same_wherever_contexts_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CVFP_HOME", str(tmp_path))
    here = train_phase1()
    for where in ("host", "disk"):
        monkeypatch.setenv("CVFP_CONTEXTS", where)
        there = train_phase1()
        assert there.contexts.device.type == "cpu"
        assert torch.equal(there.contexts.cuda(), here.contexts)
        assert there.history == here.history


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_phase1_follows_the_literal_one(precision: str) -> None:
    model = make_model().cuda()
    inputs = TokenInputs(make_tokens(2200).cuda(), model.embedding.detach(), 1)
    draws = torch.Generator("cuda").manual_seed(1)
    made, _ = literal.phase1(model.context_block, inputs, experiment(precision=precision), draws)
    mine = train_phase1(precision).contexts.float()
    # Other draws, the same distribution: compare what all tokens have in common.
    torch.testing.assert_close(mine.mean(0), made.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(mine.std(0), made.std(0), rtol=0, atol=0.03)


def test_contexts_on_the_device_are_stored(home: Path) -> None:
    contexts = torch.randn(5000, 7, device="cuda").bfloat16()
    store.write_phase1("k", {"weight": torch.ones(2)}, contexts, {})
    kept = store.read_phase1("k")
    assert kept is not None
    assert torch.equal(kept[1].cuda(), contexts)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_the_device_is_near_one_on_the_cpu(precision: str, home: Path) -> None:
    fields = dict(precision=precision, phase2_epochs=2)
    on_gpu = cvfp.run(tiny_experiment(device="cuda", **fields))
    on_cpu = cvfp.run(tiny_experiment(**fields))
    assert on_gpu.val_ppl == pytest.approx(on_cpu.val_ppl, rel=0.03)
    again = cvfp.run(tiny_experiment(device="cuda", **fields), reuse=False)
    assert again.val_ppl == on_gpu.val_ppl  # to the last bit
