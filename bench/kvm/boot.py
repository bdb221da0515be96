"""QEMU on Lodge's soft accelerator beside QEMU on TCG: Debian's cloud kernel from the start of the process to its end.

Rounds alternate; minima and medians in seconds, and the ratio of the minima. The same command line but for the accelerator.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

TOP = pathlib.Path(__file__).resolve().parents[2]
GUEST = TOP / ".cache/guests/cloud"


def command(accel, arguments):
    qemu = ["qemu-system-x86_64", "-accel", accel, "-machine", arguments.machine, "-smp", str(arguments.cpus),
            "-cpu", "max", "-m", "512M", "-nographic", "-no-reboot", "-nic", "none",
            "-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initramfs"),
            "-append", "console=ttyS0 quiet panic=-1 lodge.mode=report"]
    return [str(TOP / "build/lodge"), "kvm", "--", *qemu] if accel == "kvm" else qemu


def boot(accel, arguments):
    start = time.monotonic()
    result = subprocess.run(command(accel, arguments), stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    seconds = time.monotonic() - start
    if result.returncode != 0 or b"lodge-guest: powering off" not in result.stdout:
        sys.exit(f"bench/kvm: {accel}: the guest did not power off\n{result.stderr.decode(errors='replace')[-400:]}")
    return seconds


def main():
    parser = argparse.ArgumentParser(prog="bench/kvm/run", description=__doc__, epilog="Example: bench/kvm/run --rounds 3 --machine q35",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--machine", default="pc")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    times = {"kvm": [], "tcg": []}
    for _ in range(arguments.rounds):
        for accel, seconds in times.items():
            seconds.append(boot(accel, arguments))
    rows = {accel: {"min": min(s), "median": statistics.median(s), "all": s} for accel, s in times.items()}
    ratio = rows["kvm"]["min"] / rows["tcg"]["min"]
    if arguments.json:
        print(json.dumps({"machine": arguments.machine, "cpus": arguments.cpus, "seconds": rows, "ratio": ratio}))
        return
    print(f"{arguments.machine}, {arguments.cpus} CPU, to power-off     min    median")
    for accel, label in (("kvm", "QEMU on lodge kvm"), ("tcg", "QEMU on TCG")):
        print(f"{label:<24} {rows[accel]['min']:8.2f} s {rows[accel]['median']:6.2f} s")
    print(f"ratio of the minima      {ratio:8.2f}")


main()
