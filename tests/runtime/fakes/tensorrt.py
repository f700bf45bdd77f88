"""A stand-in for the module of TensorRT or TensorRT-RTX, with the members that a version has (strict.py).

It shows which calls are made to which version, and not what TensorRT would answer. Its engine doubles the input x of shape
(batch, 4) and returns y.
"""

import ctypes
import dataclasses
import types

import numpy as np

from .strict import Library


@dataclasses.dataclass
class Made:
    """What the stand-in was asked to do, and how it answers.

    library: its classes, the calls that were made and the faults to make.
    """

    module: types.ModuleType
    library: Library
    config: object = None
    network: object = None
    network_flags: int = -1
    flags: list = dataclasses.field(default_factory=list)
    profile: dict = dataclasses.field(default_factory=dict)
    profiles: list = dataclasses.field(default_factory=list)
    factor: float = 2  # that the engine multiplies by
    recordable: bool = True  # as a CUDA graph
    built: int = 0  # engines
    cores: int = 2  # DLA cores
    kernels: list = dataclasses.field(default_factory=lambda: [("convolution", "CONVOLUTION"), ("softmax", "SOFTMAX")])
    plugins: list = dataclasses.field(default_factory=list)  # paths of libraries that were loaded
    capabilities: tuple = ()  # that TensorRT-RTX was asked to build for
    capturable: bool = True  # what TensorRT-RTX says of its runs
    runtime_config: object = None


def fake_tensorrt(version, cudart):
    """Return a stand-in for `tensorrt` of a version, or for TensorRT-RTX ("rtx"), on the stand-in of a CUDA runtime."""
    name = "tensorrt_rtx" if version == "rtx" else "tensorrt"
    library = Library(version)
    trt = types.ModuleType(name)
    trt.__version__ = "1.7.1" if version == "rtx" else version
    made = Made(trt, library)
    for title, enum in library.enums.items():
        if "." not in title:
            setattr(trt, title, enum)
    for title, behaviour in (*_plain(library), *_build(made, trt), *_run(made, trt, cudart)):
        if (kind := library.implement(title, behaviour)) is None:
            continue
        setattr(trt, title, kind)
        for enum in library.enums:
            if enum.startswith(f"{title}."):
                setattr(kind, enum.rpartition(".")[2], library.enums[enum])
    trt.IHostMemory = library.classes["IHostMemory"] = HostMemory
    registry = trt.IPluginRegistry()
    trt.get_plugin_registry = lambda: registry

    def init_plugins(logger, namespace):
        library.check("init_libnvinfer_plugins", library.functions["init_libnvinfer_plugins"], (logger, namespace), {})
        library.calls.append("init_libnvinfer_plugins")
        return True

    trt.init_libnvinfer_plugins = init_plugins
    return made


class HostMemory(bytes):
    """Memory of the library, which has the buffer protocol and no length."""

    def __len__(self):
        raise TypeError("object of type 'IHostMemory' has no len()")

    @property
    def nbytes(self):
        return memoryview(self).nbytes


def _plain(library):
    """The classes that users derive their own from, and plain values."""

    class Log:
        def log(self, severity, msg):
            pass

    class Empty:
        pass

    yield "ILogger", Log
    for name in ("Logger", "IProfiler", "IProgressMonitor", "IInt8Calibrator", "IInt8EntropyCalibrator2"):
        yield name, Empty


