package owner

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/wire"
)

var ctx = context.Background()

// bubble is the clock inside a synctest bubble.
func bubble() Clock {
	return Clock{
		Now:       func() int64 { return time.Now().UnixNano() },
		AfterFunc: func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop },
	}
}

// shared is storage that several nodes see. Accesses take a millisecond.
type shared struct {
	mu   sync.Mutex
	b    []byte
	open int
}

func (s *shared) node() *sharedNode {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	return &sharedNode{shared: s}
}

// sharedNode is the storage seen from a node, whose way to it may be cut or hang.
type sharedNode struct {
	*shared
	err  atomic.Pointer[error]
	hang atomic.Pointer[chan struct{}]
}

func (n *sharedNode) way() error {
	time.Sleep(time.Millisecond)
	if c := n.hang.Load(); c != nil {
		<-*c
	}
	if e := n.err.Load(); e != nil {
		return *e
	}
	return nil
}

func (n *sharedNode) cut(err error) { n.err.Store(&err) }

func (n *sharedNode) Read(p []byte) (int, error) {
	if err := n.way(); err != nil {
		return 0, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return copy(p, n.b), nil
}

func (n *sharedNode) Write(p []byte, off int64) error {
	if err := n.way(); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.b) < FileSize {
		n.b = append(n.b, make([]byte, FileSize-len(n.b))...)
	}
	copy(n.b[off:], p)
	return nil
}

func (n *sharedNode) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open--
	return nil
}

// contender is one who opens a store.
type contender struct {
	*Owner
	way    *sharedNode
	lost   chan error
	wanted chan string
}

func (s *shared) try(c context.Context, node string, change func(*Options)) (*contender, error) {
	x := &contender{way: s.node(), lost: make(chan error, 10), wanted: make(chan string, 100)}
	o := Options{
		Node: node, Storage: x.way, Clock: bubble(), Boot: "boot-" + node,
		OnLost:   func(err error) { x.lost <- err },
		OnWanted: func(n string) { x.wanted <- n },
	}
	if change != nil {
		change(&o)
	}
	var err error
	x.Owner, err = Open(c, o)
	return x, err
}

func (s *shared) own(t *testing.T, node string, change func(*Options)) *contender {
	t.Helper()
	x, err := s.try(ctx, node, change)
	if err != nil {
		t.Fatal(node, err)
	}
	if !x.Valid() || x.Check() != nil {
		t.Fatal(node, "does not own what it has opened")
	}
	return x
}

func (x *contender) release(t *testing.T) {
	t.Helper()
	if err := x.Release(ctx); err != nil {
		t.Error(err)
	}
	if x.Valid() || !errors.Is(x.Check(), ErrNotOwner) || len(x.lost) != 0 {
		t.Error("after the release", x.Valid(), len(x.lost))
	}
}

// crash ends a contender without a word.
func (x *contender) crash(t *testing.T) {
	t.Helper()
	if err := x.Close(ctx); err != nil {
		t.Error(err)
	}
}

// all runs f in a bubble and looks whether storage is closed after.
func all(t *testing.T, f func(t *testing.T, s *shared)) {
	synctest.Test(t, func(t *testing.T) {
		s := &shared{}
		f(t, s)
		synctest.Wait()
		if s.open != 0 {
			t.Errorf("%d not closed", s.open)
		}
	})
}

func held(t *testing.T, err error, by string, gen uint64) {
	t.Helper()
	var h *HeldError
	if !errors.As(err, &h) || !errors.Is(err, ErrHeld) || h.Record.Node != by || h.Record.Generation != gen {
		t.Errorf("%v, want held by %s", err, by)
	}
}

