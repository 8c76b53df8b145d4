// Package replace replaces small files as a whole: whoever reads one, after a crash
// too, finds the old or the new content.
package replace

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// suffix names the file in which new content is written. One that a crash has left is
// written over the next time.
const suffix = ".new"

// File makes data the content of path, durably: file and directory are flushed. perm is
// that of a new file. After an error path has the old content, or, if the error is of
// the directory's flush, the new one, which a power cut may take back. Callers for the
// same path take turns.
func File(path string, data []byte, perm fs.FileMode) error {
	return system.replace(path, data, perm, true)
}

// Unflushed is File without flushing: a power cut may leave anything. It is for what a
// boot makes void.
func Unflushed(path string, data []byte, perm fs.FileMode) error {
	return system.replace(path, data, perm, false)
}

// file is what is needed of *os.File.
type file interface {
	io.WriteCloser
	Sync() error
}

// calls are the system's; tests have others.
type calls struct {
	open   func(path string, flag int, perm fs.FileMode) (file, error)
	rename func(from, to string) error
	remove func(path string) error
}

var system = calls{
	open:   func(path string, flag int, perm fs.FileMode) (file, error) { return os.OpenFile(path, flag, perm) },
	rename: os.Rename,
	remove: os.Remove,
}

func (c *calls) replace(path string, data []byte, perm fs.FileMode, flush bool) error {
	tmp := path + suffix
	f, err := c.open(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && flush {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = c.rename(tmp, path)
	}
	if err != nil {
		_ = c.remove(tmp) // the next attempt writes over it
		return err
	}
	if !flush {
		return nil
	}
	d, err := c.open(filepath.Dir(path), os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	if err = errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("flush the directory of %s: %w", path, err)
	}
	return nil
}
