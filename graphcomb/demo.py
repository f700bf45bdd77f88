"""The demo: digits, a small residual network, and the whole pipeline (the recipe is demo.yaml beside this file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .recipe import read_recipe
from .run import run

RECIPE = Path(__file__).with_name("demo.yaml")


def run_demo(out: Path, progress: bool = False) -> dict[str, Any]:
    """Run the demo's recipe; returns the summary. The reference network is trained on the first run and then cached."""
    return run(read_recipe(RECIPE), out, progress=progress)