// MM 1 to MM 10 and CS 41c, with the times that the simulated clock says.
func TestMMP(t *testing.T) {
	took := func(from time.Time, least, most time.Duration, t *testing.T) {
		t.Helper()
		if d := time.Since(from); d < least || d > most {
			t.Errorf("took %v, expected %v to %v", d, least, most)
		}
	}
	for _, x := range []struct {
		name string
		run  func(t *testing.T, s *shared)
	}{
		{"MM 1, CS 41c: two nodes mount the same target at once: exactly one wins", func(t *testing.T, s *shared) {
			type result struct {
				x   *contender
				err error
			}
			for round := range 20 {
				res := make(chan result)
				for _, n := range []string{"a", "b"} {
					go func() {
						time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
						x, err := s.try(ctx, n, nil)
						res <- result{x, err}
					}()
				}
				one, two := <-res, <-res
				if one.err != nil {
					one, two = two, one
				}
				if one.err != nil || two.err == nil {
					t.Fatalf("round %d: %v, %v", round, one.err, two.err)
				}
				held(t, two.err, one.x.rec.Node, one.x.rec.Generation)
				one.x.release(t)
			}
		}},
		{"MM 2: second mount delayed by the update interval is refused", func(t *testing.T, s *shared) { second(t, s, time.Second) }},
		{"MM 3: second mount delayed by twice the check interval is refused", func(t *testing.T, s *shared) { second(t, s, 2*time.Second) }},
		{"MM 4: second mount delayed more than twice is refused", func(t *testing.T, s *shared) { second(t, s, 7*time.Second) }},
		{"MM 5: mount on B while A is stopping", func(t *testing.T, s *shared) {
			a := s.own(t, "a", nil)
			got := make(chan *contender)
			go func() { got <- s.own(t, "b", func(o *Options) { o.Wait = true }) }()
			if n := <-a.wanted; n != "b" {
				t.Error(n)
			}
			time.Sleep(1300 * time.Millisecond) // still stopping
			if !a.Valid() {
				t.Error("lost while stopping")
			}
			at := time.Now()
			a.release(t)
			b := <-got
			took(at, 300*time.Millisecond, time.Second, t)
			if p := b.Previous(); p == nil || p.State != Clean || p.Node != "a" || b.Record().Generation != 2 {
				t.Errorf("%+v %+v", p, b.Record())
			}
			b.release(t)
		}},
		{"MM 6: mount after clean stop", func(t *testing.T, s *shared) {
			s.own(t, "a", nil).release(t)
			at := time.Now()
			b := s.own(t, "b", nil)
			took(at, 300*time.Millisecond, 320*time.Millisecond, t)
			b.release(t)
		}},
		{"MM 7: mount after crash waits and then succeeds", func(t *testing.T, s *shared) {
			s.own(t, "a", nil).crash(t)
			at := time.Now()
			b := s.own(t, "b", nil)
			took(at, 3300*time.Millisecond, 3400*time.Millisecond, t)
			if p := b.Previous(); p == nil || p.State != Owned || p.Node != "a" {
				t.Errorf("%+v", p)
			}
			// The same machine, whose own lock says that the process has died.
			b.crash(t)
			at = time.Now()
			b = s.own(t, "b", func(o *Options) { o.Exclusive = true })
			took(at, 300*time.Millisecond, 320*time.Millisecond, t)
			// Another one, told that b has been powered off.
			b.crash(t)
			at = time.Now()
			a := s.own(t, "a", func(o *Options) { o.Fenced = "b" })
			took(at, 300*time.Millisecond, 320*time.Millisecond, t)
			if a.Record().Generation != 4 {
				t.Errorf("%+v", a.Record())
			}
			a.release(t)
		}},
		{"MM 8: mount refused while checker runs", func(t *testing.T, s *shared) {
			c := s.own(t, "fsck", func(o *Options) { o.Check = true })
			_, err := s.try(ctx, "a", nil)
			held(t, err, "fsck", 1)
			var h *HeldError
			if errors.As(err, &h) && h.Record.State != Checking {
				t.Error(h)
			}
			c.release(t)
			s.own(t, "a", nil).release(t)
		}},
		{"MM 9: mount after aborted checker", func(t *testing.T, s *shared) {
			s.own(t, "fsck", func(o *Options) { o.Check = true }).crash(t)
			at := time.Now()
			a := s.own(t, "a", nil)
			took(at, 3300*time.Millisecond, 3400*time.Millisecond, t)
			if p := a.Previous(); p == nil || p.State != Checking {
				t.Errorf("%+v", p)
			}
			a.release(t)
		}},
		{"MM 10: checker refused while mounted", func(t *testing.T, s *shared) {
			a := s.own(t, "a", nil)
			_, err := s.try(ctx, "fsck", func(o *Options) { o.Check = true })
			held(t, err, "a", 1)
			if !a.Valid() {
				t.Error("the owner has lost the store")
			}
			a.release(t)
		}},
	} {
		t.Run(x.name, func(t *testing.T) { all(t, x.run) })
	}
}

