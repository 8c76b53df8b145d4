package ca

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Entry is one certificate of a directory.
type Entry struct {
	// Name is the node's name, as its file is called, or the authority's.
	Name string
	CA   bool
	// Cert is nil if the file could not be read.
	Cert *x509.Certificate
	// Key tells whether the private key is there, too.
	Key bool
	// Problem says why nobody accepts the certificate; nil if only its time may
	// prevent that.
	Problem error
}

// Warnings tells of the entry's problem and what Node.Warnings tells.
func (e *Entry) Warnings(now time.Time, within time.Duration) []string {
	var w []string
	name := e.Name
	if !e.CA {
		name = "node " + name
	}
	if e.Problem != nil {
		w = append(w, fmt.Sprintf("the certificate of %s cannot be used: %v", name, e.Problem))
	}
	if e.Cert != nil {
		w = append(w, expiry(name, e.Cert, now, within)...)
	}
	return w
}

// Usable tells whether the certificate is accepted at that time.
func (e *Entry) Usable(now time.Time) bool {
	return e.Problem == nil && !now.Before(e.Cert.NotBefore) && now.Before(e.Cert.NotAfter)
}

// List reads the certificates in dir: the authorities, then the nodes by name.
// The error is that there is no authority, or dir cannot be read.
func List(dir string) ([]Entry, error) {
	cas, pool, err := loadCAs(dir)
	if err == nil && len(cas) == 0 {
		err = fmt.Errorf("%s holds no certificate", CAFile)
	}
	if err != nil {
		return nil, fmt.Errorf("list certificates: %w", err)
	}
	var l []Entry
	for i, c := range cas {
		e := Entry{Name: c.Subject.CommonName, CA: true, Cert: c}
		if i == 0 { // the key is that of the first, as Load has it
			e.Key, e.Problem = keyOf(filepath.Join(dir, CAFile), filepath.Join(dir, CAKeyFile))
		}
		l = append(l, e)
	}
	names, err := nodes(dir)
	if err != nil {
		return nil, fmt.Errorf("list certificates: %w", err)
	}
	for _, name := range names {
		e := Entry{Name: name}
		cp, _ := NodePaths(dir, name)
		if e.Cert, e.Problem = readCert(cp); e.Problem == nil {
			if e.Problem = CheckName(name); e.Problem == nil {
				e.Problem = belongs(e.Cert, name, pool)
			}
		}
		if e.Problem == nil {
			e.Key, e.Problem = keyOf(NodePaths(dir, name))
		}
		l = append(l, e)
	}
	return l, nil
}

// nodes lists the nodes that have a file in dir, sorted.
func nodes(dir string) ([]string, error) {
	files, err := os.ReadDir(dir)
	var l []string
	for _, f := range files {
		if name, ok := strings.CutSuffix(f.Name(), ".pem"); ok && f.Name() != CAFile {
			l = append(l, name)
		}
	}
	return l, err
}

// free tells whether no certificate in dir is good for the name. One that cannot
// be read is good for nothing.
func free(dir, name string) error {
	names, err := nodes(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		cp, _ := NodePaths(dir, n)
		if c, err := readCert(cp); err == nil && c.VerifyHostname(name) == nil {
			return fmt.Errorf("the certificate of node %s is good for the name %s already", n, name)
		}
	}
	return nil
}

// readCert reads a file's first certificate.
func readCert(path string) (*x509.Certificate, error) {
	b, err := readFile(path, false)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != blockCert {
		return nil, errors.New("the file does not begin with a certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

// keyOf tells whether a certificate's key is there, and what is wrong with it.
func keyOf(certPath, keyPath string) (bool, error) {
	if _, err := os.Lstat(keyPath); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	_, _, err := readPair(certPath, keyPath)
	return true, err
}
