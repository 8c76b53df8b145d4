package mgs

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// Floating is the part of the registry that has to do with addresses that move.
// What applies to Registry's methods applies to these.
//
// A move has three steps: Assign names the next owner; that one opens its
// listeners and says so (SetReady); the present one gives the address up and says
// so (Stopped), or is declared gone (Abandoned); then the next owner begins its
// period of service (Take).
type Floating interface {
	// AddVIP enters a floating address. One that is there already with the same
	// settings is returned as it is; with others it is refused with CodeExists. An
	// address that a node has by its configuration may be entered when it is not served.
	AddVIP(ctx context.Context, s VIPSpec) (VIP, error)
	// SetVIP changes the settings of a floating address, which is found by s.Addr. If they
	// are others than s.Was it is refused with CodeChanged.
	SetVIP(ctx context.Context, s VIPSpec) (VIP, error)
	// RemoveVIP marks an address as to be given up; it is forgotten, except for its
	// index, epoch and MoveID, when it was (Stopped, Abandoned): then Bits is 0. Assign
	// is refused from then on.
	RemoveVIP(ctx context.Context, index uint32) (VIP, error)
	// Assign names the node that is to serve the address ("": nobody), and by epoch
	// the period of service in which that was decided. A node that it is assigned to
	// already is no change; the node that serves it ends a move that has not begun.
	// MoveID rises with every change. A node that may not serve it is refused with
	// CodeInvalid, a node or address that is drained with CodeDrained.
	Assign(ctx context.Context, index uint32, epoch uint64, node string) (VIP, error)
	// SetReady tells that the node of the assignment with this MoveID listens. Of
	// another assignment than the present one it is refused with CodeMoved.
	SetReady(ctx context.Context, index uint32, moveID uint64) (VIP, error)
	// Take begins a period of service of the assigned node, as Serve does, if the one
	// before has ended: CodeServed if it has not, also if the node is the same one
	// (a process that has started anew ends its former life's by Abandoned), CodeMoved
	// if the assignment is another one.
	Take(ctx context.Context, index uint32, moveID uint64) (VIP, error)
	// SetDrained marks a node as one that is to have no addresses, or takes the mark
	// away. Addresses that it has, or that are assigned to it, stay until they are
	// assigned to another node.
	SetDrained(ctx context.Context, node string, drained bool) error
	// Watch returns the addresses and drained nodes as soon as the revision is
	// another one than rev, or after some seconds as they are. Revisions have no
	// order. rev "" returns at once.
	Watch(ctx context.Context, rev string) (View, error)
}

// VIPSpec are the settings of a floating address.
type VIPSpec struct {
	Addr netip.Addr `json:"addr"`
	// Bits is the length of the network's prefix, from 1.
	Bits int `json:"bits"`
	// Interface has the address on every node; empty: the one with the network.
	Interface string `json:"interface,omitempty"`
	// Prefer are the nodes that may serve the address, the best first; none: any.
	Prefer []string `json:"prefer,omitempty"`
	// Drained: nobody is to serve the address. Setting it takes the assignment away,
	// so that the owner stops in order. It does not count for AddVIP's comparison.
	Drained bool `json:"drained,omitempty"`
	// Was, of SetVIP, are the settings that these were made from; nil: whatever they are.
	Was *VIPSpec `json:"was,omitempty"`
}

// same tells whether the settings are the same, Was and Drained left aside.
func (s *VIPSpec) same(t *VIPSpec) bool {
	return s.Bits == t.Bits && s.Interface == t.Interface && slices.Equal(s.Prefer, t.Prefer)
}

// View is what all nodes have to know of floating addresses.
type View struct {
	Rev     string   `json:"rev"`
	VIPs    []VIP    `json:"vips"`    // all, fixed ones too
	Drained []string `json:"drained"` // nodes, sorted
}

