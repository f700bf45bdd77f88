"""Run a bench bundle on this machine or, by ssh, on a device, and fetch its results. Source: ours."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ...graph.errors import BadInput, GraphcombError, nearest
from ...graph.files import read_json, replacing
from ..device_results import read_results
from ..kit import PLUGINS, SCRIPT
from ..kit.bench import INTERRUPTED
from ..kit.contents import digest
from ..kit.options import OPTIONS

PATIENCE = 60  # seconds after Ctrl-C within which the script must have written its results
OLD_SCRIPT = "bench_device.py"  # of bundles before the archive, with modules beside it
# What a device keeps for later runs.
KEPT = re.compile(
    r"\w+-[0-9a-f]{16}\.(engine|rtx)(\.json)?|timing-[\w.+-]+\.cache"
)  # what a device keeps for later runs
SOME = 1  # exit code of the script if it has results of some of the models only


def run_bundle(
    folder: str | Path,
    out: str | Path,
    host: str | None = None,
    arguments: Sequence[str] = (),
    python: str | None = None,
) -> dict[str, Any]:
    """Measure a bundle here or on a device, write the results to the file `out` and return them (docs/formats.md, Device).

    - folder: folder of the bundle. out: the JSON file to write.
    - host: "user@device", which ssh and scp reach with their own settings (keys, ports, jump hosts); None measures on
      this machine. Engines that TensorRT built on a host are copied to the folder of `out` with their descriptions and the
      timing cache, and from there to the host before the next run, which reuses them. The folder on the host is removed.
    - arguments: arguments of kit.pyz, which `script_arguments` makes from options.
    - python: the Python interpreter; by default the running one on this machine, python3 on a host.

    Models that failed are left out of the results, and `failed` has the reason for each. After Ctrl-C the results have what
    was measured before, and `interrupted` is true.

    Raises BadInput for a folder that is no bundle, an invalid host, an `out` that cannot be written, and a missing ssh or
    scp; GraphcombError with the script's reason if nothing could be measured; KeyboardInterrupt if Ctrl-C came before there
    were results.
    """
    folder, out = Path(folder).absolute(), Path(out).absolute()
    script = SCRIPT if (folder / SCRIPT).is_file() else OLD_SCRIPT
    if not (folder / "bundle.json").is_file() or not (folder / script).is_file():
        raise BadInput(f"{folder}: not a bench bundle; `graphcomb bundle` writes one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out: {out.parent} cannot be made ({error.strerror})") from error
    if host is None:
        before = _stamp(out)
        command = [python or sys.executable, str(folder / script), "--out", str(out), "--attached", *arguments]
        _measure(command, script, lambda: _stamp(out) != before)
        return read_results(out)
    if not host or host.startswith("-") or any(c.isspace() or c == ":" for c in host):
        raise BadInput(f"--host {host}: expected user@device")
    try:
        return _run_away(folder, script, out, host, arguments, python)
    finally:
        with contextlib.suppress(GraphcombError):  # without a connection it stays, with what was measured
            _call(["ssh", host, f"rm -rf {_away(folder)}"], f"ssh {host}")


def _away(folder: Path) -> str:
    """Return the name of the folder for a bundle in the home folder of a host."""
    return f"graphcomb-bench-{digest(folder / 'bundle.json')[:12]}"


def _run_away(
    folder: Path, script: str, out: Path, host: str, arguments: Sequence[str], python: str | None
) -> dict[str, Any]:
    """Measure a bundle on a host and fetch the results and engines."""
    away = _away(folder)
    _call(["ssh", host, f"mkdir -p {away} && rm -f {away}/results.json"], f"ssh {host}")
    _call(["scp", "-q", "-r", *map(str, _contents(folder, out.parent)), f"{host}:{away}/"], f"scp to {host}")
    command = [python or "python3", f"{away}/{script}", "--out", f"{away}/results.json", "--attached", *arguments]

    def fetch() -> bool:
        """Copy the results from the host to `out`; return whether there are any."""
        try:
            with replacing(out) as part:
                _call(["scp", "-q", f"{host}:{away}/results.json", str(part)], f"scp from {host}")
        except BadInput:
            raise
        except GraphcombError:
            return False
        return True

    if _measure(["ssh", host, shlex.join(command)], f"{script} on {host}", fetch) == 0 and not fetch():
        raise GraphcombError(f"scp from {host} failed: {away}/results.json is not there")
    results = read_results(out)
    for file in _engines(results, described=script == SCRIPT):
        with replacing(out.with_name(file)) as part:
            _call(["scp", "-q", f"{host}:{away}/{file}", str(part)], f"scp from {host}")
    return results


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return a value that changes when a file is replaced; None if there is no file."""
    status = path.stat() if path.exists() else None
    return (status.st_ino, status.st_mtime_ns) if status else None


