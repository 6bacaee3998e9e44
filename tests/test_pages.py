"""`make report`: pages that load nothing, whose links lead somewhere, with no script but theirs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup, Tag
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from benchmarks import pages, study

EVIL = "<script>alert('a conversation')</script>"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
STUDY = """
[03_scaling_500]
notebook = "03_scaling"
setting = "mini"
parameters = { samples = 500, seeds = 42 }
picture = true
spot = { samples = 50, seed = 42 }

[06_controls]
notebook = "06_controls"
setting = "published_size"
parameters = { seeds = "0,1" }
needs_gpu = true
spot = { samples = 50, seed = 0 }
"""
ENTRY: dict[str, Any] = dict(
    commit="abc1234", confirmed=None, date="2026-11-23", device=f"a GPU {EVIL}", fingerprint=None
)
ENTRY |= dict(notebook=None, parameters={}, seconds=65.1, spot=None, torch="2.13")


def executed(source: str, **data: Any) -> Any:
    mime = {name.replace("_", "/", 1): value for name, value in data.items()}
    output = new_output("execute_result", data={"text/plain": "", **mime}, execution_count=1)
    return new_code_cell(source, outputs=[output], execution_count=1)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A reports/ and a notebooks/, small, with what a corpus may bring into outputs."""
    reports, notebooks = tmp_path / "reports", tmp_path / "notebooks"
    (notebooks / "x").mkdir(parents=True)
    reports.mkdir()
    table = f"<table border='1'><tr><th>text</th></tr><tr><td>{EVIL}</td></tr></table>"
    book = new_notebook(
        cells=[
            new_markdown_cell(
                "# Scaling\n\n[the log](LOG.md), [nowhere](gone.md), [a page](#part)"
            ),
            new_markdown_cell(
                "## Part\n\n[out](https://example.org) ![far](http://example.org/x.png)"
            ),
            new_code_cell(f"print({EVIL!r})", outputs=[new_output("stream", text=EVIL)]),
            executed("frame", text_html=f"<style>b {{}}</style>{table}"),
            executed("html", text_html="<img src=http://example.org/y.png onerror='alert(1)'>"),
            executed("plain", text_plain=EVIL),
            executed("figure", image_png=PNG),
            executed("widget", **{pages.WIDGET: {"model_id": "0"}, "text_plain": "VBox()"}),
            executed("ran", text_html="<table><tr><th>corpus</th><td>chitchat</td></tr></table>"),
            new_markdown_cell("## Reading"),
            executed("read", text_markdown=f"**Law.** It fell. {EVIL}"),
        ]
    )
    nbformat.write(book, reports / "03_scaling_500.ipynb")
    nbformat.write(book, notebooks / "03_scaling.ipynb")
    (reports / "study.toml").write_text(STUDY)
    (reports / "study.json").write_text(json.dumps({"03_scaling_500": ENTRY}))
    kept = json.loads((study.REPORTS / "claims.json").read_text())
    kept[0]["words"] = kept[0]["ran_on"] = EVIL
    (reports / "claims.json").write_text(json.dumps(kept))
    (reports / "LOG.md").write_text(f"# Log\n\n[a report](03_scaling_500.ipynb)\n\n{EVIL}\n")
    (reports / "reliability.md").write_text(
        "# Reliability\n\n| what | tried |\n|---|---|\n| a | 1 |\n"
    )
    return reports, notebooks


