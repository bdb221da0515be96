"""A guest of 2 GiB reads a disk of 1 GiB into its page cache and drops the cache; the process's resident memory is
watched from then on. See docs/memory.md."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MIB = 1 << 20
CACHE_MIB = 1024
GUEST = "2G"
BOOT_LIMIT = 600  # for a loaded host
SHARE, WITHIN = 0.9, 10  # what must have gone back, and when (seconds)


class Guest:
    """A machine at a shell prompt, until the end of the `with`."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.output = bytearray()
        self.came = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while piece := os.read(self.process.stdout.fileno(), 65536):
            with self.came:
                self.output += piece
                self.came.notify_all()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, text: str) -> None:
        with self.came:
            if not self.came.wait_for(lambda: text.encode() in self.output, BOOT_LIMIT):
                sys.exit(f"bench/memory: the guest did not print '{text}':\n{self.output.decode(errors='replace')[-2000:]}")

    def say(self, text: str) -> None:
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def resident(self) -> float:
        """MiB."""
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0


def commands(lodge: pathlib.Path, guest: pathlib.Path, disk: str, extra: list[str]) -> dict[str, list[str]]:
    append = "console=ttyS0 quiet lodge.mode=shell"
    kernel, initrd = str(guest / "vmlinuz"), str(guest / "initramfs")
    return {
        "lodge": [str(lodge), "run", "--accel", "soft", "--memory", GUEST, "--kernel", kernel, "--initrd", initrd,
                  "--append", append, "--disk", f"{disk},snapshot", *extra],
        "qemu": ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-nodefaults",
                 "-nographic", "-no-reboot", "-serial", "stdio", "-m", GUEST, "-kernel", kernel, "-initrd", initrd,
                 "-append", append, "-drive", f"file={disk},format=raw,if=virtio,snapshot=on",
                 "-device", "virtio-balloon-pci,free-page-reporting=on"],
    }  # fmt: skip


def measure(command: list[str], wait: float) -> dict[str, object]:
    with Guest(command) as guest:
        guest.wait("This is a shell in the guest.")
        # Free pages from the start of the kernel are reported meanwhile, and are not to be counted below.
        time.sleep(5)
        booted = guest.resident()
        guest.say("cat /dev/vda >/dev/null; echo filled=$((1+1))")
        guest.wait("filled=2")
        filled = guest.resident()
        guest.say("echo 3 >/proc/sys/vm/drop_caches; echo freed=$((1+2))")
        guest.wait("freed=3")
        start = time.monotonic()
        curve = []
        while (now := time.monotonic() - start) < wait:
            curve.append((round(now, 2), round(filled - guest.resident(), 1)))
            time.sleep(0.1)
    reached = next((at for at, fallen in curve if fallen >= SHARE * CACHE_MIB), None)
    in_time = max(fallen for at, fallen in curve if at <= WITHIN)
    return {"booted": booted, "filled": filled, "seconds": reached, "share_in_time": in_time / CACHE_MIB,
            "share_at_end": curve[-1][1] / CACHE_MIB, "curve": curve}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/memory/run", description=__doc__,
                                     epilog="Example: bench/memory/run --rounds 1 --only lodge")  # fmt: skip
    parser.add_argument("--top", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="lodge,qemu", metavar="SIDES")
    parser.add_argument("--wait", type=float, default=45, help="seconds that a guest is watched (default 45)")
    parser.add_argument("--lodge", type=pathlib.Path, help="another binary than build/lodge")
    parser.add_argument("--option", action="append", default=[], help="passed on to `lodge run`; repeatable")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    lodge = options.lodge or options.top / "build/lodge"
    results: dict[str, list[dict[str, object]]] = {side: [] for side in options.only.split(",")}
    with tempfile.NamedTemporaryFile(prefix="lodge-memory-", dir="/var/tmp") as disk:
        disk.truncate(CACHE_MIB * MIB)
        all_commands = commands(lodge, options.top / ".cache/guests/cloud", disk.name, options.option)
        for number in range(options.rounds):
            for side in results:
                print(f"round {number + 1} of {options.rounds}: {side}", file=sys.stderr)
                results[side].append(measure(all_commands[side], options.wait))
    print(f"after {CACHE_MIB} MiB of page cache were dropped; median of {options.rounds}; load {os.getloadavg()[0]:.1f}")
    print(f"{'':8} {'resident MiB: booted':>20} {'filled':>8} {'share back in 10 s':>20} {'90 % after':>12} {'at the end':>11}")
    for side, rounds in results.items():
        middle = {key: statistics.median(one[key] for one in rounds)
                  for key in ("booted", "filled", "share_in_time", "share_at_end")}  # fmt: skip
        times = [one["seconds"] for one in rounds]
        after = "never" if None in times else f"{statistics.median(times):.1f} s"
        print(f"{side:8} {middle['booted']:20.0f} {middle['filled']:8.0f} {middle['share_in_time']:20.0%} {after:>12} "
              f"{middle['share_at_end']:11.0%}")  # fmt: skip
    if "lodge" in results:
        worst = min(one["share_in_time"] for one in results["lodge"])
        print(f"wanted: at least {SHARE:.0%} within {WITHIN} s; worst of Lodge's rounds: {worst:.0%}")
    if options.json:
        options.json.write_text(json.dumps({"rounds": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