func second(t *testing.T, s *shared, delay time.Duration) {
	a := s.own(t, "a", nil)
	time.Sleep(delay)
	_, err := s.try(ctx, "b", nil)
	held(t, err, "a", 1)
	if !a.Valid() {
		t.Error("the owner has lost the store")
	}
	a.release(t)
}

// Whatever the storage does, ownership ends in time and is told once.
func TestLoss(t *testing.T) {
	t.Run("storage hangs", func(t *testing.T) {
		all(t, func(t *testing.T, s *shared) {
			a := s.own(t, "a", nil)
			time.Sleep(4500 * time.Millisecond)
			c := make(chan struct{})
			a.way.hang.Store(&c)
			err := <-a.lost
			if a.Valid() || !errors.Is(err, ErrNotOwner) {
				t.Error(a.Valid(), err)
			}
			// It is over though the access is not.
			short, cancel := context.WithTimeout(ctx, time.Second)
			if err := a.Close(short); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
			cancel()
			b := s.own(t, "b", nil)
			close(c)
			time.Sleep(5 * time.Second)
			if !b.Valid() || a.Valid() || len(a.lost) != 0 {
				t.Error(b.Valid(), a.Valid(), len(a.lost))
			}
			a.crash(t)
			b.release(t)
		})
	})
	t.Run("storage fails", func(t *testing.T) {
		all(t, func(t *testing.T, s *shared) {
			a := s.own(t, "a", nil)
			a.way.cut(unix.EIO)
			time.Sleep(time.Second)
			if !a.Valid() {
				t.Error("lost too early")
			}
			if err := <-a.lost; !errors.Is(err, unix.EIO) || a.Valid() {
				t.Error(err)
			}
			if err := a.Release(ctx); !errors.Is(err, ErrNotOwner) {
				t.Error(err)
			}
			if err := a.Release(ctx); !errors.Is(err, ErrNotOwner) {
				t.Error(err)
			}
		})
	})
	t.Run("release fails", func(t *testing.T) {
		all(t, func(t *testing.T, s *shared) {
			a := s.own(t, "a", nil)
			a.way.cut(unix.EIO)
			if err := a.Release(ctx); !errors.Is(err, unix.EIO) || a.Valid() || len(a.lost) != 0 {
				t.Error(err, a.Valid(), len(a.lost))
			}
			a.crash(t)
		})
	})
	t.Run("somebody else has it", func(t *testing.T) {
		all(t, func(t *testing.T, s *shared) {
			a := s.own(t, "a", nil)
			b := s.own(t, "b", func(o *Options) { o.Fenced = "a" })
			if err := <-a.lost; !errors.Is(err, ErrNotOwner) || !errors.Is(err, wire.ErrTargetDown) {
				t.Error(err)
			}
			b.release(t)
			a.crash(t)
		})
	})
	t.Run("process was stopped", func(t *testing.T) {
		all(t, func(t *testing.T, s *shared) {
			// The clock jumps, as for a process that goes on after SIGSTOP: Valid
			// says so before any timer has fired, and does not take it back.
			var jump atomic.Int64
			a := s.own(t, "a", func(o *Options) {
				o.Clock.Now = func() int64 { return time.Now().UnixNano() + jump.Load() }
			})
			jump.Store(int64(10 * time.Second))
			if a.Valid() {
				t.Error("valid after the jump")
			}
			jump.Store(0)
			if a.Valid() {
				t.Error("valid again")
			}
			<-a.lost
			time.Sleep(5 * time.Second)
			if len(a.lost) != 0 || a.Valid() {
				t.Error("told twice")
			}
			a.crash(t)
		})
	})
	t.Run("heartbeat ends as the time does", func(t *testing.T) {
		all(t, func(t *testing.T, s *shared) {
			var jump atomic.Int64
			a := s.own(t, "a", func(o *Options) {
				o.Clock.Now = func() int64 { return time.Now().UnixNano() + jump.Load() }
			})
			c := make(chan struct{})
			a.way.hang.Store(&c)
			time.Sleep(1100 * time.Millisecond) // a heartbeat is under way
			jump.Store(int64(time.Second))
			if a.Valid() {
				t.Error("valid")
			}
			a.way.hang.Store(nil)
			close(c)
			<-a.lost
			a.crash(t)
		})
	})
}

