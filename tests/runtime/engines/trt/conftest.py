import pytest

from graphcomb.runtime.engines.trt.build import TensorRTEngine


@pytest.fixture
def engine(classic, tmp_path):
    (tmp_path / "net.engine").write_bytes(b"engine")

    def load(graphs=False):
        return TensorRTEngine(tmp_path / "net.engine", "tensorrt", graphs)

    return load
