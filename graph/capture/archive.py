"""The `.pt2` archive as a file: sealed when written, and checked before it is loaded, so that loading runs none of its
code.

`torch.export.load` trusts its file: it unpickles, evaluates expressions and generates code from the names it finds, and it
does not look at checksums. So a file is inspected here first. Three things are required of it: that no byte changed since
it was written, that it holds data only (no pickled classes, no compiled code), and that every name, operator and expression
of the graph is of the form that its field allows. Source: ours.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from .. import compat
from ..errors import BadInput, in_a_line

RECORD = "graphcomb.json"
START = b"PK\x03\x04"
END = b"PK\x05\x06"  # start of the record that ends a zip file: 22 bytes, the last two the length of a comment
SEAL = b"graphcomb sha256 "
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class Unsafe(Exception):
    """Raised for an archive with contents that numbers and operators do not need."""


# ---------------------------------------------------------------------------------------------------------------- bytes
def seal(path: Path) -> None:
    """Write the digest of a zip file into its comment, so that a later change of any byte is noticed."""
    data = path.read_bytes()
    size = len(SEAL) + 2 * hashlib.sha256().digest_size
    body = data[:-2] + size.to_bytes(2, "little")
    path.write_bytes(body + SEAL + hashlib.sha256(body).hexdigest().encode())


def read(path: Path) -> bytes:
    """The bytes of a zip file, after checking them against the seal if it has one and against the checksum of every member.

    Raises BadInput for a file that cannot be read, is no zip file, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None
    end = data.rfind(END)
    if end < 0 or not data.startswith(START):
        raise BadInput(f"{path}: not a .pt2 file (or a damaged one)")
    body, comment = data[: end + 22], data[end + 22 :]
    damaged = BadInput(f"{path}: damaged: its bytes are not those that were written; copy or make the file again")
    if len(body) < end + 22 or int.from_bytes(body[-2:], "little") != len(comment):
        raise damaged
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if archive.testzip() is not None or len(set(names)) < len(names):
                raise damaged
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise damaged from error
    sealed = any(name.endswith(f"/extra/{RECORD}") for name in names)
    if comment and sealed and comment != SEAL + hashlib.sha256(body).hexdigest().encode():
        raise damaged
    return data


# ------------------------------------------------------------------------------------------------------------- contents
def load(path: Path) -> tuple[ExportedProgram, list[dict[str, Any]]]:
    """The exported program in a `.pt2` file, and its record of passes; no code of the file is run.

    Raises BadInput for a file that is damaged, is no `.pt2`, or holds more than data.
    """
    data = read(path)
    try:
        _inspect(data)
        extra = {RECORD: ""}
        with _weights_only():
            exported = torch.export.load(io.BytesIO(data), extra_files=extra)
    except Unsafe as error:
        raise BadInput(f"{path}: refused, as loading it could run code: {error}") from None
    except Exception as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise BadInput(
                f"{path}: refused, as loading it could run code: its example inputs or weights are pickled Python objects, "
                "not tensors"
            ) from error
        raise BadInput(f"{path}: not a loadable .pt2 ({in_a_line(error)})") from error
    return exported, _history(path, extra[RECORD])


@contextmanager
def _weights_only() -> Iterator[None]:
    """A context in which torch unpickles tensors and plain containers only, whatever its callers ask for."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _history(path: Path, text: str) -> list[dict[str, Any]]:
    """The record of passes in a file: a list of JSON objects, each with the name of its pass. Raises BadInput for anything
    else."""
    try:
        history = json.loads(text or "[]")
    except (json.JSONDecodeError, RecursionError):
        raise BadInput(f"{path}: its record of passes ({RECORD}) is not JSON") from None
    if not isinstance(history, list):
        raise BadInput(f"{path}: its record of passes ({RECORD}) is not a list but {type(history).__name__}")
    for i, entry in enumerate(history):
        where = f"entry {i} of its record of passes ({RECORD})"
        if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
            raise BadInput(f"{path}: {where} does not name a pass")
        for key, (fits, what) in FIELDS.items():
            if entry.get(key) is not None and not fits(entry[key]):
                raise BadInput(f"{path}: {key} in {where} is not {what}")
    return history


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(table, dict) for table in value.values())


def _patterns(value: Any) -> bool:
    fits = re.compile(r"[1-9]\d*:[1-9]\d*").fullmatch
    return isinstance(value, dict) and all(p is None or (isinstance(p, str) and fits(p)) for p in value.values())


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "changed": (lambda value: isinstance(value, list), "a list"),
    **dict.fromkeys(("refused", "layers", "stages", "features"), (_rows, "a list of objects")),
    **dict.fromkeys(("options", "cost"), (lambda value: isinstance(value, dict), "an object")),
    "removed": (_tables, "an object of objects"),
    "sparse": (_patterns, "an object of patterns such as 2:4"),
}


def _inspect(data: bytes) -> None:
    """Raise Unsafe for contents that `torch.export.load` would run. Members are read as it reads them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if "version" in archive.namelist():
            raise ValueError("written by torch.export of torch 2.7 or older; load and save it there once more")
    reader = compat.archive_reader(io.BytesIO(data))
    for name in reader.get_all_records():
        if name.startswith("data/aotinductor/"):
            raise Unsafe(f"{name} is compiled code")
        if name.startswith("data/constants/") and name.endswith("_config.json"):
            for entry in _json(reader, name).get("config", {}).values():
                if not str(entry.get("path_name")).startswith("tensor_"):
                    raise Unsafe(f"{entry.get('path_name')} is a pickled object")
        if name.startswith("models/"):
            _look(_json(reader, name), name)


