from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvfp import Experiment, ParameterError, cache, config, sweep
from cvfp.config import PRESETS

BAD = [
    ("samples", "many", "an integer"),
    ("samples", 2.0, "an integer"),
    ("samples", True, "an integer"),
    ("samples", None, "an integer"),
    ("samples", 0, "at least 1"),
    ("samples", -5, "at least 1"),
    ("seed", -1, "at least 0"),
    ("context_dim", 1, "at least 2"),
    ("vocab_size", 256, "at least 257"),
    ("vocab_size", 4096.0, "an integer or None"),
    ("phase1_max_iterations", 1, "at least 2"),
    ("dist_reg_weight", 1.5, "at most 1"),
    ("dist_reg_weight", -0.1, "at least 0"),
    ("dist_reg_weight", False, "a number"),
    ("phase2_learning_rate", 0.0, "above 0"),
    ("phase2_learning_rate", "fast", "a number"),
    ("phase2_learning_rate", float("nan"), "above 0"),
    ("phase2_learning_rate", float("inf"), "above 0"),
    ("convergence_rate", 1.01, "at most 1"),
    ("phase1_noise", float("nan"), "at least 0"),
    ("weight_tying", 1, "True or False"),
    ("freeze_embedding", "yes", "True or False"),
    ("validation", "heldout", "'held_out' or 'tail'"),
    ("training_contexts", "sequential", "'parallel' or 'exact'"),
    ("precision", "float16", "'auto' or 'float32' or 'bfloat16'"),
    ("device", "gpu", "'auto' or 'cpu' or 'cuda' or 'mps'"),
    ("dataset", " ", "not empty"),
    ("tokenizer", "", "not empty"),
    ("column", 3, "text or None"),
    ("selection", "tail", "'validation' or 'development'"),
    ("development_samples", 0, "at least 1"),
    ("weight_decay", -0.1, "at least 0"),
    ("weight_decay", 10.5, "at most 10"),
    ("dropout", -0.1, "at least 0"),
    ("dropout", 1.0, "at most 0.9"),
]


def assert_names(error: ParameterError, parameter: str, value: object, accepted: str) -> None:
    assert error.parameter == parameter
    assert str(error).startswith(f"{parameter}: got {value!r}; accepted: ")
    assert accepted in str(error)


@pytest.mark.parametrize(("parameter", "value", "accepted"), BAD)
def test_bad_value_names_parameter_value_and_accepted(
    parameter: str, value: Any, accepted: str
) -> None:
    for make in (Experiment, Experiment().replace):
        with pytest.raises(ParameterError) as caught:
            make(**{parameter: value})
        assert_names(caught.value, parameter, value, accepted)


@pytest.mark.parametrize(
    "make",
    [Experiment, Experiment.preset, Experiment().replace],
    ids=["class", "preset", "replace"],
)
def test_unknown_field_is_named(make: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        make(sample=3)
    assert_names(caught.value, "sample", "an unknown field", "samples")


def test_unknown_field_of_a_sweep_is_named() -> None:
    with pytest.raises(ParameterError, match=r"^sample: got 'an unknown field'; .*samples"):
        sweep(Experiment(), sample=[3])


def test_float_takes_an_int_but_not_one_beyond_floats() -> None:
    made = Experiment(phase1_noise=0)
    assert type(made.phase1_noise) is float
    with pytest.raises(ParameterError, match=r"^phase2_learning_rate: "):
        Experiment(phase2_learning_rate=10**400)


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("samples", np.int64(50), 50),
        ("seed", np.uint8(3), 3),
        ("vocab_size", np.int32(512), 512),
        ("phase1_noise", np.float64(0.25), 0.25),
        ("phase1_noise", np.float32(0.25), 0.25),
        ("phase1_noise", np.int64(1), 1.0),
        ("weight_tying", np.bool_(False), False),
        ("dataset", Path("a") / "b.jsonl", str(Path("a") / "b.jsonl")),
        ("column", np.str_("text"), "text"),
        ("validation", np.str_("tail"), "tail"),
    ],
)
def test_numpy_values_and_paths_become_plain_and_change_no_key(
    field: str, given: Any, value: Any
) -> None:
    wanted = Experiment(**{field: value})
    for make in (Experiment, Experiment.preset, Experiment().replace):
        made = make(**{field: given})
        assert type(getattr(made, field)) is type(value)
        assert made == wanted
        assert cache.digest(made.key_fields()) == cache.digest(wanted.key_fields())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", np.float64(2)),
        ("samples", np.bool_(True)),
        ("samples", np.int64(0)),
        ("samples", np.array(3)),
        ("phase2_learning_rate", np.float32("nan")),
        ("weight_tying", np.int64(1)),
        ("samples", Path("5")),
    ],
)
def test_numpy_values_are_refused_where_plain_ones_are(field: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"^{field}: got "):
        Experiment(**{field: value})


