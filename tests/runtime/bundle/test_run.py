"""Running bundles, here and over ssh, for which scripts stand in."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.runtime.bundle import run
from graphcomb.runtime.bundle.run import run_bundle
from graphcomb.runtime.device_results import read_results
from graphcomb.runtime.kit import archived_files

from .toys import QUICK


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A folder that stands for the home on a device, and ssh and scp that reach it."""
    home, tools = tmp_path / "home", tmp_path / "tools"
    home.mkdir()
    tools.mkdir()
    scripts = {
        "ssh": f'[ "$1" = user@jetson ] || {{ echo "ssh: no route to host $1" >&2; exit 255; }}\ncd {home}\nexec sh -c "$2"',
        # scp [-q] [-r] source... destination; whatever lies on the host begins with its name and a colon
        "scp": f"""
while [ "${{1#-}}" != "$1" ]; do shift; done
for last; do :; done
strip() {{ case "$1" in user@jetson:*) echo "{home}/${{1#user@jetson:}}";; *) echo "$1";; esac; }}
while [ $# -gt 1 ]; do cp -r "$(strip "$1")" "$(strip "$last")" || exit 1; shift; done
""",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return home


CONTENTS = [
    "README.txt", "bundle.json", "compressed", "dense", "kit.pyz", "record.json",
]  # fmt: skip


def test_only_the_bundle_is_copied(bundle, device, tmp_path, monkeypatch):
    """A path with a colon would be one on a host called so."""
    shutil.copytree(bundle, tmp_path / "a:b")
    monkeypatch.chdir(tmp_path)
    for name in ("results.json", "dense-0123456789abcdef.engine", "other.engine", "report.html"):
        (tmp_path / "a:b" / name).write_text("of an earlier run")
    tool = tmp_path / "tools" / "scp"
    tool.write_text(tool.read_text().replace("strip()", 'case "$1" in user@jetson:*|/*) ;; *) exit 9;; esac\nstrip()'))
    tool.write_text(tool.read_text().replace("do cp -r", f'do echo "$1" >>{tmp_path}/sent; cp -r', 1))
    monkeypatch.setattr(run, "_engines", lambda results, described: [])
    found = run_bundle("a:b", "a:b/results.json", "user@jetson", QUICK, python=sys.executable)
    assert found["engine"] == "onnxruntime"
    assert not list(device.iterdir())  # nothing is left there
    sent = [name for name in (tmp_path / "sent").read_text().split() if "@" not in name]
    assert sorted(Path(name).name for name in sent) == sorted([*CONTENTS, "dense-0123456789abcdef.engine"])


def test_a_bundle_of_an_older_version_goes_with_its_own_modules(bundle, device, tmp_path):
    shutil.copytree(bundle, tmp_path / "older")
    (tmp_path / "older" / "kit.pyz").unlink()
    for path, text in archived_files().items():
        name = Path(path).name
        text = text.replace("from .", "from graphcomb_")
        if name != "__init__.py":
            old = {"bench.py": "bench_device.py"}.get(name, f"graphcomb_{name}")
            (tmp_path / "older" / old).write_text(text)
    found = run_bundle(tmp_path / "older", tmp_path / "r.json", "user@jetson", QUICK, python=sys.executable)
    assert list(found["models"]) == ["dense", "compressed"]


def test_a_device_is_reached_by_ssh(bundle, device, tmp_path):
    found = run_bundle(bundle, tmp_path / "out" / "r.json", "user@jetson", QUICK, python=sys.executable)
    assert found == read_results(tmp_path / "out" / "r.json")
    assert not list(device.iterdir())
    with pytest.raises(GraphcombError, match=r"ssh user@elsewhere failed: ssh: no route to host"):
        run_bundle(bundle, tmp_path / "r.json", "user@elsewhere", QUICK)
    with pytest.raises(GraphcombError, match=r"kit.pyz on user@jetson failed: .*argument --seconds"):
        run_bundle(bundle, tmp_path / "r.json", "user@jetson", ["--seconds", "soon"], python=sys.executable)


STANDIN = """
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
folder = os.path.dirname(out)
results = {"format": "graphcomb-bench/1", "failed": {}, "models": {"dense": {"engine": {"file": "dense-0.engine"}}}}
def write():
    with open(out, "w") as file:
        json.dump(results, file)
%s
"""
PARTLY = """
results["failed"]["compressed"] = "no tactic"
for end in ("", ".json"):
    with open(os.path.join(folder, "dense-0.engine" + end), "w") as file:
        file.write("engine")
write()
print("error: compressed: no tactic", file=sys.stderr)
sys.exit(1)
"""
SLOWLY = """
for end in ("", ".json"):
    with open(os.path.join(folder, "dense-0.engine" + end), "w") as file:
        file.write("engine")
open(os.path.join(folder, "started"), "w").close()
sys.stdin.read()  # until whoever started this ends it
results["interrupted"] = True
WRITE
sys.exit(130)
"""


@pytest.fixture
def standin(bundle, tmp_path):
    """The bundle with another script in it."""

    def make(code):
        folder = tmp_path / "standin"
        shutil.copytree(bundle, folder)
        (folder / "kit.pyz").write_text(STANDIN % code)
        return folder

    return make


@pytest.mark.parametrize("host", [None, "user@jetson"])
def test_results_of_some_of_the_models_come_back_with_their_engines(standin, device, tmp_path, host):
    out = tmp_path / "out" / "r.json"
    found = run_bundle(standin(PARTLY), out, host, python=sys.executable)
    assert found["failed"] == {"compressed": "no tactic"}
    assert (tmp_path / "out" / "dense-0.engine").read_text() == "engine"
    (tmp_path / "standin" / "kit.pyz").write_text("import sys\nprint('error: why', file=sys.stderr)\nsys.exit(1)")
    with pytest.raises(GraphcombError, match="failed: why"):  # and not the results of before
        run_bundle(tmp_path / "standin", out, host, python=sys.executable)


@pytest.mark.parametrize("host", [None, "user@jetson"])
@pytest.mark.parametrize("write", ["write()", "pass"])
def test_an_interrupt_brings_back_what_was_measured(standin, device, tmp_path, host, write):
    """Ctrl-C goes to all processes at once, also to ssh."""
    folder, out = standin(SLOWLY.replace("WRITE", write)), tmp_path / "out" / "r.json"
    (tmp_path / "out").mkdir()
    code = (
        "import sys\nfrom graphcomb.runtime import run_bundle\n"
        f"try:\n    found = run_bundle({str(folder)!r}, {str(out)!r}, {host!r}, python=sys.executable)\n"
        "    print('interrupted' if found['interrupted'] else 'whole')\n"
        "except KeyboardInterrupt:\n    print('nothing')\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    for _ in range(1200):
        if any(tmp_path.glob("out/started")) or any(device.glob("*/started")):
            break
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    said = child.communicate(timeout=60)[0]
    assert said == ("interrupted\n" if write == "write()" else "nothing\n")
    assert out.is_file() == (write == "write()")


def test_results_cannot_lie_below_a_file(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--out: .*/file/x cannot be made \("):
        run_bundle(bundle, tmp_path / "file" / "x" / "r.json", arguments=QUICK)


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "user@jetson:folder", "two words", ""])
def test_a_host_is_a_host(bundle, tmp_path, host):
    with pytest.raises(BadInput, match=r"--host .*: expected user@device"):
        run_bundle(bundle, tmp_path / "r.json", host)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BadInput, match="not a bench bundle"):
        run_bundle(tmp_path, tmp_path / "r.json")


def test_without_ssh_it_says_so(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="ssh: not installed here"):
        run_bundle(bundle, tmp_path / "r.json", "user@jetson")
