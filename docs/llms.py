"""A mkdocs hook: the site has a map of itself in plain text, for language models.

``llms.txt`` lists every page of the navigation with its first sentence, ``llms-full.txt`` holds
the text of all of them.
"""

import re
from collections.abc import Iterator
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

FOREWORD = """# {name}

> {description}. Python package `flowspace`; PyTorch, and JAX arrays for the core.

Conventions everywhere: t = 0 is data, t = 1 is noise, s is the destination, 0 <= s <= t <= 1.
A model is any callable `model(z_t, t, s, **cond)` on states `(B, *)` and times `(B,)`. A loss is
made once and called as `loss_fn(model, latents, targets, cond={{...}})`; it returns `.loss` of
shape `(B,)`, `.prediction` and `.target`. `loss_fn.flow_map(model).sample(noise, cond={{...}})`
samples.

All pages in one file: [llms-full.txt](llms-full.txt)
"""


def on_files(files: Files, config: Any) -> Files:
    """Add both files to the site."""
    name, description = config.site_name, config.site_description
    short = [FOREWORD.format(name=name, description=description)]
    full = [f"# {name}\n"]
    for section, title, page in listed(config.nav):
        file = files.get_file_from_path(page)
        if file is None:
            raise PluginError(f"got {page} in the navigation; there is no such page")
        text = file.content_string  # of a page on disk, or of one that a hook made
        if section:
            short.append(f"\n## {section}\n")
        short.append(f"- [{title}]({address(page)}): {first_sentence(text)}")
        full.append(f"\n<!-- {page} -->\n\n{text}")
    for path, lines in (("llms.txt", short), ("llms-full.txt", full)):
        files.append(File.generated(config, path, content="\n".join(lines) + "\n"))
    return files


def listed(nav: list[Any], section: str = "") -> Iterator[tuple[str, str, str]]:
    """Return the title and the file of every page, and its section where one begins."""
    for entry in nav:
        [(title, value)] = entry.items()
        if isinstance(value, list):
            yield from listed(value, title)
        else:
            yield section, title, value
            section = ""


def address(page: str) -> str:
    """Return where the built page is, from the site's root."""
    return page.removesuffix("index.md").replace(".md", "/") or "./"


def first_sentence(text: str) -> str:
    """Return the first sentence of a page that is prose, without marks of Markdown."""
    text = re.sub(r"<!--.*?-->|^```.*?^```|^<.*?>$", "", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in text.split("\n\n"):
        prose = " ".join(paragraph.split())
        if re.match(r"[A-Za-z`*\"]", prose):
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|[*]", r"\1", prose)
            return re.split(r"(?<=\w\w[.?!]) |(?<=[)`][.?!]) ", plain)[0].rstrip(":,")
    return ""
