package metrics

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/status/statustest"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	b, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	return w.Code, string(b)
}

func sample() *Collector {
	return NewCollector(func() status.Status { return *statustest.Sample() })
}

func TestMetricsGolden(t *testing.T) {
	h, err := Handler(Options{Collector: sample()})
	if err != nil {
		t.Fatal(err)
	}
	code, body := get(t, h, "/metrics")
	if code != 200 {
		t.Fatalf("code %d: %s", code, body)
	}
	var got bytes.Buffer
	for l := range strings.Lines(body) {
		if strings.Contains(l, "baton_") {
			got.WriteString(l)
		}
	}
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("testdata/metrics.txt", got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if !strings.Contains(body, "process_resident_memory_bytes") || !strings.Contains(body, "go_goroutines") {
		t.Error("process and Go metrics are missing")
	}
}

func TestHealthz(t *testing.T) {
	var result error
	h, err := Handler(Options{Collector: sample(), Probe: func(context.Context) error { return result }})
	if err != nil {
		t.Fatal(err)
	}
	if code, body := get(t, h, "/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("healthy: %d %q", code, body)
	}
	result = errors.New("mdt0: disk gone")
	if code, body := get(t, h, "/healthz"); code != 503 || body != "not healthy: mdt0: disk gone\n" {
		t.Errorf("sick: %d %q", code, body)
	}
	if code, _ := get(t, h, "/other"); code != 404 {
		t.Errorf("/other: %d", code)
	}
}

func TestHealthzHangingProbe(t *testing.T) {
	release := make(chan struct{})
	entered := make(chan struct{}, 10)
	h, err := Handler(Options{Collector: sample(), ProbeTimeout: 10 * time.Millisecond, Probe: func(context.Context) error {
		entered <- struct{}{}
		<-release
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if code, body := get(t, h, "/healthz"); code != 503 || !strings.Contains(body, "deadline") {
		t.Errorf("first: %d %q", code, body)
	}
	if code, body := get(t, h, "/healthz"); code != 503 || !strings.Contains(body, "earlier probe") {
		t.Errorf("second: %d %q", code, body)
	}
	if len(entered) != 1 {
		t.Errorf("%d probes run at once", len(entered))
	}
	close(release)
	for range 1000 {
		if code, _ := get(t, h, "/healthz"); code == 200 {
			return
		}
	}
	t.Error("does not recover")
}

func TestServer(t *testing.T) {
	for _, a := range []string{"0.0.0.0:0", "192.0.2.1:80", "host:1", ""} {
		if s, err := Start(Options{Address: a, Collector: sample()}); err == nil {
			s.Close()
			t.Errorf("address %q was accepted", a)
		}
	}
	s, err := Start(Options{Address: "127.0.0.1:0", Collector: sample(), Probe: func(context.Context) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.Get("http://" + s.Addr().String() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != 200 {
		t.Errorf("status %d", r.StatusCode)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := http.Get("http://" + s.Addr().String() + "/healthz"); err == nil {
		t.Error("serves after Close")
	}
}
