package fdstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// firstFD is SD_LISTEN_FDS_START.
const firstFD = 3

// maxFDs bounds what LISTEN_FDS may say.
const maxFDs = 1 << 20

// Inherited are sockets that the service manager has passed. A nil Inherited has none.
// Its methods may be called concurrently.
type Inherited struct {
	log *slog.Logger

	mu      sync.Mutex
	sockets []socket
	conns   []socket
	rec     *record // nil: no handover, or one that is ignored
}

// socket is a socket with the address it is bound to.
type socket struct {
	file   *os.File
	udp    bool
	local  netip.AddrPort
	shared bool // the service manager has it, too, and goes on listening
}

// Receive takes what the service manager has passed to this process, once, and has it
// removed from the store: from then on a socket ends when it is closed here. dataDir is
// that of this process. What is damaged or somebody else's is told and closed.
func Receive(dataDir string, log *slog.Logger) *Inherited {
	files := listenFiles()
	if len(files) == 0 {
		return nil
	}
	stored := slices.ContainsFunc(files, func(f *os.File) bool { return ours(f.Name()) })
	if stored {
		if err := forget(os.Getenv("NOTIFY_SOCKET")); err != nil {
			log.Error("sockets cannot be removed from the service manager's store; those of the process before are not used", "err", err)
			files = slices.DeleteFunc(files, func(f *os.File) bool {
				if ours(f.Name()) {
					f.Close()
					return true
				}
				return false
			})
		}
	}
	now, err := sinceBoot()
	if err != nil {
		log.Warn("the age of a handover is not known", "err", err)
	}
	return receive(files, dataDir, int64(now), log)
}

func ours(name string) bool { return name == recordName || name == socketName || name == connName }

// listenFiles are the descriptors passed, by their names (sd_listen_fds_with_names(3)).
func listenFiles() []*os.File {
	pid, perr := strconv.Atoi(os.Getenv("LISTEN_PID"))
	n, nerr := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for _, k := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(k)
	}
	if perr != nil || nerr != nil || pid != os.Getpid() || n <= 0 || n > maxFDs {
		return nil
	}
	var files []*os.File
	for i := range n {
		unix.CloseOnExec(firstFD + i)
		name := "unknown"
		if i < len(names) {
			name = names[i]
		}
		files = append(files, os.NewFile(uintptr(firstFD+i), name))
	}
	return files
}

// forget empties the store.
func forget(notifySocket string) error {
	n, err := dial(notifySocket)
	if err != nil {
		return err
	}
	defer n.c.Close()
	for _, name := range []string{recordName, socketName, connName} {
		if err := n.send("FDSTOREREMOVE=1\nFDNAME="+name, nil); err != nil {
			return err
		}
	}
	return n.barrier()
}

// receive sorts files, which it takes over. now is nanoseconds since the boot.
func receive(files []*os.File, dataDir string, now int64, log *slog.Logger) *Inherited {
	in := &Inherited{log: log}
	var mem *os.File
	var bad error
	stored := 0
	for _, f := range files {
		name := f.Name()
		if ours(name) {
			stored++
		}
		if name == recordName && mem == nil {
			mem = f
			continue
		}
		s, listens, err := inspect(f)
		switch {
		case err != nil:
			bad = errors.Join(bad, fmt.Errorf("%s: %w", name, err))
			f.Close()
			if !ours(name) {
				log.Warn("a descriptor of the service manager is of no use", "name", name, "err", err)
			}
		case name == connName && !listens && !s.udp:
			in.conns = append(in.conns, s)
		case name != connName && (listens || s.udp):
			s.shared = name != socketName
			in.sockets = append(in.sockets, s)
		default:
			bad = errors.Join(bad, fmt.Errorf("%s %s is not what its name says", name, s.local))
			f.Close()
		}
	}
	if stored == 0 {
		return in
	}
	var err error
	if mem == nil {
		err = errors.New("it has no record: the process before was killed while it stopped")
	} else {
		in.rec, err = readRecord(mem)
		mem.Close()
	}
	if err == nil {
		err = in.check(dataDir, now, bad)
	}
	if err != nil {
		in.rec = nil
		in.drop(func(s *socket) bool { return !s.shared })
		log.Warn("what the process before has left is not used; its clients connect again", "err", err)
	}
	return in
}

