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

// reopen is what a start after kill -9 finds.
func reopen(t *testing.T, dir string) *Registry {
	t.Helper()
	r, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestNSMState(t *testing.T) {
	dir := t.TempDir()
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	check := func(what string, v VIP, err error, state uint32, crashed bool) {
		t.Helper()
		if err != nil || v.NSMState != state || v.Crashed != crashed {
			t.Fatalf("%s: state %d, crashed %v, %v; want %d, %v", what, v.NSMState, v.Crashed, err, state, crashed)
		}
	}
	r := reopen(t, dir)
	v, err := r.Serve(a)
	check("first service", v, err, 1, false)
	idx := v.Index
	r = reopen(t, dir) // killed
	v, err = r.Serve(a)
	check("after kill -9", v, err, 3, true)
	r = reopen(t, dir) // killed before anybody could be told of state 3
	v, err = r.Serve(a)
	check("after kill -9 in the start", v, err, 5, true)
	w, err := r.Serve(b)
	check("another address", w, err, 1, false)
	for range 2 {
		if err := r.Stopped(idx); err != nil {
			t.Fatal(err)
		}
	}
	r = reopen(t, dir)
	v, err = r.Serve(a)
	check("after an orderly stop", v, err, 5, false)
	w, err = r.Serve(b)
	check("the other address was not stopped", w, err, 3, true)
	r = reopen(t, dir) // killed right after: the orderly stop before counts no longer
	v, err = r.Serve(a)
	check("killed after a start that followed an orderly stop", v, err, 7, true)
	v, err = r.Serve(a)
	check("served again by the same process without a stop", v, err, 9, true)

	v, err = r.BumpNSM(idx)
	check("bump", v, err, 11, false)
	for _, c := range []struct{ above, want uint32 }{{3, 13}, {13, 15}, {20, 21}, {41, 43}, {0, 45}} {
		v, err = r.RaiseNSM(idx, c.above)
		check("raise", v, err, c.want, false)
	}
	if v, err := r.RaiseNSM(idx, maxNSMState); err == nil {
		t.Errorf("a state above the highest: %+v", v)
	}
	r = reopen(t, dir)
	v, err = r.Serve(a)
	check("raised states are durable", v, err, 47, true)
	for _, err := range []error{r.Stopped(99), func() error { _, err := r.BumpNSM(99); return err }()} {
		if err == nil || err.Error() != "mgs: there is no VIP 99" {
			t.Errorf("unknown VIP: %v", err)
		}
	}
}

// A change that could not be stored must not be acted upon by the next one.
func TestNSMStateNotStored(t *testing.T) {
	dir := t.TempDir()
	r := reopen(t, dir)
	v, err := r.Serve(netip.MustParseAddr("192.0.2.1"))
	if err != nil {
		t.Fatal(err)
	}
	blocked := filepath.Join(dir, "registry.json.new")
	if err := os.Mkdir(blocked, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.Stopped(v.Index); err == nil {
		t.Error("Stopped succeeds without storing")
	}
	if _, err := r.BumpNSM(v.Index); err == nil {
		t.Error("BumpNSM succeeds without storing")
	}
	if got := r.VIPs()[0]; got.Clean || got.NSMState != 1 {
		t.Errorf("a change stays that was not stored: %+v", got)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	if v, err = reopen(t, dir).Serve(v.Addr); err != nil || !v.Crashed || v.NSMState != 3 {
		t.Errorf("after the failed Stopped: %+v, %v", v, err)
	}
}

func TestNSMStateOfOldFile(t *testing.T) {
	dir := t.TempDir()
	old := `{"format":1,"client":"00112233445566778899aabbccddeeff","generation":4,"next_index":2,
		"vips":[{"index":1,"addr":"192.0.2.1","epoch":6,"verifier":"0011223344556677"}]}`
	name := filepath.Join(dir, "registry.json")
	if err := os.WriteFile(name, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	v, err := reopen(t, dir).Serve(netip.MustParseAddr("192.0.2.1"))
	if err != nil || v.NSMState != 1 || !v.Crashed || v.Epoch != 7 || v.Index != 1 {
		t.Errorf("first service with NSM: %+v, %v", v, err)
	}
	for _, state := range []string{"2", "2147483649"} {
		if err := os.WriteFile(name, []byte(strings.Replace(old, `"epoch"`, `"nsm_state":`+state+`,"epoch"`, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "damaged NSM state "+state) {
			t.Errorf("state %s: %v", state, err)
		}
	}
}
