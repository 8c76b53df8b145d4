package exports

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Resolver asks the host name service: SystemResolver, or a fake in tests. That
// a name or address is not known is an empty answer, not an error.
type Resolver interface {
	// LookupAddr returns the names of an address.
	LookupAddr(ctx context.Context, addr netip.Addr) ([]string, error)
	// LookupHost returns the addresses of a host name.
	LookupHost(ctx context.Context, host string) ([]netip.Addr, error)
}

// SystemResolver is the host's resolver (hosts file and DNS).
type SystemResolver struct {
	Net *net.Resolver // nil: net.DefaultResolver
}

func (s SystemResolver) net() *net.Resolver {
	if s.Net != nil {
		return s.Net
	}
	return net.DefaultResolver
}

// LookupAddr implements Resolver.
func (s SystemResolver) LookupAddr(ctx context.Context, addr netip.Addr) ([]string, error) {
	l, err := s.net().LookupAddr(ctx, addr.String())
	return l, realError(err)
}

// LookupHost implements Resolver.
func (s SystemResolver) LookupHost(ctx context.Context, host string) ([]netip.Addr, error) {
	l, err := s.net().LookupNetIP(ctx, "ip", host)
	return l, realError(err)
}

func realError(err error) error {
	var dns *net.DNSError
	if errors.As(err, &dns) && dns.IsNotFound {
		return nil
	}
	return err
}

// maxNames bounds the names that are kept for one client.
const maxNames = 16

// NameCache knows the names of clients for matching. A client has a name when
// the name's addresses contain the client's: names from reverse lookups are
// confirmed by a forward lookup, so whoever runs the reverse zone of his network
// cannot choose his rights; host names of the table need no reverse lookup.
//
// Names are used for TTL, and for StaleFor more while Run refreshes them. Lookups
// that fail are remembered as "no names" for NegativeTTL.
type NameCache struct {
	cfg   NameConfig
	mu    sync.RWMutex
	addrs map[netip.Addr]*nameEntry
	hosts []string
	queue chan netip.Addr
	// flights are the running Resolve calls by client; the channel is closed when
	// one ends.
	flights map[netip.Addr]chan struct{}
}

// NameConfig configures a NameCache.
type NameConfig struct {
	Resolver    Resolver
	Now         func() time.Time
	TTL         time.Duration // 0: 5 minutes
	StaleFor    time.Duration // 0: 30 minutes
	NegativeTTL time.Duration // 0: 30 seconds
	Timeout     time.Duration // of all lookups for one client; 0: 5 seconds
	MaxClients  int           // remembered clients; 0: 16384
}

type nameEntry struct {
	names   []string
	expires time.Time // refresh from then on
	dead    time.Time // unusable from then on
	queued  bool      // guarded by NameCache.mu
}

// NewNameCache returns a cache. Without a running Run, stale names are used
// until they are unusable and then are Pending.
func NewNameCache(cfg NameConfig) *NameCache {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&cfg.TTL, 5*time.Minute)
	def(&cfg.StaleFor, 30*time.Minute)
	def(&cfg.NegativeTTL, 30*time.Second)
	def(&cfg.Timeout, 5*time.Second)
	if cfg.MaxClients <= 0 {
		cfg.MaxClients = 1 << 14
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &NameCache{cfg: cfg, addrs: map[netip.Addr]*nameEntry{}, flights: map[netip.Addr]chan struct{}{}, queue: make(chan netip.Addr, 256)}
}

// SetHosts tells which host names the current table uses (Table.Hosts). When it
// adds names, what is known of clients is forgotten.
func (n *NameCache) SetHosts(hosts []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, h := range hosts {
		if !slices.Contains(n.hosts, h) {
			clear(n.addrs)
			break
		}
	}
	n.hosts = slices.Clone(hosts)
}

