package owner

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"
)

// DefaultInterval is the time between heartbeats.
const DefaultInterval = time.Second

// Clock gives the time in nanoseconds, above 0, of a steady clock that also runs
// while the machine sleeps, and timers.
type Clock struct {
	Now func() int64
	// AfterFunc calls f once in d, from any goroutine, unless stopped.
	AfterFunc func(d time.Duration, f func()) (stop func() bool)
}

// Storage holds the file of records.
type Storage interface {
	// Read reads up to len(p) bytes from the file's start, as they are on the
	// storage now. Nothing, if there is no file.
	Read(p []byte) (int, error)
	// Write writes p at off durably, making the file if need be. p begins at a page
	// boundary and has BlockSize bytes.
	Write(p []byte, off int64) error
	// Close frees what the Storage holds; neither Read nor Write is under way.
	Close() error
}

// Options of Open. Node and Dir, or Storage, are required.
type Options struct {
	// Node is this node's name.
	Node string
	// Dir is the target's directory; Storage replaces it, and is closed with the
	// Owner.
	Dir     string
	Storage Storage
	// Interval between heartbeats, the same on all nodes that may own the store.
	// Default DefaultInterval, at most MaxInterval.
	Interval time.Duration
	// Check, Wait, Fenced and Exclusive are as in Config.
	Check, Wait bool
	Fenced      string
	Exclusive   bool
	// OnLost is called once when ownership is lost, with what it was lost by, from
	// the Owner's goroutine: it must not wait for Release or Close.
	OnLost func(error)
	// OnWanted is called from there when another node waits for the store, about
	// once per interval while it does. It must not block.
	OnWanted func(node string)
	Clock    Clock     // default BootClock
	Rand     io.Reader // of the incarnation; default crypto/rand
	Boot     string    // id of the running kernel; default the machine's
	Logger   *slog.Logger
}

func (o *Options) defaults() error {
	if o.Clock.Now == nil {
		o.Clock = BootClock()
	}
	if o.Rand == nil {
		o.Rand = crand.Reader
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Interval <= 0 {
		o.Interval = DefaultInterval
	}
	switch {
	case o.Node == "" || len(o.Node) > maxNameLen:
		return errors.New("a node name of at most 255 bytes is needed")
	case o.Interval > MaxInterval:
		return fmt.Errorf("heartbeats every %v are too rare: at most %v", o.Interval, MaxInterval)
	case o.Dir == "" && o.Storage == nil:
		return errors.New("no directory")
	}
	if o.Boot == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return fmt.Errorf("boot id: %w", err)
		}
		o.Boot = strings.TrimSpace(string(b))
	}
	if o.Storage == nil {
		s, err := NewFileStorage(o.Dir)
		if err != nil {
			return err
		}
		o.Storage = s
	}
	return nil
}

// lost is Owner.until when the store is not owned any more.
const lost = -1

// Owner is the ownership of a store. Its methods are safe for concurrent use.
type Owner struct {
	o      Options
	until  atomic.Int64 // by the clock: owned before; 0: not yet; lost
	ending atomic.Bool  // Release or Close was called
	told   atomic.Bool  // the result of that was given to a caller
	rec    Record
	prev   *Record

	events chan event
	expiry chan struct{} // Valid has found that the time is over
	opened chan error
	exited chan struct{}
	left   error // result of Release, once exited is closed

	// Of the loop.
	m     *Machine
	buf   []byte // FileSize bytes at a page boundary
	snap  Snapshot
	busy  bool // the storage is being accessed
	over  bool // nothing more will happen
	timer func() bool
}

// event is an input of the loop.
type event struct {
	kind evKind
	n    int   // bytes read
	err  error // result, or reason
}

type evKind uint8

const (
	evRead evKind = iota
	evWrote
	evTick
	evCancel
	evRelease
	evClose
)

