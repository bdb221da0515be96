"""Kills virtual machines while their guests write, and looks for writes that were acknowledged and lost; see --help.

The guest (writer.cpp) writes numbered blocks and names on its console those that it has flushed. At a random moment the
VM is killed (end "host": SIGKILL) or the guest's kernel crashes (end "guest"). Then the image must be whole, and every
block must hold the record that was last acknowledged for it or a later one.
"""

import argparse
import dataclasses
import pathlib
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

from compare import initramfs

BLOCK = 4096
STREAMS, PLACES, STEP = 2, 4096, 5167  # writer.cpp
GROUP = 8  # records between two flushes, at most
MAGIC = 0x6C6F6467652D6475
SIZE = STREAMS * PLACES * BLOCK
BOOT_LIMIT = 600  # seconds, for a loaded machine
SKIPPED = 77

FORMATS = {
    "raw": ("--format", "raw"),
    "qcow2": (),
    "qcow2-4k": ("--cluster-size", "4K"),
    "qcow2-lazy": ("--lazy-refcounts",),
    "qcow2-subclusters": ("--subclusters",),
}
ENDS = ("host", "guest")


class Lost(Exception):
    """The image is not what it has to be."""


@dataclasses.dataclass
class Image:
    """A disk image, and what its blocks must hold."""

    path: pathlib.Path
    form: str
    next_number: int = 0
    # By stream and place: the record that was acknowledged last.
    expected: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    # Records that were under way at an end and never acknowledged: the block may hold them, or a part of them.
    under_way: dict[tuple[int, int], set[int]] = dataclasses.field(default_factory=dict)

    def note(self, first: int, acknowledged: dict[int, int]) -> None:
        """After an end: records `first` to `acknowledged[stream]` of each stream are safe."""
        for stream in range(STREAMS):
            last = acknowledged.get(stream, first - 1)
            for number in range(first, last + 1):
                self.expected[stream, number * STEP % PLACES] = number
                self.under_way.pop((stream, number * STEP % PLACES), None)
            # Acknowledgements may have been on their way to us, and the next group was being written.
            for number in range(last + 1, last + 1 + 64 * GROUP):
                self.under_way.setdefault((stream, number * STEP % PLACES), set()).add(number)
        self.next_number = max(acknowledged.values(), default=first) + 128 * GROUP


def record(stream: int, number: int) -> bytes:
    mask = (1 << 64) - 1
    state = ((number + 1) * 0x9E3779B97F4A7C15 ^ (stream + 1)) & mask
    words = [MAGIC, stream, number]
    while len(words) < BLOCK // 8:
        state ^= state << 13 & mask
        state ^= state >> 7
        state ^= state << 17 & mask
        words.append(state)
    return struct.pack(f"<{len(words)}Q", *words)


def check_block(image: Image, stream: int, place: int, data: bytes) -> None:
    expected = image.expected.get((stream, place))
    allowed = image.under_way.get((stream, place), set())
    magic, of_stream, number = struct.unpack_from("<3Q", data)
    if magic == MAGIC and of_stream == stream and (number == expected or number in allowed):
        if data == record(stream, number) or number in allowed:
            return
    if expected is None and (allowed or not any(data)):
        return
    found = f"record {number} of stream {of_stream}" if magic == MAGIC else "zeros" if not any(data) else "something else"
    raise Lost(f"stream {stream}, place {place}: record {expected} was acknowledged, the block holds {found}")


def check_image(options: argparse.Namespace, image: Image, work: pathlib.Path) -> str:
    """Raises Lost. Returns what is worth telling."""
    remark = ""
    flat = image.path
    if image.form != "raw":
        # Lazy reference counts are counted anew when the image is opened next; a check without that would complain.
        repair = ["--repair", "all"] if image.form == "qcow2-lazy" else []
        check = subprocess.run([options.lodge, "image", "check", *repair, image.path], capture_output=True, text=True)
        if check.returncode not in (0, 3):
            raise Lost(f"lodge image check: {check.stdout}{check.stderr}")
        remark = "leaks" if check.returncode == 3 else ""
        if shutil.which("qemu-img"):
            other = subprocess.run(["qemu-img", "check", image.path], capture_output=True, text=True)
            if other.returncode not in (0, 3):
                raise Lost(f"qemu-img check: {other.stdout}{other.stderr}")
        flat = work / "flat"
        flat.unlink(missing_ok=True)
        subprocess.run([options.lodge, "image", "convert", "--format", "raw", image.path, flat], check=True, capture_output=True)
    with flat.open("rb") as file:
        for stream in range(STREAMS):
            for place in range(PLACES):
                check_block(image, stream, place, file.read(BLOCK))
    return remark


def read_acks(process: subprocess.Popen[bytes], text: bytearray, until: float, pattern: bytes | None) -> bool:
    """Collects output until a time of the clock, its end, or (true) the pattern."""
    assert process.stdout is not None
    while (left := until - time.monotonic()) > 0:
        if pattern and re.search(pattern, text):
            return True
        if not select.select([process.stdout], [], [], left)[0]:
            continue
        piece = process.stdout.read1(65536)  # type: ignore[attr-defined]
        if not piece:
            return False
        text += piece
    return False


