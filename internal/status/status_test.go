package status_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"math"
	"os"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/status/statustest"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("testdata/"+name, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", name, d)
	}
}

func TestText(t *testing.T) {
	s := statustest.Sample()
	s.Sort()
	var b bytes.Buffer
	if err := s.Text(&b, status.TextOptions{MaxClients: 2}); err != nil {
		t.Fatal(err)
	}
	golden(t, "status.txt", b.Bytes())

	b.Reset()
	if err := (&status.Status{Version: "1", Node: "n", Rpcbind: "off", DataDir: "/d", Stopping: true}).Text(&b, status.TextOptions{}); err != nil {
		t.Fatal(err)
	}
	golden(t, "empty.txt", b.Bytes())

	b.Reset()
	for _, v := range []bool{false, true} {
		if err := status.ExportsText(&b, s.Exports, v); err != nil {
			t.Fatal(err)
		}
	}
	if err := status.ExportsText(&b, nil, true); err != nil {
		t.Fatal(err)
	}
	golden(t, "exports.txt", b.Bytes())
}

func TestJSON(t *testing.T) {
	s := statustest.Sample()
	s.Sort()
	j, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "status.json", append(j, '\n'))
	var back status.Status
	if err := json.Unmarshal(j, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(*s, back); d != "" {
		t.Errorf("JSON does not read back:\n%s", d)
	}
}

func TestLocksText(t *testing.T) {
	var b bytes.Buffer
	l := statustest.Locks()
	lt := status.NewLocksText(&b)
	for _, page := range [][]status.Lock{l[:2], nil, l[2:]} {
		if err := lt.Add(page); err != nil {
			t.Fatal(err)
		}
	}
	if err := lt.End(); err != nil {
		t.Fatal(err)
	}
	for i := range l {
		b.WriteString(l[i].String() + "\n")
	}
	if err := errors.Join(status.NewLocksText(&b).End(), status.LockHostsText(&b, statustest.LockHosts()), status.LockHostsText(&b, nil)); err != nil {
		t.Fatal(err)
	}
	golden(t, "locks.txt", b.Bytes())
	// The JSON forms are documented; scripts rely on them.
	j, err := json.MarshalIndent(map[string]any{"locks": l, "hosts": statustest.LockHosts()}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "locks.json", append(j, '\n'))
}

func TestUnits(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 10240: "10.0 KiB", 1 << 20: "1.00 MiB",
		1<<20 - 1: "1.00 MiB", 123 << 30: "123 GiB", math.MaxUint64: "16.0 EiB"} {
		if got := status.Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-1: "0s", 0: "0s", time.Second: "1s", 61 * time.Second: "1m1s",
		3*time.Hour + 59*time.Minute: "3h59m", 50 * time.Hour: "2d2h"} {
		if got := status.Span(d); got != want {
			t.Errorf("Span(%v) = %s, want %s", d, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0", 0.04: "0.0", 9.94: "9.9", 1234567.4: "1,234,567"} {
		if got := status.PerSec(v); got != want {
			t.Errorf("PerSec(%v) = %s, want %s", v, got, want)
		}
	}
	for v, want := range map[float64]string{0: "-", 5: "5 us", 1500: "1.5 ms", 2e6: "2.0 s"} {
		if got := status.Micros(v); got != want {
			t.Errorf("Micros(%v) = %s, want %s", v, got, want)
		}
	}
}

func TestRate(t *testing.T) {
	var r status.Rate
	now := time.Unix(1000, 0)
	if v := r.Observe(now, 500); v != 0 {
		t.Errorf("first observation: %v", v)
	}
	for i := 1; i <= 60; i++ {
		now = now.Add(time.Second)
		r.Observe(now, 500+uint64(i)*100)
	}
	if v := r.Value(); math.Abs(v-100) > 1 {
		t.Errorf("steady 100/s: %v", v)
	}
	if v := r.Observe(now, 1e9); math.Abs(v-100) > 1 {
		t.Errorf("no time passed: %v", v)
	}
	now = now.Add(time.Second)
	if v := r.Observe(now, 3); v != 0 {
		t.Errorf("counter fell: %v", v)
	}
}

func TestSetRates(t *testing.T) {
	a, b := statustest.Sample(), statustest.Sample()
	b.Now = a.Now.Add(2 * time.Second)
	b.Targets[0].Ops += 10
	b.Addresses[0].Calls += 20
	b.Addresses[0].BytesIn += 2048
	b.Clients[0].Calls = 0 // restarted
	b.Procs[0].Calls += 4
	b.Procs[0].Time += 8 * time.Millisecond
	b.SetRates(a)
	for name, c := range map[string]struct{ got, want float64 }{
		"target":  {b.Targets[0].OpsPerSec, 5},
		"other":   {b.Targets[1].OpsPerSec, 0},
		"calls":   {b.Addresses[0].CallsPerSec, 10},
		"bytes":   {b.Addresses[0].BytesInPerSec, 1024},
		"client":  {b.Clients[0].CallsPerSec, 0},
		"proc":    {b.Procs[0].PerSec, 2},
		"mean":    {b.Procs[0].MeanMicro, 2000},
		"no mean": {b.Procs[1].MeanMicro, 0},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %v, want %v", name, c.got, c.want)
		}
	}
	c := *b
	c.SetRates(b) // no time between: unchanged
	if c.Targets[0].OpsPerSec != 5 {
		t.Error("rates changed without time")
	}
}
