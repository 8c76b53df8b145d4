package sim

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/wire"
)

// frontend is what serves NFS calls on a node: it uses the file system client as
// package nfsd does.
type frontend struct {
	p    *process
	w    *world
	fs   *client.FS
	id   wire.ClientID
	gen  uint64
	gone chan struct{} // it answers nothing any more

	mu      sync.Mutex
	over    bool
	stopped chan struct{} // closed when the orderly stop is through
	stopErr error
	ended   []time.Time // it died, or has lost what only it had
	calls   sync.WaitGroup
	settled map[lockKey]bool // callbacks that are needed no longer; under the world's lock
}

func (p *process) frontend() *frontend {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fe
}

func clientID(node string) (id wire.ClientID) {
	copy(id[:], "fe-"+node)
	return id
}

// serveFrontend runs the process's frontend.
func (p *process) serveFrontend() {
	w := p.w
	fe := &frontend{p: p, w: w, id: clientID(p.node.name), gen: w.nextGen(p.node.name), gone: make(chan struct{}), stopped: make(chan struct{}), settled: map[lockKey]bool{}}
	fs, err := client.NewRemote(client.Options{
		ID: fe.id, Gen: fe.gen, Clock: w.clock.Now, Logger: p.logger("fe"), EpochIdle: w.cfg.epochIdle, Patience: w.cfg.patience,
		OnFlushError: func(ost int, total uint64) {
			w.verifierChange(fe, fmt.Sprintf("flush error %d of OST %d", total, ost), ost)
		},
		OnLostData: func(ost, n int) { w.verifierChange(fe, fmt.Sprintf("%d writes lost at OST %d", n, ost), ost) },
		OnEvicted:  func(lost int) { w.evicted(fe, lost) },
	}, client.Remote{MDT: p.target(mdtName), OSTs: p.targets(), Import: w.importConfig(p, "fe")})
	if err != nil {
		w.fault("%s: frontend: %v", p.node.name, err)
		return
	}
	fe.fs = fs
	p.hear(fs.Notice)
	for p.ctx.Err() == nil {
		if err := fs.Connect(p.ctx); err == nil {
			break
		} else if p.ctx.Err() == nil {
			w.trace("%s: frontend: %v", p.node.name, err)
		}
	}
	p.mu.Lock()
	live := p.ctx.Err() == nil
	if live {
		p.fe = fe
	}
	p.mu.Unlock()
	if live {
		w.trace("%s: frontend is ready", p.node.name)
		w.poke()
		<-p.ctx.Done()
	}
	if p.dead.Load() {
		fe.died()
	}
	fe.calls.Wait()
	if err := fs.Abandon(); err != nil {
		w.fault("%s: abandon: %v", p.node.name, err)
	}
}

// died ends the frontend's service without anything.
func (fe *frontend) died() {
	fe.mu.Lock()
	was := fe.over
	fe.over = true
	fe.mu.Unlock()
	fe.end()
	if !was {
		close(fe.gone)
		go fe.fs.Abandon() // calls that wait end
	}
	fe.w.deadFrontend(fe)
}

// stop ends the frontend's service in order.
func (fe *frontend) stop() {
	fe.mu.Lock()
	was := fe.over
	fe.over = true
	fe.mu.Unlock()
	if was {
		select {
		case <-fe.stopped:
		case <-fe.p.ctx.Done(): // it died
		}
		return
	}
	close(fe.gone)
	// The calls that it has are answered, for a while.
	idle := make(chan struct{})
	go func() { fe.calls.Wait(); close(idle) }()
	ctx, cancel := context.WithTimeout(context.Background(), fe.w.cfg.stopTime)
	defer cancel()
	select {
	case <-idle:
	case <-ctx.Done():
	}
	fe.stopErr = fe.fs.Close(ctx)
	fe.w.trace("%s: frontend has stopped: %v", fe.p.node.name, fe.stopErr)
	if fe.stopErr != nil {
		fe.end()
	}
	close(fe.stopped)
	fe.w.stoppedFrontend(fe)
}

// end notes that what only the frontend had is lost.
func (fe *frontend) end() {
	fe.mu.Lock()
	fe.ended = append(fe.ended, time.Now())
	fe.mu.Unlock()
}

// begin enters a call; false when the frontend does not serve any more.
func (fe *frontend) begin() bool {
	fe.mu.Lock()
	defer fe.mu.Unlock()
	if fe.over {
		return false
	}
	fe.calls.Add(1)
	return true
}

// The calls of nfsd. They return the status, or false when no answer is to be given.

