package mgs

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRegistrySurvivesReopen(t *testing.T) {
	dir := t.TempDir()
	r, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	id, gen, err := r.StartClient()
	if err != nil || gen != 1 {
		t.Fatalf("first start: generation %d, %v", gen, err)
	}
	a, b := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")
	va, err := r.Serve(a)
	if err != nil {
		t.Fatal(err)
	}
	vb, err := r.Serve(b)
	if err != nil {
		t.Fatal(err)
	}
	if va.Index == vb.Index || va.VerifierBytes() == vb.VerifierBytes() || va.Epoch != 1 {
		t.Fatalf("VIPs not distinct: %+v %+v", va, vb)
	}

	r, err = Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	id2, gen2, err := r.StartClient()
	if err != nil || id2 != id || gen2 != 2 {
		t.Fatalf("second start: same id %v, generation %d, %v", id2 == id, gen2, err)
	}
	va2, err := r.Serve(a)
	if err != nil || va2.Index != va.Index || va2.Epoch != 2 || va2.Verifier != va.Verifier {
		t.Fatalf("after reopen: %+v, want index and verifier of %+v and epoch 2 (%v)", va2, va, err)
	}
	vs, err := r.NewVerifiers()
	if err != nil || len(vs) != 2 || vs[0].Verifier == va.Verifier || vs[1].Verifier == vb.Verifier {
		t.Fatalf("verifiers did not change: %+v %v", vs, err)
	}
	r, err = Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.VIPs(); got[0].Verifier != vs[0].Verifier {
		t.Fatal("the new verifier was not durable")
	}
}

func TestDamagedRegistryIsRefused(t *testing.T) {
	for _, content := range []string{"", "{", `{"format":1,"client":"zz"}`, `{"format":9}`} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "registry.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(dir)
		if err == nil || !strings.Contains(err.Error(), "mgs:") {
			t.Errorf("content %q: error %v", content, err)
		}
	}
}
