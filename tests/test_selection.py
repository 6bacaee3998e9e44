"""Development conversations: whose they are, what they choose, and that validation only judges."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import WriteJsonl, tiny_experiment

import cvfp
from cvfp import Experiment, ParameterError, Result, data, experiment
from cvfp.corpora import Corpus, load_corpus

ROLES = ("train", "validation", "fitting", "development")


def corpus(**fields: Any) -> Corpus:
    return load_corpus(Experiment(**{"selection": "development", **fields}))


def none_twice(one: Corpus) -> bool:
    texts = [text for role in ROLES for text in getattr(one, role)]
    return len(set(texts)) == len(texts)


# Whose they are


def test_chitchats_are_the_last_of_training() -> None:
    without = load_corpus(Experiment(samples=2999))
    chosen = corpus(samples=2799)
    assert chosen.development == without.train[-200:]
    assert chosen.train == without.train[:-200]
    assert (chosen.validation, chosen.fitting) == (without.validation, without.fitting)
    assert none_twice(chosen)
    assert without.development == []


def test_chitchats_smaller_sizes_are_the_same_whatever_chooses() -> None:
    whole = load_corpus(Experiment(samples=300)).train
    for size, count in ((300, 200), (40, 200), (40, 7)):
        one = corpus(samples=size, development_samples=count)
        assert one.train == whole[:size]
        assert len(one.development) == count
    assert corpus(samples=40, development_samples=7).development == one.development
    assert corpus(development_samples=200).development[-7:] == one.development


@pytest.mark.parametrize(
    ("fields", "name", "most"),
    [
        ({"samples": 2800}, "samples", 2799),
        ({"development_samples": 2999, "samples": 1}, "samples", 0),
        ({"development_samples": 3000, "samples": 1}, "development_samples", 2999),
    ],
)
def test_chitchat_names_what_is_too_many(fields: dict[str, Any], name: str, most: int) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}: .* at most {most} with") as caught:
        corpus(**fields)
    assert caught.value.parameter == name


def conversations(count: int, seed: int = 0, letters: str = "abcdefghij") -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join("".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(12))
        for _ in range(count)
    ]


def test_a_files_come_between_fitting_and_training(write_jsonl: WriteJsonl) -> None:
    texts = conversations(100)
    path = write_jsonl(*texts, texts[1])
    fields: dict[str, Any] = dict(dataset=path, validation_samples=5, fitting_samples=20)
    fields |= dict(development_samples=8)
    for size in (10, 30, 67):
        one = corpus(**fields, samples=size)
        assert one.validation == texts[:5]
        assert one.fitting == texts[5:25]
        assert one.development == texts[25:33]
        assert one.train == texts[33 : 33 + size]
    with pytest.raises(ParameterError, match=r"^samples: got 68; accepted: at most 67 "):
        corpus(**fields, samples=68)
    with pytest.raises(ParameterError, match=r"^development_samples: got 76; .* at most 75 "):
        corpus(**fields | {"development_samples": 76}, samples=1)


def test_a_copy_of_a_held_out_text_chooses_nothing(write_jsonl: WriteJsonl) -> None:
    texts = conversations(30)
    path = write_jsonl(*texts[:8], texts[0].upper(), *texts[8:])
    one = corpus(
        dataset=path, validation_samples=5, fitting_samples=3, development_samples=4, samples=9
    )
    assert one.development == texts[8:12]
    assert one.copies == 1


@pytest.mark.parametrize(
    ("count", "fields", "development", "train"),
    [
        (320, {}, 45, 180),  # 300 not held out: a quarter is for fitting, a fifth of the rest
        (320, {"fitting_samples": 100}, 40, 160),
        (320, {"samples": 210}, 15, 210),  # training said: less for the two others
        (320, {"development_samples": 100}, 100, 125),
        (3000, {}, 200, 200),  # there is enough
        (26, {}, 1, 4),
        (22, {"tokenizer": "gpt2-bpe", "embedding": "random"}, 1, 1),
        (21, {"tokenizer": "gpt2-bpe", "embedding": "random"}, 3, 14),  # 4 held out
        (4, {"tokenizer": "gpt2-bpe", "embedding": "random"}, 1, 2),
        (5, {}, 1, 2),
    ],
)
def test_a_small_corpus_gives_a_fifth(
    count: int, fields: dict[str, Any], development: int, train: int, write_jsonl: WriteJsonl
) -> None:
    one = corpus(dataset=write_jsonl(*conversations(count)), **fields)
    assert (len(one.development), len(one.train)) == (development, train)
    assert none_twice(one)


def test_what_a_small_corpus_gave_is_said(write_jsonl: WriteJsonl) -> None:
    one = Experiment(selection="development", dataset=write_jsonl(*conversations(320)))
    assert one.settled(data.load(one).sizes).development_samples == 45
    plain = one.replace(selection="validation")
    assert plain.settled(data.load(plain).sizes).development_samples == 200
    assert data.load(one).fingerprint != data.load(plain).fingerprint


@pytest.mark.parametrize("said", ["development_samples", "samples"])
def test_a_small_corpus_refuses_by_name_what_was_said(said: str, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(*conversations(320))
    with pytest.raises(ParameterError, match=f"^{said}: got 300; accepted: at most ") as caught:
        corpus(dataset=path, **{said: 300})
    assert caught.value.parameter == said


# What they choose

FITTING, LEARNT = conversations(3, 1), conversations(20, 2)
LIKE_TRAINING, UNLIKE = conversations(3, 3), conversations(3, 4, letters="uvwxyz")
KINDS: dict[str, dict[str, Any]] = {
    "cvfp": {},
    "window": {"contexts": "window"},
    "shuffled": {"contexts": "shuffled"},
    "end to end": {"contexts": "end_to_end"},
    "lstm": {"model": "lstm"},
}


def same(one: Result, other: Result) -> bool:
    theirs = other.model().state_dict()
    return all(torch.equal(p, theirs[name]) for name, p in one.model().state_dict().items())


@pytest.mark.parametrize(
    "kind",
    [
        *("cvfp", "window", "lstm"),
        *(pytest.param(kind, marks=pytest.mark.full) for kind in ("shuffled", "end to end")),
    ],
)
def test_development_chooses_and_validation_judges(kind: str, write_jsonl: WriteJsonl) -> None:
    """Training goes on to help the conversations that are like its own, not the others."""
    rest: dict[str, Any] = dict(vocab_size=280, embedding="random", embedding_dim=32, samples=20)
    rest |= dict(fitting_samples=3, phase2_epochs=4, phase2_patience=4, phase2_learning_rate=0.03)
    one = tiny_experiment(**rest, **KINDS[kind], phase2_batch_size=32, unroll=16)

    def run(name: str, held_out: list[str], choosing: list[str] | None) -> Result:
        path = write_jsonl(*held_out, *FITTING, *(choosing or []), *LEARNT, name=name)
        fields: dict[str, Any] = dict(dataset=path, validation_samples=len(held_out))
        if choosing:
            fields |= dict(selection="development", development_samples=len(choosing))
        return cvfp.run(one.replace(**fields))

    chosen = run("chosen", UNLIKE, LIKE_TRAINING)
    by_like, by_unlike = run("like", LIKE_TRAINING, None), run("unlike", UNLIKE, None)
    assert by_unlike.best_epoch != by_like.best_epoch  # or nothing is tested
    assert chosen.best_epoch == by_like.best_epoch
    assert chosen.phase2_history == by_like.phase2_history
    assert chosen.dev_ppl == by_like.val_ppl
    assert same(chosen, by_like)
    # What it is judged by is what validation says of that epoch, by conversation, too.
    judged = by_unlike.phase2_history[(chosen.best_epoch or 0) - 1]
    assert chosen.val_ppl == pytest.approx(judged["val_ppl"], rel=1e-6)
    assert chosen.val_acc == judged["val_acc"]
    assert len(chosen.val_conversations) == len(UNLIKE)
    assert sum(row["tokens"] for row in chosen.val_conversations) == chosen.val_tokens - 1
    assert by_like.dev_ppl is by_unlike.dev_ppl is None
    assert chosen.train_ppl == by_like.train_ppl

    # Other validation texts, and as many: nothing but the judgement changes.
    other = run("other", conversations(3, 9, letters="klmnop"), LIKE_TRAINING)
    assert same(other, chosen)
    assert (other.best_epoch, other.dev_ppl) == (chosen.best_epoch, chosen.dev_ppl)
    assert other.val_ppl != chosen.val_ppl


def test_a_result_of_development_is_stored_with_it(tiny: Experiment) -> None:
    one = tiny.replace(contexts="zero", selection="development", development_samples=3)
    ran, kept = cvfp.run(one, reuse=False), cvfp.run(one)
    assert kept.from_store
    assert kept == ran
    assert ran.dev_ppl == min(row["val_ppl"] for row in ran.phase2_history)
    assert ran.row()["dev_ppl"] == ran.dev_ppl
    assert ran.dev_ppl != ran.val_ppl


def test_products_are_as_they_were_after_development() -> None:
    """TF32 is for development's scores alone: not left on where one fails, and a setting that is
    inherited from the one above goes on to be."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        pytest.skip("a torch without this setting")
    products, above = backends.cuda.matmul, backends.fp32_precision
    try:
        for inherited in ("ieee", "tf32"):
            backends.fp32_precision = inherited
            assert products.fp32_precision == inherited
            with experiment._tf32(False):
                assert products.fp32_precision == inherited
            with pytest.raises(KeyError), experiment._tf32(True):
                raise KeyError(products.fp32_precision)
            assert products.fp32_precision == inherited
        products.fp32_precision = "ieee"  # of its own
        with experiment._tf32(True):
            assert products.fp32_precision == "tf32"
        assert products.fp32_precision == "ieee"
    finally:
        backends.fp32_precision = above
        products.fp32_precision = "none"


def test_a_model_that_is_not_stored_is_trained_again(tiny: Experiment) -> None:
    ran = cvfp.run(tiny.replace(contexts="zero", seed=77))
    again = experiment.with_model(ran)
    assert again is ran
    trained = {name: p.clone() for name, p in ran.model().state_dict().items()}
    for path in (cvfp.cache.home() / "models").glob(f"{ran.key}*"):
        cvfp.cache.delete(path)
    alone = Result.from_dict(ran.to_dict())
    with pytest.raises(FileNotFoundError):
        alone.model()
    made = experiment.with_model(alone)
    assert made.val_ppl == ran.val_ppl
    assert all(torch.equal(p, trained[name]) for name, p in made.model().state_dict().items())
