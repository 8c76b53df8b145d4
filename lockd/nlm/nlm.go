// Package nlm encodes and decodes the Network Lock Manager protocol, RPC program
// 100021, versions 1, 3 and 4, in both directions (XNFS chapters 10 and 14).
//
// Version 1 and 3 have the same encoding, with 32-bit offsets and lengths;
// version 3 adds procedures 20 to 23. Version 4 has 64-bit ones and more
// statuses. One set of types serves all: offsets and lengths are 64 bits wide
// here, and every codec takes the version.
//
// Decoded byte slices alias the input.
package nlm

import (
	"errors"
	"fmt"

	"github.com/baton-nfs/baton/internal/xdr"
)

// Program is NLM's RPC program number.
const Program = 100021

// Versions of the protocol. Version 2 was never used.
const (
	Version1 = 1
	Version3 = 3
	Version4 = 4
)

// Limits in bytes: MAXNETOBJ_SZ, LM_MAXSTRLEN, and NFSv3's handle size, which
// bounds the handle of every version here: the server's handles are NFSv3's.
const (
	MaxNetobj = 1024
	MaxName   = 1024
	MaxHandle = 64
	// MaxArgs is the longest encoded argument of any procedure: cookie, name,
	// handle and oh with their length words, and fixed fields.
	MaxArgs = 4 + MaxNetobj + 4 + MaxName + 4 + MaxHandle + 4 + MaxNetobj + 64
)

// Proc is a procedure number.
type Proc uint32

// Procedures. GRANTED, GRANTED_MSG and the _RES forms of what a client asks are
// called by servers at clients; GRANTED_RES answers GRANTED_MSG.
const (
	ProcNull       Proc = 0
	ProcTest       Proc = 1
	ProcLock       Proc = 2
	ProcCancel     Proc = 3
	ProcUnlock     Proc = 4
	ProcGranted    Proc = 5
	ProcTestMsg    Proc = 6
	ProcLockMsg    Proc = 7
	ProcCancelMsg  Proc = 8
	ProcUnlockMsg  Proc = 9
	ProcGrantedMsg Proc = 10
	ProcTestRes    Proc = 11
	ProcLockRes    Proc = 12
	ProcCancelRes  Proc = 13
	ProcUnlockRes  Proc = 14
	ProcGrantedRes Proc = 15
	ProcShare      Proc = 20
	ProcUnshare    Proc = 21
	ProcNMLock     Proc = 22
	ProcFreeAll    Proc = 23
)

var procNames = map[Proc]string{
	ProcNull: "NULL", ProcTest: "TEST", ProcLock: "LOCK", ProcCancel: "CANCEL", ProcUnlock: "UNLOCK",
	ProcGranted: "GRANTED", ProcTestMsg: "TEST_MSG", ProcLockMsg: "LOCK_MSG", ProcCancelMsg: "CANCEL_MSG",
	ProcUnlockMsg: "UNLOCK_MSG", ProcGrantedMsg: "GRANTED_MSG", ProcTestRes: "TEST_RES", ProcLockRes: "LOCK_RES",
	ProcCancelRes: "CANCEL_RES", ProcUnlockRes: "UNLOCK_RES", ProcGrantedRes: "GRANTED_RES",
	ProcShare: "SHARE", ProcUnshare: "UNSHARE", ProcNMLock: "NM_LOCK", ProcFreeAll: "FREE_ALL",
}

// String gives the procedure's name without its prefix.
func (p Proc) String() string {
	if n, ok := procNames[p]; ok {
		return n
	}
	return fmt.Sprintf("PROC_%d", uint32(p))
}

// NumProcs is one more than the highest procedure of a version; 16 to 19 do not
// exist in any.
func NumProcs(vers uint32) uint32 {
	if vers < Version3 {
		return uint32(ProcGrantedRes) + 1
	}
	return uint32(ProcFreeAll) + 1
}

// Served tells whether a version has the procedure.
func Served(vers uint32, p Proc) bool {
	return uint32(p) < NumProcs(vers) && (p <= ProcGrantedRes || p >= ProcShare)
}

// Async tells whether p is the message form of a request, whose result goes to
// the caller in a call of its own, and gives the synchronous form and the
// procedure that carries the result.
func Async(p Proc) (request, result Proc, ok bool) {
	if p < ProcTestMsg || p > ProcGrantedMsg {
		return p, 0, false
	}
	return p - ProcTestMsg + ProcTest, p - ProcTestMsg + ProcTestRes, true
}

// ErrEnum means that a field has a value outside its enumeration.
var ErrEnum = errors.New("nlm: value outside its enumeration")

// Modes and accesses of share reservations (fsh_mode and fsh_access).
const (
	ShareNone  = 0
	ShareRead  = 1
	ShareWrite = 2
	ShareBoth  = 3
)

