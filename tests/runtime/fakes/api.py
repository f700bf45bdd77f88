"""Read the interface of TensorRT's Python modules from NVIDIA's own packages, for the stand-ins of the tests.

    python tests/runtime/fakes/api.py

downloads the packages of the Python bindings of four versions, and writes api.json beside this file: every class that
graphcomb uses with its attributes and the parameters of its methods, and the enums among them with their members. The
packages contain the bindings without the libraries, so an empty library is compiled (gcc) for the few functions that they
link to; with it the modules can be imported and describe themselves, and nothing else. TensorRT-RTX is read as it is
installed.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = Path(__file__).with_name("api.json")
PACKAGES = {  # version: the package with its bindings
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.0": "tensorrt-cu12-bindings==10.13.0.35",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
CLASSES = (
    "Builder EngineInspector IBuilderConfig ICudaEngine IExecutionContext IHostMemory ILayer ILogger INetworkDefinition "
    "IInt8Calibrator IInt8EntropyCalibrator2 IOptimizationProfile IPluginRegistry IProfiler IProgressMonitor "
    "IRuntimeConfig ITensor ITimingCache Logger OnnxParser OnnxParserRefitter ParserError Refitter Runtime "
    "TimingCacheKey TimingCacheValue"
).split()
ENUMS = (  # which no parameter has as its type
    "ComputeCapability",
    "LayerInformationFormat",
    "NetworkDefinitionCreationFlag",
    "TensorFormat",
    "TensorIOMode",
)
FUNCTIONS = ("get_plugin_registry", "init_libnvinfer_plugins")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")
FUNCTION = re.compile(r"^(?:\d+\. )?\w+\((.*)\) -> ", re.MULTILINE)
LINKED = re.compile(
    r" U (create\w+_INTERNAL|\w*[pP]luginRegistry|getNvOnnxParserVersion|initLibNvInferPlugins|_ZN\w+)$"
)


def describe(module):
    """Return the interface of an imported module as JSON-able values."""
    kinds = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    enums = {name: list(kind.__members__) for name, kind in kinds.items() if hasattr(kind, "__members__")}
    nested = {f"{name}.{n}": list(k.__members__) for name, kind in kinds.items() for n, k in vars(kind).items()
              if isinstance(k, type) and hasattr(k, "__members__")}  # fmt: skip
    classes = {name: members(kinds[name]) for name in CLASSES if name in kinds}
    functions = {name: parameters(getattr(module, name)) for name in FUNCTIONS if hasattr(module, name)}
    used = json.dumps(classes)
    named = {name: kind for name, kind in sorted((enums | nested).items()) if name in ENUMS or f'{name}"' in used}
    return {"enums": named, "classes": classes, "functions": functions}


def members(kind):
    """Return the attributes and methods of a class; of each, whether it can be set, or the parameters of its overloads."""
    found = {"bases": [base.__name__ for base in kind.__mro__[1:-2]], "attributes": {}, "methods": {}}
    for name in dir(kind):
        value = getattr(kind, name)
        if isinstance(value, property):
            found["attributes"][name] = [kind_of(value.fget), value.fset is not None]
        elif callable(value) and not isinstance(value, type) and (not name.startswith("_") or name == "__init__"):
            found["methods"][name] = parameters(value)
    return found


def kind_of(getter):
    return plain((getter.__doc__ or "").rpartition("->")[2].strip())


def plain(kind):
    """Return the name of a type without those of its modules: tensorrt.ILogger.Severity is ILogger.Severity."""
    return re.sub(r"(?:\b[a-z_]\w*\.|\bnv\w+::)+(?=\w)", "", kind or "")


def parameters(function):
    """Return the parameters of each overload: [name, type, whether it may be left out]; empty without a description."""
    overloads = []
    for text in FUNCTION.findall(function.__doc__ or ""):
        pieces = re.findall(r"(?:[^,\[\(<]|\[[^\]]*\]|\([^)]*\)|<[^>]*>)+", text)
        rows = [re.match(r"\s*\*{0,2}(\w+)(?:: (.*?))?(?:( = ).*)?$", piece).groups() for piece in pieces]
        overloads.append([[name, plain(kind), bool(default)] for name, kind, default in rows if name != "self"])
    return overloads


def read(package):
    """Download the bindings, import them in a process of their own, and return their interface."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
        subprocess.run([*pip, text, package], check=True)
        (bindings,) = folder.glob("tensorrt*/tensorrt.so")
        needs = subprocess.run(
            ["nm", "-D", "--undefined-only", bindings], check=True, stdout=subprocess.PIPE, text=True
        )
        linked = [m.group(1) for line in needs.stdout.splitlines() if (m := LINKED.search(line))]
        (folder / "empty.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in linked))
        major = package.partition("==")[2].split(".")[0]
        for library in LIBRARIES:
            name = f"lib{library}.so.{major}"
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-o", folder / name, folder / "empty.c", f"-Wl,-soname,{name}"], check=True
            )
        code = f"import sys; sys.path[:0] = [{str(bindings.parent)!r}, {str(Path(__file__).parent)!r}]\n"
        code += "import api, json, tensorrt; print(json.dumps(api.describe(tensorrt)))"
        done = subprocess.run(
            [sys.executable, "-c", code], env={"LD_LIBRARY_PATH": text}, check=True, stdout=subprocess.PIPE
        )
        return json.loads(done.stdout)


def main():
    table = {version: read(package) for version, package in PACKAGES.items()}
    table["rtx"] = describe(importlib.import_module("tensorrt_rtx"))
    TABLE.write_text(json.dumps(table, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
