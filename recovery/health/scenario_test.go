package health

import (
	"testing"
	"time"
)

// calm is a simulation in which everybody is interested in everybody, at rest.
func calm(t *testing.T, intervals ...time.Duration) *sim {
	s := newSim(t, 1)
	for i, d := range intervals {
		n := s.nodes[i]
		s.kill(n, true)
		n.interval = d
		s.start(n)
	}
	for i, x := range s.targets {
		s.startTarget(x, s.nodes[i])
	}
	s.heal()
	s.run(s.now + 30*time.Second)
	return s
}

func (s *sim) link(a, b int) (x, y *simNode) { return s.nodes[a], s.nodes[b] }

// suspects is how often a has suspected b.
func (s *sim) suspects(a, b *simNode) uint64 { return s.peer(a, b).Suspicions }

func (s *sim) peer(a, b *simNode) PeerStatus {
	for _, p := range a.m.Status(s.now) {
		if p.Name == b.name {
			return p
		}
	}
	s.fatalf("%s does not know %s", a.name, b.name)
	return PeerStatus{}
}

// all sums up a figure over all pairs of nodes.
func (s *sim) all(f func(PeerStatus) uint64) (n uint64) {
	for _, a := range s.nodes {
		for _, p := range a.m.Status(s.now) {
			n += f(p)
		}
	}
	return n
}

// breaks ends the connection that a has dialled to b.
func (s *sim) breaks(a, b *simNode) {
	c := a.conns[b.name]
	if c == nil {
		s.fatalf("%s has no connection to %s", a.name, b.name)
	}
	c.leave()
	a.to(s.delay(), func() { c.broke() })
}

func suspicions(p PeerStatus) uint64 { return p.Suspicions }

// wants checks what a node thinks of another one.
func (s *sim) wants(a, b *simNode, state PeerState) {
	if p := s.peer(a, b); p.State != state {
		s.fatalf("%s takes %s for %v, want %v: %+v", a.name, b.name, p.State, state, p)
	}
}

// untouched checks that nobody has taken a target for gone, moved or started anew since seen
// was as was.
func (s *sim) untouched(was map[Kind]int) {
	for _, k := range []Kind{Restarted, TargetUp, TargetMoved, TargetGone} {
		if s.seen[k] != was[k] {
			s.fatalf("%d events %q, before %d", s.seen[k], k, was[k])
		}
	}
}