def _engines(results: Mapping[str, Any], described: bool) -> list[str]:
    """Return the names of the engine files and timing caches that a device keeps beside its results. described: whether
    each engine has a description beside it."""
    engines = [row.get("engine", {}) for row in results["models"].values()]
    names = [str(engine.get("file", "")) for engine in engines]
    names += [f"{name}.json" for name in names if name and described]
    names += [str(engine["timing_cache"].get("file", "")) for engine in engines if engine.get("timing_cache")]
    return [
        name
        for name in dict.fromkeys(names)
        if name and PurePath(name).name == name and not name.startswith((".", "-"))
    ]


def _contents(folder: Path, kept: Path) -> list[Path]:
    """Return the files and folders that belong to a bundle, and the engines and caches of earlier runs in the folder `kept`;
    other files, such as results of measurements, are left out."""
    try:
        models = list(read_json(folder / "bundle.json")["models"])
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'bundle.json'}: no models; bundle them again") from error
    names = [SCRIPT, OLD_SCRIPT, "bundle.json", "README.txt", "record.json", PLUGINS, *models]
    parts = sorted(folder.glob("graphcomb_*.py"))  # the bundle of another version may have other scripts
    engines = [path for path in sorted(kept.iterdir()) if KEPT.fullmatch(path.name)] if kept.is_dir() else []
    return [*parts, *engines, *(folder / name for name in names if (folder / name).exists())]


def script_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options of kit.pyz as command-line arguments: {"dla": 0, "sparse": True} gives --dla=0 --sparse.

    Raises BadInput for an unknown option or an invalid value.
    """
    arguments: list[str] = []
    for option, value in options.items():
        name = option.replace("_", "-")
        if name not in OPTIONS:
            raise BadInput(f"option {option}: not one of the bench bundle; {nearest(name, OPTIONS)}")
        about = OPTIONS[name]
        if "action" in about:  # a switch
            if not isinstance(value, bool):
                raise BadInput(f"option {option}: true or false, not {value}")
            arguments += [f"--{name}"] * value
            continue
        try:
            about.get("type", str)(str(value))
        except (ValueError, ArgumentTypeError) as error:
            raise BadInput(f"option {option}: {error}") from error
        if str(value) not in map(str, about.get("choices", (value,))):
            raise BadInput(f"option {option}={value}: {nearest(str(value), about['choices'])}")
        arguments.append(f"--{name}={value}")
    return arguments


def _call(command: list[str], what: str) -> None:
    """Run a command, whose output is shown.

    Raises BadInput if the command is not installed, GraphcombError with its last line on stderr if it fails.
    """
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError as error:
        raise BadInput(f"{command[0]}: not installed here") from error
    if done.returncode:
        raise GraphcombError(f"{what} failed: {_last(done.stderr, done.returncode)}")


def _measure(command: list[str], what: str, results: Callable[[], bool]) -> int:
    """Run the script, here or over ssh, and return its exit code if there are results of at least some models.

    After Ctrl-C the script's standard input is closed, which tells it to write the results so far and to end. results:
    returns whether there are results.

    Raises BadInput if the command is not installed, GraphcombError with the script's last line on stderr if there are no
    results, KeyboardInterrupt if it was interrupted before there were any, or a second time.
    """
    if shutil.which(command[0]) is None:
        raise BadInput(f"{command[0]}: not installed here")
    reading, writing = os.pipe()
    # Ctrl-C reaches the whole process group. The child ignores it, so that ssh transmits the results to the end.
    command = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stdin=reading, stderr=subprocess.PIPE, text=True)
    os.close(reading)
    interrupted = False
    try:
        while True:
            try:
                _, said = process.communicate(timeout=PATIENCE if interrupted else None)
                break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                os.close(writing)
    except BaseException as error:  # a second Ctrl-C, or the script has not ended after PATIENCE seconds
        process.kill()
        raise KeyboardInterrupt if isinstance(error, subprocess.TimeoutExpired) else error from None
    finally:
        if not interrupted:
            os.close(writing)
    code = process.returncode
    if code and not (code in (SOME, INTERRUPTED) and results()):
        if interrupted or code == INTERRUPTED:
            raise KeyboardInterrupt
        raise GraphcombError(f"{what} failed: {_last(said, code)}")
    return code


def _last(said: str, code: int) -> str:
    """Return the reasons in a program's output: its lines that begin with "error: ", else the last line."""
    lines = [line for line in said.splitlines() if line.strip()] or [f"exit code {code}"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return "; ".join(dict.fromkeys(errors)) or lines[-1]