// Who waits can give up, in every phase, also while storage hangs.
func TestGiveUp(t *testing.T) {
	all(t, func(t *testing.T, s *shared) {
		a := s.own(t, "a", nil)
		for d := range 40 {
			c, cancel := context.WithTimeout(ctx, time.Duration(d)*100*time.Millisecond+500*time.Microsecond)
			if _, err := s.try(c, "b", func(o *Options) { o.Wait = true }); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			cancel()
		}
		a.crash(t)
		for _, d := range []time.Duration{100 * time.Millisecond, 3002 * time.Millisecond, 3200 * time.Millisecond} {
			c, cancel := context.WithTimeout(ctx, d)
			if _, err := s.try(c, "b", nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(d, err)
			}
			cancel()
			time.Sleep(10 * time.Millisecond) // an access that was under way ends
		}
		hang := make(chan struct{})
		c, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		w := s.node()
		w.hang.Store(&hang)
		if _, err := Open(c, Options{Node: "b", Storage: w, Clock: bubble(), Boot: "x"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		close(hang)
	})
}

// Valid, Release and Close from many goroutines, with losses in between.
func TestConcurrent(t *testing.T) {
	for round := range 30 {
		all(t, func(t *testing.T, s *shared) {
			a := s.own(t, "a", nil)
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 50 {
						time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
						was := a.Valid()
						if !was && a.Valid() {
							t.Error("valid again")
						}
					}
				})
			}
			if round%3 == 0 {
				wg.Go(func() { time.Sleep(time.Second); a.way.cut(unix.EIO) })
			}
			var ok atomic.Int32
			for range 2 {
				wg.Go(func() {
					time.Sleep(time.Duration(rand.IntN(4000)) * time.Millisecond)
					if a.Release(ctx) == nil {
						ok.Add(1)
					}
				})
			}
			wg.Go(func() {
				time.Sleep(time.Duration(rand.IntN(4000)) * time.Millisecond)
				if err := a.Close(ctx); err != nil {
					t.Error(err)
				}
			})
			wg.Wait()
			if ok.Load() > 1 || a.Valid() || len(a.lost) > 1 || ok.Load() == 1 && len(a.lost) == 1 {
				t.Error(ok.Load(), a.Valid(), len(a.lost))
			}
		})
	}
}

func TestOptions(t *testing.T) {
	dir := t.TempDir()
	for what, o := range map[string]Options{
		"no node":      {Dir: dir},
		"no directory": {Node: "a"},
		"rare":         {Node: "a", Dir: dir, Interval: time.Minute},
		"missing":      {Node: "a", Dir: dir + "/missing"},
	} {
		if w, err := Open(ctx, o); err == nil {
			t.Error(what, "was accepted")
			_ = w.Close(ctx)
		}
	}
	if _, err := Open(ctx, Options{Node: "a", Dir: dir, Rand: errReader{}}); !errors.Is(err, errRand) {
		t.Error(err)
	}
}

var errRand = errors.New("no randomness")

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errRand }

func BenchmarkValid(b *testing.B) {
	w, err := Open(ctx, Options{Node: "a", Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	for range b.N {
		if !w.Valid() {
			b.Fatal("lost")
		}
	}
	b.StopTimer()
	if err := w.Release(ctx); err != nil {
		b.Fatal(err)
	}
}
