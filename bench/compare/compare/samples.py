"""What one run of a program measured, and how that is read from what it printed."""

import dataclasses
import re


class BadOutput(Exception):
    """The program printed something else than a measurement."""


@dataclasses.dataclass(frozen=True)
class Sample:
    workload: str
    work: float  # in the workload's unit: iterations, bytes, events
    seconds: float
    checksum: str = ""  # of the results, where all sides must have the same

    @property
    def cost(self) -> float:
        """Seconds for a unit of work."""
        return self.seconds / self.work


_PROGRAM = re.compile(r"^(?P<name>[a-z0-9-]+) (?P<work>\d+) (?P<seconds>\d+\.\d+) (?P<checksum>[0-9a-f]{16})$", re.M)


def parse_program(name: str, output: str) -> list[Sample]:
    """The line "name iterations seconds checksum" of our own programs."""
    found = [match for match in _PROGRAM.finditer(output) if match["name"] == name]
    if len(found) != 1:
        raise BadOutput(f"{name}: {len(found)} result lines in {output[-300:]!r}")
    match = found[0]
    if int(match["work"]) == 0 or float(match["seconds"]) == 0:
        raise BadOutput(f"{name}: nothing was measured: {match[0]!r}")
    return [Sample(name, float(match["work"]), float(match["seconds"]), match["checksum"])]


def implausible(seconds: float, outside: float) -> str:
    """Why a program's own clock cannot be right, given the time that passed outside of the machine; else empty."""
    if seconds > outside * 1.02 + 0.02:
        return f"the guest says {seconds:.3f} s, but only {outside:.3f} s passed"
    # A program is also loaded and prepares its data.
    if outside > seconds * 1.25 + 1.5:
        return f"the guest says {seconds:.3f} s, but {outside:.3f} s passed"
    return ""
