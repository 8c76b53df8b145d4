package recov

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/baton-nfs/baton/recovery/wire"
)

// msg is a request's handle in transcripts.
type msg struct {
	who   string
	xid   uint64
	op    string
	ended bool
}

func (m *msg) String() string {
	if m.xid == 0 {
		return m.who + " connect"
	}
	return fmt.Sprintf("%s#%d", m.who, m.xid)
}

// peer is a client in transcripts: it follows the protocol's rules for lists,
// the script says when.
type peer struct {
	id       wire.ClientID
	gen, xid uint64
	conn     uint64
	instance uint64
	told     uint64
	known    uint64 // last committed
	slots    map[uint64]uint16
	list     []*peerOp // answered, in transno order
	open     []*peerOp // not answered, in XID order
}

type peerOp struct {
	req  Request
	op   string
	sent bool // replayed in this connection
}

type world struct {
	t     testing.TB
	cfg   Config
	now   time.Time
	s     *store
	m     *Machine
	peers map[string]*peer
	conns uint64
	out   strings.Builder

	hold     bool // executions wait for finish
	held     []Action
	failPut  bool
	holdPut  bool
	lazyDel  bool     // a crash may lose ActDelClient
	puts     []Action // wait for finish-put
	loseRep  bool
	loseReq  bool
	tempFail bool
	pre      map[uint64][4]uint64 // by transno
}

var hexName = regexp.MustCompile(`client 4([0-9])[0-9]{6}`)

var epoch = time.Unix(1_000_000, 0)

func newWorld(t testing.TB) *world {
	w := &world{t: t, now: epoch, s: newStore(), peers: map[string]*peer{}, pre: map[uint64][4]uint64{}}
	w.s.log = append(w.s.log, entry{target: &TargetRecord{}})
	w.s.committed = 1
	return w
}

func (w *world) p(format string, args ...any) { fmt.Fprintf(&w.out, "  "+format+"\n", args...) }

func (w *world) boot() {
	w.s.crash()
	w.m = w.s.open(w.cfg)
	w.held, w.hold = nil, false
	w.acts(w.m.Start(w.now))
}

func (w *world) peer(name string) *peer {
	p := w.peers[name]
	if p == nil {
		p = &peer{gen: 1, slots: map[uint64]uint16{}}
		copy(p.id[:], name+strings.Repeat(name, 3))
		w.peers[name] = p
	}
	return p
}

// acts carries out actions; the list is the machine's and short-lived.
func (w *world) acts(list []Action) {
	for _, a := range slices.Clone(list) {
		switch a.Kind {
		case ActLog:
			w.p("log: %s", hexName.ReplaceAllStringFunc(a.Text, func(s string) string { return "client " + string('@'+s[8]-'0') }))
		case ActWindowStart:
			w.p("window until %s", a.Deadline.Sub(epoch))
		case ActWindowExtend:
			w.p("window extended to %s", a.Deadline.Sub(epoch))
		case ActRecoveryEnd:
			w.p("recovery ended, new transnos after %d", a.Transno)
		case ActPutTarget:
			w.s.append(entry{target: &a.Target})
			w.s.committed = len(w.s.log)
			if a.Target.Clean {
				w.p("marked clean")
			}
		case ActPutClient:
			if a.Ticket == 0 {
				w.s.append(entry{put: &a.Entry})
				what := fmt.Sprintf("local=%t", a.Entry.Local)
				if a.Entry.FailedAt != 0 {
					what = "failed"
				}
				w.p("client %s gen %d is marked %s", a.Client[:1], a.Gen, what)
				continue
			}
			if w.holdPut {
				w.puts = append(w.puts, a)
				continue
			}
			ok := !w.failPut
			w.failPut = false
			if ok {
				w.s.append(entry{put: &a.Entry})
				w.s.committed = len(w.s.log)
			}
			w.p("put client %s gen %d: %t", a.Client[:1], a.Gen, ok)
			w.acts(w.m.Stored(a.Client, a.Ticket, ok, w.now))
		case ActDelClient:
			w.s.append(entry{del: &a.Client})
			if !w.lazyDel {
				w.s.committed = len(w.s.log)
			}
			w.p("delete client %s gen %d evicted=%t", a.Client[:1], a.Gen, a.Evicted)
		case ActCommit:
			w.p("commit wanted")
		case ActConnected:
			h := a.Handle.(*msg)
			w.end(h)
			w.p("%s: connected instance=%d known=%t recovering=%t transno=%d committed=%d", h, a.Instance, a.Known, a.Recovering, a.Transno, a.LastCommitted)
			if w.loseRep {
				w.p("the answer is lost")
				continue
			}
			w.peer(h.who).connected(&a)
		case ActDrop:
			w.end(a.Handle.(*msg))
			w.p("%s: dropped", a.Handle)
		case ActReply:
			w.reply(&a)
		case ActExecute:
			w.p("%s: execute%s%s", a.Handle, map[bool]string{true: " replay"}[a.Replay], tno(a.Req.Transno))
			if a.Ticket == 0 {
				w.reply(&Action{Handle: a.Handle})
				continue
			}
			if w.hold {
				w.held = append(w.held, a)
				continue
			}
			w.execute(a)
		}
	}
}

