package objfs

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAsyncSync has many files synced at once, more than there are slots, with
// the errors that the kernel gives back, and without asynchronous I/O.
func TestAsyncSync(t *testing.T) {
	for _, how := range []string{"aio", "off", "none"} {
		t.Run(how, func(t *testing.T) {
			l, err := NewLinux(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if l.aio == nil {
				t.Skip("SKIPPED, reason: this kernel or sandbox has no asynchronous I/O")
			}
			switch how {
			case "off":
				l.aio.off.Store(true)
			case "none":
				l.aio.close()
				l.aio = nil
			}
			defer func() {
				if err := l.Shut(); err != nil {
					t.Error(err)
				}
			}()
			fd, err := l.Open("f", ReadWrite|Create)
			if err != nil {
				t.Fatal(err)
			}
			dir, err := l.Open(".", ReadOnly|Directory)
			if err != nil {
				t.Fatal(err)
			}
			ro, err := l.Open("f", ReadOnly)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i := range 2 * aioSlots {
				wg.Go(func() {
					if _, err := l.Pwrite(fd, []byte{byte(i)}, int64(i)); err != nil {
						t.Error(err)
					}
					for _, fd := range []int{fd, dir, ro} {
						if err := l.Fdatasync(fd); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			for _, fd := range []int{fd, dir, ro} {
				if err := l.Close(fd); err != nil {
					t.Fatal(err)
				}
			}
			if err := l.Fdatasync(1 << 20); !errors.Is(err, unix.EBADF) {
				t.Errorf("sync of a descriptor that is not open: %v", err)
			}
			// A pipe cannot be synced; that must not look like success.
			var p [2]int
			if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			defer unix.Close(p[0])
			defer unix.Close(p[1])
			if err := l.Fdatasync(p[1]); !errors.Is(err, unix.EINVAL) {
				t.Errorf("sync of a pipe: %v", err)
			}
			if l.aio != nil && len(l.aio.free) != aioSlots {
				t.Errorf("%d of %d slots are free", len(l.aio.free), aioSlots)
			}
		})
	}
}

// TestLongWrite: a write that is cut into steps arrives whole.
func TestLongWrite(t *testing.T) {
	l, err := NewLinux(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Shut()
	fd, err := l.Open("f", ReadWrite|Create)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close(fd)
	p := make([]byte, 3*writeStep+17)
	for i := range p {
		p[i] = byte(i>>8) ^ byte(i)
	}
	if n, err := l.Pwrite(fd, p, 4097); n != len(p) || err != nil {
		t.Fatalf("wrote %d: %v", n, err)
	}
	got := make([]byte, len(p)+1)
	if n, err := l.Pread(fd, got, 4097); n != len(p) || err != nil || !bytes.Equal(got[:n], p) {
		t.Fatalf("read %d: %v", n, err)
	}
}
