"""The last results of slow tests as a table: python tests/slow_results.py JUNIT.xml TABLE.md

Files that this run did not touch keep the row they had, so that the table may be filled in parts.
"""

import datetime
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HEAD = [
    "# Last results of `make test-slow`\n",
    "Each file's slow tests with when and at which commit they ran; no GPU.\n",
    "| file | tests | passed | skipped | seconds | did not pass | when |",
    "| --- | ---: | ---: | ---: | ---: | --- | --- |",
]


def rows(report: Path) -> dict[str, str]:
    """By file, a row: how many passed, the seconds they took, what did not pass by its name, and when."""
    files: dict[str, list[tuple[str, str, float]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = next(iter(kinds), "passed")
        files.setdefault(case.attrib["classname"].replace(".", "/") + ".py", []).append(
            (case.attrib["name"], outcome, float(case.attrib["time"]))
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    when = f"{datetime.date.today()}, {commit}, torch {version('torch')}, {os.cpu_count()} cores"
    found = {}
    for file, cases in files.items():
        count = {kind: sum(outcome == kind for _, outcome, _ in cases) for kind in ("passed", "skipped")}
        bad = ", ".join(name for name, outcome, _ in cases if outcome in ("failure", "error"))
        seconds = f"{sum(seconds for _, _, seconds in cases):.0f}"
        cells = [file, len(cases), count["passed"], count["skipped"], seconds, bad, when]
        found[file] = "| " + " | ".join(map(str, cells)) + " |"
    return found


def earlier(table: Path) -> dict[str, str]:
    """The rows that the table has, of files that are still there."""
    lines = table.read_text().splitlines() if table.exists() else []
    found = {line.split()[1]: line for line in lines if line.startswith("| tests/")}
    return {file: line for file, line in found.items() if Path(file).exists()}


if __name__ == "__main__":
    path = Path(sys.argv[2])
    found = earlier(path) | rows(Path(sys.argv[1]))
    path.write_text("\n".join([*HEAD, *(found[file] for file in sorted(found))]) + "\n")
