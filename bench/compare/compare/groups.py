"""A group of workloads that are measured together, and the groups of our own programs."""

import pathlib
import shutil
import tempfile
import typing

from .lab import Lab
from .plan import ROOT, Round, Shape, Step
from .results import SIDES, Ratio, Requirement, Results
from .samples import parse_program
from .units import EACH, Unit


class Group(typing.Protocol):
    name: str
    sides: tuple[str, ...]
    workloads: dict[str, Unit]  # by name, in the table's order
    mean: bool  # whether a mean over the workloads says something
    better: str  # what less cost means: faster

    def prepare(self, lab: Lab) -> None:
        """Whatever is needed once. Raises Unavailable."""

    def measure(self, lab: Lab, side: str) -> Round:
        """One round on one side. Raises MachineFailed."""

    def derived(self, results: Results) -> dict[str, dict[str, Ratio]]:
        """Further lines of the table: ratios by name and side."""

    def requirements(self, results: Results) -> list[Requirement]: ...


def mean_requirements(
    results: Results, names: typing.Iterable[str], faster: float, slower: float | None
) -> list[Requirement]:
    """Faster than TCG by at least, slower than native by at most."""
    speed = results.mean_ratio(names, "qemu", "lodge")
    wanted = [Requirement("geomean, times faster than TCG", speed and speed.min, "at least", faster)]
    if slower is not None:
        slowdown = results.mean_ratio(names, "lodge", "native")
        wanted.append(Requirement("geomean, times slower than native", slowdown and slowdown.min, "at most", slower))
    return wanted


class Programs:
    """Static programs of our own, on one processor."""

    sides = SIDES
    mean = True
    better = "faster"

    def __init__(
        self, name: str, iterations: dict[str, int], faster: float, slower: float | None, none_slower: bool = False
    ):
        self.name = name
        self.workloads = {program: EACH for program in iterations}
        self._iterations = iterations
        self._faster, self._slower, self._none_slower = faster, slower, none_slower
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def prepare(self, lab: Lab) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="compare-")
        directory = pathlib.Path(self._files.name, "bench")
        directory.mkdir()
        for name in self._iterations:
            shutil.copy2(lab.programs / name.replace("-", "_"), directory / name)

    def measure(self, lab: Lab, side: str) -> Round:
        assert self._files is not None
        steps = [self._step(name, lab.amount(name, default)) for name, default in self._iterations.items()]
        return lab.run(side, Shape(), pathlib.Path(self._files.name), steps)

    @staticmethod
    def _step(name: str, iterations: int) -> Step:
        return Step(name, (f"{ROOT}/bench/{name}", str(iterations)), lambda output: parse_program(name, output))

    def derived(self, results: Results) -> dict[str, dict[str, Ratio]]:
        return {}

    def requirements(self, results: Results) -> list[Requirement]:
        wanted = mean_requirements(results, self.workloads, self._faster, self._slower)
        if self._none_slower:
            speeds = results.ratios(self.workloads, "qemu", "lodge")
            worst = min(speed.min for speed in speeds) if speeds else None
            wanted.append(Requirement("worst, times faster than TCG", worst, "at least", 1))
        return wanted
