package vip

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// DefaultProto is the protocol number (IFA_PROTO, Linux 5.18 and later) by which
// addresses are known that Kernel.Add has added. The kernel itself uses 1 to 3.
const DefaultProto = 186

// Options of Open. The zero value will do.
type Options struct {
	// Proto marks the addresses that Add adds. 0: DefaultProto.
	Proto uint8
	// StateFile records the addresses that Add adds, for kernels that do not keep
	// their marks. What it has of an earlier boot does not count. Empty: none; Added
	// then finds nothing on such a kernel.
	StateFile string
	// Log gets what is worth a warning. nil: slog.Default().
	Log *slog.Logger
}

// Kernel is the machine's network as Net, in the network namespace of the thread
// that called Open. Adding, removing and destroying need CAP_NET_ADMIN, Announce
// and Tickle CAP_NET_RAW; without, these return errors that say so.
type Kernel struct {
	proto uint8
	state *stateFile // nil: none
	log   *slog.Logger
	sysfs string              // /proc/sys/net
	pause func(time.Duration) // between segments of Tickle
	now   func() time.Time
	kill  func(*diagSocket) error
	here  func(netip.Addr) (bool, error) // whether packets to it are delivered

	// mu is held for reading by calls in progress, and by Close.
	mu     sync.RWMutex
	closed bool
	route  nl.SocketHandle
	diag   nl.SocketHandle
	packet sender // of whole frames
	raw4   sender // of IP packets
	raw6   sender

	change sync.Mutex // addresses are changed one after the other

	warnProto sync.Once
}

var _ Net = (*Kernel)(nil)

// sender is a socket that only sends; fd is -1 and err set if there is none.
type sender struct {
	fd  int
	err error
}

var errClosed = errors.New("vip: closed")

// Open opens the sockets that the work needs, and keeps them open.
func Open(o Options) (*Kernel, error) {
	k := &Kernel{proto: o.Proto, log: o.Log, sysfs: "/proc/sys/net", pause: time.Sleep, now: time.Now}
	k.kill, k.here = k.destroy, k.local
	if k.proto == 0 {
		k.proto = DefaultProto
	}
	if k.log == nil {
		k.log = slog.Default()
	}
	if o.StateFile != "" {
		k.state = openState(o.StateFile)
	}
	k.packet, k.raw4, k.raw6 = sender{fd: -1}, sender{fd: -1}, sender{fd: -1}
	for _, s := range []struct {
		h        *nl.SocketHandle
		protocol int
		name     string
	}{{&k.route, unix.NETLINK_ROUTE, "NETLINK_ROUTE"}, {&k.diag, unix.NETLINK_INET_DIAG, "NETLINK_SOCK_DIAG"}} {
		sock, err := nl.Subscribe(s.protocol)
		if err != nil {
			k.release()
			return nil, fmt.Errorf("vip: open netlink socket: %w: the kernel needs %s, and the service's sandbox must allow AF_NETLINK", err, s.name)
		}
		s.h.Socket = sock
	}
	// Protocol 0 and IPPROTO_RAW: nothing is ever received.
	k.packet = openSender(unix.AF_PACKET, 0)
	k.raw4 = openSender(unix.AF_INET, unix.IPPROTO_RAW)
	k.raw6 = openSender(unix.AF_INET6, unix.IPPROTO_RAW)
	return k, nil
}

func openSender(family, protocol int) sender {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			err = fmt.Errorf("%w: the process needs CAP_NET_RAW (run it as root, or AmbientCapabilities=CAP_NET_RAW)", err)
		}
		return sender{-1, err}
	}
	return sender{fd, nil}
}

// release closes what is open.
func (k *Kernel) release() {
	for _, h := range []*nl.SocketHandle{&k.route, &k.diag} {
		if h.Socket != nil {
			h.Socket.Close()
			h.Socket = nil
		}
	}
	for _, s := range []*sender{&k.packet, &k.raw4, &k.raw6} {
		if s.fd >= 0 {
			_ = unix.Close(s.fd) // nothing is buffered
		}
		*s = sender{-1, errClosed}
	}
}

// Close waits for calls in progress and closes the sockets. Addresses stay.
func (k *Kernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.closed {
		k.closed = true
		k.release()
	}
	return nil
}

// begin makes Close wait until the returned function is called.
func (k *Kernel) begin() (func(), error) {
	k.mu.RLock()
	if k.closed {
		k.mu.RUnlock()
		return nil, errClosed
	}
	return k.mu.RUnlock, nil
}

