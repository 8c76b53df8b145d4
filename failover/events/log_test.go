package events

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func open(t *testing.T, o Options) *Log {
	t.Helper()
	l, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func reopen(t *testing.T, l *Log) *Log {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, l.o)
}

func seqs(es []Event) string {
	var b strings.Builder
	for i := range es {
		fmt.Fprintf(&b, "%d ", es[i].Seq)
	}
	return strings.TrimSpace(b.String())
}

var full = Event{
	Kind: Stage, Addr: netip.MustParseAddr("2001:db8::7"), VIP: 3, Epoch: 9, Move: 4, Stage: "drain",
	From: "a", To: "b", Reason: "move", Took: 1500 * time.Microsecond,
	Attrs: map[string]string{Replies: "12"}, Err: "late",
}

// TestRestart: the log goes on where it ended, with everything that events say.
func TestRestart(t *testing.T) {
	l := open(t, Options{Node: "a", Path: filepath.Join(t.TempDir(), "events")})
	first := l.Append(full)
	if first.Seq != 1 || first.Node != "a" || first.Time.IsZero() {
		t.Errorf("appended %+v", first)
	}
	l = reopen(t, l)
	second := l.Append(Event{Kind: Node, Node: "c"})
	if second.Seq != 2 || second.Node != "c" {
		t.Errorf("appended %+v", second)
	}
	l = reopen(t, l)
	es, next := l.Since(0)
	if d := cmp.Diff([]Event{first, second}, es, cmpopts.EquateComparable(netip.Addr{})); d != "" || next != 2 {
		t.Errorf("next %d, -want +got:\n%s", next, d)
	}
	if n := es[0].Int(Replies); n != 12 {
		t.Errorf("replies %d", n)
	}
}

// TestJSON fixes the form that others read.
func TestJSON(t *testing.T) {
	e := full
	e.Seq, e.Node, e.Time = 7, "a", time.Unix(1, 5).UTC()
	b, err := json.Marshal(&e)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"seq":7,"time":"1970-01-01T00:00:01.000000005Z","node":"a","kind":"stage","addr":"2001:db8::7","vip":3,"epoch":9,"move":4,"stage":"drain","from":"a","to":"b","took":1500000,"reason":"move","attrs":{"replies":"12"},"err":"late"}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	b, err = json.Marshal(&Event{Seq: 1, Time: e.Time, Node: "a", Kind: Node})
	if want := `{"seq":1,"time":"1970-01-01T00:00:01.000000005Z","node":"a","kind":"node"}`; err != nil || string(b) != want {
		t.Errorf("%v, got  %s\nwant %s", err, b, want)
	}
}

