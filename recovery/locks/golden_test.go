package locks

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"github.com/baton-nfs/baton/recovery/wire"
)

// golden is the state of a transcript. Its commands, one a line:
//
//	at SECONDS                             set the clock (starts at 1000) and tick
//	lock|test|unlock|cancel OWNER FILE START-END [x] [block] [reclaim] [nomon]
//	share|unshare OWNER FILE MODE ACCESS [reclaim]
//	done ID accepted|refused|undelivered [HOST]
//	service VIP STATE [crashed] [forget] [window=SECONDS]
//	free HOST|* [STATE], monitor HOST, unmonitor HOST, notified HOST STATE, release ID, gone FILE
//	restart [damage=l|h|v|m]               load from the records, one of them damaged
//	list [FILE], grants VIP, info VIP, hosts, next
//
// OWNER is HOST or HOST.SVID, HOST a name with /VIP unless that is 1. After the
// result come the numbers of records put and deleted.
type golden struct {
	tb    *Table
	lim   Limits
	store map[string]string
	now   int64
}

func (g *golden) host(s string) wire.LockHost {
	h := wire.LockHost{VIP: 1, Addr: netip.MustParseAddr("10.0.0.1")}
	name, vip, ok := strings.Cut(s, "/")
	if n, _ := strconv.Atoi(vip); ok {
		h.VIP = uint32(n)
	}
	if name != "*" {
		h.Name = name
	}
	return h
}

func (g *golden) owner(s string) wire.LockOwner {
	name, vip, ok := strings.Cut(s, "/")
	name, svid, _ := strings.Cut(name, ".")
	if ok {
		name += "/" + vip
	}
	n, _ := strconv.Atoi(svid)
	return wire.LockOwner{LockHost: g.host(name), Svid: uint32(n), OH: "oh"}
}

func goldFID(s string) wire.FID { return wire.FID{Seq: 2, OID: uint32(s[0])} }

func showOwner(o wire.LockOwner) string {
	s := o.Name
	if o.Svid != 0 {
		s += fmt.Sprintf(".%d", o.Svid)
	}
	if o.VIP != 1 {
		s += fmt.Sprintf("/%d", o.VIP)
	}
	return s
}

func showHolder(h wire.LockHolder) string {
	what := h.Range.String()
	switch {
	case h.Share:
		what = fmt.Sprintf("share %d,%d", h.ShareMode, h.ShareAccess)
	case h.Exclusive:
		what += " x"
	}
	return fmt.Sprintf("#%d %c %s %s %v", h.ID, rune(h.FID.OID), showOwner(h.Owner), what, h.State)
}

