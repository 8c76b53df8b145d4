package hostile

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/tests/bed"
)

// TestRefusedStarts gives the program circumstances in which it cannot serve. It
// must say which thing is wrong and what to do, end with exit code 1, and start
// when the cause is mended, with everything that was there.
func TestRefusedStarts(t *testing.T) {
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// Files and directories of the store are damaged by moving them aside.
	replace := func(name string, content []byte, mode os.FileMode) func(*testing.T, *server) func() {
		return func(t *testing.T, s *server) func() {
			p := filepath.Join(s.o.dataDir, name)
			must(t, os.Rename(p, p+".good"))
			if content != nil {
				must(t, os.WriteFile(p, content, mode))
				must(t, os.Chmod(p, mode))
			}
			return func() {
				if content != nil {
					must(t, os.RemoveAll(p))
				}
				must(t, os.Rename(p+".good", p))
			}
		}
	}
	key := pattern(1, 32)
	for i, x := range []struct {
		name string
		do   func(*testing.T, *server) func()
		want []string // words that the message must have
	}{
		{"data directory is a file", func(t *testing.T, s *server) func() {
			must(t, os.Rename(s.o.dataDir, s.o.dataDir+".good"))
			must(t, os.WriteFile(s.o.dataDir, nil, 0o600))
			return func() { must(t, os.Remove(s.o.dataDir)); must(t, os.Rename(s.o.dataDir+".good", s.o.dataDir)) }
		}, []string{"data directory", "not a directory"}},
		{"parent of the data directory is a file", func(t *testing.T, s *server) func() {
			old := s.o.dataDir
			s.o.dataDir = filepath.Join(s.configFile(), "data")
			return func() { s.o.dataDir = old }
		}, []string{"data directory", "not a directory"}},
		{"data directory cannot be written", func(t *testing.T, s *server) func() {
			// A directory that not even root can write to.
			old := s.o.dataDir
			s.o.dataDir = "/proc/baton"
			return func() { s.o.dataDir = old }
		}, []string{"data directory", "/proc/baton"}},
		{"data directory of another user", func(t *testing.T, s *server) func() {
			if os.Geteuid() != 0 {
				t.Skip("SKIPPED, reason: another user needs root")
			}
			s.o.uid = 65534
			return func() { s.o.uid = 0 }
		}, []string{"data directory", "permission denied", "give the directory"}},
		{"new data directory where nothing can be made", func(t *testing.T, s *server) func() {
			if os.Geteuid() != 0 {
				t.Skip("SKIPPED, reason: another user needs root")
			}
			old := s.o.dataDir
			s.o.uid, s.o.dataDir = 65534, filepath.Join(s.dir, "new")
			return func() { s.o.uid, s.o.dataDir = 0, old }
		}, []string{"data directory", "permission denied", "give the directory"}},
		{"too few file descriptors", func(t *testing.T, s *server) func() {
			s.o.ulimitN = 200
			return func() { s.o.ulimitN = 0 }
		}, []string{"too many open files", "LimitNOFILE="}},
		{"registry cut", replace("registry.json", []byte(`{"format": 1, "cli`), 0o600), []string{"registry.json", "damaged", "restore it from a backup"}},
		{"registry empty", replace("registry.json", []byte{}, 0o600), []string{"registry.json", "damaged", "restore it from a backup"}},
		{"registry of zeros", replace("registry.json", make([]byte, 300), 0o600), []string{"registry.json", "damaged", "restore it from a backup"}},
		{"registry of a later format", replace("registry.json", []byte(`{"format": 99}`), 0o600), []string{"registry.json", "format 99", "newer program"}},
		{"registry without client", replace("registry.json", []byte(`{"format": 1, "client": "xyz"}`), 0o600), []string{"registry.json", "client id", "restore it from a backup"}},
		{"registry gone", replace("registry.json", nil, 0), []string{"registry.json", "missing", "restore it from a backup"}},
		{"key too short", replace("cluster.key", key[:31], 0o600), []string{"cluster.key", "32 bytes", "restore it from a copy"}},
		{"key too long", replace("cluster.key", append(key, 0), 0o600), []string{"cluster.key", "32 bytes", "restore it from a copy"}},
		{"key readable by others", replace("cluster.key", key, 0o644), []string{"cluster.key", "chmod 600"}},
		{"key gone", replace("cluster.key", nil, 0), []string{"cluster.key", "restore it from a copy"}},
		{"MDT directory is a file", replace("mdt", []byte("x"), 0o600), []string{"MDT0000", "not a directory"}},
		{"OST directory is a file", replace("ost1", []byte("x"), 0o600), []string{"OST0001", "not a directory"}},
		{"OST directory gone", replace("ost1", nil, 0), []string{"OST0001", "ost1", "mount its disk"}},
		{"MDT directory gone", replace("mdt", nil, 0), []string{"MDT0000", "mdt", "mount its disk"}},
		{"OSTs exchanged", func(t *testing.T, s *server) func() {
			swap := func() {
				a, b := filepath.Join(s.o.dataDir, "ost0"), filepath.Join(s.o.dataDir, "ost1")
				must(t, os.Rename(a, a+".x"))
				must(t, os.Rename(b, a))
				must(t, os.Rename(a+".x", b))
			}
			swap()
			return swap
		}, []string{"OST000", "ost"}},
		{"port in use", func(t *testing.T, s *server) func() {
			l, err := net.Listen("tcp", s.nfs.String())
			must(t, err)
			return func() { l.Close() }
		}, []string{"in use", "choose other ports"}},
		{"UDP port in use", func(t *testing.T, s *server) func() {
			l, err := net.ListenPacket("udp", s.mount.String())
			must(t, err)
			return func() { l.Close() }
		}, []string{"in use", "choose other ports"}},
		{"exports file cannot be read", func(t *testing.T, s *server) func() {
			old := s.o.exports
			s.o.exports = "/rw *(rw,no_such_option)\n"
			return func() { s.o.exports = old }
		}, []string{"exports", "no_such_option"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			if testing.Short() && i%3 != 0 {
				t.Skip("SKIPPED, reason: -short")
			}
			s := newServer(t, options{})
			s.start()
			w := newWitness(s)
			s.kill()
			undo := x.do(t, s)
			s.launch()
			code, out := s.ends()
			msg := lastLines(out)
			t.Logf("%s", strings.TrimSpace(msg))
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			for _, word := range x.want {
				if !strings.Contains(msg, word) {
					t.Errorf("the message does not say %q", word)
				}
			}
			s.checkLog(crashWords)
			undo()
			s.start()
			w.check(func() { s.alive(crashWords) })
		})
	}
	t.Run("address not here", func(t *testing.T) {
		s := newServer(t, options{})
		s.writeConfig()
		b, err := os.ReadFile(s.configFile())
		must(t, err)
		cfg := filepath.Join(s.dir, "other.toml")
		// TEST-NET-3 (RFC 5737) is nobody's address.
		must(t, os.WriteFile(cfg, []byte(strings.Replace(string(b), "127.0.0.1", "203.0.113.77", 1)), 0o600))
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, s.bin, "serve", "--config", cfg)
		b, _ = cmd.CombinedOutput() // the exit code says it
		out := string(b)
		if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(out, "203.0.113.77") || !strings.Contains(out, "nfs.addresses") {
			t.Errorf("exit code %d: %s", code, out)
		}
	})
	t.Run("second server", func(t *testing.T) {
		s := serve(t, options{})
		w := newWitness(s)
		o := newServer(t, options{dataDir: s.o.dataDir}) // its own ports and control socket
		o.launch()
		code, out := o.ends()
		t.Log(lastLines(out))
		if code != 1 || !strings.Contains(out, "in use by another baton") {
			t.Errorf("a second server on the same data: exit code %d, %s", code, out)
		}
		w.check(func() { s.alive(badWords) })
	})
}

