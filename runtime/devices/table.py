"""The table of targets: the precisions, alignments, TensorRT versions and peak rates of each device.

All code that depends on a device reads this table: rounding of widths, export, engine builds and predictions. Peaks are
the vendor's data-sheet figures for dense arithmetic (half of a figure "with sparsity") at the highest clock of the named
board; a calibrated roofline or a latency table replaces them with measurements.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...graph.errors import BadInput, nearest

# A tensor-core kernel does not pad channels, or K and N of a matmul, that are multiples of these: 16 bytes, except INT8,
# whose convolutions work on vectors of 32 channels (TensorRT's CHW32 and HWC32 formats).
TENSOR_CORE = {"fp32": 4, "tf32": 4, "fp16": 8, "bf16": 8, "int8": 32, "fp8": 16, "fp4": 32}
# ONNX Runtime's convolutions work on blocks of 8 channels with AVX2 and NEON (16 with AVX-512), for every type.
CPU = {"fp32": 8, "fp16": 8, "bf16": 8, "int8": 8}

# The highest documented ONNX opset of TensorRT's parser, by the first version of TensorRT that has it.
OPSETS = {(8, 5): 17, (10, 0): 20, (10, 15): 24, (11, 4): 25}
CPU_OPSET = 22

ORIN = {"JetPack 6.1, 6.2": (10, 3), "JetPack 7.2": (10, 16), "JetPack 7.2.2": (11, 4)}
THOR = {"JetPack 7.0": (10, 13), "JetPack 7.1, 7.2": (10, 16), "JetPack 7.2.2": (11, 4)}
DRIVE_ORIN = {"DriveOS 6.0": (8, 6), "DriveOS 7.0.3": (10, 10)}
DRIVE_THOR = {"DriveOS 7.0.3": (10, 10)}
X86 = {"x86": (11, 4)}
RTX = {"TensorRT-RTX": (1, 7)}

# Names of the libraries in messages.
NAMES = {
    "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
}  # fmt: skip

RENAMED = {(10, 1): (11, 0)}  # CUDA 12 and CUDA 13 give Thor different compute capabilities

AMPERE = ("fp32", "tf32", "fp16", "bf16", "int8")
HOPPER = (*AMPERE, "fp8")
BLACKWELL = (*HOPPER, "fp4")

# How far graphcomb was tested for a target. benchmarks/results has the evidence for the first two kinds.
EVIDENCE = {
    "measured": "latency was measured on such a device",
    "built": "engines were built for it, on a machine without it",
    "untested": "its figures and rules come from documentation alone",
}
TRIED = {
    "cpu": "measured", "cpu-openvino": "measured", "rtx-sm86": "built", "rtx-sm89": "built", "rtx-sm120": "built",
}  # fmt: skip

JETSON_CLOCKS = ("sudo nvpmodel -m 0", "sudo jetson_clocks")
JETSON_POWER = "tegrastats --interval 100"
SMI_CLOCKS = ("nvidia-smi --query-gpu=clocks.max.sm --format=csv,noheader,nounits", "sudo nvidia-smi -lgc MAX_SM_CLOCK")
SMI_POWER = "nvidia-smi --query-gpu=power.draw,clocks.sm,temperature.gpu --format=csv --loop-ms=100"


@dataclass(frozen=True)
class Dla:
    """The rules of a device's deep learning accelerator (DLA).

    - cores: number of DLA cores.
    - tensorrt: versions of TensorRT that support the DLA of this device (10.x up to JetPack 6; 11.0 to 11.3 do not).
    - dtypes: precisions that it computes in.
    - max_dim, max_batch: largest sizes of a dimension and of the batch.
    - concat_axes: axes that it concatenates along.
    - dynamic_shapes, deconvolution_groups, deconvolution_padding: whether it supports them.
    """

    cores: int
    tensorrt: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...] = ("fp16", "int8")
    max_dim: int = 8192
    max_batch: int = 4096
    concat_axes: tuple[int, ...] = (1,)
    dynamic_shapes: bool = False
    deconvolution_groups: bool = False
    deconvolution_padding: bool = False


@dataclass(frozen=True)
class Target:
    """A device that engines are built for.

    - name: its name in recipes and on the command line. board: the board whose data sheet the figures are from.
    - backend: the library that builds engines for it, a key of `BACKENDS`.
    - dtypes: precisions that it computes in.
    - tflops: peak rate by precision in 1e12 operations per second; a multiply-accumulate counts as two operations.
    - bandwidth: bandwidth of device memory in 1e9 bytes per second.
    - compute_capability: (major, minor) of the GPU; None for a CPU.
    - tensorrt: (major, minor) version of TensorRT by software release, or of TensorRT-RTX for an RTX target; empty for a
      CPU.
    - alignments: by precision, the number of which channels and matmul sizes should be multiples so that kernels do not
      pad them.
    - dla: rules of the deep learning accelerator; None without one.
    - clocks: shell commands that fix the clocks before a measurement. power: shell command that reports power, clocks and
      temperature.
    """

    name: str
    board: str
    backend: str
    dtypes: tuple[str, ...]
    tflops: Mapping[str, float]
    bandwidth: float
    compute_capability: tuple[int, int] | None = None
    tensorrt: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    alignments: Mapping[str, int] = field(default_factory=lambda: TENSOR_CORE)
    dla: Dla | None = None
    clocks: tuple[str, ...] = ()
    power: str | None = None

    @property
    def processor(self) -> bool:
        """Whether the target is a processor, not a GPU."""
        return self.compute_capability is None

    @property
    def opset(self) -> int:
        """The highest ONNX opset that all listed versions of the target's library parse."""
        if self.processor:
            return CPU_OPSET
        if self.backend == "tensorrt_rtx":
            return OPSETS[11, 4]
        return min(map(parsed_opset, self.tensorrt.values()))

    @property
    def evidence(self) -> str:
        """How far graphcomb was tested for the target: a key of `EVIDENCE`."""
        return TRIED.get(self.name, "untested")

    @property
    def sm(self) -> str | None:
        """The compute capability in the form "SM86"; None for a CPU."""
        return "SM{}{}".format(*self.compute_capability) if self.compute_capability else None

    def alignment(self, dtype: str, sparse: bool = False) -> int:
        """Return the number of which channels and matmul sizes should be multiples; kernels pad other sizes.

        dtype: the precision. sparse: whether weights are 2:4 sparse, whose tiles on a GPU are twice as deep. Raises
        BadInput for a precision that the device does not compute in.
        """
        if dtype not in self.dtypes:
            others = ", ".join(t.name for t in TARGETS.values() if dtype in t.dtypes)
            has = f"; {others} have {dtype}" if others else ""
            raise BadInput(f"target {self.name}: no {dtype}; it computes in {', '.join(self.dtypes)}{has}")
        return self.alignments[dtype] * (2 if sparse and self.compute_capability else 1)

    def peak(self, dtype: str) -> float:
        """Return the peak rate in operations per second (a multiply-accumulate is two operations).

        Raises BadInput for a precision that the device does not compute in.
        """
        self.alignment(dtype)
        return self.tflops[dtype] * 1e12


