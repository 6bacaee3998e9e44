from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from conftest import lively_model, tiny_experiment
from torch import Tensor

import cvfp
from cvfp import (
    Experiment,
    ParameterError,
    Result,
    Results,
    abort,
    contexts,
    data,
    phase2,
    sweep,
)
from cvfp.corpora import load_corpus
from cvfp.model import CVFP
from cvfp.recurrence import diagnose
from cvfp.result import column_docs


def assert_sound(result: Result) -> None:
    """What holds of every run."""
    experiment = result.experiment
    assert math.isfinite(result.val_ppl)
    assert 0 <= result.val_acc <= 1
    assert 1 < result.val_bpb < 16
    for rank, spectrum in (
        (result.train_er, result.train_spectrum),
        (result.val_er, result.val_spectrum),
    ):
        assert 1 / experiment.context_dim <= rank <= 1
        assert len(spectrum) == experiment.context_dim
        assert spectrum == sorted(spectrum, reverse=True)
    assert len(result.phase1_history) == result.phase1_iterations - 1
    assert result.phase1_history[-1]["converged"] == result.converged
    best = min(result.phase2_history, key=lambda row: row["val_loss"])
    assert best["epoch"] == result.best_epoch
    assert best["val_ppl"] == result.val_ppl
    assert best["train_ppl"] == pytest.approx(result.train_ppl)
    sums = {
        name: sum(row[name] for row in result.val_conversations)
        for name in ("tokens", "nats", "correct")
    }
    assert sums["tokens"] == result.val_tokens - 1
    assert math.exp(sums["nats"] / sums["tokens"]) == pytest.approx(result.val_ppl)
    assert sums["correct"] / sums["tokens"] == pytest.approx(result.val_acc)
    assert result.baselines["unigram"] is not None
    assert result.baselines["kneser_ney"] is not None


@pytest.mark.parametrize("validation", ["tail", "held_out"])
def test_published_preset_end_to_end(
    validation: str,
    gpt2_folder: Path,
    ultrachat_folder: Path,
    conversations: list[list[dict[str, str]]],
) -> None:
    result = cvfp.run(
        tiny_experiment(
            "published",
            dataset=str(ultrachat_folder),
            tokenizer=str(gpt2_folder),
            embedding=str(gpt2_folder),
            validation=validation,
            context_dim=32,
            samples=8,
            phase1_max_iterations=8,
            phase2_batch_size=256,
        )
    )
    assert_sound(result)
    assert (result.vocab_size, result.embedding_dim) == (50257, 32)
    assert result.parameters["head"] == 50257 * 33
    tokenizer = result.model().tokenizer
    assert tokenizer is not None
    texts = ["\n".join(m["content"] for m in messages) for messages in conversations]
    total = len(tokenizer.encode(texts[:8]).tokens)
    if validation == "tail":
        assert result.val_tokens == total // 10
        assert result.train_tokens == total - total // 10
    else:
        assert result.train_tokens == total
        assert result.val_tokens == len(tokenizer.encode(texts[60:63]).tokens)
        assert len(result.val_conversations) == 3
    # Nothing was fitted, so there is nothing to compare with.
    assert result.baselines["table"] is None
    assert result.baselines["kneser_ney_both"] is None
    row = result.row()
    assert row["table_ppl"] is None
    assert row["kneser_ney_both_bpb"] is None
    # The head starts at zero, so the first loss is that of the uniform distribution.
    assert result.val_ppl < 50257


# Six two-valued fields in eight runs that hold every pair of values.
FACTORS: dict[str, tuple[Any, Any]] = dict(
    token_input_all_layers=(True, False),
    num_input_tokens=(1, 2),
    weight_tying=(True, False),
    freeze_embedding=(True, False),
    training_contexts=("parallel", "exact"),
    phase2_shuffle=(True, False),
)
COMBINATIONS = [
    {
        name: values[bit]
        for (name, values), bit in zip(FACTORS.items(), (a, b, c, a ^ b, a ^ c, b ^ c), strict=True)
    }
    for a, b, c in itertools.product((0, 1), repeat=3)
]


