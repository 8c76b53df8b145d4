// Package ca makes and loads the certificates by which the nodes of a cluster
// know each other: one certificate authority per cluster, one certificate per
// node that serves as server and as client certificate and carries the node's
// name. Keys are ECDSA P-256, connections TLS 1.3.
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// Names of the files in a directory of certificates; those of nodes are given
// by NodePaths.
const (
	CAFile    = "ca.pem" // certificate of the authority; on every node
	CAKeyFile = "ca.key" // its key; only where certificates are made
)

// Types of PEM blocks.
const (
	blockCert = "CERTIFICATE"
	blockKey  = "PRIVATE KEY"
)

// Default validities.
const (
	DefaultCAValidity   = 20 * 365 * 24 * time.Hour
	DefaultNodeValidity = 5 * 365 * 24 * time.Hour
	// backdate makes certificates valid at once on nodes whose clocks are behind.
	backdate = time.Hour
)

// maxFile bounds the files that are read, in bytes.
const maxFile = 1 << 20

// Options of Create and IssueNode; zero fields mean the defaults.
type Options struct {
	// Validity defaults to DefaultCAValidity or DefaultNodeValidity. A node's
	// certificate never outlives the authority's.
	Validity time.Duration
	// Hosts are further names and IP addresses of a node's certificate. Whoever
	// has it passes for a node of each name.
	Hosts []string
	// Now is the current time, time.Now by default.
	Now func() time.Time
	// Rand is the source of keys and serial numbers, crypto/rand by default.
	Rand io.Reader
}

