package status

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"time"
)

// LockService is the lock service of one service address. Counts of entries
// are of the lock table as it is, which outlives the process; counters run from
// the start of the process.
type LockService struct {
	Addr  string `json:"addr"`
	Index uint32 `json:"index"`
	// NSMState is the state number that clients are told.
	NSMState uint32 `json:"nsm_state"`

	Granted     uint64 `json:"granted"`
	Unconfirmed uint64 `json:"unconfirmed"`
	Waiting     uint64 `json:"waiting"`
	Shares      uint64 `json:"shares"`
	Hosts       uint64 `json:"hosts"` // monitored clients

	// Grace: the lock table was lost, and only reclaims are granted.
	Grace bool `json:"grace"`
	// Remaining is what is left of the reclaim window, or of the grace period.
	Remaining time.Duration `json:"remaining_ns"`
	// HostsReclaimed counts clients that are through, in a grace period.
	HostsReclaimed uint64 `json:"hosts_reclaimed"`
	// Damaged: lock records were unreadable, and no grace period began since.
	Damaged bool `json:"damaged"`
	// Forgotten counts the entries that this start threw away (--forget-locks).
	Forgotten uint64 `json:"forgotten"`

	Notify    LockNotify    `json:"notify"`
	Callbacks LockCallbacks `json:"callbacks"`
	// Calls are the answered calls of NLM by outcome, in a fixed order.
	Calls []LockCalls `json:"calls"`
}

// LockNotify is the progress of telling clients of a restart (SM_NOTIFY).
// Total is the sum of the others.
type LockNotify struct {
	Total    uint64 `json:"total"`
	Notified uint64 `json:"notified"`
	Pending  uint64 `json:"pending"`
	Failed   uint64 `json:"failed"` // given up after locks.notify_timeout
}

// LockCallbacks counts GRANTED callbacks. Sent counts the copies that were sent,
// the others count each callback once.
type LockCallbacks struct {
	Sent        uint64 `json:"sent"`
	Pending     uint64 `json:"pending"`
	Accepted    uint64 `json:"accepted"`
	Refused     uint64 `json:"refused"`
	Undelivered uint64 `json:"undelivered"`
	// MeanMicro is the mean time in microseconds from the grant to the client's
	// acceptance, 0 when there was none.
	MeanMicro float64 `json:"mean_us"`
}

// LockCalls counts the calls of NLM with one outcome.
type LockCalls struct {
	Outcome string `json:"outcome"`
	Calls   uint64 `json:"calls"`
}

// Outcomes of NLM calls, the stat of the reply (XNFS nlm4_stats).
const (
	LockCallGranted  = "granted"
	LockCallDenied   = "denied"
	LockCallNoLocks  = "denied_nolocks"
	LockCallBlocked  = "blocked"
	LockCallGrace    = "denied_grace_period"
	LockCallDeadlock = "deadlck"
	LockCallFailed   = "failed"  // ROFS, STALE_FH, FBIG, FAILED
	LockCallDropped  = "dropped" // not answered: the lock table could not be asked
)

// Kinds of entries of the lock table.
const (
	LockRead  = "read"
	LockWrite = "write"
	LockShare = "share"
)

// Lock is an entry of the lock table: a lock, a share reservation or a request
// that waits.
type Lock struct {
	ID   uint64 `json:"id"`
	FID  string `json:"fid"`
	Path string `json:"path,omitempty"` // one of the file's names, when known
	Kind string `json:"kind"`
	// Start and End are the first and the last byte; ToEOF: however long the
	// file becomes. A share reservation has none.
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
	ToEOF bool   `json:"to_eof,omitempty"`
	// Mode and Access are of share reservations: what others may not do, and
	// what the owner does: "none", "read", "write" or "both".
	Mode   string `json:"mode,omitempty"`
	Access string `json:"access,omitempty"`

	Client     string        `json:"client"` // caller_name
	ClientAddr string        `json:"client_addr"`
	Svid       uint32        `json:"svid"`
	OH         string        `json:"oh"`      // hex
	Addr       string        `json:"address"` // the service address
	State      string        `json:"state"`
	Since      time.Time     `json:"since"`
	Age        time.Duration `json:"age_ns"`
}

// LockHost is a client that is told of restarts.
type LockHost struct {
	Client     string `json:"client"`
	ClientAddr string `json:"client_addr"`
	Addr       string `json:"address"` // the service address
	// State is the client's own NSM state as last heard, 0 when unknown.
	State uint32 `json:"state"`
	// NSMState is the service address's state, NotifiedState the one that the
	// client knows: 0 when none was told yet.
	NSMState      uint32        `json:"nsm_state"`
	NotifiedState uint32        `json:"notified_state"`
	Notified      bool          `json:"notified"`
	Locks         uint32        `json:"locks"`
	Since         time.Time     `json:"since"`
	Age           time.Duration `json:"age_ns"`
}

// Range writes the entry's byte range.
func (l *Lock) Range() string {
	switch {
	case l.Kind == LockShare:
		return "-"
	case l.ToEOF:
		return fmt.Sprintf("%d-EOF", l.Start)
	}
	return fmt.Sprintf("%d-%d", l.Start, l.End)
}

// File is what people know the file by.
func (l *Lock) File() string {
	if l.Path != "" {
		return clean(l.Path)
	}
	return l.FID
}

