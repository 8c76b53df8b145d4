package nfsload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// echoNull answers every call on a connection as a NULL procedure, as cheaply
// as the load generator asks.
func echoNull(nc net.Conn) {
	in := make([]byte, 256<<10)
	var out []byte
	have := 0
	for {
		n, err := nc.Read(in[have:])
		if err != nil {
			return
		}
		have += n
		at := 0
		out = out[:0]
		for have-at >= 4 {
			l := int(binary.BigEndian.Uint32(in[at:]) &^ (1 << 31))
			if have-at < 4+l {
				break
			}
			out = appendU32(out, 1<<31|24, binary.BigEndian.Uint32(in[at+4:]), 1, 0, 0, 0, 0)
			at += 4 + l
		}
		have = copy(in, in[at:have])
		if _, err := nc.Write(out); err != nil {
			return
		}
	}
}

type nulls struct{ left int }

func (n *nulls) Next(*Conn, int) (uint32, bool) {
	n.left--
	return ProcNull, n.left >= 0
}
func (n *nulls) Reply(int, []byte) (int, error) { return 1, nil }

func pair(t testing.TB, serve func(net.Conn)) *Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		nc, err := l.Accept()
		if err != nil {
			return
		}
		serve(nc)
		nc.Close()
	}()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close(); l.Close(); <-done })
	return NewConn(nc, ProgNFS)
}

func TestRunCountsEveryReply(t *testing.T) {
	for _, depth := range []int{1, -7, 7, -64, 64} {
		c := pair(t, echoNull)
		c.Batch = depth < 0
		depth = max(depth, -depth)
		start := time.Now()
		const n = 50000
		ops, err := c.Run(depth, start.Add(time.Hour), &nulls{left: n})
		if err != nil || ops != n {
			t.Fatalf("depth %d: %d operations, %v; want %d", depth, ops, err, n)
		}
		t.Logf("depth %d, batched %v: %.0f calls/s", depth, c.Batch, n/time.Since(start).Seconds())
	}
}

func TestDeadlineEndsRun(t *testing.T) {
	c := pair(t, echoNull)
	if _, err := c.Run(16, time.Now().Add(50*time.Millisecond), &nulls{left: 1 << 40}); err != nil {
		t.Fatal(err)
	}
	// Nothing is left over: the connection serves the next run.
	if ops, err := c.Run(3, time.Now().Add(time.Hour), &nulls{left: 10}); err != nil || ops != 10 {
		t.Fatalf("%d, %v", ops, err)
	}
}

// A large payload arrives whole, and a reply may come in fragments.
func TestPayloadAndFragments(t *testing.T) {
	payload := make([]byte, 1<<20)
	c := pair(t, func(nc net.Conn) {
		var h [4]byte
		io.ReadFull(nc, h[:])
		n := int64(binary.BigEndian.Uint32(h[:]) &^ (1 << 31))
		rec := make([]byte, n)
		if _, err := io.ReadFull(nc, rec); err != nil {
			return
		}
		b := appendU32(nil, 16, binary.BigEndian.Uint32(rec), 1, 0, 0)
		b = appendU32(b, 1<<31|12, 0, 0, uint32(n))
		for i := range b { // one byte at a time: every partial state occurs
			nc.Write(b[i : i+1])
		}
	})
	b, err := c.Call(ProcWrite, func(c *Conn) { c.Payload(payload) })
	if err != nil || len(b) != 4 {
		t.Fatalf("%x, %v", b, err)
	}
	if got := int(binary.BigEndian.Uint32(b)); got != 24+len(c.cred)+4+len(payload) {
		t.Errorf("server saw a record of %d bytes", got)
	}
}

func TestBadReplies(t *testing.T) {
	for name, reply := range map[string][]byte{
		"oversized":   appendU32(nil, 1<<31|(maxReply+1)),
		"short":       appendU32(nil, 1<<31|8, 0, 0),
		"strange xid": appendU32(nil, 1<<31|24, 5, 1, 0, 0, 0, 0),
	} {
		c := pair(t, func(nc net.Conn) {
			var b [1024]byte
			nc.Read(b[:])
			nc.Write(reply)
		})
		if _, err := c.Call(ProcNull, nil); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v, want ErrProtocol", name, err)
		}
	}
	c := pair(t, func(nc net.Conn) {})
	if _, err := c.Call(ProcNull, nil); err == nil {
		t.Error("a closed connection gave no error")
	}
}

func TestReadPage(t *testing.T) {
	b := appendU32(nil, 0, 0, 0, 9) // status, no attributes, verifier
	for i := range uint32(3) {
		b = appendU32(b, 1, 0, i)
		b = appendOpaque(b, []byte{'a' + byte(i)})
		b = appendU32(b, 0, i+10, 1)
		b = append(b, make([]byte, attrSize)...)
		b = appendU32(b, 1)
		b = appendOpaque(b, []byte("handle"))
	}
	b = appendU32(b, 0, 1)
	var names string
	cookie, verf, n, eof, err := ReadPage(b, func(name, fh []byte) { names += string(name) + string(fh[:1]) })
	if err != nil || cookie != 12 || verf != 9 || n != 3 || !eof || names != "ahbhch" {
		t.Errorf("cookie %d verf %d n %d eof %v names %s err %v", cookie, verf, n, eof, names, err)
	}
	for i := range len(b) - 1 {
		if _, _, _, _, err := ReadPage(b[:i], nil); err == nil {
			t.Errorf("result cut to %d bytes was accepted", i)
		}
	}
}

func TestCheckObject(t *testing.T) {
	attr := make([]byte, attrSize)
	get := append(appendU32(nil, 0), attr...)
	look := appendOpaque(appendU32(nil, 0), []byte("handle"))
	look = append(append(append(appendU32(look, 1), attr...), 0, 0, 0, 1), attr...)
	acc := appendU32(append(appendU32(nil, 0, 1), attr...), 0x1f)
	for proc, b := range map[uint32][]byte{ProcGetattr: get, ProcLookup: look, ProcAccess: acc} {
		f := CheckObject(proc)
		if n, err := f(0, b); n != 1 || err != nil {
			t.Errorf("procedure %d: %d, %v", proc, n, err)
		}
		for i := range b {
			if _, err := f(0, b[:i]); err == nil {
				t.Errorf("procedure %d: a result cut to %d bytes was accepted", proc, i)
			}
		}
		if _, err := f(0, append(b, 0, 0, 0, 0)); err == nil {
			t.Errorf("procedure %d: a longer result was accepted", proc)
		}
	}
}

func BenchmarkNull(b *testing.B) {
	for _, batch := range []bool{false, true} {
		b.Run(fmt.Sprint("batched=", batch), func(b *testing.B) {
			c := pair(b, echoNull)
			c.Batch = batch
			if _, err := c.Run(32, time.Now().Add(time.Hour), &nulls{left: b.N}); err != nil {
				b.Fatal(err)
			}
		})
	}
}
