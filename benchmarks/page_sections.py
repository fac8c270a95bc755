"""Sections of a Markdown page ("## heading"), which several programs write. Pure."""

from __future__ import annotations

import re


def section(page: str, heading: str) -> str | None:
    """What is under the heading, up to the next one; None: there is no such section."""
    found = re.search(_pattern(heading), page, re.MULTILINE | re.DOTALL)
    return None if found is None else found[1].strip()


def with_section(page: str, heading: str, body: str) -> str:
    """The page with `body` under the heading: in its place, or at the end where there was none."""
    text = f"## {heading}\n\n{body.strip()}\n"
    found = re.search(_pattern(heading), page, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{page.rstrip()}\n\n{text}"
    after = page[found.end() :].lstrip("\n")
    return page[: found.start()] + text + (f"\n{after}" if after else "")


def _pattern(heading: str) -> str:
    return rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)"
