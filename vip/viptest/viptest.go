// Package viptest has a vip.Net without a kernel: several machines on one network
// that remembers what was done, in which order, and what must never be.
package viptest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/baton-nfs/baton/vip"
)

// Kind is a method of vip.Net.
type Kind string

// Kinds.
const (
	Has      Kind = "has"
	Check    Kind = "check"
	Add      Kind = "add"
	Remove   Kind = "remove"
	Announce Kind = "announce"
	Sockets  Kind = "sockets"
	Destroy  Kind = "destroy"
	Tickle   Kind = "tickle"
	Added    Kind = "added"
)

// Op is something that was done to the network, or tried. Has, Check, Sockets and Added
// are not recorded unless they failed.
type Op struct {
	Machine string
	Kind    Kind
	Addr    netip.Addr
	Count   int // sockets destroyed, connections tickled
	Err     error
}

// String writes an operation in one line: "a destroy 192.0.2.1 3".
func (o Op) String() string {
	s := fmt.Sprintf("%s %s", o.Machine, o.Kind)
	if o.Addr.IsValid() {
		s += " " + o.Addr.String()
	}
	if o.Kind == Destroy || o.Kind == Tickle {
		s += fmt.Sprint(" ", o.Count)
	}
	if o.Err != nil {
		s += ": " + o.Err.Error()
	}
	return s
}

// Hook is called before an operation takes effect. It may wait; an error makes
// the operation fail without effect. addr is invalid for Added.
type Hook func(ctx context.Context, addr netip.Addr) error

// Network is what several machines are on. Its methods are safe for concurrent use.
type Network struct {
	mu         sync.Mutex
	machines   map[string]*machine
	ops        []Op
	violations []string
	announced  map[netip.Addr]string // machine that did it last
}

type machine struct {
	name    string
	addrs   map[netip.Addr]*held
	sockets map[netip.Addr][]vip.Socket
	tickled []vip.Conn
	hooks   map[Kind]Hook
	cut     bool
}

type held struct {
	vip.Address
	ours      bool // added by Add
	announced bool // since it is there
}

// NewNetwork returns a network without machines.
func NewNetwork() *Network {
	return &Network{machines: map[string]*machine{}, announced: map[netip.Addr]string{}}
}

// Machine returns a handle to the machine with that name, which is made at the
// first call. A handle is what a process has: a closed one does nothing any more,
// and the next one finds the machine as it was left.
func (n *Network) Machine(name string) *Net {
	n.mu.Lock()
	defer n.mu.Unlock()
	m := n.machines[name]
	if m == nil {
		m = &machine{name: name, addrs: map[netip.Addr]*held{}, sockets: map[netip.Addr][]vip.Socket{}, hooks: map[Kind]Hook{}}
		n.machines[name] = m
	}
	return &Net{n: n, m: m}
}

// Log returns what was done so far, in order.
func (n *Network) Log() []Op {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.ops)
}

// Lines is Log as text, one operation per line.
func (n *Network) Lines() string {
	var b strings.Builder
	for _, o := range n.Log() {
		fmt.Fprintln(&b, o)
	}
	return b.String()
}

// Violations returns what happened that must never happen: an address at two
// machines that reach the network, one added where connections of it remained, an
// announcement of an absent address, a tickle before the announcement.
func (n *Network) Violations() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.violations)
}

// Owners returns the machines that have the address, sorted, isolated ones too.
func (n *Network) Owners(addr netip.Addr) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.owners(addr, true)
}

