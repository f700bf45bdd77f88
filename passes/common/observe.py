"""Shows the values of nodes while a graph runs over batches."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from ...graph.compat import pytree
from .feed import Batch

See = Callable[[fx.Node, Any, dict[fx.Node, Any]], None]


class Observer(fx.Interpreter):
    """Runs a graph and shows the values of chosen nodes.

    see: called as `see(node, value, values)` when one of `nodes` has been computed; `values` maps each earlier node
    whose value is still needed to its value.
    """

    def __init__(self, module: fx.GraphModule, nodes: Iterable[fx.Node], see: See):
        super().__init__(module)
        self.nodes, self.see = set(nodes), see

    def __call__(self, batch: Batch) -> Any:
        """Run over a batch; returns the outputs as a flat tuple, without the structure of the model's outputs."""
        return self.run(*pytree.tree_leaves((batch.args, batch.kwargs)), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.see(n, value, self.env)
        return value
