"""fio in a guest on the same disk image, under Lodge and under QEMU; see --help."""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing

from compare import initramfs
from compare.guest import APPEND, Console, MachineFailed, run_steps
from compare.plan import Outcome, Step

TOP = pathlib.Path(__file__).resolve().parents[2]
GUESTS = TOP / ".cache/guests"
HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Row:
    """One job of fio. The figure is requests or MiB a second."""

    name: str
    options: str
    unit: str  # "IOPS" or "MiB/s"


ROWS = [
    Row("read-1M", "--rw=read --bs=1M --ioengine=libaio --iodepth=8", "MiB/s"),
    Row("write-1M", "--rw=write --bs=1M --ioengine=libaio --iodepth=8", "MiB/s"),
    Row("randread-4k-1", "--rw=randread --bs=4k --ioengine=psync", "IOPS"),
    Row("randread-4k-32", "--rw=randread --bs=4k --ioengine=libaio --iodepth=32", "IOPS"),
    Row("randwrite-4k-1", "--rw=randwrite --bs=4k --ioengine=psync", "IOPS"),
    Row("randwrite-4k-32", "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=32", "IOPS"),
]
WANTED = {"against QEMU": 1.5, "qcow2 against raw": 0.9}

# Without QEMU's devices that the guest does not use; the disk's thread of its own is what its manual advises.
QEMU = ("-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-nodefaults", "-vga", "none", "-display", "none",
        "-serial", "stdio", "-no-reboot", "-object", "iothread,id=io0",
        "-device", "virtio-blk-pci,drive=disk,iothread=io0,disable-legacy=on")  # fmt: skip
# How QEMU reaches the file: past the host's page cache, or through it as Lodge does. The better one counts, row by row.
QEMU_WAYS = {
    "qemu-direct": "cache.direct=on,aio=io_uring",
    "qemu-cached": "cache.direct=off,aio=io_uring",
    "qemu-native": "cache.direct=on,aio=native",
    "qemu-threads": "cache.direct=off,aio=threads",
}
FORMATS = ("raw", "qcow2")


def lodge_arguments(options: argparse.Namespace, *images: pathlib.Path) -> list[str]:
    disks = [word for image in images for word in ("--disk", f"{image},queues={options.queues}")]
    return [str(options.lodge), "run", "--accel", "soft", "--no-reboot", "--cpus", str(options.cpus), "--memory", "512M", *disks]


def qemu_arguments(options: argparse.Namespace, way: str, form: str, image: pathlib.Path) -> list[str]:
    file = f"driver=file,filename={image},node-name=file,{QEMU_WAYS[way]}"
    direct = QEMU_WAYS[way].split(",")[0]
    command = [options.qemu, *QEMU, "-smp", str(options.cpus), "-m", "512M"]
    return [*command, "-blockdev", file, "-blockdev", f"driver={form},file=file,node-name=disk,{direct}"]


def machine(options: argparse.Namespace, side: str, form: str, image: pathlib.Path) -> list[str]:
    return lodge_arguments(options, image) if side == "lodge" else qemu_arguments(options, side, form, image)


def fio_step(row: Row, options: argparse.Namespace, disk: str = "vda", turn: str = "") -> Step:
    command = (f"/bin/fio --name={row.name} --filename=/dev/{disk} --direct=1 --thread --gtod_reduce=1 --time_based "
               f"--runtime={options.seconds} --ramp_time={0 if options.together else 1} --norandommap --size={options.size}M {row.options} "
               f"--numjobs={options.jobs} --group_reporting "
               "--output-format=terse --terse-version=3")  # fmt: skip
    return Step(row.name + turn, tuple(command.split()), lambda output: [], limit=options.seconds * 10 + 120)


def figure(row: Row, output: str) -> float:
    """fio's terse format, version 3: KiB/s and IOPS of reads are fields 7 and 8, of writes 48 and 49."""
    line = next((line for line in output.splitlines() if line.startswith("3;fio-")), "")
    fields = line.split(";")
    if len(fields) < 50 or fields[4] != "0":
        raise MachineFailed(f"{row.name}: fio said {output[-500:]!r}")
    first = 46 if "write" in row.name else 5
    return float(fields[first + 2]) if row.unit == "IOPS" else float(fields[first + 1]) / 1024


def guest_image(steps: list[Step], options: argparse.Namespace) -> bytes:
    """An initramfs of BusyBox, fio, the disk's drivers and the plan."""
    applets = ("sh", "mount", "poweroff", "sleep", "setsid", "cttyhack")
    entries = [initramfs.directory(name) for name in ("bin", "dev", "proc", "sys", "tmp", "lib", "lib64", "lib/modules")]
    entries += [initramfs.file("bin/busybox", pathlib.Path(options.busybox).read_bytes())]
    entries += [initramfs.link(f"bin/{name}", "busybox") for name in applets]
    entries += [initramfs.file("init", (HERE / "guest-init").read_bytes())]
    entries += [initramfs.file("plan-init", (HERE.parent / "compare/guest-init").read_bytes())]
    entries += [initramfs.file("plan", "".join(f"{step.name} {step.shell('')}\n" for step in steps).encode(), 0o644)]
    entries += [initramfs.file(f"lib/modules/{m.name}", m.read_bytes()) for m in (GUESTS / "cloud/modules").iterdir()]
    entries += initramfs.tree(GUESTS / "fio/root")
    return initramfs.pack(entries)


