from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvfp import Experiment, ParameterError, config, sweep
from cvfp.config import PRESETS, flag, integers, ladder, numbers, pair

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
    ("device", "gpu", "'auto', 'cpu', 'cuda' or 'mps'"),
    ("dataset", " ", "not empty"),
    ("tokenizer", "", "not empty"),
    ("column", 3, "text or None"),
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


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ParameterError) as caught:
        Experiment.preset("big")
    assert_names(caught.value, "preset", "big", "'mini' or 'published'")


def test_describe_has_every_field_and_both_presets_values() -> None:
    rows = {row["field"]: row for row in Experiment.describe()}
    for preset in PRESETS:
        assert {name: row[preset] for name, row in rows.items()} == (
            Experiment.preset(preset).to_dict()
        )
    assert all(row["description"] for row in rows.values())


def test_stages_split_the_fields() -> None:
    made = Experiment()
    parts = [made.to_dict(stage) for stage in ("data", "context", "phase1", "phase2", "run")]
    assert sum(map(len, parts)) == len(made.to_dict())
    assert made.to_dict("context", "run") == parts[1] | parts[4]


@pytest.mark.parametrize(
    ("cap", "rungs"),
    [
        (200, [50, 100, 200]),
        (300, [50, 100, 200, 300]),
        (2000, [50, 100, 200, 500, 1000, 2000]),
        (51, [50, 51]),
        ("200", [50, 100, 200]),
    ],
)
def test_ladder(cap: object, rungs: list[int]) -> None:
    assert ladder(cap) == rungs


@pytest.mark.parametrize("cap", [30, 50, 0, -1, "x", [100, 200], "100,200", 200.5, True, None])
def test_ladder_refuses_what_is_not_one_size_above_50(cap: object) -> None:
    with pytest.raises(ParameterError, match=r"^samples: "):
        ladder(cap)


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (3, [3]),
        ("3", [3]),
        ([0, 1, 2], [0, 1, 2]),
        ((2, 0), [2, 0]),
        (range(3), [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("[0, 1, 2]", [0, 1, 2]),
        ("(0, 1)", [0, 1]),
        (["4", 5], [4, 5]),
    ],
)
def test_integers(value: object, numbers: list[int]) -> None:
    assert integers("seeds", value) == numbers


@pytest.mark.parametrize(
    "value",
    [[], "", "a", "1,a", [1, 1], "2,2", -1, 1.5, "1.5", True, [True], None, {"a": 1}, [[1]]],
)
def test_integers_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError) as caught:
        integers("seeds", value)
    assert_names(caught.value, "seeds", value, "an integer of at least 0")


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.1, [0.1]), ("0.1", [0.1]), ("0.001,0.003", [0.001, 0.003]), ([1, 0.5], [1.0, 0.5])],
)
def test_numbers(value: object, found: list[float]) -> None:
    assert numbers("rates", value) == found


@pytest.mark.parametrize("value", ["", [], "0.1,0.1", "a", -1, 0, float("nan"), True, "inf", None])
def test_numbers_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError, match=r"rates: got .* accepted: a number above 0"):
        numbers("rates", value)


@pytest.mark.parametrize("value", ["6,768", "(6, 768)", (6, 768), [6, 768]])
def test_pair(value: object) -> None:
    assert pair("deep", value) == (6, 768)
    assert pair("deep", "64,64") == (64, 64)


@pytest.mark.parametrize("value", ["6", "6,7,8", "0,5", "a,b", 6, None, (6.5, 7), [True, 2], ""])
def test_pair_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError, match=r"deep: got .* accepted: two integers of at least 1"):
        pair("deep", value)


@pytest.mark.parametrize(
    ("value", "found"), [(True, True), ("true", True), ("False", False), (False, False)]
)
def test_flag(value: object, found: bool) -> None:
    assert flag("full", value) is found


@pytest.mark.parametrize("value", ["yes", 1, 0, None, ""])
def test_flag_refuses_and_names(value: object) -> None:
    with pytest.raises(ParameterError, match=r"full: got .* accepted: true or false"):
        flag("full", value)


def test_integers_has_a_lower_limit() -> None:
    assert integers("sizes", [5], low=5) == [5]
    with pytest.raises(ParameterError, match="at least 5"):
        integers("sizes", [4], low=5)


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


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "float32"), ({}, "float32")],
)
def test_auto_precision_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(config, "cpu_capabilities", lambda: capabilities)
    assert config.resolve_precision("auto", "cpu") == precision
    assert config.resolve_precision("auto", "mps") == "float32"
    for chosen in ("float32", "bfloat16"):
        assert config.resolve_precision(chosen, "cpu") == chosen


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert config.resolve_precision("auto", "cuda") == ("bfloat16" if native else "float32")
    assert asked == [False]


def test_resolved_leaves_no_auto_and_changes_nothing_else() -> None:
    resolved = Experiment(seed=7).resolved()
    assert "auto" not in (resolved.device, resolved.precision)
    assert resolved == Experiment(seed=7, device=resolved.device, precision=resolved.precision)
