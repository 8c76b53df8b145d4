package mgs

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var ctx = context.Background()

func TestRegistrySurvivesReopen(t *testing.T) {
	dir := t.TempDir()
	r, err := Open(dir, FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	id, gen, err := r.StartClient(ctx, "")
	if err != nil || gen != 1 {
		t.Fatalf("first start: generation %d, %v", gen, err)
	}
	a, b := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")
	va, err := r.Serve(ctx, a, "")
	if err != nil {
		t.Fatal(err)
	}
	vb, err := r.Serve(ctx, b, "")
	if err != nil {
		t.Fatal(err)
	}
	if va.Index == vb.Index || va.VerifierBytes() == vb.VerifierBytes() || va.Epoch != 1 {
		t.Fatalf("VIPs not distinct: %+v %+v", va, vb)
	}

	r, err = Open(dir, FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	id2, gen2, err := r.StartClient(ctx, "")
	if err != nil || id2 != id || gen2 != 2 {
		t.Fatalf("second start: same id %v, generation %d, %v", id2 == id, gen2, err)
	}
	va2, err := r.Serve(ctx, a, "")
	if err != nil || va2.Index != va.Index || va2.Epoch != 2 || va2.Verifier != va.Verifier {
		t.Fatalf("after reopen: %+v, want index and verifier of %+v and epoch 2 (%v)", va2, va, err)
	}
	vs, err := r.NewVerifiers(ctx, "")
	if err != nil || len(vs) != 2 || vs[0].Verifier == va.Verifier || vs[1].Verifier == vb.Verifier {
		t.Fatalf("verifiers did not change: %+v %v", vs, err)
	}
	r, err = Open(dir, FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := vips(t, r); got[0].Verifier != vs[0].Verifier {
		t.Fatal("the new verifier was not durable")
	}
}

func TestDamagedRegistryIsRefused(t *testing.T) {
	const id = `"client":"00112233445566778899aabbccddeeff","generation":4,`
	vip := func(v string) string { return `{"format":2,` + id + `"next_index":3,"vips":[` + v + `]}` }
	const good = `"epoch":6,"verifier":"0011223344556677","nsm_state":1`
	for _, content := range []string{
		"", "{", `{"format":1,"client":"zz"}`, `{"format":9}`, `{"format":0}`, `{"format":1,"client":"0011"}`,
		`{"format":1,` + id + `"next_index":0}`, `{"format":1,` + id + `"next_index":1,"osts":-1}`, `{"format":1,` + id + `"next_index":1,"more":1}`,
		`{"format":1,` + id + `"next_index":1} {}`,
		`{"format":2,` + id + `"next_index":1,"made":["b","a"]}`, `{"format":2,` + id + `"next_index":1,"made":[""]}`,
		`{"format":2,` + id + `"next_index":1,"agreed":{"":"x"}}`,
		vip(`{"index":0,"addr":"192.0.2.1",` + good + `}`), vip(`{"index":3,"addr":"192.0.2.1",` + good + `}`),
		vip(`{"index":1,"addr":"192.0.2.1",` + good + `},{"index":2,"addr":"192.0.2.1",` + good + `}`),
		vip(`{"index":2,"addr":"192.0.2.1",` + good + `},{"index":1,"addr":"192.0.2.2",` + good + `}`),
		vip(`{"index":1,"addr":"",` + good + `}`), vip(`{"index":1,"addr":"224.0.0.1",` + good + `}`), vip(`{"index":1,"addr":"0.0.0.0",` + good + `}`),
		vip(`{"index":1,"addr":"192.0.2.1","epoch":0,"verifier":"0011223344556677","nsm_state":1}`),
		vip(`{"index":1,"addr":"192.0.2.1","epoch":1,"verifier":"00112233","nsm_state":1}`),
		vip(`{"index":1,"addr":"192.0.2.1","node":"a b",` + good + `}`),
		`{"format":2,` + id + `"next_index":1,"clients":{"n1":{"id":"00","generation":1}}}`,
		`{"format":2,` + id + `"next_index":1,"clients":{"":{"id":"00112233445566778899aabbccddeeff","generation":1}}}`,
		`{"format":2,` + id + `"next_index":1,"sessions":{"n1":[{"id":"x","seq":1,"reply":{}}]}}`,
		`{"format":2,` + id + `"next_index":1,"sessions":{"n1":[{"id":"0011223344556677","seq":1}]}}`,
		strings.Repeat(" ", maxDocument+1),
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "registry.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(dir, FileOptions{})
		if err == nil || !strings.Contains(err.Error(), "mgs:") {
			t.Errorf("content %.200q: error %v", content, err)
		}
	}
}

func vips(t *testing.T, r Registry) []VIP {
	t.Helper()
	l, err := r.VIPs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// reopen is what a start after kill -9 finds.
func reopen(t *testing.T, dir string) *File {
	t.Helper()
	r, err := Open(dir, FileOptions{})
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
	v, err := r.Serve(ctx, a, "")
	check("first service", v, err, 1, false)
	idx := v.Index
	r = reopen(t, dir) // killed
	v, err = r.Serve(ctx, a, "")
	check("after kill -9", v, err, 3, true)
	r = reopen(t, dir) // killed before anybody could be told of state 3
	v, err = r.Serve(ctx, a, "")
	check("after kill -9 in the start", v, err, 5, true)
	w, err := r.Serve(ctx, b, "")
	check("another address", w, err, 1, false)
	for range 2 {
		if err := r.Stopped(ctx, idx, v.Epoch); err != nil {
			t.Fatal(err)
		}
	}
	r = reopen(t, dir)
	v, err = r.Serve(ctx, a, "")
	check("after an orderly stop", v, err, 5, false)
	w, err = r.Serve(ctx, b, "")
	check("the other address was not stopped", w, err, 3, true)
	r = reopen(t, dir) // killed right after: the orderly stop before counts no longer
	v, err = r.Serve(ctx, a, "")
	check("killed after a start that followed an orderly stop", v, err, 7, true)
	v, err = r.Serve(ctx, a, "")
	check("served again by the same process without a stop", v, err, 9, true)

	v, err = r.RaiseNSM(ctx, idx, v.Epoch, 0)
	check("bump", v, err, 11, false)
	for _, c := range []struct{ above, want uint32 }{{3, 13}, {13, 15}, {20, 21}, {41, 43}, {0, 45}} {
		v, err = r.RaiseNSM(ctx, idx, v.Epoch, c.above)
		check("raise", v, err, c.want, false)
	}
	if v, err := r.RaiseNSM(ctx, idx, v.Epoch, maxNSMState); err == nil {
		t.Errorf("a state above the highest: %+v", v)
	}
	r = reopen(t, dir)
	v, err = r.Serve(ctx, a, "")
	check("raised states are durable", v, err, 47, true)
	for _, err := range []error{r.Stopped(ctx, 99, 1), func() error { _, err := r.RaiseNSM(ctx, 99, 1, 0); return err }()} {
		if err == nil || err.Error() != "mgs: there is no VIP 99" {
			t.Errorf("unknown VIP: %v", err)
		}
	}
}

// A change that could not be stored must not be acted upon by the next one.
func TestNSMStateNotStored(t *testing.T) {
	dir := t.TempDir()
	r := reopen(t, dir)
	v, err := r.Serve(ctx, netip.MustParseAddr("192.0.2.1"), "")
	if err != nil {
		t.Fatal(err)
	}
	blocked := filepath.Join(dir, "registry.json.new")
	if err := os.Mkdir(blocked, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.Stopped(ctx, v.Index, v.Epoch); err == nil {
		t.Error("Stopped succeeds without storing")
	}
	if _, err := r.RaiseNSM(ctx, v.Index, v.Epoch, 0); err == nil {
		t.Error("RaiseNSM succeeds without storing")
	}
	if got := vips(t, r)[0]; got.Clean || got.NSMState != 1 {
		t.Errorf("a change stays that was not stored: %+v", got)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	if v, err = reopen(t, dir).Serve(ctx, v.Addr, ""); err != nil || !v.Crashed || v.NSMState != 3 {
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
	v, err := reopen(t, dir).Serve(ctx, netip.MustParseAddr("192.0.2.1"), "")
	if err != nil || v.NSMState != 1 || !v.Crashed || v.Epoch != 7 || v.Index != 1 {
		t.Errorf("first service with NSM: %+v, %v", v, err)
	}
	for _, state := range []string{"2", "2147483649"} {
		if err := os.WriteFile(name, []byte(strings.Replace(old, `"epoch"`, `"nsm_state":`+state+`,"epoch"`, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, FileOptions{}); err == nil || !strings.Contains(err.Error(), "damaged NSM state "+state) {
			t.Errorf("state %s: %v", state, err)
		}
	}
}

// What a node that is alone writes is what earlier programs read and wrote, to
// the byte.
func TestFormatOfANodeThatIsAlone(t *testing.T) {
	dir := t.TempDir()
	r, err := Open(dir, FileOptions{Rand: &counter{}})
	if err != nil || !r.Fresh() {
		t.Fatal(err)
	}
	if _, _, err := r.StartClient(ctx, ""); err != nil {
		t.Fatal(err)
	}
	content := func() string {
		b, err := os.ReadFile(filepath.Join(dir, FileName))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got, want := content(), `{
  "format": 1,
  "client": "0102030405060708090a0b0c0d0e0f10",
  "generation": 1,
  "next_index": 1,
  "vips": null
}
`; got != want {
		t.Errorf("after the first start:\n%s", got)
	}
	v, err := r.Serve(ctx, netip.MustParseAddr("192.0.2.1"), "")
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.Serve(ctx, netip.MustParseAddr("2001:db8::1"), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.SetOSTs(ctx, 2), r.Stopped(ctx, v.Index, v.Epoch), r.SetOSTs(ctx, 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.NewVerifiers(ctx, "", w.Index); err != nil {
		t.Fatal(err)
	}
	want := `{
  "format": 1,
  "client": "0102030405060708090a0b0c0d0e0f10",
  "generation": 1,
  "next_index": 3,
  "vips": [
    {
      "index": 1,
      "addr": "192.0.2.1",
      "epoch": 1,
      "verifier": "1112131415161718",
      "nsm_state": 1,
      "clean": true
    },
    {
      "index": 2,
      "addr": "2001:db8::1",
      "epoch": 1,
      "verifier": "2122232425262728",
      "nsm_state": 1
    }
  ],
  "osts": 2
}
`
	if got := content(); got != want {
		t.Errorf("in the end:\n%s", got)
	}
	// And a reader that changes nothing leaves it alone.
	if r = reopen(t, dir); r.Fresh() {
		t.Error("fresh although there is a file")
	}
	if err := r.Stopped(ctx, v.Index, v.Epoch); err != nil || content() != want {
		t.Errorf("%v\n%s", err, content())
	}
	if n, err := r.OSTs(ctx); n != 2 || err != nil {
		t.Error(n, err)
	}
}

// A node that was alone becomes the first of a cluster: its addresses keep index,
// epoch, verifier and NSM state, and anybody may serve them next.
func TestFromOneNodeToACluster(t *testing.T) {
	dir := t.TempDir()
	addr := netip.MustParseAddr("192.0.2.1")
	r := reopen(t, dir)
	id, _, err := r.StartClient(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	old, err := r.Serve(ctx, addr, "")
	if err != nil {
		t.Fatal(err)
	}
	r = reopen(t, dir)
	other, gen, err := r.StartClient(ctx, "n1")
	if err != nil || other == id || gen != 1 {
		t.Errorf("%v, generation %d, %v", other == id, gen, err)
	}
	v, err := r.Serve(ctx, addr, "n1")
	if err != nil || v.Index != old.Index || v.Epoch != old.Epoch+1 || v.Verifier != old.Verifier || !v.Crashed || v.NSMState != 3 || v.Node != "n1" {
		t.Errorf("%+v after %+v, %v", v, old, err)
	}
	b, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil || !bytes.Contains(b, []byte(`"format": 2`)) {
		t.Errorf("%v\n%s", err, b)
	}
	// Nor may the node that was alone take it back under n1.
	var e *Error
	if _, err := reopen(t, dir).Serve(ctx, addr, ""); !errors.As(err, &e) || e.Code != CodeServed || e.Node != "n1" {
		t.Error(err)
	}
}

func TestDirectoryOfTheRegistryIsMissing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "shared")
	if _, err := Open(dir, FileOptions{}); err == nil || !strings.Contains(err.Error(), "mount its disk") {
		t.Error(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, FileOptions{}); err == nil || !strings.Contains(err.Error(), "is none") {
		t.Error(err)
	}
}

// Without the right to the directory nothing is read or written.
func TestGuard(t *testing.T) {
	dir := t.TempDir()
	lost := errors.New("taken over by n2")
	var guard error
	r, err := Open(dir, FileOptions{Guard: func() error { return guard }})
	if err != nil {
		t.Fatal(err)
	}
	v, err := r.Serve(ctx, netip.MustParseAddr("192.0.2.1"), "n1")
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil {
		t.Fatal(err)
	}
	guard = lost
	_, err = r.VIPs(ctx)
	for _, err := range []error{err, r.Stopped(ctx, v.Index, v.Epoch), r.SetOSTs(ctx, 7)} {
		if !errors.Is(err, ErrFenced) || !errors.Is(err, lost) {
			t.Error(err)
		}
	}
	if after, err := os.ReadFile(filepath.Join(dir, FileName)); err != nil || !bytes.Equal(before, after) {
		t.Errorf("%v\n%s", err, after)
	}
	// It may be lost between reading and writing.
	guard = nil
	if err := r.update(ctx, func(s *state) error { guard = lost; return s.setOSTs(7) }); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, FileName)); err != nil || !bytes.Equal(before, after) {
		t.Errorf("%v\n%s", err, after)
	}
}
