"""`python -m cvfp pack` and `unpack`: finished runs between stores, checked on the way."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

import cvfp
from cvfp import Experiment, ParameterError, __main__, cache, packs, store, tuning


@pytest.fixture
def packed(home: Path, tmp_path: Path, tiny: Experiment) -> tuple[Path, cvfp.Result]:
    result = cvfp.run(tiny)
    assert packs.pack(tmp_path / "runs.zip") == 1
    return tmp_path / "runs.zip", result


def another_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CVFP_HOME", str(tmp_path / "other"))


def test_a_run_comes_back_without_training(
    packed: tuple[Path, cvfp.Result],
    tiny: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, result = packed
    another_home(monkeypatch, tmp_path)
    assert packs.unpack(file) == (1, 0)
    assert packs.unpack(file) == (0, 0)  # what is there stays
    again = cvfp.run(tiny)
    assert again.from_store
    assert again == result
    assert again.model().state_dict().keys() == result.model().state_dict().keys()
    assert not list((cache.home() / "phase1").glob("*"))


def test_damaged_and_foreign_entries_are_refused(
    packed: tuple[Path, cvfp.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, result = packed
    run = f"runs/{result.key}.json"
    with zipfile.ZipFile(file) as opened:
        entries = {name: opened.read(name) for name in opened.namelist()}
    entries[run] = entries[run].replace(b'"val_ppl": ', b'"val_ppl": 1')
    entries |= {"../../evil": b"x", "runs/..": b"x", "code/x": b"x", "/runs/x.json": b"x"}
    spoilt = tmp_path / "spoilt.zip"
    with zipfile.ZipFile(spoilt, "w") as made:
        for name, content in entries.items():
            made.writestr(name, content)
    another_home(monkeypatch, tmp_path)
    assert packs.unpack(spoilt) == (0, 5)
    assert store.read_run(result.key) is None
    assert not (tmp_path / "evil").exists()


def test_a_record_under_another_key_is_refused(
    packed: tuple[Path, cvfp.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, result = packed
    with zipfile.ZipFile(file) as opened, zipfile.ZipFile(tmp_path / "b.zip", "w") as made:
        for name in opened.namelist():
            made.writestr(name.replace(result.key, "0" * 20), opened.read(name))
    another_home(monkeypatch, tmp_path)
    assert packs.unpack(tmp_path / "b.zip")[0] == 0


def test_the_command_line(
    packed: tuple[Path, cvfp.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, _ = packed
    monkeypatch.setattr(sys, "argv", ["cvfp", "pack", str(tmp_path / "again.zip")])
    __main__.main()
    assert "1 runs" in capsys.readouterr().out
    another_home(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "argv", ["cvfp", "unpack", str(file)])
    __main__.main()
    assert "1 new runs" in capsys.readouterr().out
    (tmp_path / "text.zip").write_text("no zip")
    monkeypatch.setattr(sys, "argv", ["cvfp", "unpack", str(tmp_path / "text.zip")])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "text.zip" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["cvfp", "pack", str(tmp_path / "text.zip" / "below")])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "accepted: a file that can be written" in capsys.readouterr().err


def test_nothing_to_pack_replaces_nothing(
    packed: tuple[Path, cvfp.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = packed
    before = file.read_bytes()
    text = tmp_path / "notes.txt"
    text.write_text("mine")
    with pytest.raises(ParameterError, match=r"FILE: got '.*notes.txt'"):
        packs.pack(text)
    another_home(monkeypatch, tmp_path)
    with pytest.raises(ParameterError, match="CVFP_HOME"):
        packs.pack(file)
    assert file.read_bytes() == before
    assert text.read_text() == "mine"


def test_a_home_that_cannot_be_written_is_named(
    packed: tuple[Path, cvfp.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = packed
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("CVFP_HOME", str(tmp_path / "a file"))
    with (
        pytest.raises(ParameterError, match="CVFP_HOME"),
        pytest.warns(UserWarning, match="CVFP_HOME"),
    ):
        packs.unpack(file)


@pytest.mark.parametrize("at", [200, 700, 3000])
def test_bytes_that_changed_are_refused_and_the_rest_is_read(
    packed: tuple[Path, cvfp.Result], at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = packed
    content = bytearray(file.read_bytes())
    content[at : at + 4] = bytes(255 - byte for byte in content[at : at + 4])
    file.write_bytes(content)
    another_home(monkeypatch, tmp_path)
    _, refused = packs.unpack(file)
    assert refused >= 1


@pytest.mark.parametrize("record", ["{}", "[]", "no JSON"])
def test_a_record_that_is_no_run_is_refused_whatever_its_checksum(
    packed: tuple[Path, cvfp.Result], record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, result = packed
    kept = tmp_path / "forged" / "runs" / f"{result.key}.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(record)
    with zipfile.ZipFile(tmp_path / "forged.zip", "w") as made:
        made.write(kept, f"runs/{kept.name}")
        made.writestr(f"checksums/runs/{kept.name}", cache.checksum(kept, kept))
    another_home(monkeypatch, tmp_path)
    assert packs.unpack(tmp_path / "forged.zip") == (0, 1)
    assert packs.results(tmp_path / "forged.zip") == []
    assert packs.results(file) == [result]


def test_finished_runs_are_those_of_the_choice_but_for_the_seed_that_chose(
    home: Path, tmp_path: Path, tiny: Experiment
) -> None:
    kind = tuning.ZERO.format(2)
    base = tiny.replace(selection="development", development_samples=2, seed=7)
    names = {"phase2_learning_rate": 0.002, "token_block_std": 0.05, "weight_decay": 0.0}
    row = {"choice": {**names, "samples": 2}, "seed": 8}  # a file's own seed, not base's
    choices = {kind: {str(tiny.samples): row}}
    chosen = tuning.experiment(base, kind, **names)
    runs = cvfp.sweep(chosen, seed=[1, 2, 8])
    cvfp.run(chosen.replace(phase2_learning_rate=0.001))  # another
    packs.pack(tmp_path / "runs.zip")
    sizes = [tiny.samples, tiny.samples]
    found = tuning.finished(tmp_path / "runs.zip", base, choices, sizes)
    assert list(found) == [kind]
    assert sorted(one.key for one in found[kind]) == sorted(one.key for one in runs[:2])
    with pytest.raises(
        ParameterError, match=r"^finished: got .*runs\.zip.*these sizes and choices"
    ):
        tuning.finished(tmp_path / "runs.zip", base, choices, [tiny.samples + 1])
