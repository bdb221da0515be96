# Run by mmdebstrap as its customize hook, when all packages are installed; $1 is the new system. What is to be set up
# comes in LODGE_* variables; the disk is open as descriptor 9, with room for the partition table at its start.
set -eu
root=$1

echo "lodge: setting the system up"
echo "PARTUUID=$LODGE_PARTUUID / ext4 errors=remount-ro,discard 0 1" >"$root/etc/fstab"
echo "$LODGE_HOSTNAME" >"$root/etc/hostname"
cat >"$root/etc/hosts" <<END
127.0.0.1 localhost
127.0.1.1 $LODGE_HOSTNAME
::1 localhost ip6-localhost ip6-loopback
END
: >"$root/etc/machine-id" # each copy gets its own at its first boot

# Every network card by DHCP.
mkdir -p "$root/etc/systemd/network"
cat >"$root/etc/systemd/network/80-lodge.network" <<END
[Match]
Name=en* eth*
[Network]
DHCP=yes
END
chroot "$root" systemctl --quiet enable systemd-networkd systemd-resolved
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

# systemd starts a login on hvc0, and on ttyS0 where that is the kernel's console.
if [ -n "$LODGE_PASSWORD" ]; then
  echo "root:$LODGE_PASSWORD" | chroot "$root" chpasswd
else
  # Who has the console has the disk: root is logged in there without a question, and cannot log in elsewhere.
  mkdir -p "$root/etc/systemd/system/serial-getty@.service.d"
  cat >"$root/etc/systemd/system/serial-getty@.service.d/autologin.conf" <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty -o '-p -f -- \\u' --keep-baud --autologin root 115200,57600,38400,9600 - $TERM
END
fi
if [ -n "$LODGE_SSH_KEYS" ]; then
  mkdir -p -m 700 "$root/root/.ssh"
  printf '%s\n' "$LODGE_SSH_KEYS" >"$root/root/.ssh/authorized_keys"
  chmod 600 "$root/root/.ssh/authorized_keys"
fi
if [ -d "$root/etc/cloud/cloud.cfg.d" ]; then
  # Its settings come on a disk or not at all: it need not ask the network, nor set that up; and there are no locales.
  # (A text: as a truth value, bookworm's schema refuses it and the first boot warns of an invalid configuration.)
  printf 'datasource_list: [NoCloud, None]\nnetwork: {config: disabled}\nlocale: "false"\n' >"$root/etc/cloud/cloud.cfg.d/90_lodge.cfg"
fi

# What mmdebstrap would take away after this.
rm -f "$root/etc/apt/apt.conf.d/00mmdebstrap"
rm -rf "$root"/var/lib/apt/lists/* "$root"/tmp/* "$root/run/lock"/* "$root/var/lib/dbus/machine-id"
find "$root/var/cache/apt" "$root/var/log" -type f -delete

echo "lodge: making the file system"
# Not ended later by the guest's kernel: it would write all of it at the first boot.
make='mke2fs -q -F -t ext4 -m 1 -L root -E offset=$LODGE_OFFSET,lazy_itable_init=0,lazy_journal_init=0'
case $MMDEBSTRAP_MODE in
  root | unshare)
    # /proc, /sys and parts of /dev are mounted over the tree now: a view of it alone, in the place of its empty /mnt,
    # is without them.
    unshare --mount sh -euc "mount --bind \"\$1\" \"\$1/mnt\"; $make -d \"\$1/mnt\" /proc/self/fd/9 \"\${LODGE_KIB}k\"" sh "$root"
    ;;
  *) sh -euc "$make -d \"\$1\" /proc/self/fd/9 \"\${LODGE_KIB}k\"" sh "$root" ;;
esac
echo "lodge: done"
