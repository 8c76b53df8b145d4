package config

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Limits of values.
const (
	maxTransfer   = MiB // largest rtmax and wtmax
	minTransfer   = 4 * KiB
	maxStripes    = 16
	stripeUnit    = 64 * KiB
	maxNodeName   = 64
	maxSocketPath = 107 // sun_path without its final zero
	maxOSTs       = 1024
	maxWorkers    = 4096
)

// Validate checks a completed configuration and returns all problems joined,
// each an *Error.
func (c *Config) Validate() error {
	v := &validator{c: c}
	v.top()
	v.nfs()
	v.locks()
	v.exports()
	v.targets()
	v.cluster()
	v.registry()
	v.recovery()
	v.failover()
	v.manager()
	v.rest()
	return errors.Join(v.errs...)
}

type validator struct {
	c    *Config
	errs []error
	skip string // it and paths below it are not reported again
}

// bad records a refused value. Only plain values are given as value, so that
// the message shows them as the file would.
func (v *validator) bad(key string, value any, reason, remedy string) {
	e := &Error{File: v.c.File, Line: v.c.lines.line(key), Key: key, Reason: reason, Remedy: remedy}
	switch x := value.(type) {
	case nil:
	case string:
		e.Value = strconv.Quote(x)
	case Size:
		e.Value = tomlValue(x)
	case Duration:
		e.Value = tomlValue(x)
	default:
		e.Value = fmt.Sprint(x)
	}
	v.errs = append(v.errs, e)
}

func (v *validator) abs(key, p, what string) bool {
	if v.skip != "" && (p == v.skip || strings.HasPrefix(p, filepath.Clean(v.skip)+"/")) {
		return false
	}
	if !filepath.IsAbs(p) || strings.ContainsRune(p, 0) {
		v.bad(key, p, "not an absolute path", "give the full path of "+what)
		return false
	}
	return true
}

func (v *validator) port(key string, p int) {
	if p < 1 || p > 65535 {
		v.bad(key, p, "not a port number", "use 1 to 65535")
	}
}

func (v *validator) oneOf(key, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		v.bad(key, value, "not a known value", "use "+strings.Join(allowed, ", "))
	}
}

func (v *validator) top() {
	c := v.c
	okName := c.Node != "" && len(c.Node) <= maxNodeName
	for _, r := range c.Node {
		okName = okName && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r))
	}
	if !okName {
		v.bad("node", c.Node, "not a node name", fmt.Sprintf("use 1 to %d letters, digits, dots, dashes and underscores", maxNodeName))
	}
	if !v.abs("data_dir", c.DataDir, "a directory that baton may fill") {
		v.skip = c.DataDir // what is derived from it is wrong as well
	}
	v.abs("cluster_key_file", c.ClusterKeyFile, "the key file")
}

