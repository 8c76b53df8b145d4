// Package cluster holds tests of a service of several nodes: real processes on the
// loopback, real stores in directories that several of them see, NFS clients of
// their own. A process that is killed leaves its page cache, so what a loss of
// memory does is for the simulations (tests/sim, recovery) and tests/powerfail.
package cluster
