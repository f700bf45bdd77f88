"""Pruning without labels and training: removal by what is missed least, and least-squares weights from images.

    python examples/repair_without_training.py --macs 0.7 --out small.onnx

On digits of scikit-learn; put your own model and images in their place.
"""

import argparse

import graphcomb
from graphcomb.data import digits
from graphcomb.models import trained_digits
from graphcomb.passes import Fuse, RemoveChannels
from graphcomb.runtime import export_onnx


def main(argv=None, **training):
    parser = argparse.ArgumentParser()
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--out", default="small.onnx")
    options = parser.parse_args(argv)
    model = trained_digits(**training)
    train, test = digits(size=16)
    images = [batch for batch, _ in train][:4]  # 256 images, without their labels
    program = graphcomb.capture(model, (images[0],), dynamic_shapes="batch")
    result = RemoveChannels(macs=options.macs, importance="repair", scope="global", repair=True)(program, data=images)
    report = export_onnx(Fuse()(result.program).program, options.out)

    def accuracy(network):
        return sum((network(x).argmax(1) == y).sum().item() for x, y in test) / len(test.dataset)

    small = result.program.module().eval()
    print(f"{result.program.macs / program.macs:.0%} of the MACs in {report.path}")
    print(f"accuracy {accuracy(model):.1%} before, {accuracy(small):.1%} after")
    return accuracy(model), accuracy(small), result


if __name__ == "__main__":
    main()
