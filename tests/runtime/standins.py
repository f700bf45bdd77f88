"""Stand-ins for what needs a GPU or NVIDIA's own packages: classic TensorRT's module, and the CUDA runtime on host memory.

They show which calls are made to which version, by its documented interface, and not what TensorRT would answer.
"""

import ctypes
import dataclasses
import types
from enum import IntEnum

import numpy as np

from graphcomb.runtime.kit.cuda import Cuda, CudaError


class FakeCudart:
    """The CUDA runtime's functions over host memory. As the real one it keeps the last error until somebody asks for it,
    and a stream that is being captured can do nothing else until the capture has ended."""

    def __init__(self, capability=(8, 7), count=1):
        self.capability, self.count, self.blocks = capability, count, {}
        self.events, self.clock, self.times = 0, 0.0, {}
        self.recording, self.graphs, self.launched = None, {}, 0  # recording: work put on the stream, while recorded
        self.invalid, self.pending = False, 0  # the capture was spoilt; the error that nobody has asked for
        self.cudaGetErrorString = lambda status: b"out of memory" if status == 2 else b"capture failed"

    def fail(self, status):
        self.pending = status
        return status

    def spoil(self):
        """What is done to a stream that is being captured and cannot be recorded."""
        self.invalid = True
        return self.fail(900)

    def cudaGetLastError(self):
        status, self.pending = self.pending, 0
        return status

    def cudaGetDeviceCount(self, count):
        count._obj.value = self.count
        return 0

    def cudaGetDevice(self, device):
        device._obj.value = 0
        return 0

    def cudaDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capability[attribute - 75]
        return 0

    def cudaStreamCreateWithFlags(self, stream, flags):
        assert flags == 1, "a stream that waits for the default stream"
        stream._obj.value = 7
        return 0

    def cudaStreamSynchronize(self, stream):
        return self.spoil() if self.recording is not None else int(stream.value != 7)

    def cudaStreamDestroy(self, stream):
        return 0

    def cudaMalloc(self, pointer, size):
        if size.value > 1 << 20:
            return self.fail(2)
        block = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(block)
        self.blocks[pointer._obj.value] = block
        return 0

    def cudaFree(self, pointer):
        del self.blocks[pointer.value]
        return 0

    def cudaEventCreate(self, event):
        event._obj.value = 100 + self.events
        self.events += 1
        return 0

    def cudaEventRecord(self, event, stream):
        self.clock += 1.5  # so that two records in a row are 1.5 ms apart
        self.times[event.value] = self.clock
        return 0

    def cudaEventElapsedTime(self, found, start, end):
        found._obj.value = self.times[end.value] - self.times[start.value]
        return 0

    def cudaEventDestroy(self, event):
        self.events -= 1
        return 0

    def cudaStreamBeginCapture(self, stream, mode):
        assert mode in (1, 2), "the use of CUDA by any thread spoils a global capture"
        if self.recording is not None:
            return self.fail(901)
        self.recording, self.invalid = [], False
        return 0

    def cudaStreamEndCapture(self, stream, graph):
        self.recorded, self.recording = self.recording, None
        if self.invalid:
            return self.fail(901)
        graph._obj.value = 9
        return 0

    def cudaGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = 200 + len(self.graphs)
        self.graphs[executable._obj.value] = self.recorded
        return 0

    def cudaGraphDestroy(self, graph):
        return 0

    def cudaGraphLaunch(self, graph, stream):
        self.launched += 1
        for work in self.graphs[graph.value]:
            work()
        return 0

    def cudaGraphExecDestroy(self, graph):
        del self.graphs[graph.value]
        return 0

    def cudaMemcpyAsync(self, to, start, size, kind, stream):
        if self.recording is not None:
            return self.spoil()
        ctypes.memmove(to, start, size.value)
        return int(stream.value != 7)


def flags(name, members):
    return IntEnum(name, members.split(), start=0)


