package host_test

import (
	"bytes"
	"fmt"
	"math/rand"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// twoFronts are two frontends that use the same files, and what a local file system
// would say of one.
type twoFronts struct {
	*bed
	fs   [2]*client.FS
	note func(format string, a ...any)

	data  []byte
	mtime int64 // 0: that of the last change
	ctime int64 // the newest that was seen
}

// pair connects two frontends whose clocks differ; the second one's is ahead by skew.
func (b *bed) pair(skew time.Duration) *twoFronts {
	p := &twoFronts{bed: b, note: b.t.Logf}
	for i, name := range []string{"a", "b"} {
		p.fs[i] = b.frontend(name, func(o *client.Options) {
			o.EpochIdle = 20 * time.Millisecond
			o.Clock = func() int64 { return b.clk.Now() + int64(i)*int64(skew) }
		})
	}
	return p
}

func (p *twoFronts) make(side int, name string) wire.FID {
	p.t.Helper()
	a := p.create(p.fs[side], name)
	p.data, p.mtime, p.ctime = nil, a.Mtime, a.Ctime
	return a.FID
}

func (p *twoFronts) write(side int, f wire.FID, off int, data []byte, how wire.StableHow) {
	p.t.Helper()
	a := p.attr(p.fs[side], f)
	if _, st := p.fs[side].Write(ctx, client.Owner{}, &a, uint64(off), data, how); st != wire.OK {
		p.t.Fatal("write:", st)
	}
	if end := off + len(data); end > len(p.data) {
		p.data = append(p.data, make([]byte, end-len(p.data))...)
	}
	copy(p.data[off:], data)
	p.changed(side, f, true)
	p.told("write", f, a)
}

// set is a SETATTR as nfsd makes it.
func (p *twoFronts) set(side int, f wire.FID, sa wire.SetAttr) {
	p.t.Helper()
	fs := p.fs[side]
	var rep wire.Reply
	req := wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: f}
	if fs.Call(ctx, client.Owner{}, &req, &rep); rep.Status != wire.OK {
		p.t.Fatal(rep.Status)
	}
	fs.Later(ctx, client.Owner{}, &rep.Attr)
	req = wire.Request{Header: wire.Header{Op: wire.OpSetattr, Flags: wire.FlagWaitCommit}, Key: key(), FID: f, SetAttr: sa}
	rep.Reset()
	fs.Setattr(ctx, client.Owner{}, &req, &rep)
	a := rep.Attr
	if rep.Status != wire.OK {
		p.t.Fatal("setattr:", rep.Status)
	}
	if st, _ := fs.Complete(ctx, client.Owner{}, &a, true); st != wire.OK {
		p.t.Fatal(st)
	}
	if sa.Mask&wire.SetSize != 0 {
		if n := int(sa.Size); n > len(p.data) {
			p.data = append(p.data, make([]byte, n-len(p.data))...)
		} else {
			p.data = p.data[:n:n]
		}
	}
	p.changed(side, f, sa.Mask&(wire.SetSize|wire.SetMtimeNow) != 0)
	if sa.Mask&wire.SetMtime != 0 {
		p.mtime = sa.Mtime
	}
	p.told("setattr", f, a)
}

// changed notes that a change was answered, one that sets mtime to the time of day or
// not.
func (p *twoFronts) changed(side int, f wire.FID, mtime bool) {
	p.t.Helper()
	a := p.attr(p.fs[side], f) // the other one knows nothing of it yet
	if a.Ctime <= p.ctime {
		p.t.Fatalf("ctime %d after a change, was %d", a.Ctime, p.ctime)
	}
	p.ctime = a.Ctime
	if mtime {
		p.mtime = a.Ctime
	}
}

// told compares attributes with what they have to be.
func (p *twoFronts) told(what string, f wire.FID, a wire.Attr) {
	p.t.Helper()
	if a.Size != uint64(len(p.data)) || a.Mtime != p.mtime || a.Ctime != p.ctime {
		p.t.Fatalf("%s: size %d mtime %d ctime %d (epoch open: %v), want %d, %d, %d", what, a.Size, a.Mtime, a.Ctime, a.EpochOpen, len(p.data), p.mtime, p.ctime)
	}
}

