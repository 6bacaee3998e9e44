"""Rows on the device, in host memory or on disk, and reading ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from scipy import stats

import cvfp
from cvfp import ParameterError, memory, seeds

CPU = torch.device("cpu")


def test_what_fits_stays_and_what_does_not_goes_to_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CVFP_CONTEXTS", raising=False)
    monkeypatch.setattr(memory, "HOST_PART", 1.0)
    free = memory.psutil.virtual_memory().available
    assert memory.place(free // 2, CPU) == "device"
    assert memory.place(2 * free, CPU) == "disk"
    monkeypatch.setattr(memory, "_free_on", lambda device: free // 4)
    gpu = torch.device("cuda")
    assert memory.place(free // 8, gpu) == "device"
    assert memory.place(free // 2, gpu) == "host"
    assert memory.place(2 * free, gpu) == "disk"


def test_place_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in memory.PLACES:
        monkeypatch.setenv("CVFP_CONTEXTS", where)
        assert memory.place(10, CPU) == where
    monkeypatch.setenv("CVFP_CONTEXTS", "tape")
    with pytest.raises(ParameterError, match="CVFP_CONTEXTS: got 'tape'; accepted: auto, device"):
        memory.rows(2, 2, torch.float32, CPU)


def test_a_wrong_place_is_told_before_anything_is_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVFP_CONTEXTS", "tape")
    with pytest.raises(ParameterError, match="CVFP_CONTEXTS"):
        cvfp.run(cvfp.Experiment(device="cpu"))
    assert not (home / "tables").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_disk_are_rows(
    dtype: torch.dtype, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVFP_CONTEXTS", "disk")
    kept = memory.rows(1000, 7, dtype, CPU)
    assert kept.shape == (1000, 7)
    assert kept.dtype == dtype
    values = torch.randn(1000, 7).to(dtype)
    kept.copy_(values)
    assert torch.equal(kept, values)
    # The file has no name, and its space comes back with the tensor.
    assert list((home / "scratch").iterdir()) == []


def test_ahead_gives_each_piece_once_in_order() -> None:
    source = torch.arange(10.0)[:, None]
    pieces = [slice(0, 4), slice(4, 8), slice(8, 10)]
    for piece, rows in memory.ahead(source, pieces, CPU):
        assert torch.equal(rows, source[piece])


def test_prefetched_reads_one_ahead() -> None:
    loaded: list[int] = []
    second = threading.Event()

    def load(item: int) -> int:
        loaded.append(item)
        if item == 1:
            second.set()
        return 10 * item

    reading = memory.prefetched(range(4), load, threaded=True)
    assert next(reading) == 0
    assert second.wait(10)  # while the caller still has the first
    assert list(reading) == [10, 20, 30]
    assert loaded == [0, 1, 2, 3]
    assert list(memory.prefetched(range(3), load, threaded=False)) == [0, 10, 20]
    assert list(memory.prefetched([], load, threaded=True)) == []


def test_prefetched_hands_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        list(memory.prefetched([1, 0], lambda item: 1 / item, threaded=True))


def test_normals_are_normal() -> None:
    draw = seeds.normals(torch.Generator().manual_seed(0))
    values = draw(torch.empty(400, 1000), 0.1).double().numpy().ravel() / 0.1
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(values.std() - 1) < 0.005
    assert abs(stats.kurtosis(values)) < 0.03
    assert 4 < abs(values).max() < 5.4
    assert abs(stats.pearsonr(values[:-1], values[1:]).statistic) < 0.01


def test_normals_go_on_and_start_anew() -> None:
    def draws(seed: int, *sizes: int) -> torch.Tensor:
        draw = seeds.normals(torch.Generator().manual_seed(seed))
        return torch.cat([draw(torch.empty(size, 3), 2.0) for size in sizes])

    assert torch.equal(draws(1, 10, 20), draws(1, 30))
    assert not torch.equal(draws(1, 30), draws(2, 30))
    assert draws(1, 3, 5).shape == (8, 3)
    assert torch.isfinite(draws(3, 300_001)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_around_pieces_are_those_around_the_whole(dtype: torch.dtype) -> None:
    centre = torch.randn(50, 7).to(torch.bfloat16)
    made = []
    for around in (centre,), (centre[:1], centre[1:]), (centre[:0], centre[:20], centre[20:]):
        draw = seeds.normals(torch.Generator().manual_seed(4))
        made.append(draw(torch.empty(50, 7, dtype=dtype), 0.1, *around))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert 0.08 < float((made[0] - centre).std()) < 0.12
