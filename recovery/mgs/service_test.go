package mgs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/baton-nfs/baton/recovery/wire"
)

// memory is a Storage that does what tests want.
type memory struct {
	mu  sync.Mutex
	doc []byte
	rev uint64
	// before, if set, is asked before a swap; its error is the swap's. With late
	// set the document is replaced nevertheless.
	before func() (late bool, err error)
}

func (m *memory) Name() string { return "the memory" }

func (m *memory) Load(context.Context) ([]byte, uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.doc, m.rev, nil
}

func (m *memory) Swap(_ context.Context, rev uint64, doc []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	if m.before != nil {
		var late bool
		if late, err = m.before(); err != nil && !late {
			return err
		}
	}
	if rev != m.rev {
		return ErrConflict
	}
	m.doc, m.rev = doc, m.rev+1
	return err
}

func (m *memory) content() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(m.doc)
}

// Two processes change one document: nothing is lost, and no two get the same.
func TestConflicts(t *testing.T) {
	m := &memory{}
	conflicts(t, 100, m, m)
}

// conflicts has several processes, each with its storage, change one document.
func conflicts(t *testing.T, each int, storages ...Storage) {
	t.Helper()
	processes := len(storages)
	var mu sync.Mutex
	gens, epochs := map[uint64]int{}, map[uint64]int{}
	var wg sync.WaitGroup
	for _, m := range storages {
		r := NewStored(m, rand.NewChaCha8([32]byte{7}))
		for range 2 {
			wg.Go(func() {
				for range each {
					_, g, err := r.StartClient(ctx, "n1")
					v, err2 := r.Serve(ctx, netip.MustParseAddr("192.0.2.1"), "n1")
					if err != nil || err2 != nil {
						t.Error(err, err2)
						return
					}
					mu.Lock()
					gens[g]++
					epochs[v.Epoch]++
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	for i := range uint64(2 * each * processes) {
		if gens[i+1] != 1 || epochs[i+1] != 1 {
			t.Fatalf("number %d: %d generations, %d epochs", i+1, gens[i+1], epochs[i+1])
		}
	}
}

func request(name string, c call) *wire.Request {
	b, err := json.Marshal(&c)
	if err != nil {
		panic(err)
	}
	return &wire.Request{Header: wire.Header{Op: wire.OpRegistry, XID: 9}, Name: []byte(name), Data: b}
}

func handle(t *testing.T, to wire.Target, req *wire.Request) *wire.Reply {
	t.Helper()
	rep, n := &wire.Reply{Data: []byte("old")}, 0
	to.Handle(req, rep, func() { n++ })
	if n != 1 || rep.XID != req.XID {
		t.Fatalf("done was called %d times, XID %d", n, rep.XID)
	}
	return rep
}

func TestServiceOperations(t *testing.T) {
	s := NewService(NewStored(&memory{}, &counter{}), nil)
	for op, want := range map[wire.Op]wire.Status{
		wire.OpConnect: wire.OK, wire.OpPing: wire.OK, wire.OpDisconnect: wire.OK, wire.OpGetattr: wire.ErrNotSupp, wire.OpWrite: wire.ErrNotSupp, 0: wire.ErrNotSupp,
	} {
		req := &wire.Request{Header: wire.Header{Op: op, XID: 5}}
		if s.TryHandle(req, &wire.Reply{}) {
			t.Errorf("%d: answered without waiting", op)
		}
		rep := handle(t, s, req)
		if rep.Status != want || op == wire.OpConnect && (rep.Instance == 0 || !rep.Known || rep.Recovering) {
			t.Errorf("%d: %+v", op, rep)
		}
	}
	s.Close()
	for _, op := range []wire.Op{wire.OpConnect, wire.OpPing, wire.OpRegistry} {
		if rep := handle(t, s, &wire.Request{Header: wire.Header{Op: op}}); rep.Status != wire.ErrTargetDown {
			t.Errorf("%d after the end: %v", op, rep.Status)
		}
	}
}

// A node speaks for itself only.
func TestServiceIdentity(t *testing.T) {
	m := &memory{}
	s := NewService(NewStored(m, &counter{}), nil)
	start := request(methodStartClient, call{Node: "n1", Session: sessionName("a"), Seq: 1, Args: json.RawMessage("{}")})
	read := request(methodOSTs, call{Node: "n1", Args: json.RawMessage("{}")})
	for _, req := range []*wire.Request{start, read} {
		before := m.content()
		c := s.Accept(wire.Peer{Node: "n2"})
		if rep := handle(t, c, req); rep.Status != wire.ErrProto || len(rep.Data) != 0 || m.content() != before {
			t.Errorf("%s: %v %s\n%s", req.Name, rep.Status, rep.Data, m.content())
		}
		for _, to := range []wire.Target{s, s.Accept(wire.Peer{Node: "n1"}), s.Accept(wire.Peer{Local: true})} {
			if to.TryHandle(req, &wire.Reply{}) {
				t.Error("answered without waiting")
			}
			if rep := handle(t, to, req); rep.Status != wire.OK || !bytes.HasPrefix(rep.Data, []byte(`{"result":`)) {
				t.Errorf("%s: %v %s", req.Name, rep.Status, rep.Data)
			}
		}
	}
}

// The registry has the name that was told first, though it did not exist: nodes
// remember it.
func TestServiceIdentityOfNewRegistry(t *testing.T) {
	m := &memory{}
	rnd := &counter{}
	var told []string
	for _, node := range []string{"n1", "n2", "n1"} {
		s := NewService(NewStored(m, rnd), nil) // each node has its own, in etcd
		rep := handle(t, s, request(methodIdentity, call{Node: node, Args: json.RawMessage("{}")}))
		var a struct{ Result identityResult }
		if err := json.Unmarshal(rep.Data, &a); err != nil || rep.Status != wire.OK {
			t.Fatalf("%v %s: %v", rep.Status, rep.Data, err)
		}
		told = append(told, a.Result.ID)
	}
	d, err := Inspect("m", []byte(m.content()))
	if err != nil || told[0] == "" || told[0] != d.Identity || told[1] != told[0] || told[2] != told[0] {
		t.Errorf("told %q, stored %q, %v", told, d.Identity, err)
	}
}

func TestServiceRefusesBadRequests(t *testing.T) {
	m := &memory{}
	s := NewService(NewStored(m, &counter{}), nil)
	id := sessionName("a")
	for _, x := range []struct{ name, data string }{
		{"", `{"node":"n1","args":{}}`},
		{"no-such-method", `{"node":"n1","args":{}}`},
		{methodOSTs, ``},
		{methodOSTs, `{`},
		{methodOSTs, `null`},
		{methodOSTs, `[]`},
		{methodOSTs, `{"args":{}}`},
		{methodOSTs, `{"node":"","args":{}}`},
		{methodOSTs, `{"node":"a b","args":{}}`},
		{methodOSTs, `{"node":"` + strings.Repeat("n", 64+1) + `","args":{}}`},
		{methodOSTs, `{"node":"n1","args":{}}x`},
		{methodOSTs, `{"node":"n1","args":{},"more":1}`},
		{methodOSTs, `{"node":1,"args":{}}`},
		{methodStartClient, `{"node":"n1","args":{}}`},
		{methodStartClient, `{"node":"n1","session":"` + id + `","args":{}}`},
		{methodStartClient, `{"node":"n1","session":"` + id + `","seq":0,"args":{}}`},
		{methodStartClient, `{"node":"n1","session":"` + id + `","seq":-1,"args":{}}`},
		{methodStartClient, `{"node":"n1","session":"` + id + `00","seq":1,"args":{}}`},
		{methodStartClient, `{"node":"n1","session":"` + id[2:] + `zz","seq":1,"args":{}}`},
	} {
		rep := handle(t, s, &wire.Request{Header: wire.Header{Op: wire.OpRegistry}, Name: []byte(x.name), Data: []byte(x.data)})
		if rep.Status != wire.ErrProto || len(rep.Data) != 0 {
			t.Errorf("%s %s: %v %s", x.name, x.data, rep.Status, rep.Data)
		}
	}
	if m.content() != "" {
		t.Errorf("something was stored: %s", m.content())
	}
	// Bad arguments of a good call are answered, in few words.
	rep := handle(t, s, request(methodServe, call{Node: "n1", Session: id, Seq: 1, Args: json.RawMessage(`{"addr":"` + strings.Repeat("x", 50000) + `"}`)}))
	if rep.Status != wire.OK || len(rep.Data) > 1000 || !bytes.Contains(rep.Data, []byte(CodeInvalid)) {
		t.Errorf("%v %.200s", rep.Status, rep.Data)
	}
	if n := len(m.content()); n > 2000 {
		t.Errorf("the document has %d bytes", n)
	}
}

// What the storage cannot do is said; what it may have done is not repeated.
func TestServiceStorageFails(t *testing.T) {
	m := &memory{}
	s := NewService(NewStored(m, &counter{}), nil)
	disk := errors.New("disk full")
	start := func(seq uint64) *wire.Reply {
		return handle(t, s, request(methodStartClient, call{Node: "n1", Session: sessionName("a"), Seq: seq, Args: json.RawMessage("{}")}))
	}
	gen := func(rep *wire.Reply) (uint64, error) {
		var res clientResult
		err := decodeAnswer(rep.Data, &res)
		return res.Generation, err
	}
	for _, x := range []struct {
		late bool
		want uint64
	}{{false, 1}, {true, 2}} {
		m.before = func() (bool, error) { return x.late, disk }
		_, err := gen(start(x.want))
		var e *Error
		if !errors.As(err, &e) || e.Code != CodeStorage || !strings.Contains(e.Text, "disk full") {
			t.Errorf("late %v: %v", x.late, err)
		}
		m.before = nil
		if g, err := gen(start(x.want)); g != x.want || err != nil {
			t.Errorf("late %v: sent again: generation %d, %v", x.late, g, err)
		}
	}
	m.before = func() (bool, error) { return false, fmt.Errorf("%w: taken over", ErrFenced) }
	if rep := start(3); rep.Status != wire.ErrTargetDown {
		t.Errorf("in other hands: %v %s", rep.Status, rep.Data)
	}
}

// FuzzService gives the service what a node of the cluster may send.
func FuzzService(f *testing.F) {
	good := call{Node: "n1", Session: sessionName("a"), Seq: 2, Args: json.RawMessage(`{"addr":"192.0.2.7"}`)}
	for name := range methods {
		f.Add(name, request(name, good).Data)
	}
	f.Add(methodStopped, []byte(`{"node":"n1","session":"6161616161616161","seq":3,"args":{"index":1,"epoch":1}}`))
	f.Add(methodRaiseNSM, []byte(`{"node":"n2","session":"6161616161616161","seq":3,"args":{"index":1,"epoch":1,"above":4294967295}}`))
	f.Add(methodNewVerifiers, []byte(`{"node":"n2","session":"6161616161616161","seq":3,"args":{"indexes":[1,1,1]}}`))
	f.Add(methodVIPs, []byte(`{"node":"n2","args":{"after":1}}`))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		m := &memory{}
		s := NewService(NewStored(m, &counter{}), nil)
		for i := range 2 {
			rep := handle(t, s, request(methodServe, call{Node: fmt.Sprintf("n%d", i+1), Session: sessionName("s"), Seq: 1, Args: json.RawMessage(fmt.Sprintf(`{"addr":"192.0.2.%d"}`, i+1))}))
			if rep.Status != wire.OK {
				t.Fatal(rep.Status)
			}
		}
		before := m.content()
		req := &wire.Request{Header: wire.Header{Op: wire.OpRegistry}, Name: []byte(name), Data: data}
		first := handle(t, s, req)
		switch {
		case first.Status != wire.OK && (first.Status != wire.ErrProto || m.content() != before):
			t.Errorf("%v; from\n%s\nto\n%s", first.Status, before, m.content())
		case first.Status == wire.OK && (len(first.Data) > wire.MaxData || !json.Valid(first.Data)):
			t.Errorf("answer of %d bytes: %.200q", len(first.Data), first.Data)
		}
		doc := m.content()
		if _, err := decode("fuzz", []byte(doc)); err != nil {
			t.Errorf("%v\n%s", err, doc)
		}
		if again := handle(t, s, req); again.Status != first.Status || !bytes.Equal(again.Data, first.Data) || m.content() != doc {
			t.Errorf("sent again: %v %s after %v %s", again.Status, again.Data, first.Status, first.Data)
		}
	})
}