// TestDamagedFile: what a power cut or a stranger has left is skipped, and what follows is not lost by it.
func TestDamagedFile(t *testing.T) {
	for name, tail := range map[string]string{
		"torn":               `{"seq":4,"time":"2026-01-01T0`,
		"older seq, torn":    `{"seq":3,"time":"2026-01-01T00:00:00Z","node":"a","kind":"node"}`,
		"zeros":              string(make([]byte, 4096)),
		"not JSON":           "hello\n",
		"wrong types":        `{"seq":"x","attrs":[1]}` + "\n",
		"long line":          strings.Repeat("x", 3*maxLine) + "\n",
		"long line, torn":    strings.Repeat("x", 3*maxLine),
		"older seq":          `{"seq":1,"time":"2026-01-01T00:00:00Z","node":"a","kind":"fence"}` + "\n",
		"negative seq":       `{"seq":-1}` + "\n",
		"deep":               strings.Repeat("[", 20000) + "\n",
		"nothing but an end": "\n",
	} {
		t.Run(name, func(t *testing.T) {
			l := open(t, Options{Node: "a", Path: filepath.Join(t.TempDir(), "events")})
			for range 3 {
				l.Append(Event{Kind: Node})
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(l.o.Path, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString(tail); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			l = open(t, l.o)
			if e := l.Append(Event{Kind: Fence}); e.Seq != 4 {
				t.Errorf("seq %d, want 4", e.Seq)
			}
			l = reopen(t, l)
			es, _ := l.Since(0)
			if got := seqs(es); got != "1 2 3 4" || es[3].Kind != Fence {
				t.Errorf("got %s, %+v", got, es)
			}
		})
	}
}

// TestBounds: neither memory nor files grow without end, and the last events are what is kept.
func TestBounds(t *testing.T) {
	o := Options{Node: "a", Path: filepath.Join(t.TempDir(), "events"), Ring: 8, MaxBytes: 64 << 10}
	l := open(t, o)
	const n = 3000
	for i := range n {
		l.Append(Event{Kind: Node, Reason: strings.Repeat("r", 50)})
		if i%8 == 7 {
			// In time for the ring.
			waitWritten(t, l)
		}
	}
	es, next := l.Since(0)
	if len(es) < 8 || len(es) > 16 || es[len(es)-1].Seq != n || next != n {
		t.Errorf("%d events, next %d", len(es), next)
	}
	l = reopen(t, l)
	var total int64
	for _, p := range []string{o.Path, o.Path + ".1"} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		total += st.Size()
	}
	if total > o.MaxBytes || total < o.MaxBytes/4 {
		t.Errorf("%d bytes of files, bound %d", total, o.MaxBytes)
	}
	o.Ring = 1000
	l = reopen(t, l)
	if e := l.Append(Event{Kind: Node}); e.Seq != n+1 {
		t.Errorf("seq %d", e.Seq)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, o)
	es, _ = l.Since(0)
	for i := 1; i < len(es); i++ {
		if es[i].Seq != es[i-1].Seq+1 {
			t.Fatalf("gap behind %d", es[i-1].Seq)
		}
	}
	if len(es) < 100 || es[len(es)-1].Seq != n+1 {
		t.Errorf("%d events in the files", len(es))
	}
}

func waitWritten(t *testing.T, l *Log) {
	t.Helper()
	for range 30_000 {
		l.mu.Lock()
		done := l.written == l.last
		l.mu.Unlock()
		if done {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
	t.Fatal("events are not written")
}

// TestEventBounds: one event cannot be large, and becomes valid JSON.
func TestEventBounds(t *testing.T) {
	l := open(t, Options{Path: filepath.Join(t.TempDir(), "events")})
	long := strings.Repeat("ä", 100_000) + "\xff"
	attrs := map[string]string{}
	for i := range 1000 {
		attrs[fmt.Sprint(i, long)] = long
	}
	l.Append(Event{Node: long, Kind: long, Stage: long, From: long, To: long, Reason: "\xffa\n" + long, Err: long, Attrs: attrs})
	l.Append(Event{Kind: Node})
	l = reopen(t, l)
	es, _ := l.Since(0)
	if len(es) != 2 || len(es[0].Reason) > maxText || !strings.HasPrefix(es[0].Reason, "?a\nä") || !strings.HasSuffix(es[0].Reason, "ä...") {
		t.Fatalf("%d events: %q", len(es), es[0].Reason)
	}
	b, err := os.ReadFile(l.o.Path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.IndexByte(b, '\n'); n > maxLine {
		t.Errorf("a line of %d bytes", n)
	}
}

// TestSince: a follower that knows a log that was removed gets the new one from its start.
func TestSince(t *testing.T) {
	l := open(t, Options{})
	for range 5 {
		l.Append(Event{Kind: Node})
	}
	for seq, want := range map[uint64]string{0: "1 2 3 4 5", 3: "4 5", 5: "", 6: "1 2 3 4 5"} {
		es, next := l.Since(seq)
		if got := seqs(es); got != want || next != 5 {
			t.Errorf("since %d: %q, next %d", seq, got, next)
		}
	}
	es, _ := l.Since(4)
	es[0].Kind = "mine"
	if es, _ := l.Since(4); es[0].Kind != Node {
		t.Error("a caller changed the log")
	}
}

// TestWait: followers see every event once, in order, and wait without asking.
func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, Options{})
		var wg sync.WaitGroup
		got := make([]string, 3)
		for i := range got {
			wg.Go(func() {
				var all []Event
				next := uint64(0)
				for {
					es, n, err := l.Wait(t.Context(), next)
					if errors.Is(err, ErrClosed) {
						break
					}
					if err != nil {
						t.Error(err)
						return
					}
					all, next = append(all, es...), n
				}
				got[i] = seqs(all)
			})
		}
		for range 5 {
			synctest.Wait()
			l.Append(Event{Kind: Node})
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if es, next, err := l.Wait(ctx, 5); len(es) > 0 || next != 5 || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, %d, %v", es, next, err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		for i := range got {
			if got[i] != "1 2 3 4 5" {
				t.Errorf("follower %d: %s", i, got[i])
			}
		}
		if e := l.Append(Event{Kind: Node}); e.Seq != 0 {
			t.Error("appended to a closed log")
		}
	})
}

