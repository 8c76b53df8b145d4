package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/tests/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

var ctx = context.Background()

// patience is what nothing may take: only a hang exceeds it.
const patience = 90 * time.Second

// cell is a cluster: a and b are frontends, a has the registry, c and d may run the
// MDT and all OSTs.
type cell struct {
	t    *testing.T
	dir  string
	bin  string
	host *bed.Node
	tls  string // mode
	// locks of files keep processes off the stores besides the owner records.
	locks bool
	// ping and silence are the ping interval and time-out.
	ping, silence string

	// etcd are the ports for clients and members of an embedded etcd with the registry,
	// on a, b and c; none: it is with the MGS.
	etcd []int
	// address is 127.0.0.1 unless it is set.
	address map[string]string

	ports map[string]int
	nfs   map[string]int // ports of the frontends
	procs map[string]*bed.Proc
}

var starts = map[string][]string{"a": {"MGS"}, "c": {"MDT0000", "OST0000"}, "d": {"OST0001"}}

func newCell(t *testing.T) *cell {
	t.Helper()
	bin, err := bed.Build("./cmd/baton")
	if err != nil {
		t.Fatal(err)
	}
	c := &cell{t: t, dir: bed.Dir(t), bin: bin, host: bed.HostNode(), tls: "off", locks: true, ping: "1s", silence: "10s",
		address: map[string]string{}, ports: map[string]int{}, nfs: map[string]int{}, procs: map[string]*bed.Proc{}}
	for i, p := range freePorts(t, 6) {
		if n := string("abcd"[i%4]); i < 4 {
			c.ports[n] = p
		} else {
			c.nfs[n] = p
		}
	}
	t.Cleanup(func() {
		for _, n := range []string{"b", "c", "d", "a"} {
			if c.procs[n] != nil {
				c.kill(n)
			}
			if t.Failed() {
				t.Logf("end of the log of %s:\n%s", n, c.log(n))
			}
		}
		c.host.Close()
	})
	return c
}

func freePorts(t *testing.T, n int) (ps []int) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ps = append(ps, l.Addr().(*net.TCPAddr).Port)
	}
	return ps
}

func (c *cell) path(elem ...string) string {
	return filepath.Join(append([]string{c.dir}, elem...)...)
}

func (c *cell) write(name, text string) {
	c.t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cell) socket(n string) string { return c.path(n, "s") }
func (c *cell) log(n string) string {
	b, err := os.ReadFile(c.path(n, "log"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-12000):])
}

// configure writes a node's configuration.
func (c *cell) configure(n string) {
	c.t.Helper()
	if err := os.MkdirAll(c.path(n), 0o700); err != nil {
		c.t.Fatal(err)
	}
	start := starts[n]
	if c.etcd != nil && n == "a" {
		start = nil // its MGS
	}
	quoted := fmt.Sprintf("%q", start)
	if len(start) == 0 {
		quoted = "[]"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `data_dir = %q
cluster_key_file = %q
[cluster]
node = %q
tls = %q
tls_dir = %q
file_locks = %v
start = %s
`, c.path(n), c.path("cluster.key"), n, c.tls, c.path(n, "tls"), c.locks, strings.ReplaceAll(quoted, "\" \"", "\", \""))
	for _, m := range []string{"a", "b", "c", "d"} {
		fmt.Fprintf(&b, "[[cluster.nodes]]\nname = %q\naddress = \"%s:%d\"\n", m, cmp.Or(c.address[m], "127.0.0.1"), c.ports[m])
	}
	if c.etcd != nil {
		fmt.Fprintf(&b, "[registry]\nkind = \"etcd-embedded\"\nmembers = [\"a\", \"b\", \"c\"]\nclient_port = %d\npeer_port = %d\nlease = \"2s\"\n", c.etcd[0], c.etcd[1])
	}
	addrs := "[]"
	if c.nfs[n] != 0 {
		addrs = map[string]string{"a": `["127.0.0.2"]`, "b": `["127.0.0.3"]`}[n]
	}
	fmt.Fprintf(&b, `[nfs]
addresses = %s
port = %[2]d
mount_port = %[2]d
drain_timeout = "2s"
[exports]
file = %[3]q
[rpcbind]
mode = "off"
[http]
address = ""
[locks]
enabled = false
[control]
socket = %[4]q
[fs]
min_free = "1 MiB"
[recovery]
window_min = "5s"
window_max = "10s"
ping_interval = %[9]q
ping_timeout = %[10]q
heartbeat = "2s"
[mgs]
dir = %[5]q
nodes = ["a"]
[mdt]
dir = %[6]q
nodes = ["c", "d"]
[[ost]]
dir = %[7]q
nodes = ["c", "d"]
[[ost]]
dir = %[8]q
nodes = ["c", "d"]
`, addrs, max(c.nfs[n], 1), c.path("exports"), c.socket(n), c.path("mgs"), c.path("mdt"), c.path("ost0"), c.path("ost1"), c.ping, c.silence)
	c.write(c.path(n, "baton.toml"), b.String())
	c.write(c.path("exports"), "/disk *(rw,insecure,no_root_squash,dir=/)\n/two *(rw,insecure,no_root_squash,dir=/two,durability=two-node)\n")
}