func tno(t uint64) string {
	if t == 0 {
		return ""
	}
	return fmt.Sprintf(" t=%d", t)
}

func (w *world) execute(a Action) {
	h := a.Handle.(*msg)
	var res Result
	switch {
	case w.tempFail:
		w.tempFail = false
		res = Result{Ticket: a.Ticket, Status: wire.ErrJukebox, NotDone: true}
	case a.Req.Class == ClassLock || a.Req.Class == ClassWait:
		res = Result{Ticket: a.Ticket}
	default:
		last, _ := w.s.lastTransno()
		res = w.s.execute(&a, h.op, fmt.Sprintf("%s: %s", h, h.op), max(last+1, w.m.NextTransno()))
		if res.Transno != 0 && !a.Replay {
			w.pre[res.Transno] = res.PreVersions
		}
	}
	w.acts(w.m.Executed(res, w.now))
}

func (w *world) end(h *msg) {
	if h.ended {
		w.t.Errorf("%s is ended twice", h)
	}
	h.ended = true
}

func (w *world) reply(a *Action) {
	h := a.Handle.(*msg)
	w.end(h)
	extra := tno(a.Transno)
	if a.Reconstructed {
		extra += fmt.Sprintf(" reconstructed %q", a.Data)
		if len(a.Data) > 0 && !strings.HasPrefix(string(a.Data), h.String()+":") {
			w.t.Errorf("%s gets the answer of %s", h, a.Data)
		}
	}
	if a.WaitCommit {
		extra += " when durable"
	}
	w.p("%s: %s%s", h, a.Status.String(), extra)
	if w.loseRep {
		w.p("the answer is lost")
		return
	}
	p := w.peer(h.who)
	if a.Status == wire.ErrUnknownClient {
		p.instance, p.told, p.known, p.list, p.open = 0, 0, 0, nil, nil
	}
	i := slices.IndexFunc(p.open, func(o *peerOp) bool { return o.req.XID == h.xid })
	if i < 0 || a.Status >= wire.ErrStaleVIP || a.Status == wire.ErrJukebox {
		return
	}
	o := p.open[i]
	p.open = slices.Delete(p.open, i, i+1)
	if a.Transno != 0 {
		p.told = max(p.told, a.Transno)
		o.req.Transno, o.sent = a.Transno, true
		p.list = append(p.list, o)
		slices.SortFunc(p.list, func(a, b *peerOp) int { return int(a.req.Transno) - int(b.req.Transno) })
		o.req.PreVersions = w.pre[a.Transno] // come with the answer
	}
}

func (p *peer) connected(a *Action) {
	if a.Instance != p.instance {
		for _, o := range p.list {
			o.sent = false
		}
	}
	p.instance, p.known = a.Instance, a.LastCommitted
	p.list = slices.DeleteFunc(p.list, func(o *peerOp) bool { return o.req.Transno <= a.LastCommitted })
}

// send gives a request to the target, unless it is lost on the way.
func (w *world) send(p *peer, name string, r Request, op string) {
	if w.loseReq {
		w.p("the request is lost")
		return
	}
	r.Client, r.Gen, r.Conn = p.id, p.gen, p.conn
	r.Handle = &msg{who: name, xid: r.XID, op: op}
	w.acts(w.m.Request(r, w.now))
}

var boolOpts = []string{"lose-request", "lose-reply", "wait-commit"}

