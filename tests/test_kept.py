"""What is kept is checked, shared and left whole: damage, several processes, kills, full disks."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import cvfp
from cvfp import Experiment, ParameterError, Result, baselines, cache, embeddings, phase1, store
from cvfp.ops import placement

Tally = Callable[..., None]
# Children have what is imported here, so that eight of them start at once.
FORK = multiprocessing.get_context("fork")
CPU = torch.device("cpu")


def value(key: str) -> torch.Tensor:
    return torch.randn(30, 5, generator=torch.Generator().manual_seed(ord(key)))


def obtained_tensors(kind: str, key: str) -> Any:
    return cache.tensors(kind, key, lambda: {"a": value(key), "b": value(key).T})["b"].tolist()


def obtained_text(kind: str, key: str) -> Any:
    return cache.text(kind, f"{key}.json", lambda: f"Köln {value(key).tolist()}")


def run_record(key: str) -> Any:
    if (record := store.read_run(key)) is None:
        store.write_run(key, record := {"val_ppl": 12.5, "rows": value(key).tolist()})
    return record


def model_weights(key: str) -> Any:
    if (weights := store.read_model(key)) is None:
        weights = {"weight": value(key)}
        assert store.write_model(key, weights)
    return weights["weight"].tolist()


def kept_phase1(key: str) -> Any:
    if (kept := store.read_phase1(key)) is None:
        store.write_phase1(key, {"weight": value(key)}, value(key).T, {"seconds": 3.0})
        kept = {"weight": value(key)}, value(key).T, {}
    return kept[0]["weight"].tolist(), kept[1].tolist()


# Each kind of kept file: the file of a key, and what reads it, or makes it and keeps it.
KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "run": ("runs/{}.json", run_record),
    "model": ("models/{}.safetensors", model_weights),
    "ContextBlock": ("phase1/{}.safetensors", kept_phase1),
    "contexts": ("phase1/{}.npy", kept_phase1),
    "table": ("tables/{}.safetensors", lambda key: obtained_tensors("tables", key)),
    "tokens": ("tokens/{}.safetensors", lambda key: obtained_tensors("tokens", key)),
    "tokenizer": ("tokenizers/{}.json", lambda key: obtained_text("tokenizers", key)),
    "baselines": ("baselines/{}.json", lambda key: obtained_text("baselines", key)),
}


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def grow(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(1 + draw.randrange(9)))


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def swap(path: Path, draw: random.Random) -> None:
    """The file of another key, with its checksum."""
    other = path.with_name(f"b{path.suffix}")
    path.write_bytes(other.read_bytes())
    cache.checksum_file(path).write_bytes(cache.checksum_file(other).read_bytes())


def flip_checksum(path: Path, draw: random.Random) -> None:
    flip(cache.checksum_file(path), draw)


DAMAGES = [flip, truncate, grow, empty, swap, flip_checksum]


def check_damage(kind: str, damage: Callable[[Path, random.Random], None], seed: int) -> None:
    name, obtain = KINDS[kind]
    path = cache.home() / name.format("a")
    made, other = obtain("a"), obtain("b")
    assert obtain("a") == made != other
    damage(path, random.Random(seed))
    with pytest.warns(UserWarning, match=f"{path}: damaged") as told:
        assert obtain("a") == made
    assert len(told) == 1
    assert path.with_name(f"{path.name}.damaged").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert obtain("a") == made
        assert obtain("b") == other
    assert cache.sound(path)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_told_and_made_good(
    kind: str, damage: Callable[[Path, random.Random], None], home: Path, tally: Tally
) -> None:
    check_damage(kind, damage, 0)
    tally("damaged files", tried=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_is_told_and_made_good(
    kind: str, damage: Callable[[Path, random.Random], None], seed: int, home: Path, tally: Tally
) -> None:
    check_damage(kind, damage, seed)
    tally("damaged files", tried=1)


def numbers(result: Result) -> Any:
    record = result.to_dict()
    for incidental in ("seconds", "peak_memory_mib", "phase1_from_store"):
        del record[incidental]
    return record


def forget() -> None:
    """What this process remembers of kept files."""
    cvfp.data._load.cache_clear()
    embeddings._table.cache_clear()


def kept(home: Path) -> list[Path]:
    """The files that a run keeps."""
    kinds = ("runs", "models", "phase1", "tables", "tokens", "tokenizers", "baselines")
    return sorted(path for kind in kinds for path in home.glob(f"{kind}/[!.]*"))


def test_a_run_on_a_damaged_home_is_the_same_run(
    tiny: Experiment, home: Path, tally: Tally
) -> None:
    first = cvfp.run(tiny)
    files = kept(home)
    assert len(files) >= 9
    for number, path in enumerate(files):
        flip(path, random.Random(number))
    forget()
    with pytest.warns(UserWarning, match="damaged") as told:
        again = cvfp.run(tiny)
    # The model is written anew with the run, not read.
    named = {str(one.message).partition(":")[0] for one in told}
    assert named == {str(path) for path in files if path.parent.name != "models"}
    assert not again.from_store
    assert not again.phase1_from_store
    assert numbers(again) == numbers(first)
    tally("damaged files", tried=len(files))


def test_files_without_a_checksum_are_not_there(tiny: Experiment, home: Path) -> None:
    first = cvfp.run(tiny)
    for path in kept(home):
        cache.checksum_file(path).unlink()
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = cvfp.run(tiny)
        assert not again.from_store
        assert numbers(again) == numbers(first)
        assert cvfp.run(tiny).from_store


# Several processes


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """How often any process fitted a table, trained a Phase 1 and measured baselines."""
    log = tmp_path / "calls"
    log.touch()

    def counted(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any, **named: Any) -> Any:
            with log.open("a") as file:
                file.write(f"{name}\n")
            return make(*given, **named)

        return made

    for module, name in ((embeddings, "fit_bigram"), (phase1, "train"), (baselines, "evaluate")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))

    def count() -> dict[str, int]:
        lines = log.read_text().splitlines()
        return {name: lines.count(name) for name in ("fit_bigram", "train", "evaluate")}

    return count


def at_once(experiments: list[Experiment]) -> list[Result]:
    forget()
    with ProcessPoolExecutor(len(experiments), FORK) as pool:
        return list(pool.map(run_alone, experiments))


def run_alone(experiment: Experiment) -> Result:
    result = cvfp.run(experiment)
    result._model = None
    return result


def test_eight_processes_train_one_experiment_once(
    tiny: Experiment, corpus_only: Path, calls: Callable[[], dict[str, int]], tally: Tally
) -> None:
    results = at_once([tiny] * 8)
    assert sum(not result.from_store for result in results) == 1
    assert all(result == results[0] for result in results)
    assert calls() == {"fit_bigram": 1, "train": 1, "evaluate": 1}
    tally("processes with the same Experiment at once", tried=8, trained=1)


@pytest.mark.full
def test_processes_share_what_their_experiments_have_in_common(
    tiny: Experiment, corpus_only: Path, calls: Callable[[], dict[str, int]]
) -> None:
    rates = [0.001 * number for number in range(1, 5)]
    results = at_once([tiny.replace(phase2_learning_rate=rate) for rate in rates])
    assert not any(result.from_store for result in results)
    assert len({result.val_ppl for result in results}) == len(rates)
    assert sum(not result.phase1_from_store for result in results) == 1
    assert calls() == {"fit_bigram": 1, "train": 1, "evaluate": 1}


def child(work: Callable[..., None], *given: Any) -> Any:
    process = FORK.Process(target=work, args=given)
    process.start()
    return process


def hold(path: Path, held: Any) -> None:
    with cache.alone(path):
        held.set()
        time.sleep(60)


def test_a_dead_process_lets_the_next_one_in(home: Path) -> None:
    held = FORK.Event()
    process = child(hold, home / "runs" / "a", held)
    assert held.wait(10)
    process.kill()
    start = time.monotonic()
    with cache.alone(home / "runs" / "a"):
        assert time.monotonic() - start < 5
    process.join()


def test_a_home_without_locks_says_so_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise OSError("no locks here")

    cache.check_home()
    monkeypatch.setattr(cache.FileLock, "acquire", missing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for key in "abc":
            assert obtained_text("tokenizers", key) == obtained_text("tokenizers", key)
    assert len(told) == 1
    assert f"CVFP_HOME: got {str(home)!r}; accepted: a folder with file locks" in str(
        told[0].message
    )


# Kills


def write_for_ever(seed: int) -> None:
    draw = random.Random(seed)
    while True:
        key = f"k{draw.randrange(4)}"
        store.write_phase1(key, {"weight": torch.ones(3)}, torch.zeros(20_000, 8), {})
        store.write_run(key, {"rows": [0.5] * 5000})


def temporaries(home: Path) -> set[Path]:
    return {path for path in home.rglob(".*") if path.name != cache.temporary_prefix()}


def check_kills(kills: int) -> None:
    home, draw = cache.home(), random.Random(kills)
    left = 0
    for seed in range(kills):
        process = child(write_for_ever, seed)
        time.sleep(0.02 + 0.1 * draw.random())
        process.kill()
        process.join()
        left += len(temporaries(home))
        cache.check_home()
        assert temporaries(home) == set()
    assert left > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for key in ("k0", "k1", "k2", "k3"):
            store.read_phase1(key)
            store.read_run(key)


def test_kills_leave_nothing_half_written(home: Path, tally: Tally) -> None:
    check_kills(12)
    tally("kills while files are written", tried=12)


@pytest.mark.full
def test_many_kills_leave_nothing_half_written(home: Path, tally: Tally) -> None:
    check_kills(200)
    tally("kills while files are written", tried=200)


def write_slowly(path: Path, writing: Any, go_on: Any) -> None:
    with cache.whole(path) as temporary:
        temporary.write_text("slow")
        writing.set()
        go_on.wait(20)


def test_what_a_living_process_writes_is_left_alone(home: Path) -> None:
    writing, go_on = FORK.Event(), FORK.Event()
    process = child(write_slowly, home / "runs" / "a.json", writing, go_on)
    assert writing.wait(10)
    old = home / "phase1" / ".abcd_123.npy"  # of a version without locks
    old.parent.mkdir()
    old.touch()
    cache.check_home()
    go_on.set()
    process.join()
    assert (home / "runs" / "a.json").read_text() == "slow"
    assert not old.exists()


# A home that cannot be written


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own: its limits and its user go with it."""
    with ProcessPoolExecutor(1, FORK, initializer=_set_work, initargs=(work,)) as pool:
        return pool.submit(_do_work).result()


