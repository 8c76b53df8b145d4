package wire

import "errors"

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
