package vipagent

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/vip/viptest"
)

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
		short, cancel := context.WithTimeout(b.ctx, time.Second)
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
	vipctl.Register(ctl, b.a)
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
