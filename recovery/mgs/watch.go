package mgs

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// watchTime is when Watch returns without news.
const watchTime = 5 * time.Second

// reread is how often a storage that is no Waiter is looked at by who watches.
const reread = 250 * time.Millisecond

// tell wakes those that wait for a change.
func (r *Stored) tell() {
	r.news.Lock()
	defer r.news.Unlock()
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// next is closed with the next change by this Stored.
func (r *Stored) next() <-chan struct{} {
	r.news.Lock()
	defer r.news.Unlock()
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	return r.changed
}

// view is the present view, and the storage's revision. Its slices are shared.
func (r *Stored) view(ctx context.Context) (View, uint64, error) {
	doc, rev, err := r.storage.Load(ctx)
	if err != nil {
		return View{}, 0, fmt.Errorf("mgs: read the registry: %w", err)
	}
	r.news.Lock()
	if r.seen != nil && r.seenRev == rev {
		v := *r.seen
		r.news.Unlock()
		return v, rev, nil
	}
	r.news.Unlock()
	s := &state{}
	if doc != nil {
		if s, err = decode(r.storage.Name(), doc); err != nil {
			return View{}, 0, err
		}
	}
	v, err := s.view()
	if err != nil {
		return View{}, 0, err
	}
	r.news.Lock()
	r.seen, r.seenRev = &v, rev
	r.news.Unlock()
	return v, rev, nil
}

// Watch implements Floating.
func (r *Stored) Watch(ctx context.Context, rev string) (View, error) {
	wait, cancel := context.WithTimeout(ctx, watchTime)
	defer cancel()
	for {
		changed := r.next() // before the look
		v, at, err := r.view(ctx)
		if err != nil {
			return View{}, err
		}
		if v.Rev != rev || wait.Err() != nil && ctx.Err() == nil {
			return v.clone(), nil
		}
		if err := r.wait(wait, changed, at); err != nil && ctx.Err() != nil {
			return View{}, fmt.Errorf("mgs: watch the registry: %w", ctx.Err())
		}
	}
}

// wait returns when the document may have changed, or with ctx's error.
func (r *Stored) wait(ctx context.Context, changed <-chan struct{}, at uint64) error {
	if w, ok := r.storage.(Waiter); ok {
		if err := w.Wait(ctx, at); err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
	}
	t := time.NewTimer(reread)
	defer t.Stop()
	select {
	case <-changed:
	case <-t.C:
	case <-ctx.Done():
	}
	return ctx.Err()
}

// pollArgs is OpWatchVIPs' Data: a node has Rev and waits for another one or, with
// After, wants the page behind that index at once.
type pollArgs struct {
	Node  string `json:"node"`
	Rev   string `json:"rev"`
	After uint32 `json:"after,omitempty"`
}

// pollResult is a page of a View, in an answer. Pages of one Rev belong together.
type pollResult struct {
	View
	More bool `json:"more,omitempty"`
}

// maxRev bounds a revision's bytes.
const maxRev = 64

func decodePoll(b []byte) (a pollArgs, err error) {
	if err = unmarshal(b, &a); err == nil {
		err = checkNode(a.Node)
	}
	if err == nil && len(a.Rev) > maxRev {
		err = invalid("a revision of %d bytes", len(a.Rev))
	}
	return a, err
}

// poll answers an OpWatchVIPs.
func (r *Stored) poll(ctx context.Context, a pollArgs) ([]byte, error) {
	var res pollResult
	var err error
	if a.After == 0 {
		res.View, err = r.Watch(ctx, a.Rev)
	} else {
		res.View, _, err = r.view(ctx)
	}
	if err != nil {
		return nil, err
	}
	if res.VIPs, res.More, err = pageOf(res.VIPs, a.After); err != nil {
		return nil, err
	}
	return encodeReply(&res, nil)
}

// waits tells whether the answer waits for news.
func (a *pollArgs) waits() bool { return a.Rev != "" && a.After == 0 }

// Watch implements Floating. One caller's poll is on its way at a time, by a connection
// that calls do not use. Others wait for it, since what ends it is news for them, too,
// but only when they know what is so now. What is asked for at once goes with the calls.
func (r *Remote) Watch(ctx context.Context, rev string) (View, error) {
	if len(rev) > maxRev {
		return View{}, invalid("a revision of %d bytes", len(rev))
	}
	if rev == "" {
		return r.pages(ctx, &r.calls, "")
	}
	select {
	case r.polling <- struct{}{}:
	default:
		for ended := ^uint64(0); ended != r.ended.Load(); {
			ended = r.ended.Load()
			if v, err := r.pages(ctx, &r.calls, ""); err != nil || v.Rev != rev {
				return v, err
			}
		}
		if err := acquire(ctx, r.polling); err != nil {
			return View{}, fmt.Errorf("mgs: %s: %w", methodWatch, err)
		}
	}
	defer func() {
		r.ended.Add(1)
		<-r.polling
	}()
	return r.pages(ctx, &r.polls, rev)
}

// pages gets a whole View by a connection, at once if rev is empty.
func (r *Remote) pages(ctx context.Context, l *link, rev string) (View, error) {
	v := View{}
	for a := (pollArgs{Node: r.o.Node, Rev: rev}); ; {
		res, err := r.pollOnce(ctx, l, a)
		if err != nil {
			return View{}, err
		}
		if a.After != 0 && res.Rev != v.Rev {
			v, a = View{}, pollArgs{Node: r.o.Node} // it has changed between two pages
			continue
		}
		v.Rev, v.Drained, v.VIPs = res.Rev, res.Drained, append(v.VIPs, res.VIPs...)
		if len(v.VIPs) > maxVIPs || res.More && len(res.VIPs) == 0 {
			return View{}, badAnswer(methodWatch)
		}
		if !res.More {
			return v, nil
		}
		a.After = v.VIPs[len(v.VIPs)-1].Index
	}
}

// methodWatch is how messages call an OpWatchVIPs.
const methodWatch = "watch"

// pollOnce gets a page and checks it.
func (r *Remote) pollOnce(ctx context.Context, l *link, a pollArgs) (res pollResult, err error) {
	data, err := json.Marshal(&a)
	if err != nil {
		return res, fmt.Errorf("mgs: %s: %w", methodWatch, err)
	}
	req := wire.Request{Header: wire.Header{Op: wire.OpWatchVIPs}, Data: data}
	most := r.o.Attempt
	if a.waits() {
		most += watchTime
	}
	if err := r.try(ctx, l, methodWatch, &req, most, &res); err != nil {
		return res, err
	}
	if res.Rev == "" || len(res.Rev) > maxRev || len(res.Drained) > maxNodes || !strictlySorted(res.Drained) {
		return res, badAnswer(methodWatch)
	}
	for _, n := range res.Drained {
		if checkNode(n) != nil {
			return res, badAnswer(methodWatch)
		}
	}
	last := a.After
	for i := range res.VIPs {
		v := &res.VIPs[i]
		if checkVIP(methodWatch, v) != nil || v.Index <= last {
			return res, badAnswer(methodWatch)
		}
		last = v.Index
	}
	return res, nil
}

// AddVIP implements Floating.
func (r *Remote) AddVIP(ctx context.Context, spec VIPSpec) (VIP, error) {
	return r.vip(ctx, methodAddVIP, spec)
}

// SetVIP implements Floating.
func (r *Remote) SetVIP(ctx context.Context, spec VIPSpec) (VIP, error) {
	return r.vip(ctx, methodSetVIP, spec)
}

// RemoveVIP implements Floating.
func (r *Remote) RemoveVIP(ctx context.Context, index uint32) (VIP, error) {
	return r.vip(ctx, methodRemoveVIP, indexArgs{index})
}

// Assign implements Floating.
func (r *Remote) Assign(ctx context.Context, index uint32, epoch uint64, node string) (VIP, error) {
	return r.vip(ctx, methodAssign, assignArgs{index, epoch, node})
}

// SetReady implements Floating. It refuses an assignment of another node.
func (r *Remote) SetReady(ctx context.Context, index uint32, moveID uint64) (VIP, error) {
	return r.vip(ctx, methodSetReady, moveArgs{index, moveID})
}

// Take implements Floating. It refuses an assignment of another node.
func (r *Remote) Take(ctx context.Context, index uint32, moveID uint64) (VIP, error) {
	return r.vip(ctx, methodTake, moveArgs{index, moveID})
}

// SetDrained implements Floating.
func (r *Remote) SetDrained(ctx context.Context, node string, drained bool) error {
	return r.call(ctx, methodSetDrained, drainedArgs{node, drained}, &none{})
}

// AddVIP implements Floating.
func (r *Stored) AddVIP(ctx context.Context, spec VIPSpec) (VIP, error) {
	return r.step(ctx, func(s *state) (VIP, error) { return s.addVIP(r.rand, spec) })
}

// SetVIP implements Floating.
func (r *Stored) SetVIP(ctx context.Context, spec VIPSpec) (VIP, error) {
	return r.step(ctx, func(s *state) (VIP, error) { return s.setVIP(spec) })
}

// RemoveVIP implements Floating.
func (r *Stored) RemoveVIP(ctx context.Context, index uint32) (VIP, error) {
	return r.step(ctx, func(s *state) (VIP, error) { return s.removeVIP(index) })
}

// Assign implements Floating.
func (r *Stored) Assign(ctx context.Context, index uint32, epoch uint64, node string) (VIP, error) {
	return r.step(ctx, func(s *state) (VIP, error) { return s.assign(index, epoch, node) })
}

// SetReady implements Floating.
func (r *Stored) SetReady(ctx context.Context, index uint32, moveID uint64) (VIP, error) {
	return r.step(ctx, func(s *state) (VIP, error) { return s.setReady(index, moveID, "") })
}

// Take implements Floating.
func (r *Stored) Take(ctx context.Context, index uint32, moveID uint64) (VIP, error) {
	return r.step(ctx, func(s *state) (VIP, error) { return s.take(index, moveID, "") })
}

// SetDrained implements Floating.
func (r *Stored) SetDrained(ctx context.Context, node string, drained bool) error {
	return r.update(ctx, func(s *state) error { return s.setDrained(node, drained) })
}

// step is update for a step that returns an address.
func (r *Stored) step(ctx context.Context, do func(*state) (VIP, error)) (v VIP, err error) {
	err = r.update(ctx, func(s *state) (err error) {
		v, err = do(s)
		return err
	})
	return v, err
}
