package fdstore

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// manager is a service manager's end of the notify socket.
type manager struct {
	t     *testing.T
	c     *net.UnixConn
	path  string
	store map[string][]*os.File
	done  chan struct{}
}

func newManager(t *testing.T) *manager {
	m := &manager{t: t, path: filepath.Join(t.TempDir(), "n"), store: map[string][]*os.File{}, done: make(chan struct{})}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m.c = c
	go m.run()
	return m
}

// run keeps what it is given until the socket is closed.
func (m *manager) run() {
	defer close(m.done)
	buf, oob := make([]byte, 4096), make([]byte, 8192)
	for {
		n, k, _, _, err := m.c.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		var files []*os.File
		if k > 0 {
			msgs, err := unix.ParseSocketControlMessage(oob[:k])
			if err != nil || len(msgs) != 1 {
				m.t.Errorf("control message: %v", err)
				return
			}
			fds, err := unix.ParseUnixRights(&msgs[0])
			if err != nil {
				m.t.Error(err)
				return
			}
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "received"))
			}
		}
		lines := strings.Split(string(buf[:n]), "\n")
		name := strings.TrimPrefix(lines[len(lines)-1], "FDNAME=")
		switch lines[0] {
		case "FDSTORE=1":
			m.store[name] = append(m.store[name], files...)
		case "FDSTOREREMOVE=1":
			delete(m.store, name)
		case "BARRIER=1":
			files[0].Close()
		default:
			m.t.Errorf("message %q", buf[:n])
		}
	}
}

// end returns what was stored, with the names under which it would be passed.
func (m *manager) end() []*os.File {
	m.c.Close()
	<-m.done
	var l []*os.File
	for _, name := range []string{socketName, connName, recordName} {
		for _, f := range m.store[name] {
			l = append(l, named(m.t, f, name))
			f.Close()
		}
	}
	return l
}

// named is another descriptor of f with the given name.
func named(t *testing.T, f *os.File, name string) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), name)
}

// site is a listener with a connection and a UDP socket.
type site struct {
	ln     *net.TCPListener
	client net.Conn
	server *net.TCPConn
	udp    *net.UDPConn
	at     netip.AddrPort
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{}
	var err error
	if s.ln, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	s.at = s.ln.Addr().(*net.TCPAddr).AddrPort()
	if s.client, err = net.Dial("tcp4", s.at.String()); err != nil {
		t.Fatal(err)
	}
	if s.server, err = s.ln.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	if s.udp, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(s.at)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.ln.Close(); s.client.Close(); s.server.Close(); s.udp.Close() })
	return s
}

func (s *site) handover(t *testing.T, dir string) *Handover {
	t.Helper()
	h := &Handover{DataDir: dir, Addresses: []Address{{s.at.Addr(), 7, 41}}}
	for _, x := range []interface{ File() (*os.File, error) }{s.ln, s.udp} {
		f, err := x.File()
		if err != nil {
			t.Fatal(err)
		}
		h.Sockets = append(h.Sockets, f)
	}
	f, err := s.server.File()
	if err != nil {
		t.Fatal(err)
	}
	h.Conns = append(h.Conns, f)
	return h
}

// stored passes a handover through a manager.
func stored(t *testing.T, s *site, dir string) []*os.File {
	t.Helper()
	m := newManager(t)
	h := s.handover(t, dir)
	if err := Put(m.path, h); err != nil {
		t.Fatal(err)
	}
	h.Close()
	s.ln.Close()
	s.server.Close()
	s.udp.Close()
	return m.end()
}

func boot(t *testing.T) int64 {
	t.Helper()
	d, err := sinceBoot()
	if err != nil {
		t.Fatal(err)
	}
	return int64(d)
}

// ended tells whether the client's connection has ended.
func (s *site) ended(t *testing.T) bool {
	t.Helper()
	// What was closed last was closed before: nothing has to be waited for.
	s.client.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := s.client.Read(make([]byte, 1))
	s.client.SetReadDeadline(time.Time{})
	return !os.IsTimeout(err)
}

func TestHandover(t *testing.T) {
	s := newSite(t)
	var log bytes.Buffer
	in := receive(stored(t, s, "/d"), "/d", boot(t), slog.New(slog.NewTextHandler(&log, nil)))
	if s.ended(t) {
		t.Fatal("the connection has ended")
	}
	f, shared := in.Socket(false, s.at)
	if f == nil || shared {
		t.Fatalf("listener %v, shared %v", f, shared)
	}
	ln, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if f, _ = in.Socket(true, s.at); f == nil {
		t.Fatal("no UDP socket")
	}
	f.Close()
	if f, _ = in.Socket(true, s.at); f != nil {
		t.Error("a socket is given away twice")
	}
	l := in.Conns(Address{s.at.Addr(), 7, 42}, false)
	if len(l) != 1 || l[0].Local != s.at {
		t.Fatalf("connections %v", l)
	}
	c, err := net.FileConn(l[0].File)
	l[0].File.Close()
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	if log.Len() > 0 {
		t.Errorf("log: %s", &log)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if n, err := s.client.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("client reads %d, %v", n, err)
	}
	// Nobody else has it.
	c.Close()
	if _, err := s.client.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("client reads %v", err)
	}
}

