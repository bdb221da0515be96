"""What was measured, and the ratios that follow. A cost is seconds for a unit of work, or whatever the group counts:
less is better."""

import collections
import dataclasses
import math
import statistics
import typing

from .samples import Sample

SIDES = ("native", "lodge", "qemu")


@dataclasses.dataclass(frozen=True)
class Figures:
    costs: tuple[float, ...]

    @property
    def min(self) -> float:
        return min(self.costs)

    @property
    def median(self) -> float:
        return statistics.median(self.costs)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Of minima, and of medians."""

    min: float
    median: float


def geomean(values: typing.Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


class Results:
    """Of one group."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], list[Sample]] = collections.defaultdict(list)
        self.failures: list[tuple[str, str]] = []  # side, what happened

    def add(self, side: str, sample: Sample) -> None:
        self._samples[sample.workload, side].append(sample)

    def fail(self, side: str, message: str) -> None:
        self.failures.append((side, message))

    def samples(self, workload: str, side: str) -> list[Sample]:
        return self._samples.get((workload, side), [])

    def figures(self, workload: str, side: str) -> Figures | None:
        samples = self.samples(workload, side)
        return Figures(tuple(sample.cost for sample in samples)) if samples else None

    def ratio(self, workload: str, above: str, below: str) -> Ratio | None:
        """The costs of side `above` over those of side `below`."""
        a, b = self.figures(workload, above), self.figures(workload, below)
        return Ratio(a.min / b.min, a.median / b.median) if a and b else None

    def ratios(self, workloads: typing.Iterable[str], above: str, below: str) -> list[Ratio] | None:
        """Of all `workloads`, or None when one is missing: a mean of the rest would flatter."""
        found = [self.ratio(workload, above, below) for workload in workloads]
        return [ratio for ratio in found if ratio] if found and all(found) else None

    def mean_ratio(self, workloads: typing.Iterable[str], above: str, below: str) -> Ratio | None:
        found = self.ratios(workloads, above, below)
        if found is None:
            return None
        return Ratio(geomean(ratio.min for ratio in found), geomean(ratio.median for ratio in found))

    def disagreements(self) -> list[str]:
        """The workloads whose checksum is not the same in all runs."""
        messages = []
        for workload in dict.fromkeys(workload for workload, _ in self._samples):
            sums = {
                side: sorted({sample.checksum for sample in self.samples(workload, side)})
                for side in SIDES
                if self.samples(workload, side)
            }
            if len({checksum for found in sums.values() for checksum in found}) > 1:
                shown = ", ".join(f"{side} {' and '.join(found)}" for side, found in sums.items())
                messages.append(f"{workload}: results differ: {shown}")
        return messages


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A number that must be reached. `value` is None when it could not be measured."""

    text: str
    value: float | None
    relation: str  # of RELATIONS
    bound: float

    RELATIONS: typing.ClassVar[dict[str, typing.Callable[[float, float], bool]]] = {
        "at least": lambda value, bound: value >= bound,
        "at most": lambda value, bound: value <= bound,
        "more than": lambda value, bound: value > bound,
        "less than": lambda value, bound: value < bound,
    }

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.RELATIONS[self.relation](self.value, self.bound)
