// Package uml boots Debian's User Mode Linux as a real Linux kernel NFS client
// inside a bed.Node. A Guest runs one shell script and its output and exit
// status come back through a directory that the guest sees as well.
package uml

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

//go:embed init.sh
var initScript string

//go:embed shim/ptrace.c
var shimSource []byte

// ShimEnv set to 1 loads the ptrace library whatever the CPU is.
const ShimEnv = "BATON_UML_SHIM"

// Config describes one guest.
type Config struct {
	// Node has the tap interface Tap, on a bridge that reaches the server.
	Node *bed.Node
	Tap  string
	// Addr is the guest's address with its prefix.
	Addr netip.Prefix
	// Addr6 is its IPv6 address with prefix. Without it the guest has no IPv6.
	Addr6 netip.Prefix
	// Dir is a directory of the host, used by this guest alone. The guest sees
	// it as /mnt/out, writable.
	Dir string
	// Work is the static helper program (tests/kernel/work); it appears in the
	// guest as $WORK.
	Work string
	// Share, if not empty, is a directory of the host that the guest sees
	// read-only as $SHARE. The guest's /tmp is its own, so files of the host's
	// /tmp can reach it in no other way.
	Share string
	// MemoryMiB is the guest's memory; 0 means 768.
	MemoryMiB int
	// Hostname, if not empty, becomes the guest's host name. The kernel sends it as
	// the name of the lock owner's host (caller_name, and mon_name of SM_NOTIFY), so
	// guests that lock files need one each; without it all are "(none)".
	Hostname string
	// StateDir, if not empty, is a directory of the host that the guest sees as
	// /var/lib/nfs: the monitor list and the state number of rpc.statd outlive the
	// guest. When it boots again, sm-notify tells the hosts of the list that
	// this one has lost its locks. Without it the guest starts with nothing to tell.
	StateDir string
	// Script is a shell script; its exit status is the guest's result. $MNT is an
	// empty directory to mount on, $OUT is Dir.
	Script string
}

// Guest is a running virtual machine.
type Guest struct {
	c       Config
	proc    *bed.Proc
	console *os.File
}

// Result is what a guest's script left.
type Result struct {
	// Status is the script's exit status.
	Status int
	// Output is what the script wrote to standard output and error.
	Output string
	// Console is the kernel's console, Dmesg its log at the end.
	Console, Dmesg string
}

// Available reports whether guests can be booted here; the error wraps
// bed.ErrUnavailable.
func Available() error {
	for prog, pkg := range map[string]string{"linux.uml": "user-mode-linux", "mount.nfs": "nfs-common", "rpcbind": "rpcbind"} {
		if _, err := bed.LookPath(prog); err != nil {
			return fmt.Errorf("uml: package %s: %w", pkg, err)
		}
	}
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		return fmt.Errorf("uml: %w: %v", bed.ErrUnavailable, err)
	} else {
		f.Close()
	}
	return nil
}

// needShim decides whether the CPU's register state is too large for UML.
func needShim() bool {
	if os.Getenv(ShimEnv) == "1" {
		return true
	}
	b, _ := os.ReadFile("/proc/cpuinfo")
	return strings.Contains(string(b), " amx_tile")
}

var shim struct {
	sync.Mutex
	path string
}

// buildShim compiles the ptrace library once.
func buildShim() (string, error) {
	shim.Lock()
	defer shim.Unlock()
	if shim.path != "" {
		return shim.path, nil
	}
	s, err := bed.Scratch()
	if err != nil {
		return "", err
	}
	src, lib := filepath.Join(s, "shim.c"), filepath.Join(s, "shim.so")
	if err := os.WriteFile(src, shimSource, 0o644); err != nil {
		return "", fmt.Errorf("uml: %w", err)
	}
	gcc, err := bed.LookPath("gcc")
	if err != nil {
		return "", fmt.Errorf("uml: this CPU needs the ptrace library, and package gcc: %w", err)
	}
	if out, err := exec.Command(gcc, "-O2", "-Wall", "-shared", "-fPIC", "-o", lib, src).CombinedOutput(); err != nil {
		return "", fmt.Errorf("uml: compile the ptrace library: %w\n%s", err, out)
	}
	shim.path = lib
	return lib, nil
}

// Start boots a guest. If it does not come up, it is tried once more with the
// ptrace library, and after that the error wraps bed.ErrUnavailable.
func Start(ctx context.Context, c Config) (*Guest, error) {
	if err := Available(); err != nil {
		return nil, err
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = 768
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("uml: %w", err)
	}
	for _, f := range []string{"booted", "status", "guest.log", "dmesg.log"} {
		os.Remove(filepath.Join(c.Dir, f))
	}
	if c.StateDir != "" {
		if err := os.MkdirAll(c.StateDir, 0o755); err != nil {
			return nil, fmt.Errorf("uml: %w", err)
		}
	}
	six := ""
	if c.Addr6.IsValid() {
		six = c.Addr6.String()
	}
	script := strings.NewReplacer("@WINDOW@", c.Dir, "@ADDR@", c.Addr.String(), "@ADDR6@", six, "@SHARE@", c.Share, "@HOST@", c.Hostname, "@STATE@", c.StateDir).Replace(initScript)
	for name, text := range map[string]string{"init.sh": script, "job.sh": c.Script + "\n"} {
		if err := os.WriteFile(filepath.Join(c.Dir, name), []byte(text), 0o755); err != nil {
			return nil, fmt.Errorf("uml: %w", err)
		}
	}
	if err := copyFile(c.Work, filepath.Join(c.Dir, "work")); err != nil {
		return nil, fmt.Errorf("uml: %w", err)
	}
	with := needShim()
	g, err := boot(ctx, c, with)
	if err != nil && !with && ctx.Err() == nil {
		first := err
		if g, err = boot(ctx, c, true); err != nil {
			err = fmt.Errorf("%w (and without the ptrace library: %v)", err, first)
		}
	}
	return g, err
}

