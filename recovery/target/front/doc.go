// Package front is a target's recovery in service: it stands between the
// transports and a target's Body, and lets the state machine of package recov
// decide who may connect and which request is executed when. It has the clock,
// the locks and the connections that recov does without.
package front
