"""The groups of workloads that are measured together, and what each must reach."""

import pathlib
import shutil
import tempfile
import typing

from . import guest
from .guest import Console
from .lab import Lab
from .plan import ROOT, Round, Shape, Step
from .results import SIDES, Requirement, Results
from .samples import Sample, parse_program
from .units import EACH, SECONDS, Unit


class Group(typing.Protocol):
    name: str
    sides: tuple[str, ...]
    workloads: dict[str, Unit]  # by name, in the table's order
    mean: bool  # whether a mean over the workloads says something

    def prepare(self, lab: Lab) -> None:
        """Whatever is needed once. Raises Unavailable."""

    def measure(self, lab: Lab, side: str) -> Round:
        """One round on one side. Raises MachineFailed."""

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

    def requirements(self, results: Results) -> list[Requirement]:
        wanted = mean_requirements(results, self.workloads, self._faster, self._slower)
        if self._none_slower:
            speeds = results.ratios(self.workloads, "qemu", "lodge")
            worst = min(speed.min for speed in speeds) if speeds else None
            wanted.append(Requirement("worst, times faster than TCG", worst, "at least", 1))
        return wanted


class Boot:
    """From the start of the process to the first line of userland and to the end after power-off, by the wall clock."""

    name = "boot"
    sides = ("lodge", "qemu")
    workloads = {"to userland": SECONDS, "to power-off": SECONDS, "processor time": SECONDS}
    mean = False
    _judged = ("to userland", "to power-off")

    def __init__(self, initramfs: pathlib.Path):
        self._initramfs = initramfs

    def prepare(self, lab: Lab) -> None:
        pass

    def measure(self, lab: Lab, side: str) -> Round:
        append = "console=ttyS0 quiet lodge.mode=off"
        arguments = lab.vmms[side].arguments(Shape(), lab.guests.kernel, self._initramfs, append)
        with Console(arguments) as console:
            userland = console.until("lodge-guest: userland", guest.BOOT_LIMIT).at
            off = console.finish(guest.BOOT_LIMIT)
            return Round([Sample("to userland", 1, userland), Sample("to power-off", 1, off),
                          Sample("processor time", 1, console.cpu_seconds)])  # fmt: skip

    def requirements(self, results: Results) -> list[Requirement]:
        wanted = []
        for name in self._judged:
            ratio = results.ratio(name, "lodge", "qemu")
            wanted.append(Requirement(f"{name}, times TCG's", ratio and ratio.min, "at most", 0.7))
        return wanted


# Iterations: 0.1 to 0.3 s natively, and at most 10 s in TCG, which takes 100 times as long for vectors.
INTEGER = {"sort": 60, "hash": 1000, "loads": 1000, "bytecode": 200, "recursion": 3000, "compression": 150}
FLOAT = {"matrix-sse2": 300, "matrix-avx2": 400, "fft": 800}
X87 = {"mandelbrot": 50, "polynomial": 200}
SYSTEM = {"getppid": 1_000_000, "pipe": 20_000, "fork-exit": 1000, "fork-exec": 300, "page-faults": 200,
          "context-switch": 50_000}  # fmt: skip


def all_groups(boot_initramfs: pathlib.Path) -> list[Group]:
    return [
        Programs("integer", INTEGER, faster=1.6, slower=3),
        Programs("float", FLOAT, faster=30, slower=3),
        Programs("x87", X87, faster=10, slower=3),
        Programs("system", SYSTEM, faster=1.3, slower=None, none_slower=True),
        Boot(boot_initramfs),
    ]
