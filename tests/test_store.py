from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_experiment

import cvfp
from cvfp import Experiment, Result, cache, phase2, store
from cvfp.experiment import exact_contexts
from cvfp.metrics import perplexity

# Not numbers of the model: when, where and how long.
INCIDENTAL = {"seconds", "peak_memory_mib", "phase1_from_store", "from_store", "_model"}


def numbers(result: Result) -> dict[str, Any]:
    return {f.name: getattr(result, f.name) for f in fields(Result) if f.name not in INCIDENTAL}


@pytest.fixture(scope="module")
def finished(tiny: Experiment) -> Result:
    """The tiny run, kept in the session's home."""
    return cvfp.run(tiny, reuse=False)


def test_normalised_code_ignores_comments_docstrings_and_layout() -> None:
    plain = "def f(x):\n    return x + 1\n\nclass A:\n    b = 2\n"
    dressed = (
        '"""Module."""\n# why\n\ndef f(x):\n    """Doc."""\n    return (x +\n        1)  # one\n\n'
        'class A:\n    "doc"\n    b = 2\n'
    )
    assert cache.normalised(dressed) == cache.normalised(plain)


@pytest.mark.parametrize(
    "changed",
    [
        "def f(x):\n    return x + 2\n",
        "def f(x):\n    return x - 1\n",
        "def f(x, y=1):\n    return x + 1\n",
        "def g(x):\n    return x + 1\n",
        "def f(x):\n    return x + 1.0\n",
    ],
)
def test_normalised_code_tells_changes(changed: str) -> None:
    plain = "def f(x):\n    return x + 1\n"
    assert cache.normalised(changed) != cache.normalised(plain)


def test_normalised_code_keeps_texts_that_are_values() -> None:
    assert cache.normalised("a = 'x'\n") != cache.normalised("a = 'y'\n")
    assert cache.normalised("def f():\n    return 'x'\n") != cache.normalised(
        "def f():\n    return 'y'\n"
    )


RESOLVED = Experiment(device="cpu", precision="float32")
CHANGED: dict[str, Any] = dict(
    num_layers=4,
    context_dim=130,
    num_input_tokens=2,
    token_input_all_layers=False,
    dist_reg_weight=0.9,
    phase1_learning_rate=0.001,
    phase1_max_iterations=41,
    phase1_min_iterations=6,
    phase1_noise=0.2,
    phase1_gradient_clip=2.0,
    phase1_abort=True,
    convergence_threshold=0.04,
    convergence_rate=0.98,
    loss_group=8001,
    model="lstm",
    contexts="zero",
    window_tokens=17,
    unroll=33,
    weight_tying=False,
    freeze_embedding=False,
    training_contexts="exact",
    phase2_learning_rate=0.004,
    phase2_epochs=11,
    phase2_patience=3,
    phase2_batch_size=1025,
    phase2_shuffle=False,
    seed=43,
    device="cuda",
    precision="bfloat16",
    objective="settle",
    block="torch.nn:Identity",
    context_std=0.2,
    input_std=0.2,
    token_block_std=0.2,
    objective_lags="0",
    leak_tokens=8.0,
    phase1_step="group",
    phase1_decay="linear",
    phase1_fresh=True,
    phase1_stop="never",
    dropout=0.1,
    weight_decay=0.1,
    ops="plain",
)


def keys(experiment: Experiment, data: str = "d", table: str = "t") -> tuple[str, str]:
    return (
        store.key(experiment, data, table),
        store.key(experiment, data, table, phase1=True),
    )


@pytest.mark.parametrize("name", RESOLVED.to_dict("context", "phase1", "phase2", "run"))
def test_keys_change_with_the_fields_of_their_stages(name: str) -> None:
    changed = RESOLVED.replace(**{name: CHANGED[name]})
    assert getattr(changed, name) != getattr(RESOLVED, name)
    run, phase1 = keys(RESOLVED)
    other_run, other_phase1 = keys(changed)
    assert other_run != run
    assert (other_phase1 == phase1) == (name in RESOLVED.to_dict("phase2"))


