package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/node"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/etcd"
)

// A registry moves from the MGS to etcd and back: it is the same all the time, the one
// that was left cannot be gone on with, and none is overwritten by mistake.
func TestRegistryMoves(t *testing.T) {
	b := newBed(t)
	dir := t.TempDir()
	var free []int
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		free = append(free, l.Addr().(*net.TCPAddr).Port)
		l.Close()
	}
	conf := func(name, registry string) string {
		path := filepath.Join(dir, name+".toml")
		text := fmt.Sprintf(`data_dir = %q
[cluster]
node = "n1"
tls = "off"
[[cluster.nodes]]
name = "n1"
address = "127.0.0.1:7988"
[nfs]
addresses = []
[exports]
file = ""
[mgs]
nodes = ["n1"]
[mdt]
nodes = ["n1"]
[[ost]]
nodes = ["n1"]
[registry]
%s
`, filepath.Join(dir, "data"), registry)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := conf("mgs", "")
	inEtcd := conf("etcd", fmt.Sprintf("kind = \"etcd-embedded\"\nmembers = [\"n1\"]\nclient_port = %d\npeer_port = %d", free[0], free[1]))
	run := func(want int, args ...string) string {
		t.Helper()
		code, out, errs := b.run(args...)
		if code != want {
			t.Fatalf("baton %v: exit code %d\n%s%s", args, code, out, errs)
		}
		return out + errs
	}
	has := func(text string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("no %q in:\n%s", w, text)
			}
		}
	}
	state := func(config string) (r node.RegistryStatus) {
		t.Helper()
		if err := json.Unmarshal([]byte(run(exitOK, "registry", "status", "--json", "--config", config)), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	path := func(name string) string { return filepath.Join(dir, name) }

	// The MGS's, which is in use.
	data := path("data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	has(run(exitFailure, "registry", "export", "--config", file, path("no")), "there is no registry")
	has(run(exitOK, "registry", "status", "--config", file), "there is none yet")
	reg, err := mgs.Open(data, mgs.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	id, err := reg.Identity(t.Context())
	if err == nil {
		_, err = reg.Serve(t.Context(), netip.MustParseAddr("192.0.2.1"), "n1")
	}
	if err != nil {
		t.Fatal(err)
	}
	has(run(exitOK, "registry", "export", "--config", file, path("copy")), "identity "+id)
	has(run(exitFailure, "registry", "export", "--config", file, path("copy")), "not overwritten")
	has(run(exitOK, "registry", "export", "--config", file, "-"), id, "192.0.2.1")
	has(run(exitOK, "registry", "export", "--freeze", "--config", file, path("moved")), "it is frozen now")
	has(run(exitFailure, "registry", "export", "--config", file, path("again")), "exported with --freeze")

	// Into etcd.
	local := netip.MustParseAddr("127.0.0.1")
	peers := []etcd.Peer{{Name: "n1", Client: netip.AddrPortFrom(local, uint16(free[0])), Peer: netip.AddrPortFrom(local, uint16(free[1]))}}
	if r := func() (r node.RegistryStatus) {
		out := run(exitFailure, "registry", "status", "--json", "--config", inEtcd)
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}(); !strings.Contains(r.Error, "no majority") || len(r.Members) != 1 || r.Members[0].Error == "" {
		t.Errorf("status without etcd: %+v", r)
	}
	m, err := etcd.StartMember(t.Context(), etcd.MemberOptions{Name: "n1", Dir: path("etcd"), Members: peers, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	select {
	case <-m.Ready():
	case <-time.After(time.Minute):
		t.Fatal("the member is not ready")
	}
	if r := state(inEtcd); r.Identity != "" || r.Error != "" || r.Leader != "" {
		t.Errorf("empty: %+v", r)
	}
	if err := os.WriteFile(path("damaged"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	has(run(exitFailure, "registry", "import", "--config", inEtcd, path("damaged")), "damaged")
	has(run(exitOK, "registry", "import", "--config", inEtcd, path("moved")), "imported into etcd key /baton/registry", id)
	has(run(exitFailure, "registry", "import", "--config", inEtcd, path("copy")), "not overwritten", "--force")
	if r := state(inEtcd); r.Identity != id || r.Addresses != 1 || r.Revision == 0 || r.Frozen || len(r.Members) != 1 || !r.Members[0].Leader {
		t.Errorf("imported: %+v", r)
	}
	has(run(exitOK, "registry", "status", "--config", inEtcd), "1 service addresses", "elected: nobody", "leader of the members")

	// What cannot be written is not frozen, and a file that comes to nothing does not stay.
	has(run(exitFailure, "registry", "export", "--freeze", "--config", inEtcd, path("missing/back")), "no such file")
	has(run(exitFailure, "registry", "export", "--freeze", "--config", inEtcd, path("moved")), "not overwritten")
	if r := state(inEtcd); r.Frozen {
		t.Error("an export that has failed has frozen the registry")
	}
	if _, err := os.Stat(path("again")); err == nil {
		t.Error("the file of an export that has failed is there")
	}

	// And back.
	has(run(exitOK, "registry", "export", "--freeze", "--config", inEtcd, path("back")), "it is frozen now")
	has(run(exitOK, "registry", "status", "--config", inEtcd), "frozen")
	has(run(exitFailure, "registry", "import", "--config", inEtcd, path("copy")), "not overwritten")
	has(run(exitOK, "registry", "import", "--config", file, path("back")), id)
	has(run(exitFailure, "registry", "import", "--config", file, path("back")), "not overwritten")
	if r := state(file); r.Identity != id || r.Addresses != 1 {
		t.Errorf("back: %+v", r)
	}
	// Again, as after one of which the file is lost.
	has(run(exitOK, "registry", "export", "--freeze", "--config", inEtcd, path("back2")), id, "it is frozen now")
	// By force over what is there, frozen or not.
	has(run(exitOK, "registry", "import", "--force", "--config", inEtcd, path("back")), id)
	if r := state(inEtcd); r.Frozen || r.Identity != id {
		t.Errorf("by force: %+v", r)
	}
	has(run(exitUsage, "registry", "import"), "name of one file")
	has(run(exitUsage, "registry", "export", "--freeze", "-"), "needs a file")
}
