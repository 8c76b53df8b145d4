// Demo shows what a client notices when a floating address moves: three nodes in
// namespaces, a real Linux kernel client under load, a planned move, a power cut and a
// failback, as a timeline. It needs root, and leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/moves/rig"
)

func main() {
	service := flag.String("service", "baton", "what serves the address: "+strings.Join(rig.Names, ", "))
	verbose := flag.Bool("v", false, "show the events of each move")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := demo(ctx, os.Stdout, *service, *verbose)
	cancel()
	bed.Cleanup()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		if errors.Is(err, bed.ErrUnavailable) {
			fmt.Fprintln(os.Stderr, "demo: it needs root and the packages of tests/install.sh")
		}
		os.Exit(1)
	}
}

// timeline prints what happens, with the time since the beginning.
type timeline struct {
	w     io.Writer
	began time.Time
}

func (l *timeline) say(format string, args ...any) {
	fmt.Fprintf(l.w, "%7.2f s  %s\n", time.Since(l.began).Seconds(), fmt.Sprintf(format, args...))
}

// patience is how long a step may take.
const patience = 2 * time.Minute

// eventer is a service that tells what it did.
type eventer interface {
	Events(ctx context.Context) (string, error)
}

func demo(ctx context.Context, w io.Writer, service string, verbose bool) (err error) {
	scratch, err := bed.Scratch()
	if err != nil {
		return err
	}
	if err := os.Chmod(scratch, 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	l := &timeline{w, time.Now()}
	a := rig.VIP(0)
	net, mover, err := rig.NewMover(service, filepath.Join(scratch, "service"), a)
	if err != nil {
		return err
	}
	defer net.Close()
	if err := mover.Start(ctx); err != nil {
		return err
	}
	stopped := false
	defer func() {
		if !stopped {
			mover.Stop(context.WithoutCancel(ctx))
		}
	}()
	nodes := mover.Nodes()
	l.say("%s on the nodes %s; %s has %v", mover.Name(), strings.Join(nodes, ", "), mover.Owner(a), a)
	client, err := net.StartClient(ctx, 0, filepath.Join(scratch, "client"), rig.ClientConfig{
		Name: "client", VIP: a, With: "seq,storm,lock", Flags: "-counters /mnt/nfs/all/counter", Seed: 1,
	})
	if err != nil {
		return err
	}
	defer client.Kill()
	t0 := time.Now()
	if err := pause(ctx, client, 2*time.Second); err != nil {
		return err
	}
	if err := client.Moving(ctx, t0); err != nil {
		return err
	}
	o, err := client.Longest(t0, time.Now())
	if err != nil {
		return err
	}
	l.say("a Linux client has mounted it: writes with fsync, creates, renames, removes, counts under a lock")
	l.say("undisturbed: %.0f operations/s, the longest took %v", float64(client.Ops())/time.Since(t0).Seconds(), ms(o.Took))

	var worst time.Duration
	step := func(what string, do func(ctx context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		l.say("%s", what)
		t0 := time.Now()
		if err := do(ctx); err != nil {
			return err
		}
		t1 := time.Now()
		l.say("  %s serves it, %v later", mover.Owner(a), ms(t1.Sub(t0)))
		if err := client.Moving(ctx, t1); err != nil {
			return err
		}
		o, err := client.Longest(t0, time.Now())
		if err != nil {
			return err
		}
		worst = max(worst, o.Took)
		if e, ok := mover.(eventer); ok && verbose {
			if now, err := e.Events(ctx); err == nil {
				// Lines begin with their time.
				since := t0.UTC().Format("2006-01-02T15:04:05.000Z")
				for line := range strings.Lines(now) {
					if line >= since && line[0] >= '0' && line[0] <= '9' {
						fmt.Fprint(w, "             | ", line)
					}
				}
			}
		}
		l.say("  the client goes on; its longest stall: %v (%s)", ms(o.Took), o.Op)
		return pause(ctx, client, time.Second)
	}
	first := mover.Owner(a)
	rest := slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == first })
	second, third := rest[0], rest[1]
	if err := step(fmt.Sprintf("planned move: %s to %s", first, second), func(ctx context.Context) error { return mover.Move(ctx, a, second) }); err != nil {
		return err
	}
	if err := step("power cut of "+second, func(ctx context.Context) error {
		if err := mover.Kill(ctx, second); err != nil {
			return err
		}
		return mover.TakeOver(ctx, a, third)
	}); err != nil {
		return err
	}
	l.say("%s gets power again", second)
	if err := mover.Restart(ctx, second); err != nil {
		return err
	}
	if err := step("failback: "+mover.Owner(a)+" to "+second, func(ctx context.Context) error { return mover.Move(ctx, a, second) }); err != nil {
		return err
	}
	r, err := client.Finish(ctx)
	if err != nil {
		return err
	}
	p, err := rig.NewProbe(ctx, net.Hub, a)
	if err != nil {
		return err
	}
	_, sum, err := p.Counter("all/counter")
	p.Close()
	if err != nil {
		return err
	}
	if n := r.Counts["/mnt/nfs/all/counter"]; n != sum {
		return fmt.Errorf("the counter says %d, the client has counted to %d", sum, n)
	}
	stopped = true
	if err := mover.Stop(ctx); err != nil {
		return err
	}
	l.say("%d operations, no error, each done exactly once; all data compared; the counter is exact (%d)", client.Ops(), sum)
	l.say("the client's longest stall: %v", ms(worst))
	return nil
}

// pause lets the client work, which must find nothing wrong.
func pause(ctx context.Context, c *rig.Client, d time.Duration) error {
	select {
	case <-time.After(d):
		return c.Failed()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
