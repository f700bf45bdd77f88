"""The pass that trains a program to recover accuracy, against the dense teacher."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.outputs import named_outputs
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import Context, Pass, PassResult, Refusal, check_field
from ..common.class_axis import class_axis, other_outputs
from ..common.feed import Batch, check_inputs
from ..common.losses import class_dim, logits_of, task_loss, tell_classes
from ..common.processes import accelerator, move, placed
from ..common.repeat import functions_code
from ..common.scoring import evaluate
from .callbacks import Callback, Kept, Surgery, select_kept
from .features import matching_features, tapped
from .loop import fit
from .options import Training
from .teaching import check_forms, soft_kl, taught
from .trainee import Work

NO_SCORES = (
    "name the outputs to teach in Distill's outputs, or set Distill's alpha to 0 (then give loss=, and metric= where "
    "there is val)"
)
NO_CLASSES = "set Distill's class_dim to the dimension of the classes, or alpha to 0"
UNTAUGHT = "the teacher's class scores alone are taught; a loss of your own may read this output"


@dataclass(frozen=True)
class Distill(Training, Pass):
    """Train the program (the student) on the context's data so that it answers like the context's teacher.

    L = (1-alpha) * task + alpha * T^2 * KL(teacher/T || student/T) + features * sum_l MSE(norm(S_l), norm(T_l)) + channels
            * mean_l CWD(T_l, S_l)

    task is the context's loss, by default cross-entropy. KL runs over the classes of the class scores and is averaged over
    samples and, for segmentation, pixels. S_l and T_l are outputs of blocks that both networks have by the same node name;
    norm divides every sample by its root mean square, so that the MSE is 2 * (1 - cosine). Where the student was pruned,
    the teacher's features are restricted to the indices that the student kept. CWD is the KL between the positions at which
    each channel is active, for the inputs of detection heads (`channel_wise`). The teacher runs in eval mode; neither it
    nor the input program is changed.

    - alpha: weight of the teacher's class scores, 0 to 1. It counts as 1 without labels, as 0 without a teacher.
    - temperature: T, above 0.
    - features: weight of the feature term, 0 for none. It also affects scores from gradients that prune while training, and
      makes small segmenters keep their early layers at the cost of the rest (benchmarks/accuracy.py).
    - channels: weight of the channel-wise term, 0 for none.
    - at: patterns of module paths, such as "neck.*", whose outputs both terms compare; by default the outputs of blocks.
    - labels: whether to use the labels of the data.
    - class_dim: the dimension of the class scores that holds the classes. None finds it by the shape of the labels, then by
      the layer that computes the scores, and takes 1 for `(N, C)` and `(N, C, H, W)`; anything else is BadInput.
    - outputs: what is taught in place of the class scores, of a detector for instance, by the names that `named_outputs`
      gives a model's outputs: a whole number is the dimension of classes that exclude each other (KL, as above), "binary"
      means logits of independent classes (KL of each yes or no, over the number of objects that the teacher expects; above
      temperature 1 the many positions without an object outweigh the others),
      "boxes" the L1 distance of coordinates where the teacher is confident, "values" the squared error, relative to the
      teacher's mean square. Outputs are compared position by position; for a network that orders its queries by score, give
      a function of (student's outputs, teacher's outputs) that matches them and returns a scalar.
    - weights: of these outputs, by name; 1 for an output without one.
    - confident: the class probability from which on the teacher's boxes count. background: the class that means that there
      is no object, whose probability is no confidence; None for none.

    The other options are those of `Training`. The form of the loss is ours (CPD, arXiv 2408.03046, says that the dense
    network teaches the pruned one, not how); softened scores with T^2 are Hinton et al.'s (arXiv 1503.02531).

    Raises BadInput without data, with neither teacher nor labels, for a teacher with other inputs or class scores, and when
    the loss is no longer finite. Refused: outputs besides the class scores, and blocks whose output has another shape in
    the teacher while no record says which indices were kept.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    features: float = 0.0
    channels: float = 0.0
    at: tuple[str, ...] = ()
    labels: bool = True
    class_dim: int | None = None
    outputs: Mapping[str, int | str] | Callable[[Any, Any], torch.Tensor] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    confident: float = 0.5
    background: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "alpha", 0 <= self.alpha <= 1, "0 to 1")
        check_field(self, "temperature", self.temperature > 0, "above 0")
        check_field(self, "features", self.features >= 0, "at least 0")
        check_field(self, "channels", self.channels >= 0, "at least 0")
        check_field(self, "at", not self.at or self.compares, "empty, unless features or channels is above 0")
        check_field(self, "class_dim", self.class_dim != 0, "a dimension besides the batch's, or null")
        check_field(self, "confident", 0 <= self.confident <= 1, "0 to 1")
        if self.outputs is not None or self.weights:
            wrong = check_forms(self.outputs, self.weights)
            check_field(self, "outputs", wrong is None, str(wrong))

    @property
    def compares(self) -> bool:
        """Whether features are compared."""
        return self.features > 0 or self.channels > 0

    def run(self, program: Program, context: Context) -> PassResult:
        student = program.copy()
        return PassResult(student, self.train(student, context))

    def in_loop(self, program: Program, context: Context, steps: int, own: TrainableModule | None) -> Work:
        def conclude(trained: Program) -> PassResult:
            return PassResult(trained, {"changed": ["weights", "running statistics"], "refused": []})

        return Work([], conclude, self.loss_in_loop(program, context))

    def loss_in_loop(self, program: Program, context: Context) -> Callable[[Any, Batch], torch.Tensor]:
        """The loss of a batch, from the student's outputs and the context's teacher, for the user's own training loop.
        Raises BadInput for weights of features, which such a loop does not see."""
        for name in ("features", "channels"):
            check_field(self, name, not getattr(self, name), "0 in a loop of your own, which sees no features")
        assert context.teacher is not None
        teacher = context.teacher.copy().module().eval()
        objective = _Objective(self, context.loss, lambda *a, **k: (teacher(*a, **k), ()), {}, class_axis(program))

        def loss(outputs: Any, batch: Batch) -> torch.Tensor:
            device = next(t.device for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))
            if next(t.device for t in teacher.state_dict().values()) != device:
                move(teacher, device)
            return objective((outputs, ()), batch.to(device))[0]

        return loss

    def lesson(
        self, student: Any, teacher: Any, labels: Any = None, of_graph: int | None = None, instead: str = NO_SCORES
    ) -> torch.Tensor:
        """The loss of the student's outputs against the teacher's, a scalar: of those that `outputs` names, else of the
        class scores.

        of_graph: the dimension of the classes as the graph tells. instead: what the message proposes if there are no class
        scores.
        """
        if self.outputs is not None:
            return taught(
                self.outputs, self.weights, student, teacher, self.temperature, self.confident, self.background
            )
        ours, theirs = (logits_of(raw, instead) for raw in (student, teacher))
        return soft_kl(ours, theirs, self.temperature, class_dim(ours, labels, self.class_dim, of_graph, NO_CLASSES))

    def train(self, student: Program, context: Context, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Train a program in place and return the record; passes call it that change the network meanwhile
        (`callbacks`)."""
        teacher = context.teacher.copy() if context.teacher else None
        if teacher is None and not self.labels:
            raise BadInput("Distill: labels is false and there is no teacher to learn from; pass teacher=")
        if teacher is None and self.compares:
            name = "features" if self.features else "channels"
            raise BadInput(f"Distill.{name}: needs a teacher; pass teacher=, or set {name} to 0")
        if teacher is not None:
            check_inputs(teacher, student)
        kept, refused = (
            ({}, []) if teacher is None or not self.compares else matching_features(teacher, student, self.at)
        )
        names = list(kept)
        if teacher is not None and self.alpha and self.outputs is None:
            refused += [Refusal(name, UNTAUGHT) for name in other_outputs(student)]
        rows = [r.row() for r in refused]
        record: dict[str, Any] = {"changed": ["weights", "running statistics"], "refused": rows, "matched": names}
        for key, model in (("val_before", student), ("val_teacher", teacher)):
            if context.val is not None and model is not None:
                record[key] = evaluate(model, context.val, context.metric, context.progress)
        taught = teacher.module().eval() if teacher is not None else None
        with ExitStack() as stack:
            if taught is not None:
                stack.enter_context(tapped(taught, names))
                stack.enter_context(placed(taught, accelerator().device))
            objective = _Objective(self, context.loss, taught, kept, class_axis(student))
            record |= fit(
                student, objective, self, context, type(self).__name__, outputs=lambda raw: raw[0],
                callbacks=[objective, *callbacks],
            )  # fmt: skip
        return record


@dataclass
class _Objective(Callback):
    """The loss of a batch, from what the tapped student returns, and its parts. kept: the indices of the teacher's features
    that the student still has. of_graph: the dimension of the classes as the graph tells."""

    options: Distill
    loss: Callable[..., Any] | None
    teacher: Callable[..., Any] | None
    kept: Kept
    of_graph: int | None
    seen: bool = False  # whether a batch of the teacher's outputs was looked at

    def __post_init__(self) -> None:
        self.identity = functions_code(self.options)

    def training_context(self, module: TrainableModule) -> AbstractContextManager[None]:
        return tapped(module, list(self.kept))

    def after_surgery(self, surgery: Surgery) -> None:
        for name, dims in self.kept.items():
            for d, indices in surgery.values.get(name, {}).items():
                dims[d] = dims[d][indices] if d in dims else indices

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]

    def __call__(self, raw: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs, features = raw
        alpha, labelled = self.options.alpha, self.options.labels and batch.labels is not None
        if self.teacher is None and not labelled:
            raise BadInput("Distill: the data has no labels and there is no teacher to learn from; pass teacher=")
        alpha = 0.0 if self.teacher is None else alpha if labelled else 1.0
        options, parts = self.options, {}
        weights = {"task": 1 - alpha, "kl": alpha, "features": options.features, "channels": options.channels}
        if alpha < 1:
            parts["task"] = task_loss(self.loss, outputs, batch.labels)
        if self.teacher is not None and (alpha or features):
            with torch.no_grad():
                taught, taught_features = self.teacher(*batch.args, **batch.kwargs)
            if alpha:
                labels = batch.labels if labelled else None
                parts["kl"] = options.lesson(outputs, taught, labels, self.of_graph)
                self._look(taught, labels)
            if features:
                same = [select_kept(t, dims) for t, dims in zip(taught_features, self.kept.values(), strict=True)]
                if options.features:
                    parts["features"] = feature_distance(features, same)
                if options.channels:
                    parts["channels"] = channel_wise(features, same)
        return torch.stack([weights[key] * value for key, value in parts.items()]).sum(), parts

    def _look(self, taught: Any, labels: Any) -> None:
        """Warn at the first batch whose class scores look like values, unless the user or the labels say that they are."""
        classes = isinstance(labels, torch.Tensor) and not labels.is_floating_point()
        options = self.options
        if not self.seen and options.outputs is None and options.class_dim is None and not classes:
            scores = logits_of(taught)
            if not tell_classes(scores, class_dim(scores, None, None, self.of_graph)):
                name = next(n for n, value in named_outputs(taught).items() if value is scores)
                warnings.warn(
                    f"Distill: the teacher's {name} looks like values, not like class scores, so that their softmax tells "
                    f'little; say what it is, as in outputs={{"{name}": "values"}}, or set class_dim',
                    stacklevel=2,
                )
        self.seen = True


def feature_distance(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over pairs of feature maps of their mean squared difference after every sample was divided by its root mean
    square; each term is 2 * (1 - cosine), averaged over samples (ours)."""

    def norm(t: torch.Tensor) -> torch.Tensor:
        t = t.float().flatten(1)
        return t * (t.square().mean(1, keepdim=True) + 1e-12).rsqrt()

    return torch.stack([(norm(s) - norm(t)).square().mean() for s, t in zip(student, teacher, strict=True)]).sum()


def channel_wise(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], temperature: float = 4.0
) -> torch.Tensor:
    """`T^2` times the KL divergence between the softmax over the positions of each channel of the teacher's and of the
    student's features, `(N, C, ...)` maps or `(N, positions, C)` sequences, in nats, averaged over images, channels and
    features (Shu et al., arXiv 2011.13256)."""

    def where(t: torch.Tensor) -> torch.Tensor:
        by_channel = t.flatten(2) if t.dim() > 3 else t.transpose(1, 2)
        return (by_channel.float() / temperature).log_softmax(2)

    pairs = [(where(s), where(t)) for s, t in zip(student, teacher, strict=True)]
    kl = [F.kl_div(s, t, reduction="none", log_target=True).sum(2).mean() for s, t in pairs]
    return temperature**2 * torch.stack(kl).mean()
