#!/bin/busybox sh
# First process of the guest: loads what reaching the host's files takes, puts a writable layer above them, moves in.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
share=trans=virtio,version=9p2000.L,msize=512000
mkdir -p /below /above /root
mount -t 9p -o "$share,cache=loose,ro" root /below || { echo "HOPGATE-GUEST-FAILED cannot mount the host's root"; poweroff -f; }
mount -t tmpfs -o size=80% tmpfs /above
mkdir -p /above/upper /above/work
mount -t overlay -o lowerdir=/below,upperdir=/above/upper,workdir=/above/work overlay /root
out=$(sed -n 's/.*hopgate_out=\([^ ]*\).*/\1/p' /proc/cmdline)
mkdir -p "/root$out" /root/proc /root/sys /root/dev
mount -t 9p -o "$share" out "/root$out"
for name in proc sys dev; do mount --move "/$name" "/root/$name"; done
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o ptmxmode=666,gid=5 devpts /root/dev/pts
for path in dev/shm run; do mount -t tmpfs tmpfs "/root/$path"; done
mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
exec switch_root /root /bin/sh "$out/guest.sh"
