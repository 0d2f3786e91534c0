"""float32 is float32: torch's settings change no product of topd, and stand after a call as they stood. Products with float32
out that torch refuses are taken in float32."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import topd
from topd import products
from topd.ops.shared import engines, tiles
from topd.ops.shared.engines import EAGER, TRITON
from topd.products import exact_products, refused_products

backends = sys.modules["topd.backends"]  # the package's own name for it is the function
HAS_CPP = bool(topd.backends()["cpp"])
CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def everything() -> tuple[object, ...]:
    """Every setting as it is read, "mixed" where torch refuses to say."""

    def read(get: Callable[[], object]) -> object:
        try:
            return get()
        except RuntimeError:
            return "mixed"

    return (
        read(torch.get_float32_matmul_precision),
        read(lambda: CUDA.allow_tf32),
        CUDA.fp32_precision,
        CUDA.allow_fp16_accumulation,
        MKLDNN.fp32_precision,
        torch.backends.fp32_precision,
    )


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    CUDA.allow_fp16_accumulation = False
    torch.backends.fp32_precision = CUDA.fp32_precision = MKLDNN.fp32_precision = "none"


def generic(value: str) -> None:
    torch.backends.fp32_precision = value


def of_cuda(value: str) -> None:
    CUDA.fp32_precision = value


def of_mkldnn(value: str) -> None:
    MKLDNN.fp32_precision = value


def old_api(allow: bool) -> None:
    CUDA.allow_tf32 = allow


INEXACT = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: old_api(True),
    "cuda": lambda: of_cuda("tf32"),
    "mkldnn bf16": lambda: of_mkldnn("bf16"),
    "mkldnn tf32": lambda: of_mkldnn("tf32"),
    "generic tf32": lambda: generic("tf32"),
    "generic bf16": lambda: generic("bf16"),
    "high, then the new one": lambda: (torch.set_float32_matmul_precision("high"), of_cuda("ieee"), of_mkldnn("bf16")),
    "float16 sums": lambda: setattr(CUDA, "allow_fp16_accumulation", True),
}
EACH = pytest.mark.parametrize("make_inexact", INEXACT.values(), ids=INEXACT)


@EACH
def test_a_setting_is_exact_within_and_as_it_was_after(make_inexact):
    make_inexact()
    before = everything()
    for device in (GPU, CPU):
        with exact_products(device), exact_products(device):
            if device == GPU:
                assert CUDA.fp32_precision != "tf32"
                assert CUDA.allow_fp16_accumulation is False
            else:
                assert MKLDNN.fp32_precision not in ("tf32", "bf16")
        assert everything() == before
    with pytest.raises(KeyError), exact_products(GPU):
        raise KeyError
    assert everything() == before


def test_what_comes_from_a_general_setting_follows_it_again():
    generic("tf32")
    with exact_products(GPU), exact_products(CPU):
        pass
    generic("none")
    assert (CUDA.fp32_precision, MKLDNN.fp32_precision) == ("none", "none")


def test_exact_settings_are_left_alone():
    of_cuda("ieee")
    before = everything()
    with exact_products(GPU), exact_products(CPU):
        assert everything() == before
    assert everything() == before


def test_a_setting_that_is_made_within_stands():
    of_cuda("tf32")
    with exact_products(GPU):
        of_cuda("none")
    assert CUDA.fp32_precision == "none"


def test_who_leaves_first_leaves_the_other_exact():
    of_cuda("tf32")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact_products(GPU):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with exact_products(GPU):
        thread.start()
        inside.wait()
    one_is_left = CUDA.fp32_precision
    leave.set()  # before any assertion: a thread that waits keeps a failed run from ending
    thread.join()
    assert one_is_left == "ieee"
    assert CUDA.fp32_precision == "tf32"


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """What float32 products may be, noted at each product of a tile and of the reference."""
    noted: list[str] = []

    def watched(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def note(*operands, **options):
            noted.append(MKLDNN.fp32_precision)
            return product(*operands, **options)

        return note

    for name in ("mm", "addmm"):
        monkeypatch.setattr(tiles, name, watched(getattr(tiles, name)))
    monkeypatch.setattr(Tensor, "__matmul__", watched(Tensor.__matmul__))
    return noted


N, V, H = 5, 40, 6


def divergence(backend: str) -> list[Tensor]:
    """With a mask and weights that no hint foresaw, so that rows are computed again."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    a, b = torch.randn(2, H, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    student = topd.Head(weight, adapter=topd.LowRank(a, b, 0.5))
    teacher = torch.randn(N, H), topd.Head(torch.randn(V, H))
    mask = torch.arange(N) != 1
    value = topd.linear_divergence(hidden, student, *teacher, mask=mask, backend=backend)
    (value * torch.randn(N)).sum().backward()
    return [value.detach(), *(leaf.grad for leaf in (hidden, weight, a, b))]