// check tells why the settings are none.
func (s VIPSpec) check() error {
	if err := checkAddr(s.Addr); err != nil {
		return err
	}
	switch {
	case s.Addr.Zone() != "":
		return invalid("%s: name the interface by itself, not in the address", s.Addr)
	case s.Bits < 1 || s.Bits > s.Addr.BitLen():
		return invalid("%s: the prefix has %d bits, not 1 to %d", s.Addr, s.Bits, s.Addr.BitLen())
	case len(s.Interface) > maxInterface || strings.ContainsFunc(s.Interface, func(r rune) bool { return r <= ' ' || r == '/' || r > '~' }):
		return invalid("%s: %.40q is not an interface", s.Addr, s.Interface)
	case len(s.Prefer) > maxPrefer:
		return invalid("%s: %d nodes are preferred, more than %d", s.Addr, len(s.Prefer), maxPrefer)
	}
	for i, n := range s.Prefer {
		if err := checkNode(n); err != nil {
			return err
		}
		if slices.Contains(s.Prefer[:i], n) {
			return invalid("%s: node %s is preferred twice", s.Addr, n)
		}
	}
	return nil
}

// spec are the settings of a floating address.
func (v *VIP) spec() VIPSpec {
	return VIPSpec{Addr: v.Addr, Bits: v.Bits, Interface: v.Interface, Prefer: v.Prefer, Drained: v.Drained}
}

// Spec are the settings of a floating address.
func (v *VIP) Spec() VIPSpec {
	s := v.spec()
	s.Prefer = slices.Clone(s.Prefer)
	return s
}

func (v *VIP) set(s VIPSpec) {
	v.Bits, v.Interface, v.Drained = s.Bits, s.Interface, s.Drained
	if v.Prefer = nil; len(s.Prefer) > 0 {
		v.Prefer = slices.Clone(s.Prefer)
	}
}

// Free tells that no period of service of the address is under way, so that the node
// it is assigned to may begin one.
func (v *VIP) Free() bool { return v.Clean || v.Node == "" }

// assign names the next owner.
func (v *VIP) assign(node string) error {
	if v.MoveID >= maxCount {
		return &Error{Code: CodeLimit, Text: fmt.Sprintf("the number of moves of %s cannot rise further", v.Addr)}
	}
	v.MoveID++
	v.Next, v.Ready = node, false
	return nil
}

// ended forgets the settings of an address that was to be removed, when it was given up.
func (v *VIP) ended() {
	if v.Removed {
		v.forget()
	}
}

func (v *VIP) forget() {
	v.Bits, v.Interface, v.Prefer, v.Next = 0, "", nil, ""
	v.Ready, v.Drained, v.Removed = false, false, false
}

func (s *state) addVIP(rnd io.Reader, spec VIPSpec) (VIP, error) {
	if err := spec.check(); err != nil {
		return VIP{}, err
	}
	i := s.at(spec.Addr)
	if i < 0 {
		v, err := s.newVIP(rnd, spec.Addr)
		if err != nil {
			return VIP{}, err
		}
		// Nobody has served it, which is an orderly state.
		v.Clean = true
		v.set(spec)
		s.VIPs = append(s.VIPs, v)
		s.NextIndex++
		return v, nil
	}
	v := &s.VIPs[i]
	have := v.spec()
	switch {
	case v.Removed:
		return VIP{}, &Error{Code: CodeExists, Text: fmt.Sprintf(
			"%s is being removed: wait until node %s has given it up; if that node is gone, say so with `baton vip remove %s --force`", v.Addr, v.Node, v.Addr)}
	case v.Bits != 0 && have.same(&spec):
		return *v, nil
	case v.Bits != 0:
		return VIP{}, &Error{Code: CodeExists, Text: fmt.Sprintf("%s is there with other settings: change them with `baton vip set`", v.Addr)}
	case !v.Free():
		return VIP{}, &Error{Code: CodeServed, Node: v.Node, Text: fmt.Sprintf(
			"%s is served by node %s, which has it in nfs.addresses: take it out there and restart baton in order; if that node is gone for good, say so with `baton vip remove %s --force`", v.Addr, v.Node, v.Addr)}
	}
	v.set(spec)
	return *v, nil
}

