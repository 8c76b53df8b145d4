package imp

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/baton-nfs/baton/recovery/wire"
)

// bench drives one machine by hand. Requests are named by XID, the machine's own
// by kind. Times are in milliseconds.
type bench struct {
	t         *testing.T
	m         *Machine
	reqs      map[string]*Request
	own       map[Kind]*Request
	attempt   uint64
	now       int64
	committed uint64
	b         strings.Builder
	completed map[*Request]int
}

func (b *bench) name(r *Request) string {
	switch r.Kind() {
	case Normal:
		return strconv.FormatUint(r.XID, 10)
	case Lock:
		return fmt.Sprintf("lock%d", r.XID)
	}
	return r.Kind().String()
}

func flagNames(f wire.Flags) (s string) {
	for _, n := range []struct {
		f wire.Flags
		n string
	}{{wire.FlagReplay, " REPLAY"}, {wire.FlagResend, " RESEND"}, {wire.FlagLastReplay, " LAST_REPLAY"}} {
		if f&n.f != 0 {
			s += n.n
		}
	}
	return s
}

func (b *bench) drain() {
	for _, a := range b.m.Actions() {
		b.b.WriteString("  ")
		switch a.Kind {
		case ActSend:
			if a.Req.Kind() != Normal {
				b.own[a.Req.Kind()] = a.Req
				if a.Req.Kind() == Lock {
					b.reqs[b.name(a.Req)] = a.Req
				}
			}
			fmt.Fprintf(&b.b, "send %s", b.name(a.Req))
			if a.Req.Slot() != 0 {
				fmt.Fprintf(&b.b, " slot=%d", a.Req.Slot())
			}
			if a.Flags&wire.FlagReplay != 0 && a.Req.Transno() != 0 {
				fmt.Fprintf(&b.b, " transno=%d", a.Req.Transno())
			}
			b.b.WriteString(flagNames(a.Flags))
		case ActComplete:
			if b.completed[a.Req]++; b.completed[a.Req] > 1 {
				b.t.Errorf("%s completed twice", b.name(a.Req))
			}
			fmt.Fprintf(&b.b, "complete %s %v", b.name(a.Req), a.Status)
			if a.Kept {
				b.b.WriteString(" kept")
			}
			if !a.FromTarget {
				b.b.WriteString(" (import)")
			}
		case ActRelease:
			fmt.Fprintf(&b.b, "release %s", b.name(a.Req))
		case ActLost:
			fmt.Fprintf(&b.b, "LOST %s", b.name(a.Req))
			if a.Kept {
				b.b.WriteString(" (epoch only)")
			}
		case ActConnect:
			b.attempt = a.Connect.Attempt
			fmt.Fprintf(&b.b, "connect addr=%d instance=%d transno=%d committed=%d waited=%dms", a.Addr,
				a.Connect.Instance, a.Connect.Transno, a.Connect.LastCommitted, a.Connect.Waited.Milliseconds())
		case ActAbort:
			b.b.WriteString("abort connect")
		case ActDrop:
			b.b.WriteString("drop connection")
		case ActLocks:
			b.b.WriteString("ask for locks")
		case ActTimer:
			fmt.Fprintf(&b.b, "timer %d", a.At/1e6)
		case ActState:
			b.b.WriteString(a.State.String())
		case ActEvent:
			fmt.Fprintf(&b.b, "log: %s", a.Event)
		}
		b.b.WriteByte('\n')
	}
}

func parseStatus(t *testing.T, s string) wire.Status {
	for st := wire.Status(0); st < 21000; st++ {
		if st.String() == s {
			return st
		}
	}
	t.Fatalf("no status %q", s)
	return 0
}

func parseEpoch(s string) wire.FID {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		panic(err)
	}
	return wire.FID{Seq: 2, OID: uint32(n)}
}

