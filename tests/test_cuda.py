"""What only a GPU does: recorded steps, tiles of logits, contexts beside it, storing by the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_experiment
from test_phases import make_model, make_tokens

import cvfp
from cvfp import Experiment, estimate, ops, phase1, phase2, store
from cvfp.inputs import TokenInputs
from cvfp.ops import placement

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
        phase2.Positions(model, contexts.bfloat16(), tokens),
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
    monkeypatch.setattr(ops, "recorded", lambda step, steps: step)
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
def test_phase1_follows_the_plain_one(precision: str) -> None:
    with ops.using("plain"):
        made = train_phase1(precision)
    mine = train_phase1(precision)
    # A trajectory of many steps: compare what all tokens have in common.
    for one, other in zip(mine.history, made.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)
    ours, theirs = mine.contexts.float(), made.contexts.float()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [400, 4097])
def test_formulas_are_the_plain_ones(vocabulary: int, dtype: torch.dtype) -> None:
    """Forward and gradients; logits in tiles."""
    draw = torch.Generator("cuda").manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").requires_grad_()

    part, more, table, bias = leaf(130, 24), leaf(130, 7), leaf(vocabulary, 24), leaf(vocabulary)
    weight, rest = leaf(24, 31), [leaf(24) for _ in range(3)]
    target = torch.arange(130, device="cuda")
    leaves = [part, more, table, bias, weight, *rest]
    made: list[list[torch.Tensor]] = []
    for mode in ("auto", "plain"):
        with (
            ops.using(mode),
            torch.autocast("cuda", torch.bfloat16, enabled=dtype != torch.float32),
        ):
            hidden = ops.residual_norm([part, more], weight, rest[0], part, *rest[1:], 1e-5)
            nats = ops.next_token_nats(hidden, table, bias, target)
        made.append([hidden, nats, *torch.autograd.grad(nats, leaves)])
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    for mine, theirs in zip(*made, strict=True):
        assert mine.dtype == theirs.dtype
        assert float((mine - theirs).norm()) <= limit * float(theirs.norm())


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


def large(**fields: object) -> Experiment:
    """6 x 768 in float32, a few steps."""
    given = dict(samples=200, num_layers=6, context_dim=768, phase1_max_iterations=12)
    given |= dict(phase2_epochs=1, device="cuda", precision="float32")
    return Experiment(**{**given, **fields})


def test_a_full_gpu_takes_less_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CVFP_HOME", str(tmp_path))
    for name in ("PASS", "LOGITS", "SIDE_BY_SIDE"):
        monkeypatch.setattr(placement, name, dict(getattr(placement, name)))
    monkeypatch.setattr(placement, "DEVICE_PART", placement.DEVICE_PART)
    free = cvfp.run(large(), reuse=False)
    assert free.peak_device_memory_mib is not None
    torch.cuda.empty_cache()
    left = int(0.4 * free.peak_device_memory_mib * 2**20)
    others = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
    with pytest.warns(UserWarning, match="the GPU's memory ran out"):
        squeezed = cvfp.run(large(), reuse=False)
    del others
    assert placement.PASS["cuda"] < 2**26
    # The same draws and sums, in another order: Adam's first steps make 0.5 % of that in the end.
    for mine, theirs in zip(squeezed.phase1_history[:1], free.phase1_history[:1], strict=True):
        assert mine == {name: pytest.approx(value, rel=1e-5) for name, value in theirs.items()}
    assert squeezed.val_ppl == pytest.approx(free.val_ppl, rel=1e-2)
    assert squeezed.val_er == pytest.approx(free.val_er, rel=1e-2)


def test_the_published_size_fits_a_small_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpt2_folder: Path
) -> None:
    """14 GB, as Colab's T4 has: GPT-2's vocabulary, its own head, the published batch."""
    monkeypatch.setenv("CVFP_HOME", str(tmp_path))
    fields = dict(tokenizer=str(gpt2_folder), vocab_size=None, embedding="random")
    fields |= dict(embedding_dim=768, weight_tying=False, phase2_batch_size=4096, samples=1000)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(14e9 / total)
    try:
        result = cvfp.run(large(**fields), reuse=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.peak_device_memory_mib < 14e9 / 2**20
    print(f"\nat most {result.peak_device_memory_mib:.0f} MiB allocated of {14e9 / 2**20:.0f}")
    one = result.experiment
    needed = estimate.memory(one, result.vocab_size, result.embedding_dim, 10**6) / 2**20
    print(f"estimated {needed:.0f} MiB, contexts apart")
    assert needed / 3 < result.peak_device_memory_mib < 3 * needed


def test_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CVFP_HOME", str(tmp_path))
    one = tiny_experiment(device="cuda", samples=30, phase2_epochs=3, phase2_batch_size=64)
    whole = cvfp.run(one, reuse=False)
    for path in [*tmp_path.glob("phase1/*"), *tmp_path.glob(f"*/{whole.key}*")]:
        path.unlink()
    for phase, step in ((1, "iteration"), (2, "epoch")):
        stopped = cvfp.run(one, watch=lambda row: row["phase"] == phase and row[step] >= 2)  # noqa: B023
        assert stopped.partial
    again = cvfp.run(one)
    assert not again.from_store
    assert len(again.phase2_history) == len(whole.phase2_history)
    assert again.val_ppl == pytest.approx(whole.val_ppl, rel=1e-3)