// check has both frontends say what is in the file.
func (p *twoFronts) check(f wire.FID) {
	p.t.Helper()
	for i, fs := range p.fs {
		p.told(fmt.Sprint("frontend ", i), f, p.attr(fs, f))
		if got := p.read(fs, f); got != string(p.data) {
			at := 0
			for at < len(got) && got[at] == p.data[at] {
				at++
			}
			p.t.Fatalf("frontend %d: other contents from byte %d on", i, at)
		}
	}
}

// closed waits until nobody has an IO epoch open; the MDT has the right size then.
func (p *twoFronts) closed(f wire.FID) {
	p.t.Helper()
	p.until("all IO epochs are closed", func() bool { return p.fs[0].OpenEpochs()+p.fs[1].OpenEpochs() == 0 })
	if a := p.attr(p.fs[0], f); a.EpochOpen {
		p.t.Fatal("an IO epoch is open")
	}
	p.check(f)
}

var skews = []time.Duration{0, 3 * time.Second, -3 * time.Second}

// Random writes, size changes, times and modes of two frontends with clocks that
// differ: each sees at once what the other has done, and both see what a local file
// system would say, while IO epochs open and close.
func TestTwoFrontendsAgainstAModel(t *testing.T) {
	steps := 400
	if testing.Short() {
		steps = 80
	}
	for stripes := uint8(1); stripes <= 3; stripes++ {
		for _, skew := range skews {
			t.Run(fmt.Sprintf("stripes=%d/skew=%v", stripes, skew), func(t *testing.T) {
				p := newStripedBed(t, 3, stripes).pair(skew)
				rng := rand.New(rand.NewSource(int64(stripes)*100 + int64(skew/time.Second)))
				f := p.make(0, "f")
				limit := 7 * stripe
				var log []string
				defer func() {
					if t.Failed() {
						t.Log("last steps:", log[max(0, len(log)-12):])
					}
				}()
				for range steps {
					side, off := rng.Intn(2), rng.Intn(limit)
					if rng.Intn(3) == 0 {
						off = stripe*rng.Intn(7) + rng.Intn(3) // about a boundary
						off = max(off-1, 0)
					}
					switch op := rng.Intn(20); {
					case op < 8:
						b := make([]byte, 1+rng.Intn(2*stripe))
						rng.Read(b)
						how := wire.StableHow(rng.Intn(3))
						log = append(log, fmt.Sprint(side, " write ", off, "+", len(b), " ", how))
						p.write(side, f, off, b, how)
					case op < 10:
						log = append(log, fmt.Sprint(side, " append"))
						p.write(side, f, len(p.data), []byte("appended"), wire.Unstable)
					case op < 13:
						log = append(log, fmt.Sprint(side, " truncate ", off))
						p.set(side, f, wire.SetAttr{Mask: wire.SetSize, Size: uint64(off)})
					case op < 15:
						log = append(log, fmt.Sprint(side, " touch"))
						p.set(side, f, wire.SetAttr{Mask: wire.SetMtime, Mtime: rng.Int63n(2e18)})
					case op < 16:
						log = append(log, fmt.Sprint(side, " truncate and touch ", off))
						p.set(side, f, wire.SetAttr{Mask: wire.SetMtime | wire.SetSize, Size: uint64(off), Mtime: rng.Int63n(2e18)})
					case op < 17:
						log = append(log, fmt.Sprint(side, " chmod"))
						p.set(side, f, wire.SetAttr{Mask: wire.SetMode, Mode: 0o600 + uint32(rng.Intn(64))})
					case op < 18:
						log = append(log, fmt.Sprint(side, " commit"))
						a := p.attr(p.fs[side], f)
						if st := p.fs[side].Commit(ctx, client.Owner{}, &a); st != wire.OK {
							t.Fatal(st)
						}
						p.told("commit", f, a)
					case op < 19:
						log = append(log, "close")
						p.closed(f)
					}
					p.check(f)
				}
				p.closed(f)
			})
		}
	}
}

