package mgs

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sort"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"github.com/baton-nfs/baton/recovery/wire"
)

// counter is a source of bytes 1, 2, 3, ...
type counter struct{ n byte }

func (c *counter) Read(p []byte) (int, error) {
	for i := range p {
		c.n++
		p[i] = c.n
	}
	return len(p), nil
}

// sessionName makes a session's name from a letter.
func sessionName(s string) string { return strings.Repeat(fmt.Sprintf("%02x", s[0]), sessionIDSize) }

// TestSteps holds transcripts of the document's steps. Input is a method and
// its arguments. "alone" is a call of the node that is alone, "call" one of
// another node. The document goes through its encoding after each step.
func TestSteps(t *testing.T) {
	datadriven.Walk(t, "testdata/steps", func(t *testing.T, path string) {
		rnd := &counter{}
		s, err := newState(rnd)
		if err != nil {
			t.Fatal(err)
		}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			before := encoded(t, s)
			var out string
			switch d.Cmd {
			case "document":
				x, err := decode("the registry", []byte(d.Input))
				if err != nil {
					return err.Error() + "\n"
				}
				s = x
				return "ok\n"
			case "state":
				return show(s)
			case "alone":
				name, args, _ := strings.Cut(d.Input, " ")
				res, err := methods[name].run(s, rnd, "", json.RawMessage(args))
				if err != nil {
					out = err.Error()
				} else {
					b, _ := json.Marshal(res)
					out = string(b)
				}
			case "call":
				var c call
				var letter string
				name, args, _ := strings.Cut(d.Input, " ")
				c.method, c.Args = methods[name], json.RawMessage(args)
				d.ScanArgs(t, "node", &c.Node)
				if c.method.changes {
					d.ScanArgs(t, "session", &letter)
					d.ScanArgs(t, "seq", &c.Seq)
					c.Session = sessionName(letter)
					b, err := s.apply(rnd, &c)
					if out = string(b); err != nil {
						out = "no answer: " + err.Error()
					}
					break
				}
				res, err := c.method.run(s, rnd, c.Node, c.Args)
				if err != nil {
					out = "no answer: " + err.Error()
				} else if b, err := encodeReply(res, nil); err != nil {
					t.Fatal(err)
				} else {
					out = string(b)
				}
			default:
				d.Fatalf(t, "unknown command %s", d.Cmd)
			}
			after := encoded(t, s)
			if bytes.Equal(before, after) {
				out += "\nunchanged"
			} else if strings.HasPrefix(out, "no answer") || strings.HasPrefix(out, "mgs:") {
				t.Errorf("%s: a step that failed has changed something:\n%s", d.Pos, after)
			}
			if s, err = decode("the registry", after); err != nil {
				t.Fatal(err)
			}
			return out + "\n"
		})
	})
}

