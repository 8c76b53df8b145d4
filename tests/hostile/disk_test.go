package hostile

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/tests/bed"
)

// disk is a small file system of its own.
type disk struct {
	dir  string
	kind string
	img  string // "" for a tmpfs
}

// smallDisk mounts a file system of size bytes: ext4 in a loop device where the
// machine has one, else a tmpfs.
func smallDisk(t *testing.T, size int64) *disk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, reason: mounting a small file system needs root")
	}
	base := t.TempDir()
	d := &disk{dir: filepath.Join(base, "mnt"), kind: "ext4 in a loop device"}
	if err := os.Mkdir(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(base, "img")
	err := os.WriteFile(img, nil, 0o600)
	if err == nil {
		err = os.Truncate(img, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err == nil {
		err = tool("mkfs.ext4", "-q", "-m", "0", img)
	}
	if err == nil {
		d.img = img
		err = d.mount()
	}
	if err != nil {
		d.kind, d.img = "tmpfs", ""
		if terr := tool("mount", "-t", "tmpfs", "-o", fmt.Sprint("size=", size), "hostile", d.dir); terr != nil {
			t.Skipf("SKIPPED, reason: neither a loop device nor a tmpfs can be mounted: %v; %v", err, terr)
		}
	}
	t.Logf("the store is on %s of %d MiB", d.kind, size/mib)
	t.Cleanup(func() {
		if err := syscall.Unmount(d.dir, 0); err != nil {
			t.Logf("unmount: %v", err)
			syscall.Unmount(d.dir, syscall.MNT_DETACH) // the last resort
		}
	})
	return d
}

// goReadOnly makes an ext4 read-only under its open files, as it makes itself
// when it finds an error. A remount would be refused.
func (d *disk) goReadOnly(t *testing.T) {
	t.Helper()
	if d.img == "" {
		t.Skip("SKIPPED, reason: a tmpfs with open files cannot be made read-only")
	}
	m, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(m)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[1] != d.dir {
			continue
		}
		trigger := "/sys/fs/ext4/" + filepath.Base(f[0]) + "/trigger_fs_error"
		if err := os.WriteFile(trigger, []byte("hostile test"), 0); err != nil {
			t.Skipf("SKIPPED, reason: ext4 cannot be given an error: %v", err)
		}
		return
	}
	t.Fatalf("%s is not in /proc/self/mounts", d.dir)
}

// again mounts the disk anew, writable. Mount namespaces that others have made meanwhile have
// copies of the mount; as long as they are there the kernel keeps the file system as it is,
// read-only, and would give it again for the same image. So it becomes another one.
func (d *disk) again(t *testing.T) {
	t.Helper()
	if err := syscall.Unmount(d.dir, 0); err != nil {
		t.Fatalf("unmount: %v", err)
	}
	img := d.img + ".again"
	if err := tool("cp", "--sparse=always", d.img, img); err != nil {
		t.Fatal(err)
	}
	d.img = img
	if err := d.mount(); err != nil {
		t.Fatal(err)
	}
}

func (d *disk) mount() error {
	return tool("mount", "-o", "loop,errors=remount-ro", d.img, d.dir)
}

// tool runs a program of the system directories.
func tool(name string, args ...string) error {
	if p, err := bed.LookPath(name); err == nil {
		name = p
	}
	cmd := exec.Command(name, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

// onDisk starts a server whose store is on d. The test must not leave it
// running, or d cannot be unmounted; newServer's cleanup sees to that.
func onDisk(t *testing.T, d *disk, toml string) *server {
	s := newServer(t, options{dataDir: filepath.Join(d.dir, "data"), toml: smallCaches + toml})
	s.start()
	return s
}

// TestFullDisk fills the store's disk, once through the server, which keeps a
// reserve, and once by somebody else, who does not.
func TestFullDisk(t *testing.T) {
	t.Run("by clients", func(t *testing.T) { fullDisk(t, false) })
	t.Run("by others", func(t *testing.T) {
		if testing.Short() {
			t.Skip("SKIPPED, reason: -short")
		}
		fullDisk(t, true)
	})
}

// ballast takes all space that is left on d; the function returned gives it back.
func ballast(t *testing.T, d *disk) func() {
	t.Helper()
	path := filepath.Join(d.dir, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := mib; size >= 512; size /= 2 {
		b := make([]byte, size)
		for err = nil; err == nil; {
			_, err = f.Write(b)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func fullDisk(t *testing.T, others bool) {
	size := int64(256 * mib)
	if testing.Short() {
		size = 128 * mib
	}
	d := smallDisk(t, size)
	s := onDisk(t, d, "[fs]\nmin_free = \"24 MiB\"\n")
	w := newWitness(s)
	c := s.client("/rw")
	dir := c.mkdir(c.root, "fill")
	keep := c.create(dir, "keep")
	keepData := pattern(8, 200_000)
	c.write(keep, 0, keepData)
	empty := func() {}
	// Every byte and name that was acknowledged as stable.
	type file struct {
		name string
		fh   []byte
		n    uint64
	}
	var files []file
	full := func(st nfs.NFSStatus, err error, what string) bool {
		t.Helper()
		switch {
		case err != nil:
			t.Fatalf("%s: %v\n%s", what, err, s.log())
		case st == nfs.NFSStatusNoSPC:
			return true
		case st != nfs.NFSStatusOk:
			t.Fatalf("%s: status %d, want NOSPC\n%s", what, uint32(st), s.log())
		}
		return false
	}
	// Writes of 1 MiB, then of 32 KiB, stable and not, until nothing goes any more.
	for i := range 3 {
		name := fmt.Sprint("big", i)
		f := file{name: name, fh: c.create(dir, name), n: mib}
		c.write(f.fh, 0, blocks(0, mib))
		files = append(files, f)
	}
	if others {
		empty = ballast(t, d)
	}
	for i, how := range []wire.StableHow{wire.FileSync, wire.Unstable, wire.FileSync} {
		step := mib
		if i == 2 {
			step = 32 << 10
		}
		f := &files[i]
		for n := f.n; ; n += uint64(step) {
			wr, err := c.tryWrite(f.fh, n, blocks(n, step), how)
			if full(wr.Status, err, "WRITE") {
				break
			}
			if how == wire.FileSync {
				f.n = n + uint64(step)
			}
			if n > uint64(size) {
				t.Fatal("more fits on the disk than it has")
			}
		}
		if cm, err := c.commit(f.fh); err != nil || cm.Status != nfs.NFSStatusOk && cm.Status != nfs.NFSStatusNoSPC && cm.Status != nfs.NFSStatusIO {
			t.Fatalf("COMMIT: %v, %v", cm.Status, err)
		}
	}
	// Creates.
	made := 0
	for ; made < 50_000; made++ {
		cr, err := c.tryCreate(dir, fmt.Sprint("small", made))
		if full(cr.Status, err, "CREATE") {
			break
		}
	}
	t.Logf("full after %d big files and %d creates", len(files), made)
	check := func() {
		t.Helper()
		if got := c.read(keep, 0, mib); !bytes.Equal(got, keepData) {
			t.Error("data written before have changed")
		}
		for _, f := range files {
			for _, at := range []uint64{0, f.n / 2 &^ 4095, f.n - 4096} {
				if got := c.read(f.fh, at, 4096); !bytes.Equal(got, blocks(at, 4096)) {
					t.Errorf("%s: data at %d of %d that were acknowledged as stable are not there", f.name, at, f.n)
				}
			}
		}
		if made > 0 && !c.exists(dir, fmt.Sprint("small", made-1)) {
			t.Error("an acknowledged CREATE is lost")
		}
	}
	check()
	w.check(func() { s.alive(crashWords) })

	// It can be restarted when full, and still reads and removes. When there is
	// not a byte left it may refuse, if it says why.
	s.kill()
	if others {
		s.launch()
		eventually(t, "the server to start or to end", func() bool {
			select {
			case <-s.done:
				return true
			default:
				return ping(s.mount) == nil
			}
		})
		select {
		case <-s.done:
			if code, out := s.ends(); code != 1 || !strings.Contains(lastLines(out), "space") {
				t.Errorf("start on a full disk: exit code %d, %s", code, out)
			}
		default:
		}
		s.kill()
		empty()
	}
	s.start()
	c = s.client("/rw")
	check()
	for _, f := range files {
		if st := c.remove(dir, f.name); st != nfs.NFSStatusOk {
			t.Fatalf("REMOVE on a full disk: %v\n%s", st, s.log())
		}
	}
	files = nil
	// Space comes back, if not at once.
	var fresh []byte
	eventually(t, "CREATE to work again", func() bool {
		cr, err := c.tryCreate(dir, "fresh")
		if err == nil && cr.Status == nfs.NFSStatusExist {
			l := c.lookup(dir, "fresh")
			cr.FH, cr.Status = l.FH, l.Status
		}
		if full(cr.Status, err, "CREATE") {
			return false
		}
		fresh = cr.FH
		return true
	})
	data := pattern(12, mib)
	eventually(t, "WRITE to work again", func() bool {
		wr, err := c.tryWrite(fresh, 0, data, wire.FileSync)
		return !full(wr.Status, err, "WRITE")
	})
	if got := c.read(fresh, 0, mib); !bytes.Equal(got, data) {
		t.Error("the new file's data are wrong")
	}
	check()
	w.check(func() { s.alive(crashWords) })
	s.stop()
	s.fsck()
	s.start()
	c = s.client("/rw")
	check()
	w.check(func() { s.alive(crashWords) })
	s.stop()
	s.fsck()
}

// blocks is n bytes (a multiple of 4096) for offset off of a file; each block of
// 4096 bytes depends on its offset only.
func blocks(off uint64, n int) []byte {
	var b []byte
	for at := off; at < off+uint64(n); at += 4096 {
		b = append(b, pattern(int(at/4096), 4096)...)
	}
	return b
}

// lastLines is what a program that ended wrote for people, without its log.
func lastLines(out string) string {
	if i := strings.LastIndex("\n"+out, "\nbaton: "); i >= 0 {
		return out[i:]
	}
	return ""
}

// TestReadOnlyDisk makes the store's file system read-only under the server, when all is
// durable, and when data are not that their client has not committed.
func TestReadOnlyDisk(t *testing.T) {
	t.Run("clean", func(t *testing.T) { readOnlyDisk(t, false) })
	t.Run("dirty", func(t *testing.T) { readOnlyDisk(t, true) })
}

func readOnlyDisk(t *testing.T, dirty bool) {
	d := smallDisk(t, 160*mib)
	s := onDisk(t, d, "[fs]\nmin_free = \"8 MiB\"\n")
	w := newWitness(s)
	c := s.client("/rw")
	dir := c.mkdir(c.root, "dir")
	f := c.create(dir, "f")
	data := pattern(1, 300_000)
	c.write(f, 0, data)
	// A file of its own: what is lost of it says nothing of the other one.
	g := c.create(dir, "g")
	lost := pattern(2, 300_000)
	var unstable nfs3.WriteRes
	if dirty {
		var err error
		unstable, err = c.tryWrite(g, 0, lost, wire.Unstable)
		c.must(err, unstable.Status)
	}
	d.goReadOnly(t)
	var acked []string
	refused := map[nfs.NFSStatus]int{}
	note := func(what string, st nfs.NFSStatus, err error) bool {
		t.Helper()
		if err != nil {
			// No answer is an answer as well: the client tries again. A hang is not.
			if errors.Is(err, errHang) {
				t.Fatalf("%s: %v\n%s", what, err, s.log())
			}
			select {
			case <-s.done:
				t.Fatalf("%s: the server ended\n%s", what, s.log())
			default:
			}
			c = s.client("/rw")
			return false
		}
		switch st {
		case nfs.NFSStatusOk:
			return true
		case nfs.NFSStatusIO, nfs.NFSStatusROFS, nfs.NFSStatusJukebox:
			refused[st]++
		default:
			t.Errorf("%s: status %d, want IO, ROFS or JUKEBOX", what, uint32(st))
		}
		return false
	}
	for i := range 20 {
		name := fmt.Sprint("new", i)
		cr, err := c.tryCreate(dir, name)
		if note("CREATE", cr.Status, err) {
			acked = append(acked, name)
		}
		wr, err := c.tryWrite(f, uint64(i)*1000, []byte("lost"), wire.FileSync)
		if note("WRITE", wr.Status, err) {
			copy(data[i*1000:], "lost")
		}
	}
	// Whatever the verifier, no COMMIT may say that these data are durable.
	for range 3 {
		if !dirty {
			break
		}
		cm, err := c.commit(g)
		if note("COMMIT", cm.Status, err) && cm.Verf == unstable.Verf {
			t.Error("COMMIT succeeded on a read-only disk")
		}
	}
	t.Logf("%d of 40 calls acknowledged, refused: %v", len(acked), refused)
	if len(refused) == 0 {
		t.Error("nothing was refused: the disk is not read-only")
	}
	if rd, err := c.tryRead(f, 0, mib); err != nil || rd.Status != nfs.NFSStatusOk && rd.Status != nfs.NFSStatusIO && rd.Status != nfs.NFSStatusJukebox {
		t.Errorf("READ: status %d, %v", uint32(rd.Status), err)
	}
	s.alive(crashWords)
	s.kill()
	// A start on a read-only disk says so.
	s.launch()
	code, out := s.ends()
	if code != 1 || !strings.Contains(out, "read-only") {
		t.Errorf("start on a read-only disk: exit code %d, %s", code, out)
	}
	d.again(t)
	s.start()
	c = s.client("/rw")
	for _, name := range acked {
		if !c.exists(dir, name) {
			t.Errorf("%s was acknowledged and is not there", name)
		}
	}
	if got := c.read(f, 0, mib); !bytes.Equal(got, data) {
		t.Error("the file has not what was acknowledged")
	}
	if dirty {
		cm, err := c.commit(g)
		c.must(err, cm.Status)
		if cm.Verf == unstable.Verf && !bytes.Equal(c.read(g, 0, mib), lost) {
			t.Error("data are lost, and the write verifier is the same")
		}
	}
	r, err := c.tryCreate(dir, "after")
	c.must(err, r.Status)
	w.check(func() {})
	s.stop()
	s.fsck()
}
