package systemd

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

// patience is what nothing may take: only a hang exceeds it.
const patience = 30 * time.Second

// addr is the service address in the container.
var addr = netip.MustParseAddr("192.0.2.10")

// boxSetup runs in the node's mount namespace: a root over the tree, which is only read.
// The cluster managers of the tree stay off, and what would wait for a network.
const boxSetup = `set -e
mount -t tmpfs -o mode=755 tmpfs "$DIR"
mkdir "$DIR/upper" "$DIR/work" "$DIR/root"
mount -t overlay -o "lowerdir=$TREE,upperdir=$DIR/upper,workdir=$DIR/work" overlay "$DIR/root"
cd "$DIR/root"
for u in corosync pacemaker ctdb keepalived logd e2scrub_reap systemd-networkd systemd-networkd-wait-online; do ln -sf /dev/null etc/systemd/system/$u.service; done
mkdir -p var/log/journal
rm -f etc/machine-id
cp "$DEB" root/baton.deb
ip address add "$ADDR/32" dev lo
if ! grep -q cgroup2 /proc/mounts; then mount -t cgroup2 cgroup2 /sys/fs/cgroup; fi
`

// box is a container with systemd.
type box struct {
	t    *testing.T
	ctx  context.Context
	node *bed.Node
	root string
	proc *bed.Proc
	boot int // of systemd, as the test sees it
}

// newBox boots a container that has the package as /root/baton.deb.
func newBox(t *testing.T) *box {
	t.Helper()
	if testing.Short() || os.Getenv("BATON_KERNEL") == "" {
		t.Skip("SKIPPED, reason: set BATON_KERNEL=1 for suites that make a Debian tree and namespaces")
	}
	for _, p := range []string{"systemd-nspawn", "nsenter", "dpkg-deb"} {
		_, err := bed.LookPath(p)
		bed.Need(t, err)
	}
	tree, err := bed.DebTree()
	bed.Need(t, err)
	deb := buildDeb(t)
	node, err := bed.NewNode("sd")
	bed.Need(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	b := &box{t: t, ctx: ctx, node: node}
	t.Cleanup(func() {
		if t.Failed() && b.proc != nil {
			out, _ := b.try("journalctl -b --no-pager -o short-monotonic | tail -n 150")
			t.Logf("journal:\n%s", out)
		}
		cancel()
		if b.proc != nil {
			b.proc.Kill()
		}
		node.Close()
	})
	dir := bed.Dir(t)
	b.root = filepath.Join(dir, "root")
	cmd := bed.Command("sh", "-c", boxSetup)
	cmd.Env = append(cmd.Env, "DIR="+dir, "TREE="+tree, "DEB="+deb, "ADDR="+addr.String())
	if _, err := node.RunCmd(ctx, cmd); err != nil {
		t.Fatal(err)
	}
	b.start()
	return b
}

// start boots the container's system, which shares the node's network.
func (b *box) start() {
	b.t.Helper()
	cmd := bed.Command("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe", "--machine=baton-sd", "--capability=CAP_NET_ADMIN",
		"--network-namespace-path=/proc/self/ns/net", "--directory="+b.root)
	cmd.Env = append(cmd.Env, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=network")
	log, err := os.CreateTemp(filepath.Dir(filepath.Dir(b.root)), "nspawn")
	if err != nil {
		b.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if b.proc, err = b.node.Spawn(cmd); err != nil {
		b.t.Fatal(err)
	}
	text := func() string {
		out, _ := os.ReadFile(log.Name())
		return string(out)
	}
	b.await("boot", func() (bool, string) {
		select {
		case <-b.proc.Done():
			b.t.Skipf("SKIPPED, reason: systemd-nspawn does not run here: %v: %s", b.proc.Err(), text())
		default:
		}
		b.boot = leader(b.proc.Pid())
		if b.boot == 0 {
			return false, "no first process: " + text()
		}
		out, err := b.try("systemctl is-system-running")
		state := strings.TrimSpace(out)
		return state == "running" || state == "degraded", fmt.Sprint(state, err, text())
	})
}

// leader is the first process of a container: the child of nspawn that is the first
// of a PID namespace of its own.
func leader(nspawn int) int {
	own, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", nspawn))
	kids, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", nspawn, nspawn))
	for _, s := range strings.Fields(string(kids)) {
		pid, _ := strconv.Atoi(s)
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err == nil && ns != own && strings.TrimSpace(string(name)) == "systemd" {
			return pid
		}
	}
	return 0
}

// try runs a shell command in the container.
func (b *box) try(script string) (string, error) {
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(b.boot), "-a", "--", "/bin/sh", "-c", script)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"}
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// sh is try for what must not fail.
func (b *box) sh(script string) string {
	b.t.Helper()
	out, err := b.try(script)
	if err != nil {
		b.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(out)
}

// write makes a file in the container.
func (b *box) write(path, text string) {
	b.t.Helper()
	b.sh(fmt.Sprintf("mkdir -p \"$(dirname %s)\" && cat >%s <<'END_OF_FILE'\n%s\nEND_OF_FILE", path, path, text))
}

// show is a property of a unit.
func (b *box) show(unit, property string) string {
	b.t.Helper()
	return b.sh("systemctl show --value -p " + property + " " + unit)
}

// await waits for a state that comes by itself.
func (b *box) await(what string, ok func() (bool, string)) {
	b.t.Helper()
	var last string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		done, seen := ok()
		if done {
			return
		}
		last = seen
	}
	b.t.Fatalf("no %s: %s", what, last)
}

// install installs the package and configures it.
func (b *box) install(unit string) {
	b.t.Helper()
	b.sh("dpkg -i /root/baton.deb")
	b.write("/etc/baton/baton.toml", fmt.Sprintf(`data_dir = "/var/lib/baton"
[nfs]
addresses = ["%s"]
[rpcbind]
mode = "own"
[log]
level = "debug"
[[export]]
name = "/home"
path = "/"
clients = ["*"]
options = "rw,insecure,no_root_squash"`, addr))
	b.write("/etc/baton/exports", "# nothing yet")
	if unit != "" {
		b.write("/etc/systemd/system/baton.service.d/test.conf", unit)
		b.sh("systemctl daemon-reload")
	}
}

var (
	debOnce sync.Once
	debPath string
	debErr  error
)

// buildDeb makes the package once.
func buildDeb(t *testing.T) string {
	t.Helper()
	bin, err := bed.Build("./cmd/baton")
	if err != nil {
		t.Fatal(err)
	}
	debOnce.Do(func() {
		dir, err := bed.Scratch()
		if err != nil {
			debErr = err
			return
		}
		cmd := exec.Command("sh", "../../packaging/deb/build.sh", filepath.Join(dir, "deb"))
		cmd.Env = append(bed.Environ(), "BATON="+bin, "XZ=0", "GO="+bed.GoTool())
		out, err := cmd.Output()
		if err != nil {
			if xe, ok := err.(*exec.ExitError); ok {
				err = fmt.Errorf("%w: %s", err, xe.Stderr)
			}
			debErr = err
			return
		}
		debPath = strings.TrimSpace(string(out))
	})
	if debErr != nil {
		t.Fatal(debErr)
	}
	return debPath
}