func (n *Network) owners(addr netip.Addr, isolated bool) (out []string) {
	for name, m := range n.machines {
		if m.addrs[addr] != nil && (isolated || !m.cut) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// Reaches returns the machine that clients' packets to the address arrive at: the
// last one that announced it, if it still has it and is not isolated; else "".
func (n *Network) Reaches(addr netip.Addr) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	m := n.machines[n.announced[addr]]
	if m == nil || m.cut || m.addrs[addr] == nil {
		return ""
	}
	return m.name
}

func (n *Network) violate(format string, args ...any) {
	n.violations = append(n.violations, fmt.Sprintf(format, args...))
}

// unique records a violation if the address is at several machines.
func (n *Network) unique(addr netip.Addr) {
	if o := n.owners(addr, false); len(o) > 1 {
		n.violate("%s is at %s", addr, strings.Join(o, " and "))
	}
}

// Net is a process's vip.Net on one machine.
type Net struct {
	n      *Network
	m      *machine
	closed bool // under n.mu
}

var _ vip.Net = (*Net)(nil)

// On sets the hook of an operation on the machine; nil takes it away.
func (v *Net) On(k Kind, h Hook) {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	v.m.hooks[k] = h
}

// Fail makes the next times calls of an operation on the machine fail with err.
func (v *Net) Fail(k Kind, err error, times int) {
	var mu sync.Mutex
	v.On(k, func(context.Context, netip.Addr) error {
		mu.Lock()
		defer mu.Unlock()
		if times <= 0 {
			return nil
		}
		times--
		return err
	})
}

// SetSockets sets the sockets that the machine has of an address.
func (v *Net) SetSockets(addr netip.Addr, s ...vip.Socket) {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	v.m.sockets[addr] = slices.Clone(s)
}

// Give gives the machine an address as somebody else would: Added does not list it.
func (v *Net) Give(a vip.Address) {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	v.m.addrs[a.Prefix.Addr()] = &held{Address: a}
	v.n.unique(a.Prefix.Addr())
}

// Isolate cuts the machine off the network, or plugs it in again.
func (v *Net) Isolate(cut bool) {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	v.m.cut = cut
	for _, a := range slices.SortedFunc(maps.Keys(v.m.addrs), netip.Addr.Compare) {
		v.n.unique(a)
	}
}

// PowerOff takes everything from the machine that does not survive a boot.
func (v *Net) PowerOff() {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	clear(v.m.addrs)
	clear(v.m.sockets)
	v.m.tickled = nil
}

// Tickled returns the connections that Tickle was called with on the machine.
func (v *Net) Tickled() []vip.Conn {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	return slices.Clone(v.m.tickled)
}

var errClosed = errors.New("viptest: closed")

// do runs an operation: its hook, then its effect under the network's lock.
func (v *Net) do(ctx context.Context, k Kind, addr netip.Addr, effect func() (int, error)) error {
	v.n.mu.Lock()
	hook, closed := v.m.hooks[k], v.closed
	v.n.mu.Unlock()
	var err error
	switch {
	case closed:
		err = errClosed
	case hook != nil:
		err = hook(ctx, addr)
	}
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	count := 0
	if err == nil {
		count, err = effect()
	}
	if err != nil || k != Has && k != Check && k != Sockets && k != Added {
		v.n.ops = append(v.n.ops, Op{v.m.name, k, addr, count, err})
	}
	if err != nil {
		return fmt.Errorf("viptest: %s: %s %s: %w", v.m.name, k, addr, err)
	}
	return nil
}

// Has implements vip.Net.
func (v *Net) Has(addr netip.Addr) (has bool, err error) {
	err = v.do(context.Background(), Has, addr, func() (int, error) {
		has = v.m.addrs[addr] != nil
		return 0, nil
	})
	return has, err
}

// Check implements vip.Net. Nothing is ever in the way but a hook.
func (v *Net) Check(a vip.Address) error {
	return v.do(context.Background(), Check, a.Prefix.Addr(), func() (int, error) { return 0, nil })
}

// Add implements vip.Net.
func (v *Net) Add(ctx context.Context, a vip.Address) error {
	addr := a.Prefix.Addr()
	return v.do(ctx, Add, addr, func() (int, error) {
		if err := context.Cause(ctx); err != nil {
			return 0, err
		}
		if v.m.addrs[addr] != nil {
			return 0, nil
		}
		for _, s := range v.m.sockets[addr] {
			if connected(s) {
				v.n.violate("%s is added at %s, which has a stale socket of it: %s to %s %s", addr, v.m.name, s.Local, s.Remote, s.State)
			}
		}
		v.m.addrs[addr] = &held{Address: a, ours: true}
		v.n.unique(addr)
		return 0, nil
	})
}

// connected tells sockets that Destroy destroys.
func connected(s vip.Socket) bool { return s.Network == "tcp" && s.State != "LISTEN" }

// Remove implements vip.Net. As the real one it works after ctx has ended.
func (v *Net) Remove(ctx context.Context, a vip.Address) error {
	addr := a.Prefix.Addr()
	return v.do(ctx, Remove, addr, func() (int, error) {
		delete(v.m.addrs, addr)
		return 0, nil
	})
}

// Announce implements vip.Net.
func (v *Net) Announce(a vip.Address) error {
	addr := a.Prefix.Addr()
	return v.do(context.Background(), Announce, addr, func() (int, error) {
		h := v.m.addrs[addr]
		if h == nil {
			v.n.violate("%s is announced by %s, which does not have it", addr, v.m.name)
			return 0, errors.New("the machine does not have it")
		}
		h.announced = true
		if !v.m.cut {
			v.n.announced[addr] = v.m.name
		}
		return 0, nil
	})
}

// Sockets implements vip.Net.
func (v *Net) Sockets(addr netip.Addr) (out []vip.Socket, err error) {
	err = v.do(context.Background(), Sockets, addr, func() (int, error) {
		out = slices.Clone(v.m.sockets[addr])
		return 0, nil
	})
	return out, err
}

// Destroy implements vip.Net.
func (v *Net) Destroy(ctx context.Context, addr netip.Addr) (count int, err error) {
	err = v.do(ctx, Destroy, addr, func() (int, error) {
		before := v.m.sockets[addr]
		left := slices.DeleteFunc(slices.Clone(before), connected)
		v.m.sockets[addr] = left
		count = len(before) - len(left)
		return count, nil
	})
	return count, err
}

// Tickle implements vip.Net.
func (v *Net) Tickle(a vip.Address, conns []vip.Conn) error {
	addr := a.Prefix.Addr()
	return v.do(context.Background(), Tickle, addr, func() (int, error) {
		if h := v.m.addrs[addr]; h == nil || !h.announced {
			v.n.violate("%s tickles clients of %s before it has announced it", v.m.name, addr)
		}
		for _, c := range conns {
			if c.Local.Addr() != addr {
				return 0, fmt.Errorf("%s to %s is no connection of the address", c.Local, c.Remote)
			}
		}
		v.m.tickled = append(v.m.tickled, conns...)
		return len(conns), nil
	})
}

// Added implements vip.Net.
func (v *Net) Added() (out []vip.Address, err error) {
	err = v.do(context.Background(), Added, netip.Addr{}, func() (int, error) {
		for _, a := range slices.SortedFunc(maps.Keys(v.m.addrs), netip.Addr.Compare) {
			if h := v.m.addrs[a]; h.ours {
				out = append(out, h.Address)
			}
		}
		return 0, nil
	})
	return out, err
}

// Close implements vip.Net.
func (v *Net) Close() error {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	v.closed = true
	return nil
}
