package slots

import (
	"errors"
	"hash/crc32"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

func mem() *objfs.Mem { return objfs.NewMem(func() int64 { return 1 }) }

func yes(Start) bool { return true }

// gen1 says that everybody is registered with generation 1.
func gen1(wire.ClientID) (uint64, bool) { return 1, true }

func open(t testing.TB, fs objfs.FS, now Start, trust func(Start) bool) (*File, []Kept) {
	t.Helper()
	f, err := Open(fs, "slots", 1000)
	if err != nil {
		t.Fatal(err)
	}
	k, err := f.Load(now, trust, gen1)
	if err != nil {
		t.Fatal(err)
	}
	return f, k
}

func attach(t testing.TB, f *File, n byte, gen uint64) *Area {
	t.Helper()
	a, err := f.Attach(wire.ClientID{n}, gen)
	if err != nil {
		t.Fatal(err)
	}
	if f.Area(wire.ClientID{n}, gen) != a || f.Area(wire.ClientID{n}, gen+1) != nil {
		t.Fatal("area is not found")
	}
	return a
}

func TestKeptOverStarts(t *testing.T) {
	m := mem()
	f, k := open(t, m, Start{1, "a"}, nil) // there is no head to trust
	if k != nil || len(names(t, m)) != 0 {
		t.Fatalf("%v, files %v", k, names(t, m))
	}
	rec := Record{XID: 7, Transno: 8, Status: wire.ErrNoSpc, Count: 9}
	for slot, r := range []Record{{XID: 1}, {XID: 2, Transno: 3}, rec} {
		if err := attach(t, f, 1, 1).Put(uint16(slot), r); err != nil {
			t.Fatal(err)
		}
	}
	a := attach(t, f, 2, 1)
	for _, slot := range []uint16{PerClient - 1, PerClient, 65535} {
		if err := a.Put(slot, rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := (*Area)(nil).Put(0, rec); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	var seen Start
	f, k = open(t, m, Start{2, "b"}, func(s Start) bool { seen = s; return true })
	c1, c2 := wire.ClientID{1}, wire.ClientID{2}
	want := []Kept{
		{c2, 1, PerClient - 1, rec},
		{c1, 1, 0, Record{XID: 1}}, {c1, 1, 1, Record{XID: 2, Transno: 3}}, {c1, 1, 2, rec},
	}
	sortKept(k)
	sortKept(want)
	if d := cmp.Diff(want, k); d != "" || seen != (Start{1, "a"}) {
		t.Fatal(seen, d)
	}
	// Areas go on with their clients, a new life begins with nothing.
	if err := attach(t, f, 1, 1).Put(0, Record{XID: 5}); err != nil {
		t.Fatal(err)
	}
	old := attach(t, f, 2, 1)
	attach(t, f, 2, 2)
	if err := old.Put(0, rec); err != nil {
		t.Fatal(err) // late, and not kept
	}
	f.Close()
	f, err := Open(m, "slots", 1000)
	if err != nil {
		t.Fatal(err)
	}
	k, err = f.Load(Start{3, "b"}, yes, func(id wire.ClientID) (uint64, bool) { return uint64(id[0]), true })
	if err != nil || len(k) != 3 || k[0].XID != 5 {
		t.Fatalf("%+v %v", k, err)
	}
	// Who is not registered, or was in another life, is forgotten; so is all if
	// the head is not trusted, for good.
	f.Close()
	f, k = open(t, m, Start{4, "b"}, func(Start) bool { return false })
	f.Close()
	if k != nil {
		t.Fatalf("%+v", k)
	}
	if f, k = open(t, m, Start{5, "b"}, yes); k != nil {
		t.Fatalf("%+v", k)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func sortKept(k []Kept) {
	for i := range k {
		for j := i; j > 0 && (k[j].Client[0] < k[j-1].Client[0] || k[j].Client == k[j-1].Client && k[j].Slot < k[j-1].Slot); j-- {
			k[j], k[j-1] = k[j-1], k[j]
		}
	}
}

func names(t *testing.T, m *objfs.Mem) []string {
	t.Helper()
	n, err := m.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// An area is used again, without what its former owner has left in it, and their
// number is bounded.
func TestAreasAreReused(t *testing.T) {
	m := mem()
	f, err := Open(m, "slots", 70)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Load(Start{1, ""}, yes, gen1); err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		for n := range byte(70) {
			a := attach(t, f, n+byte(round)*70, 1)
			if err := a.Put(uint16(round), Record{XID: uint64(n) + 1}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := f.Attach(wire.ClientID{0xff}, 1); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("a client too many: %v", err)
		}
		if n := f.mem.Size(); n != 2*objfs.MemoryChunk {
			t.Fatalf("%d bytes", n)
		}
		if round == 2 {
			break
		}
		for n := range byte(70) {
			if err := f.Detach(wire.ClientID{n + byte(round)*70}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.Detach(wire.ClientID{0xee}); err != nil {
		t.Fatal(err)
	}
	f.Close()
	f, err = Open(m, "slots", 70)
	if err != nil {
		t.Fatal(err)
	}
	k, err := f.Load(Start{2, ""}, yes, gen1)
	if err != nil || len(k) != 70 {
		t.Fatalf("%d records, %v", len(k), err)
	}
	for _, x := range k {
		if x.Slot != 2 {
			t.Fatalf("a former owner's: %+v", x)
		}
	}
}

func TestConcurrentPuts(t *testing.T) {
	l, err := objfs.NewLinux(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Shut()
	f, _ := open(t, l, Start{1, ""}, yes)
	var wg sync.WaitGroup
	for c := range byte(8) {
		wg.Go(func() {
			a, err := f.Attach(wire.ClientID{c}, 1)
			if err != nil {
				t.Error(err)
				return
			}
			for i := range 500 {
				if err := a.Put(uint16(i%64), Record{XID: uint64(i) + 1}); err != nil {
					t.Error(err)
				}
				if c == 7 && i == 250 {
					if err := f.Detach(wire.ClientID{c}); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	f.Close()
	f, k := open(t, l, Start{2, ""}, yes)
	if len(k) != 7*64 {
		t.Fatalf("%d records", len(k))
	}
	f.Close()
}

// FuzzLoad reads any file: what it finds are records with a right checksum, and
// the file can be used afterwards.
func FuzzLoad(f *testing.F) {
	m := mem()
	x, _ := open(f, m, Start{1, "boot"}, yes)
	for n := range byte(3) {
		if err := attach(f, x, n, 1).Put(uint16(n), Record{XID: uint64(n) + 1}); err != nil {
			f.Fatal(err)
		}
	}
	img := make([]byte, 5*areaSize)
	if err := x.mem.Get(img, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(img)
	f.Add([]byte(fileMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:min(len(b), objfs.MemoryChunk)]
		// With the right checksums, or nothing would pass them.
		seal := func(from, to int) {
			if to+4 <= len(b) {
				le.PutUint32(b[to:], crc32.Checksum(b[from:to], castagnoli))
			}
		}
		if len(b) >= 24 {
			seal(0, 24+int(le.Uint32(b[12:])%(maxBoot+1)))
		}
		for off := areaSize; off < len(b); off += areaSize {
			seal(off, off+32)
		}
		m := mem()
		mm, err := m.OpenMemory("slots")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(mm.Grow(objfs.MemoryChunk), mm.Put(b, 0), mm.Close()); err != nil {
			t.Fatal(err)
		}
		x, k := open(t, m, Start{2, "boot"}, func(s Start) bool { return len(s.Boot) <= maxBoot })
		seen := map[wire.ClientID]int{}
		for _, r := range k {
			if r.XID == 0 || r.Slot >= PerClient || r.Gen != 1 {
				t.Fatalf("%+v", r)
			}
			seen[r.Client]++
		}
		for id, n := range seen {
			if n > PerClient {
				t.Fatalf("%d records of %v", n, id)
			}
		}
		id := wire.ClientID{0xab, 0xcd}
		a, err := x.Attach(id, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(a.Put(3, Record{XID: 77}), x.Close()); err != nil {
			t.Fatal(err)
		}
		_, again := open(t, m, Start{3, "boot"}, yes)
		found := false
		for _, r := range again {
			found = found || r.Client == id && r.Slot == 3 && r.XID == 77
		}
		if !found || len(again) < len(k) {
			t.Fatalf("%d records, then %d", len(k), len(again))
		}
	})
}

func BenchmarkPut(b *testing.B) {
	l, err := objfs.NewLinux(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer l.Shut()
	f, _ := open(b, l, Start{1, ""}, yes)
	a := attach(b, f, 1, 1)
	b.ReportAllocs()
	for i := range b.N {
		if err := a.Put(uint16(i%64), Record{XID: uint64(i) + 1}); err != nil {
			b.Fatal(err)
		}
	}
}
