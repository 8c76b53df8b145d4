package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/etcd"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// EtcdPeers are the members of the embedded etcd.
func EtcdPeers(cfg *config.Config) (l []etcd.Peer, err error) {
	for _, n := range cfg.Registry.Members {
		ap, err := netip.ParseAddrPort(cfg.Cluster.Addr(n))
		if err != nil {
			return nil, fmt.Errorf("address of node %s: %w", n, err)
		}
		at := func(p int) netip.AddrPort { return netip.AddrPortFrom(ap.Addr(), uint16(p)) }
		l = append(l, etcd.Peer{Name: n, Client: at(cfg.Registry.ClientPort), Peer: at(cfg.Registry.PeerPort)})
	}
	return l, nil
}

// NewEtcd returns a client of the etcd that has the registry.
func NewEtcd(cfg *config.Config, log *slog.Logger) (*etcd.Client, error) {
	r := &cfg.Registry
	o := etcd.Options{Endpoints: r.Endpoints, User: r.User, Prefix: r.Prefix, MaxDocument: int(r.MaxDocument), Logger: log}
	var err error
	if o.TLS, err = cfg.RegistryTLS(); err != nil {
		return nil, err
	}
	if o.Password, err = cfg.RegistryPassword(); err != nil {
		return nil, err
	}
	if r.Kind == config.RegistryEmbedded {
		peers, err := EtcdPeers(cfg)
		if err != nil {
			return nil, err
		}
		o.Endpoints = etcd.Endpoints(peers, cfg.Cluster.Node, o.TLS != nil)
		// What was passed on to a leader of etcd that is dead is lost, and asked again.
		o.MaxDocument, o.Probe, o.Timeout = etcd.EmbeddedMaxDocument, 2*time.Second, time.Second
	}
	return etcd.New(o)
}

// inEtcd is what a node has to do with a registry in etcd: it changes the document
// there itself, and may be elected to have the table of targets, which is with the MGS
// otherwise.
//
// The calls of this process go to a service of its own, so that they are repeated until
// they are answered and are executed once, as those to an MGS are.
type inEtcd struct {
	c        *cluster
	client   *etcd.Client
	storage  *loud
	stored   *mgs.Stored
	calls    *mgs.Service
	election *etcd.Election

	// run ends the member and the election.
	run    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup // what run ends
	member sync.WaitGroup
	halt   context.CancelFunc // ends the member, which is last
	asked  sync.WaitGroup     // calls under way

	mu      sync.Mutex
	hub     *ir.Hub // while this node leads
	serving *mgs.Service
}

// newInEtcd connects to nothing yet.
func newInEtcd(c *cluster) (*inEtcd, error) {
	e := &inEtcd{c: c}
	var err error
	if e.client, err = NewEtcd(c.cfg, c.log); err != nil {
		return nil, err
	}
	e.election, err = e.client.NewElection(etcd.ElectionOptions{Node: c.name, TTL: time.Duration(c.cfg.Registry.Lease), Logger: c.log})
	if err != nil {
		return nil, err
	}
	known, err := readMark(filepath.Join(c.cfg.DataDir, identityFile))
	if err != nil {
		return nil, err
	}
	e.storage = &loud{Storage: e.client.Storage(), log: c.log, known: known}
	e.stored = mgs.NewStored(e.storage, rand.Reader)
	e.calls = mgs.NewService(e.stored, c.log)
	return e, nil
}

// cut ends the connections to the member of a silent node.
func (e *inEtcd) cut(node string) int {
	if e.c.cfg.Registry.Kind != config.RegistryEmbedded {
		return 0
	}
	peers, err := EtcdPeers(e.c.cfg)
	if err != nil {
		return 0 // it was told when the client was made
	}
	for _, p := range peers {
		if p.Name == node {
			return e.client.Cut(p.Client)
		}
	}
	return 0
}