// Lock is nlm_lock: a range of a file and who is meant. Svid is the process at
// the client (uppid in versions 1 and 3).
type Lock struct {
	CallerName []byte
	FH         []byte
	OH         []byte
	Svid       uint32
	Offset     uint64
	Len        uint64 // 0: to the end of the file
}

func wide(vers uint32) bool { return vers >= Version4 }

// Decode reads the lock as version vers has it.
func (l *Lock) Decode(r *xdr.Reader, vers uint32) error {
	l.CallerName = r.String(MaxName)
	l.FH = r.Opaque(MaxHandle)
	l.OH = r.Opaque(MaxNetobj)
	l.Svid = r.Uint32()
	l.Offset, l.Len = getRange(r, vers)
	return r.Err()
}

// Encode appends the lock. In versions 1 and 3 an offset or length beyond 32
// bits becomes what Clip makes of it.
func (l *Lock) Encode(w *xdr.Writer, vers uint32) {
	w.Opaque(l.CallerName)
	w.Opaque(l.FH)
	w.Opaque(l.OH)
	w.Uint32(l.Svid)
	putRange(w, vers, l.Offset, l.Len)
}

func getRange(r *xdr.Reader, vers uint32) (off, n uint64) {
	if wide(vers) {
		return r.Uint64(), r.Uint64()
	}
	return uint64(r.Uint32()), uint64(r.Uint32())
}

func putRange(w *xdr.Writer, vers uint32, off, n uint64) {
	if wide(vers) {
		w.Uint64(off)
		w.Uint64(n)
		return
	}
	off, n = Clip(off, n)
	w.Uint32(uint32(off))
	w.Uint32(uint32(n))
}

// TestArgs is nlm_testargs, the argument of TEST and GRANTED.
type TestArgs struct {
	Cookie    []byte
	Exclusive bool
	Lock      Lock
}

// Decode reads the arguments as version vers has them.
func (a *TestArgs) Decode(r *xdr.Reader, vers uint32) error {
	a.Cookie = r.Opaque(MaxNetobj)
	a.Exclusive = r.Bool()
	return a.Lock.Decode(r, vers)
}

// Encode appends the arguments.
func (a *TestArgs) Encode(w *xdr.Writer, vers uint32) {
	w.Opaque(a.Cookie)
	w.Bool(a.Exclusive)
	a.Lock.Encode(w, vers)
}

// LockArgs is nlm_lockargs, the argument of LOCK and NM_LOCK. State is the
// client's NSM state.
type LockArgs struct {
	Cookie    []byte
	Block     bool
	Exclusive bool
	Lock      Lock
	Reclaim   bool
	State     uint32
}

// Decode reads the arguments as version vers has them.
func (a *LockArgs) Decode(r *xdr.Reader, vers uint32) error {
	a.Cookie = r.Opaque(MaxNetobj)
	a.Block = r.Bool()
	a.Exclusive = r.Bool()
	if err := a.Lock.Decode(r, vers); err != nil {
		return err
	}
	a.Reclaim = r.Bool()
	a.State = r.Uint32()
	return r.Err()
}

// Encode appends the arguments.
func (a *LockArgs) Encode(w *xdr.Writer, vers uint32) {
	w.Opaque(a.Cookie)
	w.Bool(a.Block)
	w.Bool(a.Exclusive)
	a.Lock.Encode(w, vers)
	w.Bool(a.Reclaim)
	w.Uint32(a.State)
}

// CancelArgs is nlm_cancargs, the argument of CANCEL.
type CancelArgs struct {
	Cookie    []byte
	Block     bool
	Exclusive bool
	Lock      Lock
}

// Decode reads the arguments as version vers has them.
func (a *CancelArgs) Decode(r *xdr.Reader, vers uint32) error {
	a.Cookie = r.Opaque(MaxNetobj)
	a.Block = r.Bool()
	a.Exclusive = r.Bool()
	return a.Lock.Decode(r, vers)
}

// Encode appends the arguments.
func (a *CancelArgs) Encode(w *xdr.Writer, vers uint32) {
	w.Opaque(a.Cookie)
	w.Bool(a.Block)
	w.Bool(a.Exclusive)
	a.Lock.Encode(w, vers)
}

// UnlockArgs is nlm_unlockargs, the argument of UNLOCK.
type UnlockArgs struct {
	Cookie []byte
	Lock   Lock
}

// Decode reads the arguments as version vers has them.
func (a *UnlockArgs) Decode(r *xdr.Reader, vers uint32) error {
	a.Cookie = r.Opaque(MaxNetobj)
	return a.Lock.Decode(r, vers)
}

// Encode appends the arguments.
func (a *UnlockArgs) Encode(w *xdr.Writer, vers uint32) {
	w.Opaque(a.Cookie)
	a.Lock.Encode(w, vers)
}

