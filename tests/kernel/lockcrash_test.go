package kernel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/kernel/lockmsg"
)

// killServerWithLocks kills the server while two clients hold 500 locks and
// others wait for some of them. Everybody must keep what he has, and nobody
// get what another has, at any time.
func killServerWithLocks(t *testing.T, w *world, a, b *lockGuest) {
	const (
		each, procs  = 250, 5
		step, length = 200, 100
	)
	guests := []*lockGuest{a, b}
	holders := make([][]*lockFile, 2)
	var all []heldRange
	for i, g := range guests {
		for range procs {
			holders[i] = append(holders[i], g.owner(t, "").open("held"))
		}
		for k := range each {
			start := int64(2*k+i) * step
			typ := wr
			if k%10 == 9 {
				typ = rd
			}
			holders[i][k%procs].get(typ, start, length)
			all = append(all, heldRange{typ, start, start + length - 1})
		}
	}
	// Waiters want what the other client has.
	type waiter struct {
		f *lockFile
		c *call
	}
	var waiters []waiter
	for i, g := range guests {
		for k := range 4 {
			f := g.owner(t, "").open("held")
			waiters = append(waiters, waiter{f, f.queued(wr, int64(2*(10+k)+1-i)*step, length)})
		}
	}
	// Somebody else tries to get every range of the other client, all the time.
	var probers []*owner
	var probes []*call
	for i, g := range guests {
		o := g.owner(t, "")
		probers = append(probers, o)
		probes = append(probes, o.open("held").do(lockmsg.Request{Op: lockmsg.OpProbe, Start: int64(1-i) * step, Step: 2 * step, Len: length, N: each}))
	}
	// pass waits until each prober has tried every range once more.
	pass := func() {
		t.Helper()
		for i, o := range probers {
			n := o.start(lockmsg.Request{Op: lockmsg.OpProgress}).ok().N
			for end := time.Now().Add(2 * patience); o.start(lockmsg.Request{Op: lockmsg.OpProgress}).ok().N < n+each+1; time.Sleep(50 * time.Millisecond) {
				if probes[i].ended() {
					t.Fatalf("%v: %+v", probes[i], probes[i].reply())
				}
				if time.Now().After(end) {
					t.Fatalf("prober of %s makes no progress", o.g.name)
				}
			}
		}
	}
	pass()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	// The second crash comes amid the recovery from the first.
	for i := range 2 {
		w.restart(ctx, t, i)
		if i == 0 {
			time.Sleep(700 * time.Millisecond)
		}
	}
	pass()
	// Until all are confirmed.
	for end := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		es, err := w.lockTable(ctx)
		if errors.Is(err, errNoTable) {
			t.Logf("not checked: %v", err)
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		n := map[string]int{}
		for _, e := range es {
			n[e.State]++
		}
		if n["granted"] == 2*each && n["unconfirmed"] == 0 {
			t.Logf("lock table: %v", n)
			break
		}
		if time.Now().After(end) {
			t.Fatalf("lock table: %v, want %d granted", n, 2*each)
		}
	}
	pass()
	for i, o := range probers {
		o.start(lockmsg.Request{Op: lockmsg.OpStop}).ok()
		r := probes[i].ok()
		if len(r.Times) > 0 {
			t.Errorf("%s got %d locks that the other client holds, ranges %v", o.g.name, len(r.Times), r.Times[:min(10, len(r.Times))])
		}
		t.Logf("%s tried %d times", o.g.name, r.N)
	}
	// F_GETLK sees them all, whoever asks.
	for _, g := range guests {
		if got, want := g.owner(t, "").open("held").lockMap(), mapString(slices.Clone(all)); got != want {
			t.Errorf("%s sees\n%s\nwant\n%s", g.name, got, want)
		}
	}
	for _, x := range waiters {
		if x.c.ended() {
			t.Fatalf("%v: %+v", x.c, x.c.reply())
		}
	}
	// The holders give everything back without an error, and the waiters get theirs.
	for i := range holders {
		for k := range each {
			holders[i][k%procs].get(un, int64(2*k+i)*step, length)
		}
	}
	for _, x := range waiters {
		x.c.ok()
		x.f.get(un, 0, 0)
	}
	a.owner(t, "").open("held").get(wr, 0, 0)
}

// restart kills the server and starts it again, with a check of the store
// between.
func (w *world) restart(ctx context.Context, t *testing.T, i int) {
	t.Helper()
	if err := w.srv.Kill9(); err != nil {
		t.Fatal(err)
	}
	if c, ok := w.srv.(bed.Checker); ok {
		if err := c.Check(ctx); err != nil {
			t.Fatalf("after kill %d: %v", i+1, err)
		}
	}
	if err := w.srv.Start(ctx); err != nil {
		t.Fatalf("restart %d: %v", i+1, err)
	}
}

