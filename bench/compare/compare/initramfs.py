"""An initramfs (cpio, "newc" format) from a list of files."""

import dataclasses
import pathlib
import stat


@dataclasses.dataclass(frozen=True)
class Entry:
    path: str  # in the guest, without a leading slash
    mode: int  # type and permissions
    content: bytes = b""


def directory(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def link(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def file(path: str, content: bytes, mode: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFREG | mode, content)


def tree(root: pathlib.Path) -> list[Entry]:
    """Everything below `root`, under the same names."""
    entries = []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            entries.append(link(name, str(path.readlink())))
        elif path.is_dir():
            entries.append(directory(name))
        else:
            entries.append(file(name, path.read_bytes(), stat.S_IMODE(path.stat().st_mode)))
    return entries


def pack(entries: list[Entry]) -> bytes:
    """The archive; parent directories must come before what lies in them."""
    out = bytearray()

    def pad() -> None:
        out.extend(b"\0" * (-len(out) % 4))

    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = [number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, 0, 0, len(name), 0]
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        pad()
        out += entry.content
        pad()
    return bytes(out)
