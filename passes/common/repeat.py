"""The same again: seeds, random states, and a code for everything that decides a result."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from ...graph.program import TrainableModule
from ..batches import generators


@contextmanager
def seeded(seed: int, *data: Iterable[Any] | None) -> Iterator[None]:
    """Run under a seed (Python, NumPy, torch, and the generators of the data loaders given) and give the random states back
    afterwards."""
    state = rng_state()
    own = [(generator, generator.get_state()) for loader in data for generator in generators(loader)]
    set_seed(seed)
    for generator, _ in own:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
        for generator, before in own:
            generator.set_state(before)


def rng_state() -> dict[str, Any]:
    """State of the global random generators, as tensors and plain values."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def fingerprint(module: TrainableModule, *parts: Any) -> str:
    """A short code for a run: graph, initial weights and everything else that decides its result."""
    digest = hashlib.blake2b(repr((str(module.graph), parts)).encode(), digest_size=6)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
