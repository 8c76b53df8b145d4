package objfs

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// aioSlots bounds the syncs that are under way in the kernel at a time.
const aioSlots = 128

// aio runs fdatasync in the kernel's own threads (io_submit(2),
// IOCB_CMD_FDSYNC). A goroutine that is blocked in fdatasync itself keeps one of
// the scheduler's few processors until the runtime takes it away, and while all
// are kept so nobody looks at the network: with two CPUs that halved the rate
// of stable writes.
type aio struct {
	ctx   uintptr
	event *os.File // becomes readable when a sync ends
	free  chan *aioWait
	slots [aioSlots]aioWait
	off   atomic.Bool // the kernel cannot do it for this file system
	wg    sync.WaitGroup
}

// aioWait is one sync that somebody waits for.
type aioWait struct {
	cb  iocb
	res chan int64
}

// iocb and ioEvent are the kernel's, linux/aio_abi.h. What has no name here is
// 0 for a sync.
type iocb struct {
	data   uint64
	_      [2]uint32 // aio_key, aio_rw_flags
	opcode uint16
	_      int16 // aio_reqprio
	fd     uint32
	_      [4]uint64 // aio_buf, aio_nbytes, aio_offset, aio_reserved2
	flags  uint32
	resfd  uint32
}

type ioEvent struct {
	data, obj uint64
	res, res2 int64
}

const (
	iocbFdsync    = 3 // IOCB_CMD_FDSYNC
	iocbFlagResfd = 1 // IOCB_FLAG_RESFD
)

// newAIO returns an error where asynchronous I/O is not compiled in, not
// allowed, or used up by others (fs.aio-max-nr).
func newAIO() (*aio, error) {
	a := &aio{free: make(chan *aioWait, aioSlots)}
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, aioSlots, uintptr(unsafe.Pointer(&a.ctx)), 0); e != 0 {
		return nil, fmt.Errorf("io_setup: %w", e)
	}
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		a.destroy()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	a.event = os.NewFile(uintptr(fd), "eventfd")
	for i := range a.slots {
		w := &a.slots[i]
		w.cb = iocb{data: uint64(i), opcode: iocbFdsync, flags: iocbFlagResfd, resfd: uint32(fd)}
		w.res = make(chan int64, 1)
		a.free <- w
	}
	a.wg.Add(1)
	go a.reap()
	return a, nil
}

func (a *aio) destroy() { unix.Syscall(unix.SYS_IO_DESTROY, a.ctx, 0, 0) }

// close ends the reaper; no sync may be under way.
func (a *aio) close() {
	a.event.Close()
	a.wg.Wait()
	a.destroy()
}

// reap hands results to those who wait. It waits in the runtime's poller, not
// in a thread of its own.
func (a *aio) reap() {
	defer a.wg.Done()
	var count [8]byte
	var ev [32]ioEvent
	for {
		if _, err := a.event.Read(count[:]); err != nil {
			return
		}
		for {
			n := a.events(ev[:])
			for i := range ev[:n] {
				a.slots[ev[i].data].res <- ev[i].res
			}
			if n < len(ev) {
				break
			}
		}
	}
}

// events takes what has ended and does not wait, so the runtime need not know
// of the call.
func (a *aio) events(ev []ioEvent) int {
	for {
		var now unix.Timespec
		n, _, e := unix.RawSyscall6(unix.SYS_IO_GETEVENTS, a.ctx, 0, uintptr(len(ev)),
			uintptr(unsafe.Pointer(&ev[0])), uintptr(unsafe.Pointer(&now)), 0)
		if e == 0 {
			return int(n)
		}
		if e != unix.EINTR {
			return 0
		}
	}
}

var errNoAIO = errors.New("no asynchronous sync")

// fdatasync returns errNoAIO when the caller has to do it itself.
func (a *aio) fdatasync(fd int) error {
	if a.off.Load() {
		return errNoAIO
	}
	var w *aioWait
	select {
	case w = <-a.free:
	default:
		return errNoAIO
	}
	// Starting a sync only queues it, so the runtime need not know of the call.
	w.cb.fd = uint32(fd)
	p := &w.cb
	n, _, e := unix.RawSyscall(unix.SYS_IO_SUBMIT, a.ctx, 1, uintptr(unsafe.Pointer(&p)))
	if e != 0 || n != 1 {
		a.free <- w
		if e == unix.EINVAL || e == unix.ENOSYS || e == unix.EPERM || e == unix.EOPNOTSUPP {
			a.off.Store(true)
		}
		return errNoAIO
	}
	res := <-w.res
	a.free <- w
	if res < 0 {
		return unix.Errno(-res)
	}
	return nil
}
