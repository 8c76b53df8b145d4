package tcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

func both(t *testing.T, fn func(t *testing.T, secure bool)) {
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "tls"}[secure], func(t *testing.T) { fn(t, secure) })
	}
}

// Many callers, all kinds of sizes, answers at once and later: everybody gets
// the answer to the own question.
func TestCalls(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b := newBed(t, secure, func(o *ServerOptions) { o.ControlWindow, o.ConnMemory = 8, 4<<20 })
		b.fake.later = true
		c := b.dial(nil)
		if c.Node() != "server" || c.MaxBulk() != wire.MaxBulk {
			t.Fatal(c.Node(), c.MaxBulk())
		}
		var wg sync.WaitGroup
		for w := range 16 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				rnd := rand.New(rand.NewPCG(uint64(w), 7))
				rep := new(wire.Reply)
				for i := range 60 {
					xid := uint64(w)<<32 | uint64(i)
					if err := oneCall(ctx, c, rnd, xid, rep); err != nil {
						t.Error(err)
						return
					}
				}
			}()
		}
		wg.Wait()
		if n := c.Outstanding(); n != 0 {
			t.Errorf("%d outstanding", n)
		}
	})
}

// oneCall makes a random call and checks the answer, and that nothing but it
// was changed.
func oneCall(ctx context.Context, c *Conn, rnd *rand.Rand, xid uint64, rep *wire.Reply) error {
	sizes := []int{0, 1, 100, copyBulk - 1, copyBulk, 65536, readBuffer + 1, 300000}
	size := sizes[rnd.IntN(len(sizes))]
	req := request([]wire.Op{wire.OpRead, wire.OpWrite, wire.OpGetattr, wire.OpReadlink, wire.OpPing}[rnd.IntN(5)], xid)
	req.FID = wire.FID{Seq: xid, OID: rnd.Uint32()}
	req.Offset = rnd.Uint64()
	var guard []byte
	switch req.Op {
	case wire.OpRead:
		guard = make([]byte, size+16)
		req.Bulk = guard[:size:size]
	case wire.OpWrite:
		req.Bulk = make([]byte, size)
		fill(req.Bulk, req.Offset)
	}
	if err := c.Call(ctx, req, rep); err != nil {
		if rep.Status != wire.ErrTargetDown {
			return fmt.Errorf("failed call with status %v", rep.Status)
		}
		return err
	}
	bad := func(what string) error { return fmt.Errorf("%w: op %d: %s: %+v", errWrong, req.Op, what, rep) }
	if rep.Status != wire.OK || rep.XID != xid || rep.Transno != 3*xid {
		return bad("header")
	}
	switch req.Op {
	case wire.OpRead:
		want := make([]byte, size+16)
		fill(want[:size], req.Offset)
		if int(rep.Count) != size || !bytes.Equal(guard, want) {
			return bad("data")
		}
	case wire.OpWrite:
		if int(rep.Count) != size || rep.Obj.Version != uint64(crc32.ChecksumIEEE(req.Bulk)) || rep.Obj.Size != req.Offset {
			return bad("write")
		}
	case wire.OpGetattr:
		if !rep.HasAttr || rep.Attr.FID != req.FID {
			return bad("attr")
		}
	case wire.OpReadlink:
		if string(rep.Data) != req.FID.String() {
			return bad("data")
		}
	}
	return nil
}

var errWrong = errors.New("wrong reply")

