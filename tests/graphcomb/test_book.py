"""Every code block of the book runs, those in lists too. Blocks of a page share one scope, in order, in an empty folder.

Comments of HTML in a page, which readers do not see, say what its blocks need:

    <!-- setup          code that makes what the page takes as the reader's own (model, loader); ends with a line -->
    <!-- small: A -> B -->   in what follows, A is replaced by B, so that it is quick
    <!-- needs: timm -->     the page is skipped without this package
    <!-- slow -->            the page is run by `make test-slow`
    <!-- output -->          the next text block is what the block before it prints; ... stands for any text
    <!-- output: any numbers -->   so, but numbers may differ

Of the commands that NOT_RUN lists, and of those within the text, the names and options are looked up. Recipes are read.
"""

import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from graphcomb.cli.app import app, main
from graphcomb.recipe import parse_recipe

NOT_RUN = {  # words of commands that no test of a page runs, and why
    "make": "installs packages; `make demo` is tested in test_demo.py",
    "pip": "installs packages",
    "python examples/ultralytics_yolo.py": "trains a YOLO; examples are tested in tests/examples",
    "trtexec": "is a tool of TensorRT, which needs a GPU",
    "graphcomb bench": "has no figure on a busy machine, or measures on a device by ssh",
    "graphcomb build small.onnx --target orin-nx": "builds on the device; here it ends after the list, with exit code 2",
    "bundle/results.json": "comes from a device",
}
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOKEN = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$|^ *<!-- (?P<key>small|needs|slow|output)(?:: (?P<value>.*?))? -->$"
    r"|^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    language: str
    code: str
    line: int
    output: bool = False
    numbers: bool = False  # whether those of the output are compared


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page in order, setups as python, with what comments ask for applied."""
    small: list[tuple[str, str]] = []
    marks: dict[str, str] = {}
    for token in TOKEN.finditer(text):
        line = text[: token.start()].count("\n") + 2
        if token["setup"] is not None:
            yield Block("python", token["setup"], line)
        elif token["key"] == "small":
            before, _, after = token["value"].partition(" -> ")
            assert before in text[token.end() :], f"small: no {before!r} in what follows"
            small.append((before, after))
        elif token["key"]:
            marks[token["key"]] = token["value"] or ""
        else:
            code = textwrap.dedent(token["code"])  # a block in a list is indented
            for before, after in small:
                code = code.replace(before, after)
            numbers = marks.get("output") != "any numbers"
            yield Block(token["language"], code, line, "output" in marks, numbers)
            marks.clear()


def values(text: str, key: str) -> list[str]:
    return [token["value"] for token in TOKEN.finditer(text) if token["key"] == key]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def of_page(page: Path) -> object:
    slow = [pytest.mark.slow] if values(page.read_text(), "slow") else []
    return pytest.param(page, id=name_of(page), marks=slow)


RUNNING = [page for page in PAGES if any(b.language in ("python", "bash") for b in blocks(page.read_text()))]


def pattern(block: Block) -> str:
    """What a block's output has to match: spaces are alike, ... is any text, numbers only if they are compared."""
    wanted = ".*".join(re.escape(" ".join(part.split())) for part in block.code.split("...")).replace(r"\ ", " ?")
    return wanted if block.numbers else re.sub(r"\d[\d,]*(\\?\.\d+)?", r"(?:\\d[\\d,.]*|None)", wanted)


def commands(code: str) -> list[list[str]]:
    """The words of each line of a bash block."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def runs(words: list[str]) -> bool:
    line = " ".join(words)
    return not any(line.startswith(part) or part in words for part in NOT_RUN)


@pytest.mark.parametrize("page", [of_page(page) for page in RUNNING])
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    text = page.read_text()
    for package in values(text, "needs"):
        pytest.importorskip(package)
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)  # that of another page
    scope: dict = {"__name__": "__page__"}
    printed = ""
    for block in blocks(text):
        if block.language == "python":
            capfd.readouterr()
            # Padded, so that a traceback has the page's line numbers.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), scope)
            printed = capfd.readouterr().out
        elif block.language == "bash":
            capfd.readouterr()
            for words in filter(runs, commands(block.code)):
                assert words[0] == "graphcomb", f"line {block.line}: {' '.join(words)}: run it, or list it in NOT_RUN"
                code = main(words[1:])
                shown = capfd.readouterr()
                assert code == 0, f"line {block.line}: {' '.join(words)}: {shown.err}"
                printed = shown.out
        elif block.output:
            assert re.fullmatch(pattern(block), " ".join(printed.split()), re.DOTALL), f"line {block.line}: {printed}"


def check_command(words: list[str]) -> None:
    """Assert that a command of graphcomb or a target of make exists, with its options."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), f"{' '.join(words)}: no target"
        return
    name, *rest = rest
    known = {command.name: command for command in typer.main.get_command(app).commands.values()}
    assert name in known, f"{name}: no command"
    options = {text for parameter in known[name].params for text in parameter.opts} | {"--help"}
    assert {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)} <= options, " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    text = page.read_text()
    lines = [words for block in blocks(text) if block.language == "bash" for words in commands(block.code)]
    named = [shlex.split(found) for found in re.findall(r"`(graphcomb\s[a-z][^`]*|make\s[a-z-]+)`", text)]
    for words in lines + named:
        if words[0] in ("graphcomb", "make"):
            check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_are_valid(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "yaml":
            parse_recipe({"model": "package:model", **yaml.safe_load(block.code)})


def test_what_is_not_run_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [part for part in NOT_RUN if part not in text]


def test_the_commands_of_the_ci_job_exist() -> None:
    job = yaml.safe_load((ROOT / "docs" / "ci.yml").read_text())
    steps = [
        step["run"].split() for step in job["jobs"]["gate"]["steps"] if step.get("run", "").startswith("graphcomb ")
    ]
    assert [name for _, name, *_ in steps] == ["check", "run", "build", "bench"]
    for words in steps:
        check_command(words)


def test_every_page_is_in_the_navigation() -> None:
    def pages(part: object) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from pages(child)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(nav)) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))
