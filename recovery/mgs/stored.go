package mgs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Storage keeps one document. Its methods are safe for concurrent use.
type Storage interface {
	// Name is the document's place, for messages.
	Name() string
	// Load returns the document and its revision, which differs from those of all
	// other contents since; no document when there was never one. The bytes are
	// not changed by anybody.
	Load(ctx context.Context) (doc []byte, revision uint64, err error)
	// Swap replaces the document durably if its revision is still the given one;
	// ErrConflict if not. After another error it is replaced or not.
	Swap(ctx context.Context, revision uint64, doc []byte) error
}

// Waiter is what a Storage may have besides, if it learns of changes. Without it a
// change by another process is noticed by reading again.
type Waiter interface {
	// Wait returns nil when the document's revision is another one than the given, or
	// the error that keeps it from knowing; ctx's when that ends.
	Wait(ctx context.Context, revision uint64) error
}

// ErrUnavailable: the storage does not answer for now. A change was made or not; the
// same call may succeed later.
var ErrUnavailable = errors.New("the registry's storage does not answer")

// ErrConflict: somebody else has replaced the document since it was loaded.
var ErrConflict = errors.New("the registry was changed by somebody else meanwhile")

// ErrFenced: this process does not have the right to the document any more.
var ErrFenced = errors.New("the registry is in other hands")

// Stored is a Registry whose document is in a Storage.
type Stored struct {
	storage Storage
	rand    io.Reader
	// mu lets the changes of this process wait for each other instead of
	// conflicting. It is held while the storage works.
	mu sync.Mutex

	// news guards the next two; it is never held while waiting.
	news sync.Mutex
	// changed is closed with the next change by this Stored, nil if nobody waits.
	changed chan struct{}
	// seen is the last view, of the storage's revision seenRev; nil: none.
	seen    *View
	seenRev uint64
}

var (
	_ Registry = (*Stored)(nil)
	_ Floating = (*Stored)(nil)
)

// NewStored returns the registry in a storage. rnd is the source of UUIDs and
// verifiers; crypto/rand's Reader but in tests.
func NewStored(s Storage, rnd io.Reader) *Stored { return &Stored{storage: s, rand: rnd} }

// Changed returns as soon as the document's revision is another than the given one,
// also if another process has changed it. It is errors.ErrUnsupported with a storage
// that is no Waiter: that has no document but what comes by way of this Stored.
func (r *Stored) Changed(ctx context.Context, revision uint64) error {
	w, ok := r.storage.(Waiter)
	if !ok {
		return fmt.Errorf("mgs: wait for a change of %s: %w", r.storage.Name(), errors.ErrUnsupported)
	}
	return w.Wait(ctx, revision)
}

func (r *Stored) load(ctx context.Context) (*state, []byte, uint64, error) {
	doc, rev, err := r.storage.Load(ctx)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("mgs: read the registry: %w", err)
	}
	var s *state
	if doc == nil {
		s, err = newState(r.rand)
	} else {
		s, err = decode(r.storage.Name(), doc)
	}
	return s, doc, rev, err
}

// update makes a step and stores what it has changed. It may run the step
// several times, each on a document of its own.
func (r *Stored) update(ctx context.Context, step func(*state) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		s, doc, rev, err := r.load(ctx)
		if err != nil {
			return err
		}
		if err := step(s); err != nil {
			return err
		}
		b, err := s.encode()
		if err != nil || bytes.Equal(b, doc) {
			return err
		}
		if len(b) > maxDocument {
			return &Error{Code: CodeLimit, Text: fmt.Sprintf("the registry would have %d bytes", len(b))}
		}
		switch err := r.storage.Swap(ctx, rev, b); {
		case err == nil:
			r.tell()
			return nil
		case !errors.Is(err, ErrConflict):
			return fmt.Errorf("mgs: write the registry: %w", err)
		}
	}
}