func (o *Options) defaults(v time.Duration) {
	if o.Validity <= 0 {
		o.Validity = v
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
}

// ErrExists: a file that would be written is there already. Nothing is ever
// overwritten.
var ErrExists = errors.New("file exists and is not overwritten")

var nodeName = regexp.MustCompile(`^[a-z]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)

// CheckName tells whether name can be a node's name: a DNS name of lower-case
// letters, digits, hyphens and dots, beginning with a letter, of at most 253
// bytes with at most 63 between dots; and not "ca", whose files are the authority's.
func CheckName(name string) error {
	bad := len(name) > 253 || !nodeName.MatchString(name) || name == "ca"
	for i, n := 0, 0; i < len(name) && !bad; i++ {
		if n++; name[i] == '.' {
			n = 0
		}
		bad = n > 63
	}
	if bad {
		return fmt.Errorf("node name %q: use lower-case letters, digits, hyphens and dots, a letter first, and not \"ca\"", name)
	}
	return nil
}

// maxClusterName keeps the authority's common name within 64 bytes (RFC 5280
// appendix A.1, ub-common-name).
const maxClusterName = 60

// CheckCluster tells whether name can be a cluster's name: 1 to 60 printable
// ASCII characters.
func CheckCluster(name string) error {
	bad := name == "" || len(name) > maxClusterName
	for i := range len(name) {
		bad = bad || name[i] < ' ' || name[i] > '~'
	}
	if bad {
		return fmt.Errorf("cluster name %.80q: use 1 to %d printable ASCII characters", name, maxClusterName)
	}
	return nil
}

// CA is a certificate authority that can issue.
type CA struct {
	Cert *x509.Certificate
	key  crypto.Signer
}

// Create makes the authority of the named cluster and writes CAFile and
// CAKeyFile in dir, which exists. It fails with ErrExists if one of them is
// there.
func Create(dir, cluster string, o Options) (*CA, error) {
	o.defaults(DefaultCAValidity)
	if err := CheckCluster(cluster); err != nil {
		return nil, fmt.Errorf("create the cluster's CA: %w", err)
	}
	if err := absent(filepath.Join(dir, CAFile), filepath.Join(dir, CAKeyFile)); err != nil {
		return nil, fmt.Errorf("create the cluster's CA: %w", err)
	}
	now := o.Now()
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: cluster + " CA", Organization: []string{cluster}},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(o.Validity),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), o.Rand)
	if err != nil {
		return nil, fmt.Errorf("create the cluster's CA: %w", err)
	}
	c, err := sign(t, t, key, key, o.Rand)
	if err != nil {
		return nil, fmt.Errorf("create the cluster's CA: %w", err)
	}
	if err := writePair(filepath.Join(dir, CAFile), filepath.Join(dir, CAKeyFile), c, key); err != nil {
		return nil, fmt.Errorf("create the cluster's CA: %w", err)
	}
	return &CA{Cert: c, key: key}, nil
}

// Load reads the authority that Create has written to dir.
func Load(dir string) (*CA, error) {
	pair, cert, err := readPair(filepath.Join(dir, CAFile), filepath.Join(dir, CAKeyFile))
	if err != nil {
		return nil, fmt.Errorf("load the cluster's CA: %w", err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !cert.IsCA {
		return nil, fmt.Errorf("load the cluster's CA: %s is not the certificate of an authority", filepath.Join(dir, CAFile))
	}
	return &CA{Cert: cert, key: key}, nil
}

// NodePaths gives the files of a node's certificate and key in dir.
func NodePaths(dir, node string) (cert, key string) {
	return filepath.Join(dir, node+".pem"), filepath.Join(dir, node+".key")
}

// IssueNode makes a certificate for a node and writes it and its key to dir (see
// NodePaths). It fails with ErrExists if one of the files is there.
func (c *CA) IssueNode(dir, node string, o Options) error {
	o.defaults(DefaultNodeValidity)
	if err := c.issueNode(dir, node, o); err != nil {
		return fmt.Errorf("issue a certificate for node %q: %w", node, err)
	}
	return nil
}

func (c *CA) issueNode(dir, node string, o Options) error {
	if err := CheckName(node); err != nil {
		return err
	}
	cp, kp := NodePaths(dir, node)
	if err := absent(cp, kp); err != nil {
		return err
	}
	if err := free(dir, node); err != nil {
		return err
	}
	now := o.Now()
	if !now.Before(c.Cert.NotAfter) {
		return fmt.Errorf("the CA has expired on %s: make a new one", c.Cert.NotAfter.Format(time.DateOnly))
	}
	end := now.Add(o.Validity)
	if end.After(c.Cert.NotAfter) {
		end = c.Cert.NotAfter
	}
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: node, Organization: c.Cert.Subject.Organization},
		DNSNames:  []string{node},
		NotBefore: now.Add(-backdate), NotAfter: end,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, h := range o.Hosts {
		if ip, err := netip.ParseAddr(h); err == nil && ip.Zone() == "" {
			t.IPAddresses = append(t.IPAddresses, ip.AsSlice())
			continue
		}
		if err := CheckName(h); err != nil {
			return fmt.Errorf("host: %w, or give an IP address", err)
		}
		if err := free(dir, h); err != nil {
			return fmt.Errorf("host: %w", err)
		}
		t.DNSNames = append(t.DNSNames, h)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), o.Rand)
	if err != nil {
		return err
	}
	cert, err := sign(t, c.Cert, key, c.key, o.Rand)
	if err != nil {
		return err
	}
	return writePair(cp, kp, cert, key)
}

func sign(t, parent *x509.Certificate, key *ecdsa.PrivateKey, by crypto.Signer, random io.Reader) (*x509.Certificate, error) {
	b := make([]byte, 16)
	if _, err := io.ReadFull(random, b); err != nil {
		return nil, err
	}
	b[0] = b[0]&0x7f | 0x40 // positive, and of full length
	t.SerialNumber = new(big.Int).SetBytes(b)
	der, err := x509.CreateCertificate(random, t, parent, key.Public(), by)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func absent(paths ...string) error {
	for _, p := range paths {
		if _, err := os.Lstat(p); err == nil {
			return fmt.Errorf("%s: %w", p, ErrExists)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// writePair writes the key and then the certificate, so that a certificate
// without key is never left behind.
func writePair(certPath, keyPath string, cert *x509.Certificate, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writeFile(keyPath, pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: der})); err != nil {
		return err
	}
	if err := writeFile(certPath, pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: cert.Raw})); err != nil {
		return errors.Join(err, os.Remove(keyPath))
	}
	return nil
}

// writeFile makes a file of mode 0600, complete or not at all, durably, and
// only if there is none of that name.
func writeFile(path string, b []byte) error {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, ".cert-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	// A link, unlike a rename, never replaces a file.
	if err := os.Link(tmp.Name(), path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s: %w", path, ErrExists)
		}
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func readFile(path string, secret bool) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch {
	case !fi.Mode().IsRegular() || fi.Size() > maxFile:
		return nil, fmt.Errorf("%s: not a certificate or key file", path)
	case secret && fi.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s: mode %04o lets others read the key; run chmod 600 %s", path, fi.Mode().Perm(), path)
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

func readPair(certPath, keyPath string) (tls.Certificate, *x509.Certificate, error) {
	cb, err := readFile(certPath, false)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	kb, err := readFile(keyPath, true)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	pair, err := tls.X509KeyPair(cb, kb)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("%s and %s: %w", certPath, keyPath, err)
	}
	return pair, pair.Leaf, nil
}

// Node is a node's identity.
type Node struct {
	Name string
	Cert *x509.Certificate
	// CA holds the authorities whose nodes are trusted, more than one while the
	// cluster changes its authority: ca.pem may hold several certificates.
	CA   []*x509.Certificate
	pair tls.Certificate
	pool *x509.CertPool
}

// LoadNode reads the identity of a node from dir and checks that it belongs to
// an authority of CAFile. An expired certificate is no error here: connections
// fail with it, and Warnings tells.
func LoadNode(dir, node string) (*Node, error) {
	n, err := loadNode(dir, node)
	if err != nil {
		return nil, fmt.Errorf("load the certificate of node %q: %w", node, err)
	}
	return n, nil
}

func loadNode(dir, node string) (*Node, error) {
	if err := CheckName(node); err != nil {
		return nil, err
	}
	cp, kp := NodePaths(dir, node)
	pair, cert, err := readPair(cp, kp)
	if err != nil {
		return nil, err
	}
	n := &Node{Name: node, Cert: cert, pair: pair}
	if n.CA, n.pool, err = loadCAs(dir); err != nil {
		return nil, err
	}
	if err := belongs(cert, node, n.pool); err != nil {
		return nil, err
	}
	return n, nil
}

// loadCAs reads the authorities of CAFile.
func loadCAs(dir string) ([]*x509.Certificate, *x509.CertPool, error) {
	b, err := readFile(filepath.Join(dir, CAFile), false)
	if err != nil {
		return nil, nil, err
	}
	var l []*x509.Certificate
	pool := x509.NewCertPool()
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return l, pool, nil
		}
		if block.Type != blockCert {
			return nil, nil, fmt.Errorf("%s: holds a %s", CAFile, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", CAFile, err)
		}
		if !c.IsCA {
			return nil, nil, fmt.Errorf("%s: %s is not an authority", CAFile, c.Subject)
		}
		l = append(l, c)
		pool.AddCert(c)
	}
}

// belongs tells why a certificate is not that of a node of the cluster, but for
// its time.
func belongs(cert *x509.Certificate, node string, cas *x509.CertPool) error {
	if err := cert.VerifyHostname(node); err != nil {
		return err
	}
	_, err := cert.Verify(x509.VerifyOptions{
		Roots: cas, CurrentTime: cert.NotBefore.Add(backdate),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return fmt.Errorf("it is not of the CA in %s: %w", CAFile, err)
	}
	return nil
}

// Server is the configuration of a node's listeners: TLS 1.3, clients show a
// certificate of the cluster. Whose it is the server asks the connection.
func (n *Node) Server() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		Certificates:                []tls.Certificate{n.pair},
		ClientAuth:                  tls.RequireAndVerifyClientCert,
		ClientCAs:                   n.pool,
		SessionTicketsDisabled:      true, // resumed sessions would outlive a change of the CA
		DynamicRecordSizingDisabled: true,
	}
}

// Client is the configuration for connections to the named node. With an empty
// name any node of the cluster is accepted.
func (n *Node) Client(peer string) *tls.Config {
	c := &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		Certificates:                []tls.Certificate{n.pair},
		RootCAs:                     n.pool,
		ServerName:                  peer,
		DynamicRecordSizingDisabled: true,
	}
	if peer == "" {
		// The library cannot verify without a name. All of it but the name is done
		// here.
		c.InsecureSkipVerify = true
		c.VerifyConnection = func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the server shows no certificate")
			}
			o := x509.VerifyOptions{Roots: n.pool, Intermediates: x509.NewCertPool(), DNSName: s.ServerName, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
			for _, c := range s.PeerCertificates[1:] {
				o.Intermediates.AddCert(c)
			}
			_, err := s.PeerCertificates[0].Verify(o)
			return err
		}
	}
	return c
}

// Warnings names what has expired or will within the given time. No error
// tells of it before connections fail.
func (n *Node) Warnings(now time.Time, within time.Duration) []string {
	w := expiry("node "+n.Name, n.Cert, now, within)
	for _, c := range n.CA {
		w = append(w, expiry(c.Subject.CommonName, c, now, within)...)
	}
	return w
}

func expiry(what string, c *x509.Certificate, now time.Time, within time.Duration) (w []string) {
	day := c.NotAfter.Format(time.DateOnly)
	switch left := c.NotAfter.Sub(now); {
	case left <= 0:
		w = append(w, fmt.Sprintf("the certificate of %s has expired on %s", what, day))
	case left <= within:
		w = append(w, fmt.Sprintf("the certificate of %s expires on %s, in %d days", what, day, int(left.Hours()/24)))
	}
	if now.Before(c.NotBefore) {
		w = append(w, fmt.Sprintf("the certificate of %s is valid only from %s: is the clock right?", what, c.NotBefore.Format(time.RFC3339)))
	}
	return w
}
