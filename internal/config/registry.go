package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Registry tells where the registry of a cluster is.
type Registry struct {
	Kind string `toml:"kind"`

	Endpoints    []string `toml:"endpoints"`
	CA           string   `toml:"ca"`
	Cert         string   `toml:"cert"`
	Key          string   `toml:"key"`
	User         string   `toml:"user"`
	PasswordFile string   `toml:"password_file"`
	Prefix       string   `toml:"prefix"`
	MaxDocument  Size     `toml:"max_document"`

	Members         []string `toml:"members"`
	ClientPort      int      `toml:"client_port"`
	PeerPort        int      `toml:"peer_port"`
	Heartbeat       Duration `toml:"heartbeat"`
	ElectionTimeout Duration `toml:"election_timeout"`
	Lease           Duration `toml:"lease"`
}

// Values of Registry.Kind.
const (
	RegistryMGS      = "mgs"
	RegistryEtcd     = "etcd"
	RegistryEmbedded = "etcd-embedded"
)

// InEtcd tells whether the registry is in etcd, and so there is no MGS.
func (c *Config) InEtcd() bool {
	return c.Registry.Kind == RegistryEtcd || c.Registry.Kind == RegistryEmbedded
}

// Member tells whether this node runs a member of the embedded etcd.
func (c *Config) Member() bool {
	return c.Registry.Kind == RegistryEmbedded && slices.Contains(c.Registry.Members, c.Cluster.Node)
}

