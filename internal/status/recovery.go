package status

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"time"
)

// Recovery describes how the targets of a cluster recover, and who is told of their
// starts (imperative recovery): "baton recovery status".
type Recovery struct {
	Node string `json:"node"`
	// Alone: there is one node only, so that nobody has to be told anything.
	Alone bool `json:"alone,omitempty"`
	// Watch is this node's connection to the registry's table of targets.
	Watch *RecoveryWatch `json:"watch,omitempty"`
	// Registry is what the registry says now; nil when it does not answer, and
	// RegistryError is why.
	Registry      *RecoveryRegistry `json:"registry,omitempty"`
	RegistryError string            `json:"registry_error,omitempty"`
	Targets       []RecoveryTarget  `json:"targets"`
}

// RecoveryWatch is a node's copy of the registry's table.
type RecoveryWatch struct {
	Connected bool   `json:"connected"`
	At        string `json:"at,omitempty"` // the registry's node, or where it was looked for last
	// Since when it is connected, or not, and why not.
	Since time.Time `json:"since"`
	Error string    `json:"error,omitempty"`
	// Imperative: this node acts on news.
	Imperative  bool   `json:"imperative_recovery"`
	Incarnation uint64 `json:"incarnation"`
	Version     uint64 `json:"version"`
	State       string `json:"state,omitempty"` // of the table, with the last news
	// Current: the copy is the registry's table as that is now.
	Current bool `json:"current"`
}

// RecoveryRegistry is the registry's table of targets.
type RecoveryRegistry struct {
	// Incarnation is another one after each start of the registry; Version rises with
	// each change of the table.
	Incarnation uint64 `json:"incarnation"`
	Version     uint64 `json:"version"`
	// State is "full": all clients are told; "partial": NonIR of them are not;
	// "startup": the registry has started StartupLeft before it vouches for anybody;
	// "disabled".
	State       string        `json:"state"`
	StartupLeft time.Duration `json:"startup_left_ns,omitempty"`
	NonIR       int           `json:"nonir_clients"`
	// Notifications that all who watched have acknowledged, and how long that took,
	// together and the longest; Pending are under way.
	NotifyCount   uint64         `json:"notify_count"`
	NotifyTotal   time.Duration  `json:"notify_duration_total_ns"`
	NotifyMax     time.Duration  `json:"notify_duration_max_ns"`
	NotifyPending int            `json:"notify_pending"`
	Nodes         []RecoveryNode `json:"nodes"`
}

// RecoveryNode is a node that is connected to the registry.
type RecoveryNode struct {
	Name       string `json:"name"`
	Watching   bool   `json:"watching"`
	Imperative bool   `json:"imperative_recovery"`
	Version    uint64 `json:"version"` // of the table that it has acknowledged
	Current    bool   `json:"current"` // that is the newest
}

// RecoveryTarget is a target's recovery, now or when it started last.
type RecoveryTarget struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	// Node is where it runs, Instance numbers its starts; as far as is known.
	Node     string `json:"node,omitempty"`
	Instance uint64 `json:"instance,omitempty"`
	// State is WAITING (for the first client), RECOVERING, COMPLETE, STOPPED, or empty:
	// not known, and Error says why.
	State string `json:"state,omitempty"`
	Error string `json:"error,omitempty"`
	// Version of the registry's table with this target's last change; NoIR: clients are
	// not told of its starts.
	Version uint64 `json:"table_version,omitempty"`
	NoIR    bool   `json:"noir,omitempty"`
	// IR is the state of the registry's table when the target announced its start.
	// Factor is ir_factor. Shortened: clients that do not come are waited for Factor
	// tenths of the usual time.
	IR        string `json:"ir_state,omitempty"`
	Factor    int    `json:"ir_factor,omitempty"`
	Shortened bool   `json:"window_shortened,omitempty"`
	// The window: its begin, the end as things are, the latest end, and the end of
	// recovery; nil when not (yet).
	Start    *time.Time `json:"window_start,omitempty"`
	Deadline *time.Time `json:"window_deadline,omitempty"`
	Hard     *time.Time `json:"window_hard,omitempty"`
	End      *time.Time `json:"recovery_end,omitempty"`
	// Left is what is left of the window, Took the time from its begin to the end of
	// recovery or until now.
	Left time.Duration `json:"window_left_ns,omitempty"`
	Took time.Duration `json:"took_ns,omitempty"`
	// Clients that it has waited for, those of them that have ended their replay, and
	// evictions since the start.
	Known    int    `json:"known"`
	Finished int    `json:"finished"`
	Evicted  int    `json:"evicted"`
	Replayed uint64 `json:"replayed"`
	// Clients is the client table.
	Clients []RecoveryClient `json:"clients,omitempty"`
}

// States of a RecoveryClient.
const (
	ClientConnected = "connected"
	ClientReplaying = "replaying"
	ClientFinished  = "finished" // its replay, and waits for others
	ClientMissing   = "missing"  // has not come since the target's start
	ClientAway      = "away"     // was there, and is not connected now
)

