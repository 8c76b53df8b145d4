package mdt

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// body is an MDT without a front on an engine that loses its end in a crash.
type body struct {
	t   testing.TB
	e   *logEngine
	m   *MDT
	o   Options
	now int64  // what the clock shows
	rnd uint32 // the next generation
}

func threeOSTs() []OSTState {
	return []OSTState{{Index: 0, Up: true, Free: 1 << 40}, {Index: 3, Up: true, Free: 1 << 40}, {Index: 7, Up: true, Free: 1 << 39}}
}

func newBody(t testing.TB, o Options) *body {
	b := &body{t: t, e: newLogEngine(), o: o, now: 1_000_000_000, rnd: 100}
	if b.o.OSTs == nil {
		b.o.OSTs = threeOSTs
	}
	b.open()
	t.Cleanup(func() { b.kill() })
	return b
}

// open starts the target, not yet its service.
func (b *body) open() {
	b.t.Helper()
	o := b.o
	o.Engine = b.e
	o.Clock = func() int64 { return b.now }
	o.Rand = func() uint32 { b.rnd++; return b.rnd }
	held := b.e.held
	b.e.allow()
	m, err := Open(o)
	if err != nil {
		b.t.Fatal(err)
	}
	b.m = m
	b.e.setHeld(held)
}

// begin is Begin while nothing keeps the log from becoming durable.
func (b *body) begin(transno uint64) {
	held := b.e.held
	b.e.allow()
	b.m.Begin(transno)
	b.e.setHeld(held)
}

// kill ends the process without a stop.
func (b *body) kill() {
	b.e.die()
	b.m.Fail(errors.New("killed"))
}

// crash loses all but the first n batches and starts again.
func (b *body) crash(n int) {
	b.t.Helper()
	b.kill()
	b.e = b.e.cut(n)
	b.open()
}

// restart stops in order and starts again.
func (b *body) restart() {
	b.t.Helper()
	held := b.e.held
	b.e.allow()
	if err := b.m.Close(); err != nil {
		b.t.Fatal(err)
	}
	b.e.setHeld(held)
	b.open()
}

// sync makes everything durable.
func (b *body) sync() {
	b.t.Helper()
	held := b.e.held
	b.e.allow()
	if err := b.m.Sync(); err != nil {
		b.t.Fatal(err)
	}
	b.e.setHeld(held)
}

// put registers a client durably.
func (b *body) put(id wire.ClientID, gen uint64) {
	b.t.Helper()
	ch := make(chan error, 1)
	held := b.e.held
	b.e.allow()
	b.m.PutClient(recov.ClientRecord{Client: id, Gen: gen, Instance: 1}, func(err error) { ch <- err })
	if err := <-ch; err != nil {
		b.t.Fatal("client", id, err)
	}
	b.e.setHeld(held)
}

// outcomeOf is an Execution: what became of a request.
type outcomeOf struct {
	t    testing.TB
	rep  wire.Reply
	res  recov.Result
	wait bool // Executed asks for the disk
	told atomic.Int32
	done chan struct{}
}

func (e *outcomeOf) Executed(res recov.Result) bool {
	if e.told.Add(1) != 1 {
		e.t.Error("Executed twice")
	}
	e.res = res
	return e.wait
}

func (e *outcomeOf) Done() {
	if e.told.Load() != 1 {
		e.t.Error("Done without Executed")
	}
	close(e.done)
}

// start executes a copy of a request.
func (b *body) start(req *wire.Request, x front.Exec, wait bool) *outcomeOf {
	e := &outcomeOf{t: b.t, wait: wait, done: make(chan struct{})}
	r := *req
	b.m.Execute(&r, &e.rep, x, e)
	return e
}

// ended tells whether the request is answered.
func (e *outcomeOf) ended() bool {
	select {
	case <-e.done:
		return true
	default:
		return false
	}
}

// execute waits for the answer; the log becomes durable if that is needed.
func (b *body) execute(req *wire.Request, x front.Exec) *outcomeOf {
	b.t.Helper()
	e := b.start(req, x, false)
	if !e.ended() {
		held := b.e.held
		b.e.allow()
		<-e.done
		b.e.setHeld(held)
	}
	return e
}

// ok is execute for what has to succeed.
func (b *body) ok(req *wire.Request, x front.Exec) *outcomeOf {
	b.t.Helper()
	e := b.execute(req, x)
	if e.rep.Status != wire.OK {
		b.t.Fatalf("op %d %q: %v", req.Op, req.Name, e.rep.Status)
	}
	return e
}

// replayOf is what a client keeps of an answered request.
func replayOf(req *wire.Request, rep *wire.Reply) *wire.Request {
	k := *req
	k.Flags &^= wire.FlagWaitCommit
	k.Flags |= wire.FlagReplay
	k.Transno, k.PreVersions = rep.Transno, rep.PreVersions
	imp.Identity(&k, rep)
	return &k
}

func replayExec(r *wire.Request) front.Exec {
	return front.Exec{Transno: r.Transno, CheckVersions: true, KeepSlot: r.Key.IsZero()}
}

// replay executes a kept request again.
func (b *body) replay(k *wire.Request) *outcomeOf {
	b.t.Helper()
	return b.execute(k, replayExec(k))
}

// sameAnswer compares two answers, but for what time does to them: access times
// that were only in the cache, and what was durable.
func sameAnswer(a, b *wire.Reply) string {
	at := cmpopts.IgnoreFields(wire.Attr{}, "Atime")
	return cmp.Diff(a, b, at, cmpopts.IgnoreFields(wire.Reply{}, "LastCommitted"), cmpopts.EquateEmpty())
}

// contents gives what is in a store, but for what may differ between two stores
// that have executed the same: the superblock, access times, and which slot of
// its ring a reply record is in.
func contents(t testing.TB, e store.Engine) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := iterate(e, nil, nil, func(k, v []byte) error {
		switch {
		case bytes.Equal(k, keySuper) || bytes.Equal(k, keyTarget):
		case bytes.Equal(k, keyState):
			s, err := DecodeState(v)
			if err != nil {
				return err
			}
			out["state"] = fmt.Sprint(s.Transno, s.Inodes)
		case k[0] == prefixInode:
			in, err := DecodeInode(wire.GetFID(k[1:]), v)
			if err != nil {
				return err
			}
			in.Attr.Atime = 0
			out[string(k)] = string(AppendInode(nil, in))
		case k[0] == target.ReplyPrefix:
			n := len(k) - 4
			out[string(k[:n])+string(v)] = ""
		default:
			out[string(k)] = string(v)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// diffContents describes how two stores differ.
func diffContents(got, want map[string]string) string {
	var d []string
	for k, v := range want {
		if w, ok := got[k]; !ok {
			d = append(d, fmt.Sprintf("missing %q", k))
		} else if w != v {
			d = append(d, fmt.Sprintf("%q is\n   %x, want\n   %x", k, w, v))
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			d = append(d, fmt.Sprintf("too much %q", k))
		}
	}
	slices.Sort(d)
	if len(d) > 10 {
		d = append(d[:10], fmt.Sprintf("and %d more", len(d)-10))
	}
	var b bytes.Buffer
	for _, l := range d {
		b.WriteString("\n  " + l)
	}
	return b.String()
}

// waitFor waits for what happens soon by itself.
func waitFor(t testing.TB, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not happen")
		}
	}
}
