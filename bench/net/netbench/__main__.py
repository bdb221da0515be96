"""The command; see --help. Runs in a network namespace of its own, as the user "root" of it."""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from compare import guest, initramfs
from compare.guest import Console, MachineFailed
from compare.plan import Shape, Step
from compare.report import align
from compare.samples import BadOutput, Sample

TOP = pathlib.Path(__file__).resolve().parents[3]
GUESTS = TOP / ".cache/guests"
PORT = 5201
SIDES = ("lodge", "qemu")
TITLES = {"lodge": "Lodge", "qemu": "QEMU TCG"}
APPLETS = ("sh", "mount", "insmod", "ip", "ping", "cat", "sleep", "poweroff")


@dataclasses.dataclass(frozen=True)
class Network:
    """One way to connect a guest."""

    name: str
    address: str  # of the guest
    host: str  # the host as the guest sees it
    lodge: str  # the value of --net
    qemu: str  # the value of -netdev, without its identifier


NETWORKS = (
    Network("user", "10.0.2.15", "10.0.2.2", "user", "user"),
    Network("tap", "10.77.0.2", "10.77.0.1", "tap,ifname={tap}", "tap,ifname={tap},script=no,downscript=no,vhost=off"),
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one step measures."""

    name: str
    unit: str
    command: str  # in the guest
    parse: object
    more_is_better: bool
    goal: float  # Lodge's advantage over QEMU, at least


def parse_iperf(name: str):
    def parse(output: str) -> list[Sample]:
        found = re.search(r"0\.00-([\d.]+) +sec .* ([\d.]+) Kbits/sec +receiver", output)
        if not found:
            raise BadOutput(f"{name}: no result in {output[-300:]!r}")
        seconds = float(found[1])
        return [Sample(name, float(found[2]) * 1000 * seconds, seconds)]

    return parse


def parse_ping(name: str):
    def parse(output: str) -> list[Sample]:
        found = re.search(r"(\d+) packets transmitted, (\d+) packets received.*= [\d.]+/([\d.]+)/", output, re.S)
        # A late answer lets `ping -A` send another request, so that more are sent than come back.
        if not found or int(found[2]) < 0.9 * int(found[1]):
            raise BadOutput(f"{name}: packets are missing in {output[-300:]!r}")
        return [Sample(name, 1, float(found[3]) / 1000)]

    return parse


def figures(seconds: int) -> list[Figure]:
    iperf = f"iperf3 -c $HOST -p {PORT} -f k -t {seconds}"
    return [
        Figure("guest to host", "Gbit/s", iperf, parse_iperf("guest to host"), True, 1.5),
        Figure("host to guest", "Gbit/s", f"{iperf} -R", parse_iperf("host to guest"), True, 1.5),
        Figure("4 streams to host", "Gbit/s", f"{iperf} -P 4", parse_sum("4 streams to host"), True, 1.5),
        Figure("ping, back to back", "us", "ping -A -q -c 1000 $HOST", parse_ping("ping, back to back"), False, 1.0),
        Figure("ping, idle guest", "us", "ping -i 0.1 -q -c 20 $HOST", parse_ping("ping, idle guest"), False, 1.0),
    ]  # fmt: skip


def parse_sum(name: str):
    inner = parse_iperf(name)

    def parse(output: str) -> list[Sample]:
        return inner("\n".join(line for line in output.splitlines() if "[SUM]" in line))

    return parse


def image(steps: list[Figure]) -> bytes:
    """The guest's initramfs."""
    programs, modules = GUESTS / "iperf", GUESTS / "cloud/modules"
    busybox = shutil.which("busybox") or sys.exit("bench/net: busybox is missing; run scripts/setup")
    entries = [initramfs.directory(name) for name in
               ("bin", "dev", "proc", "sys", "tmp", "modules", "lib64", "lib", "lib/x86_64-linux-gnu")]  # fmt: skip
    entries += [initramfs.file("bin/busybox", pathlib.Path(busybox).read_bytes())]
    entries += [initramfs.link(f"bin/{name}", "busybox") for name in APPLETS]
    entries += [initramfs.file(f"modules/{path.name}", path.read_bytes()) for path in sorted(modules.glob("*.ko"))]
    entries += [initramfs.file(f"lib/x86_64-linux-gnu/{path.name}", path.read_bytes())
                for path in sorted((programs / "lib").iterdir())]  # fmt: skip
    entries += [initramfs.link("lib64/ld-linux-x86-64.so.2", "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")]
    entries += [initramfs.file("bin/iperf3", (programs / "bin/iperf3").read_bytes())]
    entries += [initramfs.file("init", (TOP / "bench/net/guest-init").read_bytes())]
    plan = "".join(f"{number} {step.command}\n" for number, step in enumerate(steps))
    entries += [initramfs.file("plan", plan.encode(), 0o644)]
    return initramfs.pack(entries)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Server:
    """iperf3 on the host: the same program as in the guest."""

    def __enter__(self) -> None:
        programs = GUESTS / "iperf"
        self._process = subprocess.Popen(
            [programs / "lib/ld-linux-x86-64.so.2", "--library-path", programs / "lib", programs / "bin/iperf3",
             "-s", "-p", str(PORT)],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@dataclasses.dataclass
class Bench:
    vmms: dict[str, guest.Vmm]
    initrd: pathlib.Path
    steps: list[Figure]
    cpus: int
    lodge_options: list[str]

    def run(self, side: str, network: Network) -> dict[str, float]:
        """One boot; each figure in its unit."""
        tap = f"tap-{side}"
        if network.name == "tap":
            ip("tuntap", "add", tap, "mode", "tap", "vnet_hdr")
            ip("addr", "add", f"{network.host}/24", "dev", tap)
            ip("link", "set", tap, "up")
        try:
            append = f"console=ttyS0 quiet panic=-1 net.address={network.address} net.host={network.host}"
            arguments = self.vmms[side].arguments(Shape(cpus=self.cpus), GUESTS / "cloud/vmlinuz", self.initrd, append)
            if side == "lodge":
                arguments += ["--net", network.lodge.format(tap=tap), *self.lodge_options]
            else:
                arguments += ["-netdev", network.qemu.format(tap=tap) + ",id=n", "-device", "virtio-net-pci,netdev=n"]
            steps = [Step(str(number), (), step.parse, False, 120) for number, step in enumerate(self.steps)]
            with Console(arguments) as console:
                outcomes = guest.run_steps(console, steps)
        finally:
            if network.name == "tap":
                ip("link", "del", tap)
        measured = {}
        for figure, outcome in zip(self.steps, outcomes):
            sample = figure.parse(outcome.output)[0]
            value = sample.work / sample.seconds / 1e9 if figure.more_is_better else sample.seconds * 1e6
            measured[figure.name] = value
        return measured


def advantage(figure: Figure, lodge: float, qemu: float) -> float:
    return lodge / qemu if figure.more_is_better else qemu / lodge


def table(network: Network, steps: list[Figure], samples: dict[str, list[dict[str, float]]]) -> str:
    rows = [[network.name, "", *(TITLES[side] for side in SIDES), "better than TCG", "goal"]]
    for figure in steps:
        values = {side: [sample[figure.name] for sample in samples[side]] for side in SIDES}
        if not all(values.values()):
            continue
        middle = {side: statistics.median(values[side]) for side in SIDES}
        ratio = advantage(figure, middle["lodge"], middle["qemu"])
        cells = [f"{middle[side]:.2f} ({min(values[side]):.2f} to {max(values[side]):.2f})" for side in SIDES]
        met = "met" if ratio >= figure.goal else "NOT MET"
        rows.append([figure.name, figure.unit, *cells, f"{ratio:.2f}x", f"{figure.goal:g}x: {met}"])
    return align(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/net/run", description="A guest's network on Lodge's soft accelerator beside QEMU's TCG, in turn.",
        epilog="Example: bench/net/run --only user --seconds 2",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default %(default)s)")
    parser.add_argument("--only", default="user,tap", metavar="NETWORK[,NETWORK]", help="of user, tap")
    parser.add_argument("--seconds", type=int, default=4, help="of each iperf3 run (default %(default)s)")
    parser.add_argument("--cpus", type=int, default=1, help="of the guest (default %(default)s)")
    parser.add_argument("--lodge", type=pathlib.Path, default=TOP / "build/lodge", metavar="PATH")
    parser.add_argument("--lodge-option", action="append", default=[], metavar="WORD", help="passed on to `lodge run`")
    parser.add_argument("--user", default="user", metavar="NET", help="Lodge's --net for user (default %(default)s)")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PATH")
    parser.add_argument("--sides", default=",".join(SIDES), help="which to run (default both)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    steps = figures(options.seconds)
    vmms = {"lodge": guest.lodge(options.lodge, None), "qemu": guest.qemu(options.qemu)}
    about = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "host_cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "rounds": options.rounds,
        "cpus": options.cpus,
    }
    print(f"median (least to most) of {options.rounds}; {about['host_cpus']} CPUs, load {about['load']:.1f} before; "
          f"guest with {options.cpus} CPU(s)")  # fmt: skip
    measured, good = {}, True
    ip("link", "set", "lo", "up")
    with tempfile.NamedTemporaryFile(prefix="bench-net-", suffix=".cpio") as file, Server():
        file.write(image(steps))
        file.flush()
        bench = Bench(vmms, pathlib.Path(file.name), steps, options.cpus, options.lodge_option)
        for network in NETWORKS:
            if network.name not in options.only.split(","):
                continue
            if network.name == "user":
                network = dataclasses.replace(network, lodge=options.user)
            samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for number in range(options.rounds):
                for side in options.sides.split(","):
                    print(f"{network.name}: round {number + 1} of {options.rounds}: {side}", file=sys.stderr)
                    try:
                        samples[side].append(bench.run(side, network))
                        print(f"  {samples[side][-1]}", file=sys.stderr)
                    except (MachineFailed, BadOutput) as error:
                        good = False
                        print(f"{network.name}: {side} FAILED: {error}", file=sys.stderr)
            print(f"\n{table(network, steps, samples)}", flush=True)
            measured[network.name] = samples
            if options.json:
                options.json.write_text(json.dumps({**about, "networks": measured}, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
