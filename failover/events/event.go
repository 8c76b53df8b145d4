// Package events keeps what happened to service addresses on a node: every move with its stages, and why it was
// made. Memory and file are bounded; a disk that hangs delays nobody.
package events

import (
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Kinds of events.
const (
	Move     = "move"     // an address is given up or taken over: it begins, or has ended (Stage Begin or End)
	Stage    = "stage"    // one stage of that, ended
	Decision = "decision" // somebody decided who serves an address
	Fence    = "fence"    // a node learned that another one serves its address
	Drain    = "drain"    // a node is drained, or no longer
	Node     = "node"     // a node came, went, or was found dead
)

// Values of Stage of a Move event.
const (
	Begin = "begin"
	End   = "end"
)

// Names of Attrs that teardowns and take-overs set; all are numbers.
const (
	Replies   = "replies"   // to calls that were in progress when the drain began
	Conns     = "conns"     // connections there were
	Left      = "left"      // connections that were not through at the drain's deadline
	Orderly   = "orderly"   // connections that ended in order
	Forced    = "forced"    // connections reset or destroyed before everything was acknowledged
	Destroyed = "destroyed" // sockets destroyed
	Remaining = "remaining" // sockets that could not be
	Tickled   = "tickled"   // connections of the last owner whose clients were woken up
	Clients   = "clients"   // clients that are told to reclaim their locks
)

// Event is a line of the log. Only Seq, Time, Node and Kind are always set.
type Event struct {
	Seq   uint64        `json:"seq"` // consecutive on its node, from 1
	Time  time.Time     `json:"time"`
	Node  string        `json:"node"` // that logged it
	Kind  string        `json:"kind"`
	Addr  netip.Addr    `json:"addr,omitzero"`
	VIP   uint32        `json:"vip,omitempty"`   // index in the registry
	Epoch uint64        `json:"epoch,omitempty"` // the period of service that ends, or begins
	Move  uint64        `json:"move,omitempty"`  // number of the assignment in the registry
	Stage string        `json:"stage,omitempty"`
	From  string        `json:"from,omitempty"` // node
	To    string        `json:"to,omitempty"`   // node
	Took  time.Duration `json:"took,omitempty"` // ns
	// Reason is why it is done; at the end of a move also what came of it.
	Reason string            `json:"reason,omitempty"`
	Attrs  map[string]string `json:"attrs,omitempty"`
	Err    string            `json:"err,omitempty"`
}

// Int returns the number in an attribute, 0 if there is none.
func (e *Event) Int(name string) int64 {
	n, _ := strconv.ParseInt(e.Attrs[name], 10, 64)
	return n
}

// SetInt sets an attribute to a number. The map is the event's own.
func (e *Event) SetInt(name string, n int64) {
	if e.Attrs == nil {
		e.Attrs = make(map[string]string)
	}
	e.Attrs[name] = strconv.FormatInt(n, 10)
}

// Bounds of an event, in bytes and elements. Longer texts are cut.
const (
	maxText  = 1024
	maxName  = 256
	maxAttrs = 32
)

// bound returns a copy of e with texts cut to their bounds, which shares nothing with it.
func (e *Event) bound() Event {
	b := *e
	b.Node, b.Kind, b.Stage = cut(e.Node, maxName), cut(e.Kind, maxName), cut(e.Stage, maxName)
	b.From, b.To = cut(e.From, maxName), cut(e.To, maxName)
	b.Reason, b.Err = cut(e.Reason, maxText), cut(e.Err, maxText)
	b.Attrs = nil
	for k, v := range e.Attrs {
		if len(b.Attrs) == maxAttrs {
			break
		}
		if b.Attrs == nil {
			b.Attrs = make(map[string]string, len(e.Attrs))
		}
		b.Attrs[cut(k, maxName)] = cut(v, maxName)
	}
	return b
}

// cut makes s valid UTF-8 of at most n bytes.
func cut(s string, n int) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= n {
		return s
	}
	const dots = "..."
	n -= len(dots)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + dots
}
