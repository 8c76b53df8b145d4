package ir

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// script is a table in a transcript.
type script struct {
	t     *testing.T
	cfg   Config
	inc   uint64
	now   time.Time
	table *Table
	conns map[string]uint64 // newest connection of a node
	num   uint64
	has   map[string]Watch // what a node has
	out   strings.Builder
}

var epoch = time.Unix(1_000_000, 0)

func (s *script) p(format string, args ...any) { fmt.Fprintf(&s.out, "  "+format+"\n", args...) }

func (s *script) answers(l []Answer) {
	for _, a := range slices.Clone(l) {
		who := a.Handle.(string)
		if a.News == nil {
			s.p("%s: refused", who)
			continue
		}
		n := a.News
		node, _, _ := strings.Cut(who, "/")
		w := s.has[node]
		w.Incarnation, w.Version = n.Incarnation, n.Version
		s.has[node] = w
		s.p("%s: table %d/%d %s", who, n.Incarnation, n.Version, n.State)
		if k := len(n.Targets); k > 4 {
			s.p("  %s ... %s", n.Targets[0].Name, n.Targets[k-1].Name)
			continue
		}
		for _, t := range n.Targets {
			s.p("  %s", entry(t))
		}
	}
}

func entry(t Target) string {
	x := fmt.Sprintf("%s at %s instance %d version %d", t.Name, t.Node, t.Instance, t.Version)
	if !t.Up {
		x += " stopped"
	}
	if t.NoIR {
		x += " noir"
	}
	return x
}

func (s *script) line(line string) {
	f := strings.Fields(line)
	opt := func(k string) bool { return slices.Contains(f, k) }
	num := func(k string, def uint64) uint64 {
		for _, x := range f {
			if v, ok := strings.CutPrefix(x, k+"="); ok {
				n, err := strconv.ParseUint(v, 10, 64)
				if err != nil {
					s.t.Fatal(line, err)
				}
				return n
			}
		}
		return def
	}
	switch f[0] {
	case "start": // of the registry
		s.inc++
		s.cfg = Config{Startup: 30 * time.Second, Keepalive: 10 * time.Second, Disabled: opt("disabled")}
		s.table = NewTable(s.cfg, s.inc, s.now)
		clear(s.conns)
	case "after":
		d, err := time.ParseDuration(f[1])
		if err != nil {
			s.t.Fatal(line, err)
		}
		for end := s.now.Add(d); ; {
			at, ok := s.table.NextTick()
			if !ok || at.After(end) {
				s.now = end
				break
			}
			s.now = at
			s.p("at %s", at.Sub(epoch))
			s.answers(s.table.Tick(at))
		}
	case "connect": // NODE: an authenticated connection
		s.num++
		s.conns[f[1]] = s.num
		s.table.Connected(f[1])
	case "watch": // NODE [unable] [conn=N] [has=INCARNATION version=N]
		if s.conns[f[1]] == 0 {
			s.num++
			s.conns[f[1]] = s.num
			s.table.Connected(f[1])
		}
		w := s.has[f[1]]
		w.Node, w.Able = f[1], !opt("unable")
		w.Incarnation, w.Version = num("has", w.Incarnation), num("version", w.Version)
		conn := num("conn", s.conns[f[1]])
		s.answers(s.table.Watch(w, conn, fmt.Sprintf("%s/%d", f[1], conn), s.now))
	case "gone": // NODE: its connection breaks
		conn := s.conns[f[1]]
		delete(s.conns, f[1])
		s.answers(s.table.Gone(num("conn", conn), f[1], true, s.now))
	case "up", "down": // TARGET NODE INSTANCE
		n, err := strconv.ParseUint(f[3], 10, 64)
		if err != nil {
			s.t.Fatal(line, err)
		}
		taken, out := s.table.Announce(Announcement{Target: f[1], Node: f[2], Instance: n, Up: f[0] == "up", NoIR: opt("noir")}, s.now)
		s.p("%d/%d %s late=%t", taken.Incarnation, taken.Version, taken.State, taken.Late)
		s.answers(out)
	case "many": // N targets start
		n, _ := strconv.Atoi(f[1])
		for i := range n {
			_, out := s.table.Announce(Announcement{Target: fmt.Sprintf("OST%04x", i), Node: "x", Instance: 1, Up: true}, s.now)
			s.answers(out)
		}
	case "close":
		s.answers(s.table.Close())
	case "status":
		st := s.table.Status(s.now)
		s.p("%d/%d %s startup %s nonir %d", st.Incarnation, st.Version, st.State, st.StartupLeft, st.NonIR)
		s.p("notified %d, %s, at most %s, pending %d", st.NotifyCount, st.NotifyTotal, st.NotifyMax, st.Pending)
		for _, n := range st.Nodes {
			s.p("%s watching=%t able=%t version=%d", n.Name, n.Watching, n.Able, n.Version)
		}
	case "targets":
		for _, t := range s.table.Targets() {
			s.p("%s", entry(t))
		}
	default:
		s.t.Fatalf("%q", line)
	}
}

// TestGolden runs testdata/*.txt.
func TestGolden(t *testing.T) {
	datadriven.Walk(t, "testdata/golden", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s := &script{t: t, now: epoch, conns: map[string]uint64{}, has: map[string]Watch{}}
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
