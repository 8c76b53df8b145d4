package tcp

import (
	"context"
	"crypto/tls"
	"errors"
	"hash/crc32"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/recovery/wire"
)

var ctx = context.Background()

// fake is a target whose answers can be told from each other. Cookie and Time of
// requests come back, in fields that travel.
type fake struct {
	mu    sync.Mutex
	held  []held // requests that wait for release
	hold  map[wire.Op]bool
	count map[wire.Op]int
	later bool           // answer from another goroutine
	wg    sync.WaitGroup // those goroutines
}

type held struct {
	op     wire.Op
	answer func()
}

func newFake() *fake { return &fake{hold: map[wire.Op]bool{}, count: map[wire.Op]int{}} }

func (f *fake) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func (f *fake) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	f.mu.Lock()
	f.count[req.Op]++
	answer := func() { f.answer(req, rep); done() }
	switch {
	case f.hold[req.Op]:
		f.held = append(f.held, held{req.Op, answer})
		f.mu.Unlock()
	case f.later:
		f.mu.Unlock()
		f.wg.Go(answer)
	default:
		f.mu.Unlock()
		answer()
	}
}

func (f *fake) answer(req *wire.Request, rep *wire.Reply) {
	rep.XID = req.XID
	rep.Transno = req.XID * 3
	switch req.Op {
	case wire.OpRead:
		fill(req.Bulk, req.Offset)
		rep.Count = uint32(len(req.Bulk))
	case wire.OpWrite:
		rep.Count = uint32(len(req.Bulk))
		rep.Obj.Version = uint64(crc32.ChecksumIEEE(req.Bulk))
		rep.Obj.Size = req.Offset
	case wire.OpGetattr:
		rep.Attr.FID, rep.HasAttr = req.FID, true
	case wire.OpReadlink:
		rep.Data = append(rep.Data[:0], req.FID.String()...)
	}
}

func (f *fake) set(op wire.Op, hold bool) {
	f.mu.Lock()
	f.hold[op] = hold
	f.mu.Unlock()
}

func (f *fake) release() int { return f.releaseBut(0) }

// releaseBut answers what waits, but not requests of one operation.
func (f *fake) releaseBut(op wire.Op) int {
	f.mu.Lock()
	var now, later []held
	for _, h := range f.held {
		if h.op == op {
			later = append(later, h)
		} else {
			now = append(now, h)
		}
	}
	f.held = later
	f.mu.Unlock()
	for _, h := range now {
		h.answer()
	}
	return len(now)
}

func (f *fake) seen(op wire.Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count[op]
}

// fill makes bytes that depend on their offset.
func fill(p []byte, off uint64) {
	for i := range p {
		x := off + uint64(i)
		p[i] = byte(x ^ x>>8 ^ x>>16 ^ 0x5a)
	}
}

func request(op wire.Op, xid uint64) *wire.Request {
	return &wire.Request{Header: wire.Header{Op: op, XID: xid}}
}

type bed struct {
	t    testing.TB
	srv  *Server
	fake *fake
	addr string
	tls  func(peer string) *tls.Config
}

var short = Timeouts{Handshake: 10 * time.Second, Frame: 10 * time.Second, Write: 10 * time.Second, Idle: 20 * time.Second}

func newBed(t testing.TB, secure bool, change func(*ServerOptions)) *bed {
	t.Helper()
	b := &bed{t: t, fake: newFake()}
	if _, bench := t.(*testing.B); !bench { // they have several servers at a time
		noLeaks(t)
	}
	o := ServerOptions{Node: "server", Insecure: true, Timeouts: short}
	if secure {
		dir := t.TempDir()
		c, err := ca.Create(dir, "test", ca.Options{})
		if err != nil {
			t.Fatal(err)
		}
		nodes := map[string]*ca.Node{}
		for _, n := range []string{"server", "client"} {
			if err := c.IssueNode(dir, n, ca.Options{}); err != nil {
				t.Fatal(err)
			}
			if nodes[n], err = ca.LoadNode(dir, n); err != nil {
				t.Fatal(err)
			}
		}
		o.TLS = nodes["server"].Server()
		b.tls = nodes["client"].Client
	}
	if change != nil {
		change(&o)
	}
	b.start(map[string]wire.Target{"fake": b.fake}, o)
	return b
}

func (b *bed) start(targets map[string]wire.Target, o ServerOptions) {
	b.t.Helper()
	var err error
	if b.srv, err = NewServer(targets, o); err != nil {
		b.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.t.Fatal(err)
	}
	b.addr = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- b.srv.Serve(l) }()
	b.t.Cleanup(func() {
		b.fake.release()
		c, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		if err := b.srv.Close(c); err != nil {
			b.t.Error(err)
		}
		if err := <-served; err != nil {
			b.t.Error(err)
		}
		b.fake.release() // polls
		b.fake.wg.Wait() // Close does not wait for requests of connections that were cut
		if st := b.srv.Stats(); st.MemoryInUse != 0 || st.Conns != 0 {
			b.t.Errorf("after close: %+v", st)
		}
	})
}

func (b *bed) options() DialOptions {
	o := DialOptions{Addrs: []Endpoint{{Addr: b.addr, Node: "server"}}, Target: "fake", Node: "client", Insecure: true, Timeouts: short}
	if b.tls != nil {
		o.TLS = b.tls("server")
	}
	return o
}

func (b *bed) dial(change func(*DialOptions)) *Conn {
	b.t.Helper()
	o := b.options()
	if change != nil {
		change(&o)
	}
	c, err := Dial(ctx, o)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

// eventually waits for something that other goroutines do.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("never happened:", what)
}

// noLeaks checks at the end that no goroutine of this package is left.
func noLeaks(t testing.TB) {
	t.Cleanup(func() {
		var last string
		for range 1000 {
			buf := make([]byte, 1<<20)
			last = ""
			for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
				for _, mine := range []string{"tcp.(*sconn)", "tcp.(*Conn)", "tcp.(*Server)", "tcp.dialBundle", "workers.(*Pool"} {
					if strings.Contains(g, mine) {
						last = g
					}
				}
			}
			if last == "" {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Error("goroutine left behind:\n" + last)
	})
}

func isLost(t *testing.T, err error, sent bool) {
	t.Helper()
	var l *wire.LostError
	if !errors.As(err, &l) || l.Sent != sent || wire.NeverSent(err) == sent {
		t.Fatalf("error %v, want one with sent %v", err, sent)
	}
}