// start starts the member, if this node is to have one, and takes part in elections.
func (e *inEtcd) start() {
	e.run, e.cancel = context.WithCancel(context.Background())
	member, halt := context.WithCancel(context.Background())
	e.halt = halt
	if e.c.cfg.Member() {
		e.member.Go(func() { e.keepMember(member) })
	}
	e.work.Go(func() { e.election.Run(e.run) })
	e.work.Go(e.serve)
	e.work.Go(func() { e.depose(e.run) })
}

// keepMember starts the member, trying until it can, and closes it in the end. One that
// fails is left: the others go on without it.
func (e *inEtcd) keepMember(ctx context.Context) {
	cfg := e.c.cfg
	peers, err := EtcdPeers(cfg)
	if err != nil {
		e.c.log.Error("etcd does not start", "err", err)
		return
	}
	o := etcd.MemberOptions{
		Name: e.c.name, Dir: filepath.Join(cfg.DataDir, "etcd"), Members: peers, Logger: e.c.log,
		Heartbeat: time.Duration(cfg.Registry.Heartbeat), Election: time.Duration(cfg.Registry.ElectionTimeout),
	}
	if e.c.tls != nil {
		cert, key := ca.NodePaths(cfg.Cluster.TLSDir, e.c.name)
		o.TLS = &etcd.Files{CA: filepath.Join(cfg.Cluster.TLSDir, ca.CAFile), Cert: cert, Key: key}
	}
	for last := ""; ctx.Err() == nil; {
		m, err := etcd.StartMember(ctx, o)
		if err == nil {
			e.c.log.Info("etcd member runs here", "dir", o.Dir)
			<-ctx.Done()
			if err := m.Close(); err != nil {
				e.c.log.Warn("stop the etcd member", "err", err)
			}
			return
		}
		if errors.Is(err, etcd.ErrFailed) {
			e.c.log.Error("etcd member does not start", "err", err)
			return
		}
		if err.Error() != last {
			last = err.Error()
			e.c.log.Error("etcd member does not start; trying again", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(startAgain):
		}
	}
}

// serve has the table of targets while this node leads.
func (e *inEtcd) serve() {
	for has := uint64(0); ; {
		changed := e.election.Changed()
		term := e.election.Term()
		if e.run.Err() != nil {
			term = 0
		}
		if term != has {
			e.resign()
			if has = term; term != 0 {
				e.take(term)
			}
		}
		if e.run.Err() != nil {
			return
		}
		select {
		case <-changed:
		case <-e.run.Done():
		}
	}
}

// take begins to serve as the leader of a term. The others know the table by the
// term's number from those before it.
func (e *inEtcd) take(term uint64) {
	hub := ir.NewHub(ir.HubOptions{Config: e.c.tableConfig(), Incarnation: term, Logger: e.c.log})
	s := mgs.NewService(e.stored, e.c.log)
	s.UseTable(hub)
	e.mu.Lock()
	e.hub, e.serving = hub, s
	e.mu.Unlock()
	if err := e.c.srv.SetTarget(config.MGSName, s); err != nil {
		e.c.log.Error("the table of targets is not served to others", "err", err)
	}
}

func (e *inEtcd) resign() {
	e.mu.Lock()
	s := e.serving
	e.hub, e.serving = nil, nil
	e.mu.Unlock()
	if s == nil {
		return
	}
	s.Close()
	ctx, cancel := context.WithTimeout(context.Background(), haltTime)
	defer cancel()
	if err := e.c.srv.StopTarget(ctx, config.MGSName); err != nil {
		e.c.log.Debug("the table of targets was not closed in order", "err", err)
	}
}

// table is the table of targets while this node leads, or nil.
func (e *inEtcd) table() *ir.Hub {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.hub
}

var errNoTable = errors.New("this node was elected, and does not have the table of targets yet")

// dial connects to the node that was elected.
func (e *inEtcd) dial(ctx context.Context, _ string) (wire.Conn, error) {
	node, err := e.election.Await(ctx)
	if err != nil {
		return nil, err
	}
	if node != e.c.name {
		return e.c.paths.dial(ctx, node, config.MGSName, tcp.BundleOptions{DialOptions: e.c.dialOptions(node, config.MGSName)})
	}
	e.mu.Lock()
	s := e.serving
	e.mu.Unlock()
	if s == nil {
		return nil, errNoTable
	}
	return wire.Local(s, wire.NextSession()), nil
}

// own connects to the service of this process's calls.
func (e *inEtcd) own(context.Context, string) (wire.Conn, error) {
	return wire.Local(unhurried{e}, wire.NextSession()), nil
}

// unhurried executes calls in goroutines of their own, so that callers can leave.
type unhurried struct{ e *inEtcd }

// TryHandle implements wire.Target.
func (unhurried) TryHandle(*wire.Request, *wire.Reply) bool { return false }

// Handle implements wire.Target.
func (u unhurried) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	u.e.asked.Go(func() { u.e.calls.Handle(req, rep, done) })
}

