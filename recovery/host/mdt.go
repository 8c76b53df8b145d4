package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/mdt/ostsync"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// MDTOptions configure a metadata target. Name, Dir, OSTs and Clock are required.
type MDTOptions struct {
	Name string
	Dir  string
	// Engine and MDT configure the parts; what connects them is set here. With a
	// nil Engine.FS the store is on the operating system's file system.
	Engine local.Options
	MDT    mdt.Options
	// Owner is how the store's ownership is taken; nil: nobody else can see it.
	Owner *owner.Options
	// Owned is called when the store is owned and before it is opened; its error
	// ends the start.
	Owned    func(context.Context) error
	Recovery recov.Config
	// Pingless is front.Options.Pingless.
	Pingless bool
	// OSTs are the object targets and how they are reached, by index, and Import
	// configures the imports for that.
	OSTs   []client.Target
	Import imp.Config
	// Watched is client.Remote.Watched.
	Watched func(addr string) bool
	// Clock gives strictly rising nanoseconds since 1970.
	Clock  func() int64
	Logger *slog.Logger
	// OnFail is called once when the target fails. It must not block.
	OnFail func(error)
}

// MDT is a running metadata target.
type MDT struct {
	o      MDTOptions
	log    *slog.Logger
	own    *owner.Owner
	engine store.Engine
	body   *mdt.MDT
	front  *front.Front
	fs     *client.FS // the MDT's own client
	sync   *ostsync.Sync
	states atomic.Pointer[[]mdt.OSTState]
	seen   sync.Once
	all    chan struct{} // closed when all OSTs have answered at a time
	fail   failure
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// failure passes the first failure on, once.
type failure struct {
	mu   sync.Mutex
	err  error
	tell []func(error)
}

// set notes err if it is the first.
func (f *failure) set(err error) {
	f.mu.Lock()
	if f.err != nil {
		f.mu.Unlock()
		return
	}
	f.err = err
	tell := f.tell
	f.mu.Unlock()
	for _, fn := range tell {
		// From inside an operation that may hold the target's locks.
		go fn(err)
	}
}

// then has fn called with the failure, now if there was one.
func (f *failure) then(fn func(error)) {
	f.mu.Lock()
	err := f.err
	f.tell = append(f.tell, fn)
	f.mu.Unlock()
	if err != nil {
		go fn(err)
	}
}

func (f *failure) get() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// AgentID is the client by which a target works at other targets.
func AgentID(name string) (id wire.ClientID) {
	copy(id[:], name)
	return id
}

// StartMDT takes the store, waiting as o.Owner says until ctx ends, and begins to
// serve or to recover. It waits for no OST and for no client.
func StartMDT(ctx context.Context, o MDTOptions) (m *MDT, err error) {
	if o.Name == "" || o.Dir == "" || o.Clock == nil || len(o.OSTs) == 0 {
		return nil, errors.New("start MDT: name, directory, clock and OSTs are needed")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	m = &MDT{o: o, log: o.Logger.With("target", o.Name), all: make(chan struct{})}
	if o.OnFail != nil {
		m.fail.then(o.OnFail)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start %s in %s: %w", o.Name, o.Dir, err), m.close(context.Background()))
			m = nil
		}
	}()
	if m.own, err = takeStore(ctx, o.Owner, o.Owned, &m.fail); err != nil {
		return m, err
	}
	eo := o.Engine
	eo.OnFail = m.fail.set
	if m.own != nil {
		if eo.FS == nil {
			eo.FS = vfs.Default
		}
		eo.FS = owner.GuardVFS(eo.FS, m.own)
	}
	e, err := local.OpenPebble(o.Dir, eo)
	if err != nil {
		return m, err
	}
	m.engine = e
	if m.own != nil {
		m.engine = owner.GuardEngine(m.engine, m.own)
	}
	// Until they are asked they are taken for present: a file can wait for its OST.
	states := make([]mdt.OSTState, len(o.OSTs))
	for i := range states {
		states[i] = mdt.OSTState{Index: uint16(i), Up: true}
	}
	m.states.Store(&states)
	mo := o.MDT
	mo.Engine, mo.Clock, mo.Logger, mo.OnFail = m.engine, o.Clock, o.Logger, m.fail.set
	mo.OSTs = func() []mdt.OSTState { return *m.states.Load() }
	if m.body, err = mdt.Open(mo); err != nil {
		return m, err
	}
	m.fail.then(m.body.Fail)
	if m.front, err = front.New(front.Options{Name: o.Name, Body: m.body, Config: o.Recovery, Pingless: o.Pingless, Own: AgentID(o.Name), Logger: o.Logger, OnFail: m.fail.set}); err != nil {
		return m, err
	}
	m.fail.then(m.front.Fail)
	if err = m.agent(); err != nil {
		return m, err
	}
	run, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	m.wg.Go(func() { m.work(run) })
	m.wg.Go(func() { m.poll(run) })
	m.wg.Go(func() { m.ticks(run) })
	return m, nil
}

// takeStore takes a store's ownership, if it is to be owned, and calls owned.
func takeStore(ctx context.Context, o *owner.Options, owned func(context.Context) error, f *failure) (own *owner.Owner, err error) {
	if o != nil {
		oo := *o
		oo.OnLost = func(err error) { f.set(fmt.Errorf("the store is lost: %w", err)) }
		if own, err = owner.Open(ctx, oo); err != nil {
			return nil, err
		}
	}
	if owned != nil {
		err = owned(ctx)
	}
	return own, err
}

// agent makes the MDT's own client: it works at the OSTs as any other client does.
func (m *MDT) agent() error {
	fs, err := client.NewRemote(client.Options{
		ID: AgentID(m.o.Name), Gen: m.front.Status().Recovery.Instance, Clock: m.o.Clock, Logger: m.o.Logger.With("client", m.o.Name),
	}, client.Remote{
		MDT: client.Target{Name: m.o.Name, Addrs: []string{"here"}, Dial: func(context.Context, string) (wire.Conn, error) {
			return wire.Local(m.front, wire.NextSession()), nil
		}},
		OSTs: m.o.OSTs, Import: m.o.Import, Watched: m.o.Watched,
	})
	if err != nil {
		return err
	}
	m.fs = fs
	m.sync = ostsync.New(m.body, fs, m.log)
	return nil
}

// work does at the OSTs what is to be done there, once recovery is over.
func (m *MDT) work(ctx context.Context) {
	for ctx.Err() == nil {
		if err := m.fs.Connect(ctx); err != nil {
			m.log.Debug("not yet connected to itself", "err", err)
			continue
		}
		m.sync.Run(ctx)
	}
}

const (
	// pollEvery is how often the OSTs are asked for their space.
	pollEvery = time.Second
	// lookEvery is how often it is looked whether one has come or gone.
	lookEvery = 50 * time.Millisecond
)

// poll keeps what the allocation of objects knows of the OSTs.
func (m *MDT) poll(ctx context.Context) {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	away, was := make([]bool, len(m.o.OSTs)), make([]bool, len(m.o.OSTs))
	for n := 0; ; n++ {
		for i := range away {
			away[i] = m.fs.Away(i)
		}
		if n%int(pollEvery/lookEvery) == 0 || !slices.Equal(away, was) {
			m.askOSTs(away)
			copy(was, away)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// askOSTs asks those OSTs that are not away for their space.
func (m *MDT) askOSTs(away []bool) {
	type question struct {
		req wire.Request
		rep wire.Reply
	}
	var wg sync.WaitGroup
	qs := make([]question, len(m.o.OSTs))
	for i := range qs {
		q := &qs[i]
		if away[i] {
			q.rep.Status = wire.ErrTargetDown
			continue
		}
		q.req.Op, q.req.Flags = wire.OpStatfs, wire.FlagNoWait
		wg.Add(1)
		m.fs.SubmitOST(i, &q.req, &q.rep, wg.Done)
	}
	wg.Wait()
	states := make([]mdt.OSTState, len(qs))
	for i := range qs {
		states[i] = mdt.OSTState{Index: uint16(i), Up: qs[i].rep.Status == wire.OK, Free: qs[i].rep.Statfs.Avail}
	}
	m.states.Store(&states)
	if !slices.ContainsFunc(states, func(s mdt.OSTState) bool { return !s.Up }) {
		m.seen.Do(func() { close(m.all) })
	}
}

// ticks lets windows of the lock table end.
func (m *MDT) ticks(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := m.body.TickLocks(); err != nil && !m.body.Down() {
			m.log.Error("lock table", "err", err)
		}
	}
}

// Name is the target's.
func (m *MDT) Name() string { return m.o.Name }

// Front is the target in service.
func (m *MDT) Front() *front.Front { return m.front }

// Body is the metadata target itself.
func (m *MDT) Body() *mdt.MDT { return m.body }

// Sync is what works at the OSTs.
func (m *MDT) Sync() *ostsync.Sync { return m.sync }

// OSTs is what the target knows of the object targets, by index.
func (m *MDT) OSTs() []mdt.OSTState { return slices.Clone(*m.states.Load()) }

// AllThere is closed once all OSTs have answered: then files are made on all.
func (m *MDT) AllThere() <-chan struct{} { return m.all }

// FS is the target's own client.
func (m *MDT) FS() *client.FS { return m.fs }

// Notice passes the news that an object target runs at addr, as the instance (0: not
// told), to this target's import of it. It does not block.
func (m *MDT) Notice(target string, instance uint64, addr string) {
	if target != m.o.Name { // its own client is in this process, wherever that is
		m.fs.Notice(target, instance, addr)
	}
}

// Err is why the target has failed, or nil.
func (m *MDT) Err() error { return m.fail.get() }

// Stop ends service in order; ctx bounds how long is waited for what is being
// executed. The store is given up in any case.
func (m *MDT) Stop(ctx context.Context) error {
	err := m.close(ctx)
	if err != nil {
		return fmt.Errorf("stop %s: %w", m.o.Name, err)
	}
	return nil
}

func (m *MDT) close(ctx context.Context) error {
	var errs []error
	if m.cancel != nil {
		m.cancel()
	}
	if m.fs != nil {
		// Its imports may be waiting for OSTs; it leaves nothing behind that would matter.
		errs = append(errs, m.fs.Abandon())
	}
	m.wg.Wait()
	clean := m.fail.get() == nil
	if m.front != nil {
		if err := m.front.Stop(ctx); err != nil {
			clean = false
			errs = append(errs, err)
		}
	}
	if m.body != nil {
		errs = append(errs, m.body.Close())
	}
	if m.engine != nil {
		errs = append(errs, m.engine.Close())
	}
	errs = append(errs, leaveStore(ctx, m.own, clean && errors.Join(errs...) == nil))
	return errors.Join(errs...)
}

// leaveStore gives a store's ownership up, marked clean if nothing is left undone.
func leaveStore(ctx context.Context, own *owner.Owner, clean bool) error {
	switch {
	case own == nil:
		return nil
	case clean:
		return own.Release(ctx)
	}
	return own.Close(ctx)
}
