"""The documentation: what it links to is there, what it shows is run, and what is public is described."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import coreinfer_jax as ci
from benchmarks import first_page
from benchmarks.environment import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md"), REPOSITORY / "coreinfer_jax" / "assets" / "MODEL_CARD.md"]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(language: str, folder: Path) -> dict[str, str]:
    """The blocks of each page that has any, as .ci/run runs them."""
    subprocess.run([sys.executable, REPOSITORY / ".ci" / "blocks.py", language, folder], check=True)
    return {path.stem: text_of(path) for path in folder.glob(f"*.{language}")}


def anchors(page: Path) -> set[str]:
    """What GitHub and Sphinx make of the page's headings."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_first_page_is_short_and_shows_both_sides() -> None:
    readme = text_of(REPOSITORY / "README.md")
    assert len(readme.splitlines()) <= 150
    assert first_page.speed() in readme
    assert first_page.quality() in readme


def test_the_first_page_holds_the_set_up_and_every_command_is_one_line(tmp_path: Path) -> None:
    pages = blocks("sh", tmp_path)
    install, test = filter(None, pages["README"].splitlines())
    assert "coreinfer generate" in install
    assert "pytest" in test
    commands = [line for text in pages.values() for line in text.splitlines() if line]
    assert len(commands) > 20
    assert not [line for line in commands if line.endswith("\\")]


def test_the_python_blocks_of_a_page_are_one_script(tmp_path: Path) -> None:
    pages = blocks("python", tmp_path)
    assert len(pages) > 3
    for page, text in pages.items():
        compile(text, page, "exec")


def test_every_public_name_has_a_place_in_the_api_pages() -> None:
    page = text_of(DOCS / "api" / "main.md")
    assert set(ci.__all__) <= set(re.findall(r"^\.\. auto\w+:: coreinfer_jax\.(\w+)", page, re.MULTILINE))
