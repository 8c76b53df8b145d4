package nfsd

import (
	"net/netip"
	"testing"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/recovery/wire"
)

func TestLockFile(t *testing.T) {
	b := newBed(t, 1)
	dir := b.mount("/data")
	root := b.root()
	file := root.mustCreate(dir, "f")
	gone := root.mustCreate(dir, "gone")
	sub := root.mkdir(dir, "d", 0o755).FH
	root.remove(dir, "gone")
	written := root.mustCreate(dir, "w")
	root.write(written, 0, "open epoch", wire.Unstable)

	at := func(addr string) *sunrpc.Call {
		return &sunrpc.Call{Remote: netip.MustParseAddrPort(addr)}
	}
	reexport := func(fh []byte, path string) []byte {
		h, err := b.srv.cfg.Codec.Decode(fh)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range b.srv.Exports().Exports() {
			if e.Path == path {
				h.FSID = e.FSID
			}
		}
		var out [48]byte
		b.srv.cfg.Codec.Encode(h, &out)
		return out[:]
	}
	generation := func(fh []byte) []byte {
		h, _ := b.srv.cfg.Codec.Decode(fh)
		h.Generation++
		var out [48]byte
		b.srv.cfg.Codec.Encode(h, &out)
		return out[:]
	}
	unknown := func(fh []byte) []byte {
		h, _ := b.srv.cfg.Codec.Decode(fh)
		h.FSID = 0xdead
		var out [48]byte
		b.srv.cfg.Codec.Encode(h, &out)
		return out[:]
	}
	want, err := b.srv.cfg.Codec.Decode(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		fh   []byte
		from string
		st   wire.Status
	}{
		{"file", file, "127.0.0.1:700", wire.OK},
		{"high port, secure export", reexport(file, "/secure"), "127.0.0.1:50000", wire.OK},
		{"read-only export", reexport(file, "/ro"), "127.0.0.1:50000", wire.OK},
		{"unlinked", gone, "127.0.0.1:700", wire.ErrStale},
		{"directory", sub, "127.0.0.1:700", wire.ErrInval},
		{"other generation", generation(file), "127.0.0.1:700", wire.ErrStale},
		{"no such export", unknown(file), "127.0.0.1:700", wire.ErrStale},
		{"garbage", []byte("not a handle"), "127.0.0.1:700", wire.ErrBadHandle},
		{"empty", nil, "127.0.0.1:700", wire.ErrBadHandle},
	} {
		fid, st := b.a.LockFile(at(c.from), c.fh)
		if st != c.st || st == wire.OK && fid != want.FID {
			t.Errorf("%s: %v %v, want %v", c.name, fid, st, c.st)
		}
	}
	if _, st := b.a.LockFile(at("127.0.0.1:700"), written); st != wire.OK {
		t.Errorf("a file that is being written: %v", st)
	}

	// An export that the client may not use does not become lockable.
	tab, err := exports.Parse("exports", []byte("/data 192.0.2.1(rw,insecure,no_root_squash,dir=/data)\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.srv.SetExports(t.Context(), tab); err != nil {
		t.Fatal(err)
	}
	if _, st := b.a.LockFile(at("127.0.0.1:700"), file); st == wire.OK {
		t.Error("a client without the export may lock")
	}
	if _, st := b.a.LockFile(at("192.0.2.1:700"), file); st != wire.OK {
		t.Errorf("the client that has the export: %v", st)
	}
}
