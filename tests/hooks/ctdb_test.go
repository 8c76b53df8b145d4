package hooks

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// ctdb starts ctdbd, set up as docs/operations.md says. callout: 06.nfs and 60.nfs with
// the NFS callout, and 05.baton.script; else the event script twice.
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
		m.sh("chmod -x /etc/ctdb/statd-callout && ctdb event script enable legacy 06.nfs && ctdb event script enable legacy 60.nfs")
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

// testCTDB moves the address of a running baton by real CTDB: an order, a restart, the
// death of a node and of baton, a shutdown.
func testCTDB(t *testing.T, callout bool) {
	const addr = "192.0.2.50"
	s := newReal(t, 3, addr)
	begin := time.Now()
	for _, m := range s.m {
		m.ctdb(callout)
	}
	s.healthy(3)
	owner := s.owner(addr)
	s.work(s.addrs[0])
	s.reach("start", addr, owner, true)
	t.Logf("healthy after %v", time.Since(begin).Round(100*time.Millisecond))

	next := func(name string) string { return map[string]string{"n1": "n2", "n2": "n3", "n3": "n1"}[name] }
	pnn := map[string]int{"n1": 0, "n2": 1, "n3": 2}
	to := next(owner)
	at := time.Now()
	s.moveTo(owner, addr, pnn[to])
	s.reach("move", addr, to, true)
	s.givenMove("move", addr, owner, to, at)
	owner = to

	if !callout { // it is the same from here on, but for the shutdown
		owner = s.deaths(owner, addr, pnn)
	}

	// CTDB's shutdown tells nobody of a release; the script drains before the address
	// is dropped.
	at = time.Now()
	s.m[owner].sh("ctdb shutdown")
	to = s.owner(addr, owner)
	s.reach("shutdown", addr, to, true)
	s.givenMove("shutdown", addr, owner, to, at)
	t.Logf("all after %v", time.Since(begin).Round(100*time.Millisecond))
	s.finish()
}

// deaths kills baton and then a node, which returns and gets the address back.
func (s *site) deaths(owner, addr string, pnn map[string]int) string {
	s.t.Helper()
	// baton is restarted, which CTDB need not notice: the address stays CTDB's.
	s.m[owner].killBaton()
	s.m[owner].serve()
	s.reach("baton restarted", addr, s.settled(addr), false)
	s.healthy(3)

	// baton dies: the node becomes unhealthy, and the address goes.
	owner = s.owner(addr)
	s.m[owner].killBaton()
	to := s.owner(addr, owner)
	s.reach("baton killed", addr, to, false)
	s.m[owner].serve()
	s.healthy(3)
	owner = s.settled(addr)
	s.reach("baton returned", addr, owner, true)

	s.m[owner].kill()
	dead := owner
	owner = s.owner(addr, dead)
	s.reach("node killed", addr, owner, false)

	// It returns, and the address is ordered back.
	s.boot(int(dead[1] - '0')).ctdb(false)
	s.healthy(3)
	if a := s.settled(addr); a != dead {
		s.moveTo(a, addr, pnn[dead])
	}
	s.reach("failback", addr, dead, true)
	return dead
}
