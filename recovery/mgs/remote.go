package mgs

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// RemoteOptions of NewRemote. Node, Addrs and Dial are required.
type RemoteOptions struct {
	// Node is this node's name, that of its certificate.
	Node string
	// Addrs are where the MGS may be, as Dial knows them. They are tried in turn.
	Addrs []string
	// Dial connects to the MGS at one of Addrs.
	Dial func(ctx context.Context, addr string) (wire.Conn, error)
	// Attempt bounds one attempt at one address, in which the answer must come.
	// Default 10 s.
	Attempt time.Duration
	// BackoffMin is the pause when all addresses were tried in vain; it doubles
	// up to BackoffMax. Defaults 100 ms, 5 s.
	BackoffMin, BackoffMax time.Duration
	// Rand is the source of the session's name, crypto/rand by default.
	Rand   io.Reader
	Logger *slog.Logger
}

// Remote is a Registry on another node. Its methods try until ctx ends; then the
// fate of a change is unknown. It calls for its own node only.
type Remote struct {
	o       RemoteOptions
	session string
	xid     atomic.Uint64
	// change is held by the one changing call that is on its way: numbers have to
	// arrive in order. seq is guarded by it.
	change chan struct{}
	seq    uint64
	// polling is held by the one OpWatchVIPs that waits for news.
	polling chan struct{}
	ended   atomic.Uint64 // how many have ended

	mu      sync.Mutex // never held while waiting
	closed  bool
	calls   link      // for calls
	polls   link      // for OpWatchVIPs that wait, which are not to hold up calls
	waiting time.Time // when the wait was told, zero: nobody waits or was told
}

// link is a connection to the MGS.
type link struct {
	// dial is held while the connection is made.
	dial chan struct{}

	// Guarded by Remote.mu.
	conn wire.Conn // nil: none
	at   int       // index of its address, or of the next to try
}

var (
	_ Registry = (*Remote)(nil)
	_ Floating = (*Remote)(nil)
)

// NewRemote returns a registry; it does not connect yet.
func NewRemote(o RemoteOptions) (*Remote, error) {
	if err := checkNode(o.Node); err != nil {
		return nil, err
	}
	if len(o.Addrs) == 0 || o.Dial == nil {
		return nil, invalid("there is no address of the MGS")
	}
	def := func(p *time.Duration, d time.Duration) {
		if *p <= 0 {
			*p = d
		}
	}
	def(&o.Attempt, 10*time.Second)
	def(&o.BackoffMin, 100*time.Millisecond)
	def(&o.BackoffMax, 5*time.Second)
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	id, err := random(o.Rand, sessionIDSize)
	if err != nil {
		return nil, err
	}
	r := &Remote{o: o, session: id, change: make(chan struct{}, 1), polling: make(chan struct{}, 1)}
	r.calls.dial, r.polls.dial = make(chan struct{}, 1), make(chan struct{}, 1)
	return r, nil
}

// errClosed: the caller has closed the Remote.
var errClosed = errors.New("closed")

