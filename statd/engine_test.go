package statd

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

var epoch0 = time.Unix(1e9, 0)

// TestEngine replays transcripts. Commands: "new" with parameters, "begin
// state=N" with a line "ADDR NAME..." per host, "done ID [error]", "tick"; each
// with at=DURATION since the beginning. The answer is the outputs, the next
// tick and the counts.
func TestEngine(t *testing.T) {
	var e *engine
	var now time.Duration
	datadriven.RunTest(t, "testdata/engine.txt", func(t *testing.T, d *datadriven.TestData) string {
		dur := func(key string, def time.Duration) time.Duration {
			if !d.HasArg(key) {
				return def
			}
			var s string
			d.ScanArgs(t, key, &s)
			v, err := time.ParseDuration(s)
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			return v
		}
		now = dur("at", now)
		var in any
		switch d.Cmd {
		case "new":
			var slots, jitter int64
			d.ScanArgs(t, "slots", &slots)
			d.MaybeScanArgs(t, "jitter", &jitter)
			e = newEngine(engineConfig{Slots: int(slots), Timeout: dur("timeout", 3*time.Second),
				Share: dur("share", 100*time.Millisecond), Backoff: 2 * time.Second, Max: 2 * time.Minute,
				GiveUp: dur("giveup", 15*time.Minute), Jitter: func(n int64) int64 { return jitter * (n - 1) / 100 }})
			return ""
		case "begin":
			b := inBegin{}
			d.ScanArgs(t, "state", &b.State)
			for l := range strings.Lines(d.Input) {
				if f := strings.Fields(l); len(f) > 0 {
					b.Hosts = append(b.Hosts, hostNames{netip.MustParseAddr(f[0]), f[1:]})
				}
			}
			in = b
		case "done":
			done := inDone{}
			d.ScanArgs(t, "id", &done.ID)
			if d.HasArg("err") {
				done.Err = errNoAnswer
			}
			in = done
		case "tick":
			in = inTick{}
		}
		out, wake := e.step(epoch0.Add(now), in)
		var b strings.Builder
		for _, o := range out {
			switch o := o.(type) {
			case outSend:
				net := "udp"
				if o.TCP {
					net = "tcp"
				}
				fmt.Fprintf(&b, "send %d %v %s\n", o.ID, o.Addr, net)
			case outCancel:
				fmt.Fprintf(&b, "cancel %d\n", o.ID)
			case outTold:
				fmt.Fprintf(&b, "told %v %v of %d\n", o.Host.Addr, o.Host.Names, o.State)
			case outFailed:
				fmt.Fprintf(&b, "failed %v %v after %d: %v\n", o.Host.Addr, o.Host.Names, o.Tries, o.Err)
			}
		}
		tick := "none"
		if !wake.IsZero() {
			tick = wake.Sub(epoch0).String()
		}
		c := e.counts
		fmt.Fprintf(&b, "tick %s; total %d told %d pending %d failed %d\n", tick, c.Total, c.Told, c.Pending, c.Failed)
		return b.String()
	})
}

// simHost answers after a time, or never (0).
type simHost struct {
	latency time.Duration
	told    time.Duration // when it was, since the beginning
	calls   int
}

// simEvent is the end of an attempt.
type simEvent struct {
	at  time.Duration
	seq int
	id  uint64
	err error
}

type simHeap []simEvent

func (h simHeap) Len() int      { return len(h) }
func (h simHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h simHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h *simHeap) Push(x any) { *h = append(*h, x.(simEvent)) }
func (h *simHeap) Pop() any {
	x := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return x
}

// simulate runs an engine against hosts on a clock of its own until until, or
// until nothing is left to do. It returns the largest number of attempts at a time.
func simulate(t *testing.T, e *engine, hosts map[netip.Addr]*simHost, order []hostNames, until time.Duration) int {
	t.Helper()
	var now time.Duration
	var events simHeap
	seq, most := 0, 0
	pending := map[uint64]bool{}
	push := func(at time.Duration, id uint64, err error) {
		seq++
		heap.Push(&events, simEvent{at, seq, id, err})
	}
	step := func(in any) time.Time {
		out, wake := e.step(epoch0.Add(now), in)
		for _, o := range out {
			switch o := o.(type) {
			case outSend:
				h := hosts[o.Addr]
				h.calls++
				pending[o.ID] = true
				if h.latency > 0 {
					push(now+h.latency, o.ID, nil)
				}
			case outCancel:
				push(now, o.ID, errNoAnswer)
			case outTold:
				if h := hosts[o.Host.Addr]; h.told == 0 {
					h.told = now
				} else {
					t.Errorf("%v told twice", o.Host.Addr)
				}
			}
		}
		most = max(most, len(pending))
		return wake
	}
	wake := step(inBegin{State: 3, Hosts: order})
	for now < until {
		switch {
		case len(events) > 0 && (wake.IsZero() || !epoch0.Add(events[0].at).After(wake)):
			ev := heap.Pop(&events).(simEvent)
			if !pending[ev.id] {
				continue // ended before
			}
			delete(pending, ev.id)
			now = ev.at
			wake = step(inDone{ev.id, ev.err})
		case !wake.IsZero():
			if wake.Sub(epoch0) < now {
				t.Fatalf("tick in the past: %v at %v", wake.Sub(epoch0), now)
			}
			now = wake.Sub(epoch0)
			wake = step(inTick{})
		default:
			return most
		}
	}
	return most
}

