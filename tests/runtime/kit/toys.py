"""Changes to a bundle, and options that measure for a moment only."""

import json


def edit(bundle, change):
    about = json.loads((bundle / "bundle.json").read_text())
    change(about)
    (bundle / "bundle.json").write_text(json.dumps(about))


QUICKLY = ("--rounds", "1", "--power-seconds", "0.01")
