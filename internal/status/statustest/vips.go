package statustest

import (
	"net/netip"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/status"
)

// VIPs are floating addresses in all states.
func VIPs() []status.VIP {
	at := time.Date(2030, 1, 2, 3, 4, 0, 0, time.UTC)
	v := func(addr string, index uint32, f status.Floating) status.VIP {
		f.Bits = 24
		return status.VIP{Addr: addr, Index: index, Epoch: uint64(index) + 2, Verifier: "00000000000000c7", Floating: &f}
	}
	return []status.VIP{
		v("192.0.2.50", 1, status.Floating{Prefer: []string{"n1", "n2"}, Node: "n1", Next: "n1", MoveID: 7, NSMState: 3, Local: &status.VIPLocal{Node: "n1", Epoch: 3, State: status.VIPServing, Since: at}}),
		v("192.0.2.51", 2, status.Floating{Interface: "eth0", Node: "n1", Next: "n2", Ready: true, MoveID: 12, NSMState: 1, Local: &status.VIPLocal{Node: "n1", Epoch: 4, State: status.VIPReleasing, Since: at}}),
		v("192.0.2.52", 3, status.Floating{Node: "n2", Clean: true, Next: "n1", MoveID: 2, NSMState: 1, Local: &status.VIPLocal{Node: "n1", State: status.VIPFailed, Since: at, Reason: "no interface has the network\x1b[2J"}}),
		v("192.0.2.53", 4, status.Floating{Node: "n3", MoveID: 3, NSMState: 1}),
		v("192.0.2.54", 5, status.Floating{Node: "n3", Clean: true, Drained: true, MoveID: 4, NSMState: 1}),
		v("192.0.2.55", 6, status.Floating{Node: "n3", Drained: true, MoveID: 5, NSMState: 1}),
		v("192.0.2.56", 7, status.Floating{Node: "n3", Removed: true, MoveID: 6, NSMState: 1}),
		v("192.0.2.57", 8, status.Floating{Clean: true, NSMState: 1}),
	}
}

// Nodes are nodes in all states of health.
func Nodes() []status.ClusterNode {
	return []status.ClusterNode{
		{Name: "n1", This: true, State: "this", Serves: []string{"192.0.2.50", "192.0.2.51"}},
		{Name: "n2", State: status.PeerAlive, Silence: 120 * time.Millisecond, Serves: []string{}, Next: []string{"192.0.2.51"}},
		{Name: "n3", State: status.PeerSuspect, Silence: 93*time.Second + 40*time.Millisecond, Drained: true, Serves: []string{"192.0.2.53"}},
		{Name: "n4", State: status.PeerAlive, Slow: true, Serves: []string{}},
		{Name: "n5", State: status.PeerIdle, Serves: []string{}},
	}
}

// MoveEvents are those of a planned move of an address from n1 to n2, by time.
func MoveEvents(addr netip.Addr, move uint64) []events.Event {
	start := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	seq := map[string]uint64{"n1": 10, "n2": 20}
	var l []events.Event
	add := func(node string, at, took time.Duration, e events.Event) {
		seq[node]++
		e.Seq, e.Node, e.Time, e.Took = seq[node], node, start.Add(at), took
		e.Addr, e.VIP, e.Move = addr, 1, move
		l = append(l, e)
	}
	const ms = time.Millisecond
	stage := func(node, name string, at, took time.Duration, attrs map[string]string) {
		add(node, at, took, events.Event{Kind: events.Stage, Stage: name, Attrs: attrs})
	}
	add("n1", 0, 0, events.Event{Kind: events.Decision, From: "n1", To: "n2", Reason: "by order"})
	add("n2", 1*ms, 0, events.Event{Kind: events.Move, Stage: events.Begin, From: "n1", To: "n2", Epoch: 4})
	stage("n2", "listen", 3*ms, 2*ms, nil)
	add("n1", 5*ms, 0, events.Event{Kind: events.Move, Stage: events.Begin, From: "n1", To: "n2", Epoch: 3, Reason: "move"})
	stage("n1", "refuse", 6*ms, 800*time.Microsecond, nil)
	stage("n1", "drain", 14*ms, 8*ms, map[string]string{events.Conns: "5", events.Replies: "12", events.Left: "1"})
	stage("n1", "commit", 20*ms, 6*ms, nil)
	stage("n1", "remove", 21*ms, 300*time.Microsecond, nil)
	stage("n1", "close", 22*ms, 900*time.Microsecond, map[string]string{events.Orderly: "4", events.Forced: "1"})
	stage("n1", "clear", 23*ms, 400*time.Microsecond, map[string]string{events.Destroyed: "2"})
	stage("n2", "begin", 26*ms, 2*ms, nil)
	stage("n2", "add", 27*ms, 700*time.Microsecond, nil)
	stage("n2", "serve", 28*ms, 100*time.Microsecond, nil)
	stage("n2", "tickle", 29*ms, 500*time.Microsecond, map[string]string{events.Tickled: "5"})
	stage("n2", "notify", 30*ms, 200*time.Microsecond, map[string]string{events.Clients: "3"})
	add("n2", 31*ms, 30*ms, events.Event{Kind: events.Move, Stage: events.End, From: "n1", To: "n2", Epoch: 4, Attrs: map[string]string{events.Clients: "3"}})
	add("n1", 35*ms, 30*ms, events.Event{Kind: events.Move, Stage: events.End, From: "n1", To: "n2", Epoch: 3, Attrs: map[string]string{events.Replies: "12", events.Orderly: "4", events.Forced: "1", events.Destroyed: "2"}})
	return l
}