// TestNoHostWaitsForDeadOnes: of 5,000 hosts a third is dead, and some are slow.
// Those that answer are told in about the time that it would take without the
// dead ones; all the dead ones are tried for the whole time.
func TestNoHostWaitsForDeadOnes(t *testing.T) {
	const n, slots = 5000, 256
	rnd := rand.New(rand.NewPCG(1, 2))
	cfg := engineConfig{Slots: slots, Timeout: 3 * time.Second, Share: firstShare, Backoff: 2 * time.Second,
		Max: 2 * time.Minute, GiveUp: 15 * time.Minute, Jitter: rnd.Int64N}
	hosts := map[netip.Addr]*simHost{}
	var order []hostNames
	dead, slow := 0, 0
	for i := range n {
		addr := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		h := &simHost{latency: 5 * time.Millisecond}
		switch {
		case i%3 == 0:
			h.latency = 0
			dead++
		case i%50 == 1:
			h.latency = 700 * time.Millisecond
			slow++
		}
		hosts[addr] = h
		order = append(order, hostNames{addr, []string{"h"}})
	}
	e := newEngine(cfg)
	most := simulate(t, e, hosts, order, 2*time.Hour)
	if most > slots {
		t.Errorf("%d attempts at a time, %d allowed", most, slots)
	}
	// Every dead or slow host has a slot for its share once; that, spread over the
	// slots, and the batches of answers is all that anybody has to wait.
	bound := time.Duration((dead+slow)/slots+1)*firstShare + time.Duration(n/slots+1)*5*time.Millisecond
	var worst, worstSlow time.Duration
	for addr, h := range hosts {
		switch {
		case h.latency == 0:
			if h.told != 0 || h.calls < 10 {
				t.Errorf("%v: told %v after %d calls", addr, h.told, h.calls)
			}
		case h.told == 0:
			t.Errorf("%v was not told", addr)
		case h.latency > time.Second/2:
			worstSlow = max(worstSlow, h.told)
		default:
			worst = max(worst, h.told)
		}
	}
	t.Logf("%d dead, %d slow; the last quick host told after %v (bound %v), the last slow one after %v", dead, slow, worst, bound, worstSlow)
	if worst > bound || bound > cfg.Timeout {
		t.Errorf("a host waited %v, bound %v", worst, bound)
	}
	if worstSlow > time.Minute {
		t.Errorf("a slow host waited %v", worstSlow)
	}
	if c := e.counts; c.Failed != dead || c.Told != n-dead || c.Pending != 0 || c.Total != n {
		t.Errorf("%+v", c)
	}
	if len(e.attempts)+len(e.due)+len(e.ready) != 0 {
		t.Errorf("left over: %d attempts, %d due, %d ready", len(e.attempts), len(e.due), len(e.ready))
	}
}

// TestEngineRandom feeds random inputs and checks what always holds.
func TestEngineRandom(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		slots := 1 + rnd.IntN(4)
		e := newEngine(engineConfig{Slots: slots, Timeout: 3 * time.Second, Share: 100 * time.Millisecond,
			Backoff: 2 * time.Second, Max: 20 * time.Second, GiveUp: time.Minute, Jitter: rnd.Int64N})
		now, live, canceled := epoch0, map[uint64]bool{}, map[uint64]bool{}
		for i := range 300 {
			var in any = inTick{}
			switch k := rnd.IntN(20); {
			case k == 0 || i == 0:
				b := inBegin{State: 1 + 2*uint32(rnd.IntN(2))}
				for h := range 10 {
					if rnd.IntN(4) > 0 {
						b.Hosts = append(b.Hosts, hostNames{netip.AddrFrom4([4]byte{10, 0, 0, byte(h)}), nil})
					}
				}
				in = b
			case k < 12 && len(live) > 0:
				var id uint64
				for x := range live {
					if id == 0 || x < id {
						id = x
					}
				}
				delete(live, id)
				d := inDone{ID: id}
				if rnd.IntN(3) > 0 {
					d.Err = errors.New("x")
				}
				in = d
			}
			now = now.Add(time.Duration(rnd.IntN(1000)) * time.Millisecond)
			out, wake := e.step(now, in)
			for _, o := range out {
				switch o := o.(type) {
				case outSend:
					live[o.ID] = true
				case outCancel:
					if !live[o.ID] || canceled[o.ID] {
						t.Fatalf("seed %d: cancel of %d, live %v canceled %v", seed, o.ID, live[o.ID], canceled[o.ID])
					}
					canceled[o.ID] = true
				}
			}
			c := e.counts
			pending := 0
			for _, x := range e.targets {
				if x.phase == waiting || x.phase == ready || x.phase == running {
					pending++
				}
			}
			switch {
			case len(live) > slots || len(live) != len(e.attempts):
				t.Fatalf("seed %d: %d attempts, the engine has %d", seed, len(live), len(e.attempts))
			case c.Total != c.Told+c.Pending+c.Failed || c.Total != len(e.targets) || c.Pending != pending:
				t.Fatalf("seed %d: %+v, %d targets, %d pending", seed, c, len(e.targets), pending)
			case !wake.IsZero() && !wake.After(now):
				t.Fatalf("seed %d: tick at %v, now %v", seed, wake, now)
			case c.Pending > 0 && wake.IsZero() && len(live) == 0:
				t.Fatalf("seed %d: pending hosts, and nothing will happen", seed)
			}
		}
	}
}