// The server's window bounds what is outstanding; polls do not count.
func TestCredits(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.ControlWindow, o.MaxPolls = 4, 20 })
	b.fake.set(wire.OpGetattr, true)
	b.fake.set(wire.OpLockPoll, true)
	c := b.dial(nil)
	done := make(chan wire.Status, 100)
	start := func(op wire.Op) {
		rep := new(wire.Reply)
		c.Handle(request(op, 1), rep, func() { done <- rep.Status })
	}
	for range 10 {
		start(wire.OpLockPoll)
	}
	for range 12 {
		start(wire.OpGetattr)
	}
	eventually(t, "a full window", func() bool { return b.fake.seen(wire.OpGetattr) == 4 && b.fake.seen(wire.OpLockPoll) == 10 })
	time.Sleep(20 * time.Millisecond)
	if n := b.fake.seen(wire.OpGetattr); n != 4 || c.Outstanding() != 22 {
		t.Fatalf("%d requests at the target, %d outstanding", n, c.Outstanding())
	}
	// Polls beyond their own limit are refused, and those that wait stay.
	for range 11 {
		start(wire.OpLockPoll)
	}
	if st := <-done; st != wire.ErrJukebox {
		t.Fatal(st)
	}
	b.fake.set(wire.OpLockPoll, false)
	b.fake.set(wire.OpGetattr, false)
	got := 0
	for got < 32 {
		b.fake.release()
		select {
		case st := <-done:
			if st != wire.OK {
				t.Fatal(st)
			}
			got++
		case <-time.After(time.Millisecond):
		}
	}
	eventually(t, "nothing outstanding", func() bool { return c.Outstanding() == 0 })
}

// A request that does not fit is answered here; it breaks nothing.
func TestBadRequests(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.MaxBulk = 1 << 16 })
	c := b.dial(nil)
	h := b.dial(func(o *DialOptions) { o.Kind = Health })
	for _, x := range []struct {
		c    *Conn
		req  *wire.Request
		want wire.Status
	}{
		{c, request(31, 1), wire.ErrNotSupp},
		{c, &wire.Request{Header: wire.Header{Op: wire.OpLookup}, Name: make([]byte, 300)}, wire.ErrNameTooLong},
		{c, &wire.Request{Header: wire.Header{Op: wire.OpWrite}, Bulk: make([]byte, 1<<16+1)}, wire.ErrProto},
		{c, &wire.Request{Header: wire.Header{Op: wire.OpRead}, Bulk: make([]byte, 1<<16+1)}, wire.ErrProto},
		{h, request(wire.OpGetattr, 1), wire.ErrProto},
		{h, request(wire.OpPing, 1), wire.OK},
		{h, request(wire.OpBeat, 1), wire.OK},
		{c, request(wire.OpBeat, 1), wire.ErrProto},
		{c, request(wire.OpPing, 1), wire.OK},
	} {
		var rep wire.Reply
		if err := x.c.Call(ctx, x.req, &rep); err != nil || rep.Status != x.want {
			t.Errorf("op %d: %v %v, want %v", x.req.Op, err, rep.Status, x.want)
		}
	}
	if c.TryHandle(request(wire.OpPing, 1), new(wire.Reply)) {
		t.Error("TryHandle has an answer")
	}
}

// What ctx abandons is told apart by whether it was sent; its late answer hurts
// nobody and gives the credit back.
func TestAbandon(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.ControlWindow = 1 })
	b.fake.set(wire.OpRead, true)
	c := b.dial(nil)
	short, cancel := context.WithCancel(ctx)
	res := make(chan error, 2)
	buf := make([]byte, 100000)
	go func() {
		req := request(wire.OpRead, 1)
		req.Bulk = buf
		res <- c.Call(short, req, new(wire.Reply))
	}()
	eventually(t, "request at the target", func() bool { return b.fake.seen(wire.OpRead) == 1 })
	go func() { res <- c.Call(short, request(wire.OpPing, 2), new(wire.Reply)) }()
	eventually(t, "request in the queue", func() bool { return c.Outstanding() == 2 })
	cancel()
	sent := 0
	for range 2 {
		err := <-res
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if !wire.NeverSent(err) {
			sent++
		}
	}
	if sent != 1 {
		t.Fatalf("%d of the requests were sent", sent)
	}
	next := make(chan error, 1)
	go func() { next <- c.Call(ctx, request(wire.OpGetattr, 3), new(wire.Reply)) }()
	b.fake.release()
	if err := <-next; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(buf, make([]byte, len(buf))) || b.fake.seen(wire.OpPing) != 0 {
		t.Fatal("an abandoned request had an effect")
	}
	isLost(t, c.Call(short, request(wire.OpPing, 4), new(wire.Reply)), false)
}

