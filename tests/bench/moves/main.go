// Moves measures how long clients wait when a floating address moves, in order and
// after a power cut, of baton and of others on the same bed: three machines on a
// bridge (namespaces), real Linux kernel clients, real keepalived and CTDB.
//
// Three kernel clients have mounted the address: a light one with one small call every
// 10 ms, a loaded one that writes with fsync and makes and removes names as fast as it
// can, and an idle one, which writes and makes a name when the move is over, and
// does nothing until then. A pause is the longest call of a client that was under way
// between the order to move (or the power cut) and the time at which each of its
// threads has done something that it began afterwards; of the idle client it is the
// longest of these calls, of which the first finds the connection. Wrong results are those of
// the loaded client's operations that show that one was not executed exactly once.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/moves/rig"
)

func main() {
	services := flag.String("services", strings.Join(rig.Compared, ","), "services, separated by commas")
	n := flag.Int("n", 50, "moves and power cuts of each row")
	conns := flag.String("conns", "1,500", "numbers of connections to the address: beside the kernel clients' this many less one of a load generator, each with a call twice a second")
	kinds := flag.String("kinds", "planned,crash", "what is measured")
	settle := flag.Duration("settle", 500*time.Millisecond, "time between everybody's going on and the next move")
	limit := flag.Duration("limit", 20*time.Second, "longest pause that is waited for; then all machines' sockets of the address are destroyed, so that the client gets on, and the pause counts as this long")
	clean := flag.Bool("clean", false, "destroy what machines without the address keep of its sockets before each move, as a script of the administrator's may")
	verbose := flag.Bool("v", false, "print each pause on standard error")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := table(ctx, os.Stdout, options{*services, *conns, *kinds, *n, *settle, *limit, *clean, *verbose})
	cancel()
	bed.Cleanup()
	if err != nil {
		fmt.Fprintln(os.Stderr, "moves:", err)
		os.Exit(1)
	}
}

type options struct {
	services, conns, kinds string
	n                      int
	settle, cap            time.Duration
	clean, verbose         bool
}

// patience is how long a client may be held up before the run fails.
const patience = 5 * time.Minute

// table measures all rows and writes each when it is complete.
func table(ctx context.Context, w io.Writer, o options) error {
	fmt.Fprintf(w, "Command: `go run ./tests/bench/moves %s`; %s; %d CPUs; load average %s. Pauses in ms, median / worst.\n\n",
		strings.Join(os.Args[1:], " "), time.Now().UTC().Format("2006-01-02 15:04 UTC"), runtime.NumCPU(), loadavg())
	fmt.Fprintln(w, "| service | move | moves | connections | idle client | light client | loaded client | the other connections | hung | wrong results |")
	fmt.Fprintln(w, "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
	for s := range strings.SplitSeq(o.services, ",") {
		for c := range strings.SplitSeq(o.conns, ",") {
			k, err := strconv.Atoi(c)
			if err != nil || k < 1 || k > 5000 {
				return fmt.Errorf("-conns: %q is not a number from 1 to 5000", c)
			}
			if err := run(ctx, w, o, s, k); err != nil {
				return fmt.Errorf("%s, %d connections: %w", s, k, err)
			}
		}
	}
	return nil
}

func loadavg() string {
	b, _ := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(b))
	if len(f) < 3 {
		return "unknown"
	}
	return strings.Join(f[:3], " ")
}

// pauses are those of one kind of move.
type pauses struct {
	idle, light, loaded, others []time.Duration

	hung  int // moves after which somebody waited until the limit
	wrong int // results that cannot be if each operation is executed once
}

func cell(d []time.Duration) string {
	if len(d) == 0 {
		return "–"
	}
	d = slices.Sorted(slices.Values(d))
	return fmt.Sprintf("%.0f / %.0f", (ms(d[(len(d)-1)/2])+ms(d[len(d)/2]))/2, ms(d[len(d)-1]))
}

// destroy destroys all TCP sockets of the address, but not those of a machine.
func destroy(ctx context.Context, net *rig.Net, a netip.Addr, but string) error {
	for _, m := range net.Machines {
		if b := m.Node(); b != nil && m.Name != but {
			if out, err := b.Run(ctx, "ss", "-K", "-n", "-t", "src", a.String()); err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
		}
	}
	return nil
}

