package ir

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Limits of what is taken from the network.
const (
	maxName    = 64 // bytes of a node's or target's name
	maxTargets = 2048
	maxNodes   = 256
	maxNumber  = 1 << 62
	// pageTargets is the number of targets in an answer. With the longest names they
	// take less than wire.MaxData.
	pageTargets = 128
)

// State tells whether a target's clients are told of its start.
type State string

// States of a table.
const (
	// StateDisabled: nobody is told, by the administrator's order.
	StateDisabled State = "disabled"
	// StateStartup: the registry has started and does not know yet who there is.
	StateStartup State = "startup"
	// StatePartial: there are nodes that are not told.
	StatePartial State = "partial"
	// StateFull: all nodes that are known are told.
	StateFull State = "full"
)

// Target is an entry of the table.
type Target struct {
	Name string `json:"name"`
	// Node is where it runs, or ran.
	Node     string `json:"node"`
	Instance uint64 `json:"instance"` // number of its start
	// Up: it takes connections. false: it does not run there any more.
	Up bool `json:"up"`
	// NoIR: nobody acts on the news, by the administrator's order.
	NoIR bool `json:"noir,omitempty"`
	// Version is that of the table with this entry's last change.
	Version uint64 `json:"version"`
}

// Announcement is OpAnnounce's Data: a target has started or was stopped.
type Announcement struct {
	Target   string `json:"target"`
	Node     string `json:"node"`
	Instance uint64 `json:"instance"`
	Up       bool   `json:"up"`
	NoIR     bool   `json:"noir,omitempty"`
}

// Taken is the answer to an Announcement.
type Taken struct {
	Incarnation uint64 `json:"incarnation"`
	Version     uint64 `json:"version"`
	State       State  `json:"state"`
	// Late: nothing was changed, because the table has a later instance of the
	// target, or no room.
	Late bool `json:"late,omitempty"`
}

// Watch is OpWatch's Data: it waits for a table that is newer than what the node has.
type Watch struct {
	Node string `json:"node"`
	// Incarnation and Version are of the table that the node has, 0 for none.
	Incarnation uint64 `json:"incarnation"`
	Version     uint64 `json:"version"`
	// Able: the node acts on news.
	Able bool `json:"able"`
}

// News is the answer to a Watch. It may be empty: then it only says that the
// registry is there.
type News struct {
	Incarnation uint64 `json:"incarnation"`
	// Version is that of the table that the node has with Targets, the changed entries.
	Version uint64   `json:"version"`
	State   State    `json:"state"`
	Targets []Target `json:"targets,omitempty"`
}

// Status describes a table. It is the answer to OpWatchers.
type Status struct {
	Incarnation uint64 `json:"incarnation"`
	Version     uint64 `json:"version"`
	State       State  `json:"state"`
	// StartupLeft is how long StateStartup lasts at most.
	StartupLeft time.Duration `json:"startup_left_ns,omitempty"`
	// NonIR is the number of nodes that are not told.
	NonIR int `json:"nonir_clients"`
	// Changes of the table that all have acknowledged who had a watch then and still
	// have it: how many, and how long that took, together and the longest.
	NotifyCount uint64        `json:"notify_count"`
	NotifyTotal time.Duration `json:"notify_duration_total_ns"`
	NotifyMax   time.Duration `json:"notify_duration_max_ns"`
	// Pending changes are not acknowledged by all.
	Pending int `json:"pending"`
	// Nodes are those that are connected, by name.
	Nodes []Node `json:"nodes,omitempty"`
}

// Node is a node as the registry knows it.
type Node struct {
	Name string `json:"name"`
	// Watching: it has a watch. Able: it acts on news.
	Watching bool `json:"watching"`
	Able     bool `json:"able"`
	// Version is the newest that it has acknowledged.
	Version uint64 `json:"version"`
}

// ValidName tells whether s can be the name of a node or target: at most 64 letters,
// digits, dots, hyphens and underlines.
func ValidName(s string) bool {
	ok := s != "" && len(s) <= maxName
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._-", c) >= 0
	}
	return ok
}

var errMessage = errors.New("the message is none")

// decode reads one JSON value of known fields, and nothing after it.
func decode(b []byte, v any) error {
	if len(b) > wire.MaxData {
		return errMessage
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errMessage
	}
	return nil
}

func decodeAnnouncement(b []byte) (a Announcement, err error) {
	if err = decode(b, &a); err == nil && (!ValidName(a.Target) || !ValidName(a.Node) || a.Instance == 0 || a.Instance > maxNumber) {
		err = errMessage
	}
	return a, err
}

func decodeWatch(b []byte) (w Watch, err error) {
	if err = decode(b, &w); err == nil && !ValidName(w.Node) {
		err = errMessage
	}
	return w, err
}

func (s State) valid() bool {
	switch s {
	case StateDisabled, StateStartup, StatePartial, StateFull:
		return true
	}
	return false
}

// decodeNews reads the answer to a watch of w.
func decodeNews(b []byte, w *Watch) (n News, err error) {
	if err = decode(b, &n); err != nil {
		return n, err
	}
	if n.Incarnation == 0 || !n.State.valid() || len(n.Targets) > pageTargets {
		return n, errMessage
	}
	last := uint64(0)
	if n.Incarnation == w.Incarnation {
		last = w.Version
	}
	if n.Version < last {
		return n, errMessage
	}
	for i := range n.Targets {
		t := &n.Targets[i]
		if !ValidName(t.Name) || !ValidName(t.Node) || t.Instance == 0 || t.Instance > maxNumber || t.Version <= last || t.Version > n.Version {
			return n, fmt.Errorf("%w: entry %d", errMessage, i)
		}
		last = t.Version
	}
	return n, nil
}

func decodeTaken(b []byte) (t Taken, err error) {
	if err = decode(b, &t); err == nil && (t.Incarnation == 0 || !t.State.valid()) {
		err = errMessage
	}
	return t, err
}

func decodeStatus(b []byte) (s Status, err error) {
	if err = decode(b, &s); err != nil {
		return s, err
	}
	if s.Incarnation == 0 || !s.State.valid() || len(s.Nodes) > maxNodes {
		return s, errMessage
	}
	for i := range s.Nodes {
		if !ValidName(s.Nodes[i].Name) {
			return s, errMessage
		}
	}
	return s, nil
}
