#!/bin/sh
# First process of the guest. The window directory (@WINDOW@ on the host) holds
# the job and takes its results; everything else of the host is read-only.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for d in /run /mnt /var/lib/nfs /tmp; do mount -t tmpfs tmpfs $d; done
chmod 1777 /tmp
[ -e /dev/shm ] || mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/lock /run/rpcbind /run/sendsigs.omit.d /mnt/out /mnt/nfs /var/lib/nfs/sm /var/lib/nfs/sm.bak
mount -t hostfs none /mnt/out -o @WINDOW@
exec >/mnt/out/guest.log 2>&1 </dev/null
OUT=/mnt/out MNT=/mnt/nfs WORK=/mnt/out/work SHARE=/mnt/share
export OUT MNT WORK SHARE
if [ -n "@SHARE@" ]; then
  mkdir $SHARE && mount -t hostfs none $SHARE -o @SHARE@ && mount -o remount,ro $SHARE || exit 1
fi
echo booted >$OUT/booted
notify=--no-notify
if [ -n "@STATE@" ]; then
  mount -t hostfs none /var/lib/nfs -o @STATE@ && mkdir -p /var/lib/nfs/sm /var/lib/nfs/sm.bak || exit 1
  notify=
fi
if [ -n "@HOST@" ]; then echo @HOST@ >/proc/sys/kernel/hostname; fi
chown -R _rpc /run/rpcbind; chown -R statd /var/lib/nfs
if [ -n "@ADDR6@" ]; then $WORK modprobe ipv6 || exit 1; fi
ip link set lo up
ip addr add @ADDR@ dev vec0
if [ -n "@ADDR6@" ]; then ip addr add @ADDR6@ dev vec0 nodad || exit 1; fi
ip link set vec0 up
$WORK modprobe nfs nfsv3 nfsv4 || exit 1
rpcbind && rpc.statd $notify
sh $OUT/job.sh
status=$?
sync
umount -a -t nfs,nfs4 -f -l 2>/dev/null
dmesg >$OUT/dmesg.log
echo $status >$OUT/status.tmp
mv $OUT/status.tmp $OUT/status
halt -f 2>/dev/null
