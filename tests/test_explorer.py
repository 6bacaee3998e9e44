"""The explorer by its widgets' traits, without a browser: what is pressed, and what is shown."""

from __future__ import annotations

import html
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from conftest import tiny_experiment
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import cvfp
from cvfp import cache, data, explorer, progress
from cvfp.analysis import claims, plots
from cvfp.baselines import kneser_ney_nats
from cvfp.config import UpTo
from cvfp.explorer import Explorer

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert(1)</script> & $x$ _y_ \x1b[31m"


def until(true: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(one: Explorer) -> Explorer:
    """One whose run has ended by itself."""
    assert one.thread is not None
    one.thread.join(600)
    assert not one.thread.is_alive()
    return one


@pytest.fixture(autouse=True)
def no_run_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def done() -> Explorer:
    """One whose run has ended."""
    one = Explorer().open(tiny_experiment(seed=5), "Hello there, how are you?")
    one.parts["start"].click()
    return ended(one)


def endless(**fields: Any) -> cvfp.Experiment:
    fields = dict(phase1_stop="never", phase1_max_iterations=100_000) | fields
    return tiny_experiment(**fields)


# A run


def test_a_run_moves_its_figure_and_ends_with_its_thread() -> None:
    before = set(threading.enumerate())
    one = Explorer().open(tiny_experiment(seed=6), "Hello")
    figures, said = [], []
    one.parts["figure"].observe(lambda change: figures.append(change.new), "value")
    one.parts["status"].observe(lambda change: said.append(change.new), "value")
    one.parts["start"].click()
    assert one.parts["start"].disabled  # one run at a time
    assert isinstance(ended(one).result, cvfp.Result)
    assert not one.parts["start"].disabled
    assert set(threading.enumerate()) == before  # tqdm's monitor neither
    assert len(figures) >= 2
    assert all(re.fullmatch(r"(<img alt=\"[^\"]+\" width=[^>]+>)+", one) for one in figures)
    assert any(re.match(r"Phase 1: \d+%, at most \d+ s left", words) for words in said)
    assert any(words.startswith("The same without contexts, Phase 2") for words in said)
    assert f"Perplexity {one.result.val_ppl:.1f}</b>; without contexts " in said[-1]
    again = cvfp.run(one.chosen())
    assert again.from_store
    assert again == one.result
    assert one.without is not None
    assert one.without.experiment == again.experiment.replace(contexts="zero")


@pytest.mark.full
def test_stop_leaves_a_partial_result_that_a_run_goes_on_from(home: Path) -> None:
    one = Explorer().open(endless(seed=7), "Hello")
    one.parts["start"].click()
    until(lambda: "Converged" in one.parts["figure"].value)
    one.parts["stop"].click()
    first = ended(one).result
    assert first is not None
    assert first.partial
    assert first.phase1_history
    assert first.val_spectrum
    assert "stopped before its end" in one.parts["status"].value
    assert "Spectrum" in one.parts["figure"].value
    assert one.without is None
    one.parts["start"].click()
    until(lambda: "Converged" in one.parts["figure"].value)
    one.parts["stop"].click()
    second = ended(one).result
    assert second is not None
    steps = len(first.phase1_history)
    assert len(second.phase1_history) > steps
    assert second.phase1_history[:steps] == first.phase1_history


def test_stop_in_phase_2_leaves_a_model(home: Path) -> None:
    patient = dict(phase2_epochs=100_000, phase2_patience=100_000)
    one = Explorer().open(tiny_experiment(seed=8, **patient), "Hello")
    one.parts["start"].click()
    until(lambda: one.parts["figure"].value.count("<img") == 2)
    one.parts["stop"].click()
    assert ended(one).result is not None
    assert one.result.partial
    assert one.result.val_ppl is not None
    assert "CVFP" in one.parts["said"].value


def stubborn(title: str) -> Callable[..., Any]:
    def run(experiment: object, watch: object) -> None:
        with progress.Stage(title, 10**9) as stage:
            while True:
                stage.advance(1, {"fit_loss": 1.0} if title == "Table" else {})
                time.sleep(0.005)

    return run


@pytest.mark.parametrize(("title", "presses"), [("Table", 1), ("Phase 2", 2)])
def test_stop_at_once(title: str, presses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "run", stubborn(title))
    monkeypatch.setattr(explorer, "JOIN", 0.2)
    one = Explorer().open(tiny_experiment(), "Hello")
    one.parts["start"].click()
    until(lambda: title in one.parts["status"].value)
    for press in range(presses):
        assert one.thread is not None
        assert one.thread.is_alive(), press
        one.parts["stop"].click()
    ended(one)
    assert one.parts["status"].value == "<p>Stopped at once.</p>"
    assert one.result is None


def test_one_trains_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "run", stubborn("Table"))
    first, second = (Explorer().open(tiny_experiment(), "Hello") for _ in range(2))
    first.parts["start"].click()
    for one in (first, second):
        one.parts["start"].click()
        assert "under way" in one.parts["status"].value
    assert second.thread is None
    first.parts["stop"].click()
    ended(first)


def test_an_error_is_shown_and_nothing_lost(done: Explorer) -> None:
    before = done.result, done.parts["figure"].value
    done.parts["objective"].value = "<b>none"
    done.parts["start"].click()
    ended(done)
    assert "ParameterError: objective: got &#39;&lt;b&gt;none" in done.parts["status"].value
    assert (done.result, done.parts["figure"].value) == before
    done.parts["preset"].value = "note002"
    done.parts["preset"].value = explorer.AS_GIVEN
    assert done.chosen() == done.given


def test_a_run_without_phase_2_writes_no_text(home: Path) -> None:
    one = Explorer().open(tiny_experiment(), "Hello")
    one.result = cvfp.run(one.given, watch=lambda row: row["iteration"] == 2)
    assert one.result.partial
    one.proceed()
    assert one.parts["prompt"].value == "Hello"


# Controls


def test_controls_show_their_fields_and_help() -> None:
    one = Explorer().open(cvfp.Experiment(), "Hello")
    asked = "token_input_all_layers objective num_layers context_dim num_input_tokens samples"
    asked += " dist_reg_weight context_std input_std token_block_std seed"
    assert one.fields == asked.split()
    described = {row["field"]: row["description"] for row in cvfp.Experiment.describe()}
    for name in one.fields:
        assert getattr(one.parts[name], explorer.TIP) == described[name]
        assert one.parts[name].description == name
    placed = [name for rows in explorer.SHOWN["panels"].values() for row in rows for name in row]
    assert sorted(placed) == sorted(one.parts)


def test_what_the_controls_say_is_run() -> None:
    one = Explorer().open(cvfp.Experiment(phase1_noise=0.3), "Hello")
    assert one.chosen() == one.given
    assert isinstance(one.chosen().samples, UpTo)  # nobody set it
    one.parts["dist_reg_weight"].value = 0.5
    one.parts["token_input_all_layers"].value = False
    changed = dict(dist_reg_weight=0.5, token_input_all_layers=False)
    assert one.chosen() == one.given.replace(**changed)
    for name in cvfp.config.PRESETS:
        one.parts["preset"].value = name
        assert one.chosen() == cvfp.Experiment.preset(name)
    one.parts["preset"].value = explorer.AS_GIVEN
    assert one.chosen() == one.given


def test_a_cell_that_is_run_again_loses_nothing(done: Explorer) -> None:
    result, shown = done.result, done.parts["figure"].value
    done.parts["seed"].value = 77
    assert done.open(done.given, "another").parts["seed"].value == 77
    assert done.parts["prompt"].value != "another"
    other = done.given.replace(num_layers=1)
    assert done.open(other, "another").chosen() == other
    assert (done.result, done.parts["figure"].value) == (result, shown)
    assert explorer.named("a") is explorer.named("a")
    assert explorer.named("a") is not explorer.named("b")
    explorer.named("b").parts["seed"].value = 3
    assert explorer.named("a").parts["seed"].value != 3
    with pytest.raises(cvfp.ParameterError, match="model"):
        Explorer().open(cvfp.Experiment(model="lstm"), "Hello")


# A text


@pytest.mark.parametrize("kind", ["result", "without"])
def test_probabilities_are_those_that_the_run_was_judged_by(done: Explorer, kind: str) -> None:
    result = getattr(done, kind)
    tokens = data.load(result.experiment).validation.tokens
    logs = explorer.log_probs(result, tokens)
    nats = -logs[:-1].gather(1, tokens[1:, None]).double().mean()
    assert math.exp(nats) == pytest.approx(result.val_ppl, rel=1e-4)
    torch.testing.assert_close(logs.logsumexp(1), torch.zeros(len(tokens)), atol=1e-4, rtol=0)


def test_tokens_are_added_as_generate_adds_them(done: Explorer) -> None:
    assert done.result is not None
    start = done.parts["prompt"].value = "Hello there"
    for _ in range(3):
        done.parts["proceed"].click()
    greedy = cvfp.generate(done.result.model(), start, 3, temperature=0)
    assert done.parts["prompt"].value == greedy


def test_the_next_token_beside_trigram_and_no_contexts(done: Explorer) -> None:
    assert done.result is not None
    assert done.without is not None
    done.parts["prompt"].value = "Hello there, how"
    found = data.load(done.result.experiment)
    tokens = found.tokenizer.encode(["Hello there, how"]).tokens
    shown = next(done._text()).data  # type: ignore[attr-defined]
    assert re.findall("<th>([^<]+)", shown) == ["next token", "CVFP", "no contexts", "trigram"]
    streams = [found.fitting.tokens, found.train.tokens]
    logs = [explorer.log_probs(run, tokens)[-1] for run in (done.result, done.without)]
    rows = re.findall(r"<tr><td><code>(.+?)</code>(.+?)</tr>", shown, re.S)
    assert len(rows) >= 5
    pieces = found.tokenizer.pieces(list(range(found.vocab_size)))
    likeliest = logs[0].argsort(descending=True).tolist()
    places = []
    for piece, cells in rows:
        index = pieces.index(html.unescape(piece))
        longer = torch.cat([tokens, torch.tensor([index])])
        trigram = np.exp(-kneser_ney_nats(streams, longer, found.vocab_size, 3)[-1])
        figures = [*(float(one[index].exp()) for one in logs), trigram]
        assert re.findall(r">(\S+) %<", cells) == [f"{100 * one:.1f}" for one in figures]
        places.append(likeliest.index(index))
    assert places == sorted(places)
    assert places[0] == 0


def test_tokens_are_coloured_by_what_the_context_saved(done: Explorer) -> None:
    assert done.result is not None
    assert done.without is not None
    done.parts["prompt"].value = "Hello there, how are you?"
    done.parts["read"].click()
    tokens = (
        data.load(done.result.experiment).tokenizer.encode(["Hello there, how are you?"]).tokens
    )
    nats = [
        -explorer.log_probs(run, tokens)[:-1].gather(1, tokens[1:, None])[:, 0]
        for run in (done.without, done.result)
    ]
    shown = re.findall(r'<span style="--by:(\S+)"', done.parts["said"].value)
    saved = (nats[0] - nats[1]).tolist()
    assert [float(one) for one in shown] == pytest.approx(saved, abs=0.006)
    assert "a line below: the context helped" in done.parts["said"].value  # not by colour alone
    assert re.search(r"border-bottom: clamp\(0px, 1px \* var\(--by\)", done.parts["said"].value)


@pytest.mark.parametrize("text", ["", "H", HOSTILE, "日本語 😀"])
def test_any_text_is_read_as_text(done: Explorer, text: str) -> None:
    done.parts["prompt"].value = text
    done.parts["read"].click()
    shown = done.parts["said"].value
    assert ("text: got no tokens" in shown) == (not text)
    assert "<script" not in shown
    assert "\x1b" not in shown
    if text == HOSTILE:
        (line,) = re.findall(r'<p class="cvfp-text">(.*?)</p>', shown, re.S)
        line = re.sub(r"</?span[^>]*>", "", line)
        assert "<" not in line
        assert html.unescape(line) == HOSTILE.replace("\x1b", r"\x1b")
    done.parts["prompt"].value = "Hello"


def test_nothing_is_read_before_a_run() -> None:
    one = Explorer().open(tiny_experiment(), "Hello")
    one.parts["read"].click()
    one.parts["proceed"].click()
    assert "needed first" in one.parts["said"].value
    assert one.parts["prompt"].value == "Hello"


# Stored runs


@pytest.mark.full
def test_stored_runs_are_listed_filtered_sorted_and_laid_over(done: Explorer) -> None:
    cvfp.run(done.result.experiment.replace(samples=8))  # type: ignore[union-attr]
    one = Explorer().open(done.given, "Hello")
    one.look()
    every = one.parts["table"].options
    assert {key for _, key in every} >= {done.result.key, done.without.key}  # type: ignore[union-attr]
    for field in ("val_ppl", "samples"):
        one.parts["order"].value = field
        values = [getattr(one.runs[k].experiment, field, None) or one.runs[k].val_ppl or math.inf
                  for _, k in one.parts["table"].options]  # fmt: skip
        assert values == sorted(values)
    one.parts["table"].value = [done.result.key]  # type: ignore[union-attr]
    one.parts["words"].value = "trained"
    assert one.parts["table"].value == (done.result.key,)  # type: ignore[union-attr]
    lines = [line.split() for line, _ in one.parts["table"].options]
    assert lines
    assert all("trained" in line for line in lines)
    one.parts["table"].index = ()
    one.parts["words"].value = "no such run"
    assert one.parts["table"].options == ()
    one.parts["words"].value = ""
    one.parts["table"].value = [key for _, key in one.parts["table"].options]
    for kind in one.parts["kind"].options:
        one.parts["kind"].value = kind
        assert one.parts["overlaid"].value.startswith('<img alt="'), kind


def test_what_is_no_run_here_is_not_listed(done: Explorer) -> None:
    key = done.result.key  # type: ignore[union-attr]
    record = json.loads((cache.home() / "runs" / f"{key}.json").read_text())
    record["experiment"]["objective"] = "somebody's"
    path = cache.home() / "runs" / "0123.json"
    cache.keep(path, lambda temporary: temporary.write_text(json.dumps(record)))
    one = Explorer().open(done.given, "Hello")
    one.look()
    assert key in one.runs
    assert "0123" not in [key for _, key in one.parts["table"].options]
    cache.delete(path)


def test_an_empty_store_has_no_runs(home: Path) -> None:
    one = Explorer().open(tiny_experiment(), "Hello")
    one.parts["look"].click()
    assert one.parts["table"].options == ()


# Claims, and what nobody watches


def test_every_claim_is_a_card_that_leads_to_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "notebooks")
    shown = explorer.cards(Path("../reports")).data
    for claim in claims.CLAIMS.values():
        assert f"<b>{claim.id}</b> {claim.title}" in shown
    links = re.findall(r'href="([^"]+)"', shown)
    assert len(links) >= len(claims.CLAIMS)
    assert all(Path(link).exists() for link in links)
    assert explorer.cards(Path("nowhere")).data.count("not measured") == len(claims.CLAIMS)


@pytest.mark.parametrize("panel", ["training", "text", "stored"])
def test_without_a_reader_panels_stand_still(
    done: Explorer, panel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(explorer, "display", shown.append)
    done.parts["prompt"].value = "Hello there"
    done.show(panel)
    assert any(isinstance(one, Figure) for one in shown)
    assert not any(isinstance(one, widgets.Widget) for one in shown)
    monkeypatch.setattr(progress, "watched", lambda: True)
    shown.clear()
    done.show(panel)
    assert [type(one) for one in shown] == [widgets.VBox]


def test_figures_are_read_on_light_and_dark_pages(done: Explorer) -> None:
    for figure in explorer.seen(done.result):
        plots.readable(figure)
        assert figure.patch.get_alpha() == 0
        for text in figure.findobj(lambda one: hasattr(one, "get_fontsize")):
            red, green, blue = np.array(to_rgb(text.get_color())) ** 2.2  # type: ignore[attr-defined]
            light = 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05
            assert min(1.05 / light, light / 0.0556) > 3, text