// TestDescriptors takes all of the server's file descriptors.
func TestDescriptors(t *testing.T) {
	s := serve(t, options{ulimitN: 1000, toml: smallCaches})
	w := newWitness(s)
	c := s.client("/rw")
	dir := c.mkdir(c.root, "dir")
	var crowd crowd
	defer crowd.close()
	for i := range 1200 {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr(i%10), 0)), Timeout: 5 * time.Second}
		x, err := d.Dial("tcp", s.nfs.String())
		if err == nil { // refused is fine, too
			crowd.l = append(crowd.l, x)
		}
	}
	t.Logf("%d of 1200 connections not refused at once by a server that may have 1000 descriptors", len(crowd.l))
	// No spinning: a second of real time must not cost half a second of CPU.
	before, err := bed.ProcUsage(s.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	after, err := bed.ProcUsage(s.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if used := after.CPU - before.CPU; used > time.Second {
		t.Errorf("%v of CPU in 2 s with nothing to do", used)
	}
	// Who is there is served, new files included: enough to make the store open
	// files of its own.
	data := pattern(3, 100_000)
	for i := range 200 {
		name := []byte{'f', byte('a' + i/26), byte('a' + i%26)}
		f := c.create(dir, string(name))
		c.write(f, 0, data)
	}
	var r nfs3.WccRes
	c.must(c.do(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: []byte("faa")}, &r), r.Status)
	s.alive(crashWords)
	crowd.close()
	eventually(t, "new connections to be accepted again", func() bool { return ping(s.nfs) == nil })
	w.check(func() { s.alive(crashWords) })
	if got := c.read(c.lookup(dir, "fbc").FH, 0, mib); string(got) != string(data) {
		t.Error("a file written meanwhile is wrong")
	}
	s.stop()
	s.fsck()
	s.o.ulimitN = 0
	s.start()
	w.check(func() { s.alive(crashWords) })
}
