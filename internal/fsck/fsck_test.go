package fsck

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

func text(r *Report) string {
	var b bytes.Buffer
	_ = r.WriteText(&b, true)
	return b.String()
}

func TestClean(t *testing.T) {
	w := newWorld(t)
	w.build()
	w.stop(true, true)
	r := w.check(false)
	if len(r.Classes) != 0 || r.ExitCode() != ExitClean {
		t.Fatal(text(r))
	}
	k := r.Counts
	if k.Directories < 7 || k.Files < 40 || k.Symlinks != 1 || k.Objects == 0 || k.Bytes < 1<<20 || k.Replies == 0 || k.Entries < 50 || k.Locks < 3 {
		t.Fatalf("counts: %+v", k)
	}
	if !strings.Contains(text(r), "\nclean\n") && !strings.HasSuffix(text(r), "clean\n") {
		t.Error(text(r))
	}
	// A repair of a clean store changes nothing and reads once.
	if r := w.check(true); len(r.Classes) != 0 || r.Rounds != 1 {
		t.Fatal(text(r))
	}
	// And the file system still works.
	w.start()
	w.create(wire.RootFID, "after", 5)
	w.stop(true, true)
	if r := w.check(false); len(r.Classes) != 0 {
		t.Fatal(text(r))
	}
}

// TestNotes checks a store in the middle of work: pending logs and open
// epochs are no errors, and a repair leaves them to the next start.
func TestNotes(t *testing.T) {
	w := newWorld(t)
	x := w.build()
	w.remove(x.d, "big")
	w.stop(false, false)
	r := w.check(true)
	if r.ErrorsFound != 0 || r.ExitCode() != ExitClean || r.Notes == 0 {
		t.Fatal(text(r))
	}
	for _, c := range []Class{UnlinkPending, EpochOpen} {
		if r.Classes[c].Found == 0 || r.Classes[c].Repaired != 0 || r.Classes[c].Severity != Note {
			t.Errorf("%s: %+v", c, r.Classes[c])
		}
	}
	var b bytes.Buffer
	if err := r.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(b.Bytes(), &back); err != nil || back.Notes != r.Notes {
		t.Fatal(err, back.Notes)
	}
}

func TestCannotRun(t *testing.T) {
	w := newWorld(t)
	if _, err := w.tryCheck(false); !errors.Is(err, ErrInUse) {
		t.Errorf("while it runs: %v", err)
	}
	w.stop(true, true)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Open(ctx, OpenOptions{MDTDir: t.TempDir() + "/none", Repair: true}); !errors.Is(err, ErrNoStore) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := Open(ctx, OpenOptions{MDTDir: t.TempDir(), Repair: true}); !errors.Is(err, ErrNoStore) {
		t.Errorf("empty directory: %v", err)
	}
	if _, err := NewDir(objfs.NewMem(w.clk.Now), 0, true, nil); !errors.Is(err, ErrNoStore) {
		t.Errorf("empty OST: %v", err)
	}
	if _, err := NewDir(w.ofs[0], 1, false, nil); err == nil {
		t.Error("an OST with another index is accepted")
	}
	held, err := w.ofs[1].Lock("lock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.tryCheck(false); !errors.Is(err, ErrInUse) {
		t.Errorf("OST in use: %v", err)
	}
	held()
	if r := w.check(false); r.ErrorsFound != 0 {
		t.Error(text(r))
	}
}

// TestUncleanStaysUnclean: a check after a power failure must not take away
// the next start's knowledge that unflushed data are lost.
func TestUncleanStaysUnclean(t *testing.T) {
	w := newWorld(t)
	x := w.build()
	w.stop(true, true)
	before := readAll(t, w.ofs[0], superName)
	for _, repair := range []bool{false, true} {
		if repair {
			w.put(inodeKey(x.file), nil) // makes an orphan object
		}
		w.check(repair)
		if !bytes.Equal(before, readAll(t, w.ofs[0], superName)) {
			t.Fatalf("repair %v changed the OST's superblock", repair)
		}
	}
}

