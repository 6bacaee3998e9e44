"""One run over several processes on CPUs: what one does, by the first alone, and no hang."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
from test_phases import make_model, make_tokens

from cvfp import Experiment, ops, share
from cvfp.share import Ranks

FOLDER = Path(__file__).parent


def together(size: int, folder: Path, *parts: str) -> list[dict[str, Any]]:
    """What each of so many processes saved; they have said nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shared |= dict(CVFP_HOME=str(folder / "home"), CVFP_PROGRESS="none")
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(FOLDER / "devices.py"), str(folder), *parts]
    started = []
    for rank in range(size):
        given = {**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": path}
        started.append(subprocess.Popen(command, env=given, stdout=-1, stderr=-2, text=True))
    said = [one.communicate(timeout=300)[0] for one in started]
    assert [one.returncode for one in started] == [0] * size, "\n".join(said)
    assert not any(said[1:]), said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(3, tmp_path_factory.mktemp("three"), "double")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = devices.in_double(share.ALONE)
    kinds = {"slow": devices.Slow(), "grows": devices.Grows()}
    return found | {k: devices.exactly(share.ALONE, one) for k, one in kinds.items()}


def test_both_phases_are_one_devices(three: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert [one["own"] for one in three] == [320, 320, 360]  # 16 groups, the last of 40
    for mine in three:
        for phase in ("phase1", "phase2"):
            assert len(mine[phase]) == len(alone[phase])
            for row, wanted in zip(mine[phase], alone[phase], strict=True):
                assert row == pytest.approx(wanted, rel=1e-5 if phase == "phase1" else 1e-9)
        for name in ("contexts", "nats"):
            torch.testing.assert_close(mine[name], alone[name], rtol=0, atol=1e-9)
        for name, weight in mine["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=1e-9)
            assert torch.equal(weight, three[0]["weights"][name])  # to the last bit, on every rank


def test_exact_contexts_are_exact(three: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for mine in three:
        assert mine["converged"]
        assert 0 < mine["bound"] < 1e-2
        torch.testing.assert_close(mine["exact"], alone["exact"], rtol=0, atol=1e-4)
        slow, wanted = mine["slow"], alone["slow"]
        assert slow.converged
        assert len(slow.residuals) == 3  # each rank's start is final one sweep later
        errors = (slow.values - wanted.values).norm(dim=1) / wanted.values.norm(dim=1)
        assert float(errors.max()) < 1e-12
        assert not mine["grows"].converged
        assert mine["grows"].error_bound == float("inf")
    assert not alone["grows"].converged


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, together(2, folder, "runs")


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    found: dict[str, Any] = {}
    devices.runs(found)
    return found


FIGURES = ("val_ppl", "val_acc", "train_ppl", "train_er", "val_er", "converged", "memory_length")
FIGURES += ("phase1_history", "phase2_history", "train_spectrum", "val_spectrum")
FIGURES += ("val_bpb", "dev_ppl", "best_epoch", "phase1_iterations")


def numbers(value: Any) -> list[float]:
    """All that are in a figure, a list or a table; -1: there is none."""
    if isinstance(value, (list, dict)):
        each = value.values() if isinstance(value, dict) else value
        return [number for one in each for number in numbers(one)]
    return [-1.0 if value is None else value]


@pytest.mark.parametrize("kind", devices.RUNS)
def test_a_run_is_one_devices(
    kind: str, two: tuple[Path, list[dict[str, Any]]], single: dict[str, Any]
) -> None:
    wanted = single[kind].to_dict()
    first, second = (one[kind] for one in two[1])
    assert first["key"] == wanted["key"]
    assert first["device_name"] == f"2 x {wanted['device_name']}"
    for name in FIGURES:
        near = pytest.approx(numbers(wanted[name]), rel=2e-3, abs=2e-3)
        assert numbers(first[name]) == near, name
        assert second[name] == first[name], name  # to the last bit: decisions cannot differ


def test_the_first_alone_stores_and_all_take_what_is_stored(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (first, second) = two
    kept = {path.name for path in (folder / "home0").iterdir()}
    assert {"runs", "models"} <= kept
    assert not {"phase1", "checkpoints"} & kept  # halves of a run are not kept
    others = {path.name for path in (folder / "home1").iterdir()}
    assert not {"runs", "models", "phase1", "checkpoints", "baselines"} & others
    for one in (first, second):
        assert one["again"]["from_store"]
        assert one["again"]["val_ppl"] == one["trained"]["val_ppl"] == first["trained"]["val_ppl"]
    stored = {path.stem for path in (folder / "home0" / "runs").glob("*.json")}
    assert stored == {first[kind]["key"] for kind in devices.RUNS}


def test_what_cannot_be_shared_is_refused_by_name(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for one in two[1]:
        for name in devices.REFUSED:
            assert one[f"refused {name}"].startswith(f"{name}: got ")
        assert "'cvfp' on 2 devices" in one["refused model"]


def test_the_first_alone_watches_and_prints(two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = two[1]
    assert first["seen"] == [1.0, 1.0]
    assert second["seen"] == []
    for one in (first, second):
        assert one["stopped"]["partial"]
        assert len(one["stopped"]["phase1_history"]) == 2
    assert first["trained"]["key"] in first["printed"]
    assert second["printed"] == ""


FAILS = """
import os, cvfp, devices
@cvfp.objective("fails")
def fails(new, old, batch):
    if os.environ["RANK"] == "1" and fails.calls > 3:
        raise RuntimeError("this rank fails")
    fails.calls += 1
    return (new - old).square().mean((1, 2)), {}
fails.calls = 0
cvfp.run(devices.experiment(objective="fails"))
"""


def test_a_rank_that_fails_ends_the_run(tmp_path: Path) -> None:
    """By torchrun, which ends the others."""
    (tmp_path / "fails.py").write_text(FAILS)
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    given = {**os.environ, "CVFP_HOME": str(tmp_path / "home"), "PYTHONPATH": path}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *command, str(tmp_path / "fails.py")]
    ended = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert "this rank fails" in ended.stderr
    assert not list((tmp_path / "home").glob("runs/*"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("group", [64, 250, 999])
def test_each_rank_draws_what_one_device_would(device: str, group: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    one = Experiment(context_dim=10, loss_group=group)
    inputs = make_model().to(device).context_inputs(make_tokens(1000).to(device))

    def drawn(ranks: Ranks) -> torch.Tensor:
        made, draw = [], torch.Generator(device).manual_seed(5)
        rest = ranks.draws(lambda steps: steps, draw, inputs, one)
        for _ in itertools.chain([0], rest(range(3))):  # initial contexts, then noise
            rows = torch.empty(len(ranks.own(1000, group)), 10, device=device)
            made.append(ops.gaussian_(rows, 1.0, draw, group))
        return torch.stack(made)

    parts = [drawn(Ranks(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), drawn(share.ALONE))


def test_a_process_alone_has_all() -> None:
    assert share.started() is share.ALONE
    assert share.ALONE.own(10, 3) == range(10)
    parts = [Ranks(rank, 3).own(1000, 64) for rank in range(3)]
    assert [*parts[0], *parts[1], *parts[2]] == list(range(1000))
    assert all(part.start % 64 == 0 for part in parts)
