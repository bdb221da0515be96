"""Group smp: what a second processor brings to a parallel compile.

With as many jobs at a time as processors, as `make -j$(nproc)` has them, that is what a user gains. With two jobs on
one processor as well, it is also how dear the VMM's switch between two address spaces is: the dearer, the more."""

import os
import pathlib
import shutil
import tempfile

from .lab import Lab, Unavailable
from .plan import ROOT, Round, Shape, Step
from .results import SIDES, Ratio, Requirement, Results
from .samples import Sample, parse_program
from .tools import command, unpack
from .units import EACH

UNITS = 8  # source files
JOBS = 192  # compiles in all
IDLE = 1.6  # the least that the second processor of an idle host brings


def source(unit: int, functions: int = 400) -> str:
    """C that needs no header: structures, loops, switches, calls."""
    parts = [f"struct item{unit} {{ int key; long value; struct item{unit} *next; char name[16]; }};\n"]
    for number in range(functions):
        call = f"f{unit}_{number - 1}(list, seed + {number})" if number else "seed"
        parts.append(f"""
static long f{unit}_{number}(struct item{unit} *list, long seed) {{
  long sum = {number * 7919 % 1009}, table[8] = {{1, 2, 3, {number}}};
  for (struct item{unit} *at = list; at; at = at->next) {{
    switch (at->key & 3) {{
      case 0: sum += at->value * {number + 3}; break;
      case 1: sum ^= table[at->value & 7] << (seed & 15); break;
      default: sum -= at->name[at->key & 15] + {unit}; break;
    }}
    if (sum > {number * 1000} && at->next) at->next->value = sum % {number + 11};
  }}
  return sum + ({number} % 5 == 0 ? {call} : seed * {number});
}}
""")
    parts.append(f"long unit{unit}(struct item{unit} *list) {{ return f{unit}_{functions - 1}(list, {unit}); }}\n")
    return "".join(parts)


ALONE, SHARED, BOTH = "compile, 1 CPU", "compile, 1 CPU, 2 jobs", "compile, 2 CPUs"


class Smp:
    name = "smp"
    sides = SIDES
    workloads = {ALONE: EACH, SHARED: EACH, BOTH: EACH}
    mean = False
    better = "faster"

    def __init__(self, tools: pathlib.Path):
        self._tools = tools
        self._root: tempfile.TemporaryDirectory[str] | None = None

    def prepare(self, lab: Lab) -> None:
        if len(os.sched_getaffinity(0)) < 2:
            raise Unavailable("this host has one processor for us")
        self._root = tempfile.TemporaryDirectory(prefix="compare-")
        root = pathlib.Path(self._root.name)
        unpack(self._tools, ["tcc"], root)
        shutil.copy2(lab.programs / "compile", root / "tools/compile")
        (root / "source").mkdir()
        for unit in range(UNITS):
            (root / f"source/unit{unit}.c").write_text(source(unit))

    def measure(self, lab: Lab, side: str) -> Round:
        assert self._root is not None
        done = Round()
        for workload, cpus, at_a_time in ((ALONE, 1, 1), (SHARED, 1, 2), (BOTH, 2, 2)):
            words = (f"{ROOT}/tools/compile", str(lab.amount("compile", JOBS)), str(at_a_time), str(UNITS),
                     f"{ROOT}/source", *command("tcc", "-nostdinc", "-c"))  # fmt: skip
            step = Step("compile", words, lambda output: parse_program("compile", output))
            one = lab.run(side, Shape(cpus=cpus), pathlib.Path(self._root.name), [step])
            done.samples += [Sample(workload, sample.work, sample.seconds, sample.checksum) for sample in one.samples]
            done.failures += one.failures
        return done

    def derived(self, results: Results) -> dict[str, dict[str, Ratio]]:
        return {"speed-up of make -j": self._speed_up(results, ALONE),
                "speed-up of 2 jobs": self._speed_up(results, SHARED)}  # fmt: skip

    def _speed_up(self, results: Results, workload: str) -> dict[str, Ratio]:
        speed_ups = {}
        for side in self.sides:
            alone, both = results.figures(workload, side), results.figures(BOTH, side)
            if alone and both:
                speed_ups[side] = Ratio(alone.min / both.min, alone.median / both.median)
        return speed_ups

    def requirements(self, results: Results) -> list[Requirement]:
        found = self._speed_up(results, ALONE)
        note = ""
        if "native" in found and found["native"].min < IDLE:
            # Whatever keeps it busy takes from the guests as well, and not the same from each.
            note = f" (void: the host is busy, its own speed-up is {found['native'].min:.2f})"
            found = {}

        def over(side: str) -> float | None:
            return found["lodge"].min / found[side].min if "lodge" in found and side in found else None

        return [Requirement(f"speed-up, times TCG's{note}", over("qemu"), "more than", 1),
                Requirement(f"speed-up, times the host's{note}", over("native"), "at least", 0.9)]  # fmt: skip