def _set_work(work: Callable[[], Any]) -> None:
    global _work
    _work = work


def _do_work() -> Any:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = _work()
    return done, [str(one.message) for one in told if issubclass(one.category, UserWarning)]


_work: Callable[[], Any]


@pytest.fixture
def corpus_only(tiny: Experiment, home: Path) -> Path:
    """A home with the texts, and nothing that a run makes of them."""
    cvfp.data.load_corpus(tiny)
    forget()
    return home


def limited(size: int, work: Callable[[], Any]) -> Callable[[], Any]:
    def within() -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return work()

    return within


@pytest.mark.parametrize(
    "size",
    [30_000, *(pytest.param(size, marks=pytest.mark.full) for size in (0, 3_000, 100_000))],
)
def test_a_full_disk_keeps_a_run_from_nothing_but_the_store(
    size: int, tiny: Experiment, corpus_only: Path, tally: Tally
) -> None:
    result, told = in_child(limited(size, lambda: run_alone(tiny)))
    assert result.val_ppl > 1
    assert not result.from_store
    assert len(told) == 1
    assert f"CVFP_HOME: got {str(corpus_only)!r}" in told[0]
    cache.check_home()
    assert temporaries(corpus_only) == set()
    assert all(cache.sound(path) for path in kept(corpus_only))
    # What was kept is used, the rest is made now.
    assert numbers(cvfp.run(tiny)) == numbers(result)
    tally("runs on a full disk", tried=1)


