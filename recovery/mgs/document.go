package mgs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/baton-nfs/baton/internal/replace"
)

// MaxDocument is the largest size of a registry in a file, in bytes.
const MaxDocument = maxDocument

// Document is what a registry's document tells of itself.
type Document struct {
	Identity string // of the registry, for ever
	VIPs     int    // service addresses that there ever were
	Nodes    int    // whose file system clients there have been
	OSTs     int
}

// Inspect reads a document; name is its place in messages. A damaged one is an error.
func Inspect(name string, doc []byte) (Document, error) {
	if len(doc) > maxDocument {
		return Document{}, fmt.Errorf("mgs: %s has more than %d bytes: it is not a registry", name, maxDocument)
	}
	s, err := decode(name, doc)
	if err != nil {
		return Document{}, err
	}
	return Document{Identity: s.Client, VIPs: len(s.VIPs), Nodes: len(s.Clients), OSTs: s.OSTs}, nil
}

// Expect checks that doc is the registry with an identity. Without a document, or with that of
// another registry, nothing may be read from the storage or written to it: to go on from
// there would forget every address, epoch and verifier. The error is an ErrUnavailable, since
// the right document may come back.
func Expect(place string, doc []byte, identity string) error {
	if doc == nil {
		return missing(fmt.Sprintf("mgs: %s is empty, but this node knows the registry %s: bring that back (baton registry import, or a backup of etcd)", place, identity))
	}
	d, err := Inspect(place, doc)
	if err == nil && d.Identity != identity {
		err = missing(fmt.Sprintf("mgs: %s is the registry %s, but this node knows %s: import the right one (baton registry import --force), or correct where etcd is", place, d.Identity, identity))
	}
	return err
}

// missing is an ErrUnavailable that says what is there instead.
type missing string

func (m missing) Error() string { return string(m) }

func (missing) Unwrap() error { return ErrUnavailable }

// FrozenName is what Freeze renames a registry's file to.
const FrozenName = FileName + ".exported"

// ReadFile returns the document in dir, nil if there is none.
func ReadFile(dir string) ([]byte, error) {
	return (&fileStorage{path: filepath.Join(dir, FileName)}).read()
}

// WriteFile makes doc the registry in dir, durably, over whatever is there. Nobody
// has it open.
func WriteFile(dir string, doc []byte) error {
	if _, err := Inspect("the document", doc); err != nil {
		return err
	}
	if err := replace.File(filepath.Join(dir, FileName), doc, 0o600); err != nil {
		return fmt.Errorf("mgs: write the registry: %w", err)
	}
	return nil
}

// FreezeFile takes the registry in dir away for good, to FrozenName, so that no MGS goes
// on from it. Nobody has it open.
func FreezeFile(dir string) error {
	path := filepath.Join(dir, FileName)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("mgs: freeze the registry: %w", err)
	}
	frozen := filepath.Join(dir, FrozenName)
	if err := replace.File(frozen, b, 0o600); err != nil {
		return fmt.Errorf("mgs: freeze the registry: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("mgs: freeze the registry: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("mgs: freeze the registry: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}
