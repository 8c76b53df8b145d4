package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/recovery/wire"
)

// What happens to targets and frontends of a cluster is a delay to clients: RS 4a, RO 1,
// RO 3, RS 0a and MM 6 (moves), CS 50h (deactivation), MM 10 (fsck).
func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	c := newCell(t)
	c.up()
	a, b := c.dial("a", "/disk"), c.dial("b", "/disk")

	ok := t.Run("MDT and OST killed and started again under load", func(t *testing.T) {
		la, lb := a.load("kill-a"), b.load("kill-b")
		for range 2 {
			la.more(5)
			lb.more(5)
			c.kill("c")
			c.start("c")
			c.untilUp("c", "MDT0000", "OST0000")
		}
		la.more(5)
		lb.more(5)
		la.end(b)
		lb.end(a)
	})
	ok = ok && t.Run("OST killed with data not committed and started elsewhere", func(t *testing.T) {
		const n = 24
		var fhs [n][]byte
		var verf [n][8]byte
		for i := range n {
			name := fmt.Sprint("unstable", i)
			var err error
			if fhs[i], err = a.create(name); err != nil {
				t.Fatal(err)
			}
			if verf[i], err = a.write(fhs[i], 0, content(name), wire.Unstable); err != nil {
				t.Fatal(err)
			}
		}
		c.kill("d")
		c.must("c", "target", "start", "OST0001")
		for i := range n {
			b.check(fmt.Sprint("unstable", i), content(fmt.Sprint("unstable", i)))
			if v, err := a.commit(fhs[i]); err != nil || v != verf[i] {
				t.Errorf("commit: %x, %v; the data were written with %x", v, err, verf[i])
			}
		}
		// A node that comes back does not take what runs elsewhere.
		c.start("d")
		c.until("the refusal", func() bool { return strings.Contains(c.log("d"), "it runs elsewhere") })
		if s := c.state("d", "OST0001"); s != "stopped" && s != "elsewhere" {
			t.Errorf("OST0001 on d is %s", s)
		}
	})
	ok = ok && t.Run("targets moved by hand under load", func(t *testing.T) {
		la, lb := a.load("move-a"), b.load("move-b")
		for _, x := range [][3]string{{"OST0001", "c", "d"}, {"MDT0000", "c", "d"}, {"OST0000", "c", "d"}, {"MDT0000", "d", "c"}, {"OST0000", "d", "c"}} {
			la.more(3)
			lb.more(3)
			c.move(x[0], x[1], x[2])
		}
		la.more(3)
		lb.more(3)
		la.end(b)
		lb.end(a)
	})
	ok = ok && t.Run("frontend killed", func(t *testing.T) {
		la := a.load("frontend-a")
		// What b has written is there, although nobody has closed its files.
		var names []string
		for i := range 10 {
			name := fmt.Sprint("left", i)
			fh, err := b.create(name)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.write(fh, 0, content(name), wire.Unstable); err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
		}
		c.kill("b")
		la.more(5)
		for _, name := range names {
			a.check(name, content(name))
		}
		c.must("c", "target", "evict", "MDT0000", c.gone("c", "MDT0000"))
		la.more(5)
		for _, name := range names {
			a.check(name, content(name))
			fh, err := a.lookup(name)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := a.size(fh); err != nil || n != uint64(len(content(name))) {
				t.Errorf("%s: size %d, %v", name, n, err)
			}
		}
		c.start("b")
		b = c.dial("b", "/disk")
		la.end(b)
	})
	ok = ok && t.Run("OST deactivated", func(t *testing.T) {
		const n = 24
		try := func() (good int) {
			for i := range n {
				fh, err := a.lookup(fmt.Sprint("unstable", i))
				if err != nil {
					t.Fatal(err)
				}
				_, err = a.write(fh, 0, content(fmt.Sprint("unstable", i)), wire.FileSync)
				switch {
				case err == nil:
					good++
				case !strings.Contains(err.Error(), nfs.NFSStatusIO.String()):
					t.Error(err)
				}
			}
			return good
		}
		c.must("a", "target", "deactivate", "OST0001")
		if k := try(); k == 0 || k == n {
			t.Errorf("%d of %d writes succeed", k, n)
		}
		c.must("a", "target", "activate", "OST0001")
		if k := try(); k != n {
			t.Errorf("%d of %d writes succeed", k, n)
		}
	})
	ok = ok && t.Run("files on one OST while many writes hang on another", func(t *testing.T) {
		const n = 400
		var fhs [n][]byte
		for i := range n {
			var err error
			if fhs[i], err = a.create(fmt.Sprint("hang", i)); err != nil {
				t.Fatal(err)
			}
		}
		c.signal("d", syscall.SIGSTOP) // it has OST0001
		var wg sync.WaitGroup
		var written [n]atomic.Bool
		there := func() (l []int) {
			for i := range written {
				if written[i].Load() {
					l = append(l, i)
				}
			}
			return l
		}
		conns := []*client{c.dial("a", "/disk"), c.dial("a", "/disk")} // each has so many calls at a time
		for i := range n {
			wg.Go(func() {
				if _, err := conns[i%2].write(fhs[i], 0, "x", wire.Unstable); err != nil {
					t.Errorf("write %d: %v", i, err)
				}
				written[i].Store(true)
			})
		}
		// All files of the other OST: so many writes do not stop each other.
		c.until("the writes to OST0000", func() bool { return len(there()) > n/4 })
		hanging := n - len(there())
		if got, err := a.read(fhs[there()[0]]); err != nil || got != "x" {
			t.Errorf("%q, %v", got, err)
		}
		if hanging < 100 || n-len(there()) < 100 {
			t.Errorf("%d writes hang, later %d: too few to show anything", hanging, n-len(there()))
		}
		if a.slow > 20*time.Second {
			t.Errorf("a call took %v", a.slow)
		}
		c.signal("d", syscall.SIGCONT)
		wg.Wait()
	})
	ok = ok && t.Run("two-node durability", func(t *testing.T) {
		storm := func(k *client, name string, hit func()) (made []string) {
			var mu sync.Mutex
			var wg sync.WaitGroup
			middle := make(chan struct{})
			for w := range 4 {
				wg.Go(func() {
					for i := range 20 {
						name := fmt.Sprintf("%s.%d.%d", name, w, i)
						fh, err := k.create(name)
						if err == nil {
							_, err = k.write(fh, 0, content(name), wire.FileSync)
						}
						if err != nil {
							return // the frontend is gone
						}
						mu.Lock()
						made = append(made, name)
						mu.Unlock()
						if w == 0 && i == 10 {
							close(middle)
						}
					}
				})
			}
			select {
			case <-middle:
				hit()
			case <-time.After(patience):
				t.Fatal("the storm does not get on")
			}
			wg.Wait()
			return made
		}
		a2, b2 := c.dial("a", "/two"), c.dial("b", "/two")
		made := storm(a2, "targets", func() { c.kill("c"); c.start("c") })
		// The calls that waited for the targets go on when these are back.
		if len(made) != 80 {
			t.Fatalf("%d files", len(made))
		}
		for _, name := range made {
			b2.check(name, content(name))
		}
		made = storm(b2, "frontend", func() { c.kill("b") })
		for _, name := range made {
			a2.check(name, content(name))
		}
	})
	if !ok {
		t.FailNow()
	}
	c.start("b")
	c.dial("b", "/disk")
	if out, err := c.fsck(); err == nil || !strings.Contains(out, "the store belongs to another node") && !strings.Contains(out, "belongs to a target that runs") {
		t.Errorf("fsck of stores that are in use: %v\n%s", err, out)
	}
	for _, n := range []string{"b", "a", "c", "d"} {
		c.stop(n)
	}
	if out, err := c.fsck(); err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}

