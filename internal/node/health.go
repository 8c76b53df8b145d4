package node

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// incarnationFile, in the data directory, has the number of the process that was
// started last.
const incarnationFile = "incarnation"

// incarnation numbers this process among all that have run as this node. It rises from
// start to start because the file is written before it is used, and because of the time
// of day when the file is lost. The generation that the registry gives would do, but
// beats have to go on while the registry is away; it may even be what is waited for.
func incarnation(dataDir string, now time.Time) (uint64, error) {
	path := filepath.Join(dataDir, incarnationFile)
	line, err := readMark(path)
	if err != nil {
		return 0, err
	}
	last, err := strconv.ParseUint(line, 10, 64)
	if line != "" && err != nil {
		return 0, fmt.Errorf("%s does not hold a number: remove it if the clock of this machine is right", path)
	}
	next := max(last+1, uint64(max(now.UnixNano(), 0)))
	return next, writeMark(path, strconv.FormatUint(next, 10))
}

// lives are the nodes that answer beats.
type lives struct {
	mu    sync.Mutex
	alive map[string]bool
}

func (l *lives) set(node string, alive bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.alive == nil {
		l.alive = map[string]bool{}
	}
	l.alive[node] = alive
}

func (l *lives) clear() {
	l.mu.Lock()
	clear(l.alive)
	l.mu.Unlock()
}

// has tells whether a node answers beats.
func (l *lives) has(node string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.alive[node]
}

// startHealth begins to exchange beats with the other nodes. The registry is not needed
// for it.
func (c *cluster) startHealth() error {
	n, err := incarnation(c.cfg.DataDir, time.Now())
	if err != nil {
		return fmt.Errorf("number this start: %w", err)
	}
	c.incarnation = n
	o := health.Options{
		Config: health.Config{Node: c.name, Incarnation: n}, Logger: c.log, Local: c.local, OnEvents: c.learn,
		Dial: health.Dial(func(node string) tcp.DialOptions { return c.dialOptions(node, health.TargetName) }),
	}
	for i := range c.cfg.Cluster.Nodes {
		if name := c.cfg.Cluster.Nodes[i].Name; name != c.name {
			o.Peers = append(o.Peers, name)
		}
	}
	if c.health, err = health.Start(o); err != nil {
		return err
	}
	if err = c.srv.SetTarget(health.TargetName, c.health.Target()); err != nil {
		c.health.Close()
	}
	return err
}

// farewell is how long a node that ends in order goes on telling the others, so that
// those who have no business with it any more do not take its silence for trouble.
const farewell = 3 * health.DefaultInterval

// stopHealth ends the exchange of beats, when nothing else runs here any more.
func (c *cluster) stopHealth() {
	c.business = c.local().Peers
	for end := time.Now().Add(farewell); time.Now().Before(end); time.Sleep(farewell / 20) {
		busy := slices.ContainsFunc(c.health.Status(), func(p health.PeerStatus) bool {
			return p.State == health.StateAlive
		})
		if !busy {
			break
		}
	}
	c.health.Close()
}

// local is what this node tells of itself. It is asked once per beat, and must wait for
// nothing that may hang: it takes locks that are held for moments only.
func (c *cluster) local() (l health.Local) {
	peers := map[string]bool{}
	add := func(node string) { peers[node] = true }
	for _, h := range c.hosted {
		t, v, ok := h.vitals()
		if !ok {
			continue
		}
		// More do not fit. They are found without beats, as by nodes that hear none.
		if len(l.Targets) < health.MaxTargets {
			l.Targets = append(l.Targets, t)
		}
		for _, node := range v.Nodes {
			add(node)
		}
	}
	if fs := c.fs.Load(); fs != nil {
		fs.Holds(add)
	}
	c.paths.to(config.MGSName, add)
	c.everybody(add)
	delete(peers, c.name)
	l.Peers = slices.Collect(maps.Keys(peers))
	if vips := c.vips.Load(); vips != nil {
		l.VIPs = *vips
	}
	// Those who live speak for their clients that have nothing to say.
	for _, h := range c.hosted {
		if f := h.front(); f != nil {
			f.Alive(c.lives.has)
		}
	}
	return l
}

