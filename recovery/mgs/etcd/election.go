package etcd

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
)

// ElectionOptions of NewElection. Node is required.
type ElectionOptions struct {
	Node string
	// TTL is how long the others wait when the leader is silent; default 3 s.
	// etcd makes less than 1.5 of its election time-outs longer.
	TTL time.Duration
	// Clock is time since some moment, which goes on while the machine sleeps.
	// Default: CLOCK_BOOTTIME.
	Clock  func() time.Duration
	Logger *slog.Logger
}

// Election settles which node is the leader, by a key with a lease. A leader
// takes itself for one until its lease could have ended by its own clock, if that
// is not more than a tenth slower than etcd's; so no two do at any time, whether
// etcd answers or not, unless one is deposed (Depose). Its methods are safe for concurrent use.
type Election struct {
	c *Client
	o ElectionOptions

	mu      sync.Mutex
	mine    tenure
	node    string // leader that was seen last, "" none
	term    uint64 // its
	changed chan struct{}
}

// tenure is a time as leader.
type tenure struct {
	term  uint64 // 0: none
	until time.Duration
}

// valid tells whether the tenure holds.
func (t tenure) valid(now time.Duration) bool { return t.term != 0 && now < t.until }

// lasts is until when a lease holds for certain that was asked for, or renewed, by
// a request that left at a time.
func lasts(sent, ttl time.Duration) time.Duration { return sent + ttl - ttl/10 }

// NewElection returns an election; Run makes the node take part.
func (c *Client) NewElection(o ElectionOptions) (*Election, error) {
	if o.Node == "" {
		return nil, errors.New("etcd: election: no node")
	}
	if o.TTL <= 0 {
		o.TTL = 3 * time.Second
	}
	if o.TTL < time.Second || o.TTL%time.Second != 0 {
		return nil, errors.New("etcd: election: the time of a lease is not in whole seconds")
	}
	if o.Clock == nil {
		o.Clock = bootTime
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Election{c: c, o: o, changed: make(chan struct{})}, nil
}

func bootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // no Linux since 2.6.39 does that
	}
	return time.Duration(t.Nano())
}

// Leads tells whether this node is the leader now.
func (e *Election) Leads() bool { return e.Term() != 0 }

// Term is the number of this node's tenure, which is higher than those of all
// before it; 0 while it does not lead.
func (e *Election) Term() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.mine.valid(e.o.Clock()) {
		return 0
	}
	return e.mine.term
}

// Leader is the leader and its term as far as this node knows, "" if it knows none.
// It may be out of date, but where it is this node Leads is asked.
func (e *Election) Leader() (node string, term uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.node == e.o.Node && !e.mine.valid(e.o.Clock()) {
		return "", 0
	}
	return e.node, e.term
}

// Changed returns a channel that is closed when Leads or Leader may say something
// else than now.
func (e *Election) Changed() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.changed
}

// Await returns the leader as soon as one is known.
func (e *Election) Await(ctx context.Context) (string, error) {
	for {
		changed := e.Changed()
		if node, _ := e.Leader(); node != "" {
			return node, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", errors.New("no leader is elected: " + ctx.Err().Error())
		}
	}
}

// saw notes who leads. The notice is given if that is news.
func (e *Election) saw(node string, term uint64, mine tenure) {
	e.mu.Lock()
	defer e.mu.Unlock()
	news := e.node != node || e.term != term || e.mine.term != mine.term
	e.node, e.term, e.mine = node, term, mine
	if news {
		close(e.changed)
		e.changed = make(chan struct{})
	}
}

func (e *Election) extend(until time.Duration) {
	e.mu.Lock()
	e.mine.until = until
	e.mu.Unlock()
}

// Depose ends the tenure of a term before its lease does, for those who know otherwise
// that its node is dead. If it is not, it learns of it by its watch: for that moment
// two nodes may take themselves for the leader, if the other one hears nothing of etcd
// until its lease ends. A tenure that has ended is no error.
func (e *Election) Depose(ctx context.Context, term uint64) error {
	key := e.c.key(leaderKey)
	return e.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		_, err := cli.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", int64(term))).Then(clientv3.OpDelete(key)).Commit()
		return err
	})
}

