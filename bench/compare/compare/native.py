"""The same programs on the bare machine."""

import os
import pathlib
import subprocess
import time

from .guest import MachineFailed
from .plan import Outcome, Shape, Step


def run_steps(files: pathlib.Path, shape: Shape, steps: list[Step]) -> list[Outcome]:
    """Runs `steps` on as many processors as the machine has, on files below `files`."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < shape.cpus:
        raise MachineFailed(f"this host has {len(available)} processors for us; {shape.cpus} are needed")
    processors = ",".join(map(str, available[-shape.cpus :]))
    outcomes = []
    for step in steps:
        command = ["taskset", "-c", processors, "sh", "-c", step.shell(str(files))]
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=step.limit, text=True, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise MachineFailed(f"{step.name}: no end after {step.limit:.0f} s") from None
        outcomes.append(Outcome(step, done.stdout, done.returncode, time.monotonic() - start))
    return outcomes
