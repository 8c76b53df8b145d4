package rig

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// DefaultMover is what is tested if nothing else was asked for.
const DefaultMover = "baton-etcd"

// NewMover makes a network and, on it, the named service with the addresses. What
// it stores is below dir. The caller closes the network after the service's Stop.
func NewMover(name, dir string, vips ...netip.Addr) (*Net, Mover, error) {
	names := []string{"a", "b", "c"}
	if strings.HasPrefix(name, "baton") {
		names = append(names, store)
	}
	n, err := NewNet(names...)
	if err != nil {
		return nil, nil, err
	}
	var m Mover
	switch name {
	case "cold":
		m = NewCold(n, dir, vips...)
	case "baton":
		m, err = NewBaton(n, dir, BatonOptions{}, vips...)
	case "baton-etcd":
		m, err = NewBaton(n, dir, BatonOptions{Etcd: true}, vips...)
	case "baton-manual":
		m, err = NewBaton(n, dir, BatonOptions{Manual: true}, vips...)
	case "keepalived":
		m, err = NewKeepalived(n, dir, 100*time.Millisecond, vips...)
	case "keepalived-default":
		m, err = NewKeepalived(n, dir, time.Second, vips...)
	case "ctdb":
		m, err = NewCTDB(n, dir, true, vips...)
	case "ctdb-default":
		m, err = NewCTDB(n, dir, false, vips...)
	default:
		err = fmt.Errorf("rig: unknown mover %q", name)
	}
	if err != nil {
		n.Close()
		return nil, nil, err
	}
	return n, m, nil
}

// Compared are the services of the benchmark.
var Compared = []string{"baton", "keepalived", "keepalived-default", "ctdb"}

// Names are the services that NewMover makes.
var Names = []string{"cold", "baton", "baton-etcd", "baton-manual", "keepalived", "keepalived-default", "ctdb", "ctdb-default"}
