package status

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/baton-nfs/baton/failover/events"
)

// MoveSummary is what a move of an address came to, by its events.
type MoveSummary struct {
	Addr   string `json:"addr"`
	From   string `json:"from,omitempty"` // empty: nobody served it
	To     string `json:"to"`
	MoveID uint64 `json:"move_id"`
	// Error is why it has failed.
	Error string `json:"error,omitempty"`
	// Replies were sent to calls that were in progress.
	Replies int64 `json:"replies"`
	// Orderly connections ended after everything was acknowledged, Forced ones before;
	// Destroyed are sockets that were left and destroyed.
	Orderly   int64 `json:"orderly"`
	Forced    int64 `json:"forced"`
	Destroyed int64 `json:"destroyed"`
	// Clients are told to reclaim their locks.
	Clients int64 `json:"clients"`
	// Pause is from the end of the drain to when the new node serves, by the clocks of
	// both; 0: not known, because one of them told nothing.
	Pause time.Duration `json:"pause_ns"`
	// Total is from the first event to the last.
	Total  time.Duration  `json:"total_ns"`
	Events []events.Event `json:"events"`
}

// SummarizeMove makes the summary of a move from its events, in any order.
func SummarizeMove(addr netip.Addr, from, to string, move uint64, l []events.Event) MoveSummary {
	s := MoveSummary{Addr: addr.String(), From: from, To: to, MoveID: move, Events: []events.Event{}}
	var first, last, held, served time.Time
	var mine []events.Event
	for i := range l {
		e := &l[i]
		s.Events = append(s.Events, *e)
		if e.Move != 0 && e.Move != move {
			continue
		}
		mine = append(mine, *e)
		if first.IsZero() || e.Time.Before(first) {
			first = e.Time
		}
		if e.Time.After(last) {
			last = e.Time
		}
		if e.Kind != events.Stage {
			continue
		}
		switch {
		case e.Node == from && (e.Stage == "drain" || e.Stage == "refuse") && e.Time.After(held):
			held = e.Time
		case e.Node == to && (e.Stage == "serve" || e.Stage == "add") && e.Err == "" && e.Time.After(served):
			served = e.Time // the address may come after its services are ready
		}
	}
	for name, n := range map[string]*int64{events.Replies: &s.Replies, events.Orderly: &s.Orderly, events.Forced: &s.Forced,
		events.Destroyed: &s.Destroyed, events.Clients: &s.Clients} {
		*n = total(mine, name)
	}
	s.Total = last.Sub(first)
	if !held.IsZero() && served.After(held) {
		s.Pause = served.Sub(held)
	}
	return s
}

// total adds up a number that events tell: that of a node's last word about the move,
// if it has it, else those of its stages.
func total(l []events.Event, name string) int64 {
	ends, stages := map[string]int64{}, map[string]int64{}
	for i := range l {
		e := &l[i]
		if _, ok := e.Attrs[name]; !ok {
			continue
		}
		switch {
		case e.Kind == events.Move && e.Stage == events.End:
			ends[e.Node] = e.Int(name)
		case e.Kind == events.Stage:
			stages[e.Node] += e.Int(name)
		}
	}
	var n int64
	for node, x := range stages {
		if _, ok := ends[node]; !ok {
			n += x
		}
	}
	for _, x := range ends {
		n += x
	}
	return n
}

// ProgressText is an event of a move that began at start, in one line.
func ProgressText(e *events.Event, start time.Time) string {
	x := *e
	x.Move = 0
	return fmt.Sprintf("  %+9.1f ms  %-8s  %-8s%s\n", float64(x.Time.Sub(start))/float64(time.Millisecond), clean(x.Node), clean(x.Kind), eventRest(&x))
}

// MoveText writes a summary for people. Why a move has failed is said elsewhere.
func MoveText(w io.Writer, s *MoveSummary) error {
	var b bytes.Buffer
	from := s.From
	if from == "" {
		from = "nobody"
	}
	word := "moved"
	if s.Error != "" {
		word = "NOT moved"
	}
	fmt.Fprintf(&b, "%s %s from %s to %s", clean(s.Addr), word, clean(from), clean(s.To))
	if len(s.Events) > 0 {
		fmt.Fprintf(&b, " in %s", Millis(s.Total))
	}
	fmt.Fprintf(&b, ", move %d\n", s.MoveID)
	if len(s.Events) > 0 && s.Error == "" {
		pause := "not known: a node does not tell when it served"
		if s.Pause > 0 {
			pause = Millis(s.Pause)
		}
		fmt.Fprintf(&b, "  RPCs drained   %d\n  connections    %d closed in order, %d cut off; %d left sockets destroyed\n  clients        %d notified\n  pause          %s\n",
			s.Replies, s.Orderly, s.Forced, s.Destroyed, s.Clients, pause)
	}
	_, err := w.Write(b.Bytes())
	return err
}
