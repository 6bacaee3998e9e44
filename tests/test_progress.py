"""Bars for people who watch, and nothing in a notebook that is executed, however it was started."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupyter_client
import nbformat
import pytest

import cvfp
from cvfp import Experiment, progress, store, tuning
from cvfp.progress import Stage, Whole

ROOT = Path(__file__).parents[1]
# What the kernels of front ends have in their environments, and so has all that they start.
VARIABLES = {"JPY_SESSION_NAME": "lab.ipynb", "VSCODE_PID": "1", "VSCODE_CWD": "/"}
STAGE = """
import threading
from cvfp.progress import Stage
def work():
    with Stage("Phase 1", 3) as stage:
        for number in range(3):
            stage.advance(1, {"loss": number})
work()
"""
WHOLE = """
from cvfp.progress import Whole
with Whole("Sweep", 2, 3.0) as whole:
    for one in (1.0, 2.0):
        whole.begin(one)
        work()
        whole.finish(one == 1.0, {"val_ppl": 150.0})
print(whole.bar.container.children[1].value, whole.bar.container.children[1].max)
"""
THREAD = "thread = threading.Thread(target=work)\nthread.start()\nthread.join()"
# The bars of the libraries that cvfp calls.
LIBRARIES = """
import datasets, huggingface_hub.utils, transformers.utils.logging
for bar in (datasets.utils.tqdm, huggingface_hub.utils.tqdm, transformers.utils.logging.tqdm):
    for _ in bar(range(3)): pass
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """As in a kernel that Jupyter or VS Code has started."""
    monkeypatch.delenv("CVFP_PROGRESS")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    # A kernel with this variable captures no descriptors.
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


class FrontEnd:
    """A kernel, and requests to it as JupyterLab sends them, or Python's client."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=environment)
        self.client: Any = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def execute(self, code: str, *, by_hand: bool = True) -> list[dict[str, Any]]:
        """The messages that answer the code: outputs, and widgets' models."""
        content = dict(code=code, silent=False, store_history=True, user_expressions={})
        content |= dict(allow_stdin=False, stop_on_error=True)
        request = self.client.session.msg("execute_request", content)
        if by_hand:  # as JavaScript's: drawn by lot
            request["header"] |= dict(msg_id=str(uuid.uuid4()), session=str(uuid.uuid4()))
        self.client.shell_channel.send(request)
        answers = []
        while True:
            answer = self.client.get_iopub_msg(timeout=120)
            if answer["parent_header"].get("msg_id") != request["header"]["msg_id"]:
                continue
            if answer["content"].get("execution_state") == "idle":
                break
            assert answer["msg_type"] != "error", answer["content"]
            answers.append(answer)
        return [one for one in answers if one["msg_type"] not in ("status", "execute_input")]


@pytest.fixture
def front_end(environment: dict[str, str]) -> Iterator[FrontEnd]:
    started = FrontEnd(environment)
    yield started
    started.client.stop_channels()
    started.manager.shutdown_kernel(now=True)


def write(path: Path, *codes: str) -> None:
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, path)


def stored(path: Path) -> list[Any]:
    """All outputs of an executed notebook, and its widgets."""
    book = nbformat.read(path, 4)
    assert all(cell.execution_count for cell in book.cells)
    outputs = [output for cell in book.cells for output in cell.outputs]
    return [(one.output_type, dict(one.get("data", {}))) for one in outputs] + [
        *book.metadata.get("widgets", {})
    ]


ANSWER = [("execute_result", {"text/plain": "2"})]


def bars(answers: list[dict[str, Any]]) -> bool:
    targets = {answer["content"].get("target_name") for answer in answers}
    return "jupyter.widget" in targets


def test_who_sent_the_request_decides(front_end: FrontEnd) -> None:
    assert bars(front_end.execute(STAGE))
    assert bars(front_end.execute(THREAD))
    assert front_end.execute(STAGE, by_hand=False) == []
    assert front_end.execute(THREAD, by_hand=False) == []
    assert bars(front_end.execute("work()"))
    answers = front_end.execute(WHOLE)
    assert bars(answers)
    # Full, though a part of what was to do came from the store.
    (said,) = [one["content"]["text"] for one in answers if one["msg_type"] == "stream"]
    assert said == "1.0 1.0\n"


def test_papermill_started_from_a_kernel_stores_no_bars(
    front_end: FrontEnd, tmp_path: Path
) -> None:
    notebook = tmp_path / "in.ipynb"
    write(notebook, STAGE, THREAD, "1 + 1")
    library, shell = tmp_path / "library.ipynb", tmp_path / "shell.ipynb"
    assert bars(front_end.execute(STAGE))
    front_end.execute(
        f"import papermill\n"
        f"_ = papermill.execute_notebook({str(notebook)!r}, {str(library)!r}, progress_bar=False)"
    )
    front_end.execute(f"!papermill --no-progress-bar {notebook} {shell}")
    assert stored(library) == stored(shell) == ANSWER


@pytest.mark.parametrize(
    "command",
    [
        "jupyter nbconvert --to notebook --execute --output out.ipynb in.ipynb",
        pytest.param("jupyter execute --output=out.ipynb in.ipynb", marks=pytest.mark.full),
        pytest.param("papermill in.ipynb out.ipynb", marks=pytest.mark.full),
    ],
)
def test_no_command_stores_bars(command: str, environment: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "in.ipynb", STAGE, LIBRARIES, "1 + 1")
    done = subprocess.run(
        command.split(), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "out.ipynb") == ANSWER
    # The lines are for the terminal.
    assert "Phase 1: loss 2" in done.stderr


