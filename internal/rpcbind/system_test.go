package rpcbind

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	nfsrpc "github.com/vmware/go-nfs-client/nfs/rpc"
)

const insideEnv = "BATON_RPCBIND_TEST_INSIDE"

// TestSystemRpcbind registers with a real rpcbind, in network and mount
// namespaces of its own so that it cannot meet the machine's.
func TestSystemRpcbind(t *testing.T) {
	if os.Getenv(insideEnv) != "" {
		t.Skip("this is the inner process")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces")
	}
	for _, tool := range []string{"unshare", "ip", "rpcbind", "rpcinfo"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("unshare", "-n", "-m", "true").CombinedOutput(); err != nil {
		t.Skipf("no namespaces here: %v %s", err, out)
	}
	cmd := exec.Command("unshare", "-n", "-m", "sh", "-c",
		`ip link set lo up && mount -t tmpfs none /run && exec "$0" -test.run '^TestInsideSystemRpcbind$' -test.v`, exe)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestInsideSystemRpcbind") {
		t.Fatalf("%v\n%s", err, out)
	}
}

func startRpcbind(t *testing.T) (stop func()) {
	t.Helper()
	cmd := exec.Command("rpcbind", "-f")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for i := 0; !(System{}).Available(context.Background()); i++ {
		if i == 500 {
			t.Fatal("rpcbind does not answer")
		}
		time.Sleep(10 * time.Millisecond)
	}
	return func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
}

func rpcinfo(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("rpcinfo").CombinedOutput()
	if err != nil {
		t.Fatalf("rpcinfo: %v %s", err, out)
	}
	var b strings.Builder
	for l := range strings.Lines(string(out)) {
		f := strings.Fields(l)
		if len(f) >= 4 && (f[0] == "100003" || f[0] == "100005") {
			b.WriteString(strings.Join(f[:4], " ") + "\n")
		}
	}
	return b.String()
}

func TestInsideSystemRpcbind(t *testing.T) {
	if os.Getenv(insideEnv) == "" {
		t.Skip("run by TestSystemRpcbind in its own namespaces")
	}
	ctx := context.Background()
	if (System{}).Available(ctx) {
		t.Fatal("an rpcbind answers in an empty network namespace")
	}
	stop := startRpcbind(t)
	defer func() { stop() }()
	r := &Registrar{Mappings: ours, Every: 20 * time.Millisecond}
	if err := r.Start(ctx); err != nil {
		t.Fatal(err)
	}
	const want = "100003 3 tcp 0.0.0.0.8.1\n100003 3 tcp6 ::.8.1\n100005 3 udp 0.0.0.0.78.80\n"
	if got := rpcinfo(t); got != want {
		t.Errorf("rpcinfo:\n%swant:\n%s", got, want)
	}
	// An independent client asks.
	pm, err := nfsrpc.DialPortmapper("tcp", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	port, err := pm.Getport(nfsrpc.Mapping{Prog: 100003, Vers: 3, Prot: nfsrpc.IPProtoTCP})
	if err != nil || port != 2049 {
		t.Errorf("GETPORT: %d, %v", port, err)
	}
	pm.Close()
	if p, err := GetPort(ctx, netip.Addr{}, netip.MustParseAddrPort("127.0.0.1:0"), 100005, 3, UDP); err != nil || p != 20048 {
		t.Errorf("GetPort: %d, %v", p, err)
	}

	stop()
	stop = startRpcbind(t)
	for i := 0; rpcinfo(t) != want; i++ {
		if i == 200 {
			t.Fatalf("not registered again after rpcbind restarted:\n%s", rpcinfo(t))
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := r.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if got := rpcinfo(t); got != "" {
		t.Errorf("after Stop:\n%s", got)
	}

	// Now this package is the rpcbind, and rpcinfo the independent client.
	stop()
	stop = func() {}
	rs, _ := serveOn(t, "127.0.0.1:111", own())
	if !(System{}).Available(ctx) {
		t.Error("our own server does not answer")
	}
	for _, args := range [][]string{{"-p", "127.0.0.1"}, {"-s", "127.0.0.1"}, {"-T", "udp", "127.0.0.1", "100000", "4"},
		{"-a", "127.0.0.1.0.111", "-T", "tcp", "100000", "3"}} {
		out, err := exec.Command("rpcinfo", args...).CombinedOutput()
		t.Logf("rpcinfo %v: %v\n%s", args, err, out)
		if err != nil || !strings.Contains(string(out), "100000") {
			t.Errorf("rpcinfo %v: %v\n%s", args, err, out)
		}
	}
	other := &Registrar{Mappings: []Mapping{{Prog: 100024, Vers: 1, Netid: TCP, Port: 700}}}
	if err := other.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if m, ok := rs.Table.find(100024, 1, TCP, true); !ok || m.Port != 700 {
		t.Errorf("SET by another server: %+v, %v", m, ok)
	}
	if err := other.Stop(ctx); err != nil {
		t.Error(err)
	}
	if m, ok := rs.Table.find(100024, 1, TCP, true); ok {
		t.Errorf("still there after UNSET: %+v", m)
	}
}
