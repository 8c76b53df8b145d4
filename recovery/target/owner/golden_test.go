package owner

import (
	"fmt"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// disk is a file of records in memory.
type disk struct {
	b []byte
}

func (d *disk) write(off int64, r *Record) {
	for len(d.b) < FileSize {
		d.b = append(d.b, 0)
	}
	r.encode(d.b[off : off+BlockSize])
}

func (d *disk) snapshot() *Snapshot {
	s := new(Snapshot)
	s.decode(d.b)
	return s
}

// tray is a machine in a transcript. Times are in milliseconds.
type tray struct {
	m      *Machine
	io     *Action // under way
	landed bool
	snap   *Snapshot // of a read that has looked at the disk
	timer  int64
	owned  bool
}

type script struct {
	t     *testing.T
	d     disk
	now   int64
	trays map[string]*tray
	out   strings.Builder
}

func (s *script) names() []string {
	var n []string
	for k := range s.trays {
		n = append(n, k)
	}
	sort.Strings(n)
	return n
}

func ms(ns int64) int64 { return ns / 1e6 }

func (s *script) collect(name string) {
	x := s.trays[name]
	for _, a := range x.m.Actions() {
		r := &a.Record
		line := ""
		switch a.Kind {
		case ActRead, ActWrite, ActMark:
			if x.io != nil {
				s.t.Errorf("%s: two accesses at a time", name)
			}
			c := a
			x.io, x.landed, x.snap = &c, false, nil
			switch a.Kind {
			case ActWrite:
				line = fmt.Sprintf("write copy %d: generation %d seq %d %v", a.Slot, r.Generation, r.Seq, r.State)
			case ActMark:
				line = fmt.Sprintf("mark %d", r.Seq)
			}
		case ActTimer:
			x.timer = a.At
		case ActAcquired:
			x.owned = true
			line = fmt.Sprintf("OWNED generation %d until %d", r.Generation, ms(a.At))
			if a.Prev != nil {
				line += fmt.Sprintf(", before %s %v", a.Prev.Node, a.Prev.State)
			}
		case ActExtend:
			line = fmt.Sprintf("owned until %d", ms(a.At))
		case ActRefused:
			line = fmt.Sprintf("REFUSED: %v", a.Err)
		case ActLost:
			x.owned = false
			line = fmt.Sprintf("LOST: %v", a.Err)
		case ActReleased:
			x.owned = false
			line = "released"
			if a.Err != nil {
				line = fmt.Sprintf("NOT RELEASED: %v", a.Err)
			}
		case ActWanted:
			line = fmt.Sprintf("wanted by %s", r.Node)
		}
		if line != "" {
			fmt.Fprintf(&s.out, "%6d %s: %s\n", ms(s.now), name, line)
		}
	}
}

// land lets an access have its effect on the disk.
func (s *script) land(x *tray) {
	if x.landed || x.io == nil {
		return
	}
	x.landed = true
	switch x.io.Kind {
	case ActRead:
		x.snap = s.d.snapshot()
	case ActWrite:
		s.d.write(int64(x.io.Slot)*BlockSize, &x.io.Record)
	case ActMark:
		s.d.write(markOffset, &x.io.Record)
	}
}

// end tells the machine the result of its access.
func (s *script) end(name string, err error) {
	x := s.trays[name]
	a := x.io
	if a == nil {
		s.t.Fatalf("%s accesses nothing", name)
	}
	if err == nil {
		s.land(x)
	}
	x.io = nil
	if a.Kind == ActRead {
		x.m.Read(s.now, x.snap, err)
	} else {
		x.m.Wrote(s.now, err)
	}
	s.collect(name)
}

// run lets everything go on until a time, accesses taking no time, except of those
// that are stopped.
func (s *script) run(until int64, stopped map[string]bool) {
	for {
		who := ""
		for _, n := range s.names() {
			x := s.trays[n]
			switch {
			case stopped[n]:
			case x.io != nil:
				who = n
			case x.timer > 0 && (who == "" || s.trays[who].io == nil && x.timer < s.trays[who].timer):
				who = n
			}
			if who == n && x.io != nil {
				break
			}
		}
		if who == "" {
			break
		}
		x := s.trays[who]
		if x.io != nil {
			s.end(who, nil)
			continue
		}
		if x.timer > until {
			break
		}
		s.now = max(s.now, x.timer)
		x.timer = 0
		x.m.Tick(s.now)
		s.collect(who)
	}
	s.now = max(s.now, until)
}

func (s *script) show() {
	snap := s.d.snapshot()
	for i, p := range []*Slot{&snap.Slots[0], &snap.Slots[1], &snap.Mark} {
		name := []string{"copy 0", "copy 1", "mark"}[i]
		switch {
		case p.OK:
			fmt.Fprintf(&s.out, "  %s: %s generation %d seq %d %v\n", name, p.Record.Node, p.Record.Generation, p.Record.Seq, p.Record.State)
		case p.Empty:
			fmt.Fprintf(&s.out, "  %s: nothing\n", name)
		default:
			fmt.Fprintf(&s.out, "  %s: damaged\n", name)
		}
	}
}

// The transcripts cover MM 1 to MM 10 and CS 41c.
func TestGolden(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		if strings.Contains(path, "fuzz") {
			return
		}
		datadriven.RunTest(t, path, func(t *testing.T, td *datadriven.TestData) string {
			s := &script{t: t, trays: map[string]*tray{}}
			for _, line := range strings.Split(td.Input, "\n") {
				f := strings.Fields(line)
				if len(f) == 0 || f[0][0] == '#' {
					continue
				}
				s.step(f)
			}
			return s.out.String()
		})
	})
}

