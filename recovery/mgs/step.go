package mgs

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"github.com/baton-nfs/baton/recovery/wire"
)

// The steps. A step that returns an error has changed nothing.

func (s *state) startClient(rnd io.Reader, node string) (wire.ClientID, uint64, error) {
	c, known := fsClient{s.Client, s.Generation}, true
	if node != "" {
		if err := checkNode(node); err != nil {
			return wire.ClientID{}, 0, err
		}
		if c, known = s.Clients[node]; !known {
			if len(s.Clients) >= maxNodes {
				return wire.ClientID{}, 0, &Error{Code: CodeLimit, Text: fmt.Sprintf("there are %d nodes, node %s is too many", maxNodes, node)}
			}
			var err error
			if c.ID, err = random(rnd, len(wire.ClientID{})); err != nil {
				return wire.ClientID{}, 0, err
			}
		}
	}
	if c.Generation >= maxCount {
		return wire.ClientID{}, 0, &Error{Code: CodeLimit, Text: fmt.Sprintf("the generation of node %q cannot rise further", node)}
	}
	c.Generation++
	switch {
	case node == "":
		s.Generation = c.Generation
	case s.Clients == nil:
		s.Clients = map[string]fsClient{node: c}
	default:
		s.Clients[node] = c
	}
	return c.clientID(), c.Generation, nil
}

func (c *fsClient) clientID() (id wire.ClientID) {
	b, _ := hex.DecodeString(c.ID)
	copy(id[:], b)
	return id
}

func (s *state) serve(rnd io.Reader, addr netip.Addr, node string) (VIP, error) {
	if err := checkAddr(addr); err != nil {
		return VIP{}, err
	}
	if node != "" {
		if err := checkNode(node); err != nil {
			return VIP{}, err
		}
	}
	i := s.at(addr)
	if i < 0 {
		v, err := s.newVIP(rnd, addr)
		if err != nil {
			return VIP{}, err
		}
		v.Node = node
		s.VIPs = append(s.VIPs, v)
		s.NextIndex++
		return v, nil
	}
	v := s.VIPs[i]
	if v.Bits != 0 {
		return VIP{}, &Error{Code: CodeExists, Text: fmt.Sprintf(
			"%s is a floating address: take it out of nfs.addresses here, or remove it from the registry with `baton vip remove %s`", addr, addr)}
	}
	if v.Node != "" && v.Node != node && !v.Clean {
		return VIP{}, &Error{Code: CodeServed, Node: v.Node, Text: fmt.Sprintf(
			"%s is served by node %s (epoch %d): stop baton there, or take the address out of nfs.addresses here; if that node is gone for good, `baton vip remove %s --force` on another one says so", addr, v.Node, v.Epoch, addr)}
	}
	crashed, err := v.begin(node)
	if err != nil {
		return VIP{}, err
	}
	s.VIPs[i] = v
	v.Crashed = crashed
	return v, nil
}

// at is where the address is in the list, -1 if it is not.
func (s *state) at(addr netip.Addr) int {
	return slices.IndexFunc(s.VIPs, func(v VIP) bool { return v.Addr == addr })
}

// newVIP makes the entry of an address, with the next index.
func (s *state) newVIP(rnd io.Reader, addr netip.Addr) (VIP, error) {
	if len(s.VIPs) >= maxVIPs || s.NextIndex == 1<<32-1 {
		return VIP{}, &Error{Code: CodeLimit, Text: fmt.Sprintf("there are %d service addresses, %s is too many", len(s.VIPs), addr)}
	}
	ver, err := random(rnd, 8)
	if err != nil {
		return VIP{}, err
	}
	return VIP{Index: s.NextIndex, Addr: addr, Epoch: 1, Verifier: ver, NSMState: 1}, nil
}

// begin begins a period of service by node.
func (v *VIP) begin(node string) (crashed bool, err error) {
	if v.Epoch >= maxCount {
		return false, &Error{Code: CodeLimit, Text: fmt.Sprintf("the epoch of %s cannot rise further", v.Addr)}
	}
	crashed = !v.Clean
	switch {
	case v.NSMState == 0:
		v.NSMState = 1
	case crashed:
		if err := v.raiseNSM(); err != nil {
			return false, err
		}
	}
	v.Epoch++
	v.Clean, v.Node = false, node
	return crashed, nil
}

func (v *VIP) raiseNSM() error {
	if v.NSMState > maxNSMState-2 {
		return &Error{Code: CodeLimit, Text: fmt.Sprintf("the NSM state of %s cannot rise above %d", v.Addr, v.NSMState)}
	}
	v.NSMState += 2
	return nil
}

func (s *state) find(index uint32) (*VIP, error) {
	i, ok := slices.BinarySearchFunc(s.VIPs, index, func(v VIP, index uint32) int { return cmp.Compare(v.Index, index) })
	if !ok {
		return nil, &Error{Code: CodeNoVIP, Text: fmt.Sprintf("there is no VIP %d", index)}
	}
	return &s.VIPs[i], nil
}

// period finds the VIP whose present period of service has the epoch.
func (s *state) period(index uint32, epoch uint64) (*VIP, error) {
	v, err := s.find(index)
	if err == nil && v.Epoch != epoch {
		err = &Error{Code: CodeSuperseded, Text: fmt.Sprintf("epoch %d of %s is over, now it is %d", epoch, v.Addr, v.Epoch)}
	}
	return v, err
}

