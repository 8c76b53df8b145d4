package cluster

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/wire"
)

// recovery is what "baton recovery status" says on a node.
func (c *cell) recovery(n string) (r status.Recovery) {
	c.t.Helper()
	out, err := c.order(n, "recovery", "status", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &r)
	}
	if err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
	return r
}

// A frontend and the node of the MDT die together: the MDT, started elsewhere, waits for
// the dead frontend only a part of the window, since all others are told; what it had
// made durable is there, and what the living one had not, too. All nodes say the same of
// it: SM 100, 001.115, 001.119, 001.123..001.129.
func TestImperativeRecovery(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	c := newCell(t)
	c.up()
	a, b := c.dial("a", "/disk"), c.dial("b", "/disk")
	c.until("imperative recovery in state full on all nodes", func() bool {
		for _, n := range []string{"a", "b", "c", "d"} {
			r := c.recovery(n)
			if r.Registry == nil || r.Registry.State != "full" || !r.Watch.Current || len(r.Registry.Nodes) != 4 {
				return false
			}
		}
		return true
	})
	if _, err := b.create("of b"); err != nil {
		t.Fatal(err)
	}
	la := a.load("ir")
	la.more(3)
	was := c.recovery("a")
	c.kill("b")
	c.kill("c")
	c.must("d", "target", "start", "MDT0000")
	c.must("d", "target", "start", "OST0000")
	c.until("the end of recovery", func() bool {
		r := c.recovery("a")
		for _, x := range r.Targets {
			if x.State != "COMPLETE" || x.Node != "d" {
				return false
			}
		}
		return true
	})
	for _, n := range []string{"a", "d"} {
		r := c.recovery(n)
		x := r.Targets[0]
		if x.Name != "MDT0000" || !x.Shortened || x.IR != "full" || x.Factor != 5 || x.Evicted != 1 || x.Instance <= was.Targets[0].Instance || x.Version <= was.Targets[0].Version {
			t.Errorf("node %s says %+v", n, x)
		}
		if len(x.Clients) != 1 || x.Clients[0].Node != "a" || x.Clients[0].State != status.ClientConnected {
			t.Errorf("node %s says of the clients %+v", n, x.Clients)
		}
	}
	if !strings.Contains(c.log("d"), "told that the target is back, and not there") {
		t.Error("the dead frontend was not evicted at the end of the shorter window")
	}
	la.more(3)
	la.end(a)
	if _, err := a.lookup("of b"); err != nil {
		t.Errorf("of b: %v", err)
	}
	fh, err := a.create("after")
	if err == nil {
		_, err = a.write(fh, 0, content("after"), wire.FileSync)
	}
	if err != nil {
		t.Error(err)
	}
	a.check("after", content("after"))
	if out, err := c.order("a", "recovery", "status"); err != nil || !strings.Contains(out, "imperative recovery: full") || !strings.Contains(out, "MDT0000") {
		t.Errorf("%v\n%s", err, out)
	}
}
