from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_experiment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cvfp
from cvfp import Experiment, ParameterError, data, embeddings
from cvfp.data import Data, Stream
from cvfp.embeddings import BigramLM, bigram_counts, fit_bigram


@pytest.fixture(scope="session")
def tiny_data(tiny: Experiment) -> Data:
    return data.load(tiny)


@pytest.fixture(scope="session")
def bigram(tiny: Experiment, tiny_data: Data) -> BigramLM:
    fitted = embeddings.load(tiny, tiny_data).bigram
    assert fitted is not None
    return fitted


def log_probabilities(model: BigramLM, token: int) -> list[float]:
    """log p(· | token) in float64, number by number."""
    table = model.table.double().tolist()
    row = table[token]
    mixed = [
        sum(w * e for w, e in zip(weights, row, strict=True)) + e
        for weights, e in zip(model.weight.double().tolist(), row, strict=True)
    ]
    mean = sum(mixed) / len(mixed)
    variance = sum((x - mean) ** 2 for x in mixed) / len(mixed)
    hidden = [(x - mean) / math.sqrt(variance + 1e-5) for x in mixed]
    logits = [
        sum(h * e for h, e in zip(hidden, other, strict=True)) + b
        for other, b in zip(table, model.bias.double().tolist(), strict=True)
    ]
    highest = max(logits)
    total = highest + math.log(sum(math.exp(x - highest) for x in logits))
    return [x - total for x in logits]


def test_nats_are_those_of_a_proper_distribution(bigram: BigramLM, tiny_data: Data) -> None:
    tokens = tiny_data.validation.tokens[:12]
    nats = bigram.nats(tokens)
    assert nats.dtype == torch.float64
    assert nats.shape == (11,)
    for read, target, value in zip(tokens[:-1], tokens[1:], nats, strict=True):
        expected = log_probabilities(bigram, int(read))
        assert sum(map(math.exp, expected)) == pytest.approx(1, abs=1e-12)
        assert float(value) == pytest.approx(-expected[int(target)], abs=1e-4)


def test_nats_sum_to_one_over_all_targets(bigram: BigramLM) -> None:
    # 5, 0, 5, 1, 5, 2, …: every second prediction is of the next token given 5.
    every = torch.arange(400)
    stream = torch.stack([torch.full_like(every, 5), every], dim=1).flatten()
    assert float(torch.exp(-bigram.nats(stream)[::2]).sum()) == pytest.approx(1, abs=1e-5)


def test_nats_do_not_depend_on_the_slices(bigram: BigramLM, tiny_data: Data) -> None:
    tokens = tiny_data.fitting.tokens[:9000]
    parts = [bigram.nats(tokens[:3001]), bigram.nats(tokens[3000:])]
    torch.testing.assert_close(bigram.nats(tokens), torch.cat(parts), atol=1e-5, rtol=0)


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_counts_are_those_of_a_loop_within_samples(samples: list[list[int]]) -> None:
    expected: Counter[tuple[int, int]] = Counter()
    starts, flat = [], []
    for sample in samples:
        starts.append(len(flat))
        flat += sample
        expected.update((sample[i], sample[i + 1]) for i in range(len(sample) - 1))
    first, second, counts = bigram_counts(Stream(torch.tensor(flat), torch.tensor(starts)))
    triples = zip(first.tolist(), second.tolist(), counts.tolist(), strict=True)
    assert {(x, y): n for x, y, n in triples} == dict(expected)
    assert first.tolist() == sorted(first.tolist())


SMALL = Stream(
    torch.tensor([0, 1, 2, 3, 0, 1, 2, 2, 4, 0, 1, 1, 3, 0, 2, 5, 0, 1, 2, 3]),
    torch.tensor([0, 7, 12]),
)


