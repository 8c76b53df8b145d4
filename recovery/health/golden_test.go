package health

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// bench drives one machine by hand. Times are in milliseconds.
type bench struct {
	t       *testing.T
	m       *Machine
	now     time.Duration
	attempt map[string]uint64
	sends   map[string]int
	b       strings.Builder
}

func ms(d time.Duration) int64 { return d.Milliseconds() }

func eventText(e *Event) string {
	s := fmt.Sprintf("%s: %v", e.Peer, e.Kind)
	if e.Kind == Restarted || e.Kind == Alive {
		s += fmt.Sprintf(" incarnation=%d", e.Incarnation)
	}
	if e.Target != "" {
		s += fmt.Sprintf(" %s instance=%d", e.Target, e.Instance)
	}
	if e.VIP != (VIP{}) {
		s += fmt.Sprintf(" %d epoch=%d", e.VIP.Index, e.VIP.Epoch)
	}
	if e.From != "" {
		s += " from " + e.From
	}
	if e.Silence != 0 {
		s += fmt.Sprintf(" silence=%d", ms(e.Silence))
	}
	return s
}

func (b *bench) print(format string, args ...any) {
	fmt.Fprintf(&b.b, "  %d ", ms(b.now))
	fmt.Fprintf(&b.b, format, args...)
	b.b.WriteByte('\n')
}

func (b *bench) events() {
	for _, e := range b.m.Events() {
		b.print("%s", eventText(&e))
	}
}

// tick does for every peer what is due. Beats that are sent are counted.
func (b *bench) tick() {
	for _, p := range b.m.order {
		b.m.Due(p.name)
		s := b.m.Tick(b.now, p.name)
		b.events()
		if s.Drop {
			b.print("%s: drop connection", p.name)
		}
		if s.Dial != 0 {
			b.attempt[p.name] = s.Dial
			b.print("%s: dial", p.name)
		}
		if s.Send {
			var beat Beat
			b.m.Beat(p.name, &beat)
			if b.sends[p.name]++; b.sends[p.name] == 1 {
				b.print("%s: beat", p.name)
			}
		}
	}
}

// run lets time pass until at, with all that is due in it.
func (b *bench) run(at time.Duration) {
	for {
		next := at
		for _, p := range b.m.order {
			if due, ok := b.m.Due(p.name); ok {
				next = min(next, max(due, b.now))
			}
		}
		if next >= at {
			break
		}
		b.now = next
		b.tick()
	}
	b.now = at
	b.tick()
}

