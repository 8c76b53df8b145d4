package manager

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// script is a world in a transcript. Times are in milliseconds since its beginning.
type script struct {
	t     *testing.T
	w     *world
	out   strings.Builder
	began time.Duration
	quiet bool
}

func (s *script) p(format string, args ...any) {
	if !s.quiet {
		fmt.Fprintf(&s.out, "  %d %s\n", (s.w.now - s.began).Milliseconds(), fmt.Sprintf(format, args...))
	}
}

func (s *script) duration(x string) time.Duration {
	d, err := time.ParseDuration(x)
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// world makes a new one: nodes NAMES [key=value of Config].
func (s *script) world(f []string) {
	var names []string
	cfg := DefaultConfig("")
	for _, x := range f {
		k, v, set := strings.Cut(x, "=")
		switch {
		case !set:
			names = append(names, x)
		case k == "quorum":
			cfg.Quorum = Quorum(v)
		case k == "failback" && v == "never":
			cfg.FailbackDelay = Never
		case k == "failback":
			cfg.FailbackDelay = s.duration(v)
		case k == "slow":
			cfg.SlowAfter = s.duration(v)
		case k == "parallel":
			fmt.Sscan(v, &cfg.ParallelMoves)
		default:
			s.t.Fatal(x)
		}
	}
	cfg.Node, cfg.Nodes = names[0], names
	s.w = newWorld(cfg)
	s.began = s.w.now
	s.w.decided = func(d *Decision, _ *mgs.VIP, err error) {
		if err != nil {
			s.p("refused: %v: %v", d, err)
		} else {
			s.p("%v", d)
		}
	}
	s.w.happened = func(e Event) {
		switch e.Kind {
		case NodeEvent:
			s.p("node %s: %s", e.Node, e.Text)
		case QuorumEvent:
			s.p("%s", e.Text)
		case AddressEvent:
			s.p("%s at %q to %q: %s", e.Addr, e.From, e.To, e.Text)
		}
	}
	s.w.served = func(n *wnode, index uint32, epoch uint64) {
		s.p("%s serves %s, epoch %d", n.name, s.w.reg.vip(index).Addr, epoch)
	}
}

func (s *script) line(line string) {
	f := strings.Fields(line)
	var n *wnode
	if len(f) > 1 && s.w != nil && slices.Contains(s.w.cfg.Nodes, f[1]) {
		n = s.w.node(f[1])
	}
	index := func() (i uint32) {
		if _, err := fmt.Sscan(f[1], &i); err != nil || s.w.reg.vip(i) == nil {
			s.t.Fatal(line)
		}
		return i
	}
	w := s.w
	switch f[0] {
	case "nodes":
		s.world(f[1:])
	case "vip": // ADDRESS [PREFERRED...]
		w.reg.add(f[1], f[2:]...)
	case "lead":
		if f[1] == "nobody" {
			w.resign()
		} else {
			w.takeLead(n)
		}
	case "kill":
		w.kill(n)
	case "freeze":
		n.frozen = true
	case "thaw":
		w.thaw(n)
	case "start":
		w.start(n)
	case "restart":
		w.kill(n)
		w.start(n)
	case "cut": // NODE NODE
		w.cut[[2]string{f[1], f[2]}] = true
	case "mend":
		clear(w.cut)
	case "unready": // NODE REASON
		n.unready = strings.Join(f[2:], " ")
	case "ready":
		n.unready, n.stuck, n.holds, n.fails, n.fumbles, n.slow = "", false, false, false, false, false
	case "stops":
		n.stopping = true
	case "slow":
		n.slow = true
	case "stuck":
		n.stuck = true
	case "holds":
		n.holds = true
	case "fails":
		n.fails = true
	case "fumbles": // it listens, and cannot take what it is to have
		n.fumbles = true
	case "broken": // NODE INDEX: what it serves there fails
		var i uint32
		fmt.Sscan(f[2], &i)
		n.units[i].state, n.units[i].since = Failed, w.now
	case "keeps", "silences": // NODE INDEX: its machine cannot get rid of the address; and it drops what comes
		var i uint32
		fmt.Sscan(f[2], &i)
		u := n.units[i]
		u.state, u.since, u.stuck, u.silent = Failed, w.now, true, f[0] == "silences"
	case "removes": // NODE INDEX: the address, after all
		var i uint32
		fmt.Sscan(f[2], &i)
		n.units[i].state, n.units[i].stuck = Releasing, false
	case "takes": // NODE INDEX: it takes the address still
		var i uint32
		fmt.Sscan(f[2], &i)
		*n.units[i] = unit{state: Taking, next: 1 << 62, since: w.now}
	case "load": // NODE CALLS
		fmt.Sscan(f[2], &n.load)
	case "mute": // answers beats and nothing else, as when it is out of memory
		n.slow, n.stuck, n.holds = true, true, true
		n.reply, n.asked = &Report{}, 1<<62
		n.answer = 1 << 62
	case "drain":
		w.reg.drained = append(w.reg.drained, n.name)
	case "undrain":
		w.reg.drained = slices.DeleteFunc(w.reg.drained, func(x string) bool { return x == n.name })
	case "registry": // away, back
		w.away = f[1] == "away"
	case "lag": // NODE DURATION: until the leader has its answer
		n.lag = s.duration(f[2])
	case "late": // DURATION: until the leader hears what it has had the registry do
		w.late = s.duration(f[1])
	case "assign": // INDEX NODE: by hand
		i := index()
		if _, err := w.reg.assign(i, w.reg.vip(i).Epoch, f[2]); err != nil {
			s.p("%v", err)
		}
	case "drained", "undrained": // INDEX
		v := w.reg.vip(index())
		if v.Drained = false; f[0] == "drained" {
			w.reg.drain(v)
		}
	case "remove":
		w.reg.vip(index()).Removed = true
	case "after": // DURATION [quietly]
		s.quiet = len(f) > 2
		for end := w.now + s.duration(f[1]); w.now < end; {
			w.step()
		}
		s.quiet = false
	case "pause": // DURATION: the leader's process does not run
		lead := w.lead
		lead.frozen = true
		for end := w.now + s.duration(f[1]); w.now < end; {
			w.step()
		}
		w.thaw(lead)
	case "vips":
		for i := range w.reg.vips {
			v := &w.reg.vips[i]
			x := ""
			if owner(v) != "" {
				x = " at " + v.Node
			}
			s.p("%s%s next %q epoch %d move %d", v.Addr, x, v.Next, v.Epoch, v.MoveID)
		}
	default:
		s.t.Fatalf("%q", line)
	}
}

// TestGolden runs testdata/golden.
func TestGolden(t *testing.T) {
	datadriven.Walk(t, "testdata/golden", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s := &script{t: t}
			for _, line := range strings.Split(strings.TrimSpace(d.Input), "\n") {
				if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
					continue
				}
				fmt.Fprintln(&s.out, line)
				s.line(line)
			}
			return s.out.String()
		})
	})
}
