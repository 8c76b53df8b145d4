package vipagent

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// MethodGivesUp is the question by which a node that is to take an address by force asks
// its owner whether it is about to give it up: givesUpArgs, bool. A cluster manager says
// "gone" also of one that is slow.
const MethodGivesUp = "gives-up"

// givesUpArgs name a period of service.
type givesUpArgs struct {
	Index uint32 `json:"index"`
	Epoch uint64 `json:"epoch"`
}

// HandleGivesUp answers MethodGivesUp. One that has been about it for longer than its
// stages may take is not waited for.
func (a *Agent) HandleGivesUp(_ context.Context, _ string, raw json.RawMessage) (any, error) {
	var args givesUpArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, fmt.Errorf("arguments of %s: %w", MethodGivesUp, err)
	}
	a.mu.Lock()
	k := a.keepers[args.Index]
	a.mu.Unlock()
	if k == nil {
		return false, nil
	}
	d := &a.o.Deadlines
	most := d.Refuse + d.Drain + d.Commit + d.Close + d.Clear + d.Remove + d.Finish + registryTime + 2*aheadTime
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s.state == Releasing && k.s.epoch == args.Epoch && time.Since(k.since) < most, nil
}

// givesUp asks the owner of an address whether it is about to give it up.
func (k *keeper) givesUp(ctx context.Context, v *mgs.VIP) (yes bool) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	err := k.a.o.Ask(ctx, v.Node, MethodGivesUp, givesUpArgs{v.Index, v.Epoch}, &yes)
	return err == nil && yes
}
