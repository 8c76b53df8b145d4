// Package powerfail crashes a whole node in one process, client, metadata
// target and object targets, under random load: power failures, kills of the
// process, crashes during the recovery from one. After each it starts the node
// on what the disks have, and checks everything that was acknowledged, the reply
// records, and both stores with the check of internal/fsck.
//
// A failure prints its seed; -powerfail.seed repeats it. Several workers run
// concurrently, so that a seed gives the same operations but not always the same
// interleaving; a round with one worker repeats nearly exactly.
package powerfail
