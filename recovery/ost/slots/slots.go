// Package slots keeps the newest result of every reply slot of an object
// target's clients in a file that is used as memory: it costs a write no system
// call, and survives the process, not a power failure. After a restart on the
// same kernel a resent request is answered from here instead of being executed
// over what others have written since.
package slots

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// PerClient is how many slots of a client are kept; higher ones are not.
const PerClient = 126

// The file is a sequence of areas of 4 KiB. The first describes the file, each
// other one belongs to a client: a head, then a record for each slot.
//
//	file head    magic 8, format 4, length of the boot id 4, instance 8, boot id, checksum 4
//	area head    magic 8, client 16, generation 8, checksum 4
//	record       XID 8, transno 8, status 4, count 4, slot 4, checksum 4
//
// Numbers are little-endian. A record's checksum also covers whose it is, so that
// what an area's former owner has left is no record.
const (
	areaSize = 4096
	headSize = 64
	recSize  = 32

	fileMagic = "BTNSLT\x00\x01"
	areaMagic = "BTNSLA\x00\x01"
	format    = 1
	maxBoot   = 128
)

var le = binary.LittleEndian
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Record is the result of the newest request in a slot.
type Record struct {
	XID     uint64
	Transno uint64
	Status  wire.Status
	Count   uint32
}

// Kept is a record that an earlier start has left.
type Kept struct {
	Client wire.ClientID
	Gen    uint64
	Slot   uint16
	Record
}

// Start identifies a start of the target.
type Start struct {
	Instance uint64
	Boot     string // the kernel, at most 128 bytes
}

// File is the slot file. Its methods are safe for concurrent use.
type File struct {
	fs   objfs.FS
	path string
	max  int // clients

	mu    sync.Mutex
	start Start
	mem   objfs.Memory // nil: there is no file yet
	areas map[wire.ClientID]*Area
	free  []int // areas without an owner
}

// Area holds the slots of one client's life.
type Area struct {
	f      *File
	client wire.ClientID
	gen    uint64
	n      int    // number of the area in the file, from 1
	seed   uint32 // checksum over client and generation

	mu   sync.Mutex
	gone bool
	buf  [recSize]byte
}

// Open opens the file in fs if it exists; it is made when a client needs it.
// maxClients bounds it.
func Open(fs objfs.FS, path string, maxClients int) (*File, error) {
	f := &File{fs: fs, path: path, max: maxClients, areas: map[wire.ClientID]*Area{}}
	fd, err := fs.Open(path, objfs.ReadOnly)
	if err == unix.ENOENT {
		return f, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open reply slots: %w", err)
	}
	fs.Close(fd)
	if f.mem, err = fs.OpenMemory(path); err != nil {
		return nil, fmt.Errorf("open reply slots: %w", err)
	}
	return f, nil
}

// Load begins a new start. It returns the records that the start before has left
// if trust is given the head of the file and says yes, and forgets them
// otherwise. current tells the generation of a client that is still registered.
func (f *File) Load(now Start, trust func(Start) bool, current func(wire.ClientID) (uint64, bool)) ([]Kept, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.start = now
	if f.mem == nil || f.mem.Size() == 0 {
		return nil, nil
	}
	head, err := f.readHead()
	if err != nil && !errors.Is(err, errHead) {
		return nil, fmt.Errorf("read reply slots: %w", err)
	}
	good := err == nil && trust(head)
	var out []Kept
	var buf [areaSize]byte
	for n := 1; n < f.count() && n <= f.max; n++ {
		off := int64(n) * areaSize
		if err := f.mem.Get(buf[:], off); err != nil {
			return nil, fmt.Errorf("read reply slots: %w", err)
		}
		client, gen, ok := decodeArea(buf[:headSize])
		if ok && good && f.areas[client] == nil {
			if g, known := current(client); known && g == gen {
				a := f.area(client, gen, n)
				f.areas[client] = a
				out = a.read(buf[headSize:], out)
				continue
			}
		}
		if ok {
			if err := f.mem.Put(make([]byte, headSize), off); err != nil {
				return nil, fmt.Errorf("clear reply slots: %w", err)
			}
		}
		f.free = append(f.free, n)
	}
	// After the areas were cleared, which this head would make true again.
	if err := f.writeHead(); err != nil {
		return nil, err
	}
	return out, nil
}

// count is the number of areas there is room for, that of the head included.
func (f *File) count() int { return int(f.mem.Size() / areaSize) }

func (f *File) area(client wire.ClientID, gen uint64, n int) *Area {
	var b [24]byte
	copy(b[:], client[:])
	le.PutUint64(b[16:], gen)
	return &Area{f: f, client: client, gen: gen, n: n, seed: crc32.Checksum(b[:], castagnoli)}
}

var errHead = errors.New("no head of a slot file")

func (f *File) readHead() (Start, error) {
	var b [headSize + maxBoot]byte
	if err := f.mem.Get(b[:], 0); err != nil {
		return Start{}, err
	}
	n := le.Uint32(b[12:])
	if string(b[:8]) != fileMagic || le.Uint32(b[8:]) != format || n > maxBoot {
		return Start{}, errHead
	}
	end := 24 + int(n)
	if le.Uint32(b[end:]) != crc32.Checksum(b[:end], castagnoli) {
		return Start{}, errHead
	}
	return Start{Instance: le.Uint64(b[16:]), Boot: string(b[24:end])}, nil
}

