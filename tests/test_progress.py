"""Bars for people who watch, and nothing in a notebook that is executed, however it was started."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupyter_client
import nbformat
import pytest

from cvfp import progress

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
