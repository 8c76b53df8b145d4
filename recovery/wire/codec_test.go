package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// gen makes random valid values. About a third of what may be absent is.
type gen struct{ *rand.Rand }

func (g gen) yes() bool { return g.IntN(3) > 0 }

func (g gen) bytes(limit int) []byte {
	n := g.IntN(16)
	switch g.IntN(8) {
	case 0:
		return nil
	case 1:
		n = limit
	}
	p := make([]byte, min(n, limit))
	for i := range p {
		p[i] = byte(g.Uint32())
	}
	if len(p) == 0 {
		return nil
	}
	return p
}

func (g gen) fid() FID   { return FID{g.Uint64(), g.Uint32(), g.Uint32()} }
func (g gen) i64() int64 { return int64(g.Uint64()) }

func (g gen) addr() netip.Addr {
	var p [16]byte
	for i := range p {
		p[i] = byte(g.Uint32())
	}
	switch g.IntN(4) {
	case 0:
		return netip.Addr{}
	case 1:
		return netip.AddrFrom4([4]byte(p[:4]))
	case 2:
		return netip.AddrFrom16(p).WithZone("eth0")
	}
	return netip.AddrFrom16(p)
}

func (g gen) host() LockHost {
	return LockHost{VIP: g.Uint32(), Addr: g.addr(), Name: string(g.bytes(MaxLockHostName))}
}

func (g gen) owner() LockOwner {
	return LockOwner{LockHost: g.host(), Svid: g.Uint32(), OH: string(g.bytes(MaxLockOwnerOH))}
}

func (g gen) attr() Attr {
	a := Attr{
		FID: g.fid(), Type: FileType(g.IntN(8)), Mode: g.Uint32(), Nlink: g.Uint32(), UID: g.Uint32(), GID: g.Uint32(),
		Size: g.Uint64(), Used: g.Uint64(), Atime: g.i64(), Mtime: g.i64(), Ctime: g.i64(),
		Generation: g.Uint32(), Version: g.Uint64(), EpochOpen: g.yes(), EpochShared: g.yes(),
	}
	if g.yes() {
		a.Parent = g.fid()
	}
	if g.yes() {
		a.RdevMajor, a.RdevMinor = g.Uint32(), g.Uint32()
	}
	if g.yes() {
		a.Layout = g.layout()
	}
	if g.yes() {
		a.MtimeAt = g.i64()
	}
	return a
}

func (g gen) layout() Layout {
	l := Layout{StripeSize: g.Uint32(), Count: uint8(g.IntN(MaxStripes + 1))}
	for i := range l.Count {
		l.OST[i] = uint16(g.Uint32())
	}
	return l
}

func (g gen) pre() PreAttr {
	return PreAttr{Valid: true, Size: g.Uint64(), Mtime: g.i64(), Ctime: g.i64()}
}

