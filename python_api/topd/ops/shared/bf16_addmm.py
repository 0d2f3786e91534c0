"""topd::bf16_addmm: out = beta out + alpha (a factors) b, summed in float32, with b in bfloat16 and a in bfloat16 or float32.

It exists on the CPU, in C++ alone, for processors with products of bfloat16 (AVX512_BF16, AMX), since torch.mm has none with
float32 out there. A float32 a is multiplied as two bfloat16 parts, exact to 2^-18 of each entry; factors [K] multiply its
columns first. out is float32, or with beta = 0 bfloat16, rounded once.
"""

import torch

from topd.ops.shared.op_body import define

define(
    "topd::bf16_addmm",
    "(Tensor(a!) out, Tensor a, Tensor b, Tensor? factors, float beta, float alpha) -> ()",
)


@torch.library.register_fake("topd::bf16_addmm")
def _fake(*arguments: object) -> None:
    return None
