// Package hooks tests the hooks of cluster managers with the managers themselves:
// Pacemaker with corosync, keepalived, CTDB, each on several machines made of
// namespaces. What the managers move is served by baton itself; an NFS client works
// there and checks each result, and all machines are looked at again and again
// (client_test.go, real_test.go). Where the order of the managers' calls is of interest,
// a stub takes baton's place that notes every one (tests/hooks/stub).
package hooks
