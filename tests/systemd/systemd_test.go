package systemd

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// files lists what is in the container, but for what every system writes by itself.
func (b *box) files() map[string]bool {
	b.t.Helper()
	m := map[string]bool{}
	for p := range strings.Lines(b.sh(`find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /dev -o -path /var/log -o -path /var/tmp -o -path /var/lib/dpkg -o -path /var/lib/systemd/catalog -o -path /var/cache -o -path /var/lib/baton \) -prune -o -print`)) {
		m[strings.TrimSpace(p)] = true
	}
	return m
}

// active waits for a unit's state.
func (b *box) active(unit, state string) {
	b.t.Helper()
	b.await(unit+" "+state, func() (bool, string) {
		s := b.show(unit, "ActiveState")
		return s == state, s
	})
}

// The life of a node under its units: each step goes on from the one before.
func TestUnits(t *testing.T) {
	b := newBox(t)
	before := b.files()
	b.install("")
	step := func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, func(t *testing.T) {
			outer := b.t
			b.t = t
			defer func() { b.t = outer }()
			f(t)
		}) {
			t.FailNow()
		}
	}

	step("start", func(t *testing.T) {
		if s := b.show("baton", "ActiveState"); s != "inactive" {
			t.Errorf("installing has started it: %s", s)
		}
		if s := b.show("baton", "UnitFileState"); s != "enabled" {
			t.Errorf("unit is %s", s)
		}
		b.sh("systemctl start baton")
		b.connect().works()
		pid := b.show("baton", "MainPID")
		if s := b.sh("stat -c %U /proc/" + pid); s != "baton" {
			t.Errorf("runs as %s", s)
		}
		// CAP_NET_BIND_SERVICE 10, CAP_NET_ADMIN 12, CAP_NET_RAW 13
		if s := b.sh("grep -E '^Cap(Bnd|Amb)' /proc/" + pid + "/status | cut -f2 | sort -u"); s != "0000000000003400" {
			t.Errorf("capabilities %s", s)
		}
		if s := b.sh("stat -c '%U %a' /var/lib/baton"); s != "baton 700" {
			t.Errorf("data directory: %s", s)
		}
		if s := b.sh("sysctl -n net.ipv4.conf.all.arp_announce net.ipv4.conf.all.promote_secondaries"); s != "2\n1" {
			t.Errorf("kernel settings: %q", s)
		}
		if s := b.sh("baton version"); !strings.HasPrefix(s, "baton ") {
			t.Errorf("version: %s", s)
		}
		if s := b.sh("systemd-analyze verify /lib/systemd/system/baton.service /lib/systemd/system/baton.socket 2>&1 | grep -v 'man ' | grep -i baton || :"); s != "" {
			t.Errorf("units: %s", s)
		}
	})

	step("reload", func(t *testing.T) {
		b.write("/etc/baton/exports", "/more *(ro,insecure,dir=/)")
		b.sh("systemctl reload baton")
		if s := b.sh("baton exportfs"); !strings.Contains(s, "/more") {
			t.Errorf("exports: %s", s)
		}
		b.write("/etc/baton/exports", "/wrong *(nonsense)")
		if out, err := b.try("systemctl reload baton"); err == nil {
			t.Errorf("a refused file is no error: %s", out)
		}
		if s := b.sh("baton exportfs"); !strings.Contains(s, "/more") {
			t.Errorf("exports after a refused reload: %s", s)
		}
		if s := b.sh("journalctl -u baton --no-pager"); !strings.Contains(s, "nonsense") {
			t.Error("the reason is not in the journal")
		}
		b.write("/etc/baton/exports", "# nothing")
		b.sh("systemctl reload baton")
	})

	step("upgrade", func(t *testing.T) {
		pid := b.show("baton", "MainPID")
		c := b.connect()
		out := b.sh("dpkg -i /root/baton.deb")
		if now := b.show("baton", "MainPID"); now != pid {
			t.Errorf("process %s became %s", pid, now)
		}
		if !strings.Contains(out, "still running") {
			t.Errorf("nobody is told that the old version runs: %s", out)
		}
		c.works()
	})

	step("restart", b.restart)

	// systemd must not remove what a process leaves in /dev/shm for the next one.
	step("shared memory", func(t *testing.T) {
		b.sh("install -o baton -g baton /dev/null /dev/shm/baton-lost-test && systemctl restart baton && systemctl stop baton && systemctl start baton")
		if out, err := b.try("rm /dev/shm/baton-lost-test"); err != nil {
			t.Errorf("the service's file in /dev/shm is gone after a restart: %s", out)
		}
	})

	step("watchdog", func(t *testing.T) {
		b.write("/etc/systemd/system/baton.service.d/test.conf", "[Service]\nWatchdogSec=2\nTimeoutAbortSec=2")
		b.sh("systemctl daemon-reload")
		b.sh("systemctl restart baton")
		pid := b.show("baton", "MainPID")
		b.sh("kill -STOP " + pid)
		b.await("restart by the watchdog", func() (bool, string) {
			now := b.show("baton", "MainPID")
			return now != pid && now != "0" && b.show("baton", "ActiveState") == "active", now
		})
		if s := b.sh("journalctl -u baton -b --no-pager"); !strings.Contains(s, "Watchdog timeout") {
			t.Error("it was not the watchdog")
		}
		b.connect().works()
		b.sh("rm /etc/systemd/system/baton.service.d/test.conf; systemctl daemon-reload; systemctl restart baton")
	})

	step("stop", func(t *testing.T) {
		c := b.connect()
		c.works()
		c.send(progNFS, procCreate, c.createArgs("last"))
		time.Sleep(300 * time.Millisecond) // the service has to read it before it is told to stop
		b.sh("systemctl stop --no-block baton")
		if res, err := c.receive(c.xid); err != nil || status(res) != statusOK {
			t.Errorf("a call that was sent before the stop: %v, % x", err, res)
		}
		if err := c.ends(); err != nil {
			t.Errorf("the connection does not end in order: %v", err)
		}
		b.active("baton", "inactive")
		if s := b.show("baton", "Result"); s != "success" {
			t.Errorf("the service's result is %s", s)
		}
		if _, err := b.dial(nfsPort); !refused(err) {
			t.Errorf("something listens: %v", err)
		}
		if s := b.show("baton", "NFileDescriptorStore"); s != "0" {
			t.Errorf("%s descriptors are kept", s)
		}
	})

	step("socket", func(t *testing.T) {
		list := "[Socket]\nListenStream=\nListenDatagram=\n"
		for _, p := range []string{"2049", "20048", "4045", "4046"} {
			list += "ListenStream=" + addr.String() + ":" + p + "\n"
			if p != "2049" {
				list += "ListenDatagram=" + addr.String() + ":" + p + "\n"
			}
		}
		// One that the machine does not have.
		list += "ListenStream=192.0.2.99:2049\n"
		b.write("/etc/systemd/system/baton.socket.d/test.conf", list)
		b.sh("systemctl daemon-reload && systemctl start baton.socket")
		if s := b.show("baton", "ActiveState"); s != "inactive" {
			t.Fatalf("service is %s", s)
		}
		c := b.connect()
		c.works()
		if s := c.lookup("last"); s != statusOK {
			t.Errorf("the file from before is gone: %d", s)
		}
		b.active("baton", "active") // calls are answered a moment earlier
		// The ports stay open while there is no service: what comes waits.
		b.sh("systemctl stop --no-block baton")
		if err := c.ends(); err != nil {
			t.Error(err)
		}
		c = b.connect()
		c.works()
		c.c.Close()
		if s := b.sh("journalctl -u baton -b --no-pager"); !strings.Contains(s, "192.0.2.99:2049") {
			t.Error("nothing is said of a listener that is of no use")
		}
		b.sh("systemctl stop baton.socket baton")
	})

	step("purge", func(t *testing.T) {
		b.sh("systemctl start baton")
		b.sh("dpkg --purge baton")
		if _, err := b.dial(nfsPort); !refused(err) {
			t.Errorf("something listens: %v", err)
		}
		if s, err := b.try("pgrep -x baton"); err == nil {
			t.Errorf("process %s runs", s)
		}
		for p := range b.files() {
			if !before[p] {
				t.Errorf("%s stays", p)
			}
		}
		b.sh("test -d /var/lib/baton/mdt")
		if s, err := b.try("systemctl cat baton.service"); err == nil {
			t.Errorf("the unit is still known: %s", s)
		}
	})
}