// modify executes a call that is not idempotent.
func (fe *frontend) modify(o client.Owner, q *wire.Request) *wire.Reply {
	ctx := context.Background()
	req, rep := *q, &wire.Reply{}
	req.Flags |= wire.FlagWaitCommit
	flags := req.Flags
	for {
		rep.Reset()
		req.Flags = flags
		if req.Op == wire.OpSetattr && req.SetAttr.Mask&wire.SetSize != 0 {
			fe.fs.Setattr(ctx, o, &req, rep)
		} else {
			done := make(chan struct{}, 1)
			fe.fs.Submit(o, &req, rep, func() { done <- struct{}{} })
			<-done
		}
		switch rep.Status {
		case wire.ErrPortMismatch:
			// The recorded call's connection is dead: clients here have one at a time.
			flags |= wire.FlagAnyPort
			continue
		case wire.ErrUnknownClient:
			continue
		}
		break
	}
	if req.Op == wire.OpCreate && rep.Status == wire.OK {
		switch {
		case rep.Truncate.LogID != 0 && rep.Reconstructed && !rep.Created:
			rep.Status = wire.ErrTargetDown
		case rep.Truncate.LogID != 0:
			if st := fe.fs.Truncated(ctx, o, &rep.Attr, rep.Truncate); st != wire.OK {
				rep.Status = st
			}
		case !rep.Attr.EpochOpen:
		case rep.Reconstructed:
			fe.fs.Recreated(rep.Attr.FID)
		case rep.Created:
			fe.fs.Created(rep.Attr.FID, rep.Transno)
		}
	}
	if rep.HasAttr && rep.Status == wire.OK && rep.Attr.EpochOpen {
		if st, _ := fe.fs.Complete(ctx, o, &rep.Attr, true); st != wire.OK {
			rep.HasAttr = false
		}
	}
	return rep
}

func (fe *frontend) write(o client.Owner, fid wire.FID, off uint64, data []byte, how wire.StableHow) (verf uint64, a wire.Attr, st wire.Status) {
	ctx := context.Background()
	if st, _ = fe.fs.Attr(ctx, o, fid, &a, true); st != wire.OK {
		return 0, a, st
	}
	verf = fe.w.verifier(o.VIP)
	_, st = fe.fs.Write(ctx, o, &a, off, data, how)
	return verf, a, st
}

func (fe *frontend) commit(o client.Owner, fid wire.FID) (verf uint64, st wire.Status) {
	ctx := context.Background()
	var a wire.Attr
	if st, _ = fe.fs.Attr(ctx, o, fid, &a, true); st != wire.OK {
		return 0, st
	}
	st = fe.fs.Commit(ctx, o, &a)
	return fe.w.verifier(o.VIP), st
}

func (fe *frontend) read(o client.Owner, fid wire.FID, off uint64, n int) (data []byte, a wire.Attr, st wire.Status) {
	ctx := context.Background()
	if st, _ = fe.fs.Attr(ctx, o, fid, &a, true); st != wire.OK {
		return nil, a, st
	}
	buf := make([]byte, n)
	k, _, st, _ := fe.fs.Read(ctx, o, &a, off, buf, true)
	return buf[:k], a, st
}

func (fe *frontend) getattr(o client.Owner, fid wire.FID) (a wire.Attr, st wire.Status) {
	st, _ = fe.fs.Attr(context.Background(), o, fid, &a, true)
	return a, st
}

func (fe *frontend) lookup(o client.Owner, dir wire.FID, name string) (a wire.Attr, st wire.Status) {
	ctx := context.Background()
	req, rep := &wire.Request{}, &wire.Reply{}
	req.Op, req.FID, req.Name = wire.OpLookup, dir, []byte(name)
	if !fe.fs.Try(o, req, rep) {
		fe.fs.Call(ctx, o, req, rep)
	}
	if st = rep.Status; st == wire.OK {
		st, _ = fe.fs.Complete(ctx, o, &rep.Attr, true)
	}
	return rep.Attr, st
}

func (fe *frontend) readdir(o client.Owner, dir wire.FID) (map[string]wire.FID, wire.Status) {
	ctx := context.Background()
	out := map[string]wire.FID{}
	var cookie uint64
	for {
		req, rep := &wire.Request{}, &wire.Reply{}
		req.Op, req.FID, req.Cookie, req.Count, req.MaxEntries = wire.OpReaddir, dir, cookie, 4096, 5
		fe.fs.Call(ctx, o, req, rep)
		if rep.Status != wire.OK {
			return nil, rep.Status
		}
		for _, e := range rep.Entries {
			cookie = e.Cookie
			if s := string(e.Name); s != "." && s != ".." {
				if _, twice := out[s]; twice {
					fe.w.fault("%v has %q twice", dir, s)
				}
				out[s] = e.FID
			}
		}
		if rep.EOF {
			return out, wire.OK
		}
	}
}

// raise makes all targets refuse older epochs of a service address. OSTs that are
// away learn it from the MDT.
func (fe *frontend) raise(vip uint32, epoch uint64) wire.Status {
	req, rep := &wire.Request{}, &wire.Reply{}
	req.Op, req.Flags = wire.OpSetVIPEpoch, wire.FlagWaitCommit
	fe.fs.Call(context.Background(), client.Owner{VIP: vip, Epoch: epoch}, req, rep)
	if rep.Status != wire.OK {
		return rep.Status
	}
	var wg sync.WaitGroup
	for i := range fe.fs.OSTs() {
		q, r := &wire.Request{}, &wire.Reply{}
		q.Op, q.Flags, q.VIP, q.VIPEpoch = wire.OpSetVIPEpoch, wire.FlagWaitCommit|wire.FlagNoWait, vip, epoch
		q.Client, q.ClientGen = fe.id, fe.gen
		wg.Add(1)
		fe.fs.OSTImport(i).Handle(q, r, wg.Done)
	}
	wg.Wait()
	return wire.OK
}

// imports lists the frontend's imports.
func (fe *frontend) imports() []*imp.Import {
	l := []*imp.Import{fe.fs.MDTImport()}
	for i := range fe.fs.OSTs() {
		l = append(l, fe.fs.OSTImport(i))
	}
	return l
}
