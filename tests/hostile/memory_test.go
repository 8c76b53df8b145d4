package hostile

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/tests/bed"
)

const mib = 1 << 20

// smallMemory is a configuration whose memory use can be told: 64 MiB for
// requests and replies, and small caches.
const (
	smallMemory = "inflight = \"64 MiB\"\nconn_inflight = \"8 MiB\"\n"
	smallCaches = "[mdt]\nblock_cache = \"16 MiB\"\ninode_cache = 10000\n"
	// rssBound is what the server may have resident with that configuration:
	// a quarter beyond inflight, as much again for the garbage collector (which
	// by default lets the heap double), the same for the store's caches and
	// memory tables, and the program itself.
	rssBound = 400 * mib
)

// rss samples the resident memory of a server until the function returned is
// called, which gives the highest value.
func watchRSS(s *server) func() int64 {
	stop, result := make(chan struct{}), make(chan int64)
	pid := s.cmd.Process.Pid
	go func() {
		var top int64
		for {
			if u, err := bed.ProcUsage(pid); err == nil {
				top = max(top, u.RSS)
			}
			select {
			case <-stop:
				result <- top
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return func() int64 { close(stop); return <-result }
}

func nowRSS(t testing.TB, s *server) int64 {
	t.Helper()
	u, err := bed.ProcUsage(s.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return u.RSS
}

// crowd is a set of connections from several client addresses.
type crowd struct {
	mu sync.Mutex
	l  []net.Conn
}

func (c *crowd) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range c.l {
		x.Close()
	}
	c.l = nil
}

// addr is the i-th client address.
func addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 1, byte(1 + i)}) }

// join opens n connections, each from one of ten addresses, and gives each to f.
func (c *crowd) join(t testing.TB, to netip.AddrPort, n int, f func(i int, x net.Conn)) {
	t.Helper()
	for i := range n {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr(i%10), 0)), Timeout: patience}
		x, err := d.Dial("tcp", to.String())
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.mu.Lock()
		c.l = append(c.l, x)
		c.mu.Unlock()
		if f != nil {
			f(i, x)
		}
	}
}

// normal is a client that works as ever until the function returned is called,
// which reports how many rounds it made and the longest one.
func normal(t *testing.T, s *server) func() (int, time.Duration) {
	c := s.client("/rw")
	dir := c.mkdir(c.root, fmt.Sprint("normal", xid()))
	stop, done := make(chan struct{}), make(chan struct{})
	var rounds int
	var worst time.Duration
	go func() {
		defer close(done)
		data := pattern(9, 256<<10)
		for {
			select {
			case <-stop:
				return
			default:
			}
			begin := time.Now()
			step := begin
			slow := func(what string) {
				if d := time.Since(step); d > 2*time.Second {
					t.Logf("a normal client's %s took %v", what, d.Round(time.Millisecond))
				}
				step = time.Now()
			}
			name := fmt.Sprint("f", rounds)
			cr, err := c.tryCreate(dir, name)
			if err != nil || cr.Status != nfs.NFSStatusOk {
				t.Errorf("a normal client's CREATE: %v, %v", cr.Status, err)
				return
			}
			slow("CREATE")
			wr, err := c.tryWrite(cr.FH, 0, data, 2)
			if err != nil || wr.Status != nfs.NFSStatusOk {
				t.Errorf("a normal client's WRITE: %v, %v", wr.Status, err)
				return
			}
			slow("WRITE")
			rd, err := c.tryRead(cr.FH, 0, 1<<20)
			if err != nil || !bytes.Equal(rd.Data, data) {
				t.Errorf("a normal client's READ: %v, %d bytes, %v", rd.Status, len(rd.Data), err)
				return
			}
			slow("READ")
			var rm nfs3.WccRes
			if err := c.do(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: []byte(name)}, &rm); err != nil || rm.Status != nfs.NFSStatusOk {
				t.Errorf("a normal client's REMOVE: %v, %v", rm.Status, err)
				return
			}
			slow("REMOVE")
			worst = max(worst, time.Since(begin))
			rounds++
		}
	}()
	return func() (int, time.Duration) { close(stop); <-done; return rounds, worst }
}

