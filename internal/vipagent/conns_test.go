package vipagent

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"

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
			if l := to.book.conns(1, 7, at); len(l) != n {
				t.Errorf("%d connections of %d are known", len(l), n)
			}
		})
	}
}
