"""Rows on the device, in host memory or on disk, and reading ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import cvfp
from cvfp import ParameterError
from cvfp.ops import placement

CPU = torch.device("cpu")


def test_what_fits_stays_and_what_does_not_goes_to_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CVFP_CONTEXTS", raising=False)
    monkeypatch.setattr(placement, "HOST_PART", 1.0)
    monkeypatch.setattr(placement, "DEVICE_PART", 1.0)
    free = placement.psutil.virtual_memory().available
    assert placement.place(free // 2, CPU) == "device"
    assert placement.place(2 * free, CPU) == "disk"
    monkeypatch.setattr(placement, "memory", lambda device: free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free // 4, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    gpu = torch.device("cuda")
    assert placement.place(free // 8, gpu) == "device"
    assert placement.place(free // 2, gpu) == "host"
    assert placement.place(2 * free, gpu) == "disk"
    # What torch keeps for itself and does not use is free, too.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free // 2)
    assert placement.place(free // 2, gpu) == "device"
    # No more than this process may have.
    monkeypatch.setattr(placement, "memory", lambda device: free // 3)
    assert placement.place(free // 2, gpu) == "host"


def test_place_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in placement.PLACES:
        monkeypatch.setenv("CVFP_CONTEXTS", where)
        assert placement.place(10, CPU) == placement.asked_place() == where
    monkeypatch.setenv("CVFP_CONTEXTS", "auto")
    assert placement.asked_place() is None
    monkeypatch.setenv("CVFP_CONTEXTS", "tape")
    with pytest.raises(ParameterError, match="CVFP_CONTEXTS: got 'tape'; accepted: auto, device"):
        placement.rows(2, 2, torch.float32, CPU)


def test_a_wrong_place_is_told_before_anything_is_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVFP_CONTEXTS", "tape")
    with pytest.raises(ParameterError, match="CVFP_CONTEXTS"):
        cvfp.run(cvfp.Experiment(device="cpu", precision="float32"))
    assert not (home / "tables").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", placement.PLACES)
def test_rows_are_rows_wherever_they_are(
    where: str, dtype: torch.dtype, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVFP_CONTEXTS", where)
    kept = placement.rows(1000, 7, dtype, CPU)
    assert kept.shape == (1000, 7)
    assert kept.dtype == dtype
    values = torch.randn(1000, 7).to(dtype)
    kept.copy_(values)
    assert torch.equal(kept, values)
    if where == "disk":  # The file has no name, and its space comes back with the tensor.
        assert list((home / "scratch").iterdir()) == []


def test_prefetch_gives_each_piece_once_in_order() -> None:
    source = torch.arange(10.0)[:, None]
    pieces = [slice(0, 4), slice(4, 8), slice(8, 10)]
    for threaded in (True, False):
        made = list(placement.prefetch(pieces, lambda piece: source[piece].clone(), threaded))
        assert [piece for piece, _ in made] == pieces
        for piece, rows in made:
            assert torch.equal(rows, source[piece])


def test_prefetch_reads_one_ahead() -> None:
    loaded: list[int] = []
    second = threading.Event()

    def load(item: int) -> int:
        loaded.append(item)
        if item == 1:
            second.set()
        return 10 * item

    reading = placement.prefetch(range(4), load, threaded=True)
    assert next(reading) == (0, 0)
    assert second.wait(10)  # while the caller still has the first
    assert loaded[:2] == [0, 1]
    assert len(loaded) <= 2  # no further: what is loaded takes memory
    assert list(reading) == [(1, 10), (2, 20), (3, 30)]
    assert loaded == [0, 1, 2, 3]
    assert list(placement.prefetch(range(3), load, threaded=False)) == [(0, 0), (1, 10), (2, 20)]
    assert list(placement.prefetch([], load, threaded=True)) == []


def test_prefetch_hands_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        list(placement.prefetch([1, 0], lambda item: 1 / item, threaded=True))
