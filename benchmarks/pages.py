"""What was measured as pages to read: no network, and no server, only a browser.

python -m benchmarks.pages          reports/index.html, and the rest in reports/pages/
python -m benchmarks.pages --one    reports/cvfp.html alone: all in one file, to send

Notebooks go through nbconvert; the templates, the style and the script are in reports/template/.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import bleach
import jinja2
import nbformat
from bs4 import BeautifulSoup
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from benchmarks import blocks, study
from cvfp import cache
from cvfp.analysis import claims, ledger

TEMPLATE = study.REPORTS / "template"
STYLES = ("default", "monokai")  # of code, in light and in dark
TEXTS = {
    "claims": "The claims of the notes, one by one",
    "performance": "Performance",
    "reliability": "Reliability",
    "LOG": "What was tried",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
# What may stand in an output; all else is shown as the text that it is.
TAGS = "a abbr b blockquote br caption code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i img"
TAGS += " li ol p pre small span strong sub summary sup svg polyline table tbody td tfoot th thead"
TAGS += " tr ul"
ATTRIBUTES = {
    "*": ["class", "id", "title"],
    "a": ["href"],
    "img": ["src", "alt", "width", "height"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan"],
    "svg": ["viewBox", "viewbox", "width", "height", "role", "aria-label"],
    "polyline": ["points", "fill", "stroke", "stroke-width"],
}


@dataclass
class Page:
    """A report, a notebook or a text; `made` says on what, `anew` by which commands."""

    name: str
    title: str
    kind: Literal["report", "notebook", "text"]
    file: Path
    book: NotebookNode
    made: Mapping[str, str | None] = field(default_factory=dict)
    anew: Sequence[str] = ()
    picture: str | None = None
    body: str = ""
    reading: str = ""


@dataclass(frozen=True)
class Site:
    """Pages, each with its address as seen from another: `to(name, here)`."""

    pages: Sequence[Page]
    one: bool

    def to(self, name: str, here: str) -> str:
        if self.one:
            return f"#{name}"
        if name == "index":
            return "index.html" if here == "index" else "../index.html"
        return f"pages/{name}.html" if here == "index" else f"{name}.html"


def pages(reports: Path, notebooks: Path) -> list[Page]:
    """What there is: reports in the order of study.toml, notebooks, texts."""
    found, known, listed = [], study.entries(reports), study.reports(reports)
    for name, one in listed.items():
        file = reports / f"{name}.ipynb"
        if not file.exists():
            continue
        entry, book = known.get(name, {}), nbformat.read(file, 4)
        made = {"setting": one.setting, "on": entry.get("device"), "made": entry.get("date")}
        made |= {"commit": entry.get("commit"), "torch": entry.get("torch")}
        page = Page(name, title(book, name), "report", file, book, made, [*anew(one)])
        picture = reports / f"{name}.png"
        if picture.exists():
            page.picture = base64.b64encode(picture.read_bytes()).decode()
        found.append(page)
    for file in sorted(notebooks.glob("*.ipynb")):
        book = nbformat.read(file, 4)
        found.append(Page(f"notebook_{file.stem}", title(book, file.stem), "notebook", file, book))
    for name, words in TEXTS.items():
        file = reports / f"{name}.md"
        if file.exists():
            found.append(Page(name, words, "text", file, text(file.read_text(encoding="utf-8"))))
    return found


def title(book: NotebookNode, otherwise: str) -> str:
    """A notebook's first heading."""
    lines = [line for cell in book.cells[:1] for line in cell.source.splitlines()]
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), otherwise)


