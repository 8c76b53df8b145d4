// Package hooks tests the hooks of cluster managers with the managers themselves:
// Pacemaker with corosync, keepalived, CTDB, each on several machines made of
// namespaces. What the managers move is served by a stub that notes every call
// (tests/hooks/stub), so that order and number of the calls can be checked.
package hooks
