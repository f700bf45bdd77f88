"""What else happens on a machine, on file systems and libraries made up."""

import ctypes
import os
from types import SimpleNamespace

import pytest

from graphcomb.runtime.measure import conditions


@pytest.mark.parametrize("name", ["pytest", "a (b) c"])
def test_the_clock_is_that_of_the_core_that_ran(tmp_path, monkeypatch, name):
    monkeypatch.setattr(conditions, "ROOT", tmp_path)
    assert conditions.processor_mhz() is None
    stat = tmp_path / "proc/thread-self/stat"
    stat.parent.mkdir(parents=True)
    fields = ["S", *(str(n) for n in range(4, 53))]  # the fields after the name, from the third
    fields[39 - 3] = "2"
    stat.write_text(f"17 ({name}) {' '.join(fields)}\n")
    assert conditions.processor_mhz() is None  # no cpufreq, as in a virtual machine
    for core, khz in ((0, "800000\n"), (2, "3400000\n")):
        file = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"
        file.parent.mkdir(parents=True)
        file.write_text(khz)
    assert conditions.processor_mhz() == 3400
    file.write_text("<unknown>\n")  # what some drivers write
    assert conditions.processor_mhz() is None


class Nvml:
    """NVML with these samples (pid, percentage); `code` is what its functions return."""

    def __init__(self, samples=(), codes=None):
        self.samples, self.codes, self.since = samples, codes or {}, []

    def nvmlInit_v2(self):
        return self.codes.get("init", 0)

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        return self.codes.get("device", 0)

    def nvmlDeviceGetProcessUtilization(self, device, samples, count, since):
        self.since.append(since.value)
        count = ctypes.cast(count, ctypes.POINTER(ctypes.c_uint)).contents
        if samples is None:
            count.value = len(self.samples)
            return 7  # the buffer is too small
        assert count.value >= len(self.samples)
        count.value = len(self.samples)
        for row, (pid, share) in zip(samples, self.samples, strict=False):
            row.pid, row.sm = pid, share
        return self.codes.get("utilisation", 0 if self.samples else 6)


@pytest.fixture
def nvml(monkeypatch):
    def install(*arguments, **options):
        library = Nvml(*arguments, **options)
        monkeypatch.setattr(conditions.torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(conditions.ctypes, "CDLL", lambda name: library)
        return library

    return install


OWN = os.getpid()


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        ([], 0),
        ([(OWN, 80)], 0),
        ([(OWN, 10), (OWN + 1, 60), (OWN + 2, 20)], 80),
        ([(7, 90)], 0),  # in a container: this process by an id that it does not know
        ([(7, 90), (8, 30)], 30),
        ([(OWN, 10), (8, 70), (9, 70)], 100),
    ],
)
def test_others_on_the_gpu(nvml, samples, wanted):
    library = nvml(samples)
    assert conditions.OtherProcesses().percent() == wanted
    assert library.since[0] == library.since[1] > 10**15  # microseconds


@pytest.mark.parametrize("codes", [{"init": 9}, {"device": 6}, {"utilisation": 3}])
def test_a_library_that_does_not_say_says_nothing(nvml, codes):
    nvml([(OWN, 50)], codes=codes)
    assert conditions.OtherProcesses().percent() is None


def test_without_the_library_nothing_is_known(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(conditions.ctypes, "CDLL", missing)
    assert conditions.OtherProcesses().percent() is None
    monkeypatch.setattr(conditions.ctypes, "CDLL", lambda name: SimpleNamespace())  # an old one without the functions
    assert conditions.OtherProcesses().percent() is None


def test_the_gpu_is_found_by_what_cuda_calls_it(nvml, monkeypatch):
    library = nvml([(OWN, 50), (OWN + 1, 40)])
    asked = []
    library.nvmlDeviceGetHandleByUUID = lambda name, device: asked.append(name) or 0
    monkeypatch.setattr(conditions.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(conditions.torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(conditions.torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"c0ffee-{i}"))
    assert conditions.OtherProcesses().percent() == 40
    assert asked == [b"GPU-c0ffee-1"]