def _json(reader: Any, name: str) -> Any:
    return json.loads(reader.get_record(name).decode())


CODE = re.compile(r"[\"'\\`\x00-\x1f\x7f]")  # characters that could end a string, a name or a line of generated code
LITERALS = ("metadata", "as_string", "as_strings", "guards_code")  # fields that never become code but as literals
ARITHMETIC = frozenset(
    "getitem eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift not_ abs".split()
)
FUNCTIONS = frozenset("trunc ceil floor sqrt".split())
SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.keyword,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip


def _look(value: Any, key: str) -> None:
    """Raise Unsafe for a string of the graph that its field does not allow."""
    if isinstance(value, dict):
        for k, v in value.items():
            if k not in LITERALS:
                _look(k, "name of an entry")
                _look(v, k)
    elif isinstance(value, list):
        for v in value:
            _look(v, key)
    elif isinstance(value, str):
        fits, wrong = KINDS.get(key, (_is_text, "is not a name"))
        if not fits(value):
            raise Unsafe(f"{key} {value[:80]!r} {wrong}")


def _is_text(value: str) -> bool:
    return not CODE.search(value)


def _is_name(value: str) -> bool:
    return _is_text(value) and (not value or all(part.isidentifier() for part in value.split(".")))


def _is_operator(value: str) -> bool:
    head, *names = value.split(".")
    if (allowed := {"_operator": ARITHMETIC, "math": FUNCTIONS}.get(head)) is not None:
        return len(names) == 1 and names[0] in allowed
    if head == "torch" and len(names) == 1 and re.fullmatch(r"sym_\w+|_sym_\w+", names[0]):
        return True
    if head != "torch" or names[:1] != ["ops"] or "from_file" in names:
        return False
    target: Any = torch.ops
    for name in names[1:]:
        if name.startswith("__") and name not in ("__and__", "__or__", "__xor__", "__lshift__", "__rshift__"):
            return False
        if not hasattr(target, name):
            return True  # not registered here; torch's own error says so, and how to register it
        target = getattr(target, name)
    return isinstance(target, compat.OpOverload | compat.HigherOrderOperator)


def _is_expression(value: str) -> bool:
    """Whether a string, which torch evaluates as Python, only has numbers, symbols, arithmetic and functions of sizes."""
    try:
        tree = ast.parse(value.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(node, SYNTAX) and _is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _is_of_sizes(node.func.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.fullmatch(r"[\w.+-]+", node.value) is not None  # a symbol's name, a number's digits
    return True


def _is_of_sizes(name: str) -> bool:
    """Whether the name is that of a mathematical function in sympy or in torch's additions to it."""
    functions = compat.size_functions
    constructor = getattr(functions, name, None) if name in functions.__all__ else getattr(sympy, name, None)
    return isinstance(constructor, type) and issubclass(constructor, sympy.Basic)


def _is_nest(value: str) -> bool:
    """Whether the description of how inputs or outputs are nested names no module to import."""
    return "__enum__" not in value and "default_factory_module" not in value


def _is_nest_of_inputs(value: str) -> bool:
    children = json.loads(value)[1]["children_spec"]
    kwargs = children[1]["context"] if len(children) == 2 else "[]"
    names = json.loads(kwargs) if isinstance(kwargs, str) else []
    return _is_nest(value) and all(isinstance(name, str) and name.isidentifier() for name in names or ())


KINDS: dict[str, tuple[Callable[[str], bool], str]] = {  # by field: a test of its strings, and the message for others
    **dict.fromkeys(("name", "forward_arg_names"), (_is_name, "is not a name")),
    **dict.fromkeys(("target", "as_operator"), (_is_operator, "is not an operator of a graph")),
    "expr_str": (_is_expression, "is not an expression of sizes"),
    "in_spec": (_is_nest_of_inputs, "has an odd name, or names a module to import"),
    "out_spec": (_is_nest, "names a module to import"),
}
