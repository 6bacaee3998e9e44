from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from cvfp import Experiment, ParameterError, data, embeddings, hub
from cvfp.corpora import load_corpus

FromFile = Callable[..., Experiment]


def spy_on_downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were asked of the hub, by any of the three libraries' ways."""
    asked: list[str] = []

    def load_dataset(path: str, **arguments: Any) -> None:
        asked.append(path)
        raise OSError("not reached")

    def from_pretrained(name: str, local_files_only: bool) -> None:
        if not local_files_only:
            asked.append(name)
        raise OSError("not in the cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for auto in (transformers.AutoTokenizer, transformers.AutoModel):
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    return asked


HUB_NAMES = [("dataset", "no/such"), ("tokenizer", "no-such-model"), ("embedding", "no-such-model")]


def ask_hub(tiny: Experiment, field: str, name: str) -> None:
    free = {"tokenizer": "vocab_size", "embedding": "embedding_dim"}
    changes: dict[str, Any] = {field: name, **({free[field]: None} if field in free else {})}
    experiment = tiny.replace(**changes)
    embeddings.load(experiment, data.load(experiment))


@pytest.mark.parametrize(("field", "name"), HUB_NAMES)
def test_unreachable_hub_is_told_without_asking_twice(
    field: str,
    name: str,
    tiny: Experiment,
    unreachable_hub: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = spy_on_downloads(monkeypatch)
    with pytest.raises(ParameterError, match=f"^{field}: got '{name}'; .*a hub that can be rea"):
        ask_hub(tiny, field, name)
    assert asked == []


@pytest.mark.parametrize(("field", "name"), HUB_NAMES)
def test_unreachable_hub_with_the_real_clients(
    field: str, name: str, tiny: Experiment, unreachable_hub: None
) -> None:
    with pytest.raises(ParameterError, match=f"^{field}: got '{name}'; .*a hub that can be rea"):
        ask_hub(tiny, field, name)


@pytest.mark.parametrize(("field", "name"), HUB_NAMES)
def test_offline_is_told_by_its_variable(
    field: str, name: str, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spy_on_downloads(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ParameterError, match=f"^{field}: got '{name}'; .*HF_HUB_OFFLINE"):
        ask_hub(tiny, field, name)
    assert asked == []


def test_local_folders_need_no_hub(
    ultrachat_folder: Path,
    gpt2_folder: Path,
    from_file: FromFile,
    unreachable_hub: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    experiment = from_file(
        str(ultrachat_folder), str(gpt2_folder), train_split="train_sft", embedding=str(gpt2_folder)
    ).replace(embedding_dim=None)
    embeddings.load(experiment, data.load(experiment))


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("gpt2", True),
        ("HuggingFaceH4/ultrachat_200k", True),
        ("a/b/c", False),
        ("./a", False),
        ("~/a", False),
        ("/a", False),
        ("a b", False),
        ("x" * 300, False),
        ("", False),
    ],
)
def test_hub_ids(name: str, is_id: bool) -> None:
    assert hub.is_hub_id(name) == is_id


def test_a_path_that_exists_comes_before_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("~", "home"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").touch()
    assert hub.local("~/a.jsonl") == Path("~/a.jsonl")
    (tmp_path / "home" / "b.jsonl").touch()
    assert hub.local("~/b.jsonl") == tmp_path / "home" / "b.jsonl"
    assert hub.local("x" * 300) is None


@pytest.mark.parametrize("content", ["{}", "{", '{"model": ' + "[" * 3000])
def test_a_tokeniser_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ParameterError, match=r"^tokenizer: got '.*transformers can load \(.+\)"):
        data.load(Experiment(tokenizer=str(tmp_path), vocab_size=None, embedding="random"))


def serve(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """`datasets.load_dataset` replaced by a stream of `rows` texts; the rows taken from it."""
    taken: list[int] = []

    def texts() -> Iterator[dict[str, str]]:
        for number in range(rows):
            taken.append(number)
            yield {"text": f"text number {number}"}

    def load_dataset(path: str, streaming: bool, **arguments: Any) -> datasets.IterableDataset:
        assert streaming
        features = datasets.Features({"text": datasets.Value("string")})
        return datasets.IterableDataset.from_generator(texts, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return taken


def test_rows_that_the_hub_cannot_cast_are_named(
    home: Path, gpt2_folder: Path, from_file: FromFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, **arguments: Any) -> Iterator[dict[str, str]]:
        yield {"text": "fine"}
        raise TypeError("Couldn't cast array of type string to null")

    monkeypatch.setattr(hub, "require_hub", lambda parameter, name: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ParameterError, match=r"^dataset: got 'a/b'; .*Couldn't cast"):
        load_corpus(from_file("a/b", str(gpt2_folder)))


def test_streaming_takes_no_more_rows_than_asked_for(
    home: Path, gpt2_folder: Path, from_file: FromFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "require_hub", lambda parameter, name: None)
    taken = serve(monkeypatch, rows=10_000)
    corpus = load_corpus(from_file("someone/something", str(gpt2_folder)))
    assert corpus.train == [f"text number {number}" for number in range(2, 6)]
    assert max(taken) in (5, 6)  # datasets itself looks one row ahead


def test_hub_texts_are_kept(
    home: Path, gpt2_folder: Path, from_file: FromFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "require_hub", lambda parameter, name: None)
    taken = serve(monkeypatch, rows=12)
    experiment = from_file("someone/something", str(gpt2_folder))
    first = load_corpus(experiment)
    assert taken
    taken.clear()
    assert load_corpus(experiment) == first
    assert load_corpus(experiment.replace(samples=3)).train == first.train[:3]
    assert taken == []
    # What is kept ends where the split does not: more is asked for, and taken from the start.
    assert load_corpus(experiment.replace(samples=10)).train[:4] == first.train
    assert max(taken) == 11
    with pytest.raises(ParameterError, match=r"^samples: got 11; .*at most 10 "):
        load_corpus(experiment.replace(samples=11))
    taken.clear()
    with pytest.raises(ParameterError, match=r"^samples: got 12; .*at most 10 "):
        load_corpus(experiment.replace(samples=12))
    assert taken == []  # the split is known to end there
    for other in (dict(train_split="b"), dict(dataset_config="b"), dict(dataset="someone/else")):
        taken.clear()
        load_corpus(experiment.replace(**other))
        assert taken, other
