package unit

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
)

// slow is an rpcbind of the system whose answers wait for a token each, once held.
type slow struct {
	sunrpc.Handler
	hold  chan struct{} // closed: answers wait
	asked chan struct{}
	let   chan struct{}
}

func (s *slow) ServeRPC(c *sunrpc.Call) {
	select {
	case <-s.hold:
		select {
		case s.asked <- struct{}{}:
		default:
		}
		<-s.let
	default:
	}
	s.Handler.ServeRPC(c)
}

// portmapBed is a Portmap with an rpcbind of the system.
func portmapBed(t *testing.T) (*Deps, *slow, *rpcbind.Table) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("rpcbind believes privileged ports only: run as root")
	}
	tab := &rpcbind.Table{}
	s := &slow{hold: make(chan struct{}), asked: make(chan struct{}, 1), let: make(chan struct{})}
	programs := (&rpcbind.Server{Table: tab}).Programs()
	for i := range programs {
		s.Handler = programs[i].Handler
		programs[i].Handler = s
	}
	srv := sunrpc.NewServer(sunrpc.Config{Programs: programs})
	t.Cleanup(func() { srv.Close() })
	ap, err := srv.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), sunrpc.ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.Rpcbind.Mode = config.RpcbindSystem
	p := NewPortmap(t.Context(), cfg, slog.New(slog.DiscardHandler))
	p.sys = rpcbind.System{Addr: ap.String(), Socket: "/nonexistent"}
	return &Deps{Config: cfg, Log: slog.New(slog.DiscardHandler), Portmap: p}, s, tab
}

func wantEntries(t *testing.T, tab *rpcbind.Table, want bool) {
	t.Helper()
	if l := tab.List(); len(l) > 0 != want {
		t.Errorf("registered: %v, want any: %v", l, want)
	}
}

var unitAddr = netip.MustParseAddr("192.0.2.9")

// Entries are set with the first address of a family and taken back with the last.
func TestPortmap(t *testing.T) {
	d, _, tab := portmapBed(t)
	one, two := d.New(unitAddr), d.New(unitAddr.Next())
	for _, u := range []*Unit{one, two} {
		if _, err := u.Notify(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantEntries(t, tab, true)
	}
	n := len(tab.List())
	six := d.New(netip.MustParseAddr("2001:db8::9"))
	if _, err := six.Notify(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k := len(tab.List()); k != 2*n {
		t.Errorf("%d entries for both families, %d for one", k, n)
	}
	for i, u := range []*Unit{one, six, two} {
		if err := u.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantEntries(t, tab, i < 2)
	}
}

// Who makes ports known after the end of the service leaves nothing.
func TestPortmapAfterFinish(t *testing.T) {
	d, _, tab := portmapBed(t)
	u := d.New(unitAddr)
	if err := u.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Notify(t.Context()); err == nil {
		t.Error("ports of a service that has ended are made known")
	}
	if err := d.Portmap.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, tab, false)
}

// An end that cannot wait for rpcbind is told to it later.
func TestPortmapEndsMeanwhile(t *testing.T) {
	d, s, tab := portmapBed(t)
	u := d.New(unitAddr)
	close(s.hold)
	notified := make(chan error, 1)
	go func() {
		_, err := u.Notify(t.Context())
		notified <- err
	}()
	<-s.asked
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := u.Finish(gone); err == nil {
		t.Error("it did not wait for rpcbind, and says nothing")
	}
	close(s.let)
	if err := <-notified; err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := d.Portmap.settled(ctx); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, tab, false)
}

// An rpcbind that does not answer when an address begins is told the ports when it does.
func TestPortmapIsToldAgain(t *testing.T) {
	d, _, tab := portmapBed(t)
	right := d.Portmap.sys
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.Portmap.sys.Addr = l.Addr().String()
	l.Close()
	u := d.New(unitAddr)
	if _, err := u.Notify(t.Context()); err == nil {
		t.Fatal("nobody was told, and nothing is said")
	}
	d.Portmap.mu.Lock()
	if d.Portmap.again == nil {
		t.Error("it is not tried again")
	}
	d.Portmap.sys = right
	d.Portmap.mu.Unlock()
	for end := time.Now().Add(time.Minute); len(tab.List()) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("rpcbind was not told again")
		}
	}
	if err := d.Portmap.settled(t.Context()); err != nil {
		t.Error(err)
	}
	if err := u.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, tab, false)

	// What nobody wants any more is not tried again.
	d.Portmap.sys.Addr = l.Addr().String()
	u = d.New(unitAddr)
	if _, err := u.Notify(t.Context()); err == nil {
		t.Error("nobody was told, and nothing is said")
	}
	u.Finish(t.Context())
	d.Portmap.mu.Lock()
	defer d.Portmap.mu.Unlock()
	if d.Portmap.lacks || d.Portmap.again != nil {
		t.Error("it is tried again for nobody")
	}
}

// An rpcbind that was started after baton has the port: it is told the ports. Anybody else
// there costs one address its portmapper, not those that come later.
func TestOwnPortmapIsInTheWay(t *testing.T) {
	d, _, tab := portmapBed(t)
	p := d.Portmap
	local := netip.MustParseAddr("127.0.0.1")
	d.Config.Rpcbind.Mode, p.mode = config.RpcbindAuto, config.RpcbindOwn
	system := p.sys

	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.sys.Addr = other.Addr().String() // and it never answers
	d.Config.Rpcbind.Port = other.Addr().(*net.TCPAddr).Port
	u := d.New(local)
	if err := u.openPortmap(sunrpc.ListenOptions{}); err != nil || u.bind != nil || p.Mode() != config.RpcbindOff {
		t.Fatalf("%v, own: %v, mode %s", err, u.bind != nil, p.Mode())
	}
	other.Close()
	u = d.New(local)
	if err := u.openPortmap(sunrpc.ListenOptions{}); err != nil || u.bind == nil || p.Mode() != config.RpcbindOwn {
		t.Fatalf("%v, own: %v, mode %s", err, u.bind != nil, p.Mode())
	}
	u.bind.Close()

	p.sys = system
	d.Config.Rpcbind.Port = int(netip.MustParseAddrPort(system.Addr).Port())
	u = d.New(local)
	if err := u.openPortmap(sunrpc.ListenOptions{}); err != nil || u.bind != nil || p.Mode() != config.RpcbindSystem {
		t.Fatalf("%v, own: %v, mode %s", err, u.bind != nil, p.Mode())
	}
	if _, err := u.Notify(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, tab, true)
	if err := u.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, tab, false)
}