def test_combinations_hold_every_pair() -> None:
    for one, two in itertools.combinations(FACTORS, 2):
        pairs = {(c[one], c[two]) for c in COMBINATIONS}
        assert pairs == set(itertools.product(FACTORS[one], FACTORS[two]))


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda c: "-".join(map(str, c.values())))
def test_every_pair_of_settings_runs(changes: dict[str, Any]) -> None:
    experiment = tiny_experiment(samples=3, validation_samples=2, **changes)
    result = cvfp.run(experiment)
    assert_sound(result)
    model = result.model()
    table = cvfp.embeddings.load(experiment, data.load(experiment)).weight
    assert torch.equal(model.embedding, table) == experiment.freeze_embedding
    assert (model.head is None) == experiment.weight_tying
    assert result.parameters["head"] == (0 if experiment.weight_tying else 400 * 17)
    # Its contexts are fixed points over the table that Phase 1 read.
    rows = model.context_inputs(torch.arange(400)).table[:400]
    torch.testing.assert_close(rows, torch.nn.functional.layer_norm(table, (16,)))
    # Phase 2 makes something of what it sees.
    losses = [row["train_loss"] for row in result.phase2_history]
    assert losses[1] < losses[0]


def test_random_table_has_no_baseline(tiny: Experiment) -> None:
    result = cvfp.run(tiny.replace(embedding="random", embedding_dim=24))
    assert_sound(result)
    assert result.embedding_dim == 24
    assert result.baselines["table"] is None
    assert result.baselines["kneser_ney_both"] is not None  # the tokeniser was fitted


def test_fitted_table_stands_beside_the_run(tiny: Experiment) -> None:
    result = cvfp.run(tiny)
    made = data.load(tiny)
    bigram = cvfp.embeddings.load(tiny, made).bigram
    assert bigram is not None
    nats = float(bigram.nats(made.validation.tokens).mean())
    assert result.baselines["table"] is not None
    assert result.baselines["table"]["ppl"] == pytest.approx(math.exp(nats))
    texts = "".join(load_corpus(tiny).validation)
    first = int(made.validation.text_bytes[0])
    total_bytes = len(texts.encode()) - first
    per_byte = nats * (result.val_tokens - 1) / math.log(2) / total_bytes
    assert result.baselines["table"]["bpb"] == pytest.approx(per_byte)
    bits = math.log2(result.val_ppl) * (result.val_tokens - 1)
    assert result.val_bpb == pytest.approx(bits / total_bytes)


def test_conversations_are_counted_apart(tiny: Experiment) -> None:
    result = cvfp.run(tiny)
    stream = data.load(tiny).validation
    lengths = [len(piece) for piece in stream.tokens.tensor_split(stream.starts[1:])]
    lengths[0] -= 1  # the first token is not predicted
    assert [row["tokens"] for row in result.val_conversations] == lengths


def test_training_contexts_are_what_is_asked_for(tiny: Experiment) -> None:
    parallel, exact = (
        cvfp.run(tiny.replace(training_contexts=which)) for which in ("parallel", "exact")
    )
    assert exact.phase1_history == parallel.phase1_history
    assert exact.val_spectrum == parallel.val_spectrum
    assert exact.phase2_history != parallel.phase2_history


def test_order_of_batches_is_what_is_asked_for(tiny: Experiment) -> None:
    shuffled, stream = (cvfp.run(tiny.replace(phase2_shuffle=which)) for which in (True, False))
    assert stream.phase1_history == shuffled.phase1_history
    assert stream.phase2_history != shuffled.phase2_history


def test_extreme_learning_rate_ends_in_a_record_or_in_a_named_cause(
    home: Path, tiny: Experiment
) -> None:
    # Finite losses over 700 nats have no finite perplexity.
    try:
        result = cvfp.run(tiny.replace(phase2_learning_rate=1e4, embedding="random"))
    except FloatingPointError as error:
        message = str(error)
    else:
        message = "phase2_learning_rate"
        assert cvfp.run(result.experiment).from_store
    assert "phase2_learning_rate" in message