// RecoveryClient is a client of a target.
type RecoveryClient struct {
	ID         string `json:"id"` // hex
	Generation uint64 `json:"generation"`
	// Node is where it is connected from or, as the registry knows, where it belongs;
	// empty: not known, or it is another target's.
	Node  string `json:"node,omitempty"`
	State string `json:"state"`
}

// IR is a node's part in imperative recovery, for metrics.
type IR struct {
	Connected   bool   `json:"connected"`
	Imperative  bool   `json:"imperative_recovery"`
	Incarnation uint64 `json:"incarnation"`
	Version     uint64 `json:"version"`
	State       string `json:"state,omitempty"`
	// Registry is set on the node of the registry.
	Registry *RecoveryRegistry `json:"registry,omitempty"`
}

// RecoveryText writes r for people.
func RecoveryText(w io.Writer, r *Recovery) error {
	var b bytes.Buffer
	if r.Alone {
		b.WriteString("imperative recovery: this node is alone, there is nobody to tell\n")
	} else {
		r.header(&b)
	}
	t := table{title: "Targets", head: []string{"name", "state", "node", "told", "window", "instance", "clients", "finished", "evicted", "replayed"}, left: 5}
	for i := range r.Targets {
		x := &r.Targets[i]
		state := orDash(clean(x.State))
		if x.Error != "" {
			state = "not known (" + clean(x.Error) + ")"
		}
		t.row(x.Name, state, orDash(clean(x.Node)), x.told(), x.window(), num(x.Instance), strconv.Itoa(len(x.Clients)),
			fmt.Sprintf("%d of %d", x.Finished, x.Known), strconv.Itoa(x.Evicted), num(x.Replayed))
	}
	t.write(&b)
	t = table{title: "Clients", head: []string{"target", "client", "state", "node", "generation"}, left: 4}
	for i := range r.Targets {
		for _, c := range r.Targets[i].Clients {
			t.row(r.Targets[i].Name, clean(c.ID), clean(c.State), orDash(clean(c.Node)), num(c.Generation))
		}
	}
	t.write(&b)
	_, err := w.Write(b.Bytes())
	return err
}

func (r *Recovery) header(b *bytes.Buffer) {
	g := r.Registry
	if g == nil {
		fmt.Fprintf(b, "imperative recovery: not known, the registry does not answer (%s)\n", clean(r.RegistryError))
	} else {
		fmt.Fprintf(b, "imperative recovery: %s", g.State)
		switch {
		case g.StartupLeft > 0:
			fmt.Fprintf(b, " for %s", Span(g.StartupLeft))
		case g.NonIR > 0:
			fmt.Fprintf(b, ", not told: %d", g.NonIR)
		}
		fmt.Fprintf(b, "\nregistry: table version %d of incarnation %d, notifications %d, under way %d", g.Version, g.Incarnation, g.NotifyCount, g.NotifyPending)
		if g.NotifyCount > 0 {
			fmt.Fprintf(b, ", mean %v, longest %v", (g.NotifyTotal / time.Duration(g.NotifyCount)).Round(time.Microsecond), g.NotifyMax.Round(time.Microsecond))
		}
		b.WriteByte('\n')
	}
	if v := r.Watch; v != nil {
		fmt.Fprintf(b, "this node (%s): table version %d of incarnation %d", clean(r.Node), v.Version, v.Incarnation)
		switch {
		case !v.Connected:
			fmt.Fprintf(b, ", which it had before; it does not hear the registry (%s)", clean(v.Error))
		case g != nil && !v.Current:
			b.WriteString(", which is not the newest")
		}
		if !v.Imperative {
			b.WriteString("; it takes no part (recovery.imperative)")
		}
		b.WriteByte('\n')
	}
	if g == nil {
		return
	}
	t := table{title: "Nodes", head: []string{"name", "imperative recovery", "table version"}, left: 2}
	for _, n := range g.Nodes {
		what := "ON"
		switch {
		case !n.Watching:
			what = "not connected for it"
		case !n.Imperative:
			what = "OFF"
		case !n.Current:
			what = "ON, behind"
		}
		t.row(clean(n.Name), what, num(n.Version))
	}
	t.write(b)
}

func (t *RecoveryTarget) window() string {
	switch {
	case t.Start != nil && t.End != nil:
		return "took " + t.Took.Round(time.Millisecond).String()
	case t.Deadline == nil:
		return "-"
	case t.Shortened:
		return fmt.Sprintf("%v left (%d/10)", t.Left.Round(100*time.Millisecond), t.Factor)
	}
	return fmt.Sprintf("%v left", t.Left.Round(100*time.Millisecond))
}

func (t *RecoveryTarget) told() string {
	if t.NoIR {
		return "opts out"
	}
	return orDash(clean(t.IR))
}