func (w *world) line(line string) {
	f := strings.Fields(line)
	opt := map[string]string{}
	f = slices.DeleteFunc(f, func(s string) bool {
		k, v, ok := strings.Cut(s, "=")
		if ok || slices.Contains(boolOpts, s) {
			opt[k] = v
			return true
		}
		return false
	})
	num := func(k string, def uint64) uint64 {
		if s, ok := opt[k]; ok {
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				w.t.Fatalf("%s: %v", line, err)
			}
			return n
		}
		return def
	}
	dur := func(s string) time.Duration {
		d, err := time.ParseDuration(s)
		if err != nil {
			w.t.Fatalf("%s: %v", line, err)
		}
		return d
	}
	_, w.loseReq = opt["lose-request"]
	_, w.loseRep = opt["lose-reply"]
	defer func() { w.loseReq, w.loseRep = false, false }()
	switch f[0] {
	case "config":
		w.cfg = Config{
			SoftMin: 10 * time.Second, SoftMax: 40 * time.Second, Hard: 60 * time.Second, Step: 5 * time.Second,
			PingInterval: 5 * time.Second, PingTimeout: 30 * time.Second, MaxSlots: int(num("slots", 8)),
			MaxClients: int(num("clients", 0)), CommitOnShare: num("cos", 0) == 1,
		}
	case "boot", "crash":
		w.boot()
	case "commit":
		n := num("to", 1<<62)
		for w.s.committed < len(w.s.log) && w.s.log[w.s.committed].transno <= n {
			w.s.committed++
		}
		_, d := w.s.lastTransno()
		w.m.Committed(d)
		w.p("durable to %d", d)
	case "after": // time passes, the target's timers run
		w.now = w.now.Add(dur(f[1]))
		w.acts(w.m.Tick(w.now))
	case "wake": // sleep until the target wants it
		if at, ok := w.m.NextTick(w.now); ok {
			w.now = at
			w.p("at %s", at.Sub(epoch))
			w.acts(w.m.Tick(w.now))
		} else {
			w.p("no timer")
		}
	case "hold":
		w.hold = true
	case "finish":
		w.hold = false
		list := w.held
		w.held = nil
		for _, a := range list {
			w.execute(a)
		}
	case "fail-put":
		w.failPut = true
	case "lazy-del":
		w.lazyDel = true
	case "hold-put":
		w.holdPut = true
	case "finish-put": // the oldest
		a := w.puts[0]
		w.puts = w.puts[1:]
		w.holdPut = false
		w.acts([]Action{a})
		w.holdPut = true
	case "in-progress":
		w.tempFail = true
	case "evict":
		ok, acts := w.m.Evict(w.peer(f[1]).id, w.now)
		w.p("evict: %t", ok)
		w.acts(acts)
	case "abort":
		ok, acts := w.m.Abort(w.now)
		w.p("abort: %t", ok)
		w.acts(acts)
	case "shorten": // all clients are told, N tenths are enough
		n, err := strconv.Atoi(f[1])
		if err != nil {
			w.t.Fatalf("%s: %v", line, err)
		}
		w.acts(w.m.Shorten(n, w.now))
	case "stop":
		w.acts(w.m.Stop(w.now))
	case "bypass": // an operation that the machine does not know of
		last, _ := w.s.lastTransno()
		op := strings.Join(f[1:], " ")
		res := w.s.execute(&Action{}, op, fmt.Sprintf("bypass %d: %s", last+1, op), max(last+1, w.m.NextTransno()))
		w.p("%s t=%d", res.Status, res.Transno)
	case "status":
		s := w.m.Status()
		w.p("%s clients=%d connected=%d finished=%d evicted=%d registered=%d", s.State, s.Clients, s.Connected, s.Finished, s.Evicted, s.Registered)
		if s.Tenths != 0 && s.State == StateRecovering {
			w.p("told, %d/10 until %s", s.Tenths, s.Deadline.Sub(epoch))
		}
		w.p("replayed=%d locks=%d failed=%d queued=%d gaps=%d vbr=%t aborted=%t next=%d", s.Replayed, s.LockReplays, s.Failed, s.Queued, s.Gaps, s.VersionRecovery, s.Aborted, s.NextTransno)
	case "reconnects":
		w.p("%v", w.m.Status().Reconnects)
	case "names":
		var l []string
		for n := range w.s.names {
			l = append(l, n)
		}
		slices.Sort(l)
		w.p("%s", strings.Join(l, " "))
	default:
		w.clientLine(f, opt, num, dur)
	}
}

