"""What README, CONTRIBUTING and docs say is there: names and files exist. Code blocks: test_book.py."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "graph|passes|runtime|graphcomb|tests|benchmarks|recipes|docs|examples"
EXAMPLES = ("scale_biases", "engines/reference", "my_norm")  # files that a page shows whole, and that are not there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.-]*\w/?", text) + re.findall(r"\]\(([^)#:]+)\)", text)
    missing = {name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()}
    assert not {name for name in missing if not any(example in name for example in EXAMPLES)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_that_are_imported_exist(page: Path) -> None:
    text = page.read_text()
    for line in re.findall(r"^from graphcomb\S* import .*$", text, re.MULTILINE):
        exec(line, {})
    for path in set(re.findall(r"\bgraphcomb(?:\.[a-zA-Z_]\w*)+", text)):
        found, *parts = path.split(".")
        value = importlib.import_module(found)
        for part in parts:
            found = f"{found}.{part}"
            value = getattr(value, part) if hasattr(value, part) else importlib.import_module(found)


def test_the_lines_of_the_examples_are_counted():
    page = (ROOT / "docs" / "start" / "migrating.md").read_text()
    rows = re.findall(r"`(examples/\w+\.py)`[^|]*\| (\d+) \|", page)
    assert len(rows) == 4
    for name, lines in rows:
        text = (ROOT / name).read_text().splitlines()
        assert sum(bool(line.split("#")[0].strip()) for line in text) == int(lines), name
