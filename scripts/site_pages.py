"""Puts README and other files that lie beside docs/ into the site, with links that still lead."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "src/fedalt/assets/tiny-base/README.md",
    "examples/quickstart.ipynb",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files under the paths that they have in the repository."""
    for path in BESIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """On the site docs/ is the root: what lies in it, and beside it, is reached from there."""
    return markdown.replace("](docs/", "](").replace("](../", "](")
