"""Tables of fields: what a record becomes as flat arguments of an op, and the way back."""

from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor

from topd.ops.linear_divergence import spec as divergence
from topd.ops.linear_logprobs import spec as logprob
from topd.ops.shared.engines import CPP, EAGER, Engine
from topd.ops.shared.fields import PREFIXED, WRITTEN, Table
from topd.ops.topk_logprobs import op as topk
from topd.ops.transport import spec as transport


class Model(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    trained: bool


class Numbers(NamedTuple):
    parameter: float
    name: str


class Inputs(NamedTuple):
    student: Annotated[Model, PREFIXED]
    teacher: Annotated[Model, PREFIXED]
    numbers: Numbers
    k: int | None
    backend: Engine
    tile: Annotated[Tensor | None, WRITTEN] = None
    grad_scale: float = 1.0


FIRST, SECOND = torch.zeros(2), torch.ones(3)
RECORD = Inputs(
    Model(FIRST, None, None, True), Model(SECOND, FIRST, 8.0, False), Numbers(float("inf"), "jsd"), 3, CPP, SECOND, 0.5
)


def same(one: tuple, other: tuple) -> bool:
    """Equal records of identical tensors."""
    return type(one) is type(other) and all(
        same(a, b) if isinstance(a, tuple) else a is b if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def test_grouped_by_hand():
    table = Table(Inputs)
    assert table.schema == (
        "Tensor student_weight, Tensor? student_bias, Tensor teacher_weight, Tensor? teacher_bias, Tensor(a!)? tile, "
        "str name, int? k, str backend, float[] floats, bool[] flags"
    )
    floats = [float("inf"), 8.0, float("inf"), 0.5]
    flat = (FIRST, None, SECOND, FIRST, SECOND, "jsd", 3, "cpp", floats, [True, False])
    assert same(table.pack(RECORD), flat)
    assert same(table.unpack(*flat), RECORD)  # no softcap, and a parameter that is infinite
    tensors, rest = table.split(RECORD)
    assert same((*tensors, *rest), flat)
    assert list(table.named_tensors(RECORD)) == ["student_weight", "teacher_weight", "teacher_bias", "tile"]


def test_in_order_by_hand():
    table = Table(Inputs, grouped=False)
    assert table.schema == (
        "Tensor student_weight, Tensor? student_bias, float? student_softcap, bool student_trained, Tensor teacher_weight, "
        "Tensor? teacher_bias, float? teacher_softcap, bool teacher_trained, float parameter, str name, int? k, str backend, "
        "Tensor(a!)? tile=None, float grad_scale=1.0"
    )
    flat = (FIRST, None, None, True, SECOND, FIRST, 8.0, False, float("inf"), "jsd", 3, "cpp", SECOND, 0.5)
    assert same(table.pack(RECORD), flat)
    assert same(table.unpack(*flat), RECORD)
    *required, _, _ = flat  # torch leaves defaults out
    assert same(table.unpack(*required), RECORD._replace(tile=None, grad_scale=1.0))


def test_one_argument_too_few_is_refused():
    with pytest.raises(TypeError, match="flags"):
        Table(Inputs).unpack(*Table(Inputs).names[:-1])


@pytest.mark.parametrize(
    ("table", "op"),
    [
        (divergence.INPUTS, "linear_divergence"),
        (divergence.ROWS_INPUTS, "divergence_rows"),
        (logprob.INPUTS, "linear_logprobs"),
        (logprob.ROWS_INPUTS, "logprob_rows"),
        (topk.INPUTS, "topk_logprobs"),
        (transport.INPUTS, "transport"),
    ],
)
def test_the_names_are_those_of_the_op(table, op):
    schema = getattr(torch.ops.topd, op).default._schema
    assert table.names == tuple(argument.name for argument in schema.arguments)


@pytest.mark.parametrize("engine", [EAGER, CPP], ids=lambda engine: engine.name)
def test_an_engine_goes_as_its_name(engine):
    class Alone(NamedTuple):
        backend: Engine

    assert Table(Alone).pack(Alone(engine)) == (engine.name,)
    assert Table(Alone).unpack(engine.name).backend is engine
