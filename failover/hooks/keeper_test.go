package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/cockroachdb/datadriven"
)

var testAddr = netip.MustParseAddr("192.0.2.50")

// TestKeeper steps a Keeper. Each line is a time since the beginning and an input:
// "want ROLE", "tick", "STATE text" (the call under way ends so), "refused text",
// "gone" (no baton runs), "timeout", "late N STATE" (the end of another call).
func TestKeeper(t *testing.T) {
	datadriven.RunTest(t, "testdata/keeper.txt", func(t *testing.T, d *datadriven.TestData) string {
		o := KeeperOptions{ForceAfter: time.Second, Handover: 3 * time.Second}
		if d.HasArg("recheck") {
			o.Recheck = 2 * time.Second
		}
		k := NewKeeper(testAddr, o)
		if d.HasArg("unsure") {
			k.Unsure()
		}
		begin := time.Unix(1000, 0)
		var out strings.Builder
		for l := range strings.SplitSeq(strings.TrimSpace(d.Input), "\n") {
			f := strings.SplitN(l, " ", 3)
			at, err := time.ParseDuration(f[0])
			if err != nil {
				t.Fatalf("%s: %v", d.Pos, err)
			}
			now := begin.Add(at)
			f = append(f, "")
			var a Actions
			switch f[1] {
			case "want":
				a = k.Want(now, Role(f[2]))
			case "tick":
				a = k.Tick(now)
			case "gone":
				a = k.Done(now, k.call.ID, vipctl.Result{}, &control.NotRunningError{Socket: "/run/s"})
			case "refused":
				a = k.Done(now, k.call.ID, vipctl.Result{}, &control.RemoteError{Code: control.CodeFailed, Text: f[2]})
			case "timeout":
				a = k.Done(now, k.call.ID, vipctl.Result{}, context.DeadlineExceeded)
			case "late":
				n, state, _ := strings.Cut(f[2], " ")
				id, err := strconv.Atoi(n)
				if err != nil {
					t.Fatalf("%s: %v", d.Pos, err)
				}
				a = k.Done(now, id, vipctl.Result{State: state}, nil)
			default:
				a = k.Done(now, k.call.ID, vipctl.Result{State: f[1], Text: f[2]}, nil)
			}
			fmt.Fprintf(&out, "%s\n", l)
			if a.Drop {
				out.WriteString("    drop\n")
			}
			if c := a.Call; c != nil {
				fmt.Fprintf(&out, "    call %d: %s%s", c.ID, c.Op, flags(false, c.Force))
				if c.Within > 0 {
					fmt.Fprintf(&out, " within %v", c.Within)
				}
				out.WriteString("\n")
			}
			if a.Settled != nil {
				fmt.Fprintf(&out, "    say %d: %s\n", a.Settled.Code, a.Settled.Text)
			}
			if !a.Wake.IsZero() {
				fmt.Fprintf(&out, "    wake at %v\n", a.Wake.Sub(begin))
			}
		}
		return out.String()
	})
}

// model is a running baton that takes and gives up one address; it is slow at times,
// does not run at others, and calls of those that have gone may reach it late.
type model struct {
	rng  *rand.Rand
	late bool // calls of callers that have gone are executed all the same, later

	mu    sync.Mutex
	state string
	down  bool // no baton runs
	left  bool // the address is on the machine though none runs
	work  int  // counts calls that change something: the last one wins
	peer  bool // the other node takes what this one serves
	wg    sync.WaitGroup
}

func (m *model) delay(most time.Duration) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Duration(m.rng.Int64N(int64(most)))
}

// change executes a call that ends in state.
func (m *model) change(ctx context.Context, during, state string) (vipctl.Result, error) {
	lag, takes := m.delay(30*time.Millisecond), m.delay(400*time.Millisecond)
	done := make(chan vipctl.Result, 1)
	fail := make(chan error, 1)
	m.wg.Go(func() {
		time.Sleep(lag) // until the request is read
		if ctx.Err() != nil && !m.late {
			return
		}
		m.mu.Lock()
		if m.down {
			m.mu.Unlock()
			fail <- &control.NotRunningError{Socket: "/run/s"}
			return
		}
		m.work++
		mine := m.work
		if m.state != state {
			m.state = during
		}
		m.mu.Unlock()
		time.Sleep(takes)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.down || m.work != mine {
			fail <- errors.New("broken off")
			return
		}
		m.state = state
		done <- vipctl.Result{State: state}
	})
	select {
	case r := <-done:
		return r, nil
	case err := <-fail:
		return vipctl.Result{}, err
	case <-ctx.Done():
		return vipctl.Result{}, ctx.Err()
	}
}

func (m *model) Ping(context.Context) error { return nil }

func (m *model) Ready(context.Context) error { return nil }

func (m *model) Take(ctx context.Context, _ vipctl.TakeArgs) (vipctl.Result, error) {
	return m.change(ctx, vipctl.Taking, vipctl.Serving)
}

func (m *model) Release(ctx context.Context, a vipctl.ReleaseArgs) (vipctl.Result, error) {
	if a.Stage == vipctl.StageDrain {
		return m.change(ctx, vipctl.Releasing, vipctl.Releasing)
	}
	return m.change(ctx, vipctl.Releasing, vipctl.Absent)
}

func (m *model) Check(ctx context.Context, _ vipctl.CheckArgs) (vipctl.Result, error) {
	time.Sleep(m.delay(5 * time.Millisecond))
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down {
		return vipctl.Result{}, &control.NotRunningError{Socket: "/run/s"}
	}
	if m.peer && m.state == vipctl.Serving && m.rng.IntN(3) == 0 {
		m.state = vipctl.Absent // it was taken
		m.work++
	}
	return vipctl.Result{State: m.state}, nil
}