// When a connection breaks, what was sent has an unknown fate, what waits for
// credits was not sent.
func TestBreak(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b := newBed(t, secure, func(o *ServerOptions) { o.ControlWindow = 2 })
		b.fake.set(wire.OpGetattr, true)
		c := b.dial(nil)
		type result struct {
			i   int
			err error
			st  wire.Status
		}
		res := make(chan result, 5)
		for i := range 5 {
			rep := new(wire.Reply)
			c.Start(request(wire.OpGetattr, uint64(i)), rep, func(err error) { res <- result{i, err, rep.Status} })
		}
		eventually(t, "full window", func() bool { return b.fake.seen(wire.OpGetattr) == 2 })
		b.srv.mu.Lock()
		for sc := range b.srv.conns {
			_ = rawConn(sc.nc).Close()
		}
		b.srv.mu.Unlock()
		for range 5 {
			r := <-res
			if r.st != wire.ErrTargetDown {
				t.Error(r.st)
			}
			isLost(t, r.err, r.i < 2)
		}
		<-c.Done()
		if c.Err() == nil {
			t.Error("no error")
		}
		isLost(t, c.Call(ctx, request(wire.OpPing, 9), new(wire.Reply)), false)
		b.fake.release()
	})
}

// A server that closes finishes what it has read, and says what it has not.
func TestDrain(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b := newBed(t, secure, nil)
		b.fake.set(wire.OpGetattr, true)
		b.fake.set(wire.OpLockPoll, true)
		c := b.dial(nil)
		res := make(chan error, 10)
		poll := make(chan error, 1)
		for i := range 10 {
			c.Start(request(wire.OpGetattr, uint64(i)), new(wire.Reply), func(err error) { res <- err })
		}
		c.Start(request(wire.OpLockPoll, 100), new(wire.Reply), func(err error) { poll <- err })
		eventually(t, "requests", func() bool { return b.fake.seen(wire.OpGetattr) == 10 && b.fake.seen(wire.OpLockPoll) == 1 })
		closed := make(chan error, 1)
		go func() { closed <- b.srv.StopTarget(ctx, "fake") }()
		eventually(t, "farewell", func() bool { return errors.Is(c.Err(), ErrGoAway) })
		isLost(t, c.Call(ctx, request(wire.OpGetattr, 50), new(wire.Reply)), false)
		select {
		case err := <-closed:
			t.Fatal("did not wait:", err)
		default:
		}
		if n := b.fake.releaseBut(wire.OpLockPoll); n != 10 {
			t.Fatal(n)
		}
		for range 10 {
			if err := <-res; err != nil {
				t.Error(err)
			}
		}
		isLost(t, <-poll, true)
		if err := <-closed; err != nil {
			t.Error(err)
		}
		b.fake.release() // a target may answer when nobody listens any more
		if _, err := Dial(ctx, b.options()); !errors.Is(err, ErrNoTarget) {
			t.Error(err)
		}
		if err := b.srv.SetTarget("fake", b.fake); err != nil {
			t.Error(err)
		}
		if err := b.srv.SetTarget("fake", b.fake); err == nil {
			t.Error("two targets of one name")
		}
		if err := b.dial(nil).Call(ctx, request(wire.OpPing, 1), new(wire.Reply)); err != nil {
			t.Error(err)
		}
	})
}