func (s *state) stopped(index uint32, epoch uint64) error {
	v, err := s.period(index, epoch)
	if err == nil {
		v.Clean = true
		v.ended()
	}
	return err
}

func (s *state) abandoned(index uint32, epoch uint64) error {
	v, err := s.period(index, epoch)
	if err == nil && !v.Clean {
		v.Node = ""
		v.ended()
	}
	return err
}

func (s *state) raiseNSM(index uint32, epoch uint64, above uint32) (VIP, error) {
	p, err := s.period(index, epoch)
	if err != nil {
		return VIP{}, err
	}
	if above > maxNSMState {
		return VIP{}, invalid("NSM state %d of %s is none", above, p.Addr)
	}
	v := *p
	if v.NSMState == 0 || v.NSMState < above {
		// The highest odd state that is not above it; raiseNSM passes it.
		v.NSMState = max(above, 1) - (max(above, 1)+1)%2
	}
	if err := v.raiseNSM(); err != nil {
		return VIP{}, err
	}
	*p = v
	return v, nil
}

func (s *state) newVerifiers(rnd io.Reader, node string, indexes []uint32) ([]VIP, error) {
	var at []*VIP
	for _, x := range indexes {
		v, err := s.find(x)
		if err != nil {
			return nil, err
		}
		if v.Node != node && v.Node != "" {
			return nil, &Error{Code: CodeServed, Node: v.Node, Text: fmt.Sprintf("the write verifier of %s is that of node %s", v.Addr, v.Node)}
		}
		at = append(at, v)
	}
	if len(indexes) == 0 {
		for i := range s.VIPs {
			if v := &s.VIPs[i]; v.Node == node || v.Node == "" {
				at = append(at, v)
			}
		}
	}
	vers := make([]string, len(at))
	for i := range vers {
		var err error
		if vers[i], err = random(rnd, 8); err != nil {
			return nil, err
		}
	}
	l := make([]VIP, len(at))
	for i, v := range at {
		v.Verifier = vers[i]
		l[i] = *v
	}
	return l, nil
}

func (s *state) setOSTs(n int) error {
	if n < 0 || n > maxOSTs {
		return invalid("%d OSTs are not possible", n)
	}
	s.OSTs = max(s.OSTs, n)
	return nil
}

func (s *state) made(target string) (bool, error) {
	if err := checkTarget(target); err != nil {
		return false, err
	}
	_, ok := slices.BinarySearch(s.Made, target)
	return ok, nil
}

func (s *state) setMade(target string) error {
	if err := checkTarget(target); err != nil {
		return err
	}
	i, ok := slices.BinarySearch(s.Made, target)
	switch {
	case ok:
		return nil
	case len(s.Made) >= maxMade:
		return &Error{Code: CodeLimit, Text: fmt.Sprintf("there are %d targets, %s is too many", maxMade, target)}
	}
	s.Made = slices.Insert(s.Made, i, target)
	return nil
}

func (s *state) agree(name, value string) (string, error) {
	switch v, ok := s.Agreed[name]; {
	case ok:
		return v, nil
	case checkTarget(name) != nil:
		return "", checkTarget(name)
	case len(value) > maxValue:
		return "", invalid("the value of %s has %d bytes, more than %d", name, len(value), maxValue)
	case len(s.Agreed) >= maxAgreed:
		return "", &Error{Code: CodeLimit, Text: fmt.Sprintf("%d values are agreed on, %s is too many", maxAgreed, name)}
	case s.Agreed == nil:
		s.Agreed = map[string]string{}
	}
	s.Agreed[name] = value
	return value, nil
}

// apply executes a changing call of another node, once: a copy of the
// session's last call gets the answer of the first, an older one is refused. A
// refusal is an answer as well: a copy of a refused call must not take effect
// when its sender no longer waits for it. The error is of a call that has no
// answer, and nothing was changed then.
func (s *state) apply(rnd io.Reader, c *call) (reply []byte, err error) {
	l := s.Sessions[c.Node]
	i := slices.IndexFunc(l, func(x session) bool { return x.ID == c.Session })
	switch {
	case i >= 0 && l[i].Seq == c.Seq:
		// The document's layout has indented it.
		var b bytes.Buffer
		err := json.Compact(&b, l[i].Reply)
		return b.Bytes(), err
	case i >= 0 && l[i].Seq > c.Seq:
		return nil, &Error{Code: CodeLate, Text: fmt.Sprintf("call %d of node %s comes after call %d", c.Seq, c.Node, l[i].Seq)}
	case len(l) == 0 && len(s.Sessions) >= maxNodes:
		return nil, &Error{Code: CodeLimit, Text: fmt.Sprintf("%d nodes have called, node %s is too many", maxNodes, c.Node)}
	}
	result, err := c.method.run(s, rnd, c.Node, c.Args)
	var e *Error
	if err != nil && !errors.As(err, &e) {
		return nil, err
	}
	if reply, err = encodeReply(result, e); err != nil {
		return nil, err
	}
	if i >= 0 {
		l = slices.Delete(l, i, i+1)
	}
	if len(l) >= maxSessions {
		l = slices.Delete(l, 0, len(l)-maxSessions+1)
	}
	if s.Sessions == nil {
		s.Sessions = map[string][]session{}
	}
	s.Sessions[c.Node] = append(l, session{ID: c.Session, Seq: c.Seq, Reply: json.RawMessage(reply)})
	return reply, nil
}