func (g gen) request(op Op) *Request {
	r := &Request{Header: Header{
		XID: g.Uint64(), Op: op, Flags: Flags(g.Uint32()), ClientGen: g.Uint64(), Transno: g.Uint64(),
		LastCommitted: g.Uint64(), VIP: g.Uint32(), VIPEpoch: g.Uint64(), Credits: uint16(g.Uint32()), Slot: uint16(g.Uint32()), Tenure: g.Uint64(),
	}}
	copy(r.Client[:], g.bytes(16))
	for i := range r.PreVersions {
		r.PreVersions[i] = g.Uint64()
	}
	l := layoutOf(op)
	set := func(f reqField, fn func()) {
		if l.req&f != 0 && g.yes() {
			fn()
		}
	}
	set(rFID, func() { r.FID = g.fid() })
	set(rFID2, func() { r.FID2 = g.fid() })
	set(rName, func() { r.Name = g.bytes(MaxNameLen) })
	set(rName2, func() { r.Name2 = g.bytes(MaxNameLen) })
	set(rCred, func() {
		r.Cred = Cred{UID: g.Uint32(), GID: g.Uint32(), NGIDs: uint8(g.IntN(17))}
		for i := range r.Cred.NGIDs {
			r.Cred.GIDs[i] = g.Uint32()
		}
	})
	set(rKey, func() {
		r.Key = ReplyKey{Addr: g.addrKey(), Port: uint16(g.Uint32()), XID: g.Uint32(), Proc: 1 + g.Uint32N(1<<31), Sum: g.Uint64()}
	})
	set(rSetAttr, func() {
		r.SetAttr = SetAttr{SetMask(g.Uint32()), g.Uint32(), g.Uint32(), g.Uint32(), g.Uint64(), g.i64(), g.i64()}
	})
	set(rGuard, func() { r.Guard, r.GuardCtime = true, g.i64() })
	set(rHow, func() { r.How = CreateHow(g.IntN(3)); copy(r.Verf[:], g.bytes(8)) })
	set(rType, func() { r.Type, r.RdevMajor, r.RdevMinor = FileType(g.IntN(8)), g.Uint32(), g.Uint32() })
	set(rData, func() { r.Data = g.bytes(MaxSymlinkLen) })
	set(rCookie, func() { r.Cookie = g.Uint64() })
	set(rCount, func() { r.Count = g.Uint32() })
	set(rMaxEntries, func() { r.MaxEntries = g.Uint32() })
	set(rPlus, func() { r.Plus = true })
	set(rLayout, func() { r.Layout = Layout{StripeSize: g.Uint32(), Count: uint8(g.Uint32())} })
	set(rLogIDs, func() {
		for range g.few(MaxLogIDs) {
			r.LogIDs = append(r.LogIDs, g.Uint64())
		}
	})
	set(rEpochs, func() {
		for range g.few(MaxEpochs) {
			r.Epochs = append(r.Epochs, EpochClose{g.fid(), g.Uint64(), g.Uint64(), g.i64(), g.i64(), g.Uint64()})
		}
	})
	set(rStripe, func() { r.Stripe = uint8(g.Uint32()) })
	set(rOffset, func() { r.Offset = g.Uint64() })
	set(rSize, func() { r.Size = g.Uint64() })
	set(rLogID, func() { r.LogID = g.Uint64() })
	set(rStable, func() { r.Stable = StableHow(g.IntN(3)) })
	set(rTime, func() { r.Time = g.i64() })
	set(rLock, func() { r.Lock = g.lockArgs(l.lock) })
	set(rBody, func() { r.Data = g.bytes(MaxData) })
	set(rPeer, func() { copy(r.Peer[:], g.bytes(16)) })
	if r.Flags&FlagReplay != 0 {
		set(rMade, func() { r.Made = Made{FID: g.fid(), Generation: g.Uint32(), Layout: g.layout(), Time: g.i64()} })
	}
	set(rBulkIn|rBulkOut, func() { r.Bulk = g.bytes(1 << 10) })
	return r
}

func (g gen) addrKey() (k [16]byte) { copy(k[:], g.bytes(16)); return k }

func (g gen) few(limit int) int {
	if g.IntN(10) == 0 {
		return limit
	}
	return g.IntN(4)
}

func (g gen) lockArgs(f lockField) *LockArgs {
	a := &LockArgs{Exclusive: g.yes(), Block: g.yes(), Reclaim: g.yes(), Monitor: g.yes(), Crashed: g.yes(), Forget: g.yes(), AllVIPs: g.yes()}
	if f&lHost != 0 {
		a.Owner.LockHost = g.host()
	}
	if f&lOwner != 0 {
		a.Owner.Svid, a.Owner.OH = g.Uint32(), string(g.bytes(MaxLockOwnerOH))
	}
	if f&lRange != 0 {
		a.Range = LockRange{g.Uint64(), g.Uint64()}
	}
	if f&lNote != 0 {
		a.Note = g.bytes(MaxLockNote)
	}
	if f&lShare != 0 {
		a.ShareMode, a.ShareAccess = uint8(g.Uint32()), uint8(g.Uint32())
	}
	if f&lID != 0 {
		a.ID = g.Uint64()
	}
	if f&lGrant != 0 {
		a.Grant = GrantOutcome(g.IntN(4))
	}
	if f&(lService|lNSM) != 0 {
		a.NSMState = g.Uint32()
	}
	if f&lService != 0 {
		a.Window = g.i64()
	}
	return a
}

