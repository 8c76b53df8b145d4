package node

import (
	"context"
	"log/slog"
	"sync"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/fdstore"
	"github.com/baton-nfs/baton/internal/node/unit"
)

// kept gathers what a stop leaves to the next process. nil: nothing is left.
type kept struct {
	log   *slog.Logger
	store Store
	room  int

	mu sync.Mutex
	h  fdstore.Handover
}

// keeping decides whether a stop keeps the connections of the fixed addresses. Floating
// ones move to other nodes.
func (n *Node) keeping(ctx context.Context) *kept {
	if n.store == nil || n.cfg.NFS.KeepConnections != config.KeepOnRestart {
		return nil
	}
	room, err := n.store.Restarts(ctx)
	if err != nil {
		n.log.Warn("connections are not kept: it is not known whether this stop is part of a restart", "err", err)
		return nil
	}
	if room == 0 {
		return nil
	}
	return &kept{log: n.log, store: n.store, room: room, h: fdstore.Handover{DataDir: n.cfg.DataDir}}
}

// take ends the service of an address and takes its sockets.
func (k *kept) take(ctx context.Context, u *unit.Unit) {
	h, ended, err := u.Handover(ctx)
	if err != nil {
		k.log.Warn("the drain has not ended well", "address", u.Addr(), "err", err)
	}
	k.log.Info("drained; connections wait for the next process", "address", u.Addr(), "connections", len(h.Conns), "ended", ended)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.h.Addresses = append(k.h.Addresses, fdstore.Address{Addr: u.Addr(), VIP: u.VIP().Index, Epoch: u.VIP().Epoch})
	k.h.Sockets = append(k.h.Sockets, h.Sockets...)
	k.h.Conns = append(k.h.Conns, h.Conns...)
}

// put gives everything to the store, when all that was acknowledged is durable and
// nothing here can answer any more.
func (k *kept) put() {
	if k == nil || len(k.h.Addresses) == 0 {
		return
	}
	if n := k.h.Len(); n > k.room {
		k.log.Warn("connections are not kept: raise FileDescriptorStoreMax of the unit", "descriptors", n, "room", k.room)
		return
	}
	if err := k.store.Put(&k.h); err != nil {
		k.log.Warn("connections are not kept", "err", err)
	}
}

// Close closes this process's descriptors.
func (k *kept) Close() {
	if k != nil {
		k.h.Close()
	}
}
