"""Where measurements are made: the machines, the files, and one run of a plan on one of them."""

import dataclasses
import pathlib
import tempfile

from . import guest, native
from .guest import Console, Guests, Vmm
from .plan import Outcome, Round, Shape, Step
from .samples import BadOutput, Sample, implausible


class Unavailable(Exception):
    """A group cannot be measured here, and why."""


class StepFailed(Exception):
    """The machine went on, but this step gave no measurement."""


@dataclasses.dataclass(frozen=True)
class Lab:
    vmms: dict[str, Vmm]
    guests: Guests
    programs: pathlib.Path  # the built ones of bench/compare/programs
    scale: float = 1  # of all amounts of work
    iterations: dict[str, int] = dataclasses.field(default_factory=dict)  # by program, instead of the default

    def amount(self, name: str, default: int) -> int:
        return self.iterations.get(name, max(1, round(default * self.scale)))

    def run(self, side: str, shape: Shape, files: pathlib.Path, steps: list[Step]) -> Round:
        """One run of `steps`. Raises MachineFailed when the machine itself did not get through."""
        if side == "native":
            outcomes = native.run_steps(files, shape, steps)
        else:
            with tempfile.NamedTemporaryFile(prefix="compare-", suffix=".cpio") as image:
                image.write(self.guests.image(files, steps))
                image.flush()
                arguments = self.vmms[side].arguments(
                    shape, self.guests.kernel, pathlib.Path(image.name), guest.APPEND
                )
                with Console(arguments) as console:
                    outcomes = guest.run_steps(console, steps)
        done = Round()
        for outcome in outcomes:
            try:
                done.samples += read(outcome)
            except StepFailed as error:
                done.failures.append(str(error))
        return done


def read(outcome: Outcome) -> list[Sample]:
    """The samples of a step that went well. Raises StepFailed."""
    step = outcome.step
    if outcome.status != 0:
        raise StepFailed(f"{step.name} ended with status {outcome.status}: {outcome.output[-500:]}")
    try:
        samples = step.parse(outcome.output)
    except BadOutput as error:
        raise StepFailed(str(error)) from error
    if step.own_clock:
        for sample in samples:
            if wrong := implausible(sample.seconds, outcome.outside):
                raise StepFailed(f"{step.name}: {wrong}")
    return samples