func (g gen) holder() LockHolder {
	return LockHolder{
		ID: g.Uint64(), FID: g.fid(), Owner: g.owner(), Range: LockRange{g.Uint64(), g.Uint64()}, Exclusive: g.yes(),
		State: LockState(g.IntN(5)), Since: g.i64(), Share: g.yes(), ShareMode: uint8(g.Uint32()), ShareAccess: uint8(g.Uint32()),
	}
}

func (g gen) reply(op Op) *Reply {
	r := &Reply{
		XID: g.Uint64(), Status: Status(g.Uint32N(3) * 10007), Transno: g.Uint64(), LastCommitted: g.Uint64(),
		Reconstructed: g.yes(), Created: g.yes(), EOF: g.yes(), Recovering: g.yes(), Known: g.yes(), Pingless: g.yes(), Time: g.i64(),
	}
	for i := range r.PreVersions {
		r.PreVersions[i] = g.Uint64()
	}
	l := layoutOf(op)
	set := func(f repField, fn func()) {
		if l.rep&f != 0 && g.yes() {
			fn()
		}
	}
	set(pAttr, func() { r.Attr, r.HasAttr = g.attr(), true })
	set(pPre, func() { r.Pre = g.pre() })
	set(pDirAttr, func() { r.DirAttr, r.HasDir = g.attr(), true })
	set(pDirAttr2, func() { r.DirAttr2, r.HasDir2 = g.attr(), true })
	set(pDirPre, func() { r.DirPre = g.pre() })
	set(pDirPre2, func() { r.DirPre2 = g.pre() })
	set(pTruncate, func() { r.Truncate = Truncate{g.Uint64(), g.Uint64()} })
	set(pData, func() { r.Data = g.bytes(MaxData) })
	set(pEntries, func() {
		for range g.IntN(20) {
			e := Dirent{Cookie: g.Uint64(), FID: g.fid(), Type: FileType(g.IntN(8)), Name: g.bytes(MaxNameLen), HasAttr: g.yes()}
			if e.HasAttr {
				e.Attr = g.attr()
			}
			r.Entries = append(r.Entries, e)
		}
	})
	set(pStatfs, func() {
		r.Statfs = Statfs{g.Uint64(), g.Uint64(), g.Uint64(), g.Uint64(), g.Uint64(), g.Uint64()}
	})
	set(pCount, func() { r.Count = g.Uint32N(MaxBulk) })
	set(pObjPre, func() { r.ObjPre = g.pre() })
	set(pObj, func() { r.Obj = ObjAttr{g.yes(), g.Uint64(), g.Uint64(), g.i64(), g.i64(), g.Uint64()} })
	set(pFlush, func() { r.FlushErrors = g.Uint64() })
	set(pPort, func() { r.Port = uint16(g.Uint32()) })
	set(pInstance, func() { r.Instance, r.Tenure = g.Uint64(), g.Uint64() })
	set(pLock, func() {
		r.Lock = &LockReply{}
		if g.yes() {
			r.Lock.Holder = g.holder()
		}
		for range g.IntN(4) {
			r.Lock.Locks = append(r.Lock.Locks, g.holder())
		}
		for range g.IntN(4) {
			r.Lock.Grants = append(r.Lock.Grants, LockGrant{g.Uint64(), g.Uint64(), g.fid(), g.owner(), LockRange{g.Uint64(), g.Uint64()}, g.yes(), g.bytes(MaxLockNote)})
		}
		for range g.IntN(4) {
			r.Lock.Hosts = append(r.Lock.Hosts, MonitoredHost{g.host(), g.i64(), g.Uint32(), g.Uint32(), g.Uint32(), g.bytes(MaxLockNote)})
		}
		if g.yes() {
			r.Lock.Service = LockServiceInfo{g.Uint32(), g.i64(), g.yes(), g.yes(), g.Uint32(), g.Uint32(), g.Uint32(), g.Uint32(), g.Uint32(), g.Uint32(), g.Uint32()}
		}
		r.Lock.Freed = g.Uint32N(3)
	})
	return r
}