func (v *validator) nfs() {
	n := &v.c.NFS
	if len(n.Addresses) == 0 && !v.c.Clustered() {
		v.bad("nfs.addresses", nil, "no service address", "give at least one, for example [\"127.0.0.1\"]")
	}
	seen := map[netip.Addr]bool{}
	for _, s := range n.Addresses {
		a, err := netip.ParseAddr(s)
		a = a.Unmap()
		switch {
		case err != nil:
			v.bad("nfs.addresses", s, "not an IP address", "give an IPv4 or IPv6 address without port")
		case a.IsUnspecified():
			v.bad("nfs.addresses", s, "a wildcard would answer for addresses that belong to other nodes",
				"list the service addresses one by one")
		case a.IsMulticast():
			v.bad("nfs.addresses", s, "a multicast address cannot be served", "give a unicast address")
		case a.IsLinkLocalUnicast() && a.Is6() && a.Zone() == "":
			v.bad("nfs.addresses", s, "a link-local address needs its interface", "write it as "+s+"%eth0")
		case seen[a]:
			v.bad("nfs.addresses", s, "listed twice", "remove one")
		case v.c.Clustered() && (a == netip.AddrFrom4([4]byte{127, 0, 0, 1}) || a == netip.IPv6Loopback()):
			v.bad("nfs.addresses", s, "every node has this address, but a service address is on one node at a time",
				"list addresses of the service, or none: []")
		}
		seen[a] = true
	}
	v.port("nfs.port", n.Port)
	v.port("nfs.mount_port", n.MountPort)
	if n.MaxConnections < 1 || n.MaxConnections > 1<<20 {
		v.bad("nfs.max_connections", n.MaxConnections, "out of range", "use 1 to 1048576")
	}
	if n.Workers < 0 || n.Workers > maxWorkers {
		v.bad("nfs.workers", n.Workers, "out of range", fmt.Sprintf("use 1 to %d, or 0 for the number that fits the machine", maxWorkers))
	}
	for _, t := range []struct {
		key string
		n   Size
	}{{"nfs.rtmax", n.Rtmax}, {"nfs.rtpref", n.Rtpref}, {"nfs.wtmax", n.Wtmax}, {"nfs.wtpref", n.Wtpref}, {"nfs.dtpref", n.Dtpref}} {
		if t.n < minTransfer || t.n > maxTransfer || t.n%minTransfer != 0 {
			v.bad(t.key, t.n, "not a transfer size", "use a multiple of 4 KiB from 4 KiB to 1 MiB")
		}
	}
	if n.Rtpref > n.Rtmax {
		v.bad("nfs.rtpref", n.Rtpref, "larger than nfs.rtmax", "use at most "+n.Rtmax.String())
	}
	if n.Wtpref > n.Wtmax {
		v.bad("nfs.wtpref", n.Wtpref, "larger than nfs.wtmax", "use at most "+n.Wtmax.String())
	}
	if least := 2 * max(n.Wtmax, n.Rtmax); n.ConnInflight < least {
		v.bad("nfs.conn_inflight", n.ConnInflight, "too small for two of the largest calls", "use at least "+least.String())
	}
	if n.Inflight < n.ConnInflight {
		v.bad("nfs.inflight", n.Inflight, "smaller than nfs.conn_inflight", "use at least "+n.ConnInflight.String())
	}
	if n.DrainTimeout < 0 || n.DrainTimeout > Duration(10*60*1e9) {
		v.bad("nfs.drain_timeout", n.DrainTimeout, "out of range", "use \"0s\" to \"10m\"")
	}
	v.oneOf("nfs.keep_connections", n.KeepConnections, KeepOnRestart, KeepNever)
	v.oneOf("rpcbind.mode", v.c.Rpcbind.Mode, RpcbindAuto, RpcbindSystem, RpcbindOwn, RpcbindOff)
	v.port("rpcbind.port", v.c.Rpcbind.Port)
	if m := v.c.Rpcbind.Mode; m == RpcbindAuto || m == RpcbindOwn {
		for _, p := range []struct {
			key string
			n   int
		}{{"nfs.port", n.Port}, {"nfs.mount_port", n.MountPort}} {
			if p.n == v.c.Rpcbind.Port {
				v.bad(p.key, p.n, "the same as rpcbind.port", "use another port")
			}
		}
	}
}

// maxLocks bounds the limits of locks: an entry takes some hundred bytes of memory.
const maxLocks = 1 << 24

