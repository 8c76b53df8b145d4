package node

import (
	"context"
	"sync"
	"time"

	"github.com/baton-nfs/baton/failover/manager"
)

// hearsMethod asks a node whom it hears (cluster.hears).
const hearsMethod = "hears"

// Times of deposing.
const (
	deposeLook = 50 * time.Millisecond  // how often a suspected leader is looked at
	deposeAsk  = 300 * time.Millisecond // bounds the questions to the others
	deposeCall = time.Second            // and the change in etcd
)

// heardOf is what a list says of a node.
func heardOf(l []manager.NodeHealth, node string) (h manager.NodeHealth) {
	for _, x := range l {
		if x.Node == node {
			h = x
		}
	}
	return h
}

// fallen tells whether the elected node is gone for so many of all nodes that another
// one may be elected before its lease has ended: more than half of them suspect it,
// this one too, and of those that answer nobody hears it. A node that is cut off alone,
// or has lost only its way to the elected one, therefore deposes nobody.
func fallen(leader string, nodes int, own []manager.NodeHealth, others [][]manager.NodeHealth) bool {
	if heardOf(own, leader).State != manager.Suspect {
		return false
	}
	votes := 1
	for _, l := range others {
		switch heardOf(l, leader).State {
		case manager.Alive:
			return false
		case manager.Suspect:
			votes++
		}
	}
	return 2*votes > nodes
}

// depose has another node elected as soon as the elected one is dead by the beats: its
// lease alone would hold for some seconds more, and longer when etcd's own leader dies
// with it. Until ctx ends it looks whether the elected node is suspected.
func (e *inEtcd) depose(ctx context.Context) {
	c := e.c
	confirm := time.Duration(c.cfg.Manager.Confirm)
	t := time.NewTicker(deposeLook)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		leader, term := e.election.Leader()
		if leader == "" || leader == c.name {
			continue
		}
		own := c.hears()
		if h := heardOf(own, leader); h.State != manager.Suspect || h.Suspected < confirm || !fallen(leader, len(c.cfg.Cluster.Nodes), own, e.hearsay(ctx, leader)) {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, deposeCall)
		err := e.election.Depose(limited, term)
		cancel()
		if err != nil {
			c.log.Debug("depose the elected node", "node", leader, "err", err)
			continue
		}
		c.log.Warn("the elected node is silent, and most nodes suspect it: another one is elected", "node", leader, "term", term)
		for now := term; now == term && ctx.Err() == nil; {
			changed := e.election.Changed()
			if _, now = e.election.Leader(); now == term {
				select {
				case <-changed:
				case <-ctx.Done():
				}
			}
		}
	}
}

// hearsay asks all others whom they hear.
func (e *inEtcd) hearsay(ctx context.Context, leader string) (l [][]manager.NodeHealth) {
	ctx, cancel := context.WithTimeout(ctx, deposeAsk)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range e.c.cfg.Cluster.Nodes {
		node := e.c.cfg.Cluster.Nodes[i].Name
		if node == e.c.name || node == leader {
			continue
		}
		wg.Go(func() {
			var h []manager.NodeHealth
			if e.c.ask(ctx, node, hearsMethod, struct{}{}, &h) == nil {
				mu.Lock()
				l = append(l, h)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return l
}
