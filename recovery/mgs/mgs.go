// Package mgs keeps what the whole service agrees on: which node and file
// system client this is, the service addresses (VIPs) with their epochs,
// write verifiers and NSM states. This is the embedded registry of a single node: one file
// that is replaced atomically.
package mgs

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// VIP is a service address and what clients bind to it.
type VIP struct {
	// Index names the VIP in request headers; from 1, never reused.
	Index uint32     `json:"index"`
	Addr  netip.Addr `json:"addr"`
	// Epoch rises whenever the address starts to be served anew; targets refuse
	// requests of older epochs.
	Epoch uint64 `json:"epoch"`
	// Verifier is the NFS write verifier (RFC 1813 section 3.3.7), in hex. It
	// changes exactly when acknowledged data that were not committed may be lost.
	Verifier string `json:"verifier"`
	// NSMState is the state number that clients are told (XNFS NSM
	// SM_NOTIFY): odd, from 1, never lower than before. 0 in files of programs
	// that knew no locks.
	NSMState uint32 `json:"nsm_state"`
	// Clean tells that nobody serves the address and that the last to do so
	// ended in an orderly way: clients need not be told of a restart.
	Clean bool `json:"clean,omitempty"`
	// Crashed, in what Serve returns, tells that the period of service before
	// this one did not end in an orderly way.
	Crashed bool `json:"-"`
}

// maxNSMState is the highest state number: the protocol's int has 31 bits for it.
const maxNSMState = 1<<31 - 1

// VerifierBytes is the verifier as NFS sends it.
func (v *VIP) VerifierBytes() (b [8]byte) {
	d, _ := hex.DecodeString(v.Verifier)
	copy(b[:], d)
	return b
}

type state struct {
	Format     int    `json:"format"`
	Client     string `json:"client"` // UUID of the node's file system client, hex
	Generation uint64 `json:"generation"`
	NextIndex  uint32 `json:"next_index"`
	VIPs       []VIP  `json:"vips"`
	// OSTs is how many object targets belong to the store, once it has been made.
	OSTs int `json:"osts,omitempty"`
}

const format = 1

// Registry is the open registry. Its methods are safe for concurrent use; each
// change is durable when the method returns.
type Registry struct {
	path  string
	rand  io.Reader
	fresh bool

	mu sync.Mutex
	s  state
}

// Open reads or creates the registry in dir. A damaged file is an error: to go
// on with invented epochs could let an old owner write.
func Open(dir string) (*Registry, error) { return open(dir, rand.Reader) }

func open(dir string, rnd io.Reader) (*Registry, error) {
	r := &Registry{path: filepath.Join(dir, "registry.json"), rand: rnd}
	b, err := os.ReadFile(r.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.s, r.fresh = state{Format: format, NextIndex: 1}, true
		if r.s.Client, err = r.random(16); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, fmt.Errorf("mgs: read the registry: %w", err)
	default:
		if err := json.Unmarshal(b, &r.s); err != nil {
			return nil, fmt.Errorf("mgs: %s is damaged (%w): restore it from a backup", r.path, err)
		}
		if r.s.Format != format {
			return nil, fmt.Errorf("mgs: %s has format %d, this program knows %d: use the newer program", r.path, r.s.Format, format)
		}
		if id, err := hex.DecodeString(r.s.Client); err != nil || len(id) != len(wire.ClientID{}) {
			return nil, fmt.Errorf("mgs: %s has a damaged client id: restore it from a backup", r.path)
		}
		for i := range r.s.VIPs {
			if v := &r.s.VIPs[i]; v.NSMState > maxNSMState || v.NSMState != 0 && v.NSMState%2 == 0 {
				return nil, fmt.Errorf("mgs: %s has a damaged NSM state %d of %s: restore it from a backup", r.path, v.NSMState, v.Addr)
			}
		}
	}
	return r, nil
}

func (r *Registry) random(n int) (string, error) {
	b := make([]byte, n)
	if _, err := io.ReadFull(r.rand, b); err != nil {
		return "", fmt.Errorf("mgs: random bytes: %w", err)
	}
	return hex.EncodeToString(b), nil
}

// Fresh tells that there was no registry when it was opened.
func (r *Registry) Fresh() bool { return r.fresh }

// OSTs is the number of object targets that the store has; 0 before it was made.
func (r *Registry) OSTs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.s.OSTs
}

// SetOSTs records that the store has been made, or extended, with n object targets.
func (r *Registry) SetOSTs(n int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.s.OSTs == n {
		return nil
	}
	r.s.OSTs = n
	return r.save()
}

// StartClient raises the file system client's generation and returns who it is.
func (r *Registry) StartClient() (wire.ClientID, uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s.Generation++
	var id wire.ClientID
	b, _ := hex.DecodeString(r.s.Client)
	copy(id[:], b)
	return id, r.s.Generation, r.save()
}

