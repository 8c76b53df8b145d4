package ost

import (
	"maps"
	"sync/atomic"

	"github.com/baton-nfs/baton/recovery/wire"
)

// admission answers from copies that are replaced as a whole, so that the data
// path takes no lock. Changes are made under Target.smu.
type admission struct {
	epochs  atomic.Pointer[map[uint32]uint64]
	clients atomic.Pointer[map[wire.ClientID]uint64]
}

func (a *admission) set(s *super) {
	e, c := maps.Clone(s.Epochs), maps.Clone(s.Clients)
	a.epochs.Store(&e)
	a.clients.Store(&c)
}

// check refuses requests of a VIP's former owner and of clients that are not
// registered. VIP 0 and the zero client are not checked.
func (a *admission) check(h *wire.Header) wire.Status {
	if h.VIP != 0 && h.Op != wire.OpSetVIPEpoch {
		if h.VIPEpoch < (*a.epochs.Load())[h.VIP] {
			return wire.ErrStaleVIP
		}
	}
	if h.Client != (wire.ClientID{}) && h.Op != wire.OpConnect && h.Op != wire.OpSetVIPEpoch {
		gen, ok := (*a.clients.Load())[h.Client]
		switch {
		case !ok:
			return wire.ErrUnknownClient
		case h.ClientGen < gen:
			return wire.ErrStaleClient
		case h.ClientGen > gen:
			// A new life of the client that has not connected yet.
			return wire.ErrUnknownClient
		}
	}
	return wire.OK
}

// register executes OpConnect, OpDisconnect and OpSetVIPEpoch: the superblock
// is durable before the change counts.
func (t *Target) register(req *wire.Request, rep *wire.Reply) {
	t.smu.Lock()
	defer t.smu.Unlock()
	next := *t.sb
	next.Epochs, next.Clients = maps.Clone(t.sb.Epochs), maps.Clone(t.sb.Clients)
	changed := true
	switch req.Op {
	case wire.OpConnect:
		old, ok := next.Clients[req.Client]
		switch {
		case req.Client == wire.ClientID{}:
			rep.Status = wire.ErrProto
			return
		case ok && req.ClientGen < old:
			rep.Status = wire.ErrStaleClient
			return
		case !ok && len(next.Clients) >= maxClients:
			rep.Status = wire.ErrJukebox
			return
		}
		changed = !ok || old != req.ClientGen
		next.Clients[req.Client] = req.ClientGen
	case wire.OpDisconnect:
		_, changed = next.Clients[req.Client]
		delete(next.Clients, req.Client)
	case wire.OpSetVIPEpoch:
		old, ok := next.Epochs[req.VIP]
		switch {
		case req.VIP == 0:
			rep.Status = wire.ErrProto
			return
		case req.VIPEpoch < old:
			rep.Status = wire.ErrStaleVIP
			return
		case !ok && len(next.Epochs) >= maxEpochs:
			rep.Status = wire.ErrJukebox
			return
		}
		changed = !ok || old != req.VIPEpoch
		next.Epochs[req.VIP] = req.VIPEpoch
	}
	if changed {
		if err := writeSuper(t.fs, t.rootFD, &next); err != nil {
			rep.Status = t.statusOf(err)
			return
		}
		*t.sb = next
		t.admit.set(&next)
	}
	if req.Op == wire.OpConnect {
		rep.Transno = t.track.last()
	} else {
		rep.Transno = t.track.transno()
	}
}