// ShareArgs is nlm_shareargs, the argument of SHARE and UNSHARE, which is the
// same in versions 3 and 4.
type ShareArgs struct {
	Cookie       []byte
	CallerName   []byte
	FH           []byte
	OH           []byte
	Mode, Access uint32 // what others may not do, what the caller does
	Reclaim      bool
}

// Decode reads the arguments; ErrEnum for a mode or access above ShareBoth.
func (a *ShareArgs) Decode(r *xdr.Reader, _ uint32) error {
	a.Cookie = r.Opaque(MaxNetobj)
	a.CallerName = r.String(MaxName)
	a.FH = r.Opaque(MaxHandle)
	a.OH = r.Opaque(MaxNetobj)
	a.Mode, a.Access = r.Uint32(), r.Uint32()
	if a.Mode > ShareBoth || a.Access > ShareBoth {
		r.SetErr(ErrEnum)
	}
	a.Reclaim = r.Bool()
	return r.Err()
}

// Encode appends the arguments.
func (a *ShareArgs) Encode(w *xdr.Writer, _ uint32) {
	w.Opaque(a.Cookie)
	w.Opaque(a.CallerName)
	w.Opaque(a.FH)
	w.Opaque(a.OH)
	w.Uint32(a.Mode)
	w.Uint32(a.Access)
	w.Bool(a.Reclaim)
}

// Notify is nlm_notify, the argument of FREE_ALL: the client name has restarted
// and has NSM state State now.
type Notify struct {
	Name  []byte
	State uint32
}

// Decode reads the arguments.
func (a *Notify) Decode(r *xdr.Reader, _ uint32) error {
	a.Name = r.String(MaxName)
	a.State = r.Uint32()
	return r.Err()
}

// Encode appends the arguments.
func (a *Notify) Encode(w *xdr.Writer, _ uint32) {
	w.Opaque(a.Name)
	w.Uint32(a.State)
}

// Res is nlm_res, the result of everything but TEST, SHARE and UNSHARE, and the
// argument of the corresponding _RES procedures.
type Res struct {
	Cookie []byte
	Stat   Stat
}

// Decode reads the result. Statuses that the version does not have are accepted:
// what to make of them is the caller's decision.
func (x *Res) Decode(r *xdr.Reader, _ uint32) error {
	x.Cookie = r.Opaque(MaxNetobj)
	x.Stat = Stat(r.Uint32())
	return r.Err()
}

// Encode appends the result; Stat should be one of the version (StatFor).
func (x *Res) Encode(w *xdr.Writer, _ uint32) { PutRes(w, x.Cookie, x.Stat) }

// PutRes appends an nlm_res.
func PutRes(w *xdr.Writer, cookie []byte, st Stat) {
	w.Opaque(cookie)
	w.Uint32(uint32(st))
}

// Holder is nlm_holder: the lock that is in the way of a TEST.
type Holder struct {
	Exclusive bool
	Svid      uint32
	OH        []byte
	Offset    uint64
	Len       uint64 // 0: to the end of the file
}

// TestRes is nlm_testres; Holder is set with Denied only.
type TestRes struct {
	Cookie []byte
	Stat   Stat
	Holder Holder
}

// Decode reads the result as version vers has it.
func (x *TestRes) Decode(r *xdr.Reader, vers uint32) error {
	*x = TestRes{Cookie: r.Opaque(MaxNetobj), Stat: Stat(r.Uint32())}
	if r.Err() != nil || x.Stat != Denied {
		return r.Err()
	}
	h := &x.Holder
	h.Exclusive = r.Bool()
	h.Svid = r.Uint32()
	h.OH = r.Opaque(MaxNetobj)
	h.Offset, h.Len = getRange(r, vers)
	return r.Err()
}

// Encode appends the result. In versions 1 and 3 the holder's range is clipped.
func (x *TestRes) Encode(w *xdr.Writer, vers uint32) {
	PutRes(w, x.Cookie, x.Stat)
	if x.Stat != Denied {
		return
	}
	h := &x.Holder
	w.Bool(h.Exclusive)
	w.Uint32(h.Svid)
	w.Opaque(h.OH)
	putRange(w, vers, h.Offset, h.Len)
}

// ShareRes is nlm_shareres. Sequence has no meaning any more and is 0.
type ShareRes struct {
	Cookie   []byte
	Stat     Stat
	Sequence uint32
}

// Decode reads the result.
func (x *ShareRes) Decode(r *xdr.Reader, _ uint32) error {
	x.Cookie = r.Opaque(MaxNetobj)
	x.Stat = Stat(r.Uint32())
	x.Sequence = r.Uint32()
	return r.Err()
}

// Encode appends the result.
func (x *ShareRes) Encode(w *xdr.Writer, _ uint32) {
	PutRes(w, x.Cookie, x.Stat)
	w.Uint32(x.Sequence)
}