// What programs do that copy and unpack files, some of it by one frontend and the rest
// by another.
func TestProgramsOverTwoFrontends(t *testing.T) {
	const old = 1_000_000_000 * int64(time.Second)
	content := bytes.Repeat([]byte("0123456789abcdef"), stripe/8)
	programs := map[string]func(p *twoFronts, f wire.FID, x, y int){
		"cp -p": func(p *twoFronts, f wire.FID, x, y int) {
			p.write(x, f, 0, content, wire.Unstable)
			p.set(y, f, wire.SetAttr{Mask: wire.SetMtime | wire.SetAtime, Mtime: old, Atime: old})
			p.set(x, f, wire.SetAttr{Mask: wire.SetUID | wire.SetGID, UID: 3, GID: 4})
			p.set(y, f, wire.SetAttr{Mask: wire.SetMode, Mode: 0o444})
		},
		"tar x": func(p *twoFronts, f wire.FID, x, y int) {
			for off := 0; off < len(content); off += 10240 {
				p.write([]int{x, y}[off/10240%2], f, off, content[off:min(off+10240, len(content))], wire.Unstable)
			}
			p.set(x, f, wire.SetAttr{Mask: wire.SetMode, Mode: 0o600})
			p.set(y, f, wire.SetAttr{Mask: wire.SetMtime, Mtime: old})
		},
		"touch -d, then append": func(p *twoFronts, f wire.FID, x, y int) {
			p.write(x, f, 0, []byte("head"), wire.FileSync)
			p.set(y, f, wire.SetAttr{Mask: wire.SetMtime, Mtime: old})
			p.check(f)
			p.write(x, f, len(p.data), []byte("tail"), wire.Unstable)
		},
		"truncate, then append": func(p *twoFronts, f wire.FID, x, y int) {
			p.write(x, f, 0, content, wire.Unstable)
			p.set(y, f, wire.SetAttr{Mask: wire.SetSize, Size: stripe + 7})
			p.write(x, f, len(p.data), []byte("x"), wire.Unstable)
			p.set(x, f, wire.SetAttr{Mask: wire.SetSize})
			p.write(y, f, len(p.data), []byte("y"), wire.Unstable)
		},
		"write, then chmod": func(p *twoFronts, f wire.FID, x, y int) {
			p.set(x, f, wire.SetAttr{Mask: wire.SetMtime, Mtime: old})
			p.write(x, f, 0, []byte("new"), wire.Unstable)
			p.set(y, f, wire.SetAttr{Mask: wire.SetMode, Mode: 0o755})
		},
	}
	for _, skew := range skews {
		p := newStripedBed(t, 2, 2).pair(skew)
		for name, run := range programs {
			for x := range 2 {
				for _, settle := range []bool{false, true} {
					f := p.make(x, fmt.Sprint(name, x, settle))
					if settle {
						p.closed(f) // the epoch that the create has opened
					}
					run(p, f, x, 1-x)
					p.check(f)
					p.closed(f)
				}
			}
		}
	}
}