def plain_fit(stream: Stream, vocab_size: int, dim: int) -> tuple[BigramLM, list[float]]:
    """The fit as a plain mean over the pairs, with all logits at once."""
    generator = torch.Generator().manual_seed(embeddings.FIT_SEED)
    std = embeddings.FIT_STD
    table = torch.empty(vocab_size, dim).normal_(0, std, generator=generator)
    weight = torch.empty(dim, dim).normal_(0, std / 10, generator=generator)
    model = BigramLM(table, weight, torch.zeros(vocab_size))
    for parameter in vars(model).values():
        parameter.requires_grad_(True)
    groups = [
        {"params": [model.table, model.weight], "weight_decay": embeddings.FIT_DECAY},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=embeddings.FIT_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, embeddings.FIT_STEPS)
    losses = []
    for _ in range(embeddings.FIT_STEPS):
        loss = pair_loss(model, stream)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return BigramLM(**{name: p.detach() for name, p in vars(model).items()}), losses


def pair_loss(model: BigramLM, stream: Stream) -> Tensor:
    pieces = stream.tokens.tensor_split(stream.starts[1:])
    read = torch.cat([piece[:-1] for piece in pieces])
    target = torch.cat([piece[1:] for piece in pieces])
    rows = model.table[read]
    hidden = F.layer_norm(rows @ model.weight.T + rows, rows.shape[1:])
    return F.cross_entropy(hidden @ model.table.T + model.bias, target)


@pytest.mark.parametrize("logits", [2**22, 14])
def test_fit_is_a_plain_fit_on_the_pairs(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "FIT_LOGITS", logits)  # 14: two contexts in a slice
    rows: list[dict[str, float]] = []
    made = fit_bigram(SMALL, vocab_size=7, embedding_dim=4, report=rows.append)
    expected, losses = plain_fit(SMALL, vocab_size=7, dim=4)
    assert [row["fit_loss"] for row in rows] == pytest.approx(losses, abs=1e-3)
    for name, values in vars(made).items():
        torch.testing.assert_close(values, getattr(expected, name), atol=5e-3, rtol=0)
        assert not values.requires_grad


def test_fit_lowers_its_loss_below_the_unigrams(bigram: BigramLM, tiny_data: Data) -> None:
    rows: list[dict[str, float]] = []
    fit_bigram(tiny_data.fitting, 400, 16, rows.append)
    assert [row["step"] for row in rows] == list(range(1, embeddings.FIT_STEPS + 1))
    shares = torch.bincount(tiny_data.fitting.tokens).double() / len(tiny_data.fitting)
    entropy = float(torch.special.entr(shares).sum())
    assert rows[0]["fit_loss"] > entropy > rows[-1]["fit_loss"]
    assert float(pair_loss(bigram, tiny_data.fitting)) == pytest.approx(
        rows[-1]["fit_loss"], abs=0.01
    )


def test_fit_is_deterministic(bigram: BigramLM, tiny_data: Data) -> None:
    again = fit_bigram(tiny_data.fitting, 400, 16)
    assert all(torch.equal(getattr(again, name), kept) for name, kept in vars(bigram).items())


def test_table_is_fitted_on_the_fitting_set_alone(
    tiny: Experiment, bigram: BigramLM, home: Path
) -> None:
    other = tiny.replace(samples=9, validation_samples=8, seed=5)
    assert torch.equal(embeddings.load(other, data.load(other)).weight, bigram.table)
    fewer = tiny.replace(fitting_samples=50)
    assert not torch.equal(embeddings.load(fewer, data.load(fewer)).weight, bigram.table)


def test_fitted_table_is_kept(
    tiny: Experiment, tiny_data: Data, bigram: BigramLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "fit_bigram", None)
    kept = embeddings.load(tiny, tiny_data)
    assert torch.equal(kept.weight, bigram.table)
    assert kept.bigram is not None
    assert torch.equal(kept.bigram.bias, bigram.bias)


def test_random_table_depends_on_the_seed_alone(tiny: Experiment, tiny_data: Data) -> None:
    random = tiny.replace(embedding="random", embedding_dim=64)
    made = embeddings.load(random, tiny_data)
    assert made.bigram is None
    assert made.weight.shape == (400, 64)
    assert float(made.weight.std()) == pytest.approx(embeddings.RANDOM_STD, rel=0.05)
    assert torch.equal(made.weight, embeddings.load(random, tiny_data).weight)
    assert not torch.equal(made.weight, embeddings.load(random.replace(seed=1), tiny_data).weight)


