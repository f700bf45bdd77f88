"""The demo's reference network: trained once, then loaded."""

from pathlib import Path

import pytest
import torch

from graphcomb.data import digits
from graphcomb.models import SmallResNet, random_torchvision, trained_digits

QUICK = {"width": 4, "epochs": 2, "size": 8, "rate": 2e-2, "batch_size": 128}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))


def test_random_torchvision_models_have_no_head_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    dull = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    torch.nn.init.zeros_(dull[1].weight)
    before = dull[0].weight.clone()
    monkeypatch.setattr("torchvision.models.get_model", lambda name, weights: {"dull": dull}[name])
    model = random_torchvision("dull")
    assert model[1].weight.all()
    assert torch.equal(model[0].weight, before)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


def test_the_network_has_the_stated_form() -> None:
    model = SmallResNet(channels=3, classes=7, width=8, blocks=2)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert [b.conv1.stride[0] for b in model.stages] == [1, 1, 2, 1, 2, 1]
    assert [b.conv2.out_channels for b in model.stages] == [8, 8, 16, 16, 32, 32]


def test_training_learns_and_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_digits(**QUICK)
    assert not model.training
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in digits(size=8)[1]]
    assert torch.cat(hits).mean() > 0.4
    [file] = (tmp_path / "cache").iterdir()

    monkeypatch.setattr("graphcomb.models.fit", lambda *a: pytest.fail("trained again"))
    assert torch.equal(weights(trained_digits(**QUICK)), weights(model))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        trained_digits(**QUICK | {"seed": 1})
    file.write_bytes(b"damaged")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        trained_digits(**QUICK)


def test_training_leaves_the_random_state_alone_and_repeats_itself(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = weights(trained_digits(**QUICK | {"epochs": 1}))
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    torch.manual_seed(4)
    assert torch.equal(weights(trained_digits(**QUICK | {"epochs": 1})), first)
    torch.manual_seed(3)
    trained_digits(**QUICK | {"epochs": 1})
    assert torch.equal(torch.rand(2), expected)
