package mgs

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"

	"github.com/cespare/xxhash/v2"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Methods: OpRegistry's Name.
const (
	methodStartClient  = "start-client"
	methodServe        = "serve"
	methodStopped      = "stopped"
	methodAbandoned    = "abandoned"
	methodRaiseNSM     = "raise-nsm"
	methodNewVerifiers = "new-verifiers"
	methodVIPs         = "vips"
	methodOSTs         = "osts"
	methodSetOSTs      = "set-osts"
	methodMade         = "made"
	methodSetMade      = "set-made"
	methodIdentity     = "identity"
	methodAgree        = "agree"
	methodClients      = "clients"
	methodAddVIP       = "vip-add"
	methodSetVIP       = "vip-set"
	methodRemoveVIP    = "vip-remove"
	methodAssign       = "assign"
	methodSetReady     = "set-ready"
	methodTake         = "take"
	methodSetDrained   = "set-drained"
)

// call is OpRegistry's Data. Session and Seq are there in calls that change
// something; a session's numbers rise.
type call struct {
	Node    string          `json:"node"`
	Session string          `json:"session,omitempty"`
	Seq     uint64          `json:"seq,omitempty"`
	Args    json.RawMessage `json:"args"`

	method *method
}

// sessionIDSize is the size in bytes of call.Session, which is in hex.
const sessionIDSize = 8

// answer is Reply.Data; one of the two is there.
type answer struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  *Error          `json:"error,omitempty"`
}

func encodeReply(result any, refused *Error) ([]byte, error) {
	a := answer{Error: refused}
	if refused == nil {
		var err error
		if a.Result, err = json.Marshal(result); err != nil {
			return nil, fmt.Errorf("mgs: encode an answer: %w", err)
		}
	}
	b, err := json.Marshal(&a)
	if err != nil {
		return nil, fmt.Errorf("mgs: encode an answer: %w", err)
	}
	return b, nil
}

// Arguments and results.
type (
	none struct{}

	clientResult struct {
		ID         string `json:"id"` // hex
		Generation uint64 `json:"generation"`
	}
	serveArgs struct {
		Addr netip.Addr `json:"addr"`
	}
	vipResult struct {
		VIP     VIP  `json:"vip"`
		Crashed bool `json:"crashed,omitempty"`
	}
	periodArgs struct {
		Index uint32 `json:"index"`
		Epoch uint64 `json:"epoch"`
	}
	nsmArgs struct {
		Index uint32 `json:"index"`
		Epoch uint64 `json:"epoch"`
		Above uint32 `json:"above"`
	}
	// The caller asks for the new verifiers by methodVIPs: they would not always
	// fit into one answer.
	verifiersArgs struct {
		Indexes []uint32 `json:"indexes,omitempty"`
	}
	vipsArgs struct {
		After uint32 `json:"after"` // index
	}
	// vipsResult is a page. Pages of one Tag belong together.
	vipsResult struct {
		VIPs []VIP  `json:"vips"`
		Tag  uint64 `json:"tag"`
		More bool   `json:"more,omitempty"`
	}
	ostsValue struct {
		OSTs int `json:"osts"`
	}
	targetArgs struct {
		Target string `json:"target"`
	}
	madeResult struct {
		Made bool `json:"made"`
	}
	identityResult struct {
		ID string `json:"id"` // hex
	}
	agreeArgs struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	}
	agreeResult struct {
		Value string `json:"value"`
	}
	indexArgs struct {
		Index uint32 `json:"index"`
	}
	assignArgs struct {
		Index uint32 `json:"index"`
		Epoch uint64 `json:"epoch"`
		Node  string `json:"node"`
	}
	moveArgs struct {
		Index  uint32 `json:"index"`
		MoveID uint64 `json:"move_id"`
	}
	drainedArgs struct {
		Node    string `json:"node"`
		Drained bool   `json:"drained"`
	}
	// With the longest names there is room for maxNodes clients in an answer.
	clientsResult struct {
		Clients map[string]string `json:"clients"` // IDs in hex
	}
)

// pageVIPs is the number of VIPs in an answer. With the longest names they
// take less than wire.MaxData, but for those of floating addresses (pageBytes).
const pageVIPs = 128

// method is how a call is executed. run changes nothing when it returns an
// error; it may change s only if changes is set.
type method struct {
	changes bool
	run     func(s *state, rnd io.Reader, node string, args json.RawMessage) (any, error)
}

// bind makes the decoding of arguments part of a method.
func bind[A any](changes bool, fn func(s *state, rnd io.Reader, node string, a A) (any, error)) *method {
	return &method{changes, func(s *state, rnd io.Reader, node string, raw json.RawMessage) (any, error) {
		var a A
		if err := unmarshal(raw, &a); err != nil {
			return nil, invalid("arguments: %.200s", err)
		}
		return fn(s, rnd, node, a)
	}}
}

