package config

import (
	"bytes"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/cockroachdb/datadriven"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "rewrite docs/configuration.md's reference")

var ignoreUnexported = cmp.Options{cmpopts.IgnoreUnexported(Config{}), cmpopts.IgnoreFields(Config{}, "File"), cmpopts.EquateEmpty()}

func TestPrintDefaultParsesBack(t *testing.T) {
	c, err := Parse("default", []byte(PrintDefault()))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Default(), c, ignoreUnexported); d != "" {
		t.Errorf("printed defaults differ from Default (-want +got):\n%s", d)
	}
}

// The commented-out parts must be right as well.
func TestPrintDefaultExamplesAreValid(t *testing.T) {
	var b strings.Builder
	for l := range strings.Lines(PrintDefault()) {
		if strings.HasPrefix(l, "#") && !strings.HasPrefix(l, "# ") {
			l = l[1:]
		}
		b.WriteString(l)
	}
	c, err := Parse("default", []byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Export) != 1 || len(c.OST) != 1 || len(c.Cluster.Nodes) != 1 {
		t.Fatalf("examples not found: %+v", c)
	}
	// They are of a cluster, and the example of an OST names a second node.
	c.Cluster.Node, c.Cluster.TLS, c.NFS.Addresses = "n1", TLSOff, nil
	c.Cluster.Nodes = append(c.Cluster.Nodes, ClusterNode{"n2", "192.0.2.2"})
	c.MGS.Nodes, c.MDT.Nodes = []string{"n1"}, []string{"n1"}
	if err := c.Complete(); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

func TestDefaultIsValid(t *testing.T) {
	c := Default()
	if err := c.Complete(); err != nil {
		t.Fatal(err)
	}
	c.Node = "n1"
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

func TestEveryKeyIsDocumented(t *testing.T) {
	have := map[string]bool{}
	for _, k := range Keys() {
		have[k.Name] = true
		if k.Doc == "" {
			t.Errorf("%s has no text in keyDocs", k.Name)
		}
		if sec, _ := SplitKey(k.Name); sec != "" && sectionDocs[sec] == "" {
			t.Errorf("section %s has no text in sectionDocs", sec)
		}
		for l := range strings.Lines(k.Doc) {
			if len(l) > 77 {
				t.Errorf("%s: line too long: %q", k.Name, l)
			}
		}
	}
	for k := range keyDocs {
		if !have[k] {
			t.Errorf("keyDocs has %s, which is not a key", k)
		}
	}
}

const (
	refBegin = "<!-- reference: made by go test ./internal/config -update -->\n"
	refEnd   = "<!-- end of reference -->\n"
)

func TestDocsMentionEveryKey(t *testing.T) {
	name := filepath.Join("..", "..", "docs", "configuration.md")
	src, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(src), refBegin)
	ref, after, ok2 := strings.Cut(rest, refEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no reference between its markers", name)
	}
	if ref == Markdown() {
		return
	}
	if !*update {
		t.Fatalf("%s is out of date, run go test ./internal/config -update (-have +want):\n%s", name, cmp.Diff(ref, Markdown()))
	}
	if err := os.WriteFile(name, []byte(before+refBegin+Markdown()+refEnd+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// The examples in the documentation are right.
func TestDocsExamples(t *testing.T) {
	src, err := os.ReadFile(filepath.Join("..", "..", "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	parts, clusters := strings.Split(string(src), "```toml\n")[1:], 0
	for _, p := range parts {
		text, _, _ := strings.Cut(p, "```")
		c, err := Parse("example", []byte(text))
		if err != nil {
			t.Errorf("%v in\n%s", err, text)
			continue
		}
		if c.Clustered() {
			c.Cluster.TLS = TLSOff // there are no certificates here
			clusters++
		}
		if err := errors.Join(c.Complete(), c.Validate()); err != nil {
			t.Errorf("%v in\n%s", err, text)
		}
	}
	if len(parts) < 2 || clusters != 1 {
		t.Errorf("%d examples, %d of clusters", len(parts), clusters)
	}
}

// TestErrors holds the exact text of refusals.
func TestErrors(t *testing.T) {
	datadriven.RunTest(t, "testdata/errors.txt", func(t *testing.T, d *datadriven.TestData) string {
		return check(d.Input)
	})
}

// TestCluster does the same for several nodes. $TLS has certificates of n1, n2 and, with
// its address, n3.
func TestCluster(t *testing.T) {
	dir := t.TempDir()
	auth, err := ca.Create(dir, "test", ca.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for n, hosts := range map[string][]string{"n1": nil, "n2": nil, "n3": {"192.0.2.3"}} {
		if err := auth.IssueNode(dir, n, ca.Options{Hosts: hosts}); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]os.FileMode{"secret": 0o600, "public": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("opensesame\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"cluster.txt", "registry.txt"} {
		datadriven.RunTest(t, "testdata/"+f, func(t *testing.T, d *datadriven.TestData) string {
			out := check(strings.ReplaceAll(d.Input, "$TLS", dir))
			return strings.ReplaceAll(out, dir, "$TLS")
		})
	}
}

func check(src string) string {
	c, err := Parse("baton.toml", []byte(src))
	if err != nil {
		return err.Error() + "\n"
	}
	if c.Node == "" && !strings.Contains(src, "node") {
		c.Node = "n1"
	}
	if err := c.Complete(); err != nil {
		return err.Error() + "\n"
	}
	if err := c.Validate(); err != nil {
		return err.Error() + "\n"
	}
	if !c.Clustered() {
		return "ok\n"
	}
	out := fmt.Sprintf("ok, node %s listens on %s\n", c.Node, c.Cluster.Listen)
	for _, n := range c.Cluster.Nodes {
		out += fmt.Sprintf("%s at %s\n", n.Name, c.Cluster.Addr(n.Name))
	}
	for _, t := range c.Targets() {
		out += fmt.Sprintf("%s in %s on %s\n", t.Name, t.Dir, strings.Join(t.Nodes, ", "))
	}
	return out
}

func TestFlags(t *testing.T) {
	datadriven.RunTest(t, "testdata/flags.txt", func(t *testing.T, d *datadriven.TestData) string {
		var f Flags
		for _, a := range d.CmdArgs {
			switch a.Key {
			case "config":
				f.Config = filepath.Join("testdata", a.Vals[0])
			case "data":
				f.Data = a.Vals[0]
			case "export":
				f.Exports = append(f.Exports, strings.ReplaceAll(a.Vals[0], ":", "="))
			case "listen":
				f.Listen = a.Vals
			case "port":
				fmt.Sscan(a.Vals[0], &f.Port)
			case "rpcbind":
				f.Rpcbind = a.Vals[0]
			case "forget-locks":
				f.ForgetLocks = true
			case "http":
				f.HTTP = a.Vals[0]
			case "options":
				f.ExportOptions = strings.Join(a.Vals, ",")
			case "clients":
				f.ExportClients = a.Vals
			default:
				d.Fatalf(t, "unknown argument %s", a.Key)
			}
		}
		c, err := FromFlags(f)
		if err != nil {
			return err.Error() + "\n"
		}
		c.Node = "n1"
		// Show what differs from the completed defaults.
		base := Default()
		base.Node = "n1"
		if err := base.Complete(); err != nil {
			t.Fatal(err)
		}
		return diffKeys(base, c)
	})
}

func diffKeys(a, b *Config) string {
	flat := func(c *Config) map[string]string {
		m := map[string]string{}
		walk(reflect.ValueOf(c).Elem(), "", func(n string, v reflect.Value) { m[n] = tomlValue(v.Interface()) })
		return m
	}
	ma, mb := flat(a), flat(b)
	var out strings.Builder
	for _, k := range Keys() {
		if ma[k.Name] != mb[k.Name] {
			fmt.Fprintf(&out, "%s = %s\n", k.Name, mb[k.Name])
		}
	}
	if b.ForgetLocks {
		out.WriteString("forget the locks\n")
	}
	for _, e := range b.Export {
		fmt.Fprintf(&out, "export %+v\n", e)
	}
	for _, o := range b.OST {
		fmt.Fprintf(&out, "ost %s\n", o.Dir)
	}
	return out.String()
}

func TestExportsText(t *testing.T) {
	c := Default()
	c.Export = []Export{
		{Name: "/home", Path: "/", Clients: []string{"*"}},
		{Name: `/a "b#c`, Path: "/x,(y) z", Clients: []string{"10.0.0.0/8", "host"}, Options: "rw,fsid=7"},
	}
	tab, err := exports.Parse("f", []byte(c.ExportsText()), nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, c.ExportsText())
	}
	exps := tab.Exports()
	if len(exps) != 2 {
		t.Fatalf("%d exports from\n%s", len(exps), c.ExportsText())
	}
	for i, want := range []Export{c.Export[1], c.Export[0]} {
		if exps[i].Path != want.Name || exps[i].Dir != want.Path || len(exps[i].Clients) != len(want.Clients) {
			t.Errorf("export %d: got %s", i, exps[i])
		}
	}
	if exps[0].FSID != 7 || exps[0].Clients[0].Options.ReadOnly {
		t.Errorf("options lost: %s", exps[0])
	}
}

func TestSize(t *testing.T) {
	for in, want := range map[string]Size{"0": 0, "4096": 4096, "1 MiB": MiB, "3GiB": 3 * GiB, " 7 KiB ": 7 * KiB, "2TiB": 2 * TiB} {
		got, err := ParseSize(in)
		if err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", in, got, err, want)
		}
		if back, err := ParseSize(got.String()); err != nil || back != got {
			t.Errorf("%q does not read back: %d, %v", got.String(), back, err)
		}
	}
	for _, in := range []string{"", "-1", "1 MB", "9999999999 GiB", "1.5 MiB", "18446744073709551615", "MiB"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", in, got)
		}
	}
}

func TestLoadMissing(t *testing.T) {
	_, err := Load("/does/not/exist.toml")
	want := `configuration: stat /does/not/exist.toml: no such file or directory; "baton config --print-default" prints one to start from`
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestLoadHuge(t *testing.T) {
	p := filepath.Join(t.TempDir(), "huge")
	if err := os.WriteFile(p, bytes.Repeat([]byte("#\n"), maxFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(p); err == nil || !strings.Contains(err.Error(), "more than 1048576") {
		t.Errorf("got %v", err)
	}
}

func TestClusterKey(t *testing.T) {
	p := filepath.Join(t.TempDir(), "k")
	k1, err := LoadClusterKey(p, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(p)
	if err != nil || fi.Mode() != 0o600 || len(k1) != ClusterKeySize {
		t.Fatalf("key file: %v %v, %d bytes", fi.Mode(), err, len(k1))
	}
	k2, err := LoadClusterKey(p, rand.Reader)
	if err != nil || !bytes.Equal(k1, k2) {
		t.Fatalf("second load: %v, same %v", err, bytes.Equal(k1, k2))
	}
	if err := os.Chmod(p, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadClusterKey(p, rand.Reader); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("readable by the group: got %v", err)
	}
	if err := os.WriteFile(p, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(p, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadClusterKey(p, rand.Reader); err == nil || !strings.Contains(err.Error(), "not a file of 32 bytes") {
		t.Errorf("short key: got %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(p), ".cluster-key-*")); len(left) != 0 {
		t.Errorf("temporary files left: %v", left)
	}
	if _, err := LoadClusterKey(p+"2", bytes.NewReader(nil)); err == nil {
		t.Error("no randomness: want an error")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(PrintDefault()))
	f.Add([]byte("[nfs]\nprot = 1\n[[ost]]\ndri=\"\"\n"))
	f.Add([]byte("a = \"\"\"x\n=[[\n\"\"\"\n[b]\nc = [1,\n2]\n"))
	f.Fuzz(func(t *testing.T, src []byte) {
		c, err := Parse("f", src)
		if err != nil {
			return
		}
		if err := c.Complete(); err != nil {
			t.Fatal(err)
		}
		_ = c.Validate()
	})
}
