// Package exports reads exports(5) files and decides which client may use which
// export how.
//
// # Syntax
//
// The file has one export per line: an absolute path, then clients, each with
// its options in parentheses, without a space before them:
//
//	/srv/data   192.0.2.0/24(rw) *.example.org(ro,all_squash) backup(rw,no_root_squash)
//	"/srv/a b"  -rw,insecure  192.0.2.1 2001:db8::/32
//
// A number sign at the start of a word begins a comment that ends with the line;
// a backslash before the line end continues the line. Paths may be quoted or
// contain octal escapes (\040). "-options" sets defaults for the clients that
// follow on its line.
//
// Clients are addresses, networks (192.0.2.0/24, 192.0.2.0/255.255.255.0,
// 2001:db8::/32), host names, host names with the wildcards * and ? (which match
// dots too), and "*" or nothing for everybody. The most specific client that
// matches decides: address or host name, then network by prefix length, then
// wildcard name by length, then everybody. Netgroups are not supported.
//
// # Options
//
// Defaults in brackets.
//
//   - rw, [ro]
//   - [secure], insecure: whether the client's port must be below 1024
//   - [root_squash], no_root_squash, [no_all_squash], all_squash, anonuid=N,
//     anongid=N [65534]
//   - [sync], async: both mean that nothing is acknowledged stable before it is
//     durable. async is accepted so that existing files work; it changes nothing.
//   - subtree_check, [no_subtree_check], [wdelay], no_wdelay, [hide], nohide,
//     crossmnt: accepted; there is one name space and writes are grouped anyway.
//   - sec=sys: the only security flavor
//   - fsid=root, fsid=N, fsid=UUID: the file system id of the export's handles.
//     root is 0, a UUID is folded to 64 bits. The default is the first 8 bytes of
//     the SHA-256 of the path with the highest bit set. It is part of every file
//     handle: changing it makes clients' handles stale.
//   - durability=disk, durability=two-node [disk]: when a changing operation is
//     acknowledged: when it is durable, or when it is in the memory of two nodes.
//   - dir=PATH: the directory of baton's name space that is exported; the default
//     is the export's path.
//
// fsid= and dir= belong to the export as a whole: give them with one client, or
// the same with all.
package exports

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Nobody is the default anonymous uid and gid.
const Nobody = 65534

// Options are the options of one client of an export. The zero value is not the
// default; see DefaultOptions.
type Options struct {
	ReadOnly     bool
	Secure       bool // the client's port must be below 1024
	Async        bool // accepted, without effect
	RootSquash   bool
	AllSquash    bool
	AnonUID      uint32
	AnonGID      uint32
	SubtreeCheck bool // accepted, without effect
	NoWDelay     bool // accepted, without effect
	NoHide       bool // accepted, without effect
	CrossMnt     bool // accepted, without effect
	Durability   Durability
}

// Durability says when a changing operation is acknowledged.
type Durability uint8

// Durabilities.
const (
	// DurabilityDisk: when it is durable.
	DurabilityDisk Durability = iota
	// DurabilityTwoNode: when frontend and target, on two nodes, both have it in
	// memory. With both on one node it is DurabilityDisk.
	DurabilityTwoNode
)

var durabilities = [...]string{"disk", "two-node"}

// String is the value of the option durability=.
func (d Durability) String() string {
	if int(d) < len(durabilities) {
		return durabilities[d]
	}
	return fmt.Sprintf("durability-%d", uint8(d))
}

// DefaultOptions returns what exports(5) assumes when no options are given.
func DefaultOptions() Options {
	return Options{ReadOnly: true, Secure: true, RootSquash: true, AnonUID: Nobody, AnonGID: Nobody}
}

// Kind is a kind of client, in order of precedence.
type Kind uint8

// Kinds of clients.
const (
	KindAddr     Kind = iota // one address
	KindHost                 // a host name
	KindNetwork              // a network
	KindWildcard             // a host name with wildcards
	KindAnyone               // everybody
)

// Client is one client entry of an export.
type Client struct {
	Kind    Kind
	Addr    netip.Addr   // KindAddr
	Network netip.Prefix // KindNetwork, masked
	Name    string       // KindHost and KindWildcard, lower case
	Options Options
}

// Spec is the client as it is written in an exports file.
func (c *Client) Spec() string {
	switch c.Kind {
	case KindAddr:
		return c.Addr.String()
	case KindNetwork:
		return c.Network.String()
	case KindAnyone:
		return "*"
	}
	return c.Name
}

// Export is one exported directory.
type Export struct {
	Path    string // what clients mount: absolute and clean
	Dir     string // directory in baton's name space: absolute and clean
	FSID    uint64
	Clients []Client // most specific first
}

