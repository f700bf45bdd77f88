"""What is said to be constant is: against runs on other inputs, of single operators and of random networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphcomb import capture
from graphcomb.graph.verify.evaluate import Evaluator, double_weights
from graphcomb.passes.minimise.constants import Constants, Partial

from ...graph.random_networks.trial import network
from .toys import with_zeros


def partials(program):
    """The value of every tensor node, known in part, by name."""
    found = {}
    examples = torch.utils._pytree.tree_leaves((program.args, program.kwargs))

    def see(node, value):
        if isinstance(value, Partial):
            found[node.name] = value

    Constants(program).run(examples, see)
    return found


def check(program, rounds=3):
    """Compare what is known with runs on random inputs; the share of entries behind the inputs that are known."""
    known, weights, wide = partials(program), double_weights(program), torch.complex128
    for seed in range(rounds):
        torch.manual_seed(seed)
        inputs = [torch.randn_like(x) * 3 for x in torch.utils._pytree.tree_leaves((program.args, program.kwargs))]

        def see(node, value):
            if isinstance(value, torch.Tensor) and node.name in known:
                part = known[node.name]
                assert part.value.shape == value.shape, node
                error = (part.value.to(wide) - value.to(wide)).abs()[~part.unknown]
                assert not len(error) or float(error.max()) <= 1e-12 * (1 + float(value.to(wide).abs().max())), node

        Evaluator(program, weights).run(inputs, see)
    return known


@pytest.mark.parametrize("seed", range(1, 13))
def test_known_entries_of_random_networks_do_not_depend_on_the_inputs(seed):
    drawn = network(seed)
    with_zeros(drawn.model, seed)
    check(drawn.capture())


class Rows(nn.Module):
    """A layer of which two of six outputs have no weights, and what a function makes of it."""

    def __init__(self, function, image=True, **layers):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1) if image else nn.Linear(5, 6)
        with torch.no_grad():
            self.first.weight[[1, 4]] = 0
            self.first.bias[[1, 4]] = torch.tensor([0.7, 0.0])
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, x):
        return self.function(self.first(x), **self.layers)


def known_channels(function, image=True, dim=1, **layers):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4) if image else torch.randn(2, 3, 5)
    program = capture(Rows(function, image, **layers).double().eval(), (x.double(),))
    last = list(program.graph.nodes)[-2].name
    return check(program)[last].along(dim)[0].nonzero().flatten().tolist()


def scaled(weight):
    norm = nn.BatchNorm2d(6)
    norm.weight.data = torch.tensor(weight)
    norm.running_mean.fill_(0.3)
    return norm


@pytest.mark.parametrize(
    ("function", "layers", "expected"),
    [
        (lambda x: x, {}, [1, 4]),
        (lambda x: F.gelu(x) + 1, {}, [1, 4]),
        (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), {}, [1, 4]),
        (lambda x, m: m(x), {"m": scaled([1.0, 1, 1, 0, 1, 1])}, [1, 3, 4]),
        (lambda x, m: m(x), {"m": nn.Conv2d(6, 6, 3, padding=1, groups=6)}, [1, 4]),
        (lambda x, m: m(x), {"m": nn.ConvTranspose2d(6, 6, 2, 2, groups=6)}, [1, 4]),
        (lambda x: F.max_pool2d(x, 3, 1, 1), {}, [1, 4]),
        (lambda x: F.avg_pool2d(x, 3, 1, 1), {}, [1, 4]),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), {}, [1, 4]),
        (lambda x: F.pad(x, (1, 1, 1, 1)), {}, [1, 4]),
        (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), {}, [0, 3]),
        (lambda x: x.flatten(2).transpose(1, 2).unflatten(2, (3, 2)).permute(0, 2, 3, 1).flatten(1, 2), {}, [1, 4]),
        (lambda x: x.softmax(1), {}, []),
        (lambda x: x - x.amax(1, keepdim=True), {}, []),
        (lambda x: x + torch.rand_like(x), {}, []),
        (lambda x: x @ x.mT, {}, [1, 4]),
    ],
)  # fmt: skip
def test_known_channels(function, layers, expected):
    assert known_channels(function, **layers) == expected


def test_attention_hands_on_what_all_keys_have_in_common():
    def attend(x):
        return F.scaled_dot_product_attention(x.flip(2), x.flip(2), x)

    assert known_channels(attend, image=False, dim=2) == [1, 4]


def test_a_mask_that_may_leave_no_key_hands_on_zeros_alone():
    def attend(x):
        return F.scaled_dot_product_attention(x.flip(2), x.flip(2), x, torch.ones(3, 3).tril().bool())

    assert known_channels(attend, image=False, dim=2) == [4]


def test_one_constant_at_all_positions_is_told_from_several():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3)).double()
    with torch.no_grad():
        body[0].weight.zero_()
        body[0].bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    program = capture(body, (torch.randn(2, 2, 4, 4, dtype=torch.float64),))
    known, constant = check(program)[list(program.graph.nodes)[-2].name].along(1)
    assert known.all()
    assert constant.isfinite().tolist() == [False, True, False]  # the border of a padded constant is another one
    torch.testing.assert_close(constant[1], body[1].bias[1].detach())


def test_other_sizes_have_other_borders():
    """At a height of one, all of a padded constant is border; at others it is not."""
    body = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3)).double()
    nn.init.zeros_(body[0].weight)
    with torch.no_grad():
        body[0].bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    size = torch.export.Dim("size", min=1, max=9)
    program = capture(body, (torch.randn(2, 2, 5, 5, dtype=torch.float64),), dynamic_shapes=({2: size, 3: size},))
    known = partials(program)[list(program.graph.nodes)[-2].name].along(1)[0]
    assert known.tolist() == [False, True, False]