def test_keys_hold_data_by_content_not_by_name() -> None:
    assert keys(RESOLVED.replace(dataset="elsewhere.jsonl", samples=9)) == keys(RESOLVED)
    for other in (keys(RESOLVED, data="e"), keys(RESOLVED, table="u"), keys(RESOLVED, "t", "d")):
        assert not set(other) & set(keys(RESOLVED))


def test_run_and_phase1_keys_differ() -> None:
    run, phase1 = keys(RESOLVED)
    assert run != phase1


def test_keys_change_with_code_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(keys(RESOLVED))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "code_fingerprint", lambda *names: "-".join(names))
        assert not set(keys(RESOLVED)) & before
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0")
        assert not set(keys(RESOLVED)) & before
    assert set(keys(RESOLVED)) == before


def test_unresolved_experiment_has_no_key() -> None:
    with pytest.raises(ValueError, match="resolved"):
        store.key(Experiment(device="cpu", precision="auto"), "d", "t")


def test_code_of_every_module_that_makes_numbers_counts() -> None:
    package = Path(cvfp.__file__).parent
    modules = {path.stem for path in package.glob("*.py")}
    # What shows, keeps and checks, or reads finished runs, makes none.
    assert modules - set(store.RUN_CODE) <= {
        "__init__",
        "__main__",
        "abort",
        "cache",
        "card",
        "config",
        "errors",
        "estimate",
        "explorer",
        "gap",
        "generation",
        "notebook",
        "packs",
        "parameters",
        "pretrained",
        "progress",
        "registry",
        "store",
        "sweep",
        "tuning",
        "version",
        "watch",
    }


def test_digest_keeps_parts_apart() -> None:
    digests = [
        cache.digest("ab", "c"),
        cache.digest("a", "bc"),
        cache.digest("abc"),
        cache.digest(["ab", "c"]),
        cache.digest(torch.tensor([1, 2])),
        cache.digest(torch.tensor([2, 1])),
        cache.digest(torch.tensor([1]), torch.tensor([2])),
    ]
    assert len(set(digests)) == len(digests)
    assert cache.digest({"a": 1, "b": 2}) == cache.digest({"b": 2, "a": 1})


def test_exception_while_writing_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"

    def write(text: str, fail: bool) -> None:
        with cache.whole(path) as temporary:
            temporary.write_text(text)
            assert not fail, "in the middle"

    with pytest.raises(AssertionError, match="in the middle"):
        write("half", fail=True)
    assert list(path.parent.iterdir()) == []
    write("whole", fail=False)
    with pytest.raises(AssertionError, match="in the middle"):
        write("half", fail=True)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text() == "whole"


def test_second_run_comes_from_the_store_with_equal_numbers(
    tiny: Experiment, finished: Result
) -> None:
    again = cvfp.run(tiny)
    assert again.from_store
    assert not finished.from_store
    assert numbers(again) == numbers(finished)
    assert again.seconds == finished.seconds


def test_stored_run_bears_the_callers_names(
    tiny: Experiment, finished: Result, write_jsonl: Any
) -> None:
    from cvfp.corpora import load_corpus

    corpus = load_corpus(tiny)
    path = write_jsonl(*corpus.validation, *corpus.fitting, *corpus.train)
    same = cvfp.run(tiny.replace(dataset=path))
    assert same.from_store
    assert same.key == finished.key
    assert same.experiment.dataset == path


def test_run_measured_anew_has_the_same_numbers(tiny: Experiment, finished: Result) -> None:
    anew = cvfp.run(tiny, reuse=False)
    assert not anew.from_store
    assert not anew.phase1_from_store
    assert numbers(anew) == numbers(finished)


def test_seed_and_data_make_other_runs(tiny: Experiment, finished: Result) -> None:
    for changes in (dict(seed=43), dict(samples=7), dict(validation_samples=4)):
        other = cvfp.run(tiny.replace(**changes))
        assert not other.from_store
        assert other.val_ppl != finished.val_ppl


