"""Lodge beside QEMU's TCG and the bare machine: the same work on each, in turn."""
