# Run by mmdebstrap as its essential hook, before the kernel is installed; $1 is the new system.
set -eu
# The initial RAM disk gets the drivers of virtual machines' disks and no others: it is a tenth of the size, and
# unpacking it is a good part of a boot.
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo 'MODULES=list' >"$1/etc/initramfs-tools/conf.d/lodge"
printf '%s\n' virtio_pci virtio_mmio virtio_blk virtio_scsi sd_mod nvme virtio_console ext4 crc32c_intel \
  >"$1/usr/share/initramfs-tools/modules.d/lodge"
