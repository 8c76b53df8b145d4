package node

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Starts of a node have rising numbers, whatever happens to the clock or the file.
func TestIncarnationRises(t *testing.T) {
	dir := t.TempDir()
	now := time.Unix(1e9, 0)
	var last uint64
	next := func(what string, at time.Time) {
		t.Helper()
		n, err := incarnation(dir, at)
		if err != nil {
			t.Fatal(err)
		}
		if n <= last {
			t.Errorf("%s: %d after %d", what, n, last)
		}
		last = n
	}
	next("first", now)
	next("at the same time", now)
	next("clock set back", now.Add(-1000*time.Hour))
	next("clock before 1970", time.Unix(-5, 0))
	if err := os.Remove(filepath.Join(dir, incarnationFile)); err != nil {
		t.Fatal(err)
	}
	next("file lost", now.Add(time.Hour))
	if err := os.WriteFile(filepath.Join(dir, incarnationFile), []byte("x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := incarnation(dir, now); err == nil || !strings.Contains(err.Error(), incarnationFile) {
		t.Errorf("damaged file: %v", err)
	}
}

// peerOf is what a node thinks of another one.
func peerOf(n *Node, name string) (p health.PeerStatus) {
	for _, p := range n.cluster.health.Status() {
		if p.Name == name {
			return p
		}
	}
	return p
}

// place is where a node was told that a target runs.
func told(n *Node, target string) place {
	n.cluster.news.mu.Lock()
	defer n.cluster.news.mu.Unlock()
	return n.cluster.news.last[target]
}

// Nodes that hold state on each other exchange beats, also while there is no registry,
// and learn by them where targets run. They stop when nobody holds anything any more
// (requirements 000.5, 000.29, 000.30).
func TestNodesExchangeBeats(t *testing.T) {
	c := newCell(t)
	a, b, k := c.up("a"), c.up("b"), c.up("c")
	c.ready(a)
	c.ready(b)
	c.all(b)
	pairs := func(what string, state health.PeerState) {
		t.Helper()
		for _, p := range []struct {
			n    *Node
			peer string
		}{{a, "b"}, {a, "c"}, {b, "a"}, {b, "c"}, {k, "a"}, {k, "b"}} {
			until(t, fmt.Sprintf("%s: %s at %s to be %v", what, p.peer, p.n.cluster.name, state), func() bool {
				return peerOf(p.n, p.peer).State == state
			})
		}
	}
	pairs("in service", health.StateAlive)
	until(t, "beats to tell what a serves", func() bool {
		v := peerOf(b, "a").VIPs
		own := slices.IndexFunc(vips(t, a.reg), func(v mgs.VIP) bool { return v.Node == "a" })
		return len(v) == 1 && v[0].Index == vips(t, a.reg)[own].Index
	})
	until(t, "beats to tell where the MDT is", func() bool { return told(a, mdtName) == place{"b", b.cluster.byName[mdtName].instance()} })
	if err := b.StopTarget(ctx, mdtName); err != nil {
		t.Fatal(err)
	}
	until(t, "beats to tell that the MDT is nowhere", func() bool { return told(a, mdtName) == place{} })
	if err := k.StartTarget(ctx, mdtName, ""); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*Node{a, b, k} {
		until(t, "the new place of the MDT", func() bool { return told(n, mdtName) == place{"c", k.cluster.byName[mdtName].instance()} })
	}
	if err := b.StopTarget(ctx, config.MGSName); err != nil {
		t.Fatal(err)
	}
	was := map[string]uint64{}
	for _, n := range []*Node{a, b, k} {
		for _, p := range n.cluster.health.Status() {
			was[n.cluster.name+p.Name] = p.Received
		}
	}
	for _, n := range []*Node{a, b, k} {
		for _, p := range n.cluster.health.Status() {
			if p.State != health.StateAlive {
				continue // they may have nothing to do with each other any more
			}
			until(t, "beats without a registry", func() bool { return peerOf(n, p.Name).Received > was[n.cluster.name+p.Name]+5 })
		}
	}
	for _, n := range []*Node{a, b, k} {
		for _, p := range n.cluster.health.Status() {
			if p.Bad+p.Limited+p.Refused > 0 {
				t.Errorf("%s of %s: %+v", n.cluster.name, p.Name, p.Stats)
			}
		}
	}
	if err := b.StartTarget(ctx, config.MGSName, ""); err != nil {
		t.Fatal(err)
	}
	// a leaves in order: the others have nothing to do with it then, and suspect nobody.
	c.down("a", a)
	if l := a.cluster.business; len(l) != 0 {
		t.Errorf("a has taken leave of all and still has business with %q", l)
	}
	for _, n := range []*Node{b, k} {
		until(t, "the end of the interest in a", func() bool { return peerOf(n, "a").State == health.StateIdle })
	}
}

// Wrong suspicions, and wrong news that nodes were started again, cost reconnects and
// nothing else: what was acknowledged is there once, nobody is evicted, no verifier
// changes (LN 204, LN 206, LN 209; requirement 000.16).
func TestWrongSuspicionIsHarmless(t *testing.T) {
	c := newCell(t)
	a, b, k := c.up("a"), c.up("b"), c.up("c")
	c.ready(a)
	c.ready(b)
	c.all(b)
	ver := verifiers(t, a.reg)
	stop := make(chan struct{})
	var liar sync.WaitGroup
	lies := 0
	liar.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			lies++
			kind := health.Suspect
			if i%5 == 4 {
				kind = health.Restarted
			}
			for _, x := range []struct {
				n    *Node
				peer string
			}{{a, "b"}, {a, "c"}, {b, "a"}, {b, "c"}, {k, "a"}, {k, "b"}} {
				x.n.cluster.learn([]health.Event{{Kind: kind, Peer: x.peer}, {Kind: health.TargetGone, Peer: x.peer, Target: ostName(1)}, {Kind: health.Alive, Peer: x.peer, Silence: 1}})
			}
		}
	})
	var work sync.WaitGroup
	files := make([][]wire.Attr, 2)
	for w, n := range []*Node{a, b} {
		work.Go(func() {
			for i := range 40 {
				name := fmt.Sprintf("%d.%d", w, i)
				x := create(t, n, name)
				write(t, n, x, 0, name, wire.Unstable)
				files[w] = append(files[w], x)
			}
		})
	}
	work.Wait()
	close(stop)
	liar.Wait()
	t.Log(lies, "times everybody was called dead")
	if lies == 0 {
		t.Fatal("nobody was suspected")
	}
	for w := range files {
		for i, x := range files[w] {
			for _, n := range []*Node{a, b} {
				if got, want := content(t, n, x.FID), fmt.Sprintf("%d.%d", w, i); got != want {
					t.Errorf("%q in %s", got, want)
				}
			}
		}
	}
	for _, n := range []*Node{b, k} {
		for _, h := range n.cluster.hosted {
			if f := h.front(); f != nil {
				if s := f.Status(); s.Recovery.Evicted > 0 {
					t.Errorf("%s has evicted %d", s.Name, s.Recovery.Evicted)
				}
			}
		}
	}
	if got := verifiers(t, a.reg); !slices.Equal(got, ver) {
		t.Error("write verifiers changed")
	}
	until(t, "the imports", func() bool {
		return a.fs.MDTImport().State() == imp.Full && a.fs.OSTImport(0).State() == imp.Full && a.fs.OSTImport(1).State() == imp.Full
	})
	c.down("a", a)
}

