"""A mkdocs hook: formulas become MathML when the pages are built, so that they need no script and
no network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula of a page."""
    return FORMULA.sub(
        lambda m: convert(html.unescape(m[3]), "block" if m[2] == "[" else "inline"), content
    )
