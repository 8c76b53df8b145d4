// Package health tells a node which of the others live. Nodes that hold state on
// each other exchange beats, small messages on a connection of their own, never
// behind data: one beat tells of all targets and service addresses of its sender.
//
// Machine is the protocol: one node's view of its peers, without clock, goroutine
// or I/O. Health runs it over package wire/tcp.
//
// # When beats are sent
//
// A node is interested in a peer while it runs targets that the peer is a client
// of, or the reverse. Beats tell the interest; they go both ways, in requests and
// their answers, while one of the two has any, and stop when both know of each
// other that they have none.
//
// The node with the lower name dials and sends a beat every interval, the other
// answers with its own. When the other is interested and hears nothing, it dials
// too, until it is heard by the first connection again: so the lower node learns of the
// interest, and a path that is open in one direction only is used.
//
// # Who is dead
//
// A peer is suspected when it was silent for longer than its beats let expect. The limit is
// mean + 4 * deviation of the gaps between arrivals, estimated as TCP does its
// retransmission time-out (Jacobson 1988, RFC 6298: gains 1/8 and 1/4), between
// Config.Lower and Config.Upper. A phi accrual detector (Hayashibara 2004) would
// need a window of samples and the assumption of a distribution, which the pauses
// of loaded machines do not follow; this one has two numbers, and after a gap, suspected or
// not, an equal one that follows is never a reason for suspicion, since
//
//	mean + (gap-mean)/8 + 4*(deviation + (gap-mean-deviation)/4) >= gap.
//
// A connection that breaks is a hint: the peer then has two intervals to be heard
// again. A node that was itself not running for a while (its timers came late)
// gives its peers another Lower before it suspects any of them.
//
// Suspicion is no verdict. It cuts the connection, so that nothing waits for a dead
// peer, and dials anew; who hears of it should do the same on its own paths.
// Nobody may be evicted and no address taken over by it alone. The first beat ends it.
// Certain is only what a peer itself says: a beat of another incarnation means that the
// process before is dead, with everything that it had.
//
// A peer that answers is not dead, however slow. A target with work whose progress stands
// still for Config.SlowAfter is slow, and so is a node that no longer looks at itself.
//
// # Targets
//
// The instance of a target rises durably with every start, wherever it starts. So
// of two nodes that say they run it the one with the higher instance does, and lower
// ones are never believed again.
package health
