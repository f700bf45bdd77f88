"""A captured model: one functional, trainable ATen graph with its example inputs and the record of its passes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from . import fp8  # noqa: F401  its operators are known then, also in loaded programs
from .capture import archive
from .capture.export import CPU, batch_dynamic, beside, custom_functions, device_of, dynamic_shapes_of, export, moved
from .capture.functional import CaptureWarning, functional_graph, own, written_parameters
from .capture.modes import guess_modes, read_modes
from .capture.proof import Proof
from .capture.proof import prove as compare
from .capture.regions import flatten_regions
from .compat import copy_specs, fake_mode, faking, pytree
from .cost import terms, total, unknowns
from .edit import attributes, copy_tensor, drop_dead, propagate, rebuild
from .errors import BadInput, CaptureError
from .facts import CASTS, SEQUENCES
from .files import replacing
from .nodes import op_name, source
from .outputs import only_outputs
from .to_source.write import to_source as write_source
from .trainable import TrainableModule, reserved, set_tag, switched, tag


class Program:
    """One vision model as a functional graph in torch.export's training IR.

    Attributes: `graph_module` (called with the original arguments), `args`/`kwargs` (example inputs), `dynamic_shapes`
    (torch.export's form, or None), `history` (records of the applied passes), `proof` (what comparing a captured program
    with its model found, else None).
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        args: tuple,
        kwargs: dict[str, Any] | None = None,
        dynamic_shapes: Any = None,
        history: list[dict[str, Any]] | None = None,
    ):
        self._module = _adopt(graph_module)
        self.args, self.kwargs = _compact((tuple(args), dict(kwargs or {})))
        self.dynamic_shapes = dynamic_shapes
        self.history = list(history or [])
        self._stale = False
        self._known: tuple[dict[str, Any], int] | None = None
        self.proof: Proof | None = None  # set by `capture` alone

    # ------------------------------------------------------------------------------------------------ construction
    @classmethod
    def from_exported(cls, exported: ExportedProgram, history: list[dict[str, Any]] | None = None) -> Program:
        """Wrap an `ExportedProgram` in the training IR (as `torch.export.export` returns it, not decomposed).

        Raises BadInput for a program without example inputs or a decomposed one, CaptureError if it cannot be made
        functional.
        """
        if exported.example_inputs is None:
            raise BadInput("the exported program carries no example inputs; export it again with torch.export.export")
        _refuse_decomposed(exported)
        exported = own(exported)
        flatten_regions(exported.graph_module)
        guess_modes(exported)
        return cls._of(exported, history)

    @classmethod
    def _of(cls, exported: ExportedProgram, history: list[dict[str, Any]] | None = None) -> Program:
        args, kwargs = exported.example_inputs
        program = cls(functional_graph(exported), args, kwargs, dynamic_shapes_of(exported), history)
        # In a trace by torch 2.11 the last states of an LSTM have a dimension too many.
        program._stale = any(op_name(node) in SEQUENCES for node in program.structure.nodes)
        return program

    def derive(self, graph_module: fx.GraphModule, stale: bool = True) -> Program:
        """A program with the same inputs and history around another graph. stale: whether shapes in the graph's metadata
        are old."""
        new = Program(graph_module, self.args, self.kwargs, self.dynamic_shapes, self.history)
        new._stale = stale
        return new

    def copy(self) -> Program:
        """An independent copy, with its own weights and graph."""
        return self.derive(rebuild(self._module, copy_tensor), stale=self._stale)

    def to(self, device: str | torch.device) -> Program:
        """An independent copy whose weights and example inputs lie on a device, on which its operators also create
        tensors."""
        device, new = torch.device(device), self.copy()
        inputs = [n for n in new.structure.nodes if n.op == "placeholder"]
        new._module.to(device)
        new.args, new.kwargs = moved((new.args, new.kwargs), device)
        if (mode := fake_mode([n.meta["val"] for n in inputs])) is not None:
            with faking(mode):
                for node in inputs:
                    node.meta["val"] = moved(node.meta["val"], device)
        new._stale = True
        return new

    @property
    def device(self) -> torch.device:
        """The device of the program's weights."""
        return device_of(self._module) or CPU

    def on_cpu(self) -> Program:
        """The program itself if it lies on the processor, else a copy there."""
        return self if self.device == CPU else self.to(CPU)

    # ------------------------------------------------------------------------------------------------------- access
    @property
    def graph_module(self) -> TrainableModule:
        """The graph with up-to-date metadata (fake values of every node)."""
        if self._stale or _outdated(self._module):
            propagate(self.module())
            self._stale = False
        return self._module

    @property
    def graph(self) -> fx.Graph:
        """The graph of `graph_module`, with up-to-date metadata."""
        return self.graph_module.graph

    @property
    def structure(self) -> fx.Graph:
        """The graph without updating its metadata: right after a removal, nodes still have the shapes from before it."""
        return self._module.graph

    def module(self) -> TrainableModule:
        """The live module: training it trains this program. `train()` and `eval()` work."""
        _ = self._module.forward
        return self._module

    def replace_module(self, module: TrainableModule) -> None:
        """Continue with another module of the same inputs, such as a callback's surgery leaves in the middle of
        training."""
        if module is not self._module:
            self._module, self._stale, self._known = module, True, None

    def exported(self, training: bool = False) -> ExportedProgram:
        """The program as an `ExportedProgram` in the training IR.

        training: export train mode (dropout on, batch statistics, which update the running ones), for training without
        graphcomb; an exported program has only one mode.
        """
        if self.device != CPU:  # what another device decides by itself must not enter a graph
            return move_to_device_pass(self.on_cpu().exported(training), self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = rebuild(self._module).train(training)  # the live module stays as it is
            exported = export(module, self.args, self.kwargs, self.dynamic_shapes, training)
        nodes, new = switched(module), switched(exported.graph_module)
        if [n.target for _, n in nodes] == [n.target for _, n in new]:  # so that both modes survive in a file
            for (_, old), (_, node) in zip(nodes, new, strict=True):
                if known := tag(old):
                    set_tag(node, **known)
        return exported

    @property
    def params(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self._module.parameters())

    @property
    def macs(self) -> int:
        """Multiply-accumulates for the example input; warns of operators that cannot be counted, and names them."""
        cost = self.cost()
        if "unknown" in cost:
            warnings.warn(f"not all multiply-accumulates are counted: {'; '.join(cost['unknown'])}", stacklevel=2)
        return cost["macs"]

    def cost(self) -> dict[str, Any]:
        """MACs for the example input, number of parameters, and bytes of weights and activations. If not all operators can
        be counted, `unknown` names the others.

        A pass that knows the cost of its result from the axes sets `known_cost`, which saves a fake run.
        """
        if (known := self.known_cost) is not None:
            return dict(known)
        module = self.graph_module
        return total(terms(module)) | unknowns(module)

    @property
    def known_cost(self) -> dict[str, Any] | None:
        """The cost that a pass has computed from the axes; None once the graph or the shape of a weight has changed."""
        return self._known[0] if self._known and self._known[1] == _fingerprint(self._module) else None

    @known_cost.setter
    def known_cost(self, cost: dict[str, Any] | None) -> None:
        """Set the cost that belongs to the present graph."""
        self._known = None if cost is None else (cost, _fingerprint(self._module))

    # ----------------------------------------------------------------------------------------------------- storage
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a `.pt2` file that includes the record of passes, under a temporary name that is then renamed. Its tensors
        are on the processor. Raises BadInput if the file cannot be written."""
        path = Path(path)
        stored = self.on_cpu()
        with replacing(path) as part:
            with warnings.catch_warnings(), part.open("wb") as file:  # not a name: without .pt2 torch logs a warning
                warnings.simplefilter("ignore")
                torch.export.save(stored.exported(), file, extra_files={archive.RECORD: json.dumps(self.history)})
            archive.seal(part)
        return path

    def to_source(self, path: str | os.PathLike[str]) -> Path:
        """Write the program as a readable `nn.Module` in a Python file that needs only PyTorch, and its tensors into a
        safetensors file beside it; returns the path. `load()` of the written file gives the module.

        The written module is run beside the program in float64, and outputs are compared, in train mode also buffers and
        gradients. Raises Refused, naming the node, if an operator has no source or anything differs.
        """
        return write_source(self.graph_module, self.args, self.kwargs, path)

    def __repr__(self) -> str:
        nodes, cost = sum(n.op == "call_function" for n in self._module.graph.nodes), self.cost()
        least = "at least " if "unknown" in cost else ""
        return f"Program({nodes} ops, {self.params:,} params, {least}{cost['macs']:,} MACs)"


def capture(
    model: torch.nn.Module,
    args: Any,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    prove: bool = True,
    outputs: Sequence[str] | None = None,
) -> Program:
    """Capture a model in eval mode, together with what training changes. The model is left as it was; its weights are
    copied. The program and its example inputs are on the model's device.

    args: example inputs (a tuple, or a single tensor). dynamic_shapes: as for `torch.export.export`, or "batch" for a
    dynamic first dimension of every tensor. prove: whether to compare the program with the model on the example inputs
    (outputs, buffers and gradients in eval and in train mode); `program.proof` has the result. outputs: which of the
    model's outputs the program has, by the names that `named_outputs` gives them ("logits", "boxes.1"): one as the tensor
    itself, several as a dict. What only the other outputs need is not captured.

    Warns of what only training has (auxiliary heads, stochastic depth), of custom backward functions, and of what could not
    be compared. Raises BadInput for unknown outputs or `dynamic_shapes`, CaptureError if `torch.export` refuses the model
    or if the program differs from it (naming the first node that differs).
    """
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    with only_outputs(model, outputs):
        return _captured(model, args, dict(kwargs or {}), dynamic_shapes, prove)


def _captured(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, prove: bool
) -> Program:
    args, kwargs = _distinct((args, kwargs))
    device = device_of(model)
    args, kwargs = beside(model, (args, kwargs))
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if odd := next(filter(reserved, names), None):
        raise CaptureError(
            f"the name of {odd} cannot begin with {odd.partition('.')[0]}, which torch.fx or graphcomb uses otherwise: "
            "rename it in the model"
        )
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != "batch":
            raise BadInput(f'dynamic_shapes: "batch" or a torch.export specification, not "{dynamic_shapes}"')
        args, kwargs, dynamic_shapes = batch_dynamic(model, args, kwargs)
    notes: list[str] = []
    with warnings.catch_warnings(), custom_functions() as functions:
        warnings.simplefilter("ignore")
        exported = export(model, args, kwargs, dynamic_shapes)
        try:
            training = export(model, args, kwargs, dynamic_shapes, training=True)
            flatten_regions(training.graph_module)
        except CaptureError as error:
            training = None
            notes.append(f"train mode does not export, so all training flags are taken to follow it ({error})"[:300])
        flatten_regions(exported.graph_module)
        written = written_parameters(exported, model)
        if training is not None:
            written_parameters(training, model, written)
        lost = read_modes(exported, training, model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", CaptureWarning)
            program = Program._of(exported).copy()
            if device is not None and program.device == CPU:
                program = program.to(device)
        notes += [str(w.message) for w in said if w.category is CaptureWarning]
    notes += _casts(program)
    if prove:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.proof = compare(model, program.module(), args, kwargs, lost, functions)
    if lost and not lost.unknown:
        notes.append(f"only in training, and so not in the program: {lost}")
    if program.proof is not None:
        notes += [f"not compared with the model in {text}" for text in program.proof.skipped]
    elif functions:
        notes.append(f"the backward of {', '.join(functions)} is replaced by that of its forward's operators")
    for note in notes:
        warnings.warn(f"capture: {note}", CaptureWarning, stacklevel=3)
    return program


def _casts(program: Program) -> list[str]:
    """A note on layers whose weights the forward itself casts to half precision, as autocast inside of it does; else
    nothing."""
    layers = [
        user
        for node in program.structure.nodes
        if op_name(node) in CASTS and node.all_input_nodes[0].op == "get_attr"
        if node.meta["val"].dtype in (torch.bfloat16, torch.float16) and node.meta["val"].dim() > 1
        for user in node.users
    ]
    if not layers:
        return []
    return [
        f"the forward itself computes {len(layers)} layers in half precision, the first {source(layers[0])}; sparsity and "
        "quantisation leave them alone and ONNX export refuses them: turn autocast on where the model is called, not in its "
        "forward"
    ]


def _compact(inputs: Any) -> Any:
    """The inputs with a copy of every tensor that is a part of a larger one, such as the first images of a data set, which
    a saved program would contain as a whole."""

    def alone(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.untyped_storage().nbytes() > x.nbytes:
            return _copied(x)
        return x

    return pytree.tree_map(alone, inputs)


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _distinct(inputs: Any) -> Any:
    """The inputs with a copy of every tensor that occurs again: `torch.export` treats the same tensor as one input, and the
    program would only read the first of them."""
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and id(x) in seen:
            return _copied(x)
        seen.add(id(x))
        return x

    return pytree.tree_map(own, inputs)


def load(path: str | os.PathLike[str]) -> Program:
    """Read a `.pt2` file, graphcomb's or any other with example inputs. Raises BadInput for a missing or unusable file,
    CaptureError if its graph cannot be made functional."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, history = archive.load(path)
    try:
        return Program.from_exported(exported, history)
    except (BadInput, CaptureError) as error:
        raise type(error)(f"{path}: {error}") from None


DECOMPOSED = frozenset(
    "convolution native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_no_update native_layer_norm "
    "native_group_norm addmm mm _softmax _log_softmax native_dropout _adaptive_avg_pool2d _to_copy".split()
)


def _refuse_decomposed(exported: ExportedProgram) -> None:
    """Raise BadInput for the result of `run_decompositions`, which can neither be pruned nor trained: its batch norms have
    no train mode, and it does not say which matrix is the weight of a linear layer."""
    if exported.dialect == "TRAINING":  # operators such as a user's own torch.mm are then no sign of a decomposition
        return
    decomposed = sorted({op_name(n) for n in exported.graph.nodes} & DECOMPOSED)
    if decomposed:
        raise BadInput(
            f"the exported program is decomposed (it holds {', '.join(decomposed[:3])}), so nothing in it could be pruned; "
            "export it again with torch.export.export, without run_decompositions()"
        )


def _adopt(module: fx.GraphModule) -> TrainableModule:
    if isinstance(module, TrainableModule):
        return module
    drop_dead(module)
    new = TrainableModule(module, module.graph)
    new.eval()  # torch.export may leave the module's flag in train mode
    copy_specs(module, new)
    return new


def _outdated(module: fx.GraphModule) -> bool:
    """Whether a stored tensor was replaced (such as the weight of a new head) by one of another shape than the metadata
    has."""
    return any(
        isinstance(stored, torch.Tensor) and "val" in node.meta and node.meta["val"].shape != stored.shape
        for node, stored in attributes(module)
    )


def _fingerprint(module: fx.GraphModule) -> int:
    """A hash of the operators of a graph and the shapes of its weights."""
    shapes = [stored.shape for _, stored in attributes(module) if isinstance(stored, torch.Tensor)]
    return hash((*(n.target for n in module.graph.nodes), *shapes))


def flatten_outputs(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in pytree order."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