@pytest.mark.parametrize("field", ["objective", "samples", "validation", "weight_tying"])
@pytest.mark.parametrize("end", ["", ":f"])
def test_a_long_value_is_shortened_in_the_message(field: str, end: str) -> None:
    value = "x" * 100_000 + end
    with pytest.raises(ParameterError) as caught:
        Experiment(**{field: value})
    assert caught.value.value == value
    assert str(caught.value).startswith(f"{field}: got 'xxx")
    assert f"({len(value) + 2:,} characters)" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("samples", "500", 500),
        ("samples", " 50 ", 50),
        ("seed", "0", 0),
        ("phase2_learning_rate", "1e-3", 0.001),
        ("phase2_learning_rate", "1", 1.0),
        ("weight_tying", "false", False),
        ("weight_tying", "True", True),
        ("column", "none", None),
        ("column", "text", "text"),
        ("dataset_config", "None", None),
        ("vocab_size", "512", 512),
        ("tokenizer", "500", "500"),
        ("validation", "tail", "tail"),
    ],
)
def test_preset_parses_text(field: str, text: str, value: object) -> None:
    parsed = getattr(Experiment.preset(**{field: text}), field)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("samples", "2.5"),
        ("samples", "1e3"),
        ("samples", "true"),
        ("samples", "[1]"),
        ("samples", "{[]}"),
        ("samples", "none"),
        ("weight_tying", "1"),
        ("phase2_learning_rate", "nan"),
        ("vocab_size", "none"),
        ("embedding_dim", "none"),
    ],
)
def test_preset_refuses_text_that_spells_no_value(field: str, text: str) -> None:
    with pytest.raises(ParameterError, match=f"^{field}: "):
        Experiment.preset(**{field: text})


@given(st.text(max_size=12))
def test_any_text_is_parsed_or_refused_by_name(text: str) -> None:
    try:
        outcome: object = Experiment.preset(samples=text).samples
    except ParameterError as error:
        outcome = error.parameter
    assert type(outcome) is int or outcome == "samples"


def test_mini_is_the_default_and_none_leaves_the_presets_value() -> None:
    assert Experiment.preset("mini") == Experiment() == Experiment.preset()
    published = Experiment.preset("published", samples=None, vocab_size=None, num_layers=3)
    assert published == Experiment.preset("published").replace(num_layers=3)


def test_published_is_as_the_notes_say() -> None:
    published = Experiment.preset("published")
    assert (published.dataset, published.train_split, published.validation_split) == (
        "HuggingFaceH4/ultrachat_200k",
        "train_sft",
        "test_sft",
    )
    assert (published.tokenizer, published.embedding) == ("gpt2", "gpt2")
    assert (published.num_layers, published.context_dim, published.num_input_tokens) == (6, 768, 1)
    assert (published.validation, published.dist_reg_weight) == ("tail", 0.8)
    assert (published.phase1_learning_rate, published.phase2_learning_rate) == (0.002, 0.001)
    assert (published.phase1_max_iterations, published.phase1_min_iterations) == (40, 5)
    assert (published.phase2_epochs, published.phase2_patience) == (10, 1)
    assert published.token_input_all_layers
    assert not published.weight_tying
    assert not published.phase2_shuffle
    assert published.training_contexts == "parallel"


