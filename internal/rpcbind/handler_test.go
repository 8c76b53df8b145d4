package rpcbind

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/baton-nfs/baton/internal/sunrpc"
)

// serveOn puts the server on TCP and UDP of an address and tells which.
func serveOn(t *testing.T, at string, tab *Table) (*Server, netip.AddrPort) {
	t.Helper()
	rs := &Server{Table: tab}
	srv := sunrpc.NewServer(sunrpc.Config{Programs: rs.Programs()})
	t.Cleanup(func() { srv.Close() })
	bound, err := srv.ListenTCP(netip.MustParseAddrPort(at), sunrpc.ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := srv.ListenUDP(bound, sunrpc.ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	return rs, bound
}

func TestOverSunrpc(t *testing.T) {
	_, servedAt := serveOn(t, "127.0.0.1:0", own())
	ctx := context.Background()
	for _, netid := range []string{TCP, UDP} {
		if p, err := GetPort(ctx, netip.Addr{}, servedAt, 100005, 3, netid); p != 20048 || err != nil {
			t.Errorf("%s: %d, %v", netid, p, err)
		}
		if _, err := GetPort(ctx, netip.Addr{}, servedAt, 100021, 4, netid); !errors.Is(err, ErrNotRegistered) {
			t.Errorf("%s: %v", netid, err)
		}
		call := func(vers, proc uint32, args []byte) ([]byte, error) {
			c, err := sunrpc.Dial(ctx, netid, netip.AddrPort{}, servedAt, Program, vers, sunrpc.Cred{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			return c.Call(ctx, proc, args)
		}
		var ae *sunrpc.AcceptError
		if _, err := call(5, 0, nil); !errors.As(err, &ae) || ae.Stat != sunrpc.ProgMismatch || ae.Low != 2 || ae.High != 4 {
			t.Errorf("%s version 5: %v", netid, err)
		}
		if _, err := call(3, rpcbGetversaddr, nil); !errors.As(err, &ae) || ae.Stat != sunrpc.ProcUnavail {
			t.Errorf("%s procedure 9 of version 3: %v", netid, err)
		}
		if _, err := call(4, rpcbGetaddr, []byte{0, 0}); !errors.As(err, &ae) || ae.Stat != sunrpc.GarbageArgs {
			t.Errorf("%s short arguments: %v", netid, err)
		}
		// Our calls come from unprivileged ports.
		if res, err := call(2, pmapSet, []byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 6, 0, 0, 0, 9}); err != nil || len(res) != 4 || res[3] != 0 {
			t.Errorf("%s SET: %x, %v", netid, res, err)
		}
	}
}