// line executes one input.
func (b *bench) line(l string) {
	b.b.WriteString(l + "\n")
	words, kv := []string{}, map[string]string{}
	for _, w := range strings.Fields(l) {
		if k, v, ok := strings.Cut(w, "="); ok {
			kv[k] = v
		} else {
			words = append(words, w)
		}
	}
	num := func(k string, def uint64) uint64 {
		v, ok := kv[k]
		if !ok {
			return def
		}
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			b.t.Fatalf("%s: %v", l, err)
		}
		return n
	}
	ms := func(k string, def uint64) time.Duration { return time.Duration(num(k, def)) * time.Millisecond }
	has := func(w string) bool {
		for _, x := range words[1:] {
			if x == w {
				return true
			}
		}
		return false
	}
	status := func() wire.Status {
		if s, ok := kv["status"]; ok {
			return parseStatus(b.t, s)
		}
		return wire.OK
	}
	get := func(n string) *Request {
		for _, k := range []Kind{Ping, Sync, LastReplay} {
			if n == k.String() {
				return b.own[k]
			}
		}
		if r := b.reqs[n]; r != nil {
			return r
		}
		b.t.Fatalf("%s: no request %q", l, n)
		return nil
	}
	if v, ok := kv["t"]; ok {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			b.t.Fatal(err)
		}
		b.now = n * 1e6
	}
	if words[0] != "new" {
		b.m.Advance(b.now)
	}
	switch words[0] {
	case "new":
		b.m = New(Config{
			Addrs: int(num("addrs", 1)), Slots: int(num("slots", 8)),
			Soft: int64(num("soft", 1000)), Hard: int64(num("hard", 2000)),
			PingInterval: ms("ping", 1000), DeadAfter: ms("dead", 3000),
			RequestTimeout: ms("timeout", 0), ConnectTimeout: ms("connect", 500),
			BackoffMin: 100 * time.Millisecond, BackoffMax: 800 * time.Millisecond, RetryDelay: 200 * time.Millisecond,
			ReplayWindow: int(num("window", 1)), Locks: has("locks"),
		})
		b.reqs, b.own, b.now, b.committed = map[string]*Request{}, map[Kind]*Request{}, 0, 0
		b.completed = map[*Request]int{}
	case "full": // start and connect to instance 1, without a transcript
		b.m.Start(b.now)
		for _, a := range b.m.Actions() {
			if a.Kind == ActConnect {
				b.attempt = a.Connect.Attempt
			}
		}
		b.m.Connected(b.now, b.attempt, ConnectResult{Instance: 1, Pingless: has("pingless")})
		b.m.Actions()
	case "start":
		b.m.Start(b.now)
	case "connected":
		b.committed = num("committed", b.committed)
		used := b.m.Connected(b.now, b.attempt, ConnectResult{
			Status: status(), Instance: num("instance", 1), Known: has("known"), Recovering: has("recovering"),
			Transno: num("transno", 0), LastCommitted: b.committed, Local: has("local"), Pingless: has("pingless"),
		})
		if !used {
			b.b.WriteString("  (connection not used)\n")
		}
	case "connect-failed":
		b.m.ConnectFailed(b.now, b.attempt)
	case "submit":
		for _, w := range words[2:] {
			x, err := strconv.ParseUint(w, 10, 64)
			if err != nil {
				continue
			}
			r := &Request{
				XID: x, Modifies: words[1] == "w", WaitCommit: has("commit"), OpensEpoch: has("opens"),
				NoWait: has("nowait"), Long: has("long"), Leaves: has("leaves"), Bytes: int64(num("bytes", 100)),
			}
			if c, ok := kv["closes"]; ok {
				r.Closes = []wire.FID{parseEpoch(c)}
			}
			b.reqs[w] = r
			b.m.Submit(r)
		}
	case "reply":
		b.committed = max(b.committed, num("committed", b.committed))
		tr := num("transno", 0)
		for _, w := range words[1:] {
			o := Outcome{Status: status(), Transno: tr, LastCommitted: num("committed", b.committed)}
			if e, ok := kv["epoch"]; ok {
				o.Epoch = parseEpoch(e)
			}
			b.m.Reply(get(w), o)
			if tr != 0 {
				tr++
			}
		}
	case "fail":
		for _, w := range words[1:] {
			if w != "never-sent" {
				b.m.Failed(get(w), has("never-sent"))
			}
		}
	case "tick":
		b.m.Tick(b.now)
	case "notice":
		addr := -1
		if _, ok := kv["addr"]; ok {
			addr = int(num("addr", 0))
		}
		b.m.Notice(b.now, num("instance", 0), addr, int(num("addrs", 0)))
	case "watched":
		b.m.Watched(words[1] == "on")
	case "down":
		b.m.Down(b.now)
	case "locks":
		b.m.Locks(int(num("n", 0)))
	case "cancel":
		b.m.Cancel(get(words[1]), wire.ErrTargetDown)
	case "forget":
		b.m.ForgetEpoch(parseEpoch(kv["epoch"]))
	case "deactivate":
		b.m.Deactivate()
	case "activate":
		b.m.Activate(b.now)
	case "close":
		b.m.Close()
	case "stats":
		s := b.m.Stats()
		fmt.Fprintf(&b.b, "  %v waiting=%d unanswered=%d uncommitted=%d epochs=%d held=%d free-slots=%d\n", b.m.State(),
			s.Waiting, s.Unanswered, s.Uncommitted, s.OpenEpochs, s.HeldBytes, s.FreeSlots)
	default:
		b.t.Fatalf("unknown input %q", l)
	}
	b.drain()
}

// TestGolden runs the transcripts. Each run starts with a machine of its own;
// its first line names the scenarios that it covers.
func TestGolden(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			b := &bench{t: t}
			if d.Cmd != "run" {
				t.Fatalf("unknown command %q", d.Cmd)
			}
			for _, l := range strings.Split(strings.TrimSpace(d.Input), "\n") {
				b.line(strings.TrimSpace(l))
			}
			return b.b.String()
		})
	})
}