// ask sends a request by the socket and returns the answers.
func ask(h *nl.SocketHandle, protocol, kind, flags int, parts ...[]byte) ([][]byte, error) {
	for try := 0; ; try++ {
		req := nl.NewNetlinkRequest(kind, flags)
		req.Sockets = map[int]*nl.SocketHandle{protocol: h}
		for _, p := range parts {
			req.AddRawData(p)
		}
		out, err := req.Execute(protocol, 0)
		// A dump during which something changed may lack entries (EINTR of the
		// library's making); the next one is whole.
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == 100 {
			return out, err
		}
	}
}

// entry is an address of the machine.
type entry struct {
	prefix netip.Prefix
	index  int // of the interface
	flags  uint32
	proto  uint8 // 0: the kernel has kept none
	raw    []byte
}

// minIfAddr is the size of struct ifaddrmsg (rtnetlink(7)).
const minIfAddr = unix.SizeofIfAddrmsg

// ifaProto is IFA_PROTO of linux/if_addr.h.
const ifaProto = 11

// attributes yields type and value of rtnetlink attributes (rtnetlink(7)), as far
// as they are whole. The library's parser panics where they are not.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(nl.NativeEndian().Uint16(b))
			if size < unix.SizeofRtAttr || size > len(b) {
				return
			}
			if !yield(nl.NativeEndian().Uint16(b[2:]), b[unix.SizeofRtAttr:size]) {
				return
			}
			b = b[min((size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1), len(b)):]
		}
	}
}

// parseEntry decodes an RTM_NEWADDR message.
func parseEntry(b []byte) (entry, bool) {
	if len(b) < minIfAddr {
		return entry{}, false
	}
	m := nl.DeserializeIfAddrmsg(b)
	e := entry{index: int(m.Index), flags: uint32(m.Flags), raw: b}
	var local, address netip.Addr
	for kind, value := range attributes(b[minIfAddr:]) {
		switch kind {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(value)
		case unix.IFA_ADDRESS: // the peer's, if there is IFA_LOCAL
			address, _ = netip.AddrFromSlice(value)
		case unix.IFA_FLAGS:
			if len(value) == 4 {
				e.flags = nl.NativeEndian().Uint32(value)
			}
		case ifaProto:
			if len(value) == 1 {
				e.proto = value[0]
			}
		}
	}
	if !local.IsValid() {
		local = address
	}
	e.prefix = netip.PrefixFrom(local, int(m.Prefixlen))
	return e, e.prefix.IsValid()
}

// entries lists all addresses of the machine.
func (k *Kernel) entries() ([]entry, error) {
	msgs, err := ask(&k.route, unix.NETLINK_ROUTE, unix.RTM_GETADDR, unix.NLM_F_DUMP, nl.NewIfAddrmsg(unix.AF_UNSPEC).Serialize())
	if err != nil {
		return nil, fmt.Errorf("vip: list the machine's addresses: %w", err)
	}
	var out []entry
	for _, m := range msgs {
		if e, ok := parseEntry(m); ok {
			out = append(out, e)
		}
	}
	return out, nil
}

// link is what matters of an interface.
type link struct {
	index int
	name  string
	up    bool
	quiet bool   // does not resolve addresses: loopback, tunnels
	mac   []byte // 6 bytes, unless quiet
	ether bool
}

// links lists the interfaces.
func (k *Kernel) links() ([]link, error) {
	msgs, err := ask(&k.route, unix.NETLINK_ROUTE, unix.RTM_GETLINK, unix.NLM_F_DUMP, nl.NewIfInfomsg(unix.AF_UNSPEC).Serialize())
	if err != nil {
		return nil, fmt.Errorf("vip: list the machine's interfaces: %w", err)
	}
	var out []link
	for _, m := range msgs {
		if len(m) < unix.SizeofIfInfomsg {
			continue
		}
		info := nl.DeserializeIfInfomsg(m)
		l := link{
			index: int(info.Index), up: info.Flags&unix.IFF_UP != 0,
			quiet: info.Flags&(unix.IFF_NOARP|unix.IFF_LOOPBACK) != 0,
			ether: info.Type == unix.ARPHRD_ETHER,
		}
		for kind, value := range attributes(m[unix.SizeofIfInfomsg:]) {
			switch kind {
			case unix.IFLA_IFNAME:
				l.name = unix.ByteSliceToString(value)
			case unix.IFLA_ADDRESS:
				l.mac = value
			}
		}
		out = append(out, l)
	}
	return out, nil
}

