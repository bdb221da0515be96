"""All groups, with the amounts of work and what each must reach."""

import pathlib

from .boot import Boot
from .groups import Group, Programs
from .memory import Memory
from .smp import Smp
from .tools import Tools

# Iterations: 0.1 to 0.3 s natively, and at most 10 s in TCG, which takes 100 times as long for vectors.
INTEGER = {"sort": 60, "hash": 1000, "loads": 1000, "bytecode": 200, "recursion": 3000, "compression": 150}
FLOAT = {"matrix-sse2": 300, "matrix-avx2": 400, "fft": 800}
X87 = {"mandelbrot": 50, "polynomial": 200}
SYSTEM = {"getppid": 1_000_000, "pipe": 20_000, "fork-exit": 1000, "fork-exec": 300, "page-faults": 200,
          "context-switch": 50_000}  # fmt: skip


def all_groups(boot_initramfs: pathlib.Path, tools: pathlib.Path) -> list[Group]:
    return [
        Programs("integer", INTEGER, faster=1.6, slower=3),
        Programs("float", FLOAT, faster=30, slower=3),
        Programs("x87", X87, faster=10, slower=3),
        Tools(tools),
        Programs("system", SYSTEM, faster=1.3, slower=None, none_slower=True),
        Boot(boot_initramfs),
        Smp(tools),
        Memory(),
    ]
