"""Classes of a stand-in for TensorRT that have the members of one version, and take the arguments which it takes.

The members and parameters are those of NVIDIA's own bindings (api.json, which api.py writes). A stand-in's behaviour is
written once for all versions. Of it a version gets what the version has; a member that no version has is a mistake of the
stand-in. A call with a wrong number of arguments, an unknown keyword or a value of another type is a TypeError, as in the
bindings, and so is an attribute that does not exist an AttributeError. Where the library may call a logger with its locks
held, garbage must not be collected: destroying an earlier builder there waits for ever.
"""

import functools
import gc
import json
from enum import Enum
from pathlib import Path

TABLE = json.loads(Path(__file__).with_name("api.json").read_text(encoding="utf-8"))
# What came with 8.6, of which there are the oldest bindings. Source: TensorRT's release notes.
NOT_IN_8_5 = {
    "BuilderFlag": ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "FP8"),
    "IBuilderConfig": ("builder_optimization_level", "hardware_compatibility_level", "max_aux_streams",
                       "plugins_to_serialize", "set_preview_feature"),
    "ICudaEngine": ("hardware_compatibility_level", "num_aux_streams"),
    "IPluginRegistry": ("load_library", "deregister_library"),
    "Runtime": ("engine_host_code_allowed", "temporary_directory", "tempfile_control_flags"),
}  # fmt: skip
WHOLE = ("HardwareCompatibilityLevel",)
LOCKED = {"Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter", "ICudaEngine.create_execution_context"}
PLAIN = {"int": int, "SupportsInt": int, "str": str, "bool": bool, "float": (int, float), "SupportsFloat": (int, float)}
PLAIN |= {"tuple": tuple, "list": list, "List[str]": list, "list[str]": list}
BYTES = ("buffer", "Buffer")


class Member(Enum):
    """A member of one of TensorRT's enums, which is no number and can be converted to one."""

    def __int__(self):
        return self.value


