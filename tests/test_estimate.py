"""What a run needs is estimated before it trains, and what cannot fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cvfp
from cvfp import Experiment, ParameterError, build, controls, estimate
from cvfp.ops import placement

GIB = 2**30


def has(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(placement, "memory", lambda device: int(size * GIB))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_layers": 6, "context_dim": 768, "embedding_dim": 768, "vocab_size": 50257},
        {"num_layers": 3, "context_dim": 1536, "num_input_tokens": 2},
        {"token_input_all_layers": False, "num_layers": 6},
        {"contexts": "window"},
    ],
)
def test_weights_are_counted_nearly(fields: dict[str, Any]) -> None:
    experiment = Experiment(**fields)
    assert experiment.embedding_dim is not None
    context, token = estimate._blocks(experiment, experiment.embedding_dim)
    with torch.device("meta"):
        model = build._blank(experiment, torch.empty(10, experiment.embedding_dim))
    assert context == pytest.approx(controls.count_parameters(model.context_block), rel=0.15)
    assert token == pytest.approx(controls.count_parameters(model.token_block), rel=0.15)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 10**7, "embedding_dim": 10_000}, "vocab_size"),
        ({"context_dim": 100_000}, "context_dim"),
        ({"embedding_dim": 100_000}, "embedding_dim"),
        ({"num_layers": 1000, "context_dim": 2000}, "num_layers"),
        ({"context_dim": 50_000, "num_input_tokens": 1000}, "context_dim"),
        ({"contexts": "window", "window_tokens": 100_000, "embedding_dim": 1000}, "window_tokens"),
    ],
)
def test_what_cannot_fit_is_refused_before_any_work(
    fields: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, 16)
    monkeypatch.setattr(cvfp.data, "load", lambda experiment: pytest.fail("data were read"))
    experiment = Experiment(**fields)
    with pytest.raises(ParameterError, match=rf"{named}.* of at most about .*GiB, this cpu has 16"):
        cvfp.run(experiment.replace(device="cpu"))


def test_what_is_named_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 16)
    experiment = Experiment(embedding_dim=50_000, num_input_tokens=20, device="cpu")
    with pytest.raises(ParameterError) as refused:
        estimate.check(experiment, 4096, 50_000, 10**5)
    name = refused.value.parameter
    words = refused.value.accepted.split(" or ")
    assert 1 <= len(words) <= 3
    for one in words:
        name, _, value = one.partition(" (")[0].partition(" of at most about ")
        size = int(value.replace(",", ""))
        changed = experiment.replace(**{name: size})
        estimate.check(changed, 4096, size if name == "embedding_dim" else 50_000, 10**5)


def test_a_table_whose_size_is_known_later_counts(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny.vocab_size is not None
    assert tiny.embedding_dim is not None
    needed = estimate.memory(tiny, tiny.vocab_size, tiny.embedding_dim, 10**4)
    has(monkeypatch, (needed + 1) / GIB)
    estimate.check(tiny, tiny.vocab_size, tiny.embedding_dim, 10**4)
    with pytest.raises(ParameterError, match="vocab_size of at most about"):
        estimate.check(tiny, 40 * tiny.vocab_size, tiny.embedding_dim, 10**4)


def test_real_sizes_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 14)
    published = Experiment.preset("published", device="cpu")
    estimate.check(published, 50_257, 768, 10**8)
    estimate.check(published.replace(num_layers=3, context_dim=1536), 50_257, 768, 10**8)
    has(monkeypatch, 1)
    estimate.check(Experiment(device="cpu"), 4096, 128, 10**8)


def test_a_container_has_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    whole = placement.memory(cpu)
    monkeypatch.setattr(placement.Path, "read_text", lambda path: "max\n")
    assert placement.memory(cpu) >= whole
    monkeypatch.setattr(placement.Path, "read_text", lambda path: f"{GIB}\n")
    assert placement.memory(cpu) == GIB


def test_batches_and_groups_are_no_longer_than_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 4)
    whole = Experiment(device="cpu", phase2_batch_size=10**9, loss_group=10**9)
    estimate.check(whole, 4096, 128, 13_000)
    with pytest.raises(ParameterError, match="phase2_batch_size of at most about"):
        estimate.check(whole.replace(loss_group=8000), 4096, 128, 10**6)


# Time: proportions only.


def seconds(monkeypatch: pytest.MonkeyPatch, tokens: int = 10**5, **fields: Any) -> float:
    monkeypatch.setattr(estimate.ops, "product_rate", lambda device, dtype: 1e10)
    one = Experiment(device="cpu", precision="float32").replace(**fields)
    return estimate.seconds(one, 4096, 128, tokens)


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"phase2_epochs": 20}, 1.5),
        ({"num_layers": 6}, 1.2),
        ({"context_dim": 512}, 1.5),
        ({"phase1_max_iterations": 80}, 1.2),
    ],
)
def test_seconds_grow_with_what_there_is_to_do(
    fields: dict[str, Any], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = seconds(monkeypatch)
    assert least < seconds(monkeypatch, **fields) / plain < 20
    assert seconds(monkeypatch, tokens=3 * 10**5) == pytest.approx(3 * plain)


def test_seconds_are_those_of_both_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phase 1 costs iterations, Phase 2 epochs, each by itself and in proportion."""
    both = seconds(monkeypatch)
    assert seconds(monkeypatch, contexts="random") < seconds(monkeypatch, contexts="shuffled")
    assert seconds(monkeypatch, contexts="shuffled") == both
    one, two, three = (seconds(monkeypatch, phase1_max_iterations=n) for n in (2, 12, 22))
    assert three - two == pytest.approx(two - one)
    one, two, three = (seconds(monkeypatch, phase2_epochs=n) for n in (1, 11, 21))
    assert three - two == pytest.approx(two - one)
    half = seconds(monkeypatch, contexts="random", phase2_epochs=20)
    monkeypatch.setattr(estimate.ops, "product_rate", lambda device, dtype: 2e10)
    twice = Experiment(device="cpu", precision="float32", contexts="random", phase2_epochs=20)
    assert estimate.seconds(twice, 4096, 128, 10**5) == pytest.approx(half / 2)


def test_a_reader_is_told_of_long_training_alone(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(cvfp.experiment.progress, "tell", told.append)
    monkeypatch.setenv("CVFP_PROGRESS", "lines")
    for expected, words in ((119, []), (601, ["Training takes about 10 minutes, or less"])):
        monkeypatch.setattr(estimate, "seconds", lambda *given, expected=expected: expected)
        cvfp.run(tiny.replace(contexts="zero", phase2_epochs=1), reuse=False)
        assert told == words
    cvfp.run(tiny.replace(contexts="zero", phase2_epochs=1))  # from the store: nothing is trained
    assert len(told) == 1
    monkeypatch.setenv("CVFP_PROGRESS", "none")  # nor is this machine measured for nobody
    monkeypatch.delattr(estimate, "seconds")
    cvfp.run(tiny.replace(contexts="zero", phase2_epochs=1), reuse=False)