// check refuses addresses that cannot float.
func check(a Address) error {
	ip := a.Prefix.Addr()
	switch {
	case !a.Prefix.IsValid():
		return errors.New("vip: no valid address with prefix length")
	case ip.Is4In6():
		return fmt.Errorf("vip: %s: write an IPv4 address as such: %s", ip, ip.Unmap())
	case ip.IsUnspecified() || ip.IsMulticast() || ip.IsLoopback():
		return fmt.Errorf("vip: %s is not an address of a machine in a network", ip)
	case ip.IsLinkLocalUnicast() && ip.Is6() && a.Interface == "":
		return fmt.Errorf("vip: %s is in every interface's network: name the interface", ip)
	}
	return nil
}

// place finds the interface of an address: where it is; else the one that is
// named; else the one with an address of its network.
func (k *Kernel) place(a Address) (l link, here bool, err error) {
	es, err := k.entries()
	if err != nil {
		return link{}, false, err
	}
	ls, err := k.links()
	if err != nil {
		return link{}, false, err
	}
	i, here, err := choose(a, es, ls)
	if err != nil {
		return link{}, false, err
	}
	return ls[i], here, nil
}

// choose is place without the kernel: an index of ls.
func choose(a Address, es []entry, ls []link) (i int, here bool, err error) {
	ip := a.Prefix.Addr()
	byIndex := func(index int) int {
		return slices.IndexFunc(ls, func(l link) bool { return l.index == index })
	}
	named := slices.IndexFunc(ls, func(l link) bool { return l.name == a.Interface })
	at := -1
	for _, e := range es {
		if j := byIndex(e.index); e.prefix.Addr() == ip && j >= 0 {
			if at = j; j == named {
				break
			}
		}
	}
	if at >= 0 {
		return at, true, nil
	}
	if a.Interface != "" {
		if named < 0 {
			return -1, false, fmt.Errorf("vip: %s: the machine has no interface %s: correct the address's interface, or leave it out if one has an address of %s", ip, a.Interface, a.Prefix.Masked())
		}
		return named, false, nil
	}
	best := -1
	var found []int
	for _, e := range es {
		j := byIndex(e.index)
		// A single address (/32, /128) says nothing of what network is there.
		if j < 0 || ls[j].quiet || e.prefix.IsSingleIP() || !e.prefix.Contains(ip) {
			continue
		}
		if e.prefix.Bits() > best {
			best, found = e.prefix.Bits(), nil
		}
		if e.prefix.Bits() == best && !slices.Contains(found, j) {
			found = append(found, j)
		}
	}
	switch len(found) {
	case 0:
		return -1, false, fmt.Errorf("vip: %s: no interface has an address of its network: name the address's interface", ip)
	case 1:
		return found[0], false, nil
	}
	var names []string
	for _, j := range found {
		names = append(names, ls[j].name)
	}
	return -1, false, fmt.Errorf("vip: %s: interfaces %v are all in its network: name the address's interface", ip, names)
}

// Has implements Net.
func (k *Kernel) Has(addr netip.Addr) (bool, error) {
	end, err := k.begin()
	if err != nil {
		return false, err
	}
	defer end()
	es, err := k.entries()
	if err != nil {
		return false, err
	}
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(es, func(e entry) bool { return e.prefix.Addr() == addr }), nil
}

// Check implements Net.
func (k *Kernel) Check(a Address) error {
	end, err := k.begin()
	if err != nil {
		return err
	}
	defer end()
	if err := check(a); err != nil {
		return err
	}
	if a.Interface != "" { // a machine has few interfaces, and may have many addresses
		ls, err := k.links()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(ls, func(l link) bool { return l.name == a.Interface && l.up }) {
			return nil
		}
	}
	_, _, err = k.able(a)
	return err
}

// able is place, and refuses an interface that is down unless it has the address.
func (k *Kernel) able(a Address) (l link, here bool, err error) {
	l, here, err = k.place(a)
	switch {
	case err != nil:
		err = unable{err}
	case !here && !l.up:
		err = unable{fmt.Errorf("vip: add %s to %s: the interface is down: ip link set %s up", a.Prefix.Addr(), l.name, l.name)}
	}
	return l, here, err
}

// unable is an error that is ErrUnable, too.
type unable struct{ error }

func (e unable) Unwrap() []error { return []error{e.error, ErrUnable} }

