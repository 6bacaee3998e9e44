"""JupyterLab in a browser: what a person presses, and sees.

`make test-browser` runs it. It needs Chromium and playwright, and is skipped without them; with
CVFP_BROWSER set to `required` it fails instead. The pictures of a failure are left in the folder
that CVFP_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = os.environ.get("CVFP_BROWSER") == "required"
PICTURES = Path(os.environ.get("CVFP_SCREENSHOTS", ROOT / ".cvfp-screenshots"))
MINUTE = 60_000  # of Playwright's milliseconds
LONG = 5 * MINUTE  # nothing is timed here: what takes so long never comes
SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are there to be looked at
}

pytestmark = pytest.mark.browser
try:
    from playwright import sync_api
except ImportError:
    sync_api = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Iterator[str]:
    """The address of a JupyterLab on loopback, with copies of the notebooks and its token in it."""
    if sync_api is None or CHROMIUM is None:
        words = "needs Chromium, and playwright: make test-browser"
        pytest.fail(words) if REQUIRED else pytest.skip(words)
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "reports").symlink_to(ROOT / "reports")
    for name, settings in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    environment = {name: value for name, value in os.environ.items() if name != "CVFP_PROGRESS"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    command += ["--ip=127.0.0.1", f"--ServerApp.root_dir={folder}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not (
                found := re.search(r"http://127\S+/lab\?token=\w+", (folder / "log").read_text())
            ):
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
            yield found[0]
        finally:
            server.terminate()
            server.wait(30)


@contextmanager
def opened(lab: str, name: str) -> Iterator[Any]:
    """A page with the notebook; raises AssertionError: the console, or a cell, has an error."""
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
        try:
            page.goto(lab.replace("/lab?", f"/lab/tree/notebooks/{name}.ipynb?"))
            page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=LONG)
            page.get_by_text(IDLE).wait_for(timeout=LONG)
            yield page
            assert [line for line in said if not line.startswith(OF_JUPYTER)] == []
            assert page.locator(ERRORS).count() == 0, page.locator(ERRORS).all_inner_texts()
        except BaseException:
            PICTURES.mkdir(exist_ok=True)
            page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
            raise
        finally:
            browser.close()


# JupyterLab's own, where a restart comes before its debugger was asked.
OF_JUPYTER = ("Could not restore the debugger state",)
IDLE = "Python 3 (ipykernel) | Idle"  # in the status bar, once there is a kernel
STDERR = "[data-mime-type='application/vnd.jupyter.stderr']"
ERRORS = "[data-mime-type='application/vnd.jupyter.error']"
CELLS = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .jp-InputPrompt"


def executed(page: Any) -> None:
    """Wait until every cell has run in this kernel."""
    # The first cell is folded, and has no number to be seen.
    done = """selector => {
        const every = [...document.querySelectorAll(selector)].map(one => one.textContent.trim());
        const seen = every.filter(text => text && text != "[1]:");
        return seen.length > 1 && seen.every((text, place) => text == `[${place + 2}]:`)
    }"""
    page.wait_for_function(done, arg=CELLS, timeout=LONG)
    page.get_by_text(IDLE).wait_for(timeout=LONG)


def menu(page: Any, name: str, entry: str) -> None:
    page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile(f"^{entry}")).first.click()


def test_explore_as_a_person_does(lab: str) -> None:
    with opened(lab, "07_explorer") as page:
        menu(page, "Run", "Run All Cells")
        page.get_by_role("button", name="Run", exact=True).wait_for(timeout=LONG)
        executed(page)
        figure = page.locator(".cvfp img")
        assert figure.count() == 0

        samples = page.get_by_label("samples", exact=True)
        samples.fill("60")
        samples.press("Enter")
        page.get_by_role("button", name="Run", exact=True).click()
        page.locator(".cvfp img[alt*='Converged']").wait_for(timeout=LONG)
        seen = figure.first.get_attribute("src")
        other = "seen => document.querySelector('.cvfp img').src != seen"
        page.wait_for_function(other, arg=seen, timeout=LONG)
        page.get_by_role("button", name="Stop", exact=True).click()
        page.get_by_text("stopped before its end").wait_for(timeout=LONG)
        page.get_by_text(IDLE).wait_for(timeout=LONG)

        samples.fill("4")
        samples.press("Enter")
        page.get_by_role("button", name="Run", exact=True).click()
        page.locator(".cvfp-text span").first.wait_for(timeout=LONG)
        text = page.locator(".cvfp textarea")
        before = text.input_value()
        page.get_by_role("button", name="Next token").click()
        longer = "before => document.querySelector('.cvfp textarea').value.length > before.length"
        page.wait_for_function(longer, arg=before, timeout=LONG)
        assert text.input_value().startswith(before)

        page.get_by_role("button", name="Look again").click()
        page.locator(".cvfp select option", has_text="chitchat").first.wait_for(timeout=LONG)
        page.locator(".cvfp select[multiple]").select_option(index=0)
        page.locator(".cvfp img[alt*='val_ppl']").wait_for(timeout=LONG)
        page.locator(".cvfp-card summary").first.click()
        page.locator(".cvfp-card a").first.wait_for(timeout=LONG)
        menu(page, "Run", "Run All Cells")
        executed_again = "count => document.querySelectorAll('.cvfp img').length >= count"
        page.wait_for_function(executed_again, arg=figure.count(), timeout=LONG)
        assert page.locator(STDERR).count() == 0


def test_the_quickstart_from_a_restart(lab: str) -> None:
    with opened(lab, "01_quickstart") as page:
        menu(page, "Kernel", "Restart Kernel and Run All Cells")
        page.locator(".jp-Dialog .jp-mod-accept").click()
        page.locator(CELLS, has_text="[*]:").first.wait_for(timeout=LONG)
        executed(page)