@dataclasses.dataclass
class Classic:
    """What the stand-in for classic TensorRT was asked to do."""

    module: types.ModuleType
    config: types.SimpleNamespace = None
    network_flags: int = -1
    flags: list = dataclasses.field(default_factory=list)
    profile: dict = dataclasses.field(default_factory=dict)
    factor: float = 2  # that the engine multiplies by
    recordable: bool = True  # as a CUDA graph
    built: int = 0  # engines
    logger: object = None  # the last builder's


def fake_tensorrt(version, cudart):
    """A stand-in for `tensorrt` with the members that the version has, by its documented interface. Its engine doubles
    the input."""
    trt = types.ModuleType("tensorrt")
    made = Classic(trt)
    trt.__version__ = version
    old, new = version.startswith("8"), version.startswith("11")
    severity = flags("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
    trt.ILogger = type("ILogger", (), {"Severity": severity, "__init__": lambda self: None})
    trt.Logger = type("Logger", (trt.ILogger,), {"WARNING": severity.WARNING, "log": lambda self, kind, text: None})
    trt.Logger.__init__ = lambda self, least: None
    trt.NetworkDefinitionCreationFlag = flags(
        "NetworkDefinitionCreationFlag",
        "EXPLICIT_BATCH" if old else "STRONGLY_TYPED" if new else "EXPLICIT_BATCH STRONGLY_TYPED",
    )
    trt.BuilderFlag = flags(
        "BuilderFlag",
        "GPU_FALLBACK REFIT TF32 SPARSE_WEIGHTS"
        + ("" if version.startswith("8.5") else " VERSION_COMPATIBLE")  # which came with 8.6
        + ("" if new else " FP16 INT8"),
    )
    if not version.startswith("8.5"):
        levels = "NONE AMPERE_PLUS" + ("" if old else " SAME_COMPUTE_CAPABILITY")
        trt.HardwareCompatibilityLevel = flags("HardwareCompatibilityLevel", levels)
    trt.IProfiler = type("IProfiler", (), {"__init__": lambda self: None})
    trt.LayerInformationFormat = flags("LayerInformationFormat", "ONELINE JSON")
    trt.ProfilingVerbosity = flags("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE")
    trt.MemoryPoolType = flags("MemoryPoolType", "WORKSPACE")
    trt.DeviceType = flags("DeviceType", "GPU DLA")
    trt.TensorIOMode = flags("TensorIOMode", "NONE INPUT OUTPUT")
    trt.DataType = flags("DataType", "FLOAT HALF INT4")
    kind = flags("LayerType", "CONVOLUTION SOFTMAX")
    layers = [types.SimpleNamespace(name=k.name.lower(), type=k) for k in kind]
    trt.IBuilderConfig = type("IBuilderConfig", (), {})

    class Config(trt.IBuilderConfig):
        def __init__(self):
            self.cache = None

        set_flag = lambda self, flag: made.flags.append(flag.name)  # noqa: E731
        clear_flag = lambda self, flag: made.flags.append(f"-{flag.name}")  # noqa: E731
        can_run_on_DLA = lambda self, layer: layer.type is kind.CONVOLUTION  # noqa: E731
        get_timing_cache = lambda self: self.cache  # noqa: E731

        def create_timing_cache(self, data):
            return None if data == b"foreign" else types.SimpleNamespace(serialize=lambda: data + b"+timings")

        def set_timing_cache(self, cache, ignore_mismatch):
            self.cache = cache
            return not ignore_mismatch

        def add_optimization_profile(self, profile):
            return 0

    class Builder:
        num_DLA_cores = 2

        def __init__(self, logger):
            self.logger = made.logger = logger

        def create_network(self, value):
            made.network_flags = value
            tensor = types.SimpleNamespace(name="x", shape=(-1, 4))
            return types.SimpleNamespace(
                num_inputs=1, get_input=lambda i: tensor, num_layers=len(layers), get_layer=layers.__getitem__
            )

        def create_builder_config(self):
            made.config = Config()
            return made.config

        def create_optimization_profile(self):
            return types.SimpleNamespace(set_shape=lambda name, *shapes: made.profile.update({name: shapes}))

        def build_serialized_network(self, network, config):
            made.built += 1
            self.logger.log(severity.WARNING, "tactics were  skipped")
            self.logger.log(
                severity.VERBOSE, "Engine Layer Information:\nLayer(Relu): relu, Tactic: 0x1, x (Float[4]) ->"
            )
            return b"engine"

    class OnnxParser:
        def __init__(self, network, logger):
            self.num_errors = 1

        def parse_from_file(self, path):
            return not path.endswith("bad.onnx")

        def get_error(self, i):
            error = types.SimpleNamespace(node=lambda: 0, desc=lambda: "no importer\nmore")
            if not old:
                error.node_name, error.node_operator = lambda: "relu", lambda: "Relu"
            return error

    class Context:
        def __init__(self):
            self.shape, self.memory, self.profiler = None, {}, None

        def set_input_shape(self, name, shape):
            self.shape = shape
            return 1 <= shape[0] <= 8

        def get_tensor_shape(self, name):
            return self.shape

        def set_tensor_address(self, name, address):
            self.memory[name] = address
            return True

        def execute_async_v3(self, stream):
            count, memory = int(np.prod(self.shape)), dict(self.memory)

            def work():
                sides = [np.ctypeslib.as_array((ctypes.c_float * count).from_address(memory[n])) for n in "xy"]
                sides[1][:] = made.factor * sides[0]

            if cudart.pending:  # TensorRT asks after its launches whether there was an error, whoever made it
                return False
            if cudart.recording is not None:
                if not made.recordable:
                    cudart.spoil()
                    return False
                cudart.recording.append(work)
                return stream == 7
            work()
            if self.profiler is not None:
                self.profiler.report_layer_time("first", 1.0)
                self.profiler.report_layer_time("second", 0.5)
            return stream == 7

    class Engine:
        num_io_tensors = 2
        num_optimization_profiles = 1
        get_tensor_name = staticmethod("xy".__getitem__)
        get_tensor_mode = staticmethod(lambda name: trt.TensorIOMode["INPUT" if name == "x" else "OUTPUT"])
        get_tensor_shape = staticmethod(lambda name: (-1, 4))
        get_tensor_dtype = staticmethod(lambda name: trt.DataType.FLOAT)
        get_tensor_profile_shape = staticmethod(lambda name, profile: [(1, 4), (1, 4), (8, 4)])
        create_execution_context = staticmethod(Context)

        refittable = True
        device_memory_size = 4096

        @staticmethod
        def create_engine_inspector():
            layers = '{"Layers": [{"Name": "relu", "HasSparseWeights": 1}, "plain"]}'
            return types.SimpleNamespace(get_engine_information=lambda form: layers)

    class OnnxParserRefitter:
        num_errors = 0

        def __init__(self, refitter, logger):
            self.logger = logger

        def refit_from_file(self, path):
            if path.endswith("other.onnx"):
                self.logger.log(severity.ERROR, "weights  are missing")
            return not path.endswith("other.onnx")

    class Refitter:
        def __init__(self, engine, logger):
            pass

        def refit_cuda_engine(self):
            made.factor = 3
            return True

    class Runtime:
        def __init__(self, logger):
            self.logger = logger
            if not version.startswith("8.5"):  # from 8.6 on
                self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, data):
            if data != b"engine":
                self.logger.log(severity.ERROR, "checkMacros.cpp::catchCudaError::250: nothing telling")
                self.logger.log(severity.ERROR, "the engine plan  is of version 8")
                return None
            return Engine()

    trt.Builder, trt.OnnxParser, trt.Runtime, trt.Refitter = Builder, OnnxParser, Runtime, Refitter
    if not old:
        trt.OnnxParserRefitter = OnnxParserRefitter
    return made


def gpu():
    """The compute capability of this machine's real GPU, or None."""
    try:
        return Cuda().compute_capability
    except CudaError:
        return None
