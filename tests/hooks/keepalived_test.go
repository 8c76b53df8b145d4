package hooks

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

// patient has a new master wait for a live owner for longer than a loaded machine stands
// still.
const patient = " --force-after 15s"

// keepalived starts keepalived with a packaged configuration and more options of the hook.
func (m *machine) keepalived(conf string, priority int, options string) *bed.Proc {
	m.s.t.Helper()
	b, err := os.ReadFile(filepath.Join("../../packaging/keepalived", conf))
	if err != nil {
		m.s.t.Fatal(err)
	}
	text := string(b)
	for old, new := range map[string]string{"priority 150": fmt.Sprint("priority ", priority), "preempt_delay 10": "preempt_delay 1"} {
		if strings.Count(text, old) != 1 {
			m.s.t.Fatalf("%s: %q is not there once", conf, old)
		}
		text = strings.Replace(text, old, new, 1)
	}
	if !strings.Contains(text, " --syslog") {
		m.s.t.Fatalf("%s: no hook with --syslog", conf)
	}
	text = strings.ReplaceAll(text, " --syslog", " --syslog"+options)
	m.write("/etc/keepalived/keepalived.conf", text)
	return m.spawn("keepalived", "/usr/sbin/keepalived", "--dont-fork", "--log-console", "--log-detail", "--vrrp")
}

const demote = "baton hook keepalived demote --track-file /run/baton-demote 192.0.2.50"

// planned checks that a node took the address while the other one served it, without
// declaring it gone: the take spans the giving up.
func (s *site) planned(what string, rs []record, from, to string) {
	s.t.Helper()
	for _, take := range of(rs, to, s.addrs[0].String(), "take serve") {
		for _, given := range of(rs, from, s.addrs[0].String(), "given up") {
			if !take.Force && take.State == "serving" && given.Had && !given.Has && take.Begin.Before(given.Begin) && !take.End.Before(given.End) {
				return
			}
		}
	}
	s.t.Errorf("%s: no planned move from %s to %s", what, from, to)
	for _, r := range rs {
		s.t.Logf("    %s", r)
	}
}

// TestKeepalived moves the address of a running baton by real keepalived, whose notify
// fifo is followed: demotion, return, the death of a node and of baton, a stop.
func TestKeepalived(t *testing.T) {
	t.Parallel()
	const addr = "192.0.2.50"
	s := newReal(t, 2, addr)
	said := s.m["n2"].spawn("syslog", "/bin/nc", "-lkuU", "/dev/log")
	s.wait("system's log", func() bool {
		_, err := s.m["n2"].Sh(s.ctx, "test -S /dev/log")
		return err == nil
	})
	begin := time.Now()
	// Both start together, and pass through states that nobody should act on for long.
	s.m["n1"].keepalived("keepalived.conf", 150, patient)
	s.m["n2"].keepalived("keepalived.conf", 100, patient)
	s.owner(addr, "n2")
	s.work(s.addrs[0])
	s.reach("start", addr, "n1", true)

	out := s.m["n1"].sh(demote)
	if !strings.Contains(out, "this node is demoted") {
		t.Errorf("demote: %q", out)
	}
	if has, err := s.m["n1"].Has(s.addrs[0]); err != nil || has {
		t.Errorf("demote has ended, and the node has the address: %v", err)
	}
	s.reach("demote", addr, "n2", true)
	s.m["n1"].sh("baton hook keepalived promote --track-file /run/baton-demote")
	s.reach("promote", addr, "n1", true)

	s.m["n1"].kill()
	s.reach("node killed", addr, "n2", false)
	s.boot(1).keepalived("keepalived.conf", 150, patient)
	s.reach("node returned", addr, "n1", true)

	// A baton that stops gives the address up in order, however its node is seen meanwhile.
	s.m["n1"].stopBaton()
	s.reach("baton stopped", addr, "n2", true)
	s.m["n1"].serve()
	s.reach("baton started", addr, "n1", true)

	// A node without baton is no master; what baton has left there is removed.
	s.m["n1"].killBaton()
	s.reach("baton killed", addr, "n2", false)
	s.m["n1"].serve()
	s.reach("baton returned", addr, "n1", true)

	s.m["n1"].procs["keepalived"].Stop(patience)
	s.reach("keepalived stopped", addr, "n2", true)
	s.wait("end of the fifo's reader", func() bool {
		_, err := s.m["n1"].Sh(s.ctx, "! pgrep -f '[b]aton hook keepalived fifo'")
		return err == nil
	})

	// What was done is said to the system's log, since keepalived throws it away.
	said.Stop(patience)
	if log, err := os.ReadFile(s.path("n2.syslog.log")); err != nil || !strings.Contains(string(log), addr+": the address is serving here") {
		t.Errorf("no line of the hook in the log: %v, %q", err, log)
	}

	// Nobody takes it from the last one: it stays.
	if _, err := s.m["n2"].Sh(s.ctx, demote+" --timeout 3s"); err == nil {
		t.Error("the last node was demoted")
	}
	s.reach("alone", addr, "n2", true)
	t.Logf("all after %v", time.Since(begin).Round(100*time.Millisecond))
	s.finish()
}

// TestKeepalivedNotify does with a script for each change of state. keepalived lets them
// overtake each other, so the stub notes in which order baton was called.
func TestKeepalivedNotify(t *testing.T) {
	t.Parallel()
	const addr, conf = "192.0.2.50", "keepalived-notify.conf"
	s := newSite(t, addr)
	s.boot(1)
	s.boot(2)
	s.m["n1"].keepalived(conf, 150, patient)
	s.m["n2"].keepalived(conf, 100, patient)
	s.step("start", addr, "n1")
	s.m["n1"].sh(demote)
	s.planned("demote", s.step("demote", addr, "n2"), "n1", "n2")
	s.m["n1"].sh("baton hook keepalived promote --track-file /run/baton-demote")
	s.planned("promote", s.step("promote", addr, "n1"), "n2", "n1")
	s.m["n1"].kill()
	rs := s.step("node killed", addr, "n2")
	s.sequence("node killed", of(rs, "n2", addr, "take"), "n2 take serve force has -> serving")
	s.boot(1).keepalived(conf, 150, patient)
	s.planned("node returned", s.step("node returned", addr, "n1"), "n2", "n1")
	s.m["n1"].procs["keepalived"].Stop(20 * time.Second)
	s.step("keepalived stopped", addr, "n2")
}
