"""A virtual machine's process: its command line, its console, how its guest runs a plan."""

import dataclasses
import os
import pathlib
import selectors
import signal
import subprocess
import tempfile
import time

from . import initramfs
from .plan import Outcome, Shape, Step

BOOT_LIMIT = 300  # seconds until userland, and until the end after the last step


class MachineFailed(Exception):
    """It did not boot, stopped answering or ended wrongly."""


@dataclasses.dataclass(frozen=True)
class Vmm:
    """One way to run a guest."""

    name: str
    command: tuple[str, ...]  # without what depends on the guest
    cpus: str  # names of options
    memory: str
    kernel: str
    initrd: str
    append: str

    def arguments(self, shape: Shape, kernel: pathlib.Path, initrd: pathlib.Path, append: str) -> list[str]:
        return [*self.command, self.cpus, str(shape.cpus), self.memory, f"{shape.memory_mib}M",
                self.kernel, str(kernel), self.initrd, str(initrd), self.append, append]  # fmt: skip


def lodge(program: pathlib.Path, engine: str | None) -> Vmm:
    command = (str(program), "run", "--accel", "soft", "--no-reboot")
    if engine is not None:
        command += ("--engine", engine)
    return Vmm("lodge", command, "--cpus", "--memory", "--kernel", "--initrd", "--append")


def qemu(program: pathlib.Path) -> Vmm:
    # No devices that the guest does not use: nothing that Lodge's machine lacks slows its boot.
    command = (str(program), "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-nodefaults", "-vga", "none",
               "-display", "none", "-serial", "stdio", "-no-reboot")  # fmt: skip
    return Vmm("qemu", command, "-smp", "-m", "-kernel", "-initrd", "-append")


@dataclasses.dataclass(frozen=True)
class Line:
    text: str
    at: float  # seconds since the start of the process


class Console:
    """The process of a VM and the lines of its serial port, each with its time."""

    def __init__(self, arguments: list[str]):
        self._errors = tempfile.TemporaryFile()
        self._start = time.monotonic()
        # An input that never ends: at the end of it, a shell in the guest would end.
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, process_group=0
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._partial = b""
        self._lines: list[Line] = []
        self._seen: list[str] = []
        self._ended = False
        self.cpu_seconds = 0.0  # of the process, after finish() or end()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
        self._selector.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def _pump(self, limit: float) -> None:
        """Takes what the process writes within `limit` seconds."""
        if self._ended or not self._selector.select(max(limit, 0)):
            return
        assert self._process.stdout is not None
        data = self._process.stdout.read()
        if data is None:
            return
        if not data:
            self._ended = True
            return
        at = self.elapsed()
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            self._lines.append(Line(text, at))
            self._seen.append(text)

    def settle(self, seconds: float) -> None:
        """Lets the machine run and keeps its output."""
        end = time.monotonic() + seconds
        while not self._ended and time.monotonic() < end:
            self._pump(end - time.monotonic())

    def line(self, limit: float) -> Line:
        end = time.monotonic() + limit
        while not self._lines:
            if self._ended:
                raise MachineFailed(self._report("its output ended"))
            if time.monotonic() >= end:
                raise MachineFailed(self._report("no answer in time"))
            self._pump(end - time.monotonic())
        return self._lines.pop(0)

    def until(self, text: str, limit: float) -> Line:
        """The next line that starts with `text`; the ones before it are dropped."""
        end = time.monotonic() + limit
        while True:
            line = self.line(end - time.monotonic())
            if line.text.startswith(text):
                return line

    def prompt(self, text: str, limit: float) -> None:
        """Waits for a line that begins with `text` and has no end yet."""
        end = time.monotonic() + limit
        while not self._partial.startswith(text.encode()):
            if self._ended or time.monotonic() >= end:
                raise MachineFailed(self._report("no prompt"))
            self._pump(end - time.monotonic())

    def until_prompt(self, text: str, limit: float) -> list[Line]:
        """Waits for a line that begins with `text` and has no end yet; the lines before it."""
        self.prompt(text, limit)
        lines, self._lines = self._lines, []
        return lines

    def terminate(self) -> None:
        """SIGTERM; for `lodge run` that is the guest's power button."""
        self._process.terminate()

    def end(self) -> None:
        """Kills the process and takes what it has used."""
        self._process.kill()
        _, status, usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime

    def finish(self, limit: float) -> float:
        """The seconds from the start to the end by itself. Raises MachineFailed when that was not a success."""
        self.settle(limit)
        if not self._ended:
            raise MachineFailed(self._report("it does not end"))
        _, status, usage = os.wait4(self.pid, 0)
        elapsed = self.elapsed()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        if status != 0:
            raise MachineFailed(self._report("it ended wrongly"))
        return elapsed

    def _report(self, what: str) -> str:
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip()
        try:
            code = self._process.wait(1 if self._ended else 0)  # output may end just before the process
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            ended = ""
        elif code < 0:
            ended = f" (signal {signal.Signals(-code).name})"
        else:
            ended = f" (status {code})"
        tail = "\n".join([*self._seen[-8:], self._partial.decode(errors="replace")]).strip()
        return f"{what}{ended}" + "".join(f"\n    {line}" for line in (tail + "\n" + errors).strip().splitlines())


@dataclasses.dataclass(frozen=True)
class Guests:
    """What all machines of a run boot."""

    kernel: pathlib.Path
    busybox: pathlib.Path
    init: pathlib.Path

    def image(self, files: pathlib.Path, steps: list[Step]) -> bytes:
        """An initramfs with everything below `files` that runs `steps`."""
        applets = ("sh", "mount", "poweroff", "sleep", "setsid", "cttyhack")
        entries = [initramfs.directory(name) for name in ("bin", "dev", "proc", "tmp")]
        entries += [initramfs.file("bin/busybox", self.busybox.read_bytes())]
        entries += [initramfs.link(f"bin/{name}", "busybox") for name in applets]
        entries += [initramfs.file("init", self.init.read_bytes())]
        plan = "".join(f"{step.name} {step.shell('')}\n" for step in steps)
        entries += [initramfs.file("plan", plan.encode(), 0o644)]
        return initramfs.pack(entries + initramfs.tree(files))


APPEND = "console=ttyS0 quiet panic=-1"


def run_steps(console: Console, steps: list[Step]) -> list[Outcome]:
    """Follows a guest through its plan to the end of the machine."""
    console.until("compare: userland", BOOT_LIMIT)
    outcomes = []
    for step in steps:
        begin = console.until(f"compare: begin {step.name}", BOOT_LIMIT)
        end_mark = f"compare: end {step.name} "
        output: list[str] = []
        deadline = time.monotonic() + step.limit
        while not (line := console.line(deadline - time.monotonic())).text.startswith(end_mark):
            output.append(line.text)
        status = int(line.text.removeprefix(end_mark))
        outcomes.append(Outcome(step, "\n".join(output), status, line.at - begin.at))
    console.until("compare: done", BOOT_LIMIT)
    console.finish(BOOT_LIMIT)
    return outcomes
