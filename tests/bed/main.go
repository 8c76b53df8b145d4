package bed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// TestDirEnv names the environment variable with the directory for scratch
// data; the default is the system's temporary directory. It decides which disk
// servers store their data on.
const TestDirEnv = "BATON_TEST_DIR"

var (
	scratchOnce sync.Once
	scratchDir  string
	scratchErr  error
)

// Scratch returns this process's scratch directory, made at the first call.
// Cleanup removes it.
func Scratch() (string, error) {
	scratchOnce.Do(func() {
		scratchDir, scratchErr = os.MkdirTemp(os.Getenv(TestDirEnv), "baton-bed-")
		if scratchErr != nil {
			scratchErr = fmt.Errorf("bed: scratch directory: %w", scratchErr)
			return
		}
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		go func() {
			s := <-c
			Cleanup()
			fmt.Fprintf(os.Stderr, "bed: %v\n", s)
			os.Exit(130)
		}()
	})
	return scratchDir, scratchErr
}

var (
	cleanupMu sync.Mutex
	cleanups  []func()
	kept      bool // a directory of a failed test stays
)

// AtCleanup makes Cleanup call f before it removes the scratch directory, the
// last one added first.
func AtCleanup(f func()) {
	cleanupMu.Lock()
	defer cleanupMu.Unlock()
	cleanups = append(cleanups, f)
}

// Cleanup removes the scratch directory, unless something of it is to be kept. Nodes clean up by themselves.
func Cleanup() {
	cleanupMu.Lock()
	defer cleanupMu.Unlock()
	for len(cleanups) > 0 {
		f := cleanups[len(cleanups)-1]
		cleanups = cleanups[:len(cleanups)-1]
		f()
	}
	if scratchDir != "" && !kept {
		os.RemoveAll(scratchDir)
	}
}

// Main is the TestMain of suites that use beds: it runs the tests and removes
// the scratch directory.
func Main(m *testing.M) {
	code := m.Run()
	Cleanup()
	os.Exit(code)
}

// Dir makes a directory under the scratch directory that is removed when the
// test ends, unless it failed and BATON_KEEP is set.
func Dir(t testing.TB) string {
	t.Helper()
	s, err := Scratch()
	if err != nil {
		t.Fatal(err)
	}
	d, err := os.MkdirTemp(s, "t")
	if err != nil {
		t.Fatal(err)
	}
	// Servers and anonymous users must be able to traverse it.
	os.Chmod(s, 0o755)
	os.Chmod(d, 0o755)
	t.Cleanup(func() {
		if t.Failed() && os.Getenv("BATON_KEEP") != "" {
			t.Logf("kept %s", d)
			cleanupMu.Lock()
			kept = true
			cleanupMu.Unlock()
			return
		}
		os.RemoveAll(d)
	})
	return d
}

// Need skips the test with a reason if err says that the machine lacks
// something, and fails it for any other error.
func Need(t testing.TB, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if errors.Is(err, ErrUnavailable) {
		t.Skipf("SKIPPED, reason: %v", err)
	}
	t.Fatal(err)
}

var (
	buildMu sync.Mutex
	built   = map[string]string{}
)

// Build compiles the main package at pkg (a path relative to the module's
// root such as "./cmd/baton") statically, once per process, and returns the
// program's path.
func Build(pkg string) (string, error) {
	buildMu.Lock()
	defer buildMu.Unlock()
	if p, ok := built[pkg]; ok {
		return p, nil
	}
	s, err := Scratch()
	if err != nil {
		return "", err
	}
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	out := filepath.Join(s, "bin", filepath.Base(pkg))
	cmd := exec.Command(GoTool(), "build", "-o", out, pkg)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("bed: build %s: %w\n%s", pkg, err, b)
	}
	built[pkg] = out
	return out, nil
}

// GoTool returns the path of the go command.
func GoTool() string {
	if p, err := exec.LookPath("go"); err == nil {
		return p
	}
	return "/usr/local/go/bin/go" // where Go's own archive is unpacked
}

// moduleRoot finds the directory of go.mod above the working directory.
func moduleRoot() (string, error) {
	b, err := exec.Command(GoTool(), "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("bed: go env: %w", err)
	}
	mod := strings.TrimSpace(string(b))
	if mod == "" || mod == os.DevNull {
		return "", errors.New("bed: not inside the module")
	}
	return filepath.Dir(mod), nil
}