var methods = map[string]*method{
	methodStartClient: bind(true, func(s *state, rnd io.Reader, node string, _ none) (any, error) {
		id, gen, err := s.startClient(rnd, node)
		return clientResult{hex.EncodeToString(id[:]), gen}, err
	}),
	methodServe: bind(true, func(s *state, rnd io.Reader, node string, a serveArgs) (any, error) {
		v, err := s.serve(rnd, a.Addr, node)
		return vipResult{v, v.Crashed}, err
	}),
	methodStopped: bind(true, func(s *state, _ io.Reader, _ string, a periodArgs) (any, error) {
		return none{}, s.stopped(a.Index, a.Epoch)
	}),
	methodAbandoned: bind(true, func(s *state, _ io.Reader, _ string, a periodArgs) (any, error) {
		return none{}, s.abandoned(a.Index, a.Epoch)
	}),
	methodRaiseNSM: bind(true, func(s *state, _ io.Reader, _ string, a nsmArgs) (any, error) {
		v, err := s.raiseNSM(a.Index, a.Epoch, a.Above)
		return vipResult{VIP: v}, err
	}),
	methodNewVerifiers: bind(true, func(s *state, rnd io.Reader, node string, a verifiersArgs) (any, error) {
		_, err := s.newVerifiers(rnd, node, a.Indexes)
		return none{}, err
	}),
	methodVIPs: bind(false, func(s *state, _ io.Reader, _ string, a vipsArgs) (any, error) {
		return s.page(a.After)
	}),
	methodOSTs: bind(false, func(s *state, _ io.Reader, _ string, _ none) (any, error) {
		return ostsValue{s.OSTs}, nil
	}),
	methodSetOSTs: bind(true, func(s *state, _ io.Reader, _ string, a ostsValue) (any, error) {
		return none{}, s.setOSTs(a.OSTs)
	}),
	methodMade: bind(false, func(s *state, _ io.Reader, _ string, a targetArgs) (any, error) {
		made, err := s.made(a.Target)
		return madeResult{made}, err
	}),
	methodSetMade: bind(true, func(s *state, _ io.Reader, _ string, a targetArgs) (any, error) {
		return none{}, s.setMade(a.Target)
	}),
	methodIdentity: bind(false, func(s *state, _ io.Reader, _ string, _ none) (any, error) {
		return identityResult{s.Client}, nil
	}),
	methodClients: bind(false, func(s *state, _ io.Reader, _ string, _ none) (any, error) {
		r := clientsResult{Clients: make(map[string]string, len(s.Clients))}
		for n, c := range s.Clients {
			r.Clients[n] = c.ID
		}
		return r, nil
	}),
	methodAgree: bind(true, func(s *state, _ io.Reader, _ string, a agreeArgs) (any, error) {
		v, err := s.agree(a.Name, a.Value)
		return agreeResult{v}, err
	}),
	methodAddVIP: bind(true, func(s *state, rnd io.Reader, _ string, a VIPSpec) (any, error) {
		v, err := s.addVIP(rnd, a)
		return vipResult{VIP: v}, err
	}),
	methodSetVIP: bind(true, func(s *state, _ io.Reader, _ string, a VIPSpec) (any, error) {
		v, err := s.setVIP(a)
		return vipResult{VIP: v}, err
	}),
	methodRemoveVIP: bind(true, func(s *state, _ io.Reader, _ string, a indexArgs) (any, error) {
		v, err := s.removeVIP(a.Index)
		return vipResult{VIP: v}, err
	}),
	methodAssign: bind(true, func(s *state, _ io.Reader, _ string, a assignArgs) (any, error) {
		v, err := s.assign(a.Index, a.Epoch, a.Node)
		return vipResult{VIP: v}, err
	}),
	methodSetReady: bind(true, func(s *state, _ io.Reader, node string, a moveArgs) (any, error) {
		v, err := s.setReady(a.Index, a.MoveID, node)
		return vipResult{VIP: v}, err
	}),
	methodTake: bind(true, func(s *state, _ io.Reader, node string, a moveArgs) (any, error) {
		v, err := s.take(a.Index, a.MoveID, node)
		return vipResult{v, v.Crashed}, err
	}),
	methodSetDrained: bind(true, func(s *state, _ io.Reader, _ string, a drainedArgs) (any, error) {
		return none{}, s.setDrained(a.Node, a.Drained)
	}),
}

// page lists VIPs of higher index than after.
func (s *state) page(after uint32) (any, error) {
	all, err := json.Marshal(s.VIPs)
	if err != nil {
		return nil, fmt.Errorf("mgs: encode VIPs: %w", err)
	}
	p := vipsResult{VIPs: []VIP{}, Tag: xxhash.Sum64(all)}
	l, more, err := pageOf(s.VIPs, after)
	if err != nil {
		return nil, err
	}
	p.VIPs, p.More = append(p.VIPs, l...), more
	return p, nil
}

// decodeCall reads a request. Its error is for the log; the caller has broken
// the protocol.
func decodeCall(req *wire.Request) (*call, error) {
	m := methods[string(req.Name)]
	if m == nil {
		return nil, fmt.Errorf("method %.80q is unknown", req.Name)
	}
	c := &call{method: m}
	if err := unmarshal(req.Data, c); err != nil {
		return nil, fmt.Errorf("%s: %w", req.Name, err)
	}
	if err := checkNode(c.Node); err != nil {
		return nil, fmt.Errorf("%s: %w", req.Name, err)
	}
	if m.changes {
		if err := checkSession(c.Session); err != nil {
			return nil, fmt.Errorf("%s: %w", req.Name, err)
		}
		if c.Seq == 0 {
			return nil, fmt.Errorf("%s: the call has no number", req.Name)
		}
	}
	return c, nil
}

// decodeAnswer reads a reply's data into result; a refusal is the *Error returned.
func decodeAnswer(b []byte, result any) error {
	var a answer
	if err := unmarshal(b, &a); err != nil {
		return fmt.Errorf("mgs: answer: %w", err)
	}
	switch {
	case a.Error != nil:
		return a.Error
	case a.Result == nil:
		return fmt.Errorf("mgs: answer: neither result nor error")
	}
	if err := unmarshal(a.Result, result); err != nil {
		return fmt.Errorf("mgs: answer: %w", err)
	}
	return nil
}
