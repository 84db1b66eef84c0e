"""The README as a package index shows it: there, links into the repository need an address."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)]+)\)")


class Readme(MetadataHookInterface):
    """Gives the package its long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the README, with every relative link made a link to the repository."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute(text, metadata["urls"]["Source"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, repository: str) -> str:
    """Return Markdown whose relative links lead to a repository; pictures to their raw files."""

    def linked(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        view = "blob"
        if picture:
            view = "raw"
        return f"{picture}{words}({repository}/{view}/main/{path})"

    return LINK.sub(linked, text)