// Requests that do not finish are cut off when the context ends.
func TestCloseCutsOff(t *testing.T) {
	b := newBed(t, false, nil)
	b.fake.set(wire.OpGetattr, true)
	c := b.dial(nil)
	res := make(chan error, 1)
	c.Start(request(wire.OpGetattr, 1), new(wire.Reply), func(err error) { res <- err })
	eventually(t, "request", func() bool { return b.fake.seen(wire.OpGetattr) == 1 })
	now, cancel := context.WithCancel(ctx)
	cancel()
	if err := b.srv.StopTarget(now, "fake"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	isLost(t, <-res, true)
}

// Silence longer than the idle time does no harm, since pings break it; a
// server that has stopped answering is noticed.
func TestKeepalive(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.Timeouts.Idle = 2 * time.Second })
	c := b.dial(func(o *DialOptions) { o.Timeouts.Idle = 2 * time.Second })
	time.Sleep(5 * time.Second)
	if err := c.Call(ctx, request(wire.OpPing, 1), new(wire.Reply)); err != nil {
		t.Fatal(err)
	}
	silent := b.dial(func(o *DialOptions) { o.Timeouts.Idle = time.Hour })
	<-silent.Done()
	if b.srv.Stats().Timeouts != 1 {
		t.Errorf("%+v", b.srv.Stats())
	}
}

// A connection at its memory limit is not read from, but the others are.
func TestMemoryLimit(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.ConnMemory, o.TotalMemory = 256<<10, 512<<10 })
	b.fake.set(wire.OpWrite, true)
	var conns []*Conn
	done := make(chan error, 100)
	for range 4 {
		c := b.dial(nil)
		conns = append(conns, c)
		for i := range 5 {
			req := request(wire.OpWrite, uint64(i))
			req.Bulk = make([]byte, 128<<10)
			c.Start(req, new(wire.Reply), func(err error) { done <- err })
		}
	}
	// The first two fill the total; each further one gets its one request.
	eventually(t, "full memory", func() bool { return b.fake.seen(wire.OpWrite) >= 4 && b.srv.Stats().MemoryWaiting > 0 })
	for range 10 {
		time.Sleep(2 * time.Millisecond)
		if m := b.srv.Stats().MemoryInUse; m > 512<<10+4*(128<<10) {
			t.Fatalf("%d bytes in use", m)
		}
	}
	b.fake.mu.Lock()
	n := len(b.fake.held)
	b.fake.mu.Unlock()
	if n > 8 {
		t.Fatalf("%d writes in work", n)
	}
	conns[3].Abort(ErrClosed) // while its reader waits
	b.fake.set(wire.OpWrite, false)
	for range 20 {
		b.fake.release()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("stuck")
		}
	}
}

// A target that takes its time, with a connection that is not read meanwhile,
// is not taken for dead.
func TestSlowTarget(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.ConnMemory, o.Timeouts.Idle = 64<<10, time.Second })
	b.fake.set(wire.OpWrite, true)
	c := b.dial(func(o *DialOptions) { o.Timeouts.Idle = time.Second })
	done := make(chan error, 3)
	for i := range 3 {
		req := request(wire.OpWrite, uint64(i))
		req.Bulk = make([]byte, 64<<10)
		c.Start(req, new(wire.Reply), func(err error) { done <- err })
	}
	time.Sleep(3 * time.Second)
	if n := b.fake.seen(wire.OpWrite); n != 1 {
		t.Fatal(n)
	}
	b.fake.set(wire.OpWrite, false)
	b.fake.release()
	for range 3 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestBuffers(t *testing.T) {
	for _, n := range []int{1, 4096, 4097, 65536, 1 << 20, 1<<20 + 1, wire.MaxBulk} {
		p := getBuf(n)
		if len(*p) != n || int64(cap(*p)) != bufCost(n) || aligned(*p) != 0 {
			t.Errorf("%d: len %d cap %d cost %d, %d past a page", n, len(*p), cap(*p), bufCost(n), aligned(*p))
		}
		putBuf(p)
	}
}
