package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/target/owner"
)

// MGSOptions configure a registry that other nodes use. Dir is required.
type MGSOptions struct {
	Dir string
	// Owner is how the directory's ownership is taken; nil: nobody else can see it.
	Owner *owner.Options
	// Owned is called when the directory is owned and before anything is made in it;
	// its error ends the start.
	Owned func(context.Context) error
	// Table configures the table of targets.
	Table  ir.Config
	Logger *slog.Logger
	// OnFail is called once when the registry fails. It must not block.
	OnFail func(error)
}

// MGS is a running registry.
type MGS struct {
	o       MGSOptions
	own     *owner.Owner
	file    *mgs.File
	service *mgs.Service
	fail    failure
}

// StartMGS takes the directory, waiting as o.Owner says until ctx ends, and serves
// the registry in it, which is made if there is none.
func StartMGS(ctx context.Context, o MGSOptions) (m *MGS, err error) {
	if o.Dir == "" {
		return nil, errors.New("start MGS: no directory")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	m = &MGS{o: o}
	if o.OnFail != nil {
		m.fail.then(o.OnFail)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start %s in %s: %w", mgs.TargetName, o.Dir, err), m.close(context.Background()))
			m = nil
		}
	}()
	if m.own, err = takeStore(ctx, o.Owner, o.Owned, &m.fail); err != nil {
		return m, err
	}
	var fo mgs.FileOptions
	if m.own != nil {
		fo.Guard = m.own.Check
	}
	if m.file, err = mgs.Open(o.Dir, fo); err != nil {
		return m, err
	}
	if _, err = m.file.Identity(ctx); err != nil {
		return m, err
	}
	m.service = mgs.NewService(m.file.Stored, o.Logger)
	m.service.UseTable(ir.NewHub(ir.HubOptions{Config: o.Table, Incarnation: m.incarnation(), Logger: o.Logger}))
	m.fail.then(func(error) { m.service.Close() })
	return m, nil
}

// incarnation is another one for every start: each claims the directory anew.
func (m *MGS) incarnation() uint64 {
	if n := m.Instance(); n != 0 {
		return n
	}
	return uint64(time.Now().UnixNano())
}

// Name is the target's.
func (m *MGS) Name() string { return mgs.TargetName }

// Service is the registry as a target.
func (m *MGS) Service() *mgs.Service { return m.service }

// Registry is the registry itself.
func (m *MGS) Registry() mgs.Registry { return m.file }

// Instance numbers the registry's starts, wherever they were; 0 when its directory is
// owned by nobody.
func (m *MGS) Instance() uint64 {
	if m.own == nil {
		return 0
	}
	return m.own.Record().Generation
}

// Valid tells whether the registry is this process's still: nobody else can have taken
// its directory. It does not wait.
func (m *MGS) Valid() bool {
	return m.fail.get() == nil && (m.own == nil || m.own.Valid())
}

// Err is why the registry has failed, or nil.
func (m *MGS) Err() error { return m.fail.get() }

// Stop ends service; the directory is given up in any case.
func (m *MGS) Stop(ctx context.Context) error {
	if err := m.close(ctx); err != nil {
		return fmt.Errorf("stop %s: %w", mgs.TargetName, err)
	}
	return nil
}

func (m *MGS) close(ctx context.Context) error {
	if m.service != nil {
		m.service.Close()
	}
	return leaveStore(ctx, m.own, m.fail.get() == nil)
}