// RegistryTLS is for connections to the etcd with the registry; nil: they are not
// protected.
func (c *Config) RegistryTLS() (*tls.Config, error) {
	r := &c.Registry
	if r.Kind == RegistryEmbedded {
		n, err := c.LoadTLS()
		if n == nil || err != nil {
			return nil, err
		}
		return n.Client(""), nil
	}
	if len(r.Endpoints) == 0 || !strings.HasPrefix(r.Endpoints[0], "https:") {
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if r.CA != "" {
		b, err := os.ReadFile(r.CA)
		if err != nil {
			return nil, fmt.Errorf("registry.ca: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("registry.ca: %s has no certificate", r.CA)
		}
	}
	if r.Cert != "" {
		pair, err := tls.LoadX509KeyPair(r.Cert, r.Key)
		if err != nil {
			return nil, fmt.Errorf("registry.cert: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// RegistryPassword reads the password of registry.user, "" if there is none.
func (c *Config) RegistryPassword() (string, error) {
	if c.Registry.PasswordFile == "" {
		return "", nil
	}
	p, err := readPassword(c.Registry.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("registry.password_file: %w", err)
	}
	return p, nil
}

// maxPassword bounds the file of a password, in bytes.
const maxPassword = 4096

func readPassword(path string) (string, error) {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return "", err
	case !fi.Mode().IsRegular() || fi.Size() > maxPassword:
		return "", fmt.Errorf("%s is not a file with a password", path)
	case fi.Mode().Perm()&0o077 != 0:
		return "", fmt.Errorf("mode %04o lets others read it; run chmod 600 %s", fi.Mode().Perm(), path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	if line = strings.TrimSuffix(line, "\r"); line == "" {
		return "", errors.New("its first line is empty")
	}
	return line, nil
}

var prefixPattern = regexp.MustCompile(`^(/[A-Za-z0-9._-]+)+$`)

func (v *validator) registry() {
	r := &v.c.Registry
	v.oneOf("registry.kind", r.Kind, RegistryMGS, RegistryEtcd, RegistryEmbedded)
	only := func(kind, key string, set bool) {
		if set && r.Kind != kind {
			v.bad(key, nil, "means something with registry.kind = \""+kind+"\" only", "remove it, or set registry.kind")
		}
	}
	only(RegistryEtcd, "registry.endpoints", len(r.Endpoints) > 0)
	only(RegistryEtcd, "registry.user", r.User != "")
	only(RegistryEmbedded, "registry.members", len(r.Members) > 0)
	if !v.c.InEtcd() {
		return
	}
	if !v.c.Clustered() {
		v.bad("registry.kind", r.Kind, "means something in a cluster only", "remove it, or set cluster.node and list the nodes in [[cluster.nodes]]")
		return
	}
	if !prefixPattern.MatchString(r.Prefix) || len(r.Prefix) > 256 {
		v.bad("registry.prefix", r.Prefix, "not a prefix of keys", "begin it with a slash, and use letters, digits, dots, dashes, underscores and single slashes: \"/baton\"")
	}
	if r.Lease < Duration(2*time.Second) || r.Lease > Duration(time.Minute) || r.Lease%Duration(time.Second) != 0 {
		v.bad("registry.lease", r.Lease, "out of range", "use whole seconds, \"2s\" to \"1m0s\"")
	}
	if r.Kind == RegistryEtcd {
		v.external()
	} else {
		v.embedded()
	}
}

func (v *validator) external() {
	r := &v.c.Registry
	if len(r.Endpoints) == 0 {
		v.bad("registry.endpoints", nil, "there is no etcd", "list its members' URLs, for example [\"https://192.0.2.1:2379\"]")
		return
	}
	ok := true
	scheme := ""
	for i, e := range r.Endpoints {
		u, err := url.Parse(e)
		switch {
		case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Port() == "" || u.Hostname() == "" || u.Path != "" || u.User != nil || u.RawQuery != "":
			v.bad("registry.endpoints", e, "not the URL of an etcd member", "write it as https://192.0.2.1:2379")
			ok = false
			continue
		case slices.Contains(r.Endpoints[:i], e):
			v.bad("registry.endpoints", e, "listed twice", "remove one")
		case scheme != "" && scheme != u.Scheme:
			v.bad("registry.endpoints", e, "http and https are mixed", "use https for all")
		}
		scheme = u.Scheme
	}
	for _, f := range []struct{ key, path string }{{"registry.ca", r.CA}, {"registry.cert", r.Cert}, {"registry.key", r.Key}, {"registry.password_file", r.PasswordFile}} {
		if f.path == "" {
			continue
		}
		ok = v.abs(f.key, f.path, "the file") && ok
		if scheme == "http" && f.key != "registry.password_file" {
			v.bad(f.key, f.path, "means something with https only", "write https in registry.endpoints, or remove it")
		}
	}
	if (r.Cert == "") != (r.Key == "") {
		v.bad("registry.cert", r.Cert, "a certificate without key, or a key without certificate", "set both, registry.cert and registry.key, or neither")
		ok = false
	}
	if (r.User == "") != (r.PasswordFile == "") {
		v.bad("registry.user", r.User, "a user without password, or a password without user", "set both, registry.user and registry.password_file, or neither")
	}
	if r.MaxDocument < 64*KiB || r.MaxDocument > 16*MiB {
		v.bad("registry.max_document", r.MaxDocument, "out of range", "use 64 KiB to 16 MiB, and less than etcd's --max-request-bytes")
	}
	if !ok {
		return
	}
	_, err := v.c.RegistryTLS()
	_, err2 := v.c.RegistryPassword()
	if err := errors.Join(err, err2); err != nil {
		v.bad("registry.kind", r.Kind, err.Error(), "correct the file")
	}
}

func (v *validator) embedded() {
	r, k := &v.c.Registry, &v.c.Cluster
	if len(r.Members) == 0 {
		v.bad("registry.members", nil, "nobody has the registry", "list three nodes")
	}
	for i, m := range r.Members {
		switch {
		case !slices.ContainsFunc(k.Nodes, func(x ClusterNode) bool { return x.Name == m }):
			v.bad("registry.members", m, "not among [[cluster.nodes]]", "correct the name or add the node")
		case slices.Contains(r.Members[:i], m):
			v.bad("registry.members", m, "listed twice", "remove one")
		}
	}
	if n := len(r.Members); n > 7 || n > 0 && n%2 == 0 {
		v.bad("registry.members", nil, fmt.Sprintf("%d members survive no more failures than %d", n, min(n-1, 7)), "use 1, 3, 5 or 7")
	}
	v.port("registry.client_port", r.ClientPort)
	v.port("registry.peer_port", r.PeerPort)
	if r.ClientPort == r.PeerPort {
		v.bad("registry.peer_port", r.PeerPort, "the same as registry.client_port", "use another port")
	}
	if v.c.Member() {
		ap, _ := netip.ParseAddrPort(k.Addr(k.Node))
		for _, p := range []struct {
			key string
			n   int
		}{{"registry.client_port", r.ClientPort}, {"registry.peer_port", r.PeerPort}} {
			if int(ap.Port()) == p.n {
				v.bad(p.key, p.n, "the same as that of the node's address", "use another port")
			}
		}
		if n, err := v.c.LoadTLS(); err == nil && n != nil && ap.IsValid() {
			if err := n.Cert.VerifyHostname(ap.Addr().String()); err != nil {
				v.bad("registry.members", k.Node, "its certificate does not have its address: "+err.Error(),
					fmt.Sprintf("issue another one with \"baton ca issue %s --host %s\"", k.Node, ap.Addr()))
			}
		}
	}
	const second = Duration(time.Second)
	if r.Heartbeat < second/100 || r.Heartbeat > 5*second {
		v.bad("registry.heartbeat", r.Heartbeat, "out of range", "use \"10ms\" to \"5s\"")
	}
	if r.ElectionTimeout < 5*r.Heartbeat || r.ElectionTimeout > 50*second {
		v.bad("registry.election_timeout", r.ElectionTimeout, "out of range", "use at least five heartbeats, and at most \"50s\"")
	}
	if r.Lease < r.ElectionTimeout*3/2 {
		v.bad("registry.lease", r.Lease, "shorter than etcd can keep leases", "use at least one and a half of registry.election_timeout")
	}
}