func (v *validator) locks() {
	l := &v.c.Locks
	if v.c.ForgetLocks && !l.Enabled {
		v.bad("--forget-locks", nil, "there is no lock table, because locks.enabled is false", "leave one of the two out")
	}
	own := v.c.Rpcbind.Mode == RpcbindAuto || v.c.Rpcbind.Mode == RpcbindOwn
	for _, p := range []struct {
		key string
		n   int
	}{{"locks.nlm_port", l.NLMPort}, {"locks.statd_port", l.StatdPort}} {
		switch {
		case p.n == v.c.NFS.Port: // --port sets all; what is wrong with it was said
		case l.Enabled && own && p.n == v.c.Rpcbind.Port:
			v.bad(p.key, p.n, "the same as rpcbind.port", "use another port")
		default:
			v.port(p.key, p.n)
		}
	}
	for _, t := range []struct {
		key   string
		d     Duration
		most  Duration
		usage string
	}{
		{"locks.reclaim_window", l.ReclaimWindow, Duration(time.Hour), "use \"1s\" to \"1h\""},
		{"locks.grace_period", l.GracePeriod, Duration(time.Hour), "use \"1s\" to \"1h\""},
		{"locks.notify_timeout", l.NotifyTimeout, Duration(24 * time.Hour), "use \"1s\" to \"24h\""},
	} {
		if t.d < Duration(time.Second) || t.d > t.most {
			v.bad(t.key, t.d, "out of range", t.usage)
		}
	}
	for _, t := range []struct {
		key string
		n   int
	}{{"locks.max_total", l.MaxTotal}, {"locks.max_per_client", l.MaxPerClient}, {"locks.max_waiting_per_client", l.MaxWaitingPerClient}} {
		if t.n < 1 || t.n > maxLocks {
			v.bad(t.key, t.n, "out of range", fmt.Sprintf("use 1 to %d", maxLocks))
		}
	}
	if l.MaxHosts < 1 || l.MaxHosts > 1<<20 {
		v.bad("locks.max_hosts", l.MaxHosts, "out of range", "use 1 to 1048576")
	}
}

func (v *validator) exports() {
	c := v.c
	if c.Exports.File != "" {
		v.abs("exports.file", c.Exports.File, "the exports file, or \"\" for none")
	} else if len(c.Export) == 0 && (len(c.NFS.Addresses) > 0 || c.NFS.Floating || !c.Clustered()) {
		v.bad("exports.file", "", "nothing is exported", "name an exports file or add an [[export]]")
	}
	seen := map[string]bool{}
	for i, e := range c.Export {
		key := fmt.Sprintf("export[%d].", i)
		for _, p := range []struct{ key, s string }{{key + "name", e.Name}, {key + "path", e.Path}} {
			if p.s == "" || p.s[0] != '/' || path.Clean(p.s) != p.s || strings.ContainsRune(p.s, 0) {
				v.bad(p.key, p.s, "not a clean absolute path", "write it with a leading slash and without \"..\", \"//\" or a slash at the end: \"/home\"")
			}
		}
		if len(e.Name) > 1024 {
			v.bad(key+"name", nil, "longer than 1024 bytes, the limit of MOUNT's dirpath", "choose a shorter name")
		}
		if seen[e.Name] {
			v.bad(key+"name", e.Name, "exported twice", "list all clients in one [[export]]")
		}
		seen[e.Name] = true
		if len(e.Clients) == 0 {
			v.bad(key+"clients", nil, "no clients", "list hosts and networks, or [\"*\"] for everyone")
		}
		for _, cl := range e.Clients {
			if cl == "" || strings.HasPrefix(cl, "-") || strings.ContainsAny(cl, " \t\r\n\"'()#\\,\x00") {
				v.bad(key+"clients", cl, "not a client", "give a host, an address, a network or \"*\"; options have a key of their own")
			}
		}
		if strings.ContainsAny(e.Options, " \t\r\n\"'()#\\\x00") {
			v.bad(key+"options", e.Options, "not a list of options", "separate options by commas only: \"rw,root_squash\"")
		}
		for o := range strings.SplitSeq(e.Options, ",") {
			if strings.HasPrefix(o, "dir=") {
				v.bad(key+"options", e.Options, "dir= is what path says", "remove it")
			}
		}
	}
}