func (f *File) writeHead() error {
	boot := f.start.Boot[:min(len(f.start.Boot), maxBoot)]
	b := append(make([]byte, 0, headSize+maxBoot), fileMagic...)
	b = le.AppendUint32(b, format)
	b = le.AppendUint32(b, uint32(len(boot)))
	b = le.AppendUint64(b, f.start.Instance)
	b = append(b, boot...)
	b = le.AppendUint32(b, crc32.Checksum(b, castagnoli))
	if err := f.mem.Put(b, 0); err != nil {
		return fmt.Errorf("write head of reply slots: %w", err)
	}
	return nil
}

func decodeArea(b []byte) (client wire.ClientID, gen uint64, ok bool) {
	if string(b[:8]) != areaMagic || le.Uint32(b[32:]) != crc32.Checksum(b[:32], castagnoli) {
		return client, 0, false
	}
	copy(client[:], b[8:])
	return client, le.Uint64(b[24:]), true
}

// read appends the area's valid records to out.
func (a *Area) read(b []byte, out []Kept) []Kept {
	for i := range PerClient {
		r := b[i*recSize:][:recSize]
		k := Kept{Client: a.client, Gen: a.gen, Slot: uint16(i), Record: Record{
			XID: le.Uint64(r), Transno: le.Uint64(r[8:]), Status: wire.Status(le.Uint32(r[16:])), Count: le.Uint32(r[20:]),
		}}
		if k.XID != 0 && le.Uint32(r[24:]) == uint32(i) && le.Uint32(r[28:]) == a.sum(r) {
			out = append(out, k)
		}
	}
	return out
}

func (a *Area) sum(r []byte) uint32 { return crc32.Update(a.seed, castagnoli, r[:28]) }

// Attach gives a client's life its area, an empty one if it has none yet. An
// area of an earlier life goes.
func (f *File) Attach(client wire.ClientID, gen uint64) (*Area, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.areas[client]; a != nil {
		if a.gen == gen {
			return a, nil
		}
		if err := f.detach(a); err != nil {
			return nil, err
		}
	}
	n, err := f.take()
	if err != nil {
		return nil, fmt.Errorf("room for reply slots: %w", err)
	}
	a := f.area(client, gen, n)
	b := append(make([]byte, 0, areaSize), areaMagic...)
	b = le.AppendUint64(append(b, client[:]...), gen)
	b = le.AppendUint32(b, crc32.Checksum(b, castagnoli))
	// The records first: the same life may have had the area before.
	off := int64(n) * areaSize
	if err := f.mem.Put(make([]byte, areaSize-headSize), off+headSize); err != nil {
		return nil, fmt.Errorf("clear reply slots: %w", err)
	}
	if err := f.mem.Put(b, off); err != nil {
		return nil, fmt.Errorf("write reply slots: %w", err)
	}
	f.areas[client] = a
	return a, nil
}

// Area is the area of a client's life, nil if it has none. A nil File has none.
func (f *File) Area(client wire.ClientID, gen uint64) *Area {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.areas[client]; a != nil && a.gen == gen {
		return a
	}
	return nil
}

// take finds an area without an owner.
func (f *File) take() (int, error) {
	if f.mem == nil {
		mem, err := f.fs.OpenMemory(f.path)
		if err != nil {
			return 0, err
		}
		f.mem = mem
	}
	if len(f.free) == 0 {
		was := max(1, f.count())
		if was > f.max {
			return 0, unix.ENOSPC
		}
		if err := f.mem.Grow(f.mem.Size() + objfs.MemoryChunk); err != nil {
			return 0, err
		}
		if was == 1 {
			if err := f.writeHead(); err != nil {
				return 0, err
			}
		}
		for n := min(f.count()-1, f.max); n >= was; n-- {
			f.free = append(f.free, n)
		}
	}
	n := f.free[len(f.free)-1]
	f.free = f.free[:len(f.free)-1]
	return n, nil
}

// Detach forgets a client's slots.
func (f *File) Detach(client wire.ClientID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.areas[client]; a != nil {
		return f.detach(a)
	}
	return nil
}

func (f *File) detach(a *Area) error {
	a.mu.Lock()
	a.gone = true
	a.mu.Unlock()
	delete(f.areas, a.client)
	f.free = append(f.free, a.n)
	if err := f.mem.Put(make([]byte, headSize), int64(a.n)*areaSize); err != nil {
		return fmt.Errorf("forget reply slots: %w", err)
	}
	return nil
}

// Put keeps r as the newest result of a slot. Slots above PerClient, and those of
// a client that was detached, are not kept. A nil Area keeps nothing.
func (a *Area) Put(slot uint16, r Record) error {
	if a == nil || slot >= PerClient {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.gone {
		return nil
	}
	b := a.buf[:]
	le.PutUint64(b, r.XID)
	le.PutUint64(b[8:], r.Transno)
	le.PutUint32(b[16:], uint32(r.Status))
	le.PutUint32(b[20:], r.Count)
	le.PutUint32(b[24:], uint32(slot))
	le.PutUint32(b[28:], a.sum(b))
	return a.f.mem.Put(b, int64(a.n)*areaSize+headSize+int64(slot)*recSize)
}

// Sync makes the file durable.
func (f *File) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mem == nil {
		return nil
	}
	if err := f.mem.Sync(); err != nil {
		return fmt.Errorf("sync reply slots: %w", err)
	}
	return nil
}

// Close ends the use of the file; nothing else may be under way.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mem == nil {
		return nil
	}
	err := f.mem.Close()
	f.mem = nil
	if err != nil {
		return fmt.Errorf("close reply slots: %w", err)
	}
	return nil
}
