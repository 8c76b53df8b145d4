package etcd

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// Three members of the distribution's etcd, an older release, in processes of their
// own: one is killed, and then there is no majority.
func TestExternal(t *testing.T) {
	t.Parallel()
	bin, err := exec.LookPath("etcd")
	if err != nil {
		t.Skip("SKIPPED, reason: there is no etcd (package etcd-server)")
	}
	c := newCluster(t, 3, true)
	var all []string
	for _, p := range c.peers {
		all = append(all, fmt.Sprintf("%s=https://%s", p.Name, p.Peer))
	}
	procs := map[string]*exec.Cmd{}
	kill := func(n string) {
		if p := procs[n]; p != nil {
			p.Process.Kill()
			p.Wait()
			delete(procs, n)
		}
	}
	start := func(p Peer) {
		f := c.files(p.Name)
		cu, pu := "https://"+p.Client.String(), "https://"+p.Peer.String()
		x := exec.Command(bin, "--name", p.Name, "--data-dir", filepath.Join(c.dir, p.Name+".etcd"), "--initial-cluster", strings.Join(all, ","),
			"--listen-client-urls", cu, "--advertise-client-urls", cu, "--listen-peer-urls", pu, "--initial-advertise-peer-urls", pu,
			"--heartbeat-interval", "50", "--election-timeout", "500",
			"--cert-file", f.Cert, "--key-file", f.Key, "--trusted-ca-file", f.CA, "--client-cert-auth",
			"--peer-cert-file", f.Cert, "--peer-key-file", f.Key, "--peer-trusted-ca-file", f.CA, "--peer-client-cert-auth")
		if err := x.Start(); err != nil {
			t.Fatal(err)
		}
		procs[p.Name] = x
	}
	defer func() {
		for _, p := range c.peers {
			kill(p.Name)
		}
	}()
	for _, p := range c.peers {
		start(p)
	}
	s := c.client("n1", func(o *Options) { o.MaxDocument, o.Probe = 0, 0 }).Storage()
	eventually(t, "etcd answers", func() error {
		err := s.Swap(ctx, 0, []byte("one"))
		if errors.Is(err, mgs.ErrConflict) { // an attempt whose answer was lost
			return nil
		}
		return err
	})
	_, rev, err := s.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	kill("n1")
	eventually(t, "two of three members", func() error { _, _, err := s.Load(ctx); return err })
	if err := s.Swap(ctx, rev+1000, []byte("no")); !errors.Is(err, mgs.ErrConflict) {
		t.Fatalf("swap of another revision: %v", err)
	}
	kill("n2")
	if _, _, err := s.Load(ctx); !errors.Is(err, mgs.ErrUnavailable) {
		t.Fatalf("without a majority: %v", err)
	}
	start(c.peers[1])
	eventually(t, "the majority is back", func() error { _, _, err := s.Load(ctx); return err })
	if doc, now, err := s.Load(ctx); err != nil || string(doc) != "one" || now != rev {
		t.Fatalf("%q of %d, %v", doc, now, err)
	}
}
