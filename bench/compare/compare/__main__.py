"""The command; see --help."""

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

from . import guest, report
from .catalog import FLOAT, INTEGER, SYSTEM, X87, all_groups
from .groups import Group
from .guest import Guests, MachineFailed
from .lab import Lab, Unavailable
from .plan import Round
from .results import Results

TOP = pathlib.Path(__file__).resolve().parents[3]
GUESTS = TOP / ".cache/guests"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/compare/run",
        description="Lodge's soft accelerator beside QEMU's TCG and the bare machine, in turn.",
        epilog="Example: bench/compare/run --only integer,boot --rounds 1",
    )
    parser.add_argument("--rounds", type=int, help="runs of each side (default 3; with --quick 1)")
    groups = "integer, float, x87, tools, system, boot, smp, memory"
    parser.add_argument("--only", metavar="GROUP[,GROUP]", help=f"of {groups} (default: all)")
    parser.add_argument("--lodge", type=pathlib.Path, default=TOP / "build/lodge", metavar="PATH")
    parser.add_argument("--engine", metavar="E", help="passed on to `lodge run`")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work; ratios are then rough")
    parser.add_argument("--iterations", action="append", default=[], metavar="PROGRAM=N", help="instead of the default")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        options.iterations = {name: int(count) for name, count in (text.split("=") for text in options.iterations)}
    except ValueError:
        parser.error("--iterations takes PROGRAM=N")
    return options


def fail(message: str) -> None:
    sys.exit(f"bench/compare: {message}")


def check_iterations(given: dict[str, int]) -> None:
    known = {*INTEGER, *FLOAT, *X87, *SYSTEM, "compile"}
    for name, count in given.items():
        if name not in known:
            fail(f"unknown program '{name}' (known: {' '.join(sorted(known))})")
        if count < 1:
            fail(f"{name}: at least one iteration is needed")


def choose(groups: list[Group], only: str | None) -> list[Group]:
    if only is None:
        return groups
    names = only.split(",")
    known = {group.name: group for group in groups}
    if unknown := [name for name in names if name not in known]:
        fail(f"unknown group '{unknown[0]}' (known: {' '.join(known)})")
    return [group for group in groups if group.name in names]


def program(name: str | pathlib.Path, advice: str) -> pathlib.Path:
    found = shutil.which(name)
    if found is None:
        fail(f"{name} is missing; {advice}")
    return pathlib.Path(found)


def make_lab(options: argparse.Namespace) -> Lab:
    cloud = GUESTS / "cloud"
    for path in (cloud / "vmlinuz", cloud / "initramfs"):
        if not path.exists():
            fail(f"{path} is missing; run scripts/fetch-guests cloud")
    vmms = {
        "lodge": guest.lodge(program(options.lodge, "build it (ninja -C build lodge)"), options.engine),
        "qemu": guest.qemu(program(options.qemu, "run scripts/setup")),
    }
    here = pathlib.Path(__file__).resolve().parents[1]
    guests = Guests(cloud / "vmlinuz", program("busybox", "run scripts/setup"), here / "guest-init")
    return Lab(vmms, guests, TOP / "build/bench/compare/programs",
               0.1 if options.quick else 1, options.iterations)  # fmt: skip


def measure(group: Group, lab: Lab, rounds: int) -> Results:
    """All rounds of a group: in turn, so that a change of the host's load meets all sides."""
    results = Results()
    broken: set[str] = set()
    for number in range(rounds):
        for side in group.sides:
            if side in broken:
                continue
            print(f"{group.name}: round {number + 1} of {rounds}: {side}", file=sys.stderr)
            try:
                done = group.measure(lab, side)
            except MachineFailed as error:
                broken.add(side)
                done = Round(failures=[str(error)])
            for sample in done.samples:
                results.add(side, sample)
            for message in done.failures:
                results.fail(side, message)
                print(f"{group.name}: {side}: {message}", file=sys.stderr)
    return results


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def host() -> dict[str, object]:
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return {"cpu": model, "cpus": cpus, "kernel": platform.release(), "load": load}


def main() -> int:
    options = parse_arguments(sys.argv[1:])
    check_iterations(options.iterations)
    lab = make_lab(options)
    groups = choose(all_groups(GUESTS / "cloud/initramfs", GUESTS / "tools"), options.only)
    about = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": host(),
        "lodge": first_line([str(options.lodge), "--version"]),
        "engine": options.engine,
        "qemu": first_line([options.qemu, "--version"]),
        "rounds": options.rounds,
        "scale": lab.scale,
    }
    machine = about["host"]
    print(f"minimum / median of {options.rounds}; {machine['cpu']}, {machine['cpus']} CPUs, load {machine['load']:.1f} "
          f"before; {about['lodge']}; {about['qemu']}")  # fmt: skip
    measured: dict[str, object] = {}
    good = True
    for group in groups:
        try:
            group.prepare(lab)
        except Unavailable as error:
            print(f"\n{group.name}: skipped: {error}", flush=True)
            measured[group.name] = {"skipped": str(error)}
        else:
            results = measure(group, lab, options.rounds)
            print(f"\n{report.text(group, results)}", flush=True)
            measured[group.name] = report.json(group, results)
            good = good and not results.failures and not results.disagreements()
        if options.json:  # after each group: a long run may be cut short
            options.json.write_text(json.dumps({**about, "groups": measured}, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