// start starts a node without waiting for anything.
func (c *cell) start(n string) {
	c.t.Helper()
	c.configure(n)
	log, err := os.OpenFile(c.path(n, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	cmd := bed.Command(c.bin, "serve", "--config", c.path(n, "baton.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	if c.procs[n], err = c.host.Spawn(cmd); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cell) kill(n string) {
	c.procs[n].Kill()
	delete(c.procs, n)
}

// stop ends a node in order.
func (c *cell) stop(n string) {
	c.t.Helper()
	if err := c.procs[n].Stop(patience); err != nil {
		c.t.Errorf("stop %s: %v", n, err)
	}
	delete(c.procs, n)
}

func (c *cell) signal(n string, s syscall.Signal) {
	c.t.Helper()
	if err := syscall.Kill(c.procs[n].Pid(), s); err != nil {
		c.t.Fatal(err)
	}
}

// order gives a command to a node and returns what it prints.
func (c *cell) order(n string, args ...string) (string, error) {
	x, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := exec.CommandContext(x, c.bin, append(args, "--socket", c.socket(n))...).CombinedOutput()
	return string(out), err
}

// fsck checks all stores.
func (c *cell) fsck() (string, error) {
	x, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := exec.CommandContext(x, c.bin, "fsck", "--config", c.path("c", "baton.toml")).CombinedOutput()
	return string(out), err
}

func (c *cell) must(n string, args ...string) {
	c.t.Helper()
	if out, err := c.order(n, args...); err != nil {
		c.t.Fatalf("baton %v on %s: %v\n%s", args, n, err, out)
	}
}

// move stops a target on one node and starts it on the other.
func (c *cell) move(target, from, to string) {
	c.t.Helper()
	c.must(from, "target", "stop", target)
	c.must(to, "target", "start", target)
}

func (c *cell) until(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// state is that of a target as a node lists it.
func (c *cell) state(n, target string) string {
	out, err := c.order(n, "target", "list")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == target {
			return f[1]
		}
	}
	return "not listed"
}

// gone is the ID of the one client of a target that is not connected.
func (c *cell) gone(n, target string) (id string) {
	c.t.Helper()
	c.until("a client that is not connected", func() bool {
		var l []status.Target
		out, err := c.order(n, "target", "list", "--json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &l)
		}
		if err != nil {
			c.t.Fatalf("%v\n%s", err, out)
		}
		for _, x := range l {
			for _, k := range x.Table {
				if x.Name == target && !k.Connected {
					id = k.ID
				}
			}
		}
		return id != ""
	})
	return id
}

func (c *cell) untilUp(n string, targets ...string) {
	c.t.Helper()
	for _, x := range targets {
		c.until(x+" on "+n, func() bool { return c.state(n, x) == "up" })
	}
}

// up starts all nodes and waits for their targets.
func (c *cell) up() {
	c.t.Helper()
	for _, n := range []string{"a", "b", "c", "d"} {
		c.start(n)
	}
	c.untilUp("a", "MGS")
	c.untilUp("c", "MDT0000", "OST0000")
	c.untilUp("d", "OST0001")
}

// client is an NFS client of one frontend. It repeats a call when it is told to
// wait, as clients do; everything else that is not success is an error.
type client struct {
	c    *cell
	node string
	root []byte
	rpc  *sunrpc.Client
	mu   sync.Mutex
	slow time.Duration // the longest call
}

func (c *cell) dial(n, export string) *client {
	c.t.Helper()
	ap := netip.AddrPortFrom(netip.MustParseAddr(map[string]string{"a": "127.0.0.2", "b": "127.0.0.3"}[n]), uint16(c.nfs[n]))
	var m *sunrpc.Client
	connect := func(prog, vers uint32) (*sunrpc.Client, error) {
		return sunrpc.Dial(ctx, "tcp", netip.AddrPort{}, ap, prog, vers, sunrpc.Cred{Flavor: sunrpc.AuthSys})
	}
	c.until("the frontend "+n, func() (ok bool) {
		var err error
		if m, err = connect(mount3.Program, mount3.Version); err != nil {
			select {
			case <-c.procs[n].Done():
				c.t.Fatalf("%s has ended: %v", n, c.procs[n].Err())
			default:
			}
		}
		return err == nil
	})
	defer m.Close()
	var w xdr.Writer
	mount3.EncodePath(&w, export)
	var res mount3.MntRes
	out, err := m.Call(ctx, uint32(nfs.MountProcMount), w.Buf)
	if err == nil {
		err = res.Decode(xdr.NewReader(bytes.Clone(out)))
	}
	if err != nil || res.Status != nfs.MountStatusOk {
		c.t.Fatalf("mount %s: %v, %v", export, err, res.Status)
	}
	k := &client{c: c, node: n, root: bytes.Clone(res.FH)}
	if k.rpc, err = connect(nfs3.Program, nfs3.Version); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { k.rpc.Close() })
	return k
}

type result interface{ Decode(*xdr.Reader) error }

// call executes a procedure until it is not told to wait; status points into res.
func (k *client) call(proc nfs.NFSProcedure, args func(*xdr.Writer), res result, status *nfs.NFSStatus) error {
	began := time.Now()
	x, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var w xdr.Writer
	args(&w)
	for {
		out, err := k.rpc.Call(x, uint32(proc), w.Buf)
		if err == nil {
			err = res.Decode(xdr.NewReader(bytes.Clone(out)))
		}
		switch {
		case err != nil:
			return fmt.Errorf("%v through %s: %w", proc, k.node, err)
		case *status == nfs.NFSStatusJukebox:
			time.Sleep(100 * time.Millisecond)
			continue
		case *status != nfs.NFSStatusOk:
			return fmt.Errorf("%v through %s: %v", proc, k.node, *status)
		}
		k.mu.Lock()
		k.slow = max(k.slow, time.Since(began))
		k.mu.Unlock()
		return nil
	}
}

func (k *client) create(name string) ([]byte, error) {
	var r nfs3.CreateRes
	err := k.call(nfs.NFSProcedureCreate, (&nfs3.CreateArgs{FH: k.root, Name: []byte(name), How: wire.Guarded}).Encode, &r, &r.Status)
	return bytes.Clone(r.FH), err
}

func (k *client) write(fh []byte, off uint64, data string, how wire.StableHow) (verf [8]byte, err error) {
	var r nfs3.WriteRes
	a := nfs3.WriteArgs{FH: fh, Offset: off, Count: uint32(len(data)), Stable: how, Data: []byte(data)}
	err = k.call(nfs.NFSProcedureWrite, a.Encode, &r, &r.Status)
	if err == nil && int(r.Count) != len(data) {
		err = errors.New("short write")
	}
	return r.Verf, err
}

func (k *client) commit(fh []byte) (verf [8]byte, err error) {
	var r nfs3.CommitRes
	err = k.call(nfs.NFSProcedureCommit, (&nfs3.CommitArgs{FH: fh}).Encode, &r, &r.Status)
	return r.Verf, err
}

func (k *client) rename(from, to string) error {
	var r nfs3.RenameRes
	return k.call(nfs.NFSProcedureRename, (&nfs3.RenameArgs{FromFH: k.root, FromName: []byte(from), ToFH: k.root, ToName: []byte(to)}).Encode, &r, &r.Status)
}

func (k *client) lookup(name string) ([]byte, error) {
	var r nfs3.LookupRes
	err := k.call(nfs.NFSProcedureLookup, (&nfs3.DirOpArgs{FH: k.root, Name: []byte(name)}).Encode, &r, &r.Status)
	return bytes.Clone(r.FH), err
}

func (k *client) read(fh []byte) (string, error) {
	var r nfs3.ReadRes
	err := k.call(nfs.NFSProcedureRead, (&nfs3.ReadArgs{FH: fh, Count: 64 << 10}).Encode, &r, &r.Status)
	return string(r.Data), err
}

func (k *client) size(fh []byte) (uint64, error) {
	var r nfs3.GetattrRes
	err := k.call(nfs.NFSProcedureGetAttr, (&nfs3.FHArgs{FH: fh}).Encode, &r, &r.Status)
	return r.Attr.Size, err
}

// check reads a file by its name.
func (k *client) check(name, want string) {
	k.c.t.Helper()
	fh, err := k.lookup(name)
	if err != nil {
		k.c.t.Errorf("%s: %v", name, err)
		return
	}
	if got, err := k.read(fh); err != nil || got != want {
		k.c.t.Errorf("%s: %.40q, %v, want %.40q", name, got, err, want)
	}
}

// load makes files, writes, commits, renames and reads them until it is ended.
type load struct {
	k     *client
	name  string
	n     atomic.Int64
	stop  chan struct{}
	ended chan error
}

func (k *client) load(name string) *load {
	l := &load{k: k, name: name, stop: make(chan struct{}), ended: make(chan error, 1)}
	go func() { l.ended <- l.run() }()
	return l
}

func (l *load) file(i int64) string { return fmt.Sprintf("%s.%d", l.name, i) }

func content(name string) string { return strings.Repeat(name+"\n", 100) }

func (l *load) run() error {
	for {
		select {
		case <-l.stop:
			return nil
		default:
		}
		i := l.n.Load()
		name := l.file(i)
		fh, err := l.k.create("tmp." + name)
		if err != nil {
			return err
		}
		// The first part has to be there though it was not asked to be on the disk.
		for try := 0; ; try++ {
			v1, err := l.k.write(fh, 0, content(name), wire.Unstable)
			if err != nil {
				return err
			}
			v2, err := l.k.commit(fh)
			if err != nil {
				return err
			}
			if v1 == v2 {
				break
			}
			if try > 10 {
				return errors.New("the write verifier changes again and again")
			}
		}
		if err := l.k.rename("tmp."+name, name); err != nil {
			return err
		}
		got, err := l.k.read(fh)
		if err != nil {
			return err
		}
		if got != content(name) {
			return fmt.Errorf("%s has %.40q", name, got)
		}
		l.n.Add(1)
	}
}

// more waits until the load has made some more files.
func (l *load) more(n int64) {
	l.k.c.t.Helper()
	from := l.n.Load()
	l.k.c.until("the load of "+l.name, func() bool {
		select {
		case err := <-l.ended:
			l.k.c.t.Fatalf("load %s: %v", l.name, err)
		default:
		}
		return l.n.Load() >= from+n
	})
}

// end ends the load and checks through another client what it has made.
func (l *load) end(by *client) {
	t := l.k.c.t
	t.Helper()
	close(l.stop)
	if err := <-l.ended; err != nil {
		t.Fatalf("load %s: %v", l.name, err)
	}
	for i := range l.n.Load() {
		by.check(l.file(i), content(l.file(i)))
	}
	t.Logf("%s: %d files, the longest call took %v", l.name, l.n.Load(), l.k.slow.Round(time.Millisecond))
}
