package main

import (
	"bytes"
	"context"
	"errors"
	"github.com/baton-nfs/baton/recovery/client"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/node"
	"github.com/spf13/cobra"
)

// files runs the file commands on a data directory.
type files struct {
	t    *testing.T
	data string
}

func (f *files) run(args ...string) (stdout, stderr string, err error) {
	f.t.Helper()
	var out, errOut bytes.Buffer
	a := &app{stdout: &out, stderr: &errOut}
	root := &cobra.Command{Use: "baton", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(a.fileCmds(node.OpenFS)...)
	root.SetArgs(append(args, "--data", f.data))
	root.SetOut(&out)
	root.SetErr(&errOut)
	err = root.ExecuteContext(context.Background())
	return out.String(), errOut.String(), err
}

func (f *files) ok(args ...string) string {
	f.t.Helper()
	out, errOut, err := f.run(args...)
	if err != nil || errOut != "" {
		f.t.Fatalf("%v: %v\n%s", args, err, errOut)
	}
	return out
}

func (f *files) cfg() *config.Config {
	f.t.Helper()
	c := config.Default()
	c.DataDir = f.data
	c.FS.MinFree = 0
	if err := c.Complete(); err != nil {
		f.t.Fatal(err)
	}
	return c
}

// makeFS makes an empty file system. The directory's name is short enough for
// the path of a socket.
func makeFS(t *testing.T) *files {
	t.Helper()
	dir, err := os.MkdirTemp("", "bf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &files{t, dir}
	_, end, err := node.OpenFS(context.Background(), f.cfg(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	return f
}

// serve holds the file system open and answers on its control socket, as a
// running baton does.
func (f *files) serve() {
	f.t.Helper()
	cfg := f.cfg()
	c, end, err := node.OpenFS(context.Background(), cfg, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := end(); err != nil {
			f.t.Error(err)
		}
	})
	ctl := control.NewServer(nil)
	handleFiles(ctl, func() *client.FS { return c })
	if err := ctl.Start(cfg.Control.Socket); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(ctl.Close)
}

func TestFileCommands(t *testing.T) {
	for _, mode := range []string{"direct", "running"} {
		t.Run(mode, func(t *testing.T) {
			f := makeFS(t)
			if mode == "running" {
				f.serve()
			}
			testFileCommands(t, f)
		})
	}
}

func testFileCommands(t *testing.T, f *files) {
	local := t.TempDir()
	write := func(name, data string, mode os.FileMode) {
		t.Helper()
		p := filepath.Join(local, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
	}
	big := strings.Repeat("0123456789abcdef", 200_000)
	write("src/big", big, 0o640)
	write("src/sub/small", "hello\n", 0o755)
	write("src/sub/empty", "", 0o600)
	write("src/\x01odd\xff name", "odd", 0o644)
	if err := os.Symlink("sub/small", filepath.Join(local, "src/link")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(local, "src/readonly"), 0o755); err != nil {
		t.Fatal(err)
	}
	write("src/readonly/x", "x", 0o444)
	if err := os.Chmod(filepath.Join(local, "src/readonly"), 0o555); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(filepath.Join(local, "src/readonly"), 0o755) })
	old := time.Unix(1_000_000_000, 123456789)
	for _, n := range []string{"src/big", "src/sub"} {
		if err := os.Chtimes(filepath.Join(local, n), old, old); err != nil {
			t.Fatal(err)
		}
	}

	if out := f.ok("ls"); out != "" {
		t.Errorf("empty: %q", out)
	}
	// One file to a new name, then into a directory.
	f.ok("cp", filepath.Join(local, "src/big"), "baton:/one")
	if out := f.ok("cat", "/one"); out != big {
		t.Errorf("cat: %d bytes of %d", len(out), len(big))
	}
	if _, _, err := f.run("cp", local+"/src", "baton:/tree"); err == nil {
		t.Error("a directory without -r")
	}
	f.ok("cp", "-rp", local+"/src", "baton:/tree")
	f.ok("cp", "-r", local+"/src", "baton:/tree")
	f.ok("cp", local+"/src/sub/small", local+"/src/sub/empty", "baton:tree/sub")
	if out := f.ok("ls", "/", "baton:/tree/link"); out != "/tree/link\n\n/:\none\ntree\n" {
		t.Errorf("ls: %q", out)
	}
	want := "/tree/src:\n\"\\x01odd\\xff name\"\nbig\nlink\nreadonly\nsub\n\n/tree/src/readonly:\nx\n\n/tree/src/sub:\nempty\nsmall\n"
	if out := f.ok("ls", "-R", "/tree/src"); out != want {
		t.Errorf("ls -R: %q", out)
	}
	// Files by OST, which is what is to be known when one is lost (RS 90).
	on := [2]string{f.ok("ls", "-R", "--ost", "OST0000", "/"), f.ok("ls", "-R", "--ost", "OST0001", "/")}
	for _, name := range []string{"\nbig\n", "\nsmall\n", "\nempty\n", "\nx\n", "\none\n"} {
		if n := strings.Count(on[0], name) + strings.Count(on[1], name); n != strings.Count(f.ok("ls", "-R", "/"), name) {
			t.Errorf("%q is listed %d times:\n%s\n%s", name, n, on[0], on[1])
		}
	}
	if on[0] == "" || on[1] == "" || strings.Contains(on[0]+on[1], "\nlink\n") || strings.Contains(on[0]+on[1], "\nsub\n") {
		t.Errorf("by OST:\n%s\n%s", on[0], on[1])
	}
	if out := f.ok("ls", "-R", "--ost", "OST0007", "/"); out != "" {
		t.Errorf("on an OST that there is not: %q", out)
	}
	long := f.ok("ls", "-l", "/tree")
	for _, s := range []string{"-rw-r-----", "lrwxrwxrwx", "link -> sub/small", "dr-xr-xr-x", old.Local().Format("2006-01-02 15:04:05") + " big", " 3200000 "} {
		if !strings.Contains(long, s) {
			t.Errorf("ls -l has no %q:\n%s", s, long)
		}
	}
	// Out again, and all of it is the same.
	f.ok("cp", "-rp", "baton:/tree", local+"/back")
	t.Cleanup(func() {
		os.Chmod(filepath.Join(local, "back/readonly"), 0o755)
		os.Chmod(filepath.Join(local, "back/src/readonly"), 0o755)
	})
	same(t, filepath.Join(local, "src"), filepath.Join(local, "back"))
	if b, err := os.ReadFile(filepath.Join(local, "back/src/sub/small")); err != nil || string(b) != "hello\n" {
		t.Errorf("%q %v", b, err)
	}

	// What fails is named and the rest goes on.
	_, errOut, err := f.run("cp", "baton:/nosuch", "baton:/tree/sub/small", local)
	if err == nil || !strings.Contains(errOut, "/nosuch") {
		t.Errorf("%v, %q", err, errOut)
	}
	if _, err := os.Stat(filepath.Join(local, "small")); err != nil {
		t.Error(err)
	}
	for _, args := range [][]string{
		{"cat"}, {"cp", "baton:/one"}, {"cp", "/one", "/two"}, {"cp", "baton:/one", "baton:/two"},
		{"cp", "baton:/one", "/x", "/y"}, {"ls", "--ost", "1", "/"},
	} {
		var ue *usageError
		if _, _, err := f.run(args...); !errors.As(err, &ue) {
			t.Errorf("%v: %v, want a usage error", args, err)
		}
	}
	for _, args := range [][]string{{"cat", "/nosuch"}, {"ls", "/nosuch"}, {"cp", "baton:/one", local + "/src/big", "baton:/one"}} {
		if _, _, err := f.run(args...); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
	if _, _, err := f.run("cp", "baton:/one", "baton:/tree", local+"/nodir"); err == nil {
		t.Error("two sources and no directory")
	}
	_, errOut, _ = f.run("cp", "-r", local+"/src", "baton:/one")
	if !strings.Contains(errOut, "not a directory") {
		t.Errorf("a directory over a file: %q", errOut)
	}
	if out := f.ok("cat", "/one"); out != big {
		t.Error("/one changed")
	}
}

// same compares what a has with b.
func same(t *testing.T, a, b string) {
	t.Helper()
	err := filepath.WalkDir(a, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(a, p)
		q := filepath.Join(b, rel)
		x, err := os.Lstat(p)
		if err != nil {
			return err
		}
		y, err := os.Lstat(q)
		if err != nil {
			return err
		}
		if x.Mode() != y.Mode() || x.Mode().IsRegular() && x.Size() != y.Size() {
			t.Errorf("%s: %v %d, copy %v %d", rel, x.Mode(), x.Size(), y.Mode(), y.Size())
		}
		if !x.ModTime().Equal(y.ModTime()) && rel != "." && !strings.HasPrefix(rel, "sub") {
			t.Errorf("%s: mtime %v, copy %v", rel, x.ModTime(), y.ModTime())
		}
		switch {
		case x.Mode().IsRegular():
			c, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			e, err := os.ReadFile(q)
			if err != nil {
				return err
			}
			if !bytes.Equal(c, e) {
				t.Errorf("%s: contents differ", rel)
			}
		case x.Mode()&fs.ModeSymlink != 0:
			c, _ := os.Readlink(p)
			if e, _ := os.Readlink(q); c != e {
				t.Errorf("%s: %q, copy %q", rel, c, e)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestFilesWithoutFileSystem(t *testing.T) {
	f := &files{t, t.TempDir()}
	if _, _, err := f.run("ls"); err == nil || !strings.Contains(err.Error(), "no file system") {
		t.Errorf("%v", err)
	}
	if es, err := os.ReadDir(f.data); err != nil || len(es) != 0 {
		t.Errorf("ls made something: %v %v", es, err)
	}
}

func TestModeString(t *testing.T) {
	for m, want := range map[fs.FileMode]string{
		0o644:                                    "-rw-r--r--",
		fs.ModeDir | fs.ModeSticky | 0o777:       "drwxrwxrwt",
		fs.ModeSetuid | 0o755:                    "-rwsr-xr-x",
		fs.ModeSetgid | 0o640:                    "-rw-r-S---",
		fs.ModeDevice | 0o660:                    "brw-rw----",
		fs.ModeDevice | fs.ModeCharDevice:        "c---------",
		fs.ModeSymlink | 0o777:                   "lrwxrwxrwx",
		fs.ModeNamedPipe | fs.ModeSticky | 0o600: "prw------T",
		fs.ModeSocket | fs.ModeSetuid | 0o700:    "srws------",
	} {
		if got := modeString(m); got != want {
			t.Errorf("%v: %s, want %s", m, got, want)
		}
	}
}

func TestPrintable(t *testing.T) {
	for s, want := range map[string]string{
		"a b": "a b", `back\slash "q"`: `back\slash "q"`, "\x1b[2J": `"\x1b[2J"`, "\xff": `"\xff"`, "…": "…", "a\nb": `"a\nb"`,
	} {
		if got := printable(s); got != want {
			t.Errorf("%q: %s, want %s", s, got, want)
		}
	}
}

func TestProgress(t *testing.T) {
	var b bytes.Buffer
	p := progress{w: &b}
	p.show("f", 5<<20, 10<<20)
	p.show("f", 6<<20, 10<<20) // too soon
	p.end()
	p.end()
	if got := b.String(); got != "\r\x1b[Kf: 5 of 10 MiB, 50%\r\x1b[K" {
		t.Errorf("%q", got)
	}
	p = progress{}
	p.open(&b)
	if p.w != nil {
		t.Error("progress without a terminal")
	}
}
