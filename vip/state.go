package vip

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/baton-nfs/baton/internal/replace"
)

// stateFile records addresses for kernels that keep no marks: one line each,
// address and interface, behind one that names the boot. It is not flushed: a boot
// takes the addresses away, and what is recorded of an earlier one is void. The caller
// serializes.
type stateFile struct {
	path string
	boot string // "": not known
}

// bootMark begins the line with the boot's id.
const bootMark = "boot"

func openState(path string) *stateFile {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return &stateFile{path: path}
	}
	return &stateFile{path: path, boot: strings.TrimSpace(string(b))}
}

// Recorded lists the addresses that a state file (Options.StateFile) has: those that
// this machine was given since its boot and that were not removed in order. A file that
// is not there has none.
func Recorded(path string) ([]netip.Addr, error) {
	m, err := openState(path).read()
	if err != nil {
		return nil, err
	}
	return slices.SortedFunc(maps.Keys(m), netip.Addr.Compare), nil
}

// maxState bounds what is read of a state file.
const maxState = 1 << 20

// read returns the interface of each address. Lines that make no sense are left out.
func (s *stateFile) read() (map[netip.Addr]string, error) {
	f, err := os.Open(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return map[netip.Addr]string{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("vip: state file: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxState))
	if err != nil {
		return nil, fmt.Errorf("vip: state file: %w", err)
	}
	out := map[netip.Addr]string{}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) != 2 {
			continue
		}
		if fields[0] == bootMark {
			if s.boot != "" && fields[1] != s.boot {
				return map[netip.Addr]string{}, nil
			}
			continue
		}
		if a, err := netip.ParseAddr(fields[0]); err == nil {
			out[a] = fields[1]
		}
	}
	return out, nil
}

func (s *stateFile) add(p netip.Prefix, dev string) error {
	return s.change(func(m map[netip.Addr]string) { m[p.Addr()] = dev })
}

func (s *stateFile) remove(a netip.Addr) error {
	return s.change(func(m map[netip.Addr]string) { delete(m, a) })
}

func (s *stateFile) change(f func(map[netip.Addr]string)) error {
	m, err := s.read()
	if err != nil {
		return err
	}
	old := maps.Clone(m)
	f(m)
	if maps.Equal(m, old) {
		return nil
	}
	var b bytes.Buffer
	if s.boot != "" {
		fmt.Fprintln(&b, bootMark, s.boot)
	}
	for _, a := range slices.SortedFunc(maps.Keys(m), netip.Addr.Compare) {
		fmt.Fprintf(&b, "%s %s\n", a, m[a])
	}
	if err := replace.Unflushed(s.path, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("vip: state file: %w: its directory must be there and writable", err)
	}
	return nil
}