// leave gives leadership up. The registry can still be used.
func (e *inEtcd) leave() {
	e.cancel()
	e.work.Wait()
}

// close ends everything, the member last. Nobody calls any more.
func (e *inEtcd) close() error {
	e.calls.Close()
	e.asked.Wait()
	err := e.client.Close()
	e.halt()
	e.member.Wait()
	return err
}

// found waits until there is a registry, and returns its identity: this node knows one, and
// must not begin another.
func (e *inEtcd) found(ctx context.Context) (identity string, err error) {
	for told := false; ; {
		doc, _, err := e.client.Storage().Load(ctx)
		switch {
		case err == nil && doc != nil:
			d, err := mgs.Inspect(e.client.Storage().Name(), doc)
			return d.Identity, err
		case err == nil && !told:
			told = true
			e.c.log.Warn("the registry in etcd is empty, but this node belongs to a cluster: waiting until its registry is imported (baton registry import)", "key", e.client.Storage().Name())
		case err != nil && !errors.Is(err, mgs.ErrUnavailable):
			return "", err
		}
		if err := e.client.Storage().Wait(ctx, 0); err != nil {
			return "", err
		}
	}
}

// loud is a storage that says when it cannot be used, and when it can be again. That is so
// also of one that does not have the registry which this node knows: somebody has emptied
// etcd, or it was set up anew, and what the node serves it serves on.
type loud struct {
	etcd.Storage
	log *slog.Logger

	mu    sync.Mutex
	last  time.Time // when it was said, zero: it can be used
	known string    // identity of this node's registry; empty: it knows none yet
	right []byte    // the last document that was found to be of it
}

// expect has the storage be that of the registry with this identity.
func (s *loud) expect(identity string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known, s.right = identity, nil
}

// check refuses a document of another registry.
func (s *loud) check(doc []byte) error {
	s.mu.Lock()
	known, right := s.known, s.right
	s.mu.Unlock()
	if known == "" || doc != nil && bytes.Equal(doc, right) {
		return nil
	}
	if err := mgs.Expect(s.Name(), doc, known); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == known {
		s.right = doc
	}
	return nil
}

// tellEvery is how often it is said that the registry cannot be used.
const tellEvery = 30 * time.Second

func (s *loud) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.Is(err, mgs.ErrUnavailable):
		if s.last.IsZero() || time.Since(s.last) >= tellEvery {
			s.last = time.Now()
			s.log.Warn("the registry cannot be used: addresses and targets stay where they are and are served, nothing can begin or move", "err", err)
		}
	case err == nil && !s.last.IsZero():
		s.last = time.Time{}
		s.log.Info("the registry can be used again")
	}
}

// Load implements mgs.Storage.
func (s *loud) Load(ctx context.Context) ([]byte, uint64, error) {
	doc, rev, err := s.Storage.Load(ctx)
	if err == nil {
		err = s.check(doc)
	}
	s.note(err)
	return doc, rev, err
}

// Swap implements mgs.Storage. What it replaces was checked: it has the revision of a Load.
func (s *loud) Swap(ctx context.Context, rev uint64, doc []byte) error {
	err := s.Storage.Swap(ctx, rev, doc)
	s.note(err)
	return err
}