# docs/method.md, *Settings*: equal decrease, L, D, n, tied head, w, rates 1 and 2, most iterations,
# patience, validation.
NOTES: dict[str, tuple[Any, ...]] = {
    "note000": (True, 6, 768, 1, False, 0.8, 0.002, 0.001, 40, 1, "tail"),
    "note001": (True, 6, 768, 1, False, 0.8, 0.002, 0.001, 40, 1, "tail"),
    "note002": (False, 6, 768, 1, False, 0.8, 0.002, 0.001, 40, 1, "tail"),
    "published": (False, 6, 768, 1, False, 0.8, 0.002, 0.001, 40, 1, "tail"),
    "note003_deep": (False, 6, 768, 2, True, 0.8, 0.002, 0.002, 10, 2, "held_out"),
    "note003_wide": (False, 3, 1536, 2, True, 0.8, 0.002, 0.002, 10, 2, "held_out"),
    "note004_v1": (False, 1, 768, 1, True, 0.8, 0.002, 0.001, 40, 1, "held_out"),
    "note004_v2": (False, 1, 768, 1, True, 0.9, 0.002, 0.001, 60, 1, "held_out"),
    "note004_v3": (False, 1, 768, 2, True, 0.9, 0.002, 0.001, 60, 1, "held_out"),
    "note004_v4": (False, 1, 1085, 1, True, 0.9, 0.002, 0.001, 60, 1, "held_out"),
    "published_size": (False, 6, 768, 1, False, 0.8, 0.002, 0.0003, 40, 2, "held_out"),
    "mini": (False, 3, 128, 1, True, 0.8, 0.002, 0.003, 40, 2, "held_out"),
    "remember": (False, 3, 128, 1, True, 0.8, 0.0005, 0.003, 31, 2, "held_out"),
    "remember_published_size": (False, 6, 768, 1, False, 0.8, 0.0005, 0.0003, 31, 2, "held_out"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_rows_of_the_notes_settings(name: str) -> None:
    one = Experiment.preset(name)
    shape = (not one.token_input_all_layers, one.num_layers, one.context_dim, one.num_input_tokens)
    rates = one.phase1_learning_rate, one.phase2_learning_rate
    ends = one.phase1_max_iterations, one.phase2_patience, one.validation
    assert (*shape, one.weight_tying, one.dist_reg_weight, *rates, *ends) == NOTES[name]
    remembers = name.startswith("remember")
    objective = "remember" if remembers else "published"
    assert (one.objective, one.contexts, one.model) == (objective, "trained", "cvfp")
    assert (one.freeze_embedding, one.phase1_abort, one.seed) == (True, False, 42)
    regime = one.phase1_step, one.phase1_decay, one.phase1_stop, one.phase1_noise
    own = "group", "linear", "never", 0.0
    assert regime == (own if remembers else ("sweep", "none", "converged", 0.1))
    assert one.training_contexts == ("exact" if remembers else "parallel")
    development = name.endswith("published_size")
    assert (one.selection == "development") == development
    assert one.phase2_epochs == (40 if development else 10)
    assert one.convergence_rate == (0.979 if name.startswith("note003") else 0.99)
    assert (one.weight_decay, one.dropout) == (0.0, 0.0)
    if name in ("mini", "published", "remember"):
        return
    assert one.phase2_shuffle == development
    # GPT-2's tokens and a table of its width, on whatever corpus is installed; a bigram table,
    # fitted as a language model, only for a head that is tied to it.
    tables = ("bigram" if one.weight_tying else "ppmi", 768)
    assert (one.tokenizer, one.vocab_size) == ("gpt2-bpe", None)
    assert (one.embedding, one.embedding_dim) == tables
    assert (one.dataset, one.phase2_batch_size, one.validation_samples) == ("chitchat", 4096, 50)
    assert one.samples == (1000 if name.startswith("note003") else 500)
    assert {"samples", "validation_samples", "fitting_samples"} <= one.left_alone
    assert one.replace(dataset="news").embedding == one.embedding


NEW_FIELDS = {
    "selection": "development",
    "development_samples": 100,
    "weight_decay": 0.1,
    "dropout": 0.1,
}


@pytest.mark.parametrize(("field", "value"), NEW_FIELDS.items())
def test_fields_that_came_later_leave_the_keys_of_stored_runs(field: str, value: Any) -> None:
    plain = Experiment().key_fields()
    assert not NEW_FIELDS.keys() & plain.keys()
    assert Experiment(**{field: value}).key_fields() == plain | {field: value}


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ParameterError) as caught:
        Experiment.preset("big")
    assert_names(caught.value, "preset", "big", "'mini' or 'published'")


def test_describe_has_every_field_and_both_presets_values() -> None:
    rows = {row["field"]: row for row in Experiment.describe()}
    for preset in ("mini", "published"):
        assert {name: row[preset] for name, row in rows.items()} == (
            Experiment.preset(preset).to_dict()
        )
    assert all(row["description"] for row in rows.values())


def test_stages_split_the_fields() -> None:
    made = Experiment()
    parts = [made.to_dict(stage) for stage in ("data", "context", "phase1", "phase2", "run")]
    assert sum(map(len, parts)) == len(made.to_dict())
    assert made.to_dict("context", "run") == parts[1] | parts[4]


def test_parameter_error_survives_pickle() -> None:
    error = ParameterError("samples", 3000, "at most 2999")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ParameterError
    assert str(copy) == str(error)
    assert (copy.parameter, copy.value, copy.accepted) == ("samples", 3000, "at most 2999")


def test_resolved_refuses_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ParameterError) as caught:
        Experiment(device="cuda").resolved()
    assert_names(caught.value, "device", "cuda", "'auto' or 'cpu'")
    assert Experiment().resolved().device == "cpu"


def test_auto_device_prefers_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config.resolve_device("auto") == "cuda"
    assert config.resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert config.resolve_device("auto") == "mps"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize(
    ("gain", "precision"),
    [(3.9, "bfloat16"), (1.3, "bfloat16"), (1.2, "float32"), (0.1, "float32")],
)
def test_auto_precision_is_that_of_the_faster_products(
    monkeypatch: pytest.MonkeyPatch, gain: float, precision: str, device: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(config.ops, "bfloat16_gain", lambda device: asked.append(device) or gain)
    assert config.resolve_precision("auto", device) == precision
    assert asked == [device]
    for chosen in ("float32", "bfloat16"):
        assert config.resolve_precision(chosen, device) == chosen
    assert asked == [device]


def test_resolved_leaves_no_auto_and_changes_nothing_else() -> None:
    resolved = Experiment(seed=7).resolved()
    assert "auto" not in (resolved.device, resolved.precision)
    assert resolved == Experiment(seed=7, device=resolved.device, precision=resolved.precision)
