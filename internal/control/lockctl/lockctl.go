// Package lockctl is the administrator's side of the lock table: the commands
// of the control socket that list and release locks, and the figures for the
// node's status. It works through the file system's client like a frontend.
package lockctl

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Bounds of one answer. With the longest names that clients can give, the JSON
// of a page stays below the control socket's limit.
const (
	pageLocks  = 1024
	pageHosts  = 4096
	scanPages  = 8   // of the MDT, for one answer that a filter keeps short
	MaxRelease = 512 // IDs of one request
)

// FS is what the commands need of *client.FS.
type FS interface {
	Call(ctx context.Context, o client.Owner, req *wire.Request, rep *wire.Reply)
	Resolve(ctx context.Context, from wire.FID, path string) (wire.Attr, wire.Status)
}

// Admin carries out the commands. Its methods are safe for concurrent use.
type Admin struct {
	fs   FS
	vips func(context.Context) ([]mgs.VIP, error)
	now  func() time.Time

	mu    sync.Mutex // guards paths; held while they are searched
	paths paths
}

// New returns an Admin; now is usually time.Now. vips lists all service addresses that there ever were,
// as mgs.Registry.VIPs does, with their current epochs and NSM states.
func New(fs FS, vips func(context.Context) ([]mgs.VIP, error), now func() time.Time) *Admin {
	return &Admin{fs: fs, vips: vips, now: now}
}

// Register lets a control server execute the commands. get gives the administrator's
// way to the lock table, nil as long as there is none.
func Register(s *control.Server, get func() *Admin) {
	handle(s, get, control.CmdLocks, (*Admin).List)
	handle(s, get, control.CmdLocksRelease, (*Admin).Release)
	handle(s, get, control.CmdLocksFree, (*Admin).Free)
	handle(s, get, control.CmdLockHosts, (*Admin).Hosts)
}

func handle[A, R any](s *control.Server, get func() *Admin, cmd string, fn func(*Admin, context.Context, A) (R, error)) {
	s.Handle(cmd, func(ctx context.Context, raw json.RawMessage) (any, error) {
		a := get()
		if a == nil {
			return nil, errors.New("the running baton serves no locks (locks.enabled), or not yet")
		}
		var args A
		if len(raw) > 0 {
			if err := json.Unmarshal(raw, &args); err != nil {
				return nil, fmt.Errorf("arguments of %s: %w", cmd, err)
			}
		}
		return fn(a, ctx, args)
	})
}

// call executes one operation.
func (a *Admin) call(ctx context.Context, v mgs.VIP, req *wire.Request) (*wire.Reply, error) {
	rep := &wire.Reply{}
	a.fs.Call(ctx, client.Owner{VIP: v.Index, Epoch: v.Epoch}, req, rep)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case rep.Status == wire.ErrTargetDown:
		return nil, fmt.Errorf("the metadata target does not answer: %w", rep.Status)
	case rep.Status != wire.OK:
		return nil, rep.Status
	case rep.Lock == nil && req.Lock != nil:
		return nil, fmt.Errorf("the metadata target's answer has no locks: %w", wire.ErrProto)
	}
	return rep, nil
}

// names gives the service addresses by index.
type names map[uint32]mgs.VIP

func (a *Admin) names(ctx context.Context) (names, error) {
	l, err := a.vips(ctx)
	if err != nil {
		return nil, fmt.Errorf("list service addresses: %w", err)
	}
	m := names{}
	for _, v := range l {
		m[v.Index] = v
	}
	return m, nil
}

func (m names) addr(vip uint32) string {
	if v, ok := m[vip]; ok {
		return v.Addr.String()
	}
	return fmt.Sprintf("vip-%d", vip)
}

// who selects clients by address or name; nil selects all.
type who struct {
	addr netip.Addr
	name string
}

func newWho(s string) *who {
	if s == "" {
		return nil
	}
	if ad, err := netip.ParseAddr(s); err == nil {
		return &who{addr: ad.Unmap()}
	}
	return &who{name: s}
}

func (w *who) match(h *wire.LockHost) bool {
	switch {
	case w == nil:
		return true
	case w.addr.IsValid():
		return h.Addr == w.addr
	}
	return h.Name == w.name
}

// shareNames are XNFS fsh4_mode and fsh4_access.
var shareNames = [4]string{"none", "read", "write", "both"}

func (a *Admin) lock(h *wire.LockHolder, m names, now time.Time) status.Lock {
	l := status.Lock{
		ID: h.ID, FID: h.FID.String(), Kind: status.LockRead, Start: h.Range.Start, End: h.Range.End,
		ToEOF: h.Range.End == wire.MaxLockOffset, Client: h.Owner.Name, ClientAddr: addrText(h.Owner.Addr), Svid: h.Owner.Svid,
		OH: hex.EncodeToString([]byte(h.Owner.OH)), Addr: m.addr(h.Owner.VIP), State: h.State.String(),
		Since: time.Unix(0, h.Since).UTC(), Age: max(now.Sub(time.Unix(0, h.Since)), 0),
	}
	switch {
	case h.Share:
		l.Kind, l.Start, l.End, l.ToEOF = status.LockShare, 0, 0, false
		l.Mode, l.Access = shareNames[h.ShareMode&3], shareNames[h.ShareAccess&3]
	case h.Exclusive:
		l.Kind = status.LockWrite
	}
	return l
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return "-"
	}
	return a.String()
}

