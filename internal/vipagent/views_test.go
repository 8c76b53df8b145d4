package vipagent

import (
	"testing"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// Answers and views of the registry come by different ways: one that was on its way for
// long takes back nothing that is known.
func TestOldNews(t *testing.T) {
	b := newBed(t)
	index := b.vip().Index
	take := func(node string) mgs.VIP {
		b.assign(node)
		v, err := b.reg.Take(b.ctx, index, b.vip().MoveID)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	told := func(v mgs.VIP, do func(index uint32, epoch uint64) error) mgs.VIP {
		if err := do(v.Index, v.Epoch); err != nil {
			t.Fatal(err)
		}
		return b.vip()
	}
	stopped := func(i uint32, e uint64) error { return b.reg.Stopped(b.ctx, i, e) }
	abandoned := func(i uint32, e uint64) error { return b.reg.Abandoned(b.ctx, i, e) }
	ready := func(uint32, uint64) error {
		_, err := b.reg.SetReady(b.ctx, index, b.vip().MoveID)
		return err
	}
	var seen []mgs.VIP
	next := func(v mgs.VIP) { seen = append(seen, v) }
	next(b.vip())
	v := take("b")
	next(b.vip())
	b.assign("a")
	next(b.vip())
	next(told(v, ready))
	next(told(v, abandoned))
	next(told(v, stopped)) // its node was alive, and has ended it in order
	v = take("a")
	next(b.vip())
	next(told(v, stopped))
	for i := range seen {
		for j := range seen {
			if got := newer(&seen[i], &seen[j]); got != (j >= i) {
				t.Errorf("%d is newer than %d: %v\n%+v\n%+v", j, i, got, seen[j], seen[i])
			}
		}
	}
}

// A view that somebody has asked for may be older than what is known of addresses: those
// that it does not have may have been added since.
func TestViewFromBeforeAnAddress(t *testing.T) {
	b := newBed(t)
	b.assign("a")
	before, now := mgs.View{Rev: "before"}, b.vip()
	b.a.mu.Lock()
	k := b.a.keeper(&now)
	b.a.mu.Unlock()
	b.until("it serves", func() bool { return k.now() == Serving })
	b.a.apply(&before)        // what somebody has asked for
	asked := b.a.views.Load() // and what was on its way to the agent
	b.a.forget(&before, asked)
	if k.isGone() {
		t.Fatal("the address is taken for one that was removed")
	}
	b.a.forget(&before, asked+1)
	if !k.isGone() {
		t.Fatal("its removal is not noticed")
	}
	b.until("it is given up", func() bool { return k.now() == Absent })
	b.start()
	b.become(Serving)
}