class Library:
    """The enums and classes of one version.

    calls: names of the methods that were called, such as "IBuilderConfig.set_flag". faults: by such a name, an exception
    that is raised, or a function that is called instead with the object and the arguments. failures: by such a name, the
    result with which it reports a failure.
    """

    def __init__(self, version):
        old = version.startswith("8.5")
        known = TABLE["8.6.1"] if old else TABLE[version]
        lacks = NOT_IN_8_5 if old else {}
        self.table = {
            name: {part: {n: v for n, v in kind[part].items() if n not in lacks.get(name, ())}
                   for part in ("attributes", "methods")} | {"bases": kind["bases"]}
            for name, kind in known["classes"].items()
        }  # fmt: skip
        self.enums = {
            name: Member(name.rpartition(".")[2], {m: i for i, m in enumerate(members) if m not in lacks.get(name, ())})
            for name, members in known["enums"].items()
            if not (old and name in WHOLE)
        }
        self.functions = known["functions"]
        self.classes = {}
        self.calls, self.faults, self.failures = [], {}, {}

    def implement(self, name, behaviour):
        """Return the class of this name with a behaviour, or None if the version has no such class."""
        self._known_somewhere(name, behaviour)
        if name not in self.table:
            return None
        about = self.table[name]
        bases = tuple(self.classes[base] for base in about["bases"] if base in self.classes) or (object,)
        body = {key: value for key, value in vars(behaviour).items() if key.startswith("_") and key not in CLASS}
        for method, overloads in about["methods"].items():
            if method != "__init__":
                body[method] = self._method(name, method, overloads, vars(behaviour).get(method))
        for attribute, (kind, settable) in about["attributes"].items():
            body[attribute] = self._attribute(name, attribute, kind, settable, vars(behaviour).get(attribute))
        body["__init__"] = self._init(name, about["methods"]["__init__"], vars(behaviour).get("__init__"))
        body["__setattr__"] = self._setter(name, about["attributes"])
        self.classes[name] = made = type(name, bases, body)
        return made

    def _known_somewhere(self, name, behaviour):
        kinds = [table["classes"][name] for table in TABLE.values() if name in table["classes"]]
        for member in (m for m in vars(behaviour) if not m.startswith("_")):
            assert any(member in kind["attributes"] or member in kind["methods"] for kind in kinds), f"{name}.{member}"

    def _init(self, name, overloads, behave):
        def init(self, *arguments, **keywords):
            library.check(f"{name}()", overloads, arguments, keywords)
            assert name not in LOCKED or not gc.isenabled(), f"{name}: garbage may be collected"
            self.__dict__["_made"] = True
            if behave is not None:
                behave(self, *arguments, **keywords)

        library = self
        return init

    def _method(self, name, method, overloads, behave):
        def call(self, *arguments, **keywords):
            library.check(f"{name}.{method}", overloads, arguments, keywords)
            locked = {name, f"{name}.{method}"} & LOCKED
            assert not (locked and gc.isenabled()), f"{name}.{method}: garbage may be collected"
            library.calls.append(f"{name}.{method}")
            fault = library.faults.get(f"{name}.{method}")
            if isinstance(fault, BaseException):
                raise fault
            if fault is not None:
                return fault(self, *arguments, **keywords)
            assert behave is not None, f"the stand-in does not implement {name}.{method}"
            result = behave(self, *arguments, **keywords)
            library.failures[f"{name}.{method}"] = FAILS.get(type(result))
            return result

        library = self
        return functools.wraps(behave)(call) if behave is not None else call

    def _attribute(self, name, attribute, kind, settable, default):
        def read(self):
            if isinstance(default, property):
                return default.fget(self)
            return self.__dict__.get(attribute, default)

        def write(self, value):
            if not settable:
                raise AttributeError(f"can't set attribute {name}.{attribute}")
            if value is not None and not library.fits(kind, value):
                raise TypeError(f"{name}.{attribute}: {kind}, not {value!r}")
            self.__dict__[attribute] = value

        library = self
        return property(read, write)

    @staticmethod
    def _setter(name, attributes):
        def change(self, attribute, value):
            if type(self).__name__ == name and not attribute.startswith("_") and attribute not in attributes:
                raise AttributeError(f"{name} has no attribute {attribute}")
            object.__setattr__(self, attribute, value)  # subclasses, which users write, have their own

        return change

    def check(self, what, overloads, arguments, keywords):
        """Raise TypeError unless the arguments are those of one of the overloads; no overloads: not documented."""
        if overloads and not any(self._takes(row, arguments, keywords) for row in overloads):
            raise TypeError(f"{what}: incompatible arguments {arguments} {keywords}; it takes {overloads}")

    def _takes(self, row, arguments, keywords):
        names = [name for name, _, _ in row]
        given = dict(zip(names, arguments, strict=False)) | keywords
        if len(arguments) > len(names) or set(keywords) - set(names) or set(keywords) & set(names[: len(arguments)]):
            return False
        needed = {name for name, _, optional in row if not optional}
        return needed <= given.keys() and all(self.fits(kind, given[name]) for name, kind, _ in row if name in given)

    def fits(self, kind, value):
        """Return whether a value is of a type, as far as the stand-in knows the type."""
        kind = kind.replace("::", ".")
        if kind in self.enums:
            return isinstance(value, self.enums[kind])
        if kind in self.classes:  # a subclass whose __init__ does not call that of its base class cannot be used
            return isinstance(value, self.classes[kind]) and "_made" in vars(value)
        if kind in BYTES:
            return isinstance(value, (bytes, bytearray, memoryview, self.classes.get("IHostMemory", bytes)))
        if kind == "Dims":
            return isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value)
        if kind in PLAIN:
            return isinstance(value, PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))
        return True


# How a call fails: an object that cannot be made is None, a setter returns False, and an index is negative.
FAILS = {bool: False, int: -1, str: "", tuple: (), list: []}
CLASS = ("__dict__", "__weakref__", "__module__", "__qualname__", "__init__")
