package wire

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// localTarget holds what it is told to hold and checks that nothing comes after
// Close.
type localTarget struct {
	t      *testing.T
	peer   Peer
	closes atomic.Int32

	mu   sync.Mutex
	hold bool
	held []func()
}

func (l *localTarget) Accept(p Peer) Target { l.peer = p; return l }

func (l *localTarget) Close() error { l.closes.Add(1); return nil }

func (l *localTarget) TryHandle(req *Request, rep *Reply) bool {
	if l.closes.Load() != 0 {
		l.t.Error("TryHandle after Close")
	}
	return req.Op == OpPing
}

func (l *localTarget) Handle(req *Request, rep *Reply, done func()) {
	answer := func() { rep.XID, rep.Count = req.XID, uint32(req.Op); done() }
	l.mu.Lock()
	hold := l.hold
	if hold {
		l.held = append(l.held, answer)
	}
	l.mu.Unlock()
	if l.closes.Load() != 0 {
		l.t.Error("Handle after Close")
	}
	if !hold {
		answer()
	}
}

func (l *localTarget) release() {
	l.mu.Lock()
	held := l.held
	l.held = nil
	l.mu.Unlock()
	for _, f := range held {
		f()
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Requests pass, Close ends the connection at the target and refuses what comes
// later, and Done waits for the answers.
func TestLocal(t *testing.T) {
	l := &localTarget{t: t}
	c := Local(l, 7)
	if l.peer != (Peer{Session: 7, Local: true}) {
		t.Fatalf("%+v", l.peer)
	}
	req, rep := &Request{Header: Header{Op: OpPing, XID: 5}}, &Reply{}
	if err := c.Call(context.Background(), req, rep); err != nil || rep.XID != 5 || !c.TryHandle(req, rep) {
		t.Fatal(err, rep.XID)
	}
	l.hold = true
	var got []error
	started, handled := &Reply{}, false
	c.Start(req, started, func(err error) { got = append(got, err) })
	c.Handle(req, &Reply{}, func() { handled = true })
	if err := c.Close(); err != nil || c.Close() != nil {
		t.Fatal(err)
	}
	if l.closes.Load() != 1 || closed(c.Done()) || got != nil || handled {
		t.Fatal("the end came with requests at the target", l.closes.Load(), got, handled)
	}
	l.release()
	if !closed(c.Done()) || !slices.Equal(got, []error{nil}) || !handled || started.XID != 5 {
		t.Fatal("no end after the last answer", got, handled)
	}
	err := c.Call(context.Background(), req, rep)
	if !NeverSent(err) || !errors.Is(err, ErrClosed) || rep.Status != ErrTargetDown || c.TryHandle(req, rep) {
		t.Fatal(err, rep.Status)
	}
	rep.Reset()
	c.Handle(req, rep, func() { handled = false })
	if handled || rep.Status != ErrTargetDown || l.closes.Load() != 1 {
		t.Fatal(rep.Status, l.closes.Load())
	}
}

// What waits for other clients does not hold up the end of a connection, and its
// late answer touches nothing of the caller's.
func TestLocalWaitingRequests(t *testing.T) {
	l := &localTarget{t: t, hold: true}
	c := Local(l, 7)
	short, cancel := context.WithCancel(context.Background())
	connect := make(chan error)
	go func() {
		connect <- c.Call(short, &Request{Header: Header{Op: OpConnect}}, &Reply{})
	}()
	for n := 0; n == 0; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		n = len(l.held)
		l.mu.Unlock()
	}
	cancel()
	if err := <-connect; !errors.Is(err, context.Canceled) || NeverSent(err) {
		t.Fatal(err)
	}
	poll := &Request{Header: Header{Op: OpLockPoll, XID: 9}}
	answered, waiting := &Reply{}, &Reply{}
	var got []error
	done := func(err error) { got = append(got, err) }
	c.Start(poll, answered, done)
	l.release()
	c.Start(poll, waiting, done)
	_ = c.Close()
	if len(got) != 2 || got[0] != nil || answered.XID != 9 || NeverSent(got[1]) || !errors.Is(got[1], ErrClosed) || !closed(c.Done()) {
		t.Fatal(got)
	}
	l.release()
	if waiting.XID != 0 || waiting.Status != ErrTargetDown || len(got) != 2 {
		t.Fatalf("%+v", waiting)
	}
	c.Start(poll, waiting, done)
	if len(got) != 3 || !NeverSent(got[2]) {
		t.Fatal(got)
	}
}

// plain is a target that is closed by its owner, not by its connections.
type plain struct{ *localTarget }

func (plain) Accept() {} // hides Acceptor

func TestLocalWithoutAcceptor(t *testing.T) {
	l := &localTarget{t: t}
	c := Local(plain{l}, 1)
	rep := &Reply{}
	if err := c.Call(context.Background(), &Request{Header: Header{Op: OpPing, XID: 3}}, rep); err != nil || rep.XID != 3 {
		t.Fatal(err, rep.XID)
	}
	_ = c.Close()
	if !closed(c.Done()) || l.closes.Load() != 0 {
		t.Fatal(l.closes.Load())
	}
}

// Whatever meets Close, every request is given back once and the target is closed
// once, after the last.
func TestLocalCloseRaces(t *testing.T) {
	for range 300 {
		l := &localTarget{t: t}
		c := Local(l, 1)
		var wg sync.WaitGroup
		var sent, back atomic.Int64
		for w := range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				rnd := rand.New(rand.NewPCG(uint64(w), 1))
				for range 50 {
					op := []Op{OpPing, OpLockPoll, OpConnect, OpWrite}[rnd.IntN(4)]
					req := &Request{Header: Header{Op: op}}
					sent.Add(1)
					if rnd.IntN(2) == 0 {
						c.Start(req, &Reply{}, func(error) { back.Add(1) })
					} else {
						c.Handle(req, &Reply{}, func() { back.Add(1) })
					}
					c.TryHandle(req, &Reply{})
				}
			}()
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			l.mu.Lock()
			l.hold = true
			l.mu.Unlock()
			_ = c.Close()
		}()
		wg.Wait()
		l.release()
		<-c.Done()
		if sent.Load() != back.Load() || l.closes.Load() != 1 {
			t.Fatalf("%d sent, %d back, %d times closed", sent.Load(), back.Load(), l.closes.Load())
		}
	}
}

func TestNextSession(t *testing.T) {
	var mu sync.Mutex
	seen := map[uint64]bool{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			last := uint64(0)
			for range 1000 {
				s := NextSession()
				mu.Lock()
				if s <= last || seen[s] {
					t.Errorf("%d after %d", s, last)
				}
				seen[s], last = true, s
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
}

func BenchmarkLocal(b *testing.B) {
	for name, c := range map[string]Conn{"inproc": InProc(&localTarget{}), "local": Local(&localTarget{}, 1)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			req, rep := &Request{Header: Header{Op: OpPing}}, &Reply{}
			for range b.N {
				_ = c.Call(context.Background(), req, rep)
			}
		})
	}
}
