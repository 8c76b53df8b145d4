package hooks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Order is a process's place among those of one machine: keepalived starts the
// scripts in the order of its changes, but they run concurrently.
type Order struct {
	Boot  string `json:"boot"`
	Start uint64 `json:"start"` // clock ticks since the boot
	PID   int    `json:"pid"`
}

// maxPID is above any PID (PID_MAX_LIMIT of 64-bit machines).
const maxPID = 1 << 22

// After tells whether o's process was started after b's. PIDs of processes of the
// same tick rise, but for a wrap-around.
func (o Order) After(b Order) bool {
	switch {
	case o.Boot != b.Boot:
		return true // what is recorded is of an earlier boot
	case o.Start != b.Start:
		return o.Start > b.Start
	}
	return (o.PID-b.PID+maxPID)%maxPID < maxPID/2 && o.PID != b.PID
}

// ProcessOrder gives the calling process's place.
func ProcessOrder() (Order, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Order{}, err
	}
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return Order{}, err
	}
	s := string(stat)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 20 {
		return Order{}, errors.New("/proc/self/stat has no start time")
	}
	start, err := strconv.ParseUint(f[19], 10, 64) // field 22, proc(5)
	if err != nil {
		return Order{}, fmt.Errorf("/proc/self/stat: %w", err)
	}
	return Order{strings.TrimSpace(string(boot)), start, os.Getpid()}, nil
}

// record is the newest change of an address that was told.
type record struct {
	Order Order `json:"order"`
	Role  Role  `json:"role"`
	Done  bool  `json:"done"`
}

// notices keeps in a directory which change of an address is the newest, and lets
// one process at a time work at it.
type notices struct {
	path  string
	order Order
}

// update reads and perhaps replaces the record. f gives the new one, or nil.
func (n *notices) update(f func(record) *record) error {
	file, err := os.OpenFile(n.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil { // held for microseconds
		return fmt.Errorf("lock %s: %w", n.path, err)
	}
	var b [4096]byte
	size, _ := file.ReadAt(b[:], 0)
	var r record
	if err := json.Unmarshal(b[:size], &r); err != nil {
		r = record{Done: true} // new, or torn by a crash
	}
	nr := f(r)
	if nr == nil {
		return nil
	}
	j, err := json.Marshal(nr)
	if err != nil {
		return err
	}
	if err := file.Truncate(0); err != nil {
		return err
	}
	_, err = file.WriteAt(j, 0)
	return err
}

// enter makes this change the newest. newest is false if a later one is recorded
// already; under way tells that the one before may still be at work.
func (n *notices) enter(r Role) (newest, underWay bool, err error) {
	err = n.update(func(old record) *record {
		if old.Order.After(n.order) && old.Order.Boot == n.order.Boot {
			return nil
		}
		newest, underWay = true, !old.Done
		return &record{Order: n.order, Role: r}
	})
	return newest, underWay, err
}

// newest tells whether this change is still the newest, as far as can be told: what is
// wanted is not left undone because the record is away.
func (n *notices) newest() bool {
	is := true
	n.update(func(r record) *record {
		is = r.Order == n.order || r.Order == Order{}
		return nil
	})
	return is
}

// finished notes that what was wanted is reached.
func (n *notices) finished() error {
	return n.update(func(r record) *record {
		if r.Order != n.order {
			return nil
		}
		r.Done = true
		return &r
	})
}

// work waits until no other process works at the address. The returned function
// ends it; it is nil without an error when this change is not the newest any more.
// A process that has died holds nothing.
func (n *notices) work(ctx context.Context) (func(), error) {
	f, err := os.OpenFile(n.path+".busy", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if ctx.Err() != nil || !n.newest() {
			f.Close()
			return nil, ctx.Err()
		}
		Sleep(ctx, noticePoll)
	}
}

// noticePoll is how often a process looks whether a later change makes it obsolete.
const noticePoll = 20 * time.Millisecond

// Notify handles a change of state of which keepalived tells by a script: dir keeps
// what was told last, order is the process's. Only the latest change counts: a
// process whose change is not the latest (any more) ends with success, at once. The
// others of an address follow each other.
func Notify(ctx context.Context, e *Env, dir string, order Order, addr netip.Addr, role Role, o KeeperOptions) Exit {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return failed("state directory: %v", err)
	}
	n := &notices{path: filepath.Join(dir, strings.ReplaceAll(addr.String(), ":", "_")), order: order}
	superseded := func() Exit { return done("%s: %s: a later change of state came first, nothing done", addr, role) }
	newest, underWay, err := n.enter(role)
	switch {
	case err != nil:
		return failed("%s: %v", addr, err)
	case !newest:
		return superseded()
	}
	free, err := n.work(ctx)
	if err != nil {
		return failed("%s: %s: %v while another change of state was worked at", addr, role, err)
	}
	if free == nil {
		return superseded()
	}
	defer free()

	o.Recheck = 0
	k := NewKeeper(addr, o)
	if underWay {
		k.Unsure()
	}
	kctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan bool, 1) // whether this change stayed the newest
	go func() {
		for kctx.Err() == nil {
			if !n.newest() {
				cancel()
				watched <- false
				return
			}
			Sleep(kctx, noticePoll)
		}
		watched <- true
	}()
	want := make(chan Role, 1)
	want <- role
	close(want)
	var last Exit
	Attend(kctx, e, k, want, func(x Exit) { last = x })
	cancel()
	stayed := <-watched
	switch {
	case !stayed && last.Text == "": // before it had done anything
		return superseded()
	case k.Settled():
		if err := n.finished(); err != nil {
			return failed("%s; state directory: %v", last.Text, err)
		}
		return last
	case !stayed:
		return superseded()
	case last.Code != OK:
		return last
	}
	return failed("%s: %s: not done within the time-out; baton goes on with it", addr, role)
}