func allOps() (ops []Op) {
	for op := range Op(len(opLayouts)) {
		if op.Known() {
			ops = append(ops, op)
		}
	}
	return ops
}

var equal = cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})}

func newGen(t testing.TB) gen {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return gen{rand.New(rand.NewPCG(seed, 1))}
}

// Every operation that the package defines can be encoded.
func TestEveryOpIsKnown(t *testing.T) {
	for _, r := range [][2]Op{{OpConnect, OpBeat}, {OpGetattr, OpOSTFetch}, {OpRead, OpDestroy}, {OpRegistry, OpWatchVIPs}} {
		for op := r[0]; op <= r[1]; op++ {
			if !op.Known() {
				t.Errorf("operation %d has no encoding", op)
			}
		}
	}
	for _, op := range []Op{0, OpBeat + 1, OpOSTFetch + 1, OpDestroy + 1, OpWatchVIPs + 1, 0xffff} {
		if op.Known() {
			t.Errorf("operation %d has an encoding", op)
		}
	}
	for op := range Op(200) {
		if op.SendsBulk() != (op == OpWrite) || op.FillsBulk() != (op == OpRead) {
			t.Errorf("operation %d: sends bulk %v, fills bulk %v", op, op.SendsBulk(), op.FillsBulk())
		}
	}
}

// roundTrips is how many messages of each kind are tried.
func roundTrips() int {
	if testing.Short() {
		return 12
	}
	return 60
}

func TestRequestRoundTrip(t *testing.T) {
	g := newGen(t)
	var got Request
	for _, op := range allOps() {
		for range roundTrips() {
			want := g.request(op)
			if st := CheckRequest(want); st != OK {
				t.Fatalf("op %d: %v", op, st)
			}
			b := AppendRequest([]byte("before"), want)[6:]
			if len(b) > MaxRequestSize {
				t.Fatalf("op %d takes %d bytes", op, len(b))
			}
			if err := DecodeRequest(b, &got); err != nil {
				t.Fatalf("op %d: %v", op, err)
			}
			if n := RequestBulk(b); n != len(want.Bulk) || got.Bulk != nil {
				t.Fatalf("op %d: %d bytes of bulk, want %d", op, n, len(want.Bulk))
			}
			if o, x, ok := RequestID(b); o != op || x != want.XID || !ok {
				t.Fatalf("RequestID: %d %d %v", o, x, ok)
			}
			got.Bulk = want.Bulk
			if d := cmp.Diff(want, &got, equal); d != "" {
				t.Fatalf("op %d (-sent +received):\n%s", op, d)
			}
			cutAndFlip(t, g, b, func(b []byte) error { var r Request; return DecodeRequest(b, &r) })
		}
	}
}

func TestReplyRoundTrip(t *testing.T) {
	g := newGen(t)
	var got Reply
	for _, op := range allOps() {
		for range roundTrips() {
			want := g.reply(op)
			b := AppendReply([]byte("before"), op, want)[6:]
			n, err := DecodeReply(b, op, &got)
			if err != nil {
				t.Fatalf("op %d: %v", op, err)
			}
			if n != ReplyBulk(op, want) {
				t.Fatalf("op %d: %d bytes of bulk, want %d", op, n, ReplyBulk(op, want))
			}
			clear(b) // nothing may alias the message
			if op == OpReaddir {
				got.Data = nil // the names' memory
			}
			if d := cmp.Diff(want, &got, equal); d != "" {
				t.Fatalf("op %d (-sent +received):\n%s", op, d)
			}
			b = AppendReply(b[:0], op, want)
			cutAndFlip(t, g, b, func(b []byte) error { var r Reply; _, err := DecodeReply(b, op, &r); return err })
		}
	}
}