func (g *golden) run(line string) (out string) {
	f := strings.Fields(line)
	has := func(w string) bool { return slices.Contains(f, w) }
	arg := func(key string) string {
		for _, w := range f {
			if v, ok := strings.CutPrefix(w, key+"="); ok {
				return v
			}
		}
		return ""
	}
	num := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			panic(line)
		}
		return n
	}
	a := &wire.LockArgs{Exclusive: has("x"), Block: has("block"), Reclaim: has("reclaim"), Monitor: !has("nomon"),
		Crashed: has("crashed"), Forget: has("forget")}
	var fid wire.FID
	switch f[0] {
	case "lock", "test", "unlock", "cancel":
		a.Owner, fid = g.owner(f[1]), goldFID(f[2])
		s, e, _ := strings.Cut(f[3], "-")
		a.Range.Start = uint64(num(s))
		if a.Range.End = wire.MaxLockOffset; e != "EOF" {
			a.Range.End = uint64(num(e))
		}
	case "share", "unshare":
		a.Owner, fid = g.owner(f[1]), goldFID(f[2])
		a.ShareMode, a.ShareAccess = uint8(num(f[3])), uint8(num(f[4]))
	}
	var st wire.Status
	var h wire.LockHolder
	switch f[0] {
	case "at":
		g.now = num(f[1]) * sec
		g.tb.Tick(g.now)
	case "lock":
		st, h = g.tb.Lock(g.now, fid, a)
	case "test":
		st, h = g.tb.Test(g.now, fid, a)
	case "unlock":
		st = g.tb.Unlock(g.now, fid, a)
	case "cancel":
		st = g.tb.Cancel(g.now, fid, a)
	case "share":
		st, h = g.tb.Share(g.now, fid, a)
	case "unshare":
		st = g.tb.Unshare(g.now, fid, a)
	case "done":
		id := uint64(num(f[1]))
		var host wire.LockHost
		if e := g.tb.ids.get(id); e != nil {
			host = e.o.h.key
		}
		if len(f) > 3 {
			host = g.host(f[3])
		}
		o := map[string]wire.GrantOutcome{"accepted": wire.GrantAccepted, "refused": wire.GrantRefused, "undelivered": wire.GrantUndelivered}
		st = g.tb.GrantDone(g.now, host, id, o[f[2]])
	case "service":
		a.NSMState = uint32(num(f[2]))
		a.Window = 90 * sec
		if w := arg("window"); w != "" {
			a.Window = num(w) * sec
		}
		out = fmt.Sprintf("%+v", g.tb.Service(g.now, uint32(num(f[1])), a))
	case "info":
		return fmt.Sprintf("%+v", g.tb.Service(g.now, uint32(num(f[1])), a))
	case "free":
		state := uint32(0)
		if len(f) > 2 {
			state = uint32(num(f[2]))
		}
		out = fmt.Sprintf("freed %d", g.tb.Free(g.now, g.host(f[1]), has("all"), state))
	case "monitor":
		st = g.tb.Monitor(g.now, g.host(f[1]), []byte("note"))
	case "unmonitor":
		st = g.tb.Unmonitor(g.now, g.host(f[1]))
	case "notified":
		st = g.tb.Notified(g.now, g.host(f[1]), uint32(num(f[2])))
	case "release":
		st, _ = g.tb.Release(g.now, uint64(num(f[1])))
	case "gone":
		g.tb.FileGone(g.now, goldFID(f[1]))
	case "restart":
		g.load(arg("damage"))
		out = fmt.Sprintf("damaged=%v %+v", g.tb.Damaged(), g.tb.Stats())
	case "list":
		if len(f) > 1 {
			fid = goldFID(f[1])
		}
		l, _ := g.tb.List(fid, 0, true, 0, 0)
		var s []string
		for _, h := range l {
			s = append(s, "  "+showHolder(h))
		}
		return strings.Join(s, "\n")
	case "grants":
		var s []string
		for _, x := range g.tb.Pending(uint32(num(f[1])), 0, 0) {
			s = append(s, fmt.Sprintf("  seq %d #%d %s %v x=%v", x.Seq, x.ID, showOwner(x.Owner), x.Range, x.Exclusive))
		}
		return strings.Join(s, "\n")
	case "hosts":
		var s []string
		for _, x := range g.tb.Hosts(0, true) {
			s = append(s, fmt.Sprintf("  %v state=%d notified=%d locks=%d note=%q", x.Host, x.State, x.Notified, x.Locks, x.Note))
		}
		return strings.Join(s, "\n")
	case "next":
		return fmt.Sprint(g.tb.NextTick() / sec)
	default:
		return "unknown command"
	}
	if out == "" {
		out = st.String()
	}
	if h.ID != 0 {
		out += " by " + showHolder(h)
	}
	put, del := 0, 0
	g.tb.Take(func(c Change) {
		if c.Value == nil {
			del++
			delete(g.store, string(c.Key))
		} else {
			put++
			g.store[string(c.Key)] = string(c.Value)
		}
	})
	if put+del > 0 {
		out += fmt.Sprintf(" [+%d -%d]", put, del)
	}
	if g.tb.Granted() {
		out += " grants"
	}
	if why := checkTable(g.tb); why != "" {
		out += " BROKEN: " + why
	}
	return out
}

// load replaces the table by one made from the records; the first record of the
// damaged kind has a bit flipped.
func (g *golden) load(damage string) {
	g.tb = New(g.lim, 1)
	for _, k := range sortedKeys(g.store) {
		v := []byte(g.store[k])
		if damage == k[1:2] {
			v[len(v)/2] ^= 4
			damage = ""
		}
		_ = g.tb.Load([]byte(k), v)
	}
	g.tb.Loaded(g.now)
}

// TestGolden runs the transcripts in testdata/golden.
func TestGolden(t *testing.T) {
	datadriven.Walk(t, "testdata/golden", func(t *testing.T, path string) {
		g := &golden{store: map[string]string{}, now: 1000 * sec}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "new" {
				*g = golden{store: map[string]string{}, now: 1000 * sec}
				for _, a := range d.CmdArgs {
					n, _ := strconv.Atoi(a.Vals[0])
					switch a.Key {
					case "perhost":
						g.lim.PerHost = n
					case "total":
						g.lim.Total = n
					case "waiters":
						g.lim.WaitersPerHost = n
					case "hosts":
						g.lim.Hosts = n
					}
				}
				g.load("")
			}
			var out strings.Builder
			for _, l := range strings.Split(strings.TrimSpace(d.Input), "\n") {
				if l = strings.TrimSpace(l); l == "" {
					continue
				}
				res := g.run(l)
				if strings.HasPrefix(res, "  ") || res == "" {
					fmt.Fprintf(&out, "%s:\n%s", l, res)
					if res != "" {
						out.WriteByte('\n')
					}
				} else {
					fmt.Fprintf(&out, "%s: %s\n", l, res)
				}
			}
			return out.String()
		})
	})
}
