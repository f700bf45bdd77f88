"""Queries and keys whose heads lost channels: the best mix of the remaining channels. Source: ours.

Softmax depends on the logits `q k^T` alone. If some channels of a head remain, the mix A that minimises

sum over images and positions n, m of (q_n . k_m  -  q'_n A k'_m)^2,      q, k dense; q', k' of the smaller network

is a least-squares problem in the entries of A, whose inputs are the products of an entry of q' and one of k':

sum x x^T = sum_images (q'^T q') (x) (k'^T k'),     sum y x = sum_images (q'^T q)(k'^T k)^T,     sum y^2 likewise,

so it needs only moments of single images, never the logits. A is then multiplied into the projection of the queries, which
must come right before: operators that move entries and factors that are numbers may stand between, no norm or rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.facts import COPIES, MAPS, PARTS, VIEWS, names
from ...graph.nodes import arguments, fetch, hint, op_name, shape
from ...graph.trainable import TrainableModule
from .consumers import Consumer, Pair, consumer_of, twin_of
from .least_squares import Fit, Sums, fit

OPERANDS = {"scaled_dot_product_attention": ("query", "key"), "matmul": ("self", "other"), "bmm": ("self", "mat2")}
MOVES = (VIEWS | PARTS | names("permute transpose movedim swapaxes expand repeat_interleave getitem clone")) - names(
    "view_as reshape_as tensor_split"
)
SAME = COPIES - names("native_dropout")


@dataclass(frozen=True)
class Logits:
    """The product `q k^T` of an attention in the smaller program, and its twin in the dense one.

    node, twin: the nodes of the two products. weight, bias: names of the parameters that project the queries (bias may be
    None). rows: `(heads, channels)`, the outputs of that projection that are the channels of each head. heads: for every
    position besides samples and tokens (those of heads and windows), the index of its head. places: for every such
    position, that of the dense network.
    """

    node: fx.Node
    twin: fx.Node
    weight: str
    bias: str | None
    rows: Tensor
    heads: Tensor
    places: Tensor

    @property
    def query(self) -> fx.Node:
        """The node of the queries."""
        return arguments(self.node)[OPERANDS[op_name(self.node)][0]]

    @property
    def goals(self) -> tuple[fx.Node, ...]:
        """The nodes of the queries and keys in the dense network."""
        return tuple(arguments(self.twin)[key] for key in OPERANDS[op_name(self.twin)])

    @property
    def unknowns(self) -> int:
        """Number of entries in the mix of one head."""
        return self.rows.shape[1] ** 2


def find_logits(pair: Pair) -> tuple[list[Logits], list[dict[str, str]]]:
    """The logits whose heads lost channels, in the order they run; and rows `{"what", "why"}` for those that stay as they
    are."""
    consumers, refused = [], []
    for node in pair.smaller.graph.nodes:
        twin = pair.twins.get(node.name)
        if op_name(node) not in OPERANDS or twin is None or op_name(twin) != op_name(node):
            continue
        width, whole = (shape(arguments(n)[OPERANDS[op_name(n)][0]])[-1] for n in (node, twin))
        if width == whole:
            continue
        projection, why = _projection(node)
        origin = twin_of(projection, pair.twins, pair.same)
        consumer: Consumer | Logits | str = why or consumer_of(projection, origin, pair)
        what = node.name
        if isinstance(consumer, Consumer):
            what = consumer.weight
            if consumer.weight in pair.sparse:
                consumer = "Sparsify made the weight of the queries sparse, and a mix would fill its zeros up"
            elif arguments(projection)["bias"] is not None and consumer.bias is None:
                consumer = "the bias of the queries is used more than once"
            elif op_name(consumer.twin) != op_name(projection):
                consumer = "the dense network has no such layer to compare with"
            elif consumer.groups > 1 or consumer.transposed:
                consumer = "a grouped or transposed convolution projects its queries"
            elif width**2 > pair.largest:
                consumer = f"{width**2} unknowns for each head, and {pair.largest} are the most"
            else:
                consumer = _logits(node, twin, projection, consumer)
        if isinstance(consumer, Logits):
            consumers.append(consumer)
        else:
            refused.append({"what": what, "why": str(consumer)})
    return consumers, refused


def _projection(node: fx.Node) -> tuple[fx.Node, str | None]:
    """The layer that projects the queries, and None; or the node that stands in between, and the reason."""
    at = arguments(node)[OPERANDS[op_name(node)][0]]
    while op_name(at) not in MAPS:
        if not _carries(at):
            return at, f"{at.name} stands between the queries and their projection"
        at = at.args[0]
    return at, None


def _carries(node: fx.Node) -> bool:
    """Whether a node only moves the entries of its first argument, or multiplies all of them by one number."""
    if op_name(node) in MOVES | SAME:
        return isinstance(node.args[0], fx.Node)
    factor = op_name(node) in ("mul", "div") and not isinstance(node.args[1], fx.Node)
    return factor and isinstance(node.args[0], fx.Node)


def _channels(projection: fx.Node) -> dict[fx.Node, Any]:
    """For every value that consists of a layer's outputs, moved about, the index of the output that each entry is."""
    size, rank = shape(projection), len(shape(projection))
    along = rank - 1 if op_name(projection) == "linear" else 1
    view = [-1 if d == along else 1 for d in range(rank)]
    channels: dict[fx.Node, Any] = {projection: torch.arange(size[along]).view(view).expand(size)}
    node = projection
    while (node := node.next).op != "root":
        before = node.args[0] if node.op == "call_function" and _carries(node) else None
        if not isinstance(before, fx.Node) or before not in channels:
            continue
        if op_name(node) not in MOVES:
            channels[node] = channels[before]
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: channels[n] if n in channels else hint(n))
        channels[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return channels


def _logits(node: fx.Node, twin: fx.Node, projection: fx.Node, consumer: Consumer) -> Logits | str:
    """The logits if it is known which outputs of the projection the queries are; else the reason why they stay."""
    keys = OPERANDS[op_name(node)]
    ids, dense_ids = _channels(projection), _channels(consumer.twin)
    tables = []
    for one, known in ((node, ids), (twin, dense_ids)):
        query, key = (arguments(one)[k] for k in keys)
        if query not in known:
            return "its queries are not those of the dense network"
        both = _positions(one, known[query], torch.empty(shape(key)))
        if both is None:
            return "its queries are shared by positions of the keys"
        table = both[0]
        if not bool((table == table[:1, :, :1]).all()):
            return "its heads are mixed with samples or positions"
        tables.append(table[0, :, 0])
    rows, heads = tables[0].unique(dim=0, return_inverse=True)
    if len(rows.unique()) < rows.numel():
        return "its heads share channels"
    for reader in projection.graph.nodes:
        others = reader.all_input_nodes
        if reader is node:
            others = [v for k, v in arguments(node).items() if k != keys[0] and isinstance(v, fx.Node)]
        if reader in ids or op_name(reader).startswith("sym_size"):
            continue
        for value in (ids[i] for i in others if i in ids):
            parts = value if isinstance(value, (list, tuple)) else [value]
            if any(bool(torch.isin(part, rows).any()) for part in parts):
                return f"{reader.name} reads its queries elsewhere, too"
    owner = {int(row): place for place, head in enumerate(tables[1]) for row in head}
    kept = torch.from_numpy(consumer.outputs)[tables[0]]
    places = [{owner.get(int(row), -1) for row in head} for head in kept]
    if not all(len(head) == 1 and -1 not in head for head in places):
        return "its heads are not heads of the dense network"
    return Logits(
        node, twin, consumer.weight, consumer.bias, rows, heads, torch.tensor([next(iter(head)) for head in places])
    )


def _positions(node: fx.Node, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """Queries and keys as `(samples, positions of heads and windows, tokens, channels)`; None if queries are repeated."""
    key = key if op_name(node) == "scaled_dot_product_attention" else key.mT
    query, key = (t.unsqueeze(1) if t.dim() == 3 else t for t in (query, key))
    if query.dim() < 4 or key.dim() > query.dim():
        return None
    if arguments(node).get("enable_gqa"):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    if torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]) != query.shape[:-2]:
        return None
    key = key.expand(*query.shape[:-2], *key.shape[-2:])
    return query.flatten(1, -3), key.flatten(1, -3)


