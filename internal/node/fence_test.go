package node

import (
	"testing"

	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TestDamagedClientHoldsNothing: a client whose record is unreadable counts as
// evicted. Nobody has to be told when everybody was in the process that died, so
// its IO epoch is closed at the start.
func TestDamagedClientHoldsNothing(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	a := create(t, n, "f")
	stop(t, n)
	e, err := local.OpenPebble(c.MDT.Dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	in, err := mdt.ReadInode(e, a.FID)
	if err != nil {
		t.Fatal(err)
	}
	id := wire.ClientID{9}
	in.Opens, in.Opener, in.HadData = 1, id, true
	b := e.NewBatch()
	b.Set(a.FID.Append([]byte{'i'}), mdt.AppendInode(nil, in))
	b.Set(append(a.FID.Append([]byte{'e'}), id[:]...), []byte{1, 0, 0, 0, 0, 0, 0, 0, 1})
	b.Set(append([]byte("mc"), id[:]...), []byte("bad"))
	if err := e.Apply(b); err != nil {
		t.Fatal(err)
	}
	if err := e.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	n = start(t, c)
	recovered(t, n)
	if f := n.targets.mdt.Body().PendingFences(); len(f) != 0 {
		t.Errorf("fences: %+v", f)
	}
	if a := attr(t, n, a.FID); a.EpochOpen || a.Size != 0 {
		t.Errorf("%+v", a)
	}
}