// Serve registers addr if it is new, raises its epoch and begins a period of
// service, which ends in an orderly way only with Stopped. If the one before did
// not, the NSM state rises and Crashed is set in what is returned.
//
// An address from a file without NSM states counts as crashed: locks cannot
// have been granted by the program that wrote it, so that nobody is told
// anything; but if that program came between two newer ones, there may be some.
func (r *Registry) Serve(addr netip.Addr) (VIP, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.s.VIPs {
		if r.s.VIPs[i].Addr != addr {
			continue
		}
		crashed := !r.s.VIPs[i].Clean
		v, err := r.change(i, func(v *VIP) error {
			v.Epoch++
			v.Clean = false
			switch {
			case v.NSMState == 0:
				v.NSMState = 1
			case crashed:
				return v.raiseNSM()
			}
			return nil
		})
		v.Crashed = crashed
		return v, err
	}
	ver, err := r.random(8)
	if err != nil {
		return VIP{}, err
	}
	v := VIP{Index: r.s.NextIndex, Addr: addr, Epoch: 1, Verifier: ver, NSMState: 1}
	r.s.NextIndex++
	r.s.VIPs = append(r.s.VIPs, v)
	return v, r.save()
}

func (v *VIP) raiseNSM() error {
	if v.NSMState > maxNSMState-2 {
		return fmt.Errorf("mgs: the NSM state of %s cannot rise above %d", v.Addr, v.NSMState)
	}
	v.NSMState += 2
	return nil
}

// change applies fn to a copy of a VIP, which becomes the VIP once it is
// durable. After an error the old one counts, although the new one may be in
// the file already: both are states that the next start can go on from. The
// caller holds mu.
func (r *Registry) change(i int, fn func(*VIP) error) (VIP, error) {
	old := r.s.VIPs[i]
	v := old
	if err := fn(&v); err != nil {
		return old, err
	}
	r.s.VIPs[i] = v
	if err := r.save(); err != nil {
		r.s.VIPs[i] = old
		return old, err
	}
	return v, nil
}

func (r *Registry) find(index uint32) (int, error) {
	for i := range r.s.VIPs {
		if r.s.VIPs[i].Index == index {
			return i, nil
		}
	}
	return 0, fmt.Errorf("mgs: there is no VIP %d", index)
}

// Stopped ends a period of service in an orderly way. It is called when the
// address is not served any more and every change of its locks is durable.
func (r *Registry) Stopped(index uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, err := r.find(index)
	if err != nil || r.s.VIPs[i].Clean {
		return err
	}
	_, err = r.change(i, func(v *VIP) error { v.Clean = true; return nil })
	return err
}

// BumpNSM raises the NSM state of a VIP, because its clients have to reclaim
// their locks: the lock table was lost, or SM_SIMU_CRASH asks for it.
func (r *Registry) BumpNSM(index uint32) (VIP, error) { return r.RaiseNSM(index, 0) }

// RaiseNSM is BumpNSM, and goes above the given state as well: one that targets
// or clients know although this registry does not (it came from a backup).
func (r *Registry) RaiseNSM(index, above uint32) (VIP, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, err := r.find(index)
	if err != nil {
		return VIP{}, err
	}
	return r.change(i, func(v *VIP) error {
		if above > maxNSMState {
			return fmt.Errorf("mgs: NSM state %d of %s is none", above, v.Addr)
		}
		if v.NSMState == 0 || v.NSMState < above {
			// The highest odd state that is not above it; raiseNSM passes it.
			v.NSMState = max(above, 1) - (max(above, 1)+1)%2
		}
		return v.raiseNSM()
	})
}

// NewVerifiers gives every VIP a new write verifier, because acknowledged data
// may be lost.
func (r *Registry) NewVerifiers() ([]VIP, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.s.VIPs {
		v, err := r.random(8)
		if err != nil {
			return nil, err
		}
		r.s.VIPs[i].Verifier = v
	}
	return append([]VIP(nil), r.s.VIPs...), r.save()
}

// VIPs lists the known service addresses.
func (r *Registry) VIPs() []VIP {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]VIP(nil), r.s.VIPs...)
}

func (r *Registry) save() error {
	b, err := json.MarshalIndent(&r.s, "", "  ")
	if err != nil {
		return fmt.Errorf("mgs: encode the registry: %w", err)
	}
	if err := writeFile(r.path, append(b, '\n')); err != nil {
		return fmt.Errorf("mgs: write the registry: %w", err)
	}
	return nil
}

// writeFile replaces path so that after a crash it has the old or the new
// content, and the new one once it has returned.
func writeFile(path string, b []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
