"""From an eager model to a functional graph in torch.export's training IR."""

from .export import batch_dynamic, custom_functions, dynamic_shapes_of, export, preserved
from .functional import CaptureWarning, functional_graph, own
from .modes import Lost, guess_modes, read_modes
from .proof import Proof, prove
from .regions import flatten_regions

__all__ = [
    "CaptureWarning",
    "Lost",
    "Proof",
    "batch_dynamic",
    "custom_functions",
    "dynamic_shapes_of",
    "export",
    "flatten_regions",
    "functional_graph",
    "guess_modes",
    "own",
    "preserved",
    "prove",
    "read_modes",
]
