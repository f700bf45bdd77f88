"""A captured program trains like the module it was captured from: the same losses, weights and running statistics."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import graphcomb as g


class Block(nn.Module):
    """A residual block with a strided, projected shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.2)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.short(x)
        return F.relu(y, inplace=True)


def residual():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        Block(8, 16, 2), nn.Dropout(0.2), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def torchvision_resnet():
    resnet = pytest.importorskip("torchvision.models.resnet")
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.conv1, model.bn1, model.maxpool = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Identity()
    model.inplanes = 8
    for i, width in enumerate((8, 8, 16, 16)):
        setattr(model, f"layer{i + 1}", model._make_layer(resnet.BasicBlock, width, 1, stride=2 if i else 1))
    model.fc = nn.Linear(16, 10)
    return model


def transformer():
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    model = vit.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10, dropout=0.1
    )
    model.conv_proj = nn.Conv2d(1, 32, 4, 4)
    nn.init.normal_(model.heads.head.weight, std=0.05)  # zero in torchvision, which would hide wrong gradients
    return model


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(module, x, y, optimizer, epochs=1, batch=64):
    """Train in place under a fixed seed; the loss of every step, and the accuracy in eval mode on what was held out."""
    torch.manual_seed(7)
    module.train()
    losses = []
    for _ in range(epochs):
        for index in torch.randperm(len(x) - 300).split(batch):
            loss = F.cross_entropy(module(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    module.eval()
    with torch.no_grad():
        return losses, (module(x[-300:]).argmax(1) == y[-300:]).float().mean().item()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=3e-3)


def states(module):
    return {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("build", "optimizer", "epochs", "reached"),
    [(residual, sgd, 2, 0.85), (torchvision_resnet, sgd, 2, 0.6), (transformer, adamw, 6, 0.6)],
)
def test_a_captured_program_trains_like_the_eager_module(build, optimizer, epochs, reached, digits):
    torch.manual_seed(0)
    model = build()
    program = g.capture(model, digits[0][:3], dynamic_shapes="batch")
    start = copy.deepcopy(states(model))
    expected, accuracy = train(model, *digits, optimizer(model), epochs)
    losses, found = train(program.module(), *digits, optimizer(program.module()), epochs)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(accuracy, abs=1e-6)
    assert accuracy > reached
    assert states(program.module()).keys() == states(model).keys()
    for name, tensor in states(model).items():
        torch.testing.assert_close(program.module().state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(tensor, start[name]), f"{name} did not train"


def test_the_modes_flip_dropout_and_normalisation_and_nothing_else(digits):
    torch.manual_seed(0)
    model = residual()
    program = g.capture(model.train(), digits[0][:3], dynamic_shapes="batch")
    module, x = program.module(), digits[0][:64]
    assert model.training
    assert not module.training
    with torch.no_grad():
        model.eval()
        quiet = module(x)
        torch.testing.assert_close(quiet, model(x))
        torch.testing.assert_close(module(x), quiet, rtol=0, atol=0)
        before = copy.deepcopy(states(module))
        model.train()
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(module.train()(x), expected)
        changed = {k for k, v in states(module).items() if not torch.equal(v, before[k])}
        assert changed == {k for k in before if "running" in k}
        module.eval()
        torch.testing.assert_close(module(x), model.eval()(x))


def test_frozen_normalisation_keeps_its_statistics_but_trains_its_scales(digits):
    torch.manual_seed(0)
    module = g.capture(residual(), digits[0][:3], dynamic_shapes="batch").module()
    before = copy.deepcopy(states(module))
    module.train(batch_norm=False)
    optimizer = sgd(module)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(module(digits[0][:64]), digits[1][:64]).backward()
        optimizer.step()
    same = {k for k, v in states(module).items() if torch.equal(v, before[k])}
    assert same == {k for k in before if "running" in k}
    first, second = module(digits[0][:64]), module(digits[0][:64])
    assert not torch.equal(first, second), "dropout is still on"


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_cumulative_average_of_batch_statistics_follows_eager(dimensions):
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=1.0)]
    if dimensions == 2:
        layers = [nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=1.0)]
    model = nn.Sequential(*layers)
    size = (4,) if dimensions == 1 else (4, 3, 3)
    module = g.capture(model, torch.randn(3, *size), dynamic_shapes="batch").module()
    model.train()
    module.train()
    for i in range(5):
        if i == 3:  # a copy goes on where the original was, and a pause in eval mode changes nothing
            module = copy.deepcopy(module.eval()).train()
        x = 3 * torch.randn(8, *size) + i
        torch.testing.assert_close(module(x), model(x))
        module(x).square().mean().backward()  # the same batch again: autograd must not mind the averaging
        model(x).square().mean().backward()
    for name, tensor in states(model).items():
        torch.testing.assert_close(module.state_dict()[name], tensor, msg=name)
    assert not torch.equal(model[0].running_mean, torch.zeros(4))
    again = g.Program.from_exported(torch.export.export(module.eval(), (x,)))
    assert "1.0, 1e-05" in again.module().train().code


def test_a_trained_state_survives_copies_and_files(tmp_path, digits):
    torch.manual_seed(0)
    x, y = digits
    program = g.capture(residual(), x[:3], dynamic_shapes="batch")
    train(program.module(), x[:500], y[:500], sgd(program.module()))
    expected = program.module()(x[:50])
    loaded = g.load(program.save(tmp_path / "trained.pt2"))
    twin = copy.deepcopy(program.module())
    assert not list(tmp_path.glob("*part*"))
    for module in (loaded.module(), twin, program.copy().module()):
        assert states(module).keys() == states(program.module()).keys()
        for name, tensor in states(program.module()).items():
            assert torch.equal(module.state_dict()[name], tensor), name
        assert torch.equal(module(x[:50]), expected)
    # the loaded program and the deep copy are alive and go on training exactly as the original does
    losses = [train(m, x[:400], y[:400], sgd(m))[0] for m in (program.module(), loaded.module(), twin)]
    assert losses[0] == losses[1] == losses[2]
    assert losses[0][0] > losses[0][-1]