// step executes one line:
//
//	start NODE [interval=MS] [wait] [check] [fenced=NODE] [exclusive] [boot=ID]
//	run MS [stopped NODE...]    everything goes on until a time
//	at MS                       time passes and nobody notices
//	land NODE                   its access has its effect on the disk
//	end NODE [error]            its access ends
//	tick NODE                   its timer fires
//	release NODE, cancel NODE, expired NODE
//	kill NODE                   it is gone
//	damage 0|1, remove, disk
func (s *script) step(f []string) {
	opt := map[string]string{}
	for _, a := range f[1:] {
		k, v, _ := strings.Cut(a, "=")
		opt[k] = v
	}
	_, wait := opt["wait"]
	_, check := opt["check"]
	_, exclusive := opt["exclusive"]
	num := func(v string, def int64) int64 {
		if v == "" {
			return def
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			s.t.Fatal(err)
		}
		return n
	}
	who := ""
	if len(f) > 1 {
		who = f[1]
	}
	x := s.trays[who]
	switch f[0] {
	case "start":
		c := Config{Node: who, Boot: opt["boot"], Interval: time.Duration(num(opt["interval"], 1000)) * time.Millisecond,
			Wait: wait, Check: check, Fenced: opt["fenced"], Exclusive: exclusive, Generation: 1000}
		// A new one each time: the second start of a node is another incarnation.
		copy(c.Incarnation[8:], fmt.Sprint(who, s.now))
		s.trays[who] = &tray{m: NewMachine(c)}
		s.trays[who].m.Start(s.now)
		s.collect(who)
	case "run":
		stopped := map[string]bool{}
		for _, n := range f[2:] {
			stopped[n] = true
		}
		s.run(num(f[1], 0)*1e6, stopped)
	case "at":
		s.now = num(f[1], 0) * 1e6
	case "land":
		s.land(x)
	case "end":
		var err error
		if len(f) > 2 {
			err = fmt.Errorf("%s", strings.Join(f[2:], " "))
		}
		s.end(who, err)
	case "tick":
		x.m.Tick(s.now)
		s.collect(who)
	case "expired":
		x.m.Expired()
		s.collect(who)
	case "release":
		x.m.Release(s.now)
		s.collect(who)
	case "cancel":
		x.m.Cancel(fmt.Errorf("cancelled"))
		s.collect(who)
	case "kill":
		delete(s.trays, who)
	case "damage":
		s.d.b[num(who, 0)*BlockSize+100] ^= 1
	case "remove":
		s.d.b = nil
	case "disk":
		s.show()
	default:
		s.t.Fatalf("unknown line %v", f)
	}
	owners := 0
	for _, x := range s.trays {
		if x.owned && s.now < x.m.until {
			owners++
		}
	}
	if owners > 1 {
		s.t.Errorf("%d owners at %d ms", owners, ms(s.now))
	}
}
