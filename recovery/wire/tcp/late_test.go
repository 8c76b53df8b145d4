package tcp

import (
	"runtime"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// late answers from another goroutine at about the time when Handle returns.
type late struct{ fake }

func (l *late) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	rep.XID = req.XID
	n := req.XID % 5
	go done() // from here on the request is not ours
	for range n {
		runtime.Gosched()
	}
}

// An answer that is given while Handle returns is neither left in the queue by
// the reader, which has looked at it before, nor by the target's goroutine, which
// relies on the reader. Nothing else would send it: there are no pings here.
func TestAnswerWhileHandleReturns(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.Timeouts.Idle = time.Hour })
	if err := b.srv.SetTarget("late", &late{}); err != nil {
		t.Fatal(err)
	}
	c := b.dial(func(o *DialOptions) { o.Target, o.Timeouts.Idle = "late", time.Hour })
	n := 300000
	if testing.Short() {
		n = 50000
	}
	for i := range n {
		stuck := time.AfterFunc(10*time.Second, func() { c.Abort(ErrTimeout) })
		if err := c.Call(ctx, request(wire.OpPing, uint64(i)), new(wire.Reply)); err != nil {
			t.Fatal(i, err)
		}
		stuck.Stop()
	}
}