// TestMemory has 1,000 connections of which 600 do harm: 300 ask for data that
// they never read, 300 begin records that they never finish.
func TestMemory(t *testing.T) {
	scale := 100
	if testing.Short() {
		scale = 20
	}
	s := serve(t, options{nfs: smallMemory, toml: smallCaches})
	w := newWitness(s)
	c := s.client("/rw")
	big := c.create(c.root, "big")
	for i := range 8 {
		c.write(big, uint64(i)*mib, pattern(i, mib))
	}
	before := nowRSS(t, s)
	stopNormal := normal(t, s)
	stopRSS := watchRSS(s)

	var crowd crowd
	defer crowd.close()
	// 40 READs of 1 MiB each: together far more than memory allows.
	crowd.join(t, s.nfs, 3*scale, func(i int, x net.Conn) {
		if err := x.(*net.TCPConn).SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		var b []byte
		for k := range 40 {
			b = append(b, record(nfsCall(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: big, Offset: uint64(k%8) * mib, Count: mib}).bytes())...)
		}
		if _, err := x.Write(b); err != nil {
			t.Errorf("READs on connection %d: %v", i, err)
		}
	})
	var wg sync.WaitGroup
	crowd.join(t, s.nfs, 3*scale, func(i int, x net.Conn) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			m := nfsCall(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: big, Count: mib, Stable: 2, Data: make([]byte, mib)})
			b := record(m.bytes())
			// The server need not take more than it has room for.
			x.SetWriteDeadline(time.Now().Add(2 * time.Second))
			x.Write(b[:len(b)/2+i*1000])
		}()
	})
	crowd.join(t, s.nfs, 4*scale, nil)
	wg.Wait()
	// Let it stand for a while: nothing may grow.
	stand := 3 * time.Second
	if testing.Short() {
		stand = 500 * time.Millisecond
	}
	time.Sleep(stand)
	w.check(func() { s.alive(badWords) })
	rounds, worst := stopNormal()
	top := stopRSS()
	t.Logf("%d connections, %d with 40 MiB of unread replies each, %d with half records, %d idle; inflight 64 MiB: RSS %d MiB before, at most %d MiB (bound %d MiB); a normal client made %d rounds, the longest %v",
		10*scale, 3*scale, 3*scale, 4*scale, before/mib, top/mib, rssBound/mib, rounds, worst.Round(time.Millisecond))
	if top > rssBound {
		t.Errorf("RSS %d MiB, want at most %d MiB", top/mib, rssBound/mib)
	}
	if rounds == 0 {
		t.Error("a normal client was not served")
	}
	crowd.close()
	if testing.Short() {
		t.Log("whether memory is given back is not waited for, reason: -short")
		w.check(func() { s.alive(badWords) })
		s.stop()
		return
	}
	var after int64
	eventually(t, "memory to be given back after the connections were closed", func() bool {
		after = nowRSS(t, s)
		return after < max(before+64*mib, top*3/4)
	})
	t.Logf("RSS %d MiB after the connections were closed", after/mib)
	if big := c.read(big, 7*mib, mib); !bytes.Equal(big, pattern(7, mib)) {
		t.Error("the data have changed")
	}
	w.check(func() { s.alive(badWords) })
	s.stop()
	s.fsck()
}

// TestTooManyConnections opens more connections than the server takes.
func TestTooManyConnections(t *testing.T) {
	limit, toml := 4096, ""
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	// The server leaves half of its descriptors to the targets.
	if testing.Short() || lim.Cur < 2*4096+500 {
		limit = 500
		toml = "max_connections = 500\n"
		t.Logf("500 connections instead of 4096 (-short, or RLIMIT_NOFILE is %d)", lim.Cur)
	}
	s := serve(t, options{nfs: toml})
	w := newWitness(s)
	c := s.client("/rw")
	before := nowRSS(t, s)
	var crowd crowd
	defer crowd.close()
	refused := func(from netip.Addr) bool {
		x, err := tryDial("tcp", netip.AddrPortFrom(from, 0), s.nfs)
		if err != nil {
			return true
		}
		defer x.Close()
		_, err = x.call(null(nfs3.Program, 3))
		if err == errHang {
			t.Fatal(err)
		}
		return err != nil
	}
	// The good client and the witness hold one connection each; those that were
	// used before count until the server has noticed their end.
	count := func(n int) func() bool {
		return func() bool { open, _ := s.conns(); return open == n }
	}
	const held = 2
	eventually(t, "connections used before to go", count(held))
	crowd.join(t, s.nfs, limit-held, nil)
	eventually(t, "the limit to be reached", count(limit))
	if _, n := s.conns(); n != 0 {
		t.Errorf("%d connections refused below the limit", n)
	}
	stop := normalOn(t, c)
	for i := range 300 {
		if !refused(addr(100 + i%10)) {
			t.Fatalf("connection %d beyond the limit was served", i)
		}
	}
	if n := stop(); n == 0 {
		t.Error("the client that was there was not served")
	}
	full := nowRSS(t, s)
	t.Logf("%d connections: RSS %d MiB before, %d MiB with them (%d bytes each)", limit, before/mib, full/mib, (full-before)/int64(limit))
	if full-before > int64(limit)*64<<10 {
		t.Errorf("an idle connection takes %d bytes", (full-before)/int64(limit))
	}
	// The others are still served, from first to last.
	last := len(crowd.l) - 1
	for i := 0; i <= last; i = max(i+1, min(i+limit/20, last)) {
		x := &conn{Conn: crowd.l[i]}
		if p, err := x.call(null(nfs3.Program, 3)); err != nil || p.stat != 0 {
			t.Errorf("connection %d: %+v, %v", i, p, err)
		}
	}
	crowd.l[5].Close()
	eventually(t, "a place to become free", func() bool { return !refused(addr(99)) })
	crowd.close()
	eventually(t, "the connections to go", func() bool { return !refused(addr(99)) })
	w.check(func() { s.alive(badWords) })
	s.stop()
	runtime.GC()
}

// normalOn keeps one connection busy.
func normalOn(t *testing.T, c *client) func() int {
	stop, done := make(chan struct{}), make(chan struct{})
	n := 0
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			var r nfs3.GetattrRes
			if err := c.do(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: c.root}, &r); err != nil || r.Status != nfs.NFSStatusOk {
				t.Errorf("GETATTR: %v, %v", r.Status, err)
				return
			}
			n++
		}
	}()
	return func() int { close(stop); <-done; return n }
}

// TestOneClientsConnections keeps one address from taking all places.
func TestOneClientsConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	s := serve(t, options{})
	w := newWitness(s)
	var l []*conn
	for {
		x, err := tryDial("tcp", netip.AddrPortFrom(addr(0), 0), s.nfs)
		if err != nil {
			break
		}
		l = append(l, x)
		if _, err := x.call(null(nfs3.Program, 3)); err != nil {
			if err == errHang {
				t.Fatal(err)
			}
			break
		}
		if len(l) > 4000 {
			t.Fatal("one address has 4000 connections")
		}
	}
	t.Logf("one address got %d connections", len(l)-1)
	w.check(func() { s.alive(badWords) }) // from another address
	for _, x := range l {
		x.Close()
	}
	s.stop()
}