func parseTargets(t *testing.T, vals []string) (l []Target) {
	for _, v := range vals {
		f := strings.Split(v, ":")
		x := Target{Name: f[0], State: Serving}
		num := func(s string) uint64 {
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		x.Instance = num(f[1])
		for _, o := range f[2:] {
			switch k, v, _ := strings.Cut(o, "="); k {
			case "work":
				x.Work = uint32(num(v))
			case "done":
				x.Progress = num(v)
			default:
				for s := Starting; s <= Stopping; s++ {
					if s.String() == k {
						x.State = s
					}
				}
			}
		}
		l = append(l, x)
	}
	return l
}

func (b *bench) arg(d *datadriven.TestData, key string, v any) bool {
	if !d.HasArg(key) {
		return false
	}
	d.ScanArgs(b.t, key, v)
	return true
}

func (b *bench) millis(d *datadriven.TestData, key string, v *time.Duration) {
	var n int
	if b.arg(d, key, &n) {
		*v = time.Duration(n) * time.Millisecond
	}
}

func (b *bench) command(d *datadriven.TestData) {
	peer := ""
	if len(d.CmdArgs) > 0 && len(d.CmdArgs[0].Vals) == 0 {
		peer = d.CmdArgs[0].Key
	}
	list := func(key string) []string {
		for _, a := range d.CmdArgs {
			if a.Key == key {
				return a.Vals
			}
		}
		return nil
	}
	switch d.Cmd {
	case "new":
		cfg := Config{Node: peer, Incarnation: 100, Peers: list("peers")}
		b.millis(d, "interval", &cfg.Interval)
		b.millis(d, "upper", &cfg.Upper)
		b.arg(d, "known", &cfg.MaxKnown)
		m, err := New(cfg)
		if err != nil {
			b.t.Fatal(err)
		}
		*b = bench{t: b.t, m: m, attempt: map[string]uint64{}, sends: map[string]int{}}
	case "local":
		if err := b.m.SetLocal(b.now, Local{Targets: parseTargets(b.t, list("targets")), Peers: list("peers")}); err != nil {
			b.print("%v", err)
		}
		b.tick()
	case "run":
		var to time.Duration
		b.millis(d, "to", &to)
		b.run(to)
	case "sleep": // the node is not running
		b.millis(d, "to", &b.now)
		b.tick()
	case "connected":
		if !b.m.Connected(b.now, peer, b.attempt[peer]) {
			b.print("%s: close this connection", peer)
		}
		b.tick()
	case "broke":
		b.m.Broke(b.now, peer, b.attempt[peer])
		b.tick()
	case "left":
		b.m.Left(b.now, peer)
		b.tick()
	case "heard": // n beats, one every interval
		beat := Beat{Incarnation: 1, Interval: b.m.cfg.Interval, Want: true, Targets: parseTargets(b.t, list("targets"))}
		for _, text := range list("vips") {
			var v VIP
			if _, err := fmt.Sscanf(text, "%d:%d", &v.Index, &v.Epoch); err != nil {
				b.t.Fatalf("%s: %q: %v", d.Pos, text, err)
			}
			beat.VIPs = append(beat.VIPs, v)
		}
		every, n, via := 200*time.Millisecond, 1, Answer
		b.arg(d, "incarnation", &beat.Incarnation)
		b.arg(d, "n", &n)
		b.millis(d, "every", &every)
		b.millis(d, "interval", &beat.Interval)
		b.arg(d, "echo", &beat.Echo)
		if d.HasArg("request") {
			via = Request
		}
		if d.HasArg("bored") {
			beat.Want = false
		}
		beat.Seq = 1
		if p := b.m.peers[peer]; p != nil && p.incarnation == beat.Incarnation {
			beat.Seq = p.lastSeq + 1
		}
		b.arg(d, "seq", &beat.Seq)
		for i := range n {
			if i > 0 {
				b.run(b.now + every)
				beat.Seq++
			}
			beat.Round++
			if d.HasArg("unlooked") {
				beat.Round = 7
			}
			switch {
			case via == Request && !b.m.Allow(b.now, peer):
				b.print("%s: too many beats", peer)
			case !b.m.Heard(b.now, peer, &beat, via):
				b.print("%s: no news", peer)
			}
			b.events()
		}
		b.tick()
	case "status":
		for _, s := range b.m.Status(b.now) {
			if s.Name != peer {
				continue
			}
			b.print("%s: %v local=%v remote=%v timeout=%d gap=%d suspicions=%d wrong=%d late=%d limited=%d pauses=%d", s.Name, s.State, s.Local, s.Remote,
				ms(s.Timeout), ms(s.LongestGap), s.Suspicions, s.Wrong, s.Late, s.Limited, s.Pauses)
			for _, t := range s.Targets {
				b.print("  %s instance=%d %v current=%v slow=%v", t.Name, t.Instance, t.State, t.Current, t.Slow)
			}
		}
	case "present":
		for _, e := range b.m.Present() {
			b.print("%s", eventText(&e))
		}
	case "beat":
		var beat Beat
		b.m.Beat(peer, &beat)
		b.print("%s: seq=%d echo=%d want=%v targets=%d", peer, beat.Seq, beat.Echo, beat.Want, len(beat.Targets))
	default:
		b.t.Fatalf("%s: unknown command", d.Pos)
	}
	// Ticking again at once finds nothing more to do.
	before := b.b.Len()
	b.tick()
	if b.b.Len() != before {
		b.t.Errorf("%s: a second tick did something:\n%s", d.Pos, b.b.String()[before:])
	}
	for _, p := range b.m.order {
		b.m.Due(p.name)
	}
	peers := make([]string, 0, len(b.sends))
	for name := range b.sends {
		peers = append(peers, name)
	}
	slices.Sort(peers)
	for _, name := range peers {
		if n := b.sends[name]; n > 1 {
			b.print("%s: %d beats", name, n)
		}
	}
	clear(b.sends)
}

func TestMachineGolden(t *testing.T) {
	datadriven.Walk(t, "testdata/machine", func(t *testing.T, path string) {
		b := &bench{t: t}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			b.t = t
			if d.Cmd != "script" {
				t.Fatalf("%s: unknown directive", d.Pos)
			}
			var out strings.Builder
			for line := range strings.Lines(d.Input) {
				line = strings.TrimSpace(line)
				cmd, args, err := datadriven.ParseLine(line)
				if err != nil {
					t.Fatal(err)
				}
				b.b.Reset()
				b.command(&datadriven.TestData{Pos: d.Pos, Cmd: cmd, CmdArgs: args})
				fmt.Fprintf(&out, "%s\n%s", line, b.b.String())
				b.b.Reset()
			}
			return out.String()
		})
	})
}
