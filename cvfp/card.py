"""A Result as a notebook shows it: a line, a small table, two curves (card.html)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvfp.result import Result


def html(result: Result) -> str:
    """The Result in HTML; what comes from a corpus or a field is text there, whatever it holds."""
    import jinja2

    text = Path(__file__).with_name("card.html").read_text(encoding="utf-8")
    return jinja2.Template(text, autoescape=True).render(result=result)
