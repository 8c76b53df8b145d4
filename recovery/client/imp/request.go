package imp

import "github.com/baton-nfs/baton/recovery/wire"

// Kind tells requests of the import's callers from its own.
type Kind uint8

// Kinds of requests.
const (
	// Normal requests come from Machine.Submit.
	Normal Kind = iota
	// Ping is OpPing.
	Ping
	// Sync is OpSyncTarget: makes everything executed so far durable.
	Sync
	// LastReplay is OpPing with FlagLastReplay.
	LastReplay
	// Lock is the replay of a lock; Request.XID is its index.
	Lock
)

// String gives the kind's name.
func (k Kind) String() string {
	return [...]string{"request", "ping", "sync", "last-replay", "lock"}[k]
}

// Request is what a Machine knows of a request. The fields up to Handle are set
// before Submit; a Request belongs to the machine until ActComplete or, when
// that says Kept, ActRelease.
type Request struct {
	XID uint64
	// Modifies: gets a transno, needs a reply slot, is replayed.
	Modifies bool
	// WaitCommit: the reply comes when the request is durable.
	WaitCommit bool
	// OpensEpoch: the reply may open an IO epoch (Outcome.Epoch).
	OpensEpoch bool
	// NoWait: fails with ErrTargetDown when the target is known to be away.
	NoWait bool
	// Long: the target may take any time to answer (OpLockPoll).
	Long bool
	// Leaves: an answer OK means that the target has forgotten the client.
	Leaves bool
	// Bytes is the memory that keeping the request takes.
	Bytes int64
	// Closes are the IO epochs that end when the request is executed.
	Closes []wire.FID
	// Handle is the caller's.
	Handle any

	kind    Kind
	slot    uint16
	out     bool // at the transport
	maybe   bool // may have reached the target
	dead    bool // complete with deadSt when the transport gives it back
	dropped bool // release when the transport gives it back
	evicted bool // its client was evicted while it was out
	replay  bool // out as a replay
	deadSt  wire.Status
	at      int64 // when given to the transport
	seq     uint64

	// Of answered requests.
	transno uint64
	inst    uint64 // the target's instance that has executed it last
	status  wire.Status
	epoch   wire.FID
	opens   []*Request // kept opens that a close releases when it is committed

	list       *list
	prev, next *Request
}

// Kind tells what the request is.
func (r *Request) Kind() Kind { return r.kind }

// Slot is the reply slot, 1..Config.Slots, or 0 for a request without one. Targets
// count from 0.
func (r *Request) Slot() uint16 { return r.slot }

// Transno is the transaction number of an answered request.
func (r *Request) Transno() uint64 { return r.transno }

// Epoch is the IO epoch that the answered request has opened, or zero.
func (r *Request) Epoch() wire.FID { return r.epoch }

// retained tells that the request's data have to be kept after the reply.
func (r *Request) retained() bool { return r.Modifies && !r.WaitCommit }

// list is a doubly linked list through its elements.
type list struct {
	head, tail *Request
	n          int
}

func (l *list) push(r *Request) { l.insertAfter(l.tail, r) }

// insertAfter puts r behind p, or first when p is nil.
func (l *list) insertAfter(p, r *Request) {
	r.list, r.prev = l, p
	if p == nil {
		r.next = l.head
		l.head = r
	} else {
		r.next = p.next
		p.next = r
	}
	if r.next == nil {
		l.tail = r
	} else {
		r.next.prev = r
	}
	l.n++
}

// insertByTransno keeps the list in transno order. Replies come nearly in that
// order, so the place is near the end.
func (l *list) insertByTransno(r *Request) {
	p := l.tail
	for p != nil && p.transno > r.transno {
		p = p.prev
	}
	l.insertAfter(p, r)
}

// unlink takes r out of the list it is in, if any.
func (r *Request) unlink() {
	l := r.list
	if l == nil {
		return
	}
	if r.prev == nil {
		l.head = r.next
	} else {
		r.prev.next = r.next
	}
	if r.next == nil {
		l.tail = r.prev
	} else {
		r.next.prev = r.prev
	}
	l.n--
	r.list, r.prev, r.next = nil, nil, nil
}
