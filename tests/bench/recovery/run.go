package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// plan says what one run does.
type plan struct {
	ops, clients int // operations of all clients together
	dead         bool
	window       time.Duration
	step         time.Duration // that progress gives; 0 for the default
	ahead        int
	// kill is how the target's node ends before it goes on at another one, away later;
	// empty: it is started again where it was. told: the registry tells frontends of that,
	// and the window is shortened to factor tenths.
	kill   string
	away   time.Duration
	told   bool
	factor int
	// measured, if not nil, is called when the recovery begins, and what it returns
	// when it is over.
	measured func() func()
}

// result is what one run has measured.
type result struct {
	opened   time.Duration // to read the store
	served   time.Duration // from the start of the target to the last frontend's first new answer
	replay   time.Duration // from the first replay to the end of recovery
	cpu      time.Duration // of the process, meanwhile
	replayed uint64
	ahead    int // the most replays that a frontend had unanswered
}

// depth is how many operations are outstanding while they are made.
const depth = 64

var errWrong = errors.New("wrong result")

// frontend is a client with a directory of its own.
type frontend struct {
	*client.FS
	n     int // it makes operations 0..n-1: creates and, after each, a chmod of the same file
	addr  byte
	dir   wire.FID
	calls atomic.Uint32
}

func mode(file int) uint32 { return 0o400 | uint32(file)%0o400 }

// call executes a request as it comes from an NFS client.
func (f *frontend) call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	if req.Op.Modifies() {
		x := f.calls.Add(1)
		req.Key = wire.ReplyKey{Addr: [16]byte{f.addr}, Port: 7, XID: x, Proc: 3<<8 | 1, Sum: uint64(x)}
	}
	if f.Call(ctx, client.Owner{}, req, rep); rep.Status != wire.OK {
		return fmt.Errorf("operation %d: %w", req.Op, rep.Status)
	}
	return nil
}

func (f *frontend) create(ctx context.Context, name string) (wire.FID, error) {
	req := wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: f.dir, Name: []byte(name), How: wire.Guarded}
	var rep wire.Reply
	if err := f.call(ctx, &req, &rep); err != nil {
		return wire.FID{}, err
	}
	f.Created(rep.Attr.FID, rep.Transno)
	return rep.Attr.FID, nil
}

// work makes the operations, several at a time.
func (f *frontend) work(ctx context.Context, workers int) error {
	errs := make([]error, workers)
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(2)) - 2
				if i >= f.n {
					return
				}
				fid, err := f.create(ctx, fmt.Sprint("f", i/2))
				if err == nil && i+1 < f.n {
					req := wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: fid, SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: mode(i / 2)}}
					err = f.call(ctx, &req, &wire.Reply{})
				}
				errs[w] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// check compares the directory, as from sees it, with the operations; it has the file
// "new" if f has survived, otherwise nothing.
func (f *frontend) check(ctx context.Context, from *frontend, survived bool) error {
	want := map[string]uint32{}
	if survived {
		want["new"] = 0
		for i := 0; i < f.n; i += 2 {
			want[fmt.Sprint("f", i/2)] = 0
			if i+1 < f.n {
				want[fmt.Sprint("f", i/2)] = mode(i / 2)
			}
		}
	}
	total := len(want)
	var cookie uint64
	for eof := false; !eof; {
		req := wire.Request{Header: wire.Header{Op: wire.OpReaddir}, FID: f.dir, Cookie: cookie, Count: 1 << 20, Plus: true}
		var rep wire.Reply
		if err := from.call(ctx, &req, &rep); err != nil {
			return err
		}
		for i := range rep.Entries {
			e := &rep.Entries[i]
			cookie = e.Cookie
			if e.Type == wire.TypeDir {
				continue
			}
			m, ok := want[string(e.Name)]
			if !ok || !e.HasAttr || e.Attr.Mode != m {
				return fmt.Errorf("%w: %s with mode %o, want it (%v) with %o", errWrong, e.Name, e.Attr.Mode, ok, m)
			}
			delete(want, string(e.Name))
		}
		eof = rep.EOF
	}
	if len(want) > 0 {
		return fmt.Errorf("%w: %d of %d files are missing", errWrong, len(want), total)
	}
	return nil
}

