package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// ClusterKeySize is the cluster key's length in bytes.
const ClusterKeySize = 32

// LoadClusterKey reads the cluster key, and makes it from random if the file
// does not exist. The file must be a regular one that only its owner can read.
func LoadClusterKey(path string, random io.Reader) ([]byte, error) {
	key, err := readClusterKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = make([]byte, ClusterKeySize)
	if _, err := io.ReadFull(random, key); err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".cluster-key-*") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(key)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	// A link, unlike a rename, never replaces a key that somebody else made
	// in the meantime.
	if err := os.Link(tmp.Name(), path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return readClusterKey(path)
		}
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	return key, nil
}

func readClusterKey(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	switch {
	case !fi.Mode().IsRegular() || fi.Size() != ClusterKeySize:
		return nil, fmt.Errorf("cluster key %s: not a file of %d bytes; restore it from a copy (a new key makes all file handles stale)", path, ClusterKeySize)
	case fi.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("cluster key %s: mode %04o lets others read it; run chmod 600 %s", path, fi.Mode().Perm(), path)
	}
	key := make([]byte, ClusterKeySize)
	if _, err := io.ReadFull(f, key); err != nil {
		return nil, fmt.Errorf("cluster key: %w", err)
	}
	return key, nil
}
