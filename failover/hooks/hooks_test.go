package hooks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/cockroachdb/datadriven"
)

// scripted is a Baton and Machine whose answers are given beforehand; it notes the
// calls. The last answer to a command stays.
type scripted struct {
	mu      sync.Mutex
	answers map[string][]string // by command, "STATE text", "error text", "gone", "timeout"
	has     map[netip.Addr]bool
	stuck   bool // the machine does not let addresses go
	calls   []string
	cancel  context.CancelFunc
}

func (s *scripted) note(format string, a ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, fmt.Sprintf(format, a...))
}

func (s *scripted) answer(cmd string) (vipctl.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.answers[cmd]
	if len(l) == 0 {
		return vipctl.Result{}, &control.NotRunningError{Socket: "/run/control.sock"}
	}
	if len(l) > 1 {
		s.answers[cmd] = l[1:]
	}
	state, text, _ := strings.Cut(l[0], " ")
	switch state {
	case "error":
		return vipctl.Result{}, &control.RemoteError{Code: control.CodeFailed, Text: text}
	case "gone":
		return vipctl.Result{}, &control.NotRunningError{Socket: "/run/control.sock"}
	case "timeout":
		s.cancel()
		return vipctl.Result{}, context.DeadlineExceeded
	}
	return vipctl.Result{State: state, Text: text}, nil
}

func flags(given, force bool) (s string) {
	if given {
		s += " given"
	}
	if force {
		s += " force"
	}
	return s
}

func (s *scripted) Ping(context.Context) error {
	s.note("ping")
	_, err := s.answer("ping")
	return err
}

func (s *scripted) Ready(context.Context) error {
	s.note("ready")
	_, err := s.answer("ready")
	return err
}

func (s *scripted) Take(_ context.Context, a vipctl.TakeArgs) (vipctl.Result, error) {
	s.note("take %s %s%s", a.Addr, a.Stage, flags(a.Given, a.Force))
	return s.answer("take")
}

func (s *scripted) Release(_ context.Context, a vipctl.ReleaseArgs) (vipctl.Result, error) {
	to := ""
	if a.To != "" {
		to = " to " + a.To
	}
	s.note("release %s %s%s%s", a.Addr, a.Stage, flags(a.Given, false), to)
	return s.answer("release")
}

func (s *scripted) Check(_ context.Context, a vipctl.CheckArgs) (vipctl.Result, error) {
	s.note("check %s", a.Addr)
	return s.answer("check")
}

func (s *scripted) Has(addr netip.Addr) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.has[addr], nil
}

func (s *scripted) Remove(_ context.Context, addr netip.Addr) error {
	s.note("remove %s", addr)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stuck {
		return errors.New("Operation not permitted")
	}
	delete(s.has, addr)
	return nil
}

// TestGolden runs invocations as managers make them. An input's first line is the
// invocation, the others are environment and answers.
func TestGolden(t *testing.T) {
	for _, file := range []string{"pacemaker", "ctdb", "plain", "demote"} {
		datadriven.RunTest(t, filepath.Join("testdata", file+".txt"), func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd != "hook" {
				t.Fatalf("%s: unknown command %s", d.Pos, d.Cmd)
			}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			env := map[string]string{}
			s := &scripted{answers: map[string][]string{}, has: map[netip.Addr]bool{}, cancel: cancel}
			lines := strings.Split(strings.TrimSpace(d.Input), "\n")
			public := ""
			for _, l := range lines[1:] {
				f := strings.Fields(l)
				switch f[0] {
				case "env":
					k, v, _ := strings.Cut(strings.TrimPrefix(l, "env "), "=")
					env[k] = v
				case "answer":
					s.answers[f[1]] = append(s.answers[f[1]], strings.Join(f[2:], " "))
				case "has":
					s.has[netip.MustParseAddr(f[1])] = true
				case "stuck":
					s.stuck = true
				case "public":
					public += strings.TrimPrefix(l, "public ") + "\n"
				default:
					t.Fatalf("%s: %q", d.Pos, l)
				}
			}
			sleeps := 0
			e := &Env{Baton: s, Machine: s, Getenv: func(k string) string { return env[k] }, Sleep: func(context.Context, time.Duration) {
				if sleeps++; sleeps == 3 {
					cancel()
				}
			}}
			x, err := invoke(ctx, e, s, strings.Fields(lines[0]), public)
			if err != nil {
				return err.Error() + "\n"
			}
			s.calls = append(s.calls, fmt.Sprintf("exit %d", x.Code))
			if x.Text != "" {
				s.calls = append(s.calls, x.Text)
			}
			return strings.Join(s.calls, "\n") + "\n"
		})
	}
}