@contextlib.contextmanager
def kept_in_page_cache(image: pathlib.Path) -> typing.Iterator[None]:
    """Some hosts give pages back that nobody has used for seconds: then the host's disk would be measured."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with image.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        if libc.mlock(ctypes.addressof(start), len(mapping)) != 0:
            print(f"the image is not locked in memory: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        try:
            yield
        finally:
            libc.munlock(ctypes.addressof(start), len(mapping))
            del start


def read_afresh(image: pathlib.Path) -> None:
    """Everybody finds the file in the page cache as reading it in order leaves it: whether it lies there in large pieces or
    in single pages makes copies up to three times faster, and small writes up to seven times slower."""
    with image.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    subprocess.run(["cat", image], check=True, stdout=subprocess.DEVNULL)


def measure(options: argparse.Namespace, rows: list[Row], side: str, form: str, image: pathlib.Path) -> dict[str, float]:
    """One boot, all rows."""
    read_afresh(image)
    with contextlib.ExitStack() as stack:
        # Past the cache, a mapping would only be in the way.
        if "direct=on" not in QEMU_WAYS.get(side, ""):
            stack.enter_context(kept_in_page_cache(image))
        outcomes = boot_and_run(machine(options, side, form, image), [fio_step(row, options) for row in rows], options)
    return {row.name: figure(row, outcome.output) for row, outcome in zip(rows, outcomes, strict=True)}


def measure_together(options: argparse.Namespace, rows: list[Row],
                     images: dict[str, pathlib.Path]) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """One boot of Lodge with a disk of each format, and each row in turn on the one and on the other: what the host does
    meanwhile is the same for both. Who begins changes with each turn."""
    disks = {form: f"vd{letter}" for form, letter in zip(images, "ab", strict=False)}
    turns = [(row, form, number) for number in range(options.rounds) for row in rows
             for form in (images if number % 2 == 0 else reversed(images))]  # fmt: skip
    steps = [fio_step(row, options, disks[form], f".{form}.{number}") for row, form, number in turns]
    with contextlib.ExitStack() as stack:
        for image in images.values():
            read_afresh(image)
            stack.enter_context(kept_in_page_cache(image))
        outcomes = boot_and_run(lodge_arguments(options, *images.values()), steps, options)
    results: dict[str, dict[str, list[float]]] = {}
    for (row, form, _), outcome in zip(turns, outcomes, strict=True):
        results.setdefault(f"lodge {form}", {}).setdefault(row.name, []).append(figure(row, outcome.output))
    return results


def boot_and_run(command: list[str], steps: list[Step], options: argparse.Namespace) -> list[Outcome]:
    with tempfile.NamedTemporaryFile(prefix="fio-", suffix=".cpio") as initrd:
        initrd.write(guest_image(steps, options))
        initrd.flush()
        guest = ("--kernel", str(GUESTS / "cloud/vmlinuz"), "--initrd", initrd.name, "--append", APPEND)
        with Console([*command, *guest]) as console:
            return run_steps(console, steps)


def prepare(options: argparse.Namespace) -> dict[str, pathlib.Path]:
    """The same contents in each format: no zeros, all allocated."""
    directory = pathlib.Path(options.directory)
    directory.mkdir(parents=True, exist_ok=True)
    raw, qcow2 = directory / "disk.raw", directory / "disk.qcow2"
    with raw.open("wb") as file:
        for _ in range(options.size):
            file.write(os.urandom(1 << 20))
    qcow2.unlink(missing_ok=True)
    subprocess.run([options.lodge, "image", "convert", raw, qcow2], check=True)
    return {"raw": raw, "qcow2": qcow2}


def best(samples: list[float]) -> float:
    return statistics.median(samples)


def table(results: dict[str, dict[str, list[float]]], rows: list[Row], forms: list[str], together: bool) -> list[dict[str, object]]:
    """Medians, QEMU's better way, ratios; of turns in one guest, the median of their ratios."""
    lines = []
    for form in forms:
        for row in rows:
            line: dict[str, object] = {"row": row.name, "format": form, "unit": row.unit}
            lodge = results.get(f"lodge {form}", {}).get(row.name)
            ways = {way: best(results[f"{way} {form}"][row.name]) for way in QEMU_WAYS
                    if row.name in results.get(f"{way} {form}", {})}  # fmt: skip
            raw = results.get("lodge raw", {}).get(row.name)
            if lodge:
                line["lodge"] = best(lodge)
            if ways:
                line["qemu_way"], line["qemu"] = max(ways.items(), key=lambda way: way[1])
            if lodge and ways:
                line["against QEMU"] = best(lodge) / max(ways.values())
            if lodge and raw and form == "qcow2":
                pairs = [mine / theirs for mine, theirs in zip(lodge, raw, strict=False)]
                line["qcow2 against raw"] = best(pairs) if together else best(lodge) / best(raw)
            lines.append(line)
    return lines


