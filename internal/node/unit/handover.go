package unit

import (
	"context"
	"errors"
	"sync"

	"github.com/baton-nfs/baton/internal/fdstore"
	"github.com/baton-nfs/baton/internal/sunrpc"
)

// Adopt goes on with the connections that the process before had at the address, if
// nobody else has served it since. Call it after Serve.
func (u *Unit) Adopt() {
	conns := u.d.Inherited.Conns(fdstore.Address{Addr: u.addr, VIP: u.vip.Index, Epoch: u.vip.Epoch}, u.vip.Crashed)
	n := 0
	for _, c := range conns {
		if err := u.adopt(c); err != nil {
			u.log.Warn("a connection that was kept over the restart is closed", "err", err)
			continue
		}
		n++
	}
	if n > 0 {
		u.log.Info("connections were kept over the restart", "connections", n)
	}
}

func (u *Unit) adopt(c fdstore.Conn) error {
	if u.bind != nil && u.port[c.Local] == "rpcbind" {
		return u.bind.Adopt(c.File)
	}
	return u.rpc.Adopt(c.File)
}

// Handover ends the service like a drain, but for its sockets, which are for another
// process; nobody is refused, and no connection ends that has nothing in progress. They
// are returned also with an error; what has failed is then not among them.
func (u *Unit) Handover(ctx context.Context) (h sunrpc.Handed, ended int, err error) {
	for _, s := range u.Servers() {
		s.KeepSockets()
	}
	_, err = u.Drain(ctx)
	errs := []error{err}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, s := range u.Servers() {
		wg.Go(func() {
			part, r, err := s.Handover(ctx)
			mu.Lock()
			defer mu.Unlock()
			h.Sockets = append(h.Sockets, part.Sockets...)
			h.Conns = append(h.Conns, part.Conns...)
			ended += r.Orderly + r.Forced - len(part.Conns)
			errs = append(errs, err)
		})
	}
	wg.Wait()
	return h, ended, errors.Join(errs...)
}
