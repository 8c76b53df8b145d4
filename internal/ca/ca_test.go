package ca

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func cluster(t *testing.T, nodes ...string) (string, *CA) {
	t.Helper()
	dir := t.TempDir()
	c, err := Create(dir, "test", Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if err := c.IssueNode(dir, n, Options{}); err != nil {
			t.Fatal(err)
		}
	}
	return dir, c
}

func load(t *testing.T, dir, node string) *Node {
	t.Helper()
	n, err := LoadNode(dir, node)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// shake runs a handshake and a byte in each direction.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s, c := tls.Server(a, server), tls.Client(b, client)
	ch := make(chan error, 1)
	go func() {
		var p [1]byte
		_, err := io.ReadFull(s, p[:])
		if err == nil {
			_, err = s.Write(p[:])
		}
		_ = a.Close()
		ch <- err
	}()
	_, clientErr = c.Write([]byte{1})
	if clientErr == nil {
		var p [1]byte
		_, clientErr = io.ReadFull(c, p[:])
	}
	_ = b.Close()
	return <-ch, clientErr
}

func TestHandshakes(t *testing.T) {
	dir, _ := cluster(t, "node1", "node2")
	other, _ := cluster(t, "node1", "node2")
	n1, n2, foreign := load(t, dir, "node1"), load(t, dir, "node2"), load(t, other, "node2")
	noCert := n2.Client("node1")
	noCert.Certificates = nil
	old := n2.Client("node1")
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	late := n1.Server()
	late.Time = func() time.Time { return time.Now().Add(DefaultNodeValidity + time.Hour) }
	for _, c := range []struct {
		what           string
		server, client *tls.Config
		ok             bool
	}{
		{"named node", n1.Server(), n2.Client("node1"), true},
		{"any node", n1.Server(), n2.Client(""), true},
		{"another node than expected", n1.Server(), n2.Client("node2"), false},
		{"no certificate", n1.Server(), noCert, false},
		{"client of another cluster", n1.Server(), foreign.Client("node1"), false},
		{"server of another cluster", foreign.Server(), n1.Client("node2"), false},
		{"server of another cluster, any node", foreign.Server(), n1.Client(""), false},
		{"TLS 1.2", n1.Server(), old, false},
		{"expired", late, n2.Client("node1"), false},
	} {
		s, e := shake(t, c.server, c.client)
		if ok := s == nil && e == nil; ok != c.ok {
			t.Errorf("%s: server %v, client %v", c.what, s, e)
		}
	}
}

