"""Sizes that nobody set follow the tokeniser, the table and the corpus; those that cannot be."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from conftest import tiny_experiment
from test_notebooks import BOOKS, first_cells

import cvfp
from cvfp import Experiment, ParameterError, Result, cache, data
from cvfp.analysis import tables
from cvfp.config import PRESETS, UpTo
from cvfp.corpora import load_corpus

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "sé", "to") for b in ("n", "sta", "ver", "l")]


def conversations(count: int, seed: int = 0) -> list[str]:
    """Different texts of some forty words."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (count, 40), generator=generator).tolist()
    return [f"{number}: " + " ".join(WORDS[i] for i in row) for number, row in enumerate(rows)]


@pytest.fixture
def own(write_jsonl: Callable[..., str]) -> Callable[..., str]:
    return lambda count, name="own": write_jsonl(*conversations(count), name=name)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokeniser of 300 entries, as transformers saves it."""
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator(conversations(50, seed=1), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def table_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose table has 400 rows, 24 wide."""
    import transformers

    folder = tmp_path_factory.mktemp("table")
    config = transformers.GPT2Config(vocab_size=400, n_embd=24, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2Model(config).save_pretrained(folder)
    return str(folder)


def sizes(experiment: Experiment) -> tuple[int, int, int]:
    corpus = load_corpus(experiment)
    return len(corpus.validation), len(corpus.fitting), len(corpus.train)


# What nobody set


def test_a_size_that_nobody_set_is_the_plain_number_but_remembered() -> None:
    alone, said = Experiment(), Experiment(samples=200, vocab_size=4096, fitting_samples=500)
    assert alone == said
    assert hash(alone) == hash(said)
    assert repr(alone) == repr(said)
    assert json.dumps(alone.to_dict()) == json.dumps(said.to_dict())
    assert cache.digest(alone.key_fields()) == cache.digest(said.key_fields())
    both = {"validation_samples", "development_samples", "embedding_dim", "phase1_min_iterations"}
    assert said.left_alone == both
    assert alone.left_alone == both | {"samples", "vocab_size", "fitting_samples"}
    assert {"samples", "validation_samples"} < Experiment.preset("published").left_alone


def test_what_nobody_set_is_remembered_by_copies() -> None:
    alone = Experiment(samples=7)
    for copy in (
        alone.replace(num_layers=2),
        dataclasses.replace(alone, num_layers=2),
        pickle.loads(pickle.dumps(alone)),
        Experiment(**alone.to_dict()),
        alone.resolved(),
    ):
        assert copy.left_alone == alone.left_alone
    assert "fitting_samples" not in alone.replace(fitting_samples=500).left_alone
    assert Experiment.preset(samples="200").left_alone == alone.left_alone


def test_settled_sizes_are_said_where_they_are_less() -> None:
    became = {"samples": 90, "fitting_samples": 500, "validation_samples": 0, "vocab_size": 5000}
    made = Experiment().settled(became)
    assert made == Experiment(samples=90)
    assert Experiment().left_alone - made.left_alone == {"samples"}
    assert Experiment(samples=100).settled(became).samples == 100


# Tokeniser and table


@pytest.mark.parametrize(
    ("field", "size", "pretrained", "fitted"),
    [("tokenizer", "vocab_size", "gpt2", "bpe"), ("embedding", "embedding_dim", "gpt2", "bigram")],
)
def test_vocabulary_and_width_follow_what_is_pretrained_and_what_is_fitted(
    field: str, size: str, pretrained: str, fitted: str
) -> None:
    default = getattr(Experiment(), size)
    assert getattr(Experiment(**{field: pretrained}), size) is None
    assert getattr(Experiment().replace(**{field: pretrained}), size) is None
    assert getattr(Experiment.preset("published"), size) is None
    assert getattr(Experiment.preset("published", **{field: fitted}), size) == default
    said = {field: pretrained, size: 1000}
    assert getattr(Experiment(**said), size) == 1000
    with pytest.raises(ParameterError, match=f"^{size}: got None; .*{fitted}"):
        Experiment.preset("published", **{field: fitted, size: "none"})
    row = next(row for row in Experiment.describe() if row["field"] == size)
    assert (row["mini"], row["published"]) == (default, None)


def test_a_run_with_a_tokeniser_and_a_table_of_ones_own(
    tokenizer_folder: str, table_folder: str
) -> None:
    one = Experiment(tokenizer=tokenizer_folder, embedding=table_folder).replace(
        **{k: v for k, v in tiny_experiment().to_dict().items() if k not in OWN_SIZES}
    )
    result = cvfp.run(one)
    assert (result.vocab_size, result.embedding_dim) == (400, 24)
    assert data.load(one).vocab_size == 300
    with pytest.raises(ParameterError, match=r"^vocab_size: got 4096; accepted: None, or 300 "):
        data.load(one.replace(vocab_size=4096))
    assert data.load(one).vocab_size == 300  # what was refused is equal to no other
    with pytest.raises(ParameterError, match=r"^embedding_dim: got 128; accepted: None, or 24 "):
        cvfp.run(one.replace(embedding_dim=128))


OWN_SIZES = ("tokenizer", "vocab_size", "embedding", "embedding_dim")


def test_a_vocabulary_left_alone_is_what_the_texts_allow(own: Callable[..., str]) -> None:
    one = Experiment(dataset=own(60))
    most = data.load(one).vocab_size
    assert 257 < most < 4096
    with pytest.raises(ParameterError, match=f"^vocab_size: got 4096; accepted: at most {most} "):
        data.load(one.replace(vocab_size=4096))
    assert data.load(one.replace(vocab_size=most)).vocab_size == most
    assert data.load(one).fingerprint == data.load(one.replace(vocab_size=most)).fingerprint


# The corpus


@pytest.mark.parametrize(
    ("count", "said", "wanted"),
    [
        (720, {}, (20, 500, 200)),  # all that is asked for
        (719, {}, (20, 174, 200)),
        (150, {}, (20, 32, 98)),
        (150, {"samples": 98}, (20, 32, 98)),
        (150, {"samples": 50}, (20, 32, 50)),
        (150, {"samples": 100}, (20, 30, 100)),
        (150, {"samples": 117}, (20, 13, 117)),
        (150, {"fitting_samples": 100}, (20, 100, 30)),
        (150, {"validation": "tail"}, (0, 37, 113)),
        (150, {"embedding": "random", "tokenizer": "folder"}, (20, 0, 130)),
        (12, {}, (2, 2, 8)),
        (3, {}, (1, 1, 1)),
    ],
)
def test_sizes_left_alone_follow_the_corpus(
    own: Callable[..., str],
    tokenizer_folder: str,
    count: int,
    said: dict[str, Any],
    wanted: tuple[int, int, int],
) -> None:
    if "tokenizer" in said:
        said = {**said, "tokenizer": tokenizer_folder}
    one = Experiment(dataset=own(count), **said)
    assert sizes(one) == wanted
    became = data.load(one).sizes
    assert (became["validation_samples"], became["fitting_samples"], became["samples"]) == wanted
    assert sizes(one.settled(became)) == wanted


@pytest.mark.parametrize(
    ("said", "parameter", "most"),
    [
        ({"samples": 118}, "samples", 117),
        ({"fitting_samples": 500}, "fitting_samples", 130),
        ({"fitting_samples": 130}, "samples", 0),
        ({"samples": 51, "fitting_samples": 80}, "samples", 50),
        ({"validation_samples": 200}, "validation_samples", 150),
    ],
)
def test_sizes_that_were_said_are_refused_as_ever(
    own: Callable[..., str], said: dict[str, Any], parameter: str, most: int
) -> None:
    with pytest.raises(ParameterError, match=f"^{parameter}: .*at most {most} with") as caught:
        load_corpus(Experiment(dataset=own(150), **said))
    assert caught.value.parameter == parameter


def test_held_out_conversations_are_the_same_and_samples_nested(own: Callable[..., str]) -> None:
    path = own(150)
    made = [load_corpus(Experiment(dataset=path, samples=size)) for size in (10, 50, 98)]
    for small, large in itertools.pairwise(made):
        assert small.validation == large.validation
        assert small.fitting == large.fitting
        assert small.train == large.train[: len(small.train)]


def test_a_ladder_has_one_tokeniser(own: Callable[..., str], tiny: Experiment) -> None:
    """110 takes so many that fewer can be fitted on: fewer in every run."""
    alone = Experiment().to_dict("data")
    one = tiny.replace(**{**alone, "dataset": own(150), "embedding_dim": 16})
    assert one.replace(samples=20).left_alone >= {"fitting_samples", "vocab_size"}
    results = cvfp.sweep(one, samples=[20, 110], phase2_epochs=[1])
    assert [r.experiment.fitting_samples for r in results] == [20, 20]
    assert [r.experiment.samples for r in results] == [20, 110]
    assert len({(r.vocab_size, r.val_tokens) for r in results}) == 1
    words = tables.ran_on(results).loc["conversations", ""]
    assert words == "20, 110, fitting 20"


def test_a_run_says_what_sizes_became_and_gives_its_model_back(
    own: Callable[..., str], tiny: Experiment, home: Path
) -> None:
    alone = Experiment().to_dict("data")
    one = tiny.replace(**{**alone, "dataset": own(30), "embedding_dim": 16})
    result = cvfp.run(one)
    became = result.experiment
    assert (became.validation_samples, became.fitting_samples, became.samples) == (20, 2, 8)
    assert became.vocab_size == result.vocab_size < 4096
    left = {"validation_samples", "development_samples", "phase1_min_iterations"}
    assert became.left_alone == left
    again = Result.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again == result
    assert again.model().tokenizer is not None
    stored = cvfp.run(one)
    assert stored.from_store
    assert stored.experiment == became


# The notebooks


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_a_corpus_of_ones_own_is_enough_for_every_notebook(
    book: Path, own: Callable[..., str]
) -> None:
    space = first_cells(book, dataset=own(150))
    one = space["experiment"]
    # A quarter of what is not held out.
    assert one.fitting_samples <= (150 - one.validation_samples) // 4
    assert one.vocab_size < 4096
    assert "vocab_size" not in one.left_alone
    if book.stem.startswith("03"):
        assert space["sizes"] == [50, 98]


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_a_tokeniser_and_a_table_are_enough_for_every_notebook(
    book: Path, tokenizer_folder: str, table_folder: str
) -> None:
    small = dict(fitting_samples=3, validation_samples=2)
    one = first_cells(book, tokenizer=tokenizer_folder, **small)["experiment"]
    assert (one.vocab_size, one.embedding_dim) == (None, 128)
    one = first_cells(book, embedding=table_folder, vocab_size=300, **small)["experiment"]
    assert one.embedding_dim is None


def test_the_ladder_left_alone_is_the_presets() -> None:
    book = next(book for book in BOOKS if book.stem.startswith("03"))
    small = dict(vocab_size=300, fitting_samples=3, validation_samples=2)
    assert first_cells(book, **small)["sizes"] == [50, 100, 200]
    assert first_cells(book, samples=120, **small)["sizes"] == [50, 100, 120]


# Sizes that cannot be


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Experiment)])
def test_every_number_has_a_bound(name: str) -> None:
    default = getattr(Experiment(), name)
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return
    huge: float = 10**19 if isinstance(default, int) else 1e31
    with pytest.raises(ParameterError, match=rf"^{name}: got .* at most \d"):
        Experiment(**{name: huge})


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [
        ("vocab_size", 10**9, "10000000"),
        ("context_dim", 10**6, "100000"),
        ("embedding_dim", 10**6, "100000"),
        ("num_layers", 10**6, "1000"),
        ("num_input_tokens", 10**6, "1000"),
        ("window_tokens", 10**9, "100000"),
        ("phase2_batch_size", 10**10, "1000000000"),
        ("phase1_noise", 1e10, "100"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, value: float, most: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: got .* and at most {most}$"):
        Experiment(**{name: value})


def test_large_but_real_sizes_are_accepted() -> None:
    Experiment(vocab_size=300_000, context_dim=16_384, embedding_dim=12_288, num_layers=128)
    Experiment(samples=10**7, phase2_batch_size=10**6, loss_group=10**8, seed=2**32)


def test_least_iterations_over_the_most_name_both() -> None:
    with pytest.raises(
        ParameterError,
        match=r"^phase1_min_iterations: got 50; .*at most 40, phase1_max_iterations$",
    ):
        Experiment(phase1_min_iterations=50)
    with pytest.raises(
        ParameterError, match=r"^phase1_min_iterations: got 5; .* 3, phase1_max_iterations$"
    ):
        Experiment(phase1_min_iterations=5, phase1_max_iterations=3)
    assert Experiment(phase1_max_iterations=3).phase1_min_iterations == 5  # nobody said it
    Experiment(phase1_min_iterations=3, phase1_max_iterations=3)


def test_a_stored_run_of_few_iterations_can_be_read(tiny: Experiment) -> None:
    result = cvfp.run(tiny.replace(phase1_max_iterations=3))
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_presets_sizes_are_left_alone() -> None:
    for name, fields in PRESETS.items():
        there = {k for k, v in fields.items() if isinstance(v, UpTo)}
        assert there <= Experiment.preset(name).left_alone
