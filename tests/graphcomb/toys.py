"""Small models, losses and loaders that the recipes of these tests name as `toys:...`."""

import time

import torch
from torch import nn

WIDTH = 16


def net(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1), nn.BatchNorm2d(2 * WIDTH), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * WIDTH, classes),
    )  # fmt: skip


class Branching(nn.Module):
    """Decides by the values of its input, which torch.export refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def broken() -> nn.Module:
    raise RuntimeError("weights not found\nand more lines")


def number() -> int:
    return 3


def batches(shape: tuple[int, ...] = (3, 8, 8), classes: int = 4, count: int = 4, size: int = 8) -> list:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, size, *shape, generator=generator)
    return list(zip(images, torch.randint(classes, (count, size), generator=generator), strict=True))


def splits() -> tuple[list, list]:
    return batches(), batches(count=2)


def grey() -> list:
    return batches(shape=(1, 8, 8))


def integers() -> list:
    return [(torch.zeros(8, 3, 8, 8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))]


def words() -> list:
    return [("a picture", "a label")]


def nothing() -> list:
    return []


def once() -> object:
    return iter(batches())


def text() -> str:
    return "train.csv"


def raising() -> object:
    class Loader:
        def __iter__(self):
            raise OSError("disk gone")

    return Loader()


def unlabelled() -> list:
    return [images for images, _ in batches()]


def nan_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return outputs.sum() * float("nan")


class Slow(list):
    """Batches that take a while, so that a run can be killed in the middle."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.05)
            yield batch


def slow() -> tuple[list, list]:
    return Slow(batches()), batches(count=1)


def boxes() -> list:
    return [(images, torch.zeros(len(images), 5, 4)) for images, _ in batches()]


def many_classes() -> list:
    return batches(classes=100)


class Cancelled(nn.Module):
    """Finite in fp16 and far off: 2048.1 is 2048 there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + 2048) - 2048


def cancelled() -> nn.Module:
    return Cancelled()


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4))


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    def __init__(self, body: nn.Module, act: nn.Module):
        super().__init__()
        self.body, self.act = body, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.body(x))


def residual() -> nn.Module:
    return Block(nn.Sequential(*conv(8, 8), nn.ReLU(), *conv(8, 8)), nn.ReLU())


def mlp() -> nn.Module:
    return Block(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), nn.Identity())


class ResidualNet(nn.Module):
    """Two residual blocks and two MLP halves."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Sequential(*conv(3, 8), nn.ReLU()), residual(), residual()
        self.three, self.four, self.head = mlp(), mlp(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.four(self.three(self.two(self.one(self.stem(x))).mean((2, 3)))))


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    return ResidualNet()


def odd():
    return [(x, y, ["a.png"]) for x, y in batches()]


def image(batch):
    return batch[0]


def label(batch):
    return batch[1]
