"""Group tools: what people run, from Debian packages. The tools say themselves how fast they were."""

import pathlib
import re
import tempfile

from .lab import Lab, Unavailable
from .plan import ROOT, Round, Shape, Step
from .results import SIDES, Ratio, Requirement, Results
from .samples import BadOutput, Sample
from .units import rate

# By the dynamic linker and with the libraries of the same packages, so that all sides run the same code.
LINKER = (f"{ROOT}/lib/ld-linux-x86-64.so.2", "--library-path", f"{ROOT}/lib")


def command(tool: str, *arguments: str) -> tuple[str, ...]:
    return (*LINKER, f"{ROOT}/tools/{tool}", *arguments)


def _find(pattern: str, output: str) -> re.Match[str]:
    found = list(re.finditer(pattern, output, re.M))
    if not found:
        raise BadOutput(f"no {pattern!r} in {output[-300:]!r}")
    return found[-1]  # some print progress before the result


def parse_openssl(name: str, output: str) -> list[Sample]:
    """`speed -mr`: the blocks of 8 KiB, and seconds."""
    match = _find(r"^\+R:(\d+):[^:]+:([\d.]+)\s*$", output)
    return [Sample(name, int(match[1]) * 8192, float(match[2]))]


def parse_zstd(output: str) -> list[Sample]:
    match = _find(r"([\d.]+) MB/s, +([\d.]+) MB/s", output)
    return [Sample("zstd compress", float(match[1]) * 1e6, 1), Sample("zstd decompress", float(match[2]) * 1e6, 1)]


def parse_7z(output: str) -> list[Sample]:
    """KiB each second."""
    match = _find(r"^Avr: +(\d+) .*\| +(\d+) ", output)
    return [Sample("7z compress", int(match[1]) * 1024, 1), Sample("7z decompress", int(match[2]) * 1024, 1)]


def parse_sysbench(name: str, unit: int, output: str) -> list[Sample]:
    """Events of `unit` each."""
    events = _find(r"total number of events: +(\d+)", output)
    seconds = _find(r"total time: +([\d.]+)s", output)
    return [Sample(name, int(events[1]) * unit, float(seconds[1]))]


def _openssl(name: str, algorithm: str) -> Step:
    arguments = ("speed", "-elapsed", "-mr", "-seconds", "1", "-bytes", "8192", "-evp", algorithm)
    parse = lambda output: parse_openssl(name, output)
    return Step(name.replace(" ", "-"), command("openssl", *arguments), parse, own_clock=False)


def _sysbench(name: str, test: str, unit: int) -> Step:
    parse = lambda output: parse_sysbench(name, unit, output)
    return Step(name.replace(" ", "-"), command("sysbench", test, "--time=2", "run"), parse, own_clock=False)


STEPS = [
    _openssl("openssl sha256", "sha256"),
    _openssl("openssl aes-256-gcm", "aes-256-gcm"),
    Step("zstd", command("zstd", "-b3", "-i1"), parse_zstd, own_clock=False),
    Step("7z", command("7zr", "b", "1", "-mmt1", "-md18"), parse_7z, own_clock=False),
    _sysbench("sysbench cpu", "cpu", 1),
    _sysbench("sysbench memory", "memory", 1024),
]


def unpack(tools: pathlib.Path, names: list[str], root: pathlib.Path) -> None:
    """Links `names` and the libraries into a guest's root. Raises Unavailable."""
    for directory in ("lib", "tools", "tmp"):
        (root / directory).mkdir()
    for name in names:
        if not (tools / "bin" / name).exists():
            raise Unavailable(f"{tools / 'bin' / name} is missing; run scripts/fetch-guests tools")
        (root / "tools" / name).write_bytes((tools / "bin" / name).read_bytes())
        (root / "tools" / name).chmod(0o755)
    wanted = {line for name in names for line in (tools / "needs" / name).read_text().split()}
    for name in wanted:
        (root / "lib" / name).write_bytes((tools / "lib" / name).read_bytes())
        (root / "lib" / name).chmod(0o755)


class Tools:
    name = "tools"
    sides = SIDES
    workloads = {
        "openssl sha256": rate("MB/s", 1e-6),
        "openssl aes-256-gcm": rate("MB/s", 1e-6),
        "zstd compress": rate("MB/s", 1e-6),
        "zstd decompress": rate("MB/s", 1e-6),
        "7z compress": rate("MB/s", 1e-6),
        "7z decompress": rate("MB/s", 1e-6),
        "sysbench cpu": rate("/s"),
        "sysbench memory": rate("MB/s", 1e-6),
    }
    mean = False
    better = "faster"

    def __init__(self, tools: pathlib.Path):
        self._tools = tools
        self._root: tempfile.TemporaryDirectory[str] | None = None

    def prepare(self, lab: Lab) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="compare-")
        unpack(self._tools, ["openssl", "zstd", "7zr", "sysbench"], pathlib.Path(self._root.name))

    def measure(self, lab: Lab, side: str) -> Round:
        assert self._root is not None
        return lab.run(side, Shape(memory_mib=1024), pathlib.Path(self._root.name), STEPS)

    def derived(self, results: Results) -> dict[str, dict[str, Ratio]]:
        return {}

    def requirements(self, results: Results) -> list[Requirement]:
        speeds = results.ratios(self.workloads, "qemu", "lodge")
        worst = min(speed.min for speed in speeds) if speeds else None
        return [Requirement("worst, times faster than TCG", worst, "more than", 1)]