def test_sweep_keeps_the_grids_order(tiny: Experiment) -> None:
    small = tiny.replace(validation_samples=2, phase2_epochs=1)
    results = sweep(small, samples=[3, 2], seed=(1, 0))
    assert isinstance(results, Results)
    assert [(r.experiment.samples, r.experiment.seed) for r in results] == [
        (3, 1),
        (3, 0),
        (2, 1),
        (2, 0),
    ]
    for result in results:
        assert result.experiment.phase2_epochs == 1
        assert result.from_store is False
    frame = results.frame()
    assert frame["samples"].tolist() == [3, 3, 2, 2]
    assert frame["val_ppl"].tolist() == [r.val_ppl for r in results]
    # The same text for both seeds, and more of it for the larger size.
    assert frame["train_tokens"][0] == frame["train_tokens"][1] > frame["train_tokens"][2]
    again = sweep(small, samples=[3, 2], seed=[1, 0])
    assert all(result.from_store for result in again)


def test_sweep_side_by_side_equals_one_after_the_other(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tiny.replace(samples=3, validation_samples=2, phase2_epochs=1)
    # In the session's home: joblib's processes have the environment they were started with.
    apart = sweep(small, n_jobs=2, seed=[11, 12, 13])
    monkeypatch.setenv("CVFP_HOME", str(tmp_path))
    alone = sweep(small, seed=[11, 12, 13])
    for one, other in zip(apart, alone, strict=True):
        assert not one.from_store
        assert not other.from_store
        assert one.key == other.key
        assert one.experiment == other.experiment
        assert one.val_ppl == pytest.approx(other.val_ppl, rel=1e-4)
        assert one.train_er == pytest.approx(other.train_er, rel=1e-4)
        one.model()


@pytest.mark.parametrize("cores", [1, 2])
def test_n_jobs_counts_as_in_joblib(
    tiny: Experiment, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1: a process for each core; with one core, this process alone."""
    small = tiny.replace(samples=2, validation_samples=2, phase2_epochs=1)
    seeds = [20 + cores, 30 + cores]  # not in the store, which needs no process
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", str(cores))
    processes = joblib.effective_n_jobs(-1)
    assert processes <= cores
    asked: list[int] = []
    parallel = joblib.Parallel

    def spy(n_jobs: int, **options: Any) -> Any:
        asked.append(n_jobs)
        return parallel(n_jobs, **options)

    monkeypatch.setattr(joblib, "Parallel", spy)
    made = sweep(small, seed=seeds, n_jobs=-1)
    assert asked == ([] if processes == 1 else [processes])
    assert sweep(small, seed=seeds, n_jobs=-1) == made
    wanted = [cvfp.run(small.replace(seed=seed), reuse=False).val_ppl for seed in seeds]
    assert [result.val_ppl for result in made] == wanted


@pytest.mark.parametrize("n_jobs", [0, 1.0, "2", None, True, np.float64(1)])
def test_n_jobs_that_joblib_does_not_know_is_refused(tiny: Experiment, n_jobs: Any) -> None:
    with pytest.raises(ParameterError, match=r"^n_jobs: got .*-1 for all cores"):
        sweep(tiny, seed=[1], n_jobs=n_jobs)


@pytest.mark.parametrize(
    ("parameter", "grid"),
    [
        ("samples", dict(samples=[2, 3000])),
        ("seed", dict(seed=[0, -1])),
        ("sample", dict(sample=[2])),
        ("samples", dict(samples=2)),
        ("tokenizer", dict(tokenizer="bpe")),
        ("device", dict(device=["cpu", "mps"])),
        ("vocab_size", dict(vocab_size=[400, 100_000])),
        ("dataset", dict(dataset=["chitchat", "/no/such/file.jsonl"])),
        ("embedding", dict(embedding=["random", "/no/such/folder"])),
        ("n_jobs", dict(seed=[1], n_jobs=0)),
    ],
)
def test_errors_of_a_sweep_come_before_its_first_run(
    parameter: str, grid: dict[str, Any], home: Path, tiny: Experiment
) -> None:
    with pytest.raises(ParameterError) as caught:
        sweep(tiny.replace(samples=2, phase2_epochs=1), **grid)
    assert caught.value.parameter == parameter
    assert not (home / "runs").exists()


def test_embedding_of_a_wrong_width_stops_a_sweep_before_its_first_run(
    home: Path, tiny: Experiment, gpt2_folder: Path
) -> None:
    experiment = tiny.replace(embedding=str(gpt2_folder), samples=2, phase2_epochs=1)
    with pytest.raises(ParameterError) as caught:
        sweep(experiment, embedding_dim=[32, 16])
    assert caught.value.parameter == "embedding_dim"
    assert not (home / "runs").exists()


# Say what they hold by their names.
PLAIN = {"vocab_size", "phase1_from_store", "device_name"}


def test_every_column_is_documented(tiny: Experiment) -> None:
    frame = Results([cvfp.run(tiny), cvfp.run(tiny.replace(embedding="random"))]).frame()
    documented, fields = set(column_docs()), set(tiny.to_dict())
    assert set(frame.columns) - documented - fields <= PLAIN
    assert documented <= set(frame.columns)
    assert fields <= set(frame.columns)
    assert frame["table_ppl"].isna().tolist() == [False, True]
    assert frame["device"].tolist() == ["cpu", "cpu"]


VARIANTS: list[dict[str, Any]] = [
    dict(),
    dict(num_input_tokens=3),
    dict(token_input_all_layers=False, num_input_tokens=2),
    dict(weight_tying=False),
    dict(freeze_embedding=False, num_input_tokens=2),
]


def next_token(model: CVFP, tokens: list[int]) -> int:
    """The likeliest next token by Phase 2's evaluation on contexts made step by step."""
    stream = torch.tensor(tokens)
    made = cvfp.contexts.evaluate(
        model.context_block, model.context_inputs(stream), method="sequential"
    )
    positions = phase2.Positions(model, made.values, stream)
    with torch.no_grad():
        last = torch.tensor([len(tokens) - 1])
        hidden = positions.hidden(
            last, positions.outputs(last, positions.previous(last)), positions.token_inputs()
        )
        logits = model.logits(hidden)
    return int(logits.argmax())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_greedy_text_follows_phase2s_logits(tiny: Experiment, changes: dict[str, Any]) -> None:
    model = lively_model(tiny, **changes)
    assert model.tokenizer is not None
    seen: set[int] = set()
    for prompt in ("hello there", "a", "what?", "I like tea.\n", "no 1 knows", "東京"):
        tokens = model.tokenizer.encode([prompt]).tokens.tolist()
        start = len(tokens)
        for _ in range(6):
            tokens.append(next_token(model, tokens))
        seen |= set(tokens[start:])
        assert cvfp.generate(model, prompt, 6, temperature=0) == model.tokenizer.decode(tokens)
    assert len(seen) > 5


def test_state_stays_one_context_and_n_tokens(tiny: Experiment) -> None:
    model = lively_model(tiny, num_input_tokens=2)
    shapes: list[tuple[tuple[int, ...], ...]] = []

    def note(module: Any, arguments: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(tuple(a.shape) for a in arguments))

    model.context_block.register_forward_pre_hook(note)
    assert model.tokenizer is not None
    prompt = "how are you today?"
    length = len(model.tokenizer.encode([prompt]).tokens)
    cvfp.generate(model, prompt, 30)
    assert set(shapes) == {((1, 16), (1, 32))}
    assert len(shapes) == length + 29


def test_sampling_is_the_seeds_and_the_temperatures(tiny: Experiment) -> None:
    model = lively_model(tiny)
    text = cvfp.generate(model, "hello", 20, seed=1)
    assert text.startswith("hello")
    assert cvfp.generate(model, "hello", 20, seed=1) == text
    assert cvfp.generate(model, "hello", 20, seed=2) != text
    cold = cvfp.generate(model, "hello", 20, temperature=1e-4, seed=1)
    assert cold == cvfp.generate(model, "hello", 20, temperature=0, seed=2) != text


def test_sampling_leaves_the_global_generator_alone(tiny: Experiment) -> None:
    model = lively_model(tiny)
    before = torch.random.get_rng_state()
    cvfp.generate(model, "hello", 5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("prompt", dict(prompt="")),
        ("max_new_tokens", dict(prompt="a", max_new_tokens=0)),
        ("temperature", dict(prompt="a", temperature=-1.0)),
        ("temperature", dict(prompt="a", temperature=float("nan"))),
        ("temperature", dict(prompt="a", temperature=float("inf"))),
    ],
)
def test_bad_arguments_of_generate_are_named(
    tiny: Experiment, name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got "):
        cvfp.generate(lively_model(tiny), **arguments)


def test_generate_needs_a_tokeniser(tiny: Experiment) -> None:
    model = lively_model(tiny)
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"^tokenizer: got None"):
        cvfp.generate(model, "hello")


def test_an_aborted_run_has_no_perplexity_and_is_another_run(tiny: Experiment) -> None:
    # So much noise that nothing converges: note 004's rules give such a Phase 1 up.
    hopeless = tiny.replace(phase1_noise=3.0, phase1_max_iterations=25)
    full = cvfp.run(hopeless)
    assert full.aborted is None
    assert full.phase1_iterations == 25
    assert full.val_ppl is not None
    aborted = cvfp.run(hopeless.replace(phase1_abort=True))
    assert aborted.key != full.key
    assert aborted.phase1_iterations == abort.ITERATION
    assert aborted.aborted == abort.reason(full.phase1_history)
    assert aborted.aborted
    assert (aborted.val_ppl, aborted.best_epoch, aborted.phase2_history) == (None, None, [])
    again = cvfp.run(hopeless.replace(phase1_abort=True))
    assert again.from_store
    assert again.aborted == aborted.aborted
    frame = Results([full, aborted]).frame()
    assert frame.val_ppl.notna().tolist() == [True, False]
    # What is given up is judged by the exact validation contexts of that moment.
    at = {int(row["iteration"]): row for row in aborted.phase1_history}
    assert at[abort.ITERATION]["val_er"] == pytest.approx(aborted.val_er)
    assert "val_er" not in at[abort.ITERATION - 1]


def test_the_rules_for_giving_up() -> None:
    def history(**changed: float) -> list[dict[str, float]]:
        rows = [
            {"iteration": float(i), "loss": 1.0 - i / 100, "converged": i / 40}
            for i in range(2, 21)
        ]
        rows[-1] |= {"val_er": 0.75, **changed}
        return rows

    assert abort.reason(history()) is None
    assert "rank 69.0%" in str(abort.reason(history(val_er=0.69)))
    assert abort.reason(history(val_er=0.70)) is None
    assert "converged" in str(abort.reason(history(converged=15 / 40)))
    assert "loss" in str(abort.reason(history(loss=0.98)))
    assert abort.reason(history(val_er=0.1)[:-1]) is None


def test_result_says_how_the_recurrence_forgets(tiny: Experiment) -> None:
    result = cvfp.run(tiny)
    assert result.contraction_rate is not None
    assert 0 < result.contraction_rate < 1
    assert result.memory_length is not None
    assert 1 <= result.memory_length < 256
    assert result.context_error is not None
    assert result.context_error < 1e-2
    model = result.model()
    inputs = model.context_inputs(data.load(tiny).validation.tokens)
    exact = contexts.evaluate(model.context_block, inputs, method="sequential").values
    found = diagnose(model.context_block, inputs, exact)
    assert found.memory_length == result.memory_length
    assert found.contraction_rate == pytest.approx(result.contraction_rate, rel=1e-3)