func readAll(t *testing.T, fs objfs.FS, p string) []byte {
	t.Helper()
	fd, err := fs.Open(p, objfs.ReadOnly)
	if err != nil {
		t.Fatal(p, err)
	}
	defer fs.Close(fd)
	st, err := fs.Fstat(fd)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, st.Size)
	n, err := fs.Pread(fd, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func writeFile(t *testing.T, fs objfs.FS, p string, b []byte, off int64) {
	t.Helper()
	fd, err := fs.Open(p, objfs.ReadWrite|objfs.Create)
	if err != nil {
		t.Fatal(p, err)
	}
	defer fs.Close(fd)
	if _, err := fs.Pwrite(fd, b, off); err != nil {
		t.Fatal(err)
	}
}

func flip(v []byte, i int) []byte {
	v = bytes.Clone(v)
	v[i] ^= 0x80
	return v
}

// damages has for each class a damage that shows it and nothing else.
var damages = []struct {
	class  Class
	name   string
	damage func(w *world, x *tree)
	// after looks at the repaired store; optional.
	after func(t *testing.T, w *world, x *tree)
	// stays: --repair does not touch it.
	stays bool
}{
	{class: SuperblockDamaged, damage: func(w *world, _ *tree) { w.put([]byte("ms"), []byte{9}) }},
	{class: SuperblockDamaged, name: "missing", damage: func(w *world, _ *tree) { w.put([]byte("ms"), nil) }},
	{class: SuperblockSequence, damage: func(w *world, _ *tree) {
		w.repairs(func(r *mdt.Repair) { r.PutSuper(&mdt.Super{NextSeq: 2}) })
	}},
	{class: SuperblockSequence, name: "tenure", damage: func(w *world, _ *tree) {
		// A start that takes the sequence again would give a tenure again.
		e := mdt.ClientEntry{ClientRecord: recov.ClientRecord{Client: wire.ClientID{9}, Gen: 1, Local: true}, Tenure: 77<<32 | 1}
		w.put(metaKey('c', e.Client), mdt.AppendClient(nil, &e))
	}},
	{class: StateDamaged, damage: func(w *world, _ *tree) { w.put([]byte("mt"), []byte("x")) }},
	{class: StateTransno, damage: func(w *world, _ *tree) {
		s := state(w)
		s.Transno -= 1 << 31
		w.repairs(func(r *mdt.Repair) { r.PutState(&s) })
	}},
	{class: StateInodes, damage: func(w *world, _ *tree) {
		s := state(w)
		s.Inodes += 3
		w.repairs(func(r *mdt.Repair) { r.PutState(&s) })
	}},
	{class: KeyUnknown, damage: func(w *world, _ *tree) { w.put([]byte("zzz"), []byte("x")) }},
	{class: KeyUnknown, name: "short", damage: func(w *world, x *tree) { w.put(inodeKey(x.file)[:12], []byte("x")) }},
	{class: KeyUnknown, name: "meta", damage: func(w *world, x *tree) { w.put([]byte("m"), []byte("x"), []byte("mq"), []byte("y")) }},
	{class: InodeDamaged, damage: func(w *world, x *tree) { w.put(inodeKey(x.file), []byte("nonsense")) },
		after: func(t *testing.T, w *world, x *tree) {
			if names, err := w.ofs[0].ReadDir(asideDir); err != nil && len(names) == 0 {
				if names, err = w.ofs[1].ReadDir(asideDir); err != nil || len(names) != 1 {
					t.Error("the data were not set aside:", err, names)
				}
			}
		}},
	{class: InodeDamaged, name: "directory", damage: func(w *world, x *tree) { w.put(inodeKey(x.sub), []byte("nonsense")) },
		after: func(t *testing.T, w *world, x *tree) {
			w.start()
			defer w.stop(true, true)
			a, st := w.fs.Resolve(context.Background(), wire.RootFID, "d/sub/striped")
			if st != wire.OK || a.FID != x.striped || a.Size != 300<<10 {
				t.Error("a file below the damaged directory:", st, a)
			}
		}},
	{class: InodeDamaged, name: "root", damage: func(w *world, x *tree) { w.put(inodeKey(wire.RootFID), []byte("nonsense")) },
		after: func(t *testing.T, w *world, x *tree) {
			w.start()
			defer w.stop(true, true)
			if a, st := w.fs.Resolve(context.Background(), wire.RootFID, "d/sub"); st != wire.OK || a.FID != x.sub {
				t.Error("below the root:", st, a)
			}
		}},
	{class: InodeVersion, damage: func(w *world, x *tree) { w.edit(x.file, func(in *mdt.Inode) { in.Attr.Version = 1 << 63 }) }},
	{class: RootMissing, damage: func(w *world, x *tree) {
		s := state(w)
		s.Inodes--
		w.put(inodeKey(wire.RootFID), nil)
		w.repairs(func(r *mdt.Repair) { r.PutState(&s) })
	}},
	{class: DirInodeMissing, damage: func(w *world, x *tree) {
		s := state(w)
		s.Inodes--
		w.put(inodeKey(x.sub), nil)
		w.repairs(func(r *mdt.Repair) { r.PutState(&s) })
	}},
	{class: EntryDamaged, damage: func(w *world, x *tree) {
		k := nameKey(x.d, []byte("file"))
		w.put(k, flip(w.value(k), 0))
	}, after: wantFile("d/file", 1000)},
	{class: EntryDamaged, name: "both", damage: func(w *world, x *tree) {
		k := nameKey(x.d, []byte("fifo"))
		w.put(k, flip(w.value(k), 17)) // type
	}, after: wantFile("d/fifo", 0)},
	{class: EntryName, damage: func(w *world, x *tree) {
		ent := w.entry(x.d, "file")
		w.repairs(func(r *mdt.Repair) {
			r.DeleteName(x.d, []byte("file"))
			r.PutName(x.d, []byte("a/b"), ent)
		})
	}},
	{class: EntryNotDir, damage: func(w *world, x *tree) {
		w.repairs(func(r *mdt.Repair) {
			r.PutName(x.fifo, []byte("child"), mdt.Entry{FID: x.file, Type: wire.TypeReg, Cookie: 3})
		})
		w.edit(x.file, func(in *mdt.Inode) { in.Attr.Nlink++ })
	}},
	{class: EntryDangling, damage: func(w *world, x *tree) {
		w.edit(x.d, func(in *mdt.Inode) {
			w2 := in.NextCookie
			in.NextCookie++
			in.Entries++
			defer w.repairs(func(r *mdt.Repair) {
				r.PutName(x.d, []byte("ghost"), mdt.Entry{FID: wire.FID{Seq: 2, OID: 1 << 20}, Type: wire.TypeReg, Cookie: w2})
			})
		})
	}},
	{class: EntryType, damage: func(w *world, x *tree) {
		ent := w.entry(x.d, "file")
		ent.Type = wire.TypeSock
		w.repairs(func(r *mdt.Repair) { r.PutName(x.d, []byte("file"), ent) })
	}, after: wantFile("d/file", 1000)},
	{class: EntryCookie, damage: func(w *world, x *tree) {
		ent := w.entry(x.d, "file")
		w.repairs(func(r *mdt.Repair) { r.DeleteCookie(x.d, ent.Cookie) })
	}},
	{class: EntryCookie, name: "twice", damage: func(w *world, x *tree) {
		// Two entries with one cookie.
		a, b := w.entry(x.d, "file"), w.entry(x.d, "big")
		w.repairs(func(r *mdt.Repair) { r.DeleteCookie(x.d, b.Cookie) })
		b.Cookie = a.Cookie
		w.put(nameKey(x.d, []byte("big")), mdt.AppendEntry(nil, &b))
	}},
	{class: CookieDamaged, damage: func(w *world, x *tree) {
		k := cookieKey(x.d, w.entry(x.d, "file").Cookie)
		w.put(k, flip(w.value(k), 0))
	}},
	{class: CookieMismatch, damage: func(w *world, x *tree) {
		k := cookieKey(x.d, w.entry(x.d, "file").Cookie)
		v := w.value(k)
		w.put(k, flip(v, len(v)-1))
	}},
	{class: CookieMismatch, name: "fid", damage: func(w *world, x *tree) {
		k := cookieKey(x.d, w.entry(x.d, "file").Cookie)
		w.put(k, flip(w.value(k), 10))
	}},
	{class: CookieEntry, damage: func(w *world, x *tree) {
		w.repairs(func(r *mdt.Repair) { r.DeleteName(x.d, []byte("sub")) })
	}, after: wantFile("d/sub/striped", 300<<10)},
	{class: CookieEntry, name: "stale", damage: func(w *world, x *tree) {
		v := w.value(cookieKey(x.d, w.entry(x.d, "file").Cookie))
		w.edit(x.d, func(in *mdt.Inode) { in.NextCookie += 10 })
		w.put(cookieKey(x.d, 0xfff0), v)
	}},
	{class: CookieRange, damage: func(w *world, x *tree) { w.edit(x.d, func(in *mdt.Inode) { in.NextCookie = 5 }) }},
	{class: CookieRange, name: "reserved", damage: func(w *world, x *tree) {
		ent := w.entry(x.d, "file")
		w.repairs(func(r *mdt.Repair) {
			r.DeleteCookie(x.d, ent.Cookie)
			ent.Cookie = 2
			r.PutName(x.d, []byte("file"), ent)
		})
	}},
	{class: DirParents, damage: func(w *world, x *tree) { secondParent(w, wire.RootFID, x.deep) }},
	{class: DirParents, name: "first", damage: func(w *world, x *tree) {
		// The directory that the parent field names comes later.
		secondParent(w, wire.RootFID, x.empty)
	}, after: wantDir("d/empty")},
	{class: DirParents, name: "root", damage: func(w *world, x *tree) { secondParent(w, x.sub, wire.RootFID) }},
	{class: DirParent, damage: func(w *world, x *tree) { w.edit(x.deep, func(in *mdt.Inode) { in.Attr.Parent = x.empty }) }},
	{class: DirCycle, damage: func(w *world, x *tree) {
		// sub moves below its own subdirectory.
		ent := w.entry(x.d, "sub")
		w.repairs(func(r *mdt.Repair) {
			r.DeleteName(x.d, []byte("sub"))
			r.DeleteCookie(x.d, ent.Cookie)
		})
		w.edit(x.d, func(in *mdt.Inode) { in.Entries--; in.Attr.Nlink--; fixSize(in) })
		secondParent(w, x.deep, x.sub)
		w.edit(x.sub, func(in *mdt.Inode) { in.Attr.Parent = x.deep })
	}, after: wantFile(lostName(func(x *tree) wire.FID { return x.sub })+"/striped", 300<<10)},
	{class: DirEntries, damage: func(w *world, x *tree) { w.edit(x.deep, func(in *mdt.Inode) { in.Entries += 2 }) }},
	{class: DirEntries, name: "size", damage: func(w *world, x *tree) { w.edit(x.empty, func(in *mdt.Inode) { in.Attr.Size = 77 }) }},
	{class: LinkCount, damage: func(w *world, x *tree) { w.edit(x.link2, func(in *mdt.Inode) { in.Attr.Nlink = 2 }) }},
	{class: LinkCount, name: "directory", damage: func(w *world, x *tree) { w.edit(x.sub, func(in *mdt.Inode) { in.Attr.Nlink = 7 }) }},
	{class: LinkCount, name: "empty directory", damage: func(w *world, x *tree) { w.edit(x.empty, func(in *mdt.Inode) { in.Attr.Nlink = 7 }) }},
	{class: Orphan, damage: func(w *world, x *tree) { unenter(w, x.d, "file") },
		after: wantFile(lostName(func(x *tree) wire.FID { return x.file }), 1000)},
	{class: Orphan, name: "directory", damage: func(w *world, x *tree) { unenter(w, x.d, "sub") },
		after: wantFile(lostName(func(x *tree) wire.FID { return x.sub })+"/striped", 300<<10)},
	{class: SymlinkMissing, damage: func(w *world, x *tree) { w.put(linkKey(x.sym), nil) }},
	{class: SymlinkMissing, name: "empty", damage: func(w *world, x *tree) { w.put(linkKey(x.sym), []byte{}) }},
	{class: SymlinkStray, damage: func(w *world, x *tree) { w.put(linkKey(x.file), []byte("to")) }},
	{class: SymlinkSize, damage: func(w *world, x *tree) { w.put(linkKey(x.sym), []byte("to")) }},
	{class: LayoutInvalid, damage: func(w *world, x *tree) {
		w.edit(x.hole, func(in *mdt.Inode) { in.Attr.Layout.StripeSize = 1000 })
	}},
	{class: LayoutOST, damage: func(w *world, x *tree) { w.edit(x.hole, func(in *mdt.Inode) { in.Attr.Layout.OST[0] = 9 }) }, stays: true},
	{class: EpochDamaged, damage: func(w *world, x *tree) {
		w.edit(x.file, func(in *mdt.Inode) { in.Opens, in.Opener = 1, wire.ClientID{7} })
		w.put(epochKey(x.file, wire.ClientID{7}), []byte("bad"))
	}},
	{class: EpochStray, damage: func(w *world, x *tree) {
		w.put(epochKey(x.fifo, wire.ClientID{7}), be.AppendUint64([]byte{1}, 5))
	}},
	{class: EpochStray, name: "last", damage: func(w *world, x *tree) {
		w.put(epochKey(wire.FID{Seq: 0xfff0, OID: 2}, wire.ClientID{7}), be.AppendUint64([]byte{1}, 5))
	}},
	{class: EpochCount, damage: func(w *world, x *tree) {
		w.edit(x.file, func(in *mdt.Inode) { in.Opens, in.Opener, in.Attr.Size = 1, wire.ClientID{7}, 99 })
	}, after: wantFile("d/file", 1000)},
	{class: EpochCount, name: "record only", damage: func(w *world, x *tree) {
		w.put(epochKey(x.file, wire.ClientID{7}), be.AppendUint64([]byte{1}, 5))
	}},
	{class: LogDamaged, damage: func(w *world, x *tree) { w.put(logKey(77), []byte("bad")) }},
	{class: LogUnlinkLive, damage: func(w *world, x *tree) {
		w.repairs(func(r *mdt.Repair) {
			r.PutLog(&mdt.LogRec{ID: 77, Kind: mdt.LogUnlink, FID: x.file, Layout: wire.Layout{StripeSize: 1 << 16, Count: 1}})
		})
	}, after: wantFile("d/file", 1000)},
	{class: LogTruncateStray, damage: func(w *world, x *tree) {
		w.repairs(func(r *mdt.Repair) {
			r.PutLog(&mdt.LogRec{ID: 77, Kind: mdt.LogTruncate, FID: wire.FID{Seq: 2, OID: 1 << 20}, Layout: wire.Layout{StripeSize: 1 << 16, Count: 1}})
		})
	}},
	{class: LogLayout, damage: func(w *world, x *tree) {
		w.repairs(func(r *mdt.Repair) {
			r.PutLog(&mdt.LogRec{ID: 77, Kind: mdt.LogTruncate, FID: x.striped, Size: 300 << 10, Layout: wire.Layout{StripeSize: 1 << 16, Count: 1}})
		})
	}},
	{class: ReplyDamaged, damage: func(w *world, x *tree) {
		w.put(target.AppendReplyKey(nil, 0, [16]byte{1}, 0), []byte("bad"))
	}},
	{class: ReplyTransno, damage: func(w *world, x *tree) {
		k := target.AppendReplyKey(nil, 0, [16]byte{1}, 0)
		rec, err := target.DecodeRecord(w.value(k))
		if err != nil {
			w.t.Fatal(err)
		}
		rec.Transno += 1 << 40
		w.put(k, target.AppendRecord(nil, &rec))
	}},
	{class: LockDamaged, damage: func(w *world, x *tree) {
		k, v := w.lockRecord(x.file)
		v[len(v)/2] ^= 1
		w.put(k, v)
	}, stays: true, after: func(t *testing.T, w *world, x *tree) {
		w.start() // mends it, and knows that a lock is lost
		req := wire.Request{Header: op(wire.OpLockService), Lock: &wire.LockArgs{}}
		var rep wire.Reply
		w.fs.Call(context.Background(), client.Owner{VIP: 1}, &req, &rep)
		if rep.Status != wire.OK || !rep.Lock.Service.Damaged {
			t.Errorf("%v, lock service %+v", rep.Status, rep.Lock)
		}
		w.stop(true, true)
		if r := w.check(false); r.ErrorsFound != 0 {
			t.Error(text(r))
		}
	}},
	{class: LockDamaged, name: "key", damage: func(w *world, x *tree) { w.put([]byte("kz"), []byte{1}) }, stays: true},
	{class: LockStray, damage: func(w *world, x *tree) {
		w.start()
		w.lock(x.link2, 0, 9)
		w.stop(true, true)
		k, v := w.lockRecord(x.link2)
		w.start()
		w.call(wire.Request{Header: op(wire.OpRemove), FID: x.d, Name: []byte("a")})
		w.call(wire.Request{Header: op(wire.OpRemove), FID: x.sub, Name: []byte("b")})
		w.call(wire.Request{Header: op(wire.OpRemove), FID: x.deep, Name: []byte("c")})
		w.stop(true, true)
		w.put(k, v)
	}},
	{class: ClientDamaged, damage: func(w *world, x *tree) { w.put(metaKey('c', wire.ClientID{9}), []byte("bad")) },
		stays: true, after: wantFence},
	{class: FenceDamaged, damage: func(w *world, x *tree) {
		w.put(metaKey('f', wire.ClientID{9}), flip(mdt.AppendFence(nil, &mdt.FenceRec{Tenure: 1 << 32, OSTs: []uint16{1}}), 5))
	}, stays: true, after: wantFence},
	{class: TargetDamaged, damage: func(w *world, x *tree) { w.put([]byte("mr"), []byte("bad")) }},
	{class: SlotDamaged, damage: func(w *world, x *tree) {
		r := recov.SlotRecord{Client: wire.ClientID{9}, Slot: 1, XID: 5, Transno: 6}
		w.put(append(append([]byte{keySlot}, r.Client[:]...), 0, 2), r.Append(nil))
	}},
	{class: VIPDamaged, damage: func(w *world, x *tree) { w.put([]byte("mv\x00\x00\x00\x01"), []byte("bad")) }},
	{class: ObjectOrphan, damage: func(w *world, x *tree) {
		w.ostDo(0, wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: wire.FID{Seq: 2, OID: 1 << 20}, Bulk: []byte("data"), Stable: wire.FileSync})
	}, after: func(t *testing.T, w *world, x *tree) {
		if names, err := w.ofs[0].ReadDir(asideDir); err != nil || len(names) != 1 {
			t.Error("not set aside:", err, names)
		}
	}},
	{class: ObjectOrphan, name: "empty", damage: func(w *world, x *tree) {
		f := wire.FID{Seq: 2, OID: 1 << 20}
		w.ostDo(0, wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: f, Bulk: []byte("data"), Stable: wire.FileSync})
		w.ostDo(0, wire.Request{Header: wire.Header{Op: wire.OpPunch, Flags: wire.FlagWaitCommit}, FID: f})
	}, after: func(t *testing.T, w *world, x *tree) {
		if _, err := w.ofs[0].ReadDir(asideDir); err != unix.ENOENT {
			t.Error("an empty object was kept:", err)
		}
	}},
	{class: ObjectOrphan, name: "segments", damage: func(w *world, x *tree) {
		w.ostDo(1, wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: wire.FID{Seq: 2, OID: 1 << 20}, Bulk: make([]byte, 600<<10), Stable: wire.FileSync})
	}, after: func(t *testing.T, w *world, x *tree) {
		if names, err := w.ofs[1].ReadDir(asideDir); err != nil || len(names) != 2 {
			t.Error("not set aside:", err, names)
		}
	}},
	{class: ObjectMisplaced, damage: func(w *world, x *tree) {
		w.ostDo(1-w.where(x.file, 0), wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: x.file, Bulk: []byte("data"), Stable: wire.FileSync})
	}, after: wantFile("d/file", 1000)},
	{class: ObjectMisplaced, name: "stripe", damage: func(w *world, x *tree) {
		w.ostDo(w.where(x.file, 0), wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: x.file, Stripe: 3, Bulk: []byte("data"), Stable: wire.FileSync})
	}, after: wantFile("d/file", 1000)},
	{class: ObjectDamaged, damage: func(w *world, x *tree) {
		i := w.where(x.file, 0)
		p := w.objPath(i, x.file, 0)
		writeFile(w.t.(*testing.T), w.ofs[i], p, flip(readAll(w.t.(*testing.T), w.ofs[i], p)[:64], 20), 0)
	}, after: wantFile("d/file", 0)},
	{class: ObjectName, damage: func(w *world, x *tree) { writeFile(w.t.(*testing.T), w.ofs[0], "o/00/core", []byte("x"), 0) }},
	{class: ObjectMissing, damage: func(w *world, x *tree) {
		i := w.where(x.file, 0)
		if err := w.ofs[i].Remove(w.objPath(i, x.file, 0)); err != nil {
			w.t.Fatal(err)
		}
	}, after: wantFile("d/file", 0)},
	{class: ObjectUnrecorded, damage: func(w *world, x *tree) { w.edit(x.file, func(in *mdt.Inode) { in.HadData = false }) }},
	{class: SizeWrong, damage: func(w *world, x *tree) { w.edit(x.striped, func(in *mdt.Inode) { in.Attr.Size = 300<<10 - 1 }) },
		after: wantFile("d/sub/striped", 300<<10)},
}