def _peaks(*figures: float) -> dict[str, float]:
    """Return peaks by precision from figures for fp32, tf32, fp16, int8[, fp8[, fp4]]; that of bf16 is fp16's."""
    names = ("fp32", "tf32", "fp16", "int8", "fp8", "fp4")
    peaks = dict(zip(names, figures, strict=False))
    return peaks | {"bf16": peaks["fp16"]}


def _jetson(
    name: str,
    board: str,
    peaks: dict[str, float],
    bandwidth: float,
    releases: dict[str, tuple[int, int]],
    dla: Dla | None = None,
    clocks: tuple[str, ...] = JETSON_CLOCKS,
) -> Target:
    dtypes, capability = (BLACKWELL, (11, 0)) if "fp4" in peaks else (AMPERE, (8, 7))
    return Target(
        name, board, "tensorrt", dtypes, peaks, bandwidth, capability, releases, dla=dla, clocks=clocks,
        power=JETSON_POWER,
    )  # fmt: skip


def _gpu(
    name: str,
    board: str,
    dtypes: tuple[str, ...],
    peaks: dict[str, float],
    bandwidth: float,
    capability: tuple[int, int],
) -> Target:
    backend, releases = ("tensorrt_rtx", RTX) if name.startswith("rtx") else ("tensorrt", X86)
    return Target(
        name, board, backend, dtypes, peaks, bandwidth, capability, releases, clocks=SMI_CLOCKS, power=SMI_POWER
    )