// Add implements Net. IPv6 addresses are made deprecated (RFC 4862 section 5.5.4),
// so that the machine's own connections do not use them as source. An address of
// a failed Add is taken away again.
func (k *Kernel) Add(ctx context.Context, a Address) error {
	end, err := k.begin()
	if err != nil {
		return err
	}
	defer end()
	if err := check(a); err != nil {
		return err
	}
	added, err := k.add(a)
	if err != nil {
		return err
	}
	if a.Prefix.Addr().Is4() {
		return nil
	}
	if err := k.usable(ctx, a.Prefix.Addr()); err != nil {
		if added {
			// ctx has ended already; what cannot be taken away is found by Added.
			err = errors.Join(err, k.remove(a))
		}
		return err
	}
	return nil
}

func (k *Kernel) add(a Address) (added bool, err error) {
	k.change.Lock()
	defer k.change.Unlock()
	ip := a.Prefix.Addr()
	l, here, err := k.able(a)
	if err != nil || here {
		return false, err
	}
	if k.state != nil {
		if err := k.state.add(a.Prefix, l.name); err != nil {
			return false, err
		}
	}
	_, err = ask(&k.route, unix.NETLINK_ROUTE, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, newAddr(a.Prefix, l.index, k.proto))
	if err != nil {
		var serr error
		if k.state != nil {
			serr = k.state.remove(ip)
		}
		if errors.Is(err, unix.EEXIST) {
			return false, serr // somebody was faster
		}
		return false, errors.Join(fmt.Errorf("vip: add %s to %s: %w%s", a.Prefix, l.name, err, remedy(ip, err)), serr)
	}
	if k.state == nil {
		k.warnProto.Do(func() { k.checkProto(ip) })
	}
	return true, nil
}

// checkProto warns if the kernel has not kept the mark of an address.
func (k *Kernel) checkProto(ip netip.Addr) {
	es, err := k.entries()
	if err != nil {
		return // said by whoever needs them
	}
	for _, e := range es {
		if e.prefix.Addr() == ip && e.proto == 0 {
			k.log.Warn("this kernel does not keep marks of addresses (IFA_PROTO, since Linux 5.18), and no state file is set: after a crash of this process, addresses that it has added are not found", "address", ip)
		}
	}
}

// remedy completes the error of a change of addresses.
func remedy(ip netip.Addr, err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return ": the process needs CAP_NET_ADMIN (run it as root, or AmbientCapabilities=CAP_NET_ADMIN)"
	case errors.Is(err, unix.EACCES) && ip.Is6(), errors.Is(err, unix.EOPNOTSUPP) && ip.Is6():
		return ": IPv6 is switched off there (sysctl net.ipv6.conf.*.disable_ipv6)"
	}
	return ""
}

// newAddr encodes RTM_NEWADDR.
func newAddr(p netip.Prefix, index int, proto uint8) []byte {
	family, flags := unix.AF_INET, uint32(unix.IFA_F_PERMANENT)
	if p.Addr().Is6() {
		family = unix.AF_INET6
		flags |= unix.IFA_F_NODAD
	}
	m := nl.NewIfAddrmsg(family)
	m.Prefixlen = uint8(p.Bits())
	m.Index = uint32(index)
	b := m.Serialize()
	ip := p.Addr().AsSlice()
	f := make([]byte, 4)
	nl.NativeEndian().PutUint32(f, flags)
	b = append(b, nl.NewRtAttr(unix.IFA_LOCAL, ip).Serialize()...)
	b = append(b, nl.NewRtAttr(unix.IFA_ADDRESS, ip).Serialize()...)
	b = append(b, nl.NewRtAttr(unix.IFA_FLAGS, f).Serialize()...)
	b = append(b, nl.NewRtAttr(ifaProto, []byte{proto}).Serialize()...)
	if p.Addr().Is6() {
		// Preferred for no time, valid for ever.
		info := nl.IfaCacheInfo{IfaCacheinfo: unix.IfaCacheinfo{Valid: 0xffffffff}}
		b = append(b, nl.NewRtAttr(unix.IFA_CACHEINFO, info.Serialize()).Serialize()...)
	}
	return b
}

// usable waits until the local routing table has the IPv6 address: the kernel
// enters it from a worker of its own, and what arrives before is not taken. It is
// looked up again and again, because notifications may be lost and an entry that
// is there cannot be missed.
func (k *Kernel) usable(ctx context.Context, ip netip.Addr) error {
	t := time.NewTicker(500 * time.Microsecond)
	defer t.Stop()
	for {
		local, err := k.here(ip)
		if err != nil || local {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("vip: add %s: the kernel does not deliver to it yet: %w: see ip -6 route show table local", ip, context.Cause(ctx))
		case <-t.C:
		}
	}
}

