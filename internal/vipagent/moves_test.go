package vipagent

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/failover"
)

// notifying is a Unit whose clients are long to tell.
type notifying struct {
	plain
	began chan struct{}
}

func (n *notifying) Notify(ctx context.Context) (failover.Notified, error) {
	close(n.began)
	<-ctx.Done()
	return failover.Notified{}, ctx.Err()
}

// An address that somebody takes while this node still tells clients that it has it is
// given up at once, and not announced any more. An order to move it does not cut that short.
func TestFencedWhileNotifying(t *testing.T) {
	for what, fence := range map[string]func(*bed) bool{
		"a beat": func(b *bed) bool {
			v := b.vip()
			b.a.Superseded(v.Index, v.Epoch+1)
			return true
		},
		"the registry": func(b *bed) bool {
			v := b.vip()
			if err := b.reg.Abandoned(b.ctx, v.Index, v.Epoch); err != nil {
				b.t.Error(err)
			}
			b.assign("b")
			if _, err := b.reg.Stored.Take(b.ctx, v.Index, b.vip().MoveID); err != nil {
				b.t.Error(err)
			}
			b.a.view(b.ctx) // as a beat would have it asked
			return true
		},
		"an order": func(b *bed) bool {
			b.assign("b")
			b.a.view(b.ctx)
			return false
		},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				u := &notifying{plain: plain{changed: make(chan struct{}, 1)}, began: make(chan struct{})}
				b.a.o.New = func(netip.Addr) Unit { return u }
				b.start()
				b.assign("a")
				b.a.view(b.ctx)
				<-u.began
				announced := strings.Count(b.network.Lines(), "announce")
				start := time.Now()
				if !fence(b) {
					b.become(Serving)
					if d := time.Since(start); d < time.Second {
						t.Errorf("clients were told for %v only", d)
					}
					return
				}
				b.until("the address is gone", func() bool { return !b.has() })
				if d := time.Since(start); d > 500*time.Millisecond {
					t.Errorf("it took %v", d)
				}
				if n := strings.Count(b.network.Lines(), "announce"); n != announced {
					t.Errorf("announced %d times, was %d", n, announced)
				}
			})
		})
	}
}
