// Package bed builds small test networks out of Linux namespaces and runs NFS
// servers in them.
//
// A Node is one set of network, mount, PID, UTS and IPC namespaces. It is not
// named anywhere (nothing appears in `ip netns`): it lives exactly as long as
// its first process, which reads a pipe held by the test. When the test ends
// in whatever way, SIGKILL included, the pipe closes, the first process ends,
// and the kernel kills every process of the node and removes its mounts,
// interfaces and sockets.
package bed

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUnavailable is wrapped by errors that say that this machine cannot build
// namespaces or run a needed program; tests skip with its text as the reason.
var ErrUnavailable = errors.New("not available on this machine")

// sbinPath is searched besides $PATH: Debian keeps servers and mount helpers
// there, and it is often missing from a user's PATH.
const sbinPath = "/usr/sbin:/sbin:/usr/local/sbin"

// nodeSetup runs as the first process of a node. /run and /var/lib/nfs become
// private so that rpcbind, statd and Ganesha of several nodes do not meet.
const nodeSetup = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/rpcbind /run/ganesha /run/sendsigs.omit.d
chown _rpc /run/rpcbind 2>/dev/null || :
if [ -d /var/lib/nfs ]; then
  mount -t tmpfs -o mode=755 tmpfs /var/lib/nfs
  mkdir -p /var/lib/nfs/ganesha /var/lib/nfs/sm /var/lib/nfs/sm.bak
  chown -R statd /var/lib/nfs/sm /var/lib/nfs/sm.bak 2>/dev/null || :
