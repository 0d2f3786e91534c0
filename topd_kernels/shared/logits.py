"""From products to logits and back for Triton: bias, scale, temperature, softcap, and their derivative."""

import triton
import triton.language as tl

from topd_kernels.shared.row_math import tanh

# What stands in a tile for an entry that was taken out of its row: the lowest finite float32, which no product takes.
LEFT_OUT = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def logits_of(product, Bias, entries, mask, biased, inner, outer, capped, GENERAL: tl.constexpr):
    """Return the logits / temperature of products; -inf where masked or left out. inner = scale / temperature, or scale /
    softcap with outer = softcap / temperature where capped. GENERAL: a bias or a softcap is there."""
    y = product
    if GENERAL:
        if biased:
            y += tl.load(Bias + entries, mask=mask, other=0.0)
        y *= inner
        if capped:
            y = outer * tanh(y)
    else:
        y *= inner
    return tl.where(mask & (product != LEFT_OUT), y, float("-inf"))


@triton.jit
def unmasked_logits(product, Bias, entries, biased, inner, outer, GENERAL: tl.constexpr):
    """Return the logits / temperature of products at entries that all exist and were not left out, as `logits_of` does."""
    y = product
    if GENERAL:
        if biased:
            y += tl.load(Bias + entries)
        y *= inner
        if outer > 0:
            y = outer * tanh(y)
    else:
        # A product alone, so that no later sum rounds once with it: equal logits differ by exactly 0.
        y = tl.fma(y, inner, 0.0)
    return y


@triton.jit
def slope_of(logits, steep, unit, capped, GENERAL: tl.constexpr):
    """Return d logits / d product; steep = scale / temperature, unit = temperature / softcap."""
    slope = tl.zeros_like(logits) + steep
    if GENERAL:
        if capped:
            t = tl.maximum(logits * unit, -1.0)
            slope = steep * (1 - t * t)
    return slope
