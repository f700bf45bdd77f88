"""Read power, temperatures and clocks of the device, and describe it.

Run as a script, this file is the monitor's own process, which takes no time from the process that is measured. Sources:
NVIDIA's tegrastats documentation; Jetson Linux developer guide, "Platform power and performance", for the rails of AGX
Orin.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Sequence

# A sample is {"power_mw": {rail: n}, "temperatures_c": {zone: n}, "clocks_mhz": {unit: n}, "load_percent": {unit: n},
# "ram_mb": n, "throttled": bits of nvidia-smi's reasons}; parts that the tool does not report are missing or empty.
POWER = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?:/-?\d+(?:mW)?)?(?!\S)")
TEMPERATURE = re.compile(r"(?<!\S)(\w+)@(-?\d+(?:\.\d+)?)C(?:/-?[\d.]+C)?(?!\S)")
ENGINE = re.compile(r"(?<!\S)(GR3D|EMC)(?:_FREQ)? (?:(\d+)%)?(?:@\[?(\d+)[\d,]*\]?)?(?!\S)")
CORES = re.compile(r"(?<!\S)(?:CPU|cpu) \[([^\]]*)\](?:@(\d+))?")
MEMORY = re.compile(r"(?<!\S)RAM (\d+)/\d+MB")
DONE = "done"  # what the measuring process tells the monitor before it removes the folder itself
UNITS = {"GR3D": "gpu", "EMC": "memory"}
# Rails that measure the input power of the board. Without one the total is the sum of the other rails.
INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
# Rails that another rail feeds, so that its power includes theirs: on AGX Orin the system rail feeds the memory.
PART_OF = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
NOT_CONNECTED = "NC"
# The bits of nvidia-smi's throttle reasons that mean a slowdown; other bits are settings (idle, application clocks).
REASONS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}
# A clock that falls below STEADY times its highest value is reported, if there are at least FEW samples.
STEADY, FEW = 0.95, 5
GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gpc")  # names of the GPU among the devices whose clock Linux scales


def parse_tegrastats(line: str) -> dict[str, Any]:
    """Parse one line of tegrastats, of any Jetson from TX1 to Thor, to a sample. Other text gives an empty sample."""
    sample: dict[str, Any] = {"power_mw": {}, "temperatures_c": {}, "clocks_mhz": {}, "load_percent": {}}
    for rail, power in POWER.findall(line):
        if rail != NOT_CONNECTED:
            sample["power_mw"][rail] = int(power)
    for zone, degrees in TEMPERATURE.findall(line):
        # The temperature of the PMIC is a constant 100, and that of a sensor that is off is -256.
        if zone != "PMIC" and float(degrees) > -200:
            sample["temperatures_c"][zone] = float(degrees)
    for unit, load, clock in ENGINE.findall(line):
        if load:
            sample["load_percent"][UNITS[unit]] = int(load)
        if clock:
            sample["clocks_mhz"][UNITS[unit]] = int(clock)
    cores = CORES.search(line)
    if cores:
        on = [core for core in cores.group(1).split(",") if "%" in core]
        clocks = [int(core.split("@")[1]) for core in on if "@" in core] or (
            [int(cores.group(2))] if cores.group(2) else []
        )
        if on:
            sample["load_percent"]["cpu"] = round(sum(int(core.split("%")[0]) for core in on) / len(on), 1)
        if clocks:
            sample["clocks_mhz"]["cpu"] = max(clocks)
    memory = MEMORY.search(line)
    if memory:
        sample["ram_mb"] = int(memory.group(1))
    return sample


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


SMI = "power.draw,temperature.gpu,clocks.sm,clocks.mem,utilization.gpu,clocks_throttle_reasons.active"


def parse_smi(line: str) -> dict[str, Any]:
    """Parse a line of `nvidia-smi --query-gpu=<SMI> --format=csv,noheader,nounits` to a sample. The last field, the throttle
    reasons, may be missing; a line with fewer than five fields gives an empty sample."""
    fields = [field.strip() for field in line.split(",")]
    numbers = [float(field) if re.match(r"^[\d.]+$", field) else None for field in fields[:5]]
    if len(numbers) != 5:
        return {}
    power, degrees, clock, memory, load = numbers
    parts = {
        "power_mw": {"GPU": None if power is None else power * 1000},
        "temperatures_c": {"gpu": degrees},
        "clocks_mhz": {"gpu": clock, "memory": memory},
        "load_percent": {"gpu": load},
    }
    sample: dict[str, Any] = {part: _known(row) for part, row in parts.items()}
    reasons = int(fields[5], 16) if len(fields) > 5 and re.match(r"^0x[\da-fA-F]+$", fields[5]) else 0
    return dict(sample, throttled=reasons) if reasons else sample


def total_power(rails: dict[str, float]) -> float | None:
    """Return the input power of the board in milliwatts from its rails, or None without rails.

    It is that of the input rail if there is one, else the sum of the rails that no other rail feeds.
    """
    named = [rails[rail] for rail in INPUT_RAILS if rail in rails]
    independent = [power for rail, power in rails.items() if PART_OF.get(rail) not in rails]
    return named[0] if named else sum(independent) if independent else None


def average(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of the samples, part by part, with `total_mw` and the number of samples; {} without samples."""
    means: dict[str, Any] = {}
    for part in ("power_mw", "temperatures_c", "clocks_mhz", "load_percent"):
        values: dict[str, list[float]] = {}
        for sample in samples:
            for name, value in _known(sample.get(part, {})).items():
                values.setdefault(name, []).append(value)
        if values:
            means[part] = {name: round(statistics.mean(row), 2) for name, row in values.items()}
    if "power_mw" in means:
        means["total_mw"] = total_power(means["power_mw"])
    if samples:
        means["samples"] = len(samples)
    return means


