package vip

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CloseQuietly ends a TCP connection of this process so that no segment leaves,
// neither now nor when its socket is closed, whatever is unread, unsent or set as
// SO_LINGER: the peer learns nothing. The socket is left unconnected; the caller
// closes it as usual, and its reads and writes fail (ECONNABORTED). Whoever has
// the address then resets the peer at its next segment, this machine included:
// take the address away first.
//
// The socket must be connected and plain TCP (Go's listeners are MPTCP unless
// told otherwise). It needs CAP_NET_ADMIN. After an error the connection is as it
// was.
func CloseQuietly(rc syscall.RawConn) error {
	var cerr error
	// Control holds the descriptor, so that it is no other one's meanwhile.
	err := rc.Control(func(fd uintptr) { cerr = closeQuietly(int(fd)) })
	if err != nil {
		return fmt.Errorf("vip: close a connection quietly: %w", err)
	}
	return cerr
}

func closeQuietly(fd int) error {
	state, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("vip: close a connection quietly: %w: it is no TCP socket", err)
	}
	if state.State == stateListen {
		return errors.New("vip: close a connection quietly: the socket listens")
	}
	// Nothing that arrives from here on is answered: it is dropped.
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]}); err != nil {
		return fmt.Errorf("vip: close a connection quietly: socket filter: %w", err)
	}
	// In this mode the kernel ends connections without telling the peer.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0) // it was attached just now
		text := "the kernel needs CONFIG_CHECKPOINT_RESTORE, and the socket must be plain TCP"
		if errors.Is(err, unix.EPERM) {
			text = "the process needs CAP_NET_ADMIN (run it as root, or AmbientCapabilities=CAP_NET_ADMIN)"
		}
		return fmt.Errorf("vip: close a connection quietly: TCP_REPAIR: %w: %s", err, text)
	}
	// Ends it now, with its timers: closing the descriptor may come later. Where the
	// kernel refuses (another thread waits in the socket), closing does the same.
	none := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, _ = unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&none)), unsafe.Sizeof(none))
	return nil
}
