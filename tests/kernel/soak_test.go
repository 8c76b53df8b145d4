package kernel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/kernel/sharelog"
	"github.com/baton-nfs/baton/tests/uml"
)

// soakEnv is how long TestTwoFrontends goes on, as time.ParseDuration reads it.
const soakEnv = "BATON_SOAK"

// southAddr is the address of the frontend that is killed.
const southAddr = "10.77.0.2"

// soakPatience is how long anything may take while targets die; only a hang takes longer.
const soakPatience = 4 * time.Minute

// soak is a cluster with two frontends, a guest at each, and what is done to it.
type soak struct {
	t       *testing.T
	w       *world
	c       *bed.Cluster
	members map[string]*bed.Member
	plan    *faultPlan
	at      map[string]string // node of a target now
	guests  []*uml.Guest
	began   time.Time
	orders  []chan error // outcomes of take-overs that have begun
	dumped  bool
	done    map[faultKind]int
}

// TestTwoFrontends lets two clients work on the same files through two frontends, under locks of all
// kinds, and on own files that the other one reads after they were closed, while one
// of the frontends and all targets are killed at random, come back, or are taken over.
// Every state that one of them leaves tells what it is, and the other compares it;
// nobody's change may be lost, no program see an error, and no lock be lost. In the end both
// clients have what the operations, one after the other, give.
// RS 70a, SM 50, SM 51, SM 52, QU 18, SC random-scale:fail_client_mds; by chance IN 1 to IN 8, own 14, own 15.
func TestTwoFrontends(t *testing.T) {
	length := 150 * time.Second
	if s := os.Getenv(soakEnv); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil || length <= 0 {
			t.Fatalf("%s=%q", soakEnv, s)
		}
	}
	s := &soak{t: t, done: map[faultKind]int{}, members: map[string]*bed.Member{
		// The frontend of the first client lives on, with whatever targets it takes over.
		"north": {Name: "north", Addr: netip.MustParseAddr("127.0.0.2"), Serve: netip.MustParseAddr(serverAddr)},
		"south": {Name: "south", Addr: netip.MustParseAddr("127.0.0.3"), Serve: netip.MustParseAddr(southAddr)},
		"meta":  {Name: "meta", Addr: netip.MustParseAddr("127.0.0.4"), Start: []string{"MGS", "MDT0000"}},
		"data":  {Name: "data", Addr: netip.MustParseAddr("127.0.0.5"), Start: []string{"OST0000", "OST0001"}},
	}}
	s.w = newWorldWith(t, bed.Config{}, func(cfg bed.Config) (bed.Server, error) {
		err := cfg.Node.AddAddr("br0", netip.MustParsePrefix(southAddr+"/24"))
		if err == nil {
			s.c, err = bed.NewCluster(cfg, s.members["north"], s.members["south"], s.members["meta"], s.members["data"])
		}
		if err != nil {
			return nil, err
		}
		s.c.Extra = "[fs]\nstripe_size = \"64 KiB\"\nstripe_count = 2\n"
		return s.c, nil
	})
	s.at = map[string]string{}
	for _, m := range s.members {
		for _, x := range m.Start {
			s.at[x] = m.Name
		}
	}
	seed := lockSeed(t)
	s.plan = newFaultPlan(seed, []string{"south", "meta", "data"}, []string{"north", "south", "meta", "data"}, []string{"north", "south"}, s.at)
	ctx, cancel := context.WithTimeout(context.Background(), 3*length+5*soakPatience)
	defer cancel()
	defer s.tell()
	for i, addr := range []string{serverAddr, southAddr} {
		// What the second client asks with stat(2) goes to its server.
		options, strict := "vers=3", ""
		if i == 1 {
			options, strict = "vers=3,actimeo=0", "-strict"
		}
		m := s.w.start(ctx, t, i, guest{options: options, server: addr, dir: "shared", mem: 512, host: fmt.Sprintf("client%c", 'a'+i), state: bed.Dir(t),
			script: fmt.Sprintf("$WORK share -control $OUT -seed %d -id %d -peer 10.77.0.%d %s .", seed, i, 11+1-i, strict)})
		t.Cleanup(m.Kill)
		s.guests = append(s.guests, m)
	}
	s.began = time.Now()
	t.Logf("   0.0 s: it is %s", s.began.UTC().Format("15:04:05"))
	s.moving(ctx)
	for n := 1; time.Since(s.began) < length; n++ {
		for _, f := range s.plan.next() {
			s.pause(ctx, f.after)
			t.Logf("%6.1f s: %s", time.Since(s.began).Seconds(), f)
			s.do(ctx, f)
		}
		s.ordered(ctx)
		if n%4 == 0 {
			s.moving(ctx)
		}
	}
	s.moving(ctx)
	s.order("stop")
	s.await(ctx, "quiet")
	s.order("compare")
	s.await(ctx, "final")
	s.compare()
	for i, m := range s.guests {
		r := finish(ctx, t, m)
		checkLocks(t, fmt.Sprintf("client%c", 'a'+i), r)
		t.Logf("guest %d:\n%s", i, lastLines(r.Output, 12))
	}
}

