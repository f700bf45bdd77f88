import pytest

from graphcomb.runtime.report.sections import charts


@pytest.fixture
def quick(monkeypatch):
    """Plots are drawn but not written out, which takes most of the time."""
    monkeypatch.setattr(charts, "_svg", lambda figure, name: "<svg></svg>")
