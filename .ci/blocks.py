"""Print the code blocks of a language in the README and the guides, so that CI runs what readers read."""

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


def main(language: str) -> None:
    """Print the blocks of all pages; blocks of `language` on another page would never be run, so they are refused."""
    pages = read_pages()
    others = [path for path in DOCS.rglob("*.md") if path not in pages]
    if hidden := [path.name for path in others if blocks(path.read_text(encoding="utf-8"), language)]:
        sys.exit(f"{', '.join(hidden)}: {language} blocks that are not run; mark them console or text")
    print("\n".join(block for text in pages.values() for block in blocks(text, language)), end="")


if __name__ == "__main__":
    main(sys.argv[1])