// TestConcurrent: appenders from many goroutines get numbers of their own, all of which are in the file.
func TestConcurrent(t *testing.T) {
	l := open(t, Options{Node: "a", Path: filepath.Join(t.TempDir(), "events")})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				l.Append(Event{Kind: Node})
			}
		})
	}
	wg.Wait()
	l = reopen(t, l)
	es, _ := l.Since(0)
	for i := range es {
		if es[i].Seq != uint64(i+1) {
			t.Fatalf("event %d has seq %d", i, es[i].Seq)
		}
	}
	if len(es) != 800 {
		t.Errorf("%d events", len(es))
	}
}

// TestUnwritable: events go on in memory when the file cannot be rotated, and get into the file later.
func TestUnwritable(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Options{Node: "a", Path: filepath.Join(dir, "events"), MaxBytes: 4 << 10})
	// A directory that is not empty in the place of the older file.
	if err := os.MkdirAll(filepath.Join(dir, "events.1", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 40 {
		l.Append(Event{Kind: Node, Reason: strings.Repeat("r", 100)})
		waitTurn(l)
	}
	if es, _ := l.Since(0); len(es) != 40 {
		t.Errorf("%d events in memory", len(es))
	}
	l.mu.Lock()
	before := int(l.written)
	l.mu.Unlock()
	if err := os.RemoveAll(filepath.Join(dir, "events.1")); err != nil {
		t.Fatal(err)
	}
	l.Append(Event{Kind: Fence})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.o.MaxBytes = 64 << 10
	l = open(t, l.o)
	es, _ := l.Since(0)
	// A turn that was under way has rotated the file once more than this event.
	if n := len(es); n != 41 && n != 41-before || es[n-1].Kind != Fence {
		t.Errorf("%d events in the files", len(es))
	}
}

// TestFileGone: a file that is not there any more, because a new one could not be opened or somebody has removed it,
// is made anew when it would have been rotated.
func TestFileGone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	l := open(t, Options{Node: "a", Path: path, MaxBytes: 4 << 10})
	l.Append(Event{Kind: Node})
	waitTurn(l)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for range 40 {
		l.Append(Event{Kind: Node, Reason: strings.Repeat("r", 100)})
		waitTurn(l)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, l.o)
	if es, _ := l.Since(0); len(es) == 0 || es[len(es)-1].Seq != 41 {
		t.Errorf("%d events in the files", len(es))
	}
}

// waitTurn waits until the writer has taken the last kick.
func waitTurn(l *Log) {
	for len(l.kick) > 0 {
		time.Sleep(100 * time.Microsecond)
	}
}

func TestOpenErrors(t *testing.T) {
	if _, err := Open(Options{Path: filepath.Join(t.TempDir(), "no", "events")}); err == nil || !strings.Contains(err.Error(), "writable") {
		t.Errorf("%v", err)
	}
	if _, err := Open(Options{Path: t.TempDir()}); err == nil {
		t.Error("a directory was opened as a log")
	}
}

// TestNil: without a log nothing is kept and nothing breaks.
func TestNil(t *testing.T) {
	var l *Log
	l.Append(full)
	if es, next := l.Since(0); es != nil || next != 0 {
		t.Error(es, next)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.Wait(ctx, 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
