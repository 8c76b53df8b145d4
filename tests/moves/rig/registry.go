package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// registry is what "baton registry status" says of a registry in etcd.
type registry struct {
	Leader  string `json:"leader"`
	Error   string `json:"error"`
	Members []struct {
		Name  string `json:"name"`
		Error string `json:"error"`
	} `json:"members"`
}

func (b *Baton) registry(ctx context.Context) (r registry, err error) {
	out, err := b.Command(ctx, "registry", "status", "--json")
	if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
		return r, fmt.Errorf("rig: baton registry status: %w\n%s", errors.Join(err, jerr), out)
	}
	if r.Error != "" {
		return r, fmt.Errorf("rig: the registry: %s", r.Error)
	}
	return r, nil
}

// eventually waits until the registry in etcd is as ok wants it.
func (b *Baton) eventually(ctx context.Context, what string, ok func(r registry) bool) (registry, error) {
	for {
		r, err := b.registry(ctx)
		if err == nil && ok(r) {
			return r, nil
		}
		select {
		case <-ctx.Done():
			return r, fmt.Errorf("rig: waited in vain for %s: %+v, %w", what, r, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Whole waits until all who have the registry take part again, and somebody decides:
// the next one can die then.
func (b *Baton) Whole(ctx context.Context) error {
	if !b.o.Etcd {
		return nil
	}
	_, err := b.eventually(ctx, "all members of etcd", func(r registry) bool {
		for _, m := range r.Members {
			if m.Error != "" || m.Name == "" {
				return false
			}
		}
		return len(r.Members) == len(b.Nodes()) && r.Leader != ""
	})
	return err
}

// etcdTable drops what a machine sends to the registry in etcd.
const etcdTable = "table inet registry { chain out { type filter hook output priority 0; tcp dport 7989 drop; }; }"

// Decider is the node that decides, "" if that is none that can be killed. If it is the
// machine with the targets, the registry is hidden from that until another one is elected.
func (b *Baton) Decider(ctx context.Context) (node string, err error) {
	if !b.o.Etcd {
		return "", nil
	}
	r, err := b.eventually(ctx, "somebody who decides", func(r registry) bool { return r.Leader != "" })
	if err != nil || r.Leader != store {
		return r.Leader, err
	}
	n := b.net.Machine(store).Node()
	if out, err := n.Run(ctx, "nft", etcdTable); err != nil {
		return "", fmt.Errorf("rig: %w\n%s", err, out)
	}
	// The others see it; that machine does not.
	for err = errors.New(""); err != nil || r.Leader == "" || r.Leader == store; {
		var out string
		out, err = b.cluster.Baton(ctx, b.members[b.Nodes()[0]], "registry", "status", "--json")
		r = registry{}
		if err == nil {
			err = json.Unmarshal([]byte(out), &r)
		}
		if ctx.Err() != nil {
			err = fmt.Errorf("rig: %s cannot reach the registry and still decides: %w\n%s", store, ctx.Err(), out)
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
	if out, nerr := n.Run(context.WithoutCancel(ctx), "nft", "delete table inet registry"); nerr != nil {
		err = errors.Join(err, fmt.Errorf("rig: %w\n%s", nerr, out))
	}
	if err == nil {
		err = b.Whole(ctx)
	}
	return r.Leader, err
}

// Quorum cuts the power of all frontends but one, so that nothing can be decided, or
// gives it back.
func (b *Baton) Quorum(ctx context.Context, left string, on bool) error {
	others := slices.DeleteFunc(b.Nodes(), func(n string) bool { return n == left })
	if !on {
		for _, n := range others {
			if err := b.Kill(ctx, n); err != nil {
				return err
			}
		}
		return nil
	}
	for _, n := range others {
		if err := b.start(ctx, n); err != nil {
			return err
		}
	}
	for _, n := range others {
		if err := b.ready(ctx, n); err != nil {
			return err
		}
	}
	return b.Whole(ctx)
}