// Of two nodes that start a target at a time one has it, and one that runs is refused
// to others: MM 1, CS 41c. One whose node hangs is taken over after the watch time, and
// when that node goes on it has lost the target and does not write to it: MM 7.
func TestTakeOver(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	c := newCell(t)
	c.locks = false // a process that is stopped keeps them
	c.up()
	a := c.dial("a", "/disk")
	l := a.load("before")
	l.more(5)
	out, err := c.order("c", "target", "start", "OST0001")
	if err == nil || !strings.Contains(out, `node "d"`) || !strings.Contains(out, "stop it there first") {
		t.Errorf("start of a target that runs on d: %v\n%s", err, out)
	}
	c.must("d", "target", "stop", "OST0001")
	var wg sync.WaitGroup
	won := map[string]*error{"c": new(error), "d": new(error)}
	for n, err := range won {
		wg.Go(func() { _, *err = c.order(n, "target", "start", "OST0001") })
	}
	wg.Wait()
	switch cWon, dWon := *won["c"] == nil, *won["d"] == nil; {
	case cWon == dWon:
		t.Fatalf("started at a time: %v, %v", *won["c"], *won["d"])
	case cWon:
		c.move("OST0001", "c", "d")
	}
	l.more(5)
	c.signal("d", syscall.SIGSTOP)
	c.must("c", "target", "start", "OST0001")
	l.more(10)
	c.signal("d", syscall.SIGCONT)
	c.until("d to find that it has lost OST0001", func() bool { s := c.state("d", "OST0001"); return s == "failed" || s == "stopped" || s == "elsewhere" })
	l.more(10)
	l.end(c.dial("b", "/disk"))
	if s := c.state("c", "OST0001"); s != "up" {
		t.Errorf("OST0001 on c is %s", s)
	}
	for _, n := range []string{"b", "a", "d", "c"} {
		c.stop(n)
	}
}

// Nodes need certificates of the cluster's authority.
func TestCertificates(t *testing.T) {
	c := newCell(t)
	c.tls = "mutual"
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(c.bin, args...).CombinedOutput(); err != nil {
			t.Fatalf("baton %v: %v\n%s", args, err, out)
		}
	}
	issue := func(ca string, nodes ...string) {
		for _, n := range nodes {
			dir := c.path(n, "tls")
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			run("ca", "issue", n, "--dir", ca)
			for _, f := range []string{"ca.pem", n + ".pem", n + ".key"} {
				b, err := os.ReadFile(ca + "/" + f)
				if err != nil {
					t.Fatal(err)
				}
				c.write(dir+"/"+f, string(b))
			}
		}
	}
	run("ca", "init", "--name", "one", "--dir", c.path("ca1"))
	run("ca", "init", "--name", "one", "--dir", c.path("ca2"))
	issue(c.path("ca1"), "a", "c", "d")
	issue(c.path("ca2"), "b")
	c.up()
	a := c.dial("a", "/disk")
	fh, err := a.create("secret")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.write(fh, 0, "secret", wire.FileSync); err != nil {
		t.Fatal(err)
	}
	c.until("the refusal of b", func() bool {
		return strings.Contains(c.log("b"), "waiting for the MGS") && strings.Contains(c.log("b"), "certificate")
	})
	if out, err := c.order("b", "ls", "/"); err == nil {
		t.Errorf("b sees the files: %s", out)
	}
	a.check("secret", "secret")
	for _, n := range []string{"b", "a", "c", "d"} {
		c.stop(n)
	}
}
