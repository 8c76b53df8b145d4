// Package mgs keeps what the whole service agrees on: which node and file
// system client this is, the service addresses (VIPs) with their epochs and
// write verifiers. This is the embedded registry of a single node: one file
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
}

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

// Serve registers addr if it is new and raises its epoch.
func (r *Registry) Serve(addr netip.Addr) (VIP, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.s.VIPs {
		if v := &r.s.VIPs[i]; v.Addr == addr {
			v.Epoch++
			return *v, r.save()
		}
	}
	ver, err := r.random(8)
	if err != nil {
		return VIP{}, err
	}
	v := VIP{Index: r.s.NextIndex, Addr: addr, Epoch: 1, Verifier: ver}
	r.s.NextIndex++
	r.s.VIPs = append(r.s.VIPs, v)
	return v, r.save()
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
