package rpcbind

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/baton-nfs/baton/internal/xdr"
)

// fake is a minimal rpcbind on TCP and UDP of one port, for the client's tests.
type fake struct {
	srv      *Server
	addr     netip.AddrPort
	trustAll bool // callers count as privileged
	only2    bool // no rpcbind 3 and 4
	dropNext atomic.Int32
}

func startFake(t *testing.T, tab *Table) *fake { return startFakeAt(t, tab, "127.0.0.1:0") }

func startFakeAt(t *testing.T, tab *Table, at string) *fake {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		return nil
	}
	p, err := net.ListenPacket("udp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{srv: &Server{Table: tab}, addr: netip.MustParseAddrPort(l.Addr().String())}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				for {
					rec, err := readRecord(c)
					if err != nil {
						return
					}
					rep := f.answer(rec, netip.MustParseAddrPort(c.RemoteAddr().String()), false)
					// Two fragments, as big servers do.
					out := binary.BigEndian.AppendUint32(nil, 8)
					out = append(out, rep[:8]...)
					out = binary.BigEndian.AppendUint32(out, uint32(len(rep)-8)|1<<31)
					if _, err := c.Write(append(out, rep[8:]...)); err != nil {
						return
					}
				}
			})
		}
	})
	wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			if f.dropNext.Load() > 0 {
				f.dropNext.Add(-1)
				continue
			}
			p.WriteTo([]byte{1, 2, 3, 4, 5}, from) // a stray datagram first
			p.WriteTo(f.answer(buf[:n], netip.MustParseAddrPort(from.String()), true), from)
		}
	})
	t.Cleanup(func() { l.Close(); p.Close(); wg.Wait() })
	return f
}

func (f *fake) answer(rec []byte, from netip.AddrPort, udp bool) []byte {
	r := xdr.NewReader(rec)
	xid := r.Uint32()
	r.Skip(12)
	q := question{vers: r.Uint32(), proc: r.Uint32(), local: f.addr, remote: from, udp: udp}
	for range 2 {
		r.Uint32()
		r.Opaque(400)
	}
	q.args = r.Rest()
	if f.trustAll {
		q.remote = netip.AddrPortFrom(from.Addr(), 700)
	}
	var w xdr.Writer
	for _, v := range []uint32{xid, 1, 0, 0, 0} {
		w.Uint32(v)
	}
	if f.only2 && q.vers != 2 {
		for _, v := range []uint32{2, 2, 2} { // PROG_MISMATCH 2..2
			w.Uint32(v)
		}
		return w.Buf
	}
	w.Uint32(0)
	switch f.srv.serve(&q, &w) {
	case procUnavail:
		w.PutUint32At(20, 3)
	case garbageArgs:
		w.PutUint32At(20, 4)
	}
	return w.Buf
}