// With suppress_pings idle frontends are silent, and beats speak for them: nobody is
// evicted. When the beats end pings begin again (requirements 001.131 to 001.136; CS 91).
func TestSilentFrontendsAreNotEvicted(t *testing.T) {
	c := newCell(t)
	interval := 300 * time.Millisecond
	c.change = func(k *config.Config) {
		k.Recovery.PingInterval, k.Recovery.PingTimeout = config.Duration(interval), config.Duration(5*interval)
		k.Recovery.SuppressPings = true
	}
	a, b, k := c.up("a"), c.up("b"), c.up("c")
	c.ready(a)
	c.ready(b)
	c.all(b)
	x := create(t, a, "f")
	write(t, a, x, 0, "data", wire.FileSync)
	far := []*imp.Import{a.fs.MDTImport(), a.fs.OSTImport(0), a.fs.OSTImport(1), b.fs.OSTImport(1)}
	silent := func() bool {
		for _, im := range far {
			if s := im.Stats(); !s.Pingless || s.Uncommitted > 0 || s.OpenEpochs > 0 {
				return false
			}
		}
		return true
	}
	until(t, "the frontends to become silent", silent)
	began := time.Now()
	until(t, "several ping timeouts to pass", func() bool { return time.Since(began) > 20*interval })
	for _, n := range []*Node{b, k} {
		for _, h := range n.cluster.hosted {
			if f := h.front(); f != nil {
				s := f.Status()
				if s.Recovery.Evicted > 0 {
					t.Errorf("%s has evicted %d clients", s.Name, s.Recovery.Evicted)
				}
			}
		}
	}
	if got := content(t, b, x.FID); got != "data" {
		t.Errorf("%q", got)
	}
	a.cluster.lives.set("b", false) // as after a suspicion
	until(t, "pings to b to begin again", func() bool { return !a.fs.MDTImport().Stats().Pingless })
	a.cluster.lives.set("b", true)
	until(t, "pings to b to end", silent)
	// A frontend that is dead is evicted by its node's name, also when it is not
	// connected any more, and by its ID.
	if err := a.fs.Abandon(); err != nil {
		t.Fatal(err)
	}
	if err := k.EvictClient(ostName(1), "a"); err != nil {
		t.Error(err)
	}
	id := ""
	for _, x := range b.cluster.byName[ostName(0)].front().Status().Clients {
		if x.Node == "a" {
			id = fmt.Sprintf("%x", x.Client[:])
		}
	}
	if err := b.EvictClient(ostName(0), id); err != nil || id == "" {
		t.Errorf("client %q: %v", id, err)
	}
	// b is also the node of the MDT, which is a client of the OSTs itself, and stays it.
	if err := k.EvictClient(ostName(1), "b"); err != nil {
		t.Error(err)
	}
	s := k.cluster.byName[ostName(1)].front().Status()
	if s.Recovery.Evicted != 2 || !slices.ContainsFunc(s.Clients, func(x front.Client) bool { return x.Client == host.AgentID(mdtName) }) {
		t.Errorf("evicted %d, clients %+v", s.Recovery.Evicted, s.Clients)
	}
	if got := content(t, b, x.FID); got != "data" {
		t.Errorf("%q", got)
	}
	c.down("a", a)
}