func TestFiles(t *testing.T) {
	dir, c := cluster(t, "node1")
	before, err := os.ReadFile(filepath.Join(dir, CAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	es, err := os.ReadDir(dir)
	if err != nil || len(es) != 4 {
		t.Fatal(es, err)
	}
	for _, e := range es {
		if fi, err := e.Info(); err != nil || fi.Mode() != 0o600 {
			t.Errorf("%s: %v %v", e.Name(), fi.Mode(), err)
		}
	}
	if _, err := Create(dir, "test", Options{}); !errors.Is(err, ErrExists) {
		t.Error("CA overwritten:", err)
	}
	if err := c.IssueNode(dir, "node1", Options{}); !errors.Is(err, ErrExists) {
		t.Error("node certificate overwritten:", err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, CAKeyFile)); err != nil || string(after) != string(before) {
		t.Error("the CA's key changed")
	}
	if err := writeFile(filepath.Join(dir, CAFile), nil); !errors.Is(err, ErrExists) {
		t.Error("file overwritten:", err)
	}
	l, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.IssueNode(dir, "node2.rack-1", Options{}); err != nil {
		t.Fatal(err)
	}
	load(t, dir, "node2.rack-1")
	_, key := NodePaths(dir, "node1")
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadNode(dir, "node1"); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Error("readable key:", err)
	}
}

// A damaged or foreign file is an error, never an identity.
func TestDamage(t *testing.T) {
	dir, _ := cluster(t, "node1", "node2")
	other, _ := cluster(t, "node1")
	read := func(dir, name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		what, file string
		content    []byte
	}{
		{"other node's certificate", "node1.pem", read(dir, "node2.pem")},
		{"other node's key", "node1.key", read(dir, "node2.key")},
		{"cut certificate", "node1.pem", read(dir, "node1.pem")[:100]},
		{"cut key", "node1.key", read(dir, "node1.key")[:50]},
		{"empty CA", "ca.pem", nil},
		{"other CA", "ca.pem", read(other, "ca.pem")},
		{"node's certificate as CA", "ca.pem", read(dir, "node2.pem")},
		{"key in the CA's file", "ca.pem", read(dir, "ca.key")},
	} {
		path := filepath.Join(dir, c.file)
		good := read(dir, c.file)
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadNode(dir, "node1"); err == nil {
			t.Error(c.what, "was accepted")
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// While the cluster changes its authority, ca.pem holds both.
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), append(read(other, "ca.pem"), read(dir, "ca.pem")...), 0o600); err != nil {
		t.Fatal(err)
	}
	both := load(t, dir, "node1")
	if len(both.CA) != 2 {
		t.Fatal(len(both.CA))
	}
	if s, e := shake(t, both.Server(), load(t, dir, "node2").Client("node1")); s != nil || e != nil {
		t.Error(s, e)
	}
}

// Nodes with certificates of the old and of the new authority, which has the same
// name, understand each other while ca.pem holds both; afterwards the old
// certificates are worth nothing.
func TestChangeOfAuthority(t *testing.T) {
	old, _ := cluster(t, "n1")
	fresh, _ := cluster(t, "n2")
	var both, last []byte
	for _, dir := range []string{fresh, old} {
		b, err := os.ReadFile(filepath.Join(dir, CAFile))
		if err != nil {
			t.Fatal(err)
		}
		if both = append(both, b...); dir == fresh {
			last = b
		}
	}
	write := func(dir string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, CAFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(old, both)
	write(fresh, both)
	n1, n2 := load(t, old, "n1"), load(t, fresh, "n2")
	for _, x := range [][2]*tls.Config{{n1.Server(), n2.Client("n1")}, {n2.Server(), n1.Client("n2")}, {n2.Server(), n1.Client("")}} {
		if s, e := shake(t, x[0], x[1]); s != nil || e != nil {
			t.Error(s, e)
		}
	}
	if l, err := List(fresh); err != nil || len(l) != 3 || !l[0].CA || !l[1].CA || l[2].Problem != nil {
		t.Errorf("%+v, %v", l, err)
	}
	write(fresh, last)
	n2 = load(t, fresh, "n2")
	for _, x := range [][2]*tls.Config{{n1.Server(), n2.Client("n1")}, {n2.Server(), n1.Client("n2")}} {
		if s, e := shake(t, x[0], x[1]); s == nil && e == nil {
			t.Error("an old certificate is accepted")
		}
	}
}

func TestNames(t *testing.T) {
	for _, n := range []string{"a", "node1", "n-1.rack2.example", strings.Repeat("a", 63)} {
		if err := CheckName(n); err != nil {
			t.Error(err)
		}
	}
	for _, n := range []string{"", "ca", "Node", "1node", "10.0.0.1", "a..b", "a.", "-a", "a-", "../a", "a/b", "a_b", strings.Repeat("a", 64), strings.Repeat("a.", 200) + "a"} {
		if CheckName(n) == nil {
			t.Errorf("%q was accepted", n)
		}
	}
}

func TestExpiry(t *testing.T) {
	dir, c := cluster(t, "node1")
	n := load(t, dir, "node1")
	now := time.Now()
	for _, x := range []struct {
		at   time.Time
		want []string
	}{
		{now, nil},
		{now.Add(DefaultNodeValidity - 10*24*time.Hour), []string{"node node1 expires"}},
		{now.Add(DefaultNodeValidity + time.Hour), []string{"node node1 has expired"}},
		{now.Add(DefaultCAValidity + time.Hour), []string{"node node1 has expired", "test CA has expired"}},
		{now.Add(-48 * time.Hour), []string{"is the clock right", "is the clock right"}},
	} {
		w := n.Warnings(x.at, 30*24*time.Hour)
		if len(w) != len(x.want) {
			t.Errorf("%v: %q", x.at, w)
			continue
		}
		for i := range w {
			if !strings.Contains(w[i], x.want[i]) {
				t.Errorf("%v: %q, want %q", x.at, w[i], x.want[i])
			}
		}
	}
	late := Options{Now: func() time.Time { return now.Add(DefaultCAValidity - time.Hour) }}
	if err := c.IssueNode(dir, "late", late); err != nil {
		t.Fatal(err)
	}
	if l := load(t, dir, "late"); l.Cert.NotAfter.After(c.Cert.NotAfter) {
		t.Error("a certificate outlives its CA")
	}
	late.Now = func() time.Time { return now.Add(DefaultCAValidity + time.Hour) }
	if err := c.IssueNode(dir, "later", late); err == nil {
		t.Error("an expired CA issues")
	}
}
