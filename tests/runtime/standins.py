"""A stand-in for the CUDA runtime, on host memory. That of TensorRT is in fakes/."""

import ctypes

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

    def cudaMemGetInfo(self, free, total):
        total._obj.value = 1 << 30
        free._obj.value = (1 << 30) - sum(len(block) for block in self.blocks.values())
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


def gpu():
    """The compute capability of this machine's real GPU, or None."""
    try:
        return Cuda().compute_capability
    except CudaError:
        return None
