package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Peer is a member of an embedded cluster.
type Peer struct {
	Name string
	// Client is where clients reach it, Peer where the other members do.
	Client, Peer netip.AddrPort
}

// Files are the certificate of a node, its key, and the authority of all. The
// certificates have the members' IP addresses.
type Files struct{ CA, Cert, Key string }

// MemberOptions of StartMember. Name, Dir and Members are required.
type MemberOptions struct {
	Name string
	// Dir is this member's alone, and made if it is missing.
	Dir     string
	Members []Peer // this one, too; the same at all
	TLS     *Files // nil: nothing is protected
	// Heartbeat is how often the leader of the members is heard, Election how long
	// it may be silent. Defaults 100 ms, 1 s.
	Heartbeat, Election time.Duration
	Logger              *slog.Logger
	// NoSync leaves it to the system when data get to the disk: for tests.
	NoSync bool
}

// Endpoints are the URLs of the members' client ports, that of the named one first.
func Endpoints(l []Peer, first string, tls bool) []string {
	var urls []string
	for _, p := range l {
		u := address(p.Client, tls)
		if p.Name == first {
			urls = slices.Insert(urls, 0, u.String())
		} else {
			urls = append(urls, u.String())
		}
	}
	return urls
}

func address(a netip.AddrPort, tls bool) url.URL {
	u := url.URL{Scheme: "http", Host: a.String()}
	if tls {
		u.Scheme = "https"
	}
	return u
}

// Member is an etcd server in this process.
type Member struct {
	log    *slog.Logger
	etcd   *embed.Etcd
	failed chan struct{}
	ends   sync.WaitGroup
	fail   sync.Once
	// closing ends clients' streams, for which the end of the server would wait.
	closing context.Context
	leave   context.CancelFunc
	close   sync.Once
	closed  chan struct{}

	mu  sync.Mutex
	err error
}

// ErrFailed is wrapped by StartMember's error when etcd would have ended the process: what
// it has begun, its ports for one, stays in this process, which cannot start it again.
var ErrFailed = errors.New("etcd has given up; restart this node when the cause is gone")

// StartMember starts a member. It does not wait for the others: until a majority is
// there the member answers nothing. Whoever starts it closes it.
//
// A member that has lost its directory has forgotten what it has promised the others.
// They refuse it, those that answer when it starts; one that was removed and added again
// (etcdctl member remove, add) joins.
func StartMember(ctx context.Context, o MemberOptions) (*Member, error) {
	m := &Member{log: o.Logger, failed: make(chan struct{}), closed: make(chan struct{})}
	m.closing, m.leave = context.WithCancel(context.Background())
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	cfg, err := o.config()
	if err != nil {
		return nil, fmt.Errorf("etcd member %s: %w", o.Name, err)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd member %s: its directory: %w", o.Name, err)
	}
	if _, err := os.Stat(filepath.Join(o.Dir, "member")); errors.Is(err, os.ErrNotExist) && o.awaited(ctx, m.log) {
		cfg.ClusterState = embed.ClusterStateFlagExisting
	}
	cfg.GRPCAdditionalServerOptions = []grpc.ServerOption{grpc.ChainStreamInterceptor(m.stream)}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newZap(m.log, func() bool { return m.closing.Err() != nil }, func(why string) { m.end(errors.New(why)) }))
	type started struct {
		e   *embed.Etcd
		err error
	}
	// Where etcd would end the process, only its goroutine ends.
	begun := make(chan started, 1)
	go func() {
		defer close(begun)
		defer func() {
			if r := recover(); r != nil {
				m.log.Debug("etcd: panic", "stack", string(debug.Stack()))
				m.end(fmt.Errorf("%v", r))
			}
		}()
		e, err := embed.StartEtcd(cfg)
		begun <- started{e, err}
	}()
	select {
	case s, ok := <-begun:
		if ok {
			m.etcd, err = s.e, s.err
			break
		}
		<-m.failed
		err = fmt.Errorf("%w: %w", ErrFailed, m.Err())
	case <-m.failed:
		err = fmt.Errorf("%w: %w", ErrFailed, m.Err())
		go func() {
			if s := <-begun; s.e != nil {
				s.e.Close()
			}
		}()
	}
	if err != nil {
		return nil, fmt.Errorf("etcd member %s in %s: %w%s", o.Name, o.Dir, err, remedy(err))
	}
	m.ends.Go(func() {
		select {
		case err := <-m.etcd.Err():
			if err != nil {
				m.end(err)
				m.shut()
			}
		case <-m.etcd.Server.StopNotify():
		case <-m.failed:
			m.shut() // so that clients go to other members
		}
	})
	return m, nil
}

func remedy(err error) string {
	s := err.Error()
	switch {
	case strings.Contains(s, "has already been bootstrapped"):
		return "; it has lost its directory: restore that, or remove the member from the others and add it again (etcdctl member remove, etcdctl member add)"
	case strings.Contains(s, "address already in use"), strings.Contains(s, "cannot assign requested address"):
		return "; correct registry.client_port, registry.peer_port or the node's address"
	case strings.Contains(s, "file already closed"), strings.Contains(s, "timeout"):
		return "; another process may use the directory"
	}
	return ""
}

