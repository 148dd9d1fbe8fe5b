"""What MkDocs adds to the pages in `docs/`: the generated reference, and the documents that stand at the top.

MkDocs calls these functions by name while `make docs` builds the site.
"""

import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Documents at the top, which the site has beside the pages of docs/.
AT_THE_TOP = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of `docs/`."""
    for name in AT_THE_TOP:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for name, text in reference.pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links between `docs/` and the top, which hold in the repository, into links that hold on the site."""
    return re.sub(r"\]\((?:\.\./(?=[A-Z])|docs/)", "](", markdown)
