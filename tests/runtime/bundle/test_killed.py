"""A run on a device, for which ONNX Runtime stands in, is ended at random moments: the results are whole or absent, no
process stays, and neither does a temporary file once the next run has begun."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphcomb.graph.errors import BadInput
from graphcomb.runtime.device_results import read_results

MOMENTS = [random.Random(0).uniform(0.05, 2.5) for _ in range(10)]  # seconds after the start
ENDS = {
    "interrupt": lambda process: process.send_signal(signal.SIGINT),
    "kill": lambda process: process.kill(),
    "lost connection": lambda process: process.stdin.close(),
}
OPTIONS = [
    "--engine",
    "onnxruntime",
    "--rounds",
    "40",
    "--seconds",
    "1",
    "--power-seconds",
    "0.2",
    "--idle-seconds",
    "0.3",
]


def processes(mark):
    """The processes that have a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes() and "Z" not in (folder / "stat").read_text()[:40]:
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("moment", [*range(4), *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 10))])
def test_a_run_that_is_cut_off_leaves_whole_results_and_no_process(bundle, tmp_path, moment):
    (tmp_path / "tools").mkdir()
    tool = tmp_path / "tools" / "tegrastats"
    line = "RAM 2505/7775MB GR3D_FREQ 45% cpu@38.25C VDD_IN 4880mW/4880mW VDD_SOC 1400mW/1400mW"
    tool.write_text(f'#!/bin/sh\nwhile :; do echo "{line}"; sleep 0.05; done\n')
    tool.chmod(0o755)
    out, mark = tmp_path / "results.json", f"MARK-{os.getpid()}-{moment}"
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {
        "PATH": f"{tmp_path}/tools:/usr/bin:/bin", "TMPDIR": str(tmp_path / "temporary"), "GRAPHCOMB_TEST": mark
    }  # fmt: skip
    command = [sys.executable, str(bundle / "kit.pyz"), "--out", str(out), "--attached", "--quiet", *OPTIONS]

    def start():
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )

    process = start()
    time.sleep(MOMENTS[moment])
    ENDS[list(ENDS)[moment % len(ENDS)]](process)
    process.wait(60)
    for _ in range(200):
        if not processes(mark):
            break
        time.sleep(0.05)
    assert processes(mark) == []
    try:
        found = read_results(out)
    except BadInput as error:
        assert "no such file" in str(error).lower()  # noqa: PT017  not one that is cut off
    else:
        assert all(row["latency"] for row in found["models"].values())
    assert not list((tmp_path / "temporary").glob("graphcomb*"))  # ONNX Runtime leaves a file of its own
    if moment == 1:  # killed: the next run is not disturbed by what is left
        (tmp_path / ".results.json.999999999.part").write_text("{")
        process = start()
        assert process.wait(60) == 0
        process.stdin.close()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "temporary", "tools"]