fi
ip link set lo up
echo ready
exec cat >/dev/null`

// Node is one set of namespaces. All methods may be called concurrently.
type Node struct {
	name   string
	holder *exec.Cmd
	stdin  io.Closer
	net    *os.File
	mnt    *os.File
	pid    *os.File
	more   []*os.File    // of a Machine: UTS and IPC namespaces
	gone   chan struct{} // closed when the first process has been waited for

	// host, of a node without namespaces, takes what must run on the thread
	// whose end kills the started processes.
	host chan func()

	closeOnce sync.Once
}

// NewNode makes a node; name is used in errors and as its host name. It needs
// root; without it, or where the kernel refuses namespaces, the error wraps
// ErrUnavailable. The caller closes the node.
func NewNode(name string) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("bed: namespaces need root: %w", ErrUnavailable)
	}
	if _, err := LookPath("ip"); err != nil {
		return nil, fmt.Errorf("bed: package iproute2: %w: %v", ErrUnavailable, err)
	}
	cmd := exec.Command("/bin/sh", "-c", nodeSetup)
	cmd.Env = Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Setpgid:    true,
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("bed: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("bed: %w", err)
	}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOSYS) {
			return nil, fmt.Errorf("bed: new namespaces: %w: %v", ErrUnavailable, err)
		}
		return nil, fmt.Errorf("bed: new namespaces: %w", err)
	}
	n := &Node{name: name, holder: cmd, stdin: stdin, gone: make(chan struct{})}
	line, rerr := bufio.NewReader(stdout).ReadString('\n')
	if rerr != nil || strings.TrimSpace(line) != "ready" {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
		return nil, fmt.Errorf("bed: set up node %s: %s", name, strings.TrimSpace(stderr.String()))
	}
	for _, f := range []struct {
		dst **os.File
		ns  string
	}{{&n.net, "net"}, {&n.mnt, "mnt"}, {&n.pid, "pid"}} {
		*f.dst, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", cmd.Process.Pid, f.ns))
		if err != nil {
			stdin.Close()
			cmd.Process.Kill()
			cmd.Wait()
			return nil, fmt.Errorf("bed: open namespace: %w", err)
		}
	}
	go func() {
		cmd.Wait()
		close(n.gone)
	}()
	return n, nil
}

// HostNode returns a node without namespaces of its own: its programs run
// beside the test, on the machine's loopback, without any privileges. They are
// killed when the test process ends.
func HostNode() *Node {
	n := &Node{name: "host", host: make(chan func())}
	go func() {
		// The parent of a process, as its death signal sees it, is a thread.
		runtime.LockOSThread()
		for f := range n.host {
			f()
		}
	}()
	return n
}

// Name returns the name given to NewNode.
func (n *Node) Name() string { return n.name }

// Close kills every process of the node and waits until the first one is gone.
// Nothing may be started in it afterwards.
func (n *Node) Close() error {
	n.closeOnce.Do(func() {
		if n.host != nil {
			close(n.host)
			return
		}
		n.stdin.Close()
		n.holder.Process.Kill()
		select {
		case <-n.gone:
		case <-time.After(20 * time.Second):
			// A process in uninterruptible sleep; nothing more can be done.
		}
		n.net.Close()
		n.mnt.Close()
		n.pid.Close()
		for _, f := range n.more {
			f.Close()
		}
	})
	return nil
}

// Environ returns the process's environment with the system directories added
// to PATH and no proxies, which would catch nothing useful inside a node.
func Environ() []string {
	var env []string
	for _, kv := range os.Environ() {
		if strings.HasPrefix(kv, "PATH=") {
			continue
		}
		env = append(env, kv)
	}
	return append(env, "PATH="+os.Getenv("PATH")+":"+sbinPath)
}

// LookPath finds a program in PATH or in the system directories.
func LookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, d := range strings.Split(sbinPath, ":") {
		if p, err := exec.LookPath(d + "/" + name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("program %s: %w", name, ErrUnavailable)
}

// Command prepares a program that Node.Start or Node.Run will run. It becomes
// the leader of a process group of its own.
func Command(name string, args ...string) *exec.Cmd {
	path, err := LookPath(name)
	if err != nil {
		path = name
	}
	cmd := exec.Command(path, args...)
	cmd.Env = Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// onThread runs f on a thread of its own that has joined the node's namespaces
// (only the network's unless all). The thread ends with f, so nothing else ever
// runs in the foreign namespaces.
func (n *Node) onThread(all bool, f func() error) error {
	errc := make(chan error, 1)
	if n.host != nil {
		n.host <- func() { errc <- f() }
		return <-errc
	}
	go func() {
		runtime.LockOSThread() // deliberately never unlocked
		errc <- func() error {
			if err := unix.Setns(int(n.net.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("bed: join network of %s: %w", n.name, err)
			}
			if all {
				if err := unix.Unshare(unix.CLONE_FS); err != nil {
					return fmt.Errorf("bed: unshare: %w", err)
				}
				if err := unix.Setns(int(n.mnt.Fd()), unix.CLONE_NEWNS); err != nil {
					return fmt.Errorf("bed: join mounts of %s: %w", n.name, err)
				}
				if err := unix.Setns(int(n.pid.Fd()), unix.CLONE_NEWPID); err != nil {
					return fmt.Errorf("bed: join processes of %s: %w", n.name, err)
				}
				for _, f := range n.more {
					if err := unix.Setns(int(f.Fd()), 0); err != nil {
						return fmt.Errorf("bed: join %s of %s: %w", f.Name(), n.name, err)
					}
				}
			}
			return f()
		}()
	}()
	return <-errc
}

// Do runs f in the node's network namespace. Sockets that f makes stay there
// and may be used anywhere afterwards. f must not start goroutines that make
// sockets.
func (n *Node) Do(f func() error) error { return n.onThread(false, f) }

// DialContext connects from inside the node. Only literal addresses work.
func (n *Node) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Start starts cmd inside the node. cmd.Process.Pid is the PID seen by the
// test; the caller waits for cmd.
func (n *Node) Start(cmd *exec.Cmd) error {
	if cmd.Dir == "" {
		if wd, err := os.Getwd(); err == nil {
			cmd.Dir = wd
		}
	}
	if n.host != nil {
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	return n.onThread(true, cmd.Start)
}

// Run runs a program inside the node and returns its combined output. When ctx
// ends first, its process group is killed.
func (n *Node) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := Command(name, args...)
	return n.RunCmd(ctx, cmd)
}

// RunCmd is Run for a prepared command without Stdout and Stderr.
func (n *Node) RunCmd(ctx context.Context, cmd *exec.Cmd) ([]byte, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := n.Start(cmd); err != nil {
		return nil, fmt.Errorf("bed: run %s: %w", cmd.Path, err)
	}
	stop := context.AfterFunc(ctx, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer stop()
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return out.Bytes(), fmt.Errorf("bed: %s: %w\n%s", strings.Join(cmd.Args, " "), err, out.Bytes())
	}
	return out.Bytes(), nil
}

// Proc is a process started in a node, waited for in the background.
type Proc struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done
}

// Spawn starts cmd in the node; the returned Proc is waited for by itself.
func (n *Node) Spawn(cmd *exec.Cmd) (*Proc, error) {
	if err := n.Start(cmd); err != nil {
		return nil, fmt.Errorf("bed: start %s: %w", cmd.Path, err)
	}
	p := &Proc{cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Pid returns the PID as the test sees it.
func (p *Proc) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Proc) Done() <-chan struct{} { return p.done }

// Err returns what Wait returned; call it after Done is closed.
func (p *Proc) Err() error { return p.err }

// Kill sends SIGKILL to the process group and waits for the process.
func (p *Proc) Kill() {
	select {
	case <-p.done:
		return
	default:
	}
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	p.cmd.Process.Kill()
	<-p.done
}

// SignalOne sends a signal to the process alone, not to its group; nothing happens if it
// has ended.
func (p *Proc) SignalOne(sig syscall.Signal) { p.cmd.Process.Signal(sig) }

// Signal sends a signal to the process group. After SIGSTOP no thread of the process
// runs any more.
func (p *Proc) Signal(sig syscall.Signal) error {
	select {
	case <-p.done:
		return fmt.Errorf("bed: %s has ended", p.cmd.Path)
	default:
	}
	if err := syscall.Kill(-p.cmd.Process.Pid, sig); err != nil || sig != syscall.SIGSTOP {
		return err
	}
	// The kernel tells a parent when the last thread has stopped; on a busy machine that
	// is some time after the signal.
	for {
		err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Stop sends SIGTERM and waits for the process; after grace it is killed and
// an error returned.
func (p *Proc) Stop(grace time.Duration) error {
	select {
	case <-p.done:
		return p.err
	default:
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return p.err
	case <-time.After(grace):
		p.Kill()
		return fmt.Errorf("bed: %s did not stop within %v", p.cmd.Path, grace)
	}
}
