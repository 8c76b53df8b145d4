package vipagent

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/vip"
)

// noted is a Unit that notes what is done to it.
type noted struct {
	plain
	commit func(context.Context) error
	mu     sync.Mutex
	did    []string
}

func (n *noted) note(s string) {
	n.mu.Lock()
	n.did = append(n.did, s)
	n.mu.Unlock()
}

func (n *noted) done() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.did)
}

func (n *noted) Commit(ctx context.Context) error {
	n.note("commit")
	return n.commit(ctx)
}

func (n *noted) Refuse(context.Context, failover.Refuse) error {
	n.note("refuse")
	return nil
}

func (n *noted) Close(_ context.Context, how failover.Closing) (failover.Closed, error) {
	n.note(string(how))
	return failover.Closed{}, nil
}

func (n *noted) Conns() []vip.Conn {
	return []vip.Conn{{Local: netip.AddrPortFrom(addr, 2049), Remote: netip.MustParseAddrPort("192.0.2.200:700")}}
}

// newNoted makes a bed whose unit notes, and whose other node takes connection lists.
func newNoted(t *testing.T, commit func(context.Context) error) (*bed, *noted) {
	b := newBed(t)
	u := &noted{plain: plain{changed: make(chan struct{}, 1)}, commit: commit}
	b.a.o.New = func(netip.Addr) Unit { return u }
	b.a.o.Ask = func(_ context.Context, _, _ string, args, result any) error {
		a := args.(*connsArgs)
		if a.Base == 0 && len(a.Add) == 1 {
			u.note("told")
		}
		raw, err := json.Marshal(connsResult{Seq: a.Seq})
		if err != nil {
			return err
		}
		return json.Unmarshal(raw, result)
	}
	return b, u
}

// What can be done before clients wait is done before: data are made durable, and after
// that, so that none is left out, the connections told. Both are repeated, or relied on,
// by the stages.
func TestPreparedWhileServed(t *testing.T) {
	b, u := newNoted(t, func(context.Context) error { return nil })
	b.start()
	b.assign("a")
	b.become(Serving)
	b.until("the connections are told", func() bool { return slices.Contains(u.done(), "told") })
	n := len(u.done())
	b.assign("")
	b.become(Absent)
	if got, want := u.done()[n:], []string{"commit", "told", "refuse", "commit", string(failover.Quiet)}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A newer owner ends what is done ahead, at once and even if the targets do not answer.
func TestFencedWhilePrepared(t *testing.T) {
	for name, commit := range map[string]func(ctx context.Context, quit chan struct{}){
		"heeds its context": func(ctx context.Context, _ chan struct{}) { <-ctx.Done() },
		"does not":          func(_ context.Context, quit chan struct{}) { <-quit },
	} {
		t.Run(name, func(t *testing.T) {
			began, quit := make(chan struct{}), make(chan struct{})
			b, u := newNoted(t, func(ctx context.Context) error {
				close(began)
				commit(ctx, quit)
				return context.Canceled
			})
			b.start()
			b.assign("a")
			b.become(Serving)
			v := b.vip()
			n := len(u.done())
			b.assign("")
			<-began
			b.a.Superseded(v.Index, v.Epoch+1)
			b.become(Absent)
			close(quit)
			got := slices.DeleteFunc(u.done()[n:], func(s string) bool { return s == "told" })
			if want := []string{"commit", "refuse", string(failover.Quiet)}; !slices.Equal(got, want) {
				t.Errorf("%v, want %v", got, want)
			}
		})
	}
}

// A successor that is long to take the connections is waited for, since clients are still
// served; nodes that only may be next are not waited for so long.
func TestLateSuccessor(t *testing.T) {
	for next, want := range map[string]failover.Closing{"b": failover.Quiet, "": failover.HalfClose} {
		t.Run(string(want), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, u := newNoted(t, func(context.Context) error { return nil })
				ask := b.a.o.Ask
				b.a.o.Ask = func(ctx context.Context, node, method string, args, result any) error {
					if wait(ctx, aheadTime-askTime); ctx.Err() != nil {
						return ctx.Err()
					}
					return ask(ctx, node, method, args, result)
				}
				b.start()
				b.assign("a")
				b.become(Serving)
				b.assign(next)
				if next != "" {
					if _, err := b.reg.SetReady(b.ctx, b.vip().Index, b.vip().MoveID); err != nil {
						t.Fatal(err)
					}
				}
				b.become(Absent)
				if l := u.done(); l[len(l)-1] != string(want) {
					t.Errorf("%v, want %s", l, want)
				}
			})
		})
	}
}
