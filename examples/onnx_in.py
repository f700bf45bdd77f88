"""From an ONNX file to a smaller one, without the code of the model and without training.

    python examples/onnx_in.py model.onnx small.onnx --macs 0.8 --shape image=1,3,320,320

Random images stand in for yours here; with your own, in `images`, the repair is worth more.
"""

import argparse

import torch

import graphcomb
from graphcomb.passes import Fuse, RemoveChannels
from graphcomb.runtime import export_onnx


def main(argv=None, images=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--macs", type=float, default=0.8)
    parser.add_argument("--shape", action="append", default=[], help="NAME=1,3,320,320, where the file leaves it open")
    options = parser.parse_args(argv)
    shapes = {name: tuple(int(n) for n in sizes.split(",")) for name, sizes in (s.split("=") for s in options.shape)}
    program = graphcomb.from_onnx(options.model, shapes=shapes or None)
    images = images or [torch.randn_like(program.args[0]) for _ in range(8)]
    result = RemoveChannels(macs=options.macs, importance="repair", scope="global", repair=True)(program, data=images)
    report = export_onnx(Fuse()(result.program).program, options.out)
    print(f"{result.program.macs / program.macs:.0%} of the MACs in {report.path}, opset {report.opset}")
    return program, result


if __name__ == "__main__":
    main()
