package ir

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Options of NewClient. Node, Addrs and Dial are required.
type Options struct {
	// Node is this node's name, that of its certificate.
	Node string
	// Addrs are where the registry may be, as Dial knows them. They are tried in turn.
	Addrs []string
	Dial  func(ctx context.Context, addr string) (wire.Conn, error)
	// Able: OnNews is called. A node that is not able is counted by the registry.
	Able bool
	// OnNews is told that a target runs, once for each change of its entry, in order.
	// Entries with NoIR are not told.
	OnNews func(Target)
	// Attempt bounds the making of a connection and an answer that does not have to
	// wait for news; default 3 s. Quiet is how long an answer to a watch is waited for:
	// longer than the registry's Keepalive; default 12 s.
	Attempt, Quiet time.Duration
	// BackoffMin is the pause when all addresses were tried in vain; it doubles up to
	// BackoffMax. Defaults 50 ms, 1 s.
	BackoffMin, BackoffMax time.Duration
	Logger                 *slog.Logger
}

// Client is a node's connection to the registry's table: it announces the targets that
// run here, and watches.
type Client struct {
	o    Options
	xid  atomic.Uint64
	wake chan struct{} // something is to be announced

	mu    sync.Mutex // never held while waiting or calling
	conn  wire.Conn  // nil: none
	at    string     // its address
	since time.Time  // connected since, or disconnected since
	err   error      // why it is not connected
	have  News       // Targets is not used
	table map[string]Target
	mine  map[string]*local
}

// local is a target that runs here, or was stopped.
type local struct {
	Announcement
	told   uint64 // incarnation of the table that was told
	answer func(Taken)
	first  Taken
}