func encoded(t *testing.T, s *state) []byte {
	t.Helper()
	b, err := s.encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// show prints a document in few lines.
func show(s *state) string {
	var b strings.Builder
	fmt.Fprintf(&b, "format %d, generation %d, next index %d, %d OSTs\n", s.Format, s.Generation, s.NextIndex, s.OSTs)
	if len(s.Made) > 0 {
		fmt.Fprintf(&b, "made: %s\n", strings.Join(s.Made, " "))
	}
	for _, v := range s.VIPs {
		fmt.Fprintf(&b, "%d %s epoch %d verifier %s nsm %d node %q clean %v", v.Index, v.Addr, v.Epoch, v.Verifier, v.NSMState, v.Node, v.Clean)
		if v.Bits != 0 || v.MoveID != 0 {
			fmt.Fprintf(&b, " bits %d next %q move %d ready %v drained %v removed %v", v.Bits, v.Next, v.MoveID, v.Ready, v.Drained, v.Removed)
		}
		b.WriteByte('\n')
	}
	if len(s.Drained) > 0 {
		fmt.Fprintf(&b, "drained: %s\n", strings.Join(s.Drained, " "))
	}
	var l []string
	for n, c := range s.Clients {
		l = append(l, fmt.Sprintf("client %s: %s generation %d\n", n, c.ID, c.Generation))
	}
	for n, x := range s.Sessions {
		for _, y := range x {
			l = append(l, fmt.Sprintf("session %s of %s: call %d\n", y.ID, n, y.Seq))
		}
	}
	for n, v := range s.Agreed {
		l = append(l, fmt.Sprintf("agreed %s: %s\n", n, v))
	}
	sort.Strings(l)
	return b.String() + strings.Join(l, "")
}

type failing struct{ after int }

func (f *failing) Read(p []byte) (int, error) {
	if f.after--; f.after < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	return len(p), nil
}

// Limits are refusals, and without randomness nothing is half done.
func TestLimits(t *testing.T) {
	full := func() *state {
		s := &state{NextIndex: 1, Client: strings.Repeat("00", 16), Clients: map[string]fsClient{}, Sessions: map[string][]session{}}
		for i := range maxVIPs {
			addr := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}).Next()
			if _, err := s.serve(&counter{}, addr, "n0"); err != nil {
				t.Fatal(err)
			}
		}
		for i := range maxNodes {
			n := fmt.Sprintf("n%d", i)
			if _, _, err := s.startClient(&counter{}, n); err != nil {
				t.Fatal(err)
			}
			if _, err := s.apply(&counter{}, &call{Node: n, Session: sessionName("a"), Seq: 1, Args: json.RawMessage("{}"), method: methods[methodStartClient]}); err != nil {
				t.Fatal(err)
			}
		}
		return s
	}
	s := full()
	if _, err := decode("full", encoded(t, s)); err != nil {
		t.Error(err)
	}
	top := func(change func(*VIP)) *state {
		s := full()
		change(&s.VIPs[0])
		return s
	}
	first := s.VIPs[0].Addr
	many := &state{NextIndex: 1, Client: strings.Repeat("00", 16)}
	for i := range maxMade {
		if err := many.setMade(fmt.Sprintf("OST%04x", i)); err != nil {
			t.Fatal(err)
		}
		if _, err := many.agree(fmt.Sprint("v", min(i, maxAgreed-1)), "x"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := decode("many", encoded(t, many)); err != nil {
		t.Error(err)
	}
	for _, x := range []struct {
		what string
		s    *state
		do   func(*state) error
		want Code // empty: any other error
	}{
		{"one VIP too many", s, func(s *state) error {
			_, err := s.serve(&counter{}, netip.MustParseAddr("192.0.2.1"), "n0")
			return err
		}, CodeLimit},
		{"one node too many", s, func(s *state) error { _, _, err := s.startClient(&counter{}, "m"); return err }, CodeLimit},
		{"one caller too many", s, func(s *state) error {
			_, err := s.apply(&counter{}, &call{Node: "m", Session: sessionName("a"), Seq: 1, Args: json.RawMessage(`{"osts":1}`), method: methods[methodSetOSTs]})
			return err
		}, CodeLimit},
		{"epoch", top(func(v *VIP) { v.Epoch = maxCount }), func(s *state) error { _, err := s.serve(&counter{}, first, "n0"); return err }, CodeLimit},
		{"NSM state after a crash", top(func(v *VIP) { v.NSMState = maxNSMState }), func(s *state) error { _, err := s.serve(&counter{}, first, "n0"); return err }, CodeLimit},
		{"NSM state", top(func(v *VIP) { v.NSMState = maxNSMState }), func(s *state) error { _, err := s.raiseNSM(1, 1, 0); return err }, CodeLimit},
		{"NSM state that is none", s, func(s *state) error { _, err := s.raiseNSM(1, 1, maxNSMState+1); return err }, CodeInvalid},
		{"OSTs", s, func(s *state) error { return s.setOSTs(maxOSTs + 1) }, CodeInvalid},
		{"one target too many", many, func(s *state) error { return s.setMade("x") }, CodeLimit},
		{"one value too many", many, func(s *state) error { _, err := s.agree("x", ""); return err }, CodeLimit},
		{"a long value", s, func(s *state) error { _, err := s.agree("x", strings.Repeat("x", maxValue+1)); return err }, CodeInvalid},
		{"no random UUID", &state{NextIndex: 1}, func(s *state) error { _, _, err := s.startClient(&failing{}, "m"); return err }, ""},
		{"no random verifier", &state{NextIndex: 1}, func(s *state) error {
			_, err := s.serve(&failing{}, netip.MustParseAddr("192.0.2.1"), "n0")
			return err
		}, ""},
		{"no second random verifier", s, func(s *state) error { _, err := s.newVerifiers(&failing{1}, "n0", nil); return err }, ""},
		{"no randomness in a call", s, func(s *state) error {
			_, err := s.apply(&failing{}, &call{Node: "n0", Session: sessionName("b"), Seq: 1, Args: json.RawMessage(`{}`), method: methods[methodNewVerifiers]})
			return err
		}, ""},
	} {
		before := encoded(t, x.s)
		err := x.do(x.s)
		var e *Error
		if err == nil || errors.As(err, &e) != (x.want != "") || e != nil && e.Code != x.want {
			t.Errorf("%s: %v", x.what, err)
		}
		if !bytes.Equal(before, encoded(t, x.s)) {
			t.Errorf("%s: something has changed", x.what)
		}
	}
}

// The longest page fits into an answer.
func TestPageFits(t *testing.T) {
	s := &state{NextIndex: 1<<32 - 1 - pageVIPs}
	zone := strings.Repeat("z", maxZone)
	for i := range pageVIPs + 1 {
		a := netip.AddrFrom16([16]byte{0xfe, 0x80, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, byte(i >> 8), byte(i)}).WithZone(zone)
		s.VIPs = append(s.VIPs, VIP{Index: s.NextIndex, Addr: a, Epoch: maxCount, Verifier: "0123456789abcdef", NSMState: maxNSMState, Clean: true, Node: strings.Repeat("n", 64)})
		s.NextIndex++
	}
	p, err := s.page(0)
	if err != nil {
		t.Fatal(err)
	}
	b, err := encodeReply(p, nil)
	if err != nil || len(b) > wire.MaxData || !p.(vipsResult).More {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// FuzzDocument: a document that is accepted stays acceptable whatever is done
// with it, and steps that fail change nothing.
func FuzzDocument(f *testing.F) {
	s, err := newState(&counter{})
	if err != nil {
		f.Fatal(err)
	}
	b, err := s.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	_, err = s.serve(&counter{}, netip.MustParseAddr("192.0.2.1"), "n1")
	if err != nil {
		f.Fatal(err)
	}
	if _, err := s.apply(&counter{}, &call{Node: "n1", Session: sessionName("a"), Seq: 3, Args: json.RawMessage("{}"), method: methods[methodStartClient]}); err != nil {
		f.Fatal(err)
	}
	if b, err = s.encode(); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	if _, err = s.addVIP(&counter{}, floatSpec(0)); err == nil {
		_, err = s.assign(2, 1, "n1")
	}
	if err == nil {
		err = s.setDrained("n2", true)
	}
	if err != nil {
		f.Fatal(err)
	}
	if b, err = s.encode(); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, doc []byte) {
		s, err := decode("fuzz", doc)
		if err != nil {
			return
		}
		for name, m := range methods {
			for _, args := range []string{`{}`, `{"addr":"192.0.2.1"}`, `{"index":1,"epoch":1}`, `{"index":1,"epoch":6,"above":9}`, `{"osts":3}`, `{"indexes":[1]}`, `{"after":1}`,
				`{"addr":"192.0.2.50","bits":24}`, `{"addr":"192.0.2.50","bits":24,"drained":true}`, `{"index":2}`, `{"index":2,"epoch":1,"node":"n2"}`, `{"index":2,"epoch":1,"node":""}`,
				`{"index":2,"move_id":1}`, `{"index":2,"move_id":0}`, `{"node":"n2","drained":true}`, `{"node":"n2"}`} {
				before := encoded(t, s)
				var failed bool
				if m.changes {
					_, err := s.apply(&counter{}, &call{Node: "n1", Session: sessionName("a"), Seq: 1 << 40, Args: json.RawMessage(args), method: m})
					failed = err != nil
				} else {
					_, _ = m.run(s, nil, "n1", json.RawMessage(args))
					failed = true // reading changes nothing either
				}
				after := encoded(t, s)
				if failed && !bytes.Equal(before, after) {
					t.Errorf("%s %s has changed\n%s\n%s", name, args, before, after)
				}
				if s, err = decode("fuzz", after); err != nil {
					t.Fatalf("%s %s: %v\n%s", name, args, err, after)
				}
			}
		}
	})
}