def test_variant_of_phase2_takes_phase1_from_the_store(
    tiny: Experiment, finished: Result, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tiny.replace(phase2_learning_rate=0.01, weight_tying=False)
    fresh = cvfp.run(changed)
    assert not fresh.phase1_from_store
    monkeypatch.setenv("CVFP_HOME", str(home.with_name("other")))
    first = cvfp.run(tiny)
    assert not first.phase1_from_store
    variant = cvfp.run(changed)
    assert variant.phase1_from_store
    assert not variant.from_store
    assert numbers(variant) == numbers(fresh)
    assert variant.val_ppl != first.val_ppl
    assert variant.seconds["phase1"] == first.seconds["phase1"]


def test_result_survives_json(finished: Result) -> None:
    text = json.dumps(finished.to_dict(), allow_nan=False)
    assert Result.from_dict(json.loads(text)) == finished


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(weight_tying=False),
        dict(freeze_embedding=False),
        dict(weight_tying=False, freeze_embedding=False, token_input_all_layers=False),
    ],
    ids=["tied", "own head", "trained table", "own head, trained table, equal-decrease"],
)
def test_model_from_the_store_is_the_runs(changes: dict[str, Any], tiny: Experiment) -> None:
    experiment = tiny.replace(num_input_tokens=2, **changes)
    ran = cvfp.run(experiment)
    kept = cvfp.run(experiment)
    assert kept.from_store
    ours, theirs = ran.model(), kept.model()
    assert theirs is not ours
    tokens = cvfp.data.load(tiny).validation.tokens
    contexts = exact_contexts(ours.context_block, ours.context_inputs(tokens)).values
    again = exact_contexts(theirs.context_block, theirs.context_inputs(tokens)).values
    assert torch.equal(again, contexts)
    positions = torch.arange(len(tokens))
    logits = [
        model.logits(
            stream.hidden(
                positions,
                stream.outputs(positions, stream.previous(positions)),
                stream.token_inputs(),
            )
        )
        for model, stream in (
            (model, phase2.Positions(model, contexts, tokens)) for model in (ours, theirs)
        )
    ]
    assert torch.equal(*logits)
    # And it is the model of the best epoch, whose figures the Result has.
    evaluation = phase2.evaluate(phase2.Positions(theirs, contexts, tokens))
    assert perplexity(evaluation.loss) == ran.val_ppl
    assert evaluation.accuracy == ran.val_acc
    assert cvfp.generate(theirs, "hello", 5, seed=3) == cvfp.generate(ours, "hello", 5, seed=3)


def test_model_too_large_to_keep_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MODEL_BYTES", 1000)
    experiment = tiny_experiment(embedding="random", phase2_epochs=1)
    ran = cvfp.run(experiment)
    ran.model()
    assert not (home / "models").exists()
    with pytest.raises(FileNotFoundError, match=ran.key):
        cvfp.run(experiment).model()


def phase1_files(home: Path) -> set[str]:
    found = {path.stem for path in (home / "phase1").iterdir()}
    assert len(list((home / "phase1").iterdir())) == 2 * len(found)  # weights and contexts
    return found


def test_least_recently_used_phase1_goes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(key: str) -> None:
        store.write_phase1(key, {"weight": torch.ones(3)}, torch.zeros(50, 5), {"name": key})

    for age, key in enumerate(("a", "b", "c")):
        write(key)
        # Long ago, a before b before c: clocks are too coarse to tell writes apart.
        os.utime(home / "phase1" / f"{key}.safetensors", (age, age))
    size = sum((home / "phase1" / f"a.{end}").stat().st_size for end in ("safetensors", "npy"))
    monkeypatch.setattr(store, "PHASE1_BYTES", 3 * size)
    kept = store.read_phase1("a")
    assert kept is not None
    assert kept[2]["name"] == "a"
    write("d")
    assert phase1_files(home) == {"a", "c", "d"}
    assert store.read_phase1("b") is None
    monkeypatch.setattr(store, "PHASE1_BYTES", size)
    write("e")
    assert phase1_files(home) == {"e"}
    monkeypatch.setattr(store, "PHASE1_BYTES", 500)
    write("f")  # larger than all that may be kept: nothing goes for it
    assert phase1_files(home) == {"e"}


