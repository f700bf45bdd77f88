"""Models, examples and batches of a user that lie on a GPU: the same results as on the processor, on the user's device."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb.graph.capture.export import batch_dynamic, export
from graphcomb.graph.errors import BadInput
from graphcomb.graph.program import flatten_outputs
from graphcomb.models import SmallResNet
from graphcomb.passes import Distill, PruneDepth, Quantize, Recalibrate, RemoveChannels, Sparsify
from graphcomb.passes.common.scoring import evaluate

GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (make test-gpu)")


class Attention(nn.Module):
    """Makes tensors on the device of its input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        x = x + torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None] / 100
        return self.head(self.layer(x).mean(1))


@pytest.fixture(scope="module")
def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(10, (16,), generator=generator) for _ in range(4)]
    return [(torch.randn(16, 3, 16, 16, generator=generator), y) for y in labels]


@pytest.fixture(scope="module", params=["convolutions", "attention"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    net = SmallResNet(3, width=16) if request.param == "convolutions" else Attention()
    return net.eval()


def on(device, model: nn.Module, x: torch.Tensor):
    model = copy.deepcopy(model).to(device)
    return model, graphcomb.capture(model, (x.to(device),), dynamic_shapes="batch")


def outputs(program, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t.double().cpu() for t in flatten_outputs(program.copy().module().eval()(x.to(program.device)))]


def error(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


def devices(module: nn.Module) -> set[torch.device]:
    return {t.device for t in module.state_dict().values()}


# ------------------------------------------------------------------------------------------------------------- capture
def test_a_graph_has_no_limits_that_only_another_device_sets():
    """cuDNN's batch normalisation takes at most 65,535 images, which torch.export holds against a dynamic batch."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Net(nn.Module):
        """Holds tensors in all the ways that users do."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.tied = self.conv.weight
            self.register_buffer("scale", torch.ones((), device="cpu"))
            self.shifts, self.scales = [torch.ones(8, 1, 1)], (torch.ones(1), {"last": torch.ones(1)})

        def forward(self, x):
            x = self.norm(self.conv(x)) + self.shifts[0] + self.tied.sum()
            return x * self.scale * self.scales[0] * self.scales[1]["last"]

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("cuda"):
            net, x = Net().eval(), torch.randn(4, 3, 8, 8)
        held = [*net.state_dict(keep_vars=True).values(), net.tied, *net.shifts, net.scales[0], net.scales[1]["last"]]
        exported = export(net, *batch_dynamic(net, (x,), {}))
    assert {t.device.type for t in exported.state_dict.values()} == {"cpu"}
    assert [str(s) for s in exported.range_constraints.values()] == ["VR[0, int_oo]"]
    after = [*net.state_dict(keep_vars=True).values(), net.tied, *net.shifts, net.scales[0], net.scales[1]["last"]]
    assert all(a is b for a, b in zip(after, held, strict=True))
    assert {t.device.type for t in held if t.dim()} == {"cuda"}


@needs_gpu
def test_a_program_is_on_its_model_s_device(model, images):
    x, _ = images[0]
    user, program = on(GPU, model, x)
    assert devices(user) == devices(program.module()) == {GPU}
    assert program.device == GPU
    assert all(t.device == GPU for t in program.args)
    assert not program.proof.skipped, "compared with the model in both modes, gradients included"
    _, same = on("cpu", model, x)
    assert [str(n.target) for n in program.graph.nodes] == [str(n.target) for n in same.graph.nodes]
    assert error(outputs(program, x), outputs(same, x)) < 1e-2  # PyTorch's convolutions compute in TF32
    assert program.macs == same.macs


@needs_gpu
def test_an_example_on_the_processor_goes_to_the_model(model, images):
    program = graphcomb.capture(copy.deepcopy(model).to(GPU), (images[0][0],), dynamic_shapes="batch")
    assert program.args[0].device == GPU


@needs_gpu
def test_an_example_on_a_gpu_comes_to_the_model(model, images):
    assert graphcomb.capture(copy.deepcopy(model), (images[0][0].to(GPU),)).args[0].device.type == "cpu"


@needs_gpu
def test_a_saved_program_needs_no_gpu(model, images, tmp_path):
    _, program = on(GPU, model, images[0][0])
    again = graphcomb.graph.program.load(program.save(tmp_path / "net.pt2"))
    assert again.device.type == "cpu"
    assert error(outputs(again, images[0][0]), outputs(program, images[0][0])) < 1e-2
    exported = program.exported()
    assert {t.device for t in exported.state_dict.values()} == {GPU}
    with torch.no_grad():
        assert exported.module()(images[0][0].to(GPU)).device == GPU


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_of_a_program_on_a_gpu(model, images, tmp_path, precision):
    _, program = on(GPU, model, images[0][0])
    assert graphcomb.runtime.export_onnx(program, tmp_path / "net.onnx", precision).parity < 0.05
    assert program.device == GPU


@needs_gpu
def test_a_module_of_the_user_s_is_scored_where_it_lies(model, images):
    data = [(x.to(GPU), y) for x, y in images]
    here, there = (evaluate(copy.deepcopy(model).to(device), data) for device in ("cpu", GPU))
    assert here == pytest.approx(there, abs=0.05)


# -------------------------------------------------------------------------------------------------------------- passes
PASSES = {
    "magnitude": RemoveChannels(macs=0.6),
    "repair": RemoveChannels(macs=0.6, importance="repair", scope="global", repair=True),
    "fisher": RemoveChannels(macs=0.6, importance="fisher", repair=True),
    "unlabelled": RemoveChannels(macs=0.6, importance="fisher-unlabelled", repair=True),
    "depth": PruneDepth(macs=0.8, repair=True),
    "cap": Sparsify(sparsity=0.5, method="cap", damping=1e-3),
    "sparsegpt": Sparsify(pattern="2:4", method="sparsegpt"),
    "recalibrate": Recalibrate(),
    "quantize": Quantize(),
    "trained": RemoveChannels(macs=0.6, repair=True, train=Distill(epochs=1, lr=1e-3)),
}


@needs_gpu
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_on_a_gpu(model, images, name):
    """The same sizes as of a program on the processor, and outputs as near as two devices round alike."""
    found = []
    for device, data in (("cpu", images), (GPU, [(x.to(GPU), y.to(GPU)) for x, y in images])):
        user, program = on(device, model, images[0][0])
        before = {k: v.clone() for k, v in program.module().state_dict().items()}
        result = PASSES[name](program, data=data)
        assert devices(result.program.module()) == devices(program.module()) == devices(user)
        assert all(torch.equal(v, before[k]) for k, v in program.module().state_dict().items())
        found.append(result.program)
    assert found[1].macs == pytest.approx(found[0].macs, rel=0.05)
    if found[0].macs == found[1].macs and name not in ("trained", "depth"):
        assert error(outputs(found[1], images[0][0]), outputs(found[0], images[0][0])) < 0.05


@needs_gpu
def test_the_smaller_class_is_on_the_model_s_device(images):
    torch.manual_seed(0)
    user, program = on(GPU, SmallResNet(3, width=16).eval(), images[0][0])
    result = RemoveChannels(macs=0.6, repair=True, for_class=True)(program, data=images)
    new = result.transplant(user).eval()
    assert devices(new) == {GPU}
    assert type(new) is type(user)
    with torch.no_grad():
        assert error(outputs(result.program, images[0][0]), [new(images[0][0].to(GPU)).double().cpu()]) < 1e-2


@needs_gpu
def test_a_label_that_is_no_class_is_one_line():
    """On a GPU torch ends the whole process where the processor raises IndexError."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    program = graphcomb.capture(net, (torch.randn(4, 12),), dynamic_shapes="batch")
    data = [(torch.randn(4, 12), torch.full((4,), 7))]
    with pytest.raises(BadInput, match=r"loss: does not take .* Target 7 is out of bounds"):
        Distill(epochs=1)(program, data=data)
    torch.zeros(1, device=GPU).item()  # the process lives


# ------------------------------------------------------------------------------------------------------ the user's loop
@needs_gpu
@pytest.mark.parametrize("cut", ["end", "during"])
@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("repair", [False, True])
def test_a_loop_on_a_gpu(model, images, cut, half, repair):
    user = copy.deepcopy(model).to(GPU)
    steps = 8
    prune = RemoveChannels(macs=0.6, interval=2, repair=repair)
    session = graphcomb.attach(user, prune, example=(images[0][0].to(GPU),), steps=steps, cut=cut, data=images)
    assert devices(session.module) == {GPU}
    optimizer = torch.optim.AdamW(session.module.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=half is torch.float16)
    session.module.train()
    for x, y in [*images, *images]:
        with torch.autocast("cuda", dtype=half or torch.bfloat16, enabled=half is not None):
            loss = F.cross_entropy(session.module(x.to(GPU)), y.to(GPU))
        scaler.scale(loss).backward()
        session.before_step(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        session.after_step()
        assert devices(session.module) == {GPU}
    result = session.finish()
    assert result.program.device == GPU
    dense = graphcomb.capture(copy.deepcopy(model), (images[0][0],), dynamic_shapes="batch")
    assert result.program.macs < 0.65 * dense.macs
    with torch.no_grad():
        ours = [session.module.eval()(images[0][0].to(GPU)).double().cpu()]
    assert error(outputs(result.program, images[0][0]), ours) < 1e-2


@needs_gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_in_half_precision(model, images, precision):
    _, program = on(GPU, model, images[0][0])
    small = RemoveChannels(macs=0.6)(program).program
    result = Distill(epochs=4, lr=3e-3, precision=precision)(small, data=images, teacher=program)
    assert result.program.device == GPU
    losses = [loss for _, loss in result.record["curve"]]
    assert losses[-1] < losses[0]


@needs_gpu
def test_tune_of_a_program_on_a_gpu(images, tmp_path):
    torch.manual_seed(0)
    _, program = on(GPU, SmallResNet(3, width=16).eval(), images[0][0])
    plan = graphcomb.tune(
        program,
        data=images,
        latency=0.7,
        target="h100",
        table="roofline",
        precision="fp16",
        samples=16,
        folder=tmp_path,
    )
    assert plan.run(program, data=images).program.device == GPU