// floating finds a floating address by index.
func (s *state) floating(index uint32) (*VIP, error) {
	v, err := s.find(index)
	if err == nil && v.Bits == 0 {
		err = notFloating(v.Addr)
	}
	return v, err
}

func notFloating(a netip.Addr) error {
	return invalid("%s is not a floating address: a node has it in nfs.addresses, or it was removed; `baton vip add` adds one", a)
}

func (s *state) setVIP(spec VIPSpec) (VIP, error) {
	if err := spec.check(); err != nil {
		return VIP{}, err
	}
	i := s.at(spec.Addr)
	switch {
	case i < 0:
		return VIP{}, &Error{Code: CodeNoVIP, Text: fmt.Sprintf("there is no address %s: `baton vip add` adds one", spec.Addr)}
	case s.VIPs[i].Bits == 0:
		return VIP{}, notFloating(spec.Addr)
	case s.VIPs[i].Removed:
		return VIP{}, invalid("%s is being removed", spec.Addr)
	}
	v := s.VIPs[i]
	if have := v.spec(); spec.Was != nil && (!have.same(spec.Was) || have.Drained != spec.Was.Drained) {
		return VIP{}, &Error{Code: CodeChanged, Text: fmt.Sprintf("somebody else has changed the settings of %s just now: see `baton vip list`, and try again", spec.Addr)}
	}
	if spec.Drained && v.Next != "" {
		if err := v.assign(""); err != nil {
			return VIP{}, err
		}
	}
	v.set(spec)
	s.VIPs[i] = v
	return v, nil
}

func (s *state) removeVIP(index uint32) (VIP, error) {
	p, err := s.floating(index)
	if err != nil {
		return VIP{}, err
	}
	v := *p
	if v.Next != "" {
		if err := v.assign(""); err != nil {
			return VIP{}, err
		}
	}
	v.Removed, v.Drained = true, false
	if v.Free() {
		v.forget()
		// From now on the document is one of floating addresses, whatever happens.
		v.MoveID = max(v.MoveID, 1)
	}
	*p = v
	return v, nil
}

func (s *state) assign(index uint32, epoch uint64, node string) (VIP, error) {
	if node != "" {
		if err := checkNode(node); err != nil {
			return VIP{}, err
		}
	}
	if _, err := s.floating(index); err != nil {
		return VIP{}, err
	}
	p, err := s.period(index, epoch)
	switch {
	case err != nil:
		return VIP{}, err
	case p.Removed:
		return VIP{}, invalid("%s is being removed", p.Addr)
	case p.Next == node:
		return *p, nil
	}
	if node != "" {
		if err := s.may(p, node); err != nil {
			return VIP{}, err
		}
	}
	v := *p
	if err := v.assign(node); err != nil {
		return VIP{}, err
	}
	*p = v
	return v, nil
}

// may tells why a node is not to serve the address. The one that does may stay whatever
// is said about it.
func (s *state) may(v *VIP, node string) error {
	_, drained := slices.BinarySearch(s.Drained, node)
	switch {
	case v.Drained:
		return &Error{Code: CodeDrained, Text: fmt.Sprintf("%s is drained: `baton vip undrain %s` first", v.Addr, v.Addr)}
	case !v.Free() && v.Node == node:
		return nil
	case drained:
		return &Error{Code: CodeDrained, Node: node, Text: fmt.Sprintf("node %s is drained: `baton node undrain %s` first", node, node)}
	case len(v.Prefer) > 0 && !slices.Contains(v.Prefer, node):
		return invalid("node %s may not serve %s, only %s: `baton vip set %s --prefer ...` changes that", node, v.Addr, strings.Join(v.Prefer, ", "), v.Addr)
	}
	return nil
}

