"""What a machine is asked to run."""

import dataclasses
import shlex
import typing

from .samples import Sample

ROOT = "{root}"  # in a command: the directory that is the guest's root


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    parse: typing.Callable[[str], list[Sample]]  # raises BadOutput
    own_clock: bool = True  # the program times itself: compare that with the time outside
    limit: float = 300  # seconds

    def shell(self, root: str) -> str:
        return shlex.join(word.replace(ROOT, root) for word in self.command)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: Step
    output: str
    status: int
    outside: float  # seconds, by the host's clock


@dataclasses.dataclass(frozen=True)
class Shape:
    """The machine."""

    cpus: int = 1
    memory_mib: int = 512


@dataclasses.dataclass
class Round:
    """What one run on one side gave."""

    samples: list[Sample] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)  # of single steps
