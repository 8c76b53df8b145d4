// Command stub stands in for a running baton where only the hooks of cluster
// managers are of interest: it speaks the control protocol (vip-take, vip-release,
// vip-check), adds and removes addresses, listens on them, and notes every call
// with its time and with whether the machine had the address. Its registry is a
// directory that all nodes share.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/failover/hooks"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"golang.org/x/sys/unix"
)

// Record is a line of the log: one call, or something that happened by itself.
type Record struct {
	Begin time.Time `json:"begin"`
	End   time.Time `json:"end"`
	Node  string    `json:"node"`
	Op    string    `json:"op"` // "take listen", "release drain", ..., "given up", "fenced", "swept"
	Addr  string    `json:"addr"`
	Given bool      `json:"given,omitempty"`
	Force bool      `json:"force,omitempty"`
	// Had and Has tell whether the machine had the address at the beginning and has
	// it at the end.
	Had   bool   `json:"had"`
	Has   bool   `json:"has"`
	State string `json:"state,omitempty"`
	Err   string `json:"err,omitempty"`
}

// entry is the registry's entry of an address.
type entry struct {
	Owner string `json:"owner"` // "": nobody, given up in order
	Epoch uint64 `json:"epoch"`
	Next  string `json:"next"`
}

// port is where the stub answers with its node's name.
const port = 2049

type server struct {
	node, registry, dev string
	bits                int
	log                 *os.File

	units map[netip.Addr]*unit // fixed
}

// unit is an address on this node.
type unit struct {
	s    *server
	addr netip.Addr

	mu    sync.Mutex // guards state, given, epoch, stop
	state string
	given bool
	epoch uint64
	stop  context.CancelFunc // breaks a take off

	work sync.Mutex   // held by who changes the unit
	l    net.Listener // under work
}

func main() {
	s := &server{units: map[netip.Addr]*unit{}}
	socket := flag.String("socket", "", "control socket")
	logFile := flag.String("log", "", "file of records")
	addrs := flag.String("addresses", "", "all floating addresses, with commas")
	flag.StringVar(&s.node, "node", "", "this node's name")
	flag.StringVar(&s.registry, "registry", "", "shared directory")
	flag.StringVar(&s.dev, "dev", "eth0", "interface that gets addresses")
	flag.IntVar(&s.bits, "bits", 24, "prefix length")
	flag.Parse()
	var err error
	if s.log, err = os.OpenFile(*logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
		log.Fatal(err)
	}
	for f := range strings.SplitSeq(*addrs, ",") {
		a, err := netip.ParseAddr(f)
		if err != nil {
			log.Fatal(err)
		}
		s.units[a] = &unit{s: s, addr: a, state: vipctl.Absent}
	}
	// As baton does: what a dead process has left is removed before anything listens.
	for _, u := range s.units {
		if added, err := os.ReadFile(s.mark(u.addr)); err == nil && string(added) == s.node {
			r := s.begin("swept", u.addr)
			s.end(r, vipctl.Absent, u.remove())
		}
	}
	ctl := control.NewServer(nil)
	vipctl.Register(ctl, s)
	if err := ctl.Start(*socket); err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	s.watch(ctx)
	ctl.Close()
}

func (s *server) begin(op string, addr netip.Addr) Record {
	had, err := hooks.Local{}.Has(addr)
	if err != nil {
		log.Fatal(err)
	}
	return Record{Begin: time.Now(), Node: s.node, Op: op, Addr: addr.String(), Had: had}
}

// end notes the end of a call.
func (s *server) end(r Record, state string, err error) {
	r.End, r.State = time.Now(), state
	if err != nil {
		r.Err = err.Error()
	}
	addr := netip.MustParseAddr(r.Addr)
	if r.Has, err = (hooks.Local{}).Has(addr); err != nil {
		log.Fatal(err)
	}
	b, err := json.Marshal(&r)
	if err != nil {
		log.Fatal(err)
	}
	// One write with O_APPEND: lines of several nodes do not mix.
	if _, err := s.log.Write(append(b, '\n')); err != nil {
		log.Fatal(err)
	}
}

