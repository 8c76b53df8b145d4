package ost

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Learn takes in what the MDT tells a target that starts; it is called once, with
// all of it, between Open and the first look at Table. VIP epochs and fences are
// raised and objects of removed files destroyed, durably when it returns.
// Clients that the MDT does not know in the life that is registered here are
// dropped: nobody waits for them. From then on replays of data are executed only
// for open IO epochs. Without Learn all replays are executed.
func (t *Target) Learn(info *wire.OSTInfo) error {
	if t.begun.Load() {
		return fmt.Errorf("ost %d: it serves already", t.opts.Index)
	}
	gens := make(map[wire.ClientID]uint64, len(info.Clients))
	for i := range info.Clients {
		gens[info.Clients[i].ID] = info.Clients[i].Gen
	}
	st := wire.OK
	raise := func(_ bool, s wire.Status) {
		if s != wire.OK {
			st = s
		}
	}
	var gone []recov.ClientRecord
	err := t.changeNow(func(s *super) bool {
		for _, v := range info.VIPs {
			raise(raised(s.Epochs, v.VIP, v.Epoch, maxEpochs))
		}
		for i := range info.Fences {
			raise(raised(s.Fences, info.Fences[i].ID, info.Fences[i].Tenure, maxFences))
		}
		maps.DeleteFunc(s.Clients, func(id wire.ClientID, r recov.ClientRecord) bool {
			gen, ok := gens[id]
			drop := !ok || gen > r.Gen
			if drop {
				gone = append(gone, r)
			}
			return drop
		})
		return true
	})
	if err = errors.Join(err, st.Err()); err != nil {
		return fmt.Errorf("ost %d: what the MDT tells: %w", t.opts.Index, err)
	}
	for _, r := range gone {
		if !r.Local {
			t.log.Warn("client is not waited for: the MDT does not know it", "client", fmt.Sprintf("%x", r.Client[:4]))
		}
		t.detach(r.Client)
	}
	t.publish()
	if err := t.destroyUnlinked(info.Unlinked); err != nil {
		return fmt.Errorf("ost %d: destroy objects of removed files: %w", t.opts.Index, err)
	}
	epochs := make(map[wire.EpochInfo]struct{}, len(info.Epochs))
	for _, e := range info.Epochs {
		epochs[e] = struct{}{}
	}
	t.epochs.Store(&epochs)
	t.truncates = info.Truncates
	return nil
}

// finishTruncates does what Learn was told of truncates, in order, unless their
// clients have taken part in recovery and so have replayed them. They are done again
// when the MDT evicts their clients, which it may not have noticed to be dead, and
// must not cut off what is written until then. That they cannot be done now is no
// reason not to serve, at that risk.
func (t *Target) finishTruncates() {
	t.state.mu.Lock()
	there := maps.Clone(t.state.sb.Clients)
	t.state.mu.Unlock()
	t.cut = map[objKey]uint64{}
	c := wire.InProc(t)
	for i := range t.truncates {
		x := &t.truncates[i]
		if _, ok := there[x.Client]; ok {
			continue
		}
		// An object that does not exist cannot remember it.
		k := objKey{x.FID, x.Stripe}
		t.cut[k] = max(t.cut[k], x.LogID)
		req := wire.Request{
			Header: wire.Header{Op: wire.OpPunch, Flags: wire.FlagWaitCommit},
			FID:    x.FID, Stripe: x.Stripe, Size: x.Size, LogID: x.LogID, Time: x.Time,
		}
		var rep wire.Reply
		if _ = c.Call(context.Background(), &req, &rep); rep.Status != wire.OK {
			t.log.Error("a truncate of a client that is gone could not be finished", "fid", x.FID, "stripe", x.Stripe, "size", x.Size, "err", rep.Status)
		}
	}
	t.truncates = nil
}

// destroyUnlinked destroys all objects of the files, durably.
func (t *Target) destroyUnlinked(fids []wire.FID) error {
	byDir := map[uint8]map[wire.FID]bool{}
	for _, f := range fids {
		d := objKey{fid: f}.dir()
		if byDir[d] == nil {
			byDir[d] = map[wire.FID]bool{}
		}
		byDir[d][f] = true
	}
	for d, files := range byDir {
		names, err := t.fs.ReadDir(dirName(d))
		if err != nil {
			return err
		}
		for _, n := range names {
			// Segments without an object go, too.
			k, ok := parseName(strings.TrimSuffix(n, ".s"))
			if !ok || !files[k.fid] {
				continue
			}
			var rep wire.Reply
			t.destroy(&wire.Request{FID: k.fid, Stripe: k.stripe}, &rep, wire.ClientID{}, 0)
			if rep.Status != wire.OK {
				return fmt.Errorf("%v stripe %d: %w", k.fid, k.stripe, rep.Status)
			}
		}
		// Those that an earlier attempt removed have to be durably gone, too.
		t.dirs[d].changed()
		if err := t.dirs[d].sync(t.fs); err != nil {
			return err
		}
	}
	return t.Commit()
}
