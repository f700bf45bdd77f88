"""Runs a graph node by node over all batches at once, so that weights can change between two nodes. Source: ours."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.compat import pytree
from ...graph.nodes import fetch
from ...graph.program import TrainableModule


class Memory:
    """Where the values of nodes are stored: in memory up to a number of bytes, then in files that vanish with the
    process."""

    def __init__(self, limit: float):
        self.limit, self.held = limit, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def keep(self, value: Any, known: set[int]) -> tuple[Any, int]:
        """The value, moved to a file if memory is full, and the bytes of memory that it adds. known: the addresses of
        storages that are already counted."""
        added = 0

        def place(tensor: Any) -> Any:
            nonlocal added
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in known:
                return tensor
            size = tensor.numel() * tensor.element_size()
            if self.held + added + size <= self.limit or tensor.device.type != "cpu" or not size:
                added += size
                return tensor
            return self._on_disk(tensor)

        value = pytree.tree_map(place, value)
        self.held += added
        return value, added

    def _on_disk(self, tensor: Tensor) -> Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphcomb-")
        path = Path(self._folder.name, str(self._files))
        self._files += 1
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        path.unlink()  # the mapping keeps the file's content until the tensor is freed
        return mapped.view(tensor.shape).copy_(tensor)


class Stepwise:
    """Runs a module over several batches, node after node; a value is dropped after its last reader.

    batches: for each, the leaves of its inputs. values: for each node that will still be read, its values, one for each
    batch.
    """

    def __init__(self, module: TrainableModule, batches: Sequence[Sequence[Any]], memory: Memory):
        self.module, self.memory = module, memory
        self.nodes = [n for n in module.graph.nodes if n.op != "output"]
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.values: dict[fx.Node, list[Any]] = {}
        self.position = 0
        self._batches = batches
        self._count = len(batches)
        self._inputs = {n: i for i, n in enumerate(n for n in self.nodes if n.op == "placeholder")}
        self._readers = {node: len(node.users) for node in self.nodes}
        self._bytes: dict[fx.Node, int] = {}

    def run_before(self, node: fx.Node) -> None:
        """Run every node before this one."""
        while self.position < self.place[node]:
            self.step()

    def run_through(self, node: fx.Node) -> None:
        """Run every node up to and including this one."""
        self.run_before(node)
        if self.position == self.place[node]:
            self.step()

    def hold(self, node: fx.Node) -> None:
        """Keep the values of a node until it was released as often as held."""
        self._readers[node] += 1

    def release(self, node: fx.Node) -> None:
        """Undo one `hold`."""
        if self._read(node):
            self._drop([node])

    def step(self, shared: list[Any] | None = None) -> None:
        """Run the next node. shared: its values, if they are known from another run."""
        node = self.nodes[self.position]
        self.position += 1
        if shared is not None:
            self.values[node] = shared
        elif node.op == "placeholder":
            self.values[node] = [batch[self._inputs[node]] for batch in self._batches]
        elif node.op == "get_attr":
            self.values[node] = [fetch(self.module, str(node.target))] * self._count
        else:
            self._compute(node)
        self._drop([n for n in node.all_input_nodes if self._read(n)])
        if not self._readers[node]:
            self._drop([node])

    def again(self, node: fx.Node) -> None:
        """Compute a node anew, after a change of its weights; its inputs must be held."""
        self.memory.held -= self._bytes.pop(node, 0)
        self._compute(node)

    def _compute(self, node: fx.Node) -> None:
        made, total = [], 0
        for i in range(self._count):

            def at(n: fx.Node, i: int = i) -> Any:
                return self.values[n][i]

            args, kwargs = fx.node.map_arg((node.args, node.kwargs), at)
            known = {
                t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)
            }
            value, added = self.memory.keep(node.target(*args, **kwargs), known)  # type: ignore[operator]
            made.append(value)
            total += added
        self.values[node], self._bytes[node] = made, total

    def _read(self, node: fx.Node) -> bool:
        """Count one reader less; returns whether it was the last."""
        self._readers[node] -= 1
        return self._readers[node] == 0

    def _drop(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            self.values.pop(node, None)
            self.memory.held -= self._bytes.pop(node, 0)
