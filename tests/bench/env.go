package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/bench/nfsload"
)

// Names of the servers that can be compared.
const (
	batonServer   = "baton"
	ganeshaServer = "ganesha"
	// dirsyncServer is Ganesha on directories with the attribute D (chattr +D):
	// ext4 then makes names durable before it returns, as baton does.
	dirsyncServer = "ganesha-dirsync"
	// nodesServer is baton as three processes: a frontend, the metadata target, and
	// the object targets. plainServer is the same without TLS between them.
	nodesServer = "baton-nodes"
	plainServer = "baton-nodes-plain"
)

// env is one running server and the connections to it.
type env struct {
	name    string
	node    *bed.Node
	srv     bed.Server
	seconds time.Duration
	conns   []*nfsload.Conn // four
	root    []byte
	data    []byte // 1 MiB of content
	serial  int

	nlm   []*nfsload.Conn // four, if the lock manager's rows are to run
	noNLM error           // why there are none though they are
	hold  int             // locks that the row nlmheld holds
	held  *heldLocks
	fills []lockFill
}

const benchAddr = "10.77.0.1"

// newEnv starts a server in a node of its own, below dir.
func newEnv(ctx context.Context, name, dir string, o options) (_ *env, err error) {
	node, err := bed.NewNode(name)
	if err != nil {
		return nil, err
	}
	e := &env{name: name, node: node, seconds: o.seconds, hold: o.held, data: make([]byte, mib)}
	for i := range e.data {
		e.data[i] = byte(i*7 + 1) // every page begins with the same byte
	}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if err := node.AddBridge("br0", netip.MustParsePrefix(benchAddr+"/24")); err != nil {
		return nil, err
	}
	c := bed.Config{Node: node, Dir: filepath.Join(dir, name), Addr: netip.MustParseAddr(benchAddr), Exports: []bed.Export{{Path: "/bench"}}}
	// Only these rows pay for Ganesha's grace period.
	if c.Locks = name != dirsyncServer && o.nlm(); c.Locks {
		c.MaxLocks = o.held + 10000 // what is timed comes on top
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, err
	}
	switch name {
	case batonServer:
		e.srv, err = bed.NewBaton(c)
	case nodesServer, plainServer:
		e.srv, err = newNodes(c, name == plainServer)
	case ganeshaServer:
		e.srv, err = bed.NewGanesha(c)
	case dirsyncServer:
		var g *bed.Ganesha
		if g, err = bed.NewGanesha(c); err == nil {
			if g.Root, err = dirsync(ctx, node, c.Dir); err == nil {
				e.srv = g
			}
		}
	default:
		return nil, fmt.Errorf("unknown server %q", name)
	}
	if err != nil {
		return nil, err
	}
	if err := e.srv.Start(ctx); err != nil {
		return nil, err
	}
	mc, err := node.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", benchAddr, bed.MountPort))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", name, err)
	}
	m := nfsload.NewConn(mc, nfsload.ProgMount)
	defer m.Close()
	if e.root, err = m.Mount("/bench"); err != nil {
		return nil, err
	}
	for range 4 {
		nc, err := node.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", benchAddr, bed.NFSPort))
		if err != nil {
			return nil, fmt.Errorf("connect to %s: %w", name, err)
		}
		conn := nfsload.NewConn(nc, nfsload.ProgNFS)
		conn.Batch = o.batch
		e.conns = append(e.conns, conn)
	}
	if c.Locks {
		if err := e.connectNLM(ctx, o.batch); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// newNodes makes a frontend whose targets run on two other nodes.
func newNodes(c bed.Config, plain bool) (bed.Server, error) {
	s, err := bed.NewCluster(c,
		&bed.Member{Name: "front", Addr: netip.MustParseAddr("127.0.0.2"), Serve: c.Addr},
		&bed.Member{Name: "meta", Addr: netip.MustParseAddr("127.0.0.3"), Start: []string{"MGS", "MDT0000"}},
		&bed.Member{Name: "data", Addr: netip.MustParseAddr("127.0.0.4"), Start: []string{"OST0000", "OST0001"}})
	if err != nil {
		return nil, err
	}
	s.Plain = plain
	return s, nil
}

// dirsync makes a directory with the attribute D.
func dirsync(ctx context.Context, node *bed.Node, dir string) (string, error) {
	root := filepath.Join(dir, "dirsync")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", err
	}
	if _, err := node.Run(ctx, "chattr", "+D", root); err != nil {
		return "", fmt.Errorf("%w: the file system has no synchronous directories: %v", bed.ErrUnavailable, err)
	}
	return root, nil
}

