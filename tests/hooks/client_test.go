package hooks

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/sunrpc/rpctest"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// rpc is an NFS client that sends a call again, with its XID, by a new connection when
// the old one has ended or says nothing.
type rpc struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error)
	addr netip.Addr
	ctx  context.Context
	port int
	conn net.Conn
	xid  uint32
	sent int // calls that were sent again
	// slow is the longest call since it was asked for, in ns.
	slow atomic.Int64
}

// silence is how long a call is waited for before it is sent again. Kernels' clients are
// woken up by the new owner; so is this one, unless that is lost.
const silence = 2 * time.Second

func (c *rpc) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// once sends a call and waits for its answer.
func (c *rpc) once(rec []byte, xid uint32) ([]byte, error) {
	if c.conn == nil {
		ctx, cancel := context.WithTimeout(c.ctx, silence)
		defer cancel()
		conn, err := c.dial(ctx, "tcp", netip.AddrPortFrom(c.addr, uint16(c.port)).String())
		if err != nil {
			return nil, err
		}
		c.conn = conn
	}
	c.conn.SetDeadline(time.Now().Add(silence))
	if _, err := c.conn.Write(rec); err != nil {
		return nil, err
	}
	return rpctest.Reply(c.conn, xid)
}

type result interface{ Decode(*xdr.Reader) error }

