package mgs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/baton-nfs/baton/internal/replace"
)

// File is a registry in one file, which is replaced atomically. Only one process
// at a time has it open.
type File struct {
	*Stored
	fresh bool
}

// FileName is the registry's name in its directory.
const FileName = "registry.json"

// FileOptions of Open; the zero value is for a node that is alone.
type FileOptions struct {
	// Guard, if set, is asked before every use of the file; its error, joined with
	// ErrFenced, refuses it. It is for a directory that several nodes see.
	Guard func() error
	// Rand is the source of UUIDs and verifiers, crypto/rand by default.
	Rand io.Reader
}

// Open reads the registry in dir. Without a file the first change makes it. A
// missing directory is an error, since it may be that of a disk which is not
// mounted, and so is a damaged file.
func Open(dir string, o FileOptions) (*File, error) {
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if fi, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("mgs: directory of the registry: %w; mount its disk, or make it for a new registry", err)
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("mgs: directory of the registry: %s is none", dir)
	}
	s := &fileStorage{path: filepath.Join(dir, FileName), guard: o.Guard}
	var err error
	if s.doc, err = s.read(); err != nil {
		return nil, err
	}
	return &File{Stored: NewStored(s, o.Rand), fresh: s.doc == nil}, nil
}

// Fresh tells that there was no registry when it was opened.
func (f *File) Fresh() bool { return f.fresh }

// fileStorage is the Storage of a file. Its revision counts changes since it
// was opened.
type fileStorage struct {
	path  string
	guard func() error

	mu  sync.Mutex
	doc []byte
	rev uint64
	// changed is closed with the next change, nil if nobody waits.
	changed chan struct{}
}

var _ Waiter = (*fileStorage)(nil)

// Wait implements Waiter: nobody else changes the file.
func (f *fileStorage) Wait(ctx context.Context, rev uint64) error {
	f.mu.Lock()
	if rev != f.rev {
		f.mu.Unlock()
		return nil
	}
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	c := f.changed
	f.mu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read returns the file's content if it is a registry, nothing if there is none.
func (f *fileStorage) read() ([]byte, error) {
	fd, err := os.Open(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("mgs: read the registry: %w", err)
	}
	defer fd.Close()
	b, err := io.ReadAll(io.LimitReader(fd, maxDocument+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("mgs: read the registry: %w", err)
	case len(b) > maxDocument:
		return nil, fmt.Errorf("mgs: %s is damaged (it has more than %d bytes): restore it from a backup", f.path, maxDocument)
	}
	_, err = decode(f.path, b)
	return b, err
}

func (f *fileStorage) Name() string { return f.path }

func (f *fileStorage) allowed() error {
	if f.guard == nil {
		return nil
	}
	if err := f.guard(); err != nil {
		return fmt.Errorf("%w: %w", ErrFenced, err)
	}
	return nil
}

func (f *fileStorage) Load(context.Context) ([]byte, uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.doc, f.rev, f.allowed()
}

// Swap takes a document as stored when it is durable. After an error the old
// one counts, although the new one may be in the file already: both are states
// that the next start can go on from.
func (f *fileStorage) Swap(_ context.Context, rev uint64, doc []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.allowed(); err != nil {
		return err
	}
	if rev != f.rev {
		return ErrConflict
	}
	if err := replace.File(f.path, doc, 0o600); err != nil {
		return err
	}
	// It may have come too late for the next owner to see.
	if err := f.allowed(); err != nil {
		return err
	}
	f.doc, f.rev = doc, f.rev+1
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
	return nil
}