// cutAndFlip checks that no part of a message passes for a message, and that a
// damaged one gives at most an ErrCodec.
func cutAndFlip(t *testing.T, g gen, b []byte, decode func([]byte) error) {
	t.Helper()
	if err := decode(b[:g.IntN(len(b))]); !errors.Is(err, ErrCodec) {
		t.Fatalf("a cut message gives %v", err)
	}
	if err := decode(append(bytes.Clone(b), 0)); !errors.Is(err, ErrCodec) {
		t.Fatalf("a message with a byte more gives %v", err)
	}
	c := bytes.Clone(b)
	c[g.IntN(len(c))] ^= 1 << g.IntN(8)
	if err := decode(c); err != nil && !errors.Is(err, ErrCodec) {
		t.Fatalf("a damaged message gives %v", err)
	}
}

func TestCheckRequest(t *testing.T) {
	big := func(op Op, fn func(*Request)) *Request {
		r := &Request{Header: Header{Op: op}, Lock: &LockArgs{}}
		fn(r)
		return r
	}
	for _, c := range []struct {
		r    *Request
		want Status
	}{
		{big(0, func(*Request) {}), ErrNotSupp},
		{big(OpLookup, func(r *Request) { r.Name = make([]byte, MaxNameLen+1) }), ErrNameTooLong},
		{big(OpRename, func(r *Request) { r.Name2 = make([]byte, MaxNameLen+1) }), ErrNameTooLong},
		{big(OpGetattr, func(r *Request) { r.Name = make([]byte, MaxNameLen+1) }), OK}, // not sent
		{big(OpSymlink, func(r *Request) { r.Data = make([]byte, MaxSymlinkLen+1) }), ErrNameTooLong},
		{big(OpCreate, func(r *Request) { r.Cred.NGIDs = 17 }), ErrProto},
		{big(OpTruncateDone, func(r *Request) { r.LogIDs = make([]uint64, MaxLogIDs+1) }), ErrProto},
		{big(OpCloseEpoch, func(r *Request) { r.Epochs = make([]EpochClose, MaxEpochs+1) }), ErrProto},
		{big(OpWrite, func(r *Request) { r.Bulk = make([]byte, MaxBulk+1) }), ErrProto},
		{big(OpLock, func(r *Request) { r.Lock.Owner.OH = strings.Repeat("x", MaxLockOwnerOH+1) }), ErrProto},
		{big(OpLock, func(r *Request) { r.Lock.Owner.Name = strings.Repeat("x", MaxLockHostName+1) }), ErrProto},
		{big(OpLock, func(r *Request) { r.Lock.Note = make([]byte, MaxLockNote+1) }), ErrProto},
		{big(OpLock, func(r *Request) { r.Lock = nil }), OK},
	} {
		if st := CheckRequest(c.r); st != c.want {
			t.Errorf("op %d: %v, want %v", c.r.Op, st, c.want)
		}
	}
}