// privateMounts replaces this process by itself in a mount namespace of its
// own, so that its mounts end with it in whatever way it ends.
func privateMounts() error {
	const mark = "BATON_BENCH_PRIVATE_MOUNTS"
	if os.Getenv(mark) != "" {
		return nil
	}
	unshare, err := bed.LookPath("unshare")
	if err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	args := append([]string{"unshare", "--mount", "--propagation", "private", exe}, os.Args[1:]...)
	return fmt.Errorf("unshare: %w", syscall.Exec(unshare, args, append(os.Environ(), mark+"=1")))
}

// freshDisk makes a new journaled ext4 in a preallocated image below dir and
// mounts it. All servers store their data on it: the age and mount options of the
// machine's own file system would otherwise decide some rows. The loop device
// writes past the host's page cache.
func freshDisk(dir string) (string, error) {
	img, mnt := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk")
	if err := os.MkdirAll(mnt, 0o755); err != nil {
		return "", err
	}
	for _, args := range [][]string{
		{"fallocate", "-l", "24G", img},
		{"mkfs.ext4", "-q", "-F", "-i", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", img},
		{"mount", "-o", "loop,relatime", img, mnt},
		{"sh", "-c", "losetup --direct-io=on $(findmnt -no SOURCE " + mnt + ")"},
	} {
		if out, err := bed.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	bed.AtCleanup(func() { syscall.Unmount(mnt, syscall.MNT_DETACH) })
	return mnt, nil
}

func (e *env) close() {
	for _, c := range slices.Concat(e.conns, e.nlm) {
		c.Close()
	}
	if e.srv != nil && e.srv.Pid() != 0 {
		if err := e.srv.Stop(); err != nil {
			fmt.Fprintf(os.Stderr, "stop %s: %v\n", e.name, err)
		}
	}
	e.node.Close()
}

// cpu returns the processor time that the server has used.
func (e *env) cpu() (time.Duration, error) {
	u, err := usage(e)
	return u.CPU, err
}

// longestRow is how long a row may try to complete one operation.
const longestRow = 20 * time.Second

// runRow runs a row in a new directory, which it empties and removes.
func (e *env) runRow(r *row, c conc) ([]outcome, error) {
	e.serial++
	name := fmt.Sprintf("%s-%d", r.key, e.serial)
	dir, err := e.conns[0].Mkdir(e.root, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.key, err)
	}
	usual := e.seconds
	out, err := r.run(e, dir, c)
	// A short run may fall into a pause of the disk's.
	for errors.Is(err, errNothing) && e.seconds < longestRow {
		e.seconds *= 8
		if err = e.empty(dir); err == nil {
			out, err = r.run(e, dir, c)
		}
	}
	e.seconds = usual
	if err != nil {
		return nil, fmt.Errorf("%s with %v outstanding: %w", r.key, c, err)
	}
	if err := e.empty(dir); err != nil {
		return nil, fmt.Errorf("%s: clean up: %w", r.key, err)
	}
	if err := e.conns[0].Unlink(e.root, name, true); err != nil {
		return nil, fmt.Errorf("%s: clean up: %w", r.key, err)
	}
	return out, nil
}

// empty removes all files of a directory over all connections.
func (e *env) empty(dir []byte) error {
	es, err := e.conns[0].ReadDir(dir)
	if err != nil {
		return err
	}
	return e.all(func(i int) nfsload.Worker {
		k := i - len(e.conns)
		return &nfsload.Funcs{
			NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
				if k += len(e.conns); k >= len(es) {
					return 0, false
				}
				c.Dirop(dir, []byte(es[k].Name))
				return nfsload.ProcRemove, true
			},
			ReplyFunc: nfsload.CheckStatus(nfsload.ProcRemove),
		}
	})
}
