"""Built-in data: fixed splits, shapes, and a reproducible order."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from graphcomb.data import FASHION_FILES, _shifted, digits, fashion_mnist, random
from graphcomb.graph.errors import BadInput


def test_digits_are_split_once_and_for_all() -> None:
    train, val = digits(batch_size=64, size=16)
    images, labels = map(torch.cat, zip(*val, strict=True))
    assert images.shape == (360, 1, 16, 16)
    assert labels.shape == (360,)
    assert len(train.dataset) == 1437
    assert images.min() >= -1
    assert images.max() <= 1
    again = torch.cat([x for x, _ in digits(batch_size=7)[1]])
    assert torch.equal(images, again)


def test_training_batches_depend_on_the_global_seed_only() -> None:
    train, _ = digits()

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in train])

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))


def test_shifting_moves_every_image_by_its_own_offset_and_repeats_the_border() -> None:
    torch.manual_seed(0)
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(32, 2, 1, 1)
    moved = _shifted(images, 2)
    assert moved.shape == images.shape
    padded = torch.nn.functional.pad(images[:1], (2,) * 4, mode="replicate")[0]
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    assert all(any(torch.equal(m, w) for w in windows) for m in moved)
    assert len({tuple(m.flatten().tolist()) for m in moved}) > 5


def test_random_batches() -> None:
    batches = random((1, 4, 4), batch_size=2, batches=3, classes=5)
    assert [(x.shape, y.shape) for x, y in batches] == [((2, 1, 4, 4), (2,))] * 3
    assert all(0 <= int(i) < 5 for _, y in batches for i in y)
    assert torch.equal(random((3,), seed=1)[0], random((3,), seed=1)[0])


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for n, (images, labels) in zip((20, 10), FASHION_FILES.values(), strict=True):
        (tmp_path / images).write_bytes(idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)))
        (tmp_path / labels).write_bytes(idx(rng.integers(0, 10, (n,), dtype=np.uint8)))
    return tmp_path


def test_fashion_mnist_reads_its_files(fashion: Path) -> None:
    train, val = fashion_mnist(batch_size=4, augment=False, root=str(fashion), train_samples=8)
    assert len(train) == 2
    images, labels = next(iter(val))
    assert images.shape == (10, 1, 28, 28)
    raw = gzip.decompress((fashion / FASHION_FILES["test"][0]).read_bytes())[16:]
    assert torch.equal((images + 1) * 128, torch.tensor(list(raw), dtype=torch.float32).view(10, 1, 28, 28))
    assert labels.tolist() == list(gzip.decompress((fashion / FASHION_FILES["test"][1]).read_bytes())[8:])


def test_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist(root=str(tmp_path))


def test_a_damaged_file_is_named(fashion: Path) -> None:
    name = FASHION_FILES["train"][0]
    (fashion / name).write_bytes((fashion / name).read_bytes()[:40])
    with pytest.raises(BadInput, match=f"{name}: not a gzipped IDX file"):
        fashion_mnist(root=str(fashion))
