"""From the words of `topd bench` to its jobs, and refusals of words that do not go together."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from topd.options import BackendName
from topd_bench.cases import CASES as SHAPES
from topd_bench.cases import Case
from topd_bench.catalogue import CASES, SWEEPS, Benchmark
from topd_bench.request import LIMIT_SECONDS, Request

EVERYONE = "all"
OWN = "own"  # the name of a shape that is given by numbers


@dataclass(frozen=True)
class Options:
    """The words of the command; None or empty where nothing was said."""

    case: str
    shapes: Sequence[str] = ()
    tokens: Sequence[int] = ()
    hidden: int | None = None
    teacher_hidden: int | None = None
    vocab: int | None = None
    peers: Sequence[str] = (EVERYONE,)
    heads: Sequence[str] = ()
    losses: Sequence[str] = ()
    dtype: str | None = None
    malloc: str | None = None
    rounds: int | None = None
    backend: BackendName | None = None
    sweep: str | None = None
    points: Sequence[int] = ()
    settings: dict[str, float] = field(default_factory=dict)
    limit_seconds: float = LIMIT_SECONDS
    limit_gib: float | None = None

    @property
    def benchmark(self) -> Benchmark:
        return CASES[self.case]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the peers that take part."""
        return self.benchmark.peers if EVERYONE in self.peers else tuple(self.peers)


def check(options: Options) -> None:
    """Check that the words go together.

    Raises:
        ValueError: says the option, the rule, what came and what to do.
    """
    benchmark, case = options.benchmark, f"--case {options.case}"
    for names, known, option in (
        (options.peers, (EVERYONE, *benchmark.peers), "--peers"),
        (options.shapes, tuple(SHAPES), "--shape"),
        (options.losses, benchmark.losses, "--loss"),
        (options.heads, benchmark.heads, "--head"),
        (tuple(options.settings), tuple(benchmark.settings), "--set"),
    ):
        if unknown := [name for name in names if name not in known]:
            choice = f"must be of {', '.join(known)}" if known else f"must be left out, since {case} has none"
            raise ValueError(f"{option} {choice} with {case}, got {', '.join(unknown)}")
    numbers = {"--hidden": options.hidden, "--teacher-hidden": options.teacher_hidden, "--vocab": options.vocab}
    given = [option for option, value in numbers.items() if value is not None]
    shaped = [*(["--shape"] if options.shapes else []), *(["--tokens"] if options.tokens else []), *given]
    if shaped and not benchmark.shapes:
        instead = f"--set {' '.join(f'{name}={value:g}' for name, value in benchmark.settings.items())}"
        raise ValueError(f"{', '.join(shaped)} must be left out with {case}, whose sizes are {instead}")
    if given and options.shapes:
        raise ValueError(f"{', '.join(given)} must not stand beside --shape: a name, or numbers of your own")
    whole = options.hidden is not None and (options.vocab is not None or options.sweep == "vocab")
    if given and not whole:
        raise ValueError(f"--hidden and --vocab must both be given for a shape of your own, got {', '.join(given)}")
    if options.dtype is not None and not benchmark.dtypes:
        raise ValueError(f"--dtype must be left out with {case}, which is measured in float32")
    if options.rounds is not None and not benchmark.rounds:
        raise ValueError(f"--rounds must be left out with {case}, which times nothing")
    _check_sweep(options, case)


def _check_sweep(options: Options, case: str) -> None:
    if options.sweep is None:
        if options.points:
            raise ValueError("--points must stand beside --sweep, whose sizes they are")
        return
    if not options.benchmark.sweeps:
        able = ", ".join(name for name, each in CASES.items() if each.sweeps)
        raise ValueError(f"--sweep must be left out with {case}: the cases with sizes to sweep are {able}")
    swept = options.tokens if options.sweep == "tokens" else options.vocab
    if swept:
        raise ValueError(f"--{options.sweep} must be left out with --sweep {options.sweep}: --points has the sizes")
    if len(options.shapes) > 1:
        raise ValueError(f"--shape must be one name with --sweep, got {', '.join(options.shapes)}")


def shapes_of(options: Options) -> list[Case]:
    """Return the shapes that are measured; of a sweep the one whose size is replaced."""
    if options.hidden is not None:
        vocab, teacher = options.vocab or SWEEPS["vocab"][0], options.teacher_hidden or options.hidden
        own = Case(OWN, SHAPES["smollm2"].n, vocab, options.hidden, teacher)
        return [replace(own, n=n) for n in options.tokens or (own.n,)]
    if options.shapes or options.sweep or options.tokens:
        shapes = [SHAPES[name] for name in options.shapes or ("smollm2",)]
        return [replace(shape, n=n or shape.n) for shape in shapes for n in options.tokens or (None,)]
    return [replace(SHAPES[name], n=n or SHAPES[name].n) for name, n in options.benchmark.shapes]


def points_of(options: Options) -> list[Case]:
    """Return the shapes of a sweep, smallest first."""
    (shape, *_) = shapes_of(options)
    assert options.sweep is not None
    sizes = sorted(set(options.points or SWEEPS[options.sweep]))
    return [replace(shape, n=size) if options.sweep == "tokens" else replace(shape, vocab=size) for size in sizes]


def mallocs_of(options: Options) -> tuple[str, ...]:
    """Return the allocator settings; a sweep has one."""
    if options.malloc is not None:
        return ("default", "tuned") if options.malloc == "both" else (options.malloc,)
    return options.benchmark.mallocs[:1] if options.sweep else options.benchmark.mallocs


def requests_of(options: Options) -> list[Request]:
    """Return the jobs in their order: of a sweep size by size, else allocator by allocator."""
    check(options)
    benchmark = options.benchmark
    first = Request(
        options.case,
        dtype=options.dtype or "float32",
        rounds=options.rounds or (min(3, benchmark.rounds) if options.sweep else benchmark.rounds),
        backend=options.backend,
        settings=dict(benchmark.settings) | options.settings,
        limit_seconds=options.limit_seconds,
        limit_gib=options.limit_gib,
        warm_floor=options.sweep is None,
        peers=options.names,
    )
    count = 1 if options.sweep else benchmark.loss_defaults
    losses = options.losses or benchmark.losses[:count] or ("",)
    heads = options.heads or benchmark.heads[: 1 if options.sweep else None] or ("trainable",)
    shapes: Sequence[Case | None] = [None]
    if benchmark.shapes:
        shapes = points_of(options) if options.sweep else shapes_of(options)
    groups = [(name,) for name in options.names] if benchmark.alone else [options.names]
    return [
        replace(first, shape=shape, loss=loss, head=head, malloc=malloc, peers=group)
        for malloc in mallocs_of(options)
        for shape in shapes
        for loss in losses
        for head in heads
        for group in groups
    ]
