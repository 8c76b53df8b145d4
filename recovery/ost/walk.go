package ost

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// ObjectInfo describes an object for a consistency check.
type ObjectInfo struct {
	FID          wire.FID
	Stripe       uint8
	Size, Used   uint64 // bytes
	Mtime, Ctime int64
	Version      uint64
	LogID        uint64
	Segments     int
	// Unfinished: power was lost between the creation and the first flush of
	// the object (or in its destruction, for segments without an object); it
	// reads as missing, and OpDestroy removes what is there.
	Unfinished bool
	// Name is the file's name when it is not the first segment of an object;
	// FID is zero when it names none.
	Name string
	// Err says what is wrong with the object; nil: nothing.
	Err error
}

// WalkObjects calls f for every object and for every file that should not be
// there. Objects that change meanwhile are seen before or after the change. It
// stops with an error only when a directory cannot be read.
func (t *Target) WalkObjects(f func(ObjectInfo)) error {
	for d := range fanOut {
		dir := dirName(uint8(d))
		names, err := t.fs.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("walk objects: %w", err)
		}
		first := make(map[string]bool, len(names))
		for _, n := range names {
			first[n] = true
		}
		for _, n := range names {
			base, isSeg := strings.CutSuffix(n, ".s")
			k, ok := parseName(base)
			switch {
			case !ok || k.dir() != uint8(d):
				f(ObjectInfo{Name: dir + "/" + n, Err: errors.New("not an object's name")})
			case isSeg && !first[base]:
				f(ObjectInfo{Name: dir + "/" + n, FID: k.fid, Stripe: k.stripe, Unfinished: true, Err: errors.New("segments without an object")})
			case !isSeg:
				if i, ok := t.inspect(k); ok {
					f(i)
				}
			}
		}
	}
	return nil
}

// inspect reads one object from its files; false: it is gone.
func (t *Target) inspect(k objKey) (ObjectInfo, bool) {
	i := ObjectInfo{FID: k.fid, Stripe: k.stripe}
	fd, err := t.fs.Open(k.path(), objfs.ReadOnly)
	if err == unix.ENOENT {
		return i, false
	}
	if err != nil {
		i.Err = err
		return i, true
	}
	defer t.fs.Close(fd)
	h, st, err := t.readHeader(fd, k, 0)
	if errors.Is(err, errUnfinished) {
		i.Unfinished = true
		return i, true
	}
	if err != nil {
		i.Err = err
		return i, true
	}
	i.Version, i.LogID, i.Mtime, i.Ctime = h.Version, h.LogID, h.Mtime, h.Ctime
	i.Segments = 1
	i.Used = uint64(max(0, st.Used-headerSize))
	i.Size = uint64(max(0, st.Size-headerSize))
	if h.Multi {
		i.Err = t.inspectSegs(k, &h, &i)
	}
	if o := t.table.peek(k); o != nil {
		if o.loaded.Load() {
			o.mu.Lock()
			if o.exists {
				i.Size, i.Mtime, i.Ctime, i.Version, i.LogID = o.size, o.mtime, o.ctime, o.version, o.logID
			}
			o.mu.Unlock()
		}
		t.release(o)
	}
	return i, true
}

func (t *Target) inspectSegs(k objKey, h *header, i *ObjectInfo) error {
	names, err := t.fs.ReadDir(k.segDir())
	if err != nil && err != unix.ENOENT {
		return err
	}
	if h.LastSeg > 0 {
		i.Size = uint64(h.LastSeg) << t.segShift
	}
	var bad error
	for _, n := range names {
		idx, err := strconv.ParseUint(n, 16, 32)
		if err != nil {
			bad = fmt.Errorf("not a segment: %s", n)
			continue
		}
		fd, err := t.fs.Open(k.segDir()+"/"+n, objfs.ReadOnly)
		if err != nil {
			continue
		}
		_, st, err := t.readHeader(fd, k, uint32(idx))
		t.fs.Close(fd)
		if err != nil && !errors.Is(err, errUnfinished) {
			bad = err
		}
		i.Segments++
		i.Used += uint64(max(0, st.Used-headerSize))
		if uint32(idx) == h.LastSeg {
			i.Size += uint64(max(0, st.Size-headerSize))
		}
	}
	return bad
}
