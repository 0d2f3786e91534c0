"""One table of fields an op: a NamedTuple of its arguments, from which its schema, its packing and its unpacking are made.

class Inputs(NamedTuple):
    student: Annotated[Side, PREFIXED]  # a record in the record: student_hidden, student_weight, ...
    spec: RowSpec  # the same, its fields by their own names
    tile: Annotated[Tensor, WRITTEN]  # the op writes to it
    backend: Engine  # goes as its name, and so does a Shard

TABLE = Table(Inputs)
torch.library.define("topd::op", f"({TABLE.schema}) -> Tensor")
torch.ops.topd.op(*TABLE.pack(inputs))  # and in the op: inputs = TABLE.unpack(*flat)
"""

import re
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from topd.ops.shared.engines import Engine, engine_of
from topd.ops.shared.shard import Shard, shard_of

PREFIXED, WRITTEN = "prefixed", "written"
R = TypeVar("R", bound=tuple[Any, ...])
_TYPES = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str", Engine: "str", Shard: "str"}
# What goes as its name, and the function that makes it of the name again.
_BY_NAME: dict[type, Callable[[str], Any]] = {Engine: engine_of, Shard: shard_of}


class _Leaf(NamedTuple):
    """A field that is no record itself: its name in the schema, the expression that reads it from the record, its type, whether
    it may be None, whether the op writes to it, its default as a tuple, empty where there is none."""

    name: str
    read: str
    kind: type
    optional: bool
    written: bool
    default: tuple[Any, ...]

    def schema(self, letters: Iterator[str]) -> str:
        """Return its text in the schema."""
        written = f"({next(letters)}!)" if self.written else ""
        default = "".join(f"={value}" for value in self.default)
        return f"{_TYPES[self.kind]}{written}{'?' if self.optional else ''} {self.name}{default}"

    def packed(self, *, grouped: bool) -> str:
        """Return the expression of what travels."""
        if grouped and self.kind is float and self.optional:
            return f"(INFINITY if {self.read} is None else {self.read})"
        return f"{self.read}.name" if self.kind in _BY_NAME else self.read

    def unpacked(self, *, grouped: bool) -> str:
        """Return the expression of the field from what travelled."""
        if grouped and self.kind is float and self.optional:
            return f"(None if {self.name} == INFINITY else {self.name})"
        return f"{_BY_NAME[self.kind].__name__}({self.name})" if self.kind in _BY_NAME else self.name


class _Record(NamedTuple):
    """A record and its fields: leaves, and records in it."""

    kind: type
    fields: "list[_Leaf | _Record]"

    def leaves(self) -> "list[_Leaf]":
        """Return the leaves in their order."""
        return [leaf for field in self.fields for leaf in ([field] if isinstance(field, _Leaf) else field.leaves())]

    def types(self) -> set[type]:
        """Return the types of this record and of those in it."""
        return {self.kind}.union(*(field.types() for field in self.fields if isinstance(field, _Record)))

    def built(self, *, grouped: bool) -> str:
        """Return the expression that makes the record from its leaves."""
        fields = (
            field.unpacked(grouped=grouped) if isinstance(field, _Leaf) else field.built(grouped=grouped)
            for field in self.fields
        )
        return f"{_name(self.kind)}({', '.join(fields)})"


def _name(record: type) -> str:
    return re.sub(r"\W", "_", f"{record.__module__}.{record.__qualname__}")


def _read(record: type, path: str, prefix: str, *, grouped: bool) -> _Record:
    """Return the fields of a record that stands at `path`."""
    defaults = {} if grouped else getattr(record, "_field_defaults", {})  # a grouped record's are for callers in Python alone
    fields: list[_Leaf | _Record] = []
    for name, hint in get_type_hints(record, include_extras=True).items():
        base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        read = f"{path}.{name}"
        if hasattr(base, "_fields"):
            fields.append(_read(base, read, f"{prefix}{name}_" if PREFIXED in marks else prefix, grouped=grouped))
            continue
        (only,) = (each for each in get_args(base) or (base,) if each is not NoneType)
        default = (defaults[name],) if name in defaults else ()
        fields.append(_Leaf(prefix + name, read, only, NoneType in get_args(base), WRITTEN in marks, default))
    return _Record(record, fields)


def _of(leaves: list[_Leaf], *kinds: type) -> list[_Leaf]:
    return [leaf for leaf in leaves if leaf.kind in kinds]


class Table(Generic[R]):
    """The flat arguments of a record.

    Attributes:
        names: the arguments'.
        schema: their text.
        pack: from the record to the flat arguments.
        split: from the record to the flat arguments in two parts: the tensors, as autograd keeps them, and all others.
        unpack: from the flat arguments, which are its parameters, to the record.

    Tensors go first. All floats of a record go in one argument `floats`, all flags in one `flags`, since what torch does for
    a differentiable op grows with the square of the number of its arguments (0.3 ms of host time at 33). A float that may be
    None is infinite there: these are softcaps, and an infinite one caps nothing.

    Args:
        record: a NamedTuple of tensors, numbers, flags, strings, an Engine, a Shard, and such records.
        grouped: whether fields travel in that order and grouping; else each is an argument, in the order of the record.
        prefix: what stands before all names.
    """

    def __init__(self, record: type[R], *, grouped: bool = True, prefix: str = "") -> None:
        tree = _read(record, "record", prefix, grouped=grouped)
        leaves = tree.leaves()
        tensors, others, lists = leaves, [], {}
        if grouped:
            tensors, others = _of(leaves, Tensor), _of(leaves, int, str, *_BY_NAME)
            lists = {"floats": _of(leaves, float), "flags": _of(leaves, bool)}
            lists = {name: members for name, members in lists.items() if members}
        singles, letters = [*tensors, *others], iter("abcdefgh")
        self.names = (*(leaf.name for leaf in singles), *lists)
        texts = {"floats": "float[] floats", "flags": "bool[] flags"}
        self.schema = ", ".join([*(leaf.schema(letters) for leaf in singles), *(texts[name] for name in lists)])
        # Source text, as dataclasses make their methods: a loop over the fields in every call would cost what grouping saves.
        first = [leaf.packed(grouped=grouped) for leaf in tensors]
        rest = [leaf.packed(grouped=grouped) for leaf in others]
        rest += [f"[{', '.join(leaf.packed(grouped=grouped) for leaf in members)}]" for members in lists.values()]
        parameters = [leaf.name + "".join(f"={value!r}" for value in leaf.default) for leaf in singles]
        source = [
            f"def pack(record): return ({', '.join([*first, *rest])},)",
            f"def split(record): return [{', '.join(first)}], [{', '.join(rest)}]",
            f"def unpack({', '.join([*parameters, *lists])}):",
            *(f"    {', '.join(leaf.name for leaf in members)}, = {name}" for name, members in lists.items()),
            f"    return {tree.built(grouped=grouped)}",
        ]
        functions: dict[str, Any] = {_name(each): each for each in tree.types()}
        functions |= {"INFINITY": float("inf"), **{each.__name__: each for each in _BY_NAME.values()}}
        exec("\n".join(source), functions)
        self.pack: Callable[[R], tuple[Any, ...]] = functions["pack"]
        self.split: Callable[[R], tuple[list[Any], list[Any]]] = functions["split"]
        self.unpack: Callable[..., R] = functions["unpack"]

    def named_tensors(self, record: R) -> dict[str, Tensor]:
        """Return the record's tensors by their names in the schema."""
        tensors, _ = self.split(record)
        return {name: value for name, value in zip(self.names, tensors, strict=False) if isinstance(value, Tensor)}
