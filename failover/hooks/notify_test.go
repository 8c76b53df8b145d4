package hooks

import (
	"context"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// sweeper removes the state directory when it is called.
type sweeper struct {
	Baton
	dir string
}

func (s sweeper) Take(ctx context.Context, a vipctl.TakeArgs) (vipctl.Result, error) {
	if err := os.RemoveAll(s.dir); err != nil {
		return vipctl.Result{}, err
	}
	time.Sleep(10 * noticePoll)
	if err := ctx.Err(); err != nil {
		return vipctl.Result{}, err
	}
	return s.Baton.Take(ctx, a)
}

// What is wanted is done although the record of it has gone, and that is said: it is not
// taken for a later change.
func TestNotifyRecordGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &model{rng: rand.New(rand.NewPCG(1, 5)), state: vipctl.Absent}
		dir := t.TempDir() + "/state"
		e := &Env{Baton: sweeper{m, dir}, Machine: m, Sleep: Sleep}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		x := Notify(ctx, e, dir, Order{"b", 1, 1}, testAddr, Master, KeeperOptions{ForceAfter: time.Second})
		if x.Code != Failure || !strings.Contains(x.Text, "state directory") {
			t.Errorf("%+v", x)
		}
		m.wg.Wait()
		if state, _ := m.get(); state != vipctl.Serving {
			t.Errorf("the address is %s", state)
		}
	})
}
