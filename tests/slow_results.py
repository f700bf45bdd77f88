"""The last result of `make test-slow` as a table: python tests/slow_results.py JUNIT.xml TABLE.md"""

import datetime
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree


def table(report: Path) -> str:
    """Each file's slow tests with how many passed and the seconds they took; what did not pass by its name."""
    files: dict[str, list[tuple[str, str, float]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = next(iter(kinds), "passed")
        files.setdefault(case.attrib["classname"].replace(".", "/") + ".py", []).append(
            (case.attrib["name"], outcome, float(case.attrib["time"]))
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# Last result of `make test-slow`\n",
        f"{datetime.date.today()}, commit {commit}, torch {version('torch')}, {os.cpu_count()} cores, no GPU.\n",
        "| file | tests | passed | skipped | seconds | did not pass |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for file, cases in sorted(files.items()):
        count = {kind: sum(outcome == kind for _, outcome, _ in cases) for kind in ("passed", "skipped")}
        bad = ", ".join(name for name, outcome, _ in cases if outcome in ("failure", "error"))
        seconds = sum(seconds for _, _, seconds in cases)
        lines.append(f"| {file} | {len(cases)} | {count['passed']} | {count['skipped']} | {seconds:.0f} | {bad} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(table(Path(sys.argv[1])))
