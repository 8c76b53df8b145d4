package nfsload

import (
	"encoding/binary"
	"fmt"
)

// Procedures of NFS 3 that the benchmarks use, and MNT of MOUNT 3.
const (
	ProcNull        = 0
	ProcGetattr     = 1
	ProcLookup      = 3
	ProcAccess      = 4
	ProcRead        = 6
	ProcWrite       = 7
	ProcCreate      = 8
	ProcMkdir       = 9
	ProcRemove      = 12
	ProcRmdir       = 13
	ProcRename      = 14
	ProcReaddirplus = 17
	ProcCommit      = 21
	MountMnt        = 1
)

// Stability of WRITE.
const (
	Unstable = 0
	FileSync = 2
)

const attrSize = 84

// Decoder reads results; after the first error everything is zero.
type Decoder struct {
	B   []byte
	Err error
}

func (d *Decoder) take(n int) []byte {
	if d.Err != nil || n < 0 || len(d.B) < n {
		if d.Err == nil {
			d.Err = ErrProtocol
		}
		return nil
	}
	b := d.B[:n]
	d.B = d.B[n:]
	return b
}

// U32 reads a number.
func (d *Decoder) U32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// U64 reads a 64-bit number.
func (d *Decoder) U64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// Opaque reads a counted byte string, which aliases the input.
func (d *Decoder) Opaque() []byte {
	n := int(d.U32())
	b := d.take(n + -n&3)
	if b == nil {
		return nil
	}
	return b[:n]
}

// PostAttr skips optional attributes.
func (d *Decoder) PostAttr() {
	if d.U32() != 0 {
		d.take(attrSize)
	}
}

// Wcc skips attributes from before and after an operation.
func (d *Decoder) Wcc() {
	if d.U32() != 0 {
		d.take(24)
	}
	d.PostAttr()
}

// Status reads a status and turns anything but 0 into a *StatusError.
func (d *Decoder) Status(proc uint32) error {
	s := d.U32()
	if d.Err != nil {
		return d.Err
	}
	if s != 0 {
		return &StatusError{proc, s}
	}
	return nil
}

// Sattr appends an sattr3 with a mode and server times.
func (c *Conn) Sattr(mode uint32) {
	c.U32(1)
	c.U32(mode)
	c.out = appendU32(c.out, 0, 0, 0, 0, 0)
}

// Dirop appends directory and name.
func (c *Conn) Dirop(dir []byte, name []byte) {
	c.Opaque(dir)
	c.Opaque(name)
}

// Mount returns the file handle of an export; c speaks ProgMount.
func (c *Conn) Mount(path string) ([]byte, error) {
	b, err := c.Call(MountMnt, func(c *Conn) { c.Opaque([]byte(path)) })
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", path, err)
	}
	d := Decoder{B: b}
	if err := d.Status(MountMnt); err != nil {
		return nil, fmt.Errorf("mount %s: %w", path, err)
	}
	fh := d.Opaque()
	return fh, d.Err
}

// newObject reads the handle from the result of CREATE or MKDIR.
func newObject(proc uint32, b []byte) ([]byte, error) {
	d := Decoder{B: b}
	if err := d.Status(proc); err != nil {
		return nil, err
	}
	if d.U32() == 0 {
		return nil, fmt.Errorf("procedure %d returned no handle", proc)
	}
	fh := d.Opaque()
	return fh, d.Err
}

// Mkdir makes a directory and returns its handle.
func (c *Conn) Mkdir(dir []byte, name string) ([]byte, error) {
	b, err := c.Call(ProcMkdir, func(c *Conn) {
		c.Dirop(dir, []byte(name))
		c.Sattr(0o755)
	})
	if err != nil {
		return nil, err
	}
	return newObject(ProcMkdir, b)
}

// Create makes a file (UNCHECKED) and returns its handle.
func (c *Conn) Create(dir []byte, name string) ([]byte, error) {
	b, err := c.Call(ProcCreate, func(c *Conn) {
		c.Dirop(dir, []byte(name))
		c.U32(0)
		c.Sattr(0o644)
	})
	if err != nil {
		return nil, err
	}
	return newObject(ProcCreate, b)
}