func (m *model) Has(netip.Addr) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.left, nil
}

func (m *model) Remove(context.Context, netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left = false
	return nil
}

func (m *model) crash() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left = m.state == vipctl.Serving
	m.down, m.state = true, vipctl.Absent
	m.work++
}

func (m *model) start() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down, m.left = false, false // a start removes what is not its own
}

func (m *model) get() (state string, left bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state, m.left
}

var states = map[Role]string{Master: "MASTER", Backup: "BACKUP", Leave: "FAULT"}

// Whatever keepalived says in whatever time, and whatever baton does meanwhile: in
// the end the address is as was said last.
func TestFollowRandom(t *testing.T) {
	n := 300
	if testing.Short() {
		n = 60
	}
	first := rand.Uint64()
	for i := range n {
		seed := first + uint64(i)
		synctest.Test(t, func(t *testing.T) { followRandom(t, seed) })
		if t.Failed() {
			return
		}
	}
}

func followRandom(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 2))
	m := &model{rng: rand.New(rand.NewPCG(seed, 3)), state: vipctl.Absent, late: rng.IntN(2) == 0}
	peers := rng.IntN(2) == 0
	e := &Env{Baton: m, Machine: m, Sleep: Sleep}
	lines := &lines{c: make(chan string)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		Follow(t.Context(), e, lines, Instances{"INSTANCE nfs": {testAddr}}, KeeperOptions{ForceAfter: 200 * time.Millisecond, Handover: time.Second, Recheck: 2 * time.Second}, time.Minute, func(Exit) {})
	}()
	var role Role
	var history []string
	for range 1 + rng.IntN(12) {
		role = []Role{Master, Backup, Leave}[rng.IntN(3)]
		history = append(history, string(role))
		m.mu.Lock()
		m.peer = peers && role != Master
		m.mu.Unlock()
		lines.c <- fmt.Sprintf("INSTANCE \"nfs\" %s 100\n", states[role])
		time.Sleep(time.Duration(rng.Int64N(int64([]time.Duration{time.Millisecond, 100 * time.Millisecond, 5 * time.Second}[rng.IntN(3)]))) + 1)
		switch rng.IntN(8) {
		case 0:
			history = append(history, "crash")
			m.crash()
		case 1:
			m.start()
		}
	}
	m.start()
	time.Sleep(5 * time.Minute) // a check in three finds that the peer has taken it
	synctest.Wait()
	state, left := m.get()
	ok := role == Master && state == vipctl.Serving || role == Leave && state == vipctl.Absent ||
		role == Backup && (state == vipctl.Absent || state == vipctl.Serving && !m.peer)
	if !ok || left {
		t.Errorf("seed %d: %v: the address is %s, left %v", seed, history, state, left)
	}
	close(lines.c)
	<-ended
	m.wg.Wait()
}

// lines is a Reader of what a channel gives.
type lines struct {
	c    chan string
	rest string
}

func (l *lines) Read(b []byte) (int, error) {
	if l.rest == "" {
		s, ok := <-l.c
		if !ok {
			return 0, io.EOF
		}
		l.rest = s
	}
	n := copy(b, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

// Scripts that run at the same time and in the wrong order come to what the one says
// that was started last; none fails, and only the last ones act.
func TestNotifyConcurrent(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) { notifyConcurrent(t, seed) })
		if t.Failed() {
			return
		}
	}
}

func notifyConcurrent(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 4))
	m := &model{rng: rand.New(rand.NewPCG(seed, 5)), state: vipctl.Absent, late: true}
	e := &Env{Baton: m, Machine: m, Sleep: Sleep}
	dir := t.TempDir()
	n := 2 + rng.IntN(6)
	var wg sync.WaitGroup
	var last Role
	for i := range n {
		role := []Role{Master, Leave}[rng.IntN(2)]
		if i == n-1 {
			last = role
		}
		wait := time.Duration(rng.Int64N(int64(300 * time.Millisecond)))
		wg.Go(func() {
			time.Sleep(wait)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			x := Notify(ctx, e, dir, Order{"boot", 100, i + 1}, testAddr, role, KeeperOptions{ForceAfter: 100 * time.Millisecond, Handover: 200 * time.Millisecond})
			if x.Code != OK || x.Text == "" {
				t.Errorf("seed %d: %d of %d, %s: %+v", seed, i, n, role, x)
			}
		})
	}
	wg.Wait()
	m.wg.Wait()
	state, _ := m.get()
	if want := map[Role]string{Master: vipctl.Serving, Leave: vipctl.Absent}[last]; state != want {
		t.Errorf("seed %d: the last of %d said %s, the address is %s", seed, n, last, state)
	}
}

// A hook that baton keeps waiting ends with its time-out, and says so.
func TestNotifyTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &model{rng: rand.New(rand.NewPCG(1, 5)), state: vipctl.Absent, down: true}
		e := &Env{Baton: m, Machine: m, Sleep: Sleep}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		begin := time.Now()
		x := Notify(ctx, e, t.TempDir(), Order{"b", 1, 1}, testAddr, Master, KeeperOptions{ForceAfter: time.Second})
		if x.Code != Failure || !strings.Contains(x.Text, "no baton is running") || time.Since(begin) != 5*time.Second {
			t.Errorf("after %v: %+v", time.Since(begin), x)
		}
	})
}
