"""The kernels that blocks are said to save, against engines as TensorRT-RTX builds them; no GPU needed."""

import pytest
import torch

import graphcomb
from graphcomb.passes import Fuse
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.relax import relax

from .toys import NETWORKS


def kernels(program, folder):
    graphcomb.runtime.export_onnx(program, folder / "model.onnx", precision="fp16")
    return len(graphcomb.runtime.build_engine(folder / "model.onnx", target="rtx-sm86").kernels)


@pytest.mark.parametrize(("network", "exactly"), [("resnet", True), ("transformer", False)])
def test_an_engine_without_the_blocks_has_so_many_kernels_fewer(network, exactly, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    program = graphcomb.capture(NETWORKS[network][0]().eval(), torch.randn(2, 3, 16, 12), dynamic_shapes="batch")
    blocks = [b for b in find_blocks(program) if b.prunable]
    dense, pruned = Fuse()(program).program, Fuse()(relax(program, blocks, settled=True)).program
    saved = kernels(dense, tmp_path) - kernels(pruned, tmp_path)
    predicted = sum(b.kernels for b in blocks)
    assert predicted > 0
    # around attention the library also moves heads in kernels of its own, which go with it
    assert saved == predicted if exactly else saved >= predicted


def test_what_counts_as_a_kernel():
    """A layer, a normalisation over features, an attention: one each, after merging; nothing else."""
    torch.manual_seed(0)
    counts = {}
    for network, (make, _) in NETWORKS.items():
        program = graphcomb.capture(make().eval(), torch.randn(2, 3, 16, 12), dynamic_shapes="batch")
        counts[network] = [b.kernels for b in find_blocks(program) if b.prunable]
    assert counts["resnet"] == [1, 2], "two convolutions to one; with a convolution in the skip, three to one"
    assert counts["mobilenet"] == [2, 2, 2], "three layers to one"
    assert counts["convnext"] == [2, 2], "of depthwise, norm and two pointwise layers two are left"
    assert counts["transformer"] == [4, 2, 4, 2], "norm, projections and attention; norm and two layers to one"
