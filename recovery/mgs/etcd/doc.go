// Package etcd keeps the registry's document in etcd (client API version 3): in
// the members of a cluster that somebody else runs, or in members that baton
// processes run (Member).
//
// The document is one key, which is replaced by compare-and-swap on its
// modification revision (Storage). Who of the nodes is to serve what only one may
// serve, the table of targets for one, is settled by a key with a lease
// (Election).
//
// Without a majority of the members nothing can be read or changed. Calls end
// then, after a short time, with mgs.ErrUnavailable.
package etcd
