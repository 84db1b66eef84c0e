"""A mkdocs hook: formulas become MathML when the pages are built, so that they need no script and
no network; what is wider than a phone scrolls within a box of its own.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula of a page."""
    return FORMULA.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    """Return a formula as MathML; one on a line of its own stands in a box that scrolls."""
    latex = html.unescape(found[3])
    if found[2] == "[":
        return f'<div class="formula" tabindex="0">{convert(latex, display="block")}</div>'
    return convert(latex, display="inline")
