package vipagent

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/vip/viptest"
)

// mover is an agent as cluster managers' commands see it.
type mover struct{ *Agent }

func (mover) ReadyVIP(context.Context) error { return nil }

// A cluster manager that hears of a release in order starts the address elsewhere, by
// force. As long as the machine still has it, it hears of none, whichever release asks.
func TestReleaseOfStuckAddressFails(t *testing.T) {
	b := newBed(t)
	b.start()
	b.until("the address is known", func() bool { return b.a.find(addr) != nil })
	if _, err := b.a.TakeVIP(b.ctx, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe}); err != nil {
		t.Fatal(err)
	}
	b.net.Fail(viptest.Remove, errors.New("the kernel refuses"), 1<<20)
	for _, stage := range []string{vipctl.StageDrain, vipctl.StageFinish, vipctl.StageDrain} {
		// Longer than removing is tried, and muting.
		short, cancel := context.WithTimeout(b.ctx, 3*time.Second)
		r, err := b.a.ReleaseVIP(short, vipctl.ReleaseArgs{Addr: addr, Stage: stage})
		cancel()
		if err == nil {
			t.Errorf("%s: %+v, but the machine has the address", stage, r)
		} else if !strings.Contains(err.Error(), "still has the address") {
			t.Errorf("%s: %v", stage, err)
		}
	}
	// A cluster manager asks again and again; those who gave up take nobody's place.
	sock := filepath.Join(t.TempDir(), "s")
	ctl := control.NewServer(nil)
	vipctl.Register(ctl, mover{b.a})
	if err := ctl.Start(sock); err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	for range 40 {
		short, cancel := context.WithTimeout(b.ctx, 50*time.Millisecond)
		err := control.Do(short, sock, vipctl.CmdRelease, &vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageDrain}, nil)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	}
	for control.Do(b.ctx, sock, control.CmdPing, nil, nil) != nil { // the last ones may not have gone yet
		if b.ctx.Err() != nil {
			t.Fatal("ping is not answered after releases whose callers gave up")
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := b.a.ReleaseVIP(b.ctx, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageFinish})
		done <- err
	}()
	b.net.Fail(viptest.Remove, nil, 0)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if has, err := b.net.Has(addr); has || err != nil {
		t.Errorf("the machine has the address: %v %v", has, err)
	}
}

// While a node stops, a release lasts as long as the address is given up, a take is
// refused, and whoever is next hears of an orderly end.
func TestHooksWhileStopping(t *testing.T) {
	b := newBed(t)
	draining, let := make(chan struct{}), make(chan struct{})
	b.a.o.New = func(netip.Addr) Unit {
		return &plain{changed: make(chan struct{}, 1), drain: func(context.Context) {
			close(draining)
			<-let
		}}
	}
	b.start()
	b.until("the address is known", func() bool { return b.a.find(addr) != nil })
	take := vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe}
	if _, err := b.a.TakeVIP(b.ctx, take); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan bool, 1)
	go func() { stopped <- b.a.Stop(b.ctx) }()
	<-draining
	if _, err := b.a.TakeVIP(b.ctx, take); !errors.Is(err, errLeaving) {
		t.Errorf("take: %v", err)
	}
	short, cancel := context.WithTimeout(b.ctx, 100*time.Millisecond)
	defer cancel()
	if r, err := b.a.ReleaseVIP(short, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageDrain}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("released while the drain goes on: %+v, %v", r, err)
	}
	type released struct {
		r   vipctl.Result
		err error
	}
	done := make(chan released, 1)
	go func() {
		r, err := b.a.ReleaseVIP(b.ctx, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageFinish})
		done <- released{r, err}
	}()
	close(let)
	if x := <-done; x.err != nil || x.r.State != vipctl.Absent {
		t.Errorf("%+v", x)
	}
	if !<-stopped || !b.vip().Clean {
		t.Errorf("not given up in order: %+v", b.vip())
	}
	if has, err := b.net.Has(addr); has || err != nil {
		t.Errorf("the machine has the address: %v %v", has, err)
	}
}

// A cluster manager's new owner says that the last one is gone, which is slow to give the
// address up, but about it: it is left to end in order. One that is not about it, or does
// not answer, is declared gone.
func TestForceLeavesAnOrderlyEnd(t *testing.T) {
	for _, c := range []struct {
		name    string
		stops   bool
		answers bool
		crashed bool
	}{{"gives up", true, true, false}, {"serves on", false, true, true}, {"is silent", true, false, true}} {
		t.Run(c.name, func(t *testing.T) {
			b, next := newBed(t), newBed(t)
			draining, let := make(chan struct{}, 1), make(chan struct{})
			b.a.o.New = func(netip.Addr) Unit {
				return &plain{changed: make(chan struct{}, 1), drain: func(context.Context) {
					draining <- struct{}{}
					<-let
				}}
			}
			end := sync.OnceFunc(func() { close(let) })
			t.Cleanup(end) // before the agent's stop
			b.start()
			b.until("the address is known", func() bool { return b.a.find(addr) != nil })
			take := vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe}
			if _, err := b.a.TakeVIP(b.ctx, take); err != nil {
				t.Fatal(err)
			}
			epoch := b.vip().Epoch
			if c.stops {
				go b.a.Stop(b.ctx)
				<-draining
			}
			asked := make(chan struct{}, 8)
			next.reg, next.a.o.Registry = b.reg, b.reg
			next.a.o.Node, next.a.o.Net = "b", b.network.Machine("b")
			next.a.o.Ask = func(ctx context.Context, node, method string, args, result any) error {
				if method != MethodGivesUp || node != "a" {
					return errors.New("away")
				}
				defer func() { asked <- struct{}{} }()
				if !c.answers {
					return errors.New("away")
				}
				raw, err := json.Marshal(args)
				if err != nil {
					return err
				}
				yes, err := b.a.HandleGivesUp(ctx, "b", raw)
				*result.(*bool) = yes.(bool)
				return err
			}
			next.start()
			next.until("the address is known", func() bool { return next.a.find(addr) != nil })
			taken := make(chan error, 1)
			go func() {
				_, err := next.a.TakeVIP(b.ctx, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe, Force: true})
				taken <- err
			}()
			<-asked
			if !c.crashed {
				next.until("the assignment", func() bool { return b.vip().Next == "b" })
				if v := b.vip(); v.Free() || v.Epoch != epoch {
					t.Errorf("declared gone while it drains: %+v", v)
				}
			} else {
				// Not only declared gone: an end in order that comes before the take counts.
				next.until("the next period", func() bool { return b.vip().Epoch != epoch })
			}
			end()
			if err := <-taken; err != nil {
				t.Fatal(err)
			}
			if v := b.vip(); v.Node != "b" || (v.NSMState > 1) != c.crashed {
				t.Errorf("%+v", v)
			}
		})
	}
}
