package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// OSTOptions configure an object target. Name, OST.Dir or OST.FS, and MDT are
// required.
type OSTOptions struct {
	Name string
	OST  ost.Options // what connects the parts is set here
	// Owner is how the store's ownership is taken; nil: nobody else can see it.
	Owner *owner.Options
	// Owned is called when the store is owned and before it is opened; its error
	// ends the start.
	Owned    func(context.Context) error
	Recovery recov.Config
	// Pingless is front.Options.Pingless.
	Pingless bool
	// MDT is asked what the target has to know before it serves anybody.
	MDT client.Target
	// Found, if not nil, names addresses at which the MDT is said to run; while the
	// start waits for it, it is asked there next.
	Found  <-chan string
	Logger *slog.Logger
	// OnFail is called once when the target fails. It must not block.
	OnFail func(error)
	// OnWait is told why the start takes long.
	OnWait func(why string)
}

// OST is a running object target.
type OST struct {
	o     OSTOptions
	own   *owner.Owner
	body  *ost.Target
	front *front.Front
	fail  failure
}

// StartOST takes the store, asks the MDT, for as long as ctx allows, and begins to
// serve or to recover.
func StartOST(ctx context.Context, o OSTOptions) (t *OST, err error) {
	if o.Name == "" || o.OST.Dir == "" && o.OST.FS == nil || o.MDT.Dial == nil {
		return nil, errors.New("start OST: name, directory and MDT are needed")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	t = &OST{o: o}
	if o.OnFail != nil {
		t.fail.then(o.OnFail)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start %s in %s: %w", o.Name, o.OST.Dir, err), t.close(context.Background()))
			t = nil
		}
	}()
	if t.own, err = takeStore(ctx, o.Owner, o.Owned, &t.fail); err != nil {
		return t, err
	}
	oo := o.OST
	oo.Logger, oo.OnFail = o.Logger, t.fail.set
	if t.own != nil {
		if oo.FS == nil {
			if oo.FS, err = objfs.NewLinux(oo.Dir); err != nil {
				return t, err
			}
		}
		oo.FS = owner.GuardFS(oo.FS, t.own)
	}
	if t.body, err = ost.Open(oo); err != nil {
		return t, err
	}
	info, err := t.ask(ctx)
	if err != nil {
		return t, err
	}
	if err = t.body.Learn(info); err != nil {
		return t, err
	}
	if t.front, err = front.New(front.Options{Name: o.Name, Body: t.body, Config: o.Recovery, Pingless: o.Pingless, Logger: o.Logger, OnFail: t.fail.set}); err != nil {
		return t, err
	}
	t.fail.then(t.front.Fail)
	return t, nil
}

// Pauses between questions to the MDT.
const (
	askAgain = 200 * time.Millisecond
	askSlow  = 2 * time.Second
)

// ask gets from the MDT what an OST has to know, for as long as it takes: to serve
// without knowing which clients are fenced could bring old data back.
func (t *OST) ask(ctx context.Context) (*wire.OSTInfo, error) {
	pause, found := askAgain, ""
	for n := 0; ; n++ {
		addr := found
		if addr == "" {
			addr = t.o.MDT.Addrs[n%len(t.o.MDT.Addrs)]
		}
		info, err := t.askAt(ctx, addr)
		if err == nil {
			return info, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("ask %s: %w", t.o.MDT.Name, errors.Join(ctx.Err(), err))
		}
		if n == 2*len(t.o.MDT.Addrs) {
			t.o.Logger.Warn("waiting for the MDT, without which this target does not know whom to refuse", "target", t.o.Name, "mdt", t.o.MDT.Name, "err", err)
		}
		if t.o.OnWait != nil {
			t.o.OnWait(fmt.Sprintf("waits for %s: %v", t.o.MDT.Name, err))
		}
		found = ""
		select {
		case <-ctx.Done():
		case found = <-t.o.Found:
			pause = askAgain
		case <-time.After(pause):
			pause = min(pause*3/2, askSlow)
		}
	}
}

// askLimit bounds one attempt.
const askLimit = 10 * time.Second

func (t *OST) askAt(ctx context.Context, addr string) (*wire.OSTInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	c, err := t.o.MDT.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	info := &wire.OSTInfo{}
	for {
		req := wire.Request{Header: wire.Header{Op: wire.OpOSTFetch}, Count: uint32(t.o.OST.Index), Name: info.Next}
		var rep wire.Reply
		if err := c.Call(ctx, &req, &rep); err != nil {
			return nil, err
		}
		if rep.Status != wire.OK {
			return nil, rep.Status
		}
		if err := wire.DecodeOSTInfo(rep.Data, info); err != nil {
			return nil, err
		}
		if len(info.Next) == 0 {
			return info, nil
		}
	}
}

// Name is the target's.
func (t *OST) Name() string { return t.o.Name }

// Front is the target in service.
func (t *OST) Front() *front.Front { return t.front }

// Body is the object target itself.
func (t *OST) Body() *ost.Target { return t.body }

// Err is why the target has failed, or nil.
func (t *OST) Err() error { return t.fail.get() }

// Stop ends service in order; ctx bounds how long is waited for what is being
// executed. The store is given up in any case.
func (t *OST) Stop(ctx context.Context) error {
	if err := t.close(ctx); err != nil {
		return fmt.Errorf("stop %s: %w", t.o.Name, err)
	}
	return nil
}

func (t *OST) close(ctx context.Context) error {
	var errs []error
	clean := t.fail.get() == nil
	if t.front != nil {
		if err := t.front.Stop(ctx); err != nil {
			clean = false
			errs = append(errs, err)
		}
	}
	if t.body != nil {
		errs = append(errs, t.body.Close())
	}
	errs = append(errs, leaveStore(ctx, t.own, clean && errors.Join(errs...) == nil))
	return errors.Join(errs...)
}
