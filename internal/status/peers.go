package status

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// States of a Peer, as beats tell.
const (
	PeerIdle    = "idle"    // nobody has anything to do with the other
	PeerWaiting = "waiting" // not heard yet
	PeerAlive   = "alive"
	PeerSuspect = "suspect" // silent for longer than its beats let expect
)

// Peer is another node of the cluster, as this node's health sees it. What is told of
// an idle one is old.
type Peer struct {
	Node  string `json:"node"`
	State string `json:"state"`
	// Incarnation numbers its process's start; 0: never heard.
	Incarnation uint64 `json:"incarnation"`
	// Mine and Theirs: this node or the peer has something to do with the other.
	Mine   bool `json:"mine"`
	Theirs bool `json:"theirs"`
	// Silence is the time since its last beat, Timeout how long it may be.
	Silence time.Duration `json:"silence_ns"`
	Timeout time.Duration `json:"timeout_ns"`
	// Slow: it answers and does not get on.
	Slow    bool         `json:"slow,omitempty"`
	Targets []PeerTarget `json:"targets,omitempty"`
	// Sent and Received are beats; Refused those that were too many or not in order.
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"`
	Refused  uint64 `json:"refused"`
	// Suspicions, those of them that were wrong, and Restarts that were told of.
	Suspicions uint64 `json:"suspicions"`
	Wrong      uint64 `json:"wrong_suspicions"`
	Restarts   uint64 `json:"restarts"`
	// Connects are attempts to connect for beats, LongestGap the longest time
	// between two beats.
	Connects   uint64        `json:"connects"`
	LongestGap time.Duration `json:"longest_gap_ns"`
}

// PeerTarget is a target that a peer says it runs.
type PeerTarget struct {
	Name     string `json:"name"`
	Instance uint64 `json:"instance"`
	State    string `json:"state"`
	Slow     bool   `json:"slow,omitempty"`
	// Stale: a later instance is known elsewhere.
	Stale bool `json:"stale,omitempty"`
}

func peerTable(l []Peer) *table {
	t := &table{title: "Nodes", head: []string{"node", "beats", "interest", "targets", "silence", "limit", "suspected", "wrongly", "restarts"}, left: 4}
	for i := range l {
		p := &l[i]
		state := p.State
		if p.Slow {
			state += " (slow)"
		}
		interest := "-"
		switch {
		case p.Mine && p.Theirs:
			interest = "both"
		case p.Mine:
			interest = "mine"
		case p.Theirs:
			interest = "theirs"
		}
		var targets []string
		for _, x := range p.Targets {
			s := fmt.Sprintf("%s.%d", clean(x.Name), x.Instance)
			switch {
			case x.Stale:
				s += "(old)"
			case x.Slow:
				s += "(slow)"
			case x.State != "serving":
				s += "(" + clean(x.State) + ")"
			}
			targets = append(targets, s)
		}
		silence, limit := "-", "-"
		if p.State != PeerIdle {
			silence, limit = p.Silence.Round(time.Millisecond).String(), p.Timeout.Round(time.Millisecond).String()
		}
		t.row(clean(p.Node), state, interest, orDash(strings.Join(targets, " ")), silence, limit,
			strconv.FormatUint(p.Suspicions, 10), strconv.FormatUint(p.Wrong, 10), strconv.FormatUint(p.Restarts, 10))
	}
	return t
}