func (w *world) clientLine(f []string, opt map[string]string, num func(string, uint64) uint64, dur func(string) time.Duration) {
	name, p := f[0], w.peer(f[0])
	switch f[1] {
	case "connect":
		w.conns++
		if _, old := opt["conn"]; !old {
			p.conn = w.conns
		}
		c := Connect{
			Client: p.id, Gen: num("gen", p.gen), Conn: num("conn", p.conn), Instance: num("instance", p.instance), Transno: p.told,
			LastCommitted: num("committed", p.known), Local: num("local", 0) == 1, Own: num("own", 0) == 1, Handle: &msg{who: name},
		}
		if e, ok := opt["estimate"]; ok {
			c.Estimate = dur(e)
		}
		if w.loseReq {
			w.p("the request is lost")
			return
		}
		w.acts(w.m.Connect(c, w.now))
	case "down": // the connection breaks
		w.acts(w.m.ConnLost(p.id, p.conn, w.now))
	case "reboot":
		*p = peer{id: p.id, gen: p.gen + 1, xid: p.xid + 1000, slots: map[uint64]uint16{}}
	case "disconnect":
		p.xid++
		w.acts(w.m.Disconnect(p.id, p.gen, num("conn", p.conn), &msg{who: name, xid: p.xid}, w.now))
	case "ping", "read":
		p.xid++
		w.send(p, name, Request{XID: p.xid, Class: map[string]Class{"ping": ClassPing, "read": ClassRead}[f[1]]}, f[1])
	case "last":
		p.xid++
		w.send(p, name, Request{XID: p.xid, Class: ClassPing, Flags: wire.FlagLastReplay}, "last")
	case "lock", "wait": // replay of a lock
		r := Request{XID: num("xid", 0), Class: ClassLock, Flags: wire.FlagReplay, Transno: num("t", 0)}
		if f[1] == "wait" {
			r.Class = ClassWait
		}
		w.send(p, name, r, f[1])
	case "replay":
		// The next of the list, or the number given, or all.
		for i := 0; i < len(p.list); i++ {
			o := p.list[i]
			if t, ok := opt["t"]; ok && t != fmt.Sprint(o.req.Transno) || !ok && o.sent {
				continue
			}
			o.sent = true
			r := o.req
			r.Flags |= wire.FlagReplay
			w.send(p, name, r, o.op)
			if len(f) < 3 {
				return
			}
		}
	case "resend":
		for _, o := range slices.Clone(p.open) {
			r := o.req
			r.Flags |= wire.FlagResend
			w.send(p, name, r, o.op)
		}
	case "raw": // anything: slot= xid= t=, with "replay" as FlagReplay
		r := Request{XID: num("xid", 0), Slot: uint16(num("slot", 0)), Transno: num("t", 0), Class: ClassModify}
		if slices.Contains(f, "replay") {
			r.Flags |= wire.FlagReplay
		}
		if slices.Contains(f, "open") {
			r.Class = ClassOpen
		}
		old := *p
		p.conn, p.gen = num("conn", p.conn), num("gen", p.gen)
		w.send(p, name, r, "touch /")
		p.conn, p.gen = old.conn, old.gen
	default: // an operation
		p.xid++
		var slot uint16
		if s, ok := opt["slot"]; ok {
			n, _ := strconv.Atoi(s)
			slot = uint16(n)
		} else { // the lowest that no open request uses
			for slices.ContainsFunc(p.open, func(o *peerOp) bool { return o.req.Slot == slot }) {
				slot++
			}
		}
		o := &peerOp{req: Request{XID: p.xid, Slot: slot, Class: ClassModify}, op: strings.Join(f[1:], " ")}
		p.open = append(p.open, o)
		if _, ok := opt["wait-commit"]; ok {
			o.req.Flags |= wire.FlagWaitCommit
		}
		w.send(p, name, o.req, o.op)
	}
}

var scenarioID = regexp.MustCompile(`^(RS|SM|RD|RV|RO|IN|CS|SN|HX RD|HX RV|HX RS|own) \d+[a-z]?$`)

// TestScenarios runs testdata/*.txt. The first line of each section names the
// scenarios by the ids of Lustre's test suites: "# RS 0a, RD 0b: title".
func TestScenarios(t *testing.T) {
	covered := map[string][]string{}
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		if filepath.Ext(path) != ".txt" {
			return
		}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			w := newWorld(t)
			w.line("config")
			lines := strings.Split(strings.TrimSpace(d.Input), "\n")
			ids, _, ok := strings.Cut(strings.TrimPrefix(lines[0], "# "), ": ")
			if !ok || lines[0][0] != '#' {
				d.Fatalf(t, "no title: %q", lines[0])
			}
			for _, id := range strings.Split(ids, ", ") {
				if id != "-" && !scenarioID.MatchString(id) {
					d.Fatalf(t, "%q is no scenario id", id)
				}
				if id != "-" && !slices.Contains(covered[id], filepath.Base(path)) {
					covered[id] = append(covered[id], filepath.Base(path))
				}
			}
			for _, line := range lines[1:] {
				if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
					continue
				}
				fmt.Fprintln(&w.out, line)
				w.line(line)
			}
			return w.out.String()
		})
	})
	if t.Failed() {
		return
	}
	var list []string
	for id, files := range covered {
		list = append(list, fmt.Sprintf("%s\t%s", id, strings.Join(files, ", ")))
	}
	slices.Sort(list)
	const path = "testdata/scenarios.list"
	got := strings.Join(list, "\n") + "\n"
	if os.Getenv("WRITE_SCENARIOS") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(path); err != nil || string(want) != got {
		t.Errorf("%s is not up to date (%v); run with WRITE_SCENARIOS=1; scenarios now:\n%s", path, err, got)
	}
}