// Run takes part until ctx ends; if the node leads then, it gives that up, so that
// the others need not wait.
func (e *Election) Run(ctx context.Context) {
	for ctx.Err() == nil {
		err := e.round(ctx)
		if err == nil {
			continue
		}
		e.o.Logger.Debug("election", "err", err)
		if pause(ctx, retryPause) != nil {
			return
		}
	}
}

// round waits until nobody leads, tries to, and leads.
func (e *Election) round(ctx context.Context) error {
	key := e.c.key(leaderKey)
	kv, at, err := e.c.look(ctx, key)
	if err != nil {
		return err
	}
	if kv != nil {
		e.saw(string(kv.Value), uint64(kv.CreateRevision), tenure{})
		return e.c.watch(ctx, key, at+1, func(x *clientv3.Event) bool {
			if x.Type == clientv3.EventTypeDelete {
				e.saw("", 0, tenure{})
				return true
			}
			e.saw(string(x.Kv.Value), uint64(x.Kv.CreateRevision), tenure{})
			return false
		})
	}
	e.saw("", 0, tenure{})
	sent := e.o.Clock()
	var lease clientv3.LeaseID
	err = e.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		r, err := cli.Grant(ctx, int64(e.o.TTL/time.Second))
		if err == nil {
			lease = r.ID
		}
		return err
	})
	if err != nil {
		return err
	}
	defer e.revoke(ctx, lease)
	var term uint64
	err = e.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		r, err := cli.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, e.o.Node, clientv3.WithLease(lease))).Commit()
		if err == nil && r.Succeeded {
			term = uint64(r.Header.Revision)
		}
		return err
	})
	if err != nil || term == 0 {
		return err
	}
	mine := tenure{term, lasts(sent, e.o.TTL)}
	if !mine.valid(e.o.Clock()) {
		return errors.New("the answer came too late")
	}
	return e.lead(ctx, lease, mine)
}

// revoke ends a lease, and with it what it holds, unless it has ended.
func (e *Election) revoke(ctx context.Context, lease clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	err := e.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		_, err := cli.Revoke(ctx, lease)
		return err
	})
	if err != nil {
		e.o.Logger.Debug("election: the lease is left to end by itself", "err", err)
	}
}

// lead renews the lease until that fails, somebody removes the key, or ctx ends.
func (e *Election) lead(ctx context.Context, lease clientv3.LeaseID, mine tenure) (err error) {
	e.saw(e.o.Node, mine.term, mine)
	e.o.Logger.Info("this node was elected leader", "term", mine.term)
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer func() {
		e.saw("", 0, tenure{})
		e.o.Logger.Info("this node is not the leader any more", "term", mine.term, "err", err)
		cancel(nil)
		wg.Wait()
	}()
	wg.Go(func() { cancel(e.removed(ctx, mine.term)) })
	for {
		if pause(ctx, e.o.TTL/4) != nil {
			return context.Cause(ctx)
		}
		sent := e.o.Clock()
		// One that a dead leader of etcd was asked must leave time for another.
		err := e.renew(ctx, lease, min(mine.until-sent, e.o.TTL/4))
		switch {
		case err == nil:
			mine.until = lasts(sent, e.o.TTL)
			e.extend(mine.until)
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			return err
		case !mine.valid(e.o.Clock()):
			return err
		default:
			e.o.Logger.Warn("this node leads, and cannot renew that", "left", mine.until-e.o.Clock(), "err", err)
		}
	}
}

func (e *Election) renew(ctx context.Context, lease clientv3.LeaseID, left time.Duration) error {
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), left)
	defer cancel()
	cli, err := e.c.get(ctx)
	if err == nil {
		_, err = cli.KeepAliveOnce(ctx, lease)
	}
	return err
}

// removed waits until the key of a term is not there any more.
func (e *Election) removed(ctx context.Context, term uint64) error {
	key := e.c.key(leaderKey)
	for {
		kv, at, err := e.c.look(ctx, key)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil && (kv == nil || uint64(kv.CreateRevision) != term):
			return errors.New("the key was removed")
		case err == nil:
			if err = e.c.watch(ctx, key, at+1, func(x *clientv3.Event) bool { return x.Type == clientv3.EventTypeDelete }); err == nil {
				return errors.New("the key was removed")
			}
		}
		if pause(ctx, retryPause) != nil {
			return ctx.Err()
		}
	}
}
