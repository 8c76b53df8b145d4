// Package mgs keeps what the whole service agrees on: who the nodes' file
// system clients are, and the service addresses (VIPs) with their owners,
// epochs, write verifiers and NSM states.
//
// All of it is one document. A change is a pure step on the document, which a
// Storage then replaces if nobody else has done so meanwhile; Stored puts the
// two together. File keeps the document in a file. Service lets other nodes
// use a registry by messages, and Remote is their side of it.
package mgs

import (
	"context"
	"encoding/hex"
	"net/netip"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Registry is the agreement of all nodes. Its methods are safe for concurrent
// use. Each is one atomic change, durable when the method returns; after an
// error of storage or transport it may have been made or not. What the registry
// itself refuses is an *Error and has changed nothing.
//
// Nodes are named as in their certificates. The empty name is that of a node
// which is alone and has the registry in its own process.
type Registry interface {
	// StartClient begins a life of a node's file system client: it raises its
	// generation, from 1, and returns who it is.
	StartClient(ctx context.Context, node string) (wire.ClientID, uint64, error)

	// Serve registers addr if it is new, raises its epoch and begins a period of
	// service by node, which ends in an orderly way only with Stopped. If the one
	// before did not, the NSM state rises and Crashed is set in what is returned.
	// While another node serves the address it is refused with CodeServed.
	//
	// An address from a file without NSM states counts as crashed: locks cannot
	// have been granted by the program that wrote it, so that nobody is told
	// anything; but if that program came between two newer ones, there may be some.
	Serve(ctx context.Context, addr netip.Addr, node string) (VIP, error)

	// Stopped ends the period of service with this epoch in an orderly way. It is
	// called when the address is not served any more and every change of its locks
	// is durable.
	Stopped(ctx context.Context, index uint32, epoch uint64) error

	// Abandoned ends the period of service with this epoch by somebody else's
	// word: its node is gone and did not stop in order. The next one counts as
	// after a crash. The word must be true of the address, which may not be up
	// twice; the targets refuse the old epoch as soon as the new one is raised there.
	Abandoned(ctx context.Context, index uint32, epoch uint64) error

	// RaiseNSM raises the NSM state of a VIP that is served with this epoch, because
	// its clients have to reclaim their locks: the lock table was lost, or
	// SM_SIMU_CRASH asks for it. The new state is above the given one as well, which
	// targets or clients may know although the registry does not (it came from a
	// backup).
	RaiseNSM(ctx context.Context, index uint32, epoch uint64, above uint32) (VIP, error)

	// NewVerifiers gives VIPs new write verifiers, because acknowledged data may
	// be lost: those named by index, which node or nobody serves, or without any
	// all that node or nobody serves. It returns them.
	NewVerifiers(ctx context.Context, node string, indexes ...uint32) ([]VIP, error)

	// VIPs lists all service addresses that there ever were, by index.
	VIPs(ctx context.Context) ([]VIP, error)

	// OSTs is the number of object targets that the store has; 0 before it was made.
	OSTs(ctx context.Context) (int, error)

	// SetOSTs records that the store has been made, or extended, with n object
	// targets. The number never falls: a lower one changes nothing.
	SetOSTs(ctx context.Context, n int) error

	// Made tells whether a target was made (SetMade), whatever OSTs says.
	Made(ctx context.Context, target string) (bool, error)

	// SetMade records that a target is being made. From then on an empty directory
	// is not a new target but a disk that is not mounted.
	SetMade(ctx context.Context, target string) error

	// Identity names the document, for ever: another registry has another one.
	Identity(ctx context.Context) (string, error)

	// Clients lists the file system clients that there have been, by the names of their
	// nodes.
	Clients(ctx context.Context) (map[string]wire.ClientID, error)

	// Agree returns the value that goes by a name for all nodes: the one given, if
	// nobody has given one before.
	Agree(ctx context.Context, name, value string) (string, error)
}

// VIP is a service address and what clients bind to it.
type VIP struct {
	// Index names the VIP in request headers; from 1, never reused.
	Index uint32     `json:"index"`
	Addr  netip.Addr `json:"addr"`
	// Epoch rises whenever the address starts to be served anew; targets refuse
	// requests of older epochs.
	Epoch uint64 `json:"epoch"`
	// Verifier is the NFS write verifier (RFC 1813 section 3.3.7), in hex. It
	// changes exactly when acknowledged data that were not committed may be lost.
	Verifier string `json:"verifier"`
	// NSMState is the state number that clients are told (XNFS NSM
	// SM_NOTIFY): odd, from 1, never lower than before. 0 in files of programs
	// that knew no locks.
	NSMState uint32 `json:"nsm_state"`
	// Clean tells that nobody serves the address and that the last to do so
	// ended in an orderly way: clients need not be told of a restart.
	Clean bool `json:"clean,omitempty"`
	// Node serves the address or, with Clean, was the last to do so. Empty: a
	// node that is alone, or nobody.
	Node string `json:"node,omitempty"`
	// Crashed, in what Serve returns, tells that the period of service before
	// this one did not end in an orderly way.
	Crashed bool `json:"-"`

	// Of a floating address (package-level type Floating); Bits is 0 for one that a
	// node has by its configuration, and for one that nobody has any more.
	Bits      int      `json:"bits,omitempty"`
	Interface string   `json:"interface,omitempty"`
	Prefer    []string `json:"prefer,omitempty"`
	// Next is to serve the address; another node than Node while it moves.
	Next string `json:"next,omitempty"`
	// MoveID numbers the assignments of the address, from 1, also over its removal.
	// Ready tells that the assigned node listens.
	MoveID uint64 `json:"move_id,omitempty"`
	Ready  bool   `json:"ready,omitempty"`
	// Drained: the administrator wants nobody to serve the address for now.
	Drained bool `json:"drained,omitempty"`
	// Removed: the address is to be given up for good by Node, which serves it still.
	Removed bool `json:"removed,omitempty"`
}

// VerifierBytes is the verifier as NFS sends it.
func (v *VIP) VerifierBytes() (b [8]byte) {
	d, _ := hex.DecodeString(v.Verifier)
	copy(b[:], d)
	return b
}

// Code says why the registry refuses something.
type Code string

// Codes of an Error.
const (
	// CodeServed: another node serves the address; Error.Node is its name.
	CodeServed Code = "served"
	// CodeNoVIP: no VIP has the index.
	CodeNoVIP Code = "no-vip"
	// CodeSuperseded: the period of service that the epoch names is over.
	CodeSuperseded Code = "superseded"
	// CodeLate: the call comes after a later one of the same session.
	CodeLate Code = "late"
	// CodeExists: the address is there with other settings.
	CodeExists Code = "exists"
	// CodeChanged: the settings of the address are others by now (VIPSpec.Was).
	CodeChanged Code = "changed"
	// CodeMoved: the address was assigned anew meanwhile.
	CodeMoved Code = "moved"
	// CodeDrained: the address, or the node, is not to serve by the administrator's
	// word; Error.Node is the node's name, or empty.
	CodeDrained Code = "drained"
	// CodeLimit: the registry or a number in it cannot grow further.
	CodeLimit Code = "limit"
	// CodeInvalid: an argument is none.
	CodeInvalid Code = "invalid"
	// CodeStorage: the registry could not be read or written. The change may be
	// made or not.
	CodeStorage Code = "storage"
)

// Error is a refusal of the registry.
type Error struct {
	Code Code   `json:"code"`
	Node string `json:"node,omitempty"` // CodeServed, CodeDrained
	Text string `json:"text"`
}

// Error implements error.
func (e *Error) Error() string { return "mgs: " + e.Text }
