package sim

import (
	"flag"
	"maps"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
)

// tracing has all events of a run printed.
var tracing bool

var (
	simSeed  = flag.Uint64("sim.seed", 0, "run one seed, with -v with all its events")
	simRuns  = flag.Uint64("sim.runs", 0, "number of seeds")
	simTrace = flag.Bool("sim.trace", false, "print all events of named scenarios")
	simBase  = flag.Uint64("sim.base", 1, "first seed")
)

// TestMain has one goroutine run at a time, so that a seed gives nearly always the
// same run.
func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(1)
	os.Exit(m.Run())
}

// TestRandom runs clients and faults by chance and checks what clients were told,
// what is stored, and that everything comes to rest.
func TestRandom(t *testing.T) {
	if *simSeed != 0 {
		tracing = testing.Verbose()
		random(t, *simSeed)
		return
	}
	runs := *simRuns
	if runs == 0 {
		if runs = 2000; testing.Short() {
			runs = 80
		}
	}
	sum := map[string]int{}
	for i := range runs {
		for k, n := range random(t, *simBase+i) {
			sum[k] += n
		}
		if t.Failed() {
			break
		}
	}
	for _, k := range slices.Sorted(maps.Keys(sum)) {
		t.Logf("%6d %s", sum[k], k)
	}
}

func random(t *testing.T, seed uint64) map[string]int {
	cfg := defaultConfig()
	w := &world{seed: seed}
	rng := w.rand("config")
	cfg.fronts = 1 + rng.IntN(3)
	cfg.osts = 1 + rng.IntN(3)
	cfg.apart = rng.IntN(3) == 0
	cfg.vips = 1 + rng.IntN(3)
	if rng.IntN(2) == 0 {
		cfg.stripes = uint8(1 + rng.IntN(cfg.osts))
	}
	if rng.IntN(3) == 0 {
		// Pauses that are taken for harmless are to be shorter than a part of the window.
		cfg.registry = &registryConfig{startup: time.Duration(1+rng.IntN(5)) * time.Second, factor: 8 + rng.IntN(3)}
	}
	cfg.locks = w.rand("locks").IntN(2) == 0
	return simulate(t, seed, cfg, againRandom(seed), func(c *cluster) { schedule(c, everything, 60) })
}
