"""A weight cut into blocks comes back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcomb.passes.sparse.layout import from_blocks, to_blocks


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_blocks_put_together_again_are_the_tensor(out, into, kernel, size, last):
    tensor = torch.randn(out, into, kernel, kernel)
    blocks = to_blocks(tensor, size, last)
    assert blocks.shape == (-(-tensor.numel() // size), size)
    assert torch.equal(from_blocks(blocks, tensor.shape, last), tensor)
    if last:
        assert torch.equal(blocks.reshape(-1)[:into], tensor[0, :, 0, 0])
