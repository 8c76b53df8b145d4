package sunrpc

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"syscall"
)

// Reserved ports that are tried: the range that NFS clients use, above most
// well-known services.
const (
	reservedLow  = 665
	reservedHigh = 1023
	reservedTry  = 8
)

// DialReserved is Dial from a port below 1024, since some hosts believe only
// those, or from any port if that is not to be had. rnd returns a number in
// [0, n). A zero local address is replaced with the wildcard.
func DialReserved(ctx context.Context, rnd func(n int64) int64, network string, local netip.Addr, remote netip.AddrPort, prog, vers uint32, cred Cred) (*Client, error) {
	if !local.IsValid() {
		if local = netip.IPv4Unspecified(); remote.Addr().Is6() {
			local = netip.IPv6Unspecified()
		}
	}
	for range reservedTry {
		from := netip.AddrPortFrom(local, uint16(reservedLow+rnd(reservedHigh-reservedLow+1)))
		c, err := Dial(ctx, network, from, remote, prog, vers, cred)
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, syscall.EADDRNOTAVAIL):
			continue
		case !errors.Is(err, fs.ErrPermission):
			return nil, err
		}
		break // not allowed: no other reserved port will be
	}
	return Dial(ctx, network, netip.AddrPortFrom(local, 0), remote, prog, vers, cred)
}
