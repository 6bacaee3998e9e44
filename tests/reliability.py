"""What the tests of reliability tried, and what came of it, as a page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence

import pytest

from cvfp import ops

INTRODUCTION = """# Reliability

What was injected and tried, and what came of it. Written by `make reliability` from the tests named
below, which count what they tried once they have passed: a result that is lost, a figure that
differs from an undisturbed run's, an error that names no cause, or a resume that ends elsewhere
fails its test, and would be listed here.
"""


def page(reports: Sequence[pytest.TestReport]) -> str:
    """Markdown: a row for each kind of fault, and the tests that failed."""
    counts: dict[str, Counter[str]] = {}
    files: dict[str, set[str]] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "tally" and report.passed and isinstance(value, (tuple, list)):
                kind, figures = value
                counts.setdefault(kind, Counter()).update(figures)
                files.setdefault(kind, set()).add(report.nodeid.partition("::")[0])
    failed = sorted({report.nodeid for report in reports if report.failed})
    rows = [
        f"| {kind} | {figures['tried']:,} | {others(figures)} | {', '.join(sorted(files[kind]))} |"
        for kind, figures in sorted(counts.items())
    ]
    passed = sum(report.passed for report in reports if report.when == "call")
    lost = (
        f"{len(failed)} tests failed: {', '.join(failed)}."
        if failed
        else "Results lost: 0. Wrong figures accepted: 0. Errors without a cause: 0. Resumes that "
        "differed: 0."
    )
    return "\n".join(
        [
            INTRODUCTION,
            f"{passed} tests passed, Python {platform.python_version()}, {ops.processor()}. {lost}",
            "",
            "| what | tried | of these | tests |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def others(figures: Counter[str]) -> str:
    named = {name: value for name, value in figures.items() if name != "tried"}
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in named.items())