@pytest.mark.parametrize("size", [0, 100, 2_000, 3_000])
def test_contexts_that_do_not_fit_on_the_disk_are_not_kept(size: int, home: Path) -> None:
    def write() -> None:
        store.write_phase1("k", {"weight": torch.ones(3)}, torch.zeros(200, 5), {})

    _, told = in_child(limited(size, write))
    assert len(told) == 1
    assert "CVFP_HOME" in told[0]
    assert list((home / "phase1").iterdir()) == []
    assert store.read_phase1("k") is None


def test_contexts_that_need_the_disk_name_the_home_where_it_is_full(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVFP_CONTEXTS", "disk")

    def rows() -> str:
        with pytest.raises(ParameterError, match=r"CVFP_HOME: got .*400,000 bytes free") as told:
            placement.rows(1000, 100, torch.float32, CPU)
        return str(told.value)

    assert str(home) in in_child(limited(399_999, rows))[0]
    assert list((home / "scratch").iterdir()) == []
    fitting = limited(400_000, lambda: tuple(placement.rows(1000, 100, torch.float32, CPU).shape))
    assert in_child(fitting)[0] == (1000, 100)


def test_a_home_that_is_a_file_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for home in (file, file / "below"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CVFP_HOME", str(home))
            with pytest.warns(UserWarning, match=f"CVFP_HOME: got '{home}'"):
                cache.check_home()
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # once
                assert obtained_text("tokenizers", "a") == obtained_text("tokenizers", "a")
                assert run_record("a") == run_record("a")


@pytest.fixture
def public_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home that any user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("CVFP_HOME", f"{folder}/home")
        yield Path(folder, "home")


def as_reader(work: Callable[[], Any]) -> Callable[[], Any]:
    def within() -> Any:
        if os.getuid() == 0:  # who may write anywhere
            os.setuid(65534)
        return work()

    return within


def test_a_home_that_can_only_be_read_is_read(
    tiny: Experiment, public_home: Path, tally: Tally
) -> None:
    first = cvfp.run(tiny)
    changed = tiny.replace(phase2_learning_rate=0.01)
    forget()
    folders = [public_home, *(path for path in public_home.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    for path in public_home.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    before = {path: path.stat().st_mtime_ns for path in public_home.rglob("*")}
    again, told = in_child(as_reader(lambda: run_alone(tiny)))
    assert again.from_store
    assert again == first
    assert len(told) == 1
    assert f"CVFP_HOME: got {str(public_home)!r}" in told[0]
    variant, told = in_child(as_reader(lambda: run_alone(changed)))
    assert variant.phase1_from_store
    assert variant.val_ppl != first.val_ppl
    assert len(told) == 1
    assert {path: path.stat().st_mtime_ns for path in public_home.rglob("*")} == before
    tally("runs on a home that can only be read", tried=2)
    for folder in folders:
        folder.chmod(0o755)
