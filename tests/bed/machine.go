package bed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// machineSetup runs in a node's mount namespace: a root of its own, over a tree
// that is only read. What it writes is in memory and goes with the node.
const machineSetup = `set -e
mkdir -p "$DIR"
mount -t tmpfs -o mode=755 tmpfs "$DIR"
mkdir "$DIR/upper" "$DIR/work" "$DIR/root"
mount -t overlay -o "lowerdir=$TREE,upperdir=$DIR/upper,workdir=$DIR/work" overlay "$DIR/root"
cd "$DIR/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
for d in null zero full random urandom tty; do touch dev/$d; mount --bind /dev/$d dev/$d; done
ln -s /proc/self/fd dev/fd
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p run/lock
mount -t tmpfs -o mode=1777 tmpfs tmp
echo "$NAME" >etc/hostname
echo "$NAME" >/proc/sys/kernel/hostname
printf '127.0.0.1 localhost %s\n' "$NAME" >etc/hosts
`

// Machine is a node with a root of its own, UTS and IPC namespaces: programs of the
// tree that sh tests/debtree.sh makes run in it as on a machine without an init.
type Machine struct {
	*Node
	// Root is the machine's root as programs of its mount namespace see it.
	Root string
}

// DebTree returns the Debian tree, which is made if need be. The error wraps
// ErrUnavailable if it cannot.
func DebTree() (string, error) {
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("bed: a Debian tree needs root: %w", ErrUnavailable)
	}
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", filepath.Join(root, "tests", "debtree.sh"))
	cmd.Env = Environ()
	out, err := cmd.Output()
	if err != nil {
		var xe *exec.ExitError
		if errors.As(err, &xe) {
			return "", fmt.Errorf("bed: Debian tree: %w: %s", ErrUnavailable, strings.TrimSpace(string(xe.Stderr)))
		}
		return "", fmt.Errorf("bed: Debian tree: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// NewMachine makes a machine over the tree. dir is a directory of the caller's that
// the machine mounts its root in.
func NewMachine(name, tree, dir string) (*Machine, error) {
	n, err := NewNode(name)
	if err != nil {
		return nil, err
	}
	m := &Machine{Node: n, Root: filepath.Join(dir, "root")}
	for _, ns := range []string{"uts", "ipc"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", n.holder.Process.Pid, ns))
		if err != nil {
			n.Close()
			return nil, fmt.Errorf("bed: open namespace: %w", err)
		}
		n.more = append(n.more, f)
	}
	cmd := Command("sh", "-c", machineSetup)
	cmd.Env = append(cmd.Env, "DIR="+dir, "TREE="+tree, "NAME="+name)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, err := n.RunCmd(ctx, cmd); err != nil {
		n.Close()
		return nil, fmt.Errorf("bed: set up machine %s: %w", name, err)
	}
	return m, nil
}

// Command prepares a program of the machine's root, given by its path there.
func (m *Machine) Command(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Path, cmd.Err = path, nil
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Chroot: m.Root}
	return cmd
}

// Sh runs a shell command in the machine's root and returns its output.
func (m *Machine) Sh(ctx context.Context, script string) (string, error) {
	out, err := m.RunCmd(ctx, m.Command("/bin/sh", "-c", script))
	return string(out), err
}

// Write makes a file of the machine's root.
func (m *Machine) Write(ctx context.Context, path, text string, mode os.FileMode) error {
	cmd := m.Command("/bin/sh", "-c", `mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"`, "sh", path, fmt.Sprintf("%o", mode))
	cmd.Stdin = strings.NewReader(text)
	_, err := m.RunCmd(ctx, cmd)
	return err
}

// Share shows a directory or file of the outside at a path of the machine.
func (m *Machine) Share(ctx context.Context, outside, path string) error {
	fi, err := os.Stat(outside)
	if err != nil {
		return err
	}
	make := `mkdir -p "$2"`
	if !fi.IsDir() {
		make = `mkdir -p "$(dirname "$2")" && touch "$2"`
	}
	_, err = m.Run(ctx, "sh", "-c", make+` && mount --bind "$1" "$2"`, "sh", outside, filepath.Join(m.Root, path))
	return err
}

// Has tells whether an interface of the node has the address.
func (n *Node) Has(ctx context.Context, addr netip.Addr) (bool, error) {
	out, err := n.Run(ctx, "ip", "-o", "address", "show", "to", addr.String())
	return len(strings.TrimSpace(string(out))) > 0, err
}

// Cable connects or cuts a port of a bridge of the node.
func (n *Node) Cable(port string, connected bool) error {
	state := "down"
	if connected {
		state = "up"
	}
	return n.ip("link set " + port + " " + state)
}

// RemovePort takes a port away, with its other end wherever that is. One that is
// gone is no error.
func (n *Node) RemovePort(port string) {
	n.ip("link del " + port)
}
