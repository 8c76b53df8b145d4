// Package owner keeps a target's directory to one node at a time, on storage that
// several nodes see, by a record that the owner rewrites again and again (after
// ext4's multiple mount protection; the contest is Fischer's, with times that each
// contender measures itself). It needs of the storage only that a read which
// begins after a write has ended sees that write. Clocks of different nodes are
// never compared; they have to run at nearly the same speed.
//
// Machine is the protocol: a deterministic state machine without clock, goroutine
// or I/O. Owner executes its actions.
//
// # The record
//
// The file has three blocks: two copies of the record, each valid by itself, and
// the mark of a node that would like to have the target. The valid copy with the
// higher (generation, sequence) is the record. The owner rewrites the older copy
// every interval I, so that a torn write loses nothing. Generations rise, unless
// late writes have destroyed both copies of the newest.
//
// # Times
//
//	2 I    an owner believes in its ownership for so long after the beginning of
//	       its last successful heartbeat (limit)
//	3 I    a record that nobody has written to for so long is without owner (watch)
//	I/4    a claim that took longer, from the read it builds on, counts for nothing
//	3/10 I a claim is looked at again so long after it was made (settle)
//
// I is the interval in the record where it is about somebody else's life, the own
// one where it is about the own.
//
// # Opening
//
// A store that has no record, or that was released, can be claimed at once, and so
// can one whose owner is known to be dead (Options.Fenced, Exclusive), if both copies
// are that owner's and no write of it has failed, which might come still. Otherwise
// the record is watched: neither copy may change for the watch time. If one does,
// somebody is alive, and opening fails or waits. The claim has the next generation
// and is written to both copies, one after the other. If both are still there after
// the settle time the claim has won. One that was too slow, because the process or
// the storage was stopped, and one that has lost, is left where it is and watched
// like any other record.
//
// # Owning
//
// A heartbeat reads, finds its own record, and writes. Each has to end within the
// limit counted from the beginning of the one before; else ownership is lost, for
// good, whatever else may happen. It is lost as well when the record is somebody
// else's.
//
// # Why two never own at a time
//
// Of two claims that are both made in time, from states that did not show the
// other, both have been written before either is looked at again, and one of them
// has written the last copy of each kind: at most one finds both copies its own. A
// contender that has seen another's claim or record waits until nothing was
// written for the watch time: then the other's last heartbeat that counts began
// before that time, and because a later one would have had to end within the limit
// and be seen, it is over before the contender's claim. Writes that come late, of
// processes that were stopped, have lower numbers than those that came meanwhile,
// and do nothing but to make others wait.
//
// # What this cannot do
//
// Valid is true at the moment in which it is asked. A process that is stopped
// between asking and writing writes when it goes on, and what it has given to the
// kernel may reach the storage later. The watch time exceeds the limit by I for
// that. A change that has to be safe beyond doubt needs the old node fenced
// (powered off), or storage that refuses it. For the same reason the guards look
// again after every flush: what was flushed while the store was owned was there
// before the next owner has read it, and only that may be acknowledged. A virtual
// machine that is stopped with its clock believes too long in what it owns.
//
// The store's own lock files (flock) keep processes of one machine apart and are
// taken first: they cost no time. With them held (Options.Exclusive) a record of
// this machine's running kernel is of a process that has died, and nothing has to
// be waited for but the settle time.
package owner
