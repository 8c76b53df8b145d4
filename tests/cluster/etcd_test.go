package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/internal/node"
	"github.com/baton-nfs/baton/recovery/wire"
)

// registry is what "baton registry status" says with a node's configuration.
func (c *cell) registry(n string) (r node.RegistryStatus) {
	c.t.Helper()
	out, _ := exec.CommandContext(ctx, c.bin, "registry", "status", "--json", "--config", c.path(n, "baton.toml")).Output()
	if err := json.Unmarshal(out, &r); err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
	return r
}

// The registry is in an etcd that the nodes a, b and c run, with TLS; there is no MGS.
// The elected node and the node of the MDT are killed: another one is elected and tells
// all where the MDT is. With two of the three members dead nothing can begin,
// and what is served is served.
func TestRegistryInEtcd(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	c := newCell(t)
	c.etcd = freePorts(t, 2)
	c.tls = "mutual"
	nodes := []string{"a", "b", "c", "d"}
	for i, n := range nodes {
		c.address[n] = fmt.Sprintf("127.0.8.%d", i+1)
	}
	c.certificates(nodes...)
	for _, n := range nodes {
		c.start(n)
	}
	c.untilUp("c", "MDT0000", "OST0000")
	c.untilUp("d", "OST0001")
	a := c.dial("a", "/disk")
	la := a.load("a")
	la.more(3)
	watched := func(nodes ...string) func() bool {
		return func() bool {
			for _, n := range nodes {
				if r := c.recovery(n); r.Registry == nil || !r.Watch.Current || len(r.Registry.Nodes) < len(nodes) {
					return false
				}
			}
			return true
		}
	}
	c.until("the table of targets at all nodes", watched(nodes...))
	var was node.RegistryStatus
	c.until("all members to answer", func() bool {
		was = c.registry("d")
		for _, m := range was.Members {
			if m.Error != "" {
				return false
			}
		}
		return was.Error == "" && was.Leader != ""
	})
	if was.Identity == "" || was.Addresses != 2 || len(was.Members) != 3 {
		t.Fatalf("registry: %+v", was)
	}
	for _, m := range was.Members {
		if m.Name == "" {
			t.Errorf("member %+v", m)
		}
	}

	// The elected one dies, too, and comes back unless it is c; a is looked at, and lives.
	if was.Leader == "b" || was.Leader == "d" {
		c.kill(was.Leader)
		c.start(was.Leader)
		c.until(was.Leader+" to take orders", func() bool { _, err := c.order(was.Leader, "target", "list"); return err == nil })
	}
	c.kill("c")
	c.must("d", "target", "start", "MDT0000")
	c.must("d", "target", "start", "OST0000")
	c.until("the end of recovery", func() bool {
		for _, x := range c.recovery("a").Targets {
			if x.Node != "d" || x.State != "COMPLETE" && x.State != "FULL" {
				return false
			}
		}
		return true
	})
	la.more(3)
	c.until("another leader", func() bool {
		r := c.registry("a")
		return r.Leader != "" && r.Leader != "c" && (was.Leader == "a" || r.Term > was.Term)
	})
	c.until("its table at those that live", watched("a", "b", "d"))

	// Without a majority.
	b := c.dial("b", "/disk")
	if _, err := b.create("of b"); err != nil {
		t.Fatal(err)
	}
	c.kill("b")
	c.until("the end of leadership", func() bool {
		r := c.registry("a")
		return r.Error != "" && strings.Contains(r.Error, "no majority")
	})
	la.more(5)
	fh, err := a.create("without a majority")
	if err == nil {
		_, err = a.write(fh, 0, "still served", wire.FileSync)
	}
	if err != nil {
		t.Errorf("service without a majority: %v", err)
	}
	a.check("without a majority", "still served")
	if out, err := exec.CommandContext(ctx, c.bin, "registry", "export", "--config", c.path("a", "baton.toml"), c.path("copy")).CombinedOutput(); err == nil || !strings.Contains(string(out), "no majority") {
		t.Errorf("export without a majority: %v\n%s", err, out)
	}
	// And with one again.
	c.start("b")
	c.start("c")
	c.until("an elected node", func() bool { r := c.registry("d"); return r.Error == "" && r.Leader != "" })
	la.end(a)
	c.dial("b", "/disk").check("without a majority", "still served")
	if out, err := exec.CommandContext(ctx, c.bin, "registry", "export", "--config", c.path("a", "baton.toml"), c.path("copy")).CombinedOutput(); err != nil || !strings.Contains(string(out), was.Identity) {
		t.Errorf("%v\n%s", err, out)
	}
}

// certificates makes those of the nodes, with their addresses.
func (c *cell) certificates(nodes ...string) {
	c.t.Helper()
	dir := c.path("ca")
	ca := func(args ...string) {
		c.t.Helper()
		if out, err := exec.CommandContext(ctx, c.bin, append([]string{"ca"}, append(args, "--dir", dir)...)...).CombinedOutput(); err != nil {
			c.t.Fatalf("%v\n%s", err, out)
		}
	}
	ca("init", "--name", "test")
	for _, n := range nodes {
		ca("issue", n, "--host", c.address[n])
		if err := os.MkdirAll(c.path(n, "tls"), 0o700); err != nil {
			c.t.Fatal(err)
		}
		for _, f := range []string{"ca.pem", n + ".pem", n + ".key"} {
			b, err := os.ReadFile(filepath.Join(dir, f))
			if err != nil {
				c.t.Fatal(err)
			}
			c.write(c.path(n, "tls", f), string(b))
		}
	}
}
