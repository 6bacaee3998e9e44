"""Own blocks, contexts and corpus formats: used everywhere, checked by name, keyed, shipped."""

from __future__ import annotations

import importlib
import linecache
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_experiment
from torch import Tensor, nn

import cvfp
from cvfp import Experiment, ParameterError, registry, store
from cvfp.build import build_cvfp, cvfp_size
from cvfp.corpora import load_corpus, read
from cvfp.model import initialise

SMALL = dict(samples=2, phase2_epochs=1, phase1_max_iterations=4)


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = {kind: dict(parts) for kind, parts in registry.PARTS.items()}
    yield
    for kind, parts in registry.PARTS.items():
        parts.clear()
        parts.update(before[kind])
    registry.RECEIVED.clear()


Write = Callable[..., Any]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A module of the researcher's with this source, imported (again)."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(text: str, name: str = "own_part") -> Any:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        del sys.modules[name]
        return importlib.import_module(name)

    return make


class Copied(nn.Module):
    """The published block, in the words of a researcher."""

    def __init__(self, experiment: Experiment, input_dim: int) -> None:
        super().__init__()
        width = self.context_dim = experiment.context_dim
        self.widths = [width] * experiment.num_layers
        self.linears = nn.ModuleList(nn.Linear(width + input_dim, width) for _ in self.widths)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.widths)

    def initialise(self, generator: torch.Generator) -> None:
        initialise(self, generator)

    def forward(self, c: Tensor, e: Tensor) -> list[Tensor]:
        outputs = []
        for linear, norm in zip(self.linears, self.norms, strict=True):
            c = norm(c + torch.relu(linear(torch.cat([c, e], dim=-1))))
            outputs.append(c)
        return outputs


# Blocks


@pytest.mark.parametrize("contexts", ["trained", "end_to_end", "random", "zero", "window"])
@pytest.mark.parametrize("ops", ["plain", "auto"])
def test_a_copied_block_gives_the_published_run(ops: str, contexts: str) -> None:
    cvfp.block("copied")(Copied)
    one = tiny_experiment(ops=ops, contexts=contexts, **SMALL)
    made = cvfp.run(one.replace(block="copied"), reuse=False)
    wanted = cvfp.run(one, reuse=False)
    close = 0.0 if ops == "plain" else 1e-4
    assert made.key != wanted.key
    assert made.parameters == wanted.parameters
    assert made.val_ppl == pytest.approx(wanted.val_ppl, rel=close, abs=0)
    if wanted.val_er is not None:
        assert made.val_er == pytest.approx(wanted.val_er, rel=close, abs=0)


def test_size_gap_and_peer_go_through_an_own_block() -> None:
    class Wide(Copied):
        def __init__(self, experiment: Experiment, input_dim: int) -> None:
            super().__init__(experiment, input_dim)
            self.more = nn.Linear(16, 1000)

    cvfp.block("wide")(Wide)
    one = tiny_experiment(**SMALL)
    assert cvfp_size(one.replace(block="wide"), 16) == cvfp_size(one, 16) + 17 * 1000
    from cvfp import gap

    cvfp.block("copied")(Copied)
    made = gap.measure(one.replace(block="copied", samples=6), sweeps=2)
    assert isinstance(made.block, Copied)


