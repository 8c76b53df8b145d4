package imp

import (
	"context"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// loop executes what is not done on the spot: the goroutine of the import.
func (im *Import) loop() {
	defer close(im.exited)
	var batch []Action
	var ended <-chan struct{}
	for {
		select {
		case <-im.wake:
		case <-ended:
			ended = nil
			im.mu.Lock()
			if im.ended != nil {
				im.ended = nil
				im.m.Down(im.o.Clock.Now())
				im.post()
			}
			im.mu.Unlock()
		}
		for {
			im.mu.Lock()
			if im.tick {
				im.tick = false
				im.m.Watched(im.o.Watched != nil && im.o.Watched(im.addrs[im.m.addr%len(im.addrs)]))
				im.m.Tick(im.o.Clock.Now())
				im.post()
			}
			im.fastPath()
			ended = im.ended
			im.busy = len(im.queue) > 0
			if !im.busy {
				stop := im.closed && im.m.Stats().AtTransport == 0 && im.conn == nil
				im.mu.Unlock()
				if stop {
					if im.stopTimer != nil {
						im.stopTimer()
					}
					im.dials.Wait()
					return
				}
				break
			}
			batch, im.queue = im.queue, batch[:0]
			last := im.m.committed
			im.mu.Unlock()
			for i := range batch {
				im.exec(&batch[i], last)
			}
			im.evicted()
			clear(batch)
		}
	}
}

// exec executes one action in the loop.
func (im *Import) exec(a *Action, lastCommitted uint64) {
	if im.evicting && a.Kind != ActLost && a.Kind != ActRelease {
		im.evicted()
	}
	switch a.Kind {
	case ActSend:
		im.send(a, lastCommitted)
	case ActComplete:
		im.giveBack(a)
	case ActRelease:
		switch o, _ := a.Req.Handle.(*op); {
		case a.Req.kind != Normal:
		case im.evicting:
			im.release = append(im.release, o)
		default:
			o.unref(1)
		}
	case ActLost:
		o := a.Req.Handle.(*op)
		if !a.Kept {
			im.lost = append(im.lost, &o.kept)
		}
		if e := a.Req.epoch; !e.IsZero() {
			im.epochs = append(im.epochs, e)
		}
	case ActConnect:
		im.dial(a)
	case ActAbort:
		im.mu.Lock()
		if im.cancel != nil {
			im.cancel()
		}
		im.mu.Unlock()
	case ActDrop:
		im.mu.Lock()
		c := im.conn
		im.conn, im.start, im.ended = nil, nil, nil
		im.fastPath()
		im.mu.Unlock()
		if c != nil {
			c.Close() // its error says nothing that the requests' returns do not
		}
	case ActLocks:
		im.lockReqs = im.o.Locks()
		im.mu.Lock()
		im.m.Locks(len(im.lockReqs))
		im.post()
		im.mu.Unlock()
	case ActTimer:
		if im.stopTimer != nil {
			im.stopTimer()
		}
		im.stopTimer = im.o.Clock.AfterFunc(max(time.Duration(a.At-im.o.Clock.Now()), 0), func() {
			im.mu.Lock()
			im.tick = true
			im.mu.Unlock()
			im.poke()
		})
	case ActState:
		im.log.Debug("import state", "state", a.State)
		if im.o.OnState != nil {
			im.o.OnState(a.State)
		}
	case ActEvent:
		im.event(a.Event)
	}
}

func (im *Import) event(e Event) {
	switch e.Kind {
	case EvEvicted, EvStale:
		im.evicting, im.loss = true, Loss{Unkept: e.Unkept, Transno: e.Transno}
		im.log.Error(e.String())
	case EvRestored:
		im.log.Info(e.String())
	case EvLost:
		if e.Reason == notYet {
			im.log.Info("the target cannot be reached yet")
			return
		}
		im.log.Warn(e.String())
	default:
		im.log.Warn(e.String())
	}
}

// evicted tells the owner what an eviction has cost, and frees it.
func (im *Import) evicted() {
	if !im.evicting {
		return
	}
	im.evicting = false
	if im.o.OnEvicted != nil {
		im.loss.Requests, im.loss.Epochs = im.lost, im.epochs
		im.o.OnEvicted(im.loss)
	}
	for _, o := range im.release {
		o.unref(1)
	}
	clear(im.lost)
	clear(im.release)
	im.lost, im.epochs, im.release = im.lost[:0], im.epochs[:0], im.release[:0]
}

// send executes ActSend in the loop.
func (im *Import) send(a *Action, lastCommitted uint64) {
	conn, st := im.conn, im.start // only the loop and connects change them
	o, _ := a.Req.Handle.(*op)
	if a.Req.kind == Normal && a.Flags&wire.FlagReplay == 0 {
		if !o.ping {
			o.req.LastCommitted = lastCommitted
		}
		o.send(conn, st, im.local, a.Flags)
		return
	}
	if o == nil {
		o = im.own(a.Req)
	}
	if o.keptRep == nil {
		o.keptRep = new(wire.Reply)
	}
	o.keptRep.Reset()
	o.replay = true
	o.kept.Flags = o.kept.Flags&^(wire.FlagReplay|wire.FlagResend) | a.Flags
	o.kept.LastCommitted = lastCommitted
	if a.Req.kind == Normal && a.Req.slot != 0 {
		o.kept.Slot = a.Req.slot - 1
	}
	o.pass(conn, st, &o.kept, o.keptRep)
}

// own makes the message of a request of the machine's own.
func (im *Import) own(r *Request) *op {
	o := &op{im: im, mr: r}
	o.doneFn, o.backFn = o.returned, o.returnedErr
	switch r.kind {
	case Sync:
		o.kept.Op = wire.OpSyncTarget
	case Lock:
		o.kept = im.lockReqs[r.XID]
	default:
		o.kept.Op = wire.OpPing
	}
	o.kept.Client, o.kept.ClientGen, o.kept.XID = im.o.Client, im.o.Gen, im.o.XID()
	r.Handle = o
	return o
}

// dial makes one attempt to connect, in a goroutine that Close waits for.
func (im *Import) dial(a *Action) {
	ctx, cancel := context.WithCancel(context.Background())
	im.mu.Lock()
	im.cancel = cancel
	addr := im.addrs[a.Addr%len(im.addrs)]
	im.mu.Unlock()
	args := a.Connect
	im.dials.Add(1)
	go func() {
		defer im.dials.Done()
		defer cancel()
		conn, rep := im.connect(ctx, addr, args)
		im.mu.Lock()
		used := false
		now := im.o.Clock.Now()
		if conn == nil {
			im.m.ConnectFailed(now, args.Attempt)
		} else {
			res := ConnectResult{
				Status: rep.Status, Instance: rep.Instance, Recovering: rep.Recovering, Known: rep.Known,
				Transno: rep.Transno, LastCommitted: rep.LastCommitted, Pingless: rep.Pingless,
			}
			_, res.Local = conn.(*wire.LocalConn)
			if used = im.m.Connected(now, args.Attempt, res); used {
				im.conn, im.info, im.local = conn, *rep, res.Local
				im.start, _ = conn.(starter)
				if e, ok := conn.(ender); ok {
					im.ended = e.Done()
				}
				if im.o.OnConnect != nil {
					im.o.OnConnect(rep)
				}
			}
		}
		im.post()
		im.poke()
		im.mu.Unlock()
		if conn != nil && !used {
			conn.Close()
		}
	}()
}

// connect dials and sends OpConnect; a nil Conn means that it failed.
func (im *Import) connect(ctx context.Context, addr string, c ConnectArgs) (wire.Conn, *wire.Reply) {
	conn, err := im.o.Dial(ctx, addr)
	if err != nil {
		im.log.Debug("connect failed", "addr", addr, "err", err)
		return nil, nil
	}
	req, rep := &wire.Request{}, &wire.Reply{}
	req.Op, req.Flags = wire.OpConnect, wire.FlagWaitCommit
	req.Client, req.ClientGen, req.XID = im.o.Client, im.o.Gen, im.o.XID()
	req.Cookie, req.Transno, req.LastCommitted = c.Instance, c.Transno, c.LastCommitted
	req.Time = int64(c.Service)
	if err := conn.Call(ctx, req, rep); err != nil {
		im.log.Debug("connect not answered", "addr", addr, "err", err)
		conn.Close()
		return nil, nil
	}
	return conn, rep
}
