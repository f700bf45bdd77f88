"""Parse a TensorRT build log: kernels, the ONNX nodes in each, and memory.

An engine built for another device cannot be opened on the machine that builds it, but the verbose log has the same
information if the profiling verbosity is "detailed": the parser prints every ONNX node with its shapes, the compiler prints
every kernel in one message (`Layers:` in TensorRT-RTX and from TensorRT 10 on, `Engine Layer Information:` in TensorRT 8 to
10), and the allocator prints its totals. Fields that a version does not print stay empty.
"""

import re

from .kernels import DTYPES, BuildLog, LoggedKernel, Node, Shape, Tensor

MEMORY = {
    "Total Weights": "weights",
    "Total Activation": "activations",
    "Max Scratch": "scratch",
    "Total Host Persistent": "host",
    "Total Device Persistent": "device",
}
SYNCHRONISE = ("signal", "wait")  # listed among the kernels, but they only synchronise streams


def parse_build_log(text: str) -> BuildLog:
    """Parse the verbose log of one build. Missing parts stay empty; `unread` lists kernels in an unknown form."""
    log = BuildLog()
    for line in text.split("\n"):  # not splitlines: \x1e separates node names
        if match := NODE.search(line):
            name, op, side, tensors = match.groups()
            operands = tuple((tensor, _shape(dims)) for tensor, dims in OPERAND.findall(tensors))
            old = log.nodes.get(name, Node(name, op))
            inputs, outputs = (operands, old.outputs) if side == "inputs" else (old.inputs, operands)
            log.nodes[name] = Node(name, op, inputs, outputs)
        elif match := TOTAL.search(line):
            log.memory[MEMORY[match[1]]] = int(match[2])
        elif match := LAYER.search(line):
            if match[2].split(",")[0] in SYNCHRONISE:
                continue
            log.layers.append(_layer(match[1], match[2]))
            layer = log.layers[-1]
            if line.count("{ Name:") != len(layer.inputs + layer.constants + layer.outputs):
                log.unread.append(line)
        elif match := OLD_LAYER.search(line):
            log.layers.append(_old_layer(*match.groups()))
        elif KERNEL.search(line):
            log.unread.append(line)
    return log


# Lines of a log file begin with a prefix ("[07/01/2024-10:00:00] [V] [TRT] "), messages of our logger do not.
PREFIX = r"^(?:\[[^\]]*\] ?)*"
NODE = re.compile(PREFIX + r"(\S.*?) \[(\w+)\] (inputs|outputs): (.*)$")
OPERAND = re.compile(r"\[(\S+) -> \(([-\d, ]*)\)\[\w+\]\]")
TOTAL = re.compile(rf"({'|'.join(MEMORY)}) Memory: (\d+)")
KERNEL = re.compile(PREFIX + r"(?:Name: |Layer\()")  # the beginning of a line that describes a kernel
LAYER = re.compile(r"^Name: (.*?), LayerType: (.*)$")
TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d, ]*)\](.*?)\}")
SOURCE = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\x1f]|[^\[\]]*$)")
OLD_LAYER = re.compile(r"Layer\(([^)]*)\): (.*), Tactic: ([^,]*), (.*)$")
OLD_TENSOR = re.compile(r"(.*?) ?[\[(](\w+)[\[(]([-\d,: ]*)[\])][\])](?:, |$)")


def _layer(name: str, rest: str) -> LoggedKernel:
    sections = re.split(r", (?=(?:Inputs|Constants|Outputs|TacticName|Metadata): )", rest)
    parts = {key: value for key, _, value in (section.partition(": ") for section in sections[1:])}
    inputs, constants, outputs = (
        tuple(_tensor(*t) for t in TENSOR.findall(parts.get(key, ""))) for key in ("Inputs", "Constants", "Outputs")
    )
    return LoggedKernel(name, sections[0], tuple(SOURCE.findall(parts.get("Metadata", ""))), inputs, constants, outputs)


def _tensor(name: str, dims: str, rest: str) -> Tensor:
    dtype = re.search(r"Datatype: (\w+)", rest)
    layout = re.search(r"Format: (?:\((\w+)\)|([^}]*?)\s*$)", rest)
    order = re.search(r"StrideOrder: \[([\d, ]*)\]", rest)
    kind = DTYPES.get(dtype[1], dtype[1].lower()) if dtype else ""
    return Tensor(
        name, _shape(dims), kind, (layout[1] or layout[2]) if layout else "", _shape(order[1] if order else "")
    )


def _old_layer(kind: str, name: str, tactic: str, tensors: str) -> LoggedKernel:
    """Return the kernel of a line `conv1 + relu1, Tactic: 0x1, x (Half[1,64:8,56,56]) -> y (Half[…])`.

    TensorRT 8 writes `x[Half(…)]`. The number after a colon is the vector length of a blocked format; " + " joins the names
    of the nodes.
    """
    sides = [tuple(map(_old_tensor, OLD_TENSOR.findall(side))) for side in re.split(r" ?-> ", tensors, maxsplit=1)]
    moved = name.startswith("Reformatting CopyNode") or kind in ("Reformat", "NoOp")
    nodes = () if moved or name.startswith("{ForeignNode") else tuple(name.split(" + "))
    return LoggedKernel(name, kind, nodes, sides[0], (), sides[1] if len(sides) > 1 else ())


def _old_tensor(parts: tuple[str, str, str]) -> Tensor:
    name, dtype, dims = parts
    layout = "".join(f"C/{vector}" for vector in re.findall(r":(\d+)", dims))
    return Tensor(name, _shape(re.sub(r":\d+", "", dims)), DTYPES.get(dtype, dtype.lower()), layout)


def _shape(text: str) -> Shape:
    return tuple(int(n) for n in re.findall(r"-?\d+", text))