// Decision is how a client may use an export. It is shared and immutable.
type Decision struct {
	Path     string
	Dir      string
	FSID     uint64
	ReadOnly bool
	Secure   bool
	AnonUID  uint32
	AnonGID  uint32

	Durability Durability

	rootSquash, allSquash bool
}

// RPC authentication flavors (RFC 5531 section 8.2).
const (
	AuthNone = 0
	AuthSys  = 1
)

// Squash maps the credential that an RPC of the given flavor carried to the one
// that the operation runs with. Whatever is not AUTH_SYS is anonymous. Root
// squashing maps uid 0, gid 0 and group 0 each by itself, as knfsd does; squashing
// all leaves no supplementary groups.
func (d *Decision) Squash(cred *wire.Cred, flavor uint32) {
	if d.allSquash || flavor != AuthSys {
		*cred = wire.Cred{UID: d.AnonUID, GID: d.AnonGID}
		return
	}
	if !d.rootSquash {
		return
	}
	if cred.UID == 0 {
		cred.UID = d.AnonUID
	}
	if cred.GID == 0 {
		cred.GID = d.AnonGID
	}
	for i := range min(int(cred.NGIDs), len(cred.GIDs)) {
		if cred.GIDs[i] == 0 {
			cred.GIDs[i] = d.AnonGID
		}
	}
}

// Verdict is the outcome of a match.
type Verdict uint8

// Verdicts.
const (
	// Allowed: there is a Decision.
	Allowed Verdict = iota
	// NoExport: nothing is exported under that path or FSID.
	NoExport
	// NotAllowed: the export has no entry for the client.
	NotAllowed
	// InsecurePort: the client's port is 1024 or above and the export is secure.
	InsecurePort
	// Pending: the answer depends on the client's host name, which is not known
	// yet. Resolve it where waiting is allowed (Table.Resolve) and match again.
	Pending
)

var verdictNames = [...]string{"allowed", "no such export", "client not allowed", "client port not below 1024", "client name not resolved yet"}

// String describes the verdict.
func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict %d", uint8(v))
}

// Status is the status that an NFS call gets: a handle of an export that is gone
// is stale.
func (v Verdict) Status() wire.Status {
	switch v {
	case Allowed:
		return wire.OK
	case NoExport:
		return wire.ErrStale
	case Pending:
		return wire.ErrJukebox
	}
	return wire.ErrAcces
}

// Names knows the host names of clients; NameCache is the implementation.
type Names interface {
	// Lookup returns the names of a client, lower case without trailing dot, and
	// whether they are known. It must not block or allocate.
	Lookup(addr netip.Addr) (names []string, known bool)
	// Resolve makes the names of addr known; it may block until ctx ends.
	Resolve(ctx context.Context, addr netip.Addr) error
}

// entry is an export prepared for matching.
type entry struct {
	exp       *Export
	decisions []Decision         // one per client
	addrs     map[netip.Addr]int // index of clients of KindAddr
	firstHost int                // index of the first client that is not KindAddr
	named     bool               // has KindHost or KindWildcard
}

// Table is a set of exports. It is immutable; a reload makes a new one.
type Table struct {
	entries  []entry // by path
	byPath   map[string]*entry
	byFSID   map[uint64]*entry
	names    Names
	hosts    []string
	warnings []*Error
}

// DefaultFSID is the FSID of an export that does not give one: the first 8 bytes
// of the SHA-256 of its path, big-endian, with the highest bit set, so that it is
// never 0 and never one of the small numbers that people choose.
func DefaultFSID(path string) uint64 {
	s := sha256.Sum256([]byte(path))
	return binary.BigEndian.Uint64(s[:]) | 1<<63
}

// newTable prepares validated exports.
func newTable(exps []Export, names Names, warnings []*Error) *Table {
	slices.SortFunc(exps, func(a, b Export) int { return cmp.Compare(a.Path, b.Path) })
	t := &Table{
		entries:  make([]entry, len(exps)),
		byPath:   make(map[string]*entry, len(exps)),
		byFSID:   make(map[uint64]*entry, len(exps)),
		names:    names,
		warnings: warnings,
	}
	for i := range exps {
		exp := &exps[i]
		slices.SortFunc(exp.Clients, compareClients)
		e := &t.entries[i]
		*e = entry{exp: exp, decisions: make([]Decision, len(exp.Clients)), addrs: map[netip.Addr]int{}, firstHost: len(exp.Clients)}
		for j := range exp.Clients {
			c := &exp.Clients[j]
			o := &c.Options
			e.decisions[j] = Decision{
				Path: exp.Path, Dir: exp.Dir, FSID: exp.FSID,
				ReadOnly: o.ReadOnly, Secure: o.Secure, AnonUID: o.AnonUID, AnonGID: o.AnonGID,
				Durability: o.Durability, rootSquash: o.RootSquash, allSquash: o.AllSquash,
			}
			if c.Kind == KindAddr {
				e.addrs[c.Addr] = j
			} else {
				e.firstHost = min(e.firstHost, j)
			}
			if c.Kind == KindHost || c.Kind == KindWildcard {
				e.named = true
			}
			if c.Kind == KindHost {
				t.hosts = append(t.hosts, c.Name)
			}
		}
		t.byPath[exp.Path] = e
		t.byFSID[exp.FSID] = e
	}
	slices.Sort(t.hosts)
	t.hosts = slices.Compact(t.hosts)
	return t
}

