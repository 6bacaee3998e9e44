"""Explore in a notebook: a run's figures as it trains, its model on a text, stored runs, claims.

Widgets over `run(experiment, watch=f)`. A kernel that nobody watches (papermill, nbval) shows the
same as figures and tables that stand still."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets as widgets
import jinja2
import numpy as np
import pandas as pd
import torch
from IPython.core.pylabtools import print_figure
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from torch import Tensor

from cvfp import baselines, controls, data, packs, progress, registry
from cvfp.analysis import claims, ledger, plots, published, readings, scaling, tables
from cvfp.config import PRESETS, Experiment, ParameterError, toml
from cvfp.corpora import printable
from cvfp.experiment import exact_contexts, run
from cvfp.result import Result, Results

HERE = Path(__file__).parent
SHOWN = toml("explorer")
# Macros that escape what they are given, control characters too.
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
PAGES.finalize = lambda value: printable(value) if type(value) is str else value
PAGE: Any = PAGES.get_template("explorer.html").module
DESCRIBED = {one["field"]: one["description"] for one in Experiment.describe()}
THREAD, LAW, AS_GIVEN = "cvfp explorer", "scaling law", "as given"
JOIN = 1.5  # seconds that stop waits for the run's end
TIP = "tooltip" if hasattr(widgets.Text, "tooltip") else "description_tooltip"  # ipywidgets 7


class Explorer:
    """Panels over one run at a time, by `show`: "training", "text" and "stored". `result` is of the
    last run that ended, partial where it was stopped; `without` the same trained without contexts;
    `thread` the run's own, which ends with it; `parts` the widgets of explorer.toml, by name."""

    def __init__(self, name: str = "") -> None:
        self.given = Experiment()
        self.result: Result | None = None
        self.without: Result | None = None
        self.thread: threading.Thread | None = None
        self.presses = 0  # of stop since the run began
        self.parts: dict[str, Any] = {}
        for part, (kind, how) in SHOWN["widgets"].items():
            field = {"description": part, TIP: DESCRIBED[part]} if part in DESCRIBED else {}
            self.parts[part] = getattr(widgets, kind)(**field | how)
        self.fields = [part for part in self.parts if part in DESCRIBED]
        orders = [(head, field) for head, (field, _) in reversed(SHOWN["columns"].items())]
        lists = {"preset": [AS_GIVEN, *PRESETS], "kind": [*SHOWN["curves"], LAW], "order": orders}
        for part, options in lists.items():
            self.parts[part].options, self.parts[part].index = options, 0
        for part, act in SHOWN["acts"].items():
            one, do = self.parts[part], functools.partial(lambda act, _: act(), getattr(self, act))
            one.on_click(do) if hasattr(one, "on_click") else one.observe(do, "value")

    def open(self, experiment: Experiment, prompt: str) -> Explorer:
        """Itself, with all that it holds; only an Experiment that is another than before takes the
        old one's place. Raises `ParameterError`: a model without contexts."""
        made = ("zero", "trained", "random", *registry.JOINTLY)
        if experiment.model != "cvfp" or experiment.contexts not in made:
            raise ParameterError("contexts", experiment.contexts, f"for model 'cvfp': {made}")
        if experiment != self.given or not self.parts["prompt"].value:
            self.given, self.parts["prompt"].value = experiment, prompt
            self.fill()
        return self

    def show(self, panel: str) -> None:
        """A panel's widgets, or what they would show."""
        if progress.watched():
            rows = [[self.parts[name] for name in row] for row in SHOWN["panels"][panel]]
            boxes = [widgets.Box(row, layout={"flex_flow": "row wrap"}) for row in rows]
            display(widgets.VBox([widgets.HTML(PAGE.style()), *boxes]).add_class("cvfp"))
            return
        for one in getattr(self, f"_{panel}")():
            display(plots.readable(one) if isinstance(one, Figure) else one)

    def _base(self) -> Experiment:
        name = self.parts["preset"].value
        return self.given if name == AS_GIVEN else Experiment.preset(name)

    def fill(self) -> None:
        """Set the controls to the preset, or to the Experiment that was given."""
        for name in self.fields:
            self.parts[name].value = getattr(self._base(), name)

    def chosen(self) -> Experiment:
        """What the controls say. Raises `ParameterError`."""
        base, said = self._base(), {name: self.parts[name].value for name in self.fields}
        return base.replace(**{k: v for k, v in said.items() if v != getattr(base, k)})

    def start(self) -> None:
        """Train what the controls say, in a thread; one at a time, however many explorers."""
        if any(one.name == THREAD for one in threading.enumerate()):
            self.parts["status"].value = "A run is under way, here or in another explorer."
            return
        self.presses, self.parts["status"].value = 0, "Reading the corpus"
        self.parts["start"].disabled = True
        self.thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Once: the run ends after this iteration or epoch, with what there is. Twice: at once."""
        self.presses += 1
        if self.thread is not None:
            self.thread.join(JOIN)

    def _work(self) -> None:
        progress.LISTENER.set(self._tell)  # for this thread alone
        self.which, self.due, self.fit = "", 0.0, list[float]()
        self.paces: dict[str, tuple[float, int]] = {}
        try:
            self._train(self.chosen())
        except (Exception, KeyboardInterrupt) as error:  # a traceback would be shown nowhere
            words = f"{type(error).__name__}: {error}" if str(error) else "Stopped at once."
            self.parts["status"].value = PAGE.words(words)
        self.parts["bar"].value, self.parts["start"].disabled = 0.0, False

    def _train(self, one: Experiment) -> None:
        self.live: Any = SimpleNamespace(experiment=one, dev_ppl=None, val_spectrum=[])
        self.live.phase1_history, self.live.phase2_history = [], []
        self.live.baselines = dict.fromkeys(baselines.NAMES)
        self.result, self.without = run(one, watch=self._watch), None
        self.put("figure", seen(self.result))
        if not self.result.partial:
            self.which, self.paces = "The same without contexts, ", {}
            self.without = run(one.replace(contexts="zero"), watch=lambda row: self.presses)
        self.parts["status"].value = PAGE.summary(self.result, self.without, baselines.NAMES)
        self.read()

    def _watch(self, row: dict[str, float]) -> bool:
        second = self.live.phase2_history
        (second if row["phase"] > 1 else self.live.phase1_history).append(row)
        if second:
            self.live.best_epoch = min(second, key=lambda one: one["val_ppl"])["epoch"]
        self._draw(seen(self.live))
        return self.presses > 0

    def _draw(self, figures: Iterable[Figure]) -> None:
        begun = time.monotonic()
        if begun > self.due:  # or nothing of them is made
            self.put("figure", figures)
            self.due = 5 * time.monotonic() - 4 * begun  # a fifth of the time goes into drawing

    def _tell(self, title: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if self.presses > (title != "Table"):  # which leaves nothing, however it ends
            raise KeyboardInterrupt
        if "fit_loss" in figures:
            self.fit.append(figures["fit_loss"])
            table = pd.DataFrame({"nats": self.fit, "run": "table, fitted once a corpus"})
            table = table.rename_axis("step").reset_index()
            self._draw(plots.curves(one, "step", "nats") for one in [table])
        now, words = time.monotonic(), f"{self.which}{title}: {done / total:.0%}"
        begun, first = self.paces.setdefault(title, (now, done))
        left = (total - done) * (now - begun) / max(done - first, 1)
        self.parts["bar"].value = done / total
        self.parts["status"].value = f"{words}, at most {left:,.0f} s left"

    def put(self, part: str, shown: Iterable[Any]) -> None:
        """Show figures, tables and HTML in a part, or in words why there are none."""
        try:
            words = "".join(picture(x) if isinstance(x, Figure) else x._repr_html_() for x in shown)
        except (ValueError, FloatingPointError, FileNotFoundError) as error:
            words = PAGE.words(str(error))
        self.parts[part].value = words

    def _training(self) -> Iterator[object]:
        self.result = run(self.chosen())
        self.without = run(self.chosen().replace(contexts="zero"))
        yield from seen(self.result)
        yield Markdown(readings.quickstart(self.result))
        yield tables.record([self.result, self.without])

    def proceed(self) -> None:
        """Add the likeliest token to the text, and read it anew."""
        if self.result is not None and self.result.phase2_history:
            tokenizer = data.load(self.result.experiment).tokenizer
            tokens = tokenizer.encode([self.parts["prompt"].value]).tokens
            following = log_probs(self.result, tokens)[-1].argmax()
            self.parts["prompt"].value = tokenizer.decode([*tokens.tolist(), int(following)])

    def read(self) -> None:
        """Show the next token's distribution, and where in the text the context helps."""
        self.put("said", self._text())

    def _text(self) -> Iterator[object]:
        if self.result is None or not self.result.phase2_history:
            yield HTML("A run with a Phase 2 is needed first.")
            return
        found, runs = data.load(self.result.experiment), {"CVFP": self.result}
        runs |= {"no contexts": self.without} if self.without else {}
        tokens = found.tokenizer.encode([self.parts["prompt"].value]).tokens
        logs = {name: log_probs(one, tokens) for name, one in runs.items()}
        # The last two tokens and then each of the vocabulary, for the trigram.
        last, every = tokens[-2:], torch.arange(found.vocab_size)[:, None]
        grams = torch.cat([last.expand(len(every), -1), every], dim=1).flatten()
        streams, order = [found.fitting.tokens, found.train.tokens], len(last) + 1
        counted = baselines.kneser_ney_nats(streams, grams, len(every), order)[order - 2 :: order]
        frame = pd.DataFrame({name: one[-1].exp() for name, one in logs.items()})
        frame = frame.assign(trigram=np.exp(-counted)).sort_values("CVFP", ascending=False)
        top = frame[(frame.rank(ascending=False) <= 5).any(axis=1)]
        top = top.assign(piece=found.tokenizer.pieces(top.index.tolist()))
        yield HTML(PAGE.following([*frame], top.to_dict("records")))
        if len(runs) == 2 and len(tokens) > 1:
            after = tokens[1:, None]
            nats = pd.DataFrame({k: -x[:-1].gather(1, after)[:, 0] for k, x in logs.items()})
            nats["saved"] = nats["no contexts"] - nats.CVFP
            first, *rest = found.tokenizer.pieces(tokens.tolist())
            yield HTML(PAGE.tokens(first, nats.assign(piece=rest).to_dict("records")))
            nats = nats.assign(nats=nats.saved.cumsum(), token=nats.index + 1, run="saved so far")
            yield plots.curves(nats, "token", "nats")

    def look(self) -> None:
        """List the store's runs in the order, and with the words, that are asked for."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* cannot be read here")
            self.runs = {one.key: one for one in packs.results()}
        if not self.runs:
            return
        fields, forms = zip(*SHOWN["columns"].values(), strict=True)
        frame = Results(self.runs.values()).frame().sort_values(self.parts["order"].value)
        how: dict[str, Any] = dict(header=[*SHOWN["columns"]], formatters=[x.format for x in forms])
        text = frame[[*fields]].to_string(index=False, **how).replace(" ", "\u00a0")
        head, *lines = text.split("\n")
        words, kept = self.parts["words"].value.split(), self.parts["table"].value
        every = zip(lines, frame.key, strict=True)
        there = [(line, key) for line, key in every if all(word in line for word in words)]
        self.parts["head"].value = PAGE.head(head)
        self.parts["table"].options = there
        self.parts["table"].value = [key for _, key in there if key in kept]

    def overlay(self) -> None:
        """Lay the chosen runs over one another."""
        self.put("overlaid", self._overlaid())

    def _stored(self) -> Iterator[object]:
        self.look()
        self.parts["table"].index = tuple(range(min(6, len(self.runs))))
        return self._overlaid()

    def _overlaid(self) -> Iterator[object]:
        table, kind = self.parts["table"], self.parts["kind"].value
        runs = {line: self.runs[key] for line, key in table.options if key in table.value}
        if kind == LAW:
            here, note = Results(runs.values()).frame(), published.table("002_scaling")
            theirs = scaling.fit(note.tokens, note.val_ppl)
            yield plots.scaling(here, scaling.fit(here.train_tokens, here.val_ppl), note, theirs)
            return
        rows, x, y, log = SHOWN["curves"][kind]
        frames = {line: pd.DataFrame(getattr(one, rows)) for line, one in runs.items()}
        if any(map(len, frames.values())):
            curve = pd.concat(frames, names=["run", x]).rename(columns={0: y})
            curve = curve.reset_index(level="run").reset_index(drop=x in curve)
            yield plots.curves(curve, x, y, log)


def cards(reports: Path) -> HTML:
    """The ledger's claims, each of which opens with what was measured and where its figures are."""
    kept = reports / "claims.json"
    measured = claims.corrected(ledger.load(kept) if kept.exists() else ledger.measurements())
    links = {one.by: sorted(reports.glob(f"{one.by}*.*")) for one in measured}
    return HTML(PAGE.cards(claims.CLAIMS.values(), measured, links))


