"""Files of the site that are not in docs/: README, CONTRIBUTING, CHANGELOG, the API reference, a script for the search.

The reference has a section for each folder of src/recondense and a page for each module. A new module needs no change
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from recondense import _MODULES as PUBLIC_NAMES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "recondense"
AT_THE_TOP = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
# README and CONTRIBUTING stand above docs/ in the repository and beside its pages on the site.
LINKS = {"](docs/": "](", "](../": "](", "](README.md": "](index.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and the reference to the navigation."""
    for page, name in AT_THE_TOP.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "LICENSE", abs_src_path=str(ROOT / "LICENSE")))
    script = ROOT / "docs" / "site" / "iframe-worker.js"
    files.append(File.generated(config, "assets/iframe-worker.js", abs_src_path=str(script)))
    config.nav = [*(config.nav or ()), {"API reference": list(_reference(PACKAGE, files, config))}]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the pages of the site."""
    if not page.file.src_uri.startswith("reference/"):
        for link, target in LINKS.items():
            markdown = markdown.replace(link, target)
    return markdown


def _reference(folder: Path, files: Files, config: MkDocsConfig) -> Iterator[str | dict[str, Any]]:
    """The navigation of a folder: its own page, a page for each module, a section for each folder in it."""
    yield _page(folder / "__init__.py", files, config)
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield {path.stem: _page(path, files, config)}
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield {inner.name: list(_reference(inner, files, config))}


def _page(path: Path, files: Files, config: MkDocsConfig) -> str:
    """Add the page of a module.

    Returns:
        its address on the site.
    """
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    address = f"reference/{'/'.join('index' if part == '__init__' else part for part in parts)}.md"
    content = _public_names() if path.parent == PACKAGE and path.stem == "__init__" else f"::: {name}\n"
    files.append(File.generated(config, address, content=f"# {name}\n\n{content}"))
    return address


def _public_names() -> str:
    """The page of the package: the public names in the order of the seven steps, not of their imports."""
    options = "    options: {show_root_heading: true, show_root_full_path: false}\n"
    names = [f"::: {PACKAGE.name}.{module}.{name}\n{options}" for name, module in PUBLIC_NAMES.items()]
    return "\n".join([f"::: {PACKAGE.name}\n    options: {{members: false}}\n", *names])
