package ca

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestHosts(t *testing.T) {
	dir, c := cluster(t, "n1", "n2")
	if err := c.IssueNode(dir, "n3", Options{Hosts: []string{"192.0.2.3", "2001:db8::3", "n3.example.org"}}); err != nil {
		t.Fatal(err)
	}
	n := load(t, dir, "n3")
	for _, h := range []string{"n3", "n3.example.org", "192.0.2.3", "2001:db8::3"} {
		if err := n.Cert.VerifyHostname(h); err != nil {
			t.Error(err)
		}
	}
	if s, e := shake(t, n.Server(), load(t, dir, "n1").Client("192.0.2.3")); s != nil || e != nil {
		t.Error(s, e)
	}
	// Nobody gets the name of somebody else.
	for _, x := range []struct {
		node string
		host string
	}{{"n4", "n2"}, {"n4", "n3.example.org"}, {"n3.example.org", ""}, {"n4", "Bad_Host"}, {"n4", "fe80::1%eth0"}, {"n4", "ca"}} {
		var o Options
		if x.host != "" {
			o.Hosts = []string{x.host}
		}
		if err := c.IssueNode(dir, x.node, o); err == nil {
			t.Errorf("%+v was issued", x)
		}
		cp, kp := NodePaths(dir, x.node)
		for _, p := range []string{cp, kp} {
			if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%+v: %s is there: %v", x, p, err)
			}
		}
	}
}

func TestClusterNames(t *testing.T) {
	for _, n := range []string{"", "a\nb", "\u00fc", strings.Repeat("x", 61)} {
		if _, err := Create(t.TempDir(), n, Options{}); err == nil {
			t.Errorf("%q was accepted", n)
		}
	}
	if _, err := Create(t.TempDir(), strings.Repeat("x", 60), Options{}); err != nil {
		t.Error(err)
	}
}

func TestList(t *testing.T) {
	dir, _ := cluster(t, "n1", "n2", "n3", "n4")
	other, _ := cluster(t, "n5")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, key2 := NodePaths(dir, "n2")
	must(os.Remove(key2)) // it was given to its node
	_, key3 := NodePaths(dir, "n3")
	must(os.Chmod(key3, 0o644))
	c4, key4 := NodePaths(dir, "n4")
	b, err := os.ReadFile(c4)
	must(err)
	must(os.WriteFile(c4, b[:100], 0o600))
	must(os.Remove(key4))
	b, err = os.ReadFile(filepath.Join(other, "n5.pem"))
	must(err)
	must(os.WriteFile(filepath.Join(dir, "n5.pem"), b, 0o600))
	b, err = os.ReadFile(filepath.Join(dir, "n1.pem"))
	must(err)
	must(os.WriteFile(filepath.Join(dir, "copy.pem"), b, 0o600))
	l, err := List(dir)
	must(err)
	now := time.Now()
	want := []struct {
		name    string
		ca, key bool
		problem string
	}{
		{"test CA", true, true, ""},
		{"copy", false, false, "valid for n1"},
		{"n1", false, true, ""},
		{"n2", false, false, ""},
		{"n3", false, true, "chmod 600"},
		{"n4", false, false, "does not begin with a certificate"},
		{"n5", false, false, "not of the CA"},
	}
	if len(l) != len(want) {
		t.Fatalf("%+v", l)
	}
	for i, x := range want {
		e := &l[i]
		problem := ""
		if e.Problem != nil {
			problem = e.Problem.Error()
		}
		if e.Name != x.name || e.CA != x.ca || e.Key != x.key || !strings.Contains(problem, x.problem) || (problem == "") != (x.problem == "") {
			t.Errorf("%+v, want %+v", e, x)
		}
		if e.Usable(now) != (x.problem == "") {
			t.Errorf("%s: usable %v", e.Name, e.Usable(now))
		}
		if w := e.Warnings(now, 0); len(w) != 0 != (x.problem != "") || len(w) > 0 && !strings.Contains(w[0], x.problem) {
			t.Errorf("%s: %q", e.Name, w)
		}
	}
	late := now.Add(DefaultNodeValidity)
	if l[2].Usable(late) || len(l[2].Warnings(late, 0)) != 1 || !l[0].Usable(late) {
		t.Error("expiry is not seen")
	}
	must(os.WriteFile(filepath.Join(dir, CAKeyFile), nil, 0o600))
	if l, err = List(dir); err != nil || l[0].Problem == nil {
		t.Errorf("a CA without its key: %+v, %v", l[0], err)
	}
	must(os.WriteFile(filepath.Join(dir, CAFile), nil, 0o600))
	for _, d := range []string{dir, t.TempDir(), filepath.Join(dir, "missing")} {
		if _, err := List(d); err == nil {
			t.Errorf("%s has no authority", d)
		}
	}
}
