"""What README, CONTRIBUTING and docs say is there: the first code block runs as pasted, names and files exist."""

import importlib
import re
from pathlib import Path

import pytest
import typer
import yaml

from graphcomb.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "graph|passes|runtime|graphcomb|tests|benchmarks|recipes|docs|examples"
EXAMPLES = ("scale_biases", "engines/reference", "my_norm")  # files that a page shows whole, and that are not there
# Smaller than what the page says, to be quick.
SMALL = {
    "trained_digits()": "trained_digits(width=16, epochs=1)",
    "epochs=10": "steps=4",
    "program])": "program], seconds=1)",
}


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_code_block_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))
    code = code_blocks(ROOT / "README.md")[0]
    for text, small in SMALL.items():
        assert text in code
        code = code.replace(text, small)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    error, ratio = capsys.readouterr().out.splitlines()[-2:]
    assert float(error) <= 1e-10
    assert ratio == "None" or float(ratio) > 0
    assert (tmp_path / "small.onnx").is_file()


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


def test_the_commands_of_the_ci_page_exist() -> None:
    page = yaml.safe_load((ROOT / "docs" / "ci.yml").read_text())
    steps = page["jobs"]["gate"]["steps"]
    commands = [step["run"].split()[1:] for step in steps if step.get("run", "").startswith("graphcomb ")]
    assert [name for name, *_ in commands] == ["check", "run", "build", "bench"]
    known = {command.name: command for command in typer.main.get_command(app).commands.values()}
    for name, *words in commands:
        options = {text for parameter in known[name].params for text in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_the_lines_of_the_examples_are_counted():
    page = (ROOT / "docs" / "start" / "migrating.md").read_text()
    rows = re.findall(r"`(examples/\w+\.py)`[^|]*\| (\d+) \|", page)
    assert len(rows) == 4
    for name, lines in rows:
        text = (ROOT / name).read_text().splitlines()
        assert sum(bool(line.split("#")[0].strip()) for line in text) == int(lines), name