// run lets frontends make operations, crashes the target, and measures until they
// are served again; it checks that everything is there.
func (p plan) run(ctx context.Context) (res result, err error) {
	if p.dead && p.clients < 2 {
		return res, errors.New("with one frontend dead there is none to measure")
	}
	r, err := newRig(ctx, p)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, r.close(context.WithoutCancel(ctx))) }()
	b, err := r.begin(ctx)
	defer b.abandon()
	if err != nil {
		return res, err
	}
	fs := b.fs
	if err := r.crash(); err != nil {
		return res, err
	}
	alive := fs
	if p.dead {
		alive = fs[:p.clients-1]
		if err := fs[p.clients-1].Abandon(); err != nil {
			return res, err
		}
	}
	runtime.GC()
	over := func() {}
	if p.measured != nil {
		over = sync.OnceFunc(p.measured())
		defer over()
	}
	before, start := cpuTime(), time.Now()
	if err := r.start(ctx); err != nil {
		return res, err
	}
	res.opened = time.Since(start)
	if err := each(alive, func(f *frontend) error {
		_, err := f.create(ctx, "new")
		return err
	}); err != nil {
		return res, err
	}
	res.served = time.Since(start)
	over()
	res.cpu = cpuTime() - before
	st := r.mdt.Front().Status().Recovery
	res.replay, res.replayed, res.ahead = st.End.Sub(time.Unix(0, r.first.Load())), st.Replayed, int(r.most.Load())
	return res, b.checkAll(ctx, alive, st)
}

// bench are the frontends of a run.
type bench struct {
	r       *rig
	fs      []*frontend
	evicted atomic.Int32
}

// begin connects the frontends and has them make operations that are not durable. What
// it returns is to be abandoned, also with an error.
func (r *rig) begin(ctx context.Context) (*bench, error) {
	p := r.p
	b := &bench{r: r, fs: make([]*frontend, p.clients)}
	for i := range b.fs {
		c, err := r.frontend(ctx, i, func() { b.evicted.Add(1) })
		if err != nil {
			return b, err
		}
		f := &frontend{FS: c, addr: byte(i + 1), n: p.ops / p.clients}
		if i < p.ops%p.clients {
			f.n++
		}
		b.fs[i] = f
		req := wire.Request{Header: wire.Header{Op: wire.OpMkdir, Flags: wire.FlagWaitCommit}, FID: wire.RootFID, Name: fmt.Append(nil, i),
			SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o755}}
		var rep wire.Reply
		if err := f.call(ctx, &req, &rep); err != nil {
			return b, err
		}
		f.dir = rep.Attr.FID
	}
	r.hold()
	if err := each(b.fs, func(f *frontend) error { return f.work(ctx, max(1, depth/p.clients)) }); err != nil {
		return b, err
	}
	for i, f := range b.fs {
		if n := f.MDTImport().Stats().Uncommitted; n != f.n {
			return b, fmt.Errorf("%w: frontend %d keeps %d operations for replay, want %d", errWrong, i, n, f.n)
		}
	}
	return b, nil
}

// abandon gives the frontends up; their epochs are open.
func (b *bench) abandon() {
	for _, f := range b.fs {
		if f != nil {
			_ = f.Abandon()
		}
	}
}

// checkAll checks that everything of the frontends that live was replayed, and is there.
func (b *bench) checkAll(ctx context.Context, alive []*frontend, st recov.Status) error {
	want := 0
	for _, f := range alive {
		want += f.n
	}
	if st.Replayed != uint64(want) || st.Failed != 0 || b.evicted.Load() != 0 {
		return fmt.Errorf("%w: %d operations were replayed, want %d; %d failed, %d frontends were evicted", errWrong, st.Replayed, want, st.Failed, b.evicted.Load())
	}
	for i, f := range alive {
		if s := f.MDTImport().State(); s != imp.Full {
			return fmt.Errorf("%w: the import of frontend %d is %v", errWrong, i, s)
		}
	}
	for i, f := range b.fs {
		if err := f.check(ctx, b.fs[0], i < len(alive)); err != nil {
			return fmt.Errorf("directory of frontend %d: %w", i, err)
		}
	}
	return nil
}

// each calls do for all at a time.
func each(fs []*frontend, do func(*frontend) error) error {
	errs := make([]error, len(fs))
	var wg sync.WaitGroup
	for i, f := range fs {
		wg.Go(func() { errs[i] = do(f) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// cpuTime is what the process has used so far.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
