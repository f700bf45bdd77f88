"""ONNX operators that only move data, which several files of this folder look through."""

# Each entry of a result is an entry of an operand. Cast is not in the table, since it may round; nor are Expand, Tile and
# Where, which repeat or choose entries: each user of the table adds those that it looks through, too.
MOVES = frozenset("Concat Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split())