// local tells whether packets to the address are delivered here.
func (k *Kernel) local(ip netip.Addr) (bool, error) {
	m := &nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET6, Dst_len: 128}}
	msgs, err := ask(&k.route, unix.NETLINK_ROUTE, unix.RTM_GETROUTE, 0, m.Serialize(), nl.NewRtAttr(unix.RTA_DST, ip.AsSlice()).Serialize())
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EINVAL) {
		return false, nil // no route, or one that forbids
	}
	if err != nil {
		return false, fmt.Errorf("vip: look up the route of %s: %w", ip, err)
	}
	for _, b := range msgs {
		if len(b) >= unix.SizeofRtMsg && nl.DeserializeRtMsg(b).Type == unix.RTN_LOCAL {
			return true, nil
		}
	}
	return false, nil
}

// Remove implements Net. If the interface is named, an address that is elsewhere
// stays there unless Add has added it. Other IPv4 addresses of the same network
// stay, although the kernel takes them away together with their first one unless
// net.ipv4.conf.*.promote_secondaries is set: they are added again at once. It
// waits for nothing, and works after the context has ended: an address that has to
// go had better go late.
func (k *Kernel) Remove(_ context.Context, a Address) error {
	end, err := k.begin()
	if err != nil {
		return err
	}
	defer end()
	return k.remove(a)
}

func (k *Kernel) remove(a Address) error {
	k.change.Lock()
	defer k.change.Unlock()
	ip := a.Prefix.Addr()
	before, err := k.entries()
	if err != nil {
		return err
	}
	named := 0
	if a.Interface != "" {
		ls, err := k.links()
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(ls, func(l link) bool { return l.name == a.Interface }); i >= 0 {
			named = ls[i].index
		}
	}
	primary := false
	var gone []entry
	for _, e := range before {
		if e.prefix.Addr() != ip || a.Interface != "" && e.index != named && e.proto != k.proto {
			continue
		}
		_, err := ask(&k.route, unix.NETLINK_ROUTE, unix.RTM_DELADDR, unix.NLM_F_ACK, e.raw)
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("vip: remove %s: %w%s", e.prefix, err, remedy(ip, err))
		}
		gone = append(gone, e)
		primary = primary || ip.Is4() && e.flags&unix.IFA_F_SECONDARY == 0
	}
	if primary {
		if err := k.restore(before, gone); err != nil {
			return err
		}
	}
	if k.state != nil {
		return k.state.remove(ip)
	}
	return nil
}

// restore adds secondary addresses again that went with their primary one.
func (k *Kernel) restore(before, gone []entry) error {
	after, err := k.entries()
	if err != nil {
		return err
	}
	for _, e := range before {
		same := func(x entry) bool { return x.index == e.index && x.prefix == e.prefix }
		lost := e.prefix.Addr().Is4() && e.flags&unix.IFA_F_SECONDARY != 0 && !slices.ContainsFunc(after, same) && !slices.ContainsFunc(gone, same) &&
			slices.ContainsFunc(gone, func(x entry) bool {
				return x.index == e.index && x.prefix.Masked() == e.prefix.Masked()
			})
		if !lost {
			continue
		}
		_, err := ask(&k.route, unix.NETLINK_ROUTE, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, e.raw)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("vip: %s went away with the first address of its network and cannot be added again: %w: ip addr add it, and sysctl -w net.ipv4.conf.all.promote_secondaries=1", e.prefix, err)
		}
	}
	return nil
}

// Added implements Net: addresses with the mark of this package, and on kernels
// that keep none, those of the state file.
func (k *Kernel) Added() ([]Address, error) {
	end, err := k.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	es, err := k.entries()
	if err != nil {
		return nil, err
	}
	ls, err := k.links()
	if err != nil {
		return nil, err
	}
	var recorded map[netip.Addr]string
	if k.state != nil {
		k.change.Lock()
		recorded, err = k.state.read()
		k.change.Unlock()
		if err != nil {
			return nil, err
		}
	}
	var out []Address
	for _, e := range es {
		i := slices.IndexFunc(ls, func(l link) bool { return l.index == e.index })
		if i < 0 {
			continue // gone meanwhile
		}
		name, ok := recorded[e.prefix.Addr()]
		if e.proto == k.proto || e.proto == 0 && ok && name == ls[i].name {
			out = append(out, Address{Prefix: e.prefix, Interface: ls[i].name})
		}
	}
	return out, nil
}
