// Package fdstore keeps sockets over a restart of the process in the service manager's
// file descriptor store (sd_notify(3), FDSTORE=1), and takes up what the service manager
// passes at the start: those, and the listeners of a socket unit (sd_listen_fds(3)).
package fdstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Names of what is in the store.
const (
	recordName = "baton-handover"
	socketName = "baton-socket"
	connName   = "baton-conn"
)

// format is that of the record; another one is not understood.
const format = 1

const (
	// maxRecord bounds a record, in bytes.
	maxRecord = 1 << 20
	// maxAge is how old a handover may be: clients have given their connections up then.
	maxAge = 5 * time.Minute
	// perMessage is how many descriptors go with a message; the kernel permits 253.
	perMessage = 200
	// sendTime bounds the conversation with the service manager.
	sendTime = 5 * time.Second
)

// Address is what is handed over of a service address.
type Address struct {
	Addr  netip.Addr `json:"addr"`
	VIP   uint32     `json:"vip"`
	Epoch uint64     `json:"epoch"` // of the period of service that has ended
}

// record describes a handover; it is the last that is put into the store, so one that
// was broken off has none.
type record struct {
	Format    int           `json:"format"`
	Boot      time.Duration `json:"boot"` // since the machine started, without a jump of the clock
	DataDir   string        `json:"data_dir"`
	Addresses []Address     `json:"addresses"`
	Sockets   int           `json:"sockets"`
	Conns     int           `json:"conns"`
}

func sinceBoot() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano()), err
}

// Handover is what a process leaves to the next one.
type Handover struct {
	DataDir   string
	Addresses []Address
	// Sockets are listeners and UDP sockets.
	Sockets, Conns []*os.File
}

// Len is the number of descriptors that Put stores.
func (h *Handover) Len() int { return len(h.Sockets) + len(h.Conns) + 1 }

// Close closes the sockets. What is in the store lives on, the rest ends.
func (h *Handover) Close() {
	for _, f := range h.Sockets {
		f.Close()
	}
	for _, f := range h.Conns {
		f.Close()
	}
}

// Put puts a handover into the store and returns when the service manager has it. The
// caller closes h, also after an error, when a part may be stored; the next process
// ignores that.
func Put(notifySocket string, h *Handover) error {
	now, err := sinceBoot()
	if err != nil {
		return fmt.Errorf("fdstore: %w", err)
	}
	text, err := json.Marshal(record{Format: format, Boot: now, DataDir: h.DataDir, Addresses: h.Addresses, Sockets: len(h.Sockets), Conns: len(h.Conns)})
	if err != nil {
		return fmt.Errorf("fdstore: %w", err)
	}
	if len(text) > maxRecord {
		return fmt.Errorf("fdstore: the record has %d bytes, more than %d", len(text), maxRecord)
	}
	fd, err := unix.MemfdCreate(recordName, unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fdstore: memfd_create: %w", err)
	}
	mem := os.NewFile(uintptr(fd), recordName)
	defer mem.Close()
	if _, err := mem.Write(text); err != nil {
		return fmt.Errorf("fdstore: %w", err)
	}
	n, err := dial(notifySocket)
	if err != nil {
		return err
	}
	defer n.c.Close()
	for _, l := range []struct {
		name  string
		files []*os.File
	}{{socketName, h.Sockets}, {connName, h.Conns}, {recordName, []*os.File{mem}}} {
		for len(l.files) > 0 {
			k := min(len(l.files), perMessage)
			// The manager would drop a connection by itself that ends meanwhile; the next
			// process is to see how it ends.
			if err := n.send("FDSTORE=1\nFDPOLL=0\nFDNAME="+l.name, l.files[:k]); err != nil {
				return err
			}
			l.files = l.files[k:]
		}
	}
	return n.barrier()
}

// notifier is a connection to the service manager.
type notifier struct{ c *net.UnixConn }

func dial(socket string) (*notifier, error) {
	if socket == "" {
		return nil, errors.New("fdstore: not started by a service manager (NOTIFY_SOCKET is not set)")
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("fdstore: service manager: %w", err)
	}
	if err := c.SetDeadline(time.Now().Add(sendTime)); err != nil {
		c.Close()
		return nil, fmt.Errorf("fdstore: service manager: %w", err)
	}
	return &notifier{c}, nil
}

// send sends a message with descriptors.
func (n *notifier) send(state string, files []*os.File) error {
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			// Not Fd, which would make the socket a blocking one, in the next process, too.
			rc, err := f.SyscallConn()
			if err == nil {
				err = rc.Control(func(fd uintptr) { fds[i] = int(fd) })
			}
			if err != nil {
				return fmt.Errorf("fdstore: %w", err)
			}
		}
		rights = unix.UnixRights(fds...)
	}
	// WriteMsgUnix refuses a datagram socket that is connected.
	rc, err := n.c.SyscallConn()
	if err != nil {
		return fmt.Errorf("fdstore: service manager: %w", err)
	}
	var serr error
	err = rc.Write(func(fd uintptr) bool {
		for {
			if serr = unix.Sendmsg(int(fd), []byte(state), rights, nil, unix.MSG_NOSIGNAL); serr != unix.EINTR {
				return serr != unix.EAGAIN
			}
		}
	})
	if err = errors.Join(err, serr); err != nil {
		return fmt.Errorf("fdstore: service manager: %w", err)
	}
	return nil
}

// barrier returns when the manager has seen all messages before: it then closes what
// came with this one.
func (n *notifier) barrier() error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("fdstore: %w", err)
	}
	defer r.Close()
	err = n.send("BARRIER=1", []*os.File{w})
	w.Close()
	if err != nil {
		return err
	}
	if err := r.SetReadDeadline(time.Now().Add(sendTime)); err != nil {
		return fmt.Errorf("fdstore: %w", err)
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		return fmt.Errorf("fdstore: the service manager does not confirm what it keeps: %w", err)
	}
	return nil
}
