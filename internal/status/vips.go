package status

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/baton-nfs/baton/failover/events"
)

// Floating is a floating address in the registry, and on the node that was asked.
type Floating struct {
	Bits      int      `json:"bits"`
	Interface string   `json:"interface,omitempty"`
	Prefer    []string `json:"prefer,omitempty"`
	// Node serves the address or, with Clean, was the last to do so.
	Node  string `json:"node,omitempty"`
	Clean bool   `json:"clean"`
	// Next is the node it is assigned to, by the assignment MoveID; Ready: it listens.
	Next     string `json:"next,omitempty"`
	MoveID   uint64 `json:"move_id"`
	Ready    bool   `json:"ready"`
	Drained  bool   `json:"drained"`
	Removed  bool   `json:"removed"`
	NSMState uint32 `json:"nsm_state"`
	// Local is the address on the node that was asked; nil when it has nothing to do
	// with addresses that float.
	Local *VIPLocal `json:"local,omitempty"`
}

// States of a VIPLocal.
const (
	VIPAbsent    = "absent"
	VIPListening = "listening" // ready to take it
	VIPTaking    = "taking"
	VIPServing   = "serving"
	VIPReleasing = "releasing"
	VIPFailed    = "failed"
)

// VIPLocal is a floating address on one node.
type VIPLocal struct {
	Node   string    `json:"node"`
	Epoch  uint64    `json:"epoch"`
	State  string    `json:"state"`
	Since  time.Time `json:"since"`
	Reason string    `json:"reason,omitempty"`
}

// State says in a word where an address is on its way.
func (f *Floating) State() string {
	served := !f.Clean && f.Node != ""
	switch {
	case f.Removed:
		return "removing"
	case served && f.Drained:
		return "draining"
	case f.Drained:
		return "drained"
	case served && f.Next == "":
		return "stopping"
	case served && f.Next == f.Node:
		return "served"
	case served:
		return "moving"
	case f.Next != "":
		return "starting"
	}
	return "not served"
}

// VIPsText writes addresses as "baton vip list" shows them. here is the column of the
// node that was asked.
func VIPsText(w io.Writer, l []VIP) error {
	var b bytes.Buffer
	t := table{head: []string{"address", "state", "node", "next", "prefer", "interface", "here", "epoch", "move"}, left: 7}
	for i := range l {
		x := &l[i]
		f := x.Floating
		if f == nil {
			continue
		}
		node, next, here := "-", "-", "-"
		if !f.Clean && f.Node != "" {
			node = f.Node
		}
		if f.Next != "" && f.Next != node {
			next = f.Next
			if f.Ready {
				next += " (ready)"
			}
		}
		if f.Local != nil {
			here = f.Local.State
			if f.Local.Reason != "" {
				here += " (" + clean(f.Local.Reason) + ")"
			}
		}
		t.row(fmt.Sprintf("%s/%d", clean(x.Addr), f.Bits), f.State(), clean(node), clean(next), orDash(clean(strings.Join(f.Prefer, ","))), orDash(clean(f.Interface)), here,
			num(x.Epoch), num(f.MoveID))
	}
	t.write(&b)
	if b.Len() == 0 {
		b.WriteString("there are no floating addresses: \"baton vip add\" adds one\n")
	}
	_, err := w.Write(b.Bytes())
	return err
}

// ClusterNode is a node with regard to addresses.
type ClusterNode struct {
	Name string `json:"name"`
	// This: it is the node that was asked.
	This bool `json:"this,omitempty"`
	// State is that of its health: "this", or a state of a Peer.
	State   string        `json:"state"`
	Silence time.Duration `json:"silence_ns"`
	Slow    bool          `json:"slow,omitempty"`
	Drained bool          `json:"drained"`
	// Serves are the floating addresses that it serves by the registry's word, Next
	// those that are moving to it.
	Serves []string `json:"serves"`
	Next   []string `json:"next,omitempty"`
}

// NodesText writes nodes as "baton node list" shows them.
func NodesText(w io.Writer, l []ClusterNode) error {
	var b bytes.Buffer
	t := table{head: []string{"node", "health", "addresses", "drained", "serves", "moving to it"}, left: 6}
	for i := range l {
		x := &l[i]
		state := x.State
		switch {
		case x.Slow:
			state += " (slow)"
		case x.State == PeerSuspect:
			state += " (silent for " + x.Silence.Round(100*time.Millisecond).String() + ")"
		}
		drained := "no"
		if x.Drained {
			drained = "yes"
		}
		t.row(clean(x.Name), state, strconv.Itoa(len(x.Serves)), drained, orDash(clean(strings.Join(x.Serves, " "))), orDash(clean(strings.Join(x.Next, " "))))
	}
	t.write(&b)
	_, err := w.Write(b.Bytes())
	return err
}

// EventText is an event in one line, with a newline.
func EventText(e *events.Event) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %-8s  %-8s", e.Time.UTC().Format("2006-01-02T15:04:05.000Z"), clean(e.Node), clean(e.Kind))
	if e.Addr.IsValid() {
		fmt.Fprintf(&b, "  %s", clean(e.Addr.String()))
	}
	b.WriteString(eventRest(e))
	b.WriteByte('\n')
	return b.String()
}

// eventRest is what EventText and progress have in common.
func eventRest(e *events.Event) string {
	var b strings.Builder
	if e.Stage != "" {
		fmt.Fprintf(&b, "  %s", clean(e.Stage))
	}
	switch {
	case e.From != "" && e.To != "":
		fmt.Fprintf(&b, "  %s -> %s", clean(e.From), clean(e.To))
	case e.From != "":
		fmt.Fprintf(&b, "  from %s", clean(e.From))
	case e.To != "":
		fmt.Fprintf(&b, "  to %s", clean(e.To))
	}
	if e.Took != 0 {
		fmt.Fprintf(&b, "  %s", Millis(e.Took))
	}
	keys := make([]string, 0, len(e.Attrs))
	for k := range e.Attrs {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		fmt.Fprintf(&b, "  %s=%s", clean(k), clean(e.Attrs[k]))
	}
	if e.Epoch != 0 {
		fmt.Fprintf(&b, "  epoch %d", e.Epoch)
	}
	if e.Move != 0 {
		fmt.Fprintf(&b, "  move %d", e.Move)
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, "  (%s)", clean(e.Reason))
	}
	if e.Err != "" {
		fmt.Fprintf(&b, "  FAILED: %s", clean(e.Err))
	}
	return b.String()
}

// Millis shows a short time in milliseconds.
func Millis(d time.Duration) string {
	return strconv.FormatFloat(float64(d)/float64(time.Millisecond), 'f', 1, 64) + " ms"
}
