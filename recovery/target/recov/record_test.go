package recov

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/wire"
)

func sampleRecords() (TargetRecord, ClientRecord, SlotRecord) {
	id := wire.ClientID{1, 2, 3, 15: 9}
	return TargetRecord{Instance: 7, Clean: true, Transno: 99},
		ClientRecord{Client: id, Gen: 3, Instance: 6, Local: true, FailedAt: 5},
		SlotRecord{Client: id, Gen: 3, Slot: MaxSlot, XID: 1 << 60, Transno: 98, Status: wire.ErrExist, Data: []byte("result")}
}

func TestRecords(t *testing.T) {
	tr, cr, sr := sampleRecords()
	encs := [][]byte{tr.Append(nil), cr.Append(nil), sr.Append(nil)}
	if !bytes.Equal(sr.Append([]byte("before")), append([]byte("before"), encs[2]...)) {
		t.Error("Append depends on what is in the buffer")
	}
	decode := []func([]byte) (any, error){
		func(b []byte) (any, error) { var r TargetRecord; err := r.Decode(b); return r, err },
		func(b []byte) (any, error) { var r ClientRecord; err := r.Decode(b); return r, err },
		func(b []byte) (any, error) { var r SlotRecord; err := r.Decode(b); return r, err },
	}
	for i, want := range []any{tr, cr, sr} {
		for k, dec := range decode {
			got, err := dec(encs[i])
			switch {
			case k == i && (err != nil || cmp.Diff(want, got) != ""):
				t.Errorf("record %d: %v %s", i, err, cmp.Diff(want, got))
			case k != i && !errors.Is(err, ErrRecordVersion):
				t.Errorf("record %d as %d: %v", i, k, err)
			}
		}
		// Each damaged bit and each shorter or longer form is found.
		for n := range encs[i] {
			for bit := range 8 {
				b := bytes.Clone(encs[i])
				b[n] ^= 1 << bit
				if _, err := decode[i](b); !errors.Is(err, ErrRecordDamaged) {
					t.Errorf("record %d, byte %d bit %d: %v", i, n, bit, err)
				}
			}
			if _, err := decode[i](encs[i][:n]); !errors.Is(err, ErrRecordDamaged) {
				t.Errorf("record %d cut to %d: %v", i, n, err)
			}
		}
		if _, err := decode[i](append(bytes.Clone(encs[i]), 0)); !errors.Is(err, ErrRecordDamaged) {
			t.Errorf("record %d with a byte more: %v", i, err)
		}
	}
	// A right checksum does not make a wrong length right.
	long := SlotRecord{Data: make([]byte, MaxResult+1)}
	if b := long.Append(nil); len(b) != MaxRecordSize {
		t.Errorf("longest record has %d bytes, want %d", len(b), MaxRecordSize)
	}
	bad := encs[2][: len(encs[2])-4 : len(encs[2])-4]
	bad = seal(append(bad, 'x'), 0)
	if _, err := decode[2](bad); !errors.Is(err, ErrRecordDamaged) {
		t.Errorf("slot record with a byte too many under a right checksum: %v", err)
	}
	v2 := seal([]byte{kindTarget, recVersion + 1}, 0)
	if _, err := decode[0](v2); !errors.Is(err, ErrRecordVersion) {
		t.Errorf("newer version: %v", err)
	}
}

func FuzzRecords(f *testing.F) {
	tr, cr, sr := sampleRecords()
	for _, b := range [][]byte{tr.Append(nil), cr.Append(nil), sr.Append(nil), nil} {
		f.Add(b, false)
		f.Add(b[:max(0, len(b)-4)], true)
	}
	f.Fuzz(func(t *testing.T, b []byte, sum bool) {
		if sum { // so that the fuzzer gets behind the checksum
			b = seal(bytes.Clone(b), 0)
		}
		var tr TargetRecord
		if tr.Decode(b) == nil && !bytes.Equal(tr.Append(nil), b) {
			t.Errorf("target record %x is not what it decodes to", b)
		}
		var cr ClientRecord
		if cr.Decode(b) == nil && !bytes.Equal(cr.Append(nil), b) {
			t.Errorf("client record %x is not what it decodes to", b)
		}
		var sr SlotRecord
		if sr.Decode(b) == nil && (!bytes.Equal(sr.Append(nil), b) || len(sr.Data) > MaxResult) {
			t.Errorf("slot record %x is not what it decodes to", b)
		}
	})
}