@pytest.fixture(params=[False, True], ids=["folder", "one"])
def built(
    request: pytest.FixtureRequest, folders: tuple[Path, Path], tmp_path: Path
) -> dict[Path, BeautifulSoup]:
    """Every file that was made, read again."""
    first = pages.build(*folders, tmp_path / "out", one=request.param)
    files = sorted((tmp_path / "out").rglob("*.html"))
    assert first in files
    assert len(files) == (1 if request.param else 5)
    return {file: BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser") for file in files}


def loads(soup: BeautifulSoup) -> list[str]:
    """What a browser would fetch for a page, besides what is in it."""
    found = [
        str(one[name])
        for name in ("src", "srcset", "data", "poster")
        for one in soup.select(f"[{name}]")
    ]
    found += [str(one.get("href")) for one in soup.select("link, use, image, base")]
    styles = [one.string or "" for one in soup("style")] + [
        str(one["style"]) for one in soup.select("[style]")
    ]
    found += [part for style in styles for part in re.findall(r"@import|url\([^)]*", style)]
    return [one for one in found if not one.startswith("data:")]


def test_nothing_is_loaded(built: dict[Path, BeautifulSoup]) -> None:
    for soup in built.values():
        assert loads(soup) == []
        assert not soup.select("iframe, object, embed, form, [http-equiv=refresh]")
        # The page's own policy: its style and its script, by their content.
        (policy,) = soup.select("[http-equiv=Content-Security-Policy]")
        (script,), (style,) = soup("script"), soup("style")
        content = str(policy["content"])
        assert content.startswith("default-src 'none'; img-src data:;")
        for kind, tag in (("script", script), ("style", style)):
            assert f"{kind}-src 'sha256-{pages.digest(tag.string or '')}'" in content


def test_what_would_be_loaded_is_found() -> None:
    soup = BeautifulSoup(
        "<img src='http://a/b.png'><script src='https://c/d.js'></script><link href='e.css'>"
        "<style>@import 'f'; b { background: url(g.png) }</style><img src='data:x'>",
        "html.parser",
    )
    assert len(loads(soup)) == 5


def test_links_lead_somewhere(built: dict[Path, BeautifulSoup]) -> None:
    followed = 0
    for file, soup in built.items():
        for link in soup.select("a"):
            there, _, mark = str(link["href"]).partition("#")
            if there.startswith("https://"):
                continue
            target = (file.parent / there).resolve() if there else file
            assert target in built, link
            assert not mark or built[target].find(id=mark), link
            followed += 1
    assert followed > 10
    ids = [one["id"] for soup in built.values() for one in soup.select("[id]")]
    assert len(ids) == len(set(ids))
    words = " ".join(soup.get_text() for soup in built.values())
    assert "nowhere" in words  # its words stay, the link goes
    assert "far" in words


def test_what_a_corpus_brings_is_text(built: dict[Path, BeautifulSoup]) -> None:
    for soup in built.values():
        assert len(soup("script")) == 1
        assert not [
            tag for tag in soup.find_all(True) if any(n.startswith("on") for n in tag.attrs)
        ]
    words = " ".join(soup.get_text() for soup in built.values())
    assert words.count(EVIL) >= 8
    assert "VBox" not in words


def find(built: dict[Path, BeautifulSoup], selector: str) -> list[Tag]:
    return [one for soup in built.values() for one in soup.select(selector)]


def test_the_front_has_ledger_figures_and_commands(built: dict[Path, BeautifulSoup]) -> None:
    rows = find(built, "#front-claims tbody tr")
    verdicts = [str(row["data-verdict"]) for row in rows]
    kept = json.loads((study.REPORTS / "claims.json").read_text())
    assert sum(one != "not run" for one in verdicts) == len(kept)
    assert verdicts.count("contradicts") == sum(one["direction"] == "contradicts" for one in kept)
    for name, values in (
        ("verdict", set(verdicts)),
        ("setting", {str(r["data-setting"]) for r in rows}),
    ):
        (select,) = find(built, f"select[data-field={name}]")
        assert values <= {option.get_text() for option in select("option")}
    words = " ".join(one.get_text() for one in find(built, "#index"))
    assert "Law. It fell." in words  # under the setting that it is of
    assert "setting mini · on a GPU" in words
    assert "make study ONLY=06_controls" in words
    assert "torch" in words
    commands = [one.get_text() for one in find(built, ".anew pre")]
    assert (
        "papermill notebooks/03_scaling.ipynb out.ipynb -p preset mini -p samples 500 -p seeds 42"
        in commands
    )


def test_what_it_ran_on_folds_and_tables_scroll(built: dict[Path, BeautifulSoup]) -> None:
    tables = find(built, "table")
    assert all(table.find_parent(class_="scroll") for table in tables)
    assert all("Scaling" in str(one["alt"]) or one["alt"] == "Part" for one in find(built, "img"))
    ran = [one for one in tables if one.get_text(" ", strip=True).startswith("corpus")]
    assert len(ran) == 2
    assert all(one.find_parent("details") for one in ran)


def test_pages_of_before_go(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pages.build(*folders, out)
    (folders[0] / "LOG.md").unlink()
    pages.build(*folders, out)
    assert not (out / "pages" / "LOG.html").exists()


# The repository's own, in a browser


@pytest.mark.full
def test_the_reports_are_small_and_ask_nobody(tmp_path: Path) -> None:
    """Made of what the repository has; opened in Chromium, whose log names all that was asked."""
    index = pages.build(study.REPORTS, study.NOTEBOOKS, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 25e6
    one = pages.build(study.REPORTS, study.NOTEBOOKS, tmp_path, one=True)
    assert one.stat().st_size < 15e6
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    asked = tmp_path / "asked.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    for file in (index, one, *sorted((tmp_path / "pages").glob("*.html"))):
        command = [browser, *flags, f"--log-net-log={asked}", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        # The browser's own errands have no page that asks for them.
        sent = re.findall(r'"initiator":"([^"]*)"', asked.read_text(encoding="utf-8"))
        assert {one for one in sent if one != "not an origin"} == set(), file
        soup = BeautifulSoup(done.stdout, "html.parser")
        assert len(soup.select("button.csv")) == len(soup("table")), file  # so the script ran