@pytest.mark.parametrize(("mode", "said"), [("lines", 1), ("bar", 1), ("none", 0)])
def test_a_line_is_told_to_whoever_is_there(
    mode: str, said: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CVFP_PROGRESS", mode)
    progress.tell("Training takes about 10 minutes")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("Training takes about 10 minutes\n") == said
    assert (err == "") == (said == 0)


# Many runs as one whole


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a log."""
    monkeypatch.setenv("CVFP_PROGRESS", "lines")
    lines: list[str] = []
    monkeypatch.setattr(progress, "_write", lines.append)
    return lines


def test_the_time_left_goes_by_work(clock: Clock, said: list[str]) -> None:
    with Whole("Sweep", 3, 1000) as whole:
        whole.begin(100)
        clock.now += 30
        whole.finish(False, {"samples": 100, "val_ppl": 150.04})
        whole.begin(400)
        whole.finish(True, {})  # from the store: 400 less to do
        whole.begin(500)
    assert said == [
        "Sweep: 1 of 3 runs, 04:30 left, samples 100, val_ppl 150",
        "Sweep: 2 of 3 runs, 02:30 left",
    ]


def test_phases_count_into_the_whole_and_have_no_lines_of_their_own(
    clock: Clock, said: list[str]
) -> None:
    with Whole("Sweep", 1, 100) as whole:
        whole.begin(100)
        with Stage("Table", 10) as table:
            table.advance(10, {"loss": 1.0})
        with Stage("Phase 1", 10) as first:
            clock.now += 59
            first.advance(5, {"loss": 1.0})  # a quarter of the run
            progress.tell("Training takes about 10 minutes")
            clock.now += 1
            first.advance(0)
            clock.now += 60
            first.advance(5)
        with Stage("Phase 2", 1000, unit="tok") as second:
            clock.now += 60
            second.advance(500)
    assert said == [f"Sweep: 0 of 1 runs, {left} left" for left in ("03:00", "02:00", "01:00")]
    with Stage("Phase 1", 10) as alone:
        alone.advance(1, {"loss": 1.0})
    assert said[3:] == ["Phase 1: loss 1"]


def test_a_run_of_one_phase_is_not_half_done_at_its_start(clock: Clock, said: list[str]) -> None:
    with Whole("Sweep", 1, 100) as whole:
        whole.begin(100)
        with Stage("Phase 2", 10) as second:
            clock.now += 60
            second.advance(1)
    assert said == ["Sweep: 0 of 1 runs, 09:00 left"]


def test_a_whole_within_a_whole_counts_into_it(clock: Clock, said: list[str]) -> None:
    with Whole("Choosing", 4, 400) as outer:
        for _ in range(2):
            with Whole("Sweep", 2, 200) as inner:
                assert inner is outer
                for _ in range(2):
                    inner.begin(100)
                    with Stage("Phase 2", 2) as stage:
                        clock.now += 60
                        stage.advance(1)
                    inner.finish(False, {})
    counts = [line.split(", ")[0] for line in said]
    assert counts == [f"Choosing: {n} of 4 runs" for n in (0, 1, 1, 2, 2, 3, 3, 4)]
    with Whole("Sweep", 1, 1) as after:
        assert after is not outer


@pytest.mark.parametrize("mode", ["bar", "lines", "none"])
def test_no_thread_stays(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVFP_PROGRESS", mode)
    monkeypatch.setattr(progress.Bar, "monitor", None)  # an earlier bar's would do for this one
    before = set(threading.enumerate())
    with Whole("Sweep", 1, 1) as whole, Stage("Phase 1", 3) as stage:
        whole.begin(1)
        stage.advance(1, {"loss": 1.0})
        whole.finish(False, {})
    assert set(threading.enumerate()) == before


def test_the_bar_of_a_whole_has_the_time_left(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CVFP_PROGRESS", "bar")
    with Whole("Sweep", 2, 200) as whole:
        whole.begin(100)
        clock.now += 30
        with Stage("Phase 1", 4) as stage:
            stage.advance(1, {"loss": 1.0})
        whole.finish(False, {"val_ppl": 150.0})
    err = capfd.readouterr().err
    assert "Phase 1:  25%" in err  # below, while somebody looks
    assert "Sweep  50%" in err
    assert "1 of 2 runs, 00:30 left, val_ppl 150" in err


def test_a_sweep_is_one_whole(tiny: Experiment, said: list[str]) -> None:
    tiny = tiny.replace(phase2_learning_rate=0.0123)  # no other test's, which the store would have
    cvfp.sweep(tiny, samples=[6], seed=[42, 43])
    lines = [line for line in said if not line.startswith("Table")]
    assert [line.split(",")[0] for line in lines] == [f"Sweep: {n} of 2 runs" for n in (1, 2)]
    assert "00:00 left, samples 6, seed 43, val_ppl" in lines[1]
    said.clear()
    cvfp.sweep(tiny, samples=[6], seed=[42, 43])
    assert [line.partition(", val_ppl")[0] for line in said] == [
        f"Sweep: {n} of 2 runs, samples 6, seed {41 + n}" for n in (1, 2)
    ]


def test_choosing_is_one_whole(tiny: Experiment, said: list[str]) -> None:
    base = tiny.replace(selection="development", development_samples=2)
    tuning.choose(base, [6], 2, kinds=[tuning.ZERO.format(1)])
    lines = [line for line in said if not line.startswith("Table")]
    assert [line.split(",")[0] for line in lines] == [f"Choosing: {n} of 2 runs" for n in (1, 2)]


def test_how_progress_is_shown_is_no_part_of_a_key() -> None:
    assert not {"progress", "sweep", "tuning", "packs", "card"} & set(store.RUN_CODE)
