package libnfs

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/bench/nfsload"
)

func TestMain(m *testing.M) { bed.Main(m) }

// peer is a running server and the URLs of its exports.
type peer struct {
	node  *bed.Node
	srv   bed.Server
	query string
	nfs   int
	mount int
}

// freePorts returns n ports of the loopback that are free now.
func freePorts(t *testing.T, n int) []int {
	t.Helper()
	var ps []int
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

// newPeer starts baton without privileges on the loopback, or Ganesha, which
// needs them, in a node.
func newPeer(t *testing.T) *peer {
	t.Helper()
	for _, p := range []string{"nfs-ls", "nfs-cat", "nfs-cp"} {
		if _, err := bed.LookPath(p); err != nil {
			bed.Need(t, fmt.Errorf("package libnfs-utils: %w", err))
		}
	}
	c := bed.Config{Dir: bed.Dir(t), Exports: []bed.Export{{Path: "/rw"}, {Path: "/ro", ReadOnly: true}}}
	p := &peer{nfs: bed.NFSPort, mount: bed.MountPort}
	var err error
	if bed.ServerName() == "baton" {
		p.node = bed.HostNode()
		ports := freePorts(t, 2)
		p.nfs, p.mount = ports[0], ports[1]
		c.NFSPort, c.MountPort = ports[0], ports[1]
		c.Addr = netip.MustParseAddr("127.0.0.1")
	} else {
		p.node, err = bed.NewNode("libnfs")
		bed.Need(t, err)
		if err := p.node.AddBridge("br0", netip.MustParsePrefix("10.77.0.1/24")); err != nil {
			t.Fatal(err)
		}
		c.Addr = netip.MustParseAddr("10.77.0.1")
	}
	t.Cleanup(func() { p.node.Close() })
	c.Node = p.node
	p.query = fmt.Sprintf("?version=3&nfsport=%d&mountport=%d", p.nfs, p.mount)
	p.srv, err = bed.NewServer(bed.ServerName(), c)
	bed.Need(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := p.srv.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.srv.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("end of the server's log:\n%s", p.srv.Log())
		}
	})
	return p
}

func (p *peer) url(path string) string {
	return fmt.Sprintf("nfs://%s%s%s", p.srv.Addr(), path, p.query)
}

// run runs one of libnfs's programs.
func (p *peer) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := p.node.Run(ctx, args[0], args[1:]...)
	return string(out), err
}

func (p *peer) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := p.run(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// nfs connects the test's own client for what libnfs's programs cannot do.
func (p *peer) client(t *testing.T) (c *nfsload.Conn, root []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	dial := func(port int, prog uint32) *nfsload.Conn {
		nc, err := p.node.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", p.srv.Addr(), port))
		if err != nil {
			t.Fatal(err)
		}
		return nfsload.NewConn(nc, prog)
	}
	m := dial(p.mount, nfsload.ProgMount)
	defer m.Close()
	root, err := m.Mount("/rw")
	if err != nil {
		t.Fatal(err)
	}
	c = dial(p.nfs, nfsload.ProgNFS)
	t.Cleanup(func() { c.Close() })
	return c, root
}

func TestPrograms(t *testing.T) {
	p := newPeer(t)
	local := bed.Dir(t)
	r := rand.New(rand.NewPCG(1, 2))

	t.Run("copy-in-list-and-out", func(t *testing.T) {
		for _, size := range []int{0, 1, 4095, 4096, 1 << 20, 5<<20 + 17} {
			b := make([]byte, size)
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			name := fmt.Sprintf("size%d", size)
			src, back := filepath.Join(local, name), filepath.Join(local, name+".back")
			if err := os.WriteFile(src, b, 0o644); err != nil {
				t.Fatal(err)
			}
			p.must(t, "nfs-cp", src, p.url("/rw/"+name))
			p.must(t, "nfs-cp", p.url("/rw/"+name), back)
			got, err := os.ReadFile(back)
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("%d bytes came back as %d, different (%v)", size, len(got), err)
			}
			if out := p.must(t, "nfs-cat", p.url("/rw/"+name)); out != string(b) {
				t.Errorf("nfs-cat of %d bytes printed %d other ones", size, len(out))
			}
			line := ""
			for l := range strings.Lines(p.must(t, "nfs-ls", p.url("/rw/"))) {
				if f := strings.Fields(l); len(f) > 5 && f[len(f)-1] == name {
					line = l
				}
			}
			if f := strings.Fields(line); len(f) < 5 || f[0] != "-rw-rw----" && !strings.HasPrefix(f[0], "-rw") || f[4] != fmt.Sprint(size) {
				t.Errorf("nfs-ls shows %q for a file of %d bytes", line, size)
			}
		}
	})
	t.Run("tree", func(t *testing.T) {
		c, root := p.client(t)
		dir := root
		for i := range 5 {
			var err error
			if dir, err = c.Mkdir(dir, fmt.Sprint("deep", i)); err != nil {
				t.Fatal(err)
			}
			for j := range 10 {
				if _, err := c.Create(dir, fmt.Sprintf("leaf-%d-%d", i, j)); err != nil {
					t.Fatal(err)
				}
			}
		}
		out := p.must(t, "nfs-ls", "-R", p.url("/rw/"))
		if n := strings.Count(out, "leaf-"); n != 50 {
			t.Errorf("recursive list shows %d files, want 50:\n%s", n, out)
		}
	})
	t.Run("long-directory", func(t *testing.T) {
		c, root := p.client(t)
		dir, err := c.Mkdir(root, "long")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3000 {
			if _, err := c.Create(dir, fmt.Sprintf("name-%05d-%s", i, strings.Repeat("x", i%200))); err != nil {
				t.Fatal(err)
			}
		}
		if n := strings.Count(p.must(t, "nfs-ls", p.url("/rw/long")), "name-"); n != 3000 {
			t.Errorf("list shows %d files, want 3000", n)
		}
	})
	t.Run("subdirectory-mount", func(t *testing.T) {
		if n := strings.Count(p.must(t, "nfs-ls", p.url("/rw/deep0/deep1")), "leaf-1-"); n != 10 {
			t.Errorf("list shows %d files, want 10", n)
		}
	})
	t.Run("errors", func(t *testing.T) {
		for want, args := range map[string][]string{
			"NOENT":  {"nfs-cat", p.url("/rw/missing")},
			"ROFS":   {"nfs-cp", filepath.Join(local, "size1"), p.url("/ro/new")},
			"mount_": {"nfs-ls", p.url("/nosuchexport/")},
		} {
			out, err := p.run(t, args...)
			if err == nil {
				t.Errorf("%v succeeded:\n%s", args, out)
			}
			if !strings.Contains(out, want) && !(want == "mount_" && (strings.Contains(out, "ACCES") || strings.Contains(out, "NOENT"))) {
				t.Errorf("%v: want an error with %s:\n%s", args, want, out)
			}
		}
	})
}