// assignment finds the address whose present assignment has the number. by is the node
// that asks, "" in the process of the registry, where the number is enough.
func (s *state) assignment(index uint32, moveID uint64, by string) (*VIP, error) {
	v, err := s.floating(index)
	switch {
	case err != nil:
		return nil, err
	case v.MoveID != moveID:
		return nil, &Error{Code: CodeMoved, Text: fmt.Sprintf("%s was assigned anew: move %d is over, now it is %d", v.Addr, moveID, v.MoveID)}
	case v.Next == "":
		return nil, &Error{Code: CodeMoved, Text: fmt.Sprintf("%s is assigned to nobody", v.Addr)}
	case by != "" && by != v.Next:
		return nil, &Error{Code: CodeMoved, Text: fmt.Sprintf("%s is assigned to node %s, not %s", v.Addr, v.Next, by)}
	}
	return v, nil
}

func (s *state) setReady(index uint32, moveID uint64, by string) (VIP, error) {
	v, err := s.assignment(index, moveID, by)
	if err != nil {
		return VIP{}, err
	}
	if v.Free() || v.Node != v.Next {
		v.Ready = true // else it serves already
	}
	return *v, nil
}

func (s *state) take(index uint32, moveID uint64, by string) (VIP, error) {
	p, err := s.assignment(index, moveID, by)
	if err != nil {
		return VIP{}, err
	}
	if !p.Free() {
		return VIP{}, &Error{Code: CodeServed, Node: p.Node, Text: fmt.Sprintf(
			"%s is served by node %s (epoch %d), which has to give it up first", p.Addr, p.Node, p.Epoch)}
	}
	v := *p
	crashed, err := v.begin(v.Next)
	if err != nil {
		return VIP{}, err
	}
	v.Ready = false
	*p = v
	v.Crashed = crashed
	return v, nil
}

func (s *state) setDrained(node string, drained bool) error {
	if err := checkNode(node); err != nil {
		return err
	}
	i, is := slices.BinarySearch(s.Drained, node)
	switch {
	case is && !drained:
		s.Drained = slices.Delete(s.Drained, i, i+1)
	case !is && drained:
		if len(s.Drained) >= maxNodes {
			return &Error{Code: CodeLimit, Text: fmt.Sprintf("%d nodes are drained, node %s is too many", maxNodes, node)}
		}
		s.Drained = slices.Insert(s.Drained, i, node)
	}
	return nil
}

// view is what nodes watch; its slices are the document's.
func (s *state) view() (View, error) {
	v := View{VIPs: s.VIPs, Drained: s.Drained}
	b, err := json.Marshal(&v)
	if err != nil {
		return View{}, fmt.Errorf("mgs: encode VIPs: %w", err)
	}
	v.Rev = fmt.Sprintf("%016x", xxhash.Sum64(b))
	return v, nil
}

// clone makes a copy that has nothing in common with v.
func (v *View) clone() View {
	c := View{Rev: v.Rev, VIPs: slices.Clone(v.VIPs), Drained: slices.Clone(v.Drained)}
	for i := range c.VIPs {
		c.VIPs[i].Prefer = slices.Clone(c.VIPs[i].Prefer)
	}
	return c
}

// pageBytes bounds the VIPs in an answer, which has room for maxNodes drained nodes
// besides.
const pageBytes = 36 << 10

// pageOf lists VIPs of higher index than after, as many as an answer has room for.
func pageOf(all []VIP, after uint32) (l []VIP, more bool, err error) {
	i := slices.IndexFunc(all, func(v VIP) bool { return v.Index > after })
	if i < 0 {
		return nil, false, nil
	}
	l = all[i:]
	for n, size := 0, 0; n < len(l); n++ {
		b, err := json.Marshal(&l[n])
		if err != nil {
			return nil, false, fmt.Errorf("mgs: encode VIPs: %w", err)
		}
		if size += len(b) + 1; size > pageBytes && n > 0 || n == pageVIPs {
			return l[:n], true, nil
		}
	}
	return l, false, nil
}
