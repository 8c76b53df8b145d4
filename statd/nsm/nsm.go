// Package nsm encodes and decodes the network status monitor protocol,
// version 1 (XNFS Version 3W, chapter 11), in both directions.
//
// Encoders append; their strings must not be longer than MaxStrLen. Decoded
// values own their memory. Integers that the specification declares
// as int (state numbers, program numbers) are kept unsigned.
package nsm

import "github.com/baton-nfs/baton/internal/xdr"

// RPC identity of the protocol.
const (
	Program  = 100024
	Version  = 1
	NumProcs = 7
)

// Procedures.
const (
	ProcNull      = 0
	ProcStat      = 1 // SMName -> SMStatRes
	ProcMon       = 2 // Mon -> SMStatRes
	ProcUnmon     = 3 // MonID -> SMStat
	ProcUnmonAll  = 4 // MyID -> SMStat
	ProcSimuCrash = 5 // void -> void
	ProcNotify    = 6 // StatChge -> void
)

// Sizes in bytes.
const (
	MaxStrLen = 1024 // SM_MAXSTRLEN
	PrivSize  = 16
	// MaxArgs is the longest argument of any procedure: that of SM_MON.
	MaxArgs = 2*(4+MaxStrLen) + 12 + PrivSize
)

// Res is the result of STAT and MON (XNFS: enum res).
type Res uint32

// Results.
const (
	StatSucc Res = 0
	StatFail Res = 1
)

// SMName is sm_name: the host that STAT asks about.
type SMName struct{ MonName string }

// MyID is my_id: the procedure that wants to know of a host's state changes.
// MyName is the host where it is.
type MyID struct {
	MyName                 string
	MyProg, MyVers, MyProc uint32
}

// MonID is mon_id: a host, and who monitors it.
type MonID struct {
	MonName string
	MyID    MyID
}

// Mon is mon, the argument of MON. Priv comes back in Status.
type Mon struct {
	MonID MonID
	Priv  [PrivSize]byte
}

// StatChge is stat_chge, the argument of NOTIFY: the host MonName has now the
// state number State.
type StatChge struct {
	MonName string
	State   uint32
}

// SMStat is sm_stat: the state number of the answering monitor.
type SMStat struct{ State uint32 }

// SMStatRes is sm_stat_res.
type SMStatRes struct {
	ResStat Res
	State   uint32
}

// Status is status, the argument of the procedure that a MyID names.
type Status struct {
	MonName string
	State   uint32
	Priv    [PrivSize]byte
}

// Encode appends x to w.
func (x *SMName) Encode(w *xdr.Writer) { w.String(x.MonName) }

// Decode reads x from r; the error is the Reader's.
func (x *SMName) Decode(r *xdr.Reader) error {
	x.MonName = str(r)
	return r.Err()
}

// Encode appends x to w.
func (x *MyID) Encode(w *xdr.Writer) {
	w.String(x.MyName)
	w.Uint32(x.MyProg)
	w.Uint32(x.MyVers)
	w.Uint32(x.MyProc)
}

// Decode reads x from r; the error is the Reader's.
func (x *MyID) Decode(r *xdr.Reader) error {
	x.MyName = str(r)
	x.MyProg, x.MyVers, x.MyProc = r.Uint32(), r.Uint32(), r.Uint32()
	return r.Err()
}

// Encode appends x to w.
func (x *MonID) Encode(w *xdr.Writer) {
	w.String(x.MonName)
	x.MyID.Encode(w)
}

// Decode reads x from r; the error is the Reader's.
func (x *MonID) Decode(r *xdr.Reader) error {
	x.MonName = str(r)
	return x.MyID.Decode(r)
}

// Encode appends x to w.
func (x *Mon) Encode(w *xdr.Writer) {
	x.MonID.Encode(w)
	w.FixedOpaque(x.Priv[:])
}

// Decode reads x from r; the error is the Reader's.
func (x *Mon) Decode(r *xdr.Reader) error {
	_ = x.MonID.Decode(r) // r keeps the error
	copy(x.Priv[:], r.FixedOpaque(PrivSize))
	return r.Err()
}

// Encode appends x to w.
func (x *StatChge) Encode(w *xdr.Writer) {
	w.String(x.MonName)
	w.Uint32(x.State)
}

// Decode reads x from r; the error is the Reader's.
func (x *StatChge) Decode(r *xdr.Reader) error {
	x.MonName, x.State = str(r), r.Uint32()
	return r.Err()
}

// Encode appends x to w.
func (x *SMStat) Encode(w *xdr.Writer) { w.Uint32(x.State) }

// Decode reads x from r; the error is the Reader's.
func (x *SMStat) Decode(r *xdr.Reader) error {
	x.State = r.Uint32()
	return r.Err()
}

// Encode appends x to w.
func (x *SMStatRes) Encode(w *xdr.Writer) {
	w.Uint32(uint32(x.ResStat))
	w.Uint32(x.State)
}

// Decode reads x from r; the error is the Reader's.
func (x *SMStatRes) Decode(r *xdr.Reader) error {
	x.ResStat, x.State = Res(r.Uint32()), r.Uint32()
	return r.Err()
}

// Encode appends x to w.
func (x *Status) Encode(w *xdr.Writer) {
	w.String(x.MonName)
	w.Uint32(x.State)
	w.FixedOpaque(x.Priv[:])
}

// Decode reads x from r; the error is the Reader's.
func (x *Status) Decode(r *xdr.Reader) error {
	x.MonName, x.State = str(r), r.Uint32()
	copy(x.Priv[:], r.FixedOpaque(PrivSize))
	return r.Err()
}

func str(r *xdr.Reader) string { return string(r.String(MaxStrLen)) }
