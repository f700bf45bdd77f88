"""A short suite on another PyTorch, in an environment of its own: `make test-torch VERSION=2.11.0`.

The environment has that torch and its torchvision alone; everything else comes from .venv. The result is a row of
torch_versions.md.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTES = Path(__file__).with_suffix(".md")
SUITE = (
    "tests/graph/test_compat.py", "tests/graph/test_edit.py", "tests/graph/capture/test_archive.py",
    "tests/graph/capture/test_writes.py", "tests/graph/comb/test_contributing.py", "tests/graph/comb/test_reasons.py",
    "tests/graph/comb/test_rules.py", "tests/passes/test_split_fused.py",
)  # fmt: skip
LIBRARIES = """
import importlib.metadata
from packaging.requirements import Requirement
known = {d.metadata["Name"]: d.version for d in reversed(list(importlib.metadata.distributions()))}
for r in map(Requirement, importlib.metadata.requires("torch") or ()):
    if r.name.startswith("nvidia-") and not r.specifier.contains(known.get(r.name, "0")):
        print(f"{r.name}{r.specifier}")
"""
VERSIONS = """
import platform, torch
try:
    from torchvision import __version__ as vision
except ImportError:
    vision = "none"
print(torch.__version__, vision, platform.python_version())
"""
HEAD = """# Versions of PyTorch

Results of `make test-torch VERSION=...`: the short suite that `torch_versions.py` lists, which goes through capture, the
comb, surgery, the oracle, saving and most private names in `graph/compat.py`.

| torch | torchvision | Python | date | result |
|---|---|---|---|---|
"""


def environment(version: str) -> Path:
    """The Python of an environment with that torch, made if it is not there."""
    folder = ROOT / ".cache" / f"torch-{version}"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=False, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        beside = sysconfig.get_paths()["purelib"]
        (site / "rest.pth").write_text(f"import site; site.addsitedir({beside!r})\n")
        vision = f"torchvision==0.{int(version.split('.')[1]) + 15}.*"
        options = "install -q --no-deps --ignore-installed".split()
        install = [sys.executable, "-m", "pip", "--python", str(python), *options]
        subprocess.run([*install, f"torch=={version}"], check=True)
        libraries = subprocess.run([python, "-c", LIBRARIES], capture_output=True, text=True, check=True).stdout.split()
        if libraries:  # that this torch does not run with as they are in .venv
            subprocess.run([*install, *libraries], check=True)
        if subprocess.run([*install, vision]).returncode:  # not released yet: tests that need it skip
            (site / "torchvision.py").write_text("raise ModuleNotFoundError('no torchvision for this torch')\n")
        (folder / "done").touch()
    return python


def main(version: str) -> int:
    """Run the suite and note the result; the exit code is pytest's."""
    python = environment(version)
    tested = subprocess.run([python, "-m", "pytest", *SUITE, "-W", "ignore"], cwd=ROOT, capture_output=True, text=True)
    print(tested.stdout[-6000:])
    lines = tested.stdout.strip().splitlines()
    failed = [line.split()[1].rpartition("::")[2] for line in lines if line.startswith("FAILED ")]
    last = ": ".join([lines[-1].strip("= "), *([", ".join(failed)] if failed else [])])
    found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    old = NOTES.read_text().splitlines() if NOTES.exists() else []
    rows = {row.split("|")[1].strip(): row for row in old if row.startswith("| 2")}
    rows[found[0]] = f"| {' | '.join([*found, datetime.date.today().isoformat(), last])} |"
    NOTES.write_text(HEAD + "".join(f"{rows[key]}\n" for key in sorted(rows)))
    return tested.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