// do does one act of the schedule.
func (s *soak) do(ctx context.Context, f fault) {
	s.t.Helper()
	m := s.members[f.node]
	s.done[f.kind]++
	switch f.kind {
	case faultKill:
		m.Kill()
	case faultStart:
		m.Start = nil
		for _, x := range slices.Sorted(maps.Keys(s.at)) {
			if s.at[x] == f.node {
				m.Start = append(m.Start, x)
			}
		}
		if err := s.c.StartMember(ctx, m); err != nil {
			s.t.Fatal(err)
		}
	case faultTakeOver:
		// An OST waits for the MDT, which may be the next to come back.
		done := make(chan error, 1)
		go func() { done <- s.baton(ctx, m, "target", "start", f.target) }()
		s.orders = append(s.orders, done)
		s.at[f.target] = f.node
	case faultEvict:
		// A frontend in the process of the target, or one that is about to connect, is not evicted.
		out, err := s.c.Baton(ctx, s.members[s.at[f.target]], "target", "evict", f.target, f.node)
		if err != nil {
			s.t.Logf("%6.1f s: not evicted: %.300s", time.Since(s.began).Seconds(), out)
		}
	case faultMove:
		err := s.baton(ctx, s.members[f.from], "target", "stop", f.target)
		if err == nil {
			err = s.baton(ctx, m, "target", "start", f.target)
		}
		if err != nil {
			s.t.Fatal(err)
		}
		s.at[f.target] = f.node
	}
}