class Mixing:
    """Finds the best mixes of the channels of some logits. values, dense_values: of each node, a value for each batch, in
    the smaller and in the dense network. halves: for each batch, the half of each sample (`images.halves`)."""

    def __init__(
        self,
        logits: Logits,
        values: dict[fx.Node, list[Tensor]],
        dense_values: dict[fx.Node, list[Tensor]],
        halves: list[Tensor],
    ):
        self.logits, self.halves = logits, halves
        self.values, self.dense = values, dense_values

    def _batches(self, head: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """For each batch, yield queries and keys of the smaller network, those of the dense one, all `(n, tokens, c)`, and
        the half of each of the n."""
        names_, logits = OPERANDS[op_name(self.logits.node)], self.logits
        at = (logits.heads == head).nonzero()[:, 0]
        for i, half in enumerate(self.halves):
            parts = []
            for node, values, places in (
                (logits.node, self.values, at),
                (logits.twin, self.dense, logits.places[at]),
            ):
                both = _positions(node, *(values[arguments(node)[k]][i] for k in names_))
                assert both is not None  # `_logits` has checked that with the example inputs
                parts += [t.index_select(1, places.to(t.device)).flatten(0, 1).double() for t in both]
            windows = half.repeat_interleave(len(parts[0]) // len(half))  # windows of an image follow one another
            q, k, dense_q, dense_k = parts
            yield q, k, dense_q, dense_k, windows.to(q.device)

    def sums(self, head: int) -> tuple[Sums, Sums]:
        """The sums that the best mix of a head depends on, for both halves of this process's images."""
        device = self.values[self.logits.query][0].device
        halves = tuple(Sums.zeros(1, self.logits.unknowns, 1, device) for _ in range(2))
        for *parts, half in self._batches(head):
            for which, sums in enumerate(halves):
                q, k, dense_q, dense_k = (t[half == which] for t in parts)
                width = q.shape[-1]
                moments = (q.mT @ q).flatten(1).T @ (k.mT @ k).flatten(1)  # (i i', j j')
                sums.count += len(q) * q.shape[1] * k.shape[1]
                sums.xx += moments.reshape(width, width, width, width).transpose(1, 2).reshape(1, width**2, width**2)
                sums.yx += ((q.mT @ dense_q) @ (k.mT @ dense_k).mT).sum(0).reshape(1, 1, -1)
                sums.yy += ((dense_q.mT @ dense_q) * (dense_k.mT @ dense_k)).sum()
        return halves  # type: ignore[return-value]

    def measured(self, head: int, mix: Tensor) -> Tensor:
        """The summed squared error of a head's logits with a mix, on this process's images."""
        total = torch.zeros((), dtype=torch.float64, device=mix.device)
        for *parts, half in self._batches(head):
            q, k, dense_q, dense_k = (t[half >= 0] for t in parts)
            total += (q @ mix @ k.mT - dense_q @ dense_k.mT).square().sum()
        return total

    def fit(self, sums: tuple[Sums, Sums], ridge: float | None) -> Fit:
        """The best mix of a head; its entries are one row of the weight."""
        eye = torch.eye(self.logits.rows.shape[1], dtype=torch.float64, device=sums[0].xx.device)
        return fit(sums, eye.reshape(1, 1, -1), None, ridge)

    def fold(self, module: TrainableModule, head: int, mix: Tensor) -> None:
        """Multiply the mix of a head into the projection of its queries, and into the values of the queries computed so
        far."""
        logits, rows = self.logits, self.logits.rows[head]
        for name in (logits.weight, logits.bias):
            if name is not None:
                tensor = fetch(module, name)
                old = tensor[rows.to(tensor.device)].double()
                tensor[rows.to(tensor.device)] = torch.tensordot(mix.T, old, 1).to(tensor.dtype)
        at = logits.heads == head
        for i, query in enumerate(self.values[logits.query]):
            where = at.to(query.device).reshape(*query.shape[1:-2], 1, 1) if query.dim() > 3 else True
            mixed = (query.double() @ mix).to(query.dtype)
            self.values[logits.query][i] = torch.where(torch.as_tensor(where, device=query.device), mixed, query)
