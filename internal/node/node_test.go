package node

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/wire"
)

var ctx = context.Background()

const goodExports = "/data *(rw,insecure,no_root_squash,dir=/data)\n"

// conf is the configuration of a node below dir, with its exports in a file
// beside it and any free ports.
func conf(t *testing.T, dir string) *config.Config {
	t.Helper()
	c := config.Default()
	c.Node, c.DataDir = "test", filepath.Join(dir, "data")
	c.Exports.File = filepath.Join(dir, "exports")
	c.NFS.Port, c.NFS.MountPort, c.Locks.NLMPort, c.Locks.StatdPort = 0, 0, 0, 0
	c.NFS.DrainTimeout = config.Duration(2 * time.Second)
	c.Rpcbind.Mode = config.RpcbindOff
	c.FS.MinFree = 1 << 20
	c.MDT.BlockCache = 8 << 20
	if err := c.Complete(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.Exports.File); errors.Is(err, fs.ErrNotExist) {
		setExports(t, c, goodExports)
	}
	return c
}

func setExports(t *testing.T, c *config.Config, text string) {
	t.Helper()
	if err := os.WriteFile(c.Exports.File, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func start(t *testing.T, c *config.Config) *Node {
	t.Helper()
	n, err := New(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(ctx); err != nil {
		t.Fatal(err)
	}
	stopped := false
	t.Cleanup(func() {
		if !stopped && !n.stopping.Load() {
			stop(t, n)
		}
	})
	return n
}

func stop(t *testing.T, n *Node) {
	t.Helper()
	if err := n.Stop(ctx); err != nil {
		t.Error("stop:", err)
	}
}

// killed starts a node on a copy of what a running one has on the disk, as if
// that one had been killed now.
func killed(t *testing.T, c *config.Config) *Node {
	t.Helper()
	return start(t, conf(t, copied(t, filepath.Dir(c.DataDir))))
}

func copied(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	err := filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		q := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(q, 0o700)
		case !d.Type().IsRegular():
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if err := os.WriteFile(q, b, 0o600); err != nil {
			return err
		}
		// Objects tell by it whether their header is current.
		info, err := d.Info()
		if err != nil {
			return err
		}
		return os.Chtimes(q, info.ModTime(), info.ModTime())
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func create(t *testing.T, n *Node, name string) wire.Attr {
	t.Helper()
	req := wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagWaitCommit | wire.FlagOpenEpoch}, FID: wire.RootFID, Name: []byte(name), How: wire.Guarded}
	var rep wire.Reply
	n.fs.Call(ctx, client.Owner{}, &req, &rep)
	if rep.Status != wire.OK {
		t.Fatal("create:", rep.Status)
	}
	n.fs.Created(rep.Attr.FID, rep.Transno)
	return rep.Attr
}

func write(t *testing.T, n *Node, a wire.Attr, off uint64, data string, how wire.StableHow) {
	t.Helper()
	if _, st := n.fs.Write(ctx, client.Owner{}, &a, off, []byte(data), how); st != wire.OK {
		t.Fatal("write:", st)
	}
}

func setattr(t *testing.T, n *Node, f wire.FID, sa wire.SetAttr) {
	t.Helper()
	req := wire.Request{Header: wire.Header{Op: wire.OpSetattr, Flags: wire.FlagWaitCommit}, FID: f, SetAttr: sa}
	var rep wire.Reply
	n.fs.Setattr(ctx, client.Owner{}, &req, &rep)
	if rep.Status != wire.OK {
		t.Fatal("setattr:", rep.Status)
	}
}

func attr(t *testing.T, n *Node, f wire.FID) wire.Attr {
	t.Helper()
	var a wire.Attr
	if st, _ := n.fs.Attr(ctx, client.Owner{}, f, &a, true); st != wire.OK {
		t.Fatal("attr:", st)
	}
	return a
}

func content(t *testing.T, n *Node, f wire.FID) string {
	t.Helper()
	a := attr(t, n, f)
	p := make([]byte, a.Size)
	k, _, st, _ := n.fs.Read(ctx, client.Owner{}, &a, 0, p, true)
	if st != wire.OK {
		t.Fatal("read:", st)
	}
	return string(p[:k])
}

// recovered checks that nothing of what a crash leaves is left.
func recovered(t *testing.T, n *Node) {
	t.Helper()
	if l, _, err := n.targets.mdt.Body().StaleEpochs(wire.FID{}, 100); err != nil || len(l) != 0 {
		t.Errorf("IO epochs after the start: %v %v", l, err)
	}
	l, err := n.targets.mdt.Body().PendingLogs(0, 100)
	if err != nil {
		t.Error(err)
	}
	for _, r := range l {
		t.Errorf("log after the start: %+v", r)
	}
}

func vips(t *testing.T, r mgs.Registry) []mgs.VIP {
	t.Helper()
	l, err := r.VIPs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func verifiers(t *testing.T, r mgs.Registry) (l []string) {
	for _, v := range vips(t, r) {
		l = append(l, v.Verifier)
	}
	return l
}

func TestStartStopRestart(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	a := create(t, n, "f")
	write(t, n, a, 0, "kept", wire.Unstable)
	if err := n.Probe(ctx); err != nil {
		t.Error(err)
	}
	s := n.Status()
	if len(s.Targets) != 3 || len(s.VIPs) != 1 || len(s.Exports) != 1 || s.Exports[0].Path != "/data" || s.Boot != 1 || len(s.Addresses) < 2 {
		t.Errorf("%+v", s)
	}
	for _, x := range s.Targets {
		if x.State != "up" || x.Reason != "" || x.Free == 0 || x.Clients != 1 {
			t.Errorf("%+v", x)
		}
	}
	ver, epoch := verifiers(t, n.reg), s.VIPs[0].Epoch
	stop(t, n)
	if err := n.Probe(ctx); err == nil {
		t.Error("the probe of a stopped node succeeds")
	}
	n = start(t, c)
	recovered(t, n)
	if got := content(t, n, a.FID); got != "kept" {
		t.Errorf("%q", got)
	}
	s = n.Status()
	if s.Boot != 2 || s.VIPs[0].Epoch != epoch+1 {
		t.Errorf("boot %d, VIP epoch %d", s.Boot, s.VIPs[0].Epoch)
	}
	if got := verifiers(t, n.reg); got[0] != ver[0] {
		t.Error("an orderly restart changed the write verifier")
	}
	for _, x := range s.Targets {
		if x.Clients != 1 {
			t.Errorf("%s has %d clients", x.Name, x.Clients)
		}
	}
	stop(t, n)
}

func TestSecondStartIsRefused(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	m, err := New(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(ctx); err == nil || !strings.Contains(err.Error(), "in use by another baton") {
		t.Errorf("second start: %v", err)
	}
	if _, _, err := OpenFS(ctx, c, nil); err == nil || !strings.Contains(err.Error(), "in use by another baton") {
		t.Errorf("open of a served file system: %v", err)
	}
	if err := n.Probe(ctx); err != nil {
		t.Error("the first node suffered:", err)
	}
	stop(t, n)
	fsys, done, err := OpenFS(ctx, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, st := fsys.Resolve(ctx, wire.RootFID, "data"); st != wire.OK {
		t.Error(st)
	}
	if err := done(); err != nil {
		t.Error(err)
	}
}

// A start that fails leaves nothing behind: the next one works.
func TestFailedStartTakesEverythingDown(t *testing.T) {
	c := conf(t, t.TempDir())
	c.NFS.Addresses = []string{"127.0.0.1", "192.0.2.1"} // not of this machine
	n, err := New(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(ctx); err == nil || !strings.Contains(err.Error(), "192.0.2.1") {
		t.Fatalf("start on a foreign address: %v", err)
	}
	c.NFS.Addresses = c.NFS.Addresses[:1]
	setExports(t, c, "/data\n/data (nonsense\n")
	if n, err = New(c, nil); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(ctx); err == nil {
		t.Fatal("started with bad exports")
	}
	setExports(t, c, goodExports)
	stop(t, start(t, c))
}

func TestReload(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	setExports(t, c, goodExports+"/more *(rw,nonsense)\n")
	err := n.ReloadExports()
	if err == nil || !strings.Contains(err.Error(), "exports:2") {
		t.Errorf("reload of a bad line: %v", err)
	}
	if e := n.Status().Exports; len(e) != 1 || e[0].Path != "/data" {
		t.Errorf("after a failed reload: %+v", e)
	}
	// A directory that cannot be: a file is in the way.
	create(t, n, "file")
	setExports(t, c, goodExports+"/bad *(rw,dir=/file/x)\n")
	if err := n.ReloadExports(); err == nil || !errors.Is(err, wire.ErrNotDir) {
		t.Errorf("reload with a file in the way: %v", err)
	}
	if e := n.Status().Exports; len(e) != 1 {
		t.Errorf("after a failed reload: %+v", e)
	}
	setExports(t, c, goodExports+"/more *(ro)\n")
	if err := n.ReloadExports(); err != nil {
		t.Error(err)
	}
	if e := n.Status().Exports; len(e) != 2 {
		t.Errorf("after a reload: %+v", e)
	}
}

// Exports to host names ask the system's resolver.
func TestExportToAHostName(t *testing.T) {
	c := conf(t, t.TempDir())
	setExports(t, c, "/data localhost(rw,insecure,dir=/data)\n")
	mount(t, start(t, c), "/data")
}

// After a kill, sizes come from the objects and no IO epoch is left open; the
// write verifier stays, since the kernel has the data.
func TestKillWhileWriting(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	a := create(t, n, "f")
	write(t, n, a, 0, strings.Repeat("x", 5000), wire.Unstable)
	empty := create(t, n, "empty")
	if !attr(t, n, a.FID).EpochOpen {
		t.Fatal("the epoch was closed too early for this test")
	}
	before := attr(t, n, a.FID)
	m := killed(t, c)
	recovered(t, m)
	if got := content(t, m, a.FID); got != strings.Repeat("x", 5000) {
		t.Errorf("%d bytes", len(got))
	}
	// Times that only the dead process knew exactly come back from the files, as
	// exact as those are.
	const exact = int64(50 * time.Millisecond)
	after := attr(t, m, a.FID)
	if after.EpochOpen || max(after.Mtime-before.Mtime, before.Mtime-after.Mtime, after.Ctime-before.Ctime, before.Ctime-after.Ctime) > exact {
		t.Errorf("times changed or the epoch is open:\n%+v\n%+v", before, after)
	}
	if s := attr(t, m, empty.FID).Size; s != 0 {
		t.Errorf("empty file has size %d", s)
	}
	if verifiers(t, m.reg)[0] != verifiers(t, n.reg)[0] {
		t.Error("the verifier changed though nothing was lost")
	}
}

// The punch of a logged truncation is done at the start, and changes no time that
// was set since.
func TestKillBeforePunch(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	a := create(t, n, "f")
	write(t, n, a, 0, strings.Repeat("x", 5000), wire.FileSync)
	// Only the MDT's part: the node dies before it comes to the OSTs.
	req := wire.Request{Header: wire.Header{Op: wire.OpSetattr, Flags: wire.FlagWaitCommit}, FID: a.FID, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: 10}}
	var rep wire.Reply
	n.fs.Call(ctx, client.Owner{}, &req, &rep)
	if rep.Status != wire.OK || rep.Truncate.LogID == 0 {
		t.Fatalf("%v %+v", rep.Status, rep.Truncate)
	}
	const mtime = 1_000_000_000 * 1e9
	setattr(t, n, a.FID, wire.SetAttr{Mask: wire.SetMtime, Mtime: mtime})
	m := killed(t, c)
	recovered(t, m)
	if got := content(t, m, a.FID); got != strings.Repeat("x", 10) {
		t.Errorf("%d bytes after the recovery", len(got))
	}
	if a := attr(t, m, a.FID); a.Mtime != mtime {
		t.Errorf("mtime %d, want %d", a.Mtime, int64(mtime))
	}
}

// Data written after a truncate survive, whatever the truncate met.
func TestKillAfterTruncateAndWrite(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	files := map[string]wire.Attr{"missing": create(t, n, "missing"), "there": create(t, n, "there")}
	write(t, n, files["there"], 0, strings.Repeat("old", 1000), wire.FileSync)
	for name, a := range files {
		setattr(t, n, a.FID, wire.SetAttr{Mask: wire.SetSize})
		write(t, n, a, 0, "new "+name, wire.FileSync)
	}
	m := killed(t, c)
	recovered(t, m)
	for name, a := range files {
		if got := content(t, m, a.FID); got != "new "+name {
			t.Errorf("%s: %q after the recovery", name, got)
		}
	}
}

func objects(t *testing.T, c *config.Config) int {
	t.Helper()
	n := 0
	for _, o := range c.OST {
		err := filepath.WalkDir(filepath.Join(o.Dir, "o"), func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				n++
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// Removed files' objects go, also when the node dies before it comes to it.
func TestKillBeforeDestroy(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	for _, name := range []string{"a", "b", "c"} {
		write(t, n, create(t, n, name), 0, "data", wire.FileSync)
	}
	if k := objects(t, c); k != 3 {
		t.Fatalf("%d objects", k)
	}
	for _, name := range []string{"a", "b"} {
		req := wire.Request{Header: wire.Header{Op: wire.OpRemove, Flags: wire.FlagWaitCommit}, FID: wire.RootFID, Name: []byte(name)}
		var rep wire.Reply
		n.fs.Call(ctx, client.Owner{}, &req, &rep)
		if rep.Status != wire.OK {
			t.Fatal(rep.Status)
		}
	}
	m := killed(t, c)
	for _, x := range []*Node{n, m} {
		for end := time.Now().Add(20 * time.Second); objects(t, x.cfg) != 1; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d objects are left", objects(t, x.cfg))
			}
		}
	}
}

// The news that power was lost reaches the write verifiers even if the start
// that learns it fails afterwards: no later start would learn it again.
func TestLostDataOfAFailedStart(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	write(t, n, create(t, n, "f"), 0, "data", wire.Unstable)
	old := verifiers(t, n.reg)
	c = conf(t, copied(t, filepath.Dir(c.DataDir)))
	// The store as another kernel left it when power failed.
	o, err := ost.Open(ost.Options{Index: 1, Dir: c.OST[1].Dir, BootID: "another"})
	if err != nil {
		t.Fatal(err)
	}
	c2 := conf(t, copied(t, filepath.Dir(c.DataDir)))
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	good := c2.MDT.Dir
	c2.MDT.Dir = filepath.Join(c2.DataDir, "registry.json") // a file
	m, err := New(c2, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(ctx); err == nil {
		t.Fatal("started without an MDT")
	}
	c2.MDT.Dir = good
	m = start(t, c2)
	if now := verifiers(t, m.reg); now[0] == old[0] {
		t.Error("the write verifier is the old one though power was lost")
	}
}

// New verifiers reach every service.
func TestNewVerifiers(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	fh := mount(t, n, "/data")
	before := commitVerf(t, n, fh)
	if before != [8]byte(decodeVerf(t, n.reg)) {
		t.Errorf("served %x, registered %x", before, decodeVerf(t, n.reg))
	}
	n.lostData(n.reg)
	after := commitVerf(t, n, fh)
	if after == before || after != [8]byte(decodeVerf(t, n.reg)) {
		t.Errorf("%x after %x, registered %x", after, before, decodeVerf(t, n.reg))
	}
	if s := n.Status(); len(s.VIPs) != 1 || s.VIPs[0].VerifierChanges != 1 {
		t.Errorf("%+v", s.VIPs)
	}
}

// forgetful is a registry that cannot store new verifiers for a while.
type forgetful struct {
	mgs.Registry
	full atomic.Bool
}

func (r *forgetful) NewVerifiers(ctx context.Context, node string, indexes ...uint32) ([]mgs.VIP, error) {
	if r.full.Load() {
		return nil, syscall.EROFS
	}
	return r.Registry.NewVerifiers(ctx, node, indexes...)
}

// Data were lost, and the registry of a node that is alone is on the disk that has failed:
// it goes on, and answers COMMIT when clients can be told of the loss; if it ends before,
// its next start tells them.
func TestLostDataOnABadDisk(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	dir := mount(t, n, "/data")
	commit := func(n *Node) nfs3.CommitRes {
		t.Helper()
		return tryCommit(t, n, dir)
	}
	old := commit(n)
	if old.Status != nfs.NFSStatusOk {
		t.Fatal(old.Status)
	}
	reg := &forgetful{Registry: n.reg}
	reg.full.Store(true)
	n.lostData(reg)
	if r := commit(n); r.Status != nfs.NFSStatusJukebox {
		t.Errorf("COMMIT: %v, want JUKEBOX", r.Status)
	}
	write(t, n, create(t, n, "g"), 0, "more", wire.FileSync)
	reg.full.Store(false)
	var r nfs3.CommitRes
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if r = commit(n); r.Status == nfs.NFSStatusOk {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("COMMIT: %v after the disk was mended", r.Status)
		}
	}
	if r.Verf == old.Verf || r.Verf != [8]byte(decodeVerf(t, n.reg)) {
		t.Errorf("%x after %x, registered %x", r.Verf, old.Verf, decodeVerf(t, n.reg))
	}
	if _, err := os.Stat(lostMark(c.DataDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the mark of a loss that clients were told of: %v", err)
	}

	reg.full.Store(true)
	n.lostData(reg)
	stop(t, n)
	n = start(t, c)
	if now := commit(n); now.Status != nfs.NFSStatusOk || now.Verf == r.Verf {
		t.Errorf("after a start: %v, %x as before", now.Status, now.Verf)
	}
	if _, err := os.Stat(lostMark(c.DataDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the mark of a loss that clients were told of: %v", err)
	}
}

func decodeVerf(t *testing.T, r mgs.Registry) []byte {
	v := vips(t, r)[0].VerifierBytes()
	return v[:]
}

func address(t *testing.T, n *Node) netip.AddrPort {
	t.Helper()
	for _, u := range n.serving() {
		for ap := range u.Ports() {
			return ap
		}
	}
	t.Fatal("no address")
	return netip.AddrPort{}
}

func call(t *testing.T, n *Node, prog, vers, proc uint32, args func(*xdr.Writer), res interface{ Decode(*xdr.Reader) error }) {
	t.Helper()
	c, err := sunrpc.Dial(ctx, "tcp", netip.AddrPort{}, address(t, n), prog, vers, sunrpc.Cred{Flavor: sunrpc.AuthSys})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var w xdr.Writer
	args(&w)
	out, err := c.Call(ctx, proc, w.Buf)
	if err != nil {
		t.Fatal(err)
	}
	if err := res.Decode(xdr.NewReader(bytes.Clone(out))); err != nil {
		t.Fatal(err)
	}
}

func mount(t *testing.T, n *Node, path string) []byte {
	t.Helper()
	var res mount3.MntRes
	call(t, n, mount3.Program, mount3.Version, uint32(nfs.MountProcMount), func(w *xdr.Writer) { mount3.EncodePath(w, path) }, &res)
	if res.Status != nfs.MountStatusOk {
		t.Fatal("mount:", res.Status)
	}
	return bytes.Clone(res.FH)
}

// commitVerf makes a file, commits it and removes it.
func commitVerf(t *testing.T, n *Node, dir []byte) [8]byte {
	t.Helper()
	cm := tryCommit(t, n, dir)
	if cm.Status != nfs.NFSStatusOk {
		t.Fatal("commit:", cm.Status)
	}
	return cm.Verf
}

func tryCommit(t *testing.T, n *Node, dir []byte) (cm nfs3.CommitRes) {
	t.Helper()
	var cr nfs3.CreateRes
	call(t, n, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCreate), (&nfs3.CreateArgs{FH: dir, Name: []byte("v"), How: wire.Unchecked}).Encode, &cr)
	if cr.Status != nfs.NFSStatusOk {
		t.Fatal("create:", cr.Status)
	}
	call(t, n, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCommit), (&nfs3.CommitArgs{FH: bytes.Clone(cr.FH)}).Encode, &cm)
	return cm
}
