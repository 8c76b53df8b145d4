package cluster

import (
	"strings"
	"syscall"
	"testing"

	nfs "github.com/willscott/go-nfs"
)

// target is the state of a target as a node lists it.
func (s *street) target(by, name string) string {
	out, err := s.order(by, "target", "list")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			return f[1]
		}
	}
	return ""
}

// The targets' process is killed, and while the MDT recovers, the process of the
// frontend with the address: the MDT waits for a client that never comes again. Another
// node takes the address. What was executed before is answered as it was. own 15.
func TestFrontendKilledInRecovery(t *testing.T) {
	s := newStreet(t, "off", inEtcd)
	s.all()
	s.must("vip", "add", s.at.String())
	s.must("vip", "move", s.vip().String(), "--to", "n1")
	s.alone("n1")
	w := s.watch()
	// Of another host than the storm, whose replies take the place of earlier ones.
	k := &caller{s: s, from: s.guest(1), xid: 1 << 20}
	dir := k.mount()
	k.create(dir, []byte("gone"))
	if st := k.remove(dir, []byte("gone")); st != nfs.NFSStatusOk {
		t.Fatal(st)
	}
	k.hang()
	_, gone := s.client()
	gone("start", "n1")

	// n2 does not come to the recovery, so that it lasts until n1 is dead.
	s.ok(s.procs["n2"].Signal(syscall.SIGSTOP))
	s.procs["t"].Kill()
	s.start("t")
	s.until("the MDT to recover", func() bool {
		st := s.target("t", "MDT0000")
		if st == "up" {
			t.Fatal("the MDT is up, and has not waited for anybody")
		}
		return strings.HasPrefix(st, "recover")
	})
	s.crash(w, "n1")
	s.ok(s.procs["n2"].Signal(syscall.SIGCONT))
	s.until("n2 to be told to take the address", func() bool {
		_, err := s.order("t", "vip", "move", s.vip().String(), "--to", "n2", "--force")
		return err == nil
	})
	s.until("n2 to serve", func() bool { return s.local("n2") == "serving" })
	k.xid-- // the call of the REMOVE once more
	if st := k.remove(dir, []byte("gone")); st != nfs.NFSStatusOk {
		t.Errorf("REMOVE, sent again: %v", st)
	}
	if st := k.remove(dir, []byte("gone")); st != nfs.NFSStatusNoEnt {
		t.Errorf("REMOVE of what is not there: %v", st)
	}
	k.hang()
	s.back(w, "n1")
	gone("frontend and MDT killed", "n2")
}

// The process of the MDT is killed while an address moves: the move waits for it, and
// nothing is executed twice or lost. own 15.
func TestMDTKilledInMove(t *testing.T) {
	s := newStreet(t, "off", inEtcd)
	s.all()
	s.must("vip", "add", s.at.String())
	s.must("vip", "move", s.vip().String(), "--to", "n1")
	s.alone("n1")
	s.watch()
	_, gone := s.client()
	gone("start", "n1")
	for i, to := range []string{"n2", "n1"} {
		from := map[string]string{"n1": "n2", "n2": "n1"}[to]
		// It stands still first, so that the move is under way when it dies.
		s.ok(s.procs["t"].Signal(syscall.SIGSTOP))
		done := make(chan error, 1)
		go func() {
			_, err := s.order(from, "vip", "move", s.vip().String(), "--to", to)
			done <- err
		}()
		s.until("the move to be under way", func() bool {
			return s.local(from) == "releasing" || s.local(to) == "taking" && s.local(from) != "serving"
		})
		s.procs["t"].Kill()
		if i == 1 {
			s.until("the last owner to have given the address up", func() bool { return !s.has(from) })
		}
		s.start("t")
		<-done // it follows the move for a time only
		gone("MDT killed in a move", to)
	}
}