func invoke(ctx context.Context, e *Env, s *scripted, args []string, public string) (Exit, error) {
	switch args[0] {
	case "pacemaker":
		return Pacemaker(ctx, e, args[1]), nil
	case "ctdb":
		addrs, err := CTDBAddrs(e.Getenv, public)
		if err != nil {
			return Exit{}, err
		}
		if args[1] == "callout" {
			return CTDBCallout(ctx, e, addrs, args[2:]), nil
		}
		return CTDBEvent(ctx, e, Part(args[1]), addrs, args[2:]), nil
	case "health":
		return Health(ctx, e), nil
	case "ready":
		return Ready(ctx, e), nil
	case "demote":
		return Demote(ctx, e, []netip.Addr{netip.MustParseAddr(args[1])}, func(v int) error {
			s.note("track file %d", v)
			return nil
		}), nil
	}
	addr, err := ParseAddr(args[1])
	if err != nil {
		return Exit{}, err
	}
	switch args[0] {
	case "take":
		return Take(ctx, e, vipctl.TakeArgs{Addr: addr, Stage: args[2]}), nil
	case "release":
		return Release(ctx, e, vipctl.ReleaseArgs{Addr: addr, Stage: args[2], To: strings.Join(args[3:], "")}), nil
	case "release-all":
		return ReleaseAll(ctx, e, vipctl.ReleaseArgs{Addr: addr}), nil
	case "check":
		return Check(ctx, e, addr), nil
	}
	return Exit{}, fmt.Errorf("unknown invocation %q", args)
}

func TestPacemakerTimeout(t *testing.T) {
	for ms, want := range map[string]time.Duration{
		"": 19 * time.Second, "x": 19 * time.Second, "-1": 19 * time.Second, "0": 19 * time.Second, "99999999999999": 19 * time.Second,
		"30000": 29 * time.Second, "5000": 4500 * time.Millisecond,
	} {
		if got := PacemakerTimeout(func(string) string { return ms }); got != want {
			t.Errorf("%q: %v, want %v", ms, got, want)
		}
	}
}

func TestParseChange(t *testing.T) {
	for in, want := range map[string]Change{
		`INSTANCE "VI_1" MASTER 150`:      {"INSTANCE", "VI_1", "MASTER"},
		"GROUP \"a \"b\" c\" FAULT 0\r\n": {"GROUP", `a "b" c`, "FAULT"},
		`INSTANCE "x" BACKUP_PRIORITY 1`:  {"INSTANCE", "x", "BACKUP_PRIORITY"},
	} {
		if got, err := ParseChange(in); err != nil || got != want {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "INSTANCE", `VS [1.2.3.4]:tcp:80 UP`, `INSTANCE VI_1 MASTER`, `INSTANCE "VI_1`, `INSTANCE "VI_1"`, `INSTANCE "` + strings.Repeat("x", 2000) + `" MASTER 1`} {
		if got, err := ParseChange(in); err == nil {
			t.Errorf("%q: %+v", in, got)
		}
	}
}

func TestOrder(t *testing.T) {
	a := Order{"b", 100, 5}
	for _, c := range []struct {
		o    Order
		want bool
	}{
		{Order{"b", 101, 1}, true}, {Order{"b", 99, 9}, false}, {Order{"b", 100, 6}, true}, {Order{"b", 100, 4}, false},
		{Order{"b", 100, 5}, false}, {Order{"c", 1, 1}, true}, {Order{"b", 100, maxPID - 1}, false},
	} {
		if got := c.o.After(a); got != c.want {
			t.Errorf("%+v after %+v: %v", c.o, a, got)
		}
	}
	if !a.After(Order{"b", 100, maxPID - 1}) {
		t.Error("PIDs that begin anew are not later")
	}
	self, err := ProcessOrder()
	if err != nil || self.PID == 0 || self.Start == 0 || self.Boot == "" {
		t.Errorf("%+v, %v", self, err)
	}
}
