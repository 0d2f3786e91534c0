"""One table of fields an op: a NamedTuple of its arguments, from which its schema, its packing and its unpacking are made.

class Inputs(NamedTuple):
    student: Annotated[Side, PREFIXED]  # a record in the record: student_hidden, student_weight, ...
    spec: RowSpec  # the same, its fields by their own names
    tile: Annotated[Tensor, WRITTEN]  # the op writes to it
    backend: Engine  # goes as its name

TABLE = Table(Inputs)
torch.library.define("topd::op", f"({TABLE.schema}) -> Tensor")
torch.ops.topd.op(*TABLE.pack(inputs))  # and in the op: inputs = TABLE.unpack(flat)
"""

from collections.abc import Iterator
from itertools import islice
from types import NoneType
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from topd.ops.shared.engines import Engine, engine_of

PREFIXED, WRITTEN = "prefixed", "written"
INFINITY = float("inf")
R = TypeVar("R", bound=tuple[Any, ...])
_TYPES = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str", Engine: "str"}


class _Groups:
    """A record's values by how they travel."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.others: list[Any] = []
        self.floats: list[float] = []
        self.flags: list[bool] = []


class _Leaf(NamedTuple):
    """A field that is no record itself: its name in the schema, its type there, whether it may be None, whether the op writes
    to it, its default as a tuple, empty where there is none."""

    name: str
    type: str
    optional: bool
    written: bool
    is_engine: bool
    default: tuple[Any, ...]

    def schema(self, letters: Iterator[str]) -> str:
        written = f"({next(letters)}!)" if self.written else ""
        default = "".join(f"={value}" for value in self.default)
        return f"{self.type}{written}{'?' if self.optional else ''} {self.name}{default}"


class Table(Generic[R]):
    """The flat arguments of a record: `names`, and `schema`, their text.

    Tensors go first. All floats of a record go in one argument `floats`, all flags in one `flags`, since what torch does for
    a differentiable op grows with the square of the number of its arguments (0.3 ms of host time at 33). A float that may be
    None is infinite there: these are softcaps, and an infinite one caps nothing.

    Args:
        record: a NamedTuple of tensors, numbers, flags, strings, an Engine, and such records.
        grouped: whether fields travel in that order and grouping; else each is an argument, in the order of the record.
    """

    def __init__(self, record: type[R], *, grouped: bool = True, prefix: str = "") -> None:
        self.record, self.grouped = record, grouped
        hints = get_type_hints(record, include_extras=True)
        defaults = {} if grouped else getattr(record, "_field_defaults", {})  # these are for callers in Python
        self._members = [
            self._member(prefix, name, hint, (defaults[name],) if name in defaults else ()) for name, hint in hints.items()
        ]
        leaves = list(self._leaves())
        self._tensors = [leaf for leaf in leaves if leaf.type == "Tensor"] if grouped else leaves
        self._others = [leaf for leaf in leaves if leaf.type in ("int", "str")] if grouped else []
        groups = {name: [leaf for leaf in leaves if leaf.type == name] for name in ("float", "bool") if grouped}
        self._has_floats, self._has_flags = bool(groups.get("float")), bool(groups.get("bool"))
        singles = [*self._tensors, *self._others]
        lists = [name for name, there in (("floats", self._has_floats), ("flags", self._has_flags)) if there]
        self.names = (*(leaf.name for leaf in singles), *lists)
        letters = iter("abcdefgh")
        types = {"floats": "float[]", "flags": "bool[]"}
        self.schema = ", ".join([*(leaf.schema(letters) for leaf in singles), *(f"{types[name]} {name}" for name in lists)])

    def _member(self, prefix: str, name: str, hint: Any, default: tuple[Any, ...]) -> "_Leaf | Table[Any]":
        base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if hasattr(base, "_fields"):
            return Table(base, grouped=self.grouped, prefix=f"{prefix}{name}_" if PREFIXED in marks else prefix)
        types = [each for each in get_args(base) or (base,) if each is not NoneType]
        (only,) = types
        optional = NoneType in get_args(base)
        return _Leaf(prefix + name, _TYPES[only], optional, WRITTEN in marks, only is Engine, default)

    def _leaves(self) -> Iterator[_Leaf]:
        for member in self._members:
            if isinstance(member, Table):
                yield from member._leaves()
            else:
                yield member

    def pack(self, record: R) -> tuple[Any, ...]:
        """Return the op's flat arguments."""
        tensors, rest = self.split(record)
        return (*tensors, *rest)

    def split(self, record: R) -> tuple[list[Any], list[Any]]:
        """Return the flat arguments in two parts: the tensors, as autograd keeps them, and all others."""
        groups = _Groups()
        self._collect(record, groups)
        rest = groups.others
        if self._has_floats:
            rest.append(groups.floats)
        if self._has_flags:
            rest.append(groups.flags)
        return groups.tensors, rest

    def named_tensors(self, record: R) -> dict[str, Tensor]:
        """Return the record's tensors by their names in the schema."""
        tensors, _ = self.split(record)
        return {name: value for name, value in zip(self.names, tensors, strict=False) if isinstance(value, Tensor)}

    def _collect(self, record: R, groups: _Groups) -> None:
        for member, value in zip(self._members, record, strict=True):
            if isinstance(member, Table):
                member._collect(value, groups)
            elif member.type == "Tensor" or not self.grouped:
                groups.tensors.append(value.name if member.is_engine else value)
            elif member.type == "float":
                groups.floats.append(INFINITY if value is None else value)
            elif member.type == "bool":
                groups.flags.append(value)
            else:
                groups.others.append(value.name if member.is_engine else value)

    def unpack(self, flat: tuple[Any, ...]) -> R:
        """Return the record that was packed; trailing arguments may be missing where fields have defaults, as torch leaves
        them out."""
        values = iter(flat)
        sources = _Sources(
            iter(list(islice(values, len(self._tensors)))),
            iter(list(islice(values, len(self._others)))),
            iter(next(values) if self._has_floats else ()),
            iter(next(values) if self._has_flags else ()),
        )
        return self._build(sources)

    def _build(self, sources: "_Sources") -> R:
        built: list[Any] = []
        for member in self._members:
            if isinstance(member, Table):
                built.append(member._build(sources))
            elif member.type == "Tensor" or not self.grouped:
                value = next(sources.tensors, *member.default)
                built.append(engine_of(value) if member.is_engine else value)
            elif member.type == "float":
                value = next(sources.floats)
                built.append(None if member.optional and value == INFINITY else value)
            elif member.type == "bool":
                built.append(next(sources.flags))
            else:
                value = next(sources.others)
                built.append(engine_of(value) if member.is_engine else value)
        return self.record(*built)


class _Sources(NamedTuple):
    """Flat arguments on their way into a record."""

    tensors: Iterator[Any]
    others: Iterator[Any]
    floats: Iterator[float]
    flags: Iterator[bool]