// A reboot waits until the node has stopped.
func TestShutdown(t *testing.T) {
	b := newBox(t)
	// Without polkit only root may hold a shutdown up.
	b.install("[Service]\nUser=root\nGroup=root")
	// It reads its settings when it starts.
	b.sh("systemctl restart systemd-logind && systemctl start baton")
	b.await("lock against shutdown", func() (bool, string) {
		out := b.sh("busctl call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager ListInhibitors")
		return strings.Contains(out, `"shutdown" "baton"`) && strings.Contains(out, `"delay"`), out
	})
	c := b.connect()
	c.works()
	if s := b.sh("busctl get-property org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager InhibitDelayMaxUSec"); s != "t 60000000" {
		t.Errorf("logind waits for %s µs at most", s)
	}
	b.sh("busctl call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager PowerOff b false")
	if err := c.ends(); err != nil {
		t.Errorf("the connection does not end in order: %v", err)
	}
	select {
	case <-b.proc.Done():
		b.proc = nil
	case <-time.After(patience):
		t.Fatal("the machine does not go down")
	}
	out, err := b.node.RunCmd(b.ctx, exec.Command("journalctl", "-D", filepath.Join(b.root, "var/log/journal"), "--no-pager", "-o", "short-monotonic"))
	if err != nil {
		t.Fatal(err)
	}
	last := -1
	for _, want := range []string{"about to shut down", "] stopped", "System is powering down"} {
		at := strings.Index(strings.ReplaceAll(string(out), ": stopped", "] stopped"), want)
		if at < last || at < 0 {
			t.Errorf("%q is not where it belongs in\n%s", want, out)
		}
		last = at
	}
}