// execute carries out a call of another node. An error means that there is no
// answer.
func (r *Stored) execute(ctx context.Context, c *call) (reply []byte, err error) {
	if c.method.changes {
		err = r.update(ctx, func(s *state) (err error) {
			reply, err = s.apply(r.rand, c)
			return err
		})
		return reply, err
	}
	s, doc, _, err := r.load(ctx)
	if err != nil {
		return nil, err
	}
	if doc == nil && c.method == methods[methodIdentity] {
		// What load has made up is gone again. The name is told only of what is stored.
		id, err := r.Identity(ctx)
		if err != nil {
			return nil, err
		}
		return encodeReply(identityResult{id}, nil)
	}
	result, err := c.method.run(s, r.rand, c.Node, c.Args)
	if err != nil {
		return nil, err
	}
	return encodeReply(result, nil)
}

// StartClient implements Registry.
func (r *Stored) StartClient(ctx context.Context, node string) (id wire.ClientID, gen uint64, err error) {
	err = r.update(ctx, func(s *state) (err error) {
		id, gen, err = s.startClient(r.rand, node)
		return err
	})
	return id, gen, err
}

// Serve implements Registry.
func (r *Stored) Serve(ctx context.Context, addr netip.Addr, node string) (v VIP, err error) {
	err = r.update(ctx, func(s *state) (err error) {
		v, err = s.serve(r.rand, addr, node)
		return err
	})
	return v, err
}

// Stopped implements Registry.
func (r *Stored) Stopped(ctx context.Context, index uint32, epoch uint64) error {
	return r.update(ctx, func(s *state) error { return s.stopped(index, epoch) })
}

// Abandoned implements Registry.
func (r *Stored) Abandoned(ctx context.Context, index uint32, epoch uint64) error {
	return r.update(ctx, func(s *state) error { return s.abandoned(index, epoch) })
}

// RaiseNSM implements Registry.
func (r *Stored) RaiseNSM(ctx context.Context, index uint32, epoch uint64, above uint32) (v VIP, err error) {
	err = r.update(ctx, func(s *state) (err error) {
		v, err = s.raiseNSM(index, epoch, above)
		return err
	})
	return v, err
}

// NewVerifiers implements Registry.
func (r *Stored) NewVerifiers(ctx context.Context, node string, indexes ...uint32) (l []VIP, err error) {
	err = r.update(ctx, func(s *state) (err error) {
		l, err = s.newVerifiers(r.rand, node, indexes)
		return err
	})
	return l, err
}

// VIPs implements Registry.
func (r *Stored) VIPs(ctx context.Context) ([]VIP, error) {
	s, _, _, err := r.load(ctx)
	if err != nil {
		return nil, err
	}
	return s.VIPs, nil
}

// OSTs implements Registry.
func (r *Stored) OSTs(ctx context.Context) (int, error) {
	s, _, _, err := r.load(ctx)
	if err != nil {
		return 0, err
	}
	return s.OSTs, nil
}

// SetOSTs implements Registry.
func (r *Stored) SetOSTs(ctx context.Context, n int) error {
	return r.update(ctx, func(s *state) error { return s.setOSTs(n) })
}

// Made implements Registry.
func (r *Stored) Made(ctx context.Context, target string) (bool, error) {
	s, _, _, err := r.load(ctx)
	if err != nil {
		return false, err
	}
	return s.made(target)
}

// SetMade implements Registry.
func (r *Stored) SetMade(ctx context.Context, target string) error {
	return r.update(ctx, func(s *state) error { return s.setMade(target) })
}

// Clients implements Registry.
func (r *Stored) Clients(ctx context.Context) (map[string]wire.ClientID, error) {
	s, _, _, err := r.load(ctx)
	if err != nil {
		return nil, err
	}
	l := make(map[string]wire.ClientID, len(s.Clients))
	for n, c := range s.Clients {
		l[n] = c.clientID()
	}
	return l, nil
}

// Identity implements Registry. It makes the document if there is none.
func (r *Stored) Identity(ctx context.Context) (id string, err error) {
	err = r.update(ctx, func(s *state) error {
		id = s.Client
		return nil
	})
	return id, err
}

// Agree implements Registry.
func (r *Stored) Agree(ctx context.Context, name, value string) (v string, err error) {
	err = r.update(ctx, func(s *state) (err error) {
		v, err = s.agree(name, value)
		return err
	})
	return v, err
}