def logprobs(backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    options = {"return_entropy": True, "backend": backend}
    values, entropy = topd.linear_logprobs(hidden, topd.Head(weight), torch.randint(V, (N, 3)), **options)
    (values * torch.randn(N, 3)).sum().add(entropy.sum()).backward()
    return [values.detach(), entropy.detach(), hidden.grad, weight.grad]


def topk(backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    return list(topd.topk_logprobs(torch.randn(N, H), topd.Head(torch.randn(V, H)), 3))


def transport(backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    vectors = {f"{side}_vectors": torch.randn(2, 4, H) for side in ("student", "teacher")}
    return [topd.near_future_divergence(**vectors).distance]


CALLS = {"linear_divergence": divergence, "linear_logprobs": logprobs}


@pytest.mark.parametrize("call", [*CALLS.values(), topk, transport], ids=[*CALLS, "topk_logprobs", "near_future"])
def test_no_product_of_a_call_is_inexact(call, backend, seen):
    exact = call(backend)
    seen.clear()
    torch.set_float32_matmul_precision("medium")
    values = call(backend)
    assert set(seen) == (set() if call is transport and HAS_CPP else {"ieee"})  # C++ takes no product there
    assert torch.get_float32_matmul_precision() == "medium"
    for one, other in zip(values, exact, strict=True):
        assert torch.equal(one, other)


def test_a_cpu_that_has_faster_products_gives_the_same_bits(backend):
    """Sizes at which oneDNN takes float32 products in bfloat16 where the processor can."""
    hidden, weight, other = torch.randn(128, 256), torch.randn(512, 256), torch.randn(512, 256)

    def value() -> Tensor:
        return topd.linear_divergence(hidden, topd.Head(weight), hidden, topd.Head(other), backend=backend)

    exact = value()
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(value(), exact)


@pytest.fixture
def refused(monkeypatch) -> Iterator[None]:
    """A GPU whose torch refuses products of bfloat16 with float32 out."""

    def products_of(device: torch.device, dtype: torch.dtype) -> str | None:
        return "float output with half input is not enabled for ROCm" if dtype == torch.bfloat16 else None

    for module in (backends, engines):
        monkeypatch.setattr(module, "refused_products", products_of)


@pytest.mark.usefixtures("refused")
def test_heads_of_refused_products_are_widened():
    for engine in (EAGER, TRITON):
        dtypes = (torch.bfloat16, torch.float16)
        assert [engine.product_dtype(dtype, torch.float32, GPU) for dtype in dtypes] == [torch.float32, torch.float16]
        assert engine.grad_dtype(torch.bfloat16, torch.float32, GPU) == torch.float32


@pytest.mark.usefixtures("refused")
def test_the_backends_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_load_triton", lambda: backends.Backend("triton", True, "Triton kernels on a GPU"))
    word = "; bfloat16 heads are widened to float32, since torch refuses such products here: float output with"
    every = topd.backends()
    assert every["triton"].detail.startswith(f"Triton kernels on a GPU{word}")
    assert word in every["eager"].detail
    assert word not in every["cpp"].detail + every["reference"].detail


def test_the_products_are_tried_once(monkeypatch):
    """On CPU tensors, which have no such product: that is a refusal."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(products, "exact_products", exact := Counted())
    refused_products.cache_clear()
    reasons = [refused_products(CPU, torch.bfloat16) for _ in range(3)]
    refused_products.cache_clear()
    assert reasons[0]
    assert reasons == reasons[:1] * 3
    assert exact.calls == 1


def test_a_plan_for_a_gpu_that_is_not_here_takes_them_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused_products.cache_clear()
    assert refused_products(GPU, torch.bfloat16) is None
    refused_products.cache_clear()


class Counted:
    """Counts how often products are exact."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, device: torch.device):
        self.calls += 1
        return exact_products(device)
