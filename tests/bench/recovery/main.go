// Recovery measures how long frontends wait for a metadata target that has crashed.
// The target keeps its store in memory and loses what frontends were told and it had
// not made durable; they replay all of it over TCP on the loopback interface.
// Everything runs in this process. Every run is checked: exactly what was answered is there.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ops := flag.String("ops", "100,1000,10000,100000", "numbers of operations to replay")
	clients := flag.String("clients", "1,4,16,64", "numbers of frontends that have made them")
	dead := flag.Bool("dead", false, "one of the frontends does not come back")
	window := flag.Duration("window", 15*time.Second, "recovery.window_min of the target")
	rounds := flag.Int("rounds", 3, "rounds; medians are printed")
	ahead := flag.Int("ahead", 0, "replays that a frontend may have unanswered; 0 for the default of the product")
	kill := flag.String("kill", "", "kill the target's node and measure from that until it serves on another one: process (connections are reset), power (it is silent), or both, separated by a comma; with one frontend dead and none, told by the registry and not")
	away := flag.Duration("away", 2*time.Second, "with -kill: the time until the target is started on the other node")
	factor := flag.Int("factor", 5, "with -kill: recovery.ir_factor")
	profile := flag.String("cpuprofile", "", "write a profile of the recoveries to this file")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	run := func() error {
		if *kill != "" {
			return killTable(ctx, os.Stdout, *ops, *clients, plan{window: *window, ahead: *ahead, kill: *kill, away: *away, factor: *factor}, *rounds, strings.Join(os.Args[1:], " "))
		}
		return table(ctx, os.Stdout, *ops, *clients, plan{dead: *dead, window: *window, ahead: *ahead}, *rounds, *profile)
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "recovery:", err)
		os.Exit(1)
	}
}

// numbers parses positive numbers separated by commas.
func numbers(s string) (l []int, err error) {
	for f := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(f)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("%q is not a positive number", f)
		}
		l = append(l, n)
	}
	return l, nil
}

// sizes reads the numbers of operations and of frontends.
func sizes(ops, clients string) (ns, ks []int, err error) {
	if ns, err = numbers(ops); err == nil {
		ks, err = numbers(clients)
	}
	return ns, ks, err
}

// table runs all combinations and writes a line for each.
func table(ctx context.Context, w io.Writer, ops, clients string, p plan, rounds int, profile string) error {
	ns, ks, err := sizes(ops, clients)
	if err != nil {
		return err
	}
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close()
		p.measured = func() func() {
			if err := pprof.StartCPUProfile(f); err != nil {
				fmt.Fprintln(os.Stderr, "recovery:", err)
			}
			return pprof.StopCPUProfile
		}
	}
	fmt.Fprintf(w, "Command: `go run ./tests/bench/recovery %s`; %s; %d CPUs; medians of %d rounds.\n\n",
		strings.Join(os.Args[1:], " "), time.Now().UTC().Format("2006-01-02 15:04 UTC"), runtime.NumCPU(), rounds)
	fmt.Fprintln(w, "| operations | frontends | open the store ms | all are served again ms | replays/s | CPU µs/replay |")
	fmt.Fprintln(w, "|---:|---:|---:|---:|---:|---:|")
	for _, n := range ns {
		for _, k := range ks {
			p.ops, p.clients = n, k
			var open, all, rate, cpu []float64
			for range rounds {
				r, err := p.run(ctx)
				if err != nil {
					return fmt.Errorf("%d operations of %d frontends: %w", n, k, err)
				}
				open, all = append(open, ms(r.opened)), append(all, ms(r.served))
				rate = append(rate, float64(r.replayed)/r.replay.Seconds())
				cpu = append(cpu, float64(r.cpu.Microseconds())/float64(r.replayed))
			}
			fmt.Fprintf(w, "| %d | %d | %.0f | %.0f | %.0f | %.0f |\n", n, k, median(open), median(all), median(rate), median(cpu))
		}
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median(v []float64) float64 {
	slices.Sort(v)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}
