package ost

import (
	"fmt"

	"github.com/baton-nfs/baton/recovery/wire"
)

// What replays may do to an object.
//
// After a power failure clients repeat what they were not told to be durable, in
// the order of transnos over all clients. A client repeats a suffix of its own
// changes: what it made last wins again. But nobody repeats a change of a client
// that died too, or that was told that it is durable, and a repetition of an older
// change of another client must not spoil that. So an object's header tells a
// number up to which all its changes are durable (object.sure), and replays up
// to it have no effect. When several clients, one of which may replay, have
// changed an object, that number is put into its header with every flush, durably,
// before the flush counts: a second fdatasync, which objects of one writer never
// need.
//
// Logged truncates are repeated by their log, too, perhaps after others have
// written. So they are durable, as such, before anything of others is executed.
// One that is not known to be durable when power fails does not count as executed.

// unknownClient stands for whoever made the changes that a header tells of.
var unknownClient = wire.ClientID{0: 0xff, 15: 0xff}

// writers are those who have changed an object. The zero client stands for those
// in this process, who never replay.
type writers struct {
	id wire.ClientID
	n  uint8 // 2: several
}

func (w *writers) add(id wire.ClientID) {
	switch {
	case w.n == 0:
		w.id, w.n = id, 1
	case w.n == 1 && w.id != id:
		w.n = 2
	}
}

// replayable tells whether anybody may replay changes.
func (w *writers) replayable() bool { return w.n == 2 || w.n == 1 && w.id != wire.ClientID{} }

// changed gives a number (that of a replay, if no is not 0) to a change of o
// that client by has made (mu held).
func (t *Target) changed(o *object, by wire.ClientID, no uint64) uint64 {
	if o.newest <= t.state.recorded.Load() {
		o.by = writers{}
	}
	if no == 0 && !t.begun.Load() {
		t.track.link(o) // what the MDT has told of, before recovery
		return 0
	}
	n := t.track.mark(o, no)
	o.by.add(by)
	o.after.add(by)
	o.version, o.marked = n, n
	o.newest = max(o.newest, n)
	return n
}

// known finishes a replay up to which o is durable (mu held): it reports whether
// it is one.
func (t *Target) known(o *object, no uint64) bool {
	if no == 0 || no > max(o.sure, t.state.recorded.Load()) {
		return false
	}
	t.track.transno(no)
	return true
}

// barrier makes another client's truncate durable before client by changes o (mu
// held, which it gives up meanwhile; what io is held for is kept out).
func (t *Target) barrier(o *object, by wire.ClientID) error {
	if o.punchInst == 0 || o.puncher == by {
		return nil
	}
	o.hdrDirty = true
	t.track.link(o) // it is not dirty if its last flush has failed
	o.mu.Unlock()
	err := t.syncNow(o)
	o.mu.Lock()
	if err != nil {
		return fmt.Errorf("flush of a truncate before another client's change: %w", err)
	}
	return nil
}

// span is a range that a write under way covers. Writes that overlap follow each
// other, so that the order of their numbers is that of their effects.
type span struct{ from, to uint64 }

// enter waits until no write under way overlaps s (mu held, io at least shared).
func (o *object) enter(s span) {
	for {
		free := true
		for _, x := range o.spans {
			if x.from < s.to && s.from < x.to {
				free = false
				break
			}
		}
		if free {
			o.spans = append(o.spans, s)
			return
		}
		o.waiting++
		o.cond.Wait()
		o.waiting--
	}
}

// leave ends a write (mu held).
func (o *object) leave(s span) {
	for i, x := range o.spans {
		if x == s {
			last := len(o.spans) - 1
			o.spans[i] = o.spans[last]
			o.spans = o.spans[:last]
			break
		}
	}
	if o.waiting > 0 {
		o.cond.Broadcast()
	}
}
