package nfs3

import (
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// PutSattr encodes s as sattr3. A time that has both its "now" bit and its value
// set is encoded as "now".
func PutSattr(w *xdr.Writer, s *wire.SetAttr) {
	opt := func(m wire.SetMask, v uint32) {
		w.Bool(s.Mask&m != 0)
		if s.Mask&m != 0 {
			w.Uint32(v)
		}
	}
	opt(wire.SetMode, s.Mode)
	opt(wire.SetUID, s.UID)
	opt(wire.SetGID, s.GID)
	w.Bool(s.Mask&wire.SetSize != 0)
	if s.Mask&wire.SetSize != 0 {
		w.Uint64(s.Size)
	}
	when := func(now, set wire.SetMask, t int64) {
		switch {
		case s.Mask&now != 0:
			w.Uint32(setToServerTime)
		case s.Mask&set != 0:
			w.Uint32(setToClientTime)
			PutTime(w, t)
		default:
			w.Uint32(dontChange)
		}
	}
	when(wire.SetAtimeNow, wire.SetAtime, s.Atime)
	when(wire.SetMtimeNow, wire.SetMtime, s.Mtime)
}

// Encode appends the argument as a client sends it.
func (a *FHArgs) Encode(w *xdr.Writer) { w.Opaque(a.FH) }

// Encode appends the argument as a client sends it.
func (a *DirOpArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Opaque(a.Name)
}

// Encode appends the argument as a client sends it.
func (a *SetattrArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	PutSattr(w, &a.Attr)
	w.Bool(a.Guard)
	if a.Guard {
		PutTime(w, a.GuardCtime)
	}
}

// Encode appends the argument as a client sends it.
func (a *AccessArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Uint32(a.Access)
}

// Encode appends the argument as a client sends it.
func (a *ReadArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Uint64(a.Offset)
	w.Uint32(a.Count)
}

// Encode appends the argument as a client sends it.
func (a *WriteArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Uint64(a.Offset)
	w.Uint32(a.Count)
	w.Uint32(uint32(a.Stable))
	w.Opaque(a.Data)
}

// Encode appends the argument as a client sends it.
func (a *CreateArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Opaque(a.Name)
	w.Uint32(uint32(a.How))
	if a.How == wire.Exclusive {
		w.FixedOpaque(a.Verf[:])
	} else {
		PutSattr(w, &a.Attr)
	}
}

// Encode appends the argument as a client sends it.
func (a *MkdirArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Opaque(a.Name)
	PutSattr(w, &a.Attr)
}

// Encode appends the argument as a client sends it.
func (a *SymlinkArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Opaque(a.Name)
	PutSattr(w, &a.Attr)
	w.Opaque(a.Target)
}

// Encode appends the argument as a client sends it.
func (a *MknodArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Opaque(a.Name)
	w.Uint32(uint32(a.Type))
	switch a.Type {
	case wire.TypeChr, wire.TypeBlk:
		PutSattr(w, &a.Attr)
		w.Uint32(a.RdevMajor)
		w.Uint32(a.RdevMinor)
	case wire.TypeSock, wire.TypeFifo:
		PutSattr(w, &a.Attr)
	}
}

// Encode appends the argument as a client sends it.
func (a *RenameArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FromFH)
	w.Opaque(a.FromName)
	w.Opaque(a.ToFH)
	w.Opaque(a.ToName)
}

// Encode appends the argument as a client sends it.
func (a *LinkArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Opaque(a.DirFH)
	w.Opaque(a.Name)
}

// Encode appends the argument as a client sends it.
func (a *ReaddirArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Uint64(a.Cookie)
	w.FixedOpaque(a.CookieVerf[:])
	w.Uint32(a.Count)
}

// Encode appends the argument as a client sends it.
func (a *ReaddirplusArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Uint64(a.Cookie)
	w.FixedOpaque(a.CookieVerf[:])
	w.Uint32(a.DirCount)
	w.Uint32(a.MaxCount)
}

// Encode appends the argument as a client sends it.
func (a *CommitArgs) Encode(w *xdr.Writer) {
	w.Opaque(a.FH)
	w.Uint64(a.Offset)
	w.Uint32(a.Count)
}