// Open makes this node the owner of a store, as doc.go says: it takes at least the
// settle time, and the watch time if the last owner has not released the store. The
// error is a *HeldError if another node is alive with it; with Wait, that is
// waited for until ctx ends.
func Open(ctx context.Context, o Options) (*Owner, error) {
	if err := o.defaults(); err != nil {
		return nil, fmt.Errorf("own store: %w", err)
	}
	c := Config{Node: o.Node, Boot: o.Boot, Interval: o.Interval, Check: o.Check, Wait: o.Wait, Fenced: o.Fenced, Exclusive: o.Exclusive,
		Generation: uint64(time.Now().Unix())}
	if _, err := io.ReadFull(o.Rand, c.Incarnation[:]); err != nil {
		return nil, errors.Join(fmt.Errorf("own store: %w", err), o.Storage.Close())
	}
	w := &Owner{
		o: o, m: NewMachine(c), buf: pageBuffer(FileSize), events: make(chan event, 4), expiry: make(chan struct{}, 1),
		opened: make(chan error, 1), exited: make(chan struct{}), left: ErrNotOwner,
	}
	go w.loop()
	var err error
	select {
	case err = <-w.opened:
	case <-ctx.Done():
		w.send(event{kind: evCancel, err: ctx.Err()})
		err = <-w.opened
	}
	if err != nil {
		return nil, fmt.Errorf("own store: %w", err)
	}
	return w, nil
}

