"""Numbers in words."""

import pytest

from graphcomb.runtime.report.text import si, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1 k"), (1000, "1 k"), (4.09e9, "4.09 G"), (2.5e15, "2.5e+03 T")],
)
def test_counts_in_thousands(value, text):
    assert si(value) == text


def test_bytes():
    assert [size(n) for n in (80, 768_020, 8_716_288, None)] == ["80 B", "768 kB", "8.72 MB", "–"]
