package mgs

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Limits of the document, which is rewritten as a whole with every change.
const (
	maxDocument = 16 << 20 // bytes
	maxVIPs     = 1024
	maxNodes    = 256
	maxZone     = 64 // bytes of an IPv6 zone
	maxSessions = 8  // of one node
	maxOSTs     = 1 << 16
	maxMade     = 2048
	maxAgreed   = 64
	maxValue    = 256 // bytes of what was agreed on
	maxPrefer   = 32  // nodes
	// maxInterface is the length of an interface's name (Linux IFNAMSIZ, less its zero).
	maxInterface = 15
	// maxNSMState is the highest state number: the protocol's int has 31 bits for it.
	maxNSMState = 1<<31 - 1
	// maxCount bounds numbers that rise by 1.
	maxCount = 1 << 62
)

// Formats of the document. Format 1 is that of a node that is alone. The lowest
// that has what is needed is written, so that earlier programs can read it. Format 3
// is needed once an address floats, for good (VIP.MoveID), and while nodes are drained.
const (
	formatAlone    = 1
	formatCluster  = 2
	formatFloating = 3
)

// state is the document.
type state struct {
	Format int `json:"format"`
	// Client and Generation are of the node that is alone.
	Client     string `json:"client"` // UUID, hex
	Generation uint64 `json:"generation"`
	NextIndex  uint32 `json:"next_index"`
	VIPs       []VIP  `json:"vips"`
	// OSTs is how many object targets belong to the store, once it has been made.
	OSTs int `json:"osts,omitempty"`

	// Made are the targets of several nodes that were made, sorted.
	Made []string `json:"made,omitempty"`
	// Agreed is what Agree has fixed.
	Agreed map[string]string `json:"agreed,omitempty"`

	// Drained are the nodes that are to have no floating addresses, sorted.
	Drained []string `json:"drained,omitempty"`

	// Clients are the file system clients of the other nodes, by name.
	Clients map[string]fsClient `json:"clients,omitempty"`
	// Sessions of other nodes' calls, by name, the last used at the end.
	Sessions map[string][]session `json:"sessions,omitempty"`
}

type fsClient struct {
	ID         string `json:"id"` // UUID, hex
	Generation uint64 `json:"generation"`
}

// session is a sequence of calls by one process of a node. A call is executed
// at most once, because its number and its answer are kept with the change that
// it made.
type session struct {
	ID    string          `json:"id"`
	Seq   uint64          `json:"seq"`   // of the last call
	Reply json.RawMessage `json:"reply"` // to it
}

func random(rnd io.Reader, n int) (string, error) {
	b := make([]byte, n)
	if _, err := io.ReadFull(rnd, b); err != nil {
		return "", fmt.Errorf("mgs: random bytes: %w", err)
	}
	return hex.EncodeToString(b), nil
}

// newState makes the document of a new service.
func newState(rnd io.Reader) (*state, error) {
	id, err := random(rnd, len(wire.ClientID{}))
	if err != nil {
		return nil, err
	}
	return &state{NextIndex: 1, Client: id}, nil
}

func (s *state) encode() ([]byte, error) {
	s.Format = formatAlone
	if len(s.Clients) > 0 || len(s.Sessions) > 0 || len(s.Made) > 0 || len(s.Agreed) > 0 {
		s.Format = formatCluster
	}
	for i := range s.VIPs {
		switch v := &s.VIPs[i]; {
		case v.Bits != 0 || v.MoveID != 0:
			s.Format = formatFloating
		case v.Node != "":
			s.Format = max(s.Format, formatCluster)
		}
	}
	if len(s.Drained) > 0 {
		s.Format = formatFloating
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("mgs: encode the registry: %w", err)
	}
	return append(b, '\n'), nil
}

// decode reads a document; name is its place in messages. A damaged one is an
// error: to go on with invented epochs could let an old owner write.
func decode(name string, b []byte) (*state, error) {
	var f struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("mgs: %s is damaged (%w): restore it from a backup", name, err)
	}
	if f.Format < formatAlone || f.Format > formatFloating {
		return nil, fmt.Errorf("mgs: %s has format %d, this program knows %d to %d: use the newer program", name, f.Format, formatAlone, formatFloating)
	}
	s := &state{}
	if err := unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("mgs: %s is damaged (%w): restore it from a backup", name, err)
	}
	if what := s.damage(); what != "" {
		return nil, fmt.Errorf("mgs: %s has a damaged %s: restore it from a backup", name, what)
	}
	return s, nil
}

