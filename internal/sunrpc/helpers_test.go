package sunrpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/xdr"
)

const (
	testProg = 200100
	testLow  = 3
	testHigh = 4

	procEcho     = 1 // inline
	procEchoGo   = 2 // on a worker
	procHold     = 3 // finished by testHandler.release
	procRead     = 4 // uint32 n: n payload bytes, inline
	procReadGo   = 5 // the same on a worker
	procGarbage  = 6
	procDrop     = 7
	procTooWeak  = 8
	procSysErr   = 9
	procLongOut  = 10 // uint32 n: n bytes through Out, with GrowOut
	procSink     = 11 // answers the length of the arguments
	procCred     = 12 // answers uid, gid, number of groups, last group
	procStatePtr = 13
	numProcs     = 14
)

type testHandler struct {
	mu   sync.Mutex
	held []*Call
	got  chan struct{}
}

func newTestHandler() *testHandler { return &testHandler{got: make(chan struct{}, 10000)} }

func echo(c *Call) {
	c.Out.Buf = append(c.Out.Buf, c.Args...)
	c.Finish()
}

func read(c *Call) {
	n := int(xdr.NewReader(c.Args).Uint32())
	if n > MaxPayload {
		c.Fail(GarbageArgs)
		return
	}
	b := c.Bulk(n)
	c.Out.Uint32(uint32(n))
	if n > 0 {
		b[0], b[n-1] = 0xaa, 0xbb
	}
	c.SetPayload(b)
	c.Finish()
}

func (h *testHandler) ServeRPC(c *Call) {
	switch c.Proc {
	case procEcho:
		echo(c)
	case procEchoGo:
		c.Go(echo)
	case procHold:
		h.mu.Lock()
		h.held = append(h.held, c)
		h.mu.Unlock()
		h.got <- struct{}{}
	case procRead:
		read(c)
	case procReadGo:
		c.GoReply(int(xdr.NewReader(c.Args).Uint32()), read)
	case procGarbage:
		c.Out.Uint32(1)
		c.Fail(GarbageArgs)
	case procDrop:
		c.Drop()
	case procTooWeak:
		c.AuthError(AuthTooWeak)
	case procSysErr:
		c.Fail(SystemErr)
	case procLongOut:
		n := int(xdr.NewReader(c.Args).Uint32())
		c.GrowOut(n)
		c.Out.Buf = append(c.Out.Buf, bytes.Repeat([]byte{7}, n)...)
		c.Finish()
	case procSink:
		c.Out.Uint32(uint32(len(c.Args)))
		c.Finish()
	case procCred:
		c.Out.Uint32(c.Cred.UID)
		c.Out.Uint32(c.Cred.GID)
		c.Out.Uint32(uint32(c.Cred.NGIDs))
		if c.Cred.NGIDs > 0 {
			c.Out.Uint32(c.Cred.GIDs[c.Cred.NGIDs-1])
		}
		c.Finish()
	default:
		c.Fail(ProcUnavail)
	}
}

// release finishes the held calls, last first.
func (h *testHandler) release() {
	h.mu.Lock()
	held := h.held
	h.held = nil
	h.mu.Unlock()
	for i := len(held) - 1; i >= 0; i-- {
		echo(held[i])
	}
}

type logWriter struct{ tb testing.TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.tb.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

// startServer runs a server on loopback; it is closed when the test ends.
func startServer(tb testing.TB, cfg Config, h Handler) (*Server, netip.AddrPort) {
	tb.Helper()
	if cfg.Programs == nil {
		cfg.Programs = []Program{{
			Prog: testProg, VersLow: testLow, VersHigh: testHigh,
			NumProcs: func(uint32) uint32 { return numProcs }, Handler: h,
		}}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(logWriter{tb}, nil))
	}
	s := NewServer(cfg)
	tb.Cleanup(func() { _ = s.Close() })
	a, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	return s, a
}

func testCtx(tb testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	tb.Cleanup(cancel)
	return ctx
}

func dialRaw(tb testing.TB, a netip.AddrPort) *net.TCPConn {
	tb.Helper()
	nc, err := net.Dial("tcp", a.String())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(30 * time.Second))
	return nc.(*net.TCPConn)
}

// callMsg is a call without a record mark, with AUTH_NONE.
func callMsg(xid, proc uint32, args ...byte) []byte {
	var w xdr.Writer
	for _, v := range []uint32{xid, 0, 2, testProg, testLow, proc, 0, 0, 0, 0} {
		w.Uint32(v)
	}
	return append(w.Buf, args...)
}

func words(v ...uint32) []byte {
	var w xdr.Writer
	for _, x := range v {
		w.Uint32(x)
	}
	return w.Buf
}

func mark(n int, last bool) []byte {
	v := uint32(n)
	if last {
		v |= 1 << 31
	}
	return binary.BigEndian.AppendUint32(nil, v)
}

func record(msg []byte) []byte { return append(mark(len(msg), true), msg...) }

func mustWrite(tb testing.TB, w io.Writer, b []byte) {
	tb.Helper()
	if _, err := w.Write(b); err != nil {
		tb.Fatal(err)
	}
}

func mustRecord(tb testing.TB, r io.Reader) []byte {
	tb.Helper()
	rec, err := readRecord(r)
	if err != nil {
		tb.Fatal(err)
	}
	return rec
}

// eventually waits for a condition that other goroutines bring about.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	tb.Fatalf("never happened: %s", what)
}
