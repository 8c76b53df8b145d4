package vipagent

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
	"sync"

	"github.com/baton-nfs/baton/internal/replace"
)

// givenFile records, one on a line, the addresses that a cluster manager adds to this
// machine and removes from it, so that a process that is started anew leaves them to it,
// too. Without a path nothing is recorded.
type givenFile struct {
	path string

	mu sync.Mutex // guards the file
}

// maxGiven bounds what is read of the file.
const maxGiven = 64 * maxAddresses

// has tells whether the address is recorded.
func (f *givenFile) has(addr netip.Addr) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, err := f.read()
	return m[addr], err
}

// set records the address, or forgets it. The caller has told nobody of it yet.
func (f *givenFile) set(addr netip.Addr, given bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, err := f.read()
	if err != nil || m[addr] == given {
		return err
	}
	if given {
		m[addr] = true
	} else {
		delete(m, addr)
	}
	var b bytes.Buffer
	for _, a := range slices.SortedFunc(maps.Keys(m), netip.Addr.Compare) {
		fmt.Fprintln(&b, a)
	}
	if err = replace.File(f.path, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("file of addresses of the cluster manager: %w: its directory must be there and writable", err)
	}
	return nil
}

// read gives the addresses; lines that make no sense are left out. f.mu is held.
func (f *givenFile) read() (map[netip.Addr]bool, error) {
	m := map[netip.Addr]bool{}
	if f.path == "" {
		return m, nil
	}
	file, err := os.Open(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return nil, fmt.Errorf("file of addresses of the cluster manager: %w", err)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxGiven))
	if err != nil {
		return nil, fmt.Errorf("file of addresses of the cluster manager: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if a, err := netip.ParseAddr(strings.TrimSpace(line)); err == nil {
			m[a] = true
		}
	}
	return m, nil
}

// adopt finds out, before anything is done about the address, whether a cluster manager
// has given it to an earlier process of this node. If so, and the machine does not have it
// now, it is for the manager to say when it is served.
func (k *keeper) adopt() {
	given, err := k.a.given.has(k.addr)
	if err != nil {
		k.log.Warn("whether a cluster manager adds the address is not known; it is taken for the node's own", "err", err)
	}
	if !given {
		return
	}
	has, err := k.a.o.Net.Has(k.addr)
	if err != nil {
		k.log.Warn("whether the machine has the address is not known; its cluster manager has to say when it is served", "err", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.asked { // else a hook has said more since
		k.s.given, k.s.hold = true, !has
	}
}