// TestNetworkScenarios shows what becomes of a node's view of others when paths between
// them fail, and when they are slow.
func TestNetworkScenarios(t *testing.T) {
	copied := func(m map[Kind]int) map[Kind]int {
		c := map[Kind]int{}
		for k, n := range m {
			c[k] = n
		}
		return c
	}
	for name, f := range map[string]func(*testing.T){
		// LN 204, LN 206: the only path fails for a moment, here or there: it is dialled again
		// and nobody is suspected, no matter how often.
		"one-path-short": func(t *testing.T) {
			s := calm(t)
			was, now := copied(s.seen), s.all(suspicions)
			for i := range 20 {
				a, b := s.link(i%3, 3)
				if i%2 == 0 {
					s.breaks(a, b)
				} else {
					s.cut[pairOf(a, b)] = true
					s.run(s.now + 250*time.Millisecond)
					delete(s.cut, pairOf(a, b))
				}
				s.run(s.now + 5*time.Second)
				s.wants(a, b, StateAlive)
				s.wants(b, a, StateAlive)
			}
			if n := s.all(suspicions); n != now {
				s.fatalf("%d suspicions", n-now)
			}
			s.untouched(was)
		},
		// LN 205, LN 207: a node cannot dial another one any more. The other one dials, and
		// after a suspicion at the most all goes on by that path.
		"other-path": func(t *testing.T) {
			for way := range 2 {
				s := calm(t)
				was := copied(s.seen)
				a, b := s.link(0, 1)
				s.deaf[[2]int{way, 1 - way}] = true
				s.breaks(a, b)
				s.trouble = s.now
				s.run(s.now + 10*time.Second)
				got, n := s.peer(a, b).Received, s.suspects(a, b)+s.suspects(b, a)
				s.run(s.now + time.Minute)
				s.wants(a, b, StateAlive)
				s.wants(b, a, StateAlive)
				if s.peer(a, b).Received < got+250 {
					s.fatalf("only %d beats in a minute", s.peer(a, b).Received-got)
				}
				if k := s.suspects(a, b) + s.suspects(b, a); k != n {
					s.fatalf("%d suspicions while one path is open", k-n)
				}
				s.untouched(was)
			}
		},
		// LN 209, LN 252, LN 218: a path that swallows everything leads to a suspicion within the
		// bounds, to attempts from both sides, not many of them, and to nothing else: nothing is sent
		// twice. LN 210, LN 211: when the path is back the first beat ends it.
		"dead-path": func(t *testing.T) {
			s := calm(t)
			was := copied(s.seen)
			a, b := s.link(0, 1)
			da, db := s.peer(a, b).Dials, s.peer(b, a).Dials
			s.cut[pairOf(a, b)] = true
			s.trouble = s.now
			s.run(s.now + 6*time.Second)
			s.wants(a, b, StateSuspect)
			s.wants(b, a, StateSuspect)
			sent := s.peer(a, b).Sent + s.peer(b, a).Sent
			s.run(s.now + time.Minute)
			if n := s.peer(a, b).Sent + s.peer(b, a).Sent; n > sent {
				s.fatalf("%d beats were sent without a connection", n-sent)
			}
			da, db = s.peer(a, b).Dials-da, s.peer(b, a).Dials-db
			if da < 10 || db < 10 || da > 66 || db > 66 {
				s.fatalf("%d and %d attempts in 66 s", da, db)
			}
			delete(s.cut, pairOf(a, b))
			s.trouble = s.now
			s.run(s.now + 4*time.Second) // an attempt may still have to end
			s.wants(a, b, StateAlive)
			s.wants(b, a, StateAlive)
			if p := s.peer(a, b); p.Wrong != 1 || p.Suspicions != 1 || p.Late != 0 {
				s.fatalf("%+v", p)
			}
			s.untouched(was)
		},
		// LN 303: the link of one node fails and comes back. The others see nothing of each other.
		"link-down": func(t *testing.T) {
			s := calm(t)
			was := copied(s.seen)
			x := s.nodes[2]
			for _, n := range s.nodes {
				s.cut[pairOf(n, x)] = true
			}
			s.trouble = s.now
			s.run(s.now + 20*time.Second)
			for _, n := range s.nodes {
				for _, o := range s.nodes {
					switch {
					case n == o:
					case n == x || o == x:
						s.wants(n, o, StateSuspect)
					default:
						s.wants(n, o, StateAlive)
						if s.suspects(n, o) > 0 {
							s.fatalf("%s has suspected %s", n.name, o.name)
						}
					}
				}
			}
			clear(s.cut)
			s.run(s.now + 4*time.Second)
			for _, n := range s.nodes {
				if n != x {
					s.wants(n, x, StateAlive)
					s.wants(x, n, StateAlive)
				}
			}
			s.untouched(was)
		},
		// LN 231: nodes with different intervals. Nobody expects more than the slower one says.
		"intervals": func(t *testing.T) {
			s := calm(t, 50*time.Millisecond, 200*time.Millisecond, 2*time.Second)
			n := s.all(suspicions)
			s.run(s.now + 10*time.Minute)
			if k := s.all(suspicions); k != n {
				s.fatalf("%d suspicions though all beat as they say", k-n)
			}
			for _, a := range s.nodes[:2] {
				if p := s.peer(a, s.nodes[2]); p.Timeout < 8*time.Second {
					s.fatalf("%s expects %s every 2 s and waits %v", a.name, p.Name, p.Timeout)
				}
			}
			if p := s.peer(s.nodes[0], s.nodes[1]); p.Timeout > 2*time.Second {
				s.fatalf("%s waits %v for %s", s.nodes[0].name, p.Timeout, p.Name)
			}
			x := s.nodes[2]
			s.kill(x, false)
			s.run(s.now + 17*time.Second)
			s.wants(s.nodes[0], x, StateSuspect)
			s.wants(s.nodes[1], x, StateSuspect)
		},
		// LN 253: what a dead connection or an earlier process has left on its way counts for nothing.
		"late-beats": func(t *testing.T) {
			s := calm(t)
			a, b := s.link(0, 1)
			s.late[pairOf(a, b)] = 250 * time.Millisecond
			s.run(s.now + 3*time.Second)
			s.kill(b, false)
			s.start(b)
			s.late[pairOf(a, b)] = 0
			s.trouble = s.now
			s.run(s.now + 20*time.Second)
			s.wants(a, b, StateAlive)
			if p := s.peer(a, b); p.Incarnation != b.incarnation || p.Restarts != 1 {
				s.fatalf("%+v", p)
			}
		},
		// RS 66b, RS 67a: a path gets slower step by step. The time-out follows, up and
		// down, and nobody is suspected.
		"slower-and-slower": func(t *testing.T) {
			s := calm(t)
			a, b := s.link(0, 1)
			n, top := s.all(suspicions), time.Duration(0)
			for d, more := 20*time.Millisecond, true; d > 10*time.Millisecond; {
				s.late[pairOf(a, b)] = d
				s.run(s.now + 5*time.Second)
				top = max(top, s.peer(a, b).Timeout)
				s.wants(a, b, StateAlive)
				s.wants(b, a, StateAlive)
				if more = more && d < 1500*time.Millisecond; more {
					d += d / 5
				} else {
					d -= d / 5
				}
			}
			s.late[pairOf(a, b)] = 0
			s.run(s.now + time.Minute)
			if k := s.all(suspicions); k != n {
				s.fatalf("%d suspicions", k-n)
			}
			if end := s.peer(a, b).Timeout; end != 800*time.Millisecond || top < 3*end/2 {
				s.fatalf("the time-out was %v and is %v", top, end)
			}
		},
		// RS 66a, RS 67b: all of a node stands still now and then, for longer than anybody has to
		// wait. After the first times the others know, and when it is better they forget it.
		"stand-still": func(t *testing.T) {
			s := calm(t)
			a, b := s.link(0, 1)
			was := copied(s.seen)
			for range 12 {
				b.until = s.now + 1500*time.Millisecond
				s.trouble = b.until
				s.run(s.now + 1700*time.Millisecond)
			}
			n := s.suspects(a, b)
			if n == 0 || n > 6 {
				s.fatalf("%d suspicions of 12 pauses", n)
			}
			if s.suspects(b, a) > 0 {
				s.fatalf("who stands still suspects others")
			}
			s.wants(a, b, StateAlive)
			s.run(s.now + 2*time.Minute)
			if d := s.peer(a, b).Timeout; d != 800*time.Millisecond {
				s.fatalf("the time-out stays at %v", d)
			}
			s.untouched(was)
		},
	} {
		t.Run(name, f)
	}
}
