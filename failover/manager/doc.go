// Package manager decides which node serves which floating address, in the process
// that leads the cluster.
//
// Machine is the pure part: what the registry says, what the leader hears of the other
// nodes, what they report and the time go in; decisions and events come out. Manager
// is the edge: it asks the nodes, follows the registry and carries decisions out, as
// long as its process leads. Decisions are kept nowhere but in the registry; what a
// leader has to know of its predecessor besides is told to all nodes with the
// questions, and told back by them (Memory).
package manager
