package nfsd

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// loader keeps a number of calls outstanding on one connection.
type loader struct {
	c   net.Conn
	r   *bufio.Reader
	w   *bufio.Writer
	buf []byte
	xid uint32
}

func (l *loader) send(proc nfs.NFSProcedure, enc func(w *xdr.Writer)) {
	l.xid++
	w := xdr.Writer{Buf: l.buf[:0]}
	for _, v := range []uint32{0, l.xid, 0, 2, nfs3.Program, nfs3.Version, uint32(proc), sunrpc.AuthSys, 20, 0, 0, 0, 0, 0, 0, 0} {
		w.Uint32(v)
	}
	enc(&w)
	binary.BigEndian.PutUint32(w.Buf, 1<<31|uint32(len(w.Buf)-4))
	l.buf = w.Buf
	l.w.Write(w.Buf)
}

func (l *loader) recv() error {
	var h [4]byte
	if _, err := io.ReadFull(l.r, h[:]); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint32(h[:]) &^ (1 << 31))
	b, err := l.r.Peek(min(n, 32))
	if err != nil {
		return err
	}
	if len(b) >= 28 && binary.BigEndian.Uint32(b[24:]) != 0 {
		return fmt.Errorf("status %d", binary.BigEndian.Uint32(b[24:]))
	}
	_, err = l.r.Discard(n)
	return err
}

func benchOps(b *testing.B, addr string, depth int, proc nfs.NFSProcedure, enc func(i int, w *xdr.Writer)) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	l := &loader{c: c, r: bufio.NewReaderSize(c, 256<<10), w: bufio.NewWriterSize(c, 256<<10)}
	b.ReportAllocs()
	b.ResetTimer()
	sent, got := 0, 0
	for got < b.N {
		for sent < b.N && sent-got < depth {
			i := sent
			l.send(proc, func(w *xdr.Writer) { enc(i, w) })
			sent++
		}
		l.w.Flush()
		if err := l.recv(); err != nil {
			b.Fatal(err)
		}
		got++
		for got < sent && l.r.Buffered() > 4 {
			if err := l.recv(); err != nil {
				b.Fatal(err)
			}
			got++
		}
	}
}

func BenchmarkNFS(b *testing.B) {
	bd := newBed(&testing.T{}, 1)
	defer bd.stop()
	c, dir := bd.root(), bd.mount("/data")
	fh := c.mustCreate(dir, "f")
	c.write(fh, 0, string(make([]byte, 1<<20)), wire.FileSync)
	n := 0
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("getattr/%d", depth), func(b *testing.B) {
			benchOps(b, bd.addr.String(), depth, nfs.NFSProcedureGetAttr, func(_ int, w *xdr.Writer) { w.Opaque(fh) })
		})
		b.Run(fmt.Sprintf("lookup/%d", depth), func(b *testing.B) {
			benchOps(b, bd.addr.String(), depth, nfs.NFSProcedureLookup, func(_ int, w *xdr.Writer) { (&nfs3.DirOpArgs{FH: dir, Name: []byte("f")}).Encode(w) })
		})
		b.Run(fmt.Sprintf("read4k/%d", depth), func(b *testing.B) {
			benchOps(b, bd.addr.String(), depth, nfs.NFSProcedureRead, func(i int, w *xdr.Writer) {
				(&nfs3.ReadArgs{FH: fh, Offset: uint64(i*7%256) << 12, Count: 4096}).Encode(w)
			})
		})
		b.Run(fmt.Sprintf("write4k/%d", depth), func(b *testing.B) {
			data := make([]byte, 4096)
			benchOps(b, bd.addr.String(), depth, nfs.NFSProcedureWrite, func(i int, w *xdr.Writer) {
				(&nfs3.WriteArgs{FH: fh, Offset: uint64(i*7%256) << 12, Count: 4096, Data: data}).Encode(w)
			})
		})
		b.Run(fmt.Sprintf("create/%d", depth), func(b *testing.B) {
			benchOps(b, bd.addr.String(), depth, nfs.NFSProcedureCreate, func(i int, w *xdr.Writer) {
				n++
				(&nfs3.CreateArgs{FH: dir, Name: fmt.Appendf(nil, "n%d", n), How: wire.Guarded}).Encode(w)
			})
		})
	}
}
