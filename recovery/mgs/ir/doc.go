// Package ir is imperative recovery: the registry tells the nodes where a target
// has started, so that its clients connect at once instead of finding out (Lustre
// manual, chapter "Imperative Recovery").
//
// The registry keeps a table of the targets that run, in memory. A target's node
// announces it (OpAnnounce) when it takes connections; every node has a watch
// (OpWatch) at the registry, a request that is answered when there is news. All of
// it is a hint that whoever gets it confirms by connecting, and nothing but speed
// depends on it: clients find targets without it, too.
//
// Table is the registry's part, as a step machine without clock, lock or I/O. Hub
// serves it, and Client is the part of every node.
//
// # Numbers
//
// A table has an incarnation, which is another one after each start of the registry,
// and a version, which rises with each change. A target has the version of its last
// change. A watch names what its node has; so the next watch acknowledges the news
// before, and a node that has the table of an earlier incarnation gets the whole.
// After a start the table is empty until the targets' nodes have announced them again.
//
// # Recovery windows
//
// The answer to an announcement says whether all clients are being told
// (StateFull). Then the target need not wait as long for clients to come as it
// would otherwise. It still waits: the registry knows who has a watch, not who will
// be reached. Nodes without a watch, or with one that opts out, make the state
// StatePartial; a node whose watch has ended counts as dead. For some time after its
// own start the registry does not know who there is (StateStartup).
package ir