// What the limits forbid is refused when it comes from the network.
func TestDecodeRefuses(t *testing.T) {
	for _, c := range []struct {
		what string
		b    []byte
	}{
		{"name", AppendRequest(nil, &Request{Header: Header{Op: OpLookup}, Name: make([]byte, MaxNameLen+1)})},
		{"symlink", AppendRequest(nil, &Request{Header: Header{Op: OpSymlink}, Data: make([]byte, MaxSymlinkLen+1)})},
		{"groups", AppendRequest(nil, &Request{Header: Header{Op: OpLookup}, Cred: Cred{NGIDs: 17}})},
		{"logs", AppendRequest(nil, &Request{Header: Header{Op: OpTruncateDone}, LogIDs: make([]uint64, MaxLogIDs+1)})},
		{"epochs", AppendRequest(nil, &Request{Header: Header{Op: OpCloseEpoch}, Epochs: make([]EpochClose, MaxEpochs+1)})},
		{"bulk", AppendRequest(nil, &Request{Header: Header{Op: OpWrite}, Bulk: make([]byte, MaxBulk+1)})},
		{"operation", AppendRequest(nil, &Request{Header: Header{Op: 31}})},
		{"owner", AppendRequest(nil, &Request{Header: Header{Op: OpLock}, Lock: &LockArgs{Owner: LockOwner{OH: strings.Repeat("x", 2000)}}})},
	} {
		var r Request
		if err := DecodeRequest(c.b, &r); !errors.Is(err, ErrCodec) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	b := AppendRequest(nil, &Request{Header: Header{Op: OpPing}})
	b[0]++
	if err := DecodeRequest(b, new(Request)); !errors.Is(err, ErrCodec) {
		t.Error("another version:", err)
	}
	b = AppendReply(nil, OpRead, &Reply{Count: MaxBulk + 1})
	if _, err := DecodeReply(b, OpRead, new(Reply)); !errors.Is(err, ErrCodec) {
		t.Error("more bulk than allowed:", err)
	}
	b = AppendReply(nil, OpGetattr, &Reply{})
	if _, err := DecodeReply(b, OpLookup, new(Reply)); !errors.Is(err, ErrCodec) {
		t.Error("reply to another operation:", err)
	}
}

// Long lists are cut, not refused, where the client can go on.
func TestLongReplies(t *testing.T) {
	name := []byte(strings.Repeat("n", MaxNameLen))
	r := Reply{EOF: true}
	for i := range 40000 {
		r.Entries = append(r.Entries, Dirent{Cookie: uint64(i), Name: name})
	}
	b := AppendReply(nil, OpReaddir, &r)
	var got Reply
	if _, err := DecodeReply(b, OpReaddir, &got); err != nil || len(b) > MaxReplySize {
		t.Fatal(len(b), err)
	}
	if got.EOF || len(got.Entries) < 10000 || len(got.Entries) >= 40000 || !bytes.Equal(got.Entries[9999].Name, name) {
		t.Fatalf("%d entries, EOF %v", len(got.Entries), got.EOF)
	}
	h := LockHolder{Owner: LockOwner{OH: strings.Repeat("o", MaxLockOwnerOH)}}
	lr := Reply{EOF: true, Lock: &LockReply{}}
	for i := range 5000 {
		h.ID = uint64(i)
		lr.Lock.Locks = append(lr.Lock.Locks, h)
	}
	b = AppendReply(nil, OpLockList, &lr)
	if _, err := DecodeReply(b, OpLockList, &got); err != nil {
		t.Fatal(err)
	}
	if n := len(got.Lock.Locks); got.EOF || n < 3000 || n >= 5000 {
		t.Fatalf("%d locks, EOF %v", n, got.EOF)
	}
	hr := Reply{Lock: &LockReply{Hosts: make([]MonitoredHost, 5000)}}
	for i := range hr.Lock.Hosts {
		hr.Lock.Hosts[i].Host.Name = strings.Repeat("h", MaxLockHostName)
	}
	b = AppendReply(nil, OpLockHosts, &hr)
	if _, err := DecodeReply(b, OpLockHosts, &got); err != nil || got.Status != ErrServerFault || got.Lock != nil {
		t.Fatal(err, got.Status)
	}
}

// The encoding is a contract between programs of different builds: it changes
// only with CodecVersion.
func TestGolden(t *testing.T) {
	h := func(op Op) Header {
		return Header{
			XID: 0x0102030405060708, Op: op, Flags: FlagReplay | FlagWaitCommit, Client: ClientID{0xc1, 15: 0xc2}, ClientGen: 3,
			Transno: 4, LastCommitted: 5, VIP: 6, VIPEpoch: 7, PreVersions: [4]uint64{8, 9, 10, 11}, Credits: 12,
		}
	}
	attr := Attr{
		FID: FID{2, 3, 0}, Type: TypeReg, Mode: 0o644, Nlink: 1, UID: 1000, GID: 100, Size: 4096, Used: 8192, Atime: 1, Mtime: 2, Ctime: 3,
		Generation: 4, Version: 5, Layout: Layout{StripeSize: 1 << 20, Count: 2, OST: [MaxStripes]uint16{0, 1}}, EpochOpen: true,
	}
	cred := Cred{UID: 1000, GID: 100, NGIDs: 1, GIDs: [16]uint32{10}}
	key := ReplyKey{Addr: MakeReplyAddr(netip.MustParseAddr("192.0.2.1")), Port: 700, XID: 0xabc, Proc: 100003<<8 | 8, Sum: 0x55}
	var out strings.Builder
	dump := func(what string, b []byte) { out.WriteString(what + "\n" + hex.Dump(b)) }
	dump("ping", AppendRequest(nil, &Request{Header: h(OpPing)}))
	dump("create", AppendRequest(nil, &Request{
		Header: h(OpCreate), Key: key, FID: RootFID, Name: []byte("file"), Cred: cred, How: Exclusive, Verf: [8]byte{1, 2, 3, 4, 5, 6, 7, 8},
		SetAttr: SetAttr{Mask: SetMode, Mode: 0o600},
	}))
	dump("write", AppendRequest(nil, &Request{Header: h(OpWrite), FID: FID{2, 3, 0}, Stripe: 1, Offset: 1 << 20, Stable: FileSync, Time: 99, Bulk: make([]byte, 4096)}))
	dump("lock", AppendRequest(nil, &Request{Header: h(OpLock), FID: FID{2, 3, 0}, Lock: &LockArgs{
		Owner: LockOwner{LockHost: LockHost{Addr: netip.MustParseAddr("192.0.2.1"), Name: "client"}, Svid: 77, OH: "oh"},
		Range: LockRange{0, MaxLockOffset}, Exclusive: true, Block: true, Note: []byte("note"),
	}}))
	dump("connect reply", AppendReply(nil, OpConnect, &Reply{XID: 1, Transno: 2, LastCommitted: 3, Instance: 4, Recovering: true, Known: true}))
	dump("lookup reply", AppendReply(nil, OpLookup, &Reply{XID: 1, LastCommitted: 3, Attr: attr, HasAttr: true}))
	dump("read reply", AppendReply(nil, OpRead, &Reply{XID: 1, LastCommitted: 3, Count: 4096, Obj: ObjAttr{true, 4096, 4096, 1, 2, 3}}))
	dump("readdir reply", AppendReply(nil, OpReaddir, &Reply{XID: 1, EOF: true, Entries: []Dirent{{Cookie: 3, FID: FID{2, 3, 0}, Type: TypeReg, Name: []byte("file")}}}))
	path := filepath.Join("testdata", "golden.txt")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), out.String()); d != "" {
		t.Fatalf("the encoding has changed (-was +is):\n%s", d)
	}
}