func readRecord(f *os.File) (*record, error) {
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxRecord+1))
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if len(text) > maxRecord {
		return nil, errors.New("record: too long")
	}
	r := &record{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return r, nil
}

// check says why a handover is not to be used.
func (in *Inherited) check(dataDir string, now int64, bad error) error {
	sockets := 0
	for _, s := range in.sockets {
		if !s.shared {
			sockets++
		}
	}
	switch r := in.rec; {
	case r.Format != format:
		return fmt.Errorf("its format is %d, this version knows %d", r.Format, format)
	case r.DataDir != dataDir:
		return fmt.Errorf("it belongs to the data directory %s", r.DataDir)
	case int64(r.Boot) > now || now-int64(r.Boot) > int64(maxAge):
		return fmt.Errorf("it is older than %s", maxAge)
	case bad != nil:
		return bad
	case sockets != r.Sockets || len(in.conns) != r.Conns:
		return fmt.Errorf("it is incomplete: %d of %d sockets, %d of %d connections", sockets, r.Sockets, len(in.conns), r.Conns)
	}
	return nil
}

// inspect asks the kernel what a socket is.
func inspect(f *os.File) (s socket, listens bool, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return s, false, err
	}
	s.file = f
	cerr := rc.Control(func(fd uintptr) {
		var typ, acc int
		var sa unix.Sockaddr
		if typ, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
			return
		}
		if acc, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil {
			return
		}
		if sa, err = unix.Getsockname(int(fd)); err != nil {
			return
		}
		s.udp, listens = typ == unix.SOCK_DGRAM, acc != 0
		switch a := sa.(type) {
		case *unix.SockaddrInet4:
			s.local = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
		case *unix.SockaddrInet6:
			s.local = netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
		default:
			err = errors.New("not an IP socket")
		}
	})
	return s, listens, errors.Join(cerr, err)
}

// Socket returns the listener (or UDP socket) that is bound to ap, or nil; the file is
// the caller's. shared: the service manager has it, too.
func (in *Inherited) Socket(udp bool, ap netip.AddrPort) (f *os.File, shared bool) {
	if in == nil {
		return nil, false
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.sockets = slices.DeleteFunc(in.sockets, func(s socket) bool {
		if s.udp != udp || s.local != ap {
			return false
		}
		// The same socket may have come both ways.
		shared = shared || s.shared
		if f == nil {
			f = s.file
		} else {
			s.file.Close()
		}
		return true
	})
	return f, shared
}

// Conn is a connection.
type Conn struct {
	File  *os.File
	Local netip.AddrPort
}

// Conns returns the connections of an address whose new period of service has the given
// epoch; the files are the caller's. None if anything has happened to the address since
// it was handed over.
func (in *Inherited) Conns(a Address, crashed bool) (l []Conn) {
	if in == nil {
		return nil
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.rec == nil || crashed || !slices.Contains(in.rec.Addresses, Address{a.Addr, a.VIP, a.Epoch - 1}) {
		return nil
	}
	if now, err := sinceBoot(); err != nil || now-in.rec.Boot > maxAge {
		return nil
	}
	in.conns = slices.DeleteFunc(in.conns, func(s socket) bool {
		if s.local.Addr() == a.Addr {
			l = append(l, Conn{s.file, s.local})
		}
		return s.local.Addr() == a.Addr
	})
	return l
}

// drop closes what match says, besides all connections.
func (in *Inherited) drop(match func(*socket) bool) {
	for _, s := range in.conns {
		s.file.Close()
	}
	in.conns = nil
	in.sockets = slices.DeleteFunc(in.sockets, func(s socket) bool {
		if match(&s) {
			s.file.Close()
			return true
		}
		return false
	})
}

// Close closes what nobody has taken, and says so.
func (in *Inherited) Close() {
	if in == nil {
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if n := len(in.conns); n > 0 {
		in.log.Warn("connections that the process before has left are closed: this process does not serve their addresses, or the addresses were served elsewhere meanwhile", "connections", n)
	}
	for _, s := range in.sockets {
		network := "tcp"
		if s.udp {
			network = "udp"
		}
		in.log.Warn("a listener that was passed is of no use: nothing is served there; correct nfs.addresses, the ports, or baton.socket", "address", s.local, "network", network)
	}
	in.drop(func(*socket) bool { return true })
}
