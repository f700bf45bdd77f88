"""Look at values inside a graph while it runs over batches."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from ...graph.compat import pytree
from .feed import Batch

See = Callable[[fx.Node, Any, dict[fx.Node, Any]], None]


class Observer(fx.Interpreter):
    """Runs a graph and shows the values of chosen nodes.

    see: called as `see(node, value, values)` when one of the nodes is computed; `values` holds what was computed before and
    is still needed, by node.
    """

    def __init__(self, module: fx.GraphModule, nodes: Iterable[fx.Node], see: See):
        super().__init__(module)
        self.nodes, self.see = set(nodes), see

    def __call__(self, batch: Batch) -> Any:
        """Run over a batch; returns the graph's outputs as they stand in it, a flat tuple."""
        return self.run(*pytree.tree_leaves((batch.args, batch.kwargs)), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.see(n, value, self.env)
        return value