def _build(made, trt):
    """The classes of a build."""

    class TimingCache:
        def serialize(self):
            return HostMemory(self.__dict__.get("_data", b"") + b"+timings")

    class Profile:
        def set_shape(self, input, min, opt, max):
            self._shapes[input] = tuple(min), tuple(opt), tuple(max)
            made.profile.update({input: self._shapes[input]})

        def __init__(self):
            self._shapes = {}

    class Tensor:
        def __init__(self):
            pass

        name = property(lambda self: self._name)
        shape = property(lambda self: self._shape)

        def set_dynamic_range(self, min, max):
            self.__dict__["_range"] = min, max
            return True

    class Layer:
        name = property(lambda self: self._name)
        type = property(lambda self: self._type)
        num_inputs = 1
        num_outputs = 1

        def get_output(self, index):
            return self._out

        def get_input(self, index):
            return self._in

        def set_output_type(self, index, dtype):
            self.__dict__.setdefault("_outputs", {})[index] = dtype

    def tensor(name, shape=(-1, 4)):
        found = trt.ITensor()
        found._name, found._shape = name, shape
        return found

    class Network:
        num_inputs = 1
        num_outputs = 1
        num_layers = property(lambda self: len(self._layers))

        def __init__(self):
            self._input, self._output, self._layers = tensor("x"), tensor("y"), []
            before = self._input
            for name, kind in made.kernels:
                layer = trt.ILayer()
                layer._name, layer._type = name, trt.LayerType[kind]
                layer._in, layer._out = before, tensor(f"{name}_out")
                before = layer._out
                self._layers.append(layer)

        def get_input(self, index):
            return self._input

        def get_output(self, index):
            return self._output

        def get_layer(self, index):
            return self._layers[index]

    class Config:
        def __init__(self):
            self.__dict__["_cache"] = None

        def set_flag(self, flag):
            made.flags.append(flag.name)

        def clear_flag(self, flag):
            made.flags.append(f"-{flag.name}")

        def can_run_on_DLA(self, layer):
            return layer.type is trt.LayerType.CONVOLUTION

        def get_timing_cache(self):
            return self._cache

        def create_timing_cache(self, serialized_timing_cache):
            if serialized_timing_cache == b"foreign":
                return None
            cache = trt.ITimingCache()
            cache._data = bytes(serialized_timing_cache)
            return cache

        def set_timing_cache(self, cache, ignore_mismatch):
            self.__dict__["_cache"] = cache
            return not ignore_mismatch

        def add_optimization_profile(self, profile):
            made.profiles.append(dict(profile._shapes))
            return len(made.profiles) - 1

        def set_memory_pool_limit(self, pool, pool_size):
            self.__dict__.setdefault("_pools", {})[pool.name] = pool_size

        def set_calibration_profile(self, profile):
            return True

        num_compute_capabilities = 0

        def set_compute_capability(self, compute_capability, index):
            made.capabilities = (*made.capabilities, compute_capability.name)
            return True

    class Builder:
        num_DLA_cores = property(lambda self: made.cores)
        logger = property(lambda self: self._logger)

        def __init__(self, logger):
            self.__dict__["_logger"] = logger

        def create_network(self, flags=0):
            made.network_flags, made.network = flags, trt.INetworkDefinition()
            return made.network

        def create_builder_config(self):
            made.config = trt.IBuilderConfig()
            return made.config

        def create_optimization_profile(self):
            return trt.IOptimizationProfile()

        def build_serialized_network(self, network, config):
            made.built += 1
            severity = trt.ILogger.Severity
            self.logger.log(severity.WARNING, "tactics were  skipped")
            text = "Engine Layer Information:\nLayer(Relu): relu, Tactic: 0x1, x (Float[4]) ->"
            self.logger.log(severity.VERBOSE, text)
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building", None, 2)
                monitor.phase_start("Tactics", "Building", 1)
                monitor.step_complete("Tactics", 0)
                monitor.phase_finish("Tactics")
                monitor.phase_finish("Building")
            return HostMemory(b"engine")

    class Error:
        def __init__(self):
            pass

        def node(self):
            return 0

        def desc(self):
            return "no importer\nmore"

        def node_name(self):
            return "relu"

        def node_operator(self):
            return "Relu"

    class Parser:
        num_errors = 1

        def __init__(self, network, logger):
            pass

        def parse_from_file(self, model):
            return not model.endswith("bad.onnx")

        def get_error(self, index):
            return trt.ParserError()

    class Registry:
        def load_library(self, plugin_path):
            if "bad" in plugin_path:
                return None
            made.plugins.append(plugin_path)
            return object()

    yield "ITimingCache", TimingCache
    yield "IOptimizationProfile", Profile
    yield "ITensor", Tensor
    yield "ILayer", Layer
    yield "INetworkDefinition", Network
    yield "IBuilderConfig", Config
    yield "Builder", Builder
    yield "ParserError", Error
    yield "OnnxParser", Parser
    yield "IPluginRegistry", Registry


def _run(made, trt, cudart):
    """The classes of an engine."""

    class Context:
        def __init__(self):
            self._shape, self._memory = None, {}

        profiler = None

        def set_input_shape(self, name, shape):
            self.__dict__["_shape"] = shape
            return 1 <= shape[0] <= 8

        def get_tensor_shape(self, name):
            return self._shape

        def set_tensor_address(self, name, memory):
            self._memory[name] = memory
            return True

        def set_optimization_profile_async(self, profile_index, stream_handle):
            return True

        def is_stream_capturable(self, stream):
            return made.capturable

        def execute_async_v3(self, stream_handle):
            count, memory = int(np.prod(self._shape)), dict(self._memory)

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
                return stream_handle == 7
            work()
            if self.profiler is not None:
                self.profiler.report_layer_time("first", 1.0)
                self.profiler.report_layer_time("second", 0.5)
            return stream_handle == 7

    class Inspector:
        execution_context = None

        def get_engine_information(self, format):
            return '{"Layers": [{"Name": "relu", "HasSparseWeights": 1}, "plain"]}'

    class RuntimeConfig:
        dynamic_shapes_kernel_specialization_strategy = None

    class Engine:
        num_io_tensors = 2
        num_optimization_profiles = 1
        refittable = True
        device_memory_size = 4096
        device_memory_size_v2 = 4096

        def get_tensor_name(self, index):
            return "xy"[index]

        def get_tensor_mode(self, name):
            return trt.TensorIOMode["INPUT" if name == "x" else "OUTPUT"]

        def get_tensor_shape(self, name):
            return (-1, 4)

        def get_tensor_dtype(self, name):
            return trt.DataType.FLOAT

        def get_tensor_profile_shape(self, name, profile_index):
            return [(1, 4), (1, 4), (8, 4)]

        def create_execution_context(self, *config):
            return trt.IExecutionContext()

        def create_runtime_config(self):
            made.runtime_config = trt.IRuntimeConfig()
            return made.runtime_config

        def create_engine_inspector(self):
            return trt.EngineInspector()

    class ParserRefitter:
        num_errors = 0

        def __init__(self, refitter, logger):
            self.__dict__["_logger"] = logger

        def refit_from_file(self, model_path):
            if model_path.endswith("other.onnx"):
                self._logger.log(trt.ILogger.Severity.ERROR, "weights  are missing")
            return not model_path.endswith("other.onnx")

    class Refitter:
        def refit_cuda_engine(self):
            made.factor = 3
            return True

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            self.__dict__["_logger"] = logger

        def deserialize_cuda_engine(self, serialized_engine):
            if serialized_engine != b"engine":
                severity = trt.ILogger.Severity
                self._logger.log(severity.ERROR, "checkMacros.cpp::catchCudaError::250: nothing telling")
                self._logger.log(severity.ERROR, "the engine plan  is of version 8")
                return None
            return trt.ICudaEngine()

    yield "IExecutionContext", Context
    yield "EngineInspector", Inspector
    yield "IRuntimeConfig", RuntimeConfig
    yield "ICudaEngine", Engine
    yield "Refitter", Refitter
    yield "OnnxParserRefitter", ParserRefitter
    yield "Runtime", Runtime