// front is that of an MDT or OST that runs here, or nil.
func (h *hosted) front() *front.Front {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.mdt != nil:
		return h.mdt.Front()
	case h.ost != nil:
		return h.ost.Front()
	}
	return nil
}

// vitals is what is told of a target that runs here, or is being started or stopped. Of
// an MDT the nodes include those of the OSTs that remember it.
func (h *hosted) vitals() (t health.Target, v front.Vitals, ok bool) {
	h.mu.Lock()
	state, m, mdt, ost := h.state, h.mgs, h.mdt, h.ost
	h.mu.Unlock()
	t = health.Target{Name: h.Name, State: health.Serving}
	switch {
	case m != nil:
		t.Instance = m.Instance()
	case mdt != nil:
		v = mdt.Front().Vitals()
		mdt.FS().Holds(func(node string) { v.Nodes = append(v.Nodes, node) })
	case ost != nil:
		v = ost.Front().Vitals()
	}
	if mdt != nil || ost != nil {
		t.Instance, t.Work, t.Progress = v.Instance, uint32(v.Work), v.Progress
		if !v.Serving {
			t.State = health.Recovering
		}
	}
	switch state {
	case status.StateStarting:
		t.State = health.Starting
	case status.StateStopping:
		t.State = health.Stopping
	case status.StateUp:
	default:
		return t, v, false
	}
	return t, v, true
}

var (
	errSuspected = errors.New("the node does not answer beats")
	errDied      = errors.New("the process of the node was restarted")
	errStopped   = errors.New("the node says that it no longer runs the target")
)

// heard passes on, from whomever it is, that a target runs at a node which may run it.
func (c *cluster) heard(target string, instance uint64, node string) {
	if h := c.byName[target]; h != nil && h.MayRun(node) {
		c.news.runs(target, instance, node)
	}
}

// learn acts on what beats say. Nothing here decides anything: paths that are cut are
// made anew by who needs them, and that a target runs somewhere is believed when the
// target says so itself.
func (c *cluster) learn(events []health.Event) {
	if c.managing.m != nil {
		c.managing.m.Poke()
	}
	for i := range events {
		e := &events[i]
		log := c.log.With("peer", e.Peer)
		switch e.Kind {
		case health.Reset:
			c.lives.clear()
		case health.Alive:
			c.lives.set(e.Peer, true)
			if e.Silence != 0 {
				log.Info("node answers again; nothing was decided because of its silence", "silence", e.Silence.Round(time.Millisecond))
			} else {
				log.Info("node answers beats")
			}
			c.news.back(e.Peer)
		case health.Suspect:
			c.lives.set(e.Peer, false)
			c.asks.cut(e.Peer)
			n := c.paths.cut(e.Peer, "", time.Now(), errSuspected)
			if c.etcd != nil {
				n += c.etcd.cut(e.Peer)
			}
			log.Warn("node does not answer beats: it may be dead, stopped or cut off; connections to it are made anew, and what was on its way is sent again",
				"silence", e.Silence.Round(time.Millisecond), "connections", n)
		case health.Restarted:
			// The new process may have connected before its first beat came.
			last := time.Now().Add(-e.Silence)
			n := c.paths.cut(e.Peer, "", last, errDied) + c.srv.Cut(e.Peer, last, errDied)
			log.Info("node was started again: the process before is dead, and unless it has stopped in order its targets recover where they start", "incarnation", e.Incarnation, "connections", n)
		case health.TargetUp, health.TargetMoved:
			log.Info("node runs a target", "target", e.Target, "instance", e.Instance, "before", e.From)
			c.heard(e.Target, e.Instance, e.Peer)
		case health.TargetGone:
			c.news.gone(e.Target, e.Peer)
			n := c.paths.cut(e.Peer, e.Target, time.Now(), errStopped)
			log.Info("node no longer runs a target", "target", e.Target, "instance", e.Instance, "connections", n)
		case health.Serves:
			c.superseded(e.VIP.Index, e.VIP.Epoch)
		case health.Slow:
			if e.Target == "" {
				log.Warn("node answers beats and does not get on: its processor or memory is short, or it hangs")
			} else {
				log.Warn("target has work and does not get on: look at its disk; it is not dead, and clients wait for it", "target", e.Target, "instance", e.Instance)
			}
		case health.Steady:
			log.Info("gets on again", "target", e.Target, "instance", e.Instance)
		}
	}
}