// Close ends the connections. Calls under way and later ones fail.
func (r *Remote) Close() error {
	r.mu.Lock()
	conns := []wire.Conn{r.calls.conn, r.polls.conn}
	r.calls.conn, r.polls.conn, r.closed = nil, nil, true
	r.mu.Unlock()
	var errs []error
	for _, c := range conns {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

func acquire(ctx context.Context, sem chan struct{}) error {
	select {
	case sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// call executes a method and reads its result.
func (r *Remote) call(ctx context.Context, name string, args, result any) error {
	c := call{Node: r.o.Node}
	var err error
	if c.Args, err = json.Marshal(args); err != nil {
		return fmt.Errorf("mgs: %s: %w", name, err)
	}
	if methods[name].changes {
		if err := acquire(ctx, r.change); err != nil {
			return fmt.Errorf("mgs: %s: %w", name, err)
		}
		defer func() { <-r.change }()
		r.seq++
		c.Session, c.Seq = r.session, r.seq
	}
	data, err := json.Marshal(&c)
	if err != nil {
		return fmt.Errorf("mgs: %s: %w", name, err)
	}
	req := wire.Request{Header: wire.Header{Op: wire.OpRegistry}, Name: []byte(name), Data: data}
	return r.try(ctx, &r.calls, name, &req, r.o.Attempt, result)
}

// try sends a request until there is an answer, which may take d, and reads its result.
func (r *Remote) try(ctx context.Context, l *link, name string, req *wire.Request, d time.Duration, result any) error {
	var rep wire.Reply
	pause, began := r.o.BackoffMin, time.Now()
	for try := 1; ; try++ {
		again, err := r.attempt(ctx, l, req, d, &rep)
		switch {
		case err == nil:
			r.answers(l)
			return decodeAnswer(rep.Data, result)
		case ctx.Err() != nil:
			return fmt.Errorf("mgs: %s: no answer from the registry: %w (%w)", name, ctx.Err(), err)
		case !again:
			return fmt.Errorf("mgs: %s: %w", name, err)
		case try%len(r.o.Addrs) != 0:
			continue
		}
		r.waits(began, err)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("mgs: %s: no answer from the registry: %w (%w)", name, ctx.Err(), err)
		}
		pause = min(2*pause, r.o.BackoffMax)
	}
}

// errElsewhere: the node does not serve the registry, or not any more.
var errElsewhere = errors.New("the node does not serve the registry, or cannot reach it")

// attempt tries one address. again tells that another attempt may succeed.
func (r *Remote) attempt(caller context.Context, l *link, req *wire.Request, d time.Duration, rep *wire.Reply) (again bool, err error) {
	ctx, cancel := context.WithTimeout(caller, d)
	defer cancel()
	dial, stop := context.WithTimeout(ctx, r.o.Attempt)
	conn, err := r.connect(dial, l)
	stop()
	if err != nil {
		return !errors.Is(err, errClosed), err
	}
	one := *req
	one.XID = r.xid.Add(1)
	err = conn.Call(ctx, &one, rep)
	switch {
	case err != nil:
		if caller.Err() != nil {
			return false, err // the connection is not to blame
		}
	case rep.Status == wire.OK:
		return false, nil
	case rep.Status == wire.ErrTargetDown:
		err = errElsewhere
	default:
		return false, rep.Status
	}
	r.drop(l, conn)
	return true, err
}

// connect returns the connection, or makes one to the next address.
func (r *Remote) connect(ctx context.Context, l *link) (wire.Conn, error) {
	if err := acquire(ctx, l.dial); err != nil {
		return nil, err
	}
	defer func() { <-l.dial }()
	r.mu.Lock()
	conn, at, closed := l.conn, l.at, r.closed
	r.mu.Unlock()
	if closed {
		return nil, errClosed
	}
	if conn != nil {
		return conn, nil
	}
	addr := r.o.Addrs[at]
	conn, err := r.o.Dial(ctx, addr)
	r.mu.Lock()
	if err == nil && r.closed {
		r.mu.Unlock()
		return nil, errors.Join(errClosed, conn.Close())
	}
	if err != nil {
		l.at = (at + 1) % len(r.o.Addrs)
	} else {
		l.conn = conn
	}
	r.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	return conn, nil
}

// drop ends a connection that did not give an answer; the next attempt is at
// the next address.
func (r *Remote) drop(l *link, conn wire.Conn) {
	r.mu.Lock()
	if l.conn != conn {
		r.mu.Unlock()
		return // somebody else was faster
	}
	l.conn, l.at = nil, (l.at+1)%len(r.o.Addrs)
	r.mu.Unlock()
	if err := conn.Close(); err != nil {
		r.o.Logger.Debug("close a connection to the MGS", "err", err)
	}
}

// tellEvery is how often a wait for the MGS is told.
const tellEvery = 30 * time.Second

func (r *Remote) waits(began time.Time, why error) {
	now := time.Now()
	r.mu.Lock()
	told := !r.waiting.IsZero() && now.Sub(r.waiting) < tellEvery
	if !told {
		r.waiting = now
	}
	r.mu.Unlock()
	if !told {
		r.o.Logger.Warn("waiting for the MGS", "at", r.o.Addrs, "for", now.Sub(began).Round(time.Millisecond), "err", why)
	}
}

func (r *Remote) answers(l *link) {
	r.mu.Lock()
	told := !r.waiting.IsZero()
	r.waiting = time.Time{}
	addr := r.o.Addrs[l.at]
	r.mu.Unlock()
	if told {
		r.o.Logger.Info("the MGS answers", "at", addr)
	}
}

// own refuses to call for another node.
func (r *Remote) own(node string) error {
	if node != r.o.Node {
		return invalid("node %s cannot call as node %.80q", r.o.Node, node)
	}
	return nil
}

// StartClient implements Registry.
func (r *Remote) StartClient(ctx context.Context, node string) (wire.ClientID, uint64, error) {
	if err := r.own(node); err != nil {
		return wire.ClientID{}, 0, err
	}
	var res clientResult
	if err := r.call(ctx, methodStartClient, none{}, &res); err != nil {
		return wire.ClientID{}, 0, err
	}
	if !isHex(res.ID, len(wire.ClientID{})) || res.Generation == 0 {
		return wire.ClientID{}, 0, badAnswer(methodStartClient)
	}
	c := fsClient{ID: res.ID}
	return c.clientID(), res.Generation, nil
}

func badAnswer(method string) error { return fmt.Errorf("mgs: %s: the answer is none", method) }

func checkVIP(method string, v *VIP) error {
	if v.Index == 0 || v.Epoch == 0 || checkAddr(v.Addr) != nil || !isHex(v.Verifier, 8) || v.damage() != "" {
		return badAnswer(method)
	}
	return nil
}

// Serve implements Registry.
func (r *Remote) Serve(ctx context.Context, addr netip.Addr, node string) (VIP, error) {
	if err := r.own(node); err != nil {
		return VIP{}, err
	}
	return r.vip(ctx, methodServe, serveArgs{addr})
}

func (r *Remote) vip(ctx context.Context, method string, args any) (VIP, error) {
	var res vipResult
	if err := r.call(ctx, method, args, &res); err != nil {
		return VIP{}, err
	}
	if err := checkVIP(method, &res.VIP); err != nil {
		return VIP{}, err
	}
	res.VIP.Crashed = res.Crashed
	return res.VIP, nil
}

// Stopped implements Registry.
func (r *Remote) Stopped(ctx context.Context, index uint32, epoch uint64) error {
	return r.call(ctx, methodStopped, periodArgs{index, epoch}, &none{})
}

// Abandoned implements Registry.
func (r *Remote) Abandoned(ctx context.Context, index uint32, epoch uint64) error {
	return r.call(ctx, methodAbandoned, periodArgs{index, epoch}, &none{})
}

// RaiseNSM implements Registry.
func (r *Remote) RaiseNSM(ctx context.Context, index uint32, epoch uint64, above uint32) (VIP, error) {
	return r.vip(ctx, methodRaiseNSM, nsmArgs{index, epoch, above})
}

// NewVerifiers implements Registry.
func (r *Remote) NewVerifiers(ctx context.Context, node string, indexes ...uint32) ([]VIP, error) {
	if err := r.own(node); err != nil {
		return nil, err
	}
	if err := r.call(ctx, methodNewVerifiers, verifiersArgs{indexes}, &none{}); err != nil {
		return nil, err
	}
	l, err := r.VIPs(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(l, func(v VIP) bool {
		if len(indexes) > 0 {
			return !slices.Contains(indexes, v.Index)
		}
		return v.Node != node && v.Node != ""
	}), nil
}

// VIPs implements Registry. When the list changes between two pages it is read
// again.
func (r *Remote) VIPs(ctx context.Context) ([]VIP, error) {
	var l []VIP
	for tag, first := uint64(0), true; ; {
		var res vipsResult
		var a vipsArgs
		if len(l) > 0 {
			a.After = l[len(l)-1].Index
		}
		if err := r.call(ctx, methodVIPs, a, &res); err != nil {
			return nil, err
		}
		if !first && res.Tag != tag {
			l, first = nil, true
			continue
		}
		tag, first = res.Tag, false
		for i := range res.VIPs {
			v := &res.VIPs[i]
			if checkVIP(methodVIPs, v) != nil || v.Index <= a.After || len(l) >= maxVIPs {
				return nil, badAnswer(methodVIPs)
			}
			a.After = v.Index
			l = append(l, *v)
		}
		if !res.More {
			return l, nil
		}
		if len(res.VIPs) == 0 {
			return nil, badAnswer(methodVIPs)
		}
	}
}

// OSTs implements Registry.
func (r *Remote) OSTs(ctx context.Context) (int, error) {
	var res ostsValue
	if err := r.call(ctx, methodOSTs, none{}, &res); err != nil {
		return 0, err
	}
	if res.OSTs < 0 || res.OSTs > maxOSTs {
		return 0, badAnswer(methodOSTs)
	}
	return res.OSTs, nil
}

// SetOSTs implements Registry.
func (r *Remote) SetOSTs(ctx context.Context, n int) error {
	return r.call(ctx, methodSetOSTs, ostsValue{n}, &none{})
}

// Made implements Registry.
func (r *Remote) Made(ctx context.Context, target string) (bool, error) {
	var res madeResult
	err := r.call(ctx, methodMade, targetArgs{target}, &res)
	return res.Made, err
}

// SetMade implements Registry.
func (r *Remote) SetMade(ctx context.Context, target string) error {
	return r.call(ctx, methodSetMade, targetArgs{target}, &none{})
}

// Identity implements Registry.
func (r *Remote) Identity(ctx context.Context) (string, error) {
	var res identityResult
	if err := r.call(ctx, methodIdentity, none{}, &res); err != nil {
		return "", err
	}
	if !isHex(res.ID, len(wire.ClientID{})) {
		return "", badAnswer(methodIdentity)
	}
	return res.ID, nil
}

// Clients implements Registry.
func (r *Remote) Clients(ctx context.Context) (map[string]wire.ClientID, error) {
	var res clientsResult
	if err := r.call(ctx, methodClients, none{}, &res); err != nil {
		return nil, err
	}
	if len(res.Clients) > maxNodes {
		return nil, badAnswer(methodClients)
	}
	l := make(map[string]wire.ClientID, len(res.Clients))
	for n, id := range res.Clients {
		if checkNode(n) != nil || !isHex(id, len(wire.ClientID{})) {
			return nil, badAnswer(methodClients)
		}
		l[n] = (&fsClient{ID: id}).clientID()
	}
	return l, nil
}

// Agree implements Registry.
func (r *Remote) Agree(ctx context.Context, name, value string) (string, error) {
	var res agreeResult
	if err := r.call(ctx, methodAgree, agreeArgs{name, value}, &res); err != nil {
		return "", err
	}
	if len(res.Value) > maxValue {
		return "", badAnswer(methodAgree)
	}
	return res.Value, nil
}
