"""How costs are shown."""

import dataclasses
import typing


@dataclasses.dataclass(frozen=True)
class Unit:
    name: str  # of the cost itself, in JSON
    show: typing.Callable[[float], str]


def _duration(seconds: float) -> str:
    for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{digits(seconds * factor)} {name}"
    return f"{digits(seconds * 1e9)} ns"


def digits(value: float) -> str:
    """Three digits that mean something."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(name: str, scale: float = 1) -> Unit:
    """Work for each second; the cost is its inverse."""
    return Unit("s", lambda cost: f"{digits(scale / cost)} {name}")


EACH = Unit("s", _duration)  # for an iteration
SECONDS = Unit("s", lambda cost: f"{cost:.2f} s")
MIB = Unit("MiB", lambda cost: f"{cost:.1f} MiB")
