"""The demo: digits, a small residual network, and the whole pipeline (the recipe is demo.yaml beside this file)."""

from __future__ import annotations

from pathlib import Path

from .recipe import read_recipe
from .run import run
from .runtime.summary import Summary

RECIPE = Path(__file__).with_name("demo.yaml")


def run_demo(out: Path, progress: bool = False) -> Summary:
    """Run the demo's recipe; returns the summary. The reference network is trained on the first run and then cached."""
    return run(read_recipe(RECIPE), out, progress=progress)