func metaKey(kind byte, id wire.ClientID) []byte { return append([]byte{keyMeta, kind}, id[:]...) }

// wantFence: the next start mends the records, and has the client fenced.
func wantFence(t *testing.T, w *world, x *tree) {
	w.start()
	f := w.mdt.PendingFences()
	if len(f) != 1 || f[0].ID != (wire.ClientID{9}) || f[0].Tenure>>32 == 0 || len(f[0].OSTs) != 2 {
		t.Errorf("fences: %+v", f)
	}
	w.stop(true, true)
	if r := w.check(false); r.ErrorsFound != 0 {
		t.Error(text(r))
	}
}

func state(w *world) mdt.State {
	s, err := mdt.DecodeState(w.value([]byte("mt")))
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func epochKey(f wire.FID, c wire.ClientID) []byte { return append(f.Append([]byte{keyEpoch}), c[:]...) }
func logKey(id uint64) []byte                     { return be.AppendUint64([]byte{keyLog}, id) }
func fixSize(in *mdt.Inode)                       { in.Attr.Size, in.Attr.Used = dirSize(in.Entries), dirSize(in.Entries) }

// secondParent enters a directory into another one.
func secondParent(w *world, dir, child wire.FID) {
	w.edit(dir, func(in *mdt.Inode) {
		ent := mdt.Entry{FID: child, Type: wire.TypeDir, Cookie: in.NextCookie}
		in.NextCookie++
		in.Entries++
		in.Attr.Nlink++
		fixSize(in)
		w.repairs(func(r *mdt.Repair) { r.PutName(dir, []byte("again"), ent) })
	})
}

// unenter takes an entry out of a directory.
func unenter(w *world, dir wire.FID, name string) {
	ent := w.entry(dir, name)
	w.repairs(func(r *mdt.Repair) {
		r.DeleteName(dir, []byte(name))
		r.DeleteCookie(dir, ent.Cookie)
	})
	w.edit(dir, func(in *mdt.Inode) {
		in.Entries--
		if ent.Type == wire.TypeDir {
			in.Attr.Nlink--
		}
		fixSize(in)
	})
}

// lostName marks the place of an orphan's name in a path.
func lostName(f func(*tree) wire.FID) string {
	lostNames = append(lostNames, f)
	return fmt.Sprintf("lost+found/%%%d%%", len(lostNames)-1)
}

var lostNames []func(*tree) wire.FID

func wantFile(path string, size uint64) func(*testing.T, *world, *tree) {
	return func(t *testing.T, w *world, x *tree) {
		t.Helper()
		for i, f := range lostNames {
			path = strings.Replace(path, fmt.Sprintf("%%%d%%", i), fmt.Sprintf("#%x-%x", f(x).Seq, f(x).OID), 1)
		}
		w.start()
		defer w.stop(true, true)
		a, st := w.fs.Resolve(context.Background(), wire.RootFID, path)
		if st != wire.OK || a.Size != size {
			t.Errorf("%s: %v, size %d, want %d", path, st, a.Size, size)
		}
	}
}

func wantDir(path string) func(*testing.T, *world, *tree) { return wantFile(path, 4096) }

func TestDamage(t *testing.T) {
	covered := map[Class]bool{}
	for _, d := range damages {
		covered[d.class] = true
		name := string(d.class)
		if d.name != "" {
			name += "/" + d.name
		}
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			x := w.build()
			w.stop(true, true)
			d.damage(w, &x)
			r := w.check(false)
			if len(r.Classes) != 1 || r.Classes[d.class].Found == 0 || r.ErrorsLeft == 0 || r.ExitCode() != ExitFindings {
				t.Fatalf("want %s only:\n%s", d.class, text(r))
			}
			r = w.check(true)
			if d.stays {
				if r.ErrorsLeft == 0 || r.ExitCode() != ExitFindings || r.Rounds != 1 {
					t.Fatalf("repaired what must stay:\n%s", text(r))
				}
				if d.after != nil {
					d.after(t, w, &x)
				}
				return
			}
			if r.ErrorsLeft != 0 || r.Classes[d.class].Repaired == 0 || r.ExitCode() != ExitClean {
				t.Fatalf("repair:\n%s", text(r))
			}
			if again := w.check(false); again.ErrorsFound != 0 {
				t.Fatalf("after the repair\n%s\nis left:\n%s", text(r), text(again))
			}
			if d.after != nil {
				d.after(t, w, &x)
			}
			// The targets start and work, and what they do is in order.
			w.start()
			a, st := w.fs.Resolve(context.Background(), wire.RootFID, "")
			if st != wire.OK {
				t.Fatal("root:", st)
			}
			w.create(a.FID, "after", 10)
			w.stop(true, true)
			if again := w.check(false); again.ErrorsFound != 0 {
				t.Fatalf("after work on the repaired store:\n%s", text(again))
			}
		})
	}
	for _, c := range []Class{
		SuperblockDamaged, SuperblockSequence, StateDamaged, StateTransno, StateInodes, KeyUnknown, InodeDamaged, InodeVersion,
		RootMissing, DirInodeMissing, EntryDamaged, EntryName, EntryNotDir, EntryDangling, EntryType, EntryCookie, CookieDamaged,
		CookieMismatch, CookieEntry, CookieRange, DirParents, DirParent, DirCycle, DirEntries, LinkCount, Orphan, SymlinkMissing,
		SymlinkStray, SymlinkSize, LayoutInvalid, LayoutOST, EpochDamaged, EpochStray, EpochCount, LogDamaged, LogUnlinkLive,
		LogTruncateStray, LogLayout, LockDamaged, LockStray, ReplyDamaged, ReplyTransno, ClientDamaged, FenceDamaged, TargetDamaged,
		SlotDamaged, VIPDamaged, ObjectOrphan, ObjectMisplaced, ObjectDamaged, ObjectName, ObjectMissing, ObjectUnrecorded, SizeWrong,
	} {
		if !covered[c] {
			t.Errorf("no damage for %s", c)
		}
	}
}

