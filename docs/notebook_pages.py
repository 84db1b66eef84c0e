"""A mkdocs hook: every notebook, with what it printed and drew, is a page of the site.

A notebook is ``docs/notebooks/NAME.ipynb``; its page is ``notebooks/NAME.md``, whose pictures lie
beside it, and the notebook itself is there to be downloaded.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).parent / "notebooks"
DOWNLOAD = "\n\n[This notebook](../notebooks/{name}.ipynb), to run and to change.\n"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook."""
    exporter = MarkdownExporter()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, resources = exporter.from_filename(
            str(path), resources={"output_files_dir": f"{path.stem}_files"}
        )
        name = f"notebooks/{path.stem}"
        page = text.strip() + DOWNLOAD.format(name=path.stem)
        files.append(File.generated(config, f"{name}.md", content=page))
        files.append(File.generated(config, f"{name}.ipynb", abs_src_path=str(path)))
        for picture, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
    return files