// Commit makes a whole file durable.
func (c *Conn) Commit(fh []byte) error {
	b, err := c.Call(ProcCommit, func(c *Conn) {
		c.Opaque(fh)
		c.U64(0)
		c.U32(0)
	})
	if err != nil {
		return err
	}
	d := Decoder{B: b}
	return d.Status(ProcCommit)
}

// Unlink removes a file or (rmdir) a directory.
func (c *Conn) Unlink(dir []byte, name string, rmdir bool) error {
	proc := uint32(ProcRemove)
	if rmdir {
		proc = ProcRmdir
	}
	b, err := c.Call(proc, func(c *Conn) { c.Dirop(dir, []byte(name)) })
	if err != nil {
		return err
	}
	d := Decoder{B: b}
	return d.Status(proc)
}

// Entry is one entry of a directory.
type Entry struct {
	Name   string
	Handle []byte
}

// ReadPage parses one READDIRPLUS result: it calls each for every entry with
// a handle and name that alias b, and returns where to go on.
//
// An entry without attributes or handle is an error: leaving them out would be
// allowed, and cheaper, but is not what is measured.
func ReadPage(b []byte, each func(name, fh []byte)) (cookie uint64, verf uint64, entries int, eof bool, err error) {
	d := Decoder{B: b}
	if err := d.Status(ProcReaddirplus); err != nil {
		return 0, 0, 0, false, err
	}
	d.PostAttr()
	verf = d.U64()
	for d.U32() != 0 {
		d.U64()
		name := d.Opaque()
		cookie = d.U64()
		attr := d.U32()
		if attr != 0 {
			d.take(attrSize)
		}
		var fh []byte
		if d.U32() != 0 {
			fh = d.Opaque()
		}
		if d.Err != nil {
			return 0, 0, 0, false, d.Err
		}
		if s := string(name); (attr == 0 || len(fh) == 0) && s != "." && s != ".." {
			return 0, 0, 0, false, fmt.Errorf("entry %q without attributes or handle: %w", name, ErrProtocol)
		}
		entries++
		if each != nil {
			each(name, fh)
		}
	}
	eof = d.U32() != 0
	return cookie, verf, entries, eof, d.Err
}

// ReaddirplusArgs appends the arguments of READDIRPLUS for pages of 64 KiB.
func (c *Conn) ReaddirplusArgs(dir []byte, cookie, verf uint64) {
	c.Opaque(dir)
	c.U64(cookie)
	c.U64(verf)
	c.U32(8 << 10)
	c.U32(64 << 10)
}

// ReadDir returns all entries of a directory except "." and "..".
func (c *Conn) ReadDir(dir []byte) ([]Entry, error) {
	var out []Entry
	var cookie, verf uint64
	for {
		b, err := c.Call(ProcReaddirplus, func(c *Conn) { c.ReaddirplusArgs(dir, cookie, verf) })
		if err != nil {
			return nil, err
		}
		var n int
		var eof bool
		cookie, verf, n, eof, err = ReadPage(b, func(name, fh []byte) {
			if s := string(name); s != "." && s != ".." {
				out = append(out, Entry{s, append([]byte(nil), fh...)})
			}
		})
		if err != nil {
			return nil, err
		}
		if eof {
			return out, nil
		}
		if n == 0 {
			return nil, fmt.Errorf("READDIRPLUS returned an empty page: %w", ErrProtocol)
		}
	}
}

// CheckObject is a ReplyFunc for GETATTR, LOOKUP and ACCESS that insists on what
// a client asked for: attributes, a handle, access bits.
func CheckObject(proc uint32) func(int, []byte) (int, error) {
	return func(_ int, b []byte) (int, error) {
		d := Decoder{B: b}
		if err := d.Status(proc); err != nil {
			return 0, err
		}
		switch proc {
		case ProcGetattr:
			d.take(attrSize)
		case ProcLookup:
			if fh := d.Opaque(); len(fh) == 0 {
				return 0, fmt.Errorf("LOOKUP without a handle: %w", ErrProtocol)
			}
			d.PostAttr()
			d.PostAttr()
		case ProcAccess:
			d.PostAttr()
			if d.U32() == 0 {
				return 0, fmt.Errorf("ACCESS grants root nothing: %w", ErrProtocol)
			}
		}
		if d.Err == nil && len(d.B) != 0 {
			return 0, fmt.Errorf("procedure %d: %d bytes too many: %w", proc, len(d.B), ErrProtocol)
		}
		return 1, d.Err
	}
}
