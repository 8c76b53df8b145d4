package main

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// TestSmoke runs every row and a little of the scaling, briefly, against baton
// and, if it is installed, Ganesha in both ways: the figures mean nothing, but every
// operation of the benchmark is checked.
func TestSmoke(t *testing.T) {
	if os.Getenv("BATON_KERNEL") != "1" {
		t.Skip("SKIPPED, reason: the benchmark's smoke test runs only with BATON_KERNEL=1 (make test)")
	}
	n, err := bed.NewNode("probe")
	bed.Need(t, err)
	n.Close()
	o := options{rounds: 1, seconds: 100 * time.Millisecond, rows: strings.Split(rowKeys(), ","), concs: []string{"1", "32", "4x16"}, scale: []int{1000, 5000}, held: 2500}
	if s := os.Getenv("BATON_BENCH_SERVERS"); s != "" {
		o.servers = strings.Split(s, ",")
	} else {
		o.servers = []string{batonServer}
		if _, err := bed.LookPath("ganesha.nfsd"); err == nil {
			o.servers = append(o.servers, ganeshaServer, dirsyncServer)
		}
	}
	logTo = testLog{t}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	r, err := run(ctx, o)
	bed.Need(t, err)
	for _, n := range r.Notes {
		t.Log("SKIPPED, reason: " + n)
	}
	want := 0
	for _, row := range rows {
		for range row.concs {
			for _, s := range o.servers {
				if row.nlm && (s == dirsyncServer || noNLM(r, s)) {
					continue
				}
				if s != dirsyncServer || row.metadata {
					want += len(row.names)
				}
			}
		}
	}
	if len(r.Results) != want {
		t.Errorf("%d results, want %d", len(r.Results), want)
	}
	for _, x := range r.Results {
		if len(x.Rate) != 1 || x.Rate[0] <= 0 {
			t.Errorf("%s, %s outstanding, %s: rates %v", x.Row, x.Conc, x.Server, x.Rate)
		}
	}
	var b strings.Builder
	r.markdown(&b, o.servers)
	t.Logf("\n%s", b.String())
	if out, err := exec.Command("ip", "netns", "list").CombinedOutput(); err == nil && slices.Contains(strings.Fields(string(out)), "probe") {
		t.Errorf("a node left a named namespace: %s", out)
	}
}

// TestSmokeNodes runs some rows against baton on several nodes.
func TestSmokeNodes(t *testing.T) {
	if os.Getenv("BATON_KERNEL") != "1" {
		t.Skip("SKIPPED, reason: the benchmark's smoke test runs only with BATON_KERNEL=1 (make test)")
	}
	n, err := bed.NewNode("probe")
	bed.Need(t, err)
	n.Close()
	logTo = testLog{t}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	o := options{rounds: 1, seconds: 50 * time.Millisecond, rows: []string{"filesync", "crwrite", "names", "nlm"}, concs: []string{"1", "4x16"}, servers: []string{nodesServer, plainServer}}
	r, err := run(ctx, o)
	bed.Need(t, err)
	if want := 2 * 2 * (1 + 1 + 3 + 2); len(r.Results) != want {
		t.Errorf("%d results, want %d", len(r.Results), want)
	}
	for _, x := range r.Results {
		if len(x.Rate) != 1 || x.Rate[0] <= 0 {
			t.Errorf("%s, %s outstanding, %s: rates %v", x.Row, x.Conc, x.Server, x.Rate)
		}
	}
}

// noNLM tells whether the report says that a server has no lock manager.
func noNLM(r *report, server string) bool {
	return slices.ContainsFunc(r.Notes, func(n string) bool { return strings.HasPrefix(n, server+" has no lock manager") })
}

func TestReport(t *testing.T) {
	r := report{Rounds: 3, Results: []*result{
		{Row: "B", Conc: "1", Server: batonServer, Unit: "ops/s", Rate: []float64{3, 1, 2}, CPU: []float64{1, 2, 3}, order: 1},
		{Row: "B", Conc: "1", Server: ganeshaServer, Unit: "ops/s", Rate: []float64{4, 4, 9}, CPU: []float64{5}, order: 1},
		{Row: "A", Conc: "1", Server: batonServer, Unit: "MB/s", Rate: []float64{1234.4, 1234.4}, CPU: []float64{50}, order: 0},
	}}
	var b strings.Builder
	r.markdown(&b, []string{batonServer, ganeshaServer})
	for _, want := range []string{"| A (MB/s) | 1 | 1,234 | - | - | 50.0 | - |\n| B (ops/s) | 1 | 2.00 | 4.00 | 0.50 | 2.00 | 5.00 |"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("report lacks %q:\n%s", want, b.String())
		}
	}
}
