"""Write out the code blocks of a language in the README and the guides, so that CI runs what readers read."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def read_pages() -> dict[Path, str]:
    """The pages whose blocks are run, in the order of the site: README, index, and the guides that the index lists."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    guides = re.findall(r"^guides/.+$", index, re.MULTILINE)
    paths = (ROOT / "README.md", DOCS / "index.md", *(DOCS / f"{guide}.md" for guide in guides))
    return {path: path.read_text(encoding="utf-8") for path in paths}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of `language` in Markdown."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def main(language: str, folder: Path) -> None:
    """Write a file of blocks for each page that has any; where they would never be run, refuse them."""
    pages = read_pages()
    others = [path for path in DOCS.rglob("*.md") if path not in pages]
    if hidden := [path.name for path in others if blocks(path.read_text(encoding="utf-8"), language)]:
        sys.exit(f"{', '.join(hidden)}: {language} blocks that are not run; mark them console or text")
    for path, text in pages.items():
        if found := blocks(text, language):
            (folder / f"{path.stem}.{language}").write_text("\n".join(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