// page reads entries of the lock table with IDs above after.
func (a *Admin) page(ctx context.Context, fid wire.FID, after uint64, max int) ([]wire.LockHolder, bool, error) {
	req := &wire.Request{FID: fid, Cookie: after, MaxEntries: uint32(max), Lock: &wire.LockArgs{AllVIPs: true}}
	req.Op = wire.OpLockList
	rep, err := a.call(ctx, mgs.VIP{}, req)
	if err != nil {
		return nil, false, fmt.Errorf("list locks: %w", err)
	}
	l := rep.Lock.Locks
	for i := range l {
		if l[i].ID <= after {
			return nil, false, fmt.Errorf("list locks: %d follows %d: %w", l[i].ID, after, wire.ErrProto)
		}
		after = l[i].ID
	}
	return l, rep.EOF || len(l) == 0, nil
}

// ListArgs are the arguments of control.CmdLocks. Empty fields select all.
type ListArgs struct {
	// File is a path inside the file system, or a FID as wire.FID.String has it.
	File string `json:"file,omitempty"`
	// Client is a client's address or name.
	Client string `json:"client,omitempty"`
	// State is a name of wire.LockState.
	State string `json:"state,omitempty"`
	// After is ListResult.Next of the page before.
	After uint64 `json:"after,omitempty"`
}

// ListResult is a page of the lock table, in the order of ID. A page may be
// empty although it is not the last.
type ListResult struct {
	Locks []status.Lock `json:"locks"`
	Next  uint64        `json:"next"`
	EOF   bool          `json:"eof"`
}

// List returns a page of the lock table.
func (a *Admin) List(ctx context.Context, args ListArgs) (*ListResult, error) {
	fid, path, err := a.file(ctx, args.File)
	if err != nil {
		return nil, err
	}
	m, err := a.names(ctx)
	if err != nil {
		return nil, err
	}
	w, now := newWho(args.Client), a.now()
	res := &ListResult{Locks: []status.Lock{}, Next: args.After}
	var fids []wire.FID
	for range scanPages {
		page, eof, err := a.page(ctx, fid, res.Next, pageLocks)
		if err != nil {
			return nil, err
		}
		res.EOF = eof
		for i := range page {
			h := &page[i]
			if len(res.Locks) == pageLocks {
				res.EOF = false
				break
			}
			res.Next = h.ID
			if w.match(&h.Owner.LockHost) && (args.State == "" || h.State.String() == args.State) {
				res.Locks = append(res.Locks, a.lock(h, m, now))
				fids = append(fids, h.FID)
			}
		}
		if res.EOF || len(res.Locks) == pageLocks {
			break
		}
	}
	a.setPaths(ctx, res.Locks, fids, path, res.EOF)
	return res, nil
}

// ReleaseArgs are the arguments of control.CmdLocksRelease.
type ReleaseArgs struct {
	IDs []uint64 `json:"ids"` // at most MaxRelease
}

// ReleaseResult tells what became of the entries. Failed says why the rest
// was not tried, "" when all were.
type ReleaseResult struct {
	Released []status.Lock `json:"released"`
	Missing  []uint64      `json:"missing"`
	Failed   string        `json:"failed,omitempty"`
}

// Release removes entries by their ID; it is durable when it returns.
func (a *Admin) Release(ctx context.Context, args ReleaseArgs) (*ReleaseResult, error) {
	if len(args.IDs) > MaxRelease {
		return nil, fmt.Errorf("release: %d locks are more than %d", len(args.IDs), MaxRelease)
	}
	m, err := a.names(ctx)
	if err != nil {
		return nil, err
	}
	now := a.now()
	res := &ReleaseResult{Released: []status.Lock{}, Missing: []uint64{}}
	var fids []wire.FID
	for _, id := range args.IDs {
		// What it was is known only before. If it changes in between, its owner
		// did that, and the description is of the entry that is removed anyway:
		// an ID is not used twice.
		found, err := []wire.LockHolder(nil), error(nil)
		if id > 0 {
			found, _, err = a.page(ctx, wire.FID{}, id-1, 1)
		}
		if err == nil && (len(found) == 0 || found[0].ID != id) {
			res.Missing = append(res.Missing, id)
			continue
		}
		if err == nil {
			req := &wire.Request{Lock: &wire.LockArgs{ID: id}}
			req.Op, req.Flags = wire.OpLockRelease, wire.FlagWaitCommit
			_, err = a.call(ctx, mgs.VIP{}, req)
		}
		switch err {
		case nil:
			res.Released = append(res.Released, a.lock(&found[0], m, now))
			fids = append(fids, found[0].FID)
		case wire.ErrNoEnt:
			res.Missing = append(res.Missing, id)
		default:
			res.Failed = fmt.Sprintf("lock %d: %v", id, err)
		}
		if res.Failed != "" {
			break
		}
	}
	a.setPaths(ctx, res.Released, fids, "", len(args.IDs) < MaxRelease)
	return res, nil
}

// FreeArgs are the arguments of control.CmdLocksFree.
type FreeArgs struct {
	Client string `json:"client"` // address or name
	// AllAddresses permits to release what the client holds towards more than
	// one service address.
	AllAddresses bool `json:"all_addresses,omitempty"`
}

// Freed is what a client has lost towards one service address.
type Freed struct {
	Client     string `json:"client"`
	ClientAddr string `json:"client_addr"`
	Addr       string `json:"address"`
	Freed      uint32 `json:"freed"`
}

// FreeResult tells what control.CmdLocksFree has released. Failed says why the
// rest was not tried, "" when nothing failed.
type FreeResult struct {
	Clients []Freed `json:"clients"`
	Failed  string  `json:"failed,omitempty"`
}
