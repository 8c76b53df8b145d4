package wire

import (
	"errors"
	"sync/atomic"
	"time"
)

// ErrClosed: the connection was closed by its owner.
var ErrClosed = errors.New("connection closed")

var lastSession atomic.Uint64

// NextSession is a new Peer.Session, higher than those of this process before and,
// unless the clock goes back, of earlier processes: who compares sessions compares
// their clients' generations first.
func NextSession() uint64 {
	for {
		last := lastSession.Load()
		next := max(last+1, uint64(time.Now().UnixNano()))
		if lastSession.CompareAndSwap(last, next) {
			return next
		}
	}
}

// Blocker is a Target whose Handle blocks on some operations, on the disk for
// instance. Transports call it for these where it keeps nothing else from being
// read, and so in no particular order. A Target that Accept returned is asked
// itself if it is a Blocker, else the one it is of.
type Blocker interface {
	// MayBlock tells whether Handle may block on op.
	MayBlock(op Op) bool
}

// LostError is the error of a request to which the transport got no answer.
type LostError struct {
	// Sent tells whether the target may have got the request: then it may have
	// been executed, and only a resend (FlagResend) can find out. A request that
	// was not sent has had no effect and never will.
	Sent bool
	// Err is the reason, such as the connection's failure or the context's end.
	Err error
}

// Error implements error.
func (e *LostError) Error() string {
	if e.Sent {
		return "request lost, its fate is unknown: " + e.Err.Error()
	}
	return "request was not sent: " + e.Err.Error()
}

// Unwrap gives the reason.
func (e *LostError) Unwrap() error { return e.Err }

// NeverSent tells that err is of a request that did not reach the target.
// Errors that are not a LostError say nothing, so the answer is false.
func NeverSent(err error) bool {
	var l *LostError
	return errors.As(err, &l) && !l.Sent
}
