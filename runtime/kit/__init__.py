"""The files that a bench bundle contains and that run on the device, as one archive that Python runs: kit.pyz.

They need only Python 3.8, numpy and the device's own inference library, and import nothing of graphcomb but each other.

- bench, options, measuring, contents, data: what is measured, in which order, and what is written.
- engines, build, calibrate, trt, ort: TensorRT and ONNX Runtime.
- telemetry: power, temperatures and clocks. cuda: the CUDA runtime.
"""

import zipfile
from pathlib import Path

SCRIPT = "kit.pyz"  # name of the archive in a bundle
PLUGINS = "plugin-libraries"  # folder of a bundle's plugins; because of the hyphen no model can have this name
PACKAGE = "graphcomb_kit"  # the package in the archive

MAIN = f"""import sys
from pathlib import Path

if sys.argv[1:2] == ["--monitor"]:
    from {PACKAGE}.telemetry import watch

    watch(*sys.argv[2:])
else:
    from {PACKAGE}.bench import main

    sys.exit(main(archive=Path(__file__).resolve().parent))
"""


def archived_files() -> dict[str, str]:
    """Return the text of every file by its path in the archive."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("[!_]*.py"))}
    return {
        "__main__.py": MAIN,
        f"{PACKAGE}/__init__.py": "",
        **{f"{PACKAGE}/{n}": text for n, text in sources.items()},
    }


def write_archive(path: Path) -> None:
    """Write the archive. The same files give the same bytes; `unzip` shows them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in archived_files().items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