// NewClient returns a client; Run makes it work.
func NewClient(o Options) (*Client, error) {
	if !ValidName(o.Node) || len(o.Addrs) == 0 || o.Dial == nil {
		return nil, errors.New("watch the registry: node, addresses and Dial are needed")
	}
	def := func(p *time.Duration, d time.Duration) {
		if *p <= 0 {
			*p = d
		}
	}
	def(&o.Attempt, 3*time.Second)
	def(&o.Quiet, 12*time.Second)
	def(&o.BackoffMin, 50*time.Millisecond)
	def(&o.BackoffMax, time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OnNews == nil {
		o.OnNews = func(Target) {}
	}
	return &Client{o: o, wake: make(chan struct{}, 1), since: time.Now(), err: errNotYet, table: map[string]Target{}, mine: map[string]*local{}}, nil
}

var errNotYet = errors.New("not connected yet")

// Announce tells the registry that a target takes connections on this node, now or
// when the registry is there, and again when that has started anew. answer, unless
// nil, is called with each answer, from a goroutine of Run.
func (c *Client) Announce(target string, instance uint64, noIR bool, answer func(Taken)) {
	c.change(&local{Announcement: Announcement{Target: target, Node: c.o.Node, Instance: instance, Up: true, NoIR: noIR}, answer: answer})
}

// Withdraw tells the registry that the target does not run here any more.
func (c *Client) Withdraw(target string) {
	c.mu.Lock()
	l := c.mine[target]
	c.mu.Unlock()
	if l != nil {
		a := l.Announcement
		a.Up = false
		c.change(&local{Announcement: a})
	}
}

// Flush waits until the registry has been told everything, as long as it is there, for
// d at most.
func (c *Client) Flush(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for c.due() != nil && c.connected() {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

func (c *Client) connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn != nil
}

func (c *Client) change(l *local) {
	c.mu.Lock()
	c.mine[l.Target] = l
	c.mu.Unlock()
	c.poke()
}

func (c *Client) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run keeps the connection until ctx ends.
func (c *Client) Run(ctx context.Context) {
	pause := c.o.BackoffMin
	for try := 0; ctx.Err() == nil; try++ {
		addr := c.o.Addrs[try%len(c.o.Addrs)]
		worked, err := c.session(ctx, addr)
		if ctx.Err() != nil {
			return
		}
		if worked {
			c.o.Logger.Info("the registry's news do not reach this node", "was_at", addr, "err", err)
			pause = c.o.BackoffMin
			continue
		}
		if (try+1)%len(c.o.Addrs) != 0 {
			continue
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		pause = min(2*pause, c.o.BackoffMax)
	}
}

// session connects to the registry at addr and watches until that fails; worked
// tells that it was there.
func (c *Client) session(ctx context.Context, addr string) (worked bool, err error) {
	dctx, cancel := context.WithTimeout(ctx, c.o.Attempt)
	conn, err := c.o.Dial(dctx, addr)
	cancel()
	if err != nil {
		c.set(nil, addr, err)
		return false, err
	}
	ctx, end := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	first := make(chan struct{})
	wg.Go(func() {
		if err := c.announce(ctx, conn, first); err != nil {
			end(err)
		}
	})
	for err == nil {
		if err = c.watch(ctx, conn); err == nil && !worked {
			worked = true
			c.set(conn, addr, nil)
			c.o.Logger.Info("watching the registry", "at", addr, "incarnation", c.Status().Incarnation)
			close(first)
		}
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	end(nil)
	c.set(nil, addr, err)
	if cerr := conn.Close(); cerr != nil {
		c.o.Logger.Debug("close a connection to the registry", "err", cerr)
	}
	wg.Wait()
	return worked, err
}

func (c *Client) set(conn wire.Conn, addr string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn != nil || c.conn != nil {
		c.since = time.Now()
	}
	c.conn, c.at, c.err = conn, addr, err
}

// watch waits for one answer and passes it on.
func (c *Client) watch(ctx context.Context, conn wire.Conn) error {
	c.mu.Lock()
	w := Watch{Node: c.o.Node, Incarnation: c.have.Incarnation, Version: c.have.Version, Able: c.o.Able}
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, c.o.Quiet)
	defer cancel()
	b, err := ask(ctx, conn, wire.OpWatch, c.xid.Add(1), &w)
	if err != nil {
		return err
	}
	n, err := decodeNews(b, &w)
	if err != nil {
		c.mu.Lock()
		c.have = News{} // the whole table, then
		c.mu.Unlock()
		return err
	}
	c.mu.Lock()
	anew := n.Incarnation != w.Incarnation
	if anew {
		clear(c.table)
	}
	l := n.Targets[:0]
	for _, t := range n.Targets {
		// No registry tells of more, in however many answers.
		if _, known := c.table[t.Name]; known || len(c.table) < maxTargets {
			c.table[t.Name] = t
			l = append(l, t)
		}
	}
	n.Targets = nil
	c.have = n
	c.mu.Unlock()
	if anew {
		c.poke() // what runs here is to be announced again
	}
	for _, t := range l {
		if t.Up && !t.NoIR && c.o.Able {
			c.o.OnNews(t)
		}
	}
	return nil
}

// announce tells the registry what it does not know, from when first is closed until
// ctx ends. It is the first to be told who watches: without that its state were worse.
func (c *Client) announce(ctx context.Context, conn wire.Conn, first <-chan struct{}) error {
	select {
	case <-first:
	case <-ctx.Done():
		return nil
	}
	for {
		for l := c.due(); l != nil; l = c.due() {
			if err := c.tell(ctx, conn, l); err != nil {
				return err
			}
		}
		select {
		case <-c.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// due is what is to be announced next, by name; nil if there is nothing.
func (c *Client) due() (l *local) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range c.mine {
		if x.told != c.have.Incarnation && (l == nil || x.Target < l.Target) {
			l = x
		}
	}
	return l
}

func (c *Client) tell(ctx context.Context, conn wire.Conn, l *local) error {
	ctx, cancel := context.WithTimeout(ctx, c.o.Attempt)
	defer cancel()
	b, err := ask(ctx, conn, wire.OpAnnounce, c.xid.Add(1), &l.Announcement)
	if err != nil {
		return err
	}
	t, err := decodeTaken(b)
	if err != nil {
		return err
	}
	c.mu.Lock()
	if l.told == 0 {
		l.first = t
	}
	l.told = t.Incarnation
	other := t.Incarnation != c.have.Incarnation
	if !l.Up && c.mine[l.Target] == l {
		delete(c.mine, l.Target)
	}
	c.mu.Unlock()
	if other {
		return errOther // the connection is to one registry, so the answer is none
	}
	c.o.Logger.Debug("announced to the registry", "target", l.Target, "instance", l.Instance, "up", l.Up, "state", t.State, "version", t.Version, "late", t.Late)
	if l.answer != nil {
		l.answer(t)
	}
	return nil
}

var errOther = errors.New("the message is of another node or registry")

// ClientStatus is what a node knows of the registry's table.
type ClientStatus struct {
	// Connected to the registry at At, or not and At was the last attempt, since Since;
	// Err is why not.
	Connected bool
	At        string
	Since     time.Time
	Err       error
	Able      bool
	// Of the table that the node has, as it was with the last answer.
	Incarnation, Version uint64
	State                State
	Targets              []Target // by name
}

// Status returns what the node has.
func (c *Client) Status() ClientStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := ClientStatus{
		Connected: c.conn != nil, At: c.at, Since: c.since, Err: c.err, Able: c.o.Able,
		Incarnation: c.have.Incarnation, Version: c.have.Version, State: c.have.State,
	}
	for _, t := range c.table {
		s.Targets = append(s.Targets, t)
	}
	slices.SortFunc(s.Targets, func(a, b Target) int { return cmp.Compare(a.Name, b.Name) })
	return s
}

// Announced returns the registry's first answer about a target of this node, when it
// had started; false if there was none.
func (c *Client) Announced(target string) (Taken, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.mine[target]; l != nil && l.told != 0 {
		return l.first, true
	}
	return Taken{}, false
}

// Ask gets the table's figures from the registry.
func (c *Client) Ask(ctx context.Context) (Status, error) {
	c.mu.Lock()
	conn, err := c.conn, c.err
	c.mu.Unlock()
	if conn == nil {
		return Status{}, err
	}
	b, err := ask(ctx, conn, wire.OpWatchers, c.xid.Add(1), nil)
	if err != nil {
		return Status{}, err
	}
	return decodeStatus(b)
}
