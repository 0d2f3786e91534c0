"""Tokens as coloured text: a span each, the stronger its colour the more nats it has."""

import html
import math

SCALE = 2.0  # nats at which a token has 63 % of the full colour
LEGEND = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
SEEN = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def coloured(tokens: list[str], nats: list[float]) -> str:
    """Return tokens, whatever text they hold, with their nats as colour and as a title."""
    return "".join(_span(token, value) for token, value in zip(tokens, nats, strict=True))


def legend() -> str:
    """Return what colour stands for how much."""
    return " ".join(_span(f" {value:g} ", value) for value in LEGEND) + " nats"


def _span(token: str, nats: float) -> str:
    """Return a token; a line ends after a token that ends one."""
    text = html.escape("".join(SEEN.get(c, c if c.isprintable() else "·") for c in token))
    heat = 1 - math.exp(-max(nats, 0.0) / SCALE)
    return f'<span style="--heat:{heat:.2f}" title="{nats:.2f} nats">{text}</span>'