@torch.no_grad()
def log_probs(result: Result, tokens: Tensor) -> Tensor:
    """Log p(next token) after each of the tokens [T]: [T, V]. Raises ValueError: there are none."""
    if not len(tokens):
        raise ValueError("text: got no tokens; accepted: text of at least one token")
    model: Any = result.model()
    tokens = tokens.to(model.embedding.device)
    before = None
    if result.experiment.contexts != "zero":
        before = exact_contexts(model.context_block, model.context_inputs(tokens)).values
    stream = controls.positions(model, before, tokens, result.experiment)
    at = torch.arange(len(tokens), device=tokens.device)
    hidden = stream.hidden(at, stream.outputs(at, stream.previous(at)), stream.token_inputs())
    return model.logits(hidden).float().log_softmax(-1).cpu()


def seen(result: Any) -> Iterator[Figure]:
    """What there is to see of a run, even under way."""
    shown = SHOWN["figures"].items()
    return (getattr(plots, plot)(result) for plot, needs in shown if getattr(result, needs))


def picture(figure: Figure) -> str:
    """A figure as HTML, with its titles for those who cannot see it."""
    code = print_figure(plots.readable(figure), bbox_inches=None, base64=True)
    return str(PAGE.picture([one.get_title() for one in figure.axes], *figure.bbox.size, code))


named = functools.cache(Explorer)  # one of each name, however often a cell is run