// counter has two clients increment a number in a file under a lock while the
// server is killed again and again. No increment may be lost, and none be done
// twice. This needs more than the locks: what is written under one must be
// seen under the next.
func counter(t *testing.T, w *world, a, b *lockGuest) {
	kills := 20
	if testing.Short() {
		kills = 5
	}
	if s := os.Getenv("BATON_KILLS"); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil || kills < 1 {
			t.Fatalf("BATON_KILLS=%q", s)
		}
	}
	r := rand.New(rand.NewPCG(lockSeed(t), 9))
	var owners []*owner
	var counts []*call
	for _, g := range []*lockGuest{a, b} {
		// Who waits gets a lock that was lost only when his client asks again;
		// who tries gets it at once.
		for _, wait := range []bool{true, false} {
			o := g.owner(t, "")
			owners = append(owners, o)
			counts = append(counts, o.open("counter").do(lockmsg.Request{Op: lockmsg.OpCount, Wait: wait, HoldNs: int64(15 * time.Millisecond)}))
		}
	}
	progress := func() (n []int64) {
		for i, o := range owners {
			if counts[i].ended() {
				t.Fatalf("%v: %+v", counts[i], counts[i].reply())
			}
			n = append(n, o.start(lockmsg.Request{Op: lockmsg.OpProgress}).ok().N)
		}
		return n
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(kills)*20*time.Second+time.Minute)
	defer cancel()
	var worst time.Duration
	for i := range kills {
		// Most kills meet running clients, some meet their recovery.
		if i%4 != 3 {
			before, start := progress(), time.Now()
			for {
				now := progress()
				moving := 0
				for k := range now {
					if now[k] > before[k] {
						moving++
					}
				}
				if moving == len(now) {
					break
				}
				if time.Since(start) > patience {
					t.Fatalf("after kill %d: increments went from %d to %d in %v\n%s", i, before, now, patience, w.showLocks())
				}
				time.Sleep(20 * time.Millisecond)
			}
			worst = max(worst, time.Since(start))
		}
		if i%7 == 2 {
			// One has the lock from before the crash until the others have long been
			// back: had he lost it, he would now overwrite what they count.
			owners[r.IntN(len(owners))].start(lockmsg.Request{Op: lockmsg.OpHold, HoldNs: int64(8 * time.Second)}).ok()
		}
		time.Sleep(time.Duration(r.IntN(600)) * time.Millisecond)
		w.restart(ctx, t, i)
	}
	// All go on after the last one.
	before := progress()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		now, stuck := progress(), false
		for k := range now {
			stuck = stuck || now[k] == before[k]
		}
		if !stuck {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after the last kill: increments went from %d to %d\n%s", before, now, w.showLocks())
		}
	}
	total := int64(0)
	for i, o := range owners {
		o.start(lockmsg.Request{Op: lockmsg.OpStop}).ok()
		n := counts[i].ok().N
		t.Logf("%s incremented %d times", o.g.name, n)
		total += n
	}
	for _, g := range []*lockGuest{a, b} {
		got := strings.TrimLeft(strings.TrimSpace(g.sh(t, "echo 3 >/proc/sys/vm/drop_caches; cat counter")), "0")
		if got != fmt.Sprint(total) {
			t.Errorf("%s reads %q, want %d", g.name, got, total)
		}
	}
	t.Logf("%d kills, %d increments by %d processes; all went on within %.1f s at worst", kills, total, len(owners), worst.Seconds())
}

// rebootClient crashes a client that holds locks. They stay until it boots again
// and says so; then they are free, and nobody else's are.
func rebootClient(t *testing.T, w *world, a, b *lockGuest) {
	ha, ha2 := a.owner(t, ""), a.owner(t, "")
	fa, fa2 := ha.open("reboot"), ha2.open("reboot")
	fa.get(wr, 0, 100)
	fa2.get(rd, 200, 0)
	holder, waiter, spy := b.owner(t, "").open("reboot"), b.owner(t, "").open("reboot"), b.owner(t, "").open("reboot")
	holder.get(wr, 100, 50)
	// A waiting request dies with the client as well.
	fa.lock(wr, 120, 1, true)
	c := waiter.queued(wr, 50, 10)
	before := nsmState(t, a.state)
	a.m.Kill()
	time.Sleep(time.Second)
	if c.ended() {
		t.Fatal("the locks of a crashed client were given away before it came back")
	}
	spy.denied(wr, 0, 10)
	a = w.lockClient(t, a.i, "vers=3", a.state)
	if now := nsmState(t, a.state); now <= before || now%2 != 1 {
		t.Fatalf("the client's state number went from %d to %d: no reboot", before, now)
	}
	c.ok()
	spy.wantMap("W 50-59, W 100-149")
	fn := a.owner(t, "").open("reboot")
	fn.denied(wr, 100, 50)
	fn.get(wr, 0, 50)
	holder.get(un, 100, 50)
	fn.get(wr, 60, 0)
	spy.denied(wr, 130, 1)
	fn.close()
	a.quit(t)
}