def _cpu(name: str, backend: str) -> Target:
    """Return the target of a library on one core with two AVX-512 units at 3 GHz, and VNNI for INT8; fp16 and bf16 are
    computed in fp32. The figures are nominal."""
    peaks = {"fp32": 0.2, "fp16": 0.2, "bf16": 0.2, "int8": 0.8}
    clocks = ("sudo cpupower frequency-set --governor performance",)
    return Target(
        name, f"one x86 core, {NAMES[backend]}", backend, tuple(peaks), peaks, 15, alignments=CPU, clocks=clocks
    )


TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        # The figures are those of the GPU without the DLA. Orin Nano and NX are in their "Super" modes.
        _jetson("orin-nano", "Jetson Orin Nano 8GB", _peaks(2.1, 8.4, 16.7, 33.5), 102, ORIN),
        _jetson("orin-nx", "Jetson Orin NX 16GB", _peaks(2.4, 9.6, 19.2, 38.4), 102.4, ORIN, Dla(2, ((10, 3),))),
        _jetson(
            "agx-orin", "Jetson AGX Orin 64GB", _peaks(5.3, 21.3, 42.5, 85), 204.8, ORIN, Dla(2, ((10, 3), (11, 4)))
        ),
        _jetson("agx-thor", "Jetson T5000", _peaks(8.06, 129, 258.5, 517, 517, 1035), 273, THOR),
        _jetson("drive-orin", "DRIVE AGX Orin", _peaks(5.2, 20.9, 41.8, 83.5), 205, DRIVE_ORIN, Dla(2, ((8, 6),)), ()),
        _jetson("drive-thor", "DRIVE AGX Thor", _peaks(8.06, 129, 250, 500, 500, 1000), 273, DRIVE_THOR, clocks=()),
        _gpu("rtx-sm75", "T4", ("fp32", "fp16"), _peaks(8.1, 8.1, 65, 130), 320, (7, 5)),
        _gpu("rtx-sm80", "A100 40GB", AMPERE, _peaks(19.5, 156, 312, 624), 1555, (8, 0)),
        _gpu("rtx-sm86", "A10", AMPERE, _peaks(31.2, 62.5, 125, 250), 600, (8, 6)),
        _gpu("rtx-sm89", "L4", HOPPER, _peaks(30.3, 60, 121, 242, 242), 300, (8, 9)),
        _gpu("rtx-sm120", "RTX 5090", BLACKWELL, _peaks(104.8, 104.8, 209.5, 838, 419, 1676), 1792, (12, 0)),
        _gpu("rtx-sm121", "GB10 (DGX Spark)", BLACKWELL, _peaks(31, 62, 125, 250, 250, 500), 273, (12, 1)),
        _gpu("h100", "H100 SXM", HOPPER, _peaks(67, 494.7, 989.4, 1979, 1979), 3352, (9, 0)),
        _gpu("h200", "H200 SXM", HOPPER, _peaks(67, 494.7, 989.4, 1979, 1979), 4800, (9, 0)),
        # Figures of an HGX board divided by its eight GPUs; INT8 on a B300 is slow.
        _gpu("b200", "B200 SXM", BLACKWELL, _peaks(75, 1125, 2250, 4500, 4500, 9000), 7700, (10, 0)),
        _gpu("b300", "B300 SXM", BLACKWELL, _peaks(75, 1125, 2250, 150, 4500, 13500), 7700, (10, 3)),
        _cpu("cpu", "onnxruntime"),
        _cpu("cpu-openvino", "openvino"),
    )
}


def parsed_opset(version: tuple[int, ...]) -> int:
    """Return the highest ONNX opset that this version of TensorRT parses; that of 8.5 for an older version."""
    return max((opset for since, opset in OPSETS.items() if since <= version), default=min(OPSETS.values()))


def canonical(capability: tuple[int, int]) -> tuple[int, int]:
    """Return the compute capability that the table uses for a GPU which CUDA 12 and 13 number differently."""
    return RENAMED.get(capability, capability)


def get_target(name: str) -> Target:
    """Return the target of this name. Raises BadInput, which suggests the nearest names, for an unknown name."""
    if name in TARGETS:
        return TARGETS[name]
    raise BadInput(f"target {name}: not known; {nearest(str(name), TARGETS)}")
