"""Group memory: what a VMM itself takes while its guest idles at a shell prompt."""

import dataclasses
import pathlib
import re
import tempfile

from . import guest
from .guest import Console
from .lab import Lab
from .plan import Round, Shape
from .results import Ratio, Requirement, Results
from .samples import Sample
from .units import MIB

PROMPT = "compare: idle#"
# Seconds for the guest's own late work after the prompt, and for Lodge's vCPUs to find out that they are idle (two
# windows of 10 s at most).
SETTLE = 25


@dataclasses.dataclass(frozen=True)
class Mapping:
    permissions: str
    file: str  # device and inode; "00:00 0" is anonymous
    size_kib: int
    resident_kib: int  # shared pages by their share, so that pages mapped twice count once


_HEAD = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (?P<permissions>\S+) [0-9a-f]+ (?P<file>\S+ \d+)", re.M)


def parse_smaps(text: str) -> list[Mapping]:
    """/proc/PID/smaps."""
    heads = list(_HEAD.finditer(text))
    mappings = []
    for head, end in zip(heads, [match.start() for match in heads[1:]] + [len(text)]):
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text[head.end() : end], re.M))
        mappings.append(Mapping(head["permissions"], head["file"], int(fields["Size"]), int(fields["Pss"])))
    return mappings


def split(mappings: list[Mapping], ram_kib: int) -> tuple[int, int]:
    """The resident KiB of everything and of the guest's RAM: data mappings of its size, and all of the same file."""
    whole = [m for m in mappings if m.size_kib >= ram_kib and m.permissions.startswith("rw-")]
    files = {m.file for m in whole} - {"00:00 0"}
    ram = [m for m in mappings if m in whole or m.file in files]
    return sum(m.resident_kib for m in mappings), sum(m.resident_kib for m in ram)


class Memory:
    name = "memory"
    sides = ("lodge", "qemu")
    workloads = {"resident": MIB, "of it the guest's": MIB, "beyond the guest's": MIB}
    mean = False
    better = "smaller"

    def prepare(self, lab: Lab) -> None:
        pass

    def measure(self, lab: Lab, side: str) -> Round:
        shape = Shape(memory_mib=512)
        with tempfile.TemporaryDirectory(prefix="compare-") as name:
            initrd = pathlib.Path(name, "initramfs")
            nothing = pathlib.Path(name, "nothing")
            nothing.mkdir()
            initrd.write_bytes(lab.guests.image(nothing, []))
            with Console(lab.vmms[side].arguments(shape, lab.guests.kernel, initrd, guest.APPEND)) as console:
                console.prompt(PROMPT, guest.BOOT_LIMIT)
                console.settle(SETTLE)
                smaps = pathlib.Path(f"/proc/{console.pid}/smaps").read_text()
        total, ram = split(parse_smaps(smaps), shape.memory_mib * 1024)
        if ram == 0:
            return Round(failures=["no mapping of its process looks like the guest's RAM"])
        parts = zip(self.workloads, (total, ram, total - ram))
        return Round([Sample(workload, 1, kib / 1024) for workload, kib in parts])

    def derived(self, results: Results) -> dict[str, dict[str, Ratio]]:
        return {}

    def requirements(self, results: Results) -> list[Requirement]:
        ratio = results.ratio("beyond the guest's", "lodge", "qemu")
        return [Requirement("beyond the guest's, times TCG's", ratio and ratio.min, "less than", 1)]
