"""Group boot: how long a whole machine takes to start and to end."""

import pathlib

from . import guest
from .guest import Console
from .lab import Lab
from .plan import Round, Shape
from .results import Ratio, Requirement, Results
from .samples import Sample
from .units import SECONDS


class Boot:
    """From the start of the process to the first line of userland and to the end after power-off, by the wall clock."""

    name = "boot"
    sides = ("lodge", "qemu")
    workloads = {"to userland": SECONDS, "to power-off": SECONDS, "processor time": SECONDS}
    mean = False
    better = "faster"
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

    def derived(self, results: Results) -> dict[str, dict[str, Ratio]]:
        return {}

    def requirements(self, results: Results) -> list[Requirement]:
        wanted = []
        for name in self._judged:
            ratio = results.ratio(name, "lodge", "qemu")
            wanted.append(Requirement(f"{name}, times TCG's", ratio and ratio.min, "at most", 0.7))
        return wanted