func boot(ctx context.Context, c Config, withShim bool) (*Guest, error) {
	vec := "vec0:transport=tap,ifname=" + c.Tap + ",depth=128,gro=1"
	if c.StateDir != "" && c.Addr.Addr().Is4() {
		// A machine that boots again has the same interface.
		a := c.Addr.Addr().As4()
		vec += fmt.Sprintf(",mac=02:62:%02x:%02x:%02x:%02x", a[0], a[1], a[2], a[3])
	}
	cmd := bed.Command("linux.uml", fmt.Sprintf("mem=%dM", c.MemoryMiB), "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro",
		"init="+filepath.Join(c.Dir, "init.sh"), "uml_dir="+c.Dir, "umid=guest", vec, "con=null", "con0=null,fd:1", "con1=null", "ssl=null", "quiet", "panic=-1")
	// Everything in a guest's environment would come from the kernel's command
	// line; UML itself needs only a home.
	cmd.Env = []string{"HOME=" + c.Dir, "PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}
	if withShim {
		lib, err := buildShim()
		if err != nil {
			return nil, err
		}
		cmd.Env = append(cmd.Env, "LD_PRELOAD="+lib)
	}
	console, err := os.Create(filepath.Join(c.Dir, "console.log"))
	if err != nil {
		return nil, fmt.Errorf("uml: %w", err)
	}
	cmd.Stdout, cmd.Stderr = console, console
	p, err := c.Node.Spawn(cmd)
	if err != nil {
		console.Close()
		return nil, err
	}
	g := &Guest{c: c, proc: p, console: console}
	deadline := time.After(60 * time.Second)
	for {
		if _, err := os.Stat(filepath.Join(c.Dir, "booted")); err == nil {
			go g.wakeTimer()
			return g, nil
		}
		var why error
		select {
		case <-p.Done():
			if _, err := os.Stat(filepath.Join(c.Dir, "booted")); err == nil {
				return g, nil // already over
			}
			why = fmt.Errorf("ended with %v", p.Err())
		case <-deadline:
			why = errors.New("did not boot in 60 s")
		case <-ctx.Done():
			why = ctx.Err()
		case <-time.After(20 * time.Millisecond):
			continue
		}
		g.Kill()
		return nil, fmt.Errorf("uml: %w: User Mode Linux %w:\n%s", bed.ErrUnavailable, why, g.readTail("console.log", 2000))
	}
}

// wakeTimer makes the guest look at its timers now and then, until it has ended. The
// kernel under User Mode Linux (6.1, unblock_signals) drops a timer's signal that becomes
// pending while the one before is handled. Its timers are one-shot, so none ever fires
// after that: whatever sleeps stays asleep, no packet is sent again, and no keepalive
// answered, since answers to them are limited by the clock. One signal more is harmless.
func (g *Guest) wakeTimer() {
	for {
		select {
		case <-g.proc.Done():
			return
		case <-time.After(timerWake):
			g.proc.SignalOne(syscall.SIGALRM)
		}
	}
}

// timerWake is how long a guest's timers may stand still.
const timerWake = 100 * time.Millisecond

// Kill ends the guest at once.
func (g *Guest) Kill() {
	g.proc.Kill()
	g.console.Close()
}

// Path returns the host's path of a file of the guest's /mnt/out.
func (g *Guest) Path(name string) string { return filepath.Join(g.c.Dir, name) }

// Done is closed when the guest has ended.
func (g *Guest) Done() <-chan struct{} { return g.proc.Done() }

// Wait waits for the guest's end and returns what it left. When ctx ends first,
// the guest is killed. The error says that the guest did not finish its script;
// a script with a status other than 0 is no error here. The Result is valid in
// any case.
func (g *Guest) Wait(ctx context.Context) (Result, error) {
	var err error
	select {
	case <-g.proc.Done():
	case <-ctx.Done():
		err = fmt.Errorf("uml: guest did not finish: %w", ctx.Err())
	}
	g.Kill()
	r := Result{
		Status:  -1,
		Output:  g.readTail("guest.log", 1<<20),
		Console: g.readTail("console.log", 1<<16),
		Dmesg:   g.readTail("dmesg.log", 1<<16),
	}
	if err != nil {
		return r, err
	}
	b, rerr := os.ReadFile(g.Path("status"))
	if rerr != nil {
		return r, fmt.Errorf("uml: guest ended without a status (%v):\n%s", g.proc.Err(), r.Console)
	}
	r.Status, rerr = strconv.Atoi(strings.TrimSpace(string(b)))
	if rerr != nil {
		return r, fmt.Errorf("uml: guest's status: %w", rerr)
	}
	return r, nil
}

// Run is Start and Wait.
func Run(ctx context.Context, c Config) (Result, error) {
	g, err := Start(ctx, c)
	if err != nil {
		return Result{Status: -1}, err
	}
	return g.Wait(ctx)
}

// readTail returns the last max bytes of a file of the window, "" if missing.
func (g *Guest) readTail(name string, max int64) string {
	f, err := os.Open(g.Path(name))
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	b := make([]byte, min(max, st.Size()))
	n, _ := f.ReadAt(b, st.Size()-int64(len(b)))
	return string(b[:n])
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}
