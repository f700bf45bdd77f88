"""The files that a bench bundle contains and that run on the device.

They need only Python 3.8, numpy and the device's own inference library, and import nothing of graphcomb but each other.
"""

import re
from pathlib import Path

SCRIPT = "bench_device.py"  # name of bench.py in a bundle; the files that it imports begin with graphcomb_ there
PLUGINS = "plugin-libraries"  # folder of a bundle's plugins; because of the hyphen no model can have this name


def bundled_files() -> dict[str, str]:
    """Return the text of every file by its name in a bundle, with its imports adapted to a folder without a package."""
    files = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        name = SCRIPT if path.stem == "bench" else f"graphcomb_{path.name}"
        text = path.read_text(encoding="utf-8")
        files[name] = re.sub(r"^from \.(\w+) import", r"from graphcomb_\1 import", text, flags=re.MULTILINE)
    return files