// Lookup implements Names. A client with stale names is queued for Run.
func (n *NameCache) Lookup(addr netip.Addr) ([]string, bool) {
	addr = addr.Unmap().WithZone("")
	now := n.cfg.Now()
	n.mu.RLock()
	e := n.addrs[addr]
	stale := e != nil && !now.Before(e.expires)
	queue := stale && !e.queued
	n.mu.RUnlock()
	if e == nil || !now.Before(e.dead) {
		return nil, false
	}
	if queue {
		n.mu.Lock()
		if !e.queued {
			select {
			case n.queue <- addr:
				e.queued = true
			default: // the next call tries again
			}
		}
		n.mu.Unlock()
	}
	return e.names, true
}

// Run refreshes stale names until ctx ends.
func (n *NameCache) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case a := <-n.queue:
			n.refresh(ctx, a)
		}
	}
}

// Resolve makes the names of addr known; it waits for the name service, at most
// for the configured timeout. Afterwards Lookup knows addr, even when lookups
// failed, unless ctx (or that of a concurrent caller for the same client) ended
// first, which is the error.
func (n *NameCache) Resolve(ctx context.Context, addr netip.Addr) error {
	if _, known := n.Lookup(addr); known {
		return nil
	}
	addr = addr.Unmap().WithZone("")
	n.mu.Lock()
	done := n.flights[addr]
	if done != nil {
		n.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
		}
		return ctx.Err()
	}
	done = make(chan struct{})
	n.flights[addr] = done
	n.mu.Unlock()
	n.refresh(ctx, addr)
	n.mu.Lock()
	delete(n.flights, addr)
	n.mu.Unlock()
	close(done)
	return ctx.Err()
}

func (n *NameCache) refresh(ctx context.Context, addr netip.Addr) {
	n.mu.RLock()
	hosts := n.hosts
	n.mu.RUnlock()
	lctx, cancel := context.WithTimeout(ctx, n.cfg.Timeout)
	names, failed := n.resolve(lctx, addr, hosts)
	cancel()
	if ctx.Err() != nil {
		return
	}
	now := n.cfg.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.addrs[addr]
	if failed && old != nil && now.Before(old.dead) {
		// The name service is away: go on with what was true, ask again soon.
		n.addrs[addr] = &nameEntry{names: old.names, expires: now.Add(n.cfg.NegativeTTL), dead: old.dead}
		return
	}
	if old == nil && len(n.addrs) >= n.cfg.MaxClients {
		n.evict(now)
	}
	ttl, stale := n.cfg.TTL, n.cfg.StaleFor
	if failed {
		ttl, stale = n.cfg.NegativeTTL, 0
	}
	n.addrs[addr] = &nameEntry{names: names, expires: now.Add(ttl), dead: now.Add(ttl + stale)}
}

// evict makes room for one client: all unusable ones go, or else any one.
func (n *NameCache) evict(now time.Time) {
	for a, e := range n.addrs {
		if !now.Before(e.dead) {
			delete(n.addrs, a)
		}
	}
	for a := range n.addrs {
		if len(n.addrs) < n.cfg.MaxClients {
			return
		}
		delete(n.addrs, a)
	}
}

// resolve returns the confirmed names of addr. failed tells that some lookup did
// not work, so that the list may be incomplete.
func (n *NameCache) resolve(ctx context.Context, addr netip.Addr, hosts []string) (names []string, failed bool) {
	found, err := n.cfg.Resolver.LookupAddr(ctx, addr)
	failed = err != nil
	if len(found) > maxNames {
		found = found[:maxNames]
	}
	candidates := make([]string, 0, len(found)+len(hosts))
	for _, f := range found {
		candidates = append(candidates, strings.TrimSuffix(strings.ToLower(f), "."))
	}
	candidates = append(candidates, hosts...)
	slices.Sort(candidates)
	for _, c := range slices.Compact(candidates) {
		addrs, err := n.cfg.Resolver.LookupHost(ctx, c)
		if err != nil {
			failed = true
			continue
		}
		for _, a := range addrs {
			if a.Unmap().WithZone("") == addr {
				names = append(names, c)
				break
			}
		}
	}
	return names, failed
}