func (o *MemberOptions) config() (*embed.Config, error) {
	var me *Peer
	var all []string
	for i := range o.Members {
		p := &o.Members[i]
		u := address(p.Peer, o.TLS != nil)
		all = append(all, p.Name+"="+u.String())
		if p.Name == o.Name {
			me = p
		}
	}
	if me == nil {
		return nil, errors.New("it is not among the members")
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = o.Name, o.Dir
	cu, pu := address(me.Client, o.TLS != nil), address(me.Peer, o.TLS != nil)
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{cu}, []url.URL{cu}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{pu}, []url.URL{pu}
	cfg.InitialCluster, cfg.InitialClusterToken = strings.Join(all, ","), "baton"
	if o.Heartbeat > 0 {
		cfg.TickMs = uint(o.Heartbeat.Milliseconds())
	}
	if o.Election > 0 {
		cfg.ElectionMs = uint(o.Election.Milliseconds())
	}
	cfg.MaxRequestBytes = EmbeddedMaxDocument + overhead
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, "100"
	// An entry has the whole document: what members keep in memory for slow ones is bounded
	// by this many, and what one needs that was away for longer is the database itself.
	cfg.SnapshotCatchUpEntries, cfg.SnapshotCount = catchUpEntries, snapshotCount
	// Compaction comes every five minutes only: at a change a second of the largest document
	// that is more than etcd's own 2 GiB.
	cfg.QuotaBackendBytes = quota
	cfg.GRPCKeepAliveMinTime = time.Second
	cfg.EnableGRPCGateway = false
	cfg.WarningUnaryRequestDuration = embed.DefaultWarningUnaryRequestDuration
	cfg.UnsafeNoFsync = o.NoSync
	// A node that starts alone after a failure of all does not disturb a leader.
	cfg.PreVote = true
	if o.TLS != nil {
		t := transport.TLSInfo{
			TrustedCAFile: o.TLS.CA, CertFile: o.TLS.Cert, KeyFile: o.TLS.Key, ClientCertAuth: true,
			// That a certificate is of the cluster is what counts: a node with several
			// addresses may come from another one.
			SkipClientSANVerify: true,
		}
		cfg.ClientTLSInfo, cfg.PeerTLSInfo = t, t
		cfg.TlsMinVersion = "TLS1.3"
	}
	return cfg, nil
}

// Bounds of what a member keeps: raft's entries in memory, and until a snapshot on the disk,
// and the database in bytes.
const (
	catchUpEntries = 100
	snapshotCount  = 1000
	quota          = 4 << 30
)

// awaited tells whether the other members expect this one as a new member.
func (o *MemberOptions) awaited(ctx context.Context, log *slog.Logger) bool {
	var others []Peer
	var mine string
	for _, p := range o.Members {
		if p.Name != o.Name {
			others = append(others, p)
		} else {
			u := address(p.Peer, o.TLS != nil)
			mine = u.String()
		}
	}
	if len(others) == 0 {
		return false
	}
	co := Options{Endpoints: Endpoints(others, "", o.TLS != nil), Timeout: time.Second, Logger: log}
	if o.TLS != nil {
		t := transport.TLSInfo{TrustedCAFile: o.TLS.CA, CertFile: o.TLS.Cert, KeyFile: o.TLS.Key}
		var err error
		if co.TLS, err = t.ClientConfig(); err != nil {
			return false // the start says why
		}
	}
	c, err := New(co)
	if err != nil {
		return false
	}
	defer c.Close()
	found := false
	err = c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		r, err := cli.MemberList(ctx)
		if err != nil {
			return err
		}
		for _, x := range r.Members {
			found = found || x.Name == "" && slices.Contains(x.PeerURLs, mine)
		}
		return nil
	})
	log.Debug("etcd: whether the others wait for this member to join", "joins", found, "err", err)
	return found
}

// end notes why the member does not work any more.
func (m *Member) end(err error) {
	m.fail.Do(func() {
		m.mu.Lock()
		m.err = err
		m.mu.Unlock()
		m.log.Error("etcd: this member has failed; the others go on if they are a majority. Restart this node when the cause is gone", "err", err)
		close(m.failed)
	})
}

// Err is why the member has failed, or nil.
func (m *Member) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Failed is closed when the member has failed.
func (m *Member) Failed() <-chan struct{} { return m.failed }

// Ready is closed when the member has found the others for the first time.
func (m *Member) Ready() <-chan struct{} { return m.etcd.Server.ReadyNotify() }

// stream has a client's stream end when the member does.
func (m *Member) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	defer context.AfterFunc(m.closing, cancel)()
	err := handle(srv, endingStream{ss, ctx})
	if m.closing.Err() != nil {
		return status.Error(codes.Unavailable, "the member is stopped")
	}
	return err
}

type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s endingStream) Context() context.Context { return s.ctx }

// closeTime bounds the end of a member: one that has failed may not end at all.
const closeTime = 15 * time.Second

// shut begins the end of the member, once.
func (m *Member) shut() {
	m.close.Do(func() {
		m.leave()
		go func() {
			defer close(m.closed)
			m.etcd.Close()
			m.ends.Wait()
		}()
	})
}

// Close stops the member. If it leads the members, another one is told to.
func (m *Member) Close() error {
	m.shut()
	select {
	case <-m.closed:
		return nil
	case <-time.After(closeTime):
		return errors.New("etcd: the member did not end in time and is left as it is")
	}
}
