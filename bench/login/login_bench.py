"""Start of an installed Debian, in turns: `lodge run DISK` on the soft accelerator beside QEMU's TCG.

Both get the same kernel, initial RAM disk and command line, the same image under an overlay that is thrown away, one
processor, 512 MiB, and the same devices: virtio-blk, virtio-net with user-mode NAT, virtio-rng, a balloon, one console.
"first boot" starts the image as it was built (--first rounds); all other rounds start a copy that was booted before and
shut down cleanly. Times are from the start of the process to the first line on the console (on hvc0 that is when the
kernel has loaded its driver), to systemd's first, and to the login prompt. Every figure is the minimum and the median of its rounds."""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from compare.guest import BOOT_LIMIT, Console, MachineFailed
from compare.report import align
from compare.units import digits

TOP = pathlib.Path(__file__).resolve().parents[2]
MILESTONES = {"first line": re.compile(""), "systemd": re.compile(r"systemd\[1\]: systemd \d+.* running")}
FIGURES = (*MILESTONES, "login", "processor time")
WANTED = 0.6  # of TCG's time to the login prompt
SIDES = ("Lodge", "QEMU TCG")
CONSOLES = {"virtio": "hvc0", "serial": "ttyS0"}


@dataclasses.dataclass(frozen=True)
class System:
    """What QEMU needs of the disk, as Lodge reads it by itself."""

    kernel: pathlib.Path
    initrd: pathlib.Path
    root: str
    hostname: str


def debugfs(file_system: str, request: str) -> str:
    done = subprocess.run(["debugfs", "-R", request, file_system], check=True, capture_output=True, text=True)
    return done.stdout


def take_apart(lodge: pathlib.Path, image: pathlib.Path, directory: pathlib.Path) -> System:
    """The kernel and RAM disk of the disk that `lodge image build` makes: one partition, from 1 MiB on."""
    raw = directory / "disk.raw"
    subprocess.run([lodge, "image", "convert", "--format", "raw", image, raw], check=True)
    try:
        with raw.open("rb") as file:
            file.seek(2 * 512 + 16)  # the unique GUID of the first entry of the GPT
            guid = file.read(16)
        fields = (guid[3::-1], guid[5:3:-1], guid[7:5:-1], guid[8:10], guid[10:])
        file_system = f"{raw}?offset={1 << 20}"
        names = re.findall(r"vmlinuz-[^/\s]+", debugfs(file_system, "ls -p /boot"))
        if len(names) != 1:
            raise SystemExit(f"{image}: one kernel in /boot is expected, not {len(names)}")
        system = System(directory / "vmlinuz", directory / "initrd", "PARTUUID=" + "-".join(each.hex() for each in fields),
                        debugfs(file_system, "cat /etc/hostname").strip())  # fmt: skip
        debugfs(file_system, f"dump /boot/{names[0]} {system.kernel}")
        debugfs(file_system, f"dump /boot/{names[0].replace('vmlinuz', 'initrd.img')} {system.initrd}")
        if not system.kernel.exists() or not system.initrd.exists():  # debugfs succeeds always
            raise SystemExit(f"{image}: kernel and initial RAM disk cannot be read")
        return system
    finally:
        raw.unlink()


def lodge_command(options: argparse.Namespace, image: pathlib.Path, console: str) -> list[str]:
    where = ["--serial", "stdio"] if console == "serial" else ["--console", "stdio"]
    return [str(options.lodge), "run", "--accel", "soft", "--memory", "512M", "--snapshot", *where, str(image)]


def qemu_command(options: argparse.Namespace, system: System, image: pathlib.Path, console: str) -> list[str]:
    where = (["-serial", "stdio"] if console == "serial" else
             ["-device", "virtio-serial-pci", "-chardev", "stdio,id=terminal", "-device", "virtconsole,chardev=terminal"])  # fmt: skip
    append = f"root={system.root} ro console={CONSOLES[console]}"
    return [options.qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-m", "512M", "-nodefaults",
            "-vga", "none", "-display", "none", *where,
            "-drive", f"file={image},if=none,id=disk,snapshot=on", "-device", "virtio-blk-pci,drive=disk",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci,free-page-reporting=on",
            "-kernel", str(system.kernel), "-initrd", str(system.initrd), "-append", append]  # fmt: skip