// Sizes, holes, cuts and space are right at every stripe boundary, for the frontend
// that has not made them, too.
func TestStripeBoundaries(t *testing.T) {
	const stripes = 3
	b := newStripedBed(t, stripes, stripes)
	p := b.pair(0)
	total := func() uint64 {
		t.Helper()
		s, st := p.fs[0].Statfs(ctx, client.Owner{})
		if st != wire.OK || s.Total == 0 {
			t.Fatal(st)
		}
		return s.Total - s.Free
	}
	for n := range 2*stripes + 1 {
		for d := -1; d <= 1; d++ {
			at := n*stripe + d
			if at < 0 {
				continue
			}
			side := (n + d + 1) % 2
			f := p.make(side, fmt.Sprint("hole", at))
			p.write(side, f, at, []byte("ab"), wire.Unstable) // across the boundary if d is -1
			p.check(f)
			p.set(1-side, f, wire.SetAttr{Mask: wire.SetSize, Size: uint64(at + 1)})
			p.check(f)
			p.set(side, f, wire.SetAttr{Mask: wire.SetSize, Size: uint64(at)})
			p.check(f)
			p.set(1-side, f, wire.SetAttr{Mask: wire.SetSize, Size: uint64(at + stripes*stripe + 1)}) // what was cut off is zeros
			p.check(f)
			p.write(side, f, 0, bytes.Repeat([]byte{7}, at+1), wire.Unstable)
			p.check(f)
			p.closed(f)
		}
	}
	// Space that a file takes on every OST, and that its end gives back.
	empty := total()
	f := p.make(0, "space")
	p.write(0, f, 0, bytes.Repeat([]byte{1}, 4*stripes*stripe), wire.FileSync)
	if used := p.attr(p.fs[1], f).Used; used < 4*stripes*stripe {
		t.Errorf("%d bytes of %d are used", used, 4*stripes*stripe)
	}
	if full := total(); full < empty {
		t.Errorf("%d bytes used, %d before", full, empty)
	}
	p.set(1, f, wire.SetAttr{Mask: wire.SetSize, Size: stripe})
	p.closed(f)
	if used := p.attr(p.fs[0], f).Used; used > stripe+4096 {
		t.Errorf("%d bytes are used after a cut to %d", used, stripe)
	}
}

// locked runs do while the frontend's client has the whole file locked.
func (p *twoFronts) locked(side int, f wire.FID, do func(fs *client.FS)) {
	fs := p.fs[side]
	req := wire.Request{Header: wire.Header{Op: wire.OpLock, Flags: wire.FlagWaitCommit}, FID: f, Lock: &wire.LockArgs{
		Owner: wire.LockOwner{LockHost: wire.LockHost{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(side)}), Name: "c"}, Svid: uint32(side), OH: "o"},
		Range: wire.LockRange{End: wire.MaxLockOffset}, Exclusive: true,
	}}
	for {
		var rep wire.Reply
		r := req
		r.Key = lockKey(side)
		fs.Call(ctx, client.Owner{}, &r, &rep)
		if rep.Status == wire.OK {
			break
		}
		if rep.Status != wire.ErrLockDenied {
			p.t.Error("lock:", rep.Status)
			return
		}
		time.Sleep(time.Millisecond)
	}
	do(fs)
	var rep wire.Reply
	req.Op, req.Key = wire.OpUnlock, lockKey(side)
	if fs.Call(ctx, client.Owner{}, &req, &rep); rep.Status != wire.OK {
		p.t.Error("unlock:", rep.Status)
	}
}

var lockKeys [2]uint32

// lockKey is that of a new NLM call of a side's client, which makes one at a time.
func lockKey(side int) wire.ReplyKey {
	lockKeys[side]++
	return wire.ReplyKey{Addr: [16]byte{9, byte(side)}, Port: 9, XID: lockKeys[side], Proc: wire.LockProgram << 8, Sum: 1}
}

