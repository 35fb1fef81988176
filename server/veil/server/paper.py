# SPDX-License-Identifier: Apache-2.0
"""A page of HTML that prints well: headings, paragraphs, notices and tables on A4.

Promises that every text is escaped, and that a page loads nothing: no script, no font, no picture from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_STYLE = """
@page{size:A4;margin:16mm 15mm}
body{font:10.5pt/1.42 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem;color:#1d2733}
h1{font-size:17pt;line-height:1.2;margin:0 0 .2rem}h2{font-size:12pt;margin:1.1rem 0 .3rem}p,ul{margin:.3rem 0}
table{border-collapse:collapse;width:100%;margin:.4rem 0;font-size:9.5pt}
th,td{text-align:left;vertical-align:top;padding:.2rem .5rem .2rem 0;border-bottom:1px solid #c9d1da}
code{font:9pt/1.3 ui-monospace,monospace;overflow-wrap:anywhere}
.notice{border:2px solid #a4262c;color:#a4262c;padding:.4rem .7rem;font-weight:600}.under{color:#5b6673;margin-top:0}
@media print{body{margin:0;padding:0;max-width:none}h2{break-after:avoid}tr,.notice{break-inside:avoid}}
"""


def sheet(title: str, *parts: str) -> str:
    """A whole page."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{_safe(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{_safe(title)}</h1>\n" + "\n".join(parts) + "\n</html>\n"
    )


def heading(text: str) -> str:
    """A heading of a section."""
    return f"<h2>{_safe(text)}</h2>"


def paragraph(text: str) -> str:
    """Running text."""
    return f"<p>{_safe(text)}</p>"


def under(text: str) -> str:
    """What stands below the title."""
    return f'<p class="under">{_safe(text)}</p>'


def notice(text: str) -> str:
    """What must not be overlooked."""
    return f'<p class="notice">{_safe(text)}</p>'


def code(text: str) -> str:
    """A command line, or a hash, on a line of its own."""
    return f"<p><code>{_safe(text)}</code></p>"


def points(texts: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{_safe(text)}</li>" for text in texts) + "</ul>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a cell is text."""
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _safe(text: str) -> str:
    """Escaped; what UTF-8 has no bytes for becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))
