package vipagent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/vip"
)

// crowd is a Unit with connections.
type crowd struct {
	plain
	conns []vip.Conn
}

func (c *crowd) Conns() []vip.Conn { return c.conns }

// Of an address with many connections all are told, in messages that have room for them.
func TestManyConns(t *testing.T) {
	for _, n := range []int{maxPart, maxPart + 1, maxConns} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			at := netip.MustParseAddr("2001:db8:ffff:ffff:ffff:ffff:ffff:1")
			u := &crowd{plain: plain{changed: make(chan struct{}, 1)}}
			for i := range n {
				b := at.As16()
				b[12], b[13] = byte(i>>8), byte(i)
				u.conns = append(u.conns, vip.Conn{Local: netip.AddrPortFrom(at, 20490), Remote: netip.AddrPortFrom(netip.AddrFrom16(b), 65535)})
			}
			to := New(Options{Node: "b"})
			asked, fail := 0, 0
			from := New(Options{Node: "a", Others: []string{"b"}, Ask: func(ctx context.Context, _, method string, args, result any) error {
				if asked++; asked == fail {
					return context.DeadlineExceeded
				}
				raw, err := json.Marshal(args)
				if err != nil || len(raw) > wire.MaxData {
					return fmt.Errorf("%d bytes are no message: %w", len(raw), err)
				}
				res, err := to.HandleConns(ctx, "a", raw)
				if err == nil {
					*result.(*connsResult) = res.(connsResult)
				}
				return err
			}})
			k := newKeeper(from, &mgs.VIP{Index: 1, Addr: at})
			tell := &teller{k: k, u: u, epoch: 7}
			if n > maxPart {
				fail = 2
				if know := tell.whole(t.Context(), []string{"b"}); len(know) != 0 {
					t.Error("who has got a part is said to have all")
				}
			}
			if know := tell.whole(t.Context(), []string{"b"}); len(know) != 1 {
				t.Fatal("nobody has the list")
			}
			if l := to.book.known(1, 7); len(l) != n {
				t.Errorf("%d connections of %d are known", len(l), n)
			}
		})
	}
}

// After a crash, whoever takes an address wakes clients that only another node knows
// of: the last owner died before it could tell a node that had just come back.
func TestConnsAreAskedFor(t *testing.T) {
	b := newBed(t)
	other := New(Options{Node: "c"})
	b.a.o.Others = []string{"b", "c"}
	b.a.o.Ask = func(ctx context.Context, node, method string, args, result any) error {
		if node != "c" || method != MethodKnown {
			return errors.New("away")
		}
		raw, err := json.Marshal(args)
		if err != nil {
			return err
		}
		res, err := other.HandleKnown(ctx, "a", raw)
		if err == nil {
			*result.(*knownResult) = res.(knownResult)
		}
		return err
	}
	// Node b serves the address, tells c, and dies.
	b.assign("b")
	v := b.vip()
	v, err := b.reg.Stored.Take(b.ctx, v.Index, v.MoveID)
	if err != nil {
		t.Fatal(err)
	}
	list := connsArgs{Index: v.Index, Epoch: v.Epoch, Seq: 1}
	want := map[vip.Conn]bool{}
	for i := range maxPart + 10 {
		r := netip.AddrPortFrom(addr.Next(), uint16(1000+i))
		list.Add = append(list.Add, told{2049, r})
		want[vip.Conn{Local: netip.AddrPortFrom(addr, 2049), Remote: r}] = true
	}
	if _, err := other.book.enter("b", &list); err != nil {
		t.Fatal(err)
	}
	b.assign("a")
	if err := b.reg.Abandoned(b.ctx, v.Index, v.Epoch); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.become(Serving)
	b.until("the clients are woken", func() bool {
		all := map[vip.Conn]bool{}
		for _, c := range b.net.Tickled() {
			all[c] = true
		}
		return maps.Equal(all, want)
	})
	// Of other periods of service nothing is known.
	raw, err := json.Marshal(knownArgs{Index: v.Index, Epoch: v.Epoch + 1})
	if err != nil {
		t.Fatal(err)
	}
	if res, err := other.HandleKnown(b.ctx, "a", raw); err != nil || len(res.(knownResult).Conns) != 0 {
		t.Errorf("%v, %v", res, err)
	}
}

// A node that was started anew knows no connections; it is told of them again though
// none has changed.
func TestConnsAreToldAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		remote := netip.AddrPortFrom(addr.Next(), 700)
		u := &crowd{plain: plain{changed: make(chan struct{}, 1)}, conns: []vip.Conn{{Local: netip.AddrPortFrom(addr, 2049), Remote: remote}}}
		var to atomic.Pointer[Agent]
		var asked atomic.Int32
		to.Store(New(Options{Node: "b"}))
		from := New(Options{Node: "a", Others: []string{"b"}, Ask: func(ctx context.Context, _, _ string, args, result any) error {
			asked.Add(1)
			raw, err := json.Marshal(args)
			if err != nil {
				return err
			}
			res, err := to.Load().HandleConns(ctx, "a", raw)
			if err == nil {
				*result.(*connsResult) = res.(connsResult)
			}
			return err
		}})
		tell := newKeeper(from, &mgs.VIP{Index: 1, Addr: addr}).startTeller(u, 7)
		defer tell.stop()
		want := []told{{2049, remote}}
		time.Sleep(10 * tellAgain)
		if l := to.Load().book.known(1, 7); !slices.Equal(l, want) {
			t.Errorf("%v, want %v", l, want)
		}
		if n := asked.Load(); n > 11 {
			t.Errorf("asked %d times", n)
		}
		to.Store(New(Options{Node: "b"}))
		time.Sleep(3 * tellAgain)
		if l := to.Load().book.known(1, 7); !slices.Equal(l, want) {
			t.Errorf("after a restart %v, want %v", l, want)
		}
	})
}