def boot(command: list[str], prompt: str) -> dict[str, float]:
    """Seconds to each milestone; the machine is killed at the prompt, as its changes are thrown away."""
    times: dict[str, float] = {}
    with Console(command) as console:
        lines = console.until_prompt(prompt, BOOT_LIMIT)
        login = console.elapsed()
        for line in lines:
            for name, pattern in MILESTONES.items():
                if name not in times and pattern.search(line.text):
                    times[name] = line.at
        console.end()
        if missing := set(MILESTONES) - set(times):
            raise MachineFailed(f"its log does not show the start of {', '.join(sorted(missing))}")
        return {**times, "login": login, "processor time": console.cpu_seconds}


def used_copy(options: argparse.Namespace, prompt: str, directory: pathlib.Path) -> pathlib.Path:
    """The image after its first boot, which makes what lasts (machine-id, journal, random seed)."""
    copy = directory / "used.qcow2"
    subprocess.run(["cp", "--reflink=auto", options.image, copy], check=True)
    command = lodge_command(options, copy, "virtio")
    command.remove("--snapshot")
    with Console(command) as console:
        console.until_prompt(prompt, BOOT_LIMIT)
        console.settle(5)  # what starts beside the login
        console.terminate()  # the power button
        console.finish(BOOT_LIMIT)
    return copy


def table(title: str, measured: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    rows = [[title, *SIDES, "Lodge : TCG"]]
    for figure in FIGURES:
        lodge, qemu = ([each[figure] for each in measured[side]] for side in SIDES)
        cells = [f"{min(each):.2f} / {statistics.median(each):.2f}" for each in (lodge, qemu)]
        ratio = f"{digits(min(lodge) / min(qemu))} / {digits(statistics.median(lodge) / statistics.median(qemu))}"
        rows.append([figure, *cells, ratio])
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/login/run", description=__doc__,
                                     epilog="Example: bench/login/run --rounds 3 --first 0")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of the image that was booted before (default 5)")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="of its first boot (default 1)")
    parser.add_argument("--console", choices=CONSOLES, default="virtio", help="virtio: hvc0, as `lodge run` has it (default)")
    parser.add_argument("--image", type=pathlib.Path, default=TOP / ".cache/guests/debian/debian.qcow2", metavar="FILE",
                        help="a disk of `lodge image build` with a root password")  # fmt: skip
    parser.add_argument("--lodge", type=pathlib.Path, default=TOP / "build/lodge", metavar="PATH")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PATH")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    if options.rounds < 1 or options.first < 0:
        parser.error("--rounds is at least 1, --first at least 0")
    if not shutil.which("debugfs"):
        parser.error("debugfs is missing; run scripts/setup")
    return options


def measure(options: argparse.Namespace, directory: pathlib.Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    system = take_apart(options.lodge, options.image, directory)
    prompt = f"{system.hostname} login: "
    images = {"first boot": (options.image, options.first),
              "booted before": (used_copy(options, prompt, directory), options.rounds)}  # fmt: skip
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for title, (image, rounds) in images.items():
        subprocess.run(["cat", image], check=True, stdout=subprocess.DEVNULL)  # everybody finds it in the page cache
        commands = {"Lodge": lodge_command(options, image, options.console),
                    "QEMU TCG": qemu_command(options, system, image, options.console)}  # fmt: skip
        for number in range(rounds):
            for side, command in commands.items():
                print(f"{title}, round {number + 1} of {rounds}: {side}", file=sys.stderr)
                results.setdefault(title, {}).setdefault(side, []).append(boot(command, prompt))
    return results


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="login-", dir=TOP / ".cache") as directory:
        try:
            results = measure(options, pathlib.Path(directory))
        except MachineFailed as failure:
            print(failure, file=sys.stderr)
            return 1
    print(f"seconds, minimum / median of {options.rounds} (first boot: {options.first}); console {CONSOLES[options.console]}, "
          f"{len(os.sched_getaffinity(0))} host CPUs, load {os.getloadavg()[0]:.1f} after")  # fmt: skip
    for title, measured in results.items():
        print(align(table(title, measured)))
    used = results["booted before"]
    ratio = min(each["login"] for each in used["Lodge"]) / min(each["login"] for each in used["QEMU TCG"])
    print(f"  time to the login prompt : TCG's: {digits(ratio)}, required <= {WANTED}: {'met' if ratio <= WANTED else 'NOT MET'}")
    if options.json:
        about = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "console": options.console, "ratio": ratio}
        options.json.write_text(json.dumps({**about, "samples": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