// mark is a file that tells that this machine's stub has added the address.
func (s *server) mark(addr netip.Addr) string { return "/run/stub-" + addr.String() }

// update changes the registry's entry of an address, unless f returns false.
func (s *server) update(addr netip.Addr, f func(*entry) bool) (entry, error) {
	var e entry
	file, err := os.OpenFile(filepath.Join(s.registry, addr.String()), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return e, err
	}
	defer file.Close()
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		return e, err
	}
	if err := json.NewDecoder(file).Decode(&e); err != nil {
		e = entry{}
	}
	if f == nil || !f(&e) {
		return e, nil
	}
	b, err := json.Marshal(&e)
	if err != nil {
		return e, err
	}
	if err := file.Truncate(0); err != nil {
		return e, err
	}
	_, err = file.WriteAt(b, 0)
	return e, err
}

// watch does what the registry says: gives up what another node is to have.
func (s *server) watch(ctx context.Context) {
	for ctx.Err() == nil {
		for _, u := range s.units {
			u.mu.Lock()
			serving, epoch := u.state == vipctl.Serving, u.epoch
			u.mu.Unlock()
			if !serving {
				continue
			}
			e, err := s.update(u.addr, nil)
			if err != nil {
				log.Fatal(err)
			}
			switch {
			case e.Owner != s.node || e.Epoch != epoch:
				u.giveUp("fenced")
			case e.Next != s.node && e.Next != "":
				u.giveUp("given up")
			}
		}
		hooks.Sleep(ctx, 10*time.Millisecond)
	}
}

func (u *unit) giveUp(op string) {
	r := u.s.begin(op, u.addr)
	u.work.Lock()
	defer u.work.Unlock()
	err := u.release(vipctl.StageDrain)
	if err == nil {
		err = u.release(vipctl.StageFinish)
	}
	u.s.end(r, u.get(), err)
}

func (u *unit) get() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state
}

func (u *unit) set(state string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state = state
}

// unit finds an address.
func (s *server) unit(addr netip.Addr) (*unit, error) {
	u := s.units[addr]
	if u == nil {
		return nil, fmt.Errorf("%s is no floating address", addr)
	}
	return u, nil
}

// TakeVIP implements vipctl.Mover.
func (s *server) TakeVIP(ctx context.Context, a vipctl.TakeArgs) (vipctl.Result, error) {
	u, err := s.unit(a.Addr)
	if err != nil {
		return vipctl.Result{}, err
	}
	r := s.begin("take "+a.Stage, a.Addr)
	r.Given, r.Force = a.Given, a.Force
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	u.mu.Lock()
	if u.stop != nil {
		u.stop() // the last call wins
	}
	u.stop = cancel
	u.mu.Unlock()
	u.work.Lock()
	defer u.work.Unlock()
	text, err := u.take(ctx, a)
	state := u.get()
	s.end(r, state, err)
	return vipctl.Result{State: state, Text: text}, err
}

