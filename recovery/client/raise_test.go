package client

import (
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/wire"
)

// raises records to whom an epoch is sent, in order, and lets a test answer.
func (b *bed) raises(answer func(ost bool, n int) wire.Status) func() string {
	var mu sync.Mutex
	var sent []string
	b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
		if req.Op != wire.OpSetVIPEpoch {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		ost := req.Flags&wire.FlagNoWait != 0
		name := "mdt"
		if ost {
			name = "ost"
		}
		sent = append(sent, name)
		rep.Status = answer(ost, len(sent))
		return rep.Status != wire.OK
	})
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return strings.Join(sent, " ")
	}
}

// All targets are asked at once. An OST that was away while the MDT did not have the
// epoch yet is asked once more: it may have started, and have learnt the old one.
func TestRaiseEpochAsksAgain(t *testing.T) {
	b := newBed(t, 2, Options{})
	o := Owner{VIP: 1, Epoch: 2}
	sent := b.raises(func(bool, int) wire.Status { return wire.OK })
	if err := b.fs.RaiseEpoch(ctx, o); err != nil || sent() != "ost ost mdt" {
		t.Errorf("%v; asked: %s", err, sent())
	}
	// As if they were on other nodes: there they may be away.
	for _, c := range b.fs.osts {
		c.im = &imp.Import{}
	}
	defer func() {
		for _, c := range b.fs.osts {
			c.im = nil
		}
	}()
	o.Epoch = 3
	sent = b.raises(func(_ bool, n int) wire.Status {
		if n == 1 {
			return wire.ErrTargetDown
		}
		return wire.OK
	})
	if err := b.fs.RaiseEpoch(ctx, o); err != nil || sent() != "ost ost mdt ost" {
		t.Errorf("%v; asked: %s", err, sent())
	}
	b.setHook(nil)
	for i, x := range b.osts {
		req := wire.Request{Header: wire.Header{Op: wire.OpSetVIPEpoch, VIP: 1, VIPEpoch: 2}}
		b.fs.header(Owner{VIP: 1, Epoch: 2}, &req)
		var rep wire.Reply
		if err := wire.InProc(x).Call(ctx, &req, &rep); err != nil || rep.Status != wire.ErrStaleVIP {
			t.Errorf("OST %d takes the old epoch: %v, %v", i, err, rep.Status)
		}
	}
	// One that stays away learns of it when it starts.
	o.Epoch = 4
	sent = b.raises(func(ost bool, _ int) wire.Status {
		if ost {
			return wire.ErrTargetDown
		}
		return wire.OK
	})
	if err := b.fs.RaiseEpoch(ctx, o); err != nil || sent() != "ost ost mdt ost ost" {
		t.Errorf("%v; asked: %s", err, sent())
	}
}

// Without the MDT, and without an OST that is there, the epoch is not in force.
func TestRaiseEpochFails(t *testing.T) {
	b := newBed(t, 2, Options{})
	for _, ost := range []bool{false, true} {
		b.raises(func(to bool, _ int) wire.Status {
			if to == ost {
				return wire.ErrIO
			}
			return wire.OK
		})
		if err := b.fs.RaiseEpoch(ctx, Owner{VIP: 1, Epoch: 1}); !errors.Is(err, wire.ErrIO) {
			t.Errorf("OSTs fail: %v: %v", ost, err)
		}
	}
	b.setHook(nil)
	if err := b.fs.RaiseEpoch(ctx, Owner{VIP: 1, Epoch: 5}); err != nil {
		t.Fatal(err)
	}
	if err := b.fs.RaiseEpoch(ctx, Owner{VIP: 1, Epoch: 4}); !errors.Is(err, wire.ErrStaleVIP) {
		t.Errorf("an old epoch: %v", err)
	}
}