// run measures one service with one number of connections.
func run(ctx context.Context, out io.Writer, o options, service string, conns int) error {
	scratch, err := bed.Scratch()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(scratch, "moves")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	a := rig.VIP(0)
	net, mover, err := rig.NewMover(service, filepath.Join(dir, "service"), a)
	if err != nil {
		return err
	}
	defer net.Close()
	short, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := mover.Start(short); err != nil {
		return err
	}
	defer mover.Stop(ctx)
	if err := net.Answers(short, a); err != nil {
		return err
	}
	cs := []rig.ClientConfig{{Name: "light", VIP: a, With: "light"}, {Name: "loaded", VIP: a, With: "seq,storm,storm"}, {Name: "idle", VIP: a, With: "idle"}}
	var clients []*rig.Client
	for i, c := range cs {
		c.Options, c.Seed, c.Flags = "vers=3,nolock", 1, "-lenient"
		cl, err := net.StartClient(short, i, filepath.Join(dir, c.Name), c)
		if err != nil {
			return err
		}
		defer cl.Kill()
		clients = append(clients, cl)
	}
	idle := clients[2]
	others, err := newOthers(short, net.Hub, a, conns-1)
	if err != nil {
		return err
	}
	defer others.close()

	name := mover.Name()
	if o.clean {
		name += ", stale sockets destroyed before"
	}
	results, seen := map[string]*pauses{}, 0
	measure := func(kind string, do func(ctx context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		time.Sleep(o.settle)
		if o.clean {
			if err := destroy(ctx, net, a, mover.Owner(a)); err != nil {
				return err
			}
		}
		t0 := time.Now()
		if err := do(ctx); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		t1 := time.Now()
		if err := idle.Rouse(); err != nil {
			return err
		}
		p := results[kind]
		if p == nil {
			p = &pauses{}
			results[kind] = p
		}
		// A connection that a machine has kept from an earlier time hangs the client.
		cut, stop := context.WithDeadline(ctx, t0.Add(o.cap))
		hung := false
		for _, c := range clients {
			hung = hung || c.Moving(cut, t1) != nil
		}
		_, err := others.longest(cut, t0, t1)
		hung = hung || err != nil || idle.Awake(cut) != nil
		stop()
		if hung {
			p.hung++
			if o.verbose {
				fmt.Fprintf(os.Stderr, "%s, %d connections, %s: somebody hangs; the machines' sockets are destroyed\n", mover.Name(), conns, kind)
			}
			if err := destroy(ctx, net, a, ""); err != nil {
				return err
			}
		}
		if err := idle.Awake(ctx); err != nil {
			return fmt.Errorf("%s: %w\n%s", kind, err, mover.Log())
		}
		var d [3]time.Duration
		for i, c := range clients {
			if err := c.Moving(ctx, t1); err != nil {
				return fmt.Errorf("%s: %w\n%s", kind, err, mover.Log())
			}
			op, err := c.Longest(t0, time.Now())
			if err != nil {
				return err
			}
			d[i] = min(op.Took, o.cap)
		}
		x, err := others.longest(ctx, t0, t1)
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		other := min(x.took, o.cap)
		wrong := 0
		for _, c := range clients {
			wrong += c.Wrong()
		}
		p.wrong += wrong - seen
		seen = wrong
		p.light, p.loaded, p.idle = append(p.light, d[0]), append(p.loaded, d[1]), append(p.idle, d[2])
		if conns > 1 {
			p.others = append(p.others, other)
		}
		if o.verbose {
			fmt.Fprintf(os.Stderr, "%s, %d connections, %s: took %v; idle %v, light %v, loaded %v, others %v\n", mover.Name(), conns, kind, t1.Sub(t0), d[2], d[0], d[1], other)
			if conns > 1 {
				fmt.Fprintf(os.Stderr, "the longest of the others: %s\n", x.tell(t0))
			}
			timeline(ctx, os.Stderr, mover, t0)
			for _, c := range clients {
				fmt.Fprintf(os.Stderr, "clock of %s: %v\n", c.Name, c.Ahead())
			}
		}
		return nil
	}
	for i := range o.n {
		for kind := range strings.SplitSeq(o.kinds, ",") {
			from := mover.Owner(a)
			rest := slices.DeleteFunc(mover.Nodes(), func(n string) bool { return n == from })
			to := rest[i%len(rest)]
			switch kind {
			case "planned":
				err = measure(kind, func(ctx context.Context) error { return mover.Move(ctx, a, to) })
			case "crash":
				err = measure(kind, func(ctx context.Context) error {
					if err := mover.Kill(ctx, from); err != nil {
						return err
					}
					return mover.TakeOver(ctx, a, to)
				})
				if err == nil {
					err = mover.Restart(ctx, from)
				}
			default:
				err = fmt.Errorf("-kinds: %q", kind)
			}
			if err != nil {
				return err
			}
		}
	}
	for kind := range strings.SplitSeq(o.kinds, ",") {
		p := results[kind]
		fmt.Fprintf(out, "| %s | %s | %d | %d | %s | %s | %s | %s | %d | %d |\n", name, kind, o.n, conns, cell(p.idle), cell(p.light), cell(p.loaded), cell(p.others), p.hung, p.wrong)
	}
	end, stop := context.WithTimeout(ctx, patience)
	defer stop()
	for _, c := range clients {
		if _, err := c.Finish(end); err != nil {
			return err
		}
	}
	return nil
}
