package ost

import (
	"encoding/hex"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// oldSuper is what the first version has written, while it ran.
var oldSuper = unhex("42544e4f535400010100000003002800aabb000000000000000000000000000007000000000000000000000500000000a00f00000000000006000000626f6f742d310200000002000000000000000500000000000000" +
	"02000000010000000a0000000000000004000000140000000000000001000000090000000000000000000000000000004d00000000000000e06a0932")

// oldHeader is that of an object which the first version has written: version 30,
// log id 6.
var oldHeader = unhex("42544e4f424a000101000000000000000000000000000002000000090000000000000000000000001e000000000000000600000000000000" +
	"64000000000000000000000000000000000064a7b3b6e00d000064a7b3b6e00d000064a7b3b6e00d00000000000000000000000000000000000000000000000000000000cafcca9e")

func TestUpgradeOfFormat1(t *testing.T) {
	s, err := decodeSuper(oldSuper)
	if err != nil {
		t.Fatal(err)
	}
	c := wire.ClientID{9}
	want := &super{
		Index: 3, UUID: [16]byte{0xaa, 0xbb}, SegShift: 40, Instance: 7, Began: true, BootID: "boot-1", Ceiling: 5 << 24, LastCommitted: 4000,
		Lost: []uint64{2, 5}, Epochs: map[uint32]uint64{1: 10, 4: 20}, Fences: map[wire.ClientID]uint64{},
		Clients: map[wire.ClientID]recov.ClientRecord{c: {Client: c, Gen: 77, Local: true}},
	}
	if d := cmp.Diff(want, s); d != "" {
		t.Fatal(d)
	}
	for _, x := range []struct {
		name, boot string
		end        uint64
	}{{"same kernel", "boot-1", 5 << 24}, {"power failed", "boot-2", 4000}} {
		t.Run(x.name, func(t *testing.T) {
			m := objfs.NewMem(newClock().now)
			g := open(t, Options{FS: m, Index: 3})
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			put(t, m, superFile, oldSuper)
			k := objKey{fid: wire.FID{Seq: 2, OID: 9}}
			put(t, m, k.path(), append(append(oldHeader, make([]byte, headerSize-headerLen)...), "data"...))
			g = openOnly(t, Options{FS: m, Index: 3, BootID: x.boot})
			tab, err := g.Table()
			if err != nil {
				t.Fatal(err)
			}
			if tab.Instance != 8 || tab.Transno != x.end || tab.Target != (recov.TargetRecord{}) || len(tab.Clients) != 1 || !tab.Clients[0].Local || tab.Clients[0].Gen != 77 {
				t.Fatalf("%+v", tab)
			}
			g.Begin(0)
			if st := call(g, &wire.Request{Header: wire.Header{Op: wire.OpWrite, Client: c, ClientGen: 77, VIP: 1, VIPEpoch: 9}, FID: k.fid, Bulk: []byte("x")}).Status; st != wire.ErrStaleVIP {
				t.Fatal(st)
			}
			// A truncate that was executed before the upgrade is not executed again.
			if rep := punch(g, k.fid, 1, 6); rep.Status != wire.OK || rep.Obj.Size != 4 || rep.Transno <= 5<<24 {
				t.Fatalf("%+v", rep)
			}
			if rep := write(g, k.fid, 4, []byte("more"), wire.FileSync); rep.Status != wire.OK || rep.Obj.Size != 8 {
				t.Fatalf("%+v", rep)
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err := readSuper(m); err != nil || s.Instance != 8 || !s.Clean || !s.Began {
				t.Fatalf("%+v %v", s, err)
			}
		})
	}
}

// put makes a file with the given content.
func put(t *testing.T, m *objfs.Mem, path string, b []byte) {
	t.Helper()
	fd, err := m.Open(path, objfs.ReadWrite|objfs.Create|objfs.Trunc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Pwrite(fd, b, 0); err != nil {
		t.Fatal(err)
	}
	m.Close(fd)
}