// call makes a call until it is answered.
func (c *rpc) call(prog, vers, proc uint32, args func(*xdr.Writer), res result) error {
	c.xid++
	rec := rpctest.Call(c.xid, prog, vers, proc, args)
	began := time.Now()
	for {
		out, err := c.once(rec, c.xid)
		if err == nil {
			if d := int64(time.Since(began)); d > c.slow.Load() {
				c.slow.Store(d)
			}
			return res.Decode(xdr.NewReader(bytes.Clone(out)))
		}
		c.close()
		c.sent++
		if c.ctx.Err() != nil || time.Since(began) > patience {
			return fmt.Errorf("no answer within %v: %w", time.Since(began).Round(time.Millisecond), err)
		}
		select {
		case <-c.ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// worker makes, writes, renames, reads and removes files at an address until it is ended.
// Each result must be as if every operation was executed exactly once.
type worker struct {
	s    *site
	c    *rpc
	name string
	root []byte

	rounds atomic.Int64
	stop   chan struct{}
	ended  chan struct{}
	err    error // after ended

	mu   sync.Mutex
	verf [8]byte // the last write verifier
}

// work begins to work at an address that is served.
func (s *site) work(addr netip.Addr) *worker {
	s.t.Helper()
	w := &worker{s: s, name: strings.ReplaceAll(addr.String(), ".", "-"), stop: make(chan struct{}), ended: make(chan struct{}),
		c: &rpc{dial: s.hub.DialContext, addr: addr, ctx: s.ctx, port: nfsPort}}
	mount := &rpc{dial: s.hub.DialContext, addr: addr, ctx: s.ctx, port: mountPort}
	defer mount.close()
	var m mount3.MntRes
	err := mount.call(mount3.Program, mount3.Version, uint32(nfs.MountProcMount), func(w *xdr.Writer) { mount3.EncodePath(w, exported) }, &m)
	if err != nil || m.Status != nfs.MountStatusOk {
		s.t.Fatalf("mount: %v, %v", err, m.Status)
	}
	w.root = bytes.Clone(m.FH)
	s.workers = append(s.workers, w)
	go func() {
		defer close(w.ended)
		defer w.c.close()
		w.err = w.run()
	}()
	return w
}

func (w *worker) run() error {
	for i := 0; ; i++ {
		select {
		case <-w.stop:
			return nil
		case <-w.s.ctx.Done():
			return w.s.ctx.Err()
		case <-time.After(5 * time.Millisecond): // it is not to keep the machine busy
		}
		if err := w.round(i); err != nil {
			return fmt.Errorf("round %d: %w", i, err)
		}
		w.rounds.Add(1)
	}
}

// nfs makes an NFS call that must end with this status. It is made anew, with another
// XID, when the client is told to wait.
func (w *worker) nfs(proc nfs.NFSProcedure, args func(*xdr.Writer), res result, status *nfs.NFSStatus, want nfs.NFSStatus) error {
	for {
		if err := w.c.call(nfs3.Program, nfs3.Version, uint32(proc), args, res); err != nil {
			return fmt.Errorf("%v: %w", proc, err)
		}
		switch {
		case *status == want:
			return nil
		case *status != nfs.NFSStatusJukebox:
			return fmt.Errorf("%v: %v, want %v", proc, *status, want)
		}
		select {
		case <-w.s.ctx.Done():
			return w.s.ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (w *worker) file(i int) []byte { return []byte(w.name + "." + strconv.Itoa(i)) }

func (w *worker) lookup(name []byte, want nfs.NFSStatus) ([]byte, error) {
	var r nfs3.LookupRes
	err := w.nfs(nfs.NFSProcedureLookup, (&nfs3.DirOpArgs{FH: w.root, Name: name}).Encode, &r, &r.Status, want)
	return bytes.Clone(r.FH), err
}

func (w *worker) read(fh []byte, want string) error {
	var r nfs3.ReadRes
	err := w.nfs(nfs.NFSProcedureRead, (&nfs3.ReadArgs{FH: fh, Count: 4096}).Encode, &r, &r.Status, nfs.NFSStatusOk)
	if err == nil && string(r.Data) != want {
		err = fmt.Errorf("read %q, want %q", r.Data, want)
	}
	return err
}

func (w *worker) round(i int) error {
	tmp, name := []byte("tmp."+w.name), w.file(i)
	var made nfs3.CreateRes
	err := w.nfs(nfs.NFSProcedureCreate, (&nfs3.CreateArgs{FH: w.root, Name: tmp, How: wire.Guarded}).Encode, &made, &made.Status, nfs.NFSStatusOk)
	if err != nil {
		return err
	}
	fh := bytes.Clone(made.FH)
	for { // what was not committed under the verifier of the write is written again
		var wr nfs3.WriteRes
		a := nfs3.WriteArgs{FH: fh, Count: uint32(len(name)), Data: name}
		if err := w.nfs(nfs.NFSProcedureWrite, a.Encode, &wr, &wr.Status, nfs.NFSStatusOk); err != nil {
			return err
		}
		var co nfs3.CommitRes
		if err := w.nfs(nfs.NFSProcedureCommit, (&nfs3.CommitArgs{FH: fh}).Encode, &co, &co.Status, nfs.NFSStatusOk); err != nil {
			return err
		}
		w.mu.Lock()
		w.verf = co.Verf
		w.mu.Unlock()
		if wr.Verf == co.Verf {
			break
		}
	}
	var re nfs3.RenameRes
	err = w.nfs(nfs.NFSProcedureRename, (&nfs3.RenameArgs{FromFH: w.root, FromName: tmp, ToFH: w.root, ToName: name}).Encode, &re, &re.Status, nfs.NFSStatusOk)
	if err != nil {
		return err
	}
	got, err := w.lookup(name, nfs.NFSStatusOk)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, fh) {
		return fmt.Errorf("%s is another file than the one that was renamed", name)
	}
	if err := w.read(fh, string(name)); err != nil {
		return err
	}
	if i < keepers {
		return nil
	}
	var rm nfs3.WccRes
	return w.nfs(nfs.NFSProcedureRemove, (&nfs3.DirOpArgs{FH: w.root, Name: name}).Encode, &rm, &rm.Status, nfs.NFSStatusOk)
}

// keepers is how many files stay until the end.
const keepers = 20

func (w *worker) verifier() [8]byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.verf
}

// more waits until everything of some more rounds was done.
func (w *worker) more(what string) {
	w.s.t.Helper()
	from := w.rounds.Load()
	w.s.wait(fmt.Sprintf("answers of %v after %s", w.c.addr, what), func() bool {
		select {
		case <-w.ended:
			w.s.t.Fatalf("%s: client of %v: %v", what, w.c.addr, w.err)
		default:
		}
		return w.rounds.Load() >= from+3
	})
}

// end ends the work and looks at what is there.
func (w *worker) end() {
	t := w.s.t
	t.Helper()
	close(w.stop)
	<-w.ended
	if w.err != nil {
		t.Errorf("client of %v: %v", w.c.addr, w.err)
		return
	}
	n := int(w.rounds.Load())
	for i := range n {
		if i < keepers {
			fh, err := w.lookup(w.file(i), nfs.NFSStatusOk)
			if err == nil {
				err = w.read(fh, string(w.file(i)))
			}
			if err != nil {
				t.Errorf("%s: %v", w.file(i), err)
			}
		} else if i >= n-keepers {
			if _, err := w.lookup(w.file(i), nfs.NFSStatusNoEnt); err != nil {
				t.Errorf("%s: %v", w.file(i), err)
			}
		}
	}
	w.c.close()
	t.Logf("client of %v: %d rounds, %d calls sent again", w.c.addr, n, w.c.sent)
}
