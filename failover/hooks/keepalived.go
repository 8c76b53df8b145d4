package hooks

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// maxLine bounds a line of keepalived's fifo.
const maxLine = 1024

// Change is a change of state that keepalived tells.
type Change struct {
	Kind  string // "INSTANCE" or "GROUP"
	Name  string
	State string
}

// ParseChange reads a line of keepalived's notify fifo:
//
//	INSTANCE "VI_1" MASTER 150
func ParseChange(line string) (Change, error) {
	kind, rest, ok := strings.Cut(strings.TrimSpace(line), " ")
	if !ok || kind != "INSTANCE" && kind != "GROUP" || len(line) > maxLine {
		return Change{}, fmt.Errorf("line %.80q is none of keepalived's vrrp notifications", line)
	}
	rest = strings.TrimSpace(rest)
	if !strings.HasPrefix(rest, `"`) {
		return Change{}, fmt.Errorf("line %.80q has no name in quotes", line)
	}
	end := strings.LastIndexByte(rest, '"')
	f := strings.Fields(rest[end+1:])
	if end <= 0 || len(f) == 0 {
		return Change{}, fmt.Errorf("line %.80q has no name and state", line)
	}
	return Change{kind, rest[1:end], f[0]}, nil
}

// keeperTimeout bounds calls that their Keeper does not bound: longer than any stage
// takes.
const keeperTimeout = 30 * time.Second

// Attend runs a Keeper until its context ends, or until want is closed and what was
// wanted last is settled. say is called for every line that there is to say. now and
// after are the clock.
func Attend(ctx context.Context, e *Env, k *Keeper, want <-chan Role, say func(Exit)) {
	type end struct {
		id  int
		r   vipctl.Result
		err error
	}
	ends := make(chan end, 1)
	running := 0
	drop := func() {}
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	defer func() {
		drop()
		for ; running > 0; running-- {
			<-ends
		}
	}()
	apply := func(a Actions) {
		if a.Drop {
			drop()
		}
		if a.Call != nil {
			c := *a.Call
			d := c.Within
			if d == 0 {
				d = keeperTimeout
			}
			cctx, cancel := context.WithTimeout(ctx, d)
			drop = cancel
			running++
			go func() {
				defer cancel()
				r, err := k.execute(cctx, e, c)
				if err != nil && cctx.Err() != nil {
					err = cctx.Err()
				}
				ends <- end{c.ID, r, err}
			}()
		}
		timer.Stop()
		if !a.Wake.IsZero() {
			timer.Reset(time.Until(a.Wake))
		}
		if a.Settled != nil {
			say(*a.Settled)
		}
	}
	for {
		if want == nil && k.Settled() {
			return
		}
		select {
		case r, ok := <-want:
			if !ok {
				want = nil
				continue
			}
			apply(k.Want(time.Now(), r))
		case x := <-ends:
			running--
			apply(k.Done(time.Now(), x.id, x.r, x.err))
		case <-timer.C:
			apply(k.Tick(time.Now()))
		case <-ctx.Done():
			return
		}
	}
}

// execute makes one call; it uses of k only what never changes.
func (k *Keeper) execute(ctx context.Context, e *Env, c Call) (vipctl.Result, error) {
	switch c.Op {
	case OpTake:
		return e.Baton.Take(ctx, vipctl.TakeArgs{Addr: k.addr, Stage: vipctl.StageServe, Force: c.Force})
	case OpDrain:
		return e.Baton.Release(ctx, vipctl.ReleaseArgs{Addr: k.addr, Stage: vipctl.StageDrain})
	case OpFinish:
		return e.Baton.Release(ctx, vipctl.ReleaseArgs{Addr: k.addr, Stage: vipctl.StageFinish})
	case OpCheck:
		return e.Baton.Check(ctx, vipctl.CheckArgs{Addr: k.addr})
	}
	if x := sweep(ctx, e, k.addr, false); x.Code != OK {
		return vipctl.Result{}, errors.New(x.Text)
	}
	return vipctl.Result{}, nil
}

// Demote hands addresses over to whoever becomes master when keepalived sees a
// value other than 0 in its track file, which write writes. It returns when they are
// not served here any more. If the context ends before, write is told 0 again, so
// that this node may stay master.
func Demote(ctx context.Context, e *Env, addrs []netip.Addr, write func(value int) error) Exit {
	if err := write(1); err != nil {
		return failed("track file: %v", err)
	}
	var left []string
	for {
		left = left[:0]
		for _, a := range addrs {
			r, err := e.Baton.Check(ctx, vipctl.CheckArgs{Addr: a})
			switch {
			case absent(err):
			case err != nil:
				left = append(left, why(a, "check", err))
			case r.State != vipctl.Absent && r.State != vipctl.Unknown && r.State != vipctl.Listening:
				left = append(left, line(a, r))
			}
		}
		if len(left) == 0 {
			return done("this node is demoted, and serves none of its addresses")
		}
		if ctx.Err() != nil {
			break
		}
		e.Sleep(ctx, poll)
		if ctx.Err() != nil {
			break
		}
	}
	text := strings.Join(left, "; ")
	if err := write(0); err != nil {
		return failed("nobody has taken all addresses (%s), and the track file cannot be set back: %v", text, err)
	}
	return failed("nobody has taken all addresses (%s): this node is not demoted any more; look at keepalived and baton on the others", text)
}

// Instances are the addresses of keepalived's instances and groups, by kind and
// name ("INSTANCE VI_1").
type Instances map[string][]netip.Addr

// Add enters "NAME=ADDRESS[,ADDRESS...]".
func (m Instances) Add(kind, s string) error {
	name, list, ok := strings.Cut(s, "=")
	if !ok || name == "" || list == "" {
		return fmt.Errorf("%q: write NAME=ADDRESS[,ADDRESS...]", s)
	}
	for f := range strings.SplitSeq(list, ",") {
		a, err := ParseAddr(f)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		m[kind+" "+name] = append(m[kind+" "+name], a)
	}
	return nil
}

// Follow reads keepalived's notify fifo and brings each address to what was said
// last of it. It returns when r ends and all is settled, or grace later, or when ctx
// ends. say is called by one goroutine at a time.
func Follow(ctx context.Context, e *Env, r io.Reader, m Instances, o KeeperOptions, grace time.Duration, say func(Exit)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	told := func(x Exit) {
		mu.Lock()
		defer mu.Unlock()
		say(x)
	}
	wants := map[netip.Addr]chan Role{}
	var wg sync.WaitGroup
	for _, addrs := range m {
		for _, a := range addrs {
			if wants[a] == nil {
				want := make(chan Role)
				wants[a] = want
				wg.Go(func() { Attend(ctx, e, NewKeeper(a, o), want, told) })
			}
		}
	}
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, maxLine), 4*maxLine)
	for ctx.Err() == nil && sc.Scan() {
		c, err := ParseChange(sc.Text())
		if err != nil {
			told(Exit{Failure, err.Error()})
			continue
		}
		role, ok := VRRPRole(c.State)
		if !ok {
			continue
		}
		for _, a := range m[c.Kind+" "+c.Name] {
			select {
			case wants[a] <- role:
			case <-ctx.Done():
			}
		}
	}
	if err := sc.Err(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		told(Exit{Failure, fmt.Sprintf("fifo: %v", err)})
	}
	for _, want := range wants {
		close(want)
	}
	stop := time.AfterFunc(grace, cancel)
	defer stop.Stop()
	wg.Wait()
}