func (v *validator) targets() {
	c := v.c
	if len(c.OST) > maxOSTs {
		v.bad("ost", nil, fmt.Sprintf("%d targets are more than %d", len(c.OST), maxOSTs), "use fewer")
	}
	targets := c.Targets()
	for i, t := range targets {
		key := t.key + ".dir"
		if t.Dir == "" {
			v.bad(key, nil, "several nodes may run "+t.Name+", and no directory is named that all of them see", "name one on shared storage")
			continue
		}
		if !v.abs(key, t.Dir, "the target's directory") {
			continue
		}
		for _, o := range targets[:i] {
			a, b := filepath.Clean(t.Dir), filepath.Clean(o.Dir)
			// The registry is one file, so its directory may have the others in it.
			if a == b || strings.HasPrefix(b, a+"/") || strings.HasPrefix(a, b+"/") && o.Name != MGSName {
				v.bad(key, t.Dir, "overlaps "+o.key+".dir = "+strconv.Quote(o.Dir), "give every target a directory of its own")
			}
		}
	}
	if c.MDT.BlockCache < MiB || c.MDT.BlockCache > TiB {
		v.bad("mdt.block_cache", c.MDT.BlockCache, "out of range", "use 1 MiB to 1 TiB")
	}
	if c.MDT.InodeCache < 1000 || c.MDT.InodeCache > 1<<28 {
		v.bad("mdt.inode_cache", c.MDT.InodeCache, "out of range", "use 1000 to 268435456 inodes")
	}
	f := &c.FS
	if most := min(maxStripes, len(c.OST)); f.StripeCount < 1 || f.StripeCount > most {
		v.bad("fs.stripe_count", f.StripeCount, "out of range", fmt.Sprintf("use 1 to %d (there are %d OSTs, a file has at most %d stripes)", most, len(c.OST), maxStripes))
	}
	if f.StripeSize < stripeUnit || f.StripeSize > GiB || f.StripeSize%stripeUnit != 0 {
		v.bad("fs.stripe_size", f.StripeSize, "not a stripe size", "use a multiple of 64 KiB up to 1 GiB")
	}
	switch {
	case f.Durability == "two-node" && c.Clustered():
		v.bad("fs.durability", f.Durability, "is chosen export by export", "use \"disk\" here, and durability=two-node among the options of exports")
	case f.Durability == "two-node":
		v.bad("fs.durability", f.Durability, "needs several nodes, which this version does not have", "use \"disk\"")
	default:
		v.oneOf("fs.durability", f.Durability, DurabilityDisk)
	}
	v.oneOf("fs.atime", f.Atime, AtimeRelatime, AtimeOff)
}

func (v *validator) rest() {
	c := v.c
	if v.abs("control.socket", c.Control.Socket, "the control socket") && len(c.Control.Socket) > maxSocketPath {
		v.bad("control.socket", c.Control.Socket, fmt.Sprintf("longer than %d bytes, the limit of a unix socket's path", maxSocketPath),
			"set it to a short path, for example \"/run/baton/control.sock\"")
	}
	if c.HTTP.Address != "" {
		if err := CheckHTTPAddress(c.HTTP.Address, c.HTTP.AllowRemote); err != nil {
			v.bad("http.address", c.HTTP.Address, err.Error(), "use for example \"127.0.0.1:9633\", or \"\" for none")
		}
	}
	v.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	v.oneOf("log.format", c.Log.Format, "text", "json", "journal")
}

// CheckHTTPAddress tells why address cannot serve /metrics: it must be
// IP:PORT or localhost:PORT, and loopback unless allowRemote is true, since the
// pages need no password.
func CheckHTTPAddress(address string, allowRemote bool) error {
	if rest, ok := strings.CutPrefix(address, "localhost:"); ok {
		address = "127.0.0.1:" + rest
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return errors.New("not an IP address with a port")
	}
	if !ap.Addr().Unmap().IsLoopback() && !allowRemote {
		return errors.New("not a loopback address, and the pages need no password (http.allow_remote = true permits it)")
	}
	return nil
}