// TestRandomDamage flips bits in random records: never a panic, never an
// error of the check, and a repair leaves a store without findings that starts.
func TestRandomDamage(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	seed := uint64(20240607)
	if v := os.Getenv("BATON_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	base := newWorld(t)
	base.build()
	base.stop(true, true)
	var keys, vals [][]byte
	base.raw(func(e *local.Pebble) {
		it, err := e.NewIter(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer it.Close()
		for ok := it.First(); ok; ok = it.Next() {
			keys, vals = append(keys, bytes.Clone(it.Key())), append(vals, bytes.Clone(it.Value()))
		}
	})
	caught := 0
	for i := range rounds {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		w := newWorld(t)
		w.build()
		w.stop(true, true)
		var what []string
		for range 1 + rng.IntN(4) {
			n := rng.IntN(len(keys))
			k, v := keys[n], bytes.Clone(vals[n])
			switch rng.IntN(6) {
			case 0:
				w.put(k, nil)
				what = append(what, fmt.Sprintf("delete %x", k))
			case 1:
				k2 := bytes.Clone(k)
				k2[rng.IntN(len(k2))] ^= 1 << rng.IntN(8)
				w.put(k, nil, k2, v)
				what = append(what, fmt.Sprintf("key %x becomes %x", k, k2))
			default:
				if len(v) == 0 {
					continue
				}
				at := rng.IntN(len(v))
				v[at] ^= 1 << rng.IntN(8)
				w.put(k, v)
				what = append(what, fmt.Sprintf("key %x byte %d", k, at))
			}
		}
		fail := func(f string, a ...any) {
			t.Helper()
			t.Fatalf("seed %d round %d %q: %s", seed, i, what, fmt.Sprintf(f, a...))
		}
		r, err := w.tryCheck(false)
		if err != nil {
			fail("check: %v", err)
		}
		if r.ErrorsFound > 0 {
			caught++
		}
		fixed, err := w.tryCheck(true)
		if err != nil {
			fail("repair: %v", err)
		}
		again := w.check(false)
		// What names an OST that is not there, and what the next start has to see, is
		// not repaired.
		left := again.ErrorsFound
		for _, c := range []Class{LayoutOST, LockDamaged, ClientDamaged, FenceDamaged} {
			left -= again.Classes[c].Found
		}
		if left != 0 || r.ErrorsFound > 0 && fixed.ErrorsFound == 0 {
			fail("before\n%s\nrepair\n%s\nafter\n%s", text(r), text(fixed), text(again))
		}
		w.start()
		w.stop(true, true)
	}
	if caught < rounds/3 {
		t.Errorf("only %d of %d damages were noticed", caught, rounds)
	}
}

// TestTable checks the compact table against a map.
func TestTable(t *testing.T) {
	var tb table
	rng := rand.New(rand.NewPCG(1, 2))
	var ids []uint64
	for id := uint64(1); len(ids) < 3*chunkNodes+5; id += 1 + uint64(rng.IntN(5)) {
		tb.add(node{id: id})
		ids = append(ids, id)
	}
	have := map[uint64]int{}
	for i, id := range ids {
		have[id] = i
	}
	for range 100000 {
		id := rng.Uint64N(ids[len(ids)-1] + 10)
		n, i := tb.find(id)
		want, ok := have[id]
		if ok != (n != nil) || ok && (i != want || n.id != id || tb.at(i) != n) {
			t.Fatalf("id %d: %v %d, want %d %v", id, n, i, want, ok)
		}
	}
	if tb.len() != len(ids) {
		t.Error(tb.len())
	}
}