def throttling(samples: Sequence[dict[str, Any]], units: Sequence[str]) -> list[str]:
    """Return notes on what slowed the device down during these samples: nvidia-smi's reasons, and clocks that fell.

    units: whose clocks are checked: "gpu", "memory", "cpu". Samples with a load of the GPU below 50 % do not count for its
    clock.
    """
    bits = 0
    for sample in samples:
        bits |= sample.get("throttled", 0)
    reasons = dict.fromkeys(text for bit, text in REASONS.items() if bits & bit)
    notes = [f"the GPU was slowed down by its {' and '.join(reasons)}"] if reasons else []
    heat = max((t for sample in samples for t in sample.get("temperatures_c", {}).values()), default=None)
    for unit in units:
        clocks = sorted(
            sample["clocks_mhz"][unit]
            for sample in samples
            if unit in sample.get("clocks_mhz", {})
            and (unit != "gpu" or sample.get("load_percent", {}).get(unit, 100) >= 50)
        )
        if len(clocks) < FEW:
            continue
        low, high = clocks[len(clocks) // 10], clocks[-1]
        if low < STEADY * high:
            at = f" at up to {heat:.0f} °C" if heat is not None else ""
            notes.append(f"the {unit} clock went between {low:.0f} and {high:.0f} MHz{at}; fix the clocks, or cool it")
    return notes


# -------------------------------------------------------------------------------------------------------------- monitor
class Monitor:
    """A process of its own that reads power, temperatures and clocks ten times per second.

    source: "tegrastats" or "nvidia-smi"; None if neither is installed, then there are no samples.
    """

    def __init__(self, source: str | None = None, archive: Path | None = None) -> None:
        """Start the process. archive: the archive that this module is part of, if it is not a file of its own."""
        self.source = source if source is not None else self._find()
        self._process: subprocess.Popen | None = None
        self._samples: list[tuple[float, dict[str, Any]]] = []
        self._read = 0
        if self.source:
            self._folder = tempfile.mkdtemp(prefix="graphcomb-monitor-")
            self._path = Path(self._folder) / "samples"
            self._path.touch()
            # The monitor's standard input is a pipe from this process, so the monitor ends when this process does.
            script = [str(Path(__file__).resolve())] if archive is None else [str(archive), "--monitor"]
            self._process = subprocess.Popen(
                [sys.executable, *script, self.source, str(self._path)], stdin=subprocess.PIPE
            )

    @property
    def samples(self) -> list[tuple[float, dict[str, Any]]]:
        """The samples so far, each with its time by `time.monotonic()`."""
        if self._process is not None and self._path.exists():
            with self._path.open() as file:
                file.seek(self._read)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]  # the last line may be incomplete
            self._read += len(whole.encode())
            for line in whole.splitlines():
                row = json.loads(line)
                self._samples.append((row["time"], row["sample"]))
        return self._samples

    def since(self, start: float, end: float = float("inf")) -> list[dict[str, Any]]:
        """Return the samples between two times by `time.monotonic()`."""
        return [sample for when, sample in self.samples if start <= when <= end]

    def notes(self) -> list[str]:
        """Return notes for a reader of the results about samples that are missing."""
        if not self.source:
            return ["no tegrastats or nvidia-smi here: power, temperatures and clocks are not known"]
        return [] if self.samples else [f"{self.source} gave no samples: power and clocks are not known"]

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # the monitor has ended already
                self._process.stdin.write(DONE.encode())
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self.samples  # noqa: B018  reads the last ones
            shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _find() -> str | None:
        return next((tool for tool in ("tegrastats", "nvidia-smi") if shutil.which(tool)), None)


