//! Devices of guests: a network card on the bridge of each host, and a disk in a file of the host.
//! The drivers are modules of the hosts' kernel, which guests boot as well, so an initramfs with
//! them is made on the hosts.
//!
//! Xen's scripts for devices look for `/dev/stdin`, which nobody but udev makes.
//!
//! The bridge has the hosts' second NIC, so that a guest is reached at one address wherever it is.
//! A disk's content does not move with its guest: each host has a file of its own.

use anyhow::{Result, ensure};

use crate::lab::Lab;
use crate::network::address;

/// The initramfs on a host.
pub(crate) const INITRAMFS_PATH: &str = "/var/lib/rxl-lab/devices.cpio";
/// The disk on a host.
pub(crate) const DISK_PATH: &str = "/var/lib/rxl-lab/disk.img";
/// The NIC that the bridge has.
const NIC: u8 = 1;
/// What is added to the lab's network for a guest's address, beside which hosts have small numbers.
const GUEST_NUMBER: u8 = 100;

/// Prints the guest's script, and copies what it needs to `$d`.
const COLLECT: &str = r#"
for module in xen-netfront xen-blkfront; do
    modprobe --show-depends "$module" | while read -r what path; do
        [ "$what" = insmod ] || continue
        cp "$path" "$d/modules/"
        echo "/bin/busybox insmod /modules/${path##*/}"
    done
done
cat <<END
tries=0
until [ -e /sys/class/net/eth0 ] && [ -e /dev/xvda ]; do
    tries=\$((tries + 1))
    [ \$tries -lt 300 ]
    /bin/busybox usleep 100000
done
/bin/busybox ip link set lo up
/bin/busybox ip addr add $address/24 dev eth0
/bin/busybox ip link set eth0 up
END
"#;

/// Where a guest with devices answers.
#[must_use]
pub fn guest_address() -> String {
    address(NIC, GUEST_NUMBER)
}

impl Lab {
    /// Makes all hosts ready for guests with devices.
    ///
    /// # Errors
    /// Hosts have one NIC only, or something fails there.
    pub fn provide_devices(&self) -> Result<()> {
        ensure!(self.shape().nics > NIC, "the lab needs two NICs (--nics 2)");
        let initramfs = self.provide_initramfs()?;
        let guest = guest_address();
        self.on_all_hosts(|host| {
            let own = address(NIC, host.number());
            host.run(&format!(
                "set -e; d=$(mktemp -d); address={guest}; mkdir $d/bin $d/modules\n\
                 cp /bin/busybox $d/bin/\n\
                 collect() {{{COLLECT}}}\n\
                 collect > $d/devices\n\
                 (cd $d; find . | busybox cpio -o -H newc) > $d.cpio\n\
                 cat {initramfs} $d.cpio > {INITRAMFS_PATH}; rm -r $d $d.cpio\n\
                 truncate -s 64M {DISK_PATH}\n\
                 ln -sfn /proc/self/fd /dev/fd; ln -sf fd/0 /dev/stdin\n\
                 ip address flush dev eth{NIC}; ip link set eth{NIC} master xenbr0\n\
                 ip address replace {own}/24 dev xenbr0; ip link set xenbr0 up"
            ))
        })?;
        Ok(())
    }

    /// Gives all hosts their NIC back, for others that want to use it. Guests with devices are not
    /// reached any more.
    ///
    /// # Errors
    /// Something fails on a host.
    pub fn withdraw_devices(&self) -> Result<()> {
        self.on_all_hosts(|host| {
            let own = address(NIC, host.number());
            host.run(&format!(
                "set -e; ip address del {own}/24 dev xenbr0; ip link set eth{NIC} nomaster\n\
                 ip address replace {own}/24 dev eth{NIC}"
            ))
        })?;
        Ok(())
    }
}