// unmarshal decodes one JSON value of known fields, and nothing after it.
func unmarshal(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the JSON value")
	}
	return nil
}

// damage names what cannot be right, or is empty.
func (s *state) damage() string {
	if !isHex(s.Client, len(wire.ClientID{})) || s.Generation > maxCount {
		return "client id"
	}
	if s.NextIndex == 0 {
		return "next index"
	}
	if s.OSTs < 0 || s.OSTs > maxOSTs {
		return "number of OSTs"
	}
	index, addr := uint32(0), make(map[netip.Addr]bool, len(s.VIPs))
	for i := range s.VIPs {
		v := &s.VIPs[i]
		switch {
		case v.Index <= index || v.Index >= s.NextIndex:
			return fmt.Sprintf("index %d of %s", v.Index, v.Addr)
		case checkAddr(v.Addr) != nil || addr[v.Addr]:
			return fmt.Sprintf("address %s", v.Addr)
		case v.NSMState > maxNSMState || v.NSMState != 0 && v.NSMState%2 == 0:
			return fmt.Sprintf("NSM state %d of %s", v.NSMState, v.Addr)
		case v.Epoch == 0 || v.Epoch > maxCount:
			return fmt.Sprintf("epoch of %s", v.Addr)
		case !isHex(v.Verifier, 8):
			return fmt.Sprintf("verifier of %s", v.Addr)
		case v.Node != "" && checkNode(v.Node) != nil:
			return fmt.Sprintf("node of %s", v.Addr)
		}
		if what := v.damage(); what != "" {
			return fmt.Sprintf("%s of %s", what, v.Addr)
		}
		index, addr[v.Addr] = v.Index, true
	}
	if len(s.Made) > maxMade || !slices.IsSorted(s.Made) || slices.ContainsFunc(s.Made, func(t string) bool { return checkTarget(t) != nil }) {
		return "list of targets"
	}
	if len(s.Drained) > maxNodes || !strictlySorted(s.Drained) || slices.ContainsFunc(s.Drained, func(n string) bool { return checkNode(n) != nil }) {
		return "list of drained nodes"
	}
	for n, v := range s.Agreed {
		if checkTarget(n) != nil || len(v) > maxValue {
			return fmt.Sprintf("agreement on %q", n)
		}
	}
	for n, c := range s.Clients {
		if checkNode(n) != nil || !isHex(c.ID, len(wire.ClientID{})) || c.Generation > maxCount {
			return fmt.Sprintf("client of node %q", n)
		}
	}
	for n, l := range s.Sessions {
		ok := checkNode(n) == nil
		for i := range l {
			ok = ok && checkSession(l[i].ID) == nil && len(l[i].Reply) > 0
		}
		if !ok {
			return fmt.Sprintf("session of node %q", n)
		}
	}
	return ""
}

func strictlySorted(l []string) bool {
	for i := range l {
		if i > 0 && l[i-1] >= l[i] {
			return false
		}
	}
	return true
}

// damage names what of a floating address cannot be right, or is empty.
func (v *VIP) damage() string {
	switch {
	case v.MoveID > maxCount:
		return "number of moves"
	case v.Bits == 0:
		if v.Interface != "" || len(v.Prefer) > 0 || v.Next != "" || v.Ready || v.Drained || v.Removed {
			return "prefix length"
		}
	case v.spec().check() != nil:
		return "setting"
	case v.Next != "" && (checkNode(v.Next) != nil || v.Drained || v.Removed):
		return "next node"
	case v.Ready && v.Next == "":
		return "readiness"
	}
	return ""
}

// isHex tells whether s are n bytes in hex.
func isHex(s string, n int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == n
}

func invalid(format string, args ...any) *Error {
	return &Error{Code: CodeInvalid, Text: fmt.Sprintf(format, args...)}
}

func checkNode(name string) error {
	if !ir.ValidName(name) {
		return invalid("%.80q is not a node name", name)
	}
	return nil
}

func checkTarget(name string) error {
	if !ir.ValidName(name) {
		return invalid("%.80q is not a name", name)
	}
	return nil
}

func checkAddr(a netip.Addr) error {
	if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || len(a.Zone()) > maxZone {
		return invalid("%.80q is not a service address", a)
	}
	return nil
}

func checkSession(id string) error {
	if !isHex(id, sessionIDSize) {
		return invalid("%.80q is not a session", id)
	}
	return nil
}