def test_pretrained_table_is_gpt2s(gpt2_folder: Path, tiny_data: Data) -> None:
    import transformers

    saved = transformers.GPT2Model.from_pretrained(gpt2_folder).wte.weight.detach()
    for dim in ("none", 32):
        experiment = tiny_experiment(embedding=str(gpt2_folder), embedding_dim=dim)
        made = embeddings.load(experiment, tiny_data)
        assert torch.equal(made.weight, saved)
        assert made.weight.dtype == torch.float32
        assert made.bigram is None


def test_pretrained_table_of_another_width_is_refused(gpt2_folder: Path, tiny_data: Data) -> None:
    experiment = tiny_experiment(embedding=str(gpt2_folder), embedding_dim=16)
    with pytest.raises(ParameterError, match=r"^embedding_dim: got 16; .*None, or 32"):
        embeddings.load(experiment, tiny_data)


def test_pretrained_table_with_too_few_rows_is_refused(tiny_data: Data, tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=399)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    experiment = tiny_experiment(embedding=str(tmp_path), embedding_dim="none")
    with pytest.raises(ParameterError, match=r"^embedding: .*400 rows.*has 399"):
        embeddings.load(experiment, tiny_data)


def test_folder_without_a_model_is_refused(tiny_data: Data, tmp_path: Path) -> None:
    experiment = tiny_experiment(embedding=str(tmp_path), embedding_dim="none")
    with pytest.raises(ParameterError, match=r"^embedding: "):
        embeddings.load(experiment, tiny_data)
    with pytest.raises(ParameterError, match=r"^tokenizer: "):
        data.load(tiny_experiment(tokenizer=str(tmp_path), vocab_size="none"))


def test_fit_is_the_same_twice_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size of the real fit, where threads share the pairs out."""
    monkeypatch.setattr(embeddings, "FIT_STEPS", 3)
    draws = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    stream = Stream((draws**3 * 4000).long(), torch.tensor([0]))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fits = [fit_bigram(stream, 4000, 128) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(fit.table, fits[0].table) for fit in fits)


def test_ppmi_equals_a_dense_decomposition() -> None:
    vocab, dim = 30, 6
    tokens = torch.randint(0, vocab - 2, (600,), generator=torch.Generator().manual_seed(0))
    tokens = torch.where(tokens % 3 == 0, tokens, tokens // 2)  # some pairs are frequent
    stream = Stream(tokens, torch.tensor([0, 200, 450]))
    counts = torch.zeros(vocab, vocab, dtype=torch.float64)
    for low, high in ((0, 200), (200, 450), (450, 600)):
        for i in range(low, high):
            for j in range(max(low, i - 5), min(high, i + 6)):
                if i != j:
                    counts[tokens[i], tokens[j]] += 1 / abs(i - j)
    margin = counts.sum(1)
    chance = margin[:, None] * margin / counts.sum()
    information = torch.where(counts > 0, torch.log(counts / chance), 0.0).clamp(min=0)
    left, singular, _ = torch.linalg.svd(information)
    rows = left[:, :dim] * singular[:dim].sqrt()
    norm = rows.norm(dim=1, keepdim=True)
    rows = torch.where(norm > 1e-9, rows / norm, 0.0) * embeddings.PPMI_NORM
    made = embeddings.fit_ppmi(stream, vocab, dim).double()
    assert torch.equal(made[margin == 0], torch.zeros(int((margin == 0).sum()), dim).double())
    # Columns have no sign of their own: compare the rows' products.
    torch.testing.assert_close(made @ made.T, rows @ rows.T, rtol=0, atol=2e-2)
    assert torch.equal(embeddings.fit_ppmi(stream, vocab, dim).double(), made)


def test_a_ppmi_table_is_found_again_and_runs(home: Path) -> None:
    experiment = tiny_experiment(embedding="ppmi", weight_tying=False, phase2_epochs=1)
    ran = cvfp.run(experiment)
    assert ran.baselines["table"] is None
    assert cvfp.run(experiment).from_store
    with pytest.raises(ParameterError, match="embedding_dim: got 999; accepted: at most"):
        cvfp.run(experiment.replace(embedding_dim=999))
