package lockd

import (
	"context"
	"math"
	"sync"
	"time"

	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/wire"
)

// poller collects the grants of one service address from the table.
type poller struct {
	a      *Address
	e      *engine
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}

	mu       sync.Mutex // makes polls and their end reach the table in order
	stopping bool
}

const (
	listPage = 1024
	// pollPause is the wait after a poll that failed or that another one ended.
	pollPause = time.Second
)

func startPoller(a *Address, e *engine) *poller {
	p := &poller{a: a, e: e, done: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	go p.run()
	return p
}

// ask sends a request and waits for the answer; nil when the poller is to end
// first. Request and reply are not used again: what was given up may be answered
// late.
func (p *poller) ask(req *wire.Request) *wire.Reply {
	rep, answered := new(wire.Reply), make(chan struct{})
	p.mu.Lock()
	if p.stopping {
		p.mu.Unlock()
		return nil
	}
	p.a.srv.cfg.Table.Submit(p.a.owner, req, rep, func() { close(answered) })
	p.mu.Unlock()
	select {
	case <-answered:
		return rep
	case <-p.ctx.Done():
		return nil
	}
}

// stop ends the poll in progress by another one and waits.
func (p *poller) stop(ctx context.Context) error {
	defer p.cancel()
	req := &wire.Request{Header: wire.Header{Op: wire.OpLockPoll}, Cookie: math.MaxUint64}
	answered := make(chan struct{})
	p.mu.Lock()
	p.stopping = true
	p.a.srv.cfg.Table.Submit(p.a.owner, req, new(wire.Reply), func() { close(answered) })
	p.mu.Unlock()
	select {
	case <-answered:
	case <-ctx.Done():
		return ctx.Err()
	}
	p.cancel()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *poller) run() {
	defer close(p.done)
	if !p.list() {
		return
	}
	var last uint64
	for {
		rep := p.ask(&wire.Request{Header: wire.Header{Op: wire.OpLockPoll}, Cookie: last})
		var grants []wire.LockGrant
		switch {
		case rep == nil:
			return
		case rep.Status == wire.ErrStaleVIP:
			p.a.fenced()
			return
		case rep.Status == wire.OK && rep.Lock != nil:
			grants = rep.Lock.Grants
		}
		if len(grants) == 0 {
			if !p.pause() {
				return
			}
			continue
		}
		for i := range grants {
			last = max(last, grants[i].Seq)
		}
		p.e.add(grants)
	}
}

// list finds the locks whose callbacks may have been sent already, by whoever
// served the address before. False: the poller is to end.
func (p *poller) list() bool {
	var after uint64
	again, all := make(map[uint64]struct{}), false
	for eof := false; !eof; {
		rep := p.ask(&wire.Request{
			Header: wire.Header{Op: wire.OpLockList}, Cookie: after, MaxEntries: listPage, Lock: &wire.LockArgs{},
		})
		switch {
		case rep == nil:
			return false
		case rep.Status == wire.ErrStaleVIP:
			p.a.fenced()
			return false
		case rep.Status == wire.OK && rep.Lock != nil:
		default:
			if _, lasting := nlm.StatFor(nlm.Version4, rep.Status); !lasting {
				if !p.pause() {
					return false
				}
				continue
			}
			p.a.srv.log.Warn("the lock table does not list its locks; all grants are taken for told already", "status", rep.Status)
			all, eof = true, true
			continue
		}
		for i := range rep.Lock.Locks {
			l := &rep.Lock.Locks[i]
			after = max(after, l.ID)
			if !l.Share && (l.State == wire.LockGrantPending || l.State == wire.LockUnconfirmed) {
				again[l.ID] = struct{}{}
			}
		}
		eof = rep.EOF || len(rep.Lock.Locks) == 0
	}
	p.e.mu.Lock()
	p.e.again, p.e.againAll = again, all
	p.e.mu.Unlock()
	return true
}

// pause waits a little; false means that the poller is to end.
func (p *poller) pause() bool {
	t := make(chan struct{})
	stop := p.a.srv.cfg.AfterFunc(pollPause, func() { close(t) })
	defer stop()
	select {
	case <-t:
		return true
	case <-p.ctx.Done():
		return false
	}
}
