package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// asBaton has the test's program be baton, in a process that may change its user.
const asBaton = "BATON_TEST_IS_BATON"

func TestMain(m *testing.M) {
	if os.Getenv(asBaton) != "" {
		main()
	}
	os.Exit(m.Run())
}

// What root does in the directories of a baton that is stopped leaves nothing that the user
// to whom they belong cannot open.
func TestRootLeavesNothingOfItsOwn(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	const nobody = 65534
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	data, private := filepath.Join(dir, "data"), filepath.Join(dir, "private")
	for _, d := range []string{data, filepath.Join(data, "mdt"), private} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if d != private {
			if err := os.Chown(d, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
	}
	baton := func(want int, args ...string) string {
		t.Helper()
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), asBaton+"=1")
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Fatalf("baton %v: exit code %d\n%s", args, code, out)
		}
		return string(out)
	}
	clean := func(after string) {
		t.Helper()
		n := 0
		err := filepath.WalkDir(data, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := e.Info()
			if err != nil {
				return err
			}
			n++
			if st := fi.Sys().(*syscall.Stat_t); st.Uid != nobody {
				t.Errorf("after %s: %s belongs to user %d", after, p, st.Uid)
			}
			return nil
		})
		if err != nil || n < 3 {
			t.Fatalf("%d files, %v", n, err)
		}
	}
	copied := filepath.Join(private, "registry.json")
	baton(exitOK, "ls", "--data", data, "-l", "/")
	clean("ls")
	baton(exitOK, "fsck", "--data", data, "--repair")
	clean("fsck")
	baton(exitOK, "registry", "export", "--data", data, copied)
	baton(exitOK, "registry", "import", "--data", data, "--force", copied)
	clean("import")
	if out := baton(exitFailure, "cp", "--data", data, copied, insidePrefix+"/f"); !strings.Contains(out, "runuser") {
		t.Errorf("cp: %s", out)
	}
	clean("cp")
	baton(exitOK, "registry", "export", "--freeze", "--data", data, filepath.Join(private, "frozen.json"))
	clean("export")
	if b, err := os.ReadFile(filepath.Join(private, "frozen.json")); err != nil || !strings.Contains(string(b), `"client"`) {
		t.Errorf("the export: %s, %v", b, err)
	}
}