func (g gen) ostInfo() *OSTInfo {
	o := &OSTInfo{Next: g.bytes(MaxNameLen)}
	id := func() (c ClientID) { copy(c[:], g.bytes(16)); return c }
	for range g.IntN(4) {
		o.VIPs = append(o.VIPs, VIPEpoch{g.Uint32(), g.Uint64()})
		o.Clients = append(o.Clients, ClientInfo{id(), g.Uint64(), g.Uint64()})
		o.Fences = append(o.Fences, Fence{id(), g.Uint64()})
		o.Epochs = append(o.Epochs, EpochInfo{g.fid(), id()})
		o.Unlinked = append(o.Unlinked, g.fid())
		o.Truncates = append(o.Truncates, ObjTruncate{g.fid(), uint8(g.Uint32()), g.Uint64(), g.Uint64(), g.i64(), id()})
	}
	return o
}

func TestOSTInfo(t *testing.T) {
	g := gen{rand.New(rand.NewPCG(1, 2))}
	for range 100 {
		want, got := g.ostInfo(), OSTInfo{}
		b := AppendOSTInfo(nil, want)
		if n := want.Size() + len(want.Next); n != len(b) {
			t.Fatalf("%d bytes, Size says %d", len(b), n)
		}
		if err := DecodeOSTInfo(b, &got); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, &got, equal); d != "" {
			t.Fatal(d)
		}
		for i := range b {
			if err := DecodeOSTInfo(b[:i], &OSTInfo{}); !errors.Is(err, ErrCodec) {
				t.Fatalf("%d of %d bytes: %v", i, len(b), err)
			}
		}
	}
}