// Clients of two frontends append to a file (O_APPEND) and count in another one, under
// locks: nothing is lost and nothing overlaps, whether or not the data were committed
// when the lock was given back (close-to-open commits them).
func TestAppendAndCountUnderLocks(t *testing.T) {
	for _, commit := range []bool{false, true} {
		p := newStripedBed(t, 2, 2).pair(2 * time.Second)
		list, counter := p.make(0, "list"), p.make(1, "counter")
		const rounds = 60
		var wg sync.WaitGroup
		for side := range 2 {
			wg.Go(func() {
				for i := range rounds {
					p.locked(side, list, func(fs *client.FS) {
						// A client revalidates what it knows when it gets a lock.
						var a wire.Attr
						st, _ := fs.Attr(ctx, client.Owner{}, list, &a, true)
						line := fmt.Appendf(nil, "%d %4d %01993d\n", side, i, 0) // boundaries of stripes are crossed
						if st == wire.OK {
							_, st = fs.Write(ctx, client.Owner{}, &a, a.Size, line, wire.Unstable)
						}
						if st == wire.OK && commit {
							st = fs.Commit(ctx, client.Owner{}, &a)
						}
						if st != wire.OK {
							t.Error("append:", st)
						}
					})
					p.locked(side, counter, func(fs *client.FS) {
						var a wire.Attr
						var buf [8]byte
						st, _ := fs.Attr(ctx, client.Owner{}, counter, &a, true)
						n := 0
						if st == wire.OK {
							n, _, st, _ = fs.Read(ctx, client.Owner{}, &a, 0, buf[:], true)
						}
						was, err := 0, error(nil)
						if n > 0 {
							was, err = strconv.Atoi(string(buf[:n]))
						}
						if err != nil {
							t.Error(err)
						}
						if st == wire.OK {
							_, st = fs.Write(ctx, client.Owner{}, &a, 0, fmt.Appendf(nil, "%08d", was+1), wire.Unstable)
						}
						if st != wire.OK {
							t.Error("count:", st)
						}
					})
				}
			})
		}
		wg.Wait()
		for side := range 2 {
			if got := p.read(p.fs[side], counter); got != fmt.Sprintf("%08d", 2*rounds) {
				t.Errorf("counted %q", got)
			}
			lines := bytes.SplitAfter([]byte(p.read(p.fs[side], list)), []byte("\n"))
			lines = lines[:len(lines)-1]
			if len(lines) != 2*rounds {
				t.Fatalf("%d lines, want %d", len(lines), 2*rounds)
			}
			var next [2]int
			for _, l := range lines {
				var s, i, z int
				if _, err := fmt.Sscan(string(l), &s, &i, &z); err != nil || len(l) != 2001 || s > 1 || i != next[s] {
					t.Fatalf("line %.20q of %d bytes, %v", l, len(l), err)
				}
				next[s]++
			}
		}
	}
}

// With an OST down, files that are on others alone work as ever, and new files are made
// there; what is on it is all there when it is back.
func TestOneOSTDown(t *testing.T) {
	b := newBed(t, 3)
	p := b.pair(0)
	var files []wire.FID
	for i := range 3 {
		a := b.createOn(p.fs[i%2], fmt.Sprint("on", i), i)
		if st := b.write(p.fs[1-i%2], a, fmt.Sprint("data ", i), wire.FileSync); st != wire.OK {
			t.Fatal(st)
		}
		files = append(files, a.FID)
	}
	b.until("all IO epochs are closed", func() bool { return p.fs[0].OpenEpochs()+p.fs[1].OpenEpochs() == 0 })
	b.stopOST(1)
	b.until("the MDT knows", func() bool { return !b.mdt.OSTs()[1].Up })
	for _, i := range []int{0, 2} {
		for side, fs := range p.fs {
			a := b.attr(fs, files[i])
			if st := b.write(fs, a, fmt.Sprint("side ", side), wire.Unstable); st != wire.OK {
				t.Fatal(st)
			}
			if got := b.read(p.fs[1-side], files[i]); got != fmt.Sprint("side ", side) {
				t.Errorf("file %d has %q", i, got)
			}
		}
	}
	// Who only asks for attributes does not need it.
	if a := b.attr(p.fs[0], files[1]); a.EpochOpen || a.Size != 6 {
		t.Errorf("size %d of a file whose OST is down, epoch open %v", a.Size, a.EpochOpen)
	}
	for i := range 12 {
		a := b.create(p.fs[i%2], fmt.Sprint("new", i))
		if slices.Contains(a.Layout.OST[:a.Layout.Count], 1) {
			t.Fatal("a new file on an OST that is down")
		}
		if st := b.write(p.fs[1-i%2], a, "new", wire.FileSync); st != wire.OK {
			t.Fatal(st)
		}
	}
	b.startOST(1)
	for _, fs := range p.fs {
		if got := b.read(fs, files[1]); got != "data 1" {
			t.Errorf("%q", got)
		}
	}
}
