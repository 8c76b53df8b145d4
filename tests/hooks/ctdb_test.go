package hooks

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// ctdb starts ctdbd. callout: addresses are handled by 06.nfs and 60.nfs with the NFS
// callout; else by the event script alone.
func (m *machine) ctdb(callout bool) {
	m.s.t.Helper()
	m.write("/etc/ctdb/ctdb.conf", `[logging]
location = file:/srv/site/`+m.Name()+`.ctdb.log
log level = NOTICE
[legacy]
realtime scheduling = false
`)
	m.write("/etc/ctdb/nodes", "192.0.2.1\n192.0.2.2\n192.0.2.3\n")
	m.write("/etc/ctdb/public_addresses", "192.0.2.50/24 eth0\n")
	// Detection in seconds rather than half a minute.
	m.write("/etc/ctdb/ctdb.tunables", "KeepaliveInterval=1\nKeepaliveLimit=2\nMonitorInterval=2\nRerecoveryTimeout=1\nElectionTimeout=2\n")
	m.sh(`cd /etc/ctdb/events/legacy && rm -f 05.system.script 01.reclock.script && ln -s /usr/share/baton/ctdb/baton.script 05.baton.script
mkdir -p /var/lib/ctdb/volatile /var/lib/ctdb/persistent /var/lib/ctdb/state /run/ctdb /var/run/ctdb /var/log/ctdb`)
	if callout {
		m.write("/etc/ctdb/script.options", `CTDB_NFS_CALLOUT=/usr/share/baton/ctdb/baton-callout
CTDB_NFS_CHECKS_DIR=/usr/share/baton/ctdb/nfs-checks.d
CTDB_NFS_SKIP_SHARE_CHECK=yes
`)
		m.sh(`cd /etc/ctdb/events/legacy && chmod -x /etc/ctdb/statd-callout
ln -s /usr/share/ctdb/events/legacy/06.nfs.script && ln -s /usr/share/ctdb/events/legacy/60.nfs.script
# takeip and releaseip are the callout's here.
rm 05.baton.script && cat >05.baton.script <<'END' && chmod 755 05.baton.script
#!/bin/sh
case $1 in takeip | releaseip) exit 0 ;; esac
exec baton hook ctdb event --part before "$@"
END`)
	} else {
		m.sh("ln -s /usr/share/baton/ctdb/baton.script /etc/ctdb/events/legacy/11.baton.script")
	}
	m.spawn("ctdbd", "/usr/sbin/ctdbd", "-i")
}

// healthy waits until all nodes are.
func (s *site) healthy(n int) {
	s.t.Helper()
	s.wait(fmt.Sprint(n, " healthy nodes"), func() bool {
		for _, m := range s.m {
			out, err := m.Sh(s.ctx, "ctdb -X status 2>/dev/null")
			if err == nil && strings.Count(out, "|OK|") >= n {
				return true
			}
			ok := 0
			for l := range strings.SplitSeq(out, "\n") {
				if f := strings.Split(strings.Trim(l, "|"), "|"); len(f) > 8 && f[0] != "Node" && !strings.Contains(strings.Join(f[2:9], ""), "1") {
					ok++
				}
			}
			if ok >= n {
				return true
			}
		}
		return false
	})
}

// moveTo has CTDB move the address, which it refuses while it recovers.
func (s *site) moveTo(from, addr string, pnn int) {
	s.t.Helper()
	s.wait("order to move", func() bool {
		_, err := s.m[from].Sh(s.ctx, fmt.Sprintf("ctdb moveip %s %d", addr, pnn))
		return err == nil
	})
}

func TestCTDB(t *testing.T) {
	for _, c := range []struct {
		name    string
		callout bool
	}{{"script", false}, {"callout", true}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			testCTDB(t, c.callout)
		})
	}
}

// testCTDB moves the address by real CTDB: an order, the death of a node and of baton,
// a shutdown.
func testCTDB(t *testing.T, callout bool) {
	const addr = "192.0.2.50"
	s := newSite(t, addr)
	begin := time.Now()
	for i := 1; i <= 3; i++ {
		s.boot(i)
	}
	for _, m := range s.m {
		m.ctdb(callout)
	}
	s.healthy(3)
	s.wait("owner", func() bool { return s.answers(s.addrs[0]) != "" })
	owner := s.answers(s.addrs[0])
	rs := s.step("start", addr, owner)
	s.sequence("start", of(rs, owner, addr, "take"), owner+" take listen given force -> listening", owner+" take serve given force had has -> serving")
	t.Logf("healthy after %v", time.Since(begin).Round(100*time.Millisecond))

	next := func(name string) string { return map[string]string{"n1": "n2", "n2": "n3", "n3": "n1"}[name] }
	pnn := map[string]int{"n1": 0, "n2": 1, "n3": 2}
	moved := func(what string, rs []record, from, to string) {
		t.Helper()
		s.sequence(what, of(rs, "", addr, "take", "release"), from+" release drain given had has -> releasing", from+" release finish given -> absent",
			to+" take listen given force -> listening", to+" take serve given force had has -> serving")
	}

	to := next(owner)
	s.moveTo(owner, addr, pnn[to])
	moved("move", s.step("move", addr, to), owner, to)
	owner = to

	if !callout { // it is the same from here on, but for the shutdown
		owner = s.deaths(owner, addr)
	}

	// CTDB's shutdown tells nobody of a release; the script drains before the address
	// is dropped.
	s.m[owner].sh("ctdb shutdown")
	s.wait("another owner", func() bool { a := s.answers(s.addrs[0]); return a != "" && a != owner })
	rs = s.step("shutdown", addr, s.answers(s.addrs[0]))
	s.sequence("shutdown", of(rs, owner, addr, "release"), owner+" release drain given had has -> releasing", owner+" release finish given")
	t.Logf("all after %v", time.Since(begin).Round(100*time.Millisecond))
}

// deaths kills baton and then a node, which returns and gets the address back.
func (s *site) deaths(owner, addr string) string {
	s.t.Helper()
	// baton dies: the node becomes unhealthy, and the address goes.
	s.m[owner].stub.Kill()
	s.wait("another owner", func() bool { a := s.answers(s.addrs[0]); return a != "" && a != owner })
	to := s.answers(s.addrs[0])
	rs := s.step("baton killed", addr, to)
	s.sequence("baton killed", of(rs, to, addr, "take"), to+" take listen given force -> listening", to+" take serve given force had has -> serving")
	s.m[owner].serve()
	s.healthy(3)
	s.seen = len(s.records())
	owner = s.answers(s.addrs[0])

	s.m[owner].kill()
	dead := owner
	s.wait("another owner", func() bool { a := s.answers(s.addrs[0]); return a != "" && a != dead })
	owner = s.answers(s.addrs[0])
	rs = s.step("node killed", addr, owner)
	s.sequence("node killed", of(rs, owner, addr, "take"), owner+" take listen given force -> listening", owner+" take serve given force had has -> serving")

	// It returns, and the address is ordered back.
	i := int(dead[1] - '0')
	s.boot(i).ctdb(false)
	s.healthy(3)
	if a := s.answers(s.addrs[0]); a != dead {
		s.moveTo(a, addr, i-1)
	}
	rs = s.step("failback", addr, dead)
	s.sequence("failback", of(rs, dead, addr, "take"), dead+" take listen given force -> listening", dead+" take serve given force had has -> serving")
	return dead
}
