package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/etcd"
)

// ExportRegistry returns the registry's document, from wherever the configuration has
// it, and its place. With freeze nobody can change it any more there, because another
// registry is to go on from it; that of an MGS must not be running then.
func ExportRegistry(ctx context.Context, cfg *config.Config, log *slog.Logger, freeze bool) (doc []byte, place string, err error) {
	if cfg.InEtcd() {
		c, err := NewEtcd(cfg, log)
		if err != nil {
			return nil, "", err
		}
		defer c.Close()
		s := c.Storage()
		if doc, _, err = s.Load(ctx); err == nil && doc != nil && freeze {
			if doc, _, err = s.Freeze(ctx); err != nil {
				err = &FrozenError{err}
			}
		}
		return present(doc, s.Name(), err)
	}
	place = filepath.Join(cfg.MGS.Dir, mgs.FileName)
	if freeze {
		leave, err := takeRegistry(ctx, cfg)
		if err != nil {
			return nil, place, fmt.Errorf("freeze %s: %w", place, err)
		}
		defer leave()
	}
	if doc, err = mgs.ReadFile(cfg.MGS.Dir); err == nil && doc == nil {
		if _, ferr := os.Stat(filepath.Join(cfg.MGS.Dir, mgs.FrozenName)); ferr == nil {
			return nil, place, fmt.Errorf("the registry was exported with --freeze: it is in %s now", filepath.Join(cfg.MGS.Dir, mgs.FrozenName))
		}
	}
	return present(doc, place, err)
}

// FrozenError is of an export after which the registry in etcd is frozen, or may be.
type FrozenError struct{ Err error }

// Error implements error.
func (e *FrozenError) Error() string {
	return fmt.Sprintf("%v; the registry may be frozen now, so that it takes no changes: repeat \"baton registry export --freeze\" to a file that can be written; or, to take that back, \"baton registry export\" to such a file and \"baton registry import --force\" of it", e.Err)
}

// Unwrap gives what has failed.
func (e *FrozenError) Unwrap() error { return e.Err }

func present(doc []byte, place string, err error) ([]byte, string, error) {
	if err == nil && doc == nil {
		err = fmt.Errorf("there is no registry: %s is missing", place)
	}
	if err == nil {
		_, err = mgs.Inspect(place, doc)
	}
	return doc, place, err
}

// FreezeRegistry takes the file of an MGS away, once the export has been stored.
func FreezeRegistry(ctx context.Context, cfg *config.Config) error {
	if cfg.InEtcd() {
		return nil // ExportRegistry has done it
	}
	leave, err := takeRegistry(ctx, cfg)
	if err != nil {
		return err
	}
	defer leave()
	return mgs.FreezeFile(cfg.MGS.Dir)
}

// takeRegistry keeps an MGS from starting while its file is worked with. One that
// runs is refused.
func takeRegistry(ctx context.Context, cfg *config.Config) (leave func(), err error) {
	if !cfg.Clustered() {
		return lockDir(cfg.DataDir)
	}
	if _, err := os.Stat(cfg.MGS.Dir); err != nil {
		return nil, fmt.Errorf("directory of the registry: %w; do this on a node that sees it", err)
	}
	var ends []func()
	if err := takeForCheck(ctx, cfg, cfg.MGS.Dir, &ends); err != nil {
		return nil, fmt.Errorf("%w; stop the MGS first", err)
	}
	return ends[0], nil
}

// ErrRegistryExists: there is a registry already.
var ErrRegistryExists = errors.New("there is a registry already, which is not overwritten")

// ImportRegistry makes doc the registry where the configuration has it, and returns that
// place. A registry that is there is overwritten only by force.
func ImportRegistry(ctx context.Context, cfg *config.Config, log *slog.Logger, doc []byte, force bool) (place string, err error) {
	if _, err := mgs.Inspect("the file", doc); err != nil {
		return "", err
	}
	if cfg.InEtcd() {
		c, err := NewEtcd(cfg, log)
		if err != nil {
			return "", err
		}
		defer c.Close()
		s := c.Storage()
		if force {
			return s.Name(), s.Replace(ctx, doc)
		}
		if err = s.Swap(ctx, 0, doc); errors.Is(err, mgs.ErrConflict) || errors.Is(err, etcd.ErrFrozen) {
			err = fmt.Errorf("%s: %w", s.Name(), ErrRegistryExists)
		}
		return s.Name(), err
	}
	place = filepath.Join(cfg.MGS.Dir, mgs.FileName)
	if err := os.MkdirAll(cfg.MGS.Dir, 0o700); err != nil {
		return place, err
	}
	leave, err := takeRegistry(ctx, cfg)
	if err != nil {
		return place, err
	}
	defer leave()
	if _, err := os.Stat(place); !force && !errors.Is(err, fs.ErrNotExist) {
		return place, errors.Join(fmt.Errorf("%s: %w", place, ErrRegistryExists), err)
	}
	return place, mgs.WriteFile(cfg.MGS.Dir, doc)
}

// RegistryStatus describes a registry.
type RegistryStatus struct {
	Kind  string `json:"kind"`
	Place string `json:"place"`
	// Of the document; nothing if there is none.
	Identity  string `json:"identity,omitempty"`
	Bytes     int    `json:"bytes,omitempty"`
	Addresses int    `json:"addresses,omitempty"`
	Nodes     int    `json:"nodes,omitempty"`
	OSTs      int    `json:"osts,omitempty"`
	Error     string `json:"error,omitempty"` // why it cannot be read
	// Of etcd.
	Revision uint64              `json:"revision,omitempty"`
	Frozen   bool                `json:"frozen,omitempty"`
	Leader   string              `json:"leader,omitempty"` // node that was elected
	Term     uint64              `json:"term,omitempty"`
	Members  []etcd.MemberStatus `json:"members,omitempty"`
}

// RegistryState describes the registry of a configuration.
func RegistryState(ctx context.Context, cfg *config.Config, log *slog.Logger) (*RegistryStatus, error) {
	r := &RegistryStatus{Kind: cfg.Registry.Kind, Place: filepath.Join(cfg.MGS.Dir, mgs.FileName)}
	var doc []byte
	var err error
	if cfg.InEtcd() {
		c, cerr := NewEtcd(cfg, log)
		if cerr != nil {
			return nil, cerr
		}
		defer c.Close()
		s := c.Storage()
		r.Place = s.Name()
		if doc, r.Revision, err = s.Load(ctx); err == nil {
			r.Frozen, err = s.Frozen(ctx)
		}
		if err == nil {
			r.Leader, r.Term, err = c.Leader(ctx)
		}
		r.Members = c.Members(ctx)
	} else {
		doc, err = mgs.ReadFile(cfg.MGS.Dir)
	}
	var d mgs.Document
	if err == nil && doc != nil {
		d, err = mgs.Inspect(r.Place, doc)
	}
	if err != nil {
		r.Error = err.Error()
	}
	r.Identity, r.Bytes, r.Addresses, r.Nodes, r.OSTs = d.Identity, len(doc), d.VIPs, d.Nodes, d.OSTs
	return r, nil
}