// What must not be used is closed, and it is said why.
func TestIgnored(t *testing.T) {
	rec := func(change func(*record)) func(*testing.T, []*os.File) []*os.File {
		return func(t *testing.T, l []*os.File) []*os.File {
			mem := l[len(l)-1]
			r, err := readRecord(mem)
			if err != nil {
				t.Fatal(err)
			}
			change(r)
			text, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if err := mem.Truncate(0); err != nil {
				t.Fatal(err)
			}
			if _, err := mem.WriteAt(text, 0); err != nil {
				t.Fatal(err)
			}
			return l
		}
	}
	for name, c := range map[string]struct {
		change func(*testing.T, []*os.File) []*os.File
		want   string
	}{
		"no record":          {func(_ *testing.T, l []*os.File) []*os.File { l[3].Close(); return l[:3] }, "it has no record"},
		"connection missing": {func(_ *testing.T, l []*os.File) []*os.File { l[2].Close(); return append(l[:2], l[3]) }, "incomplete"},
		"old":                {rec(func(r *record) { r.Boot -= maxAge + time.Second }), "older than"},
		"from the future":    {rec(func(r *record) { r.Boot += time.Hour }), "older than"},
		"other format":       {rec(func(r *record) { r.Format++ }), "format"},
		"other data":         {rec(func(r *record) { r.DataDir = "/other" }), "/other"},
		"damaged": {func(t *testing.T, l []*os.File) []*os.File {
			if _, err := l[3].WriteAt([]byte("x"), 0); err != nil {
				t.Fatal(err)
			}
			return l
		}, "record: "},
		"too long": {func(t *testing.T, l []*os.File) []*os.File {
			if err := l[3].Truncate(maxRecord + 1); err != nil {
				t.Fatal(err)
			}
			return l
		}, "too long"},
		"mixed up": {func(t *testing.T, l []*os.File) []*os.File {
			l[0], l[2] = named(t, l[2], socketName), named(t, l[0], connName)
			return l
		}, "not what its name says"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			var log bytes.Buffer
			l := stored(t, s, "/d")
			if len(l) != 4 {
				t.Fatalf("%d files", len(l))
			}
			in := receive(c.change(t, l), "/d", boot(t), slog.New(slog.NewTextHandler(&log, nil)))
			if !strings.Contains(log.String(), c.want) {
				t.Errorf("log %q, want %q", &log, c.want)
			}
			if f, _ := in.Socket(false, s.at); f != nil {
				t.Error("the listener is used")
			}
			if l := in.Conns(Address{s.at.Addr(), 7, 42}, false); l != nil {
				t.Error("the connection is used")
			}
			in.Close()
			if name != "connection missing" && name != "mixed up" && !s.ended(t) {
				t.Error("the connection is still open")
			}
		})
	}
}

// Connections belong to the period of service that comes next, and to no other.
func TestMovedAway(t *testing.T) {
	s := newSite(t)
	var log bytes.Buffer
	in := receive(stored(t, s, "/d"), "/d", boot(t), slog.New(slog.NewTextHandler(&log, nil)))
	for _, c := range []struct {
		a       Address
		crashed bool
	}{
		{Address{s.at.Addr(), 7, 41}, false}, {Address{s.at.Addr(), 7, 43}, false}, {Address{s.at.Addr(), 8, 42}, false},
		{Address{netip.MustParseAddr("127.0.0.2"), 7, 42}, false}, {Address{s.at.Addr(), 7, 42}, true},
	} {
		if l := in.Conns(c.a, c.crashed); l != nil {
			t.Errorf("%v, crashed %v: the connection is used", c.a, c.crashed)
		}
	}
	in.Close()
	if !s.ended(t) {
		t.Error("the connection is still open")
	}
	if !strings.Contains(log.String(), "connections=1") || !strings.Contains(log.String(), "network=udp") {
		t.Errorf("log: %s", &log)
	}
}

// The listeners of a socket unit need no record, and are shared.
func TestActivated(t *testing.T) {
	s := newSite(t)
	f, err := s.ln.File()
	if err != nil {
		t.Fatal(err)
	}
	files := []*os.File{named(t, f, "baton.socket"), named(t, f, socketName)}
	f.Close()
	var log bytes.Buffer
	in := receive(files[:1], "/d", boot(t), slog.New(slog.NewTextHandler(&log, nil)))
	g, shared := in.Socket(false, s.at)
	if g == nil || !shared || log.Len() > 0 {
		t.Errorf("listener %v, shared %v; %s", g, shared, &log)
	}
	// A handover that is ignored does not take the unit's listeners with it.
	in = receive([]*os.File{g, files[1]}, "/d", boot(t), slog.New(slog.NewTextHandler(&log, nil)))
	g, shared = in.Socket(false, s.at)
	if g == nil || !shared || !strings.Contains(log.String(), "no record") {
		t.Errorf("listener %v, shared %v; %s", g, shared, &log)
	}
	g.Close()
	in.Close()
}

func TestPutFails(t *testing.T) {
	s := newSite(t)
	h := s.handover(t, "/d")
	defer h.Close()
	if err := Put("", h); err == nil {
		t.Error("no service manager is no error")
	}
	if err := Put(filepath.Join(t.TempDir(), "none"), h); err == nil {
		t.Error("a service manager that is gone is no error")
	}
	if s.ended(t) {
		t.Error("the connection has ended")
	}
	var in *Inherited
	if f, _ := in.Socket(false, s.at); f != nil || in.Conns(Address{}, false) != nil {
		t.Error("nothing has something")
	}
	in.Close()
}
