"""What travels in a bench bundle and runs on the device: each file of this folder needs nothing but Python 3.8, numpy and
the device's own library, and imports nothing of graphcomb but what lies beside it."""

import re
from pathlib import Path

SCRIPT = "bench_device.py"  # what bench.py is called in a bundle; the files that it imports begin with graphcomb_
PLUGINS = "plugin-libraries"  # the folder of a bundle's plugins, whose name no model can have


def bundled_files() -> dict[str, str]:
    """The text of every file that travels, by its name in a bundle, where there is no package."""
    files = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        name = SCRIPT if path.stem == "bench" else f"graphcomb_{path.name}"
        text = path.read_text(encoding="utf-8")
        files[name] = re.sub(r"^from \.(\w+) import", r"from graphcomb_\1 import", text, flags=re.MULTILINE)
    return files