def watch(source: str, path: str) -> None:
    """Write samples to a file, one line of JSON each, until the standard input ends. This is the monitor's process.

    If the measuring process has not written `DONE` there, it was killed, and the folder of the file is removed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the measuring process, which ends this one
    tools: list[subprocess.Popen] = []

    def stop() -> None:
        if DONE not in sys.stdin.read():
            shutil.rmtree(str(Path(path).parent), ignore_errors=True)
        for tool in tools:  # last, since the main thread ends this process after its tool
            tool.kill()
        os._exit(0)

    threading.Thread(target=stop, daemon=True).start()
    with open(path, "a", buffering=1) as file:

        def keep(sample: dict[str, Any]) -> None:
            if any(sample.values()):
                if "gpu" not in sample.get("clocks_mhz", {}) and source != "nvidia-smi":
                    sample["clocks_mhz"].update(_gpu_clock())  # from JetPack 6 on tegrastats reports it to root only
                file.write(json.dumps({"time": time.monotonic(), "sample": sample}) + "\n")

        parse = parse_tegrastats if source == "tegrastats" else parse_smi
        query = ["nvidia-smi", "--query-gpu=" + SMI, "--format=csv,noheader,nounits", "-lms", "100", "-i", "0"]
        command = ["tegrastats", "--interval", "100"] if source == "tegrastats" else query
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as tool:
            tools.append(tool)
            for line in tool.stdout or ():
                keep(parse(line))


def _gpu_clock() -> dict[str, int]:
    for device in sorted(Path("/sys/class/devfreq").glob("*")):
        text = read_line(str(device / "cur_freq")) if GPU.search(device.name) else None
        if text and text.isdigit():
            return {"gpu": int(text) // 10**6}
    return {}


# --------------------------------------------------------------------------------------------------------------- device
def describe_device() -> dict[str, Any]:
    """Return the device's model, software, power mode and clock settings, as far as the system reports them without
    root."""
    mode = _say(["nvpmodel", "-q"])
    named = re.search(r"Power Mode: *(.+)", mode or "")
    clocks = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem", "--format=csv"]
    return {
        "model": read_line("/proc/device-tree/model")
        or _say(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "l4t": read_line("/etc/nv_tegra_release"),
        "power_mode": named.group(1).strip() if named else mode,
        "clocks": _say(["jetson_clocks", "--show"]) or _say(clocks),
    }


def clock_notes(device: dict[str, Any]) -> list[str]:
    """Return a note if the clock settings in the result of `describe_device` are unknown on a Jetson."""
    if device["clocks"] is None and shutil.which("jetson_clocks"):
        return ["whether the clocks are fixed is not known: jetson_clocks says it to root only; fix them with sudo"]
    return []


def over_current() -> dict[str, int]:
    """Return by event how often a Jetson has slowed its GPU and processors down since boot because of too high a current."""
    files = sorted(Path("/sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))
    texts = {file.name.split("_")[0]: read_line(str(file)) for file in files}
    return {name: int(text) for name, text in texts.items() if text and text.isdigit()}


def _say(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def read_line(path: str) -> str | None:
    """Return the text of a small system file; None if it is missing, empty or not readable."""
    try:
        return Path(path).read_text().strip().strip("\0") or None
    except OSError:
        return None


if __name__ == "__main__":
    watch(*sys.argv[1:])
