"""QEMU on `lodge kvm` beside Lodge's own VMM: the programs of bench/compare, which both run on the same accelerator.

Rounds alternate; minimum / median of what one iteration costs, and their ratios. QEMU must hold within 15 % of Lodge.
"""
import argparse
import json
import os
import pathlib
import sys

TOP = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "bench/compare"))
sys.dont_write_bytecode = True

from compare import guest, report  # noqa: E402
from compare.__main__ import make_lab, measure, parse_arguments  # noqa: E402
from compare.catalog import FLOAT, INTEGER, SYSTEM  # noqa: E402
from compare.groups import Programs  # noqa: E402
from compare.results import geomean  # noqa: E402

PROGRAMS = {"integer": INTEGER, "float": FLOAT, "system": SYSTEM}
BOUND = 1.15


class Work(Programs):
    """A group of bench/compare on two sides; "qemu" is QEMU on lodge kvm here."""

    sides = ("lodge", "qemu")

    def __init__(self, name):
        super().__init__(name, PROGRAMS[name], faster=1, slower=None)


def lab(options):
    made = make_lab(parse_arguments(["--quick"] if options.quick else []))
    on_lodge = ("kvm", "--")
    plain = guest.qemu(pathlib.Path("qemu-system-x86_64"))
    command = tuple("kvm" if word.startswith("tcg") else word for word in plain.command)
    made.vmms["qemu"] = guest.Vmm("qemu", (str(TOP / "build/lodge"), *on_lodge, *command), plain.cpus, plain.memory,
                                  plain.kernel, plain.initrd, plain.append)  # fmt: skip
    return made


def rows(group, results):
    out = [[group.name, "Lodge", "QEMU on lodge kvm", "QEMU / Lodge"]]
    for name, unit in group.workloads.items():
        cells = [results.figures(name, side) for side in group.sides]
        ratio = results.ratio(name, "qemu", "lodge")
        shown = [f"{unit.show(cell.min)} / {unit.show(cell.median)}" if cell else "-" for cell in cells]
        out.append([name, *shown, f"{ratio.min:.2f} / {ratio.median:.2f}" if ratio else "-"])
    return out


def main():
    parser = argparse.ArgumentParser(prog="bench/kvm/work", description=__doc__, epilog="Example: bench/kvm/work --only float --rounds 3",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PROGRAMS), metavar="GROUP[,GROUP]")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work; ratios are then rough")
    parser.add_argument("--mitigations", action="store_true", help="leave them to the guest's kernel, which finds other "
                        "ones needed under QEMU (docs/kvm.md)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in PROGRAMS]:
        parser.error(f"unknown group '{unknown[0]}' (known: {' '.join(PROGRAMS)})")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not options.mitigations:
        guest.APPEND += " mitigations=off"
    machines, good, measured = lab(options), True, {}
    for group in map(Work, names):
        group.prepare(machines)
        results = measure(group, machines, options.rounds)
        ratios = {name: results.ratio(name, "qemu", "lodge") for name in group.workloads}
        complete = all(ratios.values())
        good = good and complete and not results.failures and not results.disagreements()
        mean = geomean(ratio.min for ratio in ratios.values()) if complete else None
        measured[group.name] = {
            "workloads": {name: {side: list(found.costs) for side in group.sides
                                 if (found := results.figures(name, side))} for name in group.workloads},
            "ratios": {name: ratio and ratio.min for name, ratio in ratios.items()},
            "geomean": mean,
            "failures": results.failures,
            "disagreements": results.disagreements(),
        }  # fmt: skip
        if options.json:
            continue
        print(report.align(rows(group, results)))
        for line in [f"FAILED on {side}: {what}" for side, what in results.failures] + results.disagreements():
            print(line)
        if complete:
            beyond = [f"{name} {ratio.min:.2f}" for name, ratio in ratios.items() if ratio.min > BOUND]
            print(f"geomean {mean:.2f}, required at most {BOUND}; beyond it: {', '.join(beyond) or 'none'}\n", flush=True)
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "rounds": options.rounds, "groups": measured}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