// Inspect reads the record in a target's directory and leaves it alone; nil if there
// is none that can be read.
func Inspect(dir string) (_ *Record, err error) {
	st, err := NewFileStorage(dir)
	if err != nil {
		return nil, fmt.Errorf("inspect ownership: %w", err)
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	b := pageBuffer(FileSize)
	n, err := st.Read(b)
	if err != nil {
		return nil, fmt.Errorf("inspect ownership: %w", err)
	}
	var s Snapshot
	s.decode(b[:n])
	return s.record(), nil
}

// pageBuffer makes n bytes that begin at a page boundary.
func pageBuffer(n int) []byte {
	b := make([]byte, n+BlockSize)
	off := -int(uintptr(unsafe.Pointer(&b[0]))) & (BlockSize - 1)
	return b[off : off+n : off+n]
}

// Valid tells whether the store is owned now. It costs a reading of the clock. Once
// it has been false it is false for good.
func (w *Owner) Valid() bool {
	for {
		u := w.until.Load()
		if u <= 0 {
			return false
		}
		if w.o.Clock.Now() < u {
			return true
		}
		if w.until.CompareAndSwap(u, lost) {
			select {
			case w.expiry <- struct{}{}:
			default:
			}
			return false
		}
	}
}

// Check is nil while the store is owned, else ErrNotOwner.
func (w *Owner) Check() error {
	if w.Valid() {
		return nil
	}
	return ErrNotOwner
}

// Record is the record with which the store was taken.
func (w *Owner) Record() Record { return w.rec }

// Previous is the record that was there before: its State says whether the store
// was left in order. nil if there was none that could be read.
func (w *Owner) Previous() *Record { return w.prev }

// Release ends the ownership and marks the store as clean; everything that changes
// it must have ended. With an error the store was not marked, and others will wait
// before they take it: ErrNotOwner if it was lost before, else what went wrong. When
// ctx ends first, its error is returned and the mark may still be made.
func (w *Owner) Release(ctx context.Context) error {
	if err := w.end(ctx, evRelease); err != nil {
		return fmt.Errorf("release store: %w", err)
	}
	return nil
}

// Close ends the ownership like a crash: others will wait before they take the
// store. After Release or a loss it only waits, for an access to the storage that
// may be under way, until ctx ends.
func (w *Owner) Close(ctx context.Context) error {
	if err := w.end(ctx, evClose); err != nil && !errors.Is(err, ErrNotOwner) {
		return fmt.Errorf("leave store: %w", err)
	}
	return nil
}

func (w *Owner) end(ctx context.Context, kind evKind) error {
	w.ending.Store(true)
	w.until.Store(lost)
	w.send(event{kind: kind})
	select {
	case <-w.exited:
	case <-ctx.Done():
		return ctx.Err()
	}
	if w.told.Swap(true) {
		return ErrNotOwner
	}
	return w.left
}

func (w *Owner) send(e event) {
	select {
	case w.events <- e:
	case <-w.exited:
	}
}

// loop is the goroutine that drives the machine. It ends when the store is not
// owned any more and no access to the storage is under way.
func (w *Owner) loop() {
	defer close(w.exited)
	w.m.Start(w.o.Clock.Now())
	w.run()
	for !w.over || w.busy {
		select {
		case e := <-w.events:
			w.handle(e)
		case <-w.expiry:
			w.m.Expired()
		}
		w.run()
	}
	if w.timer != nil {
		w.timer()
	}
	if err := w.o.Storage.Close(); err != nil {
		w.o.Logger.Warn("closing the record of ownership failed", "err", err)
	}
}

func (w *Owner) handle(e event) {
	if e.kind == evRead || e.kind == evWrote {
		w.busy = false
	}
	if w.over {
		return
	}
	now := w.o.Clock.Now()
	switch e.kind {
	case evRead:
		if e.err == nil {
			w.snap.decode(w.buf[:e.n])
		}
		w.m.Read(now, &w.snap, e.err)
	case evWrote:
		w.m.Wrote(now, e.err)
	case evTick:
		w.m.Tick(now)
	case evCancel:
		w.m.Cancel(e.err)
	case evRelease:
		w.m.Release(now)
	case evClose:
		w.over, w.left = true, nil
	}
}

// run executes the machine's actions.
func (w *Owner) run() {
	for {
		lapsed := false
		acts := w.m.Actions()
		for i := range acts {
			lapsed = w.execute(&acts[i]) || lapsed
		}
		if !lapsed {
			return
		}
		w.m.Expired()
	}
}

// execute executes one action. It tells if the time was over before it came.
func (w *Owner) execute(a *Action) (lapsed bool) {
	if w.over {
		return false
	}
	switch a.Kind {
	case ActRead:
		w.access(func() event {
			n, err := w.o.Storage.Read(w.buf)
			return event{kind: evRead, n: n, err: err}
		})
	case ActWrite:
		w.write(&a.Record, int64(a.Slot)*BlockSize)
	case ActMark:
		w.write(&a.Record, markOffset)
	case ActTimer:
		if w.timer != nil {
			w.timer()
		}
		w.timer = w.o.Clock.AfterFunc(max(time.Duration(a.At-w.o.Clock.Now()), 0), func() { w.send(event{kind: evTick}) })
	case ActAcquired:
		w.rec, w.prev = a.Record, a.Prev
		w.until.Store(a.At)
		w.o.Logger.Info("store is owned", "node", w.o.Node, "generation", a.Record.Generation, "state", a.Record.State)
		w.opened <- nil
	case ActExtend:
		// Valid may have been faster: then there is nothing to extend.
		u := w.until.Load()
		return (u <= 0 || !w.until.CompareAndSwap(u, a.At)) && !w.ending.Load()
	case ActWanted:
		if w.o.OnWanted != nil {
			w.o.OnWanted(a.Record.Node)
		}
	case ActRefused:
		w.over = true
		w.opened <- a.Err
	case ActLost:
		w.over = true
		w.until.Store(lost)
		w.o.Logger.Error("store is lost", "node", w.o.Node, "generation", w.rec.Generation, "err", a.Err)
		if w.o.OnLost != nil {
			w.o.OnLost(a.Err)
		}
	case ActReleased:
		w.over, w.left = true, a.Err
		w.o.Logger.Info("store is released", "node", w.o.Node, "generation", w.rec.Generation, "err", a.Err)
	}
	return false
}

func (w *Owner) write(r *Record, off int64) {
	b := w.buf[:BlockSize]
	r.encode(b)
	w.access(func() event { return event{kind: evWrote, err: w.o.Storage.Write(b, off)} })
}

// access runs in a goroutine that the loop waits for.
func (w *Owner) access(f func() event) {
	w.busy = true
	go func() { w.events <- f() }()
}
