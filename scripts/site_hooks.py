"""What the docs' site needs beyond the files in docs/, as hooks of MkDocs.

Pages are written for a reader of the repository: they link to files outside docs/ and show pictures by <picture>. Here
README, CHANGELOG and others become pages, linked files are copied into the site, links follow, and a picture becomes
two images, of which the theme shows the one of its colours. A link that leads nowhere stays as it is, and the strict
build refuses it.
"""

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "results/README.md": "records.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
PICTURE = re.compile(
    r"<picture>\s*<source [^>]*srcset=\"(?P<dark>[^\"]+)\"[^>]*>\s*"
    r"<img src=\"(?P<light>[^\"]+)\" alt=\"(?P<alt>[^\"]*)\">\s*</picture>"
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and files that lie outside docs/."""
    pages = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    pages += [ROOT / source for source in PAGES]
    wanted = set(PAGES)
    for page in pages:
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            target = _target(page, match["path"])
            if target is not None and not target.startswith("docs/"):
                wanted.add(target)
    for target in sorted(wanted):
        files.append(File.generated(config, _site_path(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links into the site, and shows each picture in the theme's colours."""
    uri = page.file.src_uri
    source = ROOT / SOURCES.get(uri, f"docs/{uri}")

    def moved(match: re.Match[str]) -> str:
        target = _target(source, match["path"])
        if target is None:
            return match[0]
        link = os.path.relpath(_site_path(target), os.path.dirname(uri) or ".")
        return link.replace(os.sep, "/") + (match["anchor"] or "")

    text = PICTURE.sub(_two_images, markdown)
    return LINK.sub(moved, text)


def _two_images(match: re.Match[str]) -> str:
    alt = " ".join(match["alt"].split())
    return f"![{alt}]({match['light']}#only-light)\n![{alt}]({match['dark']}#only-dark)"


def _target(page: Path, link: str) -> str | None:
    """The linked file, from the root of the repository; None if there is no such file."""
    path = Path(os.path.normpath(page.parent / link))
    return path.relative_to(ROOT).as_posix() if path.is_file() and path.is_relative_to(ROOT) else None


def _site_path(target: str) -> str:
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"