def text(markdown: str) -> NotebookNode:
    """A text as a notebook: it goes the same way."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(markdown)])


def named(book: NotebookNode) -> NotebookNode:
    """The notebook with its figures named by the headings above them, for who does not see them,
    and without widgets, which need a kernel, and without what installs."""
    heading = ""
    book.cells = [one for one in book.cells if "setup" not in one.metadata.get("tags", [])]
    for cell in book.cells:
        if cell.cell_type == "markdown":
            heads = [line for line in cell.source.splitlines() if line.startswith("#")]
            heading = heads[-1].lstrip("# ") if heads else heading
        else:
            cell.metadata.setdefault("alt", heading)
            cell.outputs = [one for one in cell.outputs if WIDGET not in one.get("data", {})]
    return book


def anew(report: study.Report) -> tuple[str, str]:
    """The commands that make a report anew: with its entry, and the notebook alone."""
    words = ["papermill", f"notebooks/{report.notebook}.ipynb", "out.ipynb"]
    for name, value in {"preset": study.PRESETS[report.setting], **report.parameters}.items():
        words += ["-p", name, str(value)]
    return f"make study ONLY={report.name}", shlex.join(words)


def reading(book: NotebookNode) -> str:
    """The sentences that a notebook wrote of its numbers, under its heading "Reading"."""
    heads = [i for i, cell in enumerate(book.cells) if cell.source.startswith("## Reading")]
    after = book.cells[heads[0] :] if heads else []
    outputs = [one for cell in after if cell.cell_type == "code" for one in cell.outputs]
    said = [
        str(one.data["text/markdown"]) for one in outputs if "text/markdown" in one.get("data", {})
    ]
    return said[0] if said else ""


def clean(html: str) -> str:
    """What an output may hold; a script is shown as the text that it is."""
    soup = BeautifulSoup(str(html), "html.parser")
    for style in soup("style"):  # pandas' own
        style.decompose()
    kept = bleach.clean(str(soup), TAGS.split(), ATTRIBUTES, [*bleach.ALLOWED_PROTOCOLS, "data"])
    return str(kept)


def tidied(html: str, page: Page, site: Site, here: str) -> Markup:
    """A page's HTML with links that lead somewhere, ids of its own, no picture from elsewhere, and
    tables that scroll in themselves."""
    soup = BeautifulSoup(html, "html.parser")
    at = {one.file.resolve(): one.name for one in site.pages}
    for one in soup.find_all(id=True):
        one["id"] = f"{page.name}--{one['id']}"
    ids = {one["id"] for one in soup.find_all(id=True)}
    for link in soup.find_all("a"):
        href = str(link.get("href", ""))
        file, _, mark = href.partition("#")
        if href.startswith(("https://", "http://")):
            link["rel"] = "noreferrer"
        elif not file and f"{page.name}--{mark}" in ids:
            link["href"] = f"#{page.name}--{mark}"
        elif (there := at.get((page.file.parent / file).resolve())) is not None and file:
            link["href"] = site.to(there, here)
        else:
            link.unwrap()
    for picture in soup.find_all("img"):
        source = str(picture.get("src", ""))
        beside = page.file.parent / source if not source.startswith("data:") else None
        if beside is not None and beside.suffix == ".png" and beside.is_file():
            data = base64.b64encode(beside.read_bytes()).decode()
            picture["src"] = f"data:image/png;base64,{data}"
        elif beside is not None:
            picture.replace_with(str(picture.get("alt", "")))
    for table in soup.find_all("table"):
        frame = table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
        # What runs ran on, by notebooks from before it folded.
        first = table.find(["th", "td"], string=True)
        if first and first.string == "corpus" and not table.find_parent("details"):
            fold = frame.wrap(soup.new_tag("details"))
            fold.insert(0, soup.new_tag("summary", string="what it ran on"))
    return Markup(str(soup))


def converter() -> Callable[[NotebookNode], str]:
    """nbconvert with the template, a script in an output shown as text."""
    exporter = HTMLExporter(
        template_name=TEMPLATE.name,
        extra_template_basedirs=[str(TEMPLATE.parent)],
        filters={"clean_html": clean},
        sanitize_html=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    return lambda book: str(exporter.from_notebook_node(book)[0])


def rows(site: Site, reports: Path) -> list[dict[str, str | None]]:
    """The ledger: each part of a claim in each setting, measured or not."""
    kept = reports / "claims.json"
    judged = {one.key: one for one in claims.corrected(ledger.load(kept) if kept.exists() else [])}
    names, listed = [one.name for one in site.pages], study.reports(reports).values()
    made = []
    for id, part, setting in claims.KEYS:
        one, claim = judged.get((id, part, setting)), claims.CLAIMS[id]
        if one is None and setting == claims.OTHER:
            continue
        by = [r.name for r in listed if (r.notebook, r.setting) == (claim.notebook, setting)]
        made.append(
            {
                "claim": f"{id} {claim.title}",
                "part": f"{claim.parts[part].quantity}; the claim: {claim.parts[part].where}",
                "setting": setting,
                "verdict": one.direction if one else "not run",
                "measured": one.judged.partition(": direction")[0] if one else "–",
                "printed": claim.parts[part].printed,
                "sentence": claim.sentence,
                "page": next((name for name in by if name in names), None),
            }
        )
    return made


def listing(reports: Path) -> list[dict[str, str | None]]:
    """Every report of study.toml, with how it stands."""
    known, listed = study.entries(reports), []
    for name, one in study.reports(reports).items():
        entry = known.get(name)
        state = study.state(entry, one.made_of)
        row = {"name": name, "setting": one.setting, "needs": one.needs, "state": state}
        row |= {part: entry[part] if entry else None for part in ("date", "device")}
        listed.append({**row, "took": f"{entry['seconds'] / 60:.1f} min" if entry else None})
    return listed


def pins(requirements: Path) -> list[list[str]]:
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return [line.split("==") for line in lines if "==" in line and not line.startswith("#")]


def front(site: Site, reports: Path, render: Callable[[str], Markup]) -> dict[str, Any]:
    """What the front page shows besides its pages."""
    settings = [one for one in claims.SETTINGS if (reports / f"controls_{one}.json").exists()]
    tables = [
        {
            "title": f"Is it the contexts that do the work? ({one})",
            "body": render(blocks.controls(one, reports)),
        }
        for one in settings
    ]
    timed = (reports / "performance" / "h100.json").exists()
    faults = reports / "reliability.md"
    said = faults.read_text(encoding="utf-8").split("\n", 1)[1] if faults.exists() else ""
    return {
        "blocks": tables,
        "verdicts": render(blocks.verdicts(reports)) if (reports / "claims.json").exists() else "",
        "claims": rows(site, reports),
        "speed": render(blocks.speed(reports)) if timed else "",
        "reliability": render(said),
        "listed": listing(reports),
        "pins": pins(study.ROOT / "requirements.txt"),
    }


def build(reports: Path, notebooks: Path, out: Path, *, one: bool = False) -> Path:
    """Write the pages, or all in one file; where to begin reading."""
    site, convert = Site(pages(reports, notebooks), one), converter()
    for page in site.pages:
        here = "index" if one else page.name
        page.body = tidied(convert(named(page.book)), page, site, here)

    def rendered(page: Page) -> Callable[[str], Markup]:
        return lambda markdown: tidied(convert(text(markdown)), page, site, "index")

    for page in site.pages:
        if page.kind == "report" and (said := reading(page.book)):
            page.reading = rendered(page)(said)
    index = Page("index", "What was measured", "text", reports / "index.md", text(""))
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in STYLES)
    style = (TEMPLATE / "style.css").read_text(encoding="utf-8")
    style += f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"
    script = (TEMPLATE / "script.js").read_text(encoding="utf-8")
    shared = {
        "pages": site.pages,
        "names": [page.name for page in site.pages],
        "style": Markup(style),
        "script": Markup(script),
        "digests": {"style": digest(style), "script": digest(script)},
        "made": study.today(),
        "commit": study.commit() or "an unknown commit",
        **front(site, reports, rendered(index)),
    }
    loader = jinja2.FileSystemLoader(TEMPLATE)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)

    def write(file: Path, template: str, here: Page) -> Path:
        words = {"title": here.title, "page": here, "to": lambda name: site.to(name, here.name)}
        with cache.whole(file) as temporary:
            page = templates.get_template(template).render(shared | words)
            temporary.write_text(page, encoding="utf-8")
        return file

    if one:
        return write(out / "cvfp.html", "one.html.j2", index)
    shutil.rmtree(out / "pages", ignore_errors=True)
    for page in site.pages:
        write(out / "pages" / f"{page.name}.html", "page.html.j2", page)
    return write(out / "index.html", "folder.html.j2", index)


def digest(content: str) -> str:
    """As a page's policy names what it allows."""
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--one", action="store_true", help="all in one file")
    one = parser.parse_args().one
    made = build(study.REPORTS, study.NOTEBOOKS, study.REPORTS, one=one)
    files = [made] if one else [made, *(made.parent / "pages").glob("*")]
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{os.path.relpath(made)}: {len(files)} files, {size:.1f} MB")


if __name__ == "__main__":
    main()