// Owner writes client, address, process and owner handle.
func (l *Lock) Owner() string {
	s := ClientName(l.Client, l.ClientAddr)
	if l.Kind != LockShare {
		s += " svid " + strconv.FormatUint(uint64(l.Svid), 10)
	}
	return s + " oh " + ownerHandle(l.OH)
}

// What writes kind and, of a share reservation, the modes.
func (l *Lock) What() string {
	if l.Kind == LockShare {
		return "share " + l.Access + ", deny " + l.Mode
	}
	return l.Kind
}

// String describes the entry in one line.
func (l *Lock) String() string {
	s := fmt.Sprintf("%d: %s", l.ID, l.What())
	if l.Kind != LockShare {
		s += " " + l.Range()
	}
	return fmt.Sprintf("%s of %s by %s towards %s, %s", s, l.File(), l.Owner(), l.Addr, l.State)
}

// ClientName writes a client with its address.
func ClientName(name, addr string) string {
	if name == "" {
		return addr
	}
	return clean(name) + " (" + addr + ")"
}

// ownerHandle shows printable handles (Linux: pid@host) as text, others in hex.
func ownerHandle(h string) string {
	b, err := hex.DecodeString(h)
	if err != nil || len(b) == 0 {
		return "-"
	}
	for len(b) > 1 && b[len(b)-1] == 0 { // padding
		b = b[:len(b)-1]
	}
	for _, c := range b {
		if c <= ' ' || c > '~' {
			return "0x" + h
		}
	}
	return string(b)
}

// LocksText writes locks as a table, page by page, so that a long list needs
// no memory.
type LocksText struct {
	w     io.Writer
	width []int
	n     int
}

// NewLocksText returns a table that goes to w.
func NewLocksText(w io.Writer) *LocksText { return &LocksText{w: w} }

var lockHead = []string{"id", "file", "range", "kind", "owner", "address", "state", "age"}

// Add writes a page of entries.
func (t *LocksText) Add(locks []Lock) error {
	rows := make([][]string, 0, len(locks)+1)
	if t.n == 0 && len(locks) > 0 {
		rows = append(rows, lockHead)
		t.width = make([]int, len(lockHead))
	}
	for i := range locks {
		l := &locks[i]
		rows = append(rows, []string{strconv.FormatUint(l.ID, 10), l.File(), l.Range(), l.What(), l.Owner(), l.Addr, l.State, Span(l.Age)})
	}
	t.n += len(locks)
	var b bytes.Buffer
	layout(&b, rows, t.width, len(lockHead))
	_, err := t.w.Write(b.Bytes())
	return err
}

// End writes what there is to say after the last page.
func (t *LocksText) End() error {
	if t.n > 0 {
		return nil
	}
	_, err := io.WriteString(t.w, "no locks\n")
	return err
}

// LockHostsText writes the monitored clients as a table.
func LockHostsText(w io.Writer, hosts []LockHost) error {
	var b bytes.Buffer
	t := table{head: []string{"client", "client address", "address", "notified", "told state", "its state", "locks", "age"}, left: 4}
	for i := range hosts {
		h := &hosts[i]
		notified, state := "no", "-"
		if h.Notified {
			notified = "yes"
		}
		if h.State != 0 {
			state = strconv.FormatUint(uint64(h.State), 10)
		}
		t.row(orDash(clean(h.Client)), h.ClientAddr, h.Addr, notified, strconv.FormatUint(uint64(h.NotifiedState), 10), state,
			num(uint64(h.Locks)), Span(h.Age))
	}
	t.write(&b)
	if len(hosts) == 0 {
		b.WriteString("no clients are monitored\n")
	}
	_, err := w.Write(b.Bytes())
	return err
}

// lockText adds the lock services to the text of a status.
func (s *Status) lockText(b *bytes.Buffer) {
	t := table{title: "Locks", head: []string{"address", "state", "nsm state", "granted", "unconfirmed", "waiting", "shares", "hosts", "callbacks", "pending", "refused", "mean"}, left: 2}
	n := table{title: "Notifications", head: []string{"address", "clients", "notified", "pending", "failed"}, left: 1}
	for i := range s.Locks {
		l := &s.Locks[i]
		t.row(l.Addr, l.state(), num(uint64(l.NSMState)), num(l.Granted), num(l.Unconfirmed), num(l.Waiting), num(l.Shares), num(l.Hosts),
			num(l.Callbacks.Sent), num(l.Callbacks.Pending), num(l.Callbacks.Refused+l.Callbacks.Undelivered), Micros(l.Callbacks.MeanMicro))
		if x := l.Notify; x.Total > 0 {
			n.row(l.Addr, num(x.Total), num(x.Notified), num(x.Pending), num(x.Failed))
		}
	}
	t.write(b)
	n.write(b)
}

func (l *LockService) state() string {
	left := Span(l.Remaining.Round(time.Second))
	switch {
	case l.Damaged:
		return "damaged"
	case l.Grace:
		return fmt.Sprintf("grace (%s, %d of %d clients)", left, l.HostsReclaimed, l.Hosts)
	case l.Remaining > 0:
		return fmt.Sprintf("reclaim (%s)", left)
	}
	return StateUp
}