// compareClients orders clients by precedence.
func compareClients(a, b Client) int {
	return cmp.Or(
		cmp.Compare(a.Kind, b.Kind),
		cmp.Compare(b.Network.Bits(), a.Network.Bits()),
		boolCompare(a.Kind == KindWildcard, len(b.Name), len(a.Name)),
		a.Addr.Compare(b.Addr),
		a.Network.Addr().Compare(b.Network.Addr()),
		cmp.Compare(a.Name, b.Name),
	)
}

func boolCompare(use bool, a, b int) int {
	if !use {
		return 0
	}
	return cmp.Compare(a, b)
}

// MatchPath finds how the client at addr:port may use the export with exactly
// this path. The Decision is non-nil only when Allowed.
func (t *Table) MatchPath(path string, addr netip.Addr, port uint16) (*Decision, Verdict) {
	return t.match(t.byPath[path], addr, port)
}

// MatchFSID is MatchPath for the export with this FSID.
func (t *Table) MatchFSID(fsid uint64, addr netip.Addr, port uint16) (*Decision, Verdict) {
	return t.match(t.byFSID[fsid], addr, port)
}

// Resolve makes the names of addr known after a verdict of Pending; it may block
// until ctx ends.
func (t *Table) Resolve(ctx context.Context, addr netip.Addr) error {
	if t.names == nil {
		return nil
	}
	return t.names.Resolve(ctx, addr)
}

func (t *Table) match(e *entry, addr netip.Addr, port uint16) (*Decision, Verdict) {
	if e == nil {
		return nil, NoExport
	}
	i, v := t.find(e, addr.Unmap().WithZone(""))
	if v != Allowed {
		return nil, v
	}
	d := &e.decisions[i]
	if d.Secure && port >= 1024 {
		return nil, InsecurePort
	}
	return d, Allowed
}

// find returns the index of the client entry that decides.
func (t *Table) find(e *entry, addr netip.Addr) (int, Verdict) {
	if i, ok := e.addrs[addr]; ok {
		return i, Allowed
	}
	var names []string
	known := true
	if e.named && t.names != nil {
		names, known = t.names.Lookup(addr)
	}
	for i := e.firstHost; i < len(e.exp.Clients); i++ {
		c := &e.exp.Clients[i]
		ok := false
		switch c.Kind {
		case KindHost, KindWildcard:
			if !known {
				return 0, Pending
			}
			for _, n := range names {
				if c.Kind == KindHost && n == c.Name || c.Kind == KindWildcard && wildMatch(c.Name, n) {
					ok = true
					break
				}
			}
		case KindNetwork:
			ok = c.Network.Contains(addr)
		case KindAnyone:
			ok = true
		}
		if ok {
			return i, Allowed
		}
	}
	return 0, NotAllowed
}

// wildMatch matches s against a pattern of * (any bytes, dots too) and ?.
func wildMatch(pattern, s string) bool {
	p, i, star, mark := 0, 0, -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// FindPath finds the export that a mount of path reaches: the one with the
// longest path that is path or above it. rest is what remains below the export,
// without leading slash; empty for the export itself. Repeated slashes and "."
// are ignored; a path with ".." is not found.
func (t *Table) FindPath(path string) (exp *Export, rest string, ok bool) {
	p, ok := cleanPath(path)
	if !ok {
		return nil, "", false
	}
	for up := p; ; {
		if e := t.byPath[up]; e != nil {
			return e.exp, strings.TrimPrefix(p[len(up):], "/"), true
		}
		if up == "/" {
			return nil, "", false
		}
		up = up[:max(1, strings.LastIndexByte(up, '/'))]
	}
}

// Exports returns all exports, ordered by path. The caller must not change them.
func (t *Table) Exports() []*Export {
	l := make([]*Export, len(t.entries))
	for i := range t.entries {
		l[i] = t.entries[i].exp
	}
	return l
}

// Hosts returns the host names without wildcards that clients are named by.
func (t *Table) Hosts() []string { return t.hosts }

// NeedsNames tells whether matching addr against some export may need the names
// of clients.
func (t *Table) NeedsNames() bool {
	for i := range t.entries {
		if t.entries[i].named {
			return true
		}
	}
	return false
}

// Warnings returns what is allowed but probably not meant, such as an export to
// everybody that comes from a space before the options.
func (t *Table) Warnings() []*Error { return t.warnings }
