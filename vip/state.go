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
// address and interface. It is not flushed: a boot takes the addresses away, too.
// The caller serializes.
type stateFile struct{ path string }

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
	for _, a := range slices.SortedFunc(maps.Keys(m), netip.Addr.Compare) {
		fmt.Fprintf(&b, "%s %s\n", a, m[a])
	}
	if err := replace.Unflushed(s.path, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("vip: state file: %w: its directory must be there and writable", err)
	}
	return nil
}