func (u *unit) take(ctx context.Context, a vipctl.TakeArgs) (string, error) {
	if st := u.get(); st == vipctl.Serving || st == vipctl.Listening && a.Stage == vipctl.StageListen {
		return st + " already", nil
	}
	if ctx.Err() != nil {
		return "", errors.New("broken off")
	}
	me := u.s.node
	if _, err := u.s.update(u.addr, func(e *entry) bool { e.Next = me; return true }); err != nil {
		return "", err
	}
	u.set(vipctl.Taking)
	if err := u.listen(); err != nil {
		u.set(vipctl.Failed)
		return "", err
	}
	if a.Stage == vipctl.StageListen {
		u.set(vipctl.Listening)
		return "listening", nil
	}
	for {
		e, err := u.s.update(u.addr, func(e *entry) bool {
			if e.Owner == "" || e.Owner == me || a.Force {
				e.Owner, e.Next = me, me
				e.Epoch++
				return true
			}
			return false
		})
		if err != nil {
			return "", err
		}
		if e.Owner == me {
			u.mu.Lock()
			u.epoch, u.given = e.Epoch, a.Given
			u.mu.Unlock()
			break
		}
		hooks.Sleep(ctx, 5*time.Millisecond)
		if ctx.Err() != nil {
			u.close()
			u.set(vipctl.Absent)
			return "", errors.New("broken off")
		}
	}
	has, err := hooks.Local{}.Has(u.addr)
	switch {
	case err != nil:
		return "", err
	case a.Given && !has:
		u.close()
		u.set(vipctl.Failed)
		return "", errors.New("the address was not given")
	case !a.Given && !has:
		if err := os.WriteFile(u.s.mark(u.addr), []byte(me), 0o644); err != nil {
			return "", err
		}
		if err := ip("address", "add", fmt.Sprintf("%s/%d", u.addr, u.s.bits), "dev", u.s.dev); err != nil {
			u.set(vipctl.Failed)
			return "", err
		}
	}
	u.set(vipctl.Serving)
	return "serving", nil
}

// ReleaseVIP implements vipctl.Mover.
func (s *server) ReleaseVIP(_ context.Context, a vipctl.ReleaseArgs) (vipctl.Result, error) {
	u, err := s.unit(a.Addr)
	if err != nil {
		return vipctl.Result{}, err
	}
	r := s.begin("release "+a.Stage, a.Addr)
	r.Given = a.Given
	u.mu.Lock()
	if u.stop != nil {
		u.stop()
	}
	u.mu.Unlock()
	u.work.Lock()
	defer u.work.Unlock()
	text := "not served here"
	if st := u.get(); st != vipctl.Absent && st != vipctl.Unknown {
		text = a.Stage + " done"
	}
	err = u.release(a.Stage)
	state := u.get()
	s.end(r, state, err)
	return vipctl.Result{State: state, Text: text}, err
}

func (u *unit) release(stage string) error {
	u.mu.Lock()
	state, given, epoch := u.state, u.given, u.epoch
	u.mu.Unlock()
	if state == vipctl.Absent {
		return nil
	}
	if state == vipctl.Serving {
		u.set(vipctl.Releasing)
		if !given {
			if err := u.remove(); err != nil {
				u.set(vipctl.Failed)
				return err
			}
		}
		_, err := u.s.update(u.addr, func(e *entry) bool {
			if e.Owner != u.s.node || e.Epoch != epoch {
				return false
			}
			e.Owner = ""
			return true
		})
		if err != nil {
			return err
		}
	}
	u.set(vipctl.Releasing)
	if stage == vipctl.StageFinish {
		u.close()
		u.set(vipctl.Absent)
	}
	return nil
}

// ReadyVIP implements vipctl.Mover.
func (s *server) ReadyVIP(context.Context) error { return nil }

// CheckVIP implements vipctl.Mover.
func (s *server) CheckVIP(_ context.Context, a vipctl.CheckArgs) (vipctl.Result, error) {
	u := s.units[a.Addr]
	if u == nil {
		return vipctl.Result{State: vipctl.Unknown}, nil
	}
	return vipctl.Result{State: u.get(), Text: u.get() + " here"}, nil
}

// listen opens the listener on the absent address.
func (u *unit) listen() error {
	if u.l != nil {
		return nil
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(err, cerr)
	}}
	l, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(u.addr.String(), strconv.Itoa(port)))
	if err != nil {
		return err
	}
	u.l = l
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if u.get() == vipctl.Serving {
				fmt.Fprintln(c, u.s.node)
			}
			c.Close()
		}
	}()
	return nil
}

func (u *unit) close() {
	if u.l != nil {
		u.l.Close()
		u.l = nil
	}
}

// remove takes the address away, if it is there.
func (u *unit) remove() error {
	os.Remove(u.s.mark(u.addr))
	return hooks.Local{}.Remove(context.Background(), u.addr)
}

func ip(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
