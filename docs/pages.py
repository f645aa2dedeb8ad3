"""What mkdocs is told beyond mkdocs.yml: pages that stand elsewhere in the repository, formulas.

README, CONTRIBUTING, CHANGELOG, SECURITY, the notebook and what benchmarks wrote are pages of the
site as they are. Links to them, which work in the repository, are turned to where they are in the
site; of a link to a source its words are left.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/distil_an_agent.ipynb": "distil_an_agent.ipynb",
}
RESULTS = "bench/results"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)((?:#[^)\s]*)?)\)")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def in_site(path: str) -> str:
    """Where a file of the repository is in the site, or its path as it was."""
    if path in MOVED:
        return MOVED[path]
    if path.startswith(f"{RESULTS}/"):
        return path.removeprefix("bench/")
    return path.removeprefix("docs/")


def in_repository(path: str) -> str:
    """The other way."""
    for source, target in MOVED.items():
        if path == target:
            return source
    return f"bench/{path}" if path.startswith("results/") else f"docs/{path}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    results = (path for kind in ("md", "png") for path in (ROOT / RESULTS).rglob(f"*.{kind}"))
    for source in (*MOVED, *(str(path.relative_to(ROOT)) for path in results)):
        path = ROOT / source
        files.append(File.generated(config, in_site(source), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = in_repository(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        picture, said, path, anchor = match.groups()
        source = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        target = in_site(source)
        if files.get_file_from_path(target) is None and (ROOT / source).exists():
            return said  # a source: it is in the repository, and no page
        target = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{picture}[{said}]({target}{anchor})"

    return LINK.sub(turned, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match["kind"] == "[" else "inline"
        return convert(html.unescape(match["tex"]), display=display)

    return FORMULA.sub(formula, content)
