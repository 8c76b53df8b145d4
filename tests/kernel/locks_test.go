package kernel

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/kernel/lockmsg"
)

// lockServerEnv chooses another server for the lock suite than for the others;
// "ganesha" checks the suite itself.
const lockServerEnv = "BATON_LOCK_SERVER"

// lockWorld starts a server that gives locks, and two clients of it.
func lockWorld(t *testing.T) (w *world, a, b *lockGuest) {
	t.Helper()
	name := bed.ServerName()
	if s := os.Getenv(lockServerEnv); s != "" {
		name = s
	}
	w = newWorldOf(t, name, bed.Config{Locks: true})
	return w, w.lockClient(t, 0, "vers=3", bed.Dir(t)), w.lockClient(t, 1, "vers=3", bed.Dir(t))
}

func lockSeed(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("BATON_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("BATON_SEED=%d", seed)
	return seed
}

// TestLocks has two kernels lock files of one server.
func TestLocks(t *testing.T) {
	w, a, b := lockWorld(t)
	t.Run("two-clients", func(t *testing.T) { twoClients(t, a, b) })
	t.Run("ranges", func(t *testing.T) { ranges(t, a, b) })
	t.Run("edge", func(t *testing.T) { edge(t, a, b) })
	t.Run("random-ranges", func(t *testing.T) { randomRanges(t, a, b) })
	t.Run("hand-over", func(t *testing.T) { handOver(t, w, a, b) })
	t.Run("queue", func(t *testing.T) { queue(t, a, b) })
	t.Run("cancel", func(t *testing.T) { cancelWaiting(t, a, b) })
	t.Run("deadlock", func(t *testing.T) { deadlock(t, a, b) })
	t.Run("kill-holder", func(t *testing.T) { killHolder(t, a, b) })
	t.Run("flock", func(t *testing.T) { flocks(t, a, b) })
	t.Run("mount-options", func(t *testing.T) { lockOptions(t, a, b) })
	t.Run("server-kill-500", func(t *testing.T) { killServerWithLocks(t, w, a, b) })
	t.Run("counter", func(t *testing.T) { counter(t, w, a, b) })
	gone := false
	t.Run("client-reboot", func(t *testing.T) {
		gone = true
		rebootClient(t, w, a, b)
	})
	if !gone {
		a.quit(t)
	}
	b.quit(t)
}

// twoClients: what conflicts, what F_GETLK tells, what gives locks back.
func twoClients(t *testing.T, a, b *lockGuest) {
	oa, oa2, ob, ob2 := a.owner(t, ""), a.owner(t, ""), b.owner(t, ""), b.owner(t, "")
	fa, fa2, fb, fb2 := oa.open("two"), oa2.open("two"), ob.open("two"), ob2.open("two")

	// Shared with shared, and neither with exclusive.
	fa.get(rd, 0, 100)
	fb.get(rd, 50, 100)
	fb.denied(wr, 0, 10)
	fa.denied(wr, 140, 20)
	fb2.denied(wr, 0, 0)
	fa2.denied(wr, 0, 0)
	fb2.get(rd, 0, 0)
	fb2.get(un, 0, 0)
	// Beside a lock there is room.
	fa.get(wr, 150, 10)
	fb.denied(rd, 159, 1)
	fb.get(wr, 160, 1)

	// The holder and its range.
	if r := fb.test(rd, 0, 0); r.Type != wr || r.Start != 150 || r.Len != 10 {
		t.Errorf("holder of %+v, want the exclusive lock 150+10", r)
	}
	if r := fb2.test(wr, 0, 40); r.Type != rd || r.Start != 0 || r.Len != 100 {
		t.Errorf("holder of %+v, want the shared lock 0+100", r)
	}
	if r := fa2.test(rd, 150, 1); r.Type != wr || r.Pid != oa.pid {
		t.Errorf("holder %+v, want process %d of the same client", r, oa.pid)
	}
	if r := fb.test(rd, 200, 100); r.Type != un {
		t.Errorf("holder %+v of a free range", r)
	}
	if r := fa.test(wr, 150, 10); r.Type != un {
		t.Errorf("a process is in its own way: %+v", r)
	}
	// The number of a remote holder says nothing but who is the same.
	fa2.get(wr, 300, 1)
	fa2.get(wr, 302, 1)
	p1, p2, p3 := fb.test(wr, 150, 1).Pid, fb.test(wr, 300, 1).Pid, fb.test(wr, 302, 1).Pid
	if p1 == p2 || p2 != p3 {
		t.Errorf("holders of two processes: %d; %d, %d", p1, p2, p3)
	}

	// close gives back what the process holds on the file, with whatever
	// descriptor it was taken.
	fb.denied(wr, 300, 1)
	oa2.open("two").close()
	fb.get(wr, 300, 3)
	// So does the end of the process.
	fb.denied(wr, 150, 10)
	oa.end()
	fb.lock(wr, 150, 10, true).ok()
	fb2.wantMap("R 50-149, W 150-160, W 300-302")
	fb.close()
	fa2.wantMap("")
	// The files of one process do not mix.
	x, y := ob2.open("two-x"), ob2.open("two-y")
	x.get(wr, 0, 0)
	ax, ay := oa2.open("two-x"), oa2.open("two-y")
	ax.denied(rd, 7, 1)
	ay.get(wr, 0, 0)
	y.denied(rd, 7, 1)
}

// ranges: upgrade, downgrade, splitting and merging, seen by the other client.
func ranges(t *testing.T, a, b *lockGuest) {
	fa, fb := a.owner(t, "").open("ranges"), b.owner(t, "").open("ranges")
	step := func(want string, typ string, start, length int64) {
		t.Helper()
		fa.get(typ, start, length)
		fb.wantMap(want)
	}
	step("R 0-99", rd, 0, 100)
	step("W 0-99", wr, 0, 100)                               // upgrade
	step("R 0-99", rd, 0, 100)                               // downgrade
	step("R 0-39, W 40-59, R 60-99", wr, 40, 20)             // upgrade of the middle
	step("R 0-39, W 40-49, R 60-99", un, 50, 10)             // hole
	step("R 0-19, W 40-49, R 60-99", un, 20, 20)             // unlock more than one range, and none
	step("R 0-19, W 40-49, R 60-69, R 80-99", un, 70, 10)    // split
	step("R 0-19, W 40-49, R 60-99", rd, 65, 20)             // merge
	step("R 0-19, W 40-49, R 60-120", rd, 95, 26)            // grow
	step("W 0-149", wr, 0, 150)                              // over everything
	step("W 0-9, R 10-19, W 20-149", rd, 10, 10)             // downgrade of the middle
	step("W 0-9, R 10-19, W 20-EOF", wr, 100, 0)             // to the end
	step("W 0-9, R 10-19, W 20-999", un, 1000, 0)            // from somewhere to the end
	step("W 0-9, R 10-19, W 20-99, W 150-999", un, 150, -50) // backwards
	step("W 0-9, R 10-19, W 20-999", wr, 100, 50)            //
	step("W 0-999", wr, 10, 10)                              // upgrade that joins three
	step("W 0-499, R 500-500, W 501-999", rd, 500, 1)        // one byte
	step("", un, 0, 0)                                       //
	// An upgrade that another's shared lock forbids leaves the shared one alone.
	fa.get(rd, 0, 10)
	fb.get(rd, 5, 10)
	fa.denied(wr, 0, 10)
	fb.denied(wr, 5, 10)
	fb.wantMap("R 0-9")
	fa.wantMap("R 5-14")
	// An upgrade that waits keeps it too, and gets through.
	up := fa.queued(wr, 0, 10)
	fb.denied(wr, 0, 3)
	fb.get(un, 0, 0)
	up.ok()
	fb.wantMap("W 0-9")
	// A downgrade lets waiting readers in.
	r := fb.queued(rd, 2, 4)
	fa.get(rd, 0, 10)
	r.ok()
	fa.wantMap("R 2-5")
}

// edge: the last bytes that a lock can cover.
func edge(t *testing.T, a, b *lockGuest) {
	fa, fb := a.owner(t, "").open("edge"), b.owner(t, "").open("edge")
	const m = int64(maxOffset)
	step := func(want string, typ string, start, length int64) {
		t.Helper()
		fa.get(typ, start, length)
		fb.wantMap(want)
	}
	step(fmt.Sprintf("W %d-EOF", m), wr, m, 0)
	fb.denied(rd, m, 1)
	fb.denied(rd, 0, 0)
	fb.get(wr, m-1, 1)
	fb.get(un, 0, 0)
	step("", un, m, 1)
	step(fmt.Sprintf("W %d-EOF", m), wr, m, 1)
	step("", un, 0, 0)
	step(fmt.Sprintf("R %d-%d", m-1, m-1), rd, m-1, 1)
	step(fmt.Sprintf("R %d-EOF", m-1), rd, m, 0)
	step(fmt.Sprintf("R %d-%d", m-1, m-1), un, m, 0)
	step("", un, m-1, 1)
	step(fmt.Sprintf("W 0-%d", m-1), wr, 0, m)
	fb.get(wr, m, 0)
	fb.denied(wr, m-1, 0)
	fb.get(un, m, 1)
	step("W 0-EOF", wr, 1, m)
	step("W 0-9", un, 10, 0)
	step(fmt.Sprintf("W 0-9, R %d-EOF", m-9), rd, m-9, 10)
	step(fmt.Sprintf("W 0-9, R %d-%d, R %d-EOF", m-9, m-6, m-3), un, m-5, 2)
	step("W 0-9", un, 1<<62, 1<<62)
	step("W 0-9, W 4294967295-4294967296", wr, 1<<32-1, 2)
	step("W 0-9, W 2147483647-2147483648, W 4294967295-4294967296", wr, 1<<31-1, 2)
	fb.denied(wr, 1<<31, 1<<33)
	fb.get(wr, 1<<33, 1<<40)
	if r := fb.lock(wr, m, 2, false).reply(); r.Errno != int(syscall.EOVERFLOW) {
		t.Errorf("a range beyond the end: %+v, want EOVERFLOW", r)
	}
	// Waiting for the last byte.
	fa.get(wr, m, 0)
	c := fb.queued(wr, m-100, 0)
	fa.get(un, m, 0)
	c.ok()
	fa.wantMap(fmt.Sprintf("W %d-%d, W %d-EOF", int64(1)<<33, int64(1)<<33+int64(1)<<40-1, m-100))
}

// randomRanges compares what three processes of two clients get with a model.
func randomRanges(t *testing.T, a, b *lockGuest) {
	// The model knows a lock as a set of cells: bytes at either end of the
	// space, and one cell for all between.
	const n = 24
	type cell struct{ start, end int64 }
	var cells []cell
	for i := range int64(n) {
		cells = append(cells, cell{i, i})
	}
	cells = append(cells, cell{n, maxOffset - n})
	for i := int64(n - 1); i >= 0; i-- {
		cells = append(cells, cell{maxOffset - i, maxOffset - i})
	}
	files := []*lockFile{a.owner(t, "").open("random"), a.owner(t, "").open("random"), b.owner(t, "").open("random")}
	model := make([][]string, len(files))
	for i := range model {
		model[i] = make([]string, len(cells))
	}
	wantMap := func(who int) string {
		var held []heldRange
		for i, c := range cells {
			typ := ""
			for o := range model {
				if o != who && (typ == "" || model[o][i] == wr) && model[o][i] != "" {
					typ = model[o][i]
				}
			}
			if typ != "" {
				held = append(held, heldRange{typ, c.start, c.end})
			}
		}
		return mapString(held)
	}
	r := rand.New(rand.NewPCG(lockSeed(t), 5))
	var history []string
	for i := range 250 {
		who := r.IntN(len(files))
		typ := []string{rd, rd, wr, wr, un}[r.IntN(5)]
		from := r.IntN(len(cells))
		to := min(from+r.IntN(10), len(cells)-1)
		start, end := cells[from].start, cells[to].end
		length := lengthOf(start, end)
		switch {
		case end == maxOffset && start > 0 && r.IntN(2) == 0:
			length = end - start + 1
		case end < maxOffset && r.IntN(8) == 0:
			start, length = end+1, -length
		}
		free := true
		for o := range model {
			for _, held := range model[o][from : to+1] {
				if o != who && typ != un && held != "" && (held == wr || typ == wr) {
					free = false
				}
			}
		}
		history = append(history, fmt.Sprintf("%d: %s %d+%d free=%v", who, typ, start, length, free))
		fail := func(what string) {
			t.Helper()
			t.Fatalf("step %d: %s\n%s", i, what, strings.Join(history, "\n"))
		}
		switch rep := files[who].lock(typ, start, length, false).reply(); {
		case free && rep.Err != "":
			fail(rep.Err)
		case !free && rep.Err == "":
			fail("got a lock that conflicts")
		case !free && !isDenied(rep):
			fail(rep.Err)
		}
		if free {
			for c := from; c <= to; c++ {
				if model[who][c] = typ; typ == un {
					model[who][c] = ""
				}
			}
		}
		if i%25 == 24 {
			for who, f := range files {
				if got, want := f.lockMap(), wantMap(who); got != want {
					fail(fmt.Sprintf("process %d sees %q, want %q", who, got, want))
				}
			}
		}
	}
}

// handOver lets two clients pass a lock to and fro, and measures how long it
// takes from the one's unlock to the other's lock.
func handOver(t *testing.T, w *world, a, b *lockGuest) {
	const n = 105
	oa, ob := a.owner(t, ""), b.owner(t, "")
	fa, fb := oa.open("hand-over"), ob.open("hand-over")
	base := time.Now()
	offA, slackA := oa.clockOffset(base)
	offB, slackB := ob.clockOffset(base)
	// Held long enough for the other's request to be in the queue.
	q := lockmsg.Request{Op: lockmsg.OpPingPong, N: n, HoldNs: int64(15 * time.Millisecond)}
	ca, cb := fa.do(q), fb.do(q)
	ra, rb := ca.ok(), cb.ok()
	type turn struct {
		who      int
		got, rel time.Duration
	}
	var turns []turn
	for who, r := range []lockmsg.Reply{ra, rb} {
		off := []time.Duration{offA, offB}[who]
		for i := 0; i+1 < len(r.Times); i += 2 {
			turns = append(turns, turn{who, time.Duration(r.Times[i]) + off, time.Duration(r.Times[i+1]) + off})
		}
	}
	slices.SortFunc(turns, func(x, y turn) int { return int(x.got - y.got) })
	var lat []time.Duration
	for i := 1; i < len(turns); i++ {
		d := turns[i].got - turns[i-1].rel
		if d < -(slackA + slackB + 2*time.Millisecond) {
			t.Errorf("turn %d: held by both for %v (clocks agree within %v)", i, -d, slackA+slackB)
		}
		if turns[i].who != turns[i-1].who {
			lat = append(lat, d)
		}
	}
	// A guest that is late finds the lock free.
	if len(lat) < n {
		t.Fatalf("only %d of %d turns were hand-overs", len(lat), 2*n)
	}
	slices.Sort(lat)
	ms := func(i int) float64 { return max(0, lat[i].Seconds()*1000) }
	t.Logf("hand-over of a lock between two clients by callback (%s): %d times, median %.1f ms, p99 %.1f ms, max %.1f ms (clocks agree within %.1f ms)",
		w.srv.Name(), len(lat), ms(len(lat)/2), ms(len(lat)*99/100), ms(len(lat)-1), (slackA+slackB).Seconds()*1000)
	// A client that is not called back asks again after 30 s.
	if d := lat[len(lat)-1]; d > 20*time.Second {
		t.Errorf("a hand-over took %v: the client was not called back", d)
	}
}

// queue: those who wait get the lock in the order in which they came. The
// holder is of another client than those who wait, since a client asks the
// server only for what none of its own processes has.
func queue(t *testing.T, a, b *lockGuest) {
	holder := a.owner(t, "").open("queue")
	for round := range 3 {
		holder.get(wr, 0, 10)
		var cs []*call
		var fs []*lockFile
		// They want different bytes, so that only the order keeps the last one waiting.
		for i := range 3 {
			f := b.owner(t, "").open("queue")
			fs = append(fs, f)
			cs = append(cs, f.queued(wr, int64(2*i), 3))
		}
		holder.get(un, 0, 0)
		cs[0].ok()
		if cs[1].ended() {
			t.Fatalf("round %d: two have byte 2", round)
		}
		fs[0].get(un, 0, 0)
		cs[1].ok()
		if cs[2].ended() {
			t.Fatalf("round %d: the third passed the second", round)
		}
		fs[1].get(un, 0, 0)
		cs[2].ok()
		for _, f := range fs {
			f.close()
		}
	}
	// The same with waiters of two clients: b's request overlaps a's earlier one,
	// which waits longer.
	ha, hb := a.owner(t, "").open("queue"), b.owner(t, "").open("queue")
	wa, wb := a.owner(t, "").open("queue"), b.owner(t, "").open("queue")
	ha.get(wr, 0, 1)
	hb.get(wr, 10, 1)
	ca := wa.queued(wr, 5, 10)
	cb := wb.queued(wr, 0, 7)
	ha.get(un, 0, 0)
	time.Sleep(200 * time.Millisecond)
	if cb.ended() {
		t.Error("a later request passed an earlier one of another client")
	}
	hb.get(un, 0, 0)
	ca.ok()
	wa.get(un, 0, 0)
	cb.ok()
	wb.get(un, 0, 0)
	// All readers that wait get it at once.
	holder.get(wr, 0, 10)
	var cs []*call
	for range 3 {
		cs = append(cs, b.owner(t, "").open("queue").queued(rd, 0, 10))
	}
	holder.get(un, 0, 0)
	for _, c := range cs {
		c.ok()
	}
}

// cancelWaiting kills processes that wait. They must not get the lock, and not
// be in the way of others.
func cancelWaiting(t *testing.T, a, b *lockGuest) {
	for _, sig := range []string{"TERM", "KILL"} {
		t.Run(sig, func(t *testing.T) {
			name := "cancel-" + sig
			holder, spy := a.owner(t, "").open(name), a.owner(t, "").open(name)
			holder.get(wr, 0, 10)
			first, second, third := b.owner(t, ""), b.owner(t, ""), b.owner(t, "")
			ff, fs, ft := first.open(name), second.open(name), third.open(name)
			c1 := ff.queued(wr, 0, 10)
			fs.queued(wr, 0, 10)
			c3 := ft.queued(wr, 0, 10)
			second.kill(sig)
			holder.get(un, 0, 10)
			c1.ok()
			if c3.ended() {
				t.Fatal("two have the lock")
			}
			// The first of the queue is killed while it holds, and the last gets it.
			first.kill(sig)
			c3.ok()
			ft.get(un, 0, 10)
			spy.wantMap("")
			// Killed alone in the queue: nobody has the lock then.
			holder.get(wr, 0, 0)
			lone := b.owner(t, "")
			lone.open(name).queued(rd, 5, 5)
			lone.kill(sig)
			holder.get(un, 0, 0)
			spy.wantMap("")
			b.owner(t, "").open(name).get(wr, 0, 0)
		})
	}
}

// deadlock: whose wait would close a circle gets an error.
func deadlock(t *testing.T, a, b *lockGuest) {
	fa, fb := a.owner(t, "").open("deadlock"), b.owner(t, "").open("deadlock")
	fa.get(wr, 0, 1)
	fb.get(wr, 1, 1)
	c := fa.queued(wr, 1, 1)
	if r := fb.lock(wr, 0, 1, true).reply(); r.Errno != int(syscall.EDEADLK) {
		t.Fatalf("the second of two that wait for each other: %+v, want EDEADLK", r)
	}
	if c.ended() {
		t.Fatal("the first one got the lock of the second")
	}
	fb.get(un, 1, 1)
	c.ok()
}

// killHolder kills processes that hold locks.
func killHolder(t *testing.T, a, b *lockGuest) {
	for i := range 5 {
		h := a.owner(t, "")
		f := h.open("killed")
		f.get(wr, 0, 100)
		f.get(rd, 200, 0)
		w1, w2 := b.owner(t, "").open("killed"), b.owner(t, "").open("killed")
		c1, c2 := w1.queued(wr, 10, 10), w2.queued(wr, 1<<40, 10)
		h.kill("KILL")
		c1.ok()
		c2.ok()
		if i == 4 {
			a.owner(t, "").open("killed").wantMap(fmt.Sprintf("W 10-19, W %d-%d", int64(1)<<40, int64(1)<<40+9))
		}
		w1.close()
		w2.close()
	}
}

// flocks: the client makes a lock on the whole file of flock(2).
func flocks(t *testing.T, a, b *lockGuest) {
	fa, fb := a.owner(t, "").open("flock"), b.owner(t, "").open("flock")
	fa.flock(rd, false).ok()
	fb.flock(rd, false).ok()
	fb.flock(wr, false).denied()
	fb.flock(un, false).ok()
	fa.flock(wr, false).ok()
	fb.flock(rd, false).denied()
	fb.denied(wr, 77, 1)
	fb.wantMap("W 0-EOF")
	c := fb.flock(wr, true)
	time.Sleep(150 * time.Millisecond)
	if c.ended() {
		t.Fatal("two clients have an exclusive flock")
	}
	fa.flock(un, false).ok()
	c.ok()
	fa.flock(rd, false).denied()
	fb.close()
	fa.flock(wr, true).ok()
}

// lockOptions: mounts that lock in other ways.
func lockOptions(t *testing.T, a, b *lockGuest) {
	for _, c := range []struct {
		name, options string
		posix, flock  bool // whether these are seen by the other client
	}{
		{"noresvport", "noresvport", true, true},
		{"mountproto-udp", "mountproto=udp", true, true},
		{"nolock", "nolock", false, false},
		{"local-lock-all", "local_lock=all", false, false},
		{"local-lock-flock", "local_lock=flock", true, false},
		{"local-lock-posix", "local_lock=posix", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			const dir = "/run/other/locks"
			for _, g := range []*lockGuest{a, b} {
				g.sh(t, fmt.Sprintf("mkdir -p /run/other && mount -t nfs -o vers=3,nosharecache,%s %s:/rw /run/other", c.options, serverAddr))
				defer g.sh(t, "umount /run/other")
			}
			check := func(kind string, shared bool, get func(f *lockFile, typ string) *call) {
				t.Helper()
				oa, ob := a.owner(t, dir), b.owner(t, dir)
				fa, fb := oa.open("options-"+c.name+kind), ob.open("options-"+c.name+kind)
				// The processes must not outlive the mount.
				defer func() {
					for _, o := range []*owner{oa, ob} {
						o.end()
					}
					for _, g := range []*lockGuest{a, b} {
						g.sh(t, "while fuser -sm /run/other 2>/dev/null; do sleep 0.05; done")
					}
				}()
				get(fa, wr).ok()
				if !shared {
					get(fb, wr).ok()
					return
				}
				get(fb, wr).denied()
				get(fb, rd).denied()
				get(fa, un).ok()
				get(fb, wr).ok()
				get(fa, wr).denied()
			}
			check("posix", c.posix, func(f *lockFile, typ string) *call { return f.lock(typ, 0, 10, false) })
			check("flock", c.flock, func(f *lockFile, typ string) *call { return f.flock(typ, false) })
		})
	}
}
