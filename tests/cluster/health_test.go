package cluster

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/wire"
)

// status is that of a node.
func (c *cell) status(n string) (s status.Status) {
	c.t.Helper()
	out, err := c.order(n, "status", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	}
	if err != nil {
		c.t.Fatalf("status of %s: %v\n%s", n, err, out)
	}
	return s
}

// peer is what a node thinks of another one.
func (c *cell) peer(n, of string) status.Peer {
	c.t.Helper()
	for _, p := range c.status(n).Peers {
		if p.Node == of {
			return p
		}
	}
	c.t.Fatalf("%s does not know %s", n, of)
	return status.Peer{}
}

func (c *cell) untilPeer(n, of, state string) {
	c.t.Helper()
	c.until(fmt.Sprintf("%s to be %s for %s", of, state, n), func() bool { return c.peer(n, of).State == state })
}

// evicted counts the evictions of the targets that run on a node.
func (c *cell) evicted(n string) (sum int) {
	c.t.Helper()
	for _, x := range c.status(n).Targets {
		sum += x.Evicted
	}
	return sum
}

// The beats of a node that is killed or hangs end, and the others know it from that, long
// before a request has to run into a time-out: with pings minutes apart there is nothing
// else to know it from. Nobody is evicted, clients see delay. LN 209, LN 210, LN 211,
// LN 303; requirements 000.9, 000.11, 000.16.
func TestDeathIsTold(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	c := newCell(t)
	c.ping, c.silence = "5m", "1h"
	c.up()
	a, b := c.dial("a", "/disk"), c.dial("b", "/disk")
	for _, n := range []string{"a", "b"} {
		for _, of := range []string{"c", "d"} {
			c.untilPeer(n, of, status.PeerAlive)
		}
	}
	fh, err := a.create("f")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.write(fh, 0, content("f"), wire.Unstable); err != nil {
		t.Fatal(err)
	}

	ok := t.Run("node of the MDT killed", func(t *testing.T) {
		was := c.peer("a", "c")
		c.kill("c")
		for _, n := range []string{"a", "b"} {
			c.untilPeer(n, "c", status.PeerSuspect)
		}
		if s := c.log("a"); !strings.Contains(s, "node does not answer beats") {
			t.Error("the log does not tell of it")
		}
		c.start("c")
		c.until("the restart to be known", func() bool {
			p := c.peer("a", "c")
			return p.State == status.PeerAlive && p.Restarts > was.Restarts && p.Incarnation > was.Incarnation
		})
		c.untilUp("c", "MDT0000", "OST0000")
		a.check("f", content("f"))
		b.check("f", content("f"))
	})
	ok = ok && t.Run("node of an OST hangs", func(t *testing.T) {
		before := c.evicted("c") + c.evicted("d")
		la := a.load("hang")
		la.more(3)
		was := c.peer("a", "d")
		c.signal("d", syscall.SIGSTOP)
		for _, n := range []string{"a", "b"} {
			c.untilPeer(n, "d", status.PeerSuspect)
		}
		c.signal("d", syscall.SIGCONT)
		for _, n := range []string{"a", "b"} {
			c.untilPeer(n, "d", status.PeerAlive)
		}
		la.more(10)
		la.end(b)
		p := c.peer("a", "d")
		if p.Wrong <= was.Wrong || p.Restarts != was.Restarts || p.Incarnation != was.Incarnation {
			t.Errorf("before %+v, after %+v", was, p)
		}
		if n := c.evicted("c") + c.evicted("d"); n != before {
			t.Errorf("%d clients were evicted", n-before)
		}
	})
	ok = ok && t.Run("frontend hangs", func(t *testing.T) {
		before := c.evicted("c") + c.evicted("d")
		c.signal("b", syscall.SIGSTOP)
		c.untilPeer("a", "c", status.PeerAlive)
		c.untilPeer("c", "b", status.PeerSuspect)
		la := a.load("alone")
		la.more(5)
		c.signal("b", syscall.SIGCONT)
		c.untilPeer("c", "b", status.PeerAlive)
		b.check("f", content("f"))
		la.end(b)
		if n := c.evicted("c") + c.evicted("d"); n != before {
			t.Errorf("%d clients were evicted", n-before)
		}
	})
	if !ok {
		t.FailNow()
	}
	// The frontends take leave of targets that run. a has the registry, which b needs.
	for _, n := range []string{"b", "a", "c", "d"} {
		c.stop(n)
	}
}
