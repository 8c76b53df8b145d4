package bed

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"time"
)

// Export is one exported directory, as both servers can offer it.
type Export struct {
	// Path is what clients mount, for example "/rw".
	Path string
	// ReadOnly and RootSquash are the options of exports(5).
	ReadOnly, RootSquash bool
}

// Config is what every Server needs.
type Config struct {
	// Node runs the server. The server does not close it.
	Node *Node
	// Dir holds the server's store, configuration and log. It survives Kill9.
	Dir string
	// Addr is the service address; it must exist in Node.
	Addr netip.Addr
	// Exports are the exported directories. Ganesha keeps one directory for
	// each, baton exports the root of its one file system under each name.
	Exports []Export
	// Locks makes Ganesha ready for clients that lock: rpc.statd runs beside it, a
	// restarted server tells the clients through sm-notify, and there is a grace
	// period for reclaims. baton needs nothing besides itself.
	Locks bool
	// MaxLocks is how many locks one client may hold; 0 is the server's default
	// (baton only, Ganesha has no limit).
	MaxLocks int
	// NFSPort and MountPort are used if they are not 0; then the server
	// neither answers as rpcbind nor registers anywhere (baton only).
	NFSPort, MountPort int
}

// NFSPort and MountPort are the TCP and UDP ports of servers whose Config does
// not say otherwise.
const (
	NFSPort   = 2049
	MountPort = 20048
)

// Server is an NFSv3 server under test, running in a Node.
type Server interface {
	// Name is "baton" or "ganesha".
	Name() string
	// Start starts the server, or starts it again on the same store after
	// Kill9 or Stop, and returns when it answers NFS and MOUNT.
	Start(ctx context.Context) error
	// Addr is the service address.
	Addr() netip.Addr
	// Pid is the running server's process, seen from the test; 0 if none runs.
	Pid() int
	// Kill9 kills the server as a crash does, and waits for it.
	Kill9() error
	// Stop ends the server in an orderly way.
	Stop() error
	// Log returns the last bytes of the server's log for error messages.
	Log() string
}

// Checker is a Server whose store can be checked while it does not run.
type Checker interface {
	// Check returns an error with the program's output if the store is damaged.
	Check(ctx context.Context) error
}

// ServerEnv names the environment variable that chooses the server of the
// suites: "baton" (default) or "ganesha".
const ServerEnv = "BATON_SERVER"

// ServerName returns the server chosen for the suites.
func ServerName() string {
	if s := os.Getenv(ServerEnv); s != "" {
		return s
	}
	return "baton"
}

// NewServer makes (but does not start) the named server.
func NewServer(name string, c Config) (Server, error) {
	switch name {
	case "baton":
		return NewBaton(c)
	case "ganesha":
		return NewGanesha(c)
	}
	return nil, fmt.Errorf("bed: unknown server %q", name)
}

// waitAnswers waits until NFS 3 and MOUNT 3 answer their NULL procedures, the
// process ends, or ctx does.
func waitAnswers(ctx context.Context, n *Node, addr netip.Addr, nfsPort, mountPort int, p *Proc) error {
	for _, s := range []struct {
		prog uint32
		port int
	}{{100003, nfsPort}, {100005, mountPort}} {
		for {
			err := pingRPC(ctx, n, netip.AddrPortFrom(addr, uint16(s.port)), s.prog, 3)
			if err == nil {
				break
			}
			select {
			case <-p.Done():
				return fmt.Errorf("bed: server ended while starting: %v", p.Err())
			case <-ctx.Done():
				return fmt.Errorf("bed: server does not answer: %w", err)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return nil
}

// pingRPC calls procedure 0 of a program over TCP from inside the node.
func pingRPC(ctx context.Context, n *Node, ap netip.AddrPort, prog, vers uint32) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := n.DialContext(ctx, "tcp", ap.String())
	if err != nil {
		return err
	}
	defer c.Close()
	dl, _ := ctx.Deadline()
	c.SetDeadline(dl)
	var m []byte
	for _, v := range []uint32{1<<31 | 40, 0x62656400, 0, 2, prog, vers, 0, 0, 0, 0, 0} {
		m = binary.BigEndian.AppendUint32(m, v)
	}
	if _, err := c.Write(m); err != nil {
		return err
	}
	var r [28]byte
	if _, err := io.ReadFull(c, r[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(r[12:]) != 0 || binary.BigEndian.Uint32(r[24:]) != 0 {
		return errors.New("NULL call was not accepted")
	}
	return nil
}

// tail returns the last max bytes of a file, or why it cannot be read.
func tail(path string, max int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err.Error()
	}
	b := make([]byte, min(max, st.Size()))
	n, _ := f.ReadAt(b, st.Size()-int64(len(b)))
	return string(b[:n])
}

// Usage is what a process has used since it started.
type Usage struct {
	// CPU is user and system time of all threads, with the kernel's clock
	// tick (10 ms) as its resolution.
	CPU time.Duration
	// RSS is the resident memory in bytes, PeakRSS its highest value.
	RSS, PeakRSS int64
}

// ProcUsage reads a process's Usage from /proc.
func ProcUsage(pid int) (Usage, error) {
	var u Usage
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return u, fmt.Errorf("bed: usage: %w", err)
	}
	f := statFields(string(b))
	if len(f) < 13 {
		return u, fmt.Errorf("bed: usage: short stat line")
	}
	ut, err1 := strconv.ParseInt(f[11], 10, 64)
	st, err2 := strconv.ParseInt(f[12], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return u, fmt.Errorf("bed: usage: %w", err)
	}
	u.CPU = time.Duration(ut+st) * (time.Second / 100)
	st2, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return u, fmt.Errorf("bed: usage: %w", err)
	}
	u.RSS = statusKB(string(st2), "VmRSS:") << 10
	u.PeakRSS = statusKB(string(st2), "VmHWM:") << 10
	return u, nil
}

// ServerUsage is the sum over all processes of a running server.
func ServerUsage(s Server) (sum Usage, err error) {
	pids := []int{s.Pid()}
	if m, ok := s.(interface{ Pids() []int }); ok {
		pids = m.Pids()
	}
	for _, pid := range pids {
		u, err := ProcUsage(pid)
		if err != nil {
			return sum, err
		}
		sum.CPU += u.CPU
		sum.RSS += u.RSS
		sum.PeakRSS += u.PeakRSS
	}
	return sum, nil
}