def run_guest(options: argparse.Namespace, image: Image, end: str, initrd: pathlib.Path, moment: float) -> dict[int, int]:
    """Boots, lets the guest write, ends it; the last acknowledged record of each stream."""
    guest = options.guest
    command = [options.lodge, "run", "--accel", "soft", "--no-reboot", "--cpus", "2", "--kernel", guest / "vmlinuz",
               "--initrd", guest / "initramfs", "--initrd", initrd, "--disk", f"{image.path},queues=2",
               "--append", "console=ttyS0 quiet panic=-1 lodge.mode=shell"]  # fmt: skip
    crash = [str(int(moment * 1000))] if end == "guest" else []
    line = " ".join(["/writer /dev/vda", str(STREAMS), str(PLACES), str(image.next_number), *crash])
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = bytearray()
    try:
        limit = time.monotonic() + BOOT_LIMIT
        if not read_acks(process, text, limit, rb"This is a shell in the guest"):
            raise Lost(f"the guest does not boot: {text[-500:]!r}")
        assert process.stdin is not None
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        if end == "host":
            if not read_acks(process, text, limit, rb"ack \d+ \d+\r?\n"):
                raise Lost(f"the guest does not write: {text[-500:]!r}")
            read_acks(process, text, time.monotonic() + moment, None)
            process.send_signal(signal.SIGKILL)
        read_acks(process, text, limit, None)  # to the end of its output
        status = process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    if end == "guest" and status not in (4, 6):
        raise Lost(f"the VM of a crashed guest ended with status {status}: {text[-500:]!r}")
    acks = re.findall(rb"ack (\d+) (\d+)\r?\n", bytes(text))
    return {int(stream): int(number) for stream, number in acks}


def writer_initrd(writer: pathlib.Path) -> bytes:
    return initramfs.pack([initramfs.file("writer", writer.read_bytes())])


def parse_arguments() -> argparse.Namespace:
    top = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(
        prog="tests/durability/run",
        description="Kills virtual machines while their guests write, and looks for lost writes.",
        epilog="Example: tests/durability/run --rounds 100 --formats qcow2 --ends host",
    )
    parser.add_argument("--rounds", type=int, default=10, help="of each end; the formats take turns (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--ends", default=",".join(ENDS), help="host: kill -9 of the VM; guest: its kernel crashes")
    parser.add_argument("--lodge", type=pathlib.Path, default=top / "build/lodge")
    parser.add_argument("--writer", type=pathlib.Path, default=top / "build/tests/durability/durability_writer")
    parser.add_argument("--guest", type=pathlib.Path, default=top / ".cache/guests/cloud")
    options = parser.parse_args()
    options.formats, options.ends = options.formats.split(","), options.ends.split(",")
    if unknown := (set(options.formats) - set(FORMATS)) | (set(options.ends) - set(ENDS)):
        parser.error(f"unknown {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options = parse_arguments()
    if not (options.guest / "vmlinuz").exists():
        print("guest 'cloud' is not there: run scripts/fetch-guests")
        return SKIPPED
    moments = random.Random(options.seed)
    lost = done = records = leaks = 0
    with tempfile.TemporaryDirectory(prefix="lodge-durability-", dir="/var/tmp") as name:
        work = pathlib.Path(name)
        initrd = work / "writer.cpio"
        initrd.write_bytes(writer_initrd(options.writer))
        images: dict[str, Image] = {}
        for number in range(options.rounds * len(options.ends)):
            end = options.ends[number % len(options.ends)]
            form = options.formats[number // len(options.ends) % len(options.formats)]
            # An image lives for several rounds: what was safe before a crash is so after the next.
            if form not in images or images[form].next_number > 3 * PLACES:
                path = work / form
                path.unlink(missing_ok=True)
                subprocess.run([options.lodge, "image", "create", *FORMATS[form], path, str(SIZE)], check=True, capture_output=True)
                images[form] = Image(path, form)
            image = images[form]
            try:
                first = image.next_number
                acknowledged = run_guest(options, image, end, initrd, moments.uniform(0.02, 1.5))
                image.note(first, acknowledged)
                remark = check_image(options, image, work)
                leaks += remark == "leaks"
                safe = sum(last + 1 - first for last in acknowledged.values())
                records += safe
                done += 1
                print(f"round {number + 1}: {form}, {end}: {safe} records safe {remark}", flush=True)
            except Lost as error:
                lost += 1
                print(f"round {number + 1}: {form}, {end}: LOST: {error}", flush=True)
                kept = pathlib.Path(tempfile.mkdtemp(prefix="lodge-lost-", dir="/var/tmp"))
                shutil.copy(image.path, kept)
                print(f"the image is kept in {kept}")
                del images[form]
    print(f"{done} rounds without loss, {records} acknowledged records, {leaks} images with leaked clusters; {lost} rounds lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
