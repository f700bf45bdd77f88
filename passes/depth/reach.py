"""Whether a network's outputs still depend on its inputs when some of its blocks are left out."""

from collections.abc import Iterable, Sequence

import torch

from ...graph.program import Program, flatten_outputs
from ...graph.verify.evaluate import Evaluator, double_weights, random_inputs
from .blocks import Block
from .relax import relax


class Reach:
    """Tells which choices of blocks cut the outputs off from the inputs (ours).

    A class token learns of the image through attention alone: without any attention block, its network gives the same
    answer for all images, and no check of merges notices, since that is what was asked for. A choice passes if every output
    tensor that changes in the dense network when an input is drawn anew (float64, one input at a time) also changes without
    the blocks. Only blocks that are left out as a whole can cut, and leaving out more never connects again, so the result
    for one choice decides many others.
    """

    def __init__(self, program: Program, blocks: Sequence[Block], seed: int = 0):
        self.program, self.blocks = program, blocks
        generator = torch.Generator().manual_seed(seed)
        first, other = random_inputs(program, generator), random_inputs(program, generator)
        floats = [i for i, x in enumerate(first) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.inputs = [first, *([*first[:i], other[i], *first[i + 1 :]] for i in floats)]
        self.reaching: list[frozenset[int]] = [frozenset()]
        self.cutting: list[frozenset[int]] = []
        self._dense: list[list[bool]] | None = None

    def __call__(self, chosen: Iterable[int]) -> bool:
        """Whether the outputs still depend on the inputs without the blocks of these indices."""
        dropped = frozenset(i for i in chosen if self.blocks[i].dropped)
        if any(dropped <= known for known in self.reaching):
            return True
        if any(known <= dropped for known in self.cutting):
            return False
        if self._dense is None:
            self._dense = self._moves(self.program)
        without = relax(self.program, [self.blocks[i] for i in sorted(dropped)], settled=True)
        pairs = zip(self._dense, self._moves(without), strict=True)
        reaches = all(now or not before for a, b in pairs for before, now in zip(a, b, strict=True))
        (self.reaching if reaches else self.cutting).append(dropped)
        return reaches

    def _moves(self, program: Program) -> list[list[bool]]:
        """For each input and output tensor, whether the output changes with the input."""
        evaluator = Evaluator(program, double_weights(program))
        base, *others = (flatten_outputs(evaluator.run(inputs)) for inputs in self.inputs)
        return [[not torch.equal(a, b) for a, b in zip(base, outputs, strict=True)] for outputs in others]