// baton gives an order to a node. One that has just been started does not listen yet.
func (s *soak) baton(ctx context.Context, m *bed.Member, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, soakPatience)
	defer cancel()
	for {
		out, err := s.c.Baton(ctx, m, args...)
		if err == nil {
			return nil
		}
		s.t.Logf("%6.1f s: %s: baton %v: %.300s", time.Since(s.began).Seconds(), m.Name, args, out)
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: baton %v: %w\n%s", m.Name, args, err, out)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// ordered waits until all take-overs have succeeded.
func (s *soak) ordered(ctx context.Context) {
	s.t.Helper()
	for _, done := range s.orders {
		s.until(ctx, "a take-over", func() bool {
			select {
			case err := <-done:
				if err != nil {
					s.t.Fatal(err)
				}
				return true
			default:
				return false
			}
		})
	}
	s.orders = nil
}

// pause lets the guests work.
func (s *soak) pause(ctx context.Context, d time.Duration) {
	s.t.Helper()
	for end := time.Now().Add(d); ; {
		s.look(ctx)
		left := time.Until(end)
		if left <= 0 {
			return
		}
		time.Sleep(min(left, 100*time.Millisecond))
	}
}

// look fails the test if a guest has found something or a node has ended by itself.
func (s *soak) look(ctx context.Context) {
	s.t.Helper()
	if ctx.Err() != nil {
		s.t.Fatal("the time is over")
	}
	for _, m := range s.members {
		if m.Ended() {
			s.t.Fatalf("node %s has ended by itself\n%s", m.Name, s.c.Log())
		}
	}
	for i, g := range s.guests {
		over := false
		select {
		case <-g.Done():
			over = true
		default:
		}
		if _, err := os.Stat(g.Path("failed")); err == nil || over {
			s.dump()
			s.order("stop")
			short, cancel := context.WithTimeout(ctx, 30*time.Second)
			finish(short, s.t, g)
			cancel()
			s.t.Fatalf("guest %d has failed", i)
		}
	}
}

// dump shows what the guests' kernels know, once.
func (s *soak) dump() {
	if s.dumped {
		return
	}
	s.dumped = true
	s.order("dump")
	time.Sleep(3 * time.Second)
	for i, g := range s.guests {
		dump, err := os.ReadFile(g.Path("dump.txt"))
		s.t.Logf("guest %d: %v\n%.12000s", i, err, dump)
	}
}

// order writes a file that the guests look for.
func (s *soak) order(name string) {
	s.t.Helper()
	for _, g := range s.guests {
		if err := os.WriteFile(g.Path(name), nil, 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
}

// await waits until all guests have written the file.
func (s *soak) await(ctx context.Context, name string) {
	s.t.Helper()
	s.until(ctx, name, func() bool {
		for _, g := range s.guests {
			if _, err := os.Stat(g.Path(name)); err != nil {
				return false
			}
		}
		return true
	})
}

func (s *soak) until(ctx context.Context, what string, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(soakPatience); !ok(); s.pause(ctx, 50*time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// progress is what each process does now, by its name.
func (s *soak) progress() map[string]string {
	all := map[string]string{}
	for i, g := range s.guests {
		for k := range 4 {
			b, _ := os.ReadFile(g.Path(fmt.Sprint("progress.", k)))
			all[fmt.Sprintf("guest %d process %d", i, 4*i+k)] = strings.TrimSpace(string(b))
		}
	}
	return all
}

// moving waits until each process of both guests has done something more.
func (s *soak) moving(ctx context.Context) {
	s.t.Helper()
	count := func(text string) (n int) {
		fmt.Sscan(text, &n)
		return n
	}
	before, start := s.progress(), time.Now()
	s.until(ctx, "all processes to get on", func() bool {
		for name, now := range s.progress() {
			if count(now) <= count(before[name]) {
				return false
			}
		}
		return true
	})
	s.t.Logf("%6.1f s: all get on, which took %.1f s", time.Since(s.began).Seconds(), time.Since(start).Seconds())
}

// compare compares what the guests have at the end with each other, and with
// what the operations that they noted make.
func (s *soak) compare() {
	s.t.Helper()
	type file struct {
		Size int64
		Data []byte
	}
	final := make([]map[string]file, len(s.guests))
	log := map[string][]sharelog.Op{}
	for i, g := range s.guests {
		b, err := os.ReadFile(g.Path("final"))
		if err == nil {
			err = json.Unmarshal(b, &final[i])
		}
		if err != nil {
			s.t.Fatal(err)
		}
		for k := range 4 {
			b, err := os.ReadFile(g.Path(fmt.Sprint("journal.", k)))
			if err != nil {
				s.t.Fatal(err)
			}
			for line := range bytes.Lines(b) {
				var o sharelog.Op
				if err := json.Unmarshal(line, &o); err != nil {
					s.t.Fatalf("journal: %v: %s", err, line)
				}
				log[o.File] = append(log[o.File], o)
			}
		}
	}
	want := map[string][]byte{}
	total := 0
	for name, ops := range log {
		slices.SortFunc(ops, func(a, b sharelog.Op) int { return int(a.Version) - int(b.Version) })
		total += len(ops)
		// A cell is a part of a file; the number at the end of its name says which.
		cell, zeros := -1, 0
		if n, _ := fmt.Sscanf(name, "cell%d", &cell); n == 1 {
			zeros = sharelog.CellLen
		}
		b, err := sharelog.Replay(ops, zeros)
		if err != nil {
			s.t.Errorf("%s: %v", name, err)
			continue
		}
		if cell < 0 {
			want[name] = b
			continue
		}
		// The file ends where somebody has written.
		end := int64(sharelog.HeadLen)
		for _, o := range ops {
			end = max(end, o.Off+o.Len)
		}
		at := sharelog.CellAt(cell)
		f := want["cells"]
		if grow := at + int(end) - len(f); grow > 0 {
			f = append(f, make([]byte, grow)...)
		}
		copy(f[at:], b)
		want["cells"] = f
	}
	for i, all := range final {
		if got, want := slices.Sorted(maps.Keys(all)), slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) {
			s.t.Errorf("guest %d has the files %v, want %v", i, got, want)
		}
		for name, f := range all {
			if f.Size != int64(len(f.Data)) || !bytes.Equal(f.Data, want[name]) {
				same := 0
				for same < min(len(f.Data), len(want[name])) && f.Data[same] == want[name][same] {
					same++
				}
				s.t.Errorf("guest %d: %s has %d bytes and %d are read, want %d; byte %d is the first that differs", i, name, f.Size, len(f.Data), len(want[name]), same)
				if name != "cells" {
					s.t.Logf("read\n%s\nwant\n%s", sharelog.Describe(f.Data), sharelog.Describe(want[name]))
				}
			}
		}
	}
	s.t.Logf("%d operations on %d files; %d steps of the schedule: %v", total, len(want), s.plan.n, s.done)
}

// tell shows what helps to understand a failure.
func (s *soak) tell() {
	if !s.t.Failed() {
		return
	}
	s.dump()
	for _, name := range slices.Sorted(maps.Keys(s.progress())) {
		s.t.Logf("%s: %s", name, s.progress()[name])
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	// Whether it is the guests' network that hangs: their portmappers answer otherwise.
	for i := range s.guests {
		short, end := context.WithTimeout(ctx, 3*time.Second)
		c, err := s.w.node.DialContext(short, "tcp", fmt.Sprintf("10.77.0.%d:111", 11+i))
		end()
		if err == nil {
			c.Close()
		}
		s.t.Logf("guest %d by its network: %v", i, err)
	}
	if out, err := s.w.node.Run(ctx, "ss", "-tnoi"); err == nil {
		s.t.Logf("connections:\n%.8000s", out)
	}
	for _, m := range s.members {
		if !m.Running() {
			s.t.Logf("%s does not run", m.Name)
			continue
		}
		for _, args := range [][]string{{"status"}, {"locks"}} {
			if out, err := s.c.Baton(ctx, m, args...); !errors.Is(err, context.DeadlineExceeded) {
				s.t.Logf("%v of %s: %v\n%.6000s", args, m.Name, err, out)
			}
		}
	}
}