func FuzzDecodeOSTInfo(f *testing.F) {
	g := gen{rand.New(rand.NewPCG(1, 1))}
	for range 8 {
		f.Add(AppendOSTInfo(nil, g.ostInfo()))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var o OSTInfo
		if err := DecodeOSTInfo(b, &o); err != nil {
			if !errors.Is(err, ErrCodec) {
				t.Fatal(err)
			}
			return
		}
		if string(AppendOSTInfo(nil, &o)) != string(b) {
			t.Fatal("encodes to something else")
		}
	})
}

func FuzzDecodeRequest(f *testing.F) {
	g := gen{rand.New(rand.NewPCG(1, 1))}
	for _, op := range allOps() {
		f.Add(AppendRequest(nil, g.request(op)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r, again Request
		if err := DecodeRequest(b, &r); err != nil {
			if !errors.Is(err, ErrCodec) {
				t.Fatal(err)
			}
			return
		}
		r.Bulk = make([]byte, RequestBulk(b))
		if st := CheckRequest(&r); st != OK {
			t.Fatal("decoded what cannot be sent:", st)
		}
		if err := DecodeRequest(AppendRequest(nil, &r), &again); err != nil {
			t.Fatal(err)
		}
		again.Bulk = r.Bulk
		if d := cmp.Diff(&r, &again, equal); d != "" {
			t.Fatal(d)
		}
	})
}

func FuzzDecodeReply(f *testing.F) {
	g := gen{rand.New(rand.NewPCG(1, 1))}
	for _, op := range allOps() {
		f.Add(uint16(op), AppendReply(nil, op, g.reply(op)))
	}
	f.Fuzz(func(t *testing.T, o uint16, b []byte) {
		op := Op(o)
		var r, again Reply
		n, err := DecodeReply(b, op, &r)
		if err != nil {
			if !errors.Is(err, ErrCodec) {
				t.Fatal(err)
			}
			return
		}
		m, err := DecodeReply(AppendReply(nil, op, &r), op, &again)
		if err != nil || n != m {
			t.Fatal(n, m, err)
		}
		if d := cmp.Diff(&r, &again, equal); d != "" {
			t.Fatal(d)
		}
	})
}

func BenchmarkCodec(b *testing.B) {
	req := &Request{Header: Header{Op: OpCreate}, Name: []byte("file.name"), Cred: Cred{NGIDs: 3}, Key: ReplyKey{Proc: 1}}
	rep := &Reply{HasAttr: true, HasDir: true, DirPre: PreAttr{Valid: true}}
	var buf []byte
	var gotReq Request
	var gotRep Reply
	b.ReportAllocs()
	for b.Loop() {
		buf = AppendRequest(buf[:0], req)
		if err := DecodeRequest(buf, &gotReq); err != nil {
			b.Fatal(err)
		}
		buf = AppendReply(buf[:0], OpCreate, rep)
		if _, err := DecodeReply(buf, OpCreate, &gotRep); err != nil {
			b.Fatal(err)
		}
	}
}
