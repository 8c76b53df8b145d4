package node

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/client/imp"
)

// hearing writes down what it is told.
type hearing struct {
	mu    sync.Mutex
	heard []string
}

func (h *hearing) Notice(target string, instance uint64, node string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.heard = append(h.heard, fmt.Sprintf("%s %d %s", target, instance, node))
}

func (h *hearing) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.heard
	h.heard = nil
	slices.Sort(l)
	return l
}

// News reach everybody who listens, and who joins later hears what was said last.
func TestNewsReachEverybody(t *testing.T) {
	var n news
	a, b := &hearing{}, &hearing{}
	leave := n.join(a)
	check := func(what string, h *hearing, want ...string) {
		t.Helper()
		if got := h.take(); !slices.Equal(got, want) {
			t.Errorf("%s: heard %q, want %q", what, got, want)
		}
	}
	n.runs("MDT0000", 4, "x")
	n.runs("OST0000", 0, "y")
	check("first", a, "MDT0000 4 x", "OST0000 0 y")
	n.join(b)
	check("who joins", b, "MDT0000 4 x", "OST0000 0 y")
	n.runs("MDT0000", 5, "y")
	for _, h := range []*hearing{a, b} {
		check("moved", h, "MDT0000 5 y")
	}
	n.back("x")
	check("nothing is at x any more", a)
	n.back("y")
	check("back", a, "MDT0000 5 y", "OST0000 0 y")
	b.take()
	n.gone("MDT0000", "x") // late
	n.gone("OST0000", "y")
	n.back("y")
	check("one has gone", a, "MDT0000 5 y")
	leave()
	n.runs("MDT0000", 6, "x")
	check("who has left", a)
	w := newWaiter("MDT0000")
	n.join(w)
	n.runs("OST0000", 1, "z")
	n.runs("MDT0000", 7, "z")
	if got := <-w.node; got != "z" {
		t.Errorf("the waiter has %q", got)
	}
}

// News of a start that never was make the imports of frontends and targets look, and
// do no harm, whether nobody runs the target there or somebody does.
func TestWrongNewsAreHarmless(t *testing.T) {
	c := newCell(t)
	c.change = func(k *config.Config) {
		k.Recovery.PingInterval = config.Duration(patience) // so that nobody finds out by asking
		k.Recovery.PingTimeout = config.Duration(10 * patience)
	}
	a, b, k := c.up("a"), c.up("b"), c.up("c")
	c.ready(a)
	c.ready(b)
	c.all(b)
	x := create(t, a, "f")
	ours := func() []*imp.Import {
		h := b.cluster.byName[mdtName]
		h.mu.Lock()
		defer h.mu.Unlock()
		return []*imp.Import{a.fs.MDTImport(), b.fs.MDTImport(), a.fs.OSTImport(0), h.mdt.FS().OSTImport(0), h.mdt.FS().MDTImport()}
	}
	full := func() bool {
		for _, im := range ours() {
			if im.State() != imp.Full {
				return false
			}
		}
		return true
	}
	until(t, "the imports", full)
	before := a.fs.MDTImport().Stats().Instance
	for _, n := range []*Node{a, b, k} {
		for _, node := range []string{"b", "c"} {
			n.cluster.news.runs(mdtName, 1<<40, node)
			n.cluster.news.runs(ostName(0), 1<<40, node)
		}
		n.cluster.news.runs("no such target", 1, "c")
	}
	until(t, "the imports again", full)
	write(t, a, x, 0, "after", 0)
	if got := content(t, b, x.FID); got != "after" {
		t.Errorf("%q", got)
	}
	if s := a.fs.MDTImport().Stats(); s.Instance != before {
		t.Errorf("instance %d, was %d", s.Instance, before)
	}
	for _, target := range []string{mdtName, ostName(0)} {
		f, err := b.front(target)
		if err != nil {
			t.Fatal(err)
		}
		if st := f.Status(); st.Recovery.Evicted != 0 {
			t.Errorf("%s has evicted %d clients", target, st.Recovery.Evicted)
		}
	}
	c.down("a", a) // before those that it takes leave of
}
