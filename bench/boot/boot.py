"""Start-up of each machine type, in turns: the same kernel and initramfs, one processor, 512 MiB, a serial console.

"first byte" is the kernel's first output on the serial port (earlyprintk), so most of what comes before it is the VMM's
own start. Every figure is the minimum and the median of all rounds."""

import argparse
import json
import pathlib
import statistics
import sys
import time

from compare.guest import Console, MachineFailed
from compare.report import align
from compare.units import digits

TOP = pathlib.Path(__file__).resolve().parents[2]
GUEST = TOP / ".cache/guests/cloud"
APPEND = "console=ttyS0 quiet lodge.mode=off"
EARLY = "console=ttyS0 earlyprintk=serial,ttyS0,115200 lodge.mode=off"
BOOT_LIMIT = 30  # seconds; a start that takes longer hangs, as QEMU's microvm does now and then
FIGURES = ("first byte", "to userland", "to power-off", "processor time")


def sides(qemu: str, balloon: bool) -> dict[str, list[str]]:
    lodge = [str(TOP / "build/lodge"), "run", "--accel", "soft", "--no-reboot", "--memory", "512M",
             "--kernel", str(GUEST / "vmlinuz"), "--initrd", str(GUEST / "initramfs")]  # fmt: skip
    tcg = [qemu, "-accel", "tcg", "-cpu", "max", "-m", "512M", "-nodefaults", "-vga", "none", "-display", "none",
           "-serial", "stdio", "-no-reboot", "-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initramfs")]  # fmt: skip
    bare = {"Lodge micro, no balloon": [*lodge, "--machine", "micro", "--no-balloon"],
            "Lodge pc, no balloon": [*lodge, "--no-balloon"]}  # fmt: skip
    return {
        "Lodge micro": [*lodge, "--machine", "micro"],
        "Lodge pc": lodge,
        **(bare if balloon else {}),
        # As QEMU's documentation has it for the fastest start; TCG has no kvmclock, so the timer chips stay.
        "QEMU microvm": [*tcg, "-M", "microvm,x-option-roms=off,rtc=on,isa-serial=on"],
        "QEMU q35": [*tcg, "-M", "q35"],
    }


def boot(command: list[str]) -> dict[str, float]:
    append = "-append" if "-kernel" in command else "--append"
    with Console([*command, append, EARLY]) as console:
        first = console.line(BOOT_LIMIT).at
    with Console([*command, append, APPEND]) as console:
        userland = console.until("lodge-guest: userland", BOOT_LIMIT).at
        off = console.finish(BOOT_LIMIT)
        return dict(zip(FIGURES, (first, userland, off, console.cpu_seconds)))


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    reference = next(iter(measured))
    rows = [["seconds, minimum / median", *measured, *(f"{side} : {reference}" for side in list(measured)[1:])]]
    for figure in FIGURES:
        values = {side: [each[figure] for each in rounds] for side, rounds in measured.items()}
        cells = [f"{min(each):.3f} / {statistics.median(each):.3f}" for each in values.values()]
        base = values[reference]
        ratios = [f"{digits(min(values[side]) / min(base))}x / "
                  f"{digits(statistics.median(values[side]) / statistics.median(base))}x"
                  for side in list(measured)[1:]]  # fmt: skip
        rows.append([figure, *cells, *ratios])
    return align(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/boot/run", description=__doc__,
                                     epilog="Example: bench/boot/run --rounds 3 --only micro")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after this time")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--balloon", action="store_true", help="Lodge's machines also without their balloon")
    parser.add_argument("--only", metavar="TEXT", help="sides whose name contains this")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PATH")
    options = parser.parse_args()
    commands = {side: command for side, command in sides(options.qemu, options.balloon).items()
                if not options.only or options.only in side}  # fmt: skip
    if not commands:
        parser.error(f"--only {options.only}: no side has that in its name")
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in commands}
    failed = dict.fromkeys(commands, 0)
    end = time.monotonic() + options.seconds
    for number in range(options.rounds):
        if number and time.monotonic() > end:
            break
        for side, command in commands.items():
            try:
                measured[side].append(boot(command))
            except MachineFailed as failure:  # counted, and said below the table
                print(f"{side}: {failure}", file=sys.stderr)
                failed[side] += 1
        last = ", ".join(f"{side} {rounds[-1]['to userland']:.2f} s" for side, rounds in measured.items() if rounds)
        print(f"round {number + 1} of {options.rounds}, to userland: {last}", file=sys.stderr)
    for side, count in failed.items():
        if count:
            print(f"{side}: {count} of {number + 1} starts ended in nothing within {BOOT_LIMIT} s")
    if not all(measured.values()):
        return 1
    print(table(measured))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