BAD: dict[str, dict[str, Any]] = {
    "context_dim 7": dict(context_dim=7),
    "context_dim None": dict(context_dim=None),
    "widths None": dict(widths=None),
    "widths \\[\\]": dict(widths=[]),
    "widths \\[16, 3\\]": dict(widths=[16, 3]),
    "outputs of shape": dict(widths=[16, 16, 16]),
    "without initialise": dict(initialise=None),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_block_is_refused_by_name_before_training(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @cvfp.block("bad")
    def bad(experiment: Experiment, input_dim: int) -> nn.Module:
        made = Copied(experiment, input_dim)
        for name, value in BAD[words].items():
            object.__setattr__(made, name, value)
        return made

    monkeypatch.setattr("cvfp.phase1.train", None)
    one = tiny_experiment(block="bad", **SMALL)
    for call in (cvfp.run, cvfp.sweep):
        with pytest.raises(ValueError, match=f"block: got .*{words}.* from 'bad'; accepted: "):
            call(one)


def test_a_block_that_is_not_finite_or_no_module_is_refused() -> None:
    class Nan(Copied):
        def forward(self, c: torch.Tensor, e: torch.Tensor) -> list[torch.Tensor]:
            return [one * float("nan") for one in super().forward(c, e)]

    table = torch.randn(30, 16)
    for part, words in ((Nan, "not finite"), (lambda *_: 3, "a int without initialise")):
        cvfp.block("bad")(part)
        with pytest.raises(ValueError, match=f"{words}.*'bad'"):
            build_cvfp(tiny_experiment(block="bad"), table)


# Contexts


def test_own_contexts_stand_where_phase1s_would() -> None:
    seen: list[int] = []

    @cvfp.context_source("noise")
    def noise(model: Any, tokens: Tensor, experiment: Experiment) -> Tensor:
        seen.append(len(tokens))
        draw = torch.Generator().manual_seed(experiment.seed)
        return torch.randn(len(tokens), experiment.context_dim, generator=draw)

    one = tiny_experiment(contexts="noise", **SMALL)
    result = cvfp.run(one, reuse=False)
    assert seen == [result.train_tokens, result.val_tokens]
    assert result.phase1_iterations is result.context_sweeps is result.memory_length is None
    assert result.val_ppl is not None
    assert result.train_er is not None
    assert result.train_er > 0.9
    assert result.val_er is not None
    assert result.row()["contexts"] == "noise"


def test_own_contexts_that_are_exact_give_the_random_control() -> None:
    @cvfp.context_source("exact")
    def exact(model: Any, tokens: Tensor, experiment: Experiment) -> Tensor:
        return cvfp.experiment.exact_contexts(
            model.context_block, model.context_inputs(tokens)
        ).values

    one = tiny_experiment(contexts="random", ops="plain", **SMALL)
    made = cvfp.run(one.replace(contexts="exact"), reuse=False)
    wanted = cvfp.run(one, reuse=False)
    assert (made.val_ppl, made.val_er) == (wanted.val_ppl, wanted.val_er)


@pytest.mark.parametrize(
    "made", [torch.zeros(3, 16), None, torch.tensor(0.0), "nan"], ids=lambda m: type(m).__name__
)
def test_bad_contexts_are_refused_by_name(made: Any) -> None:
    @cvfp.context_source("bad")
    def bad(model: Any, tokens: Tensor, experiment: Experiment) -> Any:
        return torch.full((len(tokens), 16), torch.nan) if made == "nan" else made

    with pytest.raises(ValueError, match=r"contexts: got .* from 'bad'; accepted: finite"):
        cvfp.run(tiny_experiment(contexts="bad", **SMALL))


# Corpus formats

SAID = "\n".join(f"ann: I have {n} apples and you? | bob: I have {n + 1} of them" for n in range(9))


def own_format(row: str) -> str | None:
    return "\n".join(turn.partition(": ")[2] for turn in row.split(" | "))


def test_a_corpus_format_reads_by_name_and_by_field(tmp_path: Path) -> None:
    path = tmp_path / "said.txt"
    path.write_text(SAID, encoding="utf-8")
    cvfp.corpus_format("said")(own_format)
    texts = read(path, corpus_format="said").texts
    assert texts == read(path, corpus_format=own_format).texts
    assert texts[0] == "I have 0 apples and you?\nI have 1 of them"
    one = tiny_experiment(dataset=str(path), corpus_format="said", samples=4, fitting_samples=2)
    corpus = load_corpus(one)
    assert corpus.train == texts[5:9]
    assert corpus.validation == texts[:3]
    with pytest.raises(ParameterError, match="corpus_format: got 'said'; accepted: None with"):
        load_corpus(tiny_experiment(corpus_format="said"))


def test_a_changed_corpus_format_reads_anew(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "said.txt"
    path.write_text(SAID, encoding="utf-8")
    one = tiny_experiment(dataset=str(path), samples=4, fitting_samples=2, vocab_size=260)
    text = "def shout(text): return text{}\ndef row(line): return shout(line)\n"
    write(text.format(""))
    one = one.replace(corpus_format="own_part:row")
    plain = cvfp.data.load(one)
    write(text.format(".upper()"))
    loud = cvfp.data.load(one)
    assert loud.fingerprint != plain.fingerprint
    assert load_corpus(one).train[0].isupper()
    write(text.format(" + ''"))  # the same texts, from another source
    assert cvfp.data.load(one).fingerprint != plain.fingerprint
    write("# nothing\n" + text.format(""))
    assert cvfp.data.load(one).fingerprint == plain.fingerprint


def test_a_corpus_format_without_source_is_not_cached(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "said.txt"
    path.write_text(SAID, encoding="utf-8")
    one = tiny_experiment(dataset=str(path), samples=4, fitting_samples=2, vocab_size=260)
    for word in ("upper", "lower"):
        space: dict[str, Any] = {}
        exec(f"def row(line): return line.{word}()", space)
        cvfp.corpus_format("mine")(space["row"])
        text = load_corpus(one.replace(corpus_format="mine")).train[0]
        assert text == getattr(text, word)()
        cvfp.data.load(one.replace(corpus_format="mine"))
    assert not list((home / "corpora").glob("local-*"))


# Names


@pytest.mark.parametrize(
    ("kind", "decorator", "name"),
    [
        ("objective", cvfp.objective, "settle"),
        ("block", cvfp.block, "published"),
        *(("contexts", cvfp.context_source, name) for name in registry.CONTEXTS),
    ],
)
def test_built_in_names_are_refused(kind: str, decorator: Any, name: str) -> None:
    with pytest.raises(ParameterError, match=f"{kind}: got '{name}'; accepted: a name that no"):
        decorator(name)(own_format)


def test_unknown_names_list_those_there_are() -> None:
    cvfp.corpus_format("speakers")(own_format)
    for kind, name, near in (
        ("block", "publish", "published"),
        ("contexts", "trainde", "trained"),
        ("corpus_format", "speaker", "speakers"),
    ):
        with pytest.raises(ParameterError, match=f"{kind}: got '{name}'; .*mean '{near}'"):
            Experiment(**{kind: name})
    with pytest.raises(ParameterError, match="'trained' or 'random' or 'zero'"):
        Experiment(contexts="something else")


# Keys


def test_a_block_in_a_notebooks_cells() -> None:
    """Cells are known to linecache alone, and their module has no file."""
    main: dict[str, Any] = {"__name__": "__main__"}

    def cell(number: int, text: str) -> str | None:
        name = f"<cell {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), main)
        if "Block" in main:
            cvfp.block("mine")(main["Block"])
            return registry.source("block", "mine")
        return None

    cell(1, "from torch import nn\ndef helper(x):\n    return x + 1\n")
    block = """
class Block(nn.Module):
    size = 3
    def __init__(self, experiment, input_dim):
        super().__init__()
        self.widths = [helper(self.size)]
"""
    first = cell(2, block)
    assert first
    assert cell(3, "def helper(x):\n    return x + 2\n") not in (None, first)
    assert cell(4, "# the same\ndef helper(x):\n\n    return x + 1\n") == first
    assert cell(5, block.replace("3", "4")) not in (None, first)


@pytest.mark.parametrize("name", ["math:sqrt", "torch.nn:Identity", "functools:partial"])
def test_what_is_installed_has_no_source(name: str) -> None:
    """Another version of it would be another part."""
    assert registry.source("block", name) is None


def test_own_parts_are_in_their_keys() -> None:
    one = tiny_experiment()
    cvfp.block("copied")(Copied)
    cvfp.context_source("own")(own_format)
    for kind, name, both in (("block", "copied", True), ("contexts", "own", False)):
        changed = one.replace(**{kind: name})
        assert store.key(changed, "d", "t") != store.key(one, "d", "t")
        alone = store.key(changed, "d", "t", phase1=True) != store.key(one, "d", "t", phase1=True)
        assert alone == both
    assert not registry.sources(one)
    assert {"block", "corpus_format"}.isdisjoint(one.key_fields())


def test_changing_a_helper_makes_the_run_anew(write: Write) -> None:
    text = """
    def helper(x):
        return {} * x
    def part(new, old, batch):
        return helper((new - old).square().mean((1, 2))), {{}}
    """
    write(text.format(1))
    one = tiny_experiment(objective="own_part:part", **SMALL)
    first = cvfp.run(one)
    assert cvfp.run(one).from_store
    write(text.format(2))
    second = cvfp.run(one)
    assert not second.from_store
    assert not second.phase1_from_store
    assert second.key != first.key


def test_a_sweep_ships_the_parts_of_a_notebook() -> None:
    """Of a module that a worker cannot import: their runs are stored all the same."""
    block = type("Copied", (Copied,), {"__module__": "__main__"})
    cvfp.block("copied")(block)
    one = tiny_experiment(block="copied", **SMALL)
    together = cvfp.sweep(one, seed=[0, 1], n_jobs=2)
    alone = cvfp.sweep(one, seed=[0, 1])
    assert all(result.from_store for result in alone)
    assert [r.val_ppl for r in alone] == [r.val_ppl for r in together]


@pytest.mark.parametrize(("page", "name"), [("README.md", "closer"), ("docs/design.md", "recite")])
def test_what_the_pages_show_runs(
    page: str, name: str, write: Write, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective and the run of it, as they are printed there; on a smaller corpus."""
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    at = next(i for i, block in enumerate(blocks) if f'objective("{name}")' in block)
    shown = blocks[at] if "cvfp.run(" in blocks[at] else blocks[at] + blocks[at + 1]
    small = staticmethod(lambda preset, samples, **fields: tiny.replace(**fields))
    monkeypatch.setattr(Experiment, "preset", small)
    result = write(f"import cvfp\n{shown}", name="shown").result
    assert result.experiment.objective == name
    assert result.val_ppl is not None