def test_half_a_phase1_is_none_and_goes_with_the_oldest(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_phase1("a", {"weight": torch.ones(3)}, torch.zeros(50, 5), {})
    (home / "phase1" / "a.npy").unlink()  # as an older version left them
    os.utime(home / "phase1" / "a.safetensors", (0, 0))
    assert store.read_phase1("a") is None
    monkeypatch.setattr(store, "PHASE1_BYTES", 1300)
    store.write_phase1("b", {"weight": torch.ones(3)}, torch.zeros(50, 5), {})
    assert phase1_files(home) == {"b"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phase1_comes_back_as_it_was(dtype: torch.dtype, home: Path) -> None:
    weights, contexts = {"weight": torch.randn(3)}, torch.randn(50, 5).to(dtype)
    store.write_phase1("k", weights, contexts, {"name": "k"})
    for _ in range(2):
        kept = store.read_phase1("k")
        assert kept is not None
        assert torch.equal(kept[0]["weight"], weights["weight"])
        assert torch.equal(kept[1], contexts)
        assert kept[1].dtype == dtype
        kept[1].zero_()  # of a copy: the file keeps what it has


def test_phase1_is_kept_though_phase2_fails(
    tiny: Experiment, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(phase2, "train", broken)
        with pytest.raises(KeyboardInterrupt):
            cvfp.run(tiny)
    assert len(phase1_files(home)) == 1
    assert cvfp.run(tiny).phase1_from_store


def test_a_phase1_that_cannot_be_kept_is_told(
    tiny: Experiment, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store, "write_phase1", full)
    with pytest.raises(OSError, match="no space left"):
        cvfp.run(tiny)


def test_broken_record_is_never_written(home: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.write_run("k", {"val_ppl": float("nan")})
    assert list((home / "runs").iterdir()) == []
    assert store.read_run("k") is None


def test_baselines_are_measured_once_for_the_same_data(
    tiny: Experiment, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cvfp.run(tiny)
    counted: list[int] = []
    evaluate = cvfp.baselines.evaluate
    monkeypatch.setattr(
        cvfp.baselines, "evaluate", lambda *given: counted.append(1) or evaluate(*given)
    )
    again = cvfp.run(tiny.replace(seed=7))
    assert again.baselines == first.baselines
    assert not counted
    # Other data, or another table, are other baselines.
    assert cvfp.run(tiny.replace(samples=7)).baselines != first.baselines
    other = cvfp.run(tiny.replace(embedding="random"))
    assert other.baselines["table"] is None
    assert other.baselines["kneser_ney"] == first.baselines["kneser_ney"]
    assert len(counted) == 2
    # They belong to the data, and are not what a run that measures anew would measure.
    assert cvfp.run(tiny, reuse=False).baselines == first.baselines
    assert len(counted) == 2


# Room is made while others make room, too


def kept_files(folder: Path, *names: str) -> None:
    for age, name in enumerate(names):
        path = folder / name
        cache.keep(path, lambda temporary: temporary.write_bytes(bytes(100)))
        os.utime(path, (1000 + age, 1000 + age))


def test_the_oldest_go_until_there_is_room(tmp_path: Path) -> None:
    folder = tmp_path / "phase1"
    kept_files(folder, "b.one", "a.one", "a.two", "c.one")
    cache.evict(folder, 400)
    assert len(list(folder.iterdir())) == 4
    cache.evict(folder, 350)
    assert {path.name for path in folder.iterdir()} == {"a.one", "a.two", "c.one"}
    cache.evict(folder, 250)  # a key whole
    assert {path.name for path in folder.iterdir()} == {"c.one"}
    assert not cache.checksum_file(folder / "a.one").exists()


def test_files_that_another_process_deletes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "phase1"
    kept_files(folder, "a.one", "b.one", "b.two", "c.one", "d.one")
    listed = Path.glob

    def glob(self: Path, pattern: str) -> Any:
        found = list(listed(self, pattern))
        if pattern == "a.*":  # its files are gone after they were listed
            (folder / "a.one").unlink()
        if pattern == "b.*":  # all are gone before
            for name in ("b.one", "b.two"):
                (folder / name).unlink()
            return iter([])
        return iter(found)

    monkeypatch.setattr(Path, "glob", glob)
    cache.evict(folder, 150)
    assert {path.name for path in folder.iterdir()} == {"d.one"}
