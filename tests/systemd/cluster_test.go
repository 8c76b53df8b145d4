package systemd

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// floating is the floating address of the node in the container.
var floating = netip.MustParseAddr("192.0.2.60")

// clustered makes the node that of a cluster, which has a floating address.
func (b *box) clustered() {
	b.t.Helper()
	b.install("")
	b.sh("install -d -o baton -g baton /var/lib/baton/mgs")
	b.write("/etc/baton/baton.toml", fmt.Sprintf(`data_dir = "/var/lib/baton"
[cluster]
node = "n1"
tls = "off"
start = ["MGS", "MDT0000", "OST0000"]
[[cluster.nodes]]
name = "n1"
address = "127.0.0.1"
[mgs]
dir = "/var/lib/baton/mgs"
nodes = ["n1"]
[mdt]
dir = "/var/lib/baton/mdt"
nodes = ["n1"]
[[ost]]
dir = "/var/lib/baton/ost0"
nodes = ["n1"]
[nfs]
addresses = ["%s"]
floating = true
[rpcbind]
mode = "own"
[log]
level = "debug"
[[export]]
name = "/home"
path = "/"
clients = ["*"]
options = "rw,insecure,no_root_squash"`, addr))
	b.sh("systemctl start baton")
	b.sh(fmt.Sprintf("baton vip add %s/32 --interface lo", floating))
}

// served waits until the node serves the floating address.
func (b *box) served() {
	b.t.Helper()
	b.await("service of the floating address", func() (bool, string) {
		out, err := b.try("baton vip list")
		return err == nil && strings.Contains(out, "serving"), out
	})
}

// "systemctl restart" of a node of a cluster keeps the connections of its fixed address.
// Those of its floating one, which nobody else takes, end in order; the address comes
// back.
func TestRestartInCluster(t *testing.T) {
	b := newBox(t)
	b.clustered()
	b.served()
	for range 2 {
		fixed := b.connect()
		moving := b.connectTo(floating)
		fixed.works()
		moving.works()
		pid := b.show("baton", "MainPID")
		b.sh("systemctl restart baton")
		if now := b.show("baton", "MainPID"); now == pid {
			t.Fatal("it was not restarted")
		}
		if err := moving.ends(); err != nil {
			t.Errorf("the floating address's connection does not end in order: %v", err)
		}
		fixed.works()
		b.served()
		b.connectTo(floating).works()
		if s := b.show("baton", "NFileDescriptorStore"); s != "0" {
			t.Errorf("%s descriptors are still kept", s)
		}
	}
	b.sh("systemctl stop baton")
	if s := b.sh(fmt.Sprintf("ip address show to %s", floating)); s != "" {
		t.Errorf("a node that has stopped has the floating address: %s", s)
	}
}