def text(lines: list[dict[str, object]]) -> str:
    def cell(value: object) -> str:
        return f"{value:,.0f}" if isinstance(value, float) else "-"

    def ratio(line: dict[str, object], name: str) -> str:
        value = line.get(name)
        if not isinstance(value, float):
            return "-"
        return f"{value:.2f}" + ("" if value >= WANTED[name] else " <")

    out = [f"{'':24}{'Lodge':>10}{'QEMU':>10}  {'':6} {'of QEMU':>8} {'of raw':>8}  QEMU's way"]
    for line in lines:
        name = f"{line['format']} {line['row']}"
        out.append(f"{name:24}{cell(line.get('lodge')):>10}{cell(line.get('qemu')):>10}  {line['unit']:6} "
                   f"{ratio(line, 'against QEMU'):>8} {ratio(line, 'qcow2 against raw'):>8}  "
                   f"{line.get('qemu_way', '')}")  # fmt: skip
    return "\n".join(out) + "\n'<': less than wanted (1.5 of QEMU, qcow2 0.9 of raw)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/fio/run", description="fio in a guest on one disk image: Lodge's soft "
                                     "accelerator beside QEMU's TCG, in turn.",
                                     epilog="Example: bench/fio/run --rounds 1 --formats raw --sides lodge,qemu-threads")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each job (default 4)")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the disk (default 1024)")
    parser.add_argument("--cpus", type=int, default=1, help="of the guest (default 1)")
    parser.add_argument("--queues", type=int, default=1, help="of Lodge's disk (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="of fio at the same time, each as its row says (default 1)")
    parser.add_argument("--only", metavar="ROW[,ROW]", help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--formats", default="raw,qcow2")
    parser.add_argument("--sides", default=f"lodge,{','.join(QEMU_WAYS)}", metavar="SIDE[,SIDE]")
    parser.add_argument("--together", action="store_true", help="Lodge alone, one guest with a disk of each format, in turn: "
                        "how the formats compare, whatever the host does meanwhile")  # fmt: skip
    parser.add_argument("--directory", default=str(TOP / ".cache/fio"), help="where the images are made")
    parser.add_argument("--lodge", type=pathlib.Path, default=TOP / "build/lodge", metavar="PATH")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PATH")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    options.busybox = shutil.which("busybox") or parser.error("busybox is missing; run scripts/setup")
    for name, known in (("sides", ["lodge", *QEMU_WAYS]), ("formats", FORMATS), ("only", [r.name for r in ROWS])):
        chosen = getattr(options, name)
        setattr(options, name, chosen.split(",") if chosen else list(known))
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.together and options.formats != list(FORMATS):
        parser.error("--together compares both formats; leave --formats out")
    if min(options.rounds, options.seconds, options.cpus, options.queues, options.jobs) < 1 or options.size < 64:
        parser.error("--rounds, --seconds, --cpus, --queues and --jobs are at least 1, --size at least 64")
    return options


def main() -> int:
    options = parse_arguments()
    rows = [row for row in ROWS if row.name in options.only]
    images = prepare(options)
    results: dict[str, dict[str, list[float]]] = {}
    failures: list[str] = []
    if options.together:
        results = measure_together(options, rows, images)
    for number in range(0 if options.together else options.rounds):
        for form in options.formats:
            for side in options.sides:
                print(f"round {number + 1} of {options.rounds}: {side} {form}", file=sys.stderr)
                try:
                    measured = measure(options, rows, side, form, images[form])
                except MachineFailed as error:
                    failures.append(f"{side} {form}: {error}")
                    print(failures[-1], file=sys.stderr)
                    continue
                for name, value in measured.items():
                    results.setdefault(f"{side} {form}", {}).setdefault(name, []).append(value)
    lines = table(results, rows, options.formats, options.together)
    print(f"median of {options.rounds}; {options.cpus} guest CPU, {len(os.sched_getaffinity(0))} host CPUs, load "
          f"{os.getloadavg()[0]:.1f} after\n{text(lines)}")  # fmt: skip
    if options.json:
        about = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rounds": options.rounds,
                 "seconds": options.seconds, "size_mib": options.size, "cpus": options.cpus, "queues": options.queues,
                 "jobs": options.jobs}  # fmt: skip
        options.json.write_text(json.dumps({**about, "table": lines, "samples": results, "failures": failures}, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
