package lockd

import (
	"fmt"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// policy holds the figures that the retry logic goes by.
type policy struct {
	tries       int           // failures without anything sent before giving up
	first, most time.Duration // wait after the first failure, and the longest
}

// wait is the pause after the nth failure in a row.
func (p *policy) wait(n int) time.Duration {
	d := p.first
	for ; n > 1 && d < p.most; n-- {
		d *= 2
	}
	return min(d, p.most)
}

// event is what came of one try to deliver a callback.
type event uint8

const (
	// evNotSent: no copy left, or the other side said that it did not execute it.
	evNotSent event = iota
	// evNoAnswer: a copy left, and what became of it is not known.
	evNoAnswer
	// evGranted and evDenied: the client's answer.
	evGranted
	evDenied
)

var eventNames = [...]string{"not-sent", "no-answer", "granted", "denied"}

func (e event) String() string { return eventNames[e] }

// callback is the state of one callback's delivery. It is a pure state machine:
// step takes what came of a try and gives what is to be done.
type callback struct {
	// maybe: a copy may have reached the client, now or sent by whoever served
	// the address before. Then the client may hold the lock, whatever it says
	// later: it denies a second copy of a callback that it has accepted, since it
	// waits no more.
	maybe    bool
	failures int // tries that ended without an answer
}

// action is what step wants: the callback is finished with outcome, or, with
// outcome 0, is tried again after wait.
type action struct {
	outcome wire.GrantOutcome
	wait    time.Duration
}

func (a action) String() string {
	switch a.outcome {
	case wire.GrantAccepted:
		return "done: accepted"
	case wire.GrantRefused:
		return "done: refused"
	case wire.GrantUndelivered:
		return "done: undelivered"
	}
	return fmt.Sprintf("again after %v", a.wait)
}

func (c *callback) step(ev event, p *policy) action {
	switch ev {
	case evGranted:
		return action{outcome: wire.GrantAccepted}
	case evDenied:
		if c.maybe {
			// Either the client took the lock when an earlier copy came, or it
			// never wanted it. A lock that nobody wants costs its range until the
			// client restarts; one that is taken from a client that believes in
			// it costs somebody's data.
			return action{outcome: wire.GrantAccepted}
		}
		return action{outcome: wire.GrantRefused}
	case evNoAnswer:
		c.maybe = true
	}
	c.failures++
	if !c.maybe && c.failures >= p.tries {
		return action{outcome: wire.GrantUndelivered}
	}
	return action{wait: p.wait(c.failures)}
}
