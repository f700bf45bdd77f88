"""The layout of the repository: packages are all installed, and imports point one way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = CONFIG["tool"]["setuptools"]["package-dir"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The packages as a wheel would lay them out: graph/ becomes graphcomb/graph/."""
    for package, folder in FOLDERS.items():
        target = tmp_path.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for file in (ROOT / folder).glob("*.py"):
            shutil.copy(file, target)
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess:
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--config",
        str(ROOT / "pyproject.toml"),
        "--no-cache",
    ]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": "", "NO_COLOR": "1"}, capture_output=True, text=True
    )


def test_every_package_is_listed_for_installation() -> None:
    found = {
        str(init.parent.relative_to(ROOT))
        for top in ("graphcomb", "graph", "passes", "runtime")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(FOLDERS.values())
    assert sorted(CONFIG["tool"]["setuptools"]["packages"]) == sorted(FOLDERS)


def test_every_data_file_is_listed_for_installation() -> None:
    patterns = CONFIG["tool"]["setuptools"]["package-data"]
    for package, folder in FOLDERS.items():
        listed = {path for pattern in patterns.get(package, []) for path in (ROOT / folder).glob(pattern)}
        data = {p for p in (ROOT / folder).iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert data == listed


def test_imports_point_one_way(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("graph/program.py", "from ..passes import base"),
        ("runtime/__init__.py", "from ..passes import base"),
        ("passes/base.py", "from ..cli import main"),
        ("passes/base.py", "import graphcomb"),
    ],
)
def test_a_wrong_arrow_is_caught(tree: Path, file: str, line: str) -> None:
    path = tree / "graphcomb" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout
