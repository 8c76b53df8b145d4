package rig

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

// Watch looks at all machines again and again: an address is on one machine at most,
// and while one has it no other has a socket of it with a peer.
type Watch struct {
	net   *Net
	addrs []netip.Addr
	quit  chan struct{}
	done  chan struct{}

	mu     sync.Mutex
	frozen map[string]bool
	found  []string
	looks  int
}

// NewWatch begins to look.
func NewWatch(n *Net, addrs ...netip.Addr) *Watch {
	w := &Watch{net: n, addrs: addrs, quit: make(chan struct{}), done: make(chan struct{}), frozen: map[string]bool{}}
	go func() {
		defer close(w.done)
		for {
			for _, a := range addrs {
				w.look(a)
			}
			select {
			case <-w.quit:
				return
			case <-time.After(25 * time.Millisecond):
			}
		}
	}()
	return w
}

// Excuse says that a machine cannot do anything about its addresses just now: it is
// frozen, or nobody can reach it.
func (w *Watch) Excuse(node string, excused bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frozen[node] = excused
}

// Stop ends the watch and returns how often it has seen an address, and what was wrong.
func (w *Watch) Stop() (looks int, found []string) {
	select {
	case <-w.quit:
	default:
		close(w.quit)
	}
	<-w.done
	return w.looks, w.found
}

// Found is what was wrong so far.
func (w *Watch) Found() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.found)
}

func (w *Watch) excused(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.frozen[name]
}

// look looks at one address. Machines are looked at one after the other, so what is
// seen counts only if it is there in a second round, too, with the same
// owner at both ends. A machine that was excused at either end of a look is left out: what
// was seen of it may be from before its excuse ended.
func (w *Watch) look(a netip.Addr) {
	w.mu.Lock()
	before := maps.Clone(w.frozen)
	w.mu.Unlock()
	has := func() (names []string) {
		for _, m := range w.net.Machines {
			if b := m.Node(); b != nil && !w.excused(m.Name) {
				if ok, err := b.Has(a); err == nil && ok {
					names = append(names, m.Name)
				}
			}
		}
		return names
	}
	first := has()
	if len(first) > 1 {
		if again := has(); slices.Equal(first, again) {
			w.report("%v is on %s", a, strings.Join(first, " and "))
		}
	}
	seen := len(first) > 0
	if len(first) == 1 {
		stale := Stale(w.net, a, first[0], false)
		if again := has(); len(stale) > 0 && slices.Equal(first, again) {
			for name, ss := range stale {
				if !before[name] && !w.excused(name) {
					w.report("%v is on %s, and %s has %v", a, first[0], name, ss)
				}
			}
		}
	}
	if seen {
		w.mu.Lock()
		w.looks++
		w.mu.Unlock()
	}
}

func (w *Watch) report(format string, args ...any) {
	s := time.Now().UTC().Format("15:04:05.000 ") + fmt.Sprintf(format, args...)
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.found) < 20 {
		w.found = append(w.found, s)
	}
}

// Stale finds the sockets of the address on machines other than its owner; those
// without a peer, as listeners are, only if all is set.
func Stale(n *Net, a netip.Addr, owner string, all bool) map[string][]bed.Socket {
	stale := map[string][]bed.Socket{}
	for _, m := range n.Machines {
		b := m.Node()
		if b == nil || m.Name == owner {
			continue
		}
		ss, err := b.Sockets(a)
		if err != nil {
			continue // it has just lost its power
		}
		for _, s := range ss {
			if all || !s.Listening() {
				stale[m.Name] = append(stale[m.Name], s)
			}
		}
	}
	return stale
}
